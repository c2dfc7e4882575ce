"""What the Triton kernels' tests share: paged inputs with poison in every place that must not be read,
attention in plain torch in any dtype, and the rule for how far a kernel may be from the exact result."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ridgeline.core.step import Spans
from ridgeline.ops.error_rule import allowed

HALVES = (torch.float16, torch.bfloat16)


def kinds(device: str) -> tuple[torch.dtype, ...]:
    """The dtypes to test on a device: NumPy, and so the interpreter, has no bfloat16."""
    return (torch.float32, torch.float16) if device == "cpu" else (torch.float32, torch.float16, torch.bfloat16)


def assert_near(got: torch.Tensor, exact: torch.Tensor, own: torch.Tensor) -> None:
    """By FlashAttention's rule (ops/error_rule.py), own being torch's result in got's dtype."""
    assert got.dtype == own.dtype
    assert not got.isnan().any()
    error, most = (got.double() - exact.double()).abs().max().item() if got.numel() else 0.0, allowed(exact, own)
    assert error <= most, f"error {error:.3g}, allowed {most:.3g}"


def paged(
    device: str,
    dtype: torch.dtype,
    heads: int,
    kv_heads: int,
    head_dim: int,
    block: int,
    spans: list[tuple[int, int]],
    window: int | None = None,
    spare_blocks: int = 0,
) -> dict[str, Any]:
    """Arguments for `attention` with (rows, keys) a request.

    NaN stands behind the last key of every request, in pages of nobody, and in the page that unused
    table entries name: those past the end, and those before anything that the window lets a row see.
    """
    new, visible = tuple(s[0] for s in spans), tuple(s[1] for s in spans)
    needed = [-(-keys // block) for keys in visible]
    total = sum(needed) + 2
    order = torch.randperm(total)
    nobody = int(order[-1])
    width = max([*needed, 1]) + 1 + spare_blocks
    tables = torch.full((len(spans), width), nobody, dtype=torch.int32)
    pages = [torch.full((total, kv_heads, block, head_dim), float("nan"), dtype=dtype) for _ in range(2)]
    used = 0
    for index, (rows, keys) in enumerate(spans):
        mine = order[used : used + needed[index]]
        used += needed[index]
        low = 0 if window is None else max(0, keys - rows - window + 1)
        for place, page in enumerate(mine.tolist()):
            if (place + 1) * block <= low:
                continue
            tables[index, place] = page
            real = min(block, keys - place * block)
            for side in pages:
                side[page, :, :real] = torch.randn(kv_heads, real, head_dim).to(dtype)
    starts = [0]
    for rows in new:
        starts.append(starts[-1] + rows)
    return {
        "q": torch.randn(starts[-1], heads, head_dim).to(dtype).to(device),
        "k": pages[0].to(device),
        "v": pages[1].to(device),
        "block_tables": tables.to(device),
        "query_starts": torch.tensor(starts, dtype=torch.int32, device=device),
        "lengths": torch.tensor(visible, dtype=torch.int32, device=device),
        "spans": Spans(new, visible),
        "scale": head_dim**-0.5,
        "window": window,
    }


def plain_attention(inputs: Mapping[str, Any], dtype: torch.dtype) -> torch.Tensor:
    """Attention with every operation in `dtype`; rows that see nothing give zeros."""
    q, window = inputs["q"].to(dtype), inputs["window"]
    block = inputs["k"].shape[2]
    group = q.shape[1] // inputs["k"].shape[1]
    out = torch.zeros_like(q)
    starts, lengths = inputs["query_starts"].tolist(), inputs["lengths"].tolist()
    for index, length in enumerate(lengths):
        first, last = starts[index], starts[index + 1]
        if first == last:
            continue
        table = inputs["block_tables"][index, : -(-length // block)].long()
        keys, values = (
            inputs[name][table].transpose(0, 1).flatten(1, 2)[:, :length].to(dtype).repeat_interleave(group, 0)
            for name in ("k", "v")
        )
        row = torch.arange(length - (last - first), length, device=q.device)[:, None]
        column = torch.arange(length, device=q.device)[None, :]
        hidden = column > row
        if window is not None:
            hidden |= column <= row - window
        unread = hidden.all(0)  # whatever no row sees may be poison
        scores = inputs["scale"] * (q[first:last].transpose(0, 1) @ keys.transpose(1, 2))
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        weights = weights.masked_fill(hidden.all(1)[:, None], 0.0)
        values = values.masked_fill(unread[None, :, None], 0.0)
        out[first:last] = (weights @ values).transpose(0, 1)
    return out


def check_attention(call: Any, inputs: Mapping[str, Any]) -> torch.Tensor:
    got = call(**inputs)
    exact = plain_attention(inputs, torch.float64)
    assert_near(got, exact, plain_attention(inputs, inputs["q"].dtype))
    return got


def plain_product(a: Any, b: Any, dtype: Any = None) -> Any:
    """NumPy's product sums a row in an order that depends on where it stands; tensor cores do not."""
    return (a[..., :, :, None].astype(dtype) * b[..., None, :, :].astype(dtype)).sum(-2, dtype=dtype)
