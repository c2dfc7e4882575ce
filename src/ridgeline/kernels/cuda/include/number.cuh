// Numbers: 16-bit formats packed in pairs, and the few functions of fp32 that attention needs.
//
// BF16 (a define) says which 16-bit format a file is compiled for: 1 bfloat16, 0 float16. Nothing here needs a
// header of CUDA: conversions are PTX.
#pragma once

typedef unsigned short word16;  // 16 bits in memory: bfloat16 or float16
typedef unsigned int word32;
typedef long long int64;

constexpr float LOG2_E = 1.4426950408889634f;
constexpr float LN_2 = 0.6931471805599453f;

__device__ __forceinline__ float infinity() { return __int_as_float(0x7f800000); }

__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float log2_fast(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// tanh to about 1e-6 (tanh.approx is good to 5e-4, which a cap of 50 would make 0.025 of a score).
__device__ __forceinline__ float tanh_exact(float x) {
    return 1.0f - 2.0f * reciprocal(exp2_fast(2.0f * LOG2_E * x) + 1.0f);
}

// Two numbers rounded to the 16-bit format; `low` lies first in memory.
__device__ __forceinline__ word32 pack(float low, float high) {
    word32 pair;
#if BF16
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
#else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
#endif
    return pair;
}

// The two numbers of a pair.
__device__ __forceinline__ float2 unpack(word32 pair) {
#if BF16
    return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
#else
    float low, high;
    asm("{.reg .f16 a, b; mov.b32 {a, b}, %2; cvt.f32.f16 %0, a; cvt.f32.f16 %1, b;}"
        : "=f"(low), "=f"(high)
        : "r"(pair));
    return make_float2(low, high);
#endif
}
