"""JAX: the same answers under jit, grad and vmap, and without 64-bit types."""

import importlib.util
import shutil
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from support.close import assert_grad, assert_loss
from support.oracle import oracle
from support.process import TESTS, run
from support.sizes import resize

from xent_array import (
    CrossEntropyLoss,
    _api,
    _engines,
    cross_entropy,
    cross_entropy_grad,
    cross_entropy_value_and_grad,
    log_softmax,
    logsumexp,
    row_stats,
    softmax,
)
from xent_array._engines.cpu import memory

jax = pytest.importorskip("jax", reason="JAX is not installed")
jax.config.update("jax_enable_x64", True)
jnp = jax.numpy

# Rows with ties of the maximum, a mask, a confident row, and one that holds NaN and is ignored.
LOGITS = np.array([[2, 2, 1, 0], [0, 3, -np.inf, 1], [40, 0, 0, 0], [1, -2, 4, 0.5], [np.nan, 0, np.inf, 1]])
LABELS = np.array([0, 1, 0, 3, -100])
SOFT = np.array([[4, 2, 1, 1], [2, 2, 0, 4], [8, 0, 0, 0], [1, 0, 5, 2], [1, 1, 0, 0]]) / 8
SAMPLE_WEIGHT = np.array([1, 2, 0.5, 3, 0])
ARRAYS = {"weight": np.array([1, 0.5, 2, 0.25]), "sample_weight": SAMPLE_WEIGHT}
OPTIONS = [{}, {"z_loss": 0.1, "softcap": 3.0, "label_smoothing": 0.2}]

each_target = pytest.mark.parametrize("target", [LABELS, SOFT], ids=["index", "distribution"])
each_reduction = pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
each_option = pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options) or "plain")


def case(target, reduction, options, dtype="float64"):
    """The logits, the arrays that are traced with them, the options that are not, and the truth."""
    logits = LOGITS.astype(dtype)
    if "label_smoothing" in options:  # would put mass on the mask
        logits = np.where(logits == -np.inf, -5, logits)
    static = {"reduction": reduction, **options}
    return logits, {"target": target, **ARRAYS}, static, oracle(logits, target, **ARRAYS, **static)


@each_target
@each_reduction
@each_option
def test_jit(target, reduction, options):
    logits, arrays, static, truth = case(target, reduction, options, "float32")

    @jax.jit  # of everything at once, because compiling is what takes time here
    def every_way(logits, target, **weights):
        criterion = CrossEntropyLoss(**static, **weights)
        loss, grad = cross_entropy_value_and_grad(logits, target, **static, **weights)
        stats = row_stats(logits, target, **options, **weights)
        losses = loss, cross_entropy(logits, target, **static, **weights), criterion.forward(logits, target)
        grads = (
            grad,
            cross_entropy_grad(logits, target, stats=stats, **static, **weights),
            criterion.backward(),
        )
        return losses, grads

    losses, grads = every_way(logits, **arrays)
    for loss, grad in zip(losses, grads, strict=True):
        assert_loss(loss, truth)
        assert_grad(grad, truth)


def test_jit_of_the_softmax():
    x = LOGITS[:4]
    for function in (softmax, log_softmax, logsumexp):
        np.testing.assert_allclose(jax.jit(function)(x), function(x), rtol=1e-14)


@each_target
@each_reduction
@each_option
def test_grad(target, reduction, options):
    logits, arrays, static, truth = case(target, reduction, options)

    def loss(logits, arrays):
        return jnp.sum(cross_entropy(logits, **arrays, **static))

    grad = jax.jit(jax.grad(loss))(logits, arrays)
    assert_grad(grad, truth)
    assert_array_equal(grad[-1], 0)


def test_grad_of_concrete_arrays():
    x, labels = jnp.asarray(LOGITS), jnp.asarray(LABELS)
    truth = oracle(LOGITS, LABELS)
    assert_grad(jax.grad(cross_entropy)(x, labels), truth)
    assert_grad(cross_entropy_grad(x, labels), truth)


@pytest.mark.parametrize(
    "broken",
    [[np.nan, 0, 1, 2], [0, np.nan, 1, 2], [np.inf, 0, 1, 2], [-np.inf] * 4],
    ids=["NaN on the label", "NaN", "inf", "-inf throughout"],
)
def test_grad_of_a_row_without_a_softmax(broken):
    logits, labels = np.array([[2, 2, 1, 0], broken]), np.array([1, 0])
    assert_grad(jax.jit(jax.grad(cross_entropy))(logits, labels), oracle(logits, labels))


def test_grad_is_differentiable():
    options = {"target": jnp.asarray([2, 1]), "z_loss": 0.1}
    hessian = jax.jit(jax.hessian(partial(cross_entropy, **options)))
    jacobian = jax.jit(jax.jacobian(partial(cross_entropy_grad, **options)))
    np.testing.assert_allclose(jacobian(LOGITS[[0, 3]]), hessian(LOGITS[[0, 3]]), atol=1e-15)


@each_target
@each_reduction
def test_vmap(target, reduction):
    """A batch of problems at once, each with its own mean."""
    logits = np.stack([LOGITS, LOGITS[::-1], LOGITS + 0.5])
    targets = np.stack([target, target[::-1], target])
    weights = np.stack([SAMPLE_WEIGHT, SAMPLE_WEIGHT[::-1], SAMPLE_WEIGHT])
    losses, grads = jax.vmap(lambda x, t, s: cross_entropy_value_and_grad(x, t, sample_weight=s, reduction=reduction))(
        logits, targets, weights
    )
    for x, t, s, loss, grad in zip(logits, targets, weights, losses, grads, strict=True):
        truth = oracle(x, t, sample_weight=s, reduction=reduction)
        assert_loss(loss, truth)
        assert_grad(grad, truth)


