"""Libraries of the Array API as they differ: an older standard, poorer devices, lazy and sparse arrays, integers."""

import re
from pathlib import Path

import array_api_strict
import numpy as np
import pytest
from numpy.testing import assert_array_equal
from support.close import assert_grad, assert_loss
from support.lazy import computed
from support.oracle import oracle

import xent_array
from xent_array import (
    CrossEntropyLoss,
    RowStats,
    _rows,
    cross_entropy,
    cross_entropy_grad,
    cross_entropy_value_and_grad,
    log_softmax,
    logsumexp,
    row_stats,
    softmax,
)
from xent_array._rows import merge

C = 5
LOGITS = np.array([[2, 2, 1, 0, -1], [0, 3, -9, 1, 2], [40, 0, 0, 0, 0], [1, -2, 4, 0.5, 1], [1, 0, 7, 1, 0]])
LABELS = np.array([0, 1, 0, 3, -100])
SOFT = np.array([[4, 2, 1, 1, 0], [2, 2, 0, 4, 0], [8, 0, 0, 0, 0], [1, 0, 5, 2, 0], [1, 1, 0, 0, 6]]) / 8
WEIGHT, SAMPLE_WEIGHT = np.array([1, 0.5, 2, 0.25, 3]), np.array([1, 2, 0.5, 3, 1])
OPTIONS = [
    {},
    {
        "weight": WEIGHT,
        "sample_weight": SAMPLE_WEIGHT,
        "grad_output": 0.5,
        "z_loss": 0.1,
        "softcap": 3.0,
        "label_smoothing": 0.2,
    },
]
INTEGERS = ["int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"]

each_target = pytest.mark.parametrize("target", [LABELS, SOFT], ids=["index", "distribution"])
each_reduction = pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
each_option = pytest.mark.parametrize("options", OPTIONS, ids=["plain", "every option"])


def check(array, numpy, target, reduction, options):
    """Every function gives the oracle's loss and gradient on arrays made by `array` and read by `numpy`."""
    options = {"reduction": reduction, **options}
    truth = oracle(LOGITS.astype("float32"), target, **options)
    dtypes = {"f": "float32", "i": "int32"}
    x, t = array(LOGITS.astype("float32")), array(target.astype(dtypes[target.dtype.kind]))
    given = {k: array(v.astype("float32")) if isinstance(v, np.ndarray) else v for k, v in options.items()}
    loss, grad = cross_entropy_value_and_grad(x, t, **given)
    of_loss = {k: v for k, v in given.items() if k != "grad_output"}
    of_rows = {k: v for k, v in of_loss.items() if k != "reduction"}
    stats = row_stats(x, t, **of_rows)
    for value in (loss, cross_entropy(x, t, **of_loss)):
        assert_loss(numpy(value), truth)
    for value in (grad, cross_entropy_grad(x, t, stats=stats, **given)):
        assert_grad(numpy(value), truth)


def check_softmax(array, numpy):
    x = LOGITS.astype("float32")
    for function in (softmax, log_softmax, logsumexp):
        np.testing.assert_allclose(numpy(function(array(x), axis=0)), function(x, axis=0), rtol=1e-5, atol=1e-7)


# -- the oldest standard -----------------------------------------------------------------------------------------

