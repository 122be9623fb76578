/* Softmax cross-entropy on rows whose classes lie side by side: one read of the logits, one write of the gradient.
 *
 *     loss = Σ a_k (lse - x_k) + z·lse²        grad_k = scale [(mass + 2 z lse) p_k - a_k]
 *
 * Legal in one pass because scale (upstream, 1/denominator, sample weight, ignored or not) follows from targets and
 * weights alone: it is known before a logit is read.
 *
 *   XE_ROWS(name, T, JOB, VARIANT, K, LANES, CLUSTER, STREAM, EVEN, THREADS, BLOCKS)
 *
 *   W  LANES = 4 to 32      a row is held by so many lanes of a warp
 *   B  LANES = 0            a row is held by a block, or by a cluster of CLUSTER blocks (compute capability 9.0)
 *   O  LANES = 0, STREAM    a row of any length is read through a block or a cluster, twice for a gradient
 *   S  CLUSTER = 0          a row is read in parts by as many blocks as there are: STATS leaves those of each part, which
 *                           merge.cu merges; GRAD and LOG_SOFTMAX then read the parts once more
 *
 * Launch   W: blockDim.x / LANES rows per block; B, O: one row per block or cluster, of whole warps; S: one part. A thread holds K
 *          vectors of 16 bytes; in W and B K·16·threads must cover the row. THREADS, BLOCKS: __launch_bounds__. EVEN:
 *          rows are evenly spaced, and what else has a number per class is aligned like the logits. All numbers come
 *          from `plan` in xent_array/_engines/cuda.py.
 * Moves    per row: STATS, LOSS read C; all others read C and write C. O reads C once more for a gradient,
 *          the last pieces first, so that what is in cache is used. A target distribution is read twice likewise.
 * Wide     a row is [head | vectors of 16 bytes | tail] by its own address: every C and every start keeps 128-bit
 *          loads. So do stores, and the reading of distributions and class weights, where rows are EVEN.
 * Numbers  every exponential is added, that of the maximum too, which makes rest = sum - 1. Where p of the maximum is
 *          above 1/2 that would cancel: then the one thread that holds the maximum adds up its logits once more
 *          without it, and says so to the others. The tree of a row's sums depends on C, dtype, chip and the alignment
 *          of the row: never on the number of rows or the place among them.
 * Aliasing grad may be the logits: an element is read and written by one thread, and x[label] before anything of the
 *          row is written.
 * Tried    On an H200: loads that evict first cost 4 to 6 points of bandwidth wherever a gradient is written, stores
 *          that do so nothing. Comparing every logit with the maximum, so that its 1 is never added, makes 16-bit rows
 *          limited by instructions. Blocks that stay and bring the next row by bulk copies: no faster.
 *          Elsewhere: v1 vectors j·blockDim.x apart: an address per load. Now a warp owns a stretch: one address.
 *          v2 a barrier.cluster to swap parts: waits for all stores. Now messages to a mailbox: st.async + mbarrier.
 */

#include "stats.cuh"

// A part of a row: its maximum; the sum of e^{x - max} of that piece of one thread which holds the maximum, whose own 1
// is in it, and of all others; and of a target that every class has a share of, half the gap and the mass.
template <class A> struct Part {
    A max = -infinity<A>(), top = 0, sum = 0, half_gap = 0, mass = 0;
};

// e^{low - high} of two maxima, 1 where both are -inf.
template <class A> XE_DEVICE A drop(A low, A high) { return low == high ? 1 : exp_acc(low - high); }

template <int VARIANT, class A> XE_DEVICE Part<A> merge(const Part<A>& one, const Part<A>& two) {
    const bool first = one.max >= two.max;
    const Part<A>&high = first ? one : two, &low = first ? two : one;
    Part<A> both = high;
    both.sum += (low.sum + low.top) * drop(low.max, high.max);
    if (every_class(VARIANT)) {
        both.half_gap += low.half_gap + times(low.mass, half_below(high.max, low.max));
        both.mass += low.mass;
    }
    return both;
}

