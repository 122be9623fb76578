"""Dask arrays: a call only describes the work; each chunk is solved by the engine for its own type of array.

The graph has a few tasks per chunk. Where a chunk holds all classes of its rows, one task computes what is asked for
from one read of it. Where the classes are split, a task per chunk computes the stats of its slice, a tree of tasks
merges them, and the gradient reads each chunk again.

`Rows` hold `Blocks` here: arrays in the user's shape and chunks, which a task views as (outer, C, inner) when it has
the values. So no axis is moved, no chunk is copied, and lengths may be unknown until then.
"""

from __future__ import annotations

import itertools
import math
import multiprocessing
from collections.abc import Callable, Sequence
from functools import partial
from threading import current_thread, main_thread
from typing import Any, NamedTuple

import dask.array as da
import numpy as np
from dask.array.utils import meta_from_array
from dask.base import tokenize
from dask.core import flatten
from dask.highlevelgraph import HighLevelGraph
from dask.layers import ArraySliceDep
from dask.utils import key_split

from .. import _engines, _rows
from .._rows import Array, Rows, RowStats
from . import Engine
from .cpu.cores import at_most

FEW = 32  # numbers that one task adds up; of more, Dask makes a tree
CLASSES, STATS, WEIGHT = -1, -2, -3  # axes by number; those of the rows are 0, 1, …
KEPT = 4  # of the stats: a gradient does not need `correct`

Axes = tuple[int, ...]
Solve = Callable[..., "tuple[Any, ...]"]  # (engine, rows, stats or None): what is computed of a chunk


class Blocks(NamedTuple):
    """A Dask array in the shape of the logits, or of anything with one number per row."""

    array: Any
    shape: tuple[int, ...]  # as an engine sees it: (outer, C, inner) or (outer, inner)
    axis: int  # how many axes of the rows are before that of the classes

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def dtype(self) -> Any:
        return self.array.dtype

    @property
    def axes(self) -> Axes:
        """The axes of the array, by number."""
        if self.ndim == 2:
            return tuple(range(self.array.ndim))
        rows = tuple(range(self.array.ndim - 1))
        return (*rows[: self.axis], CLASSES, *rows[self.axis :])


def declines(rows: Rows) -> str | None:
    parts = [rows.logits, rows.target, rows.weight, rows.sample_weight, rows.upstream, rows.denominator]
    arrays: list[Any] = [part.array if isinstance(part, Blocks) else part for part in parts]
    kinds = {_kind(array._meta) for array in arrays if hasattr(array, "_meta")}
    return None if len(kinds) == 1 else f"takes chunks of one kind, and these are of {' and '.join(sorted(kinds))}"


def _kind(meta: Array) -> str:
    return f"{type(meta).__module__.partition('.')[0]}.{type(meta).__name__}"


def stats(rows: Rows) -> RowStats:
    return _unpacked(rows, _packed(rows, is_marked=False))


def row_stats(rows: Rows) -> RowStats:
    return _unpacked(rows, _packed(rows, is_marked=True))


def loss(rows: Rows) -> Array:
    if not _is_whole(rows):
        return _loss_of(rows, _packed(rows, is_marked=False), _divisor(rows))
    return _reduced(rows, _map(_loss, rows, [_kind_of_loss(rows)], "cross_entropy"), _divisor(rows))


def stats_and_loss(rows: Rows) -> tuple[RowStats, Array]:
    packed = _packed(rows, is_marked=False)
    return _unpacked(rows, packed), _loss_of(rows, packed, _divisor(rows))


def loss_and_grad(rows: Rows, out: Array | None = None) -> tuple[Array, Array]:
    divisor = _divisor(rows)
    if not _is_whole(rows):
        packed = _packed(rows, is_marked=False)
        return _loss_of(rows, packed, divisor), _grad_of(rows, [packed], divisor)
    of_loss = _kind_of_loss(rows)
    both = _map(_loss_and_grad, rows, [of_loss, "logits"], "cross_entropy_value_and_grad", divisor)
    return _reduced(rows, _item(rows, both, 0, of_loss), divisor), _item(rows, both, 1, "logits")


