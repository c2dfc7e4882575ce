"""Sixteen inner products at once: one row with sixteen, or four rows with four.

Knows row-major matrices of one dtype on both sides (weights as checkpoints store them). It must not know
whose rows they are. An inner product runs in lanes over the columns in order, then adds the lanes as
dots.py does, so it is the same bit for bit in either shape.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import types

from ridgeline.kernels.cpu.code.dots import at_once, sums
from ridgeline.kernels.cpu.code.part import njit
from ridgeline.kernels.cpu.code.tile import FLOAT, HALF, PAIRED, PAIRS
from ridgeline.kernels.cpu.code.vector import (
    BF16,
    F32X,
    I16,
    I16X,
    I32,
    I64,
    emitted,
    fused,
    invoke,
    masked_load,
    pointer,
    same,
    vector,
    widened,
)

I16W = ir.VectorType(I16, 32)


def _lanes(b: Any, kind: str, address: Any, left: Any) -> Any:
    """The next lanes of a row; `left`: how many exist, None for all."""
    if kind == FLOAT:
        return b.load(pointer(b, address, F32X), align=4) if left is None else masked_load(b, address, left, F32X)
    if kind == HALF:
        return widened(
            b, b.load(pointer(b, address, I16X), align=2) if left is None else masked_load(b, address, left, I16X)
        )
    if left is None:
        words = b.load(pointer(b, address, I16W), align=2)
    else:
        lower = masked_load(b, address, left, I16X)
        upper = masked_load(b, b.add(address, ir.Constant(I64, 32)), b.sub(left, ir.Constant(I64, 16)), I16X)
        mask = ir.Constant(ir.VectorType(I32, 32), [ir.Constant(I32, lane) for lane in range(32)])
        words = b.shuffle_vector(lower, upper, mask)
    return b.bitcast(words, ir.VectorType(BF16, 32))


def _grid(rows: int, kind: str) -> Any:
    columns, stride = 16 // rows, 32 if kind == PAIRS else 16
    size = 4 if kind == FLOAT else 2

    @emitted(vector, *[types.int64] * 8)
    def grid(b: Any, x0: Any, x1: Any, x2: Any, x3: Any, w: Any, pitch: Any, depth: Any, count: Any) -> Any:
        """Lane row * columns + column: x_row . w_column.

        x0 ..: addresses of as many rows as this shape has; w: rows `pitch` bytes apart, those from `count`
        on repeat the last one; depth: columns of both.
        """
        zero, last = ir.Constant(I64, 0), b.sub(count, ir.Constant(I64, 1))
        weights = []
        for number in range(columns):
            index = ir.Constant(I64, number)
            index = b.select(b.icmp_signed("<", index, last), index, last)
            weights.append(b.add(w, b.mul(index, pitch)))

        def step(at: Any, old: list[Any], left: Any = None) -> list[Any]:
            offset = b.mul(at, ir.Constant(I64, size))
            right = [_lanes(b, kind, b.add(place, offset), left) for place in weights]
            after = []
            for row, place in enumerate((x0, x1, x2, x3)[:rows]):
                value = _lanes(b, kind, b.add(place, offset), left)
                for column in range(columns):
                    acc = old[row * columns + column]
                    if kind == PAIRS:
                        name = "llvm.x86.avx512bf16.dpbf16ps.512"
                        after.append(invoke(b, name, F32X, acc, value, right[column]))
                    else:
                        after.append(fused(b, value, right[column], acc))
            return after

        at, values = at_once(b, zero, depth, stride, [same(0.0)] * 16, step)
        left, before = b.sub(depth, at), b.block
        with b.if_then(b.icmp_signed(">", left, zero)):
            extra, inside = step(at, values, left), b.block
        merged = []
        for plain, more in zip(values, extra, strict=True):
            phi = b.phi(F32X)
            phi.add_incoming(plain, before)
            phi.add_incoming(more, inside)
            merged.append(phi)
        return sums(b, merged)

    return grid


_kind = PAIRS if PAIRED else HALF
_line_float, _line_half = _grid(1, FLOAT), _grid(1, _kind)
_square_float, _square_half = _grid(4, FLOAT), _grid(4, _kind)


@njit
def line(x, w, pitch, depth, count, half):  # type: ignore[no-untyped-def]
    """x . w_column for 16 columns (rows of w, `pitch` bytes apart; those from `count` on repeat the last)."""
    if half:
        return _line_half(x, x, x, x, w, pitch, depth, count)
    return _line_float(x, x, x, x, w, pitch, depth, count)


@njit
def square(x0, x1, x2, x3, w, pitch, depth, count, half):  # type: ignore[no-untyped-def]
    """Lane 4 row + column: x_row . w_column for four rows and four columns."""
    if half:
        return _square_half(x0, x1, x2, x3, w, pitch, depth, count)
    return _square_float(x0, x1, x2, x3, w, pitch, depth, count)
