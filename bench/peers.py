"""This library and its peers behind one interface; a peer is imported only if it is installed.

A maker takes a `Problem` and returns what the library can do on it: for the name of each operation, a `Call` that gives
the loss, or (loss, gradient). If the library cannot do the problem, the maker raises `Unsupported` with the reason. To
add a peer, write its maker and list it in `PEERS`.
"""

from __future__ import annotations

import importlib
import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np

import xent_array

from .suite import (
    ACROSS,
    AUTOGRAD,
    COMPILED,
    COPY,
    COPY_BY_ONE,
    DETACHED,
    EACH,
    EACH_OUT,
    EAGER,
    GRAD,
    IN_PLACE,
    INT32,
    LOSS,
    MODULE,
    OURS,
    OUT,
    READ,
    TENSORS,
    THREADS,
    Case,
)  # fmt: skip
from .timing import Call, reader, spread

Array = Any
Calls = dict[str, Call]


class Unsupported(Exception):
    """The library cannot do this problem."""


@dataclass
class Problem:
    """A case with its arrays, which are NumPy or CuPy arrays (`xp`). The logits must not be written to."""

    case: Case
    xp: Any
    logits: Array
    target: Array
    threads: int
    options: dict[str, Any]

    @cached_property
    def spare(self) -> Array:
        """An array of the size of the logits, which every run may overwrite."""
        return self.logits.copy()

    @property
    def has_labels(self) -> bool:
        return self.case.has_labels

    @property
    def rows(self) -> int:
        return self.case.size // self.case.classes

    def refresh(self) -> None:
        self.xp.copyto(self.spare, self.logits)

    def mean(self, losses: Array) -> Any:
        """The mean of the losses of all rows, from CuPy or PyTorch, as an accurate library would return it."""
        wide = losses.double() if hasattr(losses, "double") else losses.astype(np.float64)
        mean = wide.sum() / self.divisor
        return mean if losses.dtype == wide.dtype else host(mean).astype(np.float32)

    @cached_property
    def divisor(self) -> float:
        """What the mean divides by: the total weight of the rows that are not ignored."""
        if "ignore_index" in self.options:
            return float((host(self.target) != self.options["ignore_index"]).sum())
        if "sample_weight" in self.options:
            return float(host(self.options["sample_weight"]).astype(np.float64).sum())
        if "weight" in self.options and self.has_labels:
            return float(host(self.options["weight"]).astype(np.float64)[host(self.target)].sum())
        return float(self.rows)


def ours(problem: Problem, engine: str | None = None) -> Calls:
    """The default engine in all its forms, or another engine by name."""
    x, y = problem.logits, problem.target
    keywords = {"axis": problem.case.axis, "engine": engine, **problem.options}
    if engine == "generic" and problem.case.nbytes > 32 << 20:
        raise Unsupported("is slow, and is timed up to 32 MiB of logits only")
    loss, both = xent_array.cross_entropy, xent_array.cross_entropy_value_and_grad
    calls = {LOSS: Call(lambda: loss(x, y, **keywords)), GRAD: Call(lambda: both(x, y, **keywords))}
    if engine is None:
        out = problem.spare
        calls[OUT] = Call(lambda: both(x, y, out=out, **keywords))
        calls[IN_PLACE] = Call(lambda: both(out, y, out=out, **keywords), prepare=problem.refresh)
        if problem.xp is not np:
            each = {**keywords, "reduction": "none"}
            calls[EACH] = Call(lambda: loss(x, y, **each), finish=problem.mean)
            calls[EACH_OUT] = Call(
                lambda: both(x, y, out=out, grad_output=1 / problem.divisor, **each),
                finish=lambda pair: (problem.mean(pair[0]), pair[1]),
            )
    return calls


