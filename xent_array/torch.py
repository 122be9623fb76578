"""Cross-entropy as PyTorch modules."""

from __future__ import annotations

from typing import Any

import torch

from ._api import cross_entropy
from ._bridges import _torch_operations as _torch_operations  # exported programs refer to these
from ._linear.functions import linear_cross_entropy
from ._linear.head import bytes_of_budget
from ._problem import check_options
from ._rows import IGNORE_INDEX
from ._typing import Reduction

__all__ = ["CrossEntropyLoss", "LinearCrossEntropyLoss"]


class _Loss(torch.nn.Module):
    """The options that both modules have."""

    weight: torch.Tensor | None

    def __init__(
        self, weight: torch.Tensor | None, ignore_index: int, reduction: Reduction, label_smoothing: float,
        z_loss: float, softcap: float | None,
    ) -> None:  # fmt: skip
        super().__init__()
        if not isinstance(weight, torch.Tensor | None):
            raise TypeError(f"weight must be a tensor or None, got {type(weight).__name__}")
        check_options(reduction, ignore_index, label_smoothing, z_loss, softcap, None)
        self.register_buffer("weight", weight)
        self.ignore_index = ignore_index
        self.reduction: Reduction = reduction
        self.label_smoothing = label_smoothing
        self.z_loss = z_loss
        self.softcap = softcap

    def extra_repr(self) -> str:
        """The options that are not None, as `repr` shows them."""
        names = ("ignore_index", "reduction", "label_smoothing", "z_loss", "softcap", "memory_budget")
        given = {name: getattr(self, name, None) for name in names}
        return ", ".join(f"{name}={value!r}" for name, value in given.items() if value is not None)

    def _options(self, is_distribution: bool) -> dict[str, Any]:
        """The options, for a function."""
        return {
            "reduction": self.reduction,
            "weight": self.weight,
            "ignore_index": IGNORE_INDEX if is_distribution and self.ignore_index < 0 else self.ignore_index,
            "label_smoothing": self.label_smoothing,
            "z_loss": self.z_loss,
            "softcap": self.softcap,
        }


