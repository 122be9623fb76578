"""CuPy arrays: the kernels of kernels/, launched by a plan.

`plan` turns the shape of a problem into launch numbers: pure Python, and the only source of both what a kernel is
compiled with and how it is launched. `Cuda` turns `Rows` into arguments and at most three launches: the divisor of a
mean (it stays on the device), the rows, the sum of their losses. Nothing here waits for the device. Beside them there
are only copies of what the kernels do not read as it is, and one memset where more than SUM_ALONE rows are summed.

Everything that touches CuPy goes through a `Launcher`, so that the tests can put an emulation in its place.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, NamedTuple, Protocol

import numpy as np

from .. import _kernels
from .._kernels import Kernel
from .._rows import Array, Rows, RowStats

DTYPES = {"float16": ("f16", 2), "bfloat16": ("bf16", 2), "float32": ("float", 4), "float64": ("double", 8)}
LABELS = {"int8": 1, "uint8": 2, "int16": 3, "uint16": 4, "int32": 5, "uint32": 6, "int64": 7, "uint64": 8}
OF_LOGITS, OF_FLOAT32 = 9, 10  # these and LABELS: enum Target in problem.cuh
JOBS = ("LOSS_AND_GRAD", "LOSS", "STATS", "GRAD", "STATS_AND_GRAD", "LOG_SOFTMAX")  # enum Job
VARIANTS = ("PLAIN", "SMOOTH", "GENERAL", "CAPPED", "CAPPED_GENERAL")  # enum Variant
BY_CLASS = ("GENERAL", "CAPPED_GENERAL")  # a class may have a share of its own of the target
OLDEST = 75  # compute capability 7.5

TINY = 128  # bytes of a row: up to here a row is one thread's
TINY_THREADS, WARP_THREADS = 256, 128
NEIGHBOURS = 8  # rows side by side that make it worth reading them so: a sector of 32 bytes
# Classes apart: warps that share a row, classes held by a thread, bytes of an access, launch bounds. 16 warps of up to
# 24 accesses of 8 bytes under way are more than an SM needs; more classes are shared by more warps.
COLUMNS = (
    (1, 4, 16, (128, 5)), (1, 12, 8, (128, 4)), (1, 24, 8, (128, 4)),
    (8, 4, 16, (256, 3)), (8, 12, 8, (256, 2)), (8, 24, 8, (256, 2)),
)  # fmt: skip
# Still more are streamed: classes of the row, and as above. Two blocks of up to 1024 classes on each SM, or one of
# 2048, find in L2 what they read again for a gradient; beyond, memory is read twice.
STREAMED = ((1024, 16, 8, 4, (512, 2)), (1 << 31, 16, 16, 4, (512, 1)))
# Rows in lanes of a warp: bytes of the row, vectors per thread, lanes. The fewest threads that hold a row do the least
# that is not per logit.
WARP_ROWS = ((64, 1, 4), (128, 2, 4), (256, 4, 4), (512, 8, 4), (1024, 8, 8), (2048, 8, 16), (4096, 8, 32))
HELD = 512  # threads of 8 vectors: up to here one block holds a row
CLUSTERS = ((128 << 10, 4), (1 << 62, 8))  # bytes of a longer row, and how many blocks hold it to write a gradient
SUM_THREADS, SUM_BLOCKS, SUM_ALONE = 512, 128, 8192  # up to 8192 rows one block is as fast, and needs no ticket


# The plan


@dataclass(frozen=True, slots=True)
class Plan:
    """How the rows of one problem are spread over the device."""

    family: str  # W, B, O: lanes, a block, a block again and again; T: a thread; P: warps, each many rows
    rows: int
    classes: int
    dtype: str
    chip: int
    variant: str
    vectors: int  # of 16 bytes, held by a thread; in P classes, of each of its rows
    lanes: int  # that share a row; 0: the block, or the cluster; in P one of each warp
    cluster: int  # blocks that share a row
    stream: bool  # whether the row is read in several pieces, and once more for a gradient
    threads: int
    blocks: int
    rows_per_block: int
    even: bool  # whether rows are evenly spaced, and what has a number per class is aligned like the logits
    bound: tuple[int, int]  # __launch_bounds__
    shared: int = 0  # dynamic shared memory, bytes
    width: int = 1  # neighbouring rows that one access moves

    def kernel(self, job: str) -> Kernel:
        ctype = DTYPES[self.dtype][0]
        if self.family == "T":
            return _kernels.kernel("tiny.cu", "XE_TINY", "T", ctype, job, self.variant)
        if self.family == "P":
            held = self.width, self.vectors, self.lanes, self.stream
            return _kernels.kernel("columns.cu", "XE_COLUMNS", "P", ctype, job, self.variant, *held, *self.bound)
        how = self.vectors, self.lanes, self.cluster, self.stream, self.even
        return _kernels.kernel("rows.cu", "XE_ROWS", self.family, ctype, job, self.variant, *how, *self.bound)

    def words(self) -> str:
        """Who works on a row, and what is launched."""
        held = f"{self.vectors} vectors of 16 bytes in each thread"
        alone = self.cluster == 1
        who = {
            "W": f"{self.lanes} lanes hold a row, {held}",
            "B": f"{'a block holds' if alone else f'{self.cluster} blocks hold'} a row, {held}",
            "O": f"{'a block streams' if alone else f'{self.cluster} blocks stream'} a row, {held} at a time"
            " (a gradient reads the row again, from cache where it fits)",
            "T": "a thread works on a row, in shared memory",
            "P": f"a thread of each of {self.lanes} warps" if self.lanes > 1 else "a thread",
        }[self.family]
        if self.family == "P":
            who += f" {'streams' if self.stream else 'holds'} {self.width} neighbouring rows, {self.vectors} classes"
            who += " at a time (a gradient reads them again)" if self.stream else " at most"
        shared = f", {self.shared:,} bytes of shared memory" if self.shared else ""
        return f"  {self.family}: {who}\n  {self.blocks:,} blocks of {self.threads} threads{shared}"

    def bytes(self, job: str) -> int:
        """What must move between the device's memory and the chip: the logits, the gradient, the numbers per row."""
        itemsize = DTYPES[self.dtype][1]
        accumulator = max(4, itemsize)
        numbers = {"STATS": 4, "GRAD": 3, "STATS_AND_GRAD": 5}.get(job, 1)
        arrays = 1 if job in ("STATS", "LOSS") else 2
        return self.rows * (arrays * self.classes * itemsize + 8 + numbers * accumulator + ("STATS" in job))


