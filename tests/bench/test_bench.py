"""`python -m bench`: that it checks before it times, counts right, and that the report is what the rows say."""

import dataclasses
import hashlib
import itertools
import json
import math
import os
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from support.close import BAR
from support.oracle import oracle

import xent_array

pytest.importorskip("tqdm")  # for bench.run
from bench import __main__ as program
from bench import peers, report, run, suite, timing
from bench.suite import (
    ACROSS,
    AUTOGRAD,
    COPY,
    COPY_BY_ONE,
    DETACHED,
    EACH,
    EACH_OUT,
    EAGER,
    GRAD,
    IN_PLACE,
    LOSS,
    MODULE,
    OURS,
    OUT,
    TENSORS,
    THREADS,
    Case,
)  # fmt: skip
from bench.timing import Call

ROOT = Path(__file__).parents[2]
FIELDS = {
    *("case", "library", "operation", "backend", "group", "shape", "axis", "dtype", "target", "clock", "threads"),
    *("failed", "seconds", "min", "q1", "q3", "first", "rounds", "runs", "bytes", "gb_per_s", "of_copy", "of_read"),
    *("loss_units", "grad_units", "memory", "machine", "versions", "commit", "dirty", "seed", "command", "date"),
}
SMALL = Case("test", (6, 5))
SETTINGS = run.Settings("numpy", 1, 1, 0.0, 0.0, False, None, 0, "abc", "python -m bench")


@pytest.fixture(autouse=True)
def _as_before():
    """What makers set for a whole process is put back: PyTorch's threads and JAX's width of numbers."""
    torch, jax = (sys.modules.get(name) for name in ("torch", "jax"))
    threads, wide = torch and torch.get_num_threads(), jax and jax.config.jax_enable_x64
    yield
    if torch:
        torch.set_num_threads(threads)
    if jax:
        jax.config.update("jax_enable_x64", wide)


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """What the quick run prints, and its rows."""
    return _run(tmp_path_factory.mktemp("bench"), "--quick", "--threads", "1")


