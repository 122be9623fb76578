"""Row stats merge: whatever parts the classes are cut into, and in whatever order the parts meet.

The parts come from the formulas in float32 and float64 NumPy; target, weights and smoothing belong to whole rows.
"""

import functools
import itertools
from dataclasses import replace

import numpy as np
import pytest
from support.close import assert_grad, assert_loss
from support.oracle import oracle

from xent_array import RowStats, cross_entropy_grad
from xent_array._rows import merge

SPLITS = 6000
ROWS = 40  # of them at once


def stats_of(x, a, part):
    """The stats of the classes in `part` (a mask per row), each sum over those terms only."""
    with np.errstate(all="ignore"):
        inside = np.where(part, x, -np.inf)
        top = inside.argmax(axis=1, keepdims=True)
        largest = np.take_along_axis(inside, top, axis=1)
        below = np.where(part, x - np.where(np.isfinite(largest), largest, 0), 0)
        others = part & (np.arange(x.shape[1]) != top)
        return RowStats(
            max=largest[:, 0],
            rest=np.sum(np.exp(below), axis=1, where=others),
            gap=np.sum(np.where(a == 0, 0, -a * below), axis=1, where=part),
            mass=np.sum(a, axis=1, where=part),
        )


def problem(rng, dtype, target):
    """Logits, target, the options that weigh it, and a: w·q after smoothing, in the dtype of the logits.

    A logit in ten is -inf, ties are common, and the classes of a row may sit at levels far from each other.
    """
    C = int(rng.integers(1, 41))
    level = rng.choice([0, 0, 0, 40, -300], size=(ROWS, C)) * rng.integers(0, 2, (ROWS, 1))
    x = level + rng.choice([rng.integers(-2, 3, (ROWS, C)), 3 * rng.normal(size=(ROWS, C))])
    x = np.where(rng.random((ROWS, C)) < 0.1 * rng.integers(0, 2, (ROWS, 1)), -np.inf, x).astype(dtype)
    labels = rng.integers(0, C, ROWS)
    if target == "index":
        given, q = labels, (np.arange(C) == labels[:, None]).astype(dtype)
    else:
        signed = rng.normal(size=(ROWS, C))
        given = q = np.where(rng.random((ROWS, C)) < 0.3, 0, abs(signed) if target == "soft" else signed).astype(dtype)
    smoothing = float(rng.choice([0, 0.1]))
    weight = rng.choice([np.ones(C), rng.integers(-2, 9, C) / 4]).astype(dtype)
    a = (weight * ((1 - smoothing) * q + smoothing / C)).astype(dtype)
    return x, given, {"weight": weight, "label_smoothing": smoothing}, a


def assert_whole(merged, x, target, **options):
    """The stats are those of whole rows: loss, lse, and the gradient that starts from them."""
    truth = oracle(x, target, reduction="none", **options)
    with np.errstate(all="ignore"):
        assert_loss(merged.loss, truth)
        unit = np.finfo(x.dtype).eps * (1 + 2 * abs(truth.lse))
        assert_loss(merged.lse, replace(truth, loss=truth.lse, unit_loss=unit))
    assert_grad(cross_entropy_grad(x, target, reduction="none", stats=merged, **options), truth)


def in_turn(parts):
    with np.errstate(all="ignore"):
        return functools.reduce(merge, parts)


def in_any_order(parts, rng):
    """Any two neighbours first: every tree of merges may come up."""
    parts = list(parts)
    while len(parts) > 1:
        k = int(rng.integers(len(parts) - 1))
        parts[k : k + 2] = [in_turn(parts[k : k + 2])]
    return parts[0]


@pytest.mark.full(but_one_per="target")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("target", ["index", "soft", "signed"])
def test_random_splits(target, dtype):
    for seed in range(SPLITS // ROWS):
        rng = np.random.default_rng(seed)
        x, given, options, a = problem(rng, dtype, target)
        count = int(rng.integers(1, 9))
        owner = rng.integers(0, count, x.shape)  # each row has a split of its own; some parts are empty
        parts = [stats_of(x, a, owner == k) for k in rng.permutation(count)]
        assert_whole(in_any_order(parts, rng), x, given, **options)


@pytest.mark.full(but_one_per="target")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("target", ["index", "soft", "signed"])
def test_1024_merges(target, dtype):
    rng = np.random.default_rng(0)
    C = 1025
    classes = np.arange(C)
    x = (4 * rng.normal(size=(ROWS, C))).astype(dtype)
    x[::2] = np.round(x[::2])
    given = rng.integers(0, C, ROWS) if target == "index" else rng.random((ROWS, C)).astype(dtype)
    if target == "signed":
        given -= 0.5
    a = (classes == given[:, None]).astype(dtype) if target == "index" else given
    one_class_each = [stats_of(x, a, np.broadcast_to(classes == k, x.shape)) for k in classes]
    for order in (classes, rng.permutation(C)):
        parts = [one_class_each[k] for k in order]
        assert_whole(in_any_order(parts, rng), x, given)
        if target == "index":  # mass all over a row, summed one class after another, drifts like any such sum
            assert_whole(in_turn(parts), x, given)


NOTHING = RowStats(*(np.array(v, np.float32) for v in ([-np.inf], [0], [0], [0])))


def one_row(x, a):
    x, a = np.array([x], np.float32), np.array([a], np.float32)
    return stats_of(x, a, np.ones(x.shape, bool))


def test_identity():
    for stats in (one_row([1, 2, 2], [0.5, 0, 1]), one_row([1, -np.inf], [0, 1])):
        assert in_turn([stats, NOTHING]) == stats
        assert in_turn([NOTHING, stats]) == stats
        assert in_turn([NOTHING, NOTHING, stats, NOTHING]) == stats
    nothing = in_turn([NOTHING, NOTHING])
    assert np.isnan([nothing.lse, nothing.loss, nothing.p_max]).all()


def test_ties_across_parts():
    merged = in_turn([one_row([3, 1], [0, 0]), one_row([0, 3], [0, 1])])
    np.testing.assert_allclose(merged.rest, 1 + np.exp(-2) + np.exp(-3), rtol=1e-6)
    np.testing.assert_allclose(merged.p_max, 1 / (2 + np.exp(-2) + np.exp(-3)), rtol=1e-6)
    assert (merged.max, merged.gap, merged.mass) == (3, 0, 1)


def test_masked_part_that_holds_target_mass():
    for parts in itertools.permutations([one_row([0, 0], [0.5, 0]), one_row([-np.inf] * 2, [0, 0.5])]):
        merged = in_turn(parts)
        assert (merged.loss, merged.mass) == (np.inf, 1)
        np.testing.assert_allclose(merged.lse, np.log(2), rtol=1e-6)


@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_part_without_a_softmax(broken):
    for parts in itertools.permutations([one_row([broken, 0], [0, 0]), one_row([1, 2], [1, 0]), NOTHING]):
        merged = in_turn(parts)
        assert np.isnan([merged.lse, merged.loss, merged.p_max]).all()


def test_parts_that_are_masked_by_a_number():
    """Under finfo.min masks max - x_k is 3e38: it meets the mass of its part once, and overflows nowhere."""
    lowest = np.finfo(np.float32).min
    x = np.array([[1, lowest, 2, lowest, lowest, 0.5]], np.float32)
    q = np.array([[0.3, 0.1, 0.2, 0.1, 0, 0.3]], np.float32)
    parts = [stats_of(x, q, np.isin(np.arange(6), [part])) for part in ([0], [1, 4], [2, 5], [3])]
    for order in itertools.permutations(parts):
        assert_whole(in_turn(order), x, q)
