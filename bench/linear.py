"""Linear cross-entropy on the CPU: memory and time of loss and gradients, against the two steps and PyTorch.

    python -m bench linear --out bench/results/linear.json

Every way is checked against the two steps first. Then each is timed once per round, in shuffled order, and its memory
is measured in a process of its own: the growth of the resident set, less the gradients. On a busy machine, compare the
time that threads spend on cores, with --threads 1, as threads that wait for others spin. PyTorch's function is run
without chunks, with the chunks that it chooses, and with others; the fastest of the latter is its best. Without PyTorch
the other ways are measured.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np

from xent_array import cross_entropy_value_and_grad, linear_cross_entropy_value_and_grad
from xent_array._linear import products
from xent_array._linear.plan import shown

ROOT = Path(__file__).parents[1]
TWO_STEPS, OURS, TENSORS = "two steps, in place", "linear_cross_entropy", "linear_cross_entropy, tensors"
UNCHUNKED, AUTOMATIC, CHUNKED = "PyTorch, unchunked", "PyTorch, its own chunks", "PyTorch, chunks of {} rows"
CHUNKS = (512, 1024, 2048)
Grads = tuple[Any, Any]


class Problem(NamedTuple):
    """Sizes, and what is asked for."""

    rows: int
    features: int
    classes: int
    budget: str
    threads: int

    @property
    def gradients(self) -> int:
        """Bytes of the two gradients."""
        return 4 * self.features * (self.rows + self.classes)

    def inputs(self) -> tuple[Any, Any, Any]:
        chance = np.random.default_rng(0)
        hidden = chance.standard_normal((self.rows, self.features), dtype=np.float32)
        weight = chance.standard_normal((self.classes, self.features), dtype=np.float32)
        weight *= np.float32(self.features**-0.5)
        return hidden, weight, chance.integers(0, self.classes, self.rows)


def two_steps(hidden: Any, weight: Any, labels: Any) -> tuple[float, Grads]:
    logits = hidden @ weight.T
    loss, grad = cross_entropy_value_and_grad(logits, labels, out=logits)
    return float(loss), (grad @ weight, grad.T @ hidden)


def ways(problem: Problem, hidden: Any, weight: Any, labels: Any) -> dict[str, Callable[[], tuple[float, Grads]]]:
    """Everything that computes the loss and both gradients."""

    def ours() -> tuple[float, Grads]:
        loss, (of_hidden, of_weight, _) = linear_cross_entropy_value_and_grad(
            hidden, weight, labels, memory_budget=problem.budget
        )
        return float(loss), (of_hidden, of_weight)

    found: dict[str, Callable[[], tuple[float, Grads]]] = {
        TWO_STEPS: lambda: two_steps(hidden, weight, labels),
        OURS: ours,
    }
    try:
        import torch
    except ImportError:
        return found
    torch.set_num_threads(problem.threads)
    tensors, target = [torch.from_numpy(hidden), torch.from_numpy(weight)], torch.from_numpy(labels)

    def differentiated(loss_of: Callable[..., Any]) -> Callable[[], tuple[float, Grads]]:
        def run() -> tuple[float, Grads]:
            leaves = [tensor.detach().requires_grad_() for tensor in tensors]
            loss = loss_of(*leaves, target)
            loss.backward()
            return loss.item(), (leaves[0].grad.numpy(), leaves[1].grad.numpy())

        return run

    def chunked(**options: Any) -> Callable[[], tuple[float, Grads]]:
        chosen = torch.nn.LinearCrossEntropyOptions(**options)
        theirs = torch.nn.functional.linear_cross_entropy
        return differentiated(lambda *args: theirs(*args, options=chosen))

    from xent_array import linear_cross_entropy

    found[TENSORS] = differentiated(lambda *args: linear_cross_entropy(*args, memory_budget=problem.budget))
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        found[UNCHUNKED] = differentiated(torch.nn.functional.linear_cross_entropy)
        found[AUTOMATIC] = chunked()
        found |= {CHUNKED.format(rows): chunked(batch_chunk_size=rows) for rows in CHUNKS}
    return found


def check(found: dict[str, Callable[[], tuple[float, Grads]]]) -> None:
    """Raises AssertionError for a way whose results are not those of the two steps, in float32."""
    loss, grads = found[TWO_STEPS]()
    for name, run in found.items():
        other, others = run()
        assert abs(other - loss) < 1e-4 * abs(loss), f"{name}: loss {other}, not {loss}"
        for grad, wanted in zip(others, grads, strict=True):
            assert np.abs(grad - wanted).max() < 1e-3 * np.abs(wanted).max(), f"{name}: a gradient is wrong"
        del others


def times_of(
    found: dict[str, Callable[[], tuple[float, Grads]]], rounds: int, say: Any
) -> dict[str, list[tuple[float, float]]]:
    """For each run, its seconds, and those that its threads spent on a core."""
    from .timing import wait_until_quiet

    times: dict[str, list[tuple[float, float]]] = {name: [] for name in found}
    chance = random.Random(0)
    for number in range(rounds):
        order = list(found)
        chance.shuffle(order)
        for name in order:
            wait_until_quiet()
            start, of_cores = time.perf_counter(), time.process_time()
            found[name]()
            times[name].append((time.perf_counter() - start, time.process_time() - of_cores))
            say("round {} of {}: {} {:.2f} s, {:.2f} s of cores".format(number + 1, rounds, name, *times[name][-1]))
    return times


def memory_of(problem: Problem, name: str) -> int:
    """Bytes by which the resident set of a new process grows, less the gradients."""
    arguments = [sys.executable, "-m", "bench", "linear", "--peak", name, "--problem", json.dumps(problem)]
    done = subprocess.run(arguments, cwd=ROOT, env=limited(problem.threads), capture_output=True, text=True, check=True)
    return int(done.stdout.splitlines()[-1])


def peak(problem: Problem, name: str) -> int:
    from .run import _host_peak

    small = problem._replace(rows=8, classes=8)
    ways(small, *small.inputs())[name]()  # what a library does only once
    run = ways(problem, *problem.inputs())[name]
    taken = _host_peak()
    held = run()
    found = taken() - problem.gradients
    del held
    return found


def buffers_of(problem: Problem) -> int:
    """Bytes of the arrays that this library makes, less the gradients."""
    asked: list[int] = []
    empty = products.OfNumPy.empty

    def noted(self: Any, shape: tuple[int, ...], dtype: Any, like: Any) -> Any:
        made = empty(self, shape, dtype, like)
        asked.append(made.nbytes)
        return made

    hidden, weight, labels = problem.inputs()
    with mock.patch.object(products.OfNumPy, "empty", noted):
        linear_cross_entropy_value_and_grad(hidden, weight, labels, memory_budget=problem.budget)
    return sum(asked) - problem.gradients


def limited(threads: int) -> dict[str, str]:
    names = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "XENT_ARRAY_NUM_THREADS")
    return os.environ | dict.fromkeys(names, str(threads))


def measure(problem: Problem, rounds: int, say: Any) -> dict[str, Any]:
    found = ways(problem, *problem.inputs())
    check(found)
    times = times_of(found, rounds, say)
    rows = {}
    for name, taken in times.items():
        seconds, of_cores = (statistics.median(column) for column in zip(*taken, strict=True))
        rows[name] = {"seconds": seconds, "of_cores": of_cores, "times": taken, "memory": memory_of(problem, name)}
        say(f"{name}: {shown(rows[name]['memory'])}")
    return {"problem": problem._asdict(), "rounds": rounds, "buffers": buffers_of(problem), "rows": rows}


def table(found: dict[str, Any]) -> str:
    """Memory and time of every way, as Markdown; of PyTorch's chunks the fastest."""
    problem, rows = Problem(**found["problem"]), dict(found["rows"])
    sizes = [CHUNKED.format(count) for count in CHUNKS]
    best = min((name for name in sizes if name in rows), key=lambda name: rows[name]["of_cores"], default=None)
    ours = rows[OURS]
    lines = [
        "| loss and both gradients | memory beside inputs and gradients | time | time of cores |",
        "| --- | --: | --: | --: |",
    ]
    for name, row in rows.items():
        if name in sizes and name != best:
            continue
        said = f"{name} (its fastest)" if name == best else name
        times = " | ".join(f"{row[clock] / ours[clock]:.2f}" for clock in ("seconds", "of_cores"))
        lines.append(f"| {said} | {row['memory'] / 2**20:.0f} MiB | {times} |")
    threads = "one thread" if problem.threads == 1 else f"{problem.threads} threads"
    sizes_said = f"{problem.rows} rows, {problem.features} features, {problem.classes} classes, float32"
    head = (
        f"{sizes_said}, {threads}; `memory_budget={problem.budget!r}`, of which the buffers take"
        f" {shown(found['buffers'])}; the rest of the memory is that of the products. Times are medians of"
        f" {found['rounds']}, relative to `{OURS}`, which took {ours['seconds']:.1f} s, and its threads"
        f" {ours['of_cores']:.1f} s of cores:"
    )
    about, load = f"{found['machine']['cpu']}, commit {found['commit'][:10]}", found["machine"]["load"]
    busy = f", on a busy machine (load average {load})" if load > 0.5 else ""
    where = f"`{found['command']}`, {about}, {found['date'][:10]}{busy}"
    return f"{where}. {head}\n\n" + "\n".join(lines)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench linear", description=(__doc__ or "").partition("\n")[0])
    for name, size in (("rows", 8192), ("features", 512), ("classes", 50257)):
        parser.add_argument(f"--{name}", type=int, default=size)
    parser.add_argument("--budget", default="64MiB")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--quick", action="store_true", help="small sizes and one round: seconds")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write all numbers here, as JSON")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    parser.add_argument("--problem", type=json.loads, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.peak is not None:
        print(peak(Problem(*given.problem), given.peak))
        return 0
    problem = Problem(given.rows, given.features, given.classes, given.budget, given.threads)
    if given.quick:
        problem, given.rounds = problem._replace(rows=600, features=32, classes=5000, budget="4MiB"), 1
    if any(os.environ.get(name) != value for name, value in limited(given.threads).items()):  # read at import
        return subprocess.run(
            [sys.executable, "-m", "bench", "linear", *arguments], env=limited(given.threads)
        ).returncode
    from . import run

    command = f"python -m bench linear {shlex.join(arguments)}".strip()
    settings = run.Settings("numpy", given.threads, given.rounds, 0.0, 0.0, True, None, 0, None, command)
    about = run.about(settings, np)
    found = about | measure(problem, given.rounds, lambda text: print(text, file=sys.stderr, flush=True))
    print(run.header(about), end="\n\n")
    print(table(found))
    if given.out is not None:
        given.out.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
