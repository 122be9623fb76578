"""Everything worth doing on a machine with an NVIDIA GPU that is available for minutes: one command, one file.

    python -m bench gpu --minutes 5              the most valuable pieces that fit; a JSON line for each when it ends
    python -m bench gpu --minutes 5 --dry-run    which pieces these are, and their seconds; needs no GPU and no CuPy
    python -m bench gpu --only sanitizer         the pieces whose names this finds

Pieces that only check run in parallel. Those that are timed run alone, one after another; while others check, each runs
everything once that it will time, so that nothing is compiled while it is timed. A piece is a process of its own, which
is ended when its time is up; whatever happens to it, the others continue. Install first:
pip install -e ".[cuda13,full,bench]" liger-kernel quack-kernels, and for the sanitizers CUDA's compute-sanitizer.
"""

from __future__ import annotations

import argparse
import contextlib
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
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
LAUNCHERS = 4  # processes that each run a part of the launches, beside the tests
TESTERS = 10
PARTS = 30  # of the launches; a sanitizer runs one part at a time
BEGIN = 5  # seconds before the first piece and between pieces
LINES = 200  # lines of output to keep
LAST = 1 / 20  # of its seconds, for an interrupted piece to report what it has
RESULTS = Path("bench", "results")


class Piece(NamedTuple):
    """One process: what it does, the command that starts it in the checkout, and the seconds it needs."""

    name: str
    command: tuple[str, ...]
    about: str
    seconds: float
    ahead: bool = False  # whether it reports that it is ready, and waits for a go


Stage = list[Piece]  # they run in parallel


def stages() -> list[Stage]:
    """All pieces, the most valuable first."""
    return [
        [*_launches(), _tests()],
        *(
            [_timed(f"cells-{dtype}", f"^cells .* {dtype} ", 25, "against every peer")]
            for dtype in ("float32", "bfloat16")
        ),
        [_timed("options", "^(host|engines|peaked|options)", 20, "the host's time, peaked logits, options")],
        [_timed("dtypes", "^(soft|dtypes|long)", 20, "distributions, every dtype, long rows")],
        [_timed("layouts", "^(few|axis)", 20, "few classes, classes apart")],
        [_engines()],
        *([_sanitizer(tool, part) for tool in TOOLS] for part in range(1, 3)),
        [Piece("two GPUs", ("python", "-m", "bench.nccl"), "classes over NCCL; skipped where there is one GPU", 25)],
        [Piece("linear", ("python", "-m", "bench.linear_gpu"), "linear cross-entropy, against every peer", 60)],
        [Piece("tune", ("python", "-m", "bench", "tune"), "every plan that could take a problem", 150)],
        *([_sanitizer(tool, part) for tool in TOOLS] for part in range(3, PARTS + 1)),
    ]


def _tests() -> Piece:
    command = ("python", "-m", "pytest", "-q", "--full", "--require", "cupy")
    command += ("-k", "(cupy or test_gpu) and not standin and not many")
    command += ("-n", str(TESTERS), "-p", "no:cacheprovider", "-p", "no:benchmark", "--tb=short", "tests")
    return Piece("tests", command, "on CuPy arrays, and what only a GPU can show", 80)


def _launches() -> Iterator[Piece]:
    for i in range(1, LAUNCHERS + 1):
        command = ("python", "-m", "bench.launches", "--part", f"{i}/{LAUNCHERS}", "--most", "70")
        yield Piece(
            f"launches {i}/{LAUNCHERS}", command, "every launch that the plan can choose, against the oracle", 80
        )


def _timed(name: str, cases: str, seconds: int, about: str) -> Piece:
    command = ("python", "-m", "bench", "--backend", "cupy", "--cases", cases, "--ahead", "--most", str(seconds - 10))
    command += ("--rounds", "3", "--turn", "0.006", "--out", str(RESULTS / f"gpu-{name}.jsonl"))
    return Piece(f"time {name}", command, about, seconds, ahead=True)


def _engines() -> Piece:
    command = ("python", "-m", "bench", "--engines", "--rounds", "3", "--most", "15")
    command += ("--out", str(RESULTS / "gpu-host.jsonl"))
    return Piece("time the host's engine", command, "the CPU beside the GPU, on the same problems", 20)


def _sanitizer(tool: str, part: int) -> Piece:
    command = ("compute-sanitizer", "--tool", tool, "--error-exitcode", "1")
    command += ("python", "-m", "bench.launches", "--no-pool", "--part", f"{part}/{PARTS}", "--most", "20")
    return Piece(f"sanitizer {tool} {part}/{PARTS}", command, f"under {tool}", 30)


def needs(stage: Stage) -> float:
    """Seconds of a stage, whose pieces run in parallel."""
    return max(piece.seconds for piece in stage)


def that_fit(all_: list[Stage], minutes: float) -> list[Stage]:
    """In order, each piece that still fits."""
    chosen, left = [], minutes * 60 - BEGIN
    for stage in all_:
        if needs(stage) <= left:
            chosen.append(stage)
            left -= needs(stage)
    return chosen


def missing() -> str | None:
    """Why nothing can run here; None on a machine with a GPU."""
    try:
        import cupy
    except ImportError as error:
        return f'CuPy cannot be imported ({error}); pip install -e ".[cuda13,full,bench]" brings it'
    return None if cupy.is_available() else "CuPy finds no CUDA device, or no driver"


