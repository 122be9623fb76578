"""Engines of several processes with NCCL: the kernels under emulation, and a stand-in for CuPy's communicator."""

import shutil

import ml_dtypes
import numpy as np
import pytest
from numpy.testing import assert_array_equal
from support import emulated, hosted, simt
from support.close import assert_grad, assert_loss
from support.oracle import oracle
from support.together import Nccl
from test_parallel import CUTS, OPTIONS, SAMPLE_WEIGHT, WEIGHT, of_slice, slices

from xent_array import CrossEntropyLoss, cross_entropy, cross_entropy_grad, cross_entropy_value_and_grad, row_stats
from xent_array._engines import cuda
from xent_array._engines.parallel import device
from xent_array._engines.parallel.exchange import CODES
from xent_array.parallel import BatchParallel, VocabParallel

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="the emulation needs g++")

RNG = np.random.default_rng(0)
ROWS, CLASSES = 40, 23
LOGITS = (3 * RNG.standard_normal((ROWS, CLASSES))).astype(np.float32)
LABELS = RNG.integers(0, CLASSES, ROWS)
SOFT = RNG.random((ROWS, CLASSES))
SOFT[SOFT < 0.3] = 0
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float64": np.float64}
OPTIONS = {**OPTIONS, "ignored": {"ignore_index": int(LABELS[3])}}


def rank_of(communicator):
    return communicator.rank_id()


def vocabulary(communicator, parts, classes=CLASSES, **how):
    """The engine of a rank, and the emulator that it launches on."""
    own = emulated.engine(seed=rank_of(communicator), **how)
    return VocabParallel(communicator, parts[rank_of(communicator)][0], classes, engine=own), own.launcher


def part_of(array, parts, communicator):
    start, stop = parts[rank_of(communicator)]
    return np.ascontiguousarray(array[:, start:stop])


@pytest.mark.full(but_one_per="cuts")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("cuts", CUTS)
def test_classes_in_slices(cuts, options, dtype):
    """One exchange, of four numbers per row; nobody waits; all get the same bits."""
    parts, options = slices(CUTS[cuts]), OPTIONS[options]
    logits = LOGITS.astype(DTYPES[dtype])
    for target in (LABELS, SOFT.astype(np.float32)):
        given = {k: v for k, v in options.items() if k != "ignore_index" or target is LABELS}
        for reduction in ("mean", "sum", "none"):
            together = Nccl(len(parts))

            def work(communicator, target=target, given=given, reduction=reduction):
                shared, launcher = vocabulary(communicator, parts)
                x = part_of(logits, parts, communicator)
                here = of_slice(target, *parts[rank_of(communicator)])
                here = np.ascontiguousarray(here)
                found = cross_entropy_value_and_grad(x, here, reduction=reduction, engine=shared, **given)
                assert launcher.waits == 0
                return found

            losses, grads = zip(*together.run(work), strict=True)
            assert len({np.asarray(loss).tobytes() for loss in losses}) == 1
            truth = oracle(logits, target, reduction=reduction, **given)
            assert_loss(losses[0], truth)
            assert_grad(np.concatenate(grads, axis=1), truth)
            head = 4 if dtype == "float64" else 8
            assert together.asked == [[(head + 4 * ROWS, CODES["float64" if dtype == "float64" else "float32"])]] * len(
                parts
            )


@pytest.mark.full(but_one_per="options")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS)
def test_long_rows_split_over_blocks(options, dtype, monkeypatch):
    for name, value in {"WHOLE": 0, "WHOLE_LOSS": 0, "WHOLE_GRAD": 0, "PART": 256}.items():
        monkeypatch.setattr(cuda, name, value)
    cuda.plan.cache_clear()
    cuda._chosen.cache_clear()
    try:
        rng, classes, parts = np.random.default_rng(1), 1000, [(0, 400), (400, 997), (997, 1000)]
        logits, labels = (3 * rng.standard_normal((9, classes))).astype(DTYPES[dtype]), rng.integers(0, classes, 9)
        labels[1] = 998
        given = {**OPTIONS[options]}
        given |= {k: rng.random(classes if k == "weight" else 9) for k in ("weight", "sample_weight") if k in given}

        def work(communicator):
            shared, launcher = vocabulary(communicator, parts, classes)
            x = part_of(logits, parts, communicator)
            return *cross_entropy_value_and_grad(x, labels, engine=shared, **given), launcher.launches

        losses, grads, launches = zip(*Nccl(3).run(work), strict=True)
        truth = oracle(logits, labels, **given)
        assert_loss(losses[0], truth)
        assert_grad(np.concatenate(grads, axis=1), truth)
        assert any("_split_" in name for name in launches[0])
        assert any("_merge_slice_" in name for name in launches[0])
    finally:
        cuda.plan.cache_clear()
        cuda._chosen.cache_clear()


