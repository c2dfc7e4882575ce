"""Attention of short queries over long keys: every block of the GPU reads an equal share of them (decode.cu).

Knows shapes, tiles and when more rows go to decode_wide.py. It must not know lengths (the device alone reads those),
layers or who shares a page. Flash decoding (Dao et al., 2023) with the shares of stream-K (Osama et al., 2301.03598):
one launch, whose grid is what the GPU can hold at once. Work is dealt on the device, in tiles of keys; an item (a tile
of rows for one KV head) that several blocks share is put together by the one that finishes last.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import torch

from ridgeline.core.errors import KernelRefused
from ridgeline.kernels.cuda import decode_wide, split
from ridgeline.kernels.cuda.instances import Defines, Instances
from ridgeline.kernels.cuda.nvrtc import Kernel
from ridgeline.kernels.tables import Shape, Tunable
from ridgeline.ops.attention import Attended, attention
from ridgeline.ops.attention_call import FEATURES, Call, Limits
from ridgeline.ops.op import cuda

FILE = "decode.cu"

SPLIT_KEYS = 1024
"""Of a fixed piece, unless a caller asks for another number."""


@dataclass(frozen=True)
class Narrow:
    """How decode.cu is compiled: keys that a warp takes at once, steps in its ring, warps, blocks an SM.

    whole_from: tiles of a block's share from which it may grow by a sixteenth, to whole requests or equal parts of one.
    0: never, shares are as small as may be.
    """

    head_dim: int
    keys: int
    stages: int
    warps: int
    blocks: int
    whole_from: int = 48

    rows: ClassVar[int] = 16

    @property
    def tile(self) -> int:
        """Keys that a block takes at once."""
        return self.keys * self.warps

    @property
    def threads(self) -> int:
        return 32 * self.warps

    @property
    def shared_bytes(self) -> int:
        ring = self.warps * self.stages * 2 * self.keys * self.head_dim * 2
        sums = self.warps // 2 * 8 * (self.head_dim + 8) * 4
        queries = self.rows * self.head_dim * 2 if self.head_dim > 128 else 0
        return ring + sums + self.warps * self.rows * 8 + queries

    def defines(self) -> Defines:
        return {
            "HEAD_DIM": self.head_dim,
            "KEYS": self.keys,
            "STAGES": self.stages,
            "WARPS": self.warps,
            "BLOCKS": self.blocks,
            "WHOLE_FROM": self.whole_from,
        }


HEAD_DIMS = (64, 96, 128, 192, 256)


@cache
def _roomy(machine: split.Machine, head_dim: int) -> Narrow:
    """Two blocks of four warps where they fit, with as deep rings as there is room for."""
    keys = 32 if head_dim == 64 else 16
    for blocks, warps, least in ((2, 4, 3), (1, 4, 2), (1, 2, 2)):
        for stages in range(6, least - 1, -1):
            plan = Narrow(head_dim, keys, stages, warps, blocks)
            if machine.holds(plan.shared_bytes, plan.blocks):
                return plan
    raise KernelRefused(f"decode needs more shared memory than this GPU's {machine.block_bytes} bytes a block")


PLANS = {head_dim: _roomy(decode_wide.H200, head_dim) for head_dim in HEAD_DIMS}
"""By head dim, for GPUs that have room for them."""

Tunable(
    "decode",
    "narrow",
    PLANS,
    {"keys": (16, 32, 64), "stages": (2, 3, 4, 5, 6), "warps": (2, 4, 8), "blocks": (1, 2, 3)},
    shape=lambda head_dim: Shape(head_dim, item_bytes=2),
    work="decode",
    exists=lambda head_dim, plan: decode_wide.H200.holds(plan.shared_bytes, plan.blocks),
)


def _narrow(machine: split.Machine, head_dim: int) -> Narrow:
    """The table's plan; on a GPU without room for it, what there is room for."""
    found = PLANS[head_dim]
    return found if machine.holds(found.shared_bytes, found.blocks) else _roomy(machine, head_dim)


