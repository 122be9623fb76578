"""The block body of the cpu engine, compiled by Numba: the loops that touch logits, and nothing else.

Imported when first needed, and only where Numba is installed. `rows` takes rows that lie dense, one after another;
`lanes` takes many rows of few classes at once, each in a lane of the vector instructions, and `beside` rows whose
classes lie apart while the rows lie side by side. All make, in cache, everything that is asked of a row, and all by the
same arithmetic in the same order. What they are made of is in `_dense`, `_tiles` and `_vectors`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import config, njit, types
from numba.extending import overload

from . import _dense as dense
from . import _tiles as tiles
from . import _vectors as v
from ._kept import compiled_whole, kept
from ._tiles import AT_LABEL, BY, EACH, FACTOR, GAP, HALF, LABEL, LANES, MASS, OF_ROW, PART, SCALE, M
from ._vectors import PARTIAL

if config.DISABLE_JIT:
    raise ImportError("NUMBA_DISABLE_JIT is set")

FEW = 32  # classes of which each is compared with the label and the place of the maximum, rather than looked up
AT_ONCE = 16  # classes of a tile that are worked on before those of the next are read
AHEAD = 8  # how many classes before its turn a class is brought into cache
STRIP = 8  # rows of 16 bits that are widened, or narrowed, before they are turned, or after

STATS, LOSS, GRAD, LOG, KNOWN, CHECK, STREAM, SUM = 1, 2, 4, 8, 16, 32, 64, 128  # the bits of a job

_OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy", "_nrt": False, "no_cfunc_wrapper": True}
# What only compiled code calls: without the way in from Python, which takes as long to make as the rest.
_INNER = _OPTIONS | {"no_cpython_wrapper": True}
inner = njit(**_INNER)


def compiled(function: Callable[..., Any]) -> Any:
    """What Python calls, kept between processes, and compiled whole or not at all."""
    return compiled_whole(kept(njit(**_OPTIONS)(function)))


# One row, its numbers


@inner
def _without_softmax(x, step):
    """What the stats call the largest logit of a row that holds NaN or +inf or is all -inf."""
    v.make_compact()
    largest = -np.inf
    for k in range(0, x.shape[0], step):
        if x[k] != x[k]:
            return np.nan
        if x[k] > largest:
            largest = x[k]
    return largest


@inner
def _bracket(g, by, top, q, y, on_label, at):
    """coef·p - a in place of exp(x - max), for a row that has to be multiplied last: the product may be infinite.

    by is coef·p of the maximum, which has `top` itself; q what each class has, of length C, 1 or 0.
    """
    v.make_compact()
    for k in range(g.shape[0]):
        value = g[k] * by if g[k] != 0 or by != by else g[k]
        if q.shape[0]:
            value -= q[k if q.shape[0] > 1 else 0]
        g[k] = value - on_label if k == y else value
    if at >= 0:
        g[at] = top


@inner
def _are_classes(label, classes):
    v.make_compact()
    wrong = 0
    for i in range(label.shape[0]):
        wrong |= label[i] < 0 or label[i] >= classes
    return wrong == 0


# 16 bits


def _read(x, start, is_half, wide):
    """16-bit logits (as uint16) of a row into `wide`; nothing if they are wide."""
    raise NotImplementedError


@overload(_read, jit_options=_INNER)
def _read_of(x, start, is_half, wide):
    if x.dtype != types.uint16:
        return lambda x, start, is_half, wide: None
    return lambda x, start, is_half, wide: _widen(v.part(x, start, wide.shape[0]), is_half, wide)


def _write(g, is_half, out, start):
    """A row of the gradient to where it belongs, if that has 16 bits; else it is there."""
    raise NotImplementedError


@overload(_write, jit_options=_INNER)
def _write_of(g, is_half, out, start):
    if out.dtype != types.uint16:
        return lambda g, is_half, out, start: None
    return lambda g, is_half, out, start: _narrow(g, is_half, v.part(out, start, g.shape[0]))


@inner
def _widen(x, is_half, wide):
    v.make_compact()
    if is_half:
        for k in range(x.shape[0]):
            wide[k] = v.from_half(x[k])
    else:
        for k in range(x.shape[0]):
            wide[k] = v.from_bfloat(x[k])


@inner
def _narrow(values, is_half, out):
    v.make_compact()
    if is_half:
        for k in range(values.shape[0]):
            out[k] = v.to_half(values[k])
    else:
        for k in range(values.shape[0]):
            out[k] = v.to_bfloat(values[k])


# What is called


@compiled
def total(losses):
    """Their sum, in float64."""
    return dense.add_up(losses, losses.shape[0])


@compiled
def rows(
    x, x_step, count, classes, is_half, label, part, each, a, a_step, cap, z, factor, scale,
    job, stats, loss, out, out_step, work,
):  # fmt: skip
    """`count` rows, of which row i starts at x[i·x_step].

    label: the class of each row, -1 for none; part: the target on it. each: what every class has, of length 1 or C,
    or 0. a: distributions, weighted and smoothed, row i at a[i·a_step]; of length 0 where there are labels or no
    target. part, factor and scale have one number per row, or one. stats, the four kinds one after another, are read if
    job & KNOWN, and filled if job & STATS, with a fifth: 1 where the label is the first of the largest logits. If
    job & CHECK and some label is no class, nothing is done, and the answer is -1; else it is the `total` of the losses,
    if job & SUM, or 0.
    """
    v.make_compact()
    if job & CHECK and not (v.is_usual() and _are_classes(label, classes)):
        return -1.0
    kind = work.dtype.type
    wide, e, slope = v.part(work, 0, classes), v.part(work, classes, classes), v.part(work, 2 * classes, classes)
    for i in range(count):
        _read(x, i * x_step, is_half, wide)
        row = v.row(x, i * x_step, wide)
        largest = dense.top(classes, row) if job & STATS and cap > 0 else -1
        if cap > 0:
            dense.slope_of_tanh(slope, (row, cap))
            dense.tanh_of_quotient(wide, (row, cap))
            dense.multiply(wide, (wide, cap))
            row = wide
        y = label[i] if label.shape[0] else -1
        on_label = part[i if part.shape[0] > 1 else 0] if y >= 0 else kind(0)
        q = v.part(a, i * a_step, classes) if a.shape[0] else each
        g = v.row(out, i * out_step, e) if job & (GRAD | LOG) else e
        at = dense.top(classes, row)
        m = row[at]
        # Meanwhile come the next row, and where this one will go in a while.
        coming, going = (i + 1 if i + 1 < count else i) * x_step, i * out_step + dense.CHUNK
        if job & KNOWN:
            m, r, gap, mass = stats[i], stats[count + i], stats[2 * count + i], stats[3 * count + i]
            if row[at] != m:
                at = -1
            if job & GRAD:
                dense.exps(row, m if m - m == 0 else kind(0), at, g, x, coming, out, going)
        else:
            half = kind(0.5) * m
            if a.shape[0]:
                gap = kind(2 * dense.half_gaps(classes, row, (q, half, row)))
                mass = kind(dense.total(classes, row, (q,)))
            elif y >= 0:
                mass, below = on_label, half - kind(0.5) * row[y]
                gap = kind(2) * (on_label * below) if on_label != 0 and below != 0 else kind(0)
                if each.shape[0] > 1:
                    gap = kind(gap + 2 * dense.half_gaps(classes, row, (each, half, row)))
                    mass = kind(mass + dense.total(classes, row, (each,)))
                elif each.shape[0]:
                    gap = kind(gap + 2 * dense.half_gaps(classes, row, (each[0], half, row)))
                    mass = kind(float(mass) + float(each[0]) * classes)
            else:
                gap, mass = kind(0), kind(0 if label.shape[0] else 1)
            gap = gap if gap == gap else kind(np.nan)
            r = kind(dense.exps(row, m, at, g, x, coming, out, going) if m - m == 0 else np.nan)
            if r != r:
                m = kind(_without_softmax(row, 1))
                r = m - m if m != m else kind(0)
            if job & STATS:
                stats[i], stats[count + i], stats[2 * count + i], stats[3 * count + i] = m, r, gap, mass
                stats[4 * count + i] = y == (largest if cap > 0 else at)
        s = scale[i if scale.shape[0] > 1 else 0]
        a_top = on_label if y == at else kind(0)
        if at >= 0 and a.shape[0]:
            a_top = q[at]
        elif at >= 0 and y >= 0 and each.shape[0]:
            a_top += each[at if each.shape[0] > 1 else 0]
        rest = r if m - m == 0 else kind(np.nan)
        row_loss, by, top, tail = v.finish(m, rest, gap, mass, a_top, factor[i if factor.shape[0] > 1 else 0], s, z)
        if job & LOSS:
            loss[i] = row_loss
        if job & LOG:
            dense.logarithms(g, (row, m, tail))
            _write(g, is_half, out, i * out_step)
        if job & GRAD:
            if s == 0:
                dense.fill(g, (0,))
            elif abs(s) == np.inf or abs(s * mass) == np.inf or abs(kind(by)) == np.inf:
                _, by, top, _ = v.finish(m, rest, gap, mass, a_top, s, kind(1), z)
                if y < 0 and not a.shape[0]:
                    q = v.part(q, 0, 0)
                _bracket(g, kind(by), kind(top), q, y, on_label, at)
                if cap > 0:
                    dense.multiply(g, (g, slope))
                dense.multiply(g, (g, s))
            else:
                dense.scale(g, (g, kind(by) + kind(0)))
                if a.shape[0]:
                    dense.subtract_product(g, (g, q, s))
                elif y >= 0:
                    g[y] -= s * on_label
                    if each.shape[0] > 1:
                        dense.subtract_product(g, (g, each, s))
                    elif each.shape[0]:
                        dense.subtract_product(g, (g, each[0], s))
                if at >= 0:
                    g[at] = top
                if cap > 0:
                    dense.multiply(g, (g, slope))
            _write(g, is_half, out, i * out_step)
    return dense.add_up(loss, count) if job & SUM else 0.0


# Many rows at once, in a tile


def _gather(x, start, step, is_half, tile, classes, count, strip):
    """`count` rows of logits, one after another, into a tile; `strip` has room for `STRIP` of them."""
    raise NotImplementedError


@overload(_gather, jit_options=_INNER)
def _gather_of(x, start, step, is_half, tile, classes, count, strip):
    if x.dtype == types.uint16:

        def body(x, start, step, is_half, tile, classes, count, strip):
            for k in range(0, count, STRIP):
                beside = min(STRIP, count - k)
                for i in range(beside):
                    line = v.part(x, start + (k + i) * step, classes)
                    _widen(line, is_half, v.part(strip, i * classes, classes))
                tiles.turn(strip, 0, classes, beside, classes, tile, k)
    else:

        def body(x, start, step, is_half, tile, classes, count, strip):
            tiles.turn(x, start, step, count, classes, tile, 0)

    return body


def _scatter(tile, classes, each, width, y, at, is_half, out, start, step, count, strip, has_marks):
    """The numbers of `count` rows, each times its own, to where they belong; with what is none, if `has_marks`."""
    raise NotImplementedError


@overload(_scatter, jit_options=_INNER)
def _scatter_of(tile, classes, each, width, y, at, is_half, out, start, step, count, strip, has_marks):
    if out.dtype == types.uint16:

        def body(tile, classes, each, width, y, at, is_half, out, start, step, count, strip, has_marks):
            for k in range(0, count, STRIP):
                beside = min(STRIP, count - k)
                tiles.turn_back(tile, k, each, width, y, at, strip, 0, classes, beside, classes, has_marks)
                for i in range(beside):
                    line = v.part(out, start + (k + i) * step, classes)
                    _narrow(v.part(strip, i * classes, classes), is_half, line)
    else:

        def body(tile, classes, each, width, y, at, is_half, out, start, step, count, strip, has_marks):
            tiles.turn_back(tile, 0, each, width, y, at, out, start, step, count, classes, has_marks)

    return body


def _take(x, start, step, is_half, tile, width, c, end, count, strip):
    """The logits of `count` rows side by side, of the classes from `c` to `end`, `step` apart, into a tile."""
    raise NotImplementedError


@overload(_take, jit_options=_INNER)
def _take_of(x, start, step, is_half, tile, width, c, end, count, strip):
    if x.dtype == types.uint16:

        def body(x, start, step, is_half, tile, width, c, end, count, strip):
            for k in range(c, end):
                _widen(v.part(x, start + (k - c) * step, count), is_half, strip)
                tiles.take_lanes(strip, 0, 0, count, tile, k, k + 1, width)
    else:

        def body(x, start, step, is_half, tile, width, c, end, count, strip):
            tiles.take_lanes(x, start, step, count, tile, c, end, width)

    return body


def _give(
    tile, c, end, each, width, y, at, is_half, out, start, step, count, strip, has_marks, is_streamed
):  # fmt: skip
    """The reverse of `_take`; see `_scatter`."""
    raise NotImplementedError


@overload(_give, jit_options=_INNER)
def _give_of(
    tile, c, end, each, width, y, at, is_half, out, start, step, count, strip, has_marks, is_streamed
):  # fmt: skip
    if out.dtype == types.uint16:

        def body(
            tile, c, end, each, width, y, at, is_half, out, start, step, count, strip, has_marks, is_streamed
        ):  # fmt: skip
            for k in range(c, end):
                tiles.put_lanes(tile, k, k + 1, each, width, y, at, strip, 0, 0, count, has_marks, False)
                _narrow(v.part(strip, 0, count), is_half, v.part(out, start + (k - c) * step, count))
    else:

        def body(
            tile, c, end, each, width, y, at, is_half, out, start, step, count, strip, has_marks, is_streamed
        ):  # fmt: skip
            tiles.put_lanes(
                tile, c, end, each, width, y, at, out, start, step, count, has_marks, is_streamed
            )  # fmt: skip

    return body


@inner
def _prepare(each, width, y, label, part, factor, scale, first, count, is_new):
    """What there is of the rows from `first` on before their logits are read; of a tile's whole width, if it is new."""
    v.make_compact()
    dense.spread(factor, first, count, v.part(each, FACTOR * width, width), is_new)
    dense.spread(scale, first, count, v.part(each, SCALE * width, width), is_new)
    if label.shape[0]:
        dense.spread(part, first, count, v.part(each, PART * width, width), True)
        dense.copy(v.part(y, 0, count), (v.part(label, first, count),))
    else:
        dense.fill(v.part(y, 0, count), (-1,))


