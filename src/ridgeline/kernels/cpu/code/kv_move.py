"""`kv_move` and `kv_compact` on the CPU: whole blocks, or single slots, copied in every pages tensor.

Knows blocks. A unit of work is one block, or all slots, of one tensor.
"""

from __future__ import annotations

from ridgeline.kernels.cpu.code.vector import argument, copy, load_i64


def move_blocks(arguments: int, scratch: int, begin: int, end: int) -> None:
    pages, source, target = argument(arguments, 0), argument(arguments, 1), argument(arguments, 2)
    count, size_bytes = argument(arguments, 3), argument(arguments, 4)
    for unit in range(begin, end):
        page, move = load_i64(pages + 8 * (unit // count)), unit % count
        read_from, written_to = load_i64(source + 8 * move), load_i64(target + 8 * move)
        copy(page + written_to * size_bytes, page + read_from * size_bytes, size_bytes)


def move_slots(arguments: int, scratch: int, begin: int, end: int) -> None:
    pages, source, target = argument(arguments, 0), argument(arguments, 1), argument(arguments, 2)
    count, heads, block, row_bytes = (
        argument(arguments, 3),
        argument(arguments, 4),
        argument(arguments, 5),
        argument(arguments, 6),
    )
    for unit in range(begin, end):
        page = load_i64(pages + 8 * unit)
        for move in range(count):
            read_from, written_to = load_i64(source + 8 * move), load_i64(target + 8 * move)
            for head in range(heads):
                old = (read_from // block * heads + head) * block + read_from % block
                new = (written_to // block * heads + head) * block + written_to % block
                copy(page + new * row_bytes, page + old * row_bytes, row_bytes)
