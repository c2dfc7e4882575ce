"""What the CPU kernels' tests share: a kernel by its op's name, and closeness to the reference."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch

from ridgeline.kernels.cpu.pack import pack
from ridgeline.kernels.select import load_kernels
from ridgeline.ops import REGISTRY, Op, Weight

load_kernels("cpu")

DTYPES = (torch.float32, torch.bfloat16)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def kernel(op: str) -> Any:
    return REGISTRY[op].kernels["cpu"].call


def packed(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments with every weight in panels."""
    return {key: pack(value) if isinstance(value, Weight) else value for key, value in arguments.items()}


def random_weight(outputs: int, inputs: int, dtype: torch.dtype) -> Weight:
    return Weight.dense_from((torch.randn(outputs, inputs) / inputs**0.5).to(dtype))


def assert_close(op: Op, got: Any, expected: Any, dtype: torch.dtype) -> None:
    """Every tensor of a result within the op's tolerance, element by element."""
    if isinstance(expected, tuple):
        for one, other in zip(got, expected, strict=True):
            assert_close(op, one, other, dtype)
        return
    if expected is None:
        assert got is None
        return
    tolerance = op.tolerance[name_of(dtype)]
    assert got.shape == expected.shape
    assert got.dtype == expected.dtype
    error = (got.double() - expected.double()).abs()
    allowed = tolerance.absolute + tolerance.relative * expected.double().abs()
    assert bool((error <= allowed).all()), f"{op.name}: off by {error.max().item()}"


def compare(op: str, arguments: Mapping[str, Any], dtype: torch.dtype, pack_weights: bool = False) -> None:
    """The kernel against the reference: results, and tensors that the op writes in place."""
    declared = REGISTRY[op]
    for_reference, for_kernel = copy.deepcopy(dict(arguments)), copy.deepcopy(dict(arguments))
    if pack_weights:
        for_kernel = packed(for_kernel)
    refusal = declared.kernels["cpu"].accepts
    assert refusal is None or refusal(**for_kernel) is None
    expected = declared.reference(**for_reference)
    got = declared.kernels["cpu"].call(**for_kernel)
    assert_close(declared, got, expected, dtype)
    for name in ("pages", "k_pages", "v_pages"):
        if name in arguments:
            for one, other in zip(for_kernel[name], for_reference[name], strict=True):
                torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-5, equal_nan=True)
