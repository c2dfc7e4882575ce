"""`linear` on a GPU through torch's matrix product (cuBLAS).

Knows dense weights. It must not know other formats: those are refused with a reason.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ridgeline.ops.linear import activate, linear
from ridgeline.ops.op import cuda
from ridgeline.ops.weight import Weight


def dense_only(
    x: torch.Tensor, weight: Weight, bias: torch.Tensor | None = None, activation: str | None = None
) -> str | None:
    if weight.format != "dense":
        return f"takes dense weights, not {weight.format!r}"
    if weight.data.dtype != x.dtype:
        return f"takes a weight of x's dtype {x.dtype}, not {weight.data.dtype}"
    return None


@linear.kernel("torch", needs=cuda(0), accepts=dense_only)
def linear_torch(
    x: torch.Tensor, weight: Weight, bias: torch.Tensor | None = None, activation: str | None = None
) -> torch.Tensor:
    """F.linear, which adds the bias in the product's epilogue; an activation is a launch of its own."""
    return activate(F.linear(x, weight.data, bias), activation)
