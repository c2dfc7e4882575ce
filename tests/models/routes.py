"""Which experts a mixture chose: read off the engine and off Transformers, and imposed on Transformers.

A rounded model may send a token to another expert where two are nearly even, and all that follows jumps.
With one route on both sides the rounded and the exact model can be compared like dense ones, every position.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

Route = list[torch.Tensor]
"""Of one sequence: the experts of every token, [tokens, k], for each layer that has experts."""


@dataclass
class Routed:
    """What the routers of one pass of a Transformers model said, by layer."""

    experts: Route = field(default_factory=list)
    probabilities: list[torch.Tensor] = field(default_factory=list)
    """[tokens, experts], fp32."""


@contextmanager
def watched(model: Any, imposed: Route | None = None) -> Iterator[Routed]:
    """Keep what the routers of a Transformers model say; with `imposed`, their tokens go where it says."""
    routed = Routed()

    def after(router: Any, inputs: Any, output: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        logits, scores, experts = output
        probabilities = logits.float().softmax(-1)
        if imposed is not None:
            experts = imposed[len(routed.experts)]
            chosen = probabilities.gather(-1, experts)
            if getattr(router, "norm_topk_prob", True):
                chosen = chosen / chosen.sum(-1, keepdim=True)
            scores = chosen.to(scores.dtype)
        routed.experts.append(experts)
        routed.probabilities.append(probabilities)
        return logits, scores, experts

    routers = [one for one in model.modules() if type(one).__name__.endswith("TopKRouter")]
    hooks = [router.register_forward_hook(after) for router in routers]
    try:
        yield routed
    finally:
        for hook in hooks:
            hook.remove()
    assert len(routed.experts) == len(routers), "one pass at a time"


@contextmanager
def heard(kernels: Any) -> Iterator[list[torch.Tensor]]:
    """The experts [rows, k] of every call of `route` in a module of kernels, in order."""
    calls: list[torch.Tensor] = []
    original: Callable[..., tuple[torch.Tensor, torch.Tensor]] = kernels.route

    def route(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        weights, experts = original(*args, **kwargs)
        calls.append(experts)
        return weights, experts

    kernels.route = route
    try:
        yield calls
    finally:
        kernels.route = original


def by_sequence(calls: Sequence[torch.Tensor], steps: Iterable[Sequence[tuple[int, int]]], count: int) -> list[Route]:
    """Calls of `heard` put in order: steps are what each step ran, as (sequence, new tokens) in the rows' order."""
    steps = list(steps)
    layers = len(calls) // len(steps)
    assert layers * len(steps) == len(calls)
    parts: list[list[list[torch.Tensor]]] = [[[] for _ in range(layers)] for _ in range(count)]
    for number, step in enumerate(steps):
        for layer in range(layers):
            rows = calls[number * layers + layer].split([tokens for _, tokens in step])
            for (sequence, _), mine in zip(step, rows):
                parts[sequence][layer].append(mine)
    return [[torch.cat(layer) for layer in one] for one in parts]


def shortfall(routed: Routed) -> float:
    """How far the least chosen expert's probability lies below the best that was passed over; 0 if never."""
    worst = 0.0
    for experts, probabilities in zip(routed.experts, routed.probabilities):
        chosen = probabilities.gather(-1, experts).amin(-1)
        passed = probabilities.scatter(-1, experts, -1.0).amax(-1)
        worst = max(worst, float((passed - chosen).max()))
    return worst
