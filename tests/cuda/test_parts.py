"""SPLIT: rows read in parts. The merged stats of the parts are those of the row, wherever it is divided."""

import itertools
import shutil

import ml_dtypes
import numpy as np
import pytest
from support import emulated, simt, tally
from support.close import assert_confident, assert_grad, assert_loss
from support.oracle import oracle
from support.simt.build import ORDERS

from xent_array import (
    _again,
    _api,
    _problem,
    cross_entropy,
    cross_entropy_grad,
    cross_entropy_value_and_grad,
    row_stats,
)
from xent_array._engines import cuda

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="the emulation needs g++")

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float64": np.float64}
PART, MOST = 256, 200  # bytes, instead of 64 KiB; parts, instead of 1024
OPTIONS = {
    "none": {},
    "smoothing": {"label_smoothing": 0.1},
    "weights": {"label_smoothing": 0.1, "weight": True, "z_loss": 1e-3},
    "softcap": {"softcap": 3.0},
    "all": {"label_smoothing": 0.1, "weight": True, "z_loss": 1e-3, "softcap": 3.0},
}


@pytest.fixture(autouse=True)
def short_parts(monkeypatch):
    """Every row of more than 128 bytes is read in parts."""
    for name, value in {"WHOLE": 0, "WHOLE_LOSS": 0, "WHOLE_GRAD": 0, "PART": PART, "MOST_PARTS": MOST}.items():
        monkeypatch.setattr(cuda, name, value)
    cuda.plan.cache_clear()
    cuda._chosen.cache_clear()
    monkeypatch.setattr(_again, "_kept", {})
    yield
    cuda.plan.cache_clear()
    cuda._chosen.cache_clear()


def given(options, classes, rng):
    more = {"weight": rng.random(classes) * 2} if "weight" in options else {}
    return {**options, **more, "reduction": "none", "validate": False}


def truth_of(logits, target, options, **more):
    with np.errstate(all="ignore"):
        return oracle(logits, target, **{k: v for k, v in options.items() if k != "validate"}, **more)


def assert_right(x, y, options, engine):
    """Loss alone, with the gradient, and the gradient from stats; out of place and in place."""
    truth = truth_of(x, y, options)
    assert_loss(cross_entropy(x, y, engine=engine, **options), truth)
    same = x.copy()
    for logits, out in ((x, None), (same, same)):
        loss, grad = cross_entropy_value_and_grad(logits, y, engine=engine, out=out, **options)
        assert_loss(loss, truth)
        assert_grad(grad, truth)
    stats = row_stats(x, y, engine=engine, **{k: v for k, v in options.items() if k != "reduction"})
    assert_grad(cross_entropy_grad(x, y, engine=engine, stats=stats, **options), truth)
    return truth, stats


CUTS = [
    ("float32", "none"),
    *(
        pytest.param(dtype, options, marks=pytest.mark.full)
        for dtype, options in [
            ("float32", "smoothing"),
            ("float32", "weights"),
            ("float32", "all"),
            ("bfloat16", "none"),
            ("bfloat16", "all"),
            ("bfloat16", "softcap"),
            ("float16", "smoothing"),
            ("float64", "all"),
        ]
    ),
]


