// Split-KV attention for short queries: single tokens, drafts, small trees. sm_80 and later; decode_wide.cu takes
// more rows on Hopper. Knows pages, masks, warps. It must not know layers or who shares a page.
//
// The work is a row of units: requests in order, their tiles of 16 rows, their KV heads, and along each of these
// items its keys. Every block takes an equal stretch of that row (as Osama et al., "Stream-K", 2301.03598, do for
// matrix products), so that all of the machine reads memory until the end, whatever the lengths. An item that lies in
// one block is finished there; of one that is cut, each block leaves a partial sum in the workspace (Dao et al.,
// "Flash-Decoding", 2023), and the block that comes last adds them up in the order of the keys: the result does not
// depend on who came last (split.cuh).
//
// Inside a block each warp goes its own way: it copies KEYS keys and values at a time into a ring of its own
// (cp.async), across the borders of items, and meets the other warps only at the end of an item. All rows of a tile
// (query heads that share the KV head, times tokens) are rows of each warp's mma.sync products.
//
// Defines: HALF (fp16, otherwise bf16), HEAD_DIM, KEYS (of a warp's step), STAGES, WARPS, BLOCKS (an SM), WHOLE_FROM (tiles
// of a share from which it may grow to whole items; 0: never).

#include "split.cuh"

constexpr int ROWS = 16;
constexpr int THREADS = 32 * WARPS;
constexpr int TILE = KEYS * WARPS;                 // keys that a block takes in one step
constexpr int CHUNKS = HEAD_DIM / 8;               // 16-byte pieces of a row of keys
constexpr int STEPS = HEAD_DIM / 16;
constexpr int ROW_BYTES = HEAD_DIM * 2;
constexpr int STAGE_BYTES = 2 * KEYS * ROW_BYTES;  // keys, then values
constexpr int PAIRS = WARPS / 2;                   // of warps whose sums are added first
constexpr int SUM_STRIDE = HEAD_DIM + 8;           // floats; the 8 keep rows in different banks
constexpr bool QUERY_SHARED = HEAD_DIM > 128;      // queries lie in shared memory: sums take the registers

__device__ __forceinline__ u32 shared_address(const void* pointer) {
  return static_cast<u32>(__cvta_generic_to_shared(pointer));
}

// A policy for the L2 cache: what is read once goes first.
__device__ __forceinline__ u64 read_once() {
  u64 policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

// 16 bytes into shared memory past the registers; zeros if they are not real, and then nothing is read.
__device__ __forceinline__ void copy16(u32 to, const void* from, bool real, u64 policy) {
  asm volatile("cp.async.cg.shared.global.L2::cache_hint.L2::128B [%0], [%1], 16, %2, %3;" ::"r"(to), "l"(from),
               "r"(real ? 16 : 0), "l"(policy)
               : "memory");
}

__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int PENDING>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

__device__ __forceinline__ void load_matrices(u32 (&to)[4], u32 from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(from)
               : "memory");
}

__device__ __forceinline__ void load_matrices_turned(u32 (&to)[4], u32 from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(from)
               : "memory");
}

