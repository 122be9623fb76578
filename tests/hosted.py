"""CuPy's own arrays in the memory of the host, and its launches run by the emulation: all of CuPy but the device."""

import contextlib
import ctypes
from typing import ClassVar

import numpy as np
import simt

from xent_array import _kernels, _problem
from xent_array._engines.cuda import Cuda, Cupy


class Hosted(Cupy):
    """CuPy's launcher, told that there is a device."""

    def chip(self, array):
        return 90

    def on(self, array):
        return contextlib.nullcontext()


class Function:
    """What stands for `cupy.RawKernel`: takes arguments as CuPy does, and what they lead to as CUDA does."""

    launches: ClassVar[list[str]] = []
    max_dynamic_shared_size_bytes = 48 << 10

    def __init__(self, kernel):
        self.kernel = kernel

    def __call__(self, grid, block, args, shared_mem):
        from cupy.cuda.function import CNumpyArray

        (argument,) = args
        assert isinstance(argument, np.ndarray)
        assert argument.size == 1  # CuPy takes no other by value
        library = simt.compile(self.kernel.text, [self.kernel.name])
        (kind,) = library.parameters(self.kernel.name)
        assert kind == f"s{argument.itemsize}"
        data = ctypes.string_at(CNumpyArray(argument).ptr, argument.itemsize)
        library.launch(self.kernel.name, *grid, *block, [simt.Struct(data, {})], shared_bytes=shared_mem)
        self.launches.append(self.kernel.name)


def engine(monkeypatch):
    """The engine over CuPy; and what makes a CuPy array of NumPy's, and back."""
    import cupy

    held = {}

    def allocate(size):
        memory = np.full(-(-max(size, 1) // 512) * 512 + 512, 255, np.uint8)
        start = -(-memory.ctypes.data // 512) * 512
        held[start] = memory
        return cupy.cuda.MemoryPointer(cupy.cuda.UnownedMemory(start, max(size, 1), memory, 0), 0)

    def to_numpy(array):
        low = array.data.ptr + sum(min(0, step * (n - 1)) for step, n in zip(array.strides, array.shape, strict=True))
        size = sum(abs(step) * (n - 1) for step, n in zip(array.strides, array.shape, strict=True)) + array.itemsize
        buffer = (ctypes.c_char * size).from_address(low)
        return np.ndarray(array.shape, array.dtype, buffer, array.data.ptr - low, array.strides)

    def to_cupy(array):
        made = cupy.ndarray(array.shape, array.dtype)
        to_numpy(made)[...] = array
        return made

    def extent(array):  # CuPy asks the driver for a stream before it tells where an array lies
        if isinstance(array, cupy.ndarray):
            array = to_numpy(array)
        return real(array)

    real = _problem._extent
    monkeypatch.setattr(_problem, "_extent", extent)
    monkeypatch.setattr(cupy.cuda.runtime, "getDevice", lambda: 0)
    monkeypatch.setattr(_kernels, "compiled", lambda kernel, device: Function(kernel))
    monkeypatch.setattr(Function, "launches", [])
    return Cuda(Hosted()), cupy.cuda.using_allocator(allocate), to_cupy, to_numpy
