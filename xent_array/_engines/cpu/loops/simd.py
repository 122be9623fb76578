"""Scalars, vectors and memory as LLVM sees them, in Python's syntax: the building blocks of every loop.

An `operation` is a Python function that emits machine code when Numba compiles a call of it. Its annotations declare
its arguments: `Array`, `Index`, `Flag`, `Real`, or a named tuple of these, which compiled code builds like any other.
In an operation every scalar or vector is a `Value`: Python's operators on it emit instructions, `for k in loop(n)`
emits a loop, and `with when(condition)` a branch. The instructions for a vector are those for a scalar, in the same
order, so a row has the same bits wherever it is processed. LLVM chooses the vector instructions of the processor, and
reorders no floating-point arithmetic.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import numpy as np
from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numba.np.arrayobj import populate_array

from ..memory import LINE as LINE
from . import AXES, DATA, ITEMS, LIMIT, NEXT, POINTER, SHAPE

INT1, INT16, INT32, INT64 = (ir.IntType(width) for width in (1, 16, 32, 64))
HALF, FLOAT, DOUBLE = ir.HalfType(), ir.FloatType(), ir.DoubleType()
_BYTE = ir.IntType(8).as_pointer()

# Numba compiles one function at a time, under a lock.
_targets: list[tuple[Any, Any]] = []  # Numba's context and LLVM's builder for the function being generated


def target() -> Any:
    """What Numba compiles for."""
    return _targets[-1][0]


def _builder() -> Any:
    return _targets[-1][1]


def has_feature(name: str) -> bool:
    """Whether the processor has a feature, by LLVM's name for it."""
    return f"+{name}" in target().codegen().magic_tuple()[2].split(",")


