"""Linear cross-entropy on a GPU: memory and time of loss and gradients, against PyTorch and others' kernels.

    python -m bench.linear_gpu              the head of Gemma 2 2B, 8192 rows, bfloat16
    python -m bench.linear_gpu --dry-run    what would run, and the plan of this library; needs no GPU

Tensors of PyTorch, differentiated by `backward()`. What is not installed, or fails, is listed with the reason. Memory
is the most that PyTorch's allocator has given out during a run, less what was there before and the gradients.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from typing import Any

from xent_array._linear import plan as planning

ROWS, FEATURES, CLASSES, DTYPE = 8192, 2304, 256000, "bfloat16"
RUNS = 5
Loss = Callable[[Any, Any, Any], Any]  # of hidden, weight and labels


def ours() -> Loss:
    from xent_array import linear_cross_entropy

    return linear_cross_entropy


def two_steps() -> Loss:
    from torch.nn import functional

    return lambda hidden, weight, labels: functional.cross_entropy((hidden @ weight.T).float(), labels)


def compiled() -> Loss:
    import torch

    return torch.compile(two_steps())


def torchs_own() -> Loss:
    import torch

    options = torch.nn.LinearCrossEntropyOptions()
    return lambda *args: torch.nn.functional.linear_cross_entropy(*args, options=options)


def liger() -> Loss:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss()
    return lambda hidden, weight, labels: loss(weight, hidden, labels)


def cut() -> Loss:
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy


def quack() -> Loss:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return lambda hidden, weight, labels: chunked_linear_cross_entropy(hidden, weight, labels)


WAYS: dict[str, Callable[[], Loss]] = {
    "xent_array": ours,
    "PyTorch, two steps": two_steps,
    "PyTorch, two steps, compiled": compiled,
    "PyTorch, its own chunks": torchs_own,
    "Liger": liger,
    "cut-cross-entropy": cut,
    "QuACK": quack,
}


def measure(make: Callable[[], Loss]) -> dict[str, Any]:
    """Milliseconds and bytes of loss and gradients."""
    import torch

    generator = torch.Generator("cuda").manual_seed(0)
    given = {"device": "cuda", "dtype": getattr(torch, DTYPE), "generator": generator}
    hidden, weight = torch.randn(ROWS, FEATURES, **given), torch.randn(CLASSES, FEATURES, **given)
    weight *= FEATURES**-0.5
    labels = torch.randint(0, CLASSES, (ROWS,), device="cuda", generator=generator)
    loss_of, times, peaks, value = make(), [], [], 0.0
    for _ in range(RUNS + 1):
        leaves = [hidden.detach().requires_grad_(), weight.detach().requires_grad_()]
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        loss = loss_of(*leaves, labels)
        loss.backward()
        stop.record()
        torch.cuda.synchronize()
        gradients = sum(leaf.grad.nbytes for leaf in leaves)
        peaks.append(torch.cuda.max_memory_allocated() - before - gradients)
        times.append(start.elapsed_time(stop))
        value = loss.item()
    return {"loss": value, "ms": statistics.median(times[1:]), "memory": max(peaks[1:])}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.linear_gpu", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--dry-run", action="store_true", help="print what would run, and the plan")
    given = parser.parse_args(arguments)
    print(planning.explain(f"{ROWS}x{FEATURES}x{CLASSES}:{DTYPE}+gpu"))
    for name, make in WAYS.items():
        if given.dry_run:
            print(name)
            continue
        try:
            found = measure(make)
        except Exception as error:  # whatever a peer raises
            found = {"failed": f"{type(error).__name__}: {error}".partition("\n")[0]}
        print(json.dumps({"way": name} | found), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
