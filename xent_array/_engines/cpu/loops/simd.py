"""Scalars, vectors and memory as LLVM sees them, in Python's syntax: the building blocks of every loop.

A loop is a Python function that runs once, when machine code is made, and emits LLVM's instructions. In it every scalar
or vector is a `Value`: Python's operators on it emit instructions, `for k in loop(n)` emits a loop, and
`with when(condition)` a branch, while `if` and `for` of Python numbers decide what is emitted. A `Variable` holds what
loops and branches change. The instructions for a vector are those for a scalar, in the same order, so a row has the
same bits wherever it is processed. LLVM chooses the vector instructions of the processor, and reorders no
floating-point arithmetic.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from llvmlite import ir

from ..memory import LINE as LINE
from . import processor

BIT, BYTE, INT16, INT32, INT64 = (ir.IntType(width) for width in (1, 8, 16, 32, 64))
HALF, FLOAT, DOUBLE = ir.HalfType(), ir.FloatType(), ir.DoubleType()
ADDRESS = BYTE.as_pointer()


class _Own(threading.local):
    builder: Any = None  # of the function that this thread makes


_own = _Own()


def _builder() -> Any:
    return _own.builder


@contextmanager
def emitting(function: Any) -> Iterator[None]:
    """Within it, instructions are emitted to this function."""
    _own.builder = ir.IRBuilder(function.append_basic_block())
    try:
        yield
    finally:
        _own.builder = None


class Value:
    """A number or truth value, or a vector of them, in the function being generated."""

    __hash__ = None  # type: ignore[assignment]

    def __init__(self, value: Any) -> None:
        self.value = value

    def __bool__(self) -> bool:
        raise TypeError("a Value is known only when the loop runs: use where, when or either, and &, | and ~")

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
            if not processor.has_feature("avx"):
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

    def at(self, offset: Value | int, type_: Any) -> Value:
        """What lies so many bytes from this address."""
        builder = _builder()
        return Value(builder.load(builder.bitcast(builder.gep(self.value, [_value(offset).value]), type_.as_pointer())))

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
            change = builder.fptrunc if _SIZES[element] < _SIZES[self.element] else builder.fpext
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
        operands, name = (self.value, self._operand(other)), of_floats if self.is_float else of_integers
        if not name:
            raise TypeError(f"numbers of type {self.value.type} have no such operator")
        operate = getattr(_builder(), name)
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
        return Value(_builder().fneg(self.value) if self.is_float else _builder().neg(self.value))

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


_SIZES = {BYTE: 8, INT16: 16, INT32: 32, INT64: 64, HALF: 16, FLOAT: 32, DOUBLE: 64}


def constant(number: float | int, element: Any = INT64, lanes: int = 1) -> Value:
    """A constant; in every lane of a vector if there are several."""
    if isinstance(element, ir.FloatType):
        number = float(np.float32(number))
    if isinstance(element, ir.IntType) and number != int(number):
        raise TypeError(f"{number} is no integer, and numbers of type {element} are")
    if lanes == 1:
        return Value(ir.Constant(element, number))
    return Value(ir.Constant(ir.VectorType(element, lanes), [number] * lanes))


def _value(number: Value | int) -> Value:
    return number if isinstance(number, Value) else constant(number)


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
    type_ = x.value.type
    name = f"llvm.fmuladd.{f'v{x.lanes}' if isinstance(type_, ir.VectorType) else ''}{x.element.intrinsic_name}"
    return Value(_call(name, type_, x.value, by.value, plus.value))


def _call(name: str, result: Any, *arguments: Any) -> Any:
    """Call one of LLVM's own functions."""
    builder = _builder()
    function = builder.module.globals.get(name)
    if function is None:
        function = ir.Function(builder.module, ir.FunctionType(result, [given.type for given in arguments]), name)
    return builder.call(function, arguments)


def first_set_bit(bits: Value) -> Value:
    return Value(_builder().cttz(bits.value, BIT(0)))


class Variable:
    """A value that a loop or a branch changes."""

    def __init__(self, value: Value) -> None:
        self.slot = _on_stack(value.value.type)
        self.set(value)

    def get(self) -> Value:
        return Value(_builder().load(self.slot))

    def set(self, value: Value) -> None:
        _builder().store(value.value, self.slot)


def _on_stack(type_: Any) -> Any:
    """The address of room for a value, one for every call of the function, even if this is in a loop."""
    builder = _builder()
    with builder.goto_entry_block():
        return builder.alloca(type_)


# Loops and branches


def loop(start: Value | int, stop: Value | int | None = None, step: Value | int = 1) -> Iterator[Value]:
    """``for k in loop(...)`` emits a loop; it takes the arguments of `range`.

    The body must not break, and what it or a branch computes is unknown after it: only a `Variable` keeps it.
    """
    if stop is None:
        start, stop = 0, start
    for index, _ in _loop(_value(start), _value(stop), _value(step)):
        yield index


def search(count: Value) -> Iterator[tuple[Value, Callable[[], None]]]:
    """A loop of `count` rounds; each yields the index, and a function that emits a break: the last of a branch."""
    return _loop(constant(0), count, constant(1))


def _loop(start: Value, stop: Value, step: Value) -> Iterator[tuple[Value, Callable[[], None]]]:
    builder = _builder()
    before, (test, body, end) = builder.block, (builder.append_basic_block(name) for name in ("test", "body", "end"))
    builder.branch(test)
    builder.position_at_end(test)
    index = builder.phi(INT64)
    builder.cbranch(builder.icmp_signed("<", index, stop.value), body, end)
    builder.position_at_end(body)
    yield Value(index), lambda: builder.branch(end)
    index.add_incoming(start.value, before)
    index.add_incoming(builder.add(index, step.value), builder.block)
    builder.branch(test)
    builder.position_at_end(end)


