"""From what users pass to `Rows` and back: all checks, the view of any axis as rows, and the caller's `out`."""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext, suppress
from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy as np
from array_api_compat import is_array_api_obj, is_writeable_array

from . import _bridges, _engines
from ._bridges import Home
from ._engines import Engine
from ._linear.factors import Factors
from ._rows import (
    DASK,
    IGNORE_INDEX,
    Array,
    Asked,
    Attempt,
    DType,
    Rows,
    RowStats,
    device,
    index_dtype,
    is_ignored,
    is_traced,
    lacks,
    namespace,
    place,
    quiet,
    signed,
    widest,
)

_ARITHMETIC = {"float16": "float32", "bfloat16": "float32", "float32": "float32", "float64": "float64"}
_NUMPY = {name: np.dtype(name) for name in ("float32", "float64")}
_INTEGERS = frozenset(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))
_BOOLEANS = ("bool", "bool_")
_REDUCTIONS = ("none", "mean", "sum")


class View(NamedTuple):
    """How the user's axes become (outer, C, inner), and how results come back."""

    shape: tuple[int, ...]  # of the logits
    axis: int
    row_shape: tuple[int, ...]  # without the class axis
    order: tuple[int, ...] | None  # outer, class and inner axes; None if they are in that order already
    flat: tuple[int, int, int]  # (outer, C, inner)

    def logits(self, xp: Any, array: Array, copy: bool | None = None) -> Array:
        """An array in the shape of the logits, viewed as (outer, C, inner); no copy if the strides allow it."""
        if self.order is not None:
            array = xp.permute_dims(array, self.order)
        return _reshaped(xp, array, self.flat) if copy is None else xp.reshape(array, self.flat, copy=copy)

    def rows(self, xp: Any, array: Array) -> Array:
        """An array in the shape of the rows, viewed as (outer, inner)."""
        if self.order is not None:
            array = xp.permute_dims(array, self._row_order)
        return _reshaped(xp, array, self.flat[::2])

    def from_logits(self, xp: Any, array: Array) -> Array:
        """An array (outer, C, inner), back in the shape of the logits."""
        if self.order is None:
            return _reshaped(xp, array, self.shape)
        return _unpermuted(xp, array, self.shape, self.order)

    def from_rows(self, xp: Any, array: Array) -> Array:
        """An array (outer, inner), back in the shape of the rows; as in NumPy, its 0-d arrays become scalars."""
        if self.order is None:
            array = _reshaped(xp, array, self.row_shape)
        else:
            array = _unpermuted(xp, array, self.row_shape, self._row_order)
        return array[()] if xp is np else array

    @property
    def row_order(self) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        """The user's shape of the rows and the order of its axes in (outer, inner); None if the order is the same."""
        if self.order is None or self._row_order == tuple(range(len(self.row_shape))):
            return None
        return self.row_shape, self._row_order

    @property
    def _row_order(self) -> tuple[int, ...]:
        assert self.order is not None
        return tuple(k if k < self.axis else k - 1 for k in self.order if k != self.axis)


def _reshaped(xp: Any, array: Array, shape: tuple[int, ...]) -> Array:
    return array.reshape(shape) if xp is np else xp.reshape(array, shape)


def _unpermuted(xp: Any, array: Array, shape: tuple[int, ...], order: tuple[int, ...]) -> Array:
    array = xp.reshape(array, tuple(shape[k] for k in order))
    return xp.permute_dims(array, tuple(order.index(k) for k in range(len(order))))


def _conversion(given: Any, role: str, dtype: str, library: Any = np) -> str:
    """Code that converts an array, or a list passed along with arrays of `library`, for use in an error message."""
    if not hasattr(given, "dtype"):
        return f"numpy.array({role}, dtype={dtype!r})" if library is np else f"xp.asarray({role}, dtype=xp.{dtype})"
    if hasattr(given, "astype"):
        return f"{role}.astype({dtype!r})"
    return f"{role}.{dtype.rstrip('0123456789')}()" if hasattr(given, "float") else f"xp.astype({role}, xp.{dtype})"


def _view(logits: Array, axis: int, role: str, may_be_empty: bool = False) -> View:
    """Row axes that vary faster in memory than the class axis are inner, all others outer, each from slow to fast.

    Any axis order of a contiguous array is therefore a view: (N, C, H, W) in channels-last memory has dense rows.
    """
    try:
        axis = operator.index(axis)
    except TypeError:
        _without_dimension(axis, "axis")
        raise TypeError(f"axis must be an integer, got {axis!r}") from None
    try:
        view = _ordered_view(tuple(logits.shape), axis, role, may_be_empty)
    except TypeError:  # symbolic lengths cannot be hashed
        view = _ordered_view.__wrapped__(tuple(logits.shape), axis, role, may_be_empty)
    shape, axis, strides = view.shape, view.axis, getattr(logits, "strides", None)
    if strides is None or shape[axis] == 1 or logits.flags.c_contiguous:
        return view
    step = [abs(stride) if length > 1 else 0 for stride, length in zip(strides, shape, strict=True)]
    by_step = sorted((k for k in range(len(shape)) if k != axis), key=lambda k: -step[k])
    inner = [k for k in by_step if 0 < step[k] < step[axis]]
    outer = [k for k in by_step if k not in inner]
    order = (*outer, axis, *inner)
    if order == tuple(range(len(shape))):
        return view
    flat = (math.prod([shape[k] for k in outer]), shape[axis], math.prod([shape[k] for k in inner]))
    return view._replace(order=order, flat=flat)


