"""Names for contents: a block's digest says every token up to its end, so equal digests mean equal KV.

Knows token ids, digests and block numbers. Must not know requests, references or what is free.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256
from struct import Struct

_packers: dict[int, Struct] = {}


def root(salt: str) -> bytes:
    """What a chain starts from. Requests of different salts never share a block."""
    return sha256(salt.encode()).digest()


def chained(before: bytes, tokens: Sequence[int]) -> bytes:
    """Digest of a block: sha256(digest of the block before + this block's ids as 32-bit integers).

    The chain is why a block can be found by its own digest alone: the ids of all earlier blocks are in it.
    sha256, because a collision would hand one user another's context (vLLM's default for this reason).
    """
    packer = _packers.get(len(tokens))
    if packer is None:
        packer = _packers[len(tokens)] = Struct(f"<{len(tokens)}I")
    return sha256(before + packer.pack(*tokens)).digest()


class PrefixIndex:
    """Digest -> block, one to one, for full blocks of committed tokens."""

    def __init__(self) -> None:
        self._blocks: dict[bytes, int] = {}
        self._digests: dict[int, bytes] = {}

    def __len__(self) -> int:
        return len(self._blocks)

    def __contains__(self, block: int) -> bool:
        return block in self._digests

    def find(self, digest: bytes) -> int | None:
        return self._blocks.get(digest)

    def add(self, digest: bytes, block: int) -> bool:
        """Publish a block. False, and nothing changes, if an equal digest or this block is there already."""
        if digest in self._blocks or block in self._digests:
            return False
        self._blocks[digest] = block
        self._digests[block] = digest
        return True

    def remove(self, block: int) -> None:
        """Forget a published block. Raises KeyError if it is not published."""
        del self._blocks[self._digests.pop(block)]

    def check(self) -> None:
        """Raise AssertionError unless both directions agree. For tests."""
        assert self._digests == {block: digest for digest, block in self._blocks.items()}
        assert len(self._digests) == len(self._blocks)
