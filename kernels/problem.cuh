// The argument of every kernel over rows, and what targets and weights determine about a row before a logit is read.
//
// N = outer·inner rows of C logits. Element k of row r = (o, i), with o = r / inner and i = r % inner, is at
// o·outer + k·class + i·inner of its array, in elements. Arrays with one number per row are contiguous.

#pragma once
#include "numbers.cuh"

// What a launch computes; a compile-time parameter, as is the variant:
enum Job {
    STATS,          // reads the logits, writes max, rest, gap, mass; loss and correct if wanted
    LOSS,           // reads the logits, writes the loss of each row
    GRAD,           // reads the logits, max, rest and mass, writes the gradient
    LOSS_AND_GRAD,  // reads the logits once, writes both (without a target: the softmax)
    STATS_AND_GRAD, // reads the logits once, writes what STATS and LOSS_AND_GRAD write
    LOG_SOFTMAX,    // reads the logits, writes log-softmax
};
enum Variant {
    PLAIN,           // class indices, or no target: only the label's class has target mass
    SMOOTH,          // class indices with smoothing, no class weights: all classes also have one equal share
    SOFT,            // a distribution in the dtype of the logits, without class weights: every class has its own share
    GENERAL,         // any target, class weights
    CAPPED,          // PLAIN with softcap
    CAPPED_GENERAL,  // any target, with softcap
    // The same for logits of a slice of the classes, in STATS and GRAD; labels are those of all classes.
    SLICE,           // VARIANT % SLICE is the variant of whole rows
    PLAIN_SLICE = SLICE, SMOOTH_SLICE, SOFT_SLICE, GENERAL_SLICE, CAPPED_SLICE, CAPPED_GENERAL_SLICE,
};
XE_DEVICE constexpr bool is_slice(int variant) { return variant >= SLICE; }
XE_DEVICE constexpr bool has_softcap(int variant) {
    return variant % SLICE == CAPPED || variant % SLICE == CAPPED_GENERAL;
}
XE_DEVICE constexpr bool any_target(int variant) {
    return variant % SLICE == GENERAL || variant % SLICE == CAPPED_GENERAL;
}
XE_DEVICE constexpr bool by_class(int variant) { return variant % SLICE == SOFT || any_target(variant); }
XE_DEVICE constexpr bool every_class(int variant) {  // has target mass
    return by_class(variant) || variant % SLICE == SMOOTH;
}
XE_DEVICE constexpr bool writes_stats(int job) { return job == STATS || job == STATS_AND_GRAD; }
XE_DEVICE constexpr bool writes_grad(int job) { return job != STATS && job != LOSS; }  // or log-softmax in its place

// Kind of `target`.
enum Target { NONE, INT8, UINT8, INT16, UINT16, INT32, UINT32, INT64, UINT64, OF_LOGITS, OF_FLOAT32 };

// The only argument of every kernel over rows, by value: 8-byte words, field for field those of Problem in cuda.py.
template <class T> struct Problem {
    typedef typename Acc<T>::type A;
    const T* logits; i64 logits_outer, logits_class, logits_inner;
    T* grad; i64 grad_outer, grad_class, grad_inner;  // may be the logits, element for element
    const void* target; i64 kind, target_outer, target_class, target_inner;
    i64 rows, classes, inner;
    i64 ignores, ignore_index;                       // whether any label is ignored, and which
    alignas(8) A scale; const A* upstream; i64 upstream_step;  // factor of the gradient: scale, or upstream[r·step]
    A *loss, *max, *rest, *gap, *mass;               // one number per row
    const A *weight, *sample_weight;                 // null: all 1
    alignas(8) A keep; alignas(8) A each;            // smoothing makes keep·q + each of a target q
    alignas(8) A z_loss; alignas(8) A softcap;
    bool* correct;                                   // one per row, for labels; null: not wanted
    u32* ticket;                                     // null, or what `open` sets to 0 for the next launch
    A* of_parts; i64 parts, part;                    // a row has `parts` parts of `part` classes: their stats
    i64 whole;                                       // whether every row is whole vectors of 16 bytes
    i64 first, ahead;                                // blocks resident at the start; prefetch distance in rows
    i64 start, vocabulary;                           // slices: the first class, of all how many; `weight` is theirs
};

