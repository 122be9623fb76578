"""The loops over logits, which LLVM compiles; no other code of the engine is compiled.

There is one loop for each memory layout of rows:

    contiguous     rows with contiguous classes, one at a time
    transposed     the same with few classes: tiles of rows are transposed, so that each row occupies a vector lane
    strided        adjacent rows with their classes apart, each in a vector lane as it is

Each does everything that is asked of a row while it is in cache, by the same arithmetic in the same order. `build`
makes a function of machine code of each, which Python calls with one tuple of arrays:

    arguments   one record of `Arguments`
    x           the logits; 16-bit floats as uint16
    label       the class of each row, NO_LABEL if it has none, ELSEWHERE if it is not among these classes; empty if the
                target is not labels
    per_row     three kinds of numbers, each with one value per row or a single value: the target at the label
                (ON_LABEL), the factor of the loss (FACTOR) and that of the gradient (SCALE)
    q           with labels, the part of the target that label smoothing puts on each class: empty, one value, or C
                values. Without, distributions, weighted and smoothed; empty if there is no target
    answers     the loss of each row; with KNOWN or STATS, five more kinds follow: maximum, rest, gap, mass, and 1 where
                the label is the first class of the largest logit
    out         the gradient, the softmax or the log-softmax; empty if none is asked for
    workspace   bytes, as many as `workspace_size` says
    turns       empty; or the counter from which several threads that make the same call take parts of it
    sums        empty; or, where turns are of GROUP rows, the sum of the losses of each turn

The result is -1 if CHECK finds a fault, after which no turn is left; otherwise the sum of the losses with SUM, else 0;
and 0 where turns are taken. The strided loop knows neither CHECK nor SUM, and takes no turns.

This module and `memory.py` are all that code outside of this folder needs: the others need llvmlite, and are imported
to compile something.
"""

from __future__ import annotations

from typing import NamedTuple, get_type_hints

import numpy as np

from ...._rows import Array

# What is asked for, as bits of `job`
LOSS = 1
GRAD = 2
STATS = 4
LOG = 8  # log-softmax instead of the gradient
KNOWN = 16  # the stats are given
CHECK = 32  # first make sure that all labels are classes, and that rounding mode and denormals are the default
SUM = 64  # return the sum of the losses
STREAM = 128  # write the gradient with non-temporal stores
IGNORE = 256  # rows with the label `ignore_index` do not count
PLAIN = 512  # only loss and gradient, of rows with labels and no options: all that are not ignored count alike

LANES = 16  # rows per vector
FEW = 32  # up to this many classes, each is compared with the label and the argmax; beyond, those two are looked up
PARTIAL = 32  # partial sums per row
GROUP = 2048  # losses are added in groups of so many rows, and then the sums of the groups

# Labels that are no classes: the row has no target; or its label is elsewhere, and here is only what smoothing adds
NO_LABEL, ELSEWHERE = -1, -2

# Kinds of numbers in `per_row`
ON_LABEL, FACTOR, SCALE = range(3)

# Kinds of numbers in `answers`, each with one value per row, after the loss
STATS_KINDS = range(1, 5)
HIT = 5

KINDS = 12  # kinds of numbers in `tiles.State`

NAME = "entry"  # of every function in its machine code

# Where the C API has what is in a tuple, and the data, the number of axes and the shape of an array, in bytes
ITEMS, DATA = tuple.__basicsize__, object.__basicsize__
AXES, SHAPE, POINTER = DATA + 8, DATA + 16, 8

# Places in `turns`, each in a cache line of its own
NEXT, LIMIT = 8, 16  # the row that the next turn begins with; where the last one ends, or 0 if none may be taken
TURNS = 24  # its length


class Arguments(NamedTuple):
    """The scalar arguments. There are outer·inner rows; strides are in elements, and that of the inner axis is 1."""

    job: int
    outer: int
    inner: int
    classes: int
    x_outer: int
    x_class: int
    out_outer: int
    out_class: int
    width: int = 0  # rows per tile, a multiple of 16
    lead: int = 0  # rows missing from the first tile of an outer index, so that all others start at a cache line
    q_row: int = 0  # stride of the distributions
    is_half: int = 0  # 16-bit floats are float16 rather than bfloat16
    softcap: float = 0.0  # 0 for none
    z_loss: float = 0.0
    ignore_index: int = 0
    team: int = 1  # how many threads take turns
    least: int = 0  # rows per turn, at least and at most; between, a share of those that are left
    most: int = 0
    quota: int = 0  # rows after which the call returns even if some are left, so that it can be interrupted

    def record(self) -> Array:
        """The same as an array of one ARGUMENTS, for compiled code; nothing writes to it."""
        record = np.empty(1, ARGUMENTS)
        record[0] = self
        return record


_FIELDS = [(name, {int: np.int64, float: np.float64}[kind]) for name, kind in get_type_hints(Arguments).items()]
ARGUMENTS = np.dtype(_FIELDS, align=True)


def workspace_size(code: str, classes: int, width: int, itemsize: int) -> int:
    """In bytes, as the loop divides it up, for the rows of a tile and the size of a number."""
    if code == "contiguous":
        return 3 * classes * itemsize
    if code == "transposed":
        return (3 * classes + KINDS + 2) * width * itemsize + 8 * width
    return (2 * classes + 3 * KINDS + PARTIAL + 1 + 6) * width * itemsize + 8 * width
