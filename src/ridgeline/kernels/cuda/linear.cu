// activation(x W^T + bias) for 2 to 32 tokens, where only the weight's bytes matter. sm_80 and later. Knows dense
// weights. It must not know which layer they are of.
//
// What a lane loads is what it multiplies: no data goes from one lane to another, so nothing waits for a barrier and a
// warp waits for its own loads alone. Tokens are the left operand of mma.sync and 8 rows of the weight the right one,
// whose two registers lie side by side in what a lane has loaded; the left one's four would have to be put together.
//
// A sum over inputs may run in any order as long as both operands keep to it. So the 16 inputs of a product are not 16
// neighbours: with t = lane % 4, a lane takes the 8 inputs at 8 t of each 32, 16 bytes of a row in one load, and they
// are its fragments of two products. Product s (0, 1) has the inputs 8 t + 4 s + {0, 1} where its operands say
// 2 t + {0, 1}, and 8 t + 4 s + {2, 3} where they say 2 t + 8 + {0, 1}. Tokens are loaded in just the same way.
//
// A block takes ROWS rows. Its warps, and those of the other blocks of its cluster, deal the inputs out in runs of
// DEPTH steps of 32, and a warp always has DEPTH steps under way: in registers, or (RING) in places of its own in
// shared memory, where each lane finds what it asked for. There the oldest copy can be waited for by itself; of
// registers the assembler waits for all that are under way, so a run of steps is used and asked for at once. The
// warps' sums meet at the end, in the order of warps and of blocks: equal calls give equal bits.
//
// Defines: BF16 (otherwise fp16), EIGHTS (of 8 tokens: 1, 2, 4), ROWS (a multiple of 8), WARPS, DEPTH, RING, BLOCKS (an
// SM), EARLY (whether the next kernel may come at this one's start, or when its products are done).

#include "tile.cuh"

constexpr int STEP = 32, RUN = DEPTH * STEP;
constexpr int THREADS = 32 * WARPS, TOKENS = 8 * EIGHTS;
constexpr int TILES = (EIGHTS + 1) / 2, STRIPES = ROWS / 8;  // of 16 tokens, of 8 rows
constexpr int STRIDE = ROWS + 8;  // floats of a token's sums: the 8 put half a warp's pairs into different banks
constexpr int PIECE = 16 * 32;    // bytes that a warp loads at once

// A policy for the L2 cache: weights are read once a step of the model, and go first.
__device__ __forceinline__ unsigned long long read_once() {
  unsigned long long policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

// 16 bytes into registers; zeros if they are not real, and then nothing is read. Weights go past the L1 cache, where x
// lies. Not .nc: the assembler takes such loads for free to move, and moves the first ones behind the wait for the
// predecessor.
__device__ __forceinline__ void load_weight(word32 (&to)[4], const word16* from, bool real, unsigned long long policy) {
  asm volatile(
      "{\n"
      ".reg .pred real;\n"
      "setp.ne.b32 real, %5, 0;\n"
      "mov.b32 %0, 0;\nmov.b32 %1, 0;\nmov.b32 %2, 0;\nmov.b32 %3, 0;\n"
      "@real ld.global.L1::no_allocate.L2::cache_hint.L2::256B.v4.b32 {%0, %1, %2, %3}, [%4], %6;\n"
      "}"
      : "=&r"(to[0]), "=&r"(to[1]), "=&r"(to[2]), "=&r"(to[3])
      : "l"(from), "r"(int(real)), "l"(policy)
      : "memory");
}

__device__ __forceinline__ void load_tokens(word32 (&to)[4], const word16* from, bool real) {
  asm volatile(
      "{\n"
      ".reg .pred real;\n"
      "setp.ne.b32 real, %5, 0;\n"
      "mov.b32 %0, 0;\nmov.b32 %1, 0;\nmov.b32 %2, 0;\nmov.b32 %3, 0;\n"
      "@real ld.global.v4.b32 {%0, %1, %2, %3}, [%4];\n"
      "}"
      : "=&r"(to[0]), "=&r"(to[1]), "=&r"(to[2]), "=&r"(to[3])
      : "l"(from), "r"(int(real))
      : "memory");
}

// The same into shared memory, from where `take` has them once they have arrived.
__device__ __forceinline__ void copy_weight(word32 to, const word16* from, bool real, unsigned long long policy) {
  asm volatile("cp.async.cg.shared.global.L2::cache_hint.L2::256B [%0], [%1], 16, %2, %3;" ::"r"(to), "l"(from),
               "r"(real ? 16 : 0), "l"(policy)
               : "memory");
}

__device__ __forceinline__ void copy_tokens(word32 to, const word16* from, bool real) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(real ? 16 : 0) : "memory");
}

__device__ __forceinline__ void take(word32 (&to)[4], word32 from) {
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(from)
               : "memory");
}

