"""What levels drafted on the device hold, as trees: the nodes of all requests at once, in arrays.

Knows levels, chances of acceptance and TokenTree. It must not know who decides how many nodes there are, nor prices.
A step of many requests looks at thousands of nodes and keeps a few of each: what is looked at stays in arrays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ridgeline.core.tree import ROOT, TokenTree
from ridgeline.run.beams import Levels
from ridgeline.speculate.acceptance import EDGES


@dataclass(frozen=True, slots=True)
class Nodes:
    """Drafted nodes of several requests, [requests, nodes], level by level.

    scores: float64, the chance that the whole path is accepted, below its parent's, and 0 for what is no node.
    chances: float32, the drafter's own of the token behind its parent. parents: places in the same row, or ROOT.
    ranks [nodes]: among siblings as they were proposed.
    """

    scores: np.ndarray
    chances: np.ndarray
    tokens: np.ndarray
    parents: np.ndarray
    ranks: np.ndarray

    def best(self, most: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """The places of each request's nodes, likeliest first, and their scores, 0 behind the first `most[request]`.
        Any number of the first of them make a tree."""
        order = np.argsort(-self.scores, axis=1, kind="stable")
        scores = np.take_along_axis(self.scores, order, 1)
        scores[np.arange(scores.shape[1]) >= np.asarray(most)[:, None]] = 0.0
        return order, scores


def scored(levels: Levels, widths: Sequence[int], depths: Sequence[int], odds: Sequence[Sequence[float]]) -> Nodes:
    """Of the first `depths[request]` levels the first `widths[level]` children behind each row.

    odds: [children, classes], the chance below 1 that a child of a rank and a class of probability is accepted.
    """
    depth, requests, beam, children = levels.tokens.shape
    rates = np.asarray(odds)[np.arange(children), np.searchsorted(EDGES, levels.chances, side="right")]
    rates *= (np.arange(children) < np.asarray(widths[:depth])[:, None])[:, None, None]
    rates *= (np.arange(depth)[:, None] < np.asarray(depths))[:, :, None, None]
    scores = np.zeros((depth, requests, beam * children))
    parents = np.full((depth, requests, beam), ROOT)
    above = np.zeros((requests, beam))
    above[:, 0] = 1.0  # the first level has one row
    for level in range(depth):
        scores[level] = (above[:, :, None] * rates[level]).reshape(requests, -1)
        if level + 1 < depth:
            chosen = levels.chosen[level]
            above = np.where(chosen < 0, 0.0, np.take_along_axis(scores[level], np.maximum(chosen, 0), 1))
            parents[level + 1] = level * beam * children + chosen

    def rows(values: np.ndarray) -> np.ndarray:
        return values.swapaxes(0, 1).reshape(requests, -1)

    return Nodes(
        rows(scores),
        rows(levels.chances),
        rows(levels.tokens),
        rows(np.repeat(parents, children, axis=2)),
        np.tile(np.arange(children), depth * beam),
    )


def arranged(tokens: Sequence[int], parents: Sequence[int]) -> tuple[TokenTree, Sequence[int]]:
    """A tree of nodes that come likeliest first, parents (places among them, or ROOT) before children; and for each of
    its nodes which of them it is."""
    if list(parents) == [*range(ROOT, len(tokens) - 1)]:
        return TokenTree.chain(tokens), range(len(tokens))
    children: list[list[int]] = [[] for _ in range(len(tokens) + 1)]  # the root's are the last
    for node, parent in enumerate(parents):
        children[parent].append(node)
    order: list[int] = []
    stack = children[ROOT][::-1]
    while stack:
        node = stack.pop()
        order.append(node)
        stack += reversed(children[node])
    place = {ROOT: ROOT, **{node: at for at, node in enumerate(order)}}
    return TokenTree([tokens[node] for node in order], [place[parents[node]] for node in order]), order