def _run(folder, *arguments):
    file = folder / "rows.jsonl"
    command = [sys.executable, "-m", "bench", *arguments, "--out", str(file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, [json.loads(line) for line in file.read_text().splitlines()]


def test_the_committed_rows_have_every_field():
    for file in sorted((ROOT / "bench" / "results").glob("*.jsonl")):
        rows = list(map(json.loads, file.read_text().splitlines()))
        if rows[0]["backend"] == suite.SCALE:
            continue  # which has rows of its own: test_bench_scale.py
        traced = {"traced"} if rows[0]["backend"] == THREADS else set()
        assert {frozenset(row) for row in rows} == {frozenset(FIELDS | traced)}, file.name
        names = {case.name for backend in (*suite.GOALS, TENSORS) for case in suite.cases(backend, quick=False)}
        names |= {case.name for case in suite.thread_cases(suite.LARGE[:2], {row["threads"] for row in rows})}
        assert {row["case"] for row in rows} <= names | {case.name for case in suite.ENGINES}, file.name


@pytest.mark.full
def test_every_row_has_every_field(quick):
    _, rows = quick
    assert all(set(row) == FIELDS for row in rows)
    for row in rows:
        assert row["threads"] == 1
        assert row["versions"]["numpy"] == np.__version__
        if row["failed"] is None:
            assert 0 < row["min"] <= row["q1"] <= row["seconds"] <= row["q3"]
            assert row["runs"] >= row["rounds"] == 3
            assert row["gb_per_s"] == pytest.approx(row["bytes"] / row["seconds"] / 1e9)


@pytest.mark.full
def test_quick_run_covers_libraries_operations_dtypes_and_targets(quick):
    printed, rows = quick
    here = {row["library"] for row in rows}
    found, absent = peers.libraries("numpy", np)
    assert here == set(found)
    assert {OURS, COPY, "NumPy", "SciPy", "scikit-learn", "JAX"} <= here
    assert all(f"absent: {name}: " in printed for name in absent)
    ours = [row for row in rows if row["library"] == OURS]
    assert {(r["dtype"], r["target"]) for r in ours} == set(itertools.product(suite.ITEMSIZE, ("labels", "soft")))
    assert {row["operation"] for row in ours} == {LOSS, GRAD, OUT, IN_PLACE}
    assert all(row["failed"] is None and row["loss_units"] <= BAR for row in ours)
    assert all(row["grad_units"] <= BAR for row in ours if row["operation"] != LOSS)


@pytest.mark.full
def test_quick_run_prints_goals(quick):
    printed, rows = quick
    assert re.search(r"^goals: \d+ of \d+ met, \d+ not run$", printed, re.MULTILINE)
    seconds = {(r["case"], r["library"], r["operation"]): r["seconds"] for r in rows}
    case = "sizes 32x10 float32 labels"
    if "torch" in {row["library"] for row in rows}:
        ratio = seconds[case, "torch", GRAD] / seconds[case, OURS, GRAD]
        assert f"{ratio:.2f} >= 1.2   {case}: torch / {OURS} {GRAD}" in printed


# Checked before timed


def _half_the_loss(problem):
    return {LOSS: Call(lambda: peers.numpy(problem)[LOSS].run() / 2)}


def _one_entry_off(problem):
    loss, grad = peers.ours(problem)[GRAD].run()
    grad[1, 2] *= np.float32(1 + 1e-5)
    return {GRAD: Call(lambda: (loss, grad))}


def _breaks(problem):
    raise RuntimeError("no such kernel")


def test_what_is_wrong_is_reported_and_not_timed(monkeypatch, capsys):
    planted = {COPY: peers.copy, OURS: _one_entry_off, "peer": _half_the_loss, "broken": _breaks, "NumPy": peers.numpy}
    monkeypatch.setattr(peers, "libraries", lambda backend, xp, only: (planted, {"gone": "no module named gone"}))
    monkeypatch.setattr(run, "limit_threads", lambda threads: None)
    assert run.run([SMALL], SETTINGS) == 1
    printed = capsys.readouterr().out
    for library, operation, why in ((OURS, GRAD, "elements are off"), ("peer", LOSS, "loss is off")):
        assert re.search(rf"^ *{re.escape(operation)} +{library} +FAILED, not timed: .*{why}", printed, re.MULTILINE)
    assert "broken FAILED: RuntimeError: no such kernel" in printed
    assert "absent: gone: no module named gone" in printed
    assert re.search(r"^ *loss +NumPy +[\d.]+", printed, re.MULTILINE)


def test_cases_are_checked_ahead_and_timed_when_a_line_comes(monkeypatch, capsys, tmp_path):
    """In between no problem is kept; what was wrong is not timed, and is an exit code though time has run out."""
    made, asked = [], []

    def maker(problem):
        made.append(problem)
        return peers.numpy(problem)

    def line():
        asked.append(len(made))

    monkeypatch.setattr(peers, "libraries", lambda backend, xp, only: ({OURS: maker, "peer": _half_the_loss}, {}))
    monkeypatch.setattr(run, "limit_threads", lambda threads: None)
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(readline=line))
    cases = [SMALL, Case("test", (8, 5))]
    out = tmp_path / "rows.jsonl"
    assert run.run(cases, SETTINGS._replace(ahead=True, out=out)) == 0
    assert asked == [2]
    assert len(made) == 4
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert {row["case"] for row in rows} == {case.name for case in cases}
    assert all((row["seconds"] is None) == (row["library"] == "peer") for row in rows)
    assert all("loss is off" in row["failed"] for row in rows if row["library"] == "peer")
    assert capsys.readouterr().out.count(f"{run.READY}\n") == 1
    monkeypatch.setattr(peers, "libraries", lambda backend, xp, only: ({OURS: _half_the_loss}, {}))
    assert run.run(cases, SETTINGS._replace(ahead=True, most=-1.0)) == 1
    assert capsys.readouterr().out.count("not timed, for want of time") == 2


def test_a_peaked_case_has_large_labels_and_the_same_truth():
    flat, peaked = (run.make(SMALL._replace(peaked=peaked), 0, 1, np) for peaked in (False, True))
    rows = np.arange(6), flat[0].target
    assert (peaked[0].target == flat[0].target).all()
    np.testing.assert_allclose(peaked[0].logits[rows], flat[0].logits[rows] + 10)
    assert float(peaked[1].loss) < 0.1 < float(flat[1].loss)
    assert SMALL._replace(peaked=True).name == f"{SMALL.name} peaked"


@pytest.mark.parametrize(
    ("target", "option"),
    [
        *itertools.product(("labels", "soft"), ("", "sample_weight")),
        ("labels", "ignore_index"),
        (suite.INT32, ""),
    ],
)
def test_a_tile_is_repeated_along_every_axis_of_rows(target, option, monkeypatch):
    """And looked for at the start, in the middle and at the end."""
    monkeypatch.setattr(run, "CHECKED", 100)
    assert run.tile_shape((4, 7, 6, 5), 1) == (1, 7, 2, 5)
    problem, truth, tiles = run.make(Case("test", (4, 7, 6, 5), axis=1, target=target, option=option), 0, 1, np)
    assert problem.logits.shape == (4, 7, 6, 5)
    assert [(tile[0].start, tile[2].start) for tile in tiles] == [(0, 0), (2, 2), (3, 4)]
    loss, grad = peers.ours(problem)[GRAD].run()
    run.check((loss, grad), truth, tiles, strictly=True)
    grad[3, 0, 5, 4] += 1
    with pytest.raises(AssertionError, match="grad"):
        run.check((loss, grad), truth, tiles, strictly=True)


def test_a_quarter_of_the_labels_is_ignored(monkeypatch):
    """In each tile; the mean divides by the others. Where a gradient is exactly 0 and must be, its error is 0."""
    monkeypatch.setattr(run, "CHECKED", 60)
    case = Case("test", (24, 5), option="ignore_index")
    problem, truth, tiles = run.make(case, 0, 1, np)
    plain = run.make(case._replace(option=""), 0, 1, np)[0]
    ignored = problem.target == -100
    assert problem.options == {"ignore_index": -100}
    assert ignored.reshape(2, 12).sum(1).tolist() == [3, 3]
    np.testing.assert_array_equal(problem.logits, plain.logits)
    np.testing.assert_array_equal(problem.target[~ignored], plain.target[~ignored])
    assert (problem.divisor, plain.divisor) == (18, 24)
    loss, grad = peers.ours(problem)[GRAD].run()
    assert (grad[ignored] == 0).all()
    errors = run.check((loss, grad), truth, tiles, strictly=True)
    assert all(0 < error <= BAR for error in errors.values())
    grad[np.flatnonzero(ignored)[0], 0] = 1e-9
    assert run.check((loss, grad), truth, tiles, strictly=False)["grad_units"] == math.inf


@pytest.mark.parametrize("library", ["torch", "JAX", "NumPy", "SciPy", "scikit-learn"])
@pytest.mark.parametrize("case", suite.SMALL_OPTIONS, ids=lambda case: case.name)
def test_a_peer_does_a_small_option_right_or_says_why_not(case, library):
    """PyTorch and JAX do all of them, but for PyTorch int32 labels; without options, all do."""
    module, maker = peers.PEERS["numpy"][library]
    pytest.importorskip(module)
    problem, truth, tiles = run.make(case._replace(shape=(32, 10)), 0, 1, np)
    assert problem.has_labels
    assert problem.target.dtype == (np.int32 if case.target == suite.INT32 else np.int64)
    if library == "torch" and case.target == suite.INT32:
        with pytest.raises(peers.Unsupported, match="takes int64 labels only"):
            maker(problem)
    elif library not in ("torch", "JAX") and case.option:
        with pytest.raises(peers.Unsupported, match="without options"):
            maker(problem)
    else:
        call = maker(problem)[GRAD]
        run.check(call.finish(call.run()), truth, tiles, strictly=False)


@pytest.mark.parametrize("option", ["", "weight", "sample_weight", "ignore_index"])
def test_losses_of_each_row_are_held_against_the_mean(option):
    """As on a GPU: the calls of a problem whose arrays are CuPy's, on arrays that are not."""
    problem, truth, tiles = run.make(Case("test", (8, 5), option=option), 0, 1, np)
    calls = peers.ours(dataclasses.replace(problem, xp=None))
    assert {EACH, EACH_OUT} <= set(calls)
    losses = calls[EACH].run()
    assert losses.shape == (8,)
    run.check(calls[EACH].finish(losses), truth, tiles, strictly=True)
    losses, grad = calls[EACH_OUT].run()
    run.check(calls[EACH_OUT].finish((losses, grad)), truth, tiles, strictly=True)
    with pytest.raises(AssertionError, match="grad"):
        run.check(calls[EACH_OUT].finish((losses, 2 * grad)), truth, tiles, strictly=True)
    with pytest.raises(AssertionError, match="loss"):
        run.check(calls[EACH].finish(losses + 1), truth, tiles, strictly=True)


def test_quack_is_asked_for_the_loss_of_each_row(monkeypatch):
    """A stand-in that does what QuACK does, by PyTorch."""
    torch = pytest.importorskip("torch")
    asked = []

    def cross_entropy_fwd(x, target, return_dx=False):
        asked.append(return_dx)
        leaf = x.detach().requires_grad_()
        losses = torch.nn.functional.cross_entropy(leaf, target, reduction="none")
        return (losses.detach(), torch.autograd.grad(losses.sum(), leaf)[0]) if return_dx else losses.detach()

    monkeypatch.setitem(sys.modules, "quack", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "quack.cross_entropy", SimpleNamespace(cross_entropy_fwd=cross_entropy_fwd))
    for dtype in ("float32", "bfloat16"):
        problem, truth, tiles = run.make(Case("test", (8, 5), dtype), 0, 1, np)
        for call in peers.quack(problem).values():
            run.check(call.finish(call.run()), truth, tiles, strictly=False)
    assert asked == [False, True] * 2
    for refused in (
        Case("test", (8, 5), "float64"),
        Case("test", (8, 5), target="soft"),
        Case("test", (2, 5, 3), axis=1),
    ):
        with pytest.raises(peers.Unsupported):
            peers.quack(run.make(refused, 0, 1, np)[0])


def test_only_a_wrong_result_of_ours_is_an_exit_code(monkeypatch, capsys):
    monkeypatch.setattr(peers, "libraries", lambda backend, xp, only: ({OURS: peers.ours, "peer": _half_the_loss}, {}))
    monkeypatch.setattr(run, "limit_threads", lambda threads: None)
    assert run.run([SMALL], SETTINGS) == 0
    assert "loss is off" in capsys.readouterr().out


@pytest.mark.parametrize(
    "case",
    [Case("test", (12, 7)), Case("test", (12, 7), target="soft"), Case("test", (4, 5, 3), "float64", axis=1)],
    ids=lambda case: case.name,
)
def test_truth_of_a_tile_is_that_of_the_whole(case, monkeypatch):
    monkeypatch.setattr(run, "CHECKED", 30)
    problem, truth, tiles = run.make(case, 0, 1, np)
    assert problem.logits.shape == case.shape
    assert len(tiles) > 1
    whole = oracle(problem.logits, problem.target, axis=case.axis)
    assert float(truth.loss) == pytest.approx(float(whole.loss), rel=1e-14)
    for tile in tiles:
        np.testing.assert_allclose(truth.grad.astype(float), whole.grad[tile].astype(float), rtol=1e-13, atol=1e-18)


def test_absent_peers_have_a_reason(monkeypatch):
    monkeypatch.setitem(peers.PEERS, "numpy", {"Nobody": ("no_such_module", _breaks)})
    found, absent = peers.libraries("numpy", np)
    assert "Nobody" not in found
    assert absent["Nobody"] == "No module named 'no_such_module'"
    assert absent["xent_array (engine='cuda')"].startswith("takes CuPy arrays")


# Timing


def test_summary_is_median_minimum_and_quartiles():
    assert timing.summary([4.0, 1.0, 3.0, 2.0, 5.0]) == {"seconds": 3.0, "min": 1.0, "q1": 2.0, "q3": 4.0}


def test_turns_are_shuffled_prepared_settled_and_timed():
    log, taken = [], Counter()

    def clock(function):
        function()
        taken[function] += 1
        return float(taken[function])

    def fails():
        log.append("c")
        if log.count("c") == 3:
            raise MemoryError("full")

    calls = {
        "a": Call(lambda: log.append("a")),
        "b": Call(lambda: log.append("b"), lambda: log.append("refresh")),
        "c": Call(fails),
    }
    times, failed = timing.interleave(
        calls,
        clock,
        rounds=3,
        seconds=0,
        turn=0,
        seed=0,
        quiet=lambda: log.append("quiet"),
        clear=lambda: log.append("clear"),
    )
    assert times == {"a": [[2.0], [4.0], [6.0]], "b": [[2.0], [4.0], [6.0]]}  # every other run settles
    assert isinstance(failed["c"], MemoryError)
    turns = [set(turn) - {"refresh", "quiet"} for cleared, turn in itertools.groupby(log, "clear".__ne__) if cleared]
    assert [len(turn) for turn in turns] == [1] * 8  # the second of c was its last
    assert log.count("quiet") == log.count("clear") == 8
    rounds = [sorted("".join(turn) for turn in part) for part in (turns[:3], turns[3:6])]
    assert rounds == [["a", "b", "c"]] * 2
    assert all(log[i - 1] == "refresh" for i, what in enumerate(log) if what == "b")


def test_short_runs_fill_the_turn():
    calls = {"short": Call(lambda: time.sleep(1e-3)), "long": Call(lambda: time.sleep(0.02))}
    times, _ = timing.interleave(calls, timing.host_clock, rounds=1, seconds=1, turn=0.015, seed=0)
    assert 2 <= len(times["short"][0]) <= 15
    assert min(times["short"][0]) >= 1e-3
    assert len(times["long"][0]) == 1


def test_what_takes_long_gets_fewer_turns():
    calls = {"short": Call(lambda: None), "long": Call(lambda: time.sleep(0.01))}
    times, _ = timing.interleave(calls, timing.host_clock, rounds=5, seconds=0.05, turn=1e-4, seed=0)
    assert len(times["short"]) == 5
    assert len(times["long"]) == timing.FEWEST


def test_a_turn_waits_for_threads_that_spin():
    until = time.perf_counter() + 0.1

    def spin():
        while time.perf_counter() < until:
            hashlib.sha256(bytes(1 << 20)).digest()  # without the GIL

    thread = threading.Thread(target=spin)
    thread.start()
    timing.wait_until_quiet(most=10)
    assert time.perf_counter() > until
    thread.join()


def test_a_turn_does_not_wait_forever():
    thread = threading.Thread(target=lambda: hashlib.pbkdf2_hmac("sha256", b"", b"", 1_000_000))  # half a second
    thread.start()
    timing.wait_until_quiet(most=0.02)
    assert thread.is_alive()
    thread.join()


def test_the_copy_is_the_faster_of_two(monkeypatch):
    def copies(one, all_threads):
        return lambda problem: {
            COPY: Call(lambda: time.sleep(all_threads)),
            COPY_BY_ONE: Call(lambda: time.sleep(one)),
        }

    for one, both, threads in ((1e-3, 9e-3, 1), (9e-3, 1e-3, 2)):
        (row,), _ = run.measure(SMALL, {COPY: copies(one, both)}, SETTINGS._replace(threads=2), np)
        assert (row["operation"], row["threads"], row["of_copy"]) == (COPY, threads, 1)
        assert 1e-3 <= row["seconds"] < 9e-3


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("shape", [(7, 5), (300, 1000)])
def test_the_copy_copies(threads, shape):
    problem, _, _ = run.make(Case("test", shape), 0, threads, np)
    calls = peers.copy(problem)
    assert set(calls) == ({COPY} if threads == 1 else {COPY, COPY_BY_ONE})
    for call in calls.values():
        problem.spare.fill(0)
        call.run()
        np.testing.assert_array_equal(problem.spare, problem.logits)


def test_bytes_that_must_move():
    assert Case("test", (4, 10)).must_move(LOSS) == 4 * 10 * 4 + 4 * 8
    assert Case("test", (4, 10)).must_move(GRAD) == 2 * 4 * 10 * 4 + 4 * 8
    assert Case("test", (4, 10), target=suite.INT32).must_move(GRAD) == 2 * 4 * 10 * 4 + 4 * 4
    assert Case("test", (4, 10), "bfloat16", "soft").must_move(GRAD) == 3 * 4 * 10 * 2
    assert Case("test", (2, 5, 3), axis=1).must_move(COPY) == 2 * 30 * 4


CAN_COUNT = pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="no /proc/self/clear_refs to write to"
)