@inner
def _know_tops(tile, by_row, by_class, classes, each, width, y, at, is_few, has_labels, job, stats, first, count):
    """What follows from their maxima; these are then -inf in the tile, so that their exponentials are 0, if not few."""
    v.make_compact()
    m, known = v.part(each, M * width, count), stats.shape[0] // (4 if job & KNOWN else 5)
    if not is_few:
        tiles.look_up(tile, by_row, by_class, y, v.part(each, AT_LABEL * width, count), count)
    for lane in range(0, count, LANES):
        tiles.gaps_of_lanes(each, width, lane, y, 0 if has_labels else 1)
    if job & KNOWN:
        for k in range(count):
            if m[k] != stats[first + k]:
                at[k] = -1
            m[k] = stats[first + k]
        dense.copy(v.part(each, GAP * width, count), (v.part(stats, 2 * known + first, count),))
        dense.copy(v.part(each, MASS * width, count), (v.part(stats, 3 * known + first, count),))
    elif job & STATS:
        for k in range(count):
            if m[k] - m[k] != 0:
                start = tiles.place(k, 0, by_row, by_class)
                m[k] = _without_softmax(v.part(tile, start, (classes - 1) * by_class + 1), by_class)
    if not is_few:
        tiles.hide(tile, by_row, by_class, at, count)


