"""`attention` on the CPU: online softmax over keys in blocks of 32 that begin at key 0.

Knows pages, groups of query heads and the causal mask. A unit of work is one KV head of one request with
a tile of its new rows: the tile's queries (rows x heads of the group) pass over each block of keys while
it lies in the cache. What a row and head add up, and in which order, depends on their own visible keys
alone, so a result is the same for every page size, chunk and batch.

Online softmax: Milakov and Gimelshein, 1805.02867.
"""

from __future__ import annotations

import math

import torch

from ridgeline.core.step import Spans
from ridgeline.kernels.cpu.dtypes import HALF, other_dtype
from ridgeline.kernels.cpu.native import Kernel
from ridgeline.kernels.cpu.pool import POOL, float_bits
from ridgeline.ops.attention import attention
from ridgeline.ops.op import cpu

QUERIES = 32
"""Queries of a tile, if one row has no more heads a KV head."""

ALONE = 1 << 14
"""Products of queries and keys below which calling a helper takes longer than doing it all."""

attention_tiles = Kernel("attention", "attention_tiles")


def accepts(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    block_tables: torch.Tensor,
    query_starts: torch.Tensor,
    lengths: torch.Tensor,
    spans: Spans,
    scale: float,
    window: int | None = None,
) -> str | None:
    group, width = q.shape[1] // k_pages.shape[1], q.shape[2]
    if width > 256 or group * width > 1 << 14:
        return f"takes at most 256 a head and 16384 a group, not {width} and {group * width}"
    if not (k_pages.is_contiguous() and v_pages.is_contiguous()):
        return "takes contiguous pages"
    for tensor in (block_tables, query_starts, lengths):
        if tensor.dtype != torch.int32:
            return f"takes tables, starts and lengths in int32, not {tensor.dtype}"
    return other_dtype(q, k_pages, v_pages)


@attention.kernel("cpu", needs=cpu(), accepts=accepts)
def attention_cpu(
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
    if not q.is_contiguous():
        q = q.contiguous()
    if not block_tables.is_contiguous():
        block_tables = block_tables.contiguous()
    tokens, heads, width = q.shape
    _, kv_heads, block, _ = k_pages.shape
    requests, blocks = block_tables.shape
    out = torch.empty_like(q)
    tile = max(1, QUERIES * kv_heads // heads)
    units = kv_heads * (requests + tokens // tile)
    run = POOL.small if tokens * heads * blocks * block <= ALONE else POOL.share
    run(
        attention_tiles, units, q.data_ptr(), k_pages.data_ptr(), v_pages.data_ptr(), out.data_ptr(),
        block_tables.data_ptr(), query_starts.data_ptr(), lengths.data_ptr(), requests << 32 | blocks,
        heads << 32 | kv_heads, block << 32 | width, tile << 1 | HALF[q.dtype], window or 0,
        float_bits(scale / math.log(2)),
    )  # fmt: skip
    return out
