"""Machine code that is kept between processes: when it is used again, and when it must not be."""

import ast
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.process import run

from xent_array._engines import cpu

if isinstance(cpu.loops(), str):
    pytest.skip(cpu.loops(), allow_module_level=True)

from numba import config, njit
from numba.core import caching

from xent_array._engines.cpu import compile_cache


def twice(x):
    return 2 * x


@pytest.fixture
def folder(monkeypatch, tmp_path):
    monkeypatch.setattr(config, "CACHE_DIR", str(tmp_path))
    return tmp_path


def anew():
    return compile_cache.kept(njit(twice))


def hits(function):
    return sum(function.stats.cache_hits.values())


def test_kept_code_is_loaded(folder):
    first = anew()
    assert (first(1.5), first(3), hits(first)) == (3, 6, 0)
    assert first.stats.cache_path.startswith(str(folder))
    second = anew()
    assert (second(1.5), second(3), hits(second)) == (3, 6, 2)


def test_code_of_other_sources_is_not(folder, monkeypatch):
    anew()(1.5)
    monkeypatch.setattr(compile_cache, "SOURCES", compile_cache.SOURCES[:1])
    other = anew()
    assert (other(1.5), hits(other)) == (3, 0)


def test_the_sources_are_all_that_the_loops_are_made_of():
    """A module that they come to import of our own must be named, or its changes would go unnoticed."""
    script = """
import sys
from xent_array._engines import cpu
before = set(sys.modules) - {"xent_array._engines.cpu.loops"}
from xent_array._engines.cpu.loops import contiguous, elementwise, strided, transposed
print(*(sys.modules[name].__file__ for name in set(sys.modules) - before if name.startswith("xent_array")))
"""
    found = {Path(file) for file in run(script).split()}
    assert compile_cache.HERE / "compile_cache.py" in found  # Numba's key tells what it does
    found.remove(compile_cache.HERE / "compile_cache.py")
    assert found == {source for source in compile_cache.SOURCES if source.parent.name == "loops"}
    others = set()  # that were there before
    for source in found:
        nodes = ast.walk(ast.parse(source.read_text()))
        others |= {(node.level, node.module) for node in nodes if isinstance(node, ast.ImportFrom) and node.level > 1}
    assert others == {(2, "compile_cache"), (2, "memory"), (4, "_rows")}  # of the last a name for annotations
    assert set(compile_cache.SOURCES) - found == {compile_cache.HERE / "memory.py"}


@pytest.mark.parametrize("suffix", [".nbi", ".nbc"])
@pytest.mark.parametrize("content", [b"", b"\x80\x04nonsense"])
def test_a_file_that_is_cut_off_is_made_anew(folder, suffix, content):
    anew()(1.5)
    (file,) = folder.rglob(f"*{suffix}")
    file.write_bytes(content)
    after = anew()
    assert (after(1.5), hits(after)) == (3, 0)
    healed = anew()
    assert (healed(1.5), hits(healed)) == (3, 1)


def test_code_under_the_name_of_another(folder):
    """Numba's index may be left so by two processes that save at once."""
    first = anew()
    first(1.5), first(3)
    one, two = folder.rglob("*.nbc")
    contents = one.read_bytes(), two.read_bytes()
    one.write_bytes(contents[1])
    two.write_bytes(contents[0])
    second = anew()
    assert (second(1.5), second(3)) == (3, 6)
    assert isinstance(second(3), int)


@pytest.mark.parametrize("what", ["ensure_cache_path", "_open_for_write", "_load_index"])
def test_a_folder_that_fails_later(folder, monkeypatch, what):
    function = anew()

    def fails(*_):
        raise OSError(30, "Read-only file system")

    of = caching._CacheLocator if what == "ensure_cache_path" else caching.IndexDataCacheFile
    monkeypatch.setattr(of, what, fails)
    assert (function(1.5), function(3)) == (3, 6)


def test_no_folder_at_all(folder, monkeypatch):
    monkeypatch.setattr(caching.CacheImpl, "_locator_classes", [])
    function = anew()
    assert (function(1.5), function.stats.cache_path) == (3, None)
    monkeypatch.undo()
    (folder / "file").write_text("")
    monkeypatch.setattr(config, "CACHE_DIR", str(folder / "file"))  # and no folder can be made in it
    monkeypatch.setattr(caching.CacheImpl, "_locator_classes", caching.CacheImpl._locator_classes[:1])
    function = anew()
    assert (function(1.5), function.stats.cache_path) == (3, None)


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="this system has no owners and modes")
@pytest.mark.parametrize(("which", "mode", "used"), [(0, 0o777, False), (1, 0o777, False), (1, 0o1777, True)])
def test_a_folder_that_others_can_write_to_or_replace_is_not_used(folder, which, mode, used):
    kept = Path(anew().stats.cache_path)
    os.chmod([kept, kept.parent][which], mode)
    function = anew()
    assert function(1.5) == 3
    assert (function.stats.cache_path is not None) is used
    assert bool(list(folder.rglob("*.nb?"))) is used


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="this system has no owners and modes")
@pytest.mark.parametrize(("owner", "ours"), [(1, True), (2, True), (3, False)])
def test_a_folder_is_of_this_user_or_of_the_owner_of_the_package(monkeypatch, owner, ours):
    monkeypatch.setattr(compile_cache.os, "geteuid", lambda: 1)
    with monkeypatch.context() as patched:
        of = {compile_cache.__file__: 2, "there": owner, Path("."): 3}
        patched.setattr(compile_cache.os, "stat", lambda path: SimpleNamespace(st_uid=of[path], st_mode=0o40755))
        answer = compile_cache._is_ours("there")
    assert answer is ours


def test_no_locator_of_numba_is_a_shared_folder():
    """Should Numba come to have another, someone must look at where it keeps code."""
    assert {locator.__name__.lstrip("_") for locator in caching.CacheImpl._locator_classes} <= {
        "UserProvidedCacheLocator", "InTreeCacheLocator", "InTreeCacheLocatorFsAgnostic", "UserWideCacheLocator",
        "IPythonCacheLocator", "ZipCacheLocator",
    }  # fmt: skip


FIRST_CALLS = """
import hashlib, threading
import numpy as np
from xent_array import cross_entropy_value_and_grad

x = np.random.default_rng(0).standard_normal((40, 300), np.float32)
labels = np.arange(40)
found = []

def work():
    start.wait()
    with np.errstate(all="raise"):  # the compiler at work does not care
        found.append(cross_entropy_value_and_grad(x, labels))

start = threading.Barrier(2)
both = [threading.Thread(target=work) for _ in range(2)]
for thread in both:
    thread.start()
for thread in both:
    thread.join()
wanted = cross_entropy_value_and_grad(x, labels, engine="numpy")
for loss, grad in found:
    assert abs(loss - wanted[0]) < 1e-5 and np.abs(grad - wanted[1]).max() < 1e-6
assert len(found) == 2
from xent_array._engines.cpu.loops import contiguous
stats = contiguous.rows.stats
print(stats.cache_path, sum(stats.cache_hits.values()), sum(stats.cache_misses.values()))
print(hashlib.sha256(found[0][0].tobytes() + found[1][1].tobytes()).hexdigest())
"""


@pytest.mark.full
def test_a_second_process_loads_what_the_first_compiled(tmp_path):
    """Where two threads make the very first call at once."""
    (told, first), (again, second) = (run(FIRST_CALLS, NUMBA_CACHE_DIR=str(tmp_path)).splitlines() for _ in range(2))
    assert told.startswith(str(tmp_path))
    assert told.endswith(" 0 1")
    assert again.endswith(" 1 0")
    assert second == first
