"""NumPy arrays: blocks of rows that stay in cache, over threads.

The driver cuts the rows into blocks and lets the calling thread and threads of a pool take one after another. A body
does all that is asked of one block while it is in cache: its logits are read once, its gradient is written once, and
what lies between lives in a scratch of the size of a block. 16-bit, strided and byte-swapped logits are widened into
that scratch, never as a whole. There are two bodies: NumPy code, `_block`; and loops compiled by Numba, where that is
installed (`_compiled.py`). Which one takes a row follows from C, its options and what is installed, never from the
batch.

Every operation on a row depends on its own C numbers only, so its loss and gradient are the same to the last bit
in any batch and under any number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import lru_cache
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from .. import _rows
from .._rows import Array, Rows, RowStats
from . import _arithmetic, _memory, _threads
from ._cores import threads as threads

BLOCK = 1 << 18  # logits in a block, at most: its scratch is 1 MiB in float32
TILE = 1 << 20  # a row of more classes is read in tiles of this many, so that scratch stays bounded
ALONE = 1 << 16  # less work than this many logits is not worth waking a thread for
ROW = 24  # what a row costs beside its logits, in logits
QUICK = 3  # times as much work is not worth one where loops are compiled


# Above this, max - x may be beyond the range of finite numbers.
_FAR = {np.dtype(kind): kind(np.finfo(kind).max * np.finfo(kind).eps / 8) for kind in (np.float32, np.float64)}

Part = tuple[slice, slice]  # of the outer and of the inner axis
_WHOLE: Part = (slice(None), slice(None))


class Cpu:
    """The engine, with the loops that Numba compiles where it is installed, or without."""

    borrows = True

    def __init__(self, name: str, *, compile: bool) -> None:
        self.name, self.compile = name, compile

    def declines(self, rows: Rows) -> str | None:
        return None if rows.xp is np else f"takes NumPy arrays, and these are of {rows.xp.__name__}"

    def reads_labels_free(self, rows: Rows) -> bool:
        return True

    def at_once(
        self, logits: Any, target: Any, reduction: str, upstream: float | None, wants_grad: bool, out: Any
    ) -> tuple[Array, Array | None] | None:
        compiled = (_compiled_body or compiled_body()) if self.compile else ""
        if isinstance(compiled, str):
            return None
        answer: tuple[Array, Array | None] | None = compiled.at_once(
            logits, target, reduction, upstream, wants_grad, out
        )
        return answer

    @_arithmetic.in_usual
    def stats(self, rows: Rows) -> RowStats:
        filled = _stats(rows)
        self._drive(rows, _Want(stats=filled))
        return filled

    @_arithmetic.in_usual
    def row_stats(self, rows: Rows) -> RowStats:
        filled = _stats(rows, with_hits=True)
        self._drive(rows, _Want(stats=filled))
        return _rows.marked(rows, filled, filled.correct)

    @_arithmetic.in_usual
    def stats_and_loss(self, rows: Rows) -> tuple[RowStats, Array]:
        filled = _stats(rows)
        return filled, self._loss(rows, stats=filled)

    @_arithmetic.in_usual
    def loss(self, rows: Rows) -> Array:
        return self._loss(rows)

    @_arithmetic.in_usual
    def grad(self, rows: Rows, stats: RowStats, out: Array | None = None) -> Array:
        out = _gradient(rows) if out is None else out
        self._drive(rows, _Want(given=stats, grad=out, divisor=_divisor(rows) if rows.reduction == "mean" else None))
        return out

    @_arithmetic.in_usual
    def loss_and_grad(self, rows: Rows, out: Array | None = None) -> tuple[Array, Array]:
        out = _gradient(rows) if out is None else out
        return self._loss(rows, out=out), out

    @_arithmetic.in_usual
    def loss_grad_and_stats(self, rows: Rows, out: Array | None = None) -> tuple[Array, Array, RowStats]:
        filled = _stats(rows, with_hits=True)
        out = _gradient(rows) if out is None else out
        return self._loss(rows, stats=filled, out=out), out, _rows.marked(rows, filled, filled.correct)

    @_arithmetic.in_usual
    def softmax(self, rows: Rows, log: bool) -> Array:
        out = _gradient(rows)
        self._drive(rows, _Want(log=out) if log else _Want(grad=out))
        return out

    def _loss(self, rows: Rows, *, stats: RowStats | None = None, out: Array | None = None) -> Array:
        """The loss; the stats and the gradient into `stats` and `out` where they are given."""
        divisor = _divisor(rows) if rows.reduction == "mean" else None
        losses = np.empty(rows.logits.shape[::2], rows.acc)
        self._drive(rows, _Want(loss=losses, stats=stats, grad=out, divisor=divisor))
        if rows.reduction == "none":
            return losses
        compiled = compiled_body() if self.compile else ""
        losses = _rows.in_order(rows, losses)
        total = _sum(losses) if isinstance(compiled, str) else compiled.total(losses)
        return rows.acc.type(total if divisor is None else _rows.divide(np, total, divisor))

    def _drive(self, rows: Rows, want: _Want) -> None:
        outer, classes, inner = rows.logits.shape
        count = outer * inner
        body, block, alone = self._body(rows, want)
        work = count * (classes + ROW)
        if work <= alone:
            if count:
                body(rows, want, _WHOLE, _Scratch(count * min(classes, TILE), rows.acc))
            return
        team = _threads.team(work, alone)
        # Small enough for cache, large enough that Python is idle, and some for every thread.
        blocks = max(team if work <= 4 * team * alone else 2 * team, -(-work // block))
        in_block = -(-count // blocks)
        scratch_size = in_block * min(classes, TILE)

        def work_off(parts: Iterator[Part]) -> None:
            scratch = _Scratch(scratch_size, rows.acc)
            with np.errstate(all="ignore"):  # NumPy's settings are each thread's own
                for part in parts:
                    body(_sliced(rows, part), want, part, scratch)

        _threads.spread(work_off, _parts(rows.shape, in_block), team)

    def _body(self, rows: Rows, want: _Want) -> tuple[Callable[[Rows, _Want, Part, _Scratch], None], int, int]:
        """What does a block of these rows, how much work a block may be, and how much is not worth another thread."""
        if self.compile and rows.classes <= TILE:
            compiled = compiled_body()
            if isinstance(compiled, ModuleType):
                return compiled.block, BLOCK if compiled.converts(rows, want) else 16 * BLOCK, QUICK * ALONE
        return _plain_block if _is_plain(rows, want) else _block, BLOCK, ALONE


engine = Cpu("cpu", compile=True)
numpy_engine = Cpu("numpy", compile=False)


_compiled_body: ModuleType | str | None = None


def compiled_body() -> ModuleType | str:
    """The loops that Numba compiles, or why there are none."""
    if _compiled_body is None:
        try:
            return _threads.whole(_find_compiled_body)
        except _threads.Busy:  # so for now there are none
            return "Numba is just being imported"
    return _compiled_body


def _find_compiled_body() -> ModuleType | str:
    global _compiled_body
    if _compiled_body is None:
        try:
            from . import _compiled

            _compiled_body = _compiled
        except MemoryError as error:  # says nothing of the next time
            return f"Numba cannot be used: {error}"
        except Exception as error:  # such as from a Numba that this NumPy or this Python is too new for
            is_absent = isinstance(error, ModuleNotFoundError) and error.name == "numba"
            _compiled_body = "Numba is not installed" if is_absent else f"Numba cannot be used: {error}"
    return _compiled_body


def _sum(losses: Array) -> float:
    return float(np.add.reduce(losses, dtype=np.float64))


def _stats(rows: Rows, with_hits: bool = False) -> RowStats:
    """Room for the stats; and, of labels, for `_rows.hits`."""
    hits = np.empty(rows.shape, bool) if with_hits and rows.has_labels else None
    max_, rest, gap, mass = (np.empty(rows.shape, rows.acc) for _ in range(4))
    return RowStats(max_, rest, gap, mass, hits)


def _gradient(rows: Rows) -> Array:
    return _memory.empty(rows.logits.shape, rows.grad_dtype)


def _divisor(rows: Rows) -> float:
    """The mean's denominator, part by part in the user's order of rows: nothing else of the batch's size is held."""
    if rows.denominator is not None:
        return float(rows.denominator)
    if rows.sample_weight is None and ((rows.all_labels_count and rows.weight is None) or not rows.has_labels):
        return float(rows.shape[0] * rows.shape[1])
    count = rows.shape[0] * rows.shape[1]
    if count <= BLOCK:
        known = _rows.labels(rows) if rows.has_labels else None
        return float(_rows.denominator(rows, known, _rows.row_factor(rows, known), np.float64))
    target, s = (
        None if values is None else _rows.in_order(rows, values)[:, None]
        for values in (rows.target if rows.has_labels else None, rows.sample_weight)
    )
    total = 0.0
    for start in range(0, count, BLOCK):
        part = slice(start, min(start + BLOCK, count))
        total += _divisor(
            rows._replace(
                logits=np.broadcast_to(rows.acc.type(0), (part.stop - start, rows.classes, 1)),  # nobody reads them
                target=None if target is None else target[part],
                sample_weight=None if s is None else s[part],
                row_order=None,
            )
        )
    return total


