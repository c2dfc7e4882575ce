"""`attention` as Algorithm 0, which the EE451 report calls standard: scores and probabilities written to memory.

Knows every feature of the op, in plain PyTorch. It must not know how to be fast: three products and passes over
[heads, rows, keys] matrices of the tensors' own dtype are what FlashAttention is measured against. Requests of
equal shape go together in one batch, as one writes it for a batch of sequences.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from ridgeline.ops.attention import Attended, attention, seen
from ridgeline.ops.attention_call import FEATURES, Call, Limits
from ridgeline.ops.op import anywhere

LIMITS = Limits(
    "standard",
    anywhere(),
    dtypes=(torch.float32, torch.bfloat16, torch.float16, torch.float64),
    head_dims=range(1, 1025),
    pages=range(1, 1025),
    features=frozenset(FEATURES),
)


@attention.kernel("standard", needs=LIMITS.need, accepts=LIMITS.accepts)
def attention_standard(*args: Any, **kwargs: Any) -> Attended:
    """Arguments of the op. Waits for the device: lengths are read on the host, so it refuses to be captured."""
    call = LIMITS.require(*args, **kwargs)
    q = call.q
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    if q.device.type != "meta":
        for rows, length, tail, members in _alike(call):
            _batch(call, rows, length, tail, members, out, lse)
    return (out, lse) if call.return_lse else out


def dense(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    hidden: torch.Tensor | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    lse: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Algorithm 0 on q [B, H, n, D], k and v [B, H, m, D]: O, and with `lse` the logarithms of sums [B, H, n].

    hidden: [n, m], what is not seen. sinks: [H] logits without a value. Nothing here waits for the device.
    """
    scores = scale * (q @ k.transpose(-2, -1))  # line 1
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    if hidden is not None:
        scores = scores.masked_fill(hidden, float("-inf"))
    if sinks is not None:
        column = sinks.to(scores.dtype)[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, column], -1)
    weights = scores.softmax(-1)  # line 2
    if hidden is not None and sinks is None:
        weights = weights.masked_fill(hidden, 0.0)  # a row that sees nothing has no softmax
    logs = scores.to(torch.promote_types(scores.dtype, torch.float32)).logsumexp(-1) if lse else None
    return weights[..., : k.shape[2]] @ v, logs  # line 3


def _alike(call: Call) -> Iterator[tuple[int, int, int, list[int]]]:
    """(rows, keys, tree's keys, requests) of requests that go together; trees go alone."""
    starts, lengths = call.query_starts.tolist(), call.lengths.tolist()
    tails = [0] * len(lengths) if call.tails is None else call.tails.tolist()
    groups: dict[tuple[int, int, int, int], list[int]] = {}
    for index, (length, tail) in enumerate(zip(lengths, tails)):
        rows = starts[index + 1] - starts[index]
        if rows > 0:
            groups.setdefault((rows, length, tail, index if tail else -1), []).append(index)
    for (rows, length, tail, _), members in groups.items():
        yield rows, length, tail, members


def _batch(
    call: Call, rows: int, length: int, tail: int, members: Sequence[int], out: torch.Tensor, lse: torch.Tensor
) -> None:
    """Requests `members`, each of `rows` rows and `length` keys."""
    device = call.q.device
    which = torch.tensor(members, device=device)
    row = call.query_starts[which].long()[:, None] + torch.arange(rows, device=device)
    hidden = None
    if call.causal:
        first = int(row[0, 0]) if tail else 0
        hidden = ~seen(call, first, first + rows, length - tail, length)
    keys, values = (_sides(call, side, which, length) for side in (call.k, call.v))
    if hidden is not None and length:
        values = values.masked_fill(hidden.all(0)[:, None], 0.0)  # zero times NaN is NaN
    result, logs = dense(
        call.q[row].transpose(1, 2), keys, values, call.scale, hidden, call.softcap, call.sinks, call.return_lse
    )
    out[row] = result.transpose(1, 2)
    if logs is not None:
        lse[row] = logs.transpose(1, 2).float()


def _sides(call: Call, side: torch.Tensor, which: torch.Tensor, length: int) -> torch.Tensor:
    """Keys or values of requests `which`, [B, H, length, D]: each KV head once for every query head of its group."""
    place = torch.arange(length, device=side.device)
    if call.block_tables is None:
        assert call.key_starts is not None
        found = side[call.key_starts[which].long()[:, None] + place]  # [B, length, Hk, D]
    else:
        page = call.block_tables[which][:, place // side.shape[2]].long()
        found = side[page, :, place % side.shape[2]]
    return found.transpose(1, 2).repeat_interleave(call.group, 1)
