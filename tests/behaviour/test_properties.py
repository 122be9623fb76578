"""Properties over anything that may be passed: shapes, dtypes, memory layouts and options in every combination.

Hypothesis draws what a problem is made of and a seed; the numbers follow from the seed. Weights are multiples of
1/8, so that a denominator has no rounding that the oracle's units would have to count.
"""

from dataclasses import dataclass, replace

import ml_dtypes
import numpy as np
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st
from support.close import assert_grad, assert_loss
from support.oracle import EPS, NORMAL, SUBNORMAL, exact, oracle
from support.sizes import resized

from xent_array import (
    cross_entropy,
    cross_entropy_grad,
    cross_entropy_value_and_grad,
    log_softmax,
    logsumexp,
    row_stats,
    softmax,
)

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FLOATS = [np.dtype("float16"), BFLOAT16, np.dtype("float32"), np.dtype("float64")]
INTEGERS = [np.dtype(f"{sign}int{bits}") for sign in ("", "u") for bits in (8, 16, 32, 64)]

each_engine = pytest.mark.parametrize("engine", ["cpu", "numpy", "generic"])


# -- memory layouts: the same values (but for "repeated") in other memory ----------------------------------------


def transposed(x, rng):
    order = rng.permutation(x.ndim)
    return x.transpose(order).copy(order="C").transpose(np.argsort(order))


def sliced(x, rng):
    larger = np.zeros([2 * length + 1 for length in x.shape], x.dtype)
    part = larger[(*(slice(1, None, 2) for _ in x.shape), ...)]
    part[...] = x
    return part


def backwards(x, rng):
    some = (*(slice(None, None, rng.choice([-1, 1])) for _ in x.shape), ...)
    return x[some].copy(order="C")[some]


def repeated(x, rng):
    """Along one axis, with stride 0."""
    if x.size == 0 or x.ndim == 0:
        return x
    return np.broadcast_to(x.take([0], axis=rng.integers(x.ndim)), x.shape)


def unaligned(x, rng):
    raw = np.empty(x.nbytes + 1, np.uint8)[1:]
    raw[:] = np.frombuffer(x.tobytes(), np.uint8)
    return raw.view(x.dtype).reshape(x.shape)


def big_endian(x, rng):
    return x if x.dtype == BFLOAT16 else x.astype(x.dtype.newbyteorder(">"))  # which bfloat16 has not


def read_only(x, rng):
    x = x.copy()
    x.flags.writeable = False
    return x


LAYOUTS = [
    lambda x, rng: x,
    lambda x, rng: x.copy(order="F"),
    transposed,
    sliced,
    backwards,
    repeated,
    unaligned,
    big_endian,
    read_only,
]
layouts = st.sampled_from(LAYOUTS)


# -- rows of logits ----------------------------------------------------------------------------------------------


def normal(rng, C, dtype):
    return rng.choice([0.1, 1, 10]) * rng.normal(size=C)


def tied(rng, C, dtype):
    return rng.integers(-1, 2, C).astype(float)


def constant(rng, C, dtype):
    return np.full(C, rng.integers(-9, 9), float)


def confident(rng, C, dtype):
    x = rng.normal(size=C)
    x[rng.integers(C)] += rng.choice([17, 40, 100])
    return x


def large(rng, C, dtype):
    decades = {"float16": 4.8, "bfloat16": 30, "float32": 30, "float64": 250}[dtype.name]
    return rng.choice([-1, 1], C) * 10 ** rng.uniform(0, decades) * rng.random(C)


def masked(rng, C, dtype):
    return np.where(rng.random(C) < 0.4, -np.inf, rng.normal(size=C))


def masked_by_a_number(rng, C, dtype):
    # Weights and signed targets may multiply it by 2**8 before anything cancels.
    lowest = float(ml_dtypes.finfo(dtype).min) / 2**8
    return np.where(rng.random(C) < 0.4, lowest, rng.normal(size=C))


