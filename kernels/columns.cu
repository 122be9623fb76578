/* Softmax cross-entropy where the classes of a row lie apart and neighbouring rows are contiguous: axis 1 of
 * (N, C, H, W), without a copy.
 *
 *     loss = Σ a_k (lse - x_k) + z·lse²        grad_k = scale [(mass + 2 z lse) p_k - a_k]        (as rows.cu)
 *
 *   XE_COLUMNS(name, T, JOB, VARIANT, VEC, K, WARPS, STREAM, THREADS, BLOCKS)      COLUMNS
 *
 * Launch   a tile is 32·VEC neighbouring rows: a lane moves VEC of them in one access, a warp 32 coalesced accesses.
 *          WARPS = 1: a warp holds a tile, each thread K classes of its rows; else WARPS warps share it, and the
 *          classes go round among them. STREAM: K classes at a time, for any C. VEC > 1 needs the number of contiguous
 *          rows to be a multiple of VEC, and every class to be aligned to such an access; VEC = 1 takes any strides.
 * Moves    per row: STATS, LOSS read C; all others read C and write C. STREAM reads C once more for a gradient, the
 *          last classes first: from cache, as long as it holds the 32·VEC·C logits of every resident block.
 * Options  the work done once per row does not test for options if there are none: see lean.cuh.
 * Label    where warps share a row, gradients are written without testing each logit for the label: the label's is
 *          written again at the end, by the thread that has written its class.
 * Numbers  a thread sums relative to its maximum, which it leaves out and counts: the compare and the second add per
 *          logit cost less than a second pass without the maximum, which every row of a trained model would need. Parts
 *          merge in the order of the warps, and pieces of a stream from first to last. See stats.cuh.
 * Aliasing grad may be the logits: the same thread reads and writes an element, and x[label] is read before the barrier
 *          that all threads of a tile pass before they write.
 * Tried    On an H200: a row in one thread, 8 classes at a time: instruction-bound. Computing everything about a row in
 *          each of its warps: instruction-bound for 16-bit logits; now one thread does, and shares it on a board in
 *          shared memory. Not tried: a cluster over the classes. In rows.cu, rows streamed from L2 reach nine tenths of
 *          a copy.
 */

#include "lean.cuh"

// The logits (or gradients) of one class in VEC neighbouring rows, moved by one access.
template <class T, int VEC> struct Few {
    typedef typename Acc<T>::type A;
    static constexpr int BYTES = VEC * sizeof(T), WORDS = (BYTES + 3) / 4;
    u32 w[WORDS];

    XE_DEVICE void load(const T* from) {
        if constexpr (BYTES == 16) {
            const uint4 v = ld16(from);
            w[0] = v.x, w[1] = v.y, w[2] = v.z, w[3] = v.w;
        } else if constexpr (BYTES == 8) {
            const uint2 v = ld8(from);
            w[0] = v.x, w[1] = v.y;
        } else if constexpr (BYTES == 4) {
            w[0] = *reinterpret_cast<const u32*>(from);
        } else {
            w[0] = *reinterpret_cast<const u16*>(from);
        }
    }
    XE_DEVICE void store(T* to) const {
        if constexpr (BYTES == 16) st16(to, make_uint4(w[0], w[1], w[2], w[3]));
        else if constexpr (BYTES == 8) st8(to, make_uint2(w[0], w[1]));
        else if constexpr (BYTES == 4) *reinterpret_cast<u32*>(to) = w[0];
        else *reinterpret_cast<u16*>(to) = static_cast<u16>(w[0]);
    }
    XE_DEVICE void unpack(A (&x)[VEC]) const {
#pragma unroll
        for (int c = 0; c < VEC; ++c) {
            if constexpr (sizeof(T) == 2) x[c] = c % 2 ? high2<T>(w[c / 2]) : low2<T>(w[c / 2]);
            else if constexpr (sizeof(T) == 4) x[c] = bits_float(w[c]);
            else x[c] = Double{{w[2 * c], w[2 * c + 1]}}.value;
        }
    }
    XE_DEVICE void pack(const A (&x)[VEC]) {
#pragma unroll
        for (int c = 0; c < VEC; ++c) {
            if constexpr (sizeof(T) == 2) {
                if (c % 2 == 0) w[c / 2] = VEC == 1 ? from_acc(x[0], T()).bits : pack2(x[c], x[(c + 1) % VEC], T());
            } else if constexpr (sizeof(T) == 4) {
                w[c] = float_bits(x[c]);
            } else {
                Double d;
                d.value = x[c];
                w[2 * c] = d.w[0], w[2 * c + 1] = d.w[1];
            }
        }
    }
    // -inf, which stands in for a class that does not exist.
    XE_DEVICE void be_nothing() {
#pragma unroll
        for (int i = 0; i < WORDS; ++i) {
            if constexpr (sizeof(T) == 2) w[i] = Vector<T>::minus_infinity(T());
            else w[i] = sizeof(T) == 4 ? 0xff800000u : i % 2 ? 0xfff00000u : 0;
        }
    }
    // Sets row c to zero.
    XE_DEVICE void clear(int c) {
        if constexpr (sizeof(T) == 2) w[c / 2] &= c % 2 ? 0xffffu : 0xffff0000u;
        else if constexpr (sizeof(T) == 4) w[c] = 0;
        else w[2 * c] = w[2 * c + 1] = 0;
    }
    union Double { u32 w[2]; double value; };
};

