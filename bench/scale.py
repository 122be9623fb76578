"""What grows beyond one array: Dask on threads, a cluster, files larger than memory, classes over processes.

    python -m bench scale

`threads` times Dask on threads against the same call on NumPy arrays, turn by turn. `cluster` gives a cluster of two
processes more logits than they have memory, `memmap` and `dask-memmap` a process a file of float16 logits that is
larger than the memory which the system allows it, and `traffic` counts the bytes that processes exchange.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from xent_array import cross_entropy, cross_entropy_value_and_grad
from xent_array.parallel import VocabParallel

from . import report, run, timing
from .suite import GRAD, LOSS, OURS, SCALE

Row = dict[str, Any]

DASK, DIRECT = f"{OURS} (Dask)", OURS
CHUNKS = 8
TILE = (1024, 32768)  # logits that a file repeats
BLOCK = 512  # rows that Dask reads at once


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench scale", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("jobs", nargs="*", metavar="JOB", help=f"of {', '.join(JOBS)}; by default all")
    parser.add_argument(
        "--rows", type=int, nargs="+", default=[1024, 8192], metavar="N", help="of 32000, for `threads`"
    )
    parser.add_argument("--cluster-gib", type=float, default=8, metavar="G", help="of logits (default 8)")
    parser.add_argument("--file-gib", type=float, default=12, metavar="G", help="of logits (default 12)")
    parser.add_argument("--limit-gib", type=float, default=2, metavar="G", help="of memory for a file (default 2)")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="for files, on a disk")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write one JSON line per row here")
    given = parser.parse_args(arguments)
    if unknown := set(given.jobs) - set(JOBS):
        parser.error(f"JOB must be of {', '.join(JOBS)}; got {', '.join(sorted(unknown))}")
    if given.out is not None:
        given.out.touch()
    threads = len(os.sched_getaffinity(0))
    settings = run.Settings(
        SCALE, threads, 7, 3.0, timing.TURN, True, given.out, 0, None,
        f"python -m bench scale {shlex.join(arguments)}".strip(),
    )  # fmt: skip
    origin = run.about(settings, np) | {"threads": threads, "backend": SCALE, "group": SCALE}
    print(run.header(origin))
    rows = []
    for job in given.jobs or JOBS:
        for row in JOBS[job](given, settings):
            rows.append(row | origin)
            print(json.dumps(row))
    if given.out is not None:
        given.out.write_text("".join(json.dumps(row, separators=(",", ":")) + "\n" for row in rows))
    print("\n\n".join(["", *report.scale(report.by_key(rows))]))
    return 0


# Dask on threads


def on_threads(given: argparse.Namespace, settings: run.Settings) -> Iterator[Row]:
    import dask
    import dask.array as da

    for count in given.rows:
        rng = np.random.default_rng(0)
        x, labels = rng.standard_normal((count, 32000), np.float32), rng.integers(32000, size=count)
        chunks = -(-count // CHUNKS)
        y, lazy = da.from_array(x, (chunks, -1)).persist(), da.from_array(labels, chunks).persist()

        def both(y: Any = y, lazy: Any = lazy) -> Any:
            return dask.persist(*cross_entropy_value_and_grad(y, lazy), scheduler="threads")

        def loss(y: Any = y, lazy: Any = lazy) -> Any:
            return cross_entropy(y, lazy).compute(scheduler="threads")

        calls = {
            (DIRECT, GRAD): timing.Call(lambda x=x, t=labels: cross_entropy_value_and_grad(x, t)),
            (DASK, GRAD): timing.Call(both),
            (DIRECT, LOSS): timing.Call(lambda x=x, t=labels: cross_entropy(x, t)),
            (DASK, LOSS): timing.Call(loss),
        }
        times, failed = timing.interleave(
            calls, timing.host_clock, rounds=settings.rounds, seconds=settings.seconds, turn=settings.turn, seed=0,
            quiet=timing.wait_until_quiet,
        )  # fmt: skip
        if failed:
            raise next(iter(failed.values()))
        for (library, operation), turns in times.items():
            taken = [each for turn in turns for each in turn]
            yield {
                "case": f"threads {count}x32000 in {CHUNKS} chunks of rows", "library": library, "operation": operation,
                "gib": x.nbytes / 2**30, **timing.summary(taken), "runs": len(taken),
            }  # fmt: skip


# A cluster


def on_cluster(given: argparse.Namespace, settings: run.Settings) -> Iterator[Row]:
    """Random logits that no worker ever has as a whole; the norm of the gradient needs all of it."""
    import dask
    import dask.array as da
    from distributed import Client, LocalCluster

    classes = 32768
    count = int(given.cluster_gib * 2**30) // (4 * classes)
    x = da.random.default_rng(0).standard_normal((count, classes), dtype=np.float32, chunks=(512, -1))
    labels = da.random.default_rng(1).integers(0, classes, count, chunks=512)
    loss, grad = cross_entropy_value_and_grad(x, labels)
    options = {"n_workers": 2, "threads_per_worker": 1, "memory_limit": "1GiB", "dashboard_address": None}
    with LocalCluster(**options) as cluster, Client(cluster) as client:
        start = time.perf_counter()
        loss, norm = dask.compute(loss, da.sqrt((grad * grad).sum(dtype=np.float64)))
        seconds = time.perf_counter() - start
        peaks = sorted(client.run(peak_memory).values())
    yield {
        "case": f"cluster of 2 processes with 1 GiB each, {count}x{classes}", "library": DASK, "operation": GRAD,
        "gib": x.nbytes / 2**30, "seconds": seconds, "limit": 1 << 30, "peaks": peaks,
        "loss": float(loss), "norm": float(norm),
    }  # fmt: skip


def peak_memory() -> int:
    """The largest resident set of this process so far, in bytes; `getrusage` would tell that of its parent, too."""
    told = Path("/proc/self/status").read_text()
    return int(told.partition("VmHWM:")[2].split()[0]) << 10


# Files


def by_memmap(given: argparse.Namespace, settings: run.Settings) -> Iterator[Row]:
    yield from _of_file(given, "memmap", OURS)


def by_dask_and_memmap(given: argparse.Namespace, settings: run.Settings) -> Iterator[Row]:
    yield from _of_file(given, "dask", DASK)


def _of_file(given: argparse.Namespace, how: str, library: str) -> Iterator[Row]:
    size = int(given.file_gib * 2**30)
    if shutil.disk_usage(given.folder).free < 2.1 * size:
        raise SystemExit(f"{given.folder} has no room for twice {given.file_gib:g} GiB; --folder names another")
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        path = Path(folder)
        count = _write(path / "logits.npy", size)
        limit = int(given.limit_gib * 2**30)
        program = "import sys; from bench.scale import print_file; print_file(*sys.argv[1:])"
        with _group(limit) as group:
            arguments = [how, folder, str(group.folder or ""), str(limit)]
            command = [sys.executable, "-c", program, *arguments]
            done = subprocess.run(command, cwd=run.ROOT, text=True, stdout=subprocess.PIPE)
            peak = group.peak()
        if done.returncode:
            raise SystemExit(f"{how}: failed, exit code {done.returncode}; perhaps {given.limit_gib:g} GiB are too few")
        told = json.loads(done.stdout.splitlines()[-1])
        _check(path, told["loss"])
    yield {
        "case": f"{how} of {count}x{TILE[1]} float16 under {given.limit_gib:g} GiB", "library": library,
        "operation": GRAD, "gib": count * TILE[1] * 2 / 2**30, "limit": limit, "limited by": group.kind,
        "peaks": [told["peak"]] if peak is None else [peak], "own": told["own"],
        "seconds": told["seconds"], "loss": told["loss"],
    }  # fmt: skip


def _tile() -> np.ndarray:
    return np.random.default_rng(0).standard_normal(TILE, np.float32).astype(np.float16)


def _write(path: Path, size: int) -> int:
    """A file of about that size, in tiles of rows that are all the same; returns the number of rows."""
    tile = _tile()
    times = max(1, size // tile.nbytes)
    logits = np.lib.format.open_memmap(path, "w+", np.float16, (times * TILE[0], TILE[1]))
    for k in range(times):
        logits[k * TILE[0] : (k + 1) * TILE[0]] = tile
    logits.flush()
    return times * TILE[0]


def _labels(count: int) -> np.ndarray:
    return np.tile(np.random.default_rng(1).integers(TILE[1], size=TILE[0]), count // TILE[0])


def print_file(how: str, folder: str, group: str, limit: str) -> None:
    """Loss and gradient of a file, into another, within a limit of memory; prints what it took."""
    _Group(Path(group) if group else None, int(limit)).enter()
    logits = np.load(Path(folder) / "logits.npy", mmap_mode="r")
    grad = np.lib.format.open_memmap(Path(folder) / "grad.npy", "w+", np.float16, logits.shape)
    labels = _labels(len(logits))
    most, is_done = [0], threading.Event()

    def watch() -> None:
        while not is_done.wait(0.02):
            most[0] = max(most[0], _anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    if how == "memmap":
        loss, _ = cross_entropy_value_and_grad(logits, labels, out=grad)
    else:
        import dask
        import dask.array as da

        chunks = ((BLOCK,) * (len(logits) // BLOCK), logits.shape[1])
        blocks = da.map_blocks(
            _read, f"{folder}/logits.npy", chunks=chunks, dtype=logits.dtype, meta=np.empty((0, 0), logits.dtype)
        )
        lazy = cross_entropy_value_and_grad(blocks, labels)
        loss, _ = dask.compute(lazy[0], da.store(lazy[1], grad, lock=False, compute=False))
    grad.flush()
    seconds = time.perf_counter() - start
    is_done.set()
    watcher.join()
    print(json.dumps({"loss": float(loss), "seconds": seconds, "peak": peak_memory(), "own": most[0]}))


def _read(path: str, block_id: tuple[int, int]) -> np.ndarray:
    """A block of a file. `from_array` would copy all of it into memory, and so would a function that holds it."""
    return np.load(path, mmap_mode="r")[BLOCK * block_id[0] : BLOCK * (block_id[0] + 1)]


def _anonymous() -> int:
    """Memory of this process that is of no file, in bytes."""
    told = Path("/proc/self/status").read_text()
    return int(told.partition("RssAnon:")[2].split()[0]) << 10


def _check(folder: Path, loss: float) -> None:
    """The first and the last tile of the gradient, and the loss, against the same call on a tile in memory."""
    grad = np.load(folder / "grad.npy", mmap_mode="r")
    wanted, first = cross_entropy_value_and_grad(_tile(), _labels(TILE[0]), denominator=len(grad))
    assert abs(loss * TILE[0] - float(wanted) * len(grad)) <= 1e-5 * abs(loss) * TILE[0], (loss, wanted)
    for tile in (grad[: TILE[0]], grad[-TILE[0] :]):
        assert (tile == first).all()


class _Group:
    """Processes whose memory is limited, with that of the files they have in memory: by a cgroup if that may be made.

    Otherwise the limit is that of the system on memory that is of no file.
    """

    def __init__(self, folder: Path | None, limit: int) -> None:
        self.folder, self.limit = folder, limit
        self.kind = "RLIMIT_DATA" if folder is None else "a cgroup"

    def enter(self) -> None:
        if self.folder is None:
            resource.setrlimit(resource.RLIMIT_DATA, (self.limit, self.limit))
        else:
            (self.folder / "cgroup.procs").write_text(str(os.getpid()))

    def peak(self) -> int | None:
        for name in ("memory.max_usage_in_bytes", "memory.peak"):
            if self.folder is not None and (self.folder / name).exists():
                return int((self.folder / name).read_text())
        return None


@contextlib.contextmanager
def _group(limit: int) -> Iterator[_Group]:
    for root, name in (("/sys/fs/cgroup/memory", "memory.limit_in_bytes"), ("/sys/fs/cgroup", "memory.max")):
        folder = Path(root) / f"xent_array-{os.getpid()}"
        if not (Path(root) / "cgroup.procs").exists():
            continue
        try:
            folder.mkdir()
        except OSError:
            continue
        try:
            (folder / name).write_text(str(limit))
        except OSError:
            folder.rmdir()
            continue
        try:
            yield _Group(folder, limit)
        finally:
            folder.rmdir()
        return
    yield _Group(None, limit)


# Classes over processes


def traffic(given: argparse.Namespace, settings: run.Settings) -> Iterator[Row]:
    from support.together import Threads

    for dtype, count, classes in ((np.float32, 4096, 1000), (np.float32, 4096, 32000), (np.float64, 4096, 1000)):
        x = np.random.default_rng(0).standard_normal((count, classes)).astype(dtype)
        labels = np.random.default_rng(1).integers(classes, size=count)
        together = Threads(2)

        def work(comm: Any, x: Any = x, labels: Any = labels, classes: int = classes) -> Any:
            half = slice(comm.rank * classes // 2, (comm.rank + 1) * classes // 2)
            engine = VocabParallel(comm, half.start, classes)
            return cross_entropy_value_and_grad(np.ascontiguousarray(x[:, half]), labels, engine=engine)

        found = together.run(work)
        if failed := [each for each in found if isinstance(each, BaseException)]:
            raise failed[0]
        yield {
            "case": f"traffic of {count}x{classes} {np.dtype(dtype).name}, 2 processes", "library": OURS,
            "operation": GRAD, "gib": x.nbytes / 2**30, "bytes per row": max(together.bytes) / count,
            "exchanges": max(together.gathers),
        }  # fmt: skip


JOBS: dict[str, Callable[[argparse.Namespace, run.Settings], Iterator[Row]]] = {
    "threads": on_threads,
    "cluster": on_cluster,
    "memmap": by_memmap,
    "dask-memmap": by_dask_and_memmap,
    "traffic": traffic,
}
