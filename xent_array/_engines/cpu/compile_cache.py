"""The machine-code cache on disk, in a directory that no other user can write to.

Numba writes the cache and chooses its directory: NUMBA_CACHE_DIR, or else next to the source, or else the user's cache
directory. This module adds what Numba does not do. Cached code is loaded and executed, so it must be the user's own,
and compiled from exactly these sources; and a call must not fail because the directory does.
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

from . import threads

HERE = Path(__file__).parent
SOURCES = (HERE / "memory.py", *sorted((HERE / "loops").glob("*.py")))  # what the machine code is compiled from


def kept(function: Any) -> Any:
    """A function that Numba compiles, with a cache if there is a directory for it; else its code is in memory only."""
    with suppress(RuntimeError, OSError):  # there is no such directory
        cache = _Cache(function.py_func)
        if _is_ours(cache.cache_path):
            function._cache = cache
    return function


def _is_ours(folder: str) -> bool:
    """Whether only this user and the owner of this file can write to the directory, or replace it by another one."""
    if not hasattr(os, "geteuid"):
        return True  # Windows, where other users cannot write to a user's directories
    found, above = os.stat(folder), os.stat(Path(folder).parent)
    if above.st_mode & stat.S_IWOTH and not above.st_mode & stat.S_ISVTX:
        return False
    return found.st_uid in (os.geteuid(), os.stat(__file__).st_uid) and not found.st_mode & stat.S_IWOTH


def compiled_whole(function: Any) -> Any:
    """The same function, but compiling it for new argument types runs to completion or raises `CannotCompile`."""
    compile_for = function._compile_for_args
    reasons: list[str] = []

    def compile_once(*arguments: Any) -> Any:
        if not reasons:
            try:
                return compile_for(*arguments)
            except Exception as error:
                reasons.append(f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}")
        # Tasks run one at a time: once one has failed, no other thread of the same call gets to write anything.
        raise threads.CannotCompile(reasons[0])

    function._compile_for_args = lambda *arguments: threads.whole(partial(compile_once, *arguments))
    return function


class _Cache(FunctionCache):  # type: ignore[misc]  # Numba has no types
    """Numba's cache, which by itself checks only one source file and passes on the errors of the disk."""

    def __init__(self, function: Any) -> None:
        super().__init__(function)
        self.sources = hashlib.sha256(b"".join(source.read_bytes() for source in SOURCES)).hexdigest()

    def _index_key(self, sig: Any, codegen: Any) -> Any:
        return (*super()._index_key(sig, codegen), self.sources)

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            found = super().load_overload(sig, target_context)
        except OSError:
            return None
        except Exception:  # truncated, or in another format: start over
            with suppress(OSError):
                self.flush()
            return None
        # If two processes save at once, the index entry of one may refer to the code of the other.
        return found if found is not None and found.signature.args == tuple(getattr(sig, "args", sig)) else None

    def save_overload(self, sig: Any, data: Any) -> None:
        with suppress(OSError):
            super().save_overload(sig, data)
