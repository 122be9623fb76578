"""What must not matter on the cpu engine, and what it may cost, with compiled loops and without.

The batch around a row, its place, threads, forks.
"""

import itertools
import os
import sys
import threading
import time
import tracemalloc
import warnings
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import numpy as np
import pytest
from support.close import assert_confident, assert_grad, assert_loss
from support.oracle import oracle
from support.process import run
from support.sizes import resize

from xent_array import cross_entropy, cross_entropy_grad, cross_entropy_value_and_grad, log_softmax, row_stats
from xent_array._engines import ENGINES, cpu
from xent_array._engines.cpu import path, threads

C = 37
ROWS = 240
RNG = np.random.default_rng(0)
LOGITS = (4 * RNG.normal(size=(ROWS, C))).astype(np.float32)
LOGITS[::7] = np.round(LOGITS[::7])  # ties
LOGITS[1::7, 5] += 40  # confident
LOGITS[2::7, ::3] = -np.inf
LABELS = np.where(LOGITS[np.arange(ROWS), (k := RNG.integers(0, C, ROWS))] > -np.inf, k, 1)
SOFT = RNG.random((ROWS, C)).astype(np.float32)
WEIGHT = RNG.random(C).astype(np.float32)
SAMPLE_WEIGHT = RNG.random(ROWS).astype(np.float32)
UPSTREAM = RNG.normal(size=ROWS).astype(np.float32)

EVERYTHING = {"weight": WEIGHT, "label_smoothing": 0.1, "z_loss": 0.01, "softcap": 20.0}
each_target = pytest.mark.parametrize("target", [LABELS, SOFT], ids=["index", "distribution"])
each_option = pytest.mark.parametrize(
    "options",
    [{}, *({k: v} for k, v in EVERYTHING.items()), EVERYTHING],
    ids=lambda options: "-".join(options) or "plain",
)
each_dtype = pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])


@pytest.fixture(params=["compiled", "numpy"])
def body(request, monkeypatch):
    """Each body of the cpu engine takes NumPy arrays in turn."""
    if request.param == "numpy":
        monkeypatch.setitem(ENGINES, "cpu", cpu.numpy_engine)
    elif isinstance(cpu.found_loops(), str):
        pytest.skip(cpu.found_loops())


@pytest.fixture
def small_blocks(monkeypatch):
    """Every call is cut into many blocks and shared out to threads."""
    resize(monkeypatch, BLOCK=8 * C, SERIAL=4 * C, PART=4 * C)


def rows_of(logits, target, picked=slice(None), *, validate=None, **options):
    """Loss and gradient of some rows, one by one, as bytes that can be compared; weighed, where any option is on."""
    if options:
        options |= {"sample_weight": SAMPLE_WEIGHT[picked], "grad_output": UPSTREAM[picked]}
    loss, grad = cross_entropy_value_and_grad(
        logits[picked], target[picked], reduction="none", engine="cpu", validate=validate, **options
    )
    return each_row(loss, grad)


def each_row(losses, grads):
    return [loss.tobytes() + grad.tobytes() for loss, grad in zip(losses, grads, strict=True)]


# -- a row is a row ----------------------------------------------------------------------------------------------


@pytest.mark.full(but_one_per="dtype")
@each_dtype
@each_option
@each_target
@pytest.mark.parametrize("blocks", ["one block", "small blocks"])
def test_alone_and_in_any_batch(request, body, target, options, dtype, blocks):
    logits = LOGITS.astype(dtype)
    alone = [rows_of(logits, target, [k], **options)[0] for k in range(ROWS)]
    if blocks == "small blocks":
        request.getfixturevalue("small_blocks")
    assert rows_of(logits, target, **options) == alone
    rng = np.random.default_rng(1)
    for size in (2, 3, 100, ROWS):
        picked = rng.permutation(ROWS)[:size]
        assert rows_of(logits, target, picked, **options) == [alone[k] for k in picked]


