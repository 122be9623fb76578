"""What is particular to Dask arrays; what they share with others is in the tests of every backend.

`test_properties.py` draws chunks of any sizes.
"""

import multiprocessing
import os
import pickle
import re
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from support.close import assert_grad, assert_loss
from support.oracle import oracle

from xent_array import (
    CrossEntropyLoss,
    cross_entropy,
    cross_entropy_grad,
    cross_entropy_value_and_grad,
    log_softmax,
    logsumexp,
    merge_stats,
    row_stats,
    softmax,
)
from xent_array._engines import cpu
from xent_array._engines.cpu import cores

da = pytest.importorskip("dask.array", reason="Dask is not installed")
import dask  # noqa: E402
from dask._task_spec import convert_legacy_graph  # noqa: E402
from dask.utils import key_split  # noqa: E402

RNG = np.random.default_rng(0)
LOGITS = 3 * RNG.standard_normal((40, 23))
LABELS = RNG.integers(0, 23, 40)
LABELS[::7] = -100
SOFT = RNG.random((40, 23))


def computed(*results):
    return dask.compute(*results, scheduler="synchronous")


def calls(x, labels, soft):
    """Every function that takes Dask arrays, and its results."""
    criterion = CrossEntropyLoss(label_smoothing=0.1)
    yield "forward", lambda: criterion.forward(x, labels)
    yield "backward", lambda: criterion.backward()
    for reduction in ("none", "mean", "sum"):
        for name, target in (("labels", labels), ("distributions", soft)):
            given = {"reduction": reduction, "sample_weight": np.arange(40)}
            yield f"loss {name} {reduction}", lambda t=target, g=given: cross_entropy(x, t, **g)
            yield f"both {name} {reduction}", lambda t=target, g=given: cross_entropy_value_and_grad(x, t, **g)
            yield (
                f"all {name} {reduction}",
                lambda t=target, g=given: cross_entropy_value_and_grad(x, t, return_stats=True, **g),
            )
            yield f"grad {name} {reduction}", lambda t=target, g=given: cross_entropy_grad(x, t, **g)
    yield "stats", lambda: row_stats(x, labels).loss
    yield "stats of distributions", lambda: row_stats(x, soft, label_smoothing=0.1).loss
    for function in (softmax, log_softmax, logsumexp):
        yield function.__name__, lambda f=function: f(x)


def tasks(*results):
    graph = {}
    for result in results:
        graph.update(result.__dask_graph__())
    return graph


def of(result):
    """The arrays of a result."""
    return [part for each in result for part in of(each)] if isinstance(result, tuple) else [result]


@pytest.mark.parametrize("classes", [23, 5], ids=["whole rows", "split"])
def test_nothing_is_computed_and_what_is_computed_later_is_right(classes):
    def refuse(*args, **options):
        pytest.fail("computed")

    x, labels, soft = da.from_array(LOGITS, (7, classes)), da.from_array(LABELS, 9), da.from_array(SOFT, (40, 3))
    of_numpy = dict(calls(LOGITS, LABELS, SOFT))
    for name, call in calls(x, labels, soft):
        with dask.config.set(scheduler=refuse):
            found = of(call())
        assert all(isinstance(part, da.Array) for part in found if part is not None)
        for part, wanted in zip(computed(*found), of(of_numpy[name]()), strict=True):
            if wanted is not None:
                assert (part.dtype, part.shape) == (wanted.dtype, wanted.shape)
                np.testing.assert_allclose(part, wanted, rtol=1e-12, atol=1e-14, err_msg=name)


@pytest.mark.parametrize("axis", [0, 1, 2, 3])
def test_any_axis_keeps_the_chunks(axis):
    x, labels = RNG.standard_normal((6, 7, 8, 9)), RNG.integers(0, 6, (6, 7, 8, 9)).take(0, axis)
    y = da.from_array(x, chunks=(4, 3, 5, 2))
    loss, grad = cross_entropy_value_and_grad(y, labels, axis=axis)
    assert grad.chunks == y.chunks
    loss, grad = computed(loss, grad)
    truth = oracle(x, labels, axis=axis)
    assert_loss(loss, truth)
    assert_grad(grad, truth)


