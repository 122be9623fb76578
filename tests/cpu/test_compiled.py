"""What is compiled, and when; the memory that compiled code works in, and touches nothing beside."""

import platform
import re
import sys

import numpy as np
import pytest
from support.problems import padded, read_only, unaligned
from support.process import run

from xent_array import cross_entropy, cross_entropy_grad, cross_entropy_value_and_grad, log_softmax, row_stats, softmax
from xent_array._engines import cpu

if isinstance(cpu.found_loops(), str):
    pytest.skip(cpu.found_loops(), allow_module_level=True)

from llvmlite import binding

from xent_array._engines.cpu import blocks, machine_code
from xent_array._engines.cpu.loops import build, function, simd, workspace_size

RNG = np.random.default_rng(0)

# Every array that the loops see ends, or starts, at a page that may not be touched, and holds NaN to begin with.
GUARD = """
import ctypes, itertools, mmap, sys
import ml_dtypes
import numpy as np
from xent_array import cross_entropy, cross_entropy_grad, cross_entropy_value_and_grad, log_softmax, row_stats, softmax
from xent_array._engines import cpu
from xent_array._engines.cpu import blocks, compiled, loops, memory

PAGE = mmap.PAGESIZE
libc = ctypes.CDLL(None, use_errno=True)
kept = []

def guarded(size, dtype):
    dtype, size = np.dtype(dtype), int(size)
    room = max(1, -(-size * dtype.itemsize // PAGE)) * PAGE
    memory = mmap.mmap(-1, room + 2 * PAGE)
    kept.append(size)  # the array keeps the memory; a process may not have too many mappings
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for page in (address, address + PAGE + room):
        assert libc.mprotect(ctypes.c_void_p(page), PAGE, 0) == 0
    start = PAGE if sys.argv[1] == "start" else PAGE + room - size * dtype.itemsize
    array = np.frombuffer(memory, np.uint8)[start : start + size * dtype.itemsize].view(dtype)
    array.view(np.uint8)[...] = 0xFF  # NaN, or -1
    return array

def put(values):
    array = guarded(values.size, values.dtype).reshape(values.shape)
    array[...] = values
    return array

class Numpy:
    def empty(self, shape, dtype=float):
        return guarded(int(np.prod(shape)), dtype).reshape(shape)

    def array(self, *given):
        return put(np.array(*given))

    def where(self, *given):
        return put(np.where(*given))

    def __getattr__(self, name):
        return getattr(np, name)

class Buffers(blocks.Buffers):
    def __call__(self, use, shape):
        if use not in self.buffers:
            self.buffers[use] = guarded(self.size, self.dtype)
        return super().__call__(use, shape)

compiled.np = loops.np = Numpy()
memory.empty = compiled.np.empty
cpu.Buffers = Buffers
compiled.workspace = lambda size: guarded(size, np.uint8)
compiled._NONE = {dtype: guarded(0, dtype) for dtype in compiled._NONE}

rng = np.random.default_rng(0)
for dtype in (np.float16, ml_dtypes.bfloat16, np.float32, np.float64):
    for classes, shape in itertools.product((1, 2, 5, 33, 256, 257, 513), ((1, 1), (17, 1), (130, 1), (2, 9), (1, 40))):
        x = (3 * rng.normal(size=(shape[0], classes, shape[1]))).astype(dtype)
        labels = rng.integers(classes, size=shape)
        labels.reshape(-1)[::7] = -1
        weight, per_row = rng.random(classes), rng.random(shape)
        for options in ({}, {"z_loss": 0.1, "weight": put(weight), "sample_weight": put(per_row)},
                        {"label_smoothing": 0.1}, {"softcap": 3.0}, {"label_smoothing": 0.1, "weight": put(weight)}):
            given = {"axis": 1, "validate": False, "reduction": "sum", "engine": "cpu", **options}
            y, logits = put(labels), put(x)
            out = guarded(x.size, dtype).reshape(x.shape)
            cross_entropy_value_and_grad(logits, y, out=out, **given)
            del given["reduction"]
            stats = row_stats(logits, y, **given)
            again = cross_entropy_grad(logits, y, stats=stats, out=logits, reduction="sum", **given)
            assert np.array_equal(again.astype(float), out.astype(float), equal_nan=True)
            # And what lay in the scratch is not in the answer.
            plain = cross_entropy_grad(x, labels, reduction="sum", **given | {"engine": "numpy"})
            assert np.allclose(plain.astype(float), out.astype(float), rtol=0.05, atol=1e-3, equal_nan=True)
        soft = put(rng.random(x.shape))
        cross_entropy_value_and_grad(put(x), soft, axis=1, out=guarded(x.size, dtype).reshape(x.shape), engine="cpu")
        softmax(put(x), axis=1), log_softmax(put(x), axis=1)
        row, label = put(np.moveaxis(x, 1, 2)), put(abs(labels) % classes)
        cross_entropy_value_and_grad(row, label), cross_entropy(row, label)  # small, with plain options
        cross_entropy_value_and_grad(row, label, ignore_index=0, z_loss=0.1)
        cross_entropy_value_and_grad(row, label, softcap=3.0, label_smoothing=0.1)
        label.reshape(-1)[-1] = -1
        try:
            cross_entropy_value_and_grad(row, label)
        except IndexError:
            continue
        raise AssertionError
print("done", len(kept))
"""


