"""The contract of the engines: which one takes what, why others do not, and what an engine from outside can do."""

from contextlib import contextmanager
from types import SimpleNamespace

import array_api_strict as xp
import numpy as np
import pytest

from xent_array import CrossEntropyLoss, _engines, _rows, cross_entropy, cross_entropy_value_and_grad, softmax
from xent_array._engines import ENGINES

LOGITS = np.array([[2, 1, 0.1], [0.1, 2, 1.9]])
LABELS = np.array([1, 0])


def spy(engine, calls, *more):
    """An engine that notes what it is asked for, with only what the contract demands, and what else is named."""

    def noted(function):
        def wrapper(*arguments):
            calls.append(function.__name__)
            return function(*arguments)

        return wrapper

    names = ("declines", "reads_labels_free", "stats", "grad", *more)
    return SimpleNamespace(name="spy", **{name: noted(getattr(engine, name)) for name in names})


def test_table_is_named_by_its_engines():
    assert {name: engine.name for name, engine in ENGINES.items()} == {name: name for name in ENGINES}


def test_arrays_go_to_the_first_engine_that_takes_them_or_their_memory(backend, monkeypatch):
    calls = {name: [] for name in ENGINES}
    for name, engine in list(ENGINES.items()):
        more = (
            ["loss"] if name == backend.name == "dask" else []
        )  # whose arrays only the engine itself can put together
        monkeypatch.setitem(ENGINES, name, spy(engine, calls[name], *more))
    cross_entropy(backend.array(LOGITS), backend.array(LABELS))
    wanted = "cpu" if backend.is_numpy else backend.engines[0]
    assert [name for name in ENGINES if {"stats", "loss"} & {*calls[name]}] == [wanted]


def test_lent_memory_goes_to_an_engine_that_borrows(monkeypatch):
    """Not to one of a user's that comes first and takes NumPy arrays, but does not say that it borrows."""
    torch = pytest.importorskip("torch")
    first = SimpleNamespace(name="first", kinds=frozenset({np.ndarray}), declines=lambda rows: None)
    monkeypatch.setattr(_engines, "ENGINES", {"first": first, **ENGINES})
    wanted = pytest.approx(2.0185083947418834, rel=1e-15)
    for options in ({}, {"sample_weight": torch.ones(2)}):
        assert float(cross_entropy(torch.tensor(LOGITS), torch.tensor(LABELS), **options)) == wanted
    first.at_once = lambda *_: ("asked", None)
    assert cross_entropy(np.array(LOGITS), np.array(LABELS)) == "asked"


def test_a_forced_engine_that_declines_says_why(backend):
    engine = "cuda" if backend.is_numpy or "cpu" in backend.engines else "cpu"
    takes = {"cpu": "NumPy", "cuda": "CuPy"}[engine]
    with pytest.raises(ValueError, match=rf"'{engine}' cannot take these arrays: it takes {takes} arrays"):
        cross_entropy(backend.array(LOGITS), backend.array(LABELS), engine=engine)
    if backend.name == "dask":
        return
    assert float(cross_entropy(backend.array(LOGITS), backend.array(LABELS), engine="generic")) == pytest.approx(
        2.0185083947418834, rel=1e-15
    )


