"""Calls with options that are plain numbers are answered at once: with the bits of the way through every check.

And what cannot be answered so goes that way.
"""

import itertools
from contextlib import contextmanager
from unittest import mock

import ml_dtypes
import numpy as np
import pytest
from support.problems import DTYPES, Spy, each_dtype, each_wide
from support.sizes import resize

from xent_array import cross_entropy, cross_entropy_value_and_grad
from xent_array._engines import cpu
from xent_array._engines.cpu import blocks, path
from xent_array._engines.cpu.loops import GROUP, LIMIT, NEXT

if isinstance(cpu.found_loops(), str):
    pytest.skip(cpu.found_loops(), allow_module_level=True)

from xent_array._engines.cpu.loops import transposed

ENGINE_ANSWER = cpu.engine.at_once


@pytest.fixture
def answered(monkeypatch):
    """Whether each call so far was answered at once."""
    found = []

    def noted(*given):
        answer = ENGINE_ANSWER(*given)
        found.append(answer is not None)
        return answer

    monkeypatch.setattr(cpu.engine, "at_once", noted)
    return found


@contextmanager
def through_every_check():
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(cpu.engine, "at_once", lambda *_: None)
        yield


def bits(values):
    """As bytes; one NaN is like another, which sign it has follows from the order of operands."""
    values = np.array(values)
    values[values != values] = np.nan
    return type(values), values.dtype, values.shape, values.tobytes()


def outcome(function, *given, **options):
    """What comes of a call, to compare: results as bits, of scalars the type, or an error."""
    try:
        found = function(*given, **options)
    except Exception as error:
        return type(error), str(error)
    found = found if isinstance(found, tuple) else (found,)
    return [(type(part), *bits(part)) for part in found]


# -- what is answered at once --------------------------------------------------------------------------------------

LABELS = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32")
CLASSES = (1, 2, 3, 7, 10, 16, 31, 32, 33, 64, 95, 96, 97, 128, 255, 256, 257, 300, 512, 513, 600)


def draw(rng, dtype):
    """Logits, labels and options."""
    classes = int(rng.choice(CLASSES))
    shape = ((1,), (5,), (2, 3), (40,), (131,))[rng.integers(5)]
    x = (5 * rng.normal(size=(*shape, classes))).astype(dtype)
    flat = x.reshape(-1, classes)
    if len(flat) > 3 and rng.random() < 0.3:
        flat[0], flat[1, 0], flat[2, -1] = -np.inf, np.nan, np.inf
    kind = np.dtype(rng.choice(LABELS))
    y = rng.integers(0, min(classes, np.iinfo(kind).max + 1), shape).astype(kind)
    options = {"reduction": str(rng.choice(["mean", "sum", "none"]))}
    options["label_smoothing"] = (0.0, 0.0, 0, 0.1, 1.0, 1)[rng.integers(6)]
    options["z_loss"] = (0.0, 0.0, 0, 1e-3, 0.1)[rng.integers(5)]
    options["softcap"] = (None, None, 3.0, 30)[rng.integers(4)]
    options["ignore_index"] = (-100, None, 0, int(rng.integers(classes)), classes, -1, 255)[rng.integers(7)]
    options["axis"], options["validate"] = (-1, x.ndim - 1)[rng.integers(2)], (None, True)[rng.integers(2)]
    options["engine"] = (None, "cpu", cpu.engine)[rng.integers(3)]
    ignored = options["ignore_index"]
    if ignored is not None and np.iinfo(kind).min <= ignored <= np.iinfo(kind).max:
        y[rng.random(shape) < rng.choice([0, 0.3, 1])] = ignored
    return x, y, options


