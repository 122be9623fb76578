"""One run: every case is checked against the oracle, timed, printed and saved, and compared with the goals."""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import functools
import importlib
import importlib.metadata
import itertools
import json
import math
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from tqdm import tqdm

import xent_array

from . import peers, suite
from .peers import Problem, Unsupported, host
from .suite import (
    ACROSS,
    COLD,
    COPY,
    COPY_BY_ONE,
    EACH,
    EACH_OUT,
    GRAD,
    IN_PLACE,
    LOSS,
    OURS,
    OUT,
    READ,
    WARM,
    Case,
)  # fmt: skip
from .timing import TURN, Call, Clock, DeviceClock, host_clock, interleave, summary, wait_until_quiet, waiting_clock

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from support.close import assert_grad, assert_loss  # noqa: E402
from support.oracle import Truth, oracle  # noqa: E402

Array = Any
Row = dict[str, Any]
Tile = tuple[slice, ...]  # the slices that select it

CACHES = ("XENT_ARRAY_CACHE_DIR", "NUMBA_CACHE_DIR")  # where this and former versions are told to keep machine code
READY = "ready"  # printed when every case is set up and checked, before anything is timed
CHECKED = 1 << 19  # most logits that the oracle checks, unless a single row has more
POOLED = 2 << 30  # bytes of logits on a GPU beyond which the libraries must not all keep their memory pools
LOOSE = 0.03  # of the largest gradient, and of the loss: a peer that is off by more computes something else
PACKAGES = ("numpy", "llvmlite", "ml_dtypes", "torch", "triton", "liger-kernel", "quack-kernels", "jax",
            "scikit-learn", "scipy", "cupy-cuda12x", "cupy-cuda13x", "cupy")  # fmt: skip


class Settings(NamedTuple):
    backend: str
    threads: int
    rounds: int
    seconds: float
    turn: float
    memory: bool
    out: Path | None
    seed: int
    commit: str | None
    command: str
    peers: bool = True
    ahead: bool = False  # whether to set up and check every case, and then wait for a line of input, before timing any
    most: float = float("inf")  # seconds after which no further case is timed


PACE: dict[bool, dict[str, Any]] = {  # by whether the run should be quick
    True: {"rounds": 3, "turn": TURN / 5, "memory": False},
    False: {"rounds": 7, "turn": TURN, "memory": True},
}


def run(
    cases: list[Case],
    settings: Settings,
    close: Callable[[list[Row]], list[str]] | None = None,
    measure_by: Measure | None = None,
) -> int:
    """Runs everything. Returns 1 if a result of this library is wrong, else 0.

    `close` returns the lines printed at the end, by default the goals; `measure_by` is used in place of `measure`.
    """
    limit_threads(settings.threads)
    xp = peers.namespace(settings.backend)
    makers, absent = peers.libraries(settings.backend, xp, only=None if settings.peers else "")
    origin = about(settings, xp)
    say = functools.partial(tqdm.write, file=sys.stdout)
    say(header(origin))
    for name, reason in absent.items():
        say(f"absent: {name}: {reason}")
    if settings.out is not None:
        settings.out.parent.mkdir(parents=True, exist_ok=True)
        settings.out.write_text("")
    rows: list[Row] = []
    begun = {}
    if settings.ahead:
        for case in cases:
            with _alone(case):
                begun[case] = begin(case, makers, settings, xp)._replace(calls={})
                _release(xp)  # meanwhile, other runs set up or time their cases
        say(READY)
        sys.stdout.flush()
        sys.stdin.readline()
    start = time.monotonic()
    with tqdm(cases, unit="case", dynamic_ncols=True) as progress:
        for case in progress:
            if time.monotonic() - start > settings.most:
                say(f"not timed, for want of time: {case.name}")
                continue
            progress.set_postfix_str(case.name)
            found, notes = (measure_by or measure)(case, makers, settings, xp, begun.get(case))
            found = [row | origin for row in found]
            say("\n" + "\n".join([*table(case, found), *notes]))
            rows += found
            if settings.out is not None:
                with settings.out.open("a") as file:
                    file.writelines(json.dumps(row, separators=(",", ":")) + "\n" for row in found)
    say("\n" + "\n".join(goals(rows, settings.backend) if close is None else close(rows)))
    failed = [row for of in (rows, *(begun[case].rows.values() for case in begun)) for row in of if row["failed"]]
    return int(any(row["library"].startswith(OURS) for row in failed))


