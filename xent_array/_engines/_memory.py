"""Memory for gradients: that of large ones is kept from one to the next.

What is larger than 32 MiB, malloc gives back to the system when it is freed, and the next gradient would be made of
pages that the system has to clear first: that takes as long as the gradient itself. So when the last array over such
memory is gone, the memory stays mapped for one more gradient of about that size, marked as free: the system takes it
back as soon as it needs it.

From the size on where a copy would be felt, gradients start with a line of cache: JAX takes only those as they are.
"""

from __future__ import annotations

import math
import mmap
import weakref
from collections import deque
from contextlib import suppress
from typing import Any

import numpy as np

from .._rows import Array

LARGE = 1 << 25  # bytes
FELT = 1 << 18  # to JAX, which needs longer to take a smaller one than to copy it
LINE = 64  # bytes of a line of cache

_CAN_KEEP = hasattr(mmap, "MADV_FREE")
_kept: deque[mmap.mmap] = deque(maxlen=1)


def empty(shape: tuple[int, ...], dtype: Any) -> Array:
    """`np.empty`; of memory that was used before, where there is some."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    if size < LARGE or not _CAN_KEEP:
        return np.empty(shape, dtype) if size < FELT else in_lines(math.prod(shape), dtype).reshape(shape)
    memory = None
    with suppress(IndexError):
        memory = _kept.pop()
    if memory is None or not size <= len(memory) <= 2 * size:
        memory = None  # before there is more
        try:
            memory = _mapped(size)
        except OSError:
            return np.empty(shape, dtype)  # which says what there is too little of
    held = np.frombuffer(memory, np.uint8)
    weakref.finalize(held, _keep, memory).atexit = False
    return np.ndarray(shape, dtype, held)


def in_lines(count: int, dtype: Any) -> Array:
    """`np.empty` that begins with a line of cache, so that no vector lies in two."""
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
