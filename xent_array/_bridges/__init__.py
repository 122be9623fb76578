"""Arrays of other libraries on the engines of NumPy and CuPy, without leaving their own memory.

A bridge is a module for one library. It defines how the memory of that library's arrays is borrowed:

    refuses(arrays, role) -> str | None   why these arrays cannot be lent (traced, spread over devices), or None
    at_work(logits)                       the context to calculate in: as `_rows.quiet`, and on the library's stream
    lend(array, dtype) -> Array           the same memory as a NumPy or CuPy array; converted if a dtype is given
    give(array, logits) -> Array          an array of the library in the memory of an engine's result
    written(array)                        tell the library that its array was written to
    engine(found, logits)                 the engine as it works for this library, on its stream and with its memory
    records(logits) -> bool               whether the library is about to differentiate with respect to the logits
    recorded(problem, call)               the loss as one step of the library's automatic differentiation
    detached_loss(loss, logits)           a loss that raises an error if the library tries to differentiate it
    at_once(own, ...)                     the answer to `_engines.at_once`; `own` is the engine's, for NumPy arrays

`written` is only called for arrays that can be written to, and `recorded` only if `records` returned True. A bridge may
also define these:

    beside(array, logits, is_lent)        a NumPy array passed along with the logits, lent or not; a bridge without this
                                          accepts none
    composed(answer, problem)             `answer(rows)`, an engine's, for arrays that were not lent. If it is recorded
                                          step by step, the record must keep no array of the size of the logits except
                                          those that the user passed
    view(plain, logits) -> View           the view of the axes, in place of `plain`, which reshapes whole arrays
    later(function, array, dtype)         an array without values yet, whose parts are to be what `function(part,
                                          first=index)` returns, of that dtype; a part begins at `index` of the array

The arrays of a call are lent one by one, after the checks that name them, and the results are given back; in between,
the problem is one of NumPy or CuPy arrays like any other. `role` says what the library must be able to differentiate:
"loss", the loss with respect to the logits, which `recorded` provides; "nothing", where the gradient is ours; or
"everything", which no bridge can provide while any array is recorded.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache, partial
from importlib import import_module
from types import ModuleType
from typing import Any

import numpy as np

from .._rows import DASK, Array, DType, quiet

_MODULES = {  # by the namespace of the library
    "array_api_compat.torch": "._torch",
    "jax.numpy": "._jax",
    DASK: "._dask",
}

KINDS: dict[type, ModuleType] = {}  # the bridge for each array type that `at_once` has met


@cache
def named(namespace: str) -> ModuleType | None:
    """The bridge for the arrays of a library; None if its installed version lacks what the bridge imports."""
    if namespace not in _MODULES:
        return None
    try:
        return import_module(_MODULES[namespace], __name__)
    except ImportError:
        return None


@cache
def optional(module: str) -> Any:
    """A module that a bridge uses if it is installed; None if it is not."""
    try:
        return import_module(module)
    except ImportError:
        return None


def in_graph() -> Any:
    """The public functions in the form that a running compiler must see; None if no compiler is running."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.compiler.is_compiling():
        from . import _torch_operations

        return _torch_operations
    return None


def takes_numpy(library: Any) -> bool:
    """Whether NumPy arrays may be combined with those of the library, as in its own functions."""
    return hasattr(named(library.__name__), "beside")


class Home:
    """Where the logits of a call are, and what an engine receives: the arrays themselves, or their memory.

    `name` is what users call `logits`: those themselves, or hidden states from which they are made.
    """

    def __init__(
        self, logits: Array, library: Any, bridge: ModuleType | None, role: str, why_not: str = "", name: str = "logits"
    ) -> None:
        self.logits, self.library, self.bridge, self.name = logits, library, bridge, name
        self.of_library = named(library.__name__)
        self.is_recorded = role == "loss" and bridge is not None and bridge.records(logits)
        self.about = f" (their memory cannot be borrowed: {why_not})" if why_not else ""  # said if an engine declines
        if bridge is not None:
            self.about = f", in the memory of arrays of {library.__name__}"

    def at_work(self) -> AbstractContextManager[Any]:
        """The context to calculate in for the user: without warnings, and on the library's stream."""
        return quiet(self.library) if self.bridge is None else self.bridge.at_work(self.logits)

    def lend(self, array: Array, dtype: str | None = None) -> Array:
        """A checked array of the user, for the engine; small arrays are converted to the dtype named, if one is."""
        if isinstance(array, np.ndarray) and (beside := getattr(self.of_library, "beside", None)) is not None:
            array = beside(array, self.logits, self.bridge is not None)
        return array if self.bridge is None else self.bridge.lend(array, dtype)

    def view(self, plain: Any, logits: Array) -> Any:
        """The view of the axes of `logits`, of which `plain` is the usual one."""
        own = getattr(self.of_library, "view", None)
        return plain if own is None else own(plain, logits)

    @property
    def is_lazy(self) -> bool:
        """Whether arrays have no values before they are computed, so that these are checked then, by `later`."""
        return hasattr(self.of_library, "later")

    def later(self, function: partial[Array], array: Array, dtype: DType) -> Array:
        """What `function` makes of an array, part by part, once that is computed."""
        assert self.of_library is not None
        return self.of_library.later(function, array, dtype)

    def refuses_out(self, out: Array) -> str | None:
        """Why the engine cannot write to the memory of a user's array; None if it can."""
        return None if self.bridge is None else self.bridge.refuses([out], "nothing")

    def give(self, array: Array) -> Array:
        """A result of the engine, for the user."""
        return array if self.bridge is None else self.bridge.give(array, self.logits)

    def written(self, array: Array) -> None:
        """Called after the engine has written to the memory of a user's array."""
        if self.bridge is not None:
            self.bridge.written(array)

    def engine(self, found: Any) -> Any:
        """The chosen engine, as it works here."""
        return found if self.bridge is None else self.bridge.engine(found, self.logits)

    def composed(self, answer: Callable[[Any], Any], problem: Any) -> Any:
        """An engine's answer for the rows of a problem, whose steps the library may record."""
        own = None if self.bridge is not None else getattr(self.of_library, "composed", None)
        return answer(problem.rows) if own is None else own(answer, problem)

    def recorded(self, problem: Any, call: tuple[Any, Any, Any]) -> Any:
        """The loss of a call (logits, target, what was asked) in a form that the library can differentiate."""
        assert self.bridge is not None
        return self.bridge.recorded(problem, call)


def detached_loss(loss: Any, logits: Any, library: Any) -> Any:
    """A loss that automatic differentiation cannot pass through; if that matters, it raises an error there."""
    bridge = named(library.__name__)
    return loss if bridge is None else bridge.detached_loss(loss, logits)
