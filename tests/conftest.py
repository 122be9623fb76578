"""Backends: each array library behind the few words the tests use; always listed, skipped only in sight.

A test marked `full` runs with `pytest --full` only; of one marked `full(but_one_per="dtype")` every run has one case
for each value of that parameter. What a run leaves out is counted at its end.
"""

import functools
import importlib
import importlib.util
import sys
import warnings
from collections import Counter

import hypothesis
import ml_dtypes
import numpy as np
import pytest
from support import tally

BACKENDS = ("numpy", "numpy-readonly", "array-api-strict", "torch", "jax", "cupy", "emulated", "dask")

LEFT_OUT = pytest.StashKey[int]()

# Few dtypes keep the tests fast: JAX compiles each operation anew for each, and the emulation each kernel, which
# test_kernels.py runs in the others too. With --full all but JAX have all.
USUAL_DTYPES = {
    "jax": ("float32",),
    "emulated": ("float32",),
    "array-api-strict": ("float32",),
    "numpy-readonly": ("float32",),
    "dask": ("float32",),
}

# Likewise of what JAX would compile operation by operation; in what it traces test_jax.py has the plain composition.
USUAL_ENGINES = {"jax": ("cpu",)}

hypothesis.settings.register_profile("default", max_examples=60, deadline=None, derandomize=False)
hypothesis.settings.register_profile("long", max_examples=100_000, deadline=None, derandomize=False)
hypothesis.settings.load_profile("default")  # by name, because hypothesis has a profile of its own for CI


