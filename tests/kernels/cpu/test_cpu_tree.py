"""A node of a tree gets, to the bit, what a token appended behind its path alone would get."""

from __future__ import annotations

import pytest
import torch

from ridgeline.core.step import Spans
from ridgeline.core.tree import ROOT, Sketch, TokenTree
from ridgeline.kernels.cpu.attention import attention_cpu

HEADS, KV_HEADS = 4, 2


def bushy(nodes: int, seed: int) -> TokenTree:
    generator = torch.Generator().manual_seed(seed)
    sketch = Sketch()
    while len(sketch) < nodes:
        parent = int(torch.randint(-1, max(len(sketch), 1), (), generator=generator)) if len(sketch) else ROOT
        sketch.add(int(torch.randint(1000, (), generator=generator)), parent, 0.0)
    return sketch.tree()[0]


def attended(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, block: int, window: int | None, tree: TokenTree | None = None
) -> torch.Tensor:
    """One request: rows q [n, H, D] at the end of keys k, v [length, Hk, D], laid into pages of random order."""
    length, width = k.shape[0], k.shape[2]
    pages = -(-length // block)
    table = torch.randperm(pages, generator=torch.Generator().manual_seed(1)).int()
    held = []
    for side in (k, v):
        padded = torch.full((pages * block, KV_HEADS, width), float("nan"), dtype=side.dtype)
        padded[:length] = side
        page = torch.empty(pages, KV_HEADS, block, width, dtype=side.dtype)
        page[table.long()] = padded.view(pages, block, KV_HEADS, width).transpose(1, 2)
        held.append(page)
    rows = q.shape[0]
    more = {}
    trees: tuple[tuple[int, ...], ...] = ()
    if tree is not None:
        count = -(-len(tree) // 32)
        words = torch.zeros(rows, count, dtype=torch.int32)
        words[rows - len(tree) :] = torch.frombuffer(bytearray(tree.masks(4 * count)), dtype=torch.int32).view(
            -1, count
        )
        more = {"tree": words, "tails": torch.tensor([len(tree)], dtype=torch.int32)}
        trees = (tree.depths,)
    return attention_cpu(
        q,
        *held,
        table[None, :],
        torch.tensor([0, rows], dtype=torch.int32),
        torch.tensor([length], dtype=torch.int32),
        Spans((rows,), (length,), trees),
        0.2,
        window,
        **more,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("prefix", "nodes", "block", "window"), [
    (1, 7, 16, None), (29, 33, 16, None), (64, 1, 64, None), (250, 40, 32, None), (700, 12, 16, None), (90, 20, 64, 64),
    (300, 70, 16, 96), (31, 3, 24, None),
])  # fmt: skip
@pytest.mark.parametrize("width", [64, 40])
def test_a_path_is_a_sequence(
    dtype: torch.dtype, prefix: int, nodes: int, block: int, window: int | None, width: int
) -> None:
    torch.manual_seed(prefix)
    tree = bushy(nodes, prefix)
    new = min(prefix, 3)
    q = torch.randn(new + nodes, HEADS, width).to(dtype)
    k, v = (torch.randn(prefix + nodes, KV_HEADS, width).to(dtype) for _ in range(2))
    got = attended(q, k, v, block, window, tree)
    alone = attended(q[:new], k[:prefix], v[:prefix], block, window)
    assert torch.equal(got[:new], alone)
    for node in range(nodes):
        path = torch.tensor([*range(prefix), *(prefix + one for one in tree.path(node))])
        row = attended(q[new + node : new + node + 1], k[path], v[path], block, window)
        assert torch.equal(got[new + node], row[0]), f"node {node} of {tree}"
