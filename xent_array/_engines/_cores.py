"""How many threads a large problem may use."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path, PurePosixPath


def threads() -> int:
    """How many threads a large problem may use: XENT_ARRAY_NUM_THREADS, or else the least of what limits them.

    These are, each where it is given:

    - the cores this process may run on (its affinity mask), or in their place what ``-X cpu_count`` or
      PYTHON_CPU_COUNT says, which are Python's own from 3.13 on;
    - the processor time that its control groups leave it, on Linux, in whole cores, rounded up; read once;
    - OMP_NUM_THREADS, which joblib, loky, Dask and torchrun set in their workers so that all together have as many
      threads as there are cores (``inner_max_num_threads`` of joblib is that).
    """
    asked = os.environ.get("XENT_ARRAY_NUM_THREADS", "").strip()
    if asked:
        found = _number(asked)
        if found is None:
            raise ValueError(f"XENT_ARRAY_NUM_THREADS must be a whole number of threads, at least 1; got {asked!r}")
        return found
    told = sys._xoptions.get("cpu_count", os.environ.get("PYTHON_CPU_COUNT", ""))
    # Of levels of nesting, "4,2", the first one is meant.
    limits = _number(told) or _cores(), _quota(), _number(os.environ.get("OMP_NUM_THREADS", "").partition(",")[0])
    return min(limit for limit in limits if limit is not None)


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
    """The cores that the control groups of a process leave it; None if they do not limit it.

    `groups` is its list of groups, as the kernel writes it, and `mount` where their files are. A group has no more than
    those that it is part of have. In a container the list may name folders that are not to be seen there, and then the
    files at the top are of the container.
    """
    shares = []
    for folder in _folders(groups, mount):
        share = _share(folder)
        if share is not None:
            shares.append(share)
    return min(shares, default=None)


def _folders(groups: Path, mount: Path) -> Iterator[Path]:
    """Where there may be limits of processor time: the group of a process, and all that it is part of."""
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
    """The limit of one group, in cores."""
    with suppress(OSError, ValueError):  # the first version of control groups
        limit = int((folder / "cpu.cfs_quota_us").read_text())
        return _rounded_up(limit, int((folder / "cpu.cfs_period_us").read_text()))
    with suppress(OSError, ValueError):  # the second, where "max" is no number
        limit, period = map(int, (folder / "cpu.max").read_text().split())
        return _rounded_up(limit, period)
    return None


def _rounded_up(limit: int, period: int) -> int | None:
    return -(-limit // period) if limit > 0 and period > 0 else None
