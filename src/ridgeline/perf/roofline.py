"""Cost over a machine's rates: the time that nothing can beat, and which roof it hits.

Williams et al., "Roofline" (CACM 2009), with two compute roofs: matrix units for contractions, the other fp32
units for everything else (FlashAttention-2, 2307.08691, counts a factor of 16 between them on an A100). Knows
costs and Hardware. It must not know models, nor how fast real kernels are.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ridgeline.core.cost import Cost
from ridgeline.perf.hardware import Hardware

COMPUTE, MEMORY = "compute", "memory"


@dataclass(frozen=True, slots=True)
class Roofline:
    """The roofs of one machine for one dtype: FLOP/s of contractions and of the rest, bytes/s of memory."""

    matrix_flops: float
    vector_flops: float
    bytes_per_s: float

    @classmethod
    def of(cls, hardware: Hardware, dtype: str) -> Roofline:
        """InvalidArgument if the machine's matrix units do not compute in `dtype`."""
        return cls(hardware.flops(dtype), hardware.vector_flops, hardware.memory_bytes_per_s)

    @property
    def ridge(self) -> float:
        """FLOP per byte where a contraction's two roofs meet."""
        return self.matrix_flops / self.bytes_per_s

    def compute_s(self, cost: Cost, kind: str = "contraction") -> float:
        return cost.flops / (self.matrix_flops if kind == "contraction" else self.vector_flops)

    def memory_s(self, cost: Cost) -> float:
        return cost.bytes / self.bytes_per_s

    def seconds(self, cost: Cost, kind: str = "contraction") -> float:
        """No kernel of this kind can do `cost` in less."""
        return max(self.compute_s(cost, kind), self.memory_s(cost))

    def bound(self, parts: Iterable[tuple[Cost, str]]) -> str:
        """What a sequence of (cost, kind) spends more of its time waiting for: "compute" or "memory"."""
        compute = memory = 0.0
        for cost, kind in parts:
            compute += self.compute_s(cost, kind)
            memory += self.memory_s(cost)
        return COMPUTE if compute > memory else MEMORY
