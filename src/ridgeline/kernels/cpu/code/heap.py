"""A heap of 64-bit words in memory, the smallest on top, and sorting with it.

Knows words. It must not know what they stand for.
"""

from __future__ import annotations

from ridgeline.kernels.cpu.code.part import njit
from ridgeline.kernels.cpu.code.vector import load_i64, store_i64


@njit
def sift(heap, place, count):  # type: ignore[no-untyped-def]
    """Let the word at `place` sink until no child is smaller."""
    word = load_i64(heap + 8 * place)
    while 2 * place + 1 < count:
        child = 2 * place + 1
        least = load_i64(heap + 8 * child)
        if child + 1 < count:
            other = load_i64(heap + 8 * child + 8)
            if other < least:
                child, least = child + 1, other
        if least >= word:
            break
        store_i64(heap + 8 * place, least)
        place = child
    store_i64(heap + 8 * place, word)


@njit
def heapify(heap, count):  # type: ignore[no-untyped-def]
    for place in range(count // 2 - 1, -1, -1):
        sift(heap, place, count)


@njit
def descend(heap, count):  # type: ignore[no-untyped-def]
    """Turn a heap into its words in descending order."""
    for last in range(count - 1, 0, -1):
        least, moved = load_i64(heap), load_i64(heap + 8 * last)
        store_i64(heap + 8 * last, least)
        store_i64(heap, moved)
        sift(heap, 0, last)
