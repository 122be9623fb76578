"""JAX: arrays in host memory as NumPy arrays, those on a GPU as CuPy arrays.

An array is lent if it has values, is on one device, and nothing else must see every step. Under a transformation it has
no values: there the plain composition runs, which JAX differentiates, batches and compiles like any other code, and
whose backward pass keeps the logits and a few numbers per row.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax import numpy as jnp

from .._engines import Engine
from .._engines.cpu.memory import MAPPED
from .._rows import Array, device, is_traced, place
from . import KINDS, optional

if TYPE_CHECKING:
    from .._problem import Problem

_config: Any = jax.config  # its attributes are unknown to type checkers
_CUDA = 2  # DLPack's number for this kind of device
_REDUCTIONS = frozenset({"argmax", "reduce_max", "reduce_sum"})


def refuses(arrays: list[Any], role: str) -> str | None:
    own = [array for array in arrays if isinstance(array, jax.Array)]
    if any(map(is_traced, own)):
        return "they are traced"
    if _config.jax_debug_nans or _config.jax_debug_infs:
        return "a debugger is to see every step"
    if any(len(array.sharding.device_set) > 1 or not array.is_fully_addressable for array in own):
        return "they are spread over devices or processes"
    if jax.dtypes.canonicalize_dtype(own[0].dtype) != own[0].dtype:
        return "jax_enable_x64 is off, and they are of 64 bits"
    there, *others = map(_device, own)
    if any(other != there and (other.platform, there.platform) != ("cpu", "cpu") for other in others):
        return "they are on different devices"
    if there.platform == "gpu" and _is_on_cuda(own[0]):
        if _cupy() is None:
            return "CuPy is not installed"
    elif there.platform != "cpu":
        return f"they are on a device of kind {there.platform!r}"
    for array in own:
        KINDS.setdefault(type(array), sys.modules[__name__])
    return None


def at_work(logits: Any) -> AbstractContextManager[Any]:
    return np.errstate(all="ignore")


def lend(array: Any, dtype: str | None = None) -> Array:
    if not isinstance(array, jax.Array):
        return array
    if _is_on_cuda(array):
        return _cupy().from_dlpack(array.block_until_ready())
    if array.nbytes >= MAPPED:
        _make_room(array)
    return np.asarray(array)


def _make_room(array: Any) -> None:
    """Make JAX release memory that is no longer referenced, which it does when it receives an array: see `_memory`."""
    with jax.transfer_guard("allow"), jax.default_device(_device(array)):
        jax.device_put(np.float32(0))


def beside(array: Array, logits: Any, is_lent: bool) -> Any:
    if is_lent and not _is_on_cuda(logits):
        return array
    if array.dtype.kind not in "biufV" or array.dtype.itemsize > 8:
        return array  # to be refused later, with its name
    dtype = jax.dtypes.canonicalize_dtype(array.dtype.newbyteorder("="))
    if dtype.kind in "iu" and array.size:
        low, high = int(array.min()), int(array.max())
        if not np.iinfo(dtype).min <= low <= high <= np.iinfo(dtype).max:
            found = low if low < np.iinfo(dtype).min else high
            raise ValueError(
                f"{found} in an array of NumPy is beyond {dtype}, which is what JAX has without jax_enable_x64"
            )
    # Not as a step of the traced function, so that labels can be checked there too.
    with jax.ensure_compile_time_eval(), jax.transfer_guard("allow"), np.errstate(all="ignore"):
        return jnp.asarray(array.astype(dtype, copy=False), device=device(logits))


def give(array: Array, logits: Any) -> Any:
    """Through `device_put`, which does not copy memory aligned to 64 bytes.

    Unlike the alternatives it compiles nothing for each shape.
    """
    if isinstance(array, (np.ndarray, np.generic)):
        with jax.transfer_guard("allow"):
            return _put(np.asarray(array), logits)
    _cupy().cuda.get_current_stream().synchronize()  # lent memory may be freed as soon as this returns
    return jax.dlpack.from_dlpack(array)


def _put(array: Array, logits: Any) -> Any:
    if not logits.committed:
        with jax.default_device(_device(logits)):
            return jax.device_put(array)
    return jax.device_put(array, logits.sharding if array.shape == logits.shape else _device(logits))


def engine(found: Engine, logits: Any) -> Engine:
    return found


def records(logits: Any) -> bool:
    return False  # if there is anything to record, the arrays are traced


def composed(answer: Callable[[Any], Any], problem: Problem) -> Any:
    """The answer as one step, which the backward pass recomputes except for the reductions over the classes."""
    logits, target = problem.home.logits, problem.inputs.get("target")
    if not any(is_traced(array) for array in (logits, *problem.inputs.values()) if array is not None):
        return answer(problem.rows)  # spread over devices, or debugged: not differentiated

    def again(logits: Any, target: Any) -> Any:
        view, rows = problem.view, problem.rows
        if target is not None:
            seen = view.rows(jnp, target) if rows.has_labels else view.logits(jnp, target)
            rows = rows._replace(target=seen)
        return answer(rows._replace(logits=view.logits(jnp, logits)))

    return jax.checkpoint(again, policy=_is_small)(logits, target)


def _is_small(primitive: Any, *_: Any, **__: Any) -> bool:
    return primitive.name in _REDUCTIONS


def at_once(own: Any, logits: Any, target: Any, options: tuple[Any, ...], wants_grad: bool, out: Any) -> Any:
    """The simplest call in few steps; also for 32-bit labels, which JAX has by default."""
    if out is not None or not isinstance(target, (jax.Array, np.ndarray)) or refuses([logits, target], "nothing"):
        return None
    if isinstance(target, jax.Array) and None not in (here := (place(target), place(logits))) and here[0] != here[1]:
        return None
    if _device(logits).platform != "cpu":
        return None
    answer = own(lend(logits), lend(target), options, wants_grad, None)
    if answer is None:
        return None
    with jax.transfer_guard("allow"):
        loss, grad = (None if made is None else _put(np.asarray(made), logits) for made in answer)
    return loss, grad


def detached_loss(loss: Any, logits: Any) -> Any:
    return loss


# A GPU


def _device(array: Any) -> Any:
    return next(iter(array.sharding.device_set))


def _is_on_cuda(array: Any) -> bool:
    return _device(array).platform == "gpu" and int(array.__dlpack_device__()[0]) == _CUDA


def _cupy() -> Any:
    return optional("cupy")