__device__ __forceinline__ void multiply(float (&sum)[4], const u32 (&a)[4], u32 b0, u32 b1) {
#if HALF
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
#else
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
#endif
      "{%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Where chunk c of row r lies in its row, so that eight rows' chunks of one column lie in different banks.
__device__ __forceinline__ int turned(int row, int chunk) {
  return chunk ^ (ROW_BYTES % 128 == 0 ? row & 7 : (row >> 1) & 3);
}

// A warp's stages of keys and values.
struct Ring {
  u32 base;
  u64 policy;
  int warp, lane;

  // Copies what this warp takes of the cursor's tile into a stage.
  __device__ __forceinline__ void load(const Call& call, const Cursor& at, const int (&pages)[KEYS / 16],
                                       int stage) const {
    const int key = at.tile * TILE + warp * KEYS, stride = 2 * int(call.slot_stride);
    const u32 keys = base + stage * STAGE_BYTES, values = keys + KEYS * ROW_BYTES;
#pragma unroll
    for (int part = 0; part < KEYS / 16; ++part) {
      const int begin = key + 16 * part;
      const i64 offset = at.offset_of(call, pages[part], begin);
      const char* from_k = static_cast<const char*>(call.k) + 2 * offset;
      const char* from_v = static_cast<const char*>(call.v) + 2 * offset;
      const bool inside = begin >= at.low && begin + 16 <= at.high;
#pragma unroll
      for (int step = 0; step < CHUNKS / 2; ++step) {
        const int index = step * 32 + lane, row = index / CHUNKS, chunk = index % CHUNKS;
        const bool real = inside || (begin + row >= at.low && begin + row < at.high);
        const u32 to = (16 * part + row) * ROW_BYTES + 16 * turned(row, chunk);
        copy16(keys + to, from_k + (row * stride + 16 * chunk), real, policy);
        copy16(values + to, from_v + (row * stride + 16 * chunk), real, policy);
      }
    }
  }

  // The pages of the cursor's tile. A page is a multiple of 16 keys, so that 16 keys lie in one.
  __device__ __forceinline__ void look_up(const Call& call, const Cursor& at, int (&pages)[KEYS / 16]) const {
    const int key = at.tile * TILE + warp * KEYS;
#pragma unroll
    for (int part = 0; part < KEYS / 16; ++part) pages[part] = at.page_of(call, key + 16 * part, 16);
  }
};


extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) decode(CALL_PARAMETERS) {
  const Call call = CALL_OF_PARAMETERS;
  extern __shared__ __align__(1024) char shared[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  float* const sums = reinterpret_cast<float*>(shared + WARPS * STAGES * STAGE_BYTES);  // [PAIRS][8][SUM_STRIDE]
  float2* const ends = reinterpret_cast<float2*>(sums + PAIRS * 8 * SUM_STRIDE);       // [WARPS][ROWS] peak, total
  const u32 queries = shared_address(ends + WARPS * ROWS);                             // [ROWS][HEAD_DIM], turned
  __shared__ Plan plan;

  after_predecessor();
  Cursor work;
  const Deal deal = begin_work<ROWS, TILE, THREADS, WHOLE_FROM>(call, work, plan);
  if (work.done()) return;
  const Ring ring = {shared_address(shared) + warp * STAGES * STAGE_BYTES, read_once(), warp, lane};
  Cursor issue = work;
  int pages[KEYS / 16];
  auto ask_queries = [&] {  // they come from afar, too
    const int row = issue.row_tile * ROWS + lane;
    if (lane < ROWS && row < issue.rows * call.group)
      for (int dim = 0; dim < HEAD_DIM; dim += 64) prefetch(issue.query_at(call, row) + dim);
  };
  issue.settle<ROWS, TILE>(call);
  ask_queries();
  if (!issue.done()) ring.look_up(call, issue, pages);

  int ahead = 0, free = 0, stage = 0;  // steps issued before the first is used; stages to fill and to use next
  // Queries as the first operand: rows lane / 4 (+ 8), two neighbouring dims at 2 (lane % 4) (+ 8).
  u32 query[QUERY_SHARED ? 1 : STEPS][4] = {};
  for (; !work.done(); work.next<ROWS, TILE>(call)) {
    float peak[2] = {-INFINITY, -INFINITY}, total[2] = {}, sum[2 * STEPS][4] = {};

    for (bool fresh = true;;) {
      if (ahead == STAGES - 1) {
        if (work.tile >= work.stop) break;
        if (fresh) {
          if constexpr (QUERY_SHARED) {
            for (int index = threadIdx.x; index < ROWS * CHUNKS; index += THREADS) {
              const int row = index / CHUNKS, chunk = index % CHUNKS, whole = work.row_tile * ROWS + row;
              const bool live = whole < work.rows * call.group;
              copy16(queries + row * ROW_BYTES + 16 * turned(row, chunk),
                     work.query_at(call, live ? whole : 0) + 8 * chunk, live, ring.policy);
            }
            commit_copies();
            wait_copies<0>();
            __syncthreads();
          } else {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              const int row = work.row_tile * ROWS + 8 * half + lane / 4;
              const bool live = row < work.rows * call.group;
              const u16* from = work.query_at(call, live ? row : 0) + 2 * (lane % 4);
#pragma unroll
              for (int step = 0; step < STEPS; ++step) {
                query[step][half] = live ? *reinterpret_cast<const u32*>(from + 16 * step) : 0;
                query[step][half + 2] = live ? *reinterpret_cast<const u32*>(from + 16 * step + 8) : 0;
              }
            }
          }
          fresh = false;
        }
        wait_copies<STAGES - 2>();
        __syncwarp();
      }
      if (!issue.done()) {
        ring.load(call, issue, pages, free);
        ++issue.tile;
        const int item = issue.start;
        issue.settle<ROWS, TILE>(call);
        if (issue.start != item) ask_queries();
        // The next tile's page is asked for one step before it is needed.
        if (!issue.done()) ring.look_up(call, issue, pages);
      }
      commit_copies();
      free = free + 1 == STAGES ? 0 : free + 1;
      if (ahead < STAGES - 1) {
        ++ahead;
        continue;
      }
      const int key = work.tile * TILE + warp * KEYS;
      const u32 keys = ring.base + stage * STAGE_BYTES, values = keys + KEYS * ROW_BYTES;
      ++work.tile;
      stage = stage + 1 == STAGES ? 0 : stage + 1;
      if (key >= work.high || key + KEYS <= work.low) continue;

      float score[KEYS / 8][4] = {};
      {
        const int row = (lane & 7) + ((lane >> 4) << 3), turn = turned(row, (lane >> 3) & 1);
        const int query_row = lane & 15, query_turn = turned(query_row, lane >> 4);
#pragma unroll
        for (int step = 0; step < STEPS; ++step) {
          u32 a[4];
          if constexpr (QUERY_SHARED) {
            load_matrices(a, queries + query_row * ROW_BYTES + 16 * ((2 * step) ^ query_turn));
          } else {
#pragma unroll
            for (int i = 0; i < 4; ++i) a[i] = query[step][i];
          }
#pragma unroll
          for (int part = 0; part < KEYS / 16; ++part) {
            u32 b[4];
            load_matrices(b, keys + (16 * part + row) * ROW_BYTES + 16 * ((2 * step) ^ turn));
            multiply(score[2 * part], a, b[0], b[1]);
            multiply(score[2 * part + 1], a, b[2], b[3]);
          }
        }
      }

      float factor = call.scale;
      if (call.softcap > 0) {
        factor = 1;
#pragma unroll
        for (int n = 0; n < KEYS / 8; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) score[n][i] = call.capped(score[n][i]);
      }
      if (key + KEYS > work.all_until || key < work.all_from) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const Sight sight(call, work, work.row_tile * ROWS + 8 * half + lane / 4);
          const u64 seen = sight.seen(key) >> 2 * (lane % 4);
#pragma unroll
          for (int n = 0; n < KEYS / 8; ++n)
#pragma unroll
            for (int i = 0; i < 2; ++i)
              if (!(seen >> (8 * n + i) & 1)) score[n][2 * half + i] = -INFINITY;
        }
      }

      bool moved = false;
      float shrink[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float top = -INFINITY;
#pragma unroll
        for (int n = 0; n < KEYS / 8; ++n) top = fmaxf(top, fmaxf(score[n][2 * half], score[n][2 * half + 1]));
        top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
        top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
        top = fmaxf(peak[half], top * factor);
        // A row that has seen nothing has no finite peak: -inf - -inf would be NaN.
        const float level = top == -INFINITY ? 0 : top;
        shrink[half] = exp2_fast(peak[half] - level);
        moved |= top != peak[half];
        peak[half] = top;
        float part = 0;
#pragma unroll
        for (int n = 0; n < KEYS / 8; ++n)
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            float& one = score[n][2 * half + i];
            one = exp2_fast(fmaf(one, factor, -level));
            part += one;
          }
        total[half] = total[half] * shrink[half] + part;
      }
      // Peaks rarely move once a few tiles are done.
      if (__any_sync(~0u, moved)) {
#pragma unroll
        for (int n = 0; n < 2 * STEPS; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) sum[n][i] *= shrink[i / 2];
      }

      const int row = lane & 15, turn = turned(row, lane >> 4);
