"""What only a GPU can show: streams, graphs, devices, and that no call waits. Skipped if CuPy finds none."""

import numpy as np
import pytest
from support.together import DeviceThreads

from xent_array import (
    CrossEntropyLoss,
    _again,
    cross_entropy,
    cross_entropy_grad,
    cross_entropy_value_and_grad,
    row_stats,
)
from xent_array._engines import cuda
from xent_array.parallel import BatchParallel, VocabParallel

# (rows, classes, dtype): for every family of contiguous rows, and for sums by one block, a cluster and many blocks
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
    """Captured once with out=, in memory of its own; replayed with other logits and labels in the same place."""
    _again.KINDS.clear()
    _again._kept.clear()
    x, y = problem(cupy, rows, classes, dtype)
    out = cupy.empty_like(x)
    for _ in range(calls):  # the first compiles; the third repeats the second
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
    for _ in range(3):  # compiles, fills the memory pool, and is kept
        function()
    stream = cupy.cuda.get_current_stream()
    stream.synchronize()
    spin()
    function()
    assert not stream.done, "the call came back when the stream was empty: it waited"
    stream.synchronize()


@pytest.mark.parametrize(("rows", "classes", "dtype"), SHAPES)
def test_the_current_stream_is_the_one_that_is_used(cupy, spin, rows, classes, dtype):
    """The logits arrive late, on the same stream: a read on another stream would be too early."""
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


