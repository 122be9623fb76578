"""The table of decided semantics: each row on every backend, loss and gradient, against the oracle.

`check` compares loss and gradient with the oracle, for every engine, float dtype and reduction, and the oracle with
the literal values that the table or a pencil gives. The data are multiples of powers of two, so that every float
dtype holds the same numbers, and have one of two shapes wherever that will do (JAX compiles for each).
"""

import itertools
import warnings
from dataclasses import replace

import array_api_strict
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from support.close import assert_confident, assert_grad, assert_loss
from support.lazy import computed
from support.oracle import EPS, NORMAL, oracle
from support.sizes import resized

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
from xent_array._engines.cpu import path

REDUCTIONS = ("none", "mean", "sum")
NAN, INF = np.nan, np.inf

# 4 rows of 5 classes: few enough to print, and odd against any vector width.
LOGITS = np.array([[2, 1, 0.125, -3, 0.5], [0.25, -1.5, 4, 1, 0], [-2, 3.5, 3, 0.75, -0.125], [1.25, 1.25, -5, 6, 2]])
LABELS = np.array([0, 3, 4, 1])
SOFT = np.array([[4, 4, 4, 3, 1], [0, 0, 0, 0, 16], [8, 0, 0, 8, 0], [1, 2, 4, 8, 1]]) / 16
WEIGHT = np.array([0.5, 2, 1, 0.25, 4])
SAMPLE_WEIGHT = np.array([1, 0.5, 2, 3])
INPUTS = {"target": LABELS, "weight": WEIGHT, "sample_weight": SAMPLE_WEIGHT, "grad_output": SAMPLE_WEIGHT}

# Two rows a pencil can follow: H = log 2 and log(1 + 1/e), p = (1/2, 1/2) and (0.2689, 0.7311).
PAIR, PAIR_LABELS, PAIR_ONE_HOT = np.array([[0, 0], [0, 1.0]]), np.array([0, 1]), np.eye(2)

each_target = pytest.mark.parametrize("target", [LABELS, SOFT], ids=["index", "distribution"])


def check(backend, logits, target, *, dtypes=None, validate=None, literal=None, **options):
    """Everything that is computed is what the oracle says; what it says for a reduction is literal[reduction]."""
    for dtype, reduction in itertools.product(dtypes or backend.usual_dtypes, REDUCTIONS):
        x, t, given = on(backend, dtype, logits, target, options)
        known = {k: backend.numpy(v) if isinstance(options[k], np.ndarray) else v for k, v in given.items()}
        truth = oracle(backend.numpy(x), backend.numpy(t), reduction=reduction, **known)
        if literal and reduction in literal:
            loss, grad = literal[reduction]
            assert_allclose(np.float64(truth.loss), loss, rtol=1e-3)
            assert_allclose(np.float64(truth.grad), grad, rtol=1e-3)
        for engine in backend.engines:
            ways = every_way(x, t, reduction=reduction, validate=validate, engine=engine, **given)
            for way, (loss, grad) in ways.items():
                try:
                    assert_loss(backend.numpy(loss), truth)
                    assert_grad(backend.numpy(grad), truth)
                except AssertionError as e:
                    e.add_note(f"{way} of {dtype} logits, reduction={reduction!r}, engine={engine!r}")
                    raise


def on(backend, dtype, logits, target, options):
    """The case on a backend: floats in the dtype of the logits, integers and booleans in their own."""
    given = {k: backend.array(v, dtype) if isinstance(v, np.ndarray) else v for k, v in options.items()}
    return (backend.array(logits, dtype), backend.array(target, dtype if target.dtype.kind == "f" else None), given)


def every_way(logits, target, *, reduction, grad_output=None, **options):
    """{how it is computed: (loss, grad)}, from one read of the logits and from two."""
    stats = row_stats(logits, target, **options)
    options["reduction"] = reduction
    return {
        "value and grad": cross_entropy_value_and_grad(logits, target, grad_output=grad_output, **options),
        "value, grad from stats": (
            cross_entropy(logits, target, **options),
            cross_entropy_grad(logits, target, stats=stats, grad_output=grad_output, **options),
        ),
    }


def refuses(exception, logits, target, *, says, **options):
    """Every function that takes these options raises, and says what was given."""
    functions = [cross_entropy_value_and_grad, cross_entropy_grad]
    if "grad_output" not in options:
        functions += [cross_entropy, lambda A, Y, **options: CrossEntropyLoss(**options).forward(A, Y)]
        if "reduction" not in options:
            functions.append(row_stats)
    for function in functions:
        with pytest.raises(exception) as raised:
            computed(function(logits, target, **options))
        for word in [says] if isinstance(says, str) else says:
            assert word in str(raised.value), f"{raised.value} does not name {word}"


def refuses_labels(backend, labels, *, says, **options):
    """IndexError where labels are looked at: when asked, or where that costs nothing. Else those rows are NaN."""
    logits, target = backend.array(LOGITS), backend.array(labels)
    for engine in backend.engines:
        refuses(IndexError, logits, target, says=says, validate=True, engine=engine, **options)
        if backend.looks_at_labels:
            refuses(IndexError, logits, target, says=says, engine=engine, **options)
            continue
        loss = backend.numpy(cross_entropy(logits, target, reduction="none", engine=engine, **options))
        np.testing.assert_array_equal(np.isnan(loss), [int(label) not in range(5) for label in labels])


# -- what a row counts -------------------------------------------------------------------------------------------


def test_mean_of_labels_with_weight(backend):
    mean = (0.693147 + 3 * 0.313262) / 4, [[-0.125, 0.125], [0.201706, -0.201706]]
    check(backend, PAIR, PAIR_LABELS, weight=np.array([1.0, 3]), literal={"mean": mean})
    check(backend, LOGITS, LABELS, weight=WEIGHT)


def test_mean_of_distributions_with_weight(backend):
    mean = (0.693147 + 3 * 0.313262) / 2, [[-0.25, 0.25], [0.403412, -0.403412]]
    check(backend, PAIR, PAIR_ONE_HOT, weight=np.array([1.0, 3]), literal={"mean": mean})
    check(backend, LOGITS, SOFT, weight=WEIGHT)


@each_target
def test_sample_weight(backend, target):
    mean = (0.693147 + 3 * 0.313262) / 4, [[-0.125, 0.125], [0.201706, -0.201706]]
    none = [0.693147, 0.939785], [[-0.5, 0.5], [0.806824, -0.806824]]
    pair = PAIR_LABELS if target is LABELS else PAIR_ONE_HOT
    check(backend, PAIR, pair, sample_weight=np.array([1.0, 3]), literal={"mean": mean, "none": none})
    for weight in (None, WEIGHT):
        check(backend, LOGITS, target, sample_weight=SAMPLE_WEIGHT, weight=weight)


@each_target
def test_label_smoothing(backend, target):
    mean = (0.693147 + 0.413262) / 2, [[-0.2, 0.2], [0.084471, -0.084471]]
    pair = PAIR_LABELS if target is LABELS else PAIR_ONE_HOT
    check(backend, PAIR, pair, label_smoothing=0.2, literal={"mean": mean})
    for smoothing, weight in itertools.product([0.1, 1.0], [None, WEIGHT]):
        check(backend, LOGITS, target, label_smoothing=smoothing, weight=weight)


