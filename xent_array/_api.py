"""The public functions: what they mean, and in which order the work is done."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, Unpack, overload

import numpy as np

from . import _again, _bridges, _engines
from ._engines import Engine
from ._problem import (
    OPTIONS,
    Output,
    Problem,
    check_denominator,
    check_options,
    problem_of,
    problem_without_target,
)
from ._rows import IGNORE_INDEX, Array, Asked, RowStats, merged, namespace, quiet
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
    x : array_like
        Logits of dtype float16, bfloat16, float32 or float64, with at least one dimension. A nested list is converted
        as NumPy would convert it.
    axis : int, default -1
        The axis of the classes.

    Returns
    -------
    array
        Probabilities, with the shape, dtype, library and device of `x`. A row that is all -inf, or that contains +inf
        or NaN, is NaN.

    Raises
    ------
    TypeError
        If `x` is not an array, or has another dtype.
    ValueError
        If `axis` is out of range or has length 0.

    See Also
    --------
    log_softmax : The logarithm of the softmax, which does not underflow.

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

    The last term is computed with ``log1p``, so that a small log-probability in a confident row is kept;
    ``log(sum(exp(x)))`` would round it to 0.

    Parameters
    ----------
    x : array_like
        Logits of dtype float16, bfloat16, float32 or float64, with at least one dimension. A nested list is converted
        as NumPy would convert it.
    axis : int, default -1
        The axis of the classes.

    Returns
    -------
    array
        Log-probabilities, with the shape, dtype, library and device of `x`. A logit of -inf gives -inf. A row that is
        all -inf, or that contains +inf or NaN, is NaN.

    Raises
    ------
    TypeError
        If `x` is not an array, or has another dtype.
    ValueError
        If `axis` is out of range or has length 0.

    See Also
    --------
    cross_entropy : The loss, which does not need this N×C array.

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
        answer, call = _again.ask("log_softmax" if log else "softmax", Asked(axis), [x])
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
    x : array_like
        Logits of dtype float16, bfloat16, float32 or float64, with at least one dimension. A nested list is converted
        as NumPy would convert it.
    axis : int, default -1
        The axis of the classes.
    keepdims : bool, default False
        Whether the result keeps `axis`, with length 1.

    Returns
    -------
    array
        One number per row, in the shape of `x` without `axis`. The dtype is float32 for 16-bit `x` and that of `x`
        otherwise. As in SciPy, a row that contains +inf gives inf, and a row that is all -inf gives -inf.

    Raises
    ------
    TypeError
        If `x` is not an array, or has another dtype.
    ValueError
        If `axis` is out of range or has length 0.

    See Also
    --------
    row_stats : The same number together with the loss, from one read of the logits.

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
    logits : array_like
        Unnormalized scores of dtype float16, bfloat16, float32 or float64, with at least one dimension and any
        strides. The classes lie along `axis`, and each index into the other axes is a row. The shape of the rows, here
        and below, is the shape of `logits` without `axis`.
    target : array_like
        Either class indices, of any integer dtype, in the shape of the rows; or one distribution per row, of a float,
        integer or boolean dtype, in the shape of `logits` (soft labels, one-hot). A distribution is used as given, even
        if it does not sum to 1.
    axis : int, default -1
        The axis of the classes. The default is the last axis, unlike in PyTorch. For images of shape (N, C, H, W) pass
        1; this makes no copy.
    reduction : {"mean", "sum", "none"}, default "mean"
        "none" returns one loss per row. "mean" divides the sum by the number of rows that are not ignored, where each
        row counts `sample_weight` times and, with class indices only, is multiplied by the `weight` of its label. With
        distributions and `weight`, the mean divides by the number of rows, as in PyTorch; the two kinds of target
        therefore give different results.
    weight : array_like or None, default None
        A weight for each class, of shape (C,). A negative weight is used as given. The weight of a class that no label,
        target mass or smoothing meets is never used, not even if it is inf or NaN. By default every class has weight 1.
    sample_weight : array_like or None, default None
        A weight for each row, in the shape of the rows: a row of weight s counts s times. A row of weight 0 has no
        effect, whatever it contains. Booleans are a mask of the rows that count. A negative weight is used as given.
        By default every row has weight 1.
    ignore_index : int or None, default -100
        Rows with this label have loss 0 and gradient 0 and are left out of the mean, whatever they contain. None
        ignores no label. For class indices only.
    label_smoothing : float, default 0.0
        The number e, from 0 to 1, in q = (1 - e)·target + e/C [1]_. Here and for the other options that are numbers, a
        0-d array may be passed too. Except for `denominator`, its value is read at once, which waits for the device it
        is on.
    z_loss : float, default 0.0
        The number z, at least 0, in the formula above [2]_ [3]_, which pulls lse(x) towards 0. Sample weights multiply
        this term; class weights never do.
    softcap : float or None, default None
        If given, a number above 0: the logits are first replaced by ``softcap * tanh(logits / softcap)`` [4]_.
    denominator : float, array or None, default None
        What the mean divides by instead of its own count, for example the number of tokens in all micro-batches or in
        all processes. An array must be 0-d and on the device of `logits`; on a GPU, its value stays there. Only for
        ``reduction="mean"``.
    validate : bool or None, default None
        True checks every label, even if that has to wait for a GPU; False checks none. By default labels are checked
        where this involves no waiting, that is in host memory. Labels that are traced (``jax.jit``) have no values to
        check; those of Dask are checked when they are computed. If a bad label is not checked, its row is NaN.
    engine : str, Engine or None, default None
        The engine to use, by name ("cpu", "numpy", "cuda", "dask", "generic"; ``python -m xent_array`` lists them) or
        as an object. By default the first engine that accepts the arrays.

    Returns
    -------
    scalar or array
        The reduced loss, a scalar of the kind that the library's ``sum`` returns; or with ``reduction="none"`` one loss
        per row, in the shape of the rows. The dtype is float32 for 16-bit logits and that of the logits otherwise. The
        mean over no rows is NaN, as in PyTorch.

    Raises
    ------
    TypeError
        If arrays are from different libraries (NumPy arrays may be combined with JAX logits) or on different devices,
        if a dtype is not one of those listed above, or if an array is masked.
    ValueError
        If a shape, axis or option is out of range, or if the arithmetic cannot represent a finite weight, such as 1e39
        in float32. (Weights in the memory of a GPU are not checked; they become inf.)
    IndexError
        If a label is not a class and labels are checked. The message names the first such label.

    See Also
    --------
    cross_entropy_value_and_grad : The loss and its gradient, from one read of the logits.
    row_stats : The quantities that the loss is computed from.

    Notes
    -----
    A logit of -inf has probability 0, and 0·(-inf) counts as 0 for any kind of target; target mass on a logit of -inf
    gives a loss of +inf. If a row is all -inf, or contains +inf or NaN, the loss of that row, and of no other, is NaN.

    Row losses are summed in float64 if the library has it. With the engines "cpu" and "numpy", which handle NumPy,
    PyTorch and JAX arrays in host memory, the loss of a row is bitwise identical whether the row is computed alone or
    in any batch, and with any number of threads.

    In PyTorch's autograd graph the loss is a single node. If the logits require a gradient, the forward pass also
    computes it, from the same read of the logits; for float16 logits, and on a GPU, the backward pass computes it.
    Derivatives with respect to other arguments, and second derivatives, use a plain composition of array operations.
    JAX always differentiates that composition; the only array of the size of the logits that it keeps is the logits.

    With Dask arrays a call computes nothing, and the result is a Dask array. What depends on the values, such as an
    `IndexError` for a bad label, is then found when it is computed.

    References
    ----------
    .. [1] C. Szegedy et al., "Rethinking the Inception Architecture for Computer Vision", section 7, 2016,
           arXiv:1512.00567.
    .. [2] A. de Brébisson and P. Vincent, "The Z-loss: a shift and scale invariant classification loss belonging to the
           Spherical Family", 2016, arXiv:1604.08859.
    .. [3] A. Chowdhery et al., "PaLM: Scaling Language Modeling with Pathways", section 5, 2022, arXiv:2204.02311. The
           z-loss here has the form given there.
    .. [4] Gemma Team, "Gemma 2: Improving Open Language Models at a Practical Size", section 2, 2024, arXiv:2408.00118.

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
    options = (
        axis, reduction, weight, sample_weight, ignore_index, label_smoothing, z_loss, softcap, denominator, validate,
        engine, None,
    )  # fmt: skip
    if logits.__class__ is not np.ndarray and (in_graph := _bridges.in_graph()) is not None:
        return in_graph.cross_entropy(logits, target, Asked(*options))
    if (at_once := _engines.at_once(logits, target, options, False)) is not None:
        return at_once[0]
    asked = Asked(*options)
    call = None
    if logits.__class__ in _again.KINDS:
        answer, call = _again.ask("loss", asked, [logits, target])
        if answer is not None:
            return answer[0]
    problem = problem_of(logits, target, asked, differentiates="loss")
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

    With :math:`p` the softmax of a row, :math:`a_k = w_k q_k`, and ``scale`` the product of everything that multiplies
    the row (upstream gradient, sample weight, 1/denominator), the gradient is

    .. math:: \mathrm{scale} \, \bigl[ (\textstyle\sum_j a_j + 2 z \, \mathrm{lse}) \, p_k - a_k \bigr]

    and under softcap this is multiplied by :math:`1 - \tanh^2`. For the mean over plain labels the gradient is
    :math:`(\sigma(A) - Y) / N`.

    Parameters
    ----------
    logits : array_like
        Unnormalized scores, with the classes along `axis`.
    target : array_like
        Class indices in the shape of the rows, or distributions in the shape of `logits`.
    axis : int, default -1
        The axis of the classes.
    reduction : {"mean", "sum", "none"}, default "mean"
        How the losses of the rows are combined. With "none", the gradient is that
        of the sum of the rows.
    weight : array_like or None, default None
        A weight for each class, of shape (C,).
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
        The engine to use; by default the first that accepts the arrays.
    grad_output : float, array_like or None, default None
        The upstream gradient: a number, or with ``reduction="none"`` also an array in the shape of the rows. By default
        1. It multiplies the gradient, not the loss, before the gradient is rounded to the dtype of the logits. Loss
        scaling for 16-bit training can therefore be done here, at no extra cost.
    out : array or None, default None
        The array to write the gradient to, with the shape and dtype of the logits and any strides; the same object is
        returned. ``out=logits`` overwrites the logits and needs no second N×C array. By default a new array is made.
    return_stats : bool, default False
        Whether to return what `row_stats` returns as well, from the same read.

    Returns
    -------
    loss : scalar or array
        As returned by `cross_entropy`.
    grad : array
        The gradient, with the shape, dtype, library and device of the logits. It is exactly 0 in a row that does not
        count. For PyTorch tensors both the loss and the gradient are detached.
    stats : RowStats
        Only with ``return_stats=True``. Its ``correct`` says which labels were predicted.

    Raises
    ------
    TypeError, ValueError, IndexError
        As in `cross_entropy`. Also a TypeError if `out` is from another library, has another dtype, or cannot be
        written to at all (JAX, Dask); and a ValueError if `out` is read-only, has another shape, or shares part of its
        memory with an input.

    See Also
    --------
    cross_entropy : The loss alone, where all options are described in full.
    cross_entropy_grad : The gradient alone, optionally from saved `row_stats`.

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

    With the predictions that the accuracy is computed from:

    >>> _, _, stats = cross_entropy_value_and_grad(A, np.array([0, 1]), return_stats=True)
    >>> stats.correct
    array([ True,  True])

    In place:

    >>> loss, grad = cross_entropy_value_and_grad(A, np.array([1, 0]), out=A)
    >>> grad is A
    True
    """
    options = (
        axis, reduction, weight, sample_weight, ignore_index, label_smoothing, z_loss, softcap, denominator, validate,
        engine, grad_output,
    )  # fmt: skip
    if logits.__class__ is not np.ndarray and not return_stats and (in_graph := _bridges.in_graph()) is not None:
        return in_graph.cross_entropy_value_and_grad(logits, target, Asked(*options), out)  # type: ignore[no-any-return]
    if not return_stats and (at_once := _engines.at_once(logits, target, options, True, out)) is not None:
        return at_once
    asked = Asked(*options)
    call = None
    if logits.__class__ in _again.KINDS:
        question = "loss, grad and stats" if return_stats else "loss and grad"
        answer, call = _again.ask(question, asked, [logits, target], out=out)
        if answer is not None:
            return (*answer[:2], RowStats(*answer[2:])) if return_stats else answer
    wants = "row_stats" if return_stats else "stats"
    problem = problem_of(logits, target, asked, wants=wants)
    into = Output(problem, out, wants)
    chosen = problem.engine if call is None else call.noted(problem.engine)
    results: Any
    with problem.home.at_work():
        if return_stats:
            loss, grad, stats = _engines.loss_grad_and_stats(chosen, problem.rows, into.view)
            results = problem.loss(loss), into.result(grad), problem.user_stats(stats)
        else:
            loss, grad = _engines.loss_and_grad(chosen, problem.rows, into.view)
            results = problem.loss(loss), into.result(grad)
    if call is not None:
        call.keep(*results[:2], *(results[2] if return_stats else ()))
    return results  # type: ignore[no-any-return]


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
    logits : array_like
        Unnormalized scores, with the classes along `axis`.
    target : array_like
        Class indices in the shape of the rows, or distributions in the shape of `logits`.
    axis : int, default -1
        The axis of the classes.
    reduction : {"mean", "sum", "none"}, default "mean"
        How the losses of the rows are combined. With "none", the gradient is that
        of the sum of the rows.
    weight : array_like or None, default None
        A weight for each class, of shape (C,).
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
        The engine to use; by default the first that accepts the arrays.
    grad_output : float, array_like or None, default None
        The upstream gradient: a number, or with ``reduction="none"`` also an array in the shape of the rows. By default
        1.
    stats : RowStats or None, default None
        What `row_stats` returned for the same logits, target and options; that they are the same is not checked. An
        automatic differentiation can save the first four arrays in its forward pass, and its backward pass need not
        reduce the rows again.
    out : array or None, default None
        The array to write the gradient to; ``out=logits`` overwrites the logits. By default a new array is made.

    Returns
    -------
    array
        The gradient, with the shape, dtype, library and device of the logits.

    Raises
    ------
    TypeError, ValueError, IndexError
        As in `cross_entropy_value_and_grad`. Also if `stats` is not a `RowStats`, or has another shape.

    See Also
    --------
    cross_entropy : The loss, where all options are described in full.
    cross_entropy_value_and_grad : The loss and the gradient together.

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
    asked = Asked(
        axis, reduction, weight, sample_weight, ignore_index, label_smoothing, z_loss, softcap, denominator, validate,
        engine, grad_output,
    )  # fmt: skip
    if logits.__class__ is not np.ndarray and stats is None and (in_graph := _bridges.in_graph()) is not None:
        return in_graph.cross_entropy_grad(logits, target, asked, out)
    call = None
    if logits.__class__ in _again.KINDS and (stats is None or stats.__class__ is RowStats):
        answer, call = _again.ask("grad", asked, [logits, target, *(stats or ())[:4]], out=out)
        if answer is not None:
            return answer[0]
    wants = "stats" if stats is None else "grad"
    problem = problem_of(logits, target, asked, wants=wants)
    saved = None if stats is None else problem.stats(stats)
    into = Output(problem, out, wants)
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
    r"""Per-row statistics from one read of the logits: the logsumexp, the loss, and what they are computed from.

    .. math:: \mathrm{lse} = \log \sum_k e^{x_k}, \qquad \mathrm{loss} = \sum_k w_k q_k (\mathrm{lse} - x_k)

    Parameters
    ----------
    logits : array_like
        Unnormalized scores, with the classes along `axis`.
    target : array_like
        Class indices in the shape of the rows, or distributions in the shape of `logits`.
    axis : int, default -1
        The axis of the classes.
    weight : array_like or None, default None
        A weight for each class, of shape (C,).
    sample_weight : array_like or None, default None
        A weight for each row, or a mask of the rows that count, in the shape of the rows.
    ignore_index : int or None, default -100
        The label of rows that do not count.
    label_smoothing : float, default 0.0
        The share of the target, from 0 to 1, that is spread evenly over all classes.
    z_loss : float, default 0.0
        The factor of lse² in the loss of a row, at least 0. Checked, but not part of ``stats.loss``.
    softcap : float or None, default None
        The bound, above 0, to which the logits are capped first.
    validate : bool or None, default None
        Whether labels are checked; by default where this involves no waiting.
    engine : str, Engine or None, default None
        The engine to use; by default the first that accepts the arrays.

    Returns
    -------
    RowStats
        Arrays with one number per row, in the shape of the rows and the dtype of the loss. ``lse`` is the logsumexp.
        ``loss`` is the loss before z-loss and sample weights; it is 0 in an ignored row whose ``lse`` is finite, and
        NaN under a bad label. For class indices, ``correct`` says whether the label is the class that
        ``argmax(logits)`` names. `cross_entropy_grad` accepts the whole object.

    Raises
    ------
    TypeError, ValueError, IndexError
        As in `cross_entropy`.

    See Also
    --------
    cross_entropy : The loss, where all options are described in full.
    logsumexp : The logsumexp alone, which needs no target.
    RowStats : The result, with every array described.

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
    asked = Asked(
        axis, "none", weight, sample_weight, ignore_index, label_smoothing, z_loss, softcap, None, validate, engine
    )
    call = None
    if logits.__class__ in _again.KINDS:
        answer, call = _again.ask("stats", asked, [logits, target])
        if answer is not None:
            return RowStats(*answer)
    problem = problem_of(logits, target, asked, differentiates="everything", wants="row_stats")
    chosen = problem.engine if call is None else call.noted(problem.engine)
    with problem.home.at_work():
        stats = problem.user_stats(problem.home.composed(partial(_engines.row_stats, chosen), problem))
    if call is not None:
        call.keep(*stats)
    return stats


def merge_stats(*stats: RowStats) -> RowStats:
    r"""The statistics of whole rows, from those of parts of their classes.

    .. math:: m = \max_i m_i, \qquad 1 + \mathrm{rest} = \sum_i (1 + \mathrm{rest}_i) \, e^{m_i - m}, \qquad
              \mathrm{gap} = \sum_i \mathrm{gap}_i + \mathrm{mass}_i (m - m_i)

    Every class must belong to exactly one part: for example, to a slice of the class axis that is on another machine,
    or that is read from a file when its turn comes. The parts of a row exchange four numbers, however many classes they
    have.

    Parameters
    ----------
    *stats : RowStats
        At least one, in the order of the classes. All have one number for each of the same rows, in one dtype. In each,
        the mass is that part of the target which belongs to its own classes: see the example.

    Returns
    -------
    RowStats
        As `row_stats` would return it for whole rows. ``correct`` is None where it is None in the parts.

    Raises
    ------
    TypeError
        If an argument is no `RowStats`, if their arrays differ in library or dtype, or if ``correct`` is None in some
        of them only.
    ValueError
        If there is no argument, or if the shapes of the rows differ.

    See Also
    --------
    row_stats : The statistics of one part.
    cross_entropy_grad : Accepts the merged statistics.

    Notes
    -----
    Parts are merged as in [1]_, pairwise and neighbours first, so that a number passes through as few merges as
    possible: log2 of the number of parts. ``lse`` and ``loss`` are then within the 4 units of rounding that hold for
    whole rows. To merge one part after another instead may cost one more unit for every few parts.

    Among several classes with the largest logit, ``correct`` means the first, so the order of the parts matters to it,
    and to nothing else but rounding. With softcap, the largest logits of two parts may become equal.

    Label smoothing would spread over the classes of each part: pass the smoothed target as distributions instead.

    References
    ----------
    .. [1] M. Milakov and N. Gimelshein, "Online normalizer calculation for softmax", arXiv:1805.02867, 2018.

    Examples
    --------
    A label that belongs to another part has no mass here, as if it were ignored:

    >>> import numpy as np
    >>> from xent_array import merge_stats, row_stats
    >>> logits, labels = np.array([[2, 1, 0.1, 3], [0.1, 2, 1.9, 0]]), np.array([3, 1])
    >>> def part(start, stop):
    ...     inside = (labels >= start) & (labels < stop)
    ...     return row_stats(logits[:, start:stop], np.where(inside, labels - start, -100))
    >>> stats = merge_stats(part(0, 2), part(2, 4))
    >>> stats.loss.round(3), stats.correct
    (array([0.444, 0.784]), array([ True,  True]))
    >>> row_stats(logits, labels).loss.round(3)
    array([0.444, 0.784])
    """
    _check_parts(stats)
    with quiet(namespace(stats[0].max)):
        return merged(stats)


def _check_parts(parts: tuple[RowStats, ...]) -> None:
    if not parts:
        raise ValueError("merge_stats needs at least one RowStats; got none")
    for number, part in enumerate(parts):
        if not isinstance(part, RowStats):
            raise TypeError(f"argument {number} of merge_stats must be a RowStats; got {type(part).__name__}")
    first = parts[0]
    for number, part in enumerate(parts[1:], start=1):
        if namespace(part.max) is not namespace(first.max):
            libraries = " and ".join(namespace(each.max).__name__ for each in (first, part))
            raise TypeError(f"all stats must be of one library; got arrays of {libraries} (arguments 0 and {number})")
        if part.max.dtype != first.max.dtype:
            dtypes = f"{first.max.dtype} and {part.max.dtype}"
            raise TypeError(f"all stats must have one dtype; got {dtypes} (arguments 0 and {number})")
        if tuple(part.max.shape) != tuple(first.max.shape):
            shapes = f"{tuple(first.max.shape)} and {tuple(part.max.shape)}"
            raise ValueError(f"all stats must be of the same rows; got the shapes {shapes} (arguments 0 and {number})")
        if (part.correct is None) is not (first.correct is None):
            raise TypeError(
                f"the stats of some parts have correct=None and those of others do not (arguments 0 and {number}):"
                " the target must be labels in all parts, or distributions in all"
            )


class CrossEntropyLoss:
    r"""Cross-entropy as an object with two steps: `forward`, then `backward`.

    .. math:: H(A, Y)_i = -\sum_c Y_{ic} \log \sigma(A)_{ic}, \qquad
              \partial\,\mathrm{mean}(H) / \partial A = (\sigma(A) - Y) / N

    Parameters
    ----------
    weight : array_like or None, default None
        A weight for each class, of shape (C,).
    axis : int, default -1
        The axis of the classes.
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
        The engine to use; by default the first that accepts the arrays.

    Raises
    ------
    TypeError, ValueError
        If an option has the wrong type or is out of range.

    See Also
    --------
    cross_entropy : The function, where all options are described in full.
    cross_entropy_value_and_grad : The loss and the gradient together, for half the work.
    xent_array.torch.CrossEntropyLoss : A PyTorch module, for use with autograd.

    Notes
    -----
    The gradient comes from `backward`, not from automatic differentiation: asking PyTorch's autograd for a gradient of
    this loss raises a RuntimeError. With autograd, use `cross_entropy` or the module
    `xent_array.torch.CrossEntropyLoss`.

    `forward` keeps references to A and Y and a few numbers per row, but no N×C array of its own, so A must not change
    before `backward`. An object is not thread-safe: use one per thread, or use the functions.

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
        self._asked = Asked(
            axis, reduction, weight, sample_weight, ignore_index, label_smoothing, z_loss, softcap, denominator,
            validate, engine,
        )  # fmt: skip
        check_options(*(getattr(self._asked, name) for name in OPTIONS))
        check_denominator(denominator, reduction)
        if engine is not None:
            _engines.named(engine)
        self._saved: tuple[Problem, RowStats] | None = None

    def __repr__(self) -> str:
        given = ", ".join(f"{name}={value!r}" for name, value in self._asked._asdict().items() if value is not None)
        return f"{type(self).__name__}({given})"

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_saved": None}  # a copy starts before its first forward

    def forward(self, A: Values, Y: Values, *, sample_weight: Values | None = None) -> Any:
        """The loss of logits `A` under target `Y`, detached from any automatic differentiation.

        Calling the object does the same.

        Parameters
        ----------
        A : array_like
            Unnormalized scores, the `logits` of `cross_entropy`.
        Y : array_like
            Class indices or distributions, the `target` of `cross_entropy`.
        sample_weight : array_like or None, default None
            A weight for each row of this batch, used instead of the object's own. By default the object's own is used.

        Returns
        -------
        scalar or array
            As returned by `cross_entropy`.

        Raises
        ------
        TypeError, ValueError, IndexError
            As in `cross_entropy`.

        See Also
        --------
        CrossEntropyLoss.backward : The gradient of this loss.

        Examples
        --------
        >>> import numpy as np
        >>> from xent_array import CrossEntropyLoss
        >>> A = np.array([[2, 1, 0.1], [0.1, 2, 1.9]])
        >>> sce = CrossEntropyLoss(reduction="sum")
        >>> print(f"{sce.forward(A, np.array([1, 0])):.3f}")
        4.037
        >>> print(f"{sce.forward(A, np.array([1, 0]), sample_weight=np.array([1, 0.5])):.3f}")
        2.727
        """
        self._saved = None
        asked = self._asked if sample_weight is None else self._asked._replace(sample_weight=sample_weight)
        problem = problem_of(A, Y, asked)
        with problem.home.at_work():
            stats, loss = _engines.stats_and_loss(problem.engine, problem.rows)
            self._saved = problem, stats
            return _bridges.detached_loss(problem.loss(loss), A, problem.home.library)

    __call__ = forward

    def backward(self, grad_output: Values | float | None = None, out: Any = None) -> Any:
        """The gradient of the last `forward`'s loss with respect to its `A`.

        Parameters
        ----------
        grad_output : float, array_like or None, default None
            The upstream gradient: a number, or with ``reduction="none"`` also an array in the shape of the rows. By
            default 1.
        out : array or None, default None
            The array to write the gradient to, with the shape and dtype of `A` and any strides. ``out=A`` overwrites
            the logits; another `backward` then needs another `forward` first. By default a new array is made.

        Returns
        -------
        array
            The gradient, with the shape, dtype, library and device of `A`.

        Raises
        ------
        RuntimeError
            If there was no `forward` before, or if the logits of the last one have been overwritten by ``out=A``.
        TypeError, ValueError
            If `grad_output` or `out` does not fit, as in `cross_entropy_value_and_grad`.

        See Also
        --------
        CrossEntropyLoss.forward : The loss, which must be computed first.

        Examples
        --------
        >>> import numpy as np
        >>> from xent_array import CrossEntropyLoss
        >>> A = np.array([[2, 1, 0.1], [0.1, 2, 1.9]])
        >>> sce = CrossEntropyLoss()
        >>> loss = sce.forward(A, np.array([1, 0]))
        >>> sce.backward(grad_output=10).round(2)
        array([[ 3.3 , -3.79,  0.49],
               [-4.64,  2.43,  2.2 ]])
        """
        if self._saved is None:
            raise RuntimeError("backward() needs the logits of a forward(): call forward(A, Y) first")
        problem, stats = self._saved
        with problem.home.at_work():
            if grad_output is not None:
                problem = problem.with_upstream(grad_output)
            into = Output(problem, out, wants="grad")
            grad = into.result(problem.engine.grad(problem.rows, stats, into.view))
        if into.in_place:
            self._saved = None
        return grad
