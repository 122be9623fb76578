"""`python -m bench compare`: which way its ratios go, that it finds other bits and wrong results, what it leaves."""

import itertools
import json
import os
import subprocess
import tempfile
from pathlib import Path
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest

pytest.importorskip("tqdm")  # for bench.run
from bench import compare, run, timing
from bench.suite import COLD, GRAD, IN_PLACE, LOSS, OUT, WARM
from xent_array._engines import cpu

FIELDS = {
    *("case", "operation", "group", "shape", "axis", "dtype", "target", "option", "threads", "rounds", "processes"),
    *(
        "before",
        "after",
        "ratio",
        "q1",
        "q3",
        "ratio_of_minima",
        "same_bits",
        "machine",
        "versions",
        "commit",
        "dirty",
        "seed",
    ),
    *("command", "date"),
}
SIDE = {"tree", "commit", "dirty", "failed", "digest", "loss_units", "grad_units", "seconds", "min", "runs"}
TINY = "sizes 32x10 float32 labels"
CASE = "quick 64x100 float32 labels"

# A library with the two functions that the benchmark calls, and nothing else of this one's. It prints whatever it does.
LIBRARY = """
import os
import numpy as np

os.write(1, b"a stray line\\n")

def cross_entropy_value_and_grad(x, y, *, axis=-1, engine=None, out=None):
    print("[1]")
    wide = x.astype(np.float64)
    wide -= wide.max(1, keepdims=True)
    p = np.exp(wide)
    total = p.sum(1, keepdims=True)
    rows = np.arange(len(y))
    loss = np.float32((np.log(total[:, 0]) - wide[rows, y]).mean())
    p /= total
    p[rows, y] -= 1
    grad = (p / len(y)).astype(x.dtype)
    PLANTED
    if out is not None:
        out[...] = grad
        grad = out
    return loss, grad

def cross_entropy(x, y, **options):
    return cross_entropy_value_and_grad(x, y, **options)[0]
"""
OTHER_BIT = "grad[0, 0] = np.nextafter(grad[0, 0], np.float32(1))"
WRONG_LOSS = "loss = loss * np.float32(1.01)"


def _tree(folder, planted="", library=LIBRARY):
    (folder / "xent_array").mkdir(parents=True)
    (folder / "xent_array" / "__init__.py").write_text(library.replace("PLANTED", planted))
    return folder


