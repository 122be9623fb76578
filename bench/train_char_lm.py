"""Trains a small neural language model of Python's own source code with xent_array alone.

    python bench/train_char_lm.py [--backend numpy|cupy|torch] [--minutes 2] [--two-steps]

The text is the standard library of the Python that runs this; the classes are its most frequent words, numbers, signs
and indentations. The next token is predicted from those before it: embedding, one hidden layer, and a linear head over
the whole vocabulary (Y. Bengio et al., "A Neural Probabilistic Language Model", JMLR 3, 2003). The loss and the
gradients of the head are linear_cross_entropy_value_and_grad, which never makes all logits; with --two-steps they are
made. At the end, processes of their own measure the memory of a step both ways. A progress bar needs tqdm.
"""

from __future__ import annotations

import argparse
import math
import re
import subprocess
import sys
import sysconfig
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from xent_array import cross_entropy, cross_entropy_value_and_grad, linear_cross_entropy
from xent_array import linear_cross_entropy_value_and_grad as value_and_grad

Array = Any
CONTEXT, WIDTH = 6, 128
TOKEN = re.compile(r"[A-Za-z_]\w*|\d+|\n[ ]*|[^\w\s]")
HELD_OUT = 8192  # positions whose perplexity is reported


def tokens_of(classes: int) -> tuple[Array, list[str]]:
    """The text as class indices, and the names of the classes; rarer tokens are class 0."""
    folder = Path(sysconfig.get_path("stdlib"))
    files = [path for path in sorted(folder.rglob("*.py")) if not {"site-packages", "__pycache__"} & set(path.parts)]
    text = [token for path in files for token in TOKEN.findall(path.read_text(errors="replace"))]
    names = ["<rare>", *(token for token, _ in Counter(text).most_common(classes - 1))]
    if len(names) < classes:
        raise SystemExit(f"the text has {len(names) - 1} different tokens, fewer than --classes {classes}")
    number = {name: k for k, name in enumerate(names)}
    return np.asarray([number.get(token, 0) for token in text]), names


class Model:
    """Parameters, the loss, and its gradients by the chain rule, on arrays of NumPy or CuPy."""

    def __init__(self, xp: Any, classes: int, budget: str | None, two_steps: bool) -> None:
        self.xp, self.budget, self.two_steps = xp, budget, two_steps
        rng = np.random.default_rng(0)

        def normal(*shape: int, scale: float) -> Array:
            return xp.asarray(rng.standard_normal(shape, dtype=np.float32) * np.float32(scale))

        self.embedding = normal(classes, WIDTH, scale=0.1)
        self.layer = normal(CONTEXT * WIDTH, WIDTH, scale=(CONTEXT * WIDTH) ** -0.5)
        self.offset = xp.zeros(WIDTH, dtype=xp.float32)
        self.head = xp.zeros((classes, WIDTH), dtype=xp.float32)
        self.bias = xp.zeros(classes, dtype=xp.float32)

    def parameters(self) -> list[Array]:
        return [self.embedding, self.layer, self.offset, self.head, self.bias]

    def hidden(self, before: Array) -> tuple[Array, Array]:
        inputs = self.embedding[before].reshape(len(before), -1)
        return inputs, self.xp.tanh(inputs @ self.layer + self.offset)

    def loss(self, before: Array, after: Array) -> float:
        _, hidden = self.hidden(before)
        if self.two_steps:
            return float(cross_entropy(hidden @ self.head.T + self.bias, after))
        return float(linear_cross_entropy(hidden, self.head, after, linear_bias=self.bias, memory_budget=self.budget))

    def gradients(self, before: Array, after: Array) -> tuple[Array, list[Array]]:
        inputs, hidden = self.hidden(before)
        if self.two_steps:
            logits = hidden @ self.head.T + self.bias
            loss, grad = cross_entropy_value_and_grad(logits, after, out=logits)
            of_hidden, of_head, of_bias = grad @ self.head, grad.T @ hidden, grad.sum(axis=0)
        else:
            loss, (of_hidden, of_head, of_bias) = value_and_grad(
                hidden, self.head, after, linear_bias=self.bias, memory_budget=self.budget
            )
        inner = of_hidden * (1 - hidden * hidden)
        of_embedding = self.xp.zeros_like(self.embedding)
        self.xp.add.at(of_embedding, before.reshape(-1), (inner @ self.layer.T).reshape(-1, WIDTH))
        return loss, [of_embedding, inputs.T @ inner, inner.sum(axis=0), of_head, of_bias]


