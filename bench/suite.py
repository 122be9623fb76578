"""What is measured, as data: the cases, and the goals that a run should meet."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

LOSS, GRAD, OUT, IN_PLACE, COPY, READ = "loss", "loss+grad", "loss+grad out=", "loss+grad in place", "copy", "read"
COPY_BY_ONE = "copy by one thread"
EACH, EACH_OUT = "loss of each row", "loss of each row+grad out="  # no mean: one launch on a GPU, like QuACK's
ACROSS = "to the GPU and back"  # the logits there, a gradient of the same size back
COLD, WARM = "first call, nothing compiled", "first call, compiled before"
EVERY = (LOSS, GRAD, OUT, IN_PLACE, EACH, EACH_OUT, ACROSS)
OURS = "xent_array"
SCALE = "scale"  # the backend of what is larger than one array
THREADS = "threads"  # the backend whose cases each name a number of threads
TENSORS = "tensors"  # the backend whose libraries use the memory of NumPy arrays as PyTorch tensors and JAX arrays
AUTOGRAD, DETACHED, MODULE, EAGER = (
    f"{OURS} ({how})" for how in ("tensors, autograd", "tensors", "tensors, module", "JAX arrays")
)
OPTIONS = {  # None: an array of random weights
    "label_smoothing": 0.1,
    "weight": None,
    "sample_weight": None,
    "z_loss": 1e-4,
    "softcap": 30.0,
    "ignore_index": -100,  # the label of a quarter of the rows
}
EACH_OPTION = [name for name in OPTIONS if name != "ignore_index"]  # that large problems are timed with
INT32 = "int32 labels"
ITEMSIZE = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}


class Case(NamedTuple):
    """One problem, on which every library performs all of the operations that it supports."""

    group: str
    shape: tuple[int, ...]
    dtype: str = "float32"
    target: str = "labels"  # of int64; or INT32; or "soft": a distribution per row, in the dtype of the logits
    axis: int = -1
    memory: bool = False  # whether peak memory is measured too
    host: bool = False  # on a GPU: time the call as its caller sees it, not the device
    operations: tuple[str, ...] = EVERY[:-1]
    option: str = ""  # the keyword of an option that is given, with its value in OPTIONS
    peaked: bool = False  # whether 10 is added to the label's logit, as if the model were trained
    threads: int = 0  # for every library; 0: as many as the run has

    @property
    def name(self) -> str:
        shape = "x".join(map(str, self.shape))
        axis = "" if self.axis == -1 else f" axis={self.axis}"
        more = (f" {self.option}" if self.option else "") + (" peaked" if self.peaked else "")
        more += f" threads={self.threads}" if self.threads else ""
        return f"{self.group} {shape} {self.dtype} {self.target}{axis}{more}"

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def classes(self) -> int:
        return self.shape[self.axis]

    @property
    def has_labels(self) -> bool:
        return self.target != "soft"

    @property
    def nbytes(self) -> int:
        return self.size * ITEMSIZE[self.dtype]

    def must_move(self, operation: str) -> int:
        """The fewest bytes that the operation has to move: the target and the logits once, the gradient once."""
        if operation in (COPY, COPY_BY_ONE, READ, ACROSS):
            return self.nbytes * (1 if operation == READ else 2)
        label = 4 if self.target == INT32 else 8
        target = label * self.size // self.classes if self.has_labels else self.nbytes
        return target + self.nbytes * (1 if operation in (LOSS, EACH) else 2)


def case_of(fields: list[Any]) -> Case:
    """The case with these fields, as JSON returns them: with lists in place of tuples."""
    case = Case(*fields)
    return case._replace(shape=tuple(case.shape), operations=tuple(case.operations))


# The CPU's cases

LARGE = [(32768, 1000), (1024, 32000), (512, 128256)]
SMALL = [(8192, 256), (4096, 10), (32, 10)]
SIZES = [Case("sizes", shape, memory=shape == LARGE[0]) for shape in [*LARGE, *SMALL, (20000, 1000)]]
DTYPES = [
    Case("dtypes", shape, dtype, operations=(LOSS, GRAD)) for dtype in ("bfloat16", "float16") for shape in LARGE[:2]
]
DTYPES.append(Case("dtypes", LARGE[1], "float64", operations=(LOSS, GRAD)))
SOFT = [Case("soft", LARGE[0], target="soft", operations=(GRAD,))]
WITH_OPTION = [Case("options", LARGE[0], operations=(GRAD,), option=name) for name in EACH_OPTION]
SMALL_OPTIONS = [
    *(
        Case("small options", SMALL[1], operations=(GRAD,), option=name)
        for name in ("label_smoothing", "softcap", "ignore_index")
    ),
    *(Case("small options", shape, target=INT32, operations=(GRAD,)) for shape in SMALL[1:]),
]
FIRST = Case("first", (4096, 1000), operations=(COLD, WARM))  # each in a new process
CLASSES = [
    Case("classes", (2**24 // c, c), operations=(GRAD,)) for c in (2, 16, 64, 256, 1024, 4096, 16384, 65536, 262144)
]
ROWS = [Case("rows", (n, 1000), operations=(GRAD,)) for n in (512, 4096, 16384, 65536)]
AXIS = [
    Case("axis", (16, 21, 256, 256), axis=1, operations=(GRAD,)),
    Case("axis", (16 * 256 * 256, 21), operations=(GRAD,)),
    Case("axis", (8, 1000, 64, 64), axis=1, operations=(GRAD,)),
]
QUICK = [
    *(Case("quick", (64, 100), dtype, target) for dtype in ITEMSIZE for target in ("labels", "soft")),
    Case("quick", (2, 20000)),
    *(Case("quick", (64, 100), option=name) for name in EACH_OPTION),
    Case("quick", (2, 7, 5, 3), axis=1),
    *SIZES[4:6],
]

# PyTorch tensors and JAX arrays on the CPU

TENSOR_CASES = [
    *(Case(TENSORS, shape, operations=(GRAD,)) for shape in (SMALL[2], (4096, 1000), *LARGE[:2])),
    Case(TENSORS, (4000, 8000), operations=(GRAD,), memory=True),
]
TENSORS_QUICK = [TENSOR_CASES[0], Case(TENSORS, (2000, 1000), operations=(GRAD,))]

# Threads of a CPU


def thread_cases(shapes: Iterable[tuple[int, ...]], counts: Iterable[int]) -> list[Case]:
    """Each shape with each number of threads, also compared with a read."""
    operations = (LOSS, GRAD, OUT, READ)
    return [Case(THREADS, shape, operations=operations, threads=n) for shape in shapes for n in counts]


# The GPU's cases

CELLS = [*((32768, 256 * 2**k) for k in range(9)), (16384, 131072), (8192, 262144)]
COMPILED = (1024, 32768, 262144)  # classes for which torch.compile is timed: compiling takes seconds for each
GPU_CELLS = [Case("cells", shape, dtype) for dtype in ("float32", "bfloat16") for shape in CELLS]
HOST = Case("host", (128, 10), host=True)
_FEW = (GRAD, OUT, EACH, EACH_OUT)
_NARROW = ("float32", "bfloat16")
GPU_OTHER = [
    HOST,
    *(Case("peaked", (32768, c), dtype, operations=_FEW, peaked=True) for dtype in _NARROW for c in (1024, 32768)),
    *(Case("options", (32768, c), operations=_FEW, option=name) for c in (1000, 32000) for name in EACH_OPTION),
    *(Case("soft", (32768, c), dtype, "soft", operations=_FEW) for c in (1000, 32000) for dtype in _NARROW),
    *(Case("dtypes", shape, dtype, operations=_FEW) for shape in ((32768, 1000), (8192, 50257)) for dtype in ITEMSIZE),
    *(Case("few", (1 << 24, c), dtype, operations=_FEW) for c in (2, 10, 21) for dtype in _NARROW),
    *(
        Case("axis", shape, dtype, axis=1, operations=_FEW)
        for dtype in _NARROW
        for shape in ((16, 21, 512, 512), (4, 150, 512, 512), (64, 2, 1024, 1024), (8, 1000, 128, 128))
    ),
    *(Case("long", shape, operations=_FEW) for shape in ((64, 262144), (16, 1 << 22))),
]

# GPU against CPU: this library's two engines on the same problems and the same machine, over N at fixed C and over C at
# a fixed number of bytes. Not part of the CPU run, which is measured on another machine.

ENGINES_ROWS = [Case("engines", (n, 1000), operations=(GRAD, ACROSS)) for n in (64, 512, 4096, 32768)]
ENGINES_CLASSES = [Case("engines", (2**24 // c, c), operations=(GRAD, ACROSS)) for c in (16, 256, 4096, 65536)]
ENGINES = [*ENGINES_ROWS, *ENGINES_CLASSES]

# What the tables of README.md show: loss and gradient, and the loss alone

SHOWN = {
    "numpy": [*SIZES, *(case for case in DTYPES if case.shape == LARGE[1]), *SOFT, AXIS[0], *WITH_OPTION],
    "cupy": [*GPU_CELLS, *GPU_OTHER],
}
SHOWN_LOSS = {
    "numpy": SIZES[:6],
    "cupy": [case for case in GPU_CELLS if case.classes in (256, 1024, 4096, 16384, 65536, 262144)],
}


def cases(backend: str, quick: bool) -> list[Case]:
    if backend == TENSORS:
        return TENSORS_QUICK if quick else TENSOR_CASES
    if quick:
        return QUICK
    if backend == "cupy":
        return [*GPU_CELLS, *GPU_OTHER, *ENGINES]
    return [*SIZES, *DTYPES, *SOFT, *WITH_OPTION, *SMALL_OPTIONS, FIRST, *CLASSES, *ROWS, *AXIS]


# The goals

Rows = Mapping[tuple[str, str, str], Mapping[str, Any]]  # those that were timed, by case, library and operation


class Goal(NamedTuple):
    """A number that a run should reach; `value` returns None if the cases that it needs were not run."""

    text: str
    bound: float
    at_least: bool
    value: Callable[[Rows], float | None]

    def met(self, value: float) -> bool:
        return value >= self.bound if self.at_least else value <= self.bound


def _ratio(over: tuple[Case, str, str], under: tuple[Case, str, str], bound: float, at_least: bool = True) -> Goal:
    """The time of `over` divided by that of `under`."""
    keys = [(case.name, library, operation) for case, library, operation in (over, under)]

    def value(rows: Rows) -> float | None:
        a, b = (rows.get(key) for key in keys)
        return None if a is None or b is None else a["seconds"] / b["seconds"]

    (case, library, operation), (other_case, other, other_operation) = over, under
    above = library if operation == other_operation else f"{library} {operation}"
    below = f"{other} {other_operation}" + ("" if case == other_case else f" of {other_case.name}")
    return Goal(f"{case.name}: {above} / {below}", bound, at_least, value)


def _share(case: Case, operation: str, field: str, bound: float) -> Goal:
    """Our throughput as a share of that of a copy, or of a read."""

    def value(rows: Rows) -> float | None:
        row = rows.get((case.name, OURS, operation))
        return None if row is None else row[field]

    return Goal(f"{case.name}: {OURS} {operation}, share {field.replace('_', ' a ')}", bound, True, value)


def _spread(text: str, cases: Iterable[Case], bound: float) -> Goal:
    """The largest time per logit of loss and gradient divided by the smallest."""
    cases = list(cases)

    def value(rows: Rows) -> float | None:
        found = [rows.get((case.name, OURS, GRAD)) for case in cases]
        if any(row is None for row in found):
            return None
        per_logit = [row["seconds"] / case.size for row, case in zip(found, cases, strict=True) if row is not None]
        return max(per_logit) / min(per_logit)

    return Goal(text, bound, False, value)


def _against(peer: str, case: Case, bound: float, operation: str = GRAD, ours: str | None = None) -> Goal:
    return _ratio((case, peer, operation), (case, OURS, ours or operation), bound)


def _cpu_goals() -> list[Goal]:
    by_shape = {case.shape: case for case in SIZES}
    large = [by_shape[shape] for shape in LARGE]
    medium, small, tiny = (by_shape[shape] for shape in SMALL)
    few = {case.classes: case for case in CLASSES}
    return [
        *(_against("torch", case, 5) for case in large),
        *(_against("torch", case, 6.5, GRAD, OUT) for case in large),
        *(_against("torch", case, bound) for case, bound in ((medium, 2), (small, 3), (tiny, 1.2))),
        *(_against("torch", case, 3, LOSS) for case in large),
        *(_against("torch", case, bound, LOSS) for case, bound in ((medium, 1), (small, 2), (tiny, 0.8))),
        *(_against("JAX", case, 2.5) for case in large),
        _against("JAX", medium, 1.3),
        _against("scikit-learn", by_shape[20000, 1000], 3),
        *(_ratio((case, OURS, OUT), (case, COPY, COPY), 2, at_least=False) for case in large),
        # In float16, the sum in PyTorch's mean overflows at 32768 rows: the result is wrong, and not timed.
        *(
            _against("torch", case, 3 if case.dtype == "float64" else 2)
            for case in DTYPES
            if case.dtype != "float16" or case.shape == LARGE[1]
        ),
        _spread(
            "time per logit, slowest / fastest of C = 256 to 262144", (c for c in CLASSES if c.classes >= 256), 1.5
        ),
        _spread("time per logit, slowest / fastest of N = 4096 to 65536", (c for c in ROWS if c.shape[0] >= 4096), 1.5),
        _ratio((AXIS[0], OURS, GRAD), (AXIS[1], OURS, GRAD), 1.5, at_least=False),
        _ratio((AXIS[2], OURS, GRAD), (large[0], OURS, GRAD), 1.5, at_least=False),
        # What label_smoothing, softcap, ignore_index and int32 labels cost a small call; int32 labels, a tiny one too.
        *(
            _ratio((case, OURS, GRAD), (by_shape[case.shape], OURS, GRAD), bound, at_least=False)
            for case, bound in zip(SMALL_OPTIONS, (1.5, 3, 1.2, 1.1, 1.5), strict=True)
        ),
        *(
            _ratio((few[classes], OURS, GRAD), (few[classes], COPY, COPY), bound, at_least=False)
            for classes, bound in ((2, 4), (16, 1.6), (64, 1.4))
        ),
    ]


def _gpu_goals() -> list[Goal]:
    """What `bench.model` predicts for the timed cases; also that no peer is faster by more than timing errors."""
    long = {131072: 0.93, 262144: 0.90}
    return [
        *(_share(case, EACH_OUT, "of_copy", long.get(case.classes, 0.96)) for case in GPU_CELLS),
        *(_share(case, EACH, "of_read", 0.97 if case.classes >= 1024 else 0.93) for case in GPU_CELLS),
        *(_against(peer, case, bound) for case in GPU_CELLS for peer, bound in (("torch", 3), ("Liger", 1.4))),
        *(_against("torch.compile", case, 1.4) for case in GPU_CELLS if case.classes in COMPILED),
        *(_against("QuACK", case, 0.98, EACH_OUT) for case in GPU_CELLS),
        *(_against("QuACK", case, 0.98, EACH) for case in GPU_CELLS),
        _against("torch", HOST, 1),
    ]


GOALS = {"numpy": _cpu_goals(), "cupy": _gpu_goals()}
