/* Softmax cross-entropy on millions of contiguous rows of few classes: (N, C) with C up to 64.
 *
 *     loss = Σ a_k (lse - x_k) + z·lse²        grad_k = scale [(mass + 2 z lse) p_k - a_k]        (as rows.cu)
 *
 *   XE_TINY(name, T, JOB, VARIANT, C, EACH, THREADS, BLOCKS)      TINY: each row is held by one thread, in registers
 *
 * Compiled for its C, so that all loops over classes are unrolled and all shared memory offsets are constants.
 *
 * Launch   THREADS threads with EACH rows each, 32 apart; no warp waits for another. EACH > 1 for rows with so few
 *          classes that the work that belongs to no row would dominate. THREADS, BLOCKS: __launch_bounds__.
 * Moves    per row: C in, and C out if a gradient is written. Rows that do not count are read, too. A target
 *          distribution is read once.
 * Vectors  Rows that are one access of 1 to 16 bytes, or a few vectors of 16, are read and written directly. Otherwise
 *          the rows of a warp are a contiguous range of memory, 16-byte aligned if the array is: it is copied to shared
 *          memory in vectors, and each thread reads its row from there by the widest access that divides a row. Rows
 *          are then an odd number of accesses apart, which avoids bank conflicts; rows of an even number of vectors are
 *          padded by one. The gradient takes the same way back. An unaligned array is copied element by element.
 * Options  for rows of up to 12 bytes, most of the work would be testing for options: see lean.cuh. A full warp of
 *          contiguous rows without options has its own copy of the code.
 * Numbers  everything except the maximum is summed separately, so confident rows need no second pass: that takes two
 *          instructions per logit, where memory leaves time for fifteen. A sum goes from the last class to the first.
 * Aliasing grad may be the logits: a warp has read its rows before it writes any of them.
 * Tried    On an H200: rows of 64 and 128 bytes directly from and to memory: 78 and 62 % of a copy's bandwidth in
 *          float32 with gradient (101 and 83 without), because each store then fills half a sector. Padding shared
 *          memory by one word after every 32: 3 to 4 instructions per logit for the addresses.
 */

#include "lean.cuh"

