// Tiles in shared memory for mma.sync: how they lie, how they are filled, how warps read and multiply them.
//
// A tile of Rows x Columns 16-bit numbers lies in panels of 64 columns, one after the other; a last panel may have
// 32. Within a panel a row takes 128 bytes (64), and its pieces of 16 bytes are permuted by the row's number, so that
// eight neighbouring rows of one column lie in eight different groups of banks: ldmatrix reads them without conflict.
#pragma once
#include "number.cuh"

__device__ __forceinline__ word32 shared_address(const void* pointer) {
    return static_cast<word32>(__cvta_generic_to_shared(pointer));
}

template <int Rows, int Columns>
struct Tile {
    static_assert(Columns % 32 == 0 && Rows % 8 == 0, "a tile has whole panels");
    static constexpr int PIECES = Columns / 8;  // of 16 bytes, in a row
    static constexpr int BYTES = Rows * Columns * 2;

    // Bytes from the tile's begin to piece `piece` of row `row`.
    static __device__ __forceinline__ word32 offset(int row, int piece) {
        int panel = piece / 8;
        if (Columns % 64 == 0 || panel < Columns / 64)
            return panel * (Rows * 128) + row * 128 + (((piece ^ row) & 7) << 4);
        return panel * (Rows * 128) + row * 64 + (((piece ^ (row >> 1)) & 3) << 4);
    }
};

// Copy 16 bytes from global to shared memory in the background; if not `real`, write zeros and read nothing.
__device__ __forceinline__ void copy_async(word32 to, const void* from) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(to), "l"(from));
}

__device__ __forceinline__ void copy_async(word32 to, const void* from, bool real) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(real ? 16 : 0));
}

__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Wait until at most `Left` of this thread's groups of copies are under way.
template <int Left>
__device__ __forceinline__ void copy_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(Left) : "memory");
}

// How the threads of a block share the copying of a tile: LANES neighbouring threads take a row (16 bytes each, PIECES
// times), and STRIDE rows are under way at once. A thread's rows keep their place among eight, so that where it writes
// differs by constants alone.
template <int Threads, int Rows, int Columns>
struct Share {
    using Whole = Tile<Rows, Columns>;
    static constexpr int LANES = Columns % 128 == 0 ? 16 : Columns % 64 == 0 ? 8 : 4;
    static constexpr int PIECES = Whole::PIECES / LANES;
    static constexpr int STRIDE = Threads / LANES;
    static constexpr int COPIES = Rows / STRIDE;
    static_assert(Threads % LANES == 0 && STRIDE % 8 == 0 && Rows % STRIDE == 0, "every thread copies as much");

    static __device__ __forceinline__ int row() { return threadIdx.x / LANES; }
    static __device__ __forceinline__ int column() { return threadIdx.x % LANES * 8; }

    // Bytes from the tile's begin to this thread's copy number `copy`, piece number `piece`.
    static __device__ __forceinline__ word32 offset(int copy, int piece) {
        int number = threadIdx.x % LANES + piece * LANES;
        bool narrow = Columns % 64 != 0 && piece * LANES / 8 >= Columns / 64;
        return Whole::offset(row(), number) + copy * STRIDE * (narrow ? 64 : 128);
    }
};

// Four 8 x 8 matrices; lane l gives the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void load_matrices(word32 (&to)[4], word32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(address));
}

__device__ __forceinline__ void load_matrices_transposed(word32 (&to)[4], word32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(address));
}

// sums (16 x 8, fp32) += left (16 x 16) right (16 x 8). In sums, lane l holds columns 2 (l % 4) and the next of rows
// l / 4 (first two) and l / 4 + 8 (last two).
__device__ __forceinline__ void multiply(float (&sums)[4], const word32 (&left)[4], word32 right0, word32 right1) {
#if BF16
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
#else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
#endif
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right0), "r"(right1));
}

// Where one lane points ldmatrix in a tile. Three kinds: for a left factor (16 rows x 16 columns), for a right factor
// stored by its columns (16 of them x 16 of the contracted dimension), and for one stored by rows, read transposed.
//
// `at` names squares of 16 x 16. Eight rows on, the permutation is the same, and a square's column flips bits of the
// address: so one register and constants reach the whole tile.
template <int Rows, int Columns>
struct Lane {
    word32 wide, narrow;  // in a panel of 64 columns, and in one of 32

    __device__ __forceinline__ Lane(word32 tile, int row, int piece) {
        wide = tile + row * 128 + (((piece ^ row) & 7) << 4);
        narrow = tile + Columns / 64 * (Rows * 128) + row * 64 + (((piece ^ (row >> 1)) & 3) << 4);
    }
    static __device__ __forceinline__ Lane left(word32 tile, int row, int lane) {
        return Lane(tile, row + lane % 16, lane / 16);
    }
    static __device__ __forceinline__ Lane columns(word32 tile, int lane) {
        return Lane(tile, lane % 8 + lane / 16 * 8, lane / 8 % 2);
    }
    static __device__ __forceinline__ Lane rows(word32 tile, int lane) { return Lane(tile, lane % 16, lane / 16); }

    // The square of rows 16 * row ... and columns 16 * column ...
    __device__ __forceinline__ word32 at(int row, int column) const {
        if (column < Columns / 64 * 4) return (wide ^ (column % 4 << 5)) + column / 4 * (Rows * 128) + row * 2048;
        return (narrow ^ (column % 2 << 5)) + row * 1024;
    }
};
