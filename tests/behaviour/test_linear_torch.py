"""Linear cross-entropy in PyTorch: one node, the gradients that are asked for, and all that may come between."""

import copy
import io
import itertools

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

from xent_array import cross_entropy, linear_cross_entropy, linear_cross_entropy_value_and_grad  # noqa: E402
from xent_array._linear import products  # noqa: E402
from xent_array._linear import run as loops  # noqa: E402
from xent_array.torch import LinearCrossEntropyLoss  # noqa: E402

ROWS, FEATURES, CLASSES = (2, 9), 5, 203
REDUCTIONS = ("mean", "sum", "none")


def tensors(dtype=torch.float64, requires_grad=True):
    chance = torch.Generator().manual_seed(0)
    shapes = (*ROWS, FEATURES), (CLASSES, FEATURES), (CLASSES,)
    return [
        torch.randn(s, generator=chance, dtype=torch.float64).to(dtype).requires_grad_(requires_grad) for s in shapes
    ]


def labels():
    found = torch.randint(0, CLASSES, ROWS, generator=torch.Generator().manual_seed(1))
    found[1, 3:6] = -100
    return found


def two_steps(hidden, head, bias, target, **options):
    return cross_entropy(torch.nn.functional.linear(hidden, head, bias), target, **options)


def one_step(hidden, head, bias, target, **options):
    return linear_cross_entropy(hidden, head, target, linear_bias=bias, **options)


def close(one, two, tolerance=1e-11):
    torch.testing.assert_close(one, two, rtol=tolerance, atol=tolerance, equal_nan=True)


@pytest.fixture
def runs(monkeypatch):
    """What is computed, in the order of the calls: which gradients are wanted."""
    seen, run = [], loops.run
    for module in ("xent_array._bridges._torch_linear.run", "xent_array._linear.functions.run"):
        monkeypatch.setattr(module, lambda head, wanted, outs: seen.append(wanted) or run(head, wanted, outs))
    return seen


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("budget", [None, "20kB"])
def test_gradients_are_those_of_the_two_steps(reduction, budget):
    arguments = tensors()
    for options in ({}, {"z_loss": 0.25, "softcap": 3.0, "label_smoothing": 0.1, "sample_weight": torch.rand(ROWS)}):
        loss = one_step(*arguments, labels(), reduction=reduction, memory_budget=budget, **options)
        wanted = two_steps(*arguments, labels(), reduction=reduction, **options)
        assert loss.grad_fn.name() == "_LinearLossBackward"
        close(loss, wanted)
        upstream = torch.rand_like(loss) + 0.5
        grads = torch.autograd.grad(loss, arguments, upstream)
        for got, right in zip(grads, torch.autograd.grad(wanted, arguments, upstream), strict=True):
            close(got, right)


def test_only_the_gradients_that_are_asked_for(runs):
    for asked in itertools.product([True, False], repeat=3):
        arguments = [each.requires_grad_(need) for each, need in zip(tensors(requires_grad=False), asked, strict=True)]
        loss = one_step(*arguments, labels())
        assert runs.pop() == asked
        assert loss.requires_grad is any(asked)
        if any(asked):
            loss.backward()
            right = torch.autograd.grad(two_steps(*arguments, labels()), [a for a in arguments if a.requires_grad])
            for got, wanted in zip([a.grad for a in arguments if a.requires_grad], right, strict=True):
                close(got, wanted)
    assert not runs  # the backward pass computes nothing


def test_where_the_upstream_gradient_is_waited_for(runs):
    nothing, everything = (False,) * 3, (True,) * 3
    for dtype, reduction in ((torch.float64, "none"), (torch.float16, "mean")):
        arguments = tensors(dtype)
        loss = one_step(*arguments, labels(), reduction=reduction)
        assert runs == [nothing]
        loss.backward(torch.full_like(loss, 2.0))
        assert runs == [nothing, everything]
        runs.clear()


