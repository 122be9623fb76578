// The mathematics of a row, once for every kernel.
//
// With m the largest logit of some classes:  max = m,  rest = Σ e^{x_k - m} without the (first) m itself,
// gap = Σ a_k (m - x_k),  mass = Σ a_k.  Sums of non-negative terms, which is where confident rows keep their
// accuracy: loss = gap + mass·log1p(rest), and 1 - p = rest / (1 + rest) at the maximum. Stats of disjoint classes
// merge; 1 + rest is the sum of exponentials, so that rest = -1 is a part without classes.
//
// NaN and +inf: a maximum ignores NaN, which then comes through rest; rows whose maximum is not finite are NaN.

#pragma once
#include "problem.cuh"

// Half of max - x, all of which may be beyond the range of finite numbers; inf - inf is 0.
template <class A> XE_DEVICE A half_below(A max, A x) {
    return x == max ? 0 : static_cast<A>(0.5) * max - static_cast<A>(0.5) * x;
}

template <class A> XE_DEVICE A times(A a, A b) { return a == 0 || b == 0 ? 0 : a * b; }  // 0·inf counts 0

template <class A> struct Stats {
    A max = -infinity<A>(), rest = -1, gap = 0, mass = 0;
};

// One thread's classes, added up against their maximum.
template <int VARIANT, class A> struct Sum {
    A max, sum = 0, at_max = 0, half_gap = 0, mass = 0;  // sum leaves out logits that are max; at_max counts them
    XE_DEVICE explicit Sum(A max) : max(max) {}
    XE_DEVICE void add(A x) {
        const A e = exp_acc(x - max);
        if (x == max) at_max += 1;
        else sum += e;
    }
    XE_DEVICE void add(A x, A a) {
        add(x);
        const A half = static_cast<A>(0.5) * max - static_cast<A>(0.5) * x;
        half_gap += a == 0 || x == max ? 0 : a * half;  // 0·inf counts 0, and so does inf - inf
        mass += a;
    }
    XE_DEVICE Stats<A> stats() const { return {max, sum + (at_max - 1), 2 * half_gap, mass}; }
};

template <int VARIANT, class A> XE_DEVICE Stats<A> merge(const Stats<A>& one, const Stats<A>& two) {
    const bool first = one.max >= two.max;
    const Stats<A>&high = first ? one : two, &low = first ? two : one;
    const A drop = high.max == low.max ? 0 : high.max - low.max;
    Stats<A> both;
    both.max = high.max;
    both.rest = high.rest + (1 + low.rest) * exp_acc(-drop);
    if (VARIANT != PLAIN) {
        both.gap = high.gap + low.gap + 2 * times(low.mass, half_below(high.max, low.max));
        both.mass = high.mass + low.mass;
    }
    return both;
}

// Over aligned groups of WIDTH lanes, all parts at once; every lane gets the same bits.
template <int WIDTH, int VARIANT, class A> XE_DEVICE Stats<A> merge_lanes(Stats<A> part) {
    const A max = lanes_max<WIDTH>(part.max);
    const A drop = part.max == max ? 0 : max - part.max;
    const int lane = threadIdx.x % 32, group = lane / WIDTH * WIDTH;
    const u32 holds_max = ballot(part.max == max) >> group;
    const bool first = ((holds_max & (0u - holds_max)) << group) == 1u << lane;
    part.rest = lanes_sum<WIDTH>(first ? part.rest : (1 + part.rest) * exp_acc(-drop));
    if (VARIANT != PLAIN) {
        part.gap = lanes_sum<WIDTH>(part.gap + 2 * times(part.mass, half_below(max, part.max)));
        part.mass = lanes_sum<WIDTH>(part.mass);
    }
    part.max = max;
    return part;
}