@pytest.mark.parametrize("poison", [NAN, INF, -INF, 1.0])
def test_ignored_row_is_inert(backend, poison):
    logits = np.array([[0, 1], [poison, poison]])
    labels = np.array([1, -100])
    kept = [0.313262, 0], [[0.268941, -0.268941], [0, 0]]
    check(backend, logits, labels, literal={"none": kept, "mean": (0.313262, kept[1])})
    everything = {"weight": np.array([1.0, 3]), "label_smoothing": 0.125, "z_loss": 0.25, "softcap": 4.0}
    check(backend, logits, labels, sample_weight=np.array([2.0, 1]), **everything)
    check(backend, logits, np.array([0, 1]), ignore_index=1, **everything)  # a class may be the one


def test_all_rows_ignored(backend):
    zeros = np.zeros_like(LOGITS)
    literal = {"none": (np.zeros(4), zeros), "mean": (NAN, zeros), "sum": (0, zeros)}
    check(backend, LOGITS, np.full(4, -100), literal=literal)
    check(backend, LOGITS, np.full(4, -100), literal=literal, weight=WEIGHT, label_smoothing=0.1, z_loss=0.25)


@pytest.mark.parametrize("target", [np.zeros(0, int), np.zeros((0, 5))], ids=["index", "distribution"])
def test_no_rows(backend, target):
    logits = np.zeros((0, 5))
    literal = {"none": (np.zeros(0), logits), "mean": (NAN, logits), "sum": (0, logits)}
    check(backend, logits, target, literal=literal)
    check(backend, logits, target, literal=literal, sample_weight=np.zeros(0), weight=WEIGHT)


# The ends of the range, and a value that wraps into it where an index is cut to 32 bits.
@pytest.mark.parametrize("bad", [-1, 5, -101, 2**32 + 1])
def test_bad_class_index(backend, bad):
    labels = np.array([0, 3, bad, bad - 1])
    refuses_labels(backend, labels, says=["[2]", str(bad)])
    labels[3] = 1
    nan_row = np.where(np.arange(4) == 2, NAN, 0)
    check(backend, LOGITS, labels, validate=False, weight=WEIGHT, label_smoothing=0.1, z_loss=0.25)
    check(
        backend,
        np.zeros((4, 5)),
        labels,
        validate=False,
        literal={
            "none": (np.log(5) + nan_row, 0.2 - np.eye(5)[[0, 3, 0, 1]] + nan_row[:, None]),
            "mean": (NAN, (0.2 - np.eye(5)[[0, 3, 0, 1]] + nan_row[:, None]) / 3),
        },
    )


def test_an_upstream_of_0_does_not_silence_a_bad_class_index_and_a_sample_weight_of_0_does(backend):
    labels = backend.array(np.array([0, 5, -100, 1]))
    for engine, s in itertools.product(backend.engines, ([1.0, 1, 1, 1], [1.0, 0, 1, 1])):
        options = {"validate": False, "sample_weight": np.array(s), "grad_output": 0.0}
        given = options | {"sample_weight": backend.array(options["sample_weight"], "float32"), "engine": engine}
        grad = backend.numpy(cross_entropy_grad(backend.array(LOGITS, "float32"), labels, **given))
        options.pop("validate")
        truth = oracle(LOGITS.astype(np.float32), [0, 5, -100, 1], **options)
        assert_grad(grad, truth)
        assert np.isnan(grad[1]).all() == (s[1] != 0)
        assert not grad[[0, 2, 3]].any()


# For each dtype a value out of range; the last one is beyond int64, and would be class 1 in 32 bits.
@pytest.mark.parametrize(
    ("dtype", "bad"),
    [
        *[("int8", -128), ("int16", -1), ("int32", 5), ("int64", 2**63 - 1)],
        *[("uint8", 255), ("uint16", 5), ("uint32", 2**31), ("uint64", 2**63 + 1)],
    ],
)
def test_class_index_of_every_integer_dtype(backend, dtype, bad):
    check(backend, LOGITS, LABELS.astype(dtype))
    labels = np.array([0, 3, bad, 1], dtype)
    refuses_labels(backend, labels, says=["[2]", str(bad)])
    check(backend, LOGITS, labels, validate=False)


# The wrapped value of -100 in each unsigned dtype; then one that int8 wraps to label 3.
@pytest.mark.parametrize(
    ("dtype", "label", "ignore_index"),
    [
        *[("uint8", 156, -100), ("uint16", 2**16 - 100, -100), ("uint32", 2**32 - 100, -100)],
        *[("uint64", 2**64 - 100, -100), ("int8", 3, 256 + 3)],
    ],
)
def test_ignore_index_beyond_the_dtype_never_matches(backend, dtype, label, ignore_index):
    labels = np.array([0, 3, label, 1], dtype)
    if label < 5:
        check(backend, LOGITS, labels, ignore_index=ignore_index)
    else:
        refuses_labels(backend, labels, says=str(label), ignore_index=ignore_index)
        check(backend, LOGITS, labels, ignore_index=ignore_index, validate=False)


def test_ignore_index_is_for_labels_only(backend):
    logits, soft = backend.array(LOGITS), backend.array(SOFT)
    for ignore_index in (0, -1, 255):
        refuses(ValueError, logits, soft, says=["ignore_index", str(ignore_index)], ignore_index=ignore_index)
    check(backend, LOGITS, SOFT, ignore_index=-100)
    check(backend, LOGITS, SOFT, ignore_index=None)


def test_ignore_index_none_ignores_nothing(backend):
    labels = np.array([0, 3, -100, 1])
    check(backend, LOGITS, LABELS, ignore_index=None)
    refuses_labels(backend, labels, says="-100", ignore_index=None)
    check(backend, LOGITS, labels, ignore_index=None, validate=False)


@each_target
@pytest.mark.parametrize("poison", [NAN, INF, -INF, 1.0])
def test_sample_weight_zero_is_inert(backend, target, poison):
    logits = np.where(np.arange(4)[:, None] == 2, poison, LOGITS)
    s = np.array([1, 2, 0, 0.5])
    check(backend, logits, target, sample_weight=s)
    check(backend, logits, target, sample_weight=s, weight=WEIGHT, label_smoothing=0.1, z_loss=0.25, softcap=4.0)


@each_target
def test_z_loss_takes_sample_weight_but_no_class_weight(backend, target):
    # lse is 3 and the labels are certain: what is left is s z lse^2, with z lse^2 = 9/4.
    logits = np.array([[3, -INF], [3, -INF]])
    certain = np.zeros(2, int) if target is LABELS else np.array([[1.0, 0], [1, 0]])
    denominator = 8 if target is LABELS else 4  # the sum of s w[y], or of s
    none = [2.25, 6.75], np.array([[1.5, 0], [4.5, 0]])
    mean = 9 / denominator, none[1] / denominator
    options = {"z_loss": 0.25, "sample_weight": np.array([1.0, 3]), "weight": np.array([2.0, 1])}
    check(backend, logits, certain, literal={"none": none, "mean": mean}, **options)
    check(backend, LOGITS, target, z_loss=0.25, sample_weight=SAMPLE_WEIGHT, weight=WEIGHT)


