"""`attention` as FlashAttention-2 on mma.sync (attention_v2.cu): every feature, sm_80 and later.

Knows tiles and launches. It must not know other kernels of the op, nor who calls. What is launched follows from
shapes alone: `workers` blocks a head take tiles of rows off a list that only the device knows, so no block is
wasted when all requests are equally long, and at most two tiles fall to one block when they are not.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any, NamedTuple

import torch

from ridgeline.kernels.cuda.instances import ARCHITECTURE, Defines, Instances
from ridgeline.kernels.cuda.nvrtc import FLOAT32, INT32, INT64, POINTER, Kernel
from ridgeline.kernels.tables import Shape, Tunable
from ridgeline.ops.attention import Attended, attention
from ridgeline.ops.attention_call import FEATURES, Limits
from ridgeline.ops.op import cuda

LIMITS = Limits(
    "v2",
    cuda(80),
    dtypes=(torch.bfloat16, torch.float16),
    head_dims=(64, 96, 128, 192, 256),
    pages=range(16, 257, 16),
    features=frozenset(FEATURES),
)


HOPPER_SHARED_BYTES = 233472
"""Shared memory of an H100's or H200's multiprocessor."""


class Tile(NamedTuple):
    """Rows and keys of a block's tile, its warps, tiles of keys in flight, and blocks of a multiprocessor."""

    rows: int
    keys: int
    warps: int
    stages: int
    blocks: int

    def shared_bytes(self, head_dim: int) -> int:
        """Dynamic shared memory of a block: its queries, and keys and values of each stage."""
        return (self.rows + 2 * self.stages * self.keys) * head_dim * 2


LONG = {
    64: Tile(128, 64, 4, 2, 3),
    96: Tile(128, 64, 4, 1, 2),
    128: Tile(128, 64, 4, 2, 2),
    192: Tile(64, 64, 4, 1, 2),
    256: Tile(64, 64, 4, 1, 2),
}
"""By head dim, for requests of many rows."""

SHORT = {
    64: Tile(64, 64, 4, 1, 3),
    96: Tile(64, 64, 4, 1, 3),
    128: Tile(64, 64, 4, 1, 3),
    192: Tile(64, 64, 4, 1, 2),
    256: Tile(64, 64, 4, 1, 2),
}
"""By head dim, for requests of SHORT_ROWS rows or fewer on average: all loads of a block are under way at once."""

SHORT_ROWS = 64
CROWD = 512
"""Blocks from which on short tiles of up to 128 columns share a multiprocessor by fours: fewer registers each, but
more loads under way. Below, the shorter way through a block counts."""

RESERVED_BYTES = 1024
"""Shared memory that the system takes of each block."""


def _exists(head_dim: int, tile: Tile) -> bool:
    """Whether a tile has whole squares for each warp, and an H100's multiprocessor holds its blocks."""
    fits = tile.blocks * (tile.shared_bytes(head_dim) + RESERVED_BYTES) <= HOPPER_SHARED_BYTES
    return fits and tile.rows % (16 * tile.warps) == 0


def _shape(head_dim: int) -> Shape:
    return Shape(head_dim, item_bytes=2)


Tunable(
    "v2",
    "long",
    LONG,
    {"rows": (64, 128), "keys": (32, 64, 128), "warps": (4, 8), "stages": (1, 2), "blocks": (1, 2, 3)},
    shape=_shape,
    work="prefill",
    exists=_exists,
)
Tunable(
    "v2",
    "short",
    SHORT,
    {"keys": (32, 64), "stages": (1, 2), "blocks": (2, 3, 4)},
    shape=_shape,
    work="short",
    exists=_exists,
)

ARGUMENTS = (*(POINTER,) * 12, *(INT32,) * 6, *(INT64,) * 6, *(FLOAT32,) * 2)


@cache
def kernel(
    tile: Tile, head_dim: int, dtype: torch.dtype, causal: bool, windowed: bool, capped: bool, tree: bool, page: int
) -> Kernel:
    """The kernel of these tiles and features; page: 0 for contiguous keys."""
    return Kernel(
        "attention_v2.cu",
        "attention_v2",
        ARGUMENTS,
        {
            **_tile_defines(tile, head_dim),
            "BF16": int(dtype == torch.bfloat16),
            "CAUSAL": int(causal),
            "WINDOWED": int(windowed),
            "SOFTCAP": int(capped),
            "TREE": int(tree),
            "PAGE": page,
        },
        shared_bytes=tile.shared_bytes(head_dim),
    )


def _tile_defines(tile: Tile, head_dim: int) -> Defines:
    return {"HEAD_DIM": head_dim, **{name.upper(): value for name, value in tile._asdict().items()}}


