"""From the fused projection to attention's inputs in one launch: norms a head, rotation, KV into pages.

Knows the halves layout and pages. It must not know who owns a page. A program takes one token and a few
of its heads, of whatever kind: every kind walks the same code, masks say what is stored where.
"""

import torch
import triton
import triton.language as tl

from ridgeline.kernels.triton.dependent import dependent, ready, starting
from ridgeline.ops.op import cuda
from ridgeline.ops.rope import rope_kv_write

MAX_HEAD_DIM = 256
TILE = 1024  # elements (heads x head dim) that a program takes
WARPS = 2


@triton.jit(do_not_specialize_on_alignment=["positions", "slots"])
def _rope_kernel(
    qkv: tl.tensor,
    positions: tl.tensor,
    slots: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    q_norm: tl.tensor,
    k_norm: tl.tensor,
    q_out: tl.tensor,
    k_pages: tl.tensor,
    v_pages: tl.tensor,
    eps: tl.tensor,
    qkv_stride: tl.tensor,
    k_block_stride: tl.tensor,
    k_head_stride: tl.tensor,
    k_slot_stride: tl.tensor,
    v_block_stride: tl.tensor,
    v_head_stride: tl.tensor,
    v_slot_stride: tl.tensor,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    PAGE: tl.constexpr,
    SHARE: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    starting(EARLY)
    ready(EARLY)
    token = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * SHARE + tl.arange(0, SHARE))[:, None]
    lane = tl.arange(0, BLOCK)[None, :]
    real = (head < HEADS + 2 * KV_HEADS) & (lane < HALF)
    is_query = head < HEADS
    is_value = head >= HEADS + KV_HEADS

    source = qkv + token * qkv_stride + head * (2 * HALF) + lane
    first = tl.load(source, mask=real, other=0.0)
    second = tl.load(source + HALF, mask=real, other=0.0)

    if q_norm is not None:
        # Rounded where the reference rounds: after the division, and again after the weight.
        wide_first, wide_second = first.to(tl.float32), second.to(tl.float32)
        squares = tl.sum(wide_first * wide_first, axis=1) + tl.sum(wide_second * wide_second, axis=1)
        factor = tl.rsqrt(squares / (2 * HALF) + eps)[:, None]
        in_half = lane < HALF
        weight_first = tl.where(
            is_query,
            tl.load(q_norm + lane, mask=in_half, other=0.0).to(tl.float32),
            tl.load(k_norm + lane, mask=in_half, other=0.0).to(tl.float32),
        )
        weight_second = tl.where(
            is_query,
            tl.load(q_norm + HALF + lane, mask=in_half, other=0.0).to(tl.float32),
            tl.load(k_norm + HALF + lane, mask=in_half, other=0.0).to(tl.float32),
        )
        normed_first = (wide_first * factor).to(first.dtype).to(tl.float32) * weight_first
        normed_second = (wide_second * factor).to(first.dtype).to(tl.float32) * weight_second
        first = tl.where(is_value, first, normed_first.to(first.dtype))
        second = tl.where(is_value, second, normed_second.to(first.dtype))

    if cos is not None:
        position = tl.load(positions + token).to(tl.int64)
        angle = position * HALF + lane
        cosine = tl.load(cos + angle, mask=lane < HALF, other=0.0).to(tl.float32)
        sine = tl.load(sin + angle, mask=lane < HALF, other=0.0).to(tl.float32)
        wide_first, wide_second = first.to(tl.float32), second.to(tl.float32)
        turned_first = wide_first * cosine - wide_second * sine
        turned_second = wide_second * cosine + wide_first * sine
        first = tl.where(is_value, first, turned_first.to(first.dtype))
        second = tl.where(is_value, second, turned_second.to(first.dtype))

    target = q_out + (token * HEADS + head) * (2 * HALF) + lane
    tl.store(target, first, mask=real & is_query)
    tl.store(target + HALF, second, mask=real & is_query)

    slot = tl.load(slots + token).to(tl.int64)
    block, offset = slot // PAGE, slot % PAGE
    kept = real & (slot >= 0)
    is_key = (head >= HEADS) & (head < HEADS + KV_HEADS)
    key = k_pages + block * k_block_stride + (head - HEADS) * k_head_stride + offset * k_slot_stride + lane
    tl.store(key, first.to(k_pages.dtype.element_ty), mask=kept & is_key)
    tl.store(key + HALF, second.to(k_pages.dtype.element_ty), mask=kept & is_key)
    value_head = head - HEADS - KV_HEADS
    value = v_pages + block * v_block_stride + value_head * v_head_stride + offset * v_slot_stride + lane
    tl.store(value, first.to(v_pages.dtype.element_ty), mask=kept & is_value)
    tl.store(value + HALF, second.to(v_pages.dtype.element_ty), mask=kept & is_value)


def _accepts(
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
    head_dim = k_pages.shape[3]
    if qkv.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"takes fp32, bf16 and fp16, not {qkv.dtype}"
    if head_dim % 8 or head_dim > MAX_HEAD_DIM:
        return f"takes head dims that are multiples of 8 up to {MAX_HEAD_DIM}, not {head_dim}"
    if (cos is None) != (sin is None) or (q_norm is None) != (k_norm is None):
        return "takes cos with sin, and q_norm with k_norm, or neither"
    if cos is not None and cos.shape[-1] != head_dim // 2:
        return f"rotates whole heads ({head_dim // 2} angles), not {cos.shape[-1]}"
    return None


@rope_kv_write.kernel("triton", needs=cuda(80), accepts=_accepts, invariant=True)
def rope_kv_write_triton(
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
    """One launch for all tokens; q comes back contiguous, so that attention need not follow qkv's stride."""
    tokens, kv_heads, page, head_dim = qkv.shape[0], k_pages.shape[1], k_pages.shape[2], k_pages.shape[3]
    q = torch.empty(tokens, heads, head_dim, device=qkv.device, dtype=qkv.dtype)
    if not tokens:
        return q
    assert k_pages.stride(3) == v_pages.stride(3) == qkv.stride(1) == 1
    all_heads = heads + 2 * kv_heads
    block = triton.next_power_of_2(head_dim // 2)
    share = min(triton.next_power_of_2(all_heads), max(1, TILE // (2 * block)))
    _rope_kernel[(tokens, triton.cdiv(all_heads, share))](
        qkv,
        positions,
        slots,
        cos,
        sin,
        q_norm,
        k_norm,
        q,
        k_pages,
        v_pages,
        eps,
        qkv.stride(0),
        *k_pages.stride()[:3],
        *v_pages.stride()[:3],
        HEADS=heads,
        KV_HEADS=kv_heads,
        HALF=head_dim // 2,
        BLOCK=block,
        PAGE=page,
        SHARE=share,
        num_warps=WARPS,
        **dependent(qkv.device),
    )
    return q
