"""The law of what verification emits, by exhaustive enumeration; and that what breaks it is caught.

Each broken variant is a mutation of the drafter or of the verifier that some project has shipped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
from law import Laws, distance, enumerated, random_laws

from ridgeline.core.tree import Sketch, TokenTree
from ridgeline.run.verify import (
    Choose,
    Law,
    Path,
    Trial,
    draw_children,
    drawing,
    expand,
    multi_step,
    multi_step_at,
    normalized,
    residual,
    target_only,
    tree_of,
)

EXACT = 1e-12
BROKEN = 1e-3

Round = Callable[[Laws, Sequence[Laws], Choose], Path]


def worst(round_: Round, vocabulary: int, depth: int, drafters: int = 1, pairs: int = 5) -> float:
    """The largest distance over random pairs of target and drafters."""
    found = 0.0
    for seed in range(pairs):
        generator = np.random.default_rng(seed)
        target = random_laws(generator, vocabulary, depth)
        laws = [random_laws(generator, vocabulary, depth) for _ in range(drafters)]
        emitted = enumerated(lambda choose, target=target, laws=laws: round_(target, laws, choose))
        found = max(found, distance(emitted, target, vocabulary, depth + 1))
    return found


def sampled(
    widths: Sequence[int],
    replacement: bool = False,
    enough: Callable[[Law, Sequence[int]], bool] | None = None,
) -> Round:
    def round_(target: Laws, laws: Sequence[Laws], choose: Choose) -> Path:
        return multi_step(target, expand(laws, widths, choose, replacement, enough), choose)

    return round_


def unsure(q: Law, before: Sequence[int]) -> bool:
    """A legal pruning: of a drafter's law and of the siblings before, never of the token to come."""
    return q.max() > 0.5 and len(before) >= 1


@pytest.mark.parametrize("replacement", [True, False], ids=["with replacement", "without"])
@pytest.mark.parametrize(
    ("vocabulary", "widths", "drafters"),
    [
        *((5, widths, 1) for widths in ((3,), (1, 1), (2, 1), (1, 1, 1))),
        *((3, widths, 1) for widths in ((1, 2), (1, 1, 1), (2, 2))),
        (4, (2, 1), 1), (2, (2, 2, 1), 1), (4, (1,), 2), (3, (2,), 2), (2, (1, 1), 2), (3, (1, 1), 2), (3, (1,), 3),
    ],
)  # fmt: skip
def test_multi_step_sampling_is_exact(vocabulary: int, widths: Sequence[int], drafters: int, replacement: bool) -> None:
    pairs = 2 if len(widths) > 1 else 5
    assert worst(sampled(widths, replacement), vocabulary, len(widths), drafters, pairs) < EXACT


def test_legal_pruning_is_exact() -> None:
    assert worst(sampled((3,), enough=unsure), 4, 1) < EXACT
    assert worst(sampled((2, 1), enough=unsure), 3, 2, pairs=3) < EXACT


def test_a_drafter_with_less_support_than_asked_for() -> None:
    def round_(target: Laws, laws: Sequence[Laws], choose: Choose) -> Path:
        q = laws[0](()).copy()
        q[2:] = 0
        return multi_step(target, {(): draw_children(normalized(q), 4, choose)}, choose)

    assert worst(round_, 4, 1) < EXACT


def test_a_duplicate_whose_law_is_conditioned_may_be_dropped() -> None:
    """Two drafters, one node a token: the second is drawn from its law without the first's token."""

    def round_(target: Laws, laws: Sequence[Laws], choose: Choose) -> Path:
        first = draw_children(laws[0](()), 1, choose)
        q = laws[1](()).copy()
        token = choose(q)
        if token == first[0].token:
            return multi_step(target, {(): first}, choose)
        q[first[0].token] = 0
        return multi_step(target, {(): [*first, Trial(token, normalized(q), 1)]}, choose)

    assert worst(round_, 4, 1, drafters=2) < EXACT


def best_children(law: Laws, widths: Sequence[int]) -> TokenTree:
    """The likeliest children, decided without randomness."""
    sketch = Sketch()
    frontier: list[tuple[Path, int]] = [((), -1)]
    for width in widths:
        following = []
        for path, node in frontier:
            for token in np.argsort(-law(path), kind="stable")[:width]:
                score = 1.0 if node < 0 else sketch.scores[node]
                following.append(((*path, int(token)), sketch.add(int(token), node, score * law(path)[token])))
        frontier = following
    return sketch.tree()[0]


@pytest.mark.parametrize(
    ("vocabulary", "widths", "drafters"), [(5, (3,), 1), (5, (2, 1), 1), (3, (2, 2, 1), 1), (4, (2, 1), 2)]
)
def test_target_only_is_exact_for_any_deterministic_tree(vocabulary: int, widths: Sequence[int], drafters: int) -> None:
    def round_(target: Laws, laws: Sequence[Laws], choose: Choose) -> Path:
        from ridgeline.core.tree import merged

        return target_only(target, merged(best_children(law, widths) for law in laws), choose)

    assert worst(round_, vocabulary, len(widths), drafters) < EXACT


# What breaks it


def top_k_tested_with_q(target: Laws, laws: Sequence[Laws], choose: Choose) -> Path:
    q = laws[0](())
    best = np.argsort(-q)[:2]
    return multi_step(target, {(): [Trial(int(token), q) for token in best]}, choose)


