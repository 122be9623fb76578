"""Strided rows: adjacent in memory, with their classes apart, so that each row occupies one vector lane as it is.

A tile holds neighboring rows with all their classes. The loop is a pipeline: while one tile is processed, the gradient
of the previous tile is written and the next tile is read, 16 elements of each in turn, so that memory is never idle. At
both ends, and where a tile is incomplete, the stages take turns of a few classes instead. Only a few, because classes
that are a power of two apart evict each other from the cache.
"""

from __future__ import annotations

from typing import NamedTuple

from numba import types

from . import GRAD, KINDS, LANES, PARTIAL, STREAM
from .contiguous import CHUNK
from .elementwise import copy, narrow, numbers_of, widen
from .jit import inlined, inner
from .math import exp, times
from .simd import (
    Array,
    Flag,
    Index,
    Value,
    Variable,
    doubles_in,
    either,
    fence,
    loop,
    make_compact,
    numbers_in,
    operation,
    part,
    places_in,
    prefetch,
    vectors,
    when,
    where,
)
from .tiles import (
    EXP_FACTOR,
    FEW,
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
    rows: Index


def _store(out: Array, value: Value, place: Value, is_streamed: Value) -> None:
    with either(is_streamed) as (streamed, cached):
        with streamed:
            out.stream(value, place)
        with cached:
            out.store(value, place)


@operation
def put_gradient(first: Index, stop: Index, written: Stage, out: Lines, is_streamed: Flag) -> None:
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


@operation
def pass_on(
    first: Index, stop: Index, read: Stage, worked_on: Stage, written: Stage, has_grad: Flag, is_streamed: Flag
) -> Flag:
    """All three stages for a range of classes, 16 elements of each in turn; the tiles have equally many rows.

    The gradient of the tile `written` is stored, as by `put_gradient` without exceptions, which makes room for the
    logits of the tile `read`; the logits of the tile `worked_on` become exponentials. Returns False, having done
    nothing, if the logits have 16 bits.
    """
    x, out = read.lines.numbers, written.lines.numbers
    if x.dtype == types.uint16:
        return first != first
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
    return first == first


@inner
def _read(first, stop, stage, strip, is_half):
    """Read a range of classes into the tile."""
    tile, lines, count = stage.tile, stage.lines, stage.rows
    wide = part(strip, 0, count)
    for c in range(first, stop):
        source = part(lines.numbers, lines.start + c * lines.step, count)
        widen(source, is_half, wide)
        copy(part(tile.numbers, c * tile.class_step, count), (numbers_of(source, wide),))


@inner
def _write(first, stop, stage, strip, is_half, is_streamed):
    """Write the gradient of a range of classes."""
    lines = stage.lines
    if lines.numbers.itemsize == 2:
        for c in range(first, stop):
            put_gradient(c, c + 1, stage, Lines(strip, 0, 0), False)
            narrow(part(strip, 0, stage.rows), is_half, part(lines.numbers, lines.start + c * lines.step, stage.rows))
    else:
        put_gradient(first, stop, stage, Lines(numbers_of(lines.numbers, strip), lines.start, lines.step), is_streamed)


@inner
def _state(numbers, places, t, classes, width, partial, sums):
    """The state for tile number t; there are three, used in turn."""
    slot, size = t % 3, KINDS * width
    return State(
        part(numbers, 2 * classes * width + slot * size, size), width,
        part(places, 2 * slot * width, width), part(places, (2 * slot + 1) * width, width), partial, sums,
    )  # fmt: skip


@inner
def _rows_of(t, inner, width, lead):
    """Where the rows of tile number t are: outer index, first inner index, and how many."""
    in_outer = (inner + lead + width - 1) // width
    o = t // in_outer
    start = (t - o * in_outer) * width - lead
    return o, max(0, start), min(width, inner - start) + min(0, start)


@inlined
def rows(call):
    """See `loops`; `call` is a `build.Call`."""
    make_compact()
    told, outer, x, label, per_row, _, answers, out, workspace = call
    job, inner, classes, is_half = told.job, told.inner, told.classes, told.is_half != 0
    x_outer, x_class, out_outer, out_class = told.x_outer, told.x_class, told.out_outer, told.out_class
    width, lead = told.width, told.lead
    size, own = classes * width, KINDS * width
    numbers = numbers_in(workspace, 0, 2 * size + 3 * own + (PARTIAL + 1) * width, per_row)
    partial = part(numbers, 2 * size + 3 * own, PARTIAL * width)
    strip = part(numbers, 2 * size + 3 * own + PARTIAL * width, width)
    after = numbers.shape[0] * per_row.itemsize
    sums = doubles_in(workspace, after, width, per_row)
    places = places_in(workspace, after + 8 * width, 6 * width, per_row)
    nothing = per_row.dtype.type(0)
    has_grad, soon = job & GRAD != 0, part(out, 0, 0 if job & STREAM else out.shape[0])
    number = outer * ((inner + lead + width - 1) // width)
    for t in range(number + 2):
        # Tile t is read, tile t - 1 is processed, tile t - 2 is written. Two buffers suffice, because a tile is read
        # into the buffer that the written one leaves; there are three states.
        tile = Tile(part(numbers, (t & 1) * size, size), 1, width, classes)
        tile_before = Tile(part(numbers, (~t & 1) * size, size), 1, width, classes)
        state = _state(numbers, places, t, classes, width, partial, sums)
        state_before = _state(numbers, places, t + 2, classes, width, partial, sums)
        state_written = _state(numbers, places, t + 1, classes, width, partial, sums)
        is_read, is_worked_on, is_written = t < number, 0 < t <= number, t > 1 and has_grad
        o, start, count = _rows_of(t, inner, width, lead)
        o_before, start_before, count_before = _rows_of(t - 1, inner, width, lead)
        o_written, start_written, count_written = _rows_of(t - 2, inner, width, lead)
        first, first_before = o * inner + start, o_before * inner + start_before
        lines = Lines(x, o * x_outer + start, x_class)
        lines_written = Lines(out, o_written * out_outer + start_written, out_class)
        read, worked_on = Stage(tile, state, lines, count), Stage(tile_before, state_before, lines, count_before)
        written = Stage(tile, state_written, lines_written, count_written)
        is_streamed = job & STREAM != 0 and (start_written != 0 or lead == 0)
        if is_read:
            prepare(told, state, label, per_row, first, count, t < 3)
        is_steady = is_read and is_worked_on and (is_written or not has_grad) and classes > FEW and count % LANES == 0
        is_steady = is_steady and count == count_before and (count == count_written or not has_grad)
        for c in range(0, classes, AT_ONCE):
            stop = min(c + AT_ONCE, classes)
            is_done = pass_on(c, stop, read, worked_on, written, has_grad, is_streamed) if is_steady else False
            if is_written and not is_done:
                _write(c, stop, written, strip, is_half, is_streamed)
            if is_read:
                if not is_done:
                    _read(c, stop, read, strip, is_half)
                for lane in range(0, count, LANES):
                    find_max(tile, c, stop, state, lane)
            if is_worked_on:
                for lane in range(0, 0 if is_done else count_before, LANES):
                    exps(
                        tile_before, c, stop, state_before, lane, has_grad,
                        Lines(x, lines.start + stop * x_class + lane, x_class),
                        Lines(soon, lines_written.start + stop * out_class + lane, out_class),
                    )  # fmt: skip
                if stop == classes or stop % CHUNK == 0:
                    for lane in range(0, count_before, LANES):
                        fold_partial(state_before, (c & (CHUNK - 1)) + stop - c, lane, c < CHUNK)
        if is_written and classes > FEW:
            put_exceptions(state_written, is_half, lines_written, 1, count_written)
        if is_read:
            after_max(told, tile, state, label, nothing, answers, first, count)
        if is_worked_on:
            after_sums(told, state_before, nothing, answers, first_before, count_before)
            if has_grad and classes > FEW:
                find_exceptions(tile_before, state_before, count_before)
    if job & STREAM:
        fence()
    return 0.0
