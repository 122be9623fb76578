/* Softmax cross-entropy on rows whose classes lie side by side: one read of the logits, one write of the gradient.
 *
 *     loss = Σ a_k (lse - x_k) + z·lse²        grad_k = scale [(mass + 2 z lse) p_k - a_k]
 *
 * Legal in one pass because scale (upstream, 1/denominator, sample weight, ignored or not) follows from targets and
 * weights alone: it is known before a logit is read.
 *
 *   XE_ROWS(name, T, JOB, VARIANT, K, LANES, CLUSTER, STREAM, THREADS, BLOCKS)
 *
 *   W  LANES = 8, 16, 32    a row is held by so many lanes of a warp
 *   B  LANES = 0            a row is held by a block, or by a cluster of CLUSTER blocks (compute capability 9.0)
 *   O  LANES = 0, STREAM    a row of any length is read through a block or a cluster, twice for a gradient
 *
 * Launch   W: blockDim.x / LANES rows per block; B, O: one row per block or cluster, of whole warps. A thread holds K
 *          vectors of 16 bytes; in W and B K·16·threads must cover the row. THREADS, BLOCKS: __launch_bounds__. All
 *          numbers come from `plan` in xent_array/_engines/cuda.py.
 * Moves    per row: STATS, LOSS read C; all others read C and write C. O reads C once more for a gradient,
 *          the last pieces first, so that what is in cache is used. A target distribution is read twice likewise.
 * Wide     a row is [head | vectors of 16 bytes | tail] by its own address: every C and every start keeps 128-bit
 *          loads. Stores are as wide where the gradient is aligned like the logits.
 * Numbers  see stats.cuh. The tree of a row's sums depends on C, dtype, chip and the alignment of the row: never on
 *          the number of rows or the place among them.
 * Aliasing grad may be the logits: an element is read and written by one thread. PLAIN reads x[label] in the thread
 *          that will write it, and in no other; jobs that say `correct` read it in all, before a barrier.
 * Tried    On sm_90, by the compiler's account; nothing here has been timed on a GPU yet.
 *          v1 vectors j·blockDim.x apart: an address per load. Now a warp owns a stretch: one address, K immediates.
 *          v2 exponentials kept for the gradient (fp32): no registers for K = 8. Now made again: one MUFU more.
 *          v3 a barrier.cluster to swap parts: waits for all stores. Now messages to a mailbox: st.async + mbarrier.
 */

#include "stats.cuh"

