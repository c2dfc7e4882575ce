"""accept and kv_compact: the reference's moves, and slots that one entry reads and a later one writes."""

import pytest
import torch

pytest.importorskip("triton")

from ridgeline.core.tree import ROOT, Sketch, TokenTree
from ridgeline.kernels.triton.accept import accept_triton
from ridgeline.kernels.triton.kv_compact import _accepts, kv_compact_triton
from ridgeline.ops.accept import accept, accept_inputs
from ridgeline.ops.kv_move import kv_compact


def drawn(nodes: int, tokens: int) -> TokenTree:
    sketch = Sketch()
    for _ in range(nodes):
        parent = int(torch.randint(-1, len(sketch), ())) if len(sketch) else ROOT
        sketch.add(int(torch.randint(tokens, ())), parent, 0.0)
    return sketch.tree()[0]


def test_moves_of_random_trees(device: str) -> None:
    moved = 0
    for size in (1, 3, 20, 33, 90) if device == "cpu" else (1, 3, 20, 33, 90, 256, 200, 64):
        trees: list[TokenTree | None] = [drawn(size, 3), None, drawn(size // 2 + 1, 2)]
        chosen = [torch.randint(3, (1 + (0 if one is None else len(one)),)).tolist() for one in trees]
        inputs = accept_inputs(device, trees, chosen, size % 3)
        got, want = accept_triton(**inputs), accept.reference(**inputs)
        for mine, its in zip(got, want):
            assert torch.equal(mine, its)
        moved += int((want[0] >= 0).sum())
    assert moved > 3


def test_more_nodes_than_bits_are_an_error(device: str) -> None:
    inputs = accept_inputs(device, [drawn(5, 9)], [[0] * 6])
    with pytest.raises(AssertionError, match="bit"):
        accept_triton(**{**inputs, "nodes": 40})


@pytest.mark.parametrize("shape", [(9, 2, 16, 8), (9, 3, 16, 40), (9, 8, 64, 128)])
def test_ranks_close(device: str, shape: tuple[int, ...]) -> None:
    """Each entry writes where the one before it has read: what comes first must not be lost."""
    for dtype in (torch.float32, torch.float16):
        pages = [torch.randn(shape, device=device).to(dtype) for _ in range(4)]
        want = [page.clone() for page in pages]
        block = shape[2]
        steps = torch.arange(12, device=device)
        source = torch.stack((3 + 2 * steps, 5 * block + 1 + steps, -torch.ones_like(steps)))
        target = torch.stack((1 + 2 * steps, 5 * block + steps, -torch.ones_like(steps)))
        source[0, 4] = target[0, 4] = -1
        kv_compact_triton(pages, source, target)
        kv_compact.reference(want, source, target)
        for mine, its in zip(pages, want):
            assert torch.equal(mine, its)
        kv_compact_triton(pages, source[1], target[1])
        kv_compact.reference(want, source[1], target[1])
        for mine, its in zip(pages, want):
            assert torch.equal(mine, its)
        kv_compact_triton(pages, source[2], target[2])
        assert torch.equal(pages[0], want[0])


def test_what_is_refused() -> None:
    pages = [torch.empty(4, 2, 16, 8, device="meta")]
    places = torch.empty(3, dtype=torch.int64, device="meta")
    assert _accepts(pages, places, places) is None
    assert "one shape" in str(_accepts([*pages, torch.empty(4, 2, 16, 16, device="meta")], places, places))
    assert "numbers a slot" in str(_accepts([torch.empty(4, 128, 16, 256, device="meta")], places, places))
    assert "neighbouring" in str(_accepts([pages[0].transpose(1, 3)], places, places))