def machine() -> dict[str, Any]:
    """The hardware and software of the run; None for what is missing."""
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
    """The last line that a command prints; None if it is missing or fails."""
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    lines = done.stdout.strip().splitlines()
    return lines[-1] if lines and done.returncode == 0 else None


class Process:
    """A piece that has been started."""

    def __init__(self, piece: Piece) -> None:
        self.piece = piece
        self.output = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115  (`end` closes it)
        self.process: subprocess.Popen[str] | None = None
        command = [sys.executable if word == "python" else word for word in piece.command]
        paths = os.pathsep.join([str(ROOT), *filter(None, [os.getenv("PYTHONPATH")])])
        self.start = time.monotonic()
        try:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env={**os.environ, "PYTHONPATH": paths, "PYTHONUNBUFFERED": "1"}, text=True,
                stdin=subprocess.PIPE, stdout=self.output, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            self.output.write(str(error))

    def pause(self) -> None:
        """Stop it until it gets its go: another piece is being timed."""
        self._signal(signal.SIGSTOP)

    def tell(self) -> None:
        """Its go: it may begin timing, as nothing else runs; its seconds count from here."""
        self._signal(signal.SIGCONT)
        self.start = time.monotonic()
        if self.process is not None and self.process.stdin is not None:
            with contextlib.suppress(OSError):  # it may have ended
                self.process.stdin.write("go\n")
                self.process.stdin.flush()

    def _signal(self, number: int) -> None:
        """Signal it, and everything it started."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)

    def end(self) -> dict[str, Any]:
        """Wait for its end, or until its time is up; returns its output and how it ended."""
        rc: int | None = None
        last = self.piece.seconds * LAST
        if self.process is not None:
            try:
                rc = self.process.wait(max(0.0, self.start + self.piece.seconds - last - time.monotonic()))
            except subprocess.TimeoutExpired:
                self.process.send_signal(signal.SIGINT)  # pytest then reports the failures so far
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.process.wait(last)
                self.output.seek(0, os.SEEK_END)
                self.output.write("\n(timed out)\n")
            finally:
                self._signal(signal.SIGKILL)
                self.process.communicate()
        seconds = round(time.monotonic() - self.start, 1)
        self.output.seek(0)
        said = self.output.read().splitlines()[-LINES:]
        self.output.close()
        ended = "passed" if rc == 0 else "timed out" if self.process is not None and rc is None else "failed"
        return {
            "piece": self.piece.name, "command": " ".join(self.piece.command), "ended": ended, "rc": rc,
            "seconds": seconds, "limit": self.piece.seconds, "output": said,
        }  # fmt: skip


def run(chosen: list[Stage]) -> Iterator[dict[str, Any]]:
    """Each piece's record, as it ends."""
    ahead = {piece: Process(piece) for stage in chosen for piece in stage if piece.ahead}
    for stage in chosen:
        started = [ahead.pop(piece) if piece.ahead else Process(piece) for piece in stage]
        timed = [process for process in started if process.piece.ahead]
        for process in ahead.values() if timed else ():
            process.pause()
        for process in timed:
            process.tell()
        with ThreadPoolExecutor(len(started)) as pool:
            for done in as_completed([pool.submit(process.end) for process in started]):
                yield done.result()


def main(arguments: list[str]) -> int:
    """Exits 0 if every piece passed."""
    parser = argparse.ArgumentParser(
        prog="python -m bench gpu",
        description=__doc__ or "",  # stripped by -OO
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--minutes", type=float, default=60, metavar="M", help="that the GPU is there (default 60)")
    parser.add_argument("--dry-run", action="store_true", help="print the pieces and stop")
    parser.add_argument("--only", metavar="REGEX", default="", help="the pieces whose name this finds")
    parser.add_argument("--out", type=Path, metavar="FILE", help=f"JSON lines are added to it ({RESULTS}/gpu-TIME.log)")
    given = parser.parse_args(arguments)
    named = [[piece for piece in stage if re.search(given.only, piece.name)] for stage in stages()]
    chosen = that_fit([stage for stage in named if stage], given.minutes)
    if not chosen:
        parser.error(f"no piece matches {given.only!r} and fits {given.minutes:g} minutes; --dry-run names them")
    if given.dry_run:
        print("\n".join(plan_of(chosen)))
        return 0
    if (reason := missing()) is not None:
        print(f"python -m bench gpu is for a machine with a GPU: {reason}; --dry-run lists the pieces", file=sys.stderr)
        return 1
    out = given.out or ROOT / RESULTS / f"gpu-{time.strftime('%Y%m%d-%H%M%S')}.log"
    out.parent.mkdir(parents=True, exist_ok=True)
    about, failed, count = machine(), 0, sum(map(len, chosen))
    for number, record in enumerate(run(chosen), 1):
        with out.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**record, "machine": about}) + "\n")
        failed += record["ended"] != "passed"
        print(f"[{number}/{count}] {record['ended']:9} {record['seconds']:6.1f} s  {record['piece']}", flush=True)
    print(f"{count - failed} of {count} pieces passed; see {out}")
    return int(failed > 0)


def plan_of(chosen: list[Stage]) -> list[str]:
    """What would run, when, and for how long."""
    lines, at = [], float(BEGIN)
    for stage in chosen:
        for piece in stage:
            when = f"{at:5.0f} s  {piece.seconds:4.0f} s"
            lines.append(f"{when}  {piece.name}  ({piece.about})\n               {' '.join(piece.command)}")
        at += needs(stage)
    return [*lines, f"{sum(map(len, chosen))} pieces, {at:.0f} seconds"]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
