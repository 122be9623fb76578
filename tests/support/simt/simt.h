// The names of CUDA and of kernels/device.cuh for g++; simt.cpp is the machine behind them.
//
// Included before the text of a kernel. Nothing is included here either, which keeps a build of a kernel short.
// `int line = __builtin_LINE()` is the line of the caller: messages name it, and lanes or threads that meet in one
// operation from two different lines have diverged.

#pragma once
#define XE_EMULATE
#define XE_HERE int line = __builtin_LINE()
#define XE_RAW __attribute__((no_sanitize("thread")))  // hidden from the checker, unless simt::access reports it

typedef unsigned short u16;
typedef unsigned int u32;
typedef long long i64;
typedef unsigned long long u64;

struct alignas(8) uint2 { u32 x, y; };
struct alignas(16) uint4 { u32 x, y, z, w; };
inline uint2 make_uint2(u32 x, u32 y) { return {x, y}; }
inline uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }

// --------------------------------------------------------------------------------------------------------- the machine
namespace simt {

struct Index { u32 x, y, z; };
struct Place { Index thread, block, block_dim, grid_dim; };  // of a thread
enum Access { READ = 0, WRITE = 1, READ_L2 = 2, ATOMIC = 3, PREFETCH = 4 };
enum Collective { SHFL, SHFL_XOR, BALLOT, SYNC_WARP };

Place place();  // of the running thread
void access(const void* p, int bytes, Access kind, int line);  // tests alignment; the checker tests the rest
void prefetch(const void* p, u32 bytes, u32 unit, int line);   // both must be multiples of `unit`
void* shared(const void* key, i64 bytes, int align);  // one array per block and declaration
u64 collective(Collective what, u64 value, int by, int line);
bool block_barrier(bool yes, int line);
void fence();
void ticket();
int cluster_rank();
void cluster_arrive(int line);
void cluster_wait(int line);
void mbarrier_init(u64* bar, u32 count, int line);
void mbarrier_fence();
void mbarrier_expect(u64* bar, u32 bytes, int line);
void mbarrier_wait(u64* bar, u32 parity, int line);
void store_async(void* to, int rank, uint4 value, u64* bar, int line);

// An entry, called with the addresses of its arguments as cuLaunchKernel takes them, and the kinds of its parameters:
// p(ointer), i(nteger), f(loat), b(ool), s(truct), each followed by its size in four digits.
template <int... I> struct Ints {};
template <class... A, int... I> XE_RAW void call(void (*f)(A...), void** a, Ints<I...>) {
    f(*static_cast<A*>(a[I])...);
}
template <class... A> void call(void (*f)(A...), void** a) { call(f, a, Ints<__integer_pack(sizeof...(A))...>()); }
template <class T, bool STRUCT = __is_class(T)> struct Kind {
    static constexpr char letter = T(0.5f) != T(0) ? 'f' : 'i';
};
template <class T> struct Kind<T, true> { static constexpr char letter = 's'; };
template <class T> struct Kind<T*> { static constexpr char letter = 'p'; };
template <> struct Kind<bool> { static constexpr char letter = 'b'; };
template <class... A> void kinds(void (*)(A...), char* to) {
    const auto put = [&](char letter, u64 size) {
        *to++ = letter;
        for (u64 ten = 1000; ten; ten /= 10) *to++ = static_cast<char>('0' + size / ten % 10);
    };
    (put(Kind<A>::letter, sizeof(A)), ...);
    *to = 0;
}

}  // namespace simt

// Wrappers for each launched entry; build.py appends one line for each.
#define SIMT_ENTRY(name)                                                    \
    extern "C" void simt_call_##name(void** a) { simt::call(name, a); }     \
    extern "C" void simt_kinds_##name(char* to) { simt::kinds(name, to); }

#ifndef SIMT_MACHINE
// -------------------------------------------------------------------------------------------------------- CUDA's words
#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __restrict__
#define __launch_bounds__(...)
#define threadIdx (simt::place().thread)
#define blockIdx (simt::place().block)
#define blockDim (simt::place().block_dim)
#define gridDim (simt::place().grid_dim)

extern "C" {
float expf(float); float exp2f(float); float log1pf(float); float tanhf(float); float fmaxf(float, float);
float fminf(float, float); float fmaf(float, float, float); float fabsf(float); float logf(float);
float copysignf(float, float);
double exp(double); double exp2(double); double log1p(double); double tanh(double); double fmax(double, double);
double fmin(double, double); double fma(double, double, double); double fabs(double); double log(double);
}
inline bool isnan(float x) { return __builtin_isnan(x); }
inline bool isnan(double x) { return __builtin_isnan(x); }
inline bool isinf(float x) { return __builtin_isinf(x); }
inline bool isinf(double x) { return __builtin_isinf(x); }
inline bool isfinite(float x) { return __builtin_isfinite(x); }
inline bool isfinite(double x) { return __builtin_isfinite(x); }
template <class T> T min(T a, T b) { return b < a ? b : a; }
template <class T> T max(T a, T b) { return a < b ? b : a; }
template <class To, class From> To simt_bits(From x) {
    static_assert(sizeof(To) == sizeof(From));
    To y;
    __builtin_memcpy(&y, &x, sizeof y);
    return y;
}

