"""Rows of tensors in memory as vectors: fp32 or bf16, whole vectors or a row's last few lanes.

Knows element sizes and the ends of rows. It must not know any op. Throughout, `half` is 1 for bf16 and 0
for fp32: a branch at run time, so that every kernel is compiled once for both.
"""

from __future__ import annotations

from ridgeline.kernels.cpu.code.part import njit
from ridgeline.kernels.cpu.code.vector import (
    load_bfloat,
    load_bfloat_part,
    load_float,
    load_float_part,
    load_i64,
    store_bfloat,
    store_bfloat_part,
    store_float,
    store_float_part,
    zeros,
)


@njit
def read(address, half, count):  # type: ignore[no-untyped-def]
    """The next 16 lanes at an address; lanes from `count` on, if it is below 16, are 0 and not touched."""
    if count >= 16:
        if half:
            return load_bfloat(address)
        return load_float(address)
    if half:
        return load_bfloat_part(address, count)
    return load_float_part(address, count)


@njit
def write(address, half, count, x):  # type: ignore[no-untyped-def]
    """The first `count` lanes (at most 16) to an address."""
    if count >= 16:
        if half:
            store_bfloat(address, x)
        else:
            store_float(address, x)
    elif half:
        store_bfloat_part(address, count, x)
    else:
        store_float_part(address, count, x)


@njit
def added(x, target, half, width):  # type: ignore[no-untyped-def]
    """Write x + target over the target, rounded to its type."""
    size = 4 - 2 * half
    for at in range(0, width, 16):
        count = width - at
        value = read(x + size * at, half, count) + read(target + size * at, half, count)
        write(target + size * at, half, count, value)


@njit
def row_at(ids, place, rows):  # type: ignore[no-untyped-def]
    """The row that ids[place] names. One outside the table must not read foreign memory; the engine has refused it."""
    return min(max(load_i64(ids + 8 * place), 0), rows - 1)


@njit
def widen(source, target, half, count):  # type: ignore[no-untyped-def]
    """Copy `count` elements to fp32."""
    size = 4 - 2 * half
    for at in range(0, count, 16):
        write(target + 4 * at, 0, count - at, read(source + size * at, half, count - at))


@njit
def clear(address, count):  # type: ignore[no-untyped-def]
    """Zero `count` fp32 numbers, a multiple of 16."""
    for at in range(0, count, 16):
        store_float(address + 4 * at, zeros())
