"""The pool's compiled part: publishing a call, taking its units, waiting, sleeping.

Knows the state that kernels/cpu/state.py lays out, atomic words and POSIX threads. It must not know what a
kernel does.
"""

from __future__ import annotations

import platform
from typing import Any

from llvmlite import ir
from numba.core import types

from ridgeline.kernels.cpu.blocks import SCRATCH_BYTES
from ridgeline.kernels.cpu.code.part import njit
from ridgeline.kernels.cpu.code.streams import FETCH_BYTES, follow, look_ahead
from ridgeline.kernels.cpu.code.vector import (
    I8,
    I32,
    I64,
    argument,
    emitted,
    invoke,
    load_i64,
    pointer,
    store_i64,
)
from ridgeline.kernels.cpu.state import (
    ACTIVE,
    AHEAD,
    ALLOWED,
    ARGUMENTS,
    BUSY,
    CALLER,
    KERNEL,
    MOVES,
    NUMBER,
    OPEN,
    POSIX,
    PROCESSORS,
    REQUEST,
    SCRATCH,
    SLEEP,
    SLEEPERS,
    SPAN,
    SPANS,
    SPINS,
    STOP,
    TURN,
    WAKE,
    WORKERS,
)

# A state word as other threads see it.


@emitted(types.int64, types.int64)
def peek(b: Any, address: Any) -> Any:
    return b.load_atomic(pointer(b, address, I64), "seq_cst", 8)


@emitted(types.void, types.int64, types.int64)
def post(b: Any, address: Any, value: Any) -> None:
    b.store_atomic(value, pointer(b, address, I64), "seq_cst", 8)


@emitted(types.int64, types.int64, types.int64)
def take(b: Any, address: Any, count: Any) -> Any:
    """Add `count`; returns the word as it was."""
    return b.atomic_rmw("add", pointer(b, address, I64), count, "seq_cst")


@emitted(types.boolean, types.int64, types.int64, types.int64)
def swap(b: Any, address: Any, old: Any, new: Any) -> Any:
    """Make the word `new` if it is `old`; whether it was."""
    return b.extract_value(b.cmpxchg(pointer(b, address, I64), old, new, "seq_cst", "seq_cst"), 1)


@emitted(types.void)
def pause(b: Any) -> None:
    """Tell the core that this is a spin loop."""
    machine = platform.machine().lower()
    if machine in ("x86_64", "amd64"):
        invoke(b, "llvm.x86.sse2.pause", ir.VoidType())
    elif machine in ("aarch64", "arm64"):
        invoke(b, "llvm.aarch64.hint", ir.VoidType(), ir.Constant(I32, 1))


@emitted(types.void, types.int64, types.int64, types.int64, types.int64, types.int64)
def enter(b: Any, kernel: Any, arguments: Any, scratch: Any, first: Any, last: Any) -> None:
    """Call the kernel at an address for units first .. last - 1."""
    kind = ir.FunctionType(ir.VoidType(), [I64] * 4)
    b.call(b.inttoptr(kernel, kind.as_pointer()), [arguments, scratch, first, last])


def _pthread(name: str, count: int) -> Any:
    """A POSIX thread function of one or two pointers; nothing where there are none (and no helpers)."""

    def emit(b: Any, *addresses: Any) -> None:
        if POSIX:
            invoke(b, name, I32, *(b.inttoptr(address, I8.as_pointer()) for address in addresses))

    emit.__name__ = name
    return emitted(types.void, *[types.int64] * count)(emit)


lock = _pthread("pthread_mutex_lock", 1)
unlock = _pthread("pthread_mutex_unlock", 1)
broadcast = _pthread("pthread_cond_broadcast", 1)
wait = _pthread("pthread_cond_wait", 2)
mutex_init = _pthread("pthread_mutex_init", 2)
condition_init = _pthread("pthread_cond_init", 2)


@emitted(types.void)
def give_way(b: Any) -> None:
    if POSIX:
        invoke(b, "sched_yield", I32)


@emitted(types.int64)
def processor(b: Any) -> Any:
    """The processor that this thread runs on."""
    return b.sext(invoke(b, "sched_getcpu", I32), I64) if MOVES else ir.Constant(I64, -1)


