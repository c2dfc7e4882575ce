// Who does what: tiles of rows are numbered request by request, each request's last tile first.
//
// Numbers follow from the requests' starts, which only the device has read. Late tiles of a causal request see the
// most keys, so they come first: no long one is left for the end.
#pragma once
#include "mask.cuh"

// Calls of a request's tensors that find it; null where a feature is not used.
struct Batch {
    const int* query_starts;
    const int* lengths;
    const int* key_starts;
    const int* tails;
    int requests;
};

// The request that owns tile number `tile` of Rows rows, and the tile's first row in it; request -1 if there are
// fewer tiles. All lanes of a warp call this together and get the same answer.
struct Place {
    int index, row;
    Request request;
};

template <int Rows>
__device__ __forceinline__ Place find(const Batch& batch, int tile) {
    int lane = threadIdx.x % 32;
    Place place;
    place.index = -1;
    int before = 0;
    for (int base = 0; base < batch.requests; base += 32) {
        int index = base + lane;
        bool real = index < batch.requests;
        Request mine = {0, 0, 0, 0, 0};
        if (real) {
            mine.first = batch.query_starts[index];
            mine.rows = batch.query_starts[index + 1] - mine.first;
            mine.length = batch.lengths[index];
            mine.tail = mine.length - (batch.tails == nullptr ? 0 : batch.tails[index]);
            mine.key = batch.key_starts == nullptr ? 0 : batch.key_starts[index];
        }
        int tiles = (max(mine.rows, 0) + Rows - 1) / Rows, through = tiles;
        for (int step = 1; step < 32; step *= 2) {
            int other = __shfl_up_sync(0xffffffffu, through, step);
            if (lane >= step) through += other;
        }
        word32 after = __ballot_sync(0xffffffffu, before + through > tile);
        if (after != 0) {
            int owner = __ffs(after) - 1;
            int row = (before + through - 1 - tile) * Rows;  // of the owner: its last tile first
            place.index = base + owner;
            place.row = __shfl_sync(0xffffffffu, row, owner);
            place.request.first = __shfl_sync(0xffffffffu, mine.first, owner);
            place.request.rows = __shfl_sync(0xffffffffu, mine.rows, owner);
            place.request.length = __shfl_sync(0xffffffffu, mine.length, owner);
            place.request.tail = __shfl_sync(0xffffffffu, mine.tail, owner);
            place.request.key = __shfl_sync(0xffffffffu, mine.key, owner);
            return place;
        }
        before += __shfl_sync(0xffffffffu, through, 31);
    }
    return place;
}
