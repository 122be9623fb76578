"""The host time of a call on CuPy arrays, with kernel launches that do nothing: no GPU is needed.

    python -m bench host

The arrays are CuPy's own, in memory that is never read, and arguments are passed the way CuPy passes them. `first` is a
call that goes through every check, `again` a repeated one. To compare two commits, alternate between them.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # this checkout, whatever is installed; its tests' stand-ins

ROWS, CLASSES = 128, 10
TURNS, CALLS = 15, 100


class Silent:
    """A stand-in for `cupy.RawKernel`."""

    launches = 0

    def __init__(self, kernel: Any) -> None:
        import cupy

        self.taken = cupy.cuda.function.CNumpyArray

    def __call__(self, grid: Any, block: Any, args: Any) -> None:
        for argument in args:
            self.taken(argument)
        Silent.launches += 1


def measure() -> dict[str, dict[str, float]]:
    """Microseconds per call, and the number of its launches."""
    import cupy
    from support import hosted

    from xent_array import _again, cross_entropy, cross_entropy_value_and_grad
    from xent_array._engines import ENGINES, cuda

    found = {}
    with hosted.cupy_on_host(Silent), mock.patch.dict(ENGINES, cuda=cuda.Cuda(hosted.Hosted())):
        x, out = (cupy.ndarray((ROWS, CLASSES), "float32") for _ in range(2))
        y = cupy.ndarray(ROWS, "int64")
        calls: dict[str, Callable[[], Any]] = {
            "none, loss and gradient into out=": lambda: cross_entropy_value_and_grad(x, y, reduction="none", out=out),
            "mean, loss and gradient": lambda: cross_entropy_value_and_grad(x, y),
            "mean, loss and gradient into out=": lambda: cross_entropy_value_and_grad(x, y, out=out),
            "mean, loss": lambda: cross_entropy(x, y),
        }

        def first(call: Callable[[], Any]) -> Callable[[], Any]:
            def made() -> None:
                _again.KINDS.clear()
                call()

            return made

        for name, call in calls.items():
            for _ in range(3):
                call()
            Silent.launches = 0
            call()
            found[name] = {"launches": float(Silent.launches), "again": timed(call), "first": timed(first(call))}
    return found


def timed(call: Callable[[], Any]) -> float:
    """Microseconds per call, the median of many turns."""
    turns = []
    for _ in range(TURNS):
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        turns.append((time.perf_counter() - start) / CALLS * 1e6)
    return statistics.median(turns)


def main(arguments: list[str]) -> int:
    argparse.ArgumentParser(prog="python -m bench host", description=(__doc__ or "").partition("\n")[0]).parse_args(
        arguments
    )
    for name, row in measure().items():
        print(f"{name:36} again {row['again']:6.1f} µs, first {row['first']:6.1f} µs, {row['launches']:.0f} launches")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
