"""Small calls of the Triton kernels, to be run under compute-sanitizer with PYTORCH_NO_CUDA_MEMORY_CACHING=1:

compute-sanitizer --tool memcheck python3 tests/kernels/triton/triton_sanitize.py attention
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch

from ridgeline.kernels.select import load_kernels
from ridgeline.ops import REGISTRY
from ridgeline.ops.attention import attention, attention_inputs
from ridgeline.study.attention import tensors
from ridgeline.study.attention.cases import Case

NEW, VISIBLE, TAILS = (1, 70, 5, 0, 33), (1, 130, 3, 9, 200), (1, 40, 0, 0, 20)
FEW, FEW_VISIBLE, FEW_TAILS = (1, 2, 1, 0, 3), (1, 130, 3, 9, 500), (1, 2, 0, 0, 3)
FEATURES: tuple[tuple[int | None, int | None, dict[str, Any]], ...] = (
    (None, None, {}),
    (None, None, {"causal": False}),
    (16, None, {}),
    (64, 40, {"sinks": True}),
    (48, 64, {"tails": True, "softcap": 5.0}),
)
"""Page, window, and the rest."""


def attend() -> int:
    """Long prompts, split contexts, and the report's batches, whose last keys end where the memory does."""
    kernel, calls = attention.kernels["triton"], 0
    for head_dim in (40, 64, 128, 256):
        for new, visible, tails in ((NEW, VISIBLE, TAILS), (FEW, FEW_VISIBLE, FEW_TAILS)):
            for page, window, more in FEATURES:
                more = {**more, "tails": tails} if "tails" in more else more
                given = attention_inputs(
                    "cuda", torch.bfloat16, 4, 2, head_dim, page, window, new, visible, return_lse=True, **more
                )
                kernel.call(**given)
                calls += 1
    for batch in (1, 4):
        case = Case("report", batch, 8, 8, 64, 64, 64, False, "bfloat16")
        kernel.call(**tensors.make(case, torch.device("cuda"))._asdict())
        calls += 1
    return calls


def examples() -> int:
    """Every op's own examples."""
    calls = 0
    for op in REGISTRY.values():
        kernel = op.kernels.get("triton")
        if kernel is None or op is attention:
            continue
        for dtype in (torch.float32, torch.bfloat16):
            if op.tolerance.get(str(dtype).removeprefix("torch.")) is None:
                continue
            for inputs in op.inputs("cuda", dtype):
                if kernel.accepts is None or kernel.accepts(**inputs) is None:
                    kernel.call(**inputs)
                    calls += 1
    return calls


CASES: dict[str, Callable[[], int]] = {"attention": attend, "examples": examples}


def main(name: str) -> None:
    load_kernels("cuda")
    calls = CASES[name]()
    torch.cuda.synchronize()
    print(f"{name}: {calls} calls")
    assert calls


if __name__ == "__main__":
    main(sys.argv[1])
