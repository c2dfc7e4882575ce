"""Attention of ragged batches of new tokens over keys and values in pages, or in rows of their own.

Knows what attention means: masks, caps, sinks, draft trees, logarithms of sums. It must not know layers,
schedulers or who shares a page; everything arrives as an argument. docs/attention.md is the contract.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from ridgeline.core.cost import Cost
from ridgeline.core.step import Spans
from ridgeline.ops.attention_call import WORD_BITS, Call, checked
from ridgeline.ops.op import Tolerance, op
from ridgeline.ops.weight import nbytes

Attended = torch.Tensor | tuple[torch.Tensor, torch.Tensor]


@op("contraction", float32=Tolerance(1e-5, 1e-5), bfloat16=Tolerance(2e-2, 2e-2), float16=Tolerance(4e-3, 4e-3))
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    block_tables: torch.Tensor | None,
    query_starts: torch.Tensor,
    lengths: torch.Tensor,
    spans: Spans,
    scale: float,
    window: int | None = None,
    key_starts: torch.Tensor | None = None,
    causal: bool = True,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    tree: torch.Tensor | None = None,
    tails: torch.Tensor | None = None,
    return_lse: bool = False,
) -> Attended:
    """softmax(mask(cap(scale * q k.T))) v, request by request.

    q: [T, H, D], requests one after the other, H a multiple of Hk. query_starts: [B + 1] int32, request b
    owns rows query_starts[b] .. query_starts[b + 1]; lengths: [B] int32 keys visible to b's last row. A
    request with no rows (padding) is legal.
    k, v: [blocks, Hk, block, D] with block_tables: [B, blocks a request] int32, or [K, Hk, D] with
    key_starts: [B + 1] int32, request b owning rows key_starts[b] .. of them. Exactly one of the two is given.
    causal: row i of the n rows of b sees keys 0 .. lengths[b] - n + i, the last `window` of them if a
    window is given; if not, every row sees all lengths[b] keys.
    softcap: scores become softcap * tanh(score / softcap) before the mask. sinks: [H] fp32 logits that
    take part in the denominator and have no value.
    tree: [T, words] int32 and tails: [B] int32: the last tails[b] keys of b are nodes of a tree, its last
    tails[b] rows the same nodes; if it has fewer rows, they are the last nodes, the others having been computed
    before. Such a row sees the keys before the tail (those within `window` of its position: the tail's start + its
    number of bits - 1) and tail key j if bit j % 32 of word j // 32 is set; bits past the tail are not looked at.
    Other rows are causal.
    spans: the same lengths as host integers, for cost and checks alone.

    Returns [T, H, D]; with return_lse also [T, H] fp32, the natural logarithm of the sum of exponentials,
    the sink's included. Rows that see nothing give zeros and -inf (with sinks: the sink). Rows of no request
    are left as they are. Keys that no row sees may hold anything.
    Raises InvalidArgument for shapes, dtypes, strides and devices that do not belong together.
    """
    call = checked(
        Call(
            q, k, v, block_tables, query_starts, lengths, spans, scale,
            window, key_starts, causal, softcap, sinks, tree, tails, return_lse,
        )
    )  # fmt: skip
    out = q.new_empty(q.shape)
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    if q.device.type != "meta":
        starts, visible = query_starts.tolist(), lengths.tolist()
        ends = visible if tails is None else [n - tail for n, tail in zip(visible, tails.tolist())]
        for index, length in enumerate(visible):
            first, last = starts[index], starts[index + 1]
            if first < last:
                keys, values = keys_of(call, index, length)
                hidden = ~seen(call, first, last, ends[index], length)
                out[first:last], lse[first:last] = _attend(call, q[first:last], keys, values, hidden)
    return (out, lse) if return_lse else out


def keys_of(call: Call, index: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of request `index`, [Hk, length, D] each."""
    if call.block_tables is None:
        assert call.key_starts is not None
        first = int(call.key_starts[index])
        return call.k[first : first + length].transpose(0, 1), call.v[first : first + length].transpose(0, 1)
    size = call.k.shape[2]
    table = call.block_tables[index, : -(-length // size)].long()
    keys, values = (pages[table].transpose(0, 1).flatten(1, 2)[:, :length] for pages in (call.k, call.v))
    return keys, values


def seen(call: Call, first: int, last: int, tail: int, length: int) -> torch.Tensor:
    """Which of `length` keys rows first .. last of one request see, [rows, length]; its tree's keys begin at `tail`."""
    device = call.q.device
    key = torch.arange(length, device=device)[None, :]
    position = torch.arange(length - (last - first), length, device=device)[:, None]
    if not call.causal:
        return torch.ones(last - first, length, dtype=torch.bool, device=device)
    mask = key <= position
    if call.tree is not None and tail < length:
        nodes = min(length - tail, last - first)
        bit = torch.arange(length - tail, device=device)
        bits = (call.tree[last - nodes : last, bit // WORD_BITS] >> (bit % WORD_BITS)) & 1
        mask[-nodes:, :tail] = True
        mask[-nodes:, tail:] = bits.bool()
        position[-nodes:, 0] = tail + bits.sum(1) - 1
    if call.window is not None:
        mask &= (key > position - call.window) | (key >= tail)
    return mask


def _attend(
    call: Call, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, hidden: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """One request: rows [n, H, D] over keys and values [Hk, length, D] in fp32 (fp64 if q is)."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    keys, values = (part.repeat_interleave(call.group, 0).to(dtype) for part in (keys, values))
    # Zero times NaN is NaN, so what no row sees is cleared.
    values = values.masked_fill(hidden.all(0)[None, :, None], 0.0)
    scores = call.scale * (q.transpose(0, 1).to(dtype) @ keys.transpose(1, 2))
    if call.softcap is not None:
        scores = call.softcap * (scores / call.softcap).tanh()
    scores = scores.masked_fill(hidden, float("-inf"))
    total = torch.logsumexp(scores, -1)
    if call.sinks is not None:
        total = torch.logaddexp(total, call.sinks[:, None].to(dtype))
    weights = (scores - total.masked_fill(total == float("-inf"), 0.0)[:, :, None]).exp()
    return (weights @ values).transpose(0, 1).to(q.dtype), total.transpose(0, 1).float()


@attention.cost
def _(*args: Any, **kwargs: Any) -> Cost:
    call = Call(*args, **kwargs)
    q, spans = call.q, call.spans
    heads, head_dim = q.shape[1], q.shape[2]
    key_bytes = 2 * call.k.shape[1] * head_dim * call.k.element_size() * spans.keys(call.window)
    more = [one for one in (call.sinks, call.tree) if one is not None]
    return Cost(
        flops=4 * heads * head_dim * spans.pairs(call.window, call.causal),
        read_bytes=nbytes(q) + key_bytes + sum(map(nbytes, more)),
        write_bytes=nbytes(q) + (4 * q.shape[0] * heads if call.return_lse else 0),
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
    ragged = (70, 1, 5, 0, 6), (70, 33, 60, 7, 4)
    cases: tuple[tuple[int, int, int, int | None, int | None, dict[str, Any]], ...] = (
        (4, 2, 64, None, None, {"causal": False}),
        (4, 1, 64, None, 20, {}),
        (4, 2, 128, 16, None, {"causal": False, "return_lse": True}),
        (4, 2, 64, 64, None, {"softcap": 3.0}),
        (4, 2, 64, None, 33, {"sinks": True, "return_lse": True}),
        (4, 2, 64, 16, 33, {"sinks": True, "softcap": 3.0, "return_lse": True}),
        (4, 2, 128, 64, None, {"tails": (40, 0, 5, 0, 2)}),
        (8, 2, 64, 32, None, {"tails": (0, 1, 4, 0, 2), "return_lse": True}),
        (4, 2, 64, 16, 64, {"tails": (40, 1, 0, 0, 0), "sinks": True}),
        (4, 2, 64, None, 32, {"tails": (30, 1, 3, 0, 2)}),
        (3, 1, 64, 16, None, {"tails": (20, 9, 33, 0, 4)}),
        (4, 2, 64, 32, 64, {"tails": (3, 17, 5, 0, 0)}),
    )
    for heads, kv_heads, head_dim, size, limit, features in cases:
        yield attention_inputs(device, dtype, heads, kv_heads, head_dim, size, limit, *ragged, **features)


def attention_inputs(
    device: Any,
    dtype: torch.dtype,
    heads: int,
    kv_heads: int,
    head_dim: int,
    block: int | None,
    window: int | None,
    new: tuple[int, ...],
    visible: tuple[int, ...],
    *,
    causal: bool = True,
    softcap: float | None = None,
    sinks: bool = False,
    tails: tuple[int, ...] | None = None,
    return_lse: bool = False,
) -> Mapping[str, Any]:
    """Random arguments for `attention`, NaN wherever nobody may look.

    block: keys of a page (pages come in random order), or None for contiguous keys. tails: nodes of each
    request's tree, which is random too; of more nodes than rows, the last are the rows.
    """
    lows = tuple(_unseen(rows, length, window) for rows, length in zip(new, visible))
    layout = _pages(kv_heads, head_dim, block, visible, lows) if block else _rows(kv_heads, head_dim, visible, lows)
    starts = _starts(new)
    tree, trees = (None, ()) if tails is None else random_trees(new, tails)
    arguments = {
        "q": torch.randn(starts[-1], heads, head_dim).to(dtype),
        **{name: one.to(dtype) if one.is_floating_point() else one for name, one in layout.items()},
        "query_starts": torch.tensor(starts, dtype=torch.int32),
        "lengths": torch.tensor(visible, dtype=torch.int32),
        "sinks": torch.randn(heads) if sinks else None,
        "tree": tree,
        "tails": None if tails is None else torch.tensor(tails, dtype=torch.int32),
    }
    on_device = {name: None if one is None else one.to(device) for name, one in arguments.items()}
    return {
        "block_tables": None,
        **on_device,
        "spans": Spans(new, visible, trees),
        "scale": head_dim**-0.5,
        "window": window,
        "causal": causal,
        "softcap": softcap,
        "return_lse": return_lse,
    }


def _starts(counts: tuple[int, ...]) -> list[int]:
    starts = [0]
    for count in counts:
        starts.append(starts[-1] + count)
    return starts


def _unseen(rows: int, length: int, window: int | None) -> int:
    """How many of a request's first keys no row sees."""
    if not rows:
        return length
    return 0 if window is None else max(0, length - rows - window + 1)


def _pages(
    kv_heads: int, head_dim: int, block: int, visible: tuple[int, ...], lows: tuple[int, ...]
) -> dict[str, torch.Tensor]:
    """Keys and values in pages of random order; NaN before and behind what a request sees, and in pages of nobody."""
    needed = [-(-length // block) for length in visible]
    total = sum(needed) + 2
    order = torch.randperm(total)
    tables = torch.full((len(visible), max(needed) + 1), int(order[-1]), dtype=torch.int32)
    pages = [torch.full((total, kv_heads, block, head_dim), float("nan")) for _ in range(2)]
    used = 0
    for index, length in enumerate(visible):
        for place in range(needed[index]):
            page = int(order[used])
            used += 1
            tables[index, place] = page
            real = min(block, length - place * block)
            low = min(max(lows[index] - place * block, 0), real)
            for side in pages:
                side[page, :, low:real] = torch.randn(kv_heads, real - low, head_dim)
    return {"k": pages[0], "v": pages[1], "block_tables": tables}


def _rows(kv_heads: int, head_dim: int, visible: tuple[int, ...], lows: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Keys and values one after the other; NaN before what a request sees, and in three rows behind it."""
    starts = _starts(tuple(length + 3 for length in visible))
    k, v = (torch.full((starts[-1], kv_heads, head_dim), float("nan")) for _ in range(2))
    for start, length, low in zip(starts, visible, lows):
        for side in (k, v):
            side[start + low : start + length] = torch.randn(length - low, kv_heads, head_dim)
    return {"k": k, "v": v, "key_starts": torch.tensor(starts, dtype=torch.int32)}


def random_trees(new: tuple[int, ...], tails: tuple[int, ...]) -> tuple[torch.Tensor, tuple[tuple[int, ...], ...]]:
    """Ancestor bits [T, words] of a random tree for each request, and how many bits each node has (Spans.trees).

    Every bit that nobody may look at is set: rows before the tails, and bits past them.
    """
    words = max(1, -(-max(tails, default=0) // WORD_BITS))
    tree = torch.full((sum(new), words), -1, dtype=torch.int32)
    trees = []
    for start, rows, count in zip(_starts(new), new, tails):
        nodes: list[int] = []
        for node in range(count):
            parent = int(torch.randint(-1, node, ())) if node else -1
            nodes.append((nodes[parent] if parent >= 0 else 0) | 1 << node)
        for node, bits in enumerate(nodes):
            filled = bits | -1 << count
            for word in range(words if rows - count + node >= 0 else 0):
                part = filled >> WORD_BITS * word & 0xFFFFFFFF
                tree[start + rows - count + node, word] = part - (part >> 31 << 32)
        before = max(0, count - rows)  # nodes that were computed earlier
        trees.append(tuple(bits.bit_count() - before for bits in nodes[before:]))
    return tree, tuple(trees)