def test_a_call_is_few_launches():
    """With its gradient: stats, what is counted, the head, the merge, the sum, the gradient."""
    parts = slices([0, 10])
    names = ("stats", "sums", "say", "slices", "sums", "grad")

    def work(communicator):
        shared, launcher = vocabulary(communicator, parts)
        x = part_of(LOGITS, parts, communicator)
        cross_entropy_value_and_grad(x, LABELS, engine=shared)
        both, launcher.launches = launcher.launches, []
        cross_entropy(x, LABELS, engine=shared)
        alone, launcher.launches = launcher.launches, []
        cross_entropy(x, LABELS, engine=shared, reduction="none")
        assert launcher.copies == launcher.waits == 0
        return both, alone, launcher.launches

    empty, *full = Nccl(3).run(work)
    for both, alone, rows in full:
        assert all(word in name for word, name in zip(names, both, strict=True))
        assert all(word in name for word, name in zip(("stats", "say", "slices", "sums"), alone, strict=True))
        assert all(word in name for word, name in zip(("stats", "say", "slices"), rows, strict=True))
    both, alone, rows = empty  # without classes
    assert all(word in name for word, name in zip(names[1:-1], both, strict=True))
    assert (len(alone), len(rows)) == (3, 2)


@pytest.mark.parametrize("mode", ["plain", pytest.param("check", marks=pytest.mark.full)])
def test_every_function_and_layout(mode):
    images = (2 * RNG.standard_normal((3, CLASSES, 4, 5))).astype(np.float32)
    labels = RNG.integers(0, CLASSES, (3, 4, 5))
    labels[0, 0, :2] = -100
    weights = {"sample_weight": RNG.random((3, 4, 5))}
    whole = cross_entropy_value_and_grad(images, labels, axis=1, return_stats=True, engine="numpy", **weights)
    parts = slices([4, 11])

    def work(communicator):
        start, stop = parts[rank_of(communicator)]
        shared, launcher = vocabulary(communicator, parts, mode=mode)
        order = ("C", "F", "C")[rank_of(communicator)]  # the rows of one rank are in another order in memory
        given = np.array(images[:, start:stop], order=order), labels
        options = {"axis": 1, "engine": shared, **weights}
        stats = row_stats(*given, **options)
        sce = CrossEntropyLoss(**options)
        found = (
            cross_entropy(*given, **options), cross_entropy_value_and_grad(*given, return_stats=True, **options),
            cross_entropy_grad(*given, **options), cross_entropy_grad(*given, stats=stats, **options),
            sce.forward(*given), sce.backward(), stats,
        )  # fmt: skip
        assert launcher.waits == 0
        return found

    together = Nccl(3)
    found = together.run(work)
    for (start, stop), answers in zip(parts, found, strict=True):
        loss, (again, grad, stats), alone, of_stats, forward, backward, rows = answers
        for each in (loss, again, forward):
            np.testing.assert_allclose(each, whole[0], rtol=1e-6)
        for each in (grad, alone, of_stats, backward):
            np.testing.assert_allclose(each, whole[1][:, start:stop], rtol=2e-5, atol=1e-9)
        for each in (stats, rows):
            assert_array_equal(each.correct, whole[2].correct)
            np.testing.assert_allclose(each.loss, whole[2].loss, rtol=1e-5)
    five, four = 8 + 5 * 60, 8 + 4 * 60
    assert together.asked == [[(n, 7) for n in (five, four, five, four, four)]] * 3


