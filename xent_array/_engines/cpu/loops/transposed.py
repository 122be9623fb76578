"""Contiguous rows of few classes, transposed tile by tile, so that each row occupies one vector lane.

A tile fits the L1 cache. It is read in square blocks with sides of 128 bits, which are transposed in registers, and the
gradient is written back the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from . import CHECK, GRAD, KINDS, LANES, PARTIAL, STREAM, SUM
from .contiguous import CHUNK
from .elementwise import kept_labels, narrow, numbers_of, stream, total_of, widen
from .jit import inner
from .simd import (
    Array,
    Flag,
    Index,
    Value,
    constant,
    doubles_in,
    either,
    fence,
    loop,
    make_compact,
    numbers_in,
    operation,
    part,
    places_in,
    smaller,
    when,
    where,
)
from .tiles import (
    FEW,
    Gradient,
    Lines,
    State,
    Tile,
    after_max,
    after_sums,
    cap,
    exps,
    find_exceptions,
    find_max,
    fold_partial,
    prepare,
    put_exceptions,
)


def _side(lines: Array) -> int:
    """The side of a square block, in elements."""
    return 16 // lines.size


def _blocks(first: Value, count: Value, classes: Value, side: int) -> Iterator[tuple[Value, int]]:
    """A loop over blocks of rows, two squares high, and a loop over the remaining rows; emits the body twice."""
    whole = where(classes < side, first, count & -2 * side)
    for start, stop, rows in ((first, whole, 2 * side), (whole, count, 1)):
        for row in loop(start, stop, rows):
            yield row, rows


def _squares(classes: Value, side: int) -> Iterator[Value]:
    """A loop over the first class of each square; the last square may overlap the one before it."""
    last = classes - side
    for c in loop(0, classes, side):
        yield smaller(c, last)


def _transposed(vectors: list[Value]) -> list[Value]:
    """Two squares at once, one in each half of the vectors, each transposed separately."""
    side, half = len(vectors), len(vectors) // 2
    mixed = [k + other for k in range(half) for other in (0, 2 * side)]  # interleaves the lower halves of two vectors
    low = mixed + [k + side for k in mixed]
    for _ in range(side.bit_length() - 1):
        pairs = zip(vectors[:half], vectors[half:], strict=True)
        vectors = [one.shuffled(two, [k + upper for k in low]) for one, two in pairs for upper in (0, half)]
    return vectors


def _narrow_blocks(count: Value, classes: Value, step: Value, side: int) -> Iterator[tuple[int, Value]]:
    """A loop over blocks of 16 rows with too few classes for a square; emits the body for each number of them."""
    for number in range(1, side):
        with when((classes == number) & (step == number)):
            for row in loop(0, count & -LANES, LANES):
                yield number, row


def _after_narrow_blocks(count: Value, classes: Value, step: Value, side: int) -> Value:
    return where((classes < side) & (step == classes), count & -LANES, 0)


def _picked(vectors: list[Value], picks: list[tuple[int, int]]) -> Value:
    """A vector of lanes picked from several vectors, each given as (vector, lane)."""
    found, *others = vectors
    found = found.shuffled(found, [lane for _, lane in picks])
    for number, vector in enumerate(others, start=1):
        order = [LANES + lane if which == number else k for k, (which, lane) in enumerate(picks)]
        found = found.shuffled(vector, order)
    return found


@operation
def transpose(lines: Array, step: Index, count: Index, tile: Tile) -> None:
    """Read `count` rows, `step` apart, into the tile."""
    side = _side(lines)
    for number, row in _narrow_blocks(count, tile.classes, step, side):
        read = [lines.load(row * number + k * LANES, LANES) for k in range(number)]
        for number_of_class in range(number):
            numbers = _picked(read, [divmod(k * number + number_of_class, LANES) for k in range(LANES)])
            tile.numbers.store(numbers, tile.place(row, constant(number_of_class)))
    for row, rows in _blocks(_after_narrow_blocks(count, tile.classes, step, side), count, tile.classes, side):
        if rows == 1:
            for c in loop(tile.classes):
                tile.numbers.store(lines.load(row * step + c), tile.place(row, c))
            continue
        for c in _squares(tile.classes, side):
            read = [lines.load((row + k) * step + c, side) for k in range(rows)]
            pairs = [read[k].shuffled(read[k + side], [*range(rows)]) for k in range(side)]
            for k, numbers in enumerate(_transposed(pairs)):
                tile.numbers.store(numbers, tile.place(row, c + k))


@operation
def transpose_back(
    tile: Tile, slopes: Array, state: State, lines: Array, step: Index, count: Index, exceptions: Flag
) -> None:
    """Write the gradient of `count` rows of the tile to rows `step` apart; see `Gradient`."""
    with either(exceptions) as branches:
        for branch, with_exceptions in zip(branches, (True, False), strict=True):
            with branch:
                _put_back(
                    partial(Gradient, tile, slopes, state, exceptions=with_exceptions), lines, step, count, tile.classes
                )


def _put_back(
    gradient_of: Callable[[Value, int], Gradient], lines: Array, step: Value, count: Value, classes: Value
) -> None:
    side = _side(lines)
    for number, row in _narrow_blocks(count, classes, step, side):
        gradient = gradient_of(row, LANES)
        made = [gradient.of(constant(c)) for c in range(number)]
        for k in range(number):
            places = [divmod(k * LANES + j, number) for j in range(LANES)]
            lines.store(_picked(made, [(c, lane) for lane, c in places]), row * number + k * LANES)
    for row, rows in _blocks(_after_narrow_blocks(count, classes, step, side), count, classes, side):
        gradient = gradient_of(row, rows)
        if rows == 1:
            for c in loop(classes):
                lines.store(gradient.of(c), row * step + c)
            continue
        for c in _squares(classes, side):
            for k, pair in enumerate(_transposed([gradient.of(c + j) for j in range(side)])):
                for half in (0, side):
                    lines.store(pair.shuffled(pair, [*range(half, half + side)]), (row + k + half) * step + c)


@inner
def _widen(x, start, step, count, classes, is_half, lines):
    """Convert 16-bit rows, `step` apart, to contiguous rows of float32; in one go if they are contiguous themselves."""
    make_compact()
    n = count if step == classes else 1
    for i in range(0, count, n):
        widen(part(x, start + i * step, n * classes), is_half, part(lines, i * classes, n * classes))


@inner
def _narrow(lines, count, classes, is_half, out, start, step):
    """The reverse of `_widen`."""
    make_compact()
    n = count if step == classes else 1
    for i in range(0, count, n):
        narrow(part(lines, i * classes, n * classes), is_half, part(out, start + i * step, n * classes))


@inner
def rows(call):
    """See `loops`; `call` is a `build.Call`."""
    make_compact()
    told, count, x, label, per_row, q, answers, out, workspace = call
    job, classes, is_half, width = told.job, told.classes, told.is_half != 0, told.width
    x_row, out_row, softcap = told.x_outer, told.out_outer, told.softcap
    if job & CHECK and kept_labels(label, classes, 0, False) < 0:
        return -1.0
    size = per_row.itemsize
    numbers = numbers_in(workspace, 0, (3 * classes + KINDS + PARTIAL) * width, per_row)
    after = numbers.shape[0] * size
    sums = doubles_in(workspace, after, width, per_row)
    places = places_in(workspace, after + 8 * width, 2 * width, per_row)
    tile = Tile(part(numbers, 0, classes * width), classes, LANES, classes)
    slopes = part(numbers, classes * width, classes * width if softcap > 0 else 0)
    lines = part(numbers, 2 * classes * width, classes * width)  # a tile in the layout of the logits
    state = State(
        part(numbers, 3 * classes * width, KINDS * width), width, part(places, 0, width), part(places, width, width),
        part(numbers, (3 * classes + KINDS) * width, PARTIAL * width), sums,
    )  # fmt: skip
    uniform = q[0] if q.shape[0] else per_row.dtype.type(0)
    has_exceptions, is_streamed = classes <= FEW or uniform > 0 or softcap > 0, job & STREAM != 0
    soon = part(out, 0, 0 if is_streamed else out.shape[0])
    # 16-bit rows are converted in `lines`, and streamed rows are gathered there; all others are accessed in place.
    x_step = classes if x.itemsize == 2 else x_row
    is_staged = is_streamed or out.itemsize == 2
    out_step = classes if is_staged else out_row
    for first in range(0, count, width):
        here, start, to = min(width, count - first), first * x_row, first * out_row
        _widen(x, start, x_row, here, classes, is_half, lines)
        transpose(numbers_of(part(x, start, classes), lines), x_step, here, tile)
        prepare(told, state, label, per_row, first, here, first == 0)
        for lane in range(0, here, LANES):
            if softcap > 0:
                cap(tile, slopes, softcap, lane)
            find_max(tile, 0, classes, state, lane)
        after_max(told, tile, state, label, uniform, answers, first, here)
        # Each class of 16 rows prefetches one line of the next tile's logits and one of this tile's output.
        following = (first + width if first + width < count else first) * x_row
        for c in range(0, classes, CHUNK):
            stop = min(c + CHUNK, classes)
            for lane in range(0, here, LANES):
                read, written = following + lane * x_row + c * LANES, to + lane * out_row + c * LANES
                exps(tile, c, stop, state, lane, job & GRAD != 0, Lines(x, read, LANES), Lines(soon, written, LANES))
            for lane in range(0, here, LANES):
                fold_partial(state, stop - c, lane, c == 0)
        after_sums(told, state, uniform, answers, first, here)
        if job & GRAD:
            if not has_exceptions:
                find_exceptions(tile, state, here)
            into = lines if is_staged else numbers_of(part(out, to, classes), lines)
            transpose_back(tile, slopes, state, into, out_step, here, has_exceptions)
            if not has_exceptions:
                put_exceptions(state, is_half, Lines(into, 0, 1), out_step, here)
            if is_streamed:
                stream(part(lines, 0, here * classes), numbers_of(part(out, to, here * classes), lines))
            _narrow(lines, here, classes, is_half, out, to, out_row)
    if is_streamed:
        fence()
    return total_of(part(answers, 0, count)) if job & SUM else 0.0
