"""How the package is built: what imports what, how long lists of parameters are, and how short the way to a loop is."""

import ast
import io
import sys
import tokenize
from pathlib import Path

import numpy as np
import pytest

import xent_array
from xent_array import cross_entropy_value_and_grad
from xent_array._engines import cpu

ROOT = Path(xent_array.__file__).parent
MODULES = {}  # by their names in Python
for _file in sorted(ROOT.rglob("*.py")):
    _parts = (ROOT.name, *_file.relative_to(ROOT).with_suffix("").parts)
    MODULES[".".join(_parts[:-1] if _parts[-1] == "__init__" else _parts)] = _file
TREES = {name: ast.parse(file.read_text()) for name, file in MODULES.items()}
OPTIONAL = {"array_api_compat.torch", "cupy", "dask", "jax", "llvmlite", "ml_dtypes", "torch"}
each_module = pytest.mark.parametrize("module", MODULES)


# -- imports -------------------------------------------------------------------------------------------------------


def imports(name):
    """What a module imports: absolute names, and whether that is in a function."""
    package = name if MODULES[name].name == "__init__.py" else name.rpartition(".")[0]

    def walk(node, in_function):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from ((alias.name, in_function) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                base = package.split(".")[: 1 - child.level or None] if child.level else []
                base = ".".join([*base, *filter(None, [child.module])])
                for alias in child.names:
                    inner = f"{base}.{alias.name}"
                    yield (inner if inner in MODULES else base), in_function
            is_function = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            yield from walk(child, in_function or is_function)

    return [*walk(TREES[name], False)]


def needs_an_optional_library(name):
    return any(not late and {found, found.partition(".")[0]} & OPTIONAL for found, late in imports(name))


def test_what_counts_as_optional():
    wanted = {"_engines.cpu.loops.simd", "_engines.cpu.loops.processor", "_bridges._torch", "_bridges._jax", "torch"}
    wanted |= {"_bridges._dask", "_engines.dask"}
    assert {f"{ROOT.name}.{name}" for name in wanted} <= {name for name in MODULES if needs_an_optional_library(name)}
    without = ("_api", "_engines", "_engines.cpu.compiled", "_engines.cpu.machine_code")
    assert not any(needs_an_optional_library(f"{ROOT.name}.{name}") for name in without)


def test_no_circle_of_imports():
    """Nor one that is hidden in a function, unless it is there for a library that may not be installed."""
    edges = {
        name: {
            found
            for found, late in imports(name)
            if found in MODULES and found != name and not (late and needs_an_optional_library(found))
        }
        for name in MODULES
    }
    assert edges[f"{ROOT.name}._engines.cpu"] >= {f"{ROOT.name}._engines.cpu.path", f"{ROOT.name}._rows"}
    left = dict(edges)
    while ends := [name for name, found in left.items() if not found & left.keys()]:
        for name in ends:
            del left[name]
    assert not {name: found & left.keys() for name, found in left.items()}


# -- parameters and names ------------------------------------------------------------------------------------------

WITH_OPTIONS = {"torch", "_bridges._torch_operations"}  # there each option of the user is a parameter
PUBLIC = {(module, name) for module in ("_api", "_linear.functions") for name in (*xent_array.__all__, "__init__")}
OF_KERNELS = {("_engines.cuda", "_sum")}  # the arguments of a kernel, by name


def parameters(function):
    given = function.args
    several = [*given.posonlyargs, *given.args, *given.kwonlyargs, *filter(None, [given.vararg, given.kwarg])]
    return [parameter.arg for parameter in several if parameter.arg not in ("self", "cls")]


@pytest.mark.parametrize(
    "module",
    [name for name in (name.removeprefix(f"{ROOT.name}.") for name in MODULES) if name not in WITH_OPTIONS],
)
def test_few_parameters(module):
    tree = TREES.get(f"{ROOT.name}.{module}", TREES[ROOT.name])
    functions = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.Lambda))]
    long = {getattr(function, "name", "lambda"): len(parameters(function)) for function in functions}
    assert {name: n for name, n in long.items() if n > 8 and (module, name) not in PUBLIC | OF_KERNELS} == {}


GONE = {"spread", "_turned", "_few", "FEW_IN_LARGE", "BESIDE", "converts", "_is_plain"}


@pytest.mark.parametrize("module", MODULES)
def test_old_names_are_gone(module):
    """In the CPU engine as names of anything, elsewhere as names that other code may use."""
    tree = TREES[module]
    if f"{module}.".startswith(f"{cpu.__name__}."):
        tokens = tokenize.generate_tokens(io.StringIO(MODULES[module].read_text()).readline)
        names = {token.string for token in tokens if token.type == tokenize.NAME}
    else:
        scopes = [tree, *(node for node in ast.walk(tree) if isinstance(node, ast.ClassDef))]
        names = {getattr(node, "name", None) for scope in scopes for node in scope.body}
        assigned = [node for scope in scopes for node in scope.body if isinstance(node, (ast.Assign, ast.AnnAssign))]
        names |= {found.id for node in assigned for found in ast.walk(node) if isinstance(found, ast.Name)}
    assert not names & GONE


# -- the way to a loop ---------------------------------------------------------------------------------------------


def run_of_files(frame):
    """The files of the package that the frames below this one are in, from the outermost; each run of one file once."""
    files = []
    while frame is not None:
        file = Path(frame.f_code.co_filename)
        if file.is_relative_to(ROOT) and files[-1:] != [file]:
            files.append(file)
        frame = frame.f_back
    return files[::-1]


@pytest.mark.skipif(isinstance(cpu.found_loops(), str), reason="llvmlite is not installed")
@pytest.mark.parametrize("shape", [(32, 10), (32, 300), (5000, 300)], ids=str)
def test_a_call_is_soon_in_a_loop(monkeypatch, shape):
    from support.problems import Spy

    from xent_array._engines.cpu.loops import contiguous, transposed

    monkeypatch.setenv("XENT_ARRAY_NUM_THREADS", "1")
    logits, labels = np.zeros(shape, np.float32), np.zeros(shape[0], int)
    for loop in (contiguous, transposed):
        Spy(monkeypatch, loop)
    found = []

    def profile(frame, event, _):
        if event == "call" and frame.f_code is Spy.call.__code__:
            found.append(run_of_files(frame))

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        cross_entropy_value_and_grad(logits, labels)
    finally:
        sys.setprofile(before)
    assert found
    for files in found:
        assert files[0] == ROOT / "_api.py"
        assert files[-1] == ROOT / "_engines" / "cpu" / "compiled.py"
        if shape[0] < 5000:  # else there are the threads between
            assert len(files) <= 5
            assert len(set(files)) == len(files)
