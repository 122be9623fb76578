"""Linear cross-entropy: what the two steps say, on every backend, for any budget, and within it."""

import inspect
import itertools
import math
import re
import tracemalloc

import numpy as np
import pytest
from conftest import BACKENDS, _backend
from numpy.lib.stride_tricks import as_strided
from numpy.testing import assert_allclose, assert_array_equal
from support.oracle import EPS, oracle
from support.sizes import resize

import xent_array
from xent_array import (
    cross_entropy,
    cross_entropy_value_and_grad,
    linear_cross_entropy,
    linear_cross_entropy_value_and_grad,
)
from xent_array._engines import generic
from xent_array._linear import products
from xent_array.parallel import Alone, BatchParallel, VocabParallel

REDUCTIONS = ("none", "mean", "sum")
ROWS, FEATURES, CLASSES = 37, 5, 203  # odd against any chunk

rng = np.random.default_rng(0)
HIDDEN = rng.standard_normal((ROWS, FEATURES))
HEAD = rng.standard_normal((CLASSES, FEATURES))
BIAS = rng.standard_normal(CLASSES)
LABELS = np.where(rng.random(ROWS) < 0.2, -100, rng.integers(0, CLASSES, ROWS))
SOFT = rng.dirichlet(np.ones(CLASSES), ROWS)
WEIGHT = rng.uniform(0.5, 2, CLASSES)
SAMPLE_WEIGHT = np.where(rng.random(ROWS) < 0.2, 0, rng.uniform(0.5, 2, ROWS))
UPSTREAM = rng.uniform(0.5, 2, ROWS)

each_target = pytest.mark.parametrize("target", [LABELS, SOFT], ids=["index", "distribution"])
OPTIONS = {
    "plain": {},
    "bias": {"linear_bias": BIAS},
    "weight": {"weight": WEIGHT},
    "sample_weight": {"sample_weight": SAMPLE_WEIGHT},
    "mask": {"sample_weight": SAMPLE_WEIGHT > 1},
    "label_smoothing": {"label_smoothing": 0.1},
    "z_loss": {"z_loss": 0.25},
    "softcap": {"softcap": 3.0},
    "denominator": {"denominator": 7.0},
    "grad_output": {"grad_output": 3.0},
    "upstream": {"grad_output": UPSTREAM},
    "everything": {
        "linear_bias": BIAS, "weight": WEIGHT, "sample_weight": SAMPLE_WEIGHT, "label_smoothing": 0.1, "z_loss": 0.25,
        "softcap": 3.0, "grad_output": 3.0,
    },
}  # fmt: skip
each_option = pytest.mark.parametrize("name", OPTIONS)


def truth(hidden, head, target, *, linear_bias=None, denominator=None, **options):
    """Loss and gradients of the two steps, in float64 from the oracle, and the gradient of the logits."""
    hidden, head = np.asarray(hidden, np.float64), np.asarray(head, np.float64)
    with np.errstate(invalid="ignore"):
        logits = hidden @ head.T
    if linear_bias is not None:
        logits = logits + np.asarray(linear_bias, np.float64)
    if denominator is not None:  # which the oracle does not know
        options["reduction"] = "sum"
        options["grad_output"] = options.get("grad_output", 1) / denominator
    found = oracle(logits, target, **options)
    loss, grad = np.asarray(found.loss, np.float64), np.asarray(found.grad, np.float64)
    loss = loss if denominator is None else loss / denominator
    rows = hidden.reshape(math.prod(hidden.shape[:-1]), hidden.shape[-1])
    grad = grad.reshape(len(rows), len(head))
    counts = grad.any(axis=1) | np.isnan(grad).any(axis=1)
    of_head = grad[counts].T @ rows[counts]  # a row that does not count may hold NaN
    of_bias = None if linear_bias is None else grad.sum(axis=0)
    return loss, ((grad @ head).reshape(hidden.shape), of_head, of_bias)


def dtype_of(backend):
    return "float32" if backend.name == "emulated" else "float64"


