"""`attention` in blocks, in plain torch: FlashAttention-2's order of work, to be read and to be tested against.

Knows every feature of the op. It must not know devices. Block by block of rows, keys pass by in blocks; of
the scores only one block exists at a time, so memory is linear in the sequence. State of a row: its peak m,
the sum l of exp(score - m), and the sum O of exp(score - m) * value, rescaled when the peak rises (Milakov
and Gimelshein, 1805.02867; Dao, "FlashAttention-2", 2307.08691, algorithm 1).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ridgeline.ops.attention import Attended, attention
from ridgeline.ops.attention_call import FEATURES, WORD_BITS, Call, Limits
from ridgeline.ops.op import anywhere

ROWS, KEYS = 128, 256
"""Rows and keys of a block: large enough that products, not Python, take the time on a CPU."""

LIMITS = Limits(
    "blocked",
    anywhere(),
    dtypes=(torch.float32, torch.bfloat16, torch.float16, torch.float64),
    head_dims=range(1, 1025),
    pages=range(1, 1025),
    features=frozenset(FEATURES),
)


@attention.kernel("blocked", needs=LIMITS.need, accepts=LIMITS.accepts)
def attention_blocked(*args: Any, **kwargs: Any) -> Attended:
    """Arguments of the op. Waits for the device: lengths are read on the host."""
    return blocked(LIMITS.require(*args, **kwargs), ROWS, KEYS)


def blocked(call: Call, block_rows: int, block_keys: int) -> Attended:
    """Attention in blocks of that many rows (tokens, all heads of each) and keys."""
    out = torch.empty_like(call.q, memory_format=torch.contiguous_format)
    lse = torch.empty(call.q.shape[:2], dtype=torch.float32, device=call.q.device)
    if call.q.device.type != "meta":
        for request in _requests(call):
            for row in range(0, request.rows, block_rows):
                rows = min(block_rows, request.rows - row)
                place = slice(request.first + row, request.first + row + rows)
                out[place], lse[place] = _row_block(call, request, row, rows, block_keys)
    return (out, lse) if call.return_lse else out


class _Request:
    """One request on the host. first: its first row in q; rows, keys, tail: how many it has of each."""

    def __init__(self, index: int, first: int, rows: int, keys: int, tail: int) -> None:
        self.index, self.first, self.rows, self.keys, self.tail = index, first, rows, keys, tail


def _requests(call: Call) -> Iterator[_Request]:
    starts, lengths = call.query_starts.tolist(), call.lengths.tolist()
    tails = [0] * len(lengths) if call.tails is None else call.tails.tolist()
    for index, (keys, tail) in enumerate(zip(lengths, tails)):
        if starts[index] < starts[index + 1]:
            yield _Request(index, starts[index], starts[index + 1] - starts[index], keys, tail)


def _row_block(
    call: Call, request: _Request, row: int, rows: int, block_keys: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows row .. row + rows of a request: output [rows, H, D] and logarithms [rows, H]."""
    q = call.q[request.first + row : request.first + row + rows]
    kind = torch.promote_types(q.dtype, torch.float32)
    kv_heads, head_dim = call.k.shape[1], q.shape[2]
    # Heads of a group become rows, so that each block of keys meets all that share it: [Hk, rows * group, D].
    query = q.view(rows, kv_heads, call.group, head_dim).permute(1, 0, 2, 3).reshape(kv_heads, -1, head_dim).to(kind)
    peak = torch.full(query.shape[:2], float("-inf"), dtype=kind, device=q.device)
    total, sums = torch.zeros_like(peak), torch.zeros_like(query)
    if call.sinks is not None:  # a key of weight one and value zero that every row sees first
        peak = call.sinks.to(kind).view(kv_heads, 1, call.group).expand(kv_heads, rows, call.group).flatten(1)
        total = torch.ones_like(peak)
    begin, end = _keys_in_sight(call, request, row, rows)
    for key in range(begin // block_keys * block_keys, end, block_keys):
        count = min(block_keys, request.keys - key)
        keys, values = (_keys(call, side, request, key, count).to(kind) for side in (call.k, call.v))
        seen = _mask(call, request, row, rows, key, count)
        scores = call.scale * (query @ keys.transpose(1, 2))
        if call.softcap is not None:
            scores = call.softcap * (scores / call.softcap).tanh()
        scores = scores.masked_fill(~seen.repeat_interleave(call.group, 0), float("-inf"))
        values = values.masked_fill(~seen.any(0)[:, None], 0.0)  # zero times NaN is NaN
        risen = torch.maximum(peak, scores.amax(2))
        base = risen.masked_fill(risen == float("-inf"), 0.0)  # nothing seen yet: -inf - -inf is NaN
        weights, shrink = (scores - base[:, :, None]).exp(), (peak - base).exp()
        total = total * shrink + weights.sum(2)
        sums = sums * shrink[:, :, None] + weights @ values
        peak = risen
    result = sums / total.masked_fill(total == 0, 1.0)[:, :, None]
    lse = peak + total.log()
    shape = (kv_heads, rows, call.group)
    return (
        result.view(*shape, head_dim).permute(1, 0, 2, 3).reshape(rows, -1, head_dim).to(q.dtype),
        lse.view(shape).permute(1, 0, 2).reshape(rows, -1).float(),
    )


def _keys_in_sight(call: Call, request: _Request, row: int, rows: int) -> tuple[int, int]:
    """A stretch of keys outside of which no row of the block sees any."""
    if not call.causal:
        return 0, request.keys
    first = request.keys - request.rows + row
    end = request.keys if row + rows > request.rows - request.tail else max(first + rows, 0)
    if call.window is None:
        return 0, end
    # A tree's rows stand no earlier than the last key before it, whatever their number.
    first = min(first, request.keys - request.tail - 1) if request.tail else first
    return max(first - call.window + 1, 0), end


def _mask(call: Call, request: _Request, row: int, rows: int, key: int, count: int) -> torch.Tensor:
    """Which of keys key .. key + count rows row .. row + rows see, [rows, count]."""
    device = call.q.device
    if not call.causal:
        return torch.ones(rows, count, dtype=torch.bool, device=device)
    column = torch.arange(key, key + count, device=device)[None, :]
    index = torch.arange(row, row + rows, device=device)[:, None]
    position = request.keys - request.rows + index
    seen = column <= position
    before = request.keys - request.tail  # the tail's first key
    if call.tree is not None and request.tail and row + rows > request.rows - request.tail:
        words = call.tree[request.first + row : request.first + row + rows]
        bit = torch.arange(request.tail, device=device)
        bits = (words[:, bit // WORD_BITS] >> bit % WORD_BITS) & 1
        node = index >= request.rows - request.tail
        position = torch.where(node, before + bits.sum(1, keepdim=True) - 1, position)
        of_tail = bits[:, (column[0] - before).clamp(min=0)].bool()
        seen = torch.where(node, (column < before) | of_tail, seen)
    if call.window is not None:
        seen &= (column > position - call.window) | (column >= before)
    return seen


def _keys(call: Call, side: torch.Tensor, request: _Request, key: int, count: int) -> torch.Tensor:
    """Keys (or values) key .. key + count of a request, [Hk, count, D]."""
    if call.block_tables is None:
        assert call.key_starts is not None
        first = int(call.key_starts[request.index]) + key
        return side[first : first + count].transpose(0, 1)
    size = side.shape[2]
    place = torch.arange(key, key + count, device=side.device)
    page = call.block_tables[request.index, place // size].long()
    return side[page, :, place % size].transpose(0, 1)
