"""The CUDA engine on NumPy arrays: the plans, arguments and kernels of a GPU, run by the emulation in support/simt."""

import contextlib
import functools
import os
import re
import threading
from collections.abc import Iterable, Sequence

import numpy as np

from xent_array import _kernels
from xent_array._engines.cuda import Cuda
from xent_array._kernels import Kernel

from . import simt, tally

LOCK = threading.Lock()  # the emulation is that of one GPU
_prepared: dict[tuple[Kernel, str], simt.Library] = {}


def prepare(wanted: Iterable[tuple[Sequence[Kernel], str]]) -> None:
    """Compile each (kernels, mode) in parallel, for `Emulator` to find.

    Kernels of one file become one text: each further one takes a third of the time of the first.
    """
    requests = {}
    by_file = {}
    for kernels, mode in wanted:
        for file in {kernel.file: None for kernel in kernels}:
            by_file[tuple(dict.fromkeys(kernel for kernel in kernels if kernel.file == file)), mode] = None
    for kernels, mode in by_file:
        text = "\n".join([_kernels.source(kernels[0].file), *(kernel.line for kernel in kernels)])
        requests[text, mode] = text, [kernel.name for kernel in kernels], mode, kernels
    simt.prepare(request[:3] for request in requests.values())
    for *request, kernels in requests.values():
        _prepared.update({(kernel, request[2]): simt.compile(*request) for kernel in kernels})


def of_jobs(kernel: Kernel, jobs: Sequence[str]) -> list[Kernel]:
    """If the kernel does one of these jobs, the same kernel for each of them; else the kernel alone."""
    macro, name, ctype, *how = re.findall(r"\w+", kernel.line)
    if name.split("_")[1] == "split":  # every job is made of these two
        jobs = ("STATS", "GRAD")
    if not how or how[0] not in jobs:
        return [kernel]
    return [_kernels.kernel(kernel.file, macro, name.split("_")[1].upper(), ctype, each, *how[1:]) for each in jobs]


@functools.cache
def _library(kernel: Kernel, mode: str, patches: tuple[tuple[str, str], ...], jobs: tuple[str, ...]) -> simt.Library:
    """The kernel's library, as prepared, or compiled now with the patches that apply to it."""
    text = kernel.text
    patches = tuple((old, new) for old, new in patches if old in text)
    if not patches:
        if (kernel, mode) not in _prepared:
            prepare([(of_jobs(kernel, jobs), mode)])
        return _prepared[kernel, mode]
    for old, new in patches:
        text = simt.patch(text, old, new)
    return simt.compile(text, [kernel.name], mode)


class Emulator:
    """Takes the place of CuPy. `chip` is the compute capability it reports; `patches` plant bugs in the sources.

    `jobs` will be asked of every kernel; they are compiled together.
    """

    def __init__(self, mode="plain", order="fifo", seed=0, chip=90, flush=False, patches=(), jobs=()):
        self.mode, self.order, self.seed = os.environ.get("SIMT_MODE", mode), order, seed
        self.flush, self.patches, self.jobs = flush, patches, jobs
        self.compute = chip
        self.launches, self.buffers, self.copies, self.waits = [], 0, 0, 0

    def declines(self, rows):
        return None if rows.xp is np else f"takes CuPy arrays, and these are of {rows.xp.__name__}"

    def chip(self, array):
        return self.compute

    def multiprocessors(self, array):
        """By turns none, so that every block tests before it reads and prefetches for the next, and enough for all."""
        return 132 * ((len(self.launches) + self.seed) % 2)

    def on(self, array):
        return contextlib.nullcontext()

    def empty(self, shape, dtype):
        self.buffers += 1
        return simt.empty(shape, dtype)

    def copy(self, array, to):
        self.copies += 1
        to[...] = array
        for part in [to] if to.flags.c_contiguous else to:
            if part.flags.c_contiguous and self.mode == "check":
                simt.written(part.ctypes.data, part.nbytes)

    def look(self, array):
        pointer = simt.address(array)
        return pointer, (array.shape, array.strides, array.dtype, array.flags.writeable, pointer % 16)

    def stream(self):
        return 7

    def wait(self):
        self.waits += 1

    def to_device(self, values):
        return values.copy()

    def to_host(self, array):
        self.waits += 1
        return array.copy()

    def ready(self, kernel, blocks, threads, cluster=1):

        def run(words, slots, arrays):
            self.launches.append(kernel.name)
            tally.KERNELS.add(kernel.name)
            tally.COUNTS["launches"] += 1
            argument = simt.Struct(words.tobytes(), {at: arrays[k] for at, k in slots})
            with LOCK:
                _library(kernel, self.mode, tuple(self.patches), self.jobs).launch(
                    kernel.name, blocks, threads, [argument],
                    cluster=cluster, order=self.order, seed=self.seed, flush=self.flush,
                )  # fmt: skip

        return run


def engine(**how):
    return Cuda(Emulator(**how))
