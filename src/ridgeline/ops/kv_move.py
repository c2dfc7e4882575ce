"""Copying whole KV blocks, for copy-on-write.

Knows pages. It must not know why a block is copied.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from ridgeline.core.cost import Cost
from ridgeline.ops.op import Tolerance, cuda, op


@op("movement", by_rows=True, float32=Tolerance(0, 0), bfloat16=Tolerance(0, 0), float16=Tolerance(0, 0))
def kv_move(pages: Sequence[torch.Tensor], source: torch.Tensor, target: torch.Tensor) -> None:
    """Copy blocks source[i] -> target[i] in every pages tensor [blocks, Hk, block, D], in place.

    source, target: [N] int64 block numbers; no block is both a source and a target.
    """
    for page in pages:
        page[target] = page[source]


@kv_move.cost
def _(pages: Sequence[torch.Tensor], source: torch.Tensor, target: torch.Tensor) -> Cost:
    moved = sum(page[0].numel() * page.element_size() for page in pages) * source.numel()
    return Cost(read_bytes=moved, write_bytes=moved, launches=len(pages))


@kv_move.examples
def _(device: Any, dtype: torch.dtype) -> Iterator[Mapping[str, Any]]:
    yield {
        "pages": [torch.randn(6, 2, 16, 8, device=device, dtype=dtype) for _ in range(3)],
        "source": torch.tensor([0, 4], device=device),
        "target": torch.tensor([5, 1], device=device),
    }


kv_move.kernel("torch", needs=cuda(0), invariant=True)(kv_move.reference)
