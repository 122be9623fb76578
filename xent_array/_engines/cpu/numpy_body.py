"""The computation of a block of rows in NumPy, used without llvmlite and for rows too long for a compiled loop.

Everything about a row is computed while its block is in cache; between calls of NumPy functions, intermediate results
are held in buffers of the size of a block.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np

from ... import _rows
from ..._rows import Array, Rows, RowStats
from .blocks import Buffers, Part, all_finite, contiguous, distribution, store
from .path import TILE, Want

# If the maximum is above this, max - x may overflow.
_FAR = {np.dtype(kind): kind(np.finfo(kind).max * np.finfo(kind).eps / 8) for kind in (np.float32, np.float64)}


def short_block(rows: Rows, want: Want, part: Part, buffers: Buffers) -> None:
    """The simple case of `block` that `path` selects: the same operations on the same numbers, and nothing else.

    exp(x - max) is computed where the gradient goes, so that a gradient does not even need a buffer.
    """
    assert rows.target is not None
    assert want.loss is not None
    count, classes, _ = rows.logits.shape
    x = rows.logits.reshape(count, classes)
    grad = None if want.grad is None else want.grad[part].reshape(count, classes)
    starts = _starts(count, classes)
    at = starts + x.argmax(axis=1)
    largest = x.reshape(-1).take(at)
    if not math.isfinite(np.add.reduce(largest)):  # or their sum overflows: `block` is correct then, too
        return block(rows, want, part, buffers)
    label = starts + rows.target.reshape(-1).astype(np.intp, copy=False)
    e = np.subtract(x, largest[:, None], out=buffers("e", (count, classes)) if grad is None else grad)
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
    flat.put(at, np.where(label == at, 0 - rest * p_max, p_max) * scale)
    return None


def block(rows: Rows, want: Want, part: Part, buffers: Buffers) -> None:
    """Computes all that is wanted of one block: a tile of whole rows, or one long row in several tiles."""
    known = _rows.known_labels(rows)
    factor = _rows.row_factor(rows, known)
    spans = _spans(rows.classes)
    tile = None
    if want.given is None:
        tile = _Tile(rows, spans[0], known, buffers)
        stats = tile.stats()
        for span in spans[1:]:
            tile = _Tile(rows, span, known, buffers)
            stats = _rows.merge(stats, tile.stats())
        if rows.target is None:  # the softmax alone, which is the gradient of lse
            stats = RowStats(stats.max, stats.rest, stats.gap, mass=rows.acc.type(1))
    else:
        stats = RowStats(*(values[part].reshape(-1) for values in want.given[:4]))
    finite = all_finite(stats.max)
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
            tile = _Tile(rows, span, known, buffers)
            log = np.subtract(tile.below(stats.max), tail[:, None], out=tile.e)
            store(log, want.log[part[0], span, part[1]])
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
                tile = _Tile(rows, span, known, buffers)
                tile.exponentials(stats.max)
            tile.grad(stats.rest, stats.mass, more, coef, p_max, scale, want.grad[part[0], span, part[1]])


def _spans(classes: int) -> list[slice]:
    if classes <= TILE:
        return [slice(0, classes)]
    return [slice(start, min(start + TILE, classes)) for start in range(0, classes, TILE)]


class _Tile:
    """Whole rows of a block, or a span of one long row.

    `x` holds its logits after softcap, row by row. The buffer `e` holds, in turn, x (unless that is a view), x - max,
    exp(x - max) and the gradient. The target is a = `a` or, for labels, `label_part` at `label` plus `each` everywhere.
    """

    def __init__(self, rows: Rows, span: slice, known: _rows.Labels | None, buffers: Buffers) -> None:
        logits, target = rows.logits, rows.target
        if span.stop - span.start != logits.shape[1]:
            logits = logits[:, span, :]
        self.count, self.classes = logits.shape[0] * logits.shape[2], logits.shape[1]
        self.buffers = buffers
        self.e = buffers("e", (self.count, self.classes))
        self.x = contiguous(logits, rows.acc, self.e)
        self.slope: Array | None = None
        if rows.softcap is not None:
            quotient = np.divide(self.x, rows.softcap, out=self.e)
            self.slope = _slope_of_tanh(quotient, buffers("slope", quotient.shape))
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
            self.a = distribution(rows, target[:, span, :], span, buffers("a", self.e.shape))
            return
        if rows.label_smoothing:
            self.each = rows.acc.type(rows.label_smoothing / rows.all_classes)
            if rows.class_weight is not None and self.each:
                self.each = self.each * rows.class_weight[span]
        label = (target if known is None else known.index).reshape(-1).astype(np.intp, copy=False)
        if rows.class_weight is not None and self.label_part:  # a 0 remains 0, whatever the weight
            self.label_part = self.label_part * rows.class_weight.take(label)
        if known is not None and known.valid is not None:
            self.valid = known.valid.reshape(-1)
        for counts in (None, None) if known is None else (known.valid, known.here):
            if counts is not None:
                self.label_part = np.where(counts.reshape(-1), self.label_part, rows.acc.type(0))
        if self.classes != rows.classes:
            inside = (label >= span.start) & (label < span.stop)
            label = np.where(inside, label, span.start) - span.start
            self.label_part = np.where(inside, self.label_part, rows.acc.type(0))
        self.label = self.starts + label

    def stats(self) -> RowStats:
        """The stats over these classes. Leaves exp(x - max) in `e`, with 0 at the maximum."""
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
                evenly = self._weighed(e, self.each)
                whole = np.add.reduce(self.each) if self.each.ndim else self.each * e.dtype.type(self.classes)
                if self.valid is not None:
                    evenly, whole = np.where(self.valid, evenly, 0), np.where(self.valid, whole, 0)
                gap, mass = gap + evenly, mass + whole
        elif self.a is not None:
            gap, mass = self._weighed(e, self.a), np.add.reduce(self.a, axis=1)
        if in_halves:
            gap, e = 2 * gap, np.multiply(e, 2, out=e)
        np.exp(e, out=e)
        flat.put(self.at, 0)
        return RowStats(largest, np.add.reduce(e, axis=1), gap, mass)

    def exponentials(self, largest: Array) -> None:
        """Computes exp(x - max) in `e`, for a maximum that is already known."""
        at = self.starts + self.x.argmax(axis=1)
        holds = _pick(self.x, at) == largest
        self.at = at if holds.all() else at[holds]
        np.exp(self.below(largest), out=self.e)

    def below(self, largest: Array, in_halves: bool = False) -> Array:
        """Computes x - max in `e`, or half of it; a row whose maximum is not finite ends as NaN in any case."""
        if not all_finite(largest):
            largest = np.where(np.isfinite(largest), largest, 0)
        if in_halves:
            return np.subtract(np.divide(self.x, 2, out=self.e), largest[:, None] / 2, out=self.e)
        return np.subtract(self.x, largest[:, None], out=self.e)

    def _weighed(self, below: Array, a: Array) -> Array:
        """sum(a·(max - x)) of each row, where 0·inf counts as 0."""
        product = np.multiply(below, a, out=self.buffers("product", below.shape))
        total = np.add.reduce(product, axis=1)
        if np.isnan(total).any():
            product[np.equal(a, 0) | (below == 0)] = 0
            total = np.add.reduce(product, axis=1)
        return -total

    def grad(self, rest: Array, mass: Any, more: Any, coef: Any, p_max: Array, scale: Any, out: Array) -> None:
        """Writes scale·[coef·p - a] to `out`, where coef = mass + more.

        At the maximum, it is computed from 1 - p = rest·p_max where p itself would cancel.
        """
        view = out[:, :, 0] if out.shape[2] == 1 else None
        direct = view is not None and view.dtype == self.e.dtype and view.flags.carray
        # The products formed first below may overflow where the whole expression does not.
        beyond = None if np.isfinite(scale * coef + scale * mass).all() else self.e * p_max[:, None]
        g = np.multiply(self.e, (p_max * (scale * coef))[:, None], out=view if direct else self.e)
        flat, at = g.reshape(-1), self.at
        who = slice(None) if len(at) == self.count else at // self.classes
        a_top: Any = self.e.dtype.type(0)
        if self.a is not None:
            a_top = _pick(self.a, at)
            g -= np.multiply(self.a, _column(scale), out=self.buffers("product", g.shape))
        elif self.label is not None:
            flat.put(self.label, flat.take(self.label) - scale * self.label_part)
            a_top = np.where(self.label[who] == at, _of(self.label_part, who), a_top)
            if self.each is not None:
                g -= np.multiply(_column(scale), self.each, out=self.buffers("product", g.shape))
                a_top += self.each.take(at % self.classes) if self.each.ndim else self.each
        rest, top_coef, p_max = _of(rest, who), _of(coef, who), _of(p_max, who)
        kept = _of(mass, who) - a_top  # the part of coef - a without `more`, which would be lost if small
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
            store(g, out)

    def _redo(self, g: Array, p: Array, mass: Any, coef: Any, top: Array, scale: Any) -> None:
        """Recomputes the rows of `g` whose products overflowed: scale·[coef·p - a] from p, the bracket first.

        Where p is 0, coef·p counts as 0. At the maximum, the bracket is `top`.
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
    """1 - tanh²(x), computed as 4e/(1 + e)² with e = exp(-2|x|), which involves no cancellation."""
    e = np.exp(np.multiply(np.abs(x, out=out), -2, out=out), out=out)
    square = np.square(1 + e)
    return np.divide(np.multiply(e, 4, out=e), square, out=e)


@lru_cache(maxsize=4)  # arrays of at most BLOCK numbers
def _starts(count: int, classes: int) -> Array:
    """The flat index at which each row of a block starts."""
    starts = np.arange(0, count * classes, classes)
    starts.flags.writeable = False  # all callers share it
    return starts


def _pick(values: Array, at: Array) -> Array:
    """The elements at these flat indices, in C order."""
    if values.flags.c_contiguous:
        return values.reshape(-1).take(at)
    return values[at // values.shape[1], at % values.shape[1]]


def _column(values: Any) -> Any:
    return values[:, None] if isinstance(values, np.ndarray) else values


def _of(values: Any, who: Any) -> Any:
    return values[who] if isinstance(values, np.ndarray) else values
