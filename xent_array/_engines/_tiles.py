"""Many rows at once, each in a lane of the vector instructions: rows of few classes, and rows that lie side by side.

In LLVM's own terms, see `_vectors`. In a tile 16 rows lie side by side, so that the numbers of a class are one vector;
then come the next 16. Sums are made by the same additions as those of `_dense`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from ._vectors import (
    _INDEX,
    PARTIAL,
    Value,
    _Ahead,
    _bfloat_of,
    _exp,
    _finish,
    _half_of,
    _Held,
    _in_steps,
    _Memory,
    _shuffled,
    _smaller,
    _times,
    _top,
)

LANES = 16  # rows that share a vector
HALF = 8  # of them in float64


# What there is of each row while its numbers lie in a tile; one after another in one array
M, AT_LABEL, PART, FACTOR, SCALE, GAP, MASS, OF_ROW, BY, TOP, LABEL = range(11)
EACH = 11


class _Each:
    """A vector of each, from row `lane` on."""

    def __init__(
        self, context: Any, builder: Any, type_: Any, numbers: Any, width: Any, lane: Any, length: int
    ) -> None:
        self.memory, self.width, self.lane = _Memory(context, builder, type_, numbers, length), width, lane
        self.builder = builder

    def place(self, which: int) -> Any:
        return self.builder.add(self.builder.mul(self.width, _INDEX(which)), self.lane)

    def load(self, *which: int) -> list[Value]:
        return [self.memory.load(self.place(of)) for of in which]

    def store(self, value: Value, which: int) -> None:
        self.memory.store(value.to(self.memory.vector.element), self.place(which))


# Rows turned


def _in_tile(builder: Any, steps: tuple[Any, Any], row: Any, c: Any) -> Any:
    """Where a tile has the number of a class of a row."""
    by_row, by_class = steps
    lane = builder.and_(row, _INDEX(LANES - 1))
    block = builder.mul(builder.sub(row, lane), by_row)
    return builder.add(builder.add(block, builder.mul(c, by_class)), lane)


def _turned(vectors: list[Value]) -> list[Value]:
    """Squares of as many numbers as there are vectors, two of them side by side, each turned by itself."""
    side, half = len(vectors), len(vectors) // 2
    mixed = [k + other for k in range(half) for other in (0, 2 * side)]  # of the lower halves of two vectors
    low = mixed + [k + side for k in mixed]
    for _ in range(side.bit_length() - 1):
        pairs = zip(vectors[:half], vectors[half:], strict=True)
        vectors = [_shuffled(*pair, [k + upper for k in low]) for pair in pairs for upper in (0, half)]
    return vectors


@intrinsic
def place(_context: Any, row: Any, c: Any, by_row: Any, by_class: Any) -> Any:
    """Where a tile has the number of class c of a row."""

    def build(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        row, c, *steps = arguments
        return _in_tile(builder, steps, row, c)

    index = types.int64
    return types.uint64(index, index, index, index), build


class _Turn:
    """Loops over all rows and classes, a square at a time; what is left over one by one."""

    def __init__(self, context: Any, builder: Any, line: tuple[Any, Any], tile: tuple[Any, Any]) -> None:
        self.builder = builder
        self.side = 16 // (line[0].dtype.bitwidth // 8)  # numbers of a row that are taken at once, of 128 bits
        self.line, self.tile = (_Memory(context, builder, *of, length=self.side) for of in (line, tile))
        self.wide = _Memory(context, builder, *tile, length=2 * self.side)

    def walk(self, count: Any, classes: Any, rows: Callable[[Any, int], Callable[[Any], None]]) -> None:
        """`rows(row, number)` is said which rows come next, and answers what to do with them at a class."""
        builder, side = self.builder, _INDEX(self.side)
        whole = builder.and_(count, _INDEX(-2 * self.side))
        whole = builder.select(builder.icmp_signed("<", classes, side), _INDEX(0), whole)
        last = builder.sub(classes, side)
        with cgutils.for_range_slice(builder, _INDEX(0), whole, _INDEX(2 * self.side)) as (row, _):
            work = rows(row, 2 * self.side)
            with cgutils.for_range_slice(builder, _INDEX(0), classes, side) as (c, _):
                work(builder.select(builder.icmp_signed("<", c, last), c, last))  # the last square may lap over
        with cgutils.for_range_slice(builder, whole, count, _INDEX(1)) as (row, _):
            work = rows(row, 1)
            with cgutils.for_range(builder, classes) as loop:
                work(loop.index)

    def in_line(self, start: Any, row: Any, step: Any, c: Any) -> Any:
        return self.builder.add(start, self.builder.add(self.builder.mul(row, step), c))


@intrinsic
def turn(_context: Any, x: Any, start: Any, x_step: Any, count: Any, classes: Any, tile: Any, first: Any) -> Any:
    """`count` rows, `x_step` apart from `start` on, to lie side by side in `tile`, from its row `first` on."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        x_, start, x_step, count, classes, tile_, first = arguments
        turn = _Turn(context, builder, (x, x_), (tile, tile_))
        side, steps = turn.side, (classes, _INDEX(LANES))

        def rows(row: Any, number: int) -> Callable[[Any], None]:
            def one(c: Any) -> None:
                value = builder.load(builder.gep(turn.line.data, [turn.in_line(start, row, x_step, c)]))
                builder.store(
                    value,
                    builder.gep(turn.tile.data, [_in_tile(builder, steps, builder.add(first, row), c)]),
                )

            def square(c: Any) -> None:
                lines = [
                    turn.line.load(turn.in_line(start, builder.add(row, _INDEX(k)), x_step, c)) for k in range(number)
                ]
                pairs = [_shuffled(lines[k], lines[k + side], [*range(number)]) for k in range(side)]
                for k, numbers in enumerate(_turned(pairs)):
                    turn.wide.store(
                        numbers,
                        _in_tile(builder, steps, builder.add(first, row), builder.add(c, _INDEX(k))),
                    )

            return one if number == 1 else square

        turn.walk(count, classes, rows)
        return context.get_dummy_value()

    index = types.int64
    return types.void(x, index, index, index, index, tile, index), build