@each_target
def test_denominator_zero(backend, target):
    check(backend, LOGITS, target, sample_weight=np.array([1.0, -1, 2, -2]), z_loss=0.25)
    grad = np.full((4, 5), NAN)
    if target is LABELS:
        weight = np.array([0, 2, 3, 0, -2.0])
        check(backend, LOGITS, LABELS, weight=weight, literal={"mean": (NAN, grad)})
        ignored = np.array([0, -100, 4, 1])
        grad[1] = 0
        check(backend, LOGITS, ignored, weight=weight, literal={"mean": (NAN, grad)})


@each_target
def test_sample_weights_all_zero(backend, target):
    zeros = np.zeros_like(LOGITS)
    literal = {"none": (np.zeros(4), zeros), "mean": (NAN, zeros), "sum": (0, zeros)}
    check(backend, LOGITS, target, sample_weight=np.zeros(4), literal=literal)


@pytest.mark.parametrize("mask", [np.array([True, False, True, True]), np.zeros(4, bool)], ids=["some", "none"])
@each_target
def test_boolean_sample_weight_is_a_mask(backend, target, mask):
    for dtype, engine, reduction in itertools.product(backend.usual_dtypes, backend.engines, REDUCTIONS):
        x, t, _ = on(backend, dtype, np.where(mask[:, None], LOGITS, NAN), target, {})
        truth = oracle(backend.numpy(x), backend.numpy(t), reduction=reduction, sample_weight=mask.astype(float))
        options = {"reduction": reduction, "sample_weight": backend.array(mask), "engine": engine}
        for loss, grad in every_way(x, t, **options).values():
            assert_loss(backend.numpy(loss), truth)
            assert_grad(backend.numpy(grad), truth)
    refuses(
        TypeError, backend.array(LOGITS), backend.array(LABELS), says="bool", weight=backend.array(np.ones(5, bool))
    )


@pytest.mark.parametrize("given", ["number", "array"])
@each_target
def test_denominator_of_the_caller(backend, target, given):
    if target is LABELS:
        target = np.array([0, -100, 4, 1])
    for dtype, engine, upstream in itertools.product(backend.usual_dtypes, backend.engines, [None, 3.0]):
        options = {"weight": WEIGHT, "sample_weight": SAMPLE_WEIGHT}
        x, t, options = on(backend, dtype, LOGITS, target, options)
        known = {name: backend.numpy(value) for name, value in options.items()}
        factor = (1 if upstream is None else upstream) / 8
        truth = oracle(backend.numpy(x), backend.numpy(t), reduction="sum", grad_output=factor, **known)
        truth = replace(truth, loss=truth.loss / 8, unit_loss=truth.unit_loss / 8 + NORMAL["float32"])
        options |= {"denominator": 8 if given == "number" else backend.array(np.float32(8)), "engine": engine}
        stats = row_stats(x, t, **{name: options[name] for name in ("weight", "sample_weight", "engine")})
        loss, grad = cross_entropy_value_and_grad(x, t, grad_output=upstream, **options)
        sce = CrossEntropyLoss(**options)
        for value in (loss, cross_entropy(x, t, **options), sce.forward(x, t)):
            assert_loss(backend.numpy(value), truth)
        for value in (
            grad, cross_entropy_grad(x, t, grad_output=upstream, **options), sce.backward(upstream),
            cross_entropy_grad(x, t, grad_output=upstream, stats=stats, **options),
        ):  # fmt: skip
            assert_grad(backend.numpy(value), truth)


def test_denominator_is_for_the_mean(backend):
    for reduction in ("sum", "none"):
        refuses(
            ValueError, backend.array(LOGITS), backend.array(LABELS), says=["denominator", reduction],
            denominator=2, reduction=reduction,
        )  # fmt: skip
    given = {"reduction": "mean"}  # which row_stats does not take
    for value in (NAN, INF):
        refuses(
            ValueError, backend.array(LOGITS), backend.array(LABELS), says=["denominator", str(value)],
            denominator=value, **given,
        )  # fmt: skip
    refuses(
        ValueError, backend.array(LOGITS), backend.array(LABELS), says=["denominator", "(4,)"],
        denominator=backend.array(np.ones(4)), **given,
    )  # fmt: skip
    loss, grad = cross_entropy_value_and_grad(backend.array(LOGITS), backend.array(LABELS), denominator=0)
    assert np.isnan(backend.numpy(loss))
    assert np.isnan(backend.numpy(grad)).all()


# The label is the only largest logit; the first or second of two; of all; none; or beside what is no number.
TIES = np.array(
    [[2, 1, 0, -3, 0.5], [1, 4, 4, 0, 0], [1, 4, 4, 0, 0], [1, 1, 1, 1, 1], [1, 1, 1, 1, 1], [5, 1, 0, 0, 0],
     [-INF, 2, -INF, -INF, 2], [NAN, 1, 2, 0, 0], [1, INF, 0, 0, 0], [-INF] * 5, [9, 0, 0, 0, 0], [9, 0, 0, 0, 0],
     [-1, -0.0, 0.0, -2, -3], [-1, 0.0, -0.0, -2, -3], [-100, 200, 100, 0, 0], [-100, 200, 100, 0, 0]]
)  # fmt: skip
TIED_LABELS = np.array([0, 1, 2, 0, 3, 1, 1, 2, 1, 0, -100, -7, 1, 2, 1, 2])
CORRECT = [0, 1, 3, 6, 12, 14]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weight": WEIGHT, "label_smoothing": 0.25},
        {"z_loss": 0.25, "sample_weight": np.arange(16) % 3 / 2},
        {"softcap": 32.0},  # which makes 100 and 200 the same number
    ],
    ids=["plain", "weights", "z-loss", "softcap"],
)
def test_which_rows_are_correct(backend, options):
    wanted = np.isin(np.arange(16), CORRECT)
    if "softcap" in options:
        wanted[8:10] = True  # infinite logits become numbers
    for dtype, engine in itertools.product(backend.usual_dtypes, backend.engines):
        x, labels, given = on(backend, dtype, TIES, TIED_LABELS, options)
        given |= {"engine": engine, "validate": False}
        stats = row_stats(x, labels, **given)
        assert_array_equal(backend.numpy(stats.correct), wanted)
        assert backend.numpy(stats.correct).dtype == bool
        along = backend.xp.permute_dims(x, (1, 0))
        assert_array_equal(backend.numpy(row_stats(along, labels, axis=0, **given).correct), wanted)
        assert row_stats(x, x, **{name: v for name, v in given.items() if name != "validate"}).correct is None


