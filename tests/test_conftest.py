"""How the tests are run: what is left out by default, what --require refuses, what is counted over processes."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.full

ROOT = Path(__file__).parents[1]


def run(tmp_path, text, *options):
    """pytest with our conftest.py on a file of these tests, in a process that can find no Torch."""
    (tmp_path / "test_some.py").write_text(text)
    blocked = "import sys; sys.modules['torch'] = None; import pytest; sys.exit(pytest.main())"
    command = [sys.executable, "-c", blocked, "-p", "conftest", "-p", "no:cacheprovider", "-c", ROOT / "pyproject.toml"]
    command += ["--rootdir", ROOT, *options, tmp_path]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    command = list(map(str, command))
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment)


MARKED = """
import pytest

def test_short(): pass

@pytest.mark.full
def test_long(): pass

@pytest.mark.full(but_one_per="family")
@pytest.mark.parametrize("dtype", ["float32", pytest.param("float16", marks=pytest.mark.full), "float64"])
@pytest.mark.parametrize("family", ["T", "W", "B"])
def test_family(family, dtype): pass
"""


def test_what_takes_long_is_left_out_and_counted(tmp_path):
    done = run(tmp_path, MARKED, "-v")
    assert re.search(r"tests that take long: 7; pytest --full runs them too\n=+ 4 passed, 7 deselected", done.stdout)
    families = re.findall(r"test_family\[(\w)-(\w+)\] PASSED", done.stdout)
    assert [family for family, _ in families] == ["T", "W", "B"]
    assert {dtype for _, dtype in families} == {"float32", "float64"}


def test_full_leaves_out_nothing(tmp_path):
    done = run(tmp_path, MARKED, "--full")
    assert re.search(r"=+ 11 passed in ", done.stdout)
    assert "left out" not in done.stdout


SKIPPED = {
    "a module": "import pytest\npytest.importorskip('torch')\ndef test_a(): pass",
    "a test": "import pytest\ndef test_a(): pytest.importorskip('torch')",
    "a backend": "def test_a(backend): pass",
}


@pytest.mark.parametrize("what", SKIPPED)
def test_what_is_required_may_not_be_skipped(tmp_path, what):
    done = run(tmp_path, SKIPPED[what])
    assert done.returncode in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED)  # skipped, in sight:
    assert "SKIPPED [" in done.stdout
    required = run(tmp_path, SKIPPED[what], "--require", "numpy", "--require", "torch")
    assert required.returncode == pytest.ExitCode.USAGE_ERROR
    assert "ERROR: --require torch: " in required.stderr


def test_what_is_required_and_there_changes_nothing(tmp_path):
    done = run(tmp_path, "def test_a(): pass", "--require", "numpy", "--require", "json")
    assert done.returncode == 0, done.stderr


def test_a_backend_that_is_there_may_not_be_skipped_where_it_is_required(tmp_path):
    text = "import pytest\ndef test_a(backend): pytest.skip('a reason')"
    done = run(tmp_path, text, "-k", "numpy", "--require", "numpy")
    assert "--require numpy: a reason" in done.stdout
    assert "numpy: 0 passed, 1 failed, 0 skipped\nnumpy-readonly: 0 passed, 0 failed, 1 skipped" in done.stdout


COUNTED = """
import pytest
from support import tally

@pytest.mark.parametrize("number", range(8))
def test_counted(number):
    tally.COUNTS["planted"] += 1
    tally.COUNTS["caught"] += number % 2
    tally.KERNELS.add(f"kernel {number % 3}")

@pytest.mark.full
def test_long(): pass
"""


@pytest.mark.parametrize("processes", [0, 2])
def test_what_is_counted_over_processes(tmp_path, processes):
    if processes:
        pytest.importorskip("xdist")
    done = run(tmp_path, COUNTED, *(["-n", str(processes)] if processes else []))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 of 8 planted bugs caught" in done.stdout
    assert "3 run under emulation" in done.stdout
    assert "tests that take long: 1;" in done.stdout
