"""Draws loss.svg, which shows what the loss is made of, with `python docs/loss.py`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from xent_array import cross_entropy_value_and_grad, softmax

FILE = Path(__file__).with_suffix(".svg")
LOGITS, LABEL = np.array([2, 1, 0.1]), 1  # the first row of the worked example
BLUE, ORANGE, GREY = "#0072b2", "#d55e00", "#777777"


def figure() -> Any:
    """Three panels: the logits of a row, their softmax beside the target, the gradient."""
    import matplotlib
    from matplotlib.figure import Figure

    p = softmax(LOGITS)
    loss, grad = cross_entropy_value_and_grad(LOGITS, LABEL)
    matplotlib.rcParams.update({"svg.hashsalt": "docs", "font.size": 10, "axes.axisbelow": True})
    drawn = Figure(figsize=(8, 2.6), layout="constrained", facecolor="white")
    panels = drawn.subplots(1, 3)
    classes = np.arange(3)
    panels[0].bar(classes, LOGITS, color=GREY, width=0.6)
    panels[0].set_title("logits x", loc="left", fontsize=11)
    panels[1].bar(classes, p, color=BLUE, width=0.6)
    panels[1].bar(LABEL, 1, color="none", edgecolor=ORANGE, linewidth=1.5, width=0.75)
    panels[1].set_title("softmax p, and the target q", loc="left", fontsize=11)
    panels[1].annotate(
        f"loss = -log {p[LABEL]:.3f}\n= {loss:.3f}", (LABEL + 0.45, 0.72), color=ORANGE, annotation_clip=False
    )
    panels[2].bar(classes, grad, color=np.where(classes == LABEL, ORANGE, BLUE), width=0.6)
    panels[2].set_title("gradient p - q", loc="left", fontsize=11)
    for panel, values in zip(panels, (LOGITS, p, grad), strict=True):
        panel.spines[["top", "right"]].set_visible(False)
        panel.axhline(0, color="black", linewidth=0.8)
        panel.set_xticks(classes, ["class 0", "class 1\n(the label)", "class 2"])
        panel.margins(y=0.18)
        for k, value in enumerate(values):
            panel.annotate(
                f"{value:.3g}" if panel is panels[0] else f"{value:.3f}",
                (k, value), (0, 3 if value >= 0 else -3), textcoords="offset points",
                ha="center", va="bottom" if value >= 0 else "top",
            )  # fmt: skip
    return drawn


def main() -> None:
    """Write the file."""
    figure().savefig(FILE, metadata={"Date": None})
    FILE.write_text(re.sub(r"[ \t]+$", "", FILE.read_text(), flags=re.MULTILINE))


if __name__ == "__main__":
    main()