@each_target
def test_loss_gradient_and_stats_from_one_read(backend, target):
    for dtype, engine, reduction in itertools.product(backend.usual_dtypes, backend.engines, REDUCTIONS):
        options = {"label_smoothing": 0.25, "weight": WEIGHT, "sample_weight": SAMPLE_WEIGHT}
        for chosen in ({}, options):
            x, t, given = on(backend, dtype, LOGITS, target, chosen)
            known = {name: backend.numpy(given[name]) if isinstance(v, np.ndarray) else v for name, v in chosen.items()}
            truth = oracle(backend.numpy(x), backend.numpy(t), reduction=reduction, **known)
            alone = row_stats(x, t, engine=engine, **given)
            given |= {"reduction": reduction, "engine": engine, "return_stats": True}
            for out in (None, x) if backend.has_out and backend.name != "numpy-readonly" else (None,):
                loss, grad, stats = cross_entropy_value_and_grad(x, t, out=out, **given)
                assert_loss(backend.numpy(loss), truth)
                assert_grad(backend.numpy(grad), truth)
                assert type(stats) is type(alone)
                for name, one, two in zip(stats._fields, stats, alone, strict=True):
                    assert (one is None) == (two is None) == (name == "correct" and target is SOFT)
                    if one is not None:
                        assert_array_equal(backend.numpy(one), backend.numpy(two))


def test_distribution_that_does_not_sum_to_1(backend):
    target = np.array([[2, 0], [0.25, 0.25]])
    none = [1.386294, 0.406631], [[-1, 1], [-0.115529, 0.115529]]
    check(backend, PAIR, target, literal={"none": none})
    check(backend, LOGITS, 4 * SOFT - 1, label_smoothing=0.25, weight=WEIGHT)  # nor are all signs the same
    check(backend, LOGITS, np.zeros_like(SOFT), z_loss=0.25)


@pytest.mark.parametrize("dtype", ["bool", "int8", "uint64"])
def test_one_hot_of_any_dtype(backend, dtype):
    check(backend, LOGITS, np.eye(5)[LABELS].astype(dtype))


# -- what a logit may be -----------------------------------------------------------------------------------------


@each_target
def test_logit_minus_inf_off_the_target(backend, target):
    # 0 · (-inf) counts 0: of two classes one is left, and takes all.
    logits = np.array([[0, -INF], [-INF, 1]])
    literal = {"none": ([0, 0], np.zeros((2, 2)))}
    check(backend, logits, PAIR_LABELS if target is LABELS else PAIR_ONE_HOT, literal=literal)
    masked = np.where(SOFT == 0, -INF, LOGITS)
    target = np.array([0, 4, 3, 1]) if target is LABELS else target
    check(backend, masked, target)
    check(backend, masked, target, weight=WEIGHT, sample_weight=SAMPLE_WEIGHT, z_loss=0.25)
    # Smoothing gives a masked class no mass where its weight is 0.
    logits = np.array([[0, -INF], [1, -INF]])
    check(backend, logits, np.array([0, 0]), label_smoothing=0.25, weight=np.array([1.0, 0]))


@each_target
def test_target_mass_on_minus_inf(backend, target):
    logits = np.array([[0, -INF], [0, 0]])
    grad = np.array([[1, -1], [-0.5, 0.5]])
    literal = {"none": ([INF, 0.693147], grad), "mean": (INF, grad / 2)}
    check(backend, logits, np.array([1, 0]) if target is LABELS else PAIR_ONE_HOT[::-1], literal=literal)
    certain = np.array([0, 0]) if target is LABELS else np.array([[1.0, 0], [1, 0]])
    check(backend, logits, certain, label_smoothing=0.25, z_loss=0.25)
    masked = np.where(np.eye(5)[LABELS], -INF, LOGITS)
    check(backend, masked, target, weight=WEIGHT, sample_weight=SAMPLE_WEIGHT)


def test_masks_of_the_lowest_float(backend):
    # The share of smoothing in max - x fits float32; the sum of max - x over the classes does not.
    logits = np.full((4, 5), np.finfo(np.float32).min, np.float64)
    logits[:, 0] = 1
    for smoothing in (0.0, 0.1):
        check(backend, logits, np.zeros(4, int), label_smoothing=smoothing, dtypes=["float32"])
    check(backend, logits, np.array([0, 0, 2, 0]), dtypes=["float32"])


@each_target
@pytest.mark.parametrize(
    "row",
    [[-INF] * 5, [0, NAN, 0, 0, 0], [0, 0, INF, 0, 0], [-INF, 0, NAN, INF, 0], [INF] * 5],
    ids=["all -inf", "NaN", "+inf", "each", "all +inf"],
)
def test_row_without_a_softmax_is_nan(backend, target, row):
    logits = LOGITS.copy()
    logits[2] = row
    check(backend, logits, target)
    check(backend, logits, target, weight=WEIGHT, sample_weight=SAMPLE_WEIGHT, label_smoothing=0.1, z_loss=0.25)
    nan_row = np.where(np.arange(4) == 2, NAN, 0)
    logits = np.array([[0.0] * 5, [0.0] * 5, row, [0.0] * 5])
    none = np.log(5) + nan_row, 0.2 - np.eye(5)[LABELS] + nan_row[:, None]
    check(backend, logits, LABELS, literal={"none": none, "mean": (NAN, none[1] / 4)})


def test_softmax_of_rows_without_one(backend):
    logits = np.array([[-INF] * 5, [0, 0, INF, 0, -INF], [0, NAN, 0, 0, INF], [0, -INF, 0, -INF, -INF]])
    for dtype in backend.usual_dtypes:
        x = backend.array(logits, dtype)
        p, log_p, lse = (backend.numpy(f(x)).astype(np.float64) for f in (softmax, log_softmax, logsumexp))
        assert_allclose(p, [[NAN] * 5] * 3 + [[0.5, 0, 0.5, 0, 0]])
        assert_allclose(np.exp(log_p), p, rtol=1e-2)
        assert_allclose(lse, [-INF, INF, NAN, np.log(2)], rtol=1e-6)  # as SciPy has it


@each_target
def test_confident_row(backend, target):
    target = PAIR_LABELS if target is LABELS else PAIR_ONE_HOT
    for dtype, reduction in itertools.product(backend.usual_dtypes, REDUCTIONS):
        x, t, _ = on(backend, dtype, np.array([[17.0, 0], [0, 17]]), target, {})
        truth = oracle(backend.numpy(x), backend.numpy(t), reduction=reduction)
        assert_allclose(np.float64(truth.rows), [4.1399e-8] * 2, rtol=1e-4)
        scale = 0.5 if reduction == "mean" else 1
        assert_allclose(np.float64(truth.grad), 4.1399e-8 * scale * np.array([[-1, 1], [1, -1]]), rtol=1e-4)
        for engine in backend.engines:
            for loss, grad in every_way(x, t, reduction=reduction, engine=engine).values():
                assert_confident(backend.numpy(loss), backend.numpy(grad), truth, exact=True)


def test_many_rows(backend):
    # More rows, weights and loss than float16 can count (65504), or bfloat16 tell apart (256).
    N = 70_000
    labels = np.arange(N) % 3
    grad = 1 / 3 - np.eye(3)[labels]
    literal = {"mean": (np.log(3), grad / N), "sum": (np.log(3) * N, grad)}
    dtypes = backend.dtypes[:2]  # the 16-bit ones, where there are any
    check(backend, np.zeros((N, 3)), labels, dtypes=dtypes, literal=literal)
    ones = {"weight": np.ones(3), "sample_weight": np.ones(N)}
    check(backend, np.zeros((N, 3)), labels, dtypes=dtypes[:1], literal=literal, **ones)


