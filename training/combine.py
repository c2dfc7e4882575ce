"""How the proposals of several drafters become the ordered children of one node.

Knows drafters' distributions, noise and lists of tokens, each best first. Union takes turns, voting puts first what
more drafters propose, weighting mixes the distributions (a mixture of experts with fixed weights), stacking (Wolpert,
1992) learns from what a drafter says of a candidate how likely it is. Knows neither models nor trees. Where noise is
given it is the noise that will choose the token, added to each score, so that every way is a coupled draft.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as functional
from torch import Tensor

ABSENT = -1
"""Stands where a list has no token left."""

LOWEST = -20.0
"""Logarithms of probabilities below this tell a combiner nothing more."""

MATCHES = (2, 3, 4)
"""Lengths of n-gram matches that stacking tells apart."""


@dataclass(frozen=True)
class Drafter:
    """What one drafter says at N places: its tokens int64[N, many], best first, ABSENT behind the last one.

    A model also gives its distribution, log_q [N, vocabulary]; an n-gram lookup the length of each token's match.
    """

    tokens: Tensor
    log_q: Tensor | None = None
    lengths: Tensor | None = None


def drafter(log_q: Tensor, noise: Tensor | None, count: int) -> Drafter:
    """A model as a drafter of its best `count` tokens by log_q [N, vocabulary] plus noise."""
    return Drafter(best(log_q, noise, count), log_q)


def best(scores: Tensor, noise: Tensor | None, count: int) -> Tensor:
    """The `count` tokens of the highest scores [N, vocabulary], noise added: int64[N, count]."""
    return (scores if noise is None else scores + noise).topk(count, dim=-1).indices


def distinct(tokens: Tensor, count: int) -> Tensor:
    """The first `count` different tokens of each row of tokens [N, many], in their order, ABSENT behind them."""
    same = tokens[:, :, None] == tokens[:, None, :]
    dropped = same.tril(-1).any(-1) | (tokens == ABSENT)
    order = dropped.to(torch.int8).argsort(dim=-1, stable=True)
    return tokens.gather(-1, order).masked_fill(dropped.gather(-1, order), ABSENT)[:, :count]


def union(drafters: Sequence[Drafter], count: int) -> Tensor:
    """Everybody's best, then everybody's second, and so on, each token once: int64[N, count]."""
    most = max(one.tokens.shape[1] for one in drafters)
    padded = [functional.pad(one.tokens, (0, most - one.tokens.shape[1]), value=ABSENT) for one in drafters]
    return distinct(torch.stack(padded, -1).flatten(1), count)


def vote(drafters: Sequence[Drafter], proposals: int, count: int) -> Tensor:
    """What more drafters have among their first `proposals` comes first; equals in the order of `union`."""
    candidates = union(drafters, sum(one.tokens.shape[1] for one in drafters))
    votes = torch.zeros_like(candidates)
    for one in drafters:
        votes += (candidates[:, :, None] == one.tokens[:, None, :proposals]).any(-1)
    votes = votes.masked_fill(candidates == ABSENT, -1)
    return candidates.gather(-1, votes.argsort(dim=-1, descending=True, stable=True))[:, :count]


def mixture(log_qs: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    """Logarithm [N, vocabulary] of the mean of distributions, weighted by shares that add up to 1."""
    weights = torch.tensor(shares, device=log_qs[0].device).log()
    return torch.logsumexp(torch.stack([log_q + weight for log_q, weight in zip(log_qs, weights)]), 0)


def features(drafters: Sequence[Drafter], candidates: Tensor) -> Tensor:
    """What the drafters say of candidates [N, many]: float32[N, many, features].

    Two of each model: log q, and the logarithm of 1 + the rank by q, without noise, of as many ranks as the drafter has
    tokens. One of each length of match of an n-gram lookup: whether it proposes the candidate on such a match.
    """
    found = []
    for one in drafters:
        if one.log_q is not None:
            found.append(one.log_q.gather(-1, candidates.clamp_min(0)).clamp_min(LOWEST))
            known = one.tokens.shape[1]
            same = candidates[:, :, None] == best(one.log_q, None, known)[:, None, :]
            rank = torch.where(same.any(-1), same.to(torch.int8).argmax(-1), known)
            found.append(torch.log1p(rank.float()))
        elif one.lengths is not None:
            same = (candidates[:, :, None] == one.tokens[:, None, :]) & (one.tokens[:, None, :] != ABSENT)
            found += [(same & (one.lengths[:, None, :] == length)).any(-1).float() for length in MATCHES]
    return torch.stack(found, -1)


@dataclass(frozen=True)
class Stack:
    """Candidates of N places with what is known of them: tokens and noise [N, many], features [N, many, features], and
    goals [N, many], the probability that each is the target's token."""

    tokens: Tensor
    noise: Tensor | None
    features: Tensor
    goals: Tensor

    def scores(self, weights: Tensor) -> Tensor:
        """Logarithms of probabilities up to a constant of each place; nothing for ABSENT."""
        return (self.features.to(weights) @ weights).masked_fill(self.tokens == ABSENT, float("-inf"))

    def children(self, weights: Tensor, count: int) -> Tensor:
        """The candidates by their scores plus noise, best first: int64[N, count]."""
        scores = self.scores(weights)
        order = (scores if self.noise is None else scores + self.noise).argsort(dim=-1, descending=True, stable=True)
        return self.tokens.gather(-1, order)[:, :count]

    def where(self, places: Tensor) -> Stack:
        """The same of some places, bool[N]."""
        noise = None if self.noise is None else self.noise[places]
        return Stack(self.tokens[places], noise, self.features[places], self.goals[places])


def stack(drafters: Sequence[Drafter], noise: Tensor | None, goals: Tensor) -> Stack:
    """The candidates of all drafters; noise and goals [N, vocabulary]."""
    tokens = union(drafters, sum(one.tokens.shape[1] for one in drafters))
    known = tokens != ABSENT
    ids = tokens.clamp_min(0)
    return Stack(
        tokens,
        None if noise is None else noise.gather(-1, ids),
        features(drafters, tokens),
        goals.gather(-1, ids) * known,
    )


def joined(stacks: Sequence[Stack]) -> Stack:
    """Several stacks of the same drafters, one behind the other."""
    noise = [one.noise for one in stacks if one.noise is not None]
    return Stack(
        torch.cat([one.tokens for one in stacks]),
        torch.cat(noise) if noise else None,
        torch.cat([one.features for one in stacks]),
        torch.cat([one.goals for one in stacks]),
    )


def fitted(known: Stack, penalty: float = 1e-3) -> Tensor:
    """Weights float64[features] by which a softmax of the scores comes nearest to the goals (a conditional logit),
    held near those that trust the first drafter, a model, alone."""
    prior = torch.zeros(known.features.shape[-1], dtype=torch.float64, device=known.features.device)
    prior[0] = 1.0
    weights = prior.clone().requires_grad_()
    absent = known.tokens == ABSENT
    goals, inputs = known.goals.double(), known.features.double()
    optimizer = torch.optim.LBFGS([weights], max_iter=60, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        log_shares = functional.log_softmax((inputs @ weights).masked_fill(absent, -1e4), -1)
        value = -(goals * log_shares).sum() / goals.sum().clamp_min(1e-9) + penalty * (weights - prior).square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return weights.detach()
