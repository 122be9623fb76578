/* Sums over rows: what a mean divides by, and the loss.
 *
 *     divisor = Σ_i factor_i · (w[y_i] or 1)      scale = upstream / divisor      loss = Σ_i loss_i / divisor
 *
 * with factor_i the sample weight, 0 for an ignored row; a bad label counts nothing here (its own row is NaN). Legal
 * before any logit is read: all of it follows from targets and weights. The divisor never leaves the device.
 *
 *   D  XE_SUMS(name, A)   counts rows (where `counts`), adds losses (where `losses` are given), or both at once
 *
 * Launch   1024 threads; 1 block for few rows, else 64: constants, so that the order of the sum follows from N alone.
 *          Blocks leave their sums in `partials`. Who adds those up: where there is a `ticket`, the last block to finish.
 *          It must be 0 at the start, and the launch over the rows, which comes before, sees to that (`open`): so no
 *          memory outlives a call, which streams, graphs and calls that never ended could disagree about. Where rows
 *          are counted nothing comes before; there the blocks only leave their sums, and a second launch, of 1 block,
 *          has them as `parts`.
 * Moves    per row: the label, the weights, the loss. Little beside C logits. AHEAD rows are on their way to a thread,
 *          64 KB of labels to a block: what an SM can wait for.
 * Numbers  float64 throughout, in a fixed order: bitwise the same from run to run. 0 / 0 is NaN. Rows that weigh 1 are
 *          counted as integers, because many chips add float64 slowly.
 * Aliasing none.
 * Tried    a ticket that is 0 again at the end: somebody must make it 0 at first, a memset for each call. More launches
 *          instead of the ticket: as dear as the memset, where the losses of a small batch are summed.
 */

#include "problem.cuh"

struct Sums { double count, loss; };

// The one argument, by value: words of 8 bytes, field for field those of Sum in cuda.py.
template <class A> struct Sum {
    const void* target; i64 kind, target_outer, target_inner;
    i64 rows, classes, inner;
    i64 ignores, ignore_index;
    const A *weight, *sample_weight, *losses;        // null: all 1; nothing to add
    i64 counts;                                      // whether the divisor is counted, or else
    double divisor; const double* divisor_at;        // ... known
    double upstream; const A* upstream_at;
    double* partials; i64 parts;                     // 2 numbers for each block, after one in place of which is
    u32* ticket;                                     // ... this, which is 0; or null
    double* divisor_to; A *scale_to, *loss_to;       // null: not wanted
};

// Over the block, in a fixed order; the result is in thread 0.
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

// What this thread adds of the rows.
template <class A> XE_DEVICE Sums of_rows(const Sum<A>& p) {
    constexpr int AHEAD = 32 / sizeof(A);  // more of double do not fit in 64 registers
    const i64 step = static_cast<i64>(gridDim.x) * blockDim.x;
    const bool has_labels = p.counts && INT8 <= p.kind && p.kind <= UINT64, weighs = p.weight || p.sample_weight;
    Sums s = {0, 0};
    i64 kept = 0;
    for (i64 start = static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x; start < p.rows; start += AHEAD * step) {
        i64 label[AHEAD];
        A loss[AHEAD];
#pragma unroll
        for (int u = 0; u < AHEAD; ++u) {
            const i64 r = start + u * step;
            label[u] = 0, loss[u] = 0;
            if (r >= p.rows) continue;
            const i64 o = p.inner == 1 ? r : r / p.inner, i = p.inner == 1 ? 0 : r % p.inner;
            if (has_labels) label[u] = label_at(p.target, o * p.target_outer + i * p.target_inner, p.kind);
            if (p.losses) loss[u] = p.losses[r];
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

// What this thread adds of the sums of blocks.
XE_DEVICE Sums of_blocks(const double* partials, i64 blocks) {
    Sums s = {0, 0};
    for (i64 b = threadIdx.x; b < blocks; b += blockDim.x) {
        s.count += ld_l2(partials + 2 * b), s.loss += ld_l2(partials + 2 * b + 1);
    }
    return s;
}

template <class A> XE_DEVICE void xent_sums(const Sum<A>& p) {
    double* const partials = p.partials + 1;
    Sums s = sum_threads(p.parts ? of_blocks(partials, p.parts) : of_rows(p));
    if (gridDim.x > 1) {
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

#define XE_SUMS(name, A)                                                      \
    extern "C" __global__ void __launch_bounds__(1024) name(const Sum<A> p) { \
        xent_sums<A>(p);                                                      \
    }
