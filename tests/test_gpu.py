"""What only a GPU can show: streams, graphs, devices, and that no call waits. Skipped where CuPy finds none."""

import numpy as np
import pytest

from xent_array import (
    CrossEntropyLoss,
    _again,
    cross_entropy,
    cross_entropy_grad,
    cross_entropy_value_and_grad,
    row_stats,
)
from xent_array._engines import cuda

# (rows, classes, dtype): a row in a thread, in lanes, in a block, in a cluster, streamed; rows that many blocks sum
SHAPES = [
    (1000, 10, "float32"),
    (cuda.SUM_ALONE + 99, 21, "float16"),
    (cuda.SUM_TOGETHER + 99, 5, "float32"),
    (500, 250, "float32"),
    (64, 5001, "float32"),
    (16, 50257, "float16"),
    (3, 600_001, "float32"),
    (40, 3000, "float64"),
]
OPTIONS = [{}, {"reduction": "none"}, {"reduction": "sum", "label_smoothing": 0.1, "z_loss": 1e-3}, {"softcap": 20.0}]

SPIN = r"""
extern "C" __global__ void spin(long long cycles) {
    const long long start = clock64();
    while (clock64() - start < cycles) {}
}
"""


@pytest.fixture
def spin(cupy):
    """Keeps the current stream busy for some 0.3 s."""
    kernel = cupy.RawKernel(SPIN, "spin")
    kernel((1,), (1,), (1,))
    return lambda: kernel((1,), (1,), (500_000_000,))


def problem(cupy, rows, classes, dtype, seed=0):
    rng = np.random.default_rng(seed)
    logits = (rng.standard_normal((rows, classes)) * 3).astype(dtype)
    return cupy.asarray(logits), cupy.asarray(rng.integers(classes, size=rows))


def same(one, two):
    assert one.get().tobytes() == two.get().tobytes()


@pytest.mark.parametrize("calls", [1, 3], ids=["checked", "kept"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("rows", "classes", "dtype"), SHAPES)
def test_a_graph_gives_what_a_call_gives(cupy, rows, classes, dtype, options, calls):
    """Captured once with out=, in memory of its own; replayed on other logits and labels in the same place."""
    _again.KINDS.clear()
    _again._kept.clear()
    x, y = problem(cupy, rows, classes, dtype)
    out = cupy.empty_like(x)
    for _ in range(calls):  # the first compiles; the third is the second again
        cross_entropy_value_and_grad(x, y, out=out, **options)
    stream, pool = cupy.cuda.Stream(non_blocking=True), cupy.cuda.MemoryPool()
    cupy.cuda.Device().synchronize()
    with stream, cupy.cuda.using_allocator(pool.malloc):
        stream.begin_capture()
        loss, grad = cross_entropy_value_and_grad(x, y, out=out, **options)
        graph = stream.end_capture()
    assert grad is out
    for seed in (1, 2, 3):
        other, labels = problem(cupy, rows, classes, dtype, seed)
        wanted, wanted_grad = cross_entropy_value_and_grad(other, labels, **options)
        x[...], y[...] = other, labels
        out.fill(77)
        cupy.cuda.Device().synchronize()
        graph.launch(stream)
        stream.synchronize()
        same(loss, wanted)
        same(out, wanted_grad)


def calls(x, y, out):
    loss = CrossEntropyLoss()
    return {
        "cross_entropy": lambda: cross_entropy(x, y),
        "cross_entropy_value_and_grad": lambda: cross_entropy_value_and_grad(x, y, out=out),
        "a bad label, unchecked": lambda: cross_entropy_value_and_grad(x, y - 1, out=out),
        "cross_entropy_grad": lambda: cross_entropy_grad(x, y, grad_output=2.0),
        "row_stats": lambda: row_stats(x, y),
        "forward and backward": lambda: (loss.forward(x, y), loss.backward()),
    }


@pytest.mark.parametrize("call", calls(None, None, None))
@pytest.mark.parametrize(("rows", "classes", "dtype"), SHAPES)
def test_no_call_waits(cupy, spin, call, rows, classes, dtype):
    x, y = problem(cupy, rows, classes, dtype)
    function = calls(x, y, cupy.empty_like(x))[call]
    for _ in range(3):  # compiles, fills the pool of memory, and is kept
        function()
    stream = cupy.cuda.get_current_stream()
    stream.synchronize()
    spin()
    function()
    assert not stream.done, "the call came back when the stream was empty: it waited"
    stream.synchronize()


@pytest.mark.parametrize(("rows", "classes", "dtype"), SHAPES)
def test_the_current_stream_is_the_one_that_is_used(cupy, spin, rows, classes, dtype):
    """The logits come late, in the same stream: whoever reads them elsewhere reads them too early."""
    late, y = problem(cupy, rows, classes, dtype)
    wanted, wanted_grad = cross_entropy_value_and_grad(late, y)
    for _ in range(3):  # the last is kept
        x = cupy.zeros_like(late)
        cupy.cuda.Device().synchronize()
        stream = cupy.cuda.Stream(non_blocking=True)
        with stream:
            spin()
            x[...] = late
            loss, grad = cross_entropy_value_and_grad(x, y)
        stream.synchronize()
        same(loss, wanted)
        same(grad, wanted_grad)


@pytest.mark.parametrize(("rows", "classes", "dtype"), SHAPES)
def test_several_streams_at_once(cupy, spin, rows, classes, dtype):
    """Many calls of one kind under way in streams that wait for one another in no order."""
    problems = [problem(cupy, rows, classes, dtype, seed) for seed in range(4)]
    wanted = [cross_entropy_value_and_grad(x, y) for x, y in problems]
    cupy.cuda.Device().synchronize()
    streams, found = [cupy.cuda.Stream(non_blocking=True) for _ in problems], []
    for stream in streams:
        with stream:
            spin()
    for _ in range(5):
        for stream, (x, y), first in zip(streams, problems, wanted, strict=True):
            with stream:
                found.append((first, cross_entropy_value_and_grad(x, y)))
    cupy.cuda.Device().synchronize()
    for (loss, grad), (again, grad_again) in found:
        same(again, loss)
        same(grad_again, grad)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("rows", "classes", "dtype"), SHAPES)
def test_the_same_bits_run_after_run(cupy, rows, classes, dtype, options):
    x, y = problem(cupy, rows, classes, dtype)
    first = cross_entropy_value_and_grad(x, y, **options)
    for _ in range(20):
        again = cross_entropy_value_and_grad(x, y, **options)
        same(again[0], first[0])
        same(again[1], first[1])


def test_another_device_than_the_current_one(cupy):
    if cupy.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("one device")
    for shape in SHAPES:
        x, y = problem(cupy, *shape)
        wanted = cross_entropy_value_and_grad(x, y)
        with cupy.cuda.Device(1):
            x, y = problem(cupy, *shape)
        for _ in range(3):  # called from device 0; the last is kept
            loss, grad = cross_entropy_value_and_grad(x, y)
            assert (loss.device.id, grad.device.id) == (1, 1)
            same(loss, wanted[0])
            same(grad, wanted[1])


def test_bad_labels_leave_the_context_alive(cupy):
    for rows, classes, dtype in SHAPES:
        x, y = problem(cupy, rows, classes, dtype)
        bad = y.copy()
        bad[1] = (1 << 40) + classes
        loss = cross_entropy(x, bad, reduction="none").get()
        assert np.isnan(loss[1])
        assert np.isfinite(np.delete(loss, 1)).all()
        assert np.isfinite(cross_entropy(x, y).get())
