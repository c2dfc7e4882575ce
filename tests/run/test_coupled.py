"""Coupled verification: whatever the tree, what is emitted is what would have been without one."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from law import distance, enumerated, random_laws

from ridgeline.core.tree import ROOT, Sketch, TokenTree
from ridgeline.ops.sample import gumbel, lowest_argmax
from ridgeline.run.verify import Choose, Law, Path

VOCABULARY = 4
DEPTH = 3

Noise = Callable[[int], np.ndarray]
"""Noise at a position, [V]."""


def chosen_token(p: Law, noise: np.ndarray) -> int:
    return int(np.argmax(np.log(np.maximum(p, 1e-300)) + noise))


def plain(target: Callable[[Path], Law], noise: Noise, tokens: int) -> Path:
    path: Path = ()
    for position in range(tokens):
        path += (chosen_token(target(path), noise(position)),)
    return path


def speculated(target: Callable[[Path], Law], noise: Noise, tree: TokenTree, by_slot: bool = False) -> Path:
    """One round as the engine does it: a token is chosen behind the root and behind every node, then the walk."""
    depths = range(1, len(tree) + 1) if by_slot else tree.depths
    chosen = [chosen_token(target(()), noise(0))]
    for node, depth in enumerate(depths):
        chosen.append(chosen_token(target(tuple(tree.path_tokens(node))), noise(depth)))
    accepted = tree.walk(chosen)
    last = accepted[-1] if accepted else ROOT
    return (*(tree.tokens[node] for node in accepted), chosen[last + 1])


def drafted(q: Callable[[Path], Law], noise: Noise, widths: tuple[int, ...]) -> TokenTree:
    """The best of log q + the same noise."""
    sketch = Sketch()
    frontier: list[tuple[Path, int]] = [((), ROOT)]
    for position, width in enumerate(widths):
        following = []
        for path, node in frontier:
            score = np.log(q(path)) + noise(position)
            above = 0.0 if node == ROOT else sketch.scores[node]
            for rank, token in enumerate(np.argsort(-score)[:width]):
                following.append(((*path, int(token)), sketch.add(int(token), node, above - rank)))
        frontier = following
    return sketch.tree()[0]


@st.composite
def any_tree(draw: st.DrawFn) -> TokenTree:
    sketch = Sketch()
    for _ in range(draw(st.integers(0, 12))):
        parent = draw(st.integers(ROOT, len(sketch) - 1))
        if parent == ROOT or sketch.depths[parent] < DEPTH:
            sketch.add(draw(st.integers(0, VOCABULARY - 1)), parent, 0.0)
    return sketch.tree()[0]


@given(any_tree(), st.integers(0, 1 << 30))
@settings(max_examples=200)
def test_any_tree_emits_what_none_does(tree: TokenTree, seed: int) -> None:
    generator = np.random.default_rng(seed)
    target = random_laws(generator, VOCABULARY, DEPTH)
    table = generator.gumbel(size=(DEPTH + 1, VOCABULARY))
    emitted = speculated(target, table.__getitem__, tree)
    assert emitted == plain(target, table.__getitem__, len(emitted))


def law_of(by_slot: bool) -> float:
    """Distance of the emitted law from that without speculation, over three equally likely tables of noise a
    position, all enumerated."""
    generator = np.random.default_rng(5)
    target, q = (random_laws(generator, VOCABULARY, DEPTH) for _ in range(2))
    tables = generator.gumbel(size=(9, 3, VOCABULARY))

    def run(choose: Choose, with_tree: bool) -> Path:
        third = np.full(3, 1 / 3)
        picked = [choose(third) for _ in range(4 if not by_slot else 6)]

        def noise(position: int) -> np.ndarray:
            return np.asarray(tables[position][picked[position]])

        if not with_tree:
            return plain(target, noise, 3)
        first = speculated(target, noise, drafted(q, noise, (2, 1)), by_slot)
        rest = plain(lambda path: target((*first, *path)), lambda at: noise(at + len(first)), 3 - len(first))
        return first + rest

    emitted = enumerated(lambda choose: run(choose, True))
    wanted = enumerated(lambda choose: run(choose, False))
    return sum(abs(emitted.get(path, 0.0) - wanted.get(path, 0.0)) for path in {*emitted, *wanted}) / 2


def test_the_law_is_the_same_and_noise_by_slot_is_caught() -> None:
    assert law_of(by_slot=False) < 1e-12
    assert law_of(by_slot=True) > 1e-3


def test_the_engines_noise_draws_from_p() -> None:
    """Chi-square of 20,000 choices by Philox noise, and agreement of drafter and target beyond independence."""
    p = torch.tensor([0.5, 0.25, 0.15, 0.1])
    q = torch.tensor([0.4, 0.3, 0.2, 0.1])
    count = 20_000
    noise = gumbel(torch.full((count,), 7), torch.arange(count), 4)
    ours, theirs = (lowest_argmax(law.log()[None, :] + noise) for law in (p, q))
    counts = torch.bincount(ours, minlength=4).double()
    assert float(((counts - count * p) ** 2 / (count * p)).sum()) < 16.3  # three degrees, one in a thousand
    agreement = float((ours == theirs).double().mean())
    assert agreement > float((p * q).sum()) + 0.3


def test_an_enumeration_that_emits_less_is_seen() -> None:
    """The test's own instrument: a law that is not the target's has a distance."""
    target = random_laws(np.random.default_rng(0), 3, 1)
    assert distance({(0,): 1.0}, target, 3, 1) > 0.3
