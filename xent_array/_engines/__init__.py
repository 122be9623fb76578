"""What an engine is, which engines there are, and how one is picked.

An engine is a module, or any object, that solves `Rows` for one kind of array. It must have:

    name                           the name by which users select it, as in ``engine="cpu"``
    declines(rows) -> str | None   why it cannot take these arrays; None if it can
    reads_labels_free(rows)        whether every label can be read without synchronization
    stats(rows) -> RowStats        the statistics of each row, from one read of the logits
    grad(rows, stats, out)         the gradient, of shape (outer, C, inner), written to `out` if that is given

It may also have the following. Where it does not, the functions below compose the result, or do without:

    borrows                        True if it can work on the memory of other libraries' arrays (see `_bridges`)
    loss(rows)                     the reduced loss, or one loss per row
    loss_and_grad(rows, out)       both, at the cost of one read and one write
    grad_alone(rows, out)          the gradient, if the loss is not wanted and there are no stats
    stats_and_loss(rows)           the stats, and the loss as `loss` returns it
    row_stats(rows)                the stats as users see them: with `correct`, and a gap of NaN under a bad label
    loss_grad_and_stats(rows, out) all three, at the cost of one read and one write; the stats as from `row_stats`
    softmax(rows, log)             the softmax or log-softmax of every row
    noting()                       (the same engine for one call, a tape of its launches), which `_again.py` replays
    kinds                          the classes of the arrays that it may take; without it, it may take any
    slice                          (start, vocabulary) if the logits are those of a slice of the classes: see `Rows`
    failed(error, attempt)         called where a check fails, so that the engine is not asked: see `_rows.Attempt`
    at_once(logits, target, options, wants_grad, out)   the answer from a user's own arguments; see the function below

Rows are canonical and checked: an engine never sees an axis or a user's mistake. A label that is not a class has no
target (a = 0) and a row factor of NaN; `_rows` defines the factor, the divisor and the scale of a row. A row whose
scale is 0 has a gradient of exactly 0.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from typing import Any, Protocol

import numpy as np

from .. import _bridges, _rows
from .._rows import DASK, Array, Asked, Rows, RowStats
from . import cpu, cuda, generic


class Engine(Protocol):
    """What every engine must have, as described above."""

    name: str

    def declines(self, rows: Rows) -> str | None: ...
    def reads_labels_free(self, rows: Rows) -> bool: ...
    def stats(self, rows: Rows) -> RowStats: ...
    def grad(self, rows: Rows, stats: RowStats, out: Array | None = None) -> Array: ...


class _Dask:
    """The engine in `dask.py`, which is not imported before the first Dask array comes, because Dask is with it."""

    name = "dask"
    kinds = at_once = None  # what is asked of every engine, also where Dask is not installed
    borrows = False

    def declines(self, rows: Rows) -> str | None:
        if rows.xp.__name__ != DASK:
            return f"takes Dask arrays, and these are of {rows.xp.__name__}"
        reason: str | None = self._engine.declines(rows)
        return reason

    def reads_labels_free(self, rows: Rows) -> bool:
        return False  # `Rows.check` looks at them later

    def stats(self, rows: Rows) -> RowStats:
        found: RowStats = self._engine.stats(rows)
        return found

    def grad(self, rows: Rows, stats: RowStats, out: Array | None = None) -> Array:
        return self._engine.grad(rows, stats)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # which Python asks for when it copies an object
            raise AttributeError(name)
        return getattr(self._engine, name)

    @property
    def _engine(self) -> Any:
        return import_module(".dask", __name__)


ENGINES: dict[str, Engine] = {  # in the order in which they are tried
    "cpu": cpu.engine,
    "numpy": cpu.numpy_engine,
    "cuda": cuda.engine,
    "dask": _Dask(),
    "generic": generic,
}


_ENGINE = Asked._fields.index("engine")


def may_borrow(engine: str | Engine | None) -> bool:
    """Whether the requested engine may be one that works on the memory of other libraries' arrays."""
    return engine is None or getattr(named(engine), "borrows", False)


def pick(rows: Rows, engine: str | Engine | None, about: str = "", is_lent: bool = False) -> Engine:
    """The requested engine, or the first of ENGINES that takes these rows. `about` is appended to an error message.

    If the memory of the rows `is_lent` by another library, engines that borrow come first.
    """
    if engine is None:
        reasons = []
        engines: Iterable[Engine] = ENGINES.values()
        if is_lent:
            engines = sorted(engines, key=lambda each: not getattr(each, "borrows", False))
        for found in engines:
            reason = found.declines(rows)
            if reason is None:
                return found
            reasons.append(f"{found.name!r} {reason}")
        raise TypeError(f"no engine takes these arrays: {'; '.join(reasons)}")
    engine = named(engine)
    reason = engine.declines(rows)
    if reason is not None:
        raise ValueError(f"engine {engine.name!r} cannot take these arrays: it {reason}{about}")
    return engine


