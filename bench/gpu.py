"""Everything there is to do on a machine with an NVIDIA GPU: tests, sanitizers, benchmarks; one command, one file.

    python -m bench gpu                     all pieces, one after another; one JSON line each, as soon as it ends
    python -m bench gpu --dry-run           what they are; needs no GPU and no CuPy
    python -m bench gpu --only sanitizer    the pieces whose name this finds

A piece is a process of its own that is ended after eight minutes; whatever happens to it, the next one starts. Install
first: pip install -e ".[cuda13,full]" and, for the sanitizers, compute-sanitizer of the CUDA toolkit on the PATH.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
LIMIT = 480  # seconds
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
PARTS = 6  # of the launches, for each tool
LINES = 40  # of output that are kept
RESULTS = Path("bench", "results")


class Piece(NamedTuple):
    """One process: what it does, and how it is started from the top of the checkout."""

    name: str
    command: tuple[str, ...]
    about: str
    limit: int = LIMIT


def pieces(chip: int = 90) -> list[Piece]:
    """All of them: first what tells most. The chip only says how many launches there are."""
    return [*_tests(), *_sanitizers(chip), *_benchmarks()]


def _tests() -> list[Piece]:
    """The test suite: file by file what runs on the GPU, then everything else."""
    pytest = ("python", "-m", "pytest", "-q", "-p", "no:cacheprovider", "--full")
    files = sorted(ROOT.glob("tests/test_*.py"))
    needs = re.compile(r"(?m)^def test_\w+\([^)]*\b(backend|cupy|launch)\b")
    on_gpu = [file for file in files if needs.search(file.read_text(encoding="utf-8"))]
    first = ("test_wrappers.py", "test_gpu.py")
    on_gpu.sort(key=lambda file: (file.name not in first, first.index(file.name) if file.name in first else 0))
    found = [Piece("installed", ("python", "-m", "xent_array"), "what is there, and the worked example on each engine")]
    for file in on_gpu:
        command = (*pytest, f"tests/{file.name}", "--require", "cupy", "-k", "cupy or test_gpu")
        found.append(Piece(f"tests on the GPU: {file.stem}", command, "its tests on CuPy arrays"))
    for file in files:
        if file.name == "test_gpu.py":
            continue
        command = (*pytest, f"tests/{file.name}", "-k", "not cupy and not test_gpu")
        found.append(Piece(f"tests beside the GPU: {file.stem}", command, "its other tests"))
    found.append(Piece("tests beside the GPU: docs", (*pytest, "README.md", "xent_array"), "the examples"))
    return found


def _sanitizers(chip: int) -> list[Piece]:
    found = []
    for tool in TOOLS:
        for part in (f"{i}/{PARTS}" for i in range(1, PARTS + 1)):
            command = ("compute-sanitizer", "--tool", tool, "--error-exitcode", "1")
            command += ("python", "-m", "bench.launches", "--no-pool", "--part", part)
            found.append(Piece(f"sanitizer {tool} {part}", command, _launches(part, chip)))
    return found


def _launches(part: str, chip: int) -> str:
    """How many launch configurations a part has, where the oracle's needs are installed."""
    if importlib.util.find_spec("ml_dtypes") is None:
        return "launch configurations"
    from . import launches

    problems = launches.part_of(launches.problems(chip), part)
    kernels = set().union(*(problem.kernels() for problem in problems))
    return f"{len(problems)} launch configurations, {len(kernels)} kernels"


def _benchmarks() -> list[Piece]:
    """What the suite names, each with a file of its own."""
    from . import suite

    found = []
    for arguments in suite.gpu_pieces():
        about = arguments[arguments.index("--cases") + 1] if "--cases" in arguments else " ".join(arguments)
        found.append(Piece(f"benchmark {len(found) + 1}", ("python", "-m", "bench", *arguments), about))
    return found


def missing() -> str | None:
    """Why nothing can be run here; None on a machine with a GPU."""
    try:
        import cupy
    except ImportError as error:
        return f'CuPy cannot be imported ({error}); pip install -e ".[cuda13,full]" brings it'
    return None if cupy.is_available() else "CuPy finds no CUDA device, or no driver"