@pytest.mark.parametrize("bad", [-1, 4, 2**40])
def test_bad_label_under_jit(bad):
    labels = np.array([0, bad, 2, 3])
    truth = oracle(LOGITS[:4], labels, reduction="sum")
    assert np.isnan(truth.loss)
    loss, grad = jax.jit(partial(cross_entropy_value_and_grad, reduction="sum"))(LOGITS[:4], labels)
    assert_loss(loss, truth)
    assert_grad(grad, truth)
    rows = jax.jit(partial(cross_entropy, reduction="none"))(LOGITS[:4], labels)
    assert_array_equal(np.isnan(rows), [False, True, False, False])
    of_stats = jax.jit(lambda x, labels: row_stats(x, labels).loss)(LOGITS[:4], labels)
    assert_array_equal(np.isnan(of_stats), [False, True, False, False])


def test_bad_label_that_can_be_read():
    with pytest.raises(IndexError, match=r"target\[1\] is 4"):
        cross_entropy(jnp.asarray(LOGITS), jnp.asarray([0, 4, 1, 2, 3]))


@pytest.mark.parametrize("axis", [1, 2])
def test_labels_that_are_known_while_the_logits_are_traced(axis):
    """Looking at them is no part of what is traced."""
    x = LOGITS[None] if axis == 2 else LOGITS.T[None]
    bad = np.where(np.arange(5) == 1, 4, LABELS)[None]
    for labels in (LABELS[None], jnp.asarray(LABELS[None])):
        truth = oracle(LOGITS, LABELS)
        loss, grad = jax.jit(lambda x, t=labels: cross_entropy_value_and_grad(x, t, axis=axis, validate=True))(x)
        assert_loss(loss, truth)
        assert_grad(grad[0] if axis == 2 else grad[0].T, truth)
    for labels, weight in ((bad, None), (jnp.asarray(bad), None), (jnp.asarray(bad), jnp.asarray(SAMPLE_WEIGHT[None]))):
        options = {"axis": axis, "validate": True, "sample_weight": weight}
        for way in (jax.jit, jax.grad):
            with pytest.raises(IndexError, match=r"^target\[0, 1\] is 4, which is not a class"):
                way(lambda x, t=labels, options=options: cross_entropy(x, t, **options))(x)


@pytest.mark.parametrize("function", [cross_entropy_value_and_grad, cross_entropy_grad])
def test_out_is_refused(function):
    x = jnp.asarray(LOGITS)
    with pytest.raises(TypeError, match="out"):
        function(x, jnp.asarray(LABELS), out=x)
    with pytest.raises(TypeError, match="out"):
        jax.jit(lambda x, labels: function(x, labels, out=x))(LOGITS, LABELS)


# -- eager arrays: the engines of NumPy, in JAX's memory ---------------------------------------------------------


class Spy(_engines.cpu.Cpu):
    """The cpu engine, which notes the rows it was given and the gradients it made."""

    def __init__(self):
        super().__init__("spy", compile=True)
        self.rows, self.made = [], []

    def loss_and_grad(self, rows, out=None):
        self.rows.append(rows)
        loss, grad = super().loss_and_grad(rows, out)
        self.made.append(address(grad))
        return loss, grad


def address(array):
    return array.__array_interface__["data"][0] if isinstance(array, np.ndarray) else array.unsafe_buffer_pointer()


@pytest.fixture
def no_generic(monkeypatch):
    monkeypatch.delitem(_engines.ENGINES, "generic")


def bits(result):
    return [(part.dtype, part.shape, np.asarray(part).tobytes()) for part in jax.tree.leaves(result)]


def every_function(x, target, reduction, options, weights):
    static = {"reduction": reduction, **options}
    criterion = CrossEntropyLoss(**static, **weights)
    stats = row_stats(x, target, **options, **weights)
    return [
        cross_entropy(x, target, **static),
        cross_entropy_value_and_grad(x, target, **static),
        cross_entropy(x, target, **static, **weights),
        cross_entropy_value_and_grad(x, target, **static, **weights, return_stats=True),
        cross_entropy_grad(x, target, **static, **weights, stats=stats),
        [stats, criterion(x, target), criterion.backward()],
        [softmax(x), log_softmax(x, axis=0), logsumexp(x), logsumexp(x, keepdims=True)],
    ]


@each_target
@each_reduction
@each_option
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_eager_arrays_get_the_bits_of_numpy(no_generic, dtype, target, reduction, options):
    x = jnp.asarray(LOGITS, dtype=dtype)
    t, arrays = jnp.asarray(target), {k: jnp.asarray(v) for k, v in ARRAYS.items()}
    results = every_function(x, t, reduction, options, arrays)
    assert bits(results) == bits(every_function(np.asarray(x), target, reduction, options, ARRAYS))
    assert all(isinstance(part, jax.Array) and not part.committed for part in jax.tree.leaves(results))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_plainest_question_is_answered_at_once(monkeypatch, dtype):
    if isinstance(_engines.cpu.found_loops(), str):
        pytest.skip(_engines.cpu.found_loops())
    x, known = jnp.asarray(LOGITS[:4], dtype=dtype), LABELS[:4]
    wanted = bits([cross_entropy_value_and_grad(x, known), cross_entropy(x, known, reduction="none")])
    bound = jax.device_put(x, jax.devices()[0])
    monkeypatch.setattr(_api, "problem_of", None)
    for labels in (known, jnp.asarray(known), jnp.asarray(known, dtype="int32")):
        for logits in (x, bound):
            results = [cross_entropy_value_and_grad(logits, labels), cross_entropy(logits, labels, reduction="none")]
            assert bits(results) == wanted
            assert all(part.committed == logits.committed for part in jax.tree.leaves(results))


