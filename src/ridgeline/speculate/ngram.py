"""Drafts from what is already written: what followed the last tokens the last time they stood there.

Knows one sequence's token ids. It must not know models. The index grows with the sequence, a few dictionary
entries a token; nothing is searched. (Prompt lookup, Saxena 2023; here with several continuations as a tree.)
"""

from __future__ import annotations

from collections.abc import Sequence

from ridgeline.core.tree import ROOT, Sketch

LONGEST, SHORTEST = 4, 2
"""Tokens that must agree, at most and at least."""

BRANCHES = 3
"""Different continuations of one context that are remembered, the latest first."""


class SuffixIndex:
    """Where each run of SHORTEST to LONGEST tokens of a growing sequence was followed by what.

    `extend` takes the whole sequence; it may only have grown since, or have been cut back to a prefix.
    """

    def __init__(self) -> None:
        self._ends: dict[tuple[int, ...], list[int]] = {}
        self._indexed = 0

    def extend(self, tokens: Sequence[int]) -> None:
        """Index the tokens that are new: each run of tokens that has a successor by now."""
        for end in range(max(self._indexed, 1), len(tokens)):
            for length in range(SHORTEST, min(LONGEST, end) + 1):
                places = self._ends.setdefault(tuple(tokens[end - length : end]), [])
                if not places or places[-1] != end:
                    places.append(end)
                    if len(places) > BRANCHES:
                        del places[0]
        self._indexed = max(self._indexed, len(tokens))

    def matches(self, tokens: Sequence[int]) -> list[tuple[int, int]]:
        """(length of a known run that ends the sequence, place behind it), longest first, then latest first."""
        found: dict[int, int] = {}
        for length in range(min(LONGEST, len(tokens)), SHORTEST - 1, -1):
            for place in reversed(self._ends.get(tuple(tokens[len(tokens) - length :]), ())):
                if place < len(tokens) and len(found) < BRANCHES:
                    found.setdefault(place, length)
        return [(length, place) for place, length in found.items()]

    def draft(self, tokens: Sequence[int], depth: int, score: float = 1.0, fall: float = 0.9) -> Sketch:
        """What followed, as a tree at most `depth` deep: after the longest match first, then the latest. Scores
        fall with depth and from match to match."""
        self.extend(tokens)
        sketch = Sketch()
        for age, (_, place) in enumerate(self.matches(tokens)):
            node, value = ROOT, score / (1 + age)
            for token in tokens[place : place + depth]:
                value *= fall
                node = sketch.add(token, node, value if node == ROOT else min(value, sketch.scores[node]))
        return sketch
