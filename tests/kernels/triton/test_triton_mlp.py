"""gated_linear: both ways, all activations, few and many tokens."""

import pytest
import torch

pytest.importorskip("triton")

from triton_checks import assert_near, kinds

from ridgeline.kernels.triton.mlp import ACTIVATIONS, FEW, _accepts, gated_linear_triton
from ridgeline.ops.mlp import gated_linear
from ridgeline.ops.weight import Weight

SHAPES = {  # tokens, inputs, outputs
    "cpu": ((1, 72, 40), (16, 130, 33), (17, 64, 8), (65, 64, 8)),
    "cuda": ((1, 4096, 1408), (4, 2056, 1000), (16, 520, 264), (17, 2056, 1000), (64, 4096, 512), (300, 1024, 2048)),
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_against_fp64(device: str, activation: str) -> None:
    for dtype in kinds(device):
        for tokens, inputs, outputs in SHAPES[device]:
            x = torch.randn(tokens, inputs, device=device).to(dtype)
            data = (torch.randn(2 * outputs, inputs, device=device) / inputs**0.5).to(dtype)
            got = gated_linear_triton(x, Weight.dense_from(data), activation)
            own = gated_linear.reference(x, Weight.dense_from(data), activation)
            exact = gated_linear.reference(x.double(), Weight.dense_from(data.double()), activation)
            assert_near(got, exact, own)


def test_few_tokens_do_not_see_each_other(device: str) -> None:
    for few, counts in zip(FEW, ((1, 5), (33, 40))):
        x = torch.randn(few.rows, 96, device=device).half()
        weight = Weight.dense_from(torch.randn(80, 96, device=device).half())
        together = gated_linear_triton(x, weight)
        for tokens in counts:
            assert torch.equal(gated_linear_triton(x[:tokens].clone(), weight), together[:tokens])


def test_few_tokens_are_one_launch(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def library(*args: object) -> torch.Tensor:
        raise RuntimeError("cuBLAS")

    monkeypatch.setattr(torch.nn.functional, "linear", library)
    weight = Weight.dense_from(torch.randn(80, 96, device=device).half())
    for tokens in (1, FEW[-1].rows):
        gated_linear_triton(torch.randn(tokens, 96, device=device).half(), weight)
    with pytest.raises(RuntimeError, match="cuBLAS"):
        gated_linear_triton(torch.randn(FEW[-1].rows + 1, 96, device=device).half(), weight)
    with pytest.raises(RuntimeError, match="cuBLAS"):
        gated_linear_triton(torch.randn(1, 96, device=device), Weight.dense_from(weight.data.float()))


def test_refuses() -> None:
    x, weight = torch.empty(1, 64), Weight.dense_from(torch.empty(128, 64))
    assert _accepts(x, weight) is None
    assert "dense" in str(_accepts(x, weight.to_panels()))
    assert "dtype" in str(_accepts(x.half(), weight))
    assert "tanh" in str(_accepts(x, weight, "tanh"))
