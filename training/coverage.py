"""How often, and how deep, the target's tokens are among what small models propose, at equal verified nodes.

Knows models, token rows and ways of combining. Works with the engine's own noise and n-gram index, and with nothing
else of the engine: at a temperature T the target's token is argmax(log p / T + G), a drafter's children the best of
log q / T + G, with G from (seed, position) alone (ops/sample.py). All follows from one number a position: the place of
the target's token among the children that a way of combining puts in order. A static tree is a set of paths of
places; it is chosen on half of the rows for the most accepted tokens and measured on the other half, as is all that is
learned (weights, shares), and then the other way round.

Most ways order the children of every node, whoever drafted the nodes above. Two do not: "apart" merges whole trees, one
of each drafter (SpecInfer's merge by path), and "chain" spends some nodes on what followed the last n-gram, if it was
there before. Their equal nodes are counted twice, so they verify at most as many nodes as it says.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import takewhile
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ridgeline.ops.sample import gumbel, lowest_argmax
from ridgeline.speculate.ngram import BRANCHES, SuffixIndex
from training.combine import (
    ABSENT,
    Drafter,
    Stack,
    best,
    drafter,
    fitted,
    joined,
    mixture,
    stack,
    union,
    vote,
)
from training.model import Llama, Memory

CHILDREN = 16
"""Children of one node, at most."""

COVERED = (1, 2, 4, 8)
"""Verified nodes at which coverage of the next token is reported."""

NODES = (2, 4, 8, 16, 32, 64)
"""Nodes of the trees."""

DEPTH = 6
"""Tokens on a tree's longest path."""

TEMPERATURES = (0.0, 0.8)

SHARES = (0.2, 0.35, 0.5, 0.65, 0.8)
"""Shares of the first model in a mixture of two, the likeliest of which is taken."""

VOTED = 4
"""Proposals of each model that count as its votes."""

CHAINS = (0, 1, 2, 3, 4, 6)
"""Nodes that a chain behind an n-gram match may have."""

LOOP_TOKENS, LOOP_TIMES = 8, 3
"""A continuation that says so many tokens so often is looping."""

GAIN = 1.08
"""Accepted tokens a verified node, beside one small model at equal nodes, from which a second drafter pays."""

JUDGED = (8, 16, 32)
"""Nodes of the trees by which that is judged, in the mean."""


@dataclass
class Rows:
    """Texts of one length of continuation: ids of each row, how many of them are the opening, and each row's seed."""

    ids: list[Tensor]
    known: list[int]
    count: int

    def seed(self, row: int) -> int:
        return row + 1

    def looping(self) -> list[bool]:
        """Whether a row's continuation repeats a run of LOOP_TOKENS tokens LOOP_TIMES times or more."""
        found = []
        for ids, known in zip(self.ids, self.known):
            made = ids[known:].tolist()
            runs = Counter(tuple(made[at : at + LOOP_TOKENS]) for at in range(len(made) - LOOP_TOKENS + 1))
            found.append(max(runs.values(), default=0) >= LOOP_TIMES)
        return found


@torch.no_grad()
def continued(target: Llama, openings: Sequence[Tensor], count: int, temperature: float) -> Rows:
    """Each opening int64[tokens] continued by the target for `count` tokens, row r with the noise of seed r + 1.

    Neighbours of equal length go together."""
    rows = Rows([], [len(one) for one in openings], count)
    first = 0
    while first < len(openings):
        last = first
        while last < len(openings) and len(openings[last]) == len(openings[first]):
            last += 1
        group = torch.stack(list(openings[first:last]))
        seeds = torch.tensor([rows.seed(row) for row in range(first, last)], device=group.device)
        rows.ids += list(_continued_together(target, group, count, temperature, seeds))
        first = last
    return rows