@pytest.mark.full
@CAN_COUNT
def test_peak_memory_counts_the_gradient_and_nothing_else():
    case = Case("test", (8192, 1000))
    fresh, in_place = (run.peak_memory(case, OURS, operation, SETTINGS) for operation in (GRAD, IN_PLACE))
    assert 0.9 < fresh / case.nbytes < 1.5
    assert in_place / case.nbytes < 0.5


@pytest.mark.full
@CAN_COUNT
@pytest.mark.parametrize(("library", "least", "most"), [("torch", 2.5, 4), ("JAX", 0.9, 2), (AUTOGRAD, 0.9, 1.5)])
def test_peak_memory_of_tensors(library, least, most):
    """A gradient, and with PyTorch two arrays more; no copy of what goes in, which JAX makes while others go on."""
    pytest.importorskip("jax" if library == "JAX" else "torch")
    case = Case(TENSORS, (8192, 1000))
    peak = run.peak_memory(case, library, GRAD, SETTINGS._replace(backend=TENSORS))
    assert least < peak / case.nbytes < most


# Tensors


@pytest.fixture
def peer(library):
    """Whose arrays the library takes."""
    return np if library == OURS else pytest.importorskip("jax" if library == EAGER else "torch")


@pytest.mark.parametrize("library", [OURS, DETACHED, AUTOGRAD, MODULE, EAGER])
def test_ours_is_given_the_arrays_that_its_name_says(library, peer, monkeypatch):
    """In the memory of the problem, if not of JAX; and what it makes of them is held against the oracle."""
    given = []

    def spied(function):
        def call(logits, target, **options):
            given.append(logits)
            return function(logits, target, **options)

        return call

    loss = spied(xent_array.cross_entropy)
    monkeypatch.setattr(xent_array, "cross_entropy", loss)
    monkeypatch.setattr(xent_array, "cross_entropy_value_and_grad", spied(xent_array.cross_entropy_value_and_grad))
    monkeypatch.setitem(sys.modules, "xent_array.torch", SimpleNamespace(CrossEntropyLoss=lambda: loss))
    problem, truth, tiles = run.make(Case(TENSORS, (6, 5), operations=(GRAD,)), 0, 1, np)
    found = peers.libraries(TENSORS, np)[0][library](problem)[GRAD].run()
    run.check(found, truth, tiles, strictly=True)
    (logits,) = given
    if library == OURS:
        assert logits is problem.logits
    elif library == EAGER:
        assert isinstance(logits, peer.Array)
        assert isinstance(found[1], peer.Array)
    else:
        assert logits.data_ptr() == problem.logits.ctypes.data
        assert logits.requires_grad == (library != DETACHED)
        assert isinstance(found[1], peer.Tensor)


