"""`python -m xent_array` and the job in bench/: what a newcomer runs first."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import xent_array
from xent_array import __main__ as program
from xent_array._engines import cpu

ROOT = Path(__file__).parents[2]


def run(*arguments, **environment):
    command, environment = [sys.executable, *arguments], {**os.environ, **environment}
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(program, "SIZE", (8, 100))


@pytest.mark.full
def test_the_first_command_of_the_readme_runs_what_it_installed(tmp_path):
    """Its second half, in the checkout: the report says that the package is the one that pip has put elsewhere."""
    installed = tmp_path / "site"
    shutil.copytree(ROOT / "xent_array", installed / "xent_array", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "kernels", installed / "xent_array" / "kernels")
    command = re.search(r"^\$ pip install \S+ && python (.*)$", (ROOT / "README.md").read_text(), re.MULTILINE)[1]
    done = run(*shlex.split(command), PYTHONPATH=str(installed))
    assert done.returncode == 0, done.stderr
    assert f"\nruns from: {installed / 'xent_array'}\n" in done.stdout
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


@pytest.mark.parametrize("version", [None, "0.44"])
def test_without_llvmlite_the_report_says_what_would_bring_it(small, monkeypatch, version):
    report = program.gather()
    report["packages"]["llvmlite"] = version
    first = program.text(report).partition("\n\n")[0]
    assert ('pip install ".[cpu]" brings LLVM' in first) == (version is None)


@pytest.mark.parametrize("absent", [(), ("cupy",), ("cupy", "ml_dtypes"), ("torch", "jax")])
def test_the_report_says_which_engines_take_tensors(small, monkeypatch, absent):
    found = {name: name not in absent for name in ("torch", "jax", "cupy", "ml_dtypes")}
    monkeypatch.setattr(program, "_is_there", found.__getitem__)
    monkeypatch.setattr(program, "_libraries", list)
    lines = [line for line in program.text(program.gather()).splitlines() if line.startswith(("PyTorch", "JAX"))]
    without = "engine 'generic', because CuPy is not installed" if "cupy" in absent else "engine 'cuda'"
    told = f"arrays, host memory: engine 'cpu'; a GPU: {without}"
    if "ml_dtypes" in absent:
        told += "; bfloat16: engine 'generic', because ml_dtypes is not installed"
    assert lines == ([] if "torch" in absent else [f"PyTorch {told}", f"JAX {told}"])


def test_version(capsys):
    with pytest.raises(SystemExit, match=r"^0$"):
        program.main(["--version"])
    assert capsys.readouterr().out == f"xent_array {xent_array.__version__}\n"


def test_explain(capsys):
    assert program.main(["--explain", "64x21x32x32:bf16@axis1+z"]) == 0
    assert capsys.readouterr().out.startswith("65536 rows of 21 bfloat16 logits, 42 bytes each, on sm_90\n")
    with pytest.raises(SystemExit, match=r"^2$"):
        program.main(["--explain", "64x21"])
    assert "'64x21' is not like 4096x50257:bf16@sm90+softcap" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "needs"),
    [
        ("-m xent_array", "numpy"),
        ("-m bench gpu", "numpy"),
        ("-m bench model", "numpy"),
        ("-m bench tune", "numpy"),
        ("-m bench.launches", "ml_dtypes"),
        ("-m bench", "tqdm"),
        ("-m bench report", "tqdm"),
        ("-m bench tensors", "tqdm"),
        ("-m bench host", "numpy"),
        ("-m bench linear", "numpy"),
        ("bench/train_char_lm.py", "numpy"),
        ("bench/train_digits.py", "sklearn"),
    ],
)
def test_every_program_runs_without_docstrings(command, needs):
    pytest.importorskip(needs)
    done = run("-OO", *command.split(), "--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: ")


def test_a_wrong_engine_is_found_and_is_an_exit_code(small, monkeypatch, capsys):
    right = cpu.engine.loss_and_grad

    def wrong(rows, out=None):
        loss, grad = right(rows, out)
        grad[0] += rows.acc.type(1e-5)
        return loss, grad

    monkeypatch.setattr(cpu.engine, "loss_and_grad", wrong)
    assert program.main([]) == 1
    assert "engine 'cpu' on NumPy arrays: WRONG by 1.0e-05" in capsys.readouterr().out


@pytest.mark.full
def test_digits_are_learnt():
    pytest.importorskip("sklearn")
    pytest.importorskip("tqdm")
    done = run("bench/train_digits.py", "--quiet")
    assert done.returncode == 0, done.stderr
    assert float(re.search(r"accuracy ([\d.]+)%", done.stdout)[1]) >= 95
