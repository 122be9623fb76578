"""torch.compile and torch.export: each public function is one operation, and nothing breaks the graph."""

import itertools
import subprocess
import sys
import warnings

import numpy as np
import pytest
from support.close import assert_grad, assert_loss
from support.oracle import oracle

from xent_array import cross_entropy, cross_entropy_grad, cross_entropy_value_and_grad, row_stats

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

from xent_array.torch import CrossEntropyLoss  # noqa: E402

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(4, 5, 3)) * 3
LABELS = np.array([[0, 1, 4], [2, 1, 3], [1, 1, 0], [4, 2, 2]])
SOFT = RNG.random((4, 5, 3))
ARRAYS = {"weight": RNG.random(5), "sample_weight": RNG.random((4, 3))}
OPTIONS = {
    "plain": {},
    "all": {"label_smoothing": 0.1, "z_loss": 0.1, "softcap": 3.0},
    "ignoring": {"ignore_index": 1},
}


@pytest.fixture(autouse=True)
def fresh():
    torch.compiler.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what it makes of its own code
        yield


def tensors(arrays):
    return {name: torch.tensor(value) for name, value in arrays.items()}


def operations(function, *arguments):
    """What a compiler is shown of a function, by name, and how many graphs it is shown."""
    seen = []

    def backend(graph, _):
        names = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
        seen.append([name for name in names if "xent_array" in name])
        return graph.forward

    torch.compile(function, fullgraph=True, backend=backend)(*arguments)
    (found,) = seen
    return found


@pytest.mark.parametrize("kind", ["index", "distribution"])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("options", OPTIONS)
def test_the_loss_and_its_gradient(options, reduction, kind):
    target = LABELS if kind == "index" else SOFT
    given = {"axis": 1, "reduction": reduction, **OPTIONS[options]}
    arrays = ARRAYS if options == "all" else {}
    if kind == "distribution":
        given.pop("ignore_index", None)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def loss_of(x, t, w):
        return cross_entropy(2 * x, t, **w, **given)

    x, t, w = torch.tensor(LOGITS / 2, requires_grad=True), torch.tensor(target), tensors(arrays)
    upstream = RNG.normal(size=(4, 3)) if reduction == "none" else np.float64(3.0)
    loss = loss_of(x, t, w)
    loss.backward(torch.tensor(upstream))
    truth = oracle(LOGITS, target, **given, **arrays, grad_output=upstream)
    assert_loss(loss.detach().numpy(), truth)
    assert_grad(x.grad.numpy() / 2, truth)


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("options", OPTIONS)
def test_what_gives_the_gradient_itself(options, reduction):
    given = {"axis": 1, "reduction": reduction, **OPTIONS[options]}
    truth = oracle(LOGITS, LABELS, **given, grad_output=np.full((4, 3), 2.0) if reduction == "none" else 2.0)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def both(x, t, out):
        loss, grad = cross_entropy_value_and_grad(x, t, grad_output=2.0, **given)
        cross_entropy_value_and_grad(x, t, grad_output=2.0, out=out, **given)
        return loss, grad, cross_entropy_grad(x, t, grad_output=torch.tensor(2.0), **given)

    x, out = torch.tensor(LOGITS, requires_grad=True), torch.zeros(LOGITS.shape, dtype=torch.float64)
    loss, *grads = both(x, torch.tensor(LABELS), out)
    assert not any(result.requires_grad for result in (loss, *grads))
    assert_loss(loss.numpy(), truth)
    for grad in (*grads, out):
        assert_grad(grad.numpy(), truth)


def test_compiled_code_has_every_option():
    from xent_array._bridges._torch_operations import _NAMES
    from xent_array._rows import Asked

    assert {*_NAMES} - {"logits", "target", "divisor"} == {*Asked._fields} - {"grad_output"}


def test_one_operation_for_each_function():
    x, t = torch.tensor(LOGITS), torch.tensor(LABELS)
    for function in (cross_entropy, cross_entropy_grad, cross_entropy_value_and_grad):
        (found,) = operations(lambda x, t, f=function: f(x, t, axis=1), x, t)
        assert found == f"xent_array.{function.__name__}.default"


def test_what_has_no_operation_is_right_in_pieces():
    x, t = torch.tensor(LOGITS), torch.tensor(LABELS)
    stats = torch.compile(row_stats, backend="eager")(x, t, axis=1)
    torch.testing.assert_close(stats.loss, row_stats(x, t, axis=1).loss)


