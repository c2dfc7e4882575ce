"""Bytes and blocks of a layout, and which block sizes there are."""

from __future__ import annotations

import pytest

from ridgeline.core.errors import InvalidArgument
from ridgeline.kv import KVLayout


def test_bytes_are_keys_and_values_of_all_layers() -> None:
    layout = KVLayout(layers=28, kv_heads=8, head_dim=128, element_bytes=2)
    assert layout.bytes_per_token == 2 * 28 * 8 * 128 * 2
    assert layout.bytes_per_block == 64 * layout.bytes_per_token


@pytest.mark.parametrize(("tokens", "blocks"), [(0, 0), (1, 1), (64, 1), (65, 2), (128, 2)])
def test_blocks_for_tokens(tokens: int, blocks: int) -> None:
    assert KVLayout(1, 1, 8, 2).blocks_for(tokens) == blocks


def test_blocks_within_memory_are_whole() -> None:
    layout = KVLayout(2, 2, 8, 2, block_size=16)
    assert layout.blocks_within(10 * layout.bytes_per_block - 1) == 9
    assert layout.blocks_within(-1) == 0


@pytest.mark.parametrize("size", [16, 32, 48, 256])
def test_multiples_of_sixteen_are_taken(size: int) -> None:
    assert KVLayout(1, 1, 8, 2, size).block_size == size


@pytest.mark.parametrize("size", [0, 8, 17, 272, -16])
def test_other_block_sizes_are_refused_by_name(size: int) -> None:
    with pytest.raises(InvalidArgument) as refused:
        KVLayout(1, 1, 8, 2, size)
    assert refused.value.parameter == "block_size"
    assert str(size) in str(refused.value)


def test_a_shape_without_heads_is_refused_by_name() -> None:
    with pytest.raises(InvalidArgument) as refused:
        KVLayout(1, 0, 8, 2)
    assert refused.value.parameter == "kv_heads"
