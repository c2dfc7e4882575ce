"""Programmatic dependent launch: a kernel starts while the one before it is still ending.

What it may do before `ready` is to read what no kernel of this step writes (weights): the start of a kernel,
and the first wait for memory, then lie under the end of the one before. A kernel whose programs are small or many
calls `starting` first; one whose programs fill a multiprocessor calls it last, or those of the next would
crowd where there is room, far from evenly. Knows launch options. It must not know any kernel.

The rule that keeps this right: every kernel launched so calls `ready` in every program, before it reads what
another kernel has written and before it writes anything. Then a kernel that is past `ready` knows that the one
before it has ended, and so have all before that. Kernels launched as usual are waited for, and wait, as usual.
"""

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

CAPABILITY = (9, 0)
FETCHERS: tl.constexpr = tl.constexpr(128)


@triton.jit
def starting(EARLY: tl.constexpr) -> None:
    """Let the next kernel come as soon as all programs of this one are on the machine."""
    if EARLY:
        gdc_launch_dependents()


@triton.jit
def ready(EARLY: tl.constexpr) -> None:
    """Wait until all kernels before this one have ended."""
    if EARLY:
        gdc_wait()


@triton.jit
def fetch(
    weight: tl.tensor, row: tl.tensor, END: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, BYTES: tl.constexpr
) -> None:
    """Ask for the beginnings of ROWS rows of a weight [END, WIDTH] of 16 bits to come into the L2 cache.

    BYTES: what `fetched` says, for each lane; nothing is asked for if it is 0.
    """
    if BYTES > 0:
        lane = tl.arange(0, FETCHERS)
        rows = tl.minimum(row + lane // (FETCHERS // ROWS), END - 1).to(tl.int64)
        at = weight + rows * WIDTH + lane % (FETCHERS // ROWS) * (BYTES // 2)
        tl.inline_asm_elementwise(
            "cp.async.bulk.prefetch.L2.global [$1], $2; mov.b32 $0, 0;",
            "=r,l,r",
            [at.to(tl.int64), tl.full((FETCHERS,), BYTES, tl.int32)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


def fetched(rows: int, row_bytes: int, most_bytes: int) -> int:
    """What each of FETCHERS lanes may fetch of `rows` rows that a program will read: bytes, 0 if none.

    The lanes share the rows' beginnings, `most_bytes` in all; rows must begin at multiples of 16 bytes.
    """
    if row_bytes % 16:
        return 0
    lanes = FETCHERS.value // rows
    return min(row_bytes, most_bytes // rows) // lanes // 16 * 16


@cache
def dependent(device: torch.device) -> dict[str, Any]:
    """Keyword arguments of a launch, for a kernel with the constexpr EARLY."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < CAPABILITY:
        return {"EARLY": False}
    return {"EARLY": True, "launch_pdl": True}
