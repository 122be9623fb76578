"""Cutting rows into blocks, workspaces of threads, and copies of blocks that make them contiguous."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np

from ..._rows import Array, Rows
from . import memory

Part = tuple[slice, slice]  # of the outer and of the inner axis
WHOLE: Part = (slice(None), slice(None))

KEPT = 1 << 22  # bytes of workspace that are kept for the next call: allocating may take longer than a block


def cut(shape: tuple[int, int], count: int) -> Iterator[Part]:
    """Parts of the (outer, inner) rows, of at most `count` rows each."""
    outer, inner = shape
    if 0 < inner <= count:
        step = count // inner
        for start in range(0, outer, step):
            yield slice(start, start + step), slice(None)
    else:
        for row in range(outer):
            for start in range(0, inner, count):
                yield slice(row, row + 1), slice(start, start + count)


def sliced(rows: Rows, part: Part) -> Rows:
    """The rows of one part."""
    outer, inner = part
    target, upstream = rows.target, rows.upstream
    if target is not None:
        target = target[part] if target.ndim == 2 else target[outer, :, inner]
    return rows._replace(
        logits=rows.logits[outer, :, inner],
        target=target,
        sample_weight=None if rows.sample_weight is None else rows.sample_weight[part],
        upstream=upstream if upstream is None or isinstance(upstream, float) else upstream[part],
    )


class Buffers:
    """The buffers of one thread, each as large as a block and allocated when it is first used."""

    def __init__(self, size: int, dtype: Any) -> None:
        self.size, self.dtype = size, dtype
        self.buffers: dict[str, Array] = {}

    def __call__(self, use: str, shape: tuple[int, int]) -> Array:
        if use not in self.buffers:
            self.buffers[use] = np.empty(self.size, self.dtype)
        return self.buffers[use][: shape[0] * shape[1]].reshape(shape)


class _Own(threading.local):
    workspace = np.empty(0, np.uint8)


_own = _Own()


def workspace(size: int) -> Array:
    """At least `size` bytes, starting at a cache line, that belong to this thread until its next call."""
    found = _own.workspace
    if len(found) < size:
        found = memory.in_lines(size, np.uint8)
        if size <= KEPT:
            _own.workspace = found
    return found


_returned: deque[Array] = deque(maxlen=2)


def borrow(size: int) -> Array:
    """At least `size` bytes, at most KEPT, for the time of a call; no other call gets them until they are returned."""
    found: Array | None = memory.taken(_returned, size, KEPT)
    return np.empty(size, np.uint8) if found is None else found


def give_back(borrowed: Array) -> None:
    _returned.append(borrowed)


# Copies


def contiguous(block: Array, dtype: Any, buffer: Array) -> Array:
    """(outer, C, inner) as (rows, C) of that dtype: a view if the classes are contiguous, else a copy in `buffer`."""
    outer, classes, inner = block.shape
    if inner == 1:
        view = block[:, :, 0]
        if view.dtype == dtype and view.strides[1] == view.itemsize and view.flags.aligned:
            return view
    np.copyto(buffer.reshape(outer, inner, classes), block.transpose(0, 2, 1), casting="unsafe")
    return buffer


def store(values: Array, out: Array) -> None:
    """(rows, C) to (outer, C, inner)."""
    outer, classes, inner = out.shape
    if out.dtype == np.float16:
        values = _rounded_to_half(values)
    out.transpose(0, 2, 1)[...] = values.reshape(outer, inner, classes)


def _rounded_to_half(values: Array) -> Array:
    """Round values below the smallest normal float16 to a multiple of 2**-24.

    NumPy's cast is very slow for each such value that it has to round, and gradients of large batches consist of them.
    """
    tiny = np.abs(values) < 2.0**-14
    if not tiny.any():
        return values
    # Around 0.75, float32 has a spacing of 2**-24.
    return np.where(tiny, np.copysign((values + np.float32(0.75)) - np.float32(0.75), values), values)


def distribution(rows: Rows, target: Array, span: slice, buffer: Array) -> Array:
    """The weighted, smoothed target a = w·q of some classes as (rows, C); a view if that is the target itself."""
    a = contiguous(target, rows.acc, buffer)
    if rows.label_smoothing:
        a = np.multiply(a, 1 - rows.label_smoothing, out=buffer)
        a += rows.label_smoothing / rows.all_classes
    if rows.class_weight is None:
        return a
    weight = rows.class_weight[span]
    # An infinite or NaN weight counts only where the target is not 0.
    counts = True if all_finite(weight) else a != 0
    if counts is not True and a is not buffer:
        np.copyto(buffer, a)
    return np.multiply(a, weight, out=buffer, where=counts)


def all_finite(values: Array) -> bool:
    return bool(np.logical_and.reduce(np.isfinite(values)))
