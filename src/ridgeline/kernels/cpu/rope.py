"""`rope_kv_write` on the CPU: each head of each token once through, out to q or to its page.

Knows heads and slots. A unit of work is four tokens. bf16 is rounded where the reference rounds it.
"""

from __future__ import annotations

import torch

from ridgeline.kernels.cpu.blocks import ROPE_TOKENS
from ridgeline.kernels.cpu.dtypes import HALF, other_dtype
from ridgeline.kernels.cpu.native import Kernel
from ridgeline.kernels.cpu.pool import POOL, float_bits
from ridgeline.ops.op import cpu
from ridgeline.ops.rope import rope_kv_write

ALONE_ELEMENTS = 1 << 14

rope_tokens = Kernel("rope", "rope_tokens")


def accepts(
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
) -> str | None:
    if (cos is None) != (sin is None) or (q_norm is None) != (k_norm is None):
        return "takes cos and sin, and both norms' weights, or neither"
    if cos is not None and cos.dtype != torch.float32:
        return f"takes rotary tables in float32, not {cos.dtype}"
    if not (k_pages.is_contiguous() and v_pages.is_contiguous()):
        return "takes contiguous pages"
    return other_dtype(qkv, q_norm, k_norm, k_pages, v_pages)


@rope_kv_write.kernel("cpu", needs=cpu(), accepts=accepts, invariant=True)
def rope_kv_write_cpu(
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
    if not qkv.is_contiguous():
        qkv = qkv.contiguous()
    tokens = qkv.shape[0]
    _, kv_heads, block, width = k_pages.shape
    out = qkv.new_empty((tokens, heads, width))
    run = POOL.small if qkv.numel() <= ALONE_ELEMENTS else POOL.share
    run(
        rope_tokens, -(-tokens // ROPE_TOKENS), qkv.data_ptr(), out.data_ptr(), positions.data_ptr(), slots.data_ptr(),
        0 if cos is None else cos.data_ptr(), 0 if sin is None else sin.data_ptr(),
        0 if q_norm is None else q_norm.data_ptr(), 0 if k_norm is None else k_norm.data_ptr(), float_bits(eps),
        k_pages.data_ptr(), v_pages.data_ptr(), tokens, heads << 32 | kv_heads << 1 | HALF[qkv.dtype],
        block << 32 | width,
    )  # fmt: skip
    return out
