"""One row, its numbers side by side in memory: what is done to each of them, and what is found of all.

In LLVM's own terms, see `_vectors`. A sum takes 512 numbers at a time into 32 partial sums, folds these in halves, and
adds the result up in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from ._vectors import (
    _INDEX,
    _WORD,
    LINE,
    PARTIAL,
    Value,
    _Ahead,
    _exp,
    _Held,
    _in_steps,
    _Memory,
    _repeat,
    _shuffled,
    _slope_of_tanh,
    _smaller,
    _Stack,
    _tanh,
    _times,
)

GROUP = 16  # numbers that are done at once where each is for itself
CHUNK = 512  # numbers that are added up before float64 takes over


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
            _in_steps(builder, count, GROUP, work)
            return context.get_dummy_value()

        return types.void(out, operands), build

    return on_each


fill = copy = _on_each(lambda number: number)
multiply = _on_each(lambda x, by: x * by)
scale = _on_each(_times)
subtract = _on_each(lambda x, by: x - by)
subtract_product = _on_each(lambda x, a, by: x - by * a)
logarithms = _on_each(lambda x, m, tail: (x - m) - tail)
tanh_of_quotient = _on_each(lambda x, cap: _tanh(x / cap))
slope_of_tanh = _on_each(lambda x, cap: _slope_of_tanh(x / cap))


@intrinsic
def spread(_context: Any, values: Any, first: Any, count: Any, out: Any, is_new: Any) -> Any:
    """`count` numbers from that at `first` on to `out`; or the only one there is to all of `out`, if that is new."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        values_, first, count, out_, is_new = arguments
        length, room = (
            builder.extract_value(context.make_array(type_)(context, builder, array).shape, 0)
            for type_, array in ((values, values_), (out, out_))
        )
        is_one = builder.icmp_signed("==", length, _INDEX(1))

        def work(place: Any, length: int) -> None:
            source, target = (_Memory(context, builder, *of, length) for of in ((values, values_), (out, out_)))
            with builder.if_else(is_one) as (one, many):
                with one:
                    target.store(target.all(builder.load(source.data)), place)
                with many:
                    target.store(source.load(builder.add(first, place)), place)

        with builder.if_then(builder.or_(is_new, builder.not_(is_one))):
            _in_steps(builder, builder.select(is_one, room, count), GROUP, work)
        return context.get_dummy_value()

    return types.void(values, types.int64, types.int64, out, types.boolean), build


# A row as a whole, in chunks of 512 and groups of 32


def _larger(one: Value, two: Value) -> Value:
    """The larger; the second where one of them is NaN."""
    return one.where(two.below(one), two)


class _Partial:
    """32 partial sums of a chunk, or 32 numbers one of which is the largest."""

    def __init__(self, context: Any, builder: Any, dtype: Any, initial: float) -> None:
        # Numbers of a vector; more at once would need more registers than there are.
        self.length = LINE // (dtype.bitwidth // 8)
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


def _pieces(builder: Any, start: Any, count: Any, length: int) -> Iterator[tuple[Any, Any, Any]]:
    """Of less than a group, each vector's place in the group and in the row, and how many numbers it still has."""
    for k in range(0, PARTIAL, length):
        yield _INDEX(k), builder.add(start, _INDEX(k)), builder.sub(count, _INDEX(k))


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


def _half_gap(a: Value, half_m: Value, x: Value) -> Value:
    """a·(m - x)/2, where 0·inf counts 0; the half because m - x itself may be beyond the range of finite numbers.

    So does NaN, which is then in the mass, or in the softmax.
    """
    product = a * x.times_plus(x.like(-0.5), half_m)
    return product.where(product.equals(product), a.like(0))


half_gaps = _summed(_half_gap)