def _continued_together(target: Llama, ids: Tensor, count: int, temperature: float, seeds: Tensor) -> Tensor:
    weight = target.model.embed_tokens.weight
    memory = Memory(target.sizes, len(ids), ids.shape[1] + count, ids.device, weight.dtype)
    hidden = target.hidden(ids, memory)[:, -1]
    for place in range(ids.shape[1], ids.shape[1] + count):
        logits = torch.nn.functional.linear(hidden, weight).float()
        if temperature:
            places = torch.full_like(seeds, place)
            logits = logits.log_softmax(-1) / temperature + gumbel(seeds, places, logits.shape[-1])
        ids = torch.cat((ids, lowest_argmax(logits)[:, None]), 1)
        if place < memory.keys[0].shape[2] - 1:
            hidden = target.hidden(ids[:, -1:], memory)[:, -1]
    return ids


def lookups(ids: Tensor, known: int) -> tuple[Tensor, Tensor, Tensor]:
    """What an n-gram lookup proposes for each continued position: tokens and lengths of match, int64[count, BRANCHES],
    ABSENT where there is none; and how many of the DEPTH tokens behind the best match are those of the row,
    int64[count], ABSENT without a match. The lookup knows the row up to that position."""
    tokens = ids.tolist()
    proposals = torch.full((len(tokens) - known, BRANCHES), ABSENT)
    lengths, runs = torch.zeros_like(proposals), proposals[:, 0].clone()
    index = SuffixIndex()
    for place in range(known, len(tokens)):
        before = tokens[:place]
        index.extend(before)
        seen: dict[int, int] = {}
        for length, at in index.matches(before):
            if not seen:
                ahead = zip(before[at : at + DEPTH], tokens[place:])
                runs[place - known] = len(list(takewhile(lambda pair: pair[0] == pair[1], ahead)))
            seen.setdefault(before[at], length)
        for branch, (token, length) in enumerate(seen.items()):
            proposals[place - known, branch], lengths[place - known, branch] = token, length
    return proposals, lengths, runs


@dataclass(frozen=True)
class Places:
    """Everything about the continued positions of one row: the target's tokens [N], the noise (None: greedy), each
    drafter, and how far n-gram matches run [N]."""

    chosen: Tensor
    noise: Tensor | None
    drafters: dict[str, Drafter]
    runs: Tensor


NGRAM = "n-gram"


@torch.no_grad()
def places(models: Mapping[str, Llama], rows: Rows, temperature: float) -> Iterator[Places]:
    """The positions of one row after the other."""
    for row, (ids, known) in enumerate(zip(rows.ids, rows.known)):
        inputs = ids[None, :-1]
        noise = None
        if temperature:
            at = torch.arange(known, len(ids), device=ids.device)
            vocabulary = next(iter(models.values())).sizes.vocab_size
            noise = gumbel(torch.full_like(at, rows.seed(row)), at, vocabulary)
        drafters = {}
        for name, model in models.items():
            logits = model(inputs)[0, known - 1 :].float() / (temperature or 1.0)
            drafters[name] = drafter(logits.log_softmax(-1), noise, CHILDREN)
        tokens, lengths, runs = lookups(ids, known)
        drafters[NGRAM] = Drafter(tokens.to(ids.device), lengths=lengths.to(ids.device))
        yield Places(ids[known:], noise, drafters, runs)


def found_at(children: Tensor, chosen: Tensor) -> Tensor:
    """The place of each chosen token [N] among its children [N, many], or CHILDREN if it is not there: int64[N]."""
    same = children == chosen[:, None]
    return torch.where(same.any(-1), same.to(torch.int8).argmax(-1), CHILDREN)


Combination = Callable[[Places, Sequence[str]], Tensor]
COMBINATIONS: dict[str, Combination] = {
    "union": lambda at, names: union([at.drafters[name] for name in names], CHILDREN),
    "voting": lambda at, names: vote([at.drafters[name] for name in names], VOTED, CHILDREN),
}


@dataclass(frozen=True)
class Arm:
    """One way of drafting: which drafters, combined how ("" for one alone)."""

    names: tuple[str, ...]
    way: str = ""

    def __str__(self) -> str:
        return " + ".join(self.names) + (f", {self.way}" if self.way else "")


