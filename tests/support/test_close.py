"""The assertions themselves: an honest computation passes, each wrong answer is rejected."""

import itertools

import numpy as np
import pytest

from .close import assert_confident, assert_grad, assert_loss
from .oracle import oracle

LARGE_C = 262144  # off-target gradients of about 4e-6: under any constant tolerance for float32


def honest(logits, target, *, weight=None, label_smoothing=0.0, z_loss=0.0, softcap=None):
    """Mean loss and gradient as the textbook has them, in the dtype of accumulation; N rows, C classes."""
    acc = np.result_type(logits.dtype, np.float32)
    N, C = logits.shape
    x = logits.astype(acc)
    tanh = np.zeros_like(x)
    if softcap is not None:
        tanh = np.tanh(x / acc.type(softcap))
        x = acc.type(softcap) * tanh
    q = (np.arange(C) == target[:, None]).astype(acc) if target.ndim == 1 else target.astype(acc)
    w = np.ones(C, acc) if weight is None else weight.astype(acc)
    denominator = acc.type(N) if target.ndim == 2 else w[target].sum(dtype=acc)
    a = w * ((1 - label_smoothing) * q + label_smoothing / C).astype(acc)
    max_ = x.max(-1, keepdims=True)
    e = np.exp(x - max_)
    total = e.sum(-1, keepdims=True)
    lse = max_ + np.log(total)
    loss = (a * (lse - x)).sum(dtype=acc) + acc.type(z_loss) * (lse**2).sum(dtype=acc)
    coef = a.sum(-1, keepdims=True) + 2 * acc.type(z_loss) * lse
    grad = (coef * (e / total) - a) * (1 - tanh * tanh) / denominator
    return (loss / denominator).astype(acc), grad.astype(logits.dtype)


# One class, ragged, a small vocabulary, and so many classes that 1/C is under float32's noise on the label.
@pytest.mark.full(but_one_per="dtype")
@pytest.mark.parametrize(
    ("C", "dtype"), [*itertools.product([1, 7, 1000], ["float16", "float32", "float64"]), (LARGE_C, "float32")]
)
def test_honest_code_passes(C, dtype):
    rng = np.random.default_rng(C)
    logits = (3 * rng.normal(size=(3, C))).astype(dtype)
    soft = (rng.uniform(-1, 3, size=(3, C)) / C).astype(dtype)
    weights = rng.uniform(-1, 2, size=C).astype(dtype)
    for target, weight, e, z, cap in itertools.product(
        [rng.integers(0, C, 3), soft], [None, weights], [0.0, 0.1], [0.0, 1e-2], [None, 5.0]
    ):
        options = {"weight": weight, "label_smoothing": e, "z_loss": z, "softcap": cap}
        loss, grad = honest(logits, target, **options)
        truth = oracle(logits, target, **options)
        assert_loss(loss, truth)
        assert_grad(grad, truth)


RNG = np.random.default_rng(0)
LOGITS = (3 * RNG.normal(size=(4, LARGE_C))).astype(np.float32)
TARGET = RNG.integers(0, LARGE_C, 4)
TRUTH = oracle(LOGITS, TARGET)
LOSS, GRAD = honest(LOGITS, TARGET)
ON_LABEL = np.arange(LARGE_C) == TARGET[:, None]


def with_entry(values, value):
    """A copy of the values whose last one is replaced."""
    changed = np.array(values)
    changed[(-1,) * changed.ndim] = value
    return changed


def shifted_labels():
    return honest(LOGITS, (TARGET + 1) % LARGE_C)


WRONG_GRADS = {
    "zero off the label": np.where(ON_LABEL, GRAD, 0),
    "zero on the label": np.where(ON_LABEL, 0, GRAD),
    "label not subtracted": np.where(ON_LABEL, GRAD + np.float32(1 / 4), GRAD),
    "zero": np.zeros_like(GRAD),
    "garbage": RNG.normal(size=GRAD.shape).astype(np.float32),
    "garbage of the right size": GRAD[:, ::-1],
    "shifted labels": shifted_labels()[1],
    "rows exchanged": GRAD[::-1],
    "wrong sign": -GRAD,
    "missing 1/N": 4 * GRAD,
    "one entry zero": with_entry(GRAD, 0),
    "one entry off by 1e-4 of itself": with_entry(GRAD, GRAD[-1, -1] * np.float32(1 + 1e-4)),
    "one entry NaN": with_entry(GRAD, np.nan),
    "one entry inf": with_entry(GRAD, np.inf),
    "wrong dtype": GRAD.astype(np.float64),
    "wrong byte order": GRAD.astype(GRAD.dtype.newbyteorder()),
    "wrong shape": GRAD[:, :-1],
    "transposed": GRAD.T,
}
WRONG_LOSSES = {
    "zero": np.zeros_like(LOSS),
    "shifted labels": shifted_labels()[0],
    "wrong sign": -LOSS,
    "missing 1/N": 4 * LOSS,
    "off by 1e-5 of itself": LOSS * np.float32(1 + 1e-5),
    "NaN": np.float32(np.nan),
    "inf": np.float32(np.inf),
    "wrong dtype": LOSS.astype(np.float64),
    "wrong shape": LOSS.reshape(1),
    "not reduced": oracle(LOGITS, TARGET, reduction="none").rows.astype(np.float32),
}


