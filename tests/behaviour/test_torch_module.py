"""The module of PyTorch: all that PyTorch tries its own with, by the samples in its wheel; and what makes a module."""

import copy
import inspect
import io
import pickle
import re
import sys
import types
import unittest
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

from xent_array import cross_entropy  # noqa: E402
from xent_array.torch import CrossEntropyLoss  # noqa: E402

forward_mode = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # which PyTorch uses for it
each_dtype = pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])

# -- PyTorch's own samples ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pytorch():
    """What PyTorch tests its own function and its own module with."""
    sys.modules.setdefault("expecttest", types.SimpleNamespace(TestCase=unittest.TestCase))  # asked for, not used here
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.testing._internal.common_methods_invocations import op_db
        from torch.testing._internal.common_modules import module_db
    (op,) = [op for op in op_db if op.name == "nn.functional.cross_entropy"]
    (module,) = [module for module in module_db if module.module_cls is torch.nn.CrossEntropyLoss]
    return op, module


class Samples:
    """Of the function or of the module, as (options, input, target)."""

    def __init__(self, pytorch, of):
        self.op, self.module = pytorch
        self.of, self.count = of, {"function": 21, "module": 105}[of]

    def all(self, dtype, noncontiguous=False):
        given = {"device": "cpu", "dtype": getattr(torch, dtype), "requires_grad": True}
        torch.manual_seed(0)
        if self.of == "function":
            for sample in self.op.sample_inputs(**given):
                sample = sample.noncontiguous() if noncontiguous else sample
                yield sample.kwargs, sample.input, *sample.args
        else:
            for sample in self.module.module_inputs_func(self.module, training=True, **given):
                yield sample.constructor_input.kwargs, *sample.forward_input.args

    def each(self, check, *args, **options):
        number = 0
        for number, (given, input, target) in enumerate(self.all(*args, **options), 1):
            try:
                check(given, input, target)
            except Exception as error:
                error.add_note(f"sample {number}: {given}, input {tuple(input.shape)}, target of {target.dtype}")
                raise
        assert number == self.count


@pytest.fixture(params=["function", "module"])
def samples(request, pytorch):
    return Samples(pytorch, request.param)


def loss_and_grads(module, input, target, upstream=None):
    """The loss, and the gradients of what requires one."""
    loss = module(input, target)
    upstream = torch.ones_like(loss) if upstream is None else upstream
    by = [tensor for tensor in (input, target) if tensor.requires_grad]
    return loss, *torch.autograd.grad(loss, by, upstream)


def check_against_pytorch(options, input, target):
    """Loss and gradients are PyTorch's; under 16-bit logits those that PyTorch has of the same numbers in float32."""
    narrow = input.dtype.itemsize == 2
    wide = torch.float32 if narrow else input.dtype

    def widened(tensor):
        return tensor.detach().to(wide).requires_grad_(tensor.requires_grad) if tensor.is_floating_point() else tensor

    wide_options = {name: widened(v) if isinstance(v, torch.Tensor) else v for name, v in options.items()}
    module = CrossEntropyLoss(**options)
    their_module = torch.nn.CrossEntropyLoss(**wide_options)
    targets = [target, target.detach()] if target.requires_grad else [target]  # by autograd's record, by the engine
    for of in targets:
        x, t = widened(input), widened(of)
        upstream = torch.randn_like(their_module(x, t))
        their_loss, *their_grads = loss_and_grads(their_module, x, t, upstream)
        loss, *grads = loss_and_grads(module, input, of, upstream)
        close = {"rtol": 1e-12, "atol": 1e-12} if wide is torch.float64 else {"rtol": 2e-6, "atol": 2e-6}
        close["equal_nan"] = True
        torch.testing.assert_close(loss, their_loss, **close)
        if narrow:
            assert torch.nn.CrossEntropyLoss(**options)(input, of).dtype == input.dtype  # which is why this is apart
            close["rtol"] = 2 * torch.finfo(input.dtype).eps
        for grad, theirs, by in zip(grads, their_grads, (input, of), strict=False):
            assert grad.dtype == by.dtype
            torch.testing.assert_close(grad, theirs.to(by.dtype), **close)


@each_dtype
@pytest.mark.full(but_one_per="dtype")
def test_samples(samples, dtype):
    samples.each(check_against_pytorch, dtype)


def test_samples_that_are_not_contiguous(pytorch):
    Samples(pytorch, "function").each(check_against_pytorch, "float64", noncontiguous=True)


