"""Copying whole KV blocks, for copy-on-write; and single slots, when a draft tree's accepted path closes its ranks.

Knows pages. It must not know why something is copied.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from ridgeline.core.cost import Cost
from ridgeline.ops.op import Tolerance, cuda, op
from ridgeline.ops.weight import nbytes


@op("movement", by_rows=True, float32=Tolerance(0, 0), bfloat16=Tolerance(0, 0), float16=Tolerance(0, 0))
def kv_move(pages: Sequence[torch.Tensor], source: torch.Tensor, target: torch.Tensor) -> None:
    """Copy blocks source[i] -> target[i] in every pages tensor [blocks, Hk, block, D], in place.

    source, target: [N] int64 block numbers; no block is both a source and a target.
    """
    if source.device.type == "meta":
        return
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


@op("movement", by_rows=True, float32=Tolerance(0, 0), bfloat16=Tolerance(0, 0), float16=Tolerance(0, 0))
def kv_compact(pages: Sequence[torch.Tensor], source: torch.Tensor, target: torch.Tensor) -> None:
    """Copy slots source[i] -> target[i] in every pages tensor [blocks, Hk, block, D], in place.

    source, target: [N] int64, slot s being row s % block of block s // block; or [B, N], whose rows have nothing to
    do with each other and whose entries may be negative: those copy nothing. Targets differ, and none is the source of
    a later entry, so that one after the other and all at once are the same.
    """
    if source.device.type == "meta":
        return
    if source.dim() > 1:
        real = source >= 0
        source, target = source[real], target[real]
    for page in pages:
        block = page.shape[2]
        page[target // block, :, target % block] = page[source // block, :, source % block]


@kv_compact.cost
def _(pages: Sequence[torch.Tensor], source: torch.Tensor, target: torch.Tensor) -> Cost:
    """How many entries of several rows are real only the device knows: the floor counts none of them."""
    slot = sum(page.shape[1] * page.shape[3] * page.element_size() for page in pages)
    moved = slot * source.numel() if source.dim() == 1 else 0
    return Cost(read_bytes=moved + nbytes(source, target), write_bytes=moved, launches=len(pages))


@kv_compact.examples
def _(device: Any, dtype: torch.dtype) -> Iterator[Mapping[str, Any]]:
    for width, source, target in (
        (8, [35, 37, 80, 17], [34, 35, 36, 5]),
        (40, [35, 37, 80, 17], [34, 35, 36, 5]),
        (40, [[-1, 35, 37, -1], [-1] * 4, [3, 9, 2, 60]], [[-1, 34, 35, -1], [-1] * 4, [1, 3, 95, 59]]),
    ):
        yield {
            "pages": [torch.randn(6, 2, 16, width, device=device, dtype=dtype) for _ in range(3)],
            "source": torch.tensor(source, device=device),
            "target": torch.tensor(target, device=device),
        }


def _one_row(pages: Sequence[torch.Tensor], source: torch.Tensor, target: torch.Tensor) -> str | None:
    if source.dim() > 1:
        return "takes entries in one row: finding out which of several are real would wait for the device"
    return None


kv_compact.kernel("torch", needs=cuda(0), accepts=_one_row, invariant=True)(kv_compact.reference)