def limit_threads(threads: int) -> None:
    """Sets the number of threads of every library, before any is imported; JAX obeys only the affinity mask."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    os.environ["XENT_ARRAY_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"] = str(threads)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")


@contextlib.contextmanager
def _alone(case: Case) -> Iterator[None]:
    """Keeps other runs from setting up such a large case now: several may share a GPU until they are told to time."""
    if case.nbytes <= POOLED:
        yield
        return
    with (Path(tempfile.gettempdir()) / "xent_array-bench.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


# One case

Measure = Callable[..., tuple[list[Row], list[str]]]  # like `measure` below


class Begun(NamedTuple):
    """A case of which every operation has been run once and checked."""

    rows: dict[tuple[str, str], Row]  # by library and operation
    notes: list[str]
    calls: dict[tuple[str, str], Call]


def begin(
    case: Case,
    makers: dict[str, peers.Maker],
    settings: Settings,
    xp: Any,
    look: Callable[[str, Any], object] | None = None,
) -> Begun:
    """Makes a problem, and runs and checks every operation of every library on it.

    `look` is called with the name of each operation and its result, before another run can overwrite that.
    """
    problem, truth, tiles = make(case, settings.seed, settings.threads, xp)
    begun = Begun({}, [], {})
    for (library, operation), call in _calls(problem, makers, begun.notes):
        row = begun.rows[library, operation] = _empty_row(case, library, operation, settings)
        try:
            result = _first(call, row, xp)
            if look is not None:
                look(operation, result)
            if library != COPY:
                row |= check(result, truth, tiles, strictly=library.startswith(OURS))
            begun.calls[library, operation] = call
        except Exception as error:
            row["failed"] = short(error)
            _release(xp)
    return begun


def _calls(
    problem: Problem, makers: dict[str, peers.Maker], notes: list[str]
) -> Iterator[tuple[tuple[str, str], Call]]:
    """The calls by library and operation. If a library has none, the reason is added to the notes."""
    for library, maker in makers.items():
        try:
            made = maker(problem)
        except Unsupported as why:
            notes.append(f"  {library} {why}")
            continue
        except Exception as error:  # a peer that breaks must not end the run
            notes.append(f"  {library} FAILED: {short(error)}")
            continue
        for operation, call in made.items():
            if operation not in suite.EVERY or operation in problem.case.operations:
                yield (library, operation), call


def measure(
    case: Case, makers: dict[str, peers.Maker], settings: Settings, xp: Any, begun: Begun | None = None
) -> tuple[list[Row], list[str]]:
    """A row for each library and operation, and notes on those without; `begun` if the case has been set up already."""
    if case == suite.FIRST:
        return first_calls(case, settings), []
    if begun is None:
        rows, notes, calls = begin(case, makers, settings, xp)
    else:
        rows, notes, _ = begun
        again = make(case, settings.seed, settings.threads, xp, judged=False)[0]
        calls = {key: call for key, call in _calls(again, makers, []) if key in rows and not rows[key]["failed"]}
        del again
        for call in calls.values():  # a new object may have to look something up in its first run
            if call.prepare is not None:
                call.prepare()
            call.run()
    turns, failed = interleave(
        calls,
        _clock(case, xp),
        rounds=settings.rounds,
        seconds=settings.seconds,
        turn=settings.turn,
        seed=settings.seed,
        quiet=wait_until_quiet if xp is np else None,
        clear=functools.partial(_release, xp) if xp is not np and case.nbytes > POOLED else None,
    )
    times = {key: list(itertools.chain(*taken)) for key, taken in turns.items()}
    if (COPY, COPY_BY_ONE) in times and (COPY, COPY) in times:  # the fair yardstick is the faster copy
        by_one, row = times.pop((COPY, COPY_BY_ONE)), rows.pop((COPY, COPY_BY_ONE))
        if np.median(by_one) < np.median(times[COPY, COPY]):
            times[COPY, COPY], rows[COPY, COPY] = by_one, row | {"operation": COPY, "threads": 1}
    for key, reason in failed.items():
        rows[key]["failed"] = short(reason)
    for (_, operation), row in rows.items():
        row["bytes"] = case.must_move(operation)
    for key, taken in times.items():
        row = rows[key]
        row |= summary(taken)
        row["rounds"], row["runs"] = len(turns[key]), len(taken)
        row["gb_per_s"] = row["bytes"] / row["seconds"] / 1e9
    for name in (COPY, READ):
        yardstick = rows.get((COPY, name), {}).get("gb_per_s")
        for key in times:
            rows[key][f"of_{name}"] = yardstick and rows[key]["gb_per_s"] / yardstick
    if case.memory and settings.memory:
        for (library, operation), row in rows.items():
            if library != COPY and not row["failed"]:
                row["memory"] = peak_memory(case, library, operation, settings)
    del calls
    _release(xp)
    return list(rows.values()), notes


def make(case: Case, seed: int, threads: int, xp: Any, judged: bool = True) -> tuple[Problem, Truth | None, list[Tile]]:
    """A problem, the true result for one tile of it (if it will be checked), and where to find that tile.

    The problem repeats the rows of one tile. The mean over all rows is therefore the mean over the tile, and the
    oracle, which is slow, needs to see only the tile.
    """
    rng = np.random.default_rng(seed)
    axis = case.axis % len(case.shape)
    shape = tile_shape(case.shape, axis)
    times = [whole // part for whole, part in zip(case.shape, shape, strict=True)]
    dtype = ml_dtypes.bfloat16 if case.dtype == "bfloat16" else case.dtype
    logits = rng.standard_normal(shape, np.float32).astype(dtype)
    if case.has_labels:
        target = rng.integers(case.classes, size=shape[:axis] + shape[axis + 1 :])
        target = target.astype(np.int32) if case.target == suite.INT32 else target
        if case.peaked:
            at = np.expand_dims(target, axis)
            np.put_along_axis(logits, at, np.take_along_axis(logits, at, axis) + np.asarray(10, logits.dtype), axis)
    else:
        e = np.exp(rng.standard_normal(shape))
        target = (e / e.sum(axis, keepdims=True)).astype(dtype)
    options = {case.option: suite.OPTIONS[case.option]} if case.option else {}
    for name, count in (("weight", case.classes), ("sample_weight", shape[:axis] + shape[axis + 1 :])):
        if name in options:
            options[name] = rng.uniform(0.5, 2, count).astype(np.float32)
    if "ignore_index" in options:
        target.flat[rng.permutation(target.size)[: target.size // 4]] = options["ignore_index"]
    truth = oracle(logits, target, axis=axis, grad_output=1 / math.prod(times), **options) if judged else None

    def tiled(part: Array) -> Array:
        along = times if part.ndim == len(shape) else times[:axis] + times[axis + 1 :]
        return xp.tile(xp.asarray(part), along)

    options |= {name: xp.asarray(options[name]) for name in {"weight"} & set(options)}
    options |= {name: tiled(options[name]) for name in {"sample_weight"} & set(options)}
    places = dict.fromkeys([(0,) * len(times), tuple(t // 2 for t in times), tuple(t - 1 for t in times)])
    tiles = [tuple(slice(i * n, (i + 1) * n) for i, n in zip(place, shape, strict=True)) for place in places]
    problem = Problem(case, xp, tiled(logits), tiled(target), threads, options)
    return problem, truth, tiles


def tile_shape(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    """The shape that is repeated to make a problem: few enough rows for the oracle, cut from the first axes first."""
    tile = list(shape)
    for i in (i for i in range(len(shape)) if i != axis):
        most = min(tile[i], max(1, CHECKED * tile[i] // math.prod(tile)))
        tile[i] = next(n for n in range(most, 0, -1) if tile[i] % n == 0)
    return tuple(tile)


def check(result: Any, truth: Truth | None, tiles: list[Tile], strictly: bool) -> Row:
    """The largest errors in units of rounding. Raises if ours exceeds the project's limit, or a peer is far off."""
    assert truth is not None
    loss, grad = result if isinstance(result, tuple) else (result, None)
    pairs = [(host(loss), truth.loss, truth.unit_loss, assert_loss, "loss_units")]
    if grad is not None:
        pairs += [(host(grad[tile]), truth.grad, truth.unit_grad, assert_grad, "grad_units") for tile in tiles]
    errors: dict[str, float] = defaultdict(float)
    for got, wanted, unit, assert_close, name in pairs:
        if strictly:
            assert_close(got, truth)
        difference = np.abs(got.astype(np.float64) - wanted.astype(np.float64))
        if not difference.max() <= LOOSE * np.abs(wanted).max():
            raise AssertionError(f"{name.partition('_')[0]} is off by {difference.max():.3g}")
        with np.errstate(divide="ignore"):  # what must be exactly 0 has a unit of 0
            units = np.divide(difference, unit, out=np.zeros_like(difference), where=difference > 0)
        errors[name] = max(errors[name], float(units.max()))
    return dict(errors)


