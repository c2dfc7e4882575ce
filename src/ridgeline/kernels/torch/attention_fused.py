"""`attention` through torch's fused kernel for CPUs (what scaled_dot_product_attention calls there).

Knows how to put the op's features together from two calls that return logarithms: the keys that all rows
see, without a mask, and the square of the last rows and keys, causal or with a tree's mask; and a merge. It
must not know how torch computes. Pages are gathered first: torch's kernel reads keys of even strides.
"""

from __future__ import annotations

from typing import Any

import torch

from ridgeline.ops.attention import Attended, attention, keys_of, seen
from ridgeline.ops.attention_call import Call, Limits
from ridgeline.ops.op import cpu

LIMITS = Limits(
    "fused",
    cpu(),
    dtypes=(torch.float32, torch.bfloat16, torch.float16),
    head_dims=range(1, 513),
    pages=range(1, 1025),
    features=frozenset({"paged", "contiguous", "full", "sinks", "tree", "lse"}),
)


@attention.kernel("fused", needs=LIMITS.need, accepts=LIMITS.accepts)
def attention_fused(*args: Any, **kwargs: Any) -> Attended:
    """Arguments of the op."""
    call = LIMITS.require(*args, **kwargs)
    out = torch.empty_like(call.q, memory_format=torch.contiguous_format)
    lse = torch.empty(call.q.shape[:2], dtype=torch.float32)
    starts, lengths = call.query_starts.tolist(), call.lengths.tolist()
    tails = lengths if call.tails is None else [n - tail for n, tail in zip(lengths, call.tails.tolist())]
    for index, length in enumerate(lengths):
        first, last = starts[index], starts[index + 1]
        if first < last:
            _request(call, index, first, last, tails[index], length, out, lse)
    return (out, lse) if call.return_lse else out


def _request(
    call: Call, index: int, first: int, last: int, tail: int, length: int, out: torch.Tensor, lse: torch.Tensor
) -> None:
    """Rows first .. last of one request, written to out and lse. tail: its first tree key."""
    blind = max(last - first - length, 0) if call.causal else 0
    if not length:
        blind = last - first
    out[first : first + blind], lse[first : first + blind] = 0.0, float("-inf")
    first += blind
    if first < last:
        keys, values = keys_of(call, index, length)
        rows = call.q[first:last].transpose(0, 1)
        common = min(length - (last - first), tail) if call.causal else length
        parts = []
        if common:
            parts.append(_fused(rows, keys[:, :common], values[:, :common], call.scale, False, None))
        if common < length:
            mask = seen(call, first, last, tail, length)[:, common:] if tail < length else None
            parts.append(_fused(rows, keys[:, common:], values[:, common:], call.scale, mask is None, mask))
        merged, logs = parts[0] if len(parts) == 1 else _merge(*parts)
        out[first:last], lse[first:last] = merged.transpose(0, 1), logs.transpose(0, 1)
    if call.sinks is not None:
        place = slice(first - blind, last)
        whole = torch.logaddexp(lse[place], call.sinks)
        out[place] *= (lse[place] - whole).exp()[:, :, None].to(out.dtype)
        lse[place] = whole


Part = tuple[torch.Tensor, torch.Tensor]
"""Of some keys: output [H, rows, D] and logarithms [H, rows]."""


def _fused(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, causal: bool, mask: torch.Tensor | None
) -> Part:
    bias = None if mask is None else torch.zeros(mask.shape, dtype=q.dtype).masked_fill(~mask, float("-inf"))
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q[None], k[None], v[None], 0.0, causal, attn_mask=None if bias is None else bias[None, None], scale=scale
    )
    if mask is None:
        return out[0], lse[0]
    return out[0], lse[0].masked_fill(~mask.any(1), float("-inf"))  # torch says 0 of rows that see nothing


def _merge(one: Part, other: Part) -> Part:
    """Two parts of the same rows over different keys: weights are exp(own logarithm - common one)."""
    whole = torch.logaddexp(one[1], other[1])
    level = whole.masked_fill(whole == float("-inf"), 0.0)
    weights = [(part[1] - level).exp()[:, :, None] for part in (one, other)]
    return (weights[0] * one[0].float() + weights[1] * other[0].float()).to(one[0].dtype), whole
