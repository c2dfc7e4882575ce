// FlashAttention-2 (Dao 2023, 2307.08691) on mma.sync: sm_80 and later.
//
// A block of WARPS warps takes a tile of ROWS rows of one head, and walks over the keys that they see in tiles of
// KEYS. What the paper changed against Algorithm 1, and where it is here:
//   - queries outside, keys inside: a row's sums of values stay in registers, nothing is carried through memory;
//   - sums of values stay unscaled until the end, and only the logarithm of the sum of exponentials is kept;
//   - tiles of rows are spread over blocks too, not only requests and heads;
//   - rows are split over warps, so that warps exchange nothing.
// Keys are walked from the last to the first: tiles that a mask cuts come first, and only they are masked.
//
// Defines: BF16, HEAD_DIM, ROWS, KEYS, WARPS, STAGES (tiles of keys in flight: 1 loads values while scores are
// computed and keys while values are added up; 2 loads a whole step ahead), BLOCKS (blocks that share a
// multiprocessor), CAUSAL, WINDOWED, SOFTCAP, TREE, PAGE.
#include "paged.cuh"
#include "schedule.cuh"
#include "softmax.cuh"
#include "tile.cuh"

constexpr int THREADS = 32 * WARPS;
constexpr int STRIPS = ROWS / (16 * WARPS);  // of 16 rows, a warp
constexpr int WARP_ROWS = 16 * STRIPS;
constexpr int STEPS = HEAD_DIM / 16;
constexpr float SLACK = 8.0f;
constexpr bool ALWAYS = HEAD_DIM > 192;  // a branch costs more there than what it saves
using QueryTile = Tile<ROWS, HEAD_DIM>;
using KeyTile = Tile<KEYS, HEAD_DIM>;
static_assert(ROWS % (16 * WARPS) == 0 && KEYS % 16 == 0, "tiles are made of 16 x 16 squares");

using QueryShare = Share<THREADS, ROWS, HEAD_DIM>;
using KeyShare = Share<THREADS, KEYS, HEAD_DIM>;

// Copy keys (or values) tile * KEYS ... into shared memory. Bounded: those before `low` and from `length` on become
// zeros and are not read; else all are real, as they are in every tile but the last if there is no window.
template <bool Bounded>
__device__ __forceinline__ void fetch(word32 to, const word16* pool, const Keys<PAGE>& keys, int tile, int low, int length) {
    int key = tile * KEYS, row = KeyShare::row();
    if (PAGE % KEYS == 0) {  // contiguous, or all of one page
        const word16* source = pool + keys.offset(key) + row * keys.slot_stride + KeyShare::column();
        int64 step = KeyShare::STRIDE * keys.slot_stride;
#pragma unroll
        for (int copy = 0; copy < KeyShare::COPIES; copy++, source += step) {
            int place = key + row + copy * KeyShare::STRIDE;
            bool real = !Bounded || (place >= low && place < length);
#pragma unroll
            for (int piece = 0; piece < KeyShare::PIECES; piece++) {
                word32 target = to + KeyShare::offset(copy, piece);
                if (Bounded) copy_async(target, real ? source + piece * KeyShare::LANES * 8 : pool, real);
                else copy_async(target, source + piece * KeyShare::LANES * 8);
            }
        }
    } else {
#pragma unroll
        for (int copy = 0; copy < KeyShare::COPIES; copy++) {
            int place = key + row + copy * KeyShare::STRIDE;
            bool real = !Bounded || (place >= low && place < length);
            const word16* source = pool + (real ? keys.offset(place) + KeyShare::column() : 0);
#pragma unroll
            for (int piece = 0; piece < KeyShare::PIECES; piece++)
                copy_async(to + KeyShare::offset(copy, piece), source + (real ? piece * KeyShare::LANES * 8 : 0), real);
        }
    }
}

// A warp's scores of a tile, and its sums of values: squares of 16 x 8 as mma leaves them.
typedef float Scores[STRIPS][KEYS / 8][4];
typedef float Sums[STRIPS][HEAD_DIM / 8][4];
using QueryLane = Lane<ROWS, HEAD_DIM>;
using KeyLane = Lane<KEYS, HEAD_DIM>;

