"""linear: one token, and more; biases, activations, strides."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from triton_checks import assert_near, kinds

from ridgeline.kernels.triton.linear import _accepts, linear_triton
from ridgeline.ops.linear import ACTIVATIONS, linear
from ridgeline.ops.weight import Weight

SHAPES = {  # tokens, inputs, outputs
    "cpu": ((1, 72, 40), (1, 1100, 3), (1, 130, 33), (1, 8200, 5), (2, 64, 8)),
    "cuda": ((1, 4096, 6144), (1, 14336, 4096), (1, 4096, 128256), (1, 2056, 1001), (1, 8200, 77), (7, 2056, 1001)),
}  # fmt: skip


def weight_of(outputs: int, inputs: int, device: str, dtype: torch.dtype) -> Weight:
    return Weight.dense_from((torch.randn(outputs, inputs, device=device) / inputs**0.5).to(dtype))


@pytest.mark.parametrize("bias", [False, True])
def test_against_fp64(device: str, bias: bool) -> None:
    for dtype in kinds(device):
        for tokens, inputs, outputs in SHAPES[device]:
            x, weight = torch.randn(tokens, inputs, device=device).to(dtype), weight_of(outputs, inputs, device, dtype)
            shift = torch.randn(outputs, device=device).to(dtype) if bias else None
            got, own = linear_triton(x, weight, shift), linear.reference(x, weight, shift)
            wide = None if shift is None else shift.double()
            exact = linear.reference(x.double(), Weight.dense_from(weight.data.double()), wide)
            assert got.dtype == dtype
            assert_near(got, exact, own)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(device: str, activation: str) -> None:
    for tokens in (1, 5):
        x, weight = torch.randn(tokens, 96, device=device).half(), weight_of(40, 96, device, torch.float16)
        got, own = linear_triton(x, weight, None, activation), linear.reference(x, weight, None, activation)
        exact = linear.reference(x.double(), Weight.dense_from(weight.data.double()), None, activation)
        assert_near(got, exact, own)


def test_rows_with_a_stride(device: str) -> None:
    x, weight = torch.randn(5, 200, device=device).half(), weight_of(24, 96, device, torch.float16)
    for rows in (x[:1, 7:103], x[:, 7:103]):
        assert torch.equal(linear_triton(rows, weight), linear_triton(rows.contiguous(), weight))


def test_one_token_is_one_launch(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def library(*args: object) -> torch.Tensor:
        raise RuntimeError("cuBLAS")

    monkeypatch.setattr(torch.nn.functional, "linear", library)
    weight = weight_of(24, 96, device, torch.float16)
    linear_triton(torch.randn(1, 96, device=device).half(), weight)
    with pytest.raises(RuntimeError, match="cuBLAS"):
        linear_triton(torch.randn(2, 96, device=device).half(), weight)
    with pytest.raises(RuntimeError, match="cuBLAS"):
        linear_triton(torch.randn(1, 96, device=device), weight_of(24, 96, device, torch.float32))


def test_refuses() -> None:
    x, weight = torch.empty(1, 64), Weight.dense_from(torch.empty(128, 64))
    assert _accepts(x, weight) is None
    assert "dense" in str(_accepts(x, weight.to_panels()))
    assert "dtype" in str(_accepts(x.half(), weight))
    assert "dtype" in str(_accepts(x, weight, torch.empty(128, dtype=torch.float16)))
    assert "tanh" in str(_accepts(x, weight, None, "tanh"))