def test_tensors_of_what_is_not_installed_are_absent(monkeypatch):
    for name in ("torch", "xent_array.torch"):
        monkeypatch.setitem(sys.modules, name, None)
    found, absent = peers.libraries(TENSORS, np)
    assert {"torch", AUTOGRAD, DETACHED, MODULE} <= set(absent)
    assert not set(found) & set(absent)
    assert {COPY, OURS} <= set(found) <= {COPY, OURS, "JAX", EAGER}


@pytest.mark.full
def test_the_quick_run_of_tensors(tmp_path):
    printed, rows = _run(tmp_path, "tensors", "--quick")
    found, absent = peers.libraries(TENSORS, np)
    shapes = [case.shape for case in suite.TENSORS_QUICK]
    assert Counter((row["library"], tuple(row["shape"])) for row in rows) == Counter(itertools.product(found, shapes))
    assert all(f"absent: {name}: " in printed for name in absent)
    for row in rows:
        assert set(row) == FIELDS
        assert row["failed"] is None
        assert row["command"].startswith("python -m bench tensors --quick ")
        assert 0 < row["min"] <= row["q1"] <= row["seconds"] <= row["q3"]
        if row["library"] != COPY:
            assert 0 <= row["grad_units"] <= BAR
    (line,) = re.findall(r"^\| 2000 × 1000 \|.*$", printed, re.MULTILINE)
    seconds = {row["library"]: row["seconds"] for row in rows if row["shape"] == [2000, 1000]}
    if "torch" in found:
        assert f"| {seconds['torch'] / seconds[AUTOGRAD]:.2f}× |" in line
    if "JAX" in found:
        assert f"| {seconds['JAX'] / seconds[EAGER]:.2f}× |" in line


