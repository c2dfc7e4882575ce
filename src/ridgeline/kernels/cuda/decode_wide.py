"""Split-KV attention of up to 128 rows a KV head at once, on Hopper (decode_wide.cu): drafts and token trees.

Knows warpgroups, clusters, tensor maps and launches. It must not know when it is the better choice (decode.py does).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from math import gcd

import torch

from ridgeline.core.errors import KernelRefused
from ridgeline.kernels.cuda import split
from ridgeline.kernels.cuda.instances import Defines, Instances
from ridgeline.kernels.cuda.nvrtc import INT32, TENSOR_MAP, Kernel, tensor_map
from ridgeline.ops.attention_call import Call

FILE = "decode_wide.cu"
PANEL = 64  # dims: 128 bytes, as wide as the copy engine swizzles
ADDED_AT_ONCE = 8  # rows of a block of add_pieces
H200 = split.Machine(132, 228 * 1024, 227 * 1024, 90)

MOST_BLOCKS = 8
"""Of a cluster. 1: every block leaves its own sums, and a second launch adds them up."""
CLUSTER_TILE = 128
"""Keys that a block of a cluster takes at once, up to head dim 128."""


@dataclass(frozen=True)
class Wide:
    """How decode_wide.cu is compiled: warpgroups (64 rows each), tiles of keys in the ring, keys of one copy, keys of a
    tile, blocks of a cluster."""

    head_dim: int
    warpgroups: int
    stages: int
    box: int
    tile: int = 64
    cluster: int = 1
    blocks: int = 1

    @property
    def rows(self) -> int:
        return 64 * self.warpgroups

    @property
    def threads(self) -> int:
        lends = self.cluster > 1 and self.warpgroups == 2  # the warp that copies lends its warpgroup's registers
        return 128 * self.warpgroups + (128 if lends else 32)

    @property
    def _ring_bytes(self) -> int:
        return -(-self.head_dim // PANEL) * 128 * self.stages * 2 * self.tile

    @property
    def shared_bytes(self) -> int:
        panels = -(-self.head_dim // PANEL)
        return panels * 128 * self.rows + self._ring_bytes + 1024  # 1024: to align it

    @property
    def sums_fit(self) -> bool:
        """Whether the sums of a cluster's block find room where its tiles were."""
        return self.cluster == 1 or self.rows * (self.head_dim + 8 + 2) * 4 <= self._ring_bytes

    def defines(self) -> Defines:
        return {
            "HEAD_DIM": self.head_dim,
            "WARPGROUPS": self.warpgroups,
            "STAGES": self.stages,
            "BOX": self.box,
            "TILE_KEYS": self.tile,
            "CLUSTER": self.cluster,
            "BLOCKS": self.blocks,
        }


def _warpgroups(head_dim: int, rows: int) -> int:
    return 2 if rows > 64 and head_dim <= 128 else 1  # longer rows of sums take the registers of two


