// FlashAttention's Algorithm 1 (Dao et al. 2022, 2205.14135), kept as the paper and the EE451 report have it.
//
// A block takes one request and one head: nothing else is spread over the GPU. Outside go blocks of BC keys and
// values, inside blocks of BR queries; O, l and m of every row are carried through memory from one block of keys to
// the next. Keys and values are split over the warps, so each warp holds a part of a row's scores, and the parts of
// its peak, of its sum and of its output meet in shared memory (what FlashAttention-2 calls split-K and does away
// with). A block of queries is worked off in strips of 16 rows, which is what mma.sync multiplies.
//
// Numbers in brackets are the lines of Algorithm 1. Two departures: what line 2 would set to zero is not read, and a
// row's output is written in 16 bits when its last block of keys is done; in between O is carried in fp32.
//
// Defines: BF16, HEAD_DIM, BC, BR, CAUSAL.
#include "mask.cuh"
#include "softmax.cuh"
#include "tile.cuh"

constexpr int WARPS = 4;
constexpr int THREADS = 32 * WARPS;
constexpr int SLICE = BC / WARPS;  // keys of a warp
constexpr int PADDED = HEAD_DIM + 8;  // fp32 rows of the exchange: eight rows lie in different banks
constexpr int LANES = THREADS / 16;  // threads that put one row together
constexpr int PARTS = HEAD_DIM / LANES / 4;  // each in so many pieces of 4 numbers
using QueryTile = Tile<BR, HEAD_DIM>;
using KeyTile = Tile<BC, HEAD_DIM>;
static_assert(BC % (16 * WARPS) == 0 && BR % 16 == 0, "strips and slices are made of 16 x 16 squares");

struct Exchange {
    float outputs[WARPS][16][PADDED];
    float peaks[WARPS][16], sums[WARPS][16];
};

