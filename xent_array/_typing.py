"""Types of the arguments and results of the public functions, for type checkers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol, TypeAlias, TypedDict, TypeVar

import numpy as np
import numpy.typing as npt

from ._engines import Engine


class SupportsShape(Protocol):
    """An array of any library; the Array API defines no common base class."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> Any: ...


class SupportsArray(Protocol):
    """Anything that converts itself to a NumPy array, such as a column of a table."""

    def __array__(self) -> npt.NDArray[Any]: ...


A = TypeVar("A", bound=SupportsShape)
NumPyLike: TypeAlias = npt.NDArray[Any] | Sequence[Any]  # the results are NumPy arrays
Values: TypeAlias = SupportsShape | SupportsArray | Sequence[Any]
Scalar: TypeAlias = float | SupportsShape  # or a 0-d array
Floats: TypeAlias = npt.NDArray[Any]
Float: TypeAlias = np.floating[Any]
Reduction: TypeAlias = Literal["none", "mean", "sum"]
Reduced: TypeAlias = Literal["mean", "sum"]


class SharedOptions(TypedDict, total=False):
    """The keyword arguments that `cross_entropy` and `linear_cross_entropy` have in common, other than `reduction`."""

    weight: Values | None
    sample_weight: Values | None
    ignore_index: int | SupportsShape | None
    label_smoothing: Scalar
    z_loss: Scalar
    softcap: Scalar | None
    denominator: Scalar | None
    validate: bool | None
    engine: str | Engine | None


class Options(SharedOptions, total=False):
    """The keyword arguments of `cross_entropy` other than `reduction`."""

    axis: int


class GradOptions(Options, total=False):
    """The keyword arguments of `cross_entropy_value_and_grad` other than `reduction` and `return_stats`."""

    grad_output: Values | float | None
    out: Any


class LinearOptions(SharedOptions, total=False):
    """The keyword arguments of `linear_cross_entropy` other than `reduction`."""

    linear_bias: Values | None
    memory_budget: int | str | None


class LinearGradOptions(LinearOptions, total=False):
    """The keyword arguments of `linear_cross_entropy_value_and_grad` other than `reduction`."""

    grad_output: Values | float | None
    out: Any
