"""`attention` on the CPU: online softmax over keys in blocks of 32 and segments of 256 that begin at key 0.

Knows pages, groups of query heads, the causal mask and trees. A unit of work is one KV head of one request with
a tile of its new rows: the tile's queries (rows x heads of the group) pass over each block of keys while
it lies in the cache. A query's segments are summed one by one and then merged in order; if there are fewer
tiles than threads, each segment is a unit of its own and `merge_rows` merges, with the same result. What a
row and head add up, and in which order, depends on their own visible keys alone, so a result is the same
for every page size, chunk, batch and number of threads. A node of a tree adds up the keys of its path in the
order and at the places that they would have if the path had been appended alone, so its result is that too.

Online softmax: Milakov and Gimelshein, 1805.02867; split keys: Dao et al., "Flash-Decoding" (2023).
"""

from __future__ import annotations

import math
from typing import Any

import torch

from ridgeline.kernels.cpu.blocks import SEGMENT_KEYS
from ridgeline.kernels.cpu.dtypes import HALF
from ridgeline.kernels.cpu.native import Kernel
from ridgeline.kernels.cpu.pool import POOL, float_bits
from ridgeline.ops.attention import attention
from ridgeline.ops.attention_call import Call, Limits
from ridgeline.ops.op import cpu

QUERIES = 32
"""Queries of a tile, if one row has no more heads a KV head."""

ALONE = 1 << 18
"""Queries x keys x width below which calling a helper takes longer than doing it all."""

SPLIT_ELEMENTS = 1 << 20
"""fp32 numbers that queries' segments may take together."""

attention_tiles = Kernel("attention", "attention_tiles")
merge_rows = Kernel("attention", "merge_rows")


def _more(call: Call) -> str | None:
    if call.group * call.q.shape[2] > 1 << 14:
        return f"q: cpu takes up to 16384 numbers a group of heads, not {call.group * call.q.shape[2]}"
    if not (call.k.is_contiguous() and call.v.is_contiguous()):
        return "k: cpu takes contiguous pages"
    return None


LIMITS = Limits(
    "cpu",
    cpu(),
    dtypes=tuple(HALF),
    head_dims=range(1, 257),
    pages=range(1, 1 << 20),
    features=frozenset({"paged", "window", "tree"}),
    more=_more,
)


@attention.kernel("cpu", needs=LIMITS.need, accepts=LIMITS.accepts, invariant=True)
def attention_cpu(*args: Any, **kwargs: Any) -> torch.Tensor:
    """Arguments of the op. Raises InvalidArgument or KernelRefused, naming the argument."""
    call = LIMITS.require(*args, **kwargs)
    q, k, v, block_tables, query_starts, lengths = call[:6]
    scale, window = call.scale, call.window
    assert block_tables is not None
    if not q.is_contiguous():
        q = q.contiguous()
    if not block_tables.is_contiguous():
        block_tables = block_tables.contiguous()
    trees, words, tails = 0, 0, 0
    if call.tree is not None and call.tails is not None:
        tree = call.tree.contiguous()
        trees, words, tails = tree.data_ptr(), tree.shape[1], call.tails.data_ptr()
    tokens, heads, width = q.shape
    _, kv_heads, block, _ = k.shape
    requests, blocks = block_tables.shape
    out = torch.empty_like(q)
    tile = max(1, QUERIES * kv_heads // heads)
    units, segments = kv_heads * (requests + tokens // tile), 1
    alone = tokens * heads * blocks * block * width <= ALONE
    helpers = 0 if alone else POOL.helpers()
    if helpers and units < 2 * (helpers + 1):
        segments = -(-blocks * block // SEGMENT_KEYS)
    # Without room for the segments of every query, tiles go through their segments one by one.
    pitch = 16 + -(-width // 16) * 16
    split = segments > 1 and tokens * heads * segments * pitch <= SPLIT_ELEMENTS
    segments = segments if split else 1
    partial = torch.empty(tokens * heads * segments * pitch) if split else None
    run = POOL.small if alone else POOL.share
    run(
        attention_tiles, units * segments, q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(),
        block_tables.data_ptr(), query_starts.data_ptr(), lengths.data_ptr(), requests, blocks, heads, kv_heads,
        block, width, HALF[q.dtype], tile, window or 0, float_bits(scale / math.log(2)), segments,
        0 if partial is None else partial.data_ptr(), trees, words, tails,
    )  # fmt: skip
    if partial is not None:
        POOL.small(merge_rows, tokens * heads, partial.data_ptr(), out.data_ptr(), segments, width, HALF[q.dtype])
    return out
