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


@cache
def dependent(device: torch.device) -> dict[str, Any]:
    """Keyword arguments of a launch, for a kernel with the constexpr EARLY."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < CAPABILITY:
        return {"EARLY": False}
    return {"EARLY": True, "launch_pdl": True}
