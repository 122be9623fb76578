"""What is done to the rows of a tile once its logits are read, up to what their gradients need.

Sums are added in the same order as in `reductions`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from . import (
    FACTOR,
    GRAD,
    HIT,
    IGNORE,
    KNOWN,
    LANES,
    LOSS,
    NO_LABEL,
    ON_LABEL,
    PARTIAL,
    PLAIN,
    SCALE,
    STATS,
    STATS_KINDS,
)
from .call import Call
from .contiguous import is_finite, largest_without_softmax
from .elementwise import copy, fill, scale, subtract
from .math import at_max, exp, finish, log1p, tanh_and_slope
from .reductions import half_gap
from .simd import DOUBLE, Array, Value, Variable, constant, either, loop, prefetch, vectors, when, where
from .tiles import (
    ALL,
    AT_LABEL,
    EXP_FACTOR,
    GAP,
    GRAD_AT_MAX,
    LESS_AT_ALL,
    LESS_AT_LABEL,
    MASS,
    MAX,
    NONE,
    ROW_LOSS,
    TWO,
    Lines,
    State,
    Tile,
    find_max,
    hide,
    look_up,
)

HALF = 8  # rows per vector in float64


class Room(NamedTuple):
    """A tile, what is known of its rows, and what two options need."""

    tile: Tile
    state: State
    slopes: Array  # for the derivative of softcap, in the layout of the tile; empty without softcap
    uniform: Value  # what label smoothing puts on each class


def process(call: Call, room: Room, first: Value, count: Value, read: Callable[[], None], ahead: Ahead) -> None:
    """Compute everything that is asked for of `count` rows, starting at row `first`, but the gradient itself.

    `read` emits the code that reads their logits into the tile and finds what `Maximum` says of them.
    """
    (tile, state, slopes, uniform), is_plain, limit = room, call.asks(PLAIN), call.told.softcap
    with either(is_plain) as (plain, others):
        with plain:
            take_labels(state, call.label.part(first, count), call.told.ignore_index, call.asks(IGNORE))
        with others:
            prepare(call, state, first, count, first == 0)
    read()
    with when(limit > 0):
        for row in loop(0, count, LANES):
            cap(tile, slopes, limit, row)
            find_max(tile, constant(0), tile.classes, state, row)
    with when(uniform > 0):
        add_half_gaps(tile, state, count, uniform)
    with either(is_plain) as (plain, others):
        with plain, when(~tile.has_few):
            look_up(tile, state.label, state.of(AT_LABEL, count), count)
        with others:
            after_max(call, tile, state, uniform, first, count)
    add_exps(tile, state, count, ahead)
    with either(is_plain) as (plain, others):
        with plain:
            finish_plain(state, count, call.per_row.load(SCALE), call.asks(GRAD))
            copy(call.answers_of(0, first, count), state.of(ROW_LOSS, count))
        with others:
            after_sums(call, state, uniform, first, count)


def exceptions_of(call: Call, room: Room) -> Value:
    """Which exceptions `Gradient` makes."""
    has_options = (room.uniform > 0) | (call.told.softcap > 0)
    return where(has_options, ALL, where(room.tile.has_few, constant(TWO), NONE))


def uniform_in(q: Array) -> Value:
    """What label smoothing puts on each class."""
    uniform = Variable(constant(0, q.element))
    with when(q.length != 0):
        uniform.set(q.load(0))
    return uniform.get()


# Before the exponentials


def drop_ignored(state: State, label: Array, ignore_index: Value) -> None:
    """Turn rows with the label `ignore_index` into rows without a label that count nothing."""
    for row, lanes in vectors(label.length, LANES):
        is_ignored = label.load(row, lanes) == ignore_index.repeated(lanes)
        for kind in (FACTOR, SCALE):
            (number,) = state.load(row, lanes, kind)
            state.store(where(is_ignored, 0, number), row, kind)
        state.label.store(where(is_ignored, NO_LABEL, state.label.load(row, lanes)), row)


def prepare(call: Call, state: State, first: Value, count: Value, is_new: Value) -> None:
    """Set up the state of `count` rows, starting at `first`; `is_new` when it has not been written before."""
    per_row, label, ignores = call.per_row, call.label, call.asks(IGNORE)
    n = per_row.length // 3
    with either(n > 1) as (each, alike):
        with each:
            for kind in (ON_LABEL, FACTOR, SCALE):
                copy(state.of(kind, count), per_row.part(n * kind + first, count))
        with alike:
            fill(state.of(ON_LABEL, state.width), per_row.load(ON_LABEL))  # find_gap overwrites it
            with when(is_new | ignores):
                for kind in (FACTOR, SCALE):
                    fill(state.of(kind, state.width), per_row.load(kind))
    with either(label.length != 0) as (labels, none):
        with labels:
            copy(state.label.part(0, count), label.part(first, count))
        with none:
            fill(state.label.part(0, count), NO_LABEL)
    with when(ignores):
        drop_ignored(state, label.part(first, count), call.told.ignore_index)


def cap(tile: Tile, slopes: Array, limit: Value, lane: Value) -> None:
    """Apply softcap to 16 rows in place, and store its derivative in `slopes`, which has the layout of the tile."""
    by = limit.to(tile.numbers.element).repeated(LANES)
    for c in loop(tile.classes):
        place = tile.place(lane, c)
        ratio, slope = tanh_and_slope(tile.numbers.load(place, LANES) / by)
        tile.numbers.store(ratio * by, place)
        slopes.store(slope, place)


class _Vectors:
    """What a tile holds of 16 rows, beginning with `row`: a vector for each class."""

    def __init__(self, tile: Tile, row: Value) -> None:
        self.tile = tile
        # LLVM would otherwise keep an address for each of the unrolled classes, and update all of them for every row.
        self.start = tile.place(row, constant(0)).opaque()

    def load(self, c: Value) -> Value:
        return self.tile.numbers.load(self.start + c * self.tile.class_step, LANES)

    def store(self, value: Value, c: Value) -> None:
        self.tile.numbers.store(value, self.start + c * self.tile.class_step)

    def sum_of(self, function: Callable[[Value], Value]) -> Value:
        """The sum over all classes, added as `contiguous` does a chunk: 32 partial sums, which are folded in halves."""
        classes, total = self.tile.classes, Variable(constant(0, self.tile.numbers.element, LANES))
        with either(classes > PARTIAL) as branches:
            for branch, has_more in zip(branches, (True, False), strict=True):
                with branch:
                    total.set(self._folded(function, 0, 1, has_more))
        return total.get()

    def _folded(self, function: Callable[[Value], Value], first: int, apart: int, has_more: bool) -> Value:
        """The sum over the first class and all others that are so far apart."""
        classes = self.tile.classes
        if apart == PARTIAL:
            total = Variable(function(self.load(constant(first))))
            for c in loop(first + PARTIAL, classes, PARTIAL) if has_more else ():
                total.set(total.get() + function(self.load(c)))
            return total.get()
        total = Variable(self._folded(function, first, 2 * apart, has_more))
        with when(classes > first + apart):
            total.set(total.get() + self._folded(function, first + apart, 2 * apart, has_more))
        return total.get()


def add_half_gaps(tile: Tile, state: State, count: Value, uniform: Value) -> None:
    """Half of what label smoothing contributes to the gap of each of `count` rows, for `find_gap`."""
    for row in loop(0, count, LANES):
        (largest,) = state.load(row, LANES, MAX)
        total = _Vectors(tile, row).sum_of(partial(half_gap, uniform.repeated(LANES), 0.5 * largest))
        state.sums.store(((largest - largest) + total).to(DOUBLE), row)


def find_gap(state: State, lane: Value, mass_without_label: Value, uniform: Value, classes: Value) -> None:
    """Compute gap and mass of each of 16 rows; a row without a label has no gap, and nothing on its label.

    With label smoothing, which puts `uniform` on every class, the sums already hold its half gaps.
    """
    label = state.label.load(lane, LANES)
    largest, at_label, on_label = state.load(lane, LANES, MAX, AT_LABEL, ON_LABEL)
    has_none, on_label = label == NO_LABEL, where(label < 0, 0, on_label)
    half = where(largest == at_label, 0, largest * 0.5 - at_label * 0.5)  # m - x may overflow; or both be infinite
    product = on_label * half
    gap = Variable(where((on_label == 0) | (half == 0), 0, product + product))
    mass = Variable(where(has_none, mass_without_label.to(on_label.element).repeated(LANES), on_label))
    with when(uniform > 0):
        acc, every = on_label.element, (uniform.to(DOUBLE) * classes.to(DOUBLE)).repeated(LANES)
        whole = (gap.get().to(DOUBLE) + 2 * state.sums.load(lane, LANES)).to(acc)
        gap.set(where(has_none, gap.get(), whole))
        mass.set(where(has_none, mass.get(), (mass.get().to(DOUBLE) + every).to(acc)))
    for value, kind in ((on_label, ON_LABEL), (gap.get().with_one_nan(), GAP), (mass.get(), MASS)):
        state.store(value, lane, kind)


def after_max(call: Call, tile: Tile, state: State, uniform: Value, first: Value, count: Value) -> None:
    """Compute all that follows from the maxima of `count` rows; unless classes are few, hide the maxima as -inf."""
    m = state.of(MAX, count)
    with when(~tile.has_few):
        look_up(tile, state.label, state.of(AT_LABEL, count), count)
    mass_without_label = where(call.label.length != 0, constant(0), 1)
    for lane in loop(0, count, LANES):
        find_gap(state, lane, mass_without_label, uniform, tile.classes)
    with either(call.asks(KNOWN)) as (given, computed):
        with given:
            of_max, _, *others = (call.answers_of(kind, first, count) for kind in STATS_KINDS)
            for k in loop(count):
                known = of_max.load(k)
                with when(~(m.load(k) == known)):
                    state.argmax.store(constant(-1, state.argmax.element), k)
                m.store(known, k)
            for kind, values in zip((GAP, MASS), others, strict=True):
                copy(state.of(kind, count), values)
        with computed, when(call.asks(STATS)):
            for k in loop(count):
                with when(~is_finite(m.load(k))):
                    row = tile.numbers.part(tile.place(k, constant(0)), tile.classes)
                    m.store(largest_without_softmax(row, tile.class_step), k)
    with when(~tile.has_few):
        hide(tile, state.argmax, count)


# The exponentials


class Ahead(NamedTuple):
    """What to prefetch meanwhile: for each class of 16 rows a line of `read`, and of `written` unless that is empty.

    For rows other than the first, it is as many times `read_row` and `written_row` further on.
    """

    read: Lines
    read_row: Value
    written: Lines
    written_row: Value


def add_exps(tile: Tile, state: State, count: Value, ahead: Ahead) -> None:
    """Compute exp(x - max) of `count` rows, keep it in place of x, and add it up.

    The maximum itself gives 0; a row whose maximum is not finite becomes NaN. Of two classes only the smaller needs an
    exponential.
    """
    for row in loop(0, count, LANES):
        exps = _Exps(tile, state, row, _prefetching(ahead, row))
        with either((tile.classes == 2) & exps.all_have_maximum) as (two, others):
            with two:
                exps.add_two()
            with others:
                exps.add_all()
        exps.store_sums()


class _Exps:
    """The exponentials of 16 rows, beginning with `row`, and their sums."""

    def __init__(self, tile: Tile, state: State, row: Value, fetch: Callable[[Value], None]) -> None:
        self.logits, self.state, self.row, self.fetch = _Vectors(tile, row), state, row, fetch
        (self.largest,), self.argmax = state.load(row, LANES, MAX), state.argmax.load(row, LANES)
        self.finite = self.largest + (self.largest - self.largest)  # or NaN
        self.total = Variable(self.largest.like(0))

    @property
    def all_have_maximum(self) -> Value:
        """False if some maximum is not to be treated specially."""
        return (self.argmax < 0).packed() == 0

    def add_two(self) -> None:
        one, other = (self.logits.load(constant(c)) for c in range(2))
        self.total.set(exp(where(self.argmax == 0, other, one) - self.finite))
        for c in range(2):
            self.keep(constant(c), self.total.get())

    def add_all(self) -> None:
        for c in loop(self.logits.tile.classes):
            self.keep(c, exp(self.logits.load(c) - self.finite))
        self.total.set(self.logits.sum_of(lambda e: e))

    def keep(self, c: Value, value: Value) -> None:
        self.fetch(c)
        is_max = self.argmax == c.to(self.argmax.element).repeated(LANES)
        self.logits.store(where(is_max, 0, value), c)

    def store_sums(self) -> None:
        total = (self.largest - self.largest) + self.total.get()
        self.state.sums.store(total.with_one_nan().to(DOUBLE), self.row)


def _prefetching(ahead: Ahead, row: Value) -> Callable[[Value], None]:
    """A function that prefetches the two lines of a class for 16 rows."""
    read, written = ahead.read, ahead.written
    to_read = read.numbers.address(read.start + row * ahead.read_row)
    to_write = written.numbers.address(written.start + row * ahead.written_row)

    def fetch(c: Value) -> None:
        prefetch(to_read, c * (read.step * read.numbers.size), "read")
        with when(written.numbers.length != 0):
            prefetch(to_write, c * (written.step * written.numbers.size), "written")

    return fetch


# After


def finish_rows(state: State, lane: Value, z: Value, uniform: Value, has_grad: Value) -> None:
    """Compute the loss of each of 8 rows and, for the gradient, its factors and exceptional entries."""
    m, on_label, factor, row_scale, gap, mass = state.load(lane, HALF, MAX, ON_LABEL, FACTOR, SCALE, GAP, MASS)
    acc = m.element
    r = state.sums.load(lane, HALF).to(acc).to(DOUBLE).with_one_nan()
    state.sums.store(r, lane)
    wide_mass = mass.to(DOUBLE)
    loss, _, p, coef, more = finish(m.to(DOUBLE), r, gap.to(DOUBLE), wide_mass, factor.to(DOUBLE), z, m.is_single)
    state.store(loss, lane, ROW_LOSS)
    with when(has_grad):
        label, argmax = state.label.load(lane, HALF), state.argmax.load(lane, HALF)
        wide_scale, zero = row_scale.to(DOUBLE), row_scale.like(0)
        by = (wide_scale * coef * p).to(acc) + zero
        a, less_at_all = Variable(where(label == argmax, on_label, zero)), Variable(zero)
        with when(uniform > 0):
            at_all = where(label == NO_LABEL, zero, uniform.repeated(HALF))
            a.set(a.get() + at_all)
            less_at_all.set(where(at_all == 0, zero, row_scale * at_all))  # no -0
        top = (wide_scale * at_max(r, p, wide_mass, coef, more, a.get().to(DOUBLE))).to(acc)
        for value, kind in (
            (by, EXP_FACTOR), (row_scale * on_label, LESS_AT_LABEL), (less_at_all.get(), LESS_AT_ALL),
            (top, GRAD_AT_MAX),
        ):  # fmt: skip
            state.store(where(row_scale == 0, zero, value), lane, kind)


def after_sums(call: Call, state: State, uniform: Value, first: Value, count: Value) -> None:
    """Compute losses, stats and the parts of the gradients of `count` rows from their sums."""
    m, sums = state.of(MAX, count), state.sums
    of_max, of_rest, of_gap, of_mass = (call.answers_of(kind, first, count) for kind in STATS_KINDS)
    with when(call.asks(KNOWN)):
        for k in loop(count):
            with when(is_finite(m.load(k))):
                sums.store(of_rest.load(k).to(DOUBLE), k)
    for lane in loop(0, count, HALF):
        finish_rows(state, lane, call.told.z_loss, uniform, call.asks(GRAD))
    with when(call.asks(STATS)):
        copy(of_gap, state.of(GAP, count))
        copy(of_mass, state.of(MASS, count))
        hits = call.answers_of(HIT, first, count)
        for k in loop(count):
            largest, rest = m.load(k), sums.load(k).to(m.element)
            without = where(is_finite(largest), math.nan, largest)
            has_softmax = rest == rest
            of_max.store(where(has_softmax, largest, without), k)
            of_rest.store(where(has_softmax, rest, where(without == without, 0, without)), k)
            hits.store(where(state.label.load(k) == state.argmax.load(k), constant(1, m.element), 0), k)
    with when(call.asks(LOSS)):
        copy(call.answers_of(0, first, count), state.of(ROW_LOSS, count))


def find_exceptions(tile: Tile, state: State, count: Value) -> None:
    """Compute the gradient at the label, where it is to be written separately by `put_exceptions`."""
    at_label, less = state.of(AT_LABEL, count), state.of(LESS_AT_LABEL, count)
    look_up(tile, state.label, at_label, count)
    scale(at_label, at_label, state.of(EXP_FACTOR, count))
    subtract(less, at_label, less)


# Plain rows: each has a label and counts as much as any other, or is ignored; there are no options. See PLAIN.


def take_labels(state: State, label: Array, ignore_index: Value, ignores: Value) -> None:
    """All that is to be known of plain rows beforehand: their labels, and NO_LABEL for those to ignore."""
    for row, lanes in vectors(label.length, LANES):
        here = label.load(row, lanes)
        is_ignored = (here == ignore_index.repeated(lanes)) & ignores.repeated(lanes)
        state.label.store(where(is_ignored, NO_LABEL, here).to(state.label.element), row)


def finish_plain(state: State, count: Value, factor: Value, has_grad: Value) -> None:
    """Compute what `find_gap` and `finish_rows` compute, by what is left of their arithmetic for plain rows."""
    for row in loop(0, count, LANES):
        largest, at_label = state.load(row, LANES, MAX, AT_LABEL)
        label, zero = state.label.load(row, LANES), largest.like(0)
        has_none = label < 0
        half = largest * 0.5 - at_label * 0.5  # m - x itself may overflow
        r = state.sums.load(row, LANES)
        tail, p = log1p(r, largest.is_single)
        loss = ((half + half).to(DOUBLE) + tail).to(zero.element).with_one_nan()
        state.store(where(has_none, zero, loss), row, ROW_LOSS)
        with when(has_grad):
            wide, counts_nothing = factor.to(DOUBLE).repeated(LANES), has_none | (factor == 0).repeated(LANES)
            by = wide * p
            top = where(label == state.argmax.load(row, LANES), wide * (0 - r * p), by)
            values = by.to(zero.element) + zero, factor.repeated(LANES), top.to(zero.element)
            for kind, value in zip((EXP_FACTOR, LESS_AT_LABEL, GRAD_AT_MAX), values, strict=True):
                state.store(where(counts_nothing, zero, value), row, kind)
