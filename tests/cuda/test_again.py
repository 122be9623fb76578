"""Calls that are kept: the second of a kind gives what the first gives, and is refused what the first is refused."""

import gc
import itertools
import os
import random
import shutil
import threading
import weakref

import numpy as np
import pytest
from support import emulated, hosted

from xent_array import (
    _again,
    _api,
    _engines,
    cross_entropy,
    cross_entropy_grad,
    cross_entropy_value_and_grad,
    log_softmax,
    row_stats,
    softmax,
)
from xent_array._engines import cuda

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="the emulation needs g++")


def all_three(x, y, **options):
    loss, grad, stats = cross_entropy_value_and_grad(x, y, return_stats=True, **options)
    return loss, grad, *stats


def stats_then_grad(x, y, **options):
    """As under automatic differentiation: what is saved of the forward pass goes to the backward pass."""
    forward = {k: v for k, v in options.items() if k not in ("reduction", "denominator", "grad_output", "out")}
    stats = row_stats(x, y, **forward)
    return *stats, cross_entropy_grad(x, y, stats=stats, **options)


def both_softmax(x, y, **options):
    return softmax(x, axis=options.get("axis", -1)), log_softmax(x, axis=options.get("axis", -1))


FUNCTIONS = {
    f.__name__: f
    for f in (cross_entropy, cross_entropy_value_and_grad, cross_entropy_grad, all_three, stats_then_grad, both_softmax)
}


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch):
    monkeypatch.setattr(_again, "_kept", {})


@pytest.fixture
def only_kept(monkeypatch):
    """Says that from now on no call may go the whole way."""

    def now():
        for name in ("problem_of", "problem_without_target"):
            monkeypatch.setattr(_api, name, lambda *a, **k: pytest.fail("the call went the whole way"))

    return now


def outcome(function, *arguments, **options):
    """What a call gives, to the last bit, or how it is refused."""
    try:
        found = function(*arguments, **options)
    except Exception as error:
        return type(error), str(error)
    parts = found if isinstance(found, tuple) else (found,)
    return [part is not None and (type(part), part.dtype, part.shape, part.tobytes()) for part in parts]


def has_grad(name):
    return name not in ("cross_entropy", "both_softmax")


def problem(seed, rows=40, classes=7, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((rows, classes)) * 3).astype(dtype), rng.integers(-1, classes, size=rows)


def weights(seed, rows=40, classes=7):
    rng = np.random.default_rng(seed + 100)
    return rng.random(classes, dtype=np.float32), rng.random(rows, dtype=np.float32)


OPTIONS = [
    {},
    {"label_smoothing": 0.1, "z_loss": 1e-3, "softcap": 9.0},
    {"weight": 0, "sample_weight": 1},  # which of `weights`
]
OPTIONS = [{"reduction": reduction, **options} for reduction in ("none", "sum", "mean") for options in OPTIONS]
OPTIONS.append({"reduction": "mean", "denominator": 11.0})


@pytest.mark.full(but_one_per="name")
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_kept_call_gives_what_the_whole_way_gives(name, options, only_kept, monkeypatch):
    """On other numbers, each time; with `out`, in place and without; with an upstream gradient."""
    engine, function, reduction = emulated.engine(), FUNCTIONS[name], options["reduction"]
    outs = ("new", "out", "in place") if has_grad(name) else ("new",)
    upstreams = (None,) if not has_grad(name) else (None, 3.0, np.float32) if reduction == "none" else (None, 3.0)
    if name == "both_softmax":
        for each in list(_engines.ENGINES):
            monkeypatch.delitem(_engines.ENGINES, each)
        monkeypatch.setitem(_engines.ENGINES, "cuda", engine)

    def call(seed, into, upstream, engine):
        x, y = problem(seed)
        given = {"ignore_index": -1, "engine": engine, **options}
        given |= {key: weights(seed)[options[key]] for key in ("weight", "sample_weight") if key in options}
        if into != "new":
            given["out"] = x if into == "in place" else np.empty_like(x)
        if upstream is not None:
            per_row = np.random.default_rng(seed + 7).random(40, dtype=np.float32)
            given["grad_output"] = per_row if upstream is np.float32 else upstream
        found = outcome(function, x, y, **given)
        if into != "new":
            again = function(x, y, **given)
            again = again if isinstance(again, tuple) else (again,)
            assert any(part is given["out"] for part in again)
        return found

    cases = list(itertools.product(range(3), outs, upstreams))
    wanted = {}
    for case in cases:
        _again._kept.clear()
        wanted[case] = call(*case, emulated.engine())
        assert isinstance(wanted[case], list), wanted[case]
    for into, upstream in itertools.product(outs, upstreams):
        for seed in (0, 1):  # the kind of array is met, then noted
            assert call(seed, into, upstream, engine) == wanted[seed, into, upstream]
    only_kept()
    for case in cases:
        assert call(*case, engine) == wanted[case]