def _marked(value: Value, c: Value, label: Value, at_label: Value, at: Value, top: Value) -> Value:
    """The gradient of a class: that value but at the label, where something is taken away, and at the maximum."""
    is_label, is_top = (value.builder.icmp_signed("==", place.value, c.value) for place in (label, at))
    return top.where(is_top, (value - at_label).where(is_label, value))


@intrinsic
def turn_back(
    _context: Any, tile: Any, first: Any, each: Any, width: Any, label: Any, at: Any,
    out: Any, start: Any, out_step: Any, count: Any, classes: Any, has_marks: Any,
) -> Any:  # fmt: skip
    """`count` rows that lie side by side in `tile`, from its row `first` on, each times its own BY, to `out`.

    If it `has_marks`, label and maximum have what is theirs.
    """

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        tile_, first, each_, width, label_, at_, out_, start, out_step, count, classes, has_marks = arguments
        turn = _Turn(context, builder, (out, out_), (tile, tile_))
        side, steps = turn.side, (classes, _INDEX(LANES))

        def rows(row: Any, number: int) -> Callable[[Any], None]:
            here = builder.add(first, row)
            by, top, at_label = _Each(context, builder, each, each_, width, here, number).load(BY, TOP, LABEL)
            numbers = _Memory(context, builder, tile, tile_, number)
            y, places = (_Memory(context, builder, *of, number) for of in ((label, label_), (at, at_)))
            marks = y.load(here), at_label, places.load(here), top

            def of_classes(c: Any, many: int) -> list[Value]:
                at = [builder.add(c, _INDEX(k)) for k in range(many)]
                held = _Held([_times(numbers.load(_in_tile(builder, steps, here, k)), by) for k in at])
                with builder.if_then(has_marks):
                    held.set([_marked(value, y.index(k), *marks) for k, value in zip(at, held.get(), strict=True)])
                return held.get()

            def one(c: Any) -> None:
                (value,) = of_classes(c, 1)
                _Memory(context, builder, out, out_, 1).store(value, turn.in_line(start, row, out_step, c))

            def square(c: Any) -> None:
                for k, pair in enumerate(_turned(of_classes(c, side))):
                    for half in (0, side):
                        line = _shuffled(pair, pair, [*range(half, half + side)])
                        turn.line.store(line, turn.in_line(start, builder.add(row, _INDEX(k + half)), out_step, c))

            return one if number == 1 else square

        turn.walk(count, classes, rows)
        return context.get_dummy_value()

    index = types.int64
    return types.void(
        tile, index, each, index, label, at, out, index, index, index, index, types.boolean
    ), build  # fmt: skip


