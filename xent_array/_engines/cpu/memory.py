"""Memory for large arrays: that of an array which is gone is kept for the next one.

malloc returns large arrays to the system when they are freed: those above 32 MiB always, and in threads other than the
main one most of those above a few. The next such array is made of pages that the system has to clear first, which takes
as long as a gradient itself. So when the last reference to a large array is gone, its memory stays mapped for one more
of about that size, marked as free: the system takes it back as soon as it needs it. Two pieces are always kept, one for
a gradient and one for the losses of its rows; and more, for threads that each make a gradient, while they have `ROOM`.

Above a certain size arrays start at a cache line: only those does JAX take without a copy.
"""

from __future__ import annotations

import math
import mmap
import weakref
from collections import deque
from collections.abc import Sized
from contextlib import suppress
from threading import current_thread, main_thread
from typing import Any, TypeVar

import numpy as np

from ..._rows import Array

M = TypeVar("M", bound=Sized)

MAPPED = 1 << 25  # bytes from which arrays are mapped, and their memory kept, in the main thread
ELSEWHERE = 1 << 22  # the same in other threads
ROOM = 1 << 27  # bytes that may be kept in more than two pieces
ALIGNED = 1 << 18  # bytes from which arrays start at a cache line; JAX copies smaller ones faster than it takes them
LINE = 64  # bytes of a cache line

_CAN_KEEP = hasattr(mmap, "MADV_FREE")
_kept: deque[mmap.mmap] = deque()


def empty(shape: tuple[int, ...], dtype: Any) -> Array:
    """`np.empty`, of memory that was used before where there is some."""
    size = math.prod(shape) * dtype.itemsize
    if size < ALIGNED:
        return np.empty(shape, dtype)
    if size < _least_mapped() or not _CAN_KEEP:
        return in_lines(math.prod(shape), dtype).reshape(shape)
    memory = taken(_kept, size, 2 * size)
    if memory is None:
        try:
            memory = _mapped(size)
        except OSError:
            return np.empty(shape, dtype)  # whose error says how much memory is missing
    held = np.frombuffer(memory, np.uint8)
    weakref.finalize(held, _keep, memory).atexit = False
    return np.ndarray(shape, dtype, held)


def _least_mapped() -> int:
    return MAPPED if current_thread() is main_thread() else min(MAPPED, ELSEWHERE)


def taken(kept: deque[M], least: int, most: int) -> M | None:
    """A kept piece of memory of a size in that range, which is no longer kept."""
    for _ in range(len(kept)):
        with suppress(IndexError):  # another thread was faster
            memory = kept.popleft()
            if least <= len(memory) <= most:
                return memory
            kept.append(memory)
    return None


def in_lines(count: int, dtype: Any) -> Array:
    """`np.empty` that starts at a cache line, so that no vector lies in two."""
    size = count * np.dtype(dtype).itemsize
    memory = np.empty(size + LINE, np.uint8)
    start = -memory.__array_interface__["data"][0] % LINE
    return memory[start : start + size].view(dtype)


def _mapped(size: int) -> mmap.mmap:
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError, AttributeError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def _keep(memory: mmap.mmap) -> None:
    with suppress(OSError):
        memory.madvise(mmap.MADV_FREE)
        _kept.append(memory)
    with suppress(IndexError):  # another thread has dropped it
        while len(held := list(_kept)) > 2 and sum(map(len, held)) > ROOM:
            _kept.popleft()
