"""Hashes of what the CPU engines answer to random problems, to see whether a change leaves every bit as it was.

    python tests/support/bits.py write FILE      one line per problem, of the package as it is
    python tests/support/bits.py check FILE      says which problems have another answer now; exits 1 if any has

The bits depend on the processor and on NumPy, so FILE is of one machine and is not kept in the repository.
"""

from __future__ import annotations

import argparse
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from xent_array import (
    cross_entropy,
    cross_entropy_grad,
    cross_entropy_value_and_grad,
    log_softmax,
    logsumexp,
    row_stats,
    softmax,
)

PROBLEMS = 2000
DTYPES = [np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32), np.dtype(np.float64)]
CLASSES = [
    1, 2, 3, 5, 8, 10, 16, 17, 31, 32, 33, 64, 65, 96, 97, 100, 128, 200, 256, 257, 500, 511, 512, 513, 1000, 1025,
    3000,
]  # fmt: skip
ROWS = {
    0: 0.02, 1: 0.06, 2: 0.06, 7: 0.1, 16: 0.1, 33: 0.15, 100: 0.15, 129: 0.1, 300: 0.1, 1000: 0.1, 4097: 0.05,
    20000: 0.01,
}  # fmt: skip
NUMBERS = 3_000_000  # of logits, at most
LAYOUTS = [
    "dense", "dense", "dense", "axis 1", "axis 1", "axis 0", "Fortran", "reversed", "sliced", "rows sliced", "swapped",
    "unaligned", "broadcast",
]  # fmt: skip
QUESTIONS = ["loss", "both", "both", "both", "in place", "out", "stats", "grad of stats", "softmax"]


