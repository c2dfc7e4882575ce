"""Logits straight from the Decoder: pages, block tables and chunks laid out by hand."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ridgeline.core.request import SamplingParams
from ridgeline.core.step import Chunk, Sampling, StepPlan
from ridgeline.run.prepare import prepare
from ridgeline.run.runner import Runner


@torch.inference_mode()
def step_logits(
    runner: Runner, tokens: Sequence[Sequence[int]], tables: Sequence[Sequence[int]], spans: Sequence[tuple[int, int]]
) -> list[torch.Tensor]:
    """One step: of each sequence the tokens [first, last), its pages before `first` written already.

    Returns the logits of every new token, [last - first, vocabulary] a sequence.
    """
    chunks = []
    for index, (first, last) in enumerate(spans):
        sampling = Sampling(SamplingParams(temperature=0), 0, last, tokens[index], len(tokens[index]))
        chunks.append(Chunk(str(index), tokens[index][first:last], first, tables[index], sampling))
    plan = StepPlan(0, tuple(chunks))
    batch = prepare(plan, runner.device, runner.block_size).batch
    batch.rows = None
    ops = runner.table.ops(plan.kind)
    logits = runner.model.logits(runner.model.forward(batch, runner.pages.keys, runner.pages.values, ops), ops)
    return list(logits.split([last - first for first, last in spans]))


def sequence_logits(runner: Runner, tokens: Sequence[Sequence[int]], chunk: int | None = None) -> list[torch.Tensor]:
    """Logits of whole sequences in one batch, [tokens, vocabulary] each.

    chunk: new tokens of each sequence in a step (None: all at once). Pages are handed out in a shuffled
    order, so that no sequence lies in one piece.
    """
    size = runner.block_size
    needed = [-(-len(one) // size) for one in tokens]
    order = torch.randperm(runner.pages.blocks, generator=torch.Generator().manual_seed(0)).tolist()
    assert sum(needed) <= len(order), "the pool is too small for these sequences"
    tables = [[order.pop() for _ in range(count)] for count in needed]
    parts: list[list[torch.Tensor]] = [[] for _ in tokens]
    for step in steps_of(list(map(len, tokens)), chunk):
        live = [index for index, _, _ in step]
        spans = [(first, last) for _, first, last in step]
        out = step_logits(runner, [tokens[i] for i in live], [tables[i] for i in live], spans)
        for index, logits in zip(live, out):
            parts[index].append(logits)
    return [torch.cat(one) for one in parts]


def steps_of(lengths: Sequence[int], chunk: int | None = None) -> list[list[tuple[int, int, int]]]:
    """The steps of `sequence_logits`: (sequence, first, last) of the new tokens, in the rows' order."""
    width = chunk or max(lengths)
    return [
        [(index, first, min(first + width, length)) for index, length in enumerate(lengths) if length > first]
        for first in range(0, max(lengths), width)
    ]