@each_target
def test_softcap(backend, target):
    # 2 tanh(1/2) = 0.924234, with the derivative 1 - tanh(1/2)^2 = 0.786448.
    mean = (0.693147 + 0.334008) / 2, [[-0.25, 0.25], [0.142048, -0.111713]]
    check(backend, PAIR, PAIR_LABELS if target is LABELS else PAIR_ONE_HOT, softcap=2.0, literal={"mean": mean})
    check(backend, LOGITS, target, softcap=2.0, weight=WEIGHT, sample_weight=SAMPLE_WEIGHT)
    check(backend, LOGITS, target, softcap=2.0, weight=WEIGHT, label_smoothing=0.1, z_loss=0.25)


@each_target
def test_softcap_makes_infinite_logits_finite(backend, target):
    logits = LOGITS.copy()
    logits[0, 1], logits[1] = INF, [-INF, INF, 0, -INF, 2]
    logits[2] = -INF
    check(backend, logits, target, softcap=2.0)
    logits[3, 2] = NAN
    check(backend, logits, target, softcap=2.0)
    # (inf, -inf) under a cap of 1 is (1, -1), and a cap that saturates has no slope.
    literal = {"none": ([2.126928, 0.126928], [[0, 0], [0, 0]])}
    check(backend, np.array([[INF, -INF]] * 2), np.array([1, 0]), softcap=1.0, literal=literal)


@pytest.mark.parametrize("caps", [0.1, 1, 8, 30, 1000])
def test_slope_of_softcap_keeps_its_digits(backend, caps):
    """1 - tanh² is 6 % off at 8 caps, and 0 at 9. Beyond the range of the dtype the slope is 0."""
    for dtype, engine in itertools.product({"float32", "float64"} & set(backend.usual_dtypes), backend.engines):
        x, labels, _ = on(backend, dtype, np.array([[0, 4 * caps, -4 * caps]]), np.array([0]), {})
        grad = backend.numpy(cross_entropy_grad(x, labels, softcap=4.0, engine=engine))[0]
        cap = 4 * np.tanh(np.longdouble(caps))
        p = np.exp([0, cap, -cap]) / np.exp([0, cap, -cap]).sum()
        truth = (p - [1, 0, 0]) / np.cosh(np.array([0, caps, caps], np.longdouble)) ** 2
        tiny = NORMAL[dtype]
        # exp(-2·caps) of a GPU is off by its exponent times eps
        assert_allclose(grad, truth.astype(float), rtol=(16 + 2 * caps) * EPS[dtype], atol=tiny)


def test_z_loss_of_confident_rows_keeps_its_digits(backend):
    """Where the label takes nearly all, z-loss is what is left of its gradient."""
    logits = np.array([[2.0**-16, -40, -40], [2.0**-10, -40, -40], [20, -40, -40]])
    for dtype, engine in itertools.product({"float32", "float64"} & set(backend.usual_dtypes), backend.engines):
        x, labels, _ = on(backend, dtype, logits, np.array([0, 0, 0]), {})
        options = {"reduction": "none", "z_loss": 2.0**-13, "engine": engine}
        grad = backend.numpy(cross_entropy_grad(x, labels, **options))[:, 0]
        rest = 2 * np.exp(np.longdouble(-40) - logits[:, 0])
        lse = logits[:, 0] + np.log1p(rest)
        truth = (2.0**-12 * lse - rest) / (1 + rest)
        assert_allclose(grad, truth.astype(float), rtol=16 * EPS[dtype])


def test_softcap_padding_never_counts(backend):
    # A lane that is padded with 0, or with -inf before the cap, would outweigh these classes.
    check(backend, np.full((4, 5), -1024.0), LABELS, softcap=32.0)


@pytest.mark.parametrize("target", [np.zeros(2, int), np.array([[1], [0.5]])], ids=["index", "distribution"])
def test_one_class(backend, target):
    logits = np.array([[3], [-2.0]])
    zeros = np.zeros((2, 1))
    check(backend, logits, target, literal={"none": ([0, 0], zeros), "mean": (0, zeros)})
    none = [4.5, 2], [[3], [-2]]
    mean = 3.25, [[1.5], [-1]]
    check(backend, logits, target, z_loss=0.5, literal={"none": none, "mean": mean})
    check(backend, logits, target, z_loss=0.5, softcap=2.0, label_smoothing=0.1, sample_weight=np.array([1.0, 3]))


# -- what the arithmetic does not hold (test_extremes.py draws more of it) ----------------------------------------


def ends(dtype):
    """The largest number of a dtype, and that times half a step, which beside it is nothing."""
    top = float(np.finfo(dtype if dtype != "bfloat16" else np.float32).max) * (1 - 2.0**-8 * (dtype == "bfloat16"))
    return top, top * EPS[dtype] / 2


@each_target
def test_an_option_that_is_not_given_has_no_term(backend, target):
    for dtype in backend.usual_dtypes:
        top, _ = ends(dtype)
        logits = np.where(np.arange(4)[:, None] % 2, top, -top) * np.ones(5)
        check(backend, logits, target, dtypes=[dtype])
        nothing = {"weight": np.ones(5), "sample_weight": np.ones(4), "label_smoothing": 0.0, "z_loss": 0.0}
        for name, value in nothing.items():
            check(backend, logits, target, dtypes=[dtype], **{name: value})
        literal = {"none": ([np.log(5)] * 4, 0.2 - np.eye(5)[LABELS])}
        check(backend, logits, LABELS, dtypes=[dtype], literal=literal, **nothing)


@each_target
def test_logits_twice_the_largest_number_apart(backend, target):
    # max - x is beyond the range, and its share in the loss is not; the shares of both labels and smoothing.
    weight = np.array([1.0, 0.25, 0.125, 0.25, 0.5]) / 2
    for dtype in backend.usual_dtypes:
        top, step = ends(dtype)
        logits = np.full((4, 5), -top)
        logits[np.arange(4), [0, 3, 4, 4]] = [top, top, 4 * step, top / 2]
        check(backend, logits, target, dtypes=[dtype], label_smoothing=0.125)
        check(backend, logits, target, dtypes=[dtype], weight=weight)
        check(backend, logits, target, dtypes=[dtype], label_smoothing=0.5, weight=weight)
        check(backend, logits, target, dtypes=[dtype])


@each_target
def test_z_loss_beyond_the_range(backend, target):
    """Where a probability is 0, the gradient is that of the target, however large lse is."""
    for dtype in {"float32", "float64"} & set(backend.usual_dtypes):
        top, _ = ends(dtype)
        logits = np.where(np.eye(5)[LABELS], [[top], [-top], [0], [-top / 2]], -top)
        for z_loss in (1e-4, 1.0, top):
            for upstream in (None, 2.0**-20):
                check(backend, logits, target, dtypes=[dtype], z_loss=z_loss, grad_output=upstream)
        check(backend, [[top, -top]] * 2 * np.ones((2, 1)), np.array([0, 1]), dtypes=[dtype], z_loss=1.0,
              literal={"none": ([INF, INF], [[INF, 0], [INF, -1]])})  # fmt: skip


