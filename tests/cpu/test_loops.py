"""The compiled loops: which one takes what, that no bit depends on which one, and all layouts of memory."""

import itertools
import math
from functools import partial

import numpy as np
import pytest
from support.close import assert_grad, assert_loss
from support.oracle import oracle

from xent_array import cross_entropy, cross_entropy_grad, cross_entropy_value_and_grad, log_softmax, row_stats
from xent_array._engines import cpu

if isinstance(cpu.found_loops(), str):
    pytest.skip(cpu.found_loops(), allow_module_level=True)

from support.problems import (
    DTYPES,
    LAYOUTS,
    OPTIONS,
    Spy,
    all_that_comes_out,
    each_dtype,
    each_wide,
    problem,
    words_of,
)
from support.sizes import only_contiguous, resize

from xent_array._engines.cpu import compiled, machine_code, memory, path
from xent_array._engines.cpu.loops import PLAIN, STREAM, contiguous, strided, transposed

RNG = np.random.default_rng(0)
CLASSES = (1, 2, 3, 4, 5, 9, 31, 32, 33, 64, 255, 256, 257, 512, 513, 1000)


@pytest.mark.full(but_one_per="dtype")
@each_dtype
@pytest.mark.parametrize(
    "names", [(), *((name,) for name in OPTIONS), ("weight", "grad_output"), tuple(OPTIONS)], ids="-".join
)
def test_all_loops_are_bit_identical(monkeypatch, dtype, names):
    """The same rows dense and with classes apart, by the path that is taken and by `contiguous` alone."""
    by_row, transposed_rows, strided_rows = (Spy(monkeypatch, loop) for loop in (contiguous, transposed, strided))
    for classes in CLASSES:
        for outer, inner in [(1, 8), (1, 17), (2, 40)] if classes > 64 else [(1, 8), (3, 13), (1, 113), (2, 300)]:
            x, labels, options = problem(classes, outer * inner, DTYPES[dtype], names, seed=classes + inner)
            wanted = all_that_comes_out(x, labels, 1, labels.shape, **options)
            apart = np.ascontiguousarray(np.moveaxis(x.reshape(outer, inner, classes), 2, 1))
            with monkeypatch.context() as patched:
                only_contiguous(patched)
                before = transposed_rows.calls, strided_rows.calls
                assert all_that_comes_out(x, labels, 1, labels.shape, **options) == wanted
                assert (transposed_rows.calls, strided_rows.calls) == before
            before = by_row.calls
            labels = labels.reshape(outer, inner)
            assert all_that_comes_out(apart, labels, 1, labels.shape, **options) == wanted
            assert by_row.calls == before
    assert min(by_row.calls, transposed_rows.calls, strided_rows.calls) > 0


@each_dtype
@pytest.mark.parametrize("ignores", [False, True])
def test_plain_rows_are_bit_identical(monkeypatch, dtype, ignores):
    """Rows of few classes without options have code of their own: whole tiles, the rest of one, and every way there."""
    spy = Spy(monkeypatch, transposed)
    for classes, count in itertools.product((1, 2, 3, 4, 5, 7, 8, 16, 31, 32, 33, 65, 150), (1, 15, 16, 17, 100, 301)):
        x, _, _ = problem(classes, count, DTYPES[dtype], seed=classes + count)
        labels = RNG.integers(classes, size=count)
        labels[labels == x.argmax(1)] = RNG.integers(classes)
        if ignores:
            labels[2::3] = -5
            labels[-1] = 0  # as one of them has to count
        for scale in (1.0, -3.0, 0.0, 1e-42, -1e-45):
            options = {"reduction": "none", "ignore_index": -5, "engine": "cpu"}
            both = partial(cross_entropy_value_and_grad, grad_output=scale, **options)
            with monkeypatch.context() as patched:
                only_contiguous(patched)
                calls = spy.calls
                wanted = [*map(words_of, both(x, labels))]
                assert spy.calls == calls
            padded = LAYOUTS["padded"](x)
            for logits, out in ((x, None), (x.copy(), "in place"), (padded, None), (padded, padded.copy()[::-1])):
                out = logits if isinstance(out, str) else out
                spy.calls = 0
                loss, grad = both(logits, labels, out=out)
                assert [words_of(loss), words_of(grad)] == wanted, (classes, count, scale)
                assert spy.calls >= 1  # once more where it has to find that some are ignored
                if logits is not padded or not ignores:  # those that count nothing have weights of 0 there
                    assert spy.told("job") & PLAIN
            assert words_of(cross_entropy(x, labels, **options)) == wanted[0]


