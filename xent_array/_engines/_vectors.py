"""Numbers, and vectors of them, in LLVM's own terms: what `_loops` is made of.

An operation here is the same for a number and for a vector of any length, so a row has the same result wherever it
is worked on. LLVM makes vector instructions of it, of whatever width the processor has, and reorders nothing. The
exponential and its kin are ours, because a call of the C library for each element would cost many times the rest.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numba.np.arrayobj import populate_array

LANES = 16  # rows that share a vector
PARTIAL = 32  # partial sums of a row

_INDEX, _WORD = ir.IntType(64), ir.IntType(32)


class Value:
    """A number or a vector of numbers, with Python's operators."""

    def __init__(self, builder: Any, value: Any) -> None:
        self.builder, self.value = builder, value

    @property
    def element(self) -> Any:
        return getattr(self.value.type, "element", self.value.type)

    @property
    def is_single(self) -> bool:
        return isinstance(self.element, ir.FloatType)

    def like(self, number: float | int, type_: Any = None) -> Value:
        """That number, as often as there are numbers here, of another type if one is given."""
        return Value(self.builder, ir.Constant(*_repeated(self.value.type, type_ or self.element, number)))

    def __add__(self, other: Value) -> Value:
        return Value(self.builder, self.builder.fadd(self.value, other.value))

    def __sub__(self, other: Value) -> Value:
        return Value(self.builder, self.builder.fsub(self.value, other.value))

    def __mul__(self, other: Value) -> Value:
        return Value(self.builder, self.builder.fmul(self.value, other.value))

    def __truediv__(self, other: Value) -> Value:
        return Value(self.builder, self.builder.fdiv(self.value, other.value))

    def __neg__(self) -> Value:
        return Value(self.builder, self.builder.fneg(self.value))

    def times_plus(self, other: Value, added: Value) -> Value:
        """self·other + added, rounded once where the processor does that as fast."""
        type_ = self.value.type
        name = (
            f"llvm.fmuladd.{f'v{type_.count}' if isinstance(type_, ir.VectorType) else ''}{self.element.intrinsic_name}"
        )
        function = cgutils.get_or_insert_function(self.builder.module, ir.FunctionType(type_, [type_] * 3), name)
        return Value(self.builder, self.builder.call(function, [self.value, other.value, added.value]))

    def below(self, other: Value) -> Any:
        return self.builder.fcmp_ordered("<", self.value, other.value)

    def where(self, condition: Any, other: Value) -> Value:
        """Self where the condition holds, else the other."""
        return Value(self.builder, self.builder.select(condition, self.value, other.value))

    def horner(self, coefficients: list[float]) -> Value:
        """A polynomial, the highest coefficient first, to about half a unit where the later terms are small."""
        value = self.like(coefficients[0])
        for coefficient in coefficients[1:]:
            value = value.times_plus(self, self.like(coefficient))
        return value

    def estrin(self, coefficients: list[float]) -> Value:
        """The same in half the time, because few steps have to wait for others; rounded a little more."""
        terms, power = [self.like(coefficient) for coefficient in reversed(coefficients)], self
        while len(terms) > 1:
            pairs = zip(terms[::2], [*terms[1::2], None], strict=False)
            terms = [low if high is None else high.times_plus(power, low) for low, high in pairs]
            power = power * power
        return terms[0]


def _repeated(like: Any, element: Any, number: Any) -> tuple[Any, Any]:
    if isinstance(element, ir.FloatType):
        number = float(np.float32(number))
    if isinstance(like, ir.VectorType):
        return ir.VectorType(element, like.count), [number] * like.count
    return element, number


