/* Softmax cross-entropy on millions of rows of few classes that lie one after another: (N, C) with C up to 64.
 *
 *     loss = Σ a_k (lse - x_k) + z·lse²        grad_k = scale [(mass + 2 z lse) p_k - a_k]        (as rows.cu)
 *
 *   T  XE_TINY(name, T, JOB, VARIANT, C, THREADS, BLOCKS)      a row is held by one thread, in registers
 *
 * Compiled for its C, so that every loop over classes is unrolled and every place in shared memory known.
 *
 * Launch   THREADS threads, one row each; no warp waits for another. THREADS, BLOCKS: __launch_bounds__.
 * Moves    per row: C in, and C out where a gradient is written. Rows that do not count are read too. A target
 *          distribution is read once.
 * Wide     Rows that are one access of 1 to 16 bytes, or few vectors of 16, are read and written as they are. Of others
 *          the 32 rows of a warp are one stretch of memory, which starts on 16 bytes where the array does: it is copied
 *          to shared memory in vectors, and each thread takes its row from there by the widest accesses that a row is a
 *          multiple of. So rows are an odd number of accesses apart, and no two lanes want the same bank; rows of an even
 *          number of vectors are given a free one. The gradient goes back the same way. An array that starts elsewhere
 *          is copied element by element.
 * Numbers  what is not the maximum is added for its own, so that confident rows need no second look: two instructions a
 *          logit, where memory leaves time for fifteen. A sum goes from the last class to the first.
 * Aliasing grad may be the logits: a warp has read its rows before it writes any of them.
 * Tried    On an H200: rows of 64 and 128 bytes straight from and to memory, 78 and 62 % of the bandwidth of a copy in
 *          float32 with gradient (101 and 83 without), because each store then fills half a sector.
 *          Moving words to places with a free word after every 32: 3 to 4 instructions a logit to find them.
 */

#include "stats.cuh"

// Rows of C numbers of a type.
template <class Q, int C> struct Rows {
    static constexpr int BYTES = C * sizeof(Q), SIZE = 16 / sizeof(Q), TURNS = (BYTES + 15) / 16;
    static constexpr int WIDTH = BYTES % 16 == 0 ? 16 : BYTES % 8 == 0 ? 8 : BYTES % 4 == 0 ? 4 : 2;  // of an access
    static constexpr int APART = C + (BYTES % 32 == 0 ? SIZE : 0);  // in shared memory
    static constexpr int SHARED = 32 * APART * sizeof(Q) / 16;      // vectors for a warp
    // Whether rows are read and written as they lie in memory.
    static constexpr bool direct(bool writes) { return BYTES == WIDTH || (WIDTH == 16 && BYTES <= (writes ? 32 : 64)); }

    static XE_DEVICE bool lies_on(const Q* at, int bytes) { return (reinterpret_cast<u64>(at) & (bytes - 1)) == 0; }
    static XE_DEVICE int place_of(int e) { return APART == C ? e : e + e / C * SIZE; }

    // A row, from an address on WIDTH bytes, and to it.
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
    // ... and where it is not on WIDTH bytes.
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

    // Between memory and shared memory, by a warp: what is asked for first is taken later.
    struct Asked { uint4 v[TURNS]; };
    static XE_DEVICE int vectors_of(const Q* at, int here) { return lies_on(at, 16) ? here * C / SIZE : 0; }
    static XE_DEVICE Asked ask(const Q* from, int here) {
        const int lane = threadIdx.x % 32, vectors = vectors_of(from, here);
        Asked asked;
#pragma unroll
        for (int i = 0; i < TURNS; ++i) {
            asked.v[i] = i * 32 + lane < vectors ? ld16(from + (i * 32 + lane) * SIZE) : make_uint4(0, 0, 0, 0);
        }
        return asked;
    }
    static XE_DEVICE void bring(const Asked& asked, Q* tile, const Q* from, int here) {
        const int lane = threadIdx.x % 32, vectors = vectors_of(from, here);
#pragma unroll
        for (int i = 0; i < TURNS; ++i) {
            if (i * 32 + lane < vectors) st16(tile + place_of((i * 32 + lane) * SIZE), asked.v[i]);
        }
        for (int e = vectors * SIZE + lane; e < here * C; e += 32) tile[place_of(e)] = from[e];
        sync_warp();  // the rows are in shared memory, brought by all lanes
    }
    static XE_DEVICE void send(Q* to, const Q* tile, int here) {
        const int lane = threadIdx.x % 32, vectors = vectors_of(to, here);
#pragma unroll
        for (int i = 0; i < TURNS; ++i) {
            if (i * 32 + lane < vectors) st16(to + (i * 32 + lane) * SIZE, ld16(tile + place_of((i * 32 + lane) * SIZE)));
        }
#pragma unroll 1
        for (int e = vectors * SIZE + lane; e < here * C; e += 32) to[e] = tile[place_of(e)];
    }

    // A row where it lies.
    template <class A> static XE_DEVICE void get_from_memory(const Q* from, A (&x)[C]) {
        if (lies_on(from, WIDTH)) get(from, x);
        else elements(from, x);
    }
};

