"""What users do that no table of semantics foresees: odd buffers, extreme options, copies of objects, transforms."""

import copy
import pickle

import numpy as np
import pytest
from close import assert_grad, assert_loss
from numpy.lib.stride_tricks import as_strided
from oracle import oracle

from xent_array import CrossEntropyLoss, cross_entropy, cross_entropy_grad, cross_entropy_value_and_grad, row_stats
from xent_array._engines import cpu

RNG = np.random.default_rng(0)
LOGITS = RNG.standard_normal((6, 5), dtype=np.float32)
LABELS = np.array([0, 3, 4, 1, 2, 2])


@pytest.mark.parametrize("strides", [(0, 4), (4, 4), (8, 4), (-8, 4), (20, 0)])
def test_out_with_elements_on_each_other_is_refused(strides):
    out = as_strided(np.zeros(60, np.float32)[30:], LOGITS.shape, strides)
    with pytest.raises(ValueError, match="share memory with each other"):
        cross_entropy_grad(LOGITS, LABELS, out=out)


@pytest.mark.parametrize("strides", [(20, 4), (40, 8), (-20, 4), (4, 24), (4, -24)])
def test_out_of_any_strides_that_are_apart(strides):
    out = as_strided(np.zeros(120, np.float32)[60:], LOGITS.shape, strides)
    assert cross_entropy_grad(LOGITS, LABELS, out=out) is out
    np.testing.assert_array_equal(out, cross_entropy_grad(LOGITS, LABELS))


@pytest.mark.parametrize("role", ["weight", "sample_weight", "grad_output"])
@pytest.mark.parametrize("value", [1e300, 1e-300])
@pytest.mark.parametrize("engine", ["cpu", "numpy", "generic"])
def test_numbers_beyond_the_arithmetic_do_not_warn(role, value, engine):
    given = {role: np.full(5 if role == "weight" else 6, value)}
    with np.errstate(all="raise"):
        cross_entropy_value_and_grad(LOGITS, LABELS, reduction="none", engine=engine, **given)


@pytest.mark.parametrize("softcap", [1e300, 1e-300])
def test_softcap_beyond_the_arithmetic_is_refused(softcap):
    with pytest.raises(
        ValueError, match=r"softcap must be a number that the arithmetic can hold, here float32; got 1e"
    ):
        cross_entropy(LOGITS, LABELS, softcap=softcap)
    assert np.isfinite(cross_entropy(LOGITS.astype(np.float64), LABELS, softcap=softcap))


def test_scalar_upstream_for_rows():
    whole = cross_entropy_grad(LOGITS, LABELS, reduction="none", grad_output=np.full(6, 3.0))
    np.testing.assert_array_equal(cross_entropy_grad(LOGITS, LABELS, reduction="none", grad_output=3), whole)


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda loss: pickle.loads(pickle.dumps(loss))])
def test_a_copy_of_a_loss_starts_before_its_first_forward(duplicate):
    sce = CrossEntropyLoss(label_smoothing=0.1)
    loss = sce.forward(LOGITS, LABELS)
    other = duplicate(sce)
    with pytest.raises(RuntimeError, match="call forward"):
        other.backward()
    assert other(LOGITS, LABELS) == loss
    np.testing.assert_array_equal(other.backward(), sce.backward())


def test_stats_pass_through_a_compiled_function():
    jax = pytest.importorskip("jax")
    logits, labels = jax.numpy.asarray(LOGITS), jax.numpy.asarray(LABELS)
    stats = jax.jit(row_stats)(logits, labels)
    grad = jax.jit(lambda x, y, stats: cross_entropy_grad(x, y, stats=stats))(logits, labels, stats)
    np.testing.assert_allclose(grad, cross_entropy_grad(LOGITS, LABELS), rtol=1e-5)


def test_torch_vmap():
    torch = pytest.importorskip("torch")
    logits, labels = torch.from_numpy(np.stack([LOGITS, 2 * LOGITS])), torch.from_numpy(np.stack([LABELS, LABELS]))
    mapped = torch.func.vmap(cross_entropy)(logits, labels)
    np.testing.assert_allclose(mapped, [cross_entropy(LOGITS, LABELS), cross_entropy(2 * LOGITS, LABELS)], rtol=1e-6)


def test_empty_thread_count_is_none(monkeypatch):
    for value in ("", " ", " 2 "):
        monkeypatch.setenv("XENT_ARRAY_NUM_THREADS", value)
        assert cpu.threads() >= 1
    assert cpu.threads() == 2


def test_small_gradients_round_to_float16_as_a_cast_does():
    """Every float16 below the smallest normal one, half-way to the next, and the float32 numbers beside each."""
    halves = np.arange(-1100, 1101, dtype=np.float32) * np.float32(2.0**-25)
    values = np.concatenate([halves, np.nextafter(halves, np.float32(np.inf)), np.nextafter(halves, np.float32(-1))])
    with np.errstate(under="ignore"):
        np.testing.assert_array_equal(cpu._rounded_to_half(values).astype(np.float16), values.astype(np.float16))


@pytest.mark.full
@pytest.mark.parametrize("axis", [0, 1])
def test_float16_gradient_of_a_large_batch(axis):
    shape = (64, 700) if axis else (700, 64)
    logits = (4 * RNG.standard_normal(shape)).astype(np.float16)
    labels = RNG.integers(shape[axis], size=64)
    truth = oracle(logits, labels, axis=axis)
    loss, grad = cross_entropy_value_and_grad(logits, labels, axis=axis, engine="cpu")
    assert_loss(loss, truth)
    assert_grad(grad, truth)