@pytest.mark.parametrize("classes", [23, 2], ids=["whole rows", "split"])
def test_the_graph_is_linear_in_the_number_of_chunks(classes):
    def count(rows):
        x = da.zeros((rows, 23), chunks=(1, classes))
        labels = da.zeros(rows, dtype=int, chunks=1)
        return [len(tasks(*of(call()))) for _, call in calls_of(x, labels)]

    def calls_of(x, labels):
        yield "both", lambda: cross_entropy_value_and_grad(x, labels)
        yield "stats", lambda: tuple(cross_entropy_value_and_grad(x, labels, return_stats=True)[2])
        yield "softmax", lambda: softmax(x)

    counts = count(40), count(80), count(160)
    for some, twice, four in zip(*counts, strict=True):
        assert four - twice <= 2.1 * (twice - some)
        assert some <= (16 if classes == 23 else 120) * 40


def test_names_say_what_is_done():
    x, labels = da.from_array(LOGITS, (7, 5)), da.from_array(LABELS, 9)
    names = {key_split(key) for key in tasks(*of(cross_entropy_value_and_grad(x, labels)))}
    assert {"row_stats", "merge_stats", "cross_entropy", "cross_entropy_grad", "count", "reduce"} <= {
        name.removesuffix("-partial").removesuffix("-aggregate") for name in names
    }
    names = {key_split(key) for key in tasks(*of(cross_entropy_value_and_grad(x.rechunk((7, -1)), labels)))}
    assert "cross_entropy_value_and_grad" in names


def test_the_same_call_has_the_same_keys():
    """So that Dask does once what two results have in common."""
    x, labels = da.from_array(LOGITS, (7, 5)), da.from_array(LABELS, 9)
    one, two = (cross_entropy_value_and_grad(x, labels, label_smoothing=0.1) for _ in range(2))
    assert [part.name for part in one] == [part.name for part in two]
    other = cross_entropy_value_and_grad(x, labels, label_smoothing=0.2)
    assert not {part.name for part in one} & {part.name for part in other}
    assert cross_entropy_grad(x, labels, label_smoothing=0.1).name == one[1].name


def test_no_task_waits_for_many_others():
    """But a tree of tasks adds up what there is of each chunk."""
    x, labels = da.zeros((300, 3), chunks=(1, 3)), da.zeros(300, dtype=int, chunks=1)
    graph = convert_legacy_graph(dict(cross_entropy(x, labels).__dask_graph__()))
    assert max(len(task.dependencies) for task in graph.values()) <= 40


def test_as_many_chunks_as_make_a_tree():
    x, labels = RNG.standard_normal((60, 64)), RNG.integers(0, 64, 60)
    loss, grad = computed(*cross_entropy_value_and_grad(da.from_array(x, 1), da.from_array(labels, 1)))
    truth = oracle(x, labels)
    assert_loss(loss, truth)
    assert_grad(grad, truth)


# -- unknown chunk sizes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [23, 5], ids=["whole rows", "split"])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("target", [LABELS, SOFT], ids=["labels", "distributions"])
def test_unknown_numbers_of_rows(classes, reduction, target):
    x, keep = da.from_array(LOGITS, (7, classes)), LOGITS[:, 0] > 0
    kept, some = da.from_array(keep, 7), da.from_array(target, 7)
    for weight in (None, np.arange(40.0)):
        s = None if weight is None else da.from_array(weight, 7)[kept]
        loss, grad = cross_entropy_value_and_grad(x[kept], some[kept], reduction=reduction, sample_weight=s)
        loss, grad = computed(loss, grad)
        truth = oracle(
            LOGITS[keep], target[keep], reduction=reduction, sample_weight=None if s is None else weight[keep]
        )
        assert_loss(loss, truth)
        assert_grad(grad, truth)


