"""Looking up rows of an embedding table.

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
def embed(ids: torch.Tensor, weight: Weight) -> torch.Tensor:
    """Rows `ids` of the table: ids [T] integers, weight [vocabulary, D] -> [T, D].

    A table in the "panels" format (shared with the output projection) is gathered as it lies.
    """
    if weight.format == "panels":
        return weight.data[ids // PANEL, :, ids % PANEL]
    return F.embedding(ids, weight.data)


@embed.cost
def _(ids: torch.Tensor, weight: Weight) -> Cost:
    row_bytes = weight.in_features * weight.data.element_size()
    return Cost(read_bytes=nbytes(ids) + ids.numel() * row_bytes, write_bytes=ids.numel() * row_bytes)


@embed.examples
def _(device: Any, dtype: torch.dtype) -> Iterator[Mapping[str, Any]]:
    for rows, width, tokens in ((10, 16, 1), (300, 96, 40)):
        yield {
            "ids": torch.randint(rows, (tokens,), device=device),
            "weight": Weight.dense_from(torch.randn(rows, width, device=device, dtype=dtype)),
        }


embed.kernel("torch", needs=cuda(0), invariant=True)(embed.reference)
