"""Engines of several processes: here as threads, and in `test_mpi.py` as processes."""

import shutil

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from support import emulated
from support.close import assert_grad, assert_loss
from support.oracle import oracle
from support.together import Threads

from xent_array import CrossEntropyLoss, cross_entropy, cross_entropy_grad, cross_entropy_value_and_grad, row_stats
from xent_array._engines import cpu, generic, loss_and_grad
from xent_array._rows import Rows
from xent_array.parallel import Alone, BatchParallel, VocabParallel

RNG = np.random.default_rng(0)
ROWS, CLASSES = 40, 23
LOGITS = 3 * RNG.standard_normal((ROWS, CLASSES))
LABELS = RNG.integers(0, CLASSES, ROWS)
WEIGHT, SAMPLE_WEIGHT = RNG.random(CLASSES) + 0.1, RNG.random(ROWS)
SAMPLE_WEIGHT[::7] = 0
SOFT = RNG.random((ROWS, CLASSES))
SOFT[SOFT < 0.3] = 0
CUTS = {"one": [], "two": [10], "uneven": [1, 2, 17], "empty": [0, 9, 9, CLASSES], "each": [*range(1, CLASSES)]}
OPTIONS = {
    "plain": {},
    "ignored": {"ignore_index": int(LABELS[3])},
    "weights": {"weight": WEIGHT, "sample_weight": SAMPLE_WEIGHT},
    "smoothing": {"label_smoothing": 0.2},
    "smoothing of weights": {"label_smoothing": 0.2, "weight": WEIGHT},
    "softcap and z-loss": {"softcap": 4.0, "z_loss": 0.1},
    "upstream": {"label_smoothing": 0.1, "weight": WEIGHT, "z_loss": 0.1, "grad_output": 3.0},
}


def slices(cuts):
    return [*zip([0, *cuts], [*cuts, CLASSES], strict=True)]


def of_slice(target, start, stop):
    return target[:, start:stop] if target.ndim == 2 else target


needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="the emulation needs g++")
each_engine = pytest.mark.parametrize(
    "engine", ["cpu", "numpy", "generic", pytest.param("emulated cuda", marks=needs_compiler)]
)


def named(engine):
    """The engine of that name, for one rank."""
    return emulated.engine() if engine == "emulated cuda" else engine


@each_engine
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("cuts", CUTS)
def test_classes_in_slices(cuts, options, engine):
    parts, options = slices(CUTS[cuts]), OPTIONS[options]
    for target in (LABELS, SOFT):
        given = {k: v for k, v in options.items() if k != "ignore_index" or target is LABELS}
        for reduction in ("mean", "sum", "none"):
            together = Threads(len(parts))

            def work(communicator, target=target, given=given, reduction=reduction, parts=parts):
                start, stop = parts[communicator.rank]
                shared = VocabParallel(communicator, start, CLASSES, engine=named(engine))
                x = np.ascontiguousarray(LOGITS[:, start:stop])
                return cross_entropy_value_and_grad(
                    x, of_slice(target, start, stop), reduction=reduction, engine=shared, **given
                )

            found = together.run(work)
            losses, grads = zip(*found, strict=True)
            assert len({np.asarray(loss).tobytes() for loss in losses}) == 1
            truth = oracle(LOGITS, target, reduction=reduction, **given)
            assert_loss(losses[0], truth)
            assert_grad(np.concatenate(grads, axis=1), truth)
            assert together.gathers == [1] * len(parts)