class Value:
    """A number or truth value, or a vector of them, in the function being generated."""

    __hash__ = None  # type: ignore[assignment]

    def __init__(self, value: Any) -> None:
        self.value = value

    @property
    def lanes(self) -> int:
        """The number of elements; 1 for a scalar."""
        return getattr(self.value.type, "count", 1)

    @property
    def element(self) -> Any:
        return getattr(self.value.type, "element", self.value.type)

    @property
    def is_single(self) -> bool:
        return isinstance(self.element, ir.FloatType)

    @property
    def is_float(self) -> bool:
        return not isinstance(self.element, ir.IntType)

    def like(self, number: float | int, element: Any = None) -> Value:
        """The number in every lane of a vector of this length; of another type if one is given."""
        return constant(number, element or self.element, self.lanes)

    def fixed(self, number: float) -> Value:
        """`like`, for a constant that is kept in a register or in memory throughout a loop.

        LLVM would otherwise rebuild it at every use. An empty piece of inline assembly hides the value from LLVM.
        """
        builder = _builder()
        kept = builder.function.__dict__.setdefault("_fixed", {})
        key = str(self.value.type), number
        if key not in kept:
            with builder.goto_entry_block():
                bits = INT32 if self.is_single else INT64
                visible = builder.bitcast(constant(number, self.element).value, bits)
                hidden = builder.asm(ir.FunctionType(bits, [bits]), "", "=r,0", [visible], False)
                kept[key] = Value(builder.bitcast(hidden, self.element)).repeated(self.lanes).value
        return Value(kept[key])

    def opaque(self) -> Value:
        """The same value; an empty piece of inline assembly hides from LLVM how it was computed.

        This is for places where LLVM would rewrite the computation into a slower one. A vector is left as it is where
        the processor may have no registers of its length.
        """
        builder, type_, kind = _builder(), self.value.type, "r"
        if isinstance(type_, ir.VectorType):
            if not has_feature("avx"):
                return self
            kind = "v"
        return Value(builder.asm(ir.FunctionType(type_, [type_]), "", f"={kind},0", [self.value], False))

    def repeated(self, lanes: int) -> Value:
        """A vector with this scalar in every lane; the scalar itself if there is one lane."""
        if lanes == 1 or self.lanes == lanes:
            return self
        builder = _builder()
        alone = ir.Constant(ir.VectorType(self.element, lanes), ir.Undefined)
        alone = builder.insert_element(alone, self.value, INT32(0))
        return Value(builder.shuffle_vector(alone, alone, ir.Constant(ir.VectorType(INT32, lanes), [0] * lanes)))

    def shuffled(self, other: Value, order: list[int]) -> Value:
        """Lanes of this vector and another, numbered consecutively, in the given order."""
        where = ir.Constant(ir.VectorType(INT32, len(order)), order)
        return Value(_builder().shuffle_vector(self.value, other.value, where))

    def packed(self) -> Value:
        """The truth values of a vector as one integer, a bit each."""
        return Value(_builder().bitcast(self.value, ir.IntType(self.lanes)))

    def lane(self, number: int) -> Value:
        return Value(_builder().extract_element(self.value, INT32(number)))

    def bits(self, element: Any) -> Value:
        """The same bits, reinterpreted as another type of the same size."""
        return Value(_builder().bitcast(self.value, self._vector(element)))

    def to(self, element: Any) -> Value:
        """Converted to another type: floats are rounded, integers are sign-extended or truncated."""
        if self.element == element:
            return self
        builder, vector = _builder(), self._vector(element)
        if not self.is_float and isinstance(element, ir.IntType):
            change = builder.trunc if self.element.width > element.width else builder.sext
        elif self.is_float:
            change = builder.fptrunc if _SIZES[type(element)] < _SIZES[type(self.element)] else builder.fpext
        else:
            change = builder.sitofp
        return Value(change(self.value, vector))

    def unsigned_to(self, element: Any) -> Value:
        """An unsigned integer, zero-extended."""
        return Value(_builder().zext(self.value, self._vector(element)))

    def _vector(self, element: Any) -> Any:
        return ir.VectorType(element, self.lanes) if isinstance(self.value.type, ir.VectorType) else element

    def _operand(self, other: Any) -> Any:
        return other.value if isinstance(other, Value) else self.like(other).value

    def _arithmetic(self, other: Any, of_floats: str, of_integers: str, swapped: bool = False) -> Value:
        operands = self.value, self._operand(other)
        operate = getattr(_builder(), of_floats if self.is_float else of_integers)
        return Value(operate(*(reversed(operands) if swapped else operands)))

    def __add__(self, other: Any) -> Value:
        return self._arithmetic(other, "fadd", "add")

    def __radd__(self, other: Any) -> Value:
        return self._arithmetic(other, "fadd", "add", swapped=True)

    def __sub__(self, other: Any) -> Value:
        return self._arithmetic(other, "fsub", "sub")

    def __rsub__(self, other: Any) -> Value:
        return self._arithmetic(other, "fsub", "sub", swapped=True)

    def __mul__(self, other: Any) -> Value:
        return self._arithmetic(other, "fmul", "mul")

    def __rmul__(self, other: Any) -> Value:
        return self._arithmetic(other, "fmul", "mul", swapped=True)

    def __truediv__(self, other: Any) -> Value:
        return self._arithmetic(other, "fdiv", "")

    def __floordiv__(self, other: Any) -> Value:
        return self._arithmetic(other, "", "sdiv")

    def __mod__(self, other: Any) -> Value:
        return self._arithmetic(other, "", "srem")

    def __neg__(self) -> Value:
        return Value(_builder().fneg(self.value))

    def __and__(self, other: Any) -> Value:
        return self._arithmetic(other, "", "and_")

    def __or__(self, other: Any) -> Value:
        return self._arithmetic(other, "", "or_")

    def __invert__(self) -> Value:
        return Value(_builder().not_(self.value))

    def __lshift__(self, other: Any) -> Value:
        return self._arithmetic(other, "", "shl")

    def __rshift__(self, other: Any) -> Value:
        """A logical shift."""
        return self._arithmetic(other, "", "lshr")

    def _compared(self, sign: str, other: Any) -> Value:
        """False where either float is NaN."""
        builder = _builder()
        compare = builder.fcmp_ordered if self.is_float else builder.icmp_signed
        return Value(compare(sign, self.value, self._operand(other)))

    def __lt__(self, other: Any) -> Value:
        return self._compared("<", other)

    def __gt__(self, other: Any) -> Value:
        return self._compared(">", other)

    def __ge__(self, other: Any) -> Value:
        return self._compared(">=", other)

    def __eq__(self, other: Any) -> Value:  # type: ignore[override]
        return self._compared("==", other)

    def __ne__(self, other: Any) -> Value:  # type: ignore[override]
        return self._compared("!=", other)

    def with_one_nan(self) -> Value:
        """Every NaN replaced by the same one; which one arithmetic produces depends on the processor."""
        return where(self == self, self, math.nan)

    def horner(self, coefficients: list[float]) -> Value:
        """A polynomial in this value by Horner's scheme, highest coefficient first."""
        value = self.fixed(coefficients[0])
        for coefficient in coefficients[1:]:
            value = fma(value, self, self.fixed(coefficient))
        return value

    def estrin(self, coefficients: list[float]) -> Value:
        """The same with fewer dependent steps: pairs, as in Estrin's scheme, then Horner's scheme in the square.

        If the number of coefficients is odd, the first three form a group.
        """
        square, rest = self * self, coefficients[3:]
        value = self.horner(coefficients[:3])
        for pair in zip(rest[::2], rest[1::2], strict=True):
            value = fma(value, square, self.horner([*pair]))
        return value


