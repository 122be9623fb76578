"""Loss and gradient on 1, 2, 4, … threads against a copy and a read by as many, and what each thread does meanwhile.

    python -m bench threads

Two tables are printed in the end. The first says how far a problem is from the speed of memory; the second, which part
of the time the threads were idle and why, so that what costs time with many of them can be read off. It is taken from
calls made apart from those that are timed.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from xent_array._engines.cpu import threads

from . import peers, report, run, suite, timing
from .suite import COPY, OURS, Case
from .timing import Call

# Who shares work among threads, as functions of `work`, `parts` and `team` that are looked up in these modules.
SHARE = ((threads, "parallel"), (peers, "spread"))

TRACED = 9  # calls


class Part(NamedTuple):
    """When a thread began and ended it, and the processor's time that it had meanwhile, all in ns."""

    began: int
    ended: int
    cpu: int


class Taken(NamedTuple):
    """The parts that a thread took, and when it began and ended; a call of a compiled loop counts as one part."""

    began: int
    ended: int
    parts: list[Part]


def trace(function: Callable[[], Any]) -> dict[str, Any]:
    """One call, and every thread that took part in it; all times in µs, those of a clock from the call's beginning.

    It asks for a team when it has looked at what it was given, joins it when all have ended, returns, and its result is
    released. Where nothing is shared, the call is one part, of the calling thread.
    """
    taken: list[Taken] = []
    shared: list[tuple[int, int, int]] = []

    def watched(spread: Callable[..., None]) -> Callable[..., None]:
        def watched_spread(work: Callable[[Iterator[Any]], None], parts: Any, team: int) -> None:
            asked = time.perf_counter_ns()
            spread(lambda drawn: taken.append(_watch(work, drawn)), parts, team)
            shared.append((team, asked, time.perf_counter_ns()))

        return watched_spread

    with contextlib.ExitStack() as patches:
        for module, name in SHARE:
            patches.enter_context(mock.patch.object(module, name, watched(getattr(module, name))))
        start, cpu = time.perf_counter_ns(), time.thread_time_ns()
        result = function()
        returned, cpu = time.perf_counter_ns(), time.thread_time_ns() - cpu
        del result
        released = time.perf_counter_ns()
    if not shared:
        taken, shared = [Taken(start, returned, [Part(start, returned, cpu)])], [(1, start, returned)]
    ((team, asked, joined),) = shared
    return {
        "team": team,
        "asked": _microseconds(asked - start),
        "joined": _microseconds(joined - start),
        "returned": _microseconds(returned - start),
        "released": _microseconds(released - start),
        "threads": [_told(start, each) for each in taken],
    }


def _watch(work: Callable[[Iterator[Any]], None], drawn: Iterator[Any]) -> Taken:
    parts: list[Part] = []

    def watched() -> Iterator[Any]:
        for part in drawn:
            start, cpu = time.perf_counter_ns(), time.thread_time_ns()
            yield part
            parts.append(Part(start, time.perf_counter_ns(), time.thread_time_ns() - cpu))

    began = time.perf_counter_ns()
    work(watched())
    return Taken(began, time.perf_counter_ns(), parts)


def _told(start: int, taken: Taken) -> dict[str, Any]:
    """A thread's share: its parts, how long they were in all, the least, median and largest one, and what it waited.

    `between` is its time outside of parts, `waited` that within parts in which it was on no core, as while it waits for
    Python's lock.
    """
    long = [part.ended - part.began for part in taken.parts]
    waited = sum(max(0, part.ended - part.began - part.cpu) for part in taken.parts)
    times = {
        "began": taken.began - start,
        "ended": taken.ended - start,
        "took": sum(long),
        "least": min(long, default=0),
        "median": statistics.median(long) if long else 0,
        "most": max(long, default=0),
        "between": taken.ended - taken.began - sum(long),
        "waited": waited,
    }
    return {"parts": len(long), **{name: _microseconds(value) for name, value in times.items()}}


def _microseconds(nanoseconds: float) -> float:
    return round(nanoseconds / 1e3, 1)


def measure(
    case: Case, makers: dict[str, peers.Maker], settings: run.Settings, xp: Any, _begun: Any = None
) -> tuple[list[run.Row], list[str]]:
    """As `run.measure` does it, by the threads of the case; then what ours and the yardsticks do is traced."""
    os.environ["XENT_ARRAY_NUM_THREADS"] = str(case.threads)
    rows, notes = run.measure(case, makers, settings._replace(threads=case.threads), xp)
    problem, _, _ = run.make(case, settings.seed, case.threads, xp, judged=False)
    calls = {(library, name): call for library in (COPY, OURS) for name, call in makers[library](problem).items()}
    for row in rows:
        row["traced"] = None
        if row["library"] in (COPY, OURS) and not row["failed"]:
            row["traced"] = traced(calls[row["library"], row["operation"]])
    return rows, notes


def traced(call: Call) -> list[dict[str, Any]]:
    """Calls in a row, as they are timed; the first two, which are not kept, wake what sleeps."""
    timing.wait_until_quiet()
    return [trace(call.run) for _ in range(2 + TRACED)][2:]


def counts(cores: int) -> list[int]:
    """1, 2, 4, … and all."""
    return sorted({cores, *(1 << k for k in range(cores.bit_length()))})


def close(rows: list[run.Row]) -> list[str]:
    by_key = report.by_key(rows)
    return ["\n\n".join([*report.threads(by_key), *report.idle(by_key)])]


def main(arguments: list[str]) -> int:
    cores = len(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(prog="python -m bench threads", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--threads", type=_count, nargs="+", default=counts(cores), metavar="N",
        help=f"numbers of them, more than there are cores too (default here {' '.join(map(str, counts(cores)))})",
    )  # fmt: skip
    parser.add_argument(
        "--sizes", type=_shape, nargs="+", default=suite.LARGE[:2], metavar="NxC",
        help=f"rows by classes (default {' '.join('x'.join(map(str, shape)) for shape in suite.LARGE[:2])})",
    )  # fmt: skip
    parser.add_argument("--repeat", type=_count, default=run.PACE[False]["rounds"], metavar="N",
                        help=f"rounds of turns (default {run.PACE[False]['rounds']})")  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="FILE", help="write one JSON line per row here")
    given = parser.parse_args(arguments)
    settings = run.Settings(
        backend=suite.THREADS,
        threads=max(cores, *given.threads),  # no core is taken away: fewer threads may lie as the system likes it
        rounds=given.repeat,
        turn=timing.TURN,
        seconds=3.0,
        memory=False,
        out=given.out,
        seed=0,
        commit=None,
        command=f"python -m bench threads {shlex.join(arguments)}".strip(),
    )
    return run.run(suite.thread_cases(given.sizes, given.threads), settings, close, measure)


def _count(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"must be a whole number, at least 1; got {text!r}")
    return int(text)


def _shape(text: str) -> tuple[int, int]:
    rows, by, classes = text.partition("x")
    if not by:
        raise argparse.ArgumentTypeError(f"must be rows by classes, such as 1024x32000; got {text!r}")
    return _count(rows), _count(classes)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