def test_the_operations_say_what_they_give():
    """What PyTorch itself checks of an operation: its schema, its shapes without numbers, its gradient."""
    some = {"axis": 1, "reduction": "none", "ignore_index": -100, "label_smoothing": 0.1, "z_loss": 0.1, "softcap": 3.0}
    rest = [*some.values(), None, None]
    t = torch.tensor(LABELS)
    layouts = [torch.tensor(LOGITS), torch.tensor(LOGITS).permute(0, 2, 1).contiguous().permute(0, 2, 1)]
    for x, dtype in itertools.product(layouts, (torch.float64, torch.float16)):
        x = x.to(dtype)
        ops = torch.ops.xent_array
        torch.library.opcheck(ops.cross_entropy, (x.requires_grad_(), t, None, None, None, None, *rest))
        for op in (ops.cross_entropy_grad, ops.cross_entropy_value_and_grad):
            torch.library.opcheck(op, (torch.ones(4, 3), x.detach(), t, None, None, None, None, *rest))


def test_other_gradients_than_that_of_the_logits_are_refused():
    w = torch.ones(5, dtype=torch.float64, requires_grad=True)
    compiled = torch.compile(cross_entropy, fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="differentiated by its logits only: detach the target and the weights"):
        compiled(torch.tensor(LOGITS), torch.tensor(LABELS), axis=1, weight=w).backward()


@pytest.mark.parametrize(
    "denominator", [7, 7.0, torch.tensor(7.0, dtype=torch.float64)], ids=["int", "float", "tensor"]
)
def test_denominator(denominator):
    def loss_of(x):
        return cross_entropy(x, torch.tensor(LABELS), axis=1, denominator=denominator)

    x = torch.tensor(LOGITS)
    torch.testing.assert_close(torch.compile(loss_of, fullgraph=True, backend="eager")(x), loss_of(x))


def test_a_loss_scale_loses_no_digits_of_half_precision():
    x = torch.tensor(LOGITS / 2, dtype=torch.float16, requires_grad=True)
    t, scale = torch.tensor(LABELS), 2.0**15
    loss = torch.compile(lambda x: cross_entropy(x, t, axis=1, denominator=scale), fullgraph=True, backend="eager")(x)
    (loss * scale).backward()
    assert_grad(x.grad.numpy(), oracle(x.detach().numpy(), LABELS, axis=1, reduction="sum"))


class Model(torch.nn.Module):
    def __init__(self, way):
        super().__init__()
        self.linear = torch.nn.Linear(6, 5, dtype=torch.float64)
        self.criterion = CrossEntropyLoss(WEIGHT, label_smoothing=0.1) if way == "module" else self.loss

    @staticmethod
    def loss(x, t):
        return cross_entropy(x, t, weight=WEIGHT, label_smoothing=0.1)

    def forward(self, x, t):
        return self.criterion(self.linear(x), t)


WEIGHT = torch.tensor(ARRAYS["weight"])
each_way = pytest.mark.parametrize("way", ["function", "module"])


def test_a_model_with_the_module_is_one_graph_with_one_operation():
    model, x, t = Model("module"), torch.randn(4, 6, dtype=torch.float64), torch.tensor([0, 1, 4, -100])
    assert operations(model, x, t) == ["xent_array.cross_entropy.default"]


@each_way
@pytest.mark.parametrize("strict", [False, True])
def test_export(strict, way):
    model, x, t = Model(way), torch.randn(4, 6, dtype=torch.float64), torch.tensor([0, 1, 4, -100])
    rows = torch.export.Dim("rows", min=2)
    program = torch.export.export(model, (x, t), strict=strict, dynamic_shapes=({0: rows}, {0: rows}))
    assert any("xent_array.cross_entropy" in str(node.target) for node in program.graph.nodes)
    x, t = torch.randn(7, 6, dtype=torch.float64), torch.tensor([0, 1, 4, -100, 2, 3, 3])
    torch.testing.assert_close(program.module()(x, t), model(x, t))


def test_an_exported_program_is_loaded_where_the_module_is_imported(tmp_path):
    x, t = torch.randn(4, 6, dtype=torch.float64), torch.tensor([0, 1, 4, -100])
    model, file = Model("module"), tmp_path / "model.pt2"
    torch.export.save(torch.export.export(model, (x, t)), file)
    torch.save((x, t, model(x, t).detach()), tmp_path / "given.pt")
    code = f"""
import torch
import xent_array.torch
x, t, loss = torch.load({str(tmp_path / "given.pt")!r})
torch.testing.assert_close(torch.export.load({str(file)!r}).module()(x, t).detach(), loss)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@each_way
@pytest.mark.full
def test_compiled_by_the_usual_backend(way):
    model = Model(way)
    x, t = torch.randn(4, 6, dtype=torch.float64), torch.tensor([0, 1, 4, -100])
    model(x, t).backward()
    wanted = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    loss = torch.compile(model, fullgraph=True)(x, t)
    loss.backward()
    torch.testing.assert_close(loss.detach(), model(x, t).detach())
    torch.testing.assert_close([p.grad for p in model.parameters()], wanted)