class CrossEntropyLoss(_Loss):
    r"""`torch.nn.CrossEntropyLoss` on the fused engines, with the additional options `z_loss` and `softcap`.

    With :math:`x` the logits of one row, :math:`q` its target distribution after smoothing and :math:`w` the class
    weights, the loss of the row is

    .. math:: \sum_k w_k q_k (\mathrm{lse}(x) - x_k) + z \, \mathrm{lse}(x)^2,
              \qquad \mathrm{lse}(x) = \log \sum_k e^{x_k}

    Parameters
    ----------
    weight : tensor or None, default None
        A weight for each class, of shape (C,). It is a buffer: it moves with the module and is part of its
        `state_dict`. By default every class has weight 1.
    ignore_index : int, default -100
        Rows with this label have loss 0 and gradient 0 and are left out of the mean. For class indices only; with
        distributions, a negative value has no effect.
    reduction : {"mean", "sum", "none"}, default "mean"
        As in PyTorch: "none" returns one loss per row; the mean over class indices divides by the sum of the weights of
        the labels that count, and the mean over distributions by the number of rows.
    label_smoothing : float, default 0.0
        The number e, from 0 to 1, in q = (1 - e)·target + e/C.
    z_loss : float, default 0.0
        The number z, at least 0, in the formula above, which pulls lse(x) towards 0.
    softcap : float or None, default None
        If given, a number above 0: the logits are first replaced by ``softcap * tanh(logits / softcap)``.

    Raises
    ------
    TypeError, ValueError
        If an option has the wrong type or is out of range.

    See Also
    --------
    xent_array.cross_entropy : The function, which also takes weights per row and any axis of the classes.
    xent_array.CrossEntropyLoss : For arrays of any library, without automatic differentiation.

    Notes
    -----
    The loss and the gradients are those of PyTorch up to rounding, with these differences: the loss of 16-bit logits is
    float32; `weight` may have any dtype, and class indices any integer dtype; a label that is not a class raises an
    IndexError on a CPU, and makes its row NaN on a GPU. The arguments `size_average` and `reduce` do not exist.

    Before loading a program saved by `torch.export`, import this module: it registers the operations that the program
    refers to.

    Examples
    --------
    >>> import torch
    >>> from xent_array.torch import CrossEntropyLoss
    >>> logits = torch.tensor([[2, 1, 0.1], [0.1, 2, 1.9]], requires_grad=True)
    >>> loss = CrossEntropyLoss()(logits, torch.tensor([1, 0]))
    >>> print(f"{loss:.3f}")
    2.019
    >>> loss.backward()
    >>> logits.grad
    tensor([[ 0.3295, -0.3788,  0.0493],
            [-0.4636,  0.2434,  0.2202]])
    """

    def __init__(
        self,
        weight: torch.Tensor | None = None,
        ignore_index: int = IGNORE_INDEX,
        reduction: Reduction = "mean",
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        softcap: float | None = None,
    ) -> None:
        super().__init__(weight, ignore_index, reduction, label_smoothing, z_loss, softcap)

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """The loss of logits under a target.

        Parameters
        ----------
        input : tensor
            Logits of dtype float16, bfloat16, float32 or float64, of shape (C,), (N, C) or (N, C, d1, …).
        target : tensor
            Class indices, of any integer dtype and of shape (), (N,) or (N, d1, …); or one distribution per row, of a
            floating dtype, in the shape of `input`.

        Returns
        -------
        tensor
            A scalar; or with ``reduction="none"`` one loss per row, in the shape of class indices. The dtype is float32
            for 16-bit logits and that of `input` otherwise.

        Raises
        ------
        TypeError, ValueError, IndexError
            As in `xent_array.cross_entropy`, where `input` is called `logits`. Also a TypeError if `input` is not a
            tensor, or if a target in the shape of `input` is not floating.

        See Also
        --------
        xent_array.cross_entropy : The function, where all options are described in full.

        Examples
        --------
        >>> import torch
        >>> from xent_array.torch import CrossEntropyLoss
        >>> logits = torch.tensor([[2, 1, 0.1], [0.1, 2, 1.9]])
        >>> CrossEntropyLoss(reduction="none").forward(logits, torch.tensor([1, -100]))
        tensor([1.4170, 0.0000])
        """
        if not isinstance(input, torch.Tensor):
            raise TypeError(f"input must be a tensor, got {type(input).__name__}")
        is_distribution = isinstance(target, torch.Tensor) and target.shape == input.shape
        if is_distribution and not target.is_floating_point():  # more likely class indices in a wrong shape
            raise TypeError(
                f"a target in the shape of the input, {tuple(input.shape)}, is a distribution per row and must be"
                f" floating, got {target.dtype}; class indices have the shape without the classes, which lie along axis"
                f" {min(1, input.ndim - 1)}"
            )
        axis = 1 if input.ndim > 2 else -1
        found: torch.Tensor = cross_entropy(input, target, axis=axis, **self._options(is_distribution))
        return found