@each_target
def test_arrays_of_numpy_go_with_those_of_jax(no_generic, target):
    x = jnp.asarray(LOGITS)
    given = {**ARRAYS, "denominator": np.array(3.0), "grad_output": np.array(2.0)}
    results = cross_entropy_value_and_grad(x, target, **given), cross_entropy_value_and_grad(x, target)
    assert bits(results) == bits(
        (cross_entropy_value_and_grad(LOGITS, target, **given), cross_entropy_value_and_grad(LOGITS, target))
    )
    per_row = {"reduction": "none", "grad_output": SAMPLE_WEIGHT}
    assert bits(cross_entropy_grad(x, target, **per_row)) == bits(cross_entropy_grad(LOGITS, target, **per_row))


def test_arrays_of_other_libraries_do_not():
    torch = pytest.importorskip("torch")
    x = jnp.asarray(LOGITS)
    for given in ({"target": torch.tensor(LABELS)}, {"target": LABELS, "weight": torch.ones(4)}):
        with pytest.raises(TypeError, match=r"must be a list, or an array of the library of logits; got torch\.Tensor"):
            cross_entropy(x, **given)
    for logits in (LOGITS, torch.tensor(LOGITS)):
        with pytest.raises(TypeError, match=r"target must be a list, or an array of the library of logits; got jaxlib"):
            cross_entropy(logits, jnp.asarray(LABELS))
    with pytest.raises(TypeError, match="out must be an array of the library of logits"):
        cross_entropy_grad(x, LABELS, out=np.empty_like(LOGITS))


@each_target
def test_arrays_of_numpy_in_a_function_that_is_traced(target):
    given = {**ARRAYS, "target": target}
    loss, grad = jax.jit(lambda x: cross_entropy_value_and_grad(x, **given, grad_output=np.array(2.0)))(LOGITS)
    truth = oracle(LOGITS, **given, grad_output=2.0)
    assert_loss(loss, truth)
    assert_grad(grad, truth)
    weight = np.array([1, 1e39, 1, 1])
    with pytest.raises(ValueError, match=r"^weight\[1\] is 1e\+39"):
        jax.jit(lambda x: cross_entropy(x, target, weight=weight))(LOGITS.astype("float32"))
    for bad in (np.array(["a"] * 5), np.array([None] * 5), np.ones(5, complex), np.ones(5, np.longdouble)):
        with pytest.raises(TypeError, match=r"^target must be numbers|^class indices must be integers"):
            jax.jit(lambda x, bad=bad: cross_entropy(x, bad))(LOGITS)
    swapped = LABELS.astype(LABELS.dtype.newbyteorder())
    assert_loss(jax.jit(lambda x: cross_entropy(x, swapped))(LOGITS), oracle(LOGITS, LABELS))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("axis", [-1, 1])