@pytest.mark.parametrize("classes", [5, 700])
@pytest.mark.parametrize("inner", [1, 40])
def test_a_slice_by_every_loop(classes, inner):
    """Labels in it, and in another one, of which here is only what label smoothing adds."""
    logits = RNG.standard_normal((40 // inner, classes, inner))
    target = RNG.integers(0, 2 * classes, (40 // inner, inner))
    for options in ({}, {"label_smoothing": 0.2}, {"label_smoothing": 0.2, "weight": RNG.random(2 * classes)}):
        rows = Rows(np, logits, logits.dtype, target, start=classes, vocabulary=2 * classes, **options)
        wanted = loss_and_grad(generic, rows, None)
        for engine in (cpu.engine, cpu.numpy_engine, emulated.engine(mode="check")):
            for found, right in zip(loss_and_grad(engine, rows, None), wanted, strict=True):
                np.testing.assert_allclose(found, right, rtol=1e-12, atol=1e-15)


def test_every_function_and_layout():
    images = 2 * RNG.standard_normal((3, CLASSES, 4, 5))
    labels = RNG.integers(0, CLASSES, (3, 4, 5))
    labels[0, 0, :2] = -100
    whole = cross_entropy_value_and_grad(images, labels, axis=1, return_stats=True)
    parts = slices([4, 11])

    def work(communicator):
        start, stop = parts[communicator.rank]
        shared = VocabParallel(communicator, start, CLASSES)
        order = ("C", "F", "C")[communicator.rank]  # what is slow in memory is nobody else's concern
        given = np.array(images[:, start:stop], order=order), labels
        options = {"axis": 1, "engine": shared}
        stats = row_stats(*given, **options)
        sce = CrossEntropyLoss(**options)
        return (
            cross_entropy(*given, **options), cross_entropy_value_and_grad(*given, return_stats=True, **options),
            cross_entropy_grad(*given, **options), cross_entropy_grad(*given, stats=stats, **options),
            sce.forward(*given), sce.backward(), stats,
        )  # fmt: skip

    together = Threads(3)
    found = together.run(work)
    for (start, stop), answers in zip(parts, found, strict=True):
        loss, (again, grad, stats), alone, of_stats, forward, backward, rows = answers
        for each in (loss, again, forward):
            np.testing.assert_allclose(each, whole[0], rtol=1e-14)
        for each in (grad, alone, of_stats, backward):
            np.testing.assert_allclose(each, whole[1][:, start:stop], rtol=1e-12, atol=1e-17)
        for each in (stats, rows):
            assert_array_equal(each.correct, whole[2].correct)
            np.testing.assert_allclose(each.loss, whole[2].loss, rtol=1e-13)
    assert together.gathers == [5, 5, 5]  # saved stats, and those of a forward, cost none


def test_what_is_sent_does_not_depend_on_the_classes():
    sent = []
    for classes in (10, 10_000):
        together = Threads(2)

        def work(communicator, classes=classes):
            shared = VocabParallel(communicator, communicator.rank * classes, 2 * classes)
            return cross_entropy(np.zeros((1000, classes), np.float32), np.zeros(1000, int), engine=shared)

        np.testing.assert_allclose(together.run(work), np.log(2 * classes), rtol=1e-6)
        sent.append(together.bytes[0])
    assert max(sent) - min(sent) < 20  # digits of how many classes there are
    assert max(sent) < 16 * 1000 + 500  # four numbers of float32 per row, and what is asked


def test_labels_that_are_no_classes():
    labels = LABELS.copy()
    labels[[1, 5]] = [CLASSES, -7]

    def work(communicator, **options):
        start, stop = slices([10])[communicator.rank]
        shared = VocabParallel(communicator, start, CLASSES)
        return cross_entropy_value_and_grad(LOGITS[:, start:stop], labels, reduction="none", engine=shared, **options)

    for error in Threads(2).run(work):
        assert isinstance(error, IndexError)
        assert "labels must be from 0 to 22" in str(error)
    (loss, low), (_, high) = Threads(2).run(lambda communicator: work(communicator, validate=False))
    truth = oracle(LOGITS, labels, reduction="none")
    assert_loss(loss, truth)
    assert_grad(np.concatenate([low, high], axis=1), truth)


# -- rows ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, OPTIONS["weights"], OPTIONS["smoothing of weights"], OPTIONS["ignored"]], ids=len
)
def test_batches_in_parts(options):
    """Of unequal size, of which one has no row that counts."""
    parts = [(0, 7), (7, 7), (7, 8), (8, ROWS)]
    for reduction in ("mean", "sum", "none"):

        def work(communicator, reduction=reduction):
            start, stop = parts[communicator.rank]
            given = {k: v[start:stop] if k == "sample_weight" else v for k, v in options.items()}
            shared = BatchParallel(communicator)
            here = LOGITS[start:stop], LABELS[start:stop]
            return cross_entropy_value_and_grad(*here, reduction=reduction, engine=shared, **given)

        together = Threads(len(parts))
        losses, grads = zip(*together.run(work), strict=True)
        truth = oracle(LOGITS, LABELS, reduction=reduction, **options)
        assert_loss(np.concatenate(losses) if reduction == "none" else np.sum(losses), truth)
        assert_grad(np.concatenate(grads), truth)
        assert together.gathers == [1] * len(parts)


def test_batches_by_every_function():
    whole, grad = cross_entropy_value_and_grad(LOGITS, LABELS, weight=WEIGHT)
    parts = [slice(0, 30), slice(30, ROWS)]

    def work(communicator):
        here = parts[communicator.rank]
        options = {"weight": WEIGHT, "engine": BatchParallel(communicator, engine="numpy")}
        given = LOGITS[here], LABELS[here]
        loss, grad, stats = cross_entropy_value_and_grad(*given, return_stats=True, **options)
        sce = CrossEntropyLoss(**options)
        found = cross_entropy(*given, **options), loss, sce.forward(*given)
        return found, (grad, sce.backward(), cross_entropy_grad(*given, stats=stats, **options)), stats.loss

    (losses, grads, low), (other, more, high) = Threads(2).run(work)
    np.testing.assert_allclose(np.add(losses, other), whole, rtol=1e-14)
    for one, two in zip(grads, more, strict=True):
        np.testing.assert_allclose(np.concatenate([one, two]), grad, rtol=1e-12, atol=1e-17)
    np.testing.assert_allclose(np.concatenate([low, high]), row_stats(LOGITS, LABELS, weight=WEIGHT).loss, rtol=1e-14)


# -- failures ------------------------------------------------------------------------------------------------------


def asked(communicator, start=None, options=None, **others):
    """A call in slices of 10, 5 and 8 classes."""
    first, stop = slices([10, 15])[communicator.rank]
    shared = VocabParallel(communicator, first if start is None else start, CLASSES)
    given = {"logits": LOGITS[:, first:stop], "target": LABELS} | others
    return cross_entropy_value_and_grad(given["logits"], given["target"], engine=shared, **(options or {}))


def failing(broken, **how):
    """What each of three ranks raises where one of them asks otherwise."""
    return Threads(3).run(lambda communicator: asked(communicator, **(how if communicator.rank == broken else {})))


@pytest.mark.parametrize("broken", range(3))
@pytest.mark.parametrize(
    ("how", "kind", "says"),
    [
        ({"options": {"label_smoothing": 2.0}}, ValueError, "label_smoothing must be from 0 to 1, got 2.0"),
        ({"options": {"weight": np.ones(5)}}, ValueError, "weight must have one number per class, (23,)"),
        ({"target": LABELS[:3]}, ValueError, "target of shape (3,) does not fit"),
        ({"options": {"out": np.ones((ROWS, 2))}}, ValueError, "out must have the shape of logits"),
        ({"options": {"grad_output": "much"}}, TypeError, "grad_output must be a number"),
        ({"logits": np.ones((ROWS, 4), complex)}, TypeError, "logits must be of dtype"),
        ({"start": 20}, ValueError, "from class 20 on, of only 23 in all"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)  # fmt: skip
def test_a_rank_that_fails(broken, how, kind, says):
    """It raises its own error, and every other one tells of that."""
    if "start" in how and broken < 1:
        how = {"start": 22}
        says = says.replace("20", "22")
    found = failing(broken, **how)
    assert isinstance(found[broken], kind)
    assert says in str(found[broken])
    for rank in {*range(3)} - {broken}:
        assert isinstance(found[rank], RuntimeError)
        assert str(found[rank]).startswith(f"the process of rank {broken} failed: {kind.__name__}: ")
        assert says in str(found[rank])


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"options": {"reduction": "sum"}}, "reduction=sum"), ({"options": {"softcap": 3.0}}, "softcap=3.0"),
        ({"logits": LOGITS[:, :5].astype(np.float32)}, "logits=float32"),
        ({"options": {"return_stats": True}}, "asked=row_stats"), ({"options": {"grad_output": 2}}, "grad_output=2.0"),
        ({"logits": LOGITS[:9, 10:15], "target": LABELS[:9]}, "rows=9"),
        ({"target": LABELS[::-1]}, "target=<40 numbers"),
        ({"options": {"weight": WEIGHT}}, "weight=<23 numbers"), ({"options": {"denominator": 7}}, "denominator=7.0"),
        ({"options": {"sample_weight": SAMPLE_WEIGHT}}, "sample_weight=<40 numbers"),
    ],
)  # fmt: skip
def test_ranks_that_ask_otherwise(how, says):
    found = failing(1, **how)
    assert len({str(error) for error in found}) == 1
    assert isinstance(found[0], ValueError)
    assert str(found[0]).startswith("all processes must make the same calls; rank 0 passes ")
    assert says in str(found[0])


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"start": 9}, "overlap at class 9"), ({"start": 11}, "leave out class 10"),
        ({"logits": LOGITS[:, 10:14]}, "leave out class 14"), ({"logits": LOGITS[:, 10:16]}, "overlap at class 15"),
    ],
    ids=["too low", "too high", "too few", "too many"],
)  # fmt: skip
def test_slices_that_do_not_fit_together(how, says):
    found = failing(1, **how)
    assert [type(error) for error in found] == [ValueError] * 3
    assert {str(error) for error in found} == {f"the slices of the classes {says}"}


