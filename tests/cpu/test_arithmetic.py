"""Settings of a thread's arithmetic that another library has changed: they change no bit, and are as it left them."""

import ctypes
import itertools
import platform
import struct
import threading

import numpy as np
import pytest
from support.sizes import resize

from xent_array import cross_entropy_grad, cross_entropy_value_and_grad, log_softmax, row_stats, softmax
from xent_array._engines import cpu
from xent_array._engines.cpu import arithmetic, threads

RNG = np.random.default_rng(0)
LOGITS, LABELS = (30 * RNG.standard_normal((64, 37))), RNG.integers(37, size=64)
WORD = 28  # bytes before it in what fegetenv of glibc fills

has_word = platform.machine() == "x86_64" and platform.libc_ver()[0] == "glibc"
settings = {
    "small results": 0x8000, "small operands": 0x40, "both": 0x8040, "down": 0x2000, "up": 0x4000, "to 0": 0x6000,
}  # fmt: skip


def word():
    """The settings of this thread: those of its vector instructions, without what has happened."""
    memory = ctypes.create_string_buffer(256)
    arithmetic._functions()[0](memory)
    return struct.unpack_from("<I", memory, WORD)[0] & 0xFFC0


@pytest.fixture(params=[*settings, "torch"])
def change(request):
    """Has this thread calculate in another way, until the test ends; it returns what tells whether it still does."""
    if request.param == "torch":
        torch = pytest.importorskip("torch")
        if not torch.set_flush_denormal(False):
            pytest.skip("torch cannot set it here")
        smallest = torch.tensor([2.0**-1022], dtype=torch.float64)
        yield lambda: (torch.set_flush_denormal(True), lambda: float(smallest[0] * 0.5) == 0)[1]
        torch.set_flush_denormal(False)
        return
    if not has_word:
        pytest.skip("where the settings lie is known of x86-64 and glibc")
    get, set_, _ = arithmetic._functions()
    before = ctypes.create_string_buffer(256)
    get(before)
    other = ctypes.create_string_buffer(before.raw)
    wanted = word() & ~0xE040 | settings[request.param]
    struct.pack_into("<I", other, WORD, struct.unpack_from("<I", other, WORD)[0] & ~0xE040 | settings[request.param])
    yield lambda: (set_(other), lambda: word() == wanted)[1]
    set_(before)


@pytest.fixture
def changed(change):
    return change()


@pytest.fixture(params=["compiled", "numpy"])
def engine(request):
    if request.param == "compiled" and isinstance(cpu.found_loops(), str):
        pytest.skip(cpu.found_loops())
    return "cpu" if request.param == "compiled" else "numpy"


def given(dtype):
    """Logits, distributions and weights, with numbers below the smallest normal one where these may come out."""
    little = float(np.finfo(dtype).smallest_normal) * 8
    logits = (LOGITS * (1 if dtype == "float32" else 8)).astype(dtype)
    return logits, RNG.random(logits.shape).astype(dtype), np.full(len(logits), little, dtype), little


def results(given, engine):
    """Of all that an engine does, also at once."""
    logits, target, weights, little = given
    found = []
    for name in (None, engine) if engine == "cpu" else (engine,):
        for factor, reduction in itertools.product((1.0, little), ("mean", "sum")):
            found += cross_entropy_value_and_grad(logits, LABELS, grad_output=factor, reduction=reduction, engine=name)
    options = {"engine": engine, "z_loss": 0.1, "sample_weight": weights}
    found += cross_entropy_value_and_grad(logits, LABELS, softcap=5.0, label_smoothing=0.1, **options)
    found += cross_entropy_value_and_grad(logits, target, **options)
    stats = row_stats(logits, LABELS, **options)
    found += [*stats, cross_entropy_grad(logits, LABELS, stats=stats, **options)]
    return found + ([softmax(logits), log_softmax(logits)] if engine == "cpu" else [])


