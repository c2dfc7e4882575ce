"""Block tables: sharing, copying before writes, publishing, giving up."""

from __future__ import annotations

import pytest

from ridgeline.kv import KVCache

TOKENS = list(range(100, 120))


def made(blocks: int = 8, caching: bool = True) -> KVCache:
    return KVCache(block_size=4, num_blocks=blocks, enable_prefix_caching=caching)


def written(cache: KVCache, name: str, tokens: list[int]) -> list[int]:
    """A request whose tokens are all computed and published; returns its table."""
    start = cache.attach(name, tokens)
    assert start is not None
    assert cache.reserve(name, start, len(tokens)) == ()
    cache.publish(name, tokens, len(tokens))
    cache.check()
    return list(cache.table(name))


def test_the_longest_chain_of_full_blocks_is_found() -> None:
    cache = made()
    blocks = written(cache, "a", TOKENS[:11])
    assert cache.attach("b", [*TOKENS[:9], 1, 2, 3, 4]) == 8
    assert cache.table("b") == blocks[:2]
    assert (cache.queried_tokens, cache.hit_tokens) == (11 + 13, 8)
    cache.check()


def test_at_least_one_token_is_left_to_compute() -> None:
    cache = made()
    written(cache, "a", TOKENS[:8])
    assert cache.attach("b", TOKENS[:8]) == 4


def test_at_most_as_many_tokens_as_asked_for_are_found() -> None:
    cache = made()
    written(cache, "a", TOKENS[:12])
    assert cache.attach("b", TOKENS[:12], most_tokens=0) == 0
    assert cache.attach("c", TOKENS[:12], most_tokens=7) == 4
    assert cache.attach("d", TOKENS[:12], most_tokens=99) == 8


def test_salts_do_not_mix_and_without_caching_nothing_is_found() -> None:
    cache = made()
    written(cache, "a", TOKENS[:8])
    assert cache.attach("b", TOKENS[:9], salt="other") == 0
    plain = made(caching=False)
    written(plain, "a", TOKENS[:8])
    plain.free("a")
    assert plain.attach("b", TOKENS[:9]) == 0
    assert plain.queried_tokens == 0
    assert plain.idle_blocks == 0


def test_outputs_are_found_as_well_as_prompts() -> None:
    cache = made()
    written(cache, "a", TOKENS[:3])
    cache.reserve("a", 3, 9)
    cache.publish("a", TOKENS[:10], 9)
    assert cache.attach("b", TOKENS[:12]) == 8


def test_attach_refuses_what_will_not_fit_and_changes_nothing() -> None:
    cache = made(blocks=4)
    written(cache, "a", TOKENS[:8])
    cache.free("a")
    assert cache.attach("b", TOKENS[:20]) is None
    assert cache.attach("b", TOKENS[:16], spare_blocks=1) is None
    assert cache.free_blocks == 4
    assert cache.queried_tokens == 8
    assert cache.attach("b", TOKENS[:16]) == 8
    cache.check()


def test_reserving_is_all_or_nothing() -> None:
    cache = made(blocks=3)
    cache.attach("a", TOKENS[:5])
    assert cache.reserve("a", 0, 13) is None
    assert cache.reserve("a", 0, 12, spare_blocks=1) is None
    assert cache.table("a") == []
    assert cache.reserve("a", 0, 12) == ()
    assert len(cache.table("a")) == 3
    cache.check()


def test_a_shared_partial_block_is_copied_by_whoever_writes_first() -> None:
    cache = made(caching=False)
    table = written(cache, "a", TOKENS[:6])
    cache.fork("a", "b", 6)
    assert cache.table("b") == table
    handed_out = cache.table("b")
    copies = cache.reserve("b", 5, 6)
    assert copies == ((table[1], cache.table("b")[1]),)
    assert handed_out == table, "a table that was handed out is never changed within"
    assert cache.reserve("b", 5, 6) == ()
    cache.check()
    cache.copied(copies)
    assert cache.reserve("a", 6, 7) == ()
    cache.check()