// -------------------------------------------------------------------------------------------------- device.cuh's words
// g++ does not instrument copies of a plain struct from memory into a call or from a return into memory. These structs
// copy themselves, on the line that asks for it.
#define SIMT_INLINE __attribute__((always_inline))
#define SIMT_16BIT(name)                                                       \
    struct name {                                                              \
        u16 bits;                                                              \
        name() = default;                                                      \
        SIMT_INLINE name(const name& from) : bits(from.bits) {}                \
        SIMT_INLINE name& operator=(const name& from) {                        \
            bits = from.bits;                                                  \
            return *this;                                                      \
        }                                                                      \
    }
SIMT_16BIT(f16);
SIMT_16BIT(bf16);
#define XE_DEVICE inline
#define XE_CLUSTERS
#define XE_CLUSTER(n)
#define XE_SHARED(T, name, n) \
    static char name##_key;   \
    T* const name = static_cast<T*>(simt::shared(&name##_key, sizeof(T) * (n), alignof(T)))

XE_RAW inline uint2 ld8(const void* p, XE_HERE) {
    simt::access(p, 8, simt::READ, line);
    return *static_cast<const uint2*>(p);
}
XE_RAW inline void st8(void* p, uint2 v, XE_HERE) {
    simt::access(p, 8, simt::WRITE, line);
    *static_cast<uint2*>(p) = v;
}
XE_RAW inline uint4 ld16(const void* p, XE_HERE) {
    simt::access(p, 16, simt::READ, line);
    return *static_cast<const uint4*>(p);
}
XE_RAW inline void st16(void* p, uint4 v, XE_HERE) {
    simt::access(p, 16, simt::WRITE, line);
    *static_cast<uint4*>(p) = v;
}
template <class T> XE_RAW T ld_l2(const T* p, XE_HERE) { simt::access(p, sizeof(T), simt::READ_L2, line); return *p; }
inline void prefetch(const void* p, XE_HERE) { simt::prefetch(p, 1, 1, line); }
inline void prefetch(const void* p, u32 bytes, XE_HERE) {
    simt::prefetch(p, bytes, 16, line);
#ifdef __SANITIZE_ADDRESS__
    (void)*static_cast<const volatile char*>(p), (void)*(static_cast<const volatile char*>(p) + bytes - 1);
#endif
}
XE_RAW inline u32 take_ticket(u32* p, XE_HERE) {
    simt::access(p, 4, simt::ATOMIC, line);
    simt::ticket();
    return (*p)++;
}

template <class T> T simt_shuffle(simt::Collective what, T v, int by, int line) {
    u64 bits = 0;
    __builtin_memcpy(&bits, &v, sizeof v);
    bits = simt::collective(what, bits, by, line);
    __builtin_memcpy(&v, &bits, sizeof v);
    return v;
}
template <class T> T shfl(T v, int lane, XE_HERE) { return simt_shuffle(simt::SHFL, v, lane, line); }
template <class T> T shfl_xor(T v, int mask, XE_HERE) { return simt_shuffle(simt::SHFL_XOR, v, mask, line); }
inline u32 ballot(bool yes, XE_HERE) { return static_cast<u32>(simt::collective(simt::BALLOT, yes, 0, line)); }
inline int lowest_bit(u32 bits) { return __builtin_ctz(bits); }
inline bool any_lane(bool yes, XE_HERE) { return simt::collective(simt::BALLOT, yes, 0, line) != 0; }
inline void sync_warp(XE_HERE) { simt::collective(simt::SYNC_WARP, 0, 0, line); }
inline void sync_block(XE_HERE) { simt::block_barrier(false, line); }
inline bool any_thread(bool yes, XE_HERE) { return simt::block_barrier(yes, line); }
inline void fence_gpu() { simt::fence(); }

// The hardware's exp2 is less accurate and flushes subnormal numbers; this one is accurate, and flushes too.
inline float exp2_fast(float x) { const float y = exp2f(x); return y < 1.17549435e-38f ? 0.0f : y; }
inline float reciprocal(float x) { return 1 / x; }
template <class A> A multiply_rounded(A a, A b) {
    const volatile A product = a * b;  // in memory, so that it cannot be fused into a sum
    return product;
}
inline float f16_float(u16 x) { return static_cast<float>(simt_bits<_Float16>(x)); }
inline u16 f16_bits(float x) { return simt_bits<u16>(static_cast<_Float16>(x)); }
inline void rare_path() {}
inline u32 float_bits(float x) { return simt_bits<u32>(x); }
inline float bits_float(u32 x) { return simt_bits<float>(x); }
inline u64 double_bits(double x) { return simt_bits<u64>(x); }
inline double bits_double(u64 x) { return simt_bits<double>(x); }

inline int cluster_rank() { return simt::cluster_rank(); }
inline void cluster_arrive(XE_HERE) { simt::cluster_arrive(line); }
inline void cluster_wait(XE_HERE) { simt::cluster_wait(line); }
inline void mbar_init(u64* bar, u32 count, XE_HERE) { simt::mbarrier_init(bar, count, line); }
inline void mbar_init_fence() { simt::mbarrier_fence(); }
inline void mbar_expect(u64* bar, u32 bytes, XE_HERE) { simt::mbarrier_expect(bar, bytes, line); }
inline void mbar_wait(u64* bar, u32 parity, XE_HERE) { simt::mbarrier_wait(bar, parity, line); }
inline void st_async16(void* to, int rank, uint4 v, u64* bar, XE_HERE) {
    simt::store_async(to, rank, v, bar, line);
}

#endif
