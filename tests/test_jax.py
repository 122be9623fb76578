"""JAX: the same answers under jit, grad and vmap, and without 64-bit types."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from close import assert_grad, assert_loss
from numpy.testing import assert_array_equal
from oracle import oracle

from xent_array import (
    CrossEntropyLoss,
    cross_entropy,
    cross_entropy_grad,
    cross_entropy_value_and_grad,
    log_softmax,
    logsumexp,
    row_stats,
    softmax,
)

jax = pytest.importorskip("jax", reason="JAX is not installed")
jax.config.update("jax_enable_x64", True)
jnp = jax.numpy

# Rows with ties of the maximum, a mask, a confident row, and one that holds NaN and is ignored.
LOGITS = np.array([[2, 2, 1, 0], [0, 3, -np.inf, 1], [40, 0, 0, 0], [1, -2, 4, 0.5], [np.nan, 0, np.inf, 1]])
LABELS = np.array([0, 1, 0, 3, -100])
SOFT = np.array([[4, 2, 1, 1], [2, 2, 0, 4], [8, 0, 0, 0], [1, 0, 5, 2], [1, 1, 0, 0]]) / 8
SAMPLE_WEIGHT = np.array([1, 2, 0.5, 3, 0])
ARRAYS = {"weight": np.array([1, 0.5, 2, 0.25]), "sample_weight": SAMPLE_WEIGHT}
OPTIONS = [{}, {"z_loss": 0.1, "softcap": 3.0, "label_smoothing": 0.2}]

each_target = pytest.mark.parametrize("target", [LABELS, SOFT], ids=["index", "distribution"])
each_reduction = pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
each_option = pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options) or "plain")


def case(target, reduction, options, dtype="float64"):
    """The logits, the arrays that are traced with them, the options that are not, and the truth."""
    logits = LOGITS.astype(dtype)
    if "label_smoothing" in options:  # would put mass on the mask
        logits = np.where(logits == -np.inf, -5, logits)
    static = {"reduction": reduction, **options}
    return logits, {"target": target, **ARRAYS}, static, oracle(logits, target, **ARRAYS, **static)


@each_target
@each_reduction
@each_option
def test_jit(target, reduction, options):
    logits, arrays, static, truth = case(target, reduction, options, "float32")

    @jax.jit  # of everything at once, because compiling is what takes time here
    def every_way(logits, target, **weights):
        criterion = CrossEntropyLoss(**static, **weights)
        loss, grad = cross_entropy_value_and_grad(logits, target, **static, **weights)
        stats = row_stats(logits, target, **options, **weights)
        losses = loss, cross_entropy(logits, target, **static, **weights), criterion.forward(logits, target)
        grads = (
            grad,
            cross_entropy_grad(logits, target, stats=stats, **static, **weights),
            criterion.backward(),
        )
        return losses, grads

    losses, grads = every_way(logits, **arrays)
    for loss, grad in zip(losses, grads, strict=True):
        assert_loss(loss, truth)
        assert_grad(grad, truth)


def test_jit_of_the_softmax():
    x = LOGITS[:4]
    for function in (softmax, log_softmax, logsumexp):
        np.testing.assert_allclose(jax.jit(function)(x), function(x), rtol=1e-14)


@each_target
@each_reduction
@each_option
def test_grad(target, reduction, options):
    logits, arrays, static, truth = case(target, reduction, options)

    def loss(logits, arrays):
        return jnp.sum(cross_entropy(logits, **arrays, **static))

    grad = jax.jit(jax.grad(loss))(logits, arrays)
    assert_grad(grad, truth)
    assert_array_equal(grad[-1], 0)


def test_grad_of_concrete_arrays():
    x, labels = jnp.asarray(LOGITS), jnp.asarray(LABELS)
    truth = oracle(LOGITS, LABELS)
    assert_grad(jax.grad(cross_entropy)(x, labels), truth)
    assert_grad(cross_entropy_grad(x, labels), truth)


@pytest.mark.parametrize(
    "broken",
    [[np.nan, 0, 1, 2], [0, np.nan, 1, 2], [np.inf, 0, 1, 2], [-np.inf] * 4],
    ids=["NaN on the label", "NaN", "inf", "-inf throughout"],
)
def test_grad_of_a_row_without_a_softmax(broken):
    logits, labels = np.array([[2, 2, 1, 0], broken]), np.array([1, 0])
    assert_grad(jax.jit(jax.grad(cross_entropy))(logits, labels), oracle(logits, labels))


def test_grad_is_differentiable():
    options = {"target": jnp.asarray([2, 1]), "z_loss": 0.1}
    hessian = jax.jit(jax.hessian(partial(cross_entropy, **options)))
    jacobian = jax.jit(jax.jacobian(partial(cross_entropy_grad, **options)))
    np.testing.assert_allclose(jacobian(LOGITS[[0, 3]]), hessian(LOGITS[[0, 3]]), atol=1e-15)


@each_target
@each_reduction
def test_vmap(target, reduction):
    """A batch of problems at once, each with its own mean."""
    logits = np.stack([LOGITS, LOGITS[::-1], LOGITS + 0.5])
    targets = np.stack([target, target[::-1], target])
    weights = np.stack([SAMPLE_WEIGHT, SAMPLE_WEIGHT[::-1], SAMPLE_WEIGHT])
    losses, grads = jax.vmap(lambda x, t, s: cross_entropy_value_and_grad(x, t, sample_weight=s, reduction=reduction))(
        logits, targets, weights
    )
    for x, t, s, loss, grad in zip(logits, targets, weights, losses, grads, strict=True):
        truth = oracle(x, t, sample_weight=s, reduction=reduction)
        assert_loss(loss, truth)
        assert_grad(grad, truth)


@pytest.mark.parametrize("bad", [-1, 4, 2**40])
def test_bad_label_under_jit(bad):
    labels = np.array([0, bad, 2, 3])
    truth = oracle(LOGITS[:4], labels, reduction="sum")
    assert np.isnan(truth.loss)
    loss, grad = jax.jit(partial(cross_entropy_value_and_grad, reduction="sum"))(LOGITS[:4], labels)
    assert_loss(loss, truth)
    assert_grad(grad, truth)
    rows = jax.jit(partial(cross_entropy, reduction="none"))(LOGITS[:4], labels)
    assert_array_equal(np.isnan(rows), [False, True, False, False])
    of_stats = jax.jit(lambda x, labels: row_stats(x, labels).loss)(LOGITS[:4], labels)
    assert_array_equal(np.isnan(of_stats), [False, True, False, False])


def test_bad_label_that_can_be_read():
    with pytest.raises(IndexError, match=r"target\[1\] is 4"):
        cross_entropy(jnp.asarray(LOGITS), jnp.asarray([0, 4, 1, 2, 3]))


@pytest.mark.parametrize("function", [cross_entropy_value_and_grad, cross_entropy_grad])
def test_out_is_refused(function):
    x = jnp.asarray(LOGITS)
    with pytest.raises(TypeError, match="out"):
        function(x, jnp.asarray(LABELS), out=x)
    with pytest.raises(TypeError, match="out"):
        jax.jit(lambda x, labels: function(x, labels, out=x))(LOGITS, LABELS)


# -- modes in which JAX is strict --------------------------------------------------------------------------------

CLEAN = np.array([[2, 2, 1, 0], [0, 3, -7, 1], [40, 0, 0, 0], [1, -2, 4, 0.5], [1, 0, 5, 1]])
MODES = {
    "debug_nans": lambda: jax.debug_nans(True),
    "debug_infs": lambda: jax.debug_infs(True),
    "dtype_promotion": lambda: jax.numpy_dtype_promotion("strict"),
    "rank_promotion": lambda: jax.numpy_rank_promotion("raise"),
    "checking_leaks": lambda: jax.checking_leaks(),
    "transfer_guard": lambda: jax.transfer_guard("disallow"),
}


# All of them would take minutes, because each mode compiles anew: what a mode may object to.
STRICT = [*((mode, "float32", OPTIONS[1]) for mode in MODES), ("debug_nans", "float32", {})]
STRICT += [("dtype_promotion", "bfloat16", options) for options in OPTIONS]


@each_target
@pytest.mark.parametrize(("mode", "dtype", "options"), STRICT, ids=lambda part: part if isinstance(part, str) else "")
def test_strict_modes(mode, dtype, options, target):
    """Clean data, with a row to ignore, pass through every mode: eagerly, under jit, and under jax.grad."""
    x = jnp.asarray(CLEAN, dtype=dtype)
    given = {k: jnp.asarray(v, dtype="float32") for k, v in ARRAYS.items()} if options else {}
    t = jnp.asarray(target, dtype=dtype if target.dtype.kind == "f" else None)
    known = {k: np.asarray(v) for k, v in given.items()}
    truth = oracle(np.asarray(x), np.asarray(t), **known, **options)

    def value_and_grad(x, t, given):
        return cross_entropy_value_and_grad(x, t, **given, **options)

    def loss(x, t, given):
        return cross_entropy(x, t, **given, **options)

    def from_stats(x, t, given):
        stats = row_stats(x, t, **given, **options)
        assert all(part.shape == x.shape[:1] for part in (stats.lse, stats.loss, stats.p_max))
        return cross_entropy_grad(x, t, stats=stats, **given, **options)

    ways = [jax.jit(value_and_grad), jax.jit(jax.value_and_grad(loss))]
    ways += [value_and_grad, lambda *given: (loss(*given), from_stats(*given))]
    if mode != "transfer_guard":  # which lets JAX differentiate nothing at all outside jit
        ways.append(jax.value_and_grad(loss))
    with MODES[mode]():
        results = [way(x, t, given) for way in ways]
    for value, grad in results:
        assert_loss(value, truth)
        assert grad.dtype == x.dtype
        assert_grad(grad, truth)


def test_strict_modes_of_the_softmax():
    x = jnp.asarray(CLEAN, dtype="float32")
    for mode in MODES.values():
        for function in (softmax, log_softmax, logsumexp):
            with mode():
                result = function(x)
            np.testing.assert_allclose(result, function(CLEAN), rtol=1e-5)


def test_debug_nans_lets_masks_pass():
    """No NaN is made on the way to an answer that holds none: of -inf, and of a weight that nothing meets."""
    x = jnp.asarray([[1, -np.inf, 3], [-np.inf, 2, 2]], dtype="float32")
    labels, weight = jnp.asarray([0, 1]), jnp.asarray([1, 2, np.inf], dtype="float32")
    soft = jnp.asarray([[0.5, 0, 0.5], [0, 1, 0]], dtype="float32")
    for way in (lambda f: f, jax.jit):
        with jax.debug_nans(True):
            results = [
                *way(cross_entropy_value_and_grad)(x, labels),
                *way(cross_entropy_value_and_grad)(x, soft),
                *way(lambda x, t: cross_entropy_value_and_grad(x, t, weight=weight))(x, labels),
                way(jax.grad(cross_entropy))(x, labels),
                way(softmax)(x),
                way(logsumexp)(jnp.full((1, 3), -np.inf)),
            ]
        assert not any(np.isnan(result).any() for result in results)


def test_debug_nans_finds_a_bad_label_and_a_bad_logit():
    labels = jnp.asarray([0, 1, 4, 3, -100])
    for x, t in ((CLEAN, labels), (np.where(CLEAN == 40, np.nan, CLEAN), LABELS)):
        with jax.debug_nans(True), pytest.raises(FloatingPointError, match="nan"):
            cross_entropy(jnp.asarray(x), jnp.asarray(t), validate=False)


# -- shapes without numbers --------------------------------------------------------------------------------------


def exported(function, *arguments):
    return jax.export.export(jax.jit(function))(*arguments).call


def test_eval_shape_and_export():
    jax_export = pytest.importorskip("jax.export")
    shapes = jax.ShapeDtypeStruct((5, 4), "float32"), jax.ShapeDtypeStruct((5,), "int64")
    loss, grad = jax.eval_shape(partial(cross_entropy_value_and_grad, validate=True), *shapes)
    assert (loss.shape, grad.shape, loss.dtype, grad.dtype) == ((), (5, 4), "float32", "float32")
    (rows,) = jax_export.symbolic_shape("rows")
    for target in (LABELS, SOFT):
        logits = jnp.asarray(CLEAN)
        symbols = [jax.ShapeDtypeStruct((rows, *v.shape[1:]), v.dtype) for v in (logits, target)]
        for arguments in ((logits, jnp.asarray(target)), symbols):
            call = exported(cross_entropy_value_and_grad, *arguments)
            loss, grad = call(logits, jnp.asarray(target[::-1]))
            truth = oracle(CLEAN, target[::-1])
            assert_loss(loss, truth)
            assert_grad(grad, truth)


# -- several devices ---------------------------------------------------------------------------------------------

SHARDED = """
import itertools
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from close import assert_grad, assert_loss
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from oracle import oracle
from xent_array import cross_entropy, cross_entropy_grad, cross_entropy_value_and_grad, log_softmax, row_stats, softmax

