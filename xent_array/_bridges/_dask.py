"""Dask: lazy arrays of NumPy or CuPy chunks, whose memory is never lent. The engine "dask" takes them as they are.

Arrays that are passed along with the logits get chunks like theirs. What would be wrong with their values is found when
these are computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import dask.array as da
import numpy as np
from dask.layers import ArraySliceDep

from .._engines.dask import Blocks
from .._problem import View
from .._rows import Array

HASHED = 1 << 20  # bytes of an array whose name in the graph is a hash of its contents; a larger one is not read for it


def refuses(arrays: list[Any], role: str) -> str | None:
    return "they are lazy"


def beside(array: Array, logits: Any, is_lent: bool) -> Any:
    if not isinstance(logits._meta, np.ndarray):
        kind = type(logits._meta)
        raise TypeError(
            "NumPy arrays and lists cannot be combined with a Dask array whose chunks are of"
            f" {kind.__module__}.{kind.__name__}: pass Dask arrays with chunks of that kind"
        )
    return array


def detached_loss(loss: Any, logits: Any) -> Any:
    return loss


# Axes


def view(plain: View, logits: Any) -> View:
    """The view of the axes of `logits`, which a task makes when it has their values."""
    classes = plain.shape[plain.axis]
    if math.isnan(classes):
        raise ValueError(
            f"the number of classes, along axis {plain.axis}, must be known, and the chunks there are of unknown sizes:"
            " call compute_chunk_sizes() of the logits"
        )
    before, behind = plain.shape[: plain.axis], plain.shape[plain.axis + 1 :]
    found = ChunkedView(*plain._replace(order=None, flat=(math.prod(before), classes, math.prod(behind))))
    found.chunks = logits.chunks
    return found


class ChunkedView(View):
    """What is passed along with the logits gets chunks like theirs; results have them, and the user's shape."""

    chunks: Chunks  # of the logits

    def logits(self, xp: Any, array: Array, copy: bool | None = None) -> Blocks:
        return Blocks(_fitted(array, self.chunks), self.flat, self.axis)

    def rows(self, xp: Any, array: Array) -> Blocks:
        chunks = self.chunks[: self.axis] + self.chunks[self.axis + 1 :]
        return Blocks(_fitted(array, chunks), self.flat[::2], self.axis)

    def from_logits(self, xp: Any, array: Array) -> Array:
        return array

    def from_rows(self, xp: Any, array: Array) -> Array:
        return array


Chunks = tuple[tuple[int, ...], ...]


def _fitted(array: Any, chunks: Chunks) -> Any:
    """The array, or a NumPy array, with these chunks. Where sizes are unknown, the chunks must be as many."""
    is_known = not any(math.isnan(n) for axis in chunks for n in axis)
    if isinstance(array, np.ndarray) and is_known:
        return da.from_array(array, chunks=chunks, name=None if array.nbytes <= HASHED else False)
    if isinstance(array, np.ndarray):
        raise ValueError(
            f"an array of shape {array.shape} that is no Dask array cannot be cut like the logits, whose chunks are of"
            " unknown sizes: call compute_chunk_sizes() of the logits"
        )
    if array.chunks == chunks:
        return array
    wanted = {}
    for axis, (own, others) in enumerate(zip(array.chunks, chunks, strict=True)):
        if not any(map(math.isnan, (*own, *others))):
            wanted[axis] = others
        elif len(own) != len(others):
            raise ValueError(
                f"along axis {axis}, an array of shape {array.shape} has {len(own)} chunks where the logits have"
                f" {len(others)}, and some are of unknown size: call compute_chunk_sizes() of both"
            )
    if not any(array.shape):  # which Dask leaves as it is
        return da.zeros_like(array, chunks=chunks)
    return array.rechunk(wanted)


# Values


def later(function: partial[Array], array: Any, dtype: Any) -> Any:
    """`function` of every chunk, of that dtype. It learns at which index of the whole array the chunk begins.

    That is NaN where it is not known.
    """
    axes = tuple(range(array.ndim))
    return da.blockwise(
        partial(_at_its_place, function), axes, ArraySliceDep(array.chunks), axes, array, axes, dtype=dtype,
        meta=array._meta.astype(dtype), token=function.func.__name__, align_arrays=False,
    )  # fmt: skip


def _at_its_place(function: Callable[..., Array], slices: tuple[slice, ...], part: Array) -> Array:
    return function(part, first=[each.start for each in slices])
