"""How large the trees of a step should be: most expected tokens per predicted second, down to none.

Knows chances of acceptance by depth and rank, and prices, both as arguments. It must not know models, nor how a
price comes about. The choice is made before anything is drafted and looks at no token.

What a step is expected to commit is additive: one token a request, and for each node the chance that its whole path
is accepted. So for a given number of nodes the best tree is that of the likeliest nodes, and the choice is over
that number and over how deep to draft (Sequoia, Chen et al., 2402.12374, and AdaServe, Li et al., 2501.12162, choose
so for fixed and for pooled trees).
"""

from __future__ import annotations

import heapq
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

Price = Callable[[int], float]
"""Rows -> seconds: of a step of the target, or of a pass of the drafters."""

Chance = Callable[[int, int], float]
"""(depth from 1, rank from 0) -> chance of a node whose parent is accepted."""

PATIENCE = 3
"""Depths beyond the best so far that are tried."""

BEHIND = 0.5
"""Of the chance that a row is accepted, about so much is left for what follows it."""

COARSE = 8
"""Numbers of nodes are tried in steps of such a part of the rows."""

HOPELESS = 0.8
"""Beyond a rate below this share of the best of that depth, larger trees are not tried: chances only fall."""


@dataclass(frozen=True, slots=True)
class Shape:
    """The likeliest nodes of an endless tree, likeliest first: a tree for every number of them.

    values: chance that the whole path is accepted; depths: from 1; parents: places in the same lists, -1 for the
    root; ranks: among siblings.
    """

    values: tuple[float, ...]
    depths: tuple[int, ...]
    parents: tuple[int, ...]
    ranks: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.values)

    def within(self, depth: int) -> Shape:
        """Its nodes no deeper than that."""
        kept = [place for place, own in enumerate(self.depths) if own <= depth]
        new = {-1: -1, **{place: at for at, place in enumerate(kept)}}
        return Shape(
            tuple(self.values[place] for place in kept),
            tuple(self.depths[place] for place in kept),
            tuple(new[self.parents[place]] for place in kept),
            tuple(self.ranks[place] for place in kept),
        )