# -- slices of the classes, and one rank of NCCL: two GPUs are for `python -m bench.nccl`


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("rows", "classes", "dtype"), SHAPES)
def test_slices_of_several_ranks_on_one_gpu(cupy, rows, classes, dtype, options):
    """Ranks as threads: whole rows, cut in three, of which one has no class."""
    x, y = problem(cupy, rows, classes, dtype)
    y[::5] = -100
    loss, grad = cross_entropy_value_and_grad(x, y, **options)
    parts = [(0, classes // 3), (classes // 3, classes // 3), (classes // 3, classes)]

    def work(communicator):
        start, stop = parts[communicator.rank]
        engine = VocabParallel(communicator, start, classes)
        return cross_entropy_value_and_grad(cupy.ascontiguousarray(x[:, start:stop]), y, engine=engine, **options)

    cupy.cuda.Device().synchronize()
    losses, grads = zip(*DeviceThreads(3).run(work), strict=True)
    step = 100 * np.finfo(grad.dtype).eps
    for each in losses:
        same(each, losses[0])
        np.testing.assert_allclose(each.get(), loss.get(), rtol=100 * np.finfo(loss.dtype).eps, atol=1e-7)
    most = float(abs(grad).max())
    np.testing.assert_allclose(np.concatenate([g.get() for g in grads], 1), grad.get(), rtol=step, atol=step * most)


@pytest.fixture
def one_rank(cupy):
    nccl = pytest.importorskip("cupy.cuda.nccl")
    if not nccl.available:
        pytest.skip("CuPy finds no NCCL")
    return nccl.NcclCommunicator(1, nccl.get_unique_id(), 0)


@pytest.mark.parametrize(("rows", "classes", "dtype"), SHAPES)
def test_no_call_over_nccl_waits(cupy, spin, one_rank, rows, classes, dtype):
    x, y = problem(cupy, rows, classes, dtype)
    wanted, wanted_grad = cross_entropy_value_and_grad(x, y)
    step = 100 * np.finfo(wanted_grad.dtype).eps
    for engine in (VocabParallel(one_rank, 0, classes), BatchParallel(one_rank)):
        for _ in range(3):
            cross_entropy_value_and_grad(x, y, engine=engine)
        stream = cupy.cuda.get_current_stream()
        stream.synchronize()
        spin()
        loss, grad = cross_entropy_value_and_grad(x, y, engine=engine)
        assert not stream.done, "the call came back when the stream was empty: it waited"
        stream.synchronize()
        np.testing.assert_allclose(loss.get(), wanted.get(), rtol=1e-5)
        np.testing.assert_allclose(grad.get(), wanted_grad.get(), rtol=step, atol=step * float(abs(wanted_grad).max()))


def test_a_call_over_nccl_in_a_graph(cupy, one_rank):
    x, y = problem(cupy, 500, 250, "float32")
    out, engine = cupy.empty_like(x), VocabParallel(one_rank, 0, 250)
    for _ in range(3):
        cross_entropy_value_and_grad(x, y, out=out, engine=engine)
    stream, pool = cupy.cuda.Stream(non_blocking=True), cupy.cuda.MemoryPool()
    cupy.cuda.Device().synchronize()
    with stream, cupy.cuda.using_allocator(pool.malloc):
        stream.begin_capture()
        loss, _ = cross_entropy_value_and_grad(x, y, out=out, engine=engine)
        graph = stream.end_capture()
    for seed in (1, 2):
        other, labels = problem(cupy, 500, 250, "float32", seed)
        wanted, wanted_grad = cross_entropy_value_and_grad(other, labels)
        x[...], y[...] = other, labels
        cupy.cuda.Device().synchronize()
        graph.launch(stream)
        stream.synchronize()
        np.testing.assert_allclose(loss.get(), wanted.get(), rtol=1e-5)
        np.testing.assert_allclose(out.get(), wanted_grad.get(), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(("rows", "classes", "dtype"), SHAPES)
def test_several_streams_at_once(cupy, spin, rows, classes, dtype):
    """Many calls of one kind in flight, on streams that do not wait for each other."""
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


# -- tensors of PyTorch ------------------------------------------------------------------------------------------


@pytest.fixture
def torch(cupy):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    if not torch.cuda.is_available():
        pytest.skip("PyTorch finds no GPU")
    return torch


def tensors(torch, rows, classes, dtype, seed=0):
    generator = torch.Generator(device="cuda").manual_seed(seed)
    logits = 3 * torch.randn(rows, classes, device="cuda", generator=generator)
    return logits.to(getattr(torch, dtype)), torch.randint(classes, (rows,), device="cuda", generator=generator)


def bits(*results):
    return [result.detach().view(torch_bits(result)).cpu().numpy().tobytes() for result in results]


def torch_bits(tensor):
    import torch

    return {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("rows", "classes", "dtype"), [*SHAPES, (64, 4096, "bfloat16")])
def test_tensors_have_the_bits_of_cupy(cupy, torch, rows, classes, dtype, options):
    x, y = tensors(torch, rows, classes, dtype)
    answer = cross_entropy_value_and_grad(x, y, **options)
    assert all(isinstance(part, torch.Tensor) and part.device == x.device for part in answer)
    if dtype == "bfloat16":  # CuPy does not take it by DLPack
        plain = cross_entropy_value_and_grad(x, y, engine="generic", **options)
        torch.testing.assert_close(answer, plain)
        return
    loss, grad = cross_entropy_value_and_grad(cupy.from_dlpack(x), cupy.from_dlpack(y), **options)
    torch.cuda.synchronize()
    assert bits(*answer) == [loss.get().tobytes(), grad.get().tobytes()]


@pytest.mark.parametrize(("rows", "classes", "dtype"), SHAPES)
def test_autograd_of_tensors(torch, rows, classes, dtype):
    x, y = tensors(torch, rows, classes, dtype)
    _, wanted = cross_entropy_value_and_grad(x, y, grad_output=2.0)
    leaf = x.clone().requires_grad_()
    (2 * cross_entropy(leaf, y)).backward()
    torch.testing.assert_close(leaf.grad, wanted)


def spinning(torch, stream):
    """Keeps a stream busy for some 0.3 s."""
    with torch.cuda.stream(stream):
        torch.cuda._sleep(500_000_000)


@pytest.mark.parametrize("way", ["detached", "autograd"])
@pytest.mark.parametrize(("rows", "classes", "dtype"), SHAPES)
def test_tensors_use_the_stream_of_pytorch_and_do_not_wait(torch, rows, classes, dtype, way):
    """The logits arrive late, on a stream of PyTorch's: a read on another stream would be too early."""

    def answer(x, y):
        if way == "detached":
            return cross_entropy_value_and_grad(x, y, weight=weight, denominator=3.0)
        leaf = x.detach().requires_grad_()
        loss = cross_entropy(leaf, y, weight=weight, denominator=3.0)
        loss.backward()
        return loss, leaf.grad

    late, y = tensors(torch, rows, classes, dtype)
    weight = torch.rand(classes, device="cuda", dtype=torch.float64)
    wanted = bits(*answer(late, y))
    stream = torch.cuda.Stream()
    for _ in range(2):
        x = torch.zeros_like(late)
        torch.cuda.synchronize()
        spinning(torch, stream)
        with torch.cuda.stream(stream):
            x.copy_(late)
            found = answer(x, y)
        assert not stream.query(), "the call came back when the stream was empty: it waited"
        stream.synchronize()
        assert bits(*found) == wanted


def test_gradients_come_from_the_allocator_of_pytorch(cupy, torch):
    x, y = tensors(torch, 1000, 10_000, "float32")
    cross_entropy_value_and_grad(x, y)
    pool = cupy.get_default_memory_pool()
    before, held = torch.cuda.memory_allocated(), pool.used_bytes()
    _, grad = cross_entropy_value_and_grad(x, y)
    assert torch.cuda.memory_allocated() - before >= grad.nbytes
    assert pool.used_bytes() == held
    del grad
    assert torch.cuda.memory_allocated() - before < 1 << 20


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("rows", "classes", "dtype"), SHAPES)
def test_a_training_step_in_a_graph_of_pytorch(torch, rows, classes, dtype, options):
    x, y = tensors(torch, rows, classes, dtype)
    leaf = x.clone().requires_grad_()

    def step():
        leaf.grad = None
        loss = cross_entropy(leaf, y, **options)
        loss.backward(torch.ones_like(loss))
        return loss

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
    for seed in (1, 2):
        other, labels = tensors(torch, rows, classes, dtype, seed)
        with torch.no_grad():
            leaf.copy_(other)
            y.copy_(labels)
        graph.replay()
        wanted, wanted_grad = cross_entropy_value_and_grad(other, labels, **options)
        torch.cuda.synchronize()
        torch.testing.assert_close(loss.detach(), wanted)
        torch.testing.assert_close(leaf.grad, wanted_grad)