@pytest.fixture
def compared(monkeypatch, tmp_path, capfd):
    """The exit code of `main`, the rows that it wrote, and what it printed; nothing may be left behind."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    monkeypatch.setattr(run, "limit_threads", lambda threads: None)

    def call(*arguments):
        file = tmp_path / "rows.jsonl"
        try:
            code = compare.main([*map(str, arguments), "--out", str(file)])
        finally:
            assert list(temporary.iterdir()) == []
        return code, [json.loads(line) for line in file.read_text().splitlines()], capfd.readouterr().out

    return call


@pytest.fixture
def scripted(monkeypatch):
    """Stands in for the processes: by name of a tree, what each of its turns took; logs what is asked of whom."""
    script = SimpleNamespace(turns={}, operations=(GRAD,), log=[], trees=[], digest=lambda worker: "abc")

    class Worker:
        def __init__(self, tree, cache=None):
            self.name, self.cache = tree.name, cache
            self.number = sum(other.name == tree.name for other in script.trees)
            script.trees.append(tree)

        def ask(self, name, *arguments):
            script.log.append((self.name, name, self.cache if name == "first" else self.number, *arguments))
            if name == "begin":
                told = {"failed": None, "digest": script.digest(self), "loss_units": 0.5, "grad_units": 1.0}
                return {operation: dict(told) for operation in script.operations}
            return next(script.turns[self.name])

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(compare, "Worker", Worker)
    return script


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository of three revisions in place of this one: nothing of the library, then it, then it with a change."""
    root = tmp_path / "repository"
    root.mkdir()
    monkeypatch.setattr(run, "ROOT", root)

    def git(*arguments):
        name = ("-c", "user.name=somebody", "-c", "user.email=some@body", "-c", "commit.gpgsign=false")
        done = subprocess.run(["git", *name, *arguments], cwd=root, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    git("init", "-q")
    git("commit", "-q", "--allow-empty", "-m", "nothing")
    _tree(root)
    for planted in ("first", "second"):
        (root / "xent_array" / "__init__.py").write_text(planted)
        git("add", ".")
        git("commit", "-q", "-m", planted)
    return SimpleNamespace(root=root, git=git)


# Ratios


def test_a_ratio_is_that_of_after_to_before(scripted, compared, tmp_path):
    """Of the medians of a round; their median, their quartiles, and apart from these the ratio of the minima."""
    before, after = _tree(tmp_path / "old"), _tree(tmp_path / "new")
    scripted.turns = {
        str(before): iter([[1.0, 1.0, 9.0], [2.0], [4.0]]),
        str(after): iter([[2.0, 2.0, 3.0], [8.0], [4.0]]),
    }
    code, (row,), printed = compared(before, after, "--cases", f"^{TINY}$", "--rounds", 3)
    assert code == 0
    assert (row["ratio"], row["q1"], row["q3"]) == (2, 1.5, 3)
    assert row["ratio_of_minima"] == 2
    assert row["rounds"] == 3
    assert (row["before"]["seconds"], row["before"]["min"], row["before"]["runs"]) == (2, 1, 5)
    assert (row["after"]["seconds"], row["after"]["min"], row["after"]["runs"]) == (3, 2, 5)
    (line,) = (line for line in printed.splitlines() if line.startswith(TINY))
    assert line[len(TINY) :].removeprefix(f" {GRAD}").split() == [
        "2000",
        "3000",
        "2.000",
        "1.500-3.000",
        "2.000",
        "same",
    ]
    assert f"slower by more than 3 %: 1 of 1: {TINY}, {GRAD}\n" in printed


def test_only_what_is_slower_by_more_is_named(scripted, compared, tmp_path):
    before, after = _tree(tmp_path / "old"), _tree(tmp_path / "new")
    for factor, slower, named in (
        (1.02, 3, False),
        (1.04, 3, True),
        (1.04, 5, False),
        (1.02, 1, True),
        (0.5, 3, False),
    ):
        scripted.turns = {
            str(before): itertools.repeat([1.0]),
            str(after): itertools.repeat([0.5, factor, factor]),  # by the median: the minima do not count
        }
        arguments = () if slower == compare.SLOWER else ("--slower", slower)
        _, _, printed = compared(before, after, "--cases", f"^{TINY}$", *arguments)
        names = f"1 of 1: {TINY}, {GRAD}" if named else "0 of 1"
        assert f"\nslower by more than {slower} %: {names}\n" in printed


def test_the_two_turns_of_a_round_follow_one_another(scripted, compared, tmp_path):
    """Both of the same pair of processes and on the same core; in random order, as the operations are, by the seed."""
    cores = sorted(os.sched_getaffinity(0))
    before, after = _tree(tmp_path / "old"), _tree(tmp_path / "new")
    orders = []
    for seed in (0, 0, 1):
        scripted.turns = {str(tree): itertools.repeat([1.0]) for tree in (before, after)}
        scripted.operations = (LOSS, GRAD, OUT)
        scripted.log.clear()
        scripted.trees.clear()
        pace = ("--rounds", 8, "--processes", 2, "--turn", 0.25, "--seed", seed, "--threads", 1)
        _, rows, _ = compared(before, after, "--cases", f"^{TINY}$", *pace)
        assert all((row["rounds"], row["processes"]) == (8, 2) for row in rows)
        begun, turns = scripted.log[:4], scripted.log[4:]
        wanted = [(str(tree), "begin", number, seed, 1) for tree in (before, after) for number in range(2)]
        assert [entry[:3] + entry[4:] for entry in begun] == wanted
        assert all(entry[1] == "turn" and entry[4] == 0.25 for entry in turns)
        pairs = list(zip(turns[::2], turns[1::2], strict=True))
        assert len(pairs) == 8 * 3
        assert all({one[0], other[0]} == {str(before), str(after)} and one[2:] == other[2:] for one, other in pairs)
        assert [one[2] for one, _ in pairs] == [number % 2 for number in range(8) for _ in range(3)]
        assert [one[5] for one, _ in pairs] == [
            cores[number // 2 % len(cores)] for number in range(8) for _ in range(3)
        ]
        assert {one[0] for one, _ in pairs} == {str(before), str(after)}
        rounds = [tuple(one[3] for one, _ in pairs[3 * number : 3 * number + 3]) for number in range(8)]
        assert all(set(operations) == {LOSS, GRAD, OUT} for operations in rounds)
        assert len(set(rounds)) > 1
        orders.append([(one[0], one[3]) for one, _ in pairs])
    assert orders[0] == orders[1] != orders[2]


def test_what_breaks_while_it_is_timed_has_no_ratio(scripted, compared, tmp_path):
    before, after = _tree(tmp_path / "old"), _tree(tmp_path / "new")
    for broken, code in ((before, 0), (after, 1)):
        scripted.turns = {str(tree): itertools.repeat([1.0]) for tree in (before, after)}
        scripted.turns[str(broken)] = iter([[1.0], {"failed": "MemoryError: full"}])
        found, (row,), printed = compared(before, after, "--cases", f"^{TINY}$")
        assert found == code
        side = "before" if broken is before else "after"
        assert row[side]["failed"] == "MemoryError: full"
        assert row["ratio"] is None
        assert f"FAILED {side}: MemoryError: full\n" in printed


def test_a_failure_or_other_bits_of_one_process_are_the_tree_s(scripted, compared, tmp_path):
    before, after = _tree(tmp_path / "old"), _tree(tmp_path / "new")
    scripted.turns = {str(tree): itertools.repeat([1.0]) for tree in (before, after)}
    scripted.digest = lambda worker: "other" if (worker.name, worker.number) == (str(after), 1) else "abc"
    _, (row,), _ = compared(before, after, "--cases", f"^{TINY}$", "--rounds", 3)
    assert (row["before"]["digest"], row["after"]["digest"], row["same_bits"]) == ("abc", "abc, other", False)
    fine = {"failed": None, "digest": "abc"}
    assert compare._of_all([fine, {"failed": "wrong", "digest": None}]) == {"failed": "wrong", "digest": "abc"}


def test_first_calls_have_a_new_folder_for_each_tree_and_round(scripted, compared, tmp_path):
    """And two processes each: the first finds it empty, the second finds what the first has left."""
    before, after = _tree(tmp_path / "old"), _tree(tmp_path / "new")
    scripted.turns = {str(before): iter([4.0, 1.0] * 3), str(after): iter([2.0, 3.0] * 3)}
    _, rows, printed = compared(before, after, "--cases", "^first ")
    assert [(row["operation"], row["ratio"], row["rounds"]) for row in rows] == [(COLD, 0.5, 3), (WARM, 3, 3)]
    assert all(row["same_bits"] is row["processes"] is row["before"]["digest"] is None for row in rows)
    assert all(entry[1:2] + entry[3:] == ("first", rows[0]["threads"], (4096, 1000)) for entry in scripted.log)
    assert "other bits: 0 of 0" in printed
    of_round = [scripted.log[4 * number : 4 * number + 4] for number in range(3)]
    for entries in of_round:
        cold, warm = ({entry[0]: entry[2] for entry in part} for part in (entries[:2], entries[2:]))
        assert cold == warm
        assert set(cold) == {str(before), str(after)}
    folders = {entry[2] for entry in scripted.log}
    assert None not in folders
    assert len(folders) == 6


def test_a_first_call_is_what_is_printed_last(monkeypatch, capsys):
    def prints(threads, *shape):
        assert (threads, shape) == ("2", ("6", "5"))
        print("a library says 7 8")
        print(0.5, 0.125)

    monkeypatch.setattr(run, "print_first_call", prints)
    assert compare._first(2, [6, 5]) == 0.5
    assert capsys.readouterr().out == ""


# Results, in processes of their own


def test_the_same_library_twice(compared, tmp_path):
    """Its operations are timed and have the same bits; what it prints is in nobody's way."""
    before, after = _tree(tmp_path / "old"), _tree(tmp_path / "new")
    code, rows, printed = compared(
        before, after, "--quick", "--cases", f"^{CASE}$", "--rounds", 2, "--turn", 0, "--seed", 5
    )
    assert code == 0
    assert [row["operation"] for row in rows] == [LOSS, GRAD, OUT, IN_PLACE]
    for row in rows:
        assert set(row) == FIELDS
        assert set(row["before"]) == set(row["after"]) == SIDE
        assert row["case"] == CASE
        assert (row["shape"], row["rounds"], row["seed"]) == ([64, 100], 2, 5)
        assert row["command"].startswith(f"python -m bench compare {before} {after} --quick --cases ")
        assert row["versions"]["numpy"] == np.__version__
        assert row["same_bits"] is True
        assert 0 < row["q1"] <= row["ratio"] <= row["q3"]
        for side, path in (("before", before), ("after", after)):
            assert (row[side]["tree"], row[side]["commit"], row[side]["dirty"]) == (str(path), None, None)
            assert row[side]["failed"] is None
            assert 0 <= row[side]["loss_units"] < 1
            assert 0 < row[side]["min"] <= row[side]["seconds"]
            assert row[side]["runs"] == 2
    assert len({row["before"]["digest"] for row in rows}) == 2, "one of the loss, one of loss and gradient"
    assert "stray" not in printed
    assert "other bits: 0 of 4\n" in printed
    assert f"before: {before}\nafter: {after}\n" in printed


def test_another_bit_is_found(compared, tmp_path):
    before, after = _tree(tmp_path / "old"), _tree(tmp_path / "new", OTHER_BIT)
    code, rows, printed = compared(before, after, "--quick", "--cases", f"^{CASE}$", "--rounds", 1, "--turn", 0)
    assert code == 0
    assert [row["same_bits"] for row in rows] == [True, False, False, False]
    assert all(row["ratio"] is not None for row in rows)
    names = "; ".join(f"{CASE}, {operation}" for operation in (GRAD, OUT, IN_PLACE))
    assert f"other bits: 3 of 4: {names}\n" in printed
    assert [line.split()[-1] for line in printed.splitlines() if line.startswith(CASE)] == ["same", *["other"] * 3]


@pytest.mark.parametrize("wrong", ["before", "after"])
def test_a_wrong_result_is_not_timed_and_an_exit_code_if_it_is_new(wrong, compared, tmp_path):
    before, after = (_tree(tmp_path / side, WRONG_LOSS if side == wrong else "") for side in compare.SIDES)
    code, rows, printed = compared(before, after, "--quick", "--cases", f"^{CASE}$", "--rounds", 1, "--turn", 0)
    assert code == (wrong == "after")
    (right,) = {*compare.SIDES} - {wrong}
    for row in rows:
        assert row[wrong]["failed"].startswith("AssertionError")
        assert row[right]["failed"] is None
        assert row["ratio"] is row[right]["seconds"] is None
        assert row["same_bits"] is False
    assert printed.count(f"FAILED {wrong}: AssertionError") == 4
    assert f"failed {wrong}: 4 of 4: {CASE}, {LOSS}; " in printed
    assert f"failed {right}" not in printed


def test_a_library_that_cannot_be_compared_is_an_error(compared, tmp_path, capfd):
    before = _tree(tmp_path / "old")
    for library, why in (
        ('__file__ = "/elsewhere/xent_array/__init__.py"', "imported from /elsewhere/xent_array/__init__.py"),
        ("import no_such_module", "No module named 'no_such_module'"),
    ):
        after = _tree(tmp_path / why.split()[0], library=library)
        with pytest.raises(SystemExit, match=f"the process of {after} ended with exit code 1"):
            compared(before, after, "--quick", "--cases", f"^{CASE}$")
        assert why in capfd.readouterr().err
    after = _tree(tmp_path / "empty", library="")
    with pytest.raises(SystemExit, match=f"{after}: {CASE} cannot be run: .*no attribute 'cross_entropy'"):
        compared(before, after, "--quick", "--cases", f"^{CASE}$")


def test_machine_code_is_kept_beside_its_source_or_where_it_is_told(tmp_path, monkeypatch, capfd):
    """Not where others keep theirs, from where nobody would remove that of a temporary tree."""
    monkeypatch.setenv("XENT_ARRAY_CACHE_DIR", str(tmp_path / "users"))
    library = "import os, sys; sys.exit(f'kept in {os.environ.get(\"XENT_ARRAY_CACHE_DIR\")}')"
    tree = compare.Tree("old", _tree(tmp_path / "old", library=library), None, None)
    for cache in (None, "elsewhere"):
        with pytest.raises(SystemExit, match="the process of old ended with exit code 1"), compare.Worker(tree, cache):
            pass
        assert capfd.readouterr().err == f"kept in {cache}\n"


def test_a_digest_is_of_every_bit():
    grad = np.zeros((2, 3), np.float32)
    other = grad.copy()
    other[1, 2] = -0.0
    loss = np.float32(1)
    found = [compare.digest(result) for result in (loss, (loss, grad), (loss, other), (np.float32(2), grad))]
    assert len(set(found)) == 4
    assert compare.digest((loss, np.asfortranarray(grad))) == found[1]
    assert compare.digest(grad.astype(ml_dtypes.bfloat16)) == compare.digest(grad.astype(np.int16))


# Trees


def test_a_tree_is_a_revision_or_a_path(repository, tmp_path):
    root, git = repository.root, repository.git
    files = {path for path in (root / ".git").rglob("*") if path.name != "index"}
    tree = compare.tree_of("HEAD~1", tmp_path / "one")
    assert tree == compare.Tree("HEAD~1", tmp_path / "one", git("rev-parse", "HEAD~1"), False)
    assert (tree.path / "xent_array" / "__init__.py").read_text() == "first"
    assert compare.tree_of(git("rev-parse", "--short", "HEAD"), tmp_path / "two").commit == git("rev-parse", "HEAD")
    assert (tmp_path / "two" / "xent_array" / "__init__.py").read_text() == "second"
    assert {path for path in (root / ".git").rglob("*") if path.name != "index"} == files
    assert git("worktree", "list").count("\n") == 0

    assert compare.tree_of(str(root), tmp_path / "no") == (str(root), root, git("rev-parse", "HEAD"), False)
    (root / "xent_array" / "__init__.py").write_text("third")
    assert compare.tree_of(str(root), tmp_path / "no") == (str(root), root, git("rev-parse", "HEAD"), True)
    within = _tree(root / "build")
    assert compare.tree_of(str(within), tmp_path / "no") == (str(within), within, None, None)
    plain = _tree(tmp_path / "plain")
    assert compare.tree_of(str(plain), tmp_path / "no") == (str(plain), plain, None, None)
    assert not (tmp_path / "no").exists()


def test_a_folder_with_the_name_of_a_revision_is_no_checkout(repository, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("topic").mkdir()
    repository.git("branch", "topic", "HEAD~1")
    assert compare.tree_of("topic", tmp_path / "one").commit == repository.git("rev-parse", "HEAD~1")


def test_what_is_neither_revision_nor_path_is_an_error(repository, compared, tmp_path, capfd):
    """Which names it; the other one, extracted before, is not left behind."""
    neither = "must be a revision that git knows, or the path of a checkout of xent_array; got"
    for name, why in (
        ("no-such-revision", f"{neither} 'no-such-revision'"),
        (str(tmp_path), f"{neither} '{tmp_path}'"),
        ("HEAD~2", "revision 'HEAD~2' has no xent_array"),
    ):
        for pair in ((name,), ("HEAD", name)):
            with pytest.raises(SystemExit) as ended:
                compared(*pair)
            assert ended.value.code == 2
            assert capfd.readouterr().err.endswith(f"error: {why}\n")


def test_revisions_are_extracted_while_they_are_compared(repository, scripted, compared):
    """And then removed, whether or not all went well; AFTER is this checkout if it is not given."""
    commits = [repository.git("rev-parse", name) for name in ("HEAD~1", "HEAD")]
    there = []

    def turns(name):
        while True:
            there.append([(tree.path / "xent_array" / "__init__.py").read_text() for tree in scripted.trees])
            yield [1.0]

    scripted.turns = {name: turns(name) for name in ("HEAD~1", "HEAD")}
    _, (row,), printed = compared("HEAD~1", "HEAD", "--cases", f"^{TINY}$", "--processes", 1)
    assert there[0] == ["first", "second"]
    assert [(row[side]["commit"], row[side]["dirty"]) for side in compare.SIDES] == [(each, False) for each in commits]
    assert f"before: HEAD~1 ({commits[0][:10]})\nafter: HEAD ({commits[1][:10]})\n" in printed
    assert not any(tree.path.exists() for tree in scripted.trees)

    (repository.root / "xent_array" / "__init__.py").write_text("third")
    scripted.trees.clear()
    scripted.turns = {"HEAD~1": turns("HEAD~1"), str(repository.root): iter([])}
    with pytest.raises(StopIteration):
        compared("HEAD~1", "--cases", f"^{TINY}$", "--processes", 1)
    before, after = scripted.trees
    assert not before.path.exists()
    assert after == (str(repository.root), repository.root, commits[1], True)


def test_arguments_are_checked(capsys):
    for wrong, why in (
        (["--cases", "no such case"], "no case matches 'no such case'"),
        (["--threads", "0"], "--threads must be from 1 to "),
        (["--rounds", "0"], "--rounds must be at least 1; got 0"),
        (["--processes", "-1"], "--processes must be at least 1; got -1"),
    ):
        with pytest.raises(SystemExit):
            compare.main(["HEAD", *wrong])
        assert why in capsys.readouterr().err


def test_a_turn_settles_first_and_the_next_one_begins_when_it_is_quiet(monkeypatch):
    """It begins on the core that it is told, and may then leave it."""
    log, cores = [], os.sched_getaffinity(0)
    monkeypatch.setattr(os, "sched_setaffinity", lambda _, cores: log.append(cores))
    monkeypatch.setattr(timing, "wait_until_quiet", lambda: log.append("quiet"))
    assert len(compare._turn({LOSS: timing.Call(lambda: log.append("run"))}, LOSS, 0.0, 7)) == 1
    assert log == [{7}, cores, "run", "run", "quiet"]


def test_a_tree_without_compiled_loops_is_named_once(monkeypatch, capfd):
    monkeypatch.setattr(cpu, "_found", "no compiler")
    worker = compare.Worker.__new__(compare.Worker)
    worker.name = "a tree of this test"
    monkeypatch.setattr(worker, "ask", lambda _: compare._why_numpy(), raising=False)
    for _ in range(2):
        assert worker.__enter__() is worker
    assert capfd.readouterr().err == "a tree of this test has no compiled loops: no compiler\n"