def test_unknown_numbers_of_rows_along_several_axes():
    x, labels = RNG.standard_normal((6, 7, 4)), RNG.integers(0, 7, (6, 4))
    kept = da.from_array(x[:, 0, 0] > 0, 2)
    loss, grad = cross_entropy_value_and_grad(da.from_array(x, 2)[kept], da.from_array(labels, 2)[kept], axis=1)
    truth = oracle(x[x[:, 0, 0] > 0], labels[x[:, 0, 0] > 0], axis=1)
    loss, grad = computed(loss, grad)
    assert_loss(loss, truth)
    assert_grad(grad, truth)


def test_where_unknown_sizes_cannot_do():
    x, kept = da.from_array(LOGITS, (10, 23)), da.from_array(LOGITS[:, 0] > 0, 10)
    with pytest.raises(ValueError, match="4 chunks where the logits have 2"):
        cross_entropy(x.rechunk((20, -1))[kept.rechunk(20)], da.from_array(LABELS, 10)[kept])
    with pytest.raises(ValueError, match="the number of classes, along axis 1, must be known"):
        cross_entropy(x[kept].T, da.from_array(LABELS, 10))
    with pytest.raises(ValueError, match="a chunk of target has shape"):
        computed(cross_entropy(x[kept], da.from_array(LABELS, 10)[~kept]))
    with pytest.raises(ValueError, match=r"of shape \(20,\) that is no Dask array cannot be cut like the logits"):
        cross_entropy(x[kept], LABELS[:20])


# -- values that are looked at when they are there ---------------------------------------------------------------


def test_a_bad_label_is_found_when_it_is_computed():
    labels = LABELS.copy()
    labels[33] = 23
    x = da.from_array(LOGITS, (7, 5))
    lazy = da.from_array(labels, 9)
    for call in (cross_entropy, cross_entropy_value_and_grad, cross_entropy_grad, row_stats):
        found = [part for part in of(call(x, lazy)) if part is not None]
        with pytest.raises(IndexError, match=r"target\[33\] is 23, which is not a class"):
            computed(*found)
        with pytest.raises(IndexError, match=r"target\[33\] is 23"):  # there already
            call(x, labels)
    for target in (labels, lazy):
        found = computed(cross_entropy(x, target, reduction="none", validate=False))[0]
        assert_array_equal(np.isnan(found), np.arange(40) == 33)
        weight = np.arange(40) != 33
        assert computed(cross_entropy(x, target, sample_weight=weight))[0] == pytest.approx(
            cross_entropy(LOGITS, labels, sample_weight=weight)
        )


def test_where_a_bad_label_is_in_several_axes_and_unknown_lengths():
    x, labels = np.zeros((4, 6, 5, 3)), np.zeros((4, 6, 3), int)
    labels[3, 4, 2] = 9
    y, lazy = da.from_array(x, 2), da.from_array(labels, 2)
    with pytest.raises(IndexError, match=r"target\[3, 4, 2\] is 9"):
        computed(cross_entropy(y, lazy, axis=2))
    kept = da.from_array(np.ones(4, bool), 2)
    with pytest.raises(IndexError, match=r"target is 9, which"):
        computed(cross_entropy(y[kept], lazy[kept], axis=2))
    labels[3, 4, 2], labels[0, 1, 1] = 0, 7
    with pytest.raises(IndexError, match=r"target\[0, 1, 1\] is 7"):  # the first chunk begins at 0
        computed(cross_entropy(y[kept], da.from_array(labels, 2)[kept], axis=2))


def test_a_weight_that_is_lost_is_found_when_it_is_computed():
    x = da.from_array(LOGITS.astype(np.float32), (7, 5))
    weight = np.ones(40)
    weight[31] = 1e39
    lazy = cross_entropy(x, LABELS, sample_weight=da.from_array(weight, 8))
    with pytest.raises(ValueError, match=r"sample_weight\[31\] is 1e\+39, which the arithmetic, here float32"):
        computed(lazy)
    with pytest.raises(ValueError, match=r"sample_weight\[31\] is 1e\+39"):
        cross_entropy(x, LABELS, sample_weight=weight)


