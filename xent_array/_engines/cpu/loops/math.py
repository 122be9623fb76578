"""Elementary functions for the loops, on scalars and vectors alike.

Calling the C library for each element would take ten times as long as everything else, so these are our own. Errors are
given in units in the last place (ulp) of the result.

- exp: Cody-Waite argument reduction, x = n·ln 2 + r with ln 2 split in two, and a polynomial in r on [-ln 2/2, ln 2/2],
  interpolated at the Chebyshev nodes and evaluated by Estrin's scheme. Below 1.06 ulp in float32, and 1 in float64.
- tanh and its derivative, both from exp(-2·abs(x)), so that neither cancels. A few ulp.
- log1p: 1 + r = m·2**k, and the series of 2·atanh((m - 1)/(m + 1)), as in fdlibm. About 1 ulp of float64.
- float16 and bfloat16: the processor's conversions, or integer arithmetic that gives the same bits.

W. J. Cody and W. Waite, "Software Manual for the Elementary Functions", 1980, chapter 6; J.-M. Muller, "Elementary
Functions", 3rd edition, 2016, chapters 3, 5 and 11.
"""

from __future__ import annotations

import math

from . import processor, simd
from .simd import DOUBLE, FLOAT, HALF, INT16, INT32, INT64, Value, fma, where


def _exp_parts(x: Value) -> tuple[Value, Value]:
    """(e**r - 1, 2**n) with exp(x) = 2**n · e**r, for x <= 1; 2**n is 0 where no normal number is that small.

    The high part of ln 2 has few enough bits that its product with n is exact. e**r = 1 + r + r²·p(r). Adding
    1.5·2**(bits of the mantissa) rounds x/ln 2 to the integer n and leaves n in the low bits; the bias of the exponent
    is added along with it, so that a shift turns it into 2**n.
    """
    if x.is_single:
        degree, mantissa, bias, high, low = 4, 23, 127, 0.693145751953125, 1.4286068203094173e-06
    else:
        degree, mantissa, bias, high, low = 10, 52, 1023, 0.6931471803691238, 1.9082149292705877e-10
    least = x.fixed(-bias * math.log(2))  # there n is -bias, so that the biased exponent is 0
    x = where(x < least, least, x)
    magic = x.fixed(1.5 * 2**mantissa + bias)
    shifted = fma(x, x.fixed(1 / math.log(2)), magic)
    n = shifted - magic
    r = fma(n, x.fixed(-low), fma(n, x.fixed(-high), x))
    less_one = fma(r.estrin(_COEFFICIENTS[degree]), r * r, r)
    bits = shifted.bits(INT32 if x.is_single else INT64) << mantissa
    return less_one, bits.bits(x.element)


# The coefficients of p of each degree, highest first, interpolated at the Chebyshev nodes. They are constants, because
# their equations are badly conditioned: solved in float64, the first one of degree 10 has not even the right sign.
_COEFFICIENTS = {
    4: [0.001392617611993558, 0.008363173074513711, 0.041666554662050534, 0.1666657702559799, 0.5],
    10: [
        2.0914679376583935e-09, 2.510520637395701e-08, 2.7557273661348637e-07, 2.7557255425746435e-06,
        2.4801587325533363e-05, 0.00019841269874800493, 0.0013888888888883752, 0.008333333333326141,
        0.04166666666666667, 0.1666666666666667, 0.5,
    ],
}  # fmt: skip


def exp(x: Value) -> Value:
    """exp(x) for x <= 0, to 1.06 ulp; 0 below the smallest normal number; NaN for NaN."""
    less_one, power = _exp_parts(x)
    return fma(less_one, power, power)


def tanh_and_slope(x: Value) -> tuple[Value, Value]:
    """tanh(x) and 1 - tanh²(x) to a few ulp, also where they are tiny.

    With e = exp(-2·abs(x)) and m = e - 1, they are -m/(2 + m) and 4e/(1 + e)².
    """
    is_negative = x < 0
    less_one, power = _exp_parts(where(is_negative, x.like(2), -2) * x)
    e, m = fma(less_one, power, power), fma(less_one, power, power - 1)
    positive, one_more = -m / (2 + m), 1 + e
    return where(is_negative, -positive, positive), (4 * e) / (one_more * one_more)


def log1p(r: Value, is_rough: bool) -> tuple[Value, Value]:
    """(log(1 + r), 1/(1 + r)) for r >= 0 in float64: to about 1 ulp, or to 3e-9 relative if `is_rough`; NaN for NaN.

    1 + r = m·2**k with m from sqrt(1/2) to sqrt(2); log(m) = 2·atanh(s) with s = (m - 1)/(m + 1), below 0.172, from its
    series; then the rounding error of 1 + r is corrected for.
    """
    one = r.like(1)
    u = one + r
    bits = u.bits(INT64)
    k = (bits - 0x3FE6A09E667F3BCD) >> 52  # the bits of sqrt(1/2)
    m = (bits - (k << 52)).bits(DOUBLE)
    exponent = (k | 0x4330000000000000).bits(DOUBLE) - 2.0**52
    if is_rough:  # one division instead of two
        both = one / (u * (m + one))
        inverse, s = both * (m + one), both * u * (m - one)
    else:
        inverse, s = one / u, (m - one) / (m + one)
    square, terms = s * s, [1 / odd for odd in range(9 if is_rough else 21, 0, -2)]
    atanh = (square.estrin(terms) if is_rough else square.horner(terms)) * s
    lost = (r - (u - one)) * inverse
    return fma(exponent, r.like(math.log(2)), fma(atanh, r.like(2), lost)), inverse


