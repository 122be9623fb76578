"""What is installed here and which engine handles what, with the worked example and a short timing on each engine.

Usage: python -m xent_array [--json | --explain SHAPE:DTYPE[@axisN][@smNN][+OPTION] | --version
                            | --explain-linear ROWSxFEATURESxCLASSES:DTYPE[@BUDGET]]
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from . import __version__, _engines, cross_entropy, cross_entropy_value_and_grad
from ._engines import ENGINES, _model, cpu
from ._engines.cpu import cores
from ._linear import plan as planning
from ._problem import problem_without_target
from ._rows import Rows

PACKAGES = (
    "numpy",
    "array-api-compat",
    "llvmlite",
    "ml_dtypes",
    "cupy-cuda12x",
    "cupy-cuda13x",
    "cupy",
    "torch",
    "jax",
    "dask",
)
BORROWED = {"PyTorch": "torch", "JAX": "jax"}  # module names of libraries whose arrays' memory the engines can use
LOGITS = [[2.0, 1.0, 0.1], [0.1, 2.0, 1.9]]
TARGET = [[0, 1, 0], [1, 0, 0]]
SIZE = (512, 32000)  # a batch of token positions and a vocabulary: 66 MB of float32
TOLERANCE = 1e-6  # for the worked example in float32, where all numbers are below 3


def main(arguments: list[str] | None = None) -> int:
    """Print the report; returns 0 if every check passes and 1 otherwise."""
    parser = argparse.ArgumentParser(prog="python -m xent_array", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--version", action="version", version=f"xent_array {__version__}")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    parser.add_argument(
        "--explain",
        metavar="PROBLEM",
        help=f"what the CUDA engine would launch, and how long that takes: {_model.LIKE}",
    )
    parser.add_argument(
        "--explain-linear",
        metavar="PROBLEM",
        help=f"the buffers of linear_cross_entropy_value_and_grad: {planning.LIKE}",
    )
    given = parser.parse_args(arguments)
    for problem, explain in ((given.explain, _model.explain), (given.explain_linear, planning.explain)):
        if problem is None:
            continue
        try:
            print(explain(problem))
        except ValueError as error:
            parser.error(str(error))
        return 0
    as_json = given.json
    report = gather()
    print(json.dumps(report, indent=2) if as_json else text(report))
    return 0 if report["ok"] else 1


def gather() -> dict[str, Any]:
    """The contents of the report, as plain data."""
    results = []
    for library, xp, missing in _libraries():
        for name in ("dask",) if library == "Dask" else (name for name in ENGINES if name != "dask"):
            reason = missing or ENGINES[name].declines(_rows(xp))
            entry = {"engine": name, "library": library, "available": reason is None, "reason": reason}
            if reason is None:
                entry |= _worked_example(name, xp) | ({} if name == "dask" else _timing(name, xp))
            results.append(entry)
    compiled = cpu.found_loops()  # after the calls above, of which the first compiles
    without = compiled if isinstance(compiled, str) else None
    return {
        "xent_array": __version__,
        "folder": str(Path(__file__).parent),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "threads": cores.threads(),
        "cpu engine": {"loops": "NumPy" if without else "compiled by LLVM", "reason": without},
        "packages": {name: _version(name) for name in PACKAGES},
        "borrowed": {name: _engines_of_memory() for name, module in BORROWED.items() if _is_there(module)},
        "timed": {"rows": SIZE[0], "classes": SIZE[1], "dtype": "float32"},
        "engines": results,
        "ok": all(entry["right"] for entry in results if entry["available"]),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _is_there(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _engines_of_memory() -> dict[str, dict[str, str | None]]:
    """For a library whose arrays' memory can be borrowed: the engine in host memory and on a GPU, and why."""
    without = None if _is_there("cupy") else "CuPy is not installed"
    found: dict[str, dict[str, str | None]] = {
        "host memory": {"engine": "cpu", "reason": None},
        "a GPU": {"engine": "generic" if without else "cuda", "reason": without},
    }
    if not _is_there("ml_dtypes"):
        found["bfloat16"] = {"engine": "generic", "reason": "ml_dtypes is not installed"}
    return found


def _libraries() -> list[tuple[str, Any, str | None]]:
    """(name, namespace, reason why it cannot be used here) of the libraries whose arrays are tried."""
    found: list[tuple[str, Any, str | None]] = [("NumPy", np, None), ("CuPy", None, "CuPy is not installed")]
    if _is_there("cupy"):
        import cupy

        found[1] = "CuPy", cupy, None if cupy.is_available() else "CuPy finds no CUDA device, or no driver"
    if not _is_there("dask"):
        return [*found, ("Dask", None, "Dask is not installed")]
    try:
        import array_api_compat.dask.array as dask_array
    except Exception as error:  # from whatever else Dask imports
        return [*found, ("Dask", None, f"Dask cannot be imported: {error}")]
    return [*found, ("Dask", dask_array, None)]


def _rows(xp: Any) -> Rows:
    """The logits of the worked example, as an engine takes them."""
    return problem_without_target(xp.asarray(LOGITS, dtype=xp.float32), -1).rows


