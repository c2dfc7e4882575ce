"""Laws by exhaustive enumeration: every random decision of a round is taken every way, with its probability."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import numpy as np

from ridgeline.run.verify import Choose, Law, Path

Laws = Callable[[Path], Law]


def random_laws(generator: np.random.Generator, vocabulary: int, depth: int, sharpness: float = 1.5) -> Laws:
    """A law of its own behind every path of at most `depth` tokens."""
    table = {
        path: softmax(sharpness * generator.standard_normal(vocabulary))
        for length in range(depth + 1)
        for path in product(range(vocabulary), repeat=length)
    }
    return table.__getitem__


def softmax(scores: np.ndarray) -> Law:
    weights = np.exp(scores - scores.max())
    return weights / weights.sum()


def enumerated(run: Callable[[Choose], Path]) -> dict[Path, float]:
    """The law of what `run` returns: it is run once for each sequence of outcomes that its choices can have."""
    law: dict[Path, float] = {}
    stack: list[tuple[list[int], float]] = [([], 1.0)]
    while stack:
        script, _ = stack.pop()
        weight, asked = 1.0, 0

        def choose(outcomes: Law, script: list[int] = script) -> int:
            nonlocal weight, asked
            if asked == len(script):
                possible = [index for index, chance in enumerate(outcomes) if chance > 0]
                stack.extend(([*script, index], 0.0) for index in possible[1:])
                script.append(possible[0])
            taken = script[asked]
            asked += 1
            weight *= float(outcomes[taken])
            return taken

        out = run(choose)
        law[out] = law.get(out, 0.0) + weight
    assert abs(sum(law.values()) - 1) < 1e-9
    return law


def distance(emitted: dict[Path, float], target: Laws, vocabulary: int, tokens: int) -> float:
    """Total variation between the law of the first `tokens` tokens, rounds being continued by the target where
    they are shorter, and the target's own."""
    found = dict.fromkeys(product(range(vocabulary), repeat=tokens), 0.0)
    for path, weight in emitted.items():
        assert len(path) <= tokens
        for rest in product(range(vocabulary), repeat=tokens - len(path)):
            chance, whole = weight, path
            for token in rest:
                chance *= target(whole)[token]
                whole += (token,)
            found[whole] += chance
    total = 0.0
    for path, weight in found.items():
        chance = 1.0
        for place, token in enumerate(path):
            chance *= target(path[:place])[token]
        total += abs(weight - chance)
    return total / 2
