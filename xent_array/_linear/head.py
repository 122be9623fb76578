"""From what users pass to a `Head`: all checks, and the way back to the user's shapes."""

from __future__ import annotations

import math
import operator
from typing import Any, NamedTuple

import numpy as np
from array_api_compat import is_jax_array, is_writeable_array

from .. import _bridges
from .._problem import (
    Problem,
    as_array,
    described,
    detached,
    dtype_name,
    problem_of,
)
from .._rows import DASK, Array, Asked, is_traced, namespace
from . import plan
from .factors import Factors


class Call(NamedTuple):
    """The arguments of a user."""

    hidden: Any
    linear_weight: Any
    target: Any
    linear_bias: Any
    asked: Asked
    memory_budget: Any = None

    @property
    def others(self) -> tuple[Any, ...]:
        """The arguments, beside the three that are differentiated, that may be arrays."""
        asked = self.asked
        return self.target, asked.weight, asked.sample_weight, asked.denominator, asked.grad_output


class Head(NamedTuple):
    """A checked call: the factors as matrices, and the problem that their product would be."""

    problem: Problem
    hidden: Array  # (N, D), in the library that makes the products, as are the next two
    weight: Array  # (C, D)
    bias: Array | None  # (C,), in the dtype of the arithmetic
    asked: Asked
    budget: int | None  # bytes

    @property
    def on_host(self) -> bool:
        return is_on_host(self.hidden)


def is_on_host(array: Array) -> bool:
    try:
        return int(array.__dlpack_device__()[0]) == 1  # kDLCPU
    except Exception:  # each library raises an error of its own
        return False


def checked(call: Call) -> Call:
    """The call with the factors as arrays, whose shapes and dtypes fit."""
    hidden = as_array(call.hidden, "hidden")
    if namespace(hidden).__name__ == DASK:
        raise TypeError(
            "hidden must not be a Dask array: pass hidden @ linear_weight.T, which is computed chunk by chunk, to"
            " cross_entropy"
        )
    weight = as_array(call.linear_weight, "linear_weight", hidden, "hidden")
    bias = call.linear_bias
    shape, of_weight = tuple(hidden.shape), tuple(weight.shape)
    if not shape:
        raise ValueError("hidden must have at least one dimension, the features; got a scalar, of shape ()")
    if len(of_weight) != 2:
        raise ValueError(f"linear_weight must have two dimensions, (classes, features); got shape {of_weight}")
    if of_weight[1] != shape[-1]:
        hint = "; write linear_weight.T" if of_weight[0] == shape[-1] else ""
        raise ValueError(
            f"linear_weight of shape {of_weight} does not fit hidden of shape {shape}: the features are the last"
            f" dimension of both, here {of_weight[1]} and {shape[-1]}{hint}"
        )
    if of_weight[0] == 0:
        raise ValueError(f"linear_weight must have at least one class; got shape {of_weight}")
    arrays = {"linear_weight": weight}
    if bias is not None:
        arrays["linear_bias"] = bias = as_array(bias, "linear_bias", hidden, "hidden")
        if tuple(bias.shape) != of_weight[:1]:
            raise ValueError(f"linear_bias must have one number per class, {of_weight[:1]}; got {tuple(bias.shape)}")
    for role, array in arrays.items():
        if dtype_name(array.dtype) != dtype_name(hidden.dtype):
            raise TypeError(
                f"{role} must have the dtype of hidden, {dtype_name(hidden.dtype)}; got {dtype_name(array.dtype)}"
            )
    if call.asked.axis != -1:
        raise ValueError(f"the classes are made along the last axis; got axis={call.asked.axis}")
    bytes_of_budget(call.memory_budget)
    return call._replace(hidden=hidden, linear_weight=weight, linear_bias=bias)


def bytes_of_budget(budget: Any) -> int | None:
    """A memory budget in bytes; None if there is none."""
    if budget is None:
        return None
    wanted = 'a number of bytes, or text like "64MB" or "64MiB"'
    if isinstance(budget, str):
        found = plan.bytes_of(budget)
        if found is None:
            raise ValueError(f"memory_budget must be {wanted}; got {budget!r}")
    else:
        try:
            found = operator.index(budget)
        except TypeError:
            raise TypeError(f"memory_budget must be {wanted}; got {described(budget)}") from None
        if isinstance(budget, bool):
            raise TypeError(f"memory_budget must be {wanted}; got {budget}")
    if found < 1:
        raise ValueError(f"memory_budget must be at least 1 byte; got {budget!r}")
    return found


def head_of(call: Call) -> Head | None:
    """Makes every check, once, of a call that `checked` returned.

    None if the arrays cannot be written to or have no values, so that logits can be made in one piece only.
    """
    given = (call.hidden, call.linear_weight, call.linear_bias)
    if any(is_traced(array) for array in given if array is not None) or not _may_work_on(call):
        return None
    hidden, weight, bias = map(detached, given)
    problem = problem_of(Factors(hidden, weight.shape[0], (weight, bias)), call.target, call.asked)
    home, shape = problem.home, tuple(hidden.shape)
    if home.bridge is None and not isinstance(hidden, np.ndarray) and not is_writeable_array(hidden):
        return None
    if hasattr(problem.engine, "communicator"):
        raise ValueError(
            f"engine {problem.engine.name!r} works with other processes, for logits that are there: make them and pass"
            " them to cross_entropy"
        )
    with home.at_work():
        if not hasattr(hidden, "data_ptr"):  # PyTorch makes the products of its tensors
            hidden, weight, bias = (None if each is None else home.lend(each) for each in (hidden, weight, bias))
        xp = namespace(hidden)
        hidden = xp.reshape(hidden, (math.prod(shape[:-1]), shape[-1]))
        if bias is not None:
            bias = xp.astype(bias, acc_of(problem, xp), copy=False)
    return Head(problem, hidden, weight, bias, call.asked, bytes_of_budget(call.memory_budget))


def _may_work_on(call: Call) -> bool:
    """Whether nothing but this library must see what is done with the arrays."""
    arrays = [call.hidden, call.linear_weight, call.linear_bias, *call.others]
    if hasattr(call.hidden, "data_ptr"):
        from .._bridges import _torch_linear

        return _torch_linear.are_plain(arrays)
    if not is_jax_array(call.hidden):
        return True
    bridge = _bridges.named(namespace(call.hidden).__name__)  # JAX's own cannot be written to
    return bridge is not None and bridge.refuses(arrays, "nothing") is None


def acc_of(problem: Problem, xp: Any) -> Any:
    """The dtype of the arithmetic, as another library names it."""
    return problem.rows.acc if xp is problem.rows.xp else getattr(xp, dtype_name(problem.rows.acc))