def variations(engine):
    """Calls that differ from the first in one thing, which may be all that a key must tell."""
    x, y = problem(0)
    wide, odd = np.zeros((40, 9), np.float32), np.zeros(281, np.float32)
    wide[:, :7], odd[1:] = x, x.ravel()
    base = {"engine": engine, "ignore_index": -1, "validate": False}
    w, s = weights(0)
    readonly = np.empty_like(x)
    readonly.flags.writeable = False
    shared = np.empty((41, 7), np.float32)
    shared[:40] = x
    both = np.full(287, 0.5, np.float32)
    calls = {
        "first": (x, y, {}),
        "target of int32": (x, y.astype(np.int32), {}),
        "target of uint8": (x, y.astype(np.uint8), {}),
        "target of uint64": (x, y.astype(np.uint64), {"ignore_index": (1 << 64) - 1}),
        "a distribution": (x, np.eye(7)[y].astype(np.float32), {"ignore_index": -100}),
        "one-hot of booleans": (x, np.eye(7)[y] > 0, {"ignore_index": -100}),
        "float64": (x.astype(np.float64), y, {}),
        "float16": (x.astype(np.float16), y, {}),
        "other rows": (x[:30], y[:30], {}),
        "other classes": (x[:, :6], y, {}),
        "room between rows": (wide[:, :7], y, {}),
        "backwards": (x[::-1], y[::-1], {}),
        "every other class": (wide[:, ::2], np.minimum(y, 4), {}),
        "Fortran order": (np.asfortranarray(x), y, {}),
        "off 16 bytes": (odd[1:].reshape(40, 7), y, {}),
        "off 16 bytes, labels too": (odd[1:].reshape(40, 7), np.r_[0, y][1:], {}),
        "a list": (x.tolist(), y, {}),
        "a list of labels": (x, y.tolist(), {}),
        "labels of floats": (x, y.astype(float), {}),
        "labels of another length": (x, y[:-1], {}),
        "bad labels": (x, y + 100, {}),
        "bad labels, checked": (x, y + 100, {"validate": True}),
        "labels checked": (x, y, {"validate": True}),
        "validate 1": (x, y + 100, {"validate": 1}),
        "validate 0": (x, y + 100, {"validate": 0}),
        "weights": (x, y, {"weight": w}),
        "weights of float64": (x, y, {"weight": w.astype(float)}),
        "the same weights twice": (x[:7], y[:7], {"weight": w, "sample_weight": w}),
        "two weights": (x[:7], y[:7], {"weight": w, "sample_weight": s[:7]}),
        "sample weights": (x, y, {"sample_weight": s}),
        "a mask": (x, y, {"sample_weight": s > 0.5}),
        "every other sample weight": (x, y, {"sample_weight": np.r_[s, s][::2]}),
        "negative infinity": (np.where(x > 3, -np.inf, x), y, {}),
        "axis 0": (x, np.zeros(7, int), {"axis": 0}),
        "axis 1": (x, y, {"axis": 1}),
        "axis 1.0": (x, y, {"axis": 1.0}),
        "axis True": (x, y, {"axis": True}),
        "axis 2": (x, y, {"axis": 2}),
        **{f"reduction {r}": (x, y, {"reduction": r}) for r in ("none", "sum", "mean", "max", None, 1)},
        **{f"ignore_index {i!r}": (x, y, {"ignore_index": i}) for i in (0, 1, True, 1.0, None, np.int64(1), 1 << 70)},
        **{f"label_smoothing {e!r}": (x, y, {"label_smoothing": e}) for e in (0, 1, 1.0, True, 0.1, np.float32(0.1))},
        **{f"z_loss {z!r}": (x, y, {"z_loss": z}) for z in (0, 1, 1.0, True, float("nan"), np.array(1.0))},
        **{f"softcap {c!r}": (x, y, {"softcap": c}) for c in (1, 1.0, True, 0.0, "1", [1.0])},
        **{f"denominator {d!r}": (x, y, {"denominator": d}) for d in (1, 1.0, 2.0, True, 0.0, -0.0, np.array(2.0))},
        **{f"grad_output {g!r}": (x, y, {"grad_output": g}) for g in (1, 2.0, True, 0.0, -0.0, float("inf"), "2")},
        "grad_output (), rows": (x, y, {"grad_output": np.float32(2), "reduction": "none"}),
        "grad_output per row": (x, y, {"grad_output": s, "reduction": "none"}),
        "grad_output per row, mean": (x, y, {"grad_output": s}),
        "out": (x, y, {"out": np.empty_like(x)}),
        "out of float64": (x, y, {"out": np.empty((40, 7))}),
        "out of another shape": (x, y, {"out": np.empty((40, 8), np.float32)}),
        "out read-only": (x, y, {"out": readonly}),
        "out in Fortran order": (x, y, {"out": np.empty_like(x, order="F")}),
        "out every other class": (x, y, {"out": np.empty((40, 14), np.float32)[:, ::2]}),
        "out in place": (shared[:40], y, {"out": shared[:40]}),
        "out in part": (shared[:40], y, {"out": shared[1:]}),
        "out beside the weights": (x, y, {"out": both[:280].reshape(40, 7), "weight": both[280:]}),
        "out over the weights, in part": (x, y, {"out": both[1:281].reshape(40, 7), "weight": both[280:]}),
    }  # fmt: skip
    return {name: (x, y, base | options) for name, (x, y, options) in calls.items()}


