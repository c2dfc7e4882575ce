"""`propose` on the CPU: scores of a row side by side, their best taken out one after the other.

Knows rows. A unit of work is a row.
"""

from __future__ import annotations

import torch

from ridgeline.kernels.cpu.blocks import SCRATCH_BYTES
from ridgeline.kernels.cpu.dtypes import HALF, other_dtype
from ridgeline.kernels.cpu.native import Kernel
from ridgeline.kernels.cpu.pool import POOL
from ridgeline.ops.op import cpu
from ridgeline.ops.propose import propose

propose_rows = Kernel("propose", "propose_rows")

MOST_TOKENS = SCRATCH_BYTES // 8 - 256
"""Two numbers a token must fit into a worker's scratch memory."""


def accepts(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    greedy: bool,
    count: int,
) -> str | None:
    if logits.shape[1] > MOST_TOKENS:
        return f"takes up to {MOST_TOKENS} tokens, not {logits.shape[1]}"
    return other_dtype(logits)


@propose.kernel("cpu", needs=cpu(), accepts=accepts, invariant=True)
def propose_cpu(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    greedy: bool,
    count: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    if not logits.is_contiguous():
        logits = logits.contiguous()
    rows, tokens = logits.shape
    ids, chances = torch.empty(rows, count, dtype=torch.int64), torch.empty(rows, count)
    run = POOL.small if rows == 1 else POOL.share
    run(
        propose_rows, rows, logits.data_ptr(), temperature.data_ptr(), seeds.data_ptr(), positions.data_ptr(),
        ids.data_ptr(), chances.data_ptr(), tokens, HALF[logits.dtype], int(greedy), count,
    )  # fmt: skip
    return ids, chances
