"""Reference counts and the order in which free blocks are given out."""

from __future__ import annotations

import pytest

from ridgeline.kv.pool import BlockPool


def test_taking_is_all_or_nothing() -> None:
    pool = BlockPool(3)
    assert pool.take(2) is not None
    assert pool.take(2) is None
    assert pool.free_count == 1
    assert pool.take(0) == []
    pool.check()


def test_a_block_is_free_after_its_last_release() -> None:
    pool = BlockPool(1)
    (block,) = pool.take(1) or []
    pool.share(block)
    pool.release(block)
    assert pool.free_count == 0
    pool.release(block)
    assert pool.free_count == 1
    with pytest.raises(ValueError, match="more often"):
        pool.release(block)
    with pytest.raises(ValueError, match="blank"):
        pool.share(block)


def test_blank_blocks_go_first_then_the_least_recently_used() -> None:
    evicted: list[int] = []
    pool = BlockPool(4, evicted.append)
    blocks = pool.take(4) or []
    for block in blocks[:3]:
        pool.keep(block)
    for block in (blocks[2], blocks[3], blocks[0], blocks[1]):
        pool.release(block)
    assert pool.free_count == 4
    assert pool.idle_count == 3
    assert pool.take(1) == [blocks[3]]
    assert evicted == []
    assert pool.take(2) == [blocks[2], blocks[0]]
    assert evicted == [blocks[2], blocks[0]]
    pool.check()


def test_sharing_an_idle_block_saves_it() -> None:
    pool = BlockPool(2)
    first, second = pool.take(2) or []
    pool.keep(first)
    pool.release(first)
    pool.share(first)
    pool.release(second)
    assert pool.take(2) is None
    assert pool.kept[first]
    pool.check()


def test_dropped_content_makes_a_block_blank() -> None:
    evicted: list[int] = []
    pool = BlockPool(1, evicted.append)
    (block,) = pool.take(1) or []
    pool.keep(block)
    pool.release(block)
    pool.drop(block)
    assert pool.take(1) == [block]
    assert evicted == []
    pool.check()


def test_free_content_cannot_be_vouched_for() -> None:
    with pytest.raises(ValueError, match="free"):
        BlockPool(1).keep(0)