@inner
def _conclude(tile, by_row, by_class, each, width, sums, y, at, is_few, z, job, stats, loss, first, count):
    """Their losses, and what their gradients are made of, once their sums are there."""
    v.make_compact()
    m, known = v.part(each, M * width, count), stats.shape[0] // (4 if job & KNOWN else 5)
    if job & KNOWN:
        for k in range(count):
            if m[k] - m[k] == 0:
                sums[k] = stats[known + first + k]
    for lane in range(0, count, HALF):
        tiles.finish_lanes(each, width, lane, sums, y, at, z, job & GRAD != 0)
    if job & STATS:
        dense.copy(v.part(stats, 2 * known + first, count), (v.part(each, GAP * width, count),))
        dense.copy(v.part(stats, 3 * known + first, count), (v.part(each, MASS * width, count),))
        for k in range(count):
            top, rest = m[k], sums[k]
            if rest != rest:
                top = top if top - top != 0 else np.nan
                rest = 0 if top == top else np.nan
            stats[first + k], stats[known + first + k] = top, rest
            stats[4 * known + first + k] = y[k] == at[k]
    if job & LOSS:
        dense.copy(v.part(loss, first, count), (v.part(each, OF_ROW * width, count),))
    if job & GRAD and not is_few:
        at_label = v.part(each, AT_LABEL * width, count)
        tiles.look_up(tile, by_row, by_class, y, at_label, count)
        dense.scale(at_label, (at_label, v.part(each, BY * width, count)))
        dense.subtract(v.part(each, LABEL * width, count), (at_label, v.part(each, LABEL * width, count)))


