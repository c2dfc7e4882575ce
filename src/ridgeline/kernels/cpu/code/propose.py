"""`propose` on the CPU: scores of a row side by side, their best taken out one after the other.

Knows rows. A unit of work is a row.
"""

from __future__ import annotations

import numpy as np

from ridgeline.kernels.cpu.code.memory import read
from ridgeline.kernels.cpu.code.noise import gumbel
from ridgeline.kernels.cpu.code.sample import LEAST, first_best
from ridgeline.kernels.cpu.code.vector import (
    argument,
    exp2,
    inside,
    load_float,
    load_i64,
    load_scalar,
    maximum,
    peak,
    splat,
    store_float,
    store_i64,
    store_scalar,
    total,
)

POWERS = np.float32(1.4426950408889634)
"""Natural logarithms as powers of two."""


def propose_rows(arguments: int, scratch: int, begin: int, end: int) -> None:
    logits, temperature, seeds, positions = (
        argument(arguments, 0),
        argument(arguments, 1),
        argument(arguments, 2),
        argument(arguments, 3),
    )
    ids, chances = argument(arguments, 4), argument(arguments, 5)
    tokens, half, greedy = argument(arguments, 6), argument(arguments, 7), argument(arguments, 8)
    count = argument(arguments, 9)
    size = 4 - 2 * half
    padded = (tokens + 15) // 16 * 16
    noise = scratch
    plain = noise + 256
    scores = plain + 4 * padded
    for row in range(begin, end):
        source = logits + row * tokens * size
        heat = load_scalar(temperature + 4 * row)
        cold = greedy != 0 or heat == np.float32(0.0)
        divisor = splat(np.float32(1.0) if cold else heat)
        seed, position = load_i64(seeds + 8 * row), load_i64(positions + 8 * row)
        best = splat(LEAST)
        for at in range(0, tokens, 16):
            value = read(source + size * at, half, tokens - at) / divisor
            scaled = inside(value, 0, tokens - at, LEAST)
            store_float(plain + 4 * at, scaled)
            best = maximum(scaled, best)
            if not cold:
                if at % 64 == 0:
                    gumbel(noise, at // 4, seed, position)
                scaled = inside(value + load_float(noise + at % 64 * 4), 0, tokens - at, LEAST)
            store_float(scores + 4 * at, scaled)
        top = splat(peak(best))
        sums = splat(np.float32(0.0))
        for at in range(0, tokens, 16):
            sums = sums + exp2((load_float(plain + 4 * at) - top) * splat(POWERS))
        whole = splat(total(sums))
        for place in range(count):
            token = max(first_best(scores, tokens), 0)
            chance = exp2((splat(load_scalar(plain + 4 * token)) - top) * splat(POWERS)) / whole
            store_i64(ids + 8 * (row * count + place), token)
            store_scalar(chances + 4 * (row * count + place), peak(chance))
            store_scalar(scores + 4 * token, LEAST)
