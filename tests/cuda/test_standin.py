"""What GPU machines run, on the stand-in for CuPy: nothing uses anything that CuPy lacks."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("cupy") is None, reason="asks CuPy for its signatures"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="the emulation needs g++"),
]


def run(*arguments):
    command = [sys.executable, "tests/support/standin.py", *arguments]
    environment = {**os.environ, "XENT_ARRAY_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment)


def test_the_first_command_of_the_readme():
    done = run("-m", "xent_array")
    assert done.returncode == 0, done.stderr
    for engine in ("cuda", "generic"):
        assert f"engine '{engine}' on CuPy arrays: right\n  softmax   [[0.659, 0.242, 0.099]" in done.stdout


def test_a_bare_namespace_is_found():
    """What was once handed to `generic` by mistake: CuPy itself, whose arange takes no device."""
    code = """
from xent_array import __main__ as program
from xent_array._rows import Rows
program.SIZE = (8, 100)
program._rows = lambda xp: Rows(xp, xp.asarray(program.LOGITS, dtype=xp.float32)[:, :, None], xp.dtype(xp.float32))
program.main([])
"""
    done = run("-c", code)
    assert done.returncode == 1
    assert done.stderr.endswith("TypeError: got an unexpected keyword argument 'device'\n")


def smaller(code):
    for number, instead in (("8192", "64"), ("50257", "503"), ("4096", "64"), ("1000", "100")):
        code = code.replace(number, instead)
    return code


def test_the_examples_of_the_readme():
    text = (ROOT / "README.md").read_text()
    (gpu,) = re.findall(r"(?m)^    import cupy\n(?:    .*\n)+", text)
    (first,) = re.findall(r"```python\n(import numpy as np +# or: import cupy as np\n.*?)```", text, re.DOTALL)
    code = smaller(first.replace("import numpy as np", "import cupy as np") + re.sub("(?m)^    ", "", gpu))
    code += """
assert grad is logits and type(loss) is cupy.ndarray and loss.shape == () and rows.shape == (64,)
assert 0 < float(loss) < 20 and 0 <= float(accuracy) <= 1 < float(perplexity)
"""
    done = run("-c", code)
    assert done.returncode == 0, done.stderr


def test_digits_are_learnt():
    pytest.importorskip("sklearn")
    pytest.importorskip("tqdm")
    done = run("bench/train_digits.py", "--backend", "cupy", "--epochs", "3", "--quiet")
    assert done.returncode == 0, done.stderr
    assert float(re.search(r"accuracy ([\d.]+)%", done.stdout)[1]) >= 85


def test_the_launches_that_are_for_a_gpu():
    done = run("-m", "bench.launches", "--part", "2/90")
    assert done.returncode == 0, done.stderr
    assert re.search(r"[1-9]\d* problems, [1-9]\d* kernels, [1-9]\d* launches, 0 wrong", done.stdout)


TWO_GPUS = """
from bench import nccl
from support.together import Nccl
together = Nccl(2)
shapes = ((5, 7), (4, 70))
found = together.run(lambda communicator: [*nccl.checked(communicator, shapes)])
for lines in found:
    assert len(lines) == 16 and all(line["right"] for line in lines), lines
nccl.CALLS = nccl.ROUNDS = 1
found = together.run(lambda communicator: [*nccl.timed(communicator, ((8, 20),))])
for lines in found:
    assert len(lines) == 2 and all(line["call_us"] > line["exchange_us"] > 0 for line in lines), lines
"""


@pytest.mark.full
def test_what_is_for_two_gpus():
    done = run("-c", TWO_GPUS)
    assert done.returncode == 0, done.stderr


def test_one_gpu_is_too_few_for_two():
    done = run("-m", "bench.nccl")
    assert (done.returncode, done.stdout) == (0, "skipped: this needs 2 GPUs, and the machine has 1\n")


SLICES = """
import cupy
from support.together import DeviceThreads
from xent_array import cross_entropy_value_and_grad
from xent_array.parallel import VocabParallel
x, y = cupy.random.standard_normal((6, 9)), cupy.arange(6)
whole = cross_entropy_value_and_grad(x, y)
parts = [(0, 4), (4, 9)]

def work(communicator):
    start, stop = parts[communicator.rank]
    engine = VocabParallel(communicator, start, 9)
    return cross_entropy_value_and_grad(cupy.ascontiguousarray(x[:, start:stop]), y, engine=engine)

for (start, stop), (loss, grad) in zip(parts, DeviceThreads(2).run(work)):
    assert type(loss) is cupy.ndarray and abs(float(loss) - float(whole[0])) < 1e-12
    assert abs(grad - whole[1][:, start:stop]).max() < 1e-15