@pytest.mark.parametrize("upstream", [INF, -INF, NAN])
def test_infinite_upstream(backend, upstream):
    """It is multiplied last, and what is 0 becomes NaN; but not in a row that does not count."""
    masked = np.array([[0, 0], [0, -INF], [0, 0]])
    labels = np.array([0, 1, -100])
    grad = np.array([[-1, 1], [1, -1], [1, 1]]) * upstream
    grad[2] = 0
    check(backend, masked, labels, grad_output=upstream, literal={"none": ([np.log(2), INF, 0], grad)})
    grad = np.array([[-1, 1], [NAN, NAN], [1, 1]]) * upstream
    grad[2] = 0
    certain = np.array([0, 0, -100])
    check(backend, masked, certain, grad_output=upstream, literal={"none": ([np.log(2), 0, 0], grad)})
    check(backend, LOGITS, LABELS, grad_output=upstream, label_smoothing=0.125, weight=WEIGHT, z_loss=0.25)
    check(backend, LOGITS, SOFT, grad_output=upstream, sample_weight=np.array([1.0, 0, 2, 3]))


@each_target
def test_products_beyond_the_range(backend, target):
    """A large scale and a large weight, of which only all the factors together are in the range."""
    for dtype in {"float32", "float64"} & set(backend.usual_dtypes):
        large = 2.0**80 if dtype == "float32" else 2.0**600
        options = {"weight": large * WEIGHT, "grad_output": large, "dtypes": [dtype]}
        confident = np.where(np.eye(5)[LABELS], 0, -64.0)
        check(backend, confident, target, **options)
        check(backend, confident, target, label_smoothing=2.0**-20, **options)
        check(backend, LOGITS, target, **options)
        half = np.sqrt(large) * 2.0**24  # the square is beyond the range, and is what the mean divides by
        check(backend, confident, LABELS, weight=np.full(5, half), sample_weight=np.full(4, half), dtypes=[dtype],
              grad_output=large)  # fmt: skip


@pytest.mark.parametrize("value", [INF, NAN])
def test_weight_of_a_class_that_nothing_meets(backend, value):
    """Weights of N / (C·count) are infinite where the count is 0."""
    weight = np.array([0.5, 2, 1, 0.25, value])
    labels, soft = np.array([0, 3, 2, 1]), SOFT.copy()
    soft[:, 4] = 0
    for options in ({}, {"sample_weight": SAMPLE_WEIGHT}, {"z_loss": 0.25, "softcap": 4.0}, {"ignore_index": 3}):
        finite = {"weight": np.where(np.isfinite(weight), weight, 7), **options}
        for target in (labels, soft, np.eye(5)[labels]):
            if target.ndim == 2 and "ignore_index" in options:
                continue
            check(backend, LOGITS, target, weight=weight, **options)
            truths = [oracle(LOGITS, target, **given) for given in (finite, {"weight": weight, **options})]
            assert (truths[0].grad == truths[1].grad).all()
            assert truths[0].loss == truths[1].loss
    ignored = np.array([0, 3, -100, 1])
    check(backend, LOGITS, ignored, weight=weight)
    check(backend, LOGITS, np.array([0, 3, 9, 1]), weight=np.array([value, 1.0, 2, 3, 4]), validate=False)
    check(backend, LOGITS, np.zeros((4, 5)), weight=weight)


@pytest.mark.parametrize("value", [INF, NAN])
def test_infinite_weight_of_a_class_that_is_met(backend, value):
    """By a label, by target mass, or by smoothing: there is no telling what the loss should be."""
    weight = np.array([0.5, 2, 1, 0.25, value])
    for target in (LABELS, SOFT, np.eye(5)[LABELS]):
        check(backend, LOGITS, target, weight=weight)
    missed = np.array([0, 3, 2, 1])
    for smoothing in (0.125, 1.0):
        check(backend, LOGITS, missed, weight=weight, label_smoothing=smoothing)
        check(backend, LOGITS, np.eye(5)[missed], weight=weight, label_smoothing=smoothing)
        assert not np.isfinite(oracle(LOGITS, missed, weight=weight, label_smoothing=smoothing).loss)


@each_target
def test_infinite_weight_of_a_logit_that_softcap_makes_the_largest(backend, target):
    """It is no further below the maximum than the maximum itself, for which 0·∞ counts 0."""
    logits = LOGITS.copy()
    logits[:, 3], logits[:, 1] = 2.0**15, 2.0**14
    options = {"weight": np.array([1, INF, 1, 1, 1]), "label_smoothing": 0.125, "softcap": 1.0}
    check(backend, logits, target, **options)
    assert_array_equal(oracle(logits, target, reduction="none", **options).loss, INF)


@pytest.mark.parametrize("engine", ["cpu", "numpy", "generic"])
def test_memory_order_changes_no_bit(engine):
    """Of what a mean divides by, nor of a sum: rows are added in the user's order, however they lie in memory."""
    rng = np.random.default_rng(0)
    shape = (12, 9, 7, 3)

    def laid(x, order):
        return x.transpose(order).copy(order="C").transpose(np.argsort(order))

    for dtype in ("float32", "float64"):
        sizes = np.exp(3 * rng.normal(size=shape[:-1]))
        x = (sizes[..., None] * rng.normal(size=shape)).astype(dtype)
        labels, soft = rng.integers(0, 3, shape[:-1]), rng.random(shape).astype(dtype)
        s, weight = sizes.astype(dtype), rng.random(3).astype(dtype)
        for target, reduction, block in itertools.product([labels, soft], ["mean", "sum"], [path.BLOCK, 100]):
            seen = set()
            with resized(BLOCK=block):
                for order in itertools.permutations(range(3)):
                    options = {"sample_weight": laid(s, order), "weight": weight, "reduction": reduction}
                    of_target = laid(target, order if target is labels else (*order, 3))
                    for of_logits in ((*order, 3), (3, *order), (0, 1, 2, 3)):
                        loss, grad = cross_entropy_value_and_grad(
                            laid(x, of_logits), of_target, engine=engine, **options
                        )
                        seen.add((loss.tobytes(), grad.tobytes()))
            assert len(seen) == 1


# -- what is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["complex64", "complex128", "int8", "int64", "uint8", "bool"])
def test_logits_of_a_wrong_dtype(backend, dtype):
    logits = backend.array(np.zeros((4, 5), dtype))
    refuses(TypeError, logits, backend.array(LABELS), says=["logits", dtype])
    refuses(TypeError, logits, backend.array(SOFT), says=["logits", dtype])
    for function in (softmax, log_softmax, logsumexp):
        with pytest.raises(TypeError, match=dtype):
            function(logits)


@pytest.mark.parametrize("dtype", ["float32", "float64", "bool"])
def test_class_indices_of_a_wrong_dtype(backend, dtype):
    labels = backend.array(np.zeros(4, dtype))
    refuses(TypeError, backend.array(LOGITS), labels, says=["target", dtype, "integer"])


@pytest.mark.parametrize("name", ["target", "weight", "sample_weight"])
def test_complex_input(backend, name):
    given = SOFT if name == "target" else INPUTS[name]
    options = {"target": backend.array(LABELS)} | {name: backend.array(given, "complex64")}
    refuses(TypeError, backend.array(LOGITS), says=[name, "complex64"], **options)