@compiled
def lanes(
    x, x_step, count, classes, is_half, label, part, z, factor, scale,
    job, stats, loss, out, out_step, width, work, sums, places,
):  # fmt: skip
    """What `rows` does, for `width` rows at a time, a multiple of 16, under labels or no target."""
    v.make_compact()
    if job & CHECK and not (v.is_usual() and _are_classes(label, classes)):
        return -1.0
    tile = v.part(work, 0, classes * width)
    each = v.part(work, classes * width, EACH * width)
    partial = v.part(work, (classes + EACH) * width, PARTIAL * width)
    strip = v.part(work, (classes + EACH + PARTIAL) * width, STRIP * classes)
    at, y, m = v.part(places, 0, width), v.part(places, width, width), v.part(each, M * width, width)
    is_few, is_kept = classes <= FEW, job & GRAD != 0
    for first in range(0, count, width):
        here = min(width, count - first)
        _gather(x, first * x_step, x_step, is_half, tile, classes, here, strip)
        _prepare(each, width, y, label, part, factor, scale, first, here, first == 0)
        for lane in range(0, here, LANES):
            tiles.tops_of_lanes(tile, classes, LANES, 0, classes, each, width, lane, y, at, is_few)
        _know_tops(
            tile, classes, LANES, classes, each, width, y, at, is_few, label.shape[0] > 0, job, stats, first, here
        )
        # Meanwhile come the next rows, and where these will go: with each class 16 numbers more.
        coming, going = (first + width if first + width < count else first) * x_step, first * out_step
        for c in range(0, classes, dense.CHUNK):
            live = dense.CHUNK if c + dense.CHUNK < classes else classes - c
            for lane in range(0, here, LANES):
                tiles.exp_of_lanes(
                    tile, lane * classes + c * LANES, LANES, live, 0, m, at, lane, is_few, is_kept, partial,
                    x, coming + lane * x_step + c * LANES, LANES, out, going + lane * out_step + c * LANES, LANES,
                )  # fmt: skip
            for lane in range(0, here, LANES):
                tiles.add_up_lanes(partial, live, m, lane, sums, c > 0)
        _conclude(tile, classes, LANES, each, width, sums, y, at, is_few, z, job, stats, loss, first, here)
        if job & GRAD:
            to = first * out_step
            _scatter(tile, classes, each, width, y, at, is_half, out, to, out_step, here, strip, is_few)
            if not is_few:
                tiles.put_marks(each, width, y, at, is_half, out, to, out_step, 1, here)
    return dense.add_up(loss, count) if job & SUM else 0.0