"""


def test_slices_of_cupy_arrays():
    done = run("-c", SLICES)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "words",
    [
        "cupy and (bad_class or every_integer or ignore_index_none or goes_to or worked_example)",
        pytest.param("cupy", marks=pytest.mark.full),
    ],
    ids=["some", "all"],
)
def test_the_tests_of_cupy_arrays(words):
    files = [
        f"tests/behaviour/test_{name}.py" for name in ("semantics", "libraries", "engines", "api", "invariance", "rows")
    ]
    done = run("-m", "pytest", "-q", "-p", "no:cacheprovider", "--require", "cupy", *files, "-k", words)
    assert done.returncode == 0, done.stdout[-5000:]
    assert re.search(r"(?m)^cupy: [1-9]\d+ passed, 0 failed, 0 skipped", done.stdout)


# -- the stand-in itself


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("cupy.arange(3, device=cupy.cuda.Device())", "'device'"),
        ("cupy.exp(cupy.ones(3), where=True)", "'where'"),
        ("cupy.sum(cupy.ones(3), initial=1)", "'initial'"),
        ("numpy.asarray(cupy.ones(3))", "not allowed"),
        ("cupy.ones(3) + numpy.ones(3)", "Unsupported type"),
        ("numpy.ones(3) + cupy.ones(3)", "unsupported operand|Unsupported type"),
        ("cupy.maximum(numpy.ones(3), cupy.ones(3))", "Unsupported type"),
        ("cupy.ones(3).flags.writeable", "no attribute 'writeable'"),
        ("cupy.mgrid2", "no attribute 'mgrid2'"),
    ],
)
def test_what_cupy_does_not_take(code, message):
    done = run("-c", f"import cupy, numpy\n{code}")
    assert done.returncode == 1
    assert re.search(message, done.stderr.splitlines()[-1])


def test_results_are_arrays_of_cupy():
    done = run(
        "-c",
        """
import cupy, numpy
x = cupy.asarray(numpy.arange(6.0)).reshape(2, 3)
for found in (x.sum(), cupy.sum(x), x[0, 0], x.argmax(axis=1), x @ x.T, -x, x == x, 2 * x, x.T, cupy.exp(x)):
    assert type(found) is cupy.ndarray, type(found)
assert type(x.get()) is numpy.ndarray and float(x.sum()) == 15 and x.device == cupy.cuda.Device(0)
""",
    )
    assert done.returncode == 0, done.stderr


LINEAR = """
import cupy, numpy as np
from xent_array import cross_entropy_value_and_grad, linear_cross_entropy, linear_cross_entropy_value_and_grad
from xent_array._linear import products, run

rng = np.random.default_rng(0)
hidden, head, bias = (rng.standard_normal(shape) for shape in ((40, 6), (CLASSES, 6), (CLASSES,)))
labels = rng.integers(0, CLASSES, 40)
labels[7] = -100
hidden[7] = np.nan
made, sizes = [], []
empty = products.OfCuPy.empty
products.OfCuPy.empty = lambda self, shape, dtype, like: made.append(shape) or empty(self, shape, dtype, like)
logits = products.OfCuPy.logits
products.OfCuPy.logits = lambda self, *args: made.append("logits") or logits(self, *args)

def wait(*args):
    raise AssertionError("the host waits for the GPU")

for dtype, reduction, budget in DTYPES:
    given = [cupy.asarray(each.astype(dtype)) for each in (hidden, head, bias)]
    options = {"reduction": reduction, "memory_budget": budget}
    waiting = {name: getattr(cupy.ndarray, name) for name in ("__bool__", "__int__", "__float__", "get", "item")}
    for name in waiting:
        setattr(cupy.ndarray, name, wait)
    made.clear()
    target = cupy.asarray(labels)
    loss, grads = linear_cross_entropy_value_and_grad(*given[:2], target, linear_bias=given[2], **options)
    sizes.append(made.count("logits"))
    assert "logits" not in made[: made.index("logits")] and set(made[made.index("logits") :]) == {"logits"}, made
    alone = linear_cross_entropy(*given[:2], target, linear_bias=given[2], **options)
    for name, function in waiting.items():
        setattr(cupy.ndarray, name, function)
    wide = [each.get().astype(np.float64) for each in given]
    right, grad = cross_entropy_value_and_grad(wide[0] @ wide[1].T + wide[2], labels, reduction=reduction)
    counts = labels != -100
    wanted = grad @ wide[1], grad[counts].T @ wide[0][counts], grad.sum(axis=0)
    close = {"float16": 1e-3, "float32": 1e-5, "float64": 1e-11}[dtype]
    for got, true in zip((loss, alone, *grads), (right, right, *wanted)):
        assert type(got) is cupy.ndarray
        assert got.dtype == (dtype if got.shape else loss.dtype) or reduction == "none"
        np.testing.assert_allclose(got.get().astype(np.float64), true, rtol=close, atol=close * abs(true).max())
print(sizes)
"""


def test_linear_cross_entropy_waits_for_nothing_and_allocates_nothing_between_chunks():
    """The default budget takes all rows at once; less takes them in chunks, or the classes in slices."""
    cases = [("float32", "mean", None), ("float32", "none", "14kB"), ("float16", "mean", None)]
    done = run("-c", f"CLASSES, DTYPES = 203, {cases!r}\n{LINEAR}")
    assert done.returncode == 0, done.stderr
    sizes = eval(done.stdout)
    assert sizes[0] == 1
    assert sizes[1] >= 3
    assert sizes[2] == 1


def test_linear_cross_entropy_of_slices():
    cases = [("float64", "sum", "200kB"), ("float16", "mean", "100kB")]
    done = run("-c", f"CLASSES, DTYPES = 3003, {cases!r}\n{LINEAR}")
    assert done.returncode == 0, done.stderr
    assert min(eval(done.stdout)) > 3