def _exp_parts(x: Value) -> tuple[Value, Value]:
    """(e**r - 1, 2**n) with exp(x) = 2**n · e**r.

    r = x - n·ln 2 in two parts, the first of which is exact; e**r = 1 + r + r²·p(r), with p interpolated at Chebyshev's
    points for |r| <= ln(2)/2, which leaves less than a tenth of a unit. n is added to 1.5·2**(mantissa bits), so that
    its last bits can be moved to where an exponent is.
    """
    if x.is_single:
        degree, mantissa, one, high, low = 4, 23, 0x3F800000, 0.693145751953125, 1.4286068203094173e-06
    else:
        degree, mantissa, one, high, low = 10, 52, 0x3FF0000000000000, 0.6931471803691238, 1.9082149292705877e-10
    magic = x.like(1.5 * 2**mantissa)
    shifted = x.times_plus(x.like(1 / math.log(2)), magic)
    n = shifted - magic
    r = n.times_plus(x.like(-low), n.times_plus(x.like(-high), x))
    less_one = r.estrin(_exp_terms(degree)).times_plus(r * r, r)
    integer, builder = ir.IntType(32 if x.is_single else 64), x.builder
    bits = builder.bitcast(shifted.value, x.like(0, integer).value.type)
    bits = builder.add(builder.shl(bits, x.like(mantissa, integer).value), x.like(one, integer).value)
    return less_one, Value(builder, builder.bitcast(bits, x.value.type))


@cache
def _exp_terms(degree: int) -> list[float]:
    """The coefficients of p in exp(r) = 1 + r + r²·p(r), the highest first."""
    domain = [-math.log(2) / 2, math.log(2) / 2]

    def p(r: Any) -> Any:  # by its series: the quotient itself would cancel
        return sum(r**k / math.factorial(k + 2) for k in range(20))

    found = np.polynomial.Chebyshev.interpolate(p, degree, domain)
    return [float(c) for c in found.convert(kind=np.polynomial.Polynomial).coef[::-1]]


def _exp(x: Value) -> Value:
    """exp(x) for x <= 0, to about a unit in the last place; 0 where that is no normal number; NaN of NaN."""
    less_one, power = _exp_parts(x)
    smallest = x.like(-87.33654 if x.is_single else -708.396418532264)
    return x.like(0).where(x.below(smallest), less_one.times_plus(power, power))


def _tanh(x: Value) -> Value:
    """tanh(x), of small x too to a few units in the last place: -m/(2 + m) with m = exp(-2|x|) - 1."""
    is_low = x.below(x.like(0))
    t = x.like(2).where(is_low, x.like(-2)) * x
    least = x.like(-80)
    less_one, power = _exp_parts(least.where(t.below(least), t))
    m = less_one.times_plus(power, power - x.like(1))
    up = -m / (x.like(2) + m)
    return (-up).where(is_low, up)


def _log1p(r: Value) -> tuple[Value, Value]:
    """(log(1 + r), 1/(1 + r)) for 0 <= r, in float64; NaN of NaN.

    With 1 + r = m·2**k, m from sqrt(1/2) to sqrt(2): log(m) = 2·atanh(s) by its series, s = (m - 1)/(m + 1),
    |s| < 0.172; and what 1 + r loses of r is given back.
    """
    builder = r.builder
    one = r.like(1)
    u = one + r
    inverse = one / u
    bits = builder.bitcast(u.value, r.like(0, _INDEX).value.type)
    above = builder.sub(bits, r.like(0x3FE6A09E667F3BCD, _INDEX).value)  # the square root of 1/2
    k = builder.lshr(above, r.like(52, _INDEX).value)
    m = Value(builder, builder.bitcast(builder.sub(bits, builder.shl(k, r.like(52, _INDEX).value)), r.value.type))
    shifted = builder.bitcast(builder.or_(k, r.like(0x4330000000000000, _INDEX).value), r.value.type)
    exponent = Value(builder, shifted) - r.like(2**52)
    s = (m - one) / (m + one)
    atanh = (s * s).horner([1 / odd for odd in range(21, 0, -2)]) * s
    lost = (r - (u - one)) * inverse
    return exponent.times_plus(r.like(math.log(2)), atanh.times_plus(r.like(2), lost)), inverse


def _of_a_number(function: Callable[[Value], Value]) -> Any:
    @intrinsic
    def of_a_number(_context: Any, x: Any) -> Any:
        return x(x), lambda _context, builder, _signature, arguments: function(Value(builder, arguments[0])).value

    return of_a_number


