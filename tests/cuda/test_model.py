"""The model of a launch's time, against measurements on an H200, and what `--explain` makes of it."""

import json
from pathlib import Path

import numpy as np
import pytest

from xent_array._engines import _model, cuda
from xent_array._engines._model import Code, Launch, Problem

H200 = _model.card(90)
DATA = json.loads(Path(__file__).with_name("h200_model.json").read_text())
KERNELS = {name: Code(*row) for name, row in DATA["kernels"].items()}
MEASURED = [dict(zip(DATA["row"], row, strict=True)) for row in DATA["rows"]]
WITHOUT_SPILLS = [row for row in MEASURED if KERNELS[row["kernel"]].spill_stores == 0]


OF_A_LAUNCH = Launch._fields[: Launch._fields.index("turn")]  # the kernels measured had no loop except that over a row


def times(row, chip=H200, known=False):
    launch = Launch(*(row[name] for name in OF_A_LAUNCH), known=known)
    return _model.times(launch, KERNELS[row["kernel"]], chip)


def off(row, chip=H200, known=False):
    """The error of the model, relative to the measured time."""
    return times(row, chip, known).all * 1e3 / row["milliseconds"] - 1


def test_the_numbers_are_those_that_the_model_asks_for():
    assert DATA["row"] == ["dtype", "classes", "cluster", *OF_A_LAUNCH, "milliseconds", "kernel"]
    assert DATA["kernel"] == list(Code._fields)
    assert {row["kernel"] for row in MEASURED} == set(KERNELS)


