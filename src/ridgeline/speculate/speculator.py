"""Who drafts what for a step: sizes first, then trees, then learning from what was accepted.

Knows requests, drafters, measured chances and prices. It must not know how a step is run.

Everything here is verified by coupling (verify.py): the tokens that come out do not depend on the trees, so trees
may follow the text, be pruned by any score, and be left out.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from ridgeline.core.request import Request
from ridgeline.core.speculation import Speculation
from ridgeline.core.step import Accepted, StepPlan, StepResult
from ridgeline.core.tree import MOST_NODES, ROOT, Sketch, TokenTree, merged
from ridgeline.run.verify import Draws, Path, Trial, seeded
from ridgeline.speculate.acceptance import DEEPEST, RANKS, Acceptance
from ridgeline.speculate.draft_model import DraftModel, Growth, Proposal
from ridgeline.speculate.ngram import SuffixIndex
from ridgeline.speculate.nodes import Nodes, arranged, scored
from ridgeline.speculate.seconds import OWN, Seconds
from ridgeline.speculate.tree_size import Shape, Sizes, choose_sizes, least_worth

Room = Callable[[Request, int, int], int]
"""(request, nodes wanted, slots that drafting takes) -> nodes granted, as many slots reserved as there are."""

WIDTH = 4
"""Siblings that are considered at each node, when the sizer decides."""

CONSIDERED = 64
"""Nodes of a request's tree, when the sizer decides."""

LEAST_SCORE = 1e-12
"""What is less likely is no node."""

ROOM = 2
"""A request may have so many times the nodes that the sizer counts with, unless rows become dearer there and drafting
takes longer for them: what is drafted decides, node by node."""

BREADTH = 16
"""Nodes of a level, at most, behind which a tree grows on."""

REFRESH_STEPS = 32
"""Sizes are chosen anew every so many steps, at first more often."""

PROBE_STEPS, LONGEST_PAUSE = 128, 1024
"""Without trees nothing is learned, so after so many steps they are tried, and after twice as many when that was no
use, up to so many."""

NEARLY, TRIED_STEPS = 0.85, 4
"""Where trees are said to bring at least such a part of what steps without do, all requests have theirs for a few
steps: what they cost may be wrong by as much. The first of them teaches no price, for much is prepared anew."""

PROBED, PROBE_NODES, PROBING_STEPS = 4, 4, 2
"""Elsewhere so many requests have a small tree, so few steps long."""

CLOSE, SELDOM = 1.5, 0.5
"""And with trees nothing of steps without: where they bring less than so many times the tokens, one without is made
every REFRESH_STEPS. As such readings are rare, so much of what one is off by is believed."""

NGRAM_DEPTH = 10

DRAFTING, VERIFYING = 1, 2
"""Stages of a round's own random numbers. The noise that chooses tokens is another."""


Cut = dict[tuple[int, int], int]


@dataclass(slots=True)
class _Drafted:
    """A tree under way: each node's rank, its drafter's probability, and which drafter it came from. draws: how its
    children were drawn, if they were. cut: if anyone listens, (node or ROOT, token proposed behind it and left out of
    the tree) -> the token's rank."""

    tree: TokenTree
    ranks: list[int]
    chances: list[float]
    sources: list[int]
    draws: Draws | None = None
    cut: Cut = field(default_factory=dict)


_Sketched = tuple[Sketch, Mapping[int, tuple[int, float, int]]]
"""Drafted nodes, and what is to be noted of each: rank, the drafter's probability, source."""


@dataclass(frozen=True, slots=True)
class _Growing:
    """A request that gets a tree: how deep and of how many nodes at the most. levels: how many children count behind
    each row of every level, if it is drafted on the device; among: how many requests its slots were reckoned for."""

    request: Request
    depth: int
    nodes: int
    levels: Sequence[int]
    among: int


