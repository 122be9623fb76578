"""Which way a call goes: a table of problems, and the path of each."""

import ml_dtypes
import numpy as np
import pytest
from support.problems import LAYOUTS
from support.sizes import resize

from xent_array import (
    cross_entropy,
    cross_entropy_grad,
    cross_entropy_value_and_grad,
    log_softmax,
    row_stats,
    softmax,
)
from xent_array._engines import cpu
from xent_array._engines.cpu import compiled, path
from xent_array._engines.cpu.loops import GRAD, KNOWN, LOG, LOSS, PLAIN, STATS, STREAM
from xent_array._engines.cpu.path import Strides

RNG = np.random.default_rng(0)
needs_loops = pytest.mark.skipif(isinstance(cpu.found_loops(), str), reason="llvmlite is not installed")


@pytest.fixture
def chosen(monkeypatch):
    """The paths that are chosen, of calls that go through every check."""
    paths = []

    def noted(*given):
        paths.append(path.choose(*given))
        return paths[-1]

    monkeypatch.setattr(cpu, "choose", noted)
    monkeypatch.setattr(cpu.engine, "at_once", lambda *_: None)
    return paths


def logits(*shape, dtype=np.float32):
    return RNG.normal(size=shape).astype(dtype)


def both(x, axis=-1, out=None, target=None, **options):
    shape = np.delete(x.shape, axis)
    target = RNG.integers(x.shape[axis], size=shape) if target is None else target
    return cross_entropy_value_and_grad(x, target, axis=axis, out=out, engine="cpu", **options)


def laid(layout, *shape, dtype=np.float32):
    return LAYOUTS[layout](logits(*shape, dtype=dtype))


def apart(*shape):
    """Rows that do not lie side by side, nor do their classes."""
    return np.repeat(logits(*shape), 2, axis=-1)[..., ::2]


COPIED = None
SMOOTH = {"label_smoothing": 0.1}
EVERYTHING = {"weight": np.ones(30), "sample_weight": np.ones(50), "z_loss": 0.1, "grad_output": 2.0}