@pytest.mark.parametrize("rows", [1, 7, 300])
def test_an_odd_number_of_rows_with_five_numbers_each(rows):
    """Every message begins with words of 8 bytes."""
    logits, parts = np.resize(LOGITS, (rows, CLASSES)), slices([10, 10, 12])
    labels = np.where(np.arange(rows) % 2, np.resize(LABELS, rows), logits.argmax(axis=1))

    def work(communicator):
        shared, _ = vocabulary(communicator, parts, mode="check")
        return row_stats(part_of(logits, parts, communicator), labels, engine=shared)

    together = Nccl(4)
    whole = row_stats(logits, labels, engine="numpy")
    assert whole.correct.any()
    for stats in together.run(work):
        np.testing.assert_allclose(stats.loss, whole.loss, rtol=1e-5)
        assert_array_equal(stats.correct, whole.correct)
    assert together.asked[0] == [(8 + 5 * rows + rows % 2, 7)]


def test_labels_that_are_no_classes():
    labels = LABELS.copy()
    labels[[1, 5]] = [CLASSES, -7]
    parts = slices([10])

    def work(communicator):
        shared, _ = vocabulary(communicator, parts)
        x = part_of(LOGITS, parts, communicator)
        return cross_entropy_value_and_grad(x, labels, reduction="none", engine=shared)

    (loss, low), (_, high) = Nccl(2).run(work)
    truth = oracle(LOGITS, labels, reduction="none")
    assert_loss(loss, truth)
    assert_grad(np.concatenate([low, high], axis=1), truth)


@pytest.mark.parametrize("count", [0, cuda.SUM_TOGETHER + 100])
def test_no_rows_and_very_many(count):
    logits, labels, parts = LOGITS[:1, :2].repeat(count, 0), LABELS[:1].repeat(count) % 2, [(0, 1), (1, 2)]
    logits = logits * RNG.random((count, 1), np.float32)

    def work(communicator):
        shared, _ = vocabulary(communicator, parts, 2)
        return cross_entropy_value_and_grad(part_of(logits, parts, communicator), labels, engine=shared)

    (loss, low), (_, high) = Nccl(2).run(work)
    assert low.shape == high.shape == (count, 1)
    if count:
        truth = oracle(logits, labels)
        assert_loss(loss, truth)
        assert_grad(np.concatenate([low, high], axis=1), truth)
    else:
        assert np.isnan(loss)


def test_many_processes():
    """More than a warp, of which most have no class: merged as a tree."""
    ranks = 70
    cuts = np.sort(np.random.default_rng(5).integers(0, CLASSES, ranks - 1))
    parts = slices(cuts.tolist())

    def work(communicator):
        shared, _ = vocabulary(communicator, parts)
        return cross_entropy(part_of(LOGITS, parts, communicator), LABELS, reduction="none", engine=shared)

    losses = Nccl(ranks).run(work)
    assert_loss(losses[0], oracle(LOGITS, LABELS, reduction="none"))
    assert len({loss.tobytes() for loss in losses}) == 1


# -- what ranks do not agree about -----------------------------------------------------------------------------------


def asked(communicator, start=None, options=None, calls=0, **others):
    """Loss and gradient of a call in slices of 10, 5 and 8 classes."""
    parts = slices([10, 15])
    first, stop = parts[rank_of(communicator)]
    shared = VocabParallel(communicator, first if start is None else start, CLASSES, engine=emulated.engine())
    shared.calls += calls
    given = {"logits": LOGITS[:, first:stop], "target": LABELS} | others
    return cross_entropy_value_and_grad(given["logits"].copy(), given["target"], engine=shared,
                                        **(options or {}))  # fmt: skip


def differing(broken, **how):
    """What each of three ranks gets where one of them asks otherwise."""
    return Nccl(3).run(lambda communicator: asked(communicator, **(how if rank_of(communicator) == broken else {})))


def assert_all_nan(found):
    """Except in rows that do not count."""
    loss, grad = found
    assert np.isnan(loss).all()
    assert np.isnan(grad[SAMPLE_WEIGHT[: len(grad)] != 0]).all()
    assert (np.isnan(grad) | (grad == 0)).all()