# Of each row the number of one class, one by one


@contextmanager
def _rows_with(context: Any, builder: Any, place: tuple[Any, Any], count: Any) -> Iterator[tuple[Any, Any]]:
    """Of `count` rows those that have such a class, and the class."""
    data = context.make_array(place[0])(context, builder, place[1]).data
    with cgutils.for_range(builder, count) as loop:
        c = builder.load(builder.gep(data, [loop.index]))
        with builder.if_then(builder.icmp_signed(">=", c, c.type(0))):
            yield loop.index, c if c.type == _INDEX else builder.sext(c, _INDEX)


@intrinsic
def look_up(_context: Any, tile: Any, by_row: Any, by_class: Any, place: Any, out: Any, count: Any) -> Any:
    """``out[k] = tile[k, place[k]]``, if that is a class."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        tile_, by_row, by_class, place_, out_, count = arguments
        source, target = (context.make_array(of)(context, builder, array) for of, array in ((tile, tile_), (out, out_)))
        with _rows_with(context, builder, (place, place_), count) as (k, c):
            number = builder.load(builder.gep(source.data, [_in_tile(builder, (by_row, by_class), k, c)]))
            builder.store(number, builder.gep(target.data, [k]))
        return context.get_dummy_value()

    return types.void(tile, types.int64, types.int64, place, out, types.int64), build


@intrinsic
def hide(_context: Any, tile: Any, by_row: Any, by_class: Any, place: Any, count: Any) -> Any:
    """``tile[k, place[k]] = -inf``, if that is a class."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        tile_, by_row, by_class, place_, count = arguments
        data = context.make_array(tile)(context, builder, tile_).data
        with _rows_with(context, builder, (place, place_), count) as (k, c):
            there = builder.gep(data, [_in_tile(builder, (by_row, by_class), k, c)])
            builder.store(ir.Constant(there.type.pointee, -math.inf), there)
        return context.get_dummy_value()

    return types.void(tile, types.int64, types.int64, place, types.int64), build


