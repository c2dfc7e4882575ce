"""FlashAttention's error rule, and calls of `attention` that kernels are held to it on.

The rule is ops/error_rule.py's, against fp32; with a softcap three times PyTorch's error, as flash-attention's tests.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from ridgeline.ops.attention import attention, attention_inputs, keys_of, seen
from ridgeline.ops.attention_call import Call
from ridgeline.ops.error_rule import allowed

RAGGED = ((1, 1), (113, 203), (799, 3), (1023, 1024), (0, 5), (239, 1), (64, 128), (128, 217), (3, 799), (1, 64))
"""(new rows, keys) of one batch: odd sizes, more queries than keys, a request without rows."""
TAILS = (1, 70, 0, 64, 0, 1, 33, 0, 3, 1)
FEATURES: Mapping[str, dict[str, Any]] = {
    "causal": {},
    "full": {"causal": False},
    "window": {"window": 100},
    "softcap": {"softcap": 15.0},
    "sinks": {"sinks": True},
    "tree": {"tails": TAILS},
    "all": {"window": 128, "softcap": 15.0, "sinks": True, "tails": TAILS},
}


def ragged(
    device: str, dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int, page: int | None, feature: str
) -> Mapping[str, Any]:
    """Arguments of a ragged call with one of FEATURES; logarithms are asked for."""
    more = dict(FEATURES[feature])
    window = more.pop("window", None)
    new, visible = (tuple(sizes) for sizes in zip(*RAGGED))
    return attention_inputs(
        device, dtype, heads, kv_heads, head_dim, page, window, new, visible, return_lse=True, **more
    )


def exact(arguments: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """The reference in fp32, logarithms too."""
    wide = {name: arguments[name].float() for name in ("q", "k", "v")}
    return attention.reference(**{**arguments, **wide, "return_lse": True})


def plain(arguments: Mapping[str, Any]) -> torch.Tensor:
    """Attention as one writes it in PyTorch, in the arguments' own dtype."""
    call = Call(**arguments)
    out = torch.zeros_like(call.q)
    starts, lengths = call.query_starts.tolist(), call.lengths.tolist()
    tails = [0] * len(lengths) if call.tails is None else call.tails.tolist()
    for index, length in enumerate(lengths):
        first, last = starts[index], starts[index + 1]
        if first == last:
            continue
        keys, values = (part.repeat_interleave(call.group, 0) for part in keys_of(call, index, length))
        mask = seen(call, first, last, length - tails[index], length)
        scores = (call.q[first:last].transpose(0, 1) * call.scale) @ keys.transpose(1, 2)
        if call.softcap is not None:
            scores = call.softcap * (scores / call.softcap).tanh()
        scores = scores.float().masked_fill(~mask, float("-inf"))
        total = scores.logsumexp(-1, keepdim=True)
        if call.sinks is not None:
            total = torch.logaddexp(total, call.sinks[:, None, None])
        weights = (scores - total.masked_fill(total == float("-inf"), 0.0)).exp().to(values.dtype)
        values = values.masked_fill(~mask.any(0)[None, :, None], 0.0)
        out[first:last] = (weights @ values).transpose(0, 1)
    return out


def poison(arguments: Mapping[str, Any]) -> None:
    """Leave NaN in the memory that the allocator hands out next."""
    q = arguments["q"]
    held = [torch.full_like(q, float("nan")) for _ in range(2)]
    held += [torch.full(q.shape[:2], float("nan"), device=q.device) for _ in range(2)]
    del held


def hold(kernel: Callable[..., Any], arguments: Mapping[str, Any]) -> None:
    """Run a kernel and hold it to the rule; logarithms to a thousandth."""
    wanted, wanted_lse = exact(arguments)
    dtype = arguments["q"].dtype
    most = allowed(wanted, plain(arguments), 2 if arguments["softcap"] is None else 3)
    poison(arguments)
    result = kernel(**arguments)
    out, lse = result if arguments["return_lse"] else (result, None)
    assert out.dtype == dtype
    assert out.shape == wanted.shape
    assert not out.isnan().any(), f"{int(out.isnan().sum())} of {out.numel()} are NaN"
    error = (out.float() - wanted).abs().max().item()
    assert error <= most, f"largest error {error:.2e}; {most:.2e} is allowed"
    if lse is not None:
        assert torch.equal(lse.isinf(), wanted_lse.isinf())
        difference = (lse - wanted_lse).masked_fill(wanted_lse.isinf(), 0.0).abs().max().item()
        assert difference <= 1e-3, f"logarithms differ by {difference:.2e}"