def arms_of(models: Sequence[str]) -> list[Arm]:
    """Every model alone, the first with each other one in every way, the first with n-grams. The first one stacked
    alone shows what of a stack's gain comes from calibration."""
    first, *others = models
    arms = [Arm((name,)) for name in (*models, NGRAM)] + [Arm((first,), "stacking")]
    for name in others:
        arms += [Arm((first, name), way) for way in (*COMBINATIONS, "weighting", "stacking")]
    return [*arms, *(Arm((first, NGRAM), way) for way in ("union", "stacking"))]


@dataclass
class _Gathered:
    """What one arm leaves of each row: where the target's tokens were found, or what that still depends on."""

    found: list[Tensor] = field(default_factory=list)
    by_share: list[Tensor] = field(default_factory=list)
    likelihood: list[Tensor] = field(default_factory=list)
    stacks: list[Stack] = field(default_factory=list)

    def take(self, arm: Arm, at: Places) -> None:
        if not arm.way:
            self.found.append(found_at(at.drafters[arm.names[0]].tokens, at.chosen))
        elif arm.way in COMBINATIONS:
            self.found.append(found_at(COMBINATIONS[arm.way](at, arm.names), at.chosen))
        elif arm.way == "weighting":
            log_qs = [log_q for name in arm.names if (log_q := at.drafters[name].log_q) is not None]
            mixed = [mixture(log_qs, (share, 1 - share)) for share in SHARES]
            self.by_share.append(torch.stack([found_at(best(log_q, at.noise, CHILDREN), at.chosen) for log_q in mixed]))
            self.likelihood.append(torch.stack([log_q.gather(-1, at.chosen[:, None]).mean() for log_q in mixed]))
        else:
            self.stacks.append(stack([at.drafters[name] for name in arm.names], at.noise, at.chosen))

    def settle(self, arm: Arm, rows: Rows, noisy: bool) -> tuple[np.ndarray, list[list[float]]]:
        """Places int64[rows, count], and what was learned on the other half of the rows, for each half."""
        count = len(rows.ids)
        learned: list[list[float]] = []
        if arm.way in ("", *COMBINATIONS):
            return torch.stack(self.found).cpu().numpy(), learned
        found = torch.empty(count, rows.count, dtype=torch.int64)
        for half in (0, 1):
            mine, others = range(half, count, 2), range(1 - half, count, 2)
            if arm.way == "weighting":
                share = int(torch.stack([self.likelihood[row] for row in others]).mean(0).argmax())
                learned.append([SHARES[share]])
                for row in mine:
                    found[row] = self.by_share[row][share].cpu()
            else:
                weights = fitted(joined([self.stacks[row] for row in others]), noisy)
                learned.append(weights.tolist())
                for row in mine:
                    chosen = rows.ids[row][rows.known[row] :]
                    found[row] = found_at(self.stacks[row].children(weights, CHILDREN), chosen).cpu()
        return found.numpy(), learned


Found = tuple[np.ndarray, ...]
"""The place of the target's token in one list of children, int64[rows, count], or in each of several lists."""


def grown(law: Sequence[float], nodes: int, depth: int) -> list[tuple[int, ...]]:
    """The paths of the tree of so many nodes, at most `depth` deep, that holds the target's tokens longest.

    law: how often the target's token stands at each place among a node's children, taken to be the same at every node
    and independent of the nodes above. A path's value is the product along it; values fall along paths and from place
    to place, so the best nodes form a tree (Sequoia's positional trees, Chen et al., 2024, without its dynamic
    programme).
    """
    order = sorted(range(len(law)), key=lambda place: -law[place])
    heap: list[tuple[float, tuple[int, ...]]] = [(-law[order[0]], (0,))]
    paths: list[tuple[int, ...]] = []
    while heap and len(paths) < nodes:
        value, path = heapq.heappop(heap)
        paths.append(tuple(order[at] for at in path))
        above = value / law[order[path[-1]]] if law[order[path[-1]]] else 0.0
        if path[-1] + 1 < len(order):
            heapq.heappush(heap, (above * law[order[path[-1] + 1]], (*path[:-1], path[-1] + 1)))
        if len(path) < depth:
            heapq.heappush(heap, (value * law[order[0]], (*path, 0)))
    return paths


