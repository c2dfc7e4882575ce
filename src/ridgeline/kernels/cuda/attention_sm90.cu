// Attention on Hopper (sm_90a), of the class of FlashAttention-3 (Shah et al., 2407.08608): one warpgroup asks the
// copy engine for tiles, two or three others multiply, and each of those hides its softmax behind its products.
//
// Knows: ragged batches, tiles of rows and keys, masks, the softmax, how work is dealt out. Must not know: who calls.
//
// A block of threads lives as long as the launch and is dealt tiles of TILE_M rows of one head (64 a warpgroup). To a
// multiplying warpgroup its tiles are one endless run of key blocks: the scores of the next block are computed while
// the values of the last are added up, also across the border between two tiles, so that neither the first nor the
// last block of a tile leaves the tensor cores idle. Within a tile blocks run from the last key to the first: those
// that a mask cuts come first, and the loop over the others has no mask.
//
//   step(n):  scores = q k[n]           under way together with
//             sums  += weights v[n+1]
//             wait for scores; mask; weights' = exp2(scores - anchor), their sums   while the values are added up
//             wait for sums; weights = weights'
//
// The anchor of a row's exponents need not be its peak: it is zero, or the peak of an earlier block, until the peak is
// found to have left the range in which 16 bit weights are as good; then the block's weights are taken again, and sums
// shrink. So exponentials wait for no maximum, and sums are hardly ever scaled. But the heaviest key's weight is then not
// 1, which 16 bits hold exactly: what rounding adds to it is added to the row's sum of weights too, or a row that one
// key dominates would be off by all of it.
//
// Defines (all of them): HEAD_DIM 64, 96, 128, 192, 256; HALF; WARPGROUPS (that multiply), TILE_N, STAGES (of K and V
// each), Q_STAGES; CAUSAL, WINDOW, SOFTCAP, SINKS, TREE, LSE: 0 or 1; PAGE: keys of a page, 0 if they are contiguous;
// PING_PONG: warpgroups take turns at issuing products; FLUSH: a tile is finished before the next one's queries are
// waited for; SECTION_MB: keys and values of the heads that are dealt side by side; PRODUCER_REGISTERS,
// CONSUMER_REGISTERS.

#include "mbarrier.cuh"
#include "tma.cuh"
#include "wgmma.cuh"

constexpr int WARPGROUP = 128;
constexpr int THREADS = WARPGROUP * (1 + WARPGROUPS);
constexpr int ROWS = 64;  // of a warpgroup
constexpr int TILE_M = ROWS * WARPGROUPS;
constexpr int CHUNKS = (HEAD_DIM + 63) / 64;  // of 64 columns: 128 bytes, as wide as the copy engine swizzles
constexpr int Q_BYTES = CHUNKS * ROWS * 128;  // of a warpgroup
constexpr int KV_BYTES = CHUNKS * TILE_N * 128;
#if PAGE
__device__ constexpr int common(int a, int b) { return b == 0 ? a : common(b, a % b); }
constexpr int UNIT = common(TILE_N, PAGE);  // keys that lie within one page
#endif

constexpr int Q_AT = 0;
constexpr int K_AT = Q_AT + Q_STAGES * WARPGROUPS * Q_BYTES;
constexpr int V_AT = K_AT + STAGES * KV_BYTES;
constexpr int WORK_AT = V_AT + STAGES * KV_BYTES;
constexpr int WORK_BYTES = 64;
constexpr int WORKS = 8;  // more than are in use: a tile, the one before, those announced and one being written
constexpr int BARRIERS_AT = WORK_AT + WORKS * WORK_BYTES;
constexpr int Q_FULL = BARRIERS_AT;
constexpr int Q_EMPTY = Q_FULL + 8 * Q_STAGES * WARPGROUPS;
constexpr int K_FULL = Q_EMPTY + 8 * Q_STAGES * WARPGROUPS;
constexpr int K_EMPTY = K_FULL + 8 * STAGES;
constexpr int V_FULL = K_EMPTY + 8 * STAGES;
constexpr int V_EMPTY = V_FULL + 8 * STAGES;

constexpr unsigned ALL = 0xffffffff;
constexpr float LOG2_E = 1.4426950408889634f;
constexpr float LN_2 = 0.6931471805599453f;

#define INFINITE __int_as_float(0x7f800000)

// What there is to do for one tile. Block n holds keys n TILE_N ... of the request.
struct alignas(16) Work {
    int kind;               // STOP, NOTHING_SEEN, WORK
    int head;
    int token;              // the tile's first row in q
    int rows;               // of the tile that belong to the request
    int position;           // of the first row among the request's keys
    int length;             // keys of the request
    int top, bottom;        // blocks that some row sees
    int whole_top;          // blocks up to this one are not cut by the diagonal, a tree or the end of the keys
    int whole_bottom;       // blocks from this one on are not cut by the window
    int low;                // the first key that any row of the request sees
    int tail;               // the first key that is a node of a tree
    int nodes;              // the tile's first row that is a node of a tree
    int request, key_head;  // whose keys, and which of their heads
    int key_start;          // the request's first key, if keys are contiguous
};
static_assert(sizeof(Work) == WORK_BYTES);
enum { STOP, NOTHING_SEEN, WORK };

