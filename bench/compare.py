"""Two revisions of this library against each other: which is faster at what, and whether their results are the same.

    python -m bench compare BEFORE [AFTER]

Each is a revision that git knows or the path of a checkout; AFTER is this checkout if it is not given. Each runs in
processes of its own, on the same problems, with the benchmark code of this checkout.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import io
import json
import os
import random
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np

from . import peers, run, suite, timing
from .suite import COLD, OURS, WARM, Case

ROUNDS = 9
PROCESSES = 3  # of each tree: where its memory happens to lie can make one of them faster than the next by a tenth
FIRST_ROUNDS = 3  # of first calls, which take seconds
SLOWER = 3.0  # percent
SIDES = ("before", "after")

# What a process runs. Its channel to the controller is a copy of its standard input and output, which are then closed
# to everything else: what a library prints goes to standard error.
PROGRAM = """
import os, sys
tree, root = sys.argv[1:]
channel = os.dup(0), os.dup(1)
os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
os.dup2(2, 1)
sys.path.insert(0, tree)
import xent_array
if not os.path.realpath(xent_array.__file__).startswith(os.path.join(os.path.realpath(tree), "")):
    sys.exit(f"xent_array was imported from {xent_array.__file__}, which is not in {tree}")
sys.path.insert(0, root)
from bench import compare
compare.answer(*channel)
"""


class Tree(NamedTuple):
    name: str  # as it was given
    path: Path
    commit: str | None  # None if the path is not a checkout of git's
    dirty: bool | None


def tree_of(name: str, folder: Path) -> Tree:
    """The checkout at this path, or else the files of this revision, which are written to `folder`."""
    if _has_library(Path(name)):
        path = Path(name).resolve()
        git = functools.partial(run.git, "-C", str(path))
        if git("rev-parse", "--show-toplevel") != str(path):  # a folder within another checkout is not one
            return Tree(name, path, None, None)
        return Tree(name, path, git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "-uno")))
    commit = run.git("rev-parse", "--verify", "--quiet", f"{name}^{{commit}}")
    if commit is None:
        raise ValueError(f"must be a revision that git knows, or the path of a checkout of xent_array; got {name!r}")
    files = subprocess.run(["git", "archive", commit], cwd=run.ROOT, stdout=subprocess.PIPE, check=True).stdout
    folder.mkdir()
    subprocess.run(["tar", "-x", "-C", str(folder)], input=files, check=True)
    if not _has_library(folder):
        raise ValueError(f"revision {name!r} has no xent_array")
    return Tree(name, folder, commit, dirty=False)


def _has_library(path: Path) -> bool:
    return (path / "xent_array" / "__init__.py").is_file()


# The processes of a tree


class Worker:
    """A process that imports this library from a tree. It answers one request at a time, and sleeps between them."""

    def __init__(self, tree: Tree, cache: str | None = None) -> None:
        """`cache` is the folder in which machine code is kept; by default it lies beside its source."""
        self.name = tree.name
        environment = {name: value for name, value in os.environ.items() if name not in run.CACHES}
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(tree.path), str(run.ROOT)],
            cwd=tree.path,
            env=environment if cache is None else environment | dict.fromkeys(run.CACHES, cache),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, name: str, *arguments: Any) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # then there is no answer
            self.process.stdin.write(json.dumps([name, *arguments]) + "\n")
            self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            self.process.communicate()
            raise SystemExit(f"the process of {self.name} ended with exit code {self.process.returncode}")
        return json.loads(line)

    def __enter__(self) -> Worker:
        reason = self.ask("ready")  # what is imported while others are timed would disturb them
        if reason is not None:
            _say(f"{self.name} has no compiled loops: {reason}")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is not None:
            self.process.kill()
        self.process.communicate()


@functools.cache
def _say(line: str) -> None:
    """Once, however many processes a tree has."""
    print(line, file=sys.stderr)


def answer(requests: int, answers: int) -> None:
    """In a worker: answers each line of one file in another, both of JSON, until there are no more."""
    calls: dict[str, timing.Call] = {}
    known: dict[str, Callable[..., Any]] = {
        "ready": _why_numpy,
        "begin": functools.partial(_begin, calls),
        "turn": functools.partial(_turn, calls),
        "first": _first,
    }
    with open(requests) as lines, open(answers, "w") as out:
        for line in lines:
            name, *arguments = json.loads(line)
            try:
                told = known[name](*arguments)
            except Exception as error:
                told = {"failed": run.short(error)}
            out.write(json.dumps(told) + "\n")
            out.flush()


def _why_numpy() -> str | None:
    """Why NumPy does the work, if it does and that is known of this version of the library."""
    with contextlib.suppress(ImportError, AttributeError):
        from xent_array._engines import cpu

        found = cpu.found_loops()
        return found if isinstance(found, str) else None
    return None


def _begin(calls: dict[str, timing.Call], fields: list[Any], seed: int, threads: int) -> dict[str, run.Row]:
    """Makes the problem of a case, and for each operation says whether it failed, and what its bits and errors are."""
    calls.clear()  # and with them the problem of the case before
    digests: dict[str, str] = {}
    settings = run.Settings("numpy", threads, 0, 0.0, 0.0, False, None, seed, None, "")
    begun = run.begin(
        suite.case_of(fields),
        {OURS: peers.ours},
        settings,
        np,
        lambda operation, result: digests.update({operation: digest(result)}),
    )
    if not begun.rows:
        raise RuntimeError(*begun.notes)
    calls.update({operation: call for (_, operation), call in begun.calls.items()})
    return {
        operation: {name: row[name] for name in ("failed", "loss_units", "grad_units")}
        | {"digest": digests.get(operation)}
        for (_, operation), row in begun.rows.items()
    }


def digest(result: Any) -> str:
    """A digest of the bytes of a loss, or of a loss and a gradient."""
    found = hashlib.blake2b(digest_size=16)
    for part in result if isinstance(result, tuple) else (result,):
        found.update(np.ascontiguousarray(peers.host(part)).reshape(-1).view(np.uint8).data)
    return found.hexdigest()


def _turn(calls: dict[str, timing.Call], operation: str, seconds: float, core: int) -> list[float]:
    """The seconds of each run; the threads that ran have gone to sleep when the turn of the other tree begins.

    The calling thread begins on this core, and is then free to go elsewhere. Otherwise it would stay where it happens
    to be, and cores differ: where another machine has a part of one, all that runs there is slower.
    """
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    os.sched_setaffinity(0, cores)
    times = timing.take_turn(calls[operation], timing.host_clock, seconds)
    timing.wait_until_quiet()
    return times


def _first(threads: int, shape: list[int]) -> float:
    """The seconds of the first call; what else is printed meanwhile comes before it."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        run.print_first_call(str(threads), *map(str, shape))
    return float(printed.getvalue().splitlines()[-1].split()[0])