def copy(problem: Problem) -> Calls:
    """The yardsticks: copying the logits into an existing array, by one thread and by all, and reading them.

    The read is NumPy's maximum, its fastest reduction: a sum of float32 takes twice as long.
    """
    x, out = problem.logits, problem.spare
    if problem.xp is not np:
        calls = {COPY: Call(lambda: out.data.copy_from_device_async(x.data, x.nbytes)), READ: Call(reader(x))}
        if ACROSS in problem.case.operations:
            there = out.view(np.uint8)
            here = there.get()
            calls[ACROSS] = Call(lambda: (there.set(here), there.get(out=here)))
        return calls
    source, sink = x.reshape(-1), out.reshape(-1)
    line = 64 // x.itemsize  # elements of a cache line
    cuts = np.linspace(0, x.size, problem.threads + 1).astype(int) // line * line
    cuts[-1] = x.size
    slices = [slice(a, b) for a, b in itertools.pairwise(cuts) if a < b]

    def copy_each(parts: Iterator[slice]) -> None:
        for part in parts:
            np.copyto(sink[part], source[part])  # releases the GIL, as the maximum does

    def read_each(parts: Iterator[slice]) -> None:
        for part in parts:
            source[part].max()

    calls = {COPY: Call(lambda: np.copyto(sink, source))}
    if problem.threads > 1:
        calls = {COPY: Call(lambda: spread(copy_each, slices, problem.threads)), COPY_BY_ONE: calls[COPY]}
    if READ in problem.case.operations:
        calls[READ] = Call(lambda: spread(read_each, slices, problem.threads))
    return calls


def torch(problem: Problem, compiled: bool = False) -> Calls:
    """cross_entropy and backward; each call has a new leaf, so that its gradient is allocated anew."""
    import torch
    from torch.nn.functional import cross_entropy

    if problem.case.axis % len(problem.case.shape) != 1:
        raise Unsupported("takes classes along axis 1 only")
    if problem.case.target == INT32:
        raise Unsupported("takes int64 labels only")
    x, y = _tensors(problem)
    options = {name: tensor(value) if name.endswith("weight") else value for name, value in problem.options.items()}
    softcap, z_loss, by_row = (options.pop(name, None) for name in ("softcap", "z_loss", "sample_weight"))

    def mean(x: Array, y: Array) -> Array:
        if softcap is not None:
            x = softcap * torch.tanh(x / softcap)
        if by_row is not None:
            return (by_row * cross_entropy(x, y, reduction="none", **options)).sum() / by_row.sum()
        loss = cross_entropy(x, y, **options)
        return loss if z_loss is None else loss + z_loss * (torch.logsumexp(x, 1) ** 2).mean()

    plain = cross_entropy if not problem.options else mean
    if compiled:
        if problem.case.classes not in COMPILED or problem.options or not problem.has_labels:
            raise Unsupported("is timed for a few shapes without options only")
        torch._dynamo.config.recompile_limit = 64  # beyond which it would run uncompiled
    function = torch.compile(plain, dynamic=False) if compiled else plain

    def loss() -> Array:
        with torch.no_grad():
            return function(x, y)

    return {LOSS: Call(loss), GRAD: _by_autograd(function, x, y)}


def liger(problem: Problem) -> Calls:
    """Liger's Triton kernel, which overwrites the logits with the gradient in its forward pass."""
    from liger_kernel.transformers.functional import liger_cross_entropy

    _without_options(problem)
    if len(problem.case.shape) != 2 or not problem.has_labels:
        raise Unsupported("takes labels and two dimensions only")
    import torch

    x, y = tensor(problem.spare), tensor(problem.target)

    def both() -> tuple[Array, Array]:
        leaf = x.detach().requires_grad_()
        loss = liger_cross_entropy(leaf, y)
        return loss, torch.autograd.grad(loss, leaf)[0]  # .backward() would copy a gradient that has other references

    return {GRAD: Call(both, prepare=problem.refresh)}


