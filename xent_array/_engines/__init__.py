"""What an engine is, which ones there are, and how one is picked.

An engine is a module, or any object, that answers `Rows` for one kind of array:

    name                           its word, as in ``engine="cpu"``
    declines(rows) -> str | None   why it cannot take these arrays; None if it can
    reads_labels_free(rows)        whether looking at every label costs no synchronisation
    stats(rows) -> RowStats        one read of the logits
    grad(rows, stats, out)         the gradient in the shape (outer, C, inner), written to `out` if that is given

It may also have these of its own; where it does not, the functions below compose them:

    borrows                        True: it may be given the memory of other libraries' arrays as its own (`_bridges`)
    loss(rows)                     the reduced loss, or one per row
    loss_and_grad(rows, out)       both, for the price of one read and one write
    grad_alone(rows, out)          the gradient, where nobody wants the loss and no stats are there
    stats_and_loss(rows)           the stats, and the loss as `loss` gives it
    row_stats(rows)                the stats as users see them: `correct`, and a gap of NaN under a bad label
    loss_grad_and_stats(rows, out) all three, for the price of one read and one write; the stats as from `row_stats`
    softmax(rows, log)             softmax or log-softmax of every row
    noting()                       (the same engine for one call, its tape): `_again.py` repeats what is on it
    at_once(logits, target, ...)   the answer to the plainest question, see the function below; None if it is not that

Rows are canonical and checked: an engine never sees an axis or a user's mistake. A label that is no class has no
target (a = 0) and a row factor of NaN; `_rows` says what the factor, the divisor and the scale of a row are.
A row whose scale is 0 has gradient exactly 0.
"""

from __future__ import annotations

from typing import Any, Protocol

from .. import _bridges, _rows
from .._rows import Array, Rows, RowStats
from . import cpu, cuda, generic


class Engine(Protocol):
    """What every engine has; see above for what it means."""

    name: str

    def declines(self, rows: Rows) -> str | None: ...
    def reads_labels_free(self, rows: Rows) -> bool: ...
    def stats(self, rows: Rows) -> RowStats: ...
    def grad(self, rows: Rows, stats: RowStats, out: Array | None = None) -> Array: ...


ENGINES: dict[str, Engine] = {  # in the order they are tried
    "cpu": cpu.engine,
    "numpy": cpu.numpy_engine,
    "cuda": cuda.engine,
    "generic": generic,
}


def may_borrow(engine: str | Engine | None) -> bool:
    """Whether the engine that is asked for may be one that takes the memory of other libraries' arrays."""
    return engine is None or getattr(named(engine), "borrows", False)


def pick(rows: Rows, engine: str | Engine | None, about: str = "") -> Engine:
    """The engine that was asked for, or the first of ENGINES that takes these rows; `about` them, else, is said too."""
    if engine is None:
        reasons = []
        for found in ENGINES.values():
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
    known = f"None or one of {', '.join(map(repr, ENGINES))}"
    if isinstance(engine, str):
        if engine not in ENGINES:
            raise ValueError(f"engine must be {known}; got {engine!r}")
        return ENGINES[engine]
    if not hasattr(engine, "declines"):
        raise TypeError(f"engine must be {known}, or an object like those; got {type(engine).__name__}")
    return engine


def at_once(
    logits: Any, target: Any, reduction: str, upstream: float | None, wants_grad: bool, out: Any = None
) -> tuple[Array, Array | None] | None:
    """Loss and gradient without a look at options, because there are none: in small batches, looking costs most.

    The first engine is asked with what the user passed as logits, target and out, classes along the last axis. None,
    and nothing written, where it does not know at once that all is well: then the way through every check is gone.
    """
    own = getattr(next(iter(ENGINES.values())), "at_once", None)
    if own is None:
        return None
    bridge = _bridges.KINDS.get(logits.__class__)
    answer: tuple[Array, Array | None] | None = (
        own(logits, target, reduction, upstream, wants_grad, out)
        if bridge is None
        else bridge.at_once(own, logits, target, reduction, upstream, wants_grad, out)
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
    stats = row_stats(engine, rows)  # before the gradient may take the place of the logits
    return _rows.finish(rows, stats), engine.grad(rows, stats, out), stats


def softmax(engine: Engine, rows: Rows, log: bool) -> Array:
    own = getattr(engine, "softmax", None)
    if own is not None:
        return own(rows, log)
    stats = engine.stats(rows)
    if not log:
        return engine.grad(rows, stats, None)
    x = rows.xp.astype(rows.logits, rows.acc, copy=False)
    below = (x - stats.max[:, None, :]) - stats.tail[:, None, :]
    return rows.xp.astype(below, rows.grad_dtype, copy=False)
