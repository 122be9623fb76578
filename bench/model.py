"""python -m bench model: the goals on an H200, and what the model predicts for today's plan and kernels; without a GPU.

Each line is a problem in the syntax of `python -m xent_array --explain`, its predicted share of a copy (of a read, if
only the loss is computed), whether memory, instructions or special functions are the bottleneck, and the goal. The
kernels' counts come from kernels/counts.json, if it belongs to this code; else they are compiled and counted here, and
cached for the user.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "cuda")]

import kernel_resources  # noqa: E402
from support.simt import nvrtc  # noqa: E402

from xent_array import cross_entropy_value_and_grad  # noqa: E402
from xent_array._engines import _model, cuda  # noqa: E402
from xent_array._engines._model import Code, Launch, Problem, Times  # noqa: E402
from xent_array._kernels import Kernel  # noqa: E402

BOTH, LOSS = "LOSS_AND_GRAD", "LOSS"
GIB = 1 << 30
CLASSES = (256, 512, 1000, 1024, 2048, 4096, 8192, 16384, 32000, 32768, 50257, 65536, 131072, 262144)
FEW = (2, 3, 8, 10, 16, 21, 32)
NARROW = ("float32", "bfloat16")
PLAIN_MINUS = 0.03  # what an option that only changes numbers per row may cost


class Goal(NamedTuple):
    """What a problem should reach."""

    part: str
    problem: Problem
    job: str
    bound: float  # 0: what the same problem without options reaches, minus PLAIN_MINUS
    of: str = "copy"  # "bytes": all bytes at the speed of a copy; "mean": time of a mean over that of reduction="none"

    @property
    def words(self) -> str:
        problem = self.problem
        short = {long: name for name, long in _model.SHORT.items()}[problem.dtype]
        axis = "" if problem.axis in (-1, len(problem.shape) - 1) else f"@axis{problem.axis}"
        return f"{'x'.join(map(str, problem.shape))}:{short}{axis}{''.join('+' + name for name in problem.options)}"


def _whole(classes: int, dtype: str, *options: str) -> Problem:
    """One GiB of logits."""
    return Problem((GIB // (classes * cuda.DTYPES[dtype][1]), classes), dtype, 1, options)


def goals() -> Iterator[Goal]:
    """All of them."""
    long = {131072: 0.93, 262144: 0.90}
    for dtype in NARROW:
        for classes in CLASSES:
            bound = long.get(classes, 0.96)
            yield Goal("loss and gradient (in place: 2 points less)", _whole(classes, dtype), BOTH, bound)
    for dtype in NARROW:
        for classes in CLASSES:
            bound = 0.93 if dtype == "bfloat16" and classes < 1024 else 0.97
            yield Goal("loss alone", _whole(classes, dtype), LOSS, bound)
    for dtype in NARROW:
        for option in ("z", "sample_weight", "weight", "smoothing"):
            for classes in (1024, 32000):
                for job in (BOTH, LOSS):
                    yield Goal("options that need no more per logit", _whole(classes, dtype, option), job, 0)
    for dtype, capped in zip(NARROW, (0.85, 0.55), strict=True):
        for classes in (1024, 32000):
            yield Goal("soft targets, of three arrays", _whole(classes, dtype, "soft"), BOTH, 0.90)
            yield Goal("softcap", _whole(classes, dtype, "softcap"), BOTH, capped)
    images = {(16, 21, 512, 512): (0.85, 0.70), (4, 150, 512, 512): (0.85, 0.70), (64, 19, 256, 512): (0.85, 0.70)}
    images |= {(64, 2, 1024, 1024): (0.65, 0.65), (8, 1000, 128, 128): (0.70, 0.70)}
    for shape, bounds in images.items():
        for dtype, bound in zip(NARROW, bounds, strict=True):
            yield Goal("classes apart, of all bytes", Problem(shape, dtype, 1), BOTH, bound, "bytes")
    for dtype, bound in zip(NARROW, (0.75, 0.65), strict=True):
        for classes in FEW:
            for job in (BOTH, LOSS):
                yield Goal("few classes, of all bytes", _whole(classes, dtype), job, bound, "bytes")
    for classes in (1000, 32000):
        yield Goal("float64", _whole(classes, "float64"), BOTH, 0.65)
    for shape in ((1, 1 << 27), (64, 262144)):  # no chip holds the first: a gradient reads it twice
        for job in (LOSS, BOTH):
            yield Goal("few rows, of all bytes", Problem(shape, "float32", 1), job, 0.85, "bytes")
    yield Goal("a mean, times none", Problem((32768, 256), "bfloat16", 1), BOTH, 1.25, "mean")


# The kernels


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "xent_array" / "counts"


def codes(kernels: Iterable[Kernel], chip: int = 90) -> dict[str, Code]:
    """Counts of kernels by their names: as shipped, from the cache, or compiled now."""
    wanted = {kernel.name: kernel for kernel in kernels}
    file = kernel_resources.counts_file()
    about = json.loads(file.read_text()) if file.exists() else {}
    fresh = about.get("digest") == kernel_resources.digest() and about.get("chip") == f"sm_{chip}"
    found = {name: _model.counts()[name] for name in wanted if fresh and name in _model.counts()}
    with ThreadPoolExecutor(max(1, len(os.sched_getaffinity(0)))) as pool:
        lacking = [kernel for name, kernel in wanted.items() if name not in found]
        found |= zip((kernel.name for kernel in lacking), pool.map(lambda k: _kept(k, chip), lacking), strict=True)
    return found


def _kept(kernel: Kernel, chip: int) -> Code:
    """From the cache; else compiled, and cached if possible."""
    said = f"{nvrtc.version()} sm_{chip} {Code._fields} {kernel.text}"
    file = cache_folder() / f"{hashlib.sha256(said.encode()).hexdigest()[:32]}.json"
    if file.exists():
        return Code(*json.loads(file.read_text()))
    (row,) = nvrtc.resources(kernel.text, f"sm_{chip}", kernel.file)
    code = Code.of(asdict(row))
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = file.with_suffix(f".{os.getpid()}")
        unfinished.write_text(json.dumps(code))
        unfinished.replace(file)
    except OSError:
        pass
    return code


# The predictions


class Line(NamedTuple):
    """One goal, and the model's prediction."""

    goal: Goal
    value: float
    bound: float
    times: Times
    spills: int

    @property
    def met(self) -> bool:
        return self.value <= self.bound if self.goal.of == "mean" else self.value >= self.bound


