"""`linear` for few tokens, where the weight's bytes are all that matters; cuBLAS for more.

Knows dense weights. It must not know which layer of a model it serves. One token: each program takes whole
rows of the weight and sums them in fp32, all of a row's bytes asked for at once. A few tokens: a tile of tensor
cores' least height. Both ask for their first weights before the kernel ahead has ended.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from ridgeline.kernels.triton.dependent import dependent, fetch, fetched, ready, starting
from ridgeline.kernels.triton.mlp import ACTIVATIONS, activated
from ridgeline.ops.linear import activate, linear
from ridgeline.ops.op import cuda
from ridgeline.ops.weight import Weight


class Rows(NamedTuple):
    """The kernel of one token: rows of the weight and inputs a step, warps."""

    rows: int
    step: int
    warps: int


class Product(NamedTuple):
    """A tile for up to `tokens` tokens: columns of the output and inputs a step, warps, stages."""

    tokens: int
    columns: int
    step: int
    warps: int
    stages: int


ONE, ONE_WIDE = Rows(2, 2048, 8), Rows(2, 2048, 4)
"""Rows of up to WIDE inputs, and longer ones."""
WIDE = 8192
FEW = Product(16, 32, 256, 4, 4)
LEAST_OUTPUTS = 1 << 30
"""For more tokens than FEW's, fewer outputs than this, and in fp32, cuBLAS is as fast or faster."""
FETCHED_BYTES = 64 << 10
"""What a program of the few asks for before the kernel ahead has ended."""


@triton.jit
def _row_kernel(
    x: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    WIDTH: tl.constexpr,
    OUTPUTS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    starting(EARLY)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    depth = tl.arange(0, STEP)
    # Rows past the end read the last one instead: cheaper than a mask on the stream of weights.
    at = weight + tl.minimum(row, OUTPUTS - 1).to(tl.int64)[:, None] * WIDTH + depth[None, :]
    part = tl.load(at, mask=(depth < WIDTH)[None, :], other=0.0, eviction_policy="evict_first")
    ready(EARLY)
    sums = part.to(tl.float32) * tl.load(x + depth, mask=depth < WIDTH, other=0.0).to(tl.float32)[None, :]
    for start in tl.static_range(STEP, WIDTH, STEP):
        inside = depth < WIDTH - start
        part = tl.load(at + start, mask=inside[None, :], other=0.0, eviction_policy="evict_first")
        sums += part.to(tl.float32) * tl.load(x + start + depth, mask=inside, other=0.0).to(tl.float32)[None, :]
    total = tl.sum(sums, axis=1)
    if bias is not None:
        total += tl.load(bias + row, mask=row < OUTPUTS, other=0.0).to(tl.float32)
    result = total.to(out.dtype.element_ty)
    if ACTIVATION is not None:
        result = activated(result.to(tl.float32), ACTIVATION).to(out.dtype.element_ty)
    tl.store(out + row, result, mask=row < OUTPUTS)


@triton.jit(do_not_specialize=["tokens"])
def _few_kernel(
    x: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    tokens: tl.tensor,
    x_stride: tl.tensor,
    WIDTH: tl.constexpr,
    OUTPUTS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    FETCHED: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    if EARLY:
        fetch(weight, tl.program_id(0) * COLUMNS, OUTPUTS, WIDTH, COLUMNS, FETCHED)
    row = tl.arange(0, TOKENS)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    depth = tl.arange(0, STEP)
    x_at = x + row[:, None] * x_stride + depth[None, :]
    weight_at = weight + tl.minimum(column, OUTPUTS - 1).to(tl.int64)[:, None] * WIDTH + depth[None, :]
    sums = tl.zeros((TOKENS, COLUMNS), tl.float32)
    ready(EARLY)
    for start in range(0, WIDTH, STEP):
        inside = depth[None, :] < WIDTH - start
        part = tl.load(x_at + start, mask=(row[:, None] < tokens) & inside, other=0.0)
        weights = tl.load(weight_at + start, mask=inside, other=0.0, eviction_policy="evict_first")
        sums = tl.dot(part, weights.T, sums)
    starting(EARLY)
    if bias is not None:
        sums += tl.load(bias + column, mask=column < OUTPUTS, other=0.0).to(tl.float32)[None, :]
    result = sums.to(out.dtype.element_ty)
    if ACTIVATION is not None:
        result = activated(result.to(tl.float32), ACTIVATION).to(out.dtype.element_ty)
    mask = (row[:, None] < tokens) & (column[None, :] < OUTPUTS)
    tl.store(out + row[:, None].to(tl.int64) * OUTPUTS + column[None, :], result, mask=mask)


def _accepts(
    x: torch.Tensor, weight: Weight, bias: torch.Tensor | None = None, activation: str | None = None
) -> str | None:
    if weight.format != "dense":
        return f"takes dense weights, not {weight.format!r}"
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"takes fp32, bf16 and fp16, not {x.dtype}"
    if weight.data.dtype != x.dtype or (bias is not None and bias.dtype != x.dtype):
        return f"takes a weight and bias of x's dtype {x.dtype}, not {weight.data.dtype}"
    if activation is not None and activation not in ACTIVATIONS:
        return f"knows no activation {activation!r}"
    return None


@linear.kernel("triton", needs=cuda(80), accepts=_accepts)
def linear_triton(
    x: torch.Tensor, weight: Weight, bias: torch.Tensor | None = None, activation: str | None = None
) -> torch.Tensor:
    """One launch for few tokens in bf16 or fp16. More, and fp32, are cuBLAS's, with an activation behind it.

    A few tokens of one launch do not see each other: a token's result does not depend on how many came with it.
    One alone takes another way.
    """
    tokens, outputs, width = x.shape[0], weight.out_features, weight.in_features
    few = tokens == 1 or (tokens <= FEW.tokens and outputs >= LEAST_OUTPUTS)
    if not tokens or x.element_size() != 2 or not few:
        return activate(F.linear(x, weight.data, bias), activation)
    x = x if x.stride(-1) == 1 else x.contiguous()
    out = torch.empty(tokens, outputs, device=x.device, dtype=x.dtype)
    shape = {"WIDTH": width, "OUTPUTS": outputs, "ACTIVATION": activation}
    if tokens == 1:
        one = ONE if width <= WIDE else ONE_WIDE
        step = min(one.step, triton.next_power_of_2(width))
        _row_kernel[(triton.cdiv(outputs, one.rows),)](
            x, weight.data, bias, out, **shape,
            ROWS=one.rows, STEP=step, num_warps=one.warps, **dependent(x.device),
        )  # fmt: skip
        return out
    _few_kernel[(triton.cdiv(outputs, FEW.columns),)](
        x, weight.data, bias, out, tokens, x.stride(0), **shape,
        TOKENS=FEW.tokens, COLUMNS=FEW.columns, STEP=FEW.step,
        FETCHED=fetched(FEW.columns, 2 * width, FETCHED_BYTES),
        num_warps=FEW.warps, num_stages=FEW.stages, **dependent(x.device),
    )  # fmt: skip
    return out
