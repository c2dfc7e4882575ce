"""`sample` on the CPU: argmax of logits, or of logits and noise, in pieces of the vocabulary.

Knows rows and their temperatures. A unit of work is a piece of one row; pieces are compared in order, so
ties go to the lowest id. A row with a NaN gets the id behind the vocabulary, as from the reference. Rows
that are cut (top-k, top-p, min-p) are done one by one, see code/cut.py.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from ridgeline.kernels.cpu.blocks import SAMPLE_TOKENS
from ridgeline.kernels.cpu.dtypes import HALF, other_dtype
from ridgeline.kernels.cpu.native import Kernel
from ridgeline.kernels.cpu.pool import POOL
from ridgeline.ops.op import cpu
from ridgeline.ops.sample import sample

best_pieces = Kernel("sample", "best_pieces")
best_of_pieces = Kernel("sample", "best_of_pieces")
cut_rows = Kernel("cut", "cut_rows")


def accepts(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    greedy: bool,
    cut: bool,
) -> str | None:
    return other_dtype(logits)


@sample.kernel("cpu", needs=cpu(), accepts=accepts, invariant=True)
def sample_cpu(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    greedy: bool,
    cut: bool,
) -> torch.Tensor:
    if not logits.is_contiguous():
        logits = logits.contiguous()
    rows, tokens = logits.shape
    out = seeds.new_empty((rows,), dtype=torch.int64)
    pieces = -(-tokens // SAMPLE_TOKENS)
    values, ids = torch.empty(rows * pieces), torch.empty(rows * pieces, dtype=torch.int64)
    run = POOL.small if rows * pieces == 1 else POOL.share
    cut = cut and not greedy
    limits = top_k.data_ptr(), top_p.data_ptr(), min_p.data_ptr()
    run(
        best_pieces, rows * pieces, logits.data_ptr(), temperature.data_ptr(), seeds.data_ptr(), positions.data_ptr(),
        values.data_ptr(), ids.data_ptr(), tokens, HALF[logits.dtype], int(greedy), int(cut), *limits,
    )  # fmt: skip
    POOL.small(best_of_pieces, rows, values.data_ptr(), ids.data_ptr(), out.data_ptr(), pieces, tokens)
    if cut:
        rooms = _rooms(tokens)
        POOL.share(
            cut_rows, rows, temperature.data_ptr(), *limits, seeds.data_ptr(), positions.data_ptr(), logits.data_ptr(),
            out.data_ptr(), tokens, HALF[logits.dtype], rooms.data_ptr(), POOL.scratch,
        )  # fmt: skip
    return out


@lru_cache(maxsize=1)
def _rooms(tokens: int) -> torch.Tensor:
    """Memory for `cut_rows`, kept because touching it anew takes longer than using it."""
    return torch.empty(POOL.workers, 3 * (-(-tokens // 16) * 16))
