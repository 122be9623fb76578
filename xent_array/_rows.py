"""The canonical problem, its answer, and what is said of them once for every engine.

`Rows` describes softmax cross-entropy on logits viewed as (outer, C, inner); `RowStats` is what one read of
the logits tells of each row. The functions below hold the arithmetic that does not touch the logits: which
labels count, what multiplies a row, what divides the sum, how two parts of a row become one.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from array_api_compat import array_namespace
from array_api_compat import device as device

Array = Any  # an array of any Array-API library; the standard has no common base class
DType = Any


def namespace(array: Array) -> Any:
    """The Array-API functions of the library that made `array` (NumPy 2 is its own Array-API namespace)."""
    return np if isinstance(array, (np.ndarray, np.generic)) else array_namespace(array)


def index_dtype(xp: Any) -> DType:
    """The signed integers that the library indexes with."""
    return np.intp if xp is np else xp.__array_namespace_info__().default_dtypes()["indexing"]


class Rows(NamedTuple):
    """One problem: N = outer·inner rows of C logits each, and everything that is asked about them.

    Shapes: logits (outer, C, inner); target (outer, inner) for class indices, (outer, C, inner) for
    distributions, None to ask for the softmax alone; weight (C,); sample_weight and a per-row upstream (outer, inner).
    `acc` is the dtype of the arithmetic and of the loss. `row_order` is the user's shape of the rows, and the order of
    its axes that makes them (outer, inner); None where they are in that order anyhow. `all_labels_count` is True where
    it is already known that every label is a class and none is ignored; False promises nothing.
    """

    xp: Any
    logits: Array
    acc: DType
    target: Array | None = None
    weight: Array | None = None
    sample_weight: Array | None = None
    ignore_index: int | None = None
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float | None = None
    reduction: str = "none"
    upstream: Array | float | None = None
    row_order: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    all_labels_count: bool = False

    @property
    def classes(self) -> int:
        return int(self.logits.shape[1])

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of anything that has one number per row: (outer, inner)."""
        return self.logits.shape[0], self.logits.shape[2]

    @property
    def grad_dtype(self) -> DType:
        """The dtype of the logits, in native byte order."""
        dtype = self.logits.dtype
        return dtype if getattr(dtype, "isnative", True) else dtype.newbyteorder("=")

    @property
    def has_labels(self) -> bool:
        return self.target is not None and self.target.ndim == 2


class RowStats(NamedTuple):
    """What one read of the logits tells of each row, free of cancellation, mergeable over disjoint classes.

    With ``m`` the largest (capped) logit of a row and ``a`` its weighted, smoothed target:

    Attributes
    ----------
    max : array
        m
    rest : array
        ``sum(exp(x_k - m))`` over every class but the (first) one that holds m
    gap : array
        ``sum(a_k * (m - x_k))``
    mass : array
        ``sum(a_k)``

    All four have one number per row, in the dtype of the loss. ``lse``, ``loss`` and the others below follow from
    them. As a named tuple they are saved by ``ctx.save_for_backward(*stats)`` and are a JAX pytree.
    """

    max: Array
    rest: Array
    gap: Array
    mass: Array

    @property
    def tail(self) -> Array:
        """``log1p(rest)``, so that ``lse = max + tail``; NaN in a row that is all -inf or holds +inf or NaN."""
        xp = namespace(self.max)
        return xp.where(xp.isfinite(self.max), xp.log1p(self.rest), xp.nan)

    @property
    def lse(self) -> Array:
        """``log(sum(exp(x_k)))`` of each row."""
        return self.max + self.tail

    @property
    def loss(self) -> Array:
        """``sum(a_k * (lse - x_k))`` of each row: before z-loss, ignored rows and sample weights."""
        return self.gap + self.mass * self.tail

    @property
    def p_max(self) -> Array:
        """The probability of the (first) largest class, ``1 / (1 + rest)``."""
        xp = namespace(self.max)
        return xp.where(xp.isfinite(self.max), 1 / (1 + self.rest), xp.nan)


def merge(one: RowStats, two: RowStats) -> RowStats:
    """The stats of rows whose classes are split over two parts.

    A part that is all -inf changes nothing unless it holds target mass; 0·inf counts 0.
    """
    xp = namespace(one.max)
    first = one.max >= two.max
    half = xp.where(one.max == two.max, 0, xp.abs(one.max / 2 - two.max / 2))  # the whole may be beyond the range
    low_rest, low_mass = xp.where(first, two.rest, one.rest), xp.where(first, two.mass, one.mass)
    return RowStats(
        max=xp.maximum(one.max, two.max),
        rest=xp.where(first, one.rest, two.rest) + (1 + low_rest) * xp.exp(-2 * half),
        gap=one.gap + two.gap + xp.where((low_mass == 0) | (half == 0), 0, 2 * (low_mass * half)),
        mass=one.mass + two.mass,
    )


class Labels(NamedTuple):
    """Class indices that are safe to read with, and which of them count."""

    index: Array  # int, inside [0, C) everywhere
    valid: Array | None  # bool: a class was named; None: all of them
    ignored: Array | None  # bool: the row is ignored; None: no row


def labels(rows: Rows) -> Labels:
    xp, classes = rows.xp, rows.classes
    # What a signed index cannot hold wraps to a negative number, which is no class either.
    index = xp.astype(rows.target, index_dtype(xp), copy=False)
    if rows.all_labels_count:
        return Labels(index, None, None)
    valid = (index >= 0) & (index < classes)
    ignored = None if rows.ignore_index is None else index == rows.ignore_index
    return Labels(xp.where(valid, index, xp.zeros_like(index)), valid, ignored)