// 32·EACH rows of C numbers, which a warp reads or writes.
template <class Q, int C, int EACH> struct Rows {
    static constexpr int BYTES = C * sizeof(Q), SIZE = 16 / sizeof(Q), TURNS = (EACH * BYTES + 15) / 16;
    static constexpr int WIDTH = BYTES % 16 == 0 ? 16 : BYTES % 8 == 0 ? 8 : BYTES % 4 == 0 ? 4 : 2;  // of an access
    static constexpr int APART = C + (BYTES % 32 == 0 ? SIZE : 0);  // row stride in shared memory
    static constexpr int SHARED = EACH * 32 * APART * sizeof(Q) / 16;  // vectors per warp
    // Whether rows are read and written directly, without shared memory.
    static constexpr bool direct(bool writes) { return BYTES == WIDTH || (WIDTH == 16 && BYTES <= (writes ? 32 : 64)); }

    static XE_DEVICE bool lies_on(const Q* at, int bytes) { return (reinterpret_cast<u64>(at) & (bytes - 1)) == 0; }
    static XE_DEVICE int place_of(int e) { return APART == C ? e : e + e / C * SIZE; }

    // Reads or writes a row, WIDTH bytes aligned.
    template <class A> static XE_DEVICE void get(const Q* from, A (&x)[C]) {
        if constexpr (WIDTH == 2) {
            elements(from, x);
        } else {
            u32 w[BYTES / 4];
#pragma unroll
            for (int i = 0; i < BYTES / 4; i += WIDTH / 4) {
                const Q* const at = from + i * 4 / static_cast<int>(sizeof(Q));
                if constexpr (WIDTH == 16) {
                    const uint4 v = ld16(at);
                    w[i] = v.x, w[i + 1] = v.y, w[i + 2] = v.z, w[i + 3] = v.w;
                } else if constexpr (WIDTH == 8) {
                    const u64 v = *reinterpret_cast<const u64*>(at);
                    w[i] = static_cast<u32>(v), w[i + 1] = static_cast<u32>(v >> 32);
                } else {
                    w[i] = *reinterpret_cast<const u32*>(at);
                }
            }
#pragma unroll
            for (int k = 0; k < C; ++k) x[k] = number(w, k, Q());
        }
    }
    static XE_DEVICE void put(Q* to, const typename Acc<Q>::type (&y)[C], bool silent) {
        if constexpr (WIDTH == 2) {
#pragma unroll
            for (int k = 0; k < C; ++k) to[k] = from_acc(silent ? 0 : y[k], Q());
        } else {
            u32 w[BYTES / 4];
#pragma unroll
            for (int k = 0; k < C; ++k) set(w, k, y, Q());
#pragma unroll
            for (int i = 0; i < BYTES / 4; ++i) w[i] = silent ? 0 : w[i];
#pragma unroll
            for (int i = 0; i < BYTES / 4; i += WIDTH / 4) {
                Q* const at = to + i * 4 / static_cast<int>(sizeof(Q));
                if constexpr (WIDTH == 16) st16(at, make_uint4(w[i], w[i + 1], w[i + 2], w[i + 3]));
                else if constexpr (WIDTH == 8) *reinterpret_cast<u64*>(at) = static_cast<u64>(w[i + 1]) << 32 | w[i];
                else *reinterpret_cast<u32*>(at) = w[i];
            }
        }
    }
    // ... and reads one that is not.
    template <class A> static XE_DEVICE void elements(const Q* from, A (&x)[C], i64 step = 1) {
#pragma unroll
        for (int k = 0; k < C; ++k) x[k] = to_acc(from[k * step]);
    }

    template <class H> static XE_DEVICE float number(const u32* w, int k, H) {
        return k % 2 ? high2<H>(w[k / 2]) : low2<H>(w[k / 2]);
    }
    static XE_DEVICE float number(const u32* w, int k, float) { return bits_float(w[k]); }
    static XE_DEVICE double number(const u32* w, int k, double) {
        return bits_double(static_cast<u64>(w[2 * k + 1]) << 32 | w[2 * k]);
    }
    template <class H> static XE_DEVICE void set(u32* w, int k, const float (&y)[C], H) {
        if (k % 2) w[k / 2] = pack2(y[k - 1], y[k], H());
    }
    static XE_DEVICE void set(u32* w, int k, const float (&y)[C], float) { w[k] = float_bits(y[k]); }
    static XE_DEVICE void set(u32* w, int k, const double (&y)[C], double) {
        w[2 * k] = static_cast<u32>(double_bits(y[k])), w[2 * k + 1] = static_cast<u32>(double_bits(y[k]) >> 32);
    }

    // Between global and shared memory, by a warp: all loads are issued before the first is used. If the range is not
    // 16-byte aligned, it has no vectors.
    static XE_DEVICE int vectors_of(const Q* at, int here) { return lies_on(at, 16) ? here * C / SIZE : 0; }
    struct Loaded { uint4 v[TURNS]; };
    static XE_DEVICE Loaded load(const Q* from, int vectors) {
        const int lane = threadIdx.x % 32;
        Loaded loaded;
#pragma unroll
        for (int i = 0; i < TURNS; ++i) {
            loaded.v[i] = i * 32 + lane < vectors ? ld16(from + (i * 32 + lane) * SIZE) : make_uint4(0, 0, 0, 0);
        }
        return loaded;
    }
    static XE_DEVICE void to_shared(const Loaded& loaded, Q* tile, const Q* from, int vectors, int here) {
        const int lane = threadIdx.x % 32;
#pragma unroll
        for (int i = 0; i < TURNS; ++i) {
            if (i * 32 + lane < vectors) st16(tile + place_of((i * 32 + lane) * SIZE), loaded.v[i]);
        }
        if (vectors * SIZE < here * C) {
            rare_path();
#pragma unroll 1
            for (int e = vectors * SIZE + lane; e < here * C; e += 32) tile[place_of(e)] = from[e];
        }
        sync_warp();  // the rows are in shared memory, from all lanes
    }
    static XE_DEVICE void from_shared(Q* to, const Q* tile, int vectors, int here) {
        const int lane = threadIdx.x % 32;
#pragma unroll
        for (int i = 0; i < TURNS; ++i) {
            if (i * 32 + lane < vectors) st16(to + (i * 32 + lane) * SIZE, ld16(tile + place_of((i * 32 + lane) * SIZE)));
        }
        if (vectors * SIZE < here * C) {
            rare_path();
#pragma unroll 1
            for (int e = vectors * SIZE + lane; e < here * C; e += 32) to[e] = tile[place_of(e)];
        }
    }

    // A row, read directly; `aligned`: to WIDTH bytes.
    template <class A> static XE_DEVICE void get_from_memory(const Q* from, bool aligned, A (&x)[C]) {
        if (aligned) get(from, x);
        else {
            rare_path();
            elements(from, x);
        }
    }
};