struct Row {
    float peak, sum;
};

__device__ __forceinline__ void score(Scores& scores, const QueryLane& queries, const KeyLane& keys, word32 stage) {
#pragma unroll
    for (int strip = 0; strip < STRIPS; strip++)
#pragma unroll
        for (int column = 0; column < KEYS / 8; column++)
#pragma unroll
            for (int i = 0; i < 4; i++) scores[strip][column][i] = 0.0f;
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
        word32 left[STRIPS][4];
#pragma unroll
        for (int strip = 0; strip < STRIPS; strip++) load_matrices(left[strip], queries.at(strip, step));
#pragma unroll
        for (int column = 0; column < KEYS / 16; column++) {
            word32 right[4];
            load_matrices(right, keys.at(column, step) + stage);
#pragma unroll
            for (int strip = 0; strip < STRIPS; strip++) {
                multiply(scores[strip][column * 2], left[strip], right[0], right[1]);
                multiply(scores[strip][column * 2 + 1], left[strip], right[2], right[3]);
            }
        }
    }
}

__device__ __forceinline__ void cap_scores(Scores& scores, float cap) {
#pragma unroll
    for (int strip = 0; strip < STRIPS; strip++)
#pragma unroll
        for (int column = 0; column < KEYS / 8; column++)
#pragma unroll
            for (int i = 0; i < 4; i++) scores[strip][column][i] = tanh_exact(scores[strip][column][i] * cap);
}

// Scores to exponentials, and what was added up so far brought to a new peak.
//
// A peak follows the greatest score only when that has risen by 2^SLACK (FlashAttention-4): until then weights are
// above one, which is exact in the end, since sums are divided by the sum of the same weights. What a row gets does
// not depend on its neighbours: a factor of one changes nothing.
template <bool Masked>
__device__ __forceinline__ void soften(Scores& scores, Sums& sums, Row (&state)[STRIPS][2], float factor) {
    float shrink[STRIPS][2];
    bool any = false;
#pragma unroll
    for (int strip = 0; strip < STRIPS; strip++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            Row& row = state[strip][half];
            float peak = row.peak;
#pragma unroll
            for (int column = 0; column < KEYS / 8; column++)
                peak = fmaxf(peak, fmaxf(scores[strip][column][half * 2], scores[strip][column][half * 2 + 1]));
            peak = quad_max(peak);
            bool risen = (peak - row.peak) * factor > SLACK;  // not if nothing has been seen: NaN
            shrink[strip][half] = risen ? exp2_fast((row.peak - peak) * factor) : 1.0f;
            if (risen) row.peak = peak;
            any = any || risen;
        }
    if (ALWAYS || __any_sync(0xffffffffu, any)) {
#pragma unroll
        for (int strip = 0; strip < STRIPS; strip++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                state[strip][half].sum *= shrink[strip][half];
#pragma unroll
                for (int column = 0; column < HEAD_DIM / 8; column++) {
                    sums[strip][column][half * 2] *= shrink[strip][half];
                    sums[strip][column][half * 2 + 1] *= shrink[strip][half];
                }
            }
    }
#pragma unroll
    for (int strip = 0; strip < STRIPS; strip++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            Row& row = state[strip][half];
            // A row that has seen nothing yet has no finite peak: -infinity - -infinity would be NaN.
            float level = (Masked && row.peak == -infinity() ? 0.0f : row.peak) * factor;
#pragma unroll
            for (int column = 0; column < KEYS / 8; column++)
#pragma unroll
                for (int i = half * 2; i < half * 2 + 2; i++) {
                    float weight = exp2_fast(scores[strip][column][i] * factor - level);
                    scores[strip][column][i] = weight;
                    row.sum += weight;
                }
        }
}