def _empty_row(case: Case, library: str, operation: str, settings: Settings) -> Row:
    return {
        "case": case.name,
        "library": library,
        "operation": operation,
        "backend": settings.backend,
        "group": case.group,
        "shape": list(case.shape),
        "axis": case.axis,
        "dtype": case.dtype,
        "target": case.target,
        "clock": "device" if settings.backend == "cupy" and not case.host else "host",
        "threads": settings.threads,
        "failed": None,
        **dict.fromkeys(("seconds", "min", "q1", "q3", "first", "rounds", "runs", "bytes", "gb_per_s")),
        **dict.fromkeys(("of_copy", "of_read", "loss_units", "grad_units", "memory")),
    }


def _first(call: Call, row: Row, xp: Any) -> Any:
    """The result of the first call, which includes any compilation; its time in seconds goes into the row."""
    _release(xp)
    if call.prepare is not None:
        call.prepare()
    _wait(xp)
    start = time.perf_counter()
    result = call.run()
    _wait(xp)
    row["first"] = time.perf_counter() - start
    return call.finish(result)


def _clock(case: Case, xp: Any) -> Clock:
    return host_clock if xp is np else waiting_clock if case.host else DeviceClock()


def _wait(xp: Any) -> None:
    if xp is not np:
        xp.cuda.runtime.deviceSynchronize()


