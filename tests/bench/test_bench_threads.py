"""`python -m bench threads`: that its trace accounts for all that threads did, and its tables for the rows."""

import argparse
import itertools
import json
import os
import re
import threading
import time

import numpy as np
import pytest

import xent_array

pytest.importorskip("tqdm")  # for bench.run
from test_bench import FIELDS, _reported, _row

from bench import peers, report, run, suite, threads, timing
from bench.suite import COPY, COPY_BY_ONE, GRAD, LOSS, OURS, OUT, READ, THREADS, Case
from xent_array._engines.cpu.threads import Turns

SHAPE = 800, 1000  # which is worth four threads where loops are compiled, and more where they are not
THREAD = {"parts", "began", "ended", "took", "least", "median", "most", "between", "waited"}
CALL = {"team", "asked", "joined", "returned", "released", "threads"}


@pytest.fixture
def spied(monkeypatch):
    """The lists of parts that were shared, whoever shared them; None where compiled code takes them."""
    seen = []

    def spy(spread):
        def listed(work, parts, team):
            if isinstance(parts, Turns):
                seen.append(None)
                spread(work, parts, team)
                return
            seen.append(list(parts))
            spread(work, iter(seen[-1]), team)

        return listed

    for module, name in threads.SHARE:
        monkeypatch.setattr(module, name, spy(getattr(module, name)))
    return seen


def _is_whole(call):
    """What holds for every trace; times are rounded to 0.1 µs each."""
    assert set(call) == CALL
    assert 0 <= call["asked"] <= call["joined"] <= call["returned"] <= call["released"]
    assert 1 <= len(call["threads"]) <= call["team"]
    for thread in call["threads"]:
        assert set(thread) == THREAD
        assert call["asked"] <= thread["began"] <= thread["ended"] <= call["joined"]
        assert thread["took"] + thread["between"] == pytest.approx(thread["ended"] - thread["began"], abs=0.3)
        assert thread["least"] <= thread["median"] <= thread["most"] <= thread["took"] + 0.1
        assert 0 <= thread["waited"] <= thread["took"] + 0.1


@pytest.mark.parametrize("operation", [LOSS, GRAD, OUT, COPY, READ])
@pytest.mark.parametrize("team", [1, 2, 3])
@pytest.mark.parametrize("engine", ["cpu", "numpy"])
def test_the_trace_accounts_for_all_parts(team, engine, operation, spied, monkeypatch):
    monkeypatch.setenv("XENT_ARRAY_NUM_THREADS", str(team))
    case = Case("test", SHAPE, operations=(LOSS, GRAD, OUT, READ))
    problem, _, _ = run.make(case, 0, team, np, judged=False)
    call = (peers.ours(problem) | peers.ours(problem, engine) | peers.copy(problem))[operation]
    call.run()
    spied.clear()
    found = threads.trace(call.run)
    _is_whole(found)
    if operation == COPY and team == 1:
        assert spied == []  # and then the call is the part
        spied.append([...])
    (parts,) = spied
    taken = sum(thread["parts"] for thread in found["threads"])
    assert 1 <= taken <= team if parts is None else taken == len(parts)
    assert found["team"] == team
    if operation in (COPY, READ):
        assert [thread["parts"] for thread in found["threads"]] == [1] * team
    else:
        assert parts is None or len(parts) >= team


def test_a_trace_changes_no_result_and_leaves_nothing_behind(monkeypatch):
    monkeypatch.setenv("XENT_ARRAY_NUM_THREADS", "3")
    before = [getattr(module, name) for module, name in threads.SHARE]
    x = np.random.default_rng(0).standard_normal(SHAPE, np.float32)
    y = np.arange(SHAPE[0]) % SHAPE[1]
    out = np.empty_like(x)
    loss, grad = xent_array.cross_entropy_value_and_grad(x, y)
    got = []
    threads.trace(lambda: got.append(xent_array.cross_entropy_value_and_grad(x, y, out=out)[0]))
    assert got == [loss]
    np.testing.assert_array_equal(out, grad)
    with pytest.raises(RuntimeError, match="no such kernel"):
        threads.trace(_breaks)
    assert [getattr(module, name) for module, name in threads.SHARE] == before


def _breaks():
    raise RuntimeError("no such kernel")


def test_a_call_that_shares_nothing_is_one_part():
    found = threads.trace(lambda: time.sleep(0.02))
    _is_whole(found)
    (thread,) = found["threads"]
    assert (found["team"], thread["parts"]) == (1, 1)
    assert thread["took"] == found["returned"] >= 20e3
    assert thread["waited"] > 10e3  # what sleeps has no core


