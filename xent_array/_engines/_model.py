"""How long a launch takes, predicted from its plan and the machine code of its kernel, without a GPU.

Three times are compared: of the bytes that must move, of the instructions that all warps issue, and of the special
functions among these (MUFU: ex2, reciprocals). `times` combines them. Its constants were fitted to an H200, on 488
launches of WARP, BLOCK, STREAM and TINY kernels that do not spill, with and without a gradient, with and without
clusters, in two dtypes and with 16 to 262144 classes: it predicts each of them within 15 %, most within 10 %
(tests/cuda/test_model.py). No other chip has been measured: their numbers are those of the data sheets.

Where the code of a kernel is mostly straight-line (WARP, BLOCK, STREAM), a fixed share of its instructions stands for
what is executed. Where most of it handles rare cases (TINY, COLUMNS), the kernel marks those itself, and everything
that is not marked counts.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from .. import _kernels
from .._rows import Rows
from . import cuda


class Chip(NamedTuple):
    """A GPU: GB/s of a copy within its memory, SMs, GHz, warps resident on an SM, MB of L2 cache."""

    name: str
    bandwidth: float
    multiprocessors: int
    clock: float
    warps: int
    cache: int


OF_SHEET = 0.88  # share of the data sheet's bandwidth that a copy reaches on an H200
CHIPS = {  # for each compute capability the most common GPU
    75: Chip("T4", 320 * OF_SHEET, 40, 1.59, 32, 4),
    80: Chip("A100 80GB", 2039 * OF_SHEET, 108, 1.41, 64, 40),
    86: Chip("A10", 600 * OF_SHEET, 72, 1.695, 48, 6),
    89: Chip("L40S", 864 * OF_SHEET, 142, 2.52, 48, 96),
    90: Chip("H200", 4240, 132, 1.98, 64, 50),  # bandwidth of a copy as measured
    100: Chip("B200", 8000 * OF_SHEET, 148, 1.965, 64, 126),
    120: Chip("RTX 5090", 1792 * OF_SHEET, 170, 2.407, 48, 96),
}


def card(chip: int) -> Chip:
    return CHIPS[max(known for known in CHIPS if known <= chip)]


class Code(NamedTuple):
    """Counts from the machine code of a kernel; tests/support/simt/nvrtc.py defines them."""

    registers: int
    spill_stores: int
    loads128: int
    stores128: int
    once: int  # 128-bit loads that are marked evict-first
    instructions: int
    mufu: int
    loops: list[list[int]]  # of each: instructions, MUFU, bytes a thread moves, its widest access to global memory
    executed: list[Any] | None = None  # instructions, MUFU, loops on the common path

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Code:
        return cls(*(row[name] for name in cls._fields))


@cache
def counts() -> dict[str, Code]:
    """By name, the sm_90 kernels in kernels/counts.json, which `tests/cuda/kernel_resources.py --write` generates."""
    file = _kernels.folder() / "counts.json"
    if not file.exists():
        return {}
    return {name: Code(*row) for name, row in json.loads(file.read_text(encoding="utf-8"))["kernels"].items()}


class Launch(NamedTuple):
    """What the model needs to know about a plan and a job."""

    rows: int
    logits: int  # bytes
    bytes: int  # that must move
    more: int  # of these, bytes of another array of the size of the logits (a distribution), else 0
    gradient: bool  # whether one is written
    stream: bool  # whether a thread reads its logits in pieces, and a second time for a gradient
    vectors: int  # see Plan
    lanes: int
    threads: int
    blocks: int
    shared: int
    turn: int = 0  # bytes a thread moves in one iteration of the loop over a row; 0: unknown, take every loop for it
    twice: bool = True  # whether one launch reads the logits twice, if it streams and writes a gradient
    known: bool = False  # whether the kernel marks its rare paths (`rare_path`); else all of its code counts
    usual: bool = True  # whether the launch takes the common path, not the code for problems with options
    mostly: float = 1.0  # share of the common path that rows with p < 1/2 everywhere execute
    cluster: int = 1
    ahead: bool = False  # whether logits are prefetched, so that no block waits for DRAM before it computes

    @classmethod
    def of(cls, plan: cuda.Plan, job: str, more: int = 0, usual: bool = True) -> Launch:
        """Of a plan, where `more` bytes move that it does not know of; `usual`: without options per row."""
        logits = plan.rows * plan.classes * cuda.DTYPES[plan.dtype][1]
        vectors, lanes, turn = plan.vectors, plan.lanes, max(1, 16 * plan.vectors)
        if (
            plan.family == "COLUMNS"
        ):  # a thread holds classes of several rows; warps that share rows wait for each other
            turn = plan.vectors * plan.width * cuda.DTYPES[plan.dtype][1]
            vectors, lanes = 0, int(plan.lanes == 1)
        gradient = cuda.writes_grad(job)
        twofold = (
            plan.family in cuda.HOLDING and plan.variant in ("PLAIN", "SMOOTH") and job in ("LOSS", "LOSS_AND_GRAD")
        )
        whole = plan.classes * cuda.DTYPES[plan.dtype][1] % 16 == 0
        return cls(
            plan.rows, logits, plan.bytes(job) + more, more, gradient, plan.stream,
            vectors, lanes, plan.threads, plan.blocks, 0, turn, plan.parts == 1,
            twofold or plan.family in cuda.MANY_ROWS, plan.family in cuda.MANY_ROWS or (usual and whole),
            MOSTLY if twofold else 1.0, plan.cluster,
            gradient and plan.prefetching(job, 1)[1] > 0,
        )  # fmt: skip


class Times(NamedTuple):
    """In seconds: of the bytes, of the instructions, of the special functions; and of the whole launch."""

    memory: float
    instructions: float
    special: float
    all: float

    @property
    def decides(self) -> str:
        three = {"memory": self.memory, "instructions": self.instructions, "special functions": self.special}
        return max(three, key=three.__getitem__)


# Fitted to an H200.
LOSS, GRAD, GRAD_ONCE = 1.01, 1.005, 1.03  # factors of the memory's time: loss only; gradient; with evict-first loads
READ = 0.993  # bandwidth of a kernel that only reads, over that of a copy
EXECUTED = 0.8  # share executed of code that marks nothing: the rest is for other label dtypes and unaligned rows
MOSTLY = 0.9  # Launch.mostly of WARP and BLOCK kernels without options
FULL = 22  # so many warps on an SM issue 1 - 1/e of its peak
SKIPPED = 0.3  # share of the instructions that store a vector, skipped where a thread has fewer
SHARPNESS = 7  # how abruptly the bottleneck changes from one time to another
TURNS = 0.25  # of the lesser time, not overlapped on an SM with one block, which loads, then computes
POWER = 1.3  # that share falls with the number of blocks to this power
WAITS = 0.045  # of the whole, added for each doubling of the cluster, where logits are prefetched
SECTOR = 32  # bytes read again for the label's logit, where the caches have evicted the row
STARTED = 4.5e-6  # seconds to start a launch, and each that depends on one before it


def times(launch: Launch, code: Code, chip: Chip) -> Times:
    """The times of a launch whose kernel does not spill.

    The longest of the three is the bottleneck. If the next one is close, both count, and the more so the fewer blocks
    an SM has to load for one while another computes.
    """
    warps = launch.blocks * launch.threads / 32
    per_thread = launch.logits / (launch.blocks * launch.threads)
    wide = code.loads128 + code.stores128 > 0
    instructions, special, loops = EXECUTED * code.instructions, float(code.mufu), code.loops
    if launch.known and code.executed:
        usual, special, loops = code.executed
        instructions = launch.mostly * usual if launch.usual else EXECUTED * (code.instructions - usual)
    for body, mufu, moved, widest in loops:
        over_the_row = moved > 0 and not (wide and 0 < widest < 16)  # else over its unaligned ends, or for a barrier
        if launch.turn and not (launch.stream and moved >= launch.turn):
            over_the_row = False  # but over a thread's own logits again: if p > 1/2, or if products overflow
        again = max(1.0, per_thread / moved) - 1 if over_the_row else 0
        instructions, special = instructions + again * body, special + again * mufu
    if launch.gradient and launch.vectors and not launch.stream:
        instructions *= 1 - SKIPPED * (1 - per_thread / (16 * launch.vectors))
    blocks = _resident(launch, code, chip)
    issues = 4 * chip.multiprocessors * chip.clock * 1e9 * (1 - math.exp(-blocks * launch.threads / 32 / FULL))
    few = max(1.0, chip.multiprocessors / launch.blocks)
    by_memory = few * _bytes(launch, code, blocks, chip) / (chip.bandwidth * 1e9)
    by_memory *= LOSS if not launch.gradient else GRAD_ONCE if code.once else GRAD
    by_instructions = few * instructions * warps / issues
    by_special = few * 32 * special * warps / (16 * chip.multiprocessors * chip.clock * 1e9)
    three = by_memory, by_instructions, by_special
    together = max(three) * sum((t / max(three)) ** SHARPNESS for t in three) ** (1 / SHARPNESS)
    pieces = math.ceil(per_thread / (16 * launch.vectors)) if launch.stream and launch.vectors else 1
    apart = blocks * launch.threads // 32 if launch.lanes and not launch.shared else blocks  # independent of each other
    lesser = min(by_memory, max(by_instructions, by_special))
    waiting = WAITS * math.log2(launch.cluster) * together if launch.ahead else TURNS * lesser / (apart**POWER * pieces)
    return Times(*three, together + waiting)


def times_of(
    plan: cuda.Plan, job: str, known: Callable[[str], Code | None], chip: Chip, more: int = 0, usual: bool = True
) -> tuple[Launch, Times] | None:
    """A job as a whole, and the sum of the times of its launches over the rows; None if a kernel is not known."""
    each = []
    for step, chosen in plan.over_rows(job):
        code = known(chosen.kernel(step).name)
        if code is None:
            return None
        each.append(times(Launch.of(chosen, step, more, usual), code, chip))
    waits = STARTED * (len(plan.kernels(job)) - 1)
    memory, instructions, special, whole = map(sum, zip(*each, strict=True))
    return Launch.of(plan, job, more, usual), Times(memory, instructions, special, whole + waits)


def _resident(launch: Launch, code: Code, chip: Chip) -> int:
    """Blocks resident on an SM."""
    warps = -(-launch.threads // 32)
    registers = -(-code.registers // 8) * 8 * 32  # per warp
    room = min((64 << 10) // registers // warps, chip.warps // warps, 32)
    return max(1, min(room, (227 << 10) // (launch.shared + 1024)) if launch.shared else room)


def _bytes(launch: Launch, code: Code, blocks: int, chip: Chip) -> float:
    """Bytes that really move: with the label's logit once more, and what a second read does not find in L2."""
    moved = float(launch.bytes)
    if code.once and not launch.shared:
        moved += SECTOR * launch.rows
    if launch.stream and launch.gradient and launch.twice:
        in_work = launch.logits / launch.blocks * min(launch.blocks, blocks * chip.multiprocessors)
        moved += launch.logits / (1 + (chip.cache * 1e6 / in_work) ** 1.4)
    return moved


