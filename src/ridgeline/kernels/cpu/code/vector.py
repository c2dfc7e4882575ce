"""Sixteen fp32 lanes as a value in compiled code, and what kernels do with them.

Knows LLVM's <16 x float>: loads, stores, arithmetic in a fixed order, exponentials, logarithms. LLVM maps
it onto whatever the machine has (one AVX-512 register, two of AVX2, four of NEON), so results are the same
on all of them but for the hardware's own fused multiply-add. It must not know any op, nor threads.
"""

from __future__ import annotations

import inspect
import operator
import struct
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import types
from numba.core.typing.templates import AbstractTemplate, infer_global
from numba.extending import intrinsic, lower_builtin, models, register_model

LANES = 16

I8, I16, I32, I64 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64)
F32 = ir.FloatType()
F32X = ir.VectorType(F32, LANES)


class _BFloat(ir.Type):
    """LLVM's bfloat, which llvmlite does not name."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


BF16 = _BFloat()
I16X = ir.VectorType(I16, LANES)
I32X = ir.VectorType(I32, LANES)


class VectorType(types.Type):
    """numba's name for <16 x float>."""

    def __init__(self) -> None:
        super().__init__("ridgeline.vector")


vector = VectorType()


@register_model(VectorType)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, F32X)


def emitted(result: Any, *arguments: Any) -> Callable[[Callable[..., Any]], Any]:
    """Make a function of compiled code from emit(builder, *values) -> value.

    result, arguments: numba types; arguments are converted to them as numba converts numbers.
    """

    def wrap(emit: Callable[..., Any]) -> Any:
        def typed(context: Any, *given: Any) -> Any:
            def lower(target: Any, builder: Any, signature: Any, values: Any) -> Any:
                value = emit(builder, *values)
                return target.get_dummy_value() if result is types.void else value

            return result(*arguments), lower

        names = ["context", *(f"value{index}" for index in range(len(arguments)))]
        place = inspect.Parameter.POSITIONAL_OR_KEYWORD
        typed.__signature__ = inspect.Signature([inspect.Parameter(name, place) for name in names])  # type: ignore[attr-defined]
        typed.__name__ = emit.__name__
        typed.__doc__ = emit.__doc__
        typed.__module__ = emit.__module__
        return intrinsic(typed)

    return wrap


# What emitters share. `b` is the LLVM builder throughout.


def bits(value: float) -> int:
    return int(struct.unpack("<I", struct.pack("<f", value))[0])


def number(value: float) -> ir.Constant:
    """A scalar fp32 constant, rounded from double."""
    return ir.Constant(F32, struct.unpack("<f", struct.pack("<f", value))[0])


def same(value: float) -> ir.Constant:
    """A constant in every lane."""
    return ir.Constant(F32X, [number(value)] * LANES)


def whole(value: int) -> ir.Constant:
    """An integer in every lane."""
    return ir.Constant(I32X, [ir.Constant(I32, value)] * LANES)


LANE = ir.Constant(I32X, [ir.Constant(I32, lane) for lane in range(LANES)])


def pointer(b: Any, address: Any, kind: Any) -> Any:
    return b.inttoptr(address, kind.as_pointer())


def invoke(b: Any, name: str, result: Any, *values: Any) -> Any:
    """Call an LLVM intrinsic (or a C function) by its name."""
    kind = ir.FunctionType(result, [value.type for value in values])
    function = b.module.globals.get(name)
    if function is None:
        function = ir.Function(b.module, kind, name)
    return b.call(function, list(values))


def prefetch(b: Any, at: Any) -> None:
    """Bring a line into the second-level cache; an address that is not mapped does nothing."""
    read, second_level, data = (ir.Constant(I32, value) for value in (0, 2, 1))
    invoke(b, "llvm.prefetch.p0", ir.VoidType(), at, read, second_level, data)


def prefetch_once(b: Any, at: Any) -> None:
    """Bring a line that will be read once: it displaces others in the near caches only."""
    read, never_again, data = (ir.Constant(I32, value) for value in (0, 0, 1))
    invoke(b, "llvm.prefetch.p0", ir.VoidType(), at, read, never_again, data)


def fused(b: Any, x: Any, y: Any, z: Any) -> Any:
    return invoke(b, "llvm.fma.v16f32", F32X, x, y, z)


