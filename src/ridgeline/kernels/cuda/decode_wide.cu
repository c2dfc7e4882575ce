// Split-KV attention for drafts and token trees: up to 64 or 128 rows (tokens times the query heads of a KV head) of a
// request at once, on Hopper's wgmma. The work is dealt as in decode.cu (split.cuh). It must not know layers or who
// shares a page.
//
// One warp asks the copy engine for tiles of 64 keys and values, across the borders of items; each warpgroup has 64
// rows of its own, whose scores and sums stay in its registers, so that they share nothing but the tiles.
// Partial sums of so many rows are too many for one block to add up: `add_pieces` follows as a second, dependent
// launch with a warp a row.
//
// Defines: HALF (fp16, otherwise bf16), HEAD_DIM, WARPGROUPS (1 or 2), STAGES, BLOCKS (an SM), BOX (keys of a copy).

#include "mbarrier.cuh"
#include "tma.cuh"
#include "wgmma.cuh"

#include "split.cuh"

constexpr int ROWS = 64 * WARPGROUPS;
constexpr int TILE = 64;
constexpr int THREADS = 128 * WARPGROUPS + 32;
constexpr int PANELS = (HEAD_DIM + 63) / 64;      // of 64 dims: 128 bytes a row
constexpr int PANEL_BYTES = TILE * 128;
constexpr int TILE_BYTES = PANELS * PANEL_BYTES;  // keys of a tile; as much again for values
constexpr int QUERY_BYTES = PANELS * 64 * 128;    // of a warpgroup
constexpr int BOXES = 2 * PANELS * (TILE / BOX);

// Queries of one warpgroup's rows into shared memory, as wgmma wants them; zeros where there is no row.
__device__ __forceinline__ void load_queries(const Call& call, const Cursor& at, char* to, int squad) {
  constexpr int COPIES = HEAD_DIM / 16;
  const int thread = threadIdx.x % 128;
  uint4 value[COPIES];  // all of them under way at once
#pragma unroll
  for (int copy = 0; copy < COPIES; ++copy) {
    const int index = copy * 128 + thread, row = index / (HEAD_DIM / 8), piece = index % (HEAD_DIM / 8);
    const int whole = at.row_tile * ROWS + squad * 64 + row;
    const bool live = whole < at.rows * call.group;
    value[copy] = *reinterpret_cast<const uint4*>(at.query_at(call, live ? whole : 0) + 8 * piece);
    if (!live) value[copy] = make_uint4(0, 0, 0, 0);
  }
#pragma unroll
  for (int copy = 0; copy < COPIES; ++copy) {
    const int index = copy * 128 + thread, row = index / (HEAD_DIM / 8), piece = index % (HEAD_DIM / 8);
    *reinterpret_cast<uint4*>(to + piece / 8 * (64 * 128) + row * 128 + ((piece ^ row) % 8) * 16) = value[copy];
  }
}

