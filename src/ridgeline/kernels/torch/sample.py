"""The sampling ops on a GPU as their references compute them: none of these waits for the device.

Knows that a reference made of torch calls is a kernel too, and which of torch's sums depend on what else a call
holds. It must not know how `sample` is fused (kernels/triton/sample.py does that).

torch adds up a row in an order that follows from where the row begins in memory (softmax) and from how many rows
there are (cumsum). Where a row's bits must not depend on that, weights are added up as integers: those give the
same sum in any order. One unit is 2^-40 of the likeliest token's weight.
"""

from __future__ import annotations

import torch

from ridgeline.ops.op import cuda
from ridgeline.ops.sample import adjust, sample, score

UNITS = 1 << 40
"""Of the likeliest token's weight; 2^22 such weights fit in an int64."""


def weights_of(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """exp(logit - the row's highest) of rows [R, V]: as fp32, and as integers of 1 / UNITS."""
    weights = torch.exp(logits - logits.amax(-1, keepdim=True))
    return weights, (weights.double() * UNITS).round().long()


def kept_steadily(scaled: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor) -> torch.Tensor:
    """`ops.sample.kept`, batch-invariant: a row's mask does not depend on the other rows."""
    ordered, order = scaled.sort(dim=-1, descending=True, stable=True)
    ranks = torch.arange(scaled.shape[-1], device=scaled.device)[None, :]
    keep = ranks < torch.where(top_k > 0, top_k, scaled.shape[-1])[:, None]
    weights, units = weights_of(ordered)
    units = units.masked_fill(~keep, 0)
    before = units.cumsum(-1) - units
    total = units.sum(-1, keepdim=True)
    # (A row that asks for no cut keeps tokens of no weight too, as it does among rows of its kind.)
    keep &= (before.double() < top_p[:, None].double() * total.double()) | (ranks == 0) | (top_p[:, None] >= 1)
    keep &= weights >= min_p[:, None]
    return torch.zeros_like(keep).scatter(-1, order, keep)


def score_steadily(
    logits: torch.Tensor, tokens: torch.Tensor, alternatives: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`score`, batch-invariant; of equally likely tokens the lower id comes first."""
    wide = logits.float()
    _, units = weights_of(wide)
    total = torch.log(units.sum(-1, keepdim=True).double() / UNITS)
    logs = ((wide - wide.amax(-1, keepdim=True)).double() - total).float()
    chosen = logs.gather(-1, tokens[:, None])
    ranks = (logs > chosen).sum(-1) + 1
    # Numbers whose order is that of the logarithms, and no two of them equal.
    bits = logs.view(torch.int32).long()
    rising = torch.where(bits < 0, -(bits & 0x7FFFFFFF), bits)
    ids = torch.arange(logs.shape[-1], device=logs.device)
    best = (rising * (1 << 32) - ids).topk(alternatives, dim=-1).indices
    return chosen[:, 0], ranks, logs.gather(-1, best), best


sample.kernel("torch", needs=cuda(0))(sample.reference)
adjust.kernel("torch", needs=cuda(0), invariant=True)(adjust.reference)
score.kernel("torch", needs=cuda(0), invariant=score_steadily)(score.reference)