def test_nothing_is_copied(dtype, axis):
    """Neither what goes in, nor a gradient that a copy would be felt of."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((40, 20, 200)), dtype=dtype)
    labels = jnp.asarray(rng.integers(0, x.shape[axis], np.delete(x.shape, axis)))
    soft = jnp.asarray(rng.random(x.shape), dtype=dtype)
    weight = jnp.ones(x.shape[axis], dtype="float64" if dtype == "float64" else "float32")
    assert x.nbytes >= memory.ALIGNED
    for target in (labels, soft):
        spy = Spy()
        _, grad = cross_entropy_value_and_grad(x, target, axis=axis, weight=weight, engine=spy)
        (rows,) = spy.rows
        assert [address(part) for part in (rows.logits, rows.target, rows.weight)] == [
            address(part) for part in (x, target, weight)
        ]
        assert spy.made == [address(grad)]


def test_memory_of_a_gradient_is_used_again_only_when_jax_is_done_with_it(monkeypatch):
    resize(monkeypatch, MAPPED=1 << 16, ALIGNED=1 << 14)
    monkeypatch.setattr(memory, "_kept", type(memory._kept)(maxlen=1))
    x, labels = jnp.asarray(np.random.default_rng(0).standard_normal((300, 200))), jnp.arange(300) % 200

    def grad(k=0):
        return cross_entropy_value_and_grad(x + k, labels)[1]

    def slow(a):
        for _ in range(20):
            a = (a @ wide) @ wide.T / 1000
        return a

    wide = jnp.ones((200, 1000))
    slow = jax.jit(slow)
    truth, of_truth = np.array(grad()), np.asarray(slow(jnp.array(np.asarray(grad()))))
    holders = {  # of the memory, after the gradient itself is gone
        "view": np.asarray,
        "donated": jax.jit(lambda a: a * 1, donate_argnums=0),
        "passed through": jax.jit(lambda a: a),
        "in flight": slow,
        "dlpack": lambda a: np.from_dlpack(a),
    }
    for name, hold in holders.items():
        made = grad()
        held = hold(made)
        del made
        for k in range(1, 4):
            grad(k)
        np.testing.assert_array_equal(held, of_truth if name == "in flight" else truth, err_msg=name)
        del held
    used = {address(grad(k)) for k in range(10)}
    assert len(used) <= 3


@pytest.mark.skipif(not memory._CAN_KEEP, reason="this system has no memory that is marked as free")
def test_memory_that_jax_has_not_let_go_of_yet_is_used_again(monkeypatch):
    """It lets go when it is called next, which must be before the next gradient is made room for."""
    x, labels = jnp.zeros((memory.MAPPED // 4000 + 1, 1000), "float32"), jnp.zeros(memory.MAPPED // 4000 + 1, "int32")
    mapped = []
    real = memory._mapped
    monkeypatch.setattr(memory, "_mapped", lambda size: mapped.append(size) or real(size))

    def call():  # and drop what it gives
        jax.block_until_ready(cross_entropy_value_and_grad(x, labels))

    other = jax.jit(lambda x: x + 1)
    for _ in range(4):
        jax.block_until_ready(other(x))  # holds up what is let go of
        call()
        call()
    assert len(mapped) <= 2


def test_a_gradient_that_is_kept_by_the_criterion_survives_donation():
    x, labels = jnp.asarray(LOGITS), jnp.asarray(LABELS)
    criterion = CrossEntropyLoss()
    criterion(x, labels)
    jax.jit(lambda x: x * 0, donate_argnums=0)(x).block_until_ready()
    assert_grad(criterion.backward(), oracle(LOGITS, LABELS))


def test_what_cannot_be_lent_says_why():
    x, labels = jnp.asarray(LOGITS), jnp.asarray(LABELS)
    words = r"^engine 'cpu' cannot take these arrays: it takes NumPy arrays, and these are of jax.numpy \(their memory"
    for way in (jax.jit, jax.grad, lambda f: jax.vmap(f, in_axes=(0, None))):
        with pytest.raises(ValueError, match=f"{words} cannot be borrowed: they are traced"):
            way(partial(cross_entropy, engine="cpu"))(x if way in (jax.jit, jax.grad) else x[None], labels)
    with pytest.raises(ValueError, match="they are traced"):
        jax.grad(lambda w: cross_entropy(x, labels, weight=w, engine="cpu"))(jnp.ones(4))
    for mode in (jax.debug_nans, jax.debug_infs):
        with (
            mode(True),
            pytest.raises(ValueError, match=f"{words} cannot be borrowed: a debugger is to see every step"),
        ):
            cross_entropy(jnp.asarray(CLEAN), labels, engine="cpu")


@pytest.mark.parametrize("engine", [None, "cpu", "generic"])
def test_deleted_arrays(engine):
    for function in (cross_entropy, cross_entropy_value_and_grad):
        for k in range(2):
            given = [jnp.asarray(LOGITS), jnp.asarray(LABELS)]
            given[k].delete()
            with pytest.raises(RuntimeError, match="deleted"):
                function(*given, engine=engine)


def test_arrays_that_are_known_while_others_are_traced(no_generic):
    """What is asked of them alone is answered at once, and is a constant to the trace."""
    x, labels = jnp.asarray(LOGITS), jnp.asarray(LABELS)
    loss, grad = cross_entropy_value_and_grad(LOGITS, LABELS)
    for given in (x, jax.device_put(x, jax.devices()[0])):

        def scaled(scale, given=given):
            return [scale * part for part in cross_entropy_value_and_grad(given, labels)]

        for way in (jax.jit, jax.checkpoint):
            assert_array_equal(way(scaled)(2.0)[1], 2 * grad)
        assert_array_equal(jax.vmap(scaled)(jnp.arange(3.0))[0], loss * np.arange(3))
        assert jax.grad(lambda scale: scaled(scale)[0])(2.0) == loss


def test_the_emulated_gpu_takes_them_too():
    from support import emulated
    from support.simt.build import available

    if available() is not None:
        pytest.skip(f"the emulation {available()}")
    engine = emulated.engine()
    x, labels = jnp.asarray(np.random.default_rng(0).standard_normal((6, 40)), dtype="float32"), jnp.arange(6)
    truth = oracle(np.asarray(x), np.arange(6))
    loss, grad = cross_entropy_value_and_grad(x, labels, engine=engine)
    assert_loss(loss, truth)
    assert_grad(grad, truth)
    assert engine.launcher.launches
    assert isinstance(grad, jax.Array)


ON_A_GPU = """
import __main__ as standin
import sys
from types import SimpleNamespace
import cupy
import jax
import jax.numpy as jnp
import numpy as np
from support.close import assert_grad, assert_loss
from support.oracle import oracle
from support.sizes import resize
from xent_array import cross_entropy_grad, cross_entropy_value_and_grad, row_stats
from xent_array._bridges import _jax

jax.config.update("jax_enable_x64", True)
there, calls = SimpleNamespace(platform="gpu"), []
_jax._device, _jax._is_on_cuda = lambda array: there, lambda array: True
cupy.from_dlpack = lambda array: calls.append("in") or standin.given(np.array(array))
jax.dlpack.from_dlpack = lambda array: calls.append("out") or jnp.asarray(array.host)
cupy.cuda.get_current_stream().synchronize = lambda: calls.append("wait")

