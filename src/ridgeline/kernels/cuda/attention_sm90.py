"""`attention` of the class of FlashAttention-3 (attention_sm90.cu): every feature, Hopper alone.

Knows tiles, tensor maps and launches. It must not know other kernels of the op, nor who calls. What is launched
follows from shapes alone: as many blocks as the GPU has multiprocessors are dealt tiles that only the device knows.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from math import gcd
from typing import Any, NamedTuple

import torch

from ridgeline.kernels.cuda.instances import Defines, Instances
from ridgeline.kernels.cuda.nvrtc import FLOAT32, INT32, POINTER, TENSOR_MAP, Kernel, tensor_map
from ridgeline.kernels.tables import Shape, Tunable
from ridgeline.ops.attention import Attended, attention
from ridgeline.ops.attention_call import FEATURES, Call, Limits
from ridgeline.ops.op import cuda

ALIGNED_BYTES = 16
CHUNK = 64  # elements: 128 bytes, as wide as the copy engine swizzles
REGISTERS = 65536  # of a multiprocessor
BLOCK_BYTES = 232448  # of shared memory that a block may have
ROWS = 64  # of a warpgroup
WARPGROUP = 128
BARRIER_BYTES = 8
WORK_BYTES = 8 * 64


def _unaligned(call: Call) -> str | None:
    """The copy engine moves pieces of 16 bytes."""
    for name, tensor in (("q", call.q), ("k", call.k)):
        for size, stride in zip(tensor.shape[:-1], tensor.stride()[:-1]):
            if size > 1 and stride * tensor.element_size() % ALIGNED_BYTES:
                return f"{name}: sm90 takes strides of multiples of {ALIGNED_BYTES} bytes, not {tensor.stride()}"
    return None


LIMITS = Limits(
    "sm90",
    cuda(90),
    dtypes=(torch.bfloat16, torch.float16),
    head_dims=(64, 96, 128, 192, 256),
    pages=range(16, 257, 16),
    features=frozenset(FEATURES),
    more=_unaligned,
)


class Tile(NamedTuple):
    """How a block of threads is laid out.

    warpgroups: that multiply, 64 rows each. keys: of a tile. stages: tiles of keys and of values in flight.
    query_stages: tiles of queries. ping_pong: warpgroups take turns at the tensor cores. registers: of a thread
    that copies, and of one that multiplies. flush: a tile is finished before the next one's queries are waited for,
    which matters where there is room for one tile of queries only.
    """

    warpgroups: int
    keys: int
    stages: int = 2
    query_stages: int = 2
    ping_pong: bool = True
    registers: tuple[int, int] = (40, 232)
    flush: bool = False

    @property
    def rows(self) -> int:
        return ROWS * self.warpgroups

    @property
    def threads(self) -> int:
        return WARPGROUP * (1 + self.warpgroups)

    def shared_bytes(self, head_dim: int) -> int:
        """Dynamic shared memory of a block: queries, keys and values of each stage, and barriers."""
        chunks = -(-head_dim // CHUNK)
        tiles = self.query_stages * self.rows + 2 * self.stages * self.keys
        barriers = 2 * self.query_stages * self.warpgroups + 4 * self.stages
        return 128 * chunks * tiles + WORK_BYTES + BARRIER_BYTES * barriers


SHORT = {
    64: Tile(2, 128, stages=4),
    96: Tile(2, 128),
    128: Tile(2, 128),
    192: Tile(2, 96, query_stages=1),
    256: Tile(2, 64, query_stages=1, ping_pong=False),
}
"""By head dim, for requests of SHORT_ROWS rows or fewer on average: less is lost at the end of a request."""

LONG = {
    64: Tile(3, 96, stages=4, registers=(32, 160)),
    96: Tile(2, 128),
    128: Tile(2, 128, ping_pong=False),
    192: Tile(2, 96, query_stages=1),
    256: Tile(2, 64, query_stages=1, ping_pong=False),
}
"""By head dim, for requests of many rows."""


class Sections(NamedTuple):
    """Megabytes of keys and values of the heads that are dealt side by side, by mask: the L2 cache should hold them."""

    full_mb: int = 32
    causal_mb: int = 32


SECTIONS = {64: Sections(), 96: Sections(), 128: Sections(8), 192: Sections(), 256: Sections(8)}

SHORT_ROWS = {64: 1024, 96: 2048, 128: 2048, 192: 2048, 256: 2048}


def _exists(head_dim: int, tile: Tile) -> bool:
    """Whether a block finds its registers and its shared memory on a multiprocessor."""
    registers = tile.registers[0] + tile.warpgroups * tile.registers[1]
    if tile.flush and tile.query_stages > 1:
        return False
    return registers * WARPGROUP <= REGISTERS and tile.shared_bytes(head_dim) <= BLOCK_BYTES


AXES = {
    "warpgroups": (2, 3),
    "keys": (64, 80, 96, 112, 128, 144, 160, 176),
    "stages": (2, 3, 4),
    "query_stages": (1, 2),
    "ping_pong": (False, True),
    "registers": ((24, 240), (40, 232), (32, 160)),
    "flush": (False, True),
}
Tunable("sm90", "long", LONG, AXES, lambda head_dim: Shape(head_dim, 2), "prefill", _exists, (4096, 8192))
SIZES = {"full_mb": (8, 16, 32), "causal_mb": (8, 16, 32)}
Tunable("sm90", "sections", SECTIONS, SIZES, lambda head_dim: Shape(head_dim, 2), "prefill", lengths=(4096, 8192))
Tunable("sm90", "short", SHORT, AXES, lambda head_dim: Shape(head_dim, 2), "prefill", _exists, (512, 1024))

ARGUMENTS = (*(TENSOR_MAP,) * 3, *(POINTER,) * 10, *(INT32,) * 6, *(FLOAT32,) * 2)
LOG2_E = 1.4426950408889634


def _tile_defines(tile: Tile, head_dim: int) -> Defines:
    return {
        "HEAD_DIM": head_dim,
        "WARPGROUPS": tile.warpgroups,
        "TILE_N": tile.keys,
        "STAGES": tile.stages,
        "Q_STAGES": tile.query_stages,
        "PING_PONG": int(tile.ping_pong),
        "FLUSH": int(tile.flush),
        "PRODUCER_REGISTERS": tile.registers[0],
        "CONSUMER_REGISTERS": tile.registers[1],
    }


@cache
def kernel(
    tile: Tile, head_dim: int, dtype: torch.dtype, causal: bool, features: frozenset[str], page: int, section_mb: int
) -> Kernel:
    """The kernel of a tile and of features; page: 0 for contiguous keys. section_mb: of Sections, for its mask."""
    return Kernel(
        "attention_sm90.cu",
        "attention_sm90",
        ARGUMENTS,
        {
            **_tile_defines(tile, head_dim),
            "SECTION_MB": section_mb,
            "HALF": int(dtype == torch.float16),
            "CAUSAL": int(causal),
            "WINDOW": int("window" in features),
            "SOFTCAP": int("softcap" in features),
            "SINKS": int("sinks" in features),
            "TREE": int("tree" in features),
            "LSE": int("lse" in features),
            "PAGE": page,
        },
        shared_bytes=tile.shared_bytes(head_dim),
        features=True,
    )


def _map(tensor: torch.Tensor, box: tuple[int, ...]) -> bytes:
    """A tensor's map; dimensions of one element have strides of no meaning, which the driver would refuse."""
    sizes = tuple(reversed(tensor.shape))
    strides = tuple(
        stride if size > 1 else CHUNK for size, stride in zip(tensor.shape[-2::-1], tensor.stride()[-2::-1])
    )
    return tensor_map(tensor, box, sizes, strides)


