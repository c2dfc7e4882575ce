"""Three ways of verifying drafted tokens that leave the target's law of the output as it is.

Knows probabilities of tokens (float64, after all processors: temperature, cuts, penalties, biases) and trials.
It must not know models, caches or requests' lives. Every random decision goes through a `Choose`, so that a test can
enumerate all of them and an engine can draw them.

1. Coupled. The token behind a node is argmax(log p + G(seed, position)), the very one that is chosen without
   speculation, and the walk goes on while it is a child (`TokenTree.walk`). What is emitted does not depend on
   the tree at all, so any tree will do. Drafters propose argmax(log q + G) with the same noise, which meets the
   target's choice more often than an independent draw does. At temperature 0 this is greedy verification.
2. Multi-step speculative sampling (SpecInfer, Miao et al., 2305.09781, algorithm 2; recursive rejection, Jeon et
   al., 2402.14160): children are drawn from the drafter, tried in turn, and each failure leaves a residual. A
   trial keeps the law that its token was really drawn from. Exact as long as that is true given the trials
   before it and the event that it takes place: so no sorting, no dropping by a token's own value.
3. Target only. The target draws and the walk goes on while its token is a child: for children that were decided
   without randomness, such as a drafter's likeliest tokens or repeated n-grams.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ridgeline.core.request import SamplingParams
from ridgeline.core.tree import ROOT, Sketch, TokenTree

Law = np.ndarray
"""[V] float64, not negative, of sum one."""

Choose = Callable[[Law], int]
"""Draws an index with these probabilities, independently of all draws before."""

Path = tuple[int, ...]
"""Tokens behind the root."""

LEAST = 1e-300
"""A residual of less mass belongs to a rejection that does not happen."""


@dataclass(frozen=True)
class Trial:
    """A drafted child. source: which drafter proposed it; q: the law that `token` was drawn from, given the
    path, the trials before it, and that it takes place at all."""

    token: int
    q: Law
    source: int = 0


Trials = Mapping[Path, Sequence[Trial]]
"""Children of each path in the order in which they are tried. One token may be tried several times: it is one
node of the tree, and each failure subtracts its own law."""


@dataclass(frozen=True)
class Draws:
    """How a tree's children were drawn (a chunk's `draws`), and how the rest of its round is decided."""

    trials: Trials
    choose: Choose


def law_of(logits: np.ndarray, params: SamplingParams) -> Law:
    """The law that a token is chosen by, from its row of logits [V] (after penalties and biases): temperature,
    top-k, top-p of what is left, min-p. Ties go to the lower id. params.temperature is above 0."""
    scaled = logits.astype(np.float64) / params.temperature
    weights = np.exp(scaled - scaled.max())
    if params.top_k > 0 or params.top_p < 1 or params.min_p > 0:
        order = np.argsort(-scaled, kind="stable")
        ordered = weights[order]
        if params.top_k > 0:
            ordered[params.top_k :] = 0.0
        shares = ordered / ordered.sum()
        kept = (np.cumsum(shares) - shares < params.top_p) & (shares >= params.min_p * shares[0])
        kept[0] = True
        weights = np.zeros_like(weights)
        weights[order] = np.where(kept, ordered, 0.0)
    return normalized(weights)


def walked(tree: TokenTree, laws: Sequence[Law], draws: Draws) -> tuple[list[int], list[int]]:
    """Multi-step sampling through a verified tree: the nodes that it accepts, top down, and the tokens that it
    emits, one more. laws: behind the root, then behind each node."""
    places = {tuple(tree.path_tokens(node)): node for node in range(len(tree))}
    places[()] = ROOT
    emitted = multi_step(lambda path: laws[places[path] + 1], draws.trials, draws.choose)
    return [places[emitted[: depth + 1]] for depth in range(len(emitted) - 1)], list(emitted)


def seeded(seed: int, position: int, stage: int) -> Choose:
    """Draws that depend on these alone, and on their order."""
    key = np.array([seed & (1 << 64) - 1, stage], dtype=np.uint64)
    return drawing(np.random.Generator(np.random.Philox(key=key, counter=np.array([0, 0, 0, position], np.uint64))))


def drawing(generator: np.random.Generator) -> Choose:
    """Draw with a random generator."""

    def choose(law: Law) -> int:
        place = int(np.searchsorted(np.cumsum(law), generator.random() * law.sum(), side="right"))
        return min(place, len(law) - 1)

    return choose


def normalized(weights: Law) -> Law:
    return weights / weights.sum()


def draw_children(
    q: Law,
    count: int,
    choose: Choose,
    replacement: bool = False,
    enough: Callable[[Law, Sequence[int]], bool] | None = None,
    source: int = 0,
) -> list[Trial]:
    """Up to `count` trials from a drafter's law.

    Without replacement the law of each is q without the tokens before it; it ends when q's support does.
    enough(q, tokens so far): stop here. It may look at q and at earlier siblings, which is a legal pruning; the
    token that would come next it never sees.
    """
    trials: list[Trial] = []
    left = q
    while len(trials) < count and not (enough is not None and enough(q, [one.token for one in trials])):
        token = choose(left)
        trials.append(Trial(token, left, source))
        if not replacement:
            rest = left.copy()
            rest[token] = 0.0
            if rest.sum() <= LEAST:
                break
            left = normalized(rest)
    return trials


def residual(p: Law, q: Law) -> Law | None:
    """N((p - q)+): the law behind a rejected trial. None if a rejection has no probability."""
    rest = np.maximum(p - q, 0.0)
    mass = rest.sum()
    return None if mass <= LEAST else rest / mass


def multi_step_at(p: Law, trials: Sequence[Trial], choose: Choose) -> tuple[int, bool]:
    """(token behind a node, whether it is one of the children), the children tried in turn."""
    for trial in trials:
        q = trial.q[trial.token]
        chance = min(1.0, p[trial.token] / q) if q > 0 else 0.0
        if choose(np.array([chance, 1.0 - chance])) == 0:
            return trial.token, True
        rest = residual(p, trial.q)
        if rest is None:  # only rounding leads here
            break
        p = rest
    return choose(p), False


def multi_step(law: Callable[[Path], Law], trials: Trials, choose: Choose) -> Path:
    """What a round emits, 1 to depth + 1 tokens: multi-step speculative sampling. law(path): the target's."""
    path: Path = ()
    while True:
        token, goes_on = multi_step_at(law(path), trials.get(path, ()), choose)
        path += (token,)
        if not goes_on:
            return path


