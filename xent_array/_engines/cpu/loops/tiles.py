"""Tiles of many rows, each row in its own vector lane: what `transposed` and `strided` share.

In a tile 16 rows are interleaved, so that their logits of one class form one vector; the next 16 rows follow. Sums are
added in the same order as in `contiguous`. `State` holds everything else about the rows while their tile is processed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from . import FACTOR, GRAD, HIT, IGNORE, KNOWN, LANES, LOSS, ON_LABEL, PARTIAL, SCALE, STATS, STATS_KINDS
from .call import Call
from .contiguous import is_finite, largest_without_softmax
from .elementwise import copy, fill, scale, subtract
from .math import at_max, exp, finish, tanh_and_slope, times, to_bfloat, to_half
from .reductions import CHUNK
from .simd import (
    DOUBLE,
    INT64,
    Array,
    Value,
    Variable,
    constant,
    either,
    loop,
    prefetch,
    smaller,
    vectors,
    when,
    where,
)

HALF = 8  # rows per vector in float64
FEW = 32  # up to this many classes, each is compared with the label and the argmax; beyond, those two are looked up

# Kinds of numbers in `State.numbers`, each with one value per row; the first three are ON_LABEL, FACTOR and SCALE
MAX, AT_LABEL, GAP, MASS, ROW_LOSS = range(3, 8)
EXP_FACTOR = 8  # the factor of exp(x - max) in the gradient
GRAD_AT_MAX = 9
LESS_AT_LABEL = 10  # subtracted from the gradient at the label
LESS_AT_ALL = 11  # subtracted at every class, for label smoothing

NONE, TWO, ALL = range(3)  # the exceptions that `Gradient` makes


class Tile(NamedTuple):
    """The logits of many rows, at (row - row % 16)·row_step + c·class_step + row % 16 for class c."""

    numbers: Array
    row_step: Value
    class_step: Value
    classes: Value

    def place(self, row: Value, c: Value) -> Value:
        lane = row & (LANES - 1)
        return (row - lane) * self.row_step + c * self.class_step + lane

    @property
    def has_few(self) -> Value:
        return ~(self.classes > FEW)


class State(NamedTuple):
    """Everything about the rows of a tile but their logits."""

    numbers: Array  # of shape (KINDS, width)
    width: Value
    label: Array  # -1 if the row has none
    argmax: Array  # -1 if it is not to be treated specially
    partial: Array  # 32 partial sums per row
    sums: Array  # of float64

    def place(self, kind: int, lane: Value) -> Value:
        return self.width * kind + lane

    def of(self, kind: int, count: Value) -> Array:
        """The numbers of one kind of the first rows."""
        return self.numbers.part(self.width * kind, count)

    def load(self, lane: Value, lanes: int, *kinds: int) -> list[Value]:
        """One vector of each of these kinds, starting at row `lane`."""
        return [self.numbers.load(self.place(kind, lane), lanes) for kind in kinds]

    def store(self, value: Value, lane: Value, kind: int) -> None:
        self.numbers.store(value.to(self.numbers.element), self.place(kind, lane))


class Lines(NamedTuple):
    """Memory outside of a tile, read or written line by line: line c begins at start + c·step."""

    numbers: Array
    start: Value
    step: Value

    def place(self, c: Value) -> Value:
        return self.start + c * self.step


# Gathers and scatters: one element per row


def _rows_with(place: Array, count: Value) -> Iterator[tuple[Value, Value]]:
    """A loop over the rows whose class in `place` is not negative, with that class."""
    for row in loop(count):
        c = place.load(row)
        with when(~(c < 0)):
            yield row, c.to(INT64)


def look_up(tile: Tile, place: Array, out: Array, count: Value) -> None:
    """``out[row] = tile[row, place[row]]`` where ``place[row]`` is not negative."""
    for row, c in _rows_with(place, count):
        out.store(tile.numbers.load(tile.place(row, c)), row)


def hide(tile: Tile, place: Array, count: Value) -> None:
    """``tile[row, place[row]] = -inf`` where ``place[row]`` is not negative."""
    for row, c in _rows_with(place, count):
        tile.numbers.store(constant(-math.inf, tile.numbers.element), tile.place(row, c))


def put_exceptions(state: State, is_half: Value, out: Lines, row_step: Value, count: Value) -> None:
    """Write the gradient at the label, LESS_AT_LABEL, and then that at the maximum, GRAD_AT_MAX, to `out`."""
    for place, kind in ((state.label, LESS_AT_LABEL), (state.argmax, GRAD_AT_MAX)):
        for row, c in _rows_with(place, count):
            number = state.numbers.load(state.place(kind, row))
            if out.numbers.has_16_bits:
                number = where(is_half, to_half(number), to_bfloat(number))
            out.numbers.store(number, out.place(c) + row * row_step)


class Gradient:
    """The gradient of some rows of a tile, starting at `row`, class by class.

    With ALL it includes the entries at the label and at the maximum, label smoothing, and the slope of softcap; with
    TWO, those two entries, where there are no such options. With NONE, it is only the multiple of exp(x - max): the two
    entries are written later.
    """

    def __init__(self, tile: Tile, slopes: Array, state: State, row: Value, lanes: int, exceptions: int) -> None:
        self.tile, self.slopes, self.row, self.lanes, self.exceptions = tile, slopes, row, lanes, exceptions
        (self.by,) = state.load(row, lanes, EXP_FACTOR)
        if exceptions != NONE:
            self.less, self.top = state.load(row, lanes, LESS_AT_LABEL, GRAD_AT_MAX)
            self.label, self.argmax = (place.load(row, lanes) for place in (state.label, state.argmax))
        if exceptions == ALL:
            self.less_at_all, self.scale = state.load(row, lanes, LESS_AT_ALL, SCALE)

    def of(self, c: Value) -> Value:
        """The gradient of class c."""
        place = self.tile.place(self.row, c)
        value = times(self.tile.numbers.load(place, self.lanes), self.by)
        if self.exceptions == NONE:
            return value
        here = c.to(self.label.element).repeated(self.lanes)
        value = where(self.label == here, value - self.less, value)
        if self.exceptions == TWO:
            return where(self.argmax == here, self.top, value)
        held = Variable(where(self.argmax == here, self.top, value - self.less_at_all))
        with when(self.slopes.length != 0):
            sloped = held.get() * self.slopes.load(place, self.lanes)
            held.set(where(self.scale == 0, held.get(), sloped))
        return held.get()


# 16 rows at a time


class Maximum:
    """The maximum of each of 16 rows, ignoring NaN, and its class; if classes are few, the label's logit too."""

    def __init__(self, tile: Tile, state: State, lane: Value) -> None:
        self.state, self.lane, element = state, lane, tile.numbers.element
        self.label = state.label.load(lane, LANES)
        self.largest = Variable(constant(-math.inf, element, LANES))
        self.argmax, self.at_label = Variable(self.label.like(0)), Variable(constant(0, element, LANES))

    def resume(self) -> None:
        """Go on from what is stored."""
        for variable, kind in ((self.largest, MAX), (self.at_label, AT_LABEL)):
            variable.set(*self.state.load(self.lane, LANES, kind))
        self.argmax.set(self.state.argmax.load(self.lane, LANES))

    def add(self, first: Value, vectors: list[Value], has_few: Value) -> None:
        """The logits of some classes, which follow those that were added before; a class may come twice in a row."""
        numbers = [(first + k).to(self.label.element).repeated(LANES) for k in range(len(vectors))]
        for number, here in zip(numbers, vectors, strict=True):
            is_larger = self.largest.get() < here
            self.largest.set(where(is_larger, here, self.largest.get()))
            self.argmax.set(where(is_larger, number, self.argmax.get()))
        with when(has_few):
            for number, here in zip(numbers, vectors, strict=True):
                self.at_label.set(where(self.label == number, here, self.at_label.get()))

    def store(self) -> None:
        self.state.store(self.largest.get(), self.lane, MAX)
        self.state.store(self.at_label.get(), self.lane, AT_LABEL)
        self.state.argmax.store(self.argmax.get(), self.lane)


