"""The pool's state: raw memory that its threads share.

Knows offsets in bytes. Every word that more than one thread writes has 128 bytes for itself.
"""

from __future__ import annotations

import os
import sys

OPEN, NEXT, ACTIVE, SLEEPERS, STOP, SPINS, CALL = (128 * line for line in range(7))
BUSY, SLEEP, WAKE, CALLER, ALLOWED, SIZE = (128 * line for line in range(7, 13))
"""OPEN: helpers that may take part in the published call; 0 closes it.
NEXT: the first unit that nobody has taken.
ACTIVE: helpers inside the call; the caller leaves once this is 0 after closing.
SLEEPERS: helpers that wait on the condition variable WAKE (with the mutex SLEEP).
STOP: not 0 sends every helper home.
SPINS: how often a helper looks for work before it sleeps.
CALL: the published call, see below.
BUSY: the mutex of calls; one runs at a time.
CALLER: the processor that the caller runs on, and ALLOWED, a mask of those that this process may use: a
    helper woken on the caller's processor, where Linux likes to put it, would wait there for its turn, so
    it moves away."""

KERNEL, ARGUMENTS, UNITS, GRAIN, SCRATCH = (CALL + 8 * word for word in range(5))
"""The kernel's address, its arguments' address, how many units there are and how many a worker takes at
once; and, set once, the address of the workers' scratch memory."""

REQUEST = 5
"""Words of a request before a kernel's own arguments: state, kernel, units, grain, helpers."""

PROCESSORS = 8 * 128
"""Bits of ALLOWED."""

POSIX = os.name == "posix"
"""Whether there are helpers; elsewhere callers work alone, one at a time by the interpreter's lock."""

MOVES = sys.platform == "linux"
"""Whether threads can be told where to run."""
