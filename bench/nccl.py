"""Classes spread over two GPUs with NCCL: the same results as on one, and the time of a call beside its exchange.

    python -m bench.nccl              on a machine with two GPUs; says so and stops where there are fewer
    python -m bench.nccl --quick      checks only

One process per GPU. Prints a JSON line for each problem, and exits 1 if a result is wrong.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # the checkout, whatever is installed

from xent_array import cross_entropy_value_and_grad, row_stats  # noqa: E402
from xent_array.parallel import VocabParallel  # noqa: E402

GPUS = 2
CHECKED = ((300, 1000), (64, 50257), (3, 700_001), (4000, 13))  # rows, classes
TIMED = ((4096, 50257), (8192, 128256), (256, 128256), (65536, 1000))
DTYPES = ("float32", "float16")
OPTIONS: tuple[dict[str, Any], ...] = (
    {}, {"weight": True, "sample_weight": True, "reduction": "sum"}, {"softcap": 5.0, "z_loss": 1e-3},
    {"label_smoothing": 0.1, "weight": True, "reduction": "none"},
)  # fmt: skip
CALLS, ROUNDS = 10, 7


def reason() -> str | None:
    """Why nothing can run here; None if it can."""
    try:
        import cupy
    except ImportError as error:
        return f"CuPy cannot be imported ({error})"
    if not cupy.is_available():
        return "CuPy finds no CUDA device, or no driver"
    count = cupy.cuda.runtime.getDeviceCount()
    if count < GPUS:
        return f"this needs {GPUS} GPUs, and the machine has {count}"
    from cupy.cuda import nccl

    return None if nccl.available else "CuPy finds no NCCL: pip install nvidia-nccl-cu13"


def problem(
    rows: int, classes: int, dtype: str, options: dict[str, Any]
) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """(logits, labels, options), the same on every GPU."""
    rng = np.random.default_rng([rows, classes])
    logits = (3 * rng.standard_normal((rows, classes), np.float32)).astype(dtype)
    labels = rng.integers(0, classes, rows)
    labels[::7] = -100
    arrays = {"weight": rng.random(classes, np.float32), "sample_weight": rng.random(rows, np.float32)}
    return logits, labels, {name: arrays.get(name, value) for name, value in options.items()}


def here(communicator: Any, classes: int) -> tuple[int, int]:
    """The slice of this rank."""
    step = -(-classes // communicator.size())
    return min(classes, communicator.rank_id() * step), min(classes, (communicator.rank_id() + 1) * step)


def checked(communicator: Any, shapes: tuple[tuple[int, int], ...] = CHECKED) -> Iterator[dict[str, Any]]:
    """For each problem, how far loss and gradient are from those of one GPU, in the largest entry's eps."""
    import cupy

    for (rows, classes), dtype, options in itertools.product(shapes, DTYPES, OPTIONS):
        x, y, given = problem(rows, classes, dtype, options)
        given = {name: cupy.asarray(v) if isinstance(v, np.ndarray) else v for name, v in given.items()}
        logits, labels = cupy.asarray(x), cupy.asarray(y)
        loss, grad = cross_entropy_value_and_grad(logits, labels, **given)
        start, stop = here(communicator, classes)
        engine = VocabParallel(communicator, start, classes)
        part = cupy.ascontiguousarray(logits[:, start:stop])
        mine, of_slice = cross_entropy_value_and_grad(part, labels, engine=engine, **given)
        off = [_off(mine, loss, "float32"), _off(of_slice, grad[:, start:stop], dtype)]
        named = {name: value for name, value in given.items() if name != "reduction"}
        stats, whole = row_stats(part, labels, engine=engine, **named), row_stats(logits, labels, **named)
        right = bool((stats.correct == whole.correct).all()) and max(off) < 64
        yield {
            "problem": f"{rows}x{classes}", "dtype": dtype, "options": " ".join(options) or "none",
            "loss_off": off[0], "grad_off": off[1], "right": right,
        }  # fmt: skip


def _off(found: Any, wanted: Any, dtype: str) -> float:
    """The largest difference, in eps of the largest number."""
    found, wanted = found.get().astype(np.float64), wanted.get().astype(np.float64)
    if not wanted.size:
        return 0.0
    return float(np.abs(found - wanted).max() / (np.finfo(dtype).eps * np.abs(wanted).max()))


def timed(communicator: Any, shapes: tuple[tuple[int, int], ...] = TIMED) -> Iterator[dict[str, Any]]:
    """For each problem, microseconds of a call, of the exchange alone, and of the slice alone as if it were all."""
    import cupy

    from xent_array._engines import cuda
    from xent_array._engines.parallel import device
    from xent_array._engines.parallel.exchange import Nccl

    exchange, launcher = Nccl(communicator), cuda.engine.launcher
    for (rows, classes), dtype in itertools.product(shapes, DTYPES):
        start, stop = here(communicator, classes)
        part = cupy.random.standard_normal((rows, stop - start), dtype=np.float32).astype(dtype)
        labels = cupy.asarray(np.random.default_rng(0).integers(0, classes, rows))
        inside, out = labels % (stop - start), cupy.empty_like(part)
        engine, form = VocabParallel(communicator, start, classes), device.Form(4, rows, "float32")
        sent, received = (cupy.zeros((n, form.length), np.float32) for n in (1, exchange.size))
        yield {
            "problem": f"{rows}x{classes}", "dtype": dtype, "gpus": exchange.size,
            "call_us": _microseconds(partial(cross_entropy_value_and_grad, part, labels, engine=engine, out=out)),
            "exchange_us": _microseconds(partial(exchange.gather, sent, received, launcher)),
            "slice_alone_us": _microseconds(partial(cross_entropy_value_and_grad, part, inside, out=out)),
        }  # fmt: skip


def _microseconds(call: Callable[[], object]) -> float:
    """Of one call, in the median of some rounds; all ranks make the same calls."""
    import cupy

    wait = cupy.cuda.get_current_stream().synchronize
    found = []
    for _ in range(ROUNDS + 1):  # the first compiles
        wait()
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        wait()
        found.append((time.perf_counter() - start) / CALLS * 1e6)
    return round(statistics.median(found[1:]), 1)


def work(rank: int, identity: str, quick: bool) -> int:
    """What the process of one GPU does."""
    import cupy
    from cupy.cuda import nccl

    cupy.cuda.Device(rank).use()
    told = tuple(value - 256 if value > 127 else value for value in bytes.fromhex(identity))
    communicator = nccl.NcclCommunicator(GPUS, told, rank)
    wrong = 0
    for line in checked(communicator):
        wrong += not line["right"]
        print(json.dumps({"rank": rank, **line}), flush=True)
    for line in () if quick else timed(communicator):
        if rank == 0:
            print(json.dumps(line), flush=True)
    return int(wrong > 0)


def main(arguments: list[str]) -> int:
    """Starts a process for each GPU."""
    parser = argparse.ArgumentParser(prog="python -m bench.nccl", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="check only")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--identity", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.rank is not None:
        return work(given.rank, given.identity, given.quick)
    if (why := reason()) is not None:
        print(f"skipped: {why}")
        return 0
    from cupy.cuda import nccl

    identity = bytes(value % 256 for value in nccl.get_unique_id()).hex()
    command = [sys.executable, "-m", "bench.nccl", "--identity", identity, *(["--quick"] if given.quick else [])]
    started = [subprocess.Popen([*command, "--rank", str(rank)], cwd=ROOT) for rank in range(GPUS)]
    return max(abs(process.wait()) for process in started)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