@intrinsic
def top(_context: Any, count: Any, x: Any) -> Any:
    """The first place of the largest of `count` numbers, NaN passed over; 0 if there is none."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        count, x_ = arguments
        length = LINE // (x.dtype.bitwidth // 8)
        vectors = _Memory(context, builder, x, x_, length)
        kind = vectors.vector.element
        largest = cgutils.alloca_once_value(builder, ir.Constant(kind, -math.inf))
        first = cgutils.alloca_once_value(builder, _INDEX(0))

        def work(partial: Value, place: Any, _length: int) -> Value:
            return _larger(vectors.load(place), partial)

        with _chunks(builder, count) as (start, end):
            partial = _Partial(context, builder, x.dtype, -math.inf)
            rest = partial.groups(start, end, work)
            left = builder.sub(end, rest)
            with builder.if_then(builder.icmp_signed(">", left, _INDEX(0))):
                for k, place, some in _pieces(builder, rest, left, length):
                    before = partial.vectors.load(k)
                    partial.vectors.store(_larger(vectors.load_some(place, some, before), before), k)
            here = partial.folded(lambda low, high: _larger(high, low))
            is_higher = builder.fcmp_ordered(">", here, builder.load(largest))
            with builder.if_then(is_higher):
                builder.store(here, largest)
                builder.store(start, first)
        place, wanted = cgutils.alloca_once_value(builder, _INDEX(-1)), vectors.all(builder.load(largest))
        start = builder.load(first)
        inside = builder.sub(_smaller(builder, builder.add(start, _INDEX(CHUNK)), count), start)

        def bits(group: list[Value]) -> Any:
            """Which numbers of a group are the largest."""
            found = _INDEX(0)
            for k, numbers in zip(range(0, PARTIAL, length), group, strict=True):
                mask = builder.zext(builder.bitcast(numbers.equals(wanted), ir.IntType(length)), _INDEX)
                found = builder.or_(found, builder.shl(mask, _INDEX(k)))
            return found

        groups = builder.sdiv(inside, _INDEX(PARTIAL))
        rest = builder.add(start, builder.mul(groups, _INDEX(PARTIAL)))
        with cgutils.for_range(builder, groups) as loop:
            here = builder.add(start, builder.mul(loop.index, _INDEX(PARTIAL)))
            found = bits([vectors.load(builder.add(here, _INDEX(k))) for k in range(0, PARTIAL, length)])
            with builder.if_then(builder.icmp_signed("!=", found, _INDEX(0))):
                builder.store(builder.add(here, builder.cttz(found, ir.IntType(1)(0))), place)
                loop.do_break()
        with builder.if_then(builder.icmp_signed("<", builder.load(place), _INDEX(0))):
            left, nan = builder.srem(inside, _INDEX(PARTIAL)), vectors.zero().like(math.nan)
            found = bits([vectors.load_some(here, some, nan) for _, here, some in _pieces(builder, rest, left, length)])
            is_there = builder.icmp_signed("!=", found, _INDEX(0))
            here = builder.add(rest, builder.cttz(found, ir.IntType(1)(0)))
            builder.store(builder.select(is_there, here, _INDEX(0)), place)
        return builder.load(place)

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
        total, length = _Total(builder), LINE // (x.dtype.bitwidth // 8)
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
            with builder.if_then(builder.icmp_signed(">", left, _INDEX(0))):
                for k, place, some in _pieces(builder, rest, left, length):
                    value = exp_but_one(source.load_some(place, some, source.zero().like(-math.inf)), place)
                    target.store_some(value, place, some)
                    partial.vectors.store(partial.vectors.load(k) + value, k)
            total.add(partial.folded(_plus))
        return total.get()

    index = types.int64
    return types.float64(x, x.dtype, index, e, coming, index, out, index), build


@intrinsic
def add_up(_context: Any, x: Any, count: Any) -> Any:
    """The sum of the first `count` numbers, in float64; what each addition of float64 numbers loses is added last.

    See T. Ogita, S. M. Rump and S. Oishi, "Accurate sum and dot product", SIAM J. Sci. Comput. 26 (2005), Sum2.
    """

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        x_, count = arguments
        double, vectors = ir.DoubleType(), _Stack(context, builder, types.float64, GROUP)
        is_exact = x.dtype == types.float64

        def add(held: _Held, number: Value) -> None:
            before, lost = held.get()
            after = before + number
            if is_exact:
                of_number = after - before
                error = (before - (after - of_number)) + (number - of_number)
                lost = (lost + error).where(error.equals(error), lost)  # not of infinity
            held.set([after, lost])

        whole = builder.and_(count, _INDEX(-GROUP))
        zeros = Value(builder, ir.Constant(vectors.vector, [0] * GROUP))
        held, total = _Held([zeros, zeros]), _Held([Value(builder, ir.Constant(double, 0))] * 2)
        with cgutils.for_range_slice(builder, _INDEX(0), whole, _INDEX(GROUP)) as (at, _):
            add(held, _Memory(context, builder, x, x_, GROUP).load(at).to(double))
        for values in held.get():
            vectors.store(values, _INDEX(0))
            with cgutils.for_range(builder, _INDEX(GROUP)) as loop:
                add(total, Value(builder, builder.load(builder.gep(vectors.data, [loop.index]))))
        with cgutils.for_range_slice(builder, whole, count, _INDEX(1)) as (at, _):
            add(
                total,
                Value(builder, builder.load(builder.gep(_Memory(context, builder, x, x_, 1).data, [at]))).to(double),
            )
        found, lost = total.get()
        return (found + lost).value

    return types.float64(x, types.int64), build
