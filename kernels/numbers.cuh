// Numbers and vectors of numbers: constants, and the logits in the 16 bytes of one access.

#pragma once
#include "device.cuh"

template <class A> XE_DEVICE A infinity();
template <> XE_DEVICE float infinity<float>() { return bits_float(0x7f800000u); }
template <> XE_DEVICE double infinity<double>() { return static_cast<double>(infinity<float>()); }
template <class A> XE_DEVICE A largest();
template <> XE_DEVICE float largest<float>() { return 3.40282347e38f; }
template <> XE_DEVICE double largest<double>() { return 1.7976931348623157e308; }
// The larger of two, the first of which is not NaN; a NaN is ignored.
XE_DEVICE float larger(float m, float x) { return fmaxf(m, x); }
XE_DEVICE double larger(double m, double x) { return x > m ? x : m; }
template <class A> XE_DEVICE A not_a_number() { return static_cast<A>(bits_float(0x7fc00000u)); }

// nothing(): all -inf, which stands in for logits that do not exist.
template <class T> struct Vector {  // 16-bit logits, two per 32-bit word
    static constexpr int SIZE = 8;
    typedef float A;
    static XE_DEVICE u32 minus_infinity(f16) { return 0xfc00fc00u; }
    static XE_DEVICE u32 minus_infinity(bf16) { return 0xff80ff80u; }
    static XE_DEVICE uint4 nothing() {
        const u32 w = minus_infinity(T());
        return make_uint4(w, w, w, w);
    }
    static XE_DEVICE void unpack(uint4 v, A (&x)[SIZE]) {
        x[0] = low2<T>(v.x), x[1] = high2<T>(v.x), x[2] = low2<T>(v.y), x[3] = high2<T>(v.y);
        x[4] = low2<T>(v.z), x[5] = high2<T>(v.z), x[6] = low2<T>(v.w), x[7] = high2<T>(v.w);
    }
    static XE_DEVICE uint4 pack(const A (&x)[SIZE]) {
        const T t = T();
        return make_uint4(pack2(x[0], x[1], t), pack2(x[2], x[3], t), pack2(x[4], x[5], t), pack2(x[6], x[7], t));
    }
    template <int K> static XE_DEVICE A largest(const uint4 (&v)[K]) {
        u32 m = v[0].x;
#pragma unroll
        for (int j = 0; j < K; ++j) {
            m = max2(m, max2(max2(v[j].x, v[j].y, T()), max2(v[j].z, v[j].w, T()), T()), T());
        }
        return max_acc(low2<T>(m), high2<T>(m));
    }
};

template <> struct Vector<float> {
    static constexpr int SIZE = 4;
    typedef float A;
    static XE_DEVICE uint4 nothing() { return make_uint4(0xff800000u, 0xff800000u, 0xff800000u, 0xff800000u); }
    static XE_DEVICE void unpack(uint4 v, A (&x)[SIZE]) {
        x[0] = bits_float(v.x), x[1] = bits_float(v.y), x[2] = bits_float(v.z), x[3] = bits_float(v.w);
    }
    static XE_DEVICE uint4 pack(const A (&x)[SIZE]) {
        return make_uint4(float_bits(x[0]), float_bits(x[1]), float_bits(x[2]), float_bits(x[3]));
    }
    template <int K> static XE_DEVICE A largest(const uint4 (&v)[K]) {
        A m = bits_float(v[0].x);
#pragma unroll
        for (int j = 0; j < K; ++j) {
            A x[SIZE];
            unpack(v[j], x);
            m = max_acc(m, max_acc(max_acc(x[0], x[1]), max_acc(x[2], x[3])));
        }
        return m;
    }
};

template <> struct Vector<double> {
    static constexpr int SIZE = 2;
    typedef double A;
    union Bits { uint4 v; double x[2]; };
    static XE_DEVICE uint4 nothing() { return make_uint4(0, 0xfff00000u, 0, 0xfff00000u); }
    static XE_DEVICE void unpack(uint4 v, A (&x)[SIZE]) { Bits b; b.v = v; x[0] = b.x[0], x[1] = b.x[1]; }
    static XE_DEVICE uint4 pack(const A (&x)[SIZE]) { Bits b; b.x[0] = x[0], b.x[1] = x[1]; return b.v; }
    template <int K> static XE_DEVICE A largest(const uint4 (&v)[K]) {
        A m = -infinity<A>();
#pragma unroll
        for (int j = 0; j < K; ++j) {
            A x[SIZE];
            unpack(v[j], x);
            m = larger(larger(m, x[0]), x[1]);
        }
        return m;
    }
};

// Loads the N numbers of `x` from a 16-byte aligned address.
template <int N> XE_DEVICE void load_accs(const float* from, float (&x)[N]) {
#pragma unroll
    for (int i = 0; i < N; i += 4) {
        const uint4 v = ld16(from + i);
        x[i] = bits_float(v.x), x[i + 1] = bits_float(v.y), x[i + 2] = bits_float(v.z), x[i + 3] = bits_float(v.w);
    }
}
template <int N> XE_DEVICE void load_accs(const double* from, double (&x)[N]) {
    double v[2];
#pragma unroll
    for (int i = 0; i < N; i += 2) {
        Vector<double>::unpack(ld16(from + i), v);
        x[i] = v[0], x[i + 1] = v[1];
    }
}
template <int N> XE_DEVICE void load_accs(const float* from, double (&x)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = from[i];
}

// Peeling: a contiguous range as head, 16-byte vectors and tail; `whole`: it is known to have neither head nor tail.
template <class T> struct Cut {
    int head, vectors, tail;  // elements, vectors, elements
    XE_DEVICE Cut(const T* x, int count, bool whole) : head(0), tail(0) {
        vectors = static_cast<int>(static_cast<u32>(count) / Vector<T>::SIZE);
        if (whole) return;
        const int before = static_cast<int>((16 - (reinterpret_cast<u64>(x) & 15)) & 15) / static_cast<int>(sizeof(T));
        head = before < count ? before : count;
        vectors = static_cast<int>(static_cast<u32>(count - head) / Vector<T>::SIZE);
        tail = count - head - vectors * Vector<T>::SIZE;
    }
};