_SIZES = {ir.HalfType: 16, ir.FloatType: 32, ir.DoubleType: 64}


def constant(number: float | int, element: Any = INT64, lanes: int = 1) -> Value:
    """A constant; in every lane of a vector if there are several."""
    if isinstance(element, ir.FloatType):
        number = float(np.float32(number))
    if lanes == 1:
        return Value(ir.Constant(element, number))
    return Value(ir.Constant(ir.VectorType(element, lanes), [number] * lanes))


def counting(element: Any, lanes: int) -> Value:
    """0, 1, 2, … in the lanes of a vector."""
    return Value(ir.Constant(ir.VectorType(element, lanes), [*range(lanes)]))


def where(condition: Value, value: Any, otherwise: Any) -> Value:
    """`value` in the lanes where the condition holds, else `otherwise`; one of the two may be a Python number."""
    value = value if isinstance(value, Value) else otherwise.like(value)
    otherwise = otherwise if isinstance(otherwise, Value) else value.like(otherwise)
    return Value(_builder().select(condition.value, value.value, otherwise.value))


def smaller(one: Value, two: Any) -> Value:
    return where(one < two, one, two)


def fma(x: Value, by: Value, plus: Value) -> Value:
    """``x * by + plus``, rounded once if the processor does that just as fast."""
    builder, type_ = _builder(), x.value.type
    name = f"llvm.fmuladd.{f'v{x.lanes}' if isinstance(type_, ir.VectorType) else ''}{x.element.intrinsic_name}"
    function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(type_, [type_] * 3), name)
    return Value(builder.call(function, [x.value, by.value, plus.value]))


def first_set_bit(bits: Value) -> Value:
    return Value(_builder().cttz(bits.value, INT1(0)))


class Variable:
    """A value that a loop or a branch changes."""

    def __init__(self, value: Value) -> None:
        self.slot = cgutils.alloca_once_value(_builder(), value.value)

    def get(self) -> Value:
        return Value(_builder().load(self.slot))

    def set(self, value: Value) -> None:
        _builder().store(value.value, self.slot)


# Loops and branches


def loop(start: Value | int, stop: Value | int | None = None, step: int = 1) -> Iterator[Value]:
    """``for k in loop(...)`` emits a loop; it takes the arguments of `range`. The body must not break."""
    if stop is None:
        start, stop = 0, start
    bounds = (bound.value if isinstance(bound, Value) else INT64(bound) for bound in (start, stop, step))
    with cgutils.for_range_slice(_builder(), *bounds) as (index, _):
        yield Value(index)


def search(count: Value) -> Iterator[tuple[Value, Callable[[], None]]]:
    """A loop of `count` rounds; each yields the index, and a function that emits a break."""
    with cgutils.for_range(_builder(), count.value) as found:
        yield Value(found.index), found.do_break


def vectors(count: Value, lanes: int) -> Iterator[tuple[Value, int]]:
    """A loop over `count` elements in vectors of so many lanes, and one over the rest; emits the body twice."""
    whole = count & -lanes
    for start, stop, step in ((constant(0), whole, lanes), (whole, count, 1)):
        for place in loop(start, stop, step):
            yield place, step


@contextmanager
def when(condition: Value) -> Iterator[None]:
    with _builder().if_then(condition.value):
        yield


@contextmanager
def either(condition: Value) -> Iterator[tuple[Any, Any]]:
    """``with either(condition) as (yes, no)``, followed by the two branches, ``with yes:`` and ``with no:``."""
    with _builder().if_else(condition.value) as branches:
        yield branches


# Memory


