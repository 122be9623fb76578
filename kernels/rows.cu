/* Softmax cross-entropy on rows whose classes are contiguous: one read of the logits, one write of the gradient.
 *
 *     loss = Σ a_k (lse - x_k) + z·lse²        grad_k = scale [(mass + 2 z lse) p_k - a_k]
 *
 * Legal in one pass because scale (upstream, 1/denominator, sample weight, ignored or not) depends only on targets and
 * weights: it is known before a logit is read.
 *
 *   XE_ROWS(name, T, JOB, VARIANT, K, LANES, CLUSTER, STREAM, EVEN, THREADS, BLOCKS)
 *
 *   WARP    LANES = 4 to 32      a row is held by LANES lanes of a warp
 *   BLOCK   LANES = 0            a row is held by a block, or by a cluster of CLUSTER blocks (compute capability 9.0)
 *   STREAM  LANES = 0, STREAM    a row of any length streams through a block or a cluster, twice for a gradient
 *   SPLIT   CLUSTER = 0          a row is read in parts, one block each: STATS writes the stats of each part, which
 *                                merge.cu merges; GRAD and LOG_SOFTMAX then read the parts once more
 *
 * Launch   WARP: blockDim.x / LANES rows per block. BLOCK, STREAM: one row per block or cluster, of whole warps. SPLIT:
 *          one part per block. A thread holds K vectors of 16 bytes; in WARP and BLOCK K·16·threads must cover the row.
 *          THREADS, BLOCKS: __launch_bounds__. EVEN: rows are evenly spaced, and every other array with a number per
 *          class is aligned like the logits. All these numbers come from `plan` in xent_array/_engines/cuda.py.
 * Latency  the logits of a row are loaded before anything else about it is known except whether it counts: otherwise a
 * block would wait for the chain from label to logits to sums. For a gradient, one thread prefetches the logits of row
 * r + p.ahead to L2, if that row counts, so that later blocks do not wait for DRAM. The first p.first blocks, for which
 * nothing was prefetched, do not even test whether their row counts. The distance is 6 MB of logits: at 17 MB they are
 * evicted before they are read, below 3 MB they arrive late. Moves    per row: STATS, LOSS read C; all others read C
 * and write C. STREAM reads C once more for a gradient, the last
 *          pieces first, to use what is still in cache. A target distribution is read twice likewise.
 * Vectors  a row is peeled into [head | vectors of 16 bytes | tail] by its own address, so loads are 128 bits wide for
 *          every C and every alignment. If rows are EVEN, so are stores, and loads of distributions and class weights.
 * Numbers  every exponential is added, including that of the maximum, and rest = sum - 1. If p of the maximum is above
 *          1/2 that would cancel: then the one thread that holds the maximum adds up its logits again without it, and
 *          broadcasts the result. With smoothing, where every class has the same share, the gap is mass·max - Σ each·x:
 *          its cancellation is no larger than the rounding error that logits of that size cause in the loss anyway. The
 *          summation tree of a row depends on C, dtype, chip and the alignment of the row, never on the number of rows
 *          or on the row's position among them.
 * Aliasing grad may be the logits: the same thread reads and writes an element, and x[label] is read before anything of
 *          the row is written.
 * Tried    On an H200: evict-first loads cost 4 to 6 points of bandwidth wherever a gradient is written, evict-first
 *          stores half a point. Loading the logits before the label gains up to 10 points, prefetching as much again
 *          for rows that fill an SM. Comparing every logit with the maximum, so that its 1 is never added, makes 16-bit
 *          rows instruction-bound. Persistent blocks that load the next row by bulk copies: no faster.
 *          Elsewhere: v1 vectors j·blockDim.x apart: an address per load. Now a warp owns a contiguous range.
 *          v2 a barrier.cluster to exchange parts: waits for all stores. Now messages to a mailbox: st.async + mbarrier.
 *          v3 separate code for each rare case, wherever it occurs. Now rolled loops that the label, the maximum and
 *          overflowing products share: code size is what limits 16-bit rows, and registers the rest.
 */

#include "lean.cuh"

// The partial result for some classes of a row: their maximum; `top`, the sum of e^{x - max} over the piece, of one
// thread, that holds the maximum (with its own 1); `sum`, over all others; and, if every class has target mass, half
// the gap and the mass. If all shares are equal (SMOOTH), half_gap is relative to 0 instead of the maximum, and mass is
// not needed: then merging is adding.
template <class A> struct Part {
    A max = -infinity<A>(), top = 0, sum = 0, half_gap = 0, mass = 0;
};

// e^{low - high} of two maxima; 1 if both are -inf.
template <class A> XE_DEVICE A drop(A low, A high) { return low == high ? 1 : exp_acc(low - high); }

