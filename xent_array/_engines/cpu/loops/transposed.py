"""Contiguous rows of few classes, transposed tile by tile, so that each row occupies one vector lane.

A tile fits the L1 cache. `read_rows` transposes it in registers, square by square, and `write_rows` does the same with
its gradient; in between, `add_exps` and what prepares and finishes the rows work on 16 of them at a time. Plain rows
(see `loops.PLAIN`) are prepared and finished here, all others as in `tiles`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import NamedTuple

from . import GRAD, IGNORE, KINDS, LANES, PARTIAL, PLAIN, SCALE, STREAM
from .call import Call
from .elementwise import copy, narrow, numbers_of, stream, widen
from .math import exp, log1p
from .reductions import half_gap
from .simd import (
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
from .squares import deinterleaved, interleaved, load_square, side_of, squares, store_square
from .tiles import (
    ALL,
    AT_LABEL,
    EXP_FACTOR,
    GRAD_AT_MAX,
    LESS_AT_LABEL,
    MAX,
    NONE,
    ROW_LOSS,
    TWO,
    Gradient,
    Lines,
    Maximum,
    State,
    Tile,
    after_max,
    after_sums,
    cap,
    find_exceptions,
    find_max,
    look_up,
    prepare,
    put_exceptions,
)


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


# Plain rows: each has a label and counts as much as any other, or is ignored; there are no options. See PLAIN.


def take_labels(state: State, label: Array, ignore_index: Value, ignores: Value) -> None:
    """All that is to be known of plain rows beforehand: their labels, and -1 for those to ignore."""
    for row, lanes in vectors(label.length, LANES):
        here = label.load(row, lanes)
        is_ignored = (here == ignore_index.repeated(lanes)) & ignores.repeated(lanes)
        state.label.store(where(is_ignored, -1, here).to(state.label.element), row)


def finish_plain(state: State, count: Value, scale: Value, has_grad: Value) -> None:
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
            wide, counts_nothing = scale.to(DOUBLE).repeated(LANES), has_none | (scale == 0).repeated(LANES)
            by = wide * p
            top = where(label == state.argmax.load(row, LANES), wide * (0 - r * p), by)
            values = by.to(zero.element) + zero, scale.repeated(LANES), top.to(zero.element)
            for kind, value in zip((EXP_FACTOR, LESS_AT_LABEL, GRAD_AT_MAX), values, strict=True):
                state.store(where(counts_nothing, zero, value), row, kind)


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


class _Room(NamedTuple):
    """The parts of the workspace."""

    tile: Tile
    slopes: Array  # of softcap, in the layout of the tile; empty without softcap
    lines: Array  # for a tile in the layout of the logits
    state: State


def _room(call: Call) -> _Room:
    told, element = call.told, call.per_row.element
    width, size = told.width, told.classes * told.width
    numbers = call.workspace.region(element, 0, 3 * size + KINDS * width)
    after = numbers.length * numbers.size
    places = call.workspace.region(INT64 if element == DOUBLE else INT32, after + 8 * width, 2 * width)
    tile = Tile(numbers.part(0, size), told.classes, constant(LANES), told.classes)
    slopes, lines = numbers.part(size, where(told.softcap > 0, size, 0)), numbers.part(2 * size, size)
    state = State(
        numbers.part(3 * size, KINDS * width), width, places.part(0, width), places.part(width, width),
        numbers.part(0, 0), call.workspace.region(DOUBLE, after, width),
    )  # fmt: skip
    return _Room(tile, slopes, lines, state)


def _uniform(q: Array) -> Value:
    """What label smoothing puts on each class."""
    uniform = Variable(constant(0, q.element))
    with when(q.length != 0):
        uniform.set(q.load(0))
    return uniform.get()


def rows(call: Call) -> None:
    """See `loops`."""
    make_compact()
    told, classes, width, step = call.told, call.told.classes, call.told.width, constant(LANES)
    room, uniform, is_half = _room(call), _uniform(call.q), told.is_half != 0
    tile, state, lines = room.tile, room.state, room.lines
    is_plain, is_capped, is_smoothed = call.asks(PLAIN), told.softcap > 0, uniform > 0
    exceptions = where(is_smoothed | is_capped, ALL, where(tile.has_few, constant(TWO), NONE))
    soon = call.out.part(0, where(call.asks(STREAM), 0, call.out.length))
    for first in loop(0, call.outer, width):
        here, x = smaller(call.outer - first, width), call.x.part(first * told.x_outer, classes)
        with either(is_plain) as (plain, others):
            with plain:
                take_labels(state, call.label.part(first, here), told.ignore_index, call.asks(IGNORE))
            with others:
                prepare(call, state, first, here, first == 0)
        _widen(x, told.x_outer, here, classes, is_half, lines)
        read_rows(numbers_of(x, lines), classes if x.has_16_bits else told.x_outer, here, tile, state)
        with when(is_capped):
            for lane in loop(0, here, LANES):
                cap(tile, room.slopes, told.softcap, lane)
                find_max(tile, constant(0), classes, state, lane)
        with when(is_smoothed):
            add_half_gaps(tile, state, here, uniform)
        with either(is_plain) as (plain, others):
            with plain, when(~tile.has_few):
                look_up(tile, state.label, state.of(AT_LABEL, here), here)
            with others:
                after_max(call, tile, state, uniform, first, here)
        # To prefetch, for each class of 16 rows: a line of the next tile's logits, and one of this tile's output.
        following = where(first + width < call.outer, first + width, first) * told.x_outer
        read, written = Lines(call.x, following, step), Lines(soon, first * told.out_outer, step)
        add_exps(tile, state, here, Ahead(read, told.x_outer, written, told.out_outer))
        with either(is_plain) as (plain, others):
            with plain:
                finish_plain(state, here, call.per_row.load(SCALE), call.asks(GRAD))
                copy(call.answers_of(0, first, here), state.of(ROW_LOSS, here))
            with others:
                after_sums(call, state, uniform, first, here)
        with when(call.asks(GRAD)):
            _put_gradient(call, room, call.out.part(first * told.out_outer, classes), here, exceptions)


def _put_gradient(call: Call, room: _Room, out: Array, count: Value, exceptions: Value) -> None:
    """Write the gradient of `count` rows to `out`.

    Rows of 16 bits are converted from `lines`, and streamed rows are gathered there.
    """
    (tile, slopes, lines, state), told, classes = room, call.told, call.told.classes
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
