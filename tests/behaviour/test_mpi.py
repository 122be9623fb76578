"""`VocabParallel` and `BatchParallel` over MPI, in processes of their own: equal to a single process."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support import process

pytest.importorskip("mpi4py")
MPIEXEC = shutil.which("mpiexec") or shutil.which("mpiexec", path=Path(sys.executable).parent)
if MPIEXEC is None:
    pytest.skip("there is no mpiexec", allow_module_level=True)

EQUAL = """
import itertools
import numpy as np
from mpi4py import MPI
from xent_array import cross_entropy_value_and_grad
from xent_array.parallel import BatchParallel, VocabParallel

comm = MPI.COMM_WORLD
rank, size = comm.rank, comm.size
rng = np.random.default_rng(0)
for classes in (1, 3, 10, 101, 700):  # fewer than ranks, not divisible, long rows
    logits, soft = 3 * rng.standard_normal((50, classes)), rng.random((50, classes))
    labels = rng.integers(0, classes, 50)
    labels[::9] = -100
    weight, sample_weight = rng.random(classes) + 0.1, rng.random(50)
    step = -(-classes // size)
    start, stop = min(classes, rank * step), min(classes, rank * step + step)
    first, last = rank * 50 // size, (rank + 1) * 50 // size
    for target, options in itertools.product((labels, soft), (
        {}, {"reduction": "none"}, {"weight": weight, "sample_weight": sample_weight}, {"softcap": 3.0, "z_loss": 0.1},
        {"label_smoothing": 0.2, "weight": weight},
    )):
        loss, grad = cross_entropy_value_and_grad(logits, target, **options)
        slices = VocabParallel(comm, start, classes)
        here = target[:, start:stop] if target is soft else target
        mine, part = cross_entropy_value_and_grad(logits[:, start:stop], here, engine=slices, **options)
        assert np.allclose(mine, loss, rtol=1e-12, atol=0), (classes, options)
        assert np.allclose(part, grad[:, start:stop], rtol=1e-12, atol=1e-16), (classes, options)
        assert len(set(comm.allgather(np.asarray(mine).tobytes()))) == 1
        batch = {name: value[first:last] if name == "sample_weight" else value for name, value in options.items()}
        given = logits[first:last], target[first:last]
        mine, part = cross_entropy_value_and_grad(*given, engine=BatchParallel(comm), **batch)
        total = np.concatenate(comm.allgather(mine)) if "reduction" in options else comm.allreduce(mine)
        assert np.allclose(total, loss, rtol=1e-12, atol=0), (classes, options)
        assert np.allclose(part, grad[first:last], rtol=1e-12, atol=1e-16), (classes, options)
if rank == 0:
    print("equal")
"""

BOTH = """
import sys
import numpy as np
from mpi4py import MPI
from xent_array import cross_entropy_value_and_grad
from xent_array.parallel import VocabParallel

comm = MPI.COMM_WORLD
data, model = comm.Split(comm.rank % 2), comm.Split(comm.rank // 2)
rng = np.random.default_rng(0)
every, targets, classes = rng.standard_normal((50, 101)), rng.integers(0, 101, 50), 101
targets[:20:3] = -100  # most of them in the first half of the rows
rows, columns = slice(25 * data.rank, 25 * data.rank + 25), slice(51 * model.rank, 51 * model.rank + 51)
logits, labels, start = every[rows, columns], targets[rows], columns.start
exec(sys.argv[1])
wanted, gradient = cross_entropy_value_and_grad(every, targets)
assert np.isclose(data.allreduce(loss), wanted, rtol=1e-12, atol=0)
assert np.allclose(grad, gradient[rows, columns], rtol=1e-12, atol=1e-16)
if comm.gather("equal"):
    print("equal")
"""

ON_A_DEVICE = """
import itertools
import cupy
import numpy as np
from mpi4py import MPI
from xent_array import cross_entropy_value_and_grad
from xent_array.parallel import BatchParallel, VocabParallel

comm = MPI.COMM_WORLD
rank, size = comm.rank, comm.size
rng = np.random.default_rng(0)
for classes in (3, 10, 101):
    logits, soft = 3 * rng.standard_normal((20, classes)), rng.random((20, classes))
    labels = rng.integers(0, classes, 20)
    labels[::9] = -100
    weight, sample_weight = rng.random(classes) + 0.1, rng.random(20)
    step = -(-classes // size)
    start, stop = min(classes, rank * step), min(classes, rank * step + step)
    first, last = rank * 20 // size, (rank + 1) * 20 // size
    for target, options in itertools.product((labels, soft), (
        {}, {"weight": weight, "sample_weight": sample_weight}, {"softcap": 3.0, "z_loss": 0.1},
        {"label_smoothing": 0.2, "weight": weight, "validate": True},
    )):
        loss, grad = cross_entropy_value_and_grad(logits, target, **options)
        given = {name: cupy.asarray(v) if isinstance(v, np.ndarray) else v for name, v in options.items()}
        here = target[:, start:stop] if target is soft else target
        x = cupy.asarray(np.ascontiguousarray(logits[:, start:stop])), cupy.asarray(np.ascontiguousarray(here))
        slices = VocabParallel(comm, start, classes)
        mine, part, stats = cross_entropy_value_and_grad(*x, engine=slices, return_stats=True, **given)
        assert (stats.correct is None) == (target is soft)
        assert type(mine) is type(part) is cupy.ndarray
        assert np.allclose(mine.get(), loss, rtol=1e-12, atol=0), (classes, options, mine, loss)
        assert np.allclose(part.get(), grad[:, start:stop], rtol=1e-12, atol=1e-16), (classes, options)
        batch = {name: value[first:last] if name == "sample_weight" else value for name, value in given.items()}
        x = cupy.asarray(logits[first:last]), cupy.asarray(target[first:last])
        mine, part = cross_entropy_value_and_grad(*x, engine=BatchParallel(comm), **batch)
        assert np.allclose(comm.allreduce(mine.get()), loss, rtol=1e-12, atol=0), (classes, options)
        assert np.allclose(part.get(), grad[first:last], rtol=1e-12, atol=1e-16), (classes, options)
if rank == 0:
    print("equal")
"""

FAILING = """
import sys
import numpy as np
from mpi4py import MPI
from xent_array import cross_entropy
from xent_array.parallel import VocabParallel

comm = MPI.COMM_WORLD
start = 10 * comm.rank - (sys.argv[1] == "overlap" and comm.rank == 1)
options = {"z_loss": -1.0} if sys.argv[1] == "option" and comm.rank == 1 else {}
try:
    cross_entropy(np.zeros((5, 10)), [0] * 5, engine=VocabParallel(comm, start, 10 * comm.size), **options)
    found = "nothing"
except Exception as error:
    found = f"{type(error).__name__}: {error}"
for line in comm.gather(found) or ():
    print(line)
"""


def run(count, script, *arguments, before=()):
    command = [MPIEXEC, "-n", str(count), sys.executable, "-W", "error", *before, "-c", script, *arguments]
    environment = process.environment(XENT_ARRAY_NUM_THREADS="1", HYDRA_LAUNCHER="fork")
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        environment |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.splitlines()


@pytest.mark.parametrize("count", [2, 3, 4])
def test_equal_to_one_process(count):
    assert run(count, EQUAL) == ["equal"]


def test_classes_and_rows_in_a_grid():
    """As in README.md."""
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    (recipe,) = re.findall(r"^```python\n(tokens = data.*?)^```", readme, re.MULTILINE | re.DOTALL)
    assert run(4, BOTH, recipe) == ["equal"]


@pytest.mark.skipif(shutil.which("g++") is None, reason="the emulation needs g++")
def test_arrays_on_a_device():
    """Those of the stand-in for CuPy, whose memory is that of the host: MPI is given the arrays themselves."""
    pytest.importorskip("cupy")
    standin = Path(__file__).parents[1] / "support" / "standin.py"
    assert run(2, ON_A_DEVICE, before=[str(standin)]) == ["equal"]


def test_an_option_of_one_rank_that_is_wrong():
    first, own, third = run(3, FAILING, "option")
    assert own == "ValueError: z_loss must be finite and at least 0, got -1.0"
    assert first == third == f"RuntimeError: the process of rank 1 failed: {own}"


def test_slices_that_overlap():
    assert run(3, FAILING, "overlap") == ["ValueError: the slices of the classes overlap at class 9"] * 3
