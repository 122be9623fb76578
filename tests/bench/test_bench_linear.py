"""`python -m bench linear` and the language model: small runs, and the README's table."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("tqdm")
pytest.importorskip("ml_dtypes")

from bench import linear

ROOT = Path(__file__).parents[2]
SAVED = ROOT / "bench" / "results" / "linear.json"


def run(*command):
    environment = {**os.environ, "XENT_ARRAY_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment)


def test_the_readme_has_the_table_of_the_last_run():
    saved = json.loads(SAVED.read_text())
    assert f"{linear.table(saved)}\n" in (ROOT / "README.md").read_text()


def test_a_quick_run(tmp_path):
    out = tmp_path / "linear.json"
    done = run(sys.executable, "-m", "bench", "linear", "--quick", "--out", str(out))
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert done.stdout.endswith(f"{linear.table(found)}\n")
    rows = found["rows"]
    assert {linear.TWO_STEPS, linear.OURS} <= set(rows)
    assert (linear.UNCHUNKED in rows) is (importlib.util.find_spec("torch") is not None)
    assert all(row["seconds"] > 0 and row["of_cores"] > 0 for row in rows.values())
    assert found["buffers"] < 4 << 20
    assert rows[linear.OURS]["memory"] < rows[linear.TWO_STEPS]["memory"]


def test_a_wrong_way_is_found():
    right = 1.0, (linear.np.ones(3), linear.np.ones(3))
    wrong = 1.0, (linear.np.ones(3), linear.np.array([1, 1, 1.1]))
    with pytest.raises(AssertionError, match="other: a gradient is wrong"):
        linear.check({linear.TWO_STEPS: lambda: right, "other": lambda: wrong})


@pytest.mark.full
@pytest.mark.parametrize("backend", ["numpy", "torch", "cupy"])
def test_the_language_model_learns(backend):
    pytest.importorskip(backend)
    options = ["--minutes", "0.1", "--classes", "20000", "--rows", "256", "--backend", backend, "--quiet"]
    standin = ["tests/support/standin.py"] if backend == "cupy" else []
    done = run(sys.executable, *standin, "bench/train_char_lm.py", *options)
    assert done.returncode == 0, done.stderr
    first, last = map(float, re.search(r"perplexity ([\d.]+) at the start, ([\d.]+) at the end", done.stdout).groups())
    assert first == 20000
    assert last < first
    if backend != "cupy":  # whose memory the stand-in does not have
        peaks = re.findall(r"peak memory of a training step of 256 rows, (.*): (\d+) MiB", done.stdout)
        assert [name for name, _ in peaks] == ["linear_cross_entropy", "two steps"]
        assert int(peaks[0][1]) < int(peaks[1][1]) + 20
