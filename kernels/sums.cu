/* SUMS: reductions over rows. The divisor of a mean, and the sum of the losses.
 *
 *     divisor = Σ_i factor_i · (w[y_i] or 1)      scale = upstream / divisor      loss = Σ_i loss_i / divisor
 *
 * with factor_i the sample weight, or 0 for an ignored row; a bad label counts as 0 here (its own row is NaN). Legal
 * before any logit is read, since all of it depends on targets and weights only. The divisor never leaves the device.
 *
 *   XE_SUMS(name, A, CLUSTER)   counts rows (if `counts`), adds losses (if `losses` is given), or both
 *
 * Launch   1024 threads; 1 block for few rows, a cluster of CLUSTER blocks for more (compute capability 9.0), else 128
 *          blocks: constants, so that the order of the sum depends on N only. The blocks of a cluster send their sums
 *          to its first block; others write them to `partials`. If there is a `ticket`, the last block to finish adds
 *          the partials. The ticket must be 0 at the start, which the preceding launch over the rows ensures (`open`),
 *          so no memory outlives a call for streams, graphs or aborted calls to leave in a bad state. When rows are
 *          counted there is no preceding launch: the blocks only write their partials, and a second launch, of 1 block,
 *          reads them as `parts`.
 * Moves    per row: the label, the weights, the loss; little compared with C logits. Each thread has loads for AHEAD
 *          rows in flight, a block 64 KB of labels, which is as much as an SM can have outstanding.
 * Numbers  float64 throughout, in a fixed order: bitwise reproducible. 0 / 0 is NaN. Rows of weight 1 are counted as
 *          integers, because many chips add float64 slowly.
 * Aliasing none.
 * Tried    A ticket that the last block resets to 0: something must still zero it first, which is a memset per call.
 *          More launches instead of a ticket: as expensive as the memset for the losses of a small batch.
 */

#include "problem.cuh"

struct Sums { double count, loss; };

// The only argument, by value: 8-byte words, field for field those of Sum in cuda.py.
template <class A> struct Sum {
    const void* target; i64 kind, target_outer, target_inner;
    i64 rows, classes, inner;
    i64 ignores, ignore_index;
    const A *weight, *sample_weight, *losses;        // null: all 1; no losses to add
    i64 counts;                                      // whether to count the divisor, else
    double divisor; const double* divisor_at;        // ... it is known: a number, or in memory
    double upstream; const A* upstream_at;
    double* partials; i64 parts;                     // a ticket, then 2 numbers per block; blocks whose sums it holds
    u32* ticket;                                     // null, or the ticket in `partials`, which is 0
    double* divisor_to; A *scale_to, *loss_to;       // outputs; null: not wanted
};

// Over the block, in a fixed order; thread 0 gets the result.
XE_DEVICE Sums sum_threads(Sums s) {
    XE_SHARED(double, counts, 32);
    XE_SHARED(double, losses, 32);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
    s.count = lanes_sum<32>(s.count), s.loss = lanes_sum<32>(s.loss);
    sync_block();  // the sums of an earlier call have been read
    if (lane == 0) counts[warp] = s.count, losses[warp] = s.loss;
    sync_block();  // every warp's sums have been written
    s = {lane < warps ? counts[lane] : 0, lane < warps ? losses[lane] : 0};
    s.count = lanes_sum<32>(s.count), s.loss = lanes_sum<32>(s.loss);
    return s;
}