#pragma unroll
      for (int part = 0; part < KEYS / 16; ++part) {
        u32 weight[4];
#pragma unroll
        for (int i = 0; i < 4; ++i)
          weight[i] = packed(score[2 * part + i / 2][2 * (i % 2)], score[2 * part + i / 2][2 * (i % 2) + 1]);
#pragma unroll
        for (int step = 0; step < STEPS; ++step) {
          u32 b[4];
          load_matrices_turned(b, values + (16 * part + row) * ROW_BYTES + 16 * ((2 * step) ^ turn));
          multiply(sum[2 * step], weight, b[0], b[1]);
          multiply(sum[2 * step + 1], weight, b[2], b[3]);
        }
      }
    }

    // The warps' sums become the block's: first peaks and totals, then eight rows at a time.
    const Target target(call, work, deal);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      total[half] += __shfl_xor_sync(~0u, total[half], 1);
      total[half] += __shfl_xor_sync(~0u, total[half], 2);
      if (lane % 4 == 0) ends[warp * ROWS + 8 * half + lane / 4] = make_float2(peak[half], total[half]);
    }
    __syncthreads();
    const int live = min(ROWS, work.rows * call.group - work.row_tile * ROWS);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (8 * half >= live) break;
      float level = -INFINITY;
#pragma unroll
      for (int other = 0; other < WARPS; ++other) level = fmaxf(level, ends[other * ROWS + 8 * half + lane / 4].x);
      const float share = level == -INFINITY ? 0 : exp2_fast(peak[half] - level);
      const bool mine = 8 * half + lane / 4 < live;
      float* const place = sums + (warp % PAIRS * 8 + lane / 4) * SUM_STRIDE + 2 * (lane % 4);
      if (warp >= PAIRS && mine) {
#pragma unroll
        for (int n = 0; n < 2 * STEPS; ++n)
          *reinterpret_cast<float2*>(place + 8 * n) =
              make_float2(sum[n][2 * half] * share, sum[n][2 * half + 1] * share);
      }
      __syncthreads();
      if (warp < PAIRS && mine) {
#pragma unroll
        for (int n = 0; n < 2 * STEPS; ++n) {
          float2& both = *reinterpret_cast<float2*>(place + 8 * n);
          both = make_float2(both.x + sum[n][2 * half] * share, both.y + sum[n][2 * half + 1] * share);
        }
      }
      __syncthreads();
      for (int index = threadIdx.x; index < min(8, live - 8 * half) * (HEAD_DIM / 4); index += THREADS) {
        const int row = index / (HEAD_DIM / 4), column = index % (HEAD_DIM / 4) * 4;
        float4 value = *reinterpret_cast<const float4*>(sums + row * SUM_STRIDE + column);
#pragma unroll
        for (int other = 1; other < PAIRS; ++other) {
          const float4 more = *reinterpret_cast<const float4*>(sums + (other * 8 + row) * SUM_STRIDE + column);
          value = make_float4(value.x + more.x, value.y + more.y, value.z + more.z, value.w + more.w);
        }
        float top = -INFINITY, whole = 0;
#pragma unroll
        for (int other = 0; other < WARPS; ++other) top = fmaxf(top, ends[other * ROWS + 8 * half + row].x);
#pragma unroll
        for (int other = 0; other < WARPS; ++other) {
          const float2 end = ends[other * ROWS + 8 * half + row];
          whole += end.x == -INFINITY ? 0 : end.y * exp2_fast(end.x - top);
        }
        target.put<ROWS>(call, work, 8 * half + row, column, value, top, whole);
      }
      __syncthreads();
    }
    if (target.pieces > 1 && came_last<ROWS>(call, work, target, plan)) {
      for (int row = warp; row < live; row += WARPS) target.add_up<ROWS>(call, work, row);
    }
  }
}