exp, tanh = map(_of_a_number, (_exp, _tanh))


@intrinsic
def log1p(_context: Any, r: Any) -> Any:
    """log(1 + r) and 1/(1 + r)."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        both = [value.value for value in _log1p(Value(builder, arguments[0]))]
        return context.make_tuple(builder, signature.return_type, both)

    return types.UniTuple(r, 2)(r), build


# Stretches of an array


@intrinsic
def part(_context: Any, array: Any, start: Any, count: Any) -> Any:
    """``array[start : start + count]``, whatever length the array says it has."""
    return types.Array(array.dtype, 1, "C")(array, types.int64, types.int64), _part


def _part(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    array, start, count = arguments
    holds = context.make_array(signature.args[0])(context, builder, array)
    made = context.make_array(signature.return_type)(context, builder)
    size = holds.itemsize
    data = builder.gep(holds.data, [start])
    populate_array(made, data=data, shape=[count], strides=[size], itemsize=size, meminfo=None)
    return made._getvalue()


@intrinsic
def row(_context: Any, array: Any, start: Any, work: Any) -> Any:
    """The part of an array that starts there, as long as `work`; or `work`, in its place, if the array has 16 bits."""
    if array.dtype == types.uint16:
        return work(array, types.int64, work), lambda _context, _builder, _signature, arguments: arguments[2]

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        length = context.make_array(work)(context, builder, arguments[2]).shape
        count = builder.extract_value(length, 0)
        return _part(context, builder, signature, [arguments[0], arguments[1], count])

    return types.Array(array.dtype, 1, "C")(array, types.int64, work), build


class _Memory:
    """Vectors of an array's numbers."""

    def __init__(self, context: Any, builder: Any, type_: Any, array: Any, length: int) -> None:
        self.builder = builder
        kind = context.get_data_type(type_.dtype)
        self.vector, self.align = ir.VectorType(kind, length), kind.get_abi_size(context.target_data)
        self.data = context.make_array(type_)(context, builder, array).data

    def pointer(self, start: Any) -> Any:
        return self.builder.bitcast(self.builder.gep(self.data, [start]), self.vector.as_pointer())

    def load(self, start: Any) -> Value:
        return Value(self.builder, self.builder.load(self.pointer(start), align=self.align))

    def store(self, value: Value, start: Any) -> None:
        self.builder.store(value.value, self.pointer(start), align=self.align)

    def all(self, number: Any) -> Value:
        """A vector of one number."""
        first = self.builder.insert_element(ir.Constant(self.vector, ir.Undefined), number, _WORD(0))
        zeros = ir.Constant(ir.VectorType(_WORD, self.vector.count), [0] * self.vector.count)
        return Value(self.builder, self.builder.shuffle_vector(first, first, zeros))


def _larger(one: Value, two: Value) -> Value:
    """The larger; the second where one of them is NaN."""
    return one.where(two.below(one), two)


# 32 numbers of a row at a time, as a few vectors: more at once need more registers than there are


class _Group:
    """The vectors of 32 numbers of an array."""

    def __init__(self, context: Any, builder: Any, type_: Any, array: Any) -> None:
        self.builder = builder
        self.length = 64 // (type_.dtype.bitwidth // 8)
        self.memory = _Memory(context, builder, type_, array, self.length)
        self.places = range(0, PARTIAL, self.length)

    def load(self, start: Any) -> list[Value]:
        return [self.memory.load(self.builder.add(start, _INDEX(k))) for k in self.places]

    def store(self, values: list[Value], start: Any) -> None:
        for k, value in zip(self.places, values, strict=True):
            self.memory.store(value, self.builder.add(start, _INDEX(k)))


class _Held:
    """Values that a loop changes."""

    def __init__(self, values: list[Value]) -> None:
        self.builder = values[0].builder
        self.slots = [cgutils.alloca_once_value(self.builder, value.value) for value in values]

    def get(self) -> list[Value]:
        return [Value(self.builder, self.builder.load(slot)) for slot in self.slots]

    def set(self, values: list[Value]) -> None:
        for slot, value in zip(self.slots, values, strict=True):
            self.builder.store(value.value, slot)


