"""The decoder-only transformer that all families share, written once, for every device.

`Decoder.forward` is the declaration: run on tensors it computes, run on meta tensors under a Meter it is
the performance model. Knows layers. It must not know schedulers, samplers or files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ridgeline.models.batch import Batch
from ridgeline.models.layers import (
    Attention,
    BiasedGatedMLP,
    DecoderLayer,
    FeedForward,
    GatedMLP,
    Linear,
    Mixture,
    Norm,
    PlainMLP,
)
from ridgeline.models.rotary import rotary_tables
from ridgeline.models.spec import ModelSpec
from ridgeline.models.weights import Store
from ridgeline.ops.op import Ops


@dataclass(frozen=True, slots=True)
class Names:
    """A family's names in the checkpoint; {layer} and {expert} stand for numbers."""

    embedding: str = "model.embed_tokens.weight"
    positions: str = ""
    norm: str = "model.norm"
    head: str = "lm_head.weight"
    layer: str = "model.layers.{layer}."
    attention_norm: str = "input_layernorm"
    q: str = "self_attn.q_proj"
    k: str = "self_attn.k_proj"
    v: str = "self_attn.v_proj"
    output: str = "self_attn.o_proj"
    q_norm: str = "self_attn.q_norm"
    k_norm: str = "self_attn.k_norm"
    mlp_norm: str = "post_attention_layernorm"
    gate: str = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"
    router: str = "mlp.gate"
    expert_gate: str = "mlp.experts.{expert}.gate_proj"
    expert_up: str = "mlp.experts.{expert}.up_proj"
    expert_down: str = "mlp.experts.{expert}.down_proj"


class Decoder:
    """Embedding, layers, final norm, output projection.

    max_positions: longest sequence that will be run (sizes the rotary tables).
    """

    def __init__(self, spec: ModelSpec, names: Names, store: Store, max_positions: int) -> None:
        self.spec = spec
        self.store = store
        build = _Builder(spec, names, store)
        self.embedding = store.matrix([(names.embedding, spec.vocabulary)], spec.hidden)
        self.places: torch.Tensor | None = None  # learned positions
        if spec.position_offset is not None:
            rows = spec.max_positions + spec.position_offset
            self.places = store.plain_matrix(names.positions, rows, spec.hidden)[spec.position_offset :]
        cos = sin = None
        if spec.rope is not None:
            cos, sin = rotary_tables(spec.rope, spec.head_dim, max_positions, store.device)
        self.layers = [build.layer(layer, cos, sin) for layer in range(spec.layers)]
        self.norm = build.norm(names.norm)
        if spec.tied:
            store.alias(names.head)
            self.head = Linear(self.embedding)
        else:
            self.head = Linear(store.matrix([(names.head, spec.vocabulary)], spec.hidden))

    def forward(
        self, batch: Batch, keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor], ops: Ops
    ) -> torch.Tensor:
        """Final hidden states [R, D] of the batch's rows; every layer's pages are written in place."""
        learned = () if self.places is None else (batch.positions, self.places)
        x = ops.embed(batch.ids, self.embedding, *learned)
        residual: torch.Tensor | None = None
        for layer, k_pages, v_pages in zip(self.layers, keys, values):
            x, residual = layer(x, residual, batch, k_pages, v_pages, ops)
        if batch.rows is not None:
            assert residual is not None
            x, residual = ops.take(x, residual, batch.rows)
        x, _ = self.norm(x, residual, ops)
        return x

    def logits(self, hidden: torch.Tensor, ops: Ops) -> torch.Tensor:
        """[R, D] -> [R, vocabulary]. Apart from `forward`, so that many rows can be taken in slices."""
        return self.head(hidden, ops)


class _Builder:
    """Makes a layer's parts, asking the store for parameters under the family's names."""

    def __init__(self, spec: ModelSpec, names: Names, store: Store) -> None:
        self.spec, self.names, self.store = spec, names, store

    def norm(self, name: str) -> Norm:
        hidden = self.spec.hidden
        weight = self.store.vector([(f"{name}.weight", hidden)])
        bias = self.store.vector([(f"{name}.bias", hidden)]) if self.spec.norm == "layer" else None
        return Norm(weight, bias, self.spec.norm_eps)

    def linear(
        self, parts: Sequence[tuple[str, int]], inputs: int, bias: bool, activation: str | None = None
    ) -> Linear:
        weight = self.store.matrix([(f"{name}.weight", rows) for name, rows in parts], inputs)
        shift = self.store.vector([(f"{name}.bias", rows) for name, rows in parts]) if bias else None
        return Linear(weight, shift, activation)

    def layer(self, number: int, cos: torch.Tensor | None, sin: torch.Tensor | None) -> DecoderLayer:
        prefix = self.names.layer.format(layer=number)
        return DecoderLayer(
            self.norm(prefix + self.names.attention_norm),
            self.attention(prefix, number, cos, sin),
            self.norm(prefix + self.names.mlp_norm),
            self.mlp(prefix, number),
        )

    def attention(self, prefix: str, number: int, cos: torch.Tensor | None, sin: torch.Tensor | None) -> Attention:
        spec, names = self.spec, self.names
        q_rows, kv_rows = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
        parts = [(prefix + names.q, q_rows), (prefix + names.k, kv_rows), (prefix + names.v, kv_rows)]
        norms: list[torch.Tensor | None] = [None, None]
        if spec.qk_norm:
            norms = [
                self.store.vector([(f"{prefix}{name}.weight", spec.head_dim)]) for name in (names.q_norm, names.k_norm)
            ]
        return Attention(
            self.linear(parts, spec.hidden, spec.qkv_bias),
            self.linear([(prefix + names.output, spec.hidden)], q_rows, spec.output_bias),
            norms[0],
            norms[1],
            cos,
            sin,
            spec.heads,
            spec.head_dim**-0.5,
            spec.windows[number],
            spec.norm_eps,
        )

    def mlp(self, prefix: str, number: int) -> FeedForward:
        spec, names = self.spec, self.names
        if spec.experts is not None and number in spec.experts.sparse_layers:
            return self.mixture(prefix)
        down = self.linear([(prefix + names.down, spec.hidden)], spec.intermediate, spec.mlp_bias)
        if not spec.gated:
            up = self.linear([(prefix + names.up, spec.intermediate)], spec.hidden, spec.mlp_bias, spec.activation)
            return PlainMLP(up, down)
        parts = [(prefix + name, spec.intermediate) for name in (names.gate, names.up)]
        gate_up = self.linear(parts, spec.hidden, spec.mlp_bias)
        if spec.mlp_bias:
            return BiasedGatedMLP(gate_up, down, spec.activation)
        return GatedMLP(gate_up.weight, down, spec.activation)

    def mixture(self, prefix: str) -> Mixture:
        spec, names, experts = self.spec, self.names, self.spec.experts
        assert experts is not None

        def part(name: str, expert: int, rows: int) -> tuple[str, int]:
            return f"{prefix}{name.format(expert=expert)}.weight", rows

        inner = experts.intermediate
        gate_up = self.store.experts(
            lambda e: [part(names.expert_gate, e, inner), part(names.expert_up, e, inner)], experts.count, spec.hidden
        )
        down = self.store.experts(lambda e: [part(names.expert_down, e, spec.hidden)], experts.count, inner)
        router = self.store.plain_matrix(f"{prefix}{names.router}.weight", experts.count, spec.hidden)
        return Mixture(router, gate_up, down, experts.per_token, experts.renormalize, spec.activation)
