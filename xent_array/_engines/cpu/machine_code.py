"""The loops as functions that Python can call: loaded from a file, or else compiled by LLVM and kept in one.

Kept code is executed, so it must be the user's own, and compiled from exactly these sources for exactly this processor;
and a call must not fail because a file or its folder does.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import stat
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from . import threads
from .loops import AXES, DATA, ITEMS, NAME, POINTER, SHAPE

HERE = Path(__file__).parent
SOURCES = (HERE / "memory.py", *sorted((HERE / "loops").glob("*.py")))  # what the machine code is compiled from

MESSAGE = 300  # characters of LLVM's own, at most

Function = Callable[[tuple[Any, ...]], float]

_TYPE = ctypes.CFUNCTYPE(ctypes.c_double, ctypes.py_object)  # releases the interpreter's lock while it runs
_DIGEST = hashlib.sha256().digest_size
_functions: dict[tuple[str, ...], Function] = {}
_engines: list[Any] = []  # of LLVM, which own the memory that code is loaded to


def function(*name: str) -> Function:
    """What `loops.build.build` makes of these arguments, as a function that takes a tuple of arrays.

    The arrays must have the dtypes that it was built for, and nothing checks that.

    Raises
    ------
    CannotCompile
        If there is no such code and LLVM fails to make it.
    """
    found = _functions.get(name)
    return threads.whole(partial(_get, name)) if found is None else found


def missing() -> str | None:
    """Why nothing can be compiled, as far as that can be known before llvmlite is imported."""
    if not _is_installed("llvmlite"):
        return "llvmlite is not installed"
    if not _is_laid_out_as_known():
        return "LLVM cannot compile the loops: this Python or NumPy keeps arrays in another way"
    return None


def _is_installed(library: str) -> bool:
    try:
        return importlib.util.find_spec(library) is not None
    except ModuleNotFoundError:
        return False
    except ValueError:  # it is in `sys.modules` without a spec
        return True


def _is_laid_out_as_known() -> bool:
    """Whether `loops.function` finds what is in a tuple, and the data and the shape of an array."""
    array = np.empty((2, 3))
    given = (None, array)

    def word(address: int, type_: Any = ctypes.c_size_t) -> Any:
        return type_.from_address(address).value

    if sys.implementation.name != "cpython" or ctypes.sizeof(ctypes.c_size_t) != 8:
        return False
    start = id(array)
    return bool(
        word(id(given) + ITEMS + POINTER) == start
        and (word(start + DATA) == array.__array_interface__["data"][0] and word(start + AXES, ctypes.c_int) == 2)
        and [word(word(start + SHAPE) + POINTER * axis) for axis in range(2)] == [2, 3]
    )


def _get(name: tuple[str, ...]) -> Function:
    if name not in _functions:
        _functions[name] = _stored(name) or _compiled(name)
    return _functions[name]


def _stored(name: tuple[str, ...]) -> Function | None:
    for folder in _folders():
        with suppress(Exception):  # there is none, or it is damaged
            content = _read(folder, _file(name))
            code = content[_DIGEST:]
            if hashlib.sha256(code).digest() == content[:_DIGEST]:
                return _loaded(code)
    return None


def _compiled(name: tuple[str, ...]) -> Function:
    try:
        from .loops import build
    except MemoryError as error:  # may not happen again
        raise threads.Busy(f"llvmlite cannot be used: {error}") from error
    except Exception as error:  # for example, a library that it needs is missing
        raise threads.CannotCompile(f"llvmlite cannot be used: {error}") from error
    try:
        code = build.build(*name)
        found = _loaded(code)
    except MemoryError as error:
        raise threads.Busy("LLVM cannot compile the loops: there is no memory left") from error
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:MESSAGE]}"
        raise threads.CannotCompile(f"LLVM cannot compile the loops: {reason}") from error
    _store(name, code)
    return found


def _loaded(code: bytes) -> Function:
    """The function in an object file."""
    from llvmlite import binding

    from .loops.processor import target_machine

    engine = binding.create_mcjit_compiler(binding.parse_assembly(""), target_machine())
    engine.add_object_file(binding.ObjectFileRef.from_data(code))
    engine.finalize_object()
    address = engine.get_function_address(NAME)
    if not address:
        raise ValueError("the code has no entry")
    _engines.append(engine)
    return _TYPE(address)


# Files


def _folders() -> Iterator[Path]:
    """Where code may be kept, in order."""
    told, own = os.environ.get("XENT_ARRAY_CACHE_DIR"), f"xent_array-{_short(os.fsencode(HERE))}"
    if told:
        yield Path(told) / own
        return
    yield HERE / "__pycache__"
    with suppress(RuntimeError):  # there is no home
        if sys.platform == "win32":
            yield Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / own
        elif sys.platform == "darwin":
            yield Path.home() / "Library" / "Caches" / own
        else:
            yield Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / own


def _file(name: tuple[str, ...]) -> str:
    return f"{_environment_of(name)}{_sources()}.code"


def _environment_of(name: tuple[str, ...]) -> str:
    """The file's name up to what stands for the sources."""
    return f"{'-'.join(name)}.{_environment()}."


