"""The bridge to tensors on a GPU, without one: what CuPy is given, what is launched where, what comes back."""

import contextlib
from types import SimpleNamespace
from unittest import mock

import ml_dtypes
import numpy as np
import pytest
from support import emulated
from support.close import assert_grad, assert_loss
from support.oracle import oracle

from xent_array import (
    CrossEntropyLoss,
    _engines,
    _problem,
    cross_entropy,
    cross_entropy_grad,
    cross_entropy_value_and_grad,
    log_softmax,
    row_stats,
    softmax,
)
from xent_array._bridges import KINDS
from xent_array._engines import ENGINES
from xent_array._engines.cuda import Cuda

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
pytest.importorskip("cupy", reason="CuPy is not installed")

from support import hosted  # noqa: E402

from xent_array._bridges import _torch  # noqa: E402

STREAM = 0x1234


class Launches(list):
    """The streams that kernels were launched on; None for one that was launched on no stream of ours."""

    stream = None


@pytest.fixture
def gpu(monkeypatch):
    """Tensors in host memory, taken for those of a GPU: all of the way to the kernels, which the emulation runs."""
    import cupy

    launches = Launches()

    @contextlib.contextmanager
    def on_stream(pointer, device):
        assert device == 0
        before, launches.stream = launches.stream, pointer
        yield
        launches.stream = before

    class Function(hosted.Emulated):
        def __call__(self, *arguments):
            launches.append(launches.stream)
            super().__call__(*arguments)

    def ascontiguousarray(array):
        launches.append(launches.stream)
        return hosted.to_cupy(hosted.to_numpy(array))

    monkeypatch.setattr("array_api_compat.cupy.ascontiguousarray", ascontiguousarray)
    with hosted.cupy_on_host(Function):
        monkeypatch.setattr(_torch, "_gpu", lambda tensor: 0)
        monkeypatch.setattr(_torch, "Cupy", hosted.Hosted)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=STREAM))
        monkeypatch.setattr(cupy.cuda, "ExternalStream", on_stream)
        monkeypatch.setattr(cupy.cuda, "Device", lambda device: contextlib.nullcontext())
        monkeypatch.setitem(ENGINES, "cuda", Cuda(hosted.Hosted()))
        for name in ("cpu", "numpy"):
            monkeypatch.setitem(ENGINES, name, SimpleNamespace(declines=lambda rows: "no", name=name, borrows=True))
        yield launches


RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(4, 5, 3)) * 3
LABELS = np.array([[0, 1, 4], [2, -100, 3], [1, 1, 0], [4, 2, 2]])
SOFT = RNG.random((4, 5, 3))
ARRAYS = {"weight": RNG.random(5), "sample_weight": RNG.random((4, 3))}
OPTIONS = {"label_smoothing": 0.1, "z_loss": 0.1, "softcap": 3.0}


def layouts(x):
    """The same tensor as (4, 5, 3) in different orders of memory."""
    yield x
    yield x.permute(0, 2, 1).contiguous().permute(0, 2, 1)
    yield x.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    whole = x.new_zeros(9, 5, 3)
    whole[1::2] = x
    yield whole[1::2]


