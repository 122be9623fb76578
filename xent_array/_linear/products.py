"""Products of matrices in the array's own library, into arrays that are there.

Each class has these, for one library:

    adds                          whether `product` can add to what is there without a temporary
    keeps_narrow                  whether 16-bit factors go into a product as they are, with results in float32
    at(like)                      the context to work in
    empty(shape, dtype, like)     a new array on the device of `like`
    takes(array)                  whether a matrix goes into a product as it is, without a copy
    copy(array, out)              the same numbers, converted to the dtype of `out`
    pick(array, index, out)       some rows, likewise
    place(out, where, part, add)  rows that `where`, a slice or an index, names: set, or added to
    product(a, b, out, add)       out = a @ b, or out += a @ b
    logits(a, b, bias, out)       out = a @ b.T + bias
    sums(a, out, add)             the sums of the columns, likewise
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any

import numpy as np

from .._engines.cpu import memory
from .._rows import Array, DType, device, namespace

BIASED = 2048  # classes whose logits stay in cache until the bias is added
PICKED = 64  # rows that are picked and converted at a time


class _Products:
    """Where every array says itself on which device it is."""

    adds = keeps_narrow = False

    def at(self, like: Array) -> AbstractContextManager[Any]:
        return nullcontext()


class OfNumPy(_Products):
    """NumPy has no product that adds, so `product` is not asked to."""

    def empty(self, shape: tuple[int, ...], dtype: DType, like: Array) -> Array:
        return memory.empty(shape, np.dtype(dtype))

    def takes(self, array: Array) -> bool:
        if not array.flags.aligned or not array.dtype.isnative:
            return False
        return array.size == 0 or any(
            inner == array.itemsize and outer >= length * array.itemsize and outer % array.itemsize == 0
            for (outer, inner), length in zip((array.strides, array.strides[::-1]), array.shape[::-1], strict=True)
        )

    def copy(self, array: Array, out: Array) -> None:
        np.copyto(out, array, casting="unsafe")

    def pick(self, array: Array, index: Array, out: Array) -> None:
        if array.dtype == out.dtype and array.flags.c_contiguous:
            np.take(array, index, axis=0, out=out, mode="clip")  # in another mode it fills a copy first
            return
        for start in range(0, len(index), PICKED):
            out[start : start + PICKED] = array[index[start : start + PICKED]]

    def place(self, out: Array, where: Any, part: Array, add: bool) -> None:
        if add:
            out[where] += part
        else:
            out[where] = part

    def product(self, a: Array, b: Array, out: Array, add: bool = False) -> None:
        np.matmul(a, b, out=out)

    def logits(self, a: Array, b: Array, bias: Array | None, out: Array) -> None:
        if bias is None:
            np.matmul(a, b.T, out=out)
            return
        for start in range(0, b.shape[0], BIASED):
            part = slice(start, min(start + BIASED, b.shape[0]))
            np.matmul(a, b[part].T, out=out[:, part])
            out[:, part] += bias[part]

    def sums(self, a: Array, out: Array, add: bool) -> None:
        found = np.matmul(np.ones(a.shape[0], a.dtype), a)
        if add:
            out += found
        else:
            out[...] = found


class OfTorch(_Products):
    """PyTorch, on any of its devices.

    On a GPU, bfloat16 is multiplied by tensor cores. float16 is not, as it cannot hold the gradients of a mean over
    many rows.
    """

    adds = True

    def __init__(self, torch: ModuleType, like: Array) -> None:
        self.torch: Any = torch
        self.keeps_narrow = bool(like.is_cuda and like.dtype is self.torch.bfloat16)

    def empty(self, shape: tuple[int, ...], dtype: DType, like: Array) -> Array:
        return self.torch.empty(shape, dtype=dtype, device=like.device)

    def takes(self, array: Array) -> bool:
        (rows, columns), (outer, inner) = array.shape, array.stride()
        return bool((inner == 1 and outer >= columns) or (outer == 1 and inner >= rows))

    def copy(self, array: Array, out: Array) -> None:
        out.copy_(array)

    def pick(self, array: Array, index: Array, out: Array) -> None:
        if array.dtype is out.dtype:
            self.torch.index_select(array, 0, index, out=out)
        else:
            out.copy_(array[index])

    def place(self, out: Array, where: Any, part: Array, add: bool) -> None:
        if isinstance(where, slice):
            out[where].add_(part) if add else out[where].copy_(part)
        elif add:
            out.index_add_(0, where, part)
        else:
            out[where] = part.to(out.dtype)

    def product(self, a: Array, b: Array, out: Array, add: bool = False) -> None:
        if a.dtype is not out.dtype:
            self.wide_product(a, b, out, add)
        elif add:
            self.torch.addmm(out, a, b, out=out)
        else:
            self.torch.mm(a, b, out=out)

    def wide_product(self, a: Array, b: Array, out: Array, add: bool) -> None:
        if add:
            self.torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
        else:
            self.torch.mm(a, b, out_dtype=out.dtype, out=out)

    def logits(self, a: Array, b: Array, bias: Array | None, out: Array) -> None:
        if bias is None:
            self.product(a, b.T, out)
        elif a.dtype is not out.dtype:
            self.wide_product(a, b.T, out.copy_(bias), True)
        else:
            self.torch.addmm(bias, a, b.T, out=out)

    def sums(self, a: Array, out: Array, add: bool) -> None:
        ones = a.new_ones(a.shape[0])
        if add:
            self.torch.addmv(out, a.T, ones, out=out)
        else:
            self.torch.mv(a.T, ones, out=out)


class OfCuPy(_Products):
    """CuPy, through cuBLAS. Nothing waits for the GPU, and nothing but the ones of `sums` is allocated, once."""

    adds = True

    def __init__(self, cupy: ModuleType) -> None:
        self.cupy: Any = cupy
        self._ones: Array | None = None

    def at(self, like: Array) -> AbstractContextManager[Any]:
        device: AbstractContextManager[Any] = like.device
        return device

    def empty(self, shape: tuple[int, ...], dtype: DType, like: Array) -> Array:
        return self.cupy.empty(shape, dtype=dtype)

    def takes(self, array: Array) -> bool:
        return bool(array.flags.c_contiguous)

    def copy(self, array: Array, out: Array) -> None:
        out[...] = array

    def pick(self, array: Array, index: Array, out: Array) -> None:
        self.cupy.take(array, index, axis=0, out=out)

    def place(self, out: Array, where: Any, part: Array, add: bool) -> None:
        if add:
            out[where] += part
        else:
            out[where] = part

    def product(self, a: Array, b: Array, out: Array, add: bool = False) -> None:
        self._gemm(a, b, out, 1.0 if add else 0.0)

    def logits(self, a: Array, b: Array, bias: Array | None, out: Array) -> None:
        if bias is not None:
            out[...] = bias
        self._gemm(a, b.T, out, 0.0 if bias is None else 1.0)

    def sums(self, a: Array, out: Array, add: bool) -> None:
        rows = a.shape[0]
        if self._ones is None or self._ones.shape[0] < rows:
            self._ones = self.cupy.ones(rows, dtype=a.dtype)
        self._gemm(self._ones[None, :rows], a, out[None, :], 1.0 if add else 0.0)

    def _gemm(self, a: Array, b: Array, out: Array, beta: float) -> None:
        from cupy import cublas

        if 0 in (*a.shape, *b.shape):
            if not beta:
                out[...] = 0
            return
        cublas.gemm("N", "N", a, b, out=out, alpha=1.0, beta=beta)


class OfAny(_Products):
    """Any other library of the Array API whose arrays can be written to; every product makes a temporary array."""

    def __init__(self, xp: Any) -> None:
        self.xp = xp

    def empty(self, shape: tuple[int, ...], dtype: DType, like: Array) -> Array:
        return self.xp.empty(shape, dtype=dtype, device=device(like))

    def takes(self, array: Array) -> bool:
        return True

    def copy(self, array: Array, out: Array) -> None:
        out[...] = self.xp.astype(array, out.dtype, copy=False)

    def pick(self, array: Array, index: Array, out: Array) -> None:
        self.copy(self.xp.take(array, index, axis=0), out)

    def place(self, out: Array, where: Any, part: Array, add: bool) -> None:
        part = out[where, ...] + part if add else part
        out[where, ...] = self.xp.astype(part, out.dtype, copy=False)

    def product(self, a: Array, b: Array, out: Array, add: bool = False) -> None:
        out[...] = self.xp.matmul(a, b)

    def logits(self, a: Array, b: Array, bias: Array | None, out: Array) -> None:
        out[...] = self.xp.matmul(a, b.T) if bias is None else self.xp.matmul(a, b.T) + bias

    def sums(self, a: Array, out: Array, add: bool) -> None:
        found = self.xp.sum(a, axis=0)
        out[...] = out + found if add else found


def products_of(array: Array) -> Any:
    """The products of the library that made an array."""
    xp = namespace(array)
    if xp is np:
        return OfNumPy()
    if hasattr(array, "data_ptr"):
        import torch

        return OfTorch(torch, array)
    if xp.__name__ == "array_api_compat.cupy" or xp.__name__ == "cupy":
        import cupy

        return OfCuPy(cupy)
    return OfAny(xp)
