"""How Numba is asked to compile."""

from __future__ import annotations

from typing import Any

from numba import njit

# Without a way in from Python, which takes as long to compile as the rest: `build` makes one of another kind.
OPTIONS: dict[str, Any] = {
    "nogil": True, "error_model": "numpy", "_nrt": False, "no_cpython_wrapper": True, "no_cfunc_wrapper": True,
}  # fmt: skip
inner = njit(**OPTIONS)
inlined = njit(**OPTIONS, inline="always")  # for a function with one caller: LLVM optimizes it once, as a part of that