# What is called; the code, where logits are read and where the gradient is written, None where they are copied.
TABLE = {
    "contiguous rows of few classes": (lambda: both(logits(50, 10)), "transposed", (10, 1), (10, 1)),
    "the most of these": (lambda: both(logits(9, 320)), "transposed", (320, 1), (320, 1)),
    "one more": (lambda: both(logits(9, 321)), "contiguous", (321, 1), (321, 1)),
    "one class": (lambda: both(logits(9, 1)), "transposed", (1, 1), (1, 1)),
    "one row": (lambda: both(logits(1, 10)), "transposed", (10, 1), (10, 1)),
    "under options": (lambda: both(logits(50, 30), **EVERYTHING), "transposed", (30, 1), (30, 1)),
    "smoothing": (lambda: both(logits(50, 10), label_smoothing=0.1), "transposed", (10, 1), (10, 1)),
    "softcap": (lambda: both(logits(50, 10), softcap=9.0), "transposed", (10, 1), (10, 1)),
    "distributions": (lambda: both(logits(5, 10), target=np.full((5, 10), 0.1)), "contiguous", (10, 1), (10, 1)),
    "a scale that comes last": (lambda: both(logits(1, 10), grad_output=1e38), "contiguous", (10, 1), (10, 1)),
    "a large z-loss": (lambda: both(1e15 * logits(50, 10), z_loss=1e30), "contiguous", (10, 1), (10, 1)),
    "float16": (lambda: both(logits(50, 10, dtype=np.float16)), "transposed", (10, 1), (10, 1)),
    "bfloat16": (lambda: both(logits(50, 10, dtype=ml_dtypes.bfloat16)), "transposed", (10, 1), (10, 1)),
    "float64": (lambda: both(logits(50, 10, dtype=np.float64)), "transposed", (10, 1), (10, 1)),
    "a loss alone": (lambda: cross_entropy(logits(5, 10), [0] * 5, engine="cpu"), "transposed", (10, 1), None),
    "rows apart": (lambda: both(laid("padded", 50, 10)), "transposed", (17, 1), (10, 1)),
    "rows backwards": (lambda: both(laid("rows backwards", 50, 10)), "transposed", (-10, 1), (10, 1)),
    "every other row": (lambda: both(laid("every other row", 50, 400)), "contiguous", (800, 1), (400, 1)),
    "the same row": (lambda: both(laid("broadcast", 50, 10)), "transposed", (0, 1), (10, 1)),
    "read-only": (lambda: both(laid("read-only", 50, 10)), "transposed", (10, 1), (10, 1)),
    "every other class": (lambda: both(laid("every other class", 50, 10)), "contiguous", COPIED, (10, 1)),
    "classes backwards": (lambda: both(laid("classes backwards", 50, 10)), "contiguous", COPIED, (10, 1)),
    "unaligned": (lambda: both(laid("unaligned", 50, 10)), "contiguous", COPIED, (10, 1)),
    "big-endian": (lambda: both(laid("big-endian", 50, 10)), "contiguous", COPIED, (10, 1)),
    "big-endian float16": (lambda: both(laid("big-endian", 5, 9, dtype=np.float16)), "contiguous", COPIED, (9, 1)),
    "a gradient backwards": (lambda: both(logits(5, 10), out=logits(5, 10)[::-1]), "transposed", (10, 1), (-10, 1)),
    "a gradient elsewhere": (lambda: both(logits(5, 10), out=apart(5, 10)), "contiguous", (10, 1), COPIED),
    "rows side by side": (lambda: both(logits(10, 50), axis=0), "strided", (500, 50), (500, 50)),
    "images": (lambda: both(logits(3, 10, 4, 5), axis=1), "strided", (200, 20), (200, 20)),
    "few side by side": (lambda: both(logits(3, 10, 8), axis=1), "strided", (80, 8), (80, 8)),
    "too few side by side": (lambda: both(logits(3, 10, 7), axis=1), "contiguous", COPIED, COPIED),
    "classes apart": (lambda: both(logits(20, 50)[::2], axis=0), "strided", (1000, 100), (500, 50)),
    "rows apart from each other": (lambda: both(apart(10, 50), axis=0), "contiguous", COPIED, COPIED),
    "side by side, float16": (lambda: both(logits(9, 50, dtype=np.float16), axis=0), "strided", (450, 50), (450, 50)),
    "few side by side, smoothing": (lambda: both(logits(9, 50), axis=0, **SMOOTH), "strided", (450, 50), (450, 50)),
    "side by side, smoothing": (lambda: both(logits(33, 50), axis=0, **SMOOTH), "contiguous", COPIED, COPIED),
    "side by side, softcap": (lambda: both(logits(33, 50), axis=0, softcap=3), "contiguous", COPIED, COPIED),
    "side by side, unaligned": (lambda: both(laid("unaligned", 9, 50), axis=0), "contiguous", COPIED, COPIED),
    "out elsewhere": (lambda: both(logits(9, 50), axis=0, out=apart(9, 50)), "contiguous", COPIED, COPIED),
    "Fortran": (lambda: both(laid("Fortran", 50, 10)), "strided", (500, 50), (500, 50)),
    "classes last": (lambda: both(logits(3, 50, 10).swapaxes(1, 2), axis=1), "transposed", (10, 1), (10, 1)),
    "many classes side by side": (lambda: both(logits(65536, 8), axis=0), "strided", (524288, 8), (524288, 8)),
    "too many side by side": (lambda: both(logits(65537, 8), axis=0), "contiguous", COPIED, COPIED),
    "softmax": (lambda: softmax(logits(50, 10)), "transposed", (10, 1), (10, 1)),
    "its logarithm": (lambda: log_softmax(logits(50, 10)), "contiguous", (10, 1), (10, 1)),
    "its logarithm, side by side": (lambda: log_softmax(logits(10, 50), axis=0), "contiguous", COPIED, COPIED),
}  # fmt: skip


@needs_loops
@pytest.mark.parametrize("name", TABLE)
def test_path(chosen, name):
    call, code, x, out = TABLE[name]
    call()
    (found,) = chosen
    assert (found.code, found.x, found.out) == (code, x and Strides(*x), out and Strides(*out))
    if found.code == "contiguous":
        assert found.width == 0
    else:
        assert found.width % 16 == 0
        assert 16 <= found.width <= (128 if code == "transposed" and "alone" not in name else 256)
    is_copied = x is None or (out is None and "alone" not in name)
    is_distribution = name == "distributions"
    assert found.block == path.BLOCK * (1 if is_copied or is_distribution else 16)
    assert found.serial == 3 * path.SERIAL


