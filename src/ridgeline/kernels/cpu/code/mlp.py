"""`gated_linear` on the CPU: gate and up panels side by side, nothing in between leaves the cache; and `gate`.

Knows panels. A unit of work is 64 features of the result times at most 96 rows: one panel of gates and the
panel of ups beside it, or the two that hold them where the ups do not begin at a panel's border.
"""

from __future__ import annotations

from ridgeline.kernels.cpu.blocks import PASS_ROWS
from ridgeline.kernels.cpu.code.activation import activate
from ridgeline.kernels.cpu.code.memory import read, write
from ridgeline.kernels.cpu.code.tile import ACC_BYTES, product, read_once
from ridgeline.kernels.cpu.code.vector import argument, join, load_float
from ridgeline.ops.weight import PANEL


def gated_panels(arguments: int, scratch: int, begin: int, end: int) -> None:
    x, w, out = argument(arguments, 0), argument(arguments, 1), argument(arguments, 2)
    tokens, depth, inner = argument(arguments, 3), argument(arguments, 4), argument(arguments, 5)
    half, code = argument(arguments, 6), argument(arguments, 7)
    size = 4 - 2 * half
    stride = depth * size
    passes = (tokens + PASS_ROWS - 1) // PASS_ROWS
    shift, panels = inner % PANEL, (inner + PANEL - 1) // PANEL
    gates, ups, more = scratch, scratch + ACC_BYTES, scratch + 2 * ACC_BYTES
    wide = scratch + 3 * ACC_BYTES
    for unit in range(begin, end):
        panel, first = unit // passes, unit % passes * PASS_ROWS
        rows, column = min(PASS_ROWS, tokens - first), panel * PANEL
        columns = min(PANEL, inner - column)
        once = read_once(arguments, panel, panels)
        at = x + first * stride
        beside = (inner + column) // PANEL
        product(at, stride, rows, w + panel * stride * PANEL, depth, half, gates, wide, once)
        product(at, stride, rows, w + beside * stride * PANEL, depth, half, ups, wide, once)
        if shift + columns > PANEL:
            product(at, stride, rows, w + (beside + 1) * stride * PANEL, depth, half, more, wide, once)
        for row in range(rows):
            line = 4 * PANEL * row
            for lane in range(0, columns, 16):
                gated = activate(load_float(gates + line + 4 * lane), code)
                place = shift + lane
                if place + 16 <= PANEL:
                    up = load_float(ups + line + 4 * place)
                elif place >= PANEL:
                    up = load_float(more + line + 4 * (place - PANEL))
                else:
                    up = join(load_float(ups + line + 4 * (PANEL - 16)), load_float(more + line), place - (PANEL - 16))
                count = columns - lane
                write(out + size * ((first + row) * inner + column + lane), half, count, gated * up)


def gate_rows(arguments: int, scratch: int, begin: int, end: int) -> None:
    source, out = argument(arguments, 0), argument(arguments, 1)
    inner, half, code = argument(arguments, 2), argument(arguments, 3), argument(arguments, 4)
    size = 4 - 2 * half
    for row in range(begin, end):
        gates, target = source + 2 * row * inner * size, out + row * inner * size
        for at in range(0, inner, 16):
            count = inner - at
            gated = activate(read(gates + size * at, half, count), code)
            write(target + size * at, half, count, gated * read(gates + size * (inner + at), half, count))
