"""The CUDA engine on NumPy arrays: its plans, arguments and kernels as on a GPU, run by the emulation in simt/."""

import contextlib
import os

import numpy as np
import simt
import tally

from xent_array._engines.cuda import Cuda


class Emulator:
    """Stands where CuPy stands. `chip` is what it says it is; `patches` plants bugs in the text of a file."""

    def __init__(self, mode="plain", order="fifo", seed=0, chip=90, flush=False, patches=()):
        self.mode, self.order, self.seed = os.environ.get("SIMT_MODE", mode), order, seed
        self.flush, self.patches = flush, patches
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
            text = kernel.text
            for old, new in self.patches:
                if old in text:
                    text = simt.patch(text, old, new)
            self.launches.append(kernel.name)
            tally.KERNELS.add(kernel.name)
            tally.COUNTS["launches"] += 1
            argument = simt.Struct(words.tobytes(), {at: arrays[k] for at, k in slots})
            simt.compile(text, [kernel.name], self.mode).launch(
                kernel.name, blocks, threads, [argument],
                cluster=cluster, order=self.order, seed=self.seed, flush=self.flush,
            )  # fmt: skip

        return run


def engine(**how):
    return Cuda(Emulator(**how))
