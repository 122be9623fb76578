// Everything the kernels need from CUDA and PTX, one wrapper each: no kernel contains asm.
//
// Nothing is included: an empty NVRTC compile takes 33 ms, one with cooperative_groups.h 2 s. The first part is the
// hardware; under XE_EMULATE tests/support/simt/simt.h supplies the same names instead, and kernels run on a CPU. The
// second part, below the line, is plain C++ on top of the first and is used in both.
//
// The emulation requires of every kernel (and a GPU does not mind): blockDim.x is a multiple of 32 and the only
// dimension of a block; whole warps execute shuffles and votes; data passes between lanes by shuffle, or through memory
// with a barrier in between; no thread returns before a barrier that others reach; accesses of 8 and 16 bytes to words
// go through ld8/st8 and ld16/st16 (g++ does not instrument copies of uint2 and uint4 to and from memory in calls and
// returns); shared memory is declared by XE_SHARED.

typedef unsigned short u16;
typedef unsigned int u32;
typedef long long i64;
typedef unsigned long long u64;

#ifndef XE_EMULATE  // ------------------------------------------------------------------------------ hardware

// 16-bit logits: bits with a type, for overloads and templates to tell the two apart.
struct f16 { u16 bits; };
struct bf16 { u16 bits; };

#define XE_DEVICE __device__ __forceinline__
#define XE_SHARED(T, name, n) __shared__ T name[n]  // the type carries the alignment

// Memory, shared or global. ld_l2: global, bypassing this SM's L1, for what other blocks wrote in this launch.
XE_DEVICE uint2 ld8(const void* p) { return *reinterpret_cast<const uint2*>(p); }
XE_DEVICE void st8(void* p, uint2 v) { *reinterpret_cast<uint2*>(p) = v; }
XE_DEVICE uint4 ld16(const void* p) { return *reinterpret_cast<const uint4*>(p); }
XE_DEVICE void st16(void* p, uint4 v) { *reinterpret_cast<uint4*>(p) = v; }
template <class T> XE_DEVICE T ld_l2(const T* p) { return __ldcg(p); }

// Prefetch from global memory to L2, asynchronously: the cache line of p; or whole 16-byte words from p on (nothing
// before compute capability 9.0).
XE_DEVICE void prefetch(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }
XE_DEVICE void prefetch(const void* p, u32 bytes) {
#if __CUDA_ARCH__ >= 900
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(p), "r"(bytes));
#endif
}

// Warp: every lane must take part. T is a 32- or 64-bit integer, float or double.
template <class T> XE_DEVICE T shfl(T v, int lane) { return __shfl_sync(0xffffffffu, v, lane); }
template <class T> XE_DEVICE T shfl_xor(T v, int mask) { return __shfl_xor_sync(0xffffffffu, v, mask); }
XE_DEVICE u32 ballot(bool yes) { return __ballot_sync(0xffffffffu, yes); }
XE_DEVICE int lowest_bit(u32 bits) { return __ffs(static_cast<int>(bits)) - 1; }  // bits must not be 0
XE_DEVICE bool any_lane(bool yes) { return __any_sync(0xffffffffu, yes); }
XE_DEVICE void sync_warp() { __syncwarp(); }

// Block and grid.
XE_DEVICE void sync_block() { __syncthreads(); }
XE_DEVICE bool any_thread(bool yes) { return __syncthreads_or(yes); }  // also a sync_block
XE_DEVICE void fence_gpu() { __threadfence(); }                        // this thread's writes, seen by the GPU
XE_DEVICE u32 take_ticket(u32* counter) { return atomicAdd(counter, 1u); }

// Marks a rare path, as its first statement. The common path is that of rows without options, with 64-bit labels and
// finite logits in contiguous arrays. Counts of executed instructions leave out whatever is reached only through such a
// mark, and it makes the compiler keep the path in a branch of its own. On a GPU that is not being profiled it does
// nothing.
XE_DEVICE void rare_path() { __prof_trigger(7); }