def tolerance(backend):
    return 2e-5 if backend.name == "emulated" else 1e-11


def on(backend, hidden, head, target, options):
    """The arguments on a backend, floats in its widest dtype."""
    dtype = dtype_of(backend)
    given = {
        name: backend.array(value, dtype if value.dtype.kind == "f" else None)
        if isinstance(value, np.ndarray)
        else value
        for name, value in options.items()
    }
    target = backend.array(target, dtype if target.dtype.kind == "f" else None)
    return (backend.array(hidden, dtype), backend.array(head, dtype), target), given


@pytest.fixture(params=[name for name in BACKENDS if name != "dask"])
def backend(request):
    """Those whose arrays are taken."""
    found = _backend(request.param)
    if isinstance(found, str):
        pytest.skip(found)
    return found


def test_dask_arrays_are_for_cross_entropy():
    da = pytest.importorskip("dask.array", reason="Dask is not installed")
    hidden, head, labels = da.from_array(HIDDEN, 3), da.from_array(HEAD, 50), da.from_array(LABELS, 3)
    for call in (linear_cross_entropy, linear_cross_entropy_value_and_grad):
        with pytest.raises(TypeError, match=r"pass hidden @ linear_weight\.T, which is computed"):
            call(hidden, head, labels)
    found = cross_entropy(hidden @ head.T, labels).compute(scheduler="synchronous")
    assert_allclose(found, linear_cross_entropy(HIDDEN, HEAD, LABELS), rtol=1e-12)


def engines_of(backend):
    """Those that work tile by tile. JAX's own arrays cannot be written to, so "generic" makes all logits at once."""
    return [engine for engine in backend.engines if backend.name != "jax" or engine != "generic"]


def check(backend, hidden, head, target, *, budgets=(None,), **options):
    """Loss and gradients are those of the two steps, on every engine."""
    arguments, given = on(backend, hidden, head, target, options)
    loss, grads = truth(hidden, head, target, **options)
    close = {"rtol": tolerance(backend), "atol": tolerance(backend)}
    for engine, budget in itertools.product(engines_of(backend), budgets):
        more = given | {"engine": engine}
        more["memory_budget"] = least(arguments, more) if budget == "least" else budget
        found, made = linear_cross_entropy_value_and_grad(*arguments, **more)
        more.pop("grad_output", None)
        alone = linear_cross_entropy(*arguments, **more)
        try:
            for each in (found, alone):
                assert_allclose(backend.numpy(each), loss, **close)
            assert (made[2] is None) is (grads[2] is None)
            for name, got, wanted in zip(("hidden", "weight", "bias"), made, grads, strict=True):
                if wanted is not None:
                    assert backend.numpy(got).shape == wanted.shape
                    assert_allclose(backend.numpy(got), wanted, **close, err_msg=name)
        except AssertionError as error:
            error.add_note(f"engine={engine!r}, memory_budget={budget!r}, {options}")
            raise


def least(arguments, options):
    """The smallest budget, which an error names."""
    with pytest.raises(ValueError, match=r"memory_budget must be at least \d+ bytes .* got 1 bytes") as raised:
        linear_cross_entropy_value_and_grad(*arguments, **options | {"memory_budget": 1})
    return int(re.search(r"at least (\d+)", str(raised.value))[1])


BUDGETS = (None, "least", 2 << 20)


@each_target
@each_option
def test_it_is_the_two_steps(backend, target, name):
    for reduction in REDUCTIONS:
        options = OPTIONS[name] | {"reduction": reduction}
        if (name == "denominator" and reduction != "mean") or (name == "upstream" and reduction != "none"):
            continue
        check(backend, HIDDEN, HEAD, target, budgets=BUDGETS, **options)


def test_ignore_index(backend):
    labels = np.where(LABELS == -100, 7, LABELS)
    for ignore_index in (7, None):
        check(backend, HIDDEN, HEAD, labels, budgets=BUDGETS, ignore_index=ignore_index)