def choose(
    machine: split.Machine, head_dim: int, rows: int, page: int | None, requests: int, kv_heads: int
) -> Wide | None:
    """How a call is run, None where this kernel does not run. rows: of a request, on average."""
    items = requests * kv_heads * -(-rows // (64 * _warpgroups(head_dim, rows)))
    cluster = blocks_of_cluster(machine, items)
    return plan(machine, head_dim, rows, page, cluster, CLUSTER_TILE if cluster > 1 and head_dim <= 128 else 64)


def blocks_of_cluster(machine: split.Machine, items: int) -> int:
    """As many as leave every item (a tile of rows of one KV head) a cluster, MOST_BLOCKS at most."""
    cluster = 1
    while 2 * cluster <= MOST_BLOCKS and 2 * cluster * items <= machine.multiprocessors:
        cluster *= 2
    return cluster


@cache
def plan(
    machine: split.Machine, head_dim: int, rows: int, page: int | None, cluster: int = 1, keys: int = 64
) -> Wide | None:
    """As deep a ring as there is room for; None where this kernel does not run.

    rows: of a request, on average. cluster: blocks. keys: of a tile.
    """
    if machine.capability // 10 != 9:
        return None
    warpgroups = _warpgroups(head_dim, rows)
    for stages in range(8, 1, -1):
        found = Wide(head_dim, warpgroups, stages, gcd(page or keys, keys), keys, cluster)
        if machine.holds(found.shared_bytes, found.blocks) and found.sums_fit:
            return found
    return None


_MAPPED = (*split.ARGUMENTS, TENSOR_MAP, TENSOR_MAP)


@cache
def _pieces(plan: Wide, dtype: torch.dtype) -> Kernel:
    defines, cluster = {"HALF": int(dtype == torch.float16), **plan.defines()}, (plan.cluster, 1, 1)
    return Kernel(
        FILE, "decode_wide", _MAPPED, defines, plan.shared_bytes, features=True, cluster=cluster, dependent=True
    )


@cache
def _add(plan: Wide, dtype: torch.dtype) -> Kernel:
    defines = {"HALF": int(dtype == torch.float16), **plan.defines()}
    return Kernel(FILE, "add_pieces", (*split.ARGUMENTS, INT32), defines, features=True, dependent=True)


def launch(plan: Wide, machine: split.Machine, call: Call, out: torch.Tensor, lse: torch.Tensor | None) -> None:
    """The shares, and without clusters what adds them up."""
    pieces = _pieces(plan, call.q.dtype)
    workers = machine.multiprocessors * plan.blocks
    if plan.cluster > 1:
        workers = pieces.clusters_at_once(call.q.get_device(), plan.threads, plan.shared_bytes)
        if not workers:
            raise KernelRefused(
                f"decode: this GPU, or the part of it that is lent, has no {plan.cluster} blocks a cluster"
            )
    work = split.work(call, out, lse, plan.rows, plan.tile, workers, None, plan.cluster)
    maps = [_map(tensor, call.page, plan.box) for tensor in (call.k, call.v)]
    grid = (workers * plan.cluster, 1, 1)
    pieces.launch(grid, plan.threads, plan.shared_bytes, *work.arguments, *maps)
    if plan.cluster == 1:
        rows = (work.row_tiles, call.k.shape[1], plan.rows // ADDED_AT_ONCE)
        _add(plan, call.q.dtype).launch(rows, 32 * ADDED_AT_ONCE, 0, *work.arguments, workers)


def _map(tensor: torch.Tensor, page: int | None, box: int) -> bytes:
    """Keys or values as the copy engine sees them: dims, keys of a page (or all), KV heads, pages."""
    if page is not None:
        return tensor_map(tensor, (PANEL, box, 1, 1))
    keys, kv_heads, head_dim = tensor.shape
    strides = (tensor.stride(0), tensor.stride(1), keys * tensor.stride(0))
    return tensor_map(tensor, (PANEL, box, 1, 1), (head_dim, keys, kv_heads, 1), strides)


def _defines(choice: Mapping[str, int | str]) -> Defines:
    head_dim, rows, page, cluster, keys = (
        int(choice[axis]) for axis in ("HEAD_DIM", "rows", "page", "cluster", "keys")
    )
    found = plan(H200, head_dim, rows, page or None, cluster, keys)
    assert found is not None
    return {"HALF": choice["HALF"], **found.defines()}


INSTANCES = Instances(
    FILE,
    ("sm_90a",),
    {
        "HALF": (0, 1),
        "HEAD_DIM": (64, 96, 128, 192, 256),
        "rows": (64, 128),
        "page": (0, 16, 32, 64),
        "cluster": (1, 2, 4, 8, 16),
        "keys": (64, 128),
    },
    defines=_defines,
    exists=lambda choice: (
        (choice["rows"] == 64 or int(choice["HEAD_DIM"]) <= 128)
        and (choice["keys"] == 64 or (int(choice["HEAD_DIM"]) <= 128 and choice["cluster"] != 1))
    ),
    # Of a cluster's block with two warpgroups that is what its cursor keeps; the loop reads two words of it a tile.
    spill_bytes=lambda choice: 256 if choice["keys"] == 128 and choice["rows"] == 128 else 64,
)