devices = jax.devices()
assert len(devices) == 4
mesh = Mesh(np.array(devices).reshape(2, 2), ("batch", "class"))
half = Mesh(np.array(devices[:2]), ("batch",))


def on(spec, array, mesh=mesh):
    "The array spread over the mesh; on one device that it is not bound to, where spec is None."
    return jnp.asarray(array) if spec is None else jax.device_put(array, NamedSharding(mesh, spec))


rng = np.random.default_rng(0)
X = (3 * rng.normal(size=(4, 8))).astype("float32")
labels, soft = np.array([0, 7, -100, 3]), rng.random((4, 8)).astype("float32")
W, S = rng.random(8).astype("float32"), rng.random(4).astype("float32")
smooth = {"label_smoothing": 0.1, "z_loss": 0.1, "softcap": 5.0}

BATCH, CLASS, BOTH, WHOLE = P("batch"), P(None, "class"), P("batch", "class"), P()
cases = [  # of logits, of labels or soft targets, of the weight per class, of the weight per row
    (BATCH, BATCH, WHOLE, BATCH), (BATCH, None, None, None), (CLASS, WHOLE, P("class"), WHOLE),
    (CLASS, None, None, None), (BOTH, BATCH, P("class"), BATCH), (BOTH, WHOLE, None, None),
    (WHOLE, None, WHOLE, None), (None, BATCH, WHOLE, None),
]
for number, (of_logits, of_rows, of_weight, of_samples) in enumerate(cases):
    x = on(of_logits, X)
    for target, options in ((soft, smooth), (labels, smooth)) if number in (0, 4) else ((labels, {}),):
        of_target = of_logits if target is soft and of_rows is not None else of_rows
        t, w, s = on(of_target, target), on(of_weight, W), on(of_samples, S)
        options = {"reduction": ("none", "mean", "sum")[number % 3], **options}
        truth = oracle(X, target, weight=W, sample_weight=S, **options)

        def both(x, t, w, s):
            return cross_entropy_value_and_grad(x, t, weight=w, sample_weight=s, **options)

        def alone(x, t, w, s):
            return jnp.sum(cross_entropy(x, t, weight=w, sample_weight=s, **options))

        results = [both(x, t, w, s)]
        if number in (0, 3):
            results.append(jax.jit(both)(x, t, w, s))
            stats = row_stats(x, t, weight=w, **{k: v for k, v in options.items() if k != "reduction"})
            given = {"weight": w, "sample_weight": s, **options}
            results.append((cross_entropy(x, t, **given), cross_entropy_grad(x, t, stats=stats, **given)))
            results.append((results[0][0], jax.grad(alone)(x, t, w, s)))
        for loss, grad in results:
            assert_loss(loss, truth)
            assert_grad(grad, truth)
            assert x.committed <= (grad.sharding.device_set == x.sharding.device_set)