// Copy rows [0, limit) of a matrix into a tile in shared memory; the rest becomes zeros.
template <int Rows>
__device__ __forceinline__ void fetch(word32 to, const word16* from, int64 stride, int limit) {
    using Copies = Share<THREADS, Rows, HEAD_DIM>;
#pragma unroll 4
    for (int copy = 0; copy < Copies::COPIES; copy++) {
        int row = Copies::row() + copy * Copies::STRIDE;
        const word16* source = from + (row < limit ? row * stride + Copies::column() : 0);
#pragma unroll
        for (int piece = 0; piece < Copies::PIECES; piece++)
            copy_async(to + Copies::offset(copy, piece), source + piece * Copies::LANES * 8, row < limit);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) attention_v1(
    const word16* q, const word16* k, const word16* v, word16* out, float* lse, float* carried, float* carried_sums,
    float* carried_peaks, const int* query_starts, const int* lengths, const int* key_starts, int heads, int group,
    int64 q_token_stride, int64 q_head_stride, int64 key_stride, int64 key_head_stride, float factor) {
    extern __shared__ __align__(128) unsigned char shared[];
    word32 q_tile = shared_address(shared), k_tile = q_tile + QueryTile::BYTES, v_tile = k_tile + KeyTile::BYTES;
    Exchange& exchange = *reinterpret_cast<Exchange*>(shared + QueryTile::BYTES + 2 * KeyTile::BYTES);
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int head = blockIdx.x % heads, index = blockIdx.x / heads;
    Request request;
    request.first = query_starts[index];
    request.rows = query_starts[index + 1] - request.first;
    request.length = request.tail = lengths[index];
    request.key = key_starts[index];
    if (request.rows <= 0) return;
    const word16* keys = k + request.key * key_stride + head / group * key_head_stride;
    const word16* values = v + request.key * key_stride + head / group * key_head_stride;

    auto query_lane = Lane<BR, HEAD_DIM>::left(q_tile, 0, lane);
    auto key_lane = Lane<BC, HEAD_DIM>::columns(k_tile, lane);
    auto value_lane = Lane<BC, HEAD_DIM>::rows(v_tile, lane);
    int member = threadIdx.x / LANES, place = threadIdx.x % LANES * 4;  // the row and numbers this thread puts together

    int key_blocks = max((request.length + BC - 1) / BC, 1), query_blocks = (request.rows + BR - 1) / BR;
    for (int j = 0; j < key_blocks; j++) {  // [5]
        __syncthreads();
        fetch<BC>(k_tile, keys + (int64)j * BC * key_stride, key_stride, request.length - j * BC);  // [6]
        fetch<BC>(v_tile, values + (int64)j * BC * key_stride, key_stride, request.length - j * BC);
        copy_commit();
        for (int i = 0; i < query_blocks; i++) {  // [7]
            int rows = min(BR, request.rows - i * BR);
            Range seen = range<CAUSAL, false, false, BC>(request, i * BR, i * BR + rows, 0);
            int last = max(seen.last - 1, 0);  // the last block of keys that matters to these rows
            if (j > last) continue;
            __syncthreads();
            const word16* query = q + (int64)(request.first + i * BR) * q_token_stride + head * q_head_stride;
            fetch<BR>(q_tile, query, q_token_stride, rows);  // [8]
            copy_commit();
            copy_wait<0>();
            __syncthreads();
            for (int strip = 0; strip < (rows + 15) / 16; strip++) {
                int row = i * BR + strip * 16 + member;
                bool real = row < request.rows;
                int64 number = (int64)(request.first + row) * heads + head;
                float peak = -infinity(), sum = 0.0f;
                float4 output[PARTS];
#pragma unroll
                for (int part = 0; part < PARTS; part++) output[part] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
                if (j > 0 && real) {  // [8]
                    peak = carried_peaks[number];
                    sum = carried_sums[number];
#pragma unroll
                    for (int part = 0; part < PARTS; part++)
                        output[part] = *reinterpret_cast<const float4*>(carried + number * HEAD_DIM + part * LANES * 4 + place);
                }

                float scores[SLICE / 8][4];  // [9] this warp's keys
#pragma unroll
                for (int column = 0; column < SLICE / 8; column++)
#pragma unroll
                    for (int n = 0; n < 4; n++) scores[column][n] = 0.0f;
#pragma unroll
                for (int step = 0; step < HEAD_DIM / 16; step++) {
                    word32 left[4];
                    load_matrices(left, query_lane.at(strip, step));
#pragma unroll
                    for (int column = 0; column < SLICE / 16; column++) {
                        word32 right[4];
                        load_matrices(right, key_lane.at(warp * (SLICE / 16) + column, step));
                        multiply(scores[column * 2], left, right[0], right[1]);
                        multiply(scores[column * 2 + 1], left, right[2], right[3]);
                    }
                }

                float tops[2];  // [10] peaks of this warp's keys, for rows lane / 4 and lane / 4 + 8 of the strip
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    int mine = lane / 4 + half * 8;
                    Sight<CAUSAL, false, false> sight(request, i * BR + strip * 16 + mine, 0, nullptr);
                    float top = -infinity();
#pragma unroll
                    for (int column = 0; column < SLICE / 8; column++)
#pragma unroll
                        for (int n = half * 2; n < half * 2 + 2; n++) {
                            int key = j * BC + warp * SLICE + column * 8 + lane % 4 * 2 + n % 2;
                            if (!sight.sees(key)) scores[column][n] = -infinity();
                            top = fmaxf(top, scores[column][n]);
                        }
                    top = quad_max(top);
                    if (lane % 4 == 0) exchange.peaks[warp][mine] = top;
                }
                __syncthreads();
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    int mine = lane / 4 + half * 8;
                    tops[half] = exchange.peaks[0][mine];
#pragma unroll
                    for (int other = 1; other < WARPS; other++) tops[half] = fmaxf(tops[half], exchange.peaks[other][mine]);
                    float level = tops[half] == -infinity() ? 0.0f : tops[half] * factor, total = 0.0f;
#pragma unroll
                    for (int column = 0; column < SLICE / 8; column++)
#pragma unroll
                        for (int n = half * 2; n < half * 2 + 2; n++) {
                            scores[column][n] = exp2_fast(scores[column][n] * factor - level);
                            total += scores[column][n];
                        }
                    total = quad_sum(total);
                    if (lane % 4 == 0) exchange.sums[warp][mine] = total;
                }

                float products[HEAD_DIM / 8][4];  // this warp's part of P V
#pragma unroll
                for (int column = 0; column < HEAD_DIM / 8; column++)
#pragma unroll
                    for (int n = 0; n < 4; n++) products[column][n] = 0.0f;
#pragma unroll
                for (int step = 0; step < SLICE / 16; step++) {
                    word32 left[4];
#pragma unroll
                    for (int n = 0; n < 4; n++) {
                        const float* pair = &scores[step * 2 + n / 2][n % 2 * 2];
                        left[n] = pack(pair[0], pair[1]);
                    }
#pragma unroll
                    for (int column = 0; column < HEAD_DIM / 16; column++) {
                        word32 right[4];
                        load_matrices_transposed(right, value_lane.at(warp * (SLICE / 16) + step, column));
                        multiply(products[column * 2], left, right[0], right[1]);
                        multiply(products[column * 2 + 1], left, right[2], right[3]);
                    }
                }
#pragma unroll
                for (int column = 0; column < HEAD_DIM / 8; column++)
#pragma unroll
                    for (int half = 0; half < 2; half++)
                        *reinterpret_cast<float2*>(&exchange.outputs[warp][lane / 4 + half * 8][column * 8 + lane % 4 * 2]) =
                            make_float2(products[column][half * 2], products[column][half * 2 + 1]);
                __syncthreads();

                float top = -infinity(), total = 0.0f;  // [11] of all keys of the block, for this thread's row
#pragma unroll
                for (int other = 0; other < WARPS; other++) {
                    top = fmaxf(top, exchange.peaks[other][member]);
                    total += exchange.sums[other][member];
                }
                float new_peak = fmaxf(peak, top);
                float level = new_peak == -infinity() ? 0.0f : new_peak;
                float old_weight = exp2_fast((peak - level) * factor) * sum, new_weight = exp2_fast((top - level) * factor);
                float new_sum = old_weight + new_weight * total;
                float scale = new_sum > 0.0f ? 1.0f / new_sum : 0.0f;
#pragma unroll
                for (int part = 0; part < PARTS; part++) {  // [12]
                    float4 added = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
                    for (int other = 0; other < WARPS; other++) {
                        float4 one = *reinterpret_cast<const float4*>(&exchange.outputs[other][member][part * LANES * 4 + place]);
                        added.x += one.x, added.y += one.y, added.z += one.z, added.w += one.w;
                    }
                    float old_part = old_weight * scale, new_part = new_weight * scale;
                    float4& sums = output[part];
                    sums.x = old_part * sums.x + new_part * added.x;
                    sums.y = old_part * sums.y + new_part * added.y;
                    sums.z = old_part * sums.z + new_part * added.z;
                    sums.w = old_part * sums.w + new_part * added.w;
                    if (!real) continue;
                    int64 at = number * HEAD_DIM + part * LANES * 4 + place;
                    if (j == last) *reinterpret_cast<uint2*>(out + at) = make_uint2(pack(sums.x, sums.y), pack(sums.z, sums.w));
                    else *reinterpret_cast<float4*>(carried + at) = sums;
                }
                if (real && place == 0) {  // [13]
                    if (j < last) {
                        carried_peaks[number] = new_peak;
                        carried_sums[number] = new_sum;
                    } else if (lse != nullptr) {
                        lse[number] = new_sum > 0.0f ? (level * factor + log2_fast(new_sum)) * LN_2 : -infinity();
                    }
                }
                __syncthreads();  // the next strip takes the exchange; what was carried can be seen by all
            }
        }
    }
}
