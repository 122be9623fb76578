"""PyTorch: linear cross-entropy as one autograd node.

The forward pass computes the gradients too, as soon as the logits are there. It does not where the upstream gradient
must be known first: if it differs from row to row, or if half precision would lose digits before it is scaled. There
the backward pass computes everything.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._C._functorch import is_legacy_batchedtensor

from .._linear.head import Call, Head, head_of
from .._linear.run import composed, run
from ._torch import _PLAIN, _is_watched

Tensors = tuple[Any, ...]


def are_plain(arrays: list[Any]) -> bool:
    """Whether these are tensors whose memory may be worked on, and nothing else must see each operation."""
    tensors = [array for array in arrays if isinstance(array, torch.Tensor)]
    return not _is_watched() and all(
        type(tensor) in _PLAIN and tensor.layout is torch.strided and not tensor.is_neg() for tensor in tensors
    )


def records(call: Call) -> bool:
    """Whether autograd is to record this call."""
    return torch.is_grad_enabled() and any(getattr(each, "requires_grad", False) for each in _arrays(call))


def _arrays(call: Call) -> list[Any]:
    return [call.hidden, call.linear_weight, call.linear_bias, *call.others]


def loss(call: Call) -> Any:
    """The loss of a call that autograd records."""
    beyond = any(getattr(each, "requires_grad", False) for each in call.others)
    if beyond or not are_plain(_arrays(call)) or (head := head_of(call)) is None:
        return composed(call)
    return _LinearLoss.apply(call.hidden, call.linear_weight, call.linear_bias, _Held(call, head))


class _Held:
    """What a node keeps from its forward pass: the call without its tensors, and perhaps the gradients."""

    def __init__(self, call: Call, head: Head) -> None:
        self.head: Head | None = head
        self.grads: list[Any] | None = None
        self.options = {name: value for name, value in call.asked._asdict().items() if value is not None}
        self.options["target"] = call.target
        self.budget = call.memory_budget
        self.asked = call.asked
        self.names = [name for name, value in self.options.items() if isinstance(value, torch.Tensor)]

    def tensors(self) -> list[Any]:
        """The tensors beside the three that are differentiated, which autograd holds from now on."""
        return [self.options.pop(name) for name in self.names]

    def call(self, factors: Tensors, tensors: Tensors, **more: Any) -> Call:
        """The call, with the tensors as autograd returns them; the labels have been checked before."""
        options = self.options | dict(zip(self.names, tensors, strict=True)) | {"validate": False} | more
        target = options.pop("target")
        asked = self.asked._replace(**{name: options.get(name) for name in self.asked._fields})
        return Call(factors[0], factors[1], target, factors[2], asked, self.budget)

    def computes_at_once(self, hidden: Any) -> bool:
        """Whether the gradients are computed in the forward pass."""
        return self.asked.reduction != "none" and hidden.dtype is not torch.float16


class _LinearLoss(torch.autograd.Function):
    """The loss as one node, which holds its gradients, or computes them when the upstream gradient is there."""

    @staticmethod
    def forward(ctx: Any, hidden: Any, weight: Any, bias: Any, held: _Held) -> Any:
        wanted = tuple(ctx.needs_input_grad[:3])
        head, held.head = held.head, None
        assert head is not None
        at_once = held.computes_at_once(hidden)
        found, grads = run(head, wanted if at_once else (False, False, False), [None] * 3)
        if at_once:
            held.grads = grads
        ctx.held = held
        ctx.save_for_backward(hidden, weight, bias, *held.tensors())
        return found

    @staticmethod
    def backward(ctx: Any, grad_output: Any) -> Tensors:
        held: _Held = ctx.held
        (*factors, bias), tensors = ctx.saved_tensors[:3], ctx.saved_tensors[3:]
        three = (*factors, bias)
        grads, held.grads = held.grads, None
        if torch.is_grad_enabled() or _is_watched() or is_legacy_batchedtensor(grad_output):
            return (*_differentiable(held, three, tensors, grad_output, ctx.needs_input_grad), None)
        if grads is not None:
            grads = _scaled(grads, grad_output)
        if grads is None:
            head = head_of(held.call(three, tensors, grad_output=grad_output))
            assert head is not None
            grads = run(head, tuple(ctx.needs_input_grad[:3]), [None] * 3)[1]
        shaped = [None if g is None else g.reshape(f.shape) for g, f in zip(grads, three, strict=True)]
        return (*shaped, None)


def _scaled(grads: list[Any], grad_output: Any) -> list[Any] | None:
    """The gradients multiplied by the upstream gradient, in place; None if they must be computed again.

    They must be if the factor is 0, infinite or NaN, where a product would turn a 0 into NaN or a NaN into 0; and in 16
    bits, where the product would be rounded a second time. On a GPU, where looking at the factor would mean waiting,
    they are always multiplied.
    """
    there = [grad for grad in grads if grad is not None]
    if grad_output.is_cpu:
        factor = grad_output.item()
        if factor == 1:
            return grads
        if there[0].element_size() == 2 or not 1e-30 < abs(factor) < 1e30:
            return None
    for grad in there:
        grad.mul_(grad_output)
    return grads


def _differentiable(held: _Held, three: Tensors, tensors: Tensors, grad_output: Any, needs: Tensors) -> list[Any]:
    """The gradients as expressions that autograd can differentiate again."""
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        leaves = [
            each if each is None or each.requires_grad else each.detach().requires_grad_(need)
            for each, need in zip(three, needs, strict=False)
        ]
        found = composed(held.call(tuple(leaves), tensors, engine="generic"))
        by = [each for each, need in zip(leaves, needs, strict=False) if need]
        grads = iter(torch.autograd.grad(found, by, grad_output, create_graph=again))
    return [next(grads) if need else None for need in needs[:3]]
