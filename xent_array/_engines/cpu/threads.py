"""The thread pool, which shares the work of a call, and tasks that run to completion once they are started.

A signal handler runs in the main thread, between any two bytecode instructions, and it may raise an exception (Ctrl-C),
call this library, or fork. A thread that submits work therefore holds no lock: shared state is modified only by atomic
operations of the interpreter, each of which may safely be repeated. Tasks that take many steps and must not be left
half done (importing llvmlite, compiling, starting threads) run in threads of their own, where no signal handler runs. A
fork waits for these threads, because a child process would inherit their locks without the threads that release them.
"""

from __future__ import annotations

import _thread
import atexit
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from itertools import count
from queue import SimpleQueue
from types import FrameType
from typing import Any, Generic, TypeVar

import numpy as np

from . import arithmetic
from .cores import threads
from .loops import LIMIT, NEXT, TURNS

P = TypeVar("P")
R = TypeVar("R")

# Tasks that run to completion


class CannotCompile(RuntimeError):
    """LLVM fails to compile a function. Raised before the call has computed or written anything."""


class Busy(CannotCompile):
    """LLVM cannot compile now: memory is lacking, or the caller is importing a module that llvmlite waits for."""


class _Asked:
    """A task that one thread submits and another thread runs."""

    def __init__(self, task: Callable[[], Any]) -> None:
        self.task = task
        self.answer: Any = None
        self.error: BaseException | None = None
        self.is_done, self.end = False, _thread.allocate_lock()
        self.end.acquire()

    def run(self) -> None:
        global _doer
        with _lock:
            _doer = _thread.get_ident()
            try:
                with arithmetic.usual():  # not the settings of the submitting thread: the result is kept for all
                    self.answer = self.task()
            except BaseException as error:
                self.error = error
            _doer = None
            self.is_done = True
            self.end.release()


_lock: Any = threading.RLock()  # held by the thread that runs a task, and across a fork
_doer: int | None = None  # the thread that is running a task
_asked: set[_Asked] = set()


def whole(task: Callable[[], R]) -> R:
    """Returns or raises what `task()` does. The task runs to completion, whatever happens to the calling thread.

    Only one task runs at a time. An interrupt is raised in the caller at once, while the task continues. Another
    request, even from a signal handler, waits until it has finished; a task must therefore begin by checking whether
    its work is already done.
    """
    if _lock._is_owned() or _llvms_lock()._is_owned():  # nested in a task, or called by LLVM, in this thread
        return task()
    asked = None
    while asked is None or not asked.is_done:  # a forked child lacks the thread, and starts over
        asked = _Asked(task)
        try:
            _asked.add(asked)
            if sys.is_finalizing() or not _is_begun(asked.run):
                asked.run()
            waits = 0  # consecutive checks that found both waiting; a single one may be a passing state
            while not asked.end.acquire(timeout=0.2):
                waits = waits + 1 if _is_in_the_way() else 0
                if waits == 5:
                    raise Busy("this is called in the middle of an import that it waits for")
        finally:
            _asked.discard(asked)
    if asked.error is not None:
        raise asked.error
    return asked.answer  # type: ignore[no-any-return]


def _is_begun(run: Callable[[], None]) -> bool:
    """Starts `run` in a new thread, by one atomic operation; False if no thread can be started."""
    try:
        _thread.start_new_thread(run, ())
    except RuntimeError:
        return False
    return True


def _llvms_lock() -> Any:
    """The lock that llvmlite holds during every call of LLVM, whoever makes it; `_NO_LLVM` if it is not imported."""
    lib = getattr(sys.modules.get("llvmlite.binding.ffi"), "lib", None)
    return getattr(getattr(lib, "_lock", None), "_lock", _NO_LLVM)


_NO_LLVM = threading.RLock()


def _is_in_the_way() -> bool:
    """Whether this thread is in the middle of an import while the running task waits for one."""
    doing = sys._current_frames().get(_doer or 0)
    frame: FrameType | None = sys._getframe()
    waits = doing is not None and _imports(doing) and doing.f_code.co_name == "acquire"
    while waits and frame is not None:
        if _imports(frame):
            return True
        frame = frame.f_back
    return False


def _imports(frame: FrameType) -> bool:
    return frame.f_code.co_filename == "<frozen importlib._bootstrap>"


@atexit.register
def _wait_for_end() -> None:
    """Keeps the interpreter from tearing down what a compilation depends on."""
    with _lock:
        pass


# Shared work