def test_the_source_of_a_copy_is_held_until_it_is_made() -> None:
    cache = made(blocks=3, caching=False)
    table = written(cache, "a", TOKENS[:6])
    cache.fork("a", "b", 6)
    copies = cache.reserve("b", 5, 6)
    cache.free("a")
    assert cache.free_blocks == 0
    assert copies is not None
    cache.copied(copies)
    assert cache.free_blocks == 1
    assert table[1] not in cache.table("b")
    cache.check()


def test_a_block_that_is_written_from_its_start_needs_no_copy() -> None:
    cache = made(caching=False)
    written(cache, "a", TOKENS[:12])
    cache.fork("a", "b", 12)
    assert cache.reserve("b", 4, 12) == ()
    assert cache.table("b")[0] == cache.table("a")[0]
    assert not set(cache.table("b")[1:]) & set(cache.table("a"))
    cache.check()


def test_copy_on_write_without_a_free_block_changes_nothing() -> None:
    cache = made(blocks=2, caching=False)
    written(cache, "a", TOKENS[:6])
    cache.fork("a", "b", 6)
    assert cache.reserve("b", 5, 6) is None
    assert cache.table("b") == cache.table("a")
    cache.check()


def test_a_published_block_of_ones_own_is_withdrawn_before_a_write_and_can_be_published_again() -> None:
    cache = made()
    written(cache, "a", TOKENS[:8])
    assert cache.reserve("a", 7, 8) == ()
    assert cache.attach("b", TOKENS[:9]) == 4
    cache.publish("a", TOKENS[:8], 8)
    assert cache.attach("c", TOKENS[:9]) == 8
    cache.check()


def test_of_equal_blocks_the_first_stays_published() -> None:
    cache = made()
    first = written(cache, "a", TOKENS[:8])
    cache.attach("b", TOKENS[:8], most_tokens=0)
    cache.reserve("b", 0, 8)
    cache.publish("b", TOKENS[:8], 8)
    cache.attach("c", TOKENS[:9])
    assert cache.table("c") == first
    cache.free("b")
    assert cache.idle_blocks == 0
    cache.check()


def test_tails_are_evicted_before_heads() -> None:
    cache = made(blocks=4)
    written(cache, "a", TOKENS[:16])
    cache.free("a")
    assert cache.free_blocks == cache.idle_blocks == 4
    cache.attach("b", [1])
    cache.reserve("b", 0, 8)
    assert cache.evictions == 2
    assert cache.attach("c", TOKENS[:16]) is None
    assert cache.attach("d", TOKENS[:9]) is None
    cache.free("b")
    assert cache.attach("d", TOKENS[:9]) == 8
    cache.check()


def test_vacating_keeps_the_way_back_and_freeing_does_not() -> None:
    cache = made()
    written(cache, "a", TOKENS[:8])
    cache.vacate("a")
    assert not cache.holds("a")
    assert cache.attach("a", TOKENS[:9]) == 8
    cache.free("a")
    cache.free("a")
    with pytest.raises(KeyError):
        cache.table("a")
    assert cache.free_blocks == 8
    cache.check()


def test_retracting_takes_back_what_was_published_beyond_a_token() -> None:
    cache = made()
    written(cache, "a", TOKENS[:16])
    cache.attach("b", TOKENS[:13])
    cache.retract("a", 9)
    cache.free("a")
    cache.free("b")
    assert cache.attach("c", TOKENS[:20]) == 12, "b held the third block as well; the fourth was a's alone"
    cache.check()


def test_attaching_or_forking_onto_blocks_is_refused() -> None:
    cache = made()
    written(cache, "a", TOKENS[:8])
    written(cache, "b", TOKENS[:8])
    with pytest.raises(ValueError, match="already holds"):
        cache.attach("a", TOKENS[:8])
    with pytest.raises(ValueError, match="already holds"):
        cache.fork("a", "b", 8)