// One thread's part of a row: up to K vectors, STEP apart, and in the first tile at most one element of head and tail.
template <class T, int VARIANT, int K, int STEP> struct Held {
    typedef typename Acc<T>::type A;
    typedef Vector<T> V;
    const Cut<T> cut;
    int first;           // the number of v[0] among the vectors of the row
    int edge[2];         // the classes held in `at_edge`; -1: none
    A at_edge[2];
    uint4 v[K];

    XE_DEVICE Held(Cut<T> cut, int lane) : cut(cut) {
        edge[0] = lane < cut.head ? lane : -1;
        edge[1] = lane < cut.tail ? cut.head + cut.vectors * V::SIZE + lane : -1;
    }
    XE_DEVICE bool has(int j) const { return first + j * STEP < cut.vectors; }
    XE_DEVICE int class_of(int j) const { return cut.head + (first + j * STEP) * V::SIZE; }

    XE_DEVICE void load_edge(const T* x, bool needed) {
#pragma unroll
        for (int e = 0; e < 2; ++e) at_edge[e] = needed && edge[e] >= 0 ? to_acc(x[edge[e]]) : -infinity<A>();
    }
    template <bool AGAIN> XE_DEVICE void load(const T* x, bool needed) {
        const T* from = x + cut.head + static_cast<i64>(first) * V::SIZE;
#pragma unroll
        for (int j = 0; j < K; ++j) {
            if (needed && has(j)) v[j] = AGAIN ? ld16(from + j * STEP * V::SIZE) : ld16_once(from + j * STEP * V::SIZE);
            else v[j] = V::nothing();
        }
    }

    XE_DEVICE A largest(bool with_edge) const {
        const A inside = V::largest(v);
        return with_edge ? max_acc(inside, max_acc(at_edge[0], at_edge[1])) : inside;
    }
    // The stats of what is held, and whether any of it beats the label; PLAIN leaves gap and mass to its owner.
    XE_DEVICE Stats<A> stats(const Problem<T>& p, const Row<T, VARIANT>& row, bool with_edge, const Rival<A>& rival,
                             bool& beaten) const {
        const A highest = largest(with_edge);
        if (rival.label >= 0) beaten |= beats(rival, highest, with_edge);
        Sum<VARIANT, A> sum(VARIANT == CAPPED ? capped(highest, p.softcap).x : highest);
        if (with_edge) {
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                if (edge[e] >= 0) add(sum, p, row, edge[e], at_edge[e]);
            }
        }
#pragma unroll
        for (int j = 0; j < K; ++j) {
            if (VARIANT != PLAIN && !has(j)) continue;
            A x[V::SIZE];
            V::unpack(v[j], x);
#pragma unroll
            for (int i = 0; i < V::SIZE; ++i) add(sum, p, row, class_of(j) + i, x[i]);
        }
        return sum.stats();
    }
    XE_DEVICE void add(Sum<VARIANT, A>& sum, const Problem<T>& p, const Row<T, VARIANT>& row, int k, A x) const {
        if (VARIANT == PLAIN) sum.add(x);
        else sum.add(VARIANT == CAPPED ? capped(x, p.softcap).x : x, row.a(k));
    }

    // Whether a class that is held, of which `highest` is the largest logit, beats the label. Where it is the label's
    // own, by a place before it.
    XE_DEVICE bool beats(const Rival<A>& rival, A highest, bool with_edge) const {
        if (highest < rival.x) return false;
        if (highest > rival.x) return true;
        int place = 1 << 30;  // of the first vector's element that is as large, counted from v[0]
#pragma unroll
        for (int j = K - 1; j >= 0; --j) {
            A x[V::SIZE];
            V::unpack(v[j], x);
#pragma unroll
            for (int i = V::SIZE - 1; i >= 0; --i) place = x[i] == rival.x ? j * STEP * V::SIZE + i : place;
        }
        bool beaten = place < rival.label - class_of(0);
        if (with_edge) {
#pragma unroll
            for (int e = 0; e < 2; ++e) beaten |= edge[e] >= 0 && rival.is_beaten_by(at_edge[e], edge[e]);
        }
        return beaten;
    }

    // What a job writes for class k, whose logit is x.
    template <int JOB>
    XE_DEVICE A result(const Problem<T>& p, const Row<T, VARIANT>& row, const Answer<T, VARIANT>& answer, int k,
                       A x) const {
        if (JOB == LOG_SOFTMAX) return (x - answer.stats.max) - answer.tail;
        if (VARIANT == PLAIN) return answer.grad(x);
        if (VARIANT == GENERAL) return answer.grad(x, row.a(k));
        const Capped<A> c = capped(x, p.softcap);
        return answer.grad(c.x, row.a(k), c.slope);
    }
    // Writes the gradient (or log-softmax) of what is held: zeros in a row whose scale is 0.
    template <int JOB>
    XE_DEVICE void store(const Problem<T>& p, const Row<T, VARIANT>& row, const Answer<T, VARIANT>& answer,
                         bool with_edge) const {
        const bool silent = JOB != LOG_SOFTMAX && row.scale == 0;
        if (with_edge) {
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                if (edge[e] < 0) continue;
                const A y = silent ? 0 : result<JOB>(p, row, answer, edge[e], at_edge[e]);
                st_once(row.g + edge[e], from_acc(y, T()));
            }
        }
        const bool aligned_alike = ((reinterpret_cast<u64>(row.x) ^ reinterpret_cast<u64>(row.g)) & 15) == 0;
#pragma unroll
        for (int j = 0; j < K; ++j) {
            if (!has(j)) continue;
            A y[V::SIZE];
            V::unpack(v[j], y);
#pragma unroll
            for (int i = 0; i < V::SIZE; ++i) y[i] = silent ? 0 : result<JOB>(p, row, answer, class_of(j) + i, y[i]);
            T* to = row.g + class_of(j);
            if (aligned_alike) {
                st16_once(to, V::pack(y));
            } else {
#pragma unroll
                for (int i = 0; i < V::SIZE; ++i) st_once(to + i, from_acc(y[i], T()));
            }
        }
    }
};

// From the parts that threads hold to the row of a group of lanes, or of a block; in all threads.
template <int LANES, int VARIANT, class A> XE_DEVICE Stats<A> merge_threads(Stats<A> part) {
    part = merge_lanes<LANES ? LANES : 32, VARIANT>(part);
    if (LANES) return part;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
    XE_SHARED(A, parts, 4 * 32);
    if (lane == 0) {
        parts[warp] = part.max, parts[32 + warp] = part.rest;
        if (VARIANT != PLAIN) parts[64 + warp] = part.gap, parts[96 + warp] = part.mass;
    }
    sync_block();  // the part of every warp has been written
    part = Stats<A>();
    if (lane < warps) {
        part.max = parts[lane], part.rest = parts[32 + lane];
        if (VARIANT != PLAIN) part.gap = parts[64 + lane], part.mass = parts[96 + lane];
    }
    return merge_lanes<32, VARIANT>(part);
}

