"""PyTorch: the same numbers as torch.nn.functional.cross_entropy, and a citizen of its autograd."""

import gc
import itertools
import re
import subprocess
import sys
import threading
import tracemalloc
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from support.close import assert_grad, assert_loss
from support.oracle import oracle

from xent_array import (
    CrossEntropyLoss,
    cross_entropy,
    cross_entropy_grad,
    cross_entropy_value_and_grad,
    log_softmax,
    logsumexp,
    row_stats,
    softmax,
)

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

C = 5
SHAPES = {"1-D": (C,), "2-D": (7, C), "3-D": (4, C, 3), "4-D": (2, C, 3, 4)}
CASES = [
    case
    for case in itertools.product(
        ("index", "distribution"),
        ("none", "mean", "sum"),
        (False, True),
        (False, True),
        (False, True),
        SHAPES,
    )
    if not (case[0] == "distribution" and case[4])  # ignore_index is for class indices
]


def _name(number, case):
    kind, reduction, *options, shape = case
    given = [name for name, on in zip(("weight", "smoothing", "ignore"), options, strict=True) if on]
    return f"{number}of{len(CASES)}-" + "-".join([kind, reduction, *given, shape])


@pytest.mark.parametrize("case", [pytest.param(c, id=_name(n, c)) for n, c in enumerate(CASES, 1)])
def test_parity(case):
    kind, reduction, weighted, smoothed, ignoring, ndim = case
    rng = np.random.default_rng(CASES.index(case))
    shape = SHAPES[ndim]
    axis = min(1, len(shape) - 1)
    row_shape = shape[:axis] + shape[axis + 1 :]
    logits = 3 * rng.normal(size=shape)
    target = rng.integers(0, C, row_shape) if kind == "index" else rng.random(shape)
    weight = rng.random(C) if weighted else None
    upstream = rng.normal(size=row_shape if reduction == "none" else ())
    options = {"reduction": reduction, "label_smoothing": 0.2 if smoothed else 0.0}
    if ignoring:
        options["ignore_index"] = int(target.reshape(-1)[0])  # in 1-D: the only row there is

    x = torch.tensor(logits, requires_grad=True)
    t, w, g = (None if v is None else torch.tensor(v) for v in (target, weight, upstream))
    theirs = torch.nn.functional.cross_entropy(x, t, weight=w, **options)
    (their_grad,) = torch.autograd.grad(theirs, x, g)

    on_numpy = (logits, target, {"weight": weight, "grad_output": upstream})
    on_torch = (x, t, {"weight": w, "grad_output": g})
    for (a, y, arrays), engine in ((on_numpy, "cpu"), (on_numpy, "generic"), (on_torch, "generic")):
        loss, grad = cross_entropy_value_and_grad(a, y, axis=axis, engine=engine, **arrays, **options)
        assert_allclose(loss, theirs.detach(), rtol=1e-12, atol=1e-12)
        assert_allclose(grad, their_grad, rtol=1e-12, atol=1e-12)
    ours = cross_entropy(x, t, axis=axis, weight=w, **options)
    assert_allclose(ours.detach(), theirs.detach(), rtol=1e-12, atol=1e-12)
    assert_allclose(torch.autograd.grad(ours, x, g)[0], their_grad, rtol=1e-12, atol=1e-12)


# Rows with ties of the maximum, two and all of them, a mask, a confident row, and one that holds NaN and is ignored.
LOGITS = np.array([[2, 2, 1, 0], [1, 1, 1, 1], [0, 3, -np.inf, 1], [40, 0, 0, 0], [np.nan, 0, np.inf, 1]])
LABELS = np.array([0, 2, 1, 0, -100])
SOFT = np.array([[4, 2, 1, 1], [0, 8, 0, 0], [2, 2, 0, 4], [8, 0, 0, 0], [1, 1, 0, 0]]) / 8
EVERY_ROW = np.array([1.0, 2, 0.5, 3, 1])
ALL_BUT_THE_LAST = np.array([1.0, 2, 0.5, 3, 0])
OPTIONS = [
    {},
    {"weight": np.array([1, 0.5, 2, 0.25])},
    {"z_loss": 0.1},
    {"label_smoothing": 0.3},
    {"softcap": 3.0},
    {"weight": np.array([1, 0.5, 0, 3]), "z_loss": 0.1},
]


def differentiable(logits, target, options):
    """Loss and gradient as autograd has them, held against the oracle."""
    x = torch.tensor(logits, requires_grad=True)
    tensors = {k: torch.tensor(v) if isinstance(v, np.ndarray) else v for k, v in options.items()}
    loss = cross_entropy(x, torch.tensor(target), **tensors)
    loss.sum().backward()
    truth = oracle(logits, target, **options)
    assert_loss(loss.detach().numpy(), truth)
    assert_grad(x.grad.numpy(), truth)
    return x.grad


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options) or "plain")
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize(
    ("target", "sample_weight"),
    [(LABELS, EVERY_ROW), (SOFT, ALL_BUT_THE_LAST)],
    ids=["index", "distribution"],
)
def test_autograd(target, sample_weight, reduction, options, dtype):
    options = {"reduction": reduction, "sample_weight": sample_weight, **options}
    grad = differentiable(LOGITS.astype(dtype), target, options)
    assert_array_equal(grad[-1], 0)


@pytest.mark.parametrize(
    "broken",
    [[np.nan, 0, 1, 2], [0, np.nan, 1, 2], [np.inf, 0, 1, 2], [-np.inf] * 4],
    ids=["NaN on the label", "NaN", "inf", "-inf throughout"],
)
def test_autograd_of_a_row_without_a_softmax(broken):
    logits, labels = np.array([[2, 2, 1, 0], broken, [0, 3, -np.inf, 1]]), np.array([0, 0, 1])
    grad = differentiable(logits, labels, {"reduction": "sum"})
    assert_array_equal(grad.isnan().all(dim=1), [False, True, False])