@pytest.mark.parametrize("of", ["index", "distribution"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_tensors_of_a_gpu_go_to_the_kernels(gpu, dtype, of):
    target = LABELS if of == "index" else SOFT.astype("float64" if dtype == "float64" else "float32")
    x = torch.tensor(LOGITS).to(getattr(torch, dtype))
    kind = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    logits = x.double().numpy().astype(kind)
    arrays = {name: torch.tensor(value) for name, value in ARRAYS.items()}
    truth = oracle(logits, target, axis=1, **ARRAYS, **OPTIONS)
    y = torch.tensor(target)
    for laid, t in zip(layouts(x), [y] * 4 if of == "index" else layouts(y), strict=True):
        for out in (None, torch.empty_like(laid)):
            given = {"axis": 1, **arrays, **OPTIONS}
            loss, grad = cross_entropy_value_and_grad(laid, t, **given, out=out)
            assert (loss.dtype, grad.dtype) == (torch.float64 if dtype == "float64" else torch.float32, x.dtype)
            assert out is None or grad is out
            assert_loss(loss.numpy(), truth)
            assert_grad(grad.double().numpy().astype(kind), truth)
    assert set(gpu) == {STREAM}


def test_every_function(gpu):
    x, y = torch.tensor(LOGITS[:, :, 0], dtype=torch.float32), torch.tensor(LABELS[:, 0])
    truth = oracle(x.numpy(), LABELS[:, 0])
    numpy = x.numpy(), y.numpy()
    sce = CrossEntropyLoss()
    assert_loss(cross_entropy(x, y).numpy(), truth)
    assert_loss(sce.forward(x, y).numpy(), truth)
    stats = row_stats(x, y)
    for grad in (cross_entropy_grad(x, y), cross_entropy_grad(x, y, stats=stats), sce.backward()):
        assert_grad(grad.numpy(), truth)
    for mine, theirs in zip(stats, row_stats(*numpy, engine="generic"), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5)
    for function in (softmax, log_softmax):
        np.testing.assert_allclose(function(x), _engines_answer(function, numpy[0]), rtol=1e-5)
    assert set(gpu) == {STREAM}


def _engines_answer(function, x):
    with mock.patch.dict(ENGINES, {"cpu": _engines.generic}):
        return function(x)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_autograd_on_a_gpu_keeps_the_stats(gpu, reduction):
    """What comes from above is never looked at: its product is made by the kernel that makes the gradient."""
    KINDS.clear()  # or the CPU's way for plain calls would take what is in its memory
    x = torch.tensor(LOGITS[:, :, 0], requires_grad=True)
    y, s = torch.tensor(LABELS[:, 0]), torch.tensor([1.0, 2.0, 0.5, 3.0])
    upstream = np.array([2.0, np.inf, 0.0, -1.0]) if reduction == "none" else np.float64(3.0)
    loss = cross_entropy(x, y, sample_weight=s, reduction=reduction)
    before = len(gpu)
    loss.backward(torch.tensor(upstream))
    assert len(gpu) > before
    truth = oracle(LOGITS[:, :, 0], LABELS[:, 0], sample_weight=s.numpy(), reduction=reduction, grad_output=upstream)
    assert_loss(loss.detach().numpy(), truth)
    assert_grad(x.grad.numpy(), truth)
    assert set(gpu) == {STREAM}


def test_room_comes_from_pytorch(gpu):
    """What is returned is a tensor that PyTorch made, not one over memory that is CuPy's."""
    x, y = torch.tensor(LOGITS, dtype=torch.float32), torch.tensor(LABELS)
    made = []

    def empty(*arguments, **options):
        made.append(real(*arguments, **options))
        return made[-1]

    real = torch.empty
    with mock.patch.object(torch, "empty", empty):
        loss, grad = cross_entropy_value_and_grad(x, y, axis=1)
        losses, _ = cross_entropy_value_and_grad(x, y, axis=1, reduction="none")
    rooms = {tensor.untyped_storage().data_ptr() for tensor in made}
    for result in (loss, grad, losses):
        assert result.untyped_storage().data_ptr() in rooms


def test_what_comes_back_may_lie_anywhere_in_its_room(gpu):
    x = torch.arange(24.0).reshape(4, 6)[:, 1:]
    assert torch.equal(_torch.give(_torch.lend(x)[1:, ::2], x), x[1:, ::2])


def test_what_is_checked_is_checked_on_the_stream(gpu, monkeypatch):
    """Where strides ask for a copy it is made there."""
    seen, real = [], _problem.View.logits
    monkeypatch.setattr(_problem.View, "logits", lambda *given: seen.append(gpu.stream) or real(*given))
    cross_entropy(torch.tensor(LOGITS), torch.tensor(LABELS), axis=1)
    assert seen == [STREAM]


def test_without_cupy_they_are_plain_code(gpu, monkeypatch):
    monkeypatch.setattr(_torch, "_cupy", lambda: None)
    x, y = torch.tensor(LOGITS), torch.tensor(LABELS)
    assert_loss(cross_entropy(x, y, axis=1).numpy(), oracle(LOGITS, LABELS, axis=1))
    assert not gpu
    with pytest.raises(ValueError, match=r"(?s)'cuda' cannot take .*\(their memory .*CuPy is not installed\)"):
        cross_entropy(x, y, axis=1, engine="cuda")


def test_a_gpu_that_is_too_old_runs_plain_code(gpu, monkeypatch):
    monkeypatch.setattr(hosted.Hosted, "chip", lambda self, array: 70)
    x, y = torch.tensor(LOGITS), torch.tensor(LABELS)
    assert_loss(cross_entropy(x, y, axis=1).numpy(), oracle(LOGITS, LABELS, axis=1))
    assert not gpu


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_an_engine_of_kernels_takes_tensors(dtype):
    """Also one that is handed over, as the emulation is: in host memory, with room that PyTorch makes."""
    engine = emulated.engine()
    x = torch.tensor(LOGITS).to(dtype).requires_grad_()
    y = torch.tensor(LABELS)
    cross_entropy(x, y, axis=1, engine=engine).backward()
    launches = len(engine.launcher.launches)
    assert launches >= 3
    assert engine.launcher.buffers == 0
    wanted = cross_entropy_grad(x, y, axis=1)
    torch.testing.assert_close(x.grad, wanted)