# The driver


class _Want(NamedTuple):
    """What is asked of every block: arrays to fill; the stats to start from and the mean's denominator, if known."""

    loss: Array | None = None
    stats: RowStats | None = None
    given: RowStats | None = None
    grad: Array | None = None
    log: Array | None = None
    divisor: float | None = None


def _parts(shape: tuple[int, int], count: int) -> Iterator[Part]:
    """Cuts (outer, inner) into parts of at most `count` rows."""
    outer, inner = shape
    if 0 < inner <= count:
        step = count // inner
        for start in range(0, outer, step):
            yield slice(start, start + step), slice(None)
    else:
        for row in range(outer):
            for start in range(0, inner, count):
                yield slice(row, row + 1), slice(start, start + count)


def _sliced(rows: Rows, part: Part) -> Rows:
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


class _Scratch:
    """One thread's buffers of the size of a block, each made when first asked for."""

    def __init__(self, size: int, dtype: Any) -> None:
        self.size, self.dtype = size, dtype
        self.buffers: dict[str, Array] = {}

    def __call__(self, use: str, shape: tuple[int, int]) -> Array:
        if use not in self.buffers:
            self.buffers[use] = np.empty(self.size, self.dtype)
        return self.buffers[use][: shape[0] * shape[1]].reshape(shape)


