"""Inner products of one row with sixteen rows at once, and sums of weighted rows.

Knows row-major matrices of fp32 or bf16 (keys, values, weights as checkpoints store them). It must not
know whose rows they are. An inner product is 16 lanes over the columns in order, then the lanes by
neighbours, the same for each of the sixteen; a weighted sum takes its rows in order.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import types

from ridgeline.kernels.cpu.code.part import njit
from ridgeline.kernels.cpu.code.tile import WIDE
from ridgeline.kernels.cpu.code.vector import (
    F32,
    F32X,
    I16X,
    I64,
    LANES,
    emitted,
    fused,
    masked_load,
    pointer,
    same,
    shuffled,
    spread,
    vector,
    widened,
)


def at_once(b: Any, begin: Any, end: Any, step: int, carried: list[Any], body: Any) -> tuple[Any, list[Any]]:
    """A loop in LLVM: index from begin, while index + step <= end; body(index, values) -> values."""
    before = b.block
    head, inner, done = (b.append_basic_block(name) for name in ("head", "body", "done"))
    b.branch(head)
    b.position_at_end(head)
    index = b.phi(I64)
    index.add_incoming(begin, before)
    phis = [b.phi(value.type) for value in carried]
    for phi, value in zip(phis, carried, strict=True):
        phi.add_incoming(value, before)
    following = b.add(index, ir.Constant(I64, step))
    b.cbranch(b.icmp_signed("<=", following, end), inner, done)
    b.position_at_end(inner)
    values = body(index, phis)
    index.add_incoming(following, b.block)
    for phi, value in zip(phis, values, strict=True):
        phi.add_incoming(value, b.block)
    b.branch(head)
    b.position_at_end(done)
    return index, phis


def _by_lane(of: Any) -> list[int]:
    """A shuffle of two vectors, given per quarter: of(quarter) -> four sources."""
    return [source for quarter in range(4) for source in of(4 * quarter)]


# Sixteen vectors become one of their sums: neighbours within quarters first, then the quarters. These
# orders are single unpack or quarter-shuffle instructions of AVX-512.
_LOW = _by_lane(lambda q: (q, 16 + q, q + 1, 17 + q))
_HIGH = _by_lane(lambda q: (q + 2, 18 + q, q + 3, 19 + q))
_LOW_PAIR = _by_lane(lambda q: (q, q + 1, 16 + q, 17 + q))
_HIGH_PAIR = _by_lane(lambda q: (q + 2, q + 3, 18 + q, 19 + q))
_EVEN_QUARTERS = [quarter * 4 + lane for quarter in (0, 2, 4, 6) for lane in range(4)]
_ODD_QUARTERS = [quarter * 4 + lane for quarter in (1, 3, 5, 7) for lane in range(4)]


def sums(b: Any, vectors: list[Any]) -> Any:
    """One vector with the lanes of vector i added up in lane i."""

    def halved(pairs: list[Any], low: list[int], high: list[int]) -> list[Any]:
        return [
            b.fadd(shuffled(b, x, y, low), shuffled(b, x, y, high))
            for x, y in zip(pairs[::2], pairs[1::2], strict=True)
        ]

    level = halved(vectors, _LOW, _HIGH)
    level = halved(level, _LOW_PAIR, _HIGH_PAIR)
    level = halved(level, _EVEN_QUARTERS, _ODD_QUARTERS)
    return halved(level, _EVEN_QUARTERS, _ODD_QUARTERS)[0]


def _dots(half: bool) -> Any:
    size = 2 if half else 4
    together = LANES if WIDE else 4

    @emitted(vector, *[types.int64] * 5)
    def dots(b: Any, x: Any, rows: Any, stride: Any, depth: Any, count: Any) -> Any:
        """x . row for 16 rows `stride` bytes apart; rows from `count` on repeat the last one.

        x: fp32, with zeros up to a multiple of 16; depth: columns.
        """
        zero, last = ir.Constant(I64, 0), b.sub(count, ir.Constant(I64, 1))
        results: list[Any] = []
        for group in range(0, LANES, together):
            places = []
            for number in range(group, group + together):
                row = ir.Constant(I64, number)
                row = b.select(b.icmp_signed("<", row, last), row, last)
                places.append(b.add(rows, b.mul(row, stride)))

            def step(at: Any, old: list[Any], places: list[Any] = places, left: Any = None) -> list[Any]:
                value = b.load(pointer(b, b.add(x, b.mul(at, ir.Constant(I64, 4))), F32X), align=4)
                after = []
                for place, acc in zip(places, old, strict=True):
                    source = b.add(place, b.mul(at, ir.Constant(I64, size)))
                    kind, align = (I16X, 2) if half else (F32X, 4)
                    if left is None:
                        row = b.load(pointer(b, source, kind), align=align)
                    else:
                        row = masked_load(b, source, left, kind)
                    after.append(fused(b, value, widened(b, row) if half else row, acc))
                return after

            at, values = at_once(b, zero, depth, LANES, [same(0.0)] * together, step)
            left = b.sub(depth, at)
            before = b.block
            with b.if_then(b.icmp_signed(">", left, zero)):
                extra = step(at, values, left=left)
                inside = b.block
            merged = []
            for plain, more in zip(values, extra, strict=True):
                phi = b.phi(F32X)
                phi.add_incoming(plain, before)
                phi.add_incoming(more, inside)
                merged.append(phi)
            results += merged
        return sums(b, results)

    return dots


dots_float = _dots(False)
dots_half = _dots(True)


@njit
def dots(x, rows, stride, depth, count, half):  # type: ignore[no-untyped-def]
    if half:
        return dots_half(x, rows, stride, depth, count)
    return dots_float(x, rows, stride, depth, count)


def _mix(vectors: int, half: bool) -> Any:
    size = 2 if half else 4

    @emitted(types.void, *[types.int64] * 6)
    def mix(b: Any, weights: Any, rows: Any, stride: Any, begin: Any, end: Any, acc: Any) -> None:
        """acc[0 .. 16 vectors) += weights[i] * rows[i] for i in begin .. end - 1, in order; acc: fp32."""
        places = [pointer(b, b.add(acc, ir.Constant(I64, 64 * i)), F32X) for i in range(vectors)]

        def step(index: Any, old: list[Any]) -> list[Any]:
            weight = b.load(pointer(b, b.add(weights, b.mul(index, ir.Constant(I64, 4))), F32), align=4)
            row = b.add(rows, b.mul(index, stride))
            value, after = spread(b, weight), []
            for i, item in enumerate(old):
                place = b.add(row, ir.Constant(I64, 16 * size * i))
                lanes = b.load(pointer(b, place, I16X if half else F32X), align=size)
                after.append(fused(b, value, widened(b, lanes) if half else lanes, item))
            return after

        _, values = at_once(b, begin, end, 1, [b.load(place, align=4) for place in places], step)
        for place, value in zip(places, values, strict=True):
            b.store(value, place, align=4)

    return mix


mix8_float, mix4_float, mix1_float = _mix(8, False), _mix(4, False), _mix(1, False)
mix8_half, mix4_half, mix1_half = _mix(8, True), _mix(4, True), _mix(1, True)


@njit
def mix(weights, rows, stride, begin, end, acc, vectors, half):  # type: ignore[no-untyped-def]
    """acc[0 .. 16 vectors) += weights[i] * rows[i], see above, for any number of vectors."""
    if half:
        while vectors >= 8:
            mix8_half(weights, rows, stride, begin, end, acc)
            rows, acc, vectors = rows + 256, acc + 512, vectors - 8
        if vectors >= 4:
            mix4_half(weights, rows, stride, begin, end, acc)
            rows, acc, vectors = rows + 128, acc + 256, vectors - 4
        while vectors > 0:
            mix1_half(weights, rows, stride, begin, end, acc)
            rows, acc, vectors = rows + 32, acc + 64, vectors - 1
        return
    while vectors >= 8:
        mix8_float(weights, rows, stride, begin, end, acc)
        rows, acc, vectors = rows + 512, acc + 512, vectors - 8
    if vectors >= 4:
        mix4_float(weights, rows, stride, begin, end, acc)
        rows, acc, vectors = rows + 256, acc + 256, vectors - 4
    while vectors > 0:
        mix1_float(weights, rows, stride, begin, end, acc)
        rows, acc, vectors = rows + 64, acc + 64, vectors - 1
