"""Machine code that is kept between processes: when it is used again, and when it must not be."""

import ast
import os
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
from support.process import run
from support.sizes import forget

from xent_array._engines import cpu

if isinstance(cpu.found_loops(), str):
    pytest.skip(cpu.found_loops(), allow_module_level=True)

from xent_array._engines.cpu import machine_code, threads
from xent_array._engines.cpu.loops import build

NUMBERS = np.arange(5.0)


@pytest.fixture
def folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XENT_ARRAY_CACHE_DIR", str(tmp_path))
    forget(monkeypatch)
    return tmp_path


@pytest.fixture
def compiled(monkeypatch):
    """The names of what has been compiled in this test; all is looked for anew."""
    names, make = [], build.build

    def watched(*name):
        names.append(name)
        return make(*name)

    monkeypatch.setattr(build, "build", watched)
    return names


@pytest.fixture
def total(monkeypatch, compiled):
    """A sum in float64, by code that is looked for each time."""

    def total(numbers=NUMBERS):
        monkeypatch.setattr(machine_code, "_functions", {})
        return machine_code.function("total", numbers.dtype.name)((numbers,))

    return total


def test_kept_code_is_loaded(folder, total, compiled):
    assert (total(), total(NUMBERS.astype(np.float32))) == (10, 10)
    assert compiled == [("total", "float64"), ("total", "float32")]
    assert (total(), total(NUMBERS.astype(np.float32))) == (10, 10)
    assert len(compiled) == len([*folder.rglob("*.code")]) == 2
    function = machine_code.function("total", "float64")
    assert machine_code.function("total", "float64") is function


def test_code_of_other_sources_is_not(folder, monkeypatch, total, compiled):
    total()
    (before,) = folder.rglob("*.code")
    with monkeypatch.context() as patched:
        patched.setattr(machine_code, "SOURCES", machine_code.SOURCES[:1])
        forget(patched)
        assert (total(), len(compiled)) == (10, 2)
    (after,) = folder.rglob("*.code")  # and what can no longer be used is gone
    assert after != before


@pytest.mark.parametrize("what", ["llvmlite", "processor"])
def test_code_made_in_another_way_is_not(folder, monkeypatch, total, compiled, what):
    """By another LLVM, or on another processor."""
    import llvmlite
    from llvmlite import binding

    total()
    if what == "llvmlite":
        monkeypatch.setattr(llvmlite, "__version__", "another")
    else:
        monkeypatch.setattr(binding, "get_host_cpu_name", lambda: "generic")
    forget(monkeypatch)
    assert (total(), len(compiled)) == (10, 2)
    assert len([*folder.rglob("*.code")]) == 2


def test_the_sources_are_all_that_the_loops_are_made_of():
    """A module that they come to import of our own must be named, or its changes would go unnoticed."""
    script = """
import sys
from xent_array._engines import cpu
before = set(sys.modules) - {name for name in sys.modules if name.startswith("xent_array._engines.cpu.loops")}
from xent_array._engines.cpu.loops import build
print(*(sys.modules[name].__file__ for name in set(sys.modules) - before if name.startswith("xent_array")))
"""
    found = {Path(file) for file in run(script).split()}
    assert found == {source for source in machine_code.SOURCES if source.parent.name == "loops"}
    others = set()  # that were there before
    for source in found:
        nodes = ast.walk(ast.parse(source.read_text()))
        others |= {(node.level, node.module) for node in nodes if isinstance(node, ast.ImportFrom) and node.level > 1}
    assert others == {(2, "memory"), (4, "_rows")}  # of the last a name for annotations
    assert set(machine_code.SOURCES) - found == {machine_code.HERE / "memory.py"}


@pytest.mark.parametrize("damage", [lambda _: b"", lambda code: code[:-1], lambda code: code[:40] + b"!" + code[41:]])
def test_a_file_that_is_damaged_is_made_anew(folder, total, compiled, damage):
    total()
    (file,) = folder.rglob("*.code")
    content = file.read_bytes()
    file.write_bytes(damage(content))
    assert (total(), len(compiled)) == (10, 2)
    assert (total(), len(compiled)) == (10, 2)
    assert file.read_bytes() != damage(content)


@pytest.mark.parametrize("what", ["mkdir", "replace", "_write", "_read", "_remove_older"])
def test_a_folder_that_fails(folder, monkeypatch, total, compiled, what):
    def fails(*_, **__):
        raise OSError(30, "Read-only file system")

    with monkeypatch.context() as patched:
        patched.setattr(machine_code if what[0] == "_" else Path, what, fails)
        assert (total(), len(compiled)) == (10, 1)
    assert len([path for path in folder.rglob("*") if path.is_file()]) == (what in ("_read", "_remove_older"))


def test_the_first_folder_that_can_be_written_to(folder, monkeypatch, total, compiled):
    """And any that can be read: another user may have installed and used the package."""
    (folder / "file").write_text("")
    folders = [folder / "file", folder / "here", folder / "there"]
    monkeypatch.setattr(machine_code, "_folders", lambda: iter(folders))
    total()
    assert [path.parent.name for path in folder.rglob("*.code")] == ["here"]
    folders.insert(0, folder / "before")
    assert (total(), len(compiled)) == (10, 1)
    del folders[1:]
    assert (total(), len(compiled)) == (10, 2)