class Array:
    """Contiguous elements in memory; 16-bit floats are seen as uint16."""

    def __init__(self, dtype: Any, data: Any, length: Value) -> None:
        self.dtype, self.data, self.length = dtype, data, length

    @property
    def element(self) -> Any:
        return self.data.type.pointee

    @property
    def size(self) -> int:
        """The size of an element in bytes."""
        return int(self.dtype.bitwidth // 8)

    @property
    def line(self) -> int:
        """The number of elements in a cache line."""
        return LINE // self.size

    def pointer(self, place: Value | int, lanes: int = 1) -> Any:
        builder = _builder()
        pointer = builder.gep(self.data, [place.value if isinstance(place, Value) else INT64(place)])
        return pointer if lanes == 1 else builder.bitcast(pointer, ir.VectorType(self.element, lanes).as_pointer())

    def load(self, place: Value | int, lanes: int = 1) -> Value:
        return Value(_builder().load(self.pointer(place, lanes), align=self.size))

    def store(self, value: Value, place: Value | int) -> None:
        _builder().store(value.value, self.pointer(place, value.lanes), align=self.size)

    def load_first(self, count: Value, place: Value, otherwise: Value) -> Value:
        """A vector whose first `count` elements are loaded, touching no other memory; the rest are from `otherwise`."""
        return Value(self._masked("load", otherwise.value.type, [], count, place, [otherwise.value]))

    def store_first(self, count: Value, value: Value, place: Value) -> None:
        """Store the first `count` elements of a vector."""
        self._masked("store", ir.VoidType(), [value.value], count, place, [])

    def _masked(self, what: str, result: Any, before: list[Any], count: Value, place: Value, after: list[Any]) -> Any:
        builder, lanes, index = _builder(), self.line, ir.IntType(8 * self.size)
        mask = counting(index, lanes) < count.to(index).repeated(lanes)
        arguments = [*before, self.pointer(place, lanes), INT32(self.size), mask.value, *after]
        name = f"v{lanes}{self.element.intrinsic_name}"
        type_ = ir.FunctionType(result, [argument.type for argument in arguments])
        function = cgutils.get_or_insert_function(builder.module, type_, f"llvm.masked.{what}.{name}.p0{name}")
        return builder.call(function, arguments)

    def stream(self, value: Value, place: Value) -> None:
        """Store past the caches, with a non-temporal hint; a vector must fill a cache line. Needs a `fence`."""
        builder = _builder()
        stored = builder.store(
            value.value, self.pointer(place, value.lanes), align=LINE if value.lanes > 1 else self.size
        )
        if value.lanes > 1:
            stored.set_metadata("nontemporal", builder.module.add_metadata([INT32(1)]))

    def address(self, place: Value | int = 0) -> Value:
        """The address of an element, for `prefetch`."""
        return Value(_builder().bitcast(self.pointer(place), _BYTE))

    def part(self, start: Value | int, count: int) -> Array:
        return Array(self.dtype, self.pointer(start), constant(count))

    def before_line(self) -> Value:
        """How many elements precede the first cache line boundary."""
        address = Value(_builder().ptrtoint(self.data, INT64))
        return ((0 - address) & (LINE - 1)) // self.size


def on_stack(dtype: Any, count: int) -> Array:
    context, builder = _targets[-1]
    kind = context.get_data_type(dtype)
    room = cgutils.alloca_once(builder, ir.ArrayType(kind, count))
    return Array(dtype, builder.bitcast(room, kind.as_pointer()), constant(count))


def prefetch(address: Value, offset: Value | int, will_be: str) -> None:
    """Prefetch the cache line at an address plus an offset in bytes, to be "read" or "written"."""
    builder = _builder()
    type_ = ir.FunctionType(ir.VoidType(), [_BYTE, INT32, INT32, INT32])
    function = cgutils.get_or_insert_function(builder.module, type_, "llvm.prefetch.p0i8")
    pointer = builder.gep(address.value, [offset.value if isinstance(offset, Value) else INT64(offset)])
    builder.call(function, [pointer, INT32(("read", "written").index(will_be)), INT32(3), INT32(1)])


# Operations


Index = Annotated[Value, types.int64]
Flag = Annotated[Value, types.boolean]
Real = Annotated[Value, types.float64]
Number = Annotated[Value, None]  # of the type it is given in
Two = Annotated[tuple[Value, Value], types.UniTuple(types.int64, 2)]
Four = Annotated[tuple[Value, Value, Value, Value], types.UniTuple(types.float64, 4)]


class Operands:
    """An argument: a tuple of arrays, and of scalars that are broadcast."""

    def __init__(self, types_: Any, packed: Any) -> None:
        self.operands = [(type_, _builder().extract_value(packed, k)) for k, type_ in enumerate(types_)]

    def load(self, dtype: Any, place: Value, lanes: int) -> list[Value]:
        """A vector of each, starting at an index, as numbers of `dtype`."""
        context, builder = _targets[-1]
        found = []
        for type_, operand in self.operands:
            if isinstance(type_, types.Array):
                value = _wrapped(Array, type_, operand).load(place, lanes)
                found.append(value.to(context.get_data_type(dtype)) if isinstance(dtype, types.Integer) else value)
            else:
                found.append(Value(context.cast(builder, operand, type_, dtype)).repeated(lanes))
        return found


def _wrapped(kind: Any, type_: Any, value: Any) -> Any:
    """An argument, of Numba's type `type_`, in the form an operation takes."""
    context, builder = _targets[-1]
    if kind is Array:
        made = context.make_array(type_)(context, builder, value)
        return Array(type_.dtype, made.data, Value(builder.extract_value(made.shape, 0)))
    if kind is Operands:
        return Operands(type_, value)
    if get_origin(kind) is Annotated:
        wanted = get_args(kind)[1]
        return Value(value if wanted is None else context.cast(builder, value, type_, wanted))
    fields = get_type_hints(kind, include_extras=True)
    parts = (builder.extract_value(value, k) for k in range(len(fields)))
    return kind(*map(_wrapped, fields.values(), type_, parts))


def operation(function: Callable[..., Any]) -> Any:
    """A function that compiled code can call, made of what `function` emits."""
    hints = get_type_hints(function, include_extras=True)
    answer = hints.pop("return")
    result = types.void if answer is type(None) else get_args(answer)[1]
    wanted = [get_args(kind)[1] if get_origin(kind) is Annotated else None for kind in hints.values()]

    def typed(_context: Any, *given: Any) -> Any:
        def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            _targets.append((context, builder))
            try:
                found = function(*map(_wrapped, hints.values(), signature.args, arguments))
            finally:
                _targets.pop()
            if isinstance(found, tuple):
                return context.make_tuple(builder, signature.return_type, [value.value for value in found])
            return context.get_dummy_value() if found is None else found.value

        return result(*(type_ or has for type_, has in zip(wanted, given, strict=True))), build

    parameters = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in ("_context", *hints)]
    typed.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    typed.__name__, typed.__doc__ = function.__name__, function.__doc__
    return intrinsic(typed)