@each_dtype
@pytest.mark.parametrize("shared", [False, True], ids=["alone", "threads"])
def test_the_same_bits_as_through_every_check(answered, monkeypatch, dtype, shared):
    """Over dtypes, labels of every kind, ignored ones, reductions, options, into new memory, `out` and in place."""
    if shared:
        monkeypatch.setenv("XENT_ARRAY_NUM_THREADS", "3")
        resize(monkeypatch, SERIAL=100, PART=300)
    rng = np.random.default_rng(5)
    for number in range(150):
        x, y, options = draw(rng, DTYPES[dtype])
        upstream = {"grad_output": (None, 1024.0, -1.5, 2, 0)[rng.integers(5)]}
        copies = [(x.copy(), None), (x.copy(), np.full_like(x, 7)), (place := x.copy(), place)]
        del answered[:]
        loss = outcome(cross_entropy, x, y, **options)
        both = [outcome(cross_entropy_value_and_grad, a, y, out=b, **options, **upstream) for a, b in copies]
        kept = np.count_nonzero(y != options["ignore_index"]) if options["ignore_index"] is not None else y.size
        is_mild = (
            options["z_loss"] * abs(upstream.get("grad_output") or 1) < 0.25
        )  # else the scale may have to come last
        assert answered == [bool(kept > 0), *[bool(kept > 0 and is_mild)] * 3], (number, options)
        with through_every_check():
            assert outcome(cross_entropy, x, y, **options) == loss, (number, options)
            slow = outcome(cross_entropy_value_and_grad, x, y, **options, **upstream)
        assert both == [slow] * 3, (number, options, upstream, x.shape, y.dtype)


@each_dtype
@pytest.mark.parametrize("classes", [1, 2, 8, 9, 16, 17, 100])
def test_many_rows(answered, monkeypatch, classes, dtype):
    """Around the sizes of a group of losses: the sum has the same bits for any number of threads."""
    rng = np.random.default_rng(classes)
    for count in (GROUP - 1, GROUP, GROUP + 1, 3 * GROUP + 5):
        x, y = rng.normal(size=(count, classes)).astype(DTYPES[dtype]), rng.integers(classes, size=count)
        for reduction in ("mean", "sum"):
            with through_every_check():
                slow = outcome(cross_entropy_value_and_grad, x, y, reduction=reduction)
            for threads in ("1", "2", "5"):
                monkeypatch.setenv("XENT_ARRAY_NUM_THREADS", threads)
                resize(monkeypatch, SERIAL=100)
                assert outcome(cross_entropy_value_and_grad, x, y, reduction=reduction) == slow
    assert all(answered)


@pytest.mark.parametrize("classes", [2, 16])
@pytest.mark.parametrize("where", [0, GROUP, GROUP + 7, 3 * GROUP + 4, slice(None, None, 7), slice(None)])
def test_labels_that_are_checked_along_with_the_rows(answered, monkeypatch, classes, where):
    """In few classes: what has been computed when an ignored or a wrong label is found counts no more."""
    monkeypatch.setenv("XENT_ARRAY_NUM_THREADS", "3")
    resize(monkeypatch, SERIAL=100)
    rng = np.random.default_rng(classes)
    x, y = rng.normal(size=(3 * GROUP + 5, classes)).astype(np.float32), rng.integers(classes, size=3 * GROUP + 5)
    y[where] = -100
    for function, reduction in itertools.product((cross_entropy, cross_entropy_value_and_grad), ("mean", "none")):
        with through_every_check():
            slow = outcome(function, x, y, reduction=reduction)
        assert outcome(function, x, y, reduction=reduction) == slow
    assert all(answered) is (where != slice(None))  # all ignored: the mean is over nothing
    y[where] = classes
    with pytest.raises(IndexError, match=f"is {classes}, which is not a class"):
        cross_entropy_value_and_grad(x, y)


def test_how_often_a_loop_is_called(monkeypatch):
    """Again for an interrupt to have its chance; but not for what the last labels tell, nor after a wrong one."""
    monkeypatch.setenv("XENT_ARRAY_NUM_THREADS", "1")
    x, y = np.zeros((5 * GROUP, 2), np.float32), np.zeros(5 * GROUP, int)
    spy = Spy(monkeypatch, transposed)
    for most, calls in ((1 << 25, 1), (2 * GROUP * (2 + path.ROW), 3)):
        resize(monkeypatch, SERIAL=100, MOST=most)
        spy.calls = 0
        cross_entropy(x, y)
        assert spy.calls == calls
    resize(monkeypatch, MOST=1 << 25)
    for place, calls in ((-1, 1), (3 * GROUP, 2)):
        y[:], spy.calls = 0, 0
        y[place] = -100
        cross_entropy(x, y)
        assert spy.calls == calls
    y[3 * GROUP] = 2
    with pytest.raises(IndexError):
        cross_entropy(x, y)
    turns = spy.given[8]
    assert turns[NEXT] < len(x)
    assert turns[LIMIT] == 0


