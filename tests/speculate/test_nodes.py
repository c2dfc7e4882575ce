"""Nodes in arrays: what a sketch, node by node, makes of the same levels."""

from __future__ import annotations

from bisect import bisect_right

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ridgeline.core.tree import ROOT, Sketch, TokenTree
from ridgeline.run.beams import Levels
from ridgeline.speculate.acceptance import EDGES
from ridgeline.speculate.nodes import arranged, scored

ODDS = [[0.05 + 0.09 * kind - 0.01 * rank for kind in range(len(EDGES) + 1)] for rank in range(4)]


def drafted(seed: int, depth: int, requests: int, beam: int, children: int, widths: list[int]) -> Levels:
    """Levels as a device would leave them: a row of the next level is some child that counts, or nobody."""
    draw = np.random.default_rng(seed)
    shape = (depth, requests, beam, children)
    chances = np.sort(draw.random(shape, dtype=np.float32), axis=3)[..., ::-1]
    chances[draw.random(shape) < 0.2] = np.float32(EDGES[4])  # just at an edge
    tokens = draw.permuted(np.broadcast_to(np.arange(50, dtype=np.int32), (*shape[:3], 50)), axis=3)[..., :children]
    chosen = np.full((depth, requests, beam), -1, np.int32)
    for request in range(requests):
        rows = 1
        for level in range(depth):
            there = [row * children + rank for row in range(rows) for rank in range(min(widths[level], children))]
            rows = int(draw.integers(0, min(beam, len(there)) + 1)) if there else 0
            chosen[level, request, :rows] = draw.permutation(there)[:rows]
    return Levels(tokens, chances, chosen)


def sketched(levels: Levels, request: int, widths: list[int], depth: int) -> Sketch:
    """One request's nodes, one after the other."""
    sketch, rows = Sketch(), [ROOT]
    children = levels.tokens.shape[3]
    for level, width in enumerate(widths[:depth]):
        made = {}
        for row, parent in enumerate(rows):
            for rank in range(min(width, children)):
                chance = float(levels.chances[level, request, row, rank])
                above = 1.0 if parent == ROOT else sketch.scores[parent]
                score = above * ODDS[rank][bisect_right(EDGES, chance)]
                token = int(levels.tokens[level, request, row, rank])
                made[row * children + rank] = sketch.add(token, parent, score)
        rows = [made[place] for place in levels.chosen[level, request].tolist() if place >= 0]
    return sketch


@given(st.integers(0, 1 << 30), st.integers(1, 5), st.integers(1, 4), st.integers(1, 3), st.integers(1, 4), st.data())
def test_as_a_sketch_has_them(
    seed: int, depth: int, requests: int, beam: int, children: int, data: st.DataObject
) -> None:
    widths = data.draw(st.lists(st.integers(1, 4), min_size=depth, max_size=depth))
    depths = data.draw(st.lists(st.integers(1, depth), min_size=requests, max_size=requests))
    most = data.draw(st.lists(st.integers(0, 20), min_size=requests, max_size=requests))
    levels = drafted(seed, depth, requests, beam, children, widths)
    nodes = scored(levels, widths, depths, ODDS)
    order, scores = nodes.best(most)
    for request in range(requests):
        sketch = sketched(levels, request, widths, depths[request])
        count = int((scores[request] > 0).sum())
        assert count == min(most[request], len(sketch))
        assert scores[request, :count] == pytest.approx([sketch.scores[node] for node in sketch.best(count)], rel=1e-12)
        kept = order[request, :count]
        place = {ROOT: ROOT, **{node: at for at, node in enumerate(kept.tolist())}}
        tree, which = arranged(
            nodes.tokens[request, kept].tolist(), [place[one] for one in nodes.parents[request, kept].tolist()]
        )
        expected, theirs = sketch.tree(sketch.best(count))
        assert tree == expected
        assert [scores[request, one] for one in which] == pytest.approx([sketch.scores[one] for one in theirs])
        for one, node in zip(which, range(len(tree))):
            assert 0 <= nodes.ranks[kept[one]] < children
            parent = tree.parents[node]
            above = 1.0 if parent == ROOT else scores[request, which[parent]]
            rank, chance = nodes.ranks[kept[one]], float(nodes.chances[request, kept[one]])
            assert scores[request, one] == pytest.approx(above * ODDS[rank][bisect_right(EDGES, chance)])


def test_the_likeliest_child_comes_first() -> None:
    """Depth first, and of siblings in the order in which they are given."""
    tree, order = arranged([5, 6, 7, 8, 9], [ROOT, 0, ROOT, 0, 2])
    assert tree == TokenTree([5, 6, 8, 7, 9], [ROOT, 0, 0, ROOT, 3])
    assert order == [0, 1, 3, 2, 4]
    chain, order = arranged([5, 6, 7], [ROOT, 0, 1])
    assert (chain, list(order)) == (TokenTree([5, 6, 7], [ROOT, 0, 1]), [0, 1, 2])
    tree, order = arranged([], [])
    assert (tree, list(order)) == (TokenTree([], []), [])
