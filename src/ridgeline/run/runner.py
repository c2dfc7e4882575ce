"""Running a step on a device: forward, sampling, scores.

Knows the model, its pages and its ops. It must not know scheduling: it gets a StepPlan and answers with
a StepResult.

`start` puts all of a step's work on the device and returns; nothing waits for the device until `Step.result`.
What was sampled stays on the device, where the next step finds it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from ridgeline.core.errors import CheckpointError
from ridgeline.core.step import Accepted, Chunk, StepPlan, StepResult, TokenScore
from ridgeline.core.tree import TokenTree
from ridgeline.kernels.select import Table
from ridgeline.kv.pages import Pages
from ridgeline.models.decoder import Decoder
from ridgeline.ops import Ops
from ridgeline.run.graphs import DecodeGraphs, PassGraphs
from ridgeline.run.prepare import Prepared, SampleInputs, prepare, sample_inputs, send
from ridgeline.run.prompts import PromptGraphs
from ridgeline.run.transfer import Answers
from ridgeline.run.verify import Draws, law_of, walked

SCORED_ROWS = 256
"""Prompt rows whose logits exist at once: bounds memory, not speed."""


Scores = tuple[torch.Tensor, ...]
"""What the op `score` returns: log-probability, rank, values and ids of the likeliest, on the host."""


@dataclass(slots=True)
class Step:
    """A step under way. Tensors are on the host, or on their way there until `done`.

    names: requests that get a token, rows: theirs in `tokens` (None: 0, 1, ...). trees: parallel to names, if any
    request verifies one; it has as many rows more. paths: the nodes that were accepted, of requests whose trees the
    device has not walked by itself. asked: by row, how many alternatives are wanted, None for no log-probabilities.
    scored: (request, prompt tokens, alternatives), one after the other in `prompt_parts`, each of which is the targets
    of a slice and their scores.
    """

    vocabulary: int
    dtype: torch.dtype
    names: list[str] = field(default_factory=list)
    rows: list[int] | None = None
    trees: list[TokenTree | None] = field(default_factory=list)
    paths: dict[str, list[int]] = field(default_factory=dict)
    asked: list[int | None] = field(default_factory=list)
    tokens: torch.Tensor | None = None
    scores: Scores | None = None
    scored: list[tuple[str, int, int]] = field(default_factory=list)
    prompt_parts: list[tuple[torch.Tensor, Scores]] = field(default_factory=list)
    padding: int = 0
    began: torch.cuda.Event | None = None
    done: torch.cuda.Event | None = None
    device_s: float = 0.0

    def result(self) -> StepResult:
        """Wait for the step. Raises CheckpointError if its logits were not numbers."""
        if self.done is not None and self.began is not None:
            self.done.synchronize()
            self.device_s = self.began.elapsed_time(self.done) / 1e3
        result = StepResult(device_s=self.device_s, padding=self.padding)
        if self.tokens is not None and self.names:
            tokens = self.tokens.tolist()
            if self.rows is not None:
                tokens = [tokens[row] for row in self.rows]
            self._take(result, self._checked(tokens))
        if self.scored:
            result.prompt_scores = self._prompt_scores()
        return result

    def _checked(self, tokens: list[int]) -> list[int]:
        """Chosen tokens. Where every comparison with NaN is false, `sample` finds none in the vocabulary."""
        if not 0 <= min(tokens) <= max(tokens) < self.vocabulary:
            raise CheckpointError(
                f"the model's logits are not numbers (NaN): its weights are damaged, or {self.dtype} "
                "overflows; try dtype='float32' or 'bfloat16'"
            )
        return tokens

    def _take(self, result: StepResult, tokens: list[int]) -> None:
        """Chosen tokens by request, those of trees along their accepted paths."""
        if not self.trees:
            result.sampled = dict(zip(self.names, self._token_scores(tokens)))
            return
        scores = None if self.scores is None else self._token_scores(tokens)
        row = 0
        for name, tree in zip(self.names, self.trees):
            if tree is None:
                result.sampled[name] = TokenScore(tokens[row]) if scores is None else scores[row]
                row += 1
                continue
            walked = self.paths.get(name)
            nodes = tree.walk(tokens[row : row + 1 + len(tree)]) if walked is None else walked
            rows = [row, *(row + 1 + node for node in nodes)]
            chosen = [TokenScore(tokens[one]) for one in rows] if scores is None else [scores[one] for one in rows]
            result.accepted[name] = Accepted(nodes, chosen)
            row += 1 + len(tree)

    def _token_scores(self, tokens: list[int]) -> list[TokenScore]:
        """Row by row. Those that asked for no log-probabilities get none."""
        if self.scores is None:
            return [TokenScore(token) for token in tokens]
        result = _token_scores(tokens, self.scores)
        for row, wanted in enumerate(self.asked):
            if wanted is None:
                result[row] = TokenScore(tokens[row])
            else:
                result[row].top = result[row].top[:wanted]
        return result

    def _prompt_scores(self) -> dict[str, list[TokenScore]]:
        flat: list[TokenScore] = []
        for targets, scores in self.prompt_parts:
            flat.extend(_token_scores(targets.tolist(), scores))
        result, start = {}, 0
        for request_id, rows, alternatives in self.scored:
            own = flat[start : start + rows]
            start += rows
            for one in own:
                one.top = one.top[:alternatives]
            result[request_id] = own
        return result


class Runner:
    """A model on a device with its KV pages and its table of kernels.

    graphs: serve the decode steps that they can, passes the steps with trees, prompts those with prompts (only beside
    graphs, where they find the tokens of the step before); None: these run op by op.
    """

    def __init__(
        self,
        model: Decoder,
        pages: Pages,
        table: Table,
        device: torch.device,
        block_size: int,
        graphs: DecodeGraphs | None = None,
        passes: PassGraphs | None = None,
        prompts: PromptGraphs | None = None,
    ) -> None:
        self.model = model
        self.pages = pages
        self.table = table
        self.device = device
        self.block_size = block_size
        self.graphs = graphs
        self.passes = passes
        self.prompts = prompts
        self._tokens = torch.zeros(1, dtype=torch.int64, device=device)  # of the last step, row by row
        self._places: dict[str, int] = {}  # whose row is which
        self._answers = Answers()

    def run(self, plan: StepPlan, ops: Ops | None = None) -> StepResult:
        """One step, and wait for it. `ops` replaces the table's, to observe them, and captured steps with them."""
        return self.start(plan, ops).result()

    @torch.inference_mode()
    def start(self, plan: StepPlan, ops: Ops | None = None) -> Step:
        """Put a step on the device. Steps run in the order in which they are started."""
        step = Step(self.model.spec.vocabulary, self.model.store.dtype)
        start_s = time.perf_counter()
        if self.device.type == "cuda":
            step.began = torch.cuda.Event(enable_timing=True)
            step.began.record(torch.cuda.current_stream(self.device))
        if plan.copies:
            source, target = send(np.array(plan.copies, dtype=np.int64).T.copy(), self.device)
            (ops or self.table.ops(plan.kind)).kv_move([*self.pages.keys, *self.pages.values], source, target)
        if ops is None and self.graphs is not None and self.graphs.serves(plan.chunks):
            self._replay(plan, step, self.graphs)
        elif ops is None and self.passes is not None and plan.kind == "tree" and self.passes.serves(plan.chunks):
            self._replay_trees(plan, step, self.passes)
        elif ops is None and self.graphs is not None and self.prompts is not None and self.prompts.serves(plan.chunks):
            self._replay_prompts(plan, step, self.prompts)
        else:
            self._compute(plan, step, ops or self.table.ops(plan.kind))
        if step.began is not None:
            step.done = torch.cuda.Event(enable_timing=True)
            step.done.record(torch.cuda.current_stream(self.device))
        step.device_s = time.perf_counter() - start_s  # a CPU is done by now
        return step

    def close(self) -> None:
        """Wait for steps under way and give the graphs' memory back. No step may follow."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        if self.graphs is not None:
            self.graphs.release()
            self.graphs = None
        if self.passes is not None:
            self.passes.release()
            self.passes = None
        if self.prompts is not None:
            self.prompts.release()
            self.prompts = None

    def _compute(self, plan: StepPlan, step: Step, ops: Ops) -> None:
        """Any step, op by op."""
        ready = prepare(plan, self.device, self.block_size, self._places)
        batch = ready.batch
        if ready.sources is not None:
            batch.ids = ops.feed(batch.ids, ready.sources, self._tokens, self.model.spec.vocabulary)
        hidden = self.model.forward(batch, self.pages.keys, self.pages.values, ops)
        count = ready.samples.count
        if count:
            step.names, step.trees = ready.sampled_ids, ready.trees
            step.asked = [
                c.sampling.params.logprobs
                for c in plan.chunks
                if c.sampling is not None
                for _ in range(1 + len(c.behind))
            ]
            chunks = [c for c in plan.chunks if c.sampling is not None]
            rows = hidden if count == hidden.shape[0] else hidden[:count]
            chosen = self._choose(step, rows, ready.samples, ops, chunks if step.trees else ())
            if step.trees:
                self._places = {}  # tokens of trees are read before anything follows them
                self._verify(chunks, chosen, step, ops)
            else:
                self._keep(chosen, step.names)
        if ready.targets is not None:
            step.scored = ready.scored
            self._score_prompts(step, hidden[count:], ready, ops)

    def _verify(self, chunks: Sequence[Chunk], chosen: torch.Tensor, step: Step, ops: Ops) -> None:
        """Walk each tree along the tokens that were chosen, and move what was accepted to where it belongs."""
        tokens, size = chosen.tolist(), self.block_size
        source: list[int] = []
        target: list[int] = []
        row = 0
        for chunk in chunks:
            tree, blocks = chunk.tree, chunk.blocks
            count = 1 + len(chunk.behind)
            if tree is not None:
                if chunk.request_id not in step.paths:
                    step.paths[chunk.request_id] = tree.walk(tokens[row : row + count])
                nodes = step.paths[chunk.request_id]
                first = chunk.start + len(chunk.token_ids)
                for depth, node in enumerate(nodes):
                    if node != depth:
                        for slots, place in ((source, first + node), (target, first + depth)):
                            slots.append(blocks[place // size] * size + place % size)
            row += count
        if source:
            moved, places = send(np.array([source, target], dtype=np.int64), self.device)
            ops.kv_compact([*self.pages.keys, *self.pages.values], moved, places)

    def _replay(self, plan: StepPlan, step: Step, graphs: DecodeGraphs) -> None:
        """A step of decoding at a captured size."""
        chunks = plan.chunks
        launched = graphs.launch(chunks, self._places)
        step.padding = launched.padding
        step.names = [chunk.request_id for chunk in chunks if chunk.sampling is not None]
        if len(step.names) < len(chunks):
            step.rows = [row for row, chunk in enumerate(chunks) if chunk.sampling is not None]
        if launched.tokens is not None:
            step.tokens = self._answers.take(launched.tokens)
            self._tokens, self._places = graphs.sampled, {name: row for row, name in enumerate(_names(plan))}
            return
        hidden = launched.hidden
        if step.rows is not None:
            hidden, step.rows = hidden[send(np.array(step.rows, dtype=np.int64), self.device)], None
        self._sample(plan, step, hidden)

    def _replay_prompts(self, plan: StepPlan, step: Step, prompts: PromptGraphs) -> None:
        """A step with prompts at a captured size."""
        launched = prompts.launch(plan.chunks, self._places)
        step.padding = launched.padding
        step.names = [chunk.request_id for chunk in plan.chunks if chunk.sampling is not None]
        if step.names:
            self._sample(plan, step, launched.hidden)

    def _sample(self, plan: StepPlan, step: Step, hidden: torch.Tensor) -> None:
        """The tokens behind the hidden states [S, D] of all chunks that are sampled, op by op."""
        settings = [chunk.sampling for chunk in plan.chunks if chunk.sampling is not None]
        step.asked = [one.params.logprobs for one in settings]
        inputs = sample_inputs(settings, self.device)
        self._keep(self._choose(step, hidden, inputs, self.table.ops(plan.kind)), step.names)

    def _replay_trees(self, plan: StepPlan, step: Step, passes: PassGraphs) -> None:
        """A step of verification at a captured size."""
        chunks = plan.chunks
        settings = [one for chunk in chunks if chunk.sampling is not None for one in (chunk.sampling, *chunk.behind)]
        # Where children were drawn, their laws decide, on the host.
        launched = passes.launch(chunks, enumerate(settings), whole=all(chunk.draws is None for chunk in chunks))
        step.padding = launched.padding
        step.names, step.trees = [chunk.request_id for chunk in chunks], [chunk.tree for chunk in chunks]
        self._places = {}  # tokens of trees are read before anything follows them
        if launched.tokens is not None:
            step.tokens = self._answers.take(launched.tokens)
            return
        ops = self.table.ops("tree")
        step.asked = [one.params.logprobs for one in settings]
        chosen = self._choose(step, launched.hidden, sample_inputs(settings, self.device), ops, chunks)
        self._verify(chunks, chosen, step, ops)

    def _keep(self, chosen: torch.Tensor, names: Sequence[str]) -> None:
        """The next step finds its tokens here, captured ones at their own fixed place."""
        self._tokens, self._places = chosen, {name: row for row, name in enumerate(names)}
        if self.graphs is not None:
            self.graphs.sampled[: len(names)].copy_(chosen)

    def _choose(
        self, step: Step, hidden: torch.Tensor, inputs: SampleInputs, ops: Ops, chunks: Sequence[Chunk] = ()
    ) -> torch.Tensor:
        """Tokens of rows of hidden states [S, D], [S] on the device; what the step tells of them is on its way.

        chunks: those of a step with trees, for the ones whose children were drawn.
        """
        logits = self.model.logits(hidden, ops)
        adjusted = adjust(logits, inputs, ops)
        chosen = choose(adjusted, inputs, ops)
        if any(chunk.draws is not None for chunk in chunks):
            self._sample_through(chunks, adjusted, chosen, step)
        step.tokens = _to_host(chosen)
        if inputs.alternatives is not None:
            tokens = chosen.clamp(max=logits.shape[1] - 1)  # NaN has chosen none, which `result` will say
            step.scores = tuple(map(_to_host, ops.score(logits, tokens, inputs.alternatives)))
        return chosen

    def _sample_through(self, chunks: Sequence[Chunk], logits: torch.Tensor, chosen: torch.Tensor, step: Step) -> None:
        """Trees whose children were drawn: the walk decides, on the host in float64, and its tokens are `chosen`."""
        row = 0
        for chunk in chunks:
            count = 1 + len(chunk.behind)
            if isinstance(chunk.draws, Draws) and chunk.tree is not None and chunk.sampling is not None:
                params = chunk.sampling.params
                laws = [law_of(one, params) for one in logits[row : row + count].float().cpu().numpy()]
                nodes, tokens = walked(chunk.tree, laws, chunk.draws)
                step.paths[chunk.request_id] = nodes
                rows = [row, *(row + 1 + node for node in nodes)]
                chosen[send(np.array(rows, dtype=np.int64), self.device)] = send(
                    np.array(tokens, dtype=np.int64), self.device
                )
            row += count

    def _score_prompts(self, step: Step, hidden: torch.Tensor, ready: Prepared, ops: Ops) -> None:
        assert ready.targets is not None
        most = max(alternatives for _, _, alternatives in ready.scored)
        for first in range(0, hidden.shape[0], SCORED_ROWS):
            targets = ready.targets[first : first + SCORED_ROWS]
            scores = self._scored(hidden[first : first + SCORED_ROWS], targets, most, ops)
            step.prompt_parts.append((_to_host(targets), scores))

    def _scored(self, hidden: torch.Tensor, targets: torch.Tensor, most: int, ops: Ops) -> Scores:
        """One slice, in a function of its own: its logits are gone before those of the next are there."""
        return tuple(map(_to_host, ops.score(self.model.logits(hidden, ops), targets, most)))


def _names(plan: StepPlan) -> list[str]:
    return [chunk.request_id for chunk in plan.chunks]


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    """A GPU's tensor as a copy on the host, in pinned memory and without waiting; a CPU's as it is."""
    return tensor if tensor.device.type == "cpu" else tensor.to("cpu", non_blocking=True)


def adjust(logits: torch.Tensor, inputs: SampleInputs, ops: Ops) -> torch.Tensor:
    """Logits [S, V] after penalties, biases and grammars."""
    if inputs.penalties is not None:
        logits = ops.adjust(logits, *inputs.penalties.arguments)
    if inputs.allowed is not None:
        logits = ops.restrict(logits, inputs.allowed)
    return logits


def choose(logits: torch.Tensor, inputs: SampleInputs, ops: Ops) -> torch.Tensor:
    """The next token of each row, [S] int64."""
    return ops.sample(
        logits,
        inputs.temperature,
        inputs.top_k,
        inputs.top_p,
        inputs.min_p,
        inputs.seeds,
        inputs.positions,
        inputs.greedy,
        inputs.cut,
    )


def _token_scores(tokens: Sequence[int], scores: Scores) -> list[TokenScore]:
    logprobs, ranks, values, ids = (one.tolist() for one in scores)
    return [
        TokenScore(token, logprobs[row], ranks[row], tuple(zip(ids[row], values[row])))
        for row, token in enumerate(tokens)
    ]
