"""`rope_kv_write` on the CPU: each head of each token once through, out to q or to its page.

Knows heads and slots. A unit of work is four tokens. bf16 is rounded where the reference rounds it.
"""

from __future__ import annotations

import math

import numpy as np

from ridgeline.kernels.cpu.blocks import ROPE_TOKENS
from ridgeline.kernels.cpu.code.memory import read, write
from ridgeline.kernels.cpu.code.part import njit
from ridgeline.kernels.cpu.code.vector import argument, copy, float_of, fma, load_i64, round_bfloat, splat, total, zeros


@njit
def inverse_rms(source, half, width, eps):  # type: ignore[no-untyped-def]
    squares = zeros()
    for at in range(0, width, 16):
        value = read(source + (4 - 2 * half) * at, half, width - at)
        squares = fma(value, value, squares)
    return np.float32(1.0) / math.sqrt(total(squares) / np.float32(width) + eps)


@njit
def normalized(x, scale, weight, half):  # type: ignore[no-untyped-def]
    value = x * splat(scale)
    if half:
        return round_bfloat(weight * round_bfloat(value))
    return weight * value


@njit
def turned(source, target, weight, cos, sin, eps, half, width):  # type: ignore[no-untyped-def]
    """One head: normalize if there is a weight, rotate if there are tables (addresses; 0: none)."""
    size = 4 - 2 * half
    scale = np.float32(1.0)
    if weight != 0:
        scale = inverse_rms(source, half, width, eps)
    elif cos == 0:
        copy(target, source, width * size)
        return
    middle = width // 2
    for at in range(0, middle, 16):
        count = middle - at
        low, high = size * at, size * (middle + at)
        first, second = read(source + low, half, count), read(source + high, half, count)
        if weight != 0:
            first = normalized(first, scale, read(weight + low, half, count), half)
            second = normalized(second, scale, read(weight + high, half, count), half)
        if cos != 0:
            c, s = read(cos + 4 * at, 0, count), read(sin + 4 * at, 0, count)
            first, second = first * c - second * s, second * c + first * s
        write(target + low, half, count, first)
        write(target + high, half, count, second)


def rope_tokens(arguments: int, scratch: int, begin: int, end: int) -> None:
    qkv, out = argument(arguments, 0), argument(arguments, 1)
    positions, slots = argument(arguments, 2), argument(arguments, 3)
    cos, sin = argument(arguments, 4), argument(arguments, 5)
    q_norm, k_norm, eps = argument(arguments, 6), argument(arguments, 7), float_of(argument(arguments, 8))
    k_pages, v_pages = argument(arguments, 9), argument(arguments, 10)
    # Small numbers share words: an argument list has 14.
    tokens, heads = argument(arguments, 11), argument(arguments, 12) >> 32
    kv_heads, half = (argument(arguments, 12) >> 1) & 0x7FFFFFFF, argument(arguments, 12) & 1
    block, width = argument(arguments, 13) >> 32, argument(arguments, 13) & 0xFFFFFFFF
    bytes_a_head = width * (4 - 2 * half)
    for token in range(begin * ROPE_TOKENS, min(end * ROPE_TOKENS, tokens)):
        source = qkv + token * (heads + 2 * kv_heads) * bytes_a_head
        c, s = 0, 0
        if cos != 0:
            table = load_i64(positions + 8 * token) * (width // 2) * 4
            c, s = cos + table, sin + table
        for head in range(heads):
            target = out + (token * heads + head) * bytes_a_head
            turned(source + head * bytes_a_head, target, q_norm, c, s, eps, half, width)
        slot = load_i64(slots + 8 * token)
        if slot < 0:
            continue
        for head in range(kv_heads):
            place = ((slot // block * kv_heads + head) * block + slot % block) * bytes_a_head
            turned(source + (heads + head) * bytes_a_head, k_pages + place, k_norm, c, s, eps, half, width)
            copy(v_pages + place, source + (heads + kv_heads + head) * bytes_a_head, bytes_a_head)