def _on_groups(work: Callable[[Value, Value], Value]) -> Any:
    """A loop over groups of 32 numbers: ``partial = work(numbers, partial)``."""

    @intrinsic
    def on_groups(_context: Any, x: Any, start: Any, groups: Any, partial: Any) -> Any:
        def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            numbers, kept = (_Group(context, builder, type_, arguments[k]) for k, type_ in ((0, x), (3, partial)))
            held = _Held(kept.load(_INDEX(0)))
            with cgutils.for_range(builder, arguments[2]) as loop:
                here = builder.add(arguments[1], builder.mul(loop.index, _INDEX(PARTIAL)))
                held.set([work(*pair) for pair in zip(numbers.load(here), held.get(), strict=True)])
            kept.store(held.get(), _INDEX(0))
            return context.get_dummy_value()

        return types.void(x, types.int64, types.int64, partial), build

    return on_groups


add_groups = _on_groups(lambda numbers, partial: partial + numbers)
raise_groups = _on_groups(_larger)  # NaN is passed over


@intrinsic
def exp_groups(_context: Any, x: Any, e: Any, start: Any, groups: Any, largest: Any, partial: Any) -> Any:
    """Groups of exp(x - largest) into `e`, at the same place; added to the 32 partial sums."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        numbers, to, kept = (
            _Group(context, builder, type_, arguments[k]) for k, type_ in ((0, x), (1, e), (5, partial))
        )
        m = numbers.memory.all(arguments[4])
        held = _Held(kept.load(_INDEX(0)))
        with cgutils.for_range(builder, arguments[3]) as loop:
            here = builder.add(arguments[2], builder.mul(loop.index, _INDEX(PARTIAL)))
            for k, slot in zip(numbers.places, held.slots, strict=True):  # one after another: registers are few
                place = builder.add(here, _INDEX(k))
                value = _exp(numbers.memory.load(place) - m)
                to.memory.store(value, place)
                builder.store((Value(builder, builder.load(slot)) + value).value, slot)
        kept.store(held.get(), _INDEX(0))
        return context.get_dummy_value()

    return types.void(x, e, types.int64, types.int64, largest, partial), build


@intrinsic
def exp_group_but_one(_context: Any, x: Any, e: Any, start: Any, one: Any, largest: Any, partial: Any) -> Any:
    """The group that starts there, with 0 at `one` of its places."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        numbers, to, kept = (
            _Group(context, builder, type_, arguments[k]) for k, type_ in ((0, x), (1, e), (5, partial))
        )
        m, zero = numbers.memory.all(arguments[4]), _INDEX(0)
        which = builder.trunc(arguments[3], _WORD)
        of_words = ir.VectorType(_WORD, numbers.length)
        first = builder.insert_element(ir.Constant(of_words, ir.Undefined), which, _WORD(0))
        wanted = builder.shuffle_vector(first, first, ir.Constant(of_words, [0] * numbers.length))
        sums = []
        for k, total in zip(numbers.places, kept.load(zero), strict=True):
            place = builder.add(arguments[2], _INDEX(k))
            value = _exp(numbers.memory.load(place) - m)
            is_one = builder.icmp_signed("==", wanted, ir.Constant(of_words, [*range(k, k + numbers.length)]))
            value = value.like(0).where(is_one, value)
            to.memory.store(value, place)
            sums.append(total + value)
        kept.store(sums, zero)
        return context.get_dummy_value()

    return types.void(x, e, types.int64, types.int64, largest, partial), build


def _in_halves(combine: Callable[[Value, Value], Value]) -> Any:
    """One number of 32, the upper half combined with the lower again and again."""

    @intrinsic
    def in_halves(_context: Any, partial: Any) -> Any:
        def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            vectors = _Group(context, builder, partial, arguments[0]).load(_INDEX(0))
            while len(vectors) > 1:
                half = len(vectors) // 2
                vectors = [combine(low, high) for low, high in zip(vectors[:half], vectors[half:], strict=True)]
            result = vectors[0].value
            half = result.type.count
            while half > 1:
                half //= 2
                low, high = (
                    ir.Constant(ir.VectorType(_WORD, half), [*range(first, first + half)]) for first in (0, half)
                )
                low, high = (builder.shuffle_vector(result, result, places) for places in (low, high))
                result = combine(Value(builder, low), Value(builder, high)).value
            return builder.extract_element(result, _WORD(0))

        return partial.dtype(partial), build

    return in_halves