def loss_grad_and_stats(rows: Rows, out: Array | None = None) -> tuple[Array, Array, RowStats]:
    divisor = _divisor(rows)
    if not _is_whole(rows):
        packed = _packed(rows, is_marked=True)
        return _loss_of(rows, packed, divisor), _grad_of(rows, [packed], divisor), _unpacked(rows, packed)
    of_loss = _kind_of_loss(rows)
    three = _map(_loss_grad_and_stats, rows, [of_loss, "logits", "stats"], "cross_entropy_value_and_grad", divisor)
    found = _unpacked(rows, _item(rows, three, 2, "stats"))
    return _reduced(rows, _item(rows, three, 0, of_loss), divisor), _item(rows, three, 1, "logits"), found


def grad(rows: Rows, stats: RowStats) -> Array:
    return _grad_of(rows, [part.array if isinstance(part, Blocks) else part for part in stats[:KEPT]], _divisor(rows))


def grad_alone(rows: Rows, out: Array | None = None) -> Array:
    if not _is_whole(rows):
        return _grad_of(rows, [_packed(rows, is_marked=False)], _divisor(rows))
    return _map(_grad_alone, rows, ["logits"], "cross_entropy_grad", _divisor(rows))


def softmax(rows: Rows, log: bool) -> Array:
    name = "log_softmax" if log else "softmax"
    if _is_whole(rows):
        return _map(partial(_softmax, log=log), rows, ["logits"], name)
    return _map(partial(_softmax_of, log=log), rows, ["logits"], name, stats=[_packed(rows, is_marked=False)])


# What is computed of a chunk


def _loss(engine: Engine, rows: Rows, stats: None) -> tuple[Any, ...]:
    return (_engines.loss(engine, rows),)


def _loss_and_grad(engine: Engine, rows: Rows, stats: None) -> tuple[Any, ...]:
    return _engines.loss_and_grad(engine, rows, None)


def _loss_grad_and_stats(engine: Engine, rows: Rows, stats: None) -> tuple[Any, ...]:
    return _engines.loss_grad_and_stats(engine, rows, None)


def _grad_alone(engine: Engine, rows: Rows, stats: None) -> tuple[Any, ...]:
    return (_engines.grad_alone(engine, rows, None),)


def _grad_from(engine: Engine, rows: Rows, stats: RowStats) -> tuple[Any, ...]:
    return (_nothing(rows) if rows.classes == 0 else engine.grad(rows, stats),)


def _softmax(engine: Engine, rows: Rows, stats: None, log: bool) -> tuple[Any, ...]:
    return (_engines.softmax(engine, rows, log),)


def _softmax_of(engine: Engine, rows: Rows, stats: RowStats, log: bool) -> tuple[Any, ...]:
    stats = stats._replace(mass=rows.xp.ones_like(stats.mass))
    return (_nothing(rows) if rows.classes == 0 else _engines.softmax_from(engine, rows, stats, log),)


def _stats(engine: Engine, rows: Rows, stats: None, is_marked: bool) -> tuple[Any, ...]:
    if rows.classes == 0:
        return (_rows.no_classes(rows, is_marked),)
    return (_engines.row_stats(engine, rows) if is_marked else engine.stats(rows),)


def _loss_from(engine: Engine, rows: Rows, stats: RowStats) -> tuple[Any, ...]:
    factor, _ = _rows.terms(rows)
    return (_rows.row_loss(rows, stats, factor),)


def _count(engine: Engine, rows: Rows, stats: None) -> tuple[Any, ...]:
    """What the rows of a chunk add to the divisor of the mean."""
    divisor = _rows.terms(rows._replace(reduction="mean"))[1]
    return (rows.xp.asarray(divisor, dtype=_rows.widest(rows)),)


def _nothing(rows: Rows) -> Array:
    return rows.xp.zeros_like(rows.logits, dtype=rows.grad_dtype)


# From the chunks of a task to rows, and back


class _Told(NamedTuple):
    """What every task of a call is told."""

    results: list[str]
    axis: int
    classes: int  # in all
    dtype: str  # of the logits
    acc: str
    options: tuple[Any, ...]  # `Rows` from `ignore_index` to `softcap`
    check: Callable[..., bool] | None