class Backend:
    """One array library. Where it cannot be used, making one raises ImportError with the reason."""

    def __init__(self, name):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what a library says at import is not ours
            self.xp = _namespace(name)
        self.name = name
        self.is_numpy = name.startswith("numpy") or name == "emulated"
        self.dtypes = ("float16", "bfloat16", "float32", "float64")
        if name == "array-api-strict":
            self.dtypes = self.dtypes[2:]
        self.usual_dtypes = USUAL_DTYPES.get(name, self.dtypes)
        self.engines = ("cpu", "numpy", "generic") if name.startswith("numpy") else ("generic",)
        if name in ("torch", "jax"):
            self.engines = USUAL_ENGINES.get(name, ("cpu", "generic"))
        if name == "cupy":
            self.engines = ("cuda", "generic")
        if name == "emulated":  # the CUDA engine on NumPy arrays
            from support import emulated
            from support.simt.build import available

            if available() is not None:
                raise ImportError(f"the emulation {available()}")
            self.engines = (emulated.engine(jobs=("LOSS_AND_GRAD", "LOSS", "STATS", "GRAD")),)
        if name == "dask":
            self.engines = ("dask",)
        self.has_out = name not in ("jax", "dask")  # whose arrays cannot be written
        self.looks_at_labels = name not in ("cupy", "emulated")  # unasked: on a GPU that would wait for it
        self._types = (type(self.xp.asarray(0.0)), np.generic if self.is_numpy else ())

    def supports(self, dtype):
        """Whether the library has this dtype, given by its NumPy name."""
        return dtype in self.dtypes if "float" in dtype else hasattr(self.xp, dtype)

    def array(self, values, dtype=None):
        """A new array of the library with these values, in `dtype` (a NumPy name) or their own."""
        values = np.array(values, order="C")
        if dtype is not None:
            values = values.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
        if self.name == "torch" and values.dtype == ml_dtypes.bfloat16:
            return self.xp.asarray(values.astype(np.float32), dtype=self.xp.bfloat16)
        if self.name == "numpy-readonly":
            values.flags.writeable = False
        if self.name == "dask":  # in two chunks along each axis
            return self.xp.asarray(values, chunks=tuple(max(1, -(-length // 2)) for length in values.shape))
        return self.xp.asarray(values)

    def numpy(self, x):
        """The NumPy array of a result, which must be an array of this library."""
        assert isinstance(x, self._types), f"{type(x)} is no array of {self.name}"
        if self.name == "torch":
            x = x.detach().cpu()
            return x.float().numpy().astype(ml_dtypes.bfloat16) if x.dtype == self.xp.bfloat16 else x.numpy()
        if self.name == "dask":
            return x.compute(scheduler="synchronous")
        return x.get() if self.name == "cupy" else np.asarray(x)


def _namespace(name):
    if name == "array-api-strict":
        import array_api_strict as xp
    elif name == "torch":
        import array_api_compat.torch as xp
        import torch

        torch.set_num_threads(1)  # these arrays are small, and threads that spin on a busy machine cost seconds
    elif name == "jax":
        import jax
        import jax.numpy as xp

        jax.config.update("jax_enable_x64", True)
    elif name == "dask":
        import array_api_compat.dask.array as xp
    elif name == "cupy":
        import cupy

        if not cupy.is_available():
            raise ImportError("cupy.is_available() is false: no CUDA device that works")
        import array_api_compat.cupy as xp
    else:
        import array_api_compat.numpy as xp
    return xp


@functools.cache
def _backend(name):
    """The backend, or the reason why it is absent."""
    try:
        return Backend(name)
    except ImportError as e:
        return str(e)


@pytest.fixture(params=BACKENDS, scope="session")
def backend(request):
    found = _backend(request.param)
    if isinstance(found, str):
        pytest.skip(found)
    return found


@pytest.fixture(scope="session")
def cupy():
    """CuPy on a GPU that works, for tests of that alone."""
    found = _backend("cupy")
    if isinstance(found, str):
        pytest.skip(found)
    import cupy

    return cupy


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="every test; without it those that take long are left out")
    parser.addoption(
        "--require",
        action="append",
        default=[],
        metavar="NAME",
        help=f"fail, at once, where this backend ({', '.join(BACKENDS)}) or module cannot be used (repeatable), "
        "and where a test of this backend would be skipped",
    )


@pytest.fixture(autouse=True)
def _loops_are_compiled():
    """A loop that cannot be compiled is replaced by NumPy, and every result would still be right."""
    yield
    cpu = sys.modules.get("xent_array._engines.cpu")
    reason = getattr(cpu, "_found", None)
    if isinstance(reason, str) and importlib.util.find_spec("llvmlite") is not None:
        pytest.fail(reason)


def pytest_configure(config):
    if config.getoption("--full"):
        USUAL_ENGINES.clear()
        for name in set(USUAL_DTYPES) - {"jax"}:
            del USUAL_DTYPES[name]
    for name in config.getoption("--require"):
        if (reason := _absent(name)) is not None:
            raise pytest.UsageError(f"--require {name}: {reason}")


def _absent(name):
    """Why a backend, or another module that tests need, cannot be used; None if it can."""
    if name in BACKENDS:
        found = _backend(name)
        return found if isinstance(found, str) else None
    try:
        importlib.import_module(name)
    except ImportError as e:
        return str(e)
    return None


@pytest.hookimpl(trylast=True)  # of what -k and -m have chosen
def pytest_collection_modifyitems(config, items):
    left_out, groups = set(), {}
    for item in items if not config.getoption("--full") else ():
        if not (markers := list(item.iter_markers("full"))):
            continue
        left_out.add(item)
        if all(marker.kwargs for marker in markers):  # none of a parameter of its own
            value = item.callspec.params[markers[0].kwargs["but_one_per"]]
            groups.setdefault((item.function, str(value)), []).append(item)
    for number, cases in enumerate(groups.values()):
        left_out.remove(cases[number % len(cases)])  # so that the other parameters vary too
    config.stash[LEFT_OUT] = len(left_out)
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    callspec = getattr(item, "callspec", None)
    report.backend = callspec.params.get("backend") if callspec else None
    xfailed = hasattr(report, "wasxfail")
    if report.skipped and not xfailed and report.backend in item.config.getoption("--require"):
        report.outcome = "failed"
        report.longrepr = f"--require {report.backend}: {_reason(report)}"
    return report


def _reason(report):
    return report.longrepr[2].removeprefix("Skipped: ")


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):  # of pytest-xdist: what this process has to tell
        session.config.workeroutput["left out"] = session.config.stash.get(LEFT_OUT, 0)
        session.config.workeroutput["tally"] = tally.told()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    if hasattr(node, "workeroutput"):  # which a process that died has not
        node.config.stash[LEFT_OUT] = node.workeroutput["left out"]
        tally.add(*node.workeroutput["tally"])


@pytest.hookimpl(wrapper=True, tryfirst=True)  # around the list of failures and skips
def pytest_terminal_summary(terminalreporter, config):
    result = yield
    terminalreporter.section("backends")
    for name in BACKENDS:
        reports = {
            kind: [r for r in terminalreporter.getreports(kind) if getattr(r, "backend", None) == name]
            for kind in ("passed", "failed", "error", "skipped")
        }
        failed = len(reports["failed"]) + len(reports["error"])
        line = f"{name}: {len(reports['passed'])} passed, {failed} failed, {len(reports['skipped'])} skipped"
        reasons = Counter(map(_reason, reports["skipped"]))
        terminalreporter.write_line("; ".join([line, *(f"{n} × {reason}" for reason, n in reasons.items())]))
    if lines := tally.lines():
        terminalreporter.section("CUDA kernels")
        for line in lines:
            terminalreporter.write_line(line)
    if left_out := config.stash.get(LEFT_OUT, 0):
        terminalreporter.section("left out")
        terminalreporter.write_line(f"tests that take long: {left_out}; pytest --full runs them too")
    return result
