"""The training loop, the same for the target, the plain small model and the distilled one.

Knows how to spend a budget of seconds or steps on a model, given an objective: a function of the step's number that
returns a loss. Knows no corpus and no teacher; those live in the objective.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from training.optimizer import Optimizer

Objective = Callable[[int], Tensor]


@dataclass(frozen=True)
class Recipe:
    """What a run may spend and how fast it learns. The rates are full rates; `schedule` scales them."""

    matrix_lr: float
    other_lr: float
    weight_decay: float = 0.1
    warmup: float = 0.01  # share of the steps
    hold: float = 0.25  # share of the steps after which the rate falls, linearly, to zero
    budget_s: float | None = None
    most_steps: int | None = None  # that a budget in seconds may turn into
    steps: int | None = None


@dataclass
class Run:
    """What a run did: its steps, its seconds and the losses along the way (nats per token)."""

    steps: int
    seconds: float
    losses: list[tuple[int, float]] = field(default_factory=list)


def schedule(step: int, steps: int, warmup: float, hold: float) -> float:
    """Factor (0..1) of the learning rate at `step` of `steps`: a ramp up, a plateau, a straight line to zero."""
    done = (step + 1) / steps
    if done <= hold:
        return min(1.0, done / max(warmup, 1e-9))
    return max(0.0, (1.0 - step / steps) / (1.0 - hold))


def cross_entropy(logits: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean loss in nats of logits [rows, tokens, vocabulary] at targets [rows, tokens].

    `weights` [rows, tokens] says how much each position counts; without it all count alike.
    """
    losses = functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")
    return weighted_mean(losses.view_as(targets), weights)


def divergence(logits: Tensor, teacher_logits: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean Kullback-Leibler divergence in nats from the teacher's distribution to the student's (Hinton et al.,
    2015), both [rows, tokens, vocabulary]; `weights` as for `cross_entropy`."""
    log_p = functional.log_softmax(teacher_logits.float(), -1)
    log_q = functional.log_softmax(logits.float(), -1)
    return weighted_mean((log_p.exp() * (log_p - log_q)).sum(-1), weights)


def weighted_mean(losses: Tensor, weights: Tensor | None) -> Tensor:
    """Mean of losses [rows, tokens], each counted by its weight if weights are given."""
    if weights is None:
        return losses.mean()
    return (losses * weights).sum() / weights.sum().clamp_min(1e-9)


def train(
    model: nn.Module,
    objective: Objective,
    recipe: Recipe,
    report: Callable[[str], None] = print,
    checkpoint: Callable[[int], None] | None = None,
    checkpoint_every: int = 1000,
) -> Run:
    """Trains `model` on `objective` until the recipe's steps, or as many as its seconds allow, are done.

    A budget in seconds is turned into steps after a few untimed and a few timed ones, so that the schedule is a
    function of the step alone. `checkpoint` is called every `checkpoint_every` steps with the steps done.
    """
    optimizer = Optimizer(model.named_parameters(), recipe.matrix_lr, recipe.other_lr, recipe.weight_decay)
    synchronize = torch.cuda.synchronize if next(model.parameters()).is_cuda else (lambda: None)
    steps = recipe.steps
    start = time.perf_counter()
    if steps is None:
        if recipe.budget_s is None:
            raise ValueError("a recipe needs steps or seconds")
        steps = max(1, round(recipe.budget_s / _seconds_per_step(objective, optimizer, synchronize)))
        steps = min(steps, recipe.most_steps or steps)
        optimizer = Optimizer(model.named_parameters(), recipe.matrix_lr, recipe.other_lr, recipe.weight_decay)
        start = time.perf_counter()
    report(f"{steps} steps")
    losses: list[tuple[int, float]] = []
    every = max(1, steps // 60)
    for step in range(steps):
        loss = objective(step)
        loss.backward()
        optimizer.step(schedule(step, steps, recipe.warmup, recipe.hold))
        if step % every == 0 or step == steps - 1:
            losses.append((step, round(loss.item(), 4)))
            report(f"step {step} of {steps}: loss {loss.item():.4f}, {time.perf_counter() - start:.0f} s")
        if checkpoint is not None and (step + 1) % checkpoint_every == 0:
            checkpoint(step + 1)
    synchronize()
    return Run(steps, time.perf_counter() - start, losses)


def _seconds_per_step(objective: Objective, optimizer: Optimizer, synchronize: Callable[[], None]) -> float:
    """Seconds of one step once everything is compiled; the steps run at rate zero and leave the model as it was."""
    for step in range(5):
        objective(step).backward()
        optimizer.step(0.0)
    synchronize()
    start = time.perf_counter()
    for step in range(15):
        objective(step).backward()
        optimizer.step(0.0)
    synchronize()
    return (time.perf_counter() - start) / 15
