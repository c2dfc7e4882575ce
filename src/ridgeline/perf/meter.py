"""The Meter: watches the ops of a forward pass and adds up their cost.

On meta tensors this is the performance model; on a real device the same Meter counts the same. Knows
costs by op. It must not know models or machines.
"""

from __future__ import annotations

from typing import Any

from ridgeline.core.cost import ZERO, Cost
from ridgeline.ops.op import Op


class Meter:
    """An observer that sums floors by op, in order of first appearance."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Cost]] = []
        self.kinds: dict[str, str] = {}

    def before(self, op: Op, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.calls.append((op.name, op.floor(*args, **kwargs)))
        self.kinds[op.name] = op.kind

    def after(self, op: Op, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None: ...

    @property
    def total(self) -> Cost:
        total = ZERO
        for _, cost in self.calls:
            total += cost
        return total

    def by_op(self) -> dict[str, Cost]:
        """Cost of all calls of each op."""
        sums: dict[str, Cost] = {}
        for name, cost in self.calls:
            sums[name] = sums.get(name, ZERO) + cost
        return sums

    def by_kind(self) -> dict[str, Cost]:
        """Cost by operator class (contraction, normalization, elementwise, movement)."""
        sums: dict[str, Cost] = {}
        for name, cost in self.calls:
            kind = self.kinds[name]
            sums[kind] = sums.get(kind, ZERO) + cost
        return sums
