"""Every kernel of kernels/triton and kernels/torch on its op's own examples, within the op's tolerance."""

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from triton_checks import kinds

from ridgeline.kernels.select import load_kernels
from ridgeline.ops import REGISTRY

load_kernels("cuda")
KERNELS = [
    (op.name, name, way)
    for op in REGISTRY.values()
    for name, kernel in op.kernels.items()
    if kernel.need.device == "cuda" and name.startswith(("triton", "torch"))
    for way in ("call", "invariant")
    if way == "call" or kernel.invariant not in (None, kernel.call)
]


def copied(value: Any) -> Any:
    if isinstance(value, list):
        return [copied(one) for one in value]
    return value.clone() if isinstance(value, torch.Tensor) else value


def test_each_op_has_its_kernel() -> None:
    served = {op for op, name, _ in KERNELS if name == "triton"}
    assert served == {
        "norm",
        "layer_norm",
        "rope_kv_write",
        "gated_linear",
        "attention",
        "sample",
        "moe",
        "linear",
        "feed",
        "embed",
        "take",
        "propose",
        "accept",
        "branch",
        "kv_compact",
    }
    assert {op for op, _, _ in KERNELS} == set(REGISTRY)


def test_each_op_can_be_batch_invariant() -> None:
    """One that cannot would take the mode from every engine that uses it."""
    for device, load in (("cuda", None), ("cpu", "cpu")):
        if load is not None:
            load_kernels(load)
        for op in REGISTRY.values():
            steady = [
                kernel.name for kernel in op.kernels.values() if kernel.need.device == device and kernel.invariant
            ]
            assert steady or (device == "cpu" and op.by_rows), f"{op.name} on a {device} device"


@pytest.mark.parametrize(("name", "kernel", "way"), KERNELS)
def test_examples(device: str, name: str, kernel: str, way: str) -> None:
    op = REGISTRY[name]
    for dtype in kinds(device):
        tolerance = op.tolerance.get(str(dtype).removeprefix("torch."))
        if tolerance is None:
            continue
        for index, inputs in enumerate(op.inputs(device, dtype)):
            if (
                name == "attention"
                and device == "cpu"
                and index % (2 if way == "call" else 4) != (dtype == torch.float16)
            ):
                continue  # half of them each, beside the whole matrix of features in a file of its own
            accepts = op.kernels[kernel].accepts
            if accepts is not None and accepts(**inputs) is not None:
                assert name in ("attention", "kv_compact")  # which refuse features, several rows
                continue
            mine = {key: copied(value) for key, value in inputs.items()}
            got, want = getattr(op.kernels[kernel], way)(**mine), op.reference(**inputs)
            pairs = zip(got, want) if isinstance(got, tuple) else [(got, want)]
            if name == "rope_kv_write":
                pairs = [(got, want), *((mine[p], inputs[p]) for p in ("k_pages", "v_pages"))]
            elif name in ("kv_move", "kv_compact"):
                pairs = list(zip(mine["pages"], inputs["pages"]))
            elif name == "branch":
                pairs = [(mine[key], one) for key, one in inputs.items() if isinstance(one, torch.Tensor)]
            for a, b in pairs:
                assert a.dtype == b.dtype
                torch.testing.assert_close(a, b, atol=tolerance.absolute, rtol=tolerance.relative)
