"""feed: ids of both origins, and what a row of NaN has chosen."""

import pytest
import torch

pytest.importorskip("triton")

from ridgeline.kernels.triton.feed import feed_triton
from ridgeline.ops.feed import feed


def test_against_reference(device: str) -> None:
    for tokens, rows in ((1, 1), (255, 7), (256, 7), (700, 256)):
        sampled = torch.randint(1001, (rows,), device=device)
        sampled[0] = 1000  # no token of a vocabulary of 1000
        sources = torch.randint(-rows, rows, (tokens,), device=device)
        ids = torch.randint(1000, (tokens,), device=device)
        ids[sources >= 0] = -1
        got = feed_triton(ids, sources, sampled, 1000)
        assert torch.equal(got, feed.reference(ids, sources, sampled, 1000))
        assert 0 <= int(got.min()) <= int(got.max()) < 1000
