"""Strided rows: adjacent in memory, with their classes apart, so that each row occupies one vector lane as it is.

A tile holds neighboring rows with all their classes. The loop is a pipeline: while one tile is processed, the gradient
of the previous tile is written and the next tile is read, 16 elements of each in turn, so that memory is never idle. At
both ends, and where a tile is incomplete, the stages take turns of a few classes instead. Only a few, because classes
that are a power of two apart evict each other from the cache.
"""

from __future__ import annotations

from typing import NamedTuple

from . import GRAD, KINDS, LANES, PARTIAL, STREAM
from .call import Call
from .elementwise import copy, narrow, numbers_of, widen
from .math import exp, times
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
    make_compact,
    prefetch,
    smaller,
    vectors,
    when,
    where,
)
from .tiles import (
    EXP_FACTOR,
    MAX,
    NONE,
    TWO,
    Gradient,
    Lines,
    State,
    Tile,
    add_to_partial,
    after_max,
    after_sums,
    exps,
    find_exceptions,
    find_max,
    fold_partial,
    prepare,
    put_exceptions,
)

AT_ONCE = 16  # classes per turn of a stage
AHEAD = 8  # how many classes ahead to prefetch


class Stage(NamedTuple):
    """A tile at one of the three stages, and the memory it is read from or written to."""

    tile: Tile
    state: State
    lines: Lines
    rows: Value


def _store(out: Array, value: Value, place: Value, is_streamed: Value) -> None:
    with either(is_streamed) as (streamed, cached):
        with streamed:
            out.stream(value, place)
        with cached:
            out.store(value, place)


def put_gradient(first: Value, stop: Value, written: Stage, out: Lines, is_streamed: Value) -> None:
    """Write the gradient of a range of classes; if classes are few, including the entries at the label and maximum.

    Streaming uses non-temporal stores, for which every 16 elements must start at a cache line.
    """
    tile = written.tile
    with either(tile.has_few) as branches:
        for branch, exceptions in zip(branches, (TWO, NONE), strict=True):
            with branch:
                for c in loop(first, stop):
                    for lane, lanes in vectors(written.rows, LANES):
                        gradient = Gradient(tile, tile.numbers.part(0, 0), written.state, lane, lanes, exceptions)
                        _store(out.numbers, gradient.of(c), out.place(c) + lane, is_streamed)


