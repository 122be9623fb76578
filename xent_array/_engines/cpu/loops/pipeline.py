"""Strided rows of many classes: a pipeline of tiles.

While one tile is processed, the gradient of the previous tile is written and the next tile is read, 16 elements of each
in turn, so that memory is never idle. At both ends, and where a tile is incomplete, the stages take turns of a few
classes instead. Only a few, because classes that are a power of two apart evict each other from the cache.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from . import GRAD, KINDS, LANES, PARTIAL, STREAM
from .call import Call
from .elementwise import copy, narrow, numbers_of, widen
from .math import exp, times
from .process import after_max, after_sums, find_exceptions, prepare
from .reductions import CHUNK
from .simd import (
    BIT,
    DOUBLE,
    INT32,
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
from .tiles import EXP_FACTOR, MAX, NONE, Gradient, Lines, State, Tile, find_max, put_exceptions

AT_ONCE = 16  # classes per turn of a stage
AHEAD = 8  # how many classes ahead to prefetch


class Stage(NamedTuple):
    """A tile at one of the three stages, and the memory it is read from or written to."""

    tile: Tile
    state: State
    lines: Lines
    rows: Value


def exps(
    tile: Tile, first: Value, stop: Value, state: State, lane: Value, is_kept: Value, following: Lines, soon: Lines
) -> None:
    """Compute exp(x - max) of 16 rows for a range of classes, add it to the partial sums, and keep it in place of x.

    The maximum itself is already -inf, and gives 0. A row whose maximum is not finite becomes NaN. For each class a
    line of `following`, which is read next, is prefetched, and one of `soon`, which is written next, if there is one.
    """
    numbers = tile.numbers
    (largest,) = state.load(lane, LANES, MAX)
    largest = largest + (largest - largest)
    has_room, size = soon.numbers.length != 0, soon.numbers.size
    start = tile.place(lane, first)
    to_read = following.numbers.address(following.start)
    to_write = where(has_room, soon.numbers.address(soon.start), numbers.address(start))
    write_step = where(has_room, soon.step * size, tile.class_step * numbers.size)
    for k in loop(stop - first):
        prefetch(to_read, k * (following.step * following.numbers.size), "read")
        prefetch(to_write, k * write_step, "written")
        place, turn = start + k * tile.class_step, (first & (CHUNK - 1)) + k
        value = Variable(exp(numbers.load(place, LANES) - largest))
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


def store(out: Array, value: Value, place: Value, is_streamed: Value) -> None:
    """Store a vector, perhaps with a non-temporal hint; then it must start at a cache line."""
    with either(is_streamed) as (streamed, cached):
        with streamed:
            out.stream(value, place)
        with cached:
            out.store(value, place)


def pass_on(
    first: Value, stop: Value, read: Stage, worked_on: Stage, written: Stage, has_grad: Value, is_streamed: Value
) -> None:
    """All three stages for a range of classes, 16 elements of each in turn; the tiles have equally many rows.

    The gradient of the tile `written` is stored, as by `write_lines`, which makes room for the logits of the tile
    `read`; the logits of the tile `worked_on` become exponentials.
    """
    x, out = read.lines.numbers, written.lines.numbers
    here, before, state = read.tile, worked_on.tile, worked_on.state
    has_room = (out.length != 0) & ~is_streamed
    for c in loop(first, stop):
        source, target = read.lines.place(c), written.lines.place(c)
        row, row_before, turn = c * here.class_step, c * before.class_step, c & (CHUNK - 1)
        to_read = x.address(read.lines.place(c + AHEAD))
        to_write = where(has_room, out.address(written.lines.place(c + AHEAD)), before.numbers.address(row_before))
        # One line more, in case the first row does not start at a cache line.
        prefetch(to_read, 0, "read")
        prefetch(to_write, 0, "written")
        for lane in loop(0, read.rows, LANES):
            last = lane + (LANES - 1)
            prefetch(to_read, last * x.size, "read")
            prefetch(to_write, last * out.size, "written")
            with when(has_grad):
                (by,) = written.state.load(lane, LANES, EXP_FACTOR)
                store(out, times(here.numbers.load(row + lane, LANES), by), target + lane, is_streamed)
            here.numbers.store(x.load(source + lane, LANES), row + lane)
            (largest,) = state.load(lane, LANES, MAX)
            value = Variable(exp(before.numbers.load(row_before + lane, LANES) - (largest + (largest - largest))))
            before.numbers.store(value.get(), row_before + lane)
            add_to_partial(value, state, lane, turn)


def read_lines(first: Value, stop: Value, stage: Stage, strip: Array, is_half: Value) -> None:
    """Read a range of classes into the tile."""
    tile, lines, wide = stage.tile, stage.lines, strip.part(0, stage.rows)
    for c in loop(first, stop):
        source = lines.numbers.part(lines.place(c), stage.rows)
        widen(source, is_half, wide)
        copy(tile.numbers.part(c * tile.class_step, stage.rows), numbers_of(source, wide))


def write_lines(
    first: Value, stop: Value, gradient_of: Callable[[Value, int], Gradient], lines: Lines, strip: Array,
    is_half: Value, is_streamed: Value,
) -> None:  # fmt: skip
    """Write the gradient of a range of classes; `strip` has its number of rows."""
    for c in loop(first, stop):
        out = lines.numbers.part(lines.place(c), strip.length)
        for row, lanes in vectors(strip.length, LANES):
            value = gradient_of(row, lanes).of(c)
            if out.has_16_bits:
                strip.store(value, row)
            else:
                store(out, value, row, is_streamed)
        narrow(strip, is_half, out)


class Tiles:
    """Where tiles are in the workspace, two buffers and three states used in turn; and which rows each tile holds."""

    def __init__(self, call: Call) -> None:
        self.call, self.told, element = call, call.told, call.per_row.element
        self.width, self.size = call.told.width, call.told.classes * call.told.width
        before = 2 * self.size + 3 * KINDS * self.width
        self.numbers = call.workspace.region(element, 0, before + (PARTIAL + 1) * self.width)
        self.partial = self.numbers.part(before, PARTIAL * self.width)
        self.strip = self.numbers.part(before + PARTIAL * self.width, self.width)  # for one class
        after = self.numbers.length * self.numbers.size
        self.sums = call.workspace.region(DOUBLE, after, self.width)
        kind = INT64 if element == DOUBLE else INT32
        self.places = call.workspace.region(kind, after + 8 * self.width, 6 * self.width)
        self.in_outer = (self.told.inner + self.told.lead + self.width - 1) // self.width  # per outer index
        self.number = call.outer * self.in_outer

    def buffer(self, t: Value) -> Array:
        return self.numbers.part((t & 1) * self.size, self.size)

    def state(self, t: Value) -> State:
        width, slot, size = self.width, (t + 3) % 3, KINDS * self.width
        return State(
            self.numbers.part(2 * self.size + slot * size, size), width,
            self.places.part(2 * slot * width, width), self.places.part((2 * slot + 1) * width, width),
            self.partial, self.sums,
        )  # fmt: skip

    def _rows_of(self, t: Value) -> tuple[Value, Value, Value]:
        """Outer index, first inner index, and how many rows."""
        outer = t // self.in_outer
        start = (t - outer * self.in_outer) * self.width - self.told.lead
        missing = where(start < 0, start, 0)
        return outer, start - missing, smaller(self.told.inner - start, self.width) + missing

    def first(self, t: Value) -> Value:
        """Which row of all is the first of a tile."""
        outer, start, _ = self._rows_of(t)
        first: Value = outer * self.told.inner + start
        return first

    def rows(self, t: Value) -> Value:
        return self._rows_of(t)[2]

    def logits(self, t: Value) -> Lines:
        outer, start, _ = self._rows_of(t)
        return Lines(self.call.x, outer * self.told.x_outer + start, self.told.x_class)

    def gradient(self, t: Value) -> Lines:
        outer, start, _ = self._rows_of(t)
        return Lines(self.call.out, outer * self.told.out_outer + start, self.told.out_class)

    def stage(self, t: Value, lines: Lines) -> Stage:
        tile = Tile(self.buffer(t), constant(1), self.width, self.told.classes)
        return Stage(tile, self.state(t), lines, self.rows(t))

    def is_streamed(self, t: Value) -> Value:
        """Whether the gradient of a tile is; not if its rows do not start at a cache line."""
        _, start, _ = self._rows_of(t)
        starts_at_line: Value = (start != 0) | (self.told.lead == 0)
        return self.call.asks(STREAM) & starts_at_line


def rows(call: Call) -> None:
    """See `loops`."""
    told, tiles, classes = call.told, Tiles(call), call.told.classes
    number, is_half, has_grad = tiles.number, told.is_half != 0, call.asks(GRAD)
    nothing, soon = constant(0, call.per_row.element), call.out.part(0, where(call.asks(STREAM), 0, call.out.length))
    for t in loop(number + 2):
        # Tile t is read, tile t - 1 is processed, tile t - 2 is written. Two buffers suffice, because a tile is read
        # into the buffer that the written one leaves; there are three states.
        read, worked_on = (tiles.stage(t - k, tiles.logits(t - k)) for k in range(2))
        written = tiles.stage(t - 2, tiles.gradient(t - 2))
        gradient_of = partial(Gradient, written.tile, written.tile.numbers.part(0, 0), written.state, exceptions=NONE)
        is_read, is_worked_on, is_written = t < number, (t > 0) & ~(t > number), (t > 1) & has_grad
        first, first_before, is_streamed = tiles.first(t), tiles.first(t - 1), tiles.is_streamed(t - 2)
        with when(is_read):
            prepare(call, read.state, first, read.rows, t < 3)
        is_steady = is_read & is_worked_on & (is_written | ~has_grad) & (read.rows % LANES == 0)
        is_steady = is_steady & (read.rows == worked_on.rows) & ((read.rows == written.rows) | ~has_grad)
        if call.x.has_16_bits:
            is_steady = constant(0, BIT)
        for c in loop(0, classes, AT_ONCE):
            stop = smaller(c + AT_ONCE, classes)
            if not call.x.has_16_bits:
                with when(is_steady):
                    pass_on(c, stop, read, worked_on, written, has_grad, is_streamed)
            with when(is_written & ~is_steady):
                strip = tiles.strip.part(0, written.rows)
                write_lines(c, stop, gradient_of, written.lines, strip, is_half, is_streamed)
            with when(is_read):
                with when(~is_steady):
                    read_lines(c, stop, read, tiles.strip, is_half)
                for lane in loop(0, read.rows, LANES):
                    find_max(read.tile, c, stop, read.state, lane)
            with when(is_worked_on):
                for lane in loop(0, where(is_steady, 0, worked_on.rows), LANES):
                    exps(
                        worked_on.tile, c, stop, worked_on.state, lane, has_grad,
                        Lines(call.x, read.lines.place(stop) + lane, told.x_class),
                        Lines(soon, written.lines.place(stop) + lane, told.out_class),
                    )  # fmt: skip
                with when((stop == classes) | (stop % CHUNK == 0)):
                    for lane in loop(0, worked_on.rows, LANES):
                        fold_partial(worked_on.state, (c & (CHUNK - 1)) + stop - c, lane, c < CHUNK)
        with when(is_written):
            put_exceptions(written.state, is_half, written.lines, constant(1), written.rows)
        with when(is_read):
            after_max(call, read.tile, read.state, nothing, first, read.rows)
        with when(is_worked_on):
            after_sums(call, worked_on.state, nothing, first_before, worked_on.rows)
            with when(has_grad):
                find_exceptions(worked_on.tile, worked_on.state, worked_on.rows)