def choose(
    tokens: int,
    requests: int,
    heads: int,
    head_dim: int,
    shared_bytes: int = HOPPER_SHARED_BYTES,
    block_bytes: int = 232448,
) -> Tile:
    """The tile for a batch, from shapes alone. shared_bytes, block_bytes: of a multiprocessor, and of a block."""
    if tokens > SHORT_ROWS * requests:
        tile = LONG[head_dim]
    else:
        tile = SHORT[head_dim]
        if requests * heads >= CROWD and head_dim <= 128:
            tile = tile._replace(blocks=4)
    if tile.stages > 1 and tile.blocks * (tile.shared_bytes(head_dim) + RESERVED_BYTES) > shared_bytes:
        tile = tile._replace(stages=1)
    return tile


@cache
def _memory(device: torch.device) -> tuple[int, int]:
    """Shared memory of a device's multiprocessor, and what a block of it may have."""
    found: Any = torch.cuda.get_device_properties(device)
    return found.shared_memory_per_multiprocessor, found.shared_memory_per_block_optin


@attention.kernel("v2", needs=LIMITS.need, accepts=LIMITS.accepts)
def attention_v2(*args: Any, **kwargs: Any) -> Attended:
    """One launch and no workspace."""
    return run(None, *args, **kwargs)


def run(tile: Tile | None, *args: Any, **kwargs: Any) -> Attended:
    """`attention` with a given tile, or the one that `choose` names."""
    call = LIMITS.require(*args, **kwargs)
    q, k = call.q, call.k
    tokens, heads, head_dim = q.shape
    requests = call.lengths.shape[0]
    out = torch.empty((tokens, heads, head_dim), dtype=q.dtype, device=q.device)
    lse = torch.empty((tokens, heads), dtype=torch.float32, device=q.device) if call.return_lse else None
    if tokens and requests and heads:
        if tile is None:
            tile = choose(tokens, requests, heads, head_dim, *_memory(q.device))
        cap, page = call.softcap, call.page or 0
        paged = call.block_tables is not None
        chosen = kernel(
            tile, head_dim, q.dtype, call.causal, call.window is not None, cap is not None, call.tree is not None, page
        )
        workers = max(requests, -(-tokens // tile.rows))
        chosen.launch(
            (workers * heads, 1, 1),
            32 * tile.warps,
            tile.shared_bytes(head_dim),
            q, k, call.v, out, lse, call.block_tables, call.query_starts, call.lengths, call.key_starts, call.sinks,
            call.tree, call.tails,
            requests, workers, heads, call.group, call.window or 0, 0 if call.tree is None else call.tree.stride(0),
            call.block_tables.stride(0) if call.block_tables is not None else 0,
            q.stride(0), q.stride(1),
            k.stride(0) if paged else 0, k.stride(1), k.stride(2) if paged else k.stride(0),
            (call.scale if cap is None else cap) * LOG2_E, 0.0 if cap is None else call.scale / cap,
        )  # fmt: skip
    return out if lse is None else (out, lse)


LOG2_E = 1.4426950408889634


def _defines(choice: Mapping[str, int | str]) -> Defines:
    features = {name: value for name, value in choice.items() if name not in ("HEAD_DIM", "LENGTH", ARCHITECTURE)}
    head_dim = int(choice["HEAD_DIM"])
    tokens, requests = {"long": (4096, 1), "short": (64, 1), "crowd": (4096, 64)}[str(choice["LENGTH"])]
    return {**features, **_tile_defines(choose(tokens, requests, 32, head_dim), head_dim)}


def _spill_bytes(choice: Mapping[str, int | str]) -> int:
    """What may be spilled: where a tile lies, asked for again at its end. A tree's mask takes more, in its own loop."""
    if choice["TREE"]:
        return 512
    plain = not choice["WINDOWED"] and not choice["SOFTCAP"] and choice["PAGE"] not in (16, 48)
    return 96 if plain else 192


INSTANCES = Instances(
    "attention_v2.cu",
    ("sm_80", "sm_90"),
    {
        "HEAD_DIM": LIMITS.head_dims,
        "LENGTH": ("long", "short", "crowd"),
        "BF16": (0, 1),
        "CAUSAL": (0, 1),
        "WINDOWED": (0, 1),
        "SOFTCAP": (0, 1),
        "TREE": (0, 1),
        "PAGE": (0, 16, 48, 64, 256),
    },
    defines=_defines,
    exists=lambda choice: choice["CAUSAL"] == 1 or (choice["WINDOWED"] == 0 and choice["TREE"] == 0),
    spill_bytes=_spill_bytes,
)
