"""The public functions: what they mean, and in which order the work is done."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, Unpack, overload

import numpy as np

from . import _again, _bridges, _engines
from ._engines import Engine
from ._problem import (
    IGNORE_INDEX,
    Output,
    Problem,
    check_denominator,
    check_options,
    problem_of,
    problem_without_target,
)
from ._rows import Array, RowStats
from ._typing import (
    A,
    Float,
    Floats,
    GradOptions,
    NumPyLike,
    Options,
    Reduced,
    Reduction,
    Scalar,
    SupportsShape,
    Values,
)


@overload
def softmax(x: A, *, axis: int = -1) -> A: ...
@overload
def softmax(x: Values, *, axis: int = -1) -> Any: ...
def softmax(x: Any, *, axis: int = -1) -> Any:
    r"""Softmax along one axis.

    .. math:: \sigma(x)_c = e^{x_c} / \sum_j e^{x_j}

    Parameters
    ----------
    x : array of float16, bfloat16, float32 or float64
        Logits, of any shape with at least one dimension; a (nested) list is taken as NumPy would take it.
    axis : int
        The axis of the classes.

    Returns
    -------
    array
        Probabilities, in the shape, dtype, library and device of `x`. A row that is all -inf or holds +inf or
        NaN is NaN.

    Raises
    ------
    TypeError
        `x` is no array, or of another dtype.
    ValueError
        `axis` is out of range, or has length 0.

    See Also
    --------
    log_softmax : its logarithm, which does not underflow.

    Examples
    --------
    >>> import numpy as np
    >>> from xent_array import softmax
    >>> softmax(np.array([[2, 1, 0.1], [0.1, 2, 1.9]])).round(3)
    array([[0.659, 0.242, 0.099],
           [0.073, 0.487, 0.44 ]])
    """
    return _softmax(x, axis, log=False)


@overload
def log_softmax(x: A, *, axis: int = -1) -> A: ...
@overload
def log_softmax(x: Values, *, axis: int = -1) -> Any: ...
def log_softmax(x: Any, *, axis: int = -1) -> Any:
    r"""Logarithm of the softmax along one axis.

    .. math:: \log \sigma(x)_c = x_c - \max(x) - \log(1 + \sum_{j \ne \arg\max} e^{x_j - \max(x)})

    with the last term by ``log1p``, so that a confident row keeps its small loss where
    ``log(sum(exp))`` would round it to 0.

    Parameters
    ----------
    x : array of float16, bfloat16, float32 or float64
        Logits, of any shape with at least one dimension.
    axis : int
        The axis of the classes.

    Returns
    -------
    array
        Log-probabilities, in the shape, dtype, library and device of `x`. A logit of -inf gives -inf; a row that
        is all -inf or holds +inf or NaN is NaN.

    Raises
    ------
    TypeError
        `x` is no array, or of another dtype.
    ValueError
        `axis` is out of range, or has length 0.

    See Also
    --------
    cross_entropy : for a loss there is no need of these N×C numbers.

    Examples
    --------
    >>> import numpy as np
    >>> from xent_array import log_softmax
    >>> print(" ".join(f"{v:.3g}" for v in log_softmax(np.array([17, 0], dtype=np.float32))))
    -4.14e-08 -17
    """
    return _softmax(x, axis, log=True)


def _softmax(x: Any, axis: int, log: bool) -> Array:
    call = None
    if x.__class__ in _again.KINDS:
        answer, call = _again.ask("softmax", None, (axis, log, None), [x, None])
        if answer is not None:
            return answer[0]
    problem = problem_without_target(x, axis)
    chosen = problem.engine if call is None else call.noted(problem.engine)
    with problem.home.at_work():
        found = problem.logits(_engines.softmax(chosen, problem.rows, log))
    if call is not None:
        call.keep(found)
    return found


@overload
def logsumexp(x: A, *, axis: int = -1, keepdims: bool = False) -> A: ...
@overload
def logsumexp(x: Values, *, axis: int = -1, keepdims: bool = False) -> Any: ...
def logsumexp(x: Any, *, axis: int = -1, keepdims: bool = False) -> Any:
    r"""Logarithm of the sum of exponentials along one axis.

    .. math:: \mathrm{lse}(x) = \max(x) + \log(1 + \sum_{j \ne \arg\max} e^{x_j - \max(x)})

    Parameters
    ----------
    x : array of float16, bfloat16, float32 or float64
        Logits, of any shape with at least one dimension.
    axis : int
        The axis of the classes.
    keepdims : bool
        Keep `axis`, with length 1.

    Returns
    -------
    array
        The shape of `x` without `axis`; float32 for 16-bit `x`, else its dtype. As in SciPy, a row with +inf gives
        inf, a row that is all -inf gives -inf.

    Raises
    ------
    TypeError
        `x` is no array, or of another dtype.
    ValueError
        `axis` is out of range, or has length 0.

    See Also
    --------
    row_stats : the same number and the loss, from one read.

    Examples
    --------
    >>> import numpy as np
    >>> from xent_array import logsumexp
    >>> logsumexp(np.array([[2, 1, 0.1], [0.1, 2, 1.9]])).round(3)
    array([2.417, 2.72 ])
    """
    problem = problem_without_target(x, axis)
    xp = problem.home.library
    with problem.home.at_work():
        stats = problem.user_stats(problem.home.composed(problem.engine.stats, problem))
        lse = stats.max + xp.log1p(stats.rest)
        return xp.expand_dims(lse, axis=problem.view.axis) if keepdims else lse


def _has_no_option(
    axis: Any, weight: Any, sample_weight: Any, ignore_index: Any, label_smoothing: Any, z_loss: Any, softcap: Any,
    denominator: Any, validate: Any, engine: Any,
) -> bool:  # fmt: skip
    """Whether plain labels along the last axis are all that may be asked about."""
    return (
        (weight is None and sample_weight is None and softcap is None)
        and (denominator is None and validate is None and engine is None)
        and (axis.__class__ is int and axis == -1)
        and (ignore_index.__class__ is int and ignore_index < 0)
        and (label_smoothing.__class__ is float and label_smoothing == 0)
        and (z_loss.__class__ is float and z_loss == 0)
    )


@overload
def cross_entropy(
    logits: NumPyLike, target: Values, *, reduction: Reduced = "mean", **options: Unpack[Options]
) -> Float: ...
@overload
def cross_entropy(logits: A, target: Values, *, reduction: Reduction = "mean", **options: Unpack[Options]) -> A: ...
@overload
def cross_entropy(
    logits: Values, target: Values, *, reduction: Reduction = "mean", **options: Unpack[Options]
) -> Any: ...
def cross_entropy(
    logits: Any,
    target: Values,
    *,
    axis: int = -1,
    reduction: Reduction = "mean",
    weight: Values | None = None,
    sample_weight: Values | None = None,
    ignore_index: int | SupportsShape | None = IGNORE_INDEX,
    label_smoothing: Scalar = 0.0,
    z_loss: Scalar = 0.0,
    softcap: Scalar | None = None,
    denominator: Scalar | None = None,
    validate: bool | None = None,
    engine: str | Engine | None = None,
) -> Array:
    r"""Softmax cross-entropy between logits and target classes or distributions.

    With :math:`x` the logits of one row, :math:`q` its target distribution after smoothing, :math:`w` the class
    weights and :math:`s` the row's sample weight, the loss of the row is

    .. math:: s \, \bigl[ \sum_k w_k q_k (\mathrm{lse}(x) - x_k) + z \, \mathrm{lse}(x)^2 \bigr],
              \qquad \mathrm{lse}(x) = \log \sum_k e^{x_k}

    Parameters
    ----------
    logits : array of float16, bfloat16, float32 or float64
        Unnormalised scores, of any shape with at least one dimension; the classes lie along `axis`, everything
        else are rows. Any strides.
    target : array
        Either class indices, of any integer dtype, in the shape of `logits` without `axis`; or one distribution per
        row, float, integer or boolean, in the shape of `logits` (soft labels, one-hot; used as given, also where it
        does not sum to 1).
    axis : int
        The axis of the classes; the last by default, unlike PyTorch. For images in the order (N, C, H, W) it is 1, and
        nothing is copied for that.
    reduction : {"mean", "sum", "none"}
        "none" gives one loss per row. "mean" divides the sum by the number of rows that count, each taken
        `sample_weight` times and, with class indices only, times the `weight` of its label. (With distributions and
        `weight` the mean divides by the number of rows, as in PyTorch: the two kinds of target then differ.)
    weight : array of shape (C,), optional
        A weight per class; a negative one is used as it is. The weight of a class that no label names is never used,
        not even where it is inf or NaN.
    sample_weight : array in the shape of the rows, optional
        A weight per row: a row of weight s counts s times. A row of weight 0 is inert, whatever it holds. Booleans are
        a mask of the rows that count; a negative weight is used as it is.
    ignore_index : int or None
        Rows with this label have loss 0, gradient 0 and no share in the mean, whatever they hold. None ignores
        nothing. For class indices only.
    label_smoothing : float in [0, 1]
        e in q = (1 - e)·target + e/C. Here and below, an array of no dimension is taken for a number; it is read at
        once, which waits for the device that it is on.
    z_loss : float, at least 0
        z above: pulls lse(x) towards 0. It takes sample weights, never class weights.
    softcap : float above 0, optional
        Replaces the logits by ``softcap * tanh(logits / softcap)`` first.
    denominator : float, or array of no dimension where the logits are, optional
        What the mean divides by in place of its own count: the tokens of all micro-batches, or of all processes. An
        array is never read by the host. For ``reduction="mean"`` only.
    validate : bool, optional
        True checks every label, also where that waits for a GPU; False checks none. By default they are checked where
        it costs no waiting: in host memory. Under tracing (``jax.jit``) there is nothing to check. The row of a bad
        label that is not checked is NaN.
    engine : str, optional
        Forces an engine by its name ("cpu", "numpy", "cuda", "generic"; ``python -m xent_array`` lists them);
        by default the first that takes the arrays.

    Returns
    -------
    scalar or array
        Float32 for 16-bit logits, else in the dtype of the logits; a scalar as the library's ``sum`` returns it, or
        one number per row, in the shape of `logits` without `axis`. NaN for the mean over no row, as in PyTorch.

    Raises
    ------
    TypeError
        Arrays of different libraries (but those of NumPy go with JAX's) or devices, a dtype that is not listed above,
        masked arrays.
    ValueError
        A shape, axis or option out of its range; or a finite weight that the arithmetic cannot hold, such as 1e39 in
        float32. (Weights in the memory of a GPU are not looked at; they become inf.)
    IndexError
        A label that is no class, where labels are checked; the message names the first.

    Notes
    -----
    A logit of -inf has probability 0, and 0·(-inf) counts 0 for any kind of target; target mass on a -inf logit
    gives +inf. A row that is all -inf or holds +inf or NaN is NaN, and no other.

    Rows are summed in float64 where the library has it. In host memory, of NumPy, PyTorch or JAX, a row's loss is the
    same to the last bit alone, in any batch and under any number of threads.

    To PyTorch's autograd the loss is one node. Where the logits require a gradient it is made along with the loss, from
    the same read; derivatives by other arguments, and second ones, run through the plain composition. JAX
    differentiates that composition, and keeps of the logits' size nothing but the logits.

    See Also
    --------
    cross_entropy_value_and_grad : with the gradient, for one read of the logits.
    row_stats : the parts it is made of.

    References
    ----------
    Label smoothing: Szegedy et al., "Rethinking the Inception Architecture for Computer Vision", 2016, section 7.
    z-loss: de Brébisson and Vincent, "The Z-loss: a shift and scale invariant classification loss", 2016; the form
    used here is that of Chowdhery et al., "PaLM", 2022, section 5. Softcap: Gemma Team, "Gemma 2", 2024, section 2.

    Examples
    --------
    >>> import numpy as np
    >>> from xent_array import cross_entropy
    >>> A = np.array([[2, 1, 0.1], [0.1, 2, 1.9]])
    >>> Y = np.array([1, 0])
    >>> print(f"{cross_entropy(A, Y):.3f}")
    2.019
    >>> cross_entropy(A, Y, reduction="none").round(3)
    array([1.417, 2.62 ])

    The same with distributions, here one-hot:

    >>> cross_entropy(A, np.array([[0, 1, 0], [1, 0, 0]]), reduction="none").round(3)
    array([1.417, 2.62 ])
    """
    if logits.__class__ is not np.ndarray and (in_graph := _bridges.in_graph()) is not None:
        return in_graph.cross_entropy(
            logits, target, axis=axis, reduction=reduction, weight=weight, sample_weight=sample_weight,
            ignore_index=ignore_index, label_smoothing=label_smoothing, z_loss=z_loss, softcap=softcap,
            denominator=denominator, validate=validate, engine=engine,
        )  # fmt: skip
    if _has_no_option(
        axis, weight, sample_weight, ignore_index, label_smoothing, z_loss, softcap, denominator, validate, engine
    ):
        at_once = _engines.at_once(logits, target, reduction, None, wants_grad=False)
        if at_once is not None:
            return at_once[0]
    call = None
    if logits.__class__ in _again.KINDS:
        options = (axis, reduction, ignore_index, label_smoothing, z_loss, softcap, validate)
        given = [logits, target, weight, sample_weight, denominator, None]
        answer, call = _again.ask("loss", engine, options, given)
        if answer is not None:
            return answer[0]
    asked: dict[str, Any] = {
        "axis": axis,
        "reduction": reduction,
        "weight": weight,
        "sample_weight": sample_weight,
        "ignore_index": ignore_index,
        "label_smoothing": label_smoothing,
        "z_loss": z_loss,
        "softcap": softcap,
        "denominator": denominator,
        "validate": validate,
        "engine": engine,
    }
    problem = problem_of(logits, target, **asked, differentiates="loss")
    chosen = problem.engine if call is None else call.noted(problem.engine)
    with problem.home.at_work():
        if problem.home.is_recorded:
            return problem.home.recorded(problem, (logits, target, asked))
        loss = problem.loss(problem.home.composed(partial(_engines.loss, chosen), problem))
    if call is not None:
        call.keep(loss)
    return loss


@overload
def cross_entropy_value_and_grad(
    logits: NumPyLike, target: Values, *, reduction: Reduced = "mean", return_stats: Literal[False] = False,
    **options: Unpack[GradOptions],
) -> tuple[Float, Floats]: ...  # fmt: skip
@overload
def cross_entropy_value_and_grad(
    logits: A, target: Values, *, reduction: Reduction = "mean", return_stats: Literal[False] = False,
    **options: Unpack[GradOptions],
) -> tuple[A, A]: ...  # fmt: skip
@overload
def cross_entropy_value_and_grad(
    logits: NumPyLike, target: Values, *, reduction: Reduced = "mean", return_stats: Literal[True],
    **options: Unpack[GradOptions],
) -> tuple[Float, Floats, RowStats]: ...  # fmt: skip
@overload
def cross_entropy_value_and_grad(
    logits: A, target: Values, *, reduction: Reduction = "mean", return_stats: Literal[True],
    **options: Unpack[GradOptions],
) -> tuple[A, A, RowStats]: ...  # fmt: skip
@overload
def cross_entropy_value_and_grad(
    logits: Values, target: Values, *, reduction: Reduction = "mean", return_stats: bool = False,
    **options: Unpack[GradOptions],
) -> tuple[Any, ...]: ...  # fmt: skip
def cross_entropy_value_and_grad(
    logits: Any,
    target: Values,
    *,
    axis: int = -1,
    reduction: Reduction = "mean",
    weight: Values | None = None,
    sample_weight: Values | None = None,
    ignore_index: int | SupportsShape | None = IGNORE_INDEX,
    label_smoothing: Scalar = 0.0,
    z_loss: Scalar = 0.0,
    softcap: Scalar | None = None,
    denominator: Scalar | None = None,
    validate: bool | None = None,
    engine: str | Engine | None = None,
    grad_output: Values | float | None = None,
    out: Any = None,
    return_stats: bool = False,
) -> tuple[Any, ...]:
    r"""Cross-entropy and its gradient with respect to the logits, from one read of the logits.

    With :math:`p` the softmax of a row, :math:`a_k = w_k q_k` and ``scale`` all that multiplies the row (upstream
    gradient, sample weight, 1/denominator), the gradient is

    .. math:: \mathrm{scale} \, \bigl[ (\textstyle\sum_j a_j + 2 z \, \mathrm{lse}) \, p_k - a_k \bigr]

    and under softcap that times :math:`1 - \tanh^2`. For the mean over plain labels it is
    :math:`(\sigma(A) - Y) / N`.

    Parameters
    ----------
    logits, target, axis, reduction, weight, sample_weight
        As in `cross_entropy`.
    ignore_index, label_smoothing, z_loss, softcap, denominator, validate, engine
        As in `cross_entropy`. ``reduction="none"`` gives the gradient of the sum of the rows.
    grad_output : scalar, or for ``reduction="none"`` also an array in the shape of the rows, optional
        The upstream gradient. It multiplies the gradient and not the loss, before the gradient is rounded to the dtype
        of the logits: the loss scale of 16-bit training goes here, and costs nothing.
    out : array, optional
        Where the gradient goes, in the shape and dtype of the logits, with any strides; returned as the same object.
        ``out=logits`` overwrites the logits and uses no second N×C array.
    return_stats : bool
        Return what `row_stats` would, too, from the same read.

    Returns
    -------
    loss : scalar or array
        As from `cross_entropy`.
    grad : array
        In the shape, dtype, library and device of the logits. Exactly 0 in a row that does not count. From PyTorch
        tensors loss and gradient are both detached.
    stats : RowStats
        Only with ``return_stats=True``. Its ``correct`` says which labels were predicted.

    Raises
    ------
    TypeError, ValueError, IndexError
        As in `cross_entropy`; TypeError too for an `out` of another library or dtype, or one that can never be written
        to (JAX); ValueError for one that is read-only, of another shape, or shares memory with an input in part.

    See Also
    --------
    cross_entropy_grad : the gradient alone, also from saved `row_stats`.

    Examples
    --------
    >>> import numpy as np
    >>> from xent_array import cross_entropy_value_and_grad
    >>> A = np.array([[2, 1, 0.1], [0.1, 2, 1.9]])
    >>> loss, grad = cross_entropy_value_and_grad(A, np.array([1, 0]))
    >>> print(f"{loss:.3f}")
    2.019
    >>> grad.round(3)
    array([[ 0.33 , -0.379,  0.049],
           [-0.464,  0.243,  0.22 ]])

    With what tells the accuracy:

    >>> _, _, stats = cross_entropy_value_and_grad(A, np.array([0, 1]), return_stats=True)
    >>> stats.correct
    array([ True,  True])

    In place:

    >>> loss, grad = cross_entropy_value_and_grad(A, np.array([1, 0]), out=A)
    >>> grad is A
    True
    """
    if logits.__class__ is not np.ndarray and not return_stats and (in_graph := _bridges.in_graph()) is not None:
        loss, grad = in_graph.cross_entropy_value_and_grad(
            logits, target, axis=axis, reduction=reduction, weight=weight, sample_weight=sample_weight,
            ignore_index=ignore_index, label_smoothing=label_smoothing, z_loss=z_loss, softcap=softcap,
            denominator=denominator, validate=validate, engine=engine,
            grad_output=grad_output, out=out,
        )  # fmt: skip
        return loss, grad
    upstream: Any = grad_output
    plain = not return_stats and (upstream is None or upstream.__class__ is float)
    if plain and _has_no_option(
        axis, weight, sample_weight, ignore_index, label_smoothing, z_loss, softcap, denominator, validate, engine
    ):
        at_once = _engines.at_once(logits, target, reduction, upstream, wants_grad=True, out=out)
        if at_once is not None:
            return at_once
    call = None
    if logits.__class__ in _again.KINDS:
        options = (axis, reduction, ignore_index, label_smoothing, z_loss, softcap, bool(return_stats), validate)
        given = [logits, target, weight, sample_weight, denominator, grad_output, out]
        answer, call = _again.ask("loss and grad", engine, options, given)
        if answer is not None:
            return (*answer[:2], RowStats(*answer[2:])) if return_stats else answer
    problem = problem_of(
        logits,
        target,
        axis=axis,
        reduction=reduction,
        weight=weight,
        sample_weight=sample_weight,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        softcap=softcap,
        denominator=denominator,
        validate=validate,
        engine=engine,
        grad_output=grad_output,
    )
    into = Output(problem, out)
    chosen = problem.engine if call is None else call.noted(problem.engine)
    with problem.home.at_work():
        if return_stats:
            loss, grad, stats = _engines.loss_grad_and_stats(chosen, problem.rows, into.view)
            found: tuple[Any, ...] = problem.loss(loss), into.result(grad), problem.user_stats(stats)
        else:
            loss, grad = _engines.loss_and_grad(chosen, problem.rows, into.view)
            found = problem.loss(loss), into.result(grad)
    if call is not None:
        call.keep(*found[:2], *(found[2] if return_stats else ()))
    return found


@overload
def cross_entropy_grad(
    logits: A, target: Values, *, reduction: Reduction = "mean", stats: RowStats | None = None,
    **options: Unpack[GradOptions],
) -> A: ...  # fmt: skip
@overload
def cross_entropy_grad(
    logits: Values, target: Values, *, reduction: Reduction = "mean", stats: RowStats | None = None,
    **options: Unpack[GradOptions],
) -> Any: ...  # fmt: skip
def cross_entropy_grad(
    logits: Any,
    target: Values,
    *,
    axis: int = -1,
    reduction: Reduction = "mean",
    weight: Values | None = None,
    sample_weight: Values | None = None,
    ignore_index: int | SupportsShape | None = IGNORE_INDEX,
    label_smoothing: Scalar = 0.0,
    z_loss: Scalar = 0.0,
    softcap: Scalar | None = None,
    denominator: Scalar | None = None,
    validate: bool | None = None,
    engine: str | Engine | None = None,
    grad_output: Values | float | None = None,
    stats: RowStats | None = None,
    out: Any = None,
) -> Array:
    r"""Gradient of the cross-entropy with respect to the logits.

    .. math:: \mathrm{scale} \, \bigl[ (\textstyle\sum_j a_j + 2 z \, \mathrm{lse}) \, p_k - a_k \bigr]

    in the notation of `cross_entropy_value_and_grad`.

    Parameters
    ----------
    logits, target, axis, reduction, weight, sample_weight
        As in `cross_entropy`.
    ignore_index, label_smoothing, z_loss, softcap, denominator, validate, engine
        As in `cross_entropy`.
    grad_output, out
        As in `cross_entropy_value_and_grad`.
    stats : RowStats, optional
        What `row_stats` returned for the same logits, target and options (which is not checked): the forward pass of an
        automatic differentiation saves its four arrays, and the backward pass need not reduce the rows again.

    Returns
    -------
    array
        In the shape, dtype, library and device of the logits.

    Raises
    ------
    TypeError, ValueError, IndexError
        As in `cross_entropy_value_and_grad`; also for `stats` that are no `RowStats` or of another shape.

    See Also
    --------
    cross_entropy_value_and_grad : when the loss is wanted too.

    Examples
    --------
    >>> import numpy as np
    >>> from xent_array import cross_entropy_grad, row_stats
    >>> A = np.array([[2, 1, 0.1], [0.1, 2, 1.9]])
    >>> saved = row_stats(A, np.array([1, 0]))
    >>> cross_entropy_grad(A, np.array([1, 0]), stats=saved).round(3)
    array([[ 0.33 , -0.379,  0.049],
           [-0.464,  0.243,  0.22 ]])
    """
    if logits.__class__ is not np.ndarray and stats is None and (in_graph := _bridges.in_graph()) is not None:
        return in_graph.cross_entropy_grad(
            logits, target, axis=axis, reduction=reduction, weight=weight, sample_weight=sample_weight,
            ignore_index=ignore_index, label_smoothing=label_smoothing, z_loss=z_loss, softcap=softcap,
            denominator=denominator, validate=validate, engine=engine,
            grad_output=grad_output, out=out,
        )  # fmt: skip
    call = None
    if logits.__class__ in _again.KINDS and (stats is None or stats.__class__ is RowStats):
        options = (axis, reduction, ignore_index, label_smoothing, z_loss, softcap, validate)
        given = [logits, target, weight, sample_weight, denominator, grad_output, *(stats or ())[:4], out]
        answer, call = _again.ask("grad", engine, options, given)
        if answer is not None:
            return answer[0]
    problem = problem_of(
        logits,
        target,
        axis=axis,
        reduction=reduction,
        weight=weight,
        sample_weight=sample_weight,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        softcap=softcap,
        denominator=denominator,
        validate=validate,
        engine=engine,
        grad_output=grad_output,
    )
    saved = None if stats is None else problem.stats(stats)
    into = Output(problem, out)
    chosen = problem.engine if call is None else call.noted(problem.engine)
    with problem.home.at_work():
        if saved is None:
            grad = _engines.grad_alone(chosen, problem.rows, into.view)
        else:
            grad = chosen.grad(problem.rows, saved, into.view)
        grad = into.result(grad)
    if call is not None:
        call.keep(grad)
    return grad


def row_stats(
    logits: Any,
    target: Values,
    *,
    axis: int = -1,
    weight: Values | None = None,
    sample_weight: Values | None = None,
    ignore_index: int | SupportsShape | None = IGNORE_INDEX,
    label_smoothing: Scalar = 0.0,
    z_loss: Scalar = 0.0,
    softcap: Scalar | None = None,
    validate: bool | None = None,
    engine: str | Engine | None = None,
) -> RowStats:
    r"""What one read of the logits tells of every row.

    .. math:: \mathrm{lse} = \log \sum_k e^{x_k}, \qquad \mathrm{loss} = \sum_k w_k q_k (\mathrm{lse} - x_k)

    Parameters
    ----------
    logits, target, axis, weight, sample_weight, ignore_index, label_smoothing, z_loss, softcap, validate, engine
        As in `cross_entropy`.

    Returns
    -------
    RowStats
        Arrays with one number per row, in the shape of `logits` without `axis`, in the dtype of the loss: ``lse``;
        ``loss``, without z-loss and sample weights (0 in an ignored row, NaN under a bad label); the
        parts they are made of; and ``correct``, whether the label is the class that ``argmax(logits)`` names (where
        the target is class indices). Hand it to `cross_entropy_grad`.

    Raises
    ------
    TypeError, ValueError, IndexError
        As in `cross_entropy`.

    See Also
    --------
    logsumexp : without a target.

    Examples
    --------
    >>> import numpy as np
    >>> from xent_array import row_stats
    >>> stats = row_stats(np.array([[2, 1, 0.1], [0.1, 2, 1.9]]), np.array([1, 0]))
    >>> stats.lse.round(3), stats.loss.round(3), stats.p_max.round(3)
    (array([2.417, 2.72 ]), array([1.417, 2.62 ]), array([0.659, 0.487]))

    Perplexity and accuracy:

    >>> print(f"{np.exp(stats.loss.mean()):.3f}, {stats.correct.mean():.0%}")
    7.527, 0%
    """
    call = None
    if logits.__class__ in _again.KINDS:
        options = (axis, ignore_index, label_smoothing, z_loss, softcap, validate)
        answer, call = _again.ask("stats", engine, options, [logits, target, weight, sample_weight, None])
        if answer is not None:
            return RowStats(*answer)
    problem = problem_of(
        logits,
        target,
        axis=axis,
        weight=weight,
        sample_weight=sample_weight,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        softcap=softcap,
        validate=validate,
        engine=engine,
        differentiates="everything",
    )
    chosen = problem.engine if call is None else call.noted(problem.engine)
    with problem.home.at_work():
        stats = problem.user_stats(problem.home.composed(partial(_engines.row_stats, chosen), problem))
    if call is not None:
        call.keep(*stats)
    return stats


class CrossEntropyLoss:
    r"""Cross-entropy as the textbook writes it: `forward`, then `backward`.

    .. math:: H(A, Y)_i = -\sum_c Y_{ic} \log \sigma(A)_{ic}, \qquad
              \partial\,\mathrm{mean}(H) / \partial A = (\sigma(A) - Y) / N

    Parameters
    ----------
    weight, axis, reduction, sample_weight, ignore_index, label_smoothing, z_loss, softcap
        As in `cross_entropy`.
    denominator, validate, engine
        As in `cross_entropy`.

    Notes
    -----
    The gradient comes from `backward`, not from automatic differentiation: to ask PyTorch for one of this loss is a
    RuntimeError. Under autograd use `cross_entropy`, or the module `xent_array.torch.CrossEntropyLoss`.

    `forward` keeps a reference to A and Y and a few numbers per row, never an N×C array of its own: do not change A
    between the two. An object is not thread-safe; use one per thread, or the functions.

    See Also
    --------
    cross_entropy_value_and_grad : both at once, for half the work.

    Examples
    --------
    >>> import numpy as np
    >>> from xent_array import CrossEntropyLoss
    >>> A = np.array([[2, 1, 0.1], [0.1, 2, 1.9]])
    >>> Y = np.array([[0, 1, 0], [1, 0, 0]])
    >>> sce = CrossEntropyLoss()
    >>> print(f"{sce.forward(A, Y):.3f}")
    2.019
    >>> sce.backward().round(3)
    array([[ 0.33 , -0.379,  0.049],
           [-0.464,  0.243,  0.22 ]])
    """

    def __init__(
        self,
        weight: Values | None = None,
        *,
        axis: int = -1,
        reduction: Reduction = "mean",
        sample_weight: Values | None = None,
        ignore_index: int | SupportsShape | None = IGNORE_INDEX,
        label_smoothing: Scalar = 0.0,
        z_loss: Scalar = 0.0,
        softcap: Scalar | None = None,
        denominator: Scalar | None = None,
        validate: bool | None = None,
        engine: str | Engine | None = None,
    ) -> None:
        check_options(reduction, ignore_index, label_smoothing, z_loss, softcap, validate)
        check_denominator(denominator, reduction)
        if engine is not None:
            _engines.named(engine)
        self._options: dict[str, Any] = {
            "weight": weight,
            "axis": axis,
            "reduction": reduction,
            "sample_weight": sample_weight,
            "ignore_index": ignore_index,
            "label_smoothing": label_smoothing,
            "z_loss": z_loss,
            "softcap": softcap,
            "denominator": denominator,
            "validate": validate,
            "engine": engine,
        }
        self._saved: tuple[Problem, RowStats] | None = None

    def __repr__(self) -> str:
        given = ", ".join(f"{name}={value!r}" for name, value in self._options.items() if value is not None)
        return f"{type(self).__name__}({given})"

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_saved": None}  # a copy starts before its first forward

    def forward(self, A: Values, Y: Values, *, sample_weight: Values | None = None) -> Any:
        """The loss of logits `A` under target `Y`, detached from any automatic differentiation; see `backward`.

        Parameters
        ----------
        A, Y
            `logits` and `target` as in `cross_entropy`.
        sample_weight
            Of this batch, in place of the object's own.
        """
        self._saved = None
        options = self._options if sample_weight is None else self._options | {"sample_weight": sample_weight}
        problem = problem_of(A, Y, **options)
        with problem.home.at_work():
            stats, loss = _engines.stats_and_loss(problem.engine, problem.rows)
            self._saved = problem, stats
            return _bridges.detached_loss(problem.loss(loss), A, problem.home.library)

    __call__ = forward

    def backward(self, grad_output: Values | float | None = None, out: Any = None) -> Any:
        """The gradient with respect to the `A` of the last `forward`.

        Parameters
        ----------
        grad_output, out
            As in `cross_entropy_value_and_grad`. After ``out=A`` the logits are gone: `forward` must come first again.

        Raises
        ------
        RuntimeError
            No `forward` came before.
        """
        if self._saved is None:
            raise RuntimeError("backward() needs the logits of a forward(): call forward(A, Y) first")
        problem, stats = self._saved
        with problem.home.at_work():
            if grad_output is not None:
                problem = problem.with_upstream(grad_output)
            into = Output(problem, out)
            grad = into.result(problem.engine.grad(problem.rows, stats, into.view))
        if into.in_place:
            self._saved = None
        return grad