OLDEST = "2023.12"
FUNCTIONS = set(
    re.findall(
        r"\w+",
        """
    __array_namespace_info__ abs acos acosh add all any arange argmax argmin argsort asarray asin asinh astype atan
    atan2 atanh bitwise_and bitwise_invert bitwise_left_shift bitwise_or bitwise_right_shift bitwise_xor
    broadcast_arrays broadcast_to can_cast ceil clip concat conj copysign cos cosh cumulative_sum divide empty
    empty_like equal exp expand_dims expm1 eye finfo flip floor floor_divide from_dlpack full full_like greater
    greater_equal hypot iinfo imag isdtype isfinite isinf isnan less less_equal linspace log log10 log1p log2
    logaddexp logical_and logical_not logical_or logical_xor matmul matrix_transpose max maximum mean meshgrid min
    minimum moveaxis multiply negative nonzero not_equal ones ones_like permute_dims positive pow prod real remainder
    repeat reshape result_type roll round searchsorted sign signbit sin sinh sort sqrt square squeeze stack std
    subtract sum take tan tanh tensordot tile tril triu trunc unique_all unique_counts unique_inverse unique_values
    unstack var vecdot where zeros zeros_like
    """,
    )
)
CONSTANTS = {"e", "inf", "nan", "newaxis", "pi", "bool", "float32", "float64", "complex64", "complex128", *INTEGERS}


class Oldest:
    """A library that has what the standard had then, and nothing else."""

    __name__ = "oldest"

    def __getattr__(self, name):
        if name in FUNCTIONS | CONSTANTS:
            return getattr(array_api_strict, name)
        raise AttributeError(f"{name} is not in the Array API {OLDEST}")


@pytest.fixture
def oldest(monkeypatch):
    library = Oldest()
    monkeypatch.setattr(_rows, "array_namespace", lambda array: library)
    with array_api_strict.ArrayAPIStrictFlags(api_version=OLDEST):
        yield library


@each_target
@each_reduction
@each_option
def test_oldest_standard(oldest, target, reduction, options):
    check(oldest.asarray, np.asarray, target, reduction, options)


def test_oldest_standard_softmax_and_merge(oldest):
    check_softmax(oldest.asarray, np.asarray)
    x = oldest.asarray(LOGITS)
    left, right = row_stats(x[:, :2], oldest.zeros(5, dtype=oldest.int64)), None
    right = RowStats(*(oldest.zeros_like(part) for part in left))._replace(max=oldest.max(x[:, 2:], axis=1))
    assert_array_equal(np.asarray(merge(left, right).max), LOGITS.max(axis=1))


def test_what_is_asked_of_a_library_is_in_the_oldest_standard():
    """Also on the paths that no test takes; engines of one library may ask for what that has."""
    package = Path(xent_array.__file__).parent
    files = [package / name for name in ("_api.py", "_problem.py", "_rows.py", "_engines/generic.py")]
    files.append(package / "_engines" / "__init__.py")
    asked = {name for file in files for name in re.findall(r"\bxp\.(\w+)", file.read_text())} - {"__name__"}
    assert asked <= FUNCTIONS | CONSTANTS
    assert asked - CONSTANTS == set(_rows.FUNCTIONS)


# -- poorer devices ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["device1", "device2", "no_float64", "no_x64"])
@each_target
@each_reduction
@each_option
def test_device(name, target, reduction, options, monkeypatch):
    xp, places = array_api_strict, {d._device: d for d in array_api_strict.__array_namespace_info__().devices()}
    if name not in places:
        pytest.skip(f"this array-api-strict has no device {name}")
    if name == "no_x64":  # whose own argmax asks for int64
        monkeypatch.setattr(xp, "argmax", argmax_in_32_bits)

    def array(values):
        return xp.asarray(values.tolist(), dtype=getattr(xp, values.dtype.name), device=places[name])

    def numpy(result):
        assert result.device == places[name]
        return np.asarray(xp.asarray(result, device=places["CPU_DEVICE"]))

    check(array, numpy, target, reduction, options)
    check_softmax(array, numpy)


def argmax_in_32_bits(x, **options):
    found = np.argmax(np.asarray(array_api_strict.asarray(x, device=array_api_strict.Device("CPU_DEVICE"))), **options)
    return array_api_strict.asarray(found.tolist(), dtype=array_api_strict.int32, device=x.device)


