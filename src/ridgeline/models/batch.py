"""What a forward pass receives: the host part (plain integers) and the device part (tensors).

Knows shapes. It must not know requests or how tensors are filled (run/prepare.py does that).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ridgeline.core.step import Spans
from ridgeline.ops.attention_call import WORD_BITS


@dataclass(slots=True)
class Batch:
    """One step's input. T tokens of B requests, laid one after the other.

    Host part. spans: lengths for cost alone; kind: class of work ("decode", "prefill", "mixed", "tree").
    Device part, all that kernels read. ids, positions, slots: [T] int64; block_tables: [B, blocks]
    int32; query_starts: [B + 1] int32; lengths: [B] int32. rows: [R] int64, the tokens whose logits
    are wanted, or None if all T are, in order. tree: [T, words] int32 and tails: [B] int32, the trees that are
    verified, as the op `attention` takes them; None if there are none.
    """

    spans: Spans
    kind: str
    ids: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    block_tables: torch.Tensor
    query_starts: torch.Tensor
    lengths: torch.Tensor
    rows: torch.Tensor | None
    tree: torch.Tensor | None = None
    tails: torch.Tensor | None = None


def meta_batch(spans: Spans, rows: int, block_size: int, kind: str) -> Batch:
    """A batch of meta tensors with these lengths: enough to cost a step, with no data behind it."""
    tokens, requests = sum(spans.new), len(spans.new)
    blocks = max(-(-length // block_size) for length in spans.visible)
    words = max(1, -(-max(map(len, spans.trees), default=0) // WORD_BITS))

    def empty(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    return Batch(
        spans=spans,
        kind=kind,
        ids=empty(tokens),
        positions=empty(tokens),
        slots=empty(tokens),
        block_tables=empty(requests, blocks, dtype=torch.int32),
        query_starts=empty(requests + 1, dtype=torch.int32),
        lengths=empty(requests, dtype=torch.int32),
        rows=None if rows == tokens else empty(rows),
        tree=empty(tokens, words, dtype=torch.int32) if spans.trees else None,
        tails=empty(requests, dtype=torch.int32) if spans.trees else None,
    )