// This thread's sum over rows.
template <class A> XE_DEVICE Sums of_rows(const Sum<A>& p) {
    constexpr int AHEAD = 32 / sizeof(A);  // more doubles do not fit in 64 registers
    const i64 step = static_cast<i64>(gridDim.x) * blockDim.x;
    const int kind = static_cast<int>(p.kind);
    const bool has_labels = p.counts && is_label(kind), weighs = p.weight || p.sample_weight;
    Sums s = {0, 0};
    i64 kept = 0;
    for (i64 start = static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x; start < p.rows; start += AHEAD * step) {
        i64 label[AHEAD] = {};
        A loss[AHEAD] = {};
        const bool all = start + (AHEAD - 1) * step < p.rows;
        if (has_labels && all && p.inner == 1) {  // all loads in flight together
            labels_at(p.target, start * p.target_outer, step * p.target_outer, kind, label);
        } else if (has_labels) {
#pragma unroll 1
            for (int u = 0; u < AHEAD; ++u) {
                const i64 r = start + u * step;
                if (r >= p.rows) break;
                const i64 o = p.inner == 1 ? r : r / p.inner, i = p.inner == 1 ? 0 : r % p.inner;
                const i64 named = label_at(p.target, o * p.target_outer + i * p.target_inner, kind);
#pragma unroll
                for (int v = 0; v < AHEAD; ++v) label[v] = u == v ? named : label[v];
            }
        }
        if (p.losses) {
#pragma unroll
            for (int u = 0; u < AHEAD; ++u) {
                if (start + u * step < p.rows) loss[u] = p.losses[start + u * step];
            }
        }
#pragma unroll
        for (int u = 0; u < AHEAD; ++u) {
            const i64 r = start + u * step;
            s.loss += loss[u];
            if (!p.counts || r >= p.rows || (has_labels && p.ignores && label[u] == p.ignore_index)) continue;
            if (label[u] < 0 || label[u] >= p.classes) continue;
            if (!weighs) ++kept;
            else {
                const double weight = p.sample_weight ? p.sample_weight[r] : 1;
                s.count += weight == 0 || !p.weight || !has_labels ? weight : weight * p.weight[label[u]];
            }
        }
    }
    s.count += static_cast<double>(kept);
    return s;
}

// This thread's sum over the partial sums of blocks.
XE_DEVICE Sums of_blocks(const double* partials, i64 blocks) {
    Sums s = {0, 0};
    for (i64 b = threadIdx.x; b < blocks; b += blockDim.x) {
        s.count += ld_l2(partials + 2 * b), s.loss += ld_l2(partials + 2 * b + 1);
    }
    return s;
}

template <class A, int CLUSTER> XE_DEVICE void xent_sums(const Sum<A>& p) {
    double* const partials = p.partials + 1;
#ifdef XE_CLUSTERS
    XE_SHARED(uint4, inbox, CLUSTER);
    XE_SHARED(u64, arrived, 1);
    if (CLUSTER > 1) {
        if (threadIdx.x == 0) {
            mbar_init(arrived, 1);
            mbar_init_fence();
            mbar_expect(arrived, CLUSTER * 16);  // only the first block receives any
        }
        cluster_arrive();
    }
#endif
    Sums s = sum_threads(p.parts ? of_blocks(partials, p.parts) : of_rows(p));
#ifdef XE_CLUSTERS
    if (CLUSTER > 1) {
        union Bits { Sums s; uint4 v; XE_DEVICE Bits() : v() {} } bits;
        cluster_wait();  // the mailbox of the first is open
        bits.s = s;
        if (threadIdx.x == 0) st_async16(inbox + cluster_rank(), 0, bits.v, arrived);
        if (cluster_rank() != 0) return;
        mbar_wait(arrived, 0);
        s = {0, 0};
        for (int b = 0; b < CLUSTER; ++b) {
            bits.v = ld16(inbox + b);
            s.count += bits.s.count, s.loss += bits.s.loss;
        }
    }
#endif
    if (CLUSTER == 1 && gridDim.x > 1) {
        bool last = false;
        if (threadIdx.x == 0) {
            partials[2 * blockIdx.x] = s.count, partials[2 * blockIdx.x + 1] = s.loss;
            if (p.ticket) {
                fence_gpu();  // the partials, before the ticket that says they are there
                last = take_ticket(p.ticket) == gridDim.x - 1;
                fence_gpu();
            }
        }
        if (!any_thread(last)) return;
        s = sum_threads(of_blocks(partials, gridDim.x));
    }
    if (threadIdx.x != 0) return;
    const double by = p.counts ? s.count : p.divisor_at ? *p.divisor_at : p.divisor;
    if (p.divisor_to) *p.divisor_to = by;
    const double given = p.upstream_at ? *p.upstream_at : p.upstream;
    if (p.scale_to) *p.scale_to = static_cast<A>(by == 0 ? not_a_number<double>() : given / by);
    if (p.loss_to) *p.loss_to = static_cast<A>(by == 0 ? not_a_number<double>() : s.loss / by);
}

#define XE_CLUSTER_1
#define XE_CLUSTER_8 XE_CLUSTER(8)
#define XE_SUMS(name, A, CLUSTER)                                                                    \
    extern "C" __global__ void XE_CLUSTER_##CLUSTER __launch_bounds__(1024) name(const Sum<A> p) { \
        xent_sums<A, CLUSTER>(p);                                                                    \
    }