@operation
def make_compact() -> None:
    """Ask LLVM to optimize for size: unrolling loops that are vectorized already gains nothing."""
    _builder().function.attributes.add("optsize")


@operation
def make_inline() -> None:
    """Have LLVM make this a part of its caller, and optimize it for size; a call would pass every array by memory."""
    for attribute in ("alwaysinline", "optsize"):
        _builder().function.attributes.add(attribute)


@operation
def fence() -> None:
    """Order non-temporal stores before all later stores."""
    _builder().fence("seq_cst")


def has_default_arithmetic() -> Value:
    """Whether the thread's rounding mode and flush-to-zero flags have their defaults; True if that is unknown."""
    builder = _builder()
    triple = builder.module.triple
    if triple.startswith("x86_64"):
        settings = cgutils.alloca_once(builder, INT32)
        type_ = ir.FunctionType(ir.VoidType(), [cgutils.voidptr_t])
        store = cgutils.get_or_insert_function(builder.module, type_, "llvm.x86.sse.stmxcsr")
        builder.call(store, [builder.bitcast(settings, cgutils.voidptr_t)])
        word, mask = Value(builder.load(settings)), 0xE040  # flush to zero, rounding mode, denormals are zero
    elif triple.startswith(("aarch64", "arm64")):
        word = Value(builder.asm(ir.FunctionType(INT64, []), "mrs $0, fpcr", "=r", [], True))
        mask = 0x1C00003  # FZ, RMode; AH and FIZ
    else:
        return constant(1, INT1)
    return (word & mask) == 0


# Parts of arrays


@intrinsic
def part(_context: Any, array: Any, start: Any, count: Any) -> Any:
    """``array[start : start + count]``, without a bounds check."""
    return types.Array(array.dtype, 1, "C")(array, types.int64, types.int64), _part


