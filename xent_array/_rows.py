"""The canonical problem, its answer, and the arithmetic on them that all engines share.

`Rows` describes softmax cross-entropy on logits viewed as (outer, C, inner). `RowStats` holds what one read of the
logits yields for each row. The functions below hold the arithmetic that does not touch the logits: which labels count,
what multiplies a row, what divides the sum, and how two parts of a row are merged.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from array_api_compat import array_namespace, is_jax_array
from array_api_compat import device as _device

DASK = "array_api_compat.dask.array"  # the name of the functions of Dask

Array = Any  # an array of any Array-API library; the standard has no common base class
DType = Any


def namespace(array: Array) -> Any:
    """The Array-API functions of the library that made `array` (NumPy 2 is its own Array-API namespace)."""
    if isinstance(array, (np.ndarray, np.generic)):
        return np
    # For JAX, array_namespace creates an array as a test, which a transfer guard may forbid.
    return array.__array_namespace__() if is_jax_array(array) else array_namespace(array)


# What a library must have of the Array API 2023.12, beside dtypes and the methods of its arrays.
FUNCTIONS = (
    "__array_namespace_info__", "abs", "any", "arange", "argmax", "asarray", "astype", "concat", "exp", "expand_dims",
    "finfo", "iinfo", "isfinite", "log1p", "max", "maximum", "min", "ones", "ones_like", "permute_dims", "reshape",
    "sum", "take", "tanh", "where", "zeros_like",
)  # fmt: skip


@cache
def lacks(xp: Any) -> list[str]:
    """The names in FUNCTIONS that a library does not have."""
    return [name for name in FUNCTIONS if not hasattr(xp, name)]


def place(array: Array) -> Any:
    """The device of an array, or the set of devices it is spread over; None while its library may still choose one."""
    if not hasattr(array, "__dlpack_device__"):  # JAX under a transformation; Dask
        return None
    if not hasattr(array, "sharding"):
        return _device(array)
    devices = array.sharding.device_set if array.committed else ()  # JAX moves arrays that are not committed
    return frozenset(devices) if len(devices) > 1 else next(iter(devices), None)


def device(array: Array) -> Any:
    """The device on which to create an array that will be combined with `array`; None lets the library choose."""
    there = place(array)
    return None if isinstance(there, frozenset) else there


def is_traced(array: Array) -> bool:
    """Whether an array has no values to read: it is traced, lazy, recorded, or on a meta device."""
    if isinstance(array, np.ndarray):
        return False
    if not hasattr(array, "__dlpack_device__"):  # JAX under a transformation; Dask
        return True
    if not hasattr(array, "data_ptr"):
        return False
    torch, recorder = sys.modules["torch"], sys.modules.get("torch.fx.experimental.proxy_tensor")
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or (recorder and recorder.get_proxy_mode()):
        return True
    try:  # a fake tensor's storage is that of a meta tensor; a tensor wrapped by a function transform has none
        return array.untyped_storage().device.type == "meta" or (array.data_ptr() == 0 and 0 not in array.shape)
    except RuntimeError:
        return True


def index_dtype(xp: Any, where: Any = None) -> DType:
    """The signed integer dtype that the library uses for indexing on the device `where`."""
    return np.intp if xp is np else xp.__array_namespace_info__().default_dtypes(device=where)["indexing"]


def signed(xp: Any, target: Array) -> Array:
    """Labels as signed integers, one for one; those that are too large become negative, which are no classes either."""
    dtype = index_dtype(xp, device(target))
    if xp.iinfo(target.dtype).bits > xp.iinfo(dtype).bits:
        dtype = xp.int64
    return xp.astype(target, dtype, copy=False)


def is_ignored(xp: Any, index: Array, ignore_index: int) -> Array:
    """Which labels, as returned by `signed`, equal `ignore_index`, an integer that their original dtype can hold."""
    largest = int(xp.iinfo(index.dtype).max)
    return index == (ignore_index if ignore_index <= largest else ignore_index - 2 * (largest + 1))


def quiet(xp: Any) -> AbstractContextManager[Any]:
    """A context in which the library calculates without warnings: here infinities and NaN are results.

    For JAX, a Python number combined with an array on a device is a transfer, which JAX's transfer guard may forbid.
    These transfers are our own, never of a user's array, so they are allowed.
    """
    if xp.__name__ == "jax.numpy":
        allowed: AbstractContextManager[Any] = sys.modules["jax"].transfer_guard("allow")
        return allowed
    return np.errstate(all="ignore")


def nan_unless(xp: Any, good: Array, values: Array) -> Array:
    """`values`, with NaN where `good` is false.

    If all are good, no NaN is created, because a debugger might stop at one.
    """
    if xp is np or xp.__name__ == DASK:
        return xp.where(good, values, values.dtype.type(np.nan))  # with the same sign on every processor
    with quiet(xp):
        return xp.where(good, values, xp.zeros_like(values)) / xp.astype(good, values.dtype)


IGNORE_INDEX = -100


class Asked(NamedTuple):
    """The options of a call, as the user passed them."""

    axis: Any = -1
    reduction: Any = "mean"
    weight: Any = None
    sample_weight: Any = None
    ignore_index: Any = IGNORE_INDEX
    label_smoothing: Any = 0.0
    z_loss: Any = 0.0
    softcap: Any = None
    denominator: Any = None
    validate: Any = None
    engine: Any = None
    grad_output: Any = None


class Attempt(NamedTuple):
    """A call that has failed in a check, as far as it got: its arguments are as the user passed them.

    It wanted "stats", or "row_stats", with `correct`, or only a "grad" from stats that are known.
    """

    wants: str
    logits: Any
    target: Any
    axis: Any
    validate: bool


class Rows(NamedTuple):
    """One problem: N = outer·inner rows of C logits each, with the target and all options.

    Shapes: logits (outer, C, inner); target (outer, inner) for class indices, (outer, C, inner) for distributions, None
    for the softmax alone; weight (C,); sample_weight and a per-row upstream (outer, inner). `acc` is the dtype of the
    arithmetic and of the loss. `denominator` is what the mean divides by if the caller chose it: a number, or a 0-d
    array in the widest dtype. `row_order` holds the user's shape of the rows and the order in which its axes form
    (outer, inner); None if they are in that order already. `all_labels_count` is True if it is already known that every
    label is a class and none is ignored; False means nothing is known. `validate` is True if the caller wants to wait
    for whatever can be checked. `check` is called as ``check(target, sample_weight, first=index)`` with parts of labels
    that have no values yet, when they have: it raises IndexError for one that is no class, and returns whether all
    count; `index` says where the parts begin. For Dask arrays `Blocks` are in the place of arrays (see the engine
    "dask").

    The logits may be those of a slice of the classes, which begins at class `start` of `vocabulary`; that is 0 if all
    classes are here. Labels and class weights are then those of the whole vocabulary, distributions those of the slice.
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
    denominator: Array | float | None = None
    row_order: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    all_labels_count: bool = False
    check: Callable[..., bool] | None = None
    start: int = 0
    vocabulary: int = 0
    validate: bool = False

    @property
    def classes(self) -> int:
        return int(self.logits.shape[1])

    @property
    def is_slice(self) -> bool:
        """Whether the logits are those of some classes only. Labels and weights are those of all classes."""
        return self.vocabulary != 0

    @property
    def all_classes(self) -> int:
        return self.vocabulary or self.classes

    @property
    def class_weight(self) -> Array | None:
        """The weights of the classes that are here."""
        if self.weight is None or not self.is_slice:
            return self.weight
        return self.weight[self.start : self.start + self.classes]

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
    """Per-row statistics, as returned by `row_stats`: ``lse``, ``loss``, ``max`` and ``p_max``, and what is stored.

    ``lse`` is the logsumexp of a row, ``loss`` its loss, ``max`` its largest logit, and ``p_max`` the probability of
    the class that has it.

    With ``x`` the logits of a row after softcap, ``m`` the largest of them, and ``a`` the weighted and smoothed target,
    ``lse = log(sum(exp(x_k)))`` and ``loss = sum(a_k * (lse - x_k))``. Both are computed from four stored parts, which
    are free of cancellation and can be merged over disjoint sets of classes. Every array has one number per row, in the
    shape of the rows (that of the logits without the class axis).

    Parameters
    ----------
    max : array
        ``m``, in the dtype of the loss, as are the next three.
    rest : array
        ``sum(exp(x_k - m))`` over every class but the first one that holds ``m``.
    gap : array
        ``sum(a_k * (m - x_k))``.
    mass : array
        ``sum(a_k)``.
    correct : array of bool or None, default None
        Whether the label is the class that ``argmax`` of the logits names, the first if several are largest. False in a
        row that is ignored, has a bad label or is NaN. None if the target is a distribution.

    Attributes
    ----------
    lse : array
        The logsumexp, ``max + tail``. NaN in a row that is all -inf, or that contains +inf or NaN.
    loss : array
        The loss before z-loss and sample weights, ``gap + mass * tail``. NaN under a bad label.
    p_max : array
        The probability of the first class that holds ``m``, ``1 / (1 + rest)``.
    tail : array
        ``log1p(rest)``.

    See Also
    --------
    row_stats : Returns these statistics.
    cross_entropy_grad : Accepts them in place of a second reduction.

    Notes
    -----
    The parameters are the stored fields; the attributes are computed on access. As a named tuple, an object can be
    saved with ``ctx.save_for_backward(*stats)`` and restored with ``RowStats(*saved)``, and is a JAX pytree.

    Examples
    --------
    >>> import numpy as np
    >>> from xent_array import RowStats, row_stats
    >>> stats = row_stats(np.array([[2, 1, 0.1], [0.1, 2, 1.9]]), np.array([1, 1]))
    >>> stats.lse.round(3), stats.loss.round(3), stats.correct
    (array([2.417, 2.72 ]), array([1.417, 0.72 ]), array([False,  True]))
    >>> saved = tuple(stats)
    >>> RowStats(*saved).max
    array([2., 2.])
    """

    max: Array
    rest: Array
    gap: Array
    mass: Array
    correct: Array | None = None

    @property
    def tail(self) -> Array:
        """``log1p(rest)``, so that ``lse = max + tail``; NaN in a row that is all -inf or contains +inf or NaN."""
        xp = namespace(self.max)
        return nan_unless(xp, xp.isfinite(self.max), xp.log1p(self.rest))

    @property
    def lse(self) -> Array:
        """``log(sum(exp(x_k)))`` of each row."""
        return self.max + self.tail

    @property
    def loss(self) -> Array:
        """``sum(a_k * (lse - x_k))`` of each row: the loss before z-loss and sample weights."""
        return self.gap + self.mass * self.tail

    @property
    def p_max(self) -> Array:
        """The probability of the first class with the largest logit, ``1 / (1 + rest)``."""
        xp = namespace(self.max)
        with quiet(xp):
            return nan_unless(xp, xp.isfinite(self.max), 1 / (1 + self.rest))