for function in (softmax, log_softmax):
    np.testing.assert_allclose(function(on(BOTH, X)), function(X), rtol=1e-5)

# One device that the arrays are bound to, others that they are not, and lists, which go where the logits are.
bound = jax.device_put(X, devices[1])
for t in (jax.device_put(labels, devices[1]), jnp.asarray(labels), labels.tolist()):
    assert cross_entropy(bound, t).devices() == {devices[1]}
assert not cross_entropy(jnp.asarray(X), jnp.asarray(labels)).committed
assert_loss(cross_entropy(on(BOTH, X), labels.tolist()), oracle(X, labels))
with pytest.raises(TypeError, match=r"target must be on the device of logits, .*1, but is on .*0"):
    cross_entropy(bound, jax.device_put(labels, devices[0]))
with pytest.raises(TypeError, match=r"target must be on the device of logits, .*0.*1.*2.*3.*, but is on .*1"):
    cross_entropy(on(BATCH, X), jax.device_put(labels, devices[1]))
with pytest.raises(TypeError, match=r"weight must be on the device of logits"):
    cross_entropy(on(BATCH, X), labels.tolist(), weight=on(WHOLE, W, half))

# Labels on several devices are looked at where that is asked for; a bad one makes its row NaN elsewhere.
bad = on(BATCH, np.array([0, 8, -100, 3]))
with pytest.raises(IndexError, match=r"target\\[1\\] is 8"):
    cross_entropy(on(BATCH, X), bad, validate=True)