def test_the_memory_of_losses_goes_to_one_call_at_a_time(monkeypatch):
    blocks._returned.clear()
    resize(monkeypatch, SERIAL=100)
    x, y = np.zeros((5000, 3), np.float32), np.zeros(5000, int)
    cross_entropy(x, y)
    (room,) = blocks._returned
    cross_entropy(x, y)
    assert [*map(id, blocks._returned)] == [id(room)]
    assert blocks.borrow(100) is room
    assert blocks.borrow(100) is not room


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@each_wide
@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (7, 2, 48), (100, 48), (100, 256), (100, 257), (3, 1000)])
@pytest.mark.parametrize("shared", [False, True], ids=["alone", "threads"])
def test_a_label_that_is_no_class(answered, monkeypatch, shape, dtype, reduction, shared):
    """It is named, and nothing is written before it is known that all is well."""
    if shared:
        monkeypatch.setenv("XENT_ARRAY_NUM_THREADS", "3")
        resize(monkeypatch, SERIAL=100, PART=300)
    rng = np.random.default_rng(0)
    x = (5 * rng.normal(size=shape)).astype(dtype)
    labels = rng.integers(shape[-1], size=shape[:-1])
    for bad, ignored in itertools.product((shape[-1], -1), (-100, 0, None)):
        labels.reshape(-1)[-1] = bad
        options = {"reduction": reduction, "ignore_index": ignored}
        with pytest.raises(IndexError, match=f"is {bad}, which is not a class"):
            cross_entropy(x, labels, **options)
        out = x.copy()
        with pytest.raises(IndexError, match=f"is {bad}, which is not a class"):
            cross_entropy_value_and_grad(out, labels, out=out, **options)
        assert out.tobytes() == x.tobytes()
    assert not any(answered)


IGNORED = [2**63 - 1, -(2**63), 2**63, -(2**63) - 1, 2**70, -(10**30)]


@pytest.mark.parametrize(
    ("bad", "ignored"),
    [
        *((3, ignored) for ignored in IGNORED),
        *((-1, ignored) for ignored in IGNORED),
    ],
)
def test_an_ignored_label_that_is_no_integer_of_any_dtype(answered, bad, ignored):
    """No label is that."""
    x = np.random.default_rng(0).normal(size=(4, 3))
    with pytest.raises(IndexError, match=f"is {bad}, which is not a class"):
        cross_entropy(x, np.array([0, 1, 2, bad]), ignore_index=ignored)
    found = cross_entropy(x, np.array([0, 1, 2, 1]), ignore_index=ignored)
    assert answered == [False, True]
    assert found == cross_entropy(x, np.array([0, 1, 2, 1]))


@pytest.mark.parametrize("count", [3, 30_000])
@pytest.mark.parametrize(("dtype", "largest"), [("float32", 3e38), ("float64", 1e308)])
def test_large_losses(answered, count, dtype, largest):
    """Their sum is no finite number: no warning comes of it, and logits that are overwritten are not read again."""
    x, labels = np.array([[largest, 0]] * count, dtype), np.ones(count, int)
    for reduction in ("mean", "sum"):
        with through_every_check():
            slow, slow_grad = cross_entropy_value_and_grad(x, labels, reduction=reduction)
        out = x.copy()
        with np.errstate(all="raise"):
            loss, _ = cross_entropy_value_and_grad(out, labels, reduction=reduction, out=out)
        assert (loss.tobytes(), out.tobytes()) == (slow.tobytes(), slow_grad.tobytes())
    assert answered == [True] * 2