def accepted(paths: Sequence[tuple[int, ...]], found: np.ndarray, depth: int = DEPTH) -> np.ndarray:
    """Tokens that a static tree would have had accepted at each start, int64[rows, starts], for places found [rows,
    count]; the last starts are those with `depth` positions left."""
    numbers = {(): 1, **{path: number for number, path in enumerate(paths, 2)}}
    table = np.zeros((len(paths) + 2, CHILDREN + 1), dtype=np.int64)
    for path in paths:
        table[numbers[path[:-1]], path[-1]] = numbers[path]
    starts = found.shape[1] - depth + 1
    state = np.ones((len(found), starts), dtype=np.int64)
    total = np.zeros_like(state)
    for distance in range(depth):
        state = table[state, found[:, distance : distance + starts]]
        total += state > 0
    return total


def law_of(found: np.ndarray) -> list[float]:
    """How often the target's token stands at each of the CHILDREN places."""
    return (np.bincount(found.ravel(), minlength=CHILDREN + 1)[:CHILDREN] / max(found.size, 1)).tolist()


def by_depth(found: np.ndarray, width: int, depth: int = DEPTH) -> list[float]:
    """Share of the target's tokens among the first `width` places at each depth, where those above all were."""
    starts = found.shape[1] - depth + 1
    reached = np.ones((len(found), starts), dtype=bool)
    shares = []
    for distance in range(depth):
        now = reached & (found[:, distance : distance + starts] < width)
        shares.append(float(now.sum() / max(reached.sum(), 1)))
        reached = now
    return shares