def test_what_does_not_go_together():
    x = da.from_array(LOGITS, 7)
    with pytest.raises(TypeError, match=r"out cannot be used with .*dask.array, whose arrays are computed later"):
        cross_entropy_value_and_grad(x, LABELS, out=da.zeros_like(x))
    with pytest.raises(ValueError, match=r"target of shape \(39,\) does not fit logits of shape \(40, 23\)"):
        cross_entropy(x, da.from_array(LABELS[1:], 7))
    with pytest.raises(ValueError, match="engine 'cpu' cannot take these arrays: it takes NumPy arrays"):
        cross_entropy(x, LABELS, engine="cpu")
    with pytest.raises(ValueError, match="engine 'generic' cannot take these arrays: it leaves Dask arrays to"):
        cross_entropy(x, LABELS, engine="generic")
    with pytest.raises(ValueError, match="engine 'dask' cannot take these arrays: it takes Dask arrays"):
        cross_entropy(LOGITS, LABELS, engine="dask")
    with pytest.raises(TypeError, match="target must be a list, or an array of the library of logits"):
        cross_entropy(LOGITS, da.from_array(LABELS, 7))
    with pytest.raises(TypeError, match=r"label_smoothing is a number that must be known at once: pass \.compute\(\)"):
        cross_entropy(x, LABELS, label_smoothing=da.ones(()))
    with pytest.raises(TypeError, match=r"got dask\.Delayed\w*: pass dask\.array\.from_delayed of it"):
        cross_entropy(x, dask.delayed(LABELS))
    weight = da.from_array(np.ones(23), 5)
    with pytest.raises(ValueError, match="weight has chunks of unknown sizes"):
        cross_entropy(x, LABELS, weight=weight[weight > 0])


def test_chunks_of_another_kind():
    sparse = pytest.importorskip("sparse")
    x, labels = da.from_array(LOGITS, 7), da.from_array(LABELS, 7)
    for call in (lambda a: cross_entropy(a, labels), softmax):
        with pytest.raises(TypeError, match=r"must have chunks of NumPy or CuPy, got a Dask array of sparse\.COO"):
            call(x.map_blocks(sparse.COO.from_numpy))
        with pytest.raises(TypeError, match=r"must have plain chunks, got a Dask array of MaskedArray: pass its data"):
            call(da.ma.masked_greater(x, 1))
    with pytest.raises(TypeError, match="target must have plain chunks, got a Dask array of MaskedArray"):
        cross_entropy(x, da.ma.masked_greater(labels, 1))


class OfCuPy(np.ndarray):
    """What Dask sees of CuPy: a kind of array that cannot hold objects."""

    def astype(self, dtype, **options):
        if np.dtype(dtype) == object:
            raise ValueError("Unsupported dtype object")
        return super().astype(dtype, **options)


OfCuPy.__module__ = "cupy"


def test_chunks_of_cupy_are_taken_and_not_mixed_with_those_of_numpy():
    """As far as Dask goes: there is no GPU to compute them on."""
    arrays = (LOGITS, (7, 23)), (LABELS, 7)  # whole rows: their task has several results
    x, labels = (da.from_array(each, n, meta=np.empty(0, each.dtype).view(OfCuPy)) for each, n in arrays)
    assert isinstance(x._meta, OfCuPy)
    both = cross_entropy_value_and_grad(x, labels, return_stats=True, reduction="none")
    for found in (both, softmax(x), row_stats(x, labels)):
        assert all(isinstance(part, da.Array) for part in of(found))
        assert all(isinstance(part._meta, OfCuPy) for part in of(found))
    with pytest.raises(TypeError, match=r"takes chunks of one kind, and these are of cupy\.OfCuPy and numpy\.ndarray"):
        cross_entropy(x, da.from_array(LABELS, 7))


# -- chunks that are not what they are said to be ----------------------------------------------------------------


def lying(x, chunk):
    """The Dask array, whose second chunk of rows is what `chunk` makes of it."""
    return x.map_blocks(lambda a, block_id: chunk(a) if block_id[0] == 1 else a, dtype=x.dtype, meta=x._meta)


