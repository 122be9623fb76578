"""Loss and gradient against PyTorch on the CPU, in one run: the same logits, as many threads, turn by turn.

    python bench/compare_torch.py [--threads N]

Needs torch. Prints, for each size in float32, the median times of PyTorch (cross_entropy and backward), of
cross_entropy_value_and_grad into a fresh array and into `out=`, and of a copy of the logits, and PyTorch's time
divided by ours. Results are compared before anything is timed.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from tqdm import tqdm

from xent_array import cross_entropy_value_and_grad

SIZES = [(32768, 1000), (1024, 32000), (512, 128256), (8192, 256), (4096, 10), (32, 10)]
SECONDS = 6  # for each size


def medians(work: dict[str, Callable[[], object]], seconds: float) -> dict[str, float]:
    """Median seconds of each, taken in turn, until the time is up; a first round warms up."""
    times: dict[str, list[float]] = {name: [] for name in work}
    for function in work.values():
        function()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times["copy"]) < 5:
        for name, function in work.items():
            start = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(taken) for name, taken in times.items()}


def compare(rows: int, classes: int) -> dict[str, float]:
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((rows, classes), dtype=np.float32)
    labels = rng.integers(classes, size=rows)
    out, copied = np.empty_like(logits), np.empty_like(logits)
    torch_logits, torch_labels = torch.from_numpy(logits), torch.from_numpy(labels)

    def peer() -> torch.Tensor:
        leaf = torch_logits.detach().requires_grad_()
        torch.nn.functional.cross_entropy(leaf, torch_labels).backward()
        assert leaf.grad is not None
        return leaf.grad

    np.testing.assert_allclose(
        cross_entropy_value_and_grad(logits, labels)[1], peer().numpy(), rtol=1e-4, atol=1e-6 / rows
    )
    return medians(
        {
            "torch": peer,
            "fresh": lambda: cross_entropy_value_and_grad(logits, labels),
            "out": lambda: cross_entropy_value_and_grad(logits, labels, out=out),
            "copy": lambda: np.copyto(copied, logits),
        },
        SECONDS,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    threads = parser.parse_args().threads
    torch.set_num_threads(threads)
    os.environ["XENT_ARRAY_NUM_THREADS"] = str(threads)
    taken = {size: compare(*size) for size in tqdm(SIZES, unit="size", leave=False)}
    print(f"torch {torch.__version__}, numpy {np.__version__}, {threads} threads, float32, median ms")
    print(f"{'rows x classes':>16} {'torch':>9} {'fresh':>9} {'out=':>9} {'copy':>9}   torch/fresh  torch/out=")
    for (rows, classes), t in taken.items():
        ms = " ".join(f"{t[name] * 1e3:9.3f}" for name in ("torch", "fresh", "out", "copy"))
        print(f"{f'{rows} x {classes}':>16} {ms} {t['torch'] / t['fresh']:12.2f} {t['torch'] / t['out']:11.2f}")


if __name__ == "__main__":
    main()
