"""`kv_move` and `kv_compact` on the CPU: whole blocks, or single slots, copied in every pages tensor.

Knows blocks. A unit of work is one block, or all slots, of one tensor.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ridgeline.kernels.cpu.native import Kernel
from ridgeline.kernels.cpu.pool import POOL
from ridgeline.ops.kv_move import kv_compact, kv_move
from ridgeline.ops.op import cpu

move_blocks = Kernel("kv_move", "move_blocks")
move_slots = Kernel("kv_move", "move_slots")


def accepts(pages: Sequence[torch.Tensor], source: torch.Tensor, target: torch.Tensor) -> str | None:
    if not all(page.is_contiguous() for page in pages):
        return "takes contiguous pages"
    if len({(page.shape[1:], page.dtype) for page in pages}) > 1:
        return "takes pages of one shape"
    return None


@kv_move.kernel("cpu", needs=cpu(), accepts=accepts, invariant=True)
def kv_move_cpu(pages: Sequence[torch.Tensor], source: torch.Tensor, target: torch.Tensor) -> None:
    count = source.shape[0]
    if not pages or not count:
        return
    source, target = source.long().contiguous(), target.long().contiguous()
    addresses = torch.tensor([page.data_ptr() for page in pages])
    size_bytes = pages[0].stride(0) * pages[0].element_size()
    POOL.share(
        move_blocks, len(pages) * count, addresses.data_ptr(), source.data_ptr(), target.data_ptr(), count, size_bytes
    )


@kv_compact.kernel("cpu", needs=cpu(), accepts=accepts, invariant=True)
def kv_compact_cpu(pages: Sequence[torch.Tensor], source: torch.Tensor, target: torch.Tensor) -> None:
    if source.dim() > 1:
        real = source >= 0
        source, target = source[real], target[real]
    count = source.shape[0]
    if not pages or not count:
        return
    source, target = source.long().contiguous(), target.long().contiguous()
    addresses = torch.tensor([page.data_ptr() for page in pages])
    _, heads, block, width = pages[0].shape
    POOL.small(
        move_slots, len(pages), addresses.data_ptr(), source.data_ptr(), target.data_ptr(), count, heads, block,
        width * pages[0].element_size(),
    )  # fmt: skip