@pytest.mark.parametrize("shape", [(0,), (1,), (), (2, 3), (2, 0, 3), (3, 2, 2)])
def test_leading_dimensions_and_few_rows(backend, shape):
    hidden = rng.standard_normal((*shape, FEATURES))
    for target in (rng.integers(0, CLASSES, shape), rng.dirichlet(np.ones(CLASSES), shape)):
        for reduction in REDUCTIONS:
            check(backend, hidden, HEAD, np.asarray(target), reduction=reduction, linear_bias=BIAS)


@pytest.mark.parametrize(("features", "classes"), [(1, 7), (3, 1), (1, 1), (0, 3)])
def test_one_class_or_feature(backend, features, classes):
    hidden, head = rng.standard_normal((4, features)), rng.standard_normal((classes, features))
    check(backend, hidden, head, np.zeros(4, int), z_loss=0.25, budgets=BUDGETS[:2])
    check(backend, hidden, head, np.ones((4, classes)) / classes, linear_bias=np.ones(classes))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_rows_that_do_not_count_are_inert(backend, reduction):
    hidden = HIDDEN.copy()
    hidden[LABELS == -100] = np.nan
    check(backend, hidden, HEAD, LABELS, reduction=reduction, linear_bias=BIAS, budgets=BUDGETS)
    hidden = HIDDEN.copy()
    hidden[SAMPLE_WEIGHT == 0] = np.inf
    options = {"sample_weight": SAMPLE_WEIGHT, "reduction": reduction, "linear_bias": BIAS}
    check(backend, hidden, HEAD, SOFT, **options, budgets=BUDGETS)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_no_row_counts(backend, reduction):
    arguments, _ = on(backend, np.full((3, 2), np.nan), np.ones((4, 2)), np.full(3, -100), {})
    bias = backend.array(np.ones(4), dtype_of(backend))
    loss, grads = linear_cross_entropy_value_and_grad(
        *arguments, linear_bias=bias, reduction=reduction, engine=backend.engines[0]
    )
    wanted = {"none": np.zeros(3), "mean": np.nan, "sum": 0.0}[reduction]
    assert_array_equal(backend.numpy(loss), wanted)
    for grad in grads:
        assert_array_equal(backend.numpy(grad), 0)


def test_a_row_without_a_label_is_nan_and_no_other(backend):
    labels = np.array([1, 7, 0])
    arguments, _ = on(backend, np.ones((3, 2)), np.ones((4, 2)), labels, {})
    options = {"validate": False, "reduction": "none", "engine": backend.engines[0]}
    loss, (of_hidden, of_head, _) = linear_cross_entropy_value_and_grad(*arguments, **options)
    assert_array_equal(np.isnan(backend.numpy(loss)), [False, True, False])
    assert_array_equal(np.isnan(backend.numpy(of_hidden)), [[False] * 2, [True] * 2, [False] * 2])
    assert np.isnan(backend.numpy(of_head)).all()
    if backend.looks_at_labels:
        with pytest.raises(IndexError, match=r"target\[1\] is 7, which is not a class"):
            linear_cross_entropy(*arguments)


# -- memory --------------------------------------------------------------------------------------------------------


def large(dtype=np.float32, rows=1000, features=32, classes=3000):
    chance = np.random.default_rng(1)
    hidden, head = (chance.standard_normal((n, features)).astype(dtype) for n in (rows, classes))
    return hidden, head, chance.integers(0, classes, rows)


@pytest.mark.parametrize("budget", ["1MiB", "3MB", "16 MiB", "1GiB"])
def test_any_budget_gives_the_same(budget):
    arguments = large()
    bias = np.linspace(-1, 1, 3000, dtype=np.float32)
    loss, grads = truth(*arguments, linear_bias=bias)
    found, made = linear_cross_entropy_value_and_grad(*arguments, linear_bias=bias, memory_budget=budget)
    assert_allclose(found, loss, rtol=1e-6)
    assert_allclose(linear_cross_entropy(*arguments, linear_bias=bias, memory_budget=budget), loss, rtol=1e-6)
    for got, wanted in zip(made, grads, strict=True):
        assert_allclose(got, wanted, rtol=1e-3, atol=1e-5 * abs(wanted).max())


