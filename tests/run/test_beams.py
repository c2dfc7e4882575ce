"""Levels of a draft without the host, uncaptured on a CPU: what a model says behind each path, and which go on."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from ridgeline.core.config import EngineConfig
from ridgeline.core.request import Request, SamplingParams
from ridgeline.core.step import Chunk, Sampling, StepPlan
from ridgeline.engine.build import build
from ridgeline.kernels.select import Table
from ridgeline.ops import Ops
from ridgeline.run.beams import DEEPEST, LATE, LOOKS, Beams, Levels, beam_of
from ridgeline.run.graphs import PassGraphs, pass_sizes_up_to
from ridgeline.run.prepare import prepare
from ridgeline.run.runner import Runner
from ridgeline.speculate.draft_model import DraftModel, Growth

TOKENS = [3 + (place * 17) % 250 for place in range(80)]
BLOCK, BLOCKS, CHILDREN = 16, 7, 4
EDGES = (0.002, 0.004, 0.008)
ODDS = [[0.3 + 0.1 * kind - 0.07 * rank for kind in range(len(EDGES) + 1)] for rank in range(CHILDREN)]

LOW = [[0.3 * one for one in ranks] for ranks in ODDS]
"""Chances of which each level has less than the one before."""


@pytest.fixture(scope="module")
def made(tiny: Path, one_thread: None) -> Runner:
    settings = {"kernels": "reference", "dtype": "float32", "block_size": BLOCK, "max_num_seqs": 8}
    return build(EngineConfig(model=str(tiny), **settings)).runner  # type: ignore[arg-type]


@pytest.fixture
def drafter(made: Runner) -> DraftModel:
    ops, pages = Ops({}), deepcopy(made.pages)
    for page in (*pages.keys, *pages.values):
        page.zero_()
    table = Table((), dict.fromkeys(("decode", "prefill", "mixed", "tree"), ops))
    model = DraftModel(made.model, pages, table, made.device, BLOCK, 64)
    model.graphs = PassGraphs(made.model, pages, ops, made.device, BLOCK, pass_sizes_up_to(8, 128), BLOCKS, CHILDREN)
    model.beams = Beams(
        made.model, pages, ops, made.device, BLOCK, 8, BLOCKS, model.graphs.proposed, model.graphs.chances, EDGES
    )
    return model


def growing(count: int, params: SamplingParams) -> list[Growth]:
    """Requests of different lengths, each in blocks of its own."""
    requests = [Request(str(n), TOKENS[n : 12 + 6 * n], 30, params, 7 + n) for n in range(count)]
    return [Growth(one, list(range(BLOCKS * n, BLOCKS * n + BLOCKS)), 60) for n, one in enumerate(requests)]


def said(model: DraftModel, growth: Growth, path: Sequence[int], width: int) -> tuple[list[int], list[float]]:
    """What the drafter proposes behind a path, the whole of it computed anew in other pages."""
    tokens = [*growth.request.tokens, *path]
    pages = deepcopy(model.pages)
    sampling = Sampling(growth.request.params, growth.request.seed, len(tokens), tokens, 1)
    plan = StepPlan(0, (Chunk("whole", tokens, 0, list(growth.blocks), sampling),))
    batch = prepare(plan, model.device, BLOCK).batch
    batch.rows = torch.tensor([len(tokens) - 1])
    ops = Ops({})
    logits = model.model.logits(model.model.forward(batch, pages.keys, pages.values, ops), ops)
    found = ops.propose(
        logits,
        torch.tensor([growth.request.params.temperature]),
        torch.tensor([growth.request.seed]),
        torch.tensor([len(tokens)]),
        growth.request.params.temperature == 0,
        width,
    )
    return found[0][0].tolist(), found[1][0].tolist()


class Told(NamedTuple):
    """The levels of one request."""

    tokens: list[list[list[int]]]
    chances: list[list[list[float]]]
    chosen: list[list[int]]


def each(found: Levels | None) -> list[Told]:
    """Request by request."""
    assert found is not None
    parts = (found.tokens, found.chances, found.chosen)
    return [Told(*(part[:, one].tolist() for part in parts)) for one in range(found.tokens.shape[1])]


def check(model: DraftModel, growth: Growth, found: Told, widths: Sequence[int], beam: int) -> None:
    """Level by level: the model's own proposals behind each row's path, and the best of them as the next rows."""
    rows: list[tuple[list[int], float] | None] = [([], 1.0), *[None] * (beam - 1)]
    for level, width in enumerate(widths):
        scores: dict[int, float] = {}
        paths: dict[int, list[int]] = {}
        for row, one in enumerate(rows):
            if one is None:
                continue
            path, above = one
            tokens, chances = said(model, growth, path, CHILDREN)
            assert found.tokens[level][row] == tokens
            assert found.chances[level][row] == pytest.approx(chances, rel=1e-3, abs=1e-6)
            for rank in range(width):
                place = CHILDREN * row + rank
                scores[place] = above * ODDS[rank][bisect_right(EDGES, found.chances[level][row][rank])]
                paths[place] = [*path, tokens[rank]]
        chosen = [place for place in found.chosen[level] if place >= 0]
        assert len(chosen) == min(beam, len(scores)) == len(set(chosen))
        assert [scores[place] for place in chosen] == pytest.approx(
            sorted(scores.values(), reverse=True)[: len(chosen)]
        )
        assert found.chosen[level][len(chosen) :] == [-1] * (beam - len(chosen))
        rows = [(paths[place], scores[place]) for place in chosen]
        rows += [None] * (beam - len(rows))


def test_rows_of_a_request() -> None:
    assert [beam_of(count) for count in (1, 4, 8, 9, 16, 17, 64, 256)] == [8, 8, 8, 4, 4, 2, 1, 1]


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize(("count", "widths"), [(1, (4, 4, 4, 4, 4)), (3, (4, 2, 1)), (2, (1, 1, 1, 1))])
def test_what_the_model_says_behind_every_path(
    drafter: DraftModel, count: int, widths: tuple[int, ...], temperature: float
) -> None:
    assert drafter.beams is not None
    growths = growing(count, SamplingParams(temperature=temperature))
    for _ in range(2):  # the second draft finds most of the text computed
        found = each(drafter.levels(growths, widths, ODDS))
        for growth, one in zip(growths, found):
            check(drafter, growth, one, widths, drafter.beams.beam(count))
        for growth, one in zip(growths, found):
            growth.request.tokens += [one.tokens[0][0][0], 9]  # one was accepted
            growth.at, growth.expanded = [-1], []


def test_requests_catch_up_side_by_side(drafter: DraftModel) -> None:
    """Texts far longer than a captured pass, all but their last tokens in few passes op by op, one of which ends in the
    middle of a text; then as ever."""
    assert drafter.beams is not None
    drafter.graphs = PassGraphs(
        drafter.model, drafter.pages, Ops({}), drafter.device, BLOCK, pass_sizes_up_to(8, 16), BLOCKS, CHILDREN
    )
    beams = drafter.beams
    drafter.beams = Beams(
        drafter.model, drafter.pages, Ops({}), drafter.device, BLOCK, 8, BLOCKS, drafter.graphs.proposed,
        drafter.graphs.chances, EDGES,
    )  # fmt: skip
    growths = growing(3, SamplingParams(temperature=0.0))
    for growth in growths:
        growth.request.tokens += TOKENS[: 30 + len(growth.request.tokens)]
    filled: list[int] = []
    fill = drafter._fill
    drafter._fill = lambda chunks: (filled.append(sum(chunk.new for chunk in chunks)), fill(chunks))[1]  # type: ignore[method-assign]
    found = each(drafter.levels(growths, (4, 2), ODDS))
    assert not drafter.steady
    assert filled == [64, 64, sum(len(growth.request.tokens) - 1 for growth in growths) - 128]
    for growth, one in zip(growths, found):
        check(drafter, growth, one, (4, 2), beams.beam(3))
        growth.request.tokens += [one.tokens[0][0][0], 9]
        growth.at, growth.expanded = [-1], []
    growths[1].request.tokens += range(3, 12)  # far more than its share of 16 rows, which all of them are
    assert sum(drafter.behind(growth.request, growth.blocks) for growth in growths) <= 16
    assert drafter.levels(growths, (4, 2), ODDS) is not None
    assert drafter.steady
    assert len(filled) == 3
    growths[1].request.tokens += range(3, 18)
    assert drafter.levels(growths, (4, 2), ODDS) is not None
    assert not drafter.steady
    assert filled[3:] == [14]  # of one, the others lack little


def test_the_deepest_draft_stays_within_its_slots(drafter: DraftModel) -> None:
    """Neighbours' pages are untouched, and no mask is too short for the last level."""
    assert drafter.beams is not None
    growths = growing(2, SamplingParams(temperature=0.0))
    need = drafter.beams.slots(2, DEEPEST)
    assert need == 8 * (DEEPEST - 1)
    growth = Growth(growths[0].request, list(range(1, 1 + BLOCKS)), need)
    before = [page.clone() for page in (*drafter.pages.keys, *drafter.pages.values)]
    (found,) = each(drafter.levels([growth], (4,) * DEEPEST, ODDS))
    check(drafter, growth, found, (4,) * DEEPEST, 8)
    last = -(-(12 + need) // BLOCK)
    for page, old in zip((*drafter.pages.keys, *drafter.pages.values), before):
        assert torch.equal(page[0], old[0])
        assert torch.equal(page[1 + last :], old[1 + last :])


@pytest.mark.parametrize("count", [1, 3])
def test_an_unlikely_draft_ends_early(drafter: DraftModel, count: int) -> None:
    """Whatever rows a level computes, all of whose chances together fall below a line, is seen two levels late; what
    came before is as it would have been."""
    widths = (4,) * DEEPEST
    params = SamplingParams(temperature=0.0)
    whole = each(drafter.levels(growing(count, params), widths, LOW))
    assert len(whole[0].tokens) == DEEPEST
    beam = drafter.beams.beam(count) if drafter.beams is not None else 0
    likely = [sum(values) for values in zip(*(chances_of(one, beam) for one in whole))]
    assert likely == sorted(likely, reverse=True)
    assert likely[-1] > 0
    for least in (likely[0] * 2, *((likely[at] + likely[at + 2]) / 2 for at in (2, 4, 6)), likely[-1] / 2):
        expected = DEEPEST
        for level in range(LOOKS, DEEPEST - LATE, LOOKS):
            if likely[level] < least:
                expected = level + LATE
                break
        found = each(drafter.levels(growing(count, params), widths, LOW, least=least))
        for one, other in zip(found, whole):
            assert len(one.tokens) == len(one.chances) == len(one.chosen) == expected
            assert (one.tokens, one.chosen) == (other.tokens[:expected], other.chosen[:expected])


def chances_of(found: Told, beam: int) -> list[float]:
    """By level, what the chances of the rows come to that it chose."""
    above, sums = [1.0], []
    for chances, chosen in zip(found.chances, found.chosen):
        scores = [
            one * LOW[rank][bisect_right(EDGES, chance)]
            for one, row in zip(above, chances)
            for rank, chance in enumerate(row)
        ]
        above = [scores[place] if place >= 0 else 0.0 for place in chosen]
        sums.append(sum(above))
    return sums


def test_what_it_leaves_to_others(drafter: DraftModel) -> None:
    """Logits that are adjusted first, more children than there are, and passes that no size holds."""
    growths = growing(2, SamplingParams(temperature=0.0, frequency_penalty=0.5))
    assert drafter.levels(growths, (4,), ODDS) is None
    growths = growing(1, SamplingParams(temperature=0.0))
    assert drafter.levels(growths, (5,), ODDS) is None
    long = Request("long", [TOKENS[n % 80] for n in range(100)], 30, SamplingParams(), 1)
    drafter.graphs = PassGraphs(
        drafter.model, drafter.pages, Ops({}), drafter.device, BLOCK, pass_sizes_up_to(2, 16), BLOCKS, CHILDREN
    )
    several = growing(3, SamplingParams(temperature=0.0))
    assert drafter.levels(several, (4,), ODDS) is None
    # What was caught up with stays: as many as it took for the others to fit.
    assert [drafter.behind(one.request, one.blocks) for one in several] == [12, 1, 1]
    assert drafter.levels([Growth(long, list(range(BLOCKS)), 4)], (4,), ODDS) is not None
    drafter.beams = None
    assert drafter.levels(growths, (4,), ODDS) is None
