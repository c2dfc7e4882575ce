// Matrix products of a warpgroup on Hopper's tensor cores (wgmma): D[64, N] += A[64, 16] B[16, N], fp32 sums.
//
// Knows: PTX of wgmma, its descriptors of shared memory, and which thread holds what. Must not know: what is multiplied.
// Compile with HALF=1 for fp16 operands, otherwise they are bf16.
//
// A thread's part of D: with lane = thread % 32 and warp = thread / 32 % 4, d[4 b + 2 r + e] is row
// 16 warp + lane / 4 + 8 r, column 8 b + 2 (lane % 4) + e. Packed in pairs, columns 16 k .. 16 k + 15 of such a
// D are the A operand of a product over those 16: registers 4 k .. 4 k + 3 in the order of d.
//
// Operands in shared memory lie as the copy engine leaves them with a swizzle of 128 bytes: rows of 64 elements,
// 8 of them a pattern of 1024 bytes.
// - K-major (rows are M or N, the 64 elements run along K): the next 16 of K lie 32 bytes on.
// - MN-major (rows are K, the 64 elements run along N): the next 16 of K lie 2048 bytes on, the next 64 of N a whole
//   chunk of rows on.
#pragma once

#if HALF
#define RIDGELINE_OPERAND "f16"
#else
#define RIDGELINE_OPERAND "bf16"
#endif

// For K-major operands.
__device__ __forceinline__ unsigned long long operand_k(unsigned address) {
    return (unsigned long long)((address & 0x3ffff) >> 4) | (1ull << 16) | (64ull << 32) | (1ull << 62);
}

// For MN-major operands; chunk_bytes: from one chunk of 64 columns to the next.
__device__ __forceinline__ unsigned long long operand_mn(unsigned address, unsigned chunk_bytes) {
    return (unsigned long long)((address & 0x3ffff) >> 4) | ((unsigned long long)(chunk_bytes >> 4) << 16) |
           (64ull << 32) | (1ull << 62);
}

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most PENDING committed groups are under way.
template <int PENDING>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// The compiler does not know when asynchronous results arrive: after a wait, nothing computed from these registers
// may move up past this point.
template <int COUNT>
__device__ __forceinline__ void settle(float (&values)[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) asm volatile("" : "+f"(values[i])::"memory");
}

template <int COUNT>
__device__ __forceinline__ void settle(unsigned (&values)[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) asm volatile("" : "+r"(values[i])::"memory");
}

// Two floats as a pair of operands, the first in the low half.
__device__ __forceinline__ unsigned pack(float low, float high) {
    unsigned both;
#if HALF
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
#else
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
#endif
    return both;
}

// The first of such a pair.
__device__ __forceinline__ float lower(unsigned both) {
#if HALF
    float low;
    asm("{\n.reg .f16 a, b;\nmov.b32 {a, b}, %1;\ncvt.f32.f16 %0, a;\n}" : "=f"(low) : "r"(both));
    return low;
#else
    return __uint_as_float(both << 16);
#endif
}

// ss: A (K-major) and B (K-major) in shared memory. rs: A in registers, B (MN-major) in shared memory.
// more = 0 starts from zero instead of adding to d.
template <int N>
struct Wgmma;

