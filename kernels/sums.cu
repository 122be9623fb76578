/* Sums over rows: what a mean divides by, and the loss.
 *
 *     divisor = Σ_i factor_i · (w[y_i] or 1)      scale = upstream / divisor      loss = Σ_i loss_i / divisor
 *
 * with factor_i the sample weight, 0 for an ignored row; a bad label counts nothing here (its own row is NaN). Legal
 * before any logit is read: all of it follows from targets and weights. The divisor never leaves the device.
 *
 *   D  XE_SUMS(name, A)   counts rows (where `counts`), adds losses (where `loss` is given), or both at once
 *
 * Launch   512 threads; 1 block for few rows, else 128: constants, so that the order of the sum follows from N alone.
 *          Where there is more than one block, `partials` has 2 doubles for each and a 0 after them, the ticket; it
 *          is 0 again at the end, so that the second launch of a call can use it too.
 * Moves    per row: the label, the weights, the loss. Little beside C logits.
 * Numbers  float64 throughout, in a fixed order: bitwise the same from run to run. 0 / 0 is NaN.
 * Aliasing none.
 * Tried    one launch for counting and one for dividing: the last block to finish does the second, found by a ticket.
 */

#include "problem.cuh"

struct Sums { double count, loss; };

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

#define XE_SUM_PARAMETERS(A)                                                                                      \
    const void *target, i64 kind, i64 target_outer, i64 target_inner, i64 rows, i64 classes, i64 inner, i64 ignores, \
        i64 ignore_index, const A *weight, const A *sample_weight, const A *losses, i64 counts, double divisor,    \
        const double *divisor_at, double upstream, const A *upstream_at, double *partials,                         \
        double *divisor_to, A *scale_to, A *loss_to

template <class A> XE_DEVICE void xent_sums(XE_SUM_PARAMETERS(A)) {
    Sums s = {0, 0};
    const i64 step = static_cast<i64>(gridDim.x) * blockDim.x;
    for (i64 r = static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x; r < rows; r += step) {
        if (losses) s.loss += losses[r];
        if (!counts) continue;
        double count = sample_weight ? sample_weight[r] : 1;
        if (INT8 <= kind && kind <= UINT64) {
            const i64 label = label_at(target, r / inner * target_outer + r % inner * target_inner, kind);
            const bool counted = !(ignores && label == ignore_index) && 0 <= label && label < classes;
            count = !counted || count == 0 ? 0 : weight ? count * weight[label] : count;
        }
        s.count += count;
    }
    s = sum_threads(s);
    if (gridDim.x > 1) {
        u32* const ticket = reinterpret_cast<u32*>(partials + 2 * gridDim.x);
        bool last = false;
        if (threadIdx.x == 0) {
            partials[2 * blockIdx.x] = s.count, partials[2 * blockIdx.x + 1] = s.loss;
            fence_gpu();  // the partials, before the ticket that says they are there
            last = take_ticket(ticket) == gridDim.x - 1;
            fence_gpu();
        }
        if (!any_thread(last)) return;
        s = {0, 0};
        for (u32 b = threadIdx.x; b < gridDim.x; b += blockDim.x) {
            s.count += ld_l2(partials + 2 * b), s.loss += ld_l2(partials + 2 * b + 1);
        }
        s = sum_threads(s);
        if (threadIdx.x == 0) *ticket = 0;
    }
    if (threadIdx.x != 0) return;
    const double by = counts ? s.count : divisor_at ? *divisor_at : divisor;
    if (divisor_to) *divisor_to = by;
    const double given = upstream_at ? *upstream_at : upstream;
    if (scale_to) *scale_to = static_cast<A>(by == 0 ? not_a_number<double>() : given / by);
    if (loss_to) *loss_to = static_cast<A>(by == 0 ? not_a_number<double>() : s.loss / by);
}

#define XE_SUMS(name, A)                                                                                    \
    extern "C" __global__ void __launch_bounds__(512) name(XE_SUM_PARAMETERS(A)) {                           \
        xent_sums<A>(target, kind, target_outer, target_inner, rows, classes, inner, ignores, ignore_index,  \
                     weight, sample_weight, losses, counts, divisor, divisor_at, upstream, upstream_at,      \
                     partials, divisor_to, scale_to, loss_to);                                              \
    }