@intrinsic
def put_marks(
    _context: Any, each: Any, width: Any, label: Any, at: Any, is_half: Any,
    out: Any, start: Any, row_step: Any, class_step: Any, count: Any,
) -> Any:  # fmt: skip
    """What is not exp(x - m) times something, to the gradient: LABEL at the label, and TOP at the maximum."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        each_, width, label_, at_, is_half, out_, start, row_step, class_step, count = arguments
        source, target = (context.make_array(of)(context, builder, array) for of, array in ((each, each_), (out, out_)))
        for place, which in (((label, label_), LABEL), ((at, at_), TOP)):
            with _rows_with(context, builder, place, count) as (k, c):
                number = builder.load(builder.gep(source.data, [builder.add(builder.mul(width, _INDEX(which)), k)]))
                if out.dtype == types.uint16:
                    narrow = (_half_of(context, builder, number), _bfloat_of(context, builder, number))
                    number = builder.select(is_half, *narrow)
                there = builder.add(builder.mul(k, row_step), builder.mul(c, class_step))
                builder.store(number, builder.gep(target.data, [builder.add(start, there)]))
        return context.get_dummy_value()

    index = types.int64
    return types.void(each, index, label, at, types.boolean, out, index, index, index, index), build


# 16 rows at a time, the numbers of a class side by side


@intrinsic
def tops_of_lanes(
    _context: Any, tile: Any, by_row: Any, by_class: Any, first: Any, end: Any,
    each: Any, width: Any, lane: Any, label: Any, at: Any, is_few: Any,
) -> Any:  # fmt: skip
    """Of 16 rows the largest number, NaN passed over, and its first place into `at`; of few classes the label's, too.

    It is told the classes from `first` to `end`, all of them in turn.
    """

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        tile_, by_row, by_class, first, end, each_, width, lane, label_, at_, is_few = arguments
        memory = _Memory(context, builder, tile, tile_, LANES)
        places = _Memory(context, builder, at, at_, LANES)
        y = _Memory(context, builder, label, label_, LANES).load(lane)
        of = _Each(context, builder, each, each_, width, lane, LANES)
        held, at_label = _Held([memory.zero().like(-math.inf), places.zero()]), _Held([memory.zero()])
        with builder.if_then(builder.icmp_signed("!=", first, _INDEX(0))):
            held.set([*of.load(M), places.load(lane)])
            at_label.set(of.load(AT_LABEL))
        with cgutils.for_range_slice(builder, first, end, _INDEX(1)) as (c, _):
            here, index = memory.load(_in_tile(builder, (by_row, by_class), lane, c)), places.index(c)
            largest, place = held.get()
            higher = largest.below(here)
            held.set([here.where(higher, largest), index.where(higher, place)])
            with builder.if_then(is_few):
                is_it = builder.icmp_signed("==", y.value, index.value)
                at_label.set([here.where(is_it, *at_label.get())])
        largest, place = held.get()
        of.store(largest, M)
        of.store(at_label.get()[0], AT_LABEL)
        places.store(place, lane)
        return context.get_dummy_value()

    index = types.int64
    return types.void(tile, index, index, index, index, each, index, index, label, at, types.boolean), build


@intrinsic
def gaps_of_lanes(_context: Any, each: Any, width: Any, lane: Any, label: Any, no_label: Any) -> Any:
    """Of 16 rows the gap and the mass.

    A label that is negative is none: then nothing counts (PART is 0), and the mass is `no_label`.
    """

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        each_, width, lane, label_, no_label = arguments
        of = _Each(context, builder, each, each_, width, lane, LANES)
        memory = _Memory(context, builder, label, label_, LANES)
        has_none = builder.icmp_signed("<", memory.load(lane).value, memory.zero().value)
        largest, at_label, part = of.load(M, AT_LABEL, PART)
        zero = part.like(0)
        part = zero.where(has_none, part)
        half = largest * part.like(0.5) - at_label * part.like(0.5)  # as in `_half_gap`
        nothing, half_gap = builder.or_(part.equals(zero), half.equals(zero)), part * half
        gap = zero.where(nothing, half_gap + half_gap).with_one_nan()
        mass = of.memory.all(builder.sitofp(no_label, of.memory.vector.element)).where(has_none, part)
        for value, which in ((part, PART), (gap, GAP), (mass, MASS)):
            of.store(value, which)
        return context.get_dummy_value()

    index = types.int64
    return types.void(each, index, index, label, index), build


@intrinsic
def take_lanes(
    _context: Any, x: Any, start: Any, x_step: Any, count: Any, tile: Any, first: Any, end: Any, width: Any
) -> Any:
    """The numbers of the classes from `first` to `end` of `count` rows that lie side by side in `x`, to the tile."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        x_, start, x_step, count, tile_, first, end, width = arguments
        with cgutils.for_range_slice(builder, first, end, _INDEX(1)) as (c, loop):
            there = builder.add(start, builder.mul(loop, x_step))

            def work(lane: Any, length: int) -> None:
                source, target = (_Memory(context, builder, *of, length) for of in ((x, x_), (tile, tile_)))
                target.store(source.load(builder.add(there, lane)), builder.add(builder.mul(c, width), lane))

            _in_steps(builder, count, LANES, work)
        return context.get_dummy_value()

    index = types.int64
    return types.void(x, index, index, index, tile, index, index, index), build


