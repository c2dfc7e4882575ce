"""`take` in one launch.

Knows rows. It must not know why they are wanted.
"""

import torch
import triton
import triton.language as tl

from ridgeline.kernels.triton.dependent import dependent, ready, starting
from ridgeline.ops.op import cuda
from ridgeline.ops.take import take

BLOCK = 1024


@triton.jit
def _take_kernel(
    x: tl.tensor,
    residual: tl.tensor,
    rows: tl.tensor,
    x_out: tl.tensor,
    residual_out: tl.tensor,
    x_stride: tl.tensor,
    residual_stride: tl.tensor,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    starting(EARLY)
    ready(EARLY)
    row = tl.load(rows + tl.program_id(0)).to(tl.int64)
    target = tl.program_id(0).to(tl.int64) * WIDTH
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    tl.store(x_out + target + column, tl.load(x + row * x_stride + column, mask=inside), mask=inside)
    kept = tl.load(residual + row * residual_stride + column, mask=inside)
    tl.store(residual_out + target + column, kept, mask=inside)


def _by_rows(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


@take.kernel("triton", needs=cuda(80), invariant=True)
def take_triton(x: torch.Tensor, residual: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x, residual = _by_rows(x), _by_rows(residual)
    count, width = rows.shape[0], x.shape[1]
    taken, behind = x.new_empty((count, width)), residual.new_empty((count, width))
    if count:
        _take_kernel[(count, triton.cdiv(width, BLOCK))](
            x, residual, rows, taken, behind, x.stride(0), residual.stride(0), WIDTH=width, BLOCK=BLOCK,
            **dependent(x.device),
        )  # fmt: skip
    return taken, behind
