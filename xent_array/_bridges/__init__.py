"""Arrays of other libraries on the engines of NumPy and CuPy, in the memory where they are.

A bridge is a module for one library, which says what of its arrays that memory can be had of:

    refuses(arrays, role) -> str | None   why these arrays cannot be lent: traced, spread over devices; None if they can
    at_work(logits)                       where to calculate: what `_rows.quiet` says, and on the library's stream
    lend(array, dtype) -> Array           the same memory as an array of NumPy or CuPy; converted, if a dtype is named
    give(array, logits) -> Array          an array of the library in the memory of what an engine made
    written(array)                        tell the library that its array was written to
    engine(found, logits)                 the engine as it works for this library, on its stream and with its memory
    records(logits) -> bool               whether the library is about to differentiate by them
    recorded(problem, call)               the loss as one step of the library's automatic differentiation
    detached_loss(loss, logits)           a loss that says, where it is to be differentiated, that it cannot be
    at_once(own, ...)                     what `_engines.at_once` asks, with `own` the engine's answer for NumPy arrays

`written` is asked only of arrays that can be, and `recorded` where `records` said so. A bridge may also have these:

    beside(array, logits, is_lent)        an array of NumPy that goes with the logits, lent or not; a bridge without
                                          this takes none
    composed(answer, problem)             `answer(rows)`, an engine's, of arrays that were not lent: whatever records it
                                          step by step is to keep nothing of the size of the logits but what the user
                                          passed

The arrays of a call go across one by one, after the checks that name them, and the results come back: what lies
between is a problem of NumPy or CuPy arrays like any other. `role` says what the library must be able to
differentiate: "loss", the loss by the logits, which `recorded` does; "nothing", where the gradient is ours; or
"everything", which no bridge can do while any array is recorded.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

import numpy as np

from .._rows import Array, quiet

_MODULES = {"array_api_compat.torch": "._torch", "jax.numpy": "._jax"}  # by the library's namespace

KINDS: dict[type, ModuleType] = {}  # the bridge for each kind of array that `at_once` knows, as far as they were met


@cache
def named(namespace: str) -> ModuleType | None:
    """The bridge for the arrays of a library; none where its installed version lacks what the bridge imports."""
    if namespace not in _MODULES:
        return None
    try:
        return import_module(_MODULES[namespace], __name__)
    except ImportError:
        return None


@cache
def optional(module: str) -> Any:
    """A module that a bridge makes use of where it is installed; None where it is not."""
    try:
        return import_module(module)
    except ImportError:
        return None


def in_graph() -> Any:
    """The public functions as a compiler that is at work is to see them; None where there is none."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.compiler.is_compiling():
        from . import _torch_operations

        return _torch_operations
    return None


def takes_numpy(library: Any) -> bool:
    """Whether arrays of NumPy go with those of the library, as they do in its own functions."""
    return hasattr(named(library.__name__), "beside")


class Home:
    """Where the logits of a call are, and what an engine is given of them: themselves, or their memory."""

    def __init__(self, logits: Array, library: Any, bridge: ModuleType | None, role: str, why_not: str = "") -> None:
        self.logits, self.library, self.bridge = logits, library, bridge
        self.of_library = named(library.__name__)
        self.is_recorded = role == "loss" and bridge is not None and bridge.records(logits)
        self.about = f" (their memory cannot be borrowed: {why_not})" if why_not else ""  # where an engine declines
        if bridge is not None:
            self.about = f", in the memory of arrays of {library.__name__}"

    def at_work(self) -> AbstractContextManager[Any]:
        """Where to calculate for the user: in silence, and on the stream of the library."""
        return quiet(self.library) if self.bridge is None else self.bridge.at_work(self.logits)

    def lend(self, array: Array, dtype: str | None = None) -> Array:
        """An array of the user, checked, for the engine; of few numbers, in the dtype of that name, if there is one."""
        if isinstance(array, np.ndarray) and (beside := getattr(self.of_library, "beside", None)) is not None:
            array = beside(array, self.logits, self.bridge is not None)
        return array if self.bridge is None else self.bridge.lend(array, dtype)

    def refuses_out(self, out: Array) -> str | None:
        """Why the engine cannot write to the memory of an array of the user; None if it can."""
        return None if self.bridge is None else self.bridge.refuses([out], "nothing")

    def give(self, array: Array) -> Array:
        """A result of the engine for the user."""
        return array if self.bridge is None else self.bridge.give(array, self.logits)

    def written(self, array: Array) -> None:
        """The engine has written to the memory of an array of the user."""
        if self.bridge is not None:
            self.bridge.written(array)

    def engine(self, found: Any) -> Any:
        """The engine that was found, as it works here."""
        return found if self.bridge is None else self.bridge.engine(found, self.logits)

    def composed(self, answer: Callable[[Any], Any], problem: Any) -> Any:
        """What an engine answers to the rows of a problem; the library may record its steps."""
        own = None if self.bridge is not None else getattr(self.of_library, "composed", None)
        return answer(problem.rows) if own is None else own(answer, problem)

    def recorded(self, problem: Any, call: tuple[Any, Any, dict[str, Any]]) -> Any:
        """The loss of a call (its logits, target and options) that the library can differentiate."""
        assert self.bridge is not None
        return self.bridge.recorded(problem, call)


def detached_loss(loss: Any, logits: Any, library: Any) -> Any:
    """A loss that automatic differentiation cannot go through; where that matters, it says so."""
    bridge = named(library.__name__)
    return loss if bridge is None else bridge.detached_loss(loss, logits)
