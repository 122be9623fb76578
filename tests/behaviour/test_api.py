"""What users do that no table of semantics foresees: odd buffers, extreme options, copies of objects, transforms."""

import copy
import decimal
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.lib.stride_tricks import as_strided
from support.close import assert_grad, assert_loss
from support.oracle import oracle

from xent_array import (
    CrossEntropyLoss,
    cross_entropy,
    cross_entropy_grad,
    cross_entropy_value_and_grad,
    row_stats,
    softmax,
)
from xent_array._engines.cpu import blocks

RNG = np.random.default_rng(0)
LOGITS = RNG.standard_normal((6, 5), dtype=np.float32)
LABELS = np.array([0, 3, 4, 1, 2, 2])


@pytest.mark.parametrize("strides", [(0, 4), (4, 4), (8, 4), (-8, 4), (20, 0)])
def test_out_with_elements_on_each_other_is_refused(strides):
    out = as_strided(np.zeros(60, np.float32)[30:], LOGITS.shape, strides)
    with pytest.raises(ValueError, match="share memory with each other"):
        cross_entropy_grad(LOGITS, LABELS, out=out)


@pytest.mark.parametrize("strides", [(20, 4), (40, 8), (-20, 4), (4, 24), (4, -24)])
def test_out_of_any_strides_that_are_apart(strides):
    out = as_strided(np.zeros(120, np.float32)[60:], LOGITS.shape, strides)
    assert cross_entropy_grad(LOGITS, LABELS, out=out) is out
    np.testing.assert_array_equal(out, cross_entropy_grad(LOGITS, LABELS))


@pytest.mark.parametrize("role", ["weight", "sample_weight", "grad_output"])
@pytest.mark.parametrize("engine", ["cpu", "numpy", "generic"])
def test_numbers_below_the_arithmetic_do_not_warn(role, engine):
    given = {role: np.full(5 if role == "weight" else 6, 1e-300)}
    with np.errstate(all="raise"):
        cross_entropy_value_and_grad(LOGITS, LABELS, reduction="none", engine=engine, **given)


@pytest.mark.parametrize("softcap", [1e300, 1e-300])
def test_softcap_beyond_float32_is_taken_in_float64(softcap):
    assert np.isfinite(cross_entropy(LOGITS.astype(np.float64), LABELS, softcap=softcap))


def test_what_is_accepted_does_not_depend_on_earlier_calls():
    """A cache that takes equal numbers for the same one would answer for the second what it has said of the first."""
    for good, bad in [({"ignore_index": 255}, {"ignore_index": 255.0}), ({"z_loss": 0.5}, {"z_loss": 0.5 + 0j})]:
        for options in (good, bad, good, bad):
            if options is good:
                cross_entropy(LOGITS, LABELS, **options)
            else:
                with pytest.raises(TypeError, match=next(iter(bad))):
                    cross_entropy(LOGITS, LABELS, **options)


@pytest.mark.parametrize("first", [0.0, -0.0])
def test_the_sign_of_a_zero_gradient_does_not_depend_on_earlier_calls(first):
    for upstream in (first, -first):
        grad = cross_entropy_grad(LOGITS, LABELS, grad_output=upstream)
        value_grad = cross_entropy_value_and_grad(LOGITS, LABELS, grad_output=upstream)[1]
        assert not np.signbit(grad).any()
        assert not np.signbit(value_grad).any()


@pytest.mark.parametrize("make", ["numpy", "torch", "jax"])
def test_an_array_of_no_dimension_is_a_number(make):
    xp = pytest.importorskip("jax.numpy" if make == "jax" else make)
    logits, labels = xp.asarray(LOGITS), xp.asarray(LABELS)
    numbers = {"label_smoothing": 0.25, "z_loss": 0.5, "softcap": 2.0, "ignore_index": 3, "denominator": 4.0}
    arrays = {name: xp.asarray(value) for name, value in numbers.items()}
    loss, grad = cross_entropy_value_and_grad(logits, labels, grad_output=2.0, **numbers)
    as_arrays = cross_entropy_value_and_grad(logits, labels, grad_output=xp.asarray(2.0), **arrays)
    np.testing.assert_allclose(as_arrays[0], loss, rtol=1e-6)
    np.testing.assert_allclose(as_arrays[1], grad, rtol=1e-6)
    of_rows = [
        cross_entropy_grad(logits, labels, reduction="none", grad_output=g, engine=engine)
        for g in (2.0, xp.asarray(2.0))
        for engine in (None, "generic")
    ]
    for grad in of_rows[1:]:
        np.testing.assert_allclose(grad, of_rows[0], rtol=1e-6)
    with pytest.raises(ValueError, match=r"label_smoothing must be from 0 to 1, got 1\.5"):
        cross_entropy(logits, labels, label_smoothing=xp.asarray(1.5))
    with pytest.raises(TypeError, match="z_loss must be a real number"):
        cross_entropy(logits, labels, z_loss=xp.asarray([0.5]))


