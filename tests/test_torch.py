"""PyTorch: the same numbers as torch.nn.functional.cross_entropy, and a citizen of its autograd."""

import itertools
import warnings

import numpy as np
import pytest
from close import assert_grad, assert_loss
from numpy.testing import assert_allclose, assert_array_equal
from oracle import oracle

from xent_array import cross_entropy, cross_entropy_grad, cross_entropy_value_and_grad, row_stats

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
    """Nothing that was read while tracing is kept: labels that all count then need not do so later."""
    traced = TRACERS[tracer](function, X, Y)
    for labels in OTHERS:
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