def broken(rng, C, dtype):
    x = rng.normal(size=C)
    x[rng.integers(C)] = rng.choice([np.nan, np.inf])
    return np.full(C, -np.inf) if rng.random() < 0.3 else x


FINITE_ROWS = [normal, tied, constant, confident, large, masked_by_a_number]
EVERY_ROW = [*FINITE_ROWS, masked, broken]


@dataclass
class Logits:
    shape: tuple
    axis: int
    array: np.ndarray
    rng: np.random.Generator

    @property
    def classes(self):
        return self.shape[self.axis]

    @property
    def row_shape(self):
        axis = self.axis % len(self.shape)
        return self.shape[:axis] + self.shape[axis + 1 :]


@st.composite
def logits(draw, kinds=EVERY_ROW):
    row_shape = tuple(draw(st.lists(st.integers(0, 3), max_size=4)))
    C = draw(st.integers(1, 5) | st.integers(1, 70))
    axis = draw(st.integers(-len(row_shape) - 1, len(row_shape)))
    dtype = draw(st.sampled_from(FLOATS))
    kinds = draw(st.lists(st.sampled_from(kinds), min_size=1, max_size=3, unique=True))
    layout, rng = draw(layouts), np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    rows = [rng.choice(kinds)(rng, C, dtype) for _ in range(np.prod(row_shape, dtype=int))]
    x = np.moveaxis(np.reshape(rows, (*row_shape, C)), -1, axis)
    return Logits(x.shape, axis, layout(x.astype(dtype), rng), rng)


# -- targets and options -----------------------------------------------------------------------------------------


def draw_labels(draw, x):
    """Class indices, and what goes with them: ignore_index, and validate=False where some are no class."""
    dtype = draw(st.sampled_from(INTEGERS))
    labels = x.rng.integers(0, x.classes, x.row_shape).astype(dtype)
    ignore_index = draw(st.sampled_from([-100, -1, 0, 1, 255, None]))
    some_bad = draw(st.booleans())
    odd = [] if ignore_index is None else [ignore_index]
    if some_bad:
        odd += [-1, x.classes, 2**63, np.iinfo(dtype).max, np.iinfo(dtype).min]
    odd = np.array([v for v in odd if np.iinfo(dtype).min <= v <= np.iinfo(dtype).max], dtype)
    if len(odd):
        labels = np.where(x.rng.random(x.row_shape) < 0.4, x.rng.choice(odd, x.row_shape), labels)
    validate = False if some_bad else draw(st.sampled_from([None, True, False]))
    return draw(layouts)(np.asarray(labels), x.rng), {"ignore_index": ignore_index, "validate": validate}


def draw_distribution(draw, x):
    dtype = draw(st.sampled_from([*FLOATS, np.dtype("bool"), *INTEGERS]))
    kind = draw(st.sampled_from(["one-hot", "soft", "unnormalised", "signed", "zero"]))
    q = x.rng.random(x.shape) * (x.rng.random(x.shape) < 0.7)
    if kind == "one-hot":
        index = x.rng.integers(0, x.classes, x.row_shape)
        q = np.moveaxis(np.arange(x.classes) == index[..., None], -1, x.axis)
    elif kind == "soft":
        q = q / np.maximum(q.sum(axis=x.axis, keepdims=True), 0.1)
    elif kind == "zero":
        q = np.zeros(x.shape)
    elif dtype.kind in "iu" or kind == "signed":
        q = np.round(4 * q) - (0 if dtype.kind in "ub" or kind != "signed" else 2)
    return draw(layouts)(q.astype(dtype), x.rng), {}


def draw_weights(draw, x, shape, low, zeros=True):
    """Multiples of 1/8 from `low` to 4, in any dtype that may hold weights."""
    if draw(st.booleans()):
        return None
    weights = x.rng.integers(8 * low, 33, shape) / 8
    weights = np.where(x.rng.random(shape) < 0.2, 0, weights) if zeros else np.where(weights < 1, 1, weights)
    dtype = draw(st.sampled_from([*FLOATS, np.dtype("int64")]))
    return draw(layouts)(weights.astype(dtype), x.rng)


