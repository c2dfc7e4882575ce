"""Split-KV attention of up to 128 rows a KV head at once, on Hopper (decode_wide.cu): drafts and token trees.

Knows warpgroups, tensor maps and the two launches. It must not know when it is the better choice (decode.py does).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from math import gcd
from typing import ClassVar

import torch

from ridgeline.kernels.cuda import split
from ridgeline.kernels.cuda.instances import Defines, Instances
from ridgeline.kernels.cuda.nvrtc import INT32, TENSOR_MAP, Kernel, tensor_map
from ridgeline.ops.attention_call import Call

FILE = "decode_wide.cu"
PANEL = 64  # dims: 128 bytes, as wide as the copy engine swizzles
ADDED_AT_ONCE = 8  # rows of a block of add_pieces
H200 = split.Machine(132, 228 * 1024, 227 * 1024, 90)


@dataclass(frozen=True)
class Wide:
    """How decode_wide.cu is compiled: warpgroups (64 rows each), tiles of 64 keys in the ring, keys of one copy."""

    head_dim: int
    warpgroups: int
    stages: int
    box: int
    blocks: int = 1

    tile: ClassVar[int] = 64

    @property
    def rows(self) -> int:
        return 64 * self.warpgroups

    @property
    def threads(self) -> int:
        return 128 * self.warpgroups + 32

    @property
    def shared_bytes(self) -> int:
        panels = -(-self.head_dim // PANEL)
        return panels * 128 * (self.rows + self.stages * 2 * self.tile) + 1024  # 1024: to align it

    def defines(self) -> Defines:
        return {
            "HEAD_DIM": self.head_dim,
            "WARPGROUPS": self.warpgroups,
            "STAGES": self.stages,
            "BOX": self.box,
            "BLOCKS": self.blocks,
        }


@cache
def plan(machine: split.Machine, head_dim: int, rows: int, page: int | None) -> Wide | None:
    """As deep a ring as there is room for; None where this kernel does not run. rows: of a request, on average."""
    if machine.capability // 10 != 9:
        return None
    warpgroups = 2 if rows > 64 and head_dim <= 128 else 1  # longer rows of sums take the registers of two
    for stages in range(8, 1, -1):
        found = Wide(head_dim, warpgroups, stages, gcd(page or Wide.tile, Wide.tile))
        if machine.holds(found.shared_bytes, found.blocks):
            return found
    return None


@cache
def _kernels(plan: Wide, dtype: torch.dtype) -> tuple[Kernel, Kernel]:
    defines = {"HALF": int(dtype == torch.float16), **plan.defines()}
    maps = (*split.ARGUMENTS, TENSOR_MAP, TENSOR_MAP)
    return (
        Kernel(FILE, "decode_wide", maps, defines, plan.shared_bytes, features=True, dependent=True),
        Kernel(FILE, "add_pieces", (*split.ARGUMENTS, INT32), defines, features=True, dependent=True),
    )


def launch(plan: Wide, machine: split.Machine, call: Call, out: torch.Tensor, lse: torch.Tensor | None) -> None:
    """The shares, and what adds them up."""
    blocks = machine.multiprocessors * plan.blocks
    work = split.work(call, out, lse, plan.rows, plan.tile, blocks, None)
    pieces, add = _kernels(plan, call.q.dtype)
    maps = [_map(tensor, call.page, plan.box) for tensor in (call.k, call.v)]
    pieces.launch((blocks, 1, 1), plan.threads, plan.shared_bytes, *work.arguments, *maps)
    grid = (work.row_tiles, call.k.shape[1], plan.rows // ADDED_AT_ONCE)
    add.launch(grid, 32 * ADDED_AT_ONCE, 0, *work.arguments, blocks)


def _map(tensor: torch.Tensor, page: int | None, box: int) -> bytes:
    """Keys or values as the copy engine sees them: dims, keys of a page (or all), KV heads, pages."""
    if page is not None:
        return tensor_map(tensor, (PANEL, box, 1, 1))
    keys, kv_heads, head_dim = tensor.shape
    strides = (tensor.stride(0), tensor.stride(1), keys * tensor.stride(0))
    return tensor_map(tensor, (PANEL, box, 1, 1), (head_dim, keys, kv_heads, 1), strides)


def _defines(choice: Mapping[str, int | str]) -> Defines:
    found = plan(H200, int(choice["HEAD_DIM"]), int(choice["rows"]), int(choice["page"]) or None)
    assert found is not None
    return {"HALF": choice["HALF"], **found.defines()}


INSTANCES = Instances(
    FILE,
    ("sm_90a",),
    {"HALF": (0, 1), "HEAD_DIM": (64, 96, 128, 192, 256), "rows": (64, 128), "page": (0, 16, 32, 64)},
    defines=_defines,
    exists=lambda choice: choice["rows"] == 64 or int(choice["HEAD_DIM"]) <= 128,
    spill_bytes=lambda choice: 64,
)
