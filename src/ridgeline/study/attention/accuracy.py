"""How far rungs and peers are from fp64 on numbers with outliers: the 16-bit rows of FlashAttention-3's table.

Knows the numbers and the errors. It must not know any kernel. The table (Shah et al., 2407.08608, section 4.3) draws
q, k and v from N(0, 1) + N(0, 100) * Bernoulli(0.001) and gives root mean square errors against fp64. It seems to count
the rounding of the inputs too: against fp64 on the numbers as drawn, errors in fp16 are near its figures
(docs/log.md); what kernels add themselves shows against the rounded numbers, and there FlashAttention gains more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch

from ridgeline.core.errors import RidgelineError
from ridgeline.ops.attention_call import Call
from ridgeline.ops.op import Kernel
from ridgeline.study.attention import rungs
from ridgeline.study.attention.cases import Case
from ridgeline.study.attention.peers import Peer
from ridgeline.study.attention.tensors import make
from ridgeline.study.timing import Works

RARE, SPREAD = 0.001, 10.0
"""How often a number is an outlier, and the deviation of what is added to it (100 is its square)."""
PUBLISHED = {"standard": 3.2e-4, "FlashAttention-2": 1.9e-4, "FlashAttention-3": 1.9e-4}
"""The table's fp16 rows."""
PAGE = 64


class Errors(NamedTuple):
    """drawn: root mean square against fp64 on the numbers as drawn; rounded: on the numbers that the kernel was given;
    worst: the largest difference to the latter."""

    drawn: float
    rounded: float
    worst: float


class Sums(NamedTuple):
    """Squares added up over draws."""

    drawn: float = 0.0
    rounded: float = 0.0
    worst: float = 0.0
    numbers: int = 0

    def errors(self) -> Errors:
        return Errors((self.drawn / self.numbers) ** 0.5, (self.rounded / self.numbers) ** 0.5, self.worst)


def outliers(shape: Sequence[int], generator: torch.Generator) -> torch.Tensor:
    """N(0, 1) + N(0, 100) * Bernoulli(0.001), fp64, on the generator's device."""

    def normal() -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, device=generator.device, generator=generator)

    rare = torch.rand(*shape, device=generator.device, generator=generator) < RARE
    return normal() + SPREAD * normal() * rare


def exact(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, case: Case) -> torch.Tensor:
    """Attention of [B, H, n, D] and [B, Hk, m, D] in fp64, a head at a time; [B, H, n, D]."""
    group = case.heads // case.kv_heads
    out = torch.empty(*q.shape, dtype=torch.float64, device=q.device)
    for request in range(case.batch):
        for head in range(case.heads):
            keys, values = (side[request, head // group].double() for side in (k, v))
            scores = case.head_dim**-0.5 * (q[request, head].double() @ keys.T)
            if case.causal:
                row = torch.arange(case.visible - case.new, case.visible, device=q.device)[:, None]
                scores.masked_fill_(torch.arange(case.visible, device=q.device)[None, :] > row, float("-inf"))
            out[request, head] = scores.softmax(-1) @ values
    return out


def measure(
    case: Case,
    device: torch.device,
    kernels: Mapping[str, Kernel],
    others: Mapping[str, Peer],
    draws: int = 1,
    seed: int = 0,
) -> tuple[dict[str, Errors], dict[str, str]]:
    """Errors of rungs and peers on a case (contiguous keys) over so many draws, and who refused, with the reason.

    Each draws the same numbers. A rung that takes pages alone gets the same keys in pages. An error that is no number
    is NaN.
    """
    sums: dict[str, Sums] = {}
    refused: dict[str, str] = {}
    for number in range(draws):
        generator = torch.Generator(device).manual_seed(seed + number)
        shapes = [(case.batch, heads, rows, case.head_dim) for heads, rows in _sides(case)]
        drawn = [outliers(shape, generator) for shape in shapes]
        rounded = [side.to(getattr(torch, case.dtype)) for side in drawn]
        wanted, own = (exact(q, k, v, case) for q, k, v in (drawn, rounded))
        for name, run in _contestants(case, rounded, device, kernels, others, refused):
            out = run()
            if out.dim() == 3:
                out = out.view(case.batch, case.new, case.heads, case.head_dim).transpose(1, 2)
            far, off = (out.double() - wanted).square().sum().item(), out.double() - own
            before = sums.get(name, Sums())
            sums[name] = Sums(
                before.drawn + far,
                before.rounded + off.square().sum().item(),
                max(before.worst, off.abs().max().item()),
                before.numbers + out.numel(),
            )
    return {name: one.errors() for name, one in sums.items()}, refused


def _sides(case: Case) -> tuple[tuple[int, int], ...]:
    """Heads and rows of q, k, v."""
    return (case.heads, case.new), (case.kv_heads, case.visible), (case.kv_heads, case.visible)


def _contestants(
    case: Case,
    sides: Sequence[torch.Tensor],
    device: torch.device,
    kernels: Mapping[str, Kernel],
    others: Mapping[str, Peer],
    refused: dict[str, str],
) -> Iterator[tuple[str, Callable[[], torch.Tensor]]]:
    """Whoever takes the case, ready to run once."""
    rows = _in_rows(case, sides, device)
    for name, kernel in kernels.items():
        reason = rungs.refusal(kernel, case)
        if reason is None:
            yield name, partial(kernel.call, **rows._asdict())
            continue
        paged = replace(case, page=PAGE)
        if case.visible % PAGE == 0 and rungs.refusal(kernel, paged) is None:
            yield name, partial(kernel.call, **_in_pages(paged, rows)._asdict())
        else:
            refused[name] = reason
    for name, peer in others.items():
        try:
            works = peer.prepare(case, [rows])
        except RidgelineError as refusal:
            refused[name] = str(refusal)
            continue

        def run(works: Works = works) -> torch.Tensor:
            with works.context():
                out: torch.Tensor = works.calls[0]()
            return out

        yield name, run


def _in_rows(case: Case, sides: Sequence[torch.Tensor], device: torch.device) -> Call:
    q, k, v = (side.transpose(1, 2).flatten(0, 1).contiguous() for side in sides)
    return make(case, device)._replace(q=q, k=k, v=v)


def _in_pages(case: Case, rows: Call) -> Call:
    """The same keys in pages that lie in random order."""
    call = make(case, rows.q.device)
    assert case.page is not None
    assert call.block_tables is not None
    places = call.block_tables.long().flatten()
    for pages, side in ((call.k, rows.k), (call.v, rows.v)):
        pages[places] = side.view(-1, case.page, case.kv_heads, case.head_dim).transpose(1, 2)
    return call._replace(q=rows.q)