def test_the_right_answer_passes():
    assert_loss(LOSS, TRUTH)
    assert_grad(GRAD, TRUTH)


@pytest.mark.parametrize("wrong", WRONG_GRADS)
def test_wrong_grad_is_rejected(wrong):
    with pytest.raises(AssertionError, match=r"^grad"):
        assert_grad(WRONG_GRADS[wrong], TRUTH)


@pytest.mark.parametrize("wrong", WRONG_LOSSES)
def test_wrong_loss_is_rejected(wrong):
    with pytest.raises(AssertionError, match=r"^loss"):
        assert_loss(WRONG_LOSSES[wrong], TRUTH)


def test_non_finite_answers_must_match():
    logits = np.array([[0, -np.inf], [0, np.nan], [0, 0]], np.float32)
    truth = oracle(logits, np.array([1, 0, -100]), reduction="none")
    loss = np.array([np.inf, np.nan, 0], np.float32)
    grad = np.array([[1, -1], [np.nan, np.nan], [0, 0]], np.float32)
    assert_loss(loss, truth)
    assert_grad(grad, truth)
    for i, wrong in [(0, -np.inf), (0, np.nan), (0, 3e38), (1, np.inf), (1, 0), (2, 1e-45), (2, np.nan)]:
        with pytest.raises(AssertionError):
            assert_loss(np.where(np.arange(3) == i, np.float32(wrong), loss), truth)
    for i, wrong in [(1, 0), (1, np.inf), (2, 1e-45)]:  # an ignored row is 0, not nearly 0
        with pytest.raises(AssertionError):
            assert_grad(np.where(np.arange(3)[:, None] == i, np.float32(wrong), grad), truth)


def test_beyond_the_range_of_the_dtype_is_inf():
    logits = np.zeros((1, 2), np.float16)
    truth = oracle(logits, np.array([0]), reduction="none", grad_output=np.array([1e6]))
    assert_grad(np.array([[-np.inf, np.inf]], np.float16), truth)
    with pytest.raises(AssertionError):
        assert_grad(np.array([[-65504, 65504]], np.float16), truth)


def test_message_names_the_worst_element():
    with pytest.raises(AssertionError, match=r"^grad: 1 of 1048576 .* at \(3, 262143\): got 1, wanted .* units"):
        assert_grad(with_entry(GRAD, 1), TRUTH)


def confident_rows(dtype, exact):
    """Rows whose label holds nearly all the mass, and a loss and gradient for them that keep every digit."""
    logits = np.zeros((50, 5))
    logits[:, 1:] = -np.random.default_rng(0).integers(12, 40, size=(50, 4))
    if not exact:
        logits = 7.3 + logits / 1.7
    logits = logits.astype(dtype)
    e = np.exp(logits[:, 1:].astype(np.float32) - logits[:, :1])
    rest = e.sum(-1)
    grad = np.column_stack([-rest, e]) / (1 + rest)[:, None]
    return np.log1p(rest), grad.astype(dtype), oracle(logits, np.zeros(50, int), reduction="none")


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_accurate_confident_rows_pass(dtype, exact):
    loss, grad, truth = confident_rows(dtype, exact)
    assert_confident(loss, grad, truth, exact=exact)


@pytest.mark.parametrize("exact", [True, False])
def test_inaccurate_confident_rows_are_rejected(exact):
    loss, grad, truth = confident_rows("float32", exact)
    p = 1 / (1 + np.expm1(loss))
    cancelled = np.column_stack([p - 1, grad[:, 1:]])  # what p - 1 gives in place of -rest / (1 + rest)
    assert_grad(cancelled, truth)  # right to 4 units, which know nothing of confident rows
    off = np.float32(1 + 100 * 2**-23)  # margins stay under 40, so every bar under 50 eps
    for wrong_loss in (-np.log(p), np.zeros_like(loss), loss * off):
        with pytest.raises(AssertionError, match=r"^loss"):
            assert_confident(wrong_loss, grad, truth, exact=exact)
    for wrong_grad in (cancelled, np.zeros_like(grad), grad * off):
        with pytest.raises(AssertionError, match=r"^grad"):
            assert_confident(loss, wrong_grad, truth, exact=exact)