# One block


def _is_plain(rows: Rows, want: _Want) -> bool:
    """Whether a loss, with or without gradient, is asked for of dense rows, labels that all count, and no options."""
    _, classes, inner = rows.logits.shape
    return (
        rows.all_labels_count
        and (rows.weight is None and rows.sample_weight is None and rows.softcap is None)
        and (rows.label_smoothing == 0 and rows.z_loss == 0)
        and (want.loss is not None and want.stats is None and want.given is None)
        and (inner == 1 and classes <= TILE)
        and (rows.upstream is None or (isinstance(rows.upstream, float) and abs(rows.upstream) < 1e30))
        and _is_dense(rows.logits, rows.acc)
        and (want.grad is None or _is_dense(want.grad, rows.acc))
    )


def _is_dense(array: Array, dtype: Any) -> bool:
    flags = array.flags
    return bool(array.dtype == dtype and flags.c_contiguous and flags.aligned)


def _plain_block(rows: Rows, want: _Want, part: Part, scratch: _Scratch) -> None:
    """What `_block` comes down to where `_is_plain`: the same operations on the same numbers, and nothing else.

    exp(x - max) is made where the gradient goes, so that even the scratch is not needed.
    """
    assert rows.target is not None
    assert want.loss is not None
    count, classes, _ = rows.logits.shape
    x = rows.logits.reshape(count, classes)
    grad = None if want.grad is None else want.grad[part].reshape(count, classes)
    starts = _starts(count, classes)
    at = starts + x.argmax(axis=1)
    largest = x.reshape(-1).take(at)
    if not math.isfinite(np.add.reduce(largest)):  # or so large that their sum is not: that is right there, too
        return _block(rows, want, part, scratch)
    label = starts + rows.target.reshape(-1).astype(np.intp, copy=False)
    e = np.subtract(x, largest[:, None], out=scratch("e", (count, classes)) if grad is None else grad)
    flat = e.reshape(-1)
    below = flat.take(label)
    np.exp(e, out=e)
    flat.put(at, 0)
    rest = np.add.reduce(e, axis=1)
    want.loss[part] = (np.log1p(rest) - below)[:, None]
    if grad is None:
        return None
    scale = _rows.row_scale(rows, None, want.divisor)
    if scale == 0:
        grad[...] = 0
        return None
    p_max = 1 / (1 + rest)
    np.multiply(e, (p_max * scale)[:, None], out=grad)
    flat.put(label, flat.take(label) - scale)
    flat.put(at, np.where(label == at, -(rest * p_max), p_max) * scale)
    return None