@pytest.mark.full
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mprotect is called as on Linux")
@pytest.mark.parametrize("end", ["start", "end"])
def test_nothing_beside_an_array_is_touched(end):
    assert run(GUARD, end).startswith("done")


# -- what is compiled, and when ----------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [10, 300])
def test_one_machine_code_for_all_options(classes):
    """Nor for read-only arrays, nor for another job, though a loss alone of 16-bit logits has one of its own."""
    x, labels = RNG.standard_normal((30, classes), dtype=np.float32), RNG.integers(classes, size=30)
    for logits in (x, x.astype(np.float64)):
        cross_entropy(logits, labels, engine="cpu")
        cross_entropy(np.tile(logits, 30), labels, engine="cpu")
        cross_entropy_value_and_grad(np.asfortranarray(logits), labels, engine="cpu")
        cross_entropy_value_and_grad(logits, RNG.random(x.shape), engine="cpu")  # by the loop of long rows
        before = set(machine_code._functions)
        for given in (logits, read_only(logits), padded(logits), np.asfortranarray(logits), unaligned(logits)):
            for options in (
                {"z_loss": 1}, {"softcap": 20}, {"label_smoothing": 1}, {"weight": np.ones(classes)},
                {"sample_weight": read_only(np.ones(30))}, {"weight": np.ones(classes), "label_smoothing": 0.1},
            ):  # fmt: skip
                for target in (labels, read_only(labels), labels.astype(np.uint8), RNG.random(x.shape)):
                    stats = row_stats(given, target, engine="cpu", **options)
                    cross_entropy_value_and_grad(given, target, grad_output=2, engine="cpu", **options)
                    cross_entropy_grad(given, target, stats=stats, engine="cpu", **options)
            softmax(given)
            log_softmax(given)
        assert set(machine_code._functions) == before


@pytest.mark.parametrize(
    "mistake",
    [
        lambda n, x: n or x, lambda n, x: 0 < n < 2, lambda n, x: max(n, 1), lambda n, x: not n,
        lambda n, x: n < 0.5, lambda n, x: n / 2, lambda n, x: x % 2, lambda n, x: x << 1,
    ],
)  # fmt: skip
def test_a_mistake_in_a_loop_is_found_while_it_is_made(mistake):
    """Python would take it for something else, and LLVM only says that it cannot parse it."""
    elements = [simd.INT64, simd.DOUBLE]
    with pytest.raises(TypeError, match=r"a Value is known only|is no integer|no such operator"):
        function.machine_code("wrong", elements, lambda n, x: mistake(n.load(0), x.load(0)))
    assert simd._builder() is None


def assembly(*name):
    """That of a function which `build` makes."""
    found = []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(function, "_emitted", lambda machine, module: found.append(machine.emit_assembly(module)))
        build.build(*name)
    return found[0]


@pytest.mark.full
def test_widest_vectors_of_the_host():
    features, machine = binding.get_host_cpu_features(), platform.machine().lower()
    if machine in ("x86_64", "amd64") and features.get("fma"):
        vectors = "zmm" if features.get("avx512f") else "ymm"
        instruction = rf"vf(n?m)(add|sub)\d+ps\s.*{vectors}"
    elif machine in ("aarch64", "arm64"):
        instruction = r"fmla\s+v\d+\.4s"
    else:
        pytest.skip(f"nothing is known of the multiply-add of this {machine}")
    found = re.findall(instruction, assembly("contiguous", *["float32"] * 3))
    assert len(found) >= 20  # an exponential has seven, and a group two or four of these


