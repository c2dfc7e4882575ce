"""Rows of `sample` that use top-k, top-p or min-p: only tokens that may survive are sorted.

Knows one row's logits and settings. Tokens are compared as words that order by logit, then by the lower id.
With top-k they pass through a heap of k; without it, all tokens that top-p or min-p could keep are
collected: as fewer than V tokens of probability below (1 - p) / V weigh less than 1 - p together, the
tokens from that probability on outweigh p, and the nucleus is among them.
"""

from __future__ import annotations

import numpy as np

from ridgeline.kernels.cpu.blocks import SCRATCH_BYTES
from ridgeline.kernels.cpu.code.heap import descend, heapify, sift
from ridgeline.kernels.cpu.code.memory import read
from ridgeline.kernels.cpu.code.noise import gumbel
from ridgeline.kernels.cpu.code.part import njit
from ridgeline.kernels.cpu.code.vector import (
    argument,
    exp,
    float_of,
    inside,
    load_float,
    load_i64,
    load_scalar,
    log,
    maximum,
    maximum_lane,
    peak,
    splat,
    store_float,
    store_i64,
    total,
    word_of,
    zeros,
)

LEAST = np.float32(-np.inf)


@njit
def key_of(value, token):  # type: ignore[no-untyped-def]
    """A word that is larger for larger values, and for lower tokens among equal ones."""
    word = word_of(value + np.float32(0.0))
    ordered = 0xFFFFFFFF - word if word >= 0x80000000 else word + 0x80000000
    return (ordered << 31) | (0x7FFFFFFF - token)


@njit
def value_of(key):  # type: ignore[no-untyped-def]
    ordered = key >> 31
    return float_of(ordered - 0x80000000 if ordered >= 0x80000000 else 0xFFFFFFFF - ordered)


@njit
def token_of(key):  # type: ignore[no-untyped-def]
    return 0x7FFFFFFF - (key & 0x7FFFFFFF)


@njit
def exp_of(value):  # type: ignore[no-untyped-def]
    return peak(exp(splat(value)))


@njit
def is_cut(temperature, top_k, top_p, min_p, row, tokens):  # type: ignore[no-untyped-def]
    """Whether a row draws from a cut distribution."""
    if load_scalar(temperature + 4 * row) == np.float32(0.0):
        return False
    k = load_i64(top_k + 8 * row)
    if k > 0 and k < tokens:
        return True
    return load_scalar(top_p + 4 * row) < np.float32(1.0) or load_scalar(min_p + 4 * row) > np.float32(0.0)


@njit
def largest(scaled, tokens, k, heap):  # type: ignore[no-untyped-def]
    """The k largest tokens, as a heap."""
    count, floor = 0, LEAST
    for at in range(0, tokens, 16):
        if count == k and not peak(load_float(scaled + 4 * at)) > floor:
            continue
        for token in range(at, min(at + 16, tokens)):
            key = key_of(load_scalar(scaled + 4 * token), token)
            if count < k:
                store_i64(heap + 8 * count, key)
                count += 1
                if count == k:
                    heapify(heap, k)
                    floor = value_of(load_i64(heap))
            elif key > load_i64(heap):
                store_i64(heap, key)
                sift(heap, 0, k)
                floor = value_of(load_i64(heap))


@njit
def collected(scaled, tokens, floor, heap):  # type: ignore[no-untyped-def]
    """Every token of at least `floor`, as a heap; returns how many."""
    count = 0
    for at in range(0, tokens, 16):
        if peak(load_float(scaled + 4 * at)) >= floor:
            for token in range(at, min(at + 16, tokens)):
                value = load_scalar(scaled + 4 * token)
                if value >= floor:
                    store_i64(heap + 8 * count, key_of(value, token))
                    count += 1
    heapify(heap, count)
    return count


def cut_rows(arguments: int, scratch: int, begin: int, end: int) -> None:
    """Tokens of the rows that are cut. rooms: for each worker, place for a row of fp32 and a row of words."""
    temperature, top_k, top_p, min_p = (
        argument(arguments, 0),
        argument(arguments, 1),
        argument(arguments, 2),
        argument(arguments, 3),
    )
    seeds, positions, logits, out = (
        argument(arguments, 4),
        argument(arguments, 5),
        argument(arguments, 6),
        argument(arguments, 7),
    )
    tokens, half, rooms, base = (
        argument(arguments, 8),
        argument(arguments, 9),
        argument(arguments, 10),
        argument(arguments, 11),
    )
    size = 4 - 2 * half
    padded = (tokens + 15) // 16 * 64
    scaled = rooms + (scratch - base) // SCRATCH_BYTES * 3 * padded
    heap = scaled + padded
    for row in range(begin, end):
        if not is_cut(temperature, top_k, top_p, min_p, row, tokens):
            continue
        divisor = splat(load_scalar(temperature + 4 * row))
        best = splat(LEAST)
        for at in range(0, tokens, 16):
            value = read(logits + (row * tokens + at) * size, half, tokens - at) / divisor
            value = inside(value, 0, tokens - at, LEAST)
            best = maximum(value, best)
            store_float(scaled + 4 * at, value)
        top = maximum_lane(best)
        if not top > LEAST:
            # All forbidden: the first; a NaN among them: no token at all.
            store_i64(out + 8 * row, 0 if top == LEAST else tokens)
            continue
        k, p, least = (
            load_i64(top_k + 8 * row),
            load_scalar(top_p + 4 * row),
            load_scalar(min_p + 4 * row),
        )
        whole = np.float32(0.0)
        if k > 0:
            count = min(k, tokens)
            largest(scaled, tokens, count, heap)
            descend(heap, count)
            for rank in range(count):
                whole += exp_of(value_of(load_i64(heap + 8 * rank)) - top)
        else:
            sums = zeros()
            for at in range(0, tokens, 16):
                sums = sums + exp(load_float(scaled + 4 * at) - splat(top))
            whole = total(sums)
            # A tenth below the bounds, so that no rounding leaves a survivor out.
            bound = max((np.float32(1.0) - p) * whole / np.float32(tokens), least) * np.float32(0.9)
            floor = LEAST
            if bound > np.float32(1e-30):
                floor = top + peak(log(splat(bound)))
            count = collected(scaled, tokens, floor, heap)
            descend(heap, count)
        seed, position = load_i64(seeds + 8 * row), load_i64(positions + 8 * row)
        before, first = 0.0, np.float32(1.0) / whole
        chosen, most = token_of(load_i64(heap)), LEAST
        for rank in range(count):
            key = load_i64(heap + 8 * rank)
            probability = exp_of(value_of(key) - top) / whole
            if rank > 0 and (not before < p or not probability >= least * first):
                break
            token = token_of(key)
            gumbel(scratch, token // 4, seed, position)
            value = value_of(key) + load_scalar(scratch + 4 * (token & 3))
            if value > most or (value == most and token < chosen):
                chosen, most = token, value
            before += probability
        store_i64(out + 8 * row, chosen)
