"""Looking up rows of an embedding table, and of one of positions where a family learns them.

Knows the gather. It must not know what the ids mean.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F

from ridgeline.core.cost import Cost
from ridgeline.ops.op import Tolerance, cuda, op
from ridgeline.ops.weight import PANEL, Weight, nbytes


@op("movement", by_rows=True, float32=Tolerance(0, 0), bfloat16=Tolerance(0, 0), float16=Tolerance(0, 0))
def embed(
    ids: torch.Tensor, weight: Weight, positions: torch.Tensor | None = None, places: torch.Tensor | None = None
) -> torch.Tensor:
    """Rows `ids` of the table: ids [T] integers, weight [vocabulary, D] -> [T, D].

    A table in the "panels" format (shared with the output projection) is gathered as it lies. positions: [T]
    integers, and places [P, D]: rows `positions` of this second table are added.
    """
    if ids.device.type == "meta":
        return weight.data.new_empty(ids.shape[0], weight.in_features)
    if weight.format == "panels":
        rows = weight.data[ids // PANEL, :, ids % PANEL]
    else:
        rows = F.embedding(ids, weight.data)
    return rows if positions is None or places is None else rows + F.embedding(positions, places)


@embed.cost
def _(
    ids: torch.Tensor, weight: Weight, positions: torch.Tensor | None = None, places: torch.Tensor | None = None
) -> Cost:
    elements = ids.numel() * weight.in_features
    row_bytes = elements * weight.data.element_size()
    if positions is None:
        return Cost(read_bytes=nbytes(ids) + row_bytes, write_bytes=row_bytes)
    return Cost(flops=elements, read_bytes=nbytes(ids, positions) + 2 * row_bytes, write_bytes=row_bytes)


@embed.examples
def _(device: Any, dtype: torch.dtype) -> Iterator[Mapping[str, Any]]:
    for rows, width, tokens in ((10, 16, 1), (300, 96, 40)):
        yield {
            "ids": torch.randint(rows, (tokens,), device=device),
            "weight": Weight.dense_from(torch.randn(rows, width, device=device, dtype=dtype)),
        }
    for rows, width, tokens in ((10, 16, 1), (300, 100, 40), (50, 5000, 3)):
        yield {
            "ids": torch.randint(rows, (tokens,), device=device),
            "weight": Weight.dense_from(torch.randn(rows, width, device=device, dtype=dtype)),
            "positions": torch.randint(33, (tokens,), device=device),
            "places": torch.randn(35, width, device=device, dtype=dtype)[2:],
        }


embed.kernel("torch", needs=cuda(0), invariant=True)(embed.reference)