@dataclass
class Problem:
    logits: np.ndarray
    target: np.ndarray
    options: dict
    grad_output: object
    out: str | None
    sizes: dict  # that the cpu engine decides by

    def known(self, **changes):
        """What the oracle is told."""
        return {k: v for k, v in self.options.items() if k != "validate"} | changes


@st.composite
def problems(draw):
    x = draw(logits())
    target, options = draw(st.sampled_from([draw_labels, draw_distribution]))(draw, x)
    options |= {"axis": x.axis, "reduction": draw(st.sampled_from(["none", "mean", "sum"]))}
    if draw(st.booleans()):  # else plain, which the cpu engine has code of its own for
        options |= {
            "weight": draw_weights(draw, x, (x.classes,), low=draw(st.sampled_from([0, -2]))),
            "sample_weight": draw_weights(draw, x, x.row_shape, low=0),
            "label_smoothing": draw(st.sampled_from([0.0, 0.1, 0.5, 1.0])),
            "z_loss": draw(st.sampled_from([0.0, 1e-4, 0.5])),
            "softcap": draw(st.sampled_from([None, 30.0, 1.0, 0.1])),
        }
    zeros = options.get("validate") is not False  # 0·NaN is for neither side to decide
    if options["reduction"] == "none":
        grad_output = draw_weights(draw, x, x.row_shape, low=-4, zeros=zeros)
    else:
        grad_output = draw(st.sampled_from([None, -2.5, 1024.0, np.float16(3), *([0] if zeros else [])]))
    out = draw(st.sampled_from([None, "fresh", "strided", "in place"]))
    small = {"BLOCK": 64, "SERIAL": 16}
    return Problem(
        x.array, target, options, grad_output, out, draw(st.sampled_from([{}, small, small | {"TILE": 7}, {"TILE": 3}]))
    )


def buffer_for(problem):
    """A buffer for the gradient of the kind that was drawn; None where that cannot be."""
    x = problem.logits
    native = x.dtype if x.dtype == BFLOAT16 else x.dtype.newbyteorder("=")
    if problem.out == "fresh":
        return np.full(x.shape, 7, native)
    if problem.out == "strided":
        return sliced(np.full(x.shape, 7, native), None)
    return x if problem.out == "in place" and x.flags.writeable else None


def same_bits(one, two):
    return np.asarray(one).tobytes() == np.asarray(two).tobytes()


def assert_lse(actual, truth):
    """To 4 units of a loss that is the lse."""
    eps = EPS[truth.loss_dtype]
    with np.errstate(all="ignore"):
        unit = eps * (1 + 3 * abs(truth.lse)) + NORMAL[truth.loss_dtype]
    assert_loss(actual, replace(truth, loss=truth.lse, unit_loss=unit))


# -- the properties ----------------------------------------------------------------------------------------------


@each_engine
@given(problem=problems())
def test_loss_and_gradient(engine, problem):
    x, target, g = problem.logits, problem.target, problem.grad_output
    options = problem.options | {"engine": engine}
    truth = oracle(x, target, grad_output=g, **problem.known())
    before = x.copy()
    with resized(**problem.sizes):
        loss = cross_entropy(x, target, **options)
        assert_loss(loss, truth)

        out = buffer_for(problem)
        event(f"out={'None' if out is None else problem.out}")
        value, grad = cross_entropy_value_and_grad(x, target, grad_output=g, out=out, **options)
        assert_loss(value, truth)
        assert out is None or grad is out
        if grad is x:
            grad, x = grad.astype(truth.grad_dtype), before
        assert_grad(grad, truth)
        if engine != "generic":
            assert same_bits(loss, value)
        assert same_bits(x, before)