class Adam:
    """D. P. Kingma and J. Ba, "Adam: A Method for Stochastic Optimization", 2014, arXiv:1412.6980."""

    def __init__(self, xp: Any, parameters: list[Array], rate: float = 3e-3) -> None:
        self.xp, self.parameters, self.rate, self.count = xp, parameters, rate, 0
        self.mean = [xp.zeros_like(each) for each in parameters]
        self.square = [xp.zeros_like(each) for each in parameters]

    def step(self, gradients: list[Array]) -> None:
        self.count += 1
        rate = self.rate * math.sqrt(1 - 0.99**self.count) / (1 - 0.9**self.count)
        for value, grad, mean, square in zip(self.parameters, gradients, self.mean, self.square, strict=True):
            mean *= 0.9
            mean += 0.1 * grad
            grad *= grad
            square *= 0.99
            square += 0.01 * grad
            self.xp.sqrt(square, out=grad)
            grad += 1e-8
            value -= rate * mean / grad


class Arrays:
    """Training on arrays of NumPy or CuPy."""

    def __init__(self, xp: Any, classes: int, budget: str | None, two_steps: bool) -> None:
        self.xp, self.model = xp, Model(xp, classes, budget, two_steps)
        self.adam = Adam(xp, self.model.parameters())

    def loss(self, before: Array, after: Array) -> float:
        return self.model.loss(self.xp.asarray(before), self.xp.asarray(after))

    def step(self, before: Array, after: Array) -> None:
        self.adam.step(self.model.gradients(self.xp.asarray(before), self.xp.asarray(after))[1])


class Tensors:
    """The same model in PyTorch, with the module of this library."""

    def __init__(self, classes: int, budget: str | None, two_steps: bool) -> None:
        import torch

        from xent_array.torch import CrossEntropyLoss, LinearCrossEntropyLoss

        torch.manual_seed(0)
        self.torch, self.two_steps = torch, two_steps
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        embedding, layer = torch.nn.Embedding(classes, WIDTH), torch.nn.Linear(CONTEXT * WIDTH, WIDTH)
        torch.nn.init.normal_(embedding.weight, std=0.1)
        self.body = torch.nn.Sequential(embedding, torch.nn.Flatten(), layer, torch.nn.Tanh()).to(self.device)
        self.head = LinearCrossEntropyLoss(WIDTH, classes, bias=True, memory_budget=budget, device=self.device)
        self.of_logits = CrossEntropyLoss()
        for parameter in self.head.parameters():
            torch.nn.init.zeros_(parameter)
        parameters = [*self.body.parameters(), *self.head.parameters()]
        self.adam = torch.optim.Adam(parameters, 3e-3, (0.9, 0.99))

    def _loss(self, before: Array, after: Array) -> Any:
        before, after = (self.torch.from_numpy(each).to(self.device) for each in (before, after))
        hidden = self.body(before)
        return self.of_logits(self.head.linear(hidden), after) if self.two_steps else self.head(hidden, after)

    def loss(self, before: Array, after: Array) -> float:
        with self.torch.no_grad():
            return float(self._loss(before, after))

    def step(self, before: Array, after: Array) -> None:
        self.adam.zero_grad()
        self._loss(before, after).backward()
        self.adam.step()


def trainer(options: argparse.Namespace) -> Arrays | Tensors:
    given = options.classes, options.budget, options.two_steps
    if options.backend == "torch":
        return Tensors(*given)
    if options.backend == "cupy":
        import cupy

        return Arrays(cupy, *given)
    return Arrays(np, *given)


