"""The Llama architecture, as small as training it needs: forward pass, key-value memory and parameter names.

Knows tensors and one set of sizes. Knows nothing of optimizers, data or files; parameters bear the names of the
Hugging Face checkpoint format, so that saving a model is writing its state.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as functional
from torch import Tensor, nn


@dataclass(frozen=True)
class Sizes:
    """Sizes of a Llama model; the field names are those of its `config.json`."""

    hidden_size: int
    head_dim: int
    num_attention_heads: int
    num_key_value_heads: int
    num_hidden_layers: int
    intermediate_size: int
    vocab_size: int = 4096
    max_position_embeddings: int = 2048
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5

    def as_dict(self) -> dict[str, int | float]:
        return asdict(self)


TARGET = Sizes(
    hidden_size=256,
    head_dim=128,
    num_attention_heads=4,
    num_key_value_heads=1,
    num_hidden_layers=10,
    intermediate_size=768,
)
SSM = Sizes(
    hidden_size=192,
    head_dim=64,
    num_attention_heads=3,
    num_key_value_heads=1,
    num_hidden_layers=2,
    intermediate_size=384,
)


class Norm(nn.Module):
    """Root-mean-square norm (Zhang and Sennrich, 2019), computed in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (wide * self.weight.float()).to(x.dtype)


class Memory:
    """Keys and values of a batch whose rows all have the same length: two tensors per layer, [rows, kv_heads, tokens,
    head_dim], and how many positions are filled."""

    def __init__(self, sizes: Sizes, rows: int, tokens: int, device: torch.device, dtype: torch.dtype) -> None:
        shape = (rows, sizes.num_key_value_heads, tokens, sizes.head_dim)
        self.keys = [torch.empty(shape, device=device, dtype=dtype) for _ in range(sizes.num_hidden_layers)]
        self.values = [torch.empty(shape, device=device, dtype=dtype) for _ in range(sizes.num_hidden_layers)]
        self.filled = 0


class Attention(nn.Module):
    """Causal attention with rotary positions and grouped queries (Ainslie et al., 2023)."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = (
            sizes.num_attention_heads,
            sizes.num_key_value_heads,
            sizes.head_dim,
        )
        self.q_proj = nn.Linear(sizes.hidden_size, self.heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(sizes.hidden_size, self.kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(sizes.hidden_size, self.kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.heads * self.head_dim, sizes.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, memory: Memory | None, layer: int) -> Tensor:
        rows, count, _ = x.shape
        q = rotate(self.q_proj(x).view(rows, count, self.heads, self.head_dim).transpose(1, 2), cos, sin)
        k = rotate(self.k_proj(x).view(rows, count, self.kv_heads, self.head_dim).transpose(1, 2), cos, sin)
        v = self.v_proj(x).view(rows, count, self.kv_heads, self.head_dim).transpose(1, 2)
        group = self.heads // self.kv_heads
        if memory is not None:
            end = memory.filled + count
            memory.keys[layer][:, :, memory.filled : end] = k
            memory.values[layer][:, :, memory.filled : end] = v
            if count == 1:
                # One new token: the heads that share a key stand side by side as if they were positions.
                queries = q.reshape(rows, self.kv_heads, group, self.head_dim)
                known, content = memory.keys[layer][:, :, :end], memory.values[layer][:, :, :end]
                mixed = functional.scaled_dot_product_attention(queries, known.to(q.dtype), content.to(q.dtype))
                return self.o_proj(mixed.reshape(rows, 1, self.heads * self.head_dim))
            if memory.filled:
                raise ValueError("a memory is filled by one long step, then by single tokens")
        q = q.transpose(1, 2).contiguous().transpose(1, 2)
        k = k.transpose(1, 2).repeat_interleave(group, 2).contiguous().transpose(1, 2)
        v = v.transpose(1, 2).repeat_interleave(group, 2).contiguous().transpose(1, 2)
        mixed = functional.scaled_dot_product_attention(q, k, v.to(q.dtype), is_causal=True)
        return self.o_proj(mixed.transpose(1, 2).reshape(rows, count, self.heads * self.head_dim))


class FeedForward(nn.Module):
    """Gated feed-forward, SwiGLU (Shazeer, 2020)."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(sizes.hidden_size, sizes.intermediate_size, bias=False)
        self.up_proj = nn.Linear(sizes.hidden_size, sizes.intermediate_size, bias=False)
        self.down_proj = nn.Linear(sizes.intermediate_size, sizes.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """One pre-norm transformer layer."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.input_layernorm = Norm(sizes.hidden_size, sizes.rms_norm_eps)
        self.self_attn = Attention(sizes)
        self.post_attention_layernorm = Norm(sizes.hidden_size, sizes.rms_norm_eps)
        self.mlp = FeedForward(sizes)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, memory: Memory | None, layer: int) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, memory, layer)
        return x + self.mlp(self.post_attention_layernorm(x))


class Body(nn.Module):
    """Embedding, layers and final norm: what the checkpoint format calls `model`."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(sizes.vocab_size, sizes.hidden_size)
        self.layers = nn.ModuleList(Layer(sizes) for _ in range(sizes.num_hidden_layers))
        self.norm = Norm(sizes.hidden_size, sizes.rms_norm_eps)


class Llama(nn.Module):
    """A Llama language model whose output layer is its embedding."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.model = Body(sizes)
        cos, sin = rotary_tables(sizes)
        self.cos: Tensor
        self.sin: Tensor
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        for name, weight in self.named_parameters():
            if name.endswith("embed_tokens.weight"):
                nn.init.normal_(weight, std=0.02)
            elif name.endswith(("o_proj.weight", "down_proj.weight")):
                nn.init.zeros_(weight)  # every layer starts as the identity
            elif weight.ndim == 2:
                nn.init.normal_(weight, std=sizes.hidden_size**-0.5)

    def hidden(self, ids: Tensor, memory: Memory | None = None) -> Tensor:
        """Final hidden states [rows, tokens, hidden_size] of ids [rows, tokens]; with a memory, ids continue it."""
        first = 0 if memory is None else memory.filled
        cos, sin = self.cos[first : first + ids.shape[1]], self.sin[first : first + ids.shape[1]]
        x = self.model.embed_tokens(ids)
        if torch.is_autocast_enabled(ids.device.type):
            x = x.to(torch.get_autocast_dtype(ids.device.type))
        for index, layer in enumerate(self.model.layers):
            x = layer(x, cos, sin, memory, index)
        if memory is not None:
            memory.filled += ids.shape[1]
        return self.model.norm(x)

    def forward(self, ids: Tensor, memory: Memory | None = None) -> Tensor:
        """Logits [rows, tokens, vocab_size]."""
        return functional.linear(self.hidden(ids, memory), self.model.embed_tokens.weight)


def rotary_tables(sizes: Sizes) -> tuple[Tensor, Tensor]:
    """Cosines and sines, float32[max_position_embeddings, head_dim], of rotary positions (Su et al., 2021)."""
    frequencies = sizes.rope_theta ** (-torch.arange(0, sizes.head_dim, 2).float() / sizes.head_dim)
    angles = torch.outer(torch.arange(sizes.max_position_embeddings).float(), frequencies)
    return torch.cat((angles, angles), -1).cos(), torch.cat((angles, angles), -1).sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns x [rows, heads, tokens, head_dim] by its positions; a pair is (i, i + head_dim / 2)."""
    one, two = x.float().chunk(2, -1)
    turned = x.float() * cos + torch.cat((-two, one), -1) * sin
    return turned.to(x.dtype)


def parameter_count(model: nn.Module) -> int:
    return sum(weight.numel() for weight in model.parameters())
