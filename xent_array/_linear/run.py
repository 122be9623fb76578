"""Loss and gradients of a `Head`: the loops over its tiles. And the same in one piece, for arrays without values."""

from __future__ import annotations

import math
from typing import Any

from .. import _api, _engines, _rows
from .._problem import detached
from .._rows import Array, RowStats, merge, namespace
from .gradients import Gradients
from .head import Call, Head
from .products import products_of
from .tiles import Setup, Tiles, Wanted, set_up


def run(head: Head, wanted: Wanted, outs: list[Array | None]) -> tuple[Array, list[Array | None]]:
    """The loss in the form that the user receives, and the gradients that are wanted."""
    with head.problem.home.at_work(), products_of(head.hidden).at(head.hidden):
        setup = set_up(head, wanted, outs)
        tiles = Tiles(setup)
        gradients = Gradients(tiles, outs) if any(wanted) else None
        losses = _whole_rows(tiles, gradients) if setup.plan.blocks == 1 else _slices(tiles, gradients)
        made = [None] * 3 if gradients is None else gradients.finished()
        return _reduced(setup, losses), made


def _whole_rows(tiles: Tiles, gradients: Gradients | None) -> list[Array]:
    """The loss of every row, and its gradient from the same read of the logits."""
    engine, losses = tiles.setup.head.problem.engine, []
    (classes,) = tiles.blocks
    for rows in tiles.chunks:
        logits, part = tiles.made(rows, classes)
        if gradients is None:
            losses.append(_engines.loss(engine, part))
        else:
            losses.append(_engines.loss_and_grad(engine, part, part.logits)[0])
            gradients.add(rows, classes, logits, hidden=True, weight=True)
    return losses


def _slices(tiles: Tiles, gradients: Gradients | None) -> list[Array]:
    """The same with slices of the classes: the stats of all rows first, then the gradient of every tile.

    Stats are merged one after the other, which costs a unit of rounding for every few slices, and less than the
    products did.
    """
    setup, chunks, blocks = tiles.setup, tiles.chunks, tiles.blocks
    engine: Any = setup.slices
    stats: dict[int, RowStats] = {}
    for classes in blocks:
        for rows in chunks:
            found = engine.stats(tiles.made(rows, classes)[1])
            stats[rows.start] = merge(stats[rows.start], found) if rows.start in stats else found

    def add(rows: slice, classes: slice, hidden: bool, weight: bool) -> None:
        assert gradients is not None
        logits, part = tiles.made(rows, classes)
        engine.grad(part, stats[rows.start], part.logits)
        gradients.add(rows, classes, logits, hidden=hidden, weight=weight)

    if gradients is not None:
        together = setup.plan.together
        for classes in blocks:
            for rows in chunks:
                add(rows, classes, together, True)
        for rows in () if together else chunks:
            for classes in blocks:
                add(rows, classes, True, False)
    factor = setup.factor
    return [
        _rows.row_loss(setup.rows, stats[rows.start], None if factor is None else factor[rows, :]) for rows in chunks
    ]


def _reduced(setup: Setup, losses: list[Array]) -> Array:
    problem = setup.head.problem
    rows, xp = problem.rows, problem.rows.xp
    of_each = xp.concat(losses, axis=0) if losses else xp.zeros(setup.rows.shape, dtype=rows.acc)
    if setup.kept is not None:
        of_each, of_kept = xp.zeros(rows.shape, dtype=rows.acc), of_each
        of_each[setup.kept] = of_kept
    return problem.loss(_rows.reduce_loss(rows, of_each, setup.divisor, _rows.widest(rows)))


# In one piece


def composed(call: Call) -> Any:
    """The loss as a plain composition, which libraries record, compile and differentiate."""
    return _api.cross_entropy(_logits(call), call.target, **_options(call))


def composed_value_and_grad(call: Call) -> tuple[Any, tuple[Any, ...]]:
    """Loss and gradients from logits in one piece."""
    call = call._replace(
        hidden=detached(call.hidden),
        linear_weight=detached(call.linear_weight),
        linear_bias=detached(call.linear_bias),
    )
    options = _options(call) | {"grad_output": call.asked.grad_output}
    loss, grad = _api.cross_entropy_value_and_grad(_logits(call), call.target, **options)
    xp = namespace(grad)
    shape = tuple(call.hidden.shape)
    hidden = call.hidden
    if len(shape) == 2:  # the number of rows may be unknown
        of_hidden = xp.matmul(grad, xp.asarray(call.linear_weight))
    else:
        rows = math.prod(shape[:-1])
        grad, hidden = xp.reshape(grad, (rows, grad.shape[-1])), xp.reshape(hidden, (rows, shape[-1]))
        of_hidden = xp.reshape(xp.matmul(grad, xp.asarray(call.linear_weight)), shape)
    of_bias = None if call.linear_bias is None else xp.sum(grad, axis=0)
    return loss, (of_hidden, xp.matmul(grad.T, hidden), of_bias)


def _logits(call: Call) -> Any:
    xp = namespace(call.hidden)
    weight, bias = (
        each if each is None or namespace(each) is xp else xp.asarray(each)
        for each in (call.linear_weight, call.linear_bias)
    )
    logits = xp.matmul(call.hidden, weight.T)
    return logits if bias is None else logits + bias


def _options(call: Call) -> dict[str, Any]:
    return {name: value for name, value in call.asked._asdict().items() if name != "grad_output"}
