"""Square blocks of rows, transposed in registers: how 16 rows of few classes become a vector for each class, and back.

The side of a square is 128 bits, so that a line of it is one load or store. Rows of fewer classes have no square; they
are taken as they lie in memory, one after another.
"""

from __future__ import annotations

from collections.abc import Iterator

from . import LANES
from .simd import Array, Value, loop, smaller


def side_of(lines: Array) -> int:
    """The side of a square block, in elements."""
    return 16 // lines.size


def squares(classes: Value, side: int) -> Iterator[Value]:
    """A loop over the first class of each square; the last square may overlap the one before it."""
    last = classes - side
    for c in loop(0, classes, side):
        yield smaller(c, last)


def load_square(lines: Array, row: Value, step: Value, c: Value) -> list[Value]:
    """The classes of a square, beginning with c, of the 16 rows from `row` on, which are `step` apart."""
    side, found = side_of(lines), []
    for first in range(0, LANES, 2 * side):
        read = [lines.load(_place(row, step, c, first + k), side) for k in range(2 * side)]
        found.append(_transposed([read[k].shuffled(read[k + side], [*range(2 * side)]) for k in range(side)]))
    while len(found) > 1:
        lanes = [*range(2 * found[0][0].lanes)]
        pairs = zip(found[::2], found[1::2], strict=True)
        found = [[one.shuffled(two, lanes) for one, two in zip(*pair, strict=True)] for pair in pairs]
    return found[0]


def store_square(vectors: list[Value], lines: Array, row: Value, step: Value, c: Value) -> None:
    """The reverse of `load_square`."""
    side = len(vectors)
    for first in range(0, LANES, 2 * side):
        parts = [vector.shuffled(vector, [*range(first, first + 2 * side)]) for vector in vectors]
        for k, pair in enumerate(_transposed(parts)):
            pair = pair.opaque()  # LLVM would otherwise shuffle each half apart
            for half in (0, side):
                line = pair.shuffled(pair, [*range(half, half + side)])
                lines.store(line, _place(row, step, c, first + k + half))


def _place(row: Value, step: Value, c: Value, k: int) -> Value:
    """Where class c of the k-th of 16 rows is, as a sum of which most is the same for many rows and classes."""
    return ((row * step + c) + step * (k & -4)) + step * (k & 3)


def _transposed(vectors: list[Value]) -> list[Value]:
    """Two squares at once, one in each half of the vectors, each transposed separately."""
    side, half = len(vectors), len(vectors) // 2
    mixed = [k + other for k in range(half) for other in (0, 2 * side)]  # interleaves the lower halves of two vectors
    low = mixed + [k + side for k in mixed]
    for _ in range(side.bit_length() - 1):
        pairs = zip(vectors[:half], vectors[half:], strict=True)
        vectors = [one.shuffled(two, [k + upper for k in low]) for one, two in pairs for upper in (0, half)]
    return vectors


def deinterleaved(vectors: list[Value]) -> list[Value]:
    """A vector for each class from 16 rows as they lie in memory, in as many vectors as there are classes."""
    classes = len(vectors)
    return [_picked(vectors, [divmod(k * classes + c, LANES) for k in range(LANES)]) for c in range(classes)]


def interleaved(vectors: list[Value]) -> list[Value]:
    """The reverse of `deinterleaved`."""
    classes = len(vectors)
    places = [[divmod(k * LANES + j, classes) for j in range(LANES)] for k in range(classes)]
    return [_picked(vectors, [(c, lane) for lane, c in part]) for part in places]


def _picked(vectors: list[Value], picks: list[tuple[int, int]]) -> Value:
    """A vector of lanes picked from several vectors, each given as (vector, lane)."""
    found, *others = vectors
    found = found.shuffled(found, [lane for _, lane in picks])
    for number, vector in enumerate(others, start=1):
        order = [LANES + lane if which == number else k for k, (which, lane) in enumerate(picks)]
        found = found.shuffled(vector, order)
    return found
