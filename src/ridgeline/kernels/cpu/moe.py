"""`moe` on the CPU: route, sort rows by expert, then each expert's weights stream once past its rows.

Knows experts as plain row-major matrices. Inner products are those of code/grid.py and a token adds its experts
in the order of their rank, so a token's result is the same alone and in any batch. Five passes: route,
group, gate and up, down, add; units are tokens, or 64 output features of one expert.
"""

from __future__ import annotations

import torch

from ridgeline.kernels.cpu.activation import CODES
from ridgeline.kernels.cpu.blocks import EXPERT_FEATURES, SCRATCH_BYTES
from ridgeline.kernels.cpu.dtypes import HALF, other_dtype
from ridgeline.kernels.cpu.native import Kernel
from ridgeline.kernels.cpu.pool import POOL
from ridgeline.ops.moe import moe
from ridgeline.ops.op import cpu

route_tokens = Kernel("moe", "route_tokens")
group_entries = Kernel("moe", "group_entries")
gate_up_features = Kernel("moe", "gate_up_features")
down_features = Kernel("moe", "down_features")
add_experts = Kernel("moe", "add_experts")


def accepts(
    x: torch.Tensor,
    router: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    top_k: int,
    renormalize: bool,
    activation: str = "silu",
) -> str | None:
    if activation not in CODES:
        return f"knows no activation {activation!r}"
    if 4 * router.shape[0] > SCRATCH_BYTES:
        return f"takes at most {SCRATCH_BYTES // 4} experts"
    if not (router.is_contiguous() and gate_up.is_contiguous() and down.is_contiguous()):
        return "takes contiguous weights"
    return other_dtype(x, router, gate_up, down)


@moe.kernel("cpu", needs=cpu(), accepts=accepts, invariant=True)
def moe_cpu(
    x: torch.Tensor,
    router: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    top_k: int,
    renormalize: bool,
    activation: str = "silu",
) -> torch.Tensor:
    if not x.is_contiguous():
        x = x.contiguous()
    tokens, hidden = x.shape
    count, inner = gate_up.shape[0], gate_up.shape[1] // 2
    half, entries = HALF[x.dtype], tokens * top_k
    out = torch.empty_like(x)
    weights, experts = torch.empty(entries), torch.empty(entries, dtype=torch.int64)
    offsets, order = torch.empty(count + 1, dtype=torch.int64), torch.empty(entries, dtype=torch.int64)
    between, partial = x.new_empty((entries, inner)), torch.empty(entries, hidden)
    sorted_by = offsets.data_ptr(), order.data_ptr()
    small, share = POOL.small, POOL.share
    (small if tokens == 1 else share)(
        route_tokens, tokens, x.data_ptr(), router.data_ptr(), weights.data_ptr(), experts.data_ptr(), hidden, count,
        top_k, int(renormalize), half,
    )  # fmt: skip
    small(group_entries, 1, experts.data_ptr(), *sorted_by, entries, count)
    share(
        gate_up_features, count * -(-inner // EXPERT_FEATURES), x.data_ptr(), gate_up.data_ptr(), between.data_ptr(),
        *sorted_by, hidden, inner, top_k, half, CODES[activation],
    )  # fmt: skip
    share(
        down_features, count * -(-hidden // EXPERT_FEATURES), between.data_ptr(), down.data_ptr(), partial.data_ptr(),
        *sorted_by, inner, hidden, half,
    )  # fmt: skip
    (small if tokens == 1 else share)(
        add_experts, tokens, partial.data_ptr(), weights.data_ptr(), out.data_ptr(), hidden, top_k, half
    )
    return out
