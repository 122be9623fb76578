"""The bits of random problems: those of support/bits.py, which also compares them between two states of the package."""

import subprocess
import sys
from collections import Counter

from support import bits, process
from support.sizes import resize

from xent_array._engines.cpu import threads


def test_the_number_of_threads_changes_no_bit(monkeypatch):
    monkeypatch.setenv("XENT_ARRAY_NUM_THREADS", "1")  # and, after the test, what it was
    resize(monkeypatch, SERIAL=1 << 11, PART=1 << 11)  # so that most problems are shared
    team, teams = threads.team, Counter()

    def noted(*given):
        teams[found := team(*given)] += 1
        return found

    monkeypatch.setattr(threads, "team", noted)
    for number in range(100, 140):  # among which are some that are answered at once
        assert bits.digest(number, threads=1) == bits.digest(number, threads=3), number
    assert min(teams[1], teams[3]) >= 10


def test_digests_are_of_the_answers(monkeypatch):
    """Another problem has another, and so has one answer that differs by its last bit."""
    monkeypatch.setenv("XENT_ARRAY_NUM_THREADS", "1")
    assert len({bits.digest(number) for number in range(40)}) == 40
    before, answers = bits.digest(6), bits.answers

    def changed(*given):
        (name, array), *others = answers(*given)
        array.reshape(-1).view(f"u{array.itemsize}")[0] ^= 1
        yield from ((name, array), *others)

    assert bits.digest(6) == before
    monkeypatch.setattr(bits, "answers", changed)
    assert bits.digest(6) != before


def test_the_program(tmp_path):
    """It says which problems have other bits."""
    script = (
        "import sys; from support import bits; bits.PROBLEMS = 3; "
        "bits.digest = lambda number: f'{number * number + (sys.argv[1] == \"check\" and number == 2)}'; "
        "sys.exit(bits.main())"
    )
    said = []
    for what in ("write", "check"):
        command = [sys.executable, "-c", script, what, str(tmp_path / "bits")]
        ran = subprocess.run(command, env=process.environment(), capture_output=True, text=True, check=False)
        said.append((ran.returncode, ran.stdout, ran.stderr))
    assert said == [(0, "3 problems\n", ""), (1, "2 of 3 problems have the same bits; not 2\n", "")]
    program = subprocess.run(
        [sys.executable, str(process.TESTS / "support" / "bits.py"), "--help"],
        env=process.environment(), capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "{write,check}" in program.stdout
