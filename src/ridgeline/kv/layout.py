"""How many bytes keys and values take: the only place that knows.

Knows the shape of one token's keys and values and the size of a block. Must not know how many blocks there
are, where they live, or who holds them.
"""

from __future__ import annotations

from dataclasses import dataclass

from ridgeline.core.errors import InvalidArgument

SMALLEST_BLOCK = 16
LARGEST_BLOCK = 256
BLOCK_STEP = 16


@dataclass(frozen=True, slots=True)
class KVLayout:
    """Keys and values of one model: per layer, K and V are each [blocks, kv_heads, block_size, head_dim].

    element_bytes: bytes of one number. block_size: tokens a block, a multiple of 16 from 16 to 256.

    Raises InvalidArgument naming the field that is out of range.
    """

    layers: int
    kv_heads: int
    head_dim: int
    element_bytes: int
    block_size: int = 64

    def __post_init__(self) -> None:
        for name in ("layers", "kv_heads", "head_dim", "element_bytes"):
            if getattr(self, name) < 1:
                raise InvalidArgument(name, f"must be at least 1, not {getattr(self, name)}")
        size = self.block_size
        if not SMALLEST_BLOCK <= size <= LARGEST_BLOCK or size % BLOCK_STEP:
            raise InvalidArgument(
                "block_size",
                f"must be a multiple of {BLOCK_STEP} from {SMALLEST_BLOCK} to {LARGEST_BLOCK}, not {size}",
            )

    @property
    def bytes_per_token(self) -> int:
        """Keys and values of one token over all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * self.element_bytes

    @property
    def bytes_per_block(self) -> int:
        return self.bytes_per_token * self.block_size

    def blocks_for(self, tokens: int) -> int:
        """Blocks that hold `tokens` tokens: the last one may be partly empty."""
        return -(-tokens // self.block_size)

    def blocks_within(self, memory_bytes: int) -> int:
        """Whole blocks that fit into `memory_bytes`."""
        return max(0, memory_bytes // self.bytes_per_block)
