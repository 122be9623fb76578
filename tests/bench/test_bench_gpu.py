"""The one command for a GPU machine: its list is complete, its pieces end, its launches are right under emulation."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from support.plans import assert_it_covers, assert_it_fits  # noqa: E402

import xent_array  # noqa: E402
from bench import __main__ as program  # noqa: E402
from bench import gpu, launches, model, suite, tune  # noqa: E402
from xent_array._engines import cuda  # noqa: E402
from xent_array._engines._model import Problem  # noqa: E402


def dry_run(*arguments):
    command = [sys.executable, "-m", "bench", "gpu", "--dry-run", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_five_minutes_hold_what_is_worth_most():
    said = dry_run("--minutes", "5")
    assert int(re.search(r"(?m)^\d+ pieces, (\d+) seconds$", said)[1]) <= 300
    for i in range(1, gpu.LAUNCHERS + 1):
        assert f"python -m bench.launches --part {i}/{gpu.LAUNCHERS} --most 70\n" in said
    chosen = "--require cupy -k (cupy or test_gpu) and not standin and not many"
    assert f"{chosen} -n 10 -p no:cacheprovider -p no:benchmark --tb=short tests\n" in said
    at = {name: int(when) for when, name in re.findall(r"(?m)^ *(\d+) s +\d+ s  (.*?)  \(", said)}
    assert (
        at["tests"]
        == at[f"launches 1/{gpu.LAUNCHERS}"]
        < at["time cells-float32"]
        < at["time cells-bfloat16"]
        < at["time options"]
        < at["time dtypes"]
        < at["time layouts"]
    )
    assert sum(name.startswith("sanitizer") for name in at) == 8
    assert "two GPUs  (classes over NCCL; skipped where there is one GPU)\n" in said
    assert " python -m bench.nccl\n" in said
    chosen = gpu.that_fit(gpu.stages(), 5)
    assert sum(gpu.needs(stage) for stage in chosen if "cells" in stage[0].name) <= 90
    assert sum(gpu.needs(stage) for stage in chosen if re.search("options|dtypes|layouts", stage[0].name)) <= 60


@pytest.mark.parametrize("minutes", [1, 2, 3.5, 5, 8, 60])
def test_what_fits_is_the_first_that_do(minutes):
    chosen = gpu.that_fit(gpu.stages(), minutes)
    assert sum(map(gpu.needs, chosen)) + gpu.BEGIN <= minutes * 60
    left = minutes * 60 - gpu.BEGIN - sum(map(gpu.needs, chosen))
    assert all(gpu.needs(stage) > left for stage in gpu.stages() if stage not in chosen)
    assert chosen == [stage for stage in gpu.stages() if stage in chosen]


def test_in_an_hour_every_launch_is_under_every_tool():
    names = [piece.name for stage in gpu.that_fit(gpu.stages(), 60) for piece in stage]
    assert len(set(names)) == len(names)
    for tool in gpu.TOOLS:
        assert {f"sanitizer {tool} {i}/{gpu.PARTS}" for i in range(1, gpu.PARTS + 1)} <= set(names)
    assert "tune" in names


def test_every_case_for_a_gpu_is_timed_in_one_piece_with_a_file_of_its_own():
    pytest.importorskip("tqdm")  # bench.run imports it
    commands = [piece.command for stage in gpu.stages() for piece in stage if piece.ahead]
    for case in suite.cases("cupy", quick=False):
        found = [command for command in commands if re.search(command[command.index("--cases") + 1], case.name)]
        assert len(found) == 1, case.name
    files = [piece.command[-1] for stage in gpu.stages() for piece in stage if "--out" in piece.command]
    assert len(set(files)) == len(files) == 6
    for stage in gpu.stages():
        assert len(stage) == 1 or not any(piece.ahead for piece in stage), "what is timed runs alone"
        for piece in stage:  # an argument unknown to the parser would end it at once
            if piece.command[:4] == ("python", "-m", "bench", "--backend"):
                assert program.main([*piece.command[3:], "--list"]) == 0


@pytest.mark.parametrize(
    "chip", [90, *(pytest.param(chip, marks=pytest.mark.full) for chip in (75, 80, 86, 89, 100, 120))]
)
def test_every_kernel_of_the_catalogue_is_launched_in_some_part(chip):
    every = launches.problems(chip)
    parts = [launches.part_of(every, f"{i}/{gpu.LAUNCHERS}") for i in range(1, gpu.LAUNCHERS + 1)]
    cases = [case for part in parts for case in part]
    assert sorted(cases) == sorted(every)
    assert {name for case in cases for name in case.kernels()} == set(launches.known(chip))
    for part in parts:
        assert {case.out for case in part} <= set(launches.OUTS)
    for of, wanted in (
        (lambda case: case.labels, set(cuda.LABELS)),
        (lambda case: case.target, set(launches.TARGETS)),
        (lambda case: (case.plan("LOSS").family, case.out), {(f, out) for f in cuda.FAMILIES for out in launches.OUTS}),
        (
            lambda case: (case.plan("LOSS").family, case.reduction),
            {(f, r) for f in cuda.FAMILIES for r in ("mean", "sum", "none")},
        ),
    ):
        assert {of(case) for case in cases} == wanted
    assert sum(case.rows > cuda.SUM_ALONE for case in cases) == 8


@pytest.mark.full
@pytest.mark.skipif(shutil.which("g++") is None, reason="the emulation needs g++")
def test_launches_under_emulation(capsys):
    assert launches.main(["--emulated", "--part", "2/120"]) == 0
    said = re.search(r"(\d+) problems, (\d+) kernels, (\d+) launches, 0 wrong", capsys.readouterr().out)
    assert int(said[2]) >= 4 * int(said[1])


@pytest.mark.full
@pytest.mark.skipif(shutil.which("g++") is None, reason="the emulation needs g++")
def test_a_wrong_kernel_is_told_and_so_is_one_that_is_missing(capsys):
    cases = [case for case in launches.problems(90) if case.plan("LOSS").family == "WARP" and case.classes > 9][:1]
    where = launches.emulation(90, "check")
    where.engine.launcher.patches = [("tail = log1p_acc(rest);", "tail = rest;")]
    assert launches.run(cases, where) == (1, 1)
    assert "WRONG" in capsys.readouterr().out
    assert launches.run(cases, launches.emulation(90, "check")._replace(launched=[])) == (1, 1)
    assert "not launched" in capsys.readouterr().out
    assert launches.run(cases, where, -1) == (0, 0)


def test_launches_say_how_far_they_came(capsys):
    assert launches.main(["--emulated", "--part", "2/60", "--most", "-1"]) == 0
    assert re.search(r"\d+ problems, the first 0 in -1 s, 0 kernels, 0 launches, 0 wrong", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("module", "says"),
    [(None, "CuPy cannot be imported"), (SimpleNamespace(is_available=lambda: False), "CuPy finds no CUDA device")],
    ids=["absent", "no device"],
)
def test_without_a_gpu_it_stops_at_once_and_leaves_no_file(module, says, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "cupy", module)
    monkeypatch.setattr(gpu, "Process", lambda piece: pytest.fail(f"{piece.name} was started"))
    out = tmp_path / "results" / "gpu.jsonl"
    assert gpu.main(["--out", str(out)]) == 1
    assert says in capsys.readouterr().err
    assert not out.parent.exists()
    assert gpu.main(["--dry-run", "--out", str(out)]) == 0
    assert not out.parent.exists()


@pytest.mark.parametrize("job", ["gpu", "tune"])
def test_a_job_for_a_gpu_says_why_it_stops(job, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "cupy", None)
    assert program.main([job]) == 1
    assert f"python -m bench {job} is for a machine with a GPU: CuPy cannot be imported" in capsys.readouterr().err


def test_pieces_are_recorded_however_they_end(tmp_path, monkeypatch, capsys):
    sleeps = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    made = [
        [
            gpu.Piece("slow", ("python", "-c", sleeps), "", 3),
            gpu.Piece("good", ("python", "-c", "print('fine')"), "", 30),
            gpu.Piece("bad", ("python", "-c", "raise SystemExit(3)"), "", 30),
            gpu.Piece("absent", ("no-such-command",), "", 30),
        ],
        [gpu.Piece("last", ("python", "-c", "import bench"), "", 30)],
    ]
    monkeypatch.setattr(gpu, "stages", lambda: made)
    monkeypatch.setattr(gpu, "missing", lambda: None)
    out = tmp_path / "results" / "gpu.log"
    start = time.monotonic()
    assert gpu.main(["--out", str(out)]) == 1
    assert time.monotonic() - start < 30
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert records[-1]["piece"] == "last", "a stage begins when the one before has ended"
    assert records[-2]["piece"] == "slow", "a record is written when its piece ends"
    ended = {record["piece"]: (record["ended"], record["rc"]) for record in records}
    assert ended == {
        "good": ("passed", 0), "bad": ("failed", 3), "slow": ("timed out", None), "absent": ("failed", None),
        "last": ("passed", 0),
    }  # fmt: skip
    (good,) = (record for record in records if record["piece"] == "good")
    assert good["output"] == ["fine"]
    assert {"gpu", "driver", "cuda", "cupy", "numpy", "python", "commit"} <= set(good["machine"])
    assert "2 of 5 pieces passed" in capsys.readouterr().out
    assert gpu.main(["--out", str(out), "--only", "good"]) == 0
    assert len(out.read_text().splitlines()) == 6


AHEAD = """
import sys, time
print(time.monotonic(), flush=True)
sys.stdin.readline()
print(time.monotonic(), flush=True)
time.sleep(0.2)
print(time.monotonic(), flush=True)
"""
BUSY = """
import time
at = begun = time.monotonic()
longest = at, at
while at < begun + 3:
    time.sleep(0.01)
    before, at = at, time.monotonic()
    longest = max(longest, (before, at), key=lambda gap: gap[1] - gap[0])
