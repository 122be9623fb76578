"""The block body of the cpu engine, compiled by Numba: the loops that touch logits, and nothing else.

Imported when first needed, and only where Numba is installed. `rows` takes rows that lie dense, one after another;
`lanes` takes many rows at once, each in a lane of the vector instructions: rows of few classes, and rows whose classes
lie apart while the rows lie side by side. Both make, in cache, everything that is asked of a row, and both by the same
arithmetic in the same order: a sum takes 512 numbers at a time into 32 partial sums, folds these in halves, and adds
the result up in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import config, njit, types
from numba.extending import overload

from . import _vectors as v
from ._kept import kept
from ._vectors import LANES, PARTIAL

if config.DISABLE_JIT:
    raise ImportError("NUMBA_DISABLE_JIT is set")

CHUNK = 512

STATS, LOSS, GRAD, LOG, KNOWN, CHECK = 1, 2, 4, 8, 16, 32  # the bits of a job; see `rows`

_OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy", "_nrt": False, "no_cfunc_wrapper": True}
# What only compiled code calls: without the way in from Python, which takes as long to make as the rest.
_INNER = _OPTIONS | {"no_cpython_wrapper": True}
inner = njit(**_INNER)


def compiled(function: Callable[..., Any]) -> Any:
    """What Python calls, kept between processes."""
    return kept(njit(**_OPTIONS)(function))


# One row, its numbers


@inner
def _without_softmax(x, step):
    """What the stats call the largest logit of a row that holds NaN or +inf or is all -inf."""
    largest = -np.inf
    for k in range(0, x.shape[0], step):
        if x[k] != x[k]:
            return np.nan
        largest = max(largest, x[k])
    return largest


@inner
def _of_label(part, m, x):
    """What the label adds to the gap, where 0·inf counts 0."""
    return part * (m - x) if part != 0 else part


@inner
def _loss(gap, mass, tail, lse, z):
    return gap + mass * tail + (z * lse) * lse if z > 0 else gap + mass * tail


@inner
def _coef(mass, lse, z):
    return mass + 2 * z * lse if z > 0 else float(mass)


@inner
def _at_the_top(coef, a, r, p):
    """coef·p - a where p = 1/(1 + r) is the largest: by 1 - p where that cancels less."""
    return (coef - a) - coef * (r * p) if a != 0 and (r < 1 or a == coef) else coef * p - a


@inner
def _are_classes(label, classes):
    wrong = 0
    for i in range(label.shape[0]):
        wrong |= label[i] < 0 or label[i] >= classes
    return wrong == 0


# One row, dense. `partial` and `spare` have room for 32 numbers each.


@inner
def _fill(values, number):
    for k in range(values.shape[0]):
        values[k] = number


@inner
def _copy(values, to):
    for k in range(values.shape[0]):
        to[k] = values[k]


@inner
def _put_aside(x, start, count, spare, number):
    """Fewer than 32 numbers as a group of 32."""
    _fill(spare, number)
    _copy(v.part(x, start, count), v.part(spare, 0, count))


@inner
def _sum(values, count, partial, spare):
    """The sum of at most 512 numbers."""
    groups = count // PARTIAL
    _fill(partial, 0)
    v.add_groups(values, 0, groups, partial)
    if groups * PARTIAL < count:
        _put_aside(values, groups * PARTIAL, count - groups * PARTIAL, spare, 0)
        v.add_groups(spare, 0, 1, partial)
    return v.sum_in_halves(partial)


@inner
def _top(x, partial, spare):
    """The first place of the largest number; 0 in a row that has none."""
    m, start, classes = x.dtype.type(-np.inf), 0, x.shape[0]
    for c in range(0, classes, CHUNK):
        count = min(CHUNK, classes - c)
        groups = count // PARTIAL
        _fill(partial, -np.inf)
        v.raise_groups(x, c, groups, partial)
        if groups * PARTIAL < count:
            _put_aside(x, c + groups * PARTIAL, count - groups * PARTIAL, spare, -np.inf)
            v.raise_groups(spare, 0, 1, partial)
        here = v.largest_in_halves(partial)
        if here > m:
            m, start = here, c
    end = min(start + CHUNK, classes)
    while start + PARTIAL <= end:
        k = v.first_of_group(x, start, m)
        if k < PARTIAL:
            return start + k
        start += PARTIAL
    for k in range(start, end):
        if x[k] == m:
            return k
    return 0


@inner
def _rest(x, m, at, e, partial, spare):
    """Leave exp(x - m) in `e`, which may be `x`, with 0 at `at`, if that is a place; its sum."""
    total, classes = 0.0, x.shape[0]
    for c in range(0, classes, CHUNK):
        end = min(c + CHUNK, classes)
        whole = c + (end - c) // PARTIAL * PARTIAL
        apart = at // PARTIAL * PARTIAL if c <= at < whole else whole  # a group that is done by itself
        _fill(partial, 0)
        v.exp_groups(x, e, c, (apart - c) // PARTIAL, m, partial)
        if apart < whole:
            v.exp_group_but_one(x, e, apart, at - apart, m, partial)
            v.exp_groups(x, e, apart + PARTIAL, (whole - apart) // PARTIAL - 1, m, partial)
        if whole < end:
            _aside(x, whole, end - whole, m, at, e, partial, spare)
        total += v.sum_in_halves(partial)
    return total


@inner
def _aside(x, start, count, m, at, e, partial, spare):
    _put_aside(x, start, count, spare, -np.inf)
    if start <= at < start + count:
        spare[at - start] = -np.inf
    v.exp_groups(spare, spare, 0, 1, m, partial)
    _copy(v.part(spare, 0, count), v.part(e, start, count))


@inner
def _weighed(x, m, a, products, partial, spare):
    """sum(a·(m - x)), where 0·inf counts 0."""
    gap = 0.0
    for c in range(0, x.shape[0], CHUNK):
        end = min(c + CHUNK, x.shape[0])
        for k in range(c, end):
            products[k - c] = a[k] * (m - x[k]) if a[k] != 0 else 0
        gap += _sum(products, end - c, partial, spare)
    return gap


@inner
def _spread(x, m, each, products, partial, spare):
    """sum(each·(m - x))."""
    gap = 0.0
    for c in range(0, x.shape[0], CHUNK):
        end = min(c + CHUNK, x.shape[0])
        for k in range(c, end):
            products[k - c] = each * (m - x[k])
        gap += _sum(products, end - c, partial, spare)
    return gap


@inner
def _total(a, partial, spare):
    total = 0.0
    for c in range(0, a.shape[0], CHUNK):
        count = min(CHUNK, a.shape[0] - c)
        total += _sum(v.part(a, c, count), count, partial, spare)
    return total


@inner
def _scaled(e, by, out):
    groups = e.shape[0] // PARTIAL
    v.scale_groups(e, out, groups, by)
    for k in range(groups * PARTIAL, e.shape[0]):
        out[k] = e[k] * by


@inner
def _less(g, a, by):
    for k in range(g.shape[0]):
        g[k] -= by * a[k]


@inner
def _lowered(g, by):
    for k in range(g.shape[0]):
        g[k] -= by


@inner
def _multiply(values, by):
    for k in range(values.shape[0]):
        values[k] *= by[k]


@inner
def _logarithms(x, m, tail, out):
    for k in range(x.shape[0]):
        out[k] = (x[k] - m) - tail


@inner
def _capped(x, cap, out, slope):
    for k in range(x.shape[0]):
        t = v.tanh(x[k] / cap)
        out[k] = cap * t
        slope[k] = (1 - t) * (1 + t)


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
    if is_half:
        for k in range(x.shape[0]):
            wide[k] = v.from_half(x[k])
    else:
        for k in range(x.shape[0]):
            wide[k] = v.from_bfloat(x[k])


@inner
def _narrow(values, is_half, out):
    if is_half:
        for k in range(values.shape[0]):
            out[k] = v.to_half(values[k])
    else:
        for k in range(values.shape[0]):
            out[k] = v.to_bfloat(values[k])


# What is called


@compiled
def rows(
    x, x_step, count, classes, is_half, label, part, each, a, a_step, cap, z, factor, scale,
    job, stats, loss, out, out_step, work,
):  # fmt: skip
    """`count` rows, of which row i starts at x[i·x_step].

    label: the class of each row, -1 for none; part: the target on it. each: what every class has, of length 1 or C,
    or 0. a: distributions, weighted and smoothed, row i at a[i·a_step]; of length 0 where there are labels or no
    target. part, factor and scale have one number per row, or one. stats (4, rows) are filled if job & STATS, read if
    job & KNOWN. If job & CHECK and some label is no class, nothing is done, and the answer is False.
    """
    if job & CHECK and not _are_classes(label, classes):
        return False
    kind = work.dtype.type
    wide, e = v.part(work, 0, classes), v.part(work, classes, classes)
    slope = v.part(work, 2 * classes, classes)
    products = v.part(work, 3 * classes, CHUNK)
    partial, spare = v.part(work, 3 * classes + CHUNK, PARTIAL), v.part(work, 3 * classes + CHUNK + PARTIAL, PARTIAL)
    for i in range(count):
        _read(x, i * x_step, is_half, wide)
        row = v.row(x, i * x_step, wide)
        if cap > 0:
            _capped(row, kind(cap), wide, slope)
            row = wide
        y = label[i] if label.shape[0] else -1
        on_label = part[i if part.shape[0] > 1 else 0] if y >= 0 else kind(0)
        q = v.part(a, i * a_step, classes) if a.shape[0] else each
        g = v.row(out, i * out_step, e) if job & (GRAD | LOG) else e
        at = _top(row, partial, spare)
        m = row[at]
        if job & KNOWN:
            m, r, gap, mass = stats[0, i], stats[1, i], stats[2, i], stats[3, i]
            if row[at] != m:
                at = -1
            if job & GRAD:
                _rest(row, m if np.isfinite(m) else kind(0), at, g, partial, spare)
        else:
            if a.shape[0]:
                gap, mass = kind(_weighed(row, m, q, products, partial, spare)), kind(_total(q, partial, spare))
            elif y >= 0 and each.shape[0] > 1:
                gap = kind(_of_label(on_label, m, row[y]) + _weighed(row, m, each, products, partial, spare))
                mass = kind(on_label + _total(each, partial, spare))
            elif y >= 0 and each.shape[0]:
                gap = kind(_of_label(on_label, m, row[y]) + _spread(row, m, each[0], products, partial, spare))
                mass = kind(float(on_label) + float(each[0]) * classes)
            elif y >= 0:
                gap, mass = _of_label(on_label, m, row[y]), on_label
            else:
                gap, mass = kind(0), kind(0 if label.shape[0] else 1)
            r = kind(_rest(row, m, at, g, partial, spare) if np.isfinite(m) else np.nan)
            if r != r:
                m = kind(_without_softmax(row, 1))
                r = m - m if m != m else kind(0)
            if job & STATS:
                stats[0, i], stats[1, i], stats[2, i], stats[3, i] = m, r, gap, mass
        wide_r = float(r) if np.isfinite(m) else np.nan
        tail, p = v.log1p(wide_r)
        if job & LOSS:
            f = factor[i if factor.shape[0] > 1 else 0]
            loss[i] = kind(f * _loss(gap, mass, tail, m + tail, z)) if f != 0 else 0
        if job & LOG:
            _logarithms(row, m, kind(tail), g)
            _write(g, is_half, out, i * out_step)
        if job & GRAD:
            s = scale[i if scale.shape[0] > 1 else 0]
            if s == 0:
                _fill(g, 0)
            else:
                coef = _coef(mass, m + tail, z)
                a_top = on_label if y == at else kind(0)
                if at >= 0 and a.shape[0]:
                    a_top = q[at]
                elif at >= 0 and y >= 0 and each.shape[0]:
                    a_top += each[at if each.shape[0] > 1 else 0]
                _scaled(g, kind(s * coef * p), g)
                if a.shape[0]:
                    _less(g, q, s)
                elif y >= 0:
                    g[y] -= s * on_label
                    if each.shape[0] > 1:
                        _less(g, each, s)
                    elif each.shape[0]:
                        _lowered(g, s * each[0])
                if at >= 0:
                    g[at] = kind(s * _at_the_top(coef, a_top, wide_r, p))
                if cap > 0:
                    _multiply(g, slope)
            _write(g, is_half, out, i * out_step)
    return True


# Many rows at once: the numbers of a class lie side by side, one for each row; `step` further those of the next


@inner
def _gather(x, start, inner_step, class_step, is_half, tile, step, classes, count, spare):
    """Logits of `count` rows, turned so that rows lie side by side; `spare` has room for one row."""
    if inner_step == 1:
        _take(x, start, class_step, is_half, tile, step, classes, count)
    else:
        for k in range(count):
            _read(x, start + k * inner_step, is_half, spare)
            v.turn(v.row(x, start + k * inner_step, spare), tile, k, step)


@inner
def _scatter(tile, step, classes, is_half, out, start, inner_step, class_step, count, spare):
    if inner_step == 1:
        _put(tile, step, classes, count, is_half, out, start, class_step)
    else:
        for k in range(count):
            grad = v.row(out, start + k * inner_step, spare)
            v.turn_back(tile, k, step, grad)
            _write(grad, is_half, out, start + k * inner_step)


def _take(x, start, class_step, is_half, tile, step, classes, count):
    """Logits of `count` rows that lie side by side already."""
    raise NotImplementedError


@overload(_take, jit_options=_INNER)
def _take_of(x, start, class_step, is_half, tile, step, classes, count):
    if x.dtype == types.uint16:

        def body(x, start, class_step, is_half, tile, step, classes, count):
            for c in range(classes):
                _read(x, start + c * class_step, is_half, v.part(tile, c * step, count))
    else:

        def body(x, start, class_step, is_half, tile, step, classes, count):
            if count == step:
                v.copy_lanes(x, start, class_step, tile, step, classes, count // LANES)
            else:
                for c in range(classes):
                    _copy(v.part(x, start + c * class_step, count), v.part(tile, c * step, count))

    return body


def _put(tile, step, classes, count, is_half, out, start, class_step):
    """The gradient of `count` rows to where it lies side by side."""
    raise NotImplementedError


@overload(_put, jit_options=_INNER)
def _put_of(tile, step, classes, count, is_half, out, start, class_step):
    if out.dtype == types.uint16:

        def body(tile, step, classes, count, is_half, out, start, class_step):
            for c in range(classes):
                _write(v.part(tile, c * step, count), is_half, out, start + c * class_step)
    else:

        def body(tile, step, classes, count, is_half, out, start, class_step):
            for c in range(classes):
                _copy(v.part(tile, c * step, count), v.part(out, start + c * class_step, count))

    return body


@inner
def _rests(tile, step, classes, m, at, partial, totals):
    """`_rest` of each row: the same numbers, added up in the same order."""
    for k in range(totals.shape[0]):
        totals[k] = 0
        if at[k] >= 0:
            tile[np.uintp(at[k] * step + k)] = -np.inf
    for lane in range(0, totals.shape[0], LANES):
        for first in range(0, classes, CHUNK):
            count = min(CHUNK, classes - first)
            live = min(PARTIAL, count)
            _fill(v.part(partial, 0, live * LANES), 0)
            v.exp_of_lanes(tile, first * step + lane, step, count, m, lane, partial)
            half = PARTIAL
            while half > 1:
                half //= 2
                for c in range(live - half):
                    v.add_lanes(partial, c * LANES, (c + half) * LANES)
                live = min(live, half)
            for k in range(LANES):
                totals[lane + k] += partial[k]


@inner
def _tails(r, tail, p):
    for k in range(r.shape[0]):
        tail[k], p[k] = v.log1p(r[k])


@inner
def _labels(label, part, tile, step, m, on_label, gap, mass):
    """The stats that labels make; an unknown one has no target."""
    for k in range(label.shape[0]):
        y = label[k]
        on_label[k] = part[k if part.shape[0] > 1 else 0] if y >= 0 else 0
        gap[k] = _of_label(on_label[k], m[k], tile[np.uintp((y if y >= 0 else 0) * step + k)])
        mass[k] = on_label[k]


@inner
def _any_broken(m, count):
    broken = 0
    for k in range(count):
        broken |= m[k] - m[k] != 0
    return broken


@inner
def _losses(gap, mass, m, tail, z, factor, loss):
    for k in range(loss.shape[0]):
        f = factor[k if factor.shape[0] > 1 else 0]
        loss[k] = f * _loss(gap[k], mass[k], tail[k], m[k] + tail[k], z) if f != 0 else 0


@inner
def _slopes(count, mass, m, tail, p, z, scale, by):
    for k in range(count):
        by[k] = scale[k if scale.shape[0] > 1 else 0] * _coef(mass[k], m[k] + tail[k], z) * p[k]


@inner
def _specials(tile, step, classes, count, label, on_label, at, mass, m, r, tail, p, z, scale):
    """The entries of the gradient other than coef·p: of the label, of the maximum, of rows that do not count."""
    for k in range(count):
        s = scale[k if scale.shape[0] > 1 else 0]
        if s == 0:
            for c in range(classes):
                tile[np.uintp(c * step + k)] = 0
            continue
        y = label[k] if label.shape[0] else -1
        if y >= 0:
            tile[np.uintp(y * step + k)] -= s * on_label[k]
        if at[k] >= 0:
            a = on_label[k] if y == at[k] else 0
            top = _at_the_top(_coef(mass[k], m[k] + tail[k], z), a, r[k], p[k])
            tile[np.uintp(at[k] * step + k)] = s * top


@compiled
def lanes(
    x, outer, inner, outer_step, inner_step, classes, class_step, is_half, label, part, z, factor, scale,
    job, stats, loss, out, out_outer_step, out_inner_step, out_class_step,
    width, work, work64, places,
):  # fmt: skip
    """`outer`·`inner` rows, `width` of them at a time, under labels or no target; see `rows` for the rest.

    The element (o, c, i) of (outer, C, inner) is x[o·outer_step + c·class_step + i·inner_step]; `width` is a multiple
    of 16.
    """
    if job & CHECK and not _are_classes(label, classes):
        return False
    kind = work.dtype.type
    numbers = classes * width + PARTIAL * LANES
    partial, spare = v.part(work, classes * width, PARTIAL * LANES), v.part(work, numbers + 5 * width, classes)
    m, by = v.part(work, numbers, width), v.part(work, numbers + width, width)
    gap, mass = v.part(work, numbers + 2 * width, width), v.part(work, numbers + 3 * width, width)
    on_label = v.part(work, numbers + 4 * width, width)
    for o in range(outer):
        for start in range(0, inner, width):
            count = min(width, inner - start)
            step = (count + LANES - 1) // LANES * LANES
            first = o * inner + start
            tile, at = v.part(work, 0, classes * step), v.part(places, 0, step)
            r, tail, p = v.part(work64, 0, step), v.part(work64, width, step), v.part(work64, 2 * width, step)
            y = v.part(label, first, count) if label.shape[0] else label
            a = v.part(part, first, count) if part.shape[0] > 1 else part
            f = v.part(factor, first, count) if factor.shape[0] > 1 else factor
            s = v.part(scale, first, count) if scale.shape[0] > 1 else scale
            _gather(
                x,
                o * outer_step + start * inner_step,
                inner_step,
                class_step,
                is_half,
                tile,
                step,
                classes,
                count,
                spare,
            )
            for lane in range(0, step, LANES):
                v.tops_of_lanes(tile, lane, step, classes, m, at, lane)
            if label.shape[0]:
                _labels(y, a, tile, step, m, on_label, gap, mass)
            else:
                for k in range(count):
                    gap[k], mass[k] = 0, 1
            if job & KNOWN:
                for k in range(count):
                    i = first + k
                    if m[k] != stats[0, i]:
                        at[k] = -1
                    m[k], gap[k], mass[k] = stats[0, i], stats[2, i], stats[3, i]
            elif job & STATS:
                for k in range(count):
                    stats[0, first + k] = m[k]
            if _any_broken(m, count):
                for k in range(count):
                    if m[k] - m[k] != 0:
                        if job & STATS:
                            stats[0, first + k] = _without_softmax(v.part(tile, k, classes * step - k), step)
                        m[k] = np.nan
            _rests(tile, step, classes, m, at, partial, r)
            for k in range(count):
                r[k] = kind(r[k]) if m[k] == m[k] else np.nan
                if job & KNOWN and m[k] == m[k]:
                    r[k] = stats[1, first + k]
            if job & STATS:
                for k in range(count):
                    i = first + k
                    stats[1, i], stats[2, i], stats[3, i] = r[k], gap[k], mass[k]
                    if r[k] != r[k]:
                        stats[0, i] = stats[0, i] if m[k] != m[k] else np.nan
                        stats[1, i] = 0 if stats[0, i] == stats[0, i] else np.nan
            _tails(r, tail, p)
            if job & LOSS:
                _losses(gap, mass, m, tail, z, f, v.part(loss, first, count))
            if job & GRAD:
                _slopes(count, mass, m, tail, p, z, s, by)
                for lane in range(0, step, LANES):
                    v.scale_lanes(tile, lane, step, classes, by, lane)
                _specials(tile, step, classes, count, y, on_label, at, mass, m, r, tail, p, z, s)
                _scatter(
                    tile,
                    step,
                    classes,
                    is_half,
                    out,
                    o * out_outer_step + start * out_inner_step,
                    out_inner_step,
                    out_class_step,
                    count,
                    spare,
                )
    return True
