"""Rows whose classes are contiguous, one row at a time.

The loop reads a row once to find its maximum and again, from cache, to compute the exponentials. It stores these where
the gradient goes, and then overwrites them with the gradient.
"""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

from . import FACTOR, GRAD, HIT, IGNORE, KNOWN, LOG, LOSS, NO_LABEL, ON_LABEL, SCALE, STATS, STATS_KINDS, STREAM
from .call import Call
from .elementwise import (
    fill,
    logarithms,
    multiply,
    narrow,
    numbers_of,
    scale,
    softcap,
    stream,
    subtract_product,
    widen,
)
from .math import at_max, finish
from .reductions import CHUNK, argmax, exps, larger, sum_of, sum_of_half_gaps
from .simd import BIT, DOUBLE, Array, Value, Variable, constant, either, loop, make_compact, when, where


def finish_row(
    m: Value, r: Value, gap: Value, mass: Value, a: Value, factor: Value, scale: Value, z: Value
) -> tuple[Value, Value, Value, Value]:
    """The row's loss, the factor of exp(x - max) in its gradient, the gradient at the maximum, and log(1 + r).

    a is the target at the maximum. The results are in float64.
    """
    is_rough = m.is_single
    m, r, gap, mass, a, factor, scale = (value.to(DOUBLE) for value in (m, r, gap, mass, a, factor, scale))
    r = r.with_one_nan()
    loss, tail, p, coef, more = finish(m, r, gap, mass, factor, z, is_rough)
    return loss, scale * coef * p, scale * at_max(r, p, mass, coef, more, a), tail


def is_finite(number: Value) -> Value:
    return (number - number) == 0


def is_infinite(number: Value) -> Value:
    return (number == math.inf) | (number == -math.inf)


def largest_without_softmax(row: Array, step: Value | int) -> Value:
    """The maximum that the stats report for a row without a softmax: NaN if the row holds NaN, else inf or -inf."""
    largest = Variable(constant(-math.inf, row.element))
    nothing = Variable(constant(0, row.element))  # or NaN
    for k in loop(row.length):
        number = row.load(k * step)
        largest.set(larger(number, largest.get()))
        nothing.set(where(number == number, nothing.get(), number))
    return where(nothing.get() == 0, largest.get(), math.nan)


class _Target(NamedTuple):
    """The target of a row: `on_label` at class `y`, plus `q`; or the distribution `q` alone."""

    y: Value  # or NO_LABEL, or ELSEWHERE
    on_label: Value  # 0 in these cases
    q: Array  # a number for each class, one for all of them, or none
    is_distribution: Value
    mass: Value  # that of all but `q`; 1 if there is no target at all

    @property
    def has_q(self) -> Value:
        return (self.q.length != 0) & (self.is_distribution | (self.y != NO_LABEL))

    def q_at(self, k: Value) -> Value:
        return self.q.load(where(self.q.length > 1, k, 0))

    def at(self, k: Value) -> Value:
        """The target at index k; 0 if that is negative."""
        a = Variable(where(self.y == k, self.on_label, 0))
        with when(self.has_q & ~(k < 0)):
            a.set(a.get() + self.q_at(k))
        return a.get()


def _target(call: Call, i: Value) -> tuple[_Target, Value, Value]:
    """The target of row i, the factor of its loss, and that of its gradient."""
    told, q, per_row, has_labels = call.told, call.q, call.per_row, call.label.length != 0
    n, y = per_row.length // 3, Variable(constant(NO_LABEL))
    of_row = where(n > 1, i, 0)
    numbers = [Variable(per_row.load(kind * n + of_row)) for kind in (ON_LABEL, FACTOR, SCALE)]
    with when(has_labels):
        y.set(call.label.load(i))
        with when(call.asks(IGNORE) & (y.get() == told.ignore_index)):
            y.set(constant(NO_LABEL))
            for number in numbers[1:]:
                number.set(number.get().like(0))
    on_label, factor, s = (number.get() for number in numbers)
    on_label = where(y.get() < 0, 0, on_label)
    is_distribution = (q.length != 0) & ~has_labels
    q = q.part(where(is_distribution, i * told.q_row, 0), where(is_distribution, told.classes, q.length))
    mass = where(has_labels | is_distribution, on_label, 1)
    return _Target(y.get(), on_label, q, is_distribution, mass), factor, s