def bits(found):
    return [np.asarray(array).tobytes() for array in found]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shared", [False, True], ids=["alone", "threads"])
def test_no_bit_depends_on_it(change, monkeypatch, engine, dtype, shared):
    if shared:
        resize(monkeypatch, BLOCK=8 * 37, SERIAL=4 * 37, PART=4 * 37)
        monkeypatch.setattr(threads, "_pool", threads.Pool())
    arrays = given(dtype)
    wanted = results(arrays, engine)
    assert sum(np.any((abs(array) < np.finfo(dtype).smallest_normal) & (array != 0)) for array in wanted) >= 4
    wanted = bits(wanted)
    is_still = change()
    monkeypatch.setattr(threads, "_pool", threads.Pool())  # new threads begin with the settings of who starts them
    for count in ("1", "3"):
        monkeypatch.setenv("XENT_ARRAY_NUM_THREADS", count)
        assert is_still()
        found = results(arrays, engine)
        assert is_still()
        assert bits(found) == wanted


@pytest.mark.skipif(isinstance(cpu.found_loops(), str), reason="llvmlite is not installed")
@pytest.mark.parametrize("count", [10, 100])
def test_labels_are_not_checked_for_a_thread_by_another(changed, monkeypatch, count):
    """At once, whoever takes the parts: the loops are to run in this thread too."""
    compiled = cpu.found_loops()
    monkeypatch.setattr(compiled, "LABELS", 50)
    monkeypatch.setattr(threads, "parallel", lambda work, parts, team: threads.whole(lambda: work(iter([*parts]))))
    labels = np.zeros(count, np.intp)
    assert compiled._count_kept(labels, 3, -1, False) == -1
    with arithmetic.usual():
        assert compiled._count_kept(labels, 3, -1, False) == count
    assert changed()


def test_what_is_prepared_for_a_call_is_not_what_it_makes_of_it(change):
    """Numbers that are kept for the next call of this kind are computed as usual."""
    x, labels = LOGITS[:8, :5].astype(np.float32), LABELS[:8] % 5
    for smoothing in (0.1, 0.3):
        options = {"reduction": "sum", "label_smoothing": smoothing}
        if smoothing == 0.1:
            is_still = change()
        before = [*map(bytes, cross_entropy_value_and_grad(x, labels, **options))]
        with arithmetic.usual():
            assert [*map(bytes, cross_entropy_value_and_grad(x, labels, **options))] == before
            compiled = cpu.found_loops()
            if not isinstance(compiled, str):
                compiled._prepared.cache_clear()
                compiled._prepared_for_any.cache_clear()
            assert [*map(bytes, cross_entropy_value_and_grad(x, labels, **options))] == before
    assert is_still()


def test_what_is_made_once_is_made_as_usual(changed):
    """Such as machine code, which is kept."""
    assert not arithmetic.is_usual()
    assert threads.whole(arithmetic.is_usual)
    assert not arithmetic.is_usual()
    with arithmetic.usual():
        assert arithmetic.is_usual()
    assert changed()


def test_it_is_set_back_after_an_error(changed):
    def fails():
        assert arithmetic.is_usual()
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        arithmetic.in_usual(fails)()
    assert changed()


def test_where_it_cannot_be_set(monkeypatch):
    """The call is answered all the same."""
    monkeypatch.setattr(arithmetic, "is_usual", lambda: False)
    monkeypatch.setattr(arithmetic, "_functions", lambda: None)
    assert len(results(given("float32"), "cpu")) > 10


def test_other_threads_are_left_alone(changed):
    """What one thread sets is its own."""
    seen = []
    inside, go_on = threading.Event(), threading.Event()

    def other():
        with arithmetic.usual():
            inside.set()
            go_on.wait(10)
            seen.append(arithmetic.is_usual())

    thread = threading.Thread(target=other)
    thread.start()
    inside.wait(10)
    assert changed()
    go_on.set()
    thread.join()
    assert seen == [True]