def test_what_waits_within_a_part_is_told_from_what_works():
    """And what began late, or never did: two threads of three come, the second for one part after a sleep."""

    def work(parts):
        for seconds in parts:
            time.sleep(seconds)

    def spread(work, parts, team):
        parts = list(parts)
        helper = threading.Thread(target=lambda: work(iter(parts[:1])))
        work(iter(parts[1:]))
        helper.start()
        helper.join()

    class Module:
        share = staticmethod(spread)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threads, "SHARE", ((Module, "share"),))
        found = threads.trace(lambda: Module.share(work, [0.01, 0.02, 0.03], 3))
    _is_whole(found)
    first, second = found["threads"]
    assert (found["team"], first["parts"], second["parts"]) == (3, 2, 1)
    assert 20e3 <= first["least"] <= first["median"] <= first["most"]
    assert first["most"] >= 30e3
    assert first["waited"] >= 25e3
    assert second["began"] >= first["ended"] >= 50e3


@pytest.mark.parametrize("team", [1, 2, 3])
@pytest.mark.parametrize("number", [0, 1, 2, 7])
def test_yardsticks_share_all_parts(team, number):
    taken = [[] for _ in range(team)]
    free = iter(range(team))
    timing.spread(lambda parts: taken[next(free)].extend(parts), range(number), team)
    assert sorted(itertools.chain(*taken)) == list(range(number))
    assert sorted(map(len, taken)) == sorted(len(range(number)[n::team]) for n in range(team))


@pytest.mark.parametrize("team", [1, 2, 3])
@pytest.mark.parametrize("shape", [(7, 5), SHAPE])
def test_the_read_reads_all_once(shape, team, spied):
    problem, _, _ = run.make(Case("test", shape, operations=(READ,)), 0, team, np, judged=False)
    calls = peers.copy(problem)
    assert set(calls) == {COPY, READ} | ({COPY_BY_ONE} if team > 1 else set())
    calls[READ].run()
    ((*parts,),) = spied
    assert [part.start for part in parts] == [0, *(part.stop for part in parts[:-1])]
    assert parts[-1].stop == problem.logits.size


def test_jax_is_timed_with_all_cores_only():
    cores = len(os.sched_getaffinity(0))
    problem, _, _ = run.make(Case("test", (6, 5)), 0, cores + 1, np, judged=False)
    with pytest.raises(peers.Unsupported, match=f"a thread for each of {cores} cores"):
        peers.jax_by_all(problem)


def test_arguments():
    assert [threads.counts(cores) for cores in (1, 2, 6, 16)] == [[1], [1, 2], [1, 2, 4, 6], [1, 2, 4, 8, 16]]
    assert threads._shape("1024x32000") == (1024, 32000)
    for wrong in ("1024", "1024x", "x5", "0x5", "axb"):
        with pytest.raises(argparse.ArgumentTypeError, match="must be"):
            threads._shape(wrong)
    for wrong in ("0", "-1", "two"):
        with pytest.raises(SystemExit):
            threads.main(["--threads", wrong])


