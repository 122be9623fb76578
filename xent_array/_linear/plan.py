"""How much is computed at a time: a pure function of sizes and of a budget of memory.

The logits of N rows and C classes are made tile by tile: n rows by c classes. If a tile has all classes, the loss and
the gradient of its rows come from one read of it, and there are three products of matrices in all. Otherwise the stats
of all rows are computed first and merged over the blocks of classes, and every tile is computed a second time for its
gradient: four products. Inputs in 16 bits are converted to the dtype of the arithmetic, part by part, and a gradient of
such a dtype is summed in that of the arithmetic and rounded once, which takes room; if there is too little, the two
gradients are computed one after the other, from a third computation of the tiles: five products.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

MIB = 1 << 20
DEFAULT_BUDGET = {"cpu": 64 * MIB, "gpu": 256 * MIB}
LEAST_ROWS, LEAST_CLASSES = 16, 64  # of a tile, unless there are fewer in all
SCRATCH = 8 * MIB  # the most for a part of a product: beyond that it is no faster, and this stays in cache
OVERHEAD = 48  # rows, or classes, whose products take as long as what a product costs beside its arithmetic

GENERIC = 10  # arrays of the size of its logits that the engine "generic" makes

ITEMSIZE = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}


class Sizes(NamedTuple):
    """What a plan depends on, beside the budget."""

    rows: int  # that count
    features: int
    classes: int
    item: int  # bytes of a number of the inputs
    acc: int  # bytes of a number of the arithmetic, and so of a logit
    wants_hidden: bool = True  # the gradient of the hidden states
    wants_weight: bool = True  # the gradients of weight and bias
    adds: bool = False  # the library has a product that adds to its result
    copies_hidden: bool = False  # rows are picked, converted, or have strides that no product takes
    copies_weight: bool = False
    scatters: bool = False  # the rows of the gradient of the hidden states do not lie side by side
    rounds_grad: bool = False  # the gradient of the logits is converted to the dtype of the inputs
    target: int = 0  # bytes of a number of a distribution whose rows are picked
    temporaries: int = 0  # arrays of the size of a tile that the engine makes
    of_slices: int = 0  # the same, of the engine for tiles that do not have all classes

    @property
    def is_narrow(self) -> bool:
        """Whether sums are rounded when they become results."""
        return self.item < self.acc

    @property
    def wants_grad(self) -> bool:
        return self.wants_hidden or self.wants_weight


class Plan(NamedTuple):
    """The size of a tile, and the bytes of every buffer."""

    rows: int
    classes: int
    part: int  # rows of the scratch buffer, through which a product reaches its place
    together: bool  # both gradients from the same tiles
    products: int  # of matrices, each of all rows and classes in all
    chunks: int  # of rows
    blocks: int  # of classes
    buffers: dict[str, int]

    @property
    def needs(self) -> int:
        """Bytes of all buffers."""
        return sum(self.buffers.values())


def plan(sizes: Sizes, budget: int) -> Plan:
    """The fastest tiles whose buffers fit in the budget, in bytes.

    Raises ValueError if not even the smallest do.
    """
    if budget < (least := needed(sizes)):
        raise ValueError(
            f"memory_budget must be at least {least} bytes ({shown(least)}) for {sizes.rows} rows of {sizes.features}"
            f" features and {sizes.classes} classes; got {budget} bytes ({shown(budget)})"
        )
    whole = _made(sizes, sizes.rows, sizes.classes, _part(sizes, budget), True)
    return whole if whole.needs <= budget else min(_fitting(sizes, budget), key=_cost)


plan_of = lru_cache(maxsize=256)(plan)


def needed(sizes: Sizes) -> int:
    """The bytes that the smallest tiles need."""
    return min(each.needs for each in _smallest(sizes))


def _smallest(sizes: Sizes) -> list[Plan]:
    """Small tiles, and those that have all rows or classes and so need no sums."""
    rows, classes = {min(sizes.rows, LEAST_ROWS), sizes.rows}, {min(sizes.classes, LEAST_CLASSES), sizes.classes}
    every = itertools.product(sorted(rows), sorted(classes), (True, False))
    return [_made(sizes, n, c, LEAST_ROWS, together) for n, c, together in every]


def _fitting(sizes: Sizes, budget: int) -> Iterator[Plan]:
    """For ever fewer classes in a tile, the most rows that fit."""
    yield from (each for each in _smallest(sizes) if each.needs <= budget)
    part, blocks = _part(sizes, budget), 1
    while True:
        classes = -(-sizes.classes // blocks)
        if blocks > 1:
            classes = -(-classes // LEAST_ROWS) * LEAST_ROWS  # whole lines of cache
        for together in (True, False):
            if (found := _most_rows(sizes, classes, part, together, budget)) is not None:
                yield found
        if classes <= LEAST_CLASSES:
            return
        blocks = max(blocks + 1, blocks * 5 // 4)


def _part(sizes: Sizes, budget: int) -> int:
    """The rows of a part of a product."""
    return max(LEAST_ROWS, min(SCRATCH, budget // 8) // max(1, sizes.features * sizes.acc))


def _most_rows(sizes: Sizes, classes: int, part: int, together: bool, budget: int) -> Plan | None:
    """The plan with the most rows in a tile of that many classes; None if none fits."""
    whole = _made(sizes, sizes.rows, classes, part, together)
    if whole.needs <= budget:
        return whole
    low, high = min(sizes.rows, LEAST_ROWS), max(sizes.rows - 1, 1)  # low is tried last: it fits, or nothing does
    while low < high:
        middle = (low + high + 1) // 2
        if _made(sizes, middle, classes, part, together).needs <= budget:
            low = middle
        else:
            high = middle - 1
    even = -(-sizes.rows // -(-sizes.rows // low))  # as many chunks, of about equal length
    for rows in (-(-even // LEAST_ROWS) * LEAST_ROWS, even):
        found = _made(sizes, rows, classes, part, together)
        if rows <= low and found.needs <= budget:
            return found
    return None


def _made(sizes: Sizes, rows: int, classes: int, part: int, together: bool) -> Plan:
    """The plan of tiles of that size, whether it fits or not."""
    features, acc = sizes.features, sizes.acc
    chunks = -(-sizes.rows // rows) if rows else 1
    blocks = -(-sizes.classes // classes)
    adds_weight, adds_hidden = sizes.wants_weight and chunks > 1, sizes.wants_hidden and blocks > 1
    together = together or not (sizes.wants_weight and sizes.wants_hidden)
    part = min(part, max(rows, classes))
    again = 0 if blocks == 1 or not sizes.wants_grad else 1 if together else 2
    products = 1 + again + sizes.wants_weight + sizes.wants_hidden
    if not sizes.rows:
        return Plan(0, classes, part, together, products, chunks, blocks, {})
    buffers = {"logits": rows * classes * acc}
    if temporaries := sizes.temporaries if blocks == 1 else sizes.of_slices:
        buffers["the engine's own"] = temporaries * rows * classes * acc
    if sizes.rounds_grad and sizes.wants_grad:
        buffers["gradient of the logits"] = rows * classes * sizes.item
    if sizes.copies_hidden:
        buffers["hidden"] = rows * features * acc
    if sizes.copies_weight:
        buffers["linear_weight"] = classes * features * acc
    if sizes.target:
        buffers["target"] = rows * classes * sizes.target
    if sizes.wants_grad and (sizes.is_narrow or sizes.scatters or (not sizes.adds and (adds_weight or adds_hidden))):
        buffers["a part of a product"] = part * features * acc
    if sizes.is_narrow and adds_weight:
        buffers["sums of the gradient of linear_weight"] = classes * features * acc
    if sizes.is_narrow and adds_hidden:
        buffers["sums of the gradient of hidden"] = (sizes.rows if together else rows) * features * acc
    return Plan(rows, classes, part, together, products, chunks, blocks, buffers)


def _cost(plan: Plan) -> tuple[float, int]:
    """About how long a plan takes, in products of large matrices; of equal ones the smaller is better."""
    beside = OVERHEAD / max(plan.rows, 1) + OVERHEAD / max(plan.classes, 1)
    return plan.products * (1 + beside), plan.needs


# Budgets and problems in words

_UNITS = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 1 << 10, "mib": MIB, "gib": 1 << 30}
_BUDGET = re.compile(r"\s*(\d+(?:\.\d*)?)\s*([a-z]+)\s*", re.IGNORECASE)


def bytes_of(text: str) -> int | None:
    """The bytes that a text such as "64MB" or "1.5 GiB" names; None if it names none."""
    found = _BUDGET.fullmatch(text)
    if found is None or found[2].lower() not in _UNITS:
        return None
    return int(float(found[1]) * _UNITS[found[2].lower()])


def shown(count: int) -> str:
    """Bytes, in the unit that suits them."""
    for unit, size in (("GiB", 1 << 30), ("MiB", MIB), ("KiB", 1 << 10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"


LIKE = "ROWSxFEATURESxCLASSES:DTYPE[@BUDGET][+loss][+gpu], like 8192x512x50257:float32@64MiB"
_PROBLEM = re.compile(r"(\d+)x(\d+)x(\d+):([a-z]+\d+)(?:@([\d.]+ ?[a-z]+))?((?:\+(?:loss|gpu))*)", re.IGNORECASE)


def explain(text: str) -> str:
    """The plan of the problem that a text like `LIKE` names: on NumPy arrays, or on CuPy arrays with ``+gpu``."""
    found = _PROBLEM.fullmatch(text)
    budget = None if found is None or found[5] is None else bytes_of(found[5])
    if found is None or found[4] not in ITEMSIZE or (found[5] is not None and budget is None):
        raise ValueError(f"{text!r} is not {LIKE}")
    rows, features, classes, dtype = int(found[1]), int(found[2]), int(found[3]), found[4]
    wants, where = "+loss" not in found[6], "gpu" if "+gpu" in found[6] else "cpu"
    item, acc = ITEMSIZE[dtype], max(ITEMSIZE[dtype], 4)
    narrow = item < acc
    sizes = Sizes(rows, features, classes, item, acc, wants, wants, where == "gpu", narrow, narrow)
    if classes < 1:
        raise ValueError(f"{text!r} has no classes")
    if budget is None:
        budget = max(DEFAULT_BUDGET[where], needed(sizes))
    made = plan(sizes, budget)
    library, each = ("CuPy", "GPU") if where == "gpu" else ("NumPy", "CPU")
    lines = [
        f"{rows} rows of {features} features, {classes} classes, {dtype}; {library} arrays on a {each}",
        (
            f"{made.chunks} × {made.rows} rows, {made.blocks} × {made.classes} classes at a time;"
            f" {made.products} products of all rows and classes"
        ),
        f"logits as a whole: {shown(rows * classes * item)}",
        *(f"  {name:40} {shown(size):>10}" for name, size in made.buffers.items()),
        f"  {'in all':40} {shown(made.needs):>10}, of a budget of {shown(budget)}",
    ]
    return "\n".join(lines)