@intrinsic
def exp_of_lanes(
    _context: Any, tile: Any, start: Any, step: Any, count: Any, turn: Any,
    m: Any, at: Any, lane: Any, is_few: Any, is_kept: Any,
    partial: Any, coming: Any, coming_start: Any, coming_step: Any, out: Any, out_start: Any, out_step: Any,
) -> Any:  # fmt: skip
    """exp(x - m) of 16 rows and `count` classes, after `turn` others; in place of x if kept, and the 32 partial sums.

    Of few classes, there is 0 at `at`. A row whose m is not finite becomes NaN. Meanwhile, with each class, comes a
    line of `coming`, which will be read, and one of `out`, which will be written.
    """

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        tile_, start, step, count, turn, m_, at_, lane, is_few, is_kept, partial_ = arguments[:11]
        coming_, coming_start, coming_step, out_, out_start, out_step = arguments[11:]
        memory, sums, places = (
            _Memory(context, builder, *of, LANES) for of in ((tile, tile_), (partial, partial_), (at, at_))
        )
        largest, apart = _Memory(context, builder, m, m_, LANES).load(lane), places.load(lane)
        largest = largest + (largest - largest)
        read, written = _Ahead(context, builder, coming, coming_, 0), _Ahead(context, builder, out, out_, 1)
        come = read.pointer(coming_start)
        here = builder.bitcast(memory.pointer(start), come.type)
        go = written.or_else(written.pointer(out_start), here)
        come_step = read.bytes(coming_step)
        go_step = written.or_else(written.bytes(out_step), builder.mul(step, _INDEX(memory.align)))

        with cgutils.for_range(builder, count) as loop:
            read.line(come, builder.mul(loop.index, come_step))
            written.line(go, builder.mul(loop.index, go_step))
            here, turns = builder.add(start, builder.mul(loop.index, step)), builder.add(turn, loop.index)
            held = _Held([_exp(memory.load(here) - largest)])
            with builder.if_then(is_few):
                is_apart = builder.icmp_signed("==", places.index(turns).value, apart.value)
                held.set([largest.like(0).where(is_apart, *held.get())])
            with builder.if_then(is_kept):
                memory.store(held.get()[0], here)
            slot = builder.add(builder.mul(lane, _INDEX(PARTIAL // LANES)), builder.and_(turns, _INDEX(PARTIAL - 1)))
            slot = builder.mul(slot, _INDEX(LANES))
            with builder.if_then(builder.icmp_signed(">=", turns, _INDEX(PARTIAL))):  # else it has nothing yet
                held.set([sums.load(slot) + held.get()[0]])
            sums.store(held.get()[0], slot)
        return context.get_dummy_value()

    index = types.int64
    return types.void(
        tile, index, index, index, index, m, at, index, types.boolean, types.boolean, partial,
        coming, index, index, out, index, index,
    ), build  # fmt: skip


@intrinsic
def add_up_lanes(_context: Any, partial: Any, count: Any, m: Any, lane: Any, totals: Any, has_some: Any) -> Any:
    """The partial sums of `count` classes, folded like those of `rows`; to totals, if these have some already."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        partial_, count, m_, lane, totals_, has_some = arguments
        sums, total = (
            _Memory(context, builder, partial, partial_, LANES),
            _Memory(context, builder, totals, totals_, LANES),
        )
        first = builder.mul(lane, _INDEX(PARTIAL))
        live, half = _smaller(builder, count, _INDEX(PARTIAL)), PARTIAL
        while half > 1:
            half //= 2
            with cgutils.for_range(builder, builder.sub(live, _INDEX(half))) as loop:
                low = builder.add(first, builder.mul(loop.index, _INDEX(LANES)))
                high = builder.add(low, _INDEX(half * LANES))
                sums.store(sums.load(low) + sums.load(high), low)
            live = _smaller(builder, live, _INDEX(half))
        largest = _Memory(context, builder, m, m_, LANES).load(lane)
        nothing = (largest - largest).to(ir.DoubleType())  # or NaN
        before = Value(builder, builder.select(has_some, total.load(lane).value, nothing.value))
        total.store(before + sums.load(first).to(ir.DoubleType()), lane)
        return context.get_dummy_value()

    index = types.int64
    return types.void(partial, index, m, index, totals, types.boolean), build


@intrinsic
def finish_lanes(
    _context: Any, each: Any, width: Any, lane: Any, totals: Any, label: Any, at: Any, z: Any, has_grad: Any
) -> Any:
    """Of 8 rows the loss, OF_ROW; if it is asked for, what the gradient is made of: BY, TOP, and LABEL to take away."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        each_, width, lane, totals_, label_, at_, z, has_grad = arguments
        of = _Each(context, builder, each, each_, width, lane, HALF)
        m, part, factor, scale, gap, mass = of.load(M, PART, FACTOR, SCALE, GAP, MASS)
        sums, double = _Memory(context, builder, totals, totals_, HALF), ir.DoubleType()
        r = sums.load(lane).to(m.element).to(double).with_one_nan()
        sums.store(r, lane)
        wide_m, wide_gap, wide_mass, wide_factor = (value.to(double) for value in (m, gap, mass, factor))
        loss, _, p, coef, more = _finish(wide_m, r, wide_gap, wide_mass, wide_factor, z, m.is_single)
        of.store(loss, OF_ROW)
        with builder.if_then(has_grad):
            y, top = (_Memory(context, builder, *of, HALF).load(lane) for of in ((label, label_), (at, at_)))
            zero = scale.like(0)
            nothing = scale.equals(zero)
            by = (scale.to(double) * coef * p).to(m.element) + zero
            a = part.where(builder.icmp_signed("==", y.value, top.value), zero).to(double)
            at_top = (scale.to(double) * _top(r, p, wide_mass, coef, more, a)).to(m.element)
            for value, which in ((by, BY), (scale * part, LABEL), (at_top, TOP)):
                of.store(zero.where(nothing, value), which)
        return context.get_dummy_value()

    index = types.int64
    return types.void(each, index, index, totals, label, at, types.float64, types.boolean), build


@intrinsic
def put_lanes(
    _context: Any, tile: Any, first: Any, end: Any, each: Any, width: Any, label: Any, at: Any,
    out: Any, start: Any, out_step: Any, count: Any, has_marks: Any, is_streamed: Any,
) -> Any:  # fmt: skip
    """The reverse of `take_lanes`, each row's numbers times its own BY; see `turn_back` for the marks.

    What is streamed goes past the caches, to lines that are written as a whole: 16 numbers have to lie in whole lines.
    """

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        tile_, first, end, each_, width, label_, at_, out_, start, out_step, count = arguments[:11]
        has_marks, is_streamed = arguments[11:]
        with cgutils.for_range_slice(builder, first, end, _INDEX(1)) as (c, loop):
            there = builder.add(start, builder.mul(loop, out_step))

            def work(lane: Any, length: int) -> None:
                source, target, y, places = (
                    _Memory(context, builder, *of, length)
                    for of in ((tile, tile_), (out, out_), (label, label_), (at, at_))
                )
                by, top, at_label = _Each(context, builder, each, each_, width, lane, length).load(BY, TOP, LABEL)
                held = _Held([_times(source.load(builder.add(builder.mul(c, width), lane)), by)])
                with builder.if_then(has_marks):
                    marks = y.load(lane), at_label, places.load(lane), top
                    held.set([_marked(held.get()[0], y.index(c), *marks)])
                (value,) = held.get()
                place = builder.add(there, lane)
                with builder.if_else(is_streamed) as (streamed, kept):
                    with streamed:
                        target.stream(value, place)
                    with kept:
                        target.store(value, place)

            _in_steps(builder, count, LANES, work)
        return context.get_dummy_value()

    index = types.int64
    return types.void(
        tile, index, index, each, index, label, at, out, index, index, index, types.boolean, types.boolean
    ), build  # fmt: skip


@intrinsic
def step_of_lanes(
    _context: Any, first: Any, end: Any, turn: Any, width: Any, count: Any,
    x: Any, start: Any, x_step: Any, coming: Any, tile: Any,
    tile_before: Any, m: Any, partial: Any,
    by: Any, out: Any, out_start: Any, out_step: Any, soon: Any, soon_start: Any, has_grad: Any, is_streamed: Any,
) -> Any:  # fmt: skip
    """The classes from `first` to `end` of three tiles of `count` rows, a multiple of 16: 16 numbers of each in turn.

    Those of `tile` are given, as by `put_lanes` without marks, and make room for those of `x`, as by `take_lanes`;
    those of `tile_before` become exponentials, as by `exp_of_lanes` if not few, whether or not the gradient is asked
    for. So memory is read and written while the arithmetic goes on. False, and nothing is done, if `x` has 16 bits.
    """
    index = types.int64
    signature = types.boolean(
        index, index, index, index, index, x, index, index, index, tile, tile_before, m, partial,
        by, out, index, index, soon, index, types.boolean, types.boolean,
    )  # fmt: skip
    if x.dtype == types.uint16:
        return signature, lambda context, *_: context.get_constant(types.boolean, 0)

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        first, end, turn, width, count, x_, start, x_step, coming, tile_, before_, m_, partial_ = arguments[:13]
        by_, out_, out_start, out_step, soon_, soon_start, has_grad, is_streamed = arguments[13:]
        source, written, here, before, largest, sums, scale = (
            _Memory(context, builder, *of, LANES)
            for of in (
                (x, x_), (out, out_), (tile, tile_), (tile_before, before_), (m, m_), (partial, partial_), (by, by_)
            )
        )  # fmt: skip
        read, write = _Ahead(context, builder, x, x_, 0), _Ahead(context, builder, soon, soon_, 1)
        with cgutils.for_range_slice(builder, first, end, _INDEX(1)) as (c, loop):
            from_, to, row = (
                builder.add(begin, builder.mul(of, step))
                for begin, of, step in ((start, loop, x_step), (out_start, loop, out_step), (_INDEX(0), c, width))
            )
            come = read.pointer(builder.add(coming, builder.mul(loop, x_step)))
            go = write.pointer(builder.add(soon_start, builder.mul(loop, out_step)))
            go = write.or_else(go, builder.bitcast(before.pointer(row), come.type))
            turns = builder.add(turn, loop)
            slot = builder.mul(builder.and_(turns, _INDEX(PARTIAL - 1)), _INDEX(LANES))
            is_added = builder.icmp_signed(">=", turns, _INDEX(PARTIAL))
            # Where no line of cache begins with the first row, there is one more of them.
            read.line(come, _INDEX(0))
            write.line(go, _INDEX(0))
            with cgutils.for_range_slice(builder, _INDEX(0), count, _INDEX(LANES)) as (lane, _):
                place, last = builder.add(row, lane), builder.add(lane, _INDEX(LANES - 1))
                read.line(come, read.bytes(last))
                write.line(go, write.bytes(last))
                with builder.if_then(has_grad):
                    value, target = _times(here.load(place), scale.load(lane)), builder.add(to, lane)
                    with builder.if_else(is_streamed) as (streamed, kept):
                        with streamed:
                            written.stream(value, target)
                        with kept:
                            written.store(value, target)
                here.store(source.load(builder.add(from_, lane)), place)
                top = largest.load(lane)
                value = _exp(before.load(place) - (top + (top - top)))
                before.store(value, place)
                at = builder.add(builder.mul(lane, _INDEX(PARTIAL)), slot)
                held = _Held([value])
                with builder.if_then(is_added):
                    held.set([sums.load(at) + value])
                sums.store(held.get()[0], at)
        return context.get_constant(types.boolean, 1)

    return signature, build