def _block(rows: Rows, want: _Want, part: Part, scratch: _Scratch) -> None:
    """All that is asked of one block: a tile of whole rows, or one long row in several tiles."""
    known = _rows.labels(rows) if rows.has_labels and not rows.all_labels_count else None
    factor = _rows.row_factor(rows, known)
    spans = _spans(rows.classes)
    tile = None
    if want.given is None:
        tile = _Tile(rows, spans[0], known, scratch)
        stats = tile.stats()
        for span in spans[1:]:
            tile = _Tile(rows, span, known, scratch)
            stats = _rows.merge(stats, tile.stats())
        if rows.target is None:  # the softmax alone: the gradient of lse
            stats = RowStats(stats.max, stats.rest, stats.gap, mass=rows.acc.type(1))
    else:
        stats = RowStats(*(values[part].reshape(-1) for values in want.given[:4]))
    finite = _all_finite(stats.max)
    tail = np.log1p(stats.rest) if finite else stats.tail
    lse = stats.max + tail if rows.z_loss else None
    if want.stats is not None:
        if want.stats.correct is not None:
            want.stats.correct[part] = _rows.hits(rows)
        for whole, values in zip(want.stats[:4], stats[:4], strict=True):
            filled = whole[part]
            filled[...] = values.reshape(filled.shape) if isinstance(values, np.ndarray) else values
    if want.loss is not None:
        losses = stats.gap + stats.mass * tail
        if lse is not None:
            losses = losses + (rows.z_loss * lse) * lse
        if factor is not None:
            losses = np.where(factor.reshape(-1) == 0, 0, factor.reshape(-1) * losses)
        filled = want.loss[part]
        filled[...] = losses.reshape(filled.shape)
    if want.log is not None:
        for span in spans:
            tile = _Tile(rows, span, known, scratch)
            log = np.subtract(tile.below(stats.max), tail[:, None], out=tile.e)
            _store(log, want.log[part[0], span, part[1]])
    if want.grad is not None:
        scale = _rows.row_scale(rows, factor, want.divisor)
        scale = scale if isinstance(scale, float) else scale.reshape(-1)
        coef, more = stats.mass, rows.acc.type(0)
        if lse is not None:
            of_lse = rows.z_loss * lse
            more = of_lse + of_lse
            coef = coef + more
        p_max = 1 / (1 + stats.rest) if finite else stats.p_max
        for span in spans:
            if tile is None or len(spans) > 1:
                tile = _Tile(rows, span, known, scratch)
                tile.exponentials(stats.max)
            tile.grad(stats.rest, stats.mass, more, coef, p_max, scale, want.grad[part[0], span, part[1]])