def named(engine: str | Engine) -> Engine:
    """The engine of that name, or the engine itself."""
    if isinstance(engine, str):
        if engine not in ENGINES:
            raise ValueError(f"engine must be {_known()}; got {engine!r}")
        return ENGINES[engine]
    if not hasattr(engine, "declines"):
        raise TypeError(f"engine must be {_known()}, or an object like those; got {type(engine).__name__}")
    return engine


def _known() -> str:
    return f"None or one of {', '.join(map(repr, ENGINES))}"


def at_once(
    logits: Any, target: Any, options: tuple[Any, ...], wants_grad: bool, out: Any = None
) -> tuple[Array, Array | None] | None:
    """Loss and gradient in one step, from the user's own arguments, by the engine that would be picked.

    This is for small batches, where the checks take most of the time. Returns None, with nothing written, if the engine
    cannot tell at once that all arguments are valid; every check is then made.
    """
    kind = logits.__class__
    bridge = _bridges.KINDS.get(kind)
    engine: Any = None
    if options[_ENGINE] is not None:
        engine = named(options[_ENGINE])
    else:
        for engine in ENGINES.values():
            kinds = getattr(engine, "kinds", None)
            is_lent = bridge is not None and np.ndarray in (kinds or ()) and getattr(engine, "borrows", False)
            if kinds is None or kind in kinds or is_lent:
                break
    own = getattr(engine, "at_once", None)
    if own is None:
        return None
    answer: tuple[Array, Array | None] | None = (
        own(logits, target, options, wants_grad, out)
        if bridge is None
        else bridge.at_once(own, logits, target, options, wants_grad, out)
    )
    return answer


def loss(engine: Engine, rows: Rows) -> Array:
    own = getattr(engine, "loss", None)
    return own(rows) if own is not None else _rows.finish(rows, engine.stats(rows))


def loss_and_grad(engine: Engine, rows: Rows, out: Array | None) -> tuple[Array, Array]:
    own = getattr(engine, "loss_and_grad", None)
    if own is not None:
        loss, grad = own(rows, out)
        return loss, grad
    stats = engine.stats(rows)
    return _rows.finish(rows, stats), engine.grad(rows, stats, out)


def grad_alone(engine: Engine, rows: Rows, out: Array | None) -> Array:
    own = getattr(engine, "grad_alone", None)
    return own(rows, out) if own is not None else loss_and_grad(engine, rows, out)[1]


def stats_and_loss(engine: Engine, rows: Rows) -> tuple[RowStats, Array]:
    own = getattr(engine, "stats_and_loss", None)
    if own is not None:
        stats, loss = own(rows)
        return stats, loss
    stats = engine.stats(rows)
    return stats, _rows.finish(rows, stats)


def row_stats(engine: Engine, rows: Rows) -> RowStats:
    own = getattr(engine, "row_stats", None)
    if own is not None:
        marked: RowStats = own(rows)
        return marked
    return _rows.marked(rows, engine.stats(rows))


def loss_grad_and_stats(engine: Engine, rows: Rows, out: Array | None) -> tuple[Array, Array, RowStats]:
    own = getattr(engine, "loss_grad_and_stats", None)
    if own is not None:
        loss, grad, stats = own(rows, out)
        return loss, grad, stats
    stats = row_stats(engine, rows)  # before the gradient may overwrite the logits
    return _rows.finish(rows, stats), engine.grad(rows, stats, out), stats


def softmax(engine: Engine, rows: Rows, log: bool) -> Array:
    own = getattr(engine, "softmax", None)
    if own is not None:
        return own(rows, log)
    return softmax_from(engine, rows, engine.stats(rows), log)


def softmax_from(engine: Engine, rows: Rows, stats: RowStats, log: bool) -> Array:
    """The same from stats, which may be those of whole rows where these are slices of them."""
    if not log:
        return engine.grad(rows, stats, None)
    x = rows.xp.astype(rows.logits, rows.acc, copy=False)
    below = (x - stats.max[:, None, :]) - stats.tail[:, None, :]
    return rows.xp.astype(below, rows.grad_dtype, copy=False)