@each_option
@each_target
def test_beside_rows_that_are_broken_or_ignored(body, target, options):
    before = rows_of(LOGITS, target, **options)
    logits = LOGITS.copy()
    logits[10, 3], logits[20, 4], logits[30] = np.nan, np.inf, -np.inf
    after = rows_of(logits, target, **options)
    assert [k for k in range(ROWS) if after[k] != before[k]] == [10, 20, 30]
    for k in (10, 20, 30) if "softcap" not in options else ():  # which makes infinite logits finite
        assert np.isnan(np.frombuffer(after[k], np.float32)).all()
    if target.ndim == 1:
        target = target.copy()
        target[40], target[50] = -100, -1
        after = rows_of(logits, target, validate=False, **options)
        assert [k for k in range(ROWS) if after[k] != before[k]] == [10, 20, 30, 40, 50]


@each_option
@each_target
@pytest.mark.parametrize("axis", [1, 2])
def test_class_axis_in_the_middle(small_blocks, body, target, options, axis):
    """(outer, C, inner), in parts along either of the two: the rows are those of the last axis, bit for bit."""
    wanted = rows_of(LOGITS, target, **options)
    for outer in (1, 3, 24, 80, ROWS):
        shape = (outer, ROWS // outer)

        def moved(x, shape=shape):
            return np.ascontiguousarray(np.moveaxis(x.reshape(*shape, C), 2, axis))

        t = target.reshape(shape) if target.ndim == 1 else moved(target)
        given = {"axis": axis, "reduction": "none", **options}
        if options:
            given |= {"sample_weight": SAMPLE_WEIGHT.reshape(shape), "grad_output": UPSTREAM.reshape(shape)}
        loss, grad = cross_entropy_value_and_grad(moved(LOGITS), t, **given)
        assert each_row(loss.reshape(-1), np.moveaxis(grad, axis, 2).reshape(LOGITS.shape)) == wanted


@each_option
@each_target
def test_number_of_threads(small_blocks, body, monkeypatch, target, options):
    results = {}
    for count in ("1", "2", "3", "8"):
        monkeypatch.setenv("XENT_ARRAY_NUM_THREADS", count)
        for reduction in ("mean", "sum"):
            loss, grad = cross_entropy_value_and_grad(LOGITS, target, reduction=reduction, **options)
            results.setdefault(reduction, set()).add(loss.tobytes() + grad.tobytes())
        results.setdefault("none", set()).add(b"".join(rows_of(LOGITS, target, **options)))
    assert {reduction: len(different) for reduction, different in results.items()} == dict.fromkeys(results, 1)


@each_target
def test_eight_threads_at_once(request, small_blocks, body, monkeypatch, target):
    monkeypatch.setenv("XENT_ARRAY_NUM_THREADS", "3")

    def answer(_=None):
        plain = cross_entropy_value_and_grad(LOGITS, target, reduction="none")
        return rows_of(LOGITS, target, **EVERYTHING), each_row(*plain)

    wanted = answer()
    switching = sys.getswitchinterval()
    request.addfinalizer(lambda: sys.setswitchinterval(switching))
    sys.setswitchinterval(1e-6)  # threads meet inside of everything
    with ThreadPoolExecutor(8) as callers:
        for result in callers.map(answer, range(80)):
            assert result == wanted


FORK = """
import os, signal, sys, threading, warnings
import numpy as np
from xent_array import cross_entropy_value_and_grad
from xent_array._engines.cpu import threads

x = np.random.default_rng(0).normal(size=(420, 1000)).astype("f4")  # a few blocks: forks often meet a held lock
labels = np.arange(420)

def answer():
    answers = (cross_entropy_value_and_grad(x, labels, z_loss=z) for z in (0.0, 0.1))
    return [loss.tobytes() + grad.tobytes() for loss, grad in answers]

wanted = answer()
assert len(threads._pool.workers) == 2
sys.setswitchinterval(1e-6)
stop = threading.Event()
def keep_the_pool_busy():
    while not stop.is_set():
        answer()
busy = threading.Thread(target=keep_the_pool_busy)
busy.start()
warnings.simplefilter("ignore", DeprecationWarning)  # of Python, against forking with threads: it is what is tested
children = []
for _ in range(30):
    child = os.fork()
    if child == 0:
        signal.alarm(30)  # ends a child that hangs
        right = answer() == wanted and answer() == wanted
        os._exit(0 if right and threading.active_count() == 3 else 1)  # with threads of its own
    children.append(child)
codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
stop.set()
busy.join()
assert answer() == wanted
print(codes)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_forked_children():
    assert run(FORK, XENT_ARRAY_NUM_THREADS="3").strip() == str([0] * 30)


ENDING = """
import atexit, sys
import numpy as np
from xent_array import cross_entropy

x, labels = np.zeros((5000, 100), "f4"), np.zeros(5000, int)
cross_entropy(x[:9], labels[:9], engine="cpu")  # needs no thread

class Last:
    call = cross_entropy, x, labels, print  # names that the module may have lost by then

    def __del__(self):
        f, x, labels, show = self.call
        show(f(x, labels).round(3))

if "exit" in sys.argv:
    atexit.register(lambda: print(cross_entropy(x, labels).round(3)))
last = Last()
if "before" in sys.argv:
    print(cross_entropy(x, labels).round(3))
"""


@pytest.mark.full
@pytest.mark.parametrize("calls", [["before"], ["exit"], []], ids=["before", "exit", "too late for threads"])
def test_while_the_interpreter_ends(calls):
    """The threads keep no interpreter from ending, and a call that comes late is answered."""
    assert run(ENDING, *calls, XENT_ARRAY_NUM_THREADS="3").split() == ["4.605"] * (1 + len(calls))


@pytest.mark.parametrize("options", [{}, {"z_loss": 0.1}], ids=["at once", "any"])
def test_fewer_threads_than_asked_for(small_blocks, body, monkeypatch, options):
    """None can be started, or all are at work for others: the caller does without, and nothing is left to wait for."""
    wanted = cross_entropy(LOGITS, LABELS, **options)
    monkeypatch.setenv("XENT_ARRAY_NUM_THREADS", "3")
    pool = threads.Pool()
    monkeypatch.setattr(threads, "_pool", pool)
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", mock.Mock(side_effect=RuntimeError("can't start new thread")))
        assert cross_entropy(LOGITS, LABELS, **options) == wanted
    assert pool.workers == []
    busy, go_on = threading.Barrier(3), threading.Event()
    pool.send(lambda: (busy.wait(), go_on.wait()), 2)
    busy.wait(10)
    try:
        assert cross_entropy(LOGITS, LABELS, **options) == wanted
        assert [worker.calls.qsize() for worker in pool.workers] == [1, 1]  # called too late, when all is done
    finally:
        go_on.set()


# -- long rows ---------------------------------------------------------------------------------------------------


@pytest.mark.full(but_one_per="dtype")
@each_dtype
@each_option
@each_target
@pytest.mark.parametrize("tile", [1, 2, 7, 36])
def test_rows_in_tiles(small_blocks, monkeypatch, target, options, dtype, tile):
    resize(monkeypatch, TILE=tile)
    logits = LOGITS[:28].astype(dtype)
    target, given = target[:28], {"sample_weight": SAMPLE_WEIGHT[:28], **options}
    truth = oracle(logits, target, **given)
    stats = row_stats(logits, target, **given)
    loss, grad = cross_entropy_value_and_grad(logits, target, **given)
    assert_loss(loss, truth)
    assert_grad(grad, truth)
    assert_grad(cross_entropy_grad(logits, target, stats=stats, **given), truth)
    assert_loss(cross_entropy(logits, target, **given), truth)
    finite = oracle(logits, LABELS[:28], reduction="none").rows
    taken = -np.take_along_axis(log_softmax(logits), LABELS[:28, None], axis=1)[:, 0]
    np.testing.assert_allclose(
        taken.astype(float), finite.astype(float), rtol=4e-3 if dtype == "float16" else 1e-5, atol=1e-6
    )


def test_row_longer_than_a_tile(body):
    rng = np.random.default_rng(0)
    classes = 2 * path.TILE + 12_345
    x = (3 * rng.normal(size=(2, classes))).astype(np.float32)
    x[0, -1] = x[1, path.TILE] = 20
    labels = np.array([classes - 1, 3])
    options = {"label_smoothing": 0.1, "z_loss": 0.01}
    truth = oracle(x, labels, **options)
    loss, grad = cross_entropy_value_and_grad(x, labels, **options)
    assert_loss(loss, truth)
    assert_grad(grad, truth)
    assert_grad(cross_entropy_grad(x, labels, stats=row_stats(x, labels, **options), **options), truth)


# -- accuracy ----------------------------------------------------------------------------------------------------


@pytest.mark.full(but_one_per="backend")
@pytest.mark.parametrize("logits", [[17, 0], [80, 0, 0], [5, -12, 4]])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_confident_rows(backend, logits, reduction):
    logits = np.array([logits, logits])
    for dtype, engine in itertools.product(backend.dtypes, backend.engines):
        x, labels = backend.array(logits, dtype), backend.array([0, 0])
        truth = oracle(backend.numpy(x), [0, 0], reduction=reduction)
        loss, grad = cross_entropy_value_and_grad(x, labels, reduction=reduction, engine=engine)
        assert_confident(backend.numpy(loss), backend.numpy(grad), truth, exact=True)
        alone = cross_entropy_grad(
            x, labels, reduction=reduction, engine=engine, stats=row_stats(x, labels, engine=engine)
        )
        assert_confident(backend.numpy(loss), backend.numpy(alone), truth, exact=True)


def test_random_confident_rows(backend):
    rng = np.random.default_rng(0)
    logits = 3 * rng.normal(size=(200, 9))
    labels = logits.argmax(axis=1)
    logits[np.arange(200), labels] += rng.uniform(3, 60, 200)
    for dtype, engine in itertools.product(backend.dtypes, backend.engines):
        x, y = backend.array(logits, dtype), backend.array(labels)
        truth = oracle(backend.numpy(x), labels, reduction="none")
        loss, grad = cross_entropy_value_and_grad(x, y, reduction="none", engine=engine)
        assert_confident(backend.numpy(loss), backend.numpy(grad), truth, exact=False)


@pytest.mark.parametrize("engine", ["cpu", "numpy", "generic"])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(
    "options", [{}, {"z_loss": 1e-9}, {"label_smoothing": 0.5}], ids=lambda v: "-".join(v) or "plain"
)
def test_flat_rows(engine, axis, options):
    """What serves confident rows would cancel here, and C equal numbers drift where they are simply added up."""
    rng = np.random.default_rng(0)
    x = np.ascontiguousarray(np.moveaxis(0.1 * rng.normal(size=(20, 30_000)), 1, axis)).astype(np.float32)
    labels = rng.integers(0, 30_000, 20)
    truth = oracle(x, labels, axis=axis, **options)
    loss, grad = cross_entropy_value_and_grad(x, labels, axis=axis, engine=engine, **options)
    assert_loss(loss, truth)
    assert_grad(grad, truth)


@pytest.mark.full
def test_more_rows_than_float16_can_count(backend):
    rng = np.random.default_rng(0)
    x = (2 * rng.normal(size=(70_000, 4))).astype(np.float16)
    labels = rng.integers(0, 4, 70_000)
    truth = oracle(x, labels)
    for dtype, engine in itertools.product(set(backend.dtypes) & {"float16", "float32"}, backend.engines):
        loss = backend.numpy(cross_entropy(backend.array(x, dtype), backend.array(labels), engine=engine))
        assert loss == np.float32(truth.loss)
        if dtype == "float16":
            grad = cross_entropy_grad(backend.array(x), backend.array(labels), engine=engine, grad_output=4096.0)
            assert_grad(backend.numpy(grad), oracle(x, labels, grad_output=4096.0))


# -- what it costs, and what it must not disturb -----------------------------------------------------------------


MEMORY = """
import resource, sys, tracemalloc
import numpy as np
from xent_array import cross_entropy, cross_entropy_value_and_grad

N, C = 4096, 32000
x = np.random.default_rng(0).standard_normal((N, C), np.float32)
labels = np.arange(N) % C

def job(x, labels):
    if sys.argv[1] == "loss":
        return cross_entropy(x, labels)
    return cross_entropy_value_and_grad(x, labels, out=x)[0]

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

job(x[:64, :30000].copy(), labels[:64])  # threads and their stacks, several blocks
before = peak()
if sys.argv[2] == "arrays":  # what NumPy allocates, to the byte
    tracemalloc.start()
job(x, labels)
print(tracemalloc.get_traced_memory()[1] if sys.argv[2] == "arrays" else peak() - before)
"""


@pytest.mark.full
@pytest.mark.skipif(sys.platform == "win32", reason="the peak of a process is told elsewhere")
@pytest.mark.parametrize("measured", ["process", "arrays"])
@pytest.mark.parametrize("job", ["loss", "in place"])
def test_memory(job, measured):
    assert int(run(MEMORY, job, measured)) <= 16 * 2**20


@each_target
def test_no_temporary_of_the_size_of_the_logits(body, target):
    """Nor the gradient of 16-bit or strided logits, into a buffer that is strided too."""
    x = np.repeat(np.tile(LOGITS, (1, 30)), 20, axis=0)  # 21 MiB in float32
    rows = len(x)
    target = np.repeat(target, 20, axis=0) if target.ndim == 1 else np.repeat(np.tile(target, (1, 30)), 20, axis=0)
    for logits in (x, x.astype(np.float16), x[::-1, ::-1]):
        out = np.empty((rows, 2 * x.shape[1]), logits.dtype)[:, ::2]
        cross_entropy_value_and_grad(logits[:400], target[:400], out=out[:400])
        tracemalloc.start()
        cross_entropy_value_and_grad(logits, target, out=out, label_smoothing=0.1)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak <= 12 * 2**20


@each_target
def test_error_settings_and_warnings(small_blocks, body, monkeypatch, target):
    """Also those of the threads of the pool, which have settings of their own."""
    monkeypatch.setenv("XENT_ARRAY_NUM_THREADS", "3")
    logits = LOGITS * np.float32(1e4)
    logits[::5, 0], logits[1::5, 0], logits[2::5] = np.nan, np.inf, -np.inf
    options = {"z_loss": 1e30, "label_smoothing": 0.1, "weight": WEIGHT * np.float32(1e30)}
    with np.errstate(all="ignore"):
        wanted = rows_of(logits, target, **options)
    before = np.geterr()
    with warnings.catch_warnings(), np.errstate(all="raise"):
        warnings.simplefilter("error")
        assert rows_of(logits, target, **options) == wanted
        assert np.isnan(cross_entropy(logits, target, **options))
        assert set(np.geterr().values()) == {"raise"}
    assert np.geterr() == before


@pytest.mark.parametrize("exception", [KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("place", ["caller", "pool"])
@pytest.mark.parametrize("way", ["at once", "any"])
def test_exception_in_a_block(small_blocks, body, monkeypatch, exception, place, way):
    """It reaches the caller, no other block is begun, no thread goes on writing after that, and the next call works."""
    monkeypatch.setenv("XENT_ARRAY_NUM_THREADS", "4")
    wanted = rows_of(LOGITS, LABELS)
    module, name, validate = cpu, "sliced", False
    if way == "at once":
        if ENGINES["cpu"] is cpu.numpy_engine:
            pytest.skip("compiled loops only")
        module, name, validate = cpu.found_loops(), "workspace", None
    does, caller, calls, later = getattr(module, name), threading.current_thread(), itertools.count(), []

    def fails(*given):
        is_caller = threading.current_thread() is caller
        if is_caller == (place == "caller") and next(calls) == 0:
            later.clear()
            raise exception
        later.append(given)
        time.sleep(0.002 if is_caller else 0.02)  # the pool is busy when one fails, and when the caller has ended
        return does(*given)

    out = np.empty_like(LOGITS)
    with monkeypatch.context() as patched:
        patched.setattr(module, name, fails)
        with pytest.raises(exception):
            cross_entropy_value_and_grad(LOGITS, LABELS, out=out, validate=validate)
        assert len(later) <= 6  # what three others had begun, or did in the meantime
        left = out.copy()
        time.sleep(0.1)
    assert out.tobytes() == left.tobytes()
    assert rows_of(LOGITS, LABELS) == wanted
