// What keeps rows lean: much of the work on short ones is not per logit.

#pragma once
#include "stats.cuh"

// e^{x - max} of the classes of a row. Where they are few, what Powers needs beside them costs more than it saves.
template <class A, bool FEW> struct Exponentials : Powers<A> {
    XE_DEVICE explicit Exponentials(A max) : Powers<A>(max) {}
};
template <> struct Exponentials<float, true> {
    static constexpr float correction = 1;
    float max;
    XE_DEVICE explicit Exponentials(float max) : max(max) {}
    XE_DEVICE float of(float x) const { return exp_acc(x - max); }
};

// The labels of N rows, those of 64 bits apart.
template <int N> XE_DEVICE void labels_of(const void* target, i64 at, i64 step, int kind, i64 (&named)[N]) {
    if (!is_label(kind)) return;
    if (kind >= INT64) {
        labels_at(target, at, step, INT64, named);
    } else {
        seldom();
        labels_at(target, at, step, kind, named);
    }
}

// Most problems are given no options. What asks for them row by row is worked out twice over in the text where that is
// much of the work: once for such a problem, of which the compiler knows that there are none.

// Labels in 64 bits, no z-loss, no weights, no ragged rows. (A mean may well have its scale from memory.)
template <class T> XE_DEVICE bool is_usual(const Problem<T>& p) {
    const u64 weights = reinterpret_cast<u64>(p.weight) | reinterpret_cast<u64>(p.sample_weight);
    return static_cast<int>(p.kind) == INT64 && static_cast<int>(p.whole) && weights == 0 && p.z_loss == 0;
}

// Such a problem, with what is known of it as constants.
template <class T> XE_DEVICE Problem<T> as_usual(Problem<T> p) {
    p.kind = INT64, p.weight = p.sample_weight = nullptr, p.z_loss = 0, p.whole = 1;
    return p;
}

// Calls f with the problem, or where it may be usual and is, with that.
template <bool MAY_BE, class T, class F> XE_DEVICE void with_what_is_known(const Problem<T>& p, F f) {
    if (!MAY_BE) {
        f(p);
    } else if (is_usual(p)) {
        f(as_usual(p));
    } else {
        seldom();
        f(p);
    }
}