sum_in_halves = _in_halves(lambda low, high: low + high)
largest_in_halves = _in_halves(lambda low, high: _larger(high, low))


@intrinsic
def first_of_group(_context: Any, x: Any, start: Any, value: Any) -> Any:
    """Where `value` is, the first time, among the 32 numbers from `start`; 32 if it is not."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        group = _Group(context, builder, x, arguments[0])
        same, found = group.memory.all(arguments[2]).value, _INDEX(0)
        for k, here in zip(group.places, group.load(arguments[1]), strict=True):
            mask = builder.bitcast(builder.fcmp_ordered("==", here.value, same), ir.IntType(group.length))
            found = builder.or_(found, builder.shl(builder.zext(mask, _INDEX), _INDEX(k)))
        return builder.cttz(found, ir.IntType(1)(0))

    return types.int64(x, types.int64, value), build


@intrinsic
def scale_groups(_context: Any, e: Any, out: Any, groups: Any, by: Any) -> Any:
    """Groups of e·by into `out`."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        numbers, to = (_Group(context, builder, type_, arguments[k]) for k, type_ in ((0, e), (1, out)))
        factor = numbers.memory.all(arguments[3])
        with cgutils.for_range(builder, arguments[2]) as loop:
            here = builder.mul(loop.index, _INDEX(PARTIAL))
            to.store([value * factor for value in numbers.load(here)], here)
        return context.get_dummy_value()

    return types.void(e, out, types.int64, by), build


def _turned(is_back: bool) -> Callable[..., Any]:
    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        line, tile, start, step = arguments if not is_back else (arguments[3], *arguments[:3])
        types_ = signature.args if not is_back else (signature.args[3], *signature.args[:3])
        along, across = (
            context.make_array(type_)(context, builder, array)
            for type_, array in ((types_[0], line), (types_[1], tile))
        )
        with cgutils.for_range(builder, builder.extract_value(along.shape, 0)) as loop:
            one = builder.gep(along.data, [loop.index])
            two = builder.gep(across.data, [builder.add(start, builder.mul(loop.index, step))])
            builder.store(builder.load(two if is_back else one), one if is_back else two)
        return context.get_dummy_value()

    return build


@intrinsic
def turn(_context: Any, line: Any, tile: Any, start: Any, step: Any) -> Any:
    """The numbers of `line` to every `step`-th of `tile`, from `start`."""
    return types.void(line, tile, types.int64, types.int64), _turned(is_back=False)


@intrinsic
def turn_back(_context: Any, tile: Any, start: Any, step: Any, line: Any) -> Any:
    """Every `step`-th number of `tile`, from `start`, to `line`."""
    return types.void(tile, types.int64, types.int64, line), _turned(is_back=True)


# 16 rows at a time, the numbers of a class side by side


