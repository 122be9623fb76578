"""Kernels compiled by g++ and run on the CPU under an emulation of the CUDA model.

    from support import simt

    library = simt.compile(source, ["entry"], mode="check")     # once per text and mode; cached on disk
    simt.prepare([(source, ["entry"], "check"), …])              # many of them, in parallel
    library.launch("entry", grid, block, args, cluster=1, order="fifo", seed=0, flush=False)

source   the text that NVRTC would get: local includes inlined, entry lines appended. Kernels follow the names and rules
         of kernels/device.cuh.
entries  the names of the extern "C" kernels that will be launched.
mode     "plain"  -O1: fast; a local variable that g++ sees read before it is written is a SimtError of `compile`.
                  Products are fused into the sums that use them, as NVRTC does, if the processor can: `build.fuses()`
         "check"  our own callbacks for g++ -fsanitize=thread: every access is checked for races (happens-before over
                  barriers, clusters, messages, tickets), reads of unwritten memory, bounds, alignment
         "asan"   AddressSanitizer and UBSan; the process must have been started with `simt.build.asan_environment()`.
                  In both of these all products are rounded: a kernel must be correct either way
arch     the value of __CUDA_ARCH__, 900 by default
defines  names for g++'s -D

grid     int or tuple of up to three; block: int; cluster: blocks in a cluster (gridDim.x is a multiple of it)
args     as for a CuPy RawKernel: arrays (anything `simt.address` takes) are pointers, None a null pointer, Python ints
         are 8-byte integers, floats doubles, bools bools, NumPy scalars keep their type; a `simt.Struct` goes by value.
         A kind or size that does not match the kernel's parameter is a TypeError here (and garbage on a GPU).
order    which of the runnable threads continues: "fifo" (warp after warp, lane after lane), "lifo", "random", or
         "priority": warps have random priorities that change now and then, which lets some run far ahead of
         others. The last two follow from `seed`. Messages between blocks are delivered early in "fifo", late in
         "lifo", else at random moments; blocks (clusters) run one after another, in that order.
flush    whether subnormal numbers are 0, as floats are under CuPy's -ftz=true (here doubles too, unlike on a GPU)

Whatever would be an error on a GPU raises SimtError with .kind, one of
    deadlock, divergence, barrier, cluster, mbarrier, misaligned, bounds, shared              in every mode
    race, uninitialised, l1 (another block's result, read without a fence), ubsan             in "check"
    asan, ubsan                                                                               in "asan"
and a text that names the thread and the line of the source.

`simt.empty(shape, dtype)` is an array that the checker knows to be unwritten (and all bytes 0xFF); every other array
counts as written. `simt.patch(source, old, new)` plants a bug; `old` must occur in the source (once, by default).

What this cannot show: whether the PTX in the wrappers of device.cuh is right; the accuracy of ex2.approx and of the
GPU's libm; whether NVRTC fuses the same products as g++; __launch_bounds__ and the attributes that a launch needs; two
clusters at once; any timing. The checker remembers two readers of a byte, so it may miss the third. Of a struct that
the kernel defines it misses a copy in the argument or the result of a call (`f(x[i])`, `x[i] = f()`), but not one in a
variable (`T v = x[i]`).
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
import time
import weakref
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

HERE = Path(__file__).parent
ORDERS = ("fifo", "lifo", "random", "priority")

_COMMON = ("-std=c++17", "-g1", "-fPIC", "-ffp-contract=off", "-fno-gnu-unique", "-Wno-unknown-pragmas")
_FUSED = ("-ffp-contract=fast", "-fexpensive-optimizations")  # the second, which fuses, is not part of -O1
KERNEL_FLAGS = {
    "plain": ("-O1", *_FUSED, "-Werror=uninitialized", "-Werror=maybe-uninitialized"),
    "check": ("-O0", "-fsanitize=thread,undefined", "-fno-sanitize=vptr,object-size,alignment,null"),
    "asan": ("-O0", "-fsanitize=address,undefined", "-fno-sanitize=vptr,object-size", "-fsanitize-recover=address"),
}
MACHINE = {
    "plain": (("simt.cpp",), ("-O2",)),
    "check": (("simt.cpp", "check.cpp"), ("-O2", "-DSIMT_CHECK")),
    "asan": (("simt.cpp",), ("-O2", "-DSIMT_ASAN")),
}


class SimtError(Exception):
    """What would be an error on a GPU: `kind` is one word, the text names the thread and the line."""

    def __init__(self, kind: str, text: str):
        super().__init__(f"{kind}: {text}")
        self.kind = kind


class _Region(ctypes.Structure):
    _fields_ = [
        ("base", ctypes.c_void_p),
        ("bytes", ctypes.c_uint64),
        ("writable", ctypes.c_int),
        ("argument", ctypes.c_int),
    ]


class _Launch(ctypes.Structure):
    _fields_ = [
        ("call", ctypes.c_void_p),
        ("args", ctypes.POINTER(ctypes.c_void_p)),
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32),
        ("cluster", ctypes.c_uint32),
        ("order", ctypes.c_uint32),
        ("flush", ctypes.c_uint32),
        ("seed", ctypes.c_uint64),
        ("regions", ctypes.POINTER(_Region)),
        ("n_regions", ctypes.c_int64),
    ]


def patch(source: str, old: str, new: str, times: int = 1) -> str:
    """The source with a bug planted: `old` must occur exactly `times` times."""
    found = source.count(old)
    if found != times:
        raise ValueError(f"{old!r} is in the source {found} times, not {times}")
    return source.replace(old, new)


def compile(
    source: str,
    entries: Sequence[str],
    mode: str = "plain",
    *,
    arch: int = 900,
    defines: Iterable[str] = (),
) -> Library:
    """A library of kernels, from the cache if this text has been compiled before; see the top of this file."""
    return _compile(source, tuple(entries), mode, arch, tuple(defines))


def prepare(requests: Iterable[tuple[str, Sequence[str], str]], jobs: int = 2) -> None:
    """Compile each (source, entries, mode) in parallel, for `compile` to find."""
    requests = list(requests)
    for mode in {mode for _, _, mode in requests}:
        _machine_file(mode)
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(lambda request: compile(*request), requests))


@functools.cache
def _compile(source: str, entries: tuple[str, ...], mode: str, arch: int, defines: tuple[str, ...]) -> Library:
    if mode == "asan" and "libasan" not in os.environ.get("LD_PRELOAD", ""):
        raise RuntimeError("mode 'asan' needs a process that was started with simt.build.asan_environment()")
    text = source + "\n" + "".join(f"SIMT_ENTRY({entry})\n" for entry in entries)
    machine = _machine_file(mode)
    processor = ("-mfma",) if "__FMA__" in _macros() else ()  # an option of x86; elsewhere it is on or absent
    names = (f"-D__CUDA_ARCH__={arch}", *(f"-D{name}" for name in defines))
    flags = (*_COMMON, *KERNEL_FLAGS[mode], *processor, *names)
    file = _built(f"kernel_{mode}", text, (*flags, "-include", str(HERE / "simt.h")), (HERE / "simt.h",), (machine,))
    return Library(file, mode, source)


def asan_environment() -> dict[str, str]:
    """The environment for a process that can use mode "asan"."""
    libraries = [_gxx(f"-print-file-name={name}").strip() for name in ("libasan.so", "libstdc++.so.6")]
    options = "detect_leaks=0 symbolize=0 halt_on_error=0 suppress_equal_pcs=0"
    options += " handle_segv=0 handle_sigbus=0 use_sigaltstack=0"  # simt.cpp catches those
    return {**os.environ, "LD_PRELOAD": " ".join(libraries), "ASAN_OPTIONS": options.replace(" ", ":")}


def available() -> str | None:
    """Why the emulation cannot be used here; None if it can."""
    return None if shutil.which("g++") else "needs g++"


def fuses() -> bool:
    """Whether this processor has a fused multiply-add, so that mode "plain" uses it."""
    return "__FP_FAST_FMAF " in _macros()


class Library:
    """Compiled kernels; `compile` makes it."""

    def __init__(self, file: Path, mode: str, source: str):
        self.mode, self.source, self._file = mode, source, file
        self._machine = _machine(mode)
        self._kernels = ctypes.CDLL(str(file))

    def parameters(self, entry: str) -> list[str]:
        """The parameters of a kernel: p(ointer), i(nteger), f(loat), b(ool) or s(truct), each with its bytes."""
        kinds = ctypes.create_string_buffer(1024)
        self._kernels[f"simt_kinds_{entry}"](kinds)
        return [f"{kind[0]}{int(kind[1:])}" for kind in re.findall(r"\w\d{4}", kinds.value.decode())]

    def launch(self, entry, grid, block, args, cluster=1, order="fifo", seed=0, flush=False):
        """Run a kernel to completion; see the top of this file."""
        grid = (grid,) if isinstance(grid, int) else tuple(grid)
        grid += (1,) * (3 - len(grid))
        if block % 32 or not 32 <= block <= 1024:
            raise ValueError(f"the emulation wants whole warps, at most 32 of them: a block of {block} threads")
        if block * cluster > 8192:
            raise ValueError(f"the emulation has numbers for 8192 threads in a cluster: {cluster} blocks of {block}")
        if grid[0] % cluster:
            raise ValueError(f"gridDim.x = {grid[0]} is no multiple of the cluster of {cluster}")
        if not all(grid):
            raise ValueError(f"an empty grid: {grid}")
        held = [_argument(i, value) for i, value in enumerate(args)]  # keeps temporaries alive
        given, wanted = [kind for kind, _, _ in held], self.parameters(entry)
        if given != wanted:
            wrong = next((i for i, (g, w) in enumerate(zip(given, wanted, strict=False)) if g != w), None)
            where = "their number" if wrong is None else f"argument {wrong} is {given[wrong]}, not {wanted[wrong]}"
            raise TypeError(f"{entry} takes ({', '.join(wanted)}), not ({', '.join(given)}): {where}")
        if self.mode == "check":
            _mark_fresh()
        regions = [region for _, _, of_value in held for region in of_value]
        pointers = (ctypes.c_void_p * max(1, len(held)))(*(ctypes.addressof(value) for _, value, _ in held))
        what = _Launch(
            ctypes.cast(self._kernels[f"simt_call_{entry}"], ctypes.c_void_p).value,
            pointers,
            (ctypes.c_uint32 * 3)(*grid),
            block,
            cluster,
            ORDERS.index(order),
            flush,
            seed,
            (_Region * max(1, len(regions)))(*regions),
            len(regions),
        )
        message = ctypes.create_string_buffer(1 << 16)
        if self._machine.simt_launch(ctypes.byref(what), message, ctypes.c_uint64(len(message))):
            raise self._error(entry, message.value.decode(errors="replace"))

    def _error(self, entry: str, message: str) -> SimtError:
        kind, line, offset, text = message.split("|", 3)
        if kind == "asan":
            frame = re.search(rf"{self._file.name}\+(0x[0-9a-f]+)", text)
            offset = str(int(frame[1], 16) - 1) if frame else "0"
            text = "; ".join(re.findall(r"(?m)^.*(?:ERROR|READ of|WRITE of|is located).*$", text))
        number = int(line)
        if not number and int(offset):  # only the instruction is known
            command = ["addr2line", "-i", "-e", str(self._file), hex(int(offset))]
            found = subprocess.run(command, capture_output=True, text=True, check=False)
            at = re.search(r"source\.cpp:(\d+)", found.stdout)
            number = int(at[1]) if at else 0
        lines = self.source.splitlines()
        place = f"\n    {entry}, line {number}: {lines[number - 1].strip()}" if 0 < number <= len(lines) else ""
        return SimtError(kind, text + place)


_CTYPES = {
    "i1": ctypes.c_int8, "i2": ctypes.c_int16, "i4": ctypes.c_int32, "i8": ctypes.c_int64,
    "f4": ctypes.c_float, "f8": ctypes.c_double, "b1": ctypes.c_bool,
}  # fmt: skip


class Struct(NamedTuple):
    """A struct by value: its bytes, and the arrays its pointers lead to, by the offset of the word (for messages)."""

    data: bytes
    arrays: dict[int, np.ndarray]


def _argument(number: int, value):
    """(kind, ctypes object that holds the value, memory regions) as CuPy would pass it."""
    if isinstance(value, Struct):
        regions = [region for at, array in value.arrays.items() if (region := _region(at, array)) is not None]
        return f"s{len(value.data)}", ctypes.create_string_buffer(value.data, len(value.data)), regions
    if value is None:
        return "p8", ctypes.c_void_p(0), []
    if isinstance(value, (bool, int, float, np.generic)):
        kind = np.asarray(value).dtype
        letter = {"u": "i"}.get(kind.kind, kind.kind) + str(kind.itemsize)
        return letter, _CTYPES[letter](value if isinstance(value, (bool, int, float)) else value.item()), []
    array = value if isinstance(value, np.ndarray) else np.asarray(value)
    region = _region(number, array)
    return "p8", ctypes.c_void_p(address(array)), [] if region is None else [region]


def _region(number: int, array: np.ndarray) -> _Region | None:
    """The memory of an array, for messages about the argument of that number."""
    if array.size == 0:
        return None
    steps = [(n - 1) * step for n, step in zip(array.shape, array.strides, strict=True)]
    low, high = sum(min(0, step) for step in steps), sum(max(0, step) for step in steps)
    return _Region(address(array) + low, high - low + array.itemsize, array.flags.writeable, number)


def address(array) -> int:
    """The data pointer of an array: any NumPy array, or what NumPy can view without a copy."""
    return (array if isinstance(array, np.ndarray) else np.asarray(array)).ctypes.data


# Arrays that the checker will be told are unwritten, when it is next used; and those it knows about.
_fresh: list[weakref.ref] = []


def empty(shape, dtype=np.float64) -> np.ndarray:
    """An array of bytes 0xFF (NaN, -1) that the checker knows to be unwritten."""
    array = np.empty(shape, dtype)
    ctypes.memset(array.ctypes.data, 255, array.nbytes)
    if array.size:
        _fresh.append(weakref.ref(array))
    return array


def written(start: int, size: int) -> None:
    """Tell the checker that the host has written these bytes."""
    _mark_fresh()
    _machine("check").simt_mark(ctypes.c_void_p(start), ctypes.c_uint64(size), 0)


def _mark_fresh() -> None:
    mark = _machine("check").simt_mark
    while _fresh:
        array = _fresh.pop()()
        if array is not None:
            where = ctypes.c_void_p(array.ctypes.data), ctypes.c_uint64(array.nbytes)
            mark(*where, 1)
            weakref.finalize(array, mark, *where, 0)


# ---------------------------------------------------------------------------------------------------- g++ and its cache


def _gxx(*arguments: str) -> str:
    done = subprocess.run(["g++", *arguments], capture_output=True, text=True, check=False)
    if "uninitialized]" in done.stderr:
        raise SimtError("uninitialised", done.stderr)
    if done.returncode:
        raise RuntimeError(f"g++ {' '.join(arguments)}\n{done.stderr}")
    return done.stdout


@functools.cache
def _cache() -> Path:
    """Where compiled libraries are cached: beside pytest's own cache, never in a folder that others can write."""
    folder = HERE.parents[2] / ".pytest_cache" / "d" / "simt"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        week_ago = time.time() - 7 * 86400
        for file in folder.iterdir():
            if file.stat().st_mtime < week_ago:
                file.unlink(missing_ok=True)
    except OSError:
        return Path(tempfile.mkdtemp(prefix="simt"))
    return folder


