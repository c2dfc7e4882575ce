"""The machine's limit, measured: plausible, faster near the caches, and quick."""

from __future__ import annotations

import time

import pytest
import torch

from ridgeline.perf import limit
from ridgeline.perf.limit import measure_limit


def test_a_measured_limit_is_plausible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limit, "buffer_bytes", lambda device: 64 << 20)
    found = measure_limit(torch.device("cpu"), 1 << 20, torch.float32)
    assert found.working_set_bytes == 1 << 20
    assert 1e8 < found.dram_bytes_per_s <= found.read_bytes_per_s < 1e14
    assert 1e8 < found.flops_per_s < 1e16


def test_beyond_the_caches_there_is_one_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limit, "buffer_bytes", lambda device: 1 << 20)
    found = measure_limit(torch.device("cpu"), 2 << 20, torch.bfloat16)
    assert found.read_bytes_per_s == found.dram_bytes_per_s


@pytest.mark.parametrize("size", [0, 1, 100, 5000])
def test_tiny_working_sets(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limit, "buffer_bytes", lambda device: 1 << 20)
    assert measure_limit(torch.device("cpu"), size, torch.float32).read_bytes_per_s > 0


def test_the_buffer_lies_beyond_the_caches() -> None:
    size = limit.buffer_bytes(torch.device("cpu"))
    assert 64 << 20 <= size <= 512 << 20
    assert size >= min(limit.CACHES_BEYOND * limit.largest_cache_bytes(), 512 << 20)


def test_no_work_outlasts_its_budget() -> None:
    calls = []

    def slow() -> None:
        calls.append(1)
        time.sleep(0.03)

    limit._best_seconds(slow, torch.device("cpu"), 1)
    assert len(calls) <= 5  # a warm-up, and what fits into 80 ms