CHIPS = {  # GB/s by data sheet, of the card that most have
    75: ("T4", 320), 80: ("A100 80GB", 2039), 86: ("A10", 600), 89: ("L40S", 864),
    90: ("H200", 4800), 100: ("B200", 8000), 120: ("RTX 5090", 1792),
}  # fmt: skip


def explain(shape: str) -> str:
    """The plan for ROWSxC:DTYPE[@smNN], in words: what is launched, what it moves, and how long that takes at least."""
    found = re.fullmatch(r"(\d+)x(\d+):(\w+?)(?:@sm_?(\d+))?", shape)
    dtype = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32", "fp64": "float64"}
    name = found and dtype.get(found[3], found[3])
    if not found or name not in DTYPES or int(found[2]) == 0:
        raise ValueError(f"{shape!r} is not like 4096x50257:bf16@sm90, with a dtype of {', '.join((*dtype, *DTYPES))}")
    rows, classes, chip = int(found[1]), int(found[2]), int(found[4] or 90)
    if chip < OLDEST:
        raise ValueError(f"the oldest chip is sm{OLDEST}; got sm{chip}")
    card, bandwidth = CHIPS[max(known for known in CHIPS if known <= chip)]
    chosen = plan(rows, classes, name, chip)
    lines = [
        f"{rows} rows of {classes} {name} logits, {classes * DTYPES[name][1]:,} bytes each, on sm_{chip}",
        chosen.words(),
    ]
    for job in ("LOSS_AND_GRAD", "STATS_AND_GRAD", "LOSS"):
        moved = chosen.bytes(job)
        lines += [
            f"  {job.lower().replace('_', ' '):14} {moved:,} bytes",
            f"                 at least {moved / bandwidth / 1e3:.3g} microseconds at the {bandwidth} GB/s of a {card}",
            f"                 {chosen.kernel(job).name}",
        ]
    return "\n".join(lines)


