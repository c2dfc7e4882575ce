"""The pool's state: raw memory that its threads share.

Knows offsets in bytes. Every word that more than one thread writes has 128 bytes for itself.
"""

from __future__ import annotations

import os
import sys

TURN, SLEEPERS, STOP, SPINS, CALL, BUSY, SLEEP = (128 * line for line in range(7))
WAKE, ALLOWED, AHEAD, HISTORY, STREAMS = (128 * line for line in range(7, 12))
"""TURN: the state of the published call, see below.
SLEEPERS: helpers that wait on the condition variable WAKE (with the mutex SLEEP).
STOP: not 0 sends every helper home.
SPINS: how often a helper looks for work before it sleeps.
CALL: the published call, see below.
BUSY: the mutex of calls; one runs at a time.
ALLOWED: a mask of the processors that this process may use.
AHEAD: the entry of STREAMS that will probably come next, 0 if nobody knows.
HISTORY: what has been streamed, see below.
STREAMS: a table of what calls read from memory, see below. Behind it lie SPANS, a line for each worker."""

ACTIVE, OPEN, NUMBER = 0, 16, 32
"""First bits of TURN's parts. ACTIVE: helpers inside the call; the caller leaves once this is 0 after closing.
OPEN: helpers that may take part; 0 closes the call. NUMBER: of the call, so that a helper joins each one once."""

KERNEL, ARGUMENTS, WORKERS, CALLER, SCRATCH = (CALL + 8 * word for word in range(5))
"""The kernel's address, its arguments' address, how many workers (helpers and the caller) have a span, and the
processor that the caller runs on: a helper woken there, where Linux likes to put it, would wait for its turn, so it
moves away. SCRATCH, set once: the address of the workers' scratch memory."""

SPAN = 128
"""Bytes of a worker's line in SPANS: the units of its span that nobody has taken, first << 32 | last, the last one
excluded."""

REQUEST = 8
"""Words of a request before a kernel's own arguments: state, kernel, units, helpers, STREAM, UNIT_BYTES, BESIDE
and, written by the pool, how many of the units should stay in the cache."""

LAST, PASSED, CACHE = (HISTORY + 8 * word for word in range(3))
"""The entry of STREAMS that came last, the bytes of all streams so far and, set once, the bytes of cache that they
may fill."""

STREAM, UNIT_BYTES, BESIDE, COUNT = (8 * word for word in range(4))
SUCCESSOR, SEEN = 64, 72
"""An entry of STREAMS: what a call reads from memory, once. Unit u reads UNIT_BYTES at the address STREAM + u *
UNIT_BYTES, and as many BESIDE bytes further on if that is not 0; COUNT units. SUCCESSOR: the entry of the
stream that came after it the last time; SEEN: how many bytes had PASSED when it began, -1 if it never did."""

STREAM_ENTRY = 128
STREAMS_COUNT = 4096
PROBES = 8
"""Bytes of an entry, how many there are (a power of two), and how many places are looked at for one."""

SPANS = STREAMS + STREAM_ENTRY * STREAMS_COUNT


def size_bytes(workers: int) -> int:
    """Bytes of the state of a pool with so many workers."""
    return SPANS + SPAN * workers


PROCESSORS = 8 * 128
"""Bits of ALLOWED."""

POSIX = os.name == "posix"
"""Whether there are helpers; elsewhere callers work alone, one at a time by the interpreter's lock."""

MOVES = sys.platform == "linux"
"""Whether threads can be told where to run."""