// One row, by one thread. `x`: its logits, at the end its gradient. `a`: the shares of the target, without the label's
// own. `again`: the logits in memory; `g`: where the gradient goes.
template <class T, int JOB, int VARIANT, int C> struct Thread {
    typedef typename Acc<T>::type A;
    const Problem<T>& p;
    const Row<T, VARIANT>& row;
    const i64 r;

    XE_DEVICE static Capped<A> capped(const Cap<A>& cap, A x) {
        return has_softcap(VARIANT) ? cap.of(x) : Capped<A>{x, 1};
    }

    // Returns whether `x` is now the gradient; else it is already in `g`.
    XE_DEVICE bool work(A (&x)[C], A (&a)[C], const T* again, T* g) const {
        const Cap<A> cap(p.softcap);
        const int label = row.label;
        A raw = -infinity<A>(), at_label = 0;
#pragma unroll
        for (int k = 0; k < C; ++k) {
            raw = larger(raw, x[k]);
            at_label = k == label ? x[k] : at_label;
        }
        Stats<A> stats;
        const Capped<A> highest = capped(cap, raw);
        stats.max = JOB == GRAD ? p.max[r] : highest.x;

        // The sum without the maximum; how often the maximum occurs, and its first class's share of the target.
        const Exponentials<A, C <= 8> powers(stats.max);
        const A half_max = static_cast<A>(0.5) * stats.max;
        A others = 0, ties = 0, half_gap = 0, mass = 0, slope[C], top_a = 0;
        int top = -1;
#pragma unroll
        for (int k = C - 1; k >= 0; --k) {
            const bool is_top = x[k] == raw;
            const Capped<A> c = capped(cap, x[k]);
            const A e = powers.of(c.x);
            if (every_class(VARIANT)) {
                a[k] += k == label ? row.on_label : 0;
                const A half = half_max - static_cast<A>(0.5) * c.x;
                // 0·inf and inf - inf count as 0; softcap can make logits equal
                if (a[k] != 0 && c.x != highest.x) half_gap += a[k] * half;
                mass += a[k];
                if (is_top) top_a = a[k];
            }
            if (is_top) ties += 1, top = k;
            else others += e;
            slope[k] = c.slope;
            if (JOB != LOG_SOFTMAX) x[k] = e;
        }
        if (JOB == GRAD) {
            stats.rest = p.rest[r];
            if (by_class(VARIANT) || is_slice(VARIANT)) stats.mass = p.mass[r];
            if (highest.x != stats.max) top = -1;  // the stats belong to other logits
        } else {
            stats.rest = others * powers.correction + (ties - 1), stats.gap = 2 * half_gap, stats.mass = mass;
        }
        Answer<T, VARIANT> answer(p, row, stats, true, JOB == GRAD);
        const Capped<A> at = capped(cap, at_label);
        if (!every_class(VARIANT)) answer.add_label(row, at.x);
        answer.template put<JOB>(p, row, r);
        const Rival<A> rival = rival_of<JOB>(p, row);
        put_correct<JOB>(p, r, answer, rival, rival.label != top);
        if (!writes_grad(JOB)) return false;

        if (JOB == LOG_SOFTMAX) {
#pragma unroll
            for (int k = 0; k < C; ++k) x[k] = (x[k] - stats.max) - answer.tail;
            return true;
        }
        if (row.scale != 0 && !answer.products_are_finite()) {
            rare_path();
#pragma unroll 1
            for (int k = 0; k < C; ++k) {
                const Capped<A> c = capped(cap, to_acc(again[k]));
                g[k] = from_acc(answer.grad(c.x, row.a(k), c.slope), T());
            }
            return false;
        }
        // Where coef·p - a may cancel: at the label, and the maximum.
        const int special = !every_class(VARIANT) ? label : answer.confident ? top : -1;
        const A there = every_class(VARIANT) ? answer.grad(stats.max, top_a, highest.slope)
                                             : answer.grad(at.x, row.on_label, at.slope);
        const A factor = answer.share * powers.correction * (every_class(VARIANT) ? 1 : answer.scale);
#pragma unroll
        for (int k = 0; k < C; ++k) {
            A y = x[k] * factor;
            if (every_class(VARIANT)) y = (x[k] * factor - a[k]) * answer.scale;
            x[k] = k == special ? there : has_softcap(VARIANT) ? y * slope[k] : y;
        }
        return true;
    }
};