@needs_loops
def test_path_of_each_question(chosen):
    """What is asked as bits, and the stats that are there already."""
    x, y = logits(50, 10), RNG.integers(10, size=50)
    stats = row_stats(x, y, engine="cpu")
    cross_entropy(x, y, engine="cpu")
    both(x)
    cross_entropy_grad(x, y, stats=stats, engine="cpu")
    cross_entropy_value_and_grad(x, y, return_stats=True, engine="cpu")
    softmax(x)
    log_softmax(x)
    assert [found.job for found in chosen] == [
        STATS, LOSS | PLAIN, LOSS | GRAD | PLAIN, KNOWN | GRAD, LOSS | GRAD | STATS, GRAD, LOG,
    ]  # fmt: skip


@needs_loops
def test_plain_rows(chosen):
    """Which rows of few classes are plain: those of a user who gives nothing but numbers that apply to every row."""
    x, y = logits(50, 10), np.zeros(50, int)
    for options, is_plain in (
        ({}, True), ({"reduction": "sum"}, True), ({"reduction": "none"}, True), ({"grad_output": -2.0}, True),
        ({"denominator": 7.0}, True), ({"out": np.empty_like(x)}, True), ({"ignore_index": 3}, True),
        ({"ignore_index": 0}, False), ({"sample_weight": np.ones(50)}, False), ({"weight": np.ones(10)}, False),
        ({"z_loss": 0.1}, False), ({"label_smoothing": 0.1}, False), ({"softcap": 9.0}, False),
        ({"reduction": "none", "grad_output": np.ones(50, np.float32)}, False), ({"return_stats": True}, False),
    ):  # fmt: skip
        cross_entropy_value_and_grad(x, y, **options, engine="cpu")
        assert bool(chosen.pop().job & PLAIN) is is_plain, options
    both(logits(50, 321))
    assert not chosen.pop().job & PLAIN  # but they need no bit: `contiguous` takes all rows alike


@needs_loops
def test_path_of_large_gradients(chosen, monkeypatch):
    """What lies in whole lines side by side is stored past the caches."""
    resize(monkeypatch, LARGE=1 << 14)
    for shape, dtype, is_streamed in (
        ((2, 50, 64), np.float32, True), ((2, 50, 60), np.float32, False), ((2, 50, 64), np.float64, True),
        ((1, 50, 32), np.float32, False), ((2, 50, 128), np.float16, False), ((1, 100, 128), np.float32, True),
    ):  # fmt: skip
        both(logits(*shape, dtype=dtype), axis=1)
        found = chosen.pop()
        assert found.code == "strided"
        assert bool(found.job & STREAM) is is_streamed, (shape, dtype)


