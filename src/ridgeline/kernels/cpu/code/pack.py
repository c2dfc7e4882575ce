"""Packing: a dense matrix into the "panels" format, as fast as memory allows.

Knows both layouts. A unit of work is one panel, transposed in squares of 16 x 16 that stay in registers.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import types

from ridgeline.kernels.cpu.code.vector import (
    I16X,
    I32X,
    I64,
    LANES,
    argument,
    emitted,
    load_i16,
    load_i32,
    pointer,
    shuffled,
    store_i16,
    store_i32,
)
from ridgeline.ops.weight import PANEL


def _square(kind: Any, size: int) -> Any:
    @emitted(types.void, *[types.int64] * 4)
    def square(b: Any, source: Any, source_stride: Any, target: Any, target_stride: Any) -> None:
        """Transpose 16 x 16 elements; strides in bytes."""
        rows = [
            b.load(pointer(b, b.add(source, b.mul(source_stride, ir.Constant(I64, row))), kind), align=size)
            for row in range(LANES)
        ]
        distance = 1
        while distance < LANES:
            upper = [lane if not lane & distance else 16 + lane - distance for lane in range(LANES)]
            lower = [lane + distance if not lane & distance else 16 + lane for lane in range(LANES)]
            for row in range(LANES):
                if not row & distance:
                    x, y = rows[row], rows[row + distance]
                    rows[row], rows[row + distance] = shuffled(b, x, y, upper), shuffled(b, x, y, lower)
            distance *= 2
        for row, value in enumerate(rows):
            place = b.add(target, b.mul(target_stride, ir.Constant(I64, row)))
            b.store(value, pointer(b, place, kind), align=size)

    return square


square16, square32 = _square(I16X, 2), _square(I32X, 4)


def pack_panels(arguments: int, scratch: int, begin: int, end: int) -> None:
    source, target = argument(arguments, 0), argument(arguments, 1)
    outputs, depth, half = argument(arguments, 2), argument(arguments, 3), argument(arguments, 4)
    size = 4 - 2 * half
    stride = depth * size
    for panel in range(begin, end):
        at = target + panel * PANEL * stride
        for first in range(0, PANEL, 16):
            row = panel * PANEL + first
            whole = depth // 16 * 16
            if row + 16 > outputs:
                whole = 0
            for k in range(0, whole, 16):
                start, place = source + row * stride + k * size, at + (k * PANEL + first) * size
                if half:
                    square16(start, stride, place, PANEL * 2)
                else:
                    square32(start, stride, place, PANEL * 4)
            for k in range(whole, depth):
                for lane in range(16):
                    start, place = source + (row + lane) * stride + k * size, at + (k * PANEL + first + lane) * size
                    if half:
                        store_i16(place, load_i16(start) if row + lane < outputs else 0)
                    else:
                        store_i32(place, load_i32(start) if row + lane < outputs else 0)