def quack(problem: Problem) -> Calls:
    """QuACK's CuTe kernel: the loss of each row, and the gradient of their sum in a new array."""
    from quack.cross_entropy import cross_entropy_fwd

    _without_options(problem)
    if len(problem.case.shape) != 2 or not problem.has_labels or problem.case.dtype == "float64":
        raise Unsupported("takes labels, two dimensions and up to 32 bits only")
    x, y = tensor(problem.logits), tensor(problem.target)
    return {
        EACH: Call(lambda: cross_entropy_fwd(x, y), finish=problem.mean),
        EACH_OUT: Call(
            lambda: cross_entropy_fwd(x, y, return_dx=True),
            finish=lambda pair: (problem.mean(pair[0]), pair[1] / problem.divisor),
        ),
    }


def jax(problem: Problem) -> Calls:
    """jit(value_and_grad) of the loss as optax writes it, in float32 for 16-bit logits, without buffer donation."""
    import jax
    import jax.numpy as jnp

    axis = problem.case.axis
    x, y = _jax_arrays(problem)
    options = {name: jnp.asarray(value) for name, value in problem.options.items()}

    def mean(x: Array, y: Array) -> Array:
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        if not problem.has_labels:
            return -(y * jax.nn.log_softmax(x, axis)).sum(axis).mean()
        if "softcap" in options:
            x = options["softcap"] * jnp.tanh(x / options["softcap"])
        if "ignore_index" in options:
            kept = y != options["ignore_index"]
            y = jnp.where(kept, y, 0)
        label_logits = jnp.take_along_axis(x, jnp.expand_dims(y, axis), axis).squeeze(axis)
        lse = jax.nn.logsumexp(x, axis)
        if "label_smoothing" in options:
            e = options["label_smoothing"]
            return (lse - (1 - e) * label_logits - e * x.mean(axis)).mean()
        if "z_loss" in options:
            return (lse - label_logits + options["z_loss"] * lse**2).mean()
        if "ignore_index" in options:
            return jnp.average(lse - label_logits, weights=kept)
        s = options["weight"][y] if "weight" in options else options.get("sample_weight")
        return jnp.average(lse - label_logits, weights=s)

    loss, both = jax.jit(mean), jax.jit(jax.value_and_grad(mean))
    return {
        LOSS: Call(lambda: jax.block_until_ready(loss(x, y))),
        GRAD: Call(lambda: jax.block_until_ready(both(x, y))),
    }


def jax_by_all(problem: Problem) -> Calls:
    """JAX with as many threads as there are cores: it starts them once, and a call cannot ask for fewer."""
    cores = len(os.sched_getaffinity(0))
    if problem.threads != cores:
        raise Unsupported(f"has a thread for each of {cores} cores, and is timed where the others have as many")
    return jax(problem)


def tensors(problem: Problem) -> Calls:
    """This library on detached tensors."""
    x, y = _tensors(problem)
    return {GRAD: Call(lambda: xent_array.cross_entropy_value_and_grad(x, y))}


def autograd(problem: Problem) -> Calls:
    """This library's loss in place of PyTorch's."""
    return {GRAD: _by_autograd(xent_array.cross_entropy, *_tensors(problem))}


def module(problem: Problem) -> Calls:
    """This library's module in place of PyTorch's."""
    from xent_array.torch import CrossEntropyLoss

    return {GRAD: _by_autograd(CrossEntropyLoss(), *_tensors(problem))}


def eager(problem: Problem) -> Calls:
    """This library on JAX arrays, outside jit."""
    import jax

    x, y = _jax_arrays(problem)
    return {GRAD: Call(lambda: jax.block_until_ready(xent_array.cross_entropy_value_and_grad(x, y)))}


