"""The one command for a GPU machine: its list is complete, its pieces end, and its launches are right when emulated."""

import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from bench import gpu, launches  # noqa: E402
from xent_array._engines import cuda  # noqa: E402


@pytest.fixture(scope="module")
def dry_run():
    command = [sys.executable, "-m", "bench.gpu", "--dry-run"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_the_list_is_complete(dry_run):
    for tool in ("memcheck", "racecheck", "initcheck", "synccheck"):
        for i in range(1, gpu.PARTS + 1):
            command = f"compute-sanitizer --tool {tool} --error-exitcode 1 python -m bench.launches --no-pool"
            assert f"    {command} --part {i}/{gpu.PARTS}\n" in dry_run
    assert f"{len(gpu.pieces())} pieces" in dry_run
    assert all(piece.limit <= 480 for piece in gpu.pieces())
    for piece in gpu.pieces():
        assert dry_run.count(f"{piece.name}  (") == 1


@pytest.mark.full
def test_every_test_is_in_a_piece_of_its_kind():
    """What pytest itself collects, with and without "cupy" in its name; of a file that it skips nothing is known."""
    command = [sys.executable, "-m", "pytest", "-q", "--full", "--collect-only", "-p", "no:cacheprovider", "tests"]
    for kind, words in (("on the GPU", "cupy or test_gpu"), ("beside the GPU", "not cupy and not test_gpu")):
        done = subprocess.run([*command, "-k", words], cwd=ROOT, capture_output=True, text=True, check=True)
        collected = set(re.findall(r"(?m)^tests/(\w+)\.py::", done.stdout))
        skipped = set(re.findall(r"(?m)^SKIPPED \[\d+\] tests/(\w+)\.py:", done.stdout))
        listed = {piece.name.partition(": ")[2] for piece in gpu.pieces() if piece.name.startswith(f"tests {kind}")}
        assert collected - skipped == listed - skipped - {"docs"}


@pytest.mark.parametrize("chip", [75, 80, 86, 89, 90, 100, 120])
def test_every_kernel_of_the_catalogue_is_launched_in_some_part(chip):
    parts = [launches.part_of(launches.problems(chip), f"{i}/{gpu.PARTS}") for i in range(1, gpu.PARTS + 1)]
    cases = [case for part in parts for case in part]
    assert sorted(cases) == sorted(launches.problems(chip))
    assert {name for case in cases for name in case.kernels()} == set(launches.known(chip))
    for part in parts:
        assert {case.out for case in part} <= set(launches.OUTS)
    for of, wanted in (
        (lambda case: case.labels, set(cuda.LABELS)),
        (lambda case: case.target, set(launches.TARGETS)),
        (lambda case: (case.plan.family, case.out), {(f, out) for f in "TPWBO" for out in launches.OUTS}),
        (lambda case: (case.plan.family, case.reduction), {(f, r) for f in "TPWBO" for r in ("mean", "sum", "none")}),
    ):
        assert {of(case) for case in cases} == wanted
    assert sum(case.plan.rows > cuda.SUM_ALONE for case in cases) == 8


@pytest.mark.full
@pytest.mark.skipif(shutil.which("g++") is None, reason="the emulation needs g++")
def test_launches_under_emulation(capsys):
    assert launches.main(["--emulated", "--part", "2/60"]) == 0
    said = re.search(r"(\d+) problems, (\d+) kernels, (\d+) launches, 0 wrong", capsys.readouterr().out)
    assert int(said[2]) >= 4 * int(said[1])


@pytest.mark.full
@pytest.mark.skipif(shutil.which("g++") is None, reason="the emulation needs g++")
def test_a_wrong_kernel_is_told_and_so_is_one_that_is_missing(capsys):
    cases = launches.part_of(launches.problems(90), "1/90")[:1]
    where = launches.emulation(90, "check")
    where.engine.launcher.patches = [("sum + (at_max - 1)", "sum + at_max")]
    assert launches.run(cases, where) == 1
    assert "WRONG" in capsys.readouterr().out
    other = cases[0]._replace(plan=launches.problems(90)[50].plan)
    assert launches.run([other], launches.emulation(90, "check")._replace(launched=[])) == 1
    assert "not launched" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("module", "says"),
    [(None, "CuPy cannot be imported"), (SimpleNamespace(is_available=lambda: False), "CuPy finds no CUDA device")],
    ids=["absent", "no device"],
)
def test_without_a_gpu_it_stops_at_once_and_leaves_no_file(module, says, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "cupy", module)
    monkeypatch.setattr(gpu, "run", lambda piece: pytest.fail(f"{piece.name} was started"))
    out = tmp_path / "results" / "gpu.jsonl"
    assert gpu.main(["--out", str(out)]) == 1
    assert says in capsys.readouterr().err
    assert not out.parent.exists()
    assert gpu.main(["--dry-run", "--out", str(out)]) == 0
    assert not out.parent.exists()


def test_pieces_are_recorded_however_they_end(tmp_path, monkeypatch, capsys):
    sleeps = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    made = [
        gpu.Piece("good", ("python", "-c", "print('fine')"), ""),
        gpu.Piece("bad", ("python", "-c", "raise SystemExit(3)"), ""),
        gpu.Piece("slow", ("python", "-c", sleeps), "", limit=1),
        gpu.Piece("absent", ("no-such-command",), ""),
        gpu.Piece("last", ("python", "-c", "import bench"), ""),
    ]
    monkeypatch.setattr(gpu, "pieces", lambda chip: made)
    monkeypatch.setattr(gpu, "missing", lambda: None)
    out = tmp_path / "results" / "gpu.jsonl"
    start = time.monotonic()
    assert gpu.main(["--out", str(out)]) == 1
    assert time.monotonic() - start < 30
    records = [json.loads(line) for line in out.read_text().splitlines()]
    ended = [(record["piece"], record["ended"], record["rc"]) for record in records]
    assert ended == [
        ("good", "passed", 0), ("bad", "failed", 3), ("slow", "timed out", None), ("absent", "failed", None),
        ("last", "passed", 0),
    ]  # fmt: skip
    assert records[0]["output"] == ["fine"]
    assert {"gpu", "driver", "cuda", "cupy", "numpy", "python", "commit"} <= set(records[0]["machine"])
    assert "2 of 5 pieces passed" in capsys.readouterr().out
    assert gpu.main(["--out", str(out), "--only", "good"]) == 0
    assert len(out.read_text().splitlines()) == 6