def tried(name, function, engine):
    x, y, options = variations(engine)[name]
    if "out" in options:
        if not has_grad(function.__name__):
            del options["out"]
        else:
            room = options["out"]
            room = room if room.base is None else room.base
            if room.flags.writeable and name != "out in place" and name != "out in part":
                room[...] = 0.5
    if not has_grad(function.__name__):
        options.pop("grad_output", None)
    return outcome(function, x, y, **options)


@pytest.mark.parametrize(
    "name",
    [name if "value_and_grad" in name else pytest.param(name, marks=pytest.mark.full) for name in FUNCTIONS],
)
def test_what_is_kept_answers_for_nothing_else(name, monkeypatch):
    """Every variation first with nothing kept; then all of them, in any order and several times, with everything."""
    function, names, engine = FUNCTIONS[name], list(variations(None)), emulated.engine()
    if name == "both_softmax":
        for each in list(_engines.ENGINES):
            monkeypatch.delitem(_engines.ENGINES, each)
        monkeypatch.setitem(_engines.ENGINES, "cuda", engine)
    wanted = {}
    for each in names:
        _again._kept.clear()
        wanted[each] = tried(each, function, emulated.engine())
    refused = sum(isinstance(found, tuple) for found in wanted.values())
    assert (1 if name == "both_softmax" else 15) < refused < len(names) - 40  # both kinds are many
    order = random.Random(0)
    for _ in range(4):
        order.shuffle(names)
        for each in names:
            assert tried(each, function, engine) == wanted[each], each
    assert len(_again._kept) > (10 if name == "both_softmax" else 25)