DIFFERENCES = [
    {"options": {"reduction": "sum"}}, {"options": {"softcap": 3.0}}, {"options": {"z_loss": 0.5}},
    {"options": {"label_smoothing": 0.1}}, {"options": {"grad_output": 2}}, {"options": {"weight": WEIGHT}},
    {"options": {"denominator": 7}}, {"options": {"sample_weight": SAMPLE_WEIGHT}}, {"options": {"ignore_index": 3}},
    {"logits": LOGITS[:, 10:15].astype(np.float16)}, {"calls": 1}, {"start": 9}, {"start": 11},
    {"logits": LOGITS[:, 10:14]}, {"logits": LOGITS[:, 10:16]},
]  # fmt: skip


@pytest.mark.parametrize("how", DIFFERENCES, ids=lambda how: " ".join([*how, *how.get("options", ())]))
def test_ranks_that_ask_otherwise(how):
    """NaN everywhere, rather than a wrong number: nobody waits to learn why."""
    for found in differing(1, **how):
        assert_all_nan(found)


def test_ranks_that_agree_get_numbers():
    """As in the previous test, so that it can fail."""
    for loss, grad in differing(1):
        assert np.isfinite(loss)
        assert np.isfinite(grad).all()


FAILURES = [
    ({"options": {"label_smoothing": 2.0}}, ValueError, "label_smoothing must be from 0 to 1, got 2.0"),
    ({"options": {"weight": np.ones(5)}}, ValueError, "weight must have one number per class, (23,)"),
    ({"target": LABELS[:3]}, ValueError, "target of shape (3,) does not fit"),
    ({"options": {"out": np.ones((ROWS, 2), np.float32)}}, ValueError, "out must have the shape of logits"),
    ({"options": {"grad_output": "much"}}, TypeError, "grad_output must be a number"),
    ({"logits": np.ones((ROWS, 4), complex)}, TypeError, "logits must be of dtype"),
    ({"start": 22}, ValueError, "from class 22 on, of only 23 in all"),
    ({"logits": np.ma.array(LOGITS[:, :5])}, TypeError, "logits must be a plain array"),
]
FAILED = ["smoothing", "weight", "target", "out", "grad_output", "logits", "start", "kind"]


@pytest.mark.parametrize("broken", range(3))
@pytest.mark.parametrize(("how", "kind", "says"), FAILURES, ids=FAILED)
def test_a_rank_that_fails(broken, how, kind, says):
    """It raises its own error; the others, for whom it takes part in the exchange, get NaN."""
    found = differing(broken, **how)
    assert isinstance(found[broken], kind)
    assert says in str(found[broken])
    for rank in {*range(3)} - {broken}:
        assert_all_nan(found[rank])


@pytest.mark.parametrize("stage", ["own_cuda", "stats_of_slice", "_question"])
def test_a_rank_that_fails_later(stage, monkeypatch):
    """While it computes: from then on it must not be waited for either."""
    owner = device if hasattr(device, stage) else VocabParallel
    broken, real = [], getattr(owner, stage)

    def fails(first, rows, *more):
        if rows.start == 10:  # those of one rank
            broken.append(stage)
            raise MemoryError("no room")
        return real(first, rows, *more)

    monkeypatch.setattr(owner, stage, fails)
    found = differing(None)
    assert isinstance(found[1], MemoryError)
    assert broken
    assert_all_nan(found[0])
    assert_all_nan(found[2])


def test_row_stats_of_a_rank_that_fails():
    """With as many numbers as the others send: five."""
    parts = slices([10])
    together = Nccl(2)

    def work(communicator):
        shared, _ = vocabulary(communicator, parts)
        options = {"softcap": -1.0} if rank_of(communicator) else {}
        return row_stats(part_of(LOGITS, parts, communicator), LABELS, engine=shared, **options)

    stats, error = together.run(work)
    assert isinstance(error, ValueError)
    assert np.isnan(stats.loss).all()
    assert not stats.correct.any()
    assert together.asked == [[(8 + 5 * ROWS, 7)]] * 2


# -- with validate=True ----------------------------------------------------------------------------------------------


