"""Numbers, vectors of them and where they lie, in LLVM's own terms: what `_dense` and `_tiles` are made of.

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

from ._memory import LINE as LINE

PARTIAL = 32  # partial sums of a chunk

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

    def fixed(self, number: float) -> Value:
        """`like`, of a number that loops are to find ready: LLVM would make it anew at each use.

        It is kept from LLVM which number it is, by assembly of no instructions; then it stays in a register, or in
        memory that an instruction reads by itself.
        """
        builder = self.builder
        kept = builder.function.__dict__.setdefault("_fixed", {})
        key = str(self.value.type), number
        if key not in kept:
            with builder.goto_entry_block():
                of = ir.IntType(32 if self.is_single else 64)
                first = ir.Constant(self.element, float(np.float32(number)) if self.is_single else number)
                hidden = builder.asm(ir.FunctionType(of, [of]), "", "=r,0", [builder.bitcast(first, of)], False)
                hidden = builder.bitcast(hidden, self.element)
                kept[key] = _as_many(self, hidden)
        return Value(builder, kept[key])

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

    def differs(self, other: Value) -> Any:
        """Whether they do, and none is NaN."""
        return self.builder.fcmp_ordered("!=", self.value, other.value)

    def with_one_nan(self) -> Value:
        """The same NaN for each: which one arithmetic makes depends on the processor, and on how operands lie."""
        return self.where(self.equals(self), self.like(math.nan))

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
        value = self.fixed(coefficients[0])
        for coefficient in coefficients[1:]:
            value = value.times_plus(self, self.fixed(coefficient))
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
    least = x.fixed(-bias * math.log(2))  # there n is -bias, and the exponent 0
    x = least.where(x.below(least), x)
    magic = x.fixed(1.5 * 2**mantissa + bias)
    shifted = x.times_plus(x.fixed(1 / math.log(2)), magic)
    n = shifted - magic
    r = n.times_plus(x.fixed(-low), n.times_plus(x.fixed(-high), x))
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


def _slope_of_tanh(x: Value) -> Value:
    """1 - tanh²(x) to a few units in the last place, also where it is tiny: 4e/(1 + e)² with e = exp(-2|x|)."""
    e = _exp(x.like(2).where(x.below(x.like(0)), x.like(-2)) * x)
    one_more = x.like(1) + e
    return (x.like(4) * e) / (one_more * one_more)


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


def _times(value: Value, by: Value) -> Value:
    """Their product; by 0 and by NaN just that, whatever there is in a row that does not count, or has no softmax."""
    return (value * by).where(by.differs(by.like(0)), by)


# What follows for a row once its sum is known, in float64


def _finish(
    m: Value, r: Value, gap: Value, mass: Value, factor: Value, z: Any, is_rough: bool
) -> tuple[Value, Value, Value, Value, Value]:
    """The loss of a row; log(1 + r); p = 1/(1 + r); coef = mass + more, which the gradient has p times; and more."""
    builder, zero = r.builder, r.like(0)

    def in_range(value: Value) -> Value:
        """Infinity where the dtype of the arithmetic has no number."""
        if not is_rough:
            return value
        held = value.to(ir.FloatType()).to(value.element)
        return value.where((held - held).equals(zero), held)

    tail, p = _log1p(r, is_rough)
    held = _Held([gap + mass * tail, mass, zero])
    with builder.if_then(builder.fcmp_ordered(">", z, ir.Constant(z.type, 0))):
        lse, weight = m + tail, Value(builder, _as_many(r, z))
        loss, coef, _ = held.get()
        of_lse = weight * lse
        more = in_range(of_lse + of_lse)
        held.set([loss + of_lse * lse, in_range(coef + more), more])
    loss, coef, more = held.get()
    loss = in_range(loss)
    return zero.where(factor.equals(zero), factor * loss), tail, p, coef, more


def _top(r: Value, p: Value, mass: Value, coef: Value, more: Value, a: Value) -> Value:
    """coef·p - a where p = 1/(1 + r) is the largest: by 1 - p where that cancels less, and `more` is not lost."""
    builder = r.builder
    from_rest = builder.and_(builder.or_(r.below(r.like(1)), a.equals(mass)), builder.not_(a.equals(r.like(0))))
    from_rest = builder.and_(from_rest, (coef - coef).equals(r.like(0)))
    return (((mass - a) + more) - coef * (r * p)).where(from_rest, coef * p - a)


@intrinsic
def finish(_context: Any, m: Any, r: Any, gap: Any, mass: Any, a: Any, factor: Any, scale: Any, z: Any) -> Any:
    """Of one row the loss, what exp(x - m) is multiplied by, the gradient at the maximum, and log(1 + r).

    a is the target at the maximum.
    """
    is_rough = m == types.float32

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        m, r, gap, mass, a, factor, scale = (Value(builder, number).to(ir.DoubleType()) for number in arguments[:7])
        r, z = r.with_one_nan(), arguments[7]
        loss, tail, p, coef, more = _finish(m, r, gap, mass, factor, z, is_rough)
        found = loss, scale * coef * p, scale * _top(r, p, mass, coef, more, a), tail
        return context.make_tuple(builder, signature.return_type, [value.value for value in found])

    # With its own type of m: Numba tells the implementations apart by nothing but their signatures.
    return types.UniTuple(types.float64, 4)(m, *[types.float64] * 7), build


@intrinsic
def make_compact(_context: Any) -> Any:
    """Has LLVM keep the function small: copies of loops that are made of vectors already win nothing."""

    def build(context: Any, builder: Any, _signature: Any, _arguments: Any) -> Any:
        builder.function.attributes.add("optsize")
        return context.get_dummy_value()

    return types.void(), build


@intrinsic
def fence(_context: Any) -> Any:
    """What was streamed is there before anything that is stored later."""

    def build(context: Any, builder: Any, _signature: Any, _arguments: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), build


@intrinsic
def is_usual(_context: Any) -> Any:
    """Whether this thread calculates as `_arithmetic` has it, as far as that is known of the processor."""

    def build(_: Any, builder: Any, _signature: Any, _arguments: Any) -> Any:
        triple = builder.module.triple
        if triple.startswith("x86_64"):
            settings = cgutils.alloca_once(builder, _WORD)
            type_ = ir.FunctionType(ir.VoidType(), [cgutils.voidptr_t])
            store = cgutils.get_or_insert_function(builder.module, type_, "llvm.x86.sse.stmxcsr")
            builder.call(store, [builder.bitcast(settings, cgutils.voidptr_t)])
            word, others = builder.load(settings), 0xE040  # small results to 0, the way to round, small operands to 0
        elif triple.startswith(("aarch64", "arm64")):
            word = builder.asm(ir.FunctionType(_INDEX, []), "mrs $0, fpcr", "=r", [], True)
            others = 0x1C00003  # both to 0, the way to round; and that of small operands or results alone
        else:
            return ir.Constant(ir.IntType(1), 1)
        return builder.icmp_unsigned("==", builder.and_(word, word.type(others)), word.type(0))

    return types.boolean(), build


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


def _as_many(like: Value, number: Any) -> Any:
    """That number, as often as there are numbers there."""
    type_ = like.value.type
    return _repeat(like.builder, number, type_.count) if isinstance(type_, ir.VectorType) else number


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

    def load_some(self, start: Any, count: Any, otherwise: Value) -> Value:
        """The first `count` numbers of a vector, and then those of the other; no more memory than that is touched."""
        return Value(self.builder, self._masked("load", self.vector, [], start, count, [otherwise.value]))

    def store_some(self, value: Value, start: Any, count: Any) -> None:
        """Store the first `count` numbers."""
        self._masked("store", ir.VoidType(), [value.value], start, count, [])

    def _masked(self, what: str, result: Any, before: list[Any], start: Any, count: Any, after: list[Any]) -> Any:
        builder, many, number = self.builder, self.vector.count, ir.IntType(8 * self.align)
        count = count if self.align == 8 else builder.trunc(count, number)
        places = ir.Constant(ir.VectorType(number, many), [*range(many)])
        mask = builder.icmp_signed("<", places, _repeat(builder, count, many))
        arguments = [*before, self.pointer(start), _WORD(self.align), mask, *after]
        name = f"v{many}{self.vector.element.intrinsic_name}"
        type_ = ir.FunctionType(result, [argument.type for argument in arguments])
        function = cgutils.get_or_insert_function(builder.module, type_, f"llvm.masked.{what}.{name}.p0{name}")
        return builder.call(function, arguments)

    def stream(self, value: Value, start: Any) -> None:
        """Store to memory, past the caches; whole lines if there are more numbers than one. Needs a `fence`."""
        align = self.align if self.vector.count == 1 else LINE
        stored = self.builder.store(value.value, self.pointer(start), align=align)
        if self.vector.count > 1:
            stored.set_metadata("nontemporal", self.builder.module.add_metadata([_WORD(1)]))

    def all(self, number: Any) -> Value:
        """A vector of one number."""
        return Value(self.builder, _repeat(self.builder, number, self.vector.count))

    def zero(self) -> Value:
        return Value(self.builder, ir.Constant(self.vector, [0] * self.vector.count))

    def index(self, index: Any) -> Value:
        """A vector of one index."""
        return self.all(self.builder.trunc(index, self.vector.element) if self.align < 8 else index)


def _shuffled(one: Value, two: Value, places: list[int]) -> Value:
    builder = one.builder
    where = ir.Constant(ir.VectorType(_WORD, len(places)), places)
    return Value(builder, builder.shuffle_vector(one.value, two.value, where))


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
