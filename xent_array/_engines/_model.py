"""How long a launch takes, told from its plan and the machine code of its kernel: nothing here needs a GPU.

Three times are set against one another: that of the bytes that must move, of the instructions that all warps execute,
and of those among them that are special functions (MUFU: ex2, reciprocals). `times` puts them together. Its constants
were found on an H200, from 488 launches of kernels of the families W, B, O and T that do not spill, with and without a
gradient, in clusters and without, of two dtypes and 16 to 262144 classes: every one of them is met within 15 %, most
within 10 (tests/test_model.py). Of other chips nothing has been measured: theirs are the numbers of their data sheets.

Where the text of a kernel is mostly straight, a share of it stands for what is executed (W, B, O). Where most of it is
for rare cases (T, P), it says so itself, and what it does not say of is counted whole.
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
    """A card: GB/s of a copy within its memory, processors, GHz, warps that one of these holds, MB of L2 cache."""

    name: str
    bandwidth: float
    processors: int
    clock: float
    warps: int
    cache: int


OF_SHEET = 0.88  # of the bandwidth that a data sheet names, a copy reaches on an H200
CHIPS = {  # the card that most have
    75: Chip("T4", 320 * OF_SHEET, 40, 1.59, 32, 4),
    80: Chip("A100 80GB", 2039 * OF_SHEET, 108, 1.41, 64, 40),
    86: Chip("A10", 600 * OF_SHEET, 72, 1.695, 48, 6),
    89: Chip("L40S", 864 * OF_SHEET, 142, 2.52, 48, 96),
    90: Chip("H200", 4240, 132, 1.98, 64, 50),  # as a copy was measured
    100: Chip("B200", 8000 * OF_SHEET, 148, 1.965, 64, 126),
    120: Chip("RTX 5090", 1792 * OF_SHEET, 170, 2.407, 48, 96),
}


def card(chip: int) -> Chip:
    return CHIPS[max(known for known in CHIPS if known <= chip)]


class Code(NamedTuple):
    """What the machine code of a kernel shows; tests/simt/nvrtc.py says what is counted, and how."""

    registers: int
    spill_stores: int
    loads128: int
    stores128: int
    once: int  # of the loads, those that tell the caches to let go first
    instructions: int
    mufu: int
    loops: list[list[int]]  # of each: instructions, mufu, bytes that a thread moves, its widest access to global memory
    executed: list[Any] | None = None  # instructions, mufu, loops of what a usual warp executes

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Code:
        return cls(*(row[name] for name in cls._fields))


@cache
def counts() -> dict[str, Code]:
    """By name, the kernels of sm_90 as kernels/counts.json has them; `tests/kernel_resources.py --write` makes it."""
    file = _kernels.folder() / "counts.json"
    if not file.exists():
        return {}
    return {name: Code(*row) for name, row in json.loads(file.read_text(encoding="utf-8"))["kernels"].items()}


class Launch(NamedTuple):
    """What the model asks of a plan, and of the job that is done by it."""

    rows: int
    logits: int  # bytes
    bytes: int  # that must move
    more: int  # of them, those of another array as large, or of none
    gradient: bool  # whether one is written
    stream: bool  # whether what a thread has of the logits is read in pieces, and once more for a gradient
    vectors: int  # see Plan
    lanes: int
    threads: int
    blocks: int
    shared: int
    turn: int = 0  # bytes that a thread moves in one turn of the loop over a row; 0: any loop may be it
    twice: bool = True  # whether what is streamed for a gradient is read twice, by one launch
    known: bool = False  # whether the kernel says what a usual warp does not execute; else its text is what there is
    usual: bool = True  # whether that is what is executed, not the text beside it for all other problems
    mostly: float = 1.0  # of that, the part that is not for confident rows
    cluster: int = 1
    ahead: bool = False  # whether logits are prefetched, so that no block waits for memory before it calculates

    @classmethod
    def of(cls, plan: cuda.Plan, job: str, more: int = 0, usual: bool = True) -> Launch:
        """Where `more` bytes must move beside what the plan knows of, of a problem with or without options per row."""
        logits = plan.rows * plan.classes * cuda.DTYPES[plan.dtype][1]
        vectors, lanes, turn = plan.vectors, plan.lanes, max(1, 16 * plan.vectors)
        if plan.family == "P":  # whose threads hold classes of several rows, and whose warps wait if they share rows
            turn = plan.vectors * plan.width * cuda.DTYPES[plan.dtype][1]
            vectors, lanes = 0, int(plan.lanes == 1)
        gradient = cuda.writes_grad(job)
        twofold = plan.family in "WB" and plan.variant in ("PLAIN", "SMOOTH") and job in ("LOSS", "LOSS_AND_GRAD")
        whole = plan.classes * cuda.DTYPES[plan.dtype][1] % 16 == 0
        return cls(
            plan.rows, logits, plan.bytes(job) + more, more, gradient, plan.stream,
            vectors, lanes, plan.threads, plan.blocks, 0, turn, plan.parts == 1, twofold or plan.family in "TP",
            plan.family in "TP" or (usual and whole), MOSTLY if twofold else 1.0, plan.cluster,
            gradient and plan.begins(job, 1)[1] > 0,
        )  # fmt: skip


class Times(NamedTuple):
    """In seconds: of the bytes, of the instructions, of the special functions; and of the launch as a whole."""

    memory: float
    instructions: float
    special: float
    all: float

    @property
    def decides(self) -> str:
        three = {"memory": self.memory, "instructions": self.instructions, "special functions": self.special}
        return max(three, key=three.__getitem__)


# What was found on an H200.
LOSS, GRAD, GRAD_ONCE = 1.01, 1.005, 1.03  # times of the memory's: by what is written, and how it was loaded
READ = 0.993  # of a copy's bytes in a second, a kernel that only reads has
EXECUTED = 0.8  # of a text that does not say: the rest is for labels of other dtypes, rows that start otherwise
MOSTLY = 0.9  # of what W and B execute for problems without options
FULL = 22  # warps of a processor: so many issue 1 - 1/e of what it could
SKIPPED = 0.3  # of the instructions: what stores a vector that is not there
SHARPNESS = 7  # how suddenly one time takes over from another
TURNS = 0.25  # of the lesser time on top, where a processor has one block, which loads, then calculates
POWER = 1.3  # of the number of blocks, by which that is divided
WAITS = 0.045  # of the time on top, each time that a cluster is twice as large, where no block waits for memory
SECTOR = 32  # bytes that come with the label's logit, read by itself, where the caches have let go of its row
STARTED = 4.5e-6  # seconds beside these, of a launch; and of each that waits for one before it


def times(launch: Launch, code: Code, chip: Chip) -> Times:
    """The times of a launch whose kernel does not spill.

    The greatest of the three decides. Where the second is near, both count, and all the more the fewer blocks a
    processor has to load for one while it calculates for another.
    """
    warps = launch.blocks * launch.threads / 32
    per_thread = launch.logits / (launch.blocks * launch.threads)
    wide = code.loads128 + code.stores128 > 0
    instructions, special, loops = EXECUTED * code.instructions, float(code.mufu), code.loops
    if launch.known and code.executed:
        usual, special, loops = code.executed
        instructions = launch.mostly * usual if launch.usual else EXECUTED * (code.instructions - usual)
    for body, mufu, moved, widest in loops:
        over_the_row = moved > 0 and not (wide and 0 < widest < 16)  # else over its ragged ends, or for a barrier
        if launch.turn and not (launch.stream and moved >= launch.turn):
            over_the_row = (
                False  # but over what a thread holds once more, where p > 1/2 or products are beyond the range
            )
        again = max(1.0, per_thread / moved) - 1 if over_the_row else 0
        instructions, special = instructions + again * body, special + again * mufu
    if launch.gradient and launch.vectors and not launch.stream:
        instructions *= 1 - SKIPPED * (1 - per_thread / (16 * launch.vectors))
    blocks = _resident(launch, code, chip)
    issues = 4 * chip.processors * chip.clock * 1e9 * (1 - math.exp(-blocks * launch.threads / 32 / FULL))
    few = max(1.0, chip.processors / launch.blocks)
    by_memory = few * _bytes(launch, code, blocks, chip) / (chip.bandwidth * 1e9)
    by_memory *= LOSS if not launch.gradient else GRAD_ONCE if code.once else GRAD
    by_instructions = few * instructions * warps / issues
    by_special = few * 32 * special * warps / (16 * chip.processors * chip.clock * 1e9)
    three = by_memory, by_instructions, by_special
    together = max(three) * sum((t / max(three)) ** SHARPNESS for t in three) ** (1 / SHARPNESS)
    pieces = math.ceil(per_thread / (16 * launch.vectors)) if launch.stream and launch.vectors else 1
    apart = blocks * launch.threads // 32 if launch.lanes and not launch.shared else blocks  # which never wait
    lesser = min(by_memory, max(by_instructions, by_special))
    waiting = WAITS * math.log2(launch.cluster) * together if launch.ahead else TURNS * lesser / (apart**POWER * pieces)
    return Times(*three, together + waiting)


def times_of(
    plan: cuda.Plan, job: str, known: Callable[[str], Code | None], chip: Chip, more: int = 0, usual: bool = True
) -> tuple[Launch, Times] | None:
    """A job as a whole, and the times of its launches over the rows together; None where a kernel is not known."""
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
    """Blocks that a processor holds at a time."""
    warps = -(-launch.threads // 32)
    registers = -(-code.registers // 8) * 8 * 32  # of a warp
    room = min((64 << 10) // registers // warps, chip.warps // warps, 32)
    return max(1, min(room, (227 << 10) // (launch.shared + 1024)) if launch.shared else room)


def _bytes(launch: Launch, code: Code, blocks: int, chip: Chip) -> float:
    """What really moves: the label's logit once more, and what a second reading does not find in the cache."""
    moved = float(launch.bytes)
    if code.once and not launch.shared:
        moved += SECTOR * launch.rows
    if launch.stream and launch.gradient and launch.twice:
        in_work = launch.logits / launch.blocks * min(launch.blocks, blocks * chip.processors)
        moved += launch.logits / (1 + (chip.cache * 1e6 / in_work) ** 1.4)
    return moved


