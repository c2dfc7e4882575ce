"""The parts of a decoder layer, each a few ops in a row.

Knows which op follows which. It must not know families (they choose parts and names) or devices.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ridgeline.models.batch import Batch
from ridgeline.ops.op import Ops
from ridgeline.ops.weight import Weight


@dataclass(slots=True)
class Norm:
    """RMSNorm (bias is None) or LayerNorm, with the residual addition before it."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    eps: float

    def __call__(self, x: torch.Tensor, residual: torch.Tensor | None, ops: Ops) -> tuple[torch.Tensor, torch.Tensor]:
        """(normalized x + residual, x + residual), [T, D] each."""
        if self.bias is None:
            return ops.norm(x, residual, self.weight, self.eps)
        return ops.layer_norm(x, residual, self.weight, self.bias, self.eps)


@dataclass(slots=True)
class Linear:
    """A projection with an optional bias and activation."""

    weight: Weight
    bias: torch.Tensor | None = None
    activation: str | None = None

    def __call__(self, x: torch.Tensor, ops: Ops) -> torch.Tensor:
        return ops.linear(x, self.weight, self.bias, self.activation)


@dataclass(slots=True)
class Attention:
    """Projection to q, k, v; norms and rotation; keys and values into pages; attention; projection back."""

    qkv: Linear
    out: Linear
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    cos: torch.Tensor | None
    sin: torch.Tensor | None
    heads: int
    scale: float
    window: int | None
    eps: float

    def __call__(
        self, x: torch.Tensor, batch: Batch, k_pages: torch.Tensor, v_pages: torch.Tensor, ops: Ops
    ) -> torch.Tensor:
        """[T, D] -> [T, D], with this layer's pages [blocks, Hk, block, head_dim] written in place."""
        q = ops.rope_kv_write(
            self.qkv(x, ops),
            batch.positions,
            batch.slots,
            self.cos,
            self.sin,
            self.q_norm,
            self.k_norm,
            self.eps,
            k_pages,
            v_pages,
            self.heads,
        )
        mixed = ops.attention(
            q,
            k_pages,
            v_pages,
            batch.block_tables,
            batch.query_starts,
            batch.lengths,
            batch.spans,
            self.scale,
            self.window,
            **({} if batch.tree is None else {"tree": batch.tree, "tails": batch.tails}),
        )
        return self.out(mixed.view(mixed.shape[0], -1), ops)


@dataclass(slots=True)
class GatedMLP:
    """down(act(gate x) * up x)."""

    gate_up: Weight
    down: Linear
    activation: str

    def __call__(self, x: torch.Tensor, ops: Ops) -> torch.Tensor:
        return self.down(ops.gated_linear(x, self.gate_up, self.activation), ops)


@dataclass(slots=True)
class BiasedGatedMLP:
    """down(act(gate x + b) * (up x + c)): the gate stands behind the biases, so it is an op of its own."""

    gate_up: Linear
    down: Linear
    activation: str

    def __call__(self, x: torch.Tensor, ops: Ops) -> torch.Tensor:
        return self.down(ops.gate(self.gate_up(x, ops), self.activation), ops)


@dataclass(slots=True)
class PlainMLP:
    """down(act(up x))."""

    up: Linear
    down: Linear

    def __call__(self, x: torch.Tensor, ops: Ops) -> torch.Tensor:
        return self.down(self.up(x, ops), ops)


@dataclass(slots=True)
class Mixture:
    """A mixture of gated experts."""

    router: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor
    per_token: int
    renormalize: bool
    activation: str

    def __call__(self, x: torch.Tensor, ops: Ops) -> torch.Tensor:
        return ops.moe(x, self.router, self.gate_up, self.down, self.per_token, self.renormalize, self.activation)


FeedForward = GatedMLP | BiasedGatedMLP | PlainMLP | Mixture


@dataclass(slots=True)
class DecoderLayer:
    """Pre-norm attention and feed-forward; the residual addition is fused into the next norm."""

    attention_norm: Norm
    attention: Attention
    mlp_norm: Norm
    mlp: FeedForward

    def __call__(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        batch: Batch,
        k_pages: torch.Tensor,
        v_pages: torch.Tensor,
        ops: Ops,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(output not yet added to the residual, residual), [T, D] each."""
        x, residual = self.attention_norm(x, residual, ops)
        x = self.attention(x, batch, k_pages, v_pages, ops)
        x, residual = self.mlp_norm(x, residual, ops)
        return self.mlp(x, ops), residual
