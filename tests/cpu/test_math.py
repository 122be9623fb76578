"""The functions of numbers that the loops are made of: how far they are off, and that vectors change no bit."""

import functools
import math
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest

from xent_array._engines import cpu

if isinstance(cpu.found_loops(), str):
    pytest.skip(cpu.found_loops(), allow_module_level=True)

from support.compiled import compiled
from support.problems import each_wide

from xent_array._engines.cpu.loops import KINDS, LANES, PARTIAL, contiguous, pipeline, process, reductions, tiles
from xent_array._engines.cpu.loops import math as ours
from xent_array._engines.cpu.loops.simd import DOUBLE, constant, vectors

RNG = np.random.default_rng(0)


def on_each(function):
    """``out[k] = function(x[k])``, 16 numbers at a time and those left one by one."""

    @compiled
    def on_each(x, out):
        for place, lanes in vectors(out.length, LANES):
            out.store(function(x.load(place, lanes)), place)

    return on_each


exp_each, tanh_each, slope_each = map(
    on_each, (ours.exp, lambda x: ours.tanh_and_slope(x)[0], lambda x: ours.tanh_and_slope(x)[1])
)


@compiled
def exp_in_rows(x, out, m):
    return reductions.exps(x, m.load(0), constant(-1), out, x, out)


@compiled
def exp_in_lanes(x, numbers, at, partial, sums):
    zero, (tile, state, lines) = constant(0), tile_of(x, numbers, at, partial, sums)
    pipeline.exps(tile, zero, tile.classes, state, zero, zero == 0, lines, lines)


@compiled
def exp_in_tile(x, numbers, at, partial, sums):
    zero, (tile, state, lines) = constant(0), tile_of(x, numbers, at, partial, sums)
    process.add_exps(tile, state, constant(LANES), process.Ahead(lines, zero, lines, zero))


