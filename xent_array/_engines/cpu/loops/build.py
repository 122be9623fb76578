"""From the loops to functions of machine code that Python can call, each with a tuple of arrays."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from . import CHECK, GROUP, IGNORE, NAME, STREAM, SUM, contiguous, strided, transposed
from .call import Call, told_in
from .elementwise import combined, kept_labels, total_of
from .function import machine_code
from .simd import (
    BYTE,
    DOUBLE,
    FLOAT,
    INT16,
    INT64,
    Array,
    Value,
    Variable,
    constant,
    fence,
    forever,
    give,
    when,
)
from .turns import end_turns, next_turn

_ELEMENTS = {"float32": FLOAT, "float64": DOUBLE, "uint16": INT16}


def build(name: str, *dtypes: str) -> bytes:
    """The machine code of a loop for numbers, logits and a gradient of these dtypes, or of one of `_OTHERS`."""
    given = [_ELEMENTS[dtype] for dtype in dtypes]
    if name in _LOOPS:
        number, x, out = given
        elements = [BYTE, x, INT64, number, number, number, out, BYTE, INT64, DOUBLE]
        entry, code = _LOOPS[name]
        return machine_code(NAME, elements, partial(entry, code.rows))
    elements, body = _OTHERS[name]
    return machine_code(NAME, [*elements, *given], body)


def _all_rows(rows: Callable[[Call], None], record: Array, *arrays: Array) -> Value:
    """A loop over all rows at once."""
    told = told_in(record)
    call = Call(told, told.outer, *arrays[:-2])
    rows(call)
    with when(call.asks(STREAM)):
        fence()
    return constant(0, DOUBLE)


def _in_turns(rows: Callable[[Call], None], record: Array, *arrays: Array) -> Value:
    """A loop over all rows at once or, if there are turns, over as many as can be taken; see `loops`."""
    *of_rows, turns, sums = arrays
    told, nothing, fault = told_in(record), constant(0, DOUBLE), constant(-1, DOUBLE)
    is_alone, taken = turns.length == 0, Variable(constant(0))
    for _ in forever():
        start, count = Variable(constant(0)), Variable(told.outer)
        with when(~is_alone):
            turn = next_turn(turns, told.least, told.most, told.team)
            for variable, value in zip((start, count), turn, strict=True):
                variable.set(value)
            with when(start.get() < 0):
                give(nothing)
        call = Call(told, told.outer, *of_rows).part(start.get(), count.get())
        with when(call.asks(CHECK)), when(kept_labels(call.label, told.classes) < 0):
            end_turns(turns)
            give(fault)
        rows(call)
        with when(call.asks(STREAM)):
            fence()
        total = Variable(nothing)
        with when(call.asks(SUM)):
            total.set(total_of(call.answers.part(0, call.outer)))
        with when(is_alone):
            give(total.get())
        with when(sums.length != 0):
            sums.store(total.get(), start.get() // GROUP)
        taken.set(taken.get() + call.outer)
        with when(~(taken.get() < told.quota)):
            give(nothing)
    return nothing


def _count_kept(label: Array, record: Array) -> Value:
    told = told_in(record)
    return kept_labels(label, told.classes, told.ignore_index, (told.job & IGNORE) != 0).to(DOUBLE)


_LOOPS = {"contiguous": (_in_turns, contiguous), "transposed": (_in_turns, transposed), "strided": (_all_rows, strided)}
_OTHERS: dict[str, tuple[list[Any], Callable[..., Value]]] = {
    "total": ([], total_of),
    "combined": ([DOUBLE], combined),
    "count_kept": ([INT64, BYTE], _count_kept),
}