def sklearn(problem: Problem) -> Calls:
    """The loss of scikit-learn's multinomial models: one loss per row, and the gradient of their sum."""
    from sklearn._loss.loss import HalfMultinomialLoss

    _without_options(problem)
    case, n_threads = problem.case, problem.threads
    if len(case.shape) != 2 or not problem.has_labels or case.dtype not in ("float32", "float64"):
        raise Unsupported("takes labels, two dimensions, and float32 or float64 only")
    half = HalfMultinomialLoss(n_classes=case.classes)
    x, y = problem.logits, problem.target.astype(case.dtype)
    return {
        LOSS: Call(lambda: half.loss(y, x, n_threads=n_threads), finish=lambda losses: losses.mean()),
        GRAD: Call(
            lambda: half.loss_gradient(y, x, n_threads=n_threads), finish=lambda r: (r[0].mean(), r[1] / problem.rows)
        ),
    }


def log_softmax(problem: Problem, module: str) -> Calls:
    """Loss and gradient composed from the log_softmax of SciPy, or of cupyx on a GPU."""
    _without_options(problem)
    _not_too_slow(problem)
    function = importlib.import_module(module).log_softmax
    axis, wide = problem.case.axis, _wide(problem)
    loss_of, less_target = _composition(problem)

    def loss() -> Array:
        return loss_of(function(wide(), axis=axis))

    def both() -> tuple[Array, Array]:
        log_p = function(wide(), axis=axis)
        return loss_of(log_p), less_target(problem.xp.exp(log_p))

    return {LOSS: Call(loss), GRAD: Call(both)}


def numpy(problem: Problem) -> Calls:
    """Loss and gradient as most people write them."""
    _without_options(problem)
    _not_too_slow(problem)
    axis, wide = problem.case.axis, _wide(problem)
    loss_of, less_target = _composition(problem)

    def loss() -> Array:
        x = wide()
        x = x - x.max(axis=axis, keepdims=True)
        return loss_of(x - np.log(np.exp(x).sum(axis=axis, keepdims=True)))

    def both() -> tuple[Array, Array]:
        x = wide()
        e = np.exp(x - x.max(axis=axis, keepdims=True))
        p = e / e.sum(axis=axis, keepdims=True)
        return loss_of(np.log(p)) if not problem.has_labels else loss_of(p, np.log), less_target(p)

    return {LOSS: Call(loss), GRAD: Call(both)}


def _tensors(problem: Problem) -> tuple[Array, Array]:
    import torch

    torch.set_num_threads(problem.threads)
    return tensor(problem.logits), tensor(problem.target)


def _by_autograd(function: Callable[[Array, Array], Array], x: Array, y: Array) -> Call:
    def both() -> tuple[Array, Array]:
        leaf = x.detach().requires_grad_()
        loss = function(leaf, y)
        loss.backward()
        return loss, leaf.grad

    return Call(both)


def _jax_arrays(problem: Problem) -> tuple[Array, Array]:
    import jax
    import jax.numpy as jnp

    jax.config.update("jax_enable_x64", problem.case.dtype == "float64")
    return jax.block_until_ready((jnp.asarray(problem.logits), jnp.asarray(problem.target)))


def _without_options(problem: Problem) -> None:
    if problem.options:
        raise Unsupported("is timed without options only")


def _not_too_slow(problem: Problem) -> None:
    if problem.xp is not np and problem.case.nbytes > 256 << 20:
        raise Unsupported("takes ten times as long, and is timed up to 256 MiB of logits only")
    if problem.xp is np and problem.case.dtype == "float16" and problem.case.nbytes > 32 << 20:
        raise Unsupported("takes seconds to convert to float16, and is timed up to 32 MiB of such logits only")


def _wide(problem: Problem) -> Callable[[], Array]:
    """A function that returns the logits, converted to float32 if they are 16-bit."""
    x = problem.logits
    return (lambda: x.astype(np.float32)) if problem.logits.itemsize == 2 else lambda: x


