"""Where llvmlite is absent, broken or fails: NumPy answers in its place, and it is said why."""

import pytest
from support.process import run

from xent_array import __main__ as program
from xent_array._engines import cpu

needs_llvmlite = pytest.mark.skipif(isinstance(cpu.found_loops(), str), reason="llvmlite is not installed")

WITHOUT = """
import sys

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "llvmlite" and sys.argv[1] == "absent":
            raise ModuleNotFoundError("No module named 'llvmlite'", name="llvmlite")
        if name == "llvmlite" and sys.argv[1] == "broken":
            raise ImportError("its library is missing")

sys.meta_path.insert(0, Finder())
import numpy as np
from xent_array import __main__ as program, cross_entropy_value_and_grad
x = np.random.default_rng(0).standard_normal((40, 300), np.float32)
found = [cross_entropy_value_and_grad(x, np.arange(40), z_loss=0.1, engine=engine) for engine in (None, "cpu", "numpy")]
assert len({loss.tobytes() + grad.tobytes() for loss, grad in found}) == 1
program.SIZE = (4, 10)
assert program.main(["--json"]) == 0
assert program.main([]) == 0
"""


@pytest.mark.parametrize(
    ("how", "reason"),
    [("absent", "llvmlite is not installed"), ("broken", "llvmlite cannot be used: its library is missing")],
)
def test_without_llvmlite_it_is_numpy_and_the_report_says_why(how, reason):
    told = run(WITHOUT, how)
    assert f'"reason": "{reason}"' in told
    assert f"loops of engine 'cpu': NumPy, because {reason}\n" in told


WARNED = """
import sys, warnings

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "llvmlite":
            raise ImportError("its library is missing")

sys.meta_path.insert(0, Finder())
import numpy as np
from xent_array import cross_entropy
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    for _ in range(3):
        cross_entropy(np.eye(3), [0, 1, 2])
print(*(f"{each.category.__name__}: {each.message}" for each in told), sep="; ")
"""


def test_an_llvmlite_that_cannot_be_imported_is_told_once():
    told = run(WARNED).strip()
    assert told.startswith("RuntimeWarning: xent_array works with NumPy alone")
    assert told.endswith("llvmlite cannot be used: its library is missing")
    assert told.count("RuntimeWarning") == 1


@needs_llvmlite
def test_a_compilation_that_fails_where_warnings_are_errors(tmp_path):
    script = """
from llvmlite import binding

def fails(*_, **__):
    raise RuntimeError("nothing is compiled here")

binding.parse_assembly = fails
import numpy as np
from xent_array import cross_entropy
for _ in range(2):
    print(cross_entropy(np.eye(3), [0, 1, 2]) == cross_entropy(np.eye(3), [0, 1, 2], engine="numpy"))
"""
    assert run(script, XENT_ARRAY_CACHE_DIR=str(tmp_path)).split() == ["True", "True"]


@needs_llvmlite
def test_the_report_says_that_the_loops_are_compiled(monkeypatch, capsys):
    monkeypatch.setattr(program, "SIZE", (4, 10))
    assert program.main([]) == 0
    assert "loops of engine 'cpu': compiled by LLVM\n" in capsys.readouterr().out


# -- a first compilation that fails --------------------------------------------------------------------------------

