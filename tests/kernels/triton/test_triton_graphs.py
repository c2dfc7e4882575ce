"""A captured CUDA graph of each kernel serves other values of the same shapes, and repeats bit for bit."""

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from ridgeline.kernels.select import load_kernels
from ridgeline.ops import REGISTRY, Weight

load_kernels("cuda")
KERNELS = [
    (op.name, name)
    for op in REGISTRY.values()
    for name, kernel in op.kernels.items()
    if kernel.need.device == "cuda" and name.startswith(("triton", "torch"))
]


def copied(value: Any) -> Any:
    match value:
        case torch.Tensor():
            return value.clone()
        case Weight():
            return Weight(value.data.clone(), value.out_features, value.in_features, value.format)
        case list():
            return [copied(item) for item in value]
    return value


def overwrite(target: Any, source: Any) -> None:
    match target:
        case torch.Tensor():
            target.copy_(source)
        case Weight():
            target.data.copy_(source.data)
        case list():
            for a, b in zip(target, source):
                overwrite(a, b)


def tensors(result: Any, inputs: dict[str, Any]) -> list[torch.Tensor]:
    """What a call produced: its results, and arguments that it may have written."""
    results = result if isinstance(result, tuple) else [result] if result is not None else []
    written = [inputs[name] for name in ("k_pages", "v_pages") if name in inputs]
    return [*results, *written, *inputs.get("pages", [])]


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "kernel"), KERNELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_captured_graph(name: str, kernel: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    op = REGISTRY[name]
    call, accepts = op.kernels[kernel].call, op.kernels[kernel].accepts
    served = 0
    # Block tables of two draws differ in contents alone, so the second draw fits the first one's graph.
    for first, second in zip(op.inputs("cuda", dtype), op.inputs("cuda", dtype)):
        if accepts is not None and accepts(**first) is not None:
            continue
        served += 1
        static = {key: copied(value) for key, value in first.items()}
        call(**static)  # compiles, and finds these places
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = call(**static)
        eager = {key: copied(value) for key, value in second.items()}
        want = tensors(call(**eager), eager)
        for _ in range(20):
            for key, value in second.items():
                overwrite(static[key], value)
            graph.replay()
            torch.cuda.synchronize()
            for a, b in zip(tensors(result, static), want, strict=True):
                assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))
    assert served
