/* What processes exchange that have a slice of the classes each, or some of the rows; and what follows from it.
 *
 *     max, rest, gap, mass of disjoint classes merge (stats.cuh); loss = gap + mass·log1p(rest) + z·lse²
 *     divisor of a mean = Σ of those of all processes
 *
 * Every process sends one message of numbers of type A: a head of HEAD words of 8 bytes, then for slices max, rest, gap
 * and mass of each row, and, if wanted, whether its label is the first of the slice's largest logits; for rows, their
 * divisor. The first word of a head stands for everything that must be the same in all processes. If it is not, or if
 * the slices do not cover every class once, all results are NaN: no process needs to wait for what another one said.
 *
 *   XE_SAY(name, A)      before the exchange: the head, and what no other launch has written to the message
 *   XE_SLICES(name, A)   SLICES: after it, the stats of whole rows, their loss, and `correct`
 *   XE_TOTAL(name, A)    after it, the divisor of the rows of all processes
 *
 * Launch   SAY, SLICES: 128 threads; one row per thread, or one block if SAY writes no row. TOTAL: one warp.
 * Moves    per row: four or five numbers of each process in, and as many out. Little compared with the logits.
 * Numbers  slices merge in the order of their classes, as a tree: the order depends on the slices only, so all processes
 *          get the same bits. TOTAL adds in the order of the ranks, 32 apart.
 * Aliasing none.
 * Tried    nothing yet.
 */

#include "stats.cuh"

constexpr int HEAD = 4;               // words: what is asked, the first class of the slice, how many classes, nothing
constexpr int LEVELS = 11;            // of the tree
constexpr int MOST = 1 << (LEVELS - 1);  // processes

template <class A> XE_DEVICE constexpr int head_numbers() { return HEAD * 8 / static_cast<int>(sizeof(A)); }
template <class A> XE_DEVICE i64 head_word(const A* message, int word) {
    return *reinterpret_cast<const i64*>(message + word * (8 / static_cast<int>(sizeof(A))));
}

// The argument of SAY, by value: 8-byte words, field for field those of Say in device.py.
template <class A> struct Say {
    A* message; i64 question, start, classes;
    i64 rows;                                        // to fill, if this slice has no classes; or of `correct`
    i64 fills;
    const bool* correct;                             // null: not wanted, or there are no classes
    i64 numbers;                                     // per row
    i64 counts; double divisor;                      // whether the message holds a divisor, and which
};

template <class A> XE_DEVICE void xent_say(const Say<A>& p) {
    const i64 r = static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x;
    A* const values = p.message + head_numbers<A>();
    if (r == 0) {
        i64* const head = reinterpret_cast<i64*>(p.message);
        head[0] = p.question, head[1] = p.start, head[2] = p.classes, head[3] = 0;
        if (p.counts) values[0] = static_cast<A>(p.divisor);
    }
    if (r >= p.rows) return;
    if (p.fills) {
        const Stats<A> none;
        const A numbers[] = {none.max, none.rest, none.gap, none.mass, 0};
#pragma unroll
        for (int k = 0; k < 5; ++k) {
            if (k < p.numbers) values[k * p.rows + r] = numbers[k];
        }
    } else if (p.correct) {
        values[4 * p.rows + r] = p.correct[r];
    }
}

// The argument of SLICES, by value: the words of a Problem, of which only what targets and weights say is used and the
// outputs, then field for field those of Slices in device.py.
template <class A> struct Slices {
    Problem<A> rows;
    const A* gathered; i64 ranks, length;            // the messages of all ranks, of so many numbers
    i64 question;
};

template <class A> struct Part {
    Stats<A> stats;
    bool correct = false;
};
template <class A> XE_DEVICE Part<A> merge(const Part<A>& one, const Part<A>& two) {
    return {merge(one.stats, two.stats), one.stats.max >= two.stats.max ? one.correct : two.correct};
}

