"""How much memory a device has, and how much the largest step needs: the ledger before the start.

Knows devices' memory and tensors' lifetimes. It must not know requests.
"""

from __future__ import annotations

import os
import weakref
from pathlib import Path
from typing import Any

import torch

from ridgeline.ops import Op

CPU_POOL_LIMIT_BYTES = 2 << 30
"""On a CPU the KV pool takes no more than this by default: memory there is shared with others."""
CPU_POOL_SHARE = 0.3
LIBRARY_BYTES = 400 << 20
"""What libraries hold on a GPU beside the allocator (context, cuBLAS workspaces, compiled kernels)."""


class LiveBytes:
    """An observer that follows op outputs from creation to release: peak_bytes is a step's activations.

    On meta tensors Python's own reference counts say when each output dies, so the forward pass is
    again the only declaration.
    """

    def __init__(self) -> None:
        self.live_bytes = 0
        self.peak_bytes = 0

    def before(self, op: Op, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None: ...

    def after(self, op: Op, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        for tensor in result if isinstance(result, tuple) else (result,):
            if isinstance(tensor, torch.Tensor):
                size = tensor.numel() * tensor.element_size()
                self.live_bytes += size
                weakref.finalize(tensor, self._died, size)
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)

    def _died(self, size: int) -> None:
        self.live_bytes -= size


def cpu_memory_bytes() -> tuple[int, int]:
    """(total, available) bytes of this process's memory: the machine's, or its control group's if less."""
    page = os.sysconf("SC_PAGE_SIZE")
    total = os.sysconf("SC_PHYS_PAGES") * page
    available = total
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                available = int(line.split()[1]) * 1024
    except OSError:
        available = os.sysconf("SC_AVPHYS_PAGES") * page
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        if limit.isdigit():
            total, available = min(total, int(limit)), min(available, int(limit) - used)
    except (OSError, ValueError):
        pass
    return total, available


def device_memory_bytes(device: torch.device) -> tuple[int, int]:
    """(total, available) bytes of a device."""
    if device.type == "cuda":
        available, total = torch.cuda.mem_get_info(device)
        return total, available
    return cpu_memory_bytes()