template <int VARIANT, class A> XE_DEVICE Part<A> merge(const Part<A>& one, const Part<A>& two) {
    const bool first = one.max >= two.max;
    const Part<A>&high = first ? one : two, &low = first ? two : one;
    Part<A> both = high;
    both.sum += (low.sum + low.top) * drop(low.max, high.max);
    if (every_class(VARIANT)) both.half_gap = one.half_gap + two.half_gap;
    if (by_class(VARIANT)) {
        both.half_gap += times(low.mass, half_below(high.max, low.max));
        both.mass = one.mass + two.mass;
    }
    return both;
}

// Over aligned groups of WIDTH lanes; every lane gets the same bits, and `leader`, the lane whose top is kept.
template <int WIDTH, int VARIANT, class A> XE_DEVICE Part<A> merge_lanes(Part<A> part, int& leader) {
    sync_warp();  // tells the compiler that the lanes have converged
    const A max = lanes_max<WIDTH>(part.max), fall = drop(part.max, max);
    const u32 lane = threadIdx.x % 32, group = lane / WIDTH * WIDTH;
    leader = static_cast<int>(group) + lowest_bit(ballot(part.max == max) >> group);
    part.sum = lanes_sum<WIDTH>(lane == static_cast<u32>(leader) ? part.sum : (part.sum + part.top) * fall);
    part.top = shfl(part.top, leader);
    if (by_class(VARIANT)) {
        part.half_gap += times(part.mass, half_below(max, part.max));
        part.mass = lanes_sum<WIDTH>(part.mass);
    }
    if (every_class(VARIANT)) part.half_gap = lanes_sum<WIDTH>(part.half_gap);
    part.max = max;
    return part;
}

// Sums over one thread's classes, relative to their maximum (capped, if there is a softcap).
template <int VARIANT, class A> struct Sum {
    const Powers<A> powers;
    A half_max, half_gap = 0, mass = 0, sum = 0;
    XE_DEVICE explicit Sum(A max) : powers(max), half_max(static_cast<A>(0.5) * max_acc(max, -largest<A>())) {}
    XE_DEVICE A add(A x) {  // returns e^{x - max}
        const A e = powers.of(x);
        sum += e;
        return e;
    }
    XE_DEVICE A add(A x, A a) {
        // Half of max - x, which may overflow; 0·inf counts as 0.
        const A half = half_max - static_cast<A>(0.5) * x;
        if (any_target(VARIANT) ? a != 0 && half != 0 : a != 0) half_gap += a * half;
        mass += a;
        return add(x);
    }
};