class _Chunks(NamedTuple):
    """What a task has of each argument; None if there is no such argument."""

    logits: Any
    target: Any
    weight: Any
    sample_weight: Any
    upstream: Any
    divisor: Any
    stats: tuple[Any, ...]

    @property
    def by_row(self) -> dict[str, Any]:
        """Those that have one number for each row, or one for each row and class."""
        named = {"logits": self.logits, "target": self.target, "sample_weight": self.sample_weight}
        if getattr(self.upstream, "ndim", 0):
            named["grad_output"] = self.upstream
        named |= {f"stats[{number}]": part for number, part in enumerate(self.stats)}
        return {name: part for name, part in named.items() if part is not None}


class _Place(NamedTuple):
    """Where a chunk is: its lengths along the axes before that of the classes and behind it, and where it begins."""

    before: tuple[int, ...]
    behind: tuple[int, ...]
    first: list[Any]  # along each axis of the rows; NaN where it is not known
    start: int  # the first class

    @property
    def rows(self) -> tuple[int, int]:
        return math.prod(self.before), math.prod(self.behind)


def _solved(solve: Solve, told: _Told, slices: tuple[slice, ...], *given: Any) -> Any:
    """What is asked for of a chunk. Of an axis that the result lacks, Dask passes a list of chunks, here of one."""
    parts = list(map(_only, given[6:]))
    stats = tuple(parts[0]) if len(parts) == 1 else tuple(parts)
    logits, target, weight, sample_weight, upstream, divisor = map(_only, given[:6])
    chunks = _Chunks(logits, target, weight, sample_weight, upstream, divisor, stats)
    place = _placed(told, slices, chunks)
    xp = _rows.namespace(next(iter(chunks.by_row.values())))
    in_main_thread = current_thread() is main_thread() and multiprocessing.parent_process() is None
    with _rows.quiet(xp), at_most(None if in_main_thread else 1):
        rows = _viewed(told, place, xp, chunks)
        found = RowStats(*(part.reshape(place.rows) for part in chunks.stats[:KEPT])) if chunks.stats else None
        made = solve(_engines.pick(rows, None), rows, found)
        results = tuple(_shaped(rows, place, *each) for each in zip(told.results, made, strict=True))
    return results if len(results) > 1 else results[0]


def _only(given: Any) -> Any:
    """A chunk, which may be alone in lists."""
    while isinstance(given, list):
        (given,) = given
    return given


def _placed(told: _Told, slices: tuple[slice, ...], chunks: _Chunks) -> _Place:
    """Where the chunk is. Raises TypeError or ValueError if chunks are not what their Dask arrays say, or differ."""
    first, start, classes = [each.start for each in slices], 0, told.classes
    named = chunks.by_row
    of_logits, target = chunks.logits, chunks.target
    one = next(iter(named.values()))
    has_classes = one is of_logits
    if len(first) > one.ndim - has_classes:  # the result has the classes
        start, classes = first.pop(told.axis), slices[told.axis].stop - slices[told.axis].start
    place = _Place(one.shape[: told.axis], one.shape[told.axis + has_classes :], first, start)
    for name, part in named.items():
        if isinstance(part, (np.ma.MaskedArray, np.matrix)):
            raise TypeError(f"a chunk of {name} is a {type(part).__name__}; it must be a plain array")
        has_classes = part is of_logits or (part is target and part.ndim > len(first))
        wanted = (*place.before, *((classes,) if has_classes else ()), *place.behind)
        if tuple(part.shape) != wanted:
            raise ValueError(f"a chunk of {name} has shape {tuple(part.shape)}, where {wanted} is wanted")
    if of_logits is not None and of_logits.dtype.newbyteorder("=") != np.dtype(told.dtype):
        raise TypeError(f"a chunk of logits has dtype {of_logits.dtype}, but its Dask array says {told.dtype}")
    if told.check is not None and target is not None and target.dtype.kind not in "iu":
        raise TypeError(f"a chunk of target has dtype {target.dtype}, but its Dask array says that it has integers")
    return place


