"""`python -m xent_array` and the job in bench/: what a newcomer runs first."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from xent_array import __main__ as program
from xent_array._engines import cpu

ROOT = Path(__file__).parents[1]


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(program, "SIZE", (8, 100))


def test_as_a_command_it_prints_the_worked_example_per_engine():
    done = subprocess.run([sys.executable, "-m", "xent_array"], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    for engine in ("cpu", "numpy", "generic"):
        report = done.stdout.partition(f"engine '{engine}' on NumPy arrays: right\n")[2].split("\n\n")[0]
        assert "softmax   [[0.659, 0.242, 0.099], [0.073, 0.487, 0.440]]" in report
        assert "H         [1.417, 2.620]    mean 2.019" in report
        assert "gradient  [[0.330, -0.379, 0.049], [-0.464, 0.243, 0.220]]" in report
        assert re.search(r"ms, [\d.]+ GB/s \(a copy: [\d.]+ GB/s\)", report)


def test_json_says_why_an_engine_is_not_available(small, capsys):
    assert program.main(["--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"]
    assert report["packages"]["numpy"] == np.__version__
    entries = {(entry["engine"], entry["library"]): entry for entry in report["engines"]}
    assert entries["cpu", "NumPy"]["available"]
    assert entries["generic", "NumPy"]["available"]
    declined = entries["cpu", "CuPy"]
    assert not declined["available"]
    assert "CuPy" in declined["reason"] or "NumPy" in declined["reason"]


def test_a_wrong_engine_is_found_and_is_an_exit_code(small, monkeypatch, capsys):
    right = cpu.engine.loss_and_grad

    def wrong(rows, out=None):
        loss, grad = right(rows, out)
        grad[0] += rows.acc.type(1e-5)
        return loss, grad

    monkeypatch.setattr(cpu.engine, "loss_and_grad", wrong)
    assert program.main([]) == 1
    assert "engine 'cpu' on NumPy arrays: WRONG by 1.0e-05" in capsys.readouterr().out


def test_digits_are_learnt():
    command = [sys.executable, "bench/train_digits.py", "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert float(re.search(r"accuracy ([\d.]+)%", done.stdout)[1]) >= 95