def test_gradients_of_the_other_inputs():
    rng = np.random.default_rng(0)
    x, q, w, s = (torch.tensor(rng.random(shape), requires_grad=True) for shape in ((3, 4), (3, 4), (4,), (3,)))

    def loss(x, q, w, s):
        return cross_entropy(x, q, weight=w, sample_weight=s, label_smoothing=0.2, z_loss=0.1)

    assert torch.autograd.gradcheck(loss, (x, q, w, s))
    assert torch.autograd.gradgradcheck(loss, (x, q, w, s))


@pytest.mark.parametrize("weight", [None, [1.0, 0.5, 2, 0.25]], ids=["", "weight"])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_gradient_by_a_target_that_is_0(reduction, weight):
    """What a class without a target would add if it had some: also where it adds nothing now."""
    x, q = torch.tensor(LOGITS[:2]), torch.tensor([[0, 1, 0, 0], [0.5, 0, 0, 0.5]], dtype=torch.float64)
    options = {"reduction": reduction, "weight": None if weight is None else torch.tensor(weight, dtype=torch.float64)}
    grads = []
    for function in (cross_entropy, torch.nn.functional.cross_entropy):
        t = q.clone().requires_grad_()
        grads.append(torch.autograd.grad(function(x, t, **options).sum(), t)[0])
    assert (grads[1] > 0).all()
    assert_allclose(*grads, rtol=1e-12)


@pytest.mark.parametrize("target", [LABELS, SOFT], ids=["index", "distribution"])
def test_value_and_grad_is_detached(target):
    x, w = torch.tensor(LOGITS, requires_grad=True), torch.ones(4, dtype=torch.float64, requires_grad=True)
    s = torch.tensor(ALL_BUT_THE_LAST, requires_grad=True)
    g = torch.tensor(2.0, requires_grad=True)
    t = torch.tensor(target)
    out = torch.empty_like(x)
    loss, grad = cross_entropy_value_and_grad(x, t, weight=w, sample_weight=s, grad_output=g, out=out)
    alone = cross_entropy_grad(x, t, weight=w, sample_weight=s, grad_output=g, stats=row_stats(x, t, weight=w))
    assert not any(result.requires_grad for result in (loss, grad, alone))
    assert grad is out


class CrossEntropy(torch.autograd.Function):
    """Row losses whose backward pass starts from the row stats of the forward pass."""

    @staticmethod
    def forward(ctx, logits, target, options):
        ctx.arrays, ctx.options = (logits, target), options
        ctx.stats = row_stats(logits, target, **options)
        return ctx.stats.loss + options["z_loss"] * ctx.stats.lse**2

    @staticmethod
    def backward(ctx, grad_output):
        options = {"reduction": "none", "grad_output": grad_output, "stats": ctx.stats, **ctx.options}
        return cross_entropy_grad(*ctx.arrays, **options), None, None


@pytest.mark.parametrize("kind", ["index", "distribution"])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_autograd_function_of_saved_stats(kind, softcap):
    rng = np.random.default_rng(0)
    x = torch.tensor(rng.normal(size=(3, 5, 2)), requires_grad=True)
    target = torch.tensor(rng.integers(0, 5, (3, 2)) if kind == "index" else rng.random((3, 5, 2)))
    options = {"axis": 1, "weight": torch.tensor(rng.random(5)), "label_smoothing": 0.1}
    options |= {"z_loss": 0.2, "softcap": softcap}
    assert torch.autograd.gradcheck(CrossEntropy.apply, (x, target, options))


# -- tensors without numbers -------------------------------------------------------------------------------------

X, Y = (
    torch.tensor(np.array([[2, 2, 1, 0], [0, 3, -7, 1], [40, 0, 0, 0]]), dtype=torch.float32),
    torch.tensor([0, 1, 2]),
)
# A class that was not there while tracing, one to ignore, and one that is no class.
OTHERS = [torch.tensor([3, 1, 0]), torch.tensor([3, -100, 0]), torch.tensor([3, 4, 0])]


SMOOTHED = {"z_loss": 0.1, "label_smoothing": 0.1}


def row_losses_and_grad(x, y):
    return cross_entropy_value_and_grad(x, y, reduction="none", **SMOOTHED)


def mean(x, y):
    return (cross_entropy(x, y),)


def make_fx(mode):
    def trace(function, x, y):
        from torch.fx.experimental.proxy_tensor import make_fx

        return make_fx(function, tracing_mode=mode)(x, y)

    return trace


def exported(function, x, y):
    class Module(torch.nn.Module):
        def forward(self, x, y):
            return function(x, y)

    rows = torch.export.Dim("rows", min=2)
    return torch.export.export(Module(), (x, y), strict=False, dynamic_shapes=({0: rows}, {0: rows})).module()


def jit_traced(function, x, y):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is deprecated, and that shapes become constants
        return torch.jit.trace(function, (x, y))


def compiled(function, x, y):
    torch.compiler.reset()
    ready = torch.compile(function, backend="eager")

    def quiet(x, y):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it cannot see through caches
            return ready(x, y)

    quiet(x, y)
    return quiet


TRACERS = {
    **{f"make_fx-{mode}": make_fx(mode) for mode in ("real", "fake", "symbolic")},
    "export": exported,
    "jit.trace": jit_traced,
    "compile": compiled,
}


@pytest.mark.parametrize("function", [row_losses_and_grad, mean])
@pytest.mark.parametrize("tracer", TRACERS)
def test_what_was_traced_is_right_for_other_labels(tracer, function):
    """Nothing that was read while tracing is kept: labels that all count then need not do so later.

    An operation that a compiler was shown looks at them when it runs.
    """
    traced = TRACERS[tracer](function, X, Y)
    others = OTHERS
    if tracer in ("export", "compile"):
        others = OTHERS[:2]
        with pytest.raises(IndexError, match=r"target\[1\] is 4, which is not a class"):
            traced(X, OTHERS[2])
    for labels in others:
        options = {"reduction": "none", **SMOOTHED} if function is row_losses_and_grad else {}
        truth = oracle(X.numpy(), labels.numpy(), **options)
        for result, check in zip(traced(X, labels), (assert_loss, assert_grad), strict=False):
            check(result.numpy(), truth)