// A thread's share of a row: up to K vectors, STEP apart, and in the first piece EDGES elements of head and tail.
template <class T, int VARIANT, int K, int STEP, bool EVEN> struct Held {
    typedef typename Acc<T>::type A;
    typedef Vector<T> V;
    static constexpr int SIZE = V::SIZE, EDGES = 2 * (SIZE - 1) > STEP ? (2 * SIZE - 3 + STEP) / STEP : 1;
    const Problem<T>& p;
    const Row<T, VARIANT>& row;
    const T* const logits;
    const Cut<T> cut;
    const int lane;
    int first;             // index of v[0] among the vectors of the row
    int edge[EDGES];       // the classes in `at_edge`; -1: none
    A at_edge[EDGES];      // their logits; later their exponentials, if KEEP
    uint4 v[K];

    XE_DEVICE Held(const Problem<T>& p, const Row<T, VARIANT>& row, const T* logits, Cut<T> cut, int lane, int first)
        : p(p), row(row), logits(logits), cut(cut), lane(lane), first(first) {
#pragma unroll
        for (int e = 0; e < EDGES; ++e) edge[e] = edge_class(e);
    }
    XE_DEVICE int edge_class(int e) const {
        const int place = lane + e * STEP;  // in head and tail together
        return place < cut.head ? place : place < cut.head + cut.tail ? place + cut.vectors * SIZE : -1;
    }
    XE_DEVICE bool has(int j) const { return first + j * STEP < cut.vectors; }
    XE_DEVICE int class_of(int j) const { return cut.head + (first + j * STEP) * SIZE; }
    // The class in one of the K·SIZE slots, or at negative indices one of EDGES; -1: none. For rolled loops.
    XE_DEVICE int class_at(int at) const {
        if (at < 0) return edge_class(at + EDGES);
        return has(at / SIZE) ? class_of(at / SIZE) + at % SIZE : -1;
    }

    XE_DEVICE void load_edge(bool needed) {
#pragma unroll
        for (int e = 0; e < EDGES; ++e) at_edge[e] = needed && edge[e] >= 0 ? to_acc(logits[edge[e]]) : -infinity<A>();
    }
    XE_DEVICE void load(bool needed) {
        const T* from = logits + class_of(0);
        const int vectors = needed ? cut.vectors : 0;
#pragma unroll
        for (int j = 0; j < K; ++j) {
            v[j] = first + j * STEP < vectors ? ld16(from + j * STEP * SIZE) : V::nothing();
        }
    }
    XE_DEVICE A largest(bool with_edge) const {
        A m = V::largest(v);
#pragma unroll
        for (int e = 0; e < EDGES; ++e) m = with_edge ? max_acc(m, at_edge[e]) : m;
        return m;
    }

    // Whether it holds any class.
    XE_DEVICE bool any(bool with_edge) const { return has(0) || (with_edge && edge[0] >= 0); }

    // The shares of the target, without the label's own, times `scale`, of the SIZE classes from class_of(j) on.
    XE_DEVICE void shares(int j, A scale, A (&a)[SIZE]) const {
        const int k = class_of(0), ahead = j * STEP * SIZE;
#pragma unroll
        for (int i = 0; i < SIZE; ++i) a[i] = scale * (EVEN ? row.each : row.beside_label(k + ahead + i));
        if (!by_class(VARIANT) || !EVEN) return;
        A q[SIZE];
        if (row.kind == OF_LOGITS) {
            V::unpack(ld16(static_cast<const T*>(row.q) + k + ahead), q);
        } else if (row.kind == OF_FLOAT32) {
            load_accs(static_cast<const float*>(row.q) + k + ahead, q);
        }
        if (row.kind >= OF_LOGITS) {
#pragma unroll
            for (int i = 0; i < SIZE; ++i) a[i] += scale * row.keep * q[i];
        }
        if (row.w) {
            load_accs(row.w + k + ahead, q);
#pragma unroll
            for (int i = 0; i < SIZE; ++i) a[i] = a[i] == 0 ? 0 : a[i] * q[i];
        }
    }

    // The Part of these classes. `kept` receives what a gradient needs: the exponentials, times softcap's slope, still
    // to be multiplied by their correction.
    template <bool KEEP>
    XE_DEVICE Part<A> part(bool with_edge, const Cap<A>& cap, A (&kept)[KEEP ? K * SIZE : 1]) {
        const A highest = largest(with_edge);
        const A max = has_softcap(VARIANT) && any(with_edge) ? cap.of(highest).x : highest;  // of -inf: -cap
        const A half_each = static_cast<A>(0.5) * row.each;  // half, as Σ each·x may overflow
        Sum<VARIANT, A> sum(max);
        if (with_edge) {
#pragma unroll
            for (int e = 0; e < EDGES; ++e) {
                if (edge[e] < 0) continue;
                if (VARIANT % SLICE == SMOOTH) sum.half_gap -= half_each * at_edge[e];
                const A keep = add(sum, cap, at_edge[e], by_class(VARIANT) ? row.beside_label(edge[e]) : 0);
                if (KEEP) at_edge[e] = keep;
            }
        }
#pragma unroll
        for (int j = 0; j < K; ++j) {
            if (VARIANT % SLICE != PLAIN && !has(j)) continue;
            A x[SIZE], a[SIZE];
            V::unpack(v[j], x);
            if (by_class(VARIANT)) shares(j, 1, a);
#pragma unroll
            for (int i = 0; i < SIZE; ++i) {
                if (VARIANT % SLICE == SMOOTH) sum.half_gap -= half_each * x[i];
                const A keep = add(sum, cap, x[i], a[i]);
                if (KEEP) kept[j * SIZE + i] = keep;
            }
        }
        return {max, sum.sum * sum.powers.correction, 0, sum.half_gap, sum.mass};
    }
    XE_DEVICE A add(Sum<VARIANT, A>& sum, const Cap<A>& cap, A x, A a) const {
        const Capped<A> c = capped(cap, x);
        const A e = by_class(VARIANT) ? sum.add(c.x, a) : sum.add(c.x);
        return has_softcap(VARIANT) ? e * c.slope : e;
    }
    // The sum of the kept exponentials except the maximum's, in a piece that holds it; corrected.
    template <bool KEEP> XE_DEVICE A kept_below(A max, const A (&kept)[KEEP ? K * SIZE : 1]) const {
        const Powers<A> powers(max);
        const A most = powers.of(max);
        A sum = 0;
#pragma unroll
        for (int e = 0; e < EDGES; ++e) {
            if (edge[e] >= 0 && at_edge[e] < most) sum += at_edge[e];
        }
#pragma unroll
        for (int i = 0; i < (KEEP ? K * SIZE : 1); ++i) {
            if (kept[i] < most) sum += kept[i];
        }
        return sum * powers.correction;
    }
    static XE_DEVICE Capped<A> capped(const Cap<A>& cap, A x) {
        return has_softcap(VARIANT) ? cap.of(x) : Capped<A>{x, 1};
    }

    // Writes the gradient (or log-softmax) of these classes, from what all classes of the row have in common. `kept` is
    // relative to the thread's own maximum; `factor` makes it relative to the row's.
    template <int JOB, bool KEEP>
    XE_DEVICE void store(const Answer<T, VARIANT>& answer, const Cap<A>& cap, bool with_edge,
                         const A (&kept)[KEEP ? K * SIZE : 1], A factor) const {
        const Powers<A> powers(answer.stats.max);
        const A share = answer.share * answer.scale * (KEEP ? factor : powers.correction);
#pragma unroll
        for (int j = 0; j < K; ++j) {
            if (!has(j)) continue;
            A y[SIZE], a[SIZE];
            V::unpack(v[j], y);
            if (by_class(VARIANT)) shares(j, any_target(VARIANT) ? 1 : answer.scale, a);  // weights may be large: last
#pragma unroll
            for (int i = 0; i < SIZE; ++i) {
                if (any_target(VARIANT)) a[i] *= answer.scale;
                if (!by_class(VARIANT)) a[i] = answer.scale * row.each;
                y[i] = entry<JOB, KEEP>(answer, powers, cap, y[i], kept[KEEP ? j * SIZE + i : 0], share, a[i]);
            }
            put(row.g + class_of(j), y);
        }
        if (!with_edge) return;
#pragma unroll
        for (int e = 0; e < EDGES; ++e) {
            if (edge[e] < 0) continue;
            const A x = KEEP ? 0 : to_acc(logits[edge[e]]);
            const A a = answer.scale * (by_class(VARIANT) ? row.beside_label(edge[e]) : row.each);
            row.g[edge[e]] = from_acc(entry<JOB, KEEP>(answer, powers, cap, x, at_edge[e], share, a), T());
        }
    }
    // What the job writes for logit x of a class that is not the label's; `a` is scaled.
    template <int JOB, bool KEEP>
    XE_DEVICE A entry(const Answer<T, VARIANT>& answer, const Powers<A>& powers, const Cap<A>& cap, A x, A kept, A share,
                      A a) const {
        if (JOB == LOG_SOFTMAX) return (x - answer.stats.max) - answer.tail;
        const Capped<A> c = KEEP ? Capped<A>{0, 1} : capped(cap, x);
        const A value = (KEEP ? kept : powers.of(c.x)) * share;
        return every_class(VARIANT) ? (value - a) * c.slope : value * c.slope;
    }
    static XE_DEVICE void put(T* to, const A (&y)[SIZE]) {
        if (EVEN) {
            st16(to, V::pack(y));
        } else {
#pragma unroll
            for (int i = 0; i < SIZE; ++i) to[i] = from_acc(y[i], T());
        }
    }
    // Writes zeros as the gradient of these classes.
    XE_DEVICE void clear(bool with_edge) const {
        const A zeros[SIZE] = {};
        T* to = row.g + class_of(0);
#pragma unroll 1
        for (int j = 0; j < K && has(j); ++j, to += STEP * SIZE) put(to, zeros);
#pragma unroll
        for (int e = 0; e < EDGES; ++e) {
            if (with_edge && edge[e] >= 0) row.g[edge[e]] = from_acc(A(0), T());
        }
    }
    // Writes the gradient without the common products, which may overflow, and without cancellation where p of the
    // maximum is above 1/2: of `all` classes, which are read again, or only of the label's and the maximum's (-1:
    // none).
    XE_DEVICE void exactly(const Answer<T, VARIANT>& answer, const Cap<A>& cap, bool all, bool with_edge, int label,
                           A at_label, int top, A at_top) const {
        int at = !all ? -EDGES - (every_class(VARIANT) ? 2 : 1) : with_edge ? -EDGES : 0;
#pragma unroll 1
        do {
            const bool of_label = at == -EDGES - 1, of_top = every_class(VARIANT) && at == -EDGES - 2;
            const int k = of_label ? label : of_top ? top : class_at(at);
            if (k < 0) continue;
            const Capped<A> c = capped(cap, of_label ? at_label : of_top ? at_top : to_acc(logits[k]));
            const A y = answer.grad(c.x, row.a(k), c.slope);
            row.g[k] = from_acc(y, T());
        } while (++at != -EDGES && at != K * SIZE);
    }

    // Calls f(k, x) for every class, read again, in a rolled loop: for rare cases.
    template <class F> XE_DEVICE void each_again(bool with_edge, F f) const {
#pragma unroll 1
        for (int at = with_edge ? -EDGES : 0; at < K * SIZE; ++at) {
            const int k = class_at(at);
            if (k >= 0) f(k, to_acc(logits[k]));
        }
    }
    // Likewise, one vector per iteration: for short work in many rows.
    template <class F> XE_DEVICE void each_vector_again(bool with_edge, F f) const {
#pragma unroll
        for (int e = 0; e < EDGES; ++e) {
            if (with_edge && edge[e] >= 0) f(edge[e], to_acc(logits[edge[e]]));
        }
        int k = class_of(0);
        const T* from = logits + k;
#pragma unroll 1
        for (int j = 0; j < K && has(j); ++j, k += STEP * SIZE, from += STEP * SIZE) {
            A x[SIZE];
            V::unpack(ld16(from), x);
#pragma unroll
            for (int i = 0; i < SIZE; ++i) f(k + i, x[i]);
        }
    }
};