def row_factor(rows: Rows, known: Labels | None) -> Array | None:
    """What multiplies a row's loss: its sample weight, 0 if ignored, NaN under a bad label. None where all are 1."""
    xp, factor = rows.xp, rows.sample_weight
    if known is None or known.valid is None:
        return factor
    factor = xp.ones_like(known.index, dtype=rows.acc) if factor is None else factor
    inert = factor == 0 if known.ignored is None else known.ignored | (factor == 0)
    return xp.where(inert, xp.zeros_like(factor), xp.where(known.valid, factor, xp.full_like(factor, xp.nan)))


def denominator(rows: Rows, known: Labels | None, factor: Array | None, wide: DType) -> Array | float:
    """What the mean divides by: the rows that count, each with its sample weight and the class weight of its label."""
    xp = rows.xp
    if factor is None and (known is None or rows.weight is None):
        return float(rows.shape[0] * rows.shape[1])
    # In the wide dtype, which has room for a product of two weights.
    if factor is None:
        counted = xp.ones(rows.shape, dtype=wide, device=device(rows.logits))
    else:
        counted = xp.astype(factor, wide, copy=False)
    if known is not None and rows.weight is not None:
        of_label = xp.reshape(xp.take(rows.weight, xp.reshape(known.index, (-1,))), known.index.shape)
        counted = xp.where(counted == 0, counted, counted * xp.astype(of_label, wide, copy=False))
    if known is not None and known.valid is not None:
        # A bad label makes its own row NaN, and leaves the gradient of the others alone.
        counted = xp.where(known.valid, counted, xp.zeros_like(counted))
    return xp.sum(in_order(rows, counted), dtype=wide)


def in_order(rows: Rows, values: Array) -> Array:
    """One number per row, one after another as the user has them, so that no sum depends on how they lie in memory."""
    if rows.row_order is not None:
        shape, order = rows.row_order
        values = rows.xp.reshape(values, tuple(shape[k] for k in order))
        values = rows.xp.permute_dims(values, tuple(order.index(k) for k in range(len(order))))
    return values.ravel() if rows.xp is np else rows.xp.reshape(values, (-1,))


def divide(xp: Any, value: Array | float, by: Array | float) -> Array | float:
    """``value / by``, NaN where `by` is 0: a mean over nothing."""
    if isinstance(by, float):
        return value * xp.nan if by == 0 else value / by
    return xp.where(by == 0, xp.nan, value / xp.where(by == 0, xp.ones_like(by), by))


def row_scale(rows: Rows, factor: Array | None, divisor: Array | float | None) -> Array | float:
    """Everything that multiplies a row's gradient; exactly 0 in a row that does not count."""
    xp = rows.xp
    scale = 1.0 if rows.upstream is None else rows.upstream
    if divisor is not None:
        scale = divide(xp, scale, divisor)
    if not isinstance(scale, float):
        scale = xp.astype(scale, rows.acc, copy=False)
    return scale if factor is None else xp.where(factor == 0, xp.zeros_like(factor), factor * scale)


def row_loss(rows: Rows, stats: RowStats, factor: Array | None) -> Array:
    """The loss of each row as ``reduction="none"`` returns it."""
    xp = rows.xp
    loss = stats.loss
    if rows.z_loss:
        lse = stats.lse
        loss = loss + (rows.z_loss * lse) * lse  # lse² alone may overflow
    return loss if factor is None else xp.where(factor == 0, xp.zeros_like(loss), factor * loss)


def reduce_loss(rows: Rows, loss: Array, divisor: Array | float | None, wide: DType) -> Array:
    """Row losses to what the caller asked for, summed in the dtype `wide`."""
    if rows.reduction == "none":
        return loss
    total = rows.xp.sum(in_order(rows, loss), dtype=wide)
    return rows.xp.astype(total if divisor is None else divide(rows.xp, total, divisor), rows.acc)


def widest(rows: Rows) -> DType:
    """The dtype that row losses and weights are summed in: float64 where the library and its device have it."""
    there = rows.xp.__array_namespace_info__().dtypes(device=device(rows.logits), kind="real floating")
    return there.get("float64", rows.acc)


def terms(rows: Rows) -> tuple[Array | None, Array | float | None]:
    """(row factor, divisor of the mean or None): all that targets and weights say, before any logit is read."""
    known = labels(rows) if rows.has_labels else None
    factor = row_factor(rows, known)
    return factor, denominator(rows, known, factor, widest(rows)) if rows.reduction == "mean" else None


def marked(rows: Rows, stats: RowStats) -> RowStats:
    """The stats with a gap of NaN, and so a loss of NaN, in every row whose label is bad."""
    if not rows.has_labels or rows.all_labels_count:
        return stats
    _, valid, ignored = labels(rows)
    named = valid if ignored is None else valid | ignored
    return stats._replace(gap=rows.xp.where(named, stats.gap, rows.xp.full_like(stats.gap, rows.xp.nan)))


def finish(rows: Rows, stats: RowStats) -> Array:
    """The loss, from the stats of its rows."""
    factor, divisor = terms(rows)
    return reduce_loss(rows, row_loss(rows, stats, factor), divisor, widest(rows))