def _release(xp: Any) -> None:
    """Returns the memory held by the memory pools to the GPU."""
    if xp is not np:
        xp.get_default_memory_pool().free_all_blocks()
        if "torch" in sys.modules:
            sys.modules["torch"].cuda.empty_cache()


def short(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0][:300]


# Memory


def peak_memory(case: Case, library: str, operation: str, settings: Settings) -> int | None:
    """Peak memory of the first call in bytes, beyond the inputs and `out`, measured in a new process."""
    arguments = [settings.backend, library, operation, str(settings.threads), json.dumps(case)]
    program = "import sys; from bench.run import print_peak_memory; print_peak_memory(*sys.argv[1:])"
    done = subprocess.run([sys.executable, "-c", program, *arguments], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        tqdm.write(f"memory of {library} {operation} not measured: {done.stderr.strip().splitlines()[-1]}")
        return None
    return int(done.stdout.splitlines()[-1])


def print_peak_memory(backend: str, library: str, operation: str, threads: str, fields: str) -> None:
    limit_threads(int(threads))
    xp = peers.namespace(backend)
    maker = peers.libraries(backend, xp, only=library)[0][library]
    case = suite.case_of(json.loads(fields))
    small = case._replace(shape=(2,) * len(case.shape))
    for each in (small, case):  # the small one is for what a library does only once
        problem, _, _ = make(each, 0, int(threads), xp)
        call = maker(problem)[operation]
        problem.refresh()
        if call.prepare is not None:
            call.prepare()
        _release(xp)
        peak = _host_peak() if xp is np else _device_peak(xp)
        call.run()
        _wait(xp)
        taken = peak()
    print(taken)


def _host_peak() -> Callable[[], int]:
    """The growth of the resident set from now to its peak; only Linux can reset that peak."""

    def status(field: str) -> int:
        found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
        assert found is not None
        return int(found[1]) << 10

    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    return lambda: max(0, status("VmHWM") - before)


def _device_peak(xp: Any) -> Callable[[], int]:
    """The decrease in free GPU memory: the pools keep everything that they have ever allocated."""
    before = xp.cuda.runtime.memGetInfo()[0]
    return lambda: max(0, before - xp.cuda.runtime.memGetInfo()[0])


# The first call of a process


def first_calls(case: Case, settings: Settings) -> list[Row]:
    """Loss and gradient of a case in two new processes: the first has no machine-code cache, the second has its."""
    rows = []
    program = "import sys; from bench.run import print_first_call; print_first_call(*sys.argv[1:])"
    with tempfile.TemporaryDirectory() as folder:
        for operation in (COLD, WARM):
            arguments = [sys.executable, "-c", program, str(settings.threads), *map(str, case.shape)]
            environment = os.environ | dict.fromkeys(CACHES, folder)
            done = subprocess.run(arguments, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
            first, again = map(float, done.stdout.split())
            rows.append(_empty_row(case, OURS, operation, settings) | summary([again]) | {"first": first})
            rows[-1] |= {"rounds": 1, "runs": 1, "bytes": case.must_move(GRAD)}
            rows[-1]["gb_per_s"] = rows[-1]["bytes"] / again / 1e9
    return rows


def print_first_call(threads: str, *shape: str) -> None:
    """Prints the seconds of the first call, and of the next."""
    limit_threads(int(threads))
    rng = np.random.default_rng(0)
    size = tuple(map(int, shape))
    x, y = rng.standard_normal(size, np.float32), rng.integers(size[-1], size=size[:-1])
    start = time.perf_counter()
    xent_array.cross_entropy_value_and_grad(x, y)
    first = time.perf_counter()
    xent_array.cross_entropy_value_and_grad(x, y)
    print(first - start, time.perf_counter() - first)


# The report of a run


def about(settings: Settings, xp: Any) -> Row:
    """Where the numbers of this run come from."""
    machine: Row = {"cpu": _cpu(), "cores": os.cpu_count(), "load": round(os.getloadavg()[0], 2), "gpu": None}
    machine |= {"whole_cores": _whole_cores(), "nodes": len(list(Path("/sys/devices/system/node").glob("node[0-9]*")))}
    if xp is not np:
        properties = xp.cuda.runtime.getDeviceProperties(xp.cuda.Device().id)
        machine |= {"gpu": properties["name"].decode(), "cuda_driver": xp.cuda.runtime.driverGetVersion()}
    commit, dirty = settings.commit or git("rev-parse", "HEAD"), git("status", "--porcelain", "-uno")
    return {
        "machine": machine,
        "versions": {"python": platform.python_version(), **_versions()},
        "commit": commit,
        "dirty": None if dirty is None else bool(dirty),
        "seed": settings.seed,
        "command": settings.command,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _cpu() -> str:
    """The processor and its widest vector instructions, by which every library here chooses its code."""
    told = Path("/proc/cpuinfo").read_text()
    found = re.search(r"^model name\s*: (.*)$", told, re.MULTILINE)
    widest = [name for flag, name in (("avx512f", "AVX-512"), ("avx2", "AVX2")) if re.search(rf"\b{flag}\b", told)]
    return " with ".join([found[1] if found else platform.machine(), *widest[:1]])


def _whole_cores() -> int:
    """The physical cores that this process may run on: fewer than the logical ones if hardware threads share them."""
    told = (f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list" for cpu in os.sched_getaffinity(0))
    return len({Path(file).read_text() if Path(file).exists() else file for file in told})


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def header(about: Row) -> str:
    machine = about["machine"]
    commit = (about["commit"] or "unknown commit")[:10] + (", with uncommitted changes" if about["dirty"] else "")
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    text = f"{machine['gpu'] or machine['cpu']}, {machine['cores']} cores; {versions}; {commit}; {about['date']}"
    if machine["load"] > 0.5:
        text += f"\nWARNING: load average {machine['load']}; on a busy machine libraries that spin suffer most"
    return text


def table(case: Case, rows: list[Row]) -> list[str]:
    """The rows of a case, sorted by operation and then by time; each time is also divided by this library's."""
    ours = {row["operation"]: row["seconds"] for row in rows if row["library"] == OURS}
    head = (
        f"  {'operation':<20} {'library':<31} {'ms':>10} {'quartiles':>21} {'first ms':>9} {'GB/s':>7} {'of copy':>8} "
        f"{'/ ours':>7} {'units of error':>15} {'peak memory':>12}"
    )
    lines = [case.name, head]
    order = [COPY, READ, ACROSS, LOSS, EACH, GRAD, OUT, EACH_OUT, IN_PLACE, COLD, WARM]
    for row in sorted(rows, key=lambda row: (order.index(row["operation"]), row["seconds"] or 0)):
        name = f"  {row['operation']:<20} {row['library']:<31} "
        if row["failed"]:
            lines.append(f"{name}FAILED, not timed: {row['failed']}")
            continue
        units = max((row[f"{what}_units"] or 0 for what in ("loss", "grad")), default=0)
        mine = ours.get(row["operation"])
        lines.append(
            f"{name}{ms(row['seconds']):>10} {ms(row['q1']):>10}-{ms(row['q3']):>10} {ms(row['first']):>9} "
            f"{row['gb_per_s']:>7.2f} {_or_blank(row['of_copy'], '.0%'):>8} "
            f"{_or_blank(mine and row['seconds'] / mine, '.2f'):>7} {_or_blank(units or None, '.2g'):>15} "
            f"{_or_blank(row['memory'] is not None and row['memory'] / case.nbytes, '.2f', ' x logits'):>12}".rstrip()
        )
    return lines


def ms(seconds: float) -> str:
    return f"{seconds * 1e3:.4g}"


def _or_blank(value: Any, form: str, after: str = "") -> str:
    return "" if value is None or value is False else format(value, form) + after


def goals(rows: list[Row], backend: str) -> list[str]:
    """Each goal whose cases were run: the value that was reached, and whether it meets the goal."""
    timed = {(row["case"], row["library"], row["operation"]): row for row in rows if row["seconds"] is not None}
    lines, met = [], 0
    for goal in suite.GOALS[backend]:
        value = goal.value(timed)
        if value is not None:
            met += goal.met(value)
            sign, verdict = ">=" if goal.at_least else "<=", "met" if goal.met(value) else "MISSED"
            lines.append(f"  {verdict:<7} {value:>7.2f} {sign} {goal.bound:<5g} {goal.text}")
    return [f"goals: {met} of {len(lines)} met, {len(suite.GOALS[backend]) - len(lines)} not run", *lines]
