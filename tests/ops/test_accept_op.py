"""The op `accept` walks trees as TokenTree.walk does, and its moves put what was accepted where it belongs."""

from __future__ import annotations

import pytest
import torch

from ridgeline.core.tree import ROOT, Sketch, TokenTree
from ridgeline.ops.accept import accept, accept_inputs


def drawn(nodes: int, tokens: int, generator: torch.Generator) -> TokenTree:
    """A random tree with up to `nodes` nodes of few different tokens, so that many walks go deep."""

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    sketch = Sketch()
    for _ in range(nodes):
        sketch.add(number(0, tokens), number(-1, len(sketch)) if len(sketch) else ROOT, 0.0)
    return sketch.tree()[0]


@pytest.mark.parametrize("room", [0, 7])
@pytest.mark.parametrize("seed", range(12))
def test_the_same_nodes_as_the_walk(seed: int, room: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    trees: list[TokenTree | None] = [drawn(1 + 7 * n * n, 3, generator) for n in range(4)]
    trees[1 + seed % 2] = None
    chosen = [
        torch.randint(3, (1 + (0 if tree is None else len(tree)),), generator=generator).tolist() for tree in trees
    ]
    inputs = accept_inputs("cpu", trees, chosen, room)
    source, target = accept(**inputs)
    slots = inputs["slots"].tolist()
    first = 0
    deepest = 0
    for request, (tree, tokens) in enumerate(zip(trees, chosen)):
        nodes = [] if tree is None else tree.walk(tokens)
        moves = {
            depth: (slots[first + 1 + node], slots[first + 1 + depth])
            for depth, node in enumerate(nodes)
            if node != depth
        }
        for column in range(inputs["nodes"]):
            found = int(source[request, column]), int(target[request, column])
            assert found == moves.get(column, (-1, -1))
        first += len(tokens)
        deepest = max(deepest, len(nodes))
    assert deepest > 0 or seed


def test_a_right_node_behind_a_wrong_one_is_not_accepted() -> None:
    tree = TokenTree((5, 6, 7), (ROOT, 0, ROOT))
    inputs = accept_inputs("cpu", [tree], [[7, 6, 0, 0]])  # the root's 7; behind 5 it would be 6
    source, target = accept(**inputs)
    slots = inputs["slots"].tolist()
    assert source.tolist() == [[slots[3], -1, -1]]
    assert target.tolist() == [[slots[1], -1, -1]]


def test_a_path_that_lies_where_it_belongs_does_not_move() -> None:
    source, target = accept(**accept_inputs("cpu", [TokenTree.chain((5, 6, 7))], [[5, 6, 9, 9]]))
    assert source.tolist() == target.tolist() == [[-1, -1, -1]]