def target_only(law: Callable[[Path], Law], tree: TokenTree, choose: Choose) -> Path:
    """The same for children decided without randomness: draw from the target, and go on if it is a child."""
    path: Path = ()
    at = -1
    while True:
        token = choose(law(path))
        path += (token,)
        following = [child for child in tree.children(at) if tree.tokens[child] == token]
        if not following:
            return path
        at = following[0]


def expand(
    laws: Sequence[Callable[[Path], Law]],
    widths: Sequence[int],
    choose: Choose,
    replacement: bool = False,
    enough: Callable[[Law, Sequence[int]], bool] | None = None,
) -> dict[Path, list[Trial]]:
    """Expansion <k1, ..., km> by each drafter, merged by path.

    Each drafter grows its own tree: behind every node that it has itself proposed it draws `widths[depth]`
    children. A token that two propose behind one path is one node and two trials, first drafter first.
    """
    merged: dict[Path, list[Trial]] = {}
    for source, q in enumerate(laws):
        frontier: list[Path] = [()]
        for width in widths:
            following: dict[Path, None] = {}
            for path in frontier:
                drawn = draw_children(q(path), width, choose, replacement, enough, source)
                merged.setdefault(path, []).extend(drawn)
                following.update(dict.fromkeys((*path, one.token) for one in drawn))
            frontier = list(following)
    return merged


def tree_of(trials: Trials) -> TokenTree:
    """The nodes that the target must compute: one a path, whatever the number of its trials."""
    sketch = Sketch()
    nodes: dict[Path, int] = {(): -1}
    for path in sorted(trials, key=len):
        for one in trials[path]:
            nodes[*path, one.token] = sketch.add(one.token, nodes[path], -float(len(path)))
    return sketch.tree()[0]
