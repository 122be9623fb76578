"""How many threads a large problem may use, of what limits a process."""

import os
import subprocess
import sys

import numpy as np
import pytest

from xent_array import cross_entropy
from xent_array._engines.cpu import cores

VARIABLES = ("XENT_ARRAY_NUM_THREADS", "PYTHON_CPU_COUNT", "OMP_NUM_THREADS")


@pytest.fixture
def limited(monkeypatch):
    """Sets what is said of a process that may run on 12 cores; what is not named is not there."""
    monkeypatch.setattr(sys, "_xoptions", {})
    monkeypatch.setattr(cores, "_cores", lambda: 12)

    def limited(quota=None, **environment):
        monkeypatch.setattr(cores, "_quota", lambda: quota)
        for name in VARIABLES:
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        return cores.threads()

    return limited


def test_the_least_of_what_limits(limited):
    assert limited() == 12
    assert limited(quota=3) == 3
    assert limited(quota=30) == 12
    assert limited(OMP_NUM_THREADS="4") == 4
    assert limited(OMP_NUM_THREADS="40") == 12
    assert limited(PYTHON_CPU_COUNT="5") == 5
    assert limited(PYTHON_CPU_COUNT="16") == 16  # it stands in the place of the mask
    assert limited(quota=3, PYTHON_CPU_COUNT="16") == 3
    assert limited(quota=3, OMP_NUM_THREADS="2", PYTHON_CPU_COUNT="16") == 2
    assert limited(quota=3, OMP_NUM_THREADS="2", PYTHON_CPU_COUNT="1") == 1


def test_our_own_variable_beats_all(limited):
    assert limited(quota=3, OMP_NUM_THREADS="2", PYTHON_CPU_COUNT="1", XENT_ARRAY_NUM_THREADS=" 40 ") == 40


@pytest.mark.parametrize("value", ["0", "-1", "two", "2.5", "\N{ARABIC-INDIC DIGIT THREE}"])
def test_our_own_variable_is_checked(limited, value):
    told = f"^XENT_ARRAY_NUM_THREADS must be a whole number of threads, at least 1; got '{value}'$"
    with pytest.raises(ValueError, match=told):
        limited(XENT_ARRAY_NUM_THREADS=value)
    with pytest.raises(ValueError, match=told):  # of a call that is large enough for threads
        cross_entropy(np.zeros((3000, 100)), np.zeros(3000, int))


@pytest.mark.parametrize("value", ["", " "])
def test_our_own_variable_may_be_empty(limited, value):
    assert limited(XENT_ARRAY_NUM_THREADS=value) == 12


def test_an_option_of_python_beats_its_variable(limited, monkeypatch):
    monkeypatch.setattr(sys, "_xoptions", {"cpu_count": "7"})
    assert limited(PYTHON_CPU_COUNT="5") == 7
    monkeypatch.setattr(sys, "_xoptions", {"cpu_count": "default"})
    assert limited(PYTHON_CPU_COUNT="5") == 12
    monkeypatch.setattr(sys, "_xoptions", {"cpu_count": True})  # -X cpu_count
    assert limited(PYTHON_CPU_COUNT="5") == 12


@pytest.mark.parametrize(
    ("value", "count"),
    [("4,2", 4), (" 4 ", 4), ("0", 12), ("-1", 12), ("all", 12), ("", 12), ("\N{ARABIC-INDIC DIGIT THREE}", 12)],
)
def test_values_of_openmp(limited, value, count):
    """Of levels of nesting the first; what is no number of threads says nothing."""
    assert limited(OMP_NUM_THREADS=value) == count


def written(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


def quota(tmp_path, groups):
    (tmp_path / "cgroup").write_text(groups)
    return cores.quota(tmp_path / "cgroup", tmp_path / "fs")


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("max 100000\n", None), ("200000 100000\n", 2), ("150000 100000\n", 2), ("1000 100000\n", 1),
        ("50000 20000\n", 3), ("", None), ("nonsense\n", None), ("100000 0\n", None),
    ],
)  # fmt: skip
def test_version_2(tmp_path, text, count):
    written(tmp_path / "fs" / "job" / "step", cpu__max=text)
    assert quota(tmp_path, "0::/job/step\n") == count


@pytest.mark.parametrize("folder", ["cpu", "cpu,cpuacct"])
@pytest.mark.parametrize(
    ("limit", "period", "count"), [("-1", "100000", None), ("250000", "100000", 3), ("5000", "10000", 1)]
)
def test_version_1(tmp_path, folder, limit, period, count):
    written(tmp_path / "fs" / folder / "job", cpu__cfs_quota_us=f"{limit}\n", cpu__cfs_period_us=f"{period}\n")
    groups = "9:name=systemd:/\n4:memory:/job\n3:cpuset:/other\n2:cpu,cpuacct:/job\n0::/\n"
    assert quota(tmp_path, groups) == count


@pytest.mark.parametrize("inner", [None, "8"])
@pytest.mark.parametrize("outer", [None, "3"])
def test_groups_in_groups(tmp_path, inner, outer):
    """None has more than those that it is part of; and at the top of a container are the container's own files."""
    for folder, count in (("job/step", inner), ("job", outer), ("", "30")):
        written(tmp_path / "fs" / folder, cpu__max="max 100000" if count is None else f"{count}00000 100000")
    expected = min(int(count) for count in (inner, outer, "30") if count is not None)
    assert quota(tmp_path, "0::/job/step\n") == expected
    assert quota(tmp_path, "0::/not/to/be/seen\n") == 30
    assert quota(tmp_path, "0::/../../job/step\n") == expected
    assert quota(tmp_path, "0::/a:b\n") == 30


def test_both_versions(tmp_path):
    written(tmp_path / "fs" / "cpu", cpu__cfs_quota_us="400000", cpu__cfs_period_us="100000")
    written(tmp_path / "fs", cpu__max="500000 100000")
    assert quota(tmp_path, "1:cpu:/\n0::/\n") == 4


def test_no_groups(tmp_path):
    assert cores.quota(tmp_path / "none", tmp_path) is None
    assert quota(tmp_path, "nonsense\n\n0::/\n") is None


def test_of_this_process():
    """The process's own, whatever they are, are read without failing, and its mask is followed."""
    script = "from xent_array._engines.cpu import cores; print(cores.threads())"
    if hasattr(os, "sched_setaffinity"):
        script = "import os; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))]); " + script
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    told = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert int(told.stdout) == 1 or (not hasattr(os, "sched_setaffinity") and int(told.stdout) >= 1)


def test_workers_of_joblib():
    """They have as many threads as joblib gives them."""
    joblib = pytest.importorskip("joblib")
    script = """
import os
from joblib import Parallel, delayed, parallel_config
from xent_array._engines.cpu import cores

def threads():
    cores._cores = lambda: 64
    return cores.threads()

for name in ("XENT_ARRAY_NUM_THREADS", "OMP_NUM_THREADS"):
    os.environ.pop(name, None)
with parallel_config("loky", inner_max_num_threads=3):
    print(Parallel(n_jobs=2)(delayed(threads)() for _ in range(2)))
"""
    assert joblib.__version__
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=100)
    assert told.stdout.strip() == "[3, 3]"