@lru_cache(maxsize=256)
def _ordered_view(shape: tuple[int, ...], axis: int, role: str, may_be_empty: bool) -> View:
    """The view for axes that lie in memory in the order of the shape."""
    if not shape:
        raise ValueError(f"{role} must have at least one dimension, the classes; got a scalar, of shape ()")
    if not -len(shape) <= axis < len(shape):
        raise ValueError(f"axis must be from {-len(shape)} to {len(shape) - 1} for {role} of shape {shape}, got {axis}")
    axis %= len(shape)
    before, behind = shape[:axis], shape[axis + 1 :]
    if shape[axis] == 0 and not may_be_empty:
        raise ValueError(f"{role} must have at least one class; axis {axis} of shape {shape} has length 0")
    return View(shape, axis, before + behind, None, (math.prod(before), shape[axis], math.prod(behind)))


class Problem(NamedTuple):
    """A checked problem, its engine, and the way back to the user's shapes."""

    rows: Rows
    view: View
    engine: Engine
    inputs: dict[str, Any]  # the user's arrays, by name
    home: Home

    def loss(self, loss: Array) -> Array:
        """The loss that an engine returned, in the form that the user receives."""
        return self.home.give(self.view.from_rows(self.rows.xp, loss) if self.rows.reduction == "none" else loss)

    def logits(self, made: Array) -> Array:
        """An engine's result in the shape of the logits, in the form that the user receives."""
        return self.home.give(self.view.from_logits(self.rows.xp, made))

    def per_row(self, made: Array) -> Array:
        """An engine's result with one number per row, in the form that the user receives."""
        return self.home.give(self.view.from_rows(self.rows.xp, made))

    def user_stats(self, stats: RowStats) -> RowStats:
        """The stats that an engine returned, in the form that the user receives."""
        return RowStats(*(None if part is None else self.per_row(part) for part in stats))

    def stats(self, stats: RowStats) -> RowStats:
        """Stats that the user passed, checked and in the form that an engine takes."""
        if not isinstance(stats, RowStats):
            raise TypeError(f"stats must be what row_stats returned, got {described(stats)}")
        acc, view = self.rows.acc, self.view
        return RowStats(
            *(
                view.rows(self.rows.xp, _real_rows(detached(part), f"stats.{name}", self.home, acc, view))
                for name, part in zip(stats._fields[:4], stats[:4], strict=True)
            )
        )

    def with_upstream(self, grad_output: Any) -> Problem:
        """The same problem with an upstream gradient."""
        rows, view, value = self.rows, self.view, _host_number(detached(grad_output))
        upstream: Any
        if isinstance(value, numbers.Real):
            upstream = _float(value, "grad_output")
            _check_held(rows.xp, upstream, "grad_output", rows.acc)
        elif rows.reduction == "none" and getattr(value, "shape", None) != ():
            upstream = _real_rows(value, "grad_output", self.home, rows.acc, view)
            self.check_held(value, upstream, "grad_output")
            upstream = view.rows(rows.xp, upstream)
        else:
            words = f"no dimension for reduction={rows.reduction!r}, shape"
            _check_number(value, "grad_output")
            upstream = _real(value, "grad_output", self.home, rows.acc, (), words)
            self.check_held(value, upstream, "grad_output")
            upstream = float(upstream) if rows.xp is np else upstream
        inputs = self.inputs | {"grad_output": self.home.lend(value)}
        return self._replace(rows=rows._replace(upstream=upstream), inputs=inputs)

    def check_held(self, given: Any, taken: Array, role: str) -> None:
        """Raises ValueError if a finite number became infinite in the dtype of the arithmetic, if checking is free.

        Lists have been checked before.
        """
        name = dtype_name(taken.dtype)
        may_be_lost = not isinstance(given, (list, tuple)) and dtype_name(getattr(given, "dtype", "")) != name
        if may_be_lost and self.engine.reads_labels_free(self.rows):
            _check_all_held(self.rows.xp, _lent(given, role, self.home), taken, role)


def _check_all_held(xp: Any, given: Array, taken: Array, role: str, first: Sequence[int] | None = None) -> None:
    """Raises ValueError for the first number that is finite in `given` but infinite in `taken`."""
    with quiet(xp):
        lost = ~xp.isfinite(taken)
        if not bool(xp.any(lost)):
            return
        lost = lost & xp.isfinite(xp.astype(given, xp.float64))
        if not bool(xp.any(lost)):
            return
        at = int(xp.argmax(xp.astype(xp.reshape(lost, (-1,)), xp.int8)))
        where = _place(at, taken.shape, first)
        value = float(xp.reshape(given, (-1,))[at])
    raise ValueError(f"{role}{where} is {value!r}, which the arithmetic, here {dtype_name(taken.dtype)}, cannot hold")


def _place(at: int, shape: tuple[int, ...], first: Sequence[int] | None) -> str:
    """The index, in brackets, of element number `at` of an array that begins at the index `first` of a larger one.

    Nothing for an array without dimensions, or if it is not known where it begins.
    """
    begins = [0] * len(shape) if first is None else first
    if not shape or any(map(math.isnan, begins)):
        return ""
    return f"[{', '.join(str(int(k + n)) for k, n in zip(np.unravel_index(at, shape), begins, strict=True))}]"


