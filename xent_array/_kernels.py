"""The CUDA sources: found, assembled into one text per kernel, and compiled by CuPy on first launch.

A text is a file of kernels/ with its local includes inlined, and one last line that instantiates the kernel. There are
only plain `extern "C"` names and no compiler options: every version of CuPy caches those on disk.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

_INCLUDE = re.compile(r'^#include "(.+)"$')
# What CuPy, its loader, NVRTC and CUDA say when something is not installed. The types of their exceptions do not tell:
# a full disk and an exhausted GPU raise the same.
_MISSING = re.compile(
    r"(?i)fail(ed|ure) (to load|to open|to find|finding) .*(nvrtc|cudart|CUDA headers)"
    r'|cannot open source file "[^"]*\.h"|cudaErrorInsufficientDriver'
)


@dataclass(frozen=True, slots=True)
class Kernel:
    """One kernel: its file, its name, and the line that instantiates it."""

    file: str
    name: str
    line: str

    @property
    def text(self) -> str:
        return f"{source(self.file)}\n{self.line}\n"


def kernel(file: str, macro: str, words: str, *parameters: object) -> Kernel:
    """The kernel that `macro` of `file` defines with these parameters; `words` begin its name."""
    given = [str(p).lower() if isinstance(p, bool) else str(p) for p in parameters]
    name = "_".join(("xent", words, *given)).lower()
    return Kernel(file, name, f"{macro}({', '.join((name, *given))})")


@cache
def folder() -> Path:
    """kernels/: inside an installed package, beside it in a checkout."""
    here = Path(__file__).parent
    for candidate in (here / "kernels", here.parent / "kernels"):
        if (candidate / "device.cuh").exists():
            return candidate
    raise FileNotFoundError(f"the CUDA sources of xent_array are missing: neither in {here} nor beside it")


@cache
def source(file: str) -> str:
    """A file with its local includes inlined, each once.

    CuPy's cache does not look into included files, so there must be none left. The text is ASCII, because CuPy writes
    it to a file in the encoding of the locale, which may have no Σ, and because some versions of NVRTC switch the
    locale to ASCII themselves. Only comments hold other characters. Each becomes one "?", so that the lines and columns
    in a compiler's message are those of the file.
    """
    return "\n".join(_lines(file, set())).encode("ascii", "replace").decode("ascii")


def _lines(file: str, seen: set[str]) -> Iterator[str]:
    seen.add(file)
    for line in (folder() / file).read_text(encoding="utf-8").splitlines():
        found = _INCLUDE.match(line)
        if found is None:
            if line != "#pragma once":
                yield line
        elif found[1] not in seen:
            yield from _lines(found[1], seen)


@cache
def compiled(kernel: Kernel, device: int) -> Any:
    """The kernel as CuPy launches it on a device: compiled, or taken from CuPy's cache, on the first call."""
    import cupy

    raw = cupy.RawKernel(kernel.text, kernel.name)
    try:
        raw.compile()
    except Exception as error:
        if _MISSING.search(str(error)):
            raise RuntimeError(f"{_advice(cupy)} CuPy says: {error}") from error
        raise
    return raw


def _advice(cupy: Any) -> str:
    """What to install if NVRTC, the CUDA headers or the driver are missing."""
    major, driver = (v() // 1000 for v in (cupy.cuda.runtime.runtimeGetVersion, cupy.cuda.runtime.driverGetVersion))
    if driver == 0:
        return "there is no NVIDIA driver here, or none that CuPy finds."
    if driver < major:
        return (
            f"this CuPy is for CUDA {major}, and the driver is for CUDA {driver}:"
            f" update the driver, or install cupy-cuda{driver}x instead."
        )
    suffix = "" if major >= 13 else f"-cu{major}"
    return (
        "CuPy cannot compile CUDA kernels here, for which it needs NVRTC and the CUDA headers:"
        f" pip install nvidia-cuda-nvrtc{suffix} nvidia-cuda-runtime{suffix}, or xent_array[cuda{major}]."
    )