@cache
def _multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


class _Counters:
    """Pairs of zeros that launches draw their tiles from and leave as zeros.

    Launches on one stream follow each other and share a pair. A captured launch has one of its own, for graphs may
    run side by side. There are none for what is captured first of all, or after COUNTERS launches: such a
    launch deals its tiles in turn, which is right too, and slower where tiles differ.
    """

    def __init__(self, device: int) -> None:
        self.pairs = torch.zeros((COUNTERS, 2), dtype=torch.int32, device=device)
        self.used = 0
        self.of_stream: dict[int, torch.Tensor] = {}

    def fresh(self) -> torch.Tensor | None:
        self.used += 1
        return self.pairs[self.used - 1] if self.used <= COUNTERS else None

    def of(self, stream: int) -> torch.Tensor | None:
        pair = self.of_stream.get(stream)
        if pair is None:
            pair = self.fresh()
            if pair is not None:
                self.of_stream[stream] = pair
        return pair


COUNTERS = 1 << 16
_counters: dict[int, _Counters] = {}


def _counter(q: torch.Tensor) -> torch.Tensor | None:
    device = q.get_device()
    capturing = torch.cuda.is_current_stream_capturing()
    if device not in _counters:
        if capturing:
            return None
        _counters[device] = _Counters(device)
    counters = _counters[device]
    return counters.fresh() if capturing else counters.of(torch._C._cuda_getCurrentRawStream(device))


