"""The body of the cpu engine that Numba compiles.

What is to be said of a block before its logits are read is said in NumPy; then comes one call of `_loops`.
Imported where Numba is installed, when a block is first asked for. Arrays are handed over as they lie: their first row,
and the steps from row to row and from class to class.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import numpy as np
from numba import typeof

from .. import _rows
from .._rows import Array, Rows
from . import _loops, _memory, _threads, cpu
from ._memory import in_lines as _in_lines
from ._tiles import EACH, LANES
from ._vectors import LINE, PARTIAL
from .cpu import QUICK, ROW, Part, _dense, _distribution, _Scratch, _store, _Want

FEW = 256  # rows of up to so many classes share vector instructions
FEW_IN_LARGE = 96  # and of up to so many where the gradient goes to memory: turned, it comes there in pieces
BESIDE = 8  # and so do rows whose classes lie apart, where at least so many rows lie side by side
APART = 1 << 16  # logits that are turned at once, of up to 256 rows, and of 32 at least
LONGEST = 1 << 16  # classes that may be turned
TURNED = 1 << 12  # logits of dense rows that are turned at once: what stays in the innermost cache
SIDE_BY_SIDE = 128  # of them at most
KEPT = 1 << 22  # bytes that a thread keeps to work in

_ONE = {np.dtype(kind): np.ones(1, kind) for kind in (np.float32, np.float64)}
_NONE = {np.dtype(kind): np.empty(0, kind) for kind in (np.float32, np.float64, np.intp, np.uint16)}
_PLACES = {np.dtype(np.float32): np.int32, np.dtype(np.float64): np.int64}

# What Numba imports at the first look at an array, it imports here, in no caller's thread.
for _array in _NONE.values():
    typeof(_array)

_INDEX = np.dtype(np.intp)
_REDUCTIONS = ("mean", "sum", "none")


def at_once(
    logits: Any, target: Any, reduction: str, upstream: float | None, wants_grad: bool, out: Any
) -> tuple[Array, Array | None] | None:
    """Loss and gradient of dense rows under labels, without options, from the arrays as the user passed them.

    None where they are anything else, before anything is written; the way through every check then finds what it is.
    The numbers are those of `block`, from the same loops.
    """
    if logits.__class__ is not np.ndarray or target.__class__ is not np.ndarray or reduction not in _REDUCTIONS:
        return None
    acc, shape = logits.dtype, logits.shape
    count = target.size
    if acc not in _ONE or target.dtype is not _INDEX or count == 0 or not shape or target.shape != shape[:-1]:
        return None
    classes = shape[-1]
    if not 0 < classes <= cpu.TILE:
        return None
    if not (logits.flags.carray and target.flags.carray):  # then they are not dense, or only not to be written
        if any(not (array.flags.c_contiguous and array.flags.aligned) for array in (logits, target)):
            return None
        logits, target = _open(logits), _open(target)
    if out is not None and not _may_be_filled(out, logits, target):
        return None
    scale, grad = _ONE[acc], None
    job, total = _loops.LOSS, None
    if wants_grad:
        job |= _loops.GRAD
        factor = 1.0 if upstream is None else upstream
        if not -1e30 < factor < 1e30:
            return None
        if reduction == "mean":
            factor /= count
        if factor != 1:
            scale = _scale(factor, acc)
        grad = _memory.empty(shape, acc) if out is None else out
    x, label, loss = logits.ravel(), target.ravel(), np.empty(count, acc)
    into = _NONE[acc] if grad is None else grad.ravel()
    work = count * (classes + ROW)
    in_lanes = classes <= _few(grad)
    if work <= QUICK * cpu.ALONE:
        total = _plain(x, label, classes, scale, job | _loops.CHECK | _loops.SUM, loss, into, in_lanes)
        if total < 0:
            return None
    else:  # every label is looked at before any part is written
        if _plain(x, label, classes, scale, _loops.CHECK, loss[:0], into, in_lanes) < 0:
            return None

        def work_off(parts: Iterator[slice]) -> None:
            for part in parts:
                flat = slice(part.start * classes, part.stop * classes)
                _plain(x[flat], label[part], classes, scale, job, loss[part], into[flat], in_lanes)

        team = _threads.team(work, QUICK * cpu.ALONE)
        least, most = (max(1, size // (classes + ROW)) for size in (cpu.ALONE, 4 * cpu.BLOCK))
        _threads.spread(work_off, _threads.shrinking(count, least, most, team), team)
    if reduction == "none":
        return loss.reshape(target.shape), grad
    if total is None:
        total = _loops.total(loss)
    if reduction == "mean":
        total /= count
    if acc.itemsize == 4 and not total < 1e30:  # where to say that nothing is wrong costs as much as a few rows
        with np.errstate(all="ignore"):
            return acc.type(total), grad
    return acc.type(total), grad


@lru_cache(maxsize=64)
def _scale(factor: float, acc: Any) -> Array:
    """What gradients are multiplied by; nothing writes to it."""
    return np.array([factor], acc)


def _may_be_filled(out: Any, logits: Array, target: Array) -> bool:
    """Whether the gradient may go there as it is: dense, and either the logits or apart from both."""
    return (
        out.__class__ is np.ndarray
        and (out.dtype is logits.dtype and out.shape == logits.shape and out.flags.carray)
        and (out is logits or not np.may_share_memory(out, logits))
        and not np.may_share_memory(out, target)
    )


def _is_large(grad: Array | None) -> bool:
    """Whether the gradient goes to memory, rather than to a cache."""
    return grad is not None and grad.nbytes >= _memory.LARGE


def _few(grad: Array | None) -> int:
    """Up to how many classes dense rows are turned."""
    return FEW_IN_LARGE if _is_large(grad) else FEW


def _plain(
    x: Array, label: Array, classes: int, scale: Array, job: int, loss: Array, grad: Array, in_lanes: bool
) -> float:
    """The loops, on as many dense rows as `loss` has room for, without options; what they answer."""
    acc, count = x.dtype, loss.shape[0]
    one, none = _ONE[acc], _NONE[acc]
    answer: float
    if in_lanes:
        width = _width(classes)
        answer = _loops.lanes(
            x, classes, count, classes, False, label, one, 0.0, one, scale,
            job, _NONE[acc], loss, grad, classes, width, *_room(_lanes_room, classes, width, acc),
        )  # fmt: skip
    else:
        answer = _loops.rows(
            x, classes, count, classes, False, label, one, none, none, 0, 0.0, 0.0, one,
            scale, job, _NONE[acc], loss, grad, classes, *_room(_rows_room, classes, 1, acc),
        )  # fmt: skip
    return answer


# What the loops work in


def _width(classes: int) -> int:
    """How many rows of dense classes are turned at once: what stays in the innermost cache."""
    return max(LANES, min(SIDE_BY_SIDE, TURNED // classes // LANES * LANES))


def _width_beside(classes: int) -> int:
    return max(32, min(256, APART // classes // LANES * LANES))


def _rows_room(classes: int, _width: int, acc: Any) -> tuple[Array, ...]:
    return (_in_lines(3 * classes, acc),)


def _lanes_room(classes: int, width: int, acc: Any) -> tuple[Array, ...]:
    numbers = _in_lines((classes + EACH + PARTIAL) * width + _loops.STRIP * classes, acc)
    return numbers, _in_lines(width, np.float64), _in_lines(2 * width, _PLACES[acc])


def _beside_room(classes: int, width: int, acc: Any) -> tuple[Array, ...]:
    numbers = _in_lines((2 * classes + 3 * EACH + PARTIAL + 1) * width, acc)
    return numbers, _in_lines(width, np.float64), _in_lines(6 * width, _PLACES[acc])


class _Own(threading.local):
    """What a thread keeps for its next block: to ask for it each time may take longer than the block."""

    room: tuple[Any, tuple[Array, ...]] = None, ()  # and what it is for, as one: a signal may come between two


_own = _Own()


def _room(make: Callable[[int, int, Any], tuple[Array, ...]], classes: int, width: int, acc: Any) -> tuple[Array, ...]:
    key = make, classes, width, acc
    of, room = _own.room
    if of != key:
        room = make(classes, width, acc)
        if room[0].nbytes <= KEPT:
            _own.room = key, room
    return room


def total(losses: Array) -> float:
    """The sum of contiguous losses."""
    found: float = _loops.total(losses)
    return found


def block(rows: Rows, want: _Want, part: Part, scratch: _Scratch) -> None:
    """All that is asked of one block."""
    acc = rows.acc
    count = rows.shape[0] * rows.shape[1]
    one, none = _ONE[acc], _NONE[acc]
    known = _rows.labels(rows) if rows.has_labels and not rows.all_labels_count else None
    factor = _rows.row_factor(rows, known)
    label, on_label = _labels(rows, known)
    job, loss, scale, made = 0, none, one, None
    stats = _NONE[acc]
    if want.loss is not None:
        job |= _loops.LOSS
        loss = np.empty(count, acc)
    if want.stats is not None:
        job |= _loops.STATS
        stats = np.empty((5, count), acc)
    if want.given is not None:
        job |= _loops.KNOWN
        stats = np.stack([np.ascontiguousarray(values[part], acc).reshape(-1) for values in want.given[:4]])
    if want.grad is not None:
        job |= _loops.GRAD
        made = want.grad[part[0], :, part[1]]
        scale = _flat(_rows.row_scale(rows, factor, want.divisor), acc)
    if want.log is not None:
        job |= _loops.LOG
        made = want.log[part[0], :, part[1]]
    per_row = one if factor is None else _flat(factor, acc)
    target = label, on_label, rows.z_loss, per_row, scale, job, stats.reshape(-1), loss
    multiplied_last = want.grad is not None and _may_overflow(rows, on_label, want.divisor)
    if job & _loops.LOG or multiplied_last or not _in_lanes(rows, made, want.grad, target):
        _in_rows(rows, made, target, scratch)
    if want.loss is not None:
        want.loss[part] = loss.reshape(rows.shape)
    if want.stats is not None:
        for whole, values in zip(want.stats, stats, strict=True):
            if whole is not None:
                whole[part] = values.reshape(rows.shape)


def _may_overflow(rows: Rows, on_label: Array, divisor: float | None) -> bool:
    """Whether a row's gradient may have to be multiplied by its scale last, which only `_loops.rows` does."""
    upstream, weight, s = rows.upstream, rows.weight, rows.sample_weight
    if weight is None and s is None and upstream is None and not rows.z_loss:
        return False
    largest = 1.0 if upstream is None else _largest(upstream)
    largest *= (1.0 if s is None else _largest(s)) / (abs(divisor) if divisor else 1.0)
    a = 1.0 if weight is None else _largest(on_label)
    limit = float(np.finfo(rows.acc).max) / 8
    if rows.z_loss:
        x = float(np.finfo(np.float16).max) if rows.grad_dtype == np.float16 else limit
        if not max(1.0, largest) * (a + 2 * rows.z_loss * x) < limit:
            x = min(_largest(np.where(np.isfinite(rows.logits), rows.logits, 0)), limit)  # few have such a z-loss
        a += 2 * rows.z_loss * (x + 64)
    return not max(1.0, largest) * a < limit