print(*longest, sep=chr(10))
"""


def test_what_is_timed_begins_early_and_is_alone_when_it_is_timed(tmp_path, monkeypatch):
    """Two that wait for a go, and one that is still busy then: it is stopped meanwhile."""
    made = [
        [gpu.Piece("check", ("python", "-c", "import time; time.sleep(1); print(time.monotonic())"), "", 30)],
        [gpu.Piece("first", ("python", "-c", AHEAD), "", 30, ahead=True)],
        [gpu.Piece("busy", ("python", "-c", BUSY), "", 30, ahead=True)],
    ]
    said = {record["piece"]: list(map(float, record["output"])) for record in gpu.run(made)}
    (checked,) = said["check"]
    began, told, ended = said["first"]
    assert began < checked < told
    stood, went_on = said["busy"]
    assert stood < told + 0.05
    assert went_on > ended


def test_the_plans_to_tune_keep_the_rules_of_a_plan():
    seen = set()
    for text in (
        "4096x1000:bf16",
        "4096x64:fp32",
        "4096x100:bf16",
        "512x50257:bf16",
        "512x50257:fp32@sm80",
        "64x131072:fp32",
    ):
        problem = Problem.parse(text)
        for job in tune.JOBS:
            first, *others = tune.plans_for(problem, job)
            assert first == problem.plan(job)
            assert len(others) > 4
            assert len({plan.kernel(job).name for plan in others} | {first.kernel(job).name}) == len(others) + 1
            for plan in others:
                assert_it_covers(plan)
                assert_it_fits(plan)
                assert (plan.rows, plan.classes, plan.variant) == (first.rows, first.classes, first.variant)
                seen.add((plan.family, plan.cluster > 1))
    assert seen == {("WARP", False), ("BLOCK", False), ("BLOCK", True), ("STREAM", False), ("STREAM", True)}


def test_what_is_tuned_is_what_is_launched():
    """Made by the engine itself, on any arrays."""
    launched = []

    class Noted(model.Silent):
        def ready(self, kernel, blocks, threads, *more, **options):
            return lambda *argument: launched.append((kernel, blocks, threads))

    logits, labels = np.zeros((40, 1000), np.float32), np.zeros(40, np.int64)
    for plan in list(tune.plans_for(Problem((40, 1000), "float32")))[:5]:
        with tune.only(plan):
            given = {"reduction": "none", "engine": cuda.Cuda(Noted()), "validate": False}
            xent_array.cross_entropy_value_and_grad(logits, labels, **given)
        assert launched.pop() == (plan.kernel("LOSS_AND_GRAD"), plan.blocks, plan.threads)
    xent_array.cross_entropy_value_and_grad(logits, labels, **given)
    assert launched.pop()[0] == Problem((40, 1000), "float32").plan("LOSS_AND_GRAD").kernel("LOSS_AND_GRAD")


@pytest.mark.full
@pytest.mark.skipif(shutil.which("g++") is None, reason="the emulation needs g++")
def test_a_plan_is_checked_before_it_is_timed(monkeypatch):
    """Under emulation: the chosen plan, a good one, and one without room for the row."""
    problem = Problem((6, 200), "float32", 1)
    chosen, *others = tune.plans_for(problem)
    good = next(plan for plan in others if plan.family == "WARP")
    short = dataclasses.replace(good, vectors=1, lanes=8)
    monkeypatch.setattr(tune, "plans_for", lambda problem, job: iter([chosen, good, short]))
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal(problem.shape, np.float32), rng.integers(200, size=6)
    given = {"reduction": "none", "engine": launches.emulation(90, "plain").engine, "validate": False}
    calls = {
        "LOSS_AND_GRAD": lambda: xent_array.cross_entropy_value_and_grad(x, y, **given),
        "LOSS": lambda: (xent_array.cross_entropy(x, y, **given), None),
    }
    for job, run in calls.items():
        monkeypatch.setattr(tune, "words", lambda plan: plan.family)
        rows = list(tune.each(problem, job, run, lambda run: run() and 2.0, 1.0, time.monotonic() + 60))
        assert [row["right"] is True for row in rows] == [True, True, False]
        assert [row["seconds"] for row in rows] == [2.0, 2.0, None]
        assert rows[0]["of_copy"] == (0.5 if job == "LOSS_AND_GRAD" else 0.25)
    late = list(tune.each(problem, "LOSS", calls["LOSS"], lambda run: run() and 2.0, 1.0, time.monotonic() - 1))
    assert len(late) == 1, "time is over, but the chosen plan is timed"


def test_the_best_plans_are_said_beside_the_chosen_one():
    rows = [
        {"job": "LOSS", "plan": name, "seconds": seconds, "of_copy": 1 / (seconds or 1)}
        for name, seconds in (("own", 4.0), ("wrong", None), ("good", 2.0), ("bad", 9.0), ("fair", 3.0))
    ]
    assert [line.split()[-1] for line in tune.best(rows)] == ["own", "good", "fair", "own"]
    assert "chosen  25.0%" in tune.best(rows)[0]