def _gap_and_mass(row: Array, m: Value, target: _Target) -> tuple[Value, Value]:
    """The sum of a·(m - x) over the row, and that of its target a."""
    q, half = target.q, m * 0.5
    gap, mass = Variable(m.like(0)), Variable(target.mass)
    with when(~(target.y < 0)):
        x = row.load(target.y)
        below = where(x == m, 0, half - x * 0.5)  # also where both are infinite
        with when(~((target.on_label == 0) | (below == 0))):
            gap.set(2 * (target.on_label * below))

    def add(half_gaps: Value, of_q: Value) -> None:
        for variable, more in ((gap, 2 * half_gaps), (mass, of_q)):
            variable.set((variable.get().to(DOUBLE) + more).to(m.element))

    with when(target.has_q), either(q.length > 1) as (each, alike):
        with each:
            add(sum_of_half_gaps(row, q, half, row), sum_of(row, q))
        with alike:
            add(sum_of_half_gaps(row, q.load(0), half, row), q.load(0).to(DOUBLE) * row.length.to(DOUBLE))
    return gap.get().with_one_nan(), mass.get()


class _Stats:
    """The stats of a row: given or computed, with its exponentials on the way."""

    def __init__(self, call: Call, i: Value, row: Array, target: _Target) -> None:
        self.call, self.i, self.row, self.is_known = call, i, row, call.asks(KNOWN)
        largest_at = argmax(row)
        m = row.load(largest_at)
        self.special, self.largest_at = Variable(largest_at), largest_at  # `special` is -1 if none is
        self.m, self.r, self.gap, self.mass = held = [Variable(m) for _ in range(4)]
        with either(self.is_known) as (known, unknown):
            with known:
                for variable, kind in zip(held, STATS_KINDS, strict=True):
                    variable.set(call.answers_of(kind, i, 1).load(0))
                with when(~(m == self.m.get())):
                    self.special.set(constant(-1))
            with unknown:
                for variable, value in zip((self.gap, self.mass), _gap_and_mass(row, m, target), strict=True):
                    variable.set(value)

    def add_exps(self, g: Array, following: Array, soon: Array) -> None:
        """Store the exponentials in `g`, unless they are not needed; see `exps`."""
        m, r, element = self.m.get(), self.r, self.row.element
        total = Variable(constant(math.nan, DOUBLE))
        with when(where(self.is_known, self.call.asks(GRAD), is_finite(m))):
            total.set(exps(self.row, where(is_finite(m), m, 0), self.special.get(), g, following, soon))
        with when(~self.is_known):
            r.set(total.get().to(element))
            with when(~(r.get() == r.get())):
                largest = largest_without_softmax(self.row, 1)
                self.m.set(largest)
                r.set(where(largest == largest, 0, largest))

    def store(self, label_is_largest: Value) -> None:
        values = [held.get() for held in (self.m, self.r, self.gap, self.mass)]
        for kind, value in zip(STATS_KINDS, values, strict=True):
            self.call.answers_of(kind, self.i, 1).store(value, 0)
        hit = where(label_is_largest, constant(1, self.row.element), 0)
        self.call.answers_of(HIT, self.i, 1).store(hit, 0)


