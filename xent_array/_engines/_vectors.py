"""Numbers, and vectors of them, in LLVM's own terms: what `_loops` is made of.

An operation here is the same for a number and for a vector of any length, so a row has the same result wherever it
is worked on. LLVM makes vector instructions of it, of whatever width the processor has, and reorders nothing. The
exponential and its kin are ours, because a call of the C library for each element would cost many times the rest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numba.np.arrayobj import populate_array

LANES = 16  # rows that share a vector
HALF = 8  # of them in float64
PARTIAL = 32  # partial sums of a chunk
CHUNK = 512  # numbers that are added up before float64 takes over
LINE = 64  # bytes of a line of cache

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

    def equals(self, other: Value) -> Any:
        return self.builder.fcmp_ordered("==", self.value, other.value)

    def to(self, type_: Any) -> Value:
        """In float32 or float64."""
        if self.element == type_:
            return self
        vector = ir.VectorType(type_, self.value.type.count) if isinstance(self.value.type, ir.VectorType) else type_
        change = self.builder.fptrunc if type_ == ir.FloatType() else self.builder.fpext
        return Value(self.builder, change(self.value, vector))

    def where(self, condition: Any, other: Value) -> Value:
        """Self where the condition holds, else the other."""
        return Value(self.builder, self.builder.select(condition, self.value, other.value))

    def horner(self, coefficients: list[float]) -> Value:
        """A polynomial, the highest coefficient first, to about half a unit where the later terms are small."""
        value = self.like(coefficients[0])
        for coefficient in coefficients[1:]:
            value = value.times_plus(self, self.like(coefficient))
        return value

    def in_pairs(self, coefficients: list[float]) -> Value:
        """The same in half the time, because few steps have to wait for others: by Horner's scheme in the square.

        Of an odd number of coefficients, the first three are taken together.
        """
        square, rest = self * self, coefficients[3:]
        value = self.horner(coefficients[:3])
        for pair in zip(rest[::2], rest[1::2], strict=True):
            value = value.times_plus(square, self.horner([*pair]))
        return value


def _repeated(like: Any, element: Any, number: Any) -> tuple[Any, Any]:
    if isinstance(element, ir.FloatType):
        number = float(np.float32(number))
    if isinstance(like, ir.VectorType):
        return ir.VectorType(element, like.count), [number] * like.count
    return element, number


def _exp_parts(x: Value) -> tuple[Value, Value]:
    """(e**r - 1, 2**n) with exp(x) = 2**n · e**r, for x <= 1; 2**n is 0 where it is too little for a normal number.

    r = x - n·ln 2 in two parts, the first of which is exact; e**r = 1 + r + r²·p(r), with p interpolated at Chebyshev's
    points for |r| <= ln(2)/2, which leaves less than a tenth of a unit. n, and what an exponent is counted from, is
    added to 1.5·2**(mantissa bits), so that the last bits are those of 2**n and only have to be moved.
    """
    if x.is_single:
        degree, mantissa, bias, high, low = 4, 23, 127, 0.693145751953125, 1.4286068203094173e-06
    else:
        degree, mantissa, bias, high, low = 10, 52, 1023, 0.6931471803691238, 1.9082149292705877e-10
    least = x.like(-bias * math.log(2))  # there n is -bias, and the exponent 0
    x = least.where(x.below(least), x)
    magic = x.like(1.5 * 2**mantissa + bias)
    shifted = x.times_plus(x.like(1 / math.log(2)), magic)
    n = shifted - magic
    r = n.times_plus(x.like(-low), n.times_plus(x.like(-high), x))
    less_one = r.in_pairs(_exp_terms(degree)).times_plus(r * r, r)
    integer, builder = ir.IntType(32 if x.is_single else 64), x.builder
    bits = builder.bitcast(shifted.value, x.like(0, integer).value.type)
    bits = builder.shl(bits, x.like(mantissa, integer).value)
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
    """exp(x) for x <= 0, to about a unit in the last place; 0 beside the smallest normal number; NaN of NaN."""
    less_one, power = _exp_parts(x)
    return less_one.times_plus(power, power)


def _tanh(x: Value) -> Value:
    """tanh(x), of small x too to a few units in the last place: -m/(2 + m) with m = exp(-2|x|) - 1."""
    is_low = x.below(x.like(0))
    t = x.like(2).where(is_low, x.like(-2)) * x
    less_one, power = _exp_parts(t)
    m = less_one.times_plus(power, power - x.like(1))
    up = -m / (x.like(2) + m)
    return (-up).where(is_low, up)


def _log1p(r: Value, is_rough: bool) -> tuple[Value, Value]:
    """(log(1 + r), 1/(1 + r)) for 0 <= r, in float64, or to 3·10**-9 of it; NaN of NaN.

    With 1 + r = m·2**k, m from sqrt(1/2) to sqrt(2): log(m) = 2·atanh(s) by its series, s = (m - 1)/(m + 1),
    |s| < 0.172; and what 1 + r loses of r is given back.
    """
    builder = r.builder
    one = r.like(1)
    u = one + r
    bits = builder.bitcast(u.value, r.like(0, _INDEX).value.type)
    above = builder.sub(bits, r.like(0x3FE6A09E667F3BCD, _INDEX).value)  # the square root of 1/2
    k = builder.lshr(above, r.like(52, _INDEX).value)
    m = Value(builder, builder.bitcast(builder.sub(bits, builder.shl(k, r.like(52, _INDEX).value)), r.value.type))
    shifted = builder.bitcast(builder.or_(k, r.like(0x4330000000000000, _INDEX).value), r.value.type)
    exponent = Value(builder, shifted) - r.like(2**52)
    if is_rough:  # one division in place of two
        both = one / (u * (m + one))
        inverse, s = both * (m + one), both * u * (m - one)
    else:
        inverse, s = one / u, (m - one) / (m + one)
    square, terms = s * s, [1 / odd for odd in range(9 if is_rough else 21, 0, -2)]
    atanh = (square.in_pairs(terms) if is_rough else square.horner(terms)) * s
    lost = (r - (u - one)) * inverse
    return exponent.times_plus(r.like(math.log(2)), atanh.times_plus(r.like(2), lost)), inverse


def _of_a_number(function: Callable[[Value], Value]) -> Any:
    @intrinsic
    def of_a_number(_context: Any, x: Any) -> Any:
        return x(x), lambda _context, builder, _signature, arguments: function(Value(builder, arguments[0])).value

    return of_a_number


exp, tanh = map(_of_a_number, (_exp, _tanh))


# What follows for a row once its sum is known, in float64


def _finish(
    m: Value, r: Value, gap: Value, mass: Value, factor: Value, z: Value, is_rough: bool
) -> tuple[Value, Value, Value, Value]:
    """The loss of a row; log(1 + r); p = 1/(1 + r); and coef, what p is multiplied by in the gradient."""
    zero = r.like(0)
    tail, p = _log1p(r, is_rough)
    lse = m + tail
    has_z = zero.below(z)
    loss = gap + mass * tail
    loss = (loss + (z * lse) * lse).where(has_z, loss)
    coef = (mass + (z + z) * lse).where(has_z, mass)
    return zero.where(factor.equals(zero), factor * loss), tail, p, coef


def _top(r: Value, p: Value, coef: Value, a: Value) -> Value:
    """coef·p - a where p = 1/(1 + r) is the largest: by 1 - p where that cancels less."""
    builder = r.builder
    from_rest = builder.and_(builder.or_(r.below(r.like(1)), a.equals(coef)), builder.not_(a.equals(r.like(0))))
    return ((coef - a) - coef * (r * p)).where(from_rest, coef * p - a)


@intrinsic
def finish(_context: Any, m: Any, r: Any, gap: Any, mass: Any, a: Any, factor: Any, scale: Any, z: Any) -> Any:
    """Of one row the loss, what exp(x - m) is multiplied by, the gradient at the maximum, and log(1 + r).

    a is the target at the maximum.
    """
    is_rough = m == types.float32

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        m, r, gap, mass, a, factor, scale, z = (Value(builder, number) for number in arguments)
        loss, tail, p, coef = _finish(m, r, gap, mass, factor, z, is_rough)
        found = loss, scale * coef * p, scale * _top(r, p, coef, a), tail
        return context.make_tuple(builder, signature.return_type, [value.value for value in found])

    return types.UniTuple(types.float64, 4)(*[types.float64] * 8), build


@intrinsic
def make_compact(_context: Any) -> Any:
    """Has LLVM keep the function small: copies of loops that are made of vectors already win nothing."""

    def build(context: Any, builder: Any, _signature: Any, _arguments: Any) -> Any:
        builder.function.attributes.add("optsize")
        return context.get_dummy_value()

    return types.void(), build


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


def _repeat(builder: Any, number: Any, length: int) -> Any:
    """A vector of one number."""
    alone = ir.Constant(ir.VectorType(number.type, length), ir.Undefined)
    alone = builder.insert_element(alone, number, _WORD(0))
    return builder.shuffle_vector(alone, alone, ir.Constant(ir.VectorType(_WORD, length), [0] * length))


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
        return Value(self.builder, _repeat(self.builder, number, self.vector.count))

    def zero(self) -> Value:
        return Value(self.builder, ir.Constant(self.vector, [0] * self.vector.count))

    def index(self, index: Any) -> Value:
        """A vector of one index."""
        return self.all(self.builder.trunc(index, self.vector.element) if self.align < 8 else index)


class _Stack(_Memory):
    """The same on the stack, where an array of 32 numbers has its place."""

    def __init__(self, context: Any, builder: Any, dtype: Any, length: int, data: Any = None) -> None:
        self.builder = builder
        kind = context.get_data_type(dtype)
        self.vector, self.align = ir.VectorType(kind, length), kind.get_abi_size(context.target_data)
        if data is None:
            data = builder.bitcast(cgutils.alloca_once(builder, ir.ArrayType(kind, PARTIAL)), kind.as_pointer())
        self.data = data

    def fill(self, number: float) -> None:
        for k in range(0, PARTIAL, self.vector.count):
            self.store(Value(self.builder, ir.Constant(self.vector, [number] * self.vector.count)), _INDEX(k))


class _Operands:
    """Arrays, and numbers that are taken for arrays of one number."""

    def __init__(self, context: Any, builder: Any, dtype: Any, types_: Any, packed: Any) -> None:
        self.context, self.builder, self.dtype = context, builder, dtype
        self.operands = [(type_, builder.extract_value(packed, k)) for k, type_ in enumerate(types_)]

    def at(self, place: Any, length: int) -> list[Value]:
        found = []
        for type_, operand in self.operands:
            if isinstance(type_, types.Array):
                value = _Memory(self.context, self.builder, type_, operand, length).load(place).value
                if isinstance(self.dtype, types.Integer) and type_.dtype.bitwidth > self.dtype.bitwidth:
                    kind = ir.VectorType(ir.IntType(self.dtype.bitwidth), length)
                    value = self.builder.trunc(value, kind)
                found.append(Value(self.builder, value))
            else:
                number = self.context.cast(self.builder, operand, type_, self.dtype)
                found.append(Value(self.builder, _repeat(self.builder, number, length)))
        return found


class _Ahead:
    """Memory that is about to be needed: has it brought into cache, line by line, while something else is done."""

    def __init__(self, context: Any, builder: Any, type_: Any, array: Any, is_written: int) -> None:
        self.builder, self.is_written = builder, _WORD(is_written)
        self.size = type_.dtype.bitwidth // 8
        self.array = context.make_array(type_)(context, builder, array)
        byte = ir.IntType(8).as_pointer()
        type_ = ir.FunctionType(ir.VoidType(), [byte, _WORD, _WORD, _WORD])
        self.fetch = cgutils.get_or_insert_function(builder.module, type_, "llvm.prefetch.p0i8")

    def pointer(self, start: Any) -> Any:
        return self.builder.bitcast(self.builder.gep(self.array.data, [start]), self.fetch.args[0].type)

    def bytes(self, count: Any) -> Any:
        return self.builder.mul(count, _INDEX(self.size))

    def or_else(self, there: Any, otherwise: Any) -> Any:
        """`there` if the array has a length, without a branch."""
        length = self.builder.extract_value(self.array.shape, 0)
        return self.builder.select(self.builder.icmp_signed("!=", length, _INDEX(0)), there, otherwise)

    def line(self, pointer: Any, offset: Any) -> None:
        pointer = self.builder.gep(pointer, [offset])
        self.builder.call(self.fetch, [pointer, self.is_written, _WORD(3), _WORD(1)])


def _in_steps(builder: Any, count: Any, length: int, work: Callable[[Any, int], None]) -> None:
    """Work on so many places at a time, and on what is left over one by one."""
    whole = builder.and_(count, _INDEX(-length))
    for first, end, step in ((_INDEX(0), whole, length), (whole, count, 1)):
        with cgutils.for_range_slice(builder, first, end, _INDEX(step)) as (place, _):
            work(place, step)


def _smaller(builder: Any, one: Any, two: Any) -> Any:
    return builder.select(builder.icmp_signed("<", one, two), one, two)


# A row, number by number


def _on_each(function: Callable[..., Value]) -> Any:
    @intrinsic
    def on_each(_context: Any, out: Any, operands: Any) -> Any:
        """``out = function(*operands)``: as many numbers as `out` has room for."""

        def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            of = _Operands(context, builder, out.dtype, operands, arguments[1])

            def work(place: Any, length: int) -> None:
                _Memory(context, builder, out, arguments[0], length).store(function(*of.at(place, length)), place)

            count = builder.extract_value(context.make_array(out)(context, builder, arguments[0]).shape, 0)
            _in_steps(builder, count, LANES, work)
            return context.get_dummy_value()

        return types.void(out, operands), build

    return on_each


fill = copy = _on_each(lambda number: number)
multiply = _on_each(lambda x, by: x * by)
subtract_product = _on_each(lambda x, a, by: x - by * a)
logarithms = _on_each(lambda x, m, tail: (x - m) - tail)
tanh_of_quotient = _on_each(lambda x, cap: _tanh(x / cap))
slope_of_tanh = _on_each(lambda t: (t.like(1) - t) * (t.like(1) + t))


# A row as a whole, in chunks of 512 and groups of 32


def _larger(one: Value, two: Value) -> Value:
    """The larger; the second where one of them is NaN."""
    return one.where(two.below(one), two)


def _folded(partial: _Stack, combine: Callable[[Value, Value], Value]) -> Any:
    """One number of 32, the upper half combined with the lower again and again."""
    builder, count = partial.builder, partial.vector.count
    vectors = [partial.load(_INDEX(k)) for k in range(0, PARTIAL, count)]
    while len(vectors) > 1:
        half = len(vectors) // 2
        vectors = [combine(low, high) for low, high in zip(vectors[:half], vectors[half:], strict=True)]
    (result,) = vectors
    while count > 1:
        count //= 2
        result = combine(*(_shuffled(result, result, [*range(first, first + count)]) for first in (0, count)))
    return builder.extract_element(result.value, _WORD(0))


class _Partial:
    """32 partial sums of a chunk, or 32 numbers one of which is the largest."""

    def __init__(self, context: Any, builder: Any, dtype: Any, initial: float) -> None:
        self.length = LINE // (
            dtype.bitwidth // 8
        )  # numbers of a vector: more at once need more registers than there are
        self.context, self.builder, self.dtype = context, builder, dtype
        self.vectors = _Stack(context, builder, dtype, self.length)
        self.vectors.fill(initial)

    def groups(self, start: Any, end: Any, work: Callable[[Value, Any, int], Value]) -> Any:
        """``partial = work(partial, place, length)`` on whole groups, a vector at a time; where those end."""
        builder = self.builder
        whole = builder.and_(builder.sub(end, start), _INDEX(-PARTIAL))
        with cgutils.for_range_slice(builder, _INDEX(0), whole, _INDEX(PARTIAL)) as (group, _):
            for k in range(0, PARTIAL, self.length):
                place = builder.add(builder.add(start, group), _INDEX(k))
                self.vectors.store(work(self.vectors.load(_INDEX(k)), place, self.length), _INDEX(k))
        return builder.add(start, whole)

    def rest(self, start: Any, end: Any, work: Callable[[Value, Any, int], Value]) -> None:
        """The same on less than a group, one by one."""
        alone = _Stack(self.context, self.builder, self.dtype, 1, self.vectors.data)
        with cgutils.for_range_slice(self.builder, start, end, _INDEX(1)) as (place, _):
            k = self.builder.sub(place, start)
            alone.store(work(alone.load(k), place, 1), k)

    def folded(self, combine: Callable[[Value, Value], Value]) -> Any:
        """One number, the upper half combined with the lower again and again."""
        vectors = [self.vectors.load(_INDEX(k)) for k in range(0, PARTIAL, self.length)]
        while len(vectors) > 1:
            half = len(vectors) // 2
            vectors = [combine(low, high) for low, high in zip(vectors[:half], vectors[half:], strict=True)]
        (result,), count = vectors, self.length
        while count > 1:
            count //= 2
            result = combine(*(_shuffled(result, result, [*range(first, first + count)]) for first in (0, count)))
        return self.builder.extract_element(result.value, _WORD(0))


@contextmanager
def _chunks(builder: Any, count: Any) -> Iterator[tuple[Any, Any]]:
    """Start and end of 512 places, again and again."""
    with cgutils.for_range_slice(builder, _INDEX(0), count, _INDEX(CHUNK)) as (start, _):
        yield start, _smaller(builder, builder.add(start, _INDEX(CHUNK)), count)


def _plus(one: Value, two: Value) -> Value:
    return one + two


class _Total:
    """A sum in float64."""

    def __init__(self, builder: Any) -> None:
        self.builder = builder
        self.slot = cgutils.alloca_once_value(builder, ir.Constant(ir.DoubleType(), 0))

    def add(self, number: Any) -> None:
        wide = Value(self.builder, number).to(ir.DoubleType()).value
        self.builder.store(self.builder.fadd(self.builder.load(self.slot), wide), self.slot)

    def get(self) -> Any:
        return self.builder.load(self.slot)


def _summed(term: Callable[..., Value]) -> Any:
    @intrinsic
    def summed(_context: Any, count: Any, row: Any, operands: Any) -> Any:
        """The sum of ``term(*operands)`` over `count` places, in the arithmetic of `row`; over chunks in float64."""

        def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            of, total = _Operands(context, builder, row.dtype, operands, arguments[2]), _Total(builder)

            def work(partial: Value, place: Any, length: int) -> Value:
                return partial + term(*of.at(place, length))

            with _chunks(builder, arguments[0]) as (start, end):
                partial = _Partial(context, builder, row.dtype, 0)
                partial.rest(partial.groups(start, end, work), end, work)
                total.add(partial.folded(_plus))
            return total.get()

        return types.float64(types.int64, row, operands), build

    return summed


total = _summed(lambda a: a)
# sum(a·(m - x)), where 0·inf counts 0
weighed = _summed(lambda a, m, x: a.like(0).where(a.equals(a.like(0)), a * (m - x)))


@intrinsic
def top(_context: Any, count: Any, x: Any) -> Any:
    """The first place of the largest of `count` numbers, NaN passed over; 0 if there is none."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        count, x_ = arguments
        alone = _Memory(context, builder, x, x_, 1)
        kind = alone.vector.element
        largest = cgutils.alloca_once_value(builder, ir.Constant(kind, -math.inf))
        first = cgutils.alloca_once_value(builder, _INDEX(0))

        def work(partial: Value, place: Any, length: int) -> Value:
            return _larger(_Memory(context, builder, x, x_, length).load(place), partial)

        with _chunks(builder, count) as (start, end):
            partial = _Partial(context, builder, x.dtype, -math.inf)
            partial.rest(partial.groups(start, end, work), end, work)
            here = partial.folded(lambda low, high: _larger(high, low))
            is_higher = builder.fcmp_ordered(">", here, builder.load(largest))
            with builder.if_then(is_higher):
                builder.store(here, largest)
                builder.store(start, first)
        length = LINE // (x.dtype.bitwidth // 8)
        vectors, place = _Memory(context, builder, x, x_, length), cgutils.alloca_once_value(builder, _INDEX(-1))
        wanted, one = vectors.all(builder.load(largest)), alone.all(builder.load(largest))
        start = builder.load(first)
        inside = builder.sub(_smaller(builder, builder.add(start, _INDEX(CHUNK)), count), start)
        groups = builder.sdiv(inside, _INDEX(PARTIAL))
        rest = builder.add(start, builder.mul(groups, _INDEX(PARTIAL)))
        with cgutils.for_range(builder, groups) as loop:
            here, found = builder.add(start, builder.mul(loop.index, _INDEX(PARTIAL))), _INDEX(0)
            for k in range(0, PARTIAL, length):
                is_it = vectors.load(builder.add(here, _INDEX(k))).equals(wanted)
                mask = builder.zext(builder.bitcast(is_it, ir.IntType(length)), _INDEX)
                found = builder.or_(found, builder.shl(mask, _INDEX(k)))
            with builder.if_then(builder.icmp_signed("!=", found, _INDEX(0))):
                builder.store(builder.add(here, builder.cttz(found, ir.IntType(1)(0))), place)
                loop.do_break()
        is_in_rest = builder.icmp_signed("<", builder.load(place), _INDEX(0))
        left = builder.select(is_in_rest, builder.srem(inside, _INDEX(PARTIAL)), _INDEX(0))
        with cgutils.for_range(builder, left) as loop:
            here = builder.add(rest, loop.index)
            with builder.if_then(builder.extract_element(alone.load(here).equals(one), _WORD(0))):
                builder.store(here, place)
                loop.do_break()
        found = builder.load(place)
        return builder.select(builder.icmp_signed("<", found, _INDEX(0)), _INDEX(0), found)

    return types.int64(types.int64, x), build