assert np.isnan(cross_entropy(on(BATCH, X), bad, reduction="none")).tolist() == [False, True, False, False]
with pytest.raises(TypeError, match="out"):
    cross_entropy_grad(on(BATCH, X), on(BATCH, labels), out=on(BATCH, X))
"""


def test_several_devices():
    run(SHARDED, XLA_FLAGS="--xla_force_host_platform_device_count=4")


WITHOUT_X64 = """
import itertools
import jax
import jax.numpy as jnp
import numpy as np
from close import assert_grad, assert_loss
from oracle import oracle
from xent_array import cross_entropy, cross_entropy_value_and_grad

assert jnp.arange(1).dtype == "int32" and jnp.zeros(1).dtype == "float32"
rng = np.random.default_rng(0)
targets = rng.integers(0, 5, 6), rng.random((6, 5)).astype("float32")
weights = {"weight": rng.random(5).astype("float32"), "sample_weight": rng.random(6).astype("float32")}
for dtype, target, given, reduction in itertools.product(
    ("float32", "bfloat16"), targets, ({}, weights, {"z_loss": 0.1, "label_smoothing": 0.1}), ("none", "mean", "sum")
):
    x = jnp.asarray(3 * rng.normal(size=(6, 5)), dtype=dtype)
    truth = oracle(np.asarray(x), target, reduction=reduction, **given)
    arrays = {k: jnp.asarray(v) if isinstance(v, np.ndarray) else v for k, v in given.items()}
    loss, grad = cross_entropy_value_and_grad(x, jnp.asarray(target), reduction=reduction, **arrays)
    assert_loss(loss, truth)
    assert_grad(grad, truth)
    assert_loss(cross_entropy(x, jnp.asarray(target), reduction=reduction, **arrays), truth)

