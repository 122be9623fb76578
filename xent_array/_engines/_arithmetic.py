"""Arithmetic as IEEE 754 has it, in a thread where another library has set it otherwise.

Each thread has settings of its own of how its processor calculates. Some libraries set numbers below the smallest
normal one to 0, for speed, and leave it so; a new thread starts with the settings of the one that started it. Results
here depend on neither: whoever calculates sets what is usual, and then puts back what was there.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from contextlib import suppress
from functools import cache, wraps
from typing import Any, ParamSpec, TypeVar

A = ParamSpec("A")
R = TypeVar("R")

_SMALLEST, _ONE, _LITTLE = 2.0**-1022, 1.0, 2.0**-60  # names: arithmetic on literals is done when this is compiled


def is_usual() -> bool:
    """Whether this thread keeps numbers below the smallest normal one, and rounds to the nearest."""
    return _SMALLEST * 0.5 != 0.0 and _ONE + _LITTLE == _ONE - _LITTLE


class usual:
    """Has this thread calculate as usual for the time being, where the C library can set it.

    No generator: in a child of a fork those of other threads would end, and set what is the only thread's there.
    """

    before: Any = None

    def __enter__(self) -> None:
        if not is_usual() and (functions := _functions()) is not None:
            get, set_, default = functions
            before = ctypes.create_string_buffer(256)  # more than any system needs
            get(before)
            self.before = before
            set_(default)

    def __exit__(self, *_: object) -> None:
        if self.before is not None and (functions := _functions()) is not None:
            functions[1](self.before)


def in_usual(function: Callable[A, R]) -> Callable[A, R]:
    """The same function, which calculates as usual in any thread."""

    @wraps(function)
    def called(*arguments: A.args, **options: A.kwargs) -> R:
        if is_usual():
            return function(*arguments, **options)
        with usual():
            return function(*arguments, **options)

    return called


@cache
def _functions() -> tuple[Any, Any, Any] | None:
    """C's fegetenv and fesetenv, and what the second takes for the default; None where they cannot be had."""
    for name in (None, "libm.so.6"):
        with suppress(OSError, TypeError, AttributeError):  # no such library, no library of no name, no such function
            library = ctypes.PyDLL(name)
            get, set_ = library.fegetenv, library.fesetenv
            get.argtypes = set_.argtypes = [ctypes.c_void_p]
            default: Any = ctypes.c_void_p(-1)
            with suppress(ValueError):  # macOS, where it has an address
                default = ctypes.byref(ctypes.c_char.in_dll(library, "_FE_DFL_ENV"))
            return get, set_, default
    return None
