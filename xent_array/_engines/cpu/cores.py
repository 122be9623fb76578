"""How many threads a large problem may use."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache, lru_cache
from pathlib import Path, PurePosixPath


def threads() -> int:
    """How many threads a large problem may use: XENT_ARRAY_NUM_THREADS, or else the smallest limit that is set.

    The limits are:

    - the number of cores this process may run on (its affinity mask), or in its place the value of ``-X cpu_count`` or
      PYTHON_CPU_COUNT, which Python itself honors from version 3.13 on;
    - on Linux, the CPU quota of its cgroups, in cores, rounded up (read only once);
    - OMP_NUM_THREADS, which joblib, loky, Dask and torchrun set in their workers, so that all of them together have as
      many threads as there are cores (``inner_max_num_threads`` of joblib sets it, too);
    - what `at_most` says, in the threads of Dask.
    """
    return _least(_cores(), _quota(), _own.limit, sys._xoptions.get("cpu_count"), *_environment())


class _Own(threading.local):
    limit: int | None = None


_own = _Own()


@contextmanager
def at_most(count: int | None) -> Iterator[None]:
    """Limits the number of threads in calls that this thread makes meanwhile; None sets no limit."""
    before, _own.limit = _own.limit, count
    try:
        yield
    finally:
        _own.limit = before


@lru_cache(maxsize=8)
def _least(
    cores: int, quota: int | None, own: int | None, option: str | bool | None, asked: str, count: str, omp: str
) -> int:
    if asked.strip():
        found = _number(asked)
        if found is None:
            raise ValueError(
                f"XENT_ARRAY_NUM_THREADS must be a whole number of threads, at least 1; got {asked.strip()!r}"
            )
        return found
    # A list such as "4,2" has one number for each level of nesting; the first one applies here.
    limits = _number(count if option is None else option) or cores, quota, own, _number(omp.partition(",")[0])
    return min(limit for limit in limits if limit is not None)


_NAMES = "XENT_ARRAY_NUM_THREADS", "PYTHON_CPU_COUNT", "OMP_NUM_THREADS"
_KEYS = tuple(getattr(os.environ, "encodekey", str)(name) for name in _NAMES)


def _environment() -> Iterable[str]:
    """The values of these variables, "" for one that is not set."""
    data = getattr(os.environ, "_data", None)  # each lookup in `os.environ` itself raises and catches an exception
    if data is not None and not any(key in data for key in _KEYS):
        return "", "", ""
    return (os.environ.get(name, "") for name in _NAMES)


def _number(text: str | bool) -> int | None:
    """A whole number of at least 1; None for any other text."""
    text = str(text).strip()
    return int(text) or None if text.isascii() and text.isdecimal() else None


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@cache
def _quota() -> int | None:
    return quota(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))


def quota(groups: Path, mount: Path) -> int | None:
    """The number of cores that the cgroups of a process allow it; None if they set no limit.

    `groups` is the list of its cgroups, as the kernel writes it, and `mount` is where their files are. The limits of
    all ancestors of a group apply to it, too. In a container the list may name directories that are not visible there;
    the files at the top are then those of the container.
    """
    shares = []
    for folder in _folders(groups, mount):
        share = _share(folder)
        if share is not None:
            shares.append(share)
    return min(shares, default=None)


def _folders(groups: Path, mount: Path) -> Iterator[Path]:
    """Where there may be a CPU quota: the directory of a process's cgroup, and those of all its ancestors."""
    lines = []
    with suppress(OSError, UnicodeDecodeError):
        lines = groups.read_text().splitlines()
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and "cpu" not in controllers.split(","):
            continue
        steps = [step for step in PurePosixPath(path).parts if step not in ("/", "..")]
        tops = [mount / name for name in dict.fromkeys((controllers, "cpu", "cpu,cpuacct"))] if controllers else [mount]
        for top in tops:
            for depth in range(len(steps) + 1):
                yield top.joinpath(*steps[:depth])


def _share(folder: Path) -> int | None:
    """The quota of one cgroup, in cores, rounded up; None if it has none."""
    with suppress(OSError, ValueError):  # cgroup version 1
        limit = int((folder / "cpu.cfs_quota_us").read_text())
        return _rounded_up(limit, int((folder / "cpu.cfs_period_us").read_text()))
    with suppress(OSError, ValueError):  # cgroup version 2, where "max" means no limit
        limit, period = map(int, (folder / "cpu.max").read_text().split())
        return _rounded_up(limit, period)
    return None


def _rounded_up(limit: int, period: int) -> int | None:
    return -(-limit // period) if limit > 0 and period > 0 else None
