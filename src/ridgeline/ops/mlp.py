"""The gated first half of a feed-forward network: act(x Wg.T) * (x Wu.T) in one op.

Knows the gate. It must not know the projection that follows (that is `linear`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F

from ridgeline.core.cost import Cost
from ridgeline.ops.linear import activate
from ridgeline.ops.op import Tolerance, op
from ridgeline.ops.weight import Weight, nbytes


def gate(gate_up: torch.Tensor, activation: str) -> torch.Tensor:
    """[T, 2 I] -> [T, I]: activation of the first half times the second half."""
    gates, ups = gate_up.chunk(2, dim=-1)
    return activate(gates, activation) * ups


@op("contraction", float32=Tolerance(1e-4, 1e-5), bfloat16=Tolerance(2e-2, 2e-2), float16=Tolerance(4e-3, 4e-3))
def gated_linear(x: torch.Tensor, weight: Weight, activation: str = "silu") -> torch.Tensor:
    """activation(x @ Wg.T) * (x @ Wu.T) (Shazeer, "GLU Variants Improve Transformer", 2002.05202).

    x: [T, D]; weight: [2 I, D], the gate's rows first. Returns [T, I] in x's dtype.
    """
    return gate(F.linear(x, weight.dense()), activation)


@gated_linear.cost
def _(x: torch.Tensor, weight: Weight, activation: str = "silu") -> Cost:
    tokens, inner = x.shape[0], weight.out_features // 2
    return Cost(
        flops=2 * tokens * weight.in_features * weight.out_features + 5 * tokens * inner,
        read_bytes=nbytes(x, weight),
        write_bytes=tokens * inner * x.element_size(),
    )


@gated_linear.examples
def _(device: Any, dtype: torch.dtype) -> Iterator[Mapping[str, Any]]:
    for tokens, inputs, inner in ((1, 64, 128), (5, 96, 80), (40, 256, 200)):
        yield {
            "x": torch.randn(tokens, inputs, device=device, dtype=dtype),
            "weight": Weight.dense_from(torch.randn(2 * inner, inputs, device=device, dtype=dtype) / inputs**0.5),
            "activation": "silu",
        }
