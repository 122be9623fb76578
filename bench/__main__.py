"""python -m bench: this library against what else is installed here. See bench/README.md."""

from __future__ import annotations

import argparse
import importlib
import os
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

JOBS = {  # modules with a `main` of their own
    "report": "draws what bench/results holds",
    "linear": "measures memory and time of linear cross-entropy on the CPU",
    "tensors": "times tensors of PyTorch and arrays of JAX on the CPU",
    "threads": "times 1, 2, 4, … threads of a CPU and traces what each does",
    "scale": "measures what is larger than memory: Dask, a cluster, files; and what processes exchange",
    "compare": "times two revisions of this library against each other, and compares their results bit by bit",
    "host": "times what a call on CuPy arrays costs the host",
    "model": "predicts what a GPU would say, without one",
    "gpu": "is the job for a GPU that is there for minutes",
    "tune": "times there every plan that could take a problem",
}


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] in ([job] for job in JOBS):
        main_of: Callable[[list[str]], int] = importlib.import_module(f".{arguments[0]}", __package__).main
        return main_of(arguments[1:])

    from . import run, suite, timing  # which need more than some of these jobs

    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Check against the oracle, then time turn by turn. "
        + ", ".join(f"`python -m bench {job}` {does}" for job, does in JOBS.items())
        + ".",
    )
    parser.add_argument("--backend", choices=("numpy", "cupy"), default="numpy", help="on CPU or on GPU arrays")
    parser.add_argument("--quick", action="store_true", help="small cases and few rounds: at most a minute")
    parser.add_argument("--cases", metavar="REGEX", default="", help="only the cases whose name this finds")
    parser.add_argument("--engines", action="store_true", help="only what GPU and CPU are compared by, without peers")
    parser.add_argument(
        "--ahead", action="store_true", help="run and check all cases, say so, and time them when a line is read"
    )
    parser.add_argument("--most", type=float, default=float("inf"), metavar="S", help="seconds of timing, in all")
    parser.add_argument("--list", action="store_true", help="print the names of the cases and stop")
    parser.add_argument("--threads", type=int, metavar="N", help="for every library; by default all cores there are")
    parser.add_argument(
        "--seconds", type=float, metavar="S", help="of an operation, after which 3 turns do (default 3)"
    )
    parser.add_argument("--rounds", type=int, metavar="N", help="of turns (default 7)")
    parser.add_argument("--turn", type=float, metavar="S", help=f"seconds of a turn (default {timing.TURN})")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write one JSON line per row here")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the logits and the order of the turns")
    parser.add_argument("--commit", metavar="HASH", help="what is measured, where git cannot tell")
    given = parser.parse_args(arguments)

    every = suite.ENGINES if given.engines else suite.cases(given.backend, given.quick)
    cases = [case for case in every if re.search(given.cases, case.name)]
    if not cases:
        parser.error(f"no case matches {given.cases!r}; --list names them")
    if given.list:
        print(*(case.name for case in cases), sep="\n")
        return 0
    pace = run.PACE[given.quick]
    cores = len(os.sched_getaffinity(0))
    if given.threads is not None and not 1 <= given.threads <= cores:
        parser.error(f"--threads must be from 1 to {cores}, the cores this process may use")
    return run.run(
        cases,
        run.Settings(
            backend=given.backend,
            threads=given.threads or cores,
            rounds=given.rounds or pace["rounds"],
            turn=given.turn or pace["turn"],
            seconds=3.0 if given.seconds is None else given.seconds,
            memory=pace["memory"],
            out=given.out,
            seed=given.seed,
            commit=given.commit,
            command=f"python -m bench {shlex.join(arguments)}".strip(),
            peers=not given.engines,
            ahead=given.ahead,
            most=given.most,
        ),
    )


if __name__ == "__main__":
    sys.exit(main())