def spread(b: Any, scalar: Any) -> Any:
    kind = ir.VectorType(scalar.type, LANES)
    one = b.insert_element(ir.Constant(kind, ir.Undefined), scalar, ir.Constant(I32, 0))
    return b.shuffle_vector(one, ir.Constant(kind, ir.Undefined), ir.Constant(I32X, [ir.Constant(I32, 0)] * LANES))


def shuffled(b: Any, x: Any, y: Any, order: list[int]) -> Any:
    mask = ir.Constant(ir.VectorType(I32, len(order)), [ir.Constant(I32, lane) for lane in order])
    return b.shuffle_vector(x, y, mask)


def widened(b: Any, halves: Any) -> Any:
    """<16 x i16> holding bf16 -> <16 x float>."""
    return b.bitcast(b.shl(b.zext(halves, I32X), whole(16)), F32X)


def narrowed(b: Any, x: Any) -> Any:
    """<16 x float> -> <16 x i32> whose upper halves are bf16, rounded to nearest, ties to even."""
    raw = b.bitcast(x, I32X)
    odd = b.and_(b.lshr(raw, whole(16)), whole(1))
    rounded = b.add(raw, b.add(odd, whole(0x7FFF)))
    return b.select(b.fcmp_unordered("uno", x, x), b.or_(raw, whole(0x400000)), rounded)


def first_lanes(b: Any, count: Any) -> Any:
    """A mask of the lanes below `count` (i64)."""
    return b.icmp_signed("<", LANE, spread(b, b.trunc(count, I32)))


def masked_load(b: Any, address: Any, count: Any, kind: Any) -> Any:
    """A vector of `kind` whose lanes from `count` on are 0 and not read."""
    name, align = ("v16i16", 2) if kind == I16X else ("v16f32", 4)
    at, mask = pointer(b, address, kind), first_lanes(b, count)
    return invoke(b, f"llvm.masked.load.{name}.p0", kind, at, ir.Constant(I32, align), mask, ir.Constant(kind, None))


def _masked_store(b: Any, value: Any, address: Any, count: Any, name: str, align: int) -> None:
    at = pointer(b, address, value.type)
    mask = first_lanes(b, count)
    invoke(b, f"llvm.masked.store.{name}.p0", ir.VoidType(), value, at, ir.Constant(I32, align), mask)


# Arithmetic: + - * / on vectors, each lane rounded as IEEE says.


