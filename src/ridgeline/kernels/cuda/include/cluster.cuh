// Shared memory of the other blocks of a cluster, read from afar.
//
// Knows: PTX of mapa and of loads from a cluster's shared memory. Must not know: what lies there.
// The address is that of the same place in this block. Who reads must have acquired at cluster scope what the other
// block released (mbarrier.cuh), and the other block must stay until it is told that it was read.
#pragma once

__device__ __forceinline__ unsigned address_in(unsigned block, unsigned address) {
    unsigned remote;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(block));
    return remote;
}

__device__ __forceinline__ float4 load_four(unsigned remote) {
    float4 four;
    asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(four.x), "=f"(four.y), "=f"(four.z), "=f"(four.w)
                 : "r"(remote)
                 : "memory");
    return four;
}

__device__ __forceinline__ float2 load_two(unsigned remote) {
    float2 two;
    asm volatile("ld.shared::cluster.v2.f32 {%0, %1}, [%2];" : "=f"(two.x), "=f"(two.y) : "r"(remote) : "memory");
    return two;
}
