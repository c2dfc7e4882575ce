"""A small model that drafts: its passes over the target's requests, level by level of their trees.

Knows a decoder, its pages and its kernels. It must not know schedulers, nor what becomes of a draft.

Its keys and values lie in pages of their own under the target's block numbers, so whoever has a block has both. What
of them is up to date is kept by request: `computed` tokens in the blocks that the request had then. Tokens that it
did not draft itself, or whose drafts were not accepted, are computed on the way at its next pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from ridgeline.core.request import Request
from ridgeline.core.step import Chunk, Sampling, StepPlan
from ridgeline.core.tree import ROOT, Sketch
from ridgeline.kernels.select import Table
from ridgeline.kv.pages import Pages
from ridgeline.models.decoder import Decoder
from ridgeline.run.beams import DEEPEST, Beams, Begun, Levels
from ridgeline.run.graphs import PassGraphs
from ridgeline.run.prepare import adjusts, penalizes, prepare, sample_inputs, send
from ridgeline.run.verify import Choose, Trial, draw_children, law_of


@dataclass(slots=True)
class _State:
    """What of a request's keys and values is up to date: `computed` tokens, in these blocks, and behind them those
    of `ahead`, drafted tokens that may have been accepted since."""

    blocks: list[int] = field(default_factory=list)
    computed: int = 0
    ahead: list[int] = field(default_factory=list)
    preemptions: int = 0


@dataclass(slots=True)
class Proposal:
    """Children that a drafter proposes behind a node: best first, with its probabilities; or drawn from its law, in
    that order, as `trials`."""

    tokens: list[int]
    chances: list[float]
    trials: list[Trial] = field(default_factory=list)


@dataclass(slots=True)
class Growth:
    """A request's draft as it grows. blocks: its table, with room for `nodes` slots behind its tokens.

    sketch: what is proposed; at: the nodes that the next pass computes (ROOT at first), in the order of `expanded`,
    which holds all nodes computed so far.
    coldly: propose its likeliest tokens, whatever the noise. choose: draw children from its law with this, as many
    behind each node of `at` as `counts` says.
    """

    request: Request
    blocks: Sequence[int]
    nodes: int
    sketch: Sketch = field(default_factory=Sketch)
    at: list[int] = field(default_factory=lambda: [ROOT])
    expanded: list[int] = field(default_factory=list)
    coldly: bool = False
    choose: Choose | None = None
    counts: list[int] = field(default_factory=list)


class DraftModel:
    """A decoder with pages for as many blocks as the target has.

    most_tokens: new tokens of one pass; longer prompts are caught up with in several.
    """

    def __init__(
        self, model: Decoder, pages: Pages, table: Table, device: torch.device, block_size: int, most_tokens: int
    ) -> None:
        self.model = model
        self.pages = pages
        self.table = table
        self.device = device
        self.block_size = block_size
        self.most_tokens = most_tokens
        self.graphs: PassGraphs | None = None
        """Serve the passes that they can; None: every pass runs op by op."""
        self.beams: Beams | None = None
        """Serve the levels behind the first pass that they can, all at once."""
        self.passes = 0
        self.last_rows = 0
        """Rows of the pass that proposed last."""
        self.steady = True
        """Whether the last levels had no more to catch up with than a step with trees leaves behind."""
        self._states: dict[str, _State] = {}

    def forget(self, request_id: str) -> None:
        """A request has ended."""
        self._states.pop(request_id, None)

    def caught_up(self, request: Request, blocks: Sequence[int]) -> None:
        """Take a request's tokens but the last as computed, whatever its blocks hold (for taking times)."""
        self._states[request.request_id] = _State(list(blocks), len(request.tokens) - 1)

    def behind(self, request: Request, blocks: Sequence[int]) -> int:
        """Tokens that the next pass has to compute for a request."""
        return len(request.tokens) - self._current(request, blocks).computed

    @torch.inference_mode()
    def propose(self, growths: Sequence[Growth], count: int) -> list[list[Proposal]]:
        """One pass: `count` children behind each node in each growth's `at`, in its order."""
        self.passes += 1
        chunks: list[Chunk] = []
        rows: list[int] = []  # of the batch, one for each node that is asked for
        settings: list[Sampling] = []
        first = 0
        self._catch_up([growth for growth in growths if growth.at == [ROOT]], self.most_tokens)
        for growth in growths:
            chunk, wanted = self._chunk(growth)
            chunks.append(chunk)
            rows += [first + row for row in wanted]
            first += chunk.new
            settings += [_sampling(growth, node) for node in growth.at]
        self.last_rows = first
        plan = StepPlan(0, tuple(chunks))
        ops = self.table.ops(plan.kind)
        graphs = self.graphs
        if graphs is not None and graphs.size_for(chunks) is not None:
            apart = any(growth.choose is not None for growth in growths) or count > (graphs.children or 0)
            passed = graphs.launch(chunks, zip(rows, settings), whole=not apart)
            if passed.proposed is not None and passed.chances is not None:
                ids, values = passed.proposed.tolist(), passed.chances.tolist()
                proposals = iter([Proposal(ids[row][:count], values[row][:count]) for row in rows])
                return [[next(proposals) for _ in growth.at] for growth in growths]
            hidden = passed.hidden[send(np.array(rows, dtype=np.int64), self.device)]
        else:
            batch = prepare(plan, self.device, self.block_size).batch
            every = rows == list(range(first))
            batch = replace(batch, rows=None if every else send(np.array(rows, dtype=np.int64), self.device))
            hidden = self.model.forward(batch, self.pages.keys, self.pages.values, ops)
        logits = self.model.logits(hidden, ops)
        inputs = sample_inputs(settings, self.device)
        if inputs.penalties is not None:
            logits = ops.adjust(logits, *inputs.penalties.arguments)
        tokens, chances = ops.propose(
            logits, inputs.temperature, inputs.seeds, inputs.positions, inputs.greedy, min(count, logits.shape[1])
        )
        ids, values = tokens.tolist(), chances.tolist()
        result: list[list[Proposal]] = []
        row = 0
        for growth in growths:
            if growth.choose is None:
                result.append([Proposal(ids[row + i], values[row + i]) for i in range(len(growth.at))])
            else:
                result.append(_drawn(growth, growth.choose, logits[row : row + len(growth.at)]))
            row += len(growth.at)
        return result

    def whole(self, request: Request) -> bool:
        """Whether all levels of a request's draft may be made at once: nothing changes its logits from row to row."""
        return not adjusts(Sampling(request.params, request.seed, 0, [], request.prompt_len))

    def levels(
        self, growths: Sequence[Growth], widths: Sequence[int], odds: Any, among: int = 0, least: float = 0.0
    ) -> Levels | None:
        """All levels of these drafts with one wait for the device, the first pass included: in each, `widths[level]`
        children count behind each row of a request's beam. None if that cannot be done here.

        growths: as they begin, each with Beams.slots behind its tokens, reckoned for `among` requests if that is more.
        odds, least: see Beams.draft.
        """
        graphs, beams = self.graphs, self.beams
        if graphs is None or beams is None or not beams.serves(max(len(growths), among)):
            return None
        settings = [_sampling(growth, ROOT) for growth in growths]
        if max(widths) > beams.children or any(map(adjusts, settings)):
            return None
        most = graphs.sizes[-1].rows if graphs.sizes else self.most_tokens
        caught_up = self._catch_up(growths, most)
        chunks = [self._chunk(growth)[0] for growth in growths]
        if graphs.size_for(chunks) is None:  # nothing of them is computed, then
            for chunk in chunks:
                self._states[chunk.request_id].computed = chunk.start
            return None
        begun: list[Begun] = []
        first = 0
        for growth, chunk, sampling in zip(growths, chunks, settings):
            first += chunk.new
            begun.append(Begun(len(growth.request.tokens), growth.blocks, first - 1, sampling))
        self.last_rows = first
        self.steady = not caught_up and first <= len(growths) * (1 + DEEPEST)
        passed = graphs.launch(chunks, [(one.row, one.sampling) for one in begun])
        levels = beams.draft(begun, passed, widths, odds, among, least)
        self.passes += len(levels)
        return levels

    def _chunk(self, growth: Growth) -> tuple[Chunk, list[int]]:
        """The rows that a growth's next pass computes, and which of them are asked for."""
        request, blocks = growth.request, growth.blocks
        tokens = request.tokens
        sampling = _sampling(growth, growth.at[0])
        if growth.at == [ROOT]:
            state = self._current(request, blocks)
            start = state.computed
            new = self._known(tokens[start:])
            state.computed = len(tokens)
            state.blocks = list(blocks[: -(-(len(tokens) + growth.nodes) // self.block_size)])
            return Chunk(request.request_id, new, start, blocks, sampling), [len(new) - 1]
        sketch = growth.sketch
        growth.expanded += growth.at
        path = [sketch.parents[node] for node in growth.expanded] == [ROOT, *growth.expanded[:-1]]
        if path and len(growth.at) == 1:  # a chain lies in slots one after the other, as tokens do
            start = len(tokens) + len(growth.expanded) - 1
            self._states[request.request_id].ahead.append(sketch.tokens[growth.at[0]])
            return Chunk(request.request_id, [sketch.tokens[growth.at[0]]], start, blocks, sampling), [0]
        self._states[request.request_id].ahead.clear()
        tree, order = sketch.tree(growth.expanded)
        place = {node: at for at, node in enumerate(order)}
        last = self._known(tokens[-1:])
        chunk = Chunk(request.request_id, last, len(tokens) - 1, blocks, sampling, tree=tree)
        return chunk, [1 + place[node] for node in growth.at]

    def _known(self, tokens: list[int]) -> list[int]:
        """Tokens as this model may read them. The target's vocabulary may be padded further than its own: an id beyond
        stands as 0, and what is drafted behind it is as good as that."""
        most = self.model.spec.vocabulary
        return tokens if max(tokens) < most else [token if token < most else 0 for token in tokens]

    def _current(self, request: Request, blocks: Sequence[int]) -> _State:
        """A request's state, as far as it still holds: blocks that were replaced or given up are not up to date."""
        state = self._states.get(request.request_id)
        if state is None or state.preemptions != request.preemptions:
            state = self._states[request.request_id] = _State(preemptions=request.preemptions)
        same = len(state.blocks)
        if state.blocks != blocks[:same]:
            same = next((at for at, (mine, now) in enumerate(zip(state.blocks, blocks)) if mine != now), len(blocks))
        if state.computed < len(request.tokens):
            for drafted in state.ahead:
                if state.computed == len(request.tokens) or request.tokens[state.computed] != drafted:
                    break
                state.computed += 1
            state.ahead.clear()
        # The last token is always computed: its row is what the first proposals come from.
        state.computed = min(state.computed, same * self.block_size, len(request.tokens) - 1)
        return state

    def _catch_up(self, growths: Sequence[Growth], most: int) -> bool:
        """Compute what does not fit into the pass that proposes, of `most` rows: all but the last token of those that
        lack the most, side by side; whether there was anything."""
        behind = {at: self.behind(growth.request, growth.blocks) for at, growth in enumerate(growths)}
        total = sum(behind.values())
        if total <= max(most, len(growths)):
            return False
        chunks: list[Chunk] = []
        rows = 0
        for at in sorted(behind, key=lambda one: -behind[one]):
            if total <= max(most, len(growths)):
                break
            total -= behind[at] - 1
            request, blocks = growths[at].request, growths[at].blocks
            state, last = self._states[request.request_id], len(request.tokens) - 1
            while state.computed < last:
                start = state.computed
                end = min(start + self.most_tokens - rows, last)
                chunks.append(Chunk(request.request_id, self._known(request.tokens[start:end]), start, blocks, None))
                state.computed, state.blocks = end, list(blocks[: -(-end // self.block_size)])
                rows += end - start
                if rows == self.most_tokens:
                    self._fill(chunks)
                    chunks, rows = [], 0
        if chunks:
            self._fill(chunks)
        return True

    def _fill(self, chunks: Sequence[Chunk]) -> None:
        """Write chunks' keys and values."""
        plan = StepPlan(0, tuple(chunks))
        batch = prepare(plan, self.device, self.block_size).batch
        batch = replace(batch, rows=send(np.array([plan.num_tokens - 1], dtype=np.int64), self.device))
        self.model.forward(batch, self.pages.keys, self.pages.values, self.table.ops(plan.kind))


def _drawn(growth: Growth, choose: Choose, logits: torch.Tensor) -> list[Proposal]:
    """Children drawn without replacement. The request's cuts are the drafter's too: what the target cannot choose
    would be rejected."""
    proposals = []
    for count, row in zip(growth.counts, logits.float().cpu().numpy()):
        q = law_of(row, growth.request.params)
        trials = draw_children(q, count, choose) if count else []
        proposals.append(Proposal([one.token for one in trials], [float(q[one.token]) for one in trials], trials))
    return proposals


def _sampling(growth: Growth, node: int) -> Sampling:
    """How the token behind a node would be chosen. top_k=1 is greedy; other cuts are the target's business."""
    request, sketch = growth.request, growth.sketch
    params = request.params
    depth = 0 if node == ROOT else sketch.depths[node]
    tokens: Sequence[int] = request.tokens
    if depth and penalizes(params):
        tokens = [*request.tokens, *sketch.path_tokens(node)]
    if params.top_k == 1 or growth.coldly:
        params = replace(params, temperature=0.0)
    return Sampling(params, request.seed, len(request.tokens) + depth, tokens, request.prompt_len)
