// Which keys a row sees: causal (aligned at the last row and key), full, a window, or the ancestors in a tree.
//
// Knows positions; must not know where keys lie. A request has `rows` new rows and `length` keys; row i stands at
// position length - rows + i. Its last `length - tail` keys, and as many last rows, may be the nodes of a tree.
#pragma once
#include "number.cuh"

struct Request {
    int first;   // its first row of q
    int rows;    // new rows
    int length;  // keys
    int tail;    // position where its tree begins; `length` if it has none
    int key;     // its first row of contiguous keys
};

// Tiles of Count keys that rows [begin, end) of a request need: [first, last), of which every row sees those in
// [whole_first, whole_last) whole; `low` is the first key that any of them sees.
struct Range {
    int low, first, last, whole_first, whole_last;
};

template <bool Causal, bool Windowed, bool Tree, int Count>
__device__ __forceinline__ Range range(const Request& request, int begin, int end, int window) {
    int stop = request.length, whole = request.length, low = 0, left = 0;
    if (Causal) {
        int shift = request.length - request.rows;
        int nodes = request.rows - (request.length - request.tail);  // the first row that is a node
        bool tree = Tree && end > nodes;
        stop = tree ? request.length : min(request.length, shift + end);
        whole = shift + begin + 1;
        if (tree) whole = min(whole, request.tail);
        if (Windowed) {
            int first = Tree && begin >= nodes ? request.tail : shift + begin;
            low = max(first - window + 1, 0);
            left = (tree ? request.length : shift + end) - window;
        }
    }
    stop = max(stop, 0);
    Range tiles;
    tiles.low = low;
    tiles.first = low / Count;
    tiles.last = (stop + Count - 1) / Count;
    tiles.whole_first = Windowed ? (max(left, 0) + Count - 1) / Count : 0;
    tiles.whole_last = max(whole, 0) / Count;
    return tiles;
}

// What one row sees: keys above `low` up to `high`, and in a tree the tail's keys whose bits are set.
template <bool Causal, bool Windowed, bool Tree>
struct Sight {
    int low, high, tail, length;
    const int* bits;

    // row: of the request; ancestors: its bits, `words` of them.
    __device__ __forceinline__ Sight(const Request& request, int row, int window, const int* ancestors) {
        int position = Causal ? request.length - request.rows + row : request.length - 1;
        high = min(position, request.length - 1);
        low = -1;
        tail = length = request.length;
        bits = nullptr;
        if (Tree && request.tail < request.length && row >= request.rows - (request.length - request.tail)) {
            if (row < request.rows) {
                bits = ancestors;
                tail = request.tail;
                high = tail - 1;
                if (Windowed) {
                    int depth = 0, nodes = length - tail;
                    for (int base = 0; base < nodes; base += 32) {
                        word32 word = bits[base / 32];
                        if (nodes - base < 32) word &= (1u << (nodes - base)) - 1;
                        depth += __popc(word);
                    }
                    position = tail + depth - 1;
                }
            }
        }
        if (Windowed) low = position - window;
    }

    __device__ __forceinline__ bool sees(int key) const {
        bool seen = key <= high;
        if (Windowed) seen = seen && key > low;
        if (Tree) {
            if (bits != nullptr && key >= tail && key < length) seen = bits[(key - tail) / 32] >> ((key - tail) % 32) & 1;
        }
        return seen;
    }
};