@each_dtype
@pytest.mark.parametrize("names", [(), ("weight", "z_loss")], ids="-".join)
@pytest.mark.parametrize(("classes", "inner"), [(5, 16), (17, 272), (40, 608), (300, 272), (1030, 160)])
def test_rows_side_by_side_in_tiles(monkeypatch, dtype, names, classes, inner):
    """However many share a tile; and past the caches, wherever in a line of cache the gradient begins."""
    x, labels, options = problem(classes, 2 * inner, DTYPES[dtype], names, seed=classes + inner)
    options |= {"reduction": "none", "engine": "cpu", "validate": False}
    apart, labels = np.ascontiguousarray(np.moveaxis(x.reshape(2, inner, classes), 2, 1)), labels.reshape(2, inner)
    with monkeypatch.context() as patched:
        only_contiguous(patched)
        wanted = [*map(words_of, cross_entropy_value_and_grad(apart, labels, axis=1, **options))]
    for size in (1, 1 << 12, 1 << 17):
        resize(monkeypatch, STRIDED_SIZE=size)
        assert [*map(words_of, cross_entropy_value_and_grad(apart, labels, axis=1, **options))] == wanted
    resize(monkeypatch, LARGE=0)
    spy, size = Spy(monkeypatch, strided), apart.itemsize
    for start in range(0, 64, 3 * size):
        room = np.zeros(apart.nbytes + 192, np.uint8)
        first = -room.ctypes.data % 64 + 64 + start
        out = room[first : first + apart.nbytes].view(apart.dtype).reshape(apart.shape)
        loss, _ = cross_entropy_value_and_grad(apart, labels, axis=1, out=out, **options)
        assert [words_of(loss), words_of(out)] == wanted
        assert not room[:first].any()
        assert not room[first + apart.nbytes :].any()
        is_streamed = size > 2  # numbers of 16 bits are narrowed before they are written
        assert bool(spy.told("job") & STREAM) is is_streamed
        assert spy.told("lead") == (start // size if is_streamed else 0)


@each_dtype
@pytest.mark.parametrize(("classes", "inner"), [(1, 40), (5, 33), (40, 47), (255, 40), (300, 63)])
def test_short_tiles_among_others(monkeypatch, dtype, classes, inner):
    """Nothing is taken from where a tile did not reach that had its place before: there is NaN to begin with."""

    def poisoned(size):
        room = memory.in_lines(size, np.uint8)
        room.view(np.uint32)[...] = 0x7FFFFFFF  # NaN in either dtype, and as an integer no class
        return room

    monkeypatch.setattr(compiled, "workspace", poisoned)
    for names, large in itertools.product([(), ("weight", "z_loss"), ("sample_weight", "grad_output")], (0, 1 << 60)):
        resize(monkeypatch, SIDE_BY_SIDE=32, STRIDED_SIZE=1, LARGE=large)
        x, labels, options = problem(classes, 7 * inner, DTYPES[dtype], names, seed=inner)
        apart = np.ascontiguousarray(np.moveaxis(x.reshape(7, inner, classes), 2, 1))
        with monkeypatch.context() as patched:
            only_contiguous(patched)
            wanted = all_that_comes_out(x, labels, 1, labels.shape, **options)
        assert all_that_comes_out(x, labels, 1, labels.shape, **options) == wanted
        labels = labels.reshape(7, inner)
        assert all_that_comes_out(apart, labels, 1, labels.shape, **options) == wanted
        buffer = np.zeros(apart.nbytes + 64, np.uint8)
        start = -buffer.ctypes.data % 64 + apart.itemsize
        out = buffer[start : start + apart.nbytes].view(apart.dtype).reshape(apart.shape)
        for name in {"sample_weight", "grad_output"} & set(options):
            options[name] = options[name].reshape(labels.shape)
        options |= {"reduction": "none", "validate": False, "engine": "cpu"}
        loss, _ = cross_entropy_value_and_grad(apart, labels, axis=1, out=out, **options)
        assert [words_of(loss), words_of(np.moveaxis(out, 1, -1))] == [wanted[0], wanted[7]]


@pytest.mark.parametrize("count", [1, 15, 16, 17, 1000, 300_001])
def test_sum_of_losses(count):
    """To a unit, and what infinity makes of it."""
    losses = RNG.exponential(size=count) * RNG.choice([1e-8, 1, 1e8], count)
    assert abs(compiled.total(losses) - math.fsum(losses)) <= 2**-52 * math.fsum(losses)
    single = losses.astype(np.float32)
    assert abs(compiled.total(single) - math.fsum(single)) <= 2**-40 * math.fsum(single)
    for number in (np.inf, np.nan):
        losses[count // 2] = number
        assert np.array_equal(compiled.total(losses), number, equal_nan=True)


def test_what_does_not_lie_in_whole_lines_is_not_streamed(monkeypatch):
    resize(monkeypatch, LARGE=0)
    spy = Spy(monkeypatch, strided)
    for inner, is_streamed in [(32, True), (40, False)]:
        x, labels = RNG.standard_normal((2, 50, inner), dtype=np.float32), RNG.integers(50, size=(2, inner))
        grad = cross_entropy_grad(x, labels, axis=1, engine="cpu")
        assert bool(spy.told("job") & STREAM) is is_streamed
        assert_grad(grad, oracle(x, labels, axis=1))


@each_dtype
def test_all_rows_against_the_oracle(dtype):
    for classes, axis in itertools.product((1, 5, 32, 33, 130, 256, 257, 1000), (0, 1)):
        x, labels, options = problem(classes, 150, DTYPES[dtype], OPTIONS)
        options["grad_output"][(labels == -1) | (labels == classes)] = 2  # NaN whatever multiplies it
        options |= {"axis": axis, "reduction": "none"}
        x = np.ascontiguousarray(x.T) if axis == 0 else x
        truth = oracle(x, labels, **options)
        loss, grad = cross_entropy_value_and_grad(x, labels, engine="cpu", validate=False, **options)
        assert_loss(loss, truth)
        assert_grad(grad, truth)


@pytest.mark.parametrize("options", [{"label_smoothing": 0.2}, {"weight": True}, {"softcap": 5.0}, {"z_loss": 0.1}])
@pytest.mark.parametrize("axis", [0, 1])
def test_bad_labels_under_every_option(options, axis):
    """Their rows are NaN, those beside them are as they would be."""
    x, labels, _ = problem(20, 64, np.float32)
    x = np.where(np.isfinite(x), x, 0).astype(np.float32)
    good = np.where((labels < 0) | (labels >= 20), -100, labels)
    bad = (labels != -100) & (good == -100)
    assert bad.any()
    if "weight" in options:
        options = {"weight": RNG.random(20)}
    x = np.ascontiguousarray(x.T) if axis == 0 else x
    given = {"axis": axis, "reduction": "none", "engine": "cpu", "validate": False, **options}
    loss, grad = cross_entropy_value_and_grad(x, labels, **given)
    wanted, wanted_grad = cross_entropy_value_and_grad(x, good, **given)
    grad, wanted_grad = (np.moveaxis(g, axis, 1) for g in (grad, wanted_grad))
    assert np.isnan(loss[bad]).all()
    assert np.isnan(grad[bad]).all()
    np.testing.assert_array_equal(loss[~bad], wanted[~bad])
    np.testing.assert_array_equal(grad[~bad], wanted_grad[~bad])


@pytest.mark.parametrize("kind", ["i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", ">i4", "unaligned"])
@pytest.mark.parametrize("classes", [10, 300])
def test_labels_of_every_integer_type(kind, classes):
    x = RNG.standard_normal((40, classes), dtype=np.float32)
    labels = RNG.integers(min(classes, 128), size=40)
    wanted = cross_entropy(x, labels, reduction="none", engine="cpu")
    if kind == "unaligned":
        labels = np.frombuffer(b"?" + labels.tobytes(), labels.dtype, offset=1)
        assert not labels.flags.aligned
    else:
        labels = labels.astype(kind)
    np.testing.assert_array_equal(cross_entropy(x, labels, reduction="none", engine="cpu"), wanted)


def test_smoothing_too_small_to_be_a_number():
    """0·inf counts 0."""
    x, labels = np.array([[1, 2, -np.inf]] * 3, np.float32), [0, 1, 0]
    got = cross_entropy_value_and_grad(x, labels, label_smoothing=1e-45, engine="cpu")
    wanted = cross_entropy_value_and_grad(x, labels, engine="cpu")
    assert got[0] == wanted[0]
    np.testing.assert_array_equal(got[1], wanted[1])


@pytest.mark.parametrize("classes", [2, 8, 300])
def test_stats_of_more_classes_than_are_here(classes):
    """A maximum that no class here has, as where another machine holds the rest of the row."""
    x = RNG.standard_normal((30, 2 * classes)).astype(np.float64)
    x[:, -1] = 9
    labels = RNG.integers(classes, size=30)
    stats = row_stats(x, labels, engine="cpu")
    whole = cross_entropy_grad(x, labels, reduction="sum", engine="cpu")
    for part in (x[:, :classes], np.ascontiguousarray(x[:, :classes].T)):
        axis = 1 if part.shape[1] == classes else 0
        grad = cross_entropy_grad(part, labels, axis=axis, stats=stats, reduction="sum", engine="cpu")
        np.testing.assert_allclose(np.moveaxis(grad, axis, 1), whole[:, :classes], rtol=1e-13)


@pytest.mark.full(but_one_per="layout")
@each_dtype
@pytest.mark.parametrize("classes", [1, 10, 48, 49, 150])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, classes, dtype):
    if layout == "big-endian" and dtype == "bfloat16":
        pytest.skip("bfloat16 has one byte order")
    x = (3 * np.random.default_rng(classes).normal(size=(40, classes))).astype(DTYPES[dtype])
    labels = np.random.default_rng(1).integers(classes, size=40)
    given = LAYOUTS[layout](x)
    x = np.ascontiguousarray(given)
    before = words_of(given.astype(np.float64))
    for options in ({}, {"label_smoothing": 0.1, "weight": np.arange(1, classes + 1)}, {"softcap": 4.0}):
        truth = oracle(x, labels, **options)
        loss, grad = cross_entropy_value_and_grad(given, labels, engine="cpu", **options)
        assert_loss(loss, truth)
        assert_grad(grad, truth)
        # The layout changes no bit.
        dense, dense_grad = cross_entropy_value_and_grad(
            x.astype(x.dtype.newbyteorder("=")), labels, engine="cpu", **options
        )
        assert loss == dense
        assert grad.tobytes() == dense_grad.tobytes()
        plain, plain_grad = cross_entropy_value_and_grad(given, labels, engine="numpy", **options)
        assert_loss(plain, truth)
        assert_grad(plain_grad, truth)
    np.testing.assert_array_equal(log_softmax(given, axis=-1), log_softmax(np.ascontiguousarray(x), axis=-1))
    assert words_of(given.astype(np.float64)) == before


@each_dtype
@pytest.mark.parametrize(
    "layout", ["dense", "padded", "rows backwards", "classes backwards", "every other class", "Fortran"]
)
@pytest.mark.parametrize("classes", [1, 10, 33, 300])
def test_out_of_any_layout(layout, classes, dtype):
    x, labels, _ = problem(classes, 50, DTYPES[dtype])
    given = {"validate": False, "engine": "cpu", "reduction": "none"}
    loss, wanted = cross_entropy_value_and_grad(x, labels, **given)
    out = LAYOUTS[layout](np.zeros_like(x))
    base = out if out.base is None else out.base
    before = base.copy()  # its zeros are where `out` is, and what else it holds is not
    got, grad = cross_entropy_value_and_grad(x, labels, out=out, **given)
    assert grad is out
    assert (words_of(got), words_of(out)) == (words_of(loss), words_of(wanted))
    out[...] = 0  # what is left of the buffer is as it was
    np.testing.assert_array_equal(base.astype(np.float64), before.astype(np.float64))
    there = LAYOUTS[layout](x)
    got, grad = cross_entropy_value_and_grad(there, labels, out=there, **given)
    assert grad is there
    assert (words_of(got), words_of(grad)) == (words_of(loss), words_of(wanted))


@each_dtype
@pytest.mark.parametrize("shape", [(3, 7, 5, 6), (2, 60, 3, 3), (1, 5, 1, 1), (4, 5, 0, 2), (2, 3, 1, 7)])
def test_images(shape, dtype):
    """(N, C, H, W), dense and with its classes last in memory, into a gradient of either kind."""
    x = (3 * np.random.default_rng(0).normal(size=shape)).astype(DTYPES[dtype])
    labels = np.random.default_rng(1).integers(shape[1], size=(shape[0], *shape[2:]))
    last = np.moveaxis(np.ascontiguousarray(np.moveaxis(x, 1, -1)), -1, 1)
    results = set()
    for logits, like in itertools.product((x, last), (x, last)):
        out = np.zeros_like(like)
        loss, grad = cross_entropy_value_and_grad(logits, labels, axis=1, reduction="sum", engine="cpu", out=out)
        truth = oracle(x, labels, axis=1, reduction="sum")
        assert_loss(loss, truth)
        assert_grad(grad, truth)
        results.add(loss.tobytes() + np.ascontiguousarray(grad).tobytes())
    assert len(results) == 1


def test_memory_map(tmp_path):
    x = np.memmap(tmp_path / "logits", np.float32, "w+", shape=(20, 30))
    x[...] = RNG.standard_normal(x.shape)
    labels = np.arange(20)
    cross_entropy(np.array(x), labels, engine="cpu")
    before = set(machine_code._functions)
    assert cross_entropy(x, labels, engine="cpu") == cross_entropy(np.array(x), labels, engine="cpu")
    assert set(machine_code._functions) == before


def test_a_row_longer_than_a_tile_is_for_numpy(monkeypatch):
    by_row, transposed_rows = (Spy(monkeypatch, loop) for loop in (contiguous, transposed))
    x, labels = RNG.standard_normal((5, 33), dtype=np.float32), np.arange(5)
    resize(monkeypatch, TILE=32)
    grad = cross_entropy_grad(x, labels, engine="cpu")
    assert (by_row.calls, transposed_rows.calls) == (0, 0)
    assert_grad(grad, oracle(x, labels))
    resize(monkeypatch, TILE=33)
    cross_entropy(x, labels, engine="cpu")
    assert transposed_rows.calls == 1


@each_wide
@pytest.mark.parametrize("names", [(), ("z_loss",)], ids="-".join)
def test_which_loop_takes_how_many_classes(monkeypatch, dtype, names):
    """More are transposed where there is no gradient, with or without options; the losses are the same."""
    by_row, transposed_rows = (Spy(monkeypatch, loop) for loop in (contiguous, transposed))
    size = np.dtype(dtype).itemsize
    for row, with_grad, alone in (
        (path.TRANSPOSED, "transposed", "transposed"), (path.TRANSPOSED + size, "contiguous", "transposed"),
        (path.TRANSPOSED_ALONE, "contiguous", "transposed"), (path.TRANSPOSED_ALONE + size, "contiguous", "contiguous"),
    ):  # fmt: skip
        logits, labels, options = problem(row // size, 40, DTYPES[dtype], names)
        labels[(labels < 0) | (labels >= logits.shape[1])] = 0
        losses = set()
        for wanted, function in ((with_grad, cross_entropy_value_and_grad), (alone, cross_entropy)):
            before = by_row.calls, transposed_rows.calls
            loss = function(logits, labels, engine="cpu", reduction="none", **options)
            calls = by_row.calls - before[0], transposed_rows.calls - before[1]
            assert calls == ((0, 1) if wanted == "transposed" else (1, 0))
            losses.add(words_of(loss[0] if isinstance(loss, tuple) else loss))
        assert len(losses) == 1


@pytest.mark.parametrize("engine", ["cpu", "numpy"])
@each_wide
def test_zeros_have_one_sign(engine, dtype):
    """Also where 1 - p is exactly 0, of one class and of rows without doubt, whichever code takes them."""
    for x in (np.ones((3, 1), dtype), np.array([[0, -np.inf], [2000, 0]] * 2, dtype)):
        labels = np.zeros(len(x), int)
        for scale in (1.0, -1.0):
            found = set()
            given = {"engine": engine, "reduction": "sum", "grad_output": scale}
            apart = np.repeat(x, 3, axis=1)[:, ::3]
            for logits in (x, apart, np.asfortranarray(x)):
                for out in (None, np.zeros_like(x), np.repeat(x, 3, axis=1)[:, ::3], np.zeros_like(x.T).T):
                    found.add(words_of(cross_entropy_value_and_grad(logits, labels, out=out, **given)[1]))
            assert len(found) == 1