def negated_view(tensor):
    """The same numbers as a view that is still to be negated."""
    view = torch.complex(torch.zeros_like(tensor), -tensor.detach()).conj().imag
    assert view.is_neg()
    return view.requires_grad_(tensor.requires_grad)


def test_samples_that_are_negated_views(samples):
    def check(options, input, target):
        target = negated_view(target) if target.is_floating_point() else target
        check_against_pytorch(options, negated_view(input), target)

    samples.each(check, "float64")


def gradients(options, input, target):
    module = CrossEntropyLoss(**options)
    if module(input, target).isnan().any():  # the mean of no row
        return
    for by_target in (True, False) if target.requires_grad else (False,):
        loss = module if by_target else lambda x: module(x, target.detach())
        inputs = (input, target.detach().requires_grad_()) if by_target else (input,)
        fast = {"fast_mode": input.numel() > 24}
        more = {"check_batched_grad": True, "check_forward_ad": True, "check_batched_forward_grad": True}
        assert torch.autograd.gradcheck(loss, inputs, **fast, **more)
        more = {"check_batched_grad": True, "check_fwd_over_rev": True, "check_rev_over_rev": True}
        assert torch.autograd.gradgradcheck(loss, inputs, **fast, **more)


@forward_mode
@pytest.mark.full
def test_gradients_of_samples(pytorch):
    """All that PyTorch's own function is checked for: first and second derivatives, forward mode, in batches."""
    Samples(pytorch, "function").each(gradients, "float64")


@forward_mode
@pytest.mark.full
def test_gradients_of_samples_of_the_module(pytorch):
    Samples(pytorch, "module").each(gradients, "float64")


def test_vmap_of_samples(samples):
    def check(options, input, target):
        module, theirs = CrossEntropyLoss(**options), torch.nn.CrossEntropyLoss(**options)
        stacked = torch.stack([input, 2 * input]).detach()
        for targets, in_dims in ((target.detach(), (0, None)), (torch.stack([target, target]).detach(), (0, 0))):
            for function in (lambda f: f, torch.func.grad) if options.get("reduction") != "none" else (lambda f: f,):
                results = [torch.func.vmap(function(m), in_dims)(stacked, targets) for m in (module, theirs)]
                torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12, equal_nan=True)

    samples.each(check, "float64")