@functools.cache
def _gxx_version() -> str:
    return _gxx("--version")


@functools.cache
def _macros() -> str:
    """The macros that g++ predefines on this processor."""
    return _gxx("-march=native", "-dM", "-E", "-x", "c++", os.devnull)


def _built(name: str, text: str, flags: Sequence[str], reads: Sequence[Path], libraries: Sequence[Path] = ()) -> Path:
    """The shared library of a text, compiled unless it is in the cache."""
    key = hashlib.sha256()
    for part in (
        text,
        *flags,
        _gxx_version(),
        *(file.read_text(encoding="utf-8") for file in reads),
        *map(str, libraries),
    ):
        key.update(part.encode() + b"\0")
    file = _cache() / f"{name}_{key.hexdigest()[:24]}.so"
    if file.exists():
        os.utime(file)
        return file
    with tempfile.TemporaryDirectory(dir=_cache()) as folder:
        source, output = Path(folder) / "source.cpp", Path(folder) / "output.so"
        source.write_text(text, encoding="utf-8")
        _gxx(*flags, "-c", str(source), "-o", str(output.with_suffix(".o")))
        # Sanitizers are not linked: simt.cpp supplies their callbacks, or LD_PRELOAD does.
        _gxx("-shared", "-o", str(output), str(output.with_suffix(".o")), *map(str, libraries), "-ldl")
        os.replace(output, file)
    return file


@functools.cache
def _machine_file(mode: str) -> Path:
    sources, flags = MACHINE[mode]
    text = "".join(f'#include "{HERE / name}"\n' for name in sources)
    return _built(f"machine_{mode}", text, (*_COMMON, *flags), sorted(HERE.glob("*.cpp")) + sorted(HERE.glob("*.h")))


@functools.cache
def _machine(mode: str) -> ctypes.CDLL:
    return ctypes.CDLL(str(_machine_file(mode)))
