"""Numbers at the ends of their range: which results are NaN, inf, -inf or finite, and that the finite ones are right.

Rows are made of the largest and the smallest numbers of a dtype, zeros of both signs and -inf, under options that are
as extreme; `oracle` says what the arithmetic holds, and what follows where it does not. A problem is a row, and rows
come in batches. Weights and targets have no sign here: of a sum of large numbers with two signs, whether it overflows
depends on the order.
"""

from dataclasses import dataclass

import ml_dtypes
import numpy as np
import pytest
from support.close import BAR, units_off
from support.oracle import EPS, oracle
from support.sizes import resized

from xent_array import cross_entropy, cross_entropy_grad, cross_entropy_value_and_grad, row_stats

INF, NAN = np.inf, np.nan
N = 16  # rows of a batch
SHAPES = [(N, 5), (N, 2), (N, 1), (N, 40), (5, N), (40, N), (N, 600)]  # the classes lie along the axis that is not N
MAX = {name: float(ml_dtypes.finfo(name).max) for name in EPS}
LEAST = {name: float(ml_dtypes.finfo(name).smallest_subnormal) for name in EPS}
NORMAL = {name: float(ml_dtypes.finfo(name).smallest_normal) for name in EPS}


@dataclass
class Batch:
    logits: np.ndarray
    target: np.ndarray
    options: dict
    grad_output: object
    dtype: str

    @property
    def acc(self):
        return "float64" if self.dtype == "float64" else "float32"

    def row(self, i):
        """What there is of one row, to print."""

        def of(value):
            if np.ndim(value) == 0:
                return value
            if np.shape(value) == self.logits.shape:
                return np.take(value, i, 1 - self.options["axis"])
            return value[i] if len(value) == N else value

        given = {"logits": self.logits, "target": self.target} | self.options | {"grad_output": self.grad_output}
        with np.printoptions(threshold=50):
            return ", ".join(f"{name}={of(value)!r}" for name, value in given.items() if value is not None)


def rows_of(rng, dtype, C):
    """A row; two of its logits differ by no more than 60, or by so much that the smaller one's probability is 0."""
    top, huge = MAX[dtype], MAX[dtype] * EPS[dtype] / 4  # which is half a step beside the largest number
    ends = [top, -top, top / 2, huge, -huge, 0.0, -0.0, LEAST[dtype], -LEAST[dtype], NORMAL[dtype], -INF]
    kind = rng.integers(6)
    if kind == 0:
        return np.full(C, rng.choice(ends))
    if kind == 1:
        return rng.choice(rng.choice(ends, 2), C)
    if kind == 2:
        return rng.choice(ends, C)
    row = np.round(8 * rng.normal(size=C)) / 4
    if kind == 3:
        row[rng.integers(C)] = rng.choice(ends)
    elif kind == 4:
        row = np.where(rng.random(C) < 0.5, rng.choice(ends), row)
    elif rng.random() < 0.2:
        row[rng.integers(C)] = rng.choice([NAN, INF, -INF])
    return row


def target_of(rng, C, options, dtype):
    """Labels, some ignored or bad; or a distribution."""
    kind = rng.integers(7)
    if kind < 3:
        labels = rng.integers(0, C, N)
        if kind == 2:
            labels = np.where(rng.random(N) < 0.2, rng.choice([-100, C]), labels)
            options["validate"] = False
        return labels
    one_hot = np.eye(C)[rng.integers(0, C, N)]
    soft = rng.integers(0, 4, (N, C)) * (rng.random((N, C)) < 0.7)
    whole = np.maximum(soft.sum(-1, keepdims=True), 1)
    made = [one_hot, soft / whole, 0.25 * soft, 0 * one_hot][kind - 3]
    return made.astype(rng.choice([dtype, "float32"]) if dtype != "bfloat16" else "float32")


def batch(rng, shape, dtype):
    """One batch, its rows and options drawn."""
    axis = 0 if shape[1] == N else 1
    C = shape[axis]
    x = np.array([rows_of(rng, dtype, C) for _ in range(N)])
    acc = "float64" if dtype == "float64" else "float32"
    large = 2.0**900 if acc == "float64" else 2.0**100
    options = {"axis": axis, "reduction": str(rng.choice(["none", "none", "mean", "sum"]))}
    target = target_of(rng, C, options, acc if dtype == "bfloat16" else dtype)
    plain = rng.random() < 0.2
    if not plain and rng.random() < 0.4:
        heavy = large**0.6  # so that what a mean divides by has a reciprocal
        weight = rng.choice([rng.choice([0, 1, 2.0**-10, 8], C), np.ones(C), np.full(C, heavy), heavy ** rng.random(C)])
        if rng.random() < 0.3:  # of a class that something may meet, or nothing
            weight[rng.integers(C)] = rng.choice([INF, NAN])
            x = np.where(np.abs(x) <= NORMAL[dtype], 0, x)  # half their difference may be 0, and infinity times that
        options["weight"] = weight.astype(acc)
    if not plain and rng.random() < 0.4:
        s = rng.choice([rng.choice([0, 1, 0.5, 3], N), rng.choice([2.0**20, 2.0**-20, 1], N)])
        options["sample_weight"] = s.astype(acc)
    if not plain:
        options["label_smoothing"] = float(rng.choice([0, 0, 0.1, 1, 2.0**-40]))
        options["z_loss"] = float(rng.choice([0, 0, 0, 1e-4, 2.0**64 * NORMAL[acc], 1, large]))
        # Not so that a slope is 0 but for rounding, and then multiplied by infinity.
        caps = [16.0, 30.0] if dtype == "float16" else [1.0, 30.0, MAX[dtype] * 2.0**-20]
        options["softcap"] = float(rng.choice(caps)) if rng.random() < 0.4 else None
    upstream = [None, -2.5, 2.0**16, 0.0, 2.0**-20, large, INF, -INF, NAN]
    grad_output = upstream[rng.integers(9)]
    if options["reduction"] == "none" and rng.random() < 0.5:
        grad_output = rng.choice([-2.5, 2.0**16, 0.0, large, INF], N).astype(acc)
    if axis == 0:
        x = x.T
        target = target.T if target.ndim == 2 else target
    return Batch(x.astype(dtype), target, options, grad_output, dtype)


