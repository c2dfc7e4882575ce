"""The roofs over an engine that is about to run: a card's from the table, a processor's measured on the spot.

Knows the table of machines, and a stopwatch. It must not know models; it is told how many bytes a step reads.
"""

from __future__ import annotations

import torch

from ridgeline.kernels.cpu.linear import linear_cpu
from ridgeline.perf.hardware import named
from ridgeline.perf.limit import OwnProduct, matrix_rate, read_rate
from ridgeline.perf.roofline import Roofline

MOST_BYTES = 256 << 20
"""A larger working set is not read from a cache anyway."""


def roofs_here(device: torch.device, dtype: str, working_set_bytes: int) -> tuple[Roofline, str] | None:
    """(the roofs, where they come from); None for a GPU that the table does not have, or not in this dtype.

    On a CPU it takes about half a second: memory is read at the working set, as a small model may live in a cache,
    and the best of torch's and our own matrix product counts. Measuring a GPU would want memory that the pool has.
    """
    if device.type == "cuda":
        machine = named(torch.cuda.get_device_name(device))
        if machine is None or dtype not in machine.matrix:
            return None
        return Roofline.of(machine, dtype), f"{machine.name}, datasheet, {dtype}"
    data = torch.ones(max(min(working_set_bytes, MOST_BYTES) // 4, 1024), dtype=torch.float32)
    bytes_per_s = read_rate(data)
    size = data.nbytes
    del data
    flops = matrix_rate(device, getattr(torch, dtype), OwnProduct(linear_cpu, True))
    return Roofline(flops, flops, bytes_per_s), f"measured at start, reading {size / 1e6:.0f} MB, {dtype}"