@inner
def _slot(t, work, start, own, places, width):
    """Where there is room for what there is of a tile's rows beside their numbers: three tiles take turns."""
    slot = t % 3
    return (
        v.part(work, start + slot * own, own),
        v.part(places, 2 * slot * width, width),
        v.part(places, (2 * slot + 1) * width, width),
    )


@inner
def _tile(t, inner, width, lead):
    """Of a tile, the outer index of its rows, the first inner one, and how many there are."""
    in_outer = (inner + lead + width - 1) // width
    o = t // in_outer
    start = (t - o * in_outer) * width - lead
    return o, max(0, start), min(width, inner - start) + min(0, start)


@compiled
def beside(
    x, outer, inner, outer_step, classes, class_step, is_half, label, part, z, factor, scale,
    job, stats, loss, out, out_outer_step, out_class_step, width, lead, work, sums, places,
):  # fmt: skip
    """What `lanes` does, for rows that lie side by side.

    The element (o, c, i) of (outer, C, inner) is x[o·outer_step + c·class_step + i]. While a tile is worked on, the one
    before it is written and the one after it is read: where all three are whole, 16 numbers of each in turn, so that
    memory is never idle; else a few classes at a time, and no more than a few, because classes a power of two apart
    drive each other out of a cache. With job & STREAM gradients go past the caches: `lead` rows are missing in the
    first tile, so that all others begin with a line of cache.
    """
    v.make_compact()
    size, own = classes * width, EACH * width
    partial = v.part(work, 2 * size + 3 * own, PARTIAL * width)
    strip = v.part(work, 2 * size + 3 * own + PARTIAL * width, width)
    is_few, is_kept = classes <= FEW, job & GRAD != 0
    soon = v.part(out, 0, 0 if job & STREAM else out.shape[0])
    number = outer * ((inner + lead + width - 1) // width)
    for t in range(number + 2):
        # This tile is read, the one before is worked on, the one before that is written.
        tile, tile_before = v.part(work, (t & 1) * size, size), v.part(work, (~t & 1) * size, size)
        each, y, at = _slot(t, work, 2 * size, own, places, width)
        each_before, y_before, at_before = _slot(t + 2, work, 2 * size, own, places, width)
        each_written, y_written, at_written = _slot(t + 1, work, 2 * size, own, places, width)
        m = v.part(each_before, M * width, width)
        is_read, is_worked_on, is_written = t < number, 0 < t <= number, t > 1 and job & GRAD
        o, start, count = _tile(t, inner, width, lead)
        o_before, start_before, count_before = _tile(t - 1, inner, width, lead)
        o_written, start_written, count_written = _tile(t - 2, inner, width, lead)
        from_, first, first_before = o * outer_step + start, o * inner + start, o_before * inner + start_before
        to = o_written * out_outer_step + start_written
        is_streamed = job & STREAM and (start_written or not lead)
        if is_read:
            _prepare(each, width, y, label, part, factor, scale, first, count, t < 3)
        is_steady = is_read and is_worked_on and (is_written or not is_kept) and not is_few and count % LANES == 0
        is_steady = is_steady and count == count_before and (count == count_written or not is_kept)
        by_written = v.part(each_written, BY * width, width)
        for c in range(0, classes, AT_ONCE):
            end, in_chunk = min(c + AT_ONCE, classes), c & (dense.CHUNK - 1)
            is_done = False
            if is_steady:
                soon_read, soon_written = from_ + (c + AHEAD) * class_step, to + (c + AHEAD) * out_class_step
                is_done = tiles.step_of_lanes(
                    c, end, in_chunk, width, count, x, from_ + c * class_step, class_step, soon_read, tile,
                    tile_before, m, partial,
                    by_written, out, to + c * out_class_step, out_class_step, soon, soon_written,
                    is_kept, is_streamed != 0,
                )  # fmt: skip
            if is_written and not is_done:
                _give(
                    tile, c, end, each_written, width, y_written, at_written, is_half,
                    out, to + c * out_class_step, out_class_step, count_written, strip, is_few, is_streamed != 0,
                )  # fmt: skip
            if is_read:
                if not is_done:
                    _take(x, from_ + c * class_step, class_step, is_half, tile, width, c, end, count, strip)
                for lane in range(0, count, LANES):
                    tiles.tops_of_lanes(tile, 1, width, c, end, each, width, lane, y, at, is_few)
            if is_worked_on:
                for lane in range(0, 0 if is_done else count_before, LANES):
                    tiles.exp_of_lanes(
                        tile_before, lane + c * width, width, end - c, in_chunk,
                        m, at_before, lane, is_few, is_kept, partial,
                        x, from_ + end * class_step + lane, class_step,
                        soon, to + end * out_class_step + lane, out_class_step,
                    )  # fmt: skip
                if end == classes or end & (dense.CHUNK - 1) == 0:
                    for lane in range(0, count_before, LANES):
                        tiles.add_up_lanes(partial, in_chunk + end - c, m, lane, sums, c >= dense.CHUNK)
        if is_written and not is_few:
            tiles.put_marks(
                each_written, width, y_written, at_written, is_half, out, to, 1, out_class_step, count_written
            )
        if is_read:
            _know_tops(
                tile, 1, width, classes, each, width, y, at, is_few, label.shape[0] > 0, job, stats, first, count
            )
        if is_worked_on:
            _conclude(
                tile_before, 1, width, each_before, width, sums, y_before, at_before, is_few, z,
                job, stats, loss, first_before, count_before,
            )  # fmt: skip
    if job & STREAM:
        v.fence()
    return True
