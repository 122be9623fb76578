"""CuPy arrays: a plan, and launches of the kernels in kernels/.

`plan` turns the shape of a problem into launch numbers. It is pure Python, and the only source both of the parameters a
kernel is compiled with and of its grid. `Cuda` turns `Rows` into kernel arguments and at most three launches: the
divisor of a mean (which stays on the device; two launches when there are very many rows), the rows, and the sum of
their losses. Nothing here waits for the device. The only other work on the device is to copy arrays whose layout or
dtype the kernels cannot read.

Everything that touches CuPy goes through a `Launcher`, so that the tests can put an emulator in its place, and so that
a `Tape` can record what a call launches, for the next call of the same kind (`_again.py`).
"""

from __future__ import annotations

import itertools
import struct
import sys
from array import array as words_of
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cache, lru_cache, partial
from typing import Any, NamedTuple, Protocol, get_type_hints

import numpy as np

from .. import _kernels
from .._kernels import Kernel
from .._rows import Array, Rows, RowStats, no_classes

DTYPES = {"float16": ("f16", 2), "bfloat16": ("bf16", 2), "float32": ("float", 4), "float64": ("double", 8)}
LABELS = {"int8": 1, "uint8": 2, "int16": 3, "uint16": 4, "int32": 5, "uint32": 6, "int64": 7, "uint64": 8}
OF_LOGITS, OF_FLOAT32 = 9, 10  # with LABELS: enum Target in problem.cuh
JOBS = ("LOSS_AND_GRAD", "LOSS", "STATS", "GRAD", "STATS_AND_GRAD", "LOG_SOFTMAX")  # enum Job
# The kernel families (kernels/README.md says which takes what, and why). A row belongs to one thread; to a few lanes of
# a warp; to a block or cluster, which holds it in registers or streams it; or is split over independent blocks. COLUMNS
# is for classes that lie apart: each thread has several neighbouring rows.
FAMILIES = ("TINY", "WARP", "BLOCK", "STREAM", "SPLIT", "COLUMNS")
HOLDING = ("WARP", "BLOCK")  # hold a row in registers, as vectors of 16 bytes
MANY_ROWS = ("TINY", "COLUMNS")  # at least 32 rows per warp
# enum Variant; with SLICE appended, the same for logits of a slice of the classes
VARIANTS = ("PLAIN", "SMOOTH", "SOFT", "GENERAL", "CAPPED", "CAPPED_GENERAL")
SLICE = "_SLICE"
OF_SLICES = ("STATS", "GRAD")  # the jobs on slices: everything else about a row needs all of its classes
OLDEST = 75  # compute capability 7.5
MOST_CLASSES = 1 << 31  # 32-bit indices do not reach further

TINY_BYTES = 128  # longest row for TINY
TINY_EACH = ((12, 2), (TINY_BYTES, 1))  # bytes of a row without options, rows per thread
TINY_CAPPED = 48  # most classes with softcap, which keeps most registers per class: more would spill
CAPPED_BY_CLASS = ("CAPPED", "CAPPED_GENERAL")  # one variant to tiny.cu
TINY_THREADS, WARP_THREADS = 128, 128
NEIGHBOURS = 8  # adjacent rows that make COLUMNS worth while: 8 float32 are a sector of 32 bytes
# COLUMNS: warps that share a row, classes per thread, bytes of an access, launch bounds (as many blocks as the
# registers allow). The more classes, the more warps.
COLUMNS = (
    (1, 2, 16, (128, 9)), (1, 4, 16, (128, 5)), (1, 12, 8, (128, 5)), (1, 20, 8, (128, 5)), (1, 24, 8, (128, 5)),
    (8, 4, 16, (256, 3)), (8, 12, 8, (256, 2)), (8, 20, 8, (256, 3)), (8, 24, 8, (256, 2)),
)  # fmt: skip
# COLUMNS with more classes than that streams them: most classes, then as above. With up to 1024 classes two blocks on
# each SM, with 2048 one, find in L2 what a gradient reads again; beyond that, memory is read twice.
STREAMED = ((1024, 16, 16, 4, (512, 2)), (1 << 31, 16, 16, 4, (512, 1)))
# WARP: bytes of the row, vectors per thread, lanes. The fewer threads hold a row, the less work there is that is not
# per logit.
WARP_ROWS = ((64, 1, 4), (128, 2, 4), (256, 4, 4), (512, 8, 4), (1024, 8, 8), (2048, 8, 16), (4096, 8, 32))
ALONE = 128  # threads of the longest row that BLOCK takes for a loss, and of every block of STREAM for a loss
# STREAM for a loss: bytes of the row, blocks of its cluster.
STREAMING = ((128 << 10, 1), (256 << 10, 4), (1 << 62, 8))
AHEAD = 6 << 20  # prefetch distance in bytes of logits, where a gradient is written
# SPLIT: longer rows than this many bytes, with clusters; without, for a loss and for a gradient. Bytes of a part (a
# multiple of it, if there would be more than MOST_PARTS); threads of the block that merges a row's parts.
WHOLE, WHOLE_LOSS, WHOLE_GRAD = 1 << 20, 128 << 10, 256 << 10
PART, MOST_PARTS, MERGE_THREADS = 64 << 10, 1024, 128
SUM_THREADS, SUM_BLOCKS = 1024, 128
PARTIALS = (2 * SUM_BLOCKS + 1,)  # float64: a ticket, then two for each block
# Most rows that one block sums; that one cluster sums, if there are clusters; and, if there are none, that one block
# counts in less time than a second launch takes to start.
SUM_ALONE, SUM_TOGETHER, COUNT_ALONE = 1 << 13, 1 << 16, 1 << 15
SUM_CLUSTER = 8


# The plan