def test_what_a_kept_call_looks_at_anew(only_kept):
    """Where `out` lies, which no key tells."""
    engine = emulated.engine()
    memory = np.empty((200, 7), np.float32)
    _, y = problem(0)
    for at in (40, 44, 80):
        cross_entropy_value_and_grad(memory[:40], y, out=memory[at : at + 40], engine=engine, validate=False)
    assert len(_again._kept) == 1
    for at in (4, 36):
        with pytest.raises(ValueError, match="out shares memory with logits"):
            cross_entropy_value_and_grad(memory[:40], y, out=memory[at : at + 40], engine=engine, validate=False)
        with pytest.raises(ValueError, match="out shares memory with logits"):
            cross_entropy_value_and_grad(memory[at : at + 40], y, out=memory[:40], engine=engine, validate=False)
    labels = memory.ravel()[-80:].view(np.int64)
    labels[...] = y
    with pytest.raises(ValueError, match="out shares memory with target"):
        cross_entropy_value_and_grad(memory[:40], labels, out=memory[-40:], engine=engine, validate=False)
    only_kept()
    cross_entropy_value_and_grad(memory[:40], labels, out=memory[100:140], engine=engine, validate=False)


def copies_logits(x):
    return np.empty((40, 140), np.float32)[:, ::2], {}


def makes_the_gradient_apart(x):
    return np.empty((40, 70), np.float32), {"out": np.empty((40, 140), np.float32)[:, ::2]}


def converts_weights(x):
    return x, {"weight": np.ones(7)}


def reads_a_number(x):
    return x, {"grad_output": np.array(3.0)}


@pytest.mark.parametrize("case", [copies_logits, makes_the_gradient_apart, converts_weights, reads_a_number])
def test_a_call_that_does_more_than_launch_is_not_kept(case):
    x, y = problem(0)
    x, options = case(x)
    x[...] = 1
    for _ in range(3):
        cross_entropy_value_and_grad(x, y, engine=emulated.engine(), validate=False, **options)
    assert not _again._kept


def test_a_gradient_that_was_copied_into_place_is_not_kept(monkeypatch):
    """Though the logits, which are read, lie where it goes."""
    layouts = itertools.cycle(["flat", None, "flat"])  # of the logits, of `out`, of what is made instead
    monkeypatch.setattr(cuda, "_layout", lambda array: next(layouts))
    engine = emulated.engine()
    for _ in range(3):
        x, y = problem(0)
        wanted = cross_entropy_grad(x, y, engine="generic", ignore_index=-1)
        cross_entropy_grad(x, y, out=x, engine=engine, ignore_index=-1)
        np.testing.assert_allclose(x, wanted, rtol=1e-5)
    assert engine.launcher.copies == 3
    assert not _again._kept


def test_few_calls_are_kept(monkeypatch):
    monkeypatch.setattr(_again, "MOST", 5)
    engine = emulated.engine()
    for rows in range(1, 20):
        x, y = problem(rows, rows)
        assert outcome(cross_entropy, x, y, engine=engine, validate=False) == outcome(
            cross_entropy, x, y, engine=emulated.engine(), validate=False
        )
    assert len(_again._kept) == 5


def test_what_is_kept_holds_no_array_of_the_caller():
    class Array(np.ndarray):
        pass

    engine, alive = emulated.engine(), []
    for seed in range(3):
        x, y = problem(seed)
        out = np.empty_like(x)
        cross_entropy_value_and_grad(x, y, out=out, engine=engine, validate=False)
        alive += map(weakref.ref, (x, y, out))
    del x, y, out
    gc.collect()
    assert len(_again._kept) == 1
    assert not any(reference() is not None for reference in alive)