def _spans(classes: int) -> list[slice]:
    if classes <= TILE:
        return [slice(0, classes)]
    return [slice(start, min(start + TILE, classes)) for start in range(0, classes, TILE)]


class _Tile:
    """Whole rows of a block, or a stretch of one long row.

    `x` are its logits, capped, one row after another; `e` the scratch that holds, in turn, x (where that is no view),
    x - max, exp(x - max) and the gradient. The target is a = `a` or, for labels, `label_part` at `label` plus `each`.
    """

    def __init__(self, rows: Rows, span: slice, known: _rows.Labels | None, scratch: _Scratch) -> None:
        logits, target = rows.logits, rows.target
        if span.stop - span.start != logits.shape[1]:
            logits = logits[:, span, :]
        self.count, self.classes = logits.shape[0] * logits.shape[2], logits.shape[1]
        self.scratch = scratch
        self.e = scratch("e", (self.count, self.classes))
        self.x = _dense(logits, rows.acc, self.e)
        self.slope: Array | None = None
        if rows.softcap is not None:
            quotient = np.divide(self.x, rows.softcap, out=self.e)
            self.slope = _slope_of_tanh(quotient, scratch("slope", quotient.shape))
            self.x = np.multiply(np.tanh(quotient, out=self.e), rows.softcap, out=self.e)
        self.has_target = target is not None
        self.starts = _starts(self.count, self.classes)
        self.at: Array = self.starts
        self.a: Array | None = None
        self.label: Array | None = None
        self.label_part: Any = rows.acc.type(1 - rows.label_smoothing)
        self.each: Any = None
        self.valid: Array | None = None
        if target is None:
            return
        if target.ndim == 3:
            self.a = _distribution(rows, target[:, span, :], span, scratch("a", self.e.shape))
            return
        if rows.label_smoothing:
            self.each = rows.acc.type(rows.label_smoothing / rows.classes)
            if rows.weight is not None and self.each:
                self.each = self.each * rows.weight[span]
        label = (target if known is None else known.index).reshape(-1).astype(np.intp, copy=False)
        if rows.weight is not None and self.label_part:  # else it counts 0, whatever the weight is
            self.label_part = self.label_part * rows.weight.take(label)
        if known is not None and known.valid is not None:
            self.valid = known.valid.reshape(-1)
            self.label_part = np.where(self.valid, self.label_part, rows.acc.type(0))
        if self.classes != rows.classes:
            inside = (label >= span.start) & (label < span.stop)
            label = np.where(inside, label, span.start) - span.start
            self.label_part = np.where(inside, self.label_part, rows.acc.type(0))
        self.label = self.starts + label

    def stats(self) -> RowStats:
        """The stats of these classes; leaves exp(x - max) in `e`, with 0 at the maximum."""
        self.at = self.starts + self.x.argmax(axis=1)
        largest = _pick(self.x, self.at)
        in_halves = self.has_target and (largest > _FAR[self.x.dtype]).any()
        e = self.below(largest, in_halves)
        flat = e.reshape(-1)
        gap: Any = e.dtype.type(0)
        mass: Any = gap
        if self.label is not None:
            gap, mass = -flat.take(self.label), self.label_part
            if isinstance(mass, np.ndarray) or mass != 1:
                gap = np.where((mass == 0) | (gap == 0), 0, mass * gap)
            if self.each is not None:
                spread = self._weighed(e, self.each)
                whole = np.add.reduce(self.each) if self.each.ndim else self.each * e.dtype.type(self.classes)
                if self.valid is not None:
                    spread, whole = np.where(self.valid, spread, 0), np.where(self.valid, whole, 0)
                gap, mass = gap + spread, mass + whole
        elif self.a is not None:
            gap, mass = self._weighed(e, self.a), np.add.reduce(self.a, axis=1)
        if in_halves:
            gap, e = 2 * gap, np.multiply(e, 2, out=e)
        np.exp(e, out=e)
        flat.put(self.at, 0)
        return RowStats(largest, np.add.reduce(e, axis=1), gap, mass)

    def exponentials(self, largest: Array) -> None:
        """exp(x - max) into `e`, for a maximum that is known already."""
        at = self.starts + self.x.argmax(axis=1)
        holds = _pick(self.x, at) == largest
        self.at = at if holds.all() else at[holds]
        np.exp(self.below(largest), out=self.e)

    def below(self, largest: Array, in_halves: bool = False) -> Array:
        """Leave x - max in `e`, or half of it; a row whose maximum is not finite ends as NaN whatever is in it."""
        if not _all_finite(largest):
            largest = np.where(np.isfinite(largest), largest, 0)
        if in_halves:
            return np.subtract(np.divide(self.x, 2, out=self.e), largest[:, None] / 2, out=self.e)
        return np.subtract(self.x, largest[:, None], out=self.e)

    def _weighed(self, below: Array, a: Array) -> Array:
        """sum(a·(max - x)) of each row, where 0·inf counts 0."""
        product = np.multiply(below, a, out=self.scratch("product", below.shape))
        total = np.add.reduce(product, axis=1)
        if np.isnan(total).any():
            product[np.equal(a, 0) | (below == 0)] = 0
            total = np.add.reduce(product, axis=1)
        return -total

    def grad(self, rest: Array, mass: Any, more: Any, coef: Any, p_max: Array, scale: Any, out: Array) -> None:
        """scale·[coef·p - a] into `out`, coef = mass + more; at the maximum by 1 - p = rest·p_max where p cancels."""
        view = out[:, :, 0] if out.shape[2] == 1 else None
        direct = view is not None and view.dtype == self.e.dtype and view.flags.carray
        # What is multiplied out below may be beyond the range where the whole is not.
        beyond = None if np.isfinite(scale * coef + scale * mass).all() else self.e * p_max[:, None]
        g = np.multiply(self.e, (p_max * (scale * coef))[:, None], out=view if direct else self.e)
        flat, at = g.reshape(-1), self.at
        who = slice(None) if len(at) == self.count else at // self.classes
        a_top: Any = self.e.dtype.type(0)
        if self.a is not None:
            a_top = _pick(self.a, at)
            g -= np.multiply(self.a, _column(scale), out=self.scratch("product", g.shape))
        elif self.label is not None:
            flat.put(self.label, flat.take(self.label) - scale * self.label_part)
            a_top = np.where(self.label[who] == at, _of(self.label_part, who), a_top)
            if self.each is not None:
                g -= np.multiply(_column(scale), self.each, out=self.scratch("product", g.shape))
                a_top += self.each.take(at % self.classes) if self.each.ndim else self.each
        rest, top_coef, p_max = _of(rest, who), _of(coef, who), _of(p_max, who)
        kept = _of(mass, who) - a_top  # of coef - a, which would lose a small `more`
        from_rest = ((rest < 1) | (kept == 0)) & (a_top != 0) & np.isfinite(top_coef)
        kept = kept + _of(more, who)
        top = np.where(from_rest, kept - top_coef * (rest * p_max), top_coef * p_max - a_top)
        flat.put(at, top * _of(scale, who))
        if self.slope is not None:
            g *= self.slope
        if beyond is not None:
            self._redo(g, beyond, mass, coef, top, scale)
        if not isinstance(scale, float):
            g[scale == 0] = 0
        elif scale == 0:
            g[...] = 0
        if not direct:
            _store(g, out)

    def _redo(self, g: Array, p: Array, mass: Any, coef: Any, top: Array, scale: Any) -> None:
        """Rows of `g` that were multiplied out beyond the range, as they are written: scale·[coef·p - a] from p.

        Where p is 0, coef·p is 0. At the maximum there is `top` within the brackets.
        """
        factors = [np.broadcast_to(v, len(g)) for v in (scale, scale * coef, scale * mass)]
        rows = np.logical_or.reduce([np.isinf(v) for v in factors])
        inner = np.multiply(p, _column(coef), out=p, where=(p != 0) | np.isnan(_column(coef)))
        if self.a is not None:
            inner -= self.a
        elif self.label is not None:
            if self.each is not None:
                inner -= self.each
            flat = inner.reshape(-1)
            flat.put(self.label, flat.take(self.label) - self.label_part)
        inner.reshape(-1).put(self.at, top)
        if self.slope is not None:
            inner *= self.slope
        inner *= _column(scale)
        g[rows] = inner[rows]


