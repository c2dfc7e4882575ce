"""The inner loop of matrix products: a few rows times a panel of 64 output features.

Knows registers. It must not know panels beyond the one it is given, nor threads. Every output is a sum
over k in order, in its own lane, whatever tile it falls into, so a row's result is the same alone and in
any batch, bit for bit. How a step of that sum is done depends on dtype and machine:

    FLOAT  acc = fma(x[k], w[k], acc)
    HALF   the same, after widening bf16 to fp32
    PAIRS  acc + x[k] w[k] + x[k + 1] w[k + 1] by the instruction vdpbf16ps of AVX512-BF16, twice as fast
"""

from __future__ import annotations

from typing import Any

from llvmlite import binding, ir
from numba.core import types

from ridgeline.kernels.cpu.blocks import PASS_ROWS
from ridgeline.kernels.cpu.code.memory import clear, widen
from ridgeline.kernels.cpu.code.part import njit
from ridgeline.kernels.cpu.code.vector import (
    BF16,
    F32,
    F32X,
    I8,
    I16,
    I16X,
    I32,
    I32X,
    I64,
    argument,
    emitted,
    fused,
    invoke,
    pointer,
    prefetch,
    prefetch_once,
    shuffled,
    spread,
    whole,
    widened,
)
from ridgeline.ops.weight import PANEL

FLOAT, HALF, PAIRS = "float", "half", "pairs"

_features = binding.get_host_cpu_features()
WIDE = bool(_features.get("avx512f"))
"""Whether the machine has 32 registers of 16 lanes. If not, higher tiles take fewer columns at a time."""
PAIRED = WIDE and bool(_features.get("avx512bf16"))
"""Whether bf16 is multiplied in pairs."""

ROWS = 6
"""Rows of the highest tile: 6 x 4 accumulators, 4 weights and an x leave a few of 32 registers."""

ONCE_ROWS = 2
"""Rows of the highest tile that may be told that its weights are read once."""

ONCE_AHEAD_BYTES = 4 << 10
"""How far before they are needed such weights are fetched."""

Sums = list[list[Any]]


def _columns(rows: int) -> int:
    """Vectors of columns that a tile of `rows` keeps in registers."""
    if WIDE or rows == 1:
        return 4
    return 2 if rows == 2 else 1


def _quarters(*order: int) -> list[int]:
    """A shuffle of two vectors by quarters: 0 .. 3 of the first, 4 .. 7 of the second."""
    return [4 * quarter + lane for quarter in order for lane in range(4)]