def _composition(problem: Problem) -> tuple[Callable[..., Array], Callable[[Array], Array]]:
    """Functions from log-probabilities to the mean loss, and from probabilities (overwritten) to the gradient."""
    xp, axis, y, dtype = problem.xp, problem.case.axis, problem.target, problem.logits.dtype
    labels = xp.expand_dims(y, axis) if problem.has_labels else None

    def loss_of(values: Array, log: Callable[[Array], Array] = lambda chosen: chosen) -> Array:
        if labels is None:
            return -(y * values).sum(axis=axis).mean()
        return -log(xp.take_along_axis(values, labels, axis)).mean()

    def less_target(p: Array) -> Array:
        if labels is None:
            p = p - y
        else:
            xp.put_along_axis(p, labels, xp.take_along_axis(p, labels, axis) - 1, axis)
        p /= problem.rows
        return p.astype(dtype, copy=False)

    return loss_of, less_target


def tensor(array: Array) -> Array:
    """A PyTorch tensor that shares the memory of a NumPy or CuPy array."""
    import torch

    make = torch.from_numpy if isinstance(array, np.ndarray) else torch.from_dlpack
    return make(array.view(np.int16)).view(torch.bfloat16) if array.dtype.name == "bfloat16" else make(array)


def host(array: Array) -> Array:
    """A NumPy array with the values of an array from any library."""
    if hasattr(array, "detach"):
        array = array.detach().cpu()
        return (array.float() if "bfloat16" in str(array.dtype) else array).numpy()
    return array.get() if hasattr(array, "get") else np.asarray(array)


Maker = Callable[[Problem], Calls]

PEERS: dict[str, dict[str, tuple[str, Maker]]] = {  # by backend and name: the module it needs, its maker
    "numpy": {
        "torch": ("torch", torch),
        "JAX": ("jax", jax),
        "scikit-learn": ("sklearn._loss.loss", sklearn),
        "SciPy": ("scipy.special", partial(log_softmax, module="scipy.special")),
        "NumPy": ("numpy", numpy),
    },
    "cupy": {
        "torch": ("torch", torch),
        "torch.compile": ("torch", partial(torch, compiled=True)),
        "Liger": ("liger_kernel.transformers.functional", liger),
        "QuACK": ("quack.cross_entropy", quack),
        "cupyx": ("cupyx.scipy.special", partial(log_softmax, module="cupyx.scipy.special")),
    },
    THREADS: {"torch": ("torch", torch), "JAX": ("jax", jax_by_all)},
    TENSORS: {
        "torch": ("torch", torch),
        AUTOGRAD: ("torch", autograd),
        DETACHED: ("torch", tensors),
        MODULE: ("xent_array.torch", module),
        "JAX": ("jax", jax),
        EAGER: ("jax", eager),
    },
}


def namespace(backend: str) -> Any:
    """The namespace of the arrays in a problem."""
    return importlib.import_module("cupy" if backend == "cupy" else "numpy")


def libraries(backend: str, xp: Any, only: str | None = None) -> tuple[dict[str, Maker], dict[str, str]]:
    """The makers that can be used here, and why the others cannot; `only` selects one of the peers."""
    from xent_array._engines import ENGINES  # which a tree that `bench.compare` imports may lack
    from xent_array._problem import problem_without_target

    found: dict[str, Maker] = {COPY: copy, OURS: ours}
    absent = {}
    rows = problem_without_target(xp.zeros((1, 1), dtype=xp.float32), -1)
    for name, engine in ENGINES.items() if backend not in (TENSORS, THREADS) else ():
        reason = engine.declines(rows.rows)
        if reason is not None:
            absent[f"{OURS} (engine={name!r})"] = reason
        elif engine is not rows.engine:
            found[f"{OURS} (engine={name!r})"] = partial(ours, engine=name)
    for name, (module, maker) in PEERS[backend].items():
        if only not in (None, name):
            continue
        try:
            importlib.import_module(module)
            found[name] = maker
        except ImportError as error:
            absent[name] = str(error)
    return found, absent