class _Drawn:
    """A tree whose children are drawn: how many where, and what they were drawn from. counts: by place, a path of
    ranks. trials: by path of tokens."""

    def __init__(self, counts: Mapping[Path, int]) -> None:
        self._counts = counts
        self._places: dict[int, Path] = {ROOT: ()}
        self.trials: dict[Path, list[Trial]] = {}

    def counts(self, nodes: Sequence[int]) -> list[int]:
        """How many children to draw behind each of these nodes."""
        return [self._counts.get(self._places[node], 0) for node in nodes]

    def going_on(self, growth: Growth, proposed: Sequence[Proposal], following: Sequence[int]) -> list[int]:
        """Take in what was drawn behind `growth.at`, the nodes `following`; those behind which more is to be drawn."""
        drawn = iter(following)
        for parent, one in zip(growth.at, proposed):
            self.trials[growth.sketch.path_tokens(parent)] = one.trials
            for rank in range(len(one.trials)):
                self._places[next(drawn)] = (*self._places[parent], rank)
        going = [node for node in following if self._counts.get(self._places[node], 0)]
        growth.counts = self.counts(going)
        return going


@dataclass(frozen=True, slots=True)
class Round:
    """A verified tree, for whoever explains: what was drafted for a request, by whom, and what came of it.

    ranks, chances, sources: of each node, its rank among its siblings when it was proposed, its drafter's
    probability, and the drafter's number. accepted: nodes of the path, top down; tokens: what they and the target
    chose, one more than accepted. sizes: what the sizer chose for the step, with its reasons. draft_s, step_s:
    seconds of drafting and of the step, for all its requests together; requests: how many had a tree. before: known
    tokens of the request, the last of which is the root. cut: (node or ROOT, token proposed behind it and left out
    of the tree) -> the token's rank.
    """

    request_id: str
    tree: TokenTree
    ranks: Sequence[int]
    chances: Sequence[float]
    sources: Sequence[int]
    accepted: Sequence[int]
    tokens: Sequence[int]
    sizes: Sizes
    draft_s: float
    step_s: float
    requests: int
    before: int
    cut: Mapping[tuple[int, int], int]


@dataclass(slots=True)
class Tally:
    """What came of drafts so far. by_source: (proposed, accepted) nodes of each drafter."""

    steps: int = 0
    drafted: int = 0
    accepted: int = 0
    draft_s: float = 0.0
    by_source: dict[int, list[int]] = field(default_factory=dict)


