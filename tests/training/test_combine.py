"""Each way of combining proposals against its definition, written out place by place."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from training.combine import (
    ABSENT,
    Drafter,
    best,
    distinct,
    drafter,
    features,
    fitted,
    joined,
    mixture,
    stack,
    union,
    vote,
)

VOCABULARY, PLACES = 12, 40


def log_q(seed: int, sharpness: float = 2.0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return (sharpness * torch.randn(PLACES, VOCABULARY, generator=draw)).log_softmax(-1)


def ngram(seed: int) -> Drafter:
    """A lookup that has between none and three tokens."""
    draw = torch.Generator().manual_seed(seed)
    tokens = torch.stack([torch.randperm(VOCABULARY, generator=draw)[:3] for _ in range(PLACES)])
    known = torch.randint(0, 4, (PLACES, 1), generator=draw)
    tokens = tokens.masked_fill(torch.arange(3)[None] >= known, ABSENT)
    return Drafter(tokens, lengths=torch.randint(2, 5, tokens.shape, generator=draw))


def in_turns(lists: list[list[int]], count: int) -> list[int]:
    made: list[int] = []
    for group in itertools.zip_longest(*lists, fillvalue=ABSENT):
        made += [token for token in group if token != ABSENT and token not in made]
        made = list(dict.fromkeys(made))
    return (made + [ABSENT] * count)[:count]


def test_distinct_keeps_the_first_of_equals_in_order() -> None:
    tokens = torch.tensor([[3, 3, ABSENT, 5, 3, 1], [ABSENT] * 6])
    assert distinct(tokens, 4).tolist() == [[3, 5, 1, ABSENT], [ABSENT] * 4]


def test_best_counts_noise() -> None:
    scores, noise = log_q(0), torch.randn(PLACES, VOCABULARY, generator=torch.Generator().manual_seed(1))
    for place in range(PLACES):
        order = sorted(range(VOCABULARY), key=lambda token: -(scores[place, token] + noise[place, token]).item())
        assert best(scores, noise, 5)[place].tolist() == order[:5]


@pytest.mark.parametrize("count", [1, 4, 10])
def test_union_takes_turns(count: int) -> None:
    drafters = [drafter(log_q(0), None, 5), drafter(log_q(1), None, 5), ngram(2)]
    made = union(drafters, count)
    for place in range(PLACES):
        assert made[place].tolist() == in_turns([one.tokens[place].tolist() for one in drafters], count)


def test_votes_come_first_and_equals_stay_in_turns() -> None:
    drafters = [drafter(log_q(0), None, 6), drafter(log_q(1), None, 6), ngram(2)]
    made = vote(drafters, 3, 8)
    for place in range(PLACES):
        lists = [one.tokens[place].tolist() for one in drafters]
        order = [token for token in in_turns(lists, 20) if token != ABSENT]
        order.sort(key=lambda token: -sum(token in tokens[:3] for tokens in lists))
        assert made[place].tolist() == (order + [ABSENT] * 8)[:8]


def test_mixture_is_the_weighted_mean() -> None:
    one, other = log_q(0), log_q(1)
    torch.testing.assert_close(mixture([one, other], (0.3, 0.7)).exp(), 0.3 * one.exp() + 0.7 * other.exp())


def test_features_say_what_each_drafter_says() -> None:
    model, lookup = drafter(log_q(0), None, 4), ngram(2)
    candidates = union([model, lookup], 6)
    noise = log_q(5)
    assert torch.equal(features([model, lookup], candidates, noise)[..., -1], noise.gather(-1, candidates.clamp_min(0)))
    made = features([model, lookup], candidates, None)
    assert model.log_q is not None
    assert lookup.lengths is not None
    for place, at in itertools.product(range(PLACES), range(6)):
        token = int(candidates[place, at])
        if token == ABSENT:
            continue
        ranked = model.tokens[place].tolist()
        rank = ranked.index(token) if token in ranked else 4
        proposed = lookup.tokens[place].tolist()
        length = int(lookup.lengths[place, proposed.index(token)]) if token in proposed else 0
        assert made[place, at].tolist() == pytest.approx(
            [model.log_q[place, token].item(), math.log1p(rank), *(float(length == one) for one in (2, 3, 4))]
        )


def test_stacking_finds_out_whom_to_trust() -> None:
    """The target follows the second model: the combiner learns that, with and without noise."""
    first, second = log_q(0), log_q(1)
    gumbel = -torch.log(-torch.log(torch.rand(first.shape, generator=torch.Generator().manual_seed(3))))
    for noise in (None, gumbel):
        drafters = [drafter(one, noise, 6) for one in (first, second)]
        wanted = best(second, noise, 1)[:, 0]
        known = stack(drafters, noise, wanted)
        made = known.children(fitted(known, noise is not None), 1)[:, 0]
        assert (made == wanted).float().mean() > 0.9
        assert (drafters[0].tokens[:, 0] == wanted).float().mean() < 0.6


def test_stacks_can_be_joined_and_absent_tokens_come_last() -> None:
    drafters = [Drafter(log_q(0).topk(2).indices, log_q(0)), ngram(2)]
    known = stack(drafters, None, log_q(3).argmax(-1))
    twice = joined([known, known])
    assert twice.tokens.shape[0] == 2 * PLACES
    torch.testing.assert_close(fitted(twice, False), fitted(known, False), atol=1e-3, rtol=1e-2)
    for row in twice.children(fitted(twice, False), 5).tolist():
        present = [token for token in row if token != ABSENT]
        assert row == present + [ABSENT] * (5 - len(present))
        assert len(set(present)) == len(present)
