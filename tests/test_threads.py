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
from pathlib import Path

import numpy as np
import pytest

from xent_array import cross_entropy
from xent_array._engines import _threads, cpu

is_posix = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has neither forks nor such signals")
needs_numba = pytest.mark.skipif(
    isinstance(cpu.compiled_body(), str), reason="there is nothing to import or to compile without Numba"
)

SETTING = """
import os, signal, sys, threading, time
import numpy as np
from xent_array import cross_entropy_value_and_grad
from xent_array._engines import _threads, cpu

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
    assert is_right(answers()) and isinstance(cpu.compiled_body(), type(sys)), cpu.compiled_body()
    assert _threads._pool.size == 2 == sum(t.name.startswith("xent_array") for t in threading.enumerate())
    return True

right = answers("generic")
"""


def started(script, *arguments, cache, **environment):
    """A process with that script, where warnings are errors and a call may use three threads."""
    here = Path(__file__).parent
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(here), str(here.parent)]),
        "XENT_ARRAY_NUM_THREADS": "3",
        "NUMBA_CACHE_DIR": str(cache),
        **environment,
    }
    command = [sys.executable, "-W", "error", "-c", SETTING + script, *arguments]
    return subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def ended(process, timeout=200):
    """What it has written; it must have ended well."""
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    assert (process.returncode, err) == (0, "")
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
@needs_numba
@pytest.mark.parametrize("count", [12, pytest.param(200, marks=pytest.mark.full)])
def test_an_interrupt_of_a_first_call(first_calls, count):
    """It raises KeyboardInterrupt or, too late, nothing; and all that comes later is right, by compiled loops."""
    raised = []
    for cache, moment in first_calls(count):
        process = started(INTERRUPTED, cache=cache)
        assert process.stdout.readline() == "ready\n"
        time.sleep(moment)
        process.send_signal(signal.SIGINT)
        found, *well = ended(process)
        assert well == ["True", "True"]
        raised.append(found)
    print(Counter(raised))
    assert set(raised) <= {"KeyboardInterrupt", "nothing"}
    assert raised.count("KeyboardInterrupt") > count / 3


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
@needs_numba
@pytest.mark.parametrize("count", [6, pytest.param(51, marks=pytest.mark.full)])
def test_a_fork_while_there_is_a_first_call(first_calls, count):
    """By the main thread while another one calls, by another one, and by a handler in the call itself."""
    for who, (cache, moment) in zip(itertools.cycle(["main", "thread", "handler"]), first_calls(count), strict=False):
        assert ended(started(FORKED, who, str(moment), cache=cache)) == ["[0]", "True"]
