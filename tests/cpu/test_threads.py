"""Interrupts, signal handlers, forks and other threads, at any moment of a first call; and who waits for whom."""

import itertools
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from unittest import mock

import numpy as np
import pytest
from support import process

from xent_array import cross_entropy
from xent_array._engines import cpu
from xent_array._engines.cpu import threads

# How many moments of a first call are tried. Two seconds each; 200 and 51 were, when these were written.
INTERRUPTS, FORKS = (int(os.environ.get(f"XENT_ARRAY_TEST_{name}", "16")) for name in ("INTERRUPTS", "FORKS"))

is_posix = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has neither forks nor such signals")
needs_llvmlite = pytest.mark.skipif(
    isinstance(cpu.found_loops(), str), reason="there is nothing to import or to compile without llvmlite"
)

SETTING = """
import os, signal, sys, threading, time
import numpy as np
from xent_array import cross_entropy_value_and_grad
from xent_array._engines import cpu
from xent_array._engines.cpu import threads

rng = np.random.default_rng(0)
x = rng.standard_normal((30_000, 10), np.float32)
labels = rng.integers(10, size=30_000)

def answers(engine=None):
    few = cross_entropy_value_and_grad(x[:32], labels[:32], engine=engine)
    return few, cross_entropy_value_and_grad(x, labels, engine=engine)  # on several threads

def is_right(given):
    for (loss, grad), (wanted, wanted_grad) in zip(given, right):
        assert abs(loss - wanted) <= 1e-5 * wanted and np.abs(grad - wanted_grad).max() <= 1e-6 * wanted_grad.max()
    return True

def all_is_well():
    assert is_right(answers()) and isinstance(cpu.found_loops(), type(sys)), cpu.found_loops()
    assert len(threads._pool.workers) == 2 == sum(t.name.startswith("xent_array") for t in threading.enumerate())
    return True

right = answers("generic")
"""


