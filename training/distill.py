"""Objectives for the small speculative model: plain text, or the target's distributions.

Knows a student, a teacher and batches of tokens. The small model is trained to propose what the target would say
(SpecInfer, Miao et al., 2024; DistillSpec, Zhou et al., 2024), so it sees the target's distributions on corpus text
and on the target's own continuations. Knows nothing of how long training lasts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor, nn

from training.data import Packed
from training.model import Llama
from training.sample import continuations, mixed_precision
from training.train import Objective, cross_entropy, divergence

CONTINUED_ROW_TOKENS = 512
PREFIX_TOKENS = (32, 64, 128, 256)

Emphasis = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""From inputs [rows, tokens] and the teacher's logits: the logits to learn from, and the weight of each position."""

T = TypeVar("T")


def compiled_on(function: Callable[..., T], device: torch.device) -> Callable[..., T]:
    """The function, compiled for its shapes where that pays."""
    return torch.compile(function, dynamic=False) if device.type == "cuda" else function


def plain_objective(model: nn.Module, batches: Iterator[tuple[Tensor, Tensor]], device: torch.device) -> Objective:
    """Next-token cross entropy on `batches`."""

    def loss(inputs: Tensor, targets: Tensor) -> Tensor:
        with mixed_precision(device):
            return cross_entropy(model(inputs), targets)

    compiled = compiled_on(loss, device)
    return lambda _: compiled(*next(batches))


def distillation_objective(
    student: nn.Module,
    teacher: nn.Module,
    batches: Iterator[tuple[Tensor, Tensor]],
    continued: Iterator[Tensor],
    device: torch.device,
    emphasis: Emphasis | None = None,
) -> Objective:
    """Divergence from the teacher, the mean of two halves: corpus `batches`, and rows of `continued` text.

    `emphasis` may say for each half which positions count and what is learned there."""

    def loss(inputs: Tensor, teacher_logits: Tensor, weights: Tensor | None) -> Tensor:
        with mixed_precision(device):
            return divergence(student(inputs), teacher_logits, weights)

    def judge(inputs: Tensor) -> Tensor:
        with mixed_precision(device):
            return teacher(inputs)

    compiled_loss, compiled_judge = compiled_on(loss, device), compiled_on(judge, device)

    def objective(_: int) -> Tensor:
        total = torch.zeros((), device=device)
        for inputs in (next(batches)[0], next(continued)):
            weights = None
            with torch.no_grad():
                teacher_logits = compiled_judge(inputs)
                if emphasis is not None:
                    teacher_logits, weights = emphasis(inputs, teacher_logits)
            total = total + compiled_loss(inputs, teacher_logits, weights) / 2
        return total

    return objective


def continue_corpus(target: Llama, packed: Packed, budget_s: float, rows: int, seed: int = 1) -> Tensor:
    """Corpus openings of several lengths, each continued by the target: int16[many, CONTINUED_ROW_TOKENS].

    A quarter of the rows is greedy; the others draw temperatures evenly between 0.3 and 1.0, or 1.0 exactly.
    """
    device = packed.device
    draw = torch.Generator(device=device).manual_seed(seed)
    made: list[Tensor] = []
    start = time.perf_counter()
    while not made or time.perf_counter() - start < budget_s:
        known = PREFIX_TOKENS[len(made) % len(PREFIX_TOKENS)]
        temperature = 0.3 + 0.7 * torch.rand(rows, generator=draw, device=device)
        temperature[::4] = 0.0
        temperature[1::4] = 1.0
        with mixed_precision(device):
            ids = continuations(
                target, packed.prefixes(rows, known, draw), CONTINUED_ROW_TOKENS - known, temperature, draw
            )
        made.append(ids.to(torch.int16))
    return torch.cat(made)


def endless_rows(rows: Tensor, count: int, seed: int = 2) -> Iterator[Tensor]:
    """Endless batches int64[count, tokens] of `rows`, shuffled anew each time round."""
    draw = torch.Generator(device=rows.device).manual_seed(seed)
    while True:
        order = torch.randperm(len(rows), generator=draw, device=rows.device)
        for first in range(0, max(1, len(rows) - count + 1), count):
            yield rows[order[first : first + count]].long()
