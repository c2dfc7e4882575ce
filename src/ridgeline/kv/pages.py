"""The tensors that hold keys and values: allocated once, at one address for life.

Knows torch and a KVLayout; the only file of kv/ that does. Must not know requests, or which block is whose.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from ridgeline.core.errors import DoesNotFit
from ridgeline.kv.layout import KVLayout


class Pages:
    """Per layer one tensor of keys and one of values, each [blocks, kv_heads, block_size, head_dim].

    Addresses never change, so that captured graphs and tensor maps may hold them. Filled with zeros: a
    padded lane that reads a slot nobody has written must meet a number, never a NaN.

    Raises DoesNotFit if the device has not the memory, ValueError if `dtype` and the layout disagree.
    """

    def __init__(self, layout: KVLayout, blocks: int, device: torch.device | str, dtype: torch.dtype) -> None:
        if dtype.itemsize != layout.element_bytes:
            raise ValueError(f"{dtype} takes {dtype.itemsize} bytes, the layout says {layout.element_bytes}")
        self.layout = layout
        self.blocks = blocks
        shape = (blocks, layout.kv_heads, layout.block_size, layout.head_dim)
        try:
            self.keys = [_zeros(shape, dtype, torch.device(device)) for _ in range(layout.layers)]
            self.values = [_zeros(shape, dtype, torch.device(device)) for _ in range(layout.layers)]
        except (RuntimeError, MemoryError) as error:
            if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and "allocate" not in str(error):
                raise
            raise DoesNotFit(
                f"the KV pool of {blocks} blocks needs {self.nbytes:,} bytes, which {device} has not free: "
                "lower the memory share, max_model_len or the number of blocks"
            ) from error

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values."""
        return self.blocks * self.layout.bytes_per_block


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros. On a CPU they come from the system's untouched pages, so that a large pool costs no start-up time."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    raw = np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)
    return torch.from_numpy(raw).view(dtype).view(shape)