def choose(tokens: int, requests: int, head_dim: int) -> Tile:
    """The tile for a batch, from shapes alone."""
    return (SHORT if tokens <= SHORT_ROWS[head_dim] * requests else LONG)[head_dim]


@attention.kernel("sm90", needs=LIMITS.need, accepts=LIMITS.accepts)
def attention_sm90(*args: Any, **kwargs: Any) -> Attended:
    """One launch and no workspace."""
    return run(None, *args, **kwargs)


def run(tile: Tile | None, /, *args: Any, **kwargs: Any) -> Attended:
    """`attention` with a given tile, or the one that `choose` names."""
    call = LIMITS.require(*args, **kwargs)
    q, k, v = call.q, call.k, call.v
    tokens, heads, head_dim = q.shape
    requests = call.lengths.shape[0]
    out = torch.empty((tokens, heads, head_dim), dtype=q.dtype, device=q.device)
    lse = torch.empty((tokens, heads), dtype=torch.float32, device=q.device) if call.return_lse else None
    if tokens and requests and heads:
        if tile is None:
            tile = choose(tokens, requests, head_dim)
        page = call.page or 0
        if not k.numel():  # nobody has a key; a map of nothing cannot be made, and is not looked at
            k = v = q.new_zeros((1, *k.shape[1:]))
        section_mb = SECTIONS[head_dim].causal_mb if call.causal else SECTIONS[head_dim].full_mb
        features = call.features - {"full", "paged", "contiguous"}
        chosen = kernel(tile, head_dim, q.dtype, call.causal, features, page, section_mb)
        box = (CHUNK, gcd(tile.keys, page), 1, 1) if page else (CHUNK, 1, tile.keys)
        cap = call.softcap
        chosen.launch(
            (min(_multiprocessors(q.get_device()), (tokens // tile.rows + requests) * heads), 1, 1),
            tile.threads,
            tile.shared_bytes(head_dim),
            _map(q, (CHUNK, 1, ROWS)), _map(k, box), _map(v, box),
            out, lse, call.query_starts, call.lengths, call.key_starts, call.block_tables, call.tree, call.tails,
            call.sinks, _counter(q),
            0 if call.block_tables is None else call.block_tables.stride(0),
            0 if call.tree is None else call.tree.stride(0),
            requests, heads, call.group, call.window or 0,
            call.scale * LOG2_E if cap is None else call.scale / cap, 0.0 if cap is None else cap * LOG2_E,
        )  # fmt: skip
    return out if lse is None else (out, lse)


def _defines(choice: Mapping[str, int | str]) -> Defines:
    head_dim = int(choice["HEAD_DIM"])
    features = {name: value for name, value in choice.items() if name != "LENGTH"}
    tile = {"long": LONG, "short": SHORT}[str(choice["LENGTH"])][head_dim]
    return {**_tile_defines(tile, head_dim), "SECTION_MB": SECTIONS[head_dim].full_mb, **features}


def _is_one(choice: Mapping[str, int | str]) -> bool:
    """No window or tree without the causal mask; a tile is finished early where there is room for one alone."""
    masked = choice["CAUSAL"] == 1 or (choice["WINDOW"] == 0 and choice["TREE"] == 0)
    return masked and (choice["FLUSH"] == 0 or LONG[int(choice["HEAD_DIM"])].query_stages == 1)


INSTANCES = Instances(
    "attention_sm90.cu",
    ("sm_90a",),
    {
        "HEAD_DIM": LIMITS.head_dims,
        "LENGTH": ("long", "short"),
        "HALF": (0, 1),
        "CAUSAL": (0, 1),
        "WINDOW": (0, 1),
        "SOFTCAP": (0, 1),
        "SINKS": (0, 1),
        "TREE": (0, 1),
        "LSE": (0, 1),
        "PAGE": (0, 16, 48, 64, 128, 256),
        "FLUSH": (0, 1),
    },
    defines=_defines,
    exists=_is_one,
    # A tree's mask looks up bits key by key, in blocks that are few: what is spilled there costs nothing that counts.
    spill_bytes=lambda choice: 512 if choice["TREE"] else 64,
)
