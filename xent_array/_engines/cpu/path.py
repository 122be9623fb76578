"""How a call is executed: this is decided here, once per call, and nowhere else.

A `Path` says which code processes the rows, their memory layout, what is asked for, and how large a block of work is.
It follows from the layout, the number of classes, the options and what is installed. The number of rows decides only
whether the gradient is written past the caches, so that a row has the same result in any batch.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from ..._rows import Array, Rows, RowStats
from .loops import FEW, GRAD, KNOWN, LANES, LOG, LOSS, PLAIN, STATS, STREAM
from .memory import LINE

BLOCK = 1 << 18  # the most work, in logits, in a block that is copied to a workspace
TILE = 1 << 20  # rows of more classes are read in pieces of this many, which bounds the workspace
SERIAL = 1 << 16  # work too small for another thread; three times as much in compiled loops, which are faster
ROW = 24  # the cost of a row apart from its logits, in logits

# Contiguous rows of up to so many bytes, in the dtype of the arithmetic, are transposed: with an output, with one that
# is written past the caches, and without
TRANSPOSED, TRANSPOSED_STREAMED, TRANSPOSED_ALONE = 1280, 960, 1600
# Logits per transposed tile, and rows, at most: the L1 cache also holds the rows as they were, the output and the state
TRANSPOSED_SIZE, TRANSPOSED_SIZE_ALONE = 1 << 10, 1 << 12
TRANSPOSED_ROWS, TRANSPOSED_ROWS_ALONE = 128, 256
# Bytes of contiguous rows that are written past the caches, at least and at most: longer ones would come in bursts
STREAMED, STREAMED_MOST = 1 << 11, 1 << 14
SIDE_BY_SIDE = 8  # the strided loop takes rows if at least this many are adjacent
STRIDED_CLASSES = 1 << 16  # and there are at most this many classes
STRIDED_SIZE = 1 << 16  # logits per strided tile, which has at least 32 rows
LARGE = 1 << 25  # bytes of a gradient that is larger than the caches
STRIDED_ROWS, STRIDED_ROWS_OF_FEW = 256, 128  # and at most so many

_REDUCTIONS = ("mean", "sum", "none")
_NUMBERS: Any = frozenset({int, float})
_SINGLE, _DOUBLE = np.dtype(np.float32), np.dtype(np.float64)
_ARITHMETIC = {_SINGLE: _SINGLE, _DOUBLE: _DOUBLE, np.dtype(np.float16): _SINGLE}
_LABELS = frozenset(map(np.dtype, ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32")))
_LIMITS = {dtype: float(np.finfo(dtype).max) / 8 for dtype in (_SINGLE, _DOUBLE)}
_SAFE = 1e30  # factors below this cannot make a product overflow


class Want(NamedTuple):
    """What is asked for: arrays to fill, the stats if they are given, the denominator of the mean if known."""

    loss: Array | None = None
    stats: RowStats | None = None
    given: RowStats | None = None
    grad: Array | None = None
    log: Array | None = None
    divisor: float | None = None

    @property
    def output(self) -> Array | None:
        """The array to fill that has the shape of the logits."""
        return self.grad if self.log is None else self.log

    @property
    def job(self) -> int:
        """The same as bits for the loops."""
        job = 0 if self.loss is None else LOSS
        job |= 0 if self.stats is None else STATS
        job |= 0 if self.given is None else KNOWN
        return job | (0 if self.grad is None else GRAD) | (0 if self.log is None else LOG)


class Strides(NamedTuple):
    """Strides of the outer axis and of the classes, in elements."""

    outer: int
    class_: int


class Path(NamedTuple):
    """See above. `x` or `out` is None if blocks of the logits, or of the output, have to be copied to a workspace."""

    code: str  # one of the compiled loops "contiguous", "transposed" and "strided", or "numpy" or "numpy short"
    job: int = 0
    x: Strides | None = None
    out: Strides | None = None
    width: int = 0  # rows per tile
    block: int = BLOCK  # the most work in a block
    serial: int = SERIAL  # work too small for another thread

    @property
    def is_compiled(self) -> bool:
        return not self.code.startswith("numpy")


def choose(rows: Rows, want: Want, has_loops: bool) -> Path:
    """The path for any rows."""
    classes, inner = rows.logits.shape[1:]
    if not has_loops or classes > TILE:
        return Path("numpy short" if _is_short(rows, want) else "numpy")
    output, acc = want.output, rows.acc
    fits_lanes = want.log is None and (rows.target is None or rows.has_labels)
    fits_lanes = fits_lanes and not _may_scale_last(rows, want.divisor)
    has_options = bool(rows.label_smoothing) or rows.softcap is not None
    if has_options and (want.stats or want.given or (rows.label_smoothing and rows.weight is not None)):
        fits_lanes = False
    if fits_lanes and inner >= SIDE_BY_SIDE and classes <= (FEW if has_options else STRIDED_CLASSES):
        x, out = _strides(rows.logits, acc, True), _strides(output, acc, True)
        if x is not None and (output is None or out is not None):
            job = want.job | _streaming(rows.logits, output, out) | _plain(rows, want)
            return _tiled("strided", job, x, out, classes)
    x = out = None
    if inner == 1:
        x, out = _strides(rows.logits, acc, False), _strides(output, acc, False)
    is_copied = x is None or (output is not None and out is None)
    to_memory = out is not None and out.outer == classes and is_to_memory(rows.logits, want.grad)
    in_tiles = want.job | _streaming_rows(to_memory, rows.grad_dtype.itemsize)
    if fits_lanes and not is_copied and _is_transposed(classes, acc.itemsize, in_tiles):
        return _tiled("transposed", in_tiles | _plain(rows, want), x, out, classes)
    job = want.job | _streaming_rows(to_memory, rows.grad_dtype.itemsize, classes)
    block = BLOCK if is_copied or not (rows.target is None or rows.has_labels) else 16 * BLOCK
    return Path("contiguous", job, x, out, 0, block, 3 * SERIAL)


def of_contiguous(classes: int, job: int, is_plain: bool, to_memory: bool, itemsize: int) -> Path:
    """The path for contiguous rows with labels; `is_plain` if there are no options.

    `to_memory` is what `is_to_memory` says of the gradient.
    """
    strides = Strides(classes, 1)
    in_tiles = job | _streaming_rows(to_memory, itemsize)
    if _is_transposed(classes, max(itemsize, 4), in_tiles):
        return _tiled("transposed", in_tiles | (PLAIN if is_plain else 0), strides, strides, classes)
    job |= _streaming_rows(to_memory, itemsize, classes)
    return Path("contiguous", job, strides, strides, 0, 16 * BLOCK, 3 * SERIAL)


def arithmetic(dtype: Any) -> Any:
    """The dtype of the arithmetic for logits of a dtype that the loops read directly; None for any other dtype."""
    found = _ARITHMETIC.get(dtype)
    if found is None and dtype.name == "bfloat16" and dtype.isnative:  # of ml_dtypes, which need not be installed
        found = _ARITHMETIC[dtype] = _ARITHMETIC[np.dtype(np.float16)]
    return found


def takes_at_once(logits: Any, target: Any, options: tuple[Any, ...], out: Any) -> bool:
    """Whether the arguments of a call are contiguous rows, labels, and options that are plain numbers in range.

    Nothing but a label can be wrong with such a call. Any other call has to go through every check.
    """
    if logits.__class__ is not np.ndarray or target.__class__ is not np.ndarray:
        return False
    axis, reduction, weight, sample_weight, ignore, smoothing, z_loss, softcap, denominator, validate, _, factor = (
        options
    )
    if not (
        weight is None and sample_weight is None and denominator is None and (validate is None or validate is True)
    ):
        return False
    shape = logits.shape
    if not (axis.__class__ is int and shape and (axis == -1 or axis == len(shape) - 1) and target.shape == shape[:-1]):
        return False
    if not (0 < shape[-1] <= TILE and target.size and (ignore is None or ignore.__class__ is int)):
        return False
    if reduction not in _REDUCTIONS:
        return False
    is_plain = smoothing.__class__ is float and z_loss.__class__ is float and smoothing == 0 and z_loss == 0
    if not (is_plain and softcap is None and factor is None):
        size = 1.0
        if factor is not None:
            if factor.__class__ not in _NUMBERS or not -_SAFE < factor < _SAFE:
                return False
            size = max(1.0, abs(factor))
        if smoothing.__class__ not in _NUMBERS or z_loss.__class__ not in _NUMBERS:
            return False
        if not (0 <= smoothing <= 1 and 0 <= z_loss < 0.25 / size):  # else a gradient might have to be scaled last
            return False
        if softcap is not None and (softcap.__class__ not in _NUMBERS or not 1 / _SAFE < softcap < _SAFE):
            return False
    dtype, x, y = logits.dtype, logits.flags, target.flags
    if not (x.c_contiguous and x.aligned and y.c_contiguous and y.aligned):
        return False
    if arithmetic(dtype) is None or target.dtype not in _LABELS:
        return False
    return out is None or (
        out.__class__ is np.ndarray
        and (out.dtype is dtype and out.shape == shape and out.flags.carray)
        and (out is logits or not np.may_share_memory(out, logits))
        and not np.may_share_memory(out, target)
    )


@lru_cache(maxsize=256)
def _tiled(code: str, job: int, x: Strides | None, out: Strides | None, classes: int) -> Path:
    if code == "transposed":
        size, most = (
            (TRANSPOSED_SIZE, TRANSPOSED_ROWS) if job & GRAD else (TRANSPOSED_SIZE_ALONE, TRANSPOSED_ROWS_ALONE)
        )
        width = max(LANES, min(most, size // classes // LANES * LANES))
    else:
        most = STRIDED_ROWS_OF_FEW if classes <= FEW else STRIDED_ROWS
        width = max(32, min(most, STRIDED_SIZE // classes // LANES * LANES))
    return Path(code, job, x, out, width, 16 * BLOCK, 3 * SERIAL)


def _is_short(rows: Rows, want: Want) -> bool:
    """Whether the short version in NumPy suffices: of contiguous plain rows."""
    classes, inner = rows.logits.shape[1:]
    return (
        (bool(_plain(rows, want)) and inner == 1 and classes <= TILE)
        and (rows.upstream is None or abs(rows.upstream) < _SAFE)
        and _is_contiguous(rows.logits, rows.acc)
        and (want.grad is None or _is_contiguous(want.grad, rows.acc))
    )


def _is_contiguous(array: Array, dtype: Any) -> bool:
    flags = array.flags
    return bool(array.dtype == dtype and flags.c_contiguous and flags.aligned)


def _is_transposed(classes: int, itemsize: int, job: int) -> bool:
    most = TRANSPOSED_STREAMED if job & STREAM else TRANSPOSED if job & GRAD else TRANSPOSED_ALONE
    return classes * itemsize <= most


def _plain(rows: Rows, want: Want) -> int:
    """PLAIN if only loss and gradient are asked for, there are no options, and all rows have labels and count alike."""
    is_plain = (
        (want.loss is not None and want.stats is None and want.given is None)
        and (rows.has_labels and rows.all_labels_count and not rows.is_slice)
        and (rows.weight is None and rows.sample_weight is None and rows.softcap is None)
        and (rows.label_smoothing == 0 and rows.z_loss == 0)
        and (rows.upstream is None or isinstance(rows.upstream, float))
    )
    return PLAIN if is_plain else 0


def is_to_memory(logits: Array, output: Array | None) -> bool:
    """Whether the output is larger than the caches, and does not take the place of logits, which are in the caches."""
    return output is not None and output.nbytes >= LARGE and not np.may_share_memory(output, logits)


def _streaming_rows(to_memory: bool, itemsize: int, classes: int | None = None) -> int:
    """STREAM if a gradient in contiguous rows without gaps is written with non-temporal stores.

    Where rows are written one by one, `classes` are given: then it pays only if rows share a cache line half by half.
    """
    if not to_memory or itemsize == 2:
        return 0
    if classes is None:
        return STREAM
    size = classes * itemsize
    return STREAM if STREAMED <= size <= STREAMED_MOST and size % (LINE // 2) == 0 else 0


def _streaming(logits: Array, output: Array | None, out: Strides | None) -> int:
    """The same for strided rows, where all classes of a row must have the same offset in a cache line.

    Not for 16-bit floats, which are written one class at a time.
    """
    if output is None or out is None or output.itemsize == 2 or not is_to_memory(logits, output):
        return 0
    return 0 if any(stride * output.itemsize % LINE for stride in out) else STREAM


def _strides(array: Array | None, acc: Any, is_strided: bool) -> Strides | None:
    """The strides of an array if the loops can access it in place, else None.

    If `is_strided` the inner axis must be contiguous; otherwise the classes must be, and the rows are the outer axis.
    """
    if array is None:
        return None
    dtype, size = array.dtype, array.itemsize
    if dtype != acc and not (size == 2 and dtype.isnative):
        return None
    outer, class_, inner = array.strides
    if outer % size or class_ % size or not array.flags.aligned:
        return None
    if is_strided:
        return Strides(outer // size, class_ // size) if inner == size else None
    return Strides(outer // size, 1) if class_ == size or array.shape[1] == 1 else None


def _may_scale_last(rows: Rows, divisor: float | None) -> bool:
    """Whether some row may have to be scaled last lest it overflow, which only `contiguous` does."""
    upstream, weight, s = rows.upstream, rows.weight, rows.sample_weight
    if weight is None and s is None and upstream is None and not rows.z_loss:
        return False
    largest = 1.0 if upstream is None else _largest(upstream)
    largest *= (1.0 if s is None else _largest(s)) / (abs(divisor) if divisor else 1.0)
    a = 1.0 if weight is None else _largest(weight)
    limit = _LIMITS[rows.acc]
    if rows.z_loss:
        x = float(np.finfo(np.float16).max) if rows.grad_dtype == np.float16 else limit
        if not max(1.0, largest) * (a + 2 * rows.z_loss * x) < limit:
            x = min(_largest(rows.logits), limit)  # rarely needed
        a += 2 * rows.z_loss * (x + 64)
    return not max(1.0, largest) * a < limit


def _largest(values: Array | float) -> float:
    """The largest magnitude, ignoring NaN, which needs no special care."""
    if isinstance(values, float):
        return abs(values) if values == values else 0.0
    if values.size <= BLOCK:
        return float(np.fmax.reduce(np.abs(values), axis=None, initial=0))
    low, high = np.fmin.reduce(values, axis=None, initial=0), np.fmax.reduce(values, axis=None, initial=0)
    return max(abs(float(low)), abs(float(high)))