def merge(one: RowStats, two: RowStats) -> RowStats:
    """The stats of rows whose classes are split over two parts, of which the first has the lower indices.

    A part that is all -inf changes nothing unless it holds target mass; 0·inf counts as 0.
    """
    xp = namespace(one.max)
    first = one.max >= two.max
    zero = xp.zeros_like(one.max)
    differ = one.max != two.max
    ours, theirs = xp.where(differ, one.max, zero), xp.where(differ, two.max, zero)
    half = xp.abs(ours / 2 - theirs / 2)  # the difference itself may overflow
    low_rest, low_mass = xp.where(first, two.rest, one.rest), xp.where(first, two.mass, one.mass)
    has_none = (low_mass == 0) | (half == 0)
    merged = RowStats(
        max=xp.maximum(one.max, two.max),
        rest=xp.where(first, one.rest, two.rest) + (1 + low_rest) * xp.exp(-2 * half),
        gap=one.gap + two.gap + 2 * (xp.where(has_none, zero, low_mass) * xp.where(has_none, zero, half)),
        mass=one.mass + two.mass,
    )
    if one.correct is None or two.correct is None:
        return merged
    lse = merged.lse
    return merged._replace(correct=xp.where(first, one.correct, two.correct) & (lse == lse))


def merged(stats: Sequence[RowStats]) -> RowStats:
    """The same for any number of parts, in the order of their classes. Pairwise, so few merges follow each other."""
    parts = list(stats)
    while len(parts) > 1:
        pairs = zip(parts[::2], parts[1::2], strict=False)
        parts = [merge(*pair) for pair in pairs] + parts[len(parts) & ~1 :]
    return parts[0]


