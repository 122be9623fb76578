"""Messages in the memory of a GPU: what the kernels of slices.cu do before and after processes exchange them.

A message is a head of 8-byte words, then numbers: see slices.cu. Nothing here waits for the device.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from ... import _rows
from ..._rows import Array, Rows, RowStats
from .. import cuda
from ..cuda import Cuda
from .exchange import Exchange, launcher_of

HEAD = 32  # bytes
THREADS, WARP = 128, 32
MOST = 1024  # processes
FAILED = 0  # in place of what is asked


class Say(NamedTuple):
    """The argument of SAY: field for field the struct in slices.cu."""

    message: Array | None
    question: int
    start: int
    classes: int
    rows: int
    fills: int
    correct: Array | None
    numbers: int
    counts: int
    divisor: float


class Slices(NamedTuple):
    """What follows a `Problem` in the argument of SLICES."""

    gathered: Array | None
    ranks: int
    length: int
    question: int


class Total(NamedTuple):
    """The argument of TOTAL."""

    gathered: Array | None
    ranks: int
    length: int
    question: int
    divisor_to: Array | None


class Form(NamedTuple):
    """The form of the messages of a call: numbers per row, of how many rows, of which dtype."""

    numbers: int
    rows: int
    dtype: str

    @property
    def head(self) -> int:
        return HEAD // (8 if self.dtype == "float64" else 4)

    @property
    def length(self) -> int:
        """Of a message, in numbers: whole words."""
        length = self.head + self.numbers * self.rows
        return length + length % 2

    def of(self, message: Array, k: int) -> Array:
        """The k-th number of every row."""
        start = self.head + k * self.rows
        return message[start : start + self.rows]


def form_of(rows: Rows, has_correct: bool) -> Form:
    return Form(4 + has_correct, rows.shape[0] * rows.shape[1], np.dtype(rows.acc).name)


def say(engine: Cuda, form: Form, question: int, message: Array, **what: Any) -> None:
    """Writes the head of a message, and `what` else `Say` can write."""
    count = form.rows if what.get("fills") or what.get("correct") is not None else 0
    nothing = Say(message, question, 0, 0, count, 0, None, form.numbers, 0, 0.0)
    kernel = cuda.exchange_kernels(form.dtype)["SAY"]
    engine.launch(nothing._replace(**what), kernel, max(1, -(-count // THREADS)), THREADS)


def say_nothing(engine: Cuda, form: Form, exchange: Exchange) -> None:
    """Takes part in an exchange with a message that makes NaN of what the others have."""
    message = engine.launcher.empty((form.length,), form.dtype)
    gathered = engine.launcher.empty((exchange.size, form.length), form.dtype)
    try:
        say(engine, form, FAILED, message)
    finally:
        exchange.gather(message, gathered, launcher_of(engine))


def stats_of_slice(engine: Cuda, rows: Rows, form: Form) -> tuple[Array, Array | None]:
    """(a message with the stats of this slice but without a head, `correct` if that is wanted)."""
    message = engine.launcher.empty((form.length,), form.dtype)
    correct = engine.launcher.empty(rows.shape, "bool") if form.numbers > 4 else None
    if not rows.classes or not form.rows:
        return message, None
    parts = [form.of(message, k) for k in range(4)]
    if rows.row_order is None:  # as they are in memory
        filled = RowStats(*(part.reshape(rows.shape) for part in parts))
        engine.stats(rows, filled._replace(correct=correct))
        return message, correct
    filled = RowStats(*(engine.launcher.empty(rows.shape, form.dtype) for _ in parts))
    made = engine.stats(rows, filled._replace(correct=correct))
    for part, to in zip(made[:4], parts, strict=True):
        engine.launcher.copy(_rows.in_order(rows, part), to)
    return message, None if correct is None else rows.xp.ascontiguousarray(_rows.in_order(rows, correct))


def merged(
    engine: Cuda, rows: Rows, form: Form, question: int, gathered: Array, losses: Array | None, partials: Array | None
) -> RowStats:
    """The stats of whole rows, from the messages of all processes; and the losses, if there is an array for them."""
    launcher = engine.launcher
    stats = RowStats(*(launcher.empty(rows.shape, form.dtype) for _ in range(4)))
    if form.numbers > 4:
        stats = stats._replace(correct=launcher.empty(rows.shape, "bool"))
    if not form.rows:
        return stats
    if rows.row_order is not None:
        gathered = _in_place_order(engine, rows, form, gathered)
    problem = cuda.said_of_rows(rows)._replace(
        loss=losses, max=stats.max, rest=stats.rest, gap=stats.gap, mass=stats.mass, correct=stats.correct,
        ticket=partials,
    )  # fmt: skip
    what = Slices(gathered, len(gathered), form.length, question)
    kernel = cuda.exchange_kernels(form.dtype)["SLICES"]
    engine.launch(problem, kernel, -(-form.rows // THREADS), THREADS, more=what)
    return stats


def _in_place_order(engine: Cuda, rows: Rows, form: Form, gathered: Array) -> Array:
    """The same messages with rows in the order in which this process has them in memory."""
    xp, ranks, (shape, order) = rows.xp, len(gathered), rows.row_order or ((), ())
    made = engine.launcher.empty(gathered.shape, form.dtype)
    numbers = slice(form.head, form.head + form.numbers * form.rows)
    engine.launcher.copy(gathered[:, : form.head], made[:, : form.head])
    values = xp.reshape(gathered[:, numbers], (ranks, form.numbers, *shape))
    values = xp.permute_dims(values, (0, 1, *(2 + axis for axis in order)))
    engine.launcher.copy(xp.reshape(values, (ranks, -1)), made[:, numbers])
    return made


def divisor_of(engine: Cuda, rows: Rows, form: Form) -> tuple[Array, dict[str, Any]]:
    """(a message with the divisor of the mean over these rows, what is left for `say` if that is known)."""
    message = engine.launcher.empty((form.length,), form.dtype)
    known = cuda.known_divisor(rows) if rows.reduction == "mean" and rows.denominator is None else 0.0
    if isinstance(known, float):
        return message, {"counts": 1, "divisor": known}
    engine.count(rows, divisor_to=form.of(message, 0).reshape(()))
    return message, {}


def total(engine: Cuda, form: Form, question: int, gathered: Array) -> Array:
    """The sum of the divisors of all processes."""
    made = engine.launcher.empty((), form.dtype)
    argument = Total(gathered, len(gathered), form.length, question, made)
    engine.launch(argument, cuda.exchange_kernels(form.dtype)["TOTAL"], 1, WARP)
    return made