# The suite


def test_goals_are_met_missed_or_not_run():
    def row(case, library, operation, seconds):
        return {"case": case.name, "library": library, "operation": operation, "seconds": seconds}

    tiny, flat = suite.SIZES[5], [case for case in suite.CLASSES if case.classes >= 256]
    rows = [
        row(tiny, "torch", GRAD, 2.4),
        row(tiny, OURS, GRAD, 2.0),
        row(tiny, "torch", LOSS, 1.5),
        row(tiny, OURS, LOSS, 2.0),
    ]
    rows += [row(case, OURS, GRAD, 1.6 if case is flat[-1] else 1.0) for case in flat]
    head, *lines = run.goals(rows, "numpy")
    assert head == f"goals: 1 of 3 met, {len(suite.GOALS['numpy']) - 3} not run"
    assert [line.split()[:4] for line in lines] == [
        ["met", "1.20", ">=", "1.2"],
        ["MISSED", "0.75", ">=", "0.8"],
        ["MISSED", "1.60", "<=", "1.5"],
    ]


def test_small_options_and_few_classes_have_goals():
    """The time with an option divided by that without; that of few classes divided by the time of a copy."""
    plain, tiny = suite.SIZES[4:6]
    few = [case for case in suite.CLASSES if case.classes <= 64]
    over = [(case, OURS, GRAD, tiny if case.shape == tiny.shape else plain, OURS, GRAD) for case in suite.SMALL_OPTIONS]
    over += [(case, OURS, GRAD, case, COPY, COPY) for case in few]
    texts = [
        *(f"{case.name}: {OURS} / {OURS} {GRAD} of {other.name}" for case, _, _, other, _, _ in over[:5]),
        *(f"{case.name}: {OURS} {GRAD} / {COPY} {COPY}" for case in few),
    ]
    bounds = [1.5, 3, 1.2, 1.1, 1.5, 4, 1.6, 1.4]
    assert [case.classes for case in few] == [2, 16, 64]
    assert [case.option or case.target for case in suite.SMALL_OPTIONS] == [
        "label_smoothing", "softcap", "ignore_index", suite.INT32, suite.INT32,
    ]  # fmt: skip
    for text, bound, (case, library, operation, *other) in zip(texts, bounds, over, strict=True):
        for factor, verdict in ((0.99, "met"), (1.01, "MISSED")):
            times = {(case.name, library, operation): factor * bound, (other[0].name, *other[1:]): 1.0}
            rows = [
                {"case": name, "library": library, "operation": operation, "seconds": seconds}
                for (name, library, operation), seconds in times.items()
            ]
            _, line = run.goals(rows, "numpy")
            assert line.split(maxsplit=4) == [verdict, f"{factor * bound:.2f}", "<=", f"{bound:g}", text]