def machine() -> dict[str, Any]:
    """What the pieces ran on; None for what is not there."""
    about: dict[str, Any] = {"python": platform.python_version(), "system": platform.platform()}
    for name in ("numpy", "cupy"):
        try:
            about[name] = __import__(name).__version__
        except ImportError:
            about[name] = None
    about |= {"gpu": None, "driver": None, "cuda": None}
    if about["cupy"] is not None:
        import cupy

        with contextlib.suppress(Exception):  # whatever CuPy raises without a driver
            about["cuda"] = cupy.cuda.runtime.runtimeGetVersion()
            about["gpu"] = cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()
    about["driver"] = _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    about["sanitizer"] = _said("compute-sanitizer", "--version")
    about["commit"] = _said("git", "rev-parse", "HEAD")
    return about


def _said(*command: str) -> str | None:
    """The last line that a command prints, if it is there and succeeds."""
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    lines = done.stdout.strip().splitlines()
    return lines[-1] if lines and done.returncode == 0 else None


def run(piece: Piece) -> dict[str, Any]:
    """Run a piece to its end, or to the end of its time; what it said and how it ended."""
    command = [sys.executable if word == "python" else word for word in piece.command]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.getenv("PYTHONPATH")])])}
    start = time.monotonic()
    rc: int | None
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        try:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
        except OSError as error:
            rc = None
            output.write(str(error))
        else:
            try:
                rc = process.wait(piece.limit)
            except subprocess.TimeoutExpired:
                rc = None
                output.write("\n(timed out)\n")
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # with all that it started
                process.wait()
        output.seek(0)
        said = output.read().splitlines()[-LINES:]
    seconds = round(time.monotonic() - start, 1)
    ended = "passed" if rc == 0 else "timed out" if rc is None and seconds >= piece.limit else "failed"
    return {
        "piece": piece.name, "command": " ".join(piece.command), "ended": ended, "rc": rc, "seconds": seconds,
        "limit": piece.limit, "output": said,
    }  # fmt: skip


def main(arguments: list[str]) -> int:
    """Exits 0 where every piece passed."""
    parser = argparse.ArgumentParser(
        prog="python -m bench gpu",
        description=__doc__ or "",  # which -OO strips
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--dry-run", action="store_true", help="print the pieces and stop")
    parser.add_argument("--only", metavar="REGEX", default="", help="the pieces whose name this finds")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help=f"JSON lines are added to it ({RESULTS}/gpu-TIME.jsonl)"
    )
    parser.add_argument(
        "--chip", type=int, default=90, help="compute capability times ten, for the counts of a dry run"
    )
    given = parser.parse_args(arguments)
    chosen = [piece for piece in pieces(given.chip) if re.search(given.only, piece.name)]
    if not chosen:
        parser.error(f"no piece matches {given.only!r}; --dry-run names them")
    if given.dry_run:
        for piece in chosen:
            print(f"{piece.name}  ({piece.about}; at most {piece.limit} s)\n    {' '.join(piece.command)}")
        print(f"{len(chosen)} pieces, at most {sum(piece.limit for piece in chosen) / 3600:.1f} hours")
        return 0
    if (reason := missing()) is not None:
        print(f"python -m bench gpu is for a machine with a GPU: {reason}; --dry-run lists the pieces", file=sys.stderr)
        return 1
    out = given.out or ROOT / RESULTS / f"gpu-{time.strftime('%Y%m%d-%H%M%S')}.jsonl"
    out.parent.mkdir(parents=True, exist_ok=True)
    about = machine()
    failed = 0
    for number, piece in enumerate(chosen, 1):
        record = run(piece)
        with out.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**record, "machine": about}) + "\n")
        failed += record["ended"] != "passed"
        print(f"[{number}/{len(chosen)}] {record['ended']:9} {record['seconds']:6.1f} s  {piece.name}", flush=True)
    print(f"{len(chosen) - failed} of {len(chosen)} pieces passed; see {out}")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
