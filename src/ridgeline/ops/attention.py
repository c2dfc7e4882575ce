"""Attention of ragged batches of new tokens over paged keys and values.

Knows causal, windowed attention by block table. It must not know layers, schedulers or who shares a
page; everything arrives as an argument.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from ridgeline.core.cost import Cost
from ridgeline.core.step import Spans
from ridgeline.ops.op import Tolerance, op
from ridgeline.ops.weight import nbytes


@op("contraction", float32=Tolerance(1e-5, 1e-5), bfloat16=Tolerance(2e-2, 2e-2), float16=Tolerance(4e-3, 4e-3))
def attention(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    block_tables: torch.Tensor,
    query_starts: torch.Tensor,
    lengths: torch.Tensor,
    spans: Spans,
    scale: float,
    window: int | None = None,
) -> torch.Tensor:
    """softmax(scale * q k.T + causal mask) v, request by request.

    q: [T, H, D], requests one after the other; k_pages, v_pages: [blocks, Hk, block, D], H a multiple
    of Hk. block_tables: [B, blocks a request] int32; query_starts: [B + 1] int32, request b owns rows
    query_starts[b] .. query_starts[b + 1]; lengths: [B] int32 keys visible to b's last row. Row i of
    the n rows of b sees keys 0 .. lengths[b] - n + i, the last `window` of them if a window is given.
    spans: the same lengths as host integers, for cost alone. A request with no rows (padding) is
    legal. Returns [T, H, D].
    """
    out = torch.empty_like(q)
    if q.device.type == "meta":
        return out
    heads, head_dim = q.shape[1], q.shape[2]
    group = heads // k_pages.shape[1]
    size = k_pages.shape[2]
    starts, visible = query_starts.tolist(), lengths.tolist()
    for index, length in enumerate(visible):
        first, last = starts[index], starts[index + 1]
        rows = last - first
        if rows == 0:
            continue
        table = block_tables[index, : -(-length // size)].long()
        keys, values = (
            pages[table].transpose(0, 1).reshape(-1, table.numel() * size, head_dim)[:, :length]
            for pages in (k_pages, v_pages)
        )
        keys, values = keys.repeat_interleave(group, 0).float(), values.repeat_interleave(group, 0).float()
        scores = scale * (q[first:last].transpose(0, 1).float() @ keys.transpose(1, 2))
        row = torch.arange(length - rows, length, device=q.device)[:, None]
        column = torch.arange(length, device=q.device)[None, :]
        hidden = column > row
        if window is not None:
            hidden |= column <= row - window
        scores = scores.masked_fill(hidden, float("-inf"))
        out[first:last] = (scores.softmax(-1) @ values).transpose(0, 1).to(q.dtype)
    return out


@attention.cost
def _(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    block_tables: torch.Tensor,
    query_starts: torch.Tensor,
    lengths: torch.Tensor,
    spans: Spans,
    scale: float,
    window: int | None = None,
) -> Cost:
    heads, head_dim, kv_heads = q.shape[1], q.shape[2], k_pages.shape[1]
    kv_bytes = 2 * kv_heads * head_dim * k_pages.element_size() * spans.keys(window)
    return Cost(
        flops=4 * heads * head_dim * spans.pairs(window), read_bytes=nbytes(q) + kv_bytes, write_bytes=nbytes(q)
    )


@attention.examples
def _(device: Any, dtype: torch.dtype) -> Iterator[Mapping[str, Any]]:
    for heads, kv_heads, head_dim, block, window, new, visible in (
        (4, 1, 128, 16, None, (1, 1, 1), (1, 17, 40)),
        (4, 1, 128, 64, None, (70, 1, 5), (70, 33, 60)),
        (8, 2, 64, 16, 20, (1, 30, 3), (50, 30, 61)),
        (2, 2, 40, 32, None, (7, 2), (9, 100)),
        (6, 2, 16, 16, None, (1,), (35,)),
    ):
        yield attention_inputs(device, dtype, heads, kv_heads, head_dim, block, window, new, visible)


def attention_inputs(
    device: Any,
    dtype: torch.dtype,
    heads: int,
    kv_heads: int,
    head_dim: int,
    block: int,
    window: int | None,
    new: tuple[int, ...],
    visible: tuple[int, ...],
) -> Mapping[str, Any]:
    """Random arguments for `attention`: pages in random order, pages of nobody filled with NaN."""
    needed = [-(-length // block) for length in visible]
    order = torch.randperm(sum(needed) + 2)
    tables = torch.zeros(len(visible), max(needed) + 1, dtype=torch.int32)
    used = 0
    for index, count in enumerate(needed):
        tables[index, :count] = order[used : used + count]
        used += count
    pages = [torch.randn(sum(needed) + 2, kv_heads, block, head_dim, device=device, dtype=dtype) for _ in range(2)]
    for page in pages:
        page[order[used:].to(page.device)] = float("nan")
    starts = [0]
    for count in new:
        starts.append(starts[-1] + count)
    return {
        "q": torch.randn(starts[-1], heads, head_dim, device=device, dtype=dtype),
        "k_pages": pages[0],
        "v_pages": pages[1],
        "block_tables": tables.to(device),
        "query_starts": torch.tensor(starts, dtype=torch.int32, device=device),
        "lengths": torch.tensor(visible, dtype=torch.int32, device=device),
        "spans": Spans(new, visible),
        "scale": head_dim**-0.5,
        "window": window,
    }