def parts(count: int, among: int) -> list[int]:
    """So many nodes shared out evenly, those before the others."""
    return [count // among + (one < count % among) for one in range(among)]


def covered(found: Found, count: int) -> float:
    """Share of the target's tokens among `count` proposals, shared out evenly where there are several lists."""
    each = [places_found < part for places_found, part in zip(found, parts(count, len(found)))]
    return float(np.logical_or.reduce(each).mean())


def tree_accepted(found: Found, nodes: int) -> np.ndarray:
    """Accepted tokens of each row in the mean, float64[rows]: each half by the trees that suit the other half. With
    several lists of places, each has a tree of its share of the nodes, and the one that goes deeper counts."""
    means = np.empty(len(found[0]))
    for half in (0, 1):
        tokens = [
            accepted(grown(law_of(one[1 - half :: 2]), part, DEPTH), one[half::2])
            for one, part in zip(found, parts(nodes, len(found)))
        ]
        means[half::2] = np.maximum.reduce(tokens).mean(1)
    return means


def chain_accepted(found: np.ndarray, runs: np.ndarray, nodes: int) -> np.ndarray:
    """As `tree_accepted`, where a start with an n-gram match spends some nodes on a chain of what followed it.

    runs: tokens of that chain that are right, int64[rows, count], ABSENT without a match. How many nodes it gets, none
    included, is chosen on the other half too.
    """
    means = np.empty(len(found))
    for half in (0, 1):
        law = law_of(found[1 - half :: 2])
        whole = grown(law, nodes, DEPTH)

        def tokens(rows: slice, chain: int, law: list[float] = law, whole: list[tuple[int, ...]] = whole) -> np.ndarray:
            alone = accepted(whole, found[rows])
            ahead = runs[rows, : alone.shape[1]]
            beside = np.maximum(accepted(grown(law, nodes - chain, DEPTH), found[rows]), np.minimum(ahead, chain))
            return np.where(ahead == ABSENT, alone, beside).mean(1)

        others, mine = slice(1 - half, None, 2), slice(half, None, 2)
        chain = max((one for one in CHAINS if one < nodes), key=lambda one: tokens(others, one).mean())
        means[mine] = tokens(mine, chain)
    return means


def gain(mine: np.ndarray, theirs: np.ndarray, resamples: int = 1000) -> list[float]:
    """Ratio of sums over rows, with its 95 % interval by resampling rows: [ratio, low, high]."""
    draw = np.random.default_rng(0)
    chosen = draw.integers(len(mine), size=(resamples, len(mine)))
    ratios = mine[chosen].sum(1) / np.maximum(theirs[chosen].sum(1), 1e-12)
    ratio = mine.sum() / max(theirs.sum(), 1e-12)
    return [float(ratio), *(float(one) for one in np.quantile(ratios, (0.025, 0.975)))]


def summary(found: Mapping[str, Found], runs: np.ndarray, reference: str) -> dict[str, Any]:
    """The figures of each arm; trees beside those of the `reference` at equal nodes."""
    beside = {nodes: tree_accepted(found[reference], nodes) for nodes in NODES}

    def trees(accepted_of: Callable[[int], np.ndarray]) -> dict[str, Any]:
        made = {}
        for nodes in NODES:
            tokens = accepted_of(nodes)
            made[str(nodes)] = {
                "accepted": round(float(tokens.mean()), 4),
                "accepted_a_node": round(float(tokens.mean() / nodes), 5),
                "beside_first": [round(one, 4) for one in gain(tokens, beside[nodes])],
            }
        return made

    arms: dict[str, Any] = {}
    for name, lists in found.items():
        arms[name] = {
            "covered": {str(count): round(covered(lists, count), 4) for count in COVERED},
            "trees": trees(partial(tree_accepted, lists)),
        }
        if len(lists) == 1:
            arms[name]["law"] = [round(share, 4) for share in law_of(lists[0])[:8]]
            arms[name]["by_depth"] = {
                str(width): [round(one, 4) for one in by_depth(lists[0], width)] for width in (1, 4)
            }
    arms[f"{reference} + {NGRAM}, chain"] = {
        "covered": {},
        "trees": trees(partial(chain_accepted, found[reference][0], runs)),
    }
    return arms


def report(models: Mapping[str, Llama], rows: Rows, temperature: float) -> dict[str, Any]:
    """All arms on all rows, and on the rows that do not loop. `models`: the first small model comes first; the rows are
    those that `continued` made at this temperature."""
    arms = arms_of(list(models))
    gathered = [_Gathered() for _ in arms]
    runs_of_rows = []
    for at in places(models, rows, temperature):
        runs_of_rows.append(at.runs.numpy())
        for arm, one in zip(arms, gathered):
            one.take(arm, at)
    found: dict[str, Found] = {}
    learned = {}
    for arm, one in zip(arms, gathered):
        places_found, what = one.settle(arm, rows, temperature > 0)
        found[str(arm)] = (places_found,)
        if what:
            learned[str(arm)] = what
    first, *others = models
    for name in (*others, NGRAM):
        found[f"{first} + {name}, apart"] = (*found[first], *found[name])
    runs = np.stack(runs_of_rows)
    steady = [row for row, loops in enumerate(rows.looping()) if not loops]
    made: dict[str, Any] = {
        "temperature": temperature,
        "rows": len(rows.ids),
        "looping_rows": len(rows.ids) - len(steady),
        "continued_tokens": rows.count,
        "learned": learned,
        "arms": summary(found, runs, first),
    }
    if len(steady) >= 4:
        some = {name: tuple(one[steady] for one in lists) for name, lists in found.items()}
        made["arms_without_loops"] = summary(some, runs[steady], first)
    return made


def costs(parameters: Mapping[str, int], bytes_a_parameter: int = 2) -> dict[str, dict[str, int]]:
    """What drafting one level of a tree costs each set of drafters: bytes of weights read, and passes."""
    made: dict[str, dict[str, int]] = {}
    for arm in arms_of(list(parameters)):
        reading = [parameters[name] for name in arm.names if name in parameters]
        made[" + ".join(arm.names)] = {"bytes": bytes_a_parameter * sum(reading), "passes": len(reading)}
    return made


def judged(arm: str, reports: Sequence[Mapping[str, Any]]) -> float:
    """Accepted tokens a verified node beside one small model: the mean over JUDGED trees, in the worst report."""
    return min(
        float(np.mean([one["arms"][arm]["trees"][str(nodes)]["beside_first"][0] for nodes in JUDGED]))
        for one in reports
    )
