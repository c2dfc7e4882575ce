"""The sizer against brute force: no other depth and number of nodes promises more, and what it says is what it did."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from ridgeline.speculate.tree_size import Sizes, Want, choose_sizes

WIDTH, DEEPEST = 3, 6


def chance(depth: int, rank: int) -> float:
    return (0.8 - 0.03 * depth) * (0.25**rank)


def flat(until: int, then: float) -> Callable[[int], float]:
    """A machine that computes so many rows for the price of one; beyond, each costs `then`."""
    return lambda rows: 1.0 + then * max(0, rows - until)


def choose(wants: list[Want], seconds: Callable[[int], float], level_s: float) -> Sizes:
    return choose_sizes(
        wants, chance, lambda nodes: seconds(len(wants) + nodes), lambda depth: depth * level_s, WIDTH, DEEPEST
    )


def best_by_hand(count: int, seconds: Callable[[int], float], level_s: float) -> float:
    """The best rate over all depths and numbers of nodes, requests that all want the same."""
    best = count / seconds(count)
    for depth in range(1, DEEPEST + 1):
        values, path = [], 1.0
        for level in range(1, depth + 1):
            values += [path * chance(level, rank) for rank in range(WIDTH)]
            path *= chance(level, 0)
        pool = sorted(values * count, reverse=True)
        for nodes in range(1, len(pool) + 1):
            rate = (count + sum(pool[:nodes])) / (seconds(count + nodes) + depth * level_s)
            best = max(best, rate)
    return best


@pytest.mark.parametrize("count", [1, 2, 5, 40])
@pytest.mark.parametrize(("until", "then"), [(64, 0.01), (8, 0.05), (1, 0.2), (200, 0.005)])
@pytest.mark.parametrize("level_s", [0.0, 0.05, 0.3])
def test_nothing_promises_more(count: int, until: int, then: float, level_s: float) -> None:
    seconds = flat(until, then)
    sizes = choose([Want(DEEPEST, 256)] * count, seconds, level_s)
    best = best_by_hand(count, seconds, level_s)
    assert sizes.tokens_per_s <= best * (1 + 1e-9)
    assert sizes.tokens_per_s >= 0.995 * best  # beyond 16 nodes not every number is tried
    assert sizes.plain_per_s == pytest.approx(count / seconds(count))


def test_less_where_rows_cost_more() -> None:
    """A tree where rows are free, a chain where they cost something, nothing where they cost what they bring."""
    one = [Want(DEEPEST, 256)]
    tree, chain = choose(one, flat(64, 1.0), 0.02), choose(one, flat(1, 0.12), 0.02)
    nothing = choose(one, flat(1, 1.0), 0.02)
    assert tree.nodes[0] > tree.depth
    assert chain.nodes[0] == chain.depth > 0
    assert (nothing.depth, nothing.nodes) == (0, (0,))
    assert nothing.tokens_per_s == nothing.plain_per_s


def test_nodes_go_where_they_are_likely_and_where_there_is_room() -> None:
    sure, doubtful, short = Want(DEEPEST, 256), Want(DEEPEST, 256, quality=0.3), Want(1, 2)
    sizes = choose([doubtful, sure, short, sure], flat(20, 1.0), 0.01)
    assert sum(sizes.nodes) == 16  # as many as are free
    assert min(sizes.nodes[1], sizes.nodes[3]) > sizes.nodes[0]
    assert abs(sizes.nodes[1] - sizes.nodes[3]) <= 1
    assert sizes.nodes[2] <= 2


def test_what_is_left_goes_to_the_first() -> None:
    sizes = choose([Want(1, 1)] * 5, flat(8, 1.0), 0.01)
    assert sizes.nodes == (1, 1, 1, 0, 0)


def test_many_requests_cost_little() -> None:
    """Requests that want the same are looked at once: prices are asked a few hundred times, however many there are."""
    asked = [0]

    def target(nodes: int) -> float:
        asked[0] += 1
        return flat(1000, 0.001)(256 + nodes)

    choose_sizes([Want(12, 256)] * 256, chance, target, lambda depth: 0.05 * depth, 4, 12)
    assert asked[0] < 1000