// Whether any thread of a row says so; in all of them.
template <int LANES> XE_DEVICE bool any_of_row(bool yes) {
    if (!LANES) return any_thread(yes);
    constexpr int WIDTH = LANES ? LANES : 32;
    const int group = threadIdx.x % 32 / WIDTH * WIDTH;
    return (ballot(yes) >> group & 0xffffffffu >> (32 - WIDTH)) != 0;
}

// Where blocks of a cluster share a row, each sends its part to all. A block has seen every message that will come
// before it leaves, so that no barrier is needed at the end, and no thread waits for stores to memory.
template <class A, int CLUSTER, bool WITH_BEATEN> struct Mailbox {
    static constexpr int PARTS = sizeof(Stats<A>) / 16, MESSAGES = PARTS + WITH_BEATEN;  // of 16 bytes
    union Bits { Stats<A> part; uint4 v[PARTS]; XE_DEVICE Bits() : part() {} };
    uint4* inbox;
    u64* arrived;
    int rank;

#ifdef XE_CLUSTERS
    XE_DEVICE Mailbox(uint4* inbox, u64* arrived)
        : inbox(inbox), arrived(arrived), rank(CLUSTER > 1 ? cluster_rank() : 0) {}
    XE_DEVICE void open() {
        if (threadIdx.x == 0) {
            mbar_init(arrived, 1);
            mbar_init_fence();
            mbar_expect(arrived, CLUSTER * MESSAGES * 16);
        }
        cluster_arrive_relaxed();
    }
    template <int VARIANT> XE_DEVICE Stats<A> merge(const Stats<A>& part, bool& beaten) {
        cluster_wait();  // the mailboxes of the others are open
        const int to = threadIdx.x;
        Bits bits;
        bits.part = part;
        if (to < CLUSTER) {
#pragma unroll
            for (int i = 0; i < PARTS; ++i) st_async16(inbox + rank * MESSAGES + i, to, bits.v[i], arrived);
            if (WITH_BEATEN) {
                st_async16(inbox + rank * MESSAGES + PARTS, to, make_uint4(beaten, 0, 0, 0), arrived);
            }
        }
        mbar_wait(arrived, 0);
#pragma unroll
        for (int i = 0; i < PARTS; ++i) bits.v[i] = ld16(inbox + threadIdx.x % CLUSTER * MESSAGES + i);
        if (WITH_BEATEN) beaten = any_lane(inbox[threadIdx.x % CLUSTER * MESSAGES + PARTS].x != 0);
        return merge_lanes<CLUSTER, VARIANT>(bits.part);
    }
#else
    XE_DEVICE Mailbox(uint4* inbox, u64* arrived) : inbox(inbox), arrived(arrived), rank(0) {}
    XE_DEVICE void open() {}
    template <int VARIANT> XE_DEVICE Stats<A> merge(const Stats<A>& part, bool&) { return part; }
#endif
};

