"""Rungs and peers under one face: a name, and a way to be made ready for a case.

Knows that both are prepared on Calls and then called again and again. It must not know clocks or tables.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from ridgeline.core.errors import KernelRefused
from ridgeline.ops.attention_call import Call
from ridgeline.ops.op import Kernel
from ridgeline.study.attention import peers as peers_
from ridgeline.study.attention import rungs as rungs_
from ridgeline.study.attention.cases import Case
from ridgeline.study.attention.peers import Peer
from ridgeline.study.timing import Works


@dataclass(frozen=True, slots=True)
class Contestant:
    """A rung (kernel is set) or a peer (peer is set)."""

    name: str
    kernel: Kernel | None = None
    peer: Peer | None = None

    @property
    def kind(self) -> str:
        return "rung" if self.kernel is not None else "peer"

    def prepare(self, case: Case, calls: Sequence[Call]) -> Works:
        """The work on each of the calls. Raises KernelRefused if the case is not for this one."""
        if self.kernel is None:
            assert self.peer is not None
            return self.peer.prepare(case, calls)
        reason = rungs_.refusal(self.kernel, case)
        if reason is not None:
            raise KernelRefused(reason)
        return Works([rungs_.bound(self.kernel, case, call) for call in calls])

    def answers(self, case: Case) -> bool:
        """Whether its output is the answer to the call's own question, and not to one over permuted keys."""
        return self.kernel is not None or case.page is None or (self.peer is not None and self.peer.same_keys)

    def rows(self, case: Case, out: torch.Tensor) -> torch.Tensor:
        """Its output as [T, H, D]."""
        return out.transpose(1, 2).reshape(-1, case.heads, case.head_dim) if out.dim() == 4 else out


@dataclass(frozen=True)
class Field:
    """Who takes part: contestants in the order of the tables, and who was left out for want of what."""

    contestants: tuple[Contestant, ...]
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        return [one.name for one in self.contestants]


def assemble(device: torch.device, rungs: list[str], peers: list[str]) -> Field:
    """The named rungs and peers, all that can run if none is named. Raises what rungs.chosen and peers.chosen raise."""
    kernels = rungs_.chosen(rungs, device)
    running, left_out = peers_.chosen(peers, device)
    return Field(
        tuple(Contestant(name, kernel=one) for name, one in kernels.items())
        + tuple(Contestant(name, peer=one) for name, one in running.items()),
        left_out,
    )


def by_name(name: str, device: torch.device) -> Contestant:
    """One rung or peer."""
    if name in peers_.peers(device):
        running, _ = peers_.chosen([name], device)
        return Contestant(name, peer=running[name])
    return Contestant(name, kernel=rungs_.chosen([name], device)[name])
