// A whole row in one thread: what T and P share. The logits come through x(k), the gradient goes to put(k, value).

#pragma once
#include "stats.cuh"

template <class T, int JOB, int VARIANT, class X, class Put>
XE_DEVICE void xent_thread(const Problem<T>& p, i64 r, const Row<T, VARIANT>& row, X x, Put put) {
    typedef typename Acc<T>::type A;
    constexpr int U = VARIANT == CAPPED ? 2 : 8;  // logits in flight, and against one maximum
    const int classes = static_cast<int>(p.classes);
    const bool needed = row.needs_logits(JOB);
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
                if (VARIANT == CAPPED && k + u < classes) v[u] = capped(v[u], p.softcap).x;
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
        if (VARIANT == PLAIN && row.label >= 0) stats.gap = at_label == stats.max ? 0 : stats.max - at_label;
    }
    const Answer<T, VARIANT> answer(p, row, stats);

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
                y = k + u == row.label ? answer.grad(v[u], static_cast<A>(1)) : answer.grad(v[u]);
            } else if (VARIANT == GENERAL) {
                y = answer.grad(v[u], row.a(k + u));
            } else {
                const Capped<A> c = capped(v[u], p.softcap);
                y = answer.grad(c.x, row.a(k + u), c.slope);
            }
            put(k + u, from_acc(silent ? 0 : y, T()));
        }
    }
}
