"""From a block of rows, or from the arguments of a simple call, to one call of a compiled loop.

Everything that does not depend on the logits is computed in NumPy; then the loop gets one record and seven arrays. This
module is imported when it is first needed, and only if Numba is installed.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from types import ModuleType
from typing import Any

import numpy as np
from numba import typeof

from ... import _rows
from ..._rows import Array, Rows
from . import memory, threads
from .blocks import Buffers, Part, contiguous, distribution, store, workspace
from .loops import (
    CHECK,
    FACTOR,
    GRAD,
    IGNORE,
    KNOWN,
    LOSS,
    ON_LABEL,
    SCALE,
    STATS,
    STREAM,
    SUM,
    Arguments,
    elementwise,
    strided,
    transposed,
)
from .loops import contiguous as contiguous_loop
from .memory import LINE
from .path import BLOCK, ROW, SERIAL, Path, Strides, Want, arithmetic, is_large, of_contiguous, takes_at_once

LOOPS: dict[str, ModuleType] = {"contiguous": contiguous_loop, "transposed": transposed, "strided": strided}

_INDEX, _WORDS, _HALF = np.dtype(np.intp), np.dtype(np.uint16), np.dtype(np.float16)
_NONE = {dtype: np.empty(0, dtype) for dtype in (np.dtype(np.float32), np.dtype(np.float64), _INDEX, _WORDS)}
_ONES = {dtype: np.ones(3, dtype) for dtype in (np.dtype(np.float32), np.dtype(np.float64))}  # `per_row` of such rows
_INTEGERS = 2**63
LABELS = 1 << 18  # labels too few to check in another thread

# Numba imports some modules when it first sees an array; have that happen here and not in a caller's thread.
for _array in _NONE.values():
    typeof(_array)


def total(losses: Array) -> float:
    """The sum of losses in a contiguous array."""
    found: float = elementwise.total(losses)
    return found


# A simple call, as the user made it


_Kind = tuple[Any, int, bool, float, float, float, int]  # as `_prepared` unpacks it


def at_once(
    logits: Any, target: Any, options: tuple[Any, ...], wants_grad: bool, out: Any
) -> tuple[Array, Array | None] | None:
    """Loss and gradient of contiguous rows with labels, and options that are plain numbers.

    None, before anything is written, if the call is not so simple or a label is wrong. The results have the same bits
    as those of `block`, because the loops are the same.
    """
    if not takes_at_once(logits, target, options, out):
        return None
    _, reduction, _, _, ignore, smoothing, z_loss, softcap, _, _, _, factor = options
    dtype, classes, count = logits.dtype, logits.shape[-1], target.size
    acc = arithmetic(dtype)
    is_mean = reduction == "mean"
    ignores = ignore is not None and -_INTEGERS <= ignore < _INTEGERS
    if not ignores:
        ignore = -1  # which is no class, so that no row is ignored by mistake
    grad = memory.empty(logits.shape, dtype) if wants_grad and out is None else out
    label = target if target.dtype is _INDEX else target.astype(_INDEX)
    is_small = count * (classes + ROW) <= 3 * SERIAL
    loss = np.empty(count, acc) if is_small else memory.empty((count,), acc)
    if logits.flags.carray and label.flags.carray and dtype.itemsize > 2:
        arrays = logits.ravel(), label.ravel(), loss, _NONE[acc] if grad is None else grad.ravel()
    else:
        into = _nothing(dtype.itemsize, acc) if grad is None else opened(grad).ravel()
        arrays = opened(logits).ravel(), opened(label).ravel(), loss, into
    kind = dtype, classes, is_large(grad), smoothing, z_loss, softcap or 0.0, ignore
    scale = 1.0 if factor is None else factor
    job = LOSS if grad is None else LOSS | GRAD
    found, kept = -1.0, count
    if is_small and not 0 <= ignore < classes:
        found = _run(kind, arrays, job | CHECK | SUM, scale / count if is_mean else scale)
    if found < 0:  # many rows, or some label is ignored or wrong
        kept = _count_kept(arrays[1], classes, ignore, ignores)
        if kept <= 0:
            return None
        job |= IGNORE if kept < count else 0
        scale = scale / kept if is_mean else scale
        found = _run(kind, arrays, job | SUM, scale) if is_small else _run_over_threads(kind, arrays, job, scale)
    if reduction == "none":
        return loss.reshape(target.shape), grad
    if is_mean:
        found /= kept
    if acc.itemsize == 4 and not found < 1e30:  # np.errstate takes as long as several rows
        with np.errstate(all="ignore"):
            return acc.type(found), grad
    return acc.type(found), grad


def _run(kind: _Kind, arrays: tuple[Array, Array, Array, Array], job: int, scale: float) -> float:
    """Call a loop on all rows of these arrays; return its result."""
    x, label, loss, out = arrays
    rows, arguments, per_row, q, size = _prepared(kind, loss.shape[0], job, scale)
    found: float = rows(arguments, x, label, per_row, q, loss, out, workspace(size))
    return found


def _count_kept(label: Array, classes: int, ignore: int, ignores: bool) -> int:
    """How many labels are not ignored; -1 if one of those is no class."""
    if len(label) <= LABELS:
        return int(elementwise.count_kept(label, classes, ignore, ignores))
    found = [int(elementwise.count_kept(label[:0], classes, ignore, ignores))]  # -1 for this thread's rounding mode

    def work_off(parts: Iterator[slice]) -> None:
        found.extend(elementwise.count_kept(label[part], classes, ignore, ignores) for part in parts)

    team = threads.team(len(label), LABELS)
    threads.parallel(work_off, threads.shrinking(len(label), LABELS // 2, 4 * LABELS, team), team)
    return -1 if min(found) < 0 else sum(found)


@lru_cache(maxsize=256)
def _prepared(kind: _Kind, count: int, job: int, scale: float) -> tuple[Any, Array, Array, Array, int]:
    """The loop for `count` contiguous rows and its constant arguments: record, per_row, q, size of the workspace."""
    dtype, classes, to_memory, smoothing, z_loss, softcap, ignore_index = kind
    acc = arithmetic(dtype)
    path = of_contiguous(classes, job, to_memory, dtype.itemsize)
    loop, q = LOOPS[path.code], np.array([smoothing / classes], acc)
    arguments = Arguments(
        path.job, count, 1, classes, classes, 1, classes, 1, path.width,
        is_half=dtype == _HALF, softcap=softcap, z_loss=z_loss, ignore_index=ignore_index,
    )  # fmt: skip
    per_row, size = np.array([1 - smoothing, 1, scale], acc), loop.workspace_size(classes, path.width, acc.itemsize)
    return loop.rows, arguments.record(), per_row, q if q[0] else q[:0], size


def _run_over_threads(kind: _Kind, arrays: tuple[Array, Array, Array, Array], job: int, scale: float) -> float:
    """The same in parts, over several threads; return the sum of the losses."""
    x, label, loss, out = arrays
    classes = kind[1]

    def work_off(parts: Iterator[slice]) -> None:
        for part in parts:
            flat = slice(part.start * classes, part.stop * classes)
            _run(kind, (x[flat], label[part], loss[part], out[flat]), job, scale)

    total(loss[:0])  # if this cannot be compiled, nothing may be written
    team = threads.team(len(loss) * (classes + ROW), 3 * SERIAL)
    least, most = (max(1, size // (classes + ROW)) for size in (SERIAL, 4 * BLOCK))
    threads.parallel(work_off, threads.shrinking(len(loss), least, most, team), team)
    return total(loss)


def _nothing(itemsize: int, acc: Any) -> Array:
    """An empty array in place of an output, of a dtype for which there is compiled code."""
    return _NONE[_WORDS if itemsize == 2 else acc]


# Any block of rows


def block(path: Path, rows: Rows, want: Want, part: Part, buffers: Buffers) -> None:
    """Do everything that is asked for of one block."""
    acc, (outer, classes, inner) = rows.acc, rows.logits.shape
    count, loop, is_strided = outer * inner, LOOPS[path.code], path.code == "strided"
    none = _nothing(rows.logits.itemsize if path.x is not None else 0, acc)
    x, x_strides = _opened(rows.logits, is_strided), path.x
    if x_strides is None:
        copied = contiguous(rows.logits, acc, buffers("x", (count, classes)))
        x, x_strides = copied.reshape(-1), Strides(classes, 1)
    output, out, made = None, none, None
    if want.output is not None:
        output = want.output[part[0], :, part[1]]
        if path.out is None:
            made = buffers("made", (count, classes))
        out = _opened(output, is_strided) if made is None else made.reshape(-1)
    out_strides = path.out or Strides(classes, 1)
    label, per_row = _labels(rows, want)
    q, q_row = _beside_label(rows, buffers)
    answers = np.empty((6 if path.job & (STATS | KNOWN) else 1, count), acc)
    if want.given is not None:
        for kind, values in zip(answers[1:], want.given[:4], strict=False):
            kind[...] = values[part].reshape(-1)
    arguments = Arguments(
        path.job, outer if is_strided else count, inner if is_strided else 1, classes,
        x_strides.outer, x_strides.class_, out_strides.outer, out_strides.class_, path.width,
        lead=_lead(out) if is_strided and path.job & STREAM else 0, q_row=q_row, is_half=rows.grad_dtype == np.float16,
        softcap=rows.softcap or 0.0, z_loss=rows.z_loss,
    )  # fmt: skip
    room = workspace(loop.workspace_size(classes, path.width, acc.itemsize))
    loop.rows(arguments.record(), x, label, per_row, q, answers.reshape(-1), out, room)
    if made is not None:
        store(made, output)
    if want.loss is not None:
        want.loss[part] = answers[0].reshape(rows.shape)
    if want.stats is not None:
        for whole, values in zip(want.stats, answers[1:], strict=True):
            if whole is not None:
                whole[part] = values.reshape(rows.shape)


def _labels(rows: Rows, want: Want) -> tuple[Array, Array]:
    """The arguments `label` and `per_row` of a loop."""
    acc = rows.acc
    if rows.target is None:  # the softmax alone
        return _NONE[_INDEX], _ONES[acc]
    known = _rows.labels(rows) if rows.has_labels and not rows.all_labels_count else None
    factor = _rows.row_factor(rows, known)
    scale = 1.0 if want.grad is None else _rows.row_scale(rows, factor, want.divisor)
    label: Array = _NONE[_INDEX]
    on_label: Any = 1
    if rows.has_labels:
        label = opened(np.ascontiguousarray(rows.target if known is None else known.index, np.intp).reshape(-1))
        if rows.label_smoothing:
            on_label = acc.type(1 - rows.label_smoothing)
        if rows.weight is not None and on_label:  # a target of 0 counts 0, whatever the weight
            on_label = on_label * rows.weight.take(label)
        if known is not None and known.valid is not None:
            label = np.where(known.valid.reshape(-1), label, -1)
    if factor is None and not isinstance(scale, np.ndarray) and not isinstance(on_label, np.ndarray):
        return label, np.array([on_label, 1, scale], acc)
    per_row = np.empty((3, *rows.shape), acc)
    per_row[ON_LABEL].reshape(-1)[...] = on_label
    per_row[FACTOR] = 1 if factor is None else factor
    per_row[SCALE] = scale
    return label, per_row.reshape(-1)


def _beside_label(rows: Rows, buffers: Buffers) -> tuple[Array, int]:
    """The argument `q` of a loop, and the stride of the distributions."""
    acc, (outer, classes, inner) = rows.acc, rows.logits.shape
    if rows.target is None or (rows.has_labels and not rows.label_smoothing):
        return _NONE[acc], 0
    if rows.has_labels:
        uniform = np.array([rows.label_smoothing / classes], acc)
        if not uniform[0]:  # it underflows
            return _NONE[acc], 0
        return uniform if rows.weight is None else uniform * rows.weight, 0
    a = distribution(rows, rows.target, slice(0, classes), buffers("a", (outer * inner, classes)))
    return opened(a[0]), a.strides[0] // a.itemsize


def _lead(out: Array) -> int:
    """How many rows lie between the start of a cache line and the first row of the gradient."""
    address = out.__array_interface__["data"][0]
    return int(address % LINE // out.itemsize)


def _opened(block: Array, is_strided: bool) -> Array:
    """The memory of a block, starting at its first logit."""
    return opened(block[0, 0, :] if is_strided else block[0, :, 0])


def opened(array: Array) -> Array:
    """The same memory, declared contiguous and writable, and as uint16 if it holds 16-bit floats.

    Numba would compile separate code for arrays that are not. The loops know the strides, and never write to inputs.
    """
    if array.itemsize == 2:
        array = array.view(np.uint16)
    if array.flags.writeable and array.flags.c_contiguous:
        return array
    return np.asarray(_Opened(array))


class _Opened:
    def __init__(self, array: Array) -> None:
        self.array = array
        told = array.__array_interface__
        self.__array_interface__ = told | {"data": (told["data"][0], False), "strides": None}
