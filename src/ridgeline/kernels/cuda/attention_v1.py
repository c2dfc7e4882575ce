"""`attention` as FlashAttention's Algorithm 1 (attention_v1.cu): the EE451 report's system, kept to be measured.

Knows the paper's block sizes and the launch. It must not know other kernels of the op. It does what the paper does
(full and causal attention over contiguous keys) and refuses the rest by name. `python -m
ridgeline.kernels.cuda.attention_v1` prints block sizes.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any, NamedTuple

import torch

from ridgeline.core.errors import KernelRefused
from ridgeline.kernels.cuda.instances import ARCHITECTURE, Defines, Instances
from ridgeline.kernels.cuda.nvrtc import FLOAT32, INT32, INT64, POINTER, Kernel
from ridgeline.ops.attention import Attended, attention
from ridgeline.ops.attention_call import Limits
from ridgeline.ops.op import cuda

LOG2_E = 1.4426950408889634
WARPS = 4
ELEMENT_BYTES = 2
SRAM_BYTES = {"sm_80": 163 * 1024, "sm_86": 99 * 1024, "sm_89": 99 * 1024, "sm_90": 227 * 1024}
"""Shared memory that a block of an architecture may have: the paper's M, in bytes."""

LIMITS = Limits(
    "v1",
    cuda(80),
    dtypes=(torch.bfloat16, torch.float16),
    head_dims=(64, 96, 128, 192, 256),
    features=frozenset({"contiguous", "full", "lse"}),
)


class Blocks(NamedTuple):
    """B_c keys and values, and B_r queries, of a block."""

    columns: int
    rows: int


def block_sizes(sram_bytes: int, head_dim: int) -> Blocks:
    """Line 1 of Algorithm 1: B_c = ceil(M / 4d), B_r = min(B_c, d), M being the SRAM in elements of 16 bits."""
    columns = -(-(sram_bytes // ELEMENT_BYTES) // (4 * head_dim))
    return Blocks(columns, min(columns, head_dim))


def shared_bytes(blocks: Blocks, head_dim: int) -> int:
    """What a block really takes: keys, values and queries, and in O's place where the warps' parts meet."""
    exchange = WARPS * 16 * (head_dim + 8 + 2) * 4
    return (2 * blocks.columns + blocks.rows) * head_dim * ELEMENT_BYTES + exchange


def built(sram_bytes: int, head_dim: int) -> Blocks:
    """The paper's sizes rounded down to what tensor cores take: 16 keys a warp, strips of 16 rows that are copied
    by all threads together; fewer rows where the exchange needs the place. Raises KernelRefused if nothing is left.
    """
    columns, rows = block_sizes(sram_bytes, head_dim)
    strips = 32 if head_dim % 64 else 16
    blocks = Blocks(columns // (16 * WARPS) * (16 * WARPS), rows // strips * strips)
    while blocks.rows and shared_bytes(blocks, head_dim) > sram_bytes:
        blocks = blocks._replace(rows=blocks.rows - strips)
    if not (blocks.columns and blocks.rows):
        raise KernelRefused(f"q: v1 does not fit head dim {head_dim} into {sram_bytes} bytes of SRAM; v2 would do")
    return blocks


ARGUMENTS = (*(POINTER,) * 11, *(INT32,) * 2, *(INT64,) * 4, FLOAT32)


@cache
def kernel(sram_bytes: int, head_dim: int, dtype: torch.dtype, causal: bool) -> tuple[Kernel, int]:
    """The kernel for a size of SRAM, and the shared memory of its launch."""
    blocks = built(sram_bytes, head_dim)
    size = shared_bytes(blocks, head_dim)
    defines = _sized(blocks, head_dim) | {"BF16": int(dtype == torch.bfloat16), "CAUSAL": int(causal)}
    return Kernel("attention_v1.cu", "attention_v1", ARGUMENTS, defines, shared_bytes=size), size


def _sized(blocks: Blocks, head_dim: int) -> Defines:
    return {"HEAD_DIM": head_dim, "BC": blocks.columns, "BR": blocks.rows}


@cache
def sram(device: torch.device) -> int:
    """Shared memory that a block of a device may have, in bytes."""
    properties: Any = torch.cuda.get_device_properties(device)
    return int(properties.shared_memory_per_block_optin)


@attention.kernel("v1", needs=LIMITS.need, accepts=LIMITS.accepts)
def attention_v1(*args: Any, **kwargs: Any) -> Attended:
    """One launch. Workspace, carried from one block of keys to the next: T * H * (D + 2) floats."""
    call = LIMITS.require(*args, **kwargs)
    q, k = call.q, call.k
    tokens, heads, head_dim = q.shape
    out = torch.empty((tokens, heads, head_dim), dtype=q.dtype, device=q.device)
    lse = torch.empty((tokens, heads), dtype=torch.float32, device=q.device) if call.return_lse else None
    if tokens and heads and call.lengths.shape[0]:
        chosen, size = kernel(sram(q.device), head_dim, q.dtype, call.causal)
        carried = torch.empty((tokens, heads, head_dim), dtype=torch.float32, device=q.device)
        sums, peaks = torch.empty((2, tokens, heads), dtype=torch.float32, device=q.device)
        chosen.launch(
            (call.lengths.shape[0] * heads, 1, 1), 32 * WARPS, size,
            q, k, call.v, out, lse, carried, sums, peaks, call.query_starts, call.lengths, call.key_starts,
            heads, call.group, q.stride(0), q.stride(1), k.stride(0), k.stride(1), call.scale * LOG2_E,
        )  # fmt: skip
    return out if lse is None else (out, lse)


def _defines(choice: Mapping[str, int | str]) -> Defines:
    head_dim = int(choice["HEAD_DIM"])
    features = {name: value for name, value in choice.items() if name in ("BF16", "CAUSAL")}
    return {**features, **_sized(built(SRAM_BYTES[str(choice["MACHINE"])], head_dim), head_dim)}


INSTANCES = Instances(
    "attention_v1.cu",
    ("sm_80", "sm_90"),
    {"MACHINE": ("sm_80", "sm_90"), "HEAD_DIM": LIMITS.head_dims, "BF16": (0, 1), "CAUSAL": (0, 1)},
    defines=_defines,
    exists=lambda choice: choice[ARCHITECTURE] == choice["MACHINE"],
)


def main() -> None:
    """Print the paper's block sizes, and those that are built, for each size of SRAM."""
    for name, size in SRAM_BYTES.items():
        for head_dim in LIMITS.head_dims:
            paper = block_sizes(size, head_dim)
            try:
                made = "built {} x {}".format(*built(size, head_dim))
            except KernelRefused:
                made = "does not fit"
            print(f"{name} ({size >> 10} KiB), d = {head_dim}: B_c = {paper.columns}, B_r = {paper.rows}; {made}")


if __name__ == "__main__":
    main()
