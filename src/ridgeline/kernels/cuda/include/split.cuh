// How split-KV kernels deal their work to blocks, which keys a row sees, and how cut items become whole again.
// Knows requests, rows, heads, keys and the workspace. It must not know how a tile of scores is computed.
//
// Units: an item is one tile of ROWS rows (tokens times the query heads of one KV head) of one request for one KV
// head; its keys fall into tiles of TILE keys. A unit is `grain` such tiles: one, or in the batch-invariant mode a
// fixed number, and then every unit is summed by itself, so that its sum depends on nothing but its own request.
#pragma once

using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i64 = long long;

#define INFINITY __int_as_float(0x7f800000)
constexpr float LOG2_E = 1.4426950408889634f, LN_2 = 0.6931471805599453f;

// One-instruction pieces

__device__ __forceinline__ u32 packed(float low, float high) {
  u32 both;
#if HALF
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
#else
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
#endif
  return both;
}

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

__device__ __forceinline__ float inverse(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ void prefetch(const void* from) { asm volatile("prefetch.global.L2 [%0];" ::"l"(from)); }

// Division by a number d of which the host gives ceil(2^32 / d) (0 for d = 1): exact while number * d < 2^32.
__device__ __forceinline__ int divided(int number, u32 inverse) { return inverse ? __umulhi(number, inverse) : number; }

// Programmatic dependent launch: this grid may be up before its predecessor has ended, and lets its successor be.
__device__ __forceinline__ void after_predecessor() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The call

#define CALL_PARAMETERS                                                                                              \
  const void *q, const void *k, const void *v, void *out, float *lse, const int *tables, const int *starts,          \
      const int *lengths, const int *key_starts, const float *sinks, const int *tree, const int *tails,              \
      float *partial, u32 *counters, i64 slots, int requests, int kv_heads, int group, u32 group_inverse, int page,  \
      u32 page_inverse, int window, int words, int causal, int grain, i64 table_stride, i64 q_token_stride,          \
      i64 q_head_stride, i64 block_stride, i64 head_stride, i64 slot_stride, float scale, float softcap
#define CALL_OF_PARAMETERS                                                                                           \
  {q, k, v, out, lse, tables, starts, lengths, key_starts, sinks, tree, tails, partial,                              \
   reinterpret_cast<float2*>(partial + slots * ROWS * HEAD_DIM), counters, requests, kv_heads, group, group_inverse, \
   page, page_inverse, window, words, causal, grain, table_stride, q_token_stride, q_head_stride, block_stride,      \
   head_stride, slot_stride, scale, softcap}

struct Call {
  const void *q, *k, *v;       // [T, H, D]; [blocks, Hk, page, D], or [K, Hk, D] with key_starts
  void* out;                   // [T, H, D], dense
  float* lse;                  // [T, H], or null
  const int *tables, *starts, *lengths, *key_starts;
  const float* sinks;
  const int *tree, *tails;     // tree: [T, words]
  float* partial;              // [slots, ROWS, D], unnormalized sums
  float2* partial_ends;        // [slots, ROWS], (peak, total) of each
  u32* counters;               // one an item, zero between launches
  int requests, kv_heads, group;
  u32 group_inverse;
  int page;
  u32 page_inverse;
  int window, words, causal;   // window: 0 for none
  int grain;                   // tiles of keys of a unit that is a piece by itself; 0: units are tiles, dealt evenly
  i64 table_stride, q_token_stride, q_head_stride, block_stride, head_stride, slot_stride;  // elements
  float scale, softcap;        // scale: of scores, to base 2 (and by the cap); softcap: to base 2, 0 for none

  __device__ __forceinline__ int heads() const { return kv_heads * group; }

  // softcap * tanh(score * scale / softcap), to base 2: 1 - 2 / (e^2x + 1) is exact to a few last bits.
  __device__ __forceinline__ float capped(float score) const {
    return softcap * (1.0f - 2.0f * inverse(1.0f + exp2_fast(score * scale)));
  }
};

// A stretch of one item that belongs to this block, and what is left behind it.
struct Cursor {
  int start;                                     // number of the item's first unit
  int left;                                      // units of this block behind this stretch; -1 when all is done
  int request, first, rows, length, tail;        // tail: the key at which the request's tree begins, or length
  int begin, tiles, units;                       // of an item: its first tile of keys, how many, units
  int row_tile, row_tiles, head, offset, take;   // offset, take: the stretch, in units of its item
  int low, high;                                 // keys that any row of the tile sees: low .. high
  int all_from, all_until;                       // keys that all of them see, at least: all_from .. all_until
  int tile, stop;                                // tiles of keys to go

  __device__ __forceinline__ bool done() const { return left < 0; }

  // Reads request `at`; false if it has no rows.
  template <int ROWS, int TILE>
  __device__ __forceinline__ bool read(const Call& call, int at) {
    request = at;
    first = call.starts[at];
    rows = call.starts[at + 1] - first;
    length = call.lengths[at];
    if (rows <= 0) return false;
    tail = length - (call.tails ? call.tails[at] : 0);
    begin = call.window > 0 ? u32(max(length - rows - call.window + 1, 0)) / TILE : 0;
    if (call.grain) begin -= u32(begin) % u32(call.grain);  // so that units are the same ones in every call
    tiles = max(u32(length + TILE - 1) / TILE - begin, 1);  // somebody must write the zeros of rows that see nothing
    units = call.grain ? u32(tiles + call.grain - 1) / u32(call.grain) : tiles;
    row_tiles = u32(rows * call.group + ROWS - 1) / ROWS;
    return true;
  }

  // Units of all items of a request, 0 if there is no such request.
  template <int ROWS, int TILE>
  __device__ __forceinline__ int units_of(const Call& call, int at) {
    return at < call.requests && read<ROWS, TILE>(call, at) ? row_tiles * call.kv_heads * units : 0;
  }

  // Number of the item's tile of rows among those of all requests, if earlier requests had as many rows as may be.
  template <int ROWS>
  __device__ __forceinline__ int tile_number(const Call& call) const {
    return u32(first * call.group) / ROWS + request + row_tile;
  }

  // Works out the stretch's keys.
  template <int ROWS, int TILE>
  __device__ __forceinline__ void place(const Call& call) {
    const int grain = call.grain ? call.grain : 1;
    const int top = divided(row_tile * ROWS, call.group_inverse);
    const int bottom = divided(min(row_tile * ROWS + ROWS, rows * call.group) - 1, call.group_inverse);
    const int nodes = length - tail, before = length - rows;  // position of the request's first row
    const bool branches = nodes > 0 && bottom >= rows - nodes;
    high = call.causal && !branches ? max(before + bottom + 1, 0) : length;
    low = call.window > 0 ? max(before + min(top, rows - nodes) - call.window + 1, 0) : 0;
    all_until = call.causal ? before + top + 1 : length;
    if (branches) all_until = min(all_until, tail);
    all_from = call.window > 0 ? length - call.window : 0;
    tile = max(begin + offset * grain, int(u32(low) / TILE));
    stop = min(begin + min((offset + take) * grain, tiles), int(u32(high + TILE - 1) / TILE));
  }

  // The block's next stretch; done() if it has none.
  template <int ROWS, int TILE>
  __device__ __forceinline__ void next(const Call& call) {
    if (left == 0) {
      left = -1;
      return;
    }
    offset += take;
    if (offset >= units) {
      start += units;
      offset = 0;
      if (++head == call.kv_heads) {
        head = 0;
        if (++row_tile == row_tiles) {
          row_tile = 0;
          while (!read<ROWS, TILE>(call, request + 1)) {
          }
        }
      }
    }
    take = call.grain ? 1 : min(units - offset, left);
    left -= take;
    place<ROWS, TILE>(call);
  }

  // On to the next tile of keys, over stretches that have none.
  template <int ROWS, int TILE>
  __device__ __forceinline__ void settle(const Call& call) {
    while (left >= 0 && tile >= stop) next<ROWS, TILE>(call);
  }

  template <int ROWS, int TILE>
  __device__ __forceinline__ void step(const Call& call) {
    ++tile;
    settle<ROWS, TILE>(call);
  }

  // The block of the table that holds keys key .. key + count; 0 where nothing will be read.
  __device__ __forceinline__ int page_of(const Call& call, int key, int count) const {
    if (!call.tables || key >= high || key + count <= low) return 0;
    return call.tables[request * call.table_stride + divided(key, call.page_inverse)];
  }

  // Element of k and v at which a key's row begins.
  __device__ __forceinline__ i64 offset_of(const Call& call, int page_index, int key) const {
    const int row = call.tables ? key - divided(key, call.page_inverse) * call.page : call.key_starts[request] + key;
    return page_index * call.block_stride + head * call.head_stride + row * call.slot_stride;
  }

  // Token of q, and query head, of a row of the request (token times head of the group).
  __device__ __forceinline__ int token_of(const Call& call, int row) const {
    return first + divided(row, call.group_inverse);
  }
  __device__ __forceinline__ int head_of(const Call& call, int row) const {
    return head * call.group + row - divided(row, call.group_inverse) * call.group;
  }
  __device__ __forceinline__ const u16* query_at(const Call& call, int row) const {
    return static_cast<const u16*>(call.q) + token_of(call, row) * call.q_token_stride +
           head_of(call, row) * call.q_head_stride;
  }
};

// Which keys one row (token times head of the group) sees.
struct Sight {
  int from, until, tail, length;
  const int* bits;  // of a tree's node

  __device__ __forceinline__ Sight(const Call& call, const Cursor& at, int row) {
    const int token = divided(row, call.group_inverse), nodes = at.length - at.tail;
    from = 0, tail = at.tail, length = at.length, bits = nullptr;
    if (token >= at.rows) {
      until = 0;
    } else if (!call.causal) {
      until = length;
    } else if (token < at.rows - nodes) {
      until = length - at.rows + token + 1;
      if (call.window > 0) from = until - call.window;
    } else {
      bits = call.tree + i64(at.first + token) * call.words;
      until = tail;
      if (call.window > 0) {
        from = tail - call.window;
        for (int word = 0; 32 * word < nodes; ++word)
          from += __popc(bits[word] & (nodes - 32 * word >= 32 ? ~0u : (1u << (nodes - 32 * word)) - 1));
      }
    }
  }

  // Ones from bit 0 up to bit `count`, which may lie on either side of 0 .. 64.
  static __device__ __forceinline__ u64 ones(int count) {
    return count <= 0 ? 0 : count >= 64 ? ~u64(0) : (u64(1) << count) - 1;
  }

  // Bit i: whether key + i is seen.
  __device__ __forceinline__ u64 seen(int key) const {
    u64 mask = ones(until - key) & ~ones(from - key);
    if (bits && key < length && key + 64 > tail) {
      const int begin = key - tail, words = (length - tail + 31) / 32;  // begin: may be before the tail
      const int word = begin >> 5, shift = begin & 31;
      u32 part[3];
#pragma unroll
      for (int i = 0; i < 3; ++i) part[i] = word + i >= 0 && word + i < words ? bits[word + i] : 0;
      const u64 nodes = u64(__funnelshift_r(part[1], part[2], shift)) << 32 | __funnelshift_r(part[0], part[1], shift);
      mask |= nodes & ones(length - key) & ~ones(tail - key);
    }
    return mask;
  }
};

// Dealing

struct Plan {
  int sums[32];  // of warps, while counting
  int request, before;
  int last;      // whether this block came last to an item
};

// `total` units dealt to at most `grid` blocks, `share` each. Where lengths are equal, shares of a whole number often
// fall on the borders of items, and then fewer items are cut.
struct Deal {
  int share;

  __device__ __forceinline__ Deal(int total, int grid) : share(max(u32(total + grid - 1) / u32(grid), 1)) {}
  // A share that holds whole items of so many units, or one of equal parts of an item, if that takes at most a sixteenth
  // more: fewer blocks then have the same to do, and memory is busy all the same.
  __device__ __forceinline__ void fit(int units) {
    const u32 least = share, most = least + least / 16;
    if (least > u32(units)) {
      const u32 whole = (least + units - 1) / u32(units) * units;
      if (whole <= most) share = whole;
    } else {
      u32 parts = u32(units) / least;
      while (parts * most >= u32(units) && u32(units) % parts) --parts;
      if (parts * most >= u32(units)) share = u32(units) / parts;
    }
  }
  __device__ __forceinline__ int owner(int unit) const { return u32(unit) / u32(share); }
};

// The sum of the values of this lane and those below.
__device__ __forceinline__ int up_to_lane(int sum) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int below = __shfl_up_sync(~0u, sum, step);
    if (lane >= step) sum += below;
  }
  return sum;
}