// Zeros over the values that no row sees: a weight of zero times NaN is NaN.
__device__ __forceinline__ void clear_values(const Cursor& at, char* values, int key) {
  for (int index = threadIdx.x % 128; index < TILE * PANELS * 8; index += 128) {
    const int row = index / 8 % TILE, panel = index / (8 * TILE);
    if (key + row < at.low || key + row >= at.high)
      *reinterpret_cast<uint4*>(values + panel * PANEL_BYTES + row * 128 + index % 8 * 16) = make_uint4(0, 0, 0, 0);
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    decode_wide(CALL_PARAMETERS, const __grid_constant__ TensorMap key_map,
                const __grid_constant__ TensorMap value_map) {
  const Call call = CALL_OF_PARAMETERS;
  extern __shared__ char unaligned[];
  char* const shared = unaligned + (-shared_address(unaligned) & 1023);
  char* const queries = shared;                           // [WARPGROUPS] panels of 64 rows
  char* const tiles = shared + WARPGROUPS * QUERY_BYTES;  // [STAGES] keys, values
  __shared__ Plan plan;
  __shared__ __align__(8) u64 barriers[3 * STAGES];
  const u32 keys_here = shared_address(barriers), values_here = keys_here + 8 * STAGES;
  const u32 empty = values_here + 8 * STAGES;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < STAGES; ++stage) {
      barrier_init(keys_here + 8 * stage, 1);
      barrier_init(values_here + 8 * stage, 1);
      barrier_init(empty + 8 * stage, 4 * WARPGROUPS);
    }
    barrier_init_fence();
    prefetch_map(key_map);
    prefetch_map(value_map);
  }
  after_predecessor();
  Cursor work;
  const Deal deal = begin_work<ROWS, TILE, THREADS>(call, work, plan);
  if (work.done()) return;
  __syncthreads();

  if (warp == 4 * WARPGROUPS) {
    // Lane l brings box l: of keys or values, a panel, a part of the tile.
    const int part = lane % (TILE / BOX), panel = lane / (TILE / BOX) % PANELS;
    const bool of_values = lane >= BOXES / 2;
    const u32 to = shared_address(tiles) + of_values * TILE_BYTES + panel * PANEL_BYTES + part * BOX * 128;
    const u64 policy = keep_first();
    work.settle<ROWS, TILE>(call);
    auto look_up = [&] { return work.done() ? 0 : work.page_of(call, work.tile * TILE + part * BOX, BOX); };
    int page_index = look_up();
    for (unsigned slot = 0, phase = 1; !work.done();) {
      const int key = work.tile * TILE + part * BOX, head = work.head;
      const bool read = key < work.high && key + BOX > work.low;
      const int in_page = key - divided(key, call.page_inverse) * call.page, block = page_index;
      const int row = call.tables ? in_page : call.key_starts[work.request] + key;
      work.step<ROWS, TILE>(call);
      page_index = look_up();  // one tile ahead of its use
      barrier_wait(empty + 8 * slot, phase);
      if (lane == 0) {
        barrier_expect(keys_here + 8 * slot, TILE_BYTES);
        barrier_expect(values_here + 8 * slot, TILE_BYTES);
      }
      __syncwarp();
      // A box that nobody sees is asked for outside of the tensor: it arrives as zeros and reads nothing.
      if (lane < BOXES)
        copy_box(of_values ? value_map : key_map, to + slot * 2 * TILE_BYTES,
                 (of_values ? values_here : keys_here) + 8 * slot, policy, panel * 64, read ? row : -BOX, head, block);
      if (++slot == STAGES) slot = 0, phase ^= 1;
    }
    return;
  }

  const int squad = __shfl_sync(~0u, warp / 4, 0);  // so that the compiler sees that a warp's lanes agree
  const u64 query_operand = operand_k(shared_address(queries) + squad * QUERY_BYTES);
  const u64 first_key_operand = operand_k(shared_address(tiles));
  const u64 first_value_operand = operand_mn(shared_address(tiles) + TILE_BYTES, PANEL_BYTES);
  const int row_of_lane = squad * 64 + warp % 4 * 16 + lane / 4;
  unsigned slot = 0, phase = 0;
  if (WARPGROUPS == 2 && squad == 1) named_arrive(3, 256);  // the first one begins
  for (; !work.done(); work.next<ROWS, TILE>(call)) {
    float peak[2] = {-INFINITY, -INFINITY}, total[2] = {}, sum[HEAD_DIM / 2] = {};
    load_queries(call, work, queries + squad * QUERY_BYTES, squad);
    proxy_fence();
    named_sync(1 + squad, 128);

    // Scores of one tile, then weights; the products with values follow one step behind, so that the tensor cores have
    // them to do while weights are worked out, and warpgroups take turns at them (FlashAttention-3's two overlaps).
    float score[TILE / 2], shrink[2];
    u32 weight[TILE / 4];
    bool moved = false;
    auto multiply_keys = [&](unsigned at) {
#pragma unroll
      for (int step = 0; step < HEAD_DIM / 16; ++step) {  // descriptors count in 16 bytes
        const u64 keys = first_key_operand + (at * 2 * TILE_BYTES + step / 4 * PANEL_BYTES + step % 4 * 32) / 16;
        Wgmma<TILE>::ss(score, query_operand + (step / 4 * (64 * 128) + step % 4 * 32) / 16, keys, step > 0);
      }
      wgmma_commit();
    };
    auto multiply_values = [&](unsigned at) {
#pragma unroll
      for (int step = 0; step < TILE / 16; ++step)
        Wgmma<HEAD_DIM>::rs(sum, weight + 4 * step, first_value_operand + (at * 2 * TILE_BYTES + step * 2048) / 16, 1);
      wgmma_commit();
    };
    auto weigh = [&](int key) {  // scores become weights, in place; peaks and totals move on
      float factor = call.scale;
      if (call.softcap > 0) {
        factor = 1;
#pragma unroll
        for (int i = 0; i < TILE / 2; ++i) score[i] = call.capped(score[i]);
      }
      if (key + TILE > work.all_until || key < work.all_from) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const Sight sight(call, work, work.row_tile * ROWS + row_of_lane + 8 * half);
          const u64 seen = sight.seen(key) >> 2 * (lane % 4);
#pragma unroll
          for (int n = 0; n < TILE / 8; ++n)
#pragma unroll
            for (int i = 0; i < 2; ++i)
              if (!(seen >> (8 * n + i) & 1)) score[4 * n + 2 * half + i] = -INFINITY;
        }
      }
      moved = false;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float top = -INFINITY;
#pragma unroll
        for (int n = 0; n < TILE / 8; ++n)
          top = fmaxf(top, fmaxf(score[4 * n + 2 * half], score[4 * n + 2 * half + 1]));
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
        for (int n = 0; n < TILE / 8; ++n)
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            float& one = score[4 * n + 2 * half + i];
            one = exp2_fast(fmaf(one, factor, -level));
            part += one;
          }
        total[half] = total[half] * shrink[half] + part;
      }
    };
    auto pack_weights = [&] {
#pragma unroll
      for (int i = 0; i < TILE / 4; ++i) weight[i] = packed(score[2 * i], score[2 * i + 1]);
    };
    auto await_values = [&](int key, unsigned at, unsigned parity) {
      barrier_wait(values_here + 8 * at, parity);
      if (key < work.low || key + TILE > work.high) {
        clear_values(work, tiles + at * 2 * TILE_BYTES + TILE_BYTES, key);
        proxy_fence();
        named_sync(1 + squad, 128);
      }
    };

    unsigned used = slot, parity = phase;  // of the tile whose values are to be multiplied next
    auto advance = [&] {
      used = slot, parity = phase;
      if (++slot == STAGES) slot = 0, phase ^= 1;
    };
    if (work.tile < work.stop) {
      barrier_wait(keys_here + 8 * slot, phase);
      wgmma_fence();
      multiply_keys(slot);
      wgmma_wait<0>();
      settle(score);
      weigh(work.tile * TILE);
      pack_weights();
      advance();
      for (++work.tile; work.tile < work.stop; ++work.tile) {
        barrier_wait(keys_here + 8 * slot, phase);
        await_values((work.tile - 1) * TILE, used, parity);
        if (WARPGROUPS == 2) named_sync(3 + squad, 256);
        wgmma_fence();
        multiply_keys(slot);
        multiply_values(used);
        if (WARPGROUPS == 2) named_arrive(3 + (squad ^ 1), 256);
        wgmma_wait<1>();
        settle(score);
        weigh(work.tile * TILE);
        wgmma_wait<0>();
        settle(sum);
        settle(weight);
        if (lane == 0) barrier_arrive(empty + 8 * used);
        if (__any_sync(~0u, moved)) {
#pragma unroll
          for (int i = 0; i < HEAD_DIM / 2; ++i) sum[i] *= shrink[i / 2 % 2];
        }
        pack_weights();
        advance();
      }
      await_values((work.tile - 1) * TILE, used, parity);
      wgmma_fence();
      multiply_values(used);
      wgmma_wait<0>();
      settle(sum);
      if (lane == 0) barrier_arrive(empty + 8 * used);
    }

    const Target target(call, work, deal);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      total[half] += __shfl_xor_sync(~0u, total[half], 1);
      total[half] += __shfl_xor_sync(~0u, total[half], 2);
      const int row = row_of_lane + 8 * half;
      if (work.row_tile * ROWS + row < work.rows * call.group)
        target.put_row<ROWS>(call, work, row, sum, half, peak[half], total[half]);
    }
    named_sync(1 + squad, 128);  // before the queries' place is taken
  }
}

// Adds up the pieces of every item that was cut: a warp a row. The grid names items by (tile of rows, eight rows, KV
// head); blocks: of decode_wide's grid.
extern "C" __global__ void __launch_bounds__(256) add_pieces(CALL_PARAMETERS, int blocks) {
  const Call call = CALL_OF_PARAMETERS;
  __shared__ Plan plan;
  after_predecessor();
  Cursor at;
  const Deal deal = find_item<ROWS, TILE, 256>(call, at, plan, blockIdx.x, blockIdx.y, blocks);
  if (at.done()) return;
  const Target target(call, at, deal);
  const int row = blockIdx.z * 8 + threadIdx.x / 32;
  if (target.pieces > 1 && at.row_tile * ROWS + row < at.rows * call.group) target.add_up<ROWS>(call, at, row);
}