// A row and what is asked of it, by one thread. `x`: its logits, in the end its gradient. `a`: what each class has of the
// target but for what the label has. `again`: the logits once more; `g`: one place after another for gradients.
template <class T, int JOB, int VARIANT, int C> struct Thread {
    typedef typename Acc<T>::type A;
    const Problem<T>& p;
    const Row<T, VARIANT>& row;
    const i64 r;

    XE_DEVICE static Capped<A> capped(const Cap<A>& cap, A x) {
        return has_softcap(VARIANT) ? cap.of(x) : Capped<A>{x, 1};
    }

    // Whether `x` is the gradient now, or it is in `g` already.
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

        // All that is not the maximum; how often that is there, and what its first class has of the target.
        const Powers<A> powers(stats.max);
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
                if (a[k] != 0 && !is_top) half_gap += a[k] * half;  // 0·inf counts 0, and so does inf - inf
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
            if (by_class(VARIANT)) stats.mass = p.mass[r];
            if (highest.x != stats.max) top = -1;  // the stats are of other logits
        } else {
            stats.rest = others * powers.correction + (ties - 1), stats.gap = 2 * half_gap, stats.mass = mass;
        }
        Answer<T, VARIANT> answer(p, row, stats, true);
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

// What each class has of the target beside what the label has. All lanes of a warp.
template <class T, int C, int VARIANT, class A>
XE_DEVICE void shares(const Problem<T>& p, const Row<T, VARIANT>& row, uint4* shared, i64 first, int here, int mine,
                      A (&a)[C]) {
    const bool dense = p.target_class == 1 && p.target_outer == C * p.inner && (p.inner == 1 || p.target_inner == C);
    const auto read = [&](auto type) {
        typedef decltype(type) Q;
        typedef Rows<Q, C> Of;
        const Q* const from = static_cast<const Q*>(p.target) + first * C;
        if (!dense) {
            Of::elements(static_cast<const Q*>(row.q), a, p.target_class);
        } else if (Of::direct(false)) {
            Of::get_from_memory(from + mine * C, a);
        } else {
            Q* const tile = reinterpret_cast<Q*>(shared);
            Of::bring(Of::ask(from, here), tile, from, here);
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

template <class T, int JOB, int VARIANT, int C, int THREADS> XE_DEVICE void xent_tiny(const Problem<T>& p) {
    typedef typename Acc<T>::type A;
    typedef Rows<T, C> Of;
    constexpr bool WRITES = writes_grad(JOB), DIRECT = Of::direct(WRITES);
    constexpr int BESIDE = by_class(VARIANT) && !Rows<float, C>::direct(false) ? Rows<float, C>::SHARED : 0;
    constexpr int ROOM = DIRECT ? BESIDE : Of::SHARED > BESIDE ? Of::SHARED : BESIDE;
    XE_SHARED(uint4, tiles, ROOM ? THREADS / 32 * ROOM : 1);
    uint4* const shared = tiles + threadIdx.x / 32 * ROOM;

    const int lane = threadIdx.x % 32;
    const i64 first = static_cast<i64>(blockIdx.x) * THREADS + (threadIdx.x - lane);
    if (first >= p.rows) return;  // the whole warp
    const int here = static_cast<int>(min(p.rows - first, static_cast<i64>(32))), mine = lane < here ? lane : 0;
    const T* const logits = p.logits + first * C;
    T* const grad = p.grad + first * C;
    T* const tile = reinterpret_cast<T*>(shared);

    // The logits and what else is known of a row are asked for side by side.
    A x[C], a[C];
    typename Of::Asked asked;
    if constexpr (DIRECT) Of::get_from_memory(logits + mine * C, x);
    else asked = Of::ask(logits, here);
    const Row<T, VARIANT> row(p, first + mine);
    if constexpr (!DIRECT) {
        Of::bring(asked, tile, logits, here);
        Of::get(tile + mine * Of::APART, x);
    }
    sync_warp();  // all rows have been read, before others take their place
    if (every_class(VARIANT)) shares<T, C>(p, row, shared, first, here, mine, a);

    T* const g = DIRECT ? grad + mine * C : tile + mine * Of::APART;
    if (lane < here && Thread<T, JOB, VARIANT, C>{p, row, first + mine}.work(x, a, logits + mine * C, g)) {
        const bool silent = JOB != LOG_SOFTMAX && row.scale == 0;
        if (!DIRECT || Of::lies_on(grad, Of::WIDTH)) {
            Of::put(g, x, silent);
        } else {
#pragma unroll
            for (int k = 0; k < C; ++k) g[k] = from_acc(silent ? 0 : x[k], T());
        }
    }
    if (!WRITES || DIRECT) return;
    sync_warp();  // the gradients of all rows are in shared memory
    Of::send(grad, tile, here);
}

#define XE_TINY(name, T, JOB, VARIANT, C, THREADS, BLOCKS)                                         \
    extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) name(const Problem<T> p) {       \
        xent_tiny<T, JOB, VARIANT, C, THREADS>(open(p));                                           \
    }