def test_what_is_validated_is_told_in_words():
    """As on the host: the numbers of labels and weights are compared, too."""
    for how, says in (
        ({"options": {"reduction": "sum"}}, "reduction=sum"),
        ({"target": LABELS[::-1]}, "target=<40 numbers"),
        ({"options": {"weight": WEIGHT}}, "weight=<23 numbers"),
        ({"start": 9}, "the slices of the classes overlap at class 9"),
        ({"logits": LOGITS[:, 10:14]}, "the slices of the classes leave out class 14"),
    ):
        how["options"] = how.get("options", {}) | {"validate": True}
        asks = [{"options": {"validate": True}}, how, {"options": {"validate": True}}]
        found = Nccl(3).run(lambda communicator, asks=asks: asked(communicator, **asks[rank_of(communicator)]))
        assert [type(error) for error in found] == [ValueError] * 3, found
        assert len({str(error) for error in found}) == 1
        assert says in str(found[0])


@pytest.mark.parametrize(("how", "kind", "says"), FAILURES, ids=FAILED)
def test_a_rank_that_fails_where_all_validate(how, kind, says):
    how = {**how, "options": how.get("options", {}) | {"validate": True}}
    asks = [{"options": {"validate": True}}, how, {"options": {"validate": True}}]
    found = Nccl(3).run(lambda communicator: asked(communicator, **asks[rank_of(communicator)]))
    assert isinstance(found[1], kind)
    for other in (found[0], found[2]):
        assert isinstance(other, RuntimeError)
        assert str(other).startswith(f"the process of rank 1 failed: {kind.__name__}: ")
        assert says in str(other)


def test_labels_are_validated():
    labels = np.where(np.arange(ROWS) == 7, CLASSES, LABELS)
    for error in Nccl(3).run(lambda communicator: asked(communicator, target=labels, options={"validate": True})):
        assert isinstance(error, IndexError)
        assert "target[7] is 23, which is not a class" in str(error)
    truth = oracle(LOGITS, LABELS)
    losses, _ = zip(*Nccl(3).run(lambda communicator: asked(communicator, options={"validate": True})), strict=True)
    for loss in losses:
        assert_loss(loss, truth)


# -- rows ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("validate", [None, True])
@pytest.mark.parametrize("options", ["plain", "weights", "smoothing of weights", "ignored"])
def test_batches_in_parts(options, validate):
    """Of unequal size, of which one has no row that counts."""
    parts, options = [(0, 7), (7, 7), (7, 8), (8, ROWS)], OPTIONS[options]
    for target in (LABELS, SOFT.astype(np.float32)):
        given = {k: v for k, v in options.items() if k != "ignore_index" or target is LABELS}
        for reduction in ("mean", "sum", "none"):
            together = Nccl(len(parts))

            def work(communicator, target=target, given=given, reduction=reduction):
                start, stop = parts[rank_of(communicator)]
                here = {k: v[start:stop] if k == "sample_weight" else v for k, v in given.items()}
                own = emulated.engine(mode="check")
                shared = BatchParallel(communicator, engine=own)
                found = cross_entropy_value_and_grad(
                    LOGITS[start:stop], target[start:stop], reduction=reduction, engine=shared, validate=validate,
                    **here,
                )  # fmt: skip
                assert validate or own.launcher.waits == 0
                return found

            losses, grads = zip(*together.run(work), strict=True)
            truth = oracle(LOGITS, target, reduction=reduction, **given)
            assert_loss(np.concatenate(losses) if reduction == "none" else np.sum(losses, dtype=np.float32), truth)
            assert_grad(np.concatenate(grads), truth)
            assert [each[-1] for each in together.asked] == [(6, 8)] * len(parts)
            assert validate or len(together.asked[0]) == 1


@pytest.mark.parametrize(
    "how", [{"label_smoothing": 0.1}, {"denominator": 3.0}, {"softcap": -1.0}, {"reduction": "sum"}]
)
def test_batches_that_differ_or_fail(how):
    def work(communicator):
        here = slice(20 * rank_of(communicator), 20 * rank_of(communicator) + 20)
        options = how if rank_of(communicator) else {}
        shared = BatchParallel(communicator, engine=emulated.engine())
        return cross_entropy_value_and_grad(LOGITS[here], LABELS[here], engine=shared, **options)

    first, second = Nccl(2).run(work)
    assert_all_nan(first)
    if "softcap" in how:
        assert isinstance(second, ValueError)
    elif "label_smoothing" in how:
        assert_all_nan(second)