def _viewed(told: _Told, place: _Place, xp: Any, chunks: _Chunks) -> Rows:
    """Chunks as rows. Without logits, these are rows of a slice without classes."""
    outer, inner = place.rows
    logits, target, s = chunks.logits, chunks.target, chunks.sample_weight
    classes = 0 if logits is None else logits.shape[told.axis]
    if logits is None:
        one = next(iter(chunks.by_row.values()))
        logits = xp.zeros((outer, 0, inner), dtype=getattr(xp, told.acc), device=_rows.device(one))
    all_count = False
    if told.check is not None and target is not None:
        all_count = told.check(target, s, first=place.first)
    if target is not None:
        is_distribution = target.ndim > len(place.first)
        target = target.reshape((outer, classes, inner) if is_distribution else (outer, inner))
    ignore_index, label_smoothing, z_loss, softcap = told.options
    return Rows(
        xp,
        logits.reshape((outer, classes, inner)),
        np.dtype(told.acc) if xp is np else getattr(xp, told.acc),
        target,
        weight=chunks.weight,
        sample_weight=None if s is None else s.reshape((outer, inner)),
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        softcap=softcap,
        upstream=_scale(xp, place, chunks.upstream, chunks.divisor),
        all_labels_count=all_count,
        start=place.start,
        vocabulary=0 if classes == told.classes else told.classes,
    )


def _scale(xp: Any, place: _Place, upstream: Any, divisor: Any) -> Any:
    """What multiplies the gradient of the sum of the rows."""
    scale: Any = 1.0 if upstream is None else upstream
    if getattr(scale, "ndim", 0):
        scale = scale.reshape(place.rows)
    elif xp is np:
        scale = float(scale)
    if divisor is not None:
        scale = _rows.divide(xp, scale, float(divisor) if xp is np else divisor)
    return None if isinstance(scale, float) and scale == 1 else scale


def _shaped(rows: Rows, place: _Place, kind: str, made: Any) -> Array:
    """A result in the shape that the user's array has in this place."""
    xp = rows.xp
    if kind == "number":
        return xp.sum(made, dtype=_rows.widest(rows)).reshape((1,) * len(place.before + place.behind))
    if kind == "logits":
        return made.reshape((*place.before, rows.classes, *place.behind))
    if kind == "rows":
        return made.reshape(place.before + place.behind)
    parts = xp.stack([xp.astype(part, rows.acc, copy=False) for part in made if part is not None])
    of_slice = (1,) if kind == "stats of a slice" else ()
    return parts.reshape((parts.shape[0], *place.before, *of_slice, *place.behind))


# From rows to tasks


def _is_whole(rows: Rows) -> bool:
    """Whether every chunk holds all classes of its rows."""
    return int(rows.logits.array.numblocks[rows.logits.axis]) == 1


def _row_axes(rows: Rows) -> Axes:
    return tuple(range(rows.logits.array.ndim - 1))


def _axes(rows: Rows, kind: str) -> Axes:
    """The axes of a result of that kind."""
    axes: Axes = rows.logits.axes if kind in ("logits", "stats of a slice") else _row_axes(rows)
    return (STATS, *axes) if kind.startswith("stats") else axes


def _dtype(rows: Rows, kind: str) -> Any:
    return {"logits": rows.grad_dtype, "number": np.float64}.get(kind, rows.acc)


def _map(
    solve: Solve, rows: Rows, results: list[str], name: str, divisor: Any = None, stats: Sequence[Array] = (),
    reads: bool = True, is_marked: bool = False,
) -> Array:  # fmt: skip
    """`solve` for every chunk: an array of its result, or of tuples if there are several."""
    logits = rows.logits
    index = _axes(rows, results[0] if len(results) == 1 else "logits")
    sizes = dict(zip(logits.axes, logits.array.chunks, strict=True))
    axes = tuple(axis for axis in index if axis != STATS)
    told = _Told(
        results, logits.axis, rows.classes, np.dtype(rows.grad_dtype).name, np.dtype(rows.acc).name,
        (rows.ignore_index, rows.label_smoothing, rows.z_loss, rows.softcap), rows.check,
    )  # fmt: skip
    by_row = [rows.target, rows.sample_weight, rows.upstream]
    if CLASSES in axes and not _is_whole(rows):
        by_row = list(map(_computed_once, by_row))
    target, sample_weight, upstream = by_row
    pairs = [
        (ArraySliceDep(tuple(sizes[axis] for axis in axes)), axes),
        *map(_with_axes, [logits if reads else None, target]),
        (None if rows.weight is None else _one_chunk(rows.weight), (WEIGHT,)),
        *map(_with_axes, [sample_weight, upstream, divisor]),
        *((part, ((STATS,) if part.ndim > len(_row_axes(rows)) else ()) + _row_axes(rows)) for part in stats),
    ]
    arguments = [each for part, axes in pairs for each in (part, None if part is None else axes)]
    layout: dict[str, Any] = {}
    if STATS in index:
        layout["new_axes"] = {STATS: _numbers(rows, is_marked)}
    if results in (["number"], ["stats of a slice"]):
        of_one = index if results == ["number"] else (CLASSES,)
        layout["adjust_chunks"] = dict.fromkeys(of_one, 1)
    return _blockwise(
        rows, partial(_solved, solve, told), index, _dtype(rows, results[0]) if len(results) == 1 else object,
        *arguments, token=name, **layout,
    )  # fmt: skip


