// The mathematics of a row, shared by every kernel.
//
// With m the largest logit of some classes:  max = m,  rest = Σ e^{x_k - m} without the (first) m itself,
// gap = Σ a_k (m - x_k),  mass = Σ a_k.  These are sums of non-negative terms, which is what keeps confident rows
// accurate: loss = gap + mass·log1p(rest), and 1 - p = rest / (1 + rest) at the maximum. Stats of disjoint classes
// merge; 1 + rest is the sum of exponentials, so a part without classes has rest = -1.
//
// NaN and +inf: max ignores NaN, which then shows up in rest; a row whose max is not finite is NaN.

#pragma once
#include "problem.cuh"

// Half of max - x, where max - x may overflow; inf - inf is 0.
template <class A> XE_DEVICE A half_below(A max, A x) {
    return x == max ? 0 : static_cast<A>(0.5) * max - static_cast<A>(0.5) * x;
}

template <class A> XE_DEVICE A times(A a, A b) { return a == 0 || b == 0 ? 0 : a * b; }  // 0·inf counts 0

// e^{x - max} for many x, without a common factor: multiply by `correction` at the end. It takes one fused
// multiply-add, where x - max times log2 e takes two operations. max·log2 e is rounded before it is subtracted from
// each x·log2 e, so all exponents are off by exactly the same amount. Beyond 2^31 that could overflow; but there,
// different numbers are so far apart that the smaller power is 0 in any base.
template <class A> struct Powers;
template <> struct Powers<float> {
    float factor, offset, correction;
    XE_DEVICE explicit Powers(float max) {
        max = max_acc(max, -largest<float>());  // of -inf alone all powers are 0
        factor = fabsf(max) >= 2147483648.0f ? 1 : 1.4426950408889634f;
        offset = max * factor;
        correction = exp2_fast(-fmaf(max, factor, -offset));
    }
    XE_DEVICE float of(float x) const { return exp2_fast(fmaf(x, factor, -offset)); }
};
template <> struct Powers<double> {
    static constexpr double correction = 1;
    double max;
    XE_DEVICE explicit Powers(double max) : max(max_acc(max, -largest<double>())) {}
    XE_DEVICE double of(double x) const { return exp_acc(x - max); }
};

template <class A> struct Stats {
    A max = -infinity<A>(), rest = -1, gap = 0, mass = 0;
};

// If both have the same maximum, that of `one` counts as the first.
template <class A> XE_DEVICE Stats<A> merge(const Stats<A>& one, const Stats<A>& two) {
    const bool first = one.max >= two.max;
    const Stats<A>&high = first ? one : two, &low = first ? two : one;
    Stats<A> both = high;
    both.rest += (1 + low.rest) * (low.max == high.max ? 1 : exp_acc(low.max - high.max));
    both.gap += low.gap + 2 * times(low.mass, half_below(high.max, low.max));
    both.mass += low.mass;
    return both;
}

// The result for a whole row: its loss, and its gradient class by class.
template <class T, int VARIANT> struct Answer {
    typedef typename Acc<T>::type A;
    Stats<A> stats;
    A tail, more, coef, p_max, scale;  // coef = mass + more, with more = 2·z·lse
    A share;                           // coef·p_max: the factor of e^{x - max}, before the scale
    bool confident;                    // p > 1/2 at the maximum

    // by_class: the mass is that of `s`, which has the label's own part only if `with_label`. Slices: if `s` is `given`,
    // it is that of all slices.
    XE_DEVICE Answer(const Problem<T>& p, const Row<T, VARIANT>& row, const Stats<A>& s, bool with_label, bool given)
        : stats(s) {
        if (VARIANT < SLICE || !given) {
            if (!by_class(VARIANT)) stats.mass = row.on_label;
            if (VARIANT % SLICE == SMOOTH && (row.label >= 0 || (VARIANT >= SLICE && row.elsewhere))) {
                stats.mass += row.each * static_cast<A>(static_cast<int>(p.classes));
            }
            if (by_class(VARIANT) && !with_label) stats.mass += row.on_label;
            if (!row.has_target) stats.mass = 1;
        }
        const A rest = isfinite(stats.max) ? stats.rest : not_a_number<A>();
        tail = log1p_acc(rest);
        p_max = reciprocal(1 + rest);
        more = 0, coef = stats.mass, scale = row.scale;
        if (p.z_loss != 0) {
            const A of_lse = p.z_loss * (stats.max + tail);
            more = of_lse + of_lse;
            coef += more;
        }
        const bool beyond = max_acc(coef, -coef) == infinity<A>();  // times a p of 0 it must be 0: as a product
        if (beyond) coef = coef > 0 ? largest<A>() : -largest<A>();
        if (beyond && p_max == p_max) p_max = largest<A>();
        confident = stats.rest < 1 && !beyond;
        share = coef * p_max;
    }
    // Whether the products common to a row's gradient are finite, or all its entries are NaN anyway.
    XE_DEVICE bool products_are_finite() const {
        A most = max_acc(max_acc(share * scale, -share * scale), max_acc(scale, -scale));
        if (by_class(VARIANT)) {  // no a·scale is much larger
            most = max_acc(most, max_acc(coef * scale, -coef * scale));
            most = max_acc(most, max_acc(stats.mass * scale, -stats.mass * scale));
        }
        return most != infinity<A>();
    }

    // Adds the label's gap; x is its logit.
    XE_DEVICE void add_label(const Row<T, VARIANT>& row, A x) {
        stats.gap += 2 * times(row.on_label, half_below(stats.max, x));
    }
    XE_DEVICE A loss(const Problem<T>& p, const Row<T, VARIANT>& row) const {
        A value = stats.gap + stats.mass * tail;
        if (p.z_loss != 0) {
            const A lse = stats.max + tail;
            value += (p.z_loss * lse) * lse;  // lse² alone may overflow
        }
        return row.factor == 0 ? 0 : row.factor * value;
    }

    // Writes the job's numbers per row; called by one thread. A bad label makes the gap NaN.
    template <int JOB> XE_DEVICE void put(const Problem<T>& p, const Row<T, VARIANT>& row, i64 r) const {
        if (JOB != GRAD && JOB != LOG_SOFTMAX && p.loss) p.loss[r] = loss(p, row);
        if (!writes_stats(JOB)) return;
        p.max[r] = stats.max, p.rest[r] = stats.rest;
        p.gap[r] = row.bad ? not_a_number<A>() : stats.gap;
        p.mass[r] = stats.mass;
    }

    // scale·[coef·p - a] for any class; where p > 1/2, 1 - p comes from rest, which has not cancelled. The slope is
    // softcap's; the factor that may overflow is multiplied last. If coef was infinite, coef·p must be infinite before
    // an infinite a is subtracted, which gives NaN: fused into the subtraction it would be finite.
    XE_DEVICE A grad(A x, A a, A slope = 1) const {
        if (x == stats.max && confident) {
            const A kept = (stats.mass - a) + more;  // coef - a would lose `more`
            return scale * ((kept - coef * (stats.rest * p_max)) * slope);
        }
        return scale * ((multiply_rounded(coef, exp_acc(x - stats.max) * p_max) - a) * slope);
    }
};

