"""Token trees: layout, masks, pruning, merging, and the walk of verification."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ridgeline.core.errors import InvalidArgument
from ridgeline.core.tree import MOST_NODES, ROOT, Sketch, TokenTree, merged


@st.composite
def sketches(draw: st.DrawFn) -> Sketch:
    """Any tree, nodes in any order that puts parents first, scores falling along paths."""
    sketch = Sketch()
    for _ in range(draw(st.integers(0, 40))):
        parent = draw(st.integers(ROOT, len(sketch) - 1))
        above = 1.0 if parent == ROOT else sketch.scores[parent]
        token = draw(st.integers(0, 6))
        if (parent, token) not in sketch._found:
            sketch.add(token, parent, above * draw(st.floats(0.01, 1.0)))
    return sketch


@st.composite
def trees(draw: st.DrawFn) -> TokenTree:
    return draw(sketches()).tree()[0]


def paths(tree: TokenTree) -> set[tuple[int, ...]]:
    return {tuple(tree.path_tokens(node)) for node in range(len(tree))}


@given(sketches())
def test_a_layout_keeps_every_path_and_puts_the_best_child_first(sketch: Sketch) -> None:
    tree, order = sketch.tree()
    assert sorted(order) == list(range(len(sketch)))
    for node, old in enumerate(order):
        assert tree.tokens[node] == sketch.tokens[old]
        assert tree.depths[node] == sketch.depths[old] == len(tree.path(node))
    for node in range(ROOT, len(tree)):
        scores = [sketch.scores[order[child]] for child in tree.children(node)]
        assert scores == sorted(scores, reverse=True)


@given(trees())
def test_ancestors_are_the_path_and_subtrees_are_ranges(tree: TokenTree) -> None:
    for node in range(len(tree)):
        mask = tree.ancestors[node]
        assert {bit for bit in range(len(tree)) if mask >> bit & 1} == set(tree.path(node))
        below = [other for other in range(len(tree)) if node in tree.path(other)]
        assert below == list(range(node, node + len(below)))
        assert int.from_bytes(tree.masks(8)[8 * node : 8 * node + 8], "little") == mask
    assert len(tree.masks(8)) == 8 * len(tree)
    assert tree.positions(10) == [10 + len(tree.path(node)) for node in range(len(tree))]


@given(trees(), st.data())
def test_the_walk_follows_what_was_chosen(tree: TokenTree, data: st.DataObject) -> None:
    chosen = data.draw(st.lists(st.integers(0, 6), min_size=len(tree) + 1, max_size=len(tree) + 1))
    at, accepted = ROOT, []
    while True:
        following = [child for child in tree.children(at) if tree.tokens[child] == chosen[at + 1]]
        if not following:
            break
        (at,) = following
        accepted.append(at)
    assert tree.walk(chosen) == accepted


@given(sketches(), st.integers(0, 50))
def test_pruning_to_a_budget_keeps_the_best_and_stays_a_tree(sketch: Sketch, budget: int) -> None:
    best = sketch.best(budget)
    tree, _ = sketch.tree(best)
    assert len(tree) == min(budget, len(sketch))
    left = set(range(len(sketch))) - set(best)
    assert max((sketch.scores[n] for n in left), default=0) <= min((sketch.scores[n] for n in best), default=1)


@given(trees(), st.integers(0, 50), st.integers(0, 8))
def test_a_cut_looks_at_places_alone(tree: TokenTree, nodes: int, depth: int) -> None:
    cut = tree.within(nodes, depth)
    assert len(cut) == min(nodes, sum(one <= depth for one in tree.depths))
    assert paths(cut) <= paths(tree)


@given(st.lists(trees(), max_size=3))
def test_merging_is_the_union_of_paths(several: list[TokenTree]) -> None:
    assert paths(merged(several)) == set().union(*map(paths, several))


def test_a_chain_is_a_tree_of_width_one() -> None:
    tree = TokenTree.chain([5, 6, 5])
    assert tree.parents == (ROOT, 0, 1)
    assert tree.ancestors == (0b1, 0b11, 0b111)
    assert tree.is_chain
    assert tree.walk([5, 6, 4, 9]) == [0, 1]
    assert TokenTree((), ()).is_chain
    assert not TokenTree((1, 2), (ROOT, ROOT)).is_chain


@pytest.mark.parametrize(
    ("tokens", "parents", "what"),
    [
        ((1, 2), (ROOT,), "2 tokens and 1 parents"),
        ((1,), (0,), "no node before it"),
        ((1,), (-2,), "no node before it"),
        ((1, 2, 3), (ROOT, ROOT, 0), "depth-first"),
        ((1, 1), (ROOT, ROOT), "sibling"),
        ((-1,), (ROOT,), "token -1"),
        (range(MOST_NODES + 1), range(ROOT, MOST_NODES), "may have 256"),
    ],
)
def test_what_is_no_tree_is_refused(tokens: tuple[int, ...], parents: tuple[int, ...], what: str) -> None:
    with pytest.raises(InvalidArgument, match=what):
        TokenTree(tokens, parents)


def test_a_node_is_not_kept_without_its_parent() -> None:
    tree = TokenTree.chain([1, 2])
    with pytest.raises(InvalidArgument, match="without its parent"):
        tree.keep([1])
    sketch = Sketch()
    sketch.add(2, sketch.add(1, ROOT, 0.5), 0.5)
    with pytest.raises(InvalidArgument, match="without its parent"):
        sketch.tree([1])
    with pytest.raises(ValueError, match="cannot rise"):
        sketch.add(3, 1, 0.6)