// Arithmetic. ex2: within 2 ulp; results below 2^-126 are 0 (CuPy compiles with -ftz=true anyway).
XE_DEVICE float exp2_fast(float x) { float y; asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
XE_DEVICE float reciprocal(float x) { float y; asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }  // 1 ulp
XE_DEVICE float multiply_rounded(float a, float b) { return __fmul_rn(a, b); }  // never fused with a following addition
XE_DEVICE double multiply_rounded(double a, double b) { return __dmul_rn(a, b); }
XE_DEVICE float f16_float(u16 x) { float y; asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x)); return y; }
XE_DEVICE u16 f16_bits(float x) { u16 y; asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x)); return y; }
XE_DEVICE u32 float_bits(float x) { return __float_as_uint(x); }
XE_DEVICE float bits_float(u32 x) { return __uint_as_float(x); }
XE_DEVICE u64 double_bits(double x) { return static_cast<u64>(__double_as_longlong(x)); }
XE_DEVICE double bits_double(u64 x) { return __longlong_as_double(static_cast<i64>(x)); }
#if __CUDA_ARCH__ >= 800
#define XE_NATIVE_16BIT  // conversions to bf16, and arithmetic on pairs
XE_DEVICE u16 bf16_bits(float x) { u16 y; asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y) : "f"(x)); return y; }
XE_DEVICE u32 pack2(float lo, float hi, f16) {
    u32 y; asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(hi), "f"(lo)); return y;
}
XE_DEVICE u32 pack2(float lo, float hi, bf16) {
    u32 y; asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(hi), "f"(lo)); return y;
}
XE_DEVICE u32 max2(u32 a, u32 b, f16) { u32 y; asm("max.f16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b)); return y; }
XE_DEVICE u32 max2(u32 a, u32 b, bf16) { u32 y; asm("max.bf16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b)); return y; }
#endif

// Clusters, transaction barriers and messages: compute capability 9.0 and above.
#if __CUDA_ARCH__ >= 900
#define XE_CLUSTERS      // available
#define XE_CLUSTER(n) __cluster_dims__(n, 1, 1)  // next to __launch_bounds__; gridDim.x must be a multiple of n

XE_DEVICE u32 shared_address(const void* p) { return static_cast<u32>(__cvta_generic_to_shared(p)); }
XE_DEVICE u32 shared_address(const void* p, int rank) {  // of the same variable in another block of the cluster
    u32 y; asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(y) : "r"(shared_address(p)), "r"(rank)); return y;
}

XE_DEVICE int cluster_rank() { int y; asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(y)); return y; }
XE_DEVICE void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
XE_DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

// A transaction barrier in shared memory: a phase completes when `count` arrivals and all expected bytes are in. One
// thread calls mbar_init, then mbar_init_fence; a sync_block (or a cluster barrier) makes it visible to the others.
XE_DEVICE void mbar_init(u64* bar, u32 count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(bar)), "r"(count) : "memory");
}
XE_DEVICE void mbar_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
XE_DEVICE void mbar_expect(u64* bar, u32 bytes) {  // arrives once, and makes the phase expect `bytes` more
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
                 ::"r"(shared_address(bar)), "r"(bytes) : "memory");
}
XE_DEVICE bool mbar_try(u64* bar, u32 parity) {
    u32 y;
    asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                 : "=r"(y) : "r"(shared_address(bar)), "r"(parity) : "memory");
    return y != 0;
}
XE_DEVICE void mbar_wait(u64* bar, u32 parity) { while (!mbar_try(bar, parity)) {} }  // parity 0 for the first phase

// Writes 16 bytes to `to` in the shared memory of block `rank` and counts them on its `bar`. Both are this block's
// addresses of the variables.
XE_DEVICE void st_async16(void* to, int rank, uint4 v, u64* bar) {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];"
                 ::"r"(shared_address(to, rank)), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w),
                 "r"(shared_address(bar, rank)) : "memory");
}
#endif

#endif  // ------------------------------------------------------------------------------ in both places

// The dtype of the arithmetic: float for 16- and 32-bit logits, double for double.
template <class T> struct Acc { typedef float type; };
template <> struct Acc<double> { typedef double type; };

XE_DEVICE float to_float(f16 v) { return f16_float(v.bits); }

// bfloat16 is the upper half of a float; conversion to it rounds to nearest even, in software on sm_75 and in emulation.
XE_DEVICE float to_float(bf16 v) { return bits_float(static_cast<u32>(v.bits) << 16); }
#ifndef XE_NATIVE_16BIT
XE_DEVICE u16 bf16_bits(float x) {
    const u32 b = float_bits(x);
    return static_cast<u16>((b & 0x7fffffffu) > 0x7f800000u ? 0x7fffu : (b + 0x7fffu + ((b >> 16) & 1u)) >> 16);
}
#endif

