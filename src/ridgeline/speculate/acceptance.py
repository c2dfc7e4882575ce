"""What was accepted so far, as chances of what is drafted next.

Knows counts. It must not know models. Two views of the same trials, a trial being a node whose parent was accepted:
by depth and rank among its siblings, for choosing sizes before anything is drafted; and by rank and the drafter's
own probability, for choosing among nodes that are drafted.

The first view is too hopeful: unlikely nodes are left out of trees, so the trials of a depth are those of contexts that
promised much. What whole trees were said to bring is therefore held against what they have brought (trust).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

from ridgeline.core.tree import ROOT, TokenTree
from ridgeline.speculate.tree_size import Shape, likeliest

EDGES = (0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 0.97)
"""The drafter's probability, in classes."""

DEEPEST, RANKS = 12, 8
FADING = 0.998
"""Older trials count for less: the text changes."""

PRIOR_TRIALS = 4.0
TRUST_FADING, PRIOR_NODES = 0.98, 10.0
"""Trust is of the last fifty trees or so; it begins as if so many nodes had come as they were said to."""


class Acceptance:
    """Chances from counts, with a prior that soon gives way.

    by_depth(depth, rank): of a node at this depth (from 1) and rank (from 0) under an accepted parent.
    of(rank, q): of a node to which its drafter gave probability q. trust: how many nodes have been accepted for each
    that chances by depth said would be.
    """

    def __init__(self) -> None:
        self._depths = [
            [[0.6 * 0.25**rank * PRIOR_TRIALS, PRIOR_TRIALS] for rank in range(RANKS)] for _ in range(DEEPEST)
        ]
        self._classes = [
            [
                [_middle(place) * (1.0 if rank == 0 else 0.7) * PRIOR_TRIALS, PRIOR_TRIALS]
                for place in range(len(EDGES) + 1)
            ]
            for rank in range(RANKS)
        ]

        self._said = self._came = PRIOR_NODES

    @property
    def trust(self) -> float:
        return self._came / self._said

    def compare(self, said: float, came: int) -> None:
        """Of a tree so many nodes were said to be accepted, and so many were."""
        self._said = TRUST_FADING * self._said + said
        self._came = TRUST_FADING * self._came + came

    def by_depth(self, depth: int, rank: int) -> float:
        hits, trials = self._depths[min(depth, DEEPEST) - 1][min(rank, RANKS - 1)]
        return hits / trials

    def of(self, rank: int, q: float) -> float:
        hits, trials = self._classes[min(rank, RANKS - 1)][bisect_right(EDGES, q)]
        return hits / trials

    def odds(self, width: int) -> list[list[float]]:
        """`of` as a table: by rank up to `width` and class of probability (EDGES), below 1 so that deeper is less."""
        return [[min(0.999, hits / trials) for hits, trials in ranks] for ranks in self._classes[:width]]

    def shape(self, width: int, most: int) -> Shape:
        """The likeliest nodes by depth and rank."""
        return likeliest(self.by_depth, width, DEEPEST, most)

    def learn(self, tree: TokenTree, ranks: Sequence[int], chances: Sequence[float], accepted: Sequence[int]) -> None:
        """A verified tree. ranks, chances: each node's rank among its drafter's proposals, and its probability."""
        reached = {ROOT, *accepted}
        for node, parent in enumerate(tree.parents):
            if parent not in reached:
                continue
            hit = float(node in reached)
            rank = min(ranks[node], RANKS - 1)
            depth = min(tree.depths[node], DEEPEST) - 1
            for count in (self._depths[depth][rank], self._classes[rank][bisect_right(EDGES, chances[node])]):
                count[0] = FADING * count[0] + hit
                count[1] = FADING * count[1] + 1.0

    def table(self) -> list[list[tuple[float, float]]]:
        """(chance, trials) by depth and rank, for whoever explains."""
        return [[(hits / trials, trials) for hits, trials in ranks] for ranks in self._depths]


def _middle(place: int) -> float:
    edges = (0.0, *EDGES, 1.0)
    return (edges[place] + edges[place + 1]) / 2