def far_off(actual, wanted, unit, vague):
    """Which numbers are not what they must be; where 4 units are enough to leave the range, both sides are right."""
    end = MAX[actual.dtype.name] * (1 - EPS[actual.dtype.name])
    got = actual.astype(np.float64).astype(wanted.dtype)
    with np.errstate(all="ignore"):
        beyond = ((got == INF) & (wanted + BAR * unit >= end)) | ((got == -INF) & (wanted - BAR * unit <= -end))
        within = np.abs(got - wanted) <= BAR * unit
    return (units_off(actual, wanted, unit) > BAR) & ~(beyond | within) & ~(vague & ~np.isfinite(got))


def vague(problem, truth):
    """Which entries of the gradient are 0 but for rounding, and then multiplied by infinity."""
    options = {k: v for k, v in problem.options.items() if k not in ("validate", "sample_weight", "reduction")}
    alone = oracle(problem.logits.astype(problem.acc), problem.target, reduction="none", **options)
    with np.errstate(all="ignore"):
        size, least = np.abs(alone.grad), NORMAL[problem.acc]
        rounded = (size <= BAR * alone.unit_grad) & (alone.unit_grad > 2**20 * least)
        may_be_zero = rounded | ((size > 0) & (size < least))
    return may_be_zero & ~np.isfinite(truth.grad)


def differing(backend, problem):
    """{what: which of its numbers are wrong}, of each engine and way."""
    options = {k: v for k, v in problem.options.items() if k != "validate"}
    truth = oracle(problem.logits, problem.target, grad_output=problem.grad_output, **options)
    unsure, nowhere = vague(problem, truth), np.False_
    x = backend.array(problem.logits, problem.dtype)
    target = backend.array(problem.target)
    given = {k: backend.array(v) if isinstance(v, np.ndarray) else v for k, v in problem.options.items()}
    g = problem.grad_output
    g = backend.array(g) if isinstance(g, np.ndarray) else g
    of_rows = {k: v for k, v in given.items() if k != "reduction"}
    for engine in backend.engines:
        given["engine"] = of_rows["engine"] = engine
        loss, grad = cross_entropy_value_and_grad(x, target, grad_output=g, **given)
        alone = cross_entropy(x, target, **given)
        stats = row_stats(x, target, **of_rows)
        by_stats = cross_entropy_grad(x, target, stats=stats, grad_output=g, **given)
        found = {"loss": loss, "loss alone": alone, "grad": grad, "grad from stats": by_stats}
        for what, actual in found.items():
            actual = np.asarray(backend.numpy(actual))
            if "loss" in what:
                far = far_off(actual, truth.loss, truth.unit_loss, nowhere)
            else:
                far = far_off(actual, truth.grad, truth.unit_grad, unsure)
            yield f"{what} of {engine!r}", actual, truth.loss if "loss" in what else truth.grad, far


def count_differing(backend, batches, seed):
    """How many problems there were, how many are wrong somewhere, and the first of these."""
    wrong, first = 0, None
    for k in range(batches):
        rng = np.random.default_rng([seed, k])
        shape = SHAPES[0 if backend.name == "jax" else rng.integers(len(SHAPES))]  # JAX compiles for each
        problem = batch(rng, shape, str(rng.choice(backend.usual_dtypes)))
        of_rows = np.zeros(N, bool)
        with resized(**{"TILE": 3} if k % 5 == 0 and max(shape) < 100 else {}):
            found = [*differing(backend, problem)]
        for what, actual, wanted, far in found:
            if far.any():
                rows = far.any(axis=problem.options["axis"]) if far.ndim == 2 else np.broadcast_to(far, N)
                of_rows |= rows
                if first is None:
                    at = int(np.argmax(rows))
                    axis = 1 - problem.options["axis"]
                    got, wanted = (np.take(v, at, axis) if far.ndim == 2 else v for v in (actual, wanted))
                    with np.printoptions(threshold=50):
                        first = f"{what}, in row {at} of batch {k}: got {got!r}, wanted {wanted!r}\n{problem.row(at)}"
        wrong += int(of_rows.sum())
    return batches * N, wrong, first


def test_extreme_problems(backend):
    compiles_much = backend.name in ("jax", "emulated")
    problems, wrong, first = count_differing(backend, 8 if compiles_much else 100, seed=1)
    assert not wrong, f"{wrong} of {problems} are wrong; the first: {first}"


@pytest.mark.full
def test_many_extreme_problems(backend):
    count = 250 if backend.name == "dask" else 1000
    problems, wrong, first = count_differing(backend, count, seed=2)
    print(f"{backend.name}: {wrong} of {problems} extreme problems are wrong")
    assert not wrong, f"{wrong} of {problems} are wrong; the first: {first}"
