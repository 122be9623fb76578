"""The contract of the engines: which one takes what, why others do not, and what an engine from outside can do."""

from types import SimpleNamespace

import array_api_strict as xp
import numpy as np
import pytest

from xent_array import CrossEntropyLoss, _engines, _rows, cross_entropy, cross_entropy_value_and_grad, softmax
from xent_array._engines import ENGINES

LOGITS = np.array([[2, 1, 0.1], [0.1, 2, 1.9]])
LABELS = np.array([1, 0])


def spy(engine, calls):
    """An engine that notes what it is asked for, with only what the contract demands."""

    def noted(function):
        def wrapper(*arguments):
            calls.append(function.__name__)
            return function(*arguments)

        return wrapper

    required = {name: noted(getattr(engine, name)) for name in ("declines", "reads_labels_free", "stats", "grad")}
    return SimpleNamespace(name="spy", **required)


def test_table_is_named_by_its_engines():
    assert {name: engine.name for name, engine in ENGINES.items()} == {name: name for name in ENGINES}


def test_arrays_go_to_the_first_engine_that_takes_them_or_their_memory(backend, monkeypatch):
    calls = {name: [] for name in ENGINES}
    for name, engine in list(ENGINES.items()):
        monkeypatch.setitem(ENGINES, name, spy(engine, calls[name]))
    cross_entropy(backend.array(LOGITS), backend.array(LABELS))
    wanted = "cpu" if backend.is_numpy else backend.engines[0]
    assert [name for name in ENGINES if "stats" in calls[name]] == [wanted]


def test_a_forced_engine_that_declines_says_why(backend):
    engine = "cuda" if backend.is_numpy or "cpu" in backend.engines else "cpu"
    takes = {"cpu": "NumPy", "cuda": "CuPy"}[engine]
    with pytest.raises(ValueError, match=rf"'{engine}' cannot take these arrays: it takes {takes} arrays"):
        cross_entropy(backend.array(LOGITS), backend.array(LABELS), engine=engine)
    assert float(cross_entropy(backend.array(LOGITS), backend.array(LABELS), engine="generic")) == pytest.approx(
        2.0185083947418834, rel=1e-15
    )


def test_an_unknown_engine_names_the_known_ones():
    for make in (lambda engine: cross_entropy(LOGITS, LABELS, engine=engine), lambda e: CrossEntropyLoss(engine=e)):
        with pytest.raises(ValueError, match=r"None or one of 'cpu', 'numpy', 'cuda', 'generic'; got 'gpu'"):
            make("gpu")
        with pytest.raises(
            TypeError, match=r"None or one of 'cpu', 'numpy', 'cuda', 'generic', or an object like those; got int"
        ):
            make(3)


@pytest.mark.parametrize("inner", ["cpu", "numpy", "generic"])
def test_an_engine_object_needs_only_the_contract(inner):
    calls, inner = [], ENGINES[inner]
    engine = spy(inner, calls)
    loss, grad = cross_entropy_value_and_grad(LOGITS, LABELS, engine=engine)
    assert calls == ["declines", "reads_labels_free", "stats", "grad"]
    whole, whole_grad = cross_entropy_value_and_grad(LOGITS, LABELS, engine=inner)
    np.testing.assert_allclose(loss, whole, rtol=1e-15)
    np.testing.assert_allclose(grad, whole_grad, rtol=1e-15)
    assert cross_entropy(LOGITS, LABELS, engine=engine) == loss


@pytest.mark.parametrize("engine", ["cpu", "numpy"])
@pytest.mark.parametrize("log", [False, True])
def test_softmax_is_composed_where_an_engine_has_none(log, engine):
    x = np.array([[2, 1, 0.1], [0.1, 2, -np.inf]])
    rows = _engines.Rows(np, x[:, :, None], np.dtype("float64"))
    engine = ENGINES[engine]
    composed = _engines.softmax(spy(engine, []), rows, log)
    np.testing.assert_allclose(composed, _engines.softmax(engine, rows, log), rtol=1e-15)
    if not log and engine.name == "cpu":
        np.testing.assert_array_equal(composed[:, :, 0], softmax(x))


def test_the_thread_count_is_checked(monkeypatch):
    monkeypatch.setenv("XENT_ARRAY_NUM_THREADS", "two")
    with pytest.raises(
        ValueError, match="XENT_ARRAY_NUM_THREADS must be a whole number of threads, at least 1; got 'two'"
    ):
        cross_entropy(np.zeros((3000, 100)), np.zeros(3000, dtype=int))


@pytest.mark.parametrize("where", ["no_float64", "CPU_DEVICE"])
def test_rows_are_summed_in_float64_where_the_device_has_it(where):
    logits = xp.zeros((3, 2), dtype=xp.float32, device=xp.Device(where))
    rows = _rows.Rows(xp, xp.reshape(logits, (3, 2, 1)), xp.float32)
    assert _rows.widest(rows) == (xp.float32 if where == "no_float64" else xp.float64)
    labels = xp.zeros(3, dtype=xp.int32, device=xp.Device(where))
    assert cross_entropy(logits, labels).dtype == xp.float32
