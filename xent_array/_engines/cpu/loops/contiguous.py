"""Rows whose classes are contiguous, one row at a time.

The loop reads a row once to find its maximum and again, from cache, to compute the exponentials. It stores these where
the gradient goes, and then overwrites them with the gradient. A sum runs over chunks of 512 elements: each chunk is
added into 32 partial sums, which are folded in halves, and the chunk totals are added in float64. The other loops add
in the same order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from . import CHECK, FACTOR, GRAD, IGNORE, KNOWN, LOG, LOSS, ON_LABEL, PARTIAL, SCALE, STATS, STREAM, SUM
from .elementwise import (
    fill,
    kept_labels,
    logarithms,
    multiply,
    narrow,
    numbers_of,
    scale,
    softcap,
    stream,
    subtract_product,
    total_of,
    widen,
)
from .jit import inner
from .math import at_max, exp, finish
from .simd import (
    DOUBLE,
    INT32,
    INT64,
    LINE,
    Array,
    Four,
    Index,
    Number,
    Operands,
    Real,
    Value,
    Variable,
    constant,
    counting,
    fence,
    first_set_bit,
    fma,
    loop,
    make_compact,
    make_inline,
    numbers_in,
    on_stack,
    operation,
    part,
    prefetch,
    search,
    smaller,
    when,
    where,
)

CHUNK = 512  # elements summed in the dtype of the arithmetic; chunk totals are summed in float64

# Reductions over a row, in chunks of 512 elements and groups of 32


class _Partial:
    """The 32 partial results of a chunk: sums, or candidates for the maximum."""

    def __init__(self, dtype: Any, initial: float) -> None:
        self.numbers = on_stack(dtype, PARTIAL)
        self.lanes = self.numbers.line  # wider vectors would need more registers than there are
        for k in range(0, PARTIAL, self.lanes):
            self.numbers.store(constant(initial, self.numbers.element, self.lanes), k)

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


def _summed(term: Callable[..., Value]) -> Any:
    @operation
    def summed(row: Array, operands: Operands) -> Real:
        """The sum of ``term(*operands)`` over a row: within chunks in the dtype of the row, across them in float64."""
        total = _Total()

        def work(partial: Value, place: Value, lanes: int) -> Value:
            return partial + term(*operands.load(row.dtype, place, lanes))

        for start, stop in _chunks(row.length):
            partial = _Partial(row.dtype, 0)
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


def _larger(one: Value, two: Value) -> Value:
    """The larger of the two; the second if either is NaN."""
    return where(two < one, one, two)


@operation
def argmax(x: Array) -> Index:
    """The index of the first maximum, ignoring NaN; 0 if every element is NaN or -inf."""
    lanes = x.line
    largest, chunk = Variable(constant(-math.inf, x.element)), Variable(constant(0))
    for start, stop in _chunks(x.length):
        partial = _Partial(x.dtype, -math.inf)
        rest = partial.add_groups(start, stop, lambda partial, place, lanes: _larger(x.load(place, lanes), partial))
        left = stop - rest
        with when(left > 0):
            for k, place, some in _pieces(lanes, rest, left):
                before = partial.numbers.load(k, lanes)
                partial.numbers.store(_larger(x.load_first(some, place, before), before), k)
        here = partial.folded(lambda low, high: _larger(high, low))
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


@operation
def exps(x: Array, m: Number, at: Index, e: Array, following: Array, out: Array) -> Real:
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
        partial = _Partial(x.dtype, 0)
        rest = partial.add_groups(start, stop, work)
        left = stop - rest
        with when(left > 0):
            for k, place, some in _pieces(lanes, rest, left):
                value = exp_but_one(x.load_first(some, place, constant(-math.inf, x.element, lanes)), place)
                e.store_first(some, value, place)
                partial.numbers.store(partial.numbers.load(k, lanes) + value, k)
        total.add(partial.folded(_sum))
    return total.held.get()


# One row


@operation
def finish_row(
    m: Number, r: Number, gap: Number, mass: Number, a: Number, factor: Number, scale: Number, z: Real
) -> Four:
    """The row's loss, the factor of exp(x - max) in its gradient, the gradient at the maximum, and log(1 + r).

    a is the target at the maximum.
    """
    is_rough = m.is_single
    m, r, gap, mass, a, factor, scale = (value.to(DOUBLE) for value in (m, r, gap, mass, a, factor, scale))
    r = r.with_one_nan()
    loss, tail, p, coef, more = finish(m, r, gap, mass, factor, z, is_rough)
    return loss, scale * coef * p, scale * at_max(r, p, mass, coef, more, a), tail


class _Target(NamedTuple):
    """The target of a row: `on_label` at class `y`, plus `q`; or the distribution `q` alone."""

    y: Any
    on_label: Any
    q: Any
    is_distribution: Any


@inner
def largest_without_softmax(x, step):
    """The maximum that the stats report for a row without a softmax: NaN if it holds one, else inf or -inf."""
    make_compact()
    largest = -np.inf
    for k in range(0, x.shape[0], step):
        if x[k] != x[k]:
            return np.nan
        if x[k] > largest:
            largest = x[k]
    return largest


@inner
def _gap_and_mass(row, m, target, has_labels):
    make_inline()
    kind = row.dtype.type
    q, half = target.q, kind(0.5) * m
    if target.is_distribution:
        gap = kind(2 * sum_of_half_gaps(row, (q, half, row)))
        mass = kind(sum_of(row, (q,)))
    elif target.y >= 0:
        mass, below = target.on_label, half - kind(0.5) * row[target.y]
        gap = kind(2) * (mass * below) if mass != 0 and below != 0 else kind(0)
        if q.shape[0] > 1:
            gap = kind(gap + 2 * sum_of_half_gaps(row, (q, half, row)))
            mass = kind(mass + sum_of(row, (q,)))
        elif q.shape[0]:
            gap = kind(gap + 2 * sum_of_half_gaps(row, (q[0], half, row)))
            mass = kind(float(mass) + float(q[0]) * row.shape[0])
    else:
        gap, mass = kind(0), kind(0 if has_labels else 1)
    return gap if gap == gap else kind(np.nan), mass


@inner
def _target_at(at, target):
    """The target at index `at`; 0 if that is negative."""
    make_inline()
    q = target.q
    a = target.on_label if target.y == at else q.dtype.type(0)
    if at >= 0 and target.is_distribution:
        a = q[at]
    elif at >= 0 and target.y >= 0 and q.shape[0]:
        a += q[at if q.shape[0] > 1 else 0]
    return a


@inner
def _gradient(g, by, top, at, s, target):
    """Replace exp(x - max) by the gradient s·[coef·p - a]; `by` is s·coef·p at the maximum, `top` goes to `at`."""
    make_inline()
    q = target.q
    scale(g, (g, g.dtype.type(by) + g.dtype.type(0)))
    if target.is_distribution:
        subtract_product(g, (g, q, s))
    elif target.y >= 0:
        g[target.y] -= s * target.on_label
        if q.shape[0] > 1:
            subtract_product(g, (g, q, s))
        elif q.shape[0]:
            subtract_product(g, (g, q[0], s))
    if at >= 0:
        g[at] = top


@inner
def _gradient_before_scale(g, by, top, at, target):
    """Replace exp(x - max) by coef·p - a, for a row that must be scaled last because s·coef may overflow."""
    make_compact()
    q = target.q
    has_q = q.shape[0] and (target.y >= 0 or target.is_distribution)
    for k in range(g.shape[0]):
        value = g[k] * by if g[k] != 0 or by != by else g[k]
        if has_q:
            value -= q[k if q.shape[0] > 1 else 0]
        g[k] = value - target.on_label if k == target.y else value
    if at >= 0:
        g[at] = top


@inner
def rows(call):
    """See `loops`; `call` is a `build.Call`."""
    make_compact()
    told, count, x, label, per_row, q, answers, out, workspace = call
    job, classes, is_half = told.job, told.classes, told.is_half != 0
    x_row, out_row, q_row, cap, z = told.x_outer, told.out_outer, told.q_row, told.softcap, told.z_loss
    if job & CHECK and kept_labels(label, classes, 0, False) < 0:
        return -1.0
    kind, has_labels = per_row.dtype.type, label.shape[0] > 0
    room = numbers_in(workspace, 0, 3 * classes, per_row)
    wide, e, slope = part(room, 0, classes), part(room, classes, classes), part(room, 2 * classes, classes)
    is_streamed, n = job & STREAM != 0, per_row.shape[0] // 3
    for i in range(count):
        k = i if n > 1 else 0
        factor, s = per_row[FACTOR * n + k], per_row[SCALE * n + k]
        y = label[i] if has_labels else -1
        if job & IGNORE and y == told.ignore_index:
            y, factor, s = -1, kind(0), kind(0)
        on_label = per_row[ON_LABEL * n + k] if y >= 0 else kind(0)
        q_of_row = q if has_labels else part(q, i * q_row, classes if q.shape[0] else 0)
        target = _Target(y, on_label, q_of_row, q.shape[0] > 0 and not has_labels)
        widen(part(x, i * x_row, classes), is_half, wide)
        row = numbers_of(part(x, i * x_row, classes), wide)
        of_row = part(out, i * out_row, classes)
        g = numbers_of(of_row, e) if job & (GRAD | LOG) and not is_streamed else e
        label_is_largest = y == argmax(row) if job & STATS and cap > 0 else False
        if cap > 0:
            softcap(row, cap, wide, slope)
            row = wide
        at = argmax(row)
        m = row[at]
        if not cap > 0:
            label_is_largest = y == at
        # To prefetch: the next row, and the part of the output that is written one chunk from now.
        following = part(x, (i + 1 if i + 1 < count else i) * x_row, classes)
        soon = part(out, i * out_row + CHUNK, 0 if is_streamed else out.shape[0])
        if job & KNOWN:
            m, r, gap, mass = answers[count + i], answers[2 * count + i], answers[3 * count + i], answers[4 * count + i]
            if row[at] != m:
                at = -1
            if job & GRAD:
                exps(row, m if m - m == 0 else kind(0), at, g, following, soon)
        else:
            gap, mass = _gap_and_mass(row, m, target, has_labels)
            r = kind(exps(row, m, at, g, following, soon) if m - m == 0 else np.nan)
            if r != r:
                m = kind(largest_without_softmax(row, 1))
                r = m - m if m != m else kind(0)
            if job & STATS:
                answers[count + i], answers[2 * count + i] = m, r
                answers[3 * count + i], answers[4 * count + i] = gap, mass
                answers[5 * count + i] = label_is_largest
        a = _target_at(at, target)
        rest = r if m - m == 0 else kind(np.nan)
        loss, by, top, tail = finish_row(m, rest, gap, mass, a, factor, s, z)
        if job & LOSS:
            answers[i] = loss
        if job & LOG:
            logarithms(g, (row, m, tail))
            narrow(g, is_half, of_row)
        if job & GRAD:
            if s == 0:
                fill(g, (0,))
            elif abs(s) == np.inf or abs(s * mass) == np.inf or abs(kind(by)) == np.inf:
                _, by, top, _ = finish_row(m, rest, gap, mass, a, s, kind(1), z)
                _gradient_before_scale(g, kind(by), kind(top), at, target)
                if cap > 0:
                    multiply(g, (g, slope))
                multiply(g, (g, s))
            else:
                _gradient(g, by, kind(top), at, s, target)
                if cap > 0:
                    multiply(g, (g, slope))
            if is_streamed:
                stream(e, numbers_of(of_row, wide))
            else:
                narrow(g, is_half, of_row)
    if is_streamed:
        fence()
    return total_of(part(answers, 0, count)) if job & SUM else 0.0