// The threads that share a row, and how they exchange data: shuffles, shared memory, and messages between blocks. Each
// block of a cluster sends its part to all. A block leaves only after it has received every message sent to it, so no
// barrier is needed at the end, and no thread waits for stores to memory.
template <class A, int VARIANT, int LANES, int CLUSTER> struct Team {
    static constexpr int WIDTH = LANES ? LANES : 32;
    static constexpr int WORDS = (sizeof(A) * (by_class(VARIANT) ? 5 : 4) + 15) / 16;  // 16-byte words of a message
    union Bits {
        Part<A> part;
        A first;
        uint4 v[(sizeof(Part<A>) + 15) / 16];
        XE_DEVICE Bits() : part() {}
    };
    uint4 *parts, *inbox;     // the parts of the warps, of the blocks
    uint4 *said, *answers;    // later: a value from the holder; a vote from each block
    u64 *arrived, *settled, *answered;  // one barrier for each: a block may be ahead of another
    int rank = 0, leader = 0; // of this block in the cluster; the lane that holds the maximum
    bool holder = false;      // whether this thread holds the row's maximum

    XE_DEVICE Team(uint4* parts, uint4* inbox, uint4* said, u64* barriers)
        : parts(parts), inbox(inbox), said(said), answers(said + 1), arrived(barriers), settled(barriers + 1),
          answered(barriers + 2) {
#ifdef XE_CLUSTERS
        if (CLUSTER > 1) rank = cluster_rank();
#endif
    }
    // Opens the mailboxes, before anything is sent.
    XE_DEVICE void open() {
#ifdef XE_CLUSTERS
        if (CLUSTER == 1) return;
        if (threadIdx.x == 0) {
            mbar_init(arrived, 1);
            mbar_init(settled, 1);
            mbar_init(answered, 1);
            mbar_init_fence();
            mbar_expect(arrived, CLUSTER * WORDS * 16);
        }
        cluster_arrive();
#endif
    }

    // From the parts of the threads to the part of the row; all threads get the result.
    XE_DEVICE Part<A> merge(Part<A> part) {
        const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
        part = merge_lanes<WIDTH, VARIANT>(part, leader);
        holder = lane == static_cast<u32>(leader);
        if (LANES) return part;
        Bits bits;
        bits.part = part;
        if (lane == 0) {
#pragma unroll
            for (int i = 0; i < WORDS; ++i) st16(parts + warp * WORDS + i, bits.v[i]);
        }
        sync_block();  // the part of every warp has been written
        bits.part = Part<A>();
        if (lane < blockDim.x / 32) {
#pragma unroll
            for (int i = 0; i < WORDS; ++i) bits.v[i] = ld16(parts + lane * WORDS + i);
        }
        int leading;
        part = merge_lanes<32, VARIANT>(bits.part, leading);
        holder &= warp == static_cast<u32>(leading);
#ifdef XE_CLUSTERS
        if (CLUSTER == 1) return part;
        cluster_wait();  // the mailboxes of the others are open
        bits.part = part;
        if (threadIdx.x < CLUSTER) {
#pragma unroll
            for (int i = 0; i < WORDS; ++i) st_async16(inbox + rank * WORDS + i, threadIdx.x, bits.v[i], arrived);
        }
        mbar_wait(arrived, 0);
#pragma unroll
        for (int i = 0; i < WORDS; ++i) bits.v[i] = ld16(inbox + threadIdx.x % CLUSTER * WORDS + i);
        part = merge_lanes<CLUSTER, VARIANT>(bits.part, leading);
        holder &= rank == leading % CLUSTER;
#endif
        return part;
    }

    // Broadcasts the holder's value to all threads.
    XE_DEVICE A of_holder(A value) {
        if (LANES) return shfl(value, leader);
        Bits bits;
        bits.first = value;
#ifdef XE_CLUSTERS
        if (CLUSTER > 1) {
            if (holder) {
#pragma unroll 1
                for (int to = 0; to < CLUSTER; ++to) st_async16(said, to, bits.v[0], settled);
            }
            if (threadIdx.x == 0) mbar_expect(settled, 16);
            mbar_wait(settled, 0);
            bits.v[0] = ld16(said);
            return bits.first;
        }
#endif
        if (holder) st16(said, bits.v[0]);
        sync_block();  // the holder has written
        bits.v[0] = ld16(said);
        return bits.first;
    }

    // Whether any thread of the row says yes; all threads get the result.
    XE_DEVICE bool any(bool yes) {
        if (LANES) {
            const int group = threadIdx.x % 32 / WIDTH * WIDTH;
            return (ballot(yes) >> group & 0xffffffffu >> (32 - WIDTH)) != 0;
        }
        yes = any_thread(yes);
#ifdef XE_CLUSTERS
        if (CLUSTER == 1) return yes;
        if (threadIdx.x < CLUSTER) st_async16(answers + rank, threadIdx.x, make_uint4(yes, 0, 0, 0), answered);
        if (threadIdx.x == 0) mbar_expect(answered, CLUSTER * 16);
        mbar_wait(answered, 0);
        yes = any_lane(ld16(answers + threadIdx.x % CLUSTER).x != 0);
#endif
        return yes;
    }
};