def forever() -> Iterator[Callable[[], None]]:
    """A loop without end; yields a function that emits a break: the last of a branch."""
    builder, (body, end) = _builder(), (_builder().append_basic_block(name) for name in ("body", "end"))
    builder.branch(body)
    builder.position_at_end(body)
    yield lambda: builder.branch(end)
    builder.branch(body)
    builder.position_at_end(end)


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
    """Contiguous elements in memory; 16-bit floats are seen as integers of 16 bits."""

    def __init__(self, element: Any, data: Any, length: Value) -> None:
        self.element, self.data, self.length = element, data, length

    @property
    def size(self) -> int:
        """The size of an element in bytes."""
        return _SIZES[self.element] // 8

    @property
    def has_16_bits(self) -> bool:
        return bool(self.element == INT16)

    @property
    def line(self) -> int:
        """The number of elements in a cache line."""
        return LINE // self.size

    def pointer(self, place: Value | int, lanes: int = 1) -> Any:
        builder = _builder()
        pointer = builder.gep(self.data, [_value(place).value])
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
        lanes, index = self.line, ir.IntType(8 * self.size)
        mask = counting(index, lanes) < count.to(index).repeated(lanes)
        arguments = [*before, self.pointer(place, lanes), INT32(self.size), mask.value, *after]
        name = f"v{lanes}{self.element.intrinsic_name}"
        return _call(f"llvm.masked.{what}.{name}.p0{name}", result, *arguments)

    def stream(self, value: Value, place: Value) -> None:
        """Store past the caches, with a non-temporal hint; a vector must fill a cache line. Needs a `fence`."""
        builder = _builder()
        stored = builder.store(
            value.value, self.pointer(place, value.lanes), align=LINE if value.lanes > 1 else self.size
        )
        if value.lanes > 1:
            stored.set_metadata("nontemporal", builder.module.add_metadata([INT32(1)]))

    def load_atomic(self, place: int) -> Value:
        return Value(_builder().load_atomic(self.pointer(place), "monotonic", self.size))

    def store_atomic(self, value: Value, place: int) -> None:
        _builder().store_atomic(value.value, self.pointer(place), "monotonic", self.size)

    def replace_atomic(self, place: int, before: Value, after: Value) -> Value:
        """Store `after` if `before` is there, in one step; return whether it was."""
        builder = _builder()
        found = builder.cmpxchg(self.pointer(place), before.value, after.value, "monotonic", "monotonic")
        return Value(builder.extract_value(found, 1))

    def address(self, place: Value | int = 0) -> Value:
        """The address of an element, for `prefetch`."""
        return Value(_builder().bitcast(self.pointer(place), ADDRESS))

    def part(self, start: Value | int, count: Value | int) -> Array:
        """``array[start : start + count]``, without a bounds check."""
        return Array(self.element, self.pointer(start), _value(count))

    def region(self, element: Any, start: Value | int, count: Value | int) -> Array:
        """Of an array of bytes, `count` elements of another type, starting at byte `start`."""
        return Array(element, _builder().bitcast(self.pointer(start), element.as_pointer()), _value(count))

    def where(self, condition: Value, otherwise: Array) -> Array:
        """Itself if the condition holds, else the other array."""
        data = _builder().select(condition.value, self.data, otherwise.data)
        return Array(self.element, data, where(condition, self.length, otherwise.length))

    def before_line(self) -> Value:
        """How many elements precede the first cache line boundary."""
        address = Value(_builder().ptrtoint(self.data, INT64))
        return ((0 - address) & (LINE - 1)) // self.size


def on_stack(element: Any, count: int) -> Array:
    room = _on_stack(ir.ArrayType(element, count))
    return Array(element, _builder().bitcast(room, element.as_pointer()), constant(count))


def prefetch(address: Value, offset: Value | int, will_be: str) -> None:
    """Prefetch the cache line at an address plus an offset in bytes, to be "read" or "written"."""
    pointer, kind = _builder().gep(address.value, [_value(offset).value]), ("read", "written").index(will_be)
    _call("llvm.prefetch.p0i8", ir.VoidType(), pointer, INT32(kind), INT32(3), INT32(1))


def fence() -> None:
    """Order non-temporal stores before all later stores."""
    _builder().fence("seq_cst")


def has_default_arithmetic() -> Value:
    """Whether the thread's rounding mode and flush-to-zero flags have their defaults; True if that is unknown."""
    builder = _builder()
    if processor.is_x86():
        settings = _on_stack(INT32)
        _call("llvm.x86.sse.stmxcsr", ir.VoidType(), builder.bitcast(settings, ADDRESS))
        word, mask = Value(builder.load(settings)), 0xE040  # flush to zero, rounding mode, denormals are zero
    elif processor.is_arm():
        word = Value(_call("llvm.aarch64.get.fpcr", INT64))
        mask = 0x1C00003  # FZ, RMode; AH and FIZ
    else:
        return constant(1, BIT)
    return (word & mask) == 0


# Functions


def give(result: Value) -> None:
    """Return from the function; nothing may follow in the same branch."""
    _builder().ret(result.value)


def make_compact() -> None:
    """Ask LLVM to optimize for size: unrolling loops that are vectorized already gains nothing."""
    _builder().function.attributes.add("optsize")
