"""Elementwise operations on contiguous arrays that all loops share: copies, products, conversions of 16-bit floats."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from . import GROUP, LANES
from .math import from_bfloat, from_half, tanh_and_slope, times, to_bfloat, to_half
from .simd import (
    DOUBLE,
    INT64,
    Array,
    Value,
    Variable,
    constant,
    either,
    has_default_arithmetic,
    loop,
    on_stack,
    smaller,
    vectors,
    where,
)

Operand = Array | Value | float  # a scalar stands for an array of its repetitions


def loaded(operand: Operand, place: Value, lanes: int, element: Any) -> Value:
    """A vector of an operand, starting at an index, as numbers of type `element`."""
    if isinstance(operand, Array):
        return operand.load(place, lanes).to(element)
    number = operand if isinstance(operand, Value) else constant(operand, element)
    return number.to(element).repeated(lanes)


def _on_each(function: Callable[..., Value]) -> Callable[..., None]:
    def on_each(out: Array, *operands: Operand) -> None:
        """``out[k] = function(*operands[k])`` for every k, in the type of `out`, which may be an operand too."""
        for place, lanes in vectors(out.length, LANES):
            out.store(function(*(loaded(operand, place, lanes, out.element) for operand in operands)), place)

    return on_each


fill = copy = _on_each(lambda number: number)
multiply = _on_each(lambda x, by: x * by)
scale = _on_each(times)
subtract = _on_each(lambda x, by: x - by)
subtract_product = _on_each(lambda x, a, by: x - by * a)
logarithms = _on_each(lambda x, m, tail: (x - m) - tail)


def softcap(x: Array, cap: Value, capped: Array, slope: Array) -> None:
    """Store cap·tanh(x/cap) in `capped`, which may be `x`, and its derivative in `slope`."""
    limit = cap.to(x.element)
    for place, lanes in vectors(x.length, LANES):
        by = limit.repeated(lanes)
        ratio, slope_there = tanh_and_slope(x.load(place, lanes) / by)
        capped.store(ratio * by, place)
        slope.store(slope_there, place)


def stream(source: Array, out: Array) -> None:
    """Copy with non-temporal stores wherever a whole cache line is written; see `Array.stream`."""
    head, line = smaller(out.before_line(), source.length), out.line
    for place in loop(0, head):
        out.store(source.load(place), place)
    stop = head + ((source.length - head) & -line)
    for place in loop(head, stop, line):
        out.stream(source.load(place, line), place)
    for place in loop(stop, source.length):
        out.store(source.load(place), place)


# 16 bits


def widen(x: Array, is_half: Value, wide: Array) -> None:
    """Convert 16-bit floats to float32; does nothing if `x` holds wider ones. See `numbers_of`."""
    if x.has_16_bits:
        _convert(x, wide, is_half, from_half, from_bfloat)


def narrow(wide: Array, is_half: Value, out: Array) -> None:
    """Convert float32 to 16-bit floats; does nothing if `out` holds wider ones."""
    if out.has_16_bits:
        _convert(wide, out, is_half, to_half, to_bfloat)


def _convert(source: Array, target: Array, is_half: Value, half: Any, bfloat: Any) -> None:
    with either(is_half) as branches:
        for branch, convert in zip(branches, (half, bfloat), strict=True):
            with branch:
                for place, lanes in vectors(source.length, LANES):
                    target.store(convert(source.load(place, lanes)), place)


def numbers_of(x: Array, wide: Array) -> Array:
    """The array that holds `x` in the dtype of the arithmetic: `wide` if `x` holds 16-bit floats, else `x` itself."""
    return wide if x.has_16_bits else x


class _Sum:
    """A sum in float64; with compensation, rounding errors are summed separately and added last.

    T. Ogita, S. M. Rump and S. Oishi, "Accurate sum and dot product", SIAM J. Sci. Comput. 26 (2005), algorithm Sum2.
    """

    def __init__(self, lanes: int, compensates: bool) -> None:
        self.compensates = compensates
        self.total, self.lost = (Variable(constant(0, DOUBLE, lanes)) for _ in range(2))

    def clear(self) -> None:
        for held in (self.total, self.lost):
            held.set(held.get().like(0))

    def add(self, number: Value) -> None:
        before = self.total.get()
        after = before + number
        self.total.set(after)
        if self.compensates:
            of_number = after - before
            error = (before - (after - of_number)) + (number - of_number)
            lost = self.lost.get()
            self.lost.set(where(error == error, lost + error, lost))  # none once the sum is infinite

    def get(self) -> Value:
        return self.total.get() + self.lost.get()


def total_of(x: Array) -> Value:
    """The sum of losses in float64: of each group of rows, with compensation for float64, and then of the groups."""
    compensates = x.element == DOUBLE
    in_lanes, of_group, total = _Sum(LANES, compensates), _Sum(1, compensates), _Sum(1, True)
    spilled = on_stack(DOUBLE, LANES)
    for start in loop(0, x.length, GROUP):
        stop = smaller(start + GROUP, x.length)
        whole = start + ((stop - start) & -LANES)
        in_lanes.clear()
        of_group.clear()
        for place in loop(start, whole, LANES):
            in_lanes.add(x.load(place, LANES).to(DOUBLE))
        for held in (in_lanes.total, in_lanes.lost):
            spilled.store(held.get(), 0)
            for k in loop(LANES):
                of_group.add(spilled.load(k))
        for place in loop(whole, stop):
            of_group.add(x.load(place).to(DOUBLE))
        total.add(of_group.get())
    return total.get()


def combined(sums: Array) -> Value:
    """The sum of the sums of groups."""
    total = _Sum(1, True)
    for place in loop(sums.length):
        total.add(sums.load(place))
    return total.get()


def kept_labels(label: Array, classes: Value, ignore_index: Value | None = None, ignores: Value | None = None) -> Value:
    """How many labels are not ignored; -1 if one of these is not a class, or if flush-to-zero or the like is on."""
    kept, wrong = Variable(constant(0)), Variable(constant(0))
    held = Variable(constant(0, INT64, LANES)), Variable(constant(0, INT64, LANES))
    whole = label.length & -LANES
    for start, stop, lanes, (kept_there, wrong_there) in (
        (constant(0), whole, LANES, held), (whole, label.length, 1, (kept, wrong)),
    ):  # fmt: skip
        for place in loop(start, stop, lanes):
            y, zero = label.load(place, lanes), constant(0, INT64, lanes)
            is_kept = zero == 0
            if ignore_index is not None and ignores is not None:
                is_kept = ~((y == ignore_index.repeated(lanes)) & ignores.repeated(lanes))
            is_class = ~(y < 0) & (y < classes.repeated(lanes))
            kept_there.set(kept_there.get() + where(is_kept, 1, zero))
            wrong_there.set(where(is_kept & ~is_class, 1, wrong_there.get()))
    for lane in range(LANES):
        kept.set(kept.get() + held[0].get().lane(lane))
        wrong.set(wrong.get() | held[1].get().lane(lane))
    return where((wrong.get() == 0) & has_default_arithmetic(), kept.get(), -1)
