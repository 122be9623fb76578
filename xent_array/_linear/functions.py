"""The public functions: what they mean, and which way a call takes."""

from __future__ import annotations

from typing import Any, Unpack, overload

import numpy as np

from .. import _bridges
from .._engines import Engine
from .._rows import IGNORE_INDEX, Asked
from .._typing import (
    A,
    Float,
    Floats,
    LinearGradOptions,
    LinearOptions,
    NumPyLike,
    Reduced,
    Reduction,
    Scalar,
    SupportsShape,
    Values,
)
from .head import Call, checked, head_of
from .outputs import filled, outputs
from .run import composed, composed_value_and_grad, run


@overload
def linear_cross_entropy(
    hidden: NumPyLike, linear_weight: Values, target: Values, *, reduction: Reduced = "mean",
    **options: Unpack[LinearOptions],
) -> Float: ...  # fmt: skip
@overload
def linear_cross_entropy(
    hidden: A, linear_weight: Values, target: Values, *, reduction: Reduction = "mean",
    **options: Unpack[LinearOptions],
) -> A: ...  # fmt: skip
@overload
def linear_cross_entropy(
    hidden: Values, linear_weight: Values, target: Values, *, reduction: Reduction = "mean",
    **options: Unpack[LinearOptions],
) -> Any: ...  # fmt: skip
def linear_cross_entropy(
    hidden: Any,
    linear_weight: Any,
    target: Values,
    *,
    linear_bias: Values | None = None,
    weight: Values | None = None,
    reduction: Reduction = "mean",
    sample_weight: Values | None = None,
    ignore_index: int | SupportsShape | None = IGNORE_INDEX,
    label_smoothing: Scalar = 0.0,
    z_loss: Scalar = 0.0,
    softcap: Scalar | None = None,
    denominator: Scalar | None = None,
    validate: bool | None = None,
    engine: str | Engine | None = None,
    memory_budget: int | str | None = None,
) -> Any:
    r"""Cross-entropy of a linear layer, whose logits are never in memory as a whole.

    With hidden states :math:`h`, the rows :math:`W_k` of the weight and the bias :math:`b`, the loss is that of
    `cross_entropy` for the logits

    .. math:: x_k = W_k \cdot h + b_k

    but these are made for some rows, or some rows and classes, at a time [1]_ [2]_, within `memory_budget`.

    Parameters
    ----------
    hidden : array_like
        Hidden states, of shape (…, D) and dtype float16, bfloat16, float32 or float64. Each index into the axes before
        the last is a row.
    linear_weight : array_like
        The weight of the layer, of shape (C, D) and the dtype of `hidden`: one row for each class.
    target : array_like
        Either class indices in the shape of the rows, (…), or one distribution per row, of shape (…, C).
    linear_bias : array_like or None, default None
        The bias of the layer, of shape (C,) and the dtype of `hidden`. By default there is none.
    weight : array_like or None, default None
        A weight for each class in the loss, of shape (C,).
    reduction : {"mean", "sum", "none"}, default "mean"
        How the losses of the rows are combined.
    sample_weight : array_like or None, default None
        A weight for each row, or a mask of the rows that count, in the shape of the rows.
    ignore_index : int or None, default -100
        The label of rows that do not count.
    label_smoothing : float, default 0.0
        The share of the target, from 0 to 1, that is spread evenly over all classes.
    z_loss : float, default 0.0
        The factor of lse² in the loss of a row, at least 0.
    softcap : float or None, default None
        The bound, above 0, to which the logits are capped first.
    denominator : float, array or None, default None
        What the mean divides by instead of its own count.
    validate : bool or None, default None
        Whether labels are checked; by default where this involves no waiting.
    engine : str, Engine or None, default None
        The engine for the loss of the logits; by default the first that accepts them.
    memory_budget : int, str or None, default None
        The most memory for buffers: bytes, or text such as "64MB" or "64MiB". By default 64 MiB in host memory and 256
        MiB on a GPU, or more if the smallest buffers need more. See the notes for what it does not include.

    Returns
    -------
    scalar or array
        The loss, as returned by `cross_entropy`: float64 for float64 inputs and float32 otherwise.

    Raises
    ------
    TypeError, ValueError, IndexError
        As in `cross_entropy`. Also if the shapes or dtypes of `hidden`, `linear_weight` and `linear_bias` do not fit
        together; and a ValueError if `memory_budget` is too small for the smallest buffers, which says how much they
        need.

    See Also
    --------
    linear_cross_entropy_value_and_grad : The loss and the gradients of `hidden`, `linear_weight` and `linear_bias`.
    cross_entropy : The loss of logits, where all options are described in full.
    xent_array.torch.LinearCrossEntropyLoss : A PyTorch module.

    Notes
    -----
    The library of the arrays makes the products of matrices; the engines of `cross_entropy` do the rest in place. Rows
    that are ignored or have sample weight 0 are left out of the products, or, on a GPU, replaced by zeros.

    16-bit inputs are converted, part by part, to float32, in which everything is computed; logits are not rounded to 16
    bits. The one exception are bfloat16 tensors of PyTorch on a GPU: they are multiplied as they are, by tensor cores,
    with sums in float32, and so is the gradient of the logits, rounded to bfloat16.

    If some rows with all classes do not fit in the budget, the classes are processed in slices too, which are merged as
    by `merge_stats`. Logits that are small anyway are faster made and passed to `cross_entropy`: a call of that costs
    less.

    The budget is for buffers in addition to inputs and results. It does not include a few numbers per row and per
    class, nor the workspaces of fixed size that the products and the engines have: those of the engines take less than
    1 MiB with labels and a few MiB with distributions (of "numpy" more). ``python -m xent_array --explain-linear
    8192x512x50257:float32`` prints the buffers for one problem.

    In PyTorch's autograd graph the loss is a single node. Its forward pass also computes the gradients, unless they
    must wait for the upstream gradient: with ``reduction="none"``, and in float16. Under `torch.compile` and
    `torch.func`, under JAX's transformations, and where derivatives with respect to targets or weights are recorded,
    it is a plain composition, which makes all logits at once.

    References
    ----------
    .. [1] E. Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models", 2024, arXiv:2411.09009.
    .. [2] P.-L. Hsu et al., "Liger Kernel: Efficient Triton Kernels for LLM Training", section 3.2, 2024,
           arXiv:2410.10989.

    Examples
    --------
    >>> import numpy as np
    >>> from xent_array import cross_entropy, linear_cross_entropy
    >>> hidden = np.array([[1.0, 2], [3, 0.5]])
    >>> head = np.array([[1.0, 0], [0, 1], [0.5, -1]])
    >>> print(f"{linear_cross_entropy(hidden, head, np.array([1, 0])):.3f}")
    0.266
    >>> print(f"{cross_entropy(hidden @ head.T, np.array([1, 0])):.3f}")
    0.266
    """
    asked = Asked(
        -1, reduction, weight, sample_weight, ignore_index, label_smoothing, z_loss, softcap, denominator, validate,
        engine,
    )  # fmt: skip
    call = Call(hidden, linear_weight, target, linear_bias, asked, memory_budget)
    if hidden.__class__ is not np.ndarray and (in_graph := _bridges.in_graph()) is not None:
        return in_graph.linear_cross_entropy(call)
    call = checked(call)
    recorded = _recorded(call)
    if recorded is not None:
        return recorded(call)
    head = head_of(call)
    if head is None:
        return composed(call)
    return run(head, (False, False, False), [None] * 3)[0]