// Over aligned groups of WIDTH lanes; every lane gets the same bits, and whether it is the one whose top remains.
template <int WIDTH, int VARIANT, class A> XE_DEVICE Part<A> merge_lanes(Part<A> part, int& leader) {
    sync_warp();  // whence the compiler knows that none is behind
    const A max = lanes_max<WIDTH>(part.max), fall = drop(part.max, max);
    const u32 lane = threadIdx.x % 32, group = lane / WIDTH * WIDTH;
    leader = static_cast<int>(group) + lowest_bit(ballot(part.max == max) >> group);
    part.sum = lanes_sum<WIDTH>(lane == static_cast<u32>(leader) ? part.sum : (part.sum + part.top) * fall);
    part.top = shfl(part.top, leader);
    if (every_class(VARIANT)) {
        part.half_gap = lanes_sum<WIDTH>(part.half_gap + times(part.mass, half_below(max, part.max)));
        part.mass = lanes_sum<WIDTH>(part.mass);
    }
    part.max = max;
    return part;
}

// One thread's classes, added up against their maximum (capped, where there is a softcap).
template <int VARIANT, class A> struct Sum {
    const Powers<A> powers;
    A half_max, half_gap = 0, mass = 0, sum = 0;
    XE_DEVICE explicit Sum(A max) : powers(max), half_max(max == -infinity<A>() ? 0 : static_cast<A>(0.5) * max) {}
    XE_DEVICE A add(A x) {  // its power
        const A e = powers.of(x);
        sum += e;
        return e;
    }
    XE_DEVICE A add(A x, A a) {
        const A half = half_max - static_cast<A>(0.5) * x;  // max - x may be beyond the range of finite numbers
        half_gap += a == 0 ? 0 : a * half;  // 0·inf counts 0
        mass += a;
        return add(x);
    }
};

