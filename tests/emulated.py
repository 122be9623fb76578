"""The CUDA engine on NumPy arrays: its plans, arguments and kernels as on a GPU, run by the emulation in simt/."""

import contextlib
import functools
import os
import re
from collections.abc import Iterable

import numpy as np
import simt
import tally

from xent_array import _kernels
from xent_array._engines import cuda
from xent_array._kernels import Kernel

# What differs in the job alone, and is planned alike: who wants one kernel of these mostly wants the others too.
TOGETHER = (("LOSS", "STATS"), ("LOSS_AND_GRAD", "GRAD", "STATS_AND_GRAD"))


def together(kernel: Kernel) -> list[Kernel]:
    """The kernels that are compiled with this one, which takes little longer than to compile it alone."""
    if kernel.file == "sums.cu":
        return [kernel]
    macro, name, ctype, job, *how = re.findall(r"\w+", kernel.line)
    jobs = next((jobs for jobs in TOGETHER if job in jobs), (job,))
    return [_kernels.kernel(kernel.file, macro, name.split("_")[1].upper(), ctype, each, *how) for each in jobs]


def request(kernel: Kernel, mode: str, patches: tuple[tuple[str, str], ...] = ()) -> tuple[str, list[str], str]:
    """What `simt.compile` is asked for a kernel. One in which a bug is planted is compiled alone."""
    kernels, text = together(kernel), _kernels.source(kernel.file)
    for old, new in patches:
        if old in text:
            kernels, text = [kernel], simt.patch(text, old, new)
    return "\n".join([text, *(each.line for each in kernels)]), [each.name for each in kernels], mode


def requests(kernels: Iterable[tuple[Kernel, str]]) -> list[tuple[str, list[str], str]]:
    """What `simt.prepare` is asked for (kernel, mode) after (kernel, mode)."""
    return list({(together(kernel)[0], mode): request(kernel, mode) for kernel, mode in kernels}.values())


@functools.cache
def _library(kernel: Kernel, mode: str, patches: tuple[tuple[str, str], ...]) -> simt.Library:
    return simt.compile(*request(kernel, mode, patches))


class Emulator:
    """Stands where CuPy stands. `chip` is what it says it is; `patches` plants bugs in the text of a file."""

    def __init__(self, mode="plain", order="fifo", seed=0, chip=90, flush=False, patches=()):
        self.mode, self.order, self.seed = os.environ.get("SIMT_MODE", mode), order, seed
        self.flush, self.patches = flush, tuple(patches)
        self.compute = chip
        self.launches, self.rooms, self.copies = [], 0, 0

    def declines(self, rows):
        return None if rows.xp is np else f"takes CuPy arrays, and these are of {rows.xp.__name__}"

    def chip(self, array):
        return self.compute

    def on(self, array):
        return contextlib.nullcontext()

    def empty(self, shape, dtype):
        self.rooms += 1
        return simt.empty(shape, dtype)

    def copy(self, array, to):
        self.copies += 1
        to[...] = array

    def look(self, array):
        pointer = simt.address(array)
        return pointer, (array.shape, array.strides, array.dtype, array.flags.writeable, pointer % 16)

    def ready(self, kernel, blocks, threads, cluster=1):

        def run(words, slots, arrays):
            self.launches.append(kernel.name)
            tally.KERNELS.add(kernel.name)
            tally.COUNTS["launches"] += 1
            argument = simt.Struct(words.tobytes(), {at: arrays[k] for at, k in slots})
            _library(kernel, self.mode, tuple(self.patches)).launch(
                kernel.name, blocks, threads, [argument],
                cluster=cluster, order=self.order, seed=self.seed, flush=self.flush,
            )  # fmt: skip

        return run


def engine(**how):
    return cuda.Cuda(Emulator(**how))