def _host_number(value: Any) -> Any:
    """The number in a 0-d NumPy array, which can be combined with any library; anything else unchanged."""
    return value[()] if isinstance(value, np.ndarray) and value.shape == () else value


def _float(value: Any, role: str) -> float:
    """A real number as a Python float; an integer may be too large for that."""
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{role} must be a number that float64 can hold") from None


def _check_number(value: Any, role: str) -> None:
    """Raises TypeError for anything that is neither a number nor an array that might hold one."""
    if not hasattr(value, "dtype") and not hasattr(value, "__array__"):
        raise TypeError(f"{role} must be a number or an array without dimensions, got {described(value)}")


def _check_held(xp: Any, value: float, role: str, acc: DType, divides: bool = False) -> None:
    """Raises ValueError if the arithmetic cannot hold a finite number or, if it `divides`, its inverse."""
    info = xp.finfo(acc)
    smallest = float(info.smallest_normal)
    if divides and 0 < abs(value) < smallest:
        raise ValueError(
            f"{role} must be at least {smallest!r} in magnitude, the smallest normal number of the arithmetic, here"
            f" {dtype_name(acc)}; got {value!r}"
        )
    if math.isfinite(value) and abs(value) > float(info.max):
        raise ValueError(f"{role} must be a number that the arithmetic can hold, here {dtype_name(acc)}; got {value!r}")


def problem_without_target(x: Array, axis: int) -> Problem:
    """The problem of softmax, log_softmax and logsumexp."""
    given, x = x, as_array(x, "x")
    home = _home(x, [], None, "everything")
    x = home.lend(x)
    xp = namespace(x)
    acc = _arithmetic(xp, x, "x", given)
    view = home.view(_view(x, axis, "x"), x)
    rows = Rows(xp, view.logits(xp, x), acc)
    return Problem(rows, view, home.engine(_engines.pick(rows, None, is_lent=home.bridge is not None)), {}, home)


def _home(
    logits: Array, others: list[Any], engine: str | Engine | None, differentiates: str, name: str = "logits"
) -> Home:
    """Where the engine is to work: on the arrays themselves, or on their memory as arrays of another library."""
    xp = namespace(logits)
    bridge = None if xp is np else _bridges.named(xp.__name__)
    if bridge is None or not _engines.may_borrow(engine):
        return Home(logits, xp, None, differentiates, name=name)
    why_not = bridge.refuses([logits, *others], differentiates)
    return Home(logits, xp, bridge if why_not is None else None, differentiates, why_not or "", name)


def problem_of(
    logits: Any | Factors, target: Any, asked: Asked, differentiates: str = "nothing", wants: str = "stats"
) -> Problem:
    """Makes every check, once.

    What the library must be able to differentiate is explained in `_bridges`, what the call `wants` at `Attempt`. Given
    `Factors`, the problem is that of logits in the dtype of the arithmetic, whose memory must not be read.
    """
    try:
        return _checked(logits, target, asked, differentiates)
    except BaseException as error:
        _tell(asked.engine, error, Attempt(wants, logits, target, asked.axis, asked.validate is True))
        raise


def _tell(engine: Any, error: BaseException, attempt: Attempt) -> None:
    """Let an engine of several processes know that this one has failed, so that no other waits for it."""
    failed = getattr(engine, "failed", None)
    if failed is not None:
        failed(error, attempt)


