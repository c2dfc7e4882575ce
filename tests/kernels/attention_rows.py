"""Stretches of the rows of a call of `attention`, as another call: a step cut otherwise, or with other neighbours.

Knows the op's arguments. It must not know kernels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ridgeline.core.step import Spans


def rows_of(inputs: Mapping[str, Any], parts: list[tuple[int, int, int]]) -> dict[str, Any]:
    """A batch of stretches of the rows of one-request-each `inputs`: (request, first row, last row + 1)."""
    starts, lengths = inputs["query_starts"].tolist(), inputs["lengths"].tolist()
    new, visible, places = [], [], []
    for request, first, last in parts:
        rows = starts[request + 1] - starts[request]
        new.append(last - first)
        visible.append(lengths[request] - rows + last)
        places.append(torch.arange(starts[request] + first, starts[request] + last))
    device = inputs["q"].device
    chosen = torch.tensor([request for request, _, _ in parts])
    bounds = torch.tensor([0, *new]).cumsum(0)
    return {
        **inputs,
        "q": inputs["q"][torch.cat(places).to(device)],
        "block_tables": inputs["block_tables"][chosen.to(device)],
        "query_starts": bounds.to(device, torch.int32),
        "lengths": torch.tensor(visible, dtype=torch.int32, device=device),
        "spans": Spans(tuple(new), tuple(visible)),
    }