@pytest.mark.parametrize("engine", ["cpu", "numpy", "generic"])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("ignored", [False, True], ids=["all count", "some do not"])
@pytest.mark.parametrize("budget", [1 << 20, 8 << 20])
def test_no_more_memory_than_the_budget(engine, dtype, ignored, budget, monkeypatch):
    resize(monkeypatch, MAPPED=1 << 40)  # so that all memory is such as Python counts
    hidden, head, labels = large(dtype, features=256)
    labels[::3] = -100 if ignored else labels[::3]
    out = np.empty_like(hidden), np.empty_like(head), np.empty(3000, dtype)
    options = {"linear_bias": np.zeros(3000, dtype), "engine": engine, "memory_budget": budget, "out": out}
    if engine == "generic" and dtype == "float64":
        options["memory_budget"] = max(budget, least((hidden, head, labels), options))
    linear_cross_entropy_value_and_grad(hidden[:9], head, labels[:9], **options | {"out": None})  # compiles
    tracemalloc.start()
    try:
        linear_cross_entropy_value_and_grad(hidden, head, labels, **options)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    per_row_and_class = 60 * (len(labels) + len(head))
    logits = len(labels) * len(head) * 4
    workspaces = {"cpu": 100_000, "numpy": 2_500_000, "generic": 100_000}[engine]
    assert peak < options["memory_budget"] + per_row_and_class + workspaces
    assert peak > 0.3 * min(options["memory_budget"], logits)  # or else it was not measured


def test_rows_that_do_not_count_cost_no_product(monkeypatch):
    seen = []

    def logits(self, a, b, bias, out):
        seen.append(a.shape[0])
        np.matmul(a, b.T, out=out)

    monkeypatch.setattr(products.OfNumPy, "logits", logits)
    labels = np.where(np.arange(ROWS) < 30, -100, 5)
    linear_cross_entropy(HIDDEN, HEAD, labels)
    linear_cross_entropy(HIDDEN, HEAD, SOFT, sample_weight=(np.arange(ROWS) < 11))
    assert seen == [7, 11]


def test_buffers_are_there_before_the_first_product(monkeypatch):
    """No allocation of the size of a tile inside the loop."""
    said = []
    empty, logits = products.OfNumPy.empty, products.OfNumPy.logits
    monkeypatch.setattr(products.OfNumPy, "empty", lambda *args: said.append("empty") or empty(*args))
    monkeypatch.setattr(products.OfNumPy, "logits", lambda *args: said.append("logits") or logits(*args))
    linear_cross_entropy_value_and_grad(*large("float16"), memory_budget="1MiB")
    first = said.index("logits")
    assert said.count("logits") > 3
    assert set(said[:first]) == {"empty"}
    assert set(said[first:]) == {"logits"}


# -- 16 bits ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [None, "300kB", "least"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("backend", ["numpy", "numpy-readonly", "torch", "jax", "cupy"], indirect=True)
def test_16_bits_are_rounded_once(backend, dtype, budget):
    """Gradients are those of the stored numbers, to half a unit of rounding and what float32 sums lose."""
    hidden, head = backend.array(HIDDEN, dtype), backend.array(HEAD, dtype)
    bias, labels = backend.array(BIAS, dtype), backend.array(LABELS)
    values = {"hidden": hidden, "head": head, "linear_bias": bias}
    values = {name: backend.numpy(value).astype(np.float64) for name, value in values.items()}
    loss, grads = truth(target=LABELS, **values)
    for engine in engines_of(backend):
        options = {"linear_bias": bias, "engine": engine}
        options["memory_budget"] = least((hidden, head, labels), options) if budget == "least" else budget
        found, made = linear_cross_entropy_value_and_grad(hidden, head, labels, **options)
        assert backend.numpy(found).dtype == np.float32
        assert_allclose(backend.numpy(found), loss, rtol=1e-6)
        for got, wanted in zip(made, grads, strict=True):
            assert backend.numpy(got).dtype.name == dtype
            error = abs(backend.numpy(got).astype(np.float64) - wanted)
            smallest = {"float16": 2.0**-24, "bfloat16": 2.0**-133}[dtype]
            assert (error <= 0.51 * EPS[dtype] * abs(wanted) + 2e-6 * abs(wanted).max() + smallest).all()


