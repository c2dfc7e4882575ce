"""Handing sampled tokens to the next step on the device, before the host has read them.

Knows which row of the last step holds a token. It must not know requests.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from ridgeline.core.cost import Cost
from ridgeline.ops.op import Tolerance, cuda, op
from ridgeline.ops.weight import nbytes


@op("movement", by_rows=True, float32=Tolerance(0, 0))
def feed(ids: torch.Tensor, sources: torch.Tensor, sampled: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """Token ids with those filled in that were sampled a step ago.

    ids: [T] int64; sources: [T] int64, the row of `sampled` that holds a token's id, negative where `ids` does;
    sampled: [S] int64, S >= 1. Returns [T] int64. What `sample` answers for a row of NaN (`vocabulary`, which is
    no token) becomes the last token, so that the step under way reads nothing out of bounds: the host refuses
    both once it reads the first.
    """
    if ids.device.type == "meta":
        return ids.new_empty(ids.shape)
    late = sampled[sources.clamp(min=0)].clamp(max=vocabulary - 1)
    return torch.where(sources < 0, ids, late)


@feed.cost
def _(ids: torch.Tensor, sources: torch.Tensor, sampled: torch.Tensor, vocabulary: int) -> Cost:
    return Cost(read_bytes=nbytes(sources, ids), write_bytes=nbytes(ids))


@feed.examples
def _(device: Any, dtype: torch.dtype) -> Iterator[Mapping[str, Any]]:
    for tokens, rows in ((1, 1), (5, 3), (1500, 40)):
        sources = torch.randint(-rows, rows, (tokens,), device=device)
        yield {
            "ids": torch.randint(100, (tokens,), device=device),
            "sources": sources,
            "sampled": torch.randint(101, (rows,), device=device),
            "vocabulary": 100,
        }


feed.kernel("torch", needs=cuda(0), invariant=True)(feed.reference)
