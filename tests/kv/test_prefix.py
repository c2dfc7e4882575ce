"""Digests name contents; the index finds the block that holds them."""

from __future__ import annotations

from hashlib import sha256
from struct import pack

from ridgeline.kv.prefix import PrefixIndex, chained, root


def test_a_digest_is_sha256_of_the_one_before_and_the_ids() -> None:
    start = sha256(b"salt").digest()
    assert root("salt") == start
    assert chained(start, [1, 2**31]) == sha256(start + pack("<II", 1, 2**31)).digest()


def test_equal_blocks_after_different_ones_differ() -> None:
    start = root("")
    assert chained(chained(start, [1]), [3]) != chained(chained(start, [2]), [3])
    assert chained(start, [1]) != chained(root("other"), [1])


def test_the_first_of_equal_blocks_stays() -> None:
    index = PrefixIndex()
    assert index.add(b"a", 7)
    assert not index.add(b"a", 8)
    assert not index.add(b"b", 7)
    assert index.find(b"a") == 7
    assert index.find(b"b") is None
    assert 7 in index
    assert 8 not in index
    index.remove(7)
    assert index.find(b"a") is None
    assert len(index) == 0
    index.check()
