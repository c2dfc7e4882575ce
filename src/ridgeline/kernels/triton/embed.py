"""`embed`, with learned positions or without, in one launch.

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
    row = tl.load(ids + token).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    found = tl.load(table + row * WIDTH + column, mask=inside)
    if positions is not None:
        place = tl.load(positions + token).to(tl.int64)
        where = tl.load(places + place * WIDTH + column, mask=inside)
        found = (found.to(tl.float32) + where.to(tl.float32)).to(found.dtype)
    tl.store(out + token * WIDTH + column, found, mask=inside)


def _accepts(
    ids: torch.Tensor, weight: Weight, positions: torch.Tensor | None = None, places: torch.Tensor | None = None
) -> str | None:
    if weight.format != "dense":
        return f"takes dense tables, not {weight.format}"
    if places is not None and places.dtype != weight.data.dtype:
        return f"takes tables of one dtype, not {weight.data.dtype} and {places.dtype}"
    return None


@embed.kernel("triton", needs=cuda(80), accepts=_accepts, invariant=True)
def embed_triton(
    ids: torch.Tensor, weight: Weight, positions: torch.Tensor | None = None, places: torch.Tensor | None = None
) -> torch.Tensor:
    if positions is None or places is None:
        positions = places = None
    data, width = weight.data, weight.in_features
    out = data.new_empty((ids.shape[0], width))
    if ids.shape[0]:
        _embed_kernel[(ids.shape[0], triton.cdiv(width, BLOCK))](
            ids, data, positions, places, out, WIDTH=width, BLOCK=BLOCK, **dependent(data.device)
        )
    return out