def pass_on(
    first: Value, stop: Value, read: Stage, worked_on: Stage, written: Stage, has_grad: Value, is_streamed: Value
) -> None:
    """All three stages for a range of classes, 16 elements of each in turn; the tiles have equally many rows.

    The gradient of the tile `written` is stored, as by `put_gradient` without exceptions, which makes room for the
    logits of the tile `read`; the logits of the tile `worked_on` become exponentials.
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
                _store(out, times(here.numbers.load(row + lane, LANES), by), target + lane, is_streamed)
            here.numbers.store(x.load(source + lane, LANES), row + lane)
            (largest,) = state.load(lane, LANES, MAX)
            value = Variable(exp(before.numbers.load(row_before + lane, LANES) - (largest + (largest - largest))))
            before.numbers.store(value.get(), row_before + lane)
            add_to_partial(value, state, lane, turn)


def _read(first: Value, stop: Value, stage: Stage, strip: Array, is_half: Value) -> None:
    """Read a range of classes into the tile."""
    tile, lines, wide = stage.tile, stage.lines, strip.part(0, stage.rows)
    for c in loop(first, stop):
        source = lines.numbers.part(lines.place(c), stage.rows)
        widen(source, is_half, wide)
        copy(tile.numbers.part(c * tile.class_step, stage.rows), numbers_of(source, wide))


def _write(first: Value, stop: Value, stage: Stage, strip: Array, is_half: Value, is_streamed: Value) -> None:
    """Write the gradient of a range of classes."""
    lines, zero = stage.lines, constant(0)
    if not lines.numbers.has_16_bits:
        put_gradient(first, stop, stage, lines, is_streamed)
        return
    for c in loop(first, stop):
        put_gradient(c, c + 1, stage, Lines(strip, zero, zero), zero != 0)
        narrow(strip.part(0, stage.rows), is_half, lines.numbers.part(lines.place(c), stage.rows))


class _Tiles:
    """Where tiles are in the workspace: two buffers, used in turn, and three states; and which rows they hold."""

    def __init__(self, call: Call) -> None:
        self.told, self.element = call.told, call.per_row.element
        self.width, self.size = call.told.width, call.told.classes * call.told.width
        own = KINDS * self.width
        self.numbers = call.workspace.region(self.element, 0, 2 * self.size + 3 * own + (PARTIAL + 1) * self.width)
        after = self.numbers.length * self.numbers.size
        self.sums = call.workspace.region(DOUBLE, after, self.width)
        kind = INT64 if self.element == DOUBLE else INT32
        self.places = call.workspace.region(kind, after + 8 * self.width, 6 * self.width)
        self.partial = self.numbers.part(2 * self.size + 3 * own, PARTIAL * self.width)
        self.strip = self.numbers.part(2 * self.size + 3 * own + PARTIAL * self.width, self.width)
        self.in_outer = (call.told.inner + call.told.lead + self.width - 1) // self.width  # per outer index
        self.number = call.outer * self.in_outer

    def stage(self, t: Value, memory: Array, steps: tuple[Value, Value]) -> Stage:
        """Tile number t, and where its rows are in the logits or the gradient, of these outer and class strides."""
        tile = Tile(self.numbers.part((t & 1) * self.size, self.size), constant(1), self.width, self.told.classes)
        o, start, count = self.rows_of(t)
        return Stage(tile, self._state(t), Lines(memory, o * steps[0] + start, steps[1]), count)

    def _state(self, t: Value) -> State:
        width, slot, own = self.width, (t + 3) % 3, KINDS * self.width
        return State(
            self.numbers.part(2 * self.size + slot * own, own), width,
            self.places.part(2 * slot * width, width), self.places.part((2 * slot + 1) * width, width),
            self.partial, self.sums,
        )  # fmt: skip

    def rows_of(self, t: Value) -> tuple[Value, Value, Value]:
        """Outer index, first inner index, and how many rows."""
        o = t // self.in_outer
        start = (t - o * self.in_outer) * self.width - self.told.lead
        missing = where(start < 0, start, 0)
        return o, start - missing, smaller(self.told.inner - start, self.width) + missing


def rows(call: Call) -> None:
    """See `loops`."""
    make_compact()
    told, tiles = call.told, _Tiles(call)
    inner, classes, is_half, number = told.inner, told.classes, told.is_half != 0, tiles.number
    nothing, has_grad, is_streaming = constant(0, tiles.element), call.asks(GRAD), call.asks(STREAM)
    soon = call.out.part(0, where(is_streaming, 0, call.out.length))
    for t in loop(number + 2):
        # Tile t is read, tile t - 1 is processed, tile t - 2 is written. Two buffers suffice, because a tile is read
        # into the buffer that the written one leaves; there are three states.
        read, worked_on = (tiles.stage(t - k, call.x, (told.x_outer, told.x_class)) for k in range(2))
        written = tiles.stage(t - 2, call.out, (told.out_outer, told.out_class))
        is_read, is_worked_on, is_written = t < number, (t > 0) & ~(t > number), (t > 1) & has_grad
        first, first_before = (o * inner + start for o, start, _ in (tiles.rows_of(t - k) for k in range(2)))
        _, start_written, _ = tiles.rows_of(t - 2)
        is_streamed = is_streaming & ((start_written != 0) | (told.lead == 0))
        with when(is_read):
            prepare(call, read.state, first, read.rows, t < 3)
        is_steady = is_read & is_worked_on & (is_written | ~has_grad) & ~read.tile.has_few & (read.rows % LANES == 0)
        is_steady = is_steady & (read.rows == worked_on.rows) & ((read.rows == written.rows) | ~has_grad)
        if call.x.has_16_bits:
            is_steady = constant(0, BIT)
        for c in loop(0, classes, AT_ONCE):
            stop = smaller(c + AT_ONCE, classes)
            if not call.x.has_16_bits:
                with when(is_steady):
                    pass_on(c, stop, read, worked_on, written, has_grad, is_streamed)
            with when(is_written & ~is_steady):
                _write(c, stop, written, tiles.strip, is_half, is_streamed)
            with when(is_read):
                with when(~is_steady):
                    _read(c, stop, read, tiles.strip, is_half)
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
        with when(is_written & ~written.tile.has_few):
            put_exceptions(written.state, is_half, written.lines, constant(1), written.rows)
        with when(is_read):
            after_max(call, read.tile, read.state, nothing, first, read.rows)
        with when(is_worked_on):
            after_sums(call, worked_on.state, nothing, first_before, worked_on.rows)
            with when(has_grad & ~worked_on.tile.has_few):
                find_exceptions(worked_on.tile, worked_on.state, worked_on.rows)