# What 32 bits cannot hold is ignored by no label, and matches none that it would be equal to in 32 bits.
x = jnp.asarray(rng.normal(size=(3, 5)), dtype="float32")
for dtype, label, ignores in (
    ("int32", 1, 2**32 + 1), ("int32", -1, 2**32 - 1), ("int32", 1, 2**40), ("uint32", 2**32 - 1, -1),
    ("uint32", 2**32 - 1, 2**64 - 1), ("uint32", 2**32 - 1, 2**32 - 1), ("int32", -(2**31), -(2**31)),
    ("int32", -(2**31), 2**31),
):
    labels = np.array([0, label, 2], dtype)
    truth = oracle(np.asarray(x), labels.astype(object), ignore_index=ignores, reduction="none")
    given = {"ignore_index": ignores, "reduction": "none", "validate": False}
    loss, grad = jax.jit(lambda x, t: cross_entropy_value_and_grad(x, t, **given))(x, jnp.asarray(labels))
    assert_loss(loss, truth)
    assert_grad(grad, truth)
    assert_loss(cross_entropy(x, jnp.asarray(labels), **given), truth)

for mode in (jax.debug_nans(True), jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise")):
    with mode:
        for target in (jnp.asarray([0, 1, -100]), jnp.ones((3, 5), dtype="float32")):
            truth = oracle(np.asarray(x), np.asarray(target))
            assert_loss(cross_entropy_value_and_grad(x, target)[0], truth)
            assert_grad(jax.grad(cross_entropy)(x, target), truth)
"""


def run(script, **variables):
    """Runs a script in a process of its own, with warnings as errors."""
    tests = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tests), str(tests.parent)]), **variables}
    command = [sys.executable, "-W", "error", "-c", script]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr) == (0, "")


def test_without_x64():
    run(WITHOUT_X64, JAX_ENABLE_X64="0")
