"""`linear` for 2 to 8 tokens, where only the weight's bytes matter (linear.cu); one token and more are `triton`'s.

Knows dense weights, and how a product's rows and inputs are dealt to a GPU. It must not know which layer of a model
it serves. Nothing is allocated but the result, so a captured step may hold it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch

from ridgeline.core.errors import KernelRefused
from ridgeline.kernels.cuda.instances import Defines, Instances
from ridgeline.kernels.cuda.nvrtc import INT32, INT64, POINTER, Kernel
from ridgeline.kernels.cuda.split import Machine, machine
from ridgeline.kernels.triton.linear import linear_triton
from ridgeline.kernels.triton.product import product
from ridgeline.ops.linear import linear
from ridgeline.ops.op import cuda
from ridgeline.ops.weight import Weight

FILE = "linear.cu"
FEWEST, MOST = 2, 8
"""Tokens that this kernel serves. It can take 32, but from 9 on cuBLAS is faster on an H200 (docs/log.md)."""

ACTIVATIONS = {None: 0, "silu": 1, "swish": 1, "relu": 2, "gelu": 3, "gelu_new": 4, "gelu_pytorch_tanh": 4}
"""By their Hugging Face names: linear.cu's numbers."""

STEP, PIECE_BYTES = 32, 512
"""Inputs that a warp takes at once, and bytes of one of its loads."""