def _arithmetic(symbol: Any, emit: Callable[[Any, Any, Any], Any]) -> None:
    @infer_global(symbol)
    class _Typed(AbstractTemplate):
        def generic(self, args: Any, kws: Any) -> Any:
            if tuple(args) == (vector, vector):
                return vector(vector, vector)
            return None

    @lower_builtin(symbol, vector, vector)
    def _lower(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return emit(builder, args[0], args[1])


_arithmetic(operator.add, lambda b, x, y: b.fadd(x, y))
_arithmetic(operator.sub, lambda b, x, y: b.fsub(x, y))
_arithmetic(operator.mul, lambda b, x, y: b.fmul(x, y))
_arithmetic(operator.truediv, lambda b, x, y: b.fdiv(x, y))


@emitted(vector, vector, vector, vector)
def fma(b: Any, x: Any, y: Any, z: Any) -> Any:
    """x * y + z, rounded once."""
    return fused(b, x, y, z)


@emitted(vector, vector, vector)
def larger(b: Any, x: Any, y: Any) -> Any:
    return b.select(b.fcmp_ordered(">", x, y), x, y)


@emitted(vector, vector, vector)
def maximum(b: Any, x: Any, y: Any) -> Any:
    """The larger of each lane; NaN if either is NaN."""
    return invoke(b, "llvm.maximum.v16f32", F32X, x, y)


@emitted(vector, types.float32)
def splat(b: Any, scalar: Any) -> Any:
    return spread(b, scalar)


@emitted(vector)
def zeros(b: Any) -> Any:
    return same(0.0)


def fold(b: Any, x: Any, combine: Callable[[Any, Any], Any]) -> Any:
    """All lanes into one scalar: 16 -> 8 -> 4 -> 2 -> 1, lane i with lane i + half."""
    half = LANES // 2
    while half:
        order = [lane + half if lane < half else lane for lane in range(LANES)]
        x = combine(x, shuffled(b, x, x, order))
        half //= 2
    return b.extract_element(x, ir.Constant(I32, 0))


@emitted(types.float32, vector)
def total(b: Any, x: Any) -> Any:
    """The sum of all lanes, by halves."""
    return fold(b, x, lambda p, q: b.fadd(p, q))


@emitted(types.float32, vector)
def peak(b: Any, x: Any) -> Any:
    """The largest lane."""
    return fold(b, x, lambda p, q: b.select(b.fcmp_ordered(">", p, q), p, q))


@emitted(types.int64, vector, types.float32)
def lane_of(b: Any, x: Any, value: Any) -> Any:
    """The first lane that equals `value`; 16 if none does."""
    equal = b.fcmp_ordered("==", x, spread(b, value))
    mask = b.zext(b.bitcast(equal, ir.IntType(LANES)), I64)
    return b.cttz(b.or_(mask, ir.Constant(I64, 1 << LANES)), ir.Constant(ir.IntType(1), 1))


@emitted(vector, vector, types.int64, types.int64, types.float32)
def inside(b: Any, x: Any, low: Any, high: Any, other: Any) -> Any:
    """x in lanes low .. high - 1, `other` elsewhere."""
    above = b.icmp_signed(">=", LANE, spread(b, b.trunc(low, I32)))
    mask = b.and_(above, first_lanes(b, high))
    return b.select(mask, x, spread(b, other))


@emitted(types.float32, vector)
def maximum_lane(b: Any, x: Any) -> Any:
    """The largest lane; NaN if any is NaN."""
    return fold(b, x, lambda p, q: invoke(b, "llvm.maximum.v16f32", F32X, p, q))


@emitted(vector, vector, vector, types.int64)
def join(b: Any, x: Any, y: Any, shift: Any) -> Any:
    """Lanes shift .. shift + 15 of x and y laid end to end, 0 < shift < 16; through memory, for rare use."""
    with b.goto_entry_block():
        place = b.alloca(ir.ArrayType(F32, 2 * LANES))
    b.store(x, b.bitcast(place, F32X.as_pointer()), align=4)
    zero = ir.Constant(I32, 0)
    b.store(y, b.bitcast(b.gep(place, [zero, ir.Constant(I32, LANES)]), F32X.as_pointer()), align=4)
    return b.load(b.bitcast(b.gep(place, [ir.Constant(I64, 0), shift]), F32X.as_pointer()), align=4)


# Memory: addresses are int64; `count` lanes from the first one on.


@emitted(vector, types.int64)
def load_float(b: Any, address: Any) -> Any:
    return b.load(pointer(b, address, F32X), align=4)


@emitted(vector, types.int64)
def load_bfloat(b: Any, address: Any) -> Any:
    return widened(b, b.load(pointer(b, address, I16X), align=2))


@emitted(vector, types.int64, types.int64)
def load_float_part(b: Any, address: Any, count: Any) -> Any:
    return masked_load(b, address, count, F32X)


@emitted(vector, types.int64, types.int64)
def load_bfloat_part(b: Any, address: Any, count: Any) -> Any:
    return widened(b, masked_load(b, address, count, I16X))


@emitted(types.void, types.int64, vector)
def store_float(b: Any, address: Any, x: Any) -> None:
    b.store(x, pointer(b, address, F32X), align=4)


@emitted(types.void, types.int64, vector)
def store_bfloat(b: Any, address: Any, x: Any) -> None:
    b.store(b.trunc(b.lshr(narrowed(b, x), whole(16)), I16X), pointer(b, address, I16X), align=2)


@emitted(types.void, types.int64, types.int64, vector)
def store_float_part(b: Any, address: Any, count: Any, x: Any) -> None:
    _masked_store(b, x, address, count, "v16f32", 4)


@emitted(types.void, types.int64, types.int64, vector)
def store_bfloat_part(b: Any, address: Any, count: Any, x: Any) -> None:
    _masked_store(b, b.trunc(b.lshr(narrowed(b, x), whole(16)), I16X), address, count, "v16i16", 2)


@emitted(vector, vector)
def round_bfloat(b: Any, x: Any) -> Any:
    """Each lane rounded to bf16 and back."""
    return b.bitcast(b.and_(narrowed(b, x), whole(0xFFFF0000)), F32X)


@emitted(types.int64, types.int64)
def load_i64(b: Any, address: Any) -> Any:
    return b.load(pointer(b, address, I64), align=8)


@emitted(types.void, types.int64)
def fetch_once(b: Any, address: Any) -> None:
    """Begin to bring the line at an address, which will be read once."""
    prefetch_once(b, pointer(b, address, I8))


@emitted(types.int64, types.int64, types.int64)
def argument(b: Any, arguments: Any, index: Any) -> Any:
    """A kernel's argument number `index`."""
    return b.load(b.gep(pointer(b, arguments, I64), [index]), align=8)


@emitted(types.int64, types.int64)
def load_i32(b: Any, address: Any) -> Any:
    return b.sext(b.load(pointer(b, address, I32), align=4), I64)


@emitted(types.int64, types.int64)
def load_i16(b: Any, address: Any) -> Any:
    return b.zext(b.load(pointer(b, address, I16), align=2), I64)


@emitted(types.void, types.int64, types.int64)
def store_i16(b: Any, address: Any, value: Any) -> None:
    b.store(b.trunc(value, I16), pointer(b, address, I16), align=2)


@emitted(types.void, types.int64, types.int64)
def store_i32(b: Any, address: Any, value: Any) -> None:
    b.store(b.trunc(value, I32), pointer(b, address, I32), align=4)


@emitted(types.float32, types.int64)
def load_scalar(b: Any, address: Any) -> Any:
    return b.load(pointer(b, address, F32), align=4)


@emitted(types.void, types.int64, types.float32)
def store_scalar(b: Any, address: Any, value: Any) -> None:
    b.store(value, pointer(b, address, F32), align=4)


@emitted(types.float32, types.int64)
def float_of(b: Any, word: Any) -> Any:
    """The fp32 number whose bits are the lower half of `word`."""
    return b.bitcast(b.trunc(word, I32), F32)


@emitted(types.int64, types.float32)
def word_of(b: Any, value: Any) -> Any:
    """The bits of an fp32 number, 0 .. 2^32 - 1."""
    return b.zext(b.bitcast(value, I32), I64)


@emitted(types.void, types.int64, types.int64)
def store_i64(b: Any, address: Any, value: Any) -> None:
    b.store(value, pointer(b, address, I64), align=8)


@emitted(types.void, types.int64, types.int64, types.int64)
def copy(b: Any, target: Any, source: Any, size_bytes: Any) -> None:
    """memcpy."""
    byte = I8.as_pointer()
    false = ir.Constant(ir.IntType(1), 0)
    target, source = b.inttoptr(target, byte), b.inttoptr(source, byte)
    invoke(b, "llvm.memcpy.p0.p0.i64", ir.VoidType(), target, source, size_bytes, false)


# Elementary functions: fixed polynomials, so that a lane's result depends on its argument alone.


def horner(b: Any, x: Any, coefficients: tuple[float, ...]) -> Any:
    """Polynomial with the highest coefficient first."""
    value = same(coefficients[0])
    for coefficient in coefficients[1:]:
        value = fused(b, value, x, same(coefficient))
    return value


EXP2 = (
    1.535336188319500e-4,
    1.339887440266574e-3,
    9.618437357674640e-3,
    5.550332471162809e-2,
    2.402264791363012e-1,
    6.931472028550421e-1,
    1.0,
)
"""2^r on [-1/2, 1/2] (Cephes exp2f)."""


ROUNDER = 12582912.0
"""1.5 * 2^23: adding it rounds to an integer, which then stands in the low bits."""


def power_of_two(b: Any, x: Any) -> Any:
    """2^x; 0 below -126.5, infinite from 128 on, NaN stays NaN."""
    x = b.select(b.fcmp_ordered(">", x, same(128.0)), same(128.0), x)
    x = b.select(b.fcmp_ordered("<", x, same(-127.0)), same(-127.0), x)
    shifted = b.fadd(x, same(ROUNDER))
    value = horner(b, b.fsub(x, b.fsub(shifted, same(ROUNDER))), EXP2)
    exponent = b.shl(b.add(b.bitcast(shifted, I32X), whole(127)), whole(23))
    return b.fmul(value, b.bitcast(exponent, F32X))


LOG2E = 1.4426950408889634
LN2_HIGH = 0.693145751953125
LN2_LOW = 1.42860682030941723212e-6

EXP = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1, 1.0, 1.0)
"""e^r on [-ln 2 / 2, ln 2 / 2] (Cephes expf)."""