// The same over all threads of the block; `all` becomes the sum of all.
template <int THREADS>
__device__ __forceinline__ int up_to_thread(int value, Plan& plan, int& all) {
  const int warp = threadIdx.x / 32;
  int sum = up_to_lane(value);
  __syncthreads();
  if (threadIdx.x % 32 == 31) plan.sums[warp] = sum;
  __syncthreads();
  all = 0;
#pragma unroll
  for (int other = 0; other < THREADS / 32; ++other) {
    if (other < warp) sum += plan.sums[other];
    all += plan.sums[other];
  }
  return sum;
}

// Puts this block's first stretch into `at`, done() if it has none. Every thread gets the same.
// FIT_FROM: units of a share from which it may grow to whole items; 0: never. To find out costs some divisions in a
// row, 0.4 us, and where shares are small those of equal lengths fall on borders anyway.
template <int ROWS, int TILE, int THREADS, int FIT_FROM = 0>
__device__ __forceinline__ Deal begin_work(const Call& call, Cursor& at, Plan& plan) {
  const int lane = threadIdx.x % 32;
  if (call.tables) {  // they are asked for as soon as lengths are here: let them come from afar meanwhile
    const i64 place = 32 * threadIdx.x;
    if (place < (call.requests - 1) * call.table_stride + 1) prefetch(call.tables + place);
  }
  Deal deal(0, 1);
  int total, begin, before;
  auto begins = [&] {
    deal = Deal(total, gridDim.x);
    if (FIT_FROM > 0 && deal.share >= FIT_FROM && !call.grain) {
      Cursor one;  // the first request stands for all of them, since the deal must be the same everywhere
      if (one.read<ROWS, TILE>(call, 0)) deal.fit(one.units);
    }
    begin = blockIdx.x * deal.share;
    if (begin >= total) at.left = -1;
    return begin < total;
  };
  if (call.requests == 1) {
    before = 0;
    total = at.units_of<ROWS, TILE>(call, 0);
    if (!begins()) return deal;
  } else if (call.requests <= 32) {  // each warp counts by itself
    const int mine = at.units_of<ROWS, TILE>(call, lane), sum = up_to_lane(mine);
    total = __shfl_sync(~0u, sum, 31);
    if (!begins()) return deal;
    const int owner = __ffs(__ballot_sync(~0u, sum > begin)) - 1;
    before = __shfl_sync(~0u, sum - mine, owner);
    at.read<ROWS, TILE>(call, owner);
  } else {
    begin = -1;
    for (int base = 0, passed = 0;; base += THREADS) {
      if (base >= call.requests) {  // counted; now find the request in which this block begins
        total = passed;
        if (!begins()) return deal;
        base = passed = 0;
      }
      const int one = base + threadIdx.x, mine = at.units_of<ROWS, TILE>(call, one);
      int all;
      const int sum = passed + up_to_thread<THREADS>(mine, plan, all);
      if (begin >= 0 && sum > begin && sum - mine <= begin) plan.request = one, plan.before = sum - mine;
      passed += all;
      if (begin >= 0 && passed > begin) break;
    }
    __syncthreads();
    before = plan.before;
    at.read<ROWS, TILE>(call, plan.request);
  }
  const int inside = begin - before, item = u32(inside) / u32(at.units);
  at.offset = inside - item * at.units;
  at.start = begin - at.offset;
  at.row_tile = u32(item) / u32(call.kv_heads), at.head = item - at.row_tile * call.kv_heads;
  const int mine = min(deal.share, total - begin);
  at.take = call.grain ? 1 : min(at.units - at.offset, mine);
  at.left = mine - at.take;
  at.place<ROWS, TILE>(call);
  return deal;
}