// The first thing a kernel over rows does: it zeroes the ticket by which sums.cu, launched next, counts its blocks.
template <class T> XE_DEVICE const Problem<T>& open(const Problem<T>& p) {
    if (p.ticket && blockIdx.x == 0 && threadIdx.x == 0) *p.ticket = 0;
    return p;
}

// The labels of N rows, `step` elements apart; the most common dtype first. A UINT64 label beyond INT64 becomes
// negative, which is no class.
template <int N> XE_DEVICE void labels_at(const void* target, i64 at, i64 step, int kind, i64 (&named)[N]) {
    const bool is_signed = kind % 2 == INT8 % 2;
#define XE_EACH_LABEL(type, expression)                                     \
    _Pragma("unroll") for (int n = 0; n < N; ++n) {                         \
        const type bits = static_cast<const type*>(target)[at + n * step];  \
        named[n] = expression;                                              \
    }
    if (kind >= INT64) {
        XE_EACH_LABEL(i64, bits)
    } else if (kind >= INT32) {
        XE_EACH_LABEL(u32, is_signed ? static_cast<i64>(static_cast<int>(bits)) : static_cast<i64>(bits))
    } else if (kind >= INT16) {
        XE_EACH_LABEL(u16, is_signed ? static_cast<i64>(static_cast<short>(bits)) : bits)
    } else {
        XE_EACH_LABEL(unsigned char, is_signed ? static_cast<i64>(static_cast<signed char>(bits)) : bits)
    }
#undef XE_EACH_LABEL
}
XE_DEVICE i64 label_at(const void* target, i64 at, int kind) {
    i64 named[1];
    labels_at(target, at, 0, kind, named);
    return named[0];
}
XE_DEVICE bool is_label(int kind) { return INT8 <= kind && kind <= UINT64; }

// The position of row r = o·p.inner + i in every array.
struct Place { i64 o, i; };
template <class T> XE_DEVICE Place place_of(const Problem<T>& p, i64 r) {
    return {p.inner == 1 ? r : r / p.inner, p.inner == 1 ? 0 : r % p.inner};
}

// Whether row r may count, as far as a cheap test shows: the logits of one that does not need not be read. Labels of 8
// and 16 bits are not tested.
template <class T> XE_DEVICE bool may_count(const Problem<T>& p, i64 r, Place at) {
    if (p.sample_weight && p.sample_weight[r] == 0) return false;
    const int kind = static_cast<int>(p.kind);
    if (kind < INT32 || kind > UINT64 || !static_cast<int>(p.ignores)) return true;
    const i64 element = at.o * p.target_outer + at.i * p.target_inner;
    if (kind >= INT64) return static_cast<const i64*>(p.target)[element] != p.ignore_index;
    const int bits = static_cast<const int*>(p.target)[element];
    return (kind == INT32 ? bits : static_cast<i64>(static_cast<u32>(bits))) != p.ignore_index;
}
// Prefetches its label to L2.
template <class T> XE_DEVICE void prefetch_label(const Problem<T>& p, Place at) {
    const int kind = static_cast<int>(p.kind);
    if (!is_label(kind)) return;
    const i64 element = at.o * p.target_outer + at.i * p.target_inner;
    prefetch(static_cast<const char*>(p.target) + (element << (kind - INT8) / 2));
}

