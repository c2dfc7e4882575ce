"""The host's side of split-KV attention (include/split.cuh): arguments, workspace, the size of the GPU.

Knows how decode.cu and decode_wide.cu are called. It must not know how they are compiled, nor lengths: what is
launched and allocated follows from shapes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch

from ridgeline.core.errors import KernelRefused
from ridgeline.kernels.cuda.nvrtc import FLOAT32, INT32, INT64, POINTER
from ridgeline.ops.attention_call import Call

LOG2_E = 1.4426950408889634
STATIC_BYTES, SYSTEM_BYTES = 512, 1024
"""Shared memory of a block beyond what it asks for: static variables, and what the system keeps."""

ARGUMENTS: tuple[str, ...] = (*[POINTER] * 14, INT64, *[INT32] * 10, *[INT64] * 6, FLOAT32, FLOAT32)
"""Kinds of CALL_PARAMETERS."""


class Machine(NamedTuple):
    """Multiprocessors; bytes of shared memory that one of them, and that a block may have; the capability (90)."""

    multiprocessors: int
    shared_bytes: int
    block_bytes: int
    capability: int

    def holds(self, shared_bytes: int, blocks: int) -> bool:
        """Whether a multiprocessor has room for so many blocks with so much dynamic shared memory."""
        size = shared_bytes + STATIC_BYTES
        return size <= self.block_bytes and blocks * (size + SYSTEM_BYTES) <= self.shared_bytes


@cache
def machine(device: int) -> Machine:
    found: Any = torch.cuda.get_device_properties(device)
    return Machine(
        found.multi_processor_count,
        found.shared_memory_per_multiprocessor,
        found.shared_memory_per_block_optin,
        10 * found.major + found.minor,
    )


class _Counters:
    """Counters of pieces that have arrived, one an item: zero between launches, since the last to arrive resets.

    Calls take turns through a ring, so that calls which run at the same time, on several streams or in several
    graphs, share none (as long as fewer than COUNT items are under way).
    """

    COUNT = 1 << 20

    def __init__(self, device: int) -> None:
        if torch.cuda.is_current_stream_capturing():
            raise KernelRefused("decode must have run once outside of a CUDA graph before it is captured")
        self.ring = torch.zeros(self.COUNT, dtype=torch.int32, device=f"cuda:{device}")
        torch.cuda.synchronize(device)
        self.next = 0

    def take(self, count: int) -> torch.Tensor:
        if count > self.COUNT:
            raise KernelRefused(f"q: decode takes up to {self.COUNT} tiles of rows times KV heads, not {count}")
        place = self.next if self.next + count <= self.COUNT else 0
        self.next = place + -(-count // 32) * 32
        return self.ring[place : place + count]


@cache
def _counters(device: int) -> _Counters:
    return _Counters(device)


@cache
def _inverse(divisor: int) -> int:
    """ceil(2^32 / divisor) in 32 bits (split.cuh, `divided`), as a signed number."""
    value = -(-(1 << 32) // divisor) & 0xFFFFFFFF
    return value - (value >> 31 << 32)


class Work(NamedTuple):
    """arguments: of CALL_PARAMETERS. row_tiles: at most, of all requests."""

    arguments: Sequence[Any]
    row_tiles: int


def work(
    call: Call, out: torch.Tensor, lse: torch.Tensor | None, rows: int, tile: int, blocks: int, fixed: int | None
) -> Work:
    """The call as a split-KV kernel takes it.

    rows, tile: of a tile of scores. blocks: of the grid. fixed: keys of a piece that is summed by itself, or None
    for equal shares. The workspace comes from torch's allocator, so that a captured graph owns it.
    """
    q, k = call.q, call.k
    kv_heads, group, requests, head_dim = k.shape[1], call.group, call.lengths.shape[0], q.shape[2]
    row_tiles = q.shape[0] * group // rows + requests
    paged = call.block_tables is not None
    if fixed is None:
        grain, slots = 0, 2 * blocks
    else:
        grain = max(1, fixed // tile)
        capacity = k.shape[0] if call.block_tables is None else call.block_tables.shape[1] * k.shape[2]
        slots = row_tiles * kv_heads * -(-capacity // (tile * grain))
    partial = torch.empty(slots * rows * (head_dim + 2), device=q.device, dtype=torch.float32)
    page, cap = call.page or 1, call.softcap
    arguments = (
        q, k, call.v, out, lse, call.block_tables, call.query_starts, call.lengths, call.key_starts, call.sinks,
        call.tree, call.tails, partial, _counters(q.get_device()).take(row_tiles * kv_heads),
        slots, requests, kv_heads, group, _inverse(group), page, _inverse(page),
        call.window or 0, 0 if call.tree is None else call.tree.stride(0), int(call.causal), grain,
        0 if call.block_tables is None else call.block_tables.stride(0),
        q.stride(0), q.stride(1),
        k.stride(0) if paged else 0, k.stride(1), k.stride(2) if paged else k.stride(0),
        call.scale * LOG2_E if cap is None else 2 * call.scale / cap * LOG2_E,
        0.0 if cap is None else cap * LOG2_E,
    )  # fmt: skip
    return Work(arguments, row_tiles)