def test_where_code_is_kept(monkeypatch):
    monkeypatch.delenv("XENT_ARRAY_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "somewhere")
    monkeypatch.setattr(machine_code.sys, "platform", "linux")
    beside, of_user = machine_code._folders()
    assert beside == machine_code.HERE / "__pycache__"
    assert of_user.parent == Path("somewhere")
    monkeypatch.setenv("XENT_ARRAY_CACHE_DIR", "there")
    (found,) = machine_code._folders()
    assert found == Path("there", of_user.name)  # by which installations are told apart


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="this system has no owners and modes")
@pytest.mark.parametrize(("which", "mode", "used"), [(0, 0o777, False), (1, 0o777, False), (1, 0o1777, True)])
def test_a_folder_that_others_can_write_to_or_replace_is_not_used(folder, total, compiled, which, mode, used):
    total()
    (file,) = folder.rglob("*.code")
    os.chmod([file.parent, file.parent.parent][which], mode)
    assert (total(), len(compiled)) == (10, 1 if used else 2)
    file.unlink()
    assert (total(), len(compiled)) == (10, 2 if used else 3)
    assert file.exists() is used


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="this system has no owners and modes")
@pytest.mark.parametrize(
    ("owner", "group", "mode", "ours"),
    [
        (1, 1, 0o40755, True), (2, 2, 0o40755, True), (3, 3, 0o40755, False), (1, 1, 0o40775, True),
        (1, 5, 0o40775, False), (1, 5, 0o40755, True), (1, 1, 0o40757, False), (1, 1, 0o120755, False),
    ],
)  # fmt: skip
def test_what_is_only_of_this_user_or_of_the_owner_of_the_package(monkeypatch, owner, group, mode, ours):
    """A group may write if it is the user's own, and a link may lead anywhere."""
    monkeypatch.setattr(machine_code.os, "geteuid", lambda: 1)
    with monkeypatch.context() as patched:
        patched.setattr(machine_code.os, "stat", lambda _: SimpleNamespace(st_uid=2))
        answer = machine_code._is_only_ours(SimpleNamespace(st_uid=owner, st_gid=group, st_mode=mode))
    assert answer is ours


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="this system has no owners and modes")
@pytest.mark.parametrize("how", ["writable", "linked", "its folder linked"])
def test_a_file_that_others_may_have_written_is_not_loaded(folder, total, compiled, how):
    total()
    (file,) = folder.rglob("*.code")
    if how == "writable":
        file.chmod(0o666)
    else:
        moved = file if how == "linked" else file.parent
        elsewhere = folder.parent / f"{folder.name} elsewhere"
        moved.rename(elsewhere)
        moved.symlink_to(elsewhere)
    assert (total(), len(compiled)) == (10, 2)


def test_a_lack_of_memory_passes(folder, monkeypatch, total):
    with monkeypatch.context() as patched:
        patched.setattr(build, "build", mock.Mock(side_effect=MemoryError))
        with pytest.raises(threads.Busy):
            total()
    assert total() == 10


def test_code_that_has_no_entry_is_not_called(folder, monkeypatch, total):
    total()
    monkeypatch.setattr(build, "NAME", "another")
    monkeypatch.setattr(machine_code, "_stored", lambda _: None)
    with pytest.raises(threads.CannotCompile, match="no entry"):
        total()


def test_arrays_are_found_in_a_tuple(monkeypatch):
    """Of any number of axes, as far apart as they may be; and nothing is called where they lie in another way."""
    total = machine_code.function("total", "float64")
    for numbers in (NUMBERS, NUMBERS.reshape(5, 1, 1), np.array(3.0), np.empty(0), np.empty((0, 4)), NUMBERS[1:]):
        assert total((numbers,)) == numbers.sum()
    assert machine_code.missing() is None
    with monkeypatch.context() as patched:
        patched.setattr(machine_code.sys.implementation, "name", "another")
        assert "keeps arrays in another way" in machine_code.missing()
    with monkeypatch.context() as patched:
        axes = SimpleNamespace(from_address=lambda _: SimpleNamespace(value=7))
        patched.setattr(machine_code.ctypes, "c_int", axes)
        assert "keeps arrays in another way" in machine_code.missing()


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
import sys
print("xent_array._engines.cpu.loops.build" in sys.modules)
print(hashlib.sha256(found[0][0].tobytes() + found[1][1].tobytes()).hexdigest())
"""


@pytest.mark.full
def test_a_second_process_loads_what_the_first_compiled(tmp_path):
    """Where two threads make the very first call at once."""
    (told, first), (again, second) = (
        run(FIRST_CALLS, XENT_ARRAY_CACHE_DIR=str(tmp_path)).splitlines() for _ in range(2)
    )
    assert (told, again) == ("True", "False")
    assert len([*tmp_path.rglob("*.code")]) == 1
    assert second == first