@pytest.mark.parametrize("name", INPUTS)
def test_mixed_libraries(backend, name):
    other = INPUTS[name] if backend.name == "array-api-strict" else array_api_strict.asarray(INPUTS[name])
    options = {"target": backend.array(LABELS)} | {name: other}
    if name == "grad_output":
        options["reduction"] = "none"
    refuses(TypeError, backend.array(LOGITS), says=name, **options)


@pytest.mark.parametrize("name", ["target", "weight", "sample_weight"])
def test_mixed_devices(name):
    # The strict library pretends to have several devices; no machine needs a GPU for this.
    xp = array_api_strict
    options = {"target": xp.asarray(LABELS)} | {name: xp.asarray(INPUTS[name], device=xp.Device("device1"))}
    refuses(TypeError, xp.asarray(LOGITS), says=[name, "device1", "CPU_DEVICE"], **options)


@pytest.mark.filterwarnings("ignore::PendingDeprecationWarning")  # what np.matrix says of itself
@pytest.mark.parametrize(
    ("wrap", "says"),
    [
        (np.ma.masked_array, "MaskedArray"),
        (np.matrix, "matrix"),
        (lambda x: x.astype(object), "object"),
        (lambda x: x.astype(np.longdouble), np.dtype(np.longdouble).name),
    ],
    ids=["masked", "matrix", "object", "longdouble"],
)
def test_numpy_array_of_a_kind_that_is_not_taken(wrap, says):
    refuses(TypeError, wrap(LOGITS), LABELS, says=["logits", says])
    refuses(TypeError, LOGITS, wrap(SOFT), says=["target", says])


def test_text_is_no_array():
    refuses(TypeError, np.array([["a", "b"]]), np.array([0]), says="logits")
    refuses(TypeError, LOGITS, np.array(["a"] * 4), says="target")


@pytest.mark.parametrize("shape", [(5,), (4, 1), (5, 4), (4, 5, 1), ()])
def test_target_of_a_wrong_shape(backend, shape):
    for dtype in ("int64", "float32"):
        refuses(ValueError, backend.array(LOGITS), backend.array(np.zeros(shape, dtype)), says=["(4, 5)", str(shape)])


def test_target_that_would_fit_axis_1(backend):
    logits, labels = backend.array(np.zeros((2, 5, 3))), backend.array(np.zeros((2, 3), int))
    refuses(ValueError, logits, labels, says=["(2, 5, 3)", "(2, 3)", "axis=1"])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"axis": 7}, "7"),
        ({"axis": -8}, "-8"),
        ({"reduction": "average"}, ["'average'", "'mean'"]),
        ({"reduction": None}, ["None", "'none'"]),
        ({"label_smoothing": -0.1}, "-0.1"),
        ({"label_smoothing": 1.5}, "1.5"),
        ({"label_smoothing": NAN}, "nan"),
        ({"softcap": 0.0}, "0.0"),
        ({"softcap": -30.0}, "-30.0"),
        ({"softcap": INF}, "inf"),
        ({"softcap": NAN}, "nan"),
        ({"z_loss": -1e-4}, "-0.0001"),
        ({"z_loss": INF}, "inf"),
        ({"z_loss": NAN}, "nan"),
        ({"engine": "abacus"}, ["'abacus'", "'generic'"]),
        ({"weight": np.ones(4)}, ["(4,)", "(5,)"]),
        ({"weight": np.ones((1, 5))}, ["(1, 5)", "(5,)"]),
        ({"sample_weight": np.ones(5)}, ["(5,)", "(4,)"]),
        ({"sample_weight": np.ones((4, 1))}, ["(4, 1)", "(4,)"]),
        ({"grad_output": np.ones(4)}, ["(4,)", "()"]),
        ({"grad_output": np.ones(5), "reduction": "none"}, ["(5,)", "(4,)"]),
        ({"z_loss": 1e39}, ["float32", "1e+39"]),
        ({"softcap": 1e39}, ["float32", "1e+39"]),
        ({"softcap": 1e-39}, ["float32", "1e-39"]),
        ({"grad_output": -1e39}, ["float32", "-1e+39"]),
    ],
    ids=lambda x: ", ".join(f"{k}={np.shape(v) or v}" for k, v in x.items()) if isinstance(x, dict) else "",
)
def test_option_of_a_wrong_value(backend, options, says):
    name = next(iter(options))
    given = {k: backend.array(v) if isinstance(v, np.ndarray) else v for k, v in options.items()}
    says = [name, *([says] if isinstance(says, str) else says)]
    refuses(ValueError, backend.array(LOGITS, "float32"), backend.array(LABELS), says=says, **given)


@pytest.mark.parametrize("name", ["weight", "sample_weight", "grad_output"])
def test_a_weight_that_the_arithmetic_cannot_hold(backend, name):
    """Where looking is free: not on a GPU, whose engine the emulated one is."""
    values = INPUTS[name].astype(np.float64)
    values[2] = -1e39
    options = {name: backend.array(values)} | ({"reduction": "none"} if name == "grad_output" else {})
    logits, labels = backend.array(LOGITS, "float32"), backend.array(LABELS)
    if backend.name in ("cupy", "emulated"):
        cross_entropy_grad(logits, labels, engine=backend.engines[0], **options)
    else:
        refuses(ValueError, logits, labels, says=[name, "float32", "-1e+39"], **options)
        values[2] = INF
        cross_entropy_grad(logits, labels, **options | {name: backend.array(values)})
    cross_entropy_grad(backend.array(LOGITS, "float64"), labels, **options)


@pytest.mark.parametrize("shape", [(4, 0), (0, 0), (0,)])
def test_no_classes(backend, shape):
    logits = backend.array(np.zeros(shape))
    refuses(ValueError, logits, backend.array(np.zeros(shape[:-1], int)), says=["logits", str(shape)])
    refuses(ValueError, logits, logits, says=["logits", str(shape)])


def test_no_class_axis(backend):
    refuses(ValueError, backend.array(np.float64(1)), backend.array(np.int64(0)), says=["logits", "dimension"])


def test_backward_before_forward(backend):
    criterion = CrossEntropyLoss(z_loss=0.25)
    with pytest.raises(RuntimeError, match="forward"):
        criterion.backward()
    x, labels = backend.array(LOGITS, "float32"), backend.array(LABELS)
    truth = oracle(backend.numpy(x), LABELS, z_loss=0.25)
    assert_loss(backend.numpy(criterion.forward(x, labels)), truth)
    assert_grad(backend.numpy(criterion.backward()), truth)


# -- what must not be noticed ------------------------------------------------------------------------------------


def test_no_warnings(backend):
    # Overflow, underflow, inf - inf, 0 · inf and 0 / 0, in 16 bits too; labels that are ignored, and a mean of nothing.
    odd = [[0, -60_000, 60_000, -100, -INF], [INF, -INF, 0, 0, 0], [0, 0, 0, 0, NAN], [-INF] * 5]
    sizes = [((1, 1), backend.usual_dtypes)]
    if "numpy" in backend.engines:  # both of which share 300 x 1500 logits out to their threads
        sizes.append(((75, 300), ("float16", "float32")))
    with np.errstate(all="raise"), warnings.catch_warnings():
        warnings.simplefilter("error")
        for copies, dtypes in sizes:
            logits = np.tile(odd, copies)
            N, C = logits.shape
            labels = np.zeros(N, int)
            soft, s = np.eye(C)[labels], 0.25 * (np.arange(N) % 3)
            check(backend, logits, labels, dtypes=dtypes, label_smoothing=0.25, z_loss=0.25, softcap=0.25)
            check(backend, logits, labels - 100, dtypes=dtypes)
            check(backend, logits, labels, dtypes=dtypes, weight=np.zeros(C))
            check(backend, logits, soft, dtypes=dtypes, sample_weight=s)
        check(backend, logits[:0, :5], labels[:0])