@pytest.mark.parametrize("dtypes", [("float32", "uint16", "uint16"), ("float64",) * 3], ids=lambda names: names[-1])
@pytest.mark.parametrize("name", ["contiguous", "transposed", "strided"])
def test_no_function_of_the_c_library_is_called(name, dtypes):
    """But the one that fills memory: every process has it."""
    found = assembly(name, *dtypes)
    assert "ret" in found
    called = set(re.findall(r"(?:movabsq\s+\$|\bcallq?[ \t]+|\bbl[ \t]+)([A-Za-z_]\w*)", found))
    called |= set(re.findall(r"\b(expf?|exp2f?|tanhf?|log1pf?|logf?|fmaf?|__\w+[hs]f2)\b", found))
    assert called <= {"memset"}


CROSS = """
import sys
from llvmlite import binding
binding.initialize_all_targets()
binding.initialize_all_asmprinters()
from xent_array._engines.cpu.loops import build, processor

triple, name, features = sys.argv[1:]
processor.triple, processor.name, processor.features = lambda: triple, lambda: name, lambda: features
for function in (["count_kept"], ["transposed", "float32", "uint16", "uint16"], ["contiguous"] + 3 * ["float64"]):
    assert build.build(*function)
print("made")
"""


@pytest.mark.parametrize(
    ("triple", "name", "features"),
    [
        ("aarch64-unknown-linux-gnu", "neoverse-n1", "+neon"), ("arm64-apple-darwin23.0.0", "apple-m1", "+neon"),
        ("x86_64-pc-windows-msvc", "haswell", "+avx,+avx2,+fma,+f16c"), ("x86_64-unknown-linux-gnu", "generic", ""),
    ],
)  # fmt: skip
def test_machine_code_for_other_machines(triple, name, features):
    """As far as LLVM can tell here; what it cannot compile would end the process."""
    assert run(CROSS, triple, name, features).strip() == "made"


# -- other processes ---------------------------------------------------------------------------------------------


def test_llvmlite_is_imported_only_for_loops(tmp_path):
    """No other engine imports it, and `build` is imported only if something has to be compiled."""
    script = (
        "import sys, numpy, xent_array; xent_array.cross_entropy(numpy.eye(3), [0, 1, 2], engine='generic')\n"
        "xent_array.cross_entropy(numpy.eye(3), [0, 1, 2], engine='numpy')\n"
        "print('llvmlite' not in sys.modules)\n"
        "xent_array.cross_entropy(numpy.eye(3), [0, 1, 2]); print('xent_array._engines.cpu.loops.build' in sys.modules)"
    )
    assert run(script, XENT_ARRAY_CACHE_DIR=str(tmp_path)).split() == ["True", "True"]
    assert run(script, XENT_ARRAY_CACHE_DIR=str(tmp_path)).split() == ["True", "False"]


@pytest.mark.full
def test_a_processor_that_knows_little(tmp_path):
    """Such as a virtual one: without float16, without multiply-add. A missing function would end the process."""
    script = """
import numpy as np
from llvmlite import binding
from xent_array import cross_entropy_value_and_grad
binding.get_host_cpu_name, binding.get_host_cpu_features = lambda: "generic", binding.FeatureMap
x = np.random.default_rng(0).standard_normal((4, 300)).astype(np.float16)
for logits in (x, x[:, :10]):
    (loss, grad), (wanted, _) = (cross_entropy_value_and_grad(logits, [3, 2, 1, 0], engine=e) for e in ("cpu", "numpy"))
    assert grad.dtype == np.float16 and abs(loss - wanted) < 1e-5
print("right")
"""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        pytest.skip("every other processor of note has float16")
    assert run(script, XENT_ARRAY_CACHE_DIR=str(tmp_path)).strip() == "right"


def test_a_thread_keeps_what_it_works_in_unless_it_is_much(monkeypatch):
    monkeypatch.setattr(blocks, "_own", blocks._Own())
    small = blocks.workspace(1000)
    assert blocks.workspace(500) is blocks.workspace(1000) is small
    large = blocks.workspace(5000)
    assert blocks.workspace(1000) is large
    monkeypatch.setattr(blocks, "KEPT", 1 << 13)
    once = blocks.workspace(1 << 14)
    assert len(once) == 1 << 14
    assert blocks.workspace(1000) is large
    assert all(room.ctypes.data % 64 == 0 for room in (small, large, once))


def test_calls_work_in_what_their_thread_keeps(monkeypatch):
    monkeypatch.setattr(blocks, "_own", blocks._Own())
    logits, labels = np.ones((1, 70, 40), np.float32), np.zeros((1, 40), np.intp)
    cross_entropy(logits, labels, axis=1, engine="cpu")
    room = blocks._own.workspace
    assert len(room) >= workspace_size("strided", 70, 32, 4)
    cross_entropy(logits, labels, axis=1, engine="cpu")
    cross_entropy(np.ones((40, 70), np.float32), labels[0])
    assert blocks._own.workspace is room