// The shares of the target, without the label's own. Called by whole warps.
template <class T, int C, int VARIANT, class A>
XE_DEVICE void shares(const Problem<T>& p, const Row<T, VARIANT>& row, uint4* shared, i64 first, int here, int mine,
                      A (&a)[C]) {
    const bool dense = p.target_class == 1 && p.target_outer == C * p.inner && (p.inner == 1 || p.target_inner == C);
    const auto read = [&](auto type) {
        typedef decltype(type) Q;
        typedef Rows<Q, C, 1> Of;
        const Q* const from = static_cast<const Q*>(p.target) + first * C;
        if (!dense) {
            Of::elements(static_cast<const Q*>(row.q), a, p.target_class);
        } else if (Of::direct(false)) {
            Of::get_from_memory(from + mine * C, Of::lies_on(from, Of::WIDTH), a);
        } else {
            Q* const tile = reinterpret_cast<Q*>(shared);
            const int vectors = Of::vectors_of(from, here);
            Of::to_shared(Of::load(from, vectors), tile, from, vectors, here);
            Of::get(tile + mine * Of::APART, a);
            sync_warp();  // all rows have been read, before gradients take their place
        }
    };
    if (p.kind < OF_LOGITS) {
#pragma unroll
        for (int k = 0; k < C; ++k) a[k] = row.each;
    } else {
        if (sizeof(T) != 4 && p.kind == OF_FLOAT32) read(0.0f);
        else read(T());
#pragma unroll
        for (int k = 0; k < C; ++k) a[k] = row.each + row.keep * a[k];
    }
    if (p.weight) {
#pragma unroll
        for (int k = 0; k < C; ++k) a[k] = row.weighted(a[k], k);
    }
}

// What is known of a thread's rows before their logits: row `r` and others 32 apart, some of which may be past the last.
template <bool NO_OPTIONS, int JOB, class T, int VARIANT, int EACH>
XE_DEVICE void known_of(const Problem<T>& p, i64 r, Row<T, VARIANT> (&rows)[EACH]) {
    typedef typename Acc<T>::type A;
    if constexpr (by_class(VARIANT)) {
        static_assert(EACH == 1, "a distribution is read for one row at a time");
        rows[0] = Row<T, VARIANT>(p, min(r, p.rows - 1));
    } else {
        const int kind = static_cast<int>(p.kind);
        i64 at[EACH], named[EACH] = {};
        A weight[EACH], upstream[EACH];
#pragma unroll
        for (int n = 0; n < EACH; ++n) {
            at[n] = NO_OPTIONS ? r + 32 * n : min(r + 32 * n, p.rows - 1);
            weight[n] = 1, upstream[n] = p.scale;
        }
        if constexpr (NO_OPTIONS) {
            labels_at(p.target, r, 32, kind, named);
        } else {
#pragma unroll
            for (int n = 0; n < EACH; ++n) {
                i64 one[1] = {}, place = at[n] * p.target_outer;
                if (p.inner != 1) {
                    rare_path();
                    place = at[n] / p.inner * p.target_outer + at[n] % p.inner * p.target_inner;
                }
                labels_of(p.target, place, 0, kind, one);
                named[n] = one[0];
            }
        }
        if (p.sample_weight) {
            rare_path();
#pragma unroll
            for (int n = 0; n < EACH; ++n) weight[n] = p.sample_weight[at[n]];
        }
        if (writes_grad(JOB) && p.upstream) {
            rare_path();
#pragma unroll
            for (int n = 0; n < EACH; ++n) upstream[n] = p.upstream[at[n] * p.upstream_step];
        }
#pragma unroll
        for (int n = 0; n < EACH; ++n) rows[n] = Row<T, VARIANT>(p, named[n], weight[n], upstream[n]);
    }
}

