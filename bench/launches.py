"""Every launch that the plan can choose on a chip, at small sizes, each result against the float64 oracle.

    python -m bench.launches                              on this machine's GPU
    compute-sanitizer --tool memcheck --error-exitcode 1 python -m bench.launches --no-pool --part 1/6
    python -m bench.launches --emulated --chip 90 --part 1/40      on the CPU, under the emulation of tests/support/simt

A problem is one way to map rows to the device (a kernel for each job) on one kind of memory: rows that start off 16
bytes, rows with gaps between them, classes along axis 1, labels of every integer dtype, distributions, weights, a
gradient in a new array, in place, or in a buffer of another alignment. Every job runs on each. Exits 1 if a result is
wrong, or if a problem does not launch the kernel it is meant for. Problems without options come first, for a GPU that
is available for minutes (`--most`).
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # the checkout, whatever is installed; its oracle

from support.close import assert_grad, assert_loss  # noqa: E402
from support.oracle import oracle  # noqa: E402

from xent_array import _engines, _problem, cross_entropy, cross_entropy_grad, cross_entropy_value_and_grad, row_stats  # noqa: E402
from xent_array._engines import cuda  # noqa: E402
from xent_array._rows import Asked  # noqa: E402

OUTS = ("in place", "new", "aligned otherwise")
TARGETS = (None, "float32", "float64", "of logits", "bool")  # None: labels
MANY_ROWS = cuda.SUM_ALONE + 300  # more than one block sums


class Launches(NamedTuple):
    """One problem, and what its number varies."""

    number: int
    rows: int
    classes: int
    dtype: str
    variant: str
    layout: str
    even: bool  # whether the other arrays are aligned like the logits
    chip: int

    @property
    def out(self) -> str:
        return OUTS[self.number % 2] if self.even else OUTS[1 + self.number % 2]

    @property
    def labels(self) -> str:
        return list(cuda.LABELS)[self.number % 8]

    @property
    def target(self) -> str | None:
        """None for labels."""
        if self.variant in ("GENERAL", "CAPPED_GENERAL"):
            return TARGETS[self.number % 5]
        return "of logits" if self.variant == "SOFT" else None

    @property
    def reduction(self) -> str:
        return ("mean", "sum", "none")[self.number // 3 % 3]

    @property
    def name(self) -> str:
        return (
            f"{self.rows}x{self.classes} {self.dtype} {self.variant} {self.layout} {self.target or self.labels}"
            f" {self.reduction} out {self.out}: {self.plan('LOSS_AND_GRAD').family}"
        )

    def plan(self, job: str) -> cuda.Plan:
        how: dict[str, Any] = {"layout": self.layout, "variant": self.variant, "job": job}
        is_always_even = self.layout != "columns" and cuda.is_always_even(job, self.variant)
        how["access"] = 4 if self.even or is_always_even else 1
        return cuda.plan(self.rows, self.classes, self.dtype, self.chip, **how)

    def kernels(self) -> set[str]:
        """The kernels it is meant for."""
        jobs = [job for job in cuda.JOBS if job != "LOG_SOFTMAX" or self.variant == "PLAIN"]
        cluster = cuda.SUM_CLUSTER if self.rows > cuda.SUM_ALONE and self.chip >= 90 else 1
        sums = {cuda.sums_kernel(self.dtype, cluster).name} if self.reduction != "none" else set()
        return {kernel.name for job in jobs for kernel in self.plan(job).kernels(job)} | sums


def problems(chip: int) -> list[Launches]:
    """One for each way to map rows, and some with many rows."""
    found: dict[Any, tuple[Any, ...]] = {}
    for variant in cuda.VARIANTS:
        for dtype, (_, itemsize) in cuda.DTYPES.items():
            several = cuda.classes_for_every_plan(itemsize)
            for classes, layout, even in itertools.product(several, cuda.LAYOUTS, (True, False)):
                case = _smaller(Launches(0, 1, classes, dtype, variant, layout, even, chip))
                if not cuda.is_in_catalogue(case.plan("LOSS")) or (layout == "columns" and case.classes == 1):
                    continue
                ways = tuple(case.plan(job).kernel(job).name for job in ("LOSS", "LOSS_AND_GRAD", "STATS_AND_GRAD"))
                found.setdefault((ways, layout, even if "xent_tiny_" in ways[0] else None), case)
            if variant in ("PLAIN", "GENERAL"):
                found["many", dtype, variant] = Launches(0, MANY_ROWS, 3, dtype, variant, "flat", True, chip)
    return [case._replace(number=number) for number, case in enumerate(found.values())]


def _smaller(case: Launches) -> Launches:
    """Few rows, which do not fill the last block; and, if it makes no difference, heads and tails."""
    plan = case.plan("LOSS_AND_GRAD")
    case = case._replace(rows=2 if plan.rows_per_block == 1 else plan.rows_per_block + 2 * plan.width)
    fewer = case._replace(classes=max(2 if case.layout == "columns" else 1, case.classes - 1))
    alike = all(fewer.plan(job).kernel(job) == case.plan(job).kernel(job) for job in ("LOSS", "LOSS_AND_GRAD"))
    # Class weights are even only with rows that start on 16 bytes.
    return fewer if alike and not (case.even and case.variant in ("GENERAL", "CAPPED_GENERAL")) else case


def part_of(all_: list[Launches], part: str) -> list[Launches]:
    """Part "i/n" of the problems, i from 1 to n: large and small ones in each."""
    i, n = map(int, part.split("/"))
    if not 1 <= i <= n:
        raise ValueError(f"part must be like 1/6, got {part!r}")
    return all_[i - 1 :: n]


class Where(NamedTuple):
    """NumPy and the emulation, or CuPy and a GPU."""

    xp: Any
    engine: cuda.Cuda
    launched: list[str]
    get: Any  # to NumPy


def on_gpu(pool: bool) -> tuple[Where, int]:
    import cupy

    if not pool:
        cupy.cuda.set_allocator(None)
    launched: list[str] = []

    class Noted(cuda.Cupy):
        def ready(self, kernel: Any, *how: Any) -> cuda.Run:
            run = super().ready(kernel, *how)

            def noted(*argument: Any) -> None:
                launched.append(kernel.name)
                run(*argument)

            return noted

    engine = cuda.Cuda(Noted())
    return Where(cupy, engine, launched, lambda array: array.get()), engine.launcher.chip(cupy.empty(1))


def emulation(chip: int, mode: str) -> Where:
    from support import emulated

    engine = emulated.engine(chip=chip, mode=mode)
    return Where(np, engine, engine.launcher.launches, np.asarray)


def arrays(case: Launches) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """(logits with the class axis 1, target, options), in NumPy."""
    rng = np.random.default_rng(case.number)
    shape = (2, case.classes, -(-case.rows // 2)) if case.layout == "columns" else (case.rows, case.classes)
    row_shape = shape[:1] + shape[2:]
    dtype = np.dtype(ml_dtypes.bfloat16 if case.dtype == "bfloat16" else case.dtype)
    logits = (rng.standard_normal(shape) * 3).astype(dtype)
    options: dict[str, Any] = {"reduction": case.reduction}
    if case.target is None:
        target = rng.integers(min(case.classes, 127), size=row_shape).astype(case.labels)
        options["ignore_index"] = int(target.flat[-1])
        right = np.expand_dims(target, 1)[::2].astype(np.intp)  # every other label is the argmax
        np.put_along_axis(logits[::2], right, np.asarray(20, dtype), 1)
    else:
        target = rng.random(shape)
        target = target > 0.8 if case.target == "bool" else target / target.sum(1, keepdims=True)
        target = target.astype(dtype if case.target == "of logits" else case.target)
    if case.variant != "PLAIN" or case.number % 2:
        options |= {"z_loss": 1e-3, "sample_weight": rng.random(row_shape) * (rng.random(row_shape) > 0.2)}
        options["sample_weight"].flat[0] = 1.5
    if case.variant not in ("PLAIN", "SMOOTH", "SOFT"):
        options["weight"] = rng.random(case.classes)
    if case.variant not in ("PLAIN", "CAPPED"):
        options["label_smoothing"] = 0.1
    if "CAPPED" in case.variant:
        options["softcap"] = 5.0
    return logits, target, options


def placed(xp: Any, values: np.ndarray, layout: str, start: int, even: bool = False) -> Any:
    """A copy of the values: `start` elements into its memory, and with gaps between rows if these lie apart."""
    apart = 0 if layout != "rows" else 16 // values.dtype.itemsize if even else 3
    shape = (*values.shape[:-1], values.shape[-1] + apart)
    room = np.full(start + int(np.prod(shape)), 77, values.dtype)
    room[start:].reshape(shape)[..., : values.shape[-1]] = values
    return xp.asarray(room)[start:].reshape(shape)[..., : values.shape[-1]]


def check(case: Launches, where: Where) -> None:
    """All jobs of one problem."""
    xp, get = where.xp, where.get
    logits, target, options = arrays(case)
    start = 0 if case.even else 1  # off the 16-byte alignment of new arrays
    with np.errstate(all="ignore"):
        truth = oracle(logits, target, axis=1, grad_output=0.5, **options)
    x = placed(xp, logits, case.layout, start, case.even)
    if case.target is None:
        y = placed(xp, target, "rows" if case.number % 4 == 0 else "flat", case.number % 3)
    else:
        y = placed(xp, target, case.layout, 0 if case.even else 2, case.even)
    for name in ("weight", "sample_weight"):
        if name in options:
            options[name] = xp.asarray(options[name])
    options |= {"axis": 1, "engine": where.engine, "validate": False}

    assert_loss(get(cross_entropy(x, y, **options)), truth)
    stats = row_stats(x, y, **{name: value for name, value in options.items() if name != "reduction"})
    upstream = 0.5
    if case.number % 2:
        upstream = xp.full(logits.shape[:1] + logits.shape[2:] if case.reduction == "none" else (), 0.5, xp.float32)
    options["grad_output"] = upstream
    assert_grad(get(cross_entropy_grad(x, y, stats=stats, **options)), truth)
    if case.variant == "PLAIN":
        wide = logits.astype(np.float64)
        log = wide - np.log(np.exp(wide).sum(1, keepdims=True))
        for logarithm, wanted in ((False, np.exp(log)), (True, log)):
            problem = _problem.problem_without_target(x, 1)
            found = get(problem.view.from_logits(xp, where.engine.softmax(problem.rows, logarithm)))
            bar = {"float16": 2e-3, "bfloat16": 2e-2, "float32": 1e-5, "float64": 1e-13}[case.dtype]
            np.testing.assert_allclose(found.astype(np.float64), wanted, rtol=bar, atol=bar)
    loss, grad, also = three(where, x, y, options)
    assert_loss(get(loss), truth)
    assert_grad(get(grad), truth)
    correct = None
    if case.target is None:
        correct = (logits.astype(np.float64).argmax(1) == target) & (target != options["ignore_index"])
    for found in (stats, also):
        if correct is None:
            assert found.correct is None
        else:
            np.testing.assert_array_equal(get(found.correct), correct)
    out = None
    if case.out == "aligned otherwise":
        out = placed(xp, np.zeros_like(logits), case.layout, 1 - start)
    elif case.out == "in place":
        out = x
    loss, grad = cross_entropy_value_and_grad(x, y, out=out, **options)
    if out is not None and grad is not out:
        raise AssertionError("another array than out came back")
    assert_loss(get(loss), truth)
    assert_grad(get(grad), truth)


def three(where: Where, x: Any, y: Any, options: dict[str, Any]) -> tuple[Any, Any, Any]:
    """Loss, gradient and stats from one launch, in arrays of their own."""
    problem = _problem.problem_of(x, y, Asked(**options))
    loss, grad, stats = _engines.loss_grad_and_stats(where.engine, problem.rows, None)
    return problem.loss(loss), problem.view.from_logits(where.xp, grad), problem.user_stats(stats)


def run(cases: list[Launches], where: Where, most: float = math.inf) -> tuple[int, int]:
    """How many ran within so many seconds, and how many went wrong; each of these is reported at once."""
    wrong, end = 0, time.monotonic() + most
    for number, case in enumerate(cases):
        if time.monotonic() > end:
            return number, wrong
        before = len(where.launched)
        try:
            check(case, where)
            missing = case.kernels() - set(where.launched[before:])
            if missing:
                raise AssertionError(f"not launched: {', '.join(sorted(missing))}")
        except AssertionError as error:
            wrong += 1
            print(f"WRONG {case.name}\n{error}", flush=True)
    return len(cases), wrong


def known(chip: int) -> Iterator[str]:
    """The name of every kernel of the catalogue."""
    for variant in cuda.VARIANTS:
        for kernel in cuda.catalogue(chip, variant):
            yield kernel.name


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.launches", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--part", default="1/1", metavar="I/N", help="only every Nth problem, from the Ith on")
    parser.add_argument("--no-pool", action="store_true", help="memory from CUDA itself, whose bounds memcheck knows")
    parser.add_argument("--emulated", action="store_true", help="under the emulation, without a GPU")
    parser.add_argument("--mode", choices=("plain", "check"), default="check", help="of the emulation")
    parser.add_argument("--chip", type=int, default=90, help="what the emulation says it is")
    parser.add_argument("--most", type=float, default=math.inf, metavar="S", help="seconds after which none is begun")
    parser.add_argument("--list", action="store_true", help="print the problems and stop")
    given = parser.parse_args(arguments)
    chip = given.chip
    if given.list:
        print(*(case.name for case in part_of(problems(chip), given.part)), sep="\n")
        return 0
    if given.emulated:
        where = emulation(chip, given.mode)
    else:
        where, chip = on_gpu(not given.no_pool)
    cases = part_of(problems(chip), given.part)
    done, wrong = run(cases, where, given.most)
    print(
        f"part {given.part} on sm_{chip}{' (emulated)' if given.emulated else ''}: {len(cases)} problems"
        f"{f', the first {done} in {given.most:g} s' if done < len(cases) else ''}, {len(set(where.launched))} kernels,"
        f" {len(where.launched)} launches, {wrong} wrong"
    )
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
