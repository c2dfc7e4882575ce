"""`kv_move` on the CPU: whole blocks copied in every pages tensor.

Knows blocks. A unit of work is one block of one tensor.
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