@emitted(types.void, types.int64)
def move(b: Any, mask: Any) -> None:
    """Restrict this thread to a mask of processors."""
    if MOVES:
        size = ir.Constant(I64, PROCESSORS // 8)
        invoke(b, "sched_setaffinity", I32, ir.Constant(I32, 0), size, b.inttoptr(mask, I8.as_pointer()))


@njit
def step_aside(state: int, worker: int) -> None:
    """Leave the caller's processor if there is another."""
    here = processor()
    if here < 0 or here >= PROCESSORS or here != load_i64(state + CALLER):
        return
    mask = load_i64(state + SCRATCH) + worker * SCRATCH_BYTES
    left = 0
    for word in range(PROCESSORS // 64):
        bits = load_i64(state + ALLOWED + 8 * word)
        if here >> 6 == word:
            bits &= ~(1 << (here & 63))
        store_i64(mask + 8 * word, bits)
        left |= bits
    if left != 0:
        move(mask)


@njit
def left(span: int) -> int:
    """Units of a span's word."""
    return (span & 0xFFFFFFFF) - (span >> 32)


@njit
def work(state: int, worker: int) -> None:
    kernel, arguments, workers = load_i64(state + KERNEL), load_i64(state + ARGUMENTS), load_i64(state + WORKERS)
    scratch = load_i64(state + SCRATCH) + worker * SCRATCH_BYTES
    own = state + SPANS + SPAN * worker
    span = peek(own)
    while left(span) > 0:
        if swap(own, span, span + (1 << 32)):
            enter(kernel, arguments, scratch, span >> 32, (span >> 32) + 1)
        span = peek(own)
    while True:
        place, longest = own, 0
        for other in range(workers):
            there = peek(state + SPANS + SPAN * other)
            if left(there) > left(longest):
                place, longest = state + SPANS + SPAN * other, there
        if longest == 0:
            return
        if swap(place, longest, longest - 1):
            last = longest & 0xFFFFFFFF
            enter(kernel, arguments, scratch, last - 1, last)


@njit
def opened(turn: int) -> int:
    """How many helpers may take part in a call."""
    return turn >> OPEN & 0xFFFF


@njit
def wanted(turn: int, index: int, joined: int) -> bool:
    """Whether helper `index`, who has joined the call of that number, may join this one."""
    return opened(turn) > index and turn >> NUMBER != joined


def help_out(state: int, index: int, _first: int, _last: int) -> None:
    """A helper's life: join calls, fetch what comes next, spin, sleep, until STOP is set."""
    spins, joined, expected, fetched = 0, 0, 0, 0
    while peek(state + STOP) == 0:
        turn = peek(state + TURN)
        if wanted(turn, index, joined):
            if swap(state + TURN, turn, turn + (1 << ACTIVE)):
                joined = turn >> NUMBER
                work(state, index + 1)
                take(state + TURN, -(1 << ACTIVE))
                spins, expected = 0, 0
            continue
        following = peek(state + AHEAD)
        if following != expected:
            expected, fetched = following, 0
        if expected != 0 and fetched < FETCH_BYTES:
            fetched = look_ahead(expected, index + 1, load_i64(state + WORKERS), fetched)
        pause()
        spins += 1
        if spins > peek(state + SPINS):
            lock(state + SLEEP)
            take(state + SLEEPERS, 1)
            while peek(state + STOP) == 0 and not wanted(peek(state + TURN), index, joined):
                wait(state + WAKE, state + SLEEP)
            take(state + SLEEPERS, -1)
            unlock(state + SLEEP)
            spins = 0
        if spins & 63 == 0:
            step_aside(state, index + 1)


@njit
def share(state: int, kernel: int, units: int, helpers: int, arguments: int) -> None:
    """Publish a call, take part in it, and wait until it is done."""
    workers = helpers + 1
    # Plain stores, which may be under way together; publishing waits for them.
    store_i64(state + KERNEL, kernel)
    store_i64(state + ARGUMENTS, arguments)
    store_i64(state + WORKERS, workers)
    store_i64(state + CALLER, processor())
    for worker in range(workers):
        first, last = units * worker // workers, units * (worker + 1) // workers
        store_i64(state + SPANS + SPAN * worker, first << 32 | last)
    closed = ((peek(state + TURN) >> NUMBER) + 1) << NUMBER
    post(state + TURN, closed | helpers << OPEN)
    if peek(state + SLEEPERS) > 0:
        lock(state + SLEEP)
        broadcast(state + WAKE)
        unlock(state + SLEEP)
    work(state, 0)
    take(state + TURN, -(helpers << OPEN))
    spins = 0
    while peek(state + TURN) != closed:
        pause()
        spins += 1
        if spins > 2000:
            give_way()


def call(request: int, _scratch: int, _first: int, _last: int) -> None:
    """One kernel call: alone if helpers is 0 or there is a single unit, else shared.

    request: the address of REQUEST's words with the arguments behind them. They lie on the caller's stack,
    which outlives the call.
    """
    state, kernel = argument(request, 0), argument(request, 1)
    units, helpers = argument(request, 2), argument(request, 3)
    arguments = request + 8 * REQUEST
    lock(state + BUSY)
    kept, stream = units, argument(request, 4)
    if stream != 0:
        kept = follow(state, stream, argument(request, 5), argument(request, 6), units)
    store_i64(arguments - 8, kept)
    if helpers == 0 or units <= 1:
        enter(kernel, arguments, load_i64(state + SCRATCH), 0, units)
    else:
        share(state, kernel, units, helpers, arguments)
    unlock(state + BUSY)


def prepare(state: int, _scratch: int, _first: int, _last: int) -> None:
    mutex_init(state + BUSY, 0)
    mutex_init(state + SLEEP, 0)
    condition_init(state + WAKE, 0)


def finish(state: int, _scratch: int, _first: int, _last: int) -> None:
    """Send every helper home."""
    post(state + STOP, 1)
    lock(state + SLEEP)
    broadcast(state + WAKE)
    unlock(state + SLEEP)


def spin(count: int, _scratch: int, _first: int, _last: int) -> None:
    for _ in range(count):
        pause()
