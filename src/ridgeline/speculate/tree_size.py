"""How large the trees of a step should be: most expected tokens per predicted second, down to none.

Knows chances of acceptance by depth and rank, and prices, both as arguments. It must not know models, nor how a
price comes about. The choice is made before anything is drafted and looks at no token.

What a step is expected to commit is additive: one token a request, and for each node the chance that its whole path
is accepted. So for a given number of nodes the best trees are the likeliest nodes of all requests in one ranking,
and the choice is over that number and over how deep to draft (Sequoia, Chen et al., 2402.12374, and AdaServe, Li et
al., 2501.12162, choose so for fixed and for pooled trees).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ridgeline.core.step import Spans

TargetPrice = Callable[[Spans], float]
"""Seconds of a step of the target."""

DraftPrice = Callable[[int, int], float]
"""Seconds of drafting: (requests, depth)."""

Chance = Callable[[int, int], float]
"""(depth from 1, rank from 0) -> chance of a node whose parent is accepted."""


@dataclass(frozen=True)
class Want:
    """A request that may get a tree. visible: keys that its next token sees; most_depth, most_nodes: its room;
    quality: its own acceptance beside the average, a factor."""

    visible: int
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
    wants: Sequence[Want],
    others: Spans,
    chance: Chance,
    target: TargetPrice,
    draft: DraftPrice,
    width: int,
    deepest: int,
) -> Sizes:
    """Trees for the requests of a step, beside `others` (spans that will be computed anyway).

    width: siblings considered at each node of the best path, whose other children are not expanded.
    """
    visible = tuple(want.visible for want in wants)
    ones = (1,) * len(wants)

    def target_s(nodes: int) -> float:
        """With so many nodes over all requests, spread evenly: prices look at sums."""
        each, rest = divmod(nodes, len(wants))
        more = [each + (place < rest) for place in range(len(wants))]
        new = tuple(one + extra for one, extra in zip(ones, more))
        seen = tuple(one + extra for one, extra in zip(visible, more))
        return target(Spans((*new, *others.new), (*seen, *others.visible)))

    plain_s = target_s(0)
    plain = len(wants) / plain_s
    best: tuple[float, int, tuple[int, ...]] = (plain, 0, (0,) * len(wants))
    for depth in range(1, min(deepest, max((want.most_depth for want in wants), default=0)) + 1):
        ranking: list[tuple[float, int]] = []
        for place, want in enumerate(wants):
            path = 1.0
            own = []
            for level in range(1, min(depth, want.most_depth) + 1):
                own += [path * min(0.99, want.quality * chance(level, rank)) for rank in range(width)]
                path *= min(0.99, want.quality * chance(level, 0))
            ranking += [(value, place) for value in sorted(own, reverse=True)[: want.most_nodes]]
        ranking.sort(key=lambda entry: -entry[0])
        drafting_s = draft(len(wants), depth)
        expected, at = float(len(wants)), 0
        for count in _counts(len(ranking)):
            expected += sum(value for value, _ in ranking[at:count])
            at = count
            rate = expected / (target_s(count) + drafting_s)
            if rate > best[0]:
                nodes = [0] * len(wants)
                for _, place in ranking[:count]:
                    nodes[place] += 1
                best = (rate, depth, tuple(nodes))
    rate, depth, chosen = best
    total = sum(chosen)
    step = max(1, total // 4)
    node_s = max(0.0, (target_s(total + step) - target_s(total)) / step)
    level_s = max(0.0, draft(len(wants), depth + 1) - draft(len(wants), depth)) / len(wants)
    return Sizes(depth, chosen, rate, plain, node_s, level_s)


def _counts(most: int) -> list[int]:
    """Numbers of nodes that are tried: every one up to 16, then an eighth more each time."""
    counts = []
    count = 1
    while count < most:
        counts.append(count)
        count += max(1, count // 8) if count >= 16 else 1
    return [*counts, most] if most else []
