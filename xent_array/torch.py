"""The loss as a module of PyTorch."""

from __future__ import annotations

import torch

from ._api import cross_entropy
from ._bridges import _torch_operations as _torch_operations  # which exported programs name
from ._problem import IGNORE_INDEX, check_options
from ._typing import Reduction

__all__ = ["CrossEntropyLoss"]


class CrossEntropyLoss(torch.nn.Module):
    r"""`torch.nn.CrossEntropyLoss` on the fused engines, with two options more.

    With :math:`x` the logits of one row, :math:`q` its target distribution after smoothing and :math:`w` the class
    weights, the loss of the row is

    .. math:: \sum_k w_k q_k (\mathrm{lse}(x) - x_k) + z \, \mathrm{lse}(x)^2,
              \qquad \mathrm{lse}(x) = \log \sum_k e^{x_k}

    Parameters
    ----------
    weight : tensor of shape (C,), optional
        A weight per class; a buffer, which moves with the module and is in its `state_dict`.
    ignore_index : int
        Rows with this label have loss 0, gradient 0 and no share in the mean. For class indices only; with
        distributions a negative one is not looked at.
    reduction : {"mean", "sum", "none"}
        As in PyTorch: the mean over class indices divides by the weights of the labels that count, the mean over
        distributions by the number of rows.
    label_smoothing : float in [0, 1]
        e in q = (1 - e)·target + e/C.
    z_loss : float, at least 0
        z above: pulls lse(x) towards 0.
    softcap : float above 0, optional
        Replaces the logits by ``softcap * tanh(logits / softcap)`` first.

    Raises
    ------
    TypeError, ValueError
        An option of the wrong kind, or out of its range.

    See Also
    --------
    xent_array.cross_entropy : the function, which takes weights per row and any axis of the classes.
    xent_array.CrossEntropyLoss : for arrays of any library, without automatic differentiation.

    Notes
    -----
    Loss and gradients are PyTorch's but for rounding, and for this: the loss of 16-bit logits is float32, `weight` may
    be of any dtype, class indices of any integer dtype; a label that is no class is an IndexError on a CPU, and on a
    GPU makes its row NaN. Of the arguments, `size_average` and `reduce` are left out.

    To load a program that `torch.export` saved, import this module first: it holds the operations that are named there.

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

    weight: torch.Tensor | None

    def __init__(
        self,
        weight: torch.Tensor | None = None,
        ignore_index: int = IGNORE_INDEX,
        reduction: Reduction = "mean",
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        softcap: float | None = None,
    ) -> None:
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
        """The options that are given."""
        names = ("ignore_index", "reduction", "label_smoothing", "z_loss", "softcap")
        given = {name: getattr(self, name) for name in names}
        return ", ".join(f"{name}={value!r}" for name, value in given.items() if value is not None)

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """The loss of logits under a target.

        Parameters
        ----------
        input : tensor of float16, bfloat16, float32 or float64
            Logits, of shape (C,), (N, C) or (N, C, d1, …).
        target : tensor
            Class indices of shape (), (N,) or (N, d1, …), or a distribution per row in the shape of `input`.

        Returns
        -------
        tensor
            A scalar, or with ``reduction="none"`` the loss of each row, in the shape of class indices; float32 for
            16-bit logits, else in the dtype of `input`.

        Raises
        ------
        TypeError, ValueError, IndexError
            As in `xent_array.cross_entropy`, whose `logits` are the `input`.
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
        return cross_entropy(
            input,
            target,
            axis=1 if input.ndim > 2 else -1,
            reduction=self.reduction,
            weight=self.weight,
            ignore_index=IGNORE_INDEX if is_distribution and self.ignore_index < 0 else self.ignore_index,
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
            softcap=self.softcap,
        )