// A lane's steps under way: each is 16 bytes of STRIPES rows of the weight and of EIGHTS tokens. A step that has been
// taken is free to be asked for again.
struct Held {
#if RING
  word32 base;  // of the warp's places, this lane's 16 bytes of each

  __device__ __forceinline__ explicit Held(void* shared) {
    base = shared_address(shared) + threadIdx.x / 32 * DEPTH * (STRIPES + EIGHTS) * PIECE + threadIdx.x % 32 * 16;
  }
  __device__ __forceinline__ word32 place(int step, int part) const {
    return base + (step * (STRIPES + EIGHTS) + part) * PIECE;
  }
  __device__ __forceinline__ void ask_weight(int step, int stripe, const word16* from, bool real,
                                             unsigned long long policy) {
    copy_weight(place(step, stripe), from, real, policy);
  }
  __device__ __forceinline__ void ask_tokens(int step, int eight, const word16* from, bool real) {
    copy_tokens(place(step, STRIPES + eight), from, real);
  }
  __device__ __forceinline__ void asked() { copy_commit(); }
  __device__ __forceinline__ void take_step(int step, word32 (&weights)[STRIPES][4], word32 (&tokens)[EIGHTS][4]) {
    copy_wait<DEPTH - 1>();
#pragma unroll
    for (int eight = 0; eight < EIGHTS; ++eight) take(tokens[eight], place(step, STRIPES + eight));
#pragma unroll
    for (int stripe = 0; stripe < STRIPES; ++stripe) take(weights[stripe], place(step, stripe));
  }
  __device__ __forceinline__ void finish() {
    copy_wait<0>();
    __syncthreads();  // the sums take the ring's place
  }
#else
  word32 weight[DEPTH][STRIPES][4], token[DEPTH][EIGHTS][4];

  __device__ __forceinline__ explicit Held(void*) {}
  __device__ __forceinline__ void ask_weight(int step, int stripe, const word16* from, bool real,
                                             unsigned long long policy) {
    load_weight(weight[step][stripe], from, real, policy);
  }
  __device__ __forceinline__ void ask_tokens(int step, int eight, const word16* from, bool real) {
    load_tokens(token[step][eight], from, real);
  }
  __device__ __forceinline__ void asked() {}
  __device__ __forceinline__ void take_step(int step, word32 (&weights)[STRIPES][4], word32 (&tokens)[EIGHTS][4]) {
#pragma unroll
    for (int part = 0; part < 4; ++part) {
#pragma unroll
      for (int stripe = 0; stripe < STRIPES; ++stripe) weights[stripe][part] = weight[step][stripe][part];
#pragma unroll
      for (int eight = 0; eight < EIGHTS; ++eight) tokens[eight][part] = token[step][eight][part];
    }
  }
  __device__ __forceinline__ void finish() {}
#endif
};

__device__ __forceinline__ void let_next_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

__device__ __forceinline__ void wait_for_predecessor() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The blocks that share this one's rows, each with inputs of its own: which of all clusters it is, and which block.
struct Cluster {
  int number, blocks, rank;

  __device__ __forceinline__ Cluster() : number(blockIdx.x), blocks(1), rank(0) {
#if __CUDA_ARCH__ >= 900
    asm("mov.u32 %0, %%clusterid.x;" : "=r"(number));
    asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(blocks));
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
  }

  __device__ __forceinline__ void sync() const {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
  }

  // What lies at the place of `here` in another block.
  __device__ __forceinline__ float read(const float* here, int block) const {
    float value = *here;
#if __CUDA_ARCH__ >= 900
    asm volatile(
        "{\n"
        ".reg .b32 there;\n"
        "mapa.shared::cluster.u32 there, %1, %2;\n"
        "ld.shared::cluster.f32 %0, [there];\n"
        "}"
        : "=f"(value)
        : "r"(shared_address(here)), "r"(block)
        : "memory");
#endif
    return value;
  }
};

__device__ __forceinline__ float rounded(float value) { return unpack(pack(value, 0.0f)).x; }

// By number (linear.py); as kernels/triton/activation.py has them.
__device__ __forceinline__ float activated(float x, int activation) {
  if (activation == 1) return x / (1.0f + expf(-x));
  if (activation == 2) return x > 0.0f || x != x ? x : 0.0f;
  if (activation == 3) return 0.5f * x * (1.0f + erff(x * 0.7071067811865476f));
  const float z = 0.7978845608028654f * (x + 0.044715f * x * x * x);
  return x / (1.0f + expf(-2.0f * z));
}

struct Output {
  const word16* bias;  // [outputs], or null
  word16* out;         // [tokens, outputs], dense
  int outputs, activation;

  __device__ __forceinline__ void finish(float total, int token, int64 row) const {
    if (row >= outputs) return;
    if (bias) total += unpack(bias[row]).x;
    if (activation) total = activated(rounded(total), activation);
    out[int64(token) * outputs + row] = word16(pack(total, 0.0f));
  }
};