// Prefetches `count` vectors of a row to L2, from vector `first` on, without the unaligned ends.
template <class T> XE_DEVICE void prefetch_row(const Problem<T>& p, i64 r, int first, int count) {
    constexpr int SIZE = Vector<T>::SIZE;
    const T* const x = p.logits + r * p.logits_outer;
    const int end = min((first + count) * SIZE, static_cast<int>(p.classes));
    const u64 from = (reinterpret_cast<u64>(x + first * SIZE) + 15) / 16 * 16,
              to = reinterpret_cast<u64>(x + end) / 16 * 16;
    if (first * SIZE < end && from < to) prefetch(reinterpret_cast<const void*>(from), static_cast<u32>(to - from));
}

template <class T, int JOB, int VARIANT, int K, int LANES, int CLUSTER, bool STREAM, bool EVEN>
XE_DEVICE void xent_rows(const Problem<T>& p) {
    typedef typename Acc<T>::type A;
    typedef Vector<T> V;
    constexpr bool PARTS = CLUSTER == 0, OF_PART = PARTS && JOB == STATS;
    constexpr bool READS_STATS = JOB == GRAD || (PARTS && JOB == LOG_SOFTMAX), WRITES = writes_grad(JOB);
    constexpr int BLOCKS = PARTS ? 1 : CLUSTER;  // of a cluster
    constexpr int STEP = LANES ? LANES : 32, SIZE = V::SIZE;
    // Exponentials are kept if there are registers for them, and recomputed otherwise.
    constexpr bool KEEP = WRITES && !READS_STATS && JOB != LOG_SOFTMAX && !STREAM && VARIANT % SLICE != CAPPED_GENERAL
                          && K * SIZE <= (VARIANT % SLICE == CAPPED ? 64 : 32);
    typedef Held<T, VARIANT, K, STEP, EVEN> H;
    typedef Team<A, VARIANT, LANES, BLOCKS> Of;
    XE_SHARED(uint4, parts, LANES ? 1 : 32 * Of::WORDS);
    XE_SHARED(uint4, inbox, BLOCKS > 1 ? BLOCKS * Of::WORDS : 1);
    XE_SHARED(uint4, said, 1 + BLOCKS);
    XE_SHARED(u64, barriers, 3);
    Of team(parts, inbox, said, barriers);
    if (!READS_STATS) team.open();

    // What was read last is still in cache: the second pass reads the parts from the last to the first.
    const u32 block = PARTS && READS_STATS ? gridDim.x - 1 - blockIdx.x : blockIdx.x;
    // The threads of a row are numbered across the blocks of its cluster.
    const int threads = LANES ? STEP : static_cast<int>(blockDim.x) * BLOCKS;
    const u32 lane = LANES ? threadIdx.x % STEP : team.rank * blockDim.x + threadIdx.x;
    const i64 mine = LANES ? static_cast<i64>(blockIdx.x) * (blockDim.x / STEP) + threadIdx.x / STEP
                           : block / (PARTS ? static_cast<u32>(p.parts) : CLUSTER);
    const bool exists = !LANES || mine < p.rows;  // lanes without a row take part in the shuffles
    const i64 r = exists ? mine : p.rows - 1;
    const Place at = EVEN ? Place{r, 0} : place_of(p, r);
    const T* logits = p.logits + (at.o * p.logits_outer + at.i * p.logits_inner);
    int classes = static_cast<int>(p.classes);
    const i64 start = PARTS ? block % static_cast<u32>(p.parts) * p.part : 0;
    if (PARTS) classes = static_cast<int>(min(p.part, p.classes - start)), logits += start;
    const Cut<T> cut(logits, classes, static_cast<int>(p.whole) != 0);

    // A group of STEP lanes owns STEP·K contiguous vectors. A warp whose vectors are all beyond the row only takes part
    // in merging; the first group always has the edges.
    const bool busy = BLOCKS == 1 || static_cast<int>(lane / STEP * (STEP * K)) < max(cut.vectors, 1);
    const int first = static_cast<int>(lane / STEP * (STEP * K) + lane % STEP), stride = threads * K;
    Row<T, VARIANT> row;
    H held(p, row, logits, cut, static_cast<int>(lane), first);
    if (!STREAM) {
        // The logits come first: everything else about the row is loaded while they are in flight. Only whether they
        // are needed is tested before, and in the first blocks, for which no label has been prefetched, not even that.
        constexpr bool MAY_SKIP = !writes_stats(JOB) && JOB != LOG_SOFTMAX;
        const bool asks = MAY_SKIP && blockIdx.x >= static_cast<u32>(p.first);
        const bool read = exists && (!asks || may_count(p, r, at));
        if (busy) held.load(read);
        const i64 next = r + p.ahead;
        if (EVEN && p.ahead != 0 && next < p.rows && (LANES ? lane == 0 : threadIdx.x == 0)) {
            if (!WRITES) {
                prefetch_label(p, {next, 0});
            } else if (!MAY_SKIP || may_count(p, next, {next, 0})) {
                prefetch_row(p, next, team.rank * static_cast<int>(blockDim.x) * K, stride / BLOCKS);
            }
        }
    }
    row = Row<T, VARIANT>(p, r, at);
    if (EVEN) row.target_class = 1;  // a fact the compiler cannot see
    if (PARTS) {
        row.narrow(start, classes);
        if (OF_PART && row.label < 0) row.on_label = 0;
    }
    const Cap<A> cap(p.softcap);
    const bool needed = exists && row.needs_logits(JOB);
    held.load_edge(needed);

    // The label's logit, in the thread that will overwrite it; for `correct` in all threads. The barriers of merging
    // ensure that all have read it before it is overwritten.
    bool owner = lane == 0;
    if (row.label >= 0) {
        const int k = row.label - cut.head, place = k < 0 ? row.label : row.label - cut.vectors * SIZE;
        const int ahead = static_cast<int>(static_cast<u32>(k) / SIZE) - first, turn = STREAM ? ahead % stride : ahead;
        owner = k < 0 || k >= cut.vectors * SIZE ? static_cast<u32>(place) % STEP == lane
                                                 : turn >= 0 && turn < STEP * K && turn % STEP == 0;
    }
    Rival<A> rival = rival_of<JOB>(p, row);
    A at_label = 0;
    if (row.label >= 0 && needed && (writes_stats(JOB) || owner)) at_label = to_acc(row.x[row.label]);
    rival.x = at_label;

    A kept[KEEP ? K * SIZE : 1];
    int top = -1;  // class of the maximum, in its holder: coef·p - a may cancel
    A at_top = 0;
    Part<A> part;
    Stats<A> stats;
    if (READS_STATS) {
        stats.max = p.max[r], stats.rest = p.rest[r];
        if (by_class(VARIANT) || is_slice(VARIANT)) stats.mass = p.mass[r];
    } else {
        int highest = first;  // first of the piece that holds the thread's maximum
        if constexpr (!STREAM) {
            if (busy) part = held.template part<KEEP>(true, cap, kept);
        } else {
            do {
                held.load(needed);
                const Part<A> piece = held.template part<false>(held.first == first, cap, kept);
                if (piece.max > part.max) highest = held.first;
                part = merge<VARIANT>(part, piece);
            } while ((held.first += stride) < cut.vectors);
        }
        const Part<A> whole = team.merge(part);
        A half_gap = whole.half_gap;
        if (VARIANT % SLICE == SMOOTH) {
            const A half_mass = static_cast<A>(0.5) * row.each * static_cast<A>(static_cast<int>(p.classes));
            half_gap = row.label < 0 && (VARIANT < SLICE || !row.elsewhere)
                           ? 0 : half_gap + half_mass * (whole.max == -infinity<A>() ? 0 : whole.max);
        }
        stats = {whole.max, whole.sum + (whole.top - 1), 2 * half_gap, whole.mass};

        // If p of the maximum is above 1/2, top - 1 has cancelled: the holder adds up the others of its piece. Ties and
        // near ties of the maximum may be among these: their number is what remains of top.
        const bool confident = needed && 1 > stats.rest && stats.max > -infinity<A>();
        if (LANES ? any_lane(confident) : confident) {
            A rest = 0;
            if (confident && team.holder) {
                A others = 0;
                if (KEEP && VARIANT % SLICE == PLAIN) {
                    others = held.template kept_below<KEEP>(part.max, kept);
                } else {
                    const auto again = [&](int k, A x) {
                        const A its = H::capped(cap, x).x;
                        if (its != stats.max) others += exp_acc(its - stats.max);
                        else if (every_class(VARIANT)) top = k, at_top = x;
                    };
                    held.first = highest;
                    if (has_softcap(VARIANT)) held.each_again(highest == first, again);
                    else held.each_vector_again(highest == first, again);
                }
                const int ties = static_cast<int>(whole.top - others + static_cast<A>(0.5));
                rest = whole.sum + (others + static_cast<A>(ties - 1));
            }
            rest = team.of_holder(rest);
            if (confident) stats.rest = rest;
        }
    }
    Answer<T, VARIANT> answer(p, row, stats, READS_STATS, READS_STATS);
    const A label = H::capped(cap, at_label).x;
    if (!READS_STATS && row.label >= 0) answer.add_label(row, label);

    if (OF_PART) {
        if (owner) {
            A* const at = p.of_parts + block;
            const i64 all = p.rows * p.parts;
            at[0] = answer.stats.max, at[all] = answer.stats.rest;
            at[2 * all] = answer.stats.gap, at[3 * all] = row.has_target ? answer.stats.mass : 0;
        }
        return;
    }
    bool beaten = false;
    if (writes_stats(JOB) && p.correct) {
        beaten = label < stats.max;
        // A tie: a maximum with rest < 1 is unique.
        const bool asked = rival.label >= 0 && !beaten && !(stats.rest < 1);
        if (LANES ? any_lane(asked) : asked) {
            bool found = false;
            if (asked && needed) {
                held.first = first;
                do {
                    held.each_again(held.first == first, [&](int k, A x) { found |= rival.is_beaten_by(x, k); });
                } while (STREAM && (held.first += stride) < cut.vectors);
            }
            found = team.any(found);
            beaten |= asked && found;
        }
    }
    if (exists && owner) {
        answer.template put<JOB>(p, row, r);
        put_correct<JOB>(p, r, answer, rival, beaten);
    }
    if (!WRITES || !exists || !busy) return;
    row.g = p.grad + (at.o * p.grad_outer + at.i * p.grad_inner) + start;  // only now, to save registers

    const bool silent = JOB != LOG_SOFTMAX && row.scale == 0;
    const bool all_exactly = JOB != LOG_SOFTMAX && !answer.products_are_finite();
    const auto write = [&](bool last) {  // last: the piece with the edges
        if (silent) return held.clear(last);
        if (STREAM) held.load(needed);
        if (READS_STATS && every_class(VARIANT) && answer.confident) {
            if (H::capped(cap, held.largest(last)).x == stats.max) {
                held.each_again(last, [&](int k, A x) { if (H::capped(cap, x).x == stats.max) top = k, at_top = x; });
            }
        }
        if (!all_exactly) {
            const A factor = KEEP ? Powers<A>(part.max).correction * drop(part.max, stats.max) : 1;
            held.template store<JOB, KEEP>(answer, cap, last, kept, factor);
        }
        if (JOB != LOG_SOFTMAX && (all_exactly || last)) {
            const int label_here = owner ? row.label : -1;
            held.exactly(answer, cap, all_exactly, last, label_here, at_label, top, at_top);
        }
    };
    if constexpr (!STREAM) {
        write(true);
    } else {
        // Backwards, as what was read last is still in cache. (With given stats nothing is.)
        const int pieces = first < cut.vectors ? (cut.vectors - first + stride - 1) / stride : 1;
        for (held.first = first + (pieces - 1) * stride; held.first >= first; held.first -= stride) {
            write(held.first == first);
        }
    }
}

// Which kernels have a second copy of the code for problems without options.
XE_DEVICE constexpr bool may_specialize(int job, int variant, bool stream) {
    return (variant == PLAIN || variant == SMOOTH) && !stream && (job == LOSS_AND_GRAD || job == LOSS);
}

#define XE_CLUSTER_0
#define XE_CLUSTER_1
#define XE_CLUSTER_2 XE_CLUSTER(2)
#define XE_CLUSTER_4 XE_CLUSTER(4)
#define XE_CLUSTER_8 XE_CLUSTER(8)
#define XE_ROWS(name, T, JOB, VARIANT, K, LANES, CLUSTER, STREAM, EVEN, THREADS, BLOCKS)                        \
    extern "C" __global__ void XE_CLUSTER_##CLUSTER __launch_bounds__(THREADS, BLOCKS) name(const Problem<T> p) { \
        specialized<may_specialize(JOB, VARIANT, STREAM)>(open(p), [](const Problem<T>& q) {                     \
            xent_rows<T, JOB, VARIANT, K, LANES, CLUSTER, STREAM, EVEN>(q);                                           \
        });                                                                                                           \
    }