// The largest of K classes, row by row.
template <class T, int VEC, int K, class A> XE_DEVICE void largest_of(const Few<T, VEC> (&v)[K], A (&m)[VEC]) {
    if constexpr (sizeof(T) == 2 && VEC > 1) {
        Few<T, VEC> most = v[0];
#pragma unroll
        for (int j = 1; j < K; ++j) {
#pragma unroll
            for (int i = 0; i < VEC / 2; ++i) most.w[i] = max2(most.w[i], v[j].w[i], T());
        }
        most.unpack(m);
#pragma unroll
        for (int c = 0; c < VEC; ++c) m[c] = max_acc(m[c], -infinity<A>());  // where all are NaN
    } else {
#pragma unroll
        for (int c = 0; c < VEC; ++c) m[c] = -infinity<A>();
#pragma unroll
        for (int j = 0; j < K; ++j) {
            A x[VEC];
            v[j].unpack(x);
#pragma unroll
            for (int c = 0; c < VEC; ++c) m[c] = max_acc(m[c], x[c]);
        }
    }
}

// The partial result for some classes of a row: rest leaves out the (first) maximum, and is -1 without classes; if
// every class has target mass, half the gap and the mass; for `correct` the largest logit before softcap, and its first
// class.
template <class A, int JOB, int VARIANT> struct Part {
    static constexpr bool RAW = writes_stats(JOB) && has_softcap(VARIANT);
    A max = -infinity<A>(), rest = -1, half_gap = 0, mass = 0, raw = -infinity<A>();
    int first = 0;

    XE_DEVICE void merge(const Part& other) {
        if (writes_stats(JOB)) {
            const A mine = RAW ? raw : max, its = RAW ? other.raw : other.max;
            first = mine == its ? min(first, other.first) : mine > its ? first : other.first;
            raw = max_acc(raw, other.raw);
        }
        const bool high = max >= other.max;
        const A top = high ? max : other.max, low = high ? other.max : max;
        const A drop = low == top ? 1 : exp_acc(low - top);
        rest = (high ? rest : other.rest) + (1 + (high ? other.rest : rest)) * drop;
        if (every_class(VARIANT)) {
            half_gap += other.half_gap + times(high ? other.mass : mass, half_below(top, low));
            mass += other.mass;
        }
        max = top;
    }

    // In shared memory, as numbers that are STRIDE apart.
    static constexpr int NUMBERS = 2 + (every_class(VARIANT) ? 2 : 0) + RAW;
    template <int STRIDE> XE_DEVICE void write(A* to, int* first_to) const {
        to[0] = max, to[STRIDE] = rest;
        if (every_class(VARIANT)) to[2 * STRIDE] = half_gap, to[3 * STRIDE] = mass;
        if (RAW) to[(NUMBERS - 1) * STRIDE] = raw;
        if (writes_stats(JOB)) *first_to = first;
    }
    template <int STRIDE> XE_DEVICE void read(const A* from, const int* first_from) {
        max = from[0], rest = from[STRIDE];
        if (every_class(VARIANT)) half_gap = from[2 * STRIDE], mass = from[3 * STRIDE];
        if (RAW) raw = from[(NUMBERS - 1) * STRIDE];
        if (writes_stats(JOB)) first = *first_from;
    }
};