def _checked(logits: Any, target: Any, asked: Asked, differentiates: str) -> Problem:
    axis, reduction, weight, sample_weight, ignore_index, *numbers_asked, denominator, validate, engine, grad_output = (
        asked
    )
    options = check_options(reduction, ignore_index, *numbers_asked, validate)
    factors, name = (logits, "hidden") if isinstance(logits, Factors) else (None, "logits")
    logits = logits if factors is None else factors.hidden
    given, logits = logits, as_array(logits, name)
    detach = differentiates == "nothing"
    if detach and not isinstance(logits, np.ndarray):
        logits, target, denominator = detached(logits), detached(target), detached(denominator)
        weight, sample_weight = detached(weight), detached(sample_weight)
    others = [target, weight, sample_weight, denominator, grad_output, *(() if factors is None else factors.others)]
    home = _home(logits, others, engine, differentiates, name)
    with home.at_work() if home.bridge is not None else nullcontext():
        logits = home.lend(logits)
        xp = namespace(logits)
        acc = _arithmetic(xp, logits, name, given)
        if factors is not None:
            logits = factors.logits(xp, logits, acc)
        _check_held(xp, options[1], "z_loss", acc)
        if options[2] is not None:
            _check_held(xp, options[2], "softcap", acc, divides=True)
        start, vocabulary = getattr(engine, "slice", (0, 0))
        view = home.view(_view(logits, axis, "logits", may_be_empty=vocabulary != 0), logits)
        if vocabulary and start + view.flat[1] > vocabulary:
            raise ValueError(
                f"the logits are those of {view.flat[1]} classes, from class {start} on, of only {vocabulary} in all"
            )
        given, target = target, _lent(target, "target", home)
        target_dtype = dtype_name(target.dtype)
        is_labels = _check_target(target, target_dtype, view, given, home.library)
        if not is_labels:
            if ignore_index not in (None, IGNORE_INDEX):
                raise ValueError(
                    f"ignore_index={ignore_index} is for class indices, but target is a distribution per row;"
                    " give the rows that must not count sample_weight 0 instead"
                )
            ignore_index = None
        elif ignore_index is not None:
            ignore_index = operator.index(ignore_index)  # a Python integer, which has no size limit
            low, high = _integer_range(target_dtype)
            if not low <= ignore_index <= high:
                ignore_index = None  # no label can have that value; PyTorch would wrap it to one that can
        class_weight, row_weight = weight, sample_weight
        if weight is not None:
            of_all = (vocabulary or view.flat[1],)
            class_weight = _real(weight, "weight", home, acc, of_all, "one number per class,")
        if sample_weight is not None:
            row_weight = _real_rows(sample_weight, "sample_weight", home, acc, view, may_be_mask=True)
        inputs = {"logits": logits, "target": target}
        inputs |= {"weight": home.lend(weight), "sample_weight": home.lend(sample_weight)}
        check, are_beside = None, home.is_lazy and isinstance(target, np.ndarray)
        if is_labels and validate is not False and home.is_lazy and not are_beside:
            of = {"classes": view.flat[1], "ignore_index": ignore_index, "is_asked": bool(validate)}
            check = partial(_all_computed_labels_count, **of)
        label_smoothing, z_loss, softcap = options
        rows = Rows(
            xp=xp,
            logits=view.logits(xp, logits),
            acc=acc,
            target=view.rows(xp, target) if is_labels else view.logits(xp, target),
            weight=class_weight,
            sample_weight=None if row_weight is None else view.rows(xp, row_weight),
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            softcap=softcap,
            reduction=reduction,
            row_order=view.row_order,
            check=check,
            start=start,
            vocabulary=vocabulary,
            validate=validate is True,
        )
        if denominator is not None:
            rows = rows._replace(denominator=_denominator(denominator, rows, home))
        chosen = home.engine(_engines.pick(rows, engine, home.about, is_lent=home.bridge is not None))
        if is_labels and validate is not False and (validate or are_beside or chosen.reads_labels_free(rows)):
            with quiet(xp):
                counts = _all_labels_count(target, row_weight, rows.all_classes, ignore_index)
                rows = rows._replace(all_labels_count=counts)
        problem = Problem(rows, view, chosen, inputs, home)
        if weight is not None:
            problem.check_held(weight, class_weight, "weight")
        if row_weight is not None:
            problem.check_held(sample_weight, row_weight, "sample_weight")
        return problem if grad_output is None else problem.with_upstream(grad_output)


def _denominator(value: Any, rows: Rows, home: Home) -> Array | float:
    """What the caller wants the mean to divide by, checked: a number, or a 0-d array on the device of the logits."""
    check_denominator(value, rows.reduction)
    value = _host_number(value)
    if not isinstance(value, numbers.Real):
        _check_number(value, "denominator")
        value = _real(value, "denominator", home, widest(rows), (), "no dimension, shape")
        if home.is_lazy:
            return home.later(partial(_divisor, acc=np.dtype(rows.acc).name), value, value.dtype)
        if rows.xp is not np:
            return value
    return _checked_denominator(rows.xp, value, rows.acc)


def _checked_denominator(xp: Any, given: Any, acc: DType) -> float:
    value = _float(given, "denominator")
    if not math.isfinite(value):
        raise ValueError(f"denominator must be finite, got {value!r}")
    _check_held(xp, value, "denominator", acc, divides=True)
    return value


def _divisor(part: Array, *, first: Sequence[int] | None, acc: str) -> Array:
    """A denominator that was lazy, checked if it is in host memory."""
    if isinstance(part, (np.ndarray, np.generic)):
        _checked_denominator(np, part, np.dtype(acc))
    return part


def check_denominator(value: Any, reduction: str) -> None:
    """Raises ValueError for a denominator with another reduction than the mean."""
    if value is not None and reduction != "mean":
        raise ValueError(f"denominator is what the mean divides by; it cannot be combined with reduction={reduction!r}")


OPTIONS = ("reduction", "ignore_index", "label_smoothing", "z_loss", "softcap", "validate")


def check_options(*options: Any) -> tuple[float, float, float | None]:
    """Checks the options named in OPTIONS, given in that order, and returns the three numbers among them."""
    options = tuple(map(_without_dimension, options, OPTIONS))
    try:
        return _checked_options(*options)
    except TypeError:  # also raised if an option cannot be hashed
        return _checked_options.__wrapped__(*options)


def _without_dimension(value: Any, role: str) -> Any:
    """The number in a 0-d array, which is read immediately; anything else unchanged."""
    if isinstance(value, (float, int, str, np.generic)) or value is None or getattr(value, "shape", None) != ():
        return value
    if getattr(value, "requires_grad", False):
        raise TypeError(f"{role} is a number by which nothing is differentiated: pass {role}.item()")
    if hasattr(value, "compute"):
        raise TypeError(f"{role} is a number that must be known at once: pass .compute() of it")
    if is_traced(value):
        raise TypeError(f"{role} must be known while tracing: make it static, as with static_argnames of jax.jit")
    return value.item() if hasattr(value, "item") else value.__index__() if "int" in str(value.dtype) else float(value)