# -- arrays of any kind, and `out` -----------------------------------------------------------------------------------


def test_any_strides_byte_order_and_lists():
    loss, grads = truth(HIDDEN, HEAD, LABELS, linear_bias=BIAS)
    wide = np.zeros((2 * ROWS, 2 * FEATURES))
    wide[::2, ::2] = HIDDEN
    shifted = np.frombuffer(b"\0" + HEAD.tobytes(), np.uint8)[1:].view(np.float64).reshape(HEAD.shape)
    assert not shifted.flags.aligned
    ways = [
        (np.asfortranarray(HIDDEN), np.asfortranarray(HEAD)),
        (wide[::2, ::2], shifted),
        (HIDDEN[::-1].copy()[::-1], HEAD[:, ::-1].copy()[:, ::-1]),
        (HIDDEN.astype(">f8"), HEAD.astype(">f8")),
        (HIDDEN.tolist(), HEAD.tolist()),
    ]
    for hidden, head in ways:
        for budget in (None, 20_000):
            bias = np.asarray(BIAS, getattr(hidden, "dtype", float))
            found, made = linear_cross_entropy_value_and_grad(
                hidden, head, LABELS, linear_bias=bias, memory_budget=budget
            )
            assert_allclose(found, loss, rtol=1e-11)
            for got, wanted in zip(made, grads, strict=True):
                assert got.dtype.isnative
                assert_allclose(got, wanted, atol=1e-11)


def test_out(backend):
    arguments, given = on(backend, HIDDEN.reshape(1, ROWS, FEATURES), HEAD, LABELS.reshape(1, ROWS), {"b": BIAS})
    options = {"linear_bias": given["b"], "engine": backend.engines[0]}
    if not backend.has_out:
        with pytest.raises(TypeError, match=r"out\[1\] cannot be used with jax.numpy, whose arrays cannot be changed"):
            linear_cross_entropy_value_and_grad(*arguments, **options, out=(None, arguments[1], None))
        return
    empty = [backend.xp.empty(each.shape, dtype=each.dtype) for each in (*arguments[:2], given["b"])]
    _, wanted = linear_cross_entropy_value_and_grad(*arguments, **options)
    for out in (tuple(empty), (None, empty[1], None), [empty[0], None, empty[2]]):
        _, made = linear_cross_entropy_value_and_grad(*arguments, **options, out=out)
        for got, place, right in zip(made, out, wanted, strict=True):
            assert place is None or got is place
            assert_array_equal(backend.numpy(got), backend.numpy(right))


def test_out_of_any_strides():
    _, wanted = linear_cross_entropy_value_and_grad(HIDDEN, HEAD, LABELS, linear_bias=BIAS)
    shape = (ROWS, 1, FEATURES)
    of_hidden = np.empty((FEATURES, 1, 2 * ROWS)).T[::2]
    out = of_hidden, np.empty((2 * CLASSES, 2 * FEATURES))[::2, ::2], np.empty(2 * CLASSES)[::-2]
    for budget in (None, 20_000):
        for array in out:
            array[...] = np.nan
        linear_cross_entropy_value_and_grad(
            HIDDEN.reshape(shape), HEAD, LABELS[:, None], linear_bias=BIAS, out=out, memory_budget=budget
        )
        for got, right in zip(out, wanted, strict=True):
            assert_allclose(got.reshape(right.shape), right, atol=1e-14)