def no_classes(rows: Rows, is_marked: bool) -> RowStats:
    """The stats of a slice without classes; `is_marked`: as users see them."""
    xp, where = rows.xp, device(rows.logits)
    zero = xp.zeros_like(xp.ones(rows.shape, dtype=rows.acc, device=where))
    correct = None if not (is_marked and rows.has_labels) else xp.astype(zero, xp.bool)
    return RowStats(zero - xp.inf, zero, zero, zero, correct)


class Labels(NamedTuple):
    """Class indices that are safe to index with, and which of them count."""

    index: Array  # int, within [0, C) everywhere
    valid: Array | None  # bool: the label is a class; None: all of them are
    ignored: Array | None  # bool: the row is ignored; None: no row is
    here: Array | None = None  # bool: the logits include that class; None: they include all classes


def labels(rows: Rows) -> Labels:
    xp, index, valid, ignored, here = rows.xp, signed(rows.xp, rows.target), None, None, None
    if not rows.all_labels_count:
        valid = (index >= 0) & (index < rows.all_classes)
        ignored = None if rows.ignore_index is None else is_ignored(xp, index, rows.ignore_index)
    known = valid
    if rows.is_slice:
        known = here = (index >= rows.start) & (index < rows.start + rows.classes)
        index = index - rows.start
    return Labels(index if known is None else xp.where(known, index, xp.zeros_like(index)), valid, ignored, here)


