"""From a block of rows, or from the arguments of a simple call, to one call of a compiled loop.

Everything that does not depend on the logits is computed in NumPy; then the loop gets one tuple: a record and arrays.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np

from ... import _rows
from ..._rows import Array, Rows
from . import memory, threads
from .arithmetic import is_usual
from .blocks import KEPT, WHOLE, Buffers, Part, borrow, contiguous, distribution, give_back, store, workspace
from .loops import (
    CHECK,
    ELSEWHERE,
    FACTOR,
    GRAD,
    GROUP,
    IGNORE,
    KNOWN,
    LOSS,
    NO_LABEL,
    ON_LABEL,
    SCALE,
    STATS,
    STREAM,
    SUM,
    Arguments,
    workspace_size,
)
from .machine_code import Function, function
from .memory import LINE
from .path import ROW, SERIAL, Path, Strides, Want, arithmetic, is_to_memory, of_contiguous, takes_at_once

_INDEX, _HALF = np.dtype(np.intp), np.dtype(np.float16)
_NAMES = {np.dtype(name): name for name in ("float32", "float64")}
_NONE = {dtype: np.empty(0, dtype) for dtype in (*_NAMES, _INDEX)}
_ALONE = _NONE[_INDEX], _NONE[np.dtype(np.float64)]  # `turns` and `sums` of a call by one thread
_ONES = {dtype: np.ones(3, dtype) for dtype in _NAMES}  # `per_row` of such rows
_INTEGERS = 2**63
LABELS = 1 << 18  # labels too few to check in another thread
FUSED = 16  # up to so many classes, labels are checked along with the rows: else they are read twice
PART, LARGEST = 1 << 16, 1 << 20  # logits that a thread takes at once, at least and at most: 10 µs of work, and 200
MOST = 1 << 25  # logits after which a call of a loop returns, so that an interrupt need not wait for long


def total(losses: Array) -> float:
    """The sum of losses."""
    return function("total", _NAMES[losses.dtype])((np.ascontiguousarray(losses),))


def _loop(code: str, acc: Any, x_size: int, out_size: int) -> Function:
    """A loop for numbers of dtype `acc`, and logits and a gradient of these sizes in bytes."""
    name = _NAMES[acc]
    return function(code, name, "uint16" if x_size == 2 else name, "uint16" if out_size == 2 else name)


# A simple call, as the user made it


_Kind = tuple[Any, int, bool, float, float, float, int]  # as `_prepared` unpacks it


def at_once(
    logits: Any, target: Any, options: tuple[Any, ...], wants_grad: bool, out: Any
) -> tuple[Array, Array | None] | None:
    """Loss and gradient of contiguous rows with labels, and options that are plain numbers.

    None, before anything of the caller's is written, if the call is not so simple or a label is wrong. The results have
    the same bits as those of `block`, because the loops are the same.
    """
    if not (is_usual() and takes_at_once(logits, target, options, out)):
        return None
    _, reduction, _, _, ignore, smoothing, z_loss, softcap, _, _, _, factor = options
    dtype, classes, count = logits.dtype, logits.shape[-1], target.size
    acc = arithmetic(dtype)
    is_mean = reduction == "mean"
    ignores = ignore is not None and -_INTEGERS <= ignore < _INTEGERS
    if not ignores:
        ignore = -1  # which is not a class, so that no row is ignored by mistake
    grad = memory.empty(logits.shape, dtype) if wants_grad and out is None else out
    label = target if target.dtype is _INDEX else target.astype(_INDEX)
    is_small = count * (classes + ROW) <= 3 * SERIAL
    # Losses of which only the sum is wanted are in memory that is used again.
    is_lent = not is_small and reduction != "none" and count * acc.itemsize <= KEPT
    room = borrow(count * acc.itemsize) if is_lent else None
    loss = memory.empty((count,), acc) if room is None else room[: count * acc.itemsize].view(acc)
    arrays = logits, label, loss, _NONE[acc] if grad is None else grad
    kind = dtype, classes, is_to_memory(logits, grad), smoothing, z_loss, softcap or 0.0, ignore
    scale = 1.0 if factor is None else factor
    job = LOSS if grad is None else LOSS | GRAD
    found, kept = -1.0, count
    run = _run if is_small else _run_over_threads
    total = 0 if reduction == "none" else SUM
    if (
        is_small or (out is None and classes <= FUSED and _may_all_count(label, classes))
    ) and not 0 <= ignore < classes:
        found = run(kind, arrays, job | CHECK | total, scale / count if is_mean else scale)
    if found < 0:  # labels could not be checked along with the rows, or some label is ignored or wrong
        kept = _count_kept(label, classes, ignore, ignores)
        if kept <= 0:
            return None
        job |= IGNORE if kept < count else 0
        scale = scale / kept if is_mean else scale
        found = run(kind, arrays, job | total, scale)
    if reduction == "none":
        return loss.reshape(target.shape), grad
    if room is not None:
        give_back(room)
    if is_mean:
        found /= kept
    if acc.itemsize == 4 and not found < 1e30:  # np.errstate takes as long as several rows
        with np.errstate(all="ignore"):
            return acc.type(found), grad
    return acc.type(found), grad


def _run(kind: _Kind, arrays: tuple[Array, Array, Array, Array], job: int, scale: float) -> float:
    """Call a loop on all rows of these arrays; return its result."""
    x, label, loss, out = arrays
    loop, record, per_row, q, size = _prepared(kind, loss.shape[0], job, scale)
    return loop((record, x, label, per_row, q, loss, out, workspace(size), *_ALONE))


def _run_over_threads(kind: _Kind, arrays: tuple[Array, Array, Array, Array], job: int, scale: float) -> float:
    """The same over several threads, which take parts of the rows."""
    x, label, loss, out = arrays
    count, classes = len(loss), kind[1]
    team = threads.team(count * (classes + ROW), 3 * SERIAL)
    loop, record, per_row, q, size = _prepared(kind, count, job, scale, team)
    in_groups = job & SUM and _turns(classes)[1] == GROUP
    sums = np.empty(-(-count // GROUP) if in_groups else 0)
    # If this cannot be compiled, nothing may be written.
    add_up = function("combined") if in_groups else function("total", _NAMES[loss.dtype])
    turns, results = threads.Turns(count), [0.0]

    def work_off(turn: Iterator[None]) -> None:
        given = record, x, label, per_row, q, loss, out, workspace(size), turns.numbers, sums
        results.extend(loop(given) for _ in turn)

    threads.parallel(work_off, turns, team)
    if min(results) < 0:  # CHECK has found a fault
        return -1.0
    return add_up((sums if in_groups else loss,)) if job & SUM else 0.0


def _may_all_count(label: Array, classes: int) -> bool:
    """Whether the first and the last labels are classes: those to ignore are often at the end."""
    if label.size <= 2 * GROUP:
        return True
    record, flat = _of_labels(classes, 0, False), label.reshape(-1)
    return all(function("count_kept")((some, record)) >= 0 for some in (flat[:GROUP], flat[-GROUP:]))


def _turns(classes: int) -> tuple[int, int, int]:
    """How many rows a thread takes at once, at least and at most, and how many in one call of a loop."""
    least, most, quota = (max(1, size // (classes + ROW)) for size in (PART, LARGEST, MOST))
    return (GROUP, GROUP, quota) if least >= GROUP // 2 else (least, most, quota)


def _count_kept(label: Array, classes: int, ignore: int, ignores: bool) -> int:
    """How many labels are not ignored; -1 if one of those is not a class."""
    count_kept = function("count_kept")
    record = _of_labels(classes, ignore, ignores)
    if label.size <= LABELS:
        return int(count_kept((label, record)))
    label = label.reshape(-1)
    found = [count_kept((label[:0], record))]  # -1 for this thread's rounding mode

    def work_off(parts: Iterator[int]) -> None:
        found.extend(count_kept((label[part : part + LABELS], record)) for part in parts)

    threads.parallel(work_off, range(0, len(label), LABELS), threads.team(len(label), LABELS))
    return -1 if min(found) < 0 else int(sum(found))


@lru_cache(maxsize=256)
def _of_labels(classes: int, ignore: int, ignores: bool) -> Array:
    """The record that `count_kept` takes."""
    return Arguments(IGNORE if ignores else 0, 0, 0, classes, 0, 0, 0, 0, ignore_index=ignore).record()


@lru_cache(maxsize=256)
def _prepared(
    kind: _Kind, count: int, job: int, scale: float, team: int = 1
) -> tuple[Function, Array, Array, Array, int]:
    """The loop for `count` contiguous rows and its constant arguments: record, per_row, q, size of the workspace."""
    loop, of_any_count, per_row, q, size = _prepared_for_any(kind, job, team)
    record, per_row = of_any_count.copy(), per_row.copy()
    record["outer"], per_row[SCALE] = count, scale
    return loop, record, per_row, q, size


@lru_cache(maxsize=256)
def _prepared_for_any(kind: _Kind, job: int, team: int) -> tuple[Function, Array, Array, Array, int]:
    """The same for any number of rows and any scale."""
    dtype, classes, to_memory, smoothing, z_loss, softcap, ignore_index = kind
    acc = arithmetic(dtype)
    is_plain = smoothing == z_loss == softcap == 0
    path = of_contiguous(classes, job, is_plain, to_memory, dtype.itemsize)
    q, (least, most, quota) = np.array([smoothing / classes], acc), _turns(classes)
    arguments = Arguments(
        path.job, 0, 1, classes, classes, 1, classes, 1, path.width,
        is_half=dtype == _HALF, softcap=softcap, z_loss=z_loss, ignore_index=ignore_index,
        team=team, least=least, most=most, quota=quota,
    )  # fmt: skip
    loop = _loop(path.code, acc, dtype.itemsize, dtype.itemsize)
    per_row = np.array([1 - smoothing, 1, 1], acc)
    size = workspace_size(path.code, classes, path.width, acc.itemsize)
    return loop, arguments.record(), per_row, q if q[0] else q[:0], size


# Any block of rows


def function_for(path: Path, rows: Rows, want: Want) -> Function:
    """The loop for blocks of these rows."""
    x_size = rows.acc.itemsize if path.x is None else rows.logits.itemsize
    out_size = x_size
    if want.output is not None:
        out_size = rows.acc.itemsize if path.out is None else want.output.itemsize
    return _loop(path.code, rows.acc, x_size, out_size)


def block(path: Path, loop: Function, rows: Rows, want: Want, part: Part, buffers: Buffers) -> None:
    """Do everything that is asked for of one block."""
    acc, (outer, classes, inner) = rows.acc, rows.logits.shape
    count, is_strided = outer * inner, path.code == "strided"
    x, x_strides = rows.logits, path.x
    if x_strides is None:
        x, x_strides = contiguous(x, acc, buffers("x", (count, classes))), Strides(classes, 1)
    output, out, made = None, _NONE[acc], None
    if want.output is not None:
        output = out = want.output if part is WHOLE else want.output[part[0], :, part[1]]
        if path.out is None:
            out = made = buffers("made", (count, classes))
    out_strides = path.out or Strides(classes, 1)
    label, per_row = _labels(rows, want)
    q, q_row = _beside_label(rows, buffers)
    answers = np.empty((6 if path.job & (STATS | KNOWN) else 1, count), acc)
    if want.given is not None:
        for kind, values in zip(answers[1:], want.given[:4], strict=False):
            kind[...] = values[part].reshape(-1)
    lead = _lead(out) if is_strided and path.job & STREAM else 0
    shape = (outer, inner) if is_strided else (count, 1)
    record = _record(
        path.job, *shape, classes, *x_strides, *out_strides, path.width, lead=lead, q_row=q_row,
        is_half=rows.grad_dtype == _HALF, softcap=rows.softcap or 0.0, z_loss=rows.z_loss,
    )  # fmt: skip
    room = workspace(workspace_size(path.code, classes, path.width, acc.itemsize))
    loop((record, x, label, per_row, q, answers, out, room, *_ALONE))
    if made is not None:
        store(made, output)
    if want.loss is not None:
        want.loss[part] = answers[0].reshape(outer, inner)
    if want.stats is not None:
        for whole, values in zip(want.stats, answers[1:].reshape(5, outer, inner), strict=True):
            if whole is not None:
                whole[part] = values


@lru_cache(maxsize=256)
def _record(*strides: Any, **others: Any) -> Array:
    return Arguments(*strides, **others).record()


def _labels(rows: Rows, want: Want) -> tuple[Array, Array]:
    """The arguments `label` and `per_row` of a loop."""
    acc = rows.acc
    if rows.target is None:  # the softmax alone
        return _NONE[_INDEX], _ONES[acc]
    known = _rows.known_labels(rows)
    factor = _rows.row_factor(rows, known)
    scale = 1.0 if want.grad is None else _rows.row_scale(rows, factor, want.divisor)
    label: Array = _NONE[_INDEX]
    on_label: Any = 1
    if rows.has_labels:
        label = np.require(rows.target if known is None else known.index, np.intp, ["C", "A"]).reshape(-1)
        if rows.label_smoothing:
            on_label = acc.type(1 - rows.label_smoothing)
        if rows.class_weight is not None and on_label:  # a target of 0 counts 0, whatever the weight
            on_label = on_label * rows.class_weight.take(label)
        if known is not None and known.here is not None:
            label = np.where(known.here.reshape(-1), label, ELSEWHERE)
        if known is not None and known.valid is not None:
            label = np.where(known.valid.reshape(-1), label, NO_LABEL)
    if factor is None and not isinstance(scale, np.ndarray) and not isinstance(on_label, np.ndarray):
        return label, np.array([on_label, 1, scale], acc)
    per_row = np.empty((3, *rows.shape), acc)
    per_row[ON_LABEL].reshape(-1)[...] = on_label
    per_row[FACTOR] = 1 if factor is None else factor
    per_row[SCALE] = scale
    return label, per_row


def _beside_label(rows: Rows, buffers: Buffers) -> tuple[Array, int]:
    """The argument `q` of a loop, and the stride of the distributions."""
    acc, (outer, classes, inner) = rows.acc, rows.logits.shape
    if rows.target is None or (rows.has_labels and not rows.label_smoothing):
        return _NONE[acc], 0
    if rows.has_labels:
        uniform = np.array([rows.label_smoothing / rows.all_classes], acc)
        if not uniform[0]:  # it underflows
            return _NONE[acc], 0
        return uniform if rows.class_weight is None else uniform * rows.class_weight, 0
    a = distribution(rows, rows.target, slice(0, classes), buffers("a", (outer * inner, classes)))
    return a, a.strides[0] // a.itemsize


def _lead(out: Array) -> int:
    """How many rows lie between the start of a cache line and the first row of the gradient."""
    address = out.__array_interface__["data"][0]
    return int(address % LINE // out.itemsize)