def train(options: argparse.Namespace) -> tuple[float, float]:
    """Train for some minutes; the perplexity at the start and at the end."""
    text, names = tokens_of(options.classes)
    print(f"{len(text):,} tokens, {len(names):,} classes", flush=True)
    windows = np.lib.stride_tricks.sliding_window_view(text, CONTEXT + 1)
    held, windows = windows[-HELD_OUT:], windows[: -HELD_OUT - CONTEXT]
    rng, model, seconds = np.random.default_rng(0), trainer(options), 60 * options.minutes

    def perplexity() -> float:
        return math.exp(model.loss(np.ascontiguousarray(held[:, :-1]), np.ascontiguousarray(held[:, -1])))

    first = found = perplexity()
    say, progress = _progress(seconds, options.quiet)
    start, steps, shown = time.perf_counter(), 0, 0.0
    say(f"{0:4.0f} s, {0:6} steps: perplexity {first:9.1f}")
    while (passed := time.perf_counter() - start) < seconds:
        batch = windows[rng.integers(0, len(windows), options.rows)]
        model.step(np.ascontiguousarray(batch[:, :-1]), np.ascontiguousarray(batch[:, -1]))
        steps += 1
        progress(passed)
        if passed - shown >= seconds / 8:
            found, shown = perplexity(), passed
            say(f"{passed:4.0f} s, {steps:6} steps: perplexity {found:9.1f}")
    found = perplexity()
    progress(seconds)
    say(f"{time.perf_counter() - start:4.0f} s, {steps:6} steps: perplexity {found:9.1f}")
    return first, found


def _progress(seconds: float, quiet: bool) -> tuple[Any, Any]:
    """How to print a line, and how to show the seconds that have passed."""
    try:
        from tqdm import tqdm
    except ImportError:
        quiet = True
    if quiet:
        return lambda line: print(line, flush=True), lambda passed: None
    bar = tqdm(total=round(seconds), unit="s", bar_format="{l_bar}{bar}| {n:.0f} of {total} s")

    def progress(passed: float) -> None:
        bar.update(min(passed, bar.total) - bar.n)

    return lambda line: tqdm.write(line), progress


# Memory


def peak_of_a_step(options: argparse.Namespace) -> int:
    """Bytes by which the memory in use grows, at most, in one training step of this process."""
    model, rng = trainer(options), np.random.default_rng(0)
    before, after = (
        rng.integers(0, options.classes, (options.rows, CONTEXT)),
        rng.integers(0, options.classes, options.rows),
    )
    model.step(before[:8], after[:8])  # what libraries do only once
    if options.backend == "cupy":
        import cupy

        pool = cupy.get_default_memory_pool()
        pool.free_all_blocks()
        held = pool.used_bytes()
        model.step(before, after)
        return int(pool.total_bytes() - held)
    if options.backend == "torch" and model.device == "cuda":
        model.torch.cuda.reset_peak_memory_stats()
        held = model.torch.cuda.memory_allocated()
        model.step(before, after)
        return int(model.torch.cuda.max_memory_allocated() - held)
    status = Path("/proc/self/status")
    if not status.exists():
        raise SystemExit("the memory of this process can be measured on Linux only")
    Path("/proc/self/clear_refs").write_text("5")
    held = int(re.search(r"VmRSS:\s+(\d+)", status.read_text())[1])
    model.step(before, after)
    return (int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1]) - held) << 10


def compare_memory(arguments: list[str], rows: int) -> None:
    given = [argument for argument in arguments if argument != "--two-steps"]
    for name, more in (("linear_cross_entropy", []), ("two steps", ["--two-steps"])):
        command = [sys.executable, __file__, *given, *more, "--peak"]
        done = subprocess.run(command, capture_output=True, text=True)
        said = f"{int(done.stdout) / 2**20:.0f} MiB" if done.returncode == 0 else done.stderr.strip().splitlines()[-1]
        print(f"peak memory of a training step of {rows} rows, {name}: {said}", flush=True)


def main(arguments: list[str] | None = None) -> tuple[float, float]:
    """Train, print, and return the perplexity at the start and at the end."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--backend", choices=("numpy", "cupy", "torch"), default="numpy")
    parser.add_argument("--minutes", type=float, default=2.0)
    parser.add_argument("--classes", type=int, default=24000)
    parser.add_argument("--rows", type=int, default=2048, help="positions per step")
    parser.add_argument("--budget", help="memory_budget of linear_cross_entropy, such as 64MiB")
    parser.add_argument("--two-steps", action="store_true", help="make all logits")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.add_argument("--peak", action="store_true", help="only measure the memory of a step, in bytes")
    options = parser.parse_args(arguments)
    if options.peak:
        print(peak_of_a_step(options))
        return 0.0, 0.0
    first, last = train(options)
    print(f"perplexity {first:.1f} at the start, {last:.1f} at the end")
    compare_memory(arguments, options.rows)
    return first, last


if __name__ == "__main__":
    main()
