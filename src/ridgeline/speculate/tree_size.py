"""How large the trees of a step should be: most expected tokens per predicted second, down to none.

Knows chances of acceptance by depth and rank, and prices, both as arguments. It must not know models, nor how a
price comes about. The choice is made before anything is drafted and looks at no token.

What a step is expected to commit is additive: one token a request, and for each node the chance that its whole path
is accepted. So for a given number of nodes the best trees are the likeliest nodes of all requests in one ranking,
and the choice is over that number and over how deep to draft (Sequoia, Chen et al., 2402.12374, and AdaServe, Li et
al., 2501.12162, choose so for fixed and for pooled trees). It is made before every step, so it must cost nothing
beside one: requests that want the same are one entry of the ranking.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

TargetPrice = Callable[[int], float]
"""Seconds of a step of the target with so many nodes, over all requests."""

DraftPrice = Callable[[int], float]
"""Seconds of drafting so many levels, for all requests."""

Chance = Callable[[int, int], float]
"""(depth from 1, rank from 0) -> chance of a node whose parent is accepted."""

PATIENCE = 3
"""Depths in a row without a better choice, after which deeper ones are not looked at."""


class Want(NamedTuple):
    """A request that may get a tree. most_depth, most_nodes: its room; quality: its own acceptance beside the average,
    a factor."""

    most_depth: int
    most_nodes: int
    quality: float = 1.0


@dataclass(frozen=True)
class Sizes:
    """What was chosen, and why.

    depth: levels to draft; nodes: of each request's tree. tokens_per_s: expected, against `plain_per_s` without
    trees. node_s: seconds that one more node costs; level_s: that one more level of drafting costs.
    """

    depth: int
    nodes: tuple[int, ...]
    tokens_per_s: float
    plain_per_s: float
    node_s: float
    level_s: float

    @property
    def least_chance(self) -> float:
        """A node below this chance costs more time than it is worth."""
        return min(1.0, self.tokens_per_s * self.node_s)

    @property
    def least_path(self) -> float:
        """A path below this chance is not worth another level of drafting."""
        return min(1.0, self.tokens_per_s * (self.level_s + self.node_s))


def choose_sizes(
    wants: Sequence[Want], chance: Chance, target: TargetPrice, draft: DraftPrice, width: int, deepest: int
) -> Sizes:
    """Trees for the requests of a step.

    width: siblings considered at each node of the best path, whose other children are not expanded.
    """
    count = len(wants)
    plain = count / target(0)
    best: tuple[float, int, int, list[_Entry]] = (plain, 0, 0, [])
    alike = Counter(wants)
    limit = min(deepest, max((want.most_depth for want in alike), default=0))
    for depth in range(1, limit + 1):
        ranking = _ranking(alike, chance, depth, width)
        drafting_s = draft(depth)
        for nodes, expected in _expected(ranking):
            rate = (count + expected) / (target(nodes) + drafting_s)
            if rate > best[0]:
                best = (rate, depth, nodes, ranking)
        if depth >= best[1] + PATIENCE:
            break
    rate, depth, total, ranking = best
    step = max(1, total // 4)
    node_s = max(0.0, (target(total + step) - target(total)) / step)
    level_s = max(0.0, draft(depth + 1) - draft(depth)) / count
    return Sizes(depth, _shared(wants, ranking, total), rate, plain, node_s, level_s)


class _Entry(NamedTuple):
    """A node of every request that wants the same. value: the chance that it is accepted; times: so many requests."""

    value: float
    want: Want
    times: int


def _ranking(alike: Counter[Want], chance: Chance, depth: int, width: int) -> list[_Entry]:
    """The nodes of trees so deep, likeliest first."""
    ranking: list[_Entry] = []
    for want, times in alike.items():
        path, own = 1.0, []
        for level in range(1, min(depth, want.most_depth) + 1):
            own += [path * min(0.99, want.quality * chance(level, rank)) for rank in range(width)]
            path *= min(0.99, want.quality * chance(level, 0))
        ranking += [_Entry(value, want, times) for value in sorted(own, reverse=True)[: want.most_nodes]]
    ranking.sort(key=lambda entry: -entry.value)
    return ranking


def _expected(ranking: Sequence[_Entry]) -> Iterator[tuple[int, float]]:
    """(nodes, how many of them are expected to be accepted), for the numbers of nodes that are tried: those where all
    who want the same have the same, and some between."""
    counts = iter(_counts(sum(entry.times for entry in ranking)))
    wanted = next(counts, None)
    taken, expected = 0, 0.0
    for value, _, times in ranking:
        while wanted is not None and wanted < taken + times:
            yield wanted, expected + (wanted - taken) * value
            wanted = next(counts, None)
        taken += times
        expected += times * value
        yield taken, expected


def _shared(wants: Sequence[Want], ranking: Sequence[_Entry], total: int) -> tuple[int, ...]:
    """How many of the first `total` nodes each request has. Of an entry that is cut, its first requests have one."""
    whole: Counter[Want] = Counter()
    rest: Counter[Want] = Counter()
    for _, want, times in ranking:
        if total <= 0:
            break
        if total >= times:
            whole[want] += 1
        else:
            rest[want] = total
        total -= times
    nodes = []
    for want in wants:
        nodes.append(whole[want] + (rest[want] > 0))
        rest[want] -= 1
    return tuple(nodes)


def _counts(most: int) -> list[int]:
    """Numbers of nodes that are tried: every one up to 16, then an eighth more each time."""
    counts = []
    count = 1
    while count < most:
        counts.append(count)
        count += max(1, count // 8) if count >= 16 else 1
    return counts
