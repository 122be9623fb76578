"""How calls are timed: in turns, so that whatever else the machine does affects all of them alike."""

from __future__ import annotations

import _thread
import random
import threading
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

QUIET = 0.3  # most seconds that a turn waits for the threads of the previous library: OpenMP's spin for up to 0.1
TURN = 15e-3  # seconds of a turn that are kept; a longer run is timed once
SETTLE = 1 / 3  # of that time first, not kept: caches, clocks and the library's threads reach a steady state
FEWEST = 3  # turns of a call, however long it takes
MANY = 20  # consecutive runs on a GPU when the host's time is measured
Key = TypeVar("Key", bound=Hashable)
Part = TypeVar("Part")


class Call(NamedTuple):
    """What is timed: `run`, and the release of what it returns; `prepare` and `finish` are not timed."""

    run: Callable[[], Any]
    prepare: Callable[[], object] | None = None
    finish: Callable[[Any], Any] = lambda result: result  # converts the result to the loss, or to (loss, gradient)


Clock = Callable[[Callable[[], Any]], float]  # returns the seconds that a run takes


def host_clock(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def waiting_clock(run: Callable[[], Any]) -> float:
    """The time of a call on a GPU as its caller sees it: many calls in a row, and one wait for all of them."""
    import cupy

    wait = cupy.cuda.runtime.deviceSynchronize
    wait()
    start = time.perf_counter()
    for _ in range(MANY):
        run()
    wait()
    return (time.perf_counter() - start) / MANY


class DeviceClock:
    """Time on the GPU, measured by events, one run at a time, with the L2 cache full of other data.

    CuPy and PyTorch both launch on the legacy default stream, so one pair of events is right for both. Filling another
    buffer keeps the device busy for at least a quarter of a millisecond, in which the host launches the run.
    """

    OTHER = 1 << 30  # bytes; the largest L2 cache is below 128 MiB

    def __init__(self) -> None:
        import cupy

        self.cuda = cupy.cuda
        self.other = cupy.empty(self.OTHER, dtype=cupy.uint8)

    def __call__(self, run: Callable[[], Any]) -> float:
        start, stop = self.cuda.Event(), self.cuda.Event()
        self.other.data.memset_async(0, self.OTHER)
        start.record()
        run()
        stop.record()
        stop.synchronize()
        return float(self.cuda.get_elapsed_time(start, stop)) / 1e3


class _Helper:
    """A worker thread that waits for a task. It shares only two locks, one for the start and one for the end."""

    def __init__(self) -> None:
        self.begin, self.end = _thread.allocate_lock(), _thread.allocate_lock()
        self.begin.acquire()
        self.end.acquire()
        self.task: Callable[[], None] = lambda: None
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while True:
            self.begin.acquire()
            try:
                self.task()
            finally:
                self.end.release()


@cache
def _helper(_number: int) -> _Helper:
    return _Helper()


def spread(work: Callable[[Iterator[Part]], None], parts: Iterable[Part], team: int) -> None:
    """Calls `work` in this thread and in `team` - 1 others at once, each with its share of the parts."""
    parts = list(parts)
    shares = [iter(parts[number::team]) for number in range(team)]
    helpers = [_helper(number) for number in range(team - 1)]
    for helper, share in zip(helpers, shares[1:], strict=True):
        helper.task = partial(work, share)
        helper.begin.release()
    work(shares[0])
    for helper in helpers:
        helper.end.acquire()


def reader(array: Any) -> Callable[[], None]:
    """Reads a contiguous CuPy array as fast as the device can: the yardstick of a loss without gradient."""
    import cupy

    kernel = cupy.RawKernel(
        """extern "C" __global__ void read(const uint4* from, long long count, unsigned* never) {
            unsigned seen = 0;
            const long long step = (long long)gridDim.x * blockDim.x;
            #pragma unroll 4
            for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += step) {
                const uint4 v = __ldg(from + i);
                seen |= (v.x ^ 0x5bd1e995u) & v.y & v.z & v.w;
            }
            if (seen == 0x12345678u) *never = seen;  // keeps the loads
        }""",
        "read",
    )
    never = cupy.zeros(1, dtype=cupy.uint32)
    blocks = 8 * cupy.cuda.Device().attributes["MultiProcessorCount"]
    return lambda: kernel((blocks,), (256,), (array, np.int64(array.nbytes // 16), never))


def wait_until_quiet(most: float = QUIET) -> None:
    """Waits until two checks in a row find no other thread of this process running or waiting for a core.

    Turning off the spinning instead would slow down the library that spins.
    """
    end, calm, self = time.perf_counter() + most, 0, threading.get_native_id()
    while calm < 2 and time.perf_counter() < end:
        calm = (
            0
            if any(_running(thread) for thread in Path("/proc/self/task").iterdir() if thread.name != str(self))
            else calm + 1
        )
        time.sleep(2e-3)


def _running(thread: Path) -> bool:
    try:
        return (thread / "stat").read_bytes().rpartition(b") ")[2].startswith(b"R")
    except OSError:  # the thread has ended
        return False


def timed(call: Call, clock: Clock, seconds: float) -> list[float]:
    """The seconds of each run; there are as many runs as fill the time, and at least one."""
    taken: list[float] = []
    end = time.perf_counter() + seconds
    while not taken or time.perf_counter() < end:
        if call.prepare is not None:
            call.prepare()
        taken.append(clock(call.run))
    return taken


def take_turn(call: Call, clock: Clock, seconds: float) -> list[float]:
    """The seconds of each run that is kept; before them, for a third of the time, come runs that are not."""
    timed(call, clock, seconds * SETTLE)
    return timed(call, clock, seconds)


def interleave(
    calls: Mapping[Key, Call],
    clock: Clock,
    *,
    rounds: int,
    seconds: float,
    turn: float,
    seed: int,
    quiet: Callable[[], None] | None = None,
    clear: Callable[[], None] | None = None,
) -> tuple[dict[Key, list[list[float]]], dict[Key, Exception]]:
    """The times of every call, turn by turn, and the calls that raised an exception.

    Each round gives every call one turn, in shuffled order; a call that has had FEWEST turns and has used up its
    seconds gets no more. Before each turn, `quiet` waits for the threads of the previous library; `clear` is for
    problems so large that the memory that one library keeps leaves no room for the next.
    """
    times: dict[Key, list[list[float]]] = {key: [] for key in calls}
    spent = dict.fromkeys(calls, 0.0)
    failed: dict[Key, Exception] = {}
    chance = random.Random(seed)
    for done in range(rounds):
        order = [key for key in times if done < FEWEST or spent[key] < seconds]
        chance.shuffle(order)
        for key in order:
            try:
                for before in (clear, quiet):
                    if before is not None:
                        before()
                start = time.perf_counter()
                times[key].append(take_turn(calls[key], clock, turn))
                spent[key] += time.perf_counter() - start
            except Exception as error:
                failed[key] = error
                del times[key]
    return times, failed


def summary(times: list[float]) -> dict[str, float]:
    """Median, minimum and quartiles in seconds."""
    least, q1, median, q3 = np.quantile(times, [0, 0.25, 0.5, 0.75])
    return {"seconds": float(median), "min": float(least), "q1": float(q1), "q3": float(q3)}
