/* Softmax cross-entropy where the classes of a row lie apart and neighbouring rows lie side by side: axis 1 of
 * (N, C, H, W), without a copy.
 *
 *     loss = Σ a_k (lse - x_k) + z·lse²        grad_k = scale [(mass + 2 z lse) p_k - a_k]        (as rows.cu)
 *
 *   P  XE_COLUMNS(name, T, JOB, VARIANT, CACHED)    a row is read by one thread, from its first class to its last
 *
 * Launch   128 threads, one row each; a warp reads 32 neighbouring rows, so every access is as wide as the warp.
 *          CACHED: dynamic shared memory of C·128 logits keeps the rows for the second pass.
 * Moves    per row: STATS, LOSS read C; all others read C and write C; without CACHED, those but GRAD ask for
 *          C once more, from cache if 128·C logits of every block still are there.
 * Numbers  see stats.cuh: 8 logits at a time against their maximum, merged from first to last.
 * Aliasing grad may be the logits: a row is one thread's own.
 * Tried    barriers: none are needed, because a thread reads only the shared memory that it wrote.
 */

#include "thread.cuh"

template <class T, int JOB, int VARIANT, bool CACHED> XE_DEVICE void xent_columns(const Problem<T>& p) {
    const i64 r = static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (r >= p.rows) return;
    const Row<T, VARIANT> row(p, r);
    const auto put = [&](int k, T value) { st_once(row.g + k * p.grad_class, value); };
    if (!CACHED) {
        xent_thread<T, JOB, VARIANT>(p, r, row, [&](int k) { return row.x[k * p.logits_class]; }, put);
        return;
    }
    XE_DYN(T, cache);
    T* const mine = cache + threadIdx.x;  // class k of this thread's row at k·blockDim.x
    const int step = blockDim.x, classes = static_cast<int>(p.classes);
    if (row.needs_logits(JOB)) {
#pragma unroll 8
        for (int k = 0; k < classes; ++k) {
            const T value = ld_once(row.x + k * p.logits_class);
            mine[k * step] = value;
        }
    }
    xent_thread<T, JOB, VARIANT>(p, r, row, [&](int k) { return mine[k * step]; }, put);
}

#define XE_COLUMNS(name, T, JOB, VARIANT, CACHED)                                   \
    extern "C" __global__ void __launch_bounds__(128, 4) name(const Problem<T> p) { \
        xent_columns<T, JOB, VARIANT, CACHED>(open(p));                             \
    }