// Puts item (tile number `number`, head) into `at`, whole; done() if there is none. grid: of the blocks that worked.
template <int ROWS, int TILE, int THREADS>
__device__ __forceinline__ Deal find_item(const Call& call, Cursor& at, Plan& plan, int number, int head, int grid) {
  int total = 0, request = -1, before = 0;
  auto units_here = [&](int one, bool& here) {
    at.row_tile = 0;
    const int mine = at.units_of<ROWS, TILE>(call, one);
    here = mine > 0 && number >= at.tile_number<ROWS>(call) && number < at.tile_number<ROWS>(call) + at.row_tiles;
    return mine;
  };
  if (call.requests <= 32) {  // each warp by itself
    bool here;
    const int mine = units_here(threadIdx.x % 32, here), sum = up_to_lane(mine);
    const u32 found = __ballot_sync(~0u, here);
    request = __ffs(found) - 1;
    before = __shfl_sync(~0u, sum - mine, max(request, 0));
    total = __shfl_sync(~0u, sum, 31);
  } else {
    if (threadIdx.x == 0) plan.request = -1;
    for (int base = 0; base < call.requests; base += THREADS) {
      bool here;
      int all;
      const int one = base + threadIdx.x, mine = units_here(one, here);
      const int sum = total + up_to_thread<THREADS>(mine, plan, all);
      if (here) plan.request = one, plan.before = sum - mine;
      total += all;
    }
    __syncthreads();
    request = plan.request, before = plan.before;
  }
  const Deal deal(total, grid);
  at.left = request < 0 ? -1 : 0;
  if (request < 0) return deal;
  at.read<ROWS, TILE>(call, request);
  at.row_tile = 0;
  at.row_tile = number - at.tile_number<ROWS>(call);
  at.head = head;
  at.start = before + (at.row_tile * call.kv_heads + head) * at.units;
  at.offset = 0, at.take = 0;
  return deal;
}

