"""What PyTorch's compilers see: one operation for the loss, one for its gradient, and one for both.

With them `torch.compile` and `torch.export` need not trace the public functions, which the operations call in the end.
Each operation states the shapes of its results, for tensors without values; that of the loss states that its gradient
is the other operation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .. import _api

_ARGUMENTS = (
    "Tensor logits, Tensor target, Tensor? weight, Tensor? sample_weight, Tensor? denominator, float? divisor,"
    " int axis, str reduction, int? ignore_index, float label_smoothing, float z_loss, float? softcap,"
    " bool? validate, str? engine"
)
_NAMES = tuple(argument.rpartition(" ")[2] for argument in _ARGUMENTS.split(","))
_TENSORS = _ARGUMENTS.count("Tensor")  # tensors come first among the arguments


def _operation(name: str, before: str, returns: str) -> Callable[[Callable[..., Any]], Any]:
    schema = f"({before}{_ARGUMENTS}) -> {returns}"
    return torch.library.custom_op(f"xent_array::{name}", mutates_args=(), schema=schema)


def _call(function: Callable[..., Any], given: tuple[Any, ...], **more: Any) -> Any:
    """Call a public function with the arguments of an operation."""
    named = dict(zip(_NAMES, given, strict=True))
    divisor, denominator = named.pop("divisor"), named.pop("denominator")
    named["denominator"] = divisor if denominator is None else denominator
    return function(named.pop("logits").detach(), named.pop("target"), **named, **more)


@_operation("cross_entropy", "", "Tensor")
def _loss_operation(*given: Any) -> Any:
    return _call(_api.cross_entropy, given)


@_operation("cross_entropy_grad", "Tensor? grad_output, ", "Tensor")
def _grad_operation(grad_output: Any, *given: Any) -> Any:
    grad = _call(_api.cross_entropy_grad, given, grad_output=grad_output)
    return grad.contiguous()


@_operation("cross_entropy_value_and_grad", "Tensor? grad_output, ", "(Tensor, Tensor)")
def _both_operation(grad_output: Any, *given: Any) -> Any:
    loss, grad = _call(_api.cross_entropy_value_and_grad, given, grad_output=grad_output)
    return loss, grad.contiguous()


@_loss_operation.register_fake
def _loss_shape(*given: Any) -> Any:
    named = dict(zip(_NAMES, given, strict=True))
    logits, axis = named["logits"], named["axis"]
    shape = [length for k, length in enumerate(logits.shape) if k != axis % logits.dim()]
    dtype = torch.float64 if logits.dtype is torch.float64 else torch.float32
    return logits.new_empty(shape if named["reduction"] == "none" else (), dtype=dtype)


@_grad_operation.register_fake
def _grad_shape(grad_output: Any, logits: Any, *others: Any) -> Any:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


@_both_operation.register_fake
def _both_shapes(grad_output: Any, *given: Any) -> Any:
    return _loss_shape(*given), _grad_shape(grad_output, *given)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:_TENSORS])
    ctx.options = inputs[_TENSORS:]


def _grad_of_operation(ctx: Any, grad_output: Any) -> tuple[Any, ...]:
    if any(ctx.needs_input_grad[1:]):
        raise RuntimeError(
            "compiled, cross_entropy can be differentiated by its logits only: detach the target and the weights,"
            " or keep the call out of what is compiled, by torch.compiler.disable"
        )
    return _grad_operation(grad_output, *ctx.saved_tensors, *ctx.options), *[None] * (len(_NAMES) - 1)


_loss_operation.register_autograd(_grad_of_operation, setup_context=_keep)


def _arguments(logits: Any, target: Any, asked: Any) -> tuple[Any, ...]:
    """The arguments of a public function, in the form of an operation's."""
    denominator = asked.denominator
    divides = isinstance(denominator, torch.Tensor)
    given = dict(zip(asked._fields, asked, strict=True))
    given["logits"], given["target"] = logits, target
    given["denominator"] = denominator if divides else None
    given["divisor"] = None if divides or denominator is None else float(denominator)
    return tuple([given[name] for name in _NAMES])


def _detached(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments of a function that returns the gradient itself."""
    return tuple([value.detach() if isinstance(value, torch.Tensor) else value for value in arguments])


def cross_entropy(logits: Any, target: Any, asked: Any) -> Any:
    return _loss_operation(*_arguments(logits, target, asked))


def cross_entropy_grad(logits: Any, target: Any, asked: Any, out: Any) -> Any:
    grad = _grad_operation(_above(asked.grad_output, logits), *_detached(_arguments(logits, target, asked)))
    return grad if out is None else _filled(out, grad)


def cross_entropy_value_and_grad(logits: Any, target: Any, asked: Any, out: Any) -> tuple[Any, Any]:
    loss, grad = _both_operation(_above(asked.grad_output, logits), *_detached(_arguments(logits, target, asked)))
    return loss, grad if out is None else _filled(out, grad)


def linear_cross_entropy(call: Any) -> Any:
    """The loss from all logits at once, which the compiler sees being made."""
    return cross_entropy(_logits(call), call.target, call.asked)


def linear_cross_entropy_value_and_grad(call: Any) -> tuple[Any, tuple[Any, ...]]:
    hidden, weight, bias = _detached((call.hidden, call.linear_weight, call.linear_bias))
    call = call._replace(hidden=hidden, linear_weight=weight, linear_bias=bias)
    loss, grad = cross_entropy_value_and_grad(_logits(call), call.target, call.asked, None)
    rows = grad.flatten(0, -2) if grad.dim() > 1 else grad[None]
    of_weight = rows.T @ hidden.reshape(-1, hidden.shape[-1])
    return loss, (grad @ weight, of_weight, None if bias is None else rows.sum(0))


def _logits(call: Any) -> Any:
    return torch.nn.functional.linear(call.hidden, call.linear_weight, call.linear_bias)


def _filled(out: Any, grad: Any) -> Any:
    out.detach().copy_(grad)
    return out


def _above(grad_output: Any, logits: Any) -> Any:
    """The upstream gradient as a tensor; a number becomes float64, so that it keeps its digits."""
    is_number = isinstance(grad_output, (int, float))
    if is_number:
        return torch.full((), grad_output, dtype=torch.float64, device=logits.device)
    return grad_output.detach() if isinstance(grad_output, torch.Tensor) else grad_output
