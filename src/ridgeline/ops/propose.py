"""The best few tokens of each row for a draft, by the same noise that will choose.

Knows logits and per-row settings. It must not know trees or who drafts.

A drafter that proposes the best of log q + G, with the noise G of ops/sample.py at the same (seed, position), meets
the target's argmax(log p + G) more often than an independent draw from q does, and leaves its law alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from ridgeline.core.cost import Cost
from ridgeline.ops.op import Tolerance, cuda, op
from ridgeline.ops.sample import gumbel
from ridgeline.ops.weight import nbytes


@op("elementwise", float32=Tolerance(1e-6, 1e-4), bfloat16=Tolerance(1e-6, 1e-4), float16=Tolerance(1e-6, 1e-4))
def propose(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    greedy: bool,
    count: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The `count` best tokens of each row, best first, and the drafter's probability of each.

    logits: [R, V]; temperature (0: greedy, probabilities then at 1): [R] fp32; seeds, positions: [R] int64.
    greedy: every row is. Returns [R, count] int64 and [R, count] fp32. Rows with a NaN give anything within the
    vocabulary.
    """
    if logits.device.type == "meta":
        rows = logits.shape[0]
        return seeds.new_empty(rows, count), temperature.new_empty(rows, count)
    wide = logits.float()
    cold = (temperature == 0)[:, None]
    scaled = wide / torch.where(cold, 1.0, temperature[:, None])
    scores = scaled
    if not greedy:
        scores = torch.where(cold, scaled, scaled + gumbel(seeds, positions, logits.shape[1]))
    tokens = scores.topk(count, dim=-1).indices
    return tokens, scaled.softmax(-1).gather(-1, tokens)


@propose.cost
def _(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    greedy: bool,
    count: int,
) -> Cost:
    rows = logits.shape[0]
    return Cost(
        flops=logits.numel() * (4 if greedy else 12),
        read_bytes=nbytes(logits, temperature) + (nbytes() if greedy else nbytes(seeds, positions)),
        write_bytes=12 * rows * count,
    )


@propose.examples
def _(device: Any, dtype: torch.dtype) -> Iterator[Mapping[str, Any]]:
    for rows, tokens, greedy, count in ((1, 50, True, 1), (5, 1003, False, 4), (3, 4096, False, 16)):
        # Distinct values, so that which tokens are best does not depend on the order of equals.
        logits = torch.stack([torch.randperm(tokens) for _ in range(rows)]) * (16 / tokens)
        if dtype is not torch.float32:
            logits = torch.stack([torch.randperm(200)[torch.arange(tokens) % 200] for _ in range(rows)]) / 8.0
            logits[:, 200:] = -8.0
        yield {
            "logits": logits.to(device=device, dtype=dtype),
            "temperature": torch.tensor([0.0, 1.0, 0.7, 1.5, 0.3][:rows], device=device),
            "seeds": torch.randint(-(1 << 62), 1 << 62, (rows,), device=device),
            "positions": torch.randint(1 << 20, (rows,), device=device),
            "greedy": greedy,
            "count": count,
        }


propose.kernel("torch", needs=cuda(0))(propose.reference)
