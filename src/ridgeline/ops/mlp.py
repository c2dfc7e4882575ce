"""The gated first half of a feed-forward network: act(x Wg.T) * (x Wu.T) in one op, or its gate alone.

Knows the gate. It must not know the projection that follows (that is `linear`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F

from ridgeline.core.cost import Cost
from ridgeline.ops.linear import activate
from ridgeline.ops.op import Tolerance, cuda, op
from ridgeline.ops.weight import Weight, nbytes


@op("elementwise", float32=Tolerance(1e-5, 1e-5), bfloat16=Tolerance(2e-2, 2e-2), float16=Tolerance(4e-3, 4e-3))
def gate(gate_up: torch.Tensor, activation: str) -> torch.Tensor:
    """[T, 2 I] -> [T, I]: activation of the first half times the second half.

    An op of its own only behind a projection with biases; without them `gated_linear` holds it.
    """
    gates, ups = gate_up.chunk(2, dim=-1)
    return activate(gates, activation) * ups


@gate.cost
def _(gate_up: torch.Tensor, activation: str) -> Cost:
    return Cost(flops=2.5 * gate_up.numel(), read_bytes=nbytes(gate_up), write_bytes=nbytes(gate_up) // 2)


@gate.examples
def _(device: Any, dtype: torch.dtype) -> Iterator[Mapping[str, Any]]:
    for tokens, inner, activation in ((1, 64, "silu"), (7, 200, "gelu")):
        yield {"gate_up": torch.randn(tokens, 2 * inner, device=device, dtype=dtype), "activation": activation}


gate.kernel("torch", needs=cuda(0), invariant=True)(gate.reference)


@op("contraction", float32=Tolerance(1e-4, 1e-5), bfloat16=Tolerance(2e-2, 2e-2), float16=Tolerance(4e-3, 4e-3))
def gated_linear(x: torch.Tensor, weight: Weight, activation: str = "silu") -> torch.Tensor:
    """activation(x @ Wg.T) * (x @ Wu.T) (Shazeer, "GLU Variants Improve Transformer", 2002.05202).

    x: [T, D]; weight: [2 I, D], the gate's rows first. Returns [T, I] in x's dtype.
    """
    if x.device.type == "meta":
        return torch.empty(x.shape[0], weight.out_features // 2, dtype=x.dtype, device=x.device)
    return gate(F.linear(x, weight.dense()), activation)


@gated_linear.cost
def _(x: torch.Tensor, weight: Weight, activation: str = "silu") -> Cost:
    """FLOPs of the product alone, as for `linear`: the gate's few run on other units beside it."""
    tokens, inner = x.shape[0], weight.out_features // 2
    return Cost(
        flops=2 * tokens * weight.in_features * weight.out_features,
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
