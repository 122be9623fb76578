"""The mathematics in Array-API functions only: readable, differentiable, portable, but with N×C temporaries."""

from __future__ import annotations

from typing import Any

from .. import _rows
from .._rows import DASK, Array, Rows, RowStats

name = "generic"


def declines(rows: Rows) -> str | None:
    return "leaves Dask arrays to the engine 'dask'" if rows.xp.__name__ == DASK else None


def reads_labels_free(rows: Rows) -> bool:
    """Whether the labels are in host memory: traced labels have no values, and reading a device means waiting."""
    if _rows.is_traced(rows.target):
        return False
    try:
        return int(rows.target.__dlpack_device__()[0]) == 1  # type: ignore[union-attr]  # kDLCPU
    except Exception:  # for an array that is not on one device, each library raises an error of its own
        return False


def stats(rows: Rows) -> RowStats:
    xp = rows.xp
    x, _ = _capped(rows)
    a = _target(rows)
    at = xp.argmax(x, axis=1, keepdims=True)
    first = _classes(rows) == at
    zero = xp.zeros_like(x)
    top = xp.sum(xp.where(first, x, zero), axis=1, keepdims=True)  # if several tie, differentiation must see only one
    below, half = _below(rows, x, top), _below(rows, x / 2, top / 2)  # only the half cannot overflow
    # 0·∞ counts as 0 and must not be computed; any other product has a derivative, even if it is 0. The first of the
    # largest logits is left out too: its two derivatives cancel, which would cost the derivative of the tail digits.
    nothing = first | ((a == 0) & ~xp.isfinite(half)) | ((half == 0) & ~xp.isfinite(a))
    product = xp.where(nothing, zero, a) * xp.where(nothing, zero, half)
    return RowStats(
        max=top[:, 0, :],
        rest=_sum(xp, xp.where(first, zero, xp.exp(below))),
        gap=0 - 2 * _sum(xp, product),  # 0 rather than -0
        mass=xp.ones_like(at[:, 0, :], dtype=rows.acc) if rows.target is None else _sum(xp, a),
    )


def grad(rows: Rows, stats: RowStats, out: Array | None = None) -> Array:
    xp = rows.xp
    x, slope = _capped(rows)
    a = _target(rows)
    top, rest, p_max, mass = (v[:, None, :] for v in (stats.max, stats.rest, stats.p_max, stats.mass))
    coef, kept = mass, mass - a  # kept is coef - a, without losing a small 2·z·lse
    if rows.z_loss:
        of_lse = rows.z_loss * stats.lse[:, None, :]
        coef, kept = mass + (of_lse + of_lse), kept + (of_lse + of_lse)
    p = xp.exp(_below(rows, x, top)) * p_max
    g = xp.where((p == 0) & (coef == coef), p, coef * p) - a  # an infinite coef must not meet p = 0
    # Where p > 1/2, 1 - p is computed from rest, which involves no cancellation.
    g = xp.where((x == top) & (rest < 1) & xp.isfinite(coef), kept - coef * (rest * p_max), g)
    if slope is not None:
        g = g * slope
    scale = _rows.row_scale(rows, *_rows.terms(rows))
    if isinstance(scale, float):
        g = g * scale if scale else xp.zeros_like(g)
    else:
        scale = scale[:, None, :] if scale.ndim else scale
        g = xp.where(scale == 0, xp.zeros_like(g), g * scale)
    g = xp.astype(g, rows.grad_dtype, copy=False)
    if out is None:
        return g
    out[...] = g
    return out


def loss(rows: Rows) -> Array:
    """The loss, written so that automatic differentiation yields the same gradient as `grad`.

    Written plainly, it would let NaN escape from a row that does not count, and lose the NaN of a row without a
    softmax.
    """
    xp = rows.xp
    factor, _ = _rows.terms(rows)
    if factor is not None:
        zero = xp.zeros_like(rows.logits)
        rows = rows._replace(logits=xp.where(factor[:, None, :] == 0, zero, rows.logits))
    x, _ = _capped(rows)
    top = xp.max(x, axis=1, keepdims=True)
    poison = xp.astype(_rows.nan_unless(xp, xp.isfinite(top), xp.ones_like(top)), rows.logits.dtype, copy=False)
    return _rows.finish(rows, stats(rows._replace(logits=rows.logits * poison)))


def _capped(rows: Rows) -> tuple[Array, Array | None]:
    """The logits in the dtype of the arithmetic, after softcap; and the derivative of softcap at them."""
    xp = rows.xp
    x = xp.astype(rows.logits, rows.acc, copy=False)
    if rows.softcap is None:
        return x, None
    quotient = x / rows.softcap
    e = xp.exp(-2 * xp.abs(quotient))
    return rows.softcap * xp.tanh(quotient), 4 * e / ((1 + e) * (1 + e))  # sech², where 1 - tanh² would cancel


def _target(rows: Rows) -> Array:
    """The weighted target after smoothing, a = w·q; 0 in a row whose label is not a class."""
    xp = rows.xp
    if rows.target is None:
        return xp.zeros_like(rows.logits, dtype=rows.acc)
    if rows.has_labels:
        index, valid, _, here = _rows.labels(rows)
        is_label = _classes(rows) == index[:, None, :]
        q = xp.astype(is_label if here is None else is_label & here[:, None, :], rows.acc)
    else:
        q, valid = xp.astype(rows.target, rows.acc, copy=False), None
    if rows.label_smoothing:
        q = (1 - rows.label_smoothing) * q + rows.label_smoothing / rows.all_classes
    # A weight of inf or NaN counts only where target mass meets its class.
    if rows.class_weight is None:
        a = q
    else:
        weight = rows.class_weight[None, :, None]
        a = q * xp.where((q == 0) & ~xp.isfinite(weight), xp.zeros_like(q), weight)
    return a if valid is None else xp.where(valid[:, None, :], a, xp.zeros_like(a))


def _sum(xp: Any, values: Array) -> Array:
    """The sum over the classes, in halves where NumPy would add one by one because the classes are not contiguous."""
    while values.shape[2] > 1 and values.shape[1] > 16:
        half = values.shape[1] // 2
        folded = values[:, :half, :] + values[:, half : 2 * half, :]
        values = xp.concat([folded, values[:, 2 * half :, :]], axis=1) if values.shape[1] % 2 else folded
    return xp.sum(values, axis=1)


def _classes(rows: Rows) -> Array:
    """0 … C-1 along the class axis."""
    return rows.xp.arange(rows.classes, device=_rows.device(rows.logits))[None, :, None]


def _below(rows: Rows, x: Array, top: Array) -> Array:
    """The logits minus the maximum, if that is finite; otherwise the row ends as NaN in any case."""
    xp = rows.xp
    return x - xp.where(xp.isfinite(top), top, xp.zeros_like(top))
