// Savings for short rows, where much of the work is per row rather than per logit.

#pragma once
#include "stats.cuh"

// e^{x - max} over the classes of a row. For FEW classes, setting up Powers costs more than it saves.
template <class A, bool FEW> struct Exponentials : Powers<A> {
    XE_DEVICE explicit Exponentials(A max) : Powers<A>(max) {}
};
template <> struct Exponentials<float, true> {
    static constexpr float correction = 1;
    float max;
    XE_DEVICE explicit Exponentials(float max) : max(max) {}
    XE_DEVICE float of(float x) const { return exp_acc(x - max); }
};

// The labels of N rows; 64-bit labels take the common path.
template <int N> XE_DEVICE void labels_of(const void* target, i64 at, i64 step, int kind, i64 (&named)[N]) {
    if (!is_label(kind)) return;
    if (kind >= INT64) {
        labels_at(target, at, step, INT64, named);
    } else {
        rare_path();
        labels_at(target, at, step, kind, named);
    }
}

// Most problems have no options. Where testing for options would be much of the work per row, the code exists twice:
// once for such a problem, with the options as compile-time constants.

// 64-bit labels, no z-loss, no weights, no unaligned rows. (The scale of a mean may still come from memory.)
template <class T> XE_DEVICE bool has_no_options(const Problem<T>& p) {
    const u64 weights = reinterpret_cast<u64>(p.weight) | reinterpret_cast<u64>(p.sample_weight);
    return static_cast<int>(p.kind) == INT64 && static_cast<int>(p.whole) && weights == 0 && p.z_loss == 0;
}

// The same problem, with its options as constants.
template <class T> XE_DEVICE Problem<T> without_options(Problem<T> p) {
    p.kind = INT64, p.weight = p.sample_weight = nullptr, p.z_loss = 0, p.whole = 1;
    return p;
}

// Calls f with the problem, or with without_options of it: if MAY, and if it has none.
template <bool MAY, class T, class F> XE_DEVICE void specialized(const Problem<T>& p, F f) {
    if (!MAY) {
        f(p);
    } else if (has_no_options(p)) {
        f(without_options(p));
    } else {
        rare_path();
        f(p);
    }
}
