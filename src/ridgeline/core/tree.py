"""A tree of drafted tokens behind a sequence's last token, and the walk that verification takes through it.

Knows token ids and who follows whom. It must not know who drafted them, probabilities' meaning, or tensors.

The root, the sequence's last known token, is not a node. Nodes are laid out depth first, parents before
children and the best child first, so a subtree is a contiguous range and the ancestors of a node are a bitmask
over those before it. A chain is a tree of width one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ridgeline.core.errors import InvalidArgument

MOST_NODES = 256
"""Nodes of one tree: bits that a row of the mask may have."""

ROOT = -1
"""Parent of the nodes that follow the last known token."""


@dataclass(frozen=True, slots=True)
class TokenTree:
    """Drafted tokens. `tokens[i]` follows `parents[i]`, a node before it, or ROOT.

    depths: 1 for those that follow the root; node i stands at the root's position + depths[i].
    ancestors: bitmask of node i's path, itself included.

    Raises InvalidArgument for more than MOST_NODES nodes, a parent that is no node before its child, nodes
    that are not in depth-first order, negative tokens, and equal tokens under one parent.
    """

    tokens: tuple[int, ...]
    parents: tuple[int, ...]
    depths: tuple[int, ...]
    ancestors: tuple[int, ...]

    def __init__(self, tokens: Iterable[int], parents: Iterable[int]) -> None:
        tokens, parents = tuple(tokens), tuple(parents)
        depths: list[int] = []
        ancestors: list[int] = []
        if len(tokens) != len(parents):
            raise InvalidArgument("tree", f"has {len(tokens)} tokens and {len(parents)} parents")
        if len(tokens) > MOST_NODES:
            raise InvalidArgument("tree", f"has {len(tokens)} nodes, a tree may have {MOST_NODES}")
        seen: set[tuple[int, int]] = set()
        for node, (token, parent) in enumerate(zip(tokens, parents)):
            if token < 0:
                raise InvalidArgument("tree", f"node {node} is of token {token}")
            if not ROOT <= parent < node:
                raise InvalidArgument("tree", f"node {node} has parent {parent}, which is no node before it")
            if parent != ROOT and not ancestors[node - 1] >> parent & 1:
                raise InvalidArgument("tree", f"node {node} is not in depth-first order: its parent is {parent}")
            if (parent, token) in seen:
                raise InvalidArgument("tree", f"node {node} repeats its sibling's token {token}")
            seen.add((parent, token))
            depths.append(1 if parent == ROOT else depths[parent] + 1)
            ancestors.append(1 << node | (0 if parent == ROOT else ancestors[parent]))
        self._fill(tokens, parents, tuple(depths), tuple(ancestors))

    def _fill(self, *values: tuple[int, ...]) -> None:
        for name, value in zip(self.__slots__, values, strict=True):
            object.__setattr__(self, name, value)

    @classmethod
    def chain(cls, tokens: Sequence[int]) -> TokenTree:
        """Each token follows the one before."""
        count = len(tokens)
        if count > MOST_NODES or min(tokens, default=0) < 0:
            return cls(tokens, range(ROOT, count - 1))  # says what is wrong
        tree = object.__new__(cls)
        tree._fill(tuple(tokens), *CHAINS[count])  # nothing else can be
        return tree

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def depth(self) -> int:
        """Tokens on the longest path."""
        return max(self.depths, default=0)

    @property
    def is_chain(self) -> bool:
        return self.depth == len(self.tokens)

    def children(self, node: int) -> list[int]:
        """Nodes that follow a node, or the root (ROOT), best first."""
        return [child for child, parent in enumerate(self.parents) if parent == node]

    def path(self, node: int) -> list[int]:
        """Nodes from below the root down to `node`."""
        found = []
        while node != ROOT:
            found.append(node)
            node = self.parents[node]
        return found[::-1]

    def path_tokens(self, node: int) -> list[int]:
        return [self.tokens[one] for one in self.path(node)]

    def positions(self, root: int) -> list[int]:
        """Position of each node in its sequence, the root standing at `root`."""
        return [root + depth for depth in self.depths]

    def masks(self, nbytes: int) -> bytes:
        """The ancestors of each node as a bitmask of so many bytes, lowest first, one node after the other."""
        return b"".join([mask.to_bytes(nbytes, "little") for mask in self.ancestors])

    def walk(self, chosen: Sequence[int]) -> list[int]:
        """The nodes that verification accepts, top down.

        chosen: the token that the target chose behind the root, then behind each node; from a node the walk
        goes on to the child that bears the chosen token. Siblings differ, so their order does not matter.
        """
        accepted: list[int] = []
        at = ROOT
        for node, parent in enumerate(self.parents):  # of a node's children, none stands before the node
            if parent == at and self.tokens[node] == chosen[at + 1]:
                accepted.append(node)
                at = node
        return accepted

    def keep(self, nodes: Iterable[int]) -> TokenTree:
        """The tree of some of the nodes, in the same order. InvalidArgument if one's parent is left out."""
        kept = sorted(set(nodes))
        place = {ROOT: ROOT, **{node: at for at, node in enumerate(kept)}}
        for node in kept:
            if self.parents[node] not in place:
                raise InvalidArgument("tree", f"node {node} is to be kept without its parent {self.parents[node]}")
        return TokenTree((self.tokens[n] for n in kept), (place[self.parents[n]] for n in kept))

    def within(self, nodes: int, depth: int) -> TokenTree:
        """The first `nodes` nodes of those no deeper than `depth`: a cut that looks at no token."""
        if len(self) <= nodes and self.depth <= depth:
            return self
        return self.keep([node for node in range(len(self)) if self.depths[node] <= depth][: max(nodes, 0)])