def find_max(tile: Tile, first: Value, stop: Value, state: State, lane: Value) -> None:
    """Find what `Maximum` says of 16 rows. Called once per range of classes, in order."""
    maximum = Maximum(tile, state, lane)
    with when(first != 0):
        maximum.resume()
    for c in loop(first, stop):
        maximum.add(c, [tile.numbers.load(tile.place(lane, c), LANES)], tile.has_few)
    maximum.store()


def cap(tile: Tile, slopes: Array, limit: Value, lane: Value) -> None:
    """Apply softcap to 16 rows in place, and store its derivative in `slopes`, which has the layout of the tile."""
    by = limit.to(tile.numbers.element).repeated(LANES)
    for c in loop(tile.classes):
        place = tile.place(lane, c)
        ratio, slope = tanh_and_slope(tile.numbers.load(place, LANES) / by)
        tile.numbers.store(ratio * by, place)
        slopes.store(slope, place)


def find_gap(state: State, lane: Value, mass_without_label: Value, uniform: Value, classes: Value) -> None:
    """Compute gap and mass of each of 16 rows; a row without a label has no gap, and nothing on its label.

    With label smoothing, which puts `uniform` on every class, the sums already hold its half gaps.
    """
    has_none = state.label.load(lane, LANES) < 0
    largest, at_label, on_label = state.load(lane, LANES, MAX, AT_LABEL, ON_LABEL)
    on_label = where(has_none, 0, on_label)
    half = largest * 0.5 - at_label * 0.5  # m - x itself may overflow
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


