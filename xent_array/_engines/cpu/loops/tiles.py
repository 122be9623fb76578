"""Tiles of many rows, each row in its own vector lane: what `transposed` and `strided` share.

In a tile 16 rows are interleaved, so that their logits of one class form one vector; the next 16 rows follow. Sums are
added in the same order as in `contiguous`. `State` holds everything else about the rows while their tile is processed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numba import types

from . import FACTOR, GRAD, IGNORE, KNOWN, LANES, LOSS, ON_LABEL, PARTIAL, SCALE, STATS
from .contiguous import CHUNK, largest_without_softmax
from .elementwise import copy, fill, scale, subtract
from .jit import inner
from .math import at_max, exp, finish, tanh_and_slope, times, to_bfloat, to_half
from .simd import (
    DOUBLE,
    INT64,
    Array,
    Flag,
    Index,
    Number,
    Real,
    Value,
    Variable,
    constant,
    loop,
    make_inline,
    operation,
    part,
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
    row_step: Index
    class_step: Index
    classes: Index

    def place(self, row: Value, c: Value) -> Value:
        lane = row & (LANES - 1)
        return (row - lane) * self.row_step + c * self.class_step + lane

    @property
    def has_few(self) -> Value:
        return ~(self.classes > FEW)


class State(NamedTuple):
    """Everything about the rows of a tile but their logits."""

    numbers: Array  # of shape (KINDS, width)
    width: Index
    label: Array  # -1 if the row has none
    argmax: Array  # -1 if it is not to be treated specially
    partial: Array  # 32 partial sums per row
    sums: Array  # of float64

    def place(self, kind: int, lane: Value) -> Value:
        return self.width * kind + lane

    def load(self, lane: Value, lanes: int, *kinds: int) -> list[Value]:
        """One vector of each of these kinds, starting at row `lane`."""
        return [self.numbers.load(self.place(kind, lane), lanes) for kind in kinds]

    def store(self, value: Value, lane: Value, kind: int) -> None:
        self.numbers.store(value.to(self.numbers.element), self.place(kind, lane))


class Lines(NamedTuple):
    """Memory outside of a tile, read or written line by line: line c begins at start + c·step."""

    numbers: Array
    start: Index
    step: Index

    def place(self, c: Value) -> Value:
        return self.start + c * self.step


# Gathers and scatters: one element per row


def _rows_with(place: Array, count: Value) -> Iterator[tuple[Value, Value]]:
    """A loop over the rows whose class in `place` is not negative, with that class."""
    for row in loop(count):
        c = place.load(row)
        with when(~(c < 0)):
            yield row, c.to(INT64)


@operation
def look_up(tile: Tile, place: Array, out: Array, count: Index) -> None:
    """``out[row] = tile[row, place[row]]`` where ``place[row]`` is not negative."""
    for row, c in _rows_with(place, count):
        out.store(tile.numbers.load(tile.place(row, c)), row)


@operation
def hide(tile: Tile, place: Array, count: Index) -> None:
    """``tile[row, place[row]] = -inf`` where ``place[row]`` is not negative."""
    for row, c in _rows_with(place, count):
        tile.numbers.store(constant(-math.inf, tile.numbers.element), tile.place(row, c))


@operation
def put_exceptions(state: State, is_half: Flag, out: Lines, row_step: Index, count: Index) -> None:
    """Write the gradient at the label, LESS_AT_LABEL, and then that at the maximum, GRAD_AT_MAX, to `out`."""
    for place, kind in ((state.label, LESS_AT_LABEL), (state.argmax, GRAD_AT_MAX)):
        for row, c in _rows_with(place, count):
            number = state.numbers.load(state.place(kind, row))
            if out.numbers.dtype == types.uint16:
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


@operation
def find_max(tile: Tile, first: Index, stop: Index, state: State, lane: Index) -> None:
    """Find what `Maximum` says of 16 rows. Called once per range of classes, in order."""
    maximum = Maximum(tile, state, lane)
    with when(first != 0):
        maximum.resume()
    for c in loop(first, stop):
        maximum.add(c, [tile.numbers.load(tile.place(lane, c), LANES)], tile.has_few)
    maximum.store()


@operation
def cap(tile: Tile, slopes: Array, limit: Real, lane: Index) -> None:
    """Apply softcap to 16 rows in place, and store its derivative in `slopes`, which has the layout of the tile."""
    by = limit.to(tile.numbers.element).repeated(LANES)
    for c in loop(tile.classes):
        place = tile.place(lane, c)
        ratio, slope = tanh_and_slope(tile.numbers.load(place, LANES) / by)
        tile.numbers.store(ratio * by, place)
        slopes.store(slope, place)


@operation
def find_gap(state: State, lane: Index, mass_without_label: Index, uniform: Number, classes: Index) -> None:
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


@operation
def exps(
    tile: Tile, first: Index, stop: Index, state: State, lane: Index, is_kept: Flag, following: Lines, soon: Lines
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


@operation
def fold_partial(state: State, count: Index, lane: Index, is_first: Flag) -> None:
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


@operation
def finish_rows(state: State, lane: Index, z: Real, uniform: Number, has_grad: Flag) -> None:
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


@operation
def drop_ignored(state: State, label: Array, ignore_index: Index) -> None:
    """Turn rows with the label `ignore_index` into rows without a label that count nothing."""
    for row, lanes in vectors(label.length, LANES):
        is_ignored = label.load(row, lanes) == ignore_index.repeated(lanes)
        for kind in (FACTOR, SCALE):
            (number,) = state.load(row, lanes, kind)
            state.store(where(is_ignored, 0, number), row, kind)
        state.label.store(where(is_ignored, -1, state.label.load(row, lanes)), row)


@inner
def prepare(told, state, label, per_row, first, count, is_new):
    """Set up the state of `count` rows, starting at `first`; `is_new` when it has not been written before."""
    make_inline()
    numbers, width, n = state.numbers, state.width, per_row.shape[0] // 3
    ignores = told.job & IGNORE != 0
    for kind in range(3):  # ON_LABEL, FACTOR, SCALE
        if n > 1:
            copy(part(numbers, kind * width, count), (part(per_row, kind * n + first, count),))
        elif is_new or ignores or kind == ON_LABEL:  # find_gap overwrites ON_LABEL
            fill(part(numbers, kind * width, width), (per_row[kind],))
    if label.shape[0]:
        copy(part(state.label, 0, count), (part(label, first, count),))
    else:
        fill(part(state.label, 0, count), (-1,))
    if ignores:
        drop_ignored(state, part(label, first, count), told.ignore_index)


@inner
def after_max(told, tile, state, label, uniform, answers, first, count):
    """Compute all that follows from the maxima of `count` rows; unless classes are few, hide the maxima as -inf."""
    make_inline()
    job, has_labels = told.job, label.shape[0] > 0
    width, n = state.width, answers.shape[0] // 6
    m = part(state.numbers, MAX * width, count)
    if tile.classes > FEW:
        look_up(tile, state.label, part(state.numbers, AT_LABEL * width, count), count)
    for lane in range(0, count, LANES):
        find_gap(state, lane, 0 if has_labels else 1, uniform, tile.classes)
    if job & KNOWN:
        for k in range(count):
            known = answers[n + first + k]
            if m[k] != known:
                state.argmax[k] = -1
            m[k] = known
        copy(part(state.numbers, GAP * width, count), (part(answers, 3 * n + first, count),))
        copy(part(state.numbers, MASS * width, count), (part(answers, 4 * n + first, count),))
    elif job & STATS:
        for k in range(count):
            if m[k] - m[k] != 0:
                start = (k - k % LANES) * tile.row_step + k % LANES
                row = part(tile.numbers, start, (tile.classes - 1) * tile.class_step + 1)
                m[k] = largest_without_softmax(row, tile.class_step)
    if tile.classes > FEW:
        hide(tile, state.argmax, count)


@inner
def after_sums(told, state, uniform, answers, first, count):
    """Compute losses, stats and the parts of the gradients of `count` rows from their sums."""
    make_inline()
    job = told.job
    numbers, width, sums, n = state.numbers, state.width, state.sums, answers.shape[0] // 6
    m = part(numbers, MAX * width, count)
    if job & KNOWN:
        for k in range(count):
            if m[k] - m[k] == 0:
                sums[k] = answers[2 * n + first + k]
    for lane in range(0, count, HALF):
        finish_rows(state, lane, told.z_loss, uniform, job & GRAD != 0)
    if job & STATS:
        copy(part(answers, 3 * n + first, count), (part(numbers, GAP * width, count),))
        copy(part(answers, 4 * n + first, count), (part(numbers, MASS * width, count),))
        for k in range(count):
            largest, rest = m[k], sums[k]
            if rest != rest:
                largest = largest if largest - largest != 0 else np.nan
                rest = 0 if largest == largest else np.nan
            answers[n + first + k], answers[2 * n + first + k] = largest, rest
            answers[5 * n + first + k] = state.label[k] == state.argmax[k]
    if job & LOSS:
        copy(part(answers, first, count), (part(numbers, ROW_LOSS * width, count),))


@inner
def find_exceptions(tile, state, count):
    """Compute the gradient at the label, where it is to be written separately by `put_exceptions`."""
    make_inline()
    numbers, width = state.numbers, state.width
    at_label, less = part(numbers, AT_LABEL * width, count), part(numbers, LESS_AT_LABEL * width, count)
    look_up(tile, state.label, at_label, count)
    scale(at_label, (at_label, part(numbers, EXP_FACTOR * width, count)))
    subtract(less, (at_label, less))
