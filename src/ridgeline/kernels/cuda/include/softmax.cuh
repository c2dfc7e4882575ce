// Online softmax of rows that lie as mma.sync leaves them: a row's scores are spread over four neighbouring lanes.
//
// (Milakov and Gimelshein 2018; Dao, "FlashAttention-2".) A row's state is its peak and the sum of exponentials seen
// so far, in units where exp becomes exp2: p = exp2(factor * (score - peak)). The sum stays a lane's own until the end.
#pragma once
#include "number.cuh"

__device__ __forceinline__ float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

__device__ __forceinline__ float quad_sum(float x) {
    x += __shfl_xor_sync(0xffffffffu, x, 1);
    return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

// The end of a row: what its sums of values are multiplied by, and the natural logarithm of its sum of exponentials.
struct Total {
    float scale, lse;
};

// peak: of raw scores (-infinity if the row has seen nothing); sum: reduced over the quad; sink: a logit that takes
// part in the denominator alone, or -infinity.
__device__ __forceinline__ Total finish(float peak, float sum, float factor, float sink) {
    float top = fmaxf(peak * factor, sink * LOG2_E);
    if (top == -infinity()) return {0.0f, -infinity()};
    float shrink = exp2_fast(peak * factor - top);
    float total = sum * shrink + exp2_fast(sink * LOG2_E - top);
    return {shrink / total, (top + log2_fast(total)) * LN_2};
}
