"""Whose blocks are whose: a table of blocks a request, shared where contents are equal, copied before writes.

Knows request ids, token ids and block numbers. Must not know tensors (the copies that it asks for are made by
the executor), nor who runs when: it says whether blocks are there, and the scheduler decides what to do.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from ridgeline.kv.pool import BlockPool
from ridgeline.kv.prefix import PrefixIndex, chained, root

Copies = tuple[tuple[int, int], ...]
"""(from, to) block numbers, to be copied whole before the step writes."""

NO_COPIES: Copies = ()


class _Holding:
    """What one request holds.

    blocks: its table; entry i serves tokens [i * block_size, (i + 1) * block_size). The list only ever
        grows at its end; when an earlier entry must change, the whole list is replaced, so whoever was
        handed it (a plan on its way) keeps what it was handed.
    digests: of its full blocks, as far as they were needed yet; token ids never change, so these stay
        valid when the blocks are given up.
    published: how many leading blocks need no publishing (again).
    """

    __slots__ = ("blocks", "digests", "published", "root")

    def __init__(self, start: bytes) -> None:
        self.blocks: list[int] = []
        self.digests: list[bytes] = []
        self.published = 0
        self.root = start

    def digest(self, number: int, tokens: Sequence[int], size: int) -> bytes:
        """Digest of block `number`; those before it are made on the way."""
        digests = self.digests
        for at in range(len(digests), number + 1):
            before = digests[-1] if digests else self.root
            digests.append(chained(before, tokens[at * size : (at + 1) * size]))
        return digests[number]


class KVCache:
    """Block tables, prefix cache and copy-on-write over one pool of blocks.

    Invariants (see `check`):
        every block is exactly one of blank, idle (free, content kept) or held;
        a block's references are the tables that contain it, and the copies under way that read it;
        a published block is never written: `reserve` copies it, or withdraws it from the index, first;
        a digest is published only for tokens whose keys and values have been written.

    block_size: tokens a block. num_blocks: blocks of the pool.
    enable_prefix_caching: False publishes nothing and finds nothing; `fork` still shares.
    """

    def __init__(self, *, block_size: int, num_blocks: int, enable_prefix_caching: bool = True) -> None:
        self.block_size = block_size
        self.num_blocks = num_blocks
        self.enable_prefix_caching = enable_prefix_caching
        self.queried_tokens = 0
        self.hit_tokens = 0
        self.evictions = 0
        self._index = PrefixIndex()
        self._pool = BlockPool(num_blocks, self._evicted)
        self._holdings: dict[str, _Holding] = {}
        self._copying: Counter[int] = Counter()

    @property
    def free_blocks(self) -> int:
        """Blocks that can be had: blank ones, and idle ones at the price of their content."""
        return self._pool.free_count

    @property
    def idle_blocks(self) -> int:
        """Free blocks whose content is kept for whoever asks for it again."""
        return self._pool.idle_count

    def blocks_for(self, tokens: int) -> int:
        """Blocks that hold `tokens` tokens."""
        return -(-tokens // self.block_size)

    def table(self, request_id: str) -> list[int]:
        """The live block table. It may grow at its end; entries that were there stay as they are."""
        return self._holdings[request_id].blocks

    def holds(self, request_id: str) -> bool:
        """Whether the request has any block."""
        holding = self._holdings.get(request_id)
        return holding is not None and bool(holding.blocks)

    def attach(
        self,
        request_id: str,
        tokens: Sequence[int],
        salt: str = "",
        most_tokens: int | None = None,
        spare_blocks: int = 0,
    ) -> int | None:
        """Begin a request that holds nothing: give it the longest cached chain of full blocks of its tokens.

        Never all tokens: at least one is left to be computed, or there would be no logits to sample from.

        most_tokens: use at most this many cached tokens (0 to have all computed).
        spare_blocks: blocks that must stay free once all of `tokens` has blocks.
        Returns the number of tokens found, or None, with nothing taken, if blocks for all of `tokens` and
        the spare ones are not there. (They are looked for, not set aside: `reserve` takes them.)
        """
        size = self.block_size
        holding = self._holdings.get(request_id)
        if holding is None:
            holding = self._holdings[request_id] = _Holding(root(salt))
        if holding.blocks:
            raise ValueError(f"request {request_id} already holds blocks")
        most = len(tokens) - 1 if most_tokens is None else min(most_tokens, len(tokens) - 1)
        found = self._match(holding, tokens, most // size)
        references = self._pool.references
        idle = sum(references[block] == 0 for block in found)
        if self._pool.free_count - idle - (self.blocks_for(len(tokens)) - len(found)) < spare_blocks:
            return None
        for block in found:
            self._pool.share(block)
        holding.blocks = found
        holding.published = len(found)
        if self.enable_prefix_caching:
            self.queried_tokens += len(tokens)
            self.hit_tokens += len(found) * size
        return len(found) * size

    def _match(self, holding: _Holding, tokens: Sequence[int], most_blocks: int) -> list[int]:
        found: list[int] = []
        if not self.enable_prefix_caching:
            return found
        for number in range(most_blocks):
            block = self._index.find(holding.digest(number, tokens, self.block_size))
            if block is None:
                break
            found.append(block)
        return found

    def reserve(self, request_id: str, start: int, end: int, spare_blocks: int = 0) -> Copies | None:
        """Make the slots of tokens [start, end) exist and be the request's own, all or nothing.

        Copy-on-write: a block in that range that others hold too is replaced by a fresh one. Only the first
        can need its content copied (its slots before `start`); the slots after are written before they are
        read. A block that only this request holds, but that is published, is withdrawn from the index.

        spare_blocks: blocks that must stay free.
        Returns the copies to make before the step writes (their sources stay held until `copied` is
        called), or None, with nothing changed, if the pool has not enough blocks.
        """
        size = self.block_size
        holding = self._holdings[request_id]
        blocks = holding.blocks
        first = start // size
        if first < len(blocks) and end <= (first + 1) * size:
            block = blocks[first]
            if self._pool.references[block] == 1 and not self._pool.kept[block]:
                return NO_COPIES
        return self._reserve(holding, start, end, spare_blocks)

    def _reserve(self, holding: _Holding, start: int, end: int, spare_blocks: int) -> Copies | None:
        pool, blocks = self._pool, holding.blocks
        first, stop = start // self.block_size, self.blocks_for(end)
        present = range(first, min(stop, len(blocks)))
        shared = [at for at in present if self._tables_with(blocks[at]) > 1]
        missing = max(0, stop - len(blocks))
        if pool.free_count - missing - len(shared) < spare_blocks:
            return None
        for at in present:
            if pool.kept[blocks[at]] and self._tables_with(blocks[at]) == 1:
                self._withdraw(blocks[at])
        if len(present):
            holding.published = min(holding.published, first)
        fresh = pool.take(missing + len(shared))
        assert fresh is not None
        copies = NO_COPIES
        if shared:
            copies = self._replace(holding, shared, fresh[missing:], start)
        holding.blocks.extend(fresh[:missing])
        return copies

    def _replace(self, holding: _Holding, numbers: list[int], fresh: list[int], start: int) -> Copies:
        """Put fresh blocks at the given places of a table. The old block of a copy stays held for it."""
        copies = []
        blocks = holding.blocks.copy()
        for at, block in zip(numbers, fresh):
            old, blocks[at] = blocks[at], block
            if at * self.block_size < start:
                copies.append((old, block))
                self._copying[old] += 1
            else:
                self._pool.release(old)
        holding.blocks = blocks
        return tuple(copies)

    def copied(self, copies: Iterable[tuple[int, int]]) -> None:
        """These copies are made, or will not be: their sources need not be held any longer."""
        for source, _ in copies:
            self._copying[source] -= 1
            if not self._copying[source]:
                del self._copying[source]
            self._pool.release(source)

    def fork(self, parent_id: str, child_id: str, tokens: int) -> None:
        """Let a child that holds nothing share the parent's blocks of the first `tokens` tokens.

        A last, partly filled block is shared as well; the first of the two to write it gets a copy.
        """
        parent = self._holdings[parent_id]
        if self.holds(child_id):
            raise ValueError(f"request {child_id} already holds blocks")
        child = self._holdings[child_id] = _Holding(parent.root)
        child.blocks = parent.blocks[: self.blocks_for(tokens)]
        child.digests = parent.digests[: tokens // self.block_size]
        child.published = min(parent.published, tokens // self.block_size)
        for block in child.blocks:
            self._pool.share(block)

    def publish(self, request_id: str, tokens: Sequence[int], computed: int) -> None:
        """Let others find the full blocks of the first `computed` tokens, whose KV is written.

        If an equal digest is published already, the first stays and this block is not.
        """
        if not self.enable_prefix_caching:
            return
        holding = self._holdings[request_id]
        full = computed // self.block_size
        for number in range(holding.published, full):
            block = holding.blocks[number]
            if self._index.add(holding.digest(number, tokens, self.block_size), block):
                self._pool.keep(block)
        holding.published = max(holding.published, full)

    def retract(self, request_id: str, tokens: int) -> None:
        """Take back what this request published beyond its first `tokens` tokens, unless others hold it."""
        holding = self._holdings[request_id]
        for block in holding.blocks[tokens // self.block_size : holding.published]:
            if self._pool.kept[block] and self._tables_with(block) == 1:
                self._withdraw(block)
        holding.published = min(holding.published, tokens // self.block_size)

    def vacate(self, request_id: str) -> None:
        """Give up all blocks of a request that will come back: its digests are remembered."""
        holding = self._holdings.get(request_id)
        if holding is None:
            return
        blocks, holding.blocks, holding.published = holding.blocks, [], 0
        for block in reversed(blocks):  # tails are released, and so evicted, before heads
            self._pool.release(block)

    def free(self, request_id: str) -> None:
        """Give up all blocks of a request for good. Published ones stay until the room is needed."""
        self.vacate(request_id)
        self._holdings.pop(request_id, None)

    def _tables_with(self, block: int) -> int:
        """Requests that hold a block. Copies under way do not count: a step copies before it writes."""
        return self._pool.references[block] - self._copying.get(block, 0)

    def _withdraw(self, block: int) -> None:
        self._index.remove(block)
        self._pool.drop(block)

    def _evicted(self, block: int) -> None:
        self._index.remove(block)
        self.evictions += 1

    def check(self) -> None:
        """Raise AssertionError if an invariant of this class does not hold. O(blocks), for tests."""
        self._pool.check()
        self._index.check()
        holders = Counter(self._copying)
        for request_id, holding in self._holdings.items():
            assert len(set(holding.blocks)) == len(holding.blocks), f"{request_id} has a block twice"
            holders.update(holding.blocks)
        for block in range(self.num_blocks):
            assert self._pool.references[block] == holders[block], f"block {block}: references are wrong"
            assert bool(self._pool.kept[block]) == (block in self._index), f"block {block}: index is wrong"