def test_a_case_is_itself_again_from_json():
    for case in suite.cases("numpy", quick=False):
        assert suite.case_of(json.loads(json.dumps(case))) == case


@pytest.mark.parametrize("backend", suite.GOALS)
def test_every_goal_can_be_reached_by_the_cases(backend):
    cases = suite.cases(backend, quick=False)
    assert len({case.name for case in cases}) == len(cases)
    full = {
        (case.name, library, operation): {"seconds": float(case.size), "of_copy": 1.0, "of_read": 1.0}
        for case in cases
        for library in (OURS, COPY, *peers.PEERS[backend])
        for operation in (LOSS, GRAD, OUT, EACH, EACH_OUT, COPY)
    }
    assert all(goal.value(full) == 1 for goal in suite.GOALS[backend])


def test_arguments_are_checked(capsys):
    assert program.main(["--list", "--cases", "^sizes 32x10 "]) == 0
    assert capsys.readouterr().out == "sizes 32x10 float32 labels\n"
    for wrong in (["--cases", "no such case"], ["--threads", "0"]):
        with pytest.raises(SystemExit):
            program.main(wrong)


# The report


@pytest.fixture
def results(quick, tmp_path):
    """A folder with rows, some of them moved to cases that are drawn, and a README with a place for the report."""
    _, rows = quick
    moved = [
        row | {"case": case.name, "seconds": row["seconds"] * math.log2(case.classes)}
        for case in suite.CLASSES
        for row in rows
        if row["case"] == "sizes 32x10 float32 labels"
    ]
    folder = tmp_path / "results"
    folder.mkdir()
    (folder / "cpu.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows + moved))
    (tmp_path / "README.md").write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    return tmp_path


def _report(folder, *more):
    return report.main(["--results", str(folder / "results"), "--readme", str(folder / "README.md"), *more])


def test_report_says_what_the_rows_say(results):
    assert _report(results, "--check") == 1
    assert _report(results) == 0
    assert _report(results, "--check") == 0
    readme = (results / "README.md").read_text()
    assert readme.startswith(f"before\n{report.BEGIN}\n")
    assert readme.endswith(f"{report.END}\nafter\n")
    rows = report.read(results / "results")
    ours, numpy = (
        rows["numpy", "sizes 4096x10 float32 labels", library, GRAD]["seconds"] for library in (OURS, "NumPy")
    )
    (line,) = (line for line in readme.splitlines() if line.startswith(f"| 4096 × 10 | {ours * 1e3:.3g} | "))
    assert f"| {numpy / ours:.1f}× |" in line
    assert re.search(r"^\| 4096 × 10, loss only \| [\d.]+ \|  \|  \| ", readme, re.MULTILINE)
    assert "](results/classes.svg)" in readme
    assert (results / "results" / "classes.svg").read_text().startswith("<?xml")
    worst = max(row["grad_units"] or 0 for key, row in rows.items() if key[2] == OURS and row["dtype"] == "float16")
    assert re.search(rf"^\| {OURS} \|.*/ {worst:.2g} \|$|^\| {OURS} \| \S+ / {worst:.2g} \|", readme, re.MULTILINE)
    assert "**GPU**: no results yet." in readme


def test_report_is_the_same_again_and_finds_any_change(results, capsys):
    _report(results)
    drawn = {path: path.read_bytes() for path in results.rglob("*.svg")}
    _report(results)
    assert drawn == {path: path.read_bytes() for path in results.rglob("*.svg")}

    readme, rows = results / "README.md", results / "results" / "cpu.jsonl"
    written = readme.read_text()
    readme.write_text(written.replace("×", "x", 1))
    assert _report(results, "--check") == 1
    readme.write_text(written)
    assert _report(results, "--check") == 0

    lines = rows.read_text().splitlines()
    wanted = (suite.CLASSES[0].name, OURS, GRAD)
    (at,) = (
        i for i, row in enumerate(map(json.loads, lines)) if (row["case"], row["library"], row["operation"]) == wanted
    )
    lines[at] = json.dumps(json.loads(lines[at]) | {"seconds": 1.5})
    rows.write_text("\n".join(lines))
    capsys.readouterr()
    assert _report(results, "--check") == 1
    assert "classes.svg is not what" in capsys.readouterr().out


def test_a_wrong_peer_is_called_wrong(results):
    rows = results / "results" / "cpu.jsonl"
    lines = [json.loads(line) for line in rows.read_text().splitlines()]
    for row in lines:
        if (row["library"], row["case"]) == ("NumPy", "sizes 32x10 float32 labels"):
            row |= {"seconds": None, "failed": "AssertionError: loss is off by inf"}
    rows.write_text("\n".join(map(json.dumps, lines)))
    _report(results)
    readme = (results / "README.md").read_text()
    (line,) = re.findall(r"^\| 32 × 10 \|.*$", readme, re.MULTILINE)
    assert line.endswith("| wrong |")
    (line,) = re.findall(r"^\| NumPy \|.*$", readme, re.MULTILINE)
    assert line.count(", wrong in at least one case") == 1


def _row(case, library, operation, seconds, backend="cupy", **more):
    machine = {"cpu": "a CPU", "cores": 16, "load": None, "gpu": "a GPU" if backend == "cupy" else None}
    return {
        "case": case.name, "library": library, "operation": operation, "backend": backend, "group": case.group,
        "dtype": case.dtype, "seconds": seconds, "failed": None, "of_copy": 0.875, "gb_per_s": seconds and 1 / seconds,
        "loss_units": None, "grad_units": None, "memory": None, "machine": machine, "threads": 16, "versions": {},
        "commit": "abc", "dirty": False, "command": "a harness", "date": "2026-01-01", **more,
    }  # fmt: skip


def _reported(tmp_path, rows):
    folder = tmp_path / "results"
    folder.mkdir(exist_ok=True)
    (folder / "gpu.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "README.md").write_text(f"{report.BEGIN}\n{report.END}\n")
    assert _report(tmp_path) == 0
    return (tmp_path / "README.md").read_text(), {path.name for path in folder.glob("*.svg")}


def test_a_gpu_s_table_holds_a_peer_against_what_does_the_same(tmp_path):
    """QuACK gives the loss of each row, PyTorch the mean; the share of a copy is of the first."""
    case = suite.GPU_CELLS[3]
    rows = [
        _row(case, OURS, GRAD, 2e-3), _row(case, OURS, OUT, 3e-3), _row(case, OURS, EACH_OUT, 1e-3),
        _row(case, "torch", GRAD, 5e-3), _row(case, "QuACK", EACH_OUT, 1.5e-3), _row(case, COPY, COPY, 1e-3),
        _row(case, OURS, EACH, 1e-3), _row(case, "torch", LOSS, 5e-3), _row(case, "QuACK", EACH, 0.5e-3),
    ]  # fmt: skip
    with_loss = [row | {"case": suite.GPU_CELLS[4].name} for row in rows]
    text, plots = _reported(tmp_path, rows + with_loss)
    assert "| 32768 × 2048 | 2 | 3 | 1 | 88% | 2.50× | 1.50× |" in text
    assert "| 32768 × 4096, loss only |  |  | 1 | 88% |  | 0.50× |" in text
    assert "**GPU**, a GPU; ; commit abc; 2026-01-01; by a harness:" in text
    assert "Largest error" not in text, "of what nobody judged"
    assert plots == {"gpu-float32.svg"}
    absent = "the same problem on this library's two engines: not measured yet on one machine."
    assert f"**GPU against CPU**, {absent}" in text


def test_tensors_are_reported_apart(tmp_path):
    """Each library's own time divided by ours; a memory in sizes of the logits; nothing of it in the CPU's tables."""
    case, other, large = suite.TENSOR_CASES[0], suite.TENSOR_CASES[1], suite.TENSOR_CASES[-1]
    seconds = {"torch": 6e-3, AUTOGRAD: 4e-3, DETACHED: 2e-3, MODULE: 5e-3, "JAX": 3e-3, EAGER: 12e-3, OURS: 1e-3}
    rows = [_row(case, library, GRAD, taken, TENSORS) for library, taken in seconds.items()]
    rows += [_row(other, library, GRAD, taken, TENSORS) for library, taken in seconds.items() if library != "torch"]
    rows.append(_row(other, "torch", GRAD, None, TENSORS, failed="AssertionError: loss is off by inf"))
    rows += [
        _row(large, library, GRAD, 1.0, TENSORS, memory=times * large.nbytes)
        for library, times in (("torch", 3), (AUTOGRAD, 1))
    ]
    text, plots = _reported(tmp_path, rows)
    assert "**PyTorch tensors and JAX arrays on the CPU**, a CPU, 16 threads; ; commit abc;" in text
    assert "| 32 × 10 | 6 | 4 | 2 | 1.50× | 3.00× | 3 | 12 | 0.25× | 1 |" in text
    assert "| 4096 × 1000 |  | 4 | 2 | wrong | wrong | 3 | 12 | 0.25× | 1 |" in text
    assert "| 4000 × 8000 | 1000 | 1000 |  | 1.00× |  |  |  |  |  |" in text
    beyond = "at 4000 × 8000, in addition to the inputs and `out`, in multiples of the size of the logits"
    assert f"{beyond}: PyTorch 3.0, ours by autograd 1.0." in text
    assert text.index("**CPU**: no results yet.") < text.index("**PyTorch tensors") < text.index("**GPU**: no results")
    assert "Largest error" not in text
    assert plots == set()
    assert _reported(tmp_path, [])[0].count(": no results yet.") == 5


def test_gpu_and_cpu_are_compared_on_one_machine_only(tmp_path):
    few, many = suite.ENGINES_ROWS[:2]
    rows = [
        _row(few, OURS, GRAD, 1e-3, "numpy"), _row(few, OURS, GRAD, 4e-3), _row(few, COPY, ACROSS, 4e-3),
        _row(many, OURS, GRAD, 8e-3, "numpy"), _row(many, OURS, GRAD, 2e-3), _row(many, COPY, ACROSS, 2e-3),
    ]  # fmt: skip
    text, plots = _reported(tmp_path, rows)
    assert "| 64 × 1000 | 1 | 4 | 0.2× | 4 | 0.1× |\n| 512 × 1000 | 8 | 2 | 4.0× | 2 | 2.0× |" in text
    assert plots == {"engines-rows.svg"}
    assert "**CPU**: no results yet." in text
    assert "**GPU**: no results yet." in text
    for row in rows:
        if row["backend"] == "numpy":
            row["machine"]["cores"] = 2
    text, plots = _reported(tmp_path, rows)
    assert "not measured yet on one machine" in text
    assert plots == set()


def test_the_readme_is_what_the_report_writes(capsys):
    assert report.main(["--check"]) == 0, capsys.readouterr().out


def test_the_host_is_timed_where_there_is_no_gpu(monkeypatch, capsys):
    pytest.importorskip("cupy")
    from bench import host

    monkeypatch.setattr(host, "TURNS", 2)
    monkeypatch.setattr(host, "CALLS", 2)
    assert host.main([]) == 0
    launches = re.findall(r"(?m)again +[\d.]+ µs, first +[\d.]+ µs, (\d) launches$", capsys.readouterr().out)
    assert launches == ["1", "3", "3", "2"]