// What a thread must know of a row to write its gradient (or log-softmax): entries are e^{x - max}·coef - a·scale,
// except the label's; and for targets by class the maximum's (`top`; NaN: none), where that may cancel.
template <class A, int JOB, int VARIANT, bool FEW> struct Rule {
    static constexpr int SILENT = -2, EXACT = -3;  // values of `label`: all zeros; every entry by `Answer::grad`
    A max, coef;                          // LOG_SOFTMAX: coef is the tail
    A at_label;                           // by class: the label's own share
    A each;                               // SMOOTH: each·scale
    A top, scale, mass, more, lost;       // by class
    int label;

    static constexpr int AT_LABEL = 2, NUMBERS = JOB == LOG_SOFTMAX ? 2 : by_class(VARIANT) ? 8 : every_class(VARIANT) ? 4 : 3;
    template <class F> XE_DEVICE void numbers(F f) {
        f(0, max), f(1, coef);
        if (JOB == LOG_SOFTMAX) return;
        f(AT_LABEL, at_label);
        if (by_class(VARIANT)) f(3, top), f(4, scale), f(5, mass), f(6, more), f(7, lost);
        else if (every_class(VARIANT)) f(3, each);
    }

    template <class T>
    XE_DEVICE void follow(const Row<T, VARIANT>& row, const Answer<T, VARIANT>& answer, Capped<A> at) {
        label = row.label, max = answer.stats.max;
        if (JOB == LOG_SOFTMAX) {
            coef = answer.tail;
            return;
        }
        const bool silent = row.scale == 0;
        coef = silent ? 0 : answer.share * answer.scale * Exponentials<A, FEW>(max).correction;
        if (silent) max = 0, label = SILENT;
        else if (!answer.products_are_finite()) label = EXACT;
        if (by_class(VARIANT)) {
            at_label = row.on_label;
            top = answer.confident && !silent ? max : not_a_number<A>();
            scale = answer.scale, mass = answer.stats.mass, more = answer.more;
            lost = answer.coef * (answer.stats.rest * answer.p_max);
        } else {
            at_label = answer.grad(at.x, row.each + row.on_label, at.slope);
            if (VARIANT % SLICE == SMOOTH) each = row.each * answer.scale;
        }
    }
};

// The target's shares, without the label's own and without a test for bad labels, of a thread's rows.
template <class T, int VARIANT> struct Shares {
    typedef typename Acc<T>::type A;
    const A* w;
    A each, keep;
    const T* q;
    const float* wide;
    i64 class_step, row_step;
    XE_DEVICE Shares(const Problem<T>& p, i64 o, i64 i) {
        const bool given = p.kind >= OF_LOGITS;
        const i64 at = o * p.target_outer + i * p.target_inner;
        w = p.weight, each = p.kind != NONE ? p.each : 0, keep = given ? p.keep : 0;
        q = p.kind == OF_LOGITS ? static_cast<const T*>(p.target) + at : nullptr;
        wide = p.kind == OF_FLOAT32 ? static_cast<const float*>(p.target) + at : nullptr;
        class_step = p.target_class, row_step = p.target_inner;
    }
    template <int VEC> XE_DEVICE void of(int k, A (&a)[VEC]) const {
#pragma unroll
        for (int c = 0; c < VEC; ++c) a[c] = each;
        if (!by_class(VARIANT)) return;
        if (q) {
#pragma unroll
            for (int c = 0; c < VEC; ++c) a[c] += keep * to_acc(q[k * class_step + c * row_step]);
        } else if (wide) {
#pragma unroll
            for (int c = 0; c < VEC; ++c) a[c] += keep * wide[k * class_step + c * row_step];
        }
        if (!w) return;
        const A of_class = w[k];  // inf or NaN counts only with target mass
#pragma unroll
        for (int c = 0; c < VEC; ++c) a[c] = a[c] == 0 ? 0 : a[c] * of_class;
    }
};