@pytest.mark.parametrize(("dtype", "options"), CUTS)
def test_every_cut(dtype, options):
    """One class more than a part; the longest row before parts become multiples; labels in each part."""
    dtype_ = np.dtype(DTYPES[dtype])
    engine = emulated.engine(mode="check")
    each = PART // dtype_.itemsize
    for classes in (each + 1, 2 * each, 5 * each + 3, MOST * each + each // 2):
        rng = np.random.default_rng(classes)
        at = [0, each - 1, each, classes - 1, classes // 2][:: 1 if classes < 8 * each else 3]
        x = (rng.standard_normal((len(at), classes)) * 3).astype(dtype_)
        p = cuda.plan(5, classes, dtype, job="STATS")
        assert p.parts * p.part >= classes > (p.parts - 1) * p.part
        wide = 2 if classes > MOST * each else 1
        assert (p.parts, p.part) == (-(-classes // (wide * each)), wide * each)
        how = given(OPTIONS[options], classes, rng)
        assert_right(x, np.array(at), how, engine)
        q = rng.random((len(at), classes))
        for target in (q.astype(np.float32), q.astype(dtype_)) if wide == 1 else ():
            assert_right(x, target, how, engine)
    assert {name.split("_")[1] for name in engine.launcher.launches} == {"split", "merge"}


@pytest.mark.parametrize("dtype", DTYPES)
def test_confident_rows(dtype):
    """The label's part holds nearly all the probability, and the runner-up is in it or in another."""
    dtype_ = np.dtype(DTYPES[dtype])
    each, engine = PART // dtype_.itemsize, emulated.engine()
    x = np.full((6, 4 * each + 5), -9, dtype_)
    label = np.array([0, each, 2 * each - 1, 4 * each + 4, 3 * each, 7])
    np.put_along_axis(x, label[:, None], np.asarray(8, dtype_), 1)
    runner_up = np.array([1, each + 9, 2 * each, 0, each, 4 * each])
    np.put_along_axis(x, runner_up[:, None], np.asarray(-2, dtype_), 1)
    options = {"reduction": "none", "validate": False}
    truth = truth_of(x, label, options)
    assert_confident(*cross_entropy_value_and_grad(x, label, engine=engine, **options), truth, exact=False)
    loss = cross_entropy(x, label, engine=engine, **options)
    assert_confident(loss, truth.grad.astype(dtype_), truth, exact=False)


SPECIAL = (
    "nothing",
    "a part of nothing",
    "NaN",
    "inf",
    "the label is -inf",
    "ignored",
    "no class",
    "weighs 0",
    "usual",
)


@pytest.mark.parametrize("options", OPTIONS)
def test_special_rows(options):
    """As other engines give them, and without effect on their neighbours."""
    each = PART // 4
    rng = np.random.default_rng(2)
    x = rng.standard_normal((len(SPECIAL), 3 * each + 2), dtype=np.float32)
    y = rng.integers(x.shape[1], size=len(SPECIAL))
    x[0] = -np.inf
    x[1, each : 2 * each], y[1] = -np.inf, 3
    x[2, each + 5] = np.nan
    x[3, 2 * each] = np.inf
    x[4, 9], y[4] = -np.inf, 9
    y[5], x[5, 0] = -100, np.nan
    y[6] = 3 * each + 2
    weight = np.ones(len(SPECIAL))
    weight[7], x[7, 1] = 0, np.inf
    how = given(OPTIONS[options], x.shape[1], rng) | {"sample_weight": weight}
    engine = emulated.engine(mode="check")
    _, stats = assert_right(x, y, how, engine)
    of_generic = row_stats(x, y, engine="generic", **{k: v for k, v in how.items() if k != "reduction"})
    with np.errstate(all="ignore"):
        for name in ("lse", "loss"):
            np.testing.assert_allclose(getattr(stats, name), getattr(of_generic, name), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(stats.correct, of_generic.correct)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_logits_further_apart_than_the_largest_number(dtype):
    """The gap of a part whose logits are all so far below overflows, but a share below 1 brings it back into range."""
    each = PART // np.dtype(dtype).itemsize
    x = np.full((2, 3 * each), 0.9 * np.finfo(dtype).max, dtype)
    x[0, :each] = x[1, each:] = -0.9 * np.finfo(dtype).max
    y = np.array([5, each + 5])
    weight = np.full(x.shape[1], 0.5)
    truth, _ = assert_right(x, y, {"reduction": "none", "validate": False, "weight": weight}, emulated.engine())
    assert np.isfinite(truth.loss).all()


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_the_first_of_the_largest_logits_is_correct(softcap):
    """Also if the ties are in other parts, or the label is a tie only after softcap."""
    each = PART // 4
    x = np.full((6, 4 * each), -1, np.float32)
    places = np.array([[5, each + 5, 3 * each], [each, 5, 3 * each], [3 * each, 5, each]])
    for k, turn in itertools.product(range(3), range(2)):
        x[k + 3 * turn, places[k]] = 40 if turn == 0 else [40, 80, 40]
    y = np.array([*places[:, 0], *places[:, 1]])
    wanted = np.argmax(x, 1) == y
    assert wanted.sum() == 1 + 3
    for order in ORDERS:
        engine = emulated.engine(mode="check", order=order)
        np.testing.assert_array_equal(row_stats(x, y, engine=engine, softcap=softcap, validate=False).correct, wanted)
        same = x.copy()
        found = cross_entropy_value_and_grad(
            same, y, engine=engine, softcap=softcap, validate=False, return_stats=True, out=same
        )
        np.testing.assert_array_equal(found[2].correct, wanted)


def test_a_row_is_the_same_in_every_order_and_place():
    """Bitwise, and by whichever public function."""
    rng = np.random.default_rng(1)
    x, y = rng.standard_normal((5, 700), dtype=np.float32), rng.integers(700, size=5)
    seen = set()
    for order, rows in itertools.product(ORDERS, [[0, 1, 2, 3, 4], [3, 2], [2]]):
        engine = emulated.engine(order=order, seed=len(rows))
        loss, grad = cross_entropy_value_and_grad(x[rows], y[rows], engine=engine, reduction="none", validate=False)
        alone = cross_entropy(x[rows], y[rows], engine=engine, reduction="none", validate=False)
        at = rows.index(2)
        seen.add((loss[at].tobytes(), grad[at].tobytes()))
        assert alone[at] == loss[at]
    assert len(seen) == 1


def test_softmax_and_its_logarithm():
    rng = np.random.default_rng(3)
    x = (rng.standard_normal((3, 900)) * 4).astype(np.float32)
    engine = emulated.engine(mode="check")
    given = x.astype(np.float64)
    shifted = given - given.max(1, keepdims=True)
    wanted = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    rows = _problem.problem_without_target(x, -1).rows
    np.testing.assert_allclose(engine.softmax(rows, log=True).reshape(x.shape), wanted, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(engine.softmax(rows, log=False).reshape(x.shape), np.exp(wanted), rtol=1e-5, atol=1e-9)
    assert [name.split("_")[1] for name in engine.launcher.launches] == ["split", "merge", "split"] * 2


def test_the_launches_of_a_call():
    """Two for losses, three with a gradient; one if the stats are given. The same for a repeated call."""
    rng = np.random.default_rng(3)
    x, y = rng.standard_normal((3, 900), dtype=np.float32), np.array([1, 700, 9])
    engine = emulated.engine()
    options = {"engine": engine, "validate": False}

    def launched(function, *arguments, **more):
        before = len(engine.launcher.launches)
        function(*arguments, **options, **more)
        return [name.split("_")[1] for name in engine.launcher.launches[before:]]

    assert launched(cross_entropy, x, y, reduction="none") == ["split", "merge"]
    assert launched(cross_entropy, x, y) == ["split", "merge", "sums"]
    assert launched(cross_entropy_value_and_grad, x, y, reduction="none") == ["split", "merge", "split"]
    stats = row_stats(x, y, **options)
    assert launched(cross_entropy_grad, x, y, stats=stats, reduction="sum") == ["split"]


def test_a_kept_call_makes_the_same_launches_for_other_numbers(monkeypatch):
    """And the arrays between its launches are allocated anew."""
    rng = np.random.default_rng(4)
    engine, n = emulated.engine(), 700
    for reduction in ("none", "mean"):
        for function in (lambda *a, **k: (cross_entropy(*a, **k),), cross_entropy_value_and_grad):
            for turn in range(3):
                x, y = rng.standard_normal((2, n), dtype=np.float32), rng.integers(n, size=2)
                options = {"reduction": reduction, "validate": False}
                wanted = function(x, y, engine=emulated.engine(), **options)
                with monkeypatch.context() as m:
                    if turn == 2:
                        m.setattr(_api, "problem_of", lambda *a, **k: pytest.fail("the call went the whole way"))
                    found = function(x, y, engine=engine, **options)
                for one, other in zip(found, wanted, strict=True):
                    assert one.tobytes() == other.tobytes()


BUGS = {  # (file, source text, what replaces it, options, whether the target is a distribution)
    "SPLIT: a label of the next part counts": ("problem.cuh", "named < count", "named <= count", "none", False),
    "SPLIT: every part has the label's mass": (
        "rows.cu", "if (OF_PART && row.label < 0) row.on_label = 0;", "", "none", False,
    ),
    "SPLIT: the last part is as long as others": ("rows.cu", "min(p.part, p.classes - start)", "p.part", "none", False),
    "SPLIT: the target is that of the first part": (
        "problem.cuh", "static_cast<const T*>(q) + start", "static_cast<const T*>(q)", "smoothing", True,
    ),
    "SPLIT: the weights are those of the first part": ("problem.cuh", "if (w) w += start;", "", "weights", False),
    "SPLIT: the gradient of another part": (
        "rows.cu", "gridDim.x - 1 - blockIdx.x", "gridDim.x - blockIdx.x", "none", False,
    ),
    "MERGE: the 1 of a lesser maximum is lost": ("stats.cuh", "(1 + low.rest)", "low.rest", "none", False),
    "MERGE: the gap below a greater maximum is lost": (
        "stats.cuh", "2 * times(low.mass, half_below(high.max, low.max))", "0", "none", False,
    ),
    "MERGE: half of that gap": ("stats.cuh", "2 * times(low.mass", "times(low.mass", "weights", True),
    "MERGE: no barrier between the warps' writing and reading": (
        "merge.cu", "sync_block();  // the stats", "// the stats", "none", False,
    ),
    "MERGE: only the first 128 parts": ("merge.cu", "part += blockDim.x", "part += p.parts", "none", False),
}  # fmt: skip


@pytest.mark.full
@pytest.mark.parametrize("bug", BUGS)
def test_planted_bug_is_caught(bug):
    file, old, new, options, soft = BUGS[bug]
    tally.COUNTS["planted"] += 1
    each = PART // 4
    rng = np.random.default_rng(5)
    x = (rng.standard_normal((3, 150 * each + 9)) * 3).astype(np.float32)
    y = rng.random(x.shape, dtype=np.float32) if soft else np.array([each, 149 * each, 3])
    engine = emulated.engine(mode="check", patches=[(old, new)])
    with pytest.raises((simt.SimtError, AssertionError)):
        assert_right(x, y, given(OPTIONS[options], x.shape[1], rng), engine)
    tally.COUNTS["caught"] += 1
    assert old in (cuda._kernels.folder() / file).read_text(encoding="utf-8")


def test_each_kernel_has_its_bugs():
    assert all(sum(name.startswith(family) for name in BUGS) >= 3 for family in ("SPLIT", "MERGE"))