def _with_axes(part: Any) -> tuple[Any, Axes | None]:
    if isinstance(part, Blocks):
        return part.array, part.axes
    return part, () if hasattr(part, "ndim") else None


def _computed_once(part: Any) -> Any:
    """Blocks that several tasks read, in a layer that Dask does not make part of each of these tasks."""
    if not isinstance(part, Blocks):
        return part
    array = part.array
    name = f"{key_split(array.name)}-{tokenize(array.name, 'once')}"
    blocks = itertools.product(*map(range, array.numblocks))
    graph = HighLevelGraph.from_collections(name, {(name, *k): (array.name, *k) for k in blocks}, [array])
    return part._replace(array=da.Array(graph, name, array.chunks, meta=array._meta))


def _one_chunk(weight: Array) -> Array:
    if isinstance(weight, np.ndarray):
        return da.from_array(weight, chunks=-1)
    if any(map(math.isnan, weight.shape)):
        raise ValueError("weight has chunks of unknown sizes: call compute_chunk_sizes() of it")
    return weight.rechunk(-1)


def _numbers(rows: Rows, is_marked: bool) -> int:
    """How many numbers the stats of a row are."""
    return KEPT + 1 if is_marked and rows.has_labels else KEPT


def _blockwise(rows: Rows, function: Callable[..., Any], index: Axes, dtype: Any, *arguments: Any, **how: Any) -> Array:
    meta = _meta(rows, len(index), dtype)
    return da.blockwise(
        function, index, *arguments, dtype=dtype, meta=meta, concatenate=False, align_arrays=False, **how
    )


def _meta(rows: Rows, ndim: int, dtype: Any) -> Array:
    if dtype is object:  # a tuple for each chunk
        return np.empty((0,) * ndim, object)
    return meta_from_array(rows.logits.array._meta, ndim, dtype)


def _item(rows: Rows, given: Array, number: int, kind: str) -> Array:
    """One of several results of each chunk."""
    index, layout = _axes(rows, kind), {}
    if kind == "stats":
        layout["new_axes"] = {STATS: _numbers(rows, is_marked=True)}
    if kind == "number":
        layout["adjust_chunks"] = dict.fromkeys(index, 1)
    token = given.name.rpartition("-")[0]
    return _blockwise(
        rows, _taken, index, _dtype(rows, kind), given, rows.logits.axes, number, None, token=token, **layout
    )


def _taken(given: Any, number: int) -> Any:
    return _only(given)[number]


# Stats


def _packed(rows: Rows, is_marked: bool) -> Array:
    """The stats of whole rows as one array, whose first axis has length 4, or 5 with `correct`."""
    kind = "stats" if _is_whole(rows) else "stats of a slice"
    parts = _map(partial(_stats, is_marked=is_marked), rows, [kind], "row_stats", is_marked=is_marked)
    if _is_whole(rows):
        return parts
    meta = _meta(rows, len(_row_axes(rows)) + 1, rows.acc)
    axis = rows.logits.axis + 1
    return da.reduction(parts, _unchanged, _merged, axis=axis, dtype=rows.acc, name="merge_stats", meta=meta)


def _unchanged(parts: Array, axis: Any, keepdims: bool) -> Array:
    return parts