@intrinsic
def tops_of_lanes(_context: Any, tile: Any, start: Any, step: Any, classes: Any, m: Any, at: Any, lane: Any) -> Any:
    """The largest number of 16 rows each, NaN passed over, into `m`, and its first place into `at`, from `lane` on."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        memory = _Memory(context, builder, tile, arguments[0], LANES)
        largest = _Memory(context, builder, m, arguments[4], LANES)
        places = _Memory(context, builder, at, arguments[5], LANES)
        held = cgutils.alloca_once_value(builder, ir.Constant(memory.vector, [-math.inf] * LANES))
        place = cgutils.alloca_once_value(builder, ir.Constant(places.vector, [0] * LANES))
        with cgutils.for_range(builder, arguments[3]) as loop:
            here = memory.load(builder.add(arguments[1], builder.mul(loop.index, arguments[2])))
            before = Value(builder, builder.load(held))
            higher = before.below(here)
            index = builder.trunc(loop.index, places.vector.element) if places.align == 4 else loop.index
            builder.store(here.where(higher, before).value, held)
            builder.store(builder.select(higher, places.all(index).value, builder.load(place)), place)
        largest.store(Value(builder, builder.load(held)), arguments[6])
        places.store(Value(builder, builder.load(place)), arguments[6])
        return context.get_dummy_value()

    return types.void(tile, types.int64, types.int64, types.int64, m, at, types.int64), build


@intrinsic
def copy_lanes(_context: Any, x: Any, start: Any, step: Any, to: Any, to_step: Any, classes: Any, vectors: Any) -> Any:
    """16·vectors numbers of every class, from `start` of `x` to the start of `to`."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source = _Memory(context, builder, x, arguments[0], LANES)
        target = _Memory(context, builder, to, arguments[3], LANES)
        with cgutils.for_range(builder, arguments[5]) as of_classes:
            here = builder.add(arguments[1], builder.mul(of_classes.index, arguments[2]))
            there = builder.mul(of_classes.index, arguments[4])
            with cgutils.for_range(builder, arguments[6]) as loop:
                lane = builder.mul(loop.index, _INDEX(LANES))
                target.store(source.load(builder.add(here, lane)), builder.add(there, lane))
        return context.get_dummy_value()

    return types.void(x, types.int64, types.int64, to, types.int64, types.int64, types.int64), build


@intrinsic
def exp_of_lanes(_context: Any, tile: Any, start: Any, step: Any, classes: Any, m: Any, lane: Any, partial: Any) -> Any:
    """exp(x - m) in place of x, for 16 rows; added to the partial sums in turn, 16 numbers each."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        memory = _Memory(context, builder, tile, arguments[0], LANES)
        largest = _Memory(context, builder, m, arguments[4], LANES).load(arguments[5])
        sums = _Memory(context, builder, partial, arguments[6], LANES)
        with cgutils.for_range(builder, arguments[3]) as loop:
            here = builder.add(arguments[1], builder.mul(loop.index, arguments[2]))
            value = _exp(memory.load(here) - largest)
            memory.store(value, here)
            turn = builder.mul(builder.and_(loop.index, _INDEX(PARTIAL - 1)), _INDEX(LANES))
            sums.store(sums.load(turn) + value, turn)
        return context.get_dummy_value()

    return types.void(tile, types.int64, types.int64, types.int64, m, types.int64, partial), build


@intrinsic
def add_lanes(_context: Any, partial: Any, to: Any, what: Any) -> Any:
    """16 numbers to 16 others of the same array."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        memory = _Memory(context, builder, partial, arguments[0], LANES)
        memory.store(memory.load(arguments[1]) + memory.load(arguments[2]), arguments[1])
        return context.get_dummy_value()

    return types.void(partial, types.int64, types.int64), build