def test_classes_that_nobody_has():
    with pytest.raises(ValueError, match="leave out class 23, of 30"):
        cross_entropy(LOGITS, LABELS, engine=VocabParallel(Alone(), 0, 30))


def test_rows_of_which_there_are_none():
    loss, grad = cross_entropy_value_and_grad(LOGITS[:0], LABELS[:0], engine=VocabParallel(Alone(), 0, CLASSES))
    assert np.isnan(loss)
    assert grad.shape == (0, CLASSES)


def test_a_slice_without_classes_may_lie_anywhere():
    parts = [(0, 10), (4, 4), (10, CLASSES), (CLASSES, CLASSES)]

    def work(communicator):
        start, stop = parts[communicator.rank]
        return cross_entropy(LOGITS[:, start:stop], LABELS, engine=VocabParallel(communicator, start, CLASSES))

    assert_loss(Threads(4).run(work)[1], oracle(LOGITS, LABELS))


@each_engine
@pytest.mark.parametrize("classes", [CLASSES, 1200])
def test_a_label_in_a_slice_that_is_masked(engine, classes):
    logits, labels, half = RNG.standard_normal((ROWS, classes)), RNG.integers(0, classes, ROWS), classes // 2
    logits[:, :half] = -np.inf
    for axis in (0, 1):

        def work(communicator, axis=axis):
            start, stop = ((0, half), (half, classes))[communicator.rank]
            x = logits[:, start:stop] if axis else np.ascontiguousarray(logits[:, start:stop].T)
            shared = VocabParallel(communicator, start, classes, engine=named(engine))
            return cross_entropy(x, labels, axis=axis, reduction="none", engine=shared)

        loss, _ = Threads(2).run(work)
        assert_loss(loss, oracle(logits, labels, reduction="none"))
        assert np.isinf(loss[labels < half]).all()