@pytest.mark.parametrize("clusters", [False, True], ids=["blocks", "clusters"])
def test_every_measured_time_is_met(clusters):
    rows = [row for row in WITHOUT_SPILLS if (row["cluster"] > 1) == clusters]
    assert len(rows) == (30 if clusters else 458)
    errors = sorted((abs(off(row)), row["kernel"], row["classes"]) for row in rows)
    assert errors[-1][0] < 0.15
    assert errors[len(errors) * 9 // 10][0] < (0.12 if clusters else 0.11)
    assert {row["dtype"] for row in rows} == {"float32", "bfloat16"}


AHEAD = json.loads(Path(__file__).with_name("h200_prefetch.json").read_text())


@pytest.mark.parametrize("clusters", [False, True], ids=["blocks", "clusters"])
def test_every_measured_time_is_met_where_logits_are_prefetched(clusters):
    """Only two numbers were fitted to these: the wait of a cluster, and the share of code for confident rows."""
    assert AHEAD["row"] == ["dtype", "classes", *Launch._fields, "milliseconds", "kernel"]
    assert AHEAD["kernel"] == list(Code._fields)
    known = {name: Code(*row) for name, row in AHEAD["kernels"].items()}
    errors = []
    for _, _, *row, milliseconds, kernel in AHEAD["rows"]:
        launch = Launch(*row)
        if (launch.cluster > 1) == clusters:
            errors.append(abs(_model.times(launch, known[kernel], H200).all * 1e3 / milliseconds - 1))
    assert len(errors) == (75 if clusters else 28)
    assert max(errors) < (0.15 if clusters else 0.07)
    assert np.sqrt(np.mean(np.square(errors))) < (0.06 if clusters else 0.03)


def test_what_is_executed_needs_no_factor():
    """Although no constant of the model was fitted with it: a fitted share of the code is no better."""
    by_text, executed = (np.array([off(row, known=known) for row in WITHOUT_SPILLS]) for known in (False, True))
    assert abs(executed.mean()) < 0.015
    assert np.sqrt((executed**2).mean()) < 0.07
    assert abs(executed).max() < 0.26
    assert np.sqrt((executed**2).mean()) < 1.2 * np.sqrt((by_text**2).mean())
    few = [off(row, known=True) for row in WITHOUT_SPILLS if row["kernel"].startswith("xent_tiny_")]
    assert abs(np.mean(few)) < 0.03


def test_each_of_the_three_times_matters():
    """Without any one of its parts, the model is far off on some of the measured launches."""
    for name in ("instructions", "memory"):
        without = H200._replace(**{"instructions": {"clock": 1e9}, "memory": {"bandwidth": 1e9}}[name])
        worst = 0.0
        for row in WITHOUT_SPILLS:
            worst = max(worst, -off(row, without))
        assert worst > 0.4, name


def test_short_rows_cost_more_memory_than_their_bytes():
    """The label's logit is read by itself, as a whole sector."""
    full = [
        row
        for row in WITHOUT_SPILLS
        if row["lanes"] and row["lanes"] * row["vectors"] * 16 == row["logits"] // row["rows"] <= 512
    ]
    short = [off(row) for row in full if times(row).decides == "memory"]
    assert len(short) > 6
    assert abs(sum(short) / len(short)) < 0.03


SMALL = Launch(1000, 4 << 20, 8 << 20, 0, True, False, 4, 32, 128, 250, 0)
SOME = Code(64, 0, 4, 4, 0, 1000, 100, [])


def test_special_functions_decide_where_there_are_many():
    assert _model.times(SMALL, SOME._replace(mufu=900), H200).decides == "special functions"
    assert _model.times(SMALL, SOME._replace(mufu=0), H200).special == 0


def test_a_loop_counts_as_often_as_a_thread_goes_round():
    """Its bytes say how often it runs; loops over unaligned ends and barriers count once."""
    launch = SMALL._replace(logits=32 * 128 * 250 * 16 * 10, vectors=0)

    def special(*loops):
        return _model.times(launch, SOME._replace(loops=[list(loop) for loop in loops]), H200).special

    once = special()
    per_thread = launch.logits // (launch.threads * launch.blocks)
    trips = per_thread / 64
    assert trips > 2
    assert special((200, 50, 64, 16)) == pytest.approx(once * (1 + (trips - 1) * 50 / 100))
    assert special((200, 50, 64, 0)) == special((200, 50, 64, 16))  # of shared memory
    assert special((200, 50, 4, 4)) == once
    assert special((3, 1, 0, 0)) == once
    assert special((200, 50, 10 * per_thread, 16)) == once


def test_what_is_executed_counts_where_the_kernel_says_it():
    """TINY and COLUMNS, whose code is mostly for rare cases; for the others a share of the code is taken."""
    said = SOME._replace(executed=[400, 60, []])
    by_text, executed = (_model.times(SMALL._replace(known=known), said, H200) for known in (False, True))
    assert by_text == _model.times(SMALL, SOME, H200)
    assert executed.instructions / by_text.instructions == pytest.approx(400 / (_model.EXECUTED * SOME.instructions))
    assert executed.special / by_text.special == pytest.approx(60 / SOME.mufu)
    for words, known in {
        "9x3:fp32": True,
        "2x9x8:fp32@axis1": True,
        "99x4096:fp32": True,
        "9x4096:fp32+soft": False,
    }.items():
        assert Launch.of(Problem.parse(words).plan("LOSS"), "LOSS").known == known
    otherwise = _model.times(SMALL._replace(known=True, usual=False), said, H200)  # the code with options
    assert otherwise.instructions / by_text.instructions == pytest.approx(1 - 400 / SOME.instructions)
    for words, usual in {"9x4096:fp32": True, "9x4097:fp32": False, "9x4096:fp32+z": False, "9x3:fp32+z": True}.items():
        problem = Problem.parse(words)
        assert Launch.of(problem.plan("LOSS"), "LOSS", usual=problem.usual).usual == usual


def test_what_is_prefetched_waits_in_clusters_only():
    alone, ahead = (_model.times(SMALL._replace(blocks=264, lanes=0, ahead=a), SOME, H200).all for a in (False, True))
    assert ahead < alone
    assert _model.times(SMALL._replace(blocks=264, lanes=0, ahead=True, cluster=4), SOME, H200).all == pytest.approx(
        (1 + 2 * _model.WAITS) * ahead
    )


def test_loads_that_let_the_caches_go_cost_bandwidth_beside_a_gradient():
    launch = SMALL._replace(rows=1, bytes=1 << 30)
    once, plain = (_model.times(launch, SOME._replace(once=once), H200).memory for once in (4, 0))
    assert 1.02 < once / plain < 1.06
    loss = launch._replace(gradient=False)
    assert _model.times(loss, SOME._replace(once=4), H200).memory == pytest.approx(
        _model.times(loss, SOME, H200).memory, rel=1e-6
    )


def test_a_share_is_of_what_moves_as_much():
    """Of a copy; of a kernel that only reads; of three arrays."""
    took = _model.Times(0, 0, 0, 1e-3)
    copied = 2 * SMALL.logits / (H200.bandwidth * 1e9)
    assert _model.share(SMALL, took, H200) == pytest.approx(copied / 1e-3)
    loss = SMALL._replace(gradient=False)
    assert _model.share(loss, took, H200) == pytest.approx(copied / 2 / _model.READ / 1e-3)
    soft = SMALL._replace(more=SMALL.logits)
    assert _model.share(soft, took, H200) == pytest.approx(1.5 * copied / 1e-3)


def test_few_blocks_do_not_use_the_whole_chip():
    whole, eight = (SMALL._replace(blocks=blocks, threads=1024, lanes=0) for blocks in (132, 8))
    assert _model.times(eight, SOME, H200).memory == pytest.approx(132 / 8 * _model.times(whole, SOME, H200).memory)


def test_words_are_parsed():
    assert Problem.parse("4096x50257:bf16@sm90+softcap") == Problem((4096, 50257), "bfloat16", 1, ("softcap",), 90)
    images = Problem.parse("16x21x512x512:fp32@axis1@sm_80+z+smoothing")
    assert images == Problem((16, 21, 512, 512), "float32", 1, ("z", "smoothing"), 80)
    assert (images.rows, images.classes) == (16 * 512 * 512, 21)
    assert Problem.parse("2x3x4:float64").classes == 4


@pytest.mark.parametrize(
    "shape",
    ["", "3x4", "3x0:fp32", "3x4:int8", "3x4:fp32@sm70", "x4:fp32", "3x4:fp32+nothing", "3x4:fp32@axis2", "3x4:fp32@9"],
)
def test_explain_says_what_it_takes(shape):
    with pytest.raises(ValueError, match=r"is not like 4096x50257:bf16|oldest chip is sm75|no logits|no axis 2"):
        _model.explain(shape)


@pytest.mark.parametrize(
    ("words", "layout", "options"),
    [
        ("4096x1000:fp32", "flat", {}),
        ("4x21x32x32:bf16@axis1", "columns", {}),
        ("4096x1000:fp32+softcap", "flat", {"softcap": 30.0}),
        ("4096x1000:fp64+z+smoothing", "flat", {"z_loss": 1e-4, "label_smoothing": 0.1}),
    ],
)
def test_a_problem_is_what_the_engine_would_be_given(words, layout, options):
    problem = Problem.parse(words)
    rows = problem.described()
    dense = np.empty(rows.logits.shape, f"V{rows.logits.dtype.itemsize}")
    assert (rows.logits.strides, rows.logits.ndim) == (dense.strides, dense.ndim)
    assert cuda._layout(rows.logits) == layout
    assert rows.logits.dtype.itemsize == cuda.DTYPES[problem.dtype][1]
    assert rows.has_labels
    assert {name: getattr(rows, name) for name in options} == options
    for job in cuda.JOBS:
        asked = {"layout": layout, "variant": cuda._variant(rows, cuda._target(rows)[0]), "job": job}
        assert problem.plan(job) == cuda.plan(problem.rows, problem.classes, problem.dtype, problem.chip, **asked)
    assert problem.more == 0


def test_options_that_are_arrays_reach_the_plan():
    for option in ("weight", "sample_weight"):
        assert getattr(Problem.parse(f"8x9:fp32+{option}").described(), option) is not None
    soft = Problem.parse("8x9:bf16+soft")
    assert not soft.described().has_labels
    assert soft.more == 8 * 9 * 2
    assert Launch.of(soft.plan("LOSS"), "LOSS", soft.more).bytes == soft.plan("LOSS").bytes("LOSS") + soft.more


@pytest.fixture
def counted(monkeypatch):
    """Every kernel with the code of SOME."""

    class All(dict):
        def get(self, name):
            return SOME

    monkeypatch.setattr(_model, "counts", All)


@pytest.mark.usefixtures("counted")
@pytest.mark.parametrize(
    "shape",
    [
        "4096x50257:bf16@sm90",
        "128x10:fp32",
        "32768x1000:float16@sm80",
        "8x1000000:fp64@sm75",
        "2x21x64x64:fp32@axis1+z",
    ],
)
def test_explain(shape):
    text = _model.explain(shape)
    problem = Problem.parse(shape)
    assert text.startswith(f"{problem.rows} rows of {problem.classes} {problem.dtype} logits, ")
    for job in ("LOSS_AND_GRAD", "LOSS"):
        plan = problem.plan(job)
        assert all(f" {kernel.name}\n" in text for kernel in plan.kernels(job))
        launch, took = _model.times_of(plan, job, lambda name: SOME, _model.card(problem.chip))
        assert f" limited by {took.decides}: about " in text
        share = _model.share(launch, took, _model.card(problem.chip))
        assert f" {share:.0%} of a {'copy' if launch.gradient else 'read'}" in text
        assert f" instructions {took.instructions * 1e6:.3g}," in text
    assert "at least" in text
    assert (" on H200 (measured)" in text) == (problem.chip == 90)
    assert ("(88% of its data sheet)" in text) == (problem.chip != 90)
    assert text.isascii()  # the encoding of the output may have no µ


def test_a_job_of_several_launches_takes_what_they_take():
    plan = Problem.parse("2x10000000:fp32").plan("LOSS_AND_GRAD")
    _, took = _model.times_of(plan, "LOSS_AND_GRAD", lambda name: SOME, H200)
    steps = [_model.times(Launch.of(p, step), SOME, H200) for step, p in plan.over_rows("LOSS_AND_GRAD")]
    assert took.memory == pytest.approx(sum(step.memory for step in steps))
    assert took.all == pytest.approx(sum(step.all for step in steps) + 2 * _model.STARTED)
    assert took.memory > 3 * 4 * 2e7 / 4240e9
    assert _model.times_of(plan, "LOSS_AND_GRAD", {}.get, H200) is None


def test_explain_says_so_where_a_kernel_is_not_counted(monkeypatch):
    monkeypatch.setattr(_model, "counts", dict)
    assert _model.explain("4096x1000:fp32").count("have not been counted") == 3
