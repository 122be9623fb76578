"""What stands for logits that are never made as a whole."""

from __future__ import annotations

from typing import Any, NamedTuple

from .._rows import Array, DType, device


class Factors(NamedTuple):
    """The two factors of the logits ``hidden @ weight.T + bias``."""

    hidden: Array  # (…, features), which stands for the logits where the arrays of a call must be alike
    classes: int
    others: tuple[Any, ...]  # the weight and the bias, which are lent if the hidden states are

    def logits(self, xp: Any, hidden: Array, acc: DType) -> Array:
        """Logits without memory: one number, repeated with steps of 0 where the library has views."""
        shape = (*hidden.shape[:-1], self.classes)
        return xp.broadcast_to(xp.zeros((1,) * len(shape), dtype=acc, device=device(hidden)), shape)