// A thread's share of its rows: K classes, WARPS apart.
template <class T, int JOB, int VARIANT, int VEC, int K, int WARPS> struct Held {
    typedef typename Acc<T>::type A;
    typedef Part<A, JOB, VARIANT> P;
    static constexpr bool FEW = WARPS == 1 && K <= 4;
    static constexpr int TOGETHER = K > 4 ? 4 : 2;  // classes per test of whether they exist
    const T* x;          // of class 0
    i64 class_step;
    int first, classes;  // class of v[0]; classes of the row, 0 for lanes without rows
    Few<T, VEC> v[K];

    XE_DEVICE int left() const { return classes - first; }
    static XE_DEVICE Capped<A> capped(const Cap<A>& cap, A x) {
        return has_softcap(VARIANT) ? cap.of(x) : Capped<A>{x, 1};
    }

    XE_DEVICE void load() {
        const T* from = x + first * class_step;
        const i64 step = WARPS * class_step;
#pragma unroll
        for (int j = 0; j < K; ++j) {
            if (j * WARPS < left()) v[j].load(from);
            else v[j].be_nothing();
            from += step;
        }
    }

    // The logit of class k in row c, which is `c·row_step` elements away.
    XE_DEVICE A at(int k, int c, i64 row_step) const {
        if (!FEW) return to_acc(x[static_cast<i64>(k) * class_step + c * row_step]);
        A y[VEC];
        v[0].unpack(y);
        A found = y[c];
#pragma unroll
        for (int j = 1; j < K; ++j) {
            v[j].unpack(y);
            found = k == j ? y[c] : found;
        }
        return found;
    }

    // Calls f(k, v) for each class that exists.
    template <bool EXACTLY, class F> XE_DEVICE void each_class(F f) {
#pragma unroll
        for (int g = 0; g < K; g += TOGETHER) {
            if (g * WARPS >= left()) break;
#pragma unroll
            for (int j = g; j < g + TOGETHER; ++j) {
                if (!EXACTLY || j * WARPS < left()) f(first + j * WARPS, v[j]);
            }
        }
    }

    XE_DEVICE void part(const Cap<A>& cap, const Shares<T, VARIANT>& shares, P (&parts)[VEC]) {
        A raw[VEC], top[VEC], rest[VEC], ties[VEC], half_gap[VEC], mass[VEC];
        int at[VEC];
        largest_of(v, raw);
#pragma unroll
        for (int c = 0; c < VEC; ++c) {
            top[c] = has_softcap(VARIANT) && left() > 0 ? cap.of(raw[c]).x : raw[c];
            rest[c] = ties[c] = half_gap[c] = mass[c] = 0, at[c] = classes;
        }
        each_class<VARIANT % SLICE != PLAIN || writes_stats(JOB)>([&](int k, const Few<T, VEC>& few) {
            A x[VEC], a[VEC];
            few.unpack(x);
            if (by_class(VARIANT)) shares.of(k, a);
#pragma unroll
            for (int c = 0; c < VEC; ++c) {
                if (writes_stats(JOB)) at[c] = x[c] == raw[c] ? min(at[c], k) : at[c];
                const A value = capped(cap, x[c]).x, e = Exponentials<A, FEW>(top[c]).of(value);
                if (value == top[c]) ties[c] += 1;
                else rest[c] += e;
                const A half = static_cast<A>(0.5) * value;
                if (VARIANT % SLICE == SMOOTH) half_gap[c] -= shares.each * half;
                if (!by_class(VARIANT)) continue;
                // max - x may overflow; 0·inf and inf - inf count as 0
                half_gap[c] += a[c] == 0 || value == top[c] ? 0 : a[c] * (static_cast<A>(0.5) * top[c] - half);
                mass[c] += a[c];
            }
        });
#pragma unroll
        for (int c = 0; c < VEC; ++c) {
            const Exponentials<A, FEW> powers(top[c]);
            const bool any = (WARPS == 1 && !writes_stats(JOB)) || top[c] > -infinity<A>();  // else the row is NaN anyway
            parts[c].max = top[c], parts[c].raw = raw[c], parts[c].first = at[c];
            parts[c].rest = rest[c] * powers.correction + ((any ? ties[c] : 0) - 1);
            if (VARIANT % SLICE == SMOOTH) {
                const int held = min(max(left() + WARPS - 1, 0) / WARPS, K);
                mass[c] = shares.each * static_cast<A>(held);
                half_gap[c] = shares.each == 0 ? 0 : half_gap[c] + (any ? static_cast<A>(0.5) * top[c] * mass[c] : 0);
            }
            parts[c].half_gap = half_gap[c], parts[c].mass = mass[c];
        }
    }

    // Writes the gradient (or log-softmax) of the classes held; g points to class 0. LABEL_LAST: the label's entry is
    // written at the end, so that no class needs a test for it.
    template <bool LABEL_LAST> XE_DEVICE void store(T* g, i64 step, const Cap<A>& cap, const Shares<T, VARIANT>& shares,
                         const Rule<A, JOB, VARIANT, FEW> (&rules)[VEC]) {
        typedef Rule<A, JOB, VARIANT, FEW> R;
        T* to = g + first * step;
        bool silent = false;
#pragma unroll
        for (int c = 0; c < VEC; ++c) silent |= JOB != LOG_SOFTMAX && rules[c].label == R::SILENT;
        if (silent) {
            rare_path();
#pragma unroll
            for (int c = 0; c < VEC; ++c) {
                if (rules[c].label != R::SILENT) continue;
#pragma unroll
                for (int j = 0; j < K; ++j) v[j].clear(c);  // so that they give no NaN
            }
        }
        each_class<true>([&](int k, Few<T, VEC>& few) {
            A y[VEC], a[VEC];
            few.unpack(y);
            if (by_class(VARIANT)) shares.of(k, a);
#pragma unroll
            for (int c = 0; c < VEC; ++c) {
                const R& rule = rules[c];
                if (JOB == LOG_SOFTMAX) {
                    y[c] = (y[c] - rule.max) - rule.coef;
                    continue;
                }
                const Capped<A> at = capped(cap, y[c]);
                const A e = Exponentials<A, FEW>(rule.max).of(at.x);
                if (by_class(VARIANT)) {
                    const A mine = rule.label == R::SILENT ? 0 : a[c] + (k == rule.label ? rule.at_label : 0);
                    const A kept = (rule.mass - mine) + rule.more;  // coef - a would lose `more`
                    y[c] = at.x == rule.top ? rule.scale * (kept - rule.lost) : e * rule.coef - rule.scale * mine;
                    y[c] *= at.slope;
                    continue;
                }
                y[c] = VARIANT % SLICE == SMOOTH ? e * rule.coef - rule.each : e * rule.coef * at.slope;
                if (!LABEL_LAST && k == rule.label) y[c] = rule.at_label;
            }
            few.pack(y);
            few.store(to);
            to += WARPS * step;
        });
    }
};

