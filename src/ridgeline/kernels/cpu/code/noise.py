"""Gumbel noise in compiled code: the numbers of ops/sample.py, sixty-four tokens at a time.

Knows Philox and its counters. The words are those of the reference bit for bit, the logarithms to the last
place or two. It must not know logits.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import types

from ridgeline.kernels.cpu.code.vector import (
    F32X,
    I32,
    I32X,
    I64,
    LANE,
    LANES,
    emitted,
    logarithm,
    pointer,
    same,
    shuffled,
    spread,
    whole,
)
from ridgeline.ops.sample import MULTIPLIERS, ROUNDS, WEYL, WORD

I64X = ir.VectorType(I64, LANES)
F64X = ir.VectorType(ir.DoubleType(), LANES)


def _product(b: Any, x: Any, factor: int) -> tuple[Any, Any]:
    """Upper and lower words of x * factor."""
    wide = b.mul(b.zext(x, I64X), ir.Constant(I64X, [ir.Constant(I64, factor)] * LANES))
    high = b.lshr(wide, ir.Constant(I64X, [ir.Constant(I64, 32)] * LANES))
    return b.trunc(high, I32X), b.trunc(wide, I32X)


def philox(b: Any, counter: list[Any], key: list[Any]) -> list[Any]:
    """Philox4x32-10 on 16 counters; see the reference."""
    x0, x1, x2, x3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        high, low = _product(b, x0, MULTIPLIERS[0])
        upper, lower = _product(b, x2, MULTIPLIERS[1])
        x0, x1, x2, x3 = b.xor(b.xor(upper, x1), k0), lower, b.xor(b.xor(high, x3), k1), low
        k0, k1 = b.add(k0, whole(WEYL[0])), b.add(k1, whole(WEYL[1]))
    return [x0, x1, x2, x3]


def gumbel_of(b: Any, words: Any) -> Any:
    """-log(-log(1 - u)) for u = (word + 1/2) / 2^32, rounded to fp32 as the reference rounds it."""

    def doubles(value: float) -> ir.Constant:
        return ir.Constant(F64X, [ir.Constant(ir.DoubleType(), value)] * LANES)

    exact = b.fmul(b.fadd(b.uitofp(words, F64X), doubles(0.5)), doubles(2.0**-32))
    u = b.fptrunc(exact, F32X)
    u = b.select(b.fcmp_ordered(">", u, same(1 - 2.0**-24)), same(1 - 2.0**-24), u)
    # log(1 - u) = log(w) + (what rounding 1 - u to w lost) / w, exact enough for the smallest u.
    w = b.fsub(same(1.0), u)
    lost = b.fsub(b.fsub(same(1.0), w), u)
    inner = b.fadd(logarithm(b, w), b.fdiv(lost, w))
    return b.fneg(logarithm(b, b.fneg(inner)))


@emitted(types.void, types.int64, types.int64, types.int64, types.int64)
def gumbel(b: Any, target: Any, group: Any, seed: Any, position: Any) -> None:
    """Noise of tokens 4 group .. 4 group + 63 to 64 fp32 numbers at `target`."""

    def word(value: Any, high: bool) -> Any:
        return spread(b, b.trunc(b.lshr(value, ir.Constant(I64, 32)) if high else value, I32))

    groups = b.add(LANE, word(group, False))
    key = [word(seed, False), word(seed, True)]
    words = philox(b, [groups, word(position, False), word(position, True), whole(0)], key)
    noise = [gumbel_of(b, item) for item in words]
    for quarter in range(4):
        order = [16 * (lane % 2) + 4 * quarter + lane // 4 for lane in range(LANES)]
        first, second = shuffled(b, noise[0], noise[1], order), shuffled(b, noise[2], noise[3], order)
        mixed = shuffled(b, first, second, [lane + 16 * (lane // 2 % 2) for lane in range(LANES)])
        b.store(mixed, pointer(b, b.add(target, ir.Constant(I64, 64 * quarter)), F32X), align=4)


assert WORD == (1 << 32) - 1