def test_numpy_arrays_beside_those_of_jax():
    jax = pytest.importorskip("jax")
    jax.config.update("jax_enable_x64", True)
    hidden = jax.numpy.asarray(HIDDEN)
    loss, grads = truth(HIDDEN, HEAD, LABELS)
    for call in (
        linear_cross_entropy_value_and_grad,
        jax.jit(lambda h: linear_cross_entropy_value_and_grad(h, HEAD, LABELS)),
    ):
        found, made = call(hidden, HEAD, LABELS) if call is linear_cross_entropy_value_and_grad else call(hidden)
        assert_allclose(found, loss, rtol=1e-11)
        for got, wanted in zip(made[:2], grads[:2], strict=True):
            assert isinstance(got, jax.Array)
            assert_allclose(got, wanted, atol=1e-11)


def test_jax_differentiates_and_compiles():
    jax = pytest.importorskip("jax")
    jax.config.update("jax_enable_x64", True)
    arrays = [jax.numpy.asarray(each) for each in (HIDDEN, HEAD, BIAS)]
    labels = jax.numpy.asarray(LABELS)

    def loss(hidden, head, bias):
        return linear_cross_entropy(hidden, head, labels, linear_bias=bias, label_smoothing=0.1)

    wanted, grads = truth(HIDDEN, HEAD, LABELS, linear_bias=BIAS, label_smoothing=0.1)
    found, made = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(*arrays)
    assert_allclose(found, wanted, rtol=1e-11)
    for got, right in zip(made, grads, strict=True):
        assert_allclose(got, right, atol=1e-11)


def test_an_engine_of_a_user():
    class Counting:
        name, calls = "counting", 0

        def declines(self, rows):
            return None

        def reads_labels_free(self, rows):
            return True

        def stats(self, rows):
            Counting.calls += 1
            return generic.stats(rows)

        def grad(self, rows, stats, out=None):
            return generic.grad(rows, stats, out)

    loss, grads = truth(HIDDEN, HEAD, LABELS)
    for budget in (None, 10_000):
        found, made = linear_cross_entropy_value_and_grad(HIDDEN, HEAD, LABELS, engine=Counting(), memory_budget=budget)
        assert_allclose(found, loss, rtol=1e-11)
        assert_allclose(made[1], grads[1], atol=1e-11)
    assert Counting.calls > 2


# -- what is refused -------------------------------------------------------------------------------------------------

ONES = np.ones((ROWS, FEATURES), int)
REFUSED = [
    (TypeError, "linear_weight must have the dtype of hidden, float64; got float32", {"head": HEAD.astype(np.float32)}),
    (TypeError, "linear_bias must have the dtype of hidden, float64; got float16", {"linear_bias": BIAS.astype("f2")}),
    (TypeError, "hidden must be of dtype float16, .* got int64", {"hidden": ONES, "head": HEAD.astype(int)}),
    (TypeError, "hidden must be a plain array, got a MaskedArray", {"hidden": np.ma.array(HIDDEN)}),
    (ValueError, "hidden must have at least one dimension, the features", {"hidden": np.float64(3)}),
    (ValueError, r"linear_weight must have two dimensions, \(classes, features\); got shape \(5,\)", {"head": HEAD[0]}),
    (ValueError, r"\(5, 203\) does not fit hidden of shape \(37, 5\).*; write linear_weight.T", {"head": HEAD.T}),
    (ValueError, "the last dimension of both, here 4 and 5$", {"head": HEAD[:, :4]}),
    (ValueError, "linear_weight must have at least one class", {"head": HEAD[:0]}),
    (ValueError, r"linear_bias must have one number per class, \(203,\); got \(5,\)", {"linear_bias": BIAS[:5]}),
    (ValueError, r"target of shape \(36,\) does not fit logits of shape \(37, 203\)", {"target": LABELS[:-1]}),
    (IndexError, r"target\[0\] is 203, which is not a class", {"target": np.full(ROWS, CLASSES)}),
    (ValueError, "memory_budget must be a number of bytes, or text like .*; got '6 tons'", {"memory_budget": "6 tons"}),
    (TypeError, r"memory_budget must be a number of bytes, .*; got float \(0.5\)", {"memory_budget": 0.5}),
    (TypeError, "memory_budget must be a number of bytes, .*; got True", {"memory_budget": True}),
    (ValueError, "memory_budget must be at least 1 byte; got 0", {"memory_budget": 0}),
    (ValueError, "label_smoothing must be from 0 to 1, got 2", {"label_smoothing": 2}),
    (ValueError, "denominator is what the mean divides by", {"denominator": 2.0, "reduction": "sum"}),
    (ValueError, "sample_weight must have the shape of the rows", {"sample_weight": WEIGHT}),
    (ValueError, "engine 'vocab_parallel' works with other processes", {"engine": VocabParallel(Alone(), 0, CLASSES)}),
    (ValueError, "engine 'batch_parallel' works with other processes", {"engine": BatchParallel(Alone())}),
]  # fmt: skip


