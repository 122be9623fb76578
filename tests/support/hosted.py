"""CuPy's own arrays in the memory of the host, and its launches run by the emulation: all of CuPy but the device."""

import contextlib
import ctypes
import re
from types import SimpleNamespace
from unittest import mock

import numpy as np

from xent_array import _kernels, _problem
from xent_array._engines.cuda import Cupy

from . import simt
from .emulated import LOCK


class Hosted(Cupy):
    """CuPy's launcher, on a pretended device."""

    def chip(self, array):
        return 90

    def multiprocessors(self, array):
        return 132

    def on(self, array):
        return contextlib.nullcontext()


class Emulated:
    """Takes the place of `cupy.RawKernel`: takes arguments as CuPy does, and follows their pointers as CUDA does."""

    launches = 0

    def __init__(self, kernel):
        self.kernel = kernel

    def __call__(self, grid, block, args):
        from cupy.cuda.function import CNumpyArray

        (argument,) = args
        assert isinstance(argument, np.ndarray)
        assert argument.size == 1  # CuPy takes no other by value
        library = simt.compile(self.kernel.text, [self.kernel.name])
        assert library.parameters(self.kernel.name) == [f"s{argument.itemsize}"]
        data = ctypes.string_at(CNumpyArray(argument).ptr, argument.itemsize)
        found = re.search(r"^XE_ROWS\((?:[^,]+, ){6}(\d)", self.kernel.line)  # in CUDA the compiled code says so
        cluster = int(found[1]) if found else 1
        argument = simt.Struct(data, {})
        with LOCK:
            library.launch(self.kernel.name, *grid, *block, [argument], cluster=cluster)
            Emulated.launches += 1


def allocating():
    """A context in which this thread allocates CuPy arrays in the memory of the host."""
    import cupy

    def allocate(size):
        memory = np.empty(max(size, 1) + 512, np.uint8)
        start = -(-memory.ctypes.data // 512) * 512
        return cupy.cuda.MemoryPointer(cupy.cuda.UnownedMemory(start, max(size, 1), memory, 0), 0)

    return cupy.cuda.using_allocator(allocate)


@contextlib.contextmanager
def cupy_on_host(function=Emulated):
    """A context in which CuPy arrays need no GPU, unless one computes with them; `function(kernel)` launches."""
    import cupy

    def extent(array):  # CuPy asks the driver for a stream before it tells an array's address
        return real(to_numpy(array) if isinstance(array, cupy.ndarray) else array)

    real = _problem._extent
    with (
        mock.patch.object(_problem, "_extent", extent),
        mock.patch.object(cupy.cuda.runtime, "getDevice", return_value=0),
        mock.patch.object(cupy.cuda, "get_current_stream", return_value=SimpleNamespace(ptr=7)),
        mock.patch.object(_kernels, "compiled", lambda kernel, device: function(kernel)),
        allocating(),
    ):
        yield


def to_numpy(array):
    """A NumPy view of such a CuPy array."""
    reach = [step * (length - 1) for step, length in zip(array.strides, array.shape, strict=True)]
    low = sum(step for step in reach if step < 0)
    buffer = (ctypes.c_char * (sum(map(abs, reach)) + array.itemsize)).from_address(array.data.ptr + low)
    return np.ndarray(array.shape, array.dtype, buffer, -low, array.strides)


def to_cupy(array):
    import cupy

    made = cupy.ndarray(array.shape, array.dtype)
    to_numpy(made)[...] = array
    return made
