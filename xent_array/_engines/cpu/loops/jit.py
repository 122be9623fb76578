"""How Numba is asked to compile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import config, njit

from ..compile_cache import compiled_whole, kept

if config.DISABLE_JIT:
    raise ImportError("NUMBA_DISABLE_JIT is set")

OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy", "_nrt": False, "no_cfunc_wrapper": True}
# What only compiled code calls has no way in from Python, which takes as long to compile as the rest.
inner = njit(**OPTIONS, no_cpython_wrapper=True)


def called_from_python(function: Callable[..., Any]) -> Any:
    """Compiled when first called, as a whole or not at all; and kept between processes."""
    return compiled_whole(kept(njit(**OPTIONS)(function)))
