"""`kv_compact` in one launch for all layers: a program for each pages tensor and row of entries.

Knows slots. It must not know trees. The entries of a row are copied one after the other, because a slot may be read by
one and written by a later one; rows have nothing to do with each other. Where the pages lie is a table on the device,
made once: a captured graph finds the addresses there.
"""

from collections.abc import Sequence
from functools import cache

import torch
import triton
import triton.language as tl

from ridgeline.core.errors import KernelRefused
from ridgeline.kernels.triton.dependent import dependent, ready, starting
from ridgeline.ops.kv_move import kv_compact
from ridgeline.ops.op import cuda

MOST_ELEMENTS = 1 << 14
"""Of a slot of one tensor, padded to powers of two: a program holds one."""


@triton.jit(do_not_specialize=["count", "block"], do_not_specialize_on_alignment=["addresses", "source", "target"])
def _slots_kernel(
    like: tl.tensor,
    addresses: tl.tensor,
    source: tl.tensor,
    target: tl.tensor,
    count: tl.tensor,
    block: tl.tensor,
    block_stride: tl.tensor,
    head_stride: tl.tensor,
    slot_stride: tl.tensor,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    starting(EARLY)
    ready(EARLY)
    page = tl.load(addresses + tl.program_id(0)).to(like.dtype)
    entries = tl.program_id(1) * count
    head, lane = tl.arange(0, BLOCK_H)[:, None], tl.arange(0, BLOCK_D)[None, :]
    within = head * head_stride + lane
    inside = (head < HEADS) & (lane < WIDTH)
    index = tl.arange(0, BLOCK_N)
    end = 0  # behind the last real entry
    for base in range(0, count, BLOCK_N):
        real = tl.load(source + entries + base + index, mask=base + index < count, other=-1) >= 0
        end = tl.maximum(end, tl.max(tl.where(real, base + index + 1, 0), axis=0))
    for entry in range(end):
        old, new = tl.load(source + entries + entry), tl.load(target + entries + entry)
        if old >= 0:
            value = tl.load(page + old // block * block_stride + old % block * slot_stride + within, mask=inside)
            tl.store(page + new // block * block_stride + new % block * slot_stride + within, value, mask=inside)
            tl.debug_barrier()  # before a later entry writes what this one read


def _accepts(pages: Sequence[torch.Tensor], source: torch.Tensor, target: torch.Tensor) -> str | None:
    if len({(page.shape[1:], page.stride(), page.dtype) for page in pages}) > 1:
        return "takes pages of one shape"
    if not pages:
        return None
    _, heads, _, width = pages[0].shape
    if triton.next_power_of_2(heads) * triton.next_power_of_2(width) > MOST_ELEMENTS:
        return f"takes up to {MOST_ELEMENTS} numbers a slot, not {heads} x {width}"
    return "takes neighbouring numbers in a slot's heads" if pages[0].stride(3) != 1 else None


@cache
def _addresses(device: torch.device, places: tuple[int, ...]) -> torch.Tensor:
    """A table is never forgotten: captured graphs read it."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise KernelRefused("kv_compact must have run once with these pages before it is captured in a CUDA graph")
    return torch.tensor(places, dtype=torch.int64, device=device)


@kv_compact.kernel("triton", needs=cuda(80), accepts=_accepts, invariant=True)
def kv_compact_triton(pages: Sequence[torch.Tensor], source: torch.Tensor, target: torch.Tensor) -> None:
    """Before it is captured it must have run once with the same pages, which leaves their table of addresses."""
    if not pages or not source.numel():
        return
    source, target = source.contiguous(), target.contiguous()
    count = source.shape[-1]
    first = pages[0]
    _, heads, block, width = first.shape
    addresses = _addresses(first.device, tuple(page.data_ptr() for page in pages))
    size = triton.next_power_of_2(heads) * triton.next_power_of_2(width)
    _slots_kernel[(len(pages), source.numel() // count)](
        first,
        addresses,
        source,
        target,
        count,
        block,
        *first.stride()[:3],
        HEADS=heads,
        WIDTH=width,
        BLOCK_H=triton.next_power_of_2(heads),
        BLOCK_D=triton.next_power_of_2(width),
        BLOCK_N=256,
        num_warps=min(8, max(1, size // 512)),
        **dependent(first.device),
    )
