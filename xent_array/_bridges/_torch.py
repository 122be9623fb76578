"""PyTorch: tensors in host memory as NumPy arrays, those on a GPU as CuPy arrays, and the loss as one autograd node.

A tensor is lent if it has memory of its own on one device and nothing stands between it and that memory: no transform,
tracer, subclass, or mode that must see every operation. All other tensors use the plain composition, which PyTorch
records and differentiates like any other code.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch._C import _are_functorch_transforms_active, _get_tracing_state, _len_torch_dispatch_stack
from torch._C._functorch import is_legacy_batchedtensor
from torch.autograd import forward_ad
from torch.autograd.graph import increment_version
from torch.utils.dlpack import from_dlpack

from .. import _api, _engines
from .._engines import Engine
from .._engines.cuda import MOST_CLASSES, OLDEST, Cuda, Cupy, Launcher
from .._rows import Array, Asked, RowStats, is_traced
from . import KINDS, optional

if TYPE_CHECKING:
    from .._problem import Problem

_AT_ONCE = (torch.float32, torch.float64)
_PLAIN = (torch.Tensor, torch.nn.Parameter)
_INTEGERS = [f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)]
_LENT = {getattr(torch, name) for name in ("bool", "bfloat16", "float16", "float32", "float64", *_INTEGERS)}


def _is_watched() -> bool:
    """Whether something must see every operation: a mode, a tracer, a transform, or forward-mode differentiation."""
    return (
        _len_torch_dispatch_stack() > 0
        or _are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or _get_tracing_state() is not None
    )


def refuses(arrays: list[Any], role: str) -> str | None:
    tensors = [array for array in arrays if isinstance(array, torch.Tensor)]
    if any(type(tensor) not in _PLAIN for tensor in tensors):
        return "a subclass of Tensor may have a meaning of its own"
    if _is_watched() or any(map(is_traced, tensors)):
        return "they are traced or transformed, or have no memory"
    logits = tensors[0]
    if any(tensor.layout is not torch.strided for tensor in tensors):
        return "they are not strided"
    if any(tensor.is_neg() for tensor in tensors):
        return "views that are still to be negated are not in memory"
    if not all(tensor.dtype in _LENT for tensor in tensors):
        return "they are of a dtype that no engine takes"
    gpu = _gpu(logits)
    if gpu is None and not logits.is_cpu:
        return f"they are on a device of kind {logits.device.type!r}"
    if any(tensor.dtype is torch.bfloat16 for tensor in tensors) and _bfloat16() is None:
        return "NumPy and CuPy have bfloat16 only where ml_dtypes is installed"
    if gpu is not None:
        if _cupy() is None:
            return "CuPy is not installed"
        if max(logits.shape, default=0) >= MOST_CLASSES or Cupy().chip(_as_cupy(logits, gpu)) < OLDEST:
            return f"the kernels take fewer than 2^31 classes, and GPUs of compute capability {OLDEST / 10} and above"
    if role != "nothing" and torch.is_grad_enabled():
        recorded = [tensor.requires_grad for tensor in tensors]
        if any(recorded[1:] if role == "loss" else recorded):
            return "what autograd records of them is more than the gradient by the logits"
    for tensor in tensors:
        KINDS.setdefault(type(tensor), sys.modules[__name__])
    return None


@contextmanager
def at_work(logits: Any) -> Iterator[None]:
    gpu = _gpu(logits)
    with np.errstate(all="ignore"):
        if gpu is None:
            yield
        else:
            cupy, stream = _cupy(), torch.cuda.current_stream(logits.device).cuda_stream
            with cupy.cuda.Device(gpu), cupy.cuda.ExternalStream(stream, gpu):
                yield


def lend(array: Any, dtype: str | None = None) -> Array:
    if not isinstance(array, torch.Tensor):
        return array
    tensor = array.detach()
    if dtype is not None:
        tensor = tensor.to(getattr(torch, dtype))
    gpu = _gpu(tensor)
    if gpu is not None:
        return _as_cupy(tensor, gpu)
    if tensor.dtype is torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(_bfloat16())
    return tensor.numpy()


def give(array: Array, logits: Any) -> Any:
    if isinstance(array, np.generic):
        array = np.asarray(array)
    if isinstance(array, np.ndarray):
        if array.dtype.name == "bfloat16":
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(array)
    room = getattr(array.data.mem, "tensor", None)
    if room is None:  # memory of CuPy's own
        return from_dlpack(array)
    start = (array.data.ptr - room.data_ptr()) // array.itemsize
    steps = [step // array.itemsize for step in array.strides]
    return room.as_strided(array.shape, steps, room.storage_offset() + start)


def written(array: Any) -> None:
    increment_version(array)


# Autograd


def records(logits: Any) -> bool:
    return bool(logits.requires_grad and torch.is_grad_enabled())


class _Held:
    """What a node keeps from its forward pass: the gradient, or the stats to compute it from, and the call."""

    def __init__(self, loss: Any, grad: Any, stats: RowStats | None, call: tuple[Any, Any, dict[str, Any]]) -> None:
        self.loss, self.grad, self.stats = loss, grad, stats
        _, self.target, self.options = call
        self.names: list[str] = []  # of the options whose tensors autograd holds

    def tensors(self) -> list[Any]:
        """The tensors of the call, which autograd holds from now on."""
        found = []
        if isinstance(self.target, torch.Tensor):
            found.append(self.target)
            self.target = None
        for name, value in self.options.items():
            if isinstance(value, torch.Tensor):
                self.names.append(name)
                found.append(value)
        for name in self.names:
            self.options[name] = None
        return found

    def call(self, tensors: list[Any]) -> tuple[Any, dict[str, Any]]:
        """Target and options, with the tensors as autograd returns them; the labels have been checked before."""
        target = self.target if len(tensors) == len(self.names) else tensors.pop(0)
        return target, {**self.options, **dict(zip(self.names, tensors, strict=True)), "validate": False}


class _Loss(torch.autograd.Function):
    """The loss as one node, which holds its gradient or the stats to compute it from.

    Autograd watches the tensors that it was computed from: as everywhere, changing one in place is an error.
    """

    @staticmethod
    def forward(ctx: Any, logits: Any, held: _Held) -> Any:
        ctx.held = held
        ctx.save_for_backward(logits, *held.tensors())
        loss, held.loss = held.loss, None  # the loss refers to ctx
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Any) -> tuple[Any, None]:
        held: _Held = ctx.held
        logits, *tensors = ctx.saved_tensors
        grad, held.grad = held.grad, None
        if torch.is_grad_enabled() or _is_watched() or is_legacy_batchedtensor(grad_output):
            return _differentiable(logits, *held.call(tensors), grad_output), None
        if held.stats is None:
            if grad is None:  # computed and scaled again as the first time, hence bitwise identical
                target, options = held.call([*tensors])
                grad = _api.cross_entropy_value_and_grad(logits, target, **options)[1]
            grad = _scaled(grad, grad_output, held.options)
            if grad is not None:
                return grad, None
        target, options = held.call(tensors)
        return _api.cross_entropy_grad(logits, target, **options, stats=held.stats, grad_output=grad_output), None


def _scaled(grad: Any, grad_output: Any, options: dict[str, Any]) -> Any:
    """The gradient multiplied by the upstream gradient, in place; None if it must be computed again.

    It must be if a factor is 0, infinite or NaN, where a product would turn a 0 into NaN or a NaN into 0; and in 16
    bits, where the product would be rounded a second time.
    """
    if grad_output.dim() == 0 and options["reduction"] != "none":
        factor = grad_output.item()
        if factor == 1:
            return grad
        return grad.mul_(factor) if grad.element_size() > 2 and 1e-30 < abs(factor) < 1e30 else None
    if bool((grad_output == 1).all()):
        return grad
    size = grad_output.abs()
    if grad.element_size() == 2 or not bool(((size > 1e-30) & (size < 1e30)).all()):
        return None
    return grad.mul_(grad_output.unsqueeze(options["axis"]))


def _differentiable(logits: Any, target: Any, options: dict[str, Any], grad_output: Any) -> Any:
    """The gradient as an expression that autograd can differentiate again."""
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        x = logits if logits.requires_grad else logits.detach().requires_grad_()
        loss = _api.cross_entropy(x, target, **{**options, "engine": "generic"})
        return torch.autograd.grad(loss, x, grad_output, create_graph=again)[0]


def recorded(problem: Problem, call: tuple[Any, Any, Asked]) -> Any:
    """The loss of a call; `call` is its logits, target and options.

    The gradient is computed along with it, from the same read of the logits. The stats are kept instead if half
    precision would lose digits of the gradient before it is scaled, or if looking at the upstream gradient would make a
    GPU wait.
    """
    (logits, target, asked), engine, rows = call, problem.engine, problem.rows
    grad = stats = None
    if logits.dtype is torch.float16 or _gpu(logits) is not None:
        found, loss = _engines.stats_and_loss(engine, rows)
        stats = problem.user_stats(found)
    else:
        loss, made = _engines.loss_and_grad(engine, rows, None)
        grad = problem.logits(made)
    return _Loss.apply(logits, _Held(problem.loss(loss), grad, stats, (logits, target, _options(asked))))


def _options(asked: Asked) -> dict[str, Any]:
    """Those of the loss, by name."""
    return {name: value for name, value in asked._asdict().items() if name != "grad_output"}


class _Detached(torch.autograd.Function):
    """A loss computed from detached logits, as a node that raises an error if a gradient is asked for."""

    @staticmethod
    def forward(logits: Any, loss: Any) -> Any:
        return loss.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad_output: Any) -> Any:
        raise RuntimeError(
            "the loss of xent_array.CrossEntropyLoss is detached: its gradient comes from the object's own backward()."
            " For autograd use xent_array.cross_entropy, or the module xent_array.torch.CrossEntropyLoss"
        )

    @staticmethod
    def vmap(info: Any, in_dims: Any, logits: Any, loss: Any) -> Any:
        return _Detached.apply(logits, loss), in_dims[1]


def detached_loss(loss: Any, logits: Any) -> Any:
    return _Detached.apply(logits, loss) if isinstance(logits, torch.Tensor) and records(logits) else loss


def at_once(own: Any, logits: Any, target: Any, options: tuple[Any, ...], wants_grad: bool, out: Any) -> Any:
    """The answer in one step, for tensors in host memory that nothing but autograd watches."""
    if type(target) is not torch.Tensor or out is not None or _is_watched():
        return None
    if logits.dtype not in _AT_ONCE or target.is_floating_point():
        return None
    if any(tensor.layout is not torch.strided or not tensor.is_cpu or tensor.is_nested for tensor in (logits, target)):
        return None
    if not logits.is_contiguous() or logits.is_neg():
        return None
    as_node = not wants_grad and records(logits)
    answer = own(logits.detach().numpy(), target.numpy(), options, wants_grad or as_node, None)
    if answer is None:
        return None
    loss, grad = answer
    loss = torch.from_numpy(loss if isinstance(loss, np.ndarray) else np.asarray(loss))
    grad = None if grad is None else torch.from_numpy(grad)
    if as_node:
        return _Loss.apply(logits, _Held(loss, grad, None, (logits, target, _options(Asked(*options))))), None
    return loss, grad


# A GPU


def _gpu(tensor: Any) -> int | None:
    """The index of the NVIDIA GPU that a tensor is on, or None."""
    return tensor.get_device() if tensor.is_cuda and torch.version.hip is None else None


def _cupy() -> Any:
    return optional("cupy")


def _bfloat16() -> Any:
    return getattr(optional("ml_dtypes"), "bfloat16", None)


@cache
def _memory() -> Any:
    """A class for the memory of a tensor; it keeps the tensor alive, and `give` finds the tensor through it."""
    return type("Memory", (_cupy().cuda.UnownedMemory,), {"tensor": None})


def _as_cupy(tensor: Any, gpu: int) -> Array:
    """The memory of a tensor as a CuPy array."""
    size = tensor.element_size()
    name = str(tensor.dtype).removeprefix("torch.")
    dtype = np.dtype(_bfloat16() if name == "bfloat16" else name)
    reach = sum((length - 1) * step for length, step in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    memory = _memory()(tensor.data_ptr(), max(reach, 1) * size, tensor, gpu)
    memory.tensor = tensor
    steps = tuple([step * size for step in tensor.stride()])
    cupy = _cupy()
    array: Array = cupy.ndarray(tuple(tensor.shape), dtype, cupy.cuda.MemoryPointer(memory, 0), steps)
    return array


class Borrowing:
    """A launcher for tensors, which allocates through PyTorch."""

    def __init__(self, launcher: Launcher, logits: Any) -> None:
        self._device = logits.device
        self.declines, self.look, self.copy, self.on = launcher.declines, launcher.look, launcher.copy, launcher.on
        self.chip, self.multiprocessors, self.ready = launcher.chip, launcher.multiprocessors, launcher.ready

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Array:
        kind = getattr(torch, np.dtype(dtype).name)
        return lend(torch.empty(shape, dtype=kind, device=self._device))


def engine(found: Engine, logits: Any) -> Engine:
    return Cuda(Borrowing(found.launcher, logits)) if isinstance(found, Cuda) else found
