"""What a user asks of speculation, checked before anything is built.

Knows names and limits (vLLM's names where it has them). It must not know models or devices.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from ridgeline.core.errors import InvalidArgument
from ridgeline.core.tree import MOST_NODES

METHODS = ("tree", "draft_model", "ngram")
NAMES = ("method", "model", "num_speculative_tokens", "tree", "verification")
LOOK_UP = "ngram"
"""Among the models of a tree: what followed the last tokens before, merged with what they draft."""
VERIFICATIONS = ("coupled", "multi_step", "target_only")


@dataclass(frozen=True)
class Speculation:
    """A `speculative_config`.

    method: "tree" (token trees from draft models), "draft_model" (chains from one), "ngram" (what followed the
        last tokens before, in the prompt or the output).
    models: checkpoints of the draft models; none means the embedded target's own. LOOK_UP among them: n-grams too.
    nodes: most drafted tokens of a request in a step; None ("auto"): the sizer decides, step by step.
    widths: children of each node by depth, <k1, ..., km>; empty: none is prescribed.
    verification: of requests without a seed, at temperatures above 0 (all others are coupled): "coupled" (the noise
        that chooses drafts too), "multi_step" (SpecInfer's sampling, on the host) or "target_only" (the drafter's
        likeliest tokens). The law of the output is the same with each (docs/trees.md).
    """

    method: str
    models: tuple[str, ...] = ()
    nodes: int | None = None
    widths: tuple[int, ...] = ()
    verification: str = "coupled"

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Speculation:
        """From a mapping. Raises InvalidArgument naming the entry and its limits."""
        if not isinstance(values, Mapping):
            raise _wrong(f"must be a mapping with {', '.join(NAMES)}, not {values!r}")
        for name in values:
            if name not in NAMES:
                raise _wrong(f"has no entry {name!r}; entries are {', '.join(NAMES)}")
        tree = values.get("tree")
        method = values.get("method", "tree" if tree is not None else "draft_model")
        if method not in METHODS:
            raise _wrong(f"method must be one of {', '.join(METHODS)}, not {method!r}")
        models = _models(values.get("model"))
        if method == "ngram" and models:
            raise _wrong("model: ngram drafts without one; leave it out")
        if method == "draft_model" and (len(models) > 1 or LOOK_UP in models):
            raise _wrong(f"model: draft_model takes one checkpoint, not {', '.join(models)}; tree merges several")
        nodes = values.get("num_speculative_tokens", "auto")
        if nodes == "auto":
            nodes = None
        elif isinstance(nodes, bool) or not isinstance(nodes, int) or not 1 <= nodes <= MOST_NODES:
            raise _wrong(
                f"num_speculative_tokens must be 'auto' or an integer in [1, {MOST_NODES}], as many as the mask of a "
                f"tree has bits, not {nodes!r}"
            )
        widths = _widths(tree)
        if widths and method != "tree":
            raise _wrong(f"tree: goes with method 'tree', not {method!r}")
        if widths and nodes is not None and _count(widths) > nodes:
            raise _wrong(f"tree: {list(widths)} has {_count(widths)} nodes, num_speculative_tokens allows {nodes}")
        verification = values.get("verification", "coupled")
        if verification not in VERIFICATIONS:
            raise _wrong(f"verification must be one of {', '.join(VERIFICATIONS)}, not {verification!r}")
        if verification == "multi_step" and (method == "ngram" or len(models) > 1 or LOOK_UP in models):
            raise _wrong(
                "verification: multi_step needs children drawn from one draft model's law; leave it out (coupled "
                "verifies drafts of every kind, and merges several models)"
            )
        return cls(method, models, nodes, widths, verification)

    @property
    def looks_up(self) -> bool:
        """Whether n-grams draft, alone or beside models."""
        return self.method == "ngram" or LOOK_UP in self.models

    @property
    def checkpoints(self) -> tuple[str, ...]:
        """Draft models that are checkpoints."""
        return tuple(one for one in self.models if one != LOOK_UP)

    @property
    def most_nodes(self) -> int:
        """Nodes that a tree may have under this configuration."""
        if self.widths:
            return min(MOST_NODES, max(1, len(self.models)) * _count(self.widths))
        return MOST_NODES if self.nodes is None else self.nodes


def _wrong(message: str) -> InvalidArgument:
    return InvalidArgument("speculative_config", message)


def _count(widths: tuple[int, ...]) -> int:
    return sum(prod(widths[: depth + 1]) for depth in range(len(widths)))


def _models(value: Any) -> tuple[str, ...]:
    several = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(several, (list, tuple)) or not all(isinstance(one, str) and one for one in several):
        raise _wrong(f"model must be a checkpoint or a list of them, not {value!r}")
    return tuple(several)


def _widths(value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    if not isinstance(value, (list, tuple)) or not value:
        raise _wrong(f"tree must be a list of widths [k1, ..., km], not {value!r}")
    for width in value:
        if isinstance(width, bool) or not isinstance(width, int) or width < 1:
            raise _wrong(f"tree: a width must be an integer from 1, not {width!r}")
    widths = tuple(value)
    if len(widths) > MOST_NODES or _count(widths) > MOST_NODES:
        raise _wrong(f"tree: {list(widths)} has {_count(widths)} nodes, the mask of a tree has {MOST_NODES} bits")
    return widths