def test_loss_scaling_in_half_precision():
    """Gradients that float16 cannot hold unscaled."""
    arguments = tensors(torch.float16)
    options = {"denominator": 1e8}
    scale = 2.0**24
    (one_step(*arguments, labels(), **options) * scale).backward()
    wide = [each.detach().double().requires_grad_() for each in arguments]
    (two_steps(*wide, labels(), **options) * scale).backward()
    for got, right in zip(arguments, wide, strict=True):
        torch.testing.assert_close(got.grad.double(), right.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("factor", [1.0, 3.0, 0.0, float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_upstream_gradients(dtype, factor):
    arguments = tensors(dtype)
    loss = one_step(*arguments, labels())
    grads = torch.autograd.grad(loss, arguments, torch.tensor(factor))
    detached = [each.detach() for each in arguments]
    _, wanted = linear_cross_entropy_value_and_grad(
        *detached[:2], labels(), linear_bias=detached[2], grad_output=factor
    )
    for got, right in zip(grads, wanted, strict=True):
        torch.testing.assert_close(got, right, equal_nan=True, rtol=1e-5, atol=1e-6)
    assert (grads[0][1, 3:6] == 0).all()


def test_backward_twice_and_second_derivatives():
    arguments = tensors()
    loss = one_step(*arguments, labels())
    first = torch.autograd.grad(loss, arguments, torch.tensor(3.0, dtype=torch.float64), retain_graph=True)
    kept = [each.clone() for each in first]
    second = torch.autograd.grad(loss, arguments, torch.tensor(5.0, dtype=torch.float64))
    for one, before, two in zip(first, kept, second, strict=True):
        assert torch.equal(one, before)
        close(one / 3, two / 5)
    few = [arguments[0][0, :3].detach(), arguments[1][:4].detach(), arguments[2][:4].detach()]
    few = [each.requires_grad_() for each in few]
    target = torch.tensor([1, -100, 3])
    assert torch.autograd.gradcheck(lambda *a: one_step(*a, target), few)
    assert torch.autograd.gradgradcheck(lambda *a: one_step(*a, target), few)


def test_changing_an_input_in_place_is_an_error():
    arguments = tensors()
    loss = one_step(*arguments, labels())
    with torch.no_grad():
        arguments[1].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_gradients_of_targets_and_weights_too():
    arguments = tensors()
    target = torch.rand(*ROWS, CLASSES, dtype=torch.float64).softmax(-1).requires_grad_()
    weight = torch.rand(CLASSES, dtype=torch.float64).requires_grad_()
    every = [*arguments, target, weight]
    grads = torch.autograd.grad(one_step(*arguments, target, weight=weight), every)
    for got, right in zip(grads, torch.autograd.grad(two_steps(*arguments, target, weight=weight), every), strict=True):
        close(got, right)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # which PyTorch uses for forward mode
def test_transforms_and_forward_mode():
    hidden, weight, bias = tensors(requires_grad=False)
    target = labels()
    wanted = torch.func.grad(lambda h: two_steps(h, weight, bias, target))(hidden)
    one = torch.ones_like(hidden)
    close(torch.func.grad(lambda h: one_step(h, weight, bias, target))(hidden), wanted)
    batched = torch.func.vmap(lambda h, t: one_step(h, weight, bias, t))(hidden, target)
    close(batched, torch.stack([two_steps(h, weight, bias, t) for h, t in zip(hidden, target, strict=True)]))
    for step in (one_step, two_steps):
        _, made = torch.func.jvp(lambda h, step=step: step(h, weight, bias, target), (hidden,), (one,))
        close(made, wanted.sum())


@pytest.mark.filterwarnings("ignore")  # of PyTorch's compiler
@pytest.mark.full
def test_compiled_in_one_piece():
    arguments = tensors()
    target = labels()

    @torch.compile(fullgraph=True)
    def compiled(hidden, weight, bias):
        return one_step(hidden, weight, bias, target, label_smoothing=0.1) * 2

    @torch.compile(fullgraph=True)
    def both(hidden, weight, bias):
        return linear_cross_entropy_value_and_grad(hidden, weight, target, linear_bias=bias)

    wanted = two_steps(*arguments, target, label_smoothing=0.1) * 2
    found = compiled(*arguments)
    close(found, wanted)
    for got, right in zip(torch.autograd.grad(found, arguments), torch.autograd.grad(wanted, arguments), strict=True):
        close(got, right)
    loss, grads = both(*arguments)
    right, others = linear_cross_entropy_value_and_grad(*arguments[:2], target, linear_bias=arguments[2])
    close(loss, right)
    for got, other in zip(grads, others, strict=True):
        close(got, other)


def test_results_of_value_and_grad_are_detached():
    hidden, weight, bias = tensors()
    out = torch.empty_like(hidden), None, torch.empty_like(bias)
    version = out[0]._version
    loss, grads = linear_cross_entropy_value_and_grad(hidden, weight, labels(), linear_bias=bias, out=out)
    assert grads[0] is out[0]
    assert grads[2] is out[2]
    assert out[0]._version > version
    assert not any(each.requires_grad for each in (loss, *grads))


@pytest.mark.parametrize("budget", [None, "60kB", "40kB"])
def test_products_of_bfloat16_with_results_in_float32(monkeypatch, budget):
    """What a GPU does, with its product replaced by one that converts."""

    def wide_product(self, a, b, out, add):
        assert a.dtype is b.dtype is torch.bfloat16
        out.copy_(a.float() @ b.float() + (out if add else 0))

    monkeypatch.setattr(products.OfTorch, "wide_product", wide_product)
    monkeypatch.setattr(products.OfTorch, "__init__", lambda self, torch, like: setattr(self, "torch", torch))
    monkeypatch.setattr(products.OfTorch, "keeps_narrow", True, raising=False)
    hidden, weight, bias = tensors(torch.bfloat16, requires_grad=False)
    wide = [each.double().requires_grad_() for each in (hidden, weight, bias)]
    wanted = two_steps(*wide, labels())
    grads = torch.autograd.grad(wanted, wide)
    loss, made = linear_cross_entropy_value_and_grad(hidden, weight, labels(), linear_bias=bias, memory_budget=budget)
    close(loss.double(), wanted, 1e-6)
    for got, right in zip(made, grads, strict=True):  # each entry of the gradient of the logits is rounded too
        assert got.dtype is torch.bfloat16
        torch.testing.assert_close(got.double(), right, rtol=2**-7, atol=2**-8 * right.abs().max().item())


def test_strides():
    hidden, weight, bias = tensors(requires_grad=False)
    wanted = linear_cross_entropy_value_and_grad(hidden, weight, labels(), linear_bias=bias)
    strided = hidden.permute(2, 0, 1).contiguous().permute(1, 2, 0), weight.T.contiguous().T
    every_second = torch.zeros(2 * CLASSES, 2 * FEATURES, dtype=torch.float64)
    every_second[::2, ::2] = weight
    out = torch.empty(FEATURES, *ROWS, dtype=torch.float64).permute(1, 2, 0), torch.empty_like(every_second)[::2, ::2]
    for of_hidden, of_weight in (strided, (hidden, every_second[::2, ::2])):
        for budget, place in itertools.product((None, "20kB"), (None, (*out, None))):
            loss, grads = linear_cross_entropy_value_and_grad(
                of_hidden, of_weight, labels(), linear_bias=bias, memory_budget=budget, out=place
            )
            close(loss, wanted[0])
            for got, right in zip(grads, wanted[1], strict=True):
                close(got, right)


# -- the module ------------------------------------------------------------------------------------------------------


def test_the_module_is_pytorchs():
    """Against PyTorch's own, where that has the options."""
    hidden = tensors(torch.float32)[0].detach().flatten(0, 1)
    target = labels().flatten()
    for options in (
        {},
        {"bias": True, "label_smoothing": 0.1},
        {"reduction": "sum", "weight": torch.rand(CLASSES)},
        {"reduction": "none", "ignore_index": 7},
    ):
        target = target.clamp(min=0) if "ignore_index" in options else target
        theirs = torch.nn.LinearCrossEntropyLoss(FEATURES, CLASSES, **options)
        ours = LinearCrossEntropyLoss(FEATURES, CLASSES, **options)
        ours.load_state_dict(theirs.state_dict())
        found, wanted = ours(hidden, target), theirs(hidden, target)
        close(found, wanted, 1e-5)
        found.sum().backward()
        wanted.sum().backward()
        for one, two in zip(ours.parameters(), theirs.parameters(), strict=True):
            close(one.grad, two.grad, 1e-5)


def test_the_module_shares_its_weight_and_is_saved():
    embedding = torch.nn.Embedding(CLASSES, FEATURES)
    module = LinearCrossEntropyLoss(FEATURES, CLASSES, softcap=30.0, memory_budget="1MiB")
    module.linear.weight = embedding.weight
    tokens = torch.arange(CLASSES - 1)
    module(embedding(tokens), tokens + 1).backward()
    assert embedding.weight.grad is module.linear.weight.grad
    assert repr(module).startswith("LinearCrossEntropyLoss(\n  ignore_index=-100, reduction='mean', ")
    assert "softcap=30.0, memory_budget='1MiB'" in repr(module)
    saved = io.BytesIO()
    torch.save(module, saved)
    saved.seek(0)
    again = torch.load(saved, weights_only=False)
    for other in (again, copy.deepcopy(module)):
        close(other(embedding(tokens), tokens), module(embedding(tokens), tokens))


def test_the_module_learns():
    torch.manual_seed(0)
    module = LinearCrossEntropyLoss(FEATURES, CLASSES, bias=True)
    hidden, target = tensors(torch.float32)[0].detach(), labels()
    optimizer = torch.optim.Adam(module.parameters(), 0.3)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = module(hidden, target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


def test_the_module_says_what_is_wrong():
    for error, says, options in (
        (TypeError, "weight must be a tensor or None, got list", {"weight": [1.0]}),
        (ValueError, "label_smoothing must be from 0 to 1, got 2", {"label_smoothing": 2}),
        (ValueError, "memory_budget must be a number of bytes", {"memory_budget": "much"}),
    ):
        with pytest.raises(error, match=says):
            LinearCrossEntropyLoss(FEATURES, CLASSES, **options)
    with pytest.raises(TypeError, match="input must be a tensor, got list"):
        LinearCrossEntropyLoss(1, 2)([[1.0]], [0])
