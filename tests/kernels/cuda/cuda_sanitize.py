"""Small calls of one rung of attention, to be run under compute-sanitizer:

PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python3 tests/kernels/cuda/cuda_sanitize.py v2
"""

from __future__ import annotations

import importlib
import sys

import torch

from ridgeline.ops.attention import attention, attention_inputs

NEW, VISIBLE, TAILS = (1, 70, 5, 0, 33), (1, 130, 3, 9, 200), (1, 40, 0, 0, 20)
MODULES = {"decode": "decode"}
"""Modules that are not named after their rung."""


def main(rung: str) -> None:
    importlib.import_module(f"ridgeline.kernels.cuda.{MODULES.get(rung, f'attention_{rung}')}")
    kernel = attention.kernels[rung]
    calls = 0
    for head_dim in (64, 128, 256):
        for page, window, more in (
            (None, None, {}),
            (None, None, {"causal": False}),
            (16, None, {}),
            (64, 40, {"sinks": True}),
            (48, 64, {"tails": TAILS, "softcap": 5.0}),
        ):
            arguments = attention_inputs(
                "cuda", torch.bfloat16, 4, 2, head_dim, page, window, NEW, VISIBLE, return_lse=True, **more
            )
            if kernel.accepts is None or kernel.accepts(**arguments) is None:
                kernel.call(**arguments)
                calls += 1
    torch.cuda.synchronize()
    print(f"{rung}: {calls} calls")
    assert calls, f"{rung} takes none of these calls"


if __name__ == "__main__":
    main(sys.argv[1])
