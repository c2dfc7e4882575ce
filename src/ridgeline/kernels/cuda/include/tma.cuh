// The copy engine of Hopper (TMA): boxes of a tensor into shared memory, completing on an mbarrier.
//
// Knows: PTX of cp.async.bulk.tensor and of cache policies. Must not know: what the tensors are.
// A TensorMap is made on the host (nvrtc.tensor_map) and passed as `const __grid_constant__ TensorMap`.
// Coordinates run from the innermost dimension outwards; what lies outside of the tensor arrives as zeros, and
// counts as bytes all the same. Destinations of boxes with a swizzle of 128 bytes are multiples of 1024.
#pragma once

struct alignas(64) TensorMap {
    char bytes[128];
};

__device__ __forceinline__ void prefetch_map(const TensorMap& map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// How long the L2 cache should keep what is copied.
__device__ __forceinline__ unsigned long long keep_first() {
    unsigned long long policy;
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

__device__ __forceinline__ unsigned long long keep_last() {
    unsigned long long policy;
    asm volatile("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

__device__ __forceinline__ void copy_box(
    const TensorMap& map, unsigned to, unsigned barrier, unsigned long long policy, int x, int y, int z) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
        " [%0], [%1, {%3, %4, %5}], [%2], %6;" ::"r"(to),
        "l"(&map), "r"(barrier), "r"(x), "r"(y), "r"(z), "l"(policy)
        : "memory");
}

__device__ __forceinline__ void copy_box(
    const TensorMap& map, unsigned to, unsigned barrier, unsigned long long policy, int x, int y, int z, int w) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
        " [%0], [%1, {%3, %4, %5, %6}], [%2], %7;" ::"r"(to),
        "l"(&map), "r"(barrier), "r"(x), "r"(y), "r"(z), "r"(w), "l"(policy)
        : "memory");
}

// To every block of the cluster whose bit is set in `blocks`, at the same place and on the same barrier of each.
__device__ __forceinline__ void copy_box_to(
    unsigned short blocks, const TensorMap& map, unsigned to, unsigned barrier, unsigned long long policy, int x, int y,
    int z) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster.L2::cache_hint"
        " [%0], [%1, {%3, %4, %5}], [%2], %6, %7;" ::"r"(to),
        "l"(&map), "r"(barrier), "r"(x), "r"(y), "r"(z), "h"(blocks), "l"(policy)
        : "memory");
}

__device__ __forceinline__ void copy_box_to(
    unsigned short blocks, const TensorMap& map, unsigned to, unsigned barrier, unsigned long long policy, int x, int y,
    int z, int w) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster.L2::cache_hint"
        " [%0], [%1, {%3, %4, %5, %6}], [%2], %7, %8;" ::"r"(to),
        "l"(&map), "r"(barrier), "r"(x), "r"(y), "r"(z), "r"(w), "h"(blocks), "l"(policy)
        : "memory");
}

// Ordinary stores to shared memory become visible to the copy engine and the tensor cores.
__device__ __forceinline__ void proxy_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