def test_batches_by_every_function():
    parts = [slice(0, 30), slice(30, ROWS)]
    whole, grad, stats = cross_entropy_value_and_grad(LOGITS, LABELS, weight=WEIGHT, return_stats=True, engine="numpy")

    def work(communicator):
        here = parts[rank_of(communicator)]
        options = {"weight": WEIGHT, "engine": BatchParallel(communicator, engine=emulated.engine())}
        given = LOGITS[here], LABELS[here]
        loss, grad, stats = cross_entropy_value_and_grad(*given, return_stats=True, **options)
        sce = CrossEntropyLoss(**options)
        found = cross_entropy(*given, **options), loss, sce.forward(*given)
        return found, (grad, sce.backward(), cross_entropy_grad(*given, stats=stats, **options)), stats.loss

    (losses, grads, low), (other, more, high) = Nccl(2).run(work)
    np.testing.assert_allclose(np.add(losses, other), whole, rtol=1e-6)
    for one, two in zip(grads, more, strict=True):
        np.testing.assert_allclose(np.concatenate([one, two]), grad, rtol=1e-5, atol=1e-9)
    np.testing.assert_allclose(np.concatenate([low, high]), stats.loss, rtol=1e-5)


# -- arguments -------------------------------------------------------------------------------------------------------


def test_arrays_that_are_not_on_a_gpu_are_declined():
    communicator = Nccl(1).of(0)
    for engine in (VocabParallel(communicator, 0, CLASSES), BatchParallel(communicator)):
        with pytest.raises(ValueError, match="it takes CuPy arrays, and these are of numpy"):
            cross_entropy(LOGITS, LABELS, engine=engine)
    with pytest.raises(ValueError, match=r"engine='cpu'.*CuPy's need 'cuda'"):
        cross_entropy(LOGITS, LABELS, engine=VocabParallel(communicator, 0, CLASSES, engine="cpu"))


def test_more_processes_than_a_kernel_sorts():
    together = Nccl(1)
    together.size = device.MOST + 1
    shared = VocabParallel(together.of(0), 0, CLASSES, engine=emulated.engine())
    with pytest.raises(ValueError, match="it takes CuPy arrays from at most 1024 processes, and there are 1025"):
        cross_entropy(LOGITS, LABELS, engine=shared)


# (correct source text, what replaces it, which test finds it)
BUGS = {
    "questions are not compared": (
        "wrong |= head_word(message, 0) != p.question || (classes", "wrong |= (classes",
        lambda: test_ranks_that_ask_otherwise({"calls": 1})),
    "slices are not compared": (
        "(classes != 0 && before != start)", "false", lambda: test_ranks_that_ask_otherwise({"start": 9})),
    "classes that are left out at the end": (
        "place == p.ranks - 1 && before + classes != p.rows.vocabulary", "false",
        lambda: test_a_slice_is_left_out_at_the_end()),
    "slices in the order of ranks": ("order[place] = rank;", "order[rank] = rank;", lambda: test_ties_of_slices()),
    "the last slice is lost": (
        "for (int k = 0; k < p.ranks; ++k) {", "for (int k = 0; k < p.ranks - 1; ++k) {",
        lambda: test_many_processes()),
    "a level of the tree is lost": (
        "whole = any ? merge(held[level], whole) : held[level];", "whole = held[level];",
        lambda: test_many_processes()),
    "a slice without classes says nothing": (
        "if (k < p.numbers) values[k * p.rows + r] = numbers[k];", "", lambda: test_many_processes()),
    "correct is not said": (
        "values[4 * p.rows + r] = p.correct[r];", "values[4 * p.rows + r] = 0;",
        lambda: test_an_odd_number_of_rows_with_five_numbers_each(7)),
    "the ticket is not zeroed": (
        "= open(p.rows);",
        "= p.rows;",
        lambda: test_no_rows_and_very_many(cuda.SUM_TOGETHER + 100)),
    "questions of batches are not compared": (
        "wrong |= head_word(message, 0) != p.question;", "",
        lambda: test_batches_that_differ_or_fail({"label_smoothing": 0.1})),
    "the divisor of one batch only": (
        "sum = lanes_sum<32>(sum);", "", lambda: test_batches_by_every_function()),
}  # fmt: skip