def _part(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    array, start, count = arguments[:3]
    holds = context.make_array(signature.args[0])(context, builder, array)
    made = context.make_array(signature.return_type)(context, builder)
    pointer = builder.bitcast(builder.gep(holds.data, [start]), made.data.type)
    size = INT64(context.get_abi_sizeof(made.data.type.pointee))
    populate_array(made, data=pointer, shape=[count], strides=[size], itemsize=size, meminfo=None)
    return made._getvalue()


def _region(dtype: Callable[[Any], Any]) -> Any:
    @intrinsic
    def region(_context: Any, memory: Any, start: Any, count: Any, like: Any) -> Any:
        """`count` elements starting at byte `start` of an array of bytes; their type follows from the array `like`."""
        return types.Array(dtype(like.dtype), 1, "C")(memory, types.int64, types.int64, like), _part

    return region


numbers_in = _region(lambda dtype: dtype)
doubles_in = _region(lambda _: types.float64)
places_in = _region(lambda dtype: types.Integer.from_bitwidth(dtype.bitwidth))  # integers as wide as the numbers


# The way in from Python


def arrays_in(dtypes: list[Any]) -> Any:
    """A function for compiled code that takes the address of a tuple of arrays, and returns them as flat arrays.

    It needs no interpreter: an array that is in a tuple stays where it is, and nobody may change its shape meanwhile.
    """
    wanted = [types.Array(dtype, 1, "C") for dtype in dtypes]

    @intrinsic
    def arrays(_context: Any, given: Any) -> Any:
        return types.Tuple(wanted)(given), build

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        def read(address: Any, offset: int, type_: Any) -> Any:
            return builder.load(builder.bitcast(builder.gep(address, [INT64(offset)]), type_.as_pointer()))

        found = []
        for number, type_ in enumerate(wanted):
            array = read(arguments[0], ITEMS + number * POINTER, _BYTE)
            length, shape = cgutils.alloca_once_value(builder, INT64(1)), read(array, SHAPE, _BYTE)
            with cgutils.for_range(builder, read(array, AXES, INT32)) as axis:
                place = builder.mul(builder.sext(axis.index, INT64), INT64(POINTER))
                side = builder.load(builder.bitcast(builder.gep(shape, [place]), INT64.as_pointer()))
                builder.store(builder.mul(builder.load(length), side), length)
            made = context.make_array(type_)(context, builder)
            size = INT64(context.get_abi_sizeof(made.data.type.pointee))
            data = builder.bitcast(read(array, DATA, _BYTE), made.data.type)
            populate_array(made, data=data, shape=[builder.load(length)], strides=[size], itemsize=size, meminfo=None)
            found.append(made._getvalue())
        return context.make_tuple(builder, signature.return_type, found)

    return arrays


@operation
def next_turn(turns: Array, least: Index, most: Index, team: Index) -> Two:
    """Take the next rows from a counter, see `loops`; return the first of them, or -1 if none are left, and how many.

    Turns shrink, so that threads that start at different times still finish together.
    """
    builder, first, count = _builder(), Variable(constant(-1)), Variable(constant(0))
    for _, stop_search in search(constant(2**62)):
        limit, start = (Value(builder.load_atomic(turns.pointer(place), "monotonic", 8)) for place in (LIMIT, NEXT))
        left = limit - start
        with when(~(left > 0)):
            stop_search()
        share = smaller(left // team, most)
        share = smaller(where(share < least, least, share), left)
        taken = builder.cmpxchg(turns.pointer(NEXT), start.value, (start + share).value, "monotonic", "monotonic")
        with when(Value(builder.extract_value(taken, 1))):
            first.set(start)
            count.set(share)
            stop_search()
    return first.get(), count.get()


@operation
def end_turns(turns: Array) -> None:
    """Leave no rows to take."""
    _builder().store_atomic(INT64(0), turns.pointer(LIMIT), "monotonic", 8)


def machine_code(compiled: Any, name: str) -> bytes:
    """An object file with a C function of that name, which calls what Numba compiled, a function of one pointer."""
    context, described = compiled.target_context, compiled.fndesc
    module = context.create_module(name)
    called = context.call_conv.get_function_type(described.restype, described.argtypes)
    called = ir.Function(module, called, described.llvm_func_name)
    function = ir.Function(module, ir.FunctionType(DOUBLE, [_BYTE]), name)
    builder = ir.IRBuilder(function.append_basic_block())
    _, result = context.call_conv.call_function(
        builder, called, described.restype, described.argtypes, function.args
    )  # there is no error that it could report
    builder.ret(result)
    whole = binding.parse_assembly(compiled.library.get_llvm_str())
    whole.link_in(binding.parse_assembly(str(module)))
    found: bytes = context.codegen()._tm.emit_object(whole)
    return found