def test_export_of_any_number_of_rows():
    function = exported(row_losses_and_grad, X, Y)
    x, y = torch.cat([X, X - 1]), torch.cat([Y, OTHERS[1]])
    truth = oracle(x.numpy(), y.numpy(), reduction="none", **SMOOTHED)
    loss, grad = function(x, y)
    assert_loss(loss.numpy(), truth)
    assert_grad(grad.numpy(), truth)


def fake(*tensors):
    from torch._subclasses.fake_tensor import FakeTensorMode

    mode = FakeTensorMode()
    return mode, [mode.from_tensor(tensor) for tensor in tensors]


@pytest.mark.parametrize("validate", [None, True])
def test_fake_tensors(validate):
    mode, (x, y, out) = fake(X, Y, torch.empty_like(X))
    with mode:
        loss, grad = cross_entropy_value_and_grad(x, y, out=out, validate=validate)
        assert type(loss) is type(grad) is type(x)
        assert grad is out
        assert cross_entropy_grad(x, y, stats=row_stats(x, y)).shape == X.shape


def test_meta_tensors():
    x, y = X.to("meta"), Y.to("meta")
    out = torch.empty_like(x)
    loss, grad = cross_entropy_value_and_grad(x, y, out=out, validate=True)
    assert grad is out
    assert loss.device == x.device
    with pytest.raises(TypeError, match="must be on the device of logits, meta, but is on cpu"):
        cross_entropy(x, Y)


def test_function_transforms():
    """A gradient by torch.func of rows with a bad label, which nobody can look at; batches; both together."""
    grads = torch.func.vmap(torch.func.grad(cross_entropy))(torch.stack([X] * 4), torch.stack([Y, *OTHERS]))
    values, ours = torch.func.vmap(cross_entropy_value_and_grad)(torch.stack([X] * 4), torch.stack([Y, *OTHERS]))
    alone = [torch.func.functionalize(cross_entropy_value_and_grad)(X, labels) for labels in (Y, *OTHERS)]
    for k, labels in enumerate([Y, *OTHERS]):
        truth = oracle(X.numpy(), labels.numpy())
        for grad in (grads[k], ours[k], alone[k][1], torch.func.grad(cross_entropy)(X, labels)):
            assert_grad(grad.numpy(), truth)
        for loss in (values[k], alone[k][0]):
            assert_loss(loss.numpy(), truth)


def test_labels_with_memory_are_looked_at():
    with pytest.raises(IndexError, match=r"target\[1\] is 4"):
        cross_entropy(X, OTHERS[2])


# -- a citizen of autograd ---------------------------------------------------------------------------------------

BATCH, CLASSES = torch.tensor(np.random.default_rng(1).normal(size=(6, 5))), torch.tensor([0, 3, 2, 4, 2, 1])
IGNORING = torch.tensor([0, 3, -100, 4, 2, 1])
ROWS, PER_CLASS = torch.arange(1.0, 7).double(), torch.arange(0.5, 3, 0.5).double()
plain = torch.nn.functional.cross_entropy
forward_mode = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # which PyTorch uses for it
SHARED = [  # options that PyTorch has too
    {},
    {"reduction": "none"},
    {"reduction": "sum", "weight": PER_CLASS},
    {"label_smoothing": 0.1, "weight": PER_CLASS, "ignore_index": 3},
]
OWN = [
    {"z_loss": 0.1, "softcap": 2.0},
    {"reduction": "none", "sample_weight": ROWS},
    {"denominator": 2.5, "label_smoothing": 0.1, "z_loss": 0.2},
]
named = {"ids": lambda options: "-".join(map(str, options)) or "plain"}
each_shared = pytest.mark.parametrize("options", SHARED, **named)
each_option = pytest.mark.parametrize("options", SHARED + OWN, **named)


def leaf(dtype=torch.float64):
    return BATCH.to(dtype, copy=True).requires_grad_()


@each_option
def test_the_loss_is_one_node(options):
    x = leaf()
    middle = x * 2
    for logits in (x, middle):
        node = cross_entropy(logits, CLASSES, **options).grad_fn
        assert node.name() == "_LossBackward"
        ((below, number),) = node.next_functions
        assert below.variable is x if logits is x else below is middle.grad_fn
        assert number == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("factor", [1.0, 3.7, 0.0, -1e35])
@each_option
def test_a_second_backward_gives_the_same_bits(options, factor, dtype):
    x = leaf(dtype)
    loss = (cross_entropy(x, CLASSES, **options) * factor).sum()
    grads = []
    for retain_graph in (True, True, False):
        loss.backward(retain_graph=retain_graph)
        grads.append(x.grad.clone())
        x.grad.fill_(7)  # a gradient is its owner's
        x.grad = None
    for grad in grads[1:]:
        torch.testing.assert_close(grad, grads[0], rtol=0, atol=0, equal_nan=True)
    with pytest.raises(RuntimeError, match="Trying to backward through the graph a second time"):
        loss.backward()


