"""From a Python function that emits instructions to a function of machine code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import binding, ir

from . import AXES, DATA, ITEMS, POINTER, SHAPE, processor
from .simd import ADDRESS, DOUBLE, INT32, INT64, Array, Value, Variable, constant, emitting, give, loop


def machine_code(name: str, elements: list[Any], body: Callable[..., Value]) -> bytes:
    """An object file with a C function of that name, which takes a tuple of arrays with these elements.

    The function returns what `body` returns for the arrays, each as an `Array`: a number in float64. It needs no
    interpreter: an array that is in a tuple stays where it is, and nobody may change its shape meanwhile.
    """
    machine, module = processor.target_machine(), ir.Module()
    module.triple, module.data_layout = processor.triple(), str(machine.target_data)
    function = ir.Function(module, ir.FunctionType(DOUBLE, [ADDRESS]), name)
    with emitting(function):
        given = Value(function.args[0])
        give(body(*(_argument(given, number, element) for number, element in enumerate(elements))))
    with binding.parse_assembly(str(module), binding.create_context()) as parsed:
        parsed.verify()
        _optimize(machine, parsed)
        return _emitted(machine, parsed)


def _argument(given: Value, number: int, element: Any) -> Array:
    """One of the arrays in a tuple, seen as flat."""
    array = given.at(ITEMS + number * POINTER, ADDRESS)
    length, shape = Variable(constant(1)), array.at(SHAPE, ADDRESS)
    for axis in loop(array.at(AXES, INT32).to(INT64)):
        length.set(length.get() * shape.at(axis * POINTER, INT64))
    return Array(element, array.at(DATA, element.as_pointer()).value, length.get())


def _optimize(machine: Any, module: Any) -> None:
    builder = binding.create_pass_builder(machine, binding.create_pipeline_tuning_options(speed_level=3))
    builder.getModulePassManager().run(module, builder)


def _emitted(machine: Any, module: Any) -> bytes:
    return bytes(machine.emit_object(module))
