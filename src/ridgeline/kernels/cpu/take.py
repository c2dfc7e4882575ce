"""`take` on the CPU: whole rows, copied in one call.

Knows rows.
"""

from __future__ import annotations

import torch

from ridgeline.kernels.cpu.dtypes import other_dtype
from ridgeline.kernels.cpu.native import Kernel
from ridgeline.kernels.cpu.pool import POOL
from ridgeline.ops.op import cpu
from ridgeline.ops.take import take

take_rows = Kernel("take", "take_rows")


def accepts(x: torch.Tensor, residual: torch.Tensor, rows: torch.Tensor) -> str | None:
    if x.shape != residual.shape:
        return "takes two tensors of one shape"
    return other_dtype(x, residual)


@take.kernel("cpu", needs=cpu(), accepts=accepts, invariant=True)
def take_cpu(x: torch.Tensor, residual: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    rows, x, residual = rows.long().contiguous(), x.contiguous(), residual.contiguous()
    count, width = rows.shape[0], x.shape[1]
    taken, behind = x.new_empty((count, width)), x.new_empty((count, width))
    if count:
        POOL.small(
            take_rows, count, rows.data_ptr(), x.shape[0], width * x.element_size(), x.data_ptr(),
            residual.data_ptr(), taken.data_ptr(), behind.data_ptr(),
        )  # fmt: skip
    return taken, behind
