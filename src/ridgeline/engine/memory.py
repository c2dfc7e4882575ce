"""How much memory a device has, and how much the largest step needs: the ledger before the start.

Knows devices' memory and tensors' lifetimes. It must not know requests.
"""

from __future__ import annotations

import ctypes
import os
import weakref
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from ridgeline.core.config import MemoryLedger, Resolved
from ridgeline.kernels.select import Table
from ridgeline.models.spec import ModelSpec
from ridgeline.ops import Op

CPU_POOL_LIMIT_BYTES = 2 << 30
"""On a CPU the KV pool takes no more than this by default: memory there is shared with others."""
CPU_POOL_SHARE = 0.3
LIBRARY_BYTES = 400 << 20
"""What libraries hold on a GPU beside the allocator (context, cuBLAS workspaces, compiled kernels)."""


REFERENCE_SAMPLE_BYTES = 64
"""What the reference of `sample` holds at once for each (row, token): noise words of 64 bits, sorted copies."""
REFERENCE_ATTENTION_BYTES = 12
"""What the reference of `attention` holds at once for each (head, query, key): scores, masked, softmax in fp32."""


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


def reference_bytes(table: Table, spec: ModelSpec, tokens: int, rows: int, length: int) -> int:
    """Most that a reference holds inside of one op: outputs on meta do not show it, kernels hold little.

    tokens: new tokens of one request; rows: sampled at once; length: keys that a query may see.
    """
    most = 0
    served = {row.op for row in table.rows if row.kernel in ("reference", "standard")}
    if "sample" in served:
        most = rows * spec.vocabulary * REFERENCE_SAMPLE_BYTES
    if "attention" in served:
        most = max(most, spec.heads * min(tokens, length) * length * REFERENCE_ATTENTION_BYTES)
    return most


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


def return_freed_memory() -> None:
    """Ask the C library to give freed memory back to the system (it keeps up to some 30 MB after loading weights)."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def device_memory_bytes(device: torch.device) -> tuple[int, int]:
    """(total, available) bytes of a device."""
    if device.type == "cuda":
        available, total = torch.cuda.mem_get_info(device)
        return total, available
    return cpu_memory_bytes()


def size(number_bytes: float) -> str:
    """Bytes for a person: 1.5 GB."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(number_bytes) >= scale:
            return f"{number_bytes / scale:.{1 if unit == 'GB' else 0}f} {unit}"
    return f"{number_bytes:.0f} B"


def ledger_rows(ledger: MemoryLedger, config: Resolved) -> list[tuple[str, int, str]]:
    """The ledger line by line: (what, bytes, remark), top down from the device's memory to what stays free."""
    length = config.max_model_len
    fits = f"fits {ledger.fits(length)} requests of {length} tokens"
    graphs = [("CUDA graphs", ledger.graph_bytes, "steps captured at fixed sizes")]
    return [
        ("device", ledger.total_bytes, config.device),
        ("usable", ledger.usable_bytes, "by the engine and all others"),
        ("weights", ledger.weight_bytes, config.dtype),
        ("KV cache", ledger.kv_bytes, f"{ledger.kv_tokens} tokens of {size(ledger.bytes_per_token)}: {fits}"),
        ("activations", ledger.activation_bytes, f"the largest step, {config.max_num_batched_tokens} tokens"),
        *(graphs if ledger.graph_bytes else ()),
        ("rest", ledger.rest_bytes, "what others hold, and libraries"),
        ("free", ledger.free_bytes, "claimed by nobody"),
    ]
