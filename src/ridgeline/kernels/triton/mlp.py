"""The gated half of a feed-forward network: one product for few tokens, cuBLAS and a fused gate for many.

Knows dense weights. It must not know the projection that follows. For few tokens the weight's bytes are
all that matters: one launch streams both halves of the weight, and [T, 2 I] never exists. For many the
product is left to cuBLAS, the best there is, and activation and multiplication are fused behind it. One token
needs no tensor cores: each program takes a row of either half, all of its bytes asked for at once.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from ridgeline.kernels.triton.activation import ACTIVATIONS, gated
from ridgeline.kernels.triton.dependent import dependent, ready, starting
from ridgeline.kernels.triton.machine import machine_of
from ridgeline.kernels.triton.product import product as product_in_tiles
from ridgeline.ops.mlp import gated_linear
from ridgeline.ops.op import cuda
from ridgeline.ops.weight import Weight

GATE_BLOCK = 1024  # elements of the output a program of the gate takes
GATE_WARPS = 4


class Rows(NamedTuple):
    """The product of one token: rows of either half and inputs a step that a program takes, warps."""

    rows: int
    step: int
    warps: int


class Product(NamedTuple):
    """The fused product for up to `rows` tokens: columns of the output and inputs a step, and how it is compiled."""

    rows: int
    columns: int
    step: int
    warps: int
    stages: int


ONE = Rows(2, 2048, 8)
WIDE, NARROW = Product(16, 64, 128, 4, 3), Product(16, 32, 256, 4, 3)
MIDDLE, TALL = Product(32, 64, 128, 4, 3), Product(64, 64, 64, 4, 4)


def product_for(tokens: int, inner: int, multiprocessors: int) -> Product | None:
    """The fused product for so many tokens of 16 bits, None where cuBLAS is as fast or faster (docs/log.md).

    Three programs of WIDE share a multiprocessor, so it is the best where one wave of them fills the machine;
    twice as many half as wide leave less to wait for at the end of several waves, or use more of the machine.
    """
    programs = triton.cdiv(inner, WIDE.columns)
    if tokens <= NARROW.rows:
        return WIDE if multiprocessors <= programs <= 3 * multiprocessors else NARROW
    if tokens <= TALL.rows and 2 * programs >= multiprocessors:
        return MIDDLE if tokens <= MIDDLE.rows else TALL
    return None


@triton.jit
def _gate_kernel(
    gate_up: tl.tensor,
    out: tl.tensor,
    INNER: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    starting(EARLY)
    ready(EARLY)
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < INNER
    source = gate_up + row * (2 * INNER) + column
    gates = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    ups = tl.load(source + INNER, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row * INNER + column, gated(gates, ups, ACTIVATION, out), mask=mask)


@triton.jit
def _gated_row_kernel(
    x: tl.tensor,
    weight: tl.tensor,
    out: tl.tensor,
    WIDTH: tl.constexpr,
    INNER: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    starting(EARLY)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    depth = tl.arange(0, STEP)
    gate_at = weight + tl.minimum(row, INNER - 1).to(tl.int64)[:, None] * WIDTH + depth[None, :]
    up_at = gate_at + INNER * WIDTH
    inside = (depth < WIDTH)[None, :]
    gate_part = tl.load(gate_at, mask=inside, other=0.0, eviction_policy="evict_first")
    up_part = tl.load(up_at, mask=inside, other=0.0, eviction_policy="evict_first")
    ready(EARLY)
    part = tl.load(x + depth, mask=depth < WIDTH, other=0.0).to(tl.float32)[None, :]
    gates = gate_part.to(tl.float32) * part
    ups = up_part.to(tl.float32) * part
    for start in tl.static_range(STEP, WIDTH, STEP):
        inside = (depth < WIDTH - start)[None, :]
        gate_part = tl.load(gate_at + start, mask=inside, other=0.0, eviction_policy="evict_first")
        up_part = tl.load(up_at + start, mask=inside, other=0.0, eviction_policy="evict_first")
        part = tl.load(x + start + depth, mask=depth < WIDTH - start, other=0.0).to(tl.float32)[None, :]
        gates += gate_part.to(tl.float32) * part
        ups += up_part.to(tl.float32) * part
    result = gated(tl.sum(gates, axis=1), tl.sum(ups, axis=1), ACTIVATION, out)
    tl.store(out + row, result, mask=row < INNER)


@triton.jit(do_not_specialize=["tokens"])
def _fused_kernel(
    x: tl.tensor,
    weight: tl.tensor,
    out: tl.tensor,
    tokens: tl.tensor,
    x_stride: tl.tensor,
    WIDTH: tl.constexpr,
    INNER: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    row = tl.arange(0, ROWS)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    depth = tl.arange(0, STEP)
    # Columns past the end read the last one instead: cheaper than a mask on the stream of weights.
    read = tl.minimum(column, INNER - 1).to(tl.int64)
    x_at = x + row[:, None] * x_stride + depth[None, :]
    gate_at = weight + read[:, None] * WIDTH + depth[None, :]
    up_at = gate_at + INNER * WIDTH
    gates = tl.zeros((ROWS, COLUMNS), tl.float32)
    ups = tl.zeros((ROWS, COLUMNS), tl.float32)
    ready(EARLY)
    for start in range(0, WIDTH, STEP):
        inside = depth[None, :] < WIDTH - start
        part = tl.load(x_at + start, mask=(row[:, None] < tokens) & inside, other=0.0)
        gate_part = tl.load(gate_at + start, mask=inside, other=0.0)
        up_part = tl.load(up_at + start, mask=inside, other=0.0)
        gates = tl.dot(part, gate_part.T, gates)
        ups = tl.dot(part, up_part.T, ups)
    starting(EARLY)
    target = out + row[:, None] * INNER + column[None, :]
    mask = (row[:, None] < tokens) & (column[None, :] < INNER)
    tl.store(target, gated(gates, ups, ACTIVATION, out), mask=mask)


def _accepts(x: torch.Tensor, weight: Weight, activation: str = "silu") -> str | None:
    if weight.format != "dense":
        return f"takes dense weights, not {weight.format!r}"
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"takes fp32, bf16 and fp16, not {x.dtype}"
    if weight.data.dtype != x.dtype:
        return f"takes a weight of x's dtype {x.dtype}, not {weight.data.dtype}"
    if activation not in ACTIVATIONS:
        return f"knows no activation {activation!r}"
    return None


def gated_linear_steady(x: torch.Tensor, weight: Weight, activation: str = "silu") -> torch.Tensor:
    """Two launches, batch-invariant: the product in tiles that no number of tokens changes, then the gate."""
    return _gated(product_in_tiles(x, weight), activation)


@gated_linear.kernel("triton", needs=cuda(80), accepts=_accepts, invariant=gated_linear_steady)
def gated_linear_triton(x: torch.Tensor, weight: Weight, activation: str = "silu") -> torch.Tensor:
    """One launch for few tokens in bf16 or fp16, two for more and in fp32.

    Tokens of one launch do not see each other: while `product_for` gives the same product, a token's result
    does not depend on how many came with it. One alone takes another way.
    """
    tokens, inner = x.shape[0], weight.out_features // 2
    if tokens == 1 and x.element_size() == 2:
        return _alone(x, weight, activation)
    if tokens and x.element_size() == 2:
        product = product_for(tokens, inner, machine_of(x.device).multiprocessors)
        if product is not None:
            return _fused(x, weight, activation, product)
    return _gated(F.linear(x, weight.data), activation)


def _gated(gate_up: torch.Tensor, activation: str) -> torch.Tensor:
    """[T, 2 I] -> [T, I]."""
    tokens, inner = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(tokens, inner, device=gate_up.device, dtype=gate_up.dtype)
    if tokens:
        _gate_kernel[(tokens, triton.cdiv(inner, GATE_BLOCK))](
            gate_up,
            out,
            INNER=inner,
            ACTIVATION=activation,
            BLOCK=GATE_BLOCK,
            num_warps=GATE_WARPS,
            **dependent(gate_up.device),
        )
    return out


def _alone(x: torch.Tensor, weight: Weight, activation: str) -> torch.Tensor:
    inner, width = weight.out_features // 2, weight.in_features
    x = x if x.stride(-1) == 1 else x.contiguous()
    out = torch.empty(1, inner, device=x.device, dtype=x.dtype)
    _gated_row_kernel[(triton.cdiv(inner, ONE.rows),)](
        x,
        weight.data,
        out,
        WIDTH=width,
        INNER=inner,
        ACTIVATION=activation,
        ROWS=ONE.rows,
        STEP=min(ONE.step, triton.next_power_of_2(width)),
        num_warps=ONE.warps,
        **dependent(x.device),
    )
    return out


def _fused(x: torch.Tensor, weight: Weight, activation: str, product: Product) -> torch.Tensor:
    tokens, inner, width = x.shape[0], weight.out_features // 2, weight.in_features
    x = x if x.stride(-1) == 1 else x.contiguous()
    out = torch.empty(tokens, inner, device=x.device, dtype=x.dtype)
    _fused_kernel[(triton.cdiv(inner, product.columns),)](
        x,
        weight.data,
        out,
        tokens,
        x.stride(0),
        WIDTH=width,
        INNER=inner,
        ACTIVATION=activation,
        ROWS=product.rows,
        COLUMNS=product.columns,
        STEP=product.step,
        num_warps=product.warps,
        num_stages=product.stages,
        **dependent(x.device),
    )
    return out
