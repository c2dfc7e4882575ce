"""`sample` on the CPU: argmax of logits, or of logits and noise, in pieces of the vocabulary.

Knows rows and their temperatures. A unit of work is a piece of one row; pieces are compared in order, so
ties go to the lowest id. A row with a NaN gets the id behind the vocabulary, as from the reference.
"""

from __future__ import annotations

import numpy as np

from ridgeline.kernels.cpu.blocks import SAMPLE_TOKENS
from ridgeline.kernels.cpu.code.cut import is_cut
from ridgeline.kernels.cpu.code.memory import read
from ridgeline.kernels.cpu.code.noise import gumbel
from ridgeline.kernels.cpu.code.part import njit
from ridgeline.kernels.cpu.code.vector import (
    argument,
    inside,
    lane_of,
    load_float,
    load_i64,
    load_scalar,
    maximum,
    maximum_lane,
    splat,
    store_float,
    store_i64,
    store_scalar,
)

LEAST = np.float32(-np.inf)


@njit
def first_best(scores, count):  # type: ignore[no-untyped-def]
    """Index of the first of the largest among `count` fp32 numbers (padded with -inf to a multiple of 16).

    -1 if one of them is NaN.
    """
    best = splat(LEAST)
    for at in range(0, count, 16):
        best = maximum(load_float(scores + 4 * at), best)
    top = maximum_lane(best)
    for at in range(0, count, 16):
        lane = lane_of(load_float(scores + 4 * at), top)
        if lane < 16:
            return at + lane
    return -1


def best_pieces(arguments: int, scratch: int, begin: int, end: int) -> None:
    """The best score and its token of each piece of each row that is not cut."""
    logits, temperature, seeds, positions = (
        argument(arguments, 0),
        argument(arguments, 1),
        argument(arguments, 2),
        argument(arguments, 3),
    )
    values, ids = argument(arguments, 4), argument(arguments, 5)
    tokens, half, greedy = argument(arguments, 6), argument(arguments, 7), argument(arguments, 8)
    cut, top_k, top_p, min_p = (
        argument(arguments, 9),
        argument(arguments, 10),
        argument(arguments, 11),
        argument(arguments, 12),
    )
    size = 4 - 2 * half
    noise = scratch + 4 * SAMPLE_TOKENS
    pieces = (tokens + SAMPLE_TOKENS - 1) // SAMPLE_TOKENS
    for unit in range(begin, end):
        row, first = unit // pieces, unit % pieces * SAMPLE_TOKENS
        if cut != 0 and is_cut(temperature, top_k, top_p, min_p, row, tokens):
            continue
        count = min(SAMPLE_TOKENS, tokens - first)
        source = logits + (row * tokens + first) * size
        cold = greedy != 0 or load_scalar(temperature + 4 * row) == np.float32(0.0)
        if cold:
            for at in range(0, count, 16):
                value = inside(read(source + size * at, half, count - at), 0, count - at, LEAST)
                store_float(scratch + 4 * at, value)
        else:
            divisor = splat(load_scalar(temperature + 4 * row))
            seed, position = load_i64(seeds + 8 * row), load_i64(positions + 8 * row)
            for at in range(0, count, 16):
                if at % 64 == 0:
                    gumbel(noise, (first + at) // 4, seed, position)
                value = read(source + size * at, half, count - at) / divisor + load_float(noise + at % 64 * 4)
                store_float(scratch + 4 * at, inside(value, 0, count - at, LEAST))
        place = first_best(scratch, count)
        if place < 0:
            store_scalar(values + 4 * unit, np.float32(np.inf))
            store_i64(ids + 8 * unit, tokens)
        else:
            store_scalar(values + 4 * unit, load_scalar(scratch + 4 * place))
            store_i64(ids + 8 * unit, first + place)


def best_of_pieces(arguments: int, scratch: int, begin: int, end: int) -> None:
    """Each row's token, from its pieces. Rows that are cut have none yet and get any."""
    values, ids, out, pieces = (
        argument(arguments, 0),
        argument(arguments, 1),
        argument(arguments, 2),
        argument(arguments, 3),
    )
    tokens = argument(arguments, 4)
    for row in range(begin, end):
        best = row * pieces
        for piece in range(row * pieces, (row + 1) * pieces):
            nowhere = load_i64(ids + 8 * piece) == tokens
            if nowhere or load_scalar(values + 4 * piece) > load_scalar(values + 4 * best):
                best = piece
            if nowhere:
                break
        store_i64(out + 8 * row, load_i64(ids + 8 * best))