@dataclass(frozen=True)
class Plan:
    """How linear.cu is compiled, and launched.

    rows: of the weight, of a block. warps: of a block; they share its inputs. depth: steps of 32 inputs that a warp
    has under way. ring: they wait in shared memory, not in registers. blocks: of a multiprocessor, for which registers
    are kept. early: the next kernel may come at this one's start, not at its end. split: blocks that share rows, each
    with inputs of its own (a cluster; Hopper and later); 0: as many as fill the GPU.
    """

    rows: int
    warps: int
    depth: int
    ring: bool
    blocks: int
    early: bool = False
    split: int = 0

    def defines(self, eights: int) -> Defines:
        return {
            "EIGHTS": eights,
            "ROWS": self.rows,
            "WARPS": self.warps,
            "DEPTH": self.depth,
            "RING": int(self.ring),
            "BLOCKS": self.blocks,
            "EARLY": int(self.early),
        }

    def shared_bytes(self, eights: int) -> int:
        """What is under way, if that is in shared memory; later the warps' sums take its place."""
        ring = self.warps * self.depth * (self.rows // 8 + eights) * PIECE_BYTES if self.ring else 0
        return max(ring, self.warps * 8 * eights * (self.rows + 8) * 4)


FEW = Plan(32, 8, 4, True, 2)
"""64 KB of weights under way a block."""

SPLITS = (1, 2, 4)


class Launch(NamedTuple):
    """A compiled kernel and its grid, threads and shared memory."""

    kernel: Kernel
    grid: tuple[int, int, int]
    threads: int
    shared_bytes: int


def eights_of(tokens: int) -> int:
    """Eights of tokens that a kernel is compiled for."""
    return 1 if tokens <= 8 else 2 if tokens <= 16 else 4


def split_of(plan: Plan, outputs: int, width: int, machine: Machine) -> int:
    """Blocks that share a block's rows: the fewest with which nine in ten multiprocessors have one.

    Each of their warps must have a run of inputs to itself.
    """
    if machine.capability < 90:
        return 1
    if plan.split:
        return plan.split
    groups, run = -(-outputs // plan.rows), plan.depth * STEP
    possible = [split for split in SPLITS if split == 1 or split * plan.warps * run <= width]
    return next((split for split in possible if 10 * groups * split >= 9 * machine.multiprocessors), possible[-1])


@cache
def _kernel(plan: Plan, eights: int, dtype: torch.dtype, split: int, dependent: bool) -> Kernel:
    arguments = (POINTER, POINTER, POINTER, POINTER, INT64, INT32, INT32, INT32, INT32)
    defines = {"BF16": int(dtype == torch.bfloat16), **plan.defines(eights)}
    return Kernel(
        FILE,
        "linear_few",
        arguments,
        defines,
        plan.shared_bytes(eights),
        cluster=(split, 1, 1),
        dependent=dependent,
    )


@cache
def _launch(plan: Plan, eights: int, outputs: int, width: int, dtype: torch.dtype, device: int) -> Launch:
    gpu = machine(device)
    shared = plan.shared_bytes(eights)
    if shared > gpu.block_bytes:
        raise KernelRefused(f"linear: {plan} needs {shared} bytes of shared memory, a block has {gpu.block_bytes}")
    split = split_of(plan, outputs, width, gpu)
    kernel = _kernel(plan, eights, dtype, split, gpu.capability >= 90)
    return Launch(kernel, (-(-outputs // plan.rows) * split, 1, 1), 32 * plan.warps, shared)


def _accepts(
    x: torch.Tensor, weight: Weight, bias: torch.Tensor | None = None, activation: str | None = None
) -> str | None:
    if weight.format != "dense":
        return f"takes dense weights, not {weight.format!r}"
    if x.dtype not in (torch.bfloat16, torch.float16):
        return f"takes bf16 and fp16, not {x.dtype}"
    if weight.data.dtype != x.dtype or (bias is not None and bias.dtype != x.dtype):
        return f"takes a weight and bias of x's dtype {x.dtype}, not {weight.data.dtype}"
    if weight.in_features % 8:
        return f"takes multiples of 8 inputs, not {weight.in_features}"
    if not weight.data.is_contiguous():
        return f"takes weights whose rows lie side by side, not strides {weight.data.stride()}"
    if bias is not None and not bias.is_contiguous():
        return "takes a bias without gaps"
    if activation not in ACTIVATIONS:
        return f"knows no activation {activation!r}"
    return None


@linear.kernel("cuda", needs=cuda(80), accepts=_accepts, invariant=product)
def linear_cuda(
    x: torch.Tensor, weight: Weight, bias: torch.Tensor | None = None, activation: str | None = None
) -> torch.Tensor:
    """One launch for 2 to 8 tokens. One token, and more, are the kernel `triton`'s, and so is the batch-invariant way.

    Bits are equal for equal calls; a token's may change with the number of tokens, as other kernels serve
    one and many.
    """
    if FEWEST <= x.shape[0] <= MOST:
        return few(FEW, x, weight, bias, activation)
    return linear_triton(x, weight, bias, activation)


def few(
    plan: Plan, x: torch.Tensor, weight: Weight, bias: torch.Tensor | None = None, activation: str | None = None
) -> torch.Tensor:
    """The product of 1 to 32 tokens by a plan. x [T, inputs] may have strides; a copy is made of rows that do not
    begin at multiples of 16 bytes."""
    data, tokens, outputs = weight.data, x.shape[0], weight.out_features
    if data.data_ptr() % 16:
        raise KernelRefused("linear: the weight must begin at a multiple of 16 bytes")
    if x.stride(1) != 1 or x.stride(0) % 8 or x.data_ptr() % 16:
        x = x.clone(memory_format=torch.contiguous_format)
    out = torch.empty(tokens, outputs, device=x.device, dtype=x.dtype)
    found = _launch(plan, eights_of(tokens), outputs, weight.in_features, x.dtype, x.get_device())
    found.kernel.launch(
        found.grid, found.threads, found.shared_bytes,
        x, data, bias, out, x.stride(0), outputs, weight.in_features, tokens, ACTIVATIONS[activation],
    )  # fmt: skip
    return out


INSTANCES = Instances(
    FILE,
    ("sm_80", "sm_86", "sm_90"),
    {"BF16": (0, 1), "EIGHTS": (1, 2, 4)},
    defines=lambda choice: {"BF16": choice["BF16"], **FEW.defines(int(choice["EIGHTS"]))},
)
