"""The loops that Numba compiles: their numbers, the two ways through rows, what they touch, where they are kept."""

import itertools
import math
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
from close import assert_grad, assert_loss
from numpy.lib.stride_tricks import sliding_window_view
from oracle import oracle

from xent_array import __main__ as program
from xent_array import (
    cross_entropy,
    cross_entropy_grad,
    cross_entropy_value_and_grad,
    log_softmax,
    row_stats,
    softmax,
)
from xent_array._engines import cpu

if isinstance(cpu.compiled_body(), str):
    pytest.skip(cpu.compiled_body(), allow_module_level=True)

from llvmlite import binding
from numba import config, njit, types
from numba.core import caching
from numba.extending import intrinsic

from xent_array._engines import _compiled, _dense, _kept, _loops, _memory, _tiles
from xent_array._engines import _vectors as v

RNG = np.random.default_rng(0)
DTYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32, "float64": np.float64}
each_dtype = pytest.mark.parametrize("dtype", DTYPES)
each_wide = pytest.mark.parametrize("dtype", ["float32", "float64"])


def words(first, last, count, dtype):
    """Numbers of evenly spaced bit patterns, both ends among them."""
    word = np.uint32 if dtype == "float32" else np.uint64
    first, last = (int(np.array(end, dtype).view(word)) for end in (first, last))
    return np.array([first + (last - first) * k // (count - 1) for k in range(count)], word).view(dtype)


def around(numbers, count, dtype):
    """Each number and its neighbours on both sides."""
    word = np.int32 if dtype == "float32" else np.int64
    return (np.array(numbers, dtype).view(word)[:, None] + np.arange(-count, count + 1, dtype=word)).view(dtype).ravel()


def units(got, truth):
    """The largest error in units in the last place of the truth."""
    step = np.spacing(np.abs(truth).astype(got.dtype)).astype(truth.dtype)
    return float(np.max(np.abs(got.astype(truth.dtype) - truth) / step))


def exact(x):
    """The same numbers in a type in which NumPy's functions are right to far more than a unit of theirs."""
    if x.dtype == np.float32:
        return x.astype(np.float64)
    if np.finfo(np.longdouble).nmant < 62:
        pytest.skip("NumPy has nothing wider than float64 here")
    return x.astype(np.longdouble)


# -- numbers -----------------------------------------------------------------------------------------------------


def of_a_number(function):
    @intrinsic
    def of_a_number(_context, x):
        return x(x), lambda _context, builder, _signature, arguments: function(v.Value(builder, arguments[0])).value

    return of_a_number


exp, tanh = map(of_a_number, (v._exp, v._tanh))


@njit
def exp_each(x, out):
    for k in range(x.shape[0]):
        out[k] = exp(x[k])


@njit
def exp_alone(x):
    return exp(x)


@njit
def exp_in_rows(x, out, m):
    return _dense.exps(x, m, -1, out, x, 0, out, 0)


@njit
def exp_in_lanes(x, m, partial):
    at = np.full(_tiles.LANES, -1)
    _tiles.exp_of_lanes(
        x, 0, _tiles.LANES, x.shape[0] // _tiles.LANES, 0, m, at, 0, True, True, partial, x, 0, 0, x, 0, 0
    )


@njit
def tanh_each(x, out):
    for k in range(x.shape[0]):
        out[k] = tanh(x[k])


@njit
def log1p_each(x, kind, out):
    for k in range(x.shape[0]):
        out[k] = v.finish(kind, x[k], 0, 1, 0, 1, 1, 0)[3]


def test_what_was_compiled_before_changes_nothing():
    def log1p_of(kind):
        return njit(lambda r: v.finish(kind(0), r, 0, 1, 0, 1, 1, 0)[3])(0.3)

    first, exact = log1p_of(np.float32), log1p_of(np.float64)
    assert log1p_of(np.float32) == first != exact


@each_wide
def test_exp(dtype):
    """On all that is not above 0; exactly 0 beside the smallest normal number."""
    smallest = math.log(np.finfo(dtype).smallest_normal) - math.log(2) / 2
    x = np.concatenate(
        [
            words(-0.0, smallest, 200_000, dtype),
            around([smallest, -1, -math.log(2) / 2, -1.5 * math.log(2)], 1000, dtype),
            np.array([0.0, -0.0], dtype),
        ]
    )
    got = np.empty_like(x)
    exp_each(x, got)
    with np.errstate(under="ignore"):
        truth = np.exp(exact(x))
    ends = x < smallest * (1 - 2e-7)  # a few numbers beside the end become 0 early
    assert (got[x < smallest * (1 + 2e-7)] == 0).all()
    assert (got[~ends] > 0).all()
    assert units(got[~ends], truth[~ends]) <= (1.05 if dtype == "float32" else 1.6)
    assert (got[x == 0] == 1).all()
    far = np.array([-np.inf, np.finfo(dtype).min, -1e4, -104, -746, np.nan], dtype)
    if dtype == "float64":
        far[3] = -745
    got = np.empty_like(far)
    exp_each(far, got)
    assert (got[:-1] == 0).all()
    assert not np.signbit(got[:-1]).any()
    assert np.isnan(got[-1])


@each_wide
def test_exp_is_the_same_alone_and_in_vectors(dtype):
    x = np.concatenate([words(-0.0, -800, 5000, dtype), np.array([0, -np.inf, np.nan], dtype)])
    x = np.resize(x, -(-x.size // 64) * 64)
    each, rows, lanes, partial = np.empty_like(x), np.empty_like(x), x.copy(), np.zeros(1024, dtype)
    exp_each(x, each)
    exp_in_rows(x, rows, x.dtype.type(0))
    exp_in_lanes(lanes, np.zeros(16, dtype), partial)
    assert each.tobytes() == rows.tobytes() == lanes.tobytes()
    assert np.array([exp_alone(number) for number in x], dtype).tobytes() == each.tobytes()


@each_wide
def test_tanh(dtype):
    tiny = np.finfo(dtype).smallest_normal
    x = np.concatenate([words(tiny, np.finfo(dtype).max, 200_000, dtype), around([1, 0.17, 9, 19, 40], 1000, dtype)])
    x = np.concatenate([x, -x])
    got, truth = np.empty_like(x), np.tanh(exact(x))
    tanh_each(x, got)
    assert units(got, truth) <= 3
    special = np.array([0, -0.0, np.inf, -np.inf, np.nan], dtype)
    got = np.empty_like(special)
    tanh_each(special, got)
    np.testing.assert_array_equal(got, np.tanh(special))


@pytest.mark.parametrize(("kind", "bar"), [(np.float64, 3), (np.float32, 3e-9 * 2**53)])
def test_log1p(kind, bar):
    tiny = np.finfo(np.float64).smallest_subnormal
    x = np.concatenate(
        [
            words(tiny, 1e300, 200_000, "float64"),
            around([1, math.sqrt(2) - 1, 2 * math.sqrt(2) - 1, 1e-16, 3], 1000, "float64"),
        ]
    )
    got = np.empty_like(x)
    log1p_each(x, kind(0), got)
    assert units(got, np.log1p(exact(x))) <= bar
    special = np.array([0.0, np.nan])
    got = np.empty_like(special)
    log1p_each(special, kind(0), got)
    np.testing.assert_array_equal(got, special)


# -- 16 bits -----------------------------------------------------------------------------------------------------

_in_integers = {  # as on a processor that does not convert float16
    "from": v._cast(types.uint16, types.float32, lambda _context, builder, value: v.half_from_bits(builder, value)),
    "to": v._cast(types.float32, types.uint16, lambda _context, builder, value: v.half_of_bits(builder, value)),
}
each_16_bits = pytest.mark.parametrize(
    ("kind", "widen", "narrow"),
    [
        (np.float16, v.from_half, v.to_half),
        (np.float16, _in_integers["from"], _in_integers["to"]),
        (ml_dtypes.bfloat16, v.from_bfloat, v.to_bfloat),
    ],
    ids=["float16", "float16 in integers", "bfloat16"],
)


def on_each(function):
    @njit
    def each(x, out):
        for k in range(x.shape[0]):
            out[k] = function(x[k])

    return each


@each_16_bits
def test_every_16_bit_number_is_widened_exactly(kind, widen, narrow):
    word = np.arange(65536).astype(np.uint16)
    got = np.empty(65536, np.float32)
    on_each(widen)(word, got)
    wanted = word.view(kind).astype(np.float32)
    number = ~np.isnan(wanted)
    assert number.sum() > 60_000
    np.testing.assert_array_equal(got.view(np.uint32)[number], wanted.view(np.uint32)[number])
    assert np.isnan(got[~number]).all()


@each_16_bits
def test_narrowing_rounds_as_a_cast_does(kind, widen, narrow):
    """Every 16-bit number, half-way to the next, the float32 numbers beside these, infinity by rounding."""
    each = np.arange(0x7F80 if kind == ml_dtypes.bfloat16 else 0x7C00).astype(np.uint16).view(kind).astype(np.float32)
    with np.errstate(all="ignore"):
        half_way = each + (np.append(each[1:], 2 * each[-1]) - each) / 2
        x = np.concatenate([each, half_way, around(np.concatenate([each, half_way])[1:-1], 1, "float32")])
        x = np.concatenate([x, RNG.integers(2**31, size=500_000).astype(np.uint32).view(np.float32)])
        x = np.concatenate([x, -x, np.array([np.inf, -np.inf, np.nan, -np.nan], np.float32)])
        x = np.append(x, np.array([0x7F800001, 0x7FFFFFFF, 0xFF800001], np.uint32).view(np.float32))
        wanted = x.astype(kind)
    got = np.empty(x.size, np.uint16)
    on_each(narrow)(x, got)
    number = ~np.isnan(x)
    np.testing.assert_array_equal(got[number], wanted.view(np.uint16)[number])
    assert np.isinf(wanted[number]).any()
    assert np.isnan(got.view(kind)[~number].astype(np.float32)).all()


# -- two ways through the rows -----------------------------------------------------------------------------------


class Spy:
    """Counts the calls of one of the loops."""

    def __init__(self, monkeypatch, name):
        self.calls, self.function = 0, getattr(_loops, name)
        monkeypatch.setattr(_loops, name, self)

    def __call__(self, *arguments):
        self.calls += 1
        self.arguments = arguments
        return self.function(*arguments)


def words_of(array):
    """Bytes to compare, those of a NaN, too."""
    return np.ascontiguousarray(array).tobytes()


OPTIONS = {"weight": True, "z_loss": 0.01, "sample_weight": True, "grad_output": True}


def problem(classes, count, dtype, names=(), seed=0):
    """Logits with rows of every kind, labels with ignored and bad ones, and options."""
    rng = np.random.default_rng(seed)
    x = (4 * rng.normal(size=(count, classes))).astype(dtype)
    x[::5] = np.round(x[::5].astype(np.float32)).astype(dtype)  # ties
    x[1::11, rng.integers(classes)] = 30  # confident
    x[2::11, ::3] = -np.inf
    x[3::23, rng.integers(classes)] = np.nan
    x[4::23, rng.integers(classes)] = np.inf
    x[5::23] = -np.inf
    labels = rng.integers(0, classes, count)
    labels[6::13], labels[7::29], labels[8::31] = -100, -1, classes
    options = {name: OPTIONS[name] for name in names}
    if "weight" in names:
        options["weight"] = np.where(rng.random(classes) < 0.1, 0, rng.random(classes))
    for name in {"sample_weight", "grad_output"} & set(names):
        options[name] = np.where(rng.random(count) < 0.1, 0, rng.normal(size=count))
    return x, labels, options


def all_that_comes_out(x, labels, axis, shape, **options):
    """Of the public functions, as bytes; `shape` is that of anything with a number per row."""
    for name in {"sample_weight", "grad_output"} & set(options):
        options[name] = options[name].reshape(shape)
    given = {"axis": axis, "validate": False, "engine": "cpu", **options}
    upstream = {name: given.pop(name) for name in ("grad_output",) if name in given}
    stats = row_stats(x, labels, **given)
    given["reduction"] = "none"
    loss, grad = cross_entropy_value_and_grad(x, labels, **given, **upstream)
    grad = np.moveaxis(grad, axis, -1)
    alone = np.moveaxis(cross_entropy_grad(x, labels, **given, **upstream, stats=stats), axis, -1)
    results = [
        loss,
        cross_entropy(x, labels, **given),
        *stats,
        grad,
        alone,
        np.moveaxis(softmax(x, axis=axis), axis, -1),
    ]
    return [words_of(result) for result in results]


CLASSES = (1, 2, 3, 4, 5, 9, 31, 32, 33, 64, 255, 256, 257, 512, 513, 1000)


@pytest.mark.full(but_one_per="dtype")
@each_dtype
@pytest.mark.parametrize(
    "names", [(), *((name,) for name in OPTIONS), ("weight", "grad_output"), tuple(OPTIONS)], ids="-".join
)
def test_rows_and_lanes_are_bit_identical(monkeypatch, dtype, names):
    """The same rows dense and with classes apart, by the path that is taken and by `rows` alone."""
    rows, lanes, beside = (Spy(monkeypatch, name) for name in ("rows", "lanes", "beside"))
    for classes in CLASSES:
        for outer, inner in [(1, 8), (1, 17), (2, 40)] if classes > 64 else [(1, 8), (3, 13), (1, 113), (2, 300)]:
            x, labels, options = problem(classes, outer * inner, DTYPES[dtype], names, seed=classes + inner)
            by_rows = all_that_comes_out(x, labels, 1, labels.shape, **options)
            apart = np.ascontiguousarray(np.moveaxis(x.reshape(outer, inner, classes), 2, 1))
            with monkeypatch.context() as patched:
                patched.setattr(_compiled, "_turned", lambda *_: None)
                before = lanes.calls, beside.calls
                assert all_that_comes_out(x, labels, 1, labels.shape, **options) == by_rows
                assert (lanes.calls, beside.calls) == before
            before = rows.calls
            labels = labels.reshape(outer, inner)
            assert all_that_comes_out(apart, labels, 1, labels.shape, **options) == by_rows
            assert rows.calls == before
    assert lanes.calls > 0
    assert beside.calls > 0
    assert rows.calls > 0


@each_dtype
@pytest.mark.parametrize("names", [(), ("weight", "z_loss")], ids="-".join)
@pytest.mark.parametrize(("classes", "inner"), [(5, 16), (17, 272), (40, 608), (300, 272), (1030, 160)])
def test_rows_side_by_side_in_tiles(monkeypatch, dtype, names, classes, inner):
    """However many share a tile; and past the caches, wherever in a line of cache the gradient begins."""
    x, labels, options = problem(classes, 2 * inner, DTYPES[dtype], names, seed=classes + inner)
    options |= {"reduction": "none", "engine": "cpu", "validate": False}
    apart, labels = np.ascontiguousarray(np.moveaxis(x.reshape(2, inner, classes), 2, 1)), labels.reshape(2, inner)
    with monkeypatch.context() as patched:
        patched.setattr(_compiled, "_turned", lambda *_: None)
        wanted = [*map(words_of, cross_entropy_value_and_grad(apart, labels, axis=1, **options))]
    for tile in (1, 1 << 12, 1 << 17):
        monkeypatch.setattr(_compiled, "APART", tile)
        assert [*map(words_of, cross_entropy_value_and_grad(apart, labels, axis=1, **options))] == wanted
    monkeypatch.setattr(_memory, "LARGE", 0)
    beside, size = Spy(monkeypatch, "beside"), apart.itemsize
    for start in range(0, 64, 3 * size):
        memory = np.zeros(apart.nbytes + 192, np.uint8)
        first = -memory.ctypes.data % 64 + 64 + start
        out = memory[first : first + apart.nbytes].view(apart.dtype).reshape(apart.shape)
        loss, _ = cross_entropy_value_and_grad(apart, labels, axis=1, out=out, **options)
        assert [words_of(loss), words_of(out)] == wanted
        assert not memory[:first].any()
        assert not memory[first + apart.nbytes :].any()
        is_streamed = size > 2  # numbers of 16 bits are narrowed before they are written
        assert bool(beside.arguments[12] & _loops.STREAM) is is_streamed
        assert beside.arguments[19] == (start // size if is_streamed else 0)


@each_dtype
@pytest.mark.parametrize(("classes", "inner"), [(1, 40), (5, 33), (40, 47), (255, 40), (300, 63)])
def test_short_tiles_among_others(monkeypatch, dtype, classes, inner):
    """Nothing is taken from where a tile did not reach that had its place before: there is NaN to begin with."""

    def poisoned(make):
        def made(*arguments):
            numbers, sums, places = make(*arguments)
            numbers.fill(np.nan)
            sums.fill(np.nan)
            places.fill(1 << 30)
            return numbers, sums, places

        return made

    for room in ("_lanes_room", "_beside_room"):
        monkeypatch.setattr(_compiled, room, poisoned(getattr(_compiled, room)))
    monkeypatch.setattr(_compiled, "KEPT", -1)
    monkeypatch.setattr(_compiled, "_own", _compiled._Own())
    monkeypatch.setattr(_compiled, "SIDE_BY_SIDE", 32)
    monkeypatch.setattr(_compiled, "APART", 1)
    for names, large in itertools.product([(), ("weight", "z_loss"), ("sample_weight", "grad_output")], (0, 1 << 60)):
        monkeypatch.setattr(_memory, "LARGE", large)
        x, labels, options = problem(classes, 7 * inner, DTYPES[dtype], names, seed=inner)
        apart = np.ascontiguousarray(np.moveaxis(x.reshape(7, inner, classes), 2, 1))
        with monkeypatch.context() as patched:
            patched.setattr(_compiled, "_turned", lambda *_: None)
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
    assert abs(_loops.total(losses) - math.fsum(losses)) <= 2**-52 * math.fsum(losses)
    single = losses.astype(np.float32)
    assert abs(_loops.total(single) - math.fsum(single)) <= 2**-40 * math.fsum(single)
    for number in (np.inf, np.nan):
        losses[count // 2] = number
        assert np.array_equal(_loops.total(losses), number, equal_nan=True)


def test_what_does_not_lie_in_whole_lines_is_not_streamed(monkeypatch):
    monkeypatch.setattr(_memory, "LARGE", 0)
    beside = Spy(monkeypatch, "beside")
    for inner, is_streamed in [(32, True), (40, False)]:
        x, labels = RNG.standard_normal((2, 50, inner), dtype=np.float32), RNG.integers(50, size=(2, inner))
        grad = cross_entropy_grad(x, labels, axis=1, engine="cpu")
        assert bool(beside.arguments[12] & _loops.STREAM) is is_streamed
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


@pytest.mark.parametrize("classes", [8, 300])
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


# -- memory ------------------------------------------------------------------------------------------------------


def padded(x):
    big = np.full((*x.shape[:-1], x.shape[-1] + 7), np.nan, np.float32).astype(x.dtype)
    big[..., : x.shape[-1]] = x
    return big[..., : x.shape[-1]]


def read_only(x):
    x = x.copy()
    x.flags.writeable = False
    return x


def unaligned(x):
    raw = np.empty(x.nbytes + 1, np.uint8)
    view = raw[1:].view(x.dtype).reshape(x.shape)
    view[...] = x
    return view


def apart(x):
    return np.repeat(x, 2, axis=-1)[..., ::2]


LAYOUTS = {
    "dense": lambda x: x,
    "padded": padded,
    "every other row": lambda x: np.repeat(x, 2, axis=0)[::2],
    "rows backwards": lambda x: x[::-1].copy()[::-1],
    "classes backwards": lambda x: x[..., ::-1].copy()[..., ::-1],
    "every other class": apart,
    "read-only": read_only,
    "unaligned": unaligned,
    "Fortran": np.asfortranarray,
    "big-endian": lambda x: x.astype(x.dtype.newbyteorder(">")),
    "sliding window": lambda x: sliding_window_view(np.resize(x, len(x) + x.shape[1] - 1), x.shape[1]),
    "broadcast": lambda x: np.broadcast_to(x[:1].copy(), x.shape),
}


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
    signatures = len(_loops.lanes.signatures), len(_loops.rows.signatures)
    assert cross_entropy(x, labels, engine="cpu") == cross_entropy(np.array(x), labels, engine="cpu")
    assert (len(_loops.lanes.signatures), len(_loops.rows.signatures)) == signatures


def test_a_row_longer_than_a_tile_is_for_numpy(monkeypatch):
    rows, lanes = Spy(monkeypatch, "rows"), Spy(monkeypatch, "lanes")
    x, labels = RNG.standard_normal((5, 33), dtype=np.float32), np.arange(5)
    monkeypatch.setattr(cpu, "TILE", 32)
    grad = cross_entropy_grad(x, labels, engine="cpu")
    assert (rows.calls, lanes.calls) == (0, 0)
    assert_grad(grad, oracle(x, labels))
    monkeypatch.setattr(cpu, "TILE", 33)
    cross_entropy(x, labels, engine="cpu")
    assert lanes.calls == 1


# Every array that the loops see ends, or starts, at a page that may not be touched, and holds NaN to begin with.
GUARD = """
import ctypes, itertools, mmap, sys
import ml_dtypes
import numpy as np
from xent_array import cross_entropy, cross_entropy_grad, cross_entropy_value_and_grad, log_softmax, row_stats, softmax
from xent_array._engines import _compiled, cpu

PAGE = mmap.PAGESIZE
libc = ctypes.CDLL(None, use_errno=True)
kept = []

def guarded(size, dtype):
    dtype, size = np.dtype(dtype), int(size)
    room = max(1, -(-size * dtype.itemsize // PAGE)) * PAGE
    memory = mmap.mmap(-1, room + 2 * PAGE)
    kept.append(memory)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for page in (address, address + PAGE + room):
        assert libc.mprotect(ctypes.c_void_p(page), PAGE, 0) == 0
    start = PAGE if sys.argv[1] == "start" else PAGE + room - size * dtype.itemsize
    array = np.frombuffer(memory, np.uint8)[start : start + size * dtype.itemsize].view(dtype)
    array[...] = -1 if dtype.kind in "iu" else np.nan
    return array

def put(values):
    array = guarded(values.size, values.dtype).reshape(values.shape)
    array[...] = values
    return array

class Numpy:
    def empty(self, shape, dtype=float):
        return guarded(int(np.prod(shape)), dtype).reshape(shape)

    def __getattr__(self, name):
        return getattr(np, name)

_compiled.np = Numpy()

class Scratch(cpu._Scratch):
    def __call__(self, use, shape):
        if use not in self.buffers:
            self.buffers[use] = guarded(self.size, self.dtype)
        return self.buffers[use][: shape[0] * shape[1]].reshape(shape)

cpu._Scratch = Scratch
_compiled._in_lines, _compiled.KEPT = guarded, -1
_compiled._ONE = {dtype: put(array) for dtype, array in _compiled._ONE.items()}

rng = np.random.default_rng(0)
for dtype in (np.float16, ml_dtypes.bfloat16, np.float32, np.float64):
    for classes, shape in itertools.product((1, 2, 5, 33, 256, 257, 513), ((1, 1), (17, 1), (130, 1), (2, 9), (1, 40))):
        x = (3 * rng.normal(size=(shape[0], classes, shape[1]))).astype(dtype)
        labels = rng.integers(classes, size=shape)
        labels.reshape(-1)[::7] = -1
        weight, per_row = rng.random(classes), rng.random(shape)
        for options in ({}, {"z_loss": 0.1, "weight": put(weight), "sample_weight": put(per_row)},
                        {"label_smoothing": 0.1}, {"softcap": 3.0}, {"label_smoothing": 0.1, "weight": put(weight)}):
            given = {"axis": 1, "validate": False, "reduction": "sum", "engine": "cpu", **options}
            y, logits = put(labels), put(x)
            out = guarded(x.size, dtype).reshape(x.shape)
            cross_entropy_value_and_grad(logits, y, out=out, **given)
            del given["reduction"]
            stats = row_stats(logits, y, **given)
            again = cross_entropy_grad(logits, y, stats=stats, out=logits, reduction="sum", **given)
            assert np.array_equal(again.astype(float), out.astype(float), equal_nan=True)
            # And what lay in the scratch is not in the answer.
            plain = cross_entropy_grad(x, labels, reduction="sum", **given | {"engine": "numpy"})
            assert np.allclose(plain.astype(float), out.astype(float), rtol=0.05, atol=1e-3, equal_nan=True)
        soft = put(rng.random(x.shape))
        cross_entropy_value_and_grad(put(x), soft, axis=1, out=guarded(x.size, dtype).reshape(x.shape), engine="cpu")
        softmax(put(x), axis=1), log_softmax(put(x), axis=1)
        row, label = put(np.moveaxis(x, 1, 2)), put(abs(labels) % classes)
        cross_entropy_value_and_grad(row, label), cross_entropy(row, label)  # small, without options
        label.reshape(-1)[-1] = -1
        try:
            cross_entropy_value_and_grad(row, label)
        except IndexError:
            continue
        raise AssertionError
print("done", len(kept))
"""


@pytest.mark.full
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mprotect is called as on Linux")
@pytest.mark.parametrize("end", ["start", "end"])
def test_nothing_beside_an_array_is_touched(end):
    assert run(GUARD, end).startswith("done")


# -- what is compiled, and when ----------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [10, 300])
def test_one_machine_code_for_all_options(classes):
    """Nor for read-only arrays, nor for another job, though a loss alone of 16-bit logits has one of its own."""
    x, labels = RNG.standard_normal((30, classes), dtype=np.float32), RNG.integers(classes, size=30)
    for logits in (x, x.astype(np.float64)):
        cross_entropy(logits, labels, engine="cpu")
        cross_entropy(np.tile(logits, 6), labels, engine="cpu")
        before = set(_loops.rows.signatures), set(_loops.lanes.signatures)
        for given in (logits, read_only(logits), padded(logits), np.asfortranarray(logits), unaligned(logits)):
            for options in (
                {"z_loss": 1}, {"softcap": 20}, {"label_smoothing": 1}, {"weight": np.ones(classes)},
                {"sample_weight": read_only(np.ones(30))}, {"weight": np.ones(classes), "label_smoothing": 0.1},
            ):  # fmt: skip
                for target in (labels, read_only(labels), labels.astype(np.uint8), RNG.random(x.shape)):
                    stats = row_stats(given, target, engine="cpu", **options)
                    cross_entropy_value_and_grad(given, target, grad_output=2, engine="cpu", **options)
                    cross_entropy_grad(given, target, stats=stats, engine="cpu", **options)
            softmax(given)
            log_softmax(given)
        assert (set(_loops.rows.signatures), set(_loops.lanes.signatures)) == before


@pytest.fixture(scope="module")
def assembly():
    """Of `rows` for float32."""
    cross_entropy_value_and_grad(np.zeros((3, 300), np.float32), [0, 1, 2], engine="cpu")
    (signature,) = (s for s in _loops.rows.signatures if s[0].dtype == types.float32 == s[-3].dtype)
    anew = njit(**_loops._OPTIONS)(_loops.rows.py_func)
    anew.compile(signature)
    return "\n".join(anew.inspect_asm().values())


@pytest.mark.full
def test_widest_vectors_of_the_host(assembly):
    features, machine = binding.get_host_cpu_features(), platform.machine().lower()
    if machine in ("x86_64", "amd64") and features.get("fma"):
        vectors = "zmm" if features.get("avx512f") else "ymm"
        instruction = rf"vf(n?m)(add|sub)\d+ps\s.*{vectors}"
    elif machine in ("aarch64", "arm64"):
        instruction = r"fmla\s+v\d+\.4s"
    else:
        pytest.skip(f"nothing is known of the multiply-add of this {machine}")
    assert len(re.findall(instruction, assembly)) >= 20  # an exponential has seven, and a group two or four of these


def test_no_function_of_the_c_library_is_called(assembly):
    assert "ret" in assembly
    called = re.findall(r"\b(expf?|exp2f?|tanhf?|log1pf?|logf?|fmaf?|__\w+[hs]f2)\b", assembly)
    assert called == []


# -- other processes ---------------------------------------------------------------------------------------------


def run(script, *arguments, **environment):
    """The output of a script in a process of its own, where warnings are errors."""
    here = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(here), str(here.parent)])} | environment
    command = [sys.executable, "-W", "error", "-c", script, *arguments]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert (ran.returncode, ran.stderr) == (0, "")
    return ran.stdout


def test_a_call_of_the_generic_engine_does_not_import_numba():
    script = (
        "import sys, numpy, xent_array; xent_array.cross_entropy(numpy.eye(3), [0, 1, 2], engine='generic')\n"
        "xent_array.cross_entropy(numpy.eye(3), [0, 1, 2], engine='numpy')\n"
        "print('numba' in sys.modules)\n"
        "xent_array.cross_entropy(numpy.eye(3), [0, 1, 2]); print('numba' in sys.modules)"
    )
    assert run(script).split() == ["False", "True"]


FIRST_CALLS = """
import hashlib, threading
import numpy as np
from xent_array import cross_entropy_value_and_grad

x = np.random.default_rng(0).standard_normal((40, 300), np.float32)
labels = np.arange(40)
found = []

def work():
    start.wait()
    with np.errstate(all="raise"):  # the compiler at work does not care
        found.append(cross_entropy_value_and_grad(x, labels))

start = threading.Barrier(2)
both = [threading.Thread(target=work) for _ in range(2)]
for thread in both:
    thread.start()
for thread in both:
    thread.join()
wanted = cross_entropy_value_and_grad(x, labels, engine="numpy")
for loss, grad in found:
    assert abs(loss - wanted[0]) < 1e-5 and np.abs(grad - wanted[1]).max() < 1e-6
assert len(found) == 2
from xent_array._engines import _loops
stats = _loops.rows.stats
print(stats.cache_path, sum(stats.cache_hits.values()), sum(stats.cache_misses.values()))
print(hashlib.sha256(found[0][0].tobytes() + found[1][1].tobytes()).hexdigest())
"""


@pytest.mark.full
def test_a_second_process_loads_what_the_first_compiled(tmp_path):
    """Where two threads make the very first call at once."""
    (told, first), (again, second) = (run(FIRST_CALLS, NUMBA_CACHE_DIR=str(tmp_path)).splitlines() for _ in range(2))
    assert told.startswith(str(tmp_path))
    assert told.endswith(" 0 1")
    assert again.endswith(" 1 0")
    assert second == first


@pytest.mark.full
def test_a_processor_that_knows_little(tmp_path):
    """Such as a virtual one: without float16, without multiply-add. A missing function would end the process."""
    script = """
import numpy as np
from xent_array import cross_entropy_value_and_grad
x = np.random.default_rng(0).standard_normal((4, 300)).astype(np.float16)
for logits in (x, x[:, :10]):
    (loss, grad), (wanted, _) = (cross_entropy_value_and_grad(logits, [3, 2, 1, 0], engine=e) for e in ("cpu", "numpy"))
    assert grad.dtype == np.float16 and abs(loss - wanted) < 1e-5
print("right")
"""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        pytest.skip("every other processor of note has float16")
    weak = {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": "", "NUMBA_CACHE_DIR": str(tmp_path)}
    assert run(script, **weak).strip() == "right"


WITHOUT = """
import json, sys

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "numba" and sys.argv[1] == "absent":
            raise ModuleNotFoundError("No module named 'numba'", name="numba")
        if name == "numba" and sys.argv[1] == "broken":
            raise ImportError("Numba needs NumPy 2.1 or less")

sys.meta_path.insert(0, Finder())
import numpy as np
from xent_array import __main__ as program, cross_entropy_value_and_grad
x = np.random.default_rng(0).standard_normal((40, 300), np.float32)
found = [cross_entropy_value_and_grad(x, np.arange(40), z_loss=0.1, engine=engine) for engine in (None, "cpu", "numpy")]
assert len({loss.tobytes() + grad.tobytes() for loss, grad in found}) == 1
program.SIZE = (4, 10)
assert program.main(["--json"]) == 0
assert program.main([]) == 0
"""


@pytest.mark.parametrize(
    ("how", "reason", "environment"),
    [
        ("absent", "Numba is not installed", {}),
        ("broken", "Numba cannot be used: Numba needs NumPy 2.1 or less", {}),
        ("switched off", "Numba cannot be used: NUMBA_DISABLE_JIT is set", {"NUMBA_DISABLE_JIT": "1"}),
    ],
)
def test_without_numba_it_is_numpy_and_the_report_says_why(how, reason, environment):
    told = run(WITHOUT, how, **environment)
    assert f'"reason": "{reason}"' in told
    assert f"loops of engine 'cpu': NumPy, because {reason}\n" in told


def test_the_report_says_that_numba_is_used(monkeypatch, capsys):
    monkeypatch.setattr(program, "SIZE", (4, 10))
    assert program.main([]) == 0
    assert "loops of engine 'cpu': compiled by Numba\n" in capsys.readouterr().out


# -- what is kept ------------------------------------------------------------------------------------------------


def twice(x):
    return 2 * x


@pytest.fixture
def folder(monkeypatch, tmp_path):
    monkeypatch.setattr(config, "CACHE_DIR", str(tmp_path))
    return tmp_path


def anew():
    return _kept.kept(njit(twice))


def hits(function):
    return sum(function.stats.cache_hits.values())


def test_kept_code_is_loaded(folder):
    first = anew()
    assert (first(1.5), first(3), hits(first)) == (3, 6, 0)
    assert first.stats.cache_path.startswith(str(folder))
    second = anew()
    assert (second(1.5), second(3), hits(second)) == (3, 6, 2)


def test_code_of_other_sources_is_not(folder, monkeypatch):
    anew()(1.5)
    monkeypatch.setattr(_kept, "SOURCES", ("_loops.py",))
    other = anew()
    assert (other(1.5), hits(other)) == (3, 0)


def test_the_sources_are_all_that_the_loops_are_made_of():
    """A module that they come to import of our own must be named, or its changes would go unnoticed."""
    ours = {Path(_loops.__file__).name}
    for module in (_loops, v):
        for name in re.findall(r"^from \. import (\w+)|^from \.(\w+) import", Path(module.__file__).read_text(), re.M):
            ours.add("".join(name) + ".py")
    assert ours - {"_kept.py"} == set(_kept.SOURCES)


@pytest.mark.parametrize("suffix", [".nbi", ".nbc"])
@pytest.mark.parametrize("content", [b"", b"\x80\x04nonsense"])
def test_a_file_that_is_cut_off_is_made_anew(folder, suffix, content):
    anew()(1.5)
    (file,) = folder.rglob(f"*{suffix}")
    file.write_bytes(content)
    after = anew()
    assert (after(1.5), hits(after)) == (3, 0)
    healed = anew()
    assert (healed(1.5), hits(healed)) == (3, 1)


def test_code_under_the_name_of_another(folder):
    """Numba's index may be left so by two processes that save at once."""
    first = anew()
    first(1.5), first(3)
    one, two = folder.rglob("*.nbc")
    contents = one.read_bytes(), two.read_bytes()
    one.write_bytes(contents[1])
    two.write_bytes(contents[0])
    second = anew()
    assert (second(1.5), second(3)) == (3, 6)
    assert isinstance(second(3), int)


@pytest.mark.parametrize("what", ["ensure_cache_path", "_open_for_write", "_load_index"])
def test_a_folder_that_fails_later(folder, monkeypatch, what):
    function = anew()

    def fails(*_):
        raise OSError(30, "Read-only file system")

    of = caching._CacheLocator if what == "ensure_cache_path" else caching.IndexDataCacheFile
    monkeypatch.setattr(of, what, fails)
    assert (function(1.5), function(3)) == (3, 6)


def test_no_folder_at_all(folder, monkeypatch):
    monkeypatch.setattr(caching.CacheImpl, "_locator_classes", [])
    function = anew()
    assert (function(1.5), function.stats.cache_path) == (3, None)
    monkeypatch.undo()
    (folder / "file").write_text("")
    monkeypatch.setattr(config, "CACHE_DIR", str(folder / "file"))  # and no folder can be made in it
    monkeypatch.setattr(caching.CacheImpl, "_locator_classes", caching.CacheImpl._locator_classes[:1])
    function = anew()
    assert (function(1.5), function.stats.cache_path) == (3, None)


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="this system has no owners and modes")
@pytest.mark.parametrize(("which", "mode", "used"), [(0, 0o777, False), (1, 0o777, False), (1, 0o1777, True)])
def test_a_folder_that_others_can_write_to_or_replace_is_not_used(folder, which, mode, used):
    kept = Path(anew().stats.cache_path)
    os.chmod([kept, kept.parent][which], mode)
    function = anew()
    assert function(1.5) == 3
    assert (function.stats.cache_path is not None) is used
    assert bool(list(folder.rglob("*.nb?"))) is used


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="this system has no owners and modes")
@pytest.mark.parametrize(("owner", "ours"), [(1, True), (2, True), (3, False)])
def test_a_folder_is_of_this_user_or_of_the_owner_of_the_package(monkeypatch, owner, ours):
    monkeypatch.setattr(_kept.os, "geteuid", lambda: 1)
    with monkeypatch.context() as patched:
        of = {_kept.__file__: 2, "there": owner, Path("."): 3}
        patched.setattr(_kept.os, "stat", lambda path: SimpleNamespace(st_uid=of[path], st_mode=0o40755))
        answer = _kept._is_ours("there")
    assert answer is ours


def test_no_locator_of_numba_is_a_shared_folder():
    """Should Numba come to have another, someone must look at where it keeps code."""
    assert {locator.__name__.lstrip("_") for locator in caching.CacheImpl._locator_classes} <= {
        "UserProvidedCacheLocator", "InTreeCacheLocator", "InTreeCacheLocatorFsAgnostic", "UserWideCacheLocator",
        "IPythonCacheLocator", "ZipCacheLocator",
    }  # fmt: skip


def test_a_thread_keeps_what_it_works_in_unless_it_is_much(monkeypatch):
    monkeypatch.setattr(_compiled, "_own", _compiled._Own())
    logits, labels = np.ones((1, 70, 40), np.float32), np.zeros((1, 40), np.intp)
    rooms = []
    for apart in (_compiled.APART, _compiled.APART, 1):  # of other widths there is other room
        monkeypatch.setattr(_compiled, "APART", apart)
        cross_entropy(logits, labels, axis=1, engine="cpu")
        rooms.append(_compiled._own.room[1])
    assert rooms[0] is rooms[1] is not rooms[2]
    monkeypatch.setattr(_compiled, "KEPT", 1 << 10)
    cross_entropy(logits[:, 1:], labels, axis=1, engine="cpu")
    assert _compiled._own.room[1] is rooms[2]
    assert all(array.ctypes.data % 64 == 0 for array in rooms[0])


@each_wide
@pytest.mark.parametrize("names", [(), ("z_loss",)], ids="-".join)
def test_which_loop_takes_a_large_gradient(monkeypatch, dtype, names):
    """One that goes to memory is turned for fewer classes, with or without options; the numbers are the same."""
    rows, lanes = Spy(monkeypatch, "rows"), Spy(monkeypatch, "lanes")
    logits, labels, options = problem(_compiled.FEW_IN_LARGE + 1, 40, DTYPES[dtype], names)
    labels[(labels < 0) | (labels >= logits.shape[1])] = 0
    expected = [*map(words_of, cross_entropy_value_and_grad(logits, labels, engine="cpu", **options))]
    assert (rows.calls, lanes.calls) == (0, 1)
    monkeypatch.setattr(_memory, "LARGE", logits.nbytes)
    assert [*map(words_of, cross_entropy_value_and_grad(logits, labels, engine="cpu", **options))] == expected
    assert (rows.calls, lanes.calls) == (1, 1)
    cross_entropy(logits, labels, engine="cpu", **options)
    assert (rows.calls, lanes.calls) == (1, 2)
    monkeypatch.setattr(_memory, "LARGE", logits.nbytes + 1)
    cross_entropy_value_and_grad(logits, labels, engine="cpu", **options)
    assert (rows.calls, lanes.calls) == (1, 3)
