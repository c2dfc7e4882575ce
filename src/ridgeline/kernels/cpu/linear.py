"""`linear` on the CPU: panels of weights stream through once, bias and activation on the way out.

Knows panels and blocks of rows. A unit of work is one panel times at most 96 rows.
"""

from __future__ import annotations

import torch

from ridgeline.kernels.cpu.activation import CODES
from ridgeline.kernels.cpu.blocks import PASS_ROWS
from ridgeline.kernels.cpu.dtypes import HALF, other_dtype
from ridgeline.kernels.cpu.native import Kernel
from ridgeline.kernels.cpu.pool import POOL
from ridgeline.ops.linear import linear
from ridgeline.ops.op import cpu
from ridgeline.ops.weight import PANEL, Weight

linear_panels = Kernel("linear", "linear_panels")


def accepts(
    x: torch.Tensor, weight: Weight, bias: torch.Tensor | None = None, activation: str | None = None
) -> str | None:
    if weight.format != "panels":
        return f"takes weights in panels, not {weight.format} (kernels/cpu/pack.py makes them)"
    if activation not in CODES:
        return f"knows no activation {activation!r}"
    return other_dtype(x, weight.data, bias)


@linear.kernel("cpu", needs=cpu(), accepts=accepts, invariant=True)
def linear_cpu(
    x: torch.Tensor, weight: Weight, bias: torch.Tensor | None = None, activation: str | None = None
) -> torch.Tensor:
    if not x.is_contiguous():
        x = x.contiguous()
    tokens, depth = x.shape
    data, outputs = weight.data, weight.out_features
    out = x.new_empty((tokens, outputs))
    panels = data.shape[0]
    address = data.data_ptr()
    arguments = (
        x.data_ptr(), address, 0 if bias is None else bias.data_ptr(), out.data_ptr(), tokens, depth, outputs,
        HALF[x.dtype], CODES[activation],
    )  # fmt: skip
    if tokens <= PASS_ROWS:
        POOL.stream(linear_panels, panels, address, depth * PANEL * data.element_size(), 0, *arguments)
    else:
        POOL.share(linear_panels, panels * -(-tokens // PASS_ROWS), *arguments)
    return out