# Sums of two vectors of columns are kept as the weights come out of the registers: for HALF the even
# columns of 32 and the odd ones (lower and upper halves of 16 words), for PAIRS as two rows interleave
# within quarters. (there, there, back, back) for each.
ORDERS = {
    HALF: (
        [2 * i for i in range(16)],
        [2 * i + 1 for i in range(16)],
        [i // 2 + 16 * (i % 2) for i in range(16)],
        [8 + i // 2 + 16 * (i % 2) for i in range(16)],
    ),
    PAIRS: (_quarters(0, 2, 4, 6), _quarters(1, 3, 5, 7), _quarters(0, 4, 1, 5), _quarters(2, 6, 3, 7)),
}


def _reordered(b: Any, sums: Sums, first: list[int], second: list[int]) -> Sums:
    return [
        [shuffled(b, line[i], line[i + 1], order) for i in range(0, len(line), 2) for order in (first, second)]
        for line in sums
    ]


def _place(b: Any, base: Any, k: Any, stride: int, offset: int, kind: Any) -> Any:
    return pointer(b, b.add(base, b.add(b.mul(k, ir.Constant(I64, stride)), ir.Constant(I64, offset))), kind)


def _weights(b: Any, kind: str, w: Any, k: Any, first: int, count: int) -> list[Any]:
    """Row k of the panel: `count` vectors from `first` on, as fp32."""
    if kind == FLOAT:
        return [b.load(_place(b, w, k, 4 * PANEL, 64 * index, F32X), align=4) for index in range(first, first + count)]
    if count == 1:
        return [widened(b, b.load(_place(b, w, k, 2 * PANEL, 32 * first, I16X), align=2))]
    weights = []
    for index in range(first, first + count, 2):
        words = b.load(_place(b, w, k, 2 * PANEL, 32 * index, I32X), align=2)
        weights += [b.shl(words, whole(16)), b.and_(words, whole(0xFFFF0000))]
    return [b.bitcast(words, F32X) for words in weights]


def _step(b: Any, kind: str, x: list[Any], w: Any, k: Any, first: int, sums: Sums) -> Sums:
    """sums[row][vector] + x[row][k] * w[k][vector], for vectors from `first` on."""
    weights = _weights(b, kind, w, k, first, len(sums[0]))
    after = []
    for row, old in zip(x, sums, strict=True):
        value = spread(b, b.load(_place(b, row, k, 4, 0, F32), align=4))
        after.append([fused(b, value, weight, acc) for weight, acc in zip(weights, old, strict=True)])
    return after


def _pair_step(b: Any, x: list[Any], w: Any, k: Any, last: bool, sums: Sums) -> Sums:
    """Two k at once; `last`: only k exists, its partner counts as zeros."""
    wide, bfloats = ir.VectorType(I16, 32), ir.VectorType(BF16, 32)
    pairs = []
    for offset in (0, 64):
        rows = [b.load(_place(b, w, k, 2 * PANEL, offset, wide), align=2)]
        beside = ir.Constant(wide, None) if last else b.load(_place(b, w, k, 2 * PANEL, offset + 128, wide), align=2)
        rows.append(beside)
        for begin in (0, 4):
            order = [
                8 * lane + begin + i // 2 + 32 * (i % 2) for lane in range(4) for i in range(8)
            ]  # one unpack instruction
            pairs.append(b.bitcast(shuffled(b, rows[0], rows[1], order), bfloats))
    after = []
    for row, old in zip(x, sums, strict=True):
        if last:
            word = b.zext(b.load(_place(b, row, k, 2, 0, I16), align=2), I32)
        else:
            word = b.load(_place(b, row, k, 2, 0, I32), align=2)
        value = b.bitcast(spread(b, word), bfloats)
        name = "llvm.x86.avx512bf16.dpbf16ps.512"
        after.append([invoke(b, name, F32X, acc, value, pair) for pair, acc in zip(pairs, old, strict=True)])
    return after


def _loop(b: Any, begin: Any, end: Any, stride: int, sums: Sums, body: Any) -> tuple[Any, Sums]:
    """k from begin on, while k + stride <= end; body(k, sums) -> sums. Returns the k reached, and the sums."""
    before = b.block
    head, inner, done = (b.append_basic_block(f"tile.{name}") for name in ("head", "body", "done"))
    b.branch(head)
    b.position_at_end(head)
    k = b.phi(I64)
    k.add_incoming(begin, before)
    phis = [[b.phi(F32X) for _ in line] for line in sums]
    following = b.add(k, ir.Constant(I64, stride))
    for line, values in zip(phis, sums, strict=True):
        for phi, value in zip(line, values, strict=True):
            phi.add_incoming(value, before)
    b.cbranch(b.icmp_signed("<=", following, end), inner, done)
    b.position_at_end(inner)
    after = body(k, phis)
    k.add_incoming(following, b.block)
    for line, values in zip(phis, after, strict=True):
        for phi, value in zip(line, values, strict=True):
            phi.add_incoming(value, b.block)
    b.branch(head)
    b.position_at_end(done)
    return k, phis


def _tile(rows: int, kind: str, once: bool = False) -> Any:
    together = 4 if rows <= 2 else 2
    count = 4 if kind == PAIRS else _columns(rows)
    stride = 2 * together if kind == PAIRS else together
    row_bytes = PANEL * (4 if kind == FLOAT else 2)

    @emitted(types.void, *[types.int64] * 6)
    def tile(b: Any, x: Any, pitch: Any, w: Any, depth: Any, acc: Any, ahead: Any) -> None:
        """acc[row][64] += sum of x[row][k] w[k][64] for k below depth.

        x: rows `pitch` bytes apart, fp32 (for PAIRS bf16); acc: fp32. In tiles of three rows and more half as
        many bytes as the weights have are fetched from `ahead` on into the second-level cache.
        """
        lines = [b.add(x, b.mul(pitch, ir.Constant(I64, row))) for row in range(rows)]
        for first in range(0, 4, count):
            places = [
                [pointer(b, b.add(acc, ir.Constant(I64, 256 * row + 64 * (first + i))), F32X) for i in range(count)]
                for row in range(rows)
            ]
            sums = [[b.load(place, align=4) for place in line] for line in places]
            shuffles = ORDERS[kind] if kind != FLOAT and count > 1 else None
            if shuffles:
                sums = _reordered(b, sums, *shuffles[:2])

            def one(k: Any, sums: Sums, first: int = first) -> Sums:
                if kind == PAIRS:
                    return _pair_step(b, lines, w, k, True, sums)
                return _step(b, kind, lines, w, k, first, sums)

            def pair(k: Any, sums: Sums) -> Sums:
                return _pair_step(b, lines, w, k, False, sums)

            def several(k: Any, sums: Sums, first: int = first) -> Sums:
                if rows > 2 and first == 0:
                    for offset in range(0, stride * row_bytes // 2, 64):
                        prefetch(b, _place(b, ahead, k, row_bytes // 2, offset, I8))
                if once and first == 0:
                    for offset in range(0, stride * row_bytes, 64):
                        prefetch_once(b, _place(b, w, k, row_bytes, ONCE_AHEAD_BYTES + offset, I8))
                for number in range(together):
                    if kind == PAIRS:
                        sums = pair(b.add(k, ir.Constant(I64, 2 * number)), sums)
                    else:
                        sums = one(b.add(k, ir.Constant(I64, number)), sums, first)
                return sums

            k, sums = _loop(b, ir.Constant(I64, 0), depth, stride, sums, several)
            if kind == PAIRS:
                k, sums = _loop(b, k, depth, 2, sums, pair)
            k, sums = _loop(b, k, depth, 1, sums, one)
            if shuffles:
                sums = _reordered(b, sums, *shuffles[2:])
            for line, values in zip(places, sums, strict=True):
                for place, value in zip(line, values, strict=True):
                    b.store(value, place, align=4)

    return tile


_f1, _f2, _f3, _f4, _f5, _f6 = (_tile(rows, FLOAT) for rows in range(1, ROWS + 1))
_h1, _h2, _h3, _h4, _h5, _h6 = (_tile(rows, PAIRS if PAIRED else HALF) for rows in range(1, ROWS + 1))

_fo1, _fo2 = (_tile(rows, FLOAT, True) for rows in range(1, ONCE_ROWS + 1))
_ho1, _ho2 = (_tile(rows, PAIRS if PAIRED else HALF, True) for rows in range(1, ONCE_ROWS + 1))


@njit
def float_tile(x: int, pitch: int, rows: int, w: int, depth: int, acc: int, ahead: int, once: bool) -> None:
    if once and rows == 1:
        _fo1(x, pitch, w, depth, acc, ahead)
    elif once and rows == 2:
        _fo2(x, pitch, w, depth, acc, ahead)
    elif rows == 6:
        _f6(x, pitch, w, depth, acc, ahead)
    elif rows == 1:
        _f1(x, pitch, w, depth, acc, ahead)
    elif rows == 2:
        _f2(x, pitch, w, depth, acc, ahead)
    elif rows == 3:
        _f3(x, pitch, w, depth, acc, ahead)
    elif rows == 4:
        _f4(x, pitch, w, depth, acc, ahead)
    elif rows == 5:
        _f5(x, pitch, w, depth, acc, ahead)


@njit
def half_tile(x: int, pitch: int, rows: int, w: int, depth: int, acc: int, ahead: int, once: bool) -> None:
    if once and rows == 1:
        _ho1(x, pitch, w, depth, acc, ahead)
    elif once and rows == 2:
        _ho2(x, pitch, w, depth, acc, ahead)
    elif rows == 6:
        _h6(x, pitch, w, depth, acc, ahead)
    elif rows == 1:
        _h1(x, pitch, w, depth, acc, ahead)
    elif rows == 2:
        _h2(x, pitch, w, depth, acc, ahead)
    elif rows == 3:
        _h3(x, pitch, w, depth, acc, ahead)
    elif rows == 4:
        _h4(x, pitch, w, depth, acc, ahead)
    elif rows == 5:
        _h5(x, pitch, w, depth, acc, ahead)


@njit
def block_rows(x: int, pitch: int, rows: int, w: int, depth: int, half: int, acc: int, once: bool) -> None:
    """acc[row][64] += x[row] @ block, in tiles of nearly equal height.

    Tiles after the first find the weights in the cache and would leave the memory idle, so tiles fetch the
    block that follows: the even ones its first half, the odd ones its second.
    """
    tiles = (rows + ROWS - 1) // ROWS
    behind = w + depth * PANEL * (4 - 2 * half)
    for tile in range(tiles):
        height = rows // (tiles - tile)
        ahead = behind + (tile & 1) * (depth * PANEL * (2 - half))
        if half:
            half_tile(x, pitch, height, w, depth, acc, ahead, once)
        else:
            float_tile(x, pitch, height, w, depth, acc, ahead, once)
        x, acc, rows = x + height * pitch, acc + height * PANEL * 4, rows - height


@njit
def read_once(arguments: int, unit: int, units: int) -> bool:
    """Whether unit number `unit` of a call is not one of those that should stay in the cache, evenly spread."""
    return unit * argument(arguments, -1) % units >= argument(arguments, -1)


BLOCK = 512
"""Inputs taken at a time: 128 KiB of fp32 weights stay in the second-level cache while rows pass by. Even,
so that pairs are the same in any block."""

ACC_BYTES = PASS_ROWS * PANEL * 4
WIDE_BYTES = PASS_ROWS * BLOCK * 4


@njit
def product(x: int, pitch: int, rows: int, w: int, depth: int, half: int, acc: int, wide: int, once: bool) -> None:
    """acc[row][64] = x[row] @ panel for at most PASS_ROWS rows.

    x: rows `pitch` bytes apart; w: a panel [depth][64]; half: whether both are bf16; acc: fp32;
    wide: WIDE_BYTES of scratch; once: whether the panel will be out of the cache when it is read again anyway.
    """
    clear(acc, rows * PANEL)
    size = 4 - 2 * half
    for first in range(0, depth, BLOCK):
        count = min(BLOCK, depth - first)
        block = w + first * PANEL * size
        if half and not PAIRED:
            for row in range(rows):
                widen(x + row * pitch + 2 * first, wide + 4 * BLOCK * row, 1, count)
            block_rows(wide, 4 * BLOCK, rows, block, count, half, acc, once)
        else:
            block_rows(x + first * size, pitch, rows, block, count, half, acc, once)