@lru_cache(maxsize=256, typed=True)  # 1 is a valid ignore_index; True and 1.0 are not
def _checked_options(
    reduction: str,
    ignore_index: int | None,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    validate: bool | None,
) -> tuple[float, float, float | None]:
    if reduction not in _REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(map(repr, _REDUCTIONS))}; got {reduction!r}")
    if ignore_index is not None and not is_integer(ignore_index):
        raise TypeError(f"ignore_index must be an integer or None, got {ignore_index!r}")
    if not 0 <= _number(label_smoothing, "label_smoothing") <= 1:
        raise ValueError(f"label_smoothing must be from 0 to 1, got {label_smoothing!r}")
    if not 0 <= _number(z_loss, "z_loss") < math.inf:
        raise ValueError(f"z_loss must be finite and at least 0, got {z_loss!r}")
    if softcap is not None and not 0 < _number(softcap, "softcap") < math.inf:
        raise ValueError(f"softcap must be finite and above 0, or None; got {softcap!r}")
    if validate not in (None, True, False):
        raise ValueError(f"validate must be None, True or False; got {validate!r}")
    return float(label_smoothing), float(z_loss), None if softcap is None else float(softcap)


def is_integer(value: Any) -> bool:
    """Whether `value` is an integer of any library; True and False do not count as integers."""
    if isinstance(value, (bool, np.bool_)):
        return False
    try:
        operator.index(value)
    except TypeError:
        return False
    return True


def _number(value: Any, role: str) -> float:
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        return _float(value, role)
    shape = f" of shape {tuple(value.shape)}" if hasattr(value, "shape") else ""
    raise TypeError(f"{role} must be a real number, got {described(value)}{shape}")


def as_array(value: Any, role: str, like: Array | None = None, name: str = "logits") -> Array:
    """`value` as an array; if `like` is given, an array of its library and on its device. `name` is its own role."""
    given = value
    if isinstance(value, np.ndarray):
        if type(value) is not np.ndarray:
            if isinstance(value, (np.ma.MaskedArray, np.matrix)):
                raise TypeError(f"{role} must be a plain array, got a {type(value).__name__}: {_instead(value, role)}")
            value = np.asarray(value)
        if value.dtype.kind in "US":
            raise TypeError(f"{role} must be numbers, got an array of text, of dtype {value.dtype}")
    elif isinstance(value, (list, tuple, int, float, complex, np.generic)):
        return _from_list(value, role, None if like is None or _bridges.takes_numpy(namespace(like)) else like)
    elif not is_array_api_obj(value):
        value = _from_protocol(value, role)
    elif hasattr(value, "data_ptr") and (str(value.layout) != "torch.strided" or value.is_nested):
        kind = "that is nested" if value.is_nested else f"of layout {value.layout}: pass .to_dense() of it"
        raise TypeError(f"{role} must be a dense array, got a {described(value)} {kind}")
    elif namespace(value).__name__ == DASK:
        _check_chunks(value, role)
    elif lacking := lacks(namespace(value)):
        ways = [f".{way}()" for way in ("todense", "compute") if hasattr(value, way)]
        raise TypeError(
            f"{role} must be an array of a library that has all of the Array API that is needed here;"
            f" got {described(value)}, and {namespace(value).__name__} lacks {', '.join(lacking)}"
            f" ({' or '.join(ways) or 'numpy.asarray'} may convert it)"
        )
    if like is not None and value is not like:
        library = namespace(like)
        if namespace(value) is not library and not (isinstance(value, np.ndarray) and _bridges.takes_numpy(library)):
            words = f"{described(given)} with {described(like)}"
            raise TypeError(f"{role} must be a list, or an array of the library of {name}; got {words}")
        if not isinstance(value, np.ndarray):
            here, there = place(value), place(like)
            if None not in (here, there) and here != there:
                here, there = (sorted(p, key=str) if isinstance(p, frozenset) else p for p in (here, there))
                raise TypeError(f"{role} must be on the device of {name}, {there}, but is on {here}")
    return value


def _check_chunks(array: Array, role: str) -> None:
    """Raises TypeError if the chunks of a Dask array are no plain arrays of NumPy or CuPy, as far as it says so."""
    kind = type(array._meta)
    if issubclass(kind, (np.ma.MaskedArray, np.matrix)):
        advice = _instead(array._meta, role)
        raise TypeError(f"{role} must have plain chunks, got a Dask array of {kind.__name__}: {advice}")
    if kind.__module__.partition(".")[0] not in ("numpy", "cupy"):
        named = f"{kind.__module__.partition('.')[0]}.{kind.__name__}"
        raise TypeError(f"{role} must have chunks of NumPy or CuPy, got a Dask array of {named}")


def _lent(value: Any, role: str, home: Home) -> Array:
    """`value` as an array that the engine can take, checked against the user's logits."""
    return home.lend(as_array(value, role, home.logits, home.name))


def _from_list(value: Any, role: str, like: Array | None) -> Array:
    """Lists and numbers, converted as NumPy would convert them, in the library of `like`."""
    try:
        as_numpy = np.asarray(value)
    except ValueError as error:  # ragged
        raise ValueError(f"{role} is not an array: its lists differ in length ({error})") from None
    if as_numpy.dtype.kind not in "biufcV":
        kinds = {type(item).__name__ for item in as_numpy.astype(object).reshape(-1)[:1000]}
        if kinds == {"int"}:
            raise ValueError(f"{role} holds integers that are too large for any dtype")
        raise TypeError(f"{role} must be numbers, got a list that holds {', '.join(sorted(kinds))}")
    xp = np if like is None else namespace(like)
    dtype = index_dtype(xp) if as_numpy.size == 0 and role == "target" else None  # NumPy would make [] a float array
    if xp is np:
        return as_numpy if dtype is None else as_numpy.astype(dtype)
    if dtype is None and as_numpy.dtype.kind == "f":  # rather than the library's default float dtype
        dtype = getattr(xp, _ARITHMETIC[dtype_name(like.dtype)])  # type: ignore[union-attr]
    return xp.asarray(as_numpy.tolist(), dtype=dtype, device=device(like))