template <class T> XE_DEVICE T f16_or_bf16(u16 bits) { T v; v.bits = bits; return v; }
XE_DEVICE float to_acc(f16 v) { return to_float(v); }
XE_DEVICE float to_acc(bf16 v) { return to_float(v); }
XE_DEVICE float to_acc(float v) { return v; }
XE_DEVICE double to_acc(double v) { return v; }
XE_DEVICE f16 from_acc(float v, f16) { f16 y; y.bits = f16_bits(v); return y; }  // the second argument names the type
XE_DEVICE bf16 from_acc(float v, bf16) { bf16 y; y.bits = bf16_bits(v); return y; }
XE_DEVICE float from_acc(float v, float) { return v; }
XE_DEVICE double from_acc(double v, double) { return v; }

// Pairs of 16-bit numbers in one register, the first in the low half. max2 ignores NaN if the other is a number.
template <class T> XE_DEVICE float low2(u32 v) { return to_float(f16_or_bf16<T>(static_cast<u16>(v))); }
template <class T> XE_DEVICE float high2(u32 v) { return to_float(f16_or_bf16<T>(static_cast<u16>(v >> 16))); }
#ifndef XE_NATIVE_16BIT
template <class T> XE_DEVICE u32 pack2(float lo, float hi, T t) {
    return from_acc(lo, t).bits | static_cast<u32>(from_acc(hi, t).bits) << 16;
}
template <class T> XE_DEVICE u32 max2(u32 a, u32 b, T t) {
    return pack2(fmaxf(low2<T>(a), low2<T>(b)), fmaxf(high2<T>(a), high2<T>(b)), t);
}
#endif

// The functions of the loss, by accumulation type. exp_acc(float), for d ≤ 0: the product d·log2 e is rounded once, so
// the relative error is (2 + |d|/2) eps, which the tolerances of the tests include.
XE_DEVICE float exp_acc(float d) { return exp2_fast(d * 1.4426950408889634f); }

// For any d, accurate to 0.7 eps, without a branch, so that many can be in flight: 15 instructions of the double unit,
// which is the bottleneck on a GPU, and 9 of the integer unit. d = n·ln 2 + r, with n rounded by adding 1.5·2^52, e^r
// by a polynomial (0.06 eps off), 2^n as an exponent. A result below 1.0005·2^-1022, the smallest normal number, is 0;
// one above 0.9995 times the largest number is infinite. NaN stays NaN.
XE_DEVICE double exp_acc(double d) {
    const double shifted = fma(d, 1.4426950408889634, 6755399441055744.0), n = shifted - 6755399441055744.0;
    const double r = fma(n, -2.3190468138462996e-17, fma(n, -0.6931471805599453, d));
    double q = 2.5024639266311035e-08;
    q = fma(q, r, 2.7631140150201755e-07);
    q = fma(q, r, 2.7557507361975543e-06);
    q = fma(q, r, 2.4801490307638598e-05);
    q = fma(q, r, 0.00019841269596971038);
    q = fma(q, r, 0.0013888888946713305);
    q = fma(q, r, 0.008333333333451529);
    q = fma(q, r, 0.0416666666665162);
    q = fma(q, r, 0.16666666666666483);
    q = fma(q, r, 0.5000000000000012);
    const u64 power = double_bits(fma(fma(q, r, 1.0), r, 1.0));
    const u32 given = static_cast<u32>(double_bits(d) >> 32);  // sign, exponent, leading bits; ordered like the numbers
    u32 high = static_cast<u32>(power >> 32) + (static_cast<u32>(double_bits(shifted)) << 20);
    const bool below = given >= 0xc086232bu, above = static_cast<int>(given) >= 0x40862e42;  // each includes NaN of one sign
    if (below) high = given > 0xfff00000u ? given : 0;
    if (above) high = given > 0x7ff00000u ? given : 0x7ff00000u;
    return bits_double(static_cast<u64>(high) << 32 | (below || above ? 0 : static_cast<u32>(power)));
}
XE_DEVICE double reciprocal(double x) { return 1 / x; }
XE_DEVICE float log1p_acc(float x) { return log1pf(x); }
XE_DEVICE double log1p_acc(double x) { return log1p(x); }
XE_DEVICE float max_acc(float a, float b) { return fmaxf(a, b); }  // ignores NaN if the other is a number
XE_DEVICE double max_acc(double a, double b) { return fmax(a, b); }

// Over the lanes of aligned groups of `width` (a power of two); all lanes of a group get the same bits.
template <int width, class A> XE_DEVICE A lanes_max(A v) {
#pragma unroll
    for (int mask = width / 2; mask > 0; mask /= 2) v = max_acc(v, shfl_xor(v, mask));
    return v;
}
template <int width, class A> XE_DEVICE A lanes_sum(A v) {
#pragma unroll
    for (int mask = width / 2; mask > 0; mask /= 2) v += shfl_xor(v, mask);
    return v;
}