def _largest(values: Array | float) -> float:
    """The largest magnitude; NaN passed over, because that takes care of itself."""
    if isinstance(values, float):
        return abs(values) if values == values else 0.0
    return float(np.fmax.reduce(np.abs(values), axis=None, initial=0))


def converts(rows: Rows, want: _Want) -> bool:
    """Whether the block, or a gradient of its size, is put into scratch first."""
    if rows.target is not None and not rows.has_labels:
        return True
    grad = want.grad if want.log is None else want.log
    if rows.shape[1] == 1:
        return _steps(rows.logits, rows.acc, False) is None or (
            grad is not None and _steps(grad, rows.acc, False) is None
        )
    return want.log is not None or _turned(rows, grad, _few(grad)) is None


def _turned(rows: Rows, grad: Array | None, few: int) -> tuple[bool, Any, Any] | None:
    """Whether rows lie side by side, and the steps of logits and gradient; None for `rows`."""
    acc, (_, classes, inner) = rows.acc, rows.logits.shape
    if rows.label_smoothing or rows.softcap is not None or not (rows.target is None or rows.has_labels):
        return None
    if not (classes <= few if inner == 1 else inner >= BESIDE and classes <= LONGEST):
        return None
    x = _steps(rows.logits, acc, inner > 1)
    out = x if grad is None else _steps(grad, acc, inner > 1)
    return None if x is None or out is None else (inner > 1, x, out)