def _slope_of_tanh(x: Array, out: Array) -> Array:
    """1 - tanh²(x) as 4e/(1 + e)² with e = exp(-2|x|), which does not cancel."""
    e = np.exp(np.multiply(np.abs(x, out=out), -2, out=out), out=out)
    square = np.square(1 + e)
    return np.divide(np.multiply(e, 4, out=e), square, out=e)


@lru_cache(maxsize=4)  # of at most BLOCK numbers each
def _starts(count: int, classes: int) -> Array:
    """Where each row of a block starts."""
    starts = np.arange(0, count * classes, classes)
    starts.flags.writeable = False  # it is shared
    return starts


def _all_finite(values: Array) -> bool:
    return bool(np.logical_and.reduce(np.isfinite(values)))


def _distribution(rows: Rows, target: Array, span: slice, buffer: Array) -> Array:
    """The weighted, smoothed target a = w·q of these classes: a view where it is the target itself."""
    a = _dense(target, rows.acc, buffer)
    if rows.label_smoothing:
        a = np.multiply(a, 1 - rows.label_smoothing, out=buffer)
        a += rows.label_smoothing / rows.classes
    if rows.weight is None:
        return a
    weight = rows.weight[span]
    counts = True if _all_finite(weight) else a != 0  # a weight of infinity or NaN, only where something meets it
    if counts is not True and a is not buffer:
        np.copyto(buffer, a)
    return np.multiply(a, weight, out=buffer, where=counts)


