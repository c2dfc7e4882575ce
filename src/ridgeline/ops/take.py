"""Some rows of a layer's output: those whose tokens are sampled or scored.

Knows the gather. It must not know why a row is wanted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from ridgeline.core.cost import Cost
from ridgeline.ops.op import Tolerance, cuda, op
from ridgeline.ops.weight import nbytes


@op("movement", by_rows=True, float32=Tolerance(0, 0), bfloat16=Tolerance(0, 0), float16=Tolerance(0, 0))
def take(x: torch.Tensor, residual: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same rows of both: x, residual [T, D], rows [R] int64 -> [R, D] each."""
    if x.device.type == "meta":
        return x.new_empty(rows.shape[0], x.shape[1]), residual.new_empty(rows.shape[0], residual.shape[1])
    return x.index_select(0, rows), residual.index_select(0, rows)


@take.cost
def _(x: torch.Tensor, residual: torch.Tensor, rows: torch.Tensor) -> Cost:
    taken = rows.numel() * (x.shape[1] * x.element_size() + residual.shape[1] * residual.element_size())
    return Cost(read_bytes=nbytes(rows) + taken, write_bytes=taken)


@take.examples
def _(device: Any, dtype: torch.dtype) -> Iterator[Mapping[str, Any]]:
    for tokens, width, rows in ((1, 16, 1), (40, 100, 7), (70, 5000, 3)):
        yield {
            "x": torch.randn(tokens, width, device=device, dtype=dtype),
            "residual": torch.randn(tokens, width, device=device, dtype=dtype),
            "rows": torch.randperm(tokens, device=device)[:rows],
        }


take.kernel("torch", needs=cuda(0), invariant=True)(take.reference)
