"""The tensors of the KV pool: shapes, bytes, zeros."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from ridgeline.kv import KVLayout
from ridgeline.kv.pages import Pages

LAYOUT = KVLayout(layers=3, kv_heads=2, head_dim=8, element_bytes=2, block_size=16)


def test_one_tensor_of_keys_and_one_of_values_a_layer() -> None:
    pages = Pages(LAYOUT, 5, "cpu", torch.bfloat16)
    assert len(pages.keys) == len(pages.values) == 3
    for tensor in (*pages.keys, *pages.values):
        assert tensor.shape == (5, 2, 16, 8)
        assert tensor.is_contiguous()
        assert not tensor.any()
    assert pages.nbytes == sum(tensor.nbytes for tensor in (*pages.keys, *pages.values))


def test_meta_pages_take_no_memory() -> None:
    assert Pages(LAYOUT, 1 << 30, "meta", torch.float16).keys[0].is_meta


def test_dtype_and_layout_must_agree() -> None:
    with pytest.raises(ValueError, match="4 bytes"):
        Pages(LAYOUT, 1, "cpu", torch.float32)


def test_kv_and_schedule_do_not_import_torch() -> None:
    code = "import ridgeline.kv, ridgeline.schedule, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
