"""Small calls of one kernel in CUDA C++, or of those in Triton, to be run under compute-sanitizer:

PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python3 tests/kernels/sanitize.py v2
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from ridgeline.kernels.cuda import decode, decode_wide, linear, merge
from ridgeline.kernels.select import load_kernels
from ridgeline.ops import REGISTRY
from ridgeline.ops.attention import attention, attention_inputs
from ridgeline.ops.weight import Weight
from ridgeline.study.attention import tensors
from ridgeline.study.attention.cases import Case

NEW, VISIBLE, TAILS = (1, 70, 5, 0, 33), (1, 130, 3, 9, 200), (1, 40, 0, 0, 20)
FEW, FEW_VISIBLE, FEW_TAILS = (1, 2, 1, 0, 3), (1, 130, 3, 9, 500), (1, 2, 0, 0, 3)
HEAD_DIMS = (64, 128, 256)
FEATURES: tuple[tuple[int | None, int | None, dict[str, Any]], ...] = (
    (None, None, {}),
    (None, None, {"causal": False}),
    (16, None, {}),
    (64, 40, {"sinks": True}),
    (48, 64, {"tails": True, "softcap": 5.0}),
)
"""Page, window, and the rest."""


def arguments(
    new: tuple[int, ...], visible: tuple[int, ...], tails: tuple[int, ...], head_dims: tuple[int, ...] = HEAD_DIMS
) -> Iterator[dict[str, Any]]:
    """Calls of every kind for batches of these rows and keys."""
    for head_dim in head_dims:
        for page, window, more in FEATURES:
            more = {**more, "tails": tails} if "tails" in more else more
            yield dict(
                attention_inputs(
                    "cuda", torch.bfloat16, 4, 2, head_dim, page, window, new, visible, return_lse=True, **more
                )
            )


def rung(name: str) -> int:
    importlib.import_module(f"ridgeline.kernels.cuda.attention_{name}")
    kernel, calls = attention.kernels[name], 0
    for call in arguments(NEW, VISIBLE, TAILS):
        if kernel.accepts is None or kernel.accepts(**call) is None:
            kernel.call(**call)
            calls += 1
    return calls


def narrow() -> int:
    """Few rows, in equal shares and in fixed pieces; many rows in fixed pieces, which take no other kernel."""
    calls = 0
    for call in arguments(FEW, FEW_VISIBLE, FEW_TAILS):
        for pieces in (None, 64):
            decode.run(pieces, **call)
            calls += 1
    for call in arguments(NEW, VISIBLE, TAILS, (128,)):
        decode.run(64, **call)
        calls += 1
    return calls


def wide() -> int:
    """Many rows, on Hopper."""
    calls, launch = 0, decode_wide.launch

    def counted(*given: Any) -> None:
        nonlocal calls
        calls += 1
        launch(*given)

    setattr(decode_wide, "launch", counted)  # noqa: B010
    for call in arguments(NEW, VISIBLE, TAILS):
        decode.run(None, **call)
    return calls


def merged() -> int:
    calls = 0
    for head_dim in HEAD_DIMS:
        for dtype in merge.DTYPES:
            sides = [torch.randn(37, 6, head_dim, device="cuda").to(dtype) for _ in range(2)]
            logs = [torch.randn(37, 6, device="cuda") for _ in range(2)]
            logs[0][3] = logs[1][5] = float("-inf")
            merge.merge_attended(sides[0], logs[0], sides[1], logs[1])
            calls += 1
    return calls


def few_tokens() -> int:
    """Rows and tokens past the end, inputs that end inside of a run, one block a row and several."""
    calls, splits = 0, (1, 4) if torch.cuda.get_device_capability() >= (9, 0) else (1,)
    for tokens, outputs, inputs in ((2, 3, 8), (7, 77, 1032), (13, 130, 2056), (29, 65, 2048)):
        x = torch.randn(tokens, inputs, device="cuda").bfloat16()
        weight = Weight.dense_from(torch.randn(outputs, inputs, device="cuda").bfloat16())
        bias = torch.randn(outputs, device="cuda").bfloat16()
        for split in splits:
            for ring in (False, True):
                linear.few(linear.Plan(32, 4, 4, ring, 1, split=split), x, weight, bias, "silu")
                calls += 1
    return calls


def triton_attention() -> int:
    """Long prompts, split contexts, and the report's batches, whose last keys end where the memory does."""
    load_kernels("cuda")
    kernel, calls = attention.kernels["triton"], 0
    for batch in ((NEW, VISIBLE, TAILS), (FEW, FEW_VISIBLE, FEW_TAILS)):
        for call in arguments(*batch, (40, *HEAD_DIMS)):
            kernel.call(**call)
            calls += 1
    for requests in (1, 4):
        case = Case("report", requests, 8, 8, 64, 64, 64, False, "bfloat16")
        kernel.call(**tensors.make(case, torch.device("cuda"))._asdict())
        calls += 1
    return calls


def triton_examples() -> int:
    """Every op's own examples but attention's."""
    load_kernels("cuda")
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


CASES: dict[str, Callable[[], int]] = {
    **{name: partial(rung, name) for name in ("v1", "v2", "sm90")},
    "decode": narrow,
    "decode_wide": wide,
    "merge": merged,
    "linear": few_tokens,
    "triton-attention": triton_attention,
    "triton-examples": triton_examples,
}


def main(name: str) -> None:
    calls = CASES[name]()
    torch.cuda.synchronize()
    print(f"{name}: {calls} calls")
    assert calls, f"{name} takes none of these calls"


if __name__ == "__main__":
    main(sys.argv[1])
