// One problem as every kernel over rows takes it, and what targets and weights say of a row before a logit is read.
//
// N = outer·inner rows of C logits. Element k of row r = (o, i) lies at o·outer + k·class + i·inner of its array, in
// steps of elements, with o = r / inner and i = r % inner. What has one number per row lies side by side.

#pragma once
#include "numbers.cuh"

// What a launch does. Chosen when it is compiled, as are the variants:
enum Job {
    STATS,          // reads the logits, writes max, rest, gap, mass; loss and correct where they are wanted
    LOSS,           // reads the logits, writes the loss of each row
    GRAD,           // reads the logits, max, rest and mass, writes the gradient
    LOSS_AND_GRAD,  // reads the logits once, writes both (without a target: the softmax)
    STATS_AND_GRAD, // reads the logits once, writes what STATS and LOSS_AND_GRAD write
    LOG_SOFTMAX,    // reads the logits, writes their logarithmic softmax
};
enum Variant {
    PLAIN,    // class indices (or no target), and no option: pays for nothing else
    GENERAL,  // any target, weights, smoothing, z-loss, upstream per row
    CAPPED,   // GENERAL with softcap
};
XE_DEVICE constexpr bool writes_stats(int job) { return job == STATS || job == STATS_AND_GRAD; }
XE_DEVICE constexpr bool writes_grad(int job) { return job != STATS && job != LOSS; }  // or what takes its place

// What `target` holds.
enum Target { NONE, INT8, UINT8, INT16, UINT16, INT32, UINT32, INT64, UINT64, OF_LOGITS, OF_FLOAT32 };

// The one argument of every kernel over rows, by value: words of 8 bytes, field for field those of Problem in cuda.py.
template <class T> struct Problem {
    typedef typename Acc<T>::type A;
    const T* logits; i64 logits_outer, logits_class, logits_inner;
    T* grad; i64 grad_outer, grad_class, grad_inner;  // may be the logits, element for element
    const void* target; i64 kind, target_outer, target_class, target_inner;
    i64 rows, classes, inner;
    i64 ignores, ignore_index;                       // whether any label is ignored, and which
    double scale; const A* upstream; i64 upstream_step;  // the gradient is multiplied by scale, or by upstream[r·step]
    A *loss, *max, *rest, *gap, *mass;               // one number per row
    const A *weight, *sample_weight;                 // null: all 1
    double label_smoothing, z_loss, softcap;
    bool* correct;                                   // one per row, of labels; null: not wanted
    u32* ticket;                                     // null, or what `open` sets to 0 for the launch after this one
};

// What a kernel over rows does first: sums.cu counts its blocks with a ticket, and this launch comes before it.
template <class T> XE_DEVICE const Problem<T>& open(const Problem<T>& p) {
    if (p.ticket && blockIdx.x == 0 && threadIdx.x == 0) *p.ticket = 0;
    return p;
}

XE_DEVICE i64 label_at(const void* target, i64 at, i64 kind) {
    switch (kind) {
        case INT8: return static_cast<const signed char*>(target)[at];
        case UINT8: return static_cast<const unsigned char*>(target)[at];
        case INT16: return static_cast<const short*>(target)[at];
        case UINT16: return static_cast<const u16*>(target)[at];
        case INT32: return static_cast<const int*>(target)[at];
        case UINT32: return static_cast<const u32*>(target)[at];
        default: return static_cast<const i64*>(target)[at];  // of UINT64, what does not fit is negative: no class
    }
}

// What is known of a row before its logits are.
template <class T, int VARIANT> struct Row {
    typedef typename Acc<T>::type A;
    const T* x;        // element k at k·logits_class
    T* g;              // ... at k·grad_class
    int label;         // -1: no class is named
    A factor;          // multiplies the loss: the sample weight, 0 for an ignored row, NaN under a bad label
    A scale;           // multiplies the gradient: factor and upstream; exactly 0 where factor is
    bool has_target;
    bool bad;          // the label is no class, and not ignored
    // GENERAL. The target is a_k = w_k (keep·q_k + each).
    i64 kind, target_class;
    const void* q;     // of the distribution, element k at k·target_class
    const A* w;
    A keep, each;

    XE_DEVICE Row(const Problem<T>& p, i64 r) {
        const i64 o = p.inner == 1 ? r : r / p.inner, i = p.inner == 1 ? 0 : r % p.inner;
        x = p.logits + o * p.logits_outer + i * p.logits_inner;
        g = p.grad + o * p.grad_outer + i * p.grad_inner;
        kind = p.kind;
        has_target = kind != NONE;
        label = -1, bad = false;
        factor = VARIANT != PLAIN && p.sample_weight ? p.sample_weight[r] : 1;
        scale = p.upstream ? p.upstream[r * p.upstream_step] : static_cast<A>(p.scale);
        const i64 at = o * p.target_outer + i * p.target_inner;
        const bool is_label = INT8 <= kind && kind <= UINT64;
        if (is_label) {
            const i64 named = label_at(p.target, at, kind);
            const bool ignored = p.ignores && named == p.ignore_index;
            if (ignored) factor = 0;
            if (0 <= named && named < p.classes) label = static_cast<int>(named);
            else if (factor != 0) factor = not_a_number<A>();
            bad = label < 0 && !ignored;
        }
        scale = factor == 0 ? 0 : factor * scale;
        if (VARIANT == PLAIN) return;
        w = p.weight;
        const bool named = !is_label || label >= 0;  // a label that is no class has no target
        keep = has_target && named ? static_cast<A>(1 - p.label_smoothing) : 0;
        each = has_target && named ? static_cast<A>(p.label_smoothing / static_cast<double>(p.classes)) : 0;
        target_class = p.target_class;
        q = kind == OF_FLOAT32 ? static_cast<const void*>(static_cast<const float*>(p.target) + at)
                               : static_cast<const void*>(static_cast<const T*>(p.target) + at);
    }

    // The weighted, smoothed target of class k.
    XE_DEVICE A a(int k) const {
        A value = each;
        if (kind == OF_FLOAT32) value += keep * static_cast<const float*>(q)[k * target_class];
        else if (kind == OF_LOGITS) value += keep * to_acc(static_cast<const T*>(q)[k * target_class]);
        else if (k == label) value += keep;
        return w && value != 0 ? w[k] * value : value;  // a weight of inf or NaN counts only where something meets it
    }

    // Whether the numbers that a job writes depend on the logits: not in a row that does not count, or is NaN anyhow.
    XE_DEVICE bool needs_logits(int job) const {
        if (writes_stats(job) || job == LOG_SOFTMAX) return true;
        const A decides = job == GRAD ? scale : factor;
        return decides != 0 && decides == decides;
    }
};
