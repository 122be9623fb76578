"""The truth: softmax cross-entropy and its units of error, from the formulas alone.

Written apart from the package and in the plainest way: it builds every array in full, in float64 (long double for
float64 logits, so that it is no less right than what it judges), and takes all inputs at the values they store.

What is beyond the range of the arithmetic is infinite, and IEEE says what becomes of it; but 0·∞ counts 0 in
a·(max - x), and in (mass + 2z·lse)·p where p is the 0. These are the numbers that the arithmetic holds: the target a;
its mass; 2z·lse and mass + 2z·lse; a row's loss before and after its sample weight; upstream/denominator, and that
times the sample weight; and, in float64, what the mean divides by and the sum of the losses. What lies between has no
range: max - x may be twice the largest number.
"""

from dataclasses import dataclass

import numpy as np

# Plain numbers, because np.finfo does not know bfloat16: the step after 1, the smallest normal and subnormal.
EPS = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 2.0**-23, "float64": 2.0**-52}
NORMAL = {"float32": 2.0**-126, "float64": 2.0**-1022}
SUBNORMAL = {"float16": 2.0**-24, "bfloat16": 2.0**-133, "float32": 2.0**-149, "float64": 2.0**-1074}


@dataclass(frozen=True, slots=True)
class Truth:
    """What must come out, and the unit in which an error of each number is counted (0: exactly this number).

    rows is what reduction="none" reports, lse the logsumexp of each row (after softcap), margin its maximum minus
    the runner-up (0 where there is none). The unit of `rows` is `unit_rows`, and so on.
    """

    loss: np.ndarray
    grad: np.ndarray
    rows: np.ndarray
    lse: np.ndarray
    margin: np.ndarray
    unit_loss: np.ndarray
    unit_grad: np.ndarray
    unit_rows: np.ndarray
    axis: int
    loss_dtype: str
    grad_dtype: str


def exact(labels):
    """Labels as Python's integers. NumPy 2.1 crashes where integers that are strided, or in the other byte order, are
    compared with one that their dtype does not hold.
    """
    return labels.astype(object)


