"""From the fused projection to attention's inputs: per-head norms, rotary positions, KV into its pages.

Knows rotary embeddings and the page layout's shape. It must not know who owns a page.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from ridgeline.core.cost import Cost
from ridgeline.ops.norm import rms_norm
from ridgeline.ops.op import Tolerance, op
from ridgeline.ops.weight import nbytes


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding (Su et al., 2104.09864), halves layout: x [T, H, D], cos and sin [T, D / 2]."""
    first, second = x.float().chunk(2, dim=-1)
    cos, sin = cos[:, None, :], sin[:, None, :]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def kv_write(
    keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor
) -> None:
    """Put keys and values [T, Hk, D] into their slots of pages [blocks, Hk, block, D], in place.

    slot = block * block_size + offset; a negative slot is written nowhere.
    """
    size = k_pages.shape[2]
    blocks, offsets = slots // size, slots % size
    if slots.device.type != "meta" and bool((slots < 0).any()):
        kept = slots >= 0
        blocks, offsets, keys, values = blocks[kept], offsets[kept], keys[kept], values[kept]
    k_pages[blocks, :, offsets] = keys.to(k_pages.dtype)
    v_pages[blocks, :, offsets] = values.to(v_pages.dtype)


@op("elementwise", float32=Tolerance(1e-5, 1e-5), bfloat16=Tolerance(2e-2, 2e-2), float16=Tolerance(4e-3, 4e-3))
def rope_kv_write(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    eps: float,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    heads: int,
) -> torch.Tensor:
    """Split qkv, normalize q and k per head if asked, rotate both, write k and v to their pages.

    qkv: [T, (H + 2 Hk) D], q heads first, then k, then v. positions, slots: [T] int64; a token's
    position and slot differ only in token trees; slot < 0 writes nothing. cos, sin: [positions, D / 2]
    fp32 tables, or None for models without rotary embedding. q_norm, k_norm: [D] or None.
    k_pages, v_pages: [blocks, Hk, block, D], written in place. Returns q: [T, H, D].
    """
    kv_heads, head_dim = k_pages.shape[1], k_pages.shape[3]
    q, k, v = qkv.view(qkv.shape[0], -1, head_dim).split((heads, kv_heads, kv_heads), dim=1)
    if qkv.device.type == "meta":
        return torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if q_norm is not None and k_norm is not None:
        q, k = rms_norm(q, q_norm, eps), rms_norm(k, k_norm, eps)
    if cos is not None and sin is not None:
        q, k = rotate(q, cos[positions], sin[positions]), rotate(k, cos[positions], sin[positions])
    kv_write(k, v, slots, k_pages, v_pages)
    return q


@rope_kv_write.cost
def _(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    eps: float,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    heads: int,
) -> Cost:
    tokens, kv_heads, head_dim = qkv.shape[0], k_pages.shape[1], k_pages.shape[3]
    rotated = tokens * (heads + kv_heads) * head_dim
    table_bytes = 0 if cos is None else 2 * tokens * (head_dim // 2) * cos.element_size()
    return Cost(
        flops=(3 if cos is not None else 0) * rotated + (4 if q_norm is not None else 0) * rotated,
        read_bytes=nbytes(qkv, positions, slots, q_norm, k_norm) + table_bytes,
        write_bytes=tokens * heads * head_dim * qkv.element_size()
        + 2 * tokens * kv_heads * head_dim * k_pages.element_size(),
    )


@rope_kv_write.examples
def _(device: Any, dtype: torch.dtype) -> Iterator[Mapping[str, Any]]:
    for tokens, heads, kv_heads, head_dim, rotary, normed in (
        (1, 4, 1, 128, True, False),
        (5, 8, 2, 64, True, True),
        (7, 4, 4, 40, False, False),
        (6, 2, 1, 16, True, False),
    ):
        blocks, block = 4, 16
        angles = torch.rand(200, head_dim // 2, device=device) * 6
        yield {
            "qkv": torch.randn(tokens, (heads + 2 * kv_heads) * head_dim, device=device, dtype=dtype),
            "positions": torch.randint(200, (tokens,), device=device),
            "slots": torch.randperm(blocks * block, device=device)[:tokens],
            "cos": angles.cos() if rotary else None,
            "sin": angles.sin() if rotary else None,
            "q_norm": torch.randn(head_dim, device=device, dtype=dtype) if normed else None,
            "k_norm": torch.randn(head_dim, device=device, dtype=dtype) if normed else None,
            "eps": 1e-6,
            "k_pages": torch.randn(blocks, kv_heads, block, head_dim, device=device, dtype=dtype),
            "v_pages": torch.randn(blocks, kv_heads, block, head_dim, device=device, dtype=dtype),
            "heads": heads,
        }