def _on_host(array: Any) -> Any:
    array = array.compute() if hasattr(array, "compute") else array
    return np.asarray(array.get() if hasattr(array, "get") else array, dtype=np.float64)


def _worked_example(engine: str, xp: Any) -> dict[str, Any]:
    """The example from the README in float32, and its distance from the float64 result."""
    logits, target = xp.asarray(LOGITS, dtype=xp.float32), xp.asarray(TARGET)
    p = xp.reshape(_engines.softmax(ENGINES[engine], _rows(xp), log=False), logits.shape)
    rows = cross_entropy(logits, target, reduction="none", engine=engine)
    mean, grad = cross_entropy_value_and_grad(logits, target, engine=engine)
    got = {"softmax": p, "rows": rows, "mean": mean, "gradient": grad}
    exp = np.exp(np.asarray(LOGITS))
    sigma = exp / exp.sum(axis=1, keepdims=True)
    h = -np.log(sigma[np.asarray(TARGET) == 1])
    truth = {"softmax": sigma, "rows": h, "mean": h.mean(), "gradient": (sigma - TARGET) / 2}
    error = max(float(np.abs(_on_host(got[key]) - truth[key]).max()) for key in got)
    return {key: _on_host(value).tolist() for key, value in got.items()} | {"error": error, "right": error <= TOLERANCE}


def _timing(engine: str, xp: Any) -> dict[str, float]:
    """Loss and gradient at one size compared with a copy of the logits, which reads and writes as many numbers."""
    logits = xp.asarray(np.random.default_rng(0).standard_normal(SIZE, dtype=np.float32))
    target = xp.asarray(np.random.default_rng(1).integers(SIZE[1], size=SIZE[0]))
    out = xp.empty_like(logits)
    wait: Callable[[], None] = (lambda: None) if xp is np else xp.cuda.get_current_stream().synchronize

    def copy() -> None:
        out[...] = logits

    def loss_and_grad() -> None:
        cross_entropy_value_and_grad(logits, target, engine=engine, out=out)

    times: dict[str, list[float]] = {"copy": [], "loss_and_grad": []}
    for turn in range(4):
        for work in (copy, loss_and_grad):
            wait()
            start = time.perf_counter()
            work()
            wait()
            if turn:  # the first turn is a warm-up
                times[work.__name__].append(time.perf_counter() - start)
    moved = 2 * logits.nbytes / 1e9
    took, copied = (statistics.median(times[key]) for key in ("loss_and_grad", "copy"))
    return {"ms": took * 1e3, "GB/s": moved / took, "copy GB/s": moved / copied}


def text(report: dict[str, Any]) -> str:
    """The report as text."""
    packages = ", ".join(f"{name} {version}" for name, version in report["packages"].items() if version)
    why = report["cpu engine"]["reason"]
    faster = ['faster on NumPy arrays: pip install ".[cpu]" brings LLVM, which compiles these loops for this machine']
    absent = ", ".join(name for name, version in report["packages"].items() if not version)
    lines = [
        "xent_array {xent_array}, Python {python}, {machine}, {threads} {of_threads}".format(
            **report, of_threads="thread" if report["threads"] == 1 else "threads"
        ),
        "runs from: {folder}".format(**report),
        f"installed: {packages}",
        f"not installed: {absent}",
        "loops of engine 'cpu': {loops}".format(**report["cpu engine"]) + (f", because {why}" if why else ""),
        *(faster if report["packages"]["llvmlite"] is None else []),
    ]
    lines += [_words(name, places) for name, places in report["borrowed"].items()]
    for entry in report["engines"]:
        lines += ["", f"engine {entry['engine']!r} on {entry['library']} arrays: " + _verdict(entry)]
        if entry["available"]:
            lines += [
                f"  softmax   {_numbers(entry['softmax'])}",
                f"  H         {_numbers(entry['rows'])}    mean {entry['mean']:.3f}",
                f"  gradient  {_numbers(entry['gradient'])}",
                f"  largest error against float64: {entry['error']:.1e}",
            ]
        if "ms" in entry:
            size = f"{report['timed']['rows']} x {report['timed']['classes']} {report['timed']['dtype']}"
            speed = f"{entry['ms']:.1f} ms, {entry['GB/s']:.1f} GB/s (a copy: {entry['copy GB/s']:.1f} GB/s)"
            lines.append(f"  loss and gradient of {size}: {speed}")
    return "\n".join(lines)


def _words(library: str, places: dict[str, Any]) -> str:
    told = (
        f"{place}: engine {found['engine']!r}" + (f", because {found['reason']}" if found["reason"] else "")
        for place, found in places.items()
    )
    return f"{library} arrays, {'; '.join(told)}"


def _verdict(entry: dict[str, Any]) -> str:
    if not entry["available"]:
        return f"not available: {entry['reason']}"
    return "right" if entry["right"] else f"WRONG by {entry['error']:.1e}"


def _numbers(values: Any) -> str:
    return f"[{', '.join(map(_numbers, values))}]" if isinstance(values, list) else f"{values:.3f}"


if __name__ == "__main__":
    sys.exit(main())
