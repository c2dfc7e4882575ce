"""Which sequence a program works for, found on the device: shared by the kernels over ragged batches.

Knows offsets of sequences that lie one after the other. It must not know what a sequence holds.
"""

import triton
import triton.language as tl

SCAN: tl.constexpr = tl.constexpr(256)
"""Offsets that a scan reads at once. Reads do not wait for each other, as steps of a bisection would."""


@triton.jit
def sequence_of(starts: tl.tensor, count: tl.tensor, tile: tl.tensor, ROWS: tl.constexpr) -> tl.tensor:
    """The sequence that owns tile number `tile` when each is cut into tiles of ROWS rows.

    Invariant: with first(s) = starts[s] // ROWS + s, sequence s has room for all its tiles in
    first(s) .. first(s + 1), because floor(a + n) >= floor(a) + floor(n); so no prefix sum of rounded-up
    counts is needed, and total // ROWS + count tiles are enough for any lengths. Tiles left over find
    their sequence too, and no rows in it.
    """
    before = 0
    for base in range(0, count, SCAN):
        index = base + tl.arange(0, SCAN)
        first = tl.load(starts + index, mask=index < count, other=0) // ROWS + index
        before += tl.sum(((first <= tile) & (index < count)).to(tl.int32), axis=0)
    return before - 1
