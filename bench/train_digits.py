"""Trains a softmax classifier on scikit-learn's handwritten digits with xent_array alone.

    python bench/train_digits.py [--backend numpy|cupy] [--epochs N]

Needs scikit-learn for the data and tqdm for the progress bar; both come with the `test` extra.
The model is one layer, logits = X·W + b; the loss and its gradient are cross_entropy_value_and_grad, and the
chain rule does the rest: dW = Xᵀ·dlogits. Nothing below knows on which kind of array it runs.
"""

from __future__ import annotations

import argparse
import importlib
import time
from typing import Any

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

from xent_array import cross_entropy, cross_entropy_value_and_grad

Array = Any


def train(xp: Any, epochs: int, *, quiet: bool = False) -> tuple[float, float, float]:
    """Mini-batch gradient descent with momentum; (held-out loss, held-out accuracy, seconds)."""
    pixels, digits = load_digits(return_X_y=True)
    split = train_test_split(pixels / 16, digits, test_size=0.25, stratify=digits, random_state=0)
    x, x_held, y, y_held = (xp.asarray(part, dtype=xp.float32 if part.ndim == 2 else xp.int64) for part in split)

    weights, bias = xp.zeros((x.shape[1], 10), dtype=xp.float32), xp.zeros(10, dtype=xp.float32)
    parameters = [weights, bias]
    velocities = [xp.zeros_like(weights), xp.zeros_like(bias)]
    rng, batch, rate, momentum = np.random.default_rng(0), 64, 0.1, 0.9

    start = time.perf_counter()
    progress = tqdm(range(epochs), unit="epoch", disable=quiet)
    for _ in progress:
        order = xp.asarray(rng.permutation(len(y)))
        for begin in range(0, len(y), batch):
            rows = order[begin : begin + batch]
            loss, dlogits = cross_entropy_value_and_grad(x[rows] @ weights + bias, y[rows], label_smoothing=0.01)
            for value, velocity, grad in zip(
                parameters, velocities, (x[rows].T @ dlogits, dlogits.sum(axis=0)), strict=True
            ):
                velocity *= momentum
                velocity -= rate * grad
                value += velocity
        progress.set_postfix(loss=f"{float(loss):.3f}")
    seconds = time.perf_counter() - start

    held = x_held @ weights + bias
    accuracy = float((held.argmax(axis=1) == y_held).mean())
    return float(cross_entropy(held, y_held)), accuracy, seconds


def main(arguments: list[str] | None = None) -> float:
    """Train, print, and return the held-out accuracy."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--backend", choices=("numpy", "cupy"), default="numpy")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    options = parser.parse_args(arguments)
    loss, accuracy, seconds = train(importlib.import_module(options.backend), options.epochs, quiet=options.quiet)
    print(f"held-out loss {loss:.3f}, accuracy {accuracy:.1%}, {options.epochs} epochs in {seconds:.1f} s")
    return accuracy


if __name__ == "__main__":
    main()
