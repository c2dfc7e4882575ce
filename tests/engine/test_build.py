"""What "auto" becomes, and how memory is counted before the first request."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from ridgeline.core.config import EngineConfig, MemoryLedger
from ridgeline.core.errors import DoesNotFit, InvalidArgument
from ridgeline.engine import build as building
from ridgeline.engine.build import build, choose_kernels
from ridgeline.engine.memory import LiveBytes, cpu_memory_bytes, ledger_rows, size
from ridgeline.ops import sample

BLOCK = 2 * 2 * 2 * 16 * 64 * 4
"""Bytes of 64 tokens: K and V, 2 layers, 2 KV heads of 16, fp32."""


def config(tiny: Path, **settings: object) -> EngineConfig:
    return EngineConfig.from_mapping({"model": str(tiny), "kernels": "reference", **settings})


def with_memory(monkeypatch: pytest.MonkeyPatch, total: int, available: int) -> None:
    monkeypatch.setattr(building, "device_memory_bytes", lambda device: (total, available))


def test_auto_takes_fp32_on_a_cpu_if_it_is_small_beside_the_free_memory(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert build(config(tiny)).config.dtype == "float32"
    changed = {**json.loads((tiny / "config.json").read_text()), "torch_dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps(changed))
    assert choose_kernels(config(tmp_path / "config.json", load_format="dummy")).rows
    with_memory(monkeypatch, 1 << 30, 1 << 20)
    resolved = building._resolve(config(tmp_path / "config.json"), building.parse_config(changed))
    assert resolved.dtype == "bfloat16"
    assert "quarter" in resolved.reasons["dtype"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_sizes_follow_the_dtype(tiny: Path, dtype: str) -> None:
    built = build(config(tiny, dtype=dtype))
    itemsize = getattr(torch, dtype).itemsize
    assert built.ledger.bytes_per_token == 2 * 2 * 2 * 16 * itemsize
    assert built.runner.pages.keys[0].dtype is getattr(torch, dtype)
    assert built.ledger.weight_bytes == sum(
        place.numel() * itemsize for place in built.runner.model.store.places.values()
    )


def test_budgets_by_default(tiny: Path) -> None:
    assert build(config(tiny)).config.max_num_batched_tokens == 512
    assert build(config(tiny, max_num_seqs=700)).config.max_num_batched_tokens == 700
    whole = build(config(tiny, enable_chunked_prefill=False, max_num_seqs=8)).config
    assert whole.max_num_batched_tokens >= whole.max_model_len


def test_the_pool_is_no_larger_than_all_seats_need(tiny: Path) -> None:
    built = build(config(tiny, max_num_seqs=3))
    assert built.config.num_blocks == 3 * 256 // 64
    assert built.config.reasons["num_blocks"] == f"what {size(12 * BLOCK)} hold"


def test_kv_cache_memory_bytes_is_what_it_takes(tiny: Path) -> None:
    built = build(config(tiny, kv_cache_memory_bytes=10 * BLOCK + 5))
    assert built.config.num_blocks == 10
    assert built.ledger.kv_bytes == 10 * BLOCK
    assert built.ledger.fits(65) == 5


def test_a_machine_with_little_memory(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One full request is the least; other figures add up whatever is free."""
    weights = build(config(tiny)).ledger.weight_bytes
    activations = build(config(tiny)).ledger.activation_bytes
    with_memory(monkeypatch, 100 << 20, activations + 4 * BLOCK)
    ledger = build(config(tiny)).ledger
    assert ledger.kv_bytes == 4 * BLOCK
    assert ledger.free_bytes == 0
    assert ledger.rest_bytes == (100 << 20) - activations - 4 * BLOCK - weights
    with_memory(monkeypatch, 100 << 20, activations + 4 * BLOCK - 1)
    with pytest.raises(DoesNotFit, match="lower max_model_len or max_num_batched_tokens"):
        build(config(tiny))
    with pytest.raises(DoesNotFit, match="has room for"):
        build(config(tiny, kv_cache_memory_bytes=4 * BLOCK))
    assert build(config(tiny, max_model_len=64)).config.num_blocks >= 1


def test_larger_steps_need_more(tiny: Path) -> None:
    def activations(**settings: object) -> int:
        return build(config(tiny, **settings)).ledger.activation_bytes

    base = {"max_num_batched_tokens": 64, "max_num_seqs": 8}
    assert activations(**base) < activations(**{**base, "max_num_batched_tokens": 256})
    assert activations(**base) < activations(**{**base, "max_num_seqs": 64})


def test_live_bytes_follow_outputs_to_their_end() -> None:
    live = LiveBytes()
    first, second = torch.empty(10, 8, device="meta"), torch.empty(4, dtype=torch.int64, device="meta")
    live.after(sample, (), {}, first)
    live.after(sample, (), {}, (second, None))
    assert live.live_bytes == live.peak_bytes == 320 + 32
    del first
    assert live.live_bytes == 32
    del second
    assert (live.live_bytes, live.peak_bytes) == (0, 352)


def test_an_unknown_policy_is_refused_before_anything_is_loaded(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building, "_load", None)
    with pytest.raises(InvalidArgument) as caught:
        build(config(tiny, scheduling_policy="lifo"))
    assert caught.value.parameter == "scheduling_policy"


def test_progress_counts_every_tensor(tiny: Path) -> None:
    seen: list[tuple[int, int]] = []
    built = build(config(tiny), lambda done, total: seen.append((done, total)))
    total = len(built.runner.model.store.places)
    assert seen == [(number, total) for number in range(1, total + 1)]


def test_what_fits() -> None:
    ledger = MemoryLedger(
        total_bytes=1000, usable_bytes=900, weight_bytes=100, kv_bytes=400, activation_bytes=50, rest_bytes=50,
        kv_tokens=160, bytes_per_token=2, block_size=16,
    )  # fmt: skip
    assert [ledger.fits(tokens) for tokens in (1, 16, 17, 80, 81, 160, 161)] == [10, 10, 5, 2, 1, 1, 0]
    assert ledger.free_bytes == 300


def test_the_ledger_as_a_table(tiny: Path) -> None:
    built = build(config(tiny))
    rows = ledger_rows(built.ledger, built.config)
    assert [what for what, _, _ in rows] == ["device", "usable", "weights", "KV cache", "activations", "rest", "free"]
    assert rows[1][1] == sum(amount for _, amount, _ in rows[2:])


def test_memory_of_this_machine() -> None:
    total, available = cpu_memory_bytes()
    assert 0 < available <= total
    assert [size(number) for number in (0, 999, 1500, 2_500_000, 3_210_000_000)] == [
        "0 B", "999 B", "2 kB", "2 MB", "3.2 GB"
    ]  # fmt: skip
