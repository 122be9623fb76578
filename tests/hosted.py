"""CuPy's own arrays in the memory of the host, and its launches run by the emulation: all of CuPy but the device."""

import contextlib
import ctypes
import re
from unittest import mock

import numpy as np
import simt

from xent_array import _kernels, _problem
from xent_array._engines.cuda import Cupy


class Hosted(Cupy):
    """CuPy's launcher, told that there is a device."""

    def chip(self, array):
        return 90

    def processors(self, array):
        return 132

    def on(self, array):
        return contextlib.nullcontext()


class Emulated:
    """What stands for `cupy.RawKernel`: takes arguments as CuPy does, and what they lead to as CUDA does."""

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
        library.launch(self.kernel.name, *grid, *block, [argument], cluster=cluster)
        Emulated.launches += 1


@contextlib.contextmanager
def cupy_on_host(function=Emulated):
    """In here arrays of CuPy need no GPU, as long as nothing is calculated with them; `function(kernel)` launches."""
    import cupy

    def allocate(size):
        memory = np.empty(max(size, 1) + 512, np.uint8)
        start = -(-memory.ctypes.data // 512) * 512
        return cupy.cuda.MemoryPointer(cupy.cuda.UnownedMemory(start, max(size, 1), memory, 0), 0)

    def extent(array):  # CuPy asks the driver for a stream before it tells where an array lies
        return real(to_numpy(array) if isinstance(array, cupy.ndarray) else array)

    real = _problem._extent
    with (
        mock.patch.object(_problem, "_extent", extent),
        mock.patch.object(cupy.cuda.runtime, "getDevice", return_value=0),
        mock.patch.object(_kernels, "compiled", lambda kernel, device: function(kernel)),
        cupy.cuda.using_allocator(allocate),
    ):
        yield


def to_numpy(array):
    """The memory of a CuPy array in there, as NumPy's."""
    reach = [step * (length - 1) for step, length in zip(array.strides, array.shape, strict=True)]
    low = sum(step for step in reach if step < 0)
    buffer = (ctypes.c_char * (sum(map(abs, reach)) + array.itemsize)).from_address(array.data.ptr + low)
    return np.ndarray(array.shape, array.dtype, buffer, -low, array.strides)


def to_cupy(array):
    import cupy

    made = cupy.ndarray(array.shape, array.dtype)
    to_numpy(made)[...] = array
    return made