def team(work: int, serial: int) -> int:
    """How many threads should share this much work, if `serial` of it is too little to pay for another thread."""
    return min(threads(), -(-work // serial))


class Parts(Generic[P]):
    """Parts of a job, which several threads take one by one."""

    def __init__(self, parts: Iterable[P]) -> None:
        self.left: deque[P] = deque(parts)
        self.held: deque[P] = deque()

    def __iter__(self) -> Parts[P]:
        return self

    def __next__(self) -> P:
        try:
            return self.left.popleft()
        except IndexError:
            raise StopIteration from None

    def clear(self) -> None:
        """Let no thread take any more, ever."""
        self.left.clear()
        self.held.clear()

    def hold(self) -> None:
        """Let no thread take any more until `release`."""
        self.held, self.left = self.left, deque()  # a thread that is in `__next__` may still take one

    def release(self) -> None:
        self.left.extend(self.held)
        self.held.clear()


class Turns:
    """The same for `count` rows of which compiled code takes parts: the iterator yields None while rows are left."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.numbers = np.zeros(TURNS, np.int64)
        self.numbers[LIMIT] = count

    def __iter__(self) -> Turns:
        return self

    def __next__(self) -> None:
        if self.numbers[NEXT] >= self.numbers[LIMIT]:
            raise StopIteration

    def clear(self) -> None:
        self.count = self.numbers[LIMIT] = 0

    def hold(self) -> None:
        self.numbers[LIMIT] = 0  # a thread that has read the limit before still takes one part

    def release(self) -> None:
        self.numbers[LIMIT] = self.count


def parallel(work: Callable[[Iterator[Any]], None], parts: Iterable[Any], team: int) -> None:
    """Calls `work(parts)` in this thread and in up to `team` - 1 pool threads at once; returns when all have finished.

    Each call takes parts that no other has taken; once one call has failed, none takes any more.
    """
    job = Job(work, parts if isinstance(parts, Turns) else Parts(parts), team - 1)
    try:
        _own.jobs.append(job)
        _pool.send(job.help, team - 1)
        job.run()
    finally:
        try:
            errors = job.close()
        finally:
            with suppress(ValueError):
                _own.jobs.remove(job)
    if errors:
        raise errors[0]


class Job:
    """Parts that several threads take one by one, and the function that processes them."""

    def __init__(self, work: Callable[[Iterator[Any]], None], parts: Parts[Any] | Turns, helpers: int) -> None:
        self.work, self.parts = work, parts
        self.interrupt: BaseException | None = None
        self.numbers, self.helpers = count(), helpers
        self.helps: dict[int, bool] = {}  # whether a helper came before the job was closed; the first value set stands
        self.ended: dict[int, BaseException | None] = {}
        self.ends: SimpleQueue[None] = SimpleQueue()

    def run(self) -> None:
        try:
            self.work(self.parts)
        except BaseException:
            self.parts.clear()
            raise

    def help(self) -> None:
        """Called by a pool thread, perhaps only after the job is closed."""
        number, error = next(self.numbers), None
        if not self.helps.setdefault(number, True):
            return
        try:
            self.run()
        except BaseException as raised:
            error = raised
        self.ended[number] = error
        self.ends.put(None)

    def close(self) -> list[BaseException]:
        """Waits for the helpers that have started, and lets no more start. Returns the exceptions that they raised.

        An interrupt is raised only after the helpers have finished, which is soon, so that no thread still writes to
        the caller's arrays.
        """
        self._wait_whatever_happens()
        if self.interrupt is not None:
            raise self.interrupt
        return [error for error in self.ended.values() if error is not None]

    def settle(self) -> None:
        """Leaves the parts that have not been started to this thread alone, and waits for the others.

        Called by a signal handler, perhaps in the middle of `_wait`; an interrupt meanwhile is raised by `close`.
        """
        try:
            self.parts.hold()
            self._wait_whatever_happens()
        finally:
            self.parts.release()
            self.ends.put(None)  # for a `_wait` that has been interrupted: this one has taken what it waits for

    def _wait_whatever_happens(self) -> None:
        while True:
            try:
                self._wait()
                return
            except BaseException as raised:
                self.interrupt = raised
                self.parts.clear()

    def _wait(self) -> None:
        for number in range(self.helpers):
            self.helps.setdefault(number, False)
        while any(helps and number not in self.ended for number, helps in self.helps.items()):
            self.ends.get()


class Worker:
    """A thread of the pool and the calls that it is sent.

    Each has a queue of its own: of threads that wait at the same one, only the first is woken by a call, and wakes the
    next when it runs, so that the last of many would start late.
    """

    def __init__(self) -> None:
        self.calls: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self.is_busy = False

    def waiting(self) -> int:
        """How many calls it has been sent and has not finished."""
        return self.is_busy + self.calls.qsize()

    def run(self) -> None:
        while True:
            call = self.calls.get()
            self.is_busy = True
            call()
            del call  # it holds the caller's arrays
            self.is_busy = False


class Pool:
    """Worker threads that wait for calls. They are daemon threads: an exiting interpreter does not wait for them.

    They are started, and therefore run, with the default floating-point environment.
    """

    def __init__(self) -> None:
        self.workers: list[Worker] = []

    def send(self, call: Callable[[], None], count: int) -> None:
        """Has `count` threads run `call`, or as many as can be started; those that are busy are the last choice."""
        if count > len(self.workers):
            with suppress(Busy):
                whole(partial(self._grow, count))
        for worker in sorted(self.workers, key=Worker.waiting)[:count]:
            worker.calls.put(call)

    def _grow(self, size: int) -> None:
        with suppress(RuntimeError):  # no more threads can be started: fewer will do
            while len(self.workers) < size and not sys.is_finalizing():
                worker = Worker()
                threading.Thread(target=worker.run, name=f"xent_array-{len(self.workers)}", daemon=True).start()
                self.workers.append(worker)


class _Own(threading.local):
    def __init__(self) -> None:
        self.jobs: list[Job] = []  # of this thread; inner ones belong to signal handlers
        self.held: list[Any] = []  # locks that this thread holds while it forks


_pool, _own = Pool(), _Own()

# Forks


def _before_fork() -> None:
    """Ensures that no task is half done in the child, and that it can finish the forking thread's jobs alone."""
    for job in _own.jobs:
        job.settle()
    while not _lock.acquire(timeout=0.2):
        if _is_in_the_way() or _llvms_lock()._is_owned():
            return
    _own.held.append(_lock)
    lock = _llvms_lock()  # other code may use LLVM too
    lock.acquire()
    _own.held.append(lock)


def _after_fork() -> None:
    while _own.held:
        _own.held.pop().release()


def _after_fork_in_child() -> None:
    """The child has none of its parent's threads: its pool starts empty, and it runs submitted tasks itself."""
    global _pool, _lock
    _after_fork()
    _pool, _lock = Pool(), threading.RLock()
    for asked in _asked:
        if asked.end.locked():
            asked.end.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork_in_child)
