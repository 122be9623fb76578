"""Machine code that stays on disk between processes, in a folder that nobody else can write to.

Numba keeps it, and picks the folder: NUMBA_CACHE_DIR, else beside the source, else the user's own cache. Here is what
it leaves open. What is kept is loaded and run, so it must be our own, and of these very sources; and a folder that
fails is no reason for a call to fail.
"""

from __future__ import annotations

import hashlib
import os
import stat
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from numba.core.caching import FunctionCache

from . import _threads

SOURCES = ("_loops.py", "_memory.py", "_dense.py", "_tiles.py", "_vectors.py")  # what the machine code is made of


def kept(function: Any) -> Any:
    """A function that Numba compiles, with a cache where there is a folder for it; else its code lives in memory."""
    with suppress(RuntimeError, OSError):  # there is none
        cache = _Cache(function.py_func)
        if _is_ours(cache.cache_path):
            function._cache = cache
    return function


def _is_ours(folder: str) -> bool:
    """Whether only this user, or the owner of this file, may put files there, or another folder in its place."""
    if not hasattr(os, "geteuid"):
        return True  # Windows, where the folders of a user are the user's
    found, above = os.stat(folder), os.stat(Path(folder).parent)
    if above.st_mode & stat.S_IWOTH and not above.st_mode & stat.S_ISVTX:
        return False
    return found.st_uid in (os.geteuid(), os.stat(__file__).st_uid) and not found.st_mode & stat.S_IWOTH


def compiled_whole(function: Any) -> Any:
    """The same function; what Numba does at a call that it has no code for is done whole."""
    compile_for = function._compile_for_args
    function._compile_for_args = lambda *arguments: _threads.whole(partial(compile_for, *arguments))
    return function


class _Cache(FunctionCache):  # type: ignore[misc]  # Numba has no types
    """Numba's own, which looks at one source only and raises what a disk may."""

    def __init__(self, function: Any) -> None:
        super().__init__(function)
        here = Path(__file__).parent
        self.sources = hashlib.sha256(b"".join((here / name).read_bytes() for name in SOURCES)).hexdigest()

    def _index_key(self, sig: Any, codegen: Any) -> Any:
        return (*super()._index_key(sig, codegen), self.sources)

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            found = super().load_overload(sig, target_context)
        except OSError:
            return None
        except Exception:  # cut off, or of another make: begin anew
            with suppress(OSError):
                self.flush()
            return None
        # Of two processes that save at once, one may have left its code under the other's name.
        return found if found is not None and found.signature.args == tuple(getattr(sig, "args", sig)) else None

    def save_overload(self, sig: Any, data: Any) -> None:
        with suppress(OSError):
            super().save_overload(sig, data)