def test_what_is_filled_at_once(monkeypatch):
    """Dense memory, the logits or apart from them; any other `out` goes the way through every check."""
    general = mock.Mock(side_effect=cpu.engine.loss_and_grad)
    monkeypatch.setattr(cpu.engine, "loss_and_grad", general)
    memory, labels = np.zeros(100), np.arange(4)
    x = memory[8:40].reshape(4, 8)
    x[...] = np.random.default_rng(0).normal(size=(4, 8))
    wanted = cross_entropy_value_and_grad(x, labels)[1].copy()
    for out in (np.empty((4, 8)), memory[40:72].reshape(4, 8)):
        assert cross_entropy_value_and_grad(x, labels, out=out)[1] is out
        np.testing.assert_array_equal(out, wanted)
    read_only = [array.copy() for array in (x, labels)]
    for array in read_only:
        array.flags.writeable = False
        kept = array.copy()
        np.testing.assert_array_equal(cross_entropy_value_and_grad(*read_only)[1], wanted)
        np.testing.assert_array_equal(array, kept)
    assert not general.called
    for out in (np.empty((8, 4)).T, np.empty((4, 16))[:, ::2], np.empty((4, 8))[::-1]):
        assert cross_entropy_value_and_grad(x, labels, out=out)[1] is out
        np.testing.assert_array_equal(out, wanted)
    assert general.call_count == 3
    unwritable = np.empty((4, 8))
    unwritable.flags.writeable = False
    inside = np.zeros((4, 8))
    for target, out, error in [
        (labels, memory[:32].reshape(4, 8), ValueError), (labels, np.empty((4, 8), "f4"), TypeError),
        (labels, np.empty((8, 4)), ValueError), (labels, unwritable, ValueError), (labels, [0.0], TypeError),
        (inside.ravel()[:4].view(np.intp), inside, ValueError),
    ]:  # fmt: skip
        with pytest.raises(error):
            cross_entropy_value_and_grad(x, target, out=out)


# -- what is not ---------------------------------------------------------------------------------------------------

X, Y = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32), np.array([0, 1, 2, 3, 0, 1])


def changed(array, **flags):
    array = array.copy()
    array.setflags(**flags)
    return array


ARGUMENTS = {
    "lists": (X.tolist(), Y.tolist()),
    "a list of labels": (X, Y.tolist()),
    "a column": (X, Y[:, None]),
    "too few labels": (X, Y[:5]),
    "no rows": (X[:0], Y[:0]),
    "no classes": (X[:, :0], Y),
    "no axis": (X[0, 0], Y[0]),
    "a scalar label": (X[0], 1),
    "one row": (X[0], Y[0]),
    "bools": (X, Y > 1),
    "uint64": (X, Y.astype(np.uint64)),
    "floats for labels": (X, Y.astype(float)),
    "big-endian labels": (X, Y.astype(">i8")),
    "strided labels": (X, np.repeat(Y, 2)[::2]),
    "an object array": (X, Y.astype(object)),
    "distributions": (X, np.full(X.shape, 0.25)),
    "Fortran": (np.asfortranarray(X), Y),
    "strided": (np.repeat(X, 2, axis=1)[:, ::2], Y),
    "big-endian": (X.astype(">f4"), Y),
    "big-endian bfloat16": (X.astype(np.dtype(ml_dtypes.bfloat16).newbyteorder(">")), Y),
    "integers": (Y.reshape(3, 2), Y[:3] % 2),
    "complex": (X.astype(complex), Y),
    "long double": (X.astype(np.longdouble), Y),
    "float8": (X.astype(ml_dtypes.float8_e4m3fn), Y),
    "masked": (np.ma.array(X), Y),
    "a matrix": (X.view(np.memmap), Y),
    "all ignored": (X, np.full(6, -100)),
}  # fmt: skip