def test_processes_that_have_lost_each_other():
    """One has failed where no other could learn of it: the next call is an error, not a wrong number."""
    engines = {}

    def work(communicator):
        start, stop = slices([10])[communicator.rank]
        shared = engines.setdefault(communicator.rank, VocabParallel(communicator, start, CLASSES))
        shared.calls += communicator.rank
        return cross_entropy(LOGITS[:, start:stop], LABELS, engine=shared)

    assert {str(error) for error in Threads(2).run(work)} == {
        "all processes must make the same calls; rank 0 passes call=1, and rank 1 call=2"
    }


def test_an_interrupt_is_told(monkeypatch):
    def work(communicator):
        start, stop = slices([10])[communicator.rank]
        shared = VocabParallel(communicator, start, CLASSES)
        if communicator.rank:
            monkeypatch.setattr(shared, "own", interrupted)
        try:
            return cross_entropy(LOGITS[:, start:stop], LABELS, engine=shared)
        except KeyboardInterrupt as error:
            return error

    def interrupted(_):
        raise KeyboardInterrupt

    other, own = Threads(2).run(work)
    assert isinstance(own, KeyboardInterrupt)
    assert str(other) == "the process of rank 1 failed: KeyboardInterrupt: "


def test_an_engine_of_several_processes_within_another():
    with pytest.raises(TypeError, match="one that works in a single process; got 'batch_parallel'"):
        VocabParallel(Alone(), 0, 3, engine=BatchParallel(Alone()))
    assert repr(VocabParallel(Alone(), 0, 3)) == "VocabParallel(Alone(), start=0, classes=3, engine=None)"
    assert repr(BatchParallel(Alone(), engine="cpu")) == "BatchParallel(Alone(), engine='cpu')"