def known_labels(rows: Rows) -> Labels | None:
    """`labels`, or None if there are none, or if each is a class that is here."""
    return labels(rows) if rows.has_labels and (rows.is_slice or not rows.all_labels_count) else None


def row_factor(rows: Rows, known: Labels | None) -> Array | None:
    """What multiplies a row's loss: its sample weight, 0 if ignored, NaN for a bad label; None if 1 in every row."""
    xp, factor = rows.xp, rows.sample_weight
    if known is None or known.valid is None:
        return factor
    factor = xp.ones_like(known.index, dtype=rows.acc) if factor is None else factor
    inert = factor == 0 if known.ignored is None else known.ignored | (factor == 0)
    return nan_unless(xp, inert | known.valid, xp.where(inert, xp.zeros_like(factor), factor))


def denominator(rows: Rows, known: Labels | None, factor: Array | None, wide: DType) -> Array | float:
    """What the mean divides by: the caller's denominator, if there is one.

    Otherwise the number of rows that count, each multiplied by its sample weight and the class weight of its label.
    """
    if rows.denominator is not None:
        return rows.denominator
    xp = rows.xp
    count = rows.shape[0] * rows.shape[1]
    if factor is None and (known is None or rows.weight is None) and isinstance(count, int):  # else it is symbolic
        return float(count)
    # In the wide dtype, where a product of two weights does not overflow.
    if factor is None:
        counted = xp.ones(rows.shape, dtype=wide, device=device(rows.logits))
    else:
        counted = xp.astype(factor, wide, copy=False)
    if known is not None and rows.weight is not None:
        index = known.index
        if rows.is_slice:
            index = signed(xp, rows.target)
            index = index if known.valid is None else xp.where(known.valid, index, xp.zeros_like(index))
        of_label = xp.reshape(xp.take(rows.weight, xp.reshape(index, (-1,))), index.shape)
        counted = xp.where(counted == 0, counted, counted * xp.astype(of_label, wide, copy=False))
    if known is not None and known.valid is not None:
        # A bad label makes its own row NaN and must not change the gradient of the others.
        counted = xp.where(known.valid, counted, xp.zeros_like(counted))
    return xp.sum(in_order(rows, counted), dtype=wide)


