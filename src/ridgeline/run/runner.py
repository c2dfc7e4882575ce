"""Running a prepared step on a device: forward, sampling, scores.

Knows the model, its pages and its ops. It must not know scheduling: it gets a StepPlan and answers with
a StepResult.
"""

from __future__ import annotations

import torch

from ridgeline.core.errors import CheckpointError
from ridgeline.core.step import StepPlan, StepResult, TokenScore
from ridgeline.kernels.select import Table
from ridgeline.kv.pages import Pages
from ridgeline.models.decoder import Decoder
from ridgeline.ops import Ops
from ridgeline.run.prepare import Prepared, SampleInputs, prepare

SCORED_ROWS = 256
"""Prompt rows whose logits exist at once: bounds memory, not speed."""


class Runner:
    """A model on a device with its KV pages and its table of kernels."""

    def __init__(self, model: Decoder, pages: Pages, table: Table, device: torch.device, block_size: int) -> None:
        self.model = model
        self.pages = pages
        self.table = table
        self.device = device
        self.block_size = block_size

    @torch.inference_mode()
    def run(self, plan: StepPlan, ops: Ops | None = None) -> StepResult:
        """One step. `ops` replaces the table's (to observe them)."""
        ready = prepare(plan, self.device, self.block_size)
        ops = ops or self.table.ops(plan.kind)
        if plan.copies:
            self._copy_blocks(plan, ops)
        hidden = self.model.forward(ready.batch, self.pages.keys, self.pages.values, ops)
        count = ready.samples.count
        result = StepResult()
        tokens: list[int] = []
        scores = None
        if count:
            logits = self.model.logits(hidden if count == hidden.shape[0] else hidden[:count], ops)
            chosen = choose(logits, ready.samples, ops)
            tokens = self._checked(chosen.tolist())
            if ready.samples.alternatives is not None:
                scores = ops.score(logits, chosen, ready.samples.alternatives)
        if ready.targets is not None:
            result.prompt_scores = self._prompt_scores(hidden[count:], ready, ops)
        if count:
            result.sampled = _token_scores(ready.sampled_ids, tokens, scores, plan)
        return result

    def _checked(self, tokens: list[int]) -> list[int]:
        """Chosen tokens. Where every comparison with NaN is false, `sample` finds none in the vocabulary."""
        if not 0 <= min(tokens) <= max(tokens) < self.model.spec.vocabulary:
            raise CheckpointError(
                f"the model's logits are not numbers (NaN): its weights are damaged, or {self.model.store.dtype} "
                "overflows; try dtype='float32' or 'bfloat16'"
            )
        return tokens

    def _copy_blocks(self, plan: StepPlan, ops: Ops) -> None:
        source, target = torch.tensor(plan.copies, dtype=torch.int64, device=self.device).T
        ops.kv_move([*self.pages.keys, *self.pages.values], source, target)

    def _prompt_scores(self, hidden: torch.Tensor, ready: Prepared, ops: Ops) -> dict[str, list[TokenScore]]:
        assert ready.targets is not None
        most = max(alternatives for _, _, alternatives in ready.scored)
        flat: list[TokenScore] = []
        for first in range(0, hidden.shape[0], SCORED_ROWS):
            targets = ready.targets[first : first + SCORED_ROWS]
            flat.extend(self._scored(hidden[first : first + SCORED_ROWS], targets, most, ops))
        result, start = {}, 0
        for request_id, rows, alternatives in ready.scored:
            own = flat[start : start + rows]
            start += rows
            for one in own:
                one.top = one.top[:alternatives]
            result[request_id] = own
        return result

    def _scored(self, hidden: torch.Tensor, targets: torch.Tensor, most: int, ops: Ops) -> list[TokenScore]:
        """One slice, in a function of its own: its logits are gone before those of the next are there."""
        return _scores(targets.tolist(), ops.score(self.model.logits(hidden, ops), targets, most))


def choose(logits: torch.Tensor, inputs: SampleInputs, ops: Ops) -> torch.Tensor:
    """The next token of each row, [S] int64, after penalties and biases."""
    if inputs.penalties is not None:
        logits = ops.adjust(logits, *inputs.penalties.arguments)
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


def _scores(tokens: list[int], scores: tuple[torch.Tensor, ...]) -> list[TokenScore]:
    logprobs, ranks, values, ids = (one.tolist() for one in scores)
    return [
        TokenScore(token, logprobs[row], ranks[row], tuple(zip(ids[row], values[row])))
        for row, token in enumerate(tokens)
    ]


def _token_scores(
    names: list[str], tokens: list[int], scores: tuple[torch.Tensor, ...] | None, plan: StepPlan
) -> dict[str, TokenScore]:
    """By request. Rows that asked for no log-probabilities get none."""
    if scores is None:
        return {name: TokenScore(token) for name, token in zip(names, tokens)}
    asked = {c.request_id: c.sampling.params.logprobs for c in plan.chunks if c.sampling is not None}
    result = {}
    for name, one in zip(names, _scores(tokens, scores)):
        wanted = asked[name]
        result[name] = TokenScore(one.token) if wanted is None else one
        result[name].top = () if wanted is None else one.top[:wanted]
    return result
