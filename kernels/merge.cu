/* Rows that many blocks have read in parts: the stats of a whole row from those of its parts, its loss, and whether the
 * label is the first of the largest logits.
 *
 *     max, rest, gap, mass of disjoint classes merge (stats.cuh); loss = gap + mass·log1p(rest) + z·lse²
 *
 * Legal because stats of disjoint classes hold all that a row's loss and gradient need of its logits.
 *
 *   M  XE_MERGE(name, T)   a row is a block's
 *
 * Launch   128 threads, a block for each row, after the launch of rows.cu that has left the stats of the parts.
 * Moves    per row: four numbers for each part. Where the label's logit is the largest, but not alone, the row once more.
 * Numbers  thread t merges parts t, t + 128, ... one after another, then the threads are merged as a tree: an order that
 *          follows from the number of parts alone, as that does from C. The 1 of a row's maximum is never part of rest,
 *          so that confident rows keep their digits without being read again.
 * Aliasing none: nothing of the row has been written yet, where the gradient takes the place of the logits.
 * Tried    nothing yet. The last block of a row to finish could do this, if a ticket for each row were 0 at the start.
 */

#include "stats.cuh"

// Where both have the same maximum, that of `one` counts as the first.
template <class A> XE_DEVICE Stats<A> merge(const Stats<A>& one, const Stats<A>& two) {
    const bool first = one.max >= two.max;
    const Stats<A>&high = first ? one : two, &low = first ? two : one;
    Stats<A> both = high;
    both.rest += (1 + low.rest) * (low.max == high.max ? 1 : exp_acc(low.max - high.max));
    both.gap += low.gap + 2 * times(low.mass, half_below(high.max, low.max));
    both.mass += low.mass;
    return both;
}

// Over the block, which all of it waits for; in all threads.
template <class A> XE_DEVICE Stats<A> merge_threads(Stats<A> s) {
    XE_SHARED(Stats<A>, of_warps, 4);
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int mask = 1; mask < 32; mask *= 2) {
        const Stats<A> other = {shfl_xor(s.max, mask), shfl_xor(s.rest, mask), shfl_xor(s.gap, mask), shfl_xor(s.mass, mask)};
        s = lane & mask ? merge(other, s) : merge(s, other);
    }
    if (lane == 0) of_warps[threadIdx.x / 32] = s;
    sync_block();  // the stats of every warp have been written
    return merge(merge(of_warps[0], of_warps[1]), merge(of_warps[2], of_warps[3]));
}

template <class T> XE_DEVICE void xent_merge(const Problem<T>& p) {
    typedef typename Acc<T>::type A;
    const i64 r = blockIdx.x, all = p.rows * p.parts;
    Stats<A> s;
    for (i64 part = threadIdx.x; part < p.parts; part += blockDim.x) {
        const A* const at = p.of_parts + (r * p.parts + part);
        const Stats<A> next = {at[0], at[all], at[2 * all], at[3 * all]};
        s = merge(s, next);
    }
    s = merge_threads(s);
    const Row<T, GENERAL> row(p, r);
    const Answer<T, GENERAL> answer(p, row, s, true);

    Rival<A> rival = rival_of<STATS>(p, row);
    bool beaten = false;
    if (rival.label >= 0) {
        rival.x = to_acc(row.x[rival.label]);
        const A x = p.softcap > 0 ? Cap<A>(p.softcap).of(rival.x).x : rival.x;
        beaten = x < s.max;
        if (!beaten && !(s.rest < 1)) {  // one of several: where it is alone, nothing else has its place
            for (i64 k = threadIdx.x; k < p.classes; k += blockDim.x) {
                beaten |= rival.is_beaten_by(to_acc(row.x[k]), static_cast<int>(k));
            }
        }
    }
    beaten = any_thread(beaten);
    if (threadIdx.x != 0) return;
    answer.template put<STATS>(p, row, r);
    put_correct<STATS>(p, r, answer, rival, beaten);
}

#define XE_MERGE(name, T)                                                         \
    extern "C" __global__ void __launch_bounds__(128) name(const Problem<T> p) { \
        xent_merge<T>(p);                                                         \
    }