def siblings_sorted_again(target: Laws, laws: Sequence[Laws], choose: Choose) -> Path:
    q = laws[0](())
    drawn = draw_children(q, 2, choose)
    return multi_step(target, {(): sorted(drawn, key=lambda one: -q[one.token])}, choose)


def siblings_sorted_again_iid(target: Laws, laws: Sequence[Laws], choose: Choose) -> Path:
    q = laws[0](())
    drawn = draw_children(q, 2, choose, replacement=True)
    return multi_step(target, {(): sorted(drawn, key=lambda one: -q[one.token])}, choose)


def pruned_by_the_tokens_own_probability(target: Laws, laws: Sequence[Laws], choose: Choose) -> Path:
    q = laws[0](())
    drawn = draw_children(q, 1, choose)
    return multi_step(target, {(): [one for one in drawn if q[one.token] > 0.3]}, choose)


def pruned_by_path_probability(target: Laws, laws: Sequence[Laws], choose: Choose) -> Path:
    """EAGLE-2's choice of the best nodes, on sampled ones."""
    q = laws[0]
    trials = expand(laws[:1], (2, 1), choose)
    scored = [
        (q(path)[one.token] * (q(())[path[0]] if path else 1.0), path, one)
        for path, some in trials.items()
        for one in some
    ]
    kept = sorted(scored, key=lambda entry: -entry[0])[:2]
    left: dict[Path, list[Trial]] = {}
    for path, some in trials.items():
        left[path] = [one for one in some if any(one is other for _, _, other in kept)]
    return multi_step(target, left, choose)


def merged_without_conditioning(target: Laws, laws: Sequence[Laws], choose: Choose) -> Path:
    trials = expand(laws, (1,), choose)
    seen: dict[int, Trial] = {}
    for one in trials[()]:
        seen.setdefault(one.token, one)
    return multi_step(target, {(): list(seen.values())}, choose)


def wrong_temperature(target: Laws, laws: Sequence[Laws], choose: Choose) -> Path:
    q = laws[0](())
    token = choose(normalized(q**0.5))
    return multi_step(target, {(): [Trial(token, q)]}, choose)


def unconditioned_without_replacement(target: Laws, laws: Sequence[Laws], choose: Choose) -> Path:
    q = laws[0](())
    drawn = draw_children(q, 2, choose)
    return multi_step(target, {(): [Trial(one.token, q) for one in drawn]}, choose)


def residual_loses_the_token_only(target: Laws, laws: Sequence[Laws], choose: Choose) -> Path:
    """The verifier is wrong: a rejection takes only the token itself out, not the whole of q."""
    p, trial = target(()), draw_children(laws[0](()), 1, choose)[0]
    chance = min(1.0, p[trial.token] / trial.q[trial.token])
    if choose(np.array([chance, 1 - chance])) == 0:
        return (trial.token, choose(target((trial.token,))))
    rest = p.copy()
    rest[trial.token] = 0
    return (choose(normalized(rest)),)


def sampled_children_as_if_deterministic(target: Laws, laws: Sequence[Laws], choose: Choose) -> Path:
    """Target-only verification whose own draw decided what is a child."""
    token = choose(target(()))
    tree = TokenTree.chain([token]) if laws[0](())[token] > 0.3 else TokenTree.chain([choose(laws[0](()))])
    following = choose(target(())) if tree.tokens[0] != token else token
    return (following,)


@pytest.mark.parametrize(
    ("mutant", "drafters"),
    [
        (top_k_tested_with_q, 1),
        (siblings_sorted_again, 1),
        (siblings_sorted_again_iid, 1),
        (pruned_by_the_tokens_own_probability, 1),
        (pruned_by_path_probability, 1),
        (merged_without_conditioning, 2),
        (wrong_temperature, 1),
        (unconditioned_without_replacement, 1),
        (residual_loses_the_token_only, 1),
        (sampled_children_as_if_deterministic, 1),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_breaks_the_law_is_caught(mutant: Round, drafters: int) -> None:
    depth = 2 if mutant is pruned_by_path_probability else 1
    assert worst(mutant, 3, depth, drafters) > BROKEN


# Single steps


def test_an_oracle_is_always_accepted() -> None:
    generator = np.random.default_rng(0)
    p = random_laws(generator, 5, 0)(())
    for _ in range(200):
        trials = draw_children(p, 2, drawing(generator))
        assert multi_step_at(p, trials, drawing(generator))[1]
    assert residual(p, p) is None


def test_without_replacement_draws_differ_and_end_with_the_support() -> None:
    generator = np.random.default_rng(0)
    q = np.array([0.5, 0.0, 0.3, 0.2])
    for _ in range(50):
        tokens = [one.token for one in draw_children(q, 9, drawing(generator))]
        assert sorted(tokens) == [0, 2, 3]


def test_a_merged_tree_has_one_node_a_path() -> None:
    generator = np.random.default_rng(3)
    laws = [random_laws(generator, 3, 2) for _ in range(2)]
    trials = expand(laws, (2, 2), drawing(generator), replacement=True)
    tree = tree_of(trials)
    paths = {(*path, one.token) for path, some in trials.items() for one in some}
    assert {tuple(tree.path_tokens(node)) for node in range(len(tree))} == paths
    assert sum(map(len, trials.values())) > len(paths)
    assert {one.source for one in trials[()]} == {0, 1}