# A case


class Pace(NamedTuple):
    rounds: int
    processes: int
    turn: float
    threads: int
    seed: int


Pair = tuple[Worker, Worker]  # one of either tree
Turns = dict[str, tuple[list[list[float]], list[list[float]]]]  # by operation: the seconds of each turn of either side


def measure(case: Case, trees: list[Tree], pairs: list[Pair], pace: Pace, chance: random.Random) -> list[run.Row]:
    """A row for each operation. The pairs of processes take the rounds in turn."""
    if case == suite.FIRST:
        told, turns = _first_calls(case, trees, pace, chance)
    else:
        told, turns = _turns(case, pairs, pace, chance)
    return [
        _row(case, operation, trees, [side[operation] for side in told], turns.get(operation), pace)
        for operation in told[0]
    ]


def _turns(case: Case, pairs: list[Pair], pace: Pace, chance: random.Random) -> tuple[list[dict[str, run.Row]], Turns]:
    told = []
    for side in (0, 1):
        answers = [pair[side].ask("begin", case, pace.seed, pace.threads) for pair in pairs]
        for found in answers:
            if isinstance(found.get("failed"), str):
                raise SystemExit(f"{pairs[0][side].name}: {case.name} cannot be run: {found['failed']}")
        told.append({operation: _of_all([found[operation] for found in answers]) for operation in answers[0]})
    turns: Turns = {operation: ([], []) for operation in told[0] if not any(side[operation]["failed"] for side in told)}
    cores = sorted(os.sched_getaffinity(0))
    for number in range(pace.rounds):
        pair, core = pairs[number % len(pairs)], cores[number // len(pairs) % len(cores)]
        for operation in chance.sample(list(turns), len(turns)):
            for side in chance.sample((0, 1), 2):
                times = pair[side].ask("turn", operation, pace.turn, core)
                if isinstance(times, dict):
                    told[side][operation] |= times
                    turns.pop(operation, None)
                    break
                turns[operation][side].append(times)
    return told, turns


def _of_all(answers: list[run.Row]) -> run.Row:
    """What the processes of a tree found about an operation: a failure of any, and every digest there is."""
    found = next((answer for answer in answers if answer["failed"]), answers[0])
    digests = sorted({answer["digest"] for answer in answers if answer["digest"] is not None})
    return found | {"digest": ", ".join(digests) or None}


def _first_calls(
    case: Case, trees: list[Tree], pace: Pace, chance: random.Random
) -> tuple[list[dict[str, run.Row]], Turns]:
    """In each round, each tree has a new folder for machine code, and two new processes that use it."""
    told: list[dict[str, run.Row]] = [{COLD: {}, WARM: {}}, {COLD: {}, WARM: {}}]
    turns: Turns = {COLD: ([], []), WARM: ([], [])}
    for _ in range(FIRST_ROUNDS):
        with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
            for operation in (COLD, WARM):
                for side in chance.sample((0, 1), 2):
                    with Worker(trees[side], (one, other)[side]) as worker:
                        seconds = worker.ask("first", pace.threads, case.shape)
                    if isinstance(seconds, dict):
                        told[side][operation] |= seconds
                    else:
                        turns[operation][side].append([seconds])
    return told, {key: pair for key, pair in turns.items() if not any(side[key].get("failed") for side in told)}


def _row(
    case: Case,
    operation: str,
    trees: list[Tree],
    told: list[run.Row],
    turns: tuple[list[list[float]], list[list[float]]] | None,
    pace: Pace,
) -> run.Row:
    row: run.Row = {
        "case": case.name,
        "operation": operation,
        "group": case.group,
        "shape": list(case.shape),
        "axis": case.axis,
        "dtype": case.dtype,
        "target": case.target,
        "option": case.option,
        "threads": pace.threads,
        **dict.fromkeys(("ratio", "q1", "q3", "ratio_of_minima", "same_bits")),
        "rounds": 0,
        "processes": None if case == suite.FIRST else pace.processes,  # a first call needs one of its own
    }
    for number, (side, tree) in enumerate(zip(SIDES, trees, strict=True)):
        row[side] = {"tree": tree.name, "commit": tree.commit, "dirty": tree.dirty}
        row[side] |= dict.fromkeys(("failed", "digest", "loss_units", "grad_units", "seconds", "min", "runs"))
        row[side] |= told[number]
        if turns is not None:
            runs = [seconds for turn in turns[number] for seconds in turn]
            row[side] |= {"seconds": float(np.median(runs)), "min": min(runs), "runs": len(runs)}
    before, after = (row[side] for side in SIDES)
    if before["digest"] is not None and after["digest"] is not None:
        row["same_bits"] = before["digest"] == after["digest"]
    if turns is not None:
        ratios = [float(np.median(new) / np.median(old)) for old, new in zip(*turns, strict=True)]
        found = timing.summary(ratios)
        row |= {"ratio": found["seconds"], "q1": found["q1"], "q3": found["q3"], "rounds": len(ratios)}
        row["ratio_of_minima"] = after["min"] / before["min"]
    return row


# What is printed


def line_of(row: run.Row, width: int) -> str:
    """A line of the table, whose first column is this wide."""
    name = f"{row['case']:<{width}} {row['operation']:<28} "
    failed = [f"FAILED {side}: {row[side]['failed']}" for side in SIDES if row[side]["failed"]]
    if failed:
        return name + "; ".join(failed)
    bits = {None: "", True: "same", False: "other"}[row["same_bits"]]
    return (
        f"{name}{run.ms(row['before']['seconds']):>9} {run.ms(row['after']['seconds']):>9} {row['ratio']:>12.3f} "
        f"{row['q1']:>6.3f}-{row['q3']:<6.3f} {row['ratio_of_minima']:>9.3f}  {bits}"
    ).rstrip()


def head_of(width: int) -> str:
    return (
        f"{'case':<{width}} {'operation':<28} {'before ms':>9} {'after ms':>9} {'after/before':>12} {'quartiles':>13} "
        f"{'of minima':>9}  bits"
    )


def summary(rows: list[run.Row], slower: float) -> list[str]:
    """How many rows are slower by more than so many percent, have other bits, or failed, and which."""

    def counted(what: str, found: list[run.Row], of: int) -> str:
        names = "; ".join(f"{row['case']}, {row['operation']}" for row in found)
        return f"{what}: {len(found)} of {of}" + (f": {names}" if names else "")

    timed = [row for row in rows if row["ratio"] is not None]
    held = [row for row in rows if row["same_bits"] is not None]
    lines = [
        counted(
            f"slower by more than {slower:g} %", [row for row in timed if row["ratio"] > 1 + slower / 100], len(timed)
        ),
        counted("other bits", [row for row in held if not row["same_bits"]], len(held)),
    ]
    for side in SIDES:
        failed = [row for row in rows if row[side]["failed"]]
        if failed:
            lines.append(counted(f"failed {side}", failed, len(rows)))
    return lines


def main(arguments: list[str]) -> int:
    cores = len(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(prog="python -m bench compare", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("before", metavar="BEFORE", help="a revision, or the path of a checkout")
    parser.add_argument("after", metavar="AFTER", nargs="?", help="another (default: this checkout)")
    parser.add_argument("--quick", action="store_true", help="small cases and short turns")
    parser.add_argument("--cases", metavar="REGEX", default="", help="only the cases whose name this finds")
    parser.add_argument(
        "--slower", type=float, default=SLOWER, metavar="PERCENT",
        help=f"what is slower by more is named in the end (default {SLOWER:g})",
    )  # fmt: skip
    parser.add_argument(
        "--threads", type=int, default=cores, metavar="N", help="of both (default: all cores there are)"
    )
    parser.add_argument("--rounds", type=int, default=ROUNDS, metavar="N", help=f"of turns (default {ROUNDS})")
    parser.add_argument(
        "--processes", type=int, default=PROCESSES, metavar="N",
        help=f"of each tree, which take the rounds in turn (default {PROCESSES})",
    )  # fmt: skip
    parser.add_argument("--turn", type=float, metavar="S", help=f"seconds of a turn (default {timing.TURN})")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the logits and the order of the turns")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write one JSON line per row here")
    given = parser.parse_args(arguments)
    cases = [case for case in suite.cases("numpy", given.quick) if re.search(given.cases, case.name)]
    if not cases:
        parser.error(f"no case matches {given.cases!r}; python -m bench --list names them")
    if not 1 <= given.threads <= cores:
        parser.error(f"--threads must be from 1 to {cores}, the cores this process may use")
    for name in ("rounds", "processes"):
        if getattr(given, name) < 1:
            parser.error(f"--{name} must be at least 1; got {getattr(given, name)}")
    turn = run.PACE[given.quick]["turn"] if given.turn is None else given.turn
    pace = Pace(given.rounds, min(given.rounds, given.processes), turn, given.threads, given.seed)
    command = f"python -m bench compare {shlex.join(arguments)}"
    with tempfile.TemporaryDirectory(prefix="xent_array-compare-") as folder:
        names = given.before, str(run.ROOT) if given.after is None else given.after
        try:
            trees = [tree_of(name, Path(folder) / side) for name, side in zip(names, SIDES, strict=True)]
        except ValueError as why:
            parser.error(str(why))
        run.limit_threads(pace.threads)
        rows = _compare(cases, trees, pace, command, given.out)
    print("\n" + "\n".join(summary(rows, given.slower)))
    return int(any(row["after"]["failed"] for row in rows))


def _compare(cases: list[Case], trees: list[Tree], pace: Pace, command: str, out: Path | None) -> list[run.Row]:
    """Measures and prints every case, and writes its rows."""
    settings = run.Settings("numpy", pace.threads, pace.rounds, 0.0, pace.turn, False, out, pace.seed, None, command)
    origin = run.about(settings, np)
    print(run.header(origin))
    for side, tree in zip(SIDES, trees, strict=True):
        commit = f" ({tree.commit[:10]}{', with uncommitted changes' if tree.dirty else ''})" if tree.commit else ""
        print(f"{side}: {tree.name}{commit}")
    width, chance, rows = max(len(case.name) for case in cases), random.Random(pace.seed), []
    print(head_of(width), flush=True)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text("")
    with contextlib.ExitStack() as stack:
        before, after = ([stack.enter_context(Worker(tree)) for _ in range(pace.processes)] for tree in trees)
        pairs = list(zip(before, after, strict=True))
        for case in cases:
            for row in measure(case, trees, pairs, pace, chance):
                rows.append(row | origin)
                print(line_of(row, width), flush=True)
                if out is not None:
                    with out.open("a") as file:
                        file.write(json.dumps(rows[-1], separators=(",", ":")) + "\n")
    return rows


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