def _short(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


@cache
def _sources() -> str:
    return _short(b"".join(source.read_bytes() for source in SOURCES))


@cache
def _environment() -> str:
    """Stands for everything beside the sources that machine code follows from."""
    import llvmlite
    from llvmlite import binding

    from .loops import processor

    parts = (
        sys.implementation.cache_tag, ITEMS, DATA, llvmlite.__version__, binding.llvm_version_info,
        processor.triple(), processor.name(), processor.features(),
    )  # fmt: skip
    return _short(repr(parts).encode())


def _store(name: tuple[str, ...], code: bytes) -> None:
    """Keep code in the first folder that can be written to; if there is none, it is in memory only."""
    for folder in _folders():
        with suppress(Exception):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not _is_ours(folder):
                continue
            _write(folder / _file(name), hashlib.sha256(code).digest() + code)
            with suppress(OSError):
                _remove_older(folder, name)
            return


_NO_LINK = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)


def _read(folder: Path, name: str) -> bytes:
    """A file that nobody else can have written, in a folder that nobody else can write to; else OSError."""
    if not _is_ours(folder):
        raise PermissionError(f"others can write to {folder}")
    with open(folder / name, "rb", opener=lambda path, _: os.open(path, os.O_RDONLY | _NO_LINK)) as file:
        if not _is_only_ours(os.fstat(file.fileno())):
            raise PermissionError(f"others can write to {file.name}")
        return file.read()


def _write(file: Path, content: bytes) -> None:
    """Put a file there whole, whoever else does so."""
    part = file.with_suffix(f".{os.getpid()}-{threading.get_ident()}")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | _NO_LINK
    try:
        with open(part, "wb", opener=lambda path, _: os.open(path, flags, 0o644)) as opened:
            opened.write(content)
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)


def _remove_older(folder: Path, name: tuple[str, ...]) -> None:
    """Remove what was compiled from other sources."""
    for other in folder.glob(f"{_environment_of(name)}*.code"):
        if other.name != _file(name):
            other.unlink(missing_ok=True)


def _is_ours(folder: Path) -> bool:
    """Whether only this user and the owner of this file can write to the directory, or replace it by another one."""
    above = os.stat(folder.parent)
    is_replaceable = above.st_mode & (stat.S_IWOTH | stat.S_IWGRP) and not above.st_mode & stat.S_ISVTX
    return _is_only_ours(os.lstat(folder)) and (not is_replaceable or _is_only_ours(above))


def _is_only_ours(found: os.stat_result) -> bool:
    """Whether a file or directory is of this user or the owner of this file, no link, and not writable for others.

    A group with the number of its user is taken for that user's own, as it is where new files are writable for groups.
    """
    if not hasattr(os, "geteuid"):
        return True  # Windows, where other users cannot write to a user's directories
    is_shared = found.st_mode & stat.S_IWOTH or (found.st_mode & stat.S_IWGRP and found.st_gid != found.st_uid)
    return (
        found.st_uid in (os.geteuid(), os.stat(__file__).st_uid) and not is_shared and not stat.S_ISLNK(found.st_mode)
    )
