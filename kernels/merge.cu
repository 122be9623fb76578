/* Merges the stats of the parts of a row, which many blocks have read (SPLIT), into the stats of the row; writes its
 * loss, and whether the label is the first of the largest logits.
 *
 *     max, rest, gap, mass of disjoint classes merge (stats.cuh); loss = gap + mass·log1p(rest) + z·lse²
 *
 * Legal because the stats of disjoint classes hold everything that loss and gradient of the row need from its logits.
 *
 *   XE_MERGE(name, T)         MERGE: one block per row
 *   XE_MERGE_SLICE(name, T)   the same for rows of a slice of the classes, whose labels are those of all classes
 *
 * Launch   128 threads, one block per row, after the launch of rows.cu that writes the stats of the parts.
 * Moves    per row: four numbers per part. If the label's logit is the largest, but not alone, the row once more.
 * Numbers  thread t merges parts t, t + 128, ... in order, then the threads merge as a tree: an order that depends only
 *          on the number of parts, which depends only on C. The 1 of a row's maximum is never added to rest, so
 *          confident rows keep their accuracy without a second read.
 * Aliasing none: when this runs, nothing of the row's gradient has been written, even if it replaces the logits.
 * Tried    nothing yet. The last block of a row to finish could merge, given a zeroed ticket for each row.
 */

#include "stats.cuh"

// Over the block, with a barrier; all threads get the result.
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

template <class T, int VARIANT> XE_DEVICE void xent_merge(const Problem<T>& p) {
    typedef typename Acc<T>::type A;
    const i64 r = blockIdx.x, all = p.rows * p.parts;
    Stats<A> s;
    for (i64 part = threadIdx.x; part < p.parts; part += blockDim.x) {
        const A* const at = p.of_parts + (r * p.parts + part);
        const Stats<A> next = {at[0], at[all], at[2 * all], at[3 * all]};
        s = merge(s, next);
    }
    s = merge_threads(s);
    const Row<T, VARIANT> row(p, r);
    const Answer<T, VARIANT> answer(p, row, s, true, false);

    Rival<A> rival = rival_of<STATS>(p, row);
    bool beaten = false;
    if (rival.label >= 0) {
        rival.x = to_acc(row.x[rival.label]);
        const A x = p.softcap > 0 ? Cap<A>(p.softcap).of(rival.x).x : rival.x;
        beaten = x < s.max;
        if (!beaten && !(s.rest < 1)) {  // a tie: a maximum with rest < 1 is unique
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

#define XE_MERGE(name, T) XE_MERGE_VARIANT(name, T, GENERAL)
#define XE_MERGE_SLICE(name, T) XE_MERGE_VARIANT(name, T, GENERAL_SLICE)
#define XE_MERGE_VARIANT(name, T, VARIANT)                                       \
    extern "C" __global__ void __launch_bounds__(128) name(const Problem<T> p) { \
        xent_merge<T, VARIANT>(p);                                               \
    }
