"""From the loops to functions of machine code that Python can call, each with a tuple of arrays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from numba import from_dtype, njit, types

from . import ARGUMENTS, CHECK, GROUP, IGNORE, NAME, contiguous, strided, transposed
from .elementwise import combined, kept_labels, total_of
from .jit import OPTIONS
from .simd import arrays_in, end_turns, machine_code, next_turn, part

_LOOPS = {"contiguous": contiguous, "transposed": transposed, "strided": strided}


class Call(NamedTuple):
    """What a loop is called with; see `loops`."""

    told: Any  # the record
    outer: Any  # how many outer indices
    x: Any
    label: Any
    per_row: Any
    q: Any
    answers: Any
    out: Any
    workspace: Any


def build(name: str, *dtypes: str) -> bytes:
    """The machine code of one of `_ENTRIES`: of a loop for numbers, logits and a gradient of these dtypes."""
    entry = njit(**OPTIONS)(_ENTRIES[name](name, *(getattr(types, dtype) for dtype in dtypes)))
    signature = (types.voidptr,)
    entry.compile(signature)
    return machine_code(entry.overloads[signature], NAME)


def _loop(name: str, number: Any, x: Any, out: Any) -> Callable[[Any], Any]:
    rows = _LOOPS[name].rows
    arrays = arrays_in(
        [from_dtype(ARGUMENTS), x, types.intp, number, number, number, out, types.uint8, types.int64, types.float64]
    )

    def entry(given):
        arguments, x, label, per_row, q, answers, out, workspace, turns, sums = arrays(given)
        told = arguments[0]
        is_alone, taken = turns.shape[0] == 0, 0
        while taken < told.quota or is_alone:
            count, x_there, label_there, answers_there, out_there = told.outer, x, label, answers, out
            if not is_alone:
                start, count = next_turn(turns, told.least, told.most, told.team)
                if start < 0:
                    break
                taken += count
                x_there, label_there = part(x, start * told.x_outer, count), part(label, start, count)
                answers_there, out_there = part(answers, start, count), part(out, start * told.out_outer, out.shape[0])
            total = rows(Call(told, count, x_there, label_there, per_row, q, answers_there, out_there, workspace))
            if is_alone:
                return total
            if told.job & CHECK and total < 0:
                end_turns(turns)
                return total
            if sums.shape[0]:
                sums[start // GROUP] = total
        return 0.0

    return entry


def _total(_: str, number: Any) -> Callable[[Any], Any]:
    arrays = arrays_in([number])

    def entry(given):
        (x,) = arrays(given)
        return total_of(x)

    return entry


def _count_kept(_: str) -> Callable[[Any], Any]:
    arrays = arrays_in([types.intp, from_dtype(ARGUMENTS)])

    def entry(given):
        label, arguments = arrays(given)
        told = arguments[0]
        return float(kept_labels(label, told.classes, told.ignore_index, told.job & IGNORE != 0))

    return entry


def _combined(_: str) -> Callable[[Any], Any]:
    arrays = arrays_in([types.float64])

    def entry(given):
        (sums,) = arrays(given)
        return combined(sums)

    return entry


_ENTRIES: dict[str, Callable[..., Callable[[Any], Any]]] = {
    **dict.fromkeys(_LOOPS, _loop),
    "total": _total,
    "combined": _combined,
    "count_kept": _count_kept,
}