def _gradient(g: Array, by: Value, top: Value, at: Value, s: Value, target: _Target) -> None:
    """Replace exp(x - max) by the gradient s·[coef·p - a]; `by` is s·coef·p at the maximum, `top` goes to `at`."""
    q, y = target.q, target.y
    scale(g, g, by.to(g.element) + 0)
    with when(~(y < 0)):
        g.store(g.load(y) - s * target.on_label, y)
    with when(target.has_q), either(q.length > 1) as (each, alike):
        with each:
            subtract_product(g, g, q, s)
        with alike:
            subtract_product(g, g, q.load(0), s)
    with when(~(at < 0)):
        g.store(top.to(g.element), at)


def _gradient_before_scale(g: Array, by: Value, top: Value, at: Value, target: _Target) -> None:
    """Replace exp(x - max) by coef·p - a, for a row that must be scaled last because s·coef may overflow."""
    by, top = by.to(g.element), top.to(g.element)
    for k in loop(g.length):
        e = g.load(k)
        value = Variable(where((e == 0) & (by == by), e, e * by))
        with when(target.has_q):
            value.set(value.get() - target.q_at(k))
        g.store(where(k == target.y, value.get() - target.on_label, value.get()), k)
    with when(~(at < 0)):
        g.store(top, at)


def rows(call: Call) -> None:
    """See `loops`."""
    make_compact()
    told, classes, element = call.told, call.told.classes, call.per_row.element
    room = call.workspace.region(element, 0, 3 * classes)
    # The logits converted or after softcap, if either is needed; exponentials and gradient, if not in place; slopes.
    wide, e, slope = (room.part(k * classes, classes) for k in range(3))
    is_half, is_capped, is_streamed = told.is_half != 0, told.softcap > 0, call.asks(STREAM)
    for i in loop(call.outer):
        target, factor, s = _target(call, i)
        x, out = call.x.part(i * told.x_outer, classes), call.out.part(i * told.out_outer, classes)
        widen(x, is_half, wide)
        logits, label_is_largest = numbers_of(x, wide), Variable(constant(0, BIT))
        with when(is_capped):
            with when(call.asks(STATS)):
                label_is_largest.set(target.y == argmax(logits))
            softcap(logits, told.softcap, wide, slope)
        row = wide.where(is_capped, logits)
        g = numbers_of(out, e).where(call.asks(GRAD | LOG) & ~is_streamed, e)
        stats = _Stats(call, i, row, target)
        # To prefetch: the next row, and the part of the output that is written one chunk from now.
        following = call.x.part(where(i + 1 < call.outer, i + 1, i) * told.x_outer, classes)
        soon = call.out.part(i * told.out_outer + CHUNK, where(is_streamed, 0, call.out.length))
        stats.add_exps(g, following, soon)
        with when(call.asks(STATS)):
            stats.store(where(is_capped, label_is_largest.get(), target.y == stats.largest_at))
        m, r, gap, mass, at = (held.get() for held in (stats.m, stats.r, stats.gap, stats.mass, stats.special))
        finish_with = partial(finish_row, m, where(is_finite(m), r, math.nan), gap, mass, target.at(at), z=told.z_loss)
        loss, by, top, tail = finish_with(factor=factor, scale=s)
        with when(call.asks(LOSS)):
            call.answers.store(loss.to(element), i)
        with when(call.asks(LOG)):
            logarithms(g, row, m, tail)
            narrow(g, is_half, out)
        with when(call.asks(GRAD)):
            overflows = is_infinite(s) | is_infinite(s * mass) | is_infinite(by.to(element))
            with either(s == 0) as (nothing, something):
                with nothing:
                    fill(g, 0)
                with something:
                    with either(overflows) as (scaled_last, usual):
                        with scaled_last:
                            _, last_by, last_top, _ = finish_with(factor=s, scale=s.like(1))
                            _gradient_before_scale(g, last_by, last_top, at, target)
                        with usual:
                            _gradient(g, by, top, at, s, target)
                    with when(is_capped):
                        multiply(g, g, slope)
                    with when(overflows):
                        multiply(g, g, s)
            narrow(g, is_half, out)
            if not out.has_16_bits:
                with when(is_streamed):
                    stream(e, out)