def test_weights_whose_sum_is_no_number():
    def work(communicator):
        weight = np.where(np.arange(CLASSES) < 10, np.inf, -np.inf)
        labels = np.full(5, 3 + 10 * communicator.rank)
        return cross_entropy(LOGITS[:5], labels, weight=weight, engine=BatchParallel(communicator))

    assert np.isnan(Threads(2).run(work)).all()


def test_a_buffer_that_is_refused_with_a_batch():
    def work(communicator):
        out = np.ones((5, 2 + communicator.rank * (CLASSES - 2)))
        return cross_entropy_value_and_grad(LOGITS[:5], LABELS[:5], out=out, engine=BatchParallel(communicator))

    first, second = Threads(2).run(work)
    assert "out must have the shape of logits" in str(first)
    assert str(second).startswith("the process of rank 0 failed: ValueError: out must have the shape")


def test_a_rank_that_fails_with_its_batch():
    def work(communicator):
        labels = LABELS[:5] if communicator.rank else LABELS[:4]
        return cross_entropy(LOGITS[:5], labels, engine=BatchParallel(communicator))

    first, second = Threads(2).run(work)
    assert isinstance(first, ValueError)
    assert str(second).startswith("the process of rank 0 failed: ValueError: target of shape (4,) does not fit")


@pytest.mark.parametrize(
    ("given", "error", "says"),
    [
        ((3, 0, 5), TypeError, "communicator must be one of mpi4py, or an object with rank, size and allgather"),
        ((Alone(), 0.5, 5), TypeError, "start must be an integer, got 0.5"),
        ((Alone(), 0, True), TypeError, "classes must be an integer, got True"),
        ((Alone(), -1, 5), ValueError, "start must be from 0 to classes, which is at least 1; got start=-1, classes=5"),
        ((Alone(), 0, 0), ValueError, "got start=0, classes=0"),
    ],
    ids=["communicator", "start", "size", "below", "none"],
)  # fmt: skip
def test_bad_arguments(given, error, says):
    with pytest.raises(error) as raised:
        VocabParallel(*given)
    assert says in str(raised.value)


def test_other_libraries_are_declined():
    xp = pytest.importorskip("array_api_strict")
    with pytest.raises(ValueError, match="engine 'vocab_parallel' cannot take these arrays: it takes arrays of NumPy"):
        cross_entropy(xp.asarray(LOGITS), xp.asarray(LABELS), engine=VocabParallel(Alone(), 0, CLASSES))
