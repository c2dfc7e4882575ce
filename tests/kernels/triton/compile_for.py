"""Compile every Triton kernel for a CUDA architecture, without a GPU: `compile_for.py 90 [shared KiB]`.

A process of its own (test_triton_compiles.py starts it), because it puts itself in the place of Triton's
driver: the wrappers run on CPU tensors as they are, and each launch ends after the compiler. Prints one
line a kernel: name, warps, stages, bytes of shared memory.
"""

import sys
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from triton_checks import paged

from ridgeline.kernels.select import load_kernels
from ridgeline.kernels.triton import attention as attention_kernels
from ridgeline.kernels.triton import mlp as mlp_kernels
from ridgeline.kernels.triton import moe as moe_kernels
from ridgeline.kernels.triton import product as product_kernels
from ridgeline.kernels.triton.machine import Machine
from ridgeline.ops import REGISTRY, Weight
from ridgeline.ops.attention import attention_inputs

CAPABILITY, SHARED_KIB = int(sys.argv[1]), int(sys.argv[2])


class NoDevice:
    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", CAPABILITY, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_only(launch: Any) -> Any:
    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        compiled = launch(self, *args, grid=grid, warmup=True, **kwargs)
        about = compiled.metadata
        assert compiled.asm["cubin"]
        assert about.shared <= SHARED_KIB * 1024, f"{self.fn.__name__} takes {about.shared} bytes of shared memory"
        print(self.fn.__name__, about.num_warps, about.num_stages, about.shared)
        return compiled

    return run


def call(name: str, **inputs: Any) -> None:
    for kernel in REGISTRY[name].kernels.values():
        if kernel.name.startswith("triton"):
            kernel.call(**inputs)
            if kernel.invariant not in (None, kernel.call):
                kernel.invariant(**inputs)


load_kernels("cuda")
driver.set_active(NoDevice())
setattr(JITFunction, "run", compile_only(JITFunction.run))  # noqa: B010
MACHINE = Machine(4, SHARED_KIB * 1024, CAPABILITY >= 90)
setattr(attention_kernels, "_machine", lambda _: MACHINE)  # noqa: B010
setattr(attention_kernels, "INTERPRETED", True)  # noqa: B010  (tensors may lie on the CPU)
for module in (moe_kernels, mlp_kernels, product_kernels):
    setattr(module, "machine_of", lambda _: MACHINE)  # noqa: B010

if CAPABILITY >= 90:  # as `dependent` answers on such a device
    for module in list(sys.modules.values()):
        if module.__name__.startswith("ridgeline.kernels.triton.") and hasattr(module, "dependent"):
            setattr(module, "dependent", lambda _: {"EARLY": True, "launch_pdl": True})  # noqa: B010

for dtype in (torch.bfloat16, torch.float32):
    for head_dim in (64, 128, 256):
        for block, window in ((64, None), (16, 100))[: 2 if head_dim == 128 else 1]:
            for spans in ([(1, 70), (1, 80)], [(600, 700), (1, 90)], [(600, 600)]):
                call("attention", **paged("cpu", dtype, 8, 2, head_dim, block, spans, window))
        for causal in (True, False):
            sizes = (700, 600), (700, 650)
            call("attention", **attention_inputs("cpu", dtype, 8, 2, head_dim, None, None, *sizes, causal=causal))
    for new, visible, tails in (((33, 20), (90, 80), (33, 0)), ((700, 5), (900, 80), (9, 5))):
        features = {"softcap": 20.0, "sinks": True, "tails": tails, "return_lse": True}
        inputs = attention_inputs("cpu", dtype, 8, 2, 128, 64, 64, new, visible, **features)
        call("attention", **inputs)
    for name in (
        "norm",
        "layer_norm",
        "rope_kv_write",
        "sample",
        "moe",
        "linear",
        "feed",
        "embed",
        "take",
        "propose",
        "kv_compact",
        "accept",
        "branch",
    ):
        for inputs in REGISTRY[name].inputs("cpu", dtype):
            call(name, **inputs)
    for tokens, inner in ((1, 512), (1, 1024), (20, 512), (40, 512), (300, 512)):
        weight = Weight.dense_from(torch.zeros(2 * inner, 1024, dtype=dtype))
        call("gated_linear", x=torch.zeros(tokens, 1024, dtype=dtype), weight=weight)
    for tokens in (4, 40, 80, 200):
        call(
            "moe",
            x=torch.zeros(tokens, 256, dtype=dtype),
            router=torch.zeros(8, 256, dtype=dtype),
            gate_up=torch.zeros(8, 2 * 128, 256, dtype=dtype),
            down=torch.zeros(8, 256, 128, dtype=dtype),
            top_k=2,
            renormalize=True,
        )
    wide = torch.zeros(3, 16384, dtype=dtype)
    call("norm", x=wide, residual=wide.clone(), weight=wide[0], eps=1e-5)