FAILING = """
import contextlib, os, sys, warnings
with contextlib.suppress(ImportError):
    import dask.array  # which imports what uses LLVM for itself, where that is installed
import numpy as np
from llvmlite import binding, ir
from xent_array import __main__ as program, cross_entropy_value_and_grad
from xent_array._engines import cpu
from xent_array._engines.cpu import machine_code

what, report_first = sys.argv[1:]
program.SIZE = (4, 10)
tries, compiles = [], binding.parse_assembly

def fails(*_, **__):
    raise RuntimeError("nothing is compiled here")

def fails_once(*given):
    tries.append(given)
    return fails() if len(tries) == 1 else compiles(*given)

if what == "compiler":
    binding.parse_assembly = fails
elif what == "instructions":
    ir.IRBuilder.gep = fails
elif what == "once":
    binding.parse_assembly = fails_once
elif what == "sums":
    from xent_array._engines.cpu.loops import build
    build._OTHERS["total"] = [], fails

def called(function, *given, **options):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        return function(*given, **options), told

def is_said(told):
    (warning,) = told
    wanted = "xent_array works with NumPy alone, which is several times slower: LLVM cannot compile the loops: "
    assert warning.category is RuntimeWarning
    assert str(warning.message).startswith(wanted) and "nothing is compiled here" in str(warning.message), warning
    assert cpu.found_loops() in str(warning.message)

if report_first == "report":
    code, told = called(program.main, [])
    assert code == 0
    is_said(told)
    sys.exit()

def same(found, wanted):
    return [part.tobytes() for part in found] == [part.tobytes() for part in wanted]

rng = np.random.default_rng(0)
for name, shape, axis in [("contiguous", (40, 300), 1), ("transposed", (40, 10), 1), ("strided", (4, 50, 40), 1),
                          ("over threads", (700, 300), 1), ("strided over threads", (4, 50, 1000), 1)]:
    x = rng.standard_normal(shape, np.float32)
    labels = rng.integers(shape[axis], size=np.delete(shape, axis))
    for options in ({}, {"z_loss": 0.1}, {"weight": np.ones(shape[axis])}):
        options = options | {"axis": axis, "reduction": "sum"}
        wanted = cross_entropy_value_and_grad(x, labels, engine="numpy", **options)
        for in_place in (False, True):
            cpu._found, case = None, (name, options, in_place)
            machine_code._functions.clear()
            del tries[:]

            def call():
                logits = x.copy()
                out = logits if in_place else None
                loss, grad = cross_entropy_value_and_grad(logits, labels, out=out, **options)
                assert in_place or (logits == x).all(), case
                return loss, grad

            found, told = called(call)
            if what == "sums" and not told:
                continue  # the loop has added up itself
            is_said(told)
            for part, of_numpy in zip(found, wanted):  # made in part by loops, where only the sum is not compiled
                assert np.allclose(part, of_numpy, rtol=1e-5 if what == "sums" else 0, atol=0), case
            found, told = called(call)
            assert not told and same(found, wanted), case
assert called(program.main, [])[0] == 0
"""


def failing(what, tmp_path, report_first=""):
    """What a process prints, in which the first compilation fails."""
    return run(FAILING, what, report_first, XENT_ARRAY_CACHE_DIR=str(tmp_path), XENT_ARRAY_NUM_THREADS="3")


@needs_llvmlite
@pytest.mark.parametrize(
    "what",
    [
        "compiler",
        "instructions",
        "once",
        "sums",
    ],
)
def test_a_compilation_that_fails(tmp_path, what):
    """NumPy answers, from logits that are as they were, one warning says why, and so does the report."""
    told = failing(what, tmp_path)
    assert "loops of engine 'cpu': NumPy, because LLVM cannot compile the loops: " in told
    assert "nothing is compiled here" in told


@needs_llvmlite
@pytest.mark.parametrize("what", ["compiler", "instructions"])
def test_the_report_compiles_before_it_says_what_is_compiled(tmp_path, what):
    assert "loops of engine 'cpu': NumPy, because LLVM cannot compile the loops: " in failing(what, tmp_path, "report")


NO_FOLDER = """
import pathlib
import numpy as np

def fails(*_, **__):
    raise OSError(30, "Read-only file system")

pathlib.Path.mkdir = fails
from xent_array import __main__ as program, cross_entropy_value_and_grad
from xent_array._engines.cpu import machine_code
x, labels = np.random.default_rng(0).standard_normal((40, 300), np.float32), np.arange(40)
for logits in (x, x[:, :40].copy(), np.asfortranarray(x)):
    loss, grad = cross_entropy_value_and_grad(logits, labels)
    wanted, _ = cross_entropy_value_and_grad(logits, labels, engine="numpy")
    assert abs(loss - wanted) < 1e-5
    again = logits.copy(order="K")
    assert cross_entropy_value_and_grad(again, labels, out=again)[0] == loss and (again == grad).all()
program.SIZE = (4, 10)
assert program.main([]) == 0
print(len(machine_code._functions) > 2)
"""


@needs_llvmlite
def test_no_folder_for_compiled_code(tmp_path):
    """It lives in memory then; that is nothing to warn of."""
    told = run(NO_FOLDER, XENT_ARRAY_CACHE_DIR=str(tmp_path))
    assert "loops of engine 'cpu': compiled by LLVM\n" in told
    assert told.endswith("True\n")
    assert not any(tmp_path.iterdir())