def times(value: Value, by: Value) -> Value:
    """value·by; but just `by` where that is 0 or NaN, whatever the row holds: it does not count, or has no softmax."""
    return where(by != 0, value * by, by)


# What follows once the sum of a row is known, in float64

_ROUNDS_TO_INFINITY = math.nextafter(2.0**128 - 2.0**103, 0)  # numbers above this do, in float32


def finish(
    m: Value, r: Value, gap: Value, mass: Value, factor: Value, z: Value, is_rough: bool
) -> tuple[Value, Value, Value, Value, Value]:
    """The row's loss; log(1 + r); p = 1/(1 + r); coef = mass + more, the factor of p in the gradient; and more."""

    def in_range(value: Value) -> Value:
        """Infinity where the dtype of the arithmetic cannot hold the value."""
        if not is_rough:
            return value
        is_large = (value > _ROUNDS_TO_INFINITY) | (value < -_ROUNDS_TO_INFINITY)
        return where(is_large, value * 2.0**1000, value)

    tail, p = log1p(r, is_rough)
    loss, coef, more = (simd.Variable(value) for value in (gap + mass * tail, mass, r.like(0)))
    with simd.when(z > 0):
        lse = m + tail
        of_lse = z.repeated(r.lanes) * lse
        more.set(in_range(of_lse + of_lse))
        loss.set(loss.get() + of_lse * lse)
        coef.set(in_range(coef.get() + more.get()))
    found = factor * in_range(loss.get())
    return where(factor == 0, 0, found), tail, p, coef.get(), more.get()


def at_max(r: Value, p: Value, mass: Value, coef: Value, more: Value, a: Value) -> Value:
    """coef·p - a at the maximum, where p = 1/(1 + r); computed from 1 - p where that cancels less."""
    from_rest = ((r < 1) | (a == mass)) & ~(a == 0)
    from_rest = from_rest & ((coef - coef) == 0)
    return where(from_rest, ((mass - a) + more) - coef * (r * p), coef * p - a)


# 16 bits


def has_half_instructions() -> bool:
    """Whether the processor converts float16; if not, LLVM would call a library function that is missing here."""
    return processor.is_arm() or processor.has_feature("f16c")


def from_half(x: Value) -> Value:
    return x.bits(HALF).to(FLOAT) if has_half_instructions() else from_half_by_integers(x)


def to_half(x: Value) -> Value:
    return x.to(HALF).bits(INT16) if has_half_instructions() else to_half_by_integers(x)


def from_half_by_integers(x: Value) -> Value:
    """float16 to float32: the exponent is rebased; to a subnormal 2**-14 is added and, as a float, subtracted again."""
    bits = x.unsigned_to(INT32)
    sign = (bits & 0x8000) << 16
    size = (bits & 0x7FFF) << 13
    small = ((size + (113 << 23)).bits(FLOAT) - bits.like(113 << 23).bits(FLOAT)).bits(INT32)
    wide = where(size < 1 << 23, small, size + (112 << 23))
    wide = where(size >= 31 << 23, size + (224 << 23), wide)  # infinity or NaN
    return (wide | sign).bits(FLOAT)


def to_half_by_integers(x: Value) -> Value:
    """float32 to float16, to nearest, ties to even. Just above 1/2, float32 has the spacing of subnormal float16."""
    bits = x.bits(INT32)
    sign = (bits >> 16) & 0x8000
    size = bits & 0x7FFFFFFF
    small = (size.bits(FLOAT) + 0.5).bits(INT32) - (126 << 23)
    carry = 0xFFF + ((size >> 13) & 1)
    narrow = ((size + carry) - (112 << 23)) >> 13
    narrow = where(size < 113 << 23, small, narrow)
    above = where(size > 0x7F800000, bits.like(0x7E00), 0x7C00)  # NaN, or infinity
    narrow = where(size >= 143 << 23, above, narrow)
    return (narrow | sign).to(INT16)


def from_bfloat(x: Value) -> Value:
    return (x.unsigned_to(INT32) << 16).bits(FLOAT)


def to_bfloat(x: Value) -> Value:
    """To nearest, ties to even; NaN stays NaN."""
    bits = x.bits(INT32)
    high = bits >> 16
    rounded = (bits + (0x7FFF + (high & 1))) >> 16
    return where(x == x, rounded, high | 0x40).to(INT16)
