"""Linear cross-entropy of Dask arrays: the product stays lazy, and so do the loss and the gradients."""

import numpy as np
import pytest

from xent_array import cross_entropy_value_and_grad, linear_cross_entropy, linear_cross_entropy_value_and_grad

da = pytest.importorskip("dask.array", reason="Dask is not installed")
import dask  # noqa: E402

RNG = np.random.default_rng(0)
HIDDEN, WEIGHT, BIAS = RNG.standard_normal((40, 5)), RNG.standard_normal((23, 5)), RNG.standard_normal(23)
LABELS = RNG.integers(0, 23, 40)


def refuse(*args, **options):
    pytest.fail("computed")


@pytest.mark.parametrize("bias", [None, BIAS], ids=["no bias", "bias"])
@pytest.mark.parametrize("kept", [None, LABELS > 3], ids=["all rows", "unknown rows"])
def test_loss_and_gradients(bias, kept):
    hidden, labels, weight = da.from_array(HIDDEN, (7, 5)), da.from_array(LABELS, 7), da.from_array(WEIGHT, (10, 5))
    of_numpy, targets = (HIDDEN, LABELS) if kept is None else (HIDDEN[kept], LABELS[kept])
    if kept is not None:
        keep = da.from_array(kept, 7)
        hidden, labels = hidden[keep], labels[keep]
    given = {"label_smoothing": 0.1, "linear_bias": bias}
    with dask.config.set(scheduler=refuse):
        loss = linear_cross_entropy(hidden, weight, labels, **given)
        value, grads = linear_cross_entropy_value_and_grad(hidden, weight, labels, **given)
    logits = of_numpy @ WEIGHT.T + (0 if bias is None else bias)
    wanted, grad = cross_entropy_value_and_grad(logits, targets, label_smoothing=0.1)
    found = dask.compute(loss, value, *grads, scheduler="synchronous")
    rights = [wanted, wanted, grad @ WEIGHT, grad.T @ of_numpy, None if bias is None else grad.sum(axis=0)]
    for one, right in zip(found, rights, strict=True):
        if right is None:
            assert one is None
        else:
            np.testing.assert_allclose(one, right, rtol=1e-11, atol=1e-14)