def _recorded(call: Call) -> Any:
    """The function that makes the loss part of a record of PyTorch's, if there is one."""
    if not hasattr(call.hidden, "data_ptr"):
        return None
    from .._bridges import _torch_linear

    return _torch_linear.loss if _torch_linear.records(call) else None


@overload
def linear_cross_entropy_value_and_grad(
    hidden: NumPyLike, linear_weight: Values, target: Values, *, reduction: Reduced = "mean",
    **options: Unpack[LinearGradOptions],
) -> tuple[Float, tuple[Floats, Floats, Floats | None]]: ...  # fmt: skip
@overload
def linear_cross_entropy_value_and_grad(
    hidden: A, linear_weight: Values, target: Values, *, reduction: Reduction = "mean",
    **options: Unpack[LinearGradOptions],
) -> tuple[A, tuple[A, A, A | None]]: ...  # fmt: skip
@overload
def linear_cross_entropy_value_and_grad(
    hidden: Values, linear_weight: Values, target: Values, *, reduction: Reduction = "mean",
    **options: Unpack[LinearGradOptions],
) -> tuple[Any, tuple[Any, ...]]: ...  # fmt: skip
def linear_cross_entropy_value_and_grad(
    hidden: Any,
    linear_weight: Any,
    target: Values,
    *,
    linear_bias: Values | None = None,
    weight: Values | None = None,
    reduction: Reduction = "mean",
    sample_weight: Values | None = None,
    ignore_index: int | SupportsShape | None = IGNORE_INDEX,
    label_smoothing: Scalar = 0.0,
    z_loss: Scalar = 0.0,
    softcap: Scalar | None = None,
    denominator: Scalar | None = None,
    validate: bool | None = None,
    engine: str | Engine | None = None,
    memory_budget: int | str | None = None,
    grad_output: Values | float | None = None,
    out: Any = None,
) -> tuple[Any, tuple[Any, ...]]:
    r"""Cross-entropy of a linear layer, and its gradients, without the logits as a whole.

    With :math:`G` the gradient of the logits as `cross_entropy_value_and_grad` returns it, one row per row,

    .. math:: \partial / \partial h = G W, \qquad \partial / \partial W = G^T h, \qquad
              \partial / \partial b_k = \textstyle\sum_i G_{ik}

    Parameters
    ----------
    hidden : array_like
        Hidden states, of shape (…, D).
    linear_weight : array_like
        The weight of the layer, of shape (C, D).
    target : array_like
        Class indices in the shape of the rows, (…), or distributions, of shape (…, C).
    linear_bias : array_like or None, default None
        The bias of the layer, of shape (C,). By default there is none.
    weight : array_like or None, default None
        A weight for each class in the loss, of shape (C,).
    reduction : {"mean", "sum", "none"}, default "mean"
        How the losses of the rows are combined. With "none", the gradients are those of the sum of the rows.
    sample_weight : array_like or None, default None
        A weight for each row, or a mask of the rows that count, in the shape of the rows.
    ignore_index : int or None, default -100
        The label of rows that do not count.
    label_smoothing : float, default 0.0
        The share of the target, from 0 to 1, that is spread evenly over all classes.
    z_loss : float, default 0.0
        The factor of lse² in the loss of a row, at least 0.
    softcap : float or None, default None
        The bound, above 0, to which the logits are capped first.
    denominator : float, array or None, default None
        What the mean divides by instead of its own count.
    validate : bool or None, default None
        Whether labels are checked; by default where this involves no waiting.
    engine : str, Engine or None, default None
        The engine for the loss of the logits; by default the first that accepts them.
    memory_budget : int, str or None, default None
        The most memory for buffers: bytes, or text such as "64MB" or "64MiB". By default 64 MiB in host memory and 256
        MiB on a GPU, or more if the smallest buffers need more.
    grad_output : float, array_like or None, default None
        The upstream gradient: a number, or with ``reduction="none"`` also an array in the shape of the rows. By default
        1. It multiplies the gradients, not the loss, before they are rounded.
    out : tuple or None, default None
        Three arrays to write the gradients to, in the order in which they are returned, each with the shape and dtype
        of what it is the gradient of; None in place of an array makes a new one. They share no memory with an input or
        with each other. By default all are made.

    Returns
    -------
    loss : scalar or array
        As returned by `cross_entropy`.
    grads : tuple
        The gradients of `hidden`, `linear_weight` and `linear_bias`, each with the shape and dtype of its argument; the
        third is None without a bias. Rows that do not count have a gradient of exactly 0. For PyTorch tensors all are
        detached.

    Raises
    ------
    TypeError, ValueError, IndexError
        As in `linear_cross_entropy`. Also if `out` is no tuple of three, or if an array in it does not fit.

    See Also
    --------
    linear_cross_entropy : The loss alone, where the arguments are described in full.
    cross_entropy_value_and_grad : The same for logits that are there.

    Notes
    -----
    If some rows with all classes fit in the budget, there are three products of all rows and classes: the logits, and
    one for each gradient. If the classes are processed in slices, the logits are made twice. The gradients of 16-bit
    inputs are summed in float32 and rounded once; if the budget has no room for such sums of both gradients, the logits
    are made three times.

    Examples
    --------
    >>> import numpy as np
    >>> from xent_array import linear_cross_entropy_value_and_grad
    >>> hidden = np.array([[1.0, 2], [3, 0.5]])
    >>> head = np.array([[1.0, 0], [0, 1], [0.5, -1]])
    >>> labels = np.array([1, 0])
    >>> loss, (grad_hidden, grad_weight, _) = linear_cross_entropy_value_and_grad(hidden, head, labels)
    >>> print(f"{loss:.3f}")
    0.266
    >>> grad_hidden.round(3)
    array([[ 0.137, -0.153],
           [-0.062, -0.022]])
    >>> grad_weight.round(3)
    array([[-0.136,  0.218],
           [-0.041, -0.268],
           [ 0.178,  0.049]])
    """
    asked = Asked(
        -1, reduction, weight, sample_weight, ignore_index, label_smoothing, z_loss, softcap, denominator, validate,
        engine, grad_output,
    )  # fmt: skip
    call = Call(hidden, linear_weight, target, linear_bias, asked, memory_budget)
    if hidden.__class__ is not np.ndarray and (in_graph := _bridges.in_graph()) is not None:
        loss, grads = in_graph.linear_cross_entropy_value_and_grad(call)
        return loss, filled(out, grads)
    call = checked(call)
    head = head_of(call)
    if head is None:
        loss, grads = composed_value_and_grad(call)
        return loss, filled(out, grads)
    outs = outputs(head, call, out)
    has_bias = call.linear_bias is not None
    loss, made = run(head, (True, True, has_bias), outs.views)
    return loss, outs.results(head, made, (call.hidden, call.linear_weight, call.linear_bias))