# Each makes an array of LOGITS.shape from one of 8 x 10 ones; the library decides whether it is a view.
LAYOUTS = {
    "transposed": lambda xp, x: xp.permute_dims(x[:5, :4], (1, 0)),
    "every other row and class": lambda xp, x: x[::2, ::2],
    "unaligned rows": lambda xp, x: x[1:5, 3:8],
    "rows reversed": lambda xp, x: xp.flip(x[:4, :5], axis=0),
    "classes reversed": lambda xp, x: xp.flip(x[:4, :5], axis=1),
    "one row repeated": lambda xp, x: xp.broadcast_to(x[:1, :5], (4, 5)),
    "one class repeated": lambda xp, x: xp.broadcast_to(x[:4, :1], (4, 5)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(backend, layout):
    base = np.arange(80).reshape(8, 10) * 7 % 16 / 4
    for dtype in backend.usual_dtypes:
        x = LAYOUTS[layout](backend.xp, backend.array(base, dtype))
        expanded = LAYOUTS[layout](np, base).astype(backend.numpy(x).dtype)
        labels = backend.array(np.repeat(LABELS, 2))[::2]
        soft = LAYOUTS[layout](backend.xp, backend.array(base[::-1, ::-1] / 16, dtype))
        s = backend.array(np.repeat(SAMPLE_WEIGHT, 2), dtype)[::2]
        weight = backend.xp.flip(backend.array(WEIGHT, dtype), axis=0)
        options = {"weight": WEIGHT[::-1], "sample_weight": SAMPLE_WEIGHT}
        for target, engine in itertools.product([labels, soft], backend.engines):
            truth = oracle(expanded, backend.numpy(target), **options)
            ways = every_way(x, target, reduction="mean", weight=weight, sample_weight=s, engine=engine)
            for loss, grad in ways.values():
                assert_loss(backend.numpy(loss), truth)
                assert_grad(backend.numpy(grad), truth)


def unaligned(x):
    """The same array, starting one byte off."""
    raw = np.empty(x.nbytes + 1, np.uint8)[1:]
    raw[:] = np.frombuffer(x.tobytes(), np.uint8)
    return raw.view(x.dtype).reshape(x.shape)


@pytest.mark.parametrize("engine", ["cpu", "numpy", "generic"])
@pytest.mark.parametrize(
    "lay",
    [np.asfortranarray, unaligned, lambda x: x.astype(x.dtype.newbyteorder(">")), lambda x: x.astype(">f8")],
    ids=["Fortran order", "unaligned start", "big-endian", "big-endian float64"],
)
def test_any_numpy_memory(engine, lay):
    for dtype, target in itertools.product(["float16", "float32", "float64"], [LABELS, SOFT]):
        x = lay(LOGITS.astype(dtype))
        options = {"weight": lay(WEIGHT.astype(dtype)), "sample_weight": lay(SAMPLE_WEIGHT.astype(dtype))}
        target = lay(target) if target is SOFT else target.astype(">i4")
        truth = oracle(x, target, **options)
        for loss, grad in every_way(x, target, reduction="mean", engine=engine, **options).values():
            assert_loss(loss, truth)  # in native byte order
            assert_grad(grad, truth)


# -- the caller's buffer -----------------------------------------------------------------------------------------


def gradients(*args, out, **options):
    """The gradient written to `out` by each function that takes one."""
    yield lambda: cross_entropy_value_and_grad(*args, out=out, **options)[1]
    yield lambda: cross_entropy_grad(*args, out=out, **options)
    criterion = CrossEntropyLoss(**options)

    def backward():
        criterion.forward(*args)
        return criterion.backward(out=out)

    yield backward


@each_target
def test_out_is_filled_and_returned(backend, target):
    for dtype, engine in itertools.product(backend.usual_dtypes, backend.engines):
        x, t, _ = on(backend, dtype, LOGITS, target, {})
        buffer = backend.xp.zeros((4, 10), dtype=x.dtype)
        for out in (buffer[:, 5:], buffer[:, ::2]):
            for grad in gradients(x, t, out=out, engine=engine):
                if backend.has_out:
                    out[...] = 7
                    assert grad() is out
                    assert_grad(backend.numpy(out), oracle(backend.numpy(x), backend.numpy(t)))
                else:
                    with pytest.raises(TypeError, match="out"):
                        grad()


@each_target
def test_out_may_be_the_logits(backend, target):
    refused = {"numpy-readonly": ValueError, "jax": TypeError, "dask": TypeError}.get(backend.name)
    for dtype, engine, reduction in itertools.product(backend.usual_dtypes, backend.engines, REDUCTIONS):
        x, t, _ = on(backend, dtype, LOGITS, target, {})
        options = {"reduction": reduction, "softcap": 2.0}
        truth = oracle(backend.numpy(x), backend.numpy(t), **options)
        if refused:
            with pytest.raises(refused, match="out"):
                cross_entropy_value_and_grad(x, t, **options, engine=engine, out=x)
        else:
            loss, grad = cross_entropy_value_and_grad(x, t, **options, engine=engine, out=x)
            assert grad is x
            assert_loss(backend.numpy(loss), truth)
            assert_grad(backend.numpy(grad), truth)


def test_out_of_a_wrong_kind(backend):
    x, labels = backend.array(LOGITS, "float32"), backend.array(LABELS)
    wrong = [
        (ValueError, backend.xp.zeros((5, 4), dtype=x.dtype), r"\(5, 4\)"),
        (TypeError, backend.xp.zeros((4, 5), dtype=backend.xp.float64), "float64"),
        (TypeError, [[0.0] * 5] * 4, "list"),
    ]
    for exception, out, says in wrong:
        for grad in gradients(x, labels, out=out):
            with pytest.raises(exception, match=says) if backend.has_out else pytest.raises(TypeError, match="out"):
                grad()


def test_out_that_overlaps_or_is_read_only():
    buffer = np.zeros((5, 5), np.float32)
    buffer[:4] = LOGITS
    soft = SOFT.astype(np.float32)
    read_only = np.zeros((4, 5), np.float32)
    read_only.flags.writeable = False
    for x, target, out, says in [
        (buffer[:4], LABELS, buffer[1:], "shares memory"),
        (buffer[:4], LABELS, buffer[3::-1], "shares memory"),
        (buffer[:4], soft, soft, "shares memory"),
        (buffer[:4], LABELS, read_only, "read-only"),
        (buffer[:4], LABELS, np.broadcast_to(np.zeros(5, np.float32), (4, 5)), "read-only"),
    ]:
        before = buffer.copy(), soft.copy()
        for grad in gradients(x, target, out=out):
            with pytest.raises(ValueError, match=says):
                grad()
        assert (buffer == before[0]).all()
        assert (soft == before[1]).all()
