"""Logits of every kind, in every memory layout; all that the public functions answer to them; which loop is called."""

from functools import partial

import ml_dtypes
import numpy as np
import pytest
from numpy.lib.stride_tricks import sliding_window_view

from xent_array import cross_entropy, cross_entropy_grad, cross_entropy_value_and_grad, row_stats, softmax
from xent_array._engines.cpu import compiled

from .sizes import forget

DTYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32, "float64": np.float64}
each_dtype = pytest.mark.parametrize("dtype", DTYPES)
each_wide = pytest.mark.parametrize("dtype", ["float32", "float64"])

OPTIONS = {"weight": True, "z_loss": 0.01, "sample_weight": True, "grad_output": True}


class Spy:
    """Counts the calls of one of the loops, of which it keeps the last arguments."""

    def __init__(self, monkeypatch, loop):
        self.calls, self.name, self.function = 0, loop.__name__.rpartition(".")[2], compiled.function
        monkeypatch.setattr(compiled, "function", self.watched)
        forget(monkeypatch)

    def watched(self, name, *dtypes):
        function = self.function(name, *dtypes)
        return partial(self.call, function) if name == self.name else function

    def call(self, function, given):
        self.calls += 1
        self.given = given
        return function(given)

    def told(self, name):
        """What the loop was told under that name of `Arguments`."""
        return self.given[0][0][name]


def words_of(array):
    """Bytes to compare, those of a NaN, too."""
    return np.ascontiguousarray(array).tobytes()


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


# -- memory layouts ----------------------------------------------------------------------------------------------


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
