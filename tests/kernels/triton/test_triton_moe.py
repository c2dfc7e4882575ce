"""moe: the sort on the device, uneven experts, and the whole against fp64."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from triton_checks import assert_near, kinds

from ridgeline.kernels.triton import moe as kernels
from ridgeline.kernels.triton.moe import _accepts, moe_triton, sorted_by_expert
from ridgeline.ops.mlp import gate
from ridgeline.ops.moe import moe, route


@pytest.mark.parametrize("counted", [True, False])
def test_sort(device: str, counted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "COUNTED", 1 << 30 if counted else 0)
    for rows, count, used in ((1, 8, 8), (130, 5, 2), (300, 130, 130)):
        experts = torch.randint(used, (rows,), device=device)
        order, offsets = sorted_by_expert(experts, count)
        assert torch.equal(order.long(), experts.argsort(stable=True))
        want = F.pad(torch.bincount(experts, minlength=count).cumsum(0), (1, 0))
        assert torch.equal(offsets.long(), want)


def in_fp64(x: torch.Tensor, router: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, top_k: int,
            renormalize: bool, activation: str) -> torch.Tensor:  # fmt: skip
    """The op in fp64, on the route that the dtype under test took."""
    weights, experts = route(x, router, top_k, renormalize)
    out = torch.zeros(x.shape, dtype=torch.float64, device=x.device)
    for token in range(x.shape[0]):
        for place in range(top_k):
            expert = int(experts[token, place])
            inner = gate(x[token].double() @ gate_up[expert].double().T, activation)
            out[token] += weights[token, place].double() * (inner @ down[expert].double().T)
    return out


@pytest.mark.parametrize("skew", [0.0, 30.0])
def test_against_fp64(device: str, skew: float) -> None:
    shapes = {  # tokens, width, inner, experts, k
        "cpu": ((1, 40, 24, 5, 2), (33, 72, 40, 4, 2), (50, 16, 72, 2, 1)),
        "cuda": ((1, 2048, 768, 128, 8), (70, 520, 200, 8, 2), (600, 256, 512, 4, 2), (1100, 128, 64, 16, 4)),
    }[device]
    for dtype in kinds(device):
        for tokens, width, inner, count, top_k in shapes:
            # A few draws are judged together: the largest error of few numbers is a matter of luck, torch's too.
            drawn = [moe_arguments(device, dtype, tokens, width, inner, count, top_k, skew) for _ in range(4)]
            got, exact, own = (
                torch.stack([way(*args) for args in drawn]) for way in (moe_triton, in_fp64, moe.reference)
            )
            assert_near(got, exact, own)


def moe_arguments(
    device: str, dtype: torch.dtype, tokens: int, width: int, inner: int, count: int, top_k: int, skew: float
) -> tuple[Any, ...]:
    router = torch.randn(count, width, device=device)
    x = torch.randn(tokens, width, device=device)
    x += skew * router[0] / router[0].norm()  # most tokens want expert 0
    return (
        x.to(dtype),
        router.to(dtype),
        (torch.randn(count, 2 * inner, width, device=device) / width**0.5).to(dtype),
        (torch.randn(count, width, inner, device=device) / inner**0.5).to(dtype),
        top_k,
        skew == 0,
        "silu",
    )


def test_repeats_bit_for_bit(device: str) -> None:
    dtype = torch.float16
    inputs = list(moe.inputs(device, dtype))[1]
    first = moe_triton(**inputs)
    for _ in range(2 if device == "cpu" else 20):
        assert torch.equal(moe_triton(**inputs), first)


def test_refuses() -> None:
    inputs = next(iter(moe.inputs("meta", torch.float32)))
    assert _accepts(**inputs) is None
    assert "dtype" in str(_accepts(**{**inputs, "down": inputs["down"].half()}))
    assert "multiples of 8" in str(_accepts(**{**inputs, "x": torch.empty(1, 60, device="meta")}))
    assert "activation" in str(_accepts(**{**inputs, "activation": "tanh"}))
