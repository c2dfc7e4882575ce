"""`feed` in one launch.

Knows rows of the last step. It must not know requests.
"""

import torch
import triton
import triton.language as tl

from ridgeline.kernels.triton.dependent import dependent, ready, starting
from ridgeline.ops.feed import feed
from ridgeline.ops.op import cuda

BLOCK = 256


@triton.jit(do_not_specialize=["tokens", "vocabulary"])
def _feed_kernel(
    ids: tl.tensor,
    sources: tl.tensor,
    sampled: tl.tensor,
    out: tl.tensor,
    tokens: tl.tensor,
    vocabulary: tl.tensor,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    starting(EARLY)
    ready(EARLY)
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < tokens
    source = tl.load(sources + place, mask=inside, other=-1)
    known = tl.load(ids + place, mask=inside, other=0)
    late = tl.load(sampled + source, mask=source >= 0, other=0)
    tl.store(out + place, tl.where(source < 0, known, tl.minimum(late, vocabulary - 1)), mask=inside)


@feed.kernel("triton", needs=cuda(80), invariant=True)
def feed_triton(ids: torch.Tensor, sources: torch.Tensor, sampled: torch.Tensor, vocabulary: int) -> torch.Tensor:
    out = torch.empty_like(ids)
    tokens = ids.shape[0]
    if tokens:
        _feed_kernel[(triton.cdiv(tokens, BLOCK),)](
            ids, sources, sampled, out, tokens, vocabulary, BLOCK=BLOCK, num_warps=2, **dependent(ids.device)
        )
    return out
