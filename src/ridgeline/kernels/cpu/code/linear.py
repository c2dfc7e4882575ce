"""`linear` on the CPU: panels of weights stream through once, bias and activation on the way out.

Knows panels and blocks of rows. A unit of work is one panel times at most 96 rows.
"""

from __future__ import annotations

from ridgeline.kernels.cpu.blocks import PASS_ROWS
from ridgeline.kernels.cpu.code.activation import activate
from ridgeline.kernels.cpu.code.memory import read, write
from ridgeline.kernels.cpu.code.tile import ACC_BYTES, product, read_once
from ridgeline.kernels.cpu.code.vector import argument, load_float
from ridgeline.ops.weight import PANEL


def linear_panels(arguments: int, scratch: int, begin: int, end: int) -> None:
    x, w, bias, out = argument(arguments, 0), argument(arguments, 1), argument(arguments, 2), argument(arguments, 3)
    tokens, depth, outputs = argument(arguments, 4), argument(arguments, 5), argument(arguments, 6)
    half, code = argument(arguments, 7), argument(arguments, 8)
    size, panels = 4 - 2 * half, (outputs + PANEL - 1) // PANEL
    passes = (tokens + PASS_ROWS - 1) // PASS_ROWS
    for unit in range(begin, end):
        panel, first = unit // passes, unit % passes * PASS_ROWS
        rows, column = min(PASS_ROWS, tokens - first), panel * PANEL
        product(
            x + first * depth * size, depth * size, rows, w + panel * depth * PANEL * size, depth, half,
            scratch, scratch + ACC_BYTES, read_once(arguments, panel, panels),
        )  # fmt: skip
        for row in range(rows):
            for at in range(0, min(PANEL, outputs - column), 16):
                count = outputs - column - at
                value = load_float(scratch + 4 * (PANEL * row + at))
                if bias != 0:
                    value = value + read(bias + size * (column + at), half, count)
                write(out + size * ((first + row) * outputs + column + at), half, count, activate(value, code))
