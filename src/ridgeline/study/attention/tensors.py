"""Random tensors for a case, and what the right answer for some of their rows is.

Knows the op's arguments. It must not know kernels: a rung gets a Call, a peer gets views of the same memory.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ridgeline.core.step import Spans
from ridgeline.ops import REGISTRY
from ridgeline.ops.attention_call import Call
from ridgeline.ops.error_rule import slack
from ridgeline.study.attention.cases import Case

CHECKED_ROWS = 48
"""Rows of the first and of the last request that are compared with fp32."""


def make(case: Case, device: torch.device, seed: int = 0) -> Call:
    """A call with normal random q, k, v; pages lie in random order. `spans` holds the same lengths."""
    generator = torch.Generator(device).manual_seed(seed)
    dtype = getattr(torch, case.dtype)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device, dtype=dtype, generator=generator)

    def starts(count: int) -> torch.Tensor:
        return torch.arange(0, (case.batch + 1) * count, count, device=device, dtype=torch.int32)

    if case.page is None:
        shape: tuple[int, ...] = (case.batch * case.visible, case.kv_heads, case.head_dim)
        tables, key_starts = None, starts(case.visible)
    else:
        width = -(-case.visible // case.page)
        shape = (case.batch * width, case.kv_heads, case.page, case.head_dim)
        order = torch.randperm(case.batch * width, device=device, generator=generator)
        tables, key_starts = order.to(torch.int32).reshape(case.batch, width), None
    return Call(
        q=normal(case.batch * case.new, case.heads, case.head_dim),
        k=normal(*shape),
        v=normal(*shape),
        block_tables=tables,
        query_starts=starts(case.new),
        lengths=torch.full((case.batch,), case.visible, device=device, dtype=torch.int32),
        spans=case.spans,
        scale=case.head_dim**-0.5,
        key_starts=key_starts,
        causal=case.causal,
    )


def shapes(case: Case) -> Call:
    """The same call on meta tensors, for kernels' `accepts` and for counted bytes."""
    dtype, meta = getattr(torch, case.dtype), torch.device("meta")

    def empty(*shape: int, of: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.empty(*shape, device=meta, dtype=of)

    paged = case.page is not None
    width = -(-case.visible // (case.page or case.visible))
    keys = (
        empty(case.batch * width, case.kv_heads, case.page, case.head_dim, of=dtype)
        if case.page is not None
        else empty(case.batch * case.visible, case.kv_heads, case.head_dim, of=dtype)
    )
    return Call(
        q=empty(case.batch * case.new, case.heads, case.head_dim, of=dtype),
        k=keys,
        v=keys,
        block_tables=empty(case.batch, width) if paged else None,
        query_starts=empty(case.batch + 1),
        lengths=empty(case.batch),
        spans=Spans((case.new,) * case.batch, (case.visible,) * case.batch),
        scale=case.head_dim**-0.5,
        key_starts=None if paged else empty(case.batch + 1),
        causal=case.causal,
    )


class Errors(NamedTuple):
    """Largest errors against fp64: a contestant's, plain PyTorch's in the same dtype, and what FlashAttention's rule
    allows (ops/error_rule.py; its second term in fp32 is the op's tolerance, that of other orders of summation)."""

    worst: float
    plain: float
    allowed: float

    @property
    def wrong(self) -> bool:
        return not self.worst <= self.allowed


def error_of(case: Case, call: Call, out: torch.Tensor) -> Errors:
    """Largest error of `out` ([T, H, D]) over checked rows against fp64, beside that of plain PyTorch's rounding.

    The latter is FlashAttention's yardstick: attention of the same rows in the case's dtype, its operators one by
    one. Rows are spread over the first and the last request.
    """
    dtype = call.q.dtype
    worst, plain = 0.0, 0.0
    room = REGISTRY["attention"].tolerance["float32"].absolute if dtype == torch.float32 else 0.0
    for request in {0, case.batch - 1}:
        keys, values = keys_of(case, call, request)
        rows = torch.linspace(0, case.new - 1, min(CHECKED_ROWS, case.new), device=out.device).long()
        places = request * case.new + rows
        exact = _attend(case, call, places, rows, keys, values, torch.float64)
        rounded = _attend(case, call, places, rows, keys, values, dtype)
        worst = max(worst, (out[places].double() - exact).abs().max().item())
        plain = max(plain, (rounded.double() - exact).abs().max().item())
        if dtype != torch.float32:
            room = max(room, slack(exact, dtype))
        if not torch.isfinite(out[places]).all():
            worst = float("inf")
            break
    return Errors(worst, plain, 2 * plain + room)


def keys_of(case: Case, call: Call, request: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of one request, [Hk, visible, D]."""
    if call.block_tables is None:
        part = slice(request * case.visible, (request + 1) * case.visible)
        return call.k[part].transpose(0, 1), call.v[part].transpose(0, 1)
    table = call.block_tables[request].long()
    k, v = (pages[table].transpose(0, 1).flatten(1, 2)[:, : case.visible] for pages in (call.k, call.v))
    return k, v


def _attend(
    case: Case,
    call: Call,
    places: torch.Tensor,
    rows: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Some rows of one request in `dtype`, [rows, H, D], a KV head at a time."""
    group = case.heads // case.kv_heads
    position = case.visible - case.new + rows
    hidden = torch.arange(case.visible, device=rows.device)[None, :] > position[:, None]
    out = torch.empty(len(rows), case.heads, case.head_dim, device=rows.device, dtype=dtype)
    for head in range(case.kv_heads):
        own = slice(head * group, (head + 1) * group)
        query = call.q[places, own].to(dtype).flatten(0, 1)
        scores = call.scale * (query @ keys[head].to(dtype).T)
        if case.causal:
            scores = scores.masked_fill(hidden.repeat_interleave(group, 0), float("-inf"))
        out[:, own] = (scores.softmax(-1) @ values[head].to(dtype)).unflatten(0, (len(rows), group))
    return out
