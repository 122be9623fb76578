"""`merge_stats`: the stats of slices of the classes become those of whole rows, in every library."""

import itertools
from dataclasses import replace

import array_api_strict
import numpy as np
import pytest
from numpy.testing import assert_array_equal
from support.close import assert_grad, assert_loss
from support.oracle import oracle

from xent_array import cross_entropy_grad, merge_stats, row_stats

CLASSES = 120
CUTS = [[], [1], [17, 90], [0, 60, 60, 120], [*range(10, CLASSES, 10)], [*range(1, CLASSES)]]


def slices(backend, x, target, cuts, dtype, **options):
    """The stats of each slice; a label that lies in another one is ignored."""
    for start, stop in itertools.pairwise([0, *cuts, x.shape[1]]):
        if start == stop:
            continue
        of_slice = target[:, start:stop] if target.ndim == 2 else target - start
        if target.ndim == 1:
            of_slice = np.where((of_slice >= 0) & (of_slice < stop - start), of_slice, -100)
        yield row_stats(backend.array(x[:, start:stop], dtype), backend.array(of_slice), **options)


def assert_lse(found, truth, x):
    unit = np.finfo(found.dtype).eps * (1 + 2 * abs(truth.lse))
    assert_loss(found, replace(truth, loss=truth.lse, unit_loss=unit))


@pytest.mark.parametrize("kind", ["labels", "distributions"])
@pytest.mark.parametrize("cuts", CUTS, ids=len)
def test_slices_of_the_classes(backend, cuts, kind):
    if backend.name in ("emulated", "dask") and len(cuts) > 20:  # where each part is a compilation, or many tasks
        cuts = cuts[::10]
    rng = np.random.default_rng(len(cuts))
    for dtype, engine in itertools.product(backend.usual_dtypes, backend.engines):
        x = backend.numpy(backend.array(3 * rng.standard_normal((9, CLASSES)), dtype))
        target = rng.integers(CLASSES, size=9) if kind == "labels" else rng.random((9, CLASSES)).astype(np.float32)
        stats = merge_stats(*slices(backend, x, target, cuts, dtype, engine=engine))
        truth = oracle(x, target, reduction="none")
        assert_loss(backend.numpy(stats.loss), truth)
        assert_lse(backend.numpy(stats.lse), truth, x)
        if kind == "labels":
            assert_array_equal(backend.numpy(stats.correct), x.argmax(axis=1) == target)
        else:
            assert stats.correct is None
        given = backend.array(x, dtype), backend.array(target)
        grad = cross_entropy_grad(*given, stats=stats, reduction="none", engine=engine)
        assert_grad(backend.numpy(grad), truth)


# The label is the first or the second of two that are largest, or of all; or there is no softmax.
TIES = np.array(
    [[1, 4, 4, 0], [1, 4, 4, 0], [2, 2, 2, 2], [2, 2, 2, 2], [5, 1, 0, 0], [-np.inf, 2, -np.inf, 2],
     [np.nan, 1, 2, 0], [0, 1, 2, np.nan], [1, np.inf, 0, np.inf], [-np.inf] * 4]
)  # fmt: skip
TIED_LABELS = np.array([1, 2, 0, 3, 1, 1, 2, 2, 1, 0])


@pytest.mark.parametrize("cuts", [[1], [2], [3], [1, 2], [1, 3], [2, 3], [1, 2, 3]], ids=str)
def test_ties_and_rows_without_a_softmax(backend, cuts):
    for engine in backend.engines:
        stats = merge_stats(*slices(backend, TIES, TIED_LABELS, cuts, "float32", engine=engine))
        whole = row_stats(backend.array(TIES, "float32"), backend.array(TIED_LABELS), engine=engine)
        assert_array_equal(backend.numpy(stats.correct), backend.numpy(whole.correct))
        assert_array_equal(np.isnan(backend.numpy(stats.lse)), np.arange(10) >= 6)
        for name in ("lse", "loss", "p_max"):
            found, wanted = (backend.numpy(getattr(each, name)) for each in (stats, whole))
            np.testing.assert_allclose(found, wanted, rtol=1e-6)


def test_a_label_in_a_slice_that_is_masked(backend):
    x, labels = np.array([[-np.inf, -np.inf, 1, 2], [-np.inf, -np.inf, 1, 2]]), np.array([0, 3])
    for engine in backend.engines:
        stats = merge_stats(*slices(backend, x, labels, [2], "float32", engine=engine))
        assert_array_equal(np.isinf(backend.numpy(stats.loss)), [True, False])
        assert_array_equal(backend.numpy(stats.correct), [False, True])


def test_one_part_is_the_whole():
    stats = row_stats(np.eye(3), [0, 1, 1])
    assert merge_stats(stats) is stats


def test_parts_that_do_not_belong_together():
    stats = row_stats(np.eye(3), [0, 1, 1])
    for parts, error, says in (
        ([], ValueError, "at least one RowStats; got none"),
        ([stats, 3], TypeError, "argument 1 of merge_stats must be a RowStats; got int"),
        ([[stats, stats]], TypeError, "argument 0 of merge_stats must be a RowStats; got list"),
        ([stats, row_stats(np.eye(4), [0, 1, 1, 2])], ValueError, "the same rows; got the shapes (3,) and (4,)"),
        ([stats, stats, row_stats(np.eye(3, dtype=np.float32), [0, 1, 1])], TypeError, "float64 and float32"),
        ([stats, row_stats(np.eye(3), np.eye(3))], TypeError, "labels in all parts, or distributions in all"),
    ):
        with pytest.raises(error) as raised:
            merge_stats(*parts)
        assert says in str(raised.value)


def test_parts_of_two_libraries():
    stats, other = (row_stats(xp.eye(3), xp.asarray([0, 1, 1])) for xp in (np, array_api_strict))
    with pytest.raises(TypeError, match=r"one library; got arrays of .*numpy and array_api_strict \(arguments 0 and 2"):
        merge_stats(stats, stats, other)


def test_a_chain_of_merges_is_less_exact():
    """Which is why parts are merged as a tree; see the docstring."""
    rng, count = np.random.default_rng(0), 2000
    x = rng.standard_normal((50, count)).astype(np.float32)
    q = rng.random((50, count)).astype(np.float32)
    parts = [row_stats(x[:, k : k + 1], q[:, k : k + 1]) for k in range(count)]
    chain = parts[0]
    for part in parts[1:]:
        chain = merge_stats(chain, part)
    truth = oracle(x, q, reduction="none")
    errors = [np.abs(stats.loss - truth.loss).max() for stats in (merge_stats(*parts), chain)]
    assert_loss(merge_stats(*parts).loss, truth)
    assert errors[1] > 3 * errors[0]