@forward_mode
@each_option
def test_derivatives_of_every_kind(options):
    """Once and twice, backward and forward, and in batches: against differences."""

    def loss(x):
        return cross_entropy(x, CLASSES, **options)

    assert torch.autograd.gradcheck(loss, leaf(), check_batched_grad=True, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(loss, leaf(), check_batched_grad=True, check_fwd_over_rev=True)


@each_shared
def test_double_backward(options):
    second = []
    for function in (cross_entropy, plain):
        x = leaf()
        upstream = torch.full_like(function(x, CLASSES, **options), 0.5).requires_grad_()
        (grad,) = torch.autograd.grad(function(x, CLASSES, **options), x, upstream, create_graph=True)
        second.append(torch.autograd.grad((grad**3).sum(), (x, upstream)))
    torch.testing.assert_close(*second, rtol=1e-11, atol=1e-12)


TRANSFORMS = {
    "grad": lambda f: torch.func.grad(f)(BATCH),
    "vjp": lambda f: torch.func.vjp(f, BATCH)[1](f(BATCH)),
    "jvp": lambda f: torch.func.jvp(f, (BATCH,), (BATCH.cos(),)),
    "jacrev": lambda f: torch.func.jacrev(f)(BATCH),
    "jacfwd": lambda f: torch.func.jacfwd(f)(BATCH),
    "hessian": lambda f: torch.func.hessian(f)(BATCH),
    "vmap": lambda f: torch.func.vmap(f)(torch.stack([BATCH, BATCH / 2])),
    "functional.hessian": lambda f: torch.autograd.functional.hessian(f, BATCH, vectorize=True),
    "functional.jacobian": lambda f: torch.autograd.functional.jacobian(f, BATCH),
}


@forward_mode
@each_shared
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms(transform, options):
    if "reduction" in options:  # of one number
        options = {**options, "reduction": "mean"}
    results = [TRANSFORMS[transform](lambda x, f=f: f(x, CLASSES, **options)) for f in (cross_entropy, plain)]
    torch.testing.assert_close(*results, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("criterion", [cross_entropy, CrossEntropyLoss()], ids=["function", "object"])
@pytest.mark.parametrize("labels", [CLASSES, IGNORING], ids=["", "ignoring"])
def test_a_transform_of_something_else(criterion, labels):
    """Tensors, also such as autograd records, that the transform does not know of."""
    criterion(BATCH, labels)  # now their kind is known
    two, wanted = torch.tensor(2.0, dtype=torch.float64), plain(BATCH, labels)
    for logits in (leaf(), BATCH):

        def product(factor, labels=labels, logits=logits):
            return factor * criterion(logits, labels)

        torch.testing.assert_close(torch.func.grad(product)(two), wanted)
        torch.testing.assert_close(torch.func.vmap(product)(torch.stack([two, two])), 2 * wanted.expand(2))
        over_labels = torch.func.vmap(product, (None, 0))(two, torch.stack([labels, labels]))
        torch.testing.assert_close(over_labels, 2 * wanted.expand(2))


@forward_mode
@each_shared
def test_forward_mode(options):
    from torch.autograd import forward_ad

    results = []
    for function in (cross_entropy, plain):
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(BATCH, BATCH.cos())
            results.append(forward_ad.unpack_dual(function(dual, CLASSES, **options)))
    torch.testing.assert_close(*results, rtol=1e-11, atol=1e-12)


def test_a_batch_of_upstream_gradients():
    results = []
    for function in (cross_entropy, plain):
        x = leaf()
        loss = function(x, CLASSES, reduction="none")
        results += torch.autograd.grad(loss, x, torch.eye(6).double(), is_grads_batched=True)
    assert results[0].shape == (6, 6, 5)
    torch.testing.assert_close(*results)


def test_hooks():
    x, seen = leaf(), []
    loss = cross_entropy(x, CLASSES)
    x.register_hook(lambda grad: seen.append(grad.clone()) or 3 * grad)
    x.register_post_accumulate_grad_hook(lambda x: seen.append(x.grad.clone()))
    loss.register_hook(lambda grad: 2 * grad)
    loss.grad_fn.register_hook(lambda grads, _: (grads[0] * 5,))
    loss.backward()
    whole = cross_entropy_grad(BATCH, CLASSES)
    torch.testing.assert_close(seen, [10 * whole, 30 * whole])


def test_autocast():
    torch.manual_seed(0)
    linear, data = torch.nn.Linear(4, 5), torch.randn(6, 4)
    with torch.autocast("cpu", torch.bfloat16):
        logits = linear(data)
        loss = cross_entropy(logits, CLASSES)
        theirs = plain(logits, CLASSES)
    assert (logits.dtype, loss.dtype) == (torch.bfloat16, torch.float32)
    grads = [torch.autograd.grad(value, linear.weight, retain_graph=True)[0] for value in (loss, theirs)]
    torch.testing.assert_close(loss, theirs.float())
    torch.testing.assert_close(*grads, rtol=0.02, atol=0.002)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_where_nothing_is_recorded(mode):
    wanted = plain(BATCH, CLASSES)
    with mode():
        for x in (leaf(), BATCH.clone()):
            assert not cross_entropy(x, CLASSES).requires_grad
            assert not CrossEntropyLoss()(x, CLASSES).requires_grad
            torch.testing.assert_close(cross_entropy(x, CLASSES), wanted)
            loss, grad = cross_entropy_value_and_grad(x, CLASSES, out=x.detach())
            torch.testing.assert_close((loss, grad), (wanted, cross_entropy_grad(BATCH, CLASSES)))
    assert not cross_entropy(BATCH, CLASSES).requires_grad


@pytest.mark.parametrize("options", [{}, {"z_loss": 0.1}, {"reduction": "none"}], **named)
def test_no_gradient_is_made_where_none_is_recorded(options):
    x, y = torch.zeros(500, 400).requires_grad_(), torch.zeros(500, dtype=torch.int64)
    peaks = []
    for recorded in (True, False, False):
        with torch.set_grad_enabled(recorded):
            tracemalloc.start()
            cross_entropy(x, y, **options)
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
    assert peaks[0] >= x.nbytes > 4 * peaks[-1]


@forward_mode
@pytest.mark.parametrize(
    "function",
    [softmax, log_softmax, logsumexp, lambda x: row_stats(x, CLASSES).loss, lambda x: row_stats(x, CLASSES).lse],
    ids=["softmax", "log_softmax", "logsumexp", "loss", "lse"],
)
def test_the_other_functions_are_differentiable(function):
    assert torch.autograd.gradcheck(function, leaf(), check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(function, leaf())
    torch.testing.assert_close(function(leaf()).detach(), function(BATCH), rtol=1e-13, atol=1e-13)


LAYOUTS = {
    "contiguous": lambda x: x,
    "channels last": lambda x: x.to(memory_format=torch.channels_last),
    "transposed": lambda x: x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
    "every other": lambda x: x.repeat_interleave(2, dim=3)[..., ::2],
    "expanded": lambda x: x[:1, :, :1].expand(2, 5, 3, 4),
    "from the middle": lambda x: torch.cat([x, x])[1:3].roll(1, dims=0),
    "negated": lambda x: torch.complex(x, -x).conj().imag,
}


@pytest.mark.parametrize(
    ("layout", "dtype"),
    [(layout, dtype) for layout in LAYOUTS for dtype in (torch.float64, torch.bfloat16)][:-1],  # no complex of bfloat16
    ids=str,
)
def test_layouts(layout, dtype):
    random = torch.Generator().manual_seed(0)
    x = LAYOUTS[layout](torch.randn(2, 5, 3, 4, generator=random, dtype=torch.float64).to(dtype))
    y = torch.randint(5, (2, 4, 3), generator=random).mT
    same = x.clone(memory_format=torch.contiguous_format).requires_grad_()
    loss = cross_entropy(same, y.contiguous(), axis=1)
    loss.backward()
    x = x.detach().requires_grad_()
    other = cross_entropy(x, y, axis=1)
    other.backward()
    torch.testing.assert_close((other, x.grad), (loss, same.grad), rtol=1e-12, atol=0)
    if layout == "channels last":
        assert x.grad.is_contiguous(memory_format=torch.channels_last)


def test_a_parameter_is_a_tensor_and_a_subclass_has_its_own_ways():
    parameter = torch.nn.Parameter(BATCH.clone())
    for _ in range(2):  # and when its kind is known
        assert cross_entropy(parameter, CLASSES).grad_fn.name() == "_LossBackward"

    class Noting(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, kinds, args=(), kwargs=None):
            seen.append(function)
            return super().__torch_function__(function, kinds, args, kwargs or {})

    for logits, labels, operation in (
        (BATCH.as_subclass(Noting), CLASSES, "exp"),
        (BATCH, CLASSES.as_subclass(Noting), "__eq__"),
    ):
        seen = []
        loss = cross_entropy(logits, labels)
        assert type(loss) is Noting
        assert operation in {function.__name__ for function in seen}
        torch.testing.assert_close(loss.as_subclass(torch.Tensor), plain(BATCH, CLASSES))


def test_a_mode_sees_every_operation():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Noting(TorchDispatchMode):
        def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    cross_entropy(BATCH, CLASSES)  # now its kind is known
    seen = []
    with Noting():
        cross_entropy(BATCH, CLASSES)
    assert torch.ops.aten.exp.default in seen


@pytest.mark.parametrize("changed", ["logits", "target", "weight", "sample_weight", "denominator"])
def test_what_was_saved_must_not_change(changed):
    given = {
        "logits": leaf() * 1,
        "target": CLASSES.clone(),
        "weight": PER_CLASS.clone(),
        "sample_weight": ROWS.clone(),
        "denominator": torch.tensor(3.0, dtype=torch.float64),
    }
    loss = cross_entropy(**given)
    with torch.no_grad():
        given[changed].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("write", [cross_entropy_value_and_grad, cross_entropy_grad, "object"])
def test_out_is_a_change_that_autograd_sees(write):
    result = leaf().exp()  # which its own backward needs
    out = result.detach()
    if write == "object":
        criterion = CrossEntropyLoss()
        criterion(BATCH, CLASSES)
        criterion.backward(out=out)
    else:
        write(BATCH, CLASSES, out=out)
    torch.testing.assert_close(out, cross_entropy_grad(BATCH, CLASSES))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.sum().backward()


def test_out_with_elements_on_each_other_is_refused():
    for out in (torch.zeros(5).double().expand(6, 5), torch.zeros(10).double().as_strided((6, 5), (1, 1))):
        with pytest.raises(ValueError, match="share memory with each other"):
            cross_entropy_grad(BATCH, CLASSES, out=out)


def test_out_that_has_no_memory_is_refused():
    negated = torch.zeros(6, 5, dtype=torch.complex128).conj().imag
    for out in (negated, torch.zeros(6, 5).double().as_subclass(Own)):
        with pytest.raises(TypeError, match=r"^out has no memory that the engine 'cpu' can write to"):
            cross_entropy_grad(BATCH, CLASSES, out=out)
        assert cross_entropy_grad(BATCH, CLASSES, out=out, engine="generic") is out
        assert_allclose(out.resolve_neg(), cross_entropy_grad(BATCH, CLASSES), rtol=1e-12, atol=1e-15)


each_labels = pytest.mark.parametrize("labels", [CLASSES, IGNORING], ids=["all count", "one is ignored"])


@each_labels
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("factor", [1, 2, -0.5, 0, 1e200, -1e-200, np.inf, np.nan])
def test_a_factor_from_above(factor, reduction, labels):
    """As `cross_entropy_grad` takes it, and rows that do not count are 0 whatever it is."""
    x = leaf()
    factors = torch.full((6,) if reduction == "none" else (), factor, dtype=torch.float64)
    loss = cross_entropy(x, labels, reduction=reduction)
    (loss * factors).sum().backward()
    wanted = cross_entropy_grad(BATCH, labels, reduction=reduction, grad_output=factors)
    torch.testing.assert_close(x.grad, wanted, rtol=1e-14, atol=0, equal_nan=True)
    assert_array_equal(x.grad[labels < 0], 0)


@each_labels
@pytest.mark.parametrize("other", [0, np.inf, np.nan])
def test_a_factor_for_each_row(other, labels):
    """One that is extreme leaves the other rows alone."""
    x, factors = leaf(), torch.tensor([1, 2, 3, other, -1, 0.5], dtype=torch.float64)
    cross_entropy(x, labels, reduction="none").backward(factors)
    wanted = cross_entropy_grad(BATCH, labels, reduction="none", grad_output=factors)
    torch.testing.assert_close(x.grad, wanted, rtol=1e-14, atol=0, equal_nan=True)
    assert_array_equal(x.grad[[0, 1, 4, 5]].isfinite(), True)
    assert_array_equal(x.grad[labels < 0], 0)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_gradient_in_16_bits_is_rounded_once(dtype, reduction):
    """After what comes from above has been multiplied in, though it was made before that was known."""
    x = torch.randn(50, 5, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    y = torch.arange(50) % 5
    upstream = torch.linspace(1.1, 2.9, 50) if reduction == "none" else torch.tensor(2.7)
    cross_entropy(x, y, reduction=reduction, z_loss=0.01).backward(upstream)
    wanted = cross_entropy_grad(x, y, reduction=reduction, z_loss=0.01, grad_output=upstream)
    assert torch.equal(x.grad, wanted)


def test_a_loss_scale_keeps_the_digits_of_float16():
    """The gradient of a mean over many rows is below what float16 holds, and is held once it is scaled."""
    random = np.random.default_rng(0)
    logits, labels = random.normal(size=(4096, 30)).astype(np.float16), random.integers(0, 30, 4096)
    x = torch.tensor(logits, requires_grad=True)
    (cross_entropy(x, torch.tensor(labels)) * 2**15).backward()
    assert_grad(x.grad.numpy(), oracle(logits, labels, grad_output=2.0**15))


def test_the_loss_may_be_changed_in_place():
    """As gradient accumulation and masks do it."""
    for change in (lambda loss: loss.div_(4), lambda loss: loss.masked_fill_(CLASSES == 3, 0)):
        grads = []
        for function in (cross_entropy, plain):
            x = leaf()
            loss = function(x, CLASSES, reduction="none")
            change(loss)
            loss.sum().backward()
            grads.append(x.grad)
        torch.testing.assert_close(*grads)


@pytest.fixture
def no_collector():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("options", [{}, {"z_loss": 0.1}, {"reduction": "none"}], **named)
def test_memory_goes_when_it_should(no_collector, options, dtype):
    """The gradient with backward, whoever keeps the loss; all of it with the graph; and without a garbage collector."""
    for backward in (True, False):
        x = leaf(dtype)
        middle = x * 1
        loss = cross_entropy(middle, CLASSES, **options)
        held = loss.grad_fn.held
        kept = [held.grad] if held.stats is None else held.stats[:4]
        references = [weakref.ref(tensor) for tensor in kept]
        alive = weakref.ref(held)
        references.append(weakref.ref(middle))
        del held, kept, middle
        if backward:
            loss.sum().backward()
            x.grad = None
            if dtype != torch.float16:
                assert references[0]() is None
        node = weakref.ref(loss.grad_fn)
        del loss
        assert [reference() for reference in (*references, alive, node)] == [None] * (len(references) + 2)


def test_no_second_array_in_the_size_of_the_logits():
    """The gradient that forward makes becomes that of the logits, scaled in its place where there is a scale."""
    for factor in (1.0, 2.5):
        x = leaf()
        loss = cross_entropy(x, CLASSES)
        made = loss.grad_fn.held.grad.data_ptr()
        (loss * factor).backward()
        assert x.grad.data_ptr() == made
        assert x.grad._version == (factor != 1)  # how often it was written to


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint(reentrant):
    from torch.utils.checkpoint import checkpoint

    x = leaf()
    checkpoint(lambda x: cross_entropy(2 * x, CLASSES), x, use_reentrant=reentrant).backward()
    y = leaf()
    cross_entropy(2 * y, CLASSES).backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=0, atol=0)


def test_what_is_saved_goes_through_hooks():
    packed = []

    def pack(tensor):
        packed.append(tensor)
        return tensor.numpy(force=True).copy()

    x = leaf()
    with torch.autograd.graph.saved_tensors_hooks(pack, torch.from_numpy):
        loss = cross_entropy(x, CLASSES, weight=PER_CLASS, sample_weight=ROWS)
    assert [tuple(tensor.shape) for tensor in packed] == [(6, 5), (6,), (5,), (6,)]
    packed.clear()
    for _ in range(2):  # from the gradient, and from what was unpacked
        x.grad = None
        loss.backward(retain_graph=True)
        torch.testing.assert_close(x.grad, cross_entropy_grad(BATCH, CLASSES, weight=PER_CLASS, sample_weight=ROWS))


def test_several_threads():
    def one(seed):
        random = torch.Generator().manual_seed(seed)
        x = torch.randn(60, 50, generator=random).requires_grad_()
        y = torch.randint(50, (60,), generator=random)
        barrier.wait()
        for _ in range(20):
            x.grad = None
            (cross_entropy(x, y) * (seed + 1)).backward()
            ours = x.grad
            x.grad = None
            (plain(x, y) * (seed + 1)).backward()
            torch.testing.assert_close(ours, x.grad)

    barrier = threading.Barrier(4)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(one, range(4)))


def test_several_threads_of_one_graph():
    """Each takes the gradient by its own part of what was recorded together."""
    x = leaf()
    middle = 2 * x
    losses = [cross_entropy(middle, CLASSES, z_loss=k / 10) for k in range(4)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda loss: loss.backward(retain_graph=True), losses))
    wanted = sum(cross_entropy_grad(2 * BATCH, CLASSES, z_loss=k / 10) for k in range(4))
    torch.testing.assert_close(x.grad, 2 * wanted)


# -- the textbook's object ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", [None, "cpu", "generic"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_object_says_that_its_loss_is_detached(reduction, engine):
    x, criterion = leaf(), CrossEntropyLoss(reduction=reduction, engine=engine)
    loss = criterion(x, CLASSES)
    torch.testing.assert_close(loss.detach(), plain(BATCH, CLASSES, reduction=reduction))
    loss /= 4  # it is the user's
    grad = criterion.backward()
    assert not grad.requires_grad
    torch.testing.assert_close(grad, cross_entropy_grad(BATCH, CLASSES, reduction=reduction))
    with pytest.raises(RuntimeError, match=r"use xent_array\.cross_entropy, or the module xent_array\.torch\.CrossE"):
        loss.sum().backward()
    assert x.grad is None
    assert not criterion(BATCH, CLASSES).requires_grad
    weight = PER_CLASS.clone().requires_grad_()
    assert not CrossEntropyLoss(weight)(BATCH, CLASSES).requires_grad
    with pytest.raises(RuntimeError, match="its gradient comes from the object's own backward"):
        torch.func.grad(CrossEntropyLoss())(BATCH, CLASSES)


# -- mistakes ----------------------------------------------------------------------------------------------------

FLOATS = np.random.default_rng(2).standard_normal((6, 5), dtype=np.float32)
INDICES = np.array([0, 3, 4, 1, 2, 2])
MISTAKES = {
    "logits": [FLOATS.astype("int32"), FLOATS > 0, FLOATS + 0j, FLOATS[:, :0], FLOATS[0, 0].reshape(()), FLOATS[0]],
    "target": [
        INDICES + 0.5, INDICES.astype("float16"), INDICES > 2, INDICES + 0j, INDICES[:, None], INDICES[:3], FLOATS + 0j,
        INDICES + 1, INDICES - 1, (INDICES + 254).astype("uint8"), [[1, 2], [3]], ["a"] * 6, None, "abc", 1.5,
    ],
    "axis": [2, -3, 1.5, None],
    "weight": [np.ones(4), np.ones((5, 1)), np.ones(5) > 0, np.ones(5) + 0j, np.full(5, 1e39), [1e39] * 5, 2.0, "abc"],
    "sample_weight": [np.ones(5), np.ones((6, 1)), np.ones(6) + 0j, np.full(6, 1e39), [1e39] * 6, 2.0],
    "ignore_index": [1.5, True, "abc"],
    "label_smoothing": [1.5, -0.1, np.array(1.5), "abc", True, 10**400],
    "z_loss": [-1.0, 1e39, np.inf, np.array(-1.0)],
    "softcap": [0.0, 1e-39, np.array(0.0)],
    "denominator": [np.ones(6), 1e-39, np.array(1e-39), np.inf, np.array(np.inf), np.array(1j), "abc", [4.0]],
    "reduction": ["avg", None],
    "validate": [3],
    "engine": ["gpu", 3],
    "grad_output": [np.ones(6), 1e39, "4", [4.0], 10**400],
    "out": [np.zeros((5, 6), "float32"), np.zeros((6, 5)), [[0.0] * 5] * 6],
}  # fmt: skip
SHARED_MISTAKES = {  # of several arguments together
    "ignore_index of a distribution": {"target": abs(FLOATS), "ignore_index": 1},
    "denominator of a sum": {"reduction": "sum", "denominator": 3.0},
    "axis": {"logits": np.zeros((2, 3, 4), "float32"), "target": np.zeros((2, 4), int)},
    "grad_output of rows": {"reduction": "none", "grad_output": np.ones(5)},
    "grad_output of rows that is too large": {"reduction": "none", "grad_output": np.full(6, 1e39)},
    "out that is the target": {"target": (same := abs(FLOATS)), "out": same},
    "out that is half the logits": {"logits": (whole := np.zeros((9, 5), "float32"))[:6], "out": whole[3:]},
}
TOLD = [({name: value}, f"{name}-{n}") for name, values in MISTAKES.items() for n, value in enumerate(values)]
TOLD += [(given, name) for name, given in SHARED_MISTAKES.items()]


def as_tensors(given):
    """The same arguments with tensors in the place of arrays, in the same memory."""
    return {name: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for name, v in given.items()}


@pytest.mark.parametrize("given", [pytest.param(given, id=name) for given, name in TOLD])
def test_a_mistake_is_told_as_it_is_with_numpy(given):
    """In the same words, but for those of the library."""
    given = {"logits": FLOATS, "target": INDICES, **given}
    with pytest.raises(Exception, match=r".") as with_numpy:
        cross_entropy_grad(**given)
    tensors = as_tensors(given)
    for _ in range(2):
        with pytest.raises(with_numpy.type) as raised:
            cross_entropy_grad(**tensors)
        told = str(with_numpy.value)
        for numpy, theirs in (
            ("target.astype('int64')", "target.int()"),
            ("logits.astype('float32')", "logits.float()"),
            ("numpy.ndarray", "torch.Tensor"),
            ("library of logits, numpy", "library of logits, array_api_compat.torch"),
        ):
            told = told.replace(numpy, theirs)
        assert str(raised.value) == told
        cross_entropy(BATCH.float(), CLASSES)  # after which its kind is known


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_advice_on_labels_works(library):
    make = {"numpy": np.asarray, "torch": torch.asarray}[library]
    xp = {"numpy": np, "torch": torch}[library]
    logits = make(FLOATS)
    for target in (make(INDICES.astype("float32")), make(INDICES.astype("float64")), INDICES.astype(float).tolist()):
        with pytest.raises(TypeError, match="class indices must be integers") as raised:
            cross_entropy(logits, target)
        advice = re.search(r"\(write (.*?\))\)", str(raised.value))[1]
        converted = eval(advice, {"target": target, "xp": xp, "numpy": np})
        assert cross_entropy(logits, converted) == cross_entropy(logits, make(INDICES))


@pytest.mark.parametrize("kind", ["float8_e4m3fn", "complex64", "float4_e2m1fn_x2"])
def test_a_dtype_that_numpy_has_not_is_named(kind):
    x = torch.zeros(6, 5).to(torch.uint8).view(torch.float4_e2m1fn_x2) if "x2" in kind else FLOATS
    x = x if "x2" in kind else torch.tensor(FLOATS).to(getattr(torch, kind))
    with pytest.raises(TypeError, match=rf"logits must be of dtype .* got {kind}, which is not converted"):
        cross_entropy(x, CLASSES)
    with pytest.raises(TypeError, match=rf"distribution must be float, integer or boolean, got dtype {kind}"):
        cross_entropy(torch.zeros(x.shape), x)
    if "x2" not in kind:
        with pytest.raises(TypeError, match=rf"weight must be real numbers.* got {kind}"):
            cross_entropy(BATCH, CLASSES, weight=x[0])


def test_an_engine_that_cannot_have_the_memory_says_why():
    weight = PER_CLASS.clone().requires_grad_()
    for call, why in (
        (lambda: cross_entropy(BATCH, CLASSES, weight=weight, engine="cpu"), "what autograd records"),
        (lambda: cross_entropy(BATCH.to("meta"), CLASSES.to("meta"), engine="cpu"), "they are traced or"),
        (lambda: cross_entropy(BATCH.as_subclass(Own), CLASSES, engine="cpu"), "a subclass of Tensor"),
        (
            lambda: torch.func.grad(lambda x: cross_entropy(x, CLASSES, engine="cpu"))(BATCH),
            "they are traced or transformed",
        ),
    ):
        with pytest.raises(ValueError, match=rf"'cpu' cannot take .* \(their memory cannot be borrowed: {why}"):
            call()
    assert cross_entropy(BATCH, CLASSES, engine="cpu") == cross_entropy(BATCH, CLASSES)


class Own(torch.Tensor):
    """A subclass."""


# -- what a first reader tried -----------------------------------------------------------------------------------

CONFIDENT = [[17.0, 0.0], [40.0, 0.0], [30.0, 10.0, 1.0, 0.0], [3.0, 0.0, -np.inf, -90.0]]
WAYS = {
    "backward": lambda loss, x: torch.autograd.grad(loss(x), x)[0],
    "create_graph": lambda loss, x: torch.autograd.grad(loss(x), x, create_graph=True)[0].detach(),
    "torch.func": lambda loss, x: torch.func.grad(loss)(x.detach()),
    "generic": lambda loss, x: torch.autograd.grad(loss(x, engine="generic"), x)[0],
}


@pytest.mark.parametrize("kind", ["index", "one-hot"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("row", CONFIDENT, ids=str)
def test_a_confident_row_keeps_its_digits_however_it_is_differentiated(row, way, kind):
    logits = np.array([row], dtype=np.float32)
    target = np.array([0]) if kind == "index" else np.eye(1, len(row))
    w = torch.arange(1.0, len(row) + 1)

    def loss(x, engine=None):
        return cross_entropy(x, torch.tensor(target), weight=w, reduction="sum", engine=engine)

    grad = WAYS[way](loss, torch.tensor(logits, requires_grad=True)).numpy()
    truth = oracle(logits, target, weight=w.numpy(), reduction="sum")
    assert_grad(grad, truth)
    assert_allclose(grad[0, 0], np.float64(truth.grad[0, 0]), rtol=8 * 2.0**-23)


@pytest.mark.parametrize("default", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_lists_are_taken_in_the_dtype_of_the_arithmetic(default, monkeypatch):
    x, soft, weight = torch.tensor(LOGITS[:4]), SOFT[:4] / 3, [0.1, 0.2, 0.3, 1e5]
    torch.set_default_dtype(default)
    try:
        for target in (soft.tolist(), LABELS[:4].tolist()):
            loss = cross_entropy(x, target, weight=weight, sample_weight=[0.1, 0.7, 0.3, 0.9])
            wanted = oracle(LOGITS[:4], np.array(target), weight=np.array(weight), sample_weight=[0.1, 0.7, 0.3, 0.9])
            assert_loss(loss.numpy(), wanted)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("option", ["z_loss", "softcap", "label_smoothing"])
def test_an_option_by_which_nothing_is_differentiated(option):
    value = torch.tensor(0.5, requires_grad=True)
    with pytest.raises(TypeError, match=f"{option} is a number by which nothing is differentiated"):
        cross_entropy(BATCH, CLASSES, **{option: value})
    assert cross_entropy(BATCH, CLASSES, **{option: value.detach()}) == cross_entropy(BATCH, CLASSES, **{option: 0.5})


def test_a_bad_label_beside_weights_that_are_recorded():
    labels = torch.tensor([0, 9, 1])
    for weight, says in (([1.0, 1.0, 2.0], r"target\[1\] is 9"), ([1.0, 0.0, 2.0], None)):
        s = torch.tensor(weight, requires_grad=True)
        if says is None:
            assert cross_entropy(BATCH[:3], labels, sample_weight=s).isfinite()
        else:
            with pytest.raises(IndexError, match=says):
                cross_entropy(BATCH[:3], labels, sample_weight=s)


@pytest.mark.filterwarnings("ignore:Sparse", "ignore:The PyTorch API of nested tensors")
def test_tensors_that_are_not_dense_are_named():
    cross_entropy(BATCH, CLASSES)  # their kind is known now
    for x in (BATCH.to_sparse(), BATCH.to_sparse_csr(), BATCH.float().to_mkldnn()):
        with pytest.raises(TypeError, match=r"logits must be a dense array, got a torch.Tensor .*pass .to_dense\(\)"):
            cross_entropy(x, CLASSES)
    with pytest.raises(TypeError, match="target must be a dense array"):
        cross_entropy(BATCH, CLASSES.to_sparse())
    with pytest.raises(TypeError, match=r"logits must be a dense array, got a torch\.Tensor that is nested"):
        cross_entropy(torch.nested.nested_tensor([BATCH, BATCH]), CLASSES)


def test_a_pytorch_that_lacks_something_runs_the_plain_composition():
    code = """
import torch
del torch.autograd.graph.increment_version
from xent_array import _engines, cross_entropy
x = torch.tensor([[2.0, 1.0, 0.1]], requires_grad=True)
loss = cross_entropy(x, torch.tensor([1]))
loss.backward()
print(f"{loss.item():.3f}", x.grad.sum().abs().item() < 1e-6, loss.grad_fn.name())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(r"1\.417 True (?!_Loss)\w+\n", done.stdout)


# -- README ------------------------------------------------------------------------------------------------------


def test_the_example_of_the_readme():
    text = (Path(__file__).parents[2] / "README.md").read_text()
    (example,) = re.findall(r"^```python\n(import torch\n.*?)^```", text, re.MULTILINE | re.DOTALL)
    torch.manual_seed(0)
    names = {}
    exec(example, names)
    model, criterion, x, y = (names[name] for name in ("model", "criterion", "x", "y"))
    loss = criterion(model(x), y)
    theirs = torch.nn.CrossEntropyLoss(label_smoothing=0.1)(model(x), y)
    assert_allclose(loss.detach(), theirs.detach(), rtol=1e-6)
    assert all(weight.grad.abs().max() > 0 for weight in model.parameters())
    assert 0 < loss.item() < 7.5  # log(1000) is 6.9