def _plan(machine: split.Machine, call: Call, split_keys: int | None) -> Narrow | decode_wide.Wide:
    """From shapes alone: rows of a request on average, head dim, page. With fixed pieces, from the head dim alone."""
    head_dim, rows = call.q.shape[2], -(-call.q.shape[0] // call.lengths.shape[0]) * call.group
    if rows > Narrow.rows and call.k.shape[0] and split_keys is None:
        wide = decode_wide.plan(machine, head_dim, rows, call.page)
        if wide is not None:
            return wide
    return _narrow(machine, head_dim)


@cache
def _kernel(plan: Narrow, dtype: torch.dtype, dependent: bool) -> Kernel:
    defines = {"HALF": int(dtype == torch.float16), **plan.defines()}
    return Kernel(FILE, "decode", split.ARGUMENTS, defines, plan.shared_bytes, dependent=dependent)


def _more(call: Call) -> str | None:
    for name, tensor in (("q", call.q), ("k", call.k)):
        if any(stride % 8 for size, stride in zip(tensor.shape[:-1], tensor.stride()) if size > 1):
            return f"{name}: decode takes strides that are multiples of 8 elements, not {tensor.stride()}"
    for name, tensor in (("q", call.q), ("k", call.k), ("v", call.v)):
        if tensor.device.type == "cuda" and tensor.data_ptr() % 16:
            return f"{name}: decode takes tensors that begin at a multiple of 16 bytes"
    if call.q.shape[0] * call.group**2 >> 32:
        return f"q: decode takes fewer than 2^32 rows times squared heads a KV head, not {call.q.shape[0]} rows"
    return None


LIMITS = Limits(
    "decode",
    need=cuda(80),
    dtypes=(torch.bfloat16, torch.float16),
    head_dims=HEAD_DIMS,
    features=frozenset(FEATURES),
    pages=range(16, 257, 16),
    more=_more,
)


def attention_decode_steady(*args: Any, **kwargs: Any) -> Attended:
    """`attention_decode`, batch-invariant: keys in pieces of SPLIT_KEYS."""
    return run(SPLIT_KEYS, *args, **kwargs)


@attention.kernel("decode", needs=LIMITS.need, accepts=LIMITS.accepts, invariant=attention_decode_steady)
def attention_decode(*args: Any, **kwargs: Any) -> Attended:
    """The op `attention` (ops/attention.py) in one launch, or two for many rows; `spans` is not looked at.

    Right for any lengths; made for few rows a request. The workspace (fp32 partial sums) is taken from torch's
    allocator on every call, so that a captured graph owns it.
    """
    return run(None, *args, **kwargs)


def run(split_keys: int | None, /, *args: Any, **kwargs: Any) -> Attended:
    """`attention` with keys in fixed pieces, or (None) in equal shares for all blocks.

    Equal shares are the fastest, and bit-equal for equal batches, but where a request is cut, and with it the order
    in which a row's keys are added, then depends on who else is in the batch. A number of keys cuts every request's
    keys at its multiples, and one kernel takes every row: a row's bits are its own business (He, "Defeating
    nondeterminism in LLM inference", 2025). The price: a workspace that grows with the capacity of the block
    tables, shares that are less even, and long prompts in tiles of 16 rows.
    """
    call = LIMITS.require(*args, **kwargs)
    q = call.q
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device) if call.return_lse else None
    if q.shape[0] and call.lengths.shape[0]:
        _launch(call, out, lse, split_keys)
    return out if lse is None else (out, lse)


def _launch(call: Call, out: torch.Tensor, lse: torch.Tensor | None, split_keys: int | None) -> None:
    machine = split.machine(call.q.get_device())
    plan = _plan(machine, call, split_keys)
    if isinstance(plan, decode_wide.Wide):
        decode_wide.launch(plan, machine, call, out, lse)
        return
    blocks = machine.multiprocessors * plan.blocks
    work = split.work(call, out, lse, plan.rows, plan.tile, blocks, split_keys)
    kernel = _kernel(plan, call.q.dtype, machine.capability >= 90)
    kernel.launch((blocks, 1, 1), plan.threads, plan.shared_bytes, *work.arguments)


MACHINES = {
    "sm_80": split.Machine(108, 164 * 1024, 163 * 1024, 80),
    "sm_86": split.Machine(72, 100 * 1024, 99 * 1024, 86),
    "sm_90": decode_wide.H200,
}


def _defines(choice: Mapping[str, int | str]) -> Defines:
    plan = _narrow(MACHINES[str(choice["machine"])], int(choice["HEAD_DIM"]))
    return {"HALF": choice["HALF"], **plan.defines()}


INSTANCES = Instances(
    FILE,
    tuple(MACHINES),
    {"HALF": (0, 1), "HEAD_DIM": LIMITS.head_dims, "machine": tuple(MACHINES)},
    defines=_defines,
    exists=lambda choice: choice["machine"] == choice["architecture"],
    spill_bytes=lambda choice: 64 if choice["HEAD_DIM"] == 256 else 16,
)
