"""Normalization over the hidden dimension, with the residual addition that stands before it.

Knows RMSNorm and LayerNorm. It must not know where in a layer it stands.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F

from ridgeline.core.cost import Cost
from ridgeline.ops.op import Tolerance, op
from ridgeline.ops.weight import nbytes


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / rms(x) * weight over the last dimension, computed in fp32 (Zhang and Sennrich, 1910.07467)."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


@op("normalization", float32=Tolerance(1e-5, 1e-5), bfloat16=Tolerance(2e-2, 2e-2), float16=Tolerance(4e-3, 4e-3))
def norm(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """RMSNorm of x + residual.

    x, residual: [T, D]; weight: [D]. Returns (normalized, x + residual), both [T, D] in x's dtype. A
    kernel may overwrite `residual` with the sum; x is left as it is.
    """
    if x.device.type == "meta":
        return x.new_empty(x.shape), x if residual is None else x.new_empty(x.shape)
    total = x if residual is None else x + residual
    return rms_norm(total, weight, eps), total


@norm.cost
def _(x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float) -> Cost:
    writes = nbytes(x) if residual is None else 2 * nbytes(x)
    return Cost(
        flops=(4 if residual is None else 5) * x.numel(),
        read_bytes=nbytes(x, residual, weight),
        write_bytes=writes,
    )


@norm.examples
def _(device: Any, dtype: torch.dtype) -> Iterator[Mapping[str, Any]]:
    for tokens, width, add in ((1, 64, True), (3, 256, False), (17, 1000, True)):
        yield {
            "x": torch.randn(tokens, width, device=device, dtype=dtype),
            "residual": torch.randn(tokens, width, device=device, dtype=dtype) if add else None,
            "weight": torch.randn(width, device=device, dtype=dtype),
            "eps": 1e-5,
        }


@op("normalization", float32=Tolerance(1e-5, 1e-5), bfloat16=Tolerance(2e-2, 2e-2), float16=Tolerance(4e-3, 4e-3))
def layer_norm(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """LayerNorm of x + residual (Ba et al., 1607.06450); shapes as in `norm`, bias: [D]."""
    if x.device.type == "meta":
        return x.new_empty(x.shape), x if residual is None else x.new_empty(x.shape)
    total = x if residual is None else x + residual
    return F.layer_norm(total, (total.shape[-1],), weight, bias, eps), total


@layer_norm.cost
def _(x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> Cost:
    writes = nbytes(x) if residual is None else 2 * nbytes(x)
    return Cost(
        flops=(7 if residual is None else 8) * x.numel(),
        read_bytes=nbytes(x, residual, weight, bias),
        write_bytes=writes,
    )


@layer_norm.examples
def _(device: Any, dtype: torch.dtype) -> Iterator[Mapping[str, Any]]:
    for tokens, width, add in ((1, 64, True), (3, 256, False), (17, 1000, True)):
        yield {
            "x": torch.randn(tokens, width, device=device, dtype=dtype),
            "residual": torch.randn(tokens, width, device=device, dtype=dtype) if add else None,
            "weight": torch.randn(width, device=device, dtype=dtype),
            "bias": torch.randn(width, device=device, dtype=dtype),
            "eps": 1e-5,
        }
