"""Tiles of many rows, each row in its own vector lane, and what is known of the rows while their tile is processed.

In a tile the logits of 16 rows and one class form a vector.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from . import FEW, LANES, SCALE
from .math import times, to_bfloat, to_half
from .simd import INT64, Array, Value, Variable, constant, loop, when, where

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
    label: Array  # or NO_LABEL, or ELSEWHERE
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