def test_a_launch_has_words_of_its_own():
    """Another thread may make the same call while this one's launch is under way."""
    engine, inside, seen = emulated.engine(), [], []
    x, y = problem(0)
    for _ in range(2):
        cross_entropy(x, y, engine=engine, reduction="none", validate=False)
    ((key, kept),) = _again._kept.items()
    ((_, words, slots),) = kept.launches

    def slow(words, slots, arrays):
        before = words.tobytes()
        if not inside:
            inside.append(True)
            thread = threading.Thread(target=cross_entropy, args=problem(1), kwargs=how)
            thread.start()
            thread.join()
        assert words.tobytes() == before
        seen.append(before)

    how = {"engine": engine, "reduction": "none", "validate": False}
    _again._kept[key] = kept._replace(launches=((slow, words, slots),))
    cross_entropy(x, y, **how)
    assert len(set(seen)) == 2


def test_an_engine_that_took_the_name_of_another_is_asked(monkeypatch):
    for name in list(_engines.ENGINES):
        monkeypatch.delitem(_engines.ENGINES, name)
    x, y = problem(0)
    for _ in range(2):
        engine = emulated.engine()
        monkeypatch.setitem(_engines.ENGINES, "cuda", engine)
        for _ in range(3):
            cross_entropy(x, y, reduction="none", softcap=5.0, validate=False)
        assert len(engine.launcher.launches) == 3
    assert len(_again._kept) == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*fork:RuntimeWarning")  # of JAX, where another test has imported it
def test_after_a_fork():
    engine = emulated.engine()
    x, y = problem(0)
    for _ in range(3):
        wanted = outcome(cross_entropy, x, y, engine=engine, validate=False)
    child = os.fork()
    if child == 0:
        same = outcome(cross_entropy, x, y, engine=engine, validate=False) == wanted
        other, _ = problem(0, 39)
        for _ in range(3):
            cross_entropy(other, y[:39], engine=engine, validate=False)
        os._exit(0 if same and len(_again._kept) == 2 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_kinds_of_arrays_are_those_that_the_engine_was_asked_about(monkeypatch):
    """So that a call on NumPy arrays asks for nothing that is kept."""
    monkeypatch.setattr(_again, "KINDS", {})
    monkeypatch.setattr(cuda, "KINDS", _again.KINDS)
    monkeypatch.setattr(_again, "ask", lambda *a: pytest.fail("asked"))
    x, y = problem(0)
    y = np.maximum(y, 0)
    cross_entropy(x, y, softcap=5.0)
    cross_entropy_value_and_grad(x, y, softcap=5.0)
    cross_entropy_grad(x, y, softcap=5.0)
    assert not _again.KINDS


# CuPy's own arrays, its way of taking an argument by value, and no GPU


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_arrays_of_cupy(monkeypatch, reduction):
    pytest.importorskip("cupy")
    engine, emulator = cuda.Cuda(hosted.Hosted()), emulated.engine()

    def call(seed):
        x, y = problem(seed, 300, 70)
        options = {"reduction": reduction, "ignore_index": -1, "label_smoothing": 0.1, "validate": False}
        wanted = cross_entropy_value_and_grad(x, y, engine=emulator, **options)
        x, y = hosted.to_cupy(x), hosted.to_cupy(y)
        for out in (None, hosted.to_cupy(np.zeros((300, 70), np.float32)), x):
            before = hosted.Emulated.launches
            loss, grad = cross_entropy_value_and_grad(x, y, out=out, engine=engine, **options)
            assert hosted.Emulated.launches - before == (1 if reduction == "none" else 3)
            assert out is None or grad is out
            assert type(loss) is type(grad) is type(x)
            assert hosted.to_numpy(loss).tobytes() == wanted[0].tobytes()
            assert hosted.to_numpy(grad).tobytes() == wanted[1].tobytes()

    with hosted.cupy_on_host():
        call(0)
        call(1)
        real = _api.problem_of
        monkeypatch.setattr(
            _api,
            "problem_of",
            lambda x, *a, **k: real(x, *a, **k) if type(x) is np.ndarray else pytest.fail("the whole way"),
        )
        call(2)
