"""From what a drafter proposes behind the nodes of one level of its trees to the next level's rows, on the device.

Knows chances, ancestor bits and slots. It must not know models, nor what becomes of a tree. Each request has a beam:
its likeliest nodes of a level are the rows of the next pass. They lie in slots one level after the other, so a pass
computes no node twice, and nothing waits for the host until the last level is done.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from ridgeline.core.cost import Cost
from ridgeline.ops.attention_call import WORD_BITS
from ridgeline.ops.op import Tolerance, cuda, op
from ridgeline.ops.weight import nbytes


@op("movement", by_rows=True, float32=Tolerance(0, 0))
def branch(
    proposed: torch.Tensor,
    chances: torch.Tensor,
    above: torch.Tensor,
    tree: torch.Tensor,
    ids: torch.Tensor,
    positions: torch.Tensor,
    following: torch.Tensor,
    slots: torch.Tensor,
    lengths: torch.Tensor,
    tails: torch.Tensor,
    record: torch.Tensor,
    levels: torch.Tensor,
    starts: torch.Tensor,
    tables: torch.Tensor,
    odds: torch.Tensor,
    edges: torch.Tensor,
    widths: torch.Tensor,
    block_size: int,
) -> None:
    """Choose each request's next rows among the children of its present ones, in place.

    proposed, chances: [B * n, W] int64 and fp32, children behind each of n <= beam rows a request, with the drafter's
    probabilities; rank r of the W counts only if r < widths[level]: [levels] int32.
    odds: [W, C] fp32, the chance that a child of a rank and a class of probability (edges: [C - 1] fp32, ascending;
    an edge belongs to the class above it) is accepted behind its parent; above: [B, beam] fp32, that of the rows'
    own paths, 0 where there is no row. A child's score is the product; of equals the first counts as better.
    starts: [B] int32, known tokens of each request, whose drafts lie in the slots behind them (tables: [B, width]
    int32); negative: padding. levels: [B] int32, from 0.

    Written: record[levels[b], b], [beam, 2 W + 1] int32 (proposed, chances as bits, and the place among the n * W of
    each chosen child, or -1); of the chosen ones above, tree [B * beam, words] int32 (bits of the path, over all nodes
    chosen so far), ids, positions, following (positions + 1), slots (-1: padding), [B * beam] int64 each; lengths and
    tails, [B] int32, of the next pass; and levels, one more.
    """
    if proposed.device.type == "meta":
        return
    requests, beam = above.shape
    width, words = proposed.shape[1], tree.shape[1]
    rows = proposed.shape[0] // requests
    at, device = levels.long(), proposed.device
    rank = torch.arange(width, device=device)
    chance = odds[rank, torch.bucketize(chances, edges, right=True)].view(requests, rows, width)
    some = rank < widths[at.clamp(max=widths.shape[0] - 1)][:, None, None]
    scores = torch.where(some, above[:, :rows, None] * chance, 0.0).flatten(1)
    scores = torch.nn.functional.pad(scores, (0, max(0, beam - rows * width)))
    best = scores.sort(dim=1, descending=True, stable=True)
    value, place = best.values[:, :beam], best.indices[:, :beam]
    real = value > 0
    chosen = torch.where(real, place, -1)
    record[at, torch.arange(requests, device=device)] = _recorded(
        proposed.view(requests, rows, width), chances.view(requests, rows, width), chosen
    )
    place = torch.where(real, place, 0)
    own = at[:, None] * beam + torch.arange(beam, device=device)
    path = tree.view(requests, beam, words).gather(1, (place // width)[:, :, None].expand(-1, -1, words))
    bit = (own[:, :, None] // WORD_BITS == torch.arange(words, device=device)).long() << (own % WORD_BITS)[:, :, None]
    tree.copy_((torch.where(real[:, :, None], path, 0) | bit.to(torch.int32)).view(-1, words))
    there, known = starts[:, None] >= 0, starts.long()[:, None]
    ids.copy_(torch.where(real, proposed.view(requests, -1).gather(1, place), 0).flatten())
    positions.copy_(torch.where(there, known + at[:, None], 0).expand(-1, beam).flatten())
    following.copy_(torch.where(there.expand(-1, beam).flatten(), positions + 1, 0))
    slot = known + own
    block = tables.long().gather(1, (slot // block_size).clamp(0, tables.shape[1] - 1))
    slots.copy_(torch.where(there, block * block_size + slot % block_size, -1).flatten())
    tails.copy_(torch.where(starts >= 0, (levels + 1) * beam, 0))
    lengths.copy_(torch.where(starts >= 0, starts + tails, 0))
    above.copy_(value)
    levels += 1


def _recorded(proposed: torch.Tensor, chances: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """[requests, beam, 2 W + 1] int32 from [requests, rows, W] and [requests, beam]."""
    requests, rows, width = proposed.shape
    cells = proposed.new_zeros(requests, chosen.shape[1], 2 * width + 1, dtype=torch.int32)
    cells[:, :rows, :width] = proposed.to(torch.int32)
    cells[:, :rows, width:-1] = chances.contiguous().view(torch.int32)
    cells[:, :, -1] = chosen.to(torch.int32)
    return cells


@branch.cost
def _(
    proposed: torch.Tensor,
    chances: torch.Tensor,
    above: torch.Tensor,
    tree: torch.Tensor,
    ids: torch.Tensor,
    positions: torch.Tensor,
    following: torch.Tensor,
    slots: torch.Tensor,
    lengths: torch.Tensor,
    tails: torch.Tensor,
    record: torch.Tensor,
    levels: torch.Tensor,
    starts: torch.Tensor,
    tables: torch.Tensor,
    odds: torch.Tensor,
    edges: torch.Tensor,
    widths: torch.Tensor,
    block_size: int,
) -> Cost:
    """Of a table one entry a row is read, of the odds one a child."""
    moved = nbytes(above, tree)
    rows = nbytes(ids, positions, following, slots, lengths, tails)
    return Cost(
        flops=proposed.numel(),
        read_bytes=nbytes(proposed, chances, levels, starts) + moved + 4 * ids.numel() + 4 * proposed.numel(),
        write_bytes=moved + rows + nbytes(record[0], levels),
    )


@branch.examples
def _(device: Any, dtype: torch.dtype) -> Iterator[Mapping[str, Any]]:
    for requests, rows, beam, width, level in ((1, 1, 8, 4, 0), (3, 4, 4, 4, 3), (5, 1, 1, 1, 2), (2, 8, 8, 4, 7)):
        words, depth, block_size = -(-beam * 9 // WORD_BITS), 9, 16
        above = torch.rand(requests, beam) * 0.9 + 0.05
        above[:, rows:] = 0.0
        above[-1, rows // 2 + 1 :] = 0.0
        starts = torch.randint(1, 90, (requests,), dtype=torch.int32)
        if requests > 2:
            starts[1] = -1
        chances = torch.rand(requests * rows, width)
        chances[0, 0] = 0.5  # an edge itself
        arguments: dict[str, Any] = {
            "proposed": torch.randint(0, 5000, (requests * rows, width)),
            "chances": chances,
            "above": above,
            "tree": torch.randint(-(1 << 31), 1 << 31, (requests * beam, words)).to(torch.int32),
            **{name: torch.randint(0, 99, (requests * beam,)) for name in ("ids", "positions", "following", "slots")},
            "lengths": torch.zeros(requests, dtype=torch.int32),
            "tails": torch.zeros(requests, dtype=torch.int32),
            "record": torch.full((depth, requests, beam, 2 * width + 1), -7, dtype=torch.int32),
            "levels": torch.full((requests,), level, dtype=torch.int32),
            "starts": starts,
            "tables": torch.randint(0, 50, (requests, 12), dtype=torch.int32),
            "odds": torch.rand(width, 4),
            "edges": torch.tensor([0.1, 0.5, 0.9]),
            "widths": torch.tensor([4, 4, 2, 1, 3, 3, 3, 2, 2], dtype=torch.int32),
        }
        yield {**{name: one.to(device) for name, one in arguments.items()}, "block_size": block_size}


branch.kernel("torch", needs=cuda(0), invariant=True)(branch.reference)
