"""The logits of a `Head`, tile by tile.

What targets and weights say is known before any logit is made: which rows count, what divides the mean, what multiplies
a row. In host memory, rows that do not count are left out of everything; elsewhere looking for them would mean waiting,
and their hidden states are replaced by zeros, so that a NaN in them reaches no sum.

    Setup     the rows that count, their problem, the plan
    Tiles     the buffers, and the logits of a tile in them
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import numpy as np

from .. import _engines, _rows
from .._engines import Engine
from .._problem import dtype_name
from .._rows import Array, Rows, namespace
from . import plan as planning
from .head import Head, acc_of
from .products import PICKED, products_of

Wanted = tuple[bool, bool, bool]  # the gradients of hidden, linear_weight and linear_bias


class Setup(NamedTuple):
    """A head, without the rows that do not count."""

    head: Head
    products: Any
    rows: Rows  # those that count, with reduction="none"; the logits are not there
    picked: Array | None  # which rows of `head` these are, where the products are made; None: all
    kept: Array | None  # the same, where the engine works
    dead: Array | None  # which of these rows do not count after all; None: every one does
    factor: Array | None  # of the row losses
    divisor: Array | float | None
    slices: Engine | None  # the engine for tiles that do not have all classes, if there is one
    plan: Any  # planning.Plan, from `set_up` on
    wanted: Wanted


def set_up(head: Head, wanted: Wanted, outs: list[Array | None]) -> Setup:
    problem = head.problem
    factor, divisor = _rows.terms(problem.rows)
    upstream = 1.0 if problem.rows.upstream is None else problem.rows.upstream
    if divisor is not None:
        upstream = _rows.divide(problem.rows.xp, upstream, divisor)
    if not isinstance(upstream, float):
        upstream = problem.rows.xp.astype(upstream, problem.rows.acc, copy=False)
    rows = problem.rows._replace(reduction="none", upstream=upstream, denominator=None, row_order=None)
    picked = kept = dead = None
    if factor is not None:
        dead = factor == 0
        if rows.xp is np:
            kept, dead = np.flatnonzero(~dead[:, 0]), None
            if len(kept) == len(factor):
                kept = None
            else:
                factor, rows = factor[kept], _picked(rows, kept)
    if kept is not None:
        picked = kept if namespace(head.hidden) is np else namespace(head.hidden).asarray(kept)
    sliced = _engine_for_slices(head, rows)
    setup = Setup(head, products_of(head.hidden), rows, picked, kept, dead, factor, divisor, sliced, None, wanted)
    sizes = _sizes(setup, outs)
    budget = head.budget
    if budget is None:
        budget = max(planning.DEFAULT_BUDGET["cpu" if head.on_host else "gpu"], planning.needed(sizes))
    setup = setup._replace(plan=planning.plan_of(sizes, budget))
    if setup.plan.blocks > 1 and sliced is None:
        about = f": {planning.shown(budget)} are too few for rows with all classes"
        _engines.pick(_slice_of(rows), problem.engine, about)  # says why not
    return setup


def _picked(rows: Rows, kept: Array) -> Rows:
    """The rows that count. Distributions are picked when their turn comes."""
    target, s = rows.target, rows.sample_weight
    upstream: Any = rows.upstream
    assert target is not None
    rows = rows._replace(
        logits=rows.logits[: len(kept)],
        target=target[kept] if rows.has_labels else target,
        sample_weight=None if s is None else s[kept],
        upstream=upstream[kept] if getattr(upstream, "ndim", 0) else upstream,
    )
    if not rows.has_labels or rows.all_labels_count:
        return rows
    valid = _rows.labels(rows).valid
    return rows._replace(all_labels_count=valid is None or bool(valid.all()))


def _slice_of(rows: Rows) -> Rows:
    return rows._replace(start=0, vocabulary=rows.classes)


def _engine_for_slices(head: Head, rows: Rows) -> Engine | None:
    """The engine of the call if it takes slices of the classes, or else, unless it was asked for, one that does."""
    engine, sliced = head.problem.engine, _slice_of(rows)
    if engine.declines(sliced) is None:
        return engine
    return None if head.asked.engine is not None else _engines.pick(sliced, None)


def _sizes(setup: Setup, outs: list[Array | None]) -> planning.Sizes:
    """What the plan depends on; `outs` are the arrays of the caller for the gradients of the two factors."""
    head, rows, takes = setup.head, setup.rows, setup.products.takes
    item, acc = (planning.ITEMSIZE[dtype_name(array.dtype)] for array in (head.hidden, rows.logits))
    narrow, picks = item < acc, setup.picked is not None
    converts = narrow and not setup.products.keeps_narrow
    return planning.Sizes(
        rows=rows.shape[0],
        features=head.hidden.shape[1],
        classes=rows.classes,
        item=item,
        acc=acc,
        wants_hidden=setup.wanted[0],
        wants_weight=setup.wanted[1] or setup.wanted[2],
        adds=setup.products.adds,
        copies_hidden=converts or picks or setup.dead is not None or not takes(head.hidden),
        copies_weight=converts or not takes(head.weight),
        scatters=picks or not all(out is None or takes(out) for out in outs[:2]),
        rounds_grad=narrow and not converts,
        target=rows.target.dtype.itemsize if picks and not rows.has_labels else 0,  # type: ignore[union-attr]
        temporaries=_temporaries(head.problem.engine),
        of_slices=_temporaries(setup.slices or head.problem.engine),
    )


def _temporaries(engine: Engine) -> int:
    return planning.GENERIC if engine is _engines.ENGINES["generic"] else 0


class Tiles:
    """The buffers, and the logits of a tile in them."""

    def __init__(self, setup: Setup) -> None:
        self.setup, head, plan = setup, setup.head, setup.plan
        self.home, self.products = head.problem.home, setup.products
        self.dtype = acc_of(head.problem, namespace(head.hidden))
        self.of_factors = head.hidden.dtype if self.products.keeps_narrow else self.dtype
        features, buffers, make = head.hidden.shape[1], plan.buffers, partial(self.empty, dtype=self.of_factors)
        self.logits = self.empty(plan.rows * plan.classes)
        self.hidden = make(plan.rows, features) if "hidden" in buffers else None
        self.weight = make(plan.classes, features) if "linear_weight" in buffers else None
        self.grad = make(plan.rows * plan.classes) if "gradient of the logits" in buffers else None
        self.target = None
        if "target" in buffers:  # of NumPy, as only there rows are picked
            self.target = np.empty(plan.rows * plan.classes, setup.rows.target.dtype)  # type: ignore[union-attr]
        self._in_hidden: slice | None = None  # what the two hold
        self._in_weight: slice | None = None

    def empty(self, *shape: int, dtype: Any = None) -> Array:
        return self.products.empty(shape, self.dtype if dtype is None else dtype, self.setup.head.hidden)

    @property
    def chunks(self) -> list[slice]:
        rows = self.setup.rows.shape[0]
        return [slice(k, min(k + self.setup.plan.rows, rows)) for k in range(0, rows, self.setup.plan.rows or 1)]

    @property
    def blocks(self) -> list[slice]:
        classes = self.setup.rows.classes
        return [slice(k, min(k + self.setup.plan.classes, classes)) for k in range(0, classes, self.setup.plan.classes)]

    def hidden_of(self, rows: slice) -> Array:
        setup, source = self.setup, self.setup.head.hidden
        if self.hidden is None:
            return source[rows, :]
        out = self.hidden[: rows.stop - rows.start, :]
        if self._in_hidden != rows:
            if setup.picked is None:
                self.products.copy(source[rows, :], out)
            else:
                self.products.pick(source, setup.picked[rows], out)
            if setup.dead is not None:
                _silence(self.home.lend(out), setup.dead[rows, :])
            self._in_hidden = rows
        return out

    def weight_of(self, classes: slice) -> Array:
        source = self.setup.head.weight[classes, :]
        if self.weight is None:
            return source
        out = self.weight[: classes.stop - classes.start, :]
        if self._in_weight != classes:
            self.products.copy(source, out)
            self._in_weight = classes
        return out

    def made(self, rows: slice, classes: slice) -> tuple[Array, Rows]:
        """The logits of a tile, where the products are made; and the same memory as an engine takes it."""
        shape = rows.stop - rows.start, classes.stop - classes.start
        xp, bias = namespace(self.logits), self.setup.head.bias
        logits = xp.reshape(self.logits[: shape[0] * shape[1]], shape)
        self.products.logits(
            self.hidden_of(rows), self.weight_of(classes), None if bias is None else bias[classes], logits
        )
        return logits, self._rows_of(rows, classes, self.home.lend(logits))

    def rounded(self, grad: Array) -> Array:
        """The gradient of a tile as it goes into products."""
        if self.grad is None:
            return grad
        out = namespace(self.grad).reshape(self.grad[: grad.shape[0] * grad.shape[1]], tuple(grad.shape))
        self.products.copy(grad, out)
        return out

    def _rows_of(self, rows: slice, classes: slice, logits: Array) -> Rows:
        every = self.setup.rows
        target = every.target
        assert target is not None
        if every.has_labels:
            target = target[rows, :]
        else:
            target = target[rows, classes, :] if self.target is None else self._picked_target(target, rows, classes)
        s = every.sample_weight
        upstream: Any = every.upstream
        chunk = every._replace(
            logits=logits[:, :, None],
            target=target,
            sample_weight=None if s is None else s[rows, :],
            upstream=upstream[rows, :] if getattr(upstream, "ndim", 0) else upstream,
        )
        if self.setup.plan.blocks > 1:
            chunk = chunk._replace(start=classes.start, vocabulary=every.classes)
        return chunk

    def _picked_target(self, target: Array, rows: slice, classes: slice) -> Array:
        """The distributions of rows that count, some at a time."""
        shape = rows.stop - rows.start, classes.stop - classes.start
        picked, kept = self.target[: shape[0] * shape[1]].reshape(*shape, 1), self.setup.kept[rows]  # type: ignore[index]
        for start in range(0, shape[0], PICKED):
            picked[start : start + PICKED] = target[kept[start : start + PICKED], classes]
        return picked


def _silence(hidden: Array, dead: Array) -> None:
    """Zeros in rows that do not count, without waiting for a device."""
    xp = namespace(hidden)
    if hasattr(xp, "copyto"):
        xp.copyto(hidden, 0, where=dead)
    else:
        hidden[...] = xp.where(dead, xp.zeros_like(hidden), hidden)