__device__ __forceinline__ float exp2_unit(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float inverse_unit(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float log2_unit(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float tanh_units(float x) {
    return fmaf(-2.0f, inverse_unit(1.0f + exp2_unit(2.0f * LOG2_E * x)), 1.0f);
}

// What a launch is given, in one place.
struct Arguments {
    const int* query_starts;
    const int* lengths;
    const int* key_starts;
    const int* tables;
    const int* tree;
    const int* tails;
    const float* sinks;
    int table_stride, words, requests, heads, group, window;
    float scale, cap;  // scores * scale are the powers of two; with SOFTCAP tanh(scores * scale) * cap
};

// ---------------------------------------------------------------------------------------------------------------------
// Dealing out. One warp, all lanes alike. Tiles are numbered request by request; within one, by sections of heads
// whose keys and values together stay in the L2 cache, and within a section from the last rows (under a causal mask
// the longest tiles) to the first, all heads of the section for each.

struct Dealer {
    const Arguments& given;
    int group_begin = 0;   // the tile number at which the current 32 requests begin
    int group_first = 0;   // the first of these requests
    int group_total = 0;   // their tiles
    int ends = 0;          // where this lane's request ends, counted from group_begin

    __device__ __forceinline__ explicit Dealer(const Arguments& arguments) : given(arguments) { scan(); }

    __device__ __forceinline__ void scan() {
        const int lane = threadIdx.x % 32, request = group_first + lane;
        ends = 0;
        if (request < given.requests) {
            const int rows = given.query_starts[request + 1] - given.query_starts[request];
            ends = (rows + TILE_M - 1) / TILE_M * given.heads;
        }
        __syncwarp();
#pragma unroll
        for (int step = 1; step < 32; step *= 2) {
            const int before = __shfl_up_sync(ALL, ends, step);
            if (lane >= step) ends += before;
        }
        group_total = __shfl_sync(ALL, ends, 31);
    }

    // Writes down the work of a tile and returns its kind. Tiles must be asked for in rising order.
    __device__ __forceinline__ int deal(int tile, Work& work) {
        const bool writes = threadIdx.x % 32 == 0;
        while (group_first < given.requests && tile >= group_begin + group_total) {
            group_begin += group_total;
            group_first += 32;
            scan();
        }
        if (group_first >= given.requests) {
            if (writes) work.kind = STOP;
            return STOP;
        }
        const int owner = __ffs(__ballot_sync(ALL, tile - group_begin < ends)) - 1;
        const int request = group_first + owner;
        int place = tile - group_begin - (owner == 0 ? 0 : __shfl_sync(ALL, ends, owner - 1));
        const int first = given.query_starts[request];
        const int rows = given.query_starts[request + 1] - first;
        const int length = given.lengths[request];
        const int tiles = (rows + TILE_M - 1) / TILE_M;

        // A section has as many KV heads as SECTION_MB hold of their keys and values.
        const int kept = (SECTION_MB << 20) / (max(length, 1) * (HEAD_DIM * 4));
        const int section = min(max(kept, 1) * given.group, given.heads);
        const int which = place / (tiles * section);
        place -= which * tiles * section;
        const int heads = min(section, given.heads - which * section);
        const int row = (tiles - 1 - place / heads) * TILE_M;
        const int head = which * section + place % heads;
        const int live = min(rows - row, TILE_M);
        const int position = length - rows + row;
        const int last = position + live - 1;
        const int high = CAUSAL ? min(length, last + 1) : length;
        const int kind = high > 0 ? WORK : NOTHING_SEEN;
        int whole_top = (CAUSAL ? max(position + 1, 0) : length) / TILE_N - 1;
        int earliest = position;
        if (TREE) {
            const int tail = length - given.tails[request];
            const int nodes = tail - (length - rows) - row;
            if (nodes < live) {
                whole_top = min(whole_top, tail / TILE_N - 1);
                earliest = min(earliest, tail);
            }
            if (writes) {
                work.tail = tail;
                work.nodes = nodes;
            }
        }
        if (writes) {
            work.kind = kind;
            work.head = head;
            work.token = first + row;
            work.rows = live;
            work.position = position;
            work.length = length;
            work.top = (high + TILE_N - 1) / TILE_N - 1;
            work.whole_top = whole_top;
            work.bottom = WINDOW ? max(earliest - given.window + 1, 0) / TILE_N : 0;
            work.whole_bottom = WINDOW ? (max(last - given.window + 1, 0) + TILE_N - 1) / TILE_N : 0;
            work.low = WINDOW ? max(length - rows - given.window + 1, 0) : 0;
            work.request = request;
            work.key_head = head / given.group;
            work.key_start = PAGE ? 0 : given.key_starts[request];
        }
        return kind;
    }
};

// ---------------------------------------------------------------------------------------------------------------------
// One warp of the first warpgroup asks for tiles, in the order in which the others need them.

struct Producer {
    const TensorMap &q, &k, &v;
    const Arguments& given;
    unsigned base;
    unsigned long long keep_keys;
    Ring<STAGES> k_ring{}, v_ring{};

    // Keys or values of block n, into one stage: a box for every 64 columns and every stretch of keys that surely lies
    // within one page. Pages that nobody sees are not read: keys outside of the pool arrive as zeros.
    __device__ __forceinline__ void block(
        const TensorMap& map, unsigned to, unsigned barrier, const Work& work, int n) {
        const int lane = threadIdx.x % 32;
        if (lane == 0) {
            barrier_expect(barrier, KV_BYTES);
#if PAGE == 0
#pragma unroll
            for (int chunk = 0; chunk < CHUNKS; ++chunk)
                copy_box(
                    map, to + chunk * TILE_N * 128, barrier, keep_keys, chunk * 64, work.key_head,
                    work.key_start + n * TILE_N);
#endif
        }
        __syncwarp();
#if PAGE
        const int* table = given.tables + (long long)work.request * given.table_stride;
#pragma unroll
        for (int i = 0; i < (TILE_N / UNIT * CHUNKS + 31) / 32; ++i) {
            const int part = (i * 32 + lane) / CHUNKS, chunk = (i * 32 + lane) % CHUNKS;
            if (part < TILE_N / UNIT) {
                const int key = n * TILE_N + part * UNIT;
                const bool seen = key < work.length && key + UNIT > work.low;
                const int page = seen ? table[key / PAGE] : -1;
                copy_box(
                    map, to + chunk * TILE_N * 128 + part * UNIT * 128, barrier, keep_keys, chunk * 64, key % PAGE,
                    work.key_head, page);
            }
        }
        __syncwarp();
#endif
    }

    __device__ __forceinline__ void keys(const Work& work, int n) {
        barrier_wait(base + K_EMPTY + 8 * k_ring.slot, k_ring.phase ^ 1);
        block(k, base + K_AT + k_ring.slot * KV_BYTES, base + K_FULL + 8 * k_ring.slot, work, n);
        k_ring.advance();
    }

    __device__ __forceinline__ void values(const Work& work, int n) {
        barrier_wait(base + V_EMPTY + 8 * v_ring.slot, v_ring.phase ^ 1);
        block(v, base + V_AT + v_ring.slot * KV_BYTES, base + V_FULL + 8 * v_ring.slot, work, n);
        v_ring.advance();
    }

    // The queries of a tile, or the news that there are none.
    __device__ __forceinline__ void queries(
        const Work& work, int kind, Ring<Q_STAGES>& q_ring, unsigned long long keep_queries) {
#pragma unroll
        for (int g = 0; g < WARPGROUPS; ++g)
            barrier_wait(base + Q_EMPTY + 8 * (q_ring.slot * WARPGROUPS + g), q_ring.phase ^ 1);
        if (threadIdx.x % 32 == 0) {
#pragma unroll
            for (int g = 0; g < WARPGROUPS; ++g) {
                const unsigned full = base + Q_FULL + 8 * (q_ring.slot * WARPGROUPS + g);
                const unsigned to = base + Q_AT + (q_ring.slot * WARPGROUPS + g) * Q_BYTES;
                if (kind != WORK) {
                    barrier_arrive(full);
                } else {
                    barrier_expect(full, Q_BYTES);
#pragma unroll
                    for (int chunk = 0; chunk < CHUNKS; ++chunk)
                        copy_box(
                            q, to + chunk * ROWS * 128, full, keep_queries, chunk * 64, work.head,
                            work.token + g * ROWS);
                }
            }
        }
        __syncwarp();
        q_ring.advance();
    }

    __device__ __forceinline__ void run(int* counter, char* shared) {
        const int lane = threadIdx.x % 32;
        Work* works = reinterpret_cast<Work*>(shared + WORK_AT);
        Dealer dealer(given);
        const unsigned long long keep_queries = keep_first();
        keep_keys = keep_last();
        Ring<Q_STAGES> q_ring;
        constexpr bool BEHIND_VALUES = FLUSH && Q_STAGES == 1;  // queries wait until values have been asked for
        int tile = blockIdx.x, kind = STOP;
        bool pending = false;  // the last values of the tile before: needed only after the first keys of the next
        for (int round = -1;; ++round) {
            const Work& work = works[round % WORKS];
            int top = -1, bottom = 0;
            if (round >= 0) {
                if (kind == WORK) keys(work, work.top);
                if (pending) {
                    const Work& before = works[(round - 1) % WORKS];
                    values(before, before.bottom);
                }
                if (BEHIND_VALUES) {
                    queries(work, kind, q_ring, keep_queries);
                    if (counter != nullptr) tile = __shfl_sync(ALL, tile, 0);
                }
                if (kind == STOP) break;
                pending = kind == WORK;
                if (pending) {
                    top = work.top;
                    bottom = work.bottom;
                }
            }
            // While keys and values are on their way the next tile is dealt, and its queries are asked for as soon as
            // there is room: once the second block's keys have been replaced, this tile has begun and the one before
            // has left its room. If there is room for one tile only, all keys of this one must be on their way, or (with
            // FLUSH) its last values too.
            const int early = max(top - 2, bottom), late = min(bottom, top - 1);
            const int deals = max(early, late), fetches = Q_STAGES > 1 ? max(early, late) : late;
            for (int n = top - 1; n >= late; --n) {
                if (n >= bottom) {
                    keys(work, n);
                    values(work, n + 1);
                }
                Work& next = works[(round + 1) % WORKS];
                if (n == min(deals, top - 1)) {
                    kind = dealer.deal(tile, next);
                    if (counter != nullptr) {
                        if (lane == 0) tile = atomicAdd(counter, 1) + gridDim.x;
                    } else {
                        // There and back again: whoever got the longest of one round gets the shortest of the next.
                        tile = (round + 2) * gridDim.x + (round % 2 ? gridDim.x - 1 - blockIdx.x : blockIdx.x);
                    }
                    __syncwarp();
                }
                if (!BEHIND_VALUES && n == min(fetches, top - 1)) {
                    queries(next, kind, q_ring, keep_queries);
                    if (counter != nullptr) tile = __shfl_sync(ALL, tile, 0);
                }
            }
        }
        if (counter != nullptr && lane == 0) {
            // The last block to stop leaves the counters as it found them.
            __threadfence();
            if (atomicAdd(counter + 1, 1) == gridDim.x - 1) {
                counter[0] = 0;
                counter[1] = 0;
                __threadfence();
            }
        }
    }
};

// ---------------------------------------------------------------------------------------------------------------------
// A warpgroup that multiplies.

// What is kept of a thread's two rows until a tile is written out.
struct Rows {
    float peak[2], total[2], most[2];
};

__device__ __forceinline__ float over_row(float x) {
    x += __shfl_xor_sync(ALL, x, 1);
    return x + __shfl_xor_sync(ALL, x, 2);
}

struct Consumer {
    const Arguments& given;
    unsigned base;
    int group;     // which of the warpgroups
    int thread;    // of the warpgroup
    float sums[HEAD_DIM / 2];
    float scores[TILE_N / 2];
    unsigned weights[TILE_N / 4];
    float peak[2], total[2];
    float most[2];       // the highest of this thread's scores since the row's anchor was chosen
    Ring<STAGES> k_ring{}, v_ring{};
    Ring<Q_STAGES> q_ring{};
    unsigned q_address, q_empty;
    int more;            // 0 until the first values of a tile have been added up

    __device__ __forceinline__ int row(int r) const { return thread / 32 * 16 + thread % 32 / 4 + 8 * r; }

    __device__ __forceinline__ void turn() {
        if (PING_PONG) named_sync(1 + group, 2 * WARPGROUP);
    }

    __device__ __forceinline__ void next_turn() {
        if (PING_PONG) named_arrive(1 + (group + 1) % WARPGROUPS, 2 * WARPGROUP);
    }

    __device__ __forceinline__ void release(unsigned barrier) {
        if (thread % 32 == 0) barrier_arrive(barrier);
    }

    __device__ __forceinline__ void issue_scores() {
        const unsigned long long keys = operand_k(base + K_AT + k_ring.slot * KV_BYTES);
        const unsigned long long queries = operand_k(q_address);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < HEAD_DIM / 16; ++k)
            Wgmma<TILE_N>::ss(
                scores, queries + (k / 4 * (ROWS * 128) + k % 4 * 32) / 16,
                keys + (k / 4 * (TILE_N * 128) + k % 4 * 32) / 16, k > 0);
        wgmma_commit();
    }

    __device__ __forceinline__ void issue_sums() {
        const unsigned long long values = operand_mn(base + V_AT + v_ring.slot * KV_BYTES, TILE_N * 128);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < TILE_N / 16; ++k)
            Wgmma<HEAD_DIM>::rs(sums, weights + 4 * k, values + k * 2048 / 16, k > 0 ? 1 : more);
        wgmma_commit();
        more = 1;
    }

    __device__ __forceinline__ void wait_keys() { barrier_wait(base + K_FULL + 8 * k_ring.slot, k_ring.phase); }
    __device__ __forceinline__ void wait_values() { barrier_wait(base + V_FULL + 8 * v_ring.slot, v_ring.phase); }

    // Keeps the compilers from moving the softmax behind the wait for the values that it is to run beside: a wait for
    // what has been there all along is a branch, over which they do not move it.
    template <typename Values>
    __device__ __forceinline__ void hold(Values& values) {
        settle(values);
        settle(total);
        wait_values();
    }

    // To the assembler a product's operands in registers are dead once it is issued, and new weights might be put in
    // their place while it still reads them. A store that never happens keeps them until here.
    __device__ __forceinline__ void outlive() {
        unsigned all[4] = {};
#pragma unroll
        for (int i = 0; i < TILE_N / 4; ++i) all[i % 4] ^= weights[i];
        asm volatile(
            "{\n.reg .pred never;\nsetp.lt.s32 never, %0, 0;\n@never st.shared.v4.b32 [%1], {%2, %3, %4, %5};\n}" ::"r"(
                given.requests),
            "r"(base), "r"(all[0]), "r"(all[1]), "r"(all[2]), "r"(all[3])
            : "memory");
    }

    __device__ __forceinline__ void release_keys() {
        release(base + K_EMPTY + 8 * k_ring.slot);
        k_ring.advance();
    }

    __device__ __forceinline__ void release_values() {
        release(base + V_EMPTY + 8 * v_ring.slot);
        v_ring.advance();
    }

    // Whether some keys of a block are nobody's.
    __device__ __forceinline__ bool cut(const Work& work, int n) {
        return (n + 1) * TILE_N > work.length || (WINDOW && n * TILE_N < work.low);
    }

    // Zero times NaN is NaN: values of keys that are nobody's are cleared before they are multiplied. Every warpgroup
    // does it for itself; that another may be reading the same zeros does no harm.
    __device__ __forceinline__ void clear_values(const Work& work, int n) {
        if (!cut(work, n)) return;
        wait_values();
        const unsigned stage = base + V_AT + v_ring.slot * KV_BYTES;
        const int first = work.low - n * TILE_N, end = work.length - n * TILE_N;
        for (int piece = thread; piece < CHUNKS * TILE_N * 8; piece += WARPGROUP) {
            const int key = piece / 8 % TILE_N;
            if (key >= end || (WINDOW && key < first))
                asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(stage + piece * 16), "r"(0) : "memory");
        }
        proxy_fence();
        named_sync(1 + WARPGROUPS + group, WARPGROUP);
    }

    __device__ __forceinline__ void cap() {
        if (SOFTCAP) {
#pragma unroll
            for (int i = 0; i < TILE_N / 2; ++i) scores[i] = tanh_units(scores[i] * given.scale);
        }
    }

    __device__ __forceinline__ void mask(const Work& work, int n) {
        if (n <= work.whole_top && (!WINDOW || n >= work.whole_bottom)) return;
        const int column = n * TILE_N + thread % 4 * 2;  // of scores[0]
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int at = group * ROWS + row(r);
            int high = work.length - 1, position = work.position + at;
            if (CAUSAL) high = min(high, position);
            int low = WINDOW ? position - given.window + 1 : 0;
            bool node = false;
            const int* bits = nullptr;
            if (TREE) {
                node = at >= work.nodes && at < work.rows;
                if (node) {
                    bits = given.tree + (long long)(work.token + at) * given.words;
                    high = work.tail - 1;
                    if (WINDOW) {
                        int seen = 0;
                        const int nodes = work.length - work.tail;
                        for (int word = 0; word * 32 < nodes; ++word) {
                            const unsigned inside = nodes - word * 32 >= 32 ? ALL : (1u << (nodes - word * 32)) - 1;
                            seen += __popc(bits[word] & inside);
                        }
                        low = work.tail + seen - given.window;
                    }
                }
            }
            high -= column;
            low -= column;
#pragma unroll
            for (int b = 0; b < TILE_N / 8; ++b) {
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    bool seen = 8 * b + e <= high;
                    if (WINDOW) seen = seen && 8 * b + e >= low;
                    if (TREE && node) {
                        const int key = column + 8 * b + e - work.tail;
                        if (key >= 0 && key < work.length - work.tail) seen = bits[key / 32] >> key % 32 & 1;
                    }
                    float& score = scores[4 * b + 2 * r + e];
                    score = seen ? score : -INFINITE;
                }
            }
        }
    }

    // Whether a row's weights may be taken against an anchor that is so far below the row's peak, in powers of two. Any
    // anchor gives the same softmax as long as numbers stay in range; a fixed rule for each row keeps its bits its own.
    static __device__ __forceinline__ bool near(float distance) {
        return HALF ? distance <= 8.0f && distance >= -6.0f : fabsf(distance) <= 40.0f;
    }

    // What rounding to 16 bits adds to the weight of a score.
    __device__ __forceinline__ float excess(float score, float anchor) const {
        if (score == -INFINITE) return 0.0f;  // so has the row no anchor, perhaps
        const float unit = SOFTCAP ? given.cap : given.scale;
        const float weight = exp2_unit(fmaf(score, unit, -(anchor * unit)));
        return lower(pack(weight, 0.0f)) - weight;
    }

    // Weights against the anchor that the rows have (FIRST: against zero), without looking first: neither
    // exponentials nor sums wait for the peak of this block, which is only checked. Scores are left as they are.
    // Returns whether that was right for every row of the warp.
    template <bool FIRST>
    __device__ __forceinline__ bool quick_softmax(unsigned (&next)[TILE_N / 4]) {
        const float unit = SOFTCAP ? given.cap : given.scale;
        float sums_here[2][2] = {}, best[2][2];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            best[r][0] = FIRST ? -INFINITE : most[r];
            best[r][1] = -INFINITE;
        }
        const float anchor[2] = {FIRST ? 0.0f : peak[0] * unit, FIRST ? 0.0f : peak[1] * unit};