// A whole row that has been reduced: its loss, and its gradient class by class.
template <class T, int VARIANT> struct Answer {
    typedef typename Acc<T>::type A;
    Stats<A> stats;
    A tail, more, coef, p_max, scale;  // coef = mass + more, which is 2·z·lse
    bool confident;  // p > 1/2 at the maximum

    XE_DEVICE Answer(const Problem<T>& p, const Row<T, VARIANT>& row, const Stats<A>& s) : stats(s) {
        if (VARIANT == PLAIN || !row.has_target) stats.mass = 1;
        const bool finite = isfinite(stats.max);
        tail = finite ? log1p_acc(stats.rest) : not_a_number<A>();
        p_max = finite ? 1 / (1 + stats.rest) : not_a_number<A>();
        more = 0, coef = stats.mass, scale = row.scale;
        confident = stats.rest < 1;
        if (VARIANT == PLAIN) return;
        if (p.z_loss != 0) {
            const A of_lse = static_cast<A>(p.z_loss) * (stats.max + tail);
            more = of_lse + of_lse;
            coef += more;
        }
        if (max_acc(coef, -coef) == infinity<A>()) {  // of which a p of 0 makes 0: as a product of two that are finite
            coef = coef > 0 ? largest<A>() : -largest<A>();
            p_max = p_max == p_max ? largest<A>() : p_max;
            confident = false;
        }
    }

    // The loss of the row; `gap` and `mass` apart, because PLAIN knows them in one thread only.
    XE_DEVICE A loss(const Problem<T>& p, const Row<T, VARIANT>& row) const {
        A value = stats.gap + stats.mass * tail;
        if (VARIANT != PLAIN && p.z_loss != 0) {
            const A lse = stats.max + tail;
            value += (static_cast<A>(p.z_loss) * lse) * lse;  // lse² alone may overflow
        }
        return row.factor == 0 ? 0 : row.factor * value;
    }

    // The numbers per row of a job, by one thread. The gap under a bad label says so.
    template <int JOB> XE_DEVICE void put(const Problem<T>& p, const Row<T, VARIANT>& row, i64 r) const {
        if (JOB != GRAD && JOB != LOG_SOFTMAX && p.loss) p.loss[r] = loss(p, row);
        if (!writes_stats(JOB)) return;
        p.max[r] = stats.max, p.rest[r] = stats.rest;
        p.gap[r] = row.bad ? not_a_number<A>() : stats.gap;
        p.mass[r] = VARIANT == PLAIN && row.has_target && row.label < 0 ? 0 : stats.mass;
    }

    // scale·[coef·p - a] for any class; where p > 1/2, 1 - p is taken from rest, which has not cancelled. The slope is
    // softcap's; what is multiplied last may make the whole infinite.
    XE_DEVICE A grad(A x, A a, A slope = 1) const {
        if (x == stats.max && confident) {
            const A kept = VARIANT == PLAIN ? stats.mass - a : (stats.mass - a) + more;  // coef - a would lose `more`
            return scale * ((kept - coef * (stats.rest * p_max)) * slope);
        }
        return scale * ((coef * (exp_acc(x - stats.max) * p_max) - a) * slope);
    }
    // The same where a = 0, and coef = 1 as in PLAIN.
    XE_DEVICE A grad(A x) const { return exp_acc(x - stats.max) * (p_max * scale); }
};

// Whether the label is the first class of the largest logit: before softcap, which makes equal what was not, and
// whatever the weights are. It is so unless another class beats it, which every thread can tell of the classes it has,
// and parts of a row by "or". NaN beats nothing and is beaten by nothing; such a row is not correct anyhow. A GPU
// compares subnormal floats as 0 here, as it does wherever CuPy has it flush them.
template <class A> struct Rival {
    A x;        // the label's logit, as it was given
    int label;  // -1: nobody asks
    XE_DEVICE bool is_beaten_by(A other, int k) const { return k < label ? other >= x : other > x; }
};
template <int JOB, class T, int VARIANT>
XE_DEVICE Rival<typename Acc<T>::type> rival_of(const Problem<T>& p, const Row<T, VARIANT>& row) {
    const bool counts = row.label >= 0 && !(p.ignores && row.label == p.ignore_index);
    return {0, writes_stats(JOB) && p.correct && counts ? row.label : -1};
}
// By one thread, as `Answer::put`.
template <int JOB, class T, int VARIANT, class A>
XE_DEVICE void put_correct(const Problem<T>& p, i64 r, const Answer<T, VARIANT>& answer, Rival<A> rival, bool beaten) {
    if (writes_stats(JOB) && p.correct) {
        p.correct[r] = rival.label >= 0 && !beaten && answer.tail == answer.tail;
    }
}

// Softcap: x' = cap·tanh(x/cap), and dx'/dx = sech²(x/cap) = 4e/(1 + e)² with e = exp(-2|x/cap|), where 1 - tanh² would
// cancel. The product is rounded before anything is subtracted from it, so that a logit that is the maximum in one pass
// is so in the next.
template <class A> struct Capped { A x, slope; };
template <class A> XE_DEVICE Capped<A> capped(A x, double softcap) {
    const A cap = static_cast<A>(softcap), quotient = x / cap;
    const A e = exp_acc(-2 * max_acc(quotient, -quotient));
    return {multiply_rounded(cap, tanh_acc(quotient)), 4 * e / ((1 + e) * (1 + e))};
}
