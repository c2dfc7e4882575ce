"""The joint law of the first three tokens, drawn with the ops that serve: drafts from `propose`, choices from `sample`,
the walk of `accept`, rounds until three tokens are out. Chi-square against the exact law, seeds fixed.

A million draws on a GPU, through its kernels; some thousands on a CPU, through the references. What breaks exactness
must be found by the same test.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch

from ridgeline.kernels.select import load_kernels
from ridgeline.ops import REGISTRY

TOKENS = 5
LENGTH = 3
VOCABULARY = {"cuda": 4500, "cpu": 9}
"""More than two stretches of the GPU's kernels: the tokens of the law lie far apart, all others are impossible."""

WIDTHS = (2, 2)
"""Of a round's tree: it has 2 + 4 nodes."""

ALPHA = 1e-3
LAWS = 4
"""Tests that share ALPHA (Bonferroni): two temperatures, with a drafter that is near and one that is far."""

Path = tuple[int, ...]
Broken = str | None


def places(device: str) -> torch.Tensor:
    """Ids of the law's tokens."""
    return torch.tensor([0, 2047, 2048, 4097, 4499] if device == "cuda" else [0, 2, 3, 7, 8], device=device)


def logits_of(seed: int) -> dict[Path, torch.Tensor]:
    """A law for each path of up to two tokens."""
    generator = torch.Generator().manual_seed(seed)
    paths = [path for length in range(LENGTH) for path in product(range(TOKENS), repeat=length)]
    return {path: 1.5 * torch.randn(TOKENS, generator=generator) for path in paths}


def joint(logits: dict[Path, torch.Tensor], temperature: float) -> torch.Tensor:
    """Exact probabilities [TOKENS ** LENGTH], the last token fastest."""
    laws = {path: (one.double() / temperature).softmax(0) for path, one in logits.items()}
    return torch.stack(
        [
            torch.stack([laws[path[:at]][path[at]] for at in range(LENGTH)]).prod()
            for path in product(range(TOKENS), repeat=LENGTH)
        ]
    )


