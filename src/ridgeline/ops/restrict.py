"""Leaving out the tokens that a grammar does not allow.

Knows bitmasks. It must not know grammars: whoever owns one fills its bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from ridgeline.core.cost import Cost
from ridgeline.ops.op import Tolerance, cuda, op
from ridgeline.ops.weight import nbytes

WORD = 32


@op("elementwise", by_rows=True, float32=Tolerance(0, 0), bfloat16=Tolerance(0, 0), float16=Tolerance(0, 0))
def restrict(logits: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
    """Logits, -inf where a token is not allowed, as a new tensor of the same dtype.

    logits: [R, V]; allowed: [R, W] int32, 32 * W >= V: token v may be chosen if bit v % 32 of word v // 32 is set.
    """
    if logits.device.type == "meta":
        return logits.new_empty(logits.shape)
    tokens = torch.arange(logits.shape[1], device=logits.device)
    bits = (allowed[:, tokens // WORD] >> (tokens % WORD)) & 1
    return logits.masked_fill(bits == 0, float("-inf"))


@restrict.cost
def _(logits: torch.Tensor, allowed: torch.Tensor) -> Cost:
    return Cost(flops=logits.numel(), read_bytes=nbytes(logits, allowed), write_bytes=nbytes(logits))


@restrict.examples
def _(device: Any, dtype: torch.dtype) -> Iterator[Mapping[str, Any]]:
    for rows, tokens, words in ((1, 7, 1), (5, 1000, 33)):
        yield {
            "logits": torch.randn(rows, tokens, device=device, dtype=dtype),
            "allowed": torch.randint(-(1 << 31), 1 << 31, (rows, words), device=device, dtype=torch.int32),
        }


restrict.kernel("torch", needs=cuda(0), invariant=True)(restrict.reference)
