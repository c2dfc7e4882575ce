"""`embed` on the CPU: rows of a table, dense or in panels, and of a table of positions.

Knows both formats. From panels a row is gathered one element in 64, as it lies.
"""

from __future__ import annotations

import torch

from ridgeline.kernels.cpu.dtypes import HALF, other_dtype
from ridgeline.kernels.cpu.native import Kernel
from ridgeline.kernels.cpu.pool import POOL
from ridgeline.ops.embed import embed
from ridgeline.ops.op import cpu
from ridgeline.ops.weight import Weight

ALONE_ELEMENTS = 1 << 14

embed_rows = Kernel("embed", "embed_rows")


def _indices(ids: torch.Tensor) -> torch.Tensor:
    if ids.dtype != torch.int64:
        ids = ids.long()
    return ids if ids.is_contiguous() else ids.contiguous()


def accepts(
    ids: torch.Tensor, weight: Weight, positions: torch.Tensor | None = None, places: torch.Tensor | None = None
) -> str | None:
    if weight.format not in ("dense", "panels"):
        return f"takes dense tables or panels, not {weight.format}"
    if places is not None and not places.is_contiguous():
        return "takes contiguous tables of positions"
    return other_dtype(weight.data, places)


@embed.kernel("cpu", needs=cpu(), accepts=accepts, invariant=True)
def embed_cpu(
    ids: torch.Tensor, weight: Weight, positions: torch.Tensor | None = None, places: torch.Tensor | None = None
) -> torch.Tensor:
    ids = _indices(ids)
    data, width = weight.data, weight.in_features
    tokens = ids.shape[0]
    out = data.new_empty((tokens, width))
    second = (0, 0, 0)
    if positions is not None and places is not None:
        positions = _indices(positions)
        second = positions.data_ptr(), places.data_ptr(), places.shape[0]
    run = POOL.small if tokens * width <= ALONE_ELEMENTS else POOL.share
    run(
        embed_rows, tokens, ids.data_ptr(), data.data_ptr(), out.data_ptr(), width, weight.out_features,
        HALF[data.dtype], int(weight.format == "panels"), *second,
    )  # fmt: skip
    return out