@pytest.mark.parametrize(
    ("of_logits", "chunk", "error", "says"),
    [
        (True, lambda a: a[:, 1:], ValueError, r"a chunk of logits has shape \(7, 22\), where \(7, 23\) is wanted"),
        (
            True,
            lambda a: a.astype("float32"),
            TypeError,
            "a chunk of logits has dtype float32, but its Dask array",
        ),
        (True, lambda a: a.astype("int64"), TypeError, "a chunk of logits has dtype int64, but its Dask array says"),
        (True, np.ma.masked_array, TypeError, "a chunk of logits is a MaskedArray; it must be a plain array"),
        (False, lambda a: a[1:], ValueError, r"a chunk of target has shape \(6,\), where \(7,\) is wanted"),
        (False, lambda a: a[:, None], ValueError, r"a chunk of target has shape \(7, 1\), where"),
        (
            False,
            lambda a: a + 0.5,
            TypeError,
            "a chunk of target has dtype float64, but its Dask array",
        ),
    ],
)
def test_chunks_that_are_not_as_declared(of_logits, chunk, error, says):
    x, labels = da.from_array(LOGITS, (7, 23)), da.from_array(np.maximum(LABELS, 0), 7)
    x, labels = (lying(x, chunk), labels) if of_logits else (x, lying(labels, chunk))
    with pytest.raises(error, match=says):
        computed(cross_entropy(x, labels))


def test_rows_of_unknown_sizes_that_do_not_belong_together():
    x, labels = RNG.standard_normal((4, 6, 5)), RNG.integers(0, 5, (4, 6))
    one, two = (da.from_array(np.arange(length) % step > 0, length) for length, step in ((4, 2), (6, 3)))
    y, t = da.from_array(x, -1)[one][:, two], da.from_array(labels.T.copy(), -1)[two][:, one]
    with pytest.raises(ValueError, match=r"a chunk of target has shape \(4, 2\), where \(2, 4\) is wanted"):
        computed(cross_entropy(y, t))


def test_infinite_losses_of_several_chunks_do_not_warn():
    for rows in (40, 4):
        x = np.zeros((rows, 3))
        x[[0, -1], 0] = -np.inf
        sign = np.ones(rows)
        sign[0] = -1
        with np.errstate(all="raise"):
            (loss,) = computed(
                cross_entropy(da.from_array(x, (1, 3)), np.zeros(rows, int), sample_weight=sign, reduction="sum")
            )
        assert np.isnan(loss)


def test_loss_and_gradient_come_from_one_pass(monkeypatch):
    """Also where Dask fuses what takes them apart with what follows."""
    passes = []
    real = cpu.Cpu.loss_and_grad
    monkeypatch.setattr(cpu.Cpu, "loss_and_grad", lambda *given: passes.append(1) or real(*given))
    loss, grad = cross_entropy_value_and_grad(da.from_array(LOGITS, (10, 23)), da.from_array(LABELS, 10))
    for results in (
        (loss, grad),
        (loss, (grad * grad).sum()),
        (loss, da.store(grad, np.empty((40, 23)), compute=False)),
    ):
        passes.clear()
        dask.compute(*results, scheduler="synchronous")
        assert len(passes) == 4


def test_labels_are_computed_once():
    """Also where the classes are split, so that many tasks need them."""
    made = []

    def make(block_id):
        made.append(block_id)
        return LABELS[10 * block_id[0] :][:10]

    labels = da.map_blocks(make, chunks=((10,) * 4,), dtype=int, meta=np.empty(0, int))
    x, stats = da.from_array(LOGITS, (10, 3)), row_stats(LOGITS, LABELS)
    stats = type(stats)(*(da.from_array(part, 10) for part in stats))
    for found in (row_stats(x, labels).loss, cross_entropy_grad(x, labels, stats=stats), cross_entropy(x, labels)):
        made.clear()
        computed(found)
        assert sorted(made) == [(0,), (1,), (2,), (3,)]


