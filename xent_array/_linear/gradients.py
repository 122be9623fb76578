"""Gradients of the two factors and of the bias, which grow product by product."""

from __future__ import annotations

from typing import Any

from .._rows import Array
from .tiles import Tiles


class Sums:
    """A gradient with the shape of a factor.

    `out` has the dtype of the factor. If that is narrower than the arithmetic, several products for the same rows are
    summed in `buffer`, and rounded when the last of them is there. `index` names the rows of `out`, if not all are
    there; `scratch` is where products are made that cannot be made in place.
    """

    def __init__(
        self, tiles: Tiles, out: Array, scratch: Array | None, buffer: Array | None = None, index: Any = None
    ) -> None:
        self.products, self.out, self.scratch, self.buffer, self.index = tiles.products, out, scratch, buffer, index
        self.is_direct = index is None and out.dtype == tiles.dtype and self.products.takes(out)

    def add(self, rows: slice, at: int, a: Array, b: Array, *, first: bool, last: bool) -> None:
        """Add ``a @ b`` to these rows, which begin at row `at` of the buffer if there is one."""
        if self.buffer is None:
            self._into(self.out, rows, a, b, not first, self.is_direct, self.index)
            return
        held = slice(at, at + rows.stop - rows.start)
        self._into(self.buffer, held, a, b, not first, True, None)
        if last:
            where = rows if self.index is None else self.index[rows]
            self.products.place(self.out, where, self.buffer[held, :], False)

    def _into(self, out: Array, rows: slice, a: Array, b: Array, add: bool, direct: bool, index: Any) -> None:
        if direct and (self.products.adds or not add):
            self.products.product(a, b, out[rows, :], add)
            return
        assert self.scratch is not None
        step, count = self.scratch.shape[0], a.shape[0]
        for start in range(0, count, step):
            stop = min(start + step, count)
            made = self.scratch[: stop - start, :]
            self.products.product(a[start:stop, :], b, made)
            where = slice(rows.start + start, rows.start + stop)
            self.products.place(out, where if index is None else index[where], made, add)


class Gradients:
    """The gradients that are wanted."""

    def __init__(self, tiles: Tiles, outs: list[Array | None]) -> None:
        setup = tiles.setup
        plan, head = setup.plan, setup.head
        features, buffers = head.hidden.shape[1], plan.buffers
        self.tiles, self.chunks, self.blocks = tiles, tiles.chunks, tiles.blocks
        shapes = tuple(head.hidden.shape), tuple(head.weight.shape), tuple(head.weight.shape[:1])
        self.made: list[Array | None] = [
            _result(tiles, out, shape) if wants else None
            for out, shape, wants in zip(outs, shapes, setup.wanted, strict=True)
        ]
        hidden, weight, _ = self.made
        scratch = tiles.empty(plan.part, features) if "a part of a product" in buffers else None
        if hidden is not None:
            if setup.picked is not None:
                hidden[...] = 0
            rows = setup.rows.shape[0] if plan.together else plan.rows
            buffer = tiles.empty(rows, features) if "sums of the gradient of hidden" in buffers else None
            self.of_hidden = Sums(tiles, hidden, scratch, buffer, setup.picked)
        if weight is not None:
            has_buffer = "sums of the gradient of linear_weight" in buffers
            buffer = tiles.empty(plan.classes, features) if has_buffer else None
            self.of_weight = Sums(tiles, weight, scratch, buffer)
        self.of_bias = tiles.empty(setup.rows.classes) if setup.wanted[2] else None

    def add(self, rows: slice, classes: slice, grad: Array, *, hidden: bool, weight: bool) -> None:
        """What a tile adds; `grad` is the gradient of its logits."""
        if weight and self.of_bias is not None:
            self.tiles.products.sums(grad, self.of_bias[classes], rows != self.chunks[0])
        grad = self.tiles.rounded(grad)
        if hidden and self.made[0] is not None:
            at = rows.start if self.tiles.setup.plan.together else 0
            first, last = classes == self.blocks[0], classes == self.blocks[-1]
            self.of_hidden.add(rows, at, grad, self.tiles.weight_of(classes), first=first, last=last)
        if weight and self.made[1] is not None:
            first, last = rows == self.chunks[0], rows == self.chunks[-1]
            self.of_weight.add(classes, 0, grad.T, self.tiles.hidden_of(rows), first=first, last=last)

    def finished(self) -> list[Array | None]:
        """The gradients, when all tiles have been added."""
        hidden, weight, bias = self.made
        if not self.chunks:
            for made in (hidden, weight, self.of_bias):
                if made is not None:
                    made[...] = 0
        if bias is not None:
            self.tiles.products.copy(self.of_bias, bias)
        return self.made


def _result(tiles: Tiles, out: Array | None, shape: tuple[int, ...]) -> Array:
    """An array for a gradient: that of the caller, or a new one in native byte order."""
    if out is not None:
        return out
    like = tiles.setup.head.hidden
    dtype = like.dtype if getattr(like.dtype, "isnative", True) else like.dtype.newbyteorder("=")
    return tiles.products.empty(shape, dtype, like)
