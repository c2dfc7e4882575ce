"""`norm` and `layer_norm` on the CPU: one row at a time, in two passes over a row that stays in cache.

Knows rows. Sums run over 16 lanes in order of the columns, then over the lanes by halves. A residual is
overwritten with the sum, as the op allows.
"""

from __future__ import annotations

import math

import numpy as np

from ridgeline.kernels.cpu.blocks import NORM_ROWS
from ridgeline.kernels.cpu.code.memory import added, read, write
from ridgeline.kernels.cpu.code.vector import argument, float_of, fma, inside, round_bfloat, splat, total, zeros


def norm_rows(arguments: int, scratch: int, begin: int, end: int) -> None:
    x, residual, weight, out = (
        argument(arguments, 0),
        argument(arguments, 1),
        argument(arguments, 2),
        argument(arguments, 3),
    )
    rows, width, half = argument(arguments, 4), argument(arguments, 5), argument(arguments, 6)
    eps = float_of(argument(arguments, 7))
    size = 4 - 2 * half
    for row in range(begin * NORM_ROWS, min(end * NORM_ROWS, rows)):
        source, target = x + row * width * size, out + row * width * size
        if residual != 0:
            added(source, residual + row * width * size, half, width)
            source = residual + row * width * size
        squares = zeros()
        for at in range(0, width, 16):
            value = read(source + size * at, half, width - at)
            squares = fma(value, value, squares)
        scale = splat(np.float32(1.0) / math.sqrt(total(squares) / np.float32(width) + eps))
        for at in range(0, width, 16):
            count = width - at
            value = read(source + size * at, half, count) * scale
            if half:
                value = round_bfloat(value)
            write(target + size * at, half, count, read(weight + size * at, half, count) * value)


def layer_norm_rows(arguments: int, scratch: int, begin: int, end: int) -> None:
    x, residual, weight, out = (
        argument(arguments, 0),
        argument(arguments, 1),
        argument(arguments, 2),
        argument(arguments, 3),
    )
    rows, width, half = argument(arguments, 4), argument(arguments, 5), argument(arguments, 6)
    eps, bias = float_of(argument(arguments, 7)), argument(arguments, 8)
    size = 4 - 2 * half
    for row in range(begin * NORM_ROWS, min(end * NORM_ROWS, rows)):
        source, target = x + row * width * size, out + row * width * size
        if residual != 0:
            added(source, residual + row * width * size, half, width)
            source = residual + row * width * size
        sums = zeros()
        for at in range(0, width, 16):
            sums = sums + read(source + size * at, half, width - at)
        mean = splat(total(sums) / np.float32(width))
        squares = zeros()
        for at in range(0, width, 16):
            value = inside(read(source + size * at, half, width - at) - mean, 0, width - at, 0.0)
            squares = fma(value, value, squares)
        scale = splat(np.float32(1.0) / math.sqrt(total(squares) / np.float32(width) + eps))
        for at in range(0, width, 16):
            count = width - at
            value = (read(source + size * at, half, count) - mean) * scale
            value = fma(value, read(weight + size * at, half, count), read(bias + size * at, half, count))
            write(target + size * at, half, count, value)