// Sorts the ranks by their slices, with a barrier; returns whether all asked the same and have every class once.
template <class A> XE_DEVICE bool sort_slices(const Slices<A>& p, int* order) {
    bool wrong = false;
    for (int rank = threadIdx.x; rank < p.ranks; rank += blockDim.x) {
        const A* const message = p.gathered + rank * p.length;
        const i64 start = head_word(message, 1), classes = head_word(message, 2);
        int place = 0;
        i64 before = 0;  // classes of the slices that come first
        for (int other = 0; other < p.ranks; ++other) {
            const A* const its = p.gathered + other * p.length;
            const i64 first = head_word(its, 1);
            if (first > start || (first == start && other >= rank)) continue;
            ++place, before += head_word(its, 2);
        }
        order[place] = rank;
        wrong |= head_word(message, 0) != p.question || (classes != 0 && before != start);
        wrong |= place == p.ranks - 1 && before + classes != p.rows.vocabulary;
    }
    return !any_thread(wrong);  // and the order has been written
}

template <class A> XE_DEVICE void xent_slices(const Slices<A>& p) {
    XE_SHARED(int, order, MOST);
    const bool fits = sort_slices(p, order);
    const Problem<A>& rows = open(p.rows);
    const i64 r = static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x, n = rows.rows;
    if (r >= n) return;

    // After k parts, level j holds the merged 2^j parts that bit j of k stands for.
    Part<A> held[LEVELS];
    for (int k = 0; k < p.ranks; ++k) {
        const A* const at = p.gathered + (order[k] * p.length + head_numbers<A>() + r);
        Part<A> part = {{at[0], at[n], at[2 * n], at[3 * n]}, rows.correct && at[4 * n] != 0};
        bool done = false;
#pragma unroll
        for (int level = 0; level < LEVELS; ++level) {
            if (done) continue;
            done = (k >> level & 1) == 0;
            if (done) held[level] = part;
            else part = merge(held[level], part);
        }
    }
    Part<A> whole;
    bool any = false;
#pragma unroll
    for (int level = 0; level < LEVELS; ++level) {
        if ((p.ranks >> level & 1) == 0) continue;
        whole = any ? merge(held[level], whole) : held[level];
        any = true;
    }
    if (!fits) whole.stats.max = whole.stats.rest = whole.stats.gap = whole.stats.mass = not_a_number<A>();

    const Place at = place_of(rows, r);
    const int kind = static_cast<int>(rows.kind);
    const i64 named = is_label(kind) ? label_at(rows.target, at.o * rows.target_outer + at.i * rows.target_inner, kind) : 0;
    const Row<A, PLAIN_SLICE> row(rows, named, rows.sample_weight ? rows.sample_weight[r] : 1, 1);
    const Answer<A, PLAIN_SLICE> answer(rows, row, whole.stats, true, true);
    answer.template put<STATS>(rows, row, r);
    if (!fits && rows.loss) rows.loss[r] = not_a_number<A>();  // also of a row that does not count
    if (rows.correct) rows.correct[r] = whole.correct && answer.tail == answer.tail;
}

// The argument of TOTAL, by value: 8-byte words, field for field those of Total in device.py.
template <class A> struct Total {
    const A* gathered; i64 ranks, length;            // the messages of all ranks, of so many numbers
    i64 question;
    A* divisor_to;
};

template <class A> XE_DEVICE void xent_total(const Total<A>& p) {
    bool wrong = false;
    A sum = 0;
    for (i64 rank = threadIdx.x; rank < p.ranks; rank += 32) {
        const A* const message = p.gathered + rank * p.length;
        wrong |= head_word(message, 0) != p.question;
        sum += message[head_numbers<A>()];
    }
    sum = lanes_sum<32>(sum);
    wrong = any_lane(wrong);
    if (threadIdx.x == 0) *p.divisor_to = wrong ? not_a_number<A>() : sum;
}

#define XE_SAY(name, A) \
    extern "C" __global__ void __launch_bounds__(128) name(const Say<A> p) { xent_say<A>(p); }
#define XE_SLICES(name, A) \
    extern "C" __global__ void __launch_bounds__(128) name(const Slices<A> p) { xent_slices<A>(p); }
#define XE_TOTAL(name, A) \
    extern "C" __global__ void __launch_bounds__(32) name(const Total<A> p) { xent_total<A>(p); }