x = jnp.asarray(np.random.default_rng(0).standard_normal((6, 40)), dtype="float32")
labels, weight = np.arange(6), jnp.arange(40, dtype="float32")
truth = oracle(np.asarray(x), labels, weight=np.asarray(weight))
loss, grad = cross_entropy_value_and_grad(x, labels, weight=weight, engine="cuda")
assert calls[-4:] == ["wait", "out"] * 2 and set(calls[:-4]) == {"in"}
assert isinstance(loss, jax.Array) and isinstance(grad, jax.Array)
stats = row_stats(x, jnp.asarray(labels), weight=weight)
again = cross_entropy_grad(x, jnp.asarray(labels), weight=weight, stats=stats)
assert_loss(loss, truth)
assert_grad(grad, truth)
assert_grad(again, truth)
assert cross_entropy_value_and_grad(x, labels)[0].dtype == "float32"

cupy_of, _jax._cupy = _jax._cupy, lambda: None
assert _jax.refuses([x], "loss") == "CuPy is not installed"
_jax._cupy, _jax._is_on_cuda = cupy_of, lambda array: False
assert _jax.refuses([x], "loss") == "they are on a device of kind 'gpu'"
places = iter([there, SimpleNamespace(platform="cpu")])
_jax._device = lambda array: next(places)
assert _jax.refuses([x, x], "loss") == "they are on different devices"
"""


def test_the_way_to_a_gpu():
    """On the stand-in for CuPy, and with JAX's part of DLPack left out: what goes where, and when it waits."""
    if importlib.util.find_spec("cupy") is None or shutil.which("g++") is None:
        pytest.skip("asks CuPy for its signatures, and g++ for the emulation")
    standin = TESTS / "support" / "standin.py"
    done = subprocess.run([sys.executable, standin, "-c", ON_A_GPU], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


# -- what a backward pass keeps ----------------------------------------------------------------------------------


def kept(function, x):
    """What the backward pass keeps that is as large as the logits."""
    return [part for part in jax.tree.leaves(jax.vjp(function, x)[1]) if part.size >= x.size // 2]


@each_option
@pytest.mark.parametrize("axis", [1, 2])
def test_nothing_of_the_size_of_the_logits_is_kept_but_what_the_user_has(axis, options):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((8, 40, 30)), dtype="float32")
    labels = jnp.asarray(rng.integers(0, 30, np.delete(x.shape, axis)))
    soft = jnp.asarray(rng.random(x.shape), dtype="float32")
    asked = {"axis": axis, "weight": jnp.ones(x.shape[axis], dtype="float32"), **options}

    def own(x):
        stats = row_stats(x, labels, **asked)
        return jnp.sum(stats.loss + stats.lse)

    for function, arrays in (
        (lambda x: cross_entropy(x, labels, **asked), [x]),
        (lambda x: jnp.sum(cross_entropy(x, labels, reduction="none", **asked)), [x]),
        (lambda x: cross_entropy(x, soft, **asked), [x, soft]),
        (lambda x: jnp.sum(logsumexp(x, axis=axis)), [x]),
        (own, [x]),
    ):
        addresses = sorted(address(part) for part in arrays)
        assert sorted(address(part) for part in kept(function, x)) == addresses
        assert len(kept(jax.jit(function), x)) == len(arrays)


def test_every_derivative_in_both_modes():
    from jax.test_util import check_grads

    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(rng.random(shape)) for shape in ((3, 4), (3, 4), (4,), (3,), ())]

    @jax.jit
    def loss(x, q, w, s, n):
        return cross_entropy(x, q, weight=w, sample_weight=s, label_smoothing=0.2, z_loss=0.1, denominator=n)

    check_grads(loss, [*arrays[:4], arrays[4] + 1], order=2)


@pytest.mark.parametrize("way", [jax.grad, lambda f: jax.jit(jax.grad(f)), jax.jacfwd], ids=["grad", "jit", "jacfwd"])
@pytest.mark.parametrize("row", [[17.0, 0.0], [40.0, 0.0], [30.0, 10.0, 1.0, 0.0]], ids=str)
def test_a_confident_row_keeps_its_digits_however_it_is_differentiated(row, way):
    logits = np.array([row], dtype=np.float32)
    for target in (np.array([0]), np.eye(1, len(row), dtype=np.float32)):
        grad = np.asarray(way(lambda x, t=target: cross_entropy(x, jnp.asarray(t)))(jnp.asarray(logits)))
        truth = oracle(logits, target)
        assert_grad(grad, truth)
        np.testing.assert_allclose(grad[0, 0], np.float64(truth.grad[0, 0]), rtol=8 * 2.0**-23)


# -- modes in which JAX is strict --------------------------------------------------------------------------------

CLEAN = np.array([[2, 2, 1, 0], [0, 3, -7, 1], [40, 0, 0, 0], [1, -2, 4, 0.5], [1, 0, 5, 1]])
MODES = {
    "debug_nans": lambda: jax.debug_nans(True),
    "debug_infs": lambda: jax.debug_infs(True),
    "dtype_promotion": lambda: jax.numpy_dtype_promotion("strict"),
    "rank_promotion": lambda: jax.numpy_rank_promotion("raise"),
    "checking_leaks": lambda: jax.checking_leaks(),
    "transfer_guard": lambda: jax.transfer_guard("disallow"),
}


# All of them would take minutes, because each mode compiles anew: what a mode may object to.
STRICT = [*((mode, "float32", OPTIONS[1]) for mode in MODES), ("debug_nans", "float32", {})]
STRICT += [("dtype_promotion", "bfloat16", options) for options in OPTIONS]


