"""A mixture of gated experts: route each token to its k best, run them, add up.

Knows routing and experts' weights. It must not know the layer around it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F

from ridgeline.core.cost import Cost
from ridgeline.ops.mlp import gate
from ridgeline.ops.op import Tolerance, op
from ridgeline.ops.weight import nbytes


def route(x: torch.Tensor, router: torch.Tensor, top_k: int, renormalize: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights [T, k] (fp32) and experts [T, k] of each token: the top k of softmax(x @ router.T)."""
    scores = F.linear(x, router).float().softmax(-1)
    weights, experts = scores.topk(top_k, dim=-1)
    if renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights, experts


def uniform_experts(count: int, top_k: int, tokens: int) -> float:
    """Distinct experts of `count` that so many tokens touch in the mean, if every one is as likely."""
    return count * (1 - (1 - top_k / count) ** tokens)


def distinct_experts(x: torch.Tensor, router: torch.Tensor, _gate_up: Any, _down: Any, top_k: int, *_rest: Any) -> int:
    """Experts that the tokens of a call of `moe` (its arguments) really go to. Waits for the device."""
    experts = route(x, router, top_k, False)[1]
    return int(experts.unique().numel())


@op("contraction", float32=Tolerance(1e-4, 1e-5), bfloat16=Tolerance(3e-2, 3e-2), float16=Tolerance(8e-3, 8e-3))
def moe(
    x: torch.Tensor,
    router: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    top_k: int,
    renormalize: bool,
    activation: str = "silu",
) -> torch.Tensor:
    """Sum over a token's k experts of weight * (act(x Wg.T) * (x Wu.T)) Wd.T (Shazeer et al., 1701.06538).

    x: [T, D]; router: [E, D]; gate_up: [E, 2 I, D] (gate's rows first); down: [E, D, I]. Returns [T, D].
    """
    if x.device.type == "meta":
        return x.new_empty(x.shape)
    weights, experts = route(x, router, top_k, renormalize)
    out = torch.zeros_like(x)
    for expert in experts.unique().tolist():
        rows, places = (experts == expert).nonzero(as_tuple=True)
        inner = gate(F.linear(x[rows], gate_up[expert]), activation)
        out.index_add_(0, rows, F.linear(inner, down[expert]) * weights[rows, places, None].to(x.dtype))
    return out


@moe.cost
def _(
    x: torch.Tensor,
    router: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    top_k: int,
    renormalize: bool,
    activation: str = "silu",
) -> Cost:
    """FLOPs of the products alone, as for `linear`.

    Weights are read of the experts that a uniform router touches in the mean (`uniform_experts`): tokens are not known
    here. A router that favours some reads fewer, so of all this alone is no lower bound of a single step.
    """
    tokens, hidden = x.shape
    count, inner = gate_up.shape[0], gate_up.shape[1] // 2
    active = uniform_experts(count, top_k, tokens)
    expert_bytes = nbytes(gate_up, down) / count
    return Cost(
        flops=2 * tokens * hidden * count + 6 * tokens * top_k * hidden * inner,
        read_bytes=nbytes(x, router) + active * expert_bytes,
        write_bytes=nbytes(x),
        launches=3,
    )


@moe.examples
def _(device: Any, dtype: torch.dtype) -> Iterator[Mapping[str, Any]]:
    for tokens, hidden, inner, count, top_k, renormalize in (
        (1, 64, 32, 8, 2, True),
        (37, 64, 48, 8, 2, True),
        (9, 32, 64, 16, 4, False),
    ):
        yield {
            "x": torch.randn(tokens, hidden, device=device, dtype=dtype),
            "router": torch.randn(count, hidden, device=device, dtype=dtype),
            "gate_up": torch.randn(count, 2 * inner, hidden, device=device, dtype=dtype) / hidden**0.5,
            "down": torch.randn(count, hidden, inner, device=device, dtype=dtype) / inner**0.5,
            "top_k": top_k,
            "renormalize": renormalize,
            "activation": "silu",
        }