// What a thread holds of a row: up to K vectors, STEP apart, and in the first piece EDGES elements of head and tail.
template <class T, int VARIANT, int K, int STEP, bool EVEN> struct Held {
    typedef typename Acc<T>::type A;
    typedef Vector<T> V;
    static constexpr int SIZE = V::SIZE, EDGES = 2 * (SIZE - 1) > STEP ? (2 * SIZE - 3 + STEP) / STEP : 1;
    const Problem<T>& p;
    const Row<T, VARIANT>& row;
    const Cut<T> cut;
    int first;             // the number of v[0] among the vectors of the row
    int edge[EDGES];       // the classes held in `at_edge`; -1: none
    A at_edge[EDGES];      // not for the gradient, which reads them once more
    uint4 v[K];

    XE_DEVICE Held(const Problem<T>& p, const Row<T, VARIANT>& row, Cut<T> cut, int lane, int first)
        : p(p), row(row), cut(cut), first(first) {
#pragma unroll
        for (int e = 0; e < EDGES; ++e) {
            const int place = lane + e * STEP;  // among head and tail
            edge[e] = place < cut.head ? place : place < cut.head + cut.tail ? place + cut.vectors * SIZE : -1;
        }
    }
    XE_DEVICE bool has(int j) const { return first + j * STEP < cut.vectors; }
    XE_DEVICE int class_of(int j) const { return cut.head + (first + j * STEP) * SIZE; }

    XE_DEVICE void load_edge(bool needed) {
#pragma unroll
        for (int e = 0; e < EDGES; ++e) at_edge[e] = needed && edge[e] >= 0 ? to_acc(row.x[edge[e]]) : -infinity<A>();
    }
    XE_DEVICE void load(bool needed) {
        const T* from = row.x + class_of(0);
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

    // How many classes are held.
    XE_DEVICE int count(bool with_edge) const {
        int found = min(max(cut.vectors - first + STEP - 1, 0) / STEP, K) * SIZE;
#pragma unroll
        for (int e = 0; e < EDGES; ++e) found += with_edge && edge[e] >= 0;
        return found;
    }

    // Class k's share of the target but for what the label has, of the SIZE classes from class_of(j) on.
    XE_DEVICE void shares(int j, A (&a)[SIZE]) const {
        const int k = class_of(0), ahead = j * STEP * SIZE;
#pragma unroll
        for (int i = 0; i < SIZE; ++i) a[i] = EVEN ? row.each : row.beside_label(k + ahead + i);
        if (!by_class(VARIANT) || !EVEN) return;
        A q[SIZE];
        if (row.kind == OF_LOGITS) {
            V::unpack(ld16(static_cast<const T*>(row.q) + k + ahead), q);
        } else if (row.kind == OF_FLOAT32) {
            load_accs(static_cast<const float*>(row.q) + k + ahead, q);
        }
        if (row.kind >= OF_LOGITS) {
#pragma unroll
            for (int i = 0; i < SIZE; ++i) a[i] += row.keep * q[i];
        }
        if (row.w) {
            load_accs(row.w + k + ahead, q);
#pragma unroll
            for (int i = 0; i < SIZE; ++i) a[i] = a[i] == 0 ? 0 : a[i] * q[i];
        }
    }

    // The part of what is held. `kept` takes what a gradient needs of it: the powers, times the slope of softcap; they
    // still are to be multiplied by their correction.
    template <bool KEEP>
    XE_DEVICE Part<A> part(bool with_edge, const Cap<A>& cap, A (&kept)[KEEP ? K * SIZE : 1]) const {
        const A highest = largest(with_edge);
        const A max = has_softcap(VARIANT) && count(with_edge) ? cap.of(highest).x : highest;  // -inf: -cap
        Sum<VARIANT, A> sum(max);
        if (with_edge) {
#pragma unroll
            for (int e = 0; e < EDGES; ++e) {
                if (edge[e] < 0) continue;
                add(sum, cap, at_edge[e], by_class(VARIANT) ? row.beside_label(edge[e]) : 0);
                if (VARIANT == SMOOTH) sum.half_gap += row.each * (sum.half_max - static_cast<A>(0.5) * at_edge[e]);
            }
        }
#pragma unroll
        for (int j = 0; j < K; ++j) {
            if (VARIANT != PLAIN && !has(j)) continue;
            A x[SIZE], a[SIZE];
            V::unpack(v[j], x);
            if (by_class(VARIANT)) shares(j, a);
            if (VARIANT == SMOOTH) sum.half_gap += row.each * V::half_below(sum.half_max, x);
#pragma unroll
            for (int i = 0; i < SIZE; ++i) {
                const A keep = add(sum, cap, x[i], a[i]);
                if (KEEP) kept[j * SIZE + i] = keep;
            }
        }
        if (VARIANT == SMOOTH) {
            sum.mass = row.label < 0 ? 0 : row.each * static_cast<A>(count(with_edge));
            if (row.label < 0) sum.half_gap = 0;
        }
        return {max, sum.sum * sum.powers.correction, 0, sum.half_gap, sum.mass};
    }
    XE_DEVICE A add(Sum<VARIANT, A>& sum, const Cap<A>& cap, A x, A a) const {
        const Capped<A> c = capped(cap, x);
        const A e = by_class(VARIANT) ? sum.add(c.x, a) : sum.add(c.x);
        return has_softcap(VARIANT) ? e * c.slope : e;
    }

    // Writes the gradient (or log-softmax) of what is held: zeros in a row whose scale is 0. What was `kept` is against
    // the thread's own maximum, `highest`, and `factor` brings it to the row's.
    template <int JOB, bool KEEP>
    XE_DEVICE void store(const Answer<T, VARIANT>& answer, const Cap<A>& cap, bool with_edge,
                         const A (&kept)[KEEP ? K * SIZE : 1], A highest = 0, A factor = 1) const {
        const bool silent = JOB != LOG_SOFTMAX && row.scale == 0;
        if (JOB != LOG_SOFTMAX && !silent && !answer.products_are_finite()) {
            each_again<1>(with_edge, [&](int k, A x) {
                const Capped<A> c = capped(cap, x);
                row.g[k] = from_acc(answer.grad(c.x, row.a(k), c.slope), T());
            });
            return;
        }
        const Powers<A> powers(answer.stats.max);
        if (!KEEP) factor = powers.correction;
        int top = -1;  // the class of the maximum, where coef·p - a may cancel
        if (JOB != LOG_SOFTMAX && every_class(VARIANT) && answer.confident && !silent) {
            if (!KEEP) highest = largest(with_edge);
            if (capped(cap, highest).x == answer.stats.max) {
                each_again<1>(with_edge, [&](int k, A x) { top = x == highest && top < 0 ? k : top; });
            }
        }
#pragma unroll
        for (int j = 0; j < K; ++j) {
            if (!has(j)) continue;
            A y[SIZE], a[SIZE];
            if (silent) {
#pragma unroll
                for (int i = 0; i < SIZE; ++i) y[i] = 0;
            } else {
                V::unpack(v[j], y);
                if (every_class(VARIANT)) shares(j, a);
#pragma unroll
                for (int i = 0; i < SIZE; ++i) {
                    y[i] = entry<JOB, KEEP>(answer, powers, cap, y[i], kept[KEEP ? j * SIZE + i : 0], a[i], factor);
                }
            }
            T* const to = row.g + class_of(j);
            if (EVEN) {
                st16(to, V::pack(y));
            } else {
#pragma unroll
                for (int i = 0; i < SIZE; ++i) to[i] = from_acc(y[i], T());
            }
        }
        if (with_edge) {
#pragma unroll
            for (int e = 0; e < EDGES; ++e) {
                if (edge[e] < 0) continue;
                const A x = to_acc(row.x[edge[e]]), a = by_class(VARIANT) ? row.beside_label(edge[e]) : row.each;
                const A y = silent ? 0 : entry<JOB, false>(answer, powers, cap, x, 0, a, powers.correction);
                row.g[edge[e]] = from_acc(y, T());
            }
        }
        if (top >= 0) {
            row.g[top] = from_acc(answer.grad(answer.stats.max, row.a(top), capped(cap, highest).slope), T());
        }
    }
    // What a job writes for the logit x, of whose class the label has nothing.
    template <int JOB, bool KEEP>
    XE_DEVICE A entry(const Answer<T, VARIANT>& answer, const Powers<A>& powers, const Cap<A>& cap, A x, A kept, A a,
                      A factor) const {
        if (JOB == LOG_SOFTMAX) return (x - answer.stats.max) - answer.tail;
        const Capped<A> c = KEEP ? Capped<A>{0, 1} : capped(cap, x);
        const A e = KEEP ? kept : powers.of(c.x);
        if (!every_class(VARIANT)) {
            const A value = e * (answer.share * answer.scale * factor);
            return has_softcap(VARIANT) && !KEEP ? value * c.slope : value;
        }
        if (VARIANT == SMOOTH) return e * (answer.share * answer.scale * factor) - a * answer.scale;
        const A value = e * (answer.share * factor) - a;
        return answer.scale * (has_softcap(VARIANT) ? value * c.slope : value);
    }
    static XE_DEVICE Capped<A> capped(const Cap<A>& cap, A x) {
        return has_softcap(VARIANT) ? cap.of(x) : Capped<A>{x, 1};
    }

    // Calls f(k, x) for every class that is held, read once more, in a loop: for what is rarely done.
    // U of them in a turn: all of a vector, or where f is long, one.
    template <int U, class F> XE_DEVICE void each_again(bool with_edge, F f) const {
        if (with_edge) {
#pragma unroll
            for (int e = 0; e < EDGES; ++e) {
                if (edge[e] >= 0) f(edge[e], to_acc(row.x[edge[e]]));
            }
        }
#pragma unroll 1
        for (int at = 0; at < K * SIZE; at += U) {
            const int j = at / SIZE, k = class_of(j) + at % SIZE;
            if (!has(j)) continue;
            A x[SIZE];
            if (U == SIZE) V::unpack(ld16(row.x + k), x);
            else x[0] = to_acc(row.x[k]);
#pragma unroll
            for (int i = 0; i < U; ++i) f(k + i, x[i]);
        }
    }
};

// The threads of a row, and how they come to know the same: by shuffles, shared memory, and messages between blocks.
// Each block of a cluster sends its part to all. A block has seen every message that will come before it leaves, so
// that no barrier is needed at the end, and no thread waits for stores to memory.
template <class A, int VARIANT, int LANES, int CLUSTER> struct Team {
    static constexpr int WIDTH = LANES ? LANES : 32;
    static constexpr int WORDS = (sizeof(A) * (every_class(VARIANT) ? 5 : 3) + 15) / 16;  // of 16 bytes, in a message
    union Bits {
        Part<A> part;
        A first;
        uint4 v[(sizeof(Part<A>) + 15) / 16];
        XE_DEVICE Bits() : part() {}
    };
    Part<A>* parts;           // of the warps
    uint4 *inbox, *second;    // the parts of the blocks; and what is said afterwards
    u64 *arrived, *settled;   // their barriers
    int rank = 0, leader = 0; // of this block; the lane that holds the maximum
    bool holder = false;      // whether this thread does

    XE_DEVICE Team(Part<A>* parts, uint4* inbox, uint4* second, u64* barriers)
        : parts(parts), inbox(inbox), second(second), arrived(barriers), settled(barriers + 1) {
#ifdef XE_CLUSTERS
        if (CLUSTER > 1) rank = cluster_rank();
#endif
    }
    // Before anything is sent.
    XE_DEVICE void open() {
#ifdef XE_CLUSTERS
        if (CLUSTER == 1) return;
        if (threadIdx.x == 0) {
            mbar_init(arrived, 1);
            mbar_init(settled, 1);
            mbar_init_fence();
            mbar_expect(arrived, CLUSTER * WORDS * 16);
        }
        cluster_arrive();
#endif
    }

    // From the parts of the threads to the row; in all threads.
    XE_DEVICE Part<A> merge(Part<A> part) {
        const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
        part = merge_lanes<WIDTH, VARIANT>(part, leader);
        holder = lane == static_cast<u32>(leader);
        if (LANES) return part;
        if (lane == 0) {
            if (every_class(VARIANT)) parts[warp] = part;
            else parts[warp].max = part.max, parts[warp].top = part.top, parts[warp].sum = part.sum;
        }
        sync_block();  // the part of every warp has been written
        part = Part<A>();
        if (lane < blockDim.x / 32) {
            if (every_class(VARIANT)) part = parts[lane];
            else part.max = parts[lane].max, part.top = parts[lane].top, part.sum = parts[lane].sum;
        }
        int leading;
        part = merge_lanes<32, VARIANT>(part, leading);
        holder &= warp == static_cast<u32>(leading);
#ifdef XE_CLUSTERS
        if (CLUSTER == 1) return part;
        cluster_wait();  // the mailboxes of the others are open
        Bits bits;
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

    // What the holder says; in all threads.
    XE_DEVICE A of_holder(A value) {
        if (LANES) return shfl(value, leader);
        Bits bits;
        bits.first = value;
#ifdef XE_CLUSTERS
        if (CLUSTER > 1) {
            if (holder) {
#pragma unroll
                for (int to = 0; to < CLUSTER; ++to) st_async16(second, to, bits.v[0], settled);
            }
            if (threadIdx.x == 0) mbar_expect(settled, 16);
            mbar_wait(settled, 0);
            bits.v[0] = ld16(second);
            return bits.first;
        }
#endif
        if (holder) st16(second, bits.v[0]);
        sync_block();  // it has been said
        bits.v[0] = ld16(second);
        return bits.first;
    }

    // Whether any thread of the row says so; in all of them. Not after of_holder, whose place it takes.
    XE_DEVICE bool any(bool yes) {
        if (LANES) {
            const int group = threadIdx.x % 32 / WIDTH * WIDTH;
            return (ballot(yes) >> group & 0xffffffffu >> (32 - WIDTH)) != 0;
        }
        yes = any_thread(yes);
#ifdef XE_CLUSTERS
        if (CLUSTER == 1) return yes;
        if (threadIdx.x < CLUSTER) st_async16(second + rank, threadIdx.x, make_uint4(yes, 0, 0, 0), settled);
        if (threadIdx.x == 0) mbar_expect(settled, CLUSTER * 16);
        mbar_wait(settled, 0);
        yes = any_lane(ld16(second + threadIdx.x % CLUSTER).x != 0);
#endif
        return yes;
    }
};

template <class T, int JOB, int VARIANT, int K, int LANES, int CLUSTER, bool STREAM, bool EVEN>
XE_DEVICE void xent_rows(const Problem<T>& p) {
    typedef typename Acc<T>::type A;
    typedef Vector<T> V;
    constexpr bool PARTS = CLUSTER == 0, OF_PART = PARTS && JOB == STATS;
    constexpr bool READS_STATS = JOB == GRAD || (PARTS && JOB == LOG_SOFTMAX), WRITES = writes_grad(JOB);
    constexpr int BLOCKS = PARTS ? 1 : CLUSTER;  // that hold or stream the row
    constexpr int STEP = LANES ? LANES : 32, SIZE = V::SIZE;
    // Exponentials are kept where there is room, and made again elsewhere.
    constexpr bool KEEP = WRITES && !READS_STATS && JOB != LOG_SOFTMAX && !STREAM && VARIANT != CAPPED_GENERAL
                          && K * SIZE <= (VARIANT == CAPPED ? 64 : 32);
    typedef Held<T, VARIANT, K, STEP, EVEN> H;
    typedef Team<A, VARIANT, LANES, BLOCKS> Of;
    XE_SHARED(Part<A>, parts, LANES ? 1 : 32);
    XE_SHARED(uint4, inbox, BLOCKS > 1 ? BLOCKS * Of::WORDS : 1);
    XE_SHARED(uint4, second, BLOCKS);
    XE_SHARED(u64, barriers, 2);
    Of team(parts, inbox, second, barriers);
    if (!READS_STATS) team.open();

    // What was read last is still in cache, so that parts are read again from the last to the first.
    const u32 block = PARTS && READS_STATS ? gridDim.x - 1 - blockIdx.x : blockIdx.x;
    // The threads of a row are numbered through all blocks of its cluster.
    const int threads = LANES ? STEP : static_cast<int>(blockDim.x) * BLOCKS;
    const u32 lane = LANES ? threadIdx.x % STEP : team.rank * blockDim.x + threadIdx.x;
    const i64 mine = LANES ? static_cast<i64>(blockIdx.x) * (blockDim.x / STEP) + threadIdx.x / STEP
                           : block / (PARTS ? static_cast<u32>(p.parts) : CLUSTER);
    const bool exists = !LANES || mine < p.rows;  // lanes without a row take part in the shuffles
    const i64 r = exists ? mine : p.rows - 1;
    Row<T, VARIANT> row = EVEN ? Row<T, VARIANT>(p, r, r, 0) : Row<T, VARIANT>(p, r);
    int classes = static_cast<int>(p.classes);
    if (PARTS) {
        const i64 start = block % static_cast<u32>(p.parts) * p.part;
        classes = static_cast<int>(min(p.part, p.classes - start));
        row.narrow(start, classes);
        if (OF_PART && row.label < 0) row.on_label = 0;
    }
    const Cut<T> cut(row.x, classes);
    const Cap<A> cap(p.softcap);
    const bool needed = exists && row.needs_logits(JOB);

    // A group of STEP lanes owns stretches of STEP·K vectors. A warp whose stretch is beyond the row only takes part in
    // the merging; the first always has the edges.
    const bool busy = BLOCKS == 1 || static_cast<int>(lane / STEP * (STEP * K)) < max(cut.vectors, 1);
    const int first = static_cast<int>(lane / STEP * (STEP * K) + lane % STEP), stride = threads * K;
    H held(p, row, cut, static_cast<int>(lane), first);
    held.load_edge(needed);

    // The label's logit, in the thread that will overwrite it. For `correct` in all of them; nobody overwrites it before
    // all have read it, by the barriers that merging takes.
    bool owner = lane == 0;
    if (row.label >= 0) {
        const int k = row.label - cut.head, place = k < 0 ? row.label : row.label - cut.vectors * SIZE;
        const int ahead = static_cast<int>(static_cast<u32>(k) / SIZE) - first, turn = STREAM ? ahead % stride : ahead;
        owner = k < 0 || k >= cut.vectors * SIZE ? static_cast<u32>(place) % STEP == lane : turn >= 0 && turn < STEP * K && turn % STEP == 0;
    }
    Rival<A> rival = rival_of<JOB>(p, row);
    A at_label = 0;
    if (row.label >= 0 && needed && (writes_stats(JOB) || owner)) at_label = to_acc(row.x[row.label]);
    rival.x = at_label;
    Capped<A> label = {at_label, 1};
    if (has_softcap(VARIANT)) label = cap.of(at_label);

    A kept[KEEP ? K * SIZE : 1];
    Part<A> part;
    Stats<A> stats;
    if (READS_STATS) {
        stats.max = p.max[r], stats.rest = p.rest[r];
        if (by_class(VARIANT)) stats.mass = p.mass[r];
    } else {
        int highest = first;  // the piece that holds the thread's maximum
        if constexpr (!STREAM) {
            if (busy) {
                held.load(needed);
                part = held.template part<KEEP>(true, cap, kept);
            }
        } else {
            do {
                held.load(needed);
                const Part<A> piece = held.template part<false>(held.first == first, cap, kept);
                if (piece.max > part.max) highest = held.first;
                part = merge<VARIANT>(part, piece);
            } while ((held.first += stride) < cut.vectors);
        }
        const Part<A> whole = team.merge(part);
        stats = {whole.max, whole.sum + (whole.top - 1), 2 * whole.half_gap, whole.mass};

        // Where p of the maximum is above 1/2, top - 1 has cancelled: its holder adds up the others of its piece.
        const bool confident = needed && 1 > stats.rest && stats.max > -infinity<A>();
        if (LANES ? any_lane(confident) : confident) {
            A others = 0;
            if (confident && team.holder) {
                held.first = highest;
                if (has_softcap(VARIANT)) held.load(needed);
                const bool with_edge = highest == first;
                const A raw = has_softcap(VARIANT) ? held.largest(with_edge) : part.max;
                held.template each_again<has_softcap(VARIANT) ? 1 : SIZE>(with_edge, [&](int, A x) {
                    others += x == raw ? 0 : exp_acc((has_softcap(VARIANT) ? cap.of(x).x : x) - stats.max);
                });
            }
            others = team.of_holder(others);
            if (confident) stats.rest = whole.sum + others;
        }
    }
    Answer<T, VARIANT> answer(p, row, stats, READS_STATS);
    if (!READS_STATS && row.label >= 0) answer.add_label(row, label.x);

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
        beaten = label.x < stats.max;
        // One of several: where it is alone, nothing else has its place.
        const bool asked = rival.label >= 0 && !beaten && !(stats.rest < 1);
        if (LANES ? any_lane(asked) : asked) {
            bool found = false;
            if (asked && needed) {
                held.first = first;
                do {
                    held.template each_again<1>(held.first == first, [&](int k, A x) { found |= rival.is_beaten_by(x, k); });
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
    if (!WRITES || !exists) return;

    if constexpr (!STREAM) {
        if (!busy) return;
        if (READS_STATS) held.load(needed);
        held.template store<JOB, KEEP>(answer, cap, true, kept, part.max,
                                       Powers<A>(part.max).correction * drop(part.max, stats.max));
    } else {
        // Backwards, because what was read last is still in cache; with stats that were given, there is nothing in it.
        const int pieces = first < cut.vectors ? (cut.vectors - first + stride - 1) / stride : 1;
        for (held.first = first + (pieces - 1) * stride; held.first >= first; held.first -= stride) {
            held.load(needed);
            held.template store<JOB, false>(answer, cap, held.first == first, kept);
        }
    }
    if (JOB != LOG_SOFTMAX && row.label >= 0 && owner && row.scale != 0) {
        row.g[row.label] = from_acc(answer.grad(label.x, row.a(row.label), label.slope), T());
    }
}

#define XE_CLUSTER_0
#define XE_CLUSTER_1
#define XE_CLUSTER_2 XE_CLUSTER(2)
#define XE_CLUSTER_4 XE_CLUSTER(4)
#define XE_CLUSTER_8 XE_CLUSTER(8)
#define XE_ROWS(name, T, JOB, VARIANT, K, LANES, CLUSTER, STREAM, EVEN, THREADS, BLOCKS)                        \
    extern "C" __global__ void XE_CLUSTER_##CLUSTER __launch_bounds__(THREADS, BLOCKS) name(const Problem<T> p) { \
        xent_rows<T, JOB, VARIANT, K, LANES, CLUSTER, STREAM, EVEN>(open(p));                                         \
    }