@each_engine
@given(problem=problems())
def test_row_stats(engine, problem):
    x, target, g = problem.logits, problem.target, problem.grad_output
    options = problem.options | {"engine": engine}
    of_rows = {k: v for k, v in options.items() if k != "reduction"}
    # row_stats tells of every row, also those that are then ignored or weighed.
    ignored = np.False_
    if problem.options.get("ignore_index") is not None:
        labels = exact(target)
        ignored = (labels == problem.options["ignore_index"]) & ~((labels >= 0) & (labels < x.shape[options["axis"]]))
    plain = {"reduction": "none", "sample_weight": None, "z_loss": 0.0}
    if "ignore_index" in options:
        plain["ignore_index"] = None
    truth = oracle(x, target, **problem.known(**plain))
    no_loss = np.where(np.isnan(truth.lse), np.nan, 0)
    truth = replace(truth, loss=np.where(ignored, no_loss, truth.loss), unit_loss=np.where(ignored, 0, truth.unit_loss))
    with resized(**problem.sizes):
        stats = row_stats(x, target, **of_rows)
        assert_loss(stats.loss, truth)
        assert_lse(stats.lse, truth)
        out = buffer_for(problem)
        truth = oracle(x, target, grad_output=g, **problem.known())
        grad = cross_entropy_grad(x, target, grad_output=g, stats=stats, out=out, **options)
        assert out is None or grad is out
        assert_grad(grad.astype(truth.grad_dtype) if grad is x else grad, truth)


# -- Dask --------------------------------------------------------------------------------------------------------


def in_chunks(draw, values):
    """A Dask array of these values, in chunks of any sizes along every axis, some of them empty."""
    import dask.array as da

    chunks = []
    for length in values.shape:
        cuts = sorted(draw(st.lists(st.integers(0, length), max_size=3)))
        chunks.append(tuple(np.diff([0, *cuts, length]).tolist()))
    return da.from_array(values, chunks=tuple(chunks))


@settings(max_examples=200)
@given(data=st.data(), problem=problems())
def test_any_chunks(data, problem):
    """Of rows and classes, and others of the target and the weights, which may also be no Dask arrays."""
    dask = pytest.importorskip("dask", reason="Dask is not installed")

    def made(values):
        is_array = isinstance(values, np.ndarray)
        return in_chunks(data.draw, values) if is_array and (values.ndim != 1 or data.draw(st.booleans())) else values

    x, target, g = problem.logits, problem.target, problem.grad_output
    truth = oracle(x, target, grad_output=g, **problem.known())
    options = {name: made(value) for name, value in problem.options.items()}
    y, target, g = in_chunks(data.draw, x), made(target), made(g)
    of_rows = {name: value for name, value in options.items() if name != "reduction"}
    loss = cross_entropy(y, target, **options)
    value, grad = cross_entropy_value_and_grad(y, target, grad_output=g, **options)
    stats = row_stats(y, target, **of_rows)
    saved = cross_entropy_grad(y, target, grad_output=g, stats=stats, **options)
    assert grad.chunks == saved.chunks == y.chunks
    loss, value, grad, saved, lse = dask.compute(loss, value, grad, saved, stats.lse, scheduler="synchronous")
    for each in (loss, value):
        assert_loss(each, truth)
    for each in (grad, saved):
        assert_grad(each, truth)
    assert_lse(lse, truth)


