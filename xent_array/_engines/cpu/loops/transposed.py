"""Contiguous rows of few classes, transposed tile by tile, so that each row occupies one vector lane.

A tile fits the L1 cache. `read_rows` transposes it in registers, square by square, and `write_rows` does the same with
its gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial

from . import GRAD, KINDS, LANES, STREAM
from .call import Call
from .elementwise import narrow, numbers_of, stream, widen
from .process import Ahead, Room, exceptions_of, find_exceptions, process, uniform_in
from .simd import (
    DOUBLE,
    INT32,
    INT64,
    Array,
    Value,
    constant,
    loop,
    make_compact,
    smaller,
    when,
    where,
)
from .squares import deinterleaved, interleaved, load_square, side_of, squares, store_square
from .tiles import ALL, NONE, TWO, Gradient, Lines, Maximum, State, Tile, put_exceptions


def read_rows(lines: Array, step: Value, count: Value, tile: Tile, state: State) -> None:
    """Read `count` rows, `step` apart, into the tile, and find what `Maximum` says of each."""
    side, classes, has_few = side_of(lines), tile.classes, tile.has_few
    by_vectors = where((classes < side) & (step != classes), 0, count & -LANES)
    for number in range(1, side):
        with when(classes == number):
            for row in loop(0, by_vectors, LANES):
                parts = [lines.load(row * number + k * LANES, LANES) for k in range(number)]
                _take(tile, Maximum(tile, state, row), [(constant(0), deinterleaved(parts))], has_few)
    with when(~(classes < side)):
        for row in loop(0, by_vectors, LANES):
            found = ((c, load_square(lines, row, step, c)) for c in squares(classes, side))
            _take(tile, Maximum(tile, state, row), found, has_few)
    for row in loop(by_vectors, count):
        for c in loop(classes):
            tile.numbers.store(lines.load(row * step + c), tile.place(row, c))
    for row in loop(by_vectors, count, LANES):
        found = ((c, [tile.numbers.load(tile.place(row, c), LANES)]) for c in loop(classes))
        _take(tile, Maximum(tile, state, row), found, has_few)


def _take(tile: Tile, maximum: Maximum, found: Iterable[tuple[Value, list[Value]]], has_few: Value) -> None:
    """Store vectors of 16 rows in the tile: for a class and those that follow it, one each."""
    for c, logits in found:
        for k, here in enumerate(logits):
            tile.numbers.store(here, tile.place(maximum.lane, c + k))
        maximum.add(c, logits, has_few)
    maximum.store()


def write_rows(
    tile: Tile, slopes: Array, state: State, lines: Array, step: Value, count: Value, exceptions: Value
) -> None:
    """Write the gradient of `count` rows of the tile to rows `step` apart; see `Gradient`."""
    for kind in (NONE, TWO, ALL):
        with when(exceptions == kind):
            _write(partial(Gradient, tile, slopes, state, exceptions=kind), lines, step, count, tile.classes)


def _write(
    gradient_of: Callable[[Value, int], Gradient], lines: Array, step: Value, count: Value, classes: Value
) -> None:
    side = side_of(lines)
    by_vectors = where((classes < side) & (step != classes), 0, count & -LANES)
    for number in range(1, side):
        with when(classes == number):
            for row in loop(0, by_vectors, LANES):
                gradient = gradient_of(row, LANES)
                made = [gradient.of(constant(c)) for c in range(number)]
                for k, values in enumerate(interleaved(made)):
                    lines.store(values, row * number + k * LANES)
    with when(~(classes < side)):
        for row in loop(0, by_vectors, LANES):
            gradient = gradient_of(row, LANES)
            for c in squares(classes, side):
                store_square([gradient.of(c + k) for k in range(side)], lines, row, step, c)
    for row in loop(by_vectors, count):
        gradient = gradient_of(row, 1)
        for c in loop(classes):
            lines.store(gradient.of(c), row * step + c)


def _runs(step: Value, count: Value, classes: Value) -> Iterator[tuple[Value, Value]]:
    """The first row of each contiguous run of rows `step` apart, and its length: one run if all are contiguous."""
    is_one = step == classes
    for first in loop(where(is_one, 1, count)):
        yield first, where(is_one, count, 1) * classes


def _widen(x: Array, step: Value, count: Value, classes: Value, is_half: Value, lines: Array) -> None:
    """Convert rows of 16-bit floats, `step` apart, to contiguous rows of float32."""
    for row, length in _runs(step, count, classes) if x.has_16_bits else ():
        widen(x.part(row * step, length), is_half, lines.part(row * classes, length))


def _narrow(lines: Array, count: Value, classes: Value, is_half: Value, out: Array, step: Value) -> None:
    """The reverse of `_widen`."""
    for row, length in _runs(step, count, classes) if out.has_16_bits else ():
        narrow(lines.part(row * classes, length), is_half, out.part(row * step, length))


def _in_workspace(call: Call) -> tuple[Room, Array]:
    """Where the rows of a tile are processed, and a tile in the layout of the logits."""
    told, element = call.told, call.per_row.element
    width, size = told.width, told.classes * told.width
    numbers = call.workspace.region(element, 0, 3 * size + KINDS * width)
    after = numbers.length * numbers.size
    places = call.workspace.region(INT64 if element == DOUBLE else INT32, after + 8 * width, 2 * width)
    tile = Tile(numbers.part(0, size), told.classes, constant(LANES), told.classes)
    state = State(
        numbers.part(3 * size, KINDS * width), width, places.part(0, width), places.part(width, width),
        numbers.part(0, 0), call.workspace.region(DOUBLE, after, width),
    )  # fmt: skip
    slopes = numbers.part(size, where(told.softcap > 0, size, 0))
    return Room(tile, state, slopes, uniform_in(call.q)), numbers.part(2 * size, size)


def _read(call: Call, room: Room, lines: Array, x: Array, count: Value) -> None:
    """Read `count` rows of the logits from `x` on."""
    told = call.told
    _widen(x, told.x_outer, count, told.classes, told.is_half != 0, lines)
    step = told.classes if x.has_16_bits else told.x_outer
    read_rows(numbers_of(x, lines), step, count, room.tile, room.state)


def rows(call: Call) -> None:
    """See `loops`."""
    make_compact()
    told, classes, width, step = call.told, call.told.classes, call.told.width, constant(LANES)
    room, lines = _in_workspace(call)
    exceptions, soon = exceptions_of(call, room), call.out.part(0, where(call.asks(STREAM), 0, call.out.length))
    for first in loop(0, call.outer, width):
        count = smaller(call.outer - first, width)
        x, out = call.x.part(first * told.x_outer, classes), call.out.part(first * told.out_outer, classes)
        read = partial(_read, call, room, lines, x, count)
        # For each class of 16 rows: a line of the next tile's logits, and one of this tile's output.
        following = where(first + width < call.outer, first + width, first) * told.x_outer
        to_read, to_write = Lines(call.x, following, step), Lines(soon, first * told.out_outer, step)
        process(call, room, first, count, read, Ahead(to_read, told.x_outer, to_write, told.out_outer))
        with when(call.asks(GRAD)):
            _put_gradient(call, room, lines, out, count, exceptions)


def _put_gradient(call: Call, room: Room, lines: Array, out: Array, count: Value, exceptions: Value) -> None:
    """Write the gradient of `count` rows to `out`.

    Rows of 16 bits are converted from `lines`, and streamed rows are gathered there.
    """
    (tile, state, slopes, _), told, classes = room, call.told, call.told.classes
    is_half, is_streamed, are_apart = told.is_half != 0, call.asks(STREAM), exceptions == NONE
    into = lines if out.has_16_bits else lines.where(is_streamed, out)
    step = where(is_streamed | out.has_16_bits, classes, told.out_outer)
    with when(are_apart):
        find_exceptions(tile, state, count)
    write_rows(tile, slopes, state, into, step, count, exceptions)
    with when(are_apart):
        put_exceptions(state, is_half, Lines(into, constant(0), constant(1)), step, count)
    _narrow(lines, count, classes, is_half, out, told.out_outer)
    if not out.has_16_bits:
        with when(is_streamed):
            stream(lines.part(0, count * classes), out.part(0, count * classes))