def problem(rng: Any) -> tuple[str, str, Any, Any, dict[str, Any], str, Any]:
    """A question, how the logits lie, the logits, the target, the options, the number of threads, and `grad_output`."""
    dtype = DTYPES[rng.choice(4, p=[0.15, 0.15, 0.45, 0.25])]
    classes = int(rng.choice(CLASSES))
    rows = int(rng.choice([*ROWS], p=[*ROWS.values()]))
    rows = min(rows, max(1, NUMBERS // classes)) if rows else 0
    layout = str(rng.choice(LAYOUTS))
    logits, axis = laid(rng, layout, rows, classes, dtype)
    shape = tuple(n for k, n in enumerate(logits.shape) if k != axis % logits.ndim)
    options: dict[str, Any] = {"axis": axis}
    is_plain = rng.random() < 0.3
    if is_plain or rng.random() < 0.7:
        labels = [np.int64, np.int64, np.int32, np.uint8 if classes <= 256 else np.int16]
        target: Any = rng.integers(0, classes, shape).astype(rng.choice(labels))
        if not is_plain and rng.random() < 0.3:
            options["ignore_index"] = 0
        if not is_plain and rng.random() < 0.2 and target.size and target.dtype.kind == "i":
            target.reshape(-1)[rng.integers(target.size)] = -1
            options["validate"] = False
    else:
        target = rng.random(logits.shape).astype(rng.choice([np.float32, np.float64]))
        if rng.random() < 0.3:
            target[target < 0.5] = 0
    if not is_plain:
        if rng.random() < 0.3:
            options["label_smoothing"] = float(rng.choice([0.1, 1.0, 0.3]))
        if rng.random() < 0.3:
            options["weight"] = rng.choice([0.0, 1.0, 2.5, 0.3, -1.0], classes)
        if rng.random() < 0.3:
            options["sample_weight"] = rng.choice([0.0, 1.0, 1.7], shape)
        if rng.random() < 0.25:
            options["z_loss"] = 1e-3
        if rng.random() < 0.25:
            options["softcap"] = float(rng.choice([3.0, 30.0]))
    options["reduction"] = reduction = str(rng.choice(["mean", "sum", "none"]))
    threads, question = str(rng.choice([1, 2, 3])), str(rng.choice(QUESTIONS))
    upstream = None
    if rng.random() < 0.2:
        has_one = reduction != "none" or rng.random() < 0.5
        upstream = float(rng.choice([0.0, 128.0, 1e35])) if has_one else rng.standard_normal(shape)
    return question, layout, logits, target, options, threads, upstream


def laid(rng: Any, layout: str, rows: int, classes: int, dtype: Any) -> tuple[Any, int]:
    """Logits in memory as the layout says, and the axis of the classes."""
    scale = float(rng.choice([1, 4, 30]))

    def numbers(*shape: int) -> Any:
        x = (rng.standard_normal(shape) * scale).astype(dtype)
        if rng.random() < 0.15 and x.size:
            special = rng.choice([-np.inf, np.nan, np.inf, -np.inf, -np.inf])
            x.reshape(-1)[rng.integers(0, x.size, max(1, x.size // 200))] = special
        if rng.random() < 0.05 and x.size:
            x[:] = x[:1]
        return x

    if layout in ("axis 1", "axis 0"):
        inner = int(rng.choice([1, 3, 8, 20, 33, 64, 200]))
        outer = max(1, rows // inner) if rows else 0
        return (numbers(classes, rows), 0) if layout == "axis 0" else (numbers(outer, classes, inner), 1)
    x = numbers(rows, classes)
    if layout == "Fortran":
        x = np.asfortranarray(x)
    elif layout == "reversed":
        x = x[::-1, ::-1] if rng.random() < 0.5 else x[::-1]
    elif layout == "sliced":
        x = numbers(rows, 2 * classes)[:, ::2]
    elif layout == "rows sliced":
        x = numbers(2 * rows, classes + 3)[::2, 1 : classes + 1]
    elif layout == "swapped" and dtype.itemsize > 2:
        x = x.astype(dtype.newbyteorder(">"))
    elif layout == "unaligned" and x.size:
        room = np.empty(x.nbytes + 1, np.uint8)[1:].view(dtype).reshape(x.shape)
        room[...] = x
        x = room
    elif layout == "broadcast" and rows:
        x = np.broadcast_to(x[:1], x.shape)
    return x, -1


def answers(rng: Any, number: int, threads: int | None) -> Iterator[Any]:
    """All that both engines answer to one problem, each with a name."""
    question, layout, logits, target, options, drawn, upstream = problem(rng)
    os.environ["XENT_ARRAY_NUM_THREADS"] = drawn if threads is None else str(threads)
    axis = options["axis"]
    of_rows = {name: value for name, value in options.items() if name != "reduction"}
    for engine in ["cpu"] if number % 4 else ["cpu", "numpy", None]:
        given, stats_given = options | {"engine": engine}, of_rows | {"engine": engine}
        if question == "softmax":
            yield f"{engine} softmax", softmax(logits, axis=axis)
            yield f"{engine} log", log_softmax(logits, axis=axis)
            yield f"{engine} lse", logsumexp(logits, axis=axis)
        elif question == "loss":
            yield f"{engine} loss", cross_entropy(logits, target, **given)
        elif question == "stats":
            yield from ((f"{engine} {k}", part) for k, part in enumerate(row_stats(logits, target, **stats_given)))
        elif question == "grad of stats":
            stats = row_stats(logits, target, **stats_given)
            yield f"{engine} grad", cross_entropy_grad(logits, target, stats=stats, grad_output=upstream, **given)
            yield f"{engine} alone", cross_entropy_grad(logits, target, grad_output=upstream, **given)
        else:
            x, out = logits, None
            if question == "in place" and layout != "broadcast":
                out = x = logits.copy(order="K") if layout != "unaligned" else logits.copy()
            elif question == "out":
                shape, is_turned = logits.shape, not rng.random() < 0.5
                out = np.full(shape[::-1], 7, logits.dtype).T if is_turned else np.full(shape, 7, logits.dtype)
            loss, grad, *stats = cross_entropy_value_and_grad(
                x, target, out=out, grad_output=upstream, return_stats=number % 5 == 0, **given
            )
            yield f"{engine} loss", loss
            yield f"{engine} grad", grad
            yield from ((f"{engine} {k}", part) for found in stats for k, part in enumerate(found))


def digest(number: int, threads: int | None = None) -> str:
    """A hash of all answers to that problem; with another number of threads than is drawn, if one is given."""
    found = hashlib.sha256()
    for name, array in answers(np.random.default_rng([20261127, number]), number, threads):
        if array is None:
            continue
        array = np.ascontiguousarray(array)
        if array.dtype.kind == "f" or array.dtype.itemsize == 2:  # one NaN is like another
            array = np.where(array != array, array.dtype.type(np.nan), array).astype(array.dtype)
        found.update(f"{name} {array.dtype} {array.shape}".encode())
        found.update(array.tobytes())
    return found.hexdigest()[:16]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("what", choices=["write", "check"])
    parser.add_argument("file", type=Path)
    given = parser.parse_args()
    lines = [f"{number} {digest(number)}" for number in range(PROBLEMS)]
    if given.what == "write":
        given.file.write_text("\n".join(lines) + "\n")
        print(f"{len(lines)} problems")
        return 0
    before = given.file.read_text().splitlines()
    differ = [one.split()[0] for one, two in zip(before, lines, strict=True) if one != two]
    same = f"{len(lines) - len(differ)} of {len(lines)} problems have the same bits"
    print(same + (f"; not {', '.join(differ)}" if differ else ""))
    return bool(differ)


if __name__ == "__main__":
    raise SystemExit(main())
