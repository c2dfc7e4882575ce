"""`norm` and `layer_norm` on the CPU: one row at a time, in two passes over a row that stays in cache.

Knows rows. Sums run over 16 lanes in order of the columns, then over the lanes by halves. A residual is
overwritten with the sum, as the op allows.
"""

from __future__ import annotations

import torch

from ridgeline.kernels.cpu.blocks import NORM_ROWS
from ridgeline.kernels.cpu.dtypes import HALF, other_dtype
from ridgeline.kernels.cpu.native import Kernel
from ridgeline.kernels.cpu.pool import POOL, float_bits
from ridgeline.ops.norm import layer_norm, norm
from ridgeline.ops.op import cpu

ALONE_ELEMENTS = 1 << 15
"""Elements below which calling a helper takes longer than doing it all."""

norm_rows = Kernel("norm", "norm_rows")
layer_norm_rows = Kernel("norm", "layer_norm_rows")


def norm_accepts(x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float) -> str | None:
    return other_dtype(x, residual, weight)


def layer_norm_accepts(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> str | None:
    return other_dtype(x, residual, weight, bias)


def _normalized(
    kernel: Kernel,
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    bias: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    if not x.is_contiguous():
        x = x.contiguous()
    if residual is not None and not residual.is_contiguous():
        residual = residual.contiguous()
    rows, width = x.shape
    out = torch.empty_like(x)
    run = POOL.small if rows * width <= ALONE_ELEMENTS else POOL.share
    run(
        kernel, -(-rows // NORM_ROWS), x.data_ptr(), 0 if residual is None else residual.data_ptr(), weight.data_ptr(),
        out.data_ptr(), rows, width, HALF[x.dtype], float_bits(eps), 0 if bias is None else bias.data_ptr(),
    )  # fmt: skip
    return out, x if residual is None else residual


@norm.kernel("cpu", needs=cpu(), accepts=norm_accepts, invariant=True)
def norm_cpu(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    return _normalized(norm_rows, x, residual, weight, eps, None)


@layer_norm.kernel("cpu", needs=cpu(), accepts=layer_norm_accepts, invariant=True)
def layer_norm_cpu(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    return _normalized(layer_norm_rows, x, residual, weight, eps, bias)
