"""NumPy arrays: blocks of rows that stay in cache, over threads.

For every call a `Path` is chosen and the rows are cut into blocks, which the calling thread and the threads of a pool
take one by one. Everything that is asked for of a block is done while it is in cache: its logits are read from memory
once, and its gradient is written once. Logits in 16 bits, byte-swapped or with odd strides are converted block by
block, never as a whole.

    path.py            decides: which code, which memory layout, how large a block is
    blocks.py          blocks of rows, workspaces, contiguous copies
    compiled.py        turns a block, or a simple call, into one call of a loop
    loops/             the loops, as LLVM compiles them
    machine_code.py    makes functions of the loops, and keeps them between processes
    numpy_body.py      processes a block in NumPy, where there are no loops
    threads.py         the thread pool, and tasks that must not be left half done
    cores.py           how many threads to use
    memory.py          memory for large arrays
    arithmetic.py      rounding mode and denormals

Every operation on a row depends on its own C logits only, so its loss and gradient have the same bits whatever the
other rows are, and for any number of threads.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from types import ModuleType
from typing import Any

import numpy as np

from ... import _rows
from ..._rows import Array, Rows, RowStats
from . import arithmetic, memory, numpy_body, threads
from .blocks import WHOLE, Buffers, Part, cut, sliced
from .path import BLOCK, ROW, TILE, Path, Want, choose


class Cpu:
    """The engine, with or without the compiled loops."""

    borrows = True
    kinds = frozenset({np.ndarray})

    def __init__(self, name: str, *, compile: bool) -> None:
        self.name, self.compile = name, compile

    def declines(self, rows: Rows) -> str | None:
        return None if rows.xp is np else f"takes NumPy arrays, and these are of {rows.xp.__name__}"

    def reads_labels_free(self, rows: Rows) -> bool:
        return True

    def at_once(
        self, logits: Any, target: Any, options: tuple[Any, ...], wants_grad: bool, out: Any
    ) -> tuple[Array, Array | None] | None:
        compiled = _found if self.compile and _found.__class__ is ModuleType else self._loops()
        if compiled is None:
            return None
        try:
            answer: tuple[Array, Array | None] | None = compiled.at_once(logits, target, options, wants_grad, out)
        except threads.CannotCompile as error:
            _give_up(error)
            return None
        return answer

    @arithmetic.in_usual
    def stats(self, rows: Rows) -> RowStats:
        filled = _stats(rows)
        self._drive(rows, Want(stats=filled))
        return filled

    @arithmetic.in_usual
    def row_stats(self, rows: Rows) -> RowStats:
        filled = _stats(rows, with_hits=True)
        self._drive(rows, Want(stats=filled))
        return _rows.marked(rows, filled, filled.correct)

    @arithmetic.in_usual
    def stats_and_loss(self, rows: Rows) -> tuple[RowStats, Array]:
        filled = _stats(rows)
        return filled, self._loss(rows, stats=filled)

    @arithmetic.in_usual
    def loss(self, rows: Rows) -> Array:
        return self._loss(rows)

    @arithmetic.in_usual
    def grad(self, rows: Rows, stats: RowStats, out: Array | None = None) -> Array:
        out = _gradient(rows) if out is None else out
        self._drive(rows, Want(given=stats, grad=out, divisor=_divisor(rows) if rows.reduction == "mean" else None))
        return out

    @arithmetic.in_usual
    def loss_and_grad(self, rows: Rows, out: Array | None = None) -> tuple[Array, Array]:
        out = _gradient(rows) if out is None else out
        return self._loss(rows, out=out), out

    @arithmetic.in_usual
    def loss_grad_and_stats(self, rows: Rows, out: Array | None = None) -> tuple[Array, Array, RowStats]:
        filled = _stats(rows, with_hits=True)
        out = _gradient(rows) if out is None else out
        return self._loss(rows, stats=filled, out=out), out, _rows.marked(rows, filled, filled.correct)

    @arithmetic.in_usual
    def softmax(self, rows: Rows, log: bool) -> Array:
        out = _gradient(rows)
        self._drive(rows, Want(log=out) if log else Want(grad=out))
        return out

    def _loss(self, rows: Rows, *, stats: RowStats | None = None, out: Array | None = None) -> Array:
        """The loss; stats and gradient are written to `stats` and `out` if these are given."""
        divisor = _divisor(rows) if rows.reduction == "mean" else None
        losses = memory.empty(rows.logits.shape[::2], rows.acc)
        self._drive(rows, Want(loss=losses, stats=stats, grad=out, divisor=divisor))
        if rows.reduction == "none":
            return losses
        total = self._total(_rows.in_order(rows, losses))
        return rows.acc.type(total if divisor is None else _rows.divide(np, total, divisor))

    def _total(self, losses: Array) -> float:
        compiled = self._loops()
        if compiled is not None:
            try:
                return float(compiled.total(losses))
            except threads.CannotCompile as error:
                _give_up(error)
        return float(np.add.reduce(losses, dtype=np.float64))

    def _drive(self, rows: Rows, want: Want) -> None:
        loops = self._loops()
        path = choose(rows, want, loops is not None)
        try:
            self._run(path, loops, rows, want)
        except threads.CannotCompile as error:  # nothing has been written
            _give_up(error)
            self._run(choose(rows, want, False), None, rows, want)

    def _run(self, path: Path, loops: ModuleType | None, rows: Rows, want: Want) -> None:
        outer, inner = rows.shape
        count, classes = outer * inner, min(rows.classes, TILE)
        work = count * (rows.classes + ROW)
        if work <= path.serial:
            if count:
                _body(path, loops, rows, want)(rows, want, WHOLE, Buffers(count * classes, rows.acc))
            return
        team = threads.team(work, path.serial)
        # Small enough for cache, large enough that Python is idle, and some for every thread.
        blocks = max(team if work <= 4 * team * path.serial else 2 * team, -(-work // path.block))
        in_block = -(-count // blocks)
        body = _body(path, loops, rows, want)

        def work_off(parts: Iterator[Part]) -> None:
            buffers = Buffers(in_block * classes, rows.acc)
            with np.errstate(all="ignore"):  # NumPy's settings are each thread's own
                for part in parts:
                    body(sliced(rows, part), want, part, buffers)

        threads.parallel(work_off, cut(rows.shape, in_block), team)

    def _loops(self) -> ModuleType | None:
        """The compiled loops, if this engine uses them and there are any."""
        found = found_loops() if self.compile else None
        return found if isinstance(found, ModuleType) else None


def _body(path: Path, loops: ModuleType | None, rows: Rows, want: Want) -> Callable[[Rows, Want, Part, Buffers], None]:
    """What processes a block on this path."""
    if loops is not None and path.is_compiled:
        return partial(loops.block, path, loops.function_for(path, rows, want))
    return numpy_body.short_block if path.code == "numpy short" else numpy_body.block


engine = Cpu("cpu", compile=True)
numpy_engine = Cpu("numpy", compile=False)


_found: ModuleType | str | None = None


def found_loops() -> ModuleType | str:
    """What calls the compiled loops, or why there are none."""
    if _found is None:
        try:
            return threads.whole(_find)
        except threads.Busy:  # not yet
            return "llvmlite is just being imported"
    return _found


def _find() -> ModuleType | str:
    global _found
    if _found is None:
        try:
            from . import compiled, machine_code

            _found = machine_code.missing() or compiled
        except MemoryError as error:  # may not happen again
            return f"llvmlite cannot be used: {error}"
        except Exception as error:  # from whatever else takes part in finding llvmlite
            _found = f"llvmlite cannot be used: {error}"
            _warn(_found)
    return _found


def _give_up(error: threads.CannotCompile) -> None:
    """Stop using the loops, and warn once; do nothing if the failure is only temporary."""
    global _found
    if isinstance(_found, str) or isinstance(error, threads.Busy):
        return
    _found = str(error)
    _warn(_found)


def _warn(reason: str) -> None:
    """Say why there are no loops. Where warnings are errors, that is no reason to fail."""
    with suppress(RuntimeWarning):
        warnings.warn(
            f"xent_array works with NumPy alone, which is several times slower: {reason}", RuntimeWarning, stacklevel=3
        )


def _stats(rows: Rows, with_hits: bool = False) -> RowStats:
    """Empty arrays for the stats and, with labels, for `_rows.hits`."""
    hits = np.empty(rows.shape, bool) if with_hits and rows.has_labels else None
    max_, rest, gap, mass = (np.empty(rows.shape, rows.acc) for _ in range(4))
    return RowStats(max_, rest, gap, mass, hits)


def _gradient(rows: Rows) -> Array:
    return memory.empty(rows.logits.shape, rows.grad_dtype)


def _divisor(rows: Rows) -> float:
    """The denominator of the mean, computed part by part in the user's order of rows, to bound temporary memory."""
    if rows.denominator is not None:
        return float(rows.denominator)
    if rows.sample_weight is None and ((rows.all_labels_count and rows.weight is None) or not rows.has_labels):
        return float(rows.shape[0] * rows.shape[1])
    count = rows.shape[0] * rows.shape[1]
    if count <= BLOCK and rows.all_labels_count:
        return float(np.add.reduce(_rows.in_order(rows, _counted(rows))))
    if count <= BLOCK:
        known = _rows.labels(rows) if rows.has_labels else None
        return float(_rows.denominator(rows, known, _rows.row_factor(rows, known), np.float64))
    target, s = (
        None if values is None else _rows.in_order(rows, values)[:, None]
        for values in (rows.target if rows.has_labels else None, rows.sample_weight)
    )
    total = 0.0
    for start in range(0, count, BLOCK):
        part = slice(start, min(start + BLOCK, count))
        total += _divisor(
            rows._replace(
                logits=np.broadcast_to(rows.acc.type(0), (part.stop - start, rows.classes, 1)),  # not read
                target=None if target is None else target[part],
                sample_weight=None if s is None else s[part],
                row_order=None,
            )
        )
    return total


def _counted(rows: Rows) -> Array:
    """What each row adds to the denominator of the mean, where every label is a class and none is ignored."""
    s = None if rows.sample_weight is None else rows.sample_weight.astype(np.float64)
    if rows.weight is None:
        assert s is not None
        return s
    of_label = rows.weight.take(rows.target).astype(np.float64)
    return of_label if s is None else np.where(s == 0, s, s * of_label)
