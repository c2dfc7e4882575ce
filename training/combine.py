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


def features(drafters: Sequence[Drafter], candidates: Tensor, noise: Tensor | None) -> Tensor:
    """What is known of candidates [N, many] before the target speaks: float32[N, many, features].

    Two of each model: log q, and the logarithm of 1 + the rank by q, without noise, of as many ranks as the drafter has
    tokens. One of each length of match of an n-gram lookup: whether it proposes the candidate on such a match. With
    noise [N, vocabulary], the candidate's noise comes last.
    """
    ids = candidates.clamp_min(0)
    found = []
    for one in drafters:
        if one.log_q is not None:
            found.append(one.log_q.gather(-1, ids).clamp_min(LOWEST))
            known = one.tokens.shape[1]
            same = candidates[:, :, None] == best(one.log_q, None, known)[:, None, :]
            rank = torch.where(same.any(-1), same.to(torch.int8).argmax(-1), known)
            found.append(torch.log1p(rank.float()))
        elif one.lengths is not None:
            same = (candidates[:, :, None] == one.tokens[:, None, :]) & (one.tokens[:, None, :] != ABSENT)
            found += [(same & (one.lengths[:, None, :] == length)).any(-1).float() for length in MATCHES]
    return torch.stack(found if noise is None else [*found, noise.gather(-1, ids)], -1)


@dataclass(frozen=True)
class Stack:
    """Candidates of N places: tokens [N, many], features [N, many, features], and which one, if any, the target chose,
    bool[N, many]."""

    tokens: Tensor
    features: Tensor
    chosen: Tensor

    def children(self, weights: Tensor, count: int) -> Tensor:
        """The candidates by their scores, best first, ABSENT last: int64[N, count]."""
        scores = (self.features.to(weights) @ weights).masked_fill(self.tokens == ABSENT, float("-inf"))
        return self.tokens.gather(-1, scores.argsort(dim=-1, descending=True, stable=True))[:, :count]


def stack(drafters: Sequence[Drafter], noise: Tensor | None, chosen: Tensor) -> Stack:
    """The candidates of all drafters; noise [N, vocabulary], and the target's tokens int64[N]."""
    tokens = union(drafters, sum(one.tokens.shape[1] for one in drafters))
    return Stack(tokens, features(drafters, tokens, noise), tokens == chosen[:, None])


def joined(stacks: Sequence[Stack]) -> Stack:
    """Several stacks of the same drafters, one behind the other."""
    return Stack(
        torch.cat([one.tokens for one in stacks]),
        torch.cat([one.features for one in stacks]),
        torch.cat([one.chosen for one in stacks]),
    )


def fitted(known: Stack, noisy: bool, penalty: float = 1e-3) -> Tensor:
    """Weights float64[features] by which a softmax of the scores best tells the chosen candidates (a conditional
    logit), held near those that trust the first drafter, a model, alone; `noisy` says that noise is the last feature.

    The noise is a feature like the others because it is known when a tree is drafted: with it the scores tell
    what the target will choose here, not what it would choose in the mean.
    """
    prior = torch.zeros(known.features.shape[-1], dtype=torch.float64, device=known.features.device)
    prior[0] = 1.0
    if noisy:
        prior[-1] = 1.0
    weights = prior.clone().requires_grad_()
    told = known.chosen.any(-1)
    absent, inputs = (known.tokens == ABSENT)[told], known.features[told].double()
    goals = known.chosen[told].to(torch.int8).argmax(-1)
    optimizer = torch.optim.LBFGS([weights], max_iter=60, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        scores = (inputs @ weights).masked_fill(absent, -1e4)
        value = functional.cross_entropy(scores, goals) + penalty * (weights - prior).square().sum()
        value.backward()
        return value

    if len(goals):
        optimizer.step(loss)
    return weights.detach()