// x: rows of 16-byte pieces, x_stride elements apart. weight: [outputs, width], dense. width: a multiple of 8.
// The grid has a cluster of blocks for each ROWS rows.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    linear_few(const word16* x, const word16* weight, const word16* bias, word16* out, int64 x_stride, int outputs,
               int width, int tokens, int activation) {
  extern __shared__ __align__(16) float sums[];  // [WARPS][TOKENS][STRIDE], and before that the ring
  if (EARLY) let_next_start();
  const Cluster cluster;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = lane / 4, piece = 8 * (lane % 4);
  const int64 first = int64(cluster.number) * ROWS;
  const int stride = cluster.blocks * WARPS * RUN;
  int depth = (cluster.rank * WARPS + warp) * RUN + piece;  // the first of this lane's inputs
  Held held(sums);

  // Rows past the end read the last one instead, and tokens too: what they sum up is dropped.
  const word16* weights[STRIPES];
#pragma unroll
  for (int stripe = 0; stripe < STRIPES; ++stripe)
    weights[stripe] = weight + min(first + 8 * stripe + row, int64(outputs - 1)) * width;
  const unsigned long long policy = read_once();
  auto ask_weights = [&](int step, int at) {
#pragma unroll
    for (int stripe = 0; stripe < STRIPES; ++stripe)
      held.ask_weight(step, stripe, weights[stripe] + at, at < width, policy);
  };
#pragma unroll
  for (int step = 0; step < DEPTH; ++step) ask_weights(step, depth + step * STEP);

  wait_for_predecessor();
  const word16* rows[EIGHTS];
#pragma unroll
  for (int eight = 0; eight < EIGHTS; ++eight) rows[eight] = x + int64(min(8 * eight + row, tokens - 1)) * x_stride;
  auto ask_tokens = [&](int step, int at) {
#pragma unroll
    for (int eight = 0; eight < EIGHTS; ++eight) held.ask_tokens(step, eight, rows[eight] + at, at < width);
    held.asked();
  };
#pragma unroll
  for (int step = 0; step < DEPTH; ++step) ask_tokens(step, depth + step * STEP);

  float total[TILES][STRIPES][4] = {};
  for (; depth - piece < width; depth += stride) {
#pragma unroll
    for (int step = 0; step < DEPTH; ++step) {
      word32 right[STRIPES][4], token[EIGHTS][4];
      held.take_step(step, right, token);
#pragma unroll
      for (int product = 0; product < 2; ++product) {
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile) {
          const word32(&upper)[4] = token[2 * tile];
          word32 left[4] = {upper[2 * product], 0, upper[2 * product + 1], 0};
          if (2 * tile + 1 < EIGHTS) {
            const word32(&lower)[4] = token[(2 * tile + 1) % EIGHTS];
            left[1] = lower[2 * product];
            left[3] = lower[2 * product + 1];
          }
#pragma unroll
          for (int stripe = 0; stripe < STRIPES; ++stripe)
            multiply(total[tile][stripe], left, right[stripe][2 * product], right[stripe][2 * product + 1]);
        }
      }
      ask_weights(step, depth + stride + step * STEP);
      ask_tokens(step, depth + stride + step * STEP);
    }
  }
  held.finish();
  if (!EARLY) let_next_start();

#pragma unroll
  for (int eight = 0; eight < EIGHTS; ++eight)
#pragma unroll
    for (int stripe = 0; stripe < STRIPES; ++stripe) {
      const float(&found)[4] = total[eight / 2][stripe];
      const int token = 8 * eight + row, column = 8 * stripe + piece / 4;
      *reinterpret_cast<float2*>(sums + (warp * TOKENS + token) * STRIDE + column) =
          make_float2(found[eight % 2 * 2], found[eight % 2 * 2 + 1]);
    }
  __syncthreads();

  const Output output = {bias, out, outputs, activation};
  for (int index = threadIdx.x; index < tokens * ROWS; index += THREADS) {
    float* const place = sums + index / ROWS * STRIDE + index % ROWS;
    float sum = place[0];
#pragma unroll
    for (int other = 1; other < WARPS; ++other) sum += place[other * TOKENS * STRIDE];
    if (cluster.blocks == 1)
      output.finish(sum, index / ROWS, first + index % ROWS);
    else
      place[0] = sum;
  }
  if (cluster.blocks == 1) return;
  cluster.sync();
  for (int index = cluster.rank * THREADS + threadIdx.x; index < tokens * ROWS; index += cluster.blocks * THREADS) {
    const float* const place = sums + index / ROWS * STRIDE + index % ROWS;
    float sum = 0.0f;
    for (int block = 0; block < cluster.blocks; ++block) sum += cluster.read(place, block);
    output.finish(sum, index / ROWS, first + index % ROWS);
  }
  cluster.sync();  // no block may be gone while another reads its sums
}
