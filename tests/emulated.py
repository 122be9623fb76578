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
        self.launches = []

    def declines(self, rows):
        return None if rows.xp is np else f"takes CuPy arrays, and these are of {rows.xp.__name__}"

    def chip(self, array):
        return self.compute

    def on(self, array):
        return contextlib.nullcontext()

    def empty(self, xp, shape, dtype):
        return simt.empty(shape, dtype)

    def launch(self, kernel, blocks, threads, arguments, shared=0, cluster=1):
        text = kernel.text
        for old, new in self.patches:
            if old in text:
                text = simt.patch(text, old, new)
        self.launches.append(kernel.name)
        tally.KERNELS.add(kernel.name)
        tally.COUNTS["launches"] += 1
        simt.compile(text, [kernel.name], self.mode).launch(
            kernel.name, blocks, threads, arguments,
            shared_bytes=shared, cluster=cluster, order=self.order, seed=self.seed, flush=self.flush,
        )  # fmt: skip


def engine(**how):
    return Cuda(Emulator(**how))
