"""IEEE 754 arithmetic, also in a thread whose floating-point environment another library has changed.

Each thread has its own floating-point environment. Some libraries turn on flush-to-zero, which replaces denormals by 0,
for speed, and leave it on; a new thread inherits the environment of the thread that started it. Results here depend on
neither: every computation sets the default environment, and restores the previous one afterwards.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from contextlib import suppress
from functools import cache, wraps
from typing import Any, ParamSpec, TypeVar

A = ParamSpec("A")
R = TypeVar("R")

_SMALLEST, _ONE, _LITTLE = 2.0**-1022, 1.0, 2.0**-60  # variables: arithmetic on literals is done when compiling


def is_usual() -> bool:
    """Whether this thread keeps denormals, and rounds to nearest."""
    return _SMALLEST * 0.5 != 0.0 and _ONE + _LITTLE == _ONE - _LITTLE


class usual:
    """A context manager that gives this thread the default floating-point environment, if the C library can set it.

    Not a generator: a forked child would close those of other threads, which would change the environment of its only
    thread.
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
    """The same function, run with the default floating-point environment in any thread."""

    @wraps(function)
    def called(*arguments: A.args, **options: A.kwargs) -> R:
        if is_usual():
            return function(*arguments, **options)
        with usual():
            return function(*arguments, **options)

    return called


@cache
def _functions() -> tuple[Any, Any, Any] | None:
    """C's fegetenv and fesetenv, and the argument of fesetenv for the default; None if they are not available."""
    for name in (None, "libm.so.6"):
        with suppress(OSError, TypeError, AttributeError):  # no such library; None is not accepted; no such function
            library = ctypes.PyDLL(name)
            get, set_ = library.fegetenv, library.fesetenv
            get.argtypes = set_.argtypes = [ctypes.c_void_p]
            default: Any = ctypes.c_void_p(-1)
            with suppress(ValueError):  # macOS, where the default is an object
                default = ctypes.byref(ctypes.c_char.in_dll(library, "_FE_DFL_ENV"))
            return get, set_, default
    return None