template <class T, int JOB, int VARIANT, int K, int LANES, int CLUSTER, bool STREAM>
XE_DEVICE void xent_rows(const Problem<T>& p) {
    typedef typename Acc<T>::type A;
    constexpr bool READS_STATS = JOB == GRAD, WRITES = writes_grad(JOB);
    typedef Mailbox<A, CLUSTER, writes_stats(JOB)> Box;
    constexpr int STEP = LANES ? LANES : 32;
    // From cache: for LOG_SOFTMAX the compiler would hold on to what it unpacked, and there is no room for that.
    constexpr bool AGAIN = JOB == LOG_SOFTMAX && !LANES;
    XE_SHARED(uint4, inbox, CLUSTER > 1 ? CLUSTER * Box::MESSAGES : 1);
    XE_SHARED(u64, arrived, 1);
    Box mailbox(inbox, arrived);
    if (CLUSTER > 1 && !READS_STATS) mailbox.open();

    // The threads of a row are numbered through all blocks of its cluster.
    const int threads = LANES ? STEP : static_cast<int>(blockDim.x) * CLUSTER;
    const int lane = LANES ? threadIdx.x % STEP : mailbox.rank * blockDim.x + threadIdx.x;
    const i64 mine = LANES ? static_cast<i64>(blockIdx.x) * (blockDim.x / STEP) + threadIdx.x / STEP
                           : blockIdx.x / CLUSTER;
    const bool exists = mine < p.rows;  // lanes without a row take part in the shuffles
    const i64 r = exists ? mine : p.rows - 1;
    const int classes = static_cast<int>(p.classes);
    const Row<T, VARIANT> row(p, r);
    const Cut<T> cut(row.x, classes);
    const bool needed = exists && row.needs_logits(JOB);

    // A group of STEP lanes owns stretches of STEP·K vectors.
    const int first = lane / STEP * (STEP * K) + lane % STEP, stride = threads * K;
    Held<T, VARIANT, K, STEP> held(cut, lane);
    held.load_edge(row.x, needed);

    // PLAIN: the label's logit, in the thread that will overwrite it. For `correct` in all of them; nobody overwrites
    // it before all have read it, by the barriers of merge_threads, or where lanes share the row by this one.
    int owner = 0;
    A at_label = 0;
    if (VARIANT == PLAIN && row.label >= 0) {
        const int k = row.label - cut.head, vector = k / Vector<T>::SIZE;
        if (k < 0) owner = row.label;
        else if (vector >= cut.vectors) owner = k - cut.vectors * Vector<T>::SIZE;
        else owner = vector / (STEP * K) % (threads / STEP) * STEP + vector % STEP;
        if (lane == owner && needed && !writes_stats(JOB)) at_label = to_acc(row.x[row.label]);
    }
    Rival<A> rival = rival_of<JOB>(p, row);
    bool beaten = false;
    if (writes_stats(JOB) && row.label >= 0 && needed) rival.x = at_label = to_acc(row.x[row.label]);
    if (writes_stats(JOB) && LANES) sync_warp();

    Stats<A> stats;
    held.first = first;
    if (READS_STATS) {
        stats.max = p.max[r], stats.rest = p.rest[r];
        if (VARIANT != PLAIN) stats.mass = p.mass[r];
    } else if (!STREAM) {
        held.template load<AGAIN>(row.x, needed);
        stats = held.stats(p, row, true, rival, beaten);
    } else {
        do {
            held.template load<WRITES>(row.x, needed);
            stats = merge<VARIANT>(stats, held.stats(p, row, held.first == first, rival, beaten));
        } while ((held.first += stride) < cut.vectors);
    }
    if (!READS_STATS) {
        stats = merge_threads<LANES, VARIANT>(stats);
        if (writes_stats(JOB) && p.correct) beaten = any_of_row<LANES>(beaten);
        if (CLUSTER > 1) stats = mailbox.template merge<VARIANT>(stats, beaten);
        if (VARIANT == PLAIN && row.label >= 0) {
            stats.gap = at_label == stats.max ? 0 : stats.max - at_label;
        }
    }
    const Answer<T, VARIANT> answer(p, row, stats);

    if (exists && lane == owner) {
        answer.template put<JOB>(p, row, r);
        put_correct<JOB>(p, r, answer, rival, beaten);
    }
    if (!WRITES || !exists) return;
    if (STREAM && READS_STATS) {
        do {
            held.template load<false>(row.x, needed);
            held.template store<JOB>(p, row, answer, held.first == first);
        } while ((held.first += stride) < cut.vectors);
    } else if (STREAM) {
        // Backwards, because what was read last is still in cache.
        const int tiles = first < cut.vectors ? (cut.vectors - first + stride - 1) / stride : 1;
        for (held.first = first + (tiles - 1) * stride; held.first >= first; held.first -= stride) {
            held.template load<false>(row.x, needed);
            held.template store<JOB>(p, row, answer, held.first == first);
        }
    } else {
        if (READS_STATS || AGAIN) held.template load<false>(row.x, needed);
        held.template store<JOB>(p, row, answer, true);
    }
    if (VARIANT == PLAIN && JOB != LOG_SOFTMAX && row.label >= 0 && lane == owner && row.scale != 0) {
        st_once(row.g + row.label, from_acc(answer.grad(at_label, static_cast<A>(1)), T()));
    }
}

#define XE_CLUSTER_1
#define XE_CLUSTER_2 XE_CLUSTER(2)
#define XE_CLUSTER_4 XE_CLUSTER(4)
#define XE_CLUSTER_8 XE_CLUSTER(8)
#define XE_ROWS(name, T, JOB, VARIANT, K, LANES, CLUSTER, STREAM, THREADS, BLOCKS)                                \
    extern "C" __global__ void XE_CLUSTER_##CLUSTER __launch_bounds__(THREADS, BLOCKS) name(const Problem<T> p) { \
        xent_rows<T, JOB, VARIANT, K, LANES, CLUSTER, STREAM>(open(p));                                           \
    }