@each_target
@pytest.mark.parametrize(("mode", "dtype", "options"), STRICT, ids=lambda part: part if isinstance(part, str) else "")
def test_strict_modes(mode, dtype, options, target):
    """Clean data, with a row to ignore, pass through every mode: eagerly, under jit, and under jax.grad."""
    x = jnp.asarray(CLEAN, dtype=dtype)
    given = {k: jnp.asarray(v, dtype="float32") for k, v in ARRAYS.items()} if options else {}
    t = jnp.asarray(target, dtype=dtype if target.dtype.kind == "f" else None)
    known = {k: np.asarray(v) for k, v in given.items()}
    truth = oracle(np.asarray(x), np.asarray(t), **known, **options)

    def value_and_grad(x, t, given):
        return cross_entropy_value_and_grad(x, t, **given, **options)

    def loss(x, t, given):
        return cross_entropy(x, t, **given, **options)

    def from_stats(x, t, given):
        stats = row_stats(x, t, **given, **options)
        assert all(part.shape == x.shape[:1] for part in (stats.lse, stats.loss, stats.p_max))
        return cross_entropy_grad(x, t, stats=stats, **given, **options)

    ways = [jax.jit(value_and_grad), jax.jit(jax.value_and_grad(loss))]
    ways += [value_and_grad, lambda *given: (loss(*given), from_stats(*given))]
    if mode != "transfer_guard":  # which lets JAX differentiate nothing at all outside jit
        ways.append(jax.value_and_grad(loss))
    with MODES[mode]():
        results = [way(x, t, given) for way in ways]
    for value, grad in results:
        assert_loss(value, truth)
        assert grad.dtype == x.dtype
        assert_grad(grad, truth)


def test_strict_modes_of_the_softmax():
    x = jnp.asarray(CLEAN, dtype="float32")
    for mode in MODES.values():
        for function in (softmax, log_softmax, logsumexp):
            with mode():
                result = function(x)
            np.testing.assert_allclose(result, function(CLEAN), rtol=1e-5)


def test_debug_nans_lets_masks_pass():
    """No NaN is made on the way to an answer that holds none: of -inf, and of a weight that nothing meets."""
    x = jnp.asarray([[1, -np.inf, 3], [-np.inf, 2, 2]], dtype="float32")
    labels, weight = jnp.asarray([0, 1]), jnp.asarray([1, 2, np.inf], dtype="float32")
    soft = jnp.asarray([[0.5, 0, 0.5], [0, 1, 0]], dtype="float32")
    for way in (lambda f: f, jax.jit):
        with jax.debug_nans(True):
            results = [
                *way(cross_entropy_value_and_grad)(x, labels),
                *way(cross_entropy_value_and_grad)(x, soft),
                *way(lambda x, t: cross_entropy_value_and_grad(x, t, weight=weight))(x, labels),
                way(jax.grad(cross_entropy))(x, labels),
                way(softmax)(x),
                way(logsumexp)(jnp.full((1, 3), -np.inf)),
            ]
        assert not any(np.isnan(result).any() for result in results)


def test_debug_nans_finds_a_bad_label_and_a_bad_logit():
    labels = jnp.asarray([0, 1, 4, 3, -100])
    for x, t in ((CLEAN, labels), (np.where(CLEAN == 40, np.nan, CLEAN), LABELS)):
        with jax.debug_nans(True), pytest.raises(FloatingPointError, match="nan"):
            cross_entropy(jnp.asarray(x), jnp.asarray(t), validate=False)


# -- shapes without numbers --------------------------------------------------------------------------------------


def exported(function, *arguments):
    return jax.export.export(jax.jit(function))(*arguments).call


def test_eval_shape_and_export():
    jax_export = pytest.importorskip("jax.export")
    shapes = jax.ShapeDtypeStruct((5, 4), "float32"), jax.ShapeDtypeStruct((5,), "int64")
    loss, grad = jax.eval_shape(partial(cross_entropy_value_and_grad, validate=True), *shapes)
    assert (loss.shape, grad.shape, loss.dtype, grad.dtype) == ((), (5, 4), "float32", "float32")
    (rows,) = jax_export.symbolic_shape("rows")
    for target in (LABELS, SOFT):
        logits = jnp.asarray(CLEAN)
        symbols = [jax.ShapeDtypeStruct((rows, *v.shape[1:]), v.dtype) for v in (logits, target)]
        for arguments in ((logits, jnp.asarray(target)), symbols):
            call = exported(cross_entropy_value_and_grad, *arguments)
            loss, grad = call(logits, jnp.asarray(target[::-1]))
            truth = oracle(CLEAN, target[::-1])
            assert_loss(loss, truth)
            assert_grad(grad, truth)


# -- several devices ---------------------------------------------------------------------------------------------

