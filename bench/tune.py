"""python -m bench tune: times every plan that could take a problem on this GPU, beside the one that the plan chooses.

A plan that could take it is the chosen one with other vectors, lanes, threads or clusters, and the loss and gradient of
each is checked before it is timed: against that of the chosen plan, which the tests hold against the oracle.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from xent_array._engines import _model, cuda
from xent_array._engines._model import Problem

JOBS = ("LOSS_AND_GRAD", "LOSS")
CLASSES = (64, 256, 1000, 1024, 4096, 16384, 32000, 50257, 131072)
VECTORS, LANES, THREADS, CLUSTERS = (1, 2, 4, 8), (4, 8, 16, 32), (32, 64, 128, 256, 512, 1024), (1, 2, 4, 8)
RUNS = 9


def problems() -> list[Problem]:
    """One GiB each."""
    return [
        Problem(((1 << 30) // (classes * cuda.DTYPES[dtype][1]), classes), dtype, 1)
        for classes in CLASSES
        for dtype in ("float32", "bfloat16")
    ]


def plans_for(problem: Problem, job: str = "LOSS_AND_GRAD") -> Iterator[cuda.Plan]:
    """The plan's own first, then every other of the families W, B and O that keeps the rules of tests/test_plan.py."""
    chosen = problem.plan(job)
    yield chosen
    if chosen.family not in "WBO":
        return
    itemsize = cuda.DTYPES[problem.dtype][1]
    size = problem.classes * itemsize
    for vectors, lanes in itertools.product(VECTORS, LANES):
        if size <= 16 * vectors * lanes and lanes >= 16 // itemsize - 1:  # each of a ragged end has a lane of its own
            yield from _others(chosen, "W", vectors, lanes, 128, 1)
    for vectors, threads, cluster in itertools.product(VECTORS, THREADS, CLUSTERS):
        if cluster > 1 and problem.chip < 90:
            continue
        held = 16 * vectors * threads * cluster
        if held / 2 < size <= held:
            yield from _others(chosen, "B", vectors, 0, threads, cluster)
        if threads >= 128 and size > held:
            yield from _others(chosen, "O", vectors, 0, threads, cluster)


def _others(
    chosen: cuda.Plan, family: str, vectors: int, lanes: int, threads: int, cluster: int
) -> Iterator[cuda.Plan]:
    """One plan, if it is not the chosen one."""
    per_block = threads // lanes if lanes else 1
    most = 1024 if chosen.chip == 75 else 2048
    plan = replace(
        chosen, family=family, vectors=vectors, lanes=lanes, cluster=cluster, stream=family == "O", threads=threads,
        blocks=-(-chosen.rows // per_block) * cluster, rows_per_block=per_block, shared=0,
        bound=(threads, max(1, min(512, most) // threads)),
    )  # fmt: skip
    if plan != chosen:
        yield plan


def words(plan: cuda.Plan) -> str:
    return (
        f"{plan.family} {plan.vectors} vectors, {plan.lanes or plan.threads} threads, "
        f"{plan.cluster} of {plan.threads} x {plan.bound[1]}"
    )


def missing() -> str | None:
    from .gpu import missing

    return missing()


def timed(problem: Problem, most: float) -> list[dict[str, Any]]:
    """A row for each plan, the chosen one's first."""
    import cupy

    from xent_array import cross_entropy, cross_entropy_value_and_grad

    from .timing import DeviceClock, summary

    rng = cupy.random.default_rng(0)
    dtype = cupy.float32 if problem.dtype == "float32" else cupy.dtype(problem.dtype)
    x = rng.standard_normal(problem.shape, dtype=cupy.float32).astype(dtype)
    y = rng.integers(problem.classes, size=problem.rows)
    out, clock, rows, end = cupy.empty_like(x), DeviceClock(), [], time.monotonic() + most
    copied = _median(clock, lambda: out.data.copy_from_device_async(x.data, x.nbytes), summary)
    for job in JOBS:
        right = None
        for plan in plans_for(problem, job):
            if rows and time.monotonic() > end:
                break
            engine = cuda.Cuda(cuda.Cupy())
            given = {"reduction": "none", "engine": engine, "validate": False}
            with only(plan):
                try:
                    if job == "LOSS":
                        found, run = cross_entropy(x, y, **given), lambda given=given: cross_entropy(x, y, **given)
                    else:
                        found, _ = cross_entropy_value_and_grad(x, y, out=out, **given)

                        def run(given: dict[str, Any] = given) -> Any:
                            return cross_entropy_value_and_grad(x, y, out=out, **given)

                    right = found if right is None else right
                    ok = bool(cupy.allclose(found, right, rtol=1e-5))
                    seconds = _median(clock, run, summary) if ok else None
                except Exception as error:  # one that this chip does not take
                    ok, seconds = str(error)[:200], None
            share = seconds and (2 if job == "LOSS_AND_GRAD" else 1) * copied / 2 / seconds
            kernel = plan.kernel(job).name
            rows.append(
                {"problem": list(problem.shape), "dtype": problem.dtype, "job": job, "plan": words(plan),
                 "kernel": kernel, "right": ok, "seconds": seconds, "of_copy": share}
            )  # fmt: skip
    return rows


class only:
    """While it is entered, the engine chooses this plan."""

    def __init__(self, plan: cuda.Plan) -> None:
        self.plan = plan

    def __enter__(self) -> None:
        self.before = cuda._chosen
        cuda._chosen = lambda job, *_: (self.plan, self.plan.kernel(job))  # type: ignore[assignment]

    def __exit__(self, *_: object) -> None:
        cuda._chosen = self.before


def _median(clock: Any, run: Any, summary: Any) -> float:
    run()
    return float(summary([clock(run) for _ in range(RUNS)])["seconds"])


def best(rows: list[dict[str, Any]]) -> list[str]:
    """For each job, the plan's own time and the three best."""
    lines = []
    for job in JOBS:
        of = [row for row in rows if row["job"] == job and row["seconds"]]
        if not of:
            continue
        lines.append(f"  {job.lower().replace('_', ' '):14} chosen {of[0]['of_copy']:6.1%}  {of[0]['plan']}")
        fastest = sorted(of, key=lambda row: float(row["seconds"]))[:3]
        lines += [f"  {'':14}        {row['of_copy']:6.1%}  {row['plan']}" for row in fastest]
    return lines


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench tune", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("problems", nargs="*", metavar="PROBLEM", help=f"like {_model.LIKE.partition(' ')[0]}")
    parser.add_argument("--list", action="store_true", help="print the plans and stop; needs no GPU")
    parser.add_argument("--most", type=float, default=6, metavar="S", help="seconds for a problem (default 6)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write one JSON line per plan here")
    given = parser.parse_args(arguments)
    wanted = [Problem.parse(text) for text in given.problems] or problems()
    if given.list:
        for problem in wanted:
            print(problem.rows, problem.classes, problem.dtype)
            print("\n".join(f"  {words(plan)}" for plan in plans_for(problem)))
        return 0
    if (reason := missing()) is not None:
        print(f"python -m bench tune is for a machine with a GPU: {reason}; --list names the plans", file=sys.stderr)
        return 1
    for problem in wanted:
        rows = timed(problem, given.most)
        print(f"{problem.rows} x {problem.classes} {problem.dtype}\n" + "\n".join(best(rows)), flush=True)
        if given.out is not None:
            with given.out.open("a") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
    return 0