# A problem as text, and its explanation

OPTIONS = {  # the argument of `Rows` that it sets; None: an array
    "smoothing": ("label_smoothing", 0.1),
    "z": ("z_loss", 1e-4),
    "softcap": ("softcap", 30.0),
    "weight": ("weight", None),
    "sample_weight": ("sample_weight", None),
    "soft": ("target", None),
}
SHORT = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32", "fp64": "float64"}
LIKE = "4096x50257:bf16@sm90+softcap or 16x21x512x512:fp32@axis1"


class Hollow(NamedTuple):
    """What an engine asks of a contiguous array before it reads it."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def strides(self) -> tuple[int, ...]:
        return tuple(math.prod(self.shape[k + 1 :]) * self.dtype.itemsize for k in range(self.ndim))


class Problem(NamedTuple):
    """The shape and dtype of logits, the axis of the classes, and the options given with them."""

    shape: tuple[int, ...]
    dtype: str
    axis: int = -1
    options: tuple[str, ...] = ()
    chip: int = 90

    @classmethod
    def parse(cls, text: str) -> Problem:
        """From text like LIKE."""
        found = re.fullmatch(r"(\d+(?:x\d+)+):(\w+)((?:@(?:sm_?|axis)\d+)*)((?:\+\w+)*)", text)
        name = found and SHORT.get(found[2], found[2])
        options = tuple(found[4].split("+")[1:]) if found else ()
        if not found or name not in cuda.DTYPES or not set(options) <= set(OPTIONS):
            raise ValueError(
                f"{text!r} is not like {LIKE}, with a dtype of {', '.join((*SHORT, *cuda.DTYPES))},"
                f" and options of {', '.join(OPTIONS)}"
            )
        shape = tuple(map(int, found[1].split("x")))
        where = dict(re.findall(r"@(sm|axis)_?(\d+)", found[3]))
        axis, chip = int(where.get("axis", len(shape) - 1)), int(where.get("sm", 90))
        if axis >= len(shape):
            raise ValueError(f"{len(shape)} axes have no axis {axis}")
        if 0 in shape:
            raise ValueError(f"{text!r} has no logits")
        if chip < cuda.OLDEST:
            raise ValueError(f"the oldest chip is sm{cuda.OLDEST}; got sm{chip}")
        return cls(shape, str(name), axis, options, chip)

    @property
    def classes(self) -> int:
        return self.shape[self.axis]

    @property
    def rows(self) -> int:
        return math.prod(self.shape) // self.classes

    @property
    def usual(self) -> bool:
        """Whether no option is per row."""
        return not {"z", "weight", "sample_weight"} & set(self.options)

    @property
    def more(self) -> int:
        """Bytes that must move in addition to logits, gradient and labels."""
        return self.rows * self.classes * cuda.DTYPES[self.dtype][1] if "soft" in self.options else 0

    def described(self) -> Rows:
        """The problem as an engine takes it, with arrays that have no elements."""
        axis = self.axis % len(self.shape)
        outer, inner = math.prod(self.shape[:axis]), math.prod(self.shape[axis + 1 :])
        itemsize = cuda.DTYPES[self.dtype][1]
        logits = Hollow((outer, self.classes, inner), np.dtype(f"V{itemsize}"))
        by_row = Hollow((outer, inner), np.dtype(np.float32))
        arrays = {"weight": Hollow((self.classes,), by_row.dtype), "sample_weight": by_row, "target": logits}
        given: dict[str, Any] = {"target": Hollow(by_row.shape, np.dtype(np.int64))}
        for name, value in (OPTIONS[option] for option in self.options):
            given[name] = arrays[name] if value is None else value
        return Rows(np, logits, np.dtype(f"f{max(4, itemsize)}"), **given)

    def plan(self, job: str) -> cuda.Plan:
        """What the engine would launch."""
        rows = self.described()
        layout = cuda._layout(rows.logits) or "flat"  # None: it would make a contiguous copy
        variant = cuda._variant(rows, cuda._target(rows)[0])
        return cuda.plan(self.rows, self.classes, self.dtype, self.chip, layout=layout, variant=variant, job=job)


def explain(text: str) -> str:
    """The plan for a problem, as text: what is launched, what it moves, and how long that takes."""
    problem = Problem.parse(text)
    chip = card(problem.chip)
    size = problem.classes * cuda.DTYPES[problem.dtype][1]
    lines = [
        f"{problem.rows} rows of {problem.classes} {problem.dtype} logits, {size:,} bytes each, on sm_{problem.chip}"
    ]
    said, margin = None, " " * 17
    told = "measured" if chip is CHIPS[90] else f"{OF_SHEET:.0%} of its data sheet"
    for job in ("LOSS_AND_GRAD", "STATS_AND_GRAD", "LOSS"):
        plan = problem.plan(job)
        if plan.words() != said:
            lines.append(said := plan.words())
        launch = Launch.of(plan, job, problem.more, problem.usual)
        least = f"{launch.bytes / chip.bandwidth / 1e3:.3g} microseconds at the {chip.bandwidth:.0f} GB/s of a copy"
        lines.append(f"  {job.lower().replace('_', ' '):14} {launch.bytes:,} bytes")
        lines.append(f"{margin}at least {least} on {chip.name} ({told})")
        lines += [f"{margin}{kernel.name}" for kernel in plan.kernels(job)]
        found = times_of(plan, job, counts().get, chip, problem.more, problem.usual)
        if found is None:
            lines.append(f"{margin}(the instructions of this kernel have not been counted)")
            continue
        _, took = found
        memory, instructions, special, whole = (1e6 * t for t in took)
        reached = f"{share(launch, took, chip):.0%} of a {'copy' if launch.gradient else 'read'}"
        three = f"memory {memory:.3g}, instructions {instructions:.3g}, special functions {special:.3g}"
        lines += [
            f"{margin}{three} microseconds",
            f"{margin}limited by {took.decides}: about {whole + STARTED * 1e6:.3g} microseconds, {reached}",
        ]
    return "\n".join(lines)


def share(launch: Launch, took: Times, chip: Chip) -> float:
    """Share of a copy's speed (of a read's, if no gradient is written), counting only arrays of the logits' size."""
    arrays = launch.logits * (2 if launch.gradient else 1) + launch.more
    return arrays / (chip.bandwidth * 1e9 * (1 if launch.gradient else READ)) / took.all