def tile_of(x, numbers, at, partial, sums):
    """One of 16 rows, what is known of them, and something to prefetch."""
    zero, width = constant(0), constant(LANES)
    state = tiles.State(numbers, width, at, at, partial, sums)
    return tiles.Tile(x, zero, width, x.length // LANES), state, tiles.Lines(x, zero, zero)


def words(first, last, count, dtype):
    """Numbers of evenly spaced bit patterns, both ends among them."""
    word = np.uint32 if dtype == "float32" else np.uint64
    first, last = (int(np.array(end, dtype).view(word)) for end in (first, last))
    return np.array([first + (last - first) * k // (count - 1) for k in range(count)], word).view(dtype)


def around(numbers, count, dtype):
    """Each number and its neighbours on both sides."""
    word = np.int32 if dtype == "float32" else np.int64
    return (np.array(numbers, dtype).view(word)[:, None] + np.arange(-count, count + 1, dtype=word)).view(dtype).ravel()


def units(got, truth):
    """The largest error in units in the last place of the truth."""
    step = np.spacing(np.abs(truth).astype(got.dtype)).astype(truth.dtype)
    return float(np.max(np.abs(got.astype(truth.dtype) - truth) / step))


def exact(x):
    """The same numbers in a type in which NumPy's functions are right to far more than a unit of theirs."""
    if x.dtype == np.float32:
        return x.astype(np.float64)
    if np.finfo(np.longdouble).nmant < 62:
        pytest.skip("NumPy has nothing wider than float64 here")
    return x.astype(np.longdouble)


def test_what_was_compiled_before_changes_nothing():
    def log1p_of(kind):
        @compiled
        def found(m, r):
            zero, one = constant(0, DOUBLE), constant(1, DOUBLE)
            return contiguous.finish_row(m.load(0), r.load(0), zero, one, zero, one, one, zero)[3]

        return found(np.zeros(1, kind), np.array([0.3]))

    first, exact = log1p_of(np.float32), log1p_of(np.float64)
    assert log1p_of(np.float32) == first != exact


@pytest.mark.parametrize("degree", ours._COEFFICIENTS)
def test_the_coefficients_of_exp_interpolate_at_the_chebyshev_nodes(degree):
    """(e**r - 1 - r)/r² on [-ln 2/2, ln 2/2], from its series, because the closed form cancels; in exact fractions."""

    def p(r, coefficients):  # highest first
        return functools.reduce(lambda value, coefficient: value * r + Fraction(coefficient), coefficients, Fraction(0))

    series = [Fraction(1, math.factorial(k + 2)) for k in range(30, -1, -1)]
    for k in range(degree + 1):
        node = Fraction(math.log(2) / 2 * math.cos(math.pi * (2 * k + 1) / (2 * degree + 2)))
        assert abs(p(node, ours._COEFFICIENTS[degree]) - p(node, series)) < 4e-17
    for r in (Fraction(k, 1000) for k in range(-346, 347)):
        assert abs(p(r, ours._COEFFICIENTS[degree]) - p(r, series)) < (2e-7 if degree == 4 else 4e-17)


@each_wide
def test_exp(dtype):
    """On all that is not above 0; exactly 0 beside the smallest normal number."""
    smallest = math.log(np.finfo(dtype).smallest_normal) - math.log(2) / 2
    x = np.concatenate(
        [
            words(-0.0, smallest, 200_000, dtype),
            around([smallest, -1, -math.log(2) / 2, -1.5 * math.log(2)], 1000, dtype),
            np.array([0.0, -0.0], dtype),
        ]
    )
    got = np.empty_like(x)
    exp_each(x, got)
    with np.errstate(under="ignore"):
        truth = np.exp(exact(x))
    ends = x < smallest * (1 - 2e-7)  # a few numbers beside the end become 0 early
    assert (got[x < smallest * (1 + 2e-7)] == 0).all()
    assert (got[~ends] > 0).all()
    assert units(got[~ends], truth[~ends]) <= (1.06 if dtype == "float32" else 1)
    assert (got[x == 0] == 1).all()
    far = np.array([-np.inf, np.finfo(dtype).min, -1e4, -104, -746, np.nan], dtype)
    if dtype == "float64":
        far[3] = -745
    got = np.empty_like(far)
    exp_each(far, got)
    assert (got[:-1] == 0).all()
    assert not np.signbit(got[:-1]).any()
    assert np.isnan(got[-1])


@each_wide
def test_exp_is_the_same_alone_and_in_vectors(dtype):
    x = np.concatenate([words(-0.0, -800, 5000, dtype), np.array([0, -np.inf, np.nan], dtype)])
    x = np.resize(x, -(-x.size // 64) * 64)
    each, rows, lanes, tile, alone = np.empty_like(x), np.empty_like(x), x.copy(), x.copy(), np.empty_like(x)
    exp_each(x, each)
    exp_in_rows(x, rows, np.zeros(1, dtype))
    state = np.zeros((KINDS, LANES), dtype), np.full(LANES, -1), np.zeros(PARTIAL * LANES, dtype)
    exp_in_lanes(lanes, *(array.ravel() for array in state), np.zeros(LANES))
    exp_in_tile(tile, *(array.ravel() for array in state), np.zeros(LANES))
    for k in range(x.size):
        exp_each(x[k : k + 1], alone[k : k + 1])
    assert each.tobytes() == rows.tobytes() == lanes.tobytes() == tile.tobytes() == alone.tobytes()


@each_wide
def test_tanh(dtype):
    tiny = np.finfo(dtype).smallest_normal
    x = np.concatenate([words(tiny, np.finfo(dtype).max, 200_000, dtype), around([1, 0.17, 9, 19, 40], 1000, dtype)])
    x = np.concatenate([x, -x])
    got, truth = np.empty_like(x), np.tanh(exact(x))
    tanh_each(x, got)
    assert units(got, truth) <= 3
    special = np.array([0, -0.0, np.inf, -np.inf, np.nan], dtype)
    got = np.empty_like(special)
    tanh_each(special, got)
    np.testing.assert_array_equal(got, np.tanh(special))


@each_wide
def test_slope_of_tanh(dtype):
    """As 4e/(1 + e)² in a wider type; 0 where that has no normal number."""
    x = np.concatenate([words(np.finfo(dtype).smallest_normal, 40, 100_000, dtype), around([1, 9, 19], 1000, dtype)])
    x = np.concatenate([x, -x])
    e = np.exp(-2 * np.abs(exact(x)))
    got, truth = np.empty_like(x), 4 * e / (1 + e) ** 2
    slope_each(x, got)
    assert units(got, truth) <= 5
    special = np.array([0, -0.0, np.inf, -np.inf, np.nan], dtype)
    got = np.empty_like(special)
    slope_each(special, got)
    np.testing.assert_array_equal(got, np.array([1, 1, 0, 0, np.nan], dtype))


@pytest.mark.parametrize(("is_rough", "bar"), [(False, 3), (True, 3e-9 * 2**53)])
def test_log1p(is_rough, bar):
    log1p_each, inverse_each = (on_each(lambda r, k=k: ours.log1p(r, is_rough)[k]) for k in range(2))
    tiny = np.finfo(np.float64).smallest_subnormal
    x = np.concatenate(
        [
            words(tiny, 1e300, 200_000, "float64"),
            around([1, math.sqrt(2) - 1, 2 * math.sqrt(2) - 1, 1e-16, 3], 1000, "float64"),
        ]
    )
    got = np.empty_like(x)
    log1p_each(x, got)
    assert units(got, np.log1p(exact(x))) <= bar
    inverse_each(x, got)
    assert units(got, 1 / (1 + exact(x))) <= bar
    special = np.array([0.0, np.nan])
    got = np.empty_like(special)
    log1p_each(special, got)
    np.testing.assert_array_equal(got, special)


# -- 16 bits -----------------------------------------------------------------------------------------------------

each_16_bits = pytest.mark.parametrize(
    ("kind", "widen", "narrow"),
    [
        (np.float16, ours.from_half, ours.to_half),
        (np.float16, ours.from_half_by_integers, ours.to_half_by_integers),  # as where the processor does not convert
        (ml_dtypes.bfloat16, ours.from_bfloat, ours.to_bfloat),
    ],
    ids=["float16", "float16 in integers", "bfloat16"],
)


@each_16_bits
def test_every_16_bit_number_is_widened_exactly(kind, widen, narrow):
    word = np.arange(65536).astype(np.uint16)
    got = np.empty(65536, np.float32)
    on_each(widen)(word, got)
    wanted = word.view(kind).astype(np.float32)
    number = ~np.isnan(wanted)
    assert number.sum() > 60_000
    np.testing.assert_array_equal(got.view(np.uint32)[number], wanted.view(np.uint32)[number])
    assert np.isnan(got[~number]).all()


@each_16_bits
def test_narrowing_rounds_as_a_cast_does(kind, widen, narrow):
    """Every 16-bit number, half-way to the next, the float32 numbers beside these, infinity by rounding."""
    each = np.arange(0x7F80 if kind == ml_dtypes.bfloat16 else 0x7C00).astype(np.uint16).view(kind).astype(np.float32)
    with np.errstate(all="ignore"):
        half_way = each + (np.append(each[1:], 2 * each[-1]) - each) / 2
        x = np.concatenate([each, half_way, around(np.concatenate([each, half_way])[1:-1], 1, "float32")])
        x = np.concatenate([x, RNG.integers(2**31, size=500_000).astype(np.uint32).view(np.float32)])
        x = np.concatenate([x, -x, np.array([np.inf, -np.inf, np.nan, -np.nan], np.float32)])
        x = np.append(x, np.array([0x7F800001, 0x7FFFFFFF, 0xFF800001], np.uint32).view(np.float32))
        wanted = x.astype(kind)
    got = np.empty(x.size, np.uint16)
    on_each(narrow)(x, got)
    number = ~np.isnan(x)
    np.testing.assert_array_equal(got[number], wanted.view(np.uint16)[number])
    assert np.isinf(wanted[number]).any()
    assert np.isnan(got.view(kind)[~number].astype(np.float32)).all()
