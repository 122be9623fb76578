"""The caller's arrays for the gradients: checks, views as matrices, and the results in the caller's shapes."""

from __future__ import annotations

from contextlib import suppress
from typing import Any, NamedTuple

from array_api_compat import is_writeable_array

from .._problem import described, detached, dtype_name, overlaps_itself, shared_memory
from .._rows import Array, device, namespace
from .head import Call, Head

NAMES = ("hidden", "linear_weight", "linear_bias")


class Outputs(NamedTuple):
    """Where the gradients go."""

    given: list[Any]  # the arrays of the caller, or None
    views: list[Array | None]  # the same in the shapes of `Head`; None: an array is made

    def results(self, head: Head, made: list[Array | None], like: tuple[Any, ...]) -> tuple[Any, ...]:
        """The gradients as the caller receives them; `like` are the factors."""
        found: list[Any] = []
        for given, view, grad, factor in zip(self.given, self.views, made, like, strict=True):
            if grad is None:
                found.append(None)
                continue
            home = head.problem.home
            grad = namespace(grad).reshape(grad, tuple(factor.shape))
            if given is None:
                found.append(grad if namespace(grad) is home.library else home.give(grad))
                continue
            if view is None:
                detached(given)[...] = grad
            home.written(given)
            found.append(given)
        return tuple(found)


def outputs(head: Head, call: Call, out: Any) -> Outputs:
    """The caller's `out`, checked."""
    like = (call.hidden, call.linear_weight, call.linear_bias)
    if out is None:
        return Outputs([None] * 3, [None] * 3)
    if not isinstance(out, (tuple, list)) or len(out) != 3:
        raise TypeError(
            "out must be a tuple of three: arrays for the gradients of hidden, linear_weight and linear_bias, or None"
            f" for those to be made; got {described(out)}"
        )
    views: list[Array | None] = []
    for number, (name, given, wanted) in enumerate(zip(NAMES, out, like, strict=True)):
        role, view = f"out[{number}]", None
        if given is not None:
            if wanted is None:
                raise ValueError(f"{role} is for the gradient of linear_bias, which is None; got {described(given)}")
            _check_out(head, call, role, given, name, wanted)
            view = detached(given)
            for other, before in zip(NAMES, out[:number], strict=False):
                if before is not None and shared_memory(view, detached(before)) != "none":
                    raise ValueError(f"{role} shares memory with the array for the gradient of {other}")
            if number == 0:
                view = _as_matrix(head, view)
        views.append(view)
    return Outputs(list(out), views)


def filled(out: Any, grads: tuple[Any, ...]) -> tuple[Any, ...]:
    """Gradients of logits in one piece, written to the caller's arrays where there are some."""
    if out is None:
        return grads
    for number, (given, grad) in enumerate(zip(out, grads, strict=True)):
        if given is not None and not is_writeable_array(given):
            raise TypeError(f"out[{number}] cannot be changed; take the returned gradient")
        if given is not None:
            detached(given)[...] = grad
    return tuple(grad if given is None else given for given, grad in zip(out, grads, strict=True))


def _as_matrix(head: Head, out: Array) -> Array | None:
    """The same memory in the shape of the hidden states; None if its strides do not allow that."""
    with suppress(ValueError, NotImplementedError, AttributeError, RuntimeError):
        return namespace(out).reshape(out, head.hidden.shape, copy=False)
    return None


def _check_out(head: Head, call: Call, role: str, given: Any, name: str, wanted: Array) -> None:
    library = head.problem.home.library
    if not hasattr(given, "shape") or not hasattr(given, "dtype") or namespace(given) is not library:
        raise TypeError(f"{role} must be an array of the library of hidden, {library.__name__}; got {described(given)}")
    if not getattr(getattr(given, "flags", None), "writeable", True):
        raise ValueError(f"{role} is read-only: the gradient cannot be written to it")
    if not is_writeable_array(given):
        raise TypeError(
            f"{role} cannot be used with {library.__name__}, whose arrays cannot be changed; take the returned gradient"
        )
    if tuple(given.shape) != tuple(wanted.shape):
        raise ValueError(f"{role} must have the shape of {name}, {tuple(wanted.shape)}; got {tuple(given.shape)}")
    if dtype_name(given.dtype) != dtype_name(wanted.dtype):
        raise TypeError(
            f"{role} must have the dtype of {name}, {dtype_name(wanted.dtype)}; got {dtype_name(given.dtype)}"
        )
    if device(given) != device(wanted):
        raise TypeError(f"{role} must be on the device of {name}, {device(wanted)}, but is on {device(given)}")
    if overlaps_itself(given):
        raise ValueError(f"{role} has elements that share memory with each other; it must have one place for each")
    inputs = head.problem.inputs | {
        "hidden": call.hidden,
        "linear_weight": call.linear_weight,
        "linear_bias": call.linear_bias,
    }
    for other, array in inputs.items():
        if other != "logits" and shared_memory(given, array) != "none":
            raise ValueError(f"{role} shares memory with {other}; it must be memory apart from every input")
