"""Work that several threads share, and work that is done whole or not at all.

A signal's handler runs in the main thread between any two steps of what that does, and then it may raise (Ctrl-C), call
this library, or fork. So who asks for work holds no lock: what threads share is changed in single steps of the
interpreter, each of which may be done again. What takes many steps and must not be left half done (importing Numba,
compiling, starting threads) is done by threads of its own, which no handler runs in. A fork waits for these, because a
child would find their locks held by threads that it does not have.
"""

from __future__ import annotations

import _thread
import atexit
import logging  # noqa: F401  # whose lock Numba needs: what is called last before a fork takes it, after ours
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
from typing import Any, TypeVar

from . import _arithmetic
from ._cores import threads

P = TypeVar("P")
R = TypeVar("R")

# Done whole


class Busy(RuntimeError):
    """What is to be done waits for a module that the thread that asks for it is in the middle of importing."""


class _Asked:
    """What one thread asks for, and another one does."""

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
                with _arithmetic.usual():  # not as in the thread that started this one: what is made here is kept
                    self.answer = self.task()
            except BaseException as error:
                self.error = error
            _doer = None
            self.is_done = True
            self.end.release()


_lock: Any = threading.RLock()  # of who does something whole; held across a fork
_doer: int | None = None  # who does
_asked: set[_Asked] = set()


def whole(task: Callable[[], R]) -> R:
    """What `task()` returns or raises. It is done to its end, one at a time, whatever becomes of the calling thread.

    An interrupt is raised at once, and the task goes on. Who asks again, be it a signal's handler, comes after it: a
    task begins with a look at whether it is done already.
    """
    if _lock._is_owned() or _numbas_lock().is_locked():  # by this thread: this, or Numba, is at work below this call
        return task()
    asked = None
    while asked is None or not asked.is_done:  # a child of a fork has no thread that would
        asked = _Asked(task)
        try:
            _asked.add(asked)
            if sys.is_finalizing() or not _is_begun(asked.run):
                asked.run()
            waits = 0  # looks in a row that found both waiting: one may find what is over at once
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
    """In a thread of its own, by a single step of this one; False if there are no more threads."""
    try:
        _thread.start_new_thread(run, ())
    except RuntimeError:
        return False
    return True


class _NoLock:
    def is_locked(self) -> bool:
        return False

    def acquire(self) -> None: ...

    def release(self) -> None: ...


_NO_LOCK = _NoLock()


def _numbas_lock() -> Any:
    """That of Numba's compiler, once it is there. Who holds it waits for nothing here."""
    return getattr(sys.modules.get("numba.core.compiler_lock"), "global_compiler_lock", _NO_LOCK)


def _is_in_the_way() -> bool:
    """Whether this thread is in the middle of an import, and what is done whole waits for one."""
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
    """What is beneath Numba is not to be torn down while it compiles."""
    with _lock:
        pass


# Shared


def team(work: int, alone: int) -> int:
    """How many threads share so much work, of which `alone` is not worth another one."""
    return min(threads(), -(-work // alone))


def shrinking(count: int, least: int, most: int, team: int) -> Iterator[slice]:
    """Cuts rows into parts, each a thread's share of what is left: threads that begin apart still end together.

    No part is so large that an interrupt would have to wait for long.
    """
    start = 0
    while start < count:
        stop = min(count, start + max(least, min(most, (count - start) // team)))
        yield slice(start, stop)
        start = stop


def spread(work: Callable[[Iterator[P]], None], parts: Iterable[P], team: int) -> None:
    """Calls `work(parts)` here and on up to `team` - 1 threads of the pool at once; returns when all have ended.

    Each draws what parts the others have left, and none any more once one has failed.
    """
    job = Job(work, parts, team - 1)
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


class Job(Iterator[P]):
    """Parts that several threads draw from, and what they do with them."""

    def __init__(self, work: Callable[[Iterator[P]], None], parts: Iterable[P], helpers: int) -> None:
        self.work, self.left = work, deque(parts)
        self.numbers, self.helpers = count(), helpers
        self.helps: dict[int, bool] = {}  # whether a helper came before the job was closed: what is set first holds
        self.ended: dict[int, BaseException | None] = {}
        self.ends: SimpleQueue[None] = SimpleQueue()

    def __next__(self) -> P:
        try:
            return self.left.popleft()
        except IndexError:
            raise StopIteration from None

    def run(self) -> None:
        try:
            self.work(self)
        except BaseException:
            self.left.clear()
            raise

    def help(self) -> None:
        """What a thread of the pool calls, now or too late."""
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
        """Waits for those that help already, and lets no more begin. Returns what they raised.

        An interrupt is raised when they have ended, which is soon, so that nobody writes to the caller's arrays then.
        """
        interrupt = None
        while True:
            try:
                if interrupt is not None:
                    self.left.clear()
                self._wait()
                break
            except BaseException as raised:
                interrupt = raised
        if interrupt is not None:
            raise interrupt
        return [error for error in self.ended.values() if error is not None]

    def settle(self) -> None:
        """Leaves to this thread what is not begun, and waits for the rest."""
        left: deque[P] = deque()
        with suppress(IndexError):
            while True:
                left.append(self.left.popleft())
        self._wait()
        self.left.extend(left)

    def _wait(self) -> None:
        for number in range(self.helpers):
            self.helps.setdefault(number, False)
        while any(helps and number not in self.ended for number, helps in self.helps.items()):
            self.ends.get()


class Pool:
    """Threads that wait for calls. As daemons they keep no interpreter from ending; it leaves them where they are.

    They are started where arithmetic is as usual, and so is theirs.
    """

    def __init__(self) -> None:
        self.calls: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self.size = 0

    def send(self, call: Callable[[], None], count: int) -> None:
        """Has it called by `count` threads, or by as many as there can be."""
        if count > self.size:
            with suppress(Busy):
                whole(partial(self._grow, count))
        for _ in range(min(count, self.size)):
            self.calls.put(call)

    def _grow(self, size: int) -> None:
        with suppress(RuntimeError):  # there are no more threads: fewer suffice
            while self.size < size and not sys.is_finalizing():
                threading.Thread(target=self._run, name=f"xent_array-{self.size}", daemon=True).start()
                self.size += 1

    def _run(self) -> None:
        while True:
            self.calls.get()()


class _Own(threading.local):
    def __init__(self) -> None:
        self.jobs: list[Job[Any]] = []  # of this thread, the inner ones those of a signal's handler
        self.held: list[Any] = []  # locks that it holds while it forks


_pool, _own = Pool(), _Own()

# Forks


def _before_fork() -> None:
    """Nothing is half done in a child; and should that go on with jobs of the forking thread, it does so alone."""
    for job in _own.jobs:
        job.settle()
    while not _lock.acquire(timeout=0.2):
        if _is_in_the_way() or _numbas_lock().is_locked():
            return
    _own.held.append(_lock)
    # Of other callers of Numba; and who frees what it has made takes llvmlite's alone.
    llvm = getattr(getattr(sys.modules.get("llvmlite.binding.ffi"), "lib", None), "_lock", None)
    for lock in (_numbas_lock(), getattr(llvm, "_lock", _NO_LOCK)):
        lock.acquire()
        _own.held.append(lock)


def _after_fork() -> None:
    while _own.held:
        _own.held.pop().release()


def _after_fork_in_child() -> None:
    """It has none of its parent's threads: it starts with a pool of none, and does itself what it has asked for."""
    global _pool, _lock
    _after_fork()
    _pool, _lock = Pool(), threading.RLock()
    for asked in _asked:
        if asked.end.locked():
            asked.end.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork_in_child)