class Speculator:
    """Drafts trees for the requests of a step.

    speculation: what was asked for. models: the draft models, none for n-grams. seconds: of a step of the target with
    trees, by its rows; plain_seconds: of one without, which has kernels of its own and less to prepare;
    draft_seconds: of a pass of the draft models by its rows; level_seconds: of one more level on the device, by
    requests, where there is such a thing. All learn from what steps take. most_rows: known tokens and nodes of a step,
    over all requests.
    """

    def __init__(
        self,
        speculation: Speculation,
        models: Sequence[DraftModel],
        seconds: Seconds,
        plain_seconds: Seconds,
        draft_seconds: Seconds,
        most_rows: int,
        clock: Callable[[], float] = time.perf_counter,
        level_seconds: Seconds | None = None,
    ) -> None:
        self.speculation = speculation
        self.models = list(models)
        self.seconds = seconds
        self.plain_seconds = plain_seconds
        self.draft_seconds = draft_seconds
        self.level_seconds = level_seconds
        self.most_rows = most_rows
        self.acceptance = Acceptance()
        self.sizes: Sizes | None = None
        """What the sizer chose for the last step, with its reasons; None if no request could have a tree."""
        self.tally = Tally()
        self.listeners: list[Callable[[Round], None]] = []
        """Each hears of every verified tree."""
        self._clock = clock
        self._drafted: dict[str, _Drafted] = {}
        self._tried: list[str] = []
        """Requests of the last draft, whether or not anything of theirs was worth its rows."""
        self._indices: dict[str, SuffixIndex] = {}
        self._shapes: dict[int, Shape] = {}
        self._chosen: dict[tuple[int, int, float], Sizes] = {}
        self._stale_at = 0
        self._without = self._with = 0
        self._pause, self._trial = PROBE_STEPS, 0
        self._seldom = self._probes = self._had_trees = False
        self._rows = 0
        """Known tokens of the step that is drafted for."""
        self.last_draft_s = 0.0
        """What drafting for the last step took."""

    @property
    def sized(self) -> bool:
        """Whether the sizer decides."""
        return not self.speculation.widths and self.speculation.nodes is None

    def pays(self, requests: int) -> bool:
        """Whether so many requests, all at their last tokens, would get trees now. Asked while nothing is drafted,
        it counts the steps that go by, and says yes now and then for the sake of learning."""
        if not self.sized:
            return requests > 0
        if not requests:
            return False
        if self._trial or self._choose(requests, 0).depth:
            return True
        self._without += 1
        return self._without >= self._pause

    def draft(
        self,
        chosen: Sequence[tuple[Request, int]],
        room: Room,
        deepest: Callable[[Request], int],
        table: Callable[[str], Sequence[int]],
    ) -> dict[str, TokenTree]:
        """Trees for requests that are chosen for their next token, those for whom one pays and is possible.

        room, deepest: what the scheduler grants. table: a request's blocks.
        """
        began = self._clock()
        self._drafted, self._tried = {}, []
        self._seldom = self._probes = False
        self._rows = sum(new for _, new in chosen)
        self.sizes = None
        candidates = []
        for request, new in chosen:
            if new == 1 and not request.unread and request.planned == len(request.tokens) - 1 >= request.prompt_len:
                depth = deepest(request)
                if depth > 0:
                    candidates.append((request, depth))
        if candidates:
            sizes = self._sizes(len(candidates), self._rows - len(candidates))
            if sizes.depth:
                self._pause, self._trial = PROBE_STEPS, 0
            elif self.sized:
                sizes = self._on_trial(len(candidates), self._rows - len(candidates), sizes)
                if self._probes:
                    candidates = self._least_behind(candidates, table)
            self.sizes = sizes
            if sizes.depth and (sizes.tokens_per_s <= sizes.plain_per_s or not self._left_out(sizes)):
                self._without = 0
                shaped = self.sized and bool(self.models)  # by each context's chances, once they are known
                levels = self._levels(len(candidates), sizes)
                # Nodes of a level on the device cost nothing.
                roomy = shaped and not self._probes and (bool(levels) or not sizes.ends_at_a_jump)
                most = min(MOST_NODES, ROOM * sizes.nodes) if roomy else sizes.nodes
                growing = []
                left = self.most_rows - len(chosen)
                slots = self._slots(len(candidates), len(levels))
                for place, (request, depth) in enumerate(candidates):
                    fair = left // (len(candidates) - place)
                    nodes = room(request, min(most, fair), slots) if fair else 0
                    if nodes:
                        most_depth = min(depth, DEEPEST if shaped else sizes.depth)
                        there = len(table(request.request_id)) * self._block_size - len(request.tokens) >= slots
                        growing.append(_Growing(request, most_depth, nodes, levels if there else (), len(candidates)))
                        left -= nodes
                self._tried = [one.request.request_id for one in growing]
                self._grow(growing, table, sizes)
            else:
                self._without += 1
        self.last_draft_s = self._clock() - began
        self.tally.draft_s += self.last_draft_s
        return {request_id: drafted.tree for request_id, drafted in self._drafted.items()}

    def _left_out(self, sizes: Sizes) -> bool:
        """Whether this step has no trees for the sake of learning what one without takes."""
        if not self.sized or sizes.tokens_per_s > CLOSE * sizes.plain_per_s:
            return False
        self._with += 1
        self._seldom = self._with > REFRESH_STEPS
        if self._seldom:
            self._with = 0
        return self._seldom

    @property
    def draws(self) -> dict[str, object]:
        """How children were drawn, of those requests in the last draft whose were."""
        return {request_id: one.draws for request_id, one in self._drafted.items() if one.draws is not None}

    def _verification(self, request: Request) -> str:
        """Requests with a seed, and greedy ones, have their noise; others leave the choice to the configuration."""
        params = request.params
        if params.seed is not None or params.temperature == 0 or params.top_k == 1:
            return "coupled"
        return self.speculation.verification

    @property
    def _width(self) -> int:
        return WIDTH if self.speculation.method == "tree" else 1

    def _sizes(self, requests: int, others: int) -> Sizes:
        asked = self.speculation
        if asked.widths:
            return Sizes(len(asked.widths), asked.most_nodes, 0.0, 0.0, 0.0, 0.0)
        if asked.nodes is not None:
            depth = max(self._shape(asked.nodes).depths)
            return Sizes(depth, asked.nodes, 0.0, 0.0, 0.0, 0.0)
        return self._choose(requests, others)

    def _on_trial(self, requests: int, others: int, sizes: Sizes) -> Sizes:
        """Trees where none are worth it, for a few steps now and then; else what was chosen."""
        near = self._choose(requests, others, NEARLY)
        if not self._trial and self._without >= self._pause:
            self._trial = TRIED_STEPS if near.depth else PROBING_STEPS
            self._pause = min(2 * self._pause, LONGEST_PAUSE)
        if not self._trial:
            return sizes
        self._trial -= 1
        if not self._trial:
            self._stale_at = 0  # what was learned counts at once
        if near.depth:
            return near
        self._probes = True
        shape = self._shape(PROBE_NODES)
        return replace(sizes, depth=max(shape.depths), nodes=len(shape), accepted=sum(shape.values))

    def _least_behind(
        self, candidates: Sequence[tuple[Request, int]], table: Callable[[str], Sequence[int]]
    ) -> list[tuple[Request, int]]:
        """The few of them that cost the least to draft for."""

        def behind(candidate: tuple[Request, int]) -> int:
            request = candidate[0]
            return sum(model.behind(request, table(request.request_id)) for model in self.models)

        return sorted(candidates, key=behind)[:PROBED]

    def _choose(self, requests: int, others: int, least: float = 1.0) -> Sizes:
        """What the sizer says, as of some steps ago. least: what trees must bring, as a share of what steps without
        do."""
        if self.tally.steps >= self._stale_at:
            self._stale_at = self.tally.steps + max(2, min(REFRESH_STEPS, self.tally.steps))
            self._shapes.clear()
            self._chosen.clear()
        key = requests, others.bit_length(), least
        found = self._chosen.get(key)
        if found is None:
            shape = self._shape(CONSIDERED)
            found = self._chosen[key] = choose_sizes(
                requests,
                others,
                shape,
                max(shape.depths),
                self.seconds,
                self._pass_s,
                again=self._width > 1,
                most_rows=self.most_rows,
                plain=self.plain_seconds,
                level_s=self._level_s(requests),
                trust=self.acceptance.trust,
                least=least,
            )
        return found

    def _shape(self, most: int) -> Shape:
        """The likeliest nodes of this many, as of some steps ago."""
        if most not in self._shapes:
            self._shapes[most] = self.acceptance.shape(self._width, most)
        return self._shapes[most]

    def _levels(self, requests: int, sizes: Sizes) -> Sequence[int]:
        """Children that count behind each row of every level, if so many requests draft on the device; else none.

        What the sizer counts with is the mean of all contexts: a level costs little there, so confident ones get more.
        """
        asked, beams = self.speculation, [model.beams for model in self.models]
        if not beams or any(one is None or not one.serves(requests) for one in beams):
            return ()
        if not asked.widths:
            depth = sizes.depth if not self.sized else min(DEEPEST, sizes.depth + max(1, sizes.depth // 2))
            return (self._width,) * depth
        frontier = 1
        for width in asked.widths[:-1]:
            frontier *= width
        beam = min(one.beam(requests) for one in beams if one is not None)
        return asked.widths if frontier <= beam and len(asked.widths) <= DEEPEST else ()

    def _slots(self, requests: int, levels: int) -> int:
        """That a request needs behind its tokens for so many levels on the device."""
        return max((one.slots(requests, levels) for one in (m.beams for m in self.models) if one and levels), default=0)

    @property
    def _block_size(self) -> int:
        return self.models[0].block_size if self.models else 1

    def _pass_s(self, rows: int) -> float:
        """Seconds of a pass of the drafters."""
        return self.draft_seconds(rows) if self.models else 0.0

    def _level_s(self, requests: int) -> float | None:
        """Seconds of one more level on the device, None if drafts do not go there."""
        if self.level_seconds is None or any(m.beams is None or not m.beams.serves(requests) for m in self.models):
            return None
        return self.level_seconds(requests)

    # Growing trees

    def _grow(self, growing: Sequence[_Growing], table: Callable[[str], Sequence[int]], sizes: Sizes) -> None:
        if not growing:
            return
        drafters = len(self.models) + self.speculation.looks_up
        share = [replace(one, nodes=max(1, one.nodes // drafters)) for one in growing]
        several: list[list[_Drafted | None]] = [
            self._by_model(model, source, share, table, sizes) for source, model in enumerate(self.models)
        ]
        if self.speculation.looks_up:
            several.append([self._looked_up(one.request, one.depth, one.nodes) for one in share])
        for grown, *drafts in zip(growing, *several):
            found = [one for one in drafts if one is not None]
            if len(found) == 1:
                self._drafted[grown.request.request_id] = found[0]
            elif found:
                self._drafted[grown.request.request_id] = _union(found, grown.nodes, bool(self.listeners))

    def _looked_up(self, request: Request, depth: int, nodes: int) -> _Drafted | None:
        """What followed the last tokens before."""
        index = self._indices.setdefault(request.request_id, SuffixIndex())
        sketch = index.draft(request.tokens, min(depth, NGRAM_DEPTH))
        rank = RANKS - 1 if self.models else 0  # counted apart from what models propose
        noted = dict.fromkeys(range(len(sketch)), (rank, 0.5, len(self.models)))
        return _arranged(sketch, sketch.best(nodes), noted, bool(self.listeners))

    def _by_model(
        self,
        model: DraftModel,
        source: int,
        growing: Sequence[_Growing],
        table: Callable[[str], Sequence[int]],
        sizes: Sizes,
    ) -> list[_Drafted | None]:
        """One model's trees. Its own chance of each node is the product down its path."""
        result: list[_Drafted | None] = [None] * len(growing)
        levels = next((one.levels for one in growing if one.levels), ())
        there = [
            place
            for place, one in enumerate(growing)
            if one.levels and self._verification(one.request) != "multi_step" and model.whole(one.request)
        ]
        found = (
            self._on_device(model, source, [growing[place] for place in there], table, levels, sizes) if there else None
        )
        elsewhere = range(len(growing)) if found is None else sorted(set(range(len(growing))) - set(there))
        for place, one in zip(there, found or ()):
            result[place] = one
        for place, one in zip(elsewhere, self._by_passes(model, source, [growing[p] for p in elsewhere], table, sizes)):
            result[place] = one
        return result

    def _on_device(
        self,
        model: DraftModel,
        source: int,
        growing: Sequence[_Growing],
        table: Callable[[str], Sequence[int]],
        levels: Sequence[int],
        sizes: Sizes,
    ) -> list[_Drafted | None] | None:
        """One model's trees, all levels at once; None if it cannot."""
        began = self._clock()
        odds = self.acceptance.odds(WIDTH)
        growths = [
            Growth(
                one.request,
                table(one.request.request_id),
                max(one.nodes, self._slots(one.among, len(levels))),
                coldly=self._verification(one.request) == "target_only",
            )
            for one in growing
        ]
        least = len(growing) * sizes.least_levels if self.sized else 0.0
        found = model.levels(growths, levels, odds, growing[0].among, least)
        if found is None:
            return None
        depths = [min(one.depth, len(found)) for one in growing]
        drafted = self._from_levels(scored(found, levels, depths, odds), [one.nodes for one in growing], source)
        if self.level_seconds is not None and model.steady:
            requests, took = len(growing), len(self.models) * (self._clock() - began)
            first, level = self.draft_seconds(requests), self.level_seconds(requests)
            expected = first + (len(found) - 1) * level
            if expected > 0:  # both are off alike: one alone is never seen
                self.draft_seconds.learn(requests, first * took / expected)
                self.level_seconds.learn(requests, level * took / expected)
        return drafted

    def _from_levels(self, nodes: Nodes, most: Sequence[int], source: int) -> list[_Drafted | None]:
        """Of each request's nodes the best, as a tree; where the sizer decides, those that are worth their rows."""
        order, scores = nodes.best(most)
        least = max(self._least(scores[scores > 0].tolist()), LEAST_SCORE)
        counts = (scores >= least).sum(1)
        order = order[:, : counts.max()]
        of_all = [np.take_along_axis(one, order, 1).tolist() for one in (nodes.tokens, nodes.parents, nodes.chances)]
        of_all += [nodes.ranks[order].tolist(), order.tolist()]
        result: list[_Drafted | None] = []
        for request, (count, *of_one) in enumerate(zip(counts.tolist(), *of_all)):
            if not count:
                result.append(None)
                continue
            tokens, parents, chances, ranks, kept = (one[:count] for one in of_one)
            place = dict(zip(kept, range(count)))
            place[ROOT] = ROOT
            tree, which = arranged(tokens, [place[parent] for parent in parents])
            drafted = _Drafted(tree, [ranks[n] for n in which], [chances[n] for n in which], [source] * count)
            if self.listeners:
                drafted.cut = _cut(nodes, request, [kept[n] for n in which])
            result.append(drafted)
        return result

    def _least(self, scores: Sequence[float]) -> float:
        """The score from which nodes of a step are worth their rows; 0 where nobody asks."""
        if not self.sized or self.sizes is None or self._probes:
            return 0.0
        return least_worth(scores, self._rows, self.seconds, self.sizes.tokens_per_s, self.seconds.sizes)

    def _kept(self, sketched: Sequence[_Sketched], growing: Sequence[_Growing]) -> list[_Drafted | None]:
        """The best nodes of each sketch as a tree; where the sizer decides, those that are worth their rows."""
        best = [sketch.best(grown.nodes) for (sketch, _), grown in zip(sketched, growing)]
        least = self._least([sketch.scores[node] for (sketch, _), nodes in zip(sketched, best) for node in nodes])
        best = [[node for node in nodes if sketch.scores[node] >= least] for (sketch, _), nodes in zip(sketched, best)]
        explained = bool(self.listeners)
        return [_arranged(sketch, nodes, noted, explained) for (sketch, noted), nodes in zip(sketched, best)]

    def _by_passes(
        self,
        model: DraftModel,
        source: int,
        growing: Sequence[_Growing],
        table: Callable[[str], Sequence[int]],
        sizes: Sizes,
    ) -> list[_Drafted | None]:
        """One model's trees, a pass and a look at it for each level."""
        widths = self.speculation.widths
        growths: list[Growth] = []
        drawn: dict[int, _Drawn] = {}
        for one in growing:
            request, family = one.request, self._verification(one.request)
            growth = Growth(request, table(request.request_id), one.nodes, coldly=family == "target_only")
            if family == "multi_step":
                growth.choose = seeded(request.seed, len(request.tokens), DRAFTING)
                drawn[len(growths)] = _Drawn(self._topology(one.nodes, sizes.depth))
                growth.counts = drawn[len(growths)].counts([ROOT])
            growths.append(growth)
        notes: list[dict[int, tuple[int, float, int]]] = [{} for _ in growing]
        active = list(range(len(growths)))
        level = 0
        while active:
            began = self._clock()
            level += 1
            width = widths[level - 1] if widths else (1 if self.speculation.method == "draft_model" else WIDTH)
            proposals = model.propose([growths[place] for place in active], width)
            for place, proposed in zip(active, proposals):
                growth = growths[place]
                following = self._add(growth, proposed, notes[place], source)
                depth = growing[place].depth
                ends = level == (min(depth, sizes.depth) if place in drawn else depth)
                if place in drawn:
                    going = drawn[place].going_on(growth, proposed, following)
                else:
                    going = [] if ends else self._going_on(growth, following, level, sizes)
                growth.at = [] if ends else going
            active = [place for place in active if growths[place].at]
            if level > 1:  # the first also catches up, which is no price of a pass
                self.draft_seconds.learn(model.last_rows, len(self.models) * (self._clock() - began))
        result: list[_Drafted | None] = [None] * len(growing)
        free = [place for place in range(len(growing)) if place not in drawn]
        sketched = [(growths[place].sketch, notes[place]) for place in free]
        for place, kept in zip(free, self._kept(sketched, [growing[place] for place in free])):
            result[place] = kept
        for place, own in drawn.items():  # whoever was drawn stays: leaving one out by what it is would bend the law
            sketch, request = growths[place].sketch, growing[place].request
            arranged = result[place] = _arranged(sketch, range(len(sketch)), notes[place])
            if arranged is not None:
                arranged.draws = Draws(own.trials, seeded(request.seed, len(request.tokens), VERIFYING))
        return result

    def _topology(self, nodes: int, depth: int) -> dict[Path, int]:
        """How many children to draw behind each place of a tree, places being paths of ranks. It looks at no token."""
        counts: dict[Path, int] = {}
        widths = self.speculation.widths
        if widths:
            frontier: list[Path] = [()]
            for width in widths[:depth]:
                following: list[Path] = []
                for place in frontier:
                    counts[place] = min(width, nodes - sum(counts.values()))
                    following += [(*place, rank) for rank in range(counts[place])]
                frontier = following
            return {place: count for place, count in counts.items() if count}
        shape = self._shape(max(nodes, 1)).within(depth)
        places: dict[int, Path] = {-1: ()}
        for node in range(min(nodes, len(shape))):
            parent = places[shape.parents[node]]
            places[node] = (*parent, counts.get(parent, 0))  # the next one drawn, whichever rank was likeliest
            counts[parent] = counts.get(parent, 0) + 1
        return counts

    def _add(
        self, growth: Growth, proposed: Sequence[Proposal], noted: dict[int, tuple[int, float, int]], source: int
    ) -> list[int]:
        """Proposals become nodes."""
        sketch, following = growth.sketch, []
        for parent, one in zip(growth.at, proposed):
            above = 1.0 if parent == ROOT else sketch.scores[parent]
            for rank, (token, chance) in enumerate(zip(one.tokens, one.chances)):
                node = sketch.add(token, parent, above * min(0.999, self.acceptance.of(rank, chance)))
                noted.setdefault(node, (rank, chance, source))
                following.append(node)
        return following

    def _going_on(self, growth: Growth, following: Sequence[int], level: int, sizes: Sizes) -> list[int]:
        """Nodes of a level behind which the tree grows: as many as have slots if widths are prescribed, else the
        likeliest."""
        sketch, sized = growth.sketch, self.sized
        going = list(following)
        if sized:
            first_child = self.acceptance.by_depth(level + 1, 0)
            going = [node for node in going if sketch.scores[node] * first_child >= sizes.least_chance]
        elif not self.speculation.widths:
            best = set(sketch.best(growth.nodes))
            going = [node for node in going if node in best]
        going.sort(key=lambda node: -sketch.scores[node])
        slots = growth.nodes - len(growth.expanded)
        going = going[: slots if self.speculation.widths else min(BREADTH, slots)]
        if sized and going and first_child * sum(sketch.scores[node] for node in going) < sizes.least_path:
            return []
        return going

    # Learning

    def learn(self, plan: StepPlan, result: StepResult, step_s: float) -> None:
        """A step has been run in step_s seconds, drafting left out."""
        if all(len(chunk.token_ids) == 1 for chunk in plan.chunks):  # prefills' rows cost less
            trees = any(chunk.tree is not None for chunk in plan.chunks)
            if trees and self._had_trees:
                self.seconds.learn(plan.num_tokens, step_s)
            elif not trees:
                self.plain_seconds.learn(plan.num_tokens, step_s, SELDOM if self._seldom else OWN)
            self._had_trees = trees
        self.tally.steps += 1
        known = {chunk.request_id: chunk.start + len(chunk.token_ids) for chunk in plan.chunks if self.listeners}
        if self.sized and self.sizes is not None:
            planned = {chunk.request_id for chunk in plan.chunks}
            for request_id in (one for one in self._tried if one in planned):
                verified = result.accepted.get(request_id)
                self.acceptance.compare(self.sizes.accepted, 0 if verified is None else len(verified.nodes))
        for request_id, drafted in self._drafted.items():
            accepted = result.accepted.get(request_id)
            if accepted is None:
                continue
            nodes = accepted.nodes
            self.acceptance.learn(drafted.tree, drafted.ranks, drafted.chances, nodes)
            self.tally.drafted += len(drafted.tree)
            self.tally.accepted += len(nodes)
            for node, source in enumerate(drafted.sources):
                count = self.tally.by_source.setdefault(source, [0, 0])
                count[0] += 1
                count[1] += node in nodes
            if self.listeners:
                self._tell(request_id, drafted, accepted, step_s, known[request_id])

    def _tell(self, request_id: str, drafted: _Drafted, accepted: Accepted, step_s: float, before: int) -> None:
        assert self.sizes is not None
        told = Round(
            request_id,
            drafted.tree,
            drafted.ranks,
            drafted.chances,
            drafted.sources,
            accepted.nodes,
            [one.token for one in accepted.tokens],
            self.sizes,
            self.last_draft_s,
            step_s,
            len(self._drafted),
            before,
            drafted.cut,
        )
        for listener in self.listeners:
            listener(told)

    def forget(self, request_id: str) -> None:
        """A request has ended."""
        self._indices.pop(request_id, None)
        for model in self.models:
            model.forget(request_id)


def _arranged(
    sketch: Sketch, kept: Sequence[int], noted: Mapping[int, tuple[int, float, int]], explained: bool = False
) -> _Drafted | None:
    """Nodes as a tree; if it will be explained, with what was left out."""
    if not kept:
        return None
    tree, order = sketch.tree(kept)
    notes = [noted[node] for node in order]
    drafted = _Drafted(tree, [one[0] for one in notes], [one[1] for one in notes], [one[2] for one in notes])
    if explained:
        place = {ROOT: ROOT, **{node: at for at, node in enumerate(order)}}
        for node, parent in enumerate(sketch.parents):
            if node not in place and parent in place:
                drafted.cut[place[parent], sketch.tokens[node]] = noted[node][0]
    return drafted


def _cut(nodes: Nodes, request: int, kept: Sequence[int]) -> Cut:
    """What was proposed behind a tree's nodes and left out of it; kept: its nodes, in its order."""
    place = {ROOT: ROOT, **{node: at for at, node in enumerate(kept)}}
    left: Cut = {}
    for node in np.flatnonzero(nodes.scores[request]).tolist():
        parent = int(nodes.parents[request, node])
        if node not in place and parent in place:
            left[place[parent], int(nodes.tokens[request, node])] = int(nodes.ranks[node])
    return left


def _union(drafts: Sequence[_Drafted], nodes: int, explained: bool = False) -> _Drafted:
    """Trees of several drafters merged by path; a node keeps the notes of the first that proposed it."""
    known: dict[tuple[int, ...], tuple[int, float, int]] = {}
    for one in drafts:
        for node in range(len(one.tree)):
            known.setdefault(tuple(one.tree.path_tokens(node)), (one.ranks[node], one.chances[node], one.sources[node]))
    tree = merged(one.tree for one in drafts).within(nodes, MOST_NODES)
    place = {(): ROOT, **{tuple(tree.path_tokens(node)): node for node in range(len(tree))}}
    notes = [known[path] for path in place if path]
    drafted = _Drafted(tree, [one[0] for one in notes], [one[1] for one in notes], [one[2] for one in notes])
    for one in drafts if explained else ():
        left = [((*one.tree.path_tokens(parent), token), rank) for (parent, token), rank in one.cut.items()]
        left += [(tuple(one.tree.path_tokens(node)), rank) for node, rank in enumerate(one.ranks)]
        for path, rank in left:
            if path not in place and path[:-1] in place:
                drafted.cut.setdefault((place[path[:-1]], path[-1]), rank)
    return drafted