@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments_that_go_through_every_check(answered, name):
    x, y = ARGUMENTS[name]
    for function, reduction in itertools.product((cross_entropy, cross_entropy_value_and_grad), ("mean", "none")):
        found = outcome(function, x, y, reduction=reduction)
        assert not any(answered)
        with through_every_check():
            assert outcome(function, x, y, reduction=reduction) == found


NUMBERS = (
    True, False, np.float64(0.1), np.float32(0.1), np.int64(1), np.array(0.1), "0.1", -0.1, -1, np.nan, np.inf, [0.1],
)  # fmt: skip
OPTIONS = {
    "axis": (0, 1.0, True, np.int64(-1), 5, -3, None, "1"),
    "reduction": ("average", None, 1, "", ["mean"]),
    "weight": (np.ones(4), [1, 1, 1, 1], 1.0),
    "sample_weight": (np.ones(6), [1] * 6, 1.0),
    "denominator": (6, 6.0, 0),
    "validate": (False, 0, 1, "yes", np.True_),
    "ignore_index": (True, 2.0, np.int64(1), "1", [1], np.array(1)),
    "label_smoothing": (*NUMBERS, 1.5, 2, None),
    "z_loss": (*NUMBERS, 0.25, 1, 1e30, None),
    "softcap": (*NUMBERS, 0, 0.0, 1e31, 1e-31),
    "grad_output": (
        True, np.float64(0.1), np.float32(0.1), np.int64(1), np.array(0.1), "0.1", [0.1], np.nan, np.inf, 1e30, -1e30,
        1e35, 10**40, X, Y * 1.0,
    ),
    "engine": ("numpy", "generic", "gpu", 3),
    "out": (
        np.asfortranarray(X), np.zeros((6, 4)), np.zeros((4, 6), np.float32), np.zeros((6, 8), np.float32)[:, ::2],
        changed(X, write=False), np.zeros(24, np.float32), [0.0], np.ma.array(X.copy()), X.astype(">f4"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
def test_options_that_go_through_every_check(answered, name):
    """And are refused there, or answered as they always are."""
    for value, reduction in itertools.product(OPTIONS[name], ("mean", "none")):
        options = {"reduction": reduction} | {name: value}
        for function in (cross_entropy, cross_entropy_value_and_grad):
            if function is cross_entropy and name in ("out", "grad_output"):
                continue
            found = outcome(function, X[::-1].copy(), Y, **options)
            assert not any(answered), options
            with through_every_check():
                assert outcome(function, X[::-1].copy(), Y, **options) == found, options


@pytest.mark.parametrize("name", ["label_smoothing", "z_loss", "softcap", "grad_output", "denominator"])
def test_an_integer_that_no_float_can_hold(answered, name):
    with pytest.raises(ValueError, match=f"^{name} must be a number that float64 can hold"):
        cross_entropy_value_and_grad(X, Y, **{name: 10**400})
    assert not any(answered)


@pytest.mark.parametrize("what", ["logits in part", "labels", "logits under another name"])
def test_memory_shared_with_out(answered, what):
    """What would be overwritten before it is read."""

    def given():
        room = np.zeros(64, np.float32)
        room[:24] = X.ravel()
        x = room[:24].reshape(6, 4)
        if what == "logits in part":
            return x, Y, room[4:28].reshape(6, 4)
        return (X, room[32:56].view(np.int64)[:6], room[32:56].reshape(6, 4)) if what == "labels" else (x, Y, x[:])

    def call(x, y, out):
        return cross_entropy_value_and_grad(x, y, out=out)

    found = outcome(call, *given())
    assert not any(answered)
    with through_every_check():
        assert outcome(call, *given()) == found


def test_tensors_beside_arrays(answered):
    torch = pytest.importorskip("torch")
    with pytest.raises(TypeError, match=r"target must be .* of the library of logits; got torch.Tensor"):
        cross_entropy(X, torch.from_numpy(Y))
    assert not any(answered)
    recorded = cross_entropy(torch.from_numpy(X.copy()).requires_grad_(), torch.from_numpy(Y))
    assert recorded.grad_fn is not None
    with through_every_check():
        assert float(recorded.detach()) == cross_entropy(X, Y)