# A problem in words, and what is said of it

OPTIONS = {  # what is given to `Rows` for it; None: an array
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
    """What an engine asks of a dense array before it reads it."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def strides(self) -> tuple[int, ...]:
        return tuple(math.prod(self.shape[k + 1 :]) * self.dtype.itemsize for k in range(self.ndim))


class Problem(NamedTuple):
    """Logits of a shape whose classes lie along an axis, and the options that are given with them."""

    shape: tuple[int, ...]
    dtype: str
    axis: int = -1
    options: tuple[str, ...] = ()
    chip: int = 90

    @classmethod
    def parse(cls, text: str) -> Problem:
        """From words like LIKE."""
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
        """Whether no option asks for something row by row."""
        return not {"z", "weight", "sample_weight"} & set(self.options)

    @property
    def more(self) -> int:
        """Bytes that must move beside those of logits, gradient and labels."""
        return self.rows * self.classes * cuda.DTYPES[self.dtype][1] if "soft" in self.options else 0

    def described(self) -> Rows:
        """The problem as an engine takes it, in arrays that have no elements to look at."""
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
        layout = cuda._layout(rows.logits) or "flat"  # None: it would copy them
        variant = cuda._variant(rows, cuda._target(rows)[0])
        return cuda.plan(self.rows, self.classes, self.dtype, self.chip, layout=layout, variant=variant, job=job)


def explain(text: str) -> str:
    """The plan for a problem, in words: what is launched, what it moves, and how long that takes."""
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
        lines += [
            f"{margin}of memory {memory:.3g}, of instructions {instructions:.3g}, of special functions {special:.3g}",
            f"{margin}limited by {took.decides}: about {whole + STARTED * 1e6:.3g} microseconds, {reached}",
        ]
    return "\n".join(lines)


def share(launch: Launch, took: Times, chip: Chip) -> float:
    """Of the speed of a copy (of a read, where no gradient is written): by the arrays alone, not what rows have."""
    arrays = launch.logits * (2 if launch.gradient else 1) + launch.more
    return arrays / (chip.bandwidth * 1e9 * (1 if launch.gradient else READ)) / took.all