@intrinsic
def scale_lanes(_context: Any, tile: Any, start: Any, step: Any, classes: Any, by: Any, lane: Any) -> Any:
    """Each of 16 rows times its own number."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        memory = _Memory(context, builder, tile, arguments[0], LANES)
        factor = _Memory(context, builder, by, arguments[4], LANES).load(arguments[5])
        with cgutils.for_range(builder, arguments[3]) as loop:
            here = builder.add(arguments[1], builder.mul(loop.index, arguments[2]))
            memory.store(memory.load(here) * factor, here)
        return context.get_dummy_value()

    return types.void(tile, types.int64, types.int64, types.int64, by, types.int64), build


# 16 bits


def _cast(source: Any, result: Any, function: Callable[[Any, Any, Any], Any]) -> Any:
    @intrinsic
    def cast(_context: Any, value: Any) -> Any:
        return result(source), lambda context, builder, _signature, arguments: function(context, builder, arguments[0])

    return cast


def _has_halves(context: Any) -> bool:
    """Whether the processor converts float16; where it does not, LLVM would call a function that is not there."""
    triple, _, features = context.codegen().magic_tuple()
    return triple.startswith(("aarch64", "arm64")) or "+f16c" in features.split(",")


def _half_from(context: Any, builder: Any, value: Any) -> Any:
    if _has_halves(context):
        return builder.fpext(builder.bitcast(value, ir.HalfType()), ir.FloatType())
    return half_from_bits(builder, value)


def _half_of(context: Any, builder: Any, value: Any) -> Any:
    if _has_halves(context):
        return builder.bitcast(builder.fptrunc(value, ir.HalfType()), ir.IntType(16))
    return half_of_bits(builder, value)


def half_from_bits(builder: Any, value: Any) -> Any:
    """float16 to float32 in integers: the exponent moved; of a subnormal, 2**-14 added to it and taken away again."""
    bits = builder.zext(value, _WORD)
    sign = builder.shl(builder.and_(bits, _WORD(0x8000)), _WORD(16))
    size = builder.shl(builder.and_(bits, _WORD(0x7FFF)), _WORD(13))
    least = builder.bitcast(_WORD(113 << 23), ir.FloatType())
    small = builder.fsub(builder.bitcast(builder.add(size, _WORD(113 << 23)), ir.FloatType()), least)
    wide = builder.add(size, _WORD(112 << 23))
    wide = builder.select(builder.icmp_unsigned("<", size, _WORD(1 << 23)), builder.bitcast(small, _WORD), wide)
    no_number = builder.icmp_unsigned(">=", size, _WORD(31 << 23))  # infinity or NaN
    wide = builder.select(no_number, builder.add(size, _WORD(224 << 23)), wide)
    return builder.bitcast(builder.or_(wide, sign), ir.FloatType())


def half_of_bits(builder: Any, value: Any) -> Any:
    """float32 to float16 in integers, to nearest, ties to even; beside 1/2 float32 has the steps of the subnormal."""
    bits = builder.bitcast(value, _WORD)
    sign = builder.and_(builder.lshr(bits, _WORD(16)), _WORD(0x8000))
    size = builder.and_(bits, _WORD(0x7FFFFFFF))
    half = ir.Constant(ir.FloatType(), 0.5)
    small = builder.fadd(builder.bitcast(size, ir.FloatType()), half)
    small = builder.sub(builder.bitcast(small, _WORD), _WORD(126 << 23))
    carry = builder.add(_WORD(0xFFF), builder.and_(builder.lshr(size, _WORD(13)), _WORD(1)))
    narrow = builder.lshr(builder.sub(builder.add(size, carry), _WORD(112 << 23)), _WORD(13))
    narrow = builder.select(builder.icmp_unsigned("<", size, _WORD(113 << 23)), small, narrow)
    above = builder.select(builder.icmp_unsigned(">", size, _WORD(0x7F800000)), _WORD(0x7E00), _WORD(0x7C00))
    narrow = builder.select(builder.icmp_unsigned(">=", size, _WORD(143 << 23)), above, narrow)
    return builder.trunc(builder.or_(narrow, sign), ir.IntType(16))


def _bfloat_from(_context: Any, builder: Any, value: Any) -> Any:
    return builder.bitcast(builder.shl(builder.zext(value, _WORD), _WORD(16)), ir.FloatType())


def _bfloat_of(_context: Any, builder: Any, value: Any) -> Any:
    """To nearest, ties to even; NaN stays one."""
    bits = builder.bitcast(value, _WORD)
    high = builder.lshr(bits, _WORD(16))
    carry = builder.add(_WORD(0x7FFF), builder.and_(high, _WORD(1)))
    rounded = builder.lshr(builder.add(bits, carry), _WORD(16))
    is_nan = builder.fcmp_unordered("uno", value, value)
    return builder.trunc(builder.select(is_nan, builder.or_(high, _WORD(0x40)), rounded), ir.IntType(16))


from_half, from_bfloat = (_cast(types.uint16, types.float32, how) for how in (_half_from, _bfloat_from))
to_half, to_bfloat = (_cast(types.float32, types.uint16, how) for how in (_half_of, _bfloat_of))