@intrinsic
def exps(
    _context: Any, x: Any, m: Any, at: Any, e: Any, coming: Any, coming_start: Any, out: Any, out_start: Any
) -> Any:
    """Leave exp(x - m) in `e`, which may be `x`, with 0 at `at`, if that is a place; their sum.

    Meanwhile as much is brought of `coming`, which will be read, and of `out`, which will be written.
    """

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        x_, m, at, e_, coming_, coming_start, out_, out_start = arguments
        count = builder.extract_value(context.make_array(e)(context, builder, e_).shape, 0)
        read, written = _Ahead(context, builder, coming, coming_, 0), _Ahead(context, builder, out, out_, 1)
        come = read.pointer(coming_start)
        go = written.or_else(written.pointer(out_start), come)
        total, spare = _Total(builder), _Partial(context, builder, x.dtype, -math.inf)
        length = spare.length
        source, target = (_Memory(context, builder, *of, length) for of in ((x, x_), (e, e_)))
        whole_number = ir.IntType(source.align * 8)
        counted = ir.Constant(ir.VectorType(whole_number, length), [*range(length)])
        largest = source.all(m)

        def exp_but_one(numbers: Value, place: Any) -> Value:
            apart = builder.sub(at, place)
            apart = builder.trunc(apart, whole_number) if source.align < 8 else apart
            is_it = builder.icmp_signed("==", counted, _repeat(builder, apart, length))
            return numbers.like(0).where(is_it, _exp(numbers - largest))

        def work(partial: Value, place: Any, length: int) -> Value:
            for ahead, pointer in ((read, come), (written, go)):
                for k in range(0, length * ahead.size, LINE):
                    ahead.line(pointer, builder.add(ahead.bytes(place), _INDEX(k)))
            value = exp_but_one(source.load(place), place)
            target.store(value, place)
            return partial + value

        with _chunks(builder, count) as (start, end):
            partial = _Partial(context, builder, x.dtype, 0)
            rest = partial.groups(start, end, work)
            left = builder.sub(end, rest)
            with builder.if_then(builder.icmp_signed(">", left, _INDEX(0))):  # as a group, with nothing behind it
                one, two, three = (
                    _Memory(context, builder, x, x_, 1),
                    _Stack(context, builder, x.dtype, 1, spare.vectors.data),
                    _Memory(context, builder, e, e_, 1),
                )
                with cgutils.for_range(builder, left) as loop:
                    two.store(one.load(builder.add(rest, loop.index)), loop.index)
                for k in range(0, PARTIAL, length):
                    value = exp_but_one(spare.vectors.load(_INDEX(k)), builder.add(rest, _INDEX(k)))
                    spare.vectors.store(value, _INDEX(k))
                    partial.vectors.store(partial.vectors.load(_INDEX(k)) + value, _INDEX(k))
                with cgutils.for_range(builder, left) as loop:
                    three.store(two.load(loop.index), builder.add(rest, loop.index))
            total.add(partial.folded(_plus))
        return total.get()

    index = types.int64
    return types.float64(x, x.dtype, index, e, coming, index, out, index), build


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