def started(script, *arguments, cache, **environment):
    """A process with that script, where warnings are errors and a call may use three threads."""
    of_process = process.environment(XENT_ARRAY_NUM_THREADS="3", XENT_ARRAY_CACHE_DIR=str(cache), **environment)
    command = [sys.executable, "-W", "error", "-c", SETTING + script, *arguments]
    return subprocess.Popen(
        command, env=of_process, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def ended(started, timeout=200):
    """What it has written; it must have ended well."""
    try:
        out, err = started.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        started.kill()
        raise
    assert (started.returncode, err) == (0, "")
    return out.split()


# -- a first call ------------------------------------------------------------------------------------------------

ONCE = """
begin = time.perf_counter()
answers()
print(time.perf_counter() - begin)
"""


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    """A folder with all that is compiled here, and how long a first call takes without it and with it, in seconds."""
    cache = tmp_path_factory.mktemp("filled")
    return cache, *(float(ended(started(ONCE, cache=cache))[0]) for _ in range(2))


@pytest.fixture(autouse=True)
def interruptible():
    """Also in what a shell runs behind it, where it has interrupts ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def first_calls(filled, tmp_path):
    """Cases of first calls: a folder, by turns empty and full, and a moment in seconds from the begin of the call."""
    cache, cold, warm = filled
    rng = random.Random(0)

    def cases(count):
        for k in range(count):
            empty = tmp_path / str(k)
            empty.mkdir()
            yield (cache, rng.uniform(0, warm)) if k % 2 else (empty, rng.uniform(0, cold))

    return cases


INTERRUPTED = """
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell has ignored in what it runs behind it
print("ready", flush=True)
try:
    try:
        answers()
        found = "nothing"
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
except BaseException as error:
    found = type(error).__name__
print(found, all_is_well(), all_is_well())
"""


@is_posix
@needs_llvmlite
@pytest.mark.full
def test_an_interrupt_of_a_first_call(first_calls):
    """It raises KeyboardInterrupt or, too late, nothing; and all that comes later is right, by compiled loops."""
    raised = []
    for cache, moment in first_calls(INTERRUPTS):
        calling = started(INTERRUPTED, cache=cache)
        assert calling.stdout.readline() == "ready\n"
        time.sleep(moment)
        calling.send_signal(signal.SIGINT)
        found, *well = ended(calling)
        assert well == ["True", "True"]
        raised.append(found)
    print(Counter(raised))
    assert set(raised) <= {"KeyboardInterrupt", "nothing"}
    assert raised.count("KeyboardInterrupt") > INTERRUPTS / 3


INTERRUPTED_AT = """
signal.signal(signal.SIGINT, signal.default_int_handler)

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == sys.argv[1]:
            sys.meta_path.remove(self)
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            time.sleep(0.1)

sys.meta_path.insert(0, Finder())
try:
    answers()
except KeyboardInterrupt:
    print(all_is_well(), all_is_well())
"""


@is_posix
@needs_llvmlite
@pytest.mark.parametrize(
    ("module", "is_compiled"),
    [
        ("llvmlite.binding.ffi", True),
        *(
            pytest.param(*case, marks=pytest.mark.full)
            for case in (
                ("llvmlite", True), ("xent_array._engines.cpu.loops.simd", False),
                ("xent_array._engines.cpu.compiled", True),
            )
        ),
    ],
)  # fmt: skip
def test_an_interrupt_of_an_import(filled, tmp_path, module, is_compiled):
    """That of a process which finds all compiled, or has to compile."""
    cache = filled[0] if is_compiled else tmp_path
    assert ended(started(INTERRUPTED_AT, module, cache=cache)) == ["True", "True"]


FORKED = """
import warnings
warnings.simplefilter("ignore", DeprecationWarning)  # of Python, against forking with threads: it is what is tested
children = []
who, moment = sys.argv[1], float(sys.argv[2])

def fork(*_):
    child = os.fork()
    if child:
        children.append(child)
    else:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(120)  # ends a child that hangs
        if who != "handler":
            os._exit(not all_is_well())

def fork_later():
    time.sleep(moment)
    fork()

parent = os.getpid()
calls = threading.Thread(target=answers)
if who == "main":
    calls.start()
    fork_later()
    calls.join()
elif who == "thread":
    forks = threading.Thread(target=fork_later)
    forks.start()
    answers()
    forks.join()
else:  # the child goes on with the call that its handler was called in
    signal.signal(signal.SIGALRM, fork)
    signal.setitimer(signal.ITIMER_REAL, moment)
    assert is_right(answers())
    while not children and os.getpid() == parent:
        time.sleep(0.1)
    if os.getpid() != parent:
        os._exit(not all_is_well())
codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
print(codes, all_is_well())
"""


@is_posix
@needs_llvmlite
@pytest.mark.full
def test_a_fork_while_there_is_a_first_call(first_calls):
    """By the main thread while another one calls, by another one, and by a handler in the call itself."""
    for who, (cache, moment) in zip(itertools.cycle(["main", "thread", "handler"]), first_calls(FORKS), strict=False):
        assert ended(started(FORKED, who, str(moment), cache=cache)) == ["[0]", "True"]


HANDLED = """
calls = []
from support.sizes import resized
from xent_array._engines.cpu import compiled  # which has one of these sizes
with_small_sizes = resized(SERIAL=1 << 12, PART=1 << 10)  # so that more threads take part
with_small_sizes.__enter__()

def handle(*_):
    calls.append(is_right(answers()))
    signal.setitimer(signal.ITIMER_REAL, rng.exponential(0.01))

signal.signal(signal.SIGALRM, handle)
signal.setitimer(signal.ITIMER_REAL, float(sys.argv[1]))
for count in range(3, 20):  # each time there is one more thread to start
    os.environ["XENT_ARRAY_NUM_THREADS"] = str(count)
    assert is_right(answers())
signal.setitimer(signal.ITIMER_REAL, 0)
names = [thread.name for thread in threading.enumerate() if thread.name.startswith("xent_array")]
print(len(calls) > 0, len(threads._pool.workers) == len(names) == len(set(names)) == 18)
"""


@is_posix
@needs_llvmlite
@pytest.mark.full
def test_a_handler_that_calls_at_any_moment(first_calls):
    """While there is an import, a compilation, a thread to start, a job to send or to wait for."""
    found = [ended(started(HANDLED, str(moment), cache=cache)) for cache, moment in first_calls(4)]
    assert all(is_right == "True" for _, is_right in found)
    assert any(is_called == "True" for is_called, _ in found)  # else all were over before the moment


def test_the_lock_of_llvm_is_found():
    """Where llvmlite has it: nothing else would tell if that changed."""
    from llvmlite.binding import ffi

    assert threads._llvms_lock() is not threads._NO_LLVM
    with ffi.lib._lock:
        assert threads._llvms_lock()._is_owned()
    assert not threads._llvms_lock()._is_owned()


SIDE_BY_SIDE = """
import sys, threading
from llvmlite.binding import ffi
from xent_array._engines.cpu import machine_code
from xent_array._engines.cpu.loops import build

sys.setswitchinterval(1e-4)
begun, make, found = threading.Event(), build.machine_code, []

def made(*given):
    begun.set()
    return make(*given)

def many():
    found.extend(machine_code.function(name, *["float32"] * 3) for name in ("contiguous", "strided", "transposed"))

build.machine_code = made
other = threading.Thread(target=many)
other.start()
begun.wait()
for name in (["total", "float64"], ["total", "float32"], ["combined"], ["count_kept"]):
    with ffi.lib._lock:  # as in a function that LLVM calls
        found.append(machine_code.function(*name))
other.join()
print(len(found))
"""


@needs_llvmlite
def test_functions_are_made_in_two_threads_at_once(tmp_path):
    """By a thread that LLVM has called, and by another one."""
    assert process.run(SIDE_BY_SIDE, XENT_ARRAY_CACHE_DIR=str(tmp_path)).strip() == "7"


IMPORTING = """
import importlib, pathlib, tempfile
folder = tempfile.mkdtemp()
pathlib.Path(folder, "in_progress.py").write_text("import __main__; __main__.found = __main__.answers()")
sys.path.insert(0, folder)
sys.modules.pop("llvmlite", None)

class Finder:  # llvmlite needs a module that is being imported by the thread that calls
    def find_spec(self, name, path=None, target=None):
        if name == "llvmlite":
            import in_progress

sys.meta_path.insert(0, Finder())
import in_progress
(loss, _), _ = found
assert is_right(found) and loss == answers("numpy")[0][0]
print(all_is_well())
"""


@needs_llvmlite
@pytest.mark.full
def test_a_call_in_the_middle_of_an_import_that_it_waits_for(filled):
    """It goes without compiled loops, and only this once."""
    assert ended(started(IMPORTING, cache=filled[0])) == ["True"]


# -- threads of the pool -----------------------------------------------------------------------------------------


@is_posix
def test_an_interrupt_while_a_thread_starts(monkeypatch):
    """The pool knows of each thread that it has."""
    start, began = threading.Thread.start, []

    def interrupted(thread):
        start(thread)
        began.append(thread)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        time.sleep(0.05)

    pool = threads.Pool()
    monkeypatch.setattr(threading.Thread, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pool.send(lambda: None, 1)
    threads.whole(lambda: None)  # comes after it
    assert len(pool.workers) == len(began) == 1


@is_posix
def test_an_interrupt_while_others_work():
    """Comes when they have ended: nobody writes any more. And what nobody had begun is not begun."""
    caller, here, done = threading.current_thread(), threading.Barrier(2), []

    def work(parts):
        for part in parts:
            if part < 2:
                here.wait(10)
            if threading.current_thread() is not caller:
                time.sleep(0.1)
                signal.pthread_kill(caller.ident, signal.SIGINT)
                time.sleep(0.1)
            elif part < 2:
                return  # so that it waits for the other
            done.append(part)

    with pytest.raises(KeyboardInterrupt):
        threads.parallel(work, range(10), 2)
    assert len(done) == 1
    time.sleep(0.2)
    assert len(done) == 1


@is_posix
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*fork:RuntimeWarning")  # of JAX, where another test has imported it
def test_a_fork_in_the_middle_of_a_job():
    """By who waits for others: they have ended the part that they were at, and parent and child go on with the rest."""
    caller, here, done, children = threading.current_thread(), threading.Barrier(3), [], []

    def work(parts):
        for part in parts:
            if part < 3:
                here.wait(10)
            if threading.current_thread() is not caller:
                time.sleep(0.1)
            elif not children:
                children.append(os.fork())
                if not children[0]:
                    signal.alarm(30)  # ends a child that hangs
            done.append(part)

    try:
        threads.parallel(work, range(20), 3)
        is_done = sorted(done) == list(range(20))
    finally:
        if children == [0]:
            os._exit(not (is_done and answer() == answer()))
    assert is_done
    assert os.waitstatus_to_exitcode(os.waitpid(children[0], 0)[1]) == 0


FORKED_BY_A_HANDLER = """
def work(parts):
    for _ in parts:
        time.sleep(0.2 if threading.current_thread() is threading.main_thread() else 1)

def handle(*_):
    if not os.fork():
        os._exit(0)
    os.wait()

import warnings
warnings.simplefilter("ignore", DeprecationWarning)
signal.signal(signal.SIGALRM, handle)
signal.setitimer(signal.ITIMER_REAL, 0.5)
threads.parallel(work, range(2), 2)
print("returned")
"""


@is_posix
def test_a_fork_by_a_handler_while_others_are_waited_for(tmp_path):
    """It waits for them itself, and what it interrupted goes on."""
    assert ended(started(FORKED_BY_A_HANDLER, cache=tmp_path), timeout=30) == ["returned"]


@is_posix
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*fork:RuntimeWarning")
@pytest.mark.parametrize("shares", [lambda: range(10), lambda: threads.Turns(10)], ids=["parts", "turns"])
def test_an_interrupt_while_a_fork_waits(monkeypatch, shares):
    """It is raised by the job, of which nothing is left out in silence."""
    done = []

    def work(parts):
        for part in parts:
            done.append(part)
            if len(done) == 1:
                threads._own.jobs[-1]._wait = mock.Mock(side_effect=[KeyboardInterrupt, None, None, None])
                child = os.fork()
                if child == 0:
                    os._exit(0)
                os.waitpid(child, 0)

    with pytest.raises(KeyboardInterrupt):
        threads.parallel(work, shares(), 1)
    assert len(done) == 1


def answer():
    return cross_entropy(np.zeros((60_000, 10), np.float32), np.zeros(60_000, int))


def test_parts_are_drawn_once():
    drawn = []
    threads.parallel(lambda parts: drawn.extend(parts), iter(range(20_000)), 5)
    assert sorted(drawn) == list(range(20_000))


@pytest.mark.parametrize("busy", [0, 1, 2])
def test_who_is_busy_is_asked_last(monkeypatch, busy):
    """And all who are not are asked at once: none waits for another one to wake."""
    pool = threads.Pool()
    here, go_on, came = threading.Barrier(busy + 1), threading.Event(), threading.Barrier(4 - busy)
    pool.send(lambda: None, 3)
    while any(map(threads.Worker.waiting, pool.workers)):  # they have just been started
        time.sleep(0.001)
    for worker in pool.workers[:busy]:
        worker.calls.put(lambda: (here.wait(10), go_on.wait(60)))
    here.wait(10)
    try:
        pool.send(lambda: came.wait(10), 3 - busy)
        came.wait(10)
    finally:
        go_on.set()


# -- done whole --------------------------------------------------------------------------------------------------


def test_whole():
    """In another thread, one after another, and within itself; what it raises is raised."""
    places, inside = [], []

    def task():
        inside.append(None)
        assert len(inside) == 1
        time.sleep(0.01)
        places.append(threads.whole(threading.get_ident) == threading.get_ident())
        inside.pop()
        return threading.get_ident()

    assert threads.whole(task) != threading.get_ident()
    callers = [threading.Thread(target=threads.whole, args=(task,)) for _ in range(5)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert places == [True] * 6
    with pytest.raises(ZeroDivisionError):
        threads.whole(lambda: 1 / 0)
    assert not threads._asked


def test_whole_without_another_thread(monkeypatch):
    def fails(*_):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threads._thread, "start_new_thread", fails)
    assert threads.whole(lambda: threads.whole(threading.get_ident)) == threading.get_ident()


def test_what_says_nothing_of_the_next_time_is_forgotten(monkeypatch):
    """A lack of memory; any other reason is remembered."""
    for error, calls in ((MemoryError(), 2), (ImportError("broken"), 1)):
        tries = []

        class Finder:
            def find_spec(self, name, path=None, target=None, tries=tries, error=error):
                if name == "xent_array._engines.cpu.compiled":
                    tries.append(name)
                    raise error

        with monkeypatch.context() as patched:
            patched.setattr(cpu, "_found", None)
            patched.delitem(sys.modules, "xent_array._engines.cpu.compiled", raising=False)
            patched.delattr("xent_array._engines.cpu.compiled", raising=False)
            patched.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
            assert all(cpu.found_loops().startswith("llvmlite cannot be used") for _ in range(2))
        assert len(tries) == calls