def least_worth(
    scores: Iterable[float], rows: int, target: Price, tokens_per_s: float, sizes: Sequence[int] = ()
) -> float:
    """The chance from which drafted nodes, those of all requests together, are worth their rows.

    scores: of every node, the chance that its whole path is accepted. rows: of the step without any node. A second is
    worth `tokens_per_s` tokens. Not each node's price counts, but that of as many as it takes: rows become dearer in
    jumps, and cost nothing between them. sizes: where those jumps are, if that is known: steps are filled up to them.
    Above 1 if none is.
    """
    ordered = sorted(scores, reverse=True)
    without = target(rows)
    best, least, gained, count = 0.0, 2.0, 0.0, 0
    while count < len(ordered):
        place = bisect_right(sizes, rows + count)
        further = sizes[place] - rows if place < len(sizes) else count + max(1, (rows + count) // COARSE)
        more = min(len(ordered), further)
        gained += sum(ordered[count:more])
        count = more
        gain = gained - tokens_per_s * (target(rows + count) - without)
        if gain > best:
            best, least = gain, ordered[count - 1]
    return least


def likeliest(chance: Chance, width: int, deepest: int, most: int) -> Shape:
    """The `most` likeliest nodes of a tree of `width` children a node, at most `deepest` deep."""
    found: list[tuple[float, int, int, int]] = []
    heap = [(-min(0.99, chance(1, rank)), 1, rank, -1) for rank in range(width)]
    heapq.heapify(heap)
    while heap and len(found) < most:
        value, depth, rank, parent = heapq.heappop(heap)
        found.append((-value, depth, parent, rank))
        if depth < deepest:
            for below in range(width):
                heapq.heappush(heap, (value * min(0.99, chance(depth + 1, below)), depth + 1, below, len(found) - 1))
    values, depths, parents, ranks = zip(*found) if found else ((), (), (), ())
    return Shape(values, depths, parents, ranks)


@dataclass(frozen=True, slots=True)
class Sizes:
    """What was chosen, and why.

    depth: levels to draft; nodes: of a request's tree. tokens_per_s: expected, against `plain_per_s` without
    trees. node_s: seconds that one more node costs; level_s: that one more level of drafting costs a request.
    least: the chance of the last node that was worth its place. accepted: nodes of a request's tree that chances say
    are accepted, before they are trusted as far as they have been right.
    """

    depth: int
    nodes: int
    tokens_per_s: float
    plain_per_s: float
    node_s: float
    level_s: float
    least: float = 1.0
    accepted: float = 0.0

    @property
    def least_chance(self) -> float:
        """A node below this chance costs more time than it is worth. What the choice counted with is worth it, also
        where the next node would cost far more: rows become dearer in jumps."""
        return min(self.least, self.tokens_per_s * self.node_s)

    @property
    def ends_at_a_jump(self) -> bool:
        """Whether one more node would cost more than the last one was worth."""
        return self.tokens_per_s * self.node_s > self.least

    @property
    def least_levels(self) -> float:
        """What the chances of a request's rows must come to, all together, for another level to be worth its time."""
        return self.tokens_per_s * self.level_s / BEHIND

    @property
    def least_path(self) -> float:
        """A path below this chance is not worth another level of drafting."""
        return min(1.0, self.tokens_per_s * (self.level_s + self.node_s))


def choose_sizes(
    requests: int,
    other_rows: int,
    shape: Shape,
    deepest: int,
    target: Price,
    draft: Price,
    again: bool = True,
    most_rows: int = 1 << 30,
    plain: Price | None = None,
    level_s: float | None = None,
    trust: float = 1.0,
    least: float = 1.0,
) -> Sizes:
    """Trees for so many requests of a step, beside `other_rows` that will be computed anyway.

    draft: of one pass of the drafters, which computes the root of each request, or the nodes that have children so
    far. again: whether a pass computes those of earlier levels once more, or only the last level's. most_rows: of
    a step, over all requests. plain: of a step without trees, if that has a price of its own. level_s: seconds of
    one more level for all requests, if that does not depend on what is computed in it. trust: how many nodes have been
    accepted for each that `shape` said would be. least: what trees must bring, as a share of what steps without do.
    """
    plain_s = (plain or target)(requests + other_rows)
    plain_per_s = requests / plain_s
    best = (least * plain_per_s, 0, 0, 1.0, 0.0)
    first_s = draft(requests)
    for depth in range(1, deepest + 1):
        if depth > best[1] + PATIENCE:
            break
        tree = shape.within(depth)
        inner = [0] * (depth + 1)  # by depth, nodes with children: those that a pass computes
        known: set[int] = set()
        accepted, drafting_s, reached, highest = 0.0, first_s, 1, 0.0
        for place in range(len(tree)):
            if requests * (place + 2) + other_rows > most_rows:
                break
            parent = tree.parents[place]
            accepted += tree.values[place]
            if parent >= 0 and parent not in known:
                known.add(parent)
                inner[tree.depths[parent]] += 1
                reached = max(reached, tree.depths[parent] + 1)
                drafting_s = first_s + (0.0 if level_s is None else level_s * (reached - 1))
                rows = 0
                for level in range(1, reached if level_s is None else 1):
                    rows = rows + inner[level] if again else inner[level]
                    drafting_s += draft(requests * rows)
            if reached < depth:
                continue  # a smaller depth has it
            rate = requests * (1.0 + trust * accepted) / (target(requests * (place + 2) + other_rows) + drafting_s)
            if rate > best[0]:
                best = (rate, depth, place + 1, trust * tree.values[place], accepted)
            if rate < HOPELESS * highest:
                break
            highest = max(highest, rate)
    rate, depth, nodes, least, accepted = best if best[1] else (plain_per_s, *best[1:])
    rows = requests * (1 + nodes) + other_rows
    step = max(1, requests * nodes // 4)
    node_s = max(0.0, (target(rows + step) - target(rows)) / step)
    each = (draft(requests) if level_s is None else level_s) / requests
    return Sizes(depth, nodes, rate, plain_per_s, node_s, each, least, accepted)
