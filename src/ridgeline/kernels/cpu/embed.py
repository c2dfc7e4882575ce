"""`embed` on the CPU: rows of a table, dense or in panels.

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


def accepts(ids: torch.Tensor, weight: Weight) -> str | None:
    if weight.format not in ("dense", "panels"):
        return f"takes dense tables or panels, not {weight.format}"
    return other_dtype(weight.data)


@embed.kernel("cpu", needs=cpu(), accepts=accepts, invariant=True)
def embed_cpu(ids: torch.Tensor, weight: Weight) -> torch.Tensor:
    if ids.dtype != torch.int64:
        ids = ids.long()
    if not ids.is_contiguous():
        ids = ids.contiguous()
    data, width = weight.data, weight.in_features
    tokens = ids.shape[0]
    out = data.new_empty((tokens, width))
    run = POOL.small if tokens * width <= ALONE_ELEMENTS else POOL.share
    run(
        embed_rows, tokens, ids.data_ptr(), data.data_ptr(), out.data_ptr(), width, weight.out_features,
        HALF[data.dtype], int(weight.format == "panels"),
    )  # fmt: skip
    return out
