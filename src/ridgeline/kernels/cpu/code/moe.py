"""`moe` on the CPU: route, sort rows by expert, then each expert's weights stream once past its rows.

Knows experts as plain row-major matrices. Inner products are those of grid.py and a token adds its experts
in the order of their rank, so a token's result is the same alone and in any batch. Five passes: route,
group, gate and up, down, add; units are tokens, or 64 output features of one expert.
"""

from __future__ import annotations

import numpy as np

from ridgeline.kernels.cpu.blocks import EXPERT_FEATURES
from ridgeline.kernels.cpu.code.activation import activate
from ridgeline.kernels.cpu.code.grid import line, square
from ridgeline.kernels.cpu.code.memory import read, write
from ridgeline.kernels.cpu.code.part import njit
from ridgeline.kernels.cpu.code.vector import (
    argument,
    copy,
    exp,
    fma,
    inside,
    lane_of,
    larger,
    load_float,
    load_i64,
    load_scalar,
    peak,
    round_bfloat,
    splat,
    store_bfloat,
    store_float,
    store_i64,
    store_scalar,
    total,
    zeros,
)

LEAST = np.float32(-np.inf)


def route_tokens(arguments: int, scratch: int, begin: int, end: int) -> None:
    """Each token's k best experts and their weights."""
    x, router, weights, experts = (
        argument(arguments, 0),
        argument(arguments, 1),
        argument(arguments, 2),
        argument(arguments, 3),
    )
    depth, count, best = argument(arguments, 4), argument(arguments, 5), argument(arguments, 6)
    renormalize, half = argument(arguments, 7), argument(arguments, 8)
    size = 4 - 2 * half
    scores = scratch
    for token in range(begin, end):
        row = x + token * depth * size
        top = splat(LEAST)
        for first in range(0, count, 16):
            value = line(row, router + first * depth * size, depth * size, depth, min(16, count - first), half)
            if half:
                # As the reference's product, whose rounding decides who ties with whom.
                value = round_bfloat(value)
            value = inside(value, 0, count - first, LEAST)
            top = larger(value, top)
            store_float(scores + 4 * first, value)
        top = splat(peak(top))
        sums = zeros()
        for first in range(0, count, 16):
            value = exp(load_float(scores + 4 * first) - top)
            value = inside(value, 0, count - first, np.float32(0.0))
            sums = sums + value
            store_float(scores + 4 * first, inside(value, 0, count - first, LEAST))
        whole = total(sums)
        chosen = np.float32(0.0)
        for rank in range(best):
            top = splat(LEAST)
            for first in range(0, count, 16):
                top = larger(load_float(scores + 4 * first), top)
            most = peak(top)
            expert = 0
            for first in range(0, count, 16):
                lane = lane_of(load_float(scores + 4 * first), most)
                if lane < 16:
                    expert = first + lane
                    break
            store_scalar(scores + 4 * expert, LEAST)
            chosen += most / whole
            store_scalar(weights + 4 * (token * best + rank), most / whole)
            store_i64(experts + 8 * (token * best + rank), expert)
        if renormalize:
            for rank in range(best):
                place = weights + 4 * (token * best + rank)
                store_scalar(place, load_scalar(place) / chosen)


def group_entries(arguments: int, scratch: int, begin: int, end: int) -> None:
    """Sort entries (token, rank) by expert: offsets [E + 1] and the entries in order, tokens ascending."""
    experts, offsets, order = argument(arguments, 0), argument(arguments, 1), argument(arguments, 2)
    entries, count = argument(arguments, 3), argument(arguments, 4)
    for expert in range(count + 1):
        store_i64(offsets + 8 * expert, 0)
    for entry in range(entries):
        place = offsets + 8 * (load_i64(experts + 8 * entry) + 1)
        store_i64(place, load_i64(place) + 1)
    for expert in range(count):
        store_i64(offsets + 8 * (expert + 1), load_i64(offsets + 8 * (expert + 1)) + load_i64(offsets + 8 * expert))
    for entry in range(entries):
        place = offsets + 8 * load_i64(experts + 8 * entry)
        store_i64(order + 8 * load_i64(place), entry)
        store_i64(place, load_i64(place) + 1)
    for expert in range(count, 0, -1):
        store_i64(offsets + 8 * expert, load_i64(offsets + 8 * (expert - 1)))
    store_i64(offsets, 0)


@njit
def put(values, quarter, target, count, half, scratch):  # type: ignore[no-untyped-def]
    """Write lanes 4 quarter .. 4 quarter + count - 1 to an address."""
    if half:
        store_bfloat(scratch, values)
        if count == 4:
            copy(target, scratch + 8 * quarter, 8)
        else:
            copy(target, scratch + 8 * quarter, 2 * count)
    else:
        store_float(scratch, values)
        if count == 4:
            copy(target, scratch + 16 * quarter, 16)
        else:
            copy(target, scratch + 16 * quarter, 4 * count)