def exponential(b: Any, x: Any) -> Any:
    """e^x; 0 below about -87.7, infinite above 88.7."""
    x = b.select(b.fcmp_ordered(">", x, same(88.75)), same(88.75), x)
    x = b.select(b.fcmp_ordered("<", x, same(-88.0)), same(-88.0), x)
    shifted = fused(b, x, same(LOG2E), same(ROUNDER))
    n = b.fsub(shifted, same(ROUNDER))
    r = fused(b, n, same(-LN2_LOW), fused(b, n, same(-LN2_HIGH), x))
    exponent = b.shl(b.add(b.bitcast(shifted, I32X), whole(127)), whole(23))
    return b.fmul(horner(b, r, EXP), b.bitcast(exponent, F32X))


def logistic(b: Any, x: Any) -> Any:
    """1 / (1 + e^-x)."""
    return b.fdiv(same(1.0), b.fadd(same(1.0), exponential(b, b.fneg(x))))


ERF_NEAR = (-5.96761703e-4, 4.99119423e-3, -2.67681349e-2, 1.12819925e-1, -3.76125336e-1, 1.28379166e-1)
ERF_FAR = (-1.72853470e-5, 3.83197126e-4, -3.88396438e-3, 2.42546219e-2, -1.06777877e-1, -6.34846687e-1, -1.28717512e-1)


