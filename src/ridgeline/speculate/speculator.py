"""Who drafts what for a step: sizes first, then trees, then learning from what was accepted.

Knows requests, drafters, measured chances and prices. It must not know how a step is run.

Everything here is verified by coupling (verify.py): the tokens that come out do not depend on the trees, so trees
may follow the text, be pruned by any score, and be left out.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from ridgeline.core.request import Request
from ridgeline.core.speculation import Speculation
from ridgeline.core.step import Accepted, Spans, StepPlan, StepResult
from ridgeline.core.tree import MOST_NODES, ROOT, Sketch, TokenTree, merged
from ridgeline.speculate.acceptance import Acceptance
from ridgeline.speculate.draft_model import DraftModel, Growth, Proposal
from ridgeline.speculate.ngram import SuffixIndex
from ridgeline.speculate.seconds import Seconds
from ridgeline.speculate.tree_size import Sizes, Want, choose_sizes

Room = Callable[[Request, int], int]
"""(request, nodes wanted) -> nodes granted, their slots reserved."""

DEEPEST = 12
WIDTH = 4
"""Siblings that are considered at each node, when the sizer decides."""

PROBE_STEPS = 128
"""Without trees nothing is learned, so every so many steps a small one is tried."""

NGRAM_DEPTH = 10


@dataclass(slots=True)
class _Drafted:
    """A tree under way: each node's rank, its drafter's probability, and which drafter it came from."""

    tree: TokenTree
    ranks: list[int]
    chances: list[float]
    sources: list[int]


@dataclass(frozen=True, slots=True)
class Round:
    """A verified tree, for whoever explains: what was drafted for a request, by whom, and what came of it.

    ranks, chances, sources: of each node, its rank among its siblings when it was proposed, its drafter's
    probability, and the drafter's number. accepted: nodes of the path, top down; tokens: what they and the target
    chose, one more than accepted. sizes: what the sizer chose for the step, with its reasons. draft_s, step_s:
    seconds of drafting and of the step, for all its requests together; requests: how many had a tree.
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

    speculation: what was asked for. models: the draft models, none for n-grams. seconds: of a step of the target by
    its rows; draft_seconds: of a pass of the draft models by requests. Both learn from what steps take. most_rows:
    known tokens and nodes of a step, over all requests.
    """

    def __init__(
        self,
        speculation: Speculation,
        models: Sequence[DraftModel],
        seconds: Seconds,
        draft_seconds: Seconds,
        most_rows: int,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.speculation = speculation
        self.models = list(models)
        self.seconds = seconds
        self.draft_seconds = draft_seconds
        self.most_rows = most_rows
        self.acceptance = Acceptance()
        self.sizes: Sizes | None = None
        """What the sizer chose last, with its reasons."""
        self.tally = Tally()
        self.listeners: list[Callable[[Round], None]] = []
        """Each hears of every verified tree."""
        self._clock = clock
        self._drafted: dict[str, _Drafted] = {}
        self._indices: dict[str, SuffixIndex] = {}
        self._without = 0
        self.last_draft_s = 0.0
        """What drafting for the last step took."""

    @property
    def sized(self) -> bool:
        """Whether the sizer decides."""
        return not self.speculation.widths and self.speculation.nodes is None

    def draft(self, chosen: Sequence[tuple[Request, int]], room: Room, deepest: Callable[[Request], int],
              table: Callable[[str], Sequence[int]]) -> dict[str, TokenTree]:  # fmt: skip
        """Trees for requests that are chosen for their next token, those for whom one pays and is possible.

        room, deepest: what the scheduler grants. table: a request's blocks.
        """
        began = self._clock()
        self._drafted = {}
        candidates = [
            (request, deepest(request))
            for request, new in chosen
            if new == 1 and not request.unread and request.planned == len(request.tokens) - 1 >= request.prompt_len
        ]
        candidates = [(request, depth) for request, depth in candidates if depth > 0]
        if candidates:
            sizes = self._sizes([Want(len(r.tokens), d, MOST_NODES) for r, d in candidates], chosen)
            self.sizes = sizes
            if sizes.depth:
                self._without = 0
                growing = []
                left = self.most_rows - len(chosen)
                for (request, depth), nodes in zip(candidates, sizes.nodes):
                    granted = room(request, min(nodes, left)) if min(nodes, left) > 0 else 0
                    if granted:
                        growing.append((request, min(depth, sizes.depth), granted))
                        left -= granted
                self._grow(growing, table, sizes)
            else:
                self._without += 1
        self.last_draft_s = self._clock() - began
        self.tally.draft_s += self.last_draft_s
        return {request_id: drafted.tree for request_id, drafted in self._drafted.items()}

    def _sizes(self, wants: list[Want], chosen: Sequence[tuple[Request, int]]) -> Sizes:
        asked = self.speculation
        if not self.sized:
            depth = len(asked.widths) or (asked.nodes or 1)
            nodes = asked.most_nodes
            if asked.method == "tree" and not asked.widths:
                depth = min(depth, DEEPEST)
            return Sizes(depth, (nodes,) * len(wants), 0.0, 0.0, 0.0, 0.0)
        others = sum(new for _, new in chosen) - len(wants)
        beside = Spans((others,), (others,)) if others else Spans((), ())
        width = WIDTH if asked.method == "tree" else 1

        def target(spans: Spans) -> float:
            return self.seconds(sum(spans.new))

        def draft(requests: int, depth: int) -> float:
            return 0.0 if not self.models else depth * self.draft_seconds(requests)

        sizes = choose_sizes(wants, beside, self.acceptance.by_depth, target, draft, width, DEEPEST)
        if sizes.depth == 0 and self._without >= PROBE_STEPS:
            return Sizes(1, (1,) * len(wants), sizes.tokens_per_s, sizes.plain_per_s, 0.0, 0.0)
        return sizes

    # Growing trees

    def _grow(
        self, growing: Sequence[tuple[Request, int, int]], table: Callable[[str], Sequence[int]], sizes: Sizes
    ) -> None:
        if not growing:
            return
        if not self.models:
            for request, depth, nodes in growing:
                index = self._indices.setdefault(request.request_id, SuffixIndex())
                sketch = index.draft(request.tokens, min(depth, NGRAM_DEPTH))
                self._keep(request, sketch, nodes, dict.fromkeys(range(len(sketch)), (0, 0.5, 0)))
            return
        several: list[list[_Drafted]] = [[] for _ in growing]
        for source, model in enumerate(self.models):
            share = [(request, depth, max(1, nodes // len(self.models))) for request, depth, nodes in growing]
            for place, drafted in enumerate(self._by_model(model, source, share, table, sizes)):
                if drafted is not None:
                    several[place].append(drafted)
        for (request, _, nodes), drafts in zip(growing, several):
            if len(drafts) == 1:
                self._drafted[request.request_id] = drafts[0]
            elif drafts:
                self._drafted[request.request_id] = _union(drafts, nodes)

    def _by_model(
        self,
        model: DraftModel,
        source: int,
        growing: Sequence[tuple[Request, int, int]],
        table: Callable[[str], Sequence[int]],
        sizes: Sizes,
    ) -> list[_Drafted | None]:
        """One model's trees, level by level. Its own chance of each node is the product down its path."""
        widths = self.speculation.widths
        growths = [Growth(request, table(request.request_id), nodes) for request, _, nodes in growing]
        notes: list[dict[int, tuple[int, float, int]]] = [{} for _ in growing]
        active = list(range(len(growths)))
        level = 0
        while active:
            began = self._clock()
            level += 1
            width = widths[level - 1] if widths else (1 if self.speculation.method == "draft_model" else WIDTH)
            behind = level > 1
            proposals = model.propose([growths[place] for place in active], width)
            for place, proposed in zip(active, proposals):
                self._add(growths[place], proposed, notes[place], source)
            active = [
                place
                for place in active
                if self._goes_on(growths[place], level, min(growing[place][1], sizes.depth), sizes)
            ]
            if behind:  # the first level also catches up, which is no price of a level
                self.draft_seconds.learn(len(proposals), self._clock() - began)
        result: list[_Drafted | None] = []
        for (_, _, nodes), growth, noted in zip(growing, growths, notes):
            sketch = growth.sketch
            kept = sketch.best(nodes)
            if self.sized:
                kept = [node for node in kept if sketch.scores[node] >= sizes.least_chance]
            result.append(_arranged(sketch, kept, noted))
        return result

    def _add(
        self, growth: Growth, proposed: Sequence[Proposal], noted: dict[int, tuple[int, float, int]], source: int
    ) -> None:
        """Proposals become nodes; the next level's `at` are those that will be expanded."""
        sketch, following = growth.sketch, []
        for parent, one in zip(growth.at, proposed):
            above = 1.0 if parent == ROOT else sketch.scores[parent]
            for rank, (token, chance) in enumerate(zip(one.tokens, one.chances)):
                score = above * min(0.999, self.acceptance.of(rank, chance))
                if rank and score > above * 0.999:
                    score = above * 0.999
                node = sketch.add(token, parent, score)
                noted.setdefault(node, (rank, chance, source))
                following.append(node)
        growth.at = following if self.speculation.widths else following[:1]

    def _goes_on(self, growth: Growth, level: int, depth: int, sizes: Sizes) -> bool:
        if level >= depth or not growth.at or len(growth.expanded) + len(growth.at) > growth.nodes:
            return False
        if not self.sized:
            return True
        chance = growth.sketch.scores[growth.at[0]] * self.acceptance.by_depth(level + 1, 0)
        return chance >= sizes.least_path

    def _keep(self, request: Request, sketch: Sketch, nodes: int, noted: Mapping[int, tuple[int, float, int]]) -> None:
        drafted = _arranged(sketch, sketch.best(nodes), noted)
        if drafted is not None:
            self._drafted[request.request_id] = drafted

    # Learning

    def learn(self, plan: StepPlan, result: StepResult, step_s: float) -> None:
        """A step has been run in step_s seconds, drafting left out."""
        if all(chunk.sampling is not None for chunk in plan.chunks):  # prefills' rows cost less
            self.seconds.learn(plan.num_tokens, step_s)
        self.tally.steps += 1
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
                self._tell(request_id, drafted, accepted, step_s)

    def _tell(self, request_id: str, drafted: _Drafted, accepted: Accepted, step_s: float) -> None:
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
        )
        for listener in self.listeners:
            listener(told)

    def forget(self, request_id: str) -> None:
        """A request has ended."""
        self._indices.pop(request_id, None)
        for model in self.models:
            model.forget(request_id)


def _arranged(sketch: Sketch, kept: Sequence[int], noted: Mapping[int, tuple[int, float, int]]) -> _Drafted | None:
    if not kept:
        return None
    tree, order = sketch.tree(kept)
    notes = [noted[node] for node in order]
    return _Drafted(tree, [one[0] for one in notes], [one[1] for one in notes], [one[2] for one in notes])


def _union(drafts: Sequence[_Drafted], nodes: int) -> _Drafted:
    """Trees of several drafters merged by path; a node keeps the notes of the first that proposed it."""
    known: dict[tuple[int, ...], tuple[int, float, int]] = {}
    for one in drafts:
        for node in range(len(one.tree)):
            known.setdefault(tuple(one.tree.path_tokens(node)), (one.ranks[node], one.chances[node], one.sources[node]))
    tree = merged(one.tree for one in drafts).within(nodes, MOST_NODES)
    notes = [known[tuple(tree.path_tokens(node))] for node in range(len(tree))]
    return _Drafted(tree, [one[0] for one in notes], [one[1] for one in notes], [one[2] for one in notes])