class LinearCrossEntropyLoss(_Loss):
    r"""A linear layer and the cross-entropy of its logits, which are never in memory as a whole.

    With :math:`h` the input of one row, :math:`W` and :math:`b` weight and bias of the layer, the logits are :math:`x =
    W h + b`, and the loss is that of `CrossEntropyLoss`.

    Parameters
    ----------
    in_features : int
        The length D of the last axis of the input.
    num_classes : int
        The number C of classes.
    bias : bool, default False
        Whether the layer has a bias.
    device : torch.device or None, default None
        The device of the parameters.
    dtype : torch.dtype or None, default None
        The dtype of the parameters.
    reduction : {"mean", "sum", "none"}, default "mean"
        How the losses of the rows are combined.
    weight : tensor or None, default None
        A weight for each class in the loss, of shape (C,). It is a buffer.
    ignore_index : int, default -100
        Rows with this label have loss 0 and gradient 0 and are left out of the mean. For class indices only.
    label_smoothing : float, default 0.0
        The number e, from 0 to 1, in q = (1 - e)·target + e/C.
    z_loss : float, default 0.0
        The factor of lse² in the loss of a row, at least 0.
    softcap : float or None, default None
        If given, a number above 0: the logits are first replaced by ``softcap * tanh(logits / softcap)``.
    memory_budget : int, str or None, default None
        The most memory for buffers: bytes, or text such as "64MB" or "64MiB"; see
        `xent_array.linear_cross_entropy`.

    Raises
    ------
    TypeError, ValueError
        If an option has the wrong type or is out of range.

    See Also
    --------
    CrossEntropyLoss : For logits that are there.
    xent_array.linear_cross_entropy : The function, which also takes weights per row.

    Notes
    -----
    The layer is the attribute `linear`, a `torch.nn.Linear`. To share its weight with an embedding, assign the
    parameter: ``loss.linear.weight = embedding.weight``.

    `torch.nn.LinearCrossEntropyLoss` has the same arguments except for the last three, and takes `out_features` and
    `options`, which do not exist here. Axes before the last are rows here.

    Examples
    --------
    >>> import torch
    >>> from xent_array.torch import LinearCrossEntropyLoss
    >>> loss = LinearCrossEntropyLoss(2, 3)
    >>> with torch.no_grad():
    ...     _ = loss.linear.weight.copy_(torch.tensor([[1.0, 0], [0, 1], [0.5, -1]]))
    >>> hidden = torch.tensor([[1, 2], [3, 0.5]], requires_grad=True)
    >>> found = loss(hidden, torch.tensor([1, 0]))
    >>> print(f"{found:.3f}")
    0.266
    >>> found.backward()
    >>> hidden.grad
    tensor([[ 0.1370, -0.1532],
            [-0.0615, -0.0219]])
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        reduction: Reduction = "mean",
        weight: torch.Tensor | None = None,
        ignore_index: int = IGNORE_INDEX,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        softcap: float | None = None,
        memory_budget: int | str | None = None,
    ) -> None:
        super().__init__(weight, ignore_index, reduction, label_smoothing, z_loss, softcap)
        self.memory_budget = memory_budget
        bytes_of_budget(memory_budget)
        self.linear = torch.nn.Linear(in_features, num_classes, bias, device, dtype)

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """The loss of an input of the layer under a target.

        Parameters
        ----------
        input : tensor
            Hidden states of shape (…, D), in the dtype of the parameters.
        target : tensor
            Class indices, of any integer dtype and of shape (…); or one distribution per row, of shape (…, C).

        Returns
        -------
        tensor
            A scalar; or with ``reduction="none"`` one loss per row, in the shape of class indices. The dtype is float32
            for 16-bit inputs and that of `input` otherwise.

        Raises
        ------
        TypeError, ValueError, IndexError
            As in `xent_array.linear_cross_entropy`, where `input` is called `hidden`. Also a TypeError if `input` is
            not a tensor.

        See Also
        --------
        xent_array.linear_cross_entropy : The function, where all options are described in full.

        Examples
        --------
        >>> import torch
        >>> from xent_array.torch import LinearCrossEntropyLoss
        >>> loss = LinearCrossEntropyLoss(2, 3, bias=True, reduction="none")
        >>> loss.forward(torch.zeros(4, 2), torch.tensor([1, 0, 2, -100])).shape
        torch.Size([4])
        """
        if not isinstance(input, torch.Tensor):
            raise TypeError(f"input must be a tensor, got {type(input).__name__}")
        is_distribution = isinstance(target, torch.Tensor) and target.dim() == input.dim()
        options = self._options(is_distribution) | {"memory_budget": self.memory_budget}
        found: torch.Tensor = linear_cross_entropy(
            input, self.linear.weight, target, linear_bias=self.linear.bias, **options
        )
        return found
