"""`linear` for one token, where the weight's bytes are all that matters; cuBLAS for more.

Knows dense weights. It must not know which layer of a model it serves. Each program takes whole rows of the weight
and sums them in fp32, all of their bytes asked for at once, the first before the kernel ahead has ended. Tiles of
tensor cores for 2 to 16 tokens were tried and are no faster than cuBLAS (docs/log.md); kernels/cuda/linear.py takes
2 to 8 tokens another way.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from ridgeline.kernels.triton.activation import ACTIVATIONS, activated
from ridgeline.kernels.triton.dependent import dependent, ready, starting
from ridgeline.kernels.triton.product import product
from ridgeline.ops.linear import activate, linear
from ridgeline.ops.op import cuda
from ridgeline.ops.weight import Weight


class Rows(NamedTuple):
    """Rows of the weight and inputs a step that a program takes, warps."""

    rows: int
    step: int
    warps: int


ONE, ONE_WIDE = Rows(2, 2048, 8), Rows(2, 2048, 4)
"""For rows of up to WIDE inputs, and for longer ones; chosen on an H200 (benchmarks/gpu_linear.py)."""
WIDE = 8192


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


@linear.kernel("triton", needs=cuda(80), accepts=_accepts, invariant=product)
def linear_triton(
    x: torch.Tensor, weight: Weight, bias: torch.Tensor | None = None, activation: str | None = None
) -> torch.Tensor:
    """One launch for one token in bf16 or fp16. More, and fp32, are cuBLAS's, with an activation behind it."""
    if x.shape[0] != 1 or x.element_size() != 2:
        return activate(F.linear(x, weight.data, bias), activation)
    x = x if x.stride(-1) == 1 else x.contiguous()
    outputs, width = weight.out_features, weight.in_features
    out = torch.empty(1, outputs, device=x.device, dtype=x.dtype)
    one = ONE if width <= WIDE else ONE_WIDE
    _row_kernel[(triton.cdiv(outputs, one.rows),)](
        x,
        weight.data,
        bias,
        out,
        WIDTH=width,
        OUTPUTS=outputs,
        ACTIVATION=activation,
        ROWS=one.rows,
        STEP=min(one.step, triton.next_power_of_2(width)),
        num_warps=one.warps,
        **dependent(x.device),
    )
    return out