class Column:
    """What a table gives: it is no array, and can become one."""

    def __init__(self, values, **attributes):
        self.values = values
        vars(self).update(attributes)

    def __array__(self, dtype=None, copy=None):
        return np.asarray(self.values, dtype)


def test_what_becomes_an_array_is_taken():
    plain = {"weight": np.arange(5.0), "sample_weight": np.arange(6.0), "grad_output": np.arange(6.0)}
    loss, grad = cross_entropy_value_and_grad(LOGITS, LABELS, reduction="none", **plain)
    columns = {name: Column(values) for name, values in plain.items()}
    got = cross_entropy_value_and_grad(Column(LOGITS), Column(LABELS), reduction="none", **columns)
    assert type(got[0]) is type(got[1]) is np.ndarray
    np.testing.assert_array_equal(got[0], loss)
    np.testing.assert_array_equal(got[1], grad)
    np.testing.assert_array_equal(softmax(Column(LOGITS)), softmax(LOGITS))
    assert cross_entropy(LOGITS, LABELS, denominator=Column(2.0)) == cross_entropy(LOGITS, LABELS, denominator=2)


def test_a_table_of_pandas_is_taken():
    pandas = pytest.importorskip("pandas")
    table = pandas.DataFrame(LOGITS)
    labels = pandas.Series(LABELS)
    assert cross_entropy(table, labels) == cross_entropy(LOGITS, LABELS)
    assert cross_entropy(table, labels.astype("Int64")) == cross_entropy(LOGITS, LABELS)
    named = pandas.Series(list("abcabc")).astype("category")
    for target, words in ((named, r"\.cat\.codes"), (named.array, r"its \.codes")):
        with pytest.raises(TypeError, match=words):
            cross_entropy(LOGITS, target)
    numbered = pandas.Series([4, 3, 2, 1, 0, 0]).astype("category")  # whose values are no classes
    with pytest.raises(TypeError, match=r"\.cat\.codes"):
        cross_entropy(LOGITS, numbered)
    assert cross_entropy(LOGITS, named.cat.codes) == cross_entropy(LOGITS, [0, 1, 2, 0, 1, 2])


class Sparse:
    def toarray(self):
        return LOGITS


@pytest.mark.parametrize(
    ("value", "says", "says_not"),
    [
        (Sparse(), [r"Sparse; pass \.toarray\(\) of it$"], []),
        (Column(list("abcabc"), dtype="category", codes=LABELS), [r"categories are its \.codes$"], []),
        (Column(list("abcabc"), dtype="category"), [r"categories are its \.cat\.codes$"], []),
        (Column(list("abcabc")), ["Column", "<U1"], []),
        (range(6), ["range; pass a list of it$"], []),
        ({"a": 1}, ["got dict$"], []),
        ("abc", [r"got str \('abc'\)$"], []),
        (None, [r"got NoneType \(None\)$"], []),
        (["a"] * 6, ["numbers", "str"], ["<U1"]),
        ([None] * 6, ["numbers", "NoneType"], []),
        (np.array(["a"] * 6), ["text", "<U1"], ["str32"]),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, list) else "",
)
def test_what_is_no_array_gets_advice_that_fits(value, says, says_not):
    for role in ("logits", "target"):
        given = {"logits": LOGITS, "target": LABELS} | {role: value}
        with pytest.raises(TypeError, match=f"^{role} must be ") as raised:
            cross_entropy(**given)
        for words in says:
            assert re.search(words, str(raised.value))
        assert not any(words in str(raised.value) for words in says_not)


