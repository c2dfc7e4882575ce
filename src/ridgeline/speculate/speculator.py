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
from ridgeline.core.step import Accepted, StepPlan, StepResult
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

KEPT_STEPS = 16
"""A choice of sizes holds so long, while the same requests go on: chances and prices change slowly. One for no trees
holds whoever comes, and steps may overlap meanwhile."""

PROBE_RESTS = 8
"""Without trees nothing is learned, so after so many rests a small one is tried."""

SLACK = 2
"""Times the nodes of an average tree that one may have whose tokens are surer."""

FIXED_SHARE = 0.05
"""How much of a new reading goes into what drafting takes beside its passes."""

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

    speculation: what was asked for. models: the draft models, none for n-grams. seconds: of a step of the target with
    trees, by its rows; plain_seconds: of one without, which has kernels of its own and less to prepare;
    draft_seconds: of a pass of the draft models by requests. All learn from what steps take. most_rows: known tokens
    and nodes of a step, over all requests.
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
    ) -> None:
        self.speculation = speculation
        self.models = list(models)
        self.seconds = seconds
        self.plain_seconds = plain_seconds
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
        self._rests = 0  # in a row
        self._rest_steps = 0
        self._chosen: tuple[tuple[int, list[Want]], Sizes] | None = None
        self._keep_steps = 0
        self._fixed_s = 0.0  # of drafting for one request, beside the passes
        self._passes_s = 0.0  # of the last draft, at their prices
        self.last_draft_s = 0.0
        """What drafting for the last step took."""

    @property
    def sized(self) -> bool:
        """Whether the sizer decides."""
        return not self.speculation.widths and self.speculation.nodes is None

    @property
    def rests(self) -> bool:
        """Whether nothing will be drafted for the next step, whatever it is."""
        return self._rest_steps > 0

    def draft(self, chosen: Sequence[tuple[Request, int]], room: Room, deepest: Callable[[Request], int],
              table: Callable[[str], Sequence[int]]) -> dict[str, TokenTree]:  # fmt: skip
        """Trees for requests that are chosen for their next token, those for whom one pays and is possible.

        room, deepest: what the scheduler grants. table: a request's blocks.
        """
        began = self._clock()
        self._drafted = {}
        self._passes_s = 0.0
        if self._rest_steps > 0:
            self._rest_steps -= 1
            self.last_draft_s = 0.0
            return {}
        growing: list[tuple[Request, int, int]] = []
        candidates = [
            (request, deepest(request))
            for request, new in chosen
            if new == 1 and not request.unread and request.planned == len(request.tokens) - 1 >= request.prompt_len
        ]
        candidates = [(request, depth) for request, depth in candidates if depth > 0]
        if candidates:
            known = sum(new for _, new in chosen)
            sizes = self._sizes([Want(min(depth, DEEPEST), MOST_NODES) for _, depth in candidates], known)
            self.sizes = sizes
            if sizes.depth:
                self._rests = 0
                left = self.most_rows - len(chosen)
                shaped = self.sized and bool(self.models)  # by each context's own chances, once they are known
                slack = SLACK if shaped and SLACK * (sum(sizes.nodes) + len(candidates)) <= left else 1
                for (request, depth), nodes in zip(candidates, sizes.nodes):
                    nodes = min(slack * (nodes + (slack > 1)), left)
                    granted = room(request, nodes) if nodes > 0 else 0
                    if granted:
                        growing.append((request, min(depth, DEEPEST if shaped else sizes.depth), granted))
                        left -= granted
                self._grow(growing, table, sizes, known)
            else:
                self._rests += 1
                self._rest_steps = KEPT_STEPS - 1
        self.last_draft_s = self._clock() - began
        if growing and self.models:
            beside_s = (self.last_draft_s - self._passes_s) / len(growing)
            self._fixed_s += FIXED_SHARE * (max(beside_s, 0.0) - self._fixed_s)
        self.tally.draft_s += self.last_draft_s
        return {request_id: drafted.tree for request_id, drafted in self._drafted.items()}

    def _sizes(self, wants: list[Want], known: int) -> Sizes:
        """known: tokens that the step computes beside drafts."""
        asked = self.speculation
        if not self.sized:
            depth = len(asked.widths) or (asked.nodes or 1)
            nodes = asked.most_nodes
            if asked.method == "tree" and not asked.widths:
                depth = min(depth, DEEPEST)
            return Sizes(depth, (nodes,) * len(wants), 0.0, 0.0, 0.0, 0.0)
        load = (known, wants)
        if self._chosen is None or self._keep_steps <= 0 or self._chosen[0] != load:
            self._chosen = load, self._choice(wants, known)
            self._keep_steps = KEPT_STEPS
        self._keep_steps -= 1
        sizes = self._chosen[1]
        if sizes.depth == 0:
            self._keep_steps = 0
        if sizes.depth == 0 and self._rests >= PROBE_RESTS:
            return Sizes(1, (1,) * len(wants), sizes.tokens_per_s, sizes.plain_per_s, 0.0, 0.0)
        return sizes

    def _choice(self, wants: list[Want], known: int) -> Sizes:
        level_s = self.draft_seconds(len(wants)) if self.models else 0.0
        fixed_s = self._fixed_s * len(wants)
        width = WIDTH if self.speculation.method == "tree" else 1

        def target(nodes: int) -> float:
            return self.target_s(known, nodes)

        def draft(depth: int) -> float:
            return fixed_s + depth * level_s

        return choose_sizes(wants, self.acceptance.by_depth, target, draft, width, DEEPEST)

    def target_s(self, known: int, nodes: int) -> float:
        """Seconds of the target's step with so many known tokens and nodes."""
        return self.seconds(known + nodes) if nodes else self.plain_seconds(known)

    # Growing trees

    def _grow(
        self,
        growing: Sequence[tuple[Request, int, int]],
        table: Callable[[str], Sequence[int]],
        sizes: Sizes,
        known: int,
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
            for place, drafted in enumerate(self._by_model(model, source, share, table, sizes, known)):
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
        known: int,
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
            proposals = model.propose([growths[place] for place in active], width)
            for place, proposed in zip(active, proposals):
                self._add(growths[place], proposed, notes[place], source)
            going = [place for place in active if self._may_go_on(growths[place], level, growing[place][1])]
            if self.sized and going:
                going = self._worth_a_level(growths, going, level + 1, width, sizes)
            if level > 1:  # the first level also catches up, which is no price of a level
                self.draft_seconds.learn(len(active), self._clock() - began)
            self._passes_s += self.draft_seconds(len(active))
            active = going
        kept: list[Sequence[int]] = [growth.sketch.best(nodes) for growth, (_, _, nodes) in zip(growths, growing)]
        if self.sized:
            kept = self._worth_verifying(growths, kept, known)
        return [_arranged(growth.sketch, nodes, noted) for growth, nodes, noted in zip(growths, kept, notes)]

    def _worth_a_level(
        self, growths: Sequence[Growth], going: Sequence[int], level: int, width: int, sizes: Sizes
    ) -> list[int]:
        """Those for whom another pass is expected to bring more tokens than its time brings otherwise.

        A pass is for all of them together: the surer half may be worth one where all are not.
        """
        chances = [self.acceptance.by_depth(level, rank) for rank in range(width)]
        node = sizes.least_chance
        gains = []
        for place in going:
            path = growths[place].sketch.scores[growths[place].at[0]]
            gains.append((sum(max(0.0, path * chance - node) for chance in chances), place))
        gains.sort(key=lambda entry: -entry[0])
        best, count, total = 0.0, 0, 0.0
        for number, (gain, _) in enumerate(gains, 1):
            total += gain
            net = total - sizes.tokens_per_s * self.draft_seconds(number)
            if net > best:
                best, count = net, number
        return sorted(place for _, place in gains[:count])

    def _worth_verifying(
        self, growths: Sequence[Growth], kept: Sequence[Sequence[int]], known: int
    ) -> list[Sequence[int]]:
        """Of the nodes that are drafted, as many of the likeliest as make most tokens a second, over all requests."""
        pool = sorted(
            (-growths[place].sketch.scores[node], place, at)
            for place, nodes in enumerate(kept)
            for at, node in enumerate(nodes)
        )
        spent_s = self._passes_s + self._fixed_s * len(growths)
        requests = max(known, 1)
        best, count, expected = requests / (spent_s + self.target_s(known, 0)), 0, float(requests)
        for number, (score, _, _) in enumerate(pool, 1):
            expected -= score
            rate = expected / (spent_s + self.target_s(known, number))
            if rate > best:
                best, count = rate, number
        most = [0] * len(kept)
        for _, place, _ in pool[:count]:
            most[place] += 1
        return [nodes[: most[place]] for place, nodes in enumerate(kept)]

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

    def _may_go_on(self, growth: Growth, level: int, depth: int) -> bool:
        return level < depth and bool(growth.at) and len(growth.expanded) + len(growth.at) <= growth.nodes

    def _keep(self, request: Request, sketch: Sketch, nodes: int, noted: Mapping[int, tuple[int, float, int]]) -> None:
        drafted = _arranged(sketch, sketch.best(nodes), noted)
        if drafted is not None:
            self._drafted[request.request_id] = drafted

    # Learning

    def learn(self, plan: StepPlan, result: StepResult, step_s: float) -> None:
        """A step has been run in step_s seconds, drafting left out."""
        if all(len(chunk.token_ids) == 1 for chunk in plan.chunks):  # prefills' rows cost less
            trees = any(chunk.tree is not None for chunk in plan.chunks)
            ours, other = (self.seconds, self.plain_seconds) if trees else (self.plain_seconds, self.seconds)
            other.drift(ours.learn(plan.num_tokens, step_s))
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
