"""x @ W.T + b, with an optional activation behind it.

Knows matrix products. It must not know which layer of a model it serves.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F

from ridgeline.core.cost import Cost
from ridgeline.ops.op import Tolerance, op
from ridgeline.ops.weight import Weight, nbytes

ACTIVATIONS = ("silu", "swish", "relu", "gelu", "gelu_new", "gelu_pytorch_tanh")
"""By their Hugging Face names."""


def activate(x: torch.Tensor, activation: str | None) -> torch.Tensor:
    """Apply one of ACTIVATIONS; None is the identity."""
    match activation:
        case None:
            return x
        case "silu" | "swish":
            return F.silu(x)
        case "relu":
            return F.relu(x)
        case "gelu":
            return F.gelu(x)
        case "gelu_new" | "gelu_pytorch_tanh":
            return F.gelu(x, approximate="tanh")
    raise ValueError(f"unknown activation {activation!r}")


@op("contraction", float32=Tolerance(1e-4, 1e-5), bfloat16=Tolerance(2e-2, 2e-2), float16=Tolerance(4e-3, 4e-3))
def linear(
    x: torch.Tensor, weight: Weight, bias: torch.Tensor | None = None, activation: str | None = None
) -> torch.Tensor:
    """activation(x @ W.T + bias).

    x: [T, in_features]; weight: [out_features, in_features]; bias: [out_features]. Returns
    [T, out_features] in x's dtype.
    """
    if x.device.type == "meta":
        return torch.empty(x.shape[0], weight.out_features, dtype=x.dtype, device=x.device)
    return activate(F.linear(x, weight.dense(), bias), activation)


@linear.cost
def _(x: torch.Tensor, weight: Weight, bias: torch.Tensor | None = None, activation: str | None = None) -> Cost:
    tokens = x.shape[0]
    return Cost(
        flops=2 * tokens * weight.in_features * weight.out_features,
        read_bytes=nbytes(x, weight, bias),
        write_bytes=tokens * weight.out_features * x.element_size(),
    )


@linear.examples
def _(device: Any, dtype: torch.dtype) -> Iterator[Mapping[str, Any]]:
    for tokens, inputs, outputs, bias in ((1, 64, 64, False), (3, 96, 200, True), (33, 256, 129, True)):
        yield {
            "x": torch.randn(tokens, inputs, device=device, dtype=dtype),
            "weight": Weight.dense_from(torch.randn(outputs, inputs, device=device, dtype=dtype) / inputs**0.5),
            "bias": torch.randn(outputs, device=device, dtype=dtype) if bias else None,
            "activation": "relu" if tokens == 3 else None,
        }