// Where a stretch's sums go: to the result, or to a slot of the workspace.
struct Target {
  int pieces;      // of the item
  int first, own;  // first: block of the item's first piece, or unit if every unit is summed by itself; own: this piece

  __device__ __forceinline__ Target(const Call& call, const Cursor& at, const Deal& deal) {
    if (call.grain) {
      first = at.start, pieces = at.units, own = at.offset;
    } else {
      first = deal.owner(at.start);
      pieces = deal.owner(at.start + at.units - 1) - first + 1;
      own = int(blockIdx.x) - first;
    }
  }

  // A block leaves at most two partial sums: of the item it begins in and of the one it ends in.
  __device__ __forceinline__ int slot(const Call& call, int piece) const {
    return call.grain ? first + piece : 2 * (first + piece) + (piece == 0);
  }

  // Share of a row's sum in the result, and the logarithm of its sum of exponentials. A row that saw nothing
  // gives zeros and -inf; a sink takes part with no value.
  struct End {
    float share, log;
    __device__ __forceinline__ End(const Call& call, int head, float peak, float total) {
      float level = peak;
      if (call.sinks) {
        const float sink = call.sinks[head] * LOG2_E;
        level = fmaxf(peak, sink);
        if (level != -INFINITY) total = total * exp2_fast(peak - level) + exp2_fast(sink - level);
      }
      share = level == -INFINITY ? 0 : exp2_fast(peak - level) * inverse(total);
      log = level == -INFINITY ? -INFINITY : (level + log2_fast(total)) * LN_2;
    }
  };