@lru_cache(maxsize=1024)
def plan(
    rows: int, classes: int, dtype: str, chip: int = 90, *,
    layout: str = "flat", variant: str = "PLAIN", writes: bool = True, even: bool = True, width: int = 4,
) -> Plan:  # fmt: skip
    """The plan for N = `rows` rows of C = `classes` logits.

    A row's sums are made in an order that follows from C, dtype, chip, the kind of options, whether the classes lie
    side by side, whether a gradient is written, and where in 16 bytes the row starts; N only says how many blocks
    there are.

    layout: "flat" where rows and classes lie side by side, "rows" where classes do, "columns" where they do not.
    writes: whether the job writes as many numbers as it reads: a gradient, a softmax.
    even: whether rows are evenly spaced, and what is written or read beside the logits is aligned as they are.
    width: how many neighbouring rows one access may move, where classes lie apart; it changes no sum.
    """
    itemsize = DTYPES[dtype][1]

    def spread(
        family: str, vectors: int, lanes: int, threads: int, bound: tuple[int, int],
        cluster: int = 1, stream: bool = False, shared: int = 0, width: int = 1,
    ) -> Plan:  # fmt: skip
        per_block = threads // lanes * width if lanes else 1
        return Plan(
            family, rows, classes, dtype, chip, variant, vectors, lanes, cluster, stream, threads,
            -(-rows // per_block) * cluster, per_block, even, bound, shared, width,
        )  # fmt: skip

    size = classes * itemsize
    if layout == "flat" and size <= TINY:
        cache = _tile(TINY_THREADS * classes, itemsize)
        return spread("T", 0, 1, TINY_THREADS, (TINY_THREADS, 2 if itemsize == 8 else 4), shared=cache)
    if layout == "columns" or size <= TINY:
        side_by_side = width if layout == "columns" else 1
        warps, held, width, bound, stream = _columns(classes, itemsize, chip, variant, side_by_side)
        return spread("P", held, warps, bound[0], bound, stream=stream, width=width)
    most, bound = _block(itemsize, chip, variant)
    for limit, vectors, lanes in WARP_ROWS:
        while vectors > most and lanes < 32:
            vectors, lanes = vectors // 2, lanes * 2
        if size <= limit and vectors <= most:
            return spread("W", vectors, lanes, WARP_THREADS, (WARP_THREADS, bound[0] * bound[1] // WARP_THREADS))
    longest = bound[0] if chip < 90 else min(HELD, bound[0])
    for cluster in (1, *_clusters(size, chip)) if writes or size <= 16 * most * longest else ():
        threads = _whole_warps(-(-size // (16 * most * cluster)))
        if threads <= (longest if cluster == 1 else bound[0]):
            return spread("B", most, 0, threads, bound, cluster)
    cluster = 1 if chip < 90 or not writes else 8
    return spread("O", most, 0, min(512, bound[0]), bound, cluster, stream=True)


def _clusters(size: int, chip: int) -> tuple[int, ...]:
    """How many blocks may hold a row of so many bytes: of what is usual and half of it, the one with fewer idle threads."""
    if chip < 90:
        return ()
    usual = next(cluster for limit, cluster in CLUSTERS if size <= limit)

    def idle(cluster: int) -> int:
        return _whole_warps(-(-size // (128 * cluster))) * cluster

    return tuple(sorted((usual, usual // 2), key=lambda cluster: (idle(cluster), cluster != usual))) + (8,)


def _columns(
    classes: int, itemsize: int, chip: int, variant: str, width: int
) -> tuple[int, int, int, tuple[int, int], bool]:
    """(warps, classes per thread, rows per access, launch bounds, streamed or not) where classes lie apart."""
    by_class = variant in BY_CLASS
    # What registers hold without spilling.
    most = 12 if by_class or (itemsize == 2 and chip < 80) else 24
    widest = min(2 if by_class else 4, (8 if by_class else 16) // itemsize)
    streamed = STREAMED[by_class or itemsize == 8 :]
    for warps, held, access, bound in COLUMNS:
        wide = min(widest, access // itemsize)
        if held > most or classes > warps * held:
            continue
        if wide <= width:
            return warps, held, wide, bound, False
        if held == most:  # one kernel for all that must be read row by row
            return warps, held, 1, bound, False
    warps, held, access, bound = next(line[1:] for line in streamed if classes <= line[0])
    wide = max(1, access // itemsize)
    return warps, held if variant == "PLAIN" else held // 2, wide if wide <= width else 1, bound, True


def _block(itemsize: int, chip: int, variant: str) -> tuple[int, tuple[int, int]]:
    """(vectors per thread, launch bounds) of a row held by a block: the most that registers hold without spilling."""
    if itemsize == 8:
        return (4, (256, 2))
    if variant == "CAPPED_GENERAL":
        return (2, (768, 1))
    if variant == "GENERAL":
        return (4, (768, 1))
    if variant == "CAPPED":
        return (4, (768, 1))
    return (8 if itemsize == 4 or 80 <= chip <= 90 else 4, (1024, 1))


def _tile(count: int, itemsize: int) -> int:
    """The bytes of `count` logits as tiny.cu places them: a free word (a free double) after every 128 bytes."""
    return count * itemsize + count * itemsize // 128 * max(4, itemsize)


def _whole_warps(threads: int) -> int:
    return -(-threads // 32) * 32


# Bytes of a row that between them meet every plan.
SIZES = (
    8,
    24,
    40,
    64,
    *(limit for limit, _, _ in WARP_ROWS),
    *(m << k for k in range(12, 21) for m in (2, 3)),
    100_514,
)
LAYOUTS = ("flat", "rows", "columns")


def catalogue(chip: int, variant: str, jobs: tuple[str, ...] = JOBS) -> Iterator[Kernel]:
    """Every kernel that a plan can ask for on a chip, and the sums: what there is to compile."""
    seen: set[Kernel] = set()
    for dtype, (_, itemsize) in DTYPES.items():
        for job in jobs if variant == "PLAIN" else set(jobs) - {"LOG_SOFTMAX"}:
            for size in SIZES:
                for layout, even, width in itertools.product(LAYOUTS, (True, False), (1, 4)):
                    found = plan(
                        1, size // itemsize, dtype, chip,
                        layout=layout, variant=variant, writes=writes_grad(job), even=even, width=width,
                    )  # fmt: skip
                    seen.add(found.kernel(job))
        if variant == "PLAIN":
            seen.add(sums_kernel(dtype))
    yield from sorted(seen, key=lambda kernel: kernel.name)


def writes_grad(job: str) -> bool:
    """Or what takes its place."""
    return job not in ("STATS", "LOSS")


@lru_cache(maxsize=1024)
def _chosen(
    job: str, rows: int, classes: int, dtype: str, chip: int, layout: str, variant: str, even: bool, width: int
) -> tuple[Plan, Kernel]:
    chosen = plan(
        rows, classes, dtype, chip,
        layout=layout, variant=variant, writes=writes_grad(job), even=even, width=width,
    )  # fmt: skip
    return chosen, chosen.kernel(job)


@cache
def sums_kernel(dtype: str) -> Kernel:
    return _kernels.kernel("sums.cu", "XE_SUMS", "D", "double" if dtype == "float64" else "float")


# The engine


class Launcher(Protocol):
    """What the engine needs of an array library and its device."""

    def declines(self, rows: Rows) -> str | None: ...
    def chip(self, array: Array) -> int: ...  # compute capability, times ten
    def on(self, array: Array) -> AbstractContextManager[Any]: ...  # makes the device of the array current
    def empty(self, xp: Any, shape: tuple[int, ...], dtype: Any) -> Array: ...
    def launch(
        self, kernel: Kernel, blocks: int, threads: int, arguments: tuple[Any, ...], shared: int = 0, cluster: int = 1
    ) -> None: ...


class Cupy:
    """CuPy, its current stream, and the device of the arrays."""

    def declines(self, rows: Rows) -> str | None:
        if not type(rows.logits).__module__.startswith("cupy"):
            return f"takes CuPy arrays, and these are of {rows.xp.__name__}"
        return None

    def chip(self, array: Array) -> int:
        return _chip(array.device.id)

    def on(self, array: Array) -> AbstractContextManager[Any]:
        device: AbstractContextManager[Any] = array.device
        return device

    def empty(self, xp: Any, shape: tuple[int, ...], dtype: Any) -> Array:
        return xp.empty(shape, dtype=dtype)

    def launch(
        self, kernel: Kernel, blocks: int, threads: int, arguments: tuple[Any, ...], shared: int = 0, cluster: int = 1
    ) -> None:  # the cluster is compiled into the kernel
        import cupy

        function = _kernels.compiled(kernel, cupy.cuda.runtime.getDevice())
        if shared > 48 << 10 and function.max_dynamic_shared_size_bytes < shared:
            function.max_dynamic_shared_size_bytes = shared
        function((blocks,), (threads,), arguments, shared_mem=shared)


@cache
def _chip(device: int) -> int:
    import cupy

    return int(cupy.cuda.Device(device).compute_capability)


class _Mean(NamedTuple):
    """The divisor of the sum, as a number or on the device, and what multiplies the gradient, likewise."""

    divisor: float = 1.0
    divisor_at: Array | None = None
    scale: float = 1.0
    scale_at: Array | None = None
    scale_step: int = 0
    partials: Array | None = None  # of a sum before, for the next


class Cuda:
    """The engine, over one launcher."""

    name = "cuda"

    def __init__(self, launcher: Launcher) -> None:
        self.launcher = launcher

    def declines(self, rows: Rows) -> str | None:
        reason = self.launcher.declines(rows)
        if reason is not None:
            return reason
        if self.launcher.chip(rows.logits) < OLDEST:
            return f"takes GPUs of compute capability {OLDEST / 10} and above"
        if rows.classes >= 1 << 31:
            return f"takes fewer than 2^31 classes, and these are {rows.classes}"
        return None

    def reads_labels_free(self, rows: Rows) -> bool:
        return False

    def stats(self, rows: Rows) -> RowStats:
        with self.launcher.on(rows.logits):
            filled = self._stats(rows)
            self._rows("STATS", rows, _Mean(), stats=filled)
            return filled

    def row_stats(self, rows: Rows) -> RowStats:
        with self.launcher.on(rows.logits):
            filled = self._stats(rows, with_correct=True)
            self._rows("STATS", rows, _Mean(), stats=filled)
            return filled

    def stats_and_loss(self, rows: Rows) -> tuple[RowStats, Array]:
        with self.launcher.on(rows.logits):
            losses, filled = self._empty(rows, rows.shape), self._stats(rows)
            self._rows("STATS", rows, _Mean(), losses=losses, stats=filled)
            return filled, self._reduced(rows, losses, None)

    def grad(self, rows: Rows, stats: RowStats, out: Array | None = None) -> Array:
        with self.launcher.on(rows.logits):
            given = RowStats(*(_dense(rows.xp, part) for part in stats[:4]))
            return self._rows("GRAD", rows, self._mean(rows), stats=given, out=out)

    def loss(self, rows: Rows) -> Array:
        with self.launcher.on(rows.logits):
            losses = self._empty(rows, rows.shape)
            self._rows("LOSS", rows, _Mean(), losses=losses)
            return self._reduced(rows, losses, None)

    def loss_and_grad(self, rows: Rows, out: Array | None = None) -> tuple[Array, Array]:
        with self.launcher.on(rows.logits):
            losses, mean = self._empty(rows, rows.shape), self._mean(rows)
            grad = self._rows("LOSS_AND_GRAD", rows, mean, losses=losses, out=out)
            return self._reduced(rows, losses, mean), grad

    def loss_grad_and_stats(self, rows: Rows, out: Array | None = None) -> tuple[Array, Array, RowStats]:
        with self.launcher.on(rows.logits):
            losses, mean = self._empty(rows, rows.shape), self._mean(rows)
            filled = self._stats(rows, with_correct=True)
            grad = self._rows("STATS_AND_GRAD", rows, mean, losses=losses, stats=filled, out=out)
            return self._reduced(rows, losses, mean), grad, filled

    def softmax(self, rows: Rows, log: bool) -> Array:
        with self.launcher.on(rows.logits):
            return self._rows("LOG_SOFTMAX" if log else "LOSS_AND_GRAD", rows, _Mean())

    def _stats(self, rows: Rows, with_correct: bool = False) -> RowStats:
        """Room for them; for `correct` where it is wanted and there are labels."""
        correct = self.launcher.empty(rows.xp, rows.shape, "bool") if with_correct and rows.has_labels else None
        return RowStats(*(self._empty(rows, rows.shape) for _ in range(4)))._replace(correct=correct)

    def _rows(
        self,
        job: str,
        rows: Rows,
        mean: _Mean,
        *,
        losses: Array | None = None,
        stats: RowStats | None = None,
        out: Array | None = None,
    ) -> Any:
        """One launch over the rows; returns the gradient, if the job makes one."""
        xp, dtype = rows.xp, rows.logits.dtype.name
        outer, classes, inner = rows.logits.shape
        logits, grad, layout = rows.logits, None, _layout(rows.logits)
        if layout is None:
            logits, layout = xp.ascontiguousarray(logits.transpose(0, 2, 1)).transpose(0, 2, 1), "flat"
        if job not in ("STATS", "LOSS"):
            grad = out
            if out is None or (_layout(out) not in ("flat", "rows") if layout != "columns" else _layout(out) is None):
                grad = self._gradient(rows, logits)
            if layout == "flat" and _layout(grad) != "flat":
                layout = "rows"
        if outer * inner:
            kind, target = _target(rows)
            chip = self.launcher.chip(logits)
            variant, even = _variant(rows), _is_even(rows, logits, grad, target)
            width = _width(logits, grad) if layout == "columns" else 1
            chosen, kernel = _chosen(job, outer * inner, classes, dtype, chip, layout, variant, even, width)
            acc = np.float64 if dtype == "float64" else np.float32
            max_, rest, gap, mass, correct = (None,) * 5 if stats is None else stats
            arguments = (
                logits, *_steps(logits),
                grad, *_steps(grad),
                target, kind, *_steps(target),
                outer * inner, classes, inner,
                *_ignored(rows),
                acc(mean.scale), mean.scale_at, mean.scale_step,
                losses, max_, rest, gap, mass,
                _dense(xp, rows.weight), _dense(xp, rows.sample_weight),
                acc(1 - rows.label_smoothing), acc(rows.label_smoothing / classes), acc(rows.z_loss),
                acc(rows.softcap or 0.0), correct,
            )  # fmt: skip
            self.launcher.launch(kernel, chosen.blocks, chosen.threads, arguments, chosen.shared, chosen.cluster)
        if out is not None and grad is not out:
            out[...] = grad
            return out
        return grad

    def _mean(self, rows: Rows) -> _Mean:
        """What divides the loss and multiplies the gradient; a launch where targets and weights must be asked."""
        upstream = 1.0 if rows.upstream is None else rows.upstream
        if rows.reduction == "mean":
            known = _known_divisor(rows)
            if known is None:
                divisor, scale = self.launcher.empty(rows.xp, (), "float64"), self._empty(rows, ())
                partials = self._sum(rows, counts=True, upstream=upstream, divisor_to=divisor, scale_to=scale)
                return _Mean(divisor_at=divisor, scale_at=scale, partials=partials)
            if isinstance(known, float) and isinstance(upstream, float):
                return _Mean(divisor=known, scale=upstream / known if known else float("nan"))
            mean, scale = _by(known), self._empty(rows, ())
            self._sum(rows, divisor=mean.divisor, divisor_at=mean.divisor_at, upstream=upstream, scale_to=scale)
            return mean._replace(scale_at=scale)
        if isinstance(upstream, float):
            return _Mean(scale=upstream)
        return _Mean(scale_at=_dense(rows.xp, upstream), scale_step=int(upstream.ndim == 2))

    def _reduced(self, rows: Rows, losses: Array, mean: _Mean | None) -> Array:
        """The losses as the caller wants them; without a `mean` from before, rows are counted in the same launch."""
        if rows.reduction == "none":
            return losses
        total, counts = self._empty(rows, ()), False
        if mean is None:
            known = _known_divisor(rows) if rows.reduction == "mean" else 1.0
            counts, mean = known is None, _Mean() if known is None else _by(known)
        self._sum(
            rows, losses=losses, counts=counts, divisor=mean.divisor, divisor_at=mean.divisor_at,
            partials=mean.partials, loss_to=total,
        )  # fmt: skip
        return total

    def _sum(
        self,
        rows: Rows,
        *,
        losses: Array | None = None,
        counts: bool = False,
        divisor: float = 1.0,
        divisor_at: Array | None = None,
        upstream: Array | float = 1.0,
        partials: Array | None = None,
        divisor_to: Array | None = None,
        scale_to: Array | None = None,
        loss_to: Array | None = None,
    ) -> Array | None:
        """One launch of sums.cu; returns the room for partial sums, where it took any."""
        xp, (outer, inner) = rows.xp, rows.shape
        count = outer * inner if counts or losses is not None else 0
        kind, target = _target(rows) if rows.has_labels else (0, None)
        blocks = SUM_BLOCKS if count > SUM_ALONE else 1
        if blocks > 1 and partials is None:
            partials = xp.zeros((2 * blocks + 1,), dtype="float64")
        given = isinstance(upstream, float)
        arguments = (
            target, kind, *_steps(target)[::2],
            count, rows.classes, max(1, inner),
            *_ignored(rows),
            _dense(xp, rows.weight), _dense(xp, rows.sample_weight), losses, int(counts),
            divisor, divisor_at, upstream if given else 1.0, None if given else upstream,
            partials, divisor_to, scale_to, loss_to,
        )  # fmt: skip
        self.launcher.launch(sums_kernel(rows.logits.dtype.name), blocks, SUM_THREADS, arguments)
        return partials

    def _gradient(self, rows: Rows, logits: Array) -> Array:
        """Room for the gradient, laid out like the logits so that what is read wide can be written wide."""
        outer, classes, inner = logits.shape
        if inner > 1 and logits.strides[1] == logits.dtype.itemsize:
            made = self.launcher.empty(rows.xp, (outer, inner, classes), rows.grad_dtype)
            return made.transpose(0, 2, 1)
        return self.launcher.empty(rows.xp, (outer, classes, inner), rows.grad_dtype)

    def _empty(self, rows: Rows, shape: tuple[int, ...]) -> Array:
        return self.launcher.empty(rows.xp, shape, rows.acc)


def _known_divisor(rows: Rows) -> Array | float | None:
    """The mean's divisor where no label and no weight needs to be looked at: a number, or float64 on the device."""
    if rows.denominator is not None:
        given = rows.denominator
        return given if isinstance(given, float) or given.dtype.name == "float64" else given.astype("float64")
    if rows.sample_weight is not None or (rows.has_labels and (rows.weight is not None or not rows.all_labels_count)):
        return None
    return float(rows.shape[0] * rows.shape[1])


def _by(divisor: Array | float) -> _Mean:
    return _Mean(divisor=divisor) if isinstance(divisor, float) else _Mean(divisor_at=divisor)


def _ignored(rows: Rows) -> tuple[int, int]:
    """(whether any label is ignored, which, as the kernels read it: in 64 bits with a sign)."""
    if rows.ignore_index is None:
        return 0, 0
    index = int(rows.ignore_index)
    return 1, index if index < 1 << 63 else index - (1 << 64)


def _variant(rows: Rows) -> str:
    labels = rows.target is None or rows.has_labels
    if labels and not rows.label_smoothing:
        return "PLAIN" if rows.softcap is None else "CAPPED"
    if rows.softcap is not None:
        return "CAPPED_GENERAL"
    return "SMOOTH" if labels and rows.weight is None else "GENERAL"


def _is_even(rows: Rows, logits: Array, grad: Array | None, target: Any) -> bool:
    """Whether rows are evenly spaced, and what is written or read beside the logits is aligned as they are."""
    if logits.shape[2] != 1:
        return False
    place, step = _address(logits), logits.strides[0]
    itemsize = logits.dtype.itemsize
    if grad is not None and ((_address(grad) - place) % 16 or (grad.strides[0] - step) % 16):
        return False
    if rows.target is not None and not rows.has_labels:
        if target.strides[1] != target.dtype.itemsize:
            return False
        wide = target.dtype.itemsize // itemsize  # of float32 beside 16-bit logits, twice as many bytes
        if (_address(target) - place * wide) % 16 or (target.strides[0] - step * wide) % 16:
            return False
    if rows.weight is not None and _variant(rows) in BY_CLASS:  # the same for every row
        return place % 16 == 0 and step % 16 == 0
    return True


def _target(rows: Rows) -> tuple[int, Any]:
    """(enum Target of problem.cuh, the target as kernels read it): labels and most distributions as they are."""
    if rows.target is None:
        return 0, None
    name = rows.target.dtype.name
    if rows.has_labels:
        return LABELS[name], rows.target
    if name == rows.logits.dtype.name:
        return OF_LOGITS, rows.target
    target = rows.target if name == "float32" else rows.xp.astype(rows.target, rows.acc)
    return OF_FLOAT32 if target.dtype.name == "float32" else OF_LOGITS, target


def _steps(array: Any) -> tuple[int, int, int]:
    """Elements from outer to outer, class to class, inner to inner; 0 of no array, and between labels' classes."""
    if array is None:
        return 0, 0, 0
    itemsize = array.dtype.itemsize
    steps = [step // itemsize for step in array.strides]
    return steps[0], steps[1] if len(steps) == 3 else 0, steps[-1]


def _layout(array: Array) -> str | None:
    """How the kernels reach (outer, C, inner), see `plan`; None where a copy with dense rows is better."""
    outer, classes, inner = array.shape
    itemsize = int(array.dtype.itemsize)
    if any(step % itemsize for step in array.strides):
        return None
    by_outer, by_class, by_inner = _steps(array)
    if by_class == 1 or classes == 1:
        side_by_side = (inner == 1 or by_inner == classes) and (outer == 1 or by_outer == inner * classes)
        return "flat" if side_by_side else "rows"
    together = by_inner == 1 and inner >= NEIGHBOURS
    return "columns" if together or classes * itemsize <= TINY else None


def _width(*arrays: Array | None) -> int:
    """How many neighbouring rows one access may move, of all arrays: 1, 2 or 4."""
    bits = 4
    for array in arrays:
        if array is None:
            continue
        by_outer, by_class, by_inner = _steps(array)
        if by_inner != 1:
            return 1
        bits |= array.shape[2] | by_outer | by_class | _address(array) // array.dtype.itemsize
    return bits & -bits


def _dense(xp: Any, array: Any) -> Any:
    """Numbers per row or class, side by side."""
    return array if array is None or array.flags.c_contiguous else xp.ascontiguousarray(array)


def _address(array: Array) -> int:
    """Of the first element."""
    return int(array.ctypes.data if isinstance(array, np.ndarray) else array.data.ptr)


engine = Cuda(Cupy())