@dataclass(frozen=True, slots=True)
class Plan:
    """How the rows of one problem map to blocks and threads."""

    family: str  # see FAMILIES
    rows: int
    classes: int
    dtype: str
    chip: int
    variant: str
    vectors: int  # of 16 bytes per thread; COLUMNS: classes per thread, of each of its rows
    lanes: int  # threads of a warp that share a row; 0: the whole block or cluster; COLUMNS: warps that share a row
    cluster: int  # blocks that share a row in one cluster; 0 (SPLIT): independent blocks share it
    stream: bool  # whether the row is read in several pieces, and a second time for a gradient
    threads: int
    blocks: int
    rows_per_block: int
    even: bool  # whether rows are evenly spaced, and arrays with a number per class are aligned like the logits
    bound: tuple[int, int]  # __launch_bounds__
    width: int = 1  # COLUMNS: adjacent rows per access; TINY: rows per thread
    parts: int = 1  # of a row, each read by a block of its own
    part: int = 0  # classes per part

    def over_rows(self, job: str) -> list[tuple[str, Plan]]:
        """(job, plan) of each launch over the rows: one, or for SPLIT the stats of the parts, then the gradient."""
        if self.parts == 1:
            return [(job, self)]
        steps = [] if job == "GRAD" else ["STATS"]
        if writes_grad(job):
            steps.append("LOG_SOFTMAX" if job == "LOG_SOFTMAX" else "GRAD")
        how: dict[str, Any] = {"layout": "rows", "variant": self.variant, "access": 4 if self.even else 1}
        return [(step, plan(self.rows, self.classes, self.dtype, self.chip, job=step, **how)) for step in steps]

    def kernels(self, job: str) -> list[Kernel]:
        """Of all launches of a job except the sums."""
        steps = self.over_rows(job)
        merged = [merge_kernel(self.dtype, self.variant)] if self.parts > 1 and steps[0][0] == "STATS" else []
        return [chosen.kernel(step) for step, chosen in steps] + merged

    def kernel(self, job: str) -> Kernel:
        """Of one launch over the rows."""
        what = DTYPES[self.dtype][0], job, self.variant
        if self.family == "TINY":
            return _kernels.kernel("tiny.cu", "XE_TINY", "TINY", *what, self.classes, self.width, *self.bound)
        if self.family == "COLUMNS":
            held = self.width, self.vectors, self.lanes, self.stream
            return _kernels.kernel("columns.cu", "XE_COLUMNS", "COLUMNS", *what, *held, *self.bound)
        how = self.vectors, self.lanes, self.cluster, self.stream, self.even
        return _kernels.kernel("rows.cu", "XE_ROWS", self.family, *what, *how, *self.bound)

    def prefetching(self, job: str, multiprocessors: int) -> tuple[int, int]:
        """(blocks resident on the device, prefetch distance in rows; 0: no prefetch).

        WARP and BLOCK kernels prefetch for later blocks: the labels and, where a gradient is written, the logits, at a
        distance small enough that L2 still has them when they are read.
        """
        if self.family not in HOLDING:
            return 0, 0
        first = multiprocessors * (self.bound[0] * self.bound[1] // self.threads)
        ahead = first // self.cluster * self.rows_per_block
        if writes_grad(job):
            if self.chip < 90:
                return first, 0
            ahead = min(ahead, AHEAD // (self.classes * DTYPES[self.dtype][1]))
        return first, max(ahead, 1)

    def words(self) -> str:
        """Which threads work on a row, and the size of the grid, for `--explain`."""
        held = f"{self.vectors} vectors of 16 bytes in each thread"
        alone = self.cluster == 1
        who = {
            "WARP": f"{self.lanes} lanes of a warp hold a row, {held}",
            "BLOCK": f"{'a block holds' if alone else f'{self.cluster} blocks hold'} a row, {held}",
            "STREAM": f"{'a block streams' if alone else f'{self.cluster} blocks stream'} a row, {held} at a time"
            " (a gradient reads the row again, from L2 if it fits)",
            "SPLIT": f"{self.parts} blocks read a row in parts of {self.part:,} classes, {held} at a time, and one more"
            " merges their stats (a gradient reads the row again, from L2 if it fits)",
            "TINY": f"a thread holds {'a row' if self.width == 1 else f'{self.width} rows'}, in registers",
            "COLUMNS": f"a thread of each of {self.lanes} warps" if self.lanes > 1 else "a thread",
        }[self.family]
        if self.family == "COLUMNS":
            who += f" {'streams' if self.stream else 'holds'} {self.width} neighbouring rows, {self.vectors} classes"
            who += " at a time (a gradient reads them again)" if self.stream else " at most"
        return f"  {self.family}: {who}\n  {self.blocks:,} blocks of {self.threads} threads"

    def bytes(self, job: str) -> int:
        """Bytes that must move between DRAM and the chip: the logits, the gradient, the numbers per row."""
        itemsize = DTYPES[self.dtype][1]
        accumulator = max(4, itemsize)
        steps = self.over_rows(job)
        if steps != [(job, self)]:  # also the stats of the parts, written once and read once
            of_parts = 8 * accumulator * self.rows * self.parts if steps[0][0] == "STATS" else 0
            return of_parts + sum(chosen.bytes(step) for step, chosen in steps)
        numbers = {"STATS": 4, "GRAD": 3, "STATS_AND_GRAD": 5}.get(job, 1)
        arrays = 1 if job in ("STATS", "LOSS") else 2
        return self.rows * (arrays * self.classes * itemsize + 8 + numbers * accumulator + ("STATS" in job))


@lru_cache(maxsize=1024)
def plan(
    rows: int, classes: int, dtype: str, chip: int = 90, *,
    layout: str = "flat", variant: str = "PLAIN", job: str = "LOSS_AND_GRAD", access: int = 4,
) -> Plan:  # fmt: skip
    """The plan for N = `rows` rows of C = `classes` logits.

    The order in which a row is summed depends on C, dtype, chip, kind of options, layout, job, and the row's alignment
    to 16 bytes. It does not depend on N, which only sets the number of blocks.

    layout: "flat" if rows and classes are contiguous, "rows" if only the classes are, "columns" if they are not.
    job: of JOBS; those that write no gradient have plans of their own.
    access: how many adjacent numbers one access may move. In the layout "columns" they belong to as many rows, which
    changes no sum. In the others it is 1 unless rows are evenly spaced, and all arrays are aligned like the logits.
    """
    itemsize, even = DTYPES[dtype][1], layout == "columns" or access > 1
    variant, of_slice = variant.removesuffix(SLICE), SLICE if variant.endswith(SLICE) else ""

    def spread(
        family: str, vectors: int, lanes: int, threads: int, bound: tuple[int, int],
        cluster: int = 1, stream: bool = False, width: int = 1,
    ) -> Plan:  # fmt: skip
        per_block = threads // lanes * width if lanes else 1
        return Plan(
            family, rows, classes, dtype, chip, variant + of_slice, vectors, lanes, cluster, stream, threads,
            -(-rows // per_block) * cluster, per_block, even, bound, width,
        )  # fmt: skip

    size = classes * itemsize
    if layout == "flat" and size <= TINY_BYTES and not (variant in CAPPED_BY_CLASS and classes > TINY_CAPPED):
        variant = {"SMOOTH": "GENERAL", "SOFT": "GENERAL", "CAPPED": "CAPPED_GENERAL"}.get(variant, variant)
        each = next(each for limit, each in TINY_EACH if size <= limit) if variant == "PLAIN" else 1
        several = _tiny_blocks(classes, each, itemsize, chip, variant)
        several -= several > 2 and itemsize == 8 and bool(of_slice)
        bound = TINY_THREADS, several
        return spread("TINY", 0, 1, TINY_THREADS, bound, width=each)
    if layout == "columns":
        variant = "GENERAL" if variant == "SOFT" else variant
        warps, held, width, (threads, blocks), stream = _columns(classes, itemsize, chip, variant, access)
        if stream and itemsize == 2 and width == 1:  # needs more registers, as do options, and stats with a gradient
            blocks = 1
        elif itemsize == 8:
            blocks = max(1, blocks * 2 // 3)
        elif blocks > 2 and (variant != "PLAIN" or job == "STATS_AND_GRAD"):
            blocks -= -(-blocks // 5)
        blocks = min(blocks, (1024 if chip < 80 else 1536) // threads)
        return spread("COLUMNS", held, warps, threads, (threads, blocks), stream=stream, width=width)
    if size > (WHOLE if chip >= 90 else WHOLE_GRAD if writes_grad(job) else WHOLE_LOSS):
        variant = {"SMOOTH": "GENERAL", "SOFT": "GENERAL"}.get(variant, variant)  # SPLIT compiles neither
        vectors, most, blocks = _held(itemsize, variant, job, chip, even)
        part = -(-size // (PART * MOST_PARTS)) * PART
        found = spread("SPLIT", vectors, 0, ALONE, (ALONE, most * blocks // ALONE), cluster=0, stream=True)
        parts = -(-size // part)
        return replace(found, parts=parts, part=part // itemsize, blocks=rows * parts)
    vectors, most, blocks = _held(itemsize, variant, job, chip, even)
    for limit, wanted, lanes in WARP_ROWS:
        if size <= limit and wanted * lanes <= vectors * 32:
            fewer = max(1, wanted // vectors)
            held, lanes = wanted // fewer, lanes * fewer
            several = most * blocks // WARP_THREADS
            # With few lanes, each has more than one element of head and tail, which takes registers.
            if writes_grad(job):
                several -= lanes < (6 if job == "LOSS_AND_GRAD" else 2 * (16 // itemsize - 1))
                several -= itemsize == 2 and chip < 80
            else:
                several -= lanes < (10 if variant == "SMOOTH" and of_slice else 6) and itemsize == 2
            return spread("WARP", held, lanes, WARP_THREADS, (WARP_THREADS, several))
    threads = _whole_warps(-(-size // (16 * vectors)))
    if threads <= ALONE:
        return spread("BLOCK", vectors, 0, threads, (most, blocks))
    if not writes_grad(job):  # a loss reads the row only once, streamed or not
        cluster = next(cluster for limit, cluster in STREAMING if size <= limit) if chip >= 90 else 1
        return spread("STREAM", vectors, 0, ALONE, (ALONE, most * blocks // ALONE), cluster, stream=True)
    plain = variant in ("PLAIN", "SMOOTH") and (itemsize == 4 or (itemsize == 2 and 80 <= chip < 100))
    if plain and job == "LOSS_AND_GRAD" and even and chip >= 90:
        most = 512 if variant == "PLAIN" and threads > most else 384
    tall = (16, 512) if plain else (vectors, most * blocks)  # one block per SM, whose threads have more registers
    clusters = (1, 2, 4, 8) if chip >= 90 else (1,)
    for cluster in clusters:
        threads = _whole_warps(-(-size // (16 * vectors * cluster)))
        if threads <= most:
            return spread("BLOCK", vectors, 0, threads, (most, blocks), cluster)
        if most == 512 and cluster == 1 and threads <= 1024:
            return spread("BLOCK", vectors, 0, threads, (1024, 1))
        threads = _whole_warps(-(-size // (16 * tall[0] * cluster)))
        # Two blocks on an SM hide each other's latency. A cluster of the largest size has no choice, and where there is
        # little arithmetic one block is enough.
        if threads <= tall[1] and (cluster == clusters[-1] or (plain and (itemsize == 4 or most < 512))):
            return spread("BLOCK", tall[0], 0, threads, (tall[1], 1), cluster)
    vectors, most, blocks = _held(itemsize, variant, job, chip, even)
    return spread("STREAM", vectors, 0, most, (most, blocks), cluster, stream=True)


def _columns(
    classes: int, itemsize: int, chip: int, variant: str, width: int
) -> tuple[int, int, int, tuple[int, int], bool]:
    """(warps, classes per thread, rows per access, launch bounds, whether it streams) of COLUMNS."""
    by_class = variant in ("GENERAL", "CAPPED_GENERAL")
    # What fits the registers without spilling.
    most = 12 if by_class or (itemsize == 2 and chip < 80) else 24
    widest = min(2 if by_class else 4, (8 if by_class else 16) // itemsize)
    streamed = STREAMED[by_class or itemsize == 8 :]
    for warps, held, access, bound in COLUMNS:
        wide = min(widest, access // itemsize)
        if held > most or classes > warps * held:
            continue
        if wide <= width:
            return warps, held, wide, bound, False
        # Unaligned rows are read one by one, by two kernels only: few classes are summed differently from many.
        if held == most or (warps, held) == (1, 4):
            return warps, held, 1, bound, False
    warps, held, access, bound = next(line[1:] for line in streamed if classes <= line[0])
    wide = max(1, access // itemsize)
    held = held if variant == "PLAIN" and itemsize < 8 else held // 2
    return warps, held, wide if wide <= width else 1, bound, True


def _held(itemsize: int, variant: str, job: str, chip: int, even: bool) -> tuple[int, int, int]:
    """(vectors per thread, most threads per block, blocks per SM) that do not spill."""
    if itemsize == 8:
        return 8, 256, 2
    if variant in ("GENERAL", "CAPPED_GENERAL"):
        return 4, 256, 2
    if variant == "CAPPED":
        if writes_grad(job) and itemsize == 2:
            return 8, 256, 2
        return 8, 320 if job == "STATS_AND_GRAD" else 384, 2
    if variant == "SOFT" and (not even or job == "STATS_AND_GRAD"):
        return 8, 320, 2
    # 16-bit numbers are converted in software on sm_75, and cost the compiler more registers on the newest chips.
    if not writes_grad(job):
        return 8, 384 if variant == "SOFT" or (itemsize == 2 and chip < 80) else 512, 2
    more = itemsize == 2 and not 80 <= chip < 100
    return 8, 320 if more or (variant == "SMOOTH" and itemsize == 4) else 384, 2


def _tiny_blocks(classes: int, each: int, itemsize: int, chip: int, variant: str) -> int:
    """How many blocks of TINY to ask for per SM: as many as the registers allow that a row's classes need.

    With more than 32 classes the packed and the unpacked logits are live at the same time.
    """
    words = max(4, itemsize) // 4
    arrays, spare = {"PLAIN": (1, 36), "GENERAL": (2, 52), "CAPPED_GENERAL": (3, 76)}[variant]
    spare += 16 * (words - 1) + 4 * (each - 1) + (classes // 2 if classes > 32 else 0)
    registers = -(-(spare + arrays * words * classes * each) // 8) * 8
    return max(2, min(8 if chip < 80 else 12, 65536 // (TINY_THREADS * registers)))


def _whole_warps(threads: int) -> int:
    return -(-threads // 32) * 32


# Bytes of a row that together meet every plan: each limit above is at, or just below, one of them.
SIZES = sorted(
    {int(base * step) // 16 * 16 for base in (1 << k for k in range(6, 22)) for step in (1, 1.25, 1.5, 1.75)}
)
# TINY is compiled for each number of classes; these stand for all of them.
FEW = (1, 2, 3, 10, 16, 21, 32, 64)
LAYOUTS = ("flat", "rows", "columns")


def catalogue(
    chip: int, variant: str, jobs: tuple[str, ...] = JOBS, even: tuple[bool, ...] = (True, False)
) -> Iterator[Kernel]:
    """Every kernel that a plan can ask for on a chip; with those of PLAIN the sums, of its slices the exchange.

    Of TINY, which is compiled for every number of classes, only those with a number in FEW.
    """
    seen: set[Kernel] = set()
    for dtype, (_, itemsize) in DTYPES.items():
        for job in jobs if variant == "PLAIN" else set(jobs) - {"LOG_SOFTMAX"}:
            for classes in classes_for_every_plan(itemsize):
                for layout, access in itertools.product(LAYOUTS, (1, 4)):
                    if layout != "columns" and (access > 1) not in even:
                        continue
                    if layout != "columns" and access == 1 and is_always_even(job, variant):
                        continue
                    how: dict[str, Any] = {"layout": layout, "variant": variant, "job": job, "access": access}
                    found = plan(1, classes, dtype, chip, **how)
                    if found.variant == variant and is_in_catalogue(found):
                        seen.update(found.kernels(job))
        if variant == f"PLAIN{SLICE}":
            seen |= set(exchange_kernels(dtype).values())
        elif variant == "PLAIN":
            seen |= {sums_kernel(dtype, cluster) for cluster in ((1, SUM_CLUSTER) if chip >= 90 else (1,))}
    yield from sorted(seen, key=lambda kernel: kernel.name)


def classes_for_every_plan(itemsize: int) -> list[int]:
    """Numbers of classes that together meet every plan."""
    return sorted({*(size // itemsize for size in SIZES), *FEW})


def is_in_catalogue(plan: Plan) -> bool:
    """Whether the catalogue lists the kernels of a plan."""
    return plan.family != "TINY" or plan.classes in FEW


def is_always_even(job: str, variant: str) -> bool:
    """Whether no array beside the logits could be aligned differently."""
    return not writes_grad(job) and variant.removesuffix(SLICE) in ("PLAIN", "SMOOTH", "CAPPED")


def writes_grad(job: str) -> bool:
    """Whether a job writes a gradient, or log-softmax in its place."""
    return job not in ("STATS", "LOSS")


@lru_cache(maxsize=1024)
def _chosen(
    job: str, rows: int, classes: int, dtype: str, chip: int, layout: str, variant: str, access: int
) -> tuple[Plan, Kernel]:
    how: dict[str, Any] = {"layout": layout, "variant": variant, "job": job, "access": access}
    chosen = plan(rows, classes, dtype, chip, **how)
    return chosen, chosen.kernel(job)


@cache
def merge_kernel(dtype: str, variant: str = "PLAIN") -> Kernel:
    of = SLICE if variant.endswith(SLICE) else ""
    return _kernels.kernel("merge.cu", f"XE_MERGE{of}", f"MERGE{of}", DTYPES[dtype][0])


@cache
def exchange_kernels(dtype: str) -> dict[str, Kernel]:
    """Those of slices.cu, for messages of numbers of that dtype."""
    of = "double" if dtype == "float64" else "float"
    names = ("SAY", "SLICES", "TOTAL") if of == "double" else ("SAY", "SLICES")  # divisors are float64
    return {name: _kernels.kernel("slices.cu", f"XE_{name}", name, of) for name in names}


@cache
def sums_kernel(dtype: str, cluster: int) -> Kernel:
    return _kernels.kernel("sums.cu", "XE_SUMS", "SUMS", "double" if dtype == "float64" else "float", cluster)


# The engine


class Problem(NamedTuple):
    """The argument of the kernels over rows: field for field the struct in problem.cuh."""

    logits: Array
    logits_outer: int
    logits_class: int
    logits_inner: int
    grad: Array | None
    grad_outer: int
    grad_class: int
    grad_inner: int
    target: Array | None
    kind: int
    target_outer: int
    target_class: int
    target_inner: int
    rows: int
    classes: int
    inner: int
    ignores: int
    ignore_index: int
    scale: int  # like every number in the dtype of the arithmetic: its bits
    upstream: Array | None
    upstream_step: int
    loss: Array | None
    max: Array | None
    rest: Array | None
    gap: Array | None
    mass: Array | None
    weight: Array | None
    sample_weight: Array | None
    keep: int
    each: int
    z_loss: int
    softcap: int
    correct: Array | None
    ticket: Array | None
    of_parts: Array | None = None
    parts: int = 1
    part: int = 0
    whole: int = 1
    first: int = 0
    ahead: int = 0
    start: int = 0
    vocabulary: int = 0


class Sum(NamedTuple):
    """The argument of sums.cu: field for field its struct."""

    target: Array | None
    kind: int
    target_outer: int
    target_inner: int
    rows: int
    classes: int
    inner: int
    ignores: int
    ignore_index: int
    weight: Array | None
    sample_weight: Array | None
    losses: Array | None
    counts: int
    divisor: float
    divisor_at: Array | None
    upstream: float
    upstream_at: Array | None
    partials: Array | None
    parts: int
    ticket: Array | None
    divisor_to: Array | None
    scale_to: Array | None
    loss_to: Array | None


Argument = Any  # of a kernel: a named tuple, each field of which is a word of 8 bytes
Words = Any  # array.array("Q"): an argument as a kernel gets it, 8 bytes for each field
Slots = Sequence[tuple[int, int]]  # (index of a word that is a pointer, index of the array it points to)
Run = Callable[[Words, Slots, Sequence[Array]], None]  # launches; an emulator must know which memory may be touched


@cache
def _form(argument: Any) -> struct.Struct:
    code = {int: "q", float: "d"}
    return struct.Struct("=" + "".join(code.get(kind, "Q") for kind in get_type_hints(argument).values()))


def _packed(argument: Argument) -> tuple[Words, Slots, list[Array]]:
    """The words of an argument, its pointers 0; the slots of those pointers; and the arrays they point to."""
    numbers = [value if isinstance(value, (int, float)) else 0 for value in argument]
    places = [at for at, value in enumerate(argument) if value is not None and not isinstance(value, (int, float))]
    kind: Any = type(argument)
    words = words_of("Q", _form(kind).pack(*numbers))
    return words, tuple((at, k) for k, at in enumerate(places)), [argument[at] for at in places]


def _word(dtype: Any, value: float) -> int:
    """The number in that dtype, as the low bytes of a word."""
    with np.errstate(all="ignore"):
        return int.from_bytes(np.asarray(value).astype(dtype).tobytes().ljust(8, b"\0"), sys.byteorder, signed=True)


def send(run: Run, words: Words, slots: Slots, pointers: Sequence[int], arrays: Sequence[Array]) -> None:
    """One launch, with a copy of the words: another thread may be launching the same."""
    words = words[:]
    for at, k in slots:
        words[at] = pointers[k]
    run(words, slots, arrays)


class Launcher(Protocol):
    """What the engine needs of an array library and its device."""

    def declines(self, rows: Rows) -> str | None: ...
    def chip(self, array: Array) -> int: ...  # compute capability, times ten
    def multiprocessors(self, array: Array) -> int: ...  # of the array's device
    def on(self, array: Array) -> AbstractContextManager[Any]: ...  # makes the array's device current
    def empty(self, shape: tuple[int, ...], dtype: Any) -> Array: ...
    def copy(self, array: Array, to: Array) -> None: ...
    def look(self, array: Array) -> tuple[int, Hashable]: ...  # (its pointer, all else a launch may depend on)
    def ready(self, kernel: Kernel, blocks: int, threads: int, cluster: int = 1) -> Run: ...


class Streaming(Launcher, Protocol):
    """What engines of several processes need in addition."""

    def stream(self) -> int: ...  # the handle of the stream on which launches run
    def wait(self) -> None: ...  # until all of them have ended
    def to_device(self, values: np.ndarray) -> Array: ...  # may wait, as does the reverse
    def to_host(self, array: Array) -> np.ndarray: ...


class Cupy:
    """CuPy, its current stream, and the device of the arrays."""

    def declines(self, rows: Rows) -> str | None:
        if not type(rows.logits).__module__.startswith("cupy"):
            return f"takes CuPy arrays, and these are of {rows.xp.__name__}"
        return None

    def chip(self, array: Array) -> int:
        return _chip(array.device.id)

    def multiprocessors(self, array: Array) -> int:
        return _processors(array.device.id)

    def on(self, array: Array) -> AbstractContextManager[Any]:
        device: AbstractContextManager[Any] = array.device
        return device

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Array:
        return _cupy().ndarray(shape, dtype)

    def copy(self, array: Array, to: Array) -> None:
        to[...] = array

    def look(self, array: Array) -> tuple[int, Hashable]:
        memory = array.data
        pointer = memory.ptr
        return pointer, (array.shape, array.strides, array.dtype, memory.device_id, pointer % 16)

    def stream(self) -> int:
        return int(_cupy().cuda.get_current_stream().ptr)

    def wait(self) -> None:
        _cupy().cuda.get_current_stream().synchronize()

    def to_device(self, values: np.ndarray) -> Array:
        return _cupy().asarray(values)

    def to_host(self, array: Array) -> np.ndarray:
        found: np.ndarray = array.get()
        return found

    def ready(self, kernel: Kernel, blocks: int, threads: int, cluster: int = 1) -> Run:
        function = _kernels.compiled(kernel, _cupy().cuda.runtime.getDevice())  # the cluster size is compiled in
        grid, block = (blocks,), (threads,)

        def run(words: Words, slots: Slots, arrays: Sequence[Array]) -> None:
            # CuPy passes a NumPy array of size 1 by value: CUDA copies as many bytes as the kernel's struct has.
            function(grid, block, (np.frombuffer(words, _void(8 * len(words))),))

        return run


@cache
def _cupy() -> Any:
    import cupy

    return cupy


@cache
def _void(size: int) -> np.dtype[Any]:
    return np.dtype((np.void, size))


@cache
def _chip(device: int) -> int:
    return int(_cupy().cuda.Device(device).compute_capability)


@cache
def _processors(device: int) -> int:
    return int(_cupy().cuda.Device(device).attributes["MultiProcessorCount"])


class Noted(NamedTuple):
    """One launch on a tape."""

    run: Run
    words: Words
    slots: Slots
    arrays: list[Array]


class Tape:
    """A launcher that passes everything on to another, and records allocations, launches, and whether it copied."""

    def __init__(self, launcher: Launcher) -> None:
        self._launcher = launcher
        self.declines, self.on, self.look = launcher.declines, launcher.on, launcher.look
        self.chip, self.multiprocessors = launcher.chip, launcher.multiprocessors
        self.buffers: list[Array] = []
        self.launches: list[Noted] = []
        self.copies = False

    def copy(self, array: Array, to: Array) -> None:
        self.copies = True
        self._launcher.copy(array, to)

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Array:
        self.buffers.append(self._launcher.empty(shape, dtype))
        return self.buffers[-1]

    def ready(self, kernel: Kernel, blocks: int, threads: int, cluster: int = 1) -> Run:
        run = self._launcher.ready(kernel, blocks, threads, cluster)

        def noted(words: Words, slots: Slots, arrays: Sequence[Array]) -> None:
            self.launches.append(Noted(run, words, slots, list(arrays)))
            run(words, slots, arrays)

        return noted


# For each type of array the engine has met, the function that looks at it: see _again.py.
KINDS: dict[type, Callable[[Array], tuple[int, Hashable]]] = {}


class Mean(NamedTuple):
    """The divisor of the sum, and the factor of the gradient: each a number, or on the device."""

    divisor: float = 1.0
    divisor_at: Array | None = None
    scale: float = 1.0
    scale_at: Array | None = None
    scale_step: int = 0


class Cuda:
    """The engine, on one launcher."""

    name = "cuda"
    borrows = True

    def __init__(self, launcher: Launcher) -> None:
        self.launcher = launcher

    def declines(self, rows: Rows) -> str | None:
        reason = self.launcher.declines(rows)
        if reason is not None:
            return reason
        if self.launcher.chip(rows.logits) < OLDEST:
            return f"takes GPUs of compute capability {OLDEST / 10} and above"
        if rows.classes >= MOST_CLASSES:
            return f"takes fewer than 2^31 classes, and these are {rows.classes}"
        KINDS.setdefault(type(rows.logits), self.launcher.look)
        return None

    def reads_labels_free(self, rows: Rows) -> bool:
        return False

    def noting(self) -> tuple[Cuda, Tape]:
        """The same engine for one call, and the tape that records it."""
        tape = Tape(self.launcher)
        return Cuda(tape), tape

    def stats(self, rows: Rows, filled: RowStats | None = None) -> RowStats:
        """`filled`: the arrays to write to."""
        with self.launcher.on(rows.logits):
            if rows.classes == 0:
                return no_classes(rows, is_marked=False)
            filled = self._stats(rows) if filled is None else filled
            self._rows("STATS", rows, Mean(), stats=filled)
            return filled

    def row_stats(self, rows: Rows) -> RowStats:
        with self.launcher.on(rows.logits):
            if rows.classes == 0:
                return no_classes(rows, is_marked=True)
            return self.stats(rows, self._stats(rows, with_correct=True))

    def stats_and_loss(self, rows: Rows) -> tuple[RowStats, Array]:
        with self.launcher.on(rows.logits):
            losses, filled, partials = self._empty(rows, rows.shape), self._stats(rows), self.partials(rows)
            self._rows("STATS", rows, Mean(), losses=losses, stats=filled, partials=partials)
            return filled, self.reduced(rows, losses, None, partials)

    def grad(self, rows: Rows, stats: RowStats, out: Array | None = None, mean: Mean | None = None) -> Array:
        """`mean`: what `mean` returns, if that is known already."""
        with self.launcher.on(rows.logits):
            given = RowStats(*(_dense(rows.xp, part) for part in stats[:4]))
            if mean is None:
                mean = self.mean(rows) if rows.classes else Mean()
            return self._rows("GRAD", rows, mean, stats=given, out=out)

    def loss(self, rows: Rows) -> Array:
        with self.launcher.on(rows.logits):
            losses, partials = self._empty(rows, rows.shape), self.partials(rows)
            self._rows("LOSS", rows, Mean(), losses=losses, partials=partials)
            return self.reduced(rows, losses, None, partials)

    def grad_alone(self, rows: Rows, out: Array | None = None) -> Array:
        with self.launcher.on(rows.logits):
            return self._rows("LOSS_AND_GRAD", rows, self.mean(rows), out=out)

    def loss_and_grad(self, rows: Rows, out: Array | None = None) -> tuple[Array, Array]:
        with self.launcher.on(rows.logits):
            losses, mean, partials = self._empty(rows, rows.shape), self.mean(rows), self.partials(rows)
            grad = self._rows("LOSS_AND_GRAD", rows, mean, losses=losses, out=out, partials=partials)
            return self.reduced(rows, losses, mean, partials), grad

    def loss_grad_and_stats(self, rows: Rows, out: Array | None = None) -> tuple[Array, Array, RowStats]:
        with self.launcher.on(rows.logits):
            losses, mean, partials = self._empty(rows, rows.shape), self.mean(rows), self.partials(rows)
            filled = self._stats(rows, with_correct=True)
            grad = self._rows("STATS_AND_GRAD", rows, mean, losses=losses, stats=filled, out=out, partials=partials)
            return self.reduced(rows, losses, mean, partials), grad, filled

    def softmax(self, rows: Rows, log: bool) -> Array:
        with self.launcher.on(rows.logits):
            return self._rows("LOG_SOFTMAX" if log else "LOSS_AND_GRAD", rows, Mean())

    def _stats(self, rows: Rows, with_correct: bool = False) -> RowStats:
        """New arrays for stats; for `correct` only if it is wanted and there are labels."""
        correct = self.launcher.empty(rows.shape, "bool") if with_correct and rows.has_labels else None
        return RowStats(*(self._empty(rows, rows.shape) for _ in range(4)))._replace(correct=correct)

    def partials(self, rows: Rows) -> Array | None:
        """A new array for the sums of blocks and their ticket, if one block or cluster cannot sum so many losses."""
        count = rows.shape[0] * rows.shape[1]
        most = SUM_TOGETHER if self.launcher.chip(rows.logits) >= 90 else SUM_ALONE
        return self.launcher.empty(PARTIALS, "float64") if rows.reduction != "none" and count > most else None

    def _rows(
        self,
        job: str,
        rows: Rows,
        mean: Mean,
        *,
        losses: Array | None = None,
        stats: RowStats | None = None,
        out: Array | None = None,
        partials: Array | None = None,
    ) -> Any:
        """One launch over the rows (several for SPLIT); returns the gradient, if the job makes one."""
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
        if outer * classes * inner:
            kind, target = _target(rows)
            chip = self.launcher.chip(logits)
            inner, (of_logits, of_grad, of_target) = _steps(outer, inner, logits, grad, target)
            placed = [
                (a, step) for a, step in ((logits, of_logits), (grad, of_grad), (target, of_target)) if a is not None
            ]
            variant = _variant(rows, kind)
            even = inner == 1 and _is_even(rows, variant, placed)
            count = rows.shape[0] * rows.shape[1]
            access = _width(logits, grad) if layout == "columns" else 4 if even else 1
            variant += SLICE if rows.is_slice else ""
            chosen, kernel = _chosen(job, count, classes, dtype, chip, layout, variant, access)
            smoothing, word = rows.label_smoothing, partial(_word, rows.acc)
            max_, rest, gap, mass, correct = (None,) * 5 if stats is None else stats
            problem = Problem(
                logits, *of_logits,
                grad, *of_grad,
                target, kind, *of_target,
                rows.shape[0] * rows.shape[1], classes, inner,
                *_ignored(rows),
                word(mean.scale), mean.scale_at, mean.scale_step,
                losses, max_, rest, gap, mass,
                _dense(xp, rows.class_weight), _dense(xp, rows.sample_weight),
                word(1 - smoothing), word(smoothing / rows.all_classes), word(rows.z_loss), word(rows.softcap or 0.0),
                correct, partials, start=rows.start, vocabulary=rows.vocabulary,
            )  # fmt: skip
            whole = even and not any(
                size % 16 for size in (_address(logits), *(n * logits.dtype.itemsize for n in (classes, of_logits[0])))
            )
            if chosen.parts > 1:
                self._in_parts(job, rows, problem._replace(whole=int(whole)), chosen)
            else:
                first, ahead = chosen.prefetching(job, self.launcher.multiprocessors(logits))
                problem = problem._replace(first=first, ahead=ahead, whole=int(chosen.family in MANY_ROWS or whole))
                self.launch(problem, kernel, chosen.blocks, chosen.threads, chosen.cluster)
        if out is not None and grad is not out:
            self.launcher.copy(grad, out)
            return out
        return grad

    def _in_parts(self, job: str, rows: Rows, problem: Problem, chosen: Plan) -> None:
        """A job on rows read in parts: the stats of the parts, their merge, then the gradient."""
        problem = problem._replace(parts=chosen.parts, part=chosen.part)
        for step, spread in chosen.over_rows(job):
            if step == "STATS":
                problem = problem._replace(of_parts=self._empty(rows, (4, spread.blocks)))
            self.launch(problem, spread.kernel(step), spread.blocks, spread.threads)
            if step == "STATS":
                if problem.max is None:
                    max_, rest, gap, mass, _ = self._stats(rows)
                    problem = problem._replace(max=max_, rest=rest, gap=gap, mass=mass)
                self.launch(problem, merge_kernel(spread.dtype, spread.variant), problem.rows, MERGE_THREADS)

    def launch(
        self, argument: Argument, kernel: Kernel, blocks: int, threads: int, cluster: int = 1,
        more: Argument | None = None,
    ) -> None:  # fmt: skip
        """`more`: what follows in the same argument."""
        words, slots, arrays = _packed(argument)
        if more is not None:
            last, other_slots, others = _packed(more)
            slots = (*slots, *((len(words) + at, len(arrays) + k) for at, k in other_slots))
            words, arrays = words + last, arrays + others
        run = self.launcher.ready(kernel, blocks, threads, cluster)
        send(run, words, slots, [self.launcher.look(array)[0] for array in arrays], arrays)

    def mean(self, rows: Rows) -> Mean:
        """The divisor of the loss and the factor of the gradient; a launch, if targets and weights must be read."""
        upstream = 1.0 if rows.upstream is None else rows.upstream
        if rows.reduction == "mean":
            known = known_divisor(rows)
            if known is None:
                divisor, scale = self.launcher.empty((), "float64"), self._empty(rows, ())
                self.count(rows, upstream=upstream, divisor_to=divisor, scale_to=scale)
                return Mean(divisor_at=divisor, scale_at=scale)
            if isinstance(known, float) and isinstance(upstream, float):
                return Mean(divisor=known, scale=upstream / known if known else float("nan"))
            mean, scale = _by(known), self._empty(rows, ())
            self._sum(rows, divisor=mean.divisor, divisor_at=mean.divisor_at, upstream=upstream, scale_to=scale)
            return mean._replace(scale_at=scale)
        if isinstance(upstream, float):
            return Mean(scale=upstream)
        return Mean(scale_at=_dense(rows.xp, upstream), scale_step=int(upstream.ndim == 2))

    def count(self, rows: Rows, **wanted: Any) -> None:
        """Counts rows in the first launch of a call, when no ticket has been set to 0: many rows take two launches."""
        most = SUM_TOGETHER if self.launcher.chip(rows.logits) >= 90 else COUNT_ALONE
        if rows.shape[0] * rows.shape[1] > most:
            partials = self.launcher.empty(PARTIALS, "float64")
            self._sum(rows, counts=True, blocks=SUM_BLOCKS, partials=partials)
            wanted |= {"partials": partials, "parts": SUM_BLOCKS}
        self._sum(rows, counts=True, **wanted)

    def reduced(self, rows: Rows, losses: Array, mean: Mean | None, partials: Array | None) -> Array:
        """The losses as the caller wants them; if there is no `mean` yet, the same launch counts the rows."""
        if rows.reduction == "none":
            return losses
        total, counts = self._empty(rows, ()), False
        if mean is None:
            known = known_divisor(rows) if rows.reduction == "mean" else 1.0
            counts, mean = known is None, Mean() if known is None else _by(known)
        self._sum(
            rows, losses=losses, counts=counts, divisor=mean.divisor, divisor_at=mean.divisor_at, loss_to=total,
            blocks=1 if partials is None else SUM_BLOCKS, partials=partials, ticket=partials,
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
        blocks: int = 1,
        partials: Array | None = None,
        parts: int = 0,
        ticket: Array | None = None,
        divisor_to: Array | None = None,
        scale_to: Array | None = None,
        loss_to: Array | None = None,
    ) -> None:
        """One launch of sums.cu."""
        xp, (outer, inner) = rows.xp, rows.shape
        count = outer * inner if counts or losses is not None else 0
        kind, target = _target(rows) if counts and rows.has_labels else (0, None)
        given = isinstance(upstream, float)
        inner, [(by_outer, _, by_inner)] = _steps(outer, inner, target)
        weight, sample_weight = (_dense(xp, rows.weight), _dense(xp, rows.sample_weight)) if counts else (None, None)
        argument = Sum(
            target, kind, by_outer, by_inner,
            count, rows.all_classes, max(1, inner),
            *_ignored(rows),
            weight, sample_weight, losses, int(counts),
            divisor, divisor_at, upstream if given else 1.0, None if given else upstream,
            partials, parts, ticket, divisor_to, scale_to, loss_to,
        )  # fmt: skip
        together = blocks == 1 and not parts and count > SUM_ALONE and self.launcher.chip(rows.logits) >= 90
        cluster = SUM_CLUSTER if together else 1
        kernel = sums_kernel(rows.logits.dtype.name, cluster)
        self.launch(argument, kernel, max(blocks, cluster), SUM_THREADS, cluster)

    def _gradient(self, rows: Rows, logits: Array) -> Array:
        """A new array for the gradient, laid out like the logits, so that vectorized loads have vectorized stores."""
        outer, classes, inner = logits.shape
        if inner > 1 and logits.strides[1] == logits.dtype.itemsize:
            made = self.launcher.empty((outer, inner, classes), rows.grad_dtype)
            return made.transpose(0, 2, 1)
        return self.launcher.empty((outer, classes, inner), rows.grad_dtype)

    def _empty(self, rows: Rows, shape: tuple[int, ...]) -> Array:
        return self.launcher.empty(shape, rows.acc)


def said_of_rows(rows: Rows) -> Problem:
    """What labels and weights say about rows with all of their classes, for a kernel that reads no logits."""
    kind, target = _target(rows) if rows.has_labels else (OF_LOGITS, None)
    inner, [of_target] = _steps(*rows.shape, target)
    number, word, nowhere = rows.shape[0] * rows.shape[1], partial(_word, rows.acc), (None, 0, 0, 0)
    return Problem(
        *nowhere, *nowhere, target, kind, *of_target, number, rows.all_classes, max(1, inner), *_ignored(rows),
        word(1.0), None, 0, *(None,) * 5, None, _dense(rows.xp, rows.sample_weight),
        word(1.0), word(0.0), word(rows.z_loss), word(0.0), None, None, vocabulary=rows.all_classes,
    )  # fmt: skip


def known_divisor(rows: Rows) -> Array | float | None:
    """The mean's divisor if no label or weight need be read: a number, or float64 on the device. Else None."""
    if rows.denominator is not None:
        given = rows.denominator
        return given if isinstance(given, float) or given.dtype.name == "float64" else given.astype("float64")
    if rows.sample_weight is not None or (rows.has_labels and (rows.weight is not None or not rows.all_labels_count)):
        return None
    return float(rows.shape[0] * rows.shape[1])


def _by(divisor: Array | float) -> Mean:
    return Mean(divisor=divisor) if isinstance(divisor, float) else Mean(divisor_at=divisor)


def _ignored(rows: Rows) -> tuple[int, int]:
    """(whether any label is ignored, which one, as a signed 64-bit integer)."""
    if rows.ignore_index is None:
        return 0, 0
    index = int(rows.ignore_index)
    return 1, index if index < 1 << 63 else index - (1 << 64)


def _variant(rows: Rows, kind: int) -> str:
    labels = rows.target is None or rows.has_labels
    if labels and not rows.label_smoothing:
        return "PLAIN" if rows.softcap is None else "CAPPED"
    if rows.softcap is not None:
        return "CAPPED_GENERAL"
    if rows.weight is not None:
        return "GENERAL"
    return "SMOOTH" if labels else "SOFT" if kind == OF_LOGITS else "GENERAL"


def _is_even(rows: Rows, variant: str, placed: list[tuple[Any, tuple[int, int, int]]]) -> bool:
    """Whether rows are evenly spaced, and arrays accessed by vectors beside the logits are aligned like them."""
    logits = rows.logits
    (_, (step, _, _)), *others = placed
    place, step = _address(placed[0][0]), step * logits.dtype.itemsize
    for array, (by_row, by_class, _) in others:
        if array is None or (array is rows.target and rows.has_labels):
            continue
        wide = array.dtype.itemsize // logits.dtype.itemsize  # 2 for a float32 target beside 16-bit logits
        if by_class != 1 and rows.classes > 1:
            return False
        if (_address(array) - place * wide) % 16 or (by_row * array.dtype.itemsize - step * wide) % 16:
            return False
    if rows.weight is not None and variant in ("GENERAL", "CAPPED_GENERAL"):  # the same weights for every row
        weight: Any = rows.class_weight
        aligned = not weight.flags.c_contiguous or _address(weight) % 16 == 0  # a copy is
        return place % 16 == 0 and step % 16 == 0 and aligned
    return True


def _target(rows: Rows) -> tuple[int, Any]:
    """(enum Target of problem.cuh, the target as the kernels read it): labels and most distributions unchanged."""
    if rows.target is None:
        return 0, None
    name = rows.target.dtype.name
    if rows.has_labels:
        return LABELS[name], rows.target
    if name == rows.logits.dtype.name:
        return OF_LOGITS, rows.target
    target = rows.target if name == "float32" else rows.xp.astype(rows.target, rows.acc)
    return OF_LOGITS if target.dtype.name == rows.logits.dtype.name else OF_FLOAT32, target


def _steps(outer: int, inner: int, *arrays: Array | None) -> tuple[int, list[tuple[int, int, int]]]:
    """(inner, for each array its strides in elements along outer, classes and inner; 0 for an array that is None).

    Rows that are evenly spaced in every array are treated as outer ones, with inner = 1, which saves the kernels a
    division.
    """
    steps = [_strides(array) for array in arrays]
    if inner > 1 and (outer == 1 or all(by_outer == inner * by_inner for by_outer, _, by_inner in steps)):
        return 1, [(by_inner, by_class, by_inner) for _, by_class, by_inner in steps]
    return inner, steps


def _strides(array: Array | None) -> tuple[int, int, int]:
    if array is None:
        return 0, 0, 0
    itemsize = array.dtype.itemsize
    steps = [step // itemsize for step in array.strides]
    return steps[0], steps[1] if len(steps) == 3 else 0, steps[-1]


def _layout(array: Array) -> str | None:
    """The `layout` for `plan` of an array (outer, C, inner); None if a copy with contiguous rows is better."""
    outer, classes, inner = array.shape
    itemsize = int(array.dtype.itemsize)
    if any(step % itemsize for step in array.strides):
        return None
    by_outer, by_class, by_inner = _strides(array)
    if by_class == 1 or classes == 1:
        side_by_side = (inner == 1 or by_inner == classes) and (outer == 1 or by_outer == inner * classes)
        return "flat" if side_by_side else "rows"
    together = by_inner == 1 and inner >= NEIGHBOURS
    return "columns" if together or classes * itemsize <= TINY_BYTES else None


def _width(*arrays: Array | None) -> int:
    """How many adjacent rows one access may move in all arrays: 1, 2 or 4."""
    bits = 4
    for array in arrays:
        if array is None:
            continue
        by_outer, by_class, by_inner = _strides(array)
        if by_inner != 1:
            return 1
        bits |= array.shape[2] | by_outer | by_class | _address(array) // array.dtype.itemsize
    return bits & -bits


def _dense(xp: Any, array: Any) -> Any:
    """A contiguous array of numbers per row or class."""
    return array if array is None or array.flags.c_contiguous else xp.ascontiguousarray(array)


def _address(array: Array) -> int:
    """Address of the first element."""
    return int(array.ctypes.data if isinstance(array, np.ndarray) else array.data.ptr)


engine = Cuda(Cupy())