  // Four neighbouring sums of one row of the tile.
  template <int ROWS>
  __device__ __forceinline__ void put(const Call& call, const Cursor& at, int row, int column, float4 value, float peak,
                                      float total) const {
    if (pieces > 1) {
      const i64 place = i64(slot(call, own)) * ROWS + row;
      *reinterpret_cast<float4*>(call.partial + place * HEAD_DIM + column) = value;
      if (column == 0) call.partial_ends[place] = make_float2(peak, total);
      return;
    }
    const int whole = at.row_tile * ROWS + row, head = at.head_of(call, whole);
    const i64 place = i64(at.token_of(call, whole)) * call.heads() + head;
    const End end(call, head, peak, total);
    *reinterpret_cast<uint2*>(static_cast<u16*>(call.out) + place * HEAD_DIM + column) =
        make_uint2(packed(value.x * end.share, value.y * end.share), packed(value.z * end.share, value.w * end.share));
    if (column == 0 && call.lse) call.lse[place] = end.log;
  }

  // A row as a warpgroup's product leaves it in four neighbouring lanes: sum[4 b + 2 half], and the next, at columns
  // 8 b + 2 (lane % 4), and the next.
  template <int ROWS>
  __device__ __forceinline__ void put_row(const Call& call, const Cursor& at, int row, const float (&sum)[HEAD_DIM / 2],
                                          int half, float peak, float total) const {
    const int lane = threadIdx.x % 4;
    if (pieces > 1) {
      const i64 place = i64(slot(call, own)) * ROWS + row;
      float* const to = call.partial + place * HEAD_DIM + 2 * lane;
#pragma unroll
      for (int b = 0; b < HEAD_DIM / 8; ++b)
        *reinterpret_cast<float2*>(to + 8 * b) = make_float2(sum[4 * b + 2 * half], sum[4 * b + 2 * half + 1]);
      if (lane == 0) call.partial_ends[place] = make_float2(peak, total);
      return;
    }
    const int whole = at.row_tile * ROWS + row, head = at.head_of(call, whole);
    const i64 place = i64(at.token_of(call, whole)) * call.heads() + head;
    const End end(call, head, peak, total);
    u16* const to = static_cast<u16*>(call.out) + place * HEAD_DIM + 2 * lane;
#pragma unroll
    for (int b = 0; b < HEAD_DIM / 8; ++b)
      *reinterpret_cast<u32*>(to + 8 * b) =
          packed(sum[4 * b + 2 * half] * end.share, sum[4 * b + 2 * half + 1] * end.share);
    if (lane == 0 && call.lse) call.lse[place] = end.log;
  }