# What there is of each row while its numbers lie in a tile; one after another in one array
M, AT_LABEL, PART, FACTOR, SCALE, GAP, MASS, LOSS, BY, TOP, LABEL = range(11)
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


# Rows turned: in a tile, 16 rows lie side by side, so that the numbers of a class are one vector; then the next 16


def _in_tile(builder: Any, classes: Any, row: Any, c: Any) -> Any:
    """Where a tile has the number of a class of a row."""
    lane = builder.and_(row, _INDEX(LANES - 1))
    block = builder.mul(builder.sub(row, lane), classes)
    return builder.add(builder.add(block, builder.mul(c, _INDEX(LANES))), lane)


def _shuffled(one: Value, two: Value, places: list[int]) -> Value:
    builder = one.builder
    where = ir.Constant(ir.VectorType(_WORD, len(places)), places)
    return Value(builder, builder.shuffle_vector(one.value, two.value, where))


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
def place(_context: Any, row: Any, c: Any, classes: Any) -> Any:
    """Where a tile has the number of class c of a row."""

    def build(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        row, c, classes = arguments
        return _in_tile(builder, classes, row, c)

    return types.uint64(types.int64, types.int64, types.int64), build


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
        side = turn.side

        def rows(row: Any, number: int) -> Callable[[Any], None]:
            def one(c: Any) -> None:
                value = builder.load(builder.gep(turn.line.data, [turn.in_line(start, row, x_step, c)]))
                builder.store(
                    value, builder.gep(turn.tile.data, [_in_tile(builder, classes, builder.add(first, row), c)])
                )

            def square(c: Any) -> None:
                lines = [
                    turn.line.load(turn.in_line(start, builder.add(row, _INDEX(k)), x_step, c)) for k in range(number)
                ]
                pairs = [_shuffled(lines[k], lines[k + side], [*range(number)]) for k in range(side)]
                for k, numbers in enumerate(_turned(pairs)):
                    turn.wide.store(
                        numbers, _in_tile(builder, classes, builder.add(first, row), builder.add(c, _INDEX(k)))
                    )

            return one if number == 1 else square

        turn.walk(count, classes, rows)
        return context.get_dummy_value()

    index = types.int64
    return types.void(x, index, index, index, index, tile, index), build


@intrinsic
def turn_back(
    _context: Any, tile: Any, first: Any, each: Any, width: Any, label: Any, at: Any,
    out: Any, start: Any, out_step: Any, count: Any, classes: Any, has_marks: Any,
) -> Any:  # fmt: skip
    """`count` rows that lie side by side in `tile`, from its row `first` on, each times its own BY, to `out`.

    If it `has_marks`, TOP and LABEL stand at their places.
    """

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        tile_, first, each_, width, label_, at_, out_, start, out_step, count, classes, has_marks = arguments
        turn = _Turn(context, builder, (out, out_), (tile, tile_))
        side = turn.side

        def rows(row: Any, number: int) -> Callable[[Any], None]:
            here = builder.add(first, row)
            by, top, at_label = _Each(context, builder, each, each_, width, here, number).load(BY, TOP, LABEL)
            numbers = _Memory(context, builder, tile, tile_, number)
            y, places = (_Memory(context, builder, *of, number) for of in ((label, label_), (at, at_)))
            marks = [(y.load(here), at_label), (places.load(here), top)]
            zero, nothing = by.like(0), by.equals(by.like(0))  # of a row that does not count, whatever is in it

            def of_classes(c: Any, many: int) -> list[Value]:
                at = [builder.add(c, _INDEX(k)) for k in range(many)]
                found = [numbers.load(_in_tile(builder, classes, here, k)) * by for k in at]
                held = _Held([zero.where(nothing, value) for value in found])
                with builder.if_then(has_marks):
                    for place, special in marks:
                        same = [builder.icmp_signed("==", place.value, y.index(k).value) for k in at]
                        held.set([special.where(*pair) for pair in zip(same, held.get(), strict=True)])
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


# 16 rows at a time, the numbers of a class side by side


@intrinsic
def tops_of_lanes(
    _context: Any, tile: Any, classes: Any, each: Any, width: Any, lane: Any, label: Any, at: Any, no_label: Any
) -> Any:
    """Of 16 rows the largest number, NaN passed over, and its first place into `at`; gap and mass.

    A label that is negative is none: then nothing counts (PART is 0), and the mass is `no_label`.
    """

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        tile_, classes, each_, width, lane, label_, at_, no_label = arguments
        memory = _Memory(context, builder, tile, tile_, LANES)
        places = _Memory(context, builder, at, at_, LANES)
        y = _Memory(context, builder, label, label_, LANES).load(lane)
        of = _Each(context, builder, each, each_, width, lane, LANES)
        zero, nowhere = memory.zero(), places.zero()
        held = _Held([zero.like(-math.inf), nowhere, zero])
        with cgutils.for_range(builder, classes) as loop:
            here = memory.load(_in_tile(builder, classes, lane, loop.index))
            index = places.index(loop.index)
            largest, place, at_label = held.get()
            higher = largest.below(here)
            is_label = builder.icmp_signed("==", y.value, index.value)
            held.set([here.where(higher, largest), index.where(higher, place), here.where(is_label, at_label)])
        largest, place, at_label = held.get()
        has_none = builder.icmp_signed("<", y.value, nowhere.value)
        (part,) = of.load(PART)
        part = zero.where(has_none, part)
        gap = part.where(part.equals(zero), part * (largest - at_label))
        mass = memory.all(builder.sitofp(no_label, memory.vector.element)).where(has_none, part)
        for value, which in ((largest, M), (at_label, AT_LABEL), (part, PART), (gap, GAP), (mass, MASS)):
            of.store(value, which)
        places.store(place, lane)
        return context.get_dummy_value()

    index = types.int64
    return types.void(tile, index, each, index, index, label, at, index), build


@intrinsic
def take_lanes(
    _context: Any, x: Any, start: Any, x_step: Any, count: Any, tile: Any, first: Any, end: Any, classes: Any
) -> Any:
    """The numbers of the classes from `first` to `end` of `count` rows that lie side by side in `x`, to the tile."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        x_, start, x_step, count, tile_, first, end, classes = arguments
        with cgutils.for_range_slice(builder, first, end, _INDEX(1)) as (c, loop):
            there = builder.add(start, builder.mul(loop, x_step))

            def work(lane: Any, length: int) -> None:
                source, target = (_Memory(context, builder, *of, length) for of in ((x, x_), (tile, tile_)))
                target.store(source.load(builder.add(there, lane)), _in_tile(builder, classes, lane, c))

            _in_steps(builder, count, LANES, work)
        return context.get_dummy_value()

    index = types.int64
    return types.void(x, index, index, index, tile, index, index, index), build


@intrinsic
def exp_of_lanes(
    _context: Any, tile: Any, start: Any, first: Any, count: Any, m: Any, at: Any, lane: Any, partial: Any,
    coming: Any, coming_start: Any, coming_step: Any, out: Any, out_start: Any, out_step: Any,
) -> Any:  # fmt: skip
    """exp(x - m) in place of x, or 0 at `at`, for 16 rows and `count` classes from `first` on; the 32 partial sums.

    A row whose m is not finite becomes NaN. Meanwhile, with each class, comes a line of `coming`, which will be read,
    and one of `out`, which will be written.
    """

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        tile_, start, first, count, m_, at_, lane, partial_ = arguments[:8]
        coming_, coming_start, coming_step, out_, out_start, out_step = arguments[8:]
        memory, sums, places = (
            _Memory(context, builder, *of, LANES) for of in ((tile, tile_), (partial, partial_), (at, at_))
        )
        largest, apart = _Memory(context, builder, m, m_, LANES).load(lane), places.load(lane)
        largest = largest + (largest - largest)
        read, written = _Ahead(context, builder, coming, coming_, 0), _Ahead(context, builder, out, out_, 1)
        come = read.pointer(coming_start)
        go = written.or_else(written.pointer(out_start), come)
        come_step = read.bytes(coming_step)
        go_step = written.or_else(written.bytes(out_step), come_step)

        def exps(index: Any) -> Value:
            read.line(come, builder.mul(index, come_step))
            written.line(go, builder.mul(index, go_step))
            here = builder.add(start, builder.mul(index, _INDEX(LANES)))
            is_apart = builder.icmp_signed("==", places.index(builder.add(first, index)).value, apart.value)
            value = _exp(memory.load(here) - largest)
            value = value.like(0).where(is_apart, value)
            memory.store(value, here)
            return value

        def place(index: Any) -> Any:
            return builder.mul(builder.add(builder.mul(lane, _INDEX(PARTIAL // LANES)), index), _INDEX(LANES))

        with cgutils.for_range(builder, _smaller(builder, count, _INDEX(PARTIAL))) as loop:
            sums.store(exps(loop.index), place(loop.index))
        with cgutils.for_range_slice(builder, _INDEX(PARTIAL), count, _INDEX(1)) as (index, _):
            turn = place(builder.and_(index, _INDEX(PARTIAL - 1)))
            sums.store(sums.load(turn) + exps(index), turn)
        return context.get_dummy_value()

    index = types.int64
    return types.void(
        tile, index, index, index, m, at, index, partial, coming, index, index, out, index, index
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
    """Of 8 rows LOSS, and where it is asked for, the gradient: BY, TOP, and LABEL where that is not the maximum."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        each_, width, lane, totals_, label_, at_, z, has_grad = arguments
        of = _Each(context, builder, each, each_, width, lane, HALF)
        m, part, factor, scale, gap, mass = of.load(M, PART, FACTOR, SCALE, GAP, MASS)
        sums, double = _Memory(context, builder, totals, totals_, HALF), ir.DoubleType()
        r = sums.load(lane).to(m.element).to(double)
        sums.store(r, lane)
        wide_m, wide_gap, wide_mass, wide_factor = (value.to(double) for value in (m, gap, mass, factor))
        loss, _, p, coef = _finish(wide_m, r, wide_gap, wide_mass, wide_factor, sums.all(z), m.is_single)
        of.store(loss, LOSS)
        with builder.if_then(has_grad):
            y, top = (_Memory(context, builder, *of, HALF).load(lane) for of in ((label, label_), (at, at_)))
            zero = scale.like(0)
            nothing = scale.equals(zero)
            by = (scale.to(double) * coef * p).to(m.element)
            (x,) = of.load(AT_LABEL)
            at_label = by * _exp(x - m) - scale * part
            a = part.where(builder.icmp_signed("==", y.value, top.value), zero).to(double)
            at_top = (scale.to(double) * _top(r, p, coef, a)).to(m.element)
            for value, which in ((by, BY), (at_label, LABEL), (at_top, TOP)):
                of.store(zero.where(nothing, value), which)
        return context.get_dummy_value()

    index = types.int64
    return types.void(each, index, index, totals, label, at, types.float64, types.boolean), build


@intrinsic
def put_lanes(
    _context: Any,
    tile: Any,
    first: Any,
    end: Any,
    classes: Any,
    count: Any,
    by: Any,
    out: Any,
    start: Any,
    out_step: Any,
) -> Any:
    """The reverse: each row's numbers times its number `by`, to where rows lie side by side in `out`."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        tile_, first, end, classes, count, by_, out_, start, out_step = arguments
        with cgutils.for_range_slice(builder, first, end, _INDEX(1)) as (c, loop):
            there = builder.add(start, builder.mul(loop, out_step))

            def work(lane: Any, length: int) -> None:
                source, target, factor = (
                    _Memory(context, builder, *of, length) for of in ((tile, tile_), (out, out_), (by, by_))
                )
                each, value = factor.load(lane), source.load(_in_tile(builder, classes, lane, c))
                zero = each.like(0)
                target.store(zero.where(each.equals(zero), value * each), builder.add(there, lane))

            _in_steps(builder, count, LANES, work)
        return context.get_dummy_value()

    index = types.int64
    return types.void(tile, index, index, index, index, by, out, index, index), build


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