template <class T, int JOB, int VARIANT, int VEC, int K, int WARPS, bool STREAM, int THREADS>
XE_DEVICE void xent_columns(const Problem<T>& p) {
    typedef typename Acc<T>::type A;
    typedef Held<T, JOB, VARIANT, VEC, K, WARPS> H;
    typedef Part<A, JOB, VARIANT> P;
    typedef Rule<A, JOB, VARIANT, H::FEW> R;
    constexpr bool READS_STATS = JOB == GRAD, WRITES = writes_grad(JOB), ALONE = WARPS == 1;
    constexpr int ROWS = 32 * VEC, TILES = THREADS / 32 / WARPS;
    XE_SHARED(A, parts, ALONE || READS_STATS ? 1 : WARPS * P::NUMBERS * ROWS);
    XE_SHARED(int, firsts, !ALONE && writes_stats(JOB) ? WARPS * ROWS : 1);
    XE_SHARED(A, board, ALONE || !WRITES ? 1 : R::NUMBERS * ROWS);
    XE_SHARED(int, labels, ALONE || !WRITES ? 1 : ROWS);
    XE_SHARED(A, known, WRITES ? TILES * 3 * ROWS : 1);  // max, rest, mass, for EXACT

    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % WARPS, tile = threadIdx.x / 32 / WARPS;
    const i64 mine = ((static_cast<i64>(blockIdx.x) * TILES + tile) * 32 + lane) * VEC;
    const bool exists = mine < p.rows;
    if (ALONE && !exists) return;
    const i64 r = exists ? mine : 0;
    i64 o, i;
    if (p.rows >> 32 == 0) {
        o = static_cast<u32>(r) / static_cast<u32>(p.inner);
        i = static_cast<u32>(r) - static_cast<u32>(o) * static_cast<u32>(p.inner);
    } else {
        rare_path();
        o = r / p.inner;
        i = r - o * p.inner;
    }
    const i64 x_step = VEC > 1 ? 1 : p.logits_inner, g_step = VEC > 1 ? 1 : p.grad_inner;  // from row to row
    const auto gradient = [&] { return p.grad + (o * p.grad_outer + i * g_step); };
    T* const early = ALONE ? gradient() : nullptr;  // whichever way takes fewer registers
    const Cap<A> cap(p.softcap);
    const Shares<T, VARIANT> shares(p, o, i);
    H held;
    held.x = p.logits + (o * p.logits_outer + i * x_step), held.class_step = p.logits_class;
    held.first = warp, held.classes = exists ? static_cast<int>(p.classes) : 0;
    const int pieces = held.left() > 0 ? (held.left() - 1) / (WARPS * K) + 1 : 0;

    // Row c of a lane is finished by the thread of warp c; by itself, if there is but one warp.
    constexpr int MINE = ALONE ? VEC : 1;
    const bool finishes = ALONE || (warp < VEC && exists);
    const int finished = ALONE ? 0 : warp;
    i64 named[MINE] = {};
    if (finishes) {
        const i64 at = o * p.target_outer + (i + finished) * p.target_inner;
        labels_of(p.target, at, p.target_inner, static_cast<int>(p.kind), named);
    }
    if (!STREAM) held.load();

    P part[VEC];
    if (!READS_STATS) {
        if constexpr (STREAM) {
#pragma unroll 1
            for (int n = 0; n < pieces; ++n) {
                held.first = warp + n * (WARPS * K);
                held.load();
                P piece[VEC];
                held.part(cap, shares, piece);
#pragma unroll
                for (int c = 0; c < VEC; ++c) part[c].merge(piece[c]);
            }
        } else {
            held.part(cap, shares, part);
        }
    }
    if (!ALONE) {
        if (!READS_STATS) {
#pragma unroll
            for (int c = 0; c < VEC; ++c) {
                const int at = c * 32 + lane;
                part[c].template write<ROWS>(parts + warp * P::NUMBERS * ROWS + at, firsts + warp * ROWS + at);
            }
        }
        sync_block();  // the parts of all warps have been written
    }

    R rules[VEC];
    const bool scaled = WRITES && p.upstream;
    const auto finish = [&](const Problem<T>& p, int n) {
        const int c = ALONE ? n : warp, at = c * 32 + lane;
        A weight = 1, upstream = p.scale;
        if (p.sample_weight) {
            rare_path();
            weight = p.sample_weight[r + c];
        }
        if (scaled) {
            rare_path();
            upstream = p.upstream[(r + c) * p.upstream_step];
        }
        const Row<T, VARIANT> row(p, named[n], weight, upstream);
        const A at_label = held.at(max(row.label, 0), c, x_step);  // without a label, of class 0
        Stats<A> stats;
        P whole;
        if (READS_STATS) {
            stats.max = p.max[r + c], stats.rest = p.rest[r + c];
            if (by_class(VARIANT) || is_slice(VARIANT)) stats.mass = p.mass[r + c];
        } else {
            if (ALONE) {
                whole = part[n];
            } else {
                whole.template read<ROWS>(parts + at, firsts + at);
#pragma unroll 1
                for (int w = 1; w < WARPS; ++w) {
                    P other;
                    other.template read<ROWS>(parts + w * P::NUMBERS * ROWS + at, firsts + w * ROWS + at);
                    whole.merge(other);
                }
            }
            const bool counts = !every_class(VARIANT) || row.label >= 0 || (VARIANT >= SLICE && row.elsewhere) ||
                                p.kind >= OF_LOGITS;
            stats = {whole.max, whole.rest, counts ? 2 * whole.half_gap : 0, counts ? whole.mass : 0};
        }
        Answer<T, VARIANT> answer(p, row, stats, READS_STATS, READS_STATS);
        const Capped<A> label = has_softcap(VARIANT) ? cap.of(at_label) : Capped<A>{at_label, 1};
        if (!READS_STATS && row.label >= 0) answer.add_label(row, label.x);
        answer.template put<JOB>(p, row, r + c);
        put_correct<JOB>(p, r + c, answer, rival_of<JOB>(p, row), row.label != whole.first);
        if (!WRITES) return;
        R rule;
        rule.follow(row, answer, label);
        A* const to = known + tile * 3 * ROWS + at;
        to[0] = answer.stats.max, to[ROWS] = answer.stats.rest, to[2 * ROWS] = answer.stats.mass;
        if (ALONE) {
            rules[n] = rule;
        } else {
            rule.numbers([&](int f, A& value) { board[f * ROWS + at] = value; });
            labels[at] = rule.label;
        }
    };
    if (finishes) {
        specialized<VARIANT % SLICE == PLAIN>(p, [&](const Problem<T>& p) {
#pragma unroll
            for (int n = 0; n < MINE; ++n) finish(p, n);
        });
    }
    if (!WRITES) return;
    if (!ALONE) sync_block();  // what follows of every row is on the board, and the labels' logits have been read
    if (!exists) return;
    if (!ALONE) {
#pragma unroll
        for (int c = 0; c < VEC; ++c) {
            rules[c].numbers([&](int f, A& value) { value = board[f * ROWS + c * 32 + lane]; });
            rules[c].label = labels[c * 32 + lane];
        }
    }

    bool exact = false;
#pragma unroll
    for (int c = 0; c < VEC; ++c) exact |= rules[c].label == R::EXACT;
    if (JOB != LOG_SOFTMAX && exact) {
        rare_path();
#pragma unroll 1
        for (int c = 0; c < VEC; ++c) {
            const A* const from = known + tile * 3 * ROWS + c * 32 + lane;
            const Row<T, VARIANT> row(p, r + c);
            const Answer<T, VARIANT> answer(p, row, {from[0], from[ROWS], 0, from[2 * ROWS]}, true, true);
#pragma unroll 1
            for (int k = warp; k < held.classes; k += WARPS) {
                const Capped<A> at = H::capped(cap, to_acc(row.x[k * p.logits_class]));
                const A y = row.scale == 0 ? 0 : answer.grad(at.x, row.a(k), at.slope);
                row.g[k * p.grad_class] = from_acc(y, T());
            }
        }
        return;
    }

    constexpr bool LABEL_LAST = !ALONE && JOB != LOG_SOFTMAX && !by_class(VARIANT);
    T* const g = ALONE ? early : gradient();
    if constexpr (STREAM) {
#pragma unroll 1
        for (int n = pieces - 1; n >= 0; --n) {
            held.first = warp + n * (WARPS * K);
            held.load();
            held.template store<LABEL_LAST>(g, p.grad_class, cap, shares, rules);
        }
    } else {
        held.template store<LABEL_LAST>(g, p.grad_class, cap, shares, rules);
    }
    if (!LABEL_LAST) return;
#pragma unroll
    for (int c = 0; c < VEC; ++c) {  // by the thread that wrote the class before
        const int at = c * 32 + lane, label = labels[at];
        if (label < 0 || label % WARPS != warp) continue;
        g[static_cast<i64>(label) * p.grad_class + c * g_step] = from_acc(board[R::AT_LABEL * ROWS + at], T());
    }
}

#define XE_COLUMNS(name, T, JOB, VARIANT, VEC, K, WARPS, STREAM, THREADS, BLOCKS)                      \
    extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) name(const Problem<T> p) {             \
        xent_columns<T, JOB, VARIANT, VEC, K, WARPS, STREAM, THREADS>(open(p));                             \
    }
