"""How large trees are made: the likeliest nodes, and the most tokens a second."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ridgeline.speculate.tree_size import Shape, choose_sizes, likeliest

CHANCES = st.lists(st.lists(st.floats(0.01, 0.9), min_size=2, max_size=2), min_size=3, max_size=3)
"""By depth and rank."""


def shape_of(chances: Sequence[Sequence[float]], most: int) -> Shape:
    return likeliest(lambda depth, rank: chances[depth - 1][rank], len(chances[0]), len(chances), most)


def every_value(chances: Sequence[Sequence[float]]) -> list[float]:
    """The chance of every node of the whole tree, largest first."""
    values = []
    for depth in range(1, len(chances) + 1):
        for path in itertools.product(range(len(chances[0])), repeat=depth):
            value = 1.0
            for level, rank in enumerate(path):
                value *= min(0.99, chances[level][rank])
            values.append(value)
    return sorted(values, reverse=True)


@given(CHANCES, st.integers(1, 14))
def test_the_likeliest_nodes_make_a_tree(chances: list[list[float]], most: int) -> None:
    shape = shape_of(chances, most)
    assert shape.values == pytest.approx(every_value(chances)[:most])
    for place, parent in enumerate(shape.parents):
        assert parent < place
        assert shape.depths[place] == (1 if parent < 0 else shape.depths[parent] + 1)
    flat = shape.within(1)
    assert set(flat.depths) <= {1}
    assert set(flat.parents) <= {-1}


@given(CHANCES, st.integers(1, 9), st.integers(0, 5), st.floats(0.0, 0.3), st.floats(0.0, 0.3))
def test_no_other_tree_is_worth_more(
    chances: list[list[float]], requests: int, others: int, row_s: float, pass_s: float
) -> None:
    """Beside every tree that the likeliest nodes of a depth make, with straight prices."""
    shape = shape_of(chances, 12)

    def target(rows: int) -> float:
        return 1.0 + row_s * rows

    def rate(depth: int, nodes: int) -> float:
        tree = shape.within(depth)
        expected = requests * (1 + sum(tree.values[:nodes]))
        return expected / (target(requests * (1 + nodes) + others) + pass_s * max(tree.depths[:nodes], default=0))

    sizes = choose_sizes(requests, others, shape, 3, target, lambda rows: pass_s)
    best = max(rate(depth, nodes) for depth in (1, 2, 3) for nodes in range(len(shape.within(depth)) + 1))
    assert sizes.tokens_per_s == pytest.approx(rate(sizes.depth, sizes.nodes) if sizes.depth else rate(1, 0))
    assert best * 0.8 <= sizes.tokens_per_s <= best * (1 + 1e-9)
    assert sizes.tokens_per_s >= sizes.plain_per_s == pytest.approx(rate(1, 0))


def test_where_rows_are_free_trees_are_large_and_where_they_are_dear_there_are_none() -> None:
    shape = shape_of([[0.7, 0.15]] * 6, 64)
    free = choose_sizes(1, 0, shape, 6, lambda rows: 1.0, lambda rows: 0.02)
    dear = choose_sizes(1, 0, shape, 6, lambda rows: float(rows), lambda rows: 0.02)
    crowd = choose_sizes(256, 0, shape, 6, lambda rows: max(1.0, rows / 200), lambda rows: 0.02)
    some = choose_sizes(16, 0, shape, 6, lambda rows: max(1.0, rows / 200), lambda rows: 0.02)
    assert free.nodes == 64
    assert free.tokens_per_s > 2.5 * free.plain_per_s
    assert (dear.depth, dear.nodes) == (crowd.depth, crowd.nodes) == (0, 0)
    assert dear.tokens_per_s == dear.plain_per_s
    assert 1 < some.nodes < free.nodes
    assert some.least_chance > 0.0


def test_drafting_that_costs_as_much_as_decoding_is_left_out() -> None:
    """The class's suspicion, in figures: a drafter as slow as the target cannot pay, however good."""
    shape = shape_of([[0.98]] * 6, 6)
    sizes = choose_sizes(1, 0, shape, 6, lambda rows: 1.0, lambda rows: 1.0)
    assert sizes.depth == 0


def test_a_step_has_room_for_so_many_rows() -> None:
    shape = shape_of([[0.7, 0.15]] * 6, 64)
    sizes = choose_sizes(10, 0, shape, 6, lambda rows: 1.0, lambda rows: 0.0, most_rows=50)
    assert 10 * (1 + sizes.nodes) <= 50
    assert sizes.nodes == 4
