// A whole row in one thread: what T and P share. The logits come through x(k), the gradient goes to put(k, value).

#pragma once
#include "stats.cuh"

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
    if (every_class(VARIANT)) {
        both.gap = high.gap + low.gap + 2 * times(low.mass, half_below(high.max, low.max));
        both.mass = high.mass + low.mass;
    }
    return both;
}

template <class T, int JOB, int VARIANT, class X, class Put>
XE_DEVICE void xent_thread(const Problem<T>& p, i64 r, const Row<T, VARIANT>& row, X x, Put put) {
    typedef typename Acc<T>::type A;
    constexpr int U = has_softcap(VARIANT) ? 2 : 8;  // logits in flight, and against one maximum
    const int classes = static_cast<int>(p.classes);
    const bool needed = row.needs_logits(JOB);
    const Cap<A> cap(p.softcap);
    A at_label = 0;
    if (VARIANT == PLAIN && needed && row.label >= 0) at_label = to_acc(x(row.label));

    Rival<A> rival = rival_of<JOB>(p, row);
    if (rival.label >= 0) rival.x = to_acc(x(rival.label));
    bool beaten = false;

    Stats<A> stats, recent;  // 512 logits are merged before they join the rest: rounding grows with C/512
    if (JOB == GRAD) {
        stats.max = p.max[r], stats.rest = p.rest[r];
        if (VARIANT != PLAIN) stats.mass = p.mass[r];
    } else if (needed) {
#pragma unroll 1
        for (int k = 0; k < classes; k += U) {
            A v[U], largest = -infinity<A>();
#pragma unroll
            for (int u = 0; u < U; ++u) v[u] = k + u < classes ? to_acc(x(k + u)) : -infinity<A>();
#pragma unroll
            for (int u = 0; u < U; ++u) {
                if (rival.label >= 0) beaten |= rival.is_beaten_by(v[u], k + u);
                if (has_softcap(VARIANT) && k + u < classes) v[u] = cap.of(v[u]).x;
                largest = max_acc(largest, v[u]);
            }
            Sum<VARIANT, A> sum(largest);
#pragma unroll
            for (int u = 0; u < U; ++u) {
                if (k + u >= classes) continue;
                if (VARIANT == PLAIN) sum.add(v[u]);
                else sum.add(v[u], row.a(k + u));
            }
            recent = merge<VARIANT>(recent, sum.stats());
            if ((k + U) % 512 == 0 || k + U >= classes) {
                stats = merge<VARIANT>(stats, recent);
                recent = Stats<A>();
            }
        }
    }
    Answer<T, VARIANT> answer(p, row, stats, true);
    if (VARIANT == PLAIN && row.label >= 0) answer.add_label(row, at_label);

    answer.template put<JOB>(p, row, r);
    put_correct<JOB>(p, r, answer, rival, beaten);
    if (!writes_grad(JOB)) return;
    const bool silent = JOB != LOG_SOFTMAX && row.scale == 0;
#pragma unroll 1
    for (int k = 0; k < classes; k += U) {
        A v[U];
#pragma unroll
        for (int u = 0; u < U; ++u) v[u] = needed && k + u < classes ? to_acc(x(k + u)) : -infinity<A>();
#pragma unroll
        for (int u = 0; u < U; ++u) {
            if (k + u >= classes) continue;
            A y;
            if (JOB == LOG_SOFTMAX) {
                y = (v[u] - stats.max) - answer.tail;
            } else if (VARIANT == PLAIN) {
                y = answer.grad(v[u], k + u == row.label ? row.on_label : 0);
            } else if (!has_softcap(VARIANT)) {
                y = answer.grad(v[u], row.a(k + u));
            } else {
                const Capped<A> c = cap.of(v[u]);
                y = answer.grad(c.x, row.a(k + u), c.slope);
            }
            put(k + u, from_acc(silent ? 0 : y, T()));
        }
    }
}