def oracle(
    logits,
    target,
    *,
    axis=-1,
    reduction="mean",
    weight=None,
    sample_weight=None,
    ignore_index=-100,
    label_smoothing=0.0,
    z_loss=0.0,
    softcap=None,
    grad_output=None,
):
    """Loss and gradient as the package must report them. A bad label makes its row NaN (validate=False).

    The gradient of reduction="none" is that of the sum of the rows; grad_output multiplies the gradient only.
    """
    logits, target = np.asarray(logits), np.asarray(target)
    grad_dtype = logits.dtype.name
    acc = "float64" if grad_dtype == "float64" else "float32"  # accumulates, and reports the loss
    wide = np.longdouble if acc == "float64" else np.float64

    def real(values):
        return np.asarray(values).astype(np.float64).astype(wide)

    # Overflow, 0/0 and inf - inf are answers here.
    with np.errstate(all="ignore"):
        x = real(np.moveaxis(logits, axis, -1))
        C = x.shape[-1]
        w = np.broadcast_to(real(1 if weight is None else weight), C)
        s = np.broadcast_to(real(1 if sample_weight is None else sample_weight), x.shape[:-1])
        upstream = real(1 if grad_output is None else grad_output)
        z, smooth = real(z_loss), real(label_smoothing)

        # The target: a = w q, how much a row counts in the mean, and the rows that have no valid target.
        ignored = bad = np.zeros(x.shape[:-1], bool)
        if target.ndim < logits.ndim:
            target = exact(target)
            if ignore_index is not None:
                ignored = target == ignore_index
            bad = ~ignored & ((target < 0) | (target >= C))
            label = np.where(ignored | bad, 0, target).astype(np.intp)
            q, count = real(np.arange(C) == label[..., None]), w[label]
        else:
            q, count = real(np.moveaxis(target, axis, -1)), np.ones(x.shape[:-1], wide)
        a = held(_times(w, (1 - smooth) * q + smooth / C), acc)
        abs_a = _times(np.abs(w), (1 - smooth) * np.abs(q) + smooth / C)  # > |a| where a signed q cancels smoothing
        mass, M = held(a.sum(-1), acc), abs_a.sum(-1)

        # Everything that multiplies a row; inert rows are out of it whatever they hold.
        inert = ignored | (s == 0)
        counts = (s * count)[~inert & ~bad] if reduction == "mean" else np.ones(1, wide)
        denominator = held(counts.sum(), "float64") or real(np.nan)
        cancelled = np.abs(counts).sum() / np.abs(denominator) - 1  # 0 unless weights have both signs
        scale = np.where(inert, 0, held(held(upstream / denominator, acc) * s, acc))

        # The logits, with D = 1 - tanh^2 = 1 / cosh^2. Rows without a softmax are zeroed here, made NaN below.
        D = np.ones_like(x)
        if softcap is not None:
            cap = real(softcap)
            x, D = cap * np.tanh(x / cap), np.cosh(x / cap) ** -2
        broken = ((x == np.inf) | np.isnan(x)).any(-1) | (x == -np.inf).all(-1)
        x = np.where(broken[..., None], 0, x)

        # The softmax, accurate where one class takes nearly all: rest leaves out the largest term, which is 1.
        top = np.arange(C) == x.argmax(-1)[..., None]
        max_ = x.max(-1)
        e = np.where(top, 1, np.exp(x - max_[..., None]))
        rest = np.where(top, 0, e).sum(-1)
        tail = np.log1p(rest)
        lse = max_ + tail
        p = e / (1 + rest)[..., None]

        below = max_[..., None] - x  # lse - x = below + tail
        row = _times(a, below).sum(-1) + mass * tail
        coef = mass
        if z:
            row, coef = row + z * lse**2, held(mass + held(2 * z * lse, acc), acc)
        row, in_row = held(row, acc), coef[..., None]
        before = np.where((p == 0) & ~np.isnan(in_row), 0, in_row * p) - a
        # coef p - a at p close to 1, without the cancellation: a may hold all the mass.
        elsewhere = np.where(top, 0, a).sum(-1)
        confident = elsewhere - mass * rest / (1 + rest) + 2 * z * lse / (1 + rest)
        before = np.where(top & ((rest < 1) & np.isfinite(coef))[..., None], confident[..., None], before)
        before = np.where((bad | broken)[..., None], np.nan, before)
        row = np.where(bad | broken, np.nan, row)

        silent = ((scale == 0) & (inert | ~bad))[..., None]  # a bad label is loud whatever multiplies it
        rows = held(np.where(inert, 0, s * row), acc)
        total = held(rows.sum(), "float64") / denominator
        grad = np.where(silent, 0, scale[..., None] * (D * before))

        size, abs_lse, abs_x = np.abs(scale)[..., None], np.abs(lse), np.abs(x)
        K = M + 2 * z * (1 + abs_lse)
        reach = 1 + abs_x + abs_lse[..., None]
        unit_row = _times(abs_a, reach).sum(-1) + 2 * z * abs_lse * (1 + abs_lse) + np.abs(row)
        unit_row = EPS[acc] * unit_row + NORMAL[acc]
        unit_rows = np.where(inert, 0, np.abs(s) * unit_row)
        unit_total = unit_rows.sum() / np.abs(denominator) + EPS[acc] * (1 + cancelled) * np.abs(total)
        K = K[..., None]
        unit_grad = EPS[acc] * (_times(_times(K, p), reach) + abs_a)
        if softcap is not None:  # D is off by eps too, which multiplies `before` and the error of that
            unit_grad = (D + EPS[acc]) * unit_grad + EPS[acc] * np.abs(before)
        unit_grad = size * (unit_grad + K * NORMAL[acc]) + EPS[acc] * cancelled * np.abs(grad)
        unit_grad += EPS[grad_dtype] * np.abs(grad) + SUBNORMAL[grad_dtype]

        runner_up = np.where(top, -np.inf, x).max(-1)
        margin = np.where(runner_up == -np.inf, 0, max_ - runner_up)

    none = reduction == "none"
    return Truth(
        loss=rows if none else total,
        grad=np.moveaxis(grad, -1, axis),
        rows=rows,
        lse=np.where(broken, np.nan, lse),
        margin=margin,
        unit_loss=unit_rows if none else unit_total,
        unit_grad=np.moveaxis(np.where(silent, 0, unit_grad), -1, axis),
        unit_rows=unit_rows,
        axis=axis,
        loss_dtype=acc,
        grad_dtype=grad_dtype,
    )


def _times(a, b):
    """a * b where 0 times infinity counts 0."""
    return np.where((a == 0) | (b == 0), 0, a * b)


def held(values, dtype):
    """The values, or infinity where that dtype would have it."""
    values = np.asarray(values)
    return np.where(np.isinf(values.astype(np.float64).astype(dtype)), np.copysign(np.inf, values), values)