def test_the_job(monkeypatch, capsys, tmp_path):
    """All of it but the peers, on a small problem, with more threads than cores among its numbers."""
    affinity = os.sched_getaffinity(0)
    monkeypatch.setenv("XENT_ARRAY_NUM_THREADS", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setattr(peers, "PEERS", {**peers.PEERS, THREADS: {}})
    numbers, out = sorted({1, 2, len(affinity) + 1}), tmp_path / "rows.jsonl"
    arguments = ["--sizes", "x".join(map(str, SHAPE)), "--threads", *map(str, numbers), "--repeat", "2"]
    assert threads.main([*arguments, "--out", str(out)]) == 0
    assert os.sched_getaffinity(0) == affinity, "no core is taken away"
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    operations = {(COPY, COPY), (COPY, READ), (OURS, LOSS), (OURS, GRAD), (OURS, OUT)}
    cases = suite.thread_cases([SHAPE], numbers)
    found = {(row["case"], row["library"], row["operation"]) for row in rows}
    assert found == {(case.name, *each) for case in cases for each in operations}
    for row in rows:
        assert set(row) == FIELDS | {"traced"}
        assert row["failed"] is None
        assert row["command"].startswith("python -m bench threads --sizes 800x1000 --threads 1 2 ")
        assert len(row["traced"]) == threads.TRACED
        for call in row["traced"]:
            _is_whole(call)
            if row["library"] == OURS:
                assert row["threads"] == int(row["case"].rpartition("=")[2])
                assert call["team"] == row["threads"] or 4 <= call["team"] < row["threads"]
    printed = capsys.readouterr().out
    for table in (report.threads(report.by_key(rows)), report.idle(report.by_key(rows))):
        assert "\n\n".join(table) in printed
    assert len(re.findall(r"(?m)^\| 800 × 1000 \| loss\+grad \| \d+ \| ", printed)) == len(numbers)
    assert len(re.findall(r"(?m)^\| 800 × 1000 \| read \| \d+ of \d+ \| ", printed)) == len(numbers)


# The tables


def _thread(began, ended, took, waited, parts=2):
    return {
        "parts": parts, "began": began, "ended": ended, "took": took, "least": 1.0, "median": 1.0, "most": 1.0,
        "between": ended - began - took, "waited": waited,
    }  # fmt: skip


def _call(*each, team, released=1000.0):
    return {
        "team": team, "asked": 40.0, "joined": 950.0, "returned": 960.0, "released": released, "threads": list(each),
    }  # fmt: skip


def _rows(shape=(32768, 1000), cores=4):
    """Rows of one thread and of four, of which one never came."""
    one, four = suite.thread_cases([shape], [1, 4])
    alone = [_call(_thread(50.0, 950.0, 880.0, 0.0, 20), team=1)]
    first, last, late = (_thread(*times) for times in ((100, 900, 700, 0), (200, 900, 600, 100), (500, 900, 350, 0)))
    some = [_call(first, last, late, team=4), _call(first, last, late, team=4), _call(first, team=4)]
    machine = {"cpu": "a CPU", "cores": cores, "load": None, "gpu": None}
    told = {"shape": list(shape), "traced": None, "min": 1e-3, "of_copy": 0.5, "of_read": 0.25, "machine": machine}

    def row(case, library, operation, seconds, **more):
        return _row(case, library, operation, seconds, THREADS, **{**told, "threads": case.threads, **more})

    return [
        row(one, OURS, LOSS, 8e-3, traced=alone),
        row(four, COPY, COPY, 3e-3, threads=1, traced=[_call(_thread(0.0, 1000.0, 1000.0, 0.0, 1), team=1)]),
        row(four, COPY, READ, 1e-3, traced=some),
        row(four, OURS, LOSS, 2e-3, traced=some),
        row(four, OURS, GRAD, None, failed="AssertionError: grad"),
        row(four, "torch", LOSS, 5e-3),
    ]


def test_the_tables_say_what_the_rows_say(tmp_path):
    """Medians of the traces: of a call of 1000 µs, a team of four has 4000."""
    rows = _rows()
    (speed,), (idle,) = report.threads(report.by_key(rows)), report.idle(report.by_key(rows))
    not_begun, between, waiting, ended = 100 + 200 + 500 + 1000, 100 + 100 + 50, 100, 3 * 100
    total, work = (not_begun + between + waiting + ended) / 4000, 700 + 500 + 350
    shares = " | ".join(f"{part / 4000:.1%}" for part in (not_begun, between, waiting, ended))
    assert total == 1 - work / 4000
    assert f"| 32768 × 1000 | loss | 4 | 2 | 1 | 3 | 1 | 50% | 25% | 500 | {total:.0%} | 2.5× |  |" in speed
    assert "| 32768 × 1000 | loss | 1 | 8 | 1 |  |  | 50% | 25% | 50 | 12% |  |  |" in speed
    some = f"3 of 4 | 1 | 6 | 40 | 500 | 50 | {total:.1%} | {shares}"
    assert f"| 32768 × 1000 | loss | {some} | {work / 880:.2f}× |" in idle
    assert f"| 32768 × 1000 | read | {some} |  |" in idle
    assert "| loss | 1 of 1 | 1 | 20 | 40 | 50 | 50 | 12.0% | 5.0% | 2.0% | 0.0% | 5.0% | 1.00× |" in idle
    assert "loss+grad" not in speed + idle, "what is wrong is not shown"
    text, plots = _reported(tmp_path, rows)
    assert "**Threads of a CPU**, a CPU, 4 cores; ; commit abc;" in text
    assert speed in text
    assert "waiting in parts" not in text
    assert plots == set()
    assert report.threads({}) == report.idle({}) == []