@given(x=logits())
def test_softmax(x):
    truth = oracle(x.array, np.zeros(x.row_shape, int), axis=x.axis)
    acc, out = truth.loss_dtype, truth.grad_dtype
    wide = truth.lse.dtype
    with np.errstate(all="ignore"):
        values = np.moveaxis(x.array.astype(np.float64).astype(wide), x.axis, -1)
        lse = truth.lse[..., None]
        log_p = np.where(np.isnan(lse), np.nan, values - lse)
        reach = EPS[acc] * (1 + abs(values) + abs(lse))
        unit = np.where(np.isfinite(log_p), reach + EPS[out] * abs(log_p) + SUBNORMAL[out], 0)
        p = np.exp(log_p)
        unit_p = p * (np.where(p == 0, 0, reach) + EPS[out]) + NORMAL[acc] + SUBNORMAL[out]
        as_scipy = np.where(np.isnan(lse[..., 0]), values.max(axis=-1), truth.lse)

    def moved(v):
        return np.moveaxis(v, -1, x.axis)

    assert_grad(log_softmax(x.array, axis=x.axis), replace(truth, grad=moved(log_p), unit_grad=moved(unit)))
    assert_grad(softmax(x.array, axis=x.axis), replace(truth, grad=moved(p), unit_grad=moved(unit_p)))
    lse = logsumexp(x.array, axis=x.axis)
    assert_lse(lse, replace(truth, lse=as_scipy))
    kept = logsumexp(x.array, axis=x.axis, keepdims=True)
    assert kept.shape == tuple(1 if k == x.axis % len(x.shape) else n for k, n in enumerate(x.shape))
    assert same_bits(kept, lse)


@each_engine
@given(x=logits(FINITE_ROWS))
def test_gradient_of_labels_sums_to_zero(engine, x):
    labels = x.rng.integers(0, x.classes, x.row_shape)
    grad = cross_entropy_grad(x.array, labels, axis=x.axis, reduction="none", engine=engine)
    truth = oracle(x.array, labels, axis=x.axis, reduction="none")
    total = grad.astype(np.float64).sum(axis=x.axis)
    assert (abs(total) <= 4 * truth.unit_grad.sum(axis=x.axis)).all()


@each_engine
@given(x=logits([tied, constant]), shift=st.integers(-1000, 1000))
def test_shifted_logits(engine, x, shift):
    """Small integers, to which the shift adds without rounding: then not a bit of the loss or gradient changes."""
    values = x.array.astype(np.float32)
    target = x.rng.random(x.shape)
    options = {"axis": x.axis, "label_smoothing": 0.1, "engine": engine}
    loss, grad = cross_entropy_value_and_grad(values, target, **options)
    shifted_loss, shifted_grad = cross_entropy_value_and_grad(values + np.float32(shift), target, **options)
    assert same_bits(loss, shifted_loss)
    assert same_bits(grad, shifted_grad)


@each_engine
@given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 5)),
    is_index=st.booleans(),
    reduction=st.sampled_from(["none", "mean", "sum"]),
    label_smoothing=st.sampled_from([0.0, 0.3]),
    z_loss=st.sampled_from([0.0, 0.1]),
    softcap=st.sampled_from([None, 2.0]),
    weighted=st.booleans(),
)
def test_finite_differences(engine, seed, shape, is_index, reduction, weighted, **options):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=shape)
    target = rng.integers(0, shape[1], shape[0]) if is_index else rng.random(shape)
    options |= {"reduction": reduction, "engine": engine}
    if weighted:
        options |= {"weight": 0.5 + rng.random(shape[1]), "sample_weight": 0.5 + rng.random(shape[0])}
    upstream = rng.normal(size=shape[0] if reduction == "none" else ())
    grad = cross_entropy_grad(x, target, grad_output=upstream, **options)
    step = 1e-5
    for k in np.ndindex(*shape):
        moved = np.zeros(shape)
        moved[k] = step
        up, down = (np.sum(upstream * cross_entropy(x + d, target, **options)) for d in (moved, -moved))
        assert abs((up - down) / (2 * step) - grad[k]) <= 1e-8


@each_engine
def test_z_loss_of_a_large_lse(engine):
    """z·lse² fits float32 where lse² alone does not."""
    x, labels, options = np.array([[1e20, 0]], np.float32), np.array([0]), {"z_loss": 1e-4}
    loss, grad = cross_entropy_value_and_grad(x, labels, engine=engine, **options)
    truth = oracle(x, labels, **options)
    assert_loss(loss, truth)
    assert_grad(grad, truth)
