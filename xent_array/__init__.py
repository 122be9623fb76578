"""Softmax cross-entropy, forward and backward, for arrays of any Array-API library.

NumPy arrays, and those of PyTorch and JAX in host memory, run through fused, threaded loops; those on NVIDIA GPUs
through CUDA kernels; arrays of other libraries through the same mathematics in their own functions.
``python -m xent_array`` shows what is installed and what it does; `xent_array.torch` is a module for PyTorch.
"""

from ._api import (
    CrossEntropyLoss,
    cross_entropy,
    cross_entropy_grad,
    cross_entropy_value_and_grad,
    log_softmax,
    logsumexp,
    merge_stats,
    row_stats,
    softmax,
)
from ._linear.functions import linear_cross_entropy, linear_cross_entropy_value_and_grad
from ._rows import RowStats

__version__ = "0.1.0"

__all__ = [
    "CrossEntropyLoss",
    "RowStats",
    "cross_entropy",
    "cross_entropy_grad",
    "cross_entropy_value_and_grad",
    "linear_cross_entropy",
    "linear_cross_entropy_value_and_grad",
    "log_softmax",
    "logsumexp",
    "merge_stats",
    "row_stats",
    "softmax",
]
