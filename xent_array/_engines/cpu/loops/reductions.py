"""Reductions over a row whose classes are contiguous: sums, the first maximum, exponentials and their sum.

A sum runs over chunks of 512 elements: each chunk is added into 32 partial sums, which are folded in halves, and the
chunk totals are added in float64. All loops add in the same order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

from . import PARTIAL
from .elementwise import Operand, loaded
from .math import exp
from .simd import (
    DOUBLE,
    INT32,
    INT64,
    LINE,
    Array,
    Value,
    Variable,
    constant,
    counting,
    first_set_bit,
    fma,
    loop,
    on_stack,
    prefetch,
    search,
    smaller,
    when,
    where,
)

CHUNK = 512  # elements summed in the dtype of the arithmetic; chunk totals are summed in float64


class _Partial:
    """The 32 partial results of a chunk: sums, or candidates for the maximum."""

    def __init__(self, element: Any, initial: float) -> None:
        self.numbers = on_stack(element, PARTIAL)
        self.lanes = self.numbers.line  # wider vectors would need more registers than there are
        for k in range(0, PARTIAL, self.lanes):
            self.numbers.store(constant(initial, element, self.lanes), k)

    def add_groups(self, start: Value, stop: Value, work: Callable[[Value, Value, int], Value]) -> Value:
        """Run ``partial = work(partial, place, lanes)`` over whole groups, vector by vector; return where they end."""
        whole = (stop - start) & -PARTIAL
        for group in loop(0, whole, PARTIAL):
            for k in range(0, PARTIAL, self.lanes):
                place = (start + group) + k
                self.numbers.store(work(self.numbers.load(k, self.lanes), place, self.lanes), k)
        return start + whole

    def folded(self, combine: Callable[[Value, Value], Value]) -> Value:
        """All partial results combined into one: the upper half with the lower half, repeatedly."""
        parts = [self.numbers.load(k, self.lanes) for k in range(0, PARTIAL, self.lanes)]
        while len(parts) > 1:
            half = len(parts) // 2
            parts = [combine(low, high) for low, high in zip(parts[:half], parts[half:], strict=True)]
        (result,), count = parts, self.lanes
        while count > 1:
            count //= 2
            result = combine(*(result.shuffled(result, [*range(k, k + count)]) for k in (0, count)))
        return result.lane(0)


def _chunks(count: Value) -> Iterator[tuple[Value, Value]]:
    """A loop over chunks, with the start and stop of each."""
    for start in loop(0, count, CHUNK):
        yield start, smaller(start + CHUNK, count)


def _pieces(lanes: int, start: Value, count: Value) -> Iterator[tuple[int, Value, Value]]:
    """The vectors of an incomplete group: index in the group, index in the row, number of elements left."""
    for k in range(0, PARTIAL, lanes):
        yield k, start + k, count - k


def _sum(one: Value, two: Value) -> Value:
    return one + two


class _Total:
    """A sum in float64."""

    def __init__(self) -> None:
        self.held = Variable(constant(0, DOUBLE))

    def add(self, number: Value) -> None:
        self.held.set(self.held.get() + number.to(DOUBLE))


def _summed(term: Callable[..., Value]) -> Callable[..., Value]:
    def summed(row: Array, *operands: Operand) -> Value:
        """The sum of ``term(*operands)`` over a row: within chunks in the dtype of the row, across them in float64."""
        total = _Total()

        def work(partial: Value, place: Value, lanes: int) -> Value:
            return partial + term(*(loaded(operand, place, lanes, row.element) for operand in operands))

        for start, stop in _chunks(row.length):
            partial = _Partial(row.element, 0)
            rest = partial.add_groups(start, stop, work)
            for place in loop(rest, stop):
                partial.numbers.store(work(partial.numbers.load(place - rest), place, 1), place - rest)
            total.add(partial.folded(_sum))
        return total.held.get()

    return summed


def half_gap(a: Value, half_m: Value, x: Value) -> Value:
    """a·(m - x)/2, with 0·inf = 0. Half of it, because m - x itself may overflow.

    NaN counts as 0 too, because it also shows up in the mass or in the softmax.
    """
    product = a * fma(x, x.like(-0.5), half_m)
    return where(product == product, product, 0)


sum_of = _summed(lambda a: a)
sum_of_half_gaps = _summed(half_gap)


def larger(one: Value, two: Value) -> Value:
    """The larger of the two; the second if either is NaN."""
    return where(two < one, one, two)


def argmax(x: Array) -> Value:
    """The index of the first maximum, ignoring NaN; 0 if every element is NaN or -inf."""
    lanes = x.line
    largest, chunk = Variable(constant(-math.inf, x.element)), Variable(constant(0))
    for start, stop in _chunks(x.length):
        partial = _Partial(x.element, -math.inf)
        rest = partial.add_groups(start, stop, lambda partial, place, lanes: larger(x.load(place, lanes), partial))
        left = stop - rest
        with when(left > 0):
            for k, place, some in _pieces(lanes, rest, left):
                before = partial.numbers.load(k, lanes)
                partial.numbers.store(larger(x.load_first(some, place, before), before), k)
        here = partial.folded(lambda low, high: larger(high, low))
        with when(here > largest.get()):
            largest.set(here)
            chunk.set(start)
    found_at, wanted = Variable(constant(-1)), largest.get().repeated(lanes)
    start = chunk.get()
    inside = smaller(start + CHUNK, x.length) - start

    def matches(group: list[Value]) -> Value:
        """A bit mask of the elements of a group that equal the maximum."""
        found = constant(0)
        for k, numbers in zip(range(0, PARTIAL, lanes), group, strict=True):
            found = found | (numbers == wanted).packed().unsigned_to(INT64) << k
        return found

    groups = inside // PARTIAL
    rest = start + groups * PARTIAL
    for group, stop_search in search(groups):
        here = start + group * PARTIAL
        found = matches([x.load(here + k, lanes) for k in range(0, PARTIAL, lanes)])
        with when(found != 0):
            found_at.set(here + first_set_bit(found))
            stop_search()
    with when(found_at.get() < 0):
        nan = constant(math.nan, x.element, lanes)
        pieces = _pieces(lanes, rest, inside % PARTIAL)
        found = matches([x.load_first(some, here, nan) for _, here, some in pieces])
        found_at.set(where(found != 0, rest + first_set_bit(found), 0))
    return found_at.get()


def exps(x: Array, m: Value, at: Value, e: Array, following: Array, out: Array) -> Value:
    """Store exp(x - m) in `e`, which may be `x`, but 0 at index `at` unless that is negative; return the sum.

    Along the way, prefetch as much of `following`, which is read next, and of `out`, which is written soon.
    """
    lanes, total = x.line, _Total()
    index, largest = INT64 if x.size == 8 else INT32, m.repeated(lanes)
    to_read = following.address()
    to_write = where(out.length != 0, out.address(), to_read)

    def exp_but_one(numbers: Value, place: Value) -> Value:
        is_it = counting(index, lanes) == (at - place).to(index).repeated(lanes)
        return where(is_it, 0, exp(numbers - largest))

    def work(partial: Value, place: Value, lanes: int) -> Value:
        for address, size, will_be in ((to_read, following.size, "read"), (to_write, out.size, "written")):
            for k in range(0, lanes * size, LINE):
                prefetch(address, place * size + k, will_be)
        value = exp_but_one(x.load(place, lanes), place)
        e.store(value, place)
        return partial + value

    for start, stop in _chunks(e.length):
        partial = _Partial(x.element, 0)
        rest = partial.add_groups(start, stop, work)
        left = stop - rest
        with when(left > 0):
            for k, place, some in _pieces(lanes, rest, left):
                value = exp_but_one(x.load_first(some, place, constant(-math.inf, x.element, lanes)), place)
                e.store_first(some, value, place)
                partial.numbers.store(partial.numbers.load(k, lanes) + value, k)
        total.add(partial.folded(_sum))
    return total.held.get()