@needs_loops
@pytest.mark.parametrize("way", ["at once", "through every check"])
def test_large_gradients_of_contiguous_rows(monkeypatch, way):
    """They are stored past the caches, but not in long bursts, and not where the logits are."""
    monkeypatch.setattr(cpu, "choose", lambda *given: paths.append(path.choose(*given)) or paths[-1])
    monkeypatch.setattr(compiled, "of_contiguous", lambda *given: paths.append(path.of_contiguous(*given)) or paths[-1])
    resize(monkeypatch, LARGE=1 << 14)
    options = {} if way == "at once" else {"denominator": 9.0}
    for classes, dtype, place, is_streamed in (
        (10, np.float32, None, True), (10, np.float32, "new", True), (10, np.float32, "logits", False),
        (1000, np.float32, None, True), (1000, np.float32, "logits", False), (1000, np.float16, None, False),
        (240, np.float32, None, True), (256, np.float32, None, False), (512, np.float32, None, True),
        (1001, np.float32, None, False), (1004, np.float32, None, False), (1008, np.float32, None, True),
        (256, np.float64, None, True), (260, np.float64, None, True), (258, np.float64, None, False),
        (4096, np.float32, None, True), (4104, np.float32, None, False), (2048, np.float64, None, True),
        (2052, np.float64, None, False), (10, np.float64, "new", True), (10, np.float64, "logits", False),
    ):  # fmt: skip
        x = logits(20_000 // classes + 400, classes, dtype=dtype)
        for large in (True, False):
            paths = []
            resize(monkeypatch, LARGE=x.nbytes + (0 if large else 1))
            both(x, out=x if place == "logits" else np.empty_like(x) if place else None, **options)
            assert bool(paths[-1].job & STREAM) is (is_streamed and large), (classes, dtype, place, large)
            most = path.TRANSPOSED_STREAMED if is_streamed and large else path.TRANSPOSED
            if dtype != np.float16 and (is_streamed or not large):
                assert (paths[-1].code == "transposed") is (classes * x.itemsize <= most)
            assert len(set(paths)) == 1


@needs_loops
def test_large_gradients_in_place_of_rows_side_by_side(chosen, monkeypatch):
    resize(monkeypatch, LARGE=1 << 14)
    x = logits(2, 50, 64)
    both(x, axis=1)
    both(x, axis=1, out=x)
    assert [found.code for found in chosen] == ["strided"] * 2
    assert [bool(found.job & STREAM) for found in chosen] == [True, False]


@pytest.mark.parametrize("compile", [pytest.param(True, marks=needs_loops), False])
def test_path_without_loops(chosen, monkeypatch, compile):
    """Where there are none, or the rows are too long for them: the shorter code of NumPy where it does."""
    if compile:
        resize(monkeypatch, TILE=40)  # of 41 classes, and 82, in pieces
    else:
        monkeypatch.setattr(cpu.engine, "compile", False)
    for call, code in (
        (lambda: both(logits(50, 41)), "numpy" if compile else "numpy short"),
        (lambda: both(logits(50, 41), z_loss=0.1), "numpy"),
        (lambda: both(logits(50, 41), softcap=9.0), "numpy"),
        (lambda: both(logits(50, 41), label_smoothing=0.1), "numpy"),
        (lambda: both(logits(50, 41), weight=np.ones(41)), "numpy"),
        (lambda: both(logits(50, 41), sample_weight=np.ones(50)), "numpy"),
        (lambda: both(logits(50, 41), validate=False), "numpy"),
        (lambda: both(logits(41, 50), axis=0), "numpy"),
        (lambda: both(logits(50, 41, dtype=np.float16)), "numpy"),
        (lambda: both(laid("padded", 50, 41)), "numpy"),
        (lambda: both(logits(50, 41), out=apart(50, 41)), "numpy"),
        (lambda: row_stats(logits(50, 41), [0] * 50, engine="cpu"), "numpy"),
        (lambda: softmax(logits(50, 41)), "numpy"),
    ):
        call()
        found = chosen.pop()
        assert found.code == code
        assert (found.block, found.serial, found.is_compiled) == (path.BLOCK, path.SERIAL, False)


@needs_loops
@pytest.mark.parametrize("option", [{}, {"label_smoothing": 0.1}, {"softcap": 9.0}])
@pytest.mark.parametrize("large", [1, 1 << 60])
def test_at_once_takes_the_same_path(chosen, monkeypatch, option, large):
    """`of_contiguous`, which sees no arrays, agrees with `choose`."""
    resize(monkeypatch, LARGE=large)
    for classes in (1, 2, 10, 240, 241, 320, 321, 400, 401, 600, 4096, 4097):
        for call, job in (
            (both, LOSS | GRAD),
            (lambda x, **given: cross_entropy(x, [0] * 9, engine="cpu", **given), LOSS),
        ):
            call(logits(9, classes), **option)
            found = chosen.pop()
            told = path.of_contiguous(classes, job, not option, large == 1 and call is both, 4)
            assert (told.code, told.job, told.x, told.width) == (found.code, found.job, found.x, found.width)
            if call is both:
                assert told.out == found.out


@needs_loops
def test_the_path_does_not_depend_on_how_many_rows_there_are(chosen):
    for classes in (5, 400):
        for count in (1, 2, 17, 4000):
            both(logits(count, classes))
        assert len(set(chosen)) == 1
        chosen.clear()