// Whether the label is the first class with the largest logit: before softcap, which can make different logits equal,
// and whatever the weights. It is, unless another class beats it. NaN beats nothing and nothing beats NaN; such a row
// is never correct. A GPU compares subnormal floats as 0 here, as everywhere CuPy has it flush them.
template <class A> struct Rival {
    A x;        // the label's logit, as it was given
    int label;  // -1: not wanted
    XE_DEVICE bool is_beaten_by(A other, int k) const { return k < label ? other >= x : other > x; }
};
template <int JOB, class T, int VARIANT>
XE_DEVICE Rival<typename Acc<T>::type> rival_of(const Problem<T>& p, const Row<T, VARIANT>& row) {
    const bool counts = row.label >= 0 && !(p.ignores && row.label + (is_slice(VARIANT) ? p.start : 0) == p.ignore_index);
    return {0, writes_stats(JOB) && p.correct && counts ? row.label : -1};
}
// Called by one thread, like `Answer::put`.
template <int JOB, class T, int VARIANT, class A>
XE_DEVICE void put_correct(const Problem<T>& p, i64 r, const Answer<T, VARIANT>& answer, Rival<A> rival, bool beaten) {
    if (writes_stats(JOB) && p.correct) {
        p.correct[r] = rival.label >= 0 && !beaten && answer.tail == answer.tail;
    }
}

// Softcap: x' = cap·tanh(u) with u = x/cap, and dx'/dx = sech²(u). Both from e = exp(-2|u|):
//
//     tanh|u| = 1 - 2e/(1 + e), below 1/2 u times a polynomial (0.14 eps off)        sech²(u) = 4e/(1 + e)²
//
// where 1 - tanh² would cancel. Each is rounded before anything is subtracted from it, so that a logit that is the
// maximum in one pass is the maximum in the next.
template <class A> struct Capped { A x, slope; };
template <class A> struct Cap;
template <> struct Cap<float> {
    float cap, inverse;  // 4/cap, a normal number if cap is
    XE_DEVICE explicit Cap(float softcap) : cap(softcap) {
        const float quarter = 0.25f * cap, r = reciprocal(quarter);  // a division, in 4 instructions
        inverse = fminf(fmaf(r, fmaf(-quarter, r, 1), r), largest<float>());
    }
    XE_DEVICE Capped<float> of(float x) const {
        const float u = fabsf(x) * inverse, e = exp2_fast(-0.72134752044448170f * u);  // four times u
        const float r = reciprocal(fmaf(0.5f, e, 0.5f)), half = e * r, q = u * u;
        const float p = -0.020833215f + q * (0.00052054215f + q * (-1.2950560e-05f + q * 2.6308428e-07f));
        return {u < 2 ? fmaf(x, q * p, x) : copysignf(fmaf(-cap, half, cap), x), half * r};
    }
};
template <> struct Cap<double> {
    double cap;
    XE_DEVICE explicit Cap(double softcap) : cap(softcap) {}
    XE_DEVICE Capped<double> of(double x) const {
        const double u = x / cap, e = exp_acc(-2 * fabs(u));
        return {multiply_rounded(cap, tanh(u)), 4 * e / ((1 + e) * (1 + e))};
    }
};