def test_integer_logits_are_told_how_to_be_converted():
    with pytest.raises(TypeError, match=r"got int64: write numpy\.array\(logits, dtype='float32'\)$"):
        cross_entropy([[1, 2], [3, 4]], [0, 1])
    with pytest.raises(TypeError, match=r"got int32: write logits\.astype\('float32'\)$"):
        cross_entropy(np.array([[1, 2]], np.int32), [0])
    with pytest.raises(TypeError, match=r"got int64: write x\.astype\('float32'\)$"):
        softmax(np.array([1, 2]))
    with pytest.raises(TypeError, match="got bool, which is not converted"):
        softmax(np.array([True, False]))
    xp = pytest.importorskip("array_api_strict")
    with pytest.raises(TypeError, match=r"got int64: write xp\.astype\(logits, xp\.float32\)$"):
        cross_entropy(xp.asarray([[1, 2]]), xp.asarray([0]))
    torch = pytest.importorskip("torch")
    with pytest.raises(TypeError, match=r"got int64: write logits\.float\(\)$"):
        cross_entropy(torch.tensor([[1, 2]]), torch.tensor([0]))


@pytest.mark.parametrize("make", [list, np.array, Column])
@pytest.mark.parametrize("role", ["weight", "sample_weight", "grad_output"])
def test_a_weight_that_the_arithmetic_cannot_hold_is_named(role, make):
    values = [1.0] * (5 if role == "weight" else 6)
    values[3] = 1e39
    with pytest.raises(ValueError, match=rf"^{role}\[3\] is 1e\+39, which the arithmetic, here float32, cannot hold$"):
        cross_entropy_grad(LOGITS, LABELS, reduction="none", **{role: make(values)})
    for library in ("torch", "jax.numpy"):
        xp = pytest.importorskip(library)
        with pytest.raises(ValueError, match=rf"^{role}\[3\] is 1e\+39"):
            cross_entropy_grad(xp.asarray(LOGITS), xp.asarray(LABELS), reduction="none", **{role: list(values)})


@pytest.mark.parametrize("role", ["denominator", "grad_output", "z_loss", "label_smoothing"])
def test_an_integer_beyond_every_float_names_its_argument(role):
    with pytest.raises(ValueError, match=f"^{role} must be a number that float64 can hold$"):
        cross_entropy_grad(LOGITS, LABELS, **{role: 10**400})
    with pytest.raises(ValueError, match=r"^weight holds integers that are too large for any dtype$"):
        cross_entropy(LOGITS, LABELS, weight=[10**400, 1, 1, 1, 1])


def test_a_denominator_whose_inverse_the_arithmetic_cannot_hold_is_refused():
    small = r"denominator must be at least 1\.17\d+e-38 in magnitude, .* here float32; got -?1e-39"
    large = "denominator must be a number that the arithmetic can hold, here float32; got 1e\\+39"
    for bad, message in ((1e-39, small), (-1e-39, small), (1e39, large)):
        with pytest.raises(ValueError, match=message):
            cross_entropy(LOGITS, LABELS, denominator=bad)
        assert np.isfinite(cross_entropy(LOGITS.astype(np.float64), LABELS, denominator=bad))


@pytest.mark.parametrize("role", ["label_smoothing", "z_loss", "softcap"])
def test_true_is_no_number(role):
    with pytest.raises(TypeError, match=f"^{role} must be a real number"):
        cross_entropy(LOGITS, LABELS, **{role: True})


@pytest.mark.parametrize("role", ["denominator", "grad_output"])
@pytest.mark.parametrize("value", ["4", decimal.Decimal(4), [4.0]], ids=["text", "Decimal", "list"])
def test_what_is_no_number_is_told_that_a_number_is_wanted(role, value):
    with pytest.raises(TypeError, match=f"^{role} must be a number or an array without dimensions, got"):
        cross_entropy_grad(LOGITS, LABELS, **{role: value})


def test_mistakes_of_shape_and_dtype_are_told_what_to_write():
    for target, words in (
        (LABELS.astype(float), r"\(write target\.astype\('int64'\)\)"),
        (LABELS[:, None], r"write target\[\.\.\., 0\] for class indices"),
    ):
        with pytest.raises((TypeError, ValueError), match=words):
            cross_entropy(LOGITS, target)
    with pytest.raises(TypeError, match=r"got object: write logits\.astype\('float32'\)"):
        cross_entropy(LOGITS.astype(object), LABELS)
    with pytest.raises(IndexError, match=r"labels must be from 0 to 0 \(the logits have one class\)"):
        cross_entropy(LOGITS[:, :1], np.minimum(LABELS, 1))
    with pytest.raises(TypeError, match=r"label_smoothing must be a real number, got .* of shape \(1,\)"):
        cross_entropy(LOGITS, LABELS, label_smoothing=np.array([0.1]))
    with pytest.raises(ValueError, match="denominator is what the mean divides by"):
        CrossEntropyLoss(reduction="sum", denominator=3)


