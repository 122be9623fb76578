"""Contiguous rows of few classes, transposed tile by tile, so that each row occupies one vector lane.

A tile fits the L1 cache. `read_rows` transposes it in registers, square by square, and `write_rows` does the same with
its gradient; in between, `add_exps` and what prepares and finishes the rows work on 16 of them at a time. Plain rows
(see `loops.PLAIN`) are prepared and finished here, all others as in `tiles`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

from . import CHECK, GRAD, IGNORE, KINDS, LANES, PARTIAL, PLAIN, SCALE, STREAM, SUM
from .contiguous import half_gap
from .elementwise import copy, kept_labels, narrow, numbers_of, stream, total_of, widen
from .jit import inlined, inner
from .math import exp, log1p
from .simd import (
    DOUBLE,
    Array,
    Flag,
    Index,
    Number,
    Value,
    Variable,
    constant,
    doubles_in,
    either,
    fence,
    loop,
    make_compact,
    make_inline,
    numbers_in,
    operation,
    part,
    places_in,
    prefetch,
    vectors,
    when,
    where,
)
from .squares import deinterleaved, interleaved, load_square, side_of, squares, store_square
from .tiles import (
    ALL,
    AT_LABEL,
    EXP_FACTOR,
    FEW,
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


@operation
def read_rows(lines: Array, step: Index, count: Index, tile: Tile, state: State) -> None:
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


@operation
def add_half_gaps(tile: Tile, state: State, count: Index, uniform: Number) -> None:
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
    read_row: Index
    written: Lines
    written_row: Index


@operation
def add_exps(tile: Tile, state: State, count: Index, ahead: Ahead) -> None:
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


@operation
def write_rows(
    tile: Tile, slopes: Array, state: State, lines: Array, step: Index, count: Index, exceptions: Index
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


@operation
def take_labels(state: State, label: Array, ignore_index: Index, ignores: Flag) -> None:
    """All that is to be known of plain rows beforehand: their labels, and -1 for those to ignore."""
    for row, lanes in vectors(label.length, LANES):
        here = label.load(row, lanes)
        is_ignored = (here == ignore_index.repeated(lanes)) & ignores.repeated(lanes)
        state.label.store(where(is_ignored, -1, here).to(state.label.element), row)


@operation
def finish_plain(state: State, count: Index, scale: Number, has_grad: Flag) -> None:
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


@inner
def _widen(x, start, step, count, classes, is_half, lines):
    """Convert 16-bit rows, `step` apart, to contiguous rows of float32; in one go if they are contiguous themselves."""
    make_inline()
    n = count if step == classes else 1
    for i in range(0, count, n):
        widen(part(x, start + i * step, n * classes), is_half, part(lines, i * classes, n * classes))


@inner
def _narrow(lines, count, classes, is_half, out, start, step):
    """The reverse of `_widen`."""
    make_inline()
    n = count if step == classes else 1
    for i in range(0, count, n):
        narrow(part(lines, i * classes, n * classes), is_half, part(out, start + i * step, n * classes))


@inlined
def rows(call):
    """See `loops`; `call` is a `build.Call`."""
    make_compact()
    told, count, x, label, per_row, q, answers, out, workspace = call
    job, classes, is_half, width = told.job, told.classes, told.is_half != 0, told.width
    x_row, out_row, softcap = told.x_outer, told.out_outer, told.softcap
    if job & CHECK and kept_labels(label, classes, 0, False) < 0:
        return -1.0
    size = per_row.itemsize
    numbers = numbers_in(workspace, 0, (3 * classes + KINDS) * width, per_row)
    after = numbers.shape[0] * size
    sums = doubles_in(workspace, after, width, per_row)
    places = places_in(workspace, after + 8 * width, 2 * width, per_row)
    tile = Tile(part(numbers, 0, classes * width), classes, LANES, classes)
    slopes = part(numbers, classes * width, classes * width if softcap > 0 else 0)
    lines = part(numbers, 2 * classes * width, classes * width)  # a tile in the layout of the logits
    state = State(
        part(numbers, 3 * classes * width, KINDS * width), width, part(places, 0, width), part(places, width, width),
        part(numbers, 0, 0), sums,
    )  # fmt: skip
    uniform = q[0] if q.shape[0] else per_row.dtype.type(0)
    is_plain, is_streamed = job & PLAIN != 0, job & STREAM != 0
    exceptions = ALL if uniform > 0 or softcap > 0 else TWO if classes <= FEW else NONE
    soon = part(out, 0, 0 if is_streamed else out.shape[0])
    # 16-bit rows are converted in `lines`, and streamed rows are gathered there; all others are accessed in place.
    x_step = classes if x.itemsize == 2 else x_row
    is_staged = is_streamed or out.itemsize == 2
    out_step = classes if is_staged else out_row
    # Each class of 16 rows prefetches one line of the next tile's logits and one of this tile's output.
    for first in range(0, count, width):
        here, start, to = min(width, count - first), first * x_row, first * out_row
        _widen(x, start, x_row, here, classes, is_half, lines)
        if is_plain:
            take_labels(state, part(label, first, here), told.ignore_index, job & IGNORE != 0)
        else:
            prepare(told, state, label, per_row, first, here, first == 0)
        read_rows(numbers_of(part(x, start, classes), lines), x_step, here, tile, state)
        if softcap > 0:
            for lane in range(0, here, LANES):
                cap(tile, slopes, softcap, lane)
                find_max(tile, 0, classes, state, lane)
        if uniform > 0:
            add_half_gaps(tile, state, here, uniform)
        if not is_plain:
            after_max(told, tile, state, label, uniform, answers, first, here)
        elif classes > FEW:
            look_up(tile, state.label, part(state.numbers, AT_LABEL * width, here), here)
        following = (first + width if first + width < count else first) * x_row
        ahead = Ahead(Lines(x, following, LANES), x_row, Lines(soon, to, LANES), out_row)
        add_exps(tile, state, here, ahead)
        if is_plain:
            finish_plain(state, here, per_row[SCALE], job & GRAD != 0)
            copy(part(answers, first, here), (part(state.numbers, ROW_LOSS * width, here),))
        else:
            after_sums(told, state, uniform, answers, first, here)
        if job & GRAD:
            if exceptions == NONE:
                find_exceptions(tile, state, here)
            into = lines if is_staged else numbers_of(part(out, to, classes), lines)
            write_rows(tile, slopes, state, into, out_step, here, exceptions)
            if exceptions == NONE:
                put_exceptions(state, is_half, Lines(into, 0, 1), out_step, here)
            if is_streamed:
                stream(part(lines, 0, here * classes), numbers_of(part(out, to, here * classes), lines))
            _narrow(lines, here, classes, is_half, out, to, out_row)
    if is_streamed:
        fence()
    return total_of(part(answers, 0, count)) if job & SUM else 0.0
