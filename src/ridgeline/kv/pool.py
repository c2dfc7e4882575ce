"""Which blocks are free, and how many hold each of the others.

Knows block numbers and counts. Must not know tokens, digests or requests: whether a block's content is worth
keeping is told by `keep` and `drop`, and that it is lost is told back through `evicted`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable


def _unheard(block: int) -> None:
    """Nobody wants to know."""


class BlockPool:
    """Blocks 0 … blocks-1, counted. Every method is O(1) a block.

    Invariant: a block is exactly one of
        blank    references 0, not kept: free, its content means nothing;
        idle     references 0, kept: free, but its content may be asked for again;
        held     references >= 1, kept or not.
    Blank blocks are taken first; then idle ones, the least recently used first.
    """

    def __init__(self, blocks: int, evicted: Callable[[int], None] = _unheard) -> None:
        self.blocks = blocks
        self.references = [0] * blocks
        self.kept = bytearray(blocks)
        self._evicted = evicted
        self._blank = list(range(blocks - 1, -1, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()

    @property
    def free_count(self) -> int:
        """Blocks that `take` can give: blank and idle ones."""
        return len(self._blank) + len(self._idle)

    @property
    def idle_count(self) -> int:
        """Free blocks whose content is kept."""
        return len(self._idle)

    def take(self, count: int) -> list[int] | None:
        """`count` blocks, one reference each; None, and nothing taken, if fewer are free.

        Idle blocks that must give way lose their content: `evicted` is called with each.
        """
        if count > self.free_count:
            return None
        taken = []
        for _ in range(count):
            block = self._blank.pop() if self._blank else self._evict()
            self.references[block] = 1
            taken.append(block)
        return taken

    def _evict(self) -> int:
        block, _ = self._idle.popitem(last=False)
        self.kept[block] = 0
        self._evicted(block)
        return block

    def share(self, block: int) -> None:
        """One more reference to a held or idle block. Raises ValueError for a blank one."""
        if self.references[block] == 0:
            if not self.kept[block]:
                raise ValueError(f"block {block} is blank: there is nothing to share")
            del self._idle[block]
        self.references[block] += 1

    def release(self, block: int) -> None:
        """One reference less; the last one frees the block. Raises ValueError if there is none."""
        left = self.references[block] - 1
        if left < 0:
            raise ValueError(f"block {block} is released more often than it was taken")
        self.references[block] = left
        if left == 0:
            if self.kept[block]:
                self._idle[block] = None
            else:
                self._blank.append(block)

    def keep(self, block: int) -> None:
        """The content of a held block is worth keeping after its last release."""
        if self.references[block] == 0:
            raise ValueError(f"block {block} is free: its content cannot be vouched for")
        self.kept[block] = 1

    def drop(self, block: int) -> None:
        """The content of a block is not worth keeping (any more)."""
        if self.kept[block] and self.references[block] == 0:
            del self._idle[block]
            self._blank.append(block)
        self.kept[block] = 0

    def check(self) -> None:
        """Raise AssertionError if the invariant of this class does not hold. O(blocks), for tests."""
        blank, idle = set(self._blank), set(self._idle)
        assert len(blank) == len(self._blank), "a block is blank twice"
        for block in range(self.blocks):
            free = self.references[block] == 0
            kept = bool(self.kept[block])
            assert self.references[block] >= 0, f"block {block} has negative references"
            assert (block in blank) == (free and not kept), f"block {block} is wrongly (not) blank"
            assert (block in idle) == (free and kept), f"block {block} is wrongly (not) idle"