def _from_protocol(value: Any, role: str) -> Array:
    """An array from an object that NumPy can convert, such as a table column, if the result is plain and numeric."""
    made, advice = None, ""
    if type(value).__module__.startswith("dask."):  # which seems to have every attribute
        raise TypeError(f"{role} must be an array; got {described(value)}: pass dask.array.from_delayed of it")
    is_categorical = str(getattr(value, "dtype", "")) == "category"
    if hasattr(value, "__array__") and not isinstance(value, type) and not is_categorical:
        with suppress(Exception):  # whatever its own code raises
            made = np.asarray(value)
        if made is not None and (made.dtype.kind in "biufc" or dtype_name(made.dtype) in _ARITHMETIC):
            return made
    if is_categorical:
        advice = f"; the class indices of categories are its {'.codes' if hasattr(value, 'codes') else '.cat.codes'}"
    elif hasattr(value, "toarray"):
        advice = "; pass .toarray() of it"
    elif made is not None:
        advice = f", whose numpy.asarray has dtype {made.dtype}"
        advice += "; pass .to_numpy() of it, with a dtype of numbers" if hasattr(value, "to_numpy") else ""
    elif isinstance(value, Iterable) and not isinstance(value, (str, bytes, Mapping)):
        advice = "; pass a list of it"
    raise TypeError(
        f"{role} must be a list, or an array of NumPy, CuPy, PyTorch, JAX or another library of the Array API;"
        f" got {described(value)}{advice}"
    )


def _instead(value: Any, role: str) -> str:
    if isinstance(value, np.matrix):
        return "pass numpy.asarray of it"
    if role == "x":
        return "pass its data, with -inf where it is masked"
    return "pass its data, and sample_weight 0 (or ignore_index) for rows that must not count"


def described(value: Any) -> str:
    kind = type(value)
    name = kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__.partition('.')[0]}.{kind.__name__}"
    return f"{name} ({value!r})" if isinstance(value, (str, numbers.Number)) or value is None else name


def dtype_name(dtype: DType) -> str:
    """The name of a dtype of any library, such as 'float32'."""
    return _numpy_name(dtype) if isinstance(dtype, np.dtype) else str(dtype).rpartition(".")[2].rstrip("'>")


@lru_cache(maxsize=64)
def _numpy_name(dtype: DType) -> str:
    return str(dtype.name)  # NumPy computes it anew on every access


for _name in (*_INTEGERS, "float16", "float32", "float64"):
    _numpy_name(np.dtype(_name))  # NumPy imports a module for it, which it cannot at exit


def _arithmetic(xp: Any, logits: Array, role: str, given: Any) -> DType:
    """The dtype of the arithmetic for logits; `given` is what the user passed, an array or not."""
    name = dtype_name(logits.dtype)
    if name not in _ARITHMETIC:
        converts = name in _INTEGERS or name == "object"
        advice = f": write {_conversion(given, role, 'float32')}" if converts else ", which is not converted"
        raise TypeError(f"{role} must be of dtype {', '.join(_ARITHMETIC)}; got {name}{advice}")
    acc = _ARITHMETIC[name]
    return _NUMPY[acc] if xp is np else getattr(xp, acc)


@lru_cache(maxsize=len(_INTEGERS))
def _integer_range(name: str) -> tuple[int, int]:
    """The smallest and the largest value of an integer dtype."""
    bits = int(name.partition("int")[2])
    return (0, (1 << bits) - 1) if name[0] == "u" else (-(1 << (bits - 1)), (1 << (bits - 1)) - 1)


def _check_target(target: Array, name: str, view: View, given: Any, library: Any) -> bool:
    """Whether `target`, whose dtype is called `name`, holds class indices; otherwise it is one distribution per row.

    The user passed it as `given`: an array of `library`, or something that was converted to one.
    """
    shape = tuple(target.shape)
    if _same(shape, view.row_shape):
        if name not in _INTEGERS:
            advice = f" (write {_conversion(given, 'target', 'int64', library)})" if name in _ARITHMETIC else ""
            raise TypeError(
                f"class indices must be integers, got a target of dtype {name} in the shape of the rows, {shape}"
                f"{advice}; a distribution per row would have the shape of the logits, {view.shape}"
            )
        return True
    if _same(shape, view.shape):
        if name not in _INTEGERS and name not in _ARITHMETIC and name not in _BOOLEANS:
            raise TypeError(f"a target distribution must be float, integer or boolean, got dtype {name}")
        return False
    hint = ""
    if shape == (*view.row_shape, 1):
        hint = "; write target[..., 0] for class indices"
    elif len(view.shape) > 1 and view.axis != 1 and shape == view.shape[:1] + view.shape[2:]:
        hint = "; it would fit class indices with axis=1"
    raise ValueError(
        f"target of shape {shape} does not fit logits of shape {view.shape} with the classes along axis {view.axis}:"
        f" class indices have shape {view.row_shape}, distributions {view.shape}{hint}"
    )