def test_an_option_that_is_traced_is_told_to_be_static():
    jax = pytest.importorskip("jax")
    for role in ("label_smoothing", "z_loss", "softcap", "ignore_index", "validate", "axis"):
        with pytest.raises(TypeError, match=f"^{role} must be known while tracing: make it static"):
            jax.jit(lambda value, role=role: cross_entropy(LOGITS, LABELS, **{role: value}))(1)


def test_a_label_of_a_row_that_does_not_count_is_not_looked_at():
    labels = np.where(np.arange(6) == 2, -1, LABELS)
    mask = labels >= 0
    assert cross_entropy(LOGITS, labels, sample_weight=mask) == pytest.approx(cross_entropy(LOGITS[mask], labels[mask]))
    with pytest.raises(IndexError, match=r"target\[2\] is -1"):
        cross_entropy(LOGITS, labels, sample_weight=~mask)


@pytest.mark.parametrize("role", ["logits", "target", "weight", "sample_weight"])
def test_a_ragged_list_names_its_argument(role):
    given = {"logits": LOGITS, "target": LABELS} | {role: [[1.0, 2.0], [3.0]]}
    with pytest.raises(ValueError, match=f"^{role} is not an array: its lists differ in length"):
        cross_entropy(**given)


def test_a_scalar_names_its_argument():
    with pytest.raises(ValueError, match=r"^x must have at least one dimension, .* shape \(\)"):
        softmax(1.0)
    with pytest.raises(ValueError, match=r"^logits must have at least one dimension, .* shape \(\)"):
        cross_entropy(1.0, 0)


def test_sample_weights_of_a_batch_take_the_place_of_the_object_s():
    sce = CrossEntropyLoss(np.arange(1.0, 6), sample_weight=np.ones(6))  # class weights come first, as in PyTorch
    batch = np.arange(6.0)
    loss, grad = cross_entropy_value_and_grad(LOGITS, LABELS, weight=np.arange(1.0, 6), sample_weight=batch)
    assert sce.forward(LOGITS, LABELS, sample_weight=batch) == pytest.approx(loss, rel=1e-6)
    np.testing.assert_allclose(sce.backward(), grad, rtol=1e-5)
    assert sce(LOGITS, LABELS) == pytest.approx(cross_entropy(LOGITS, LABELS, weight=np.arange(1.0, 6)), rel=1e-6)


TYPED = """
import numpy as np
from xent_array import CrossEntropyLoss, cross_entropy, cross_entropy_grad, cross_entropy_value_and_grad, softmax
x, y = np.zeros((4, 5)), np.zeros(4, np.int64)
a: np.floating = cross_entropy(x, y, weight=[1.0] * 5)
b: np.ndarray = cross_entropy(x, y, reduction="none")
c: np.floating = cross_entropy([[1.0, 2.0]], [0])
loss, grad = cross_entropy_value_and_grad(x, y, grad_output=2.0)
d: tuple[np.floating, np.ndarray] = (loss, grad)
*_, stats = cross_entropy_value_and_grad(x, y, return_stats=True)
e: np.ndarray = cross_entropy_grad(x, y, stats=stats, out=x)
"""
MISTYPED = [
    ('cross_entropy(x, y, reduction="avg")', "No overload"),
    ('cross_entropy_value_and_grad(x, y, reduction="avg")', "No overload"),
    ('cross_entropy_grad(x, y, reduction="avg")', "No overload"),
    ('CrossEntropyLoss(reduction="avg")', "incompatible type"),
    ("cross_entropy(x, y, label_smoothin=0.1)", "label_smoothin|No overload"),
    ("softmax(3)", "No overload"),
    ("f: str = cross_entropy(x, y)", "Incompatible types"),
    ("loss, grad, stats = cross_entropy_value_and_grad(x, y)", "Need more than 2 values"),
]


def test_a_type_checker_finds_mistakes(tmp_path):
    pytest.importorskip("mypy")
    program = tmp_path / "program.py"
    program.write_text("\n".join([TYPED, *(line for line, _ in MISTYPED)]))
    command = [sys.executable, "-m", "mypy", "--config-file=", "--hide-error-context", str(program)]
    said = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False).stdout
    first = TYPED.count("\n") + 2
    for number, (line, words) in enumerate(MISTYPED, first):
        assert re.search(rf"program\.py:{number}: error: .*(?:{words})", said), (line, said)
    assert {int(n) for n in re.findall(r"program\.py:(\d+): error", said)} == set(range(first, first + len(MISTYPED)))