@pytest.mark.parametrize(("error", "says", "given"), REFUSED, ids=[each[1][:40] for each in REFUSED])
def test_bad_arguments(error, says, given):
    given = {"hidden": HIDDEN, "head": HEAD, "target": LABELS} | given
    arguments = [given.pop(name) for name in ("hidden", "head", "target")]
    for function in (linear_cross_entropy, linear_cross_entropy_value_and_grad):
        with pytest.raises(error, match=says):
            function(*arguments, **given)


def test_bad_out():
    good = [np.empty_like(HIDDEN), np.empty_like(HEAD), None]
    frozen = np.empty_like(HEAD)
    frozen.flags.writeable = False
    narrow, repeated = np.empty_like(HIDDEN, "f4"), as_strided(np.empty(FEATURES), HIDDEN.shape, (0, 8))
    cases = [
        (TypeError, "out must be a tuple of three", good[0]),
        (TypeError, "out must be a tuple of three", good[:2]),
        (TypeError, r"out\[0\] must be an array of the library of hidden", ["no", None, None]),
        (ValueError, r"out\[1\] must have the shape of linear_weight, .*; got \(37, 5\)", [None, good[0], None]),
        (TypeError, r"out\[0\] must have the dtype of hidden, float64; got float32", [narrow, None, None]),
        (ValueError, r"out\[1\] is read-only", [None, frozen, None]),
        (ValueError, r"out\[1\] shares memory with linear_weight; it must be memory apart", [None, HEAD, None]),
        (ValueError, r"out\[0\] shares memory with hidden", [HIDDEN, None, None]),
        (ValueError, r"out\[0\] has elements that share memory", [repeated, None, None]),
        (ValueError, r"out\[2\] is for the gradient of linear_bias, which is None", [None, None, BIAS.copy()]),
    ]  # fmt: skip
    for error, says, out in cases:
        with pytest.raises(error, match=says):
            linear_cross_entropy_value_and_grad(HIDDEN, HEAD, LABELS, out=out)
    both = np.empty(max(HIDDEN.size, HEAD.size))
    overlapping = both[: HIDDEN.size].reshape(HIDDEN.shape), both[: HEAD.size].reshape(HEAD.shape), None
    with pytest.raises(ValueError, match=r"out\[1\] shares memory with the array for the gradient of hidden"):
        linear_cross_entropy_value_and_grad(HIDDEN, HEAD, LABELS, out=overlapping)


def test_the_options_are_those_of_cross_entropy():
    def options(function):
        return {str(each) for each in inspect.signature(function).parameters.values() if each.kind is each.KEYWORD_ONLY}

    own = {"linear_bias: 'Values | None' = None", "memory_budget: 'int | str | None' = None"}
    axis = "axis: 'int' = -1"
    assert options(linear_cross_entropy) == options(xent_array.cross_entropy) - {axis} | own
    with_grad = options(cross_entropy_value_and_grad) - {axis, "return_stats: 'bool' = False"}
    assert options(linear_cross_entropy_value_and_grad) == with_grad | own


def test_no_warnings_leak():
    with np.errstate(all="raise"):
        hidden = np.full((3, 2), 1e300)
        found, _ = linear_cross_entropy_value_and_grad(hidden, np.full((4, 2), 1e300), [0, 1, 2])
    assert np.isnan(found)
