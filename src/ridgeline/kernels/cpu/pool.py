"""Threads that share the units of one kernel call, and the fork and join around them.

Knows units, workers and waiting. It must not know any op.

A call publishes (kernel, units, arguments). Each worker, the caller being one, has a span of units that follow
each other, because their memory does too and the hardware reads ahead; a worker that is done takes the last unit
of the longest span left. Which worker computes a unit never changes its result. Helpers spin for a moment after
each call, because in decode the next one follows within microseconds, and then sleep on a condition variable, so
that an idle engine costs nothing. While they spin they fetch what the next product will read (code/streams.py). One
call runs at a time: a mutex makes calls from several Python threads wait for each other (the numba layers would
abort the process instead).
"""

from __future__ import annotations

import atexit
import ctypes
import os
import struct
import threading
import time
from functools import lru_cache

import torch

from ridgeline.core.machine import largest_cache_bytes
from ridgeline.kernels.cpu.blocks import SCRATCH_BYTES
from ridgeline.kernels.cpu.native import Caller, Kernel
from ridgeline.kernels.cpu.state import ALLOWED, CACHE, MOVES, POSIX, PROCESSORS, SCRATCH, SPINS, size_bytes

SPIN_S = 200e-6
"""How long a helper looks for more work before it sleeps: longer than the gaps between a decode step's ops."""

CACHE_SHARE = 0.5
"""Part of the largest cache that streams may fill; the rest is for all that is not a stream."""

call, help_out, prepare, finish, spin = (
    Kernel("threads", name) for name in ("call", "help_out", "prepare", "finish", "spin")
)


def _invoke(kernel: Kernel, *words: int) -> None:
    """Call compiled code directly, without the interpreter's lock."""
    ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 4)(kernel.ready())(*words, *(0,) * (4 - len(words)))


class Pool:
    """The workers of this process, started when they are first needed.

    Threads: as many as torch.get_num_threads() says at each call, so OMP_NUM_THREADS and
    torch.set_num_threads are respected.
    """

    def __init__(self) -> None:
        self._starting = threading.Lock()
        self._reset()
        atexit.register(self._stop)
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._reset)

    def _reset(self) -> None:
        """A pool without threads; also after a fork, which copies memory but no threads."""
        self._threads: list[threading.Thread] = []
        self._starting = threading.Lock()
        self.state = 0
        self.workers = max(os.cpu_count() or 1, torch.get_num_threads()) if POSIX else 1

    def _start(self) -> None:
        """Lay out the state and load what calls need."""
        with self._starting:
            if self.state:
                return
            # Zeros are not torch's: after a fork its threads are gone, and large fills would wait for them. Nor is
            # scratch memory a bytearray: it should not be touched before it is used.
            size = size_bytes(self.workers)
            self._memory = torch.frombuffer(bytearray(size + 128), dtype=torch.uint8)
            self._scratch = torch.empty(self.workers * SCRATCH_BYTES + 128, dtype=torch.uint8)
            state = -(-self._memory.data_ptr() // 128) * 128
            _invoke(prepare, state)
            words = self._memory[state - self._memory.data_ptr() :][:size].view(torch.int64)
            words[SPINS // 8] = int(SPIN_S / _pause_s())
            self.scratch = -(-self._scratch.data_ptr() // 128) * 128
            words[SCRATCH // 8] = self.scratch
            # Where the caches' size is unknown, everything may stay.
            words[CACHE // 8] = int(CACHE_SHARE * largest_cache_bytes()) or 1 << 62
            if MOVES:
                for number in os.sched_getaffinity(0):
                    if number < PROCESSORS:
                        # A word is signed: its last bit counts negative.
                        words[ALLOWED // 8 + number // 64] |= (1 << number % 64) - (1 << 64) * (number % 64 == 63)
            self._call = call.ready()
            self._short, self._long = Caller(gil=True), Caller(gil=not POSIX)
            self._run_short, self._run_long = self._short.call, self._long.call
            self.state = state

    def helpers(self) -> int:
        """Threads that may help the caller now; starts those that are missing."""
        count = min(torch.get_num_threads(), self.workers) - 1
        if count > len(self._threads):
            self._grow(count)
        return count

    def _grow(self, count: int) -> None:
        if not self.state:
            self._start()
        help_out.ready()
        with self._starting:
            while len(self._threads) < count:
                words = (help_out, self.state, len(self._threads))
                thread = threading.Thread(target=_invoke, args=words, name="ridgeline-cpu", daemon=True)
                self._threads.append(thread)
                thread.start()

    def _stop(self) -> None:
        """At exit, before machine code is freed under the helpers."""
        if self._threads:
            _invoke(finish, self.state)
            for thread in self._threads:
                thread.join(1.0)

    def small(self, kernel: Kernel, units: int, *arguments: int) -> None:
        """Run all units in this thread, keeping the interpreter's lock: for work of microseconds."""
        if not self.state:
            self._start()
        self._run_short(self._call, self.state, kernel.address or kernel.ready(), units, 0, 0, 0, 0, 0, *arguments)

    def share(self, kernel: Kernel, units: int, *arguments: int) -> None:
        """Run the units in this thread and its helpers, without the interpreter's lock."""
        helpers = self.helpers()
        if not self.state:
            self._start()
        self._run_long(self._call, self.state, kernel.address or kernel.ready(), units, helpers, 0, 0, 0, 0, *arguments)

    def stream(self, kernel: Kernel, units: int, address: int, unit_bytes: int, beside: int, *arguments: int) -> None:
        """As `share`, for units that stream memory, so that idle helpers may fetch what comes next.

        Unit u reads unit_bytes at address + u * unit_bytes and, if `beside` is not 0, as many at `beside`
        bytes further on.
        """
        helpers = self.helpers()
        if not self.state:
            self._start()
        self._run_long(
            self._call, self.state, kernel.address or kernel.ready(), units, helpers, address, unit_bytes, beside,
            0, *arguments,
        )  # fmt: skip


def _pause_s() -> float:
    """Seconds of one turn of a spin loop."""
    _invoke(spin, 1)
    begin = time.perf_counter()
    _invoke(spin, 10_000)
    return (time.perf_counter() - begin) / 10_000


POOL = Pool()


@lru_cache(maxsize=64)
def float_bits(value: float) -> int:
    """An fp32 number as an argument of a kernel, whose arguments are integers."""
    return int(struct.unpack("<i", struct.pack("<f", value))[0])