def test_samples_that_are_fake(samples):
    """As `FakeTensorMode` propagates shapes, which is what torch.compile and memory estimates see."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    def check(options, input, target):
        module, mode = CrossEntropyLoss(**options), FakeTensorMode(allow_non_fake_inputs=True)
        fakes = [mode.from_tensor(t.detach()).requires_grad_(t.requires_grad) for t in (input, target)]
        with mode:
            shapes = loss_and_grads(module, *fakes)
        for one, other in zip(shapes, loss_and_grads(module, input, target), strict=True):
            assert type(one) is type(fakes[0])
            assert (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device)

    samples.each(check, "float32")


# What PyTorch refuses, by what it says of it; and with which error we do.
ERRORS = {
    "Expected floating point type for target with class probabilities": (
        TypeError,
        "must be floating, got torch.int64",
    ),
    "expected target dtype to be Long or Byte": (TypeError, "class indices must be integers"),
    "Expected input batch_size": (ValueError, r"target of shape \(3,\) does not fit"),
    "weight tensor should be defined either for all": (ValueError, r"weight must have .* \(3,\); got shape \(2,\)"),
    "ignore_index is not supported for floating point target": (ValueError, "ignore_index=1 is for class indices"),
    "label_smoothing must be between": (ValueError, "label_smoothing must be from 0 to 1"),
    "Expected target size": (ValueError, r"target of shape \(2, 4\) does not fit"),
}


def test_errors(pytorch):
    module, said = pytorch[1], set()
    for error in module.module_error_inputs_func(module, "cpu", torch.float32, requires_grad=True, training=True):
        (words,) = [words for words in ERRORS if error.error_regex.startswith(words)]
        given, options = error.module_error_input.forward_input.args, error.module_error_input.constructor_input.kwargs
        with pytest.raises(error.error_type, match=error.error_regex):
            torch.nn.CrossEntropyLoss(**options)(*given)
        exception, says = ERRORS[words]
        with pytest.raises(exception, match=says):
            CrossEntropyLoss(**options)(*given)
        said.add(words)
    assert said == set(ERRORS)


# -- what makes a module -----------------------------------------------------------------------------------------

X = torch.tensor([[2, 1, 0.1], [0.1, 2, 1.9], [0, -1, 1]])
Y, Q = torch.tensor([1, 0, 2]), torch.tensor([[0.5, 0.25, 0.25], [0, 1, 0], [0.2, 0.2, 0.6]])
WEIGHT = torch.tensor([1, 0.5, 2])


def test_arguments_are_those_of_pytorch():
    ours, theirs = (inspect.signature(made).parameters for made in (CrossEntropyLoss, torch.nn.CrossEntropyLoss))
    kept = [name for name in theirs if name not in ("size_average", "reduce")]  # which PyTorch deprecates
    assert list(ours) == [*kept, "z_loss", "softcap"]
    assert all(ours[name].default == theirs[name].default for name in kept)
    module, theirs = CrossEntropyLoss(), torch.nn.CrossEntropyLoss()
    assert list(inspect.signature(module.forward).parameters) == list(inspect.signature(theirs.forward).parameters)
    assert module(input=X, target=Y) == module(X, Y)


def test_docstring_has_every_section():
    for documented, wanted in (
        (CrossEntropyLoss, ["Parameters", "Raises", "See Also", "Notes", "Examples"]),
        (CrossEntropyLoss.forward, ["Parameters", "Returns", "Raises", "See Also", "Examples"]),
    ):
        assert re.findall(r"^ *([A-Z][\w ]+)\n *-{3,}$", documented.__doc__, re.MULTILINE) == wanted
        for parameter in set(inspect.signature(documented).parameters) - {"self"}:
            assert re.search(rf"^ *{parameter} :", documented.__doc__, re.MULTILINE), parameter


@pytest.mark.parametrize("options", [{}, {"z_loss": 0.1}, {"softcap": 3.0}, {"label_smoothing": 0.1, "z_loss": 0.1}])
@pytest.mark.parametrize("weight", [None, WEIGHT], ids=["", "weight"])
@pytest.mark.parametrize("target", [Y, Q], ids=["index", "distribution"])
def test_every_option_arrives(target, weight, options):
    for reduction in ("none", "mean", "sum"):
        module = CrossEntropyLoss(weight, reduction=reduction, **options)
        wanted = cross_entropy(X, target, weight=weight, reduction=reduction, **options)
        torch.testing.assert_close(module(X, target), wanted, rtol=0, atol=0)
        assert options.items() <= vars(module).items()


def test_attributes_may_be_changed():
    module = CrossEntropyLoss()
    module.reduction, module.ignore_index, module.weight = "none", 2, WEIGHT
    module.label_smoothing, module.z_loss, module.softcap = 0.1, 0.2, 3.0
    torch.testing.assert_close(module(X, Y), CrossEntropyLoss(WEIGHT, 2, "none", 0.1, 0.2, 3.0)(X, Y), rtol=0, atol=0)


@pytest.mark.parametrize("index", [-100, -1, -7])
def test_a_negative_ignore_index_says_nothing_of_distributions(index):
    ours, theirs = CrossEntropyLoss(ignore_index=index), torch.nn.CrossEntropyLoss(ignore_index=index)
    torch.testing.assert_close(ours(X, Q), theirs(X, Q))
    torch.testing.assert_close(ours(X, torch.tensor([0, index, 1])), theirs(X, torch.tensor([0, index, 1])))
    torch.testing.assert_close(ours(X[0], Q[0]), theirs(X[0], Q[0]))


def test_state_is_that_of_pytorch():
    for weight in (None, WEIGHT):
        ours, theirs = CrossEntropyLoss(weight), torch.nn.CrossEntropyLoss(weight)
        assert list(ours.state_dict()) == list(theirs.state_dict())
        assert [name for name, _ in ours.named_buffers()] == [name for name, _ in theirs.named_buffers()]
        assert not list(ours.parameters())
    other, their_other = CrossEntropyLoss(torch.zeros(3)), torch.nn.CrossEntropyLoss(torch.zeros(3))
    other.load_state_dict(theirs.state_dict())
    their_other.load_state_dict(ours.state_dict())
    assert other(X, Y) == ours(X, Y)
    torch.testing.assert_close(their_other(X, Y), ours(X, Y))


def test_weight_moves_with_the_module():
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), CrossEntropyLoss(WEIGHT))
    assert model.double()[1].weight.dtype == torch.float64
    assert model.to("meta")[1].weight.device.type == "meta"
    with pytest.raises(TypeError, match="weight must be on the device of logits, cpu, but is on meta"):
        model[1](X, Y)
    with pytest.raises(TypeError, match="weight"):
        CrossEntropyLoss([1.0, 0.5, 2])  # no buffer


def pickled(module):
    return pickle.loads(pickle.dumps(module))


def saved_and_loaded(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickled, saved_and_loaded])
def test_copies(duplicate):
    module = CrossEntropyLoss(WEIGHT, 1, "sum", 0.1, 0.2, 3.0)
    other = duplicate(module)
    assert repr(other) == repr(module)
    assert other(X, Y) == module(X, Y)


def test_repr_is_what_would_make_it():
    assert repr(CrossEntropyLoss(ignore_index=2, reduction="sum", softcap=3.0)) == (
        "CrossEntropyLoss(ignore_index=2, reduction='sum', label_smoothing=0.0, z_loss=0.0, softcap=3.0)"
    )
    model = torch.nn.Sequential(CrossEntropyLoss(label_smoothing=0.1, z_loss=0.2))
    assert repr(eval(repr(model[0]))) == repr(model[0])
    assert "(0): CrossEntropyLoss(ignore_index=-100, reduction='mean', label_smoothing=0.1, z_loss=0.2)" in repr(model)


@pytest.mark.parametrize(
    ("options", "exception", "says"),
    [
        ({"reduction": "avg"}, ValueError, "reduction must be one of"),
        ({"reduction": None}, ValueError, "reduction must be one of"),
        ({"ignore_index": 1.5}, TypeError, "ignore_index must be an integer"),
        ({"label_smoothing": 2}, ValueError, "label_smoothing must be from 0 to 1"),
        ({"z_loss": -1}, ValueError, "z_loss must be finite and at least 0"),
        ({"softcap": 0}, ValueError, "softcap must be finite and above 0"),
        ({"size_average": False}, TypeError, "size_average"),
    ],
)
def test_options_are_checked_when_it_is_made(options, exception, says):
    with pytest.raises(exception, match=says):
        CrossEntropyLoss(**options)


def test_labels_in_the_shape_of_the_input_are_refused():
    """As from masks of shape (N, 1, H, W) under one class: the loss would be 0, and nothing would be learnt."""
    x, y = torch.zeros(2, 1, 4, 4), torch.ones(2, 1, 4, 4, dtype=torch.int64)
    with pytest.raises(TypeError, match=r"must be floating, got torch.int64; class indices .* lie along axis 1"):
        CrossEntropyLoss()(x, y)


def test_weight_that_is_no_tensor_is_named():
    with pytest.raises(TypeError, match="weight must be a tensor or None, got list"):
        CrossEntropyLoss(weight=[1.0, 2.0])


@pytest.mark.parametrize("wrong", [[[2.0, 1.0]], X.numpy(), None, 1.0])
def test_what_is_no_tensor_is_named(wrong):
    with pytest.raises(TypeError, match=rf"^input must be a tensor, got {type(wrong).__name__}$"):
        CrossEntropyLoss()(wrong, Y)
    with pytest.raises((TypeError, ValueError), match=r"^target"):
        CrossEntropyLoss()(X, wrong)


def test_bad_labels_are_named():
    with pytest.raises(IndexError, match=r"target\[1\] is 3, which is not a class"):
        CrossEntropyLoss()(X, torch.tensor([0, 3, 1]))


# -- training ----------------------------------------------------------------------------------------------------


def trained(make, steps, replicas=1):
    """The losses of a small network on made-up data, and what it has learned; in replicas, each in a thread."""
    random = torch.Generator().manual_seed(0)
    centres = torch.randn(10, 16, generator=random)
    labels = torch.randint(10, (steps, 64), generator=random)
    data = centres[labels] + torch.randn(steps, 64, 16, generator=random)
    labels[:, :5] = -100
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.Tanh(), torch.nn.Linear(32, 10)).double()
    criterion = make(torch.linspace(0.5, 2, 10).double(), reduction="sum", label_smoothing=0.1)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    losses = []
    with ThreadPoolExecutor(replicas) as pool:
        for x, y in zip(data.double(), labels, strict=True):
            optimizer.zero_grad()
            parts = zip(x.chunk(replicas), y.chunk(replicas), strict=True)
            loss = sum(pool.map(lambda part: criterion(net(part[0]), part[1]), parts)) / len(x)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
    return torch.stack(losses), torch.cat([p.detach().reshape(-1) for p in net.parameters()])


@pytest.mark.parametrize("replicas", [1, 4])
def test_training_goes_as_with_pytorch(replicas):
    losses, learned = trained(CrossEntropyLoss, 200, replicas)
    their_losses, their_learned = trained(torch.nn.CrossEntropyLoss, 200)
    assert losses[-1] < losses[0] / 2
    torch.testing.assert_close(losses, their_losses, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(learned, their_learned, rtol=1e-9, atol=1e-9)
