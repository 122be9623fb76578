"""Dask: lazy arrays of NumPy or CuPy chunks, whose memory is never lent. The engine "dask" takes them as they are.

This bridge makes the chunks of whatever is passed along with the logits fit theirs, and has values checked when they
are computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import dask.array as da
import numpy as np

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
            f"NumPy arrays cannot be combined with a Dask array whose chunks are of {kind.__module__}.{kind.__name__}:"
            " pass Dask arrays with chunks of that kind"
        )
    if array.dtype.kind not in "biufV" or array.dtype.itemsize > 8:
        return array  # to be refused later, with its name
    name = None if array.nbytes <= HASHED else False
    return da.from_array(array, chunks=-1, name=name)


def detached_loss(loss: Any, logits: Any) -> Any:
    return loss


# Axes


def view(plain: View, logits: Any) -> View:
    """The view of the axes of `logits`, which a task makes when it has their values."""
    classes = plain.shape[plain.axis]
    if classes != classes:
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
    """The array with these chunks. Where sizes are unknown, the chunks must be as many."""
    if array.chunks == chunks:
        return array
    wanted = {}
    for axis, (own, others) in enumerate(zip(array.chunks, chunks, strict=True)):
        if not any(map(math.isnan, (*own, *others))):
            wanted[axis] = others
        elif len(own) != len(others):
            raise ValueError(
                f"along axis {axis}, an array has {len(own)} chunks where the logits have {len(others)}, and some are"
                " of unknown size: call compute_chunk_sizes() of both"
            )
    if not any(array.shape):  # which Dask leaves as it is
        return da.zeros_like(array, chunks=chunks)
    return array.rechunk(wanted)


# Values


def later(function: partial[Array], array: Any, *others: Any) -> Any:
    """`function` of every chunk. It learns at which index of the whole array the chunk begins, NaN where unknown."""
    starts = [np.cumsum([0, *chunks[:-1]]).tolist() for chunks in array.chunks]
    fitted = [_fitted(other, array.chunks) for other in others]
    dtype = function.keywords.get("acc", array.dtype)
    return da.map_blocks(
        partial(_at_its_place, function, starts), array, *fitted, dtype=dtype, meta=array._meta.astype(dtype),
        token=function.func.__name__,
    )  # fmt: skip


def _at_its_place(
    function: Callable[..., Array], starts: list[list[int]], *parts: Array, block_id: tuple[int, ...]
) -> Array:
    return function(*parts, first=[start[k] for start, k in zip(starts, block_id, strict=True)])


def at_work(logits: Any) -> AbstractContextManager[Any]:
    return np.errstate(all="ignore")