def test_a_slice_is_left_out_at_the_end():
    def work(communicator):
        shared, _ = vocabulary(communicator, [(0, 10), (10, CLASSES)], CLASSES + 1)
        return cross_entropy_value_and_grad(part_of(LOGITS, [(0, 10), (10, CLASSES)], communicator), LABELS,
                                            engine=shared)  # fmt: skip

    for found in Nccl(2).run(work):
        assert_all_nan(found)


def test_ties_of_slices():
    """The first of the largest logits counts, in the order of classes, which need not be that of ranks."""
    logits, labels, parts = (
        np.zeros((4, CLASSES), np.float32),
        np.array([0, 1, 12, 22]),
        [(15, CLASSES), (0, 8), (8, 15)],
    )

    def work(communicator):
        shared, _ = vocabulary(communicator, parts)
        return row_stats(part_of(logits, parts, communicator), labels, engine=shared)

    for stats in Nccl(3).run(work):
        assert stats.correct.tolist() == [True, False, False, False]
        np.testing.assert_allclose(stats.loss, np.log(CLASSES), rtol=1e-6)


@pytest.mark.full
@pytest.mark.parametrize("bug", BUGS)
def test_planted_bug_is_caught(bug, monkeypatch):
    old, new, test = BUGS[bug]
    assert (cuda._kernels.folder() / "slices.cu").read_text(encoding="utf-8").count(old) == 1
    real = emulated.engine
    monkeypatch.setattr(emulated, "engine", lambda **how: real(**{**how, "patches": [(old, new)]}))
    with pytest.raises((AssertionError, simt.SimtError, ValueError, TypeError)):
        test()


@pytest.mark.parametrize("axis", [0, 1])
def test_arrays_of_cupy(axis):
    """Nothing is asked of CuPy but memory, pointers and its stream: it has no GPU here, and could not compute."""
    pytest.importorskip("cupy")
    parts = slices([7, 7])
    whole = cross_entropy_value_and_grad(LOGITS, LABELS, return_stats=True, engine="numpy")

    def work(communicator):
        start, stop = parts[rank_of(communicator)]
        with hosted.allocating():
            x = hosted.to_cupy(np.array(LOGITS[:, start:stop] if axis else LOGITS.T[start:stop], order="C"))
            shared = VocabParallel(communicator, start, CLASSES, engine=cuda.Cuda(hosted.Hosted()))
            given = {"target": hosted.to_cupy(LABELS), "axis": axis, "engine": shared, "return_stats": True}
            loss, grad, stats = cross_entropy_value_and_grad(x, **given)
            assert type(loss) is type(grad) is type(x)
            found = [hosted.to_numpy(each).copy() for each in (loss, grad, stats.correct)]
        return found[0], found[1] if axis else found[1].T, found[2]

    with hosted.cupy_on_host():
        together = Nccl(3)
        losses, grads, correct = zip(*together.run(work), strict=True)
    np.testing.assert_allclose(losses, whole[0], rtol=1e-6)
    np.testing.assert_allclose(np.concatenate(grads, axis=1), whole[1], rtol=2e-5, atol=1e-9)
    assert_array_equal(correct[1], whole[2].correct)
    assert together.asked[0] == [(8 + 5 * ROWS, 7)]


def test_batches_of_cupy_arrays():
    pytest.importorskip("cupy")
    parts = [slice(0, 30), slice(30, ROWS)]

    def work(communicator):
        here = parts[rank_of(communicator)]
        with hosted.allocating():
            x, y = hosted.to_cupy(LOGITS[here]), hosted.to_cupy(LABELS[here])
            shared = BatchParallel(communicator, engine=cuda.Cuda(hosted.Hosted()))
            loss, grad = cross_entropy_value_and_grad(x, y, engine=shared, ignore_index=1)
            return hosted.to_numpy(loss).copy(), hosted.to_numpy(grad).copy()

    with hosted.cupy_on_host():
        losses, grads = zip(*Nccl(2).run(work), strict=True)
    truth = oracle(LOGITS, LABELS, ignore_index=1)
    assert_loss(np.add(*losses), truth)
    assert_grad(np.concatenate(grads), truth)


def test_codes_of_dtypes_are_those_of_nccl():
    nccl = pytest.importorskip("cupy.cuda.nccl")
    if not nccl.available:
        pytest.skip("CuPy finds no NCCL")
    assert {name: getattr(nccl, f"NCCL_{name.upper()}") for name in CODES} == CODES