class Drawing:
    """Rounds of speculation for many seeds at once."""

    def __init__(
        self,
        device: str,
        target: dict[Path, torch.Tensor],
        draft: dict[Path, torch.Tensor],
        heat: float,
        broken: Broken,
    ) -> None:
        self.device, self.heat, self.broken = device, heat, broken
        self.places = places(device)
        self.index = torch.full((VOCABULARY[device],), -1, device=device)
        self.index[self.places] = torch.arange(TOKENS, device=device)
        self.target, self.draft = (self._table(one) for one in (target, draft))
        self.ops: dict[str, Callable[..., Any]] = {}
        for name in ("propose", "sample", "accept"):
            op = REGISTRY[name]
            self.ops[name] = op.kernels["triton"].call if device == "cuda" else op.reference
        self.accepted = 0

    def _table(self, logits: dict[Path, torch.Tensor]) -> torch.Tensor:
        """[paths, vocabulary] logits by the number of a path."""
        table = torch.full((len(logits), VOCABULARY[self.device]), float("-inf"), device=self.device)
        for number, path in enumerate(logits):
            table[number, self.places] = logits[path].to(self.device)
        return table

    def path_number(self, path: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
        """The place of paths [N, LENGTH] of these lengths [N] in a table: shorter ones come first."""
        number = torch.zeros_like(length)
        for at in range(LENGTH - 1):
            longer = length > at
            number = torch.where(longer, number * TOKENS + path[:, at], number)
        before = torch.tensor([0, 1, 1 + TOKENS, 1 + TOKENS + TOKENS**2], device=self.device)
        return before[length] + number

    def choose(self, path: torch.Tensor, length: torch.Tensor, seeds: torch.Tensor) -> torch.Tensor:
        rows = length.shape[0]
        ones = torch.ones(rows, device=self.device)
        places = torch.zeros_like(length) if self.broken == "one noise for all positions" else length
        logits = self.target[self.path_number(path, length)]
        heat = self.heat * (0.8 if self.broken == "another temperature" else 1.0)
        chosen = self.ops["sample"](
            logits, heat * ones, ones.long(), ones, ones, seeds.contiguous(), places.contiguous(), False, False
        )
        return self.index[chosen]

    def propose(self, path: torch.Tensor, length: torch.Tensor, seeds: torch.Tensor, count: int) -> torch.Tensor:
        logits = self.draft[self.path_number(path, length)]
        heat = torch.full((length.shape[0],), self.heat, device=self.device)
        tokens, _ = self.ops["propose"](logits, heat, seeds.contiguous(), length.contiguous(), False, count)
        return self.index[tokens]

    def draw(self, seeds: torch.Tensor) -> torch.Tensor:
        """Three tokens for each seed, [N, LENGTH], by rounds."""
        count = seeds.shape[0]
        path = torch.zeros(count, LENGTH, dtype=torch.long, device=self.device)
        length = torch.zeros(count, dtype=torch.long, device=self.device)
        while bool((length < LENGTH).any()):
            at = (length < LENGTH).nonzero()[:, 0]
            more, emitted = self._round(path[at], length[at], seeds[at])
            for depth in range(1 + len(WIDTHS)):
                real = (depth < more) & (length[at] + depth < LENGTH)
                path[at[real], length[at[real]] + depth] = emitted[real, depth]
            length[at] += more
        return path

    def _round(
        self, path: torch.Tensor, length: torch.Tensor, seeds: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A tree for each, verified: how many tokens come out (past the third ones are drawn too), and which."""
        count, device = length.shape[0], self.device
        # Depth first: child, its two children, the other child, its two.
        parents = [-1, 0, 0, -1, 3, 3]
        depths = [1, 2, 2, 1, 2, 2]
        nodes = len(parents)
        paths, ids = [path], [torch.zeros_like(length)]
        first = self.propose(path, length, seeds, WIDTHS[0])
        for branch in range(WIDTHS[0]):
            own = self._with(path, length, first[:, branch])
            below = self.propose(own, (length + 1).clamp(max=LENGTH - 1), seeds, WIDTHS[1])
            ids += [first[:, branch], below[:, 0], below[:, 1]]
            paths += [own, *(self._with(own, length + 1, below[:, child]) for child in range(WIDTHS[1]))]
        rows = torch.stack(ids, 1).flatten()
        lengths = torch.stack([length + depth for depth in (0, *depths)], 1).clamp(max=LENGTH - 1).flatten()
        chosen = self.choose(torch.stack(paths, 1).flatten(0, 1), lengths, seeds.repeat_interleave(1 + nodes))
        starts = torch.arange(count + 1, dtype=torch.int32, device=device) * (1 + nodes)
        roots = starts[:-1, None].long()
        above = torch.tensor(parents, device=device) + 1
        parent_rows = torch.cat((torch.full_like(roots, -1), roots + above), 1).flatten()
        bits = torch.tensor([0, 0b1, 0b11, 0b101, 0b1000, 0b11000, 0b101000], dtype=torch.int32, device=device)
        # Slots far from those of the nodes before them, so that every accepted node is told.
        source, _ = self.ops["accept"](
            chosen.contiguous(), rows.contiguous(), parent_rows,
            torch.stack([length + depth for depth in (0, *depths)], 1).flatten(),
            torch.arange(rows.shape[0], device=device), bits.repeat(count)[:, None].contiguous(), starts,
            torch.full((count,), nodes, dtype=torch.int32, device=device), nodes,
        )  # fmt: skip
        chosen = chosen.view(count, 1 + nodes)
        emitted = torch.zeros(count, 1 + len(WIDTHS), dtype=torch.long, device=device)
        emitted[:, 0] = chosen[:, 0]
        at = torch.zeros_like(length)
        more = torch.ones_like(length)
        going = torch.ones_like(length, dtype=torch.bool)
        for depth in range(len(WIDTHS)):
            moved = source[:, depth] - roots[:, 0]
            own = torch.where(source[:, depth] >= 0, moved, 1 + depth)
            # Told, or lying where it belongs already: the node of that number bears what was chosen before it.
            right = (
                (own == 1 + depth)
                & (parent_of(own, parents) == at)
                & (ids_of(ids, own) == chosen.gather(1, at[:, None])[:, 0])
            )
            going = going & ((source[:, depth] >= 0) | right)
            at = torch.where(going, own, at)
            emitted[:, depth + 1] = chosen.gather(1, at[:, None])[:, 0]
            more += going.long()
        self.accepted += int((more - 1).sum())
        if self.broken == "the draft is taken":
            emitted[:, 0] = first[:, 0]
        return more, emitted

    def _with(self, path: torch.Tensor, length: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
        longer = path.clone()
        inside = length < LENGTH
        rows = inside.nonzero()[:, 0]
        longer[rows, length[rows]] = token[rows]
        return longer


def parent_of(node: torch.Tensor, parents: list[int]) -> torch.Tensor:
    """Row within its request of the parent of a row."""
    return torch.tensor([-1, *(parent + 1 for parent in parents)], device=node.device)[node]


def ids_of(ids: list[torch.Tensor], node: torch.Tensor) -> torch.Tensor:
    return torch.stack(ids, 1).gather(1, node[:, None])[:, 0]


def p_value(drawn: torch.Tensor, law: torch.Tensor) -> float:
    """Of Pearson's chi-square; cells of fewer than five expected draws are put together."""
    cells = drawn[:, 0] * TOKENS**2 + drawn[:, 1] * TOKENS + drawn[:, 2]
    seen = torch.bincount(cells.cpu(), minlength=TOKENS**LENGTH).double()
    expected = law * drawn.shape[0]
    rare = expected < 5
    if rare.any():
        seen = torch.cat((seen[~rare], seen[rare].sum()[None]))
        expected = torch.cat((expected[~rare], expected[rare].sum()[None]))
    square = ((seen - expected) ** 2 / expected.clamp(min=1e-9)).sum()
    return float(torch.special.gammaincc(torch.tensor((len(seen) - 1) / 2, dtype=torch.float64), square / 2))


def drawn_p(device: str, draws: int, heat: float, near: bool, broken: Broken = None) -> tuple[float, float]:
    """p value, and accepted nodes a draw."""
    target, other = logits_of(3), logits_of(4)
    draft = {path: one + 0.3 * other[path] if near else other[path] for path, one in target.items()}
    if device == "cuda":
        load_kernels("cuda")
    drawing = Drawing(device, target, draft, heat, broken)
    parts = []
    for begin in range(0, draws, 20_000):
        seeds = torch.arange(begin, min(begin + 20_000, draws), device=device)
        parts.append(drawing.draw(seeds * 0x9E3779B97F4A7C1 % (1 << 62)))
    return p_value(torch.cat(parts), joint(target, heat)), drawing.accepted / draws


@pytest.mark.gpu
@pytest.mark.parametrize("heat", [1.0, 0.6])
@pytest.mark.parametrize("near", [True, False])
def test_a_million_draws_follow_the_law(heat: float, near: bool) -> None:
    p, accepted = drawn_p("cuda", 1_000_000, heat, near)
    assert p > ALPHA / LAWS
    assert accepted > 0.2


@pytest.mark.gpu
@pytest.mark.parametrize("broken", ["one noise for all positions", "another temperature", "the draft is taken"])
def test_what_breaks_it_is_found_among_a_million(broken: str) -> None:
    assert drawn_p("cuda", 1_000_000, 1.0, False, broken)[0] < 1e-12


def test_the_references_follow_the_law() -> None:
    p, accepted = drawn_p("cpu", 20_000, 1.0, True)
    assert p > ALPHA / LAWS
    assert accepted > 0.2


@pytest.mark.parametrize("broken", ["one noise for all positions", "another temperature", "the draft is taken"])
def test_what_breaks_it_is_found_among_thousands(broken: str) -> None:
    assert drawn_p("cpu", 20_000, 1.0, False, broken)[0] < 1e-6