def _in_lanes(rows: Rows, grad: Array | None, whole: Array | None, target: tuple[Any, ...]) -> bool:
    """The block by `_loops.lanes` or, of rows side by side, `_loops.beside`; False if these do not take it.

    `grad` is a part of `whole`.
    """
    found = _turned(rows, grad, _few(whole))
    if found is None:
        return False
    beside, x, out = found
    acc, (outer, classes, inner) = rows.acc, rows.logits.shape
    is_half, made = rows.grad_dtype == np.float16, _nothing(rows) if grad is None else _first(grad, beside)
    logits, count = _first(rows.logits, beside), outer * inner
    if beside:
        label, on_label, z_loss, factor, scale, job, *rest = target
        lead = _lead(grad, out) if _is_large(whole) else None
        if lead is not None:
            job |= _loops.STREAM
        width = _width_beside(classes)
        _loops.beside(
            logits, outer, inner, x[0], classes, x[2], is_half, label, on_label, z_loss, factor, scale,
            job, *rest, made, out[0], out[2], width, lead or 0, *_room(_beside_room, classes, width, acc),
        )  # fmt: skip
    else:
        width = _width(classes)
        room = _room(_lanes_room, classes, width, acc)
        _loops.lanes(logits, x[1], count, classes, is_half, *target, made, out[1], width, *room)
    return True