SHARDED = """
import itertools
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.close import assert_grad, assert_loss
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from support.oracle import oracle
from support.sizes import resize
from xent_array import cross_entropy, cross_entropy_grad, cross_entropy_value_and_grad, log_softmax, row_stats, softmax
from xent_array import logsumexp

devices = jax.devices()
assert len(devices) == 4
mesh = Mesh(np.array(devices).reshape(2, 2), ("batch", "class"))
half = Mesh(np.array(devices[:2]), ("batch",))


def on(spec, array, mesh=mesh):
    "The array spread over the mesh; on one device that it is not bound to, where spec is None."
    return jnp.asarray(array) if spec is None else jax.device_put(array, NamedSharding(mesh, spec))


rng = np.random.default_rng(0)
X = (3 * rng.normal(size=(4, 8))).astype("float32")
labels, soft = np.array([0, 7, -100, 3]), rng.random((4, 8)).astype("float32")
W, S = rng.random(8).astype("float32"), rng.random(4).astype("float32")
smooth = {"label_smoothing": 0.1, "z_loss": 0.1, "softcap": 5.0}

BATCH, CLASS, BOTH, WHOLE = P("batch"), P(None, "class"), P("batch", "class"), P()
cases = [  # of logits, of labels or soft targets, of the weight per class, of the weight per row
    (BATCH, BATCH, WHOLE, BATCH), (BATCH, None, None, None), (CLASS, WHOLE, P("class"), WHOLE),
    (CLASS, None, None, None), (BOTH, BATCH, P("class"), BATCH), (BOTH, WHOLE, None, None),
    (WHOLE, None, WHOLE, None), (None, BATCH, WHOLE, None),
]
for number, (of_logits, of_rows, of_weight, of_samples) in enumerate(cases):
    x = on(of_logits, X)
    for target, options in ((soft, smooth), (labels, smooth)) if number in (0, 4) else ((labels, {}),):
        of_target = of_logits if target is soft and of_rows is not None else of_rows
        t, w, s = on(of_target, target), on(of_weight, W), on(of_samples, S)
        options = {"reduction": ("none", "mean", "sum")[number % 3], **options}
        truth = oracle(X, target, weight=W, sample_weight=S, **options)

        def both(x, t, w, s):
            return cross_entropy_value_and_grad(x, t, weight=w, sample_weight=s, **options)

        def alone(x, t, w, s):
            return jnp.sum(cross_entropy(x, t, weight=w, sample_weight=s, **options))

        results = [both(x, t, w, s)]
        if number in (0, 3):
            results.append(jax.jit(both)(x, t, w, s))
            stats = row_stats(x, t, weight=w, **{k: v for k, v in options.items() if k != "reduction"})
            given = {"weight": w, "sample_weight": s, **options}
            results.append((cross_entropy(x, t, **given), cross_entropy_grad(x, t, stats=stats, **given)))
            results.append((results[0][0], jax.grad(alone)(x, t, w, s)))
        for loss, grad in results:
            assert_loss(loss, truth)
            assert_grad(grad, truth)
            assert x.committed <= (grad.sharding.device_set == x.sharding.device_set)
for function in (softmax, log_softmax):
    np.testing.assert_allclose(function(on(BOTH, X)), function(X), rtol=1e-5)
with pytest.raises(ValueError, match="memory cannot be borrowed: they are spread over devices or processes"):
    cross_entropy(on(BATCH, X), on(BATCH, labels), engine="cpu")

# Each device its own rows, under a derivative.
if hasattr(jax, "shard_map"):
    from jax import shard_map
else:
    from jax.experimental.shard_map import shard_map
mean = shard_map(
    lambda x, t, w: jax.lax.psum(cross_entropy(x, t, weight=w, reduction="sum"), "batch"),
    mesh=half, in_specs=(P("batch"), P("batch"), P()), out_specs=P(),
)
truth = oracle(X, labels, weight=W, reduction="sum")
loss, grad = jax.jit(jax.value_and_grad(mean))(X, labels, W)
assert_loss(loss, truth)
assert_grad(grad, truth)

# One device that the arrays are bound to, others that they are not, and lists, which go where the logits are.
bound = jax.device_put(X, devices[1])
for t in (jax.device_put(labels, devices[1]), jnp.asarray(labels), labels.tolist()):
    assert cross_entropy(bound, t).devices() == {devices[1]}
    loss, grad = cross_entropy_value_and_grad(bound, t, engine="cpu")
    assert (loss.devices(), grad.devices()) == ({devices[1]}, {devices[1]})
    assert loss.committed and grad.committed
    assert_grad(grad, oracle(X, labels))
with jax.default_device(devices[2]):
    there = jnp.asarray(X)
for part in cross_entropy_value_and_grad(there, labels):
    assert part.devices() == {devices[2]} and not part.committed
assert not cross_entropy(jnp.asarray(X), jnp.asarray(labels)).committed

# A mesh of one device: memory like any other, and results that go with what is on that mesh.
single = Mesh(np.array(devices[3:]), ("batch",))
x, t = on(BATCH, X, single), on(BATCH, labels, single)
loss, grad = cross_entropy_value_and_grad(x, t, engine="cpu")
assert grad.sharding == x.sharding
truth = oracle(X, labels)
assert_loss(loss, truth)
assert_grad(grad, truth)
np.testing.assert_allclose(jax.jit(lambda x, loss: x * loss)(x, loss), X * np.asarray(loss))
np.testing.assert_allclose(logsumexp(x) * t, np.asarray(logsumexp(X)) * labels, rtol=1e-6)
assert_loss(cross_entropy(on(BOTH, X), labels.tolist()), oracle(X, labels))
with pytest.raises(TypeError, match=r"target must be on the device of logits, .*1, but is on .*0"):
    cross_entropy(bound, jax.device_put(labels, devices[0]))
with pytest.raises(TypeError, match=r"target must be on the device of logits, .*0.*1.*2.*3.*, but is on .*1"):
    cross_entropy(on(BATCH, X), jax.device_put(labels, devices[1]))
with pytest.raises(TypeError, match=r"weight must be on the device of logits"):
    cross_entropy(on(BATCH, X), labels.tolist(), weight=on(WHOLE, W, half))

# Labels on several devices are looked at where that is asked for; a bad one makes its row NaN elsewhere.
bad = on(BATCH, np.array([0, 8, -100, 3]))
with pytest.raises(IndexError, match=r"target\\[1\\] is 8"):
    cross_entropy(on(BATCH, X), bad, validate=True)
assert np.isnan(cross_entropy(on(BATCH, X), bad, reduction="none")).tolist() == [False, True, False, False]
with pytest.raises(TypeError, match="out"):
    cross_entropy_grad(on(BATCH, X), on(BATCH, labels), out=on(BATCH, X))
"""