def error_function(b: Any, x: Any) -> Any:
    """erf: a polynomial near 0, 1 - exp of one further out (N. Juffa's erff)."""
    size = invoke(b, "llvm.fabs.v16f32", F32X, x)
    near = fused(b, horner(b, b.fmul(x, x), ERF_NEAR), x, x)
    capped = b.select(b.fcmp_ordered(">", size, same(4.0)), same(4.0), size)
    power = fused(b, horner(b, capped, ERF_FAR), capped, b.fneg(capped))
    far = invoke(b, "llvm.copysign.v16f32", F32X, b.fsub(same(1.0), exponential(b, power)), x)
    return b.select(b.fcmp_ordered(">", size, same(0.927734375)), far, near)


LOG = (7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1,
       -1.6668057665e-1, 2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1)  # fmt: skip
"""(log(1 + f) - f + f^2 / 2) / f^3 on [sqrt(1/2) - 1, sqrt(2) - 1] (Cephes logf)."""


def logarithm(b: Any, x: Any) -> Any:
    """log of positive normal numbers."""
    raw = b.bitcast(x, I32X)
    # The exponent such that the mantissa falls between sqrt(1/2) and sqrt(2).
    n = b.ashr(b.sub(raw, whole(bits(0.70710678))), whole(23))
    f = b.fsub(b.bitcast(b.sub(raw, b.shl(n, whole(23))), F32X), same(1.0))
    wide = b.sitofp(n, F32X)
    square = b.fmul(f, f)
    y = b.fmul(b.fmul(horner(b, f, LOG), f), square)
    y = fused(b, wide, same(LN2_LOW), y)
    y = fused(b, square, same(-0.5), y)
    return fused(b, wide, same(LN2_HIGH), b.fadd(f, y))


@emitted(vector, vector)
def exp2(b: Any, x: Any) -> Any:
    return power_of_two(b, x)


@emitted(vector, vector)
def exp(b: Any, x: Any) -> Any:
    return exponential(b, x)


@emitted(vector, vector)
def log(b: Any, x: Any) -> Any:
    return logarithm(b, x)


@emitted(vector, vector)
def silu(b: Any, x: Any) -> Any:
    return b.fmul(x, logistic(b, x))


@emitted(vector, vector)
def relu(b: Any, x: Any) -> Any:
    return b.select(b.fcmp_ordered("<", x, same(0.0)), same(0.0), x)


@emitted(vector, vector)
def gelu(b: Any, x: Any) -> Any:
    """x / 2 (1 + erf(x / sqrt(2)))."""
    half = b.fmul(x, same(0.5))
    return fused(b, half, error_function(b, b.fmul(x, same(0.7071067811865476))), half)


@emitted(vector, vector)
def gelu_tanh(b: Any, x: Any) -> Any:
    """x / 2 (1 + tanh(u)) = x / (1 + e^-2u) with u = sqrt(2 / pi) (x + 0.044715 x^3)."""
    cube = b.fmul(b.fmul(x, x), x)
    u = b.fmul(same(2 * 0.7978845608028654), fused(b, cube, same(0.044715), x))
    return b.fmul(x, logistic(b, u))