def _merged(parts: Array, axis: tuple[int], keepdims: bool) -> Array:
    """The stats of several slices, which are side by side along an axis, merged."""
    xp = _rows.namespace(parts)
    slices = [xp.take(parts, xp.asarray([k]), axis=axis[0]) for k in range(parts.shape[axis[0]])]
    each = [RowStats(*part[:KEPT], *(one != 0 for one in part[KEPT:])) for part in slices]
    with _rows.quiet(xp):
        found = [part for part in _rows.merged(each) if part is not None]
        made = xp.stack([xp.astype(part, parts.dtype, copy=False) for part in found])
    return made if keepdims else xp.squeeze(made, axis=axis[0])


def _unpacked(rows: Rows, packed: Array) -> RowStats:
    dtypes = [rows.acc] * KEPT + [bool] * (packed.shape[0] - KEPT)
    axes = _row_axes(rows)
    return RowStats(
        *(
            _blockwise(rows, _part, axes, dtype, packed, (STATS, *axes), number, None, token="row_stats")
            for number, dtype in enumerate(dtypes)
        )
    )


def _part(packed: Any, number: int) -> Array:
    part = _only(packed)[number]
    return part if number < KEPT else part != 0


def _grad_of(rows: Rows, stats: list[Array], divisor: Any) -> Array:
    return _map(_grad_from, rows, ["logits"], "cross_entropy_grad", divisor, stats)


# The loss


def _kind_of_loss(rows: Rows) -> str:
    """Of the loss of a chunk: one for each row, or their sum."""
    return "rows" if rows.reduction == "none" else "number"


def _loss_of(rows: Rows, packed: Array, divisor: Any) -> Array:
    if not rows.has_labels:
        rows = rows._replace(target=None)  # whose mass is in the stats
    losses = _map(_loss_from, rows, [_kind_of_loss(rows)], "cross_entropy", stats=[packed], reads=False)
    return _reduced(rows, losses, divisor)


def _divisor(rows: Rows) -> Any:
    """What the mean divides by, a number or an array of no dimension; None for other reductions."""
    if rows.reduction != "mean" or rows.denominator is not None:
        return rows.denominator
    count = math.prod(rows.shape)
    if not rows.has_labels:
        if rows.sample_weight is None and not math.isnan(count):
            return float(count)
        weights = _ones(rows) if rows.sample_weight is None else rows.sample_weight
        rows = rows._replace(target=None, sample_weight=weights)
    return _reduced(rows, _map(_count, rows, ["number"], "count", reads=False), None, np.float64)


def _ones(rows: Rows) -> Blocks:
    """A 1 for each row, however many there are."""
    one_class = (slice(None),) * rows.logits.axis + (0,)
    return Blocks(da.ones_like(rows.logits.array[one_class], dtype=rows.acc), rows.shape, rows.logits.axis)


def _reduced(rows: Rows, parts: Array, divisor: Any, dtype: Any = None) -> Array:
    """The sum of numbers of all chunks, divided if there is a divisor; or the losses, if they are not to be reduced."""
    if rows.reduction == "none":
        return parts
    if parts.npartitions > FEW:
        every = dict.fromkeys(range(parts.ndim), 16)
        parts = da.reduction(
            parts, _unchanged, _summed, dtype=np.float64, name="reduce", meta=_meta(rows, 0, np.float64),
            split_every=every,
        )  # fmt: skip
    dtype = np.dtype(rows.acc if dtype is None else dtype)
    index = _row_axes(rows)[: parts.ndim]
    return _blockwise(rows, _divided, (), dtype, parts, index, *_with_axes(divisor), dtype.name, None, token="reduce")


def _summed(parts: Array, axis: Any, keepdims: bool) -> Array:
    xp = _rows.namespace(parts)
    with _rows.quiet(xp):
        return xp.sum(parts, axis=axis, keepdims=keepdims)


def _divided(parts: Any, divisor: Any, dtype: str) -> Array:
    first, *others = flatten([parts])
    xp = _rows.namespace(first)
    with _rows.quiet(xp):
        total = xp.sum(sum(others, first))
        if divisor is not None:
            total = _rows.divide(xp, total, float(divisor) if xp is np else divisor)
        return xp.astype(xp.asarray(total), getattr(xp, dtype))[()]
