"""`gated_linear` on the CPU: gate and up panels side by side, nothing in between leaves the cache; and `gate`.

Knows panels. A unit of work is 64 features of the result times at most 96 rows: one panel of gates and the
panel of ups beside it, or the two that hold them where the ups do not begin at a panel's border.
"""

from __future__ import annotations

import torch

from ridgeline.kernels.cpu.activation import CODES
from ridgeline.kernels.cpu.blocks import PASS_ROWS
from ridgeline.kernels.cpu.dtypes import HALF, other_dtype
from ridgeline.kernels.cpu.native import Kernel
from ridgeline.kernels.cpu.pool import POOL
from ridgeline.ops.mlp import gate, gated_linear
from ridgeline.ops.op import cpu
from ridgeline.ops.weight import PANEL, Weight

ALONE_ELEMENTS = 1 << 14
"""Elements below which calling a helper for `gate` takes longer than doing it all."""

gated_panels = Kernel("mlp", "gated_panels")
gate_rows = Kernel("mlp", "gate_rows")


def accepts(x: torch.Tensor, weight: Weight, activation: str = "silu") -> str | None:
    if weight.format != "panels":
        return f"takes weights in panels, not {weight.format} (kernels/cpu/pack.py makes them)"
    if activation not in CODES:
        return f"knows no activation {activation!r}"
    return other_dtype(x, weight.data)


@gated_linear.kernel("cpu", needs=cpu(), accepts=accepts, invariant=True)
def gated_linear_cpu(x: torch.Tensor, weight: Weight, activation: str = "silu") -> torch.Tensor:
    if not x.is_contiguous():
        x = x.contiguous()
    tokens, depth = x.shape
    inner = weight.out_features // 2
    out = x.new_empty((tokens, inner))
    panels = -(-inner // PANEL)
    address = weight.data.data_ptr()
    arguments = x.data_ptr(), address, out.data_ptr(), tokens, depth, inner, HALF[x.dtype], CODES[activation]
    unit_bytes = depth * PANEL * x.element_size()
    if tokens <= PASS_ROWS:
        POOL.stream(gated_panels, panels, address, unit_bytes, inner // PANEL * unit_bytes, *arguments)
    else:
        POOL.share(gated_panels, panels * -(-tokens // PASS_ROWS), *arguments)
    return out


def gate_accepts(gate_up: torch.Tensor, activation: str) -> str | None:
    if activation not in CODES:
        return f"knows no activation {activation!r}"
    return other_dtype(gate_up)


@gate.kernel("cpu", needs=cpu(), accepts=gate_accepts, invariant=True)
def gate_cpu(gate_up: torch.Tensor, activation: str) -> torch.Tensor:
    if not gate_up.is_contiguous():
        gate_up = gate_up.contiguous()
    rows, inner = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty((rows, inner))
    run = POOL.small if rows * inner <= ALONE_ELEMENTS else POOL.share
    run(gate_rows, rows, gate_up.data_ptr(), out.data_ptr(), inner, HALF[gate_up.dtype], CODES[activation])
    return out
