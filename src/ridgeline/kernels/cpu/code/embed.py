"""`embed` on the CPU: rows of a table, dense or in panels, and of a table of positions.

Knows both formats. From panels a row is gathered one element in 64, as it lies.
"""

from __future__ import annotations

from ridgeline.kernels.cpu.code.memory import added, row_at
from ridgeline.kernels.cpu.code.vector import argument, copy, load_i16, load_i32, store_i16, store_i32
from ridgeline.ops.weight import PANEL


def embed_rows(arguments: int, scratch: int, begin: int, end: int) -> None:
    ids, table, out = argument(arguments, 0), argument(arguments, 1), argument(arguments, 2)
    width, rows, half, panels = (
        argument(arguments, 3),
        argument(arguments, 4),
        argument(arguments, 5),
        argument(arguments, 6),
    )
    positions, places, known = argument(arguments, 7), argument(arguments, 8), argument(arguments, 9)
    size = 4 - 2 * half
    for token in range(begin, end):
        row = row_at(ids, token, rows)
        target = out + token * width * size
        if panels == 0:
            copy(target, table + row * width * size, width * size)
        else:
            source = table + (row // PANEL * width * PANEL + row % PANEL) * size
            if half:
                for at in range(width):
                    store_i16(target + 2 * at, load_i16(source + 2 * PANEL * at))
            else:
                for at in range(width):
                    store_i32(target + 4 * at, load_i32(source + 4 * PANEL * at))
        if positions != 0:
            added(places + row_at(positions, token, known) * width * size, target, half, width)
