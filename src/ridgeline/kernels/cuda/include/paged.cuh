// Where keys lie: in rows of their own, or in pages that a table names.
//
// Page: keys of a page, or 0 for contiguous keys. Offsets are 64 bits wide: a pool may hold more than 2^31 numbers.
#pragma once
#include "number.cuh"

template <int Page>
struct Keys {
    const int* table;  // the request's pages
    int64 start;       // of this KV head; contiguous: of the request's first key
    int64 page_stride, slot_stride;

    // Numbers from the pool's begin to key number `key`.
    __device__ __forceinline__ int64 offset(int key) const {
        if (Page == 0) return start + key * slot_stride;
        return start + table[key / max(Page, 1)] * page_stride + key % max(Page, 1) * slot_stride;
    }
};
