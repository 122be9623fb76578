"""python -m bench tune: times every plan that could run a problem on this GPU, next to the one that `plan` chooses.

The others differ from it in vectors, lanes, threads or clusters. Before a plan is timed, its loss and gradient are
compared with those of the chosen plan, which the tests compare with the oracle.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from xent_array import _again, _kernels, cross_entropy, cross_entropy_value_and_grad
from xent_array._engines import _model, cuda
from xent_array._engines._model import Problem
from xent_array._kernels import Kernel

JOBS = ("LOSS_AND_GRAD", "LOSS")
CLASSES = (64, 256, 1000, 1024, 4096, 16384, 32000, 50257, 131072)
VECTORS, LANES, THREADS, CLUSTERS = (1, 2, 4, 8), (4, 8, 16, 32), (32, 64, 128, 256, 512, 1024), (1, 2, 4, 8)
RUNS = 9


def problems() -> list[Problem]:
    """One GiB of logits each."""
    return [
        Problem(((1 << 30) // (classes * cuda.DTYPES[dtype][1]), classes), dtype, 1)
        for classes in CLASSES
        for dtype in ("float32", "bfloat16")
    ]


def plans_for(problem: Problem, job: str = "LOSS_AND_GRAD") -> Iterator[cuda.Plan]:
    """The chosen plan, then every other WARP, BLOCK and STREAM plan that passes the rules of tests/support/plans.py."""
    chosen = problem.plan(job)
    yield chosen
    for plan in _all_others(problem, chosen):
        if plan.kernel(job) != chosen.kernel(job):
            yield plan


def _all_others(problem: Problem, chosen: cuda.Plan) -> Iterator[cuda.Plan]:
    if chosen.family in cuda.MANY_ROWS:
        return
    itemsize = cuda.DTYPES[problem.dtype][1]
    size = problem.classes * itemsize
    for vectors, lanes in itertools.product(VECTORS, LANES):
        if size <= 16 * vectors * lanes and lanes >= 16 // itemsize - 1:  # a lane for each element of an unaligned end
            yield from _others(chosen, "WARP", vectors, lanes, 128, 1)
    for vectors, threads, cluster in itertools.product(VECTORS, THREADS, CLUSTERS):
        if cluster > 1 and problem.chip < 90:
            continue
        held = 16 * vectors * threads * cluster
        if held / 2 < size <= held:
            yield from _others(chosen, "BLOCK", vectors, 0, threads, cluster)
        if threads >= 128 and size > held:
            yield from _others(chosen, "STREAM", vectors, 0, threads, cluster)


def _others(
    chosen: cuda.Plan, family: str, vectors: int, lanes: int, threads: int, cluster: int
) -> Iterator[cuda.Plan]:
    """One plan, unless it is the chosen one."""
    per_block = threads // lanes if lanes else 1
    most = 1024 if chosen.chip == 75 else 2048
    plan = replace(
        chosen, family=family, vectors=vectors, lanes=lanes, cluster=cluster, stream=family == "STREAM",
        threads=threads, parts=1, part=0,
        blocks=-(-chosen.rows // per_block) * cluster, rows_per_block=per_block,
        bound=(threads, max(1, min(512, most) // threads)),
    )  # fmt: skip
    if plan != chosen:
        yield plan


def words(plan: cuda.Plan) -> str:
    return (
        f"{plan.family} {plan.vectors} vectors, {plan.lanes or plan.threads} threads, "
        f"{plan.cluster or plan.parts} of {plan.threads} x {plan.bound[1]}"
    )


def missing() -> str | None:
    from .gpu import missing

    return missing()


def compile_ahead(wanted: list[Problem]) -> int:
    """Compiles every kernel to be timed, on all cores; one that does not compile is reported when it is to be timed."""
    import cupy

    device = cupy.cuda.Device().id
    kernels = {k for problem in wanted for job in JOBS for plan in plans_for(problem, job) for k in plan.kernels(job)}

    def compile_(kernel: Kernel) -> None:
        with cupy.cuda.Device(device), contextlib.suppress(Exception):
            _kernels.compiled(kernel, device)

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        list(pool.map(compile_, kernels))
    return len(kernels)


def timed(problem: Problem, most: float) -> list[dict[str, Any]]:
    """A row for each plan, the chosen one first."""
    import cupy
    import ml_dtypes

    from .timing import DeviceClock

    dtype = ml_dtypes.bfloat16 if problem.dtype == "bfloat16" else problem.dtype
    rng = cupy.random.default_rng(0)
    x = rng.standard_normal(problem.shape, dtype=cupy.float32).astype(dtype)
    y = rng.integers(problem.classes, size=problem.rows)
    out, clock, end = cupy.empty_like(x), DeviceClock(), time.monotonic() + most
    copied = _median(clock, lambda: out.data.copy_from_device_async(x.data, x.nbytes))
    given: dict[str, Any] = {"reduction": "none", "engine": cuda.Cuda(cuda.Cupy()), "validate": False}
    calls = {
        "LOSS_AND_GRAD": lambda: cross_entropy_value_and_grad(x, y, out=out, **given),
        "LOSS": lambda: (cross_entropy(x, y, **given), None),
    }
    return [row for job, run in calls.items() for row in each(problem, job, run, clock, copied, end)]


def each(
    problem: Problem,
    job: str,
    run: Callable[[], tuple[Any, Any]],
    clock: Callable[[Callable[[], Any]], float],
    copied: float,
    end: float,
) -> Iterator[dict[str, Any]]:
    """The chosen plan, then others until time is up, each checked and then timed."""
    right = None
    for plan in plans_for(problem, job):
        if right is not None and time.monotonic() > end:
            return
        row: dict[str, Any] = {"problem": list(problem.shape), "dtype": problem.dtype, "job": job, "plan": words(plan)}
        row |= {"kernel": plan.kernels(job)[0].name, "right": False, "seconds": None, "of_copy": None}
        with only(plan):
            try:
                loss, grad = run()
                right = (loss, None if grad is None else grad.copy()) if right is None else right
                row["right"] = all(_alike(one, two) for one, two in zip((loss, grad), right, strict=True))
                if row["right"]:
                    row["seconds"] = _median(clock, run)
                    row["of_copy"] = copied / row["seconds"] * (1 if job == "LOSS_AND_GRAD" else 0.5)
            except Exception as error:  # a plan that this chip rejects
                row["right"] = str(error)[:200]
        yield row


def _alike(one: Any, two: Any) -> bool:
    """Up to the rounding of sums in another order."""
    return one is None or bool(abs(one.astype("float32") - two.astype("float32")).max() <= 1e-2 * abs(two).max())


class only:
    """A context in which the engine uses this plan."""

    def __init__(self, plan: cuda.Plan) -> None:
        self.plan = plan

    def __enter__(self) -> None:
        self.before = cuda._chosen
        _again.forget()
        cuda._chosen = lambda job, *_: (self.plan, self.plan.kernel(job))  # type: ignore[assignment]

    def __exit__(self, *_: object) -> None:
        cuda._chosen = self.before
        _again.forget()


def _median(clock: Callable[[Callable[[], Any]], float], run: Callable[[], Any]) -> float:
    run()
    return statistics.median(clock(run) for _ in range(RUNS))


def best(rows: list[dict[str, Any]]) -> list[str]:
    """For each job, the time of the chosen plan and the three best."""
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
    print(f"{compile_ahead(wanted)} kernels compiled", flush=True)
    for problem in wanted:
        rows = timed(problem, given.most)
        print(f"{problem.rows} x {problem.classes} {problem.dtype}\n" + "\n".join(best(rows)), flush=True)
        if given.out is not None:
            with given.out.open("a") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
    return 0