def test_a_task_does_not_grow_with_the_number_of_chunks():
    def size(count):
        x, labels = da.zeros((count, 3), chunks=(1, 3)), da.zeros(count, dtype=int, chunks=1)
        graph = dict(cross_entropy_grad(x, labels, denominator=1.0).__dask_graph__())
        return max(len(pickle.dumps(task)) for key, task in graph.items() if "grad" in key[0])

    assert size(500) <= size(5) + 100


# -- lazy numbers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [lambda n: n, da.asarray, np.asarray], ids=["number", "Dask", "NumPy"])
@pytest.mark.parametrize("classes", [23, 5], ids=["whole rows", "split"])
def test_denominator_and_grad_output(classes, number):
    x, labels = da.from_array(LOGITS, (7, classes)), da.from_array(LABELS, 9)
    loss, grad = cross_entropy_value_and_grad(x, labels, denominator=number(100.0), grad_output=number(3.0))
    wanted = cross_entropy_value_and_grad(LOGITS, LABELS, denominator=100.0, grad_output=3.0)
    for found, right in zip(computed(loss, grad), wanted, strict=True):
        np.testing.assert_allclose(found, right, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("number", [np.inf, np.nan, 1e300, 1e-300])
def test_a_lazy_denominator_is_checked_when_it_is_computed(number):
    x = da.from_array(LOGITS.astype(np.float32), (7, 23))
    with pytest.raises(ValueError, match="denominator must be"):
        cross_entropy(x, LABELS, denominator=number)
    lazy = cross_entropy(x, LABELS, denominator=da.asarray(number))
    with pytest.raises(ValueError, match="denominator must be"):
        computed(lazy)


def test_stats_are_merged_by_the_user():
    x, labels = da.from_array(LOGITS, (7, 23)), np.where(LABELS < 0, 0, LABELS)
    parts = [
        row_stats(x[:, first:stop], np.where((labels >= first) & (labels < stop), labels - first, -100))
        for first, stop in ((0, 10), (10, 23))
    ]
    merged, whole = merge_stats(*parts), row_stats(LOGITS, labels)
    for found, wanted in zip(computed(*merged, merged.loss, merged.lse), (*whole, whole.loss, whole.lse), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-12, atol=1e-15)


# -- threads -----------------------------------------------------------------------------------------------------


def test_a_chunk_takes_one_thread_in_a_thread_of_dask_and_all_in_the_main_one(monkeypatch):
    seen = []
    real = cpu.engine.loss

    def loss(rows):
        seen.append((threading.current_thread() is threading.main_thread(), cores.threads()))
        return real(rows)

    monkeypatch.setattr(cpu.Cpu, "loss", lambda self, rows: loss(rows))
    monkeypatch.setattr(cores, "_cores", lambda: 7)
    monkeypatch.setattr(cores, "_quota", lambda: None)
    for name in ("XENT_ARRAY_NUM_THREADS", "PYTHON_CPU_COUNT", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    lazy = cross_entropy(da.from_array(LOGITS, (7, 23)), LABELS)
    with monkeypatch.context() as other:
        other.setattr(multiprocessing, "parent_process", lambda: "another")  # one of a pool of processes
        lazy.compute(scheduler="synchronous")
    assert set(seen) == {(True, 1)}
    seen.clear()
    lazy.compute(scheduler="threads", num_workers=2)
    assert set(seen) == {(False, 1)}
    seen.clear()
    lazy.compute(scheduler="synchronous")
    assert set(seen) == {(True, 7)}
    monkeypatch.setenv("XENT_ARRAY_NUM_THREADS", "3")
    lazy.compute(scheduler="threads", num_workers=2)
    assert seen[-1] == (False, 3)
    assert cores.threads() == 3


def test_results_do_not_depend_on_the_number_of_threads():
    x, labels = da.from_array(LOGITS, (3, 5)), da.from_array(LABELS, 9)
    lazy = cross_entropy_value_and_grad(x, labels)
    found = [dask.compute(*lazy, scheduler="threads", num_workers=count) for count in (1, 2, 8)]
    for loss, grad in found[1:]:
        assert loss.tobytes() == found[0][0].tobytes()
        assert grad.tobytes() == found[0][1].tobytes()


# -- README ------------------------------------------------------------------------------------------------------

README = (Path(__file__).parents[2] / "README.md").read_text()


def test_the_example_of_the_readme():
    (example,) = re.findall(r"^```python\n(import dask\n.*?)^```", README, re.MULTILINE | re.DOTALL)
    names = {}
    exec(example, names)
    assert names["loss"] == pytest.approx(np.log(1000) + 0.5, abs=0.01)
    assert names["norm"] == pytest.approx(65536**-0.5, rel=0.01)


def test_the_recipes_for_files(tmp_path, monkeypatch):
    pytest.importorskip("zarr", reason="Zarr is not installed")
    monkeypatch.chdir(tmp_path)
    x, labels = RNG.standard_normal((1300, 40)).astype(np.float16), RNG.integers(0, 40, 1300)
    np.save("logits.npy", x)
    by_memmap, by_dask = re.findall(
        r"^```python\n((?:logits = np\.load|grad_file).*?)^```", README, re.MULTILINE | re.DOTALL
    )
    names = {"np": np, "da": da, "dask": dask, "labels": labels}
    names["cross_entropy_value_and_grad"] = cross_entropy_value_and_grad
    exec(by_memmap, names)
    wanted, gradient = cross_entropy_value_and_grad(x, labels)
    assert names["loss"] == wanted
    assert_array_equal(np.load("grad.npy"), gradient)
    np.lib.format.open_memmap("grad.npy", "r+")[...] = 0
    exec(by_dask, names)
    assert names["loss"] == pytest.approx(wanted, rel=1e-6)
    assert_array_equal(np.load("grad.npy"), gradient)
    assert_array_equal(da.from_zarr("grad.zarr").compute(), gradient)


# -- a cluster ---------------------------------------------------------------------------------------------------


@pytest.fixture
def cluster():
    """Two workers in processes of their own, with one thread and 1 GiB each."""
    distributed = pytest.importorskip("distributed", reason="dask.distributed is not installed")
    options = {"n_workers": 2, "threads_per_worker": 1, "memory_limit": "1GiB", "dashboard_address": None}
    with distributed.LocalCluster(**options, silence_logs=50) as local, distributed.Client(local) as client:
        yield client


def larger_than_memory(rows):
    """Logits of 64 MiB a chunk, which are made when a worker needs them, labels, and what is asked for."""
    x = da.random.default_rng(0).standard_normal((rows, 16384), dtype=np.float32, chunks=(1024, -1))
    labels = da.random.default_rng(1).integers(0, 16384, rows, chunks=rows)
    loss, grad = cross_entropy_value_and_grad(x, labels)
    return loss, (grad * grad).sum(dtype=np.float64)


@pytest.mark.full
def test_more_logits_than_the_workers_have_memory(cluster):
    """4 GiB on two workers of 1 GiB."""
    rows = 65536
    loss, squares = dask.compute(*larger_than_memory(rows))
    # The mean of lse is log(C) + 1/2. The gradient of a row is (p - y) / rows, whose square is about 1 / rows².
    assert loss == pytest.approx(np.log(16384) + 0.5, abs=0.01)
    assert squares * rows == pytest.approx(1, rel=0.01)


@pytest.mark.full
def test_a_worker_that_is_killed(cluster):
    """Its tasks are done again by others, and the result has the same bits."""
    lazy = larger_than_memory(16384)
    wanted = dask.compute(*lazy, scheduler="threads", num_workers=2)
    futures = cluster.compute(lazy)
    deadline = time.monotonic() + 60
    while not any(cluster.run(lambda dask_worker: len(dask_worker.data)).values()):
        assert time.monotonic() < deadline
    (first, *_) = cluster.run(os.getpid).values()
    os.kill(first, signal.SIGKILL)
    assert tuple(cluster.gather(list(futures))) == wanted
