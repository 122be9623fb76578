"""Assertions against the oracle: element by element, in units that follow from the arithmetic.

Most gradient entries have size 1/C and one per row has size 1, so a single tolerance would see only the latter.
"""

import numpy as np

from .oracle import EPS, NORMAL, SUBNORMAL

BAR = 4  # honest code stays under 1.6 units


def assert_loss(actual, truth):
    """`actual` is the loss of the oracle's reduction, to 4 units, in its dtype and shape."""
    _assert_close("loss", actual, truth.loss, truth.unit_loss, BAR, truth.loss_dtype)


def assert_grad(actual, truth):
    """`actual` is the gradient, each entry to 4 units of its own, in its dtype and shape."""
    _assert_close("grad", actual, truth.grad, truth.unit_grad, BAR, truth.grad_dtype)


def assert_confident(loss, grad, truth, *, exact):
    """Loss and gradient to 8 eps *relative*: for labels on a class that takes nearly all.

    exact: the differences of the logits to their maximum are, in the accumulation type (and exp is a good one);
    otherwise a margin of d over the runner-up allows another d eps.
    """
    acc, out = truth.loss_dtype, truth.grad_dtype
    bar = 8.0 if exact else 8.0 + truth.margin
    bar_loss = bar if truth.loss.shape == truth.margin.shape else np.max(bar)
    bar_grad = bar if exact else np.expand_dims(bar, truth.axis)
    unit_loss = EPS[acc] * abs(truth.loss) + NORMAL[acc]
    unit_grad = EPS[acc] * abs(truth.grad) + NORMAL[acc]
    if out != acc:  # rounded once more, which counts once and not `bar` times
        unit_grad += (EPS[out] * abs(truth.grad) + SUBNORMAL[out]) / bar_grad
    _assert_close("loss", loss, truth.loss, unit_loss, bar_loss, acc)
    _assert_close("grad", grad, truth.grad, unit_grad, bar_grad, out)


def _assert_close(what, actual, wanted, unit, bar, dtype):
    actual, wanted = np.asarray(actual), np.asarray(wanted)
    assert (actual.dtype.name, actual.dtype.isnative) == (dtype, True), f"{what} is {actual.dtype!r}, wanted {dtype}"
    assert actual.shape == wanted.shape, f"{what} has shape {actual.shape}, wanted {wanted.shape}"
    got, units = actual.astype(np.float64).astype(wanted.dtype), units_off(actual, wanted, unit)
    far = units > bar
    if far.any():
        worst = np.unravel_index(np.argmax(units / bar), units.shape)
        index = tuple(int(i) for i in worst)
        raise AssertionError(
            f"{what}: {far.sum()} of {far.size} elements are off by more than the bar; worst at {index}: "
            f"got {got[worst]:.9g}, wanted {wanted[worst]:.9g}, {units[worst]:.3g} units "
            f"of {np.broadcast_to(unit, units.shape)[worst]:.3g} against a bar of "
            f"{np.broadcast_to(bar, units.shape)[worst]:.3g}"
        )


def units_off(actual, wanted, unit):
    """By how many units each number is off; inf where one is finite and the other is not, or NaN, or another inf."""
    got = actual.astype(np.float64).astype(wanted.dtype)
    with np.errstate(all="ignore"):
        wanted_stored = wanted.astype(np.float64).astype(actual.dtype).astype(np.float64)
        wanted = np.where(np.isfinite(wanted_stored), wanted, wanted_stored)  # beyond the dtype's range: inf
        same = (got == wanted) | (np.isnan(got) & np.isnan(wanted))
        units = np.where(same, 0, abs(got - wanted) / unit)
    units[~np.isfinite(units)] = np.inf  # NaN or inf against a number; not exact where the unit is 0
    return units
