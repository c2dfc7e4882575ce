"""What an operation costs: floating-point operations, bytes over each border, launches.

Knows only numbers. It must not know any op, device or time: dividing by a machine's rates is the
performance model's work.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Cost:
    """The least that an operation must do, whatever the kernel.

    flops: floating-point operations (a multiply-add is two).
    read_bytes, write_bytes: device-memory traffic, each input read once, each output written once.
    link_bytes: bytes that leave this device over a link to another.
    launches: kernels started (one for an op that a single kernel can serve).
    """

    flops: float = 0.0
    read_bytes: float = 0.0
    write_bytes: float = 0.0
    link_bytes: float = 0.0
    launches: int = 1

    @property
    def bytes(self) -> float:
        return self.read_bytes + self.write_bytes

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.flops + other.flops,
            self.read_bytes + other.read_bytes,
            self.write_bytes + other.write_bytes,
            self.link_bytes + other.link_bytes,
            self.launches + other.launches,
        )

    def __mul__(self, times: int) -> Cost:
        return Cost(
            self.flops * times,
            self.read_bytes * times,
            self.write_bytes * times,
            self.link_bytes * times,
            self.launches * times,
        )


ZERO = Cost(launches=0)
