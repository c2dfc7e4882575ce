// Two attentions of the same queries, over disjoint sets of keys, become one (cascade attention over a shared prefix;
// Ye et al., "Cascade Inference", 2024): o = (o1 e^l1 + o2 e^l2) / (e^l1 + e^l2), l = log(e^l1 + e^l2).
//
// A warp a row of HEAD_DIM dims. A side that saw nothing (-inf) is not even multiplied. Define: HALF (fp16, otherwise
// bf16), HEAD_DIM.

using u16 = unsigned short;
using u32 = unsigned int;

__device__ __forceinline__ float2 unpacked(u32 pair) {
#if HALF
  float low, high;
  asm("{.reg .f16 a, b; mov.b32 {a, b}, %2; cvt.f32.f16 %0, a; cvt.f32.f16 %1, b;}"
      : "=f"(low), "=f"(high)
      : "r"(pair));
  return make_float2(low, high);
#else
  return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
#endif
}

__device__ __forceinline__ u32 packed(float low, float high) {
  u32 both;
#if HALF
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
#else
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
#endif
  return both;
}

extern "C" __global__ void __launch_bounds__(256)
    merge(const u32* first, const float* first_log, const u32* second, const float* second_log, u32* out, float* log,
          long long rows) {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
  const long long row = blockIdx.x * 8ll + threadIdx.x / 32;
  if (row >= rows) return;
  const float none = __int_as_float(0xff800000), a = first_log[row], b = second_log[row], top = fmaxf(a, b);
  const float mine = a == none ? 0 : expf(a - top), theirs = b == none ? 0 : expf(b - top), total = mine + theirs;
  const float one = mine == 0 ? 0 : mine / total, other = theirs == 0 ? 0 : theirs / total;
#pragma unroll
  for (int at = threadIdx.x % 32; at < HEAD_DIM / 2; at += 32) {
    const long long place = row * (HEAD_DIM / 2) + at;
    const float2 x = unpacked(first[place]), y = unpacked(second[place]);
    float2 sum = make_float2(0, 0);
    if (one > 0) sum = make_float2(one * x.x, one * x.y);
    if (other > 0) sum = make_float2(fmaf(other, y.x, sum.x), fmaf(other, y.y, sum.y));
    out[place] = packed(sum.x, sum.y);
  }
  if (threadIdx.x % 32 == 0) log[row] = top == none ? none : top + logf(total);
}