def predicted(wanted: list[Goal], codes: Callable[[Iterable[Kernel]], dict[str, Code]]) -> list[Line]:
    """Every goal's line."""
    plans = {(goal.problem, goal.job): goal.problem.plan(goal.job) for goal in wanted}
    plain = {(goal.problem._replace(options=()), goal.job) for goal in wanted if not goal.bound}
    plans |= {(problem, job): problem.plan(job) for problem, job in plain}
    known = codes(kernel for (_, job), plan in plans.items() for kernel in plan.kernels(job))
    chip = _model.card(90)

    def of(problem: Problem, job: str) -> tuple[Launch, int, Times]:
        plan = plans[problem, job]
        found = _model.times_of(plan, job, known.get, chip, problem.more, problem.usual)
        assert found is not None
        return found[0], max(known[kernel.name].spill_stores for kernel in plan.kernels(job)), found[1]

    lines = []
    for goal in wanted:
        launch, spills, took = of(goal.problem, goal.job)
        value, bound = _model.share(launch, took, chip), goal.bound
        if goal.of == "bytes":
            value = launch.bytes / (chip.bandwidth * 1e9) / took.all
        if goal.of == "mean":
            none, mean = (took.all + _model.STARTED * launches(reduction) for reduction in ("none", "mean"))
            value = mean / none
        if not bound:
            launch, _, without = of(goal.problem._replace(options=()), goal.job)
            bound = _model.share(launch, without, chip) - PLAIN_MINUS
        lines.append(Line(goal, value, bound, took, spills))
    return lines


class Silent:
    """A launcher that launches nothing, and counts."""

    def __init__(self) -> None:
        self.launched = 0

    def declines(self, rows: Any) -> str | None:
        return None

    def chip(self, array: Any) -> int:
        return 90

    def multiprocessors(self, array: Any) -> int:
        return 132

    def on(self, array: Any) -> AbstractContextManager[Any]:
        return nullcontext()

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Any:
        return np.empty(shape, dtype)

    def copy(self, array: Any, to: Any) -> None:
        to[...] = array

    def look(self, array: Any) -> tuple[int, Any]:
        pointer = array.ctypes.data
        return pointer, (array.shape, array.strides, array.dtype, array.flags.writeable, pointer % 16)

    def ready(self, *launch: Any, **options: Any) -> cuda.Run:
        def run(*arguments: Any) -> None:
            self.launched += 1

        return run


def launches(reduction: str, rows: int = 32768) -> int:
    """Launches that the engine makes for loss and gradient with labels."""
    silent = Silent()
    logits, labels = np.zeros((rows, 40), np.float32), np.zeros(rows, np.int64)
    given: dict[str, Any] = {"reduction": reduction, "engine": cuda.Cuda(silent), "validate": False}
    cross_entropy_value_and_grad(logits, labels, **given)
    return silent.launched


def table(lines: list[Line]) -> list[str]:
    """As text, part by part."""
    said = []
    for part in dict.fromkeys(line.goal.part for line in lines):
        said += ["", part]
        for line in (line for line in lines if line.goal.part == part):
            goal, (memory, instructions, special, _) = line.goal, (t * 1e3 for t in line.times)
            sign, form = ("<=", "{:7.2f}") if goal.of == "mean" else (">=", "{:7.1%}")
            verdict = (
                f"{'yes' if line.met else 'NO '} {form.format(line.value)} {sign} {form.format(line.bound).strip():6}"
            )
            job = goal.job.lower().replace("_", " ")
            three = f"(memory {memory:.3f}, instr. {instructions:.3f}, special {special:.3f} ms)"
            spills = f"  spills {line.spills} bytes" if line.spills else ""
            said.append(f"  {verdict} {goal.words:34} {job:14} {line.times.decides:17} {three}{spills}")
    met = sum(line.met for line in lines)
    return [*said, "", f"{met} of {len(lines)} goals met, as predicted for an {_model.card(90).name}"]


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench model", description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--check", action="store_true", help="exit 1 where a goal is missed")
    given = parser.parse_args(arguments)
    lines = predicted(list(goals()), codes)
    print("\n".join(table(lines)))
    return int(given.check and not all(line.met for line in lines))
