"""What streams through the caches: which stream follows which, which of them come round while still cached.

Knows the table of streams that kernels/cpu/state.py lays out. It must not know products, nor threads. All
of it is advice on where bytes lie: no result depends on it, and fetching an address that is no longer
mapped does nothing.
"""

from __future__ import annotations

from ridgeline.kernels.cpu.code.part import njit
from ridgeline.kernels.cpu.code.vector import fetch_once, load_i64, store_i64
from ridgeline.kernels.cpu.state import (
    AHEAD,
    BESIDE,
    CACHE,
    COUNT,
    LAST,
    PASSED,
    PROBES,
    SEEN,
    STREAM,
    STREAM_ENTRY,
    STREAMS,
    STREAMS_COUNT,
    SUCCESSOR,
    UNIT_BYTES,
)

FETCH_BYTES = 1 << 20
"""How far a worker fetches ahead: a second-level cache full, more than is read in the longest gap of a decode step."""

BURST_BYTES = 1 << 10
"""What is fetched between two looks at the state: about as much as memory brings meanwhile. The processor drops
fetches when more than that are waiting."""


@njit
def find(state, stream):  # type: ignore[no-untyped-def]
    """The entry of a stream, a new one if it has none."""
    home = (stream >> 12) * 0x9E3779B1 >> 8
    for probe in range(PROBES):
        entry = state + STREAMS + STREAM_ENTRY * ((home + probe) & (STREAMS_COUNT - 1))
        there = load_i64(entry + STREAM)
        if there == stream:
            return entry
        if there == 0:
            break
    else:
        entry = state + STREAMS + STREAM_ENTRY * (home & (STREAMS_COUNT - 1))
    store_i64(entry + STREAM, stream)
    store_i64(entry + SUCCESSOR, 0)
    store_i64(entry + SEEN, -1)
    return entry


@njit
def change(address, word):  # type: ignore[no-untyped-def]
    """Store a word that seldom changes: other threads read its line."""
    if load_i64(address) != word:
        store_i64(address, word)


@njit
def follow(state, stream, unit_bytes, beside, units):  # type: ignore[no-untyped-def]
    """Note that a stream begins. Returns how many of its units should stay in the cache.

    Bytes that have passed since it was last read would all have to stay if any is to be found again; if they
    do not fit, the share that fits stays, the same units each time.
    """
    entry = find(state, stream)
    change(entry + UNIT_BYTES, unit_bytes)
    change(entry + BESIDE, beside)
    change(entry + COUNT, units)
    last = load_i64(state + LAST)
    if last != 0:
        store_i64(last + SUCCESSOR, entry)
    store_i64(state + LAST, entry)
    store_i64(state + AHEAD, load_i64(entry + SUCCESSOR))
    passed, seen = load_i64(state + PASSED), load_i64(entry + SEEN)
    store_i64(entry + SEEN, passed)
    store_i64(state + PASSED, passed + units * unit_bytes * (1 + (beside != 0)))
    cache = load_i64(state + CACHE)
    if seen < 0 or passed - seen <= cache:
        return units
    return units * cache // (passed - seen)


@njit
def look_ahead(entry, worker, workers, at):  # type: ignore[no-untyped-def]
    """Fetch a burst of what this worker would read of a stream, from `at` bytes on; returns how far it has come."""
    if worker >= workers:
        return FETCH_BYTES
    stream, unit_bytes = load_i64(entry + STREAM), load_i64(entry + UNIT_BYTES)
    beside, units = load_i64(entry + BESIDE), load_i64(entry + COUNT)
    parts = 1 + (beside != 0)
    unit = units * worker // workers + at // (parts * unit_bytes)
    if unit >= units * (worker + 1) // workers:
        return FETCH_BYTES
    place = at % (parts * unit_bytes)
    source = stream + unit * unit_bytes + place
    if place >= unit_bytes:
        source += beside - unit_bytes
    for line in range(0, BURST_BYTES, 64):
        fetch_once(source + line)
    return at + BURST_BYTES
