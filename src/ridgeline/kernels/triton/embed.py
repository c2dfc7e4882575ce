"""`embed` with learned positions: both tables in one launch. A table alone is torch's own gather.

Knows rows of tables. It must not know what they mean.
"""

import torch
import triton
import triton.language as tl

from ridgeline.kernels.triton.dependent import dependent, ready, starting
from ridgeline.ops.embed import embed
from ridgeline.ops.op import cuda
from ridgeline.ops.weight import Weight

BLOCK = 1024


@triton.jit
def _embed_kernel(
    ids: tl.tensor,
    table: tl.tensor,
    positions: tl.tensor,
    places: tl.tensor,
    out: tl.tensor,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    starting(EARLY)
    ready(EARLY)
    token = tl.program_id(0).to(tl.int64)
    row, place = tl.load(ids + token).to(tl.int64), tl.load(positions + token).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    meaning = tl.load(table + row * WIDTH + column, mask=inside)
    where = tl.load(places + place * WIDTH + column, mask=inside)
    total = (meaning.to(tl.float32) + where.to(tl.float32)).to(meaning.dtype)
    tl.store(out + token * WIDTH + column, total, mask=inside)


def _accepts(
    ids: torch.Tensor, weight: Weight, positions: torch.Tensor | None = None, places: torch.Tensor | None = None
) -> str | None:
    if positions is None or places is None:
        return "adds learned positions; a table alone is torch's own gather"
    if weight.format != "dense":
        return f"takes dense tables, not {weight.format}"
    if places.dtype != weight.data.dtype:
        return f"takes tables of one dtype, not {weight.data.dtype} and {places.dtype}"
    return None


@embed.kernel("triton", needs=cuda(80), accepts=_accepts, invariant=True)
def embed_triton(
    ids: torch.Tensor, weight: Weight, positions: torch.Tensor | None = None, places: torch.Tensor | None = None
) -> torch.Tensor:
    assert positions is not None
    assert places is not None
    data, width = weight.data, weight.in_features
    out = data.new_empty((ids.shape[0], width))
    if ids.shape[0]:
        _embed_kernel[(ids.shape[0], triton.cdiv(width, BLOCK))](
            ids, data, positions, places, out, WIDTH=width, BLOCK=BLOCK, **dependent(data.device)
        )
    return out