// Everything known of a row before its logits. Class k has the share a_k = w_k (keep·q_k + each) of the target, and the
// label's class `on_label` in addition. (SMOOTH: with no valid label, no share counts.)
template <class T, int VARIANT> struct Row {
    typedef typename Acc<T>::type A;
    const T* x;        // element k at k·logits_class
    T* g;              // ... at k·grad_class
    int label;         // -1: none, or none of these classes
    A factor;          // multiplies the loss: the sample weight, 0 for an ignored row, NaN under a bad label
    A scale;           // multiplies the gradient: factor and upstream; exactly 0 where factor is
    bool has_target;
    bool bad;          // the label is no class, and not ignored
    bool elsewhere;    // slices: the label is a class of another slice
    A on_label, each;
    // GENERAL
    int kind;
    i64 target_class;
    const void* q;     // of the distribution, element k at k·target_class
    const A* w;
    A keep;

    Row() = default;
    XE_DEVICE Row(const Problem<T>& p, i64 r) : Row(p, r, place_of(p, r)) {}
    XE_DEVICE Row(const Problem<T>& p, i64 r, Place at)
        : Row(p, is_label(kind_of(p)) ? label_at(p.target, at.o * p.target_outer + at.i * p.target_inner, kind_of(p)) : 0,
              p.sample_weight ? p.sample_weight[r] : 1, p.upstream ? p.upstream[r * p.upstream_step] : p.scale) {
        x = p.logits + (at.o * p.logits_outer + at.i * p.logits_inner);
        g = p.grad + (at.o * p.grad_outer + at.i * p.grad_inner);
        if (!by_class(VARIANT)) return;
        keep = kind >= OF_LOGITS ? p.keep : 0;
        target_class = p.target_class;
        const i64 element = at.o * p.target_outer + at.i * p.target_inner;
        q = kind == OF_FLOAT32 ? static_cast<const void*>(static_cast<const float*>(p.target) + element)
                               : static_cast<const void*>(static_cast<const T*>(p.target) + element);
    }
    // All fields but the addresses, from what has been loaded.
    XE_DEVICE Row(const Problem<T>& p, i64 named, A weight, A upstream) {
        kind = kind_of(p);
        has_target = kind != NONE;
        const bool named_one = is_label(kind), ignored = named_one && static_cast<int>(p.ignores) && named == p.ignore_index;
        const u64 at = static_cast<u64>(named) - (is_slice(VARIANT) ? static_cast<u64>(p.start) : 0);
        const bool found =
            named_one && static_cast<u64>(named) < static_cast<u64>(is_slice(VARIANT) ? p.vocabulary : p.classes);
        elsewhere = is_slice(VARIANT) && found && at >= static_cast<u64>(p.classes);
        const bool here = found && !elsewhere;
        label = here ? static_cast<int>(at) : -1;
        bad = named_one && !found && !ignored;
        factor = ignored ? 0 : bad && weight != 0 ? not_a_number<A>() : weight;
        scale = factor == 0 ? 0 : factor * upstream;
        on_label = !here ? 0 : every_class(VARIANT) ? p.keep : 1;
        w = VARIANT % SLICE == SOFT ? nullptr : p.weight;
        if (w && on_label != 0) on_label *= w[label];
        each = VARIANT % SLICE == SMOOTH || VARIANT % SLICE == SOFT ||
                       (any_target(VARIANT) && (found || kind >= OF_LOGITS)) ? p.each : 0;
    }
    static XE_DEVICE int kind_of(const Problem<T>& p) {
        return VARIANT % SLICE == SOFT ? OF_LOGITS : static_cast<int>(p.kind);
    }

    // Restricts it to `count` contiguous classes. The label may be none of them.
    XE_DEVICE void narrow(i64 start, int count) {
        x += start, g += start;
        if (by_class(VARIANT)) {
            q = kind == OF_FLOAT32 ? static_cast<const void*>(static_cast<const float*>(q) + start)
                                   : static_cast<const void*>(static_cast<const T*>(q) + start);
        }
        if (w) w += start;
        const i64 named = label - start;
        label = label >= 0 && 0 <= named && named < count ? static_cast<int>(named) : -1;
    }

    // Class k's share of the weighted, smoothed target.
    XE_DEVICE A a(int k) const { return k == label ? beside_label(k) + on_label : beside_label(k); }
    // ... without the label's own part.
    XE_DEVICE A beside_label(int k) const {
        A value = each;
        if (!by_class(VARIANT)) return value;
        if (kind == OF_FLOAT32) value += keep * static_cast<const float*>(q)[k * target_class];
        else if (kind == OF_LOGITS) value += keep * to_acc(static_cast<const T*>(q)[k * target_class]);
        return weighted(value, k);
    }
    XE_DEVICE A weighted(A value, int k) const {
        return w && value != 0 ? w[k] * value : value;  // a weight of inf or NaN counts only with target mass
    }

    // Whether what the job writes depends on the logits: not if the row does not count, or is NaN anyway.
    XE_DEVICE bool needs_logits(int job) const {
        if (writes_stats(job) || job == LOG_SOFTMAX) return true;
        const A decides = job == GRAD ? scale : factor;
        return decides != 0 && decides == decides;
    }
};
