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


WITHOUT_X64 = """
import itertools
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
"""


def test_without_x64():
    tests = Path(__file__).parent
    environment = os.environ | {
        "JAX_ENABLE_X64": "0",
        "PYTHONPATH": os.pathsep.join([str(tests), str(tests.parent)]),
    }
    command = [sys.executable, "-W", "error", "-c", WITHOUT_X64]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr) == (0, "")