  // One row of an item from its pieces, by a warp.
  template <int ROWS>
  __device__ __forceinline__ void add_up(const Call& call, const Cursor& at, int row) const {
    const int lane = threadIdx.x % 32;
    constexpr int WIDTH = HEAD_DIM % 128 == 0 ? 4 : HEAD_DIM % 64 == 0 ? 2 : 1;  // floats a load
    constexpr int LOADS = HEAD_DIM / 32 / WIDTH;
    constexpr int VALUES = LOADS * WIDTH, AT_ONCE = HEAD_DIM <= 128 ? 18 : 8;  // 132 blocks over 8 heads: 17 pieces
    float peak = -INFINITY, total = 0, sum[VALUES];
#pragma unroll
    for (int i = 0; i < VALUES; ++i) sum[i] = 0;
    // Units summed by themselves are added in groups that no call shifts, wherever its first unit lies.
    const int begin = call.grain ? -int(u32(at.begin) / u32(call.grain) % AT_ONCE) : 0;
    for (int base = begin; base < pieces; base += AT_ONCE) {
      float2 end[AT_ONCE];
      float value[AT_ONCE][VALUES];
#pragma unroll
      for (int i = 0; i < AT_ONCE; ++i) {
        const bool real = u32(base + i) < u32(pieces);
        const i64 place = i64(slot(call, base + i)) * ROWS + row;
        end[i] = make_float2(-INFINITY, 0);
        if (real) end[i] = __ldcg(call.partial_ends + place);
#pragma unroll
        for (int load = 0; load < LOADS; ++load) {
          const float* from = call.partial + place * HEAD_DIM + (32 * load + lane) * WIDTH;
          if constexpr (WIDTH == 4) {
            float4 four = make_float4(0, 0, 0, 0);
            if (real) four = __ldcg(reinterpret_cast<const float4*>(from));
            value[i][4 * load] = four.x, value[i][4 * load + 1] = four.y;
            value[i][4 * load + 2] = four.z, value[i][4 * load + 3] = four.w;
          } else if constexpr (WIDTH == 2) {
            float2 two = make_float2(0, 0);
            if (real) two = __ldcg(reinterpret_cast<const float2*>(from));
            value[i][2 * load] = two.x, value[i][2 * load + 1] = two.y;
          } else {
            value[i][load] = real ? __ldcg(from) : 0;
          }
        }
      }
      float top = peak;
#pragma unroll
      for (int i = 0; i < AT_ONCE; ++i) top = fmaxf(top, end[i].x);
      const float level = top == -INFINITY ? 0 : top, shrink = exp2_fast(peak - level);
      peak = top;
      total *= shrink;
#pragma unroll
      for (int j = 0; j < VALUES; ++j) sum[j] *= shrink;
#pragma unroll
      for (int i = 0; i < AT_ONCE; ++i) {
        const float weight = exp2_fast(end[i].x - level);
        total += weight * end[i].y;
#pragma unroll
        for (int j = 0; j < VALUES; ++j) sum[j] += weight * value[i][j];
      }
    }
    const int whole = at.row_tile * ROWS + row, head = at.head_of(call, whole);
    const i64 place = i64(at.token_of(call, whole)) * call.heads() + head;
    const End end(call, head, peak, total);
    u16* const to = static_cast<u16*>(call.out) + place * HEAD_DIM + lane * WIDTH;
#pragma unroll
    for (int load = 0; load < LOADS; ++load) {
      if constexpr (WIDTH == 1) {
        to[32 * load] = u16(packed(sum[load] * end.share, 0));
      } else {
#pragma unroll
        for (int i = 0; i < WIDTH; i += 2)
          *reinterpret_cast<u32*>(to + 32 * WIDTH * load + i) =
              packed(sum[WIDTH * load + i] * end.share, sum[WIDTH * load + i + 1] * end.share);
      }
    }
    if (lane == 0 && call.lse) call.lse[place] = end.log;
  }
};

// Called by every thread of a block once its piece of an item is put: whether it is the last to come, and so sees
// all pieces.
template <int ROWS>
__device__ __forceinline__ bool came_last(const Call& call, const Cursor& at, const Target& target, Plan& plan) {
  __syncthreads();
  if (threadIdx.x == 0) {
    const int item = at.tile_number<ROWS>(call) * call.kv_heads + at.head;
    u32 old;
    // Wraps to zero with the last piece: ready for the next launch.
    asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;"
                 : "=r"(old)
                 : "l"(call.counters + item), "r"(target.pieces - 1)
                 : "memory");
    plan.last = old == u32(target.pieces - 1);
  }
  __syncthreads();
  return plan.last;
}