def _lead(grad: Array | None, steps: tuple[int, int, int]) -> int | None:
    """How many rows lie before the gradient's first one in its line of cache; None if classes differ in that.

    Nor is there an answer for 16 bits, which come out of the loops one by one.
    """
    if grad is None or grad.itemsize == 2 or any(step * grad.itemsize % LINE for step in steps[::2]):
        return None
    address = grad.__array_interface__["data"][0]
    return int(address % LINE // grad.itemsize)


def _in_rows(rows: Rows, grad: Array | None, target: tuple[Any, ...], scratch: _Scratch) -> None:
    """The block by `_loops.rows`."""
    acc, (outer, classes, inner) = rows.acc, rows.logits.shape
    none, count = _NONE[acc], outer * inner
    each = a = none
    a_step = 0
    if rows.label_smoothing and rows.has_labels:
        each = np.array([rows.label_smoothing / classes], acc)
        if not each[0]:  # too little to be a number
            each = none
        elif rows.weight is not None:
            each = each * rows.weight
    elif rows.target is not None and not rows.has_labels:
        a = _distribution(rows, rows.target, slice(0, classes), scratch("a", (count, classes)))
        a_step = a.strides[0] // a.itemsize
        a = _open(a[0])
    x = _steps(rows.logits, acc, False) if inner == 1 else None
    if x is None:
        logits, x_step = _open(_dense(rows.logits, acc, scratch("x", (count, classes)))[0]), classes
    else:
        logits, x_step = _first(rows.logits, False), x[1]
    out, out_step, made = _nothing(rows) if x is not None else none, 0, None
    if grad is not None:
        steps = _steps(grad, acc, False) if inner == 1 else None
        if steps is None:
            made = scratch("made", (count, classes))
            out, out_step = made[0], classes
        else:
            out, out_step = _first(grad, False), steps[1]
    label, on_label, z_loss, factor, scale, *rest = target
    _loops.rows(
        logits, x_step, count, classes, rows.grad_dtype == np.float16, label, on_label, each, a, a_step,
        rows.softcap or 0.0, z_loss, factor, scale, *rest, out, out_step, *_room(_rows_room, classes, 1, acc),
    )  # fmt: skip
    if made is not None:
        _store(made, grad)


def _labels(rows: Rows, known: _rows.Labels | None) -> tuple[Array, Array]:
    """The class of each row, -1 where it has none; the target on it, one for each row or one for all."""
    if not rows.has_labels:
        return _NONE[np.dtype(np.intp)], _ONE[rows.acc]
    index = rows.target if known is None else known.index
    label = _flat(index, np.intp)
    on_label = _ONE[rows.acc]
    if rows.label_smoothing:
        on_label = np.array([1 - rows.label_smoothing], rows.acc)
    if rows.weight is not None and on_label[0]:  # else it counts 0, whatever the weight is
        on_label = on_label * rows.weight.take(label)
    if known is not None and known.valid is not None:
        label = np.where(known.valid.reshape(-1), label, -1)
    return label, on_label


def _nothing(rows: Rows) -> Array:
    """In place of a gradient, with a dtype that there is compiled code for."""
    return _NONE[np.dtype(np.uint16) if rows.logits.itemsize == 2 else rows.acc]


def _flat(values: Any, dtype: Any) -> Array:
    """Numbers per row as one contiguous array that says it may be written."""
    return _open(np.ascontiguousarray(values, dtype).reshape(-1))


def _steps(array: Array, acc: Any, beside: bool) -> tuple[int, int, int] | None:
    """Elements from outer to outer, inner to inner and class to class, of logits or gradient that need no conversion.

    Where `beside`, rows lie side by side; else classes do, and the rows are the outer axis. None if they do not.
    """
    dtype, size = array.dtype, array.itemsize
    if dtype != acc and not (size == 2 and dtype.isnative):
        return None
    outer, by_class, inner = array.strides
    if outer % size or by_class % size or not array.flags.aligned:
        return None
    if beside:
        return (outer // size, 1, by_class // size) if inner == size else None
    return (0, outer // size, 1) if by_class == size or array.shape[1] == 1 else None


def _first(array: Array, beside: bool) -> Array:
    """The memory that starts with the first row, or with the first class of rows side by side."""
    return _open(array[0, 0, :] if beside else array[0, :, 0])


def _open(array: Array) -> Array:
    """The same memory, as words if it holds 16-bit numbers, and said to be writable.

    Numba would compile anew for what is not. What the caller passed to be read is not written.
    """
    if array.itemsize == 2:
        array = array.view(np.uint16)
    if array.flags.writeable and array.flags.c_contiguous:
        return array
    return np.asarray(_Open(array))


class _Open:
    def __init__(self, array: Array) -> None:
        self.array = array
        told = array.__array_interface__
        self.__array_interface__ = told | {"data": (told["data"][0], False), "strides": None}
