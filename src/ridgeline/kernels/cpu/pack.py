"""Packing: a dense matrix into the "panels" format, as fast as memory allows.

Knows both layouts. A unit of work is one panel, transposed in squares of 16 x 16 that stay in registers.
"""

from __future__ import annotations

import ctypes
import sys

import torch

from ridgeline.kernels.cpu.native import Kernel
from ridgeline.kernels.cpu.pool import POOL
from ridgeline.ops.weight import PANEL, Weight

pack_panels = Kernel("pack", "pack_panels")


HUGE_BYTES = 2 << 20
MADV_HUGEPAGE = 14


def on_huge_pages(tensor: torch.Tensor) -> torch.Tensor:
    """Ask Linux for 2 MiB pages under a tensor that nobody has touched yet; returns it.

    With 4 KiB pages, first touching a gigabyte takes longer than packing it. Where it is not possible,
    nothing happens.
    """
    if sys.platform == "linux" and tensor.nbytes >= 2 * HUGE_BYTES:
        begin = -(-tensor.data_ptr() // HUGE_BYTES) * HUGE_BYTES
        length = (tensor.data_ptr() + tensor.nbytes) // HUGE_BYTES * HUGE_BYTES - begin
        ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(length), MADV_HUGEPAGE)
    return tensor


def pack(weight: Weight) -> Weight:
    """The same matrix in the "panels" format, a copy unless it has it already; bit for bit weight.to_panels()."""
    data = weight.data
    if weight.format != "dense" or data.element_size() not in (2, 4):
        return weight.to_panels()
    data = data.contiguous()
    panels = -(-weight.out_features // PANEL)
    packed = on_huge_pages(torch.empty(panels, weight.in_features, PANEL, dtype=data.dtype))
    POOL.share(
        pack_panels, panels, data.data_ptr(), packed.data_ptr(), weight.out_features, weight.in_features,
        int(data.element_size() == 2),
    )  # fmt: skip
    return Weight(packed, weight.out_features, weight.in_features, "panels")