@pytest.mark.parametrize(("dtype", "narrow"), [("int64", "int32"), ("uint32", "int32"), ("uint64", "int64")])
def test_labels_are_not_narrowed_to_what_the_library_indexes_with(monkeypatch, dtype, narrow):
    """2^32 + 1 is no class 1 where indices have 32 bits; what an index as wide cannot hold is no class either."""
    xp = array_api_strict
    monkeypatch.setattr(_rows, "index_dtype", lambda xp, where=None: getattr(xp, narrow))
    bad = {"int64": 2**32 + 1, "uint32": 2**32 - 1, "uint64": 2**64 - 1}[dtype]
    x, labels = xp.asarray(LOGITS[:2]), xp.asarray(np.array([0, bad], dtype))
    with pytest.raises(IndexError, match=rf"target\[1\] is {bad},"):
        cross_entropy(x, labels)
    for ignore_index, second in ((bad, 0.0), (1, np.nan), (-1, np.nan), (None, np.nan)):
        loss = cross_entropy(x, labels, ignore_index=ignore_index, validate=False, reduction="none")
        assert_array_equal(np.asarray(loss)[1], second)


# -- libraries that lack something -------------------------------------------------------------------------------


class Few:
    """An array of a library without arange."""

    shape, dtype, ndim = (5, C), np.dtype("float32"), 2

    class Library:
        __name__ = "few"

        def __getattr__(self, name):
            if name in ("arange", "tanh"):
                raise AttributeError(name)
            return getattr(np, name)

    def __array_namespace__(self, api_version=None):
        return self.library

    library = Library()


Few.todense = Few.compute = lambda self: LOGITS


def every_function(x, target):
    yield from (lambda f=f: f(x) for f in (softmax, log_softmax, logsumexp))
    functions = (cross_entropy, cross_entropy_value_and_grad, cross_entropy_grad, row_stats)
    yield from (lambda f=f: f(x, target) for f in functions)
    yield lambda: CrossEntropyLoss().forward(x, target)


def test_library_that_lacks_a_function():
    for call in every_function(Few(), LABELS):
        with pytest.raises(TypeError, match=r"few lacks arange, tanh \(.todense\(\) or .compute\(\) may convert it\)"):
            call()


@pytest.mark.parametrize("kind", ["COO", "GCXS", "DOK"])
def test_sparse_arrays_are_refused(kind):
    sparse = pytest.importorskip("sparse", reason="sparse is not installed")
    x = getattr(sparse, kind).from_numpy(LOGITS)
    for target in (LABELS, sparse.COO.from_numpy(LABELS)):
        for call in every_function(x, target):
            with pytest.raises(TypeError, match=r"sparse.*todense"):
                call()


# -- lazy arrays -------------------------------------------------------------------------------------------------


class Lazy:
    """An array of NumPy that will not be looked at, as Dask's are not: no memory, no truth, no number."""

    def __init__(self, values):
        self.values = values

    shape, dtype, ndim = (
        property(lambda self, name=name: getattr(self.values, name)) for name in ("shape", "dtype", "ndim")
    )

    def __array_namespace__(self, api_version=None):
        return self.library

    def __getitem__(self, key):
        return Lazy(self.values[key])

    def __invert__(self):
        return Lazy(~self.values)

    class Library:
        __name__ = "lazy"

        def __getattr__(self, name):
            own = getattr(array_api_strict, name)
            numpy = getattr(np, name)
            if not callable(own) or isinstance(numpy, type) or name in ("finfo", "iinfo", "__array_namespace_info__"):
                return numpy

            def function(*args, device=None, **options):
                return Lazy(numpy(*(getattr(a, "values", a) for a in args), **options))

            return function

    library = Library()


def _binary(name):
    def method(self, other):
        return Lazy(getattr(self.values, name)(getattr(other, "values", other)))

    return method


for _name in re.findall(r"\w+", "add radd sub rsub mul rmul truediv rtruediv eq ne lt le gt ge and or"):
    setattr(Lazy, f"__{_name}__", _binary(f"__{_name}__"))