def test_scalar_upstream_for_rows():
    whole = cross_entropy_grad(LOGITS, LABELS, reduction="none", grad_output=np.full(6, 3.0))
    np.testing.assert_array_equal(cross_entropy_grad(LOGITS, LABELS, reduction="none", grad_output=3), whole)


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda loss: pickle.loads(pickle.dumps(loss))])
def test_a_copy_of_a_loss_starts_before_its_first_forward(duplicate):
    sce = CrossEntropyLoss(label_smoothing=0.1)
    loss = sce.forward(LOGITS, LABELS)
    other = duplicate(sce)
    with pytest.raises(RuntimeError, match="call forward"):
        other.backward()
    assert other(LOGITS, LABELS) == loss
    np.testing.assert_array_equal(other.backward(), sce.backward())


def test_stats_pass_through_a_compiled_function():
    jax = pytest.importorskip("jax")
    logits, labels = jax.numpy.asarray(LOGITS), jax.numpy.asarray(LABELS)
    stats = jax.jit(row_stats)(logits, labels)
    grad = jax.jit(lambda x, y, stats: cross_entropy_grad(x, y, stats=stats))(logits, labels, stats)
    np.testing.assert_allclose(grad, cross_entropy_grad(LOGITS, LABELS), rtol=1e-5)


def test_torch_vmap():
    torch = pytest.importorskip("torch")
    logits, labels = torch.from_numpy(np.stack([LOGITS, 2 * LOGITS])), torch.from_numpy(np.stack([LABELS, LABELS]))
    mapped = torch.func.vmap(cross_entropy)(logits, labels)
    np.testing.assert_allclose(mapped, [cross_entropy(LOGITS, LABELS), cross_entropy(2 * LOGITS, LABELS)], rtol=1e-6)


def test_small_gradients_round_to_float16_as_a_cast_does():
    """Every float16 below the smallest normal one, half-way to the next, and the float32 numbers beside each."""
    halves = np.arange(-1100, 1101, dtype=np.float32) * np.float32(2.0**-25)
    values = np.concatenate([halves, np.nextafter(halves, np.float32(np.inf)), np.nextafter(halves, np.float32(-1))])
    with np.errstate(under="ignore"):
        np.testing.assert_array_equal(blocks._rounded_to_half(values).astype(np.float16), values.astype(np.float16))


@pytest.mark.full
@pytest.mark.parametrize("axis", [0, 1])
def test_float16_gradient_of_a_large_batch(axis):
    shape = (64, 700) if axis else (700, 64)
    logits = (4 * RNG.standard_normal(shape)).astype(np.float16)
    labels = RNG.integers(shape[axis], size=64)
    truth = oracle(logits, labels, axis=axis)
    loss, grad = cross_entropy_value_and_grad(logits, labels, axis=axis, engine="cpu")
    assert_loss(loss, truth)
    assert_grad(grad, truth)


def test_a_denominator_may_be_traced_and_differentiated():
    jax = pytest.importorskip("jax")
    mean = jax.jit(lambda x, y, denominator: cross_entropy(x, y, denominator=denominator))
    for denominator in (3, 3.5):
        wanted = cross_entropy(LOGITS, LABELS, denominator=denominator)
        np.testing.assert_allclose(mean(LOGITS, LABELS, denominator), wanted, rtol=1e-6)
    grad, by_denominator = jax.grad(mean, argnums=(0, 2))(jax.numpy.asarray(LOGITS), LABELS, 2.0)
    np.testing.assert_allclose(grad, cross_entropy_grad(LOGITS, LABELS, denominator=2), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(by_denominator, -cross_entropy(LOGITS, LABELS, denominator=2) / 2, rtol=1e-6)
    traced = jax.jit(lambda x, y: cross_entropy_value_and_grad(x, y, return_stats=True))
    np.testing.assert_array_equal(traced(LOGITS, LABELS)[2].correct, LOGITS.argmax(axis=1) == LABELS)


def test_a_denominator_under_autograd():
    torch = pytest.importorskip("torch")
    logits = torch.from_numpy(LOGITS.copy()).requires_grad_()
    cross_entropy(logits, torch.from_numpy(LABELS), denominator=torch.tensor(4)).backward()
    np.testing.assert_allclose(logits.grad, cross_entropy_grad(LOGITS, LABELS, denominator=4), rtol=1e-5, atol=1e-7)