def in_order(rows: Rows, values: Array) -> Array:
    """Values per row as one sequence in the user's order, so that no sum depends on the layout in memory."""
    if rows.row_order is not None:
        shape, order = rows.row_order
        values = rows.xp.reshape(values, tuple(shape[k] for k in order))
        values = rows.xp.permute_dims(values, tuple(order.index(k) for k in range(len(order))))
    return values.ravel() if rows.xp is np else rows.xp.reshape(values, (-1,))


def from_order(rows: Rows, values: Array) -> Array:
    """The reverse of `in_order`."""
    if rows.row_order is not None:
        shape, order = rows.row_order
        values = rows.xp.permute_dims(rows.xp.reshape(values, shape), order)
    return rows.xp.reshape(values, rows.shape)


def divide(xp: Any, value: Array | float, by: Array | float) -> Array | float:
    """``value / by``, or NaN if `by` is 0, as in a mean over nothing."""
    if isinstance(by, float):
        return value * xp.nan if by == 0 else value / by
    return nan_unless(xp, by != 0, value / xp.where(by == 0, xp.ones_like(by), by))


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
    """The row losses reduced as the caller asked, summed in the dtype `wide`."""
    if rows.reduction == "none":
        return loss
    total = rows.xp.sum(in_order(rows, loss), dtype=wide)
    return rows.xp.astype(total if divisor is None else divide(rows.xp, total, divisor), rows.acc)


def widest(rows: Rows) -> DType:
    """The dtype in which row losses and weights are summed: float64 if the library has it on this device."""
    there = rows.xp.__array_namespace_info__().dtypes(device=device(rows.logits), kind="real floating")
    return there.get("float64", rows.acc)


def terms(rows: Rows) -> tuple[Array | None, Array | float | None]:
    """(row factor, divisor of the mean or None): what targets and weights determine before any logit is read."""
    known = labels(rows) if rows.has_labels else None
    factor = row_factor(rows, known)
    return factor, denominator(rows, known, factor, widest(rows)) if rows.reduction == "mean" else None


def hits(rows: Rows) -> Array:
    """Whether the label of each row is the first class with the largest logit (for rows that count and are not NaN)."""
    xp = rows.xp
    known = labels(rows)
    at = xp.argmax(xp.astype(rows.logits, rows.acc, copy=False), axis=1)
    found = xp.astype(at, known.index.dtype, copy=False) == known.index
    return found if known.here is None else found & known.here


def marked(rows: Rows, stats: RowStats, hit: Array | None = None) -> RowStats:
    """The stats as users see them: `correct` is set, and under a bad label the gap, and so the loss, is NaN.

    `hit` is the result of `hits`, if it is known already.
    """
    if not rows.has_labels:
        return stats
    xp, lse = rows.xp, stats.lse
    correct = (hits(rows) if hit is None else hit) & (lse == lse)
    if rows.all_labels_count:
        return stats._replace(correct=correct)
    _, valid, ignored, _ = labels(rows)
    named, counts = (valid, valid) if ignored is None else (valid | ignored, valid & ~ignored)
    return stats._replace(gap=nan_unless(xp, named, stats.gap), correct=correct & counts)


def finish(rows: Rows, stats: RowStats) -> Array:
    """The loss, computed from the stats of its rows."""
    factor, divisor = terms(rows)
    return reduce_loss(rows, row_loss(rows, stats, factor), divisor, widest(rows))