def test_several_devices():
    run(SHARDED, XLA_FLAGS="--xla_force_host_platform_device_count=4")


WITHOUT_X64 = """
import itertools
import jax
import jax.experimental
import jax.numpy as jnp
import numpy as np
import pytest
import warnings
from support.close import assert_grad, assert_loss
from support.oracle import oracle
from support.sizes import resize
from xent_array import cross_entropy, cross_entropy_value_and_grad

assert jnp.arange(1).dtype == "int32" and jnp.zeros(1).dtype == "float32"
rng = np.random.default_rng(0)
targets = rng.integers(0, 5, 6), rng.random((6, 5)).astype("float32")
weights = {"weight": rng.random(5).astype("float32"), "sample_weight": rng.random(6).astype("float32")}
for dtype, target, given, reduction in itertools.product(
    ("float32", "bfloat16"), targets, ({}, weights, {"z_loss": 0.1, "label_smoothing": 0.1}), ("none", "mean", "sum")
):
    x = jnp.asarray(3 * rng.normal(size=(6, 5)), dtype=dtype)
    truth = oracle(np.asarray(x), target, reduction=reduction, **given)
    arrays = {k: jnp.asarray(v) if isinstance(v, np.ndarray) else v for k, v in given.items()}
    loss, grad = cross_entropy_value_and_grad(x, jnp.asarray(target), reduction=reduction, **arrays)
    assert_loss(loss, truth)
    assert_grad(grad, truth)
    assert_loss(cross_entropy(x, jnp.asarray(target), reduction=reduction, **arrays), truth)

# What 32 bits cannot hold is ignored by no label, and matches none that it would be equal to in 32 bits.
x = jnp.asarray(rng.normal(size=(3, 5)), dtype="float32")
for dtype, label, ignores in (
    ("int32", 1, 2**32 + 1), ("int32", -1, 2**32 - 1), ("int32", 1, 2**40), ("uint32", 2**32 - 1, -1),
    ("uint32", 2**32 - 1, 2**64 - 1), ("uint32", 2**32 - 1, 2**32 - 1), ("int32", -(2**31), -(2**31)),
    ("int32", -(2**31), 2**31),
):
    labels = np.array([0, label, 2], dtype)
    truth = oracle(np.asarray(x), labels.astype(object), ignore_index=ignores, reduction="none")
    given = {"ignore_index": ignores, "reduction": "none", "validate": False}
    loss, grad = jax.jit(lambda x, t: cross_entropy_value_and_grad(x, t, **given))(x, jnp.asarray(labels))
    assert_loss(loss, truth)
    assert_grad(grad, truth)
    assert_loss(cross_entropy(x, jnp.asarray(labels), **given), truth)

# Integers of NumPy that JAX would wrap: they are looked at as they are, or not at all.
for labels in (np.array([0, 2**32 + 1, 2]), [0, 2**32 + 1, 2]):
    with pytest.raises(IndexError, match=r"^target\\[1\\] is 4294967297, which is not a class"):
        cross_entropy(x, labels)
    rows = cross_entropy(x, labels, reduction="none", validate=False)
    assert np.isnan(rows).tolist() == [False, True, False]
    assert cross_entropy(x, labels, ignore_index=2**32 + 1) == cross_entropy(x[::2], [0, 2])
    for way in (jax.jit, jax.grad):
        with pytest.raises(ValueError, match="^4294967297 in an array of NumPy is beyond int32, which is what JAX has"):
            way(lambda x: cross_entropy(x, labels))(x)
labels, weight, narrow = np.array([0, 1, 2]), np.arange(5.0), jnp.arange(3, dtype="int32")
results = cross_entropy_value_and_grad(x, labels, weight=weight, return_stats=True)
assert {str(part.dtype) for part in jax.tree.leaves(results)} == {"float32", "bool"}
assert jax.jit(lambda x: cross_entropy(x, labels, weight=weight))(x).dtype == "float32"
for function in (cross_entropy, cross_entropy_value_and_grad):
    for one, other in zip(*(jax.tree.leaves(function(x, labels)) for labels in (narrow, labels)), strict=True):
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()

# What was made with 64 bits, where there are no more: 32 bits come of it, as everywhere in JAX.
with jax.enable_x64(True) if hasattr(jax, "enable_x64") else jax.experimental.enable_x64():
    wide = jnp.ones((3, 5))
assert wide.dtype == "float64"
with pytest.raises(ValueError, match="memory cannot be borrowed: jax_enable_x64 is off, and they are of 64 bits"):
    cross_entropy(wide, narrow, engine="cpu")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    assert cross_entropy(wide, narrow).dtype == "float32"

for mode in (jax.debug_nans(True), jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise")):
    with mode:
        for target in (jnp.asarray([0, 1, -100]), jnp.ones((3, 5), dtype="float32")):
            truth = oracle(np.asarray(x), np.asarray(target))
            assert_loss(cross_entropy_value_and_grad(x, target)[0], truth)
            assert_grad(jax.grad(cross_entropy)(x, target), truth)
"""


def test_without_x64():
    run(WITHOUT_X64, JAX_ENABLE_X64="0")