// NO_OPTIONS: all rows of the warp exist, logits and gradient are 16-byte aligned, and labels are contiguous.
template <bool NO_OPTIONS, int JOB, int VARIANT, int C, int EACH, class T>
XE_DEVICE void xent_tiny(const Problem<T>& p, i64 first, uint4* shared) {
    typedef typename Acc<T>::type A;
    typedef Rows<T, C, EACH> Of;
    constexpr bool WRITES = writes_grad(JOB), DIRECT = Of::direct(WRITES);
    const int lane = threadIdx.x % 32;
    const int here = NO_OPTIONS ? 32 * EACH : static_cast<int>(min(p.rows - first, static_cast<i64>(32 * EACH)));
    const T* const logits = p.logits + first * C;
    T* const grad = p.grad + first * C;
    T* const tile = reinterpret_cast<T*>(shared);

    // The loads of the logits and of everything else about a row are in flight together.
    A x[EACH][C], a[C];
    const int vectors = NO_OPTIONS ? here * C / Of::SIZE : Of::vectors_of(logits, here);
    typename Of::Loaded loaded;
    if constexpr (DIRECT) {
        const bool aligned = NO_OPTIONS || Of::lies_on(logits, Of::WIDTH);
#pragma unroll
        for (int n = 0; n < EACH; ++n) {
            if (n * 32 + lane < here) Of::get_from_memory(logits + (n * 32 + lane) * C, aligned, x[n]);
        }
    } else {
        loaded = Of::load(logits, vectors);
    }
    Row<T, VARIANT> rows[EACH];
    known_of<NO_OPTIONS, JOB>(p, first + lane, rows);
    if constexpr (!DIRECT) {
        Of::to_shared(loaded, tile, logits, vectors, here);
#pragma unroll
        for (int n = 0; n < EACH; ++n) {
            if (n * 32 + lane < here) Of::get(tile + (n * 32 + lane) * Of::APART, x[n]);
        }
    }
    if (every_class(VARIANT)) {
        sync_warp();  // all rows have been read, before those of a distribution take their place
        shares<T, C>(p, rows[0], shared, first, here, lane < here ? lane : 0, a);
    }

    const bool aligned = NO_OPTIONS || !DIRECT || Of::lies_on(grad, Of::WIDTH);
#pragma unroll
    for (int n = 0; n < EACH; ++n) {
        const int at = n * 32 + lane;
        T* const g = DIRECT ? grad + at * C : tile + at * Of::APART;
        const Thread<T, JOB, VARIANT, C> thread{p, rows[n], first + at};
        if (at >= here || !thread.work(x[n], a, logits + at * C, g)) continue;
        const bool silent = JOB != LOG_SOFTMAX && rows[n].scale == 0;
        if (aligned) {
            Of::put(g, x[n], silent);
        } else {
            rare_path();
#pragma unroll
            for (int k = 0; k < C; ++k) g[k] = from_acc(silent ? 0 : x[n][k], T());
        }
    }
    if (!WRITES || DIRECT) return;
    sync_warp();  // the gradients of all rows are in shared memory
    Of::from_shared(grad, tile, NO_OPTIONS ? vectors : Of::vectors_of(grad, here), here);
}

template <class T, int JOB, int VARIANT, int C, int EACH, int THREADS> XE_DEVICE void xent_tiny(const Problem<T>& p) {
    typedef Rows<float, C, 1> Wide;
    constexpr int BESIDE = by_class(VARIANT) && !Wide::direct(false) ? Wide::SHARED : 0;
    constexpr int OWN = Rows<T, C, EACH>::direct(writes_grad(JOB)) ? 0 : Rows<T, C, EACH>::SHARED;
    constexpr int ROOM = OWN > BESIDE ? OWN : BESIDE;
    XE_SHARED(uint4, tiles, ROOM ? THREADS / 32 * ROOM : 1);
    uint4* const shared = tiles + threadIdx.x / 32 * ROOM;
    const i64 first = (static_cast<i64>(blockIdx.x) * THREADS + threadIdx.x / 32 * 32) * EACH;
    if (first >= p.rows) return;  // the whole warp

    if constexpr (EACH > 1) {
        const u64 places = reinterpret_cast<u64>(p.logits) | (writes_grad(JOB) ? reinterpret_cast<u64>(p.grad) : 0);
        const bool dense = p.inner == 1 && p.target_outer == 1 && places % 16 == 0;
        if (dense && p.rows - first >= 32 * EACH && has_no_options(p)) {
            return xent_tiny<true, JOB, VARIANT, C, EACH>(without_options(p), first, shared);
        }
        {
            rare_path();
            xent_tiny<false, JOB, VARIANT, C, EACH>(p, first, shared);
        }
    } else {
        xent_tiny<false, JOB, VARIANT, C, EACH>(p, first, shared);
    }
}

#define XE_TINY(name, T, JOB, VARIANT, C, EACH, THREADS, BLOCKS)                                   \
    extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) name(const Problem<T> p) {       \
        xent_tiny<T, JOB, VARIANT, C, EACH, THREADS>(open(p));                                     \
    }