// clang-format off
#define RIDGELINE_D8(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define RIDGELINE_NAMES_8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define RIDGELINE_D_8 RIDGELINE_D8(0)
#define RIDGELINE_NAMES_16 RIDGELINE_NAMES_8 ", " "%8, %9, %10, %11, %12, %13, %14, %15"
#define RIDGELINE_D_16 RIDGELINE_D_8, RIDGELINE_D8(8)
#define RIDGELINE_NAMES_24 RIDGELINE_NAMES_16 ", " "%16, %17, %18, %19, %20, %21, %22, %23"
#define RIDGELINE_D_24 RIDGELINE_D_16, RIDGELINE_D8(16)
#define RIDGELINE_NAMES_32 RIDGELINE_NAMES_24 ", " "%24, %25, %26, %27, %28, %29, %30, %31"
#define RIDGELINE_D_32 RIDGELINE_D_24, RIDGELINE_D8(24)
#define RIDGELINE_NAMES_40 RIDGELINE_NAMES_32 ", " "%32, %33, %34, %35, %36, %37, %38, %39"
#define RIDGELINE_D_40 RIDGELINE_D_32, RIDGELINE_D8(32)
#define RIDGELINE_NAMES_48 RIDGELINE_NAMES_40 ", " "%40, %41, %42, %43, %44, %45, %46, %47"
#define RIDGELINE_D_48 RIDGELINE_D_40, RIDGELINE_D8(40)
#define RIDGELINE_NAMES_56 RIDGELINE_NAMES_48 ", " "%48, %49, %50, %51, %52, %53, %54, %55"
#define RIDGELINE_D_56 RIDGELINE_D_48, RIDGELINE_D8(48)
#define RIDGELINE_NAMES_64 RIDGELINE_NAMES_56 ", " "%56, %57, %58, %59, %60, %61, %62, %63"
#define RIDGELINE_D_64 RIDGELINE_D_56, RIDGELINE_D8(56)
#define RIDGELINE_NAMES_72 RIDGELINE_NAMES_64 ", " "%64, %65, %66, %67, %68, %69, %70, %71"
#define RIDGELINE_D_72 RIDGELINE_D_64, RIDGELINE_D8(64)
#define RIDGELINE_NAMES_80 RIDGELINE_NAMES_72 ", " "%72, %73, %74, %75, %76, %77, %78, %79"
#define RIDGELINE_D_80 RIDGELINE_D_72, RIDGELINE_D8(72)
#define RIDGELINE_NAMES_88 RIDGELINE_NAMES_80 ", " "%80, %81, %82, %83, %84, %85, %86, %87"
#define RIDGELINE_D_88 RIDGELINE_D_80, RIDGELINE_D8(80)
#define RIDGELINE_NAMES_96 RIDGELINE_NAMES_88 ", " "%88, %89, %90, %91, %92, %93, %94, %95"
#define RIDGELINE_D_96 RIDGELINE_D_88, RIDGELINE_D8(88)
#define RIDGELINE_NAMES_104 RIDGELINE_NAMES_96 ", " "%96, %97, %98, %99, %100, %101, %102, %103"
#define RIDGELINE_D_104 RIDGELINE_D_96, RIDGELINE_D8(96)
#define RIDGELINE_NAMES_112 RIDGELINE_NAMES_104 ", " "%104, %105, %106, %107, %108, %109, %110, %111"
#define RIDGELINE_D_112 RIDGELINE_D_104, RIDGELINE_D8(104)
#define RIDGELINE_NAMES_120 RIDGELINE_NAMES_112 ", " "%112, %113, %114, %115, %116, %117, %118, %119"
#define RIDGELINE_D_120 RIDGELINE_D_112, RIDGELINE_D8(112)
#define RIDGELINE_NAMES_128 RIDGELINE_NAMES_120 ", " "%120, %121, %122, %123, %124, %125, %126, %127"
#define RIDGELINE_D_128 RIDGELINE_D_120, RIDGELINE_D8(120)

// count: N / 2, the registers of D; n0 .. n5: the numbers that follow, as operands of the instruction are counted.
#define RIDGELINE_WGMMA(n, count, n0, n1, n2, n3, n4, n5)                                                              \
    template <>                                                                                                        \
    struct Wgmma<n> {                                                                                                  \
        static __device__ __forceinline__ void ss(                                                                     \
            float (&d)[count], unsigned long long a, unsigned long long b, int more) {                                 \
            asm volatile(                                                                                              \
                "{\n.reg .pred p;\nsetp.ne.b32 p, %" #n2 ", 0;\n"                                                      \
                "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." RIDGELINE_OPERAND "." RIDGELINE_OPERAND              \
                " {" RIDGELINE_NAMES_##count "}, %" #n0 ", %" #n1 ", p, 1, 1, 0, 0;\n}"                                \
                : RIDGELINE_D_##count                                                                                  \
                : "l"(a), "l"(b), "r"(more));                                                                          \
        }                                                                                                              \
        static __device__ __forceinline__ void rs(                                                                     \
            float (&d)[count], const unsigned* a, unsigned long long b, int more) {                                    \
            asm volatile(                                                                                              \
                "{\n.reg .pred p;\nsetp.ne.b32 p, %" #n5 ", 0;\n"                                                      \
                "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." RIDGELINE_OPERAND "." RIDGELINE_OPERAND              \
                " {" RIDGELINE_NAMES_##count "}, {%" #n0 ", %" #n1 ", %" #n2 ", %" #n3 "}, %" #n4 ", p, 1, 1, 1;\n}"   \
                : RIDGELINE_D_##count                                                                                  \
                : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(more));                                      \
        }                                                                                                              \
    };

RIDGELINE_WGMMA(64, 32, 32, 33, 34, 35, 36, 37)
RIDGELINE_WGMMA(80, 40, 40, 41, 42, 43, 44, 45)
RIDGELINE_WGMMA(96, 48, 48, 49, 50, 51, 52, 53)
RIDGELINE_WGMMA(112, 56, 56, 57, 58, 59, 60, 61)
RIDGELINE_WGMMA(128, 64, 64, 65, 66, 67, 68, 69)
RIDGELINE_WGMMA(144, 72, 72, 73, 74, 75, 76, 77)
RIDGELINE_WGMMA(160, 80, 80, 81, 82, 83, 84, 85)
RIDGELINE_WGMMA(176, 88, 88, 89, 90, 91, 92, 93)
RIDGELINE_WGMMA(192, 96, 96, 97, 98, 99, 100, 101)
RIDGELINE_WGMMA(208, 104, 104, 105, 106, 107, 108, 109)
RIDGELINE_WGMMA(224, 112, 112, 113, 114, 115, 116, 117)
RIDGELINE_WGMMA(240, 120, 120, 121, 122, 123, 124, 125)
RIDGELINE_WGMMA(256, 128, 128, 129, 130, 131, 132, 133)
// clang-format on