Lazy.__neg__ = lambda self: Lazy(-self.values)
Lazy.__bool__ = Lazy.__float__ = Lazy.__int__ = Lazy.__index__ = lambda self: pytest.fail("looked at")


@each_target
@each_reduction
@each_option
def test_lazy_arrays_are_not_looked_at(target, reduction, options):
    check(Lazy, lambda result: result.values, target, reduction, options)


@pytest.fixture
def dask():
    """Dask's arrays, which nobody may compute: `numpy` does it."""
    pytest.importorskip("dask.array", reason="Dask is not installed")
    import dask
    import dask.array

    def refuse(*args, **options):
        pytest.fail("computed")

    with dask.config.set(scheduler=refuse):
        yield dask.array


def dask_array(dask, chunks):
    return lambda values: dask.from_array(values, chunks=chunks)


def numpy_of_dask(result):
    import dask.array

    assert isinstance(result, dask.array.Array)
    return computed(result)


@each_target
@each_reduction
@each_option
@pytest.mark.parametrize("chunks", [2, 5], ids=["in chunks", "whole"])
def test_dask_arrays_work_and_stay_lazy(dask, target, reduction, options, chunks):
    check(dask_array(dask, chunks), numpy_of_dask, target, reduction, options)


def test_dask_softmax(dask):
    check_softmax(dask_array(dask, 2), numpy_of_dask)


# -- integers of any size ----------------------------------------------------------------------------------------


def ends(dtype):
    info = np.iinfo(dtype)
    return [int(info.min), int(info.max)]


@pytest.mark.parametrize("dtype", INTEGERS)
def test_ignore_index_at_the_ends_of_every_integer_dtype(backend, dtype):
    """And beyond: it matches the label that it is and no other that is equal to it in fewer or signed bits."""
    if not backend.supports(dtype):
        pytest.skip(f"{backend.name} has no {dtype}")
    logits = LOGITS[:3].astype("float32")
    for label in ends(dtype):
        labels = np.array([0, label, 1], dtype)
        for ignore_index in {label, *ends("int64"), *ends("uint64"), 2**63, -(2**64) + label, 2**64 + label, 2**80}:
            truth = oracle(logits, labels.astype(object), ignore_index=ignore_index)
            for engine in backend.engines:
                given = {"ignore_index": ignore_index, "engine": engine}
                x, t = backend.array(logits), backend.array(labels)
                if ignore_index != label and label not in range(C):
                    with pytest.raises(IndexError, match=rf"target\[1\] is {label},"):
                        computed(cross_entropy(x, t, validate=None if backend.looks_at_labels else True, **given))
                for validate in (None,) if ignore_index == label else (False,):
                    loss, grad = cross_entropy_value_and_grad(x, t, validate=validate, **given)
                    assert_loss(backend.numpy(loss), truth)
                    assert_grad(backend.numpy(grad), truth)


@pytest.mark.parametrize("dtype", [np.int8, np.uint64, np.int64])
def test_ignore_index_of_a_numpy_integer(backend, dtype):
    for label in ends(dtype)[1:]:
        x, t = backend.array(LOGITS[:2]), backend.array(np.array([0, label], dtype))
        for engine in backend.engines:
            loss = cross_entropy(x, t, ignore_index=dtype(label), reduction="none", engine=engine)
            assert backend.numpy(loss)[1] == 0


@pytest.mark.parametrize("wrong", [True, False, np.True_, 1.0, "1"])
def test_ignore_index_that_is_no_integer(wrong):
    """Also where the integer that is equal to it has just been taken."""
    cross_entropy(LOGITS, [0, 1, 2, 0, 0], ignore_index=1)
    cross_entropy(LOGITS, [0, 1, 2, 0, 0], ignore_index=0)
    with pytest.raises(TypeError, match="ignore_index must be an integer or None, got"):
        cross_entropy(LOGITS, [0, 1, 2, 0, 0], ignore_index=wrong)