def test_an_unknown_engine_names_the_known_ones():
    for make in (lambda engine: cross_entropy(LOGITS, LABELS, engine=engine), lambda e: CrossEntropyLoss(engine=e)):
        with pytest.raises(ValueError, match=r"None or one of 'cpu', 'numpy', 'cuda', 'dask', 'generic'; got 'gpu'"):
            make("gpu")
        with pytest.raises(
            TypeError,
            match=r"None or one of 'cpu', 'numpy', 'cuda', 'dask', 'generic', or an object like those; got int",
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


# -- what is asked at once -----------------------------------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch):
    """What the engine of compiled loops was asked at once so far; it answers nothing."""
    calls = []
    monkeypatch.setattr(ENGINES["cpu"], "at_once", lambda *given: calls.append(given))
    return calls


@contextmanager
def placed_first(engine):
    """An engine of a user, before all others."""
    rest = dict(ENGINES)
    ENGINES.clear()
    ENGINES.update({"first": engine} | rest)
    try:
        yield
    finally:
        ENGINES.clear()
        ENGINES.update(rest)


def test_what_is_asked_at_once(asked):
    """Every call with all that it says, of the first engine for such arrays, or of the one that is named."""
    x, labels = np.zeros((4, 3)), np.zeros(4, int)
    out = np.zeros_like(x)
    for options in ({}, {"axis": 1}, {"weight": np.ones(3)}, {"sample_weight": np.ones(4)}, {"ignore_index": 0},
                    {"label_smoothing": 0.1}, {"z_loss": 0.1}, {"softcap": 1.0}, {"validate": True}, {"denominator": 2},
                    {"reduction": "none"}, {"engine": "cpu"}, {"engine": ENGINES["cpu"]}):  # fmt: skip
        loss = cross_entropy(x, labels, **options)
        assert [given[3:] for given in asked] == [(False, None)]
        asked.clear()
        np.testing.assert_array_equal(cross_entropy_value_and_grad(x, labels, **options, out=out)[0], loss)
        ((logits, target, told, wants_grad, into),) = asked
        assert logits is x
        assert target is labels
        assert into is out
        assert wants_grad
        for option, value in _rows.Asked(**options)._asdict().items():
            given = getattr(_rows.Asked(*told), option)
            assert given is value or given == value
        asked.clear()
    for engine in ("numpy", "generic"):
        cross_entropy(x, labels, engine=engine)
    cross_entropy_value_and_grad(x, labels, return_stats=True)
    cross_entropy(xp.asarray(x), xp.asarray(labels))
    assert not asked


@pytest.mark.parametrize("kinds", [frozenset({SimpleNamespace}), frozenset()])
@pytest.mark.parametrize("has_own", [False, True])
def test_an_engine_for_other_arrays_leaves_calls_to_the_next(asked, kinds, has_own):
    """Whatever it could answer, and however early it comes."""
    first = spy(ENGINES["generic"], calls := [])
    first.kinds = kinds
    if has_own:
        first.at_once = lambda *_: calls.append("at_once")
    first.declines = lambda rows: "takes no arrays of anybody"
    with placed_first(first):
        cross_entropy(LOGITS, LABELS)
    assert len(asked) == 1
    assert not calls


@pytest.mark.parametrize("has_own", [False, True])
def test_an_engine_that_names_no_kinds_is_asked_first(asked, has_own):
    """It may take anything, so nothing is answered before it has been asked."""
    first = spy(ENGINES["generic"], calls := [])
    if has_own:
        first.at_once = lambda *_: calls.append("at_once")
    with placed_first(first):
        loss, _ = cross_entropy_value_and_grad(LOGITS, LABELS)
    assert calls == ["at_once"] * has_own + ["declines", "reads_labels_free", "stats", "grad"]
    assert loss == pytest.approx(2.0185083947418834, rel=1e-15)
    assert not asked


def test_what_cannot_be_answered_is_refused_by_the_checks():
    x, labels = np.zeros((4, 3)), np.zeros(4, int)
    for logits, target, error in [
        (np.zeros(()), np.zeros((), int), ValueError), (np.zeros((2, 0)), np.zeros(2, int), ValueError),
        (x, labels[:3], ValueError), (x.astype(complex), labels, TypeError), (x, labels + 0.5, TypeError),
        (np.ma.array(x), labels, TypeError),
    ]:  # fmt: skip
        with pytest.raises(error):
            cross_entropy(logits, target)
    with pytest.raises(ValueError, match="reduction"):
        cross_entropy(x, labels, reduction="average")


# -- softmax, and sums ---------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("where", ["no_float64", "CPU_DEVICE"])
def test_rows_are_summed_in_float64_where_the_device_has_it(where):
    logits = xp.zeros((3, 2), dtype=xp.float32, device=xp.Device(where))
    rows = _rows.Rows(xp, xp.reshape(logits, (3, 2, 1)), xp.float32)
    assert _rows.widest(rows) == (xp.float32 if where == "no_float64" else xp.float64)
    labels = xp.zeros(3, dtype=xp.int32, device=xp.Device(where))
    assert cross_entropy(logits, labels).dtype == xp.float32