def gate_up_features(arguments: int, scratch: int, begin: int, end: int) -> None:
    """inner[entry] = act(x Wg.T) * (x Wu.T) for 64 features of an expert."""
    x, w, inner, offsets, order = (
        argument(arguments, 0),
        argument(arguments, 1),
        argument(arguments, 2),
        argument(arguments, 3),
        argument(arguments, 4),
    )
    depth, features, best, half, code = (
        argument(arguments, 5),
        argument(arguments, 6),
        argument(arguments, 7),
        argument(arguments, 8),
        argument(arguments, 9),
    )
    size = 4 - 2 * half
    pitch = depth * size
    blocks = (features + EXPERT_FEATURES - 1) // EXPERT_FEATURES
    for unit in range(begin, end):
        expert, block = unit // blocks, unit % blocks * EXPERT_FEATURES
        first, last = load_i64(offsets + 8 * expert), load_i64(offsets + 8 * (expert + 1))
        gates = w + expert * 2 * features * pitch
        ups, limit = gates + features * pitch, min(block + EXPERT_FEATURES, features)
        if last - first == 1:
            entry = load_i64(order + 8 * first)
            row = x + entry // best * pitch
            for feature in range(block, limit, 16):
                count = min(16, limit - feature)
                gate = line(row, gates + feature * pitch, pitch, depth, count, half)
                up = line(row, ups + feature * pitch, pitch, depth, count, half)
                write(inner + (entry * features + feature) * size, half, count, activate(gate, code) * up)
            continue
        for feature in range(block, limit, 4):
            count = min(4, limit - feature)
            for place in range(first, last, 4):
                e0 = load_i64(order + 8 * place)
                e1 = load_i64(order + 8 * min(place + 1, last - 1))
                e2 = load_i64(order + 8 * min(place + 2, last - 1))
                e3 = load_i64(order + 8 * min(place + 3, last - 1))
                x0, x1, x2, x3 = (
                    x + e0 // best * pitch,
                    x + e1 // best * pitch,
                    x + e2 // best * pitch,
                    x + e3 // best * pitch,
                )
                gate = square(x0, x1, x2, x3, gates + feature * pitch, pitch, depth, count, half)
                up = square(x0, x1, x2, x3, ups + feature * pitch, pitch, depth, count, half)
                value = activate(gate, code) * up
                for row in range(min(4, last - place)):
                    entry = load_i64(order + 8 * (place + row))
                    put(value, row, inner + (entry * features + feature) * size, count, half, scratch)


def down_features(arguments: int, scratch: int, begin: int, end: int) -> None:
    """partial[entry] = inner[entry] Wd.T, fp32, for 64 features of an expert."""
    inner, w, partial, offsets, order = (
        argument(arguments, 0),
        argument(arguments, 1),
        argument(arguments, 2),
        argument(arguments, 3),
        argument(arguments, 4),
    )
    depth, features, half = argument(arguments, 5), argument(arguments, 6), argument(arguments, 7)
    pitch = depth * (4 - 2 * half)
    blocks = (features + EXPERT_FEATURES - 1) // EXPERT_FEATURES
    for unit in range(begin, end):
        expert, block = unit // blocks, unit % blocks * EXPERT_FEATURES
        first, last = load_i64(offsets + 8 * expert), load_i64(offsets + 8 * (expert + 1))
        rows, limit = w + expert * features * pitch, min(block + EXPERT_FEATURES, features)
        if last - first == 1:
            entry = load_i64(order + 8 * first)
            for feature in range(block, limit, 16):
                count = min(16, limit - feature)
                value = line(inner + entry * pitch, rows + feature * pitch, pitch, depth, count, half)
                write(partial + (entry * features + feature) * 4, 0, count, value)
            continue
        for feature in range(block, limit, 4):
            count = min(4, limit - feature)
            for place in range(first, last, 4):
                e0 = load_i64(order + 8 * place)
                e1 = load_i64(order + 8 * min(place + 1, last - 1))
                e2 = load_i64(order + 8 * min(place + 2, last - 1))
                e3 = load_i64(order + 8 * min(place + 3, last - 1))
                value = square(
                    inner + e0 * pitch,
                    inner + e1 * pitch,
                    inner + e2 * pitch,
                    inner + e3 * pitch,
                    rows + feature * pitch,
                    pitch,
                    depth,
                    count,
                    half,
                )
                for row in range(min(4, last - place)):
                    entry = load_i64(order + 8 * (place + row))
                    put(value, row, partial + (entry * features + feature) * 4, count, 0, scratch)


def add_experts(arguments: int, scratch: int, begin: int, end: int) -> None:
    """out[token] = sum of weight * partial over the token's experts, best first."""
    partial, weights, out = argument(arguments, 0), argument(arguments, 1), argument(arguments, 2)
    features, best, half = argument(arguments, 3), argument(arguments, 4), argument(arguments, 5)
    size = 4 - 2 * half
    for token in range(begin, end):
        for at in range(0, features, 16):
            value = zeros()
            for entry in range(token * best, (token + 1) * best):
                row = read(partial + (entry * features + at) * 4, 0, features - at)
                value = fma(row, splat(load_scalar(weights + 4 * entry)), value)
            write(out + (token * features + at) * size, half, features - at, value)
