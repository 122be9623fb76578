"""What a loop is called with, as it reads it."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from . import ARGUMENTS, HIT, Arguments
from .simd import DOUBLE, INT64, Array, Value, constant, where

_ELEMENTS = {np.dtype(np.int64): INT64, np.dtype(np.float64): DOUBLE}


class Call(NamedTuple):
    """What a loop works on, see `loops`: everything, or what belongs to some of the outer indices."""

    told: Any  # `Arguments` of a `Value` each, int64 or float64
    outer: Value  # how many outer indices
    x: Array
    label: Array
    per_row: Array
    q: Array
    answers: Array
    out: Array
    workspace: Array

    def asks(self, bits: int) -> Value:
        """Whether the job has one of these bits."""
        asked: Value = (self.told.job & bits) != 0
        return asked

    def part(self, start: Value, count: Value) -> Call:
        """What belongs to `count` outer indices from `start` on, if each has one row.

        Only the labels get their new length; of the other arrays it matters only whether it is 0.
        """
        told, label = self.told, self.label
        return self._replace(
            outer=count,
            x=self.x.part(start * told.x_outer, self.x.length),
            label=label.part(start, where(label.length != 0, count, 0)),
            answers=self.answers.part(start, self.answers.length),
            out=self.out.part(start * told.out_outer, self.out.length),
        )

    def answers_of(self, kind: int, first: Value, count: Value | int) -> Array:
        """Where the numbers of some rows go, or are if the stats are given."""
        each = self.answers.length // (HIT + 1) if kind else constant(0)
        return self.answers.part(each * kind + first, count)


def told_in(record: Array) -> Any:
    """The fields of a record of ARGUMENTS, which is seen as bytes."""
    places = (ARGUMENTS.fields[name] for name in Arguments._fields)  # type: ignore[index]
    return Arguments._make(record.region(_ELEMENTS[kind], start, 1).load(0) for kind, start, *_ in places)