def _dense(block: Array, dtype: Any, buffer: Array) -> Array:
    """(outer, C, inner) as (rows, C) in the dtype of the arithmetic: a view if rows lie dense, else in `buffer`."""
    outer, classes, inner = block.shape
    if inner == 1:
        view = block[:, :, 0]
        if view.dtype == dtype and view.strides[1] == view.itemsize and view.flags.aligned:
            return view
    np.copyto(buffer.reshape(outer, inner, classes), block.transpose(0, 2, 1), casting="unsafe")
    return buffer


def _store(values: Array, out: Array) -> None:
    """(rows, C) to (outer, C, inner)."""
    outer, classes, inner = out.shape
    if out.dtype == np.float16:
        values = _rounded_to_half(values)
    out.transpose(0, 2, 1)[...] = values.reshape(outer, inner, classes)


def _rounded_to_half(values: Array) -> Array:
    """Numbers below the smallest normal float16, to the multiple of 2**-24 that they round to.

    NumPy's cast is very slow at each such number that it has to round, and gradients of a large batch are made of them.
    """
    tiny = np.abs(values) < 2.0**-14
    if not tiny.any():
        return values
    # Beside 0.75 float32 has steps of 2**-24, above and below.
    return np.where(tiny, np.copysign((values + np.float32(0.75)) - np.float32(0.75), values), values)


def _pick(values: Array, at: Array) -> Array:
    """Elements by their number in C order."""
    if values.flags.c_contiguous:
        return values.reshape(-1).take(at)
    return values[at // values.shape[1], at % values.shape[1]]


def _column(values: Any) -> Any:
    return values[:, None] if isinstance(values, np.ndarray) else values


def _of(values: Any, who: Any) -> Any:
    return values[who] if isinstance(values, np.ndarray) else values