def exps(
    tile: Tile, first: Value, stop: Value, state: State, lane: Value, is_kept: Value, following: Lines, soon: Lines
) -> None:
    """Compute exp(x - max) of 16 rows for a range of classes, add it to the partial sums, and keep it in place of x.

    The maximum itself gives 0: if classes are few it is masked here, otherwise it is already -inf. A row whose maximum
    is not finite becomes NaN. Of two classes only the smaller needs an exponential. Each class prefetches a line of
    `following`, which is read next, and one of `soon`, which is written next, unless that is empty.
    """
    numbers = tile.numbers
    (largest,), argmax = state.load(lane, LANES, MAX), state.argmax.load(lane, LANES)
    largest = largest + (largest - largest)
    has_room, size = soon.numbers.length != 0, soon.numbers.size
    start = tile.place(lane, first)
    to_read = following.numbers.address(following.start)
    to_write = where(has_room, soon.numbers.address(soon.start), numbers.address(start))
    write_step = where(has_room, soon.step * size, tile.class_step * numbers.size)
    of_smaller = Variable(largest)
    are_two = (tile.classes == 2) & ((argmax < 0).packed() == 0)
    with when(are_two):
        one, two = (numbers.load(start + k * tile.class_step, LANES) for k in (0, 1))
        of_smaller.set(exp(where(argmax == 0, two, one) - largest))
    for k in loop(stop - first):
        prefetch(to_read, k * (following.step * following.numbers.size), "read")
        prefetch(to_write, k * write_step, "written")
        place, turn = start + k * tile.class_step, (first & (CHUNK - 1)) + k
        value = Variable(of_smaller.get())
        with when(~are_two):
            value.set(exp(numbers.load(place, LANES) - largest))
        with when(tile.has_few):
            value.set(where(turn.to(argmax.element).repeated(LANES) == argmax, 0, value.get()))
        with when(is_kept):
            numbers.store(value.get(), place)
        add_to_partial(value, state, lane, turn)


def add_to_partial(value: Variable, state: State, lane: Value, turn: Value) -> None:
    """Add one element of each of 16 rows to their partial sum number `turn` % 32."""
    slot = lane * PARTIAL + (turn & (PARTIAL - 1)) * LANES
    with when(turn >= PARTIAL):  # the first ones start the partial sums
        value.set(state.partial.load(slot, LANES) + value.get())
    state.partial.store(value.get(), slot)


def fold_partial(state: State, count: Value, lane: Value, is_first: Value) -> None:
    """Fold the partial sums of a chunk of `count` classes, as in `contiguous`, and add them to the sums of 16 rows."""
    partial, first = state.partial, lane * PARTIAL
    live, half = smaller(count, PARTIAL), PARTIAL
    while half > 1:
        half //= 2
        for k in loop(live - half):
            low = first + k * LANES
            partial.store(partial.load(low, LANES) + partial.load(low + half * LANES, LANES), low)
        live = smaller(live, half)
    (largest,) = state.load(lane, LANES, MAX)
    nothing = (largest - largest).to(DOUBLE)  # or NaN
    before = where(is_first, nothing, state.sums.load(lane, LANES))
    state.sums.store(before + partial.load(first, LANES).to(DOUBLE), lane)


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
            at_all = where(label < 0, zero, uniform.repeated(HALF))
            a.set(a.get() + at_all)
            less_at_all.set(where(at_all == 0, zero, row_scale * at_all))  # no -0
        top = (wide_scale * at_max(r, p, wide_mass, coef, more, a.get().to(DOUBLE))).to(acc)
        for value, kind in (
            (by, EXP_FACTOR), (row_scale * on_label, LESS_AT_LABEL), (less_at_all.get(), LESS_AT_ALL),
            (top, GRAD_AT_MAX),
        ):  # fmt: skip
            state.store(where(row_scale == 0, zero, value), lane, kind)


# All rows of a tile


def drop_ignored(state: State, label: Array, ignore_index: Value) -> None:
    """Turn rows with the label `ignore_index` into rows without a label that count nothing."""
    for row, lanes in vectors(label.length, LANES):
        is_ignored = label.load(row, lanes) == ignore_index.repeated(lanes)
        for kind in (FACTOR, SCALE):
            (number,) = state.load(row, lanes, kind)
            state.store(where(is_ignored, 0, number), row, kind)
        state.label.store(where(is_ignored, -1, state.label.load(row, lanes)), row)


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
            fill(state.label.part(0, count), -1)
    with when(ignores):
        drop_ignored(state, label.part(first, count), call.told.ignore_index)


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