def _same(shape: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Whether two shapes are the same, as far as their lengths are known; unknown ones, of Dask, are NaN."""
    if shape == other:
        return True
    return len(shape) == len(other) and all(m == n or m != m or n != n for m, n in zip(shape, other, strict=True))


def _real(
    value: Any, role: str, home: Home, acc: DType, shape: tuple[int, ...], words: str, may_be_mask: bool = False
) -> Array:
    """An array of real numbers, checked, in the dtype of the arithmetic; a mask becomes 0 and 1."""
    is_list = isinstance(value, (list, tuple))
    listed = _from_list(value, role, None) if is_list else value
    value = as_array(value, role, home.logits, home.name)
    is_numpy = is_list or (isinstance(value, np.ndarray) and home.library is not np)
    if is_numpy and listed.dtype == np.float64 and "32" in dtype_name(acc):
        with np.errstate(all="ignore"):  # other libraries would convert it before it could be checked
            _check_all_held(np, listed, listed.astype(np.float32), role)
    name = dtype_name(value.dtype)
    if name not in _INTEGERS and name not in _ARITHMETIC and not (may_be_mask and name in _BOOLEANS):
        raise TypeError(f"{role} must be real numbers, of an integer dtype or {', '.join(_ARITHMETIC)}; got {name}")
    if not _same(tuple(value.shape), shape):
        raise ValueError(f"{role} must have {words} {shape}; got shape {tuple(value.shape)}")
    value = home.lend(value, dtype_name(acc))
    xp = namespace(value)
    if home.is_lazy and xp is not np and name != dtype_name(acc):
        return home.later(partial(_held, role=role, acc=np.dtype(acc).name), value, acc)
    with quiet(xp):
        return xp.astype(value, acc, copy=False)


def _held(part: Array, *, first: Sequence[int] | None, role: str, acc: str) -> Array:
    """Part of an array that was lazy, in the dtype `acc`, checked as in `Problem.check_held`."""
    xp = namespace(part)
    with quiet(xp):
        taken = xp.astype(part, getattr(xp, acc))
    if xp is np and part.dtype != bool:
        _check_all_held(xp, part, taken, role, first)
    return taken


def _real_rows(value: Any, role: str, home: Home, acc: DType, view: View, may_be_mask: bool = False) -> Array:
    """An array with one real number per row, checked, in the user's shape."""
    return _real(value, role, home, acc, view.row_shape, "the shape of the rows,", may_be_mask)


def _all_labels_count(
    target: Array, row_weight: Array | None, classes: int, ignore_index: int | None, first: Sequence[int] | None = None
) -> bool:
    """Whether it is certain that every label is a class and none is ignored.

    Raises IndexError for the first label, among the rows that count, that is not a class. The labels may be a part of
    those of the user, which begins at the index `first`.
    """
    if is_traced(target) or 0 in target.shape:
        return False  # there are no values to read
    name, target = dtype_name(target.dtype), _on_host(target)
    xp = namespace(target)
    if xp is np:  # takes a third of the time of min and max if there are few labels
        low, high = target.item(target.argmin()), target.item(target.argmax())
    else:  # few libraries can compare every integer dtype
        target = signed(xp, target)
        low, high = int(xp.min(target)), int(xp.max(target))
    if low >= 0 and high < classes:
        return ignore_index is None or not 0 <= ignore_index < classes or not bool(xp.any(target == ignore_index))
    target = signed(xp, target)
    bad = (target < 0) | (target >= classes)
    if ignore_index is not None:
        bad = bad & ~is_ignored(xp, target, ignore_index)
    if row_weight is not None:
        if is_traced(row_weight):
            return False
        bad = bad & (_on_host(detached(row_weight)) != 0)
    if bool(xp.any(bad)):
        at = int(xp.argmax(xp.astype(xp.reshape(bad, (-1,)), xp.int8)))
        label = int(xp.reshape(target, (-1,))[at])
        smallest, largest = _integer_range(name)
        label += 0 if label >= smallest else largest + 1  # undo the wrapping by `signed`
        allowed = "" if ignore_index is None else f", or ignore_index={ignore_index}"
        only = " (the logits have one class)" if classes == 1 else ""
        raise IndexError(
            f"target{_place(at, target.shape, first)} is {label}, which is not a class:"
            f" labels must be from 0 to {classes - 1}{only}{allowed}"
        )
    return False


def _all_computed_labels_count(
    target: Array, row_weight: Array | None, first: Sequence[int], classes: int, ignore_index: int | None,
    is_asked: bool,
) -> bool:  # fmt: skip
    """`_all_labels_count` for labels that have just been computed.

    They are looked at in host memory; elsewhere only if the caller `is_asked` to wait for that.
    """
    looks = is_asked or isinstance(target, np.ndarray)
    return looks and _all_labels_count(target, row_weight, classes, ignore_index, first)


def _on_host(array: Array) -> Array:
    """An array in host memory as a NumPy array, so that no library traces the reading of it; others unchanged."""
    if not isinstance(array, np.ndarray):
        with suppress(AttributeError, BufferError, RuntimeError, TypeError, ValueError):
            return np.from_dlpack(array)
    return array


def detached(value: Any) -> Any:
    """`value` without its autograd history: the functions that detach return the gradient themselves."""
    detach = getattr(value, "detach", None)
    return value if detach is None else detach()


# The caller's buffer for the gradient


def shared_memory(one: Array, two: Any) -> str:
    """How two arrays share memory: "all" if element for element, else "some" or "none"."""
    if one is two:
        return "all"
    if two is None or (
        isinstance(one, np.ndarray) and isinstance(two, np.ndarray) and not np.may_share_memory(one, two)
    ):
        return "none"
    a, b = _extent(one), _extent(two)
    if a is None or b is None or a.stop <= b.start or b.stop <= a.start:
        return "none"
    if a == b:
        return "all"
    if isinstance(one, np.ndarray) and isinstance(two, np.ndarray):
        try:  # exact, unless that takes too much work
            some = np.shares_memory(one, two, max_work=100_000)  # type: ignore[arg-type]
            return "some" if some else "none"
        except np.exceptions.TooHardError:
            pass
    return "some"


def overlaps_itself(array: Array) -> bool:
    """Whether elements may overlap: some axis has a smaller step than the range that faster axes cover."""
    extent = _extent(array)
    if extent is None:
        return False
    reach = extent.itemsize
    for step, length in sorted((abs(s), n) for s, n in zip(extent.strides, extent.shape, strict=True) if n > 1):
        if step < reach:
            return True
        reach += step * (length - 1)
    return False


class _Extent(NamedTuple):
    start: int
    stop: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    itemsize: int


def _extent(array: Any) -> _Extent | None:
    """The bytes that an array occupies, from whichever of the usual interfaces it has; None if it has none."""
    if array is None or 0 in getattr(array, "shape", (0,)) or is_traced(array):
        return None
    strides: tuple[int, ...]
    array = detached(array)
    if hasattr(array, "data_ptr"):
        itemsize = array.element_size()
        pointer, strides = array.data_ptr(), tuple(itemsize * step for step in array.stride())
    else:
        device_array = hasattr(array, "__cuda_array_interface__")
        if not device_array:
            try:
                array = np.from_dlpack(array) if not isinstance(array, np.ndarray) else array
            except (AttributeError, BufferError, RuntimeError, TypeError, ValueError):
                return None
        told = array.__cuda_array_interface__ if device_array else array.__array_interface__
        pointer, strides, itemsize = told["data"][0], array.strides, array.dtype.itemsize
    shape = tuple(array.shape)
    reach = [step * (length - 1) for step, length in zip(strides, shape, strict=True)]
    start = pointer + sum(step for step in reach if step < 0)
    stop = pointer + sum(step for step in reach if step > 0) + itemsize
    return _Extent(start, stop, shape, tuple(strides), itemsize)


class Output:
    """The caller's `out`, checked, with its view as (outer, C, inner) if there is one; finally, the gradient."""

    def __init__(self, problem: Problem, out: Array | None, wants: str = "stats") -> None:
        self.problem, self.out = problem, out
        self.target: Any = None
        self.view: Array | None = None
        self.in_place = False
        if out is None:
            return
        try:
            self._check(out)
        except BaseException as error:
            given = problem.inputs["logits"], problem.inputs["target"], problem.view.axis, problem.rows.validate
            _tell(problem.engine, error, Attempt(wants, *given))
            raise

    def _check(self, out: Any) -> None:
        rows, view, home = self.problem.rows, self.problem.view, self.problem.home
        xp, library = rows.xp, home.library
        if not (is_array_api_obj(out) and namespace(out) is library):
            raise TypeError(f"out must be an array of the library of logits, {library.__name__}; got {described(out)}")
        if not getattr(getattr(out, "flags", None), "writeable", True):
            raise ValueError("out is read-only: the gradient cannot be written to it")
        if not is_writeable_array(out) or home.is_lazy:
            why = "are computed later" if home.is_lazy else "cannot be changed"
            raise TypeError(
                f"out cannot be used with {library.__name__}, whose arrays {why}; take the returned gradient"
            )
        if not _same(tuple(out.shape), view.shape):
            raise ValueError(f"out must have the shape of logits, {view.shape}; got {tuple(out.shape)}")
        if dtype_name(out.dtype) != dtype_name(rows.logits.dtype):
            raise TypeError(
                f"out must have the dtype of logits, {dtype_name(rows.logits.dtype)}; got {dtype_name(out.dtype)}"
            )
        target = as_array(detached(out), "out", home.logits)
        if (reason := home.refuses_out(target)) is not None:
            raise TypeError(f"out has no memory that the engine {self.problem.engine.name!r} can write to: {reason}")
        self.target = home.lend(target)
        if overlaps_itself(self.target):
            raise ValueError("out has elements that share memory with each other; it must have one place for each")
        for role, array in self.problem.inputs.items():
            shared = shared_memory(self.target, array)
            if role == "logits" and shared == "all":
                self.in_place = True
            elif shared != "none":
                raise ValueError(
                    f"out shares memory with {role}; it must be the logits exactly, or memory apart from every input"
                )
        with suppress(ValueError, NotImplementedError, AttributeError):  # otherwise the gradient is copied
            self.view = view.logits(xp, self.target, copy=False)

    def result(self, grad: Array) -> Array:
        """The gradient, stored where the caller wants it."""
        if self.out is None:
            return self.problem.logits(grad)
        if self.view is None:
            self.target[...] = self.problem.view.from_logits(self.problem.rows.xp, grad)
        self.problem.home.written(self.out)
        return self.out
