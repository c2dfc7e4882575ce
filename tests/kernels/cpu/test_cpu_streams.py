"""Advice on where streamed bytes lie: what follows what and how much stays in the cache. No result depends on it."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from cpu_checks import DTYPES, kernel, name_of, random_weight

from ridgeline.kernels.cpu.code.streams import BURST_BYTES, FETCH_BYTES, find, follow, look_ahead
from ridgeline.kernels.cpu.pack import pack
from ridgeline.kernels.cpu.pool import POOL
from ridgeline.kernels.cpu.state import AHEAD, CACHE, PROBES, SPANS, STREAM, STREAMS_COUNT, UNIT_BYTES

UNIT = 1 << 12
"""Bytes of a unit of the streams here."""


class State:
    """A pool's state without a pool."""

    def __init__(self, cache_units: int) -> None:
        self.words = np.zeros(SPANS // 8, dtype=np.int64)
        self.address = self.words.ctypes.data
        self.words[CACHE // 8] = cache_units * UNIT

    def follow(self, stream: int, units: int = 10, beside: int = 0) -> int:
        return int(follow(self.address, stream, UNIT, beside, units))

    def ahead(self) -> int:
        """The stream that is expected next, 0 if none is."""
        entry = int(self.words[AHEAD // 8])
        return 0 if entry == 0 else int(self.words[(entry - self.address + STREAM) // 8])


STREAMS = [(number + 1) << 21 for number in range(6)]


def test_a_cycle_is_learned_in_one_turn() -> None:
    state = State(cache_units=1000)
    for stream in STREAMS:
        state.follow(stream)
        assert state.ahead() == 0
    for _ in range(3):
        for stream, following in zip(STREAMS, STREAMS[1:] + STREAMS[:1], strict=True):
            state.follow(stream)
            assert state.ahead() == following
    state.follow(STREAMS[3])
    state.follow(STREAMS[0])
    state.follow(STREAMS[3])
    assert state.ahead() == STREAMS[0], "the last turn counts"


@pytest.mark.parametrize(("cache_units", "kept"), [(1000, 10), (60, 10), (59, 9), (30, 5), (5, 0)])
def test_the_share_that_fits_is_kept(cache_units: int, kept: int) -> None:
    """Six streams of ten units: sixty units pass before one comes round again."""
    state = State(cache_units)
    for stream in STREAMS:
        assert state.follow(stream) == 10, "nobody knows yet"
    for _ in range(2):
        for stream in STREAMS:
            assert state.follow(stream) == kept


def test_both_parts_of_a_stream_count() -> None:
    state = State(cache_units=20)
    state.follow(STREAMS[0], beside=1 << 20)
    assert state.follow(STREAMS[0], beside=1 << 20) == 10
    state.follow(STREAMS[1])
    assert state.follow(STREAMS[0], beside=1 << 20) == 10 * 20 // 30


def test_the_table_overflows_quietly() -> None:
    """More streams than there is room for: old ones are forgotten, new ones are found."""
    state = State(cache_units=1)
    for number in range(3 * STREAMS_COUNT):
        stream = (number + 1) << 12
        state.follow(stream, units=1)
        entry = int(find(state.address, stream))
        assert state.words[(entry - state.address + STREAM) // 8] == stream
        assert state.words[(entry - state.address + UNIT_BYTES) // 8] == UNIT
    assert PROBES > 1


def test_nothing_is_fetched_beyond_a_span() -> None:
    """Three workers and ten units: the second has units 3, 4 and 5. Fetching itself cannot be seen, nor can it fail."""
    state = State(cache_units=1000)
    state.follow(STREAMS[0])
    entry, at, steps = int(find(state.address, STREAMS[0])), 0, 0
    while at < FETCH_BYTES:
        at, steps = int(look_ahead(entry, 1, 3, at)), steps + 1
    assert steps == 3 * UNIT // BURST_BYTES + 1
    assert look_ahead(entry, 3, 3, 0) == FETCH_BYTES, "a helper beyond the call's workers has no span"
    assert look_ahead(entry, 1, 0, 0) == FETCH_BYTES, "no call has been shared yet"


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.usefixtures("threads")
def test_results_do_not_depend_on_what_is_kept(dtype: torch.dtype) -> None:
    torch.set_num_threads(2)
    weights = [pack(random_weight(700, 530, dtype)) for _ in range(3)]
    gated = pack(random_weight(2 * 200, 530, dtype))
    x = torch.randn(2, 530).to(dtype)

    def run(rows: int) -> list[torch.Tensor]:
        return [kernel("linear")(x[:rows], weight) for weight in weights] + [kernel("gated_linear")(x[:rows], gated)]

    POOL.helpers()
    kernel("linear")(x, weights[0])
    place = (POOL.state - POOL._memory.data_ptr() + CACHE) // 8 * 8
    cache = POOL._memory[place : place + 8].view(torch.int64)
    before = int(cache)
    try:
        for rows in (1, 2):
            cache.fill_(1 << 62)
            whole = run(rows) + run(rows)
            for size in (0, 100 << 10, 1 << 20):
                cache.fill_(size)
                for _ in range(2):
                    assert all(torch.equal(a, b) for a, b in zip(run(rows), whole[:4], strict=True)), size
    finally:
        cache.fill_(before)


def test_weights_may_go_while_they_are_expected() -> None:
    """Fetching from memory that has been given back does nothing."""
    script = """
import torch
from ridgeline.kernels.cpu.linear import linear_cpu
from ridgeline.kernels.cpu.pack import pack
from ridgeline.ops import Weight
torch.set_num_threads(2)
x = torch.randn(1, 1024)
for turn in range(3):
    weights = [pack(Weight.dense_from(torch.ones(4096, 1024))) for _ in range(4)]
    for weight in weights * 3:
        linear_cpu(x, weight)
    linear_cpu(x, weights[0])
    kept = weights[0]
    del weights, weight
    for _ in range(50):
        linear_cpu(x, kept)
        torch.ones(10).sum()
print("fine")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "fine\n", done.stderr


def test_more_threads_than_processors() -> None:
    """Spans of many workers, most of whom come late or never: every unit is done once, by whoever is there."""
    script = """
import torch
torch.set_num_threads(7)
from ridgeline.kernels.cpu.linear import linear_cpu
from ridgeline.kernels.cpu.norm import norm_cpu
from ridgeline.kernels.cpu.pack import pack
from ridgeline.kernels.cpu.pool import POOL
from ridgeline.ops import Weight
weights = [pack(Weight.dense_from(torch.randn(outputs, 300))) for outputs in (65, 200, 700, 2000)]
x, rows, scale = torch.randn(3, 300), torch.randn(400, 300), torch.randn(300)
torch.set_num_threads(1)
expected = [linear_cpu(x, weight) for weight in weights]
normalized = norm_cpu(rows, None, scale, 1e-5)[0]
torch.set_num_threads(7)
for _ in range(100):
    for weight, result in zip(weights, expected):
        assert torch.equal(linear_cpu(x, weight), result)
    assert torch.equal(norm_cpu(rows, None, scale, 1e-5)[0], normalized)
assert POOL.helpers() == 6
print("fine")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "fine\n", done.stderr
