"""Every feature of `attention` beside every other: a small list of calls in which each pair of choices appears.

Knows the op's arguments. It must not know kernels: their tests take the calls that a kernel accepts.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ridgeline.ops.attention import attention_inputs

AXES: Mapping[str, Sequence[Any]] = {
    "dtype": (torch.float32, torch.bfloat16, torch.float16),
    "heads": ((1, 1), (4, 4), (8, 2), (6, 2), (8, 1)),
    "head_dim": (64, 96, 128, 192, 256),
    "block": (None, 16, 64, 256),
    "mask": ("causal", "full", "window 1", "window 40", "tree", "tree, window 64"),
    "softcap": (None, 5.0),
    "sinks": (False, True),
    "return_lse": (False, True),
    "batch": ("decode", "chunk", "ragged"),
}
BATCHES: Mapping[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]] = {
    "decode": ((1, 1, 1), (1, 40, 100), (1, 0, 1)),
    "chunk": ((47,), (113,), (40,)),
    "ragged": ((13, 0, 33, 1, 5, 4, 1), (47, 7, 33, 90, 3, 70, 0), (0, 0, 33, 1, 2, 3, 0)),
}
"""New rows, keys, and nodes of a tree if there is one: rows without keys, requests without rows."""


def cover(axes: Mapping[str, Sequence[Any]] = AXES) -> list[dict[str, Any]]:
    """Choices of every axis, so few as a greedy search finds, in which every pair of values appears."""
    draw = random.Random(0)

    def pairs(choice: Mapping[str, Any]) -> set[Any]:
        return set(itertools.combinations(((name, str(value)) for name, value in choice.items()), 2))

    missing = {
        ((one, str(a)), (other, str(b)))
        for one, other in itertools.combinations(axes, 2)
        for a in axes[one]
        for b in axes[other]
    }
    chosen = []
    while missing:
        drawn = [{name: draw.choice(values) for name, values in axes.items()} for _ in range(60)]
        (one, a), (other, b) = next(iter(sorted(missing)))
        for choice in drawn:  # each helps, if only with the first pair that is missing
            choice[one] = next(value for value in axes[one] if str(value) == a)
            choice[other] = next(value for value in axes[other] if str(value) == b)
        best = max(drawn, key=lambda choice: len(pairs(choice) & missing))
        chosen.append(best)
        missing -= pairs(best)
    return chosen


def inputs_of(choice: Mapping[str, Any], device: str) -> dict[str, Any]:
    """Random arguments for one choice."""
    new, visible, nodes = BATCHES[choice["batch"]]
    mask = choice["mask"]
    window = int(mask.rpartition(" ")[2]) if "window" in mask else None
    return dict(
        attention_inputs(
            device,
            choice["dtype"],
            *choice["heads"],
            choice["head_dim"],
            choice["block"],
            window,
            new,
            visible,
            causal=mask != "full",
            softcap=choice["softcap"],
            sinks=choice["sinks"],
            tails=nodes if mask.startswith("tree") else None,
            return_lse=choice["return_lse"],
        )
    )


def name_of(choice: Mapping[str, Any]) -> str:
    return "-".join(str(value).removeprefix("torch.").replace(" ", "") for value in choice.values())


COVER = cover()