#pragma unroll
        for (int b = 0; b < TILE_N / 8; ++b) {
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                float power[2];
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    const float score = scores[4 * b + 2 * r + e];
                    best[r][e] = fmaxf(best[r][e], score);
                    power[e] = exp2_unit(fmaf(score, unit, -anchor[r]));
                    sums_here[r][e] += power[e];
                }
                next[2 * b + r] = pack(power[0], power[1]);
            }
        }
        bool right = true;
        float highest[2];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            highest[r] = fmaxf(best[r][0], best[r][1]);
            if (FIRST) {
                float row = fmaxf(highest[r], __shfl_xor_sync(ALL, highest[r], 1));
                row = fmaxf(row, __shfl_xor_sync(ALL, row, 2));
                right = right && near(row * unit);
            } else {
                right = right && near(fmaxf(fmaf(highest[r], unit, -anchor[r]), 0.0f));
            }
        }
        if (!__all_sync(ALL, right)) return false;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const float sum = sums_here[r][0] + sums_here[r][1];
            total[r] = FIRST ? sum : total[r] + sum;
            most[r] = highest[r];
            if (FIRST) peak[r] = 0.0f;
        }
        return true;
    }

    // The same with a look first. shrink: by what the sums so far have to be multiplied.
    template <bool FIRST>
    __device__ __forceinline__ void careful_softmax(unsigned (&next)[TILE_N / 4], float (&shrink)[2]) {
        const float unit = SOFTCAP ? given.cap : given.scale;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            float best = fmaxf(scores[2 * r], scores[2 * r + 1]);
#pragma unroll
            for (int b = 1; b < TILE_N / 8; ++b)
                best = fmaxf(best, fmaxf(scores[4 * b + 2 * r], scores[4 * b + 2 * r + 1]));
            const float highest = best;
            best = fmaxf(best, __shfl_xor_sync(ALL, best, 1));
            best = fmaxf(best, __shfl_xor_sync(ALL, best, 2));
            if (FIRST) {
                if (near(best * unit)) best = 0.0f;
            } else if (near(fmaxf(fmaf(best, unit, -(peak[r] * unit)), 0.0f)) || best == -INFINITE) {
                best = peak[r];
            }
            // A row that has seen nothing yet has no peak: -inf - -inf would be NaN.
            const float anchor = best == -INFINITE ? 0.0f : best * unit;
            if (FIRST) {
                total[r] = 0.0f;
                most[r] = highest;
            } else if (best == peak[r]) {
                shrink[r] = 1.0f;
                most[r] = fmaxf(most[r], highest);
            } else {
                shrink[r] = exp2_unit((peak[r] - best) * unit);
                total[r] = (total[r] + excess(most[r], peak[r])) * shrink[r];
                most[r] = highest;
            }
            peak[r] = best;
            float sum[2] = {};
#pragma unroll
            for (int b = 0; b < TILE_N / 8; ++b) {
                float power[2];
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    power[e] = exp2_unit(fmaf(scores[4 * b + 2 * r + e], unit, -anchor));
                    sum[e] += power[e];
                }
                next[2 * b + r] = pack(power[0], power[1]);
            }
            total[r] += sum[0] + sum[1];
        }
    }

    // A block of the same tile as the one before.
    template <bool MASKED>
    __device__ __forceinline__ void step(const Work& work, int n, int bottom) {
        if (MASKED) clear_values(work, n + 1);
        wait_keys();
        turn();
        issue_scores();
        wait_values();
        issue_sums();
        next_turn();
        wgmma_wait<1>();
        settle(scores);
        release_keys();
        if (n == bottom) release(q_empty);
        cap();
        if (MASKED) mask(work, n);
        unsigned next[TILE_N / 4];
        float shrink[2];
        const bool right = quick_softmax<false>(next);
        if (!right) careful_softmax<false>(next, shrink);
        hold(next);
        wgmma_wait<0>();
        settle(sums);
        outlive();
        settle(next);
        release_values();
        if (!right) {
#pragma unroll
            for (int i = 0; i < HEAD_DIM / 2; ++i) sums[i] *= shrink[i / 2 % 2];
        }
#pragma unroll
        for (int i = 0; i < TILE_N / 4; ++i) weights[i] = next[i];
    }

    // The first block of a tile. PENDING: the last block of the tile before is still to be added up and written out.
    template <bool PENDING>
    __device__ __forceinline__ void first_step(
        const Work& work, int n, int top, int bottom, const Work& before, void* out, float* lse) {
        if (PENDING) clear_values(before, before.bottom);
        wait_keys();
        turn();
        issue_scores();
        if (PENDING) {
            wait_values();
            issue_sums();
        }
        next_turn();
        wgmma_wait<PENDING ? 1 : 0>();
        settle(scores);
        release_keys();
        if (n == bottom) release(q_empty);
        cap();
        mask(work, n);
        const Rows last{{peak[0], peak[1]}, {total[0], total[1]}, {most[0], most[1]}};
        unsigned next[TILE_N / 4];
        float none[2];
        if (!quick_softmax<true>(next)) careful_softmax<true>(next, none);
        if (PENDING) {
            hold(next);
            wgmma_wait<0>();
            settle(sums);
            outlive();
            settle(next);
            release_values();
            finish(before, last, out, lse);
            if (n < top) {
                wait_values();
                release_values();
            }
        }
#pragma unroll
        for (int i = 0; i < TILE_N / 4; ++i) weights[i] = next[i];
        more = 0;
    }

    // Divides by the sum of weights and writes a tile: four neighbouring threads exchange their columns, so that each
    // stores 16 bytes of a row.
    __device__ __forceinline__ void finish(const Work& work, const Rows& last, void* out, float* lse) {
        const float unit = SOFTCAP ? given.cap : given.scale;
        const int lane = thread % 32;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int at = group * ROWS + row(r);
            const bool live = at < work.rows;
            const long long place = (long long)(work.token + at) * given.heads + work.head;
            float divisor = over_row(last.total[r] + excess(last.most[r], last.peak[r]));
            const bool nothing = divisor == 0.0f;
            if (LSE) {
                const float all = over_row(last.total[r]);
                float log = nothing ? -INFINITE : last.peak[r] * unit + log2_unit(all);  // to base 2
                if (SINKS) {
                    const float sink = given.sinks[work.head] * LOG2_E;
                    const float higher = fmaxf(log, sink);
                    log = higher + log2_unit(exp2_unit(log - higher) + exp2_unit(sink - higher));
                }
                if (live && lane % 4 == 0) lse[place] = log * LN_2;
            }
            // Infinite where the sink leaves nothing to the others.
            if (SINKS) divisor += exp2_unit(given.sinks[work.head] * LOG2_E - last.peak[r] * unit);
            store(out, place, live, nothing ? 0.0f : inverse_unit(divisor), r);
        }
    }

    __device__ __forceinline__ void store(void* out, long long place, bool live, float factor, int r) {
        const int lane = thread % 32;
        char* to = static_cast<char*>(out) + place * (HEAD_DIM * 2) + lane % 4 * 16;
#pragma unroll
        for (int b = 0; b < HEAD_DIM / 8; b += 4) {
            unsigned part[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float* pair = sums + 4 * (b + i) + 2 * r;
                part[i] = pack(pair[0] * factor, pair[1] * factor);
            }
            // Thread q of four holds column pair q of 8-column blocks 0 .. 3 and wants all pairs of block q.
#pragma unroll
            for (int distance = 1; distance < 4; distance *= 2) {
                const bool upper = lane & distance;
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    if (i & distance) continue;
                    const unsigned given_away = upper ? part[i] : part[i + distance];
                    const unsigned received = __shfl_xor_sync(ALL, given_away, distance);
                    if (upper) part[i] = received; else part[i + distance] = received;
                }
            }
            if (live)
                asm volatile(
                    "st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to + b * 16), "r"(part[0]), "r"(part[1]),
                    "r"(part[2]), "r"(part[3])
                    : "memory");
        }
    }

    // Rows that see nothing: zeros, and the logarithm of nothing (or of the sink).
    __device__ __forceinline__ void write_nothing(const Work& work, void* out, float* lse) {
        for (int piece = thread; piece < ROWS * (HEAD_DIM / 8); piece += WARPGROUP) {
            const int at = group * ROWS + piece / (HEAD_DIM / 8);
            if (at >= work.rows) break;
            const long long place = (long long)(work.token + at) * given.heads + work.head;
            char* to = static_cast<char*>(out) + place * (HEAD_DIM * 2) + piece % (HEAD_DIM / 8) * 16;
            asm volatile("st.global.v4.b32 [%0], {%1, %1, %1, %1};" ::"l"(to), "r"(0) : "memory");
            if (LSE && piece % (HEAD_DIM / 8) == 0) lse[place] = SINKS ? given.sinks[work.head] : -INFINITE;
        }
    }

    // The last block of a tile after which nothing follows at once.
    __device__ __forceinline__ void flush(const Work& work, void* out, float* lse) {
        clear_values(work, work.bottom);
        wait_values();
        issue_sums();
        wgmma_wait<0>();
        settle(sums);
        release_values();
        finish(work, {{peak[0], peak[1]}, {total[0], total[1]}, {most[0], most[1]}}, out, lse);
    }

    __device__ __forceinline__ void run(const char* shared, void* out, float* lse) {
        const Work* works = reinterpret_cast<const Work*>(shared + WORK_AT);
        if (PING_PONG && group == WARPGROUPS - 1) next_turn();
        more = 0;
        bool pending = false;  // the last block of the tile before
        for (unsigned tile = 0;; ++tile) {
            const unsigned queries = q_ring.slot * WARPGROUPS + group;
            barrier_wait(base + Q_FULL + 8 * queries, q_ring.phase);
            q_address = base + Q_AT + queries * Q_BYTES;
            q_empty = base + Q_EMPTY + 8 * queries;
            q_ring.advance();
            const Work& work = works[tile % WORKS];
            // Alike in all lanes, which the compiler is told by way of a shuffle.
            const int kind = __shfl_sync(ALL, work.kind, 0);
            // Blocks that no row of this warpgroup sees are let pass, all but one.
            const Work& before = works[(tile - 1) % WORKS];
            const int top = __shfl_sync(ALL, work.top, 0), bottom = __shfl_sync(ALL, work.bottom, 0);
            const int rows = min(work.rows, (group + 1) * ROWS);
            int n = CAUSAL ? min(work.position + rows, work.length) - 1 : top * TILE_N;
            if (rows <= group * ROWS) n = 0;
            n = __shfl_sync(ALL, min(max(n / TILE_N, bottom), top), 0);
            if (!FLUSH && pending && (kind != WORK || top - n > 1)) {  // nothing follows at once
                flush(before, out, lse);
                pending = false;
            }
            if (kind == STOP) break;
            if (kind == NOTHING_SEEN) {
                release(q_empty);
                write_nothing(work, out, lse);
                continue;
            }
            for (int passed = top; passed > n; --passed) {
                wait_keys();
                turn();
                next_turn();
                release_keys();
                if (!pending) {
                    wait_values();
                    release_values();
                }
            }
            if (!FLUSH && pending)
                first_step<true>(work, n, top, bottom, before, out, lse);
            else
                first_step<false>(work, n, top, bottom, before, out, lse);
            --n;
            // The second block takes the masked loop also where the first one's values were cut.
            pending = !FLUSH;
            int masked = __shfl_sync(ALL, max(work.whole_top + 1, bottom), 0);
            if (__shfl_sync(ALL, cut(work, n + 1), 0)) masked = min(masked, max(n, bottom));
            for (; n >= masked; --n) step<true>(work, n, bottom);
            const int whole = WINDOW ? __shfl_sync(ALL, max(work.whole_bottom, bottom), 0) : bottom;
            for (; n >= whole; --n) step<false>(work, n, bottom);
            if (WINDOW) {
                for (; n >= bottom; --n) step<true>(work, n, bottom);
            }
            if (FLUSH) flush(work, out, lse);
        }
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, 1) attention_sm90(
    const __grid_constant__ TensorMap q, const __grid_constant__ TensorMap k, const __grid_constant__ TensorMap v,
    void* out, float* lse, const int* query_starts, const int* lengths, const int* key_starts, const int* tables,
    const int* tree, const int* tails, const float* sinks, int* counter, int table_stride, int words, int requests,
    int heads, int group, int window, float scale, float cap) {
    extern __shared__ __align__(1024) char shared[];
    const unsigned base = shared_address(shared);
    const Arguments given = {query_starts, lengths, key_starts, tables, tree,  tails,  sinks,
                             table_stride, words,   requests,   heads,  group, window, scale, cap};
    if (threadIdx.x == 0) {
        prefetch_map(q);
        prefetch_map(k);
        prefetch_map(v);
        for (int i = 0; i < Q_STAGES * WARPGROUPS; ++i) {
            barrier_init(base + Q_FULL + 8 * i, 1);
            barrier_init(base + Q_EMPTY + 8 * i, 4);
        }
        for (int i = 0; i < STAGES; ++i) {
            barrier_init(base + K_FULL + 8 * i, 1);
            barrier_init(base + K_EMPTY + 8 * i, 4 * WARPGROUPS);
            barrier_init(base + V_FULL + 8 * i, 1);
            barrier_init(base + V_EMPTY + 8 * i, 4 * WARPGROUPS);
        }
        barrier_init_fence();
    }
    __syncthreads();
    const int warpgroup = __shfl_sync(ALL, threadIdx.x / WARPGROUP, 0);
    if (warpgroup == 0) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(PRODUCER_REGISTERS));
        if (threadIdx.x < 32) {
            Producer producer{q, k, v, given, base};
            producer.run(counter, shared);
        }
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(CONSUMER_REGISTERS));
        Consumer consumer{given, base, warpgroup - 1, (int)threadIdx.x % WARPGROUP};
        consumer.run(shared, out, lse);
    }
}
