/* Softmax cross-entropy on millions of rows of few classes that lie one after another: (N, C) with C up to 32.
 *
 *     loss = Σ a_k (lse - x_k) + z·lse²        grad_k = scale [(mass + 2 z lse) p_k - a_k]        (as rows.cu)
 *
 *   T  XE_TINY(name, T, JOB, VARIANT)      a row is worked on by one thread, in shared memory
 *
 * Launch   256 threads, one row each. The block's logits are one stretch of memory: it is copied to shared memory in
 *          vectors of 16 bytes, whatever C is, and the gradient goes back the same way.
 * Moves    per row: C in, and C out where a gradient is written. Rows that do not count are read too.
 * Numbers  see stats.cuh: 8 logits at a time against their maximum, merged from first to last; the same code as P.
 * Aliasing grad may be the logits: a block has read its stretch before it writes any of it.
 * Tried    rows of C words hit the same banks where C is a multiple of a power of 2. Starting each thread at another
 *          class would cure that and make a row's sum depend on its place; one free word in 33 cures it too.
 */

#include "thread.cuh"

// Where element e of the stretch lies in shared memory: a free word after every 32 (16 doubles, a free double).
template <class T> XE_DEVICE int place_of(int e) {
    constexpr int GROUP = 128 / sizeof(T), GAP = sizeof(T) < 4 ? 4 / sizeof(T) : 1;
    return e + e / GROUP * GAP;
}

template <class T, int JOB, int VARIANT> XE_DEVICE void xent_tiny(const Problem<T>& p) {
    typedef Vector<T> V;
    union Bits { uint4 v; T e[V::SIZE]; };
    XE_DYN(T, tile);
    const int threads = blockDim.x, thread = threadIdx.x, classes = static_cast<int>(p.classes);
    const i64 first = static_cast<i64>(blockIdx.x) * threads;
    const int here = static_cast<int>(min(static_cast<i64>(threads), p.rows - first)), count = here * classes;

    const T* const x = p.logits + first * classes;
    const Cut<T> from(x, count);
    for (int e = thread; e < from.head; e += threads) tile[place_of<T>(e)] = ld_once(x + e);
#pragma unroll 4
    for (int v = thread; v < from.vectors; v += threads) {
        const int e = from.head + v * V::SIZE;
        Bits bits;
        bits.v = ld16_once(x + e);
#pragma unroll
        for (int i = 0; i < V::SIZE; ++i) tile[place_of<T>(e + i)] = bits.e[i];
    }
    for (int e = count - from.tail + thread; e < count; e += threads) tile[place_of<T>(e)] = ld_once(x + e);
    sync_block();  // the stretch is in shared memory, before rows are read across the threads that brought it

    if (thread < here) {
        const Row<T, VARIANT> row(p, first + thread);
        const int start = thread * classes;
        xent_thread<T, JOB, VARIANT>(p, first + thread, row, [&](int k) { return tile[place_of<T>(start + k)]; },
                                     [&](int k, T value) { tile[place_of<T>(start + k)] = value; });
    }
    if (!writes_grad(JOB)) return;
    sync_block();  // the gradient of every row is in shared memory

    T* const g = p.grad + first * classes;
    const Cut<T> to(g, count);
    for (int e = thread; e < to.head; e += threads) st_once(g + e, tile[place_of<T>(e)]);
    for (int v = thread; v < to.vectors; v += threads) {
        const int e = to.head + v * V::SIZE;
        Bits bits;
#pragma unroll
        for (int i = 0; i < V::SIZE; ++i) bits.e[i] = tile[place_of<T>(e + i)];
        st16_once(g + e, bits.v);
    }
    for (int e = count - to.tail + thread; e < count; e += threads) st_once(g + e, tile[place_of<T>(e)]);
}

#define XE_TINY(name, T, JOB, VARIANT)                                                                   \
    extern "C" __global__ void __launch_bounds__(256, sizeof(T) == 8 ? 2 : 4) name(const Problem<T> p) { \
        xent_tiny<T, JOB, VARIANT>(open(p));                                                             \
    }
