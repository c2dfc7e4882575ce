"""How large trees are made: the likeliest nodes, and the most tokens a second."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ridgeline.speculate.acceptance import Acceptance
from ridgeline.speculate.tree_size import COARSE, Shape, choose_sizes, least_worth, likeliest

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


def test_chances_that_promised_too_much_are_trusted_less() -> None:
    shape = shape_of([[0.7, 0.15]] * 6, 64)
    whole = choose_sizes(1, 0, shape, 6, lambda rows: 1.0 + 0.01 * rows, lambda rows: 0.05)
    half = choose_sizes(1, 0, shape, 6, lambda rows: 1.0 + 0.01 * rows, lambda rows: 0.05, trust=0.5)
    none = choose_sizes(1, 0, shape, 6, lambda rows: 1.0 + 0.01 * rows, lambda rows: 0.05, trust=0.01)
    assert whole.tokens_per_s > half.tokens_per_s > half.plain_per_s
    assert half.nodes < whole.nodes
    assert none.depth == 0
    seconds = 1.0 + 0.01 * (1 + half.nodes) + 0.05 * half.depth
    assert half.tokens_per_s == pytest.approx((1 + 0.5 * half.accepted) / seconds, rel=0.02)


def test_trust_follows_what_came() -> None:
    acceptance = Acceptance()
    assert acceptance.trust == 1.0
    for _ in range(400):
        acceptance.compare(4.0, 1)
    assert acceptance.trust == pytest.approx(0.25, abs=0.01)
    for _ in range(400):
        acceptance.compare(4.0, 4)
    assert acceptance.trust == pytest.approx(1.0, abs=0.01)


@given(
    st.lists(st.floats(0.001, 0.9), max_size=40),
    st.integers(1, 20),
    st.lists(st.floats(0.0, 0.2), min_size=8, max_size=8),
    st.floats(0.1, 3.0),
)
def test_nodes_that_are_worth_their_rows(
    scores: list[float], rows: int, rises: list[float], tokens_per_s: float
) -> None:
    """No number of the likeliest is worth more, but for how finely numbers are tried; prices rise in jumps."""

    def target(count: int) -> float:
        return 1.0 + sum(rises[: count // 8])

    ordered = sorted(scores, reverse=True)

    def worth(count: int) -> float:
        return sum(ordered[:count]) - tokens_per_s * (target(rows + count) - target(rows))

    least = least_worth(scores, rows, target, tokens_per_s)
    kept = [one for one in ordered if one >= least]
    tried, count = [0], 0
    while count < len(scores):
        count = min(len(scores), count + max(1, (rows + count) // COARSE))
        tried.append(count)
    equals = len(kept) - ordered.index(least) - 1 if kept else 0  # of the same chance as the last one
    assert worth(len(kept) - equals if equals else len(kept)) <= max(map(worth, tried)) + 1e-9
    assert max(worth(len(kept) - more) for more in range(equals + 1)) >= max(map(worth, tried)) - 1e-9


def test_steps_are_filled_up_to_a_jump() -> None:
    """Rows 4 to 8 cost the same: a node that comes on top of such a row is free, the one behind it costs a jump."""
    scores = [0.9, 0.4, 0.3, 0.2, 0.1, 0.05, 0.02]

    def target(rows: int) -> float:
        return 1.0 if rows <= 4 else 1.5 if rows <= 8 else 5.0

    assert least_worth(scores, 3, target, 1.0, (4, 8, 16)) == 0.1  # 1.0 for half a second
    assert least_worth(scores, 3, target, 2.1, (4, 8, 16)) == 0.9  # the first one alone is free
    assert least_worth(scores, 3, target, 0.01, (4, 8, 16)) == 0.02
    assert least_worth(scores[4:], 4, target, 1.0, (4, 8, 16)) > 1


def test_nothing_drafted_is_worth_nothing() -> None:
    assert least_worth([], 3, float, 1.0) > 1
    assert least_worth([0.5], 3, lambda rows: 1.0 * rows, 1.0) > 1