CHAINS = tuple(
    (
        tuple(range(ROOT, count - 1)),
        tuple(range(1, count + 1)),
        tuple((2 << node) - 1 for node in range(count)),
    )
    for count in range(MOST_NODES + 1)
)
"""Parents, depths and ancestors of chains by their number of nodes."""


class Sketch:
    """A tree as it grows: nodes in the order in which they come, each with a score.

    A node's score is at most its parent's (probabilities of paths, for example).
    """

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.parents: list[int] = []
        self.scores: list[float] = []
        self.depths: list[int] = []
        self._found: dict[tuple[int, int], int] = {}

    def __len__(self) -> int:
        return len(self.tokens)

    def add(self, token: int, parent: int, score: float) -> int:
        """A node; the same token under the same parent is the same node, with the better of its scores."""
        node = self._found.get((parent, token))
        if node is not None:
            self.scores[node] = max(self.scores[node], score)
            return node
        if parent != ROOT and score > self.scores[parent]:
            raise ValueError(f"a path's score cannot rise: {score} behind {self.scores[parent]}")
        node = self._found[parent, token] = len(self.tokens)
        self.tokens.append(token)
        self.parents.append(parent)
        self.scores.append(score)
        self.depths.append(1 if parent == ROOT else self.depths[parent] + 1)
        return node

    def path_tokens(self, node: int) -> tuple[int, ...]:
        """Tokens from below the root down to a node; none for the root."""
        path: list[int] = []
        while node != ROOT:
            path.append(self.tokens[node])
            node = self.parents[node]
        return tuple(reversed(path))

    def best(self, count: int) -> list[int]:
        """The `count` best nodes, which make a tree: a parent precedes its child. In order of their score."""
        order = sorted(range(len(self)), key=lambda node: -self.scores[node])  # stable: parents come first
        return order[: max(count, 0)]

    def tree(self, nodes: Iterable[int] | None = None) -> tuple[TokenTree, list[int]]:
        """A TokenTree of some nodes (all), and for each of its nodes which one here it is. Of equal siblings the first
        that came stands first."""
        kept = set(range(len(self)) if nodes is None else nodes)
        children: dict[int, list[int]] = {}
        for node in sorted(kept):
            children.setdefault(self.parents[node], []).append(node)
        order: list[int] = []
        stack = [ROOT]
        while stack:
            node = stack.pop()
            if node != ROOT:
                order.append(node)
            stack.extend(sorted(children.get(node, ()), key=lambda one: -self.scores[one])[::-1])
        if len(order) < len(kept):
            raise InvalidArgument("tree", "a node is to be kept without its parent")
        place = {ROOT: ROOT, **{node: at for at, node in enumerate(order)}}
        return TokenTree((self.tokens[n] for n in order), (place[self.parents[n]] for n in order)), order


def merged(trees: Iterable[TokenTree]) -> TokenTree:
    """The union of trees by path: the same token behind the same path is one node. Earlier trees rank first."""
    sketch = Sketch()
    for rank, tree in enumerate(trees):
        place = {ROOT: ROOT}
        for node, (token, parent) in enumerate(zip(tree.tokens, tree.parents)):
            place[node] = sketch.add(token, place[parent], -float(rank))
    return sketch.tree()[0]