// Weights, rounded to 16 bits, times values.
__device__ __forceinline__ void add(Sums& sums, const Scores& weights, const KeyLane& values, word32 stage) {
#pragma unroll
    for (int step = 0; step < KEYS / 16; step++) {
        word32 left[STRIPS][4];
#pragma unroll
        for (int strip = 0; strip < STRIPS; strip++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float* pair = &weights[strip][step * 2 + i / 2][i % 2 * 2];
                left[strip][i] = pack(pair[0], pair[1]);
            }
#pragma unroll
        for (int column = 0; column < HEAD_DIM / 16; column++) {
            word32 right[4];
            load_matrices_transposed(right, values.at(step, column) + stage);
#pragma unroll
            for (int strip = 0; strip < STRIPS; strip++) {
                multiply(sums[strip][column * 2], left[strip], right[0], right[1]);
                multiply(sums[strip][column * 2 + 1], left[strip], right[2], right[3]);
            }
        }
    }
}

template <bool Value>
struct Flag {
    static constexpr bool value = Value;
};

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) attention_v2(
    const word16* q, const word16* k, const word16* v, word16* out, float* lse, const int* tables,
    const int* query_starts, const int* lengths, const int* key_starts, const float* sinks, const int* tree,
    const int* tails, int requests, int workers, int heads, int group, int window, int words, int64 table_stride,
    int64 q_token_stride, int64 q_head_stride, int64 page_stride, int64 key_head_stride, int64 slot_stride,
    float factor, float cap) {
    extern __shared__ __align__(128) unsigned char shared[];
    word32 q_tile = shared_address(shared), k_tiles = q_tile + QueryTile::BYTES;
    word32 v_tiles = k_tiles + STAGES * KeyTile::BYTES;
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int head = blockIdx.x % heads, kv_head = head / group;
    int first_row = warp * WARP_ROWS;
    auto query_lane = Lane<ROWS, HEAD_DIM>::left(q_tile, first_row, lane);
    auto key_lane = Lane<KEYS, HEAD_DIM>::columns(k_tiles, lane);
    auto value_lane = Lane<KEYS, HEAD_DIM>::rows(v_tiles, lane);
    Batch batch = {query_starts, lengths, key_starts, TREE ? tails : nullptr, requests};

    for (int number = blockIdx.x / heads;; number += workers) {
        Place place = find<ROWS>(batch, number);
        if (place.index < 0) return;
        const Request request = place.request;
        int rows = min(ROWS, request.rows - place.row);
        Range tiles = range<CAUSAL, WINDOWED, TREE, KEYS>(request, place.row, place.row + rows, window);
        Keys<PAGE> keys = {tables + place.index * table_stride, kv_head * key_head_stride, page_stride, slot_stride};
        if (PAGE == 0) keys.start += request.key * slot_stride;

        const word16* query = q + (request.first + place.row) * q_token_stride + head * q_head_stride;
#pragma unroll
        for (int copy = 0; copy < QueryShare::COPIES; copy++) {
            int row = QueryShare::row() + copy * QueryShare::STRIDE;
            const word16* source = query + (row < rows ? row * q_token_stride + QueryShare::column() : 0);
#pragma unroll
            for (int piece = 0; piece < QueryShare::PIECES; piece++)
                copy_async(q_tile + QueryShare::offset(copy, piece), source + piece * QueryShare::LANES * 8, row < rows);
        }
        int tile = tiles.last - 1;
        if (tile >= tiles.first) fetch<true>(k_tiles, k, keys, tile, tiles.low, request.length);
        copy_commit();
        if (tile >= tiles.first) fetch<true>(v_tiles, v, keys, tile, tiles.low, request.length);
        copy_commit();

        Sums sums;
        Row state[STRIPS][2];
#pragma unroll
        for (int strip = 0; strip < STRIPS; strip++) {
            state[strip][0] = state[strip][1] = {-infinity(), 0.0f};
#pragma unroll
            for (int column = 0; column < HEAD_DIM / 8; column++)
#pragma unroll
                for (int i = 0; i < 4; i++) sums[strip][column][i] = 0.0f;
        }
        word32 stage = 0;

        auto walk = [&](auto masked) {
            Scores scores;
            if (STAGES > 1) {
                // This step's tiles are there; everyone is done with the step before, whose place the next one takes.
                copy_wait<0>();
                __syncthreads();
                if (tile > tiles.first) {
                    fetch<WINDOWED>(k_tiles + (stage ^ KeyTile::BYTES), k, keys, tile - 1, tiles.low, request.length);
                    fetch<WINDOWED>(v_tiles + (stage ^ KeyTile::BYTES), v, keys, tile - 1, tiles.low, request.length);
                    copy_commit();
                }
            } else if (tile == tiles.last - 1) {
                copy_wait<1>();
                __syncthreads();
            } else {
                copy_wait<0>();
                __syncthreads();
                fetch<WINDOWED>(v_tiles, v, keys, tile, tiles.low, request.length);
                copy_commit();
            }
            score(scores, query_lane, key_lane, stage);
            if (STAGES == 1) {
                copy_wait<0>();
                __syncthreads();
                if (tile > tiles.first) {
                    fetch<WINDOWED>(k_tiles, k, keys, tile - 1, tiles.low, request.length);
                    copy_commit();
                }
            }
            if (SOFTCAP) cap_scores(scores, cap);
            if (masked.value) {
#pragma unroll
                for (int strip = 0; strip < STRIPS; strip++)
#pragma unroll
                    for (int half = 0; half < 2; half++) {
                        int row = place.row + first_row + strip * 16 + half * 8 + lane / 4;
                        const int* bits = tree + (int64)(request.first + row) * words;
                        Sight<CAUSAL, WINDOWED, TREE> sight(request, row, window, bits);
#pragma unroll
                        for (int column = 0; column < KEYS / 8; column++)
#pragma unroll
                            for (int i = 0; i < 2; i++)
                                if (!sight.sees(tile * KEYS + column * 8 + lane % 4 * 2 + i))
                                    scores[strip][column][half * 2 + i] = -infinity();
                    }
            }
            soften<masked.value>(scores, sums, state, factor);
            add(sums, scores, value_lane, stage);
            if (STAGES > 1) stage ^= KeyTile::BYTES;
        };
        if (WINDOWED) {
            for (; tile >= tiles.first; tile--)
                if (tile >= tiles.whole_last || tile < tiles.whole_first) walk(Flag<true>());
                else walk(Flag<false>());
        } else {
            for (; tile >= max(tiles.first, tiles.whole_last); tile--) walk(Flag<true>());
            for (; tile >= tiles.first; tile--) walk(Flag<false>());
        }

        // Rows leave through the place of their own queries, so that stores are 16 bytes wide.
        float sink = sinks == nullptr ? -infinity() : sinks[head];
        copy_wait<0>();
        if (tiles.last <= tiles.first) __syncthreads();  // otherwise all queries have arrived long ago
#pragma unroll
        for (int strip = 0; strip < STRIPS; strip++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                int row = first_row + strip * 16 + half * 8 + lane / 4;
                Total total = finish(state[strip][half].peak, quad_sum(state[strip][half].sum), factor, sink);
                if (lse != nullptr && row < rows && lane % 4 == 0)
                    lse[(int64)(request.first + place.row + row) * heads + head] = total.lse;
#pragma unroll
                for (int column = 0; column < HEAD_DIM / 8; column++) {
                    word32 pair = pack(sums[strip][column][half * 2] * total.scale, sums[strip][column][half * 2 + 1] * total.scale);
                    *reinterpret_cast<word32*>(shared + QueryTile::offset(row, column) + lane % 4 * 4) = pair;
                }
            }
        __syncwarp();
        word16* target = out + ((int64)(request.first + place.row) * heads + head) * HEAD_DIM;
#pragma unroll
        for (int index = lane; index < WARP_ROWS * QueryTile::PIECES; index += 32) {
            int row = first_row + index / QueryTile::PIECES, piece = index % QueryTile::PIECES;
            if (row < rows)
                *reinterpret_cast<uint4*>(target + (int64)row * heads * HEAD_DIM + piece * 8) =
                    *reinterpret_cast<const uint4*>(shared + QueryTile::offset(row, piece));
        }
        __syncthreads();
    }
}
