"""gated_linear: both ways, all activations, few and many tokens."""

import pytest
import torch

pytest.importorskip("triton")

from triton_checks import assert_near, kinds

from ridgeline.kernels.triton import mlp as kernels
from ridgeline.kernels.triton.mlp import (
    ACTIVATIONS,
    MIDDLE,
    NARROW,
    TALL,
    WIDE,
    Product,
    _accepts,
    gated_linear_triton,
    product_for,
)
from ridgeline.ops.mlp import gated_linear
from ridgeline.ops.weight import Weight

SHAPES = {  # tokens, inputs, outputs
    "cpu": ((1, 72, 40), (16, 130, 33), (3, 64, 264), (17, 64, 8), (65, 64, 8)),
    "cuda": (
        (1, 4096, 1408),
        (16, 520, 264),
        (1, 4096, 8704),
        (16, 520, 9000),
        (17, 2056, 4300),
        (64, 4096, 4224),
        (64, 520, 264),
        (300, 1024, 2048),
    ),
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


@pytest.mark.parametrize("product", [WIDE, NARROW, MIDDLE, TALL])
def test_few_tokens_do_not_see_each_other(device: str, product: Product, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "product_for", lambda *_: product)
    x = torch.randn(product.rows, 96, device=device).half()
    weight = Weight.dense_from(torch.randn(80, 96, device=device).half())
    together = gated_linear_triton(x, weight)
    for tokens in (2, 5):
        assert torch.equal(gated_linear_triton(x[:tokens].clone(), weight), together[:tokens])


def test_products() -> None:
    """By inner width of Qwen3-0.6B, Llama-3.1-8B and 70B, on 132 multiprocessors."""
    chosen = {
        inner: [product_for(tokens, inner, 132) for tokens in (1, 16, 17, 33, 64, 65)] for inner in (3072, 14336, 28672)
    }
    assert chosen[3072] == [NARROW, NARROW, None, None, None, None]
    assert chosen[14336] == [WIDE, WIDE, MIDDLE, TALL, TALL, None]
    assert chosen[28672] == [NARROW, NARROW, MIDDLE, TALL, TALL, None]


def test_few_tokens_are_one_launch(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def library(*args: object) -> torch.Tensor:
        raise RuntimeError("cuBLAS")

    monkeypatch.setattr(torch.nn.functional, "linear", library)
    weight = Weight.dense_from(torch.randn(80, 96, device=device).half())
    for tokens in (1, 2, NARROW.rows):
        gated_linear_triton(torch.randn(tokens, 96, device=device).half(), weight)
    with pytest.raises(RuntimeError, match="cuBLAS"):
        gated_linear_triton(torch.randn(TALL.rows + 1, 96, device=device).half(), weight)
    with pytest.raises(RuntimeError, match="cuBLAS"):
        gated_linear_triton(torch.randn(1, 96, device=device), Weight.dense_from(weight.data.float()))


def test_refuses() -> None:
    x, weight = torch.empty(1, 64), Weight.dense_from(torch.empty(128, 64))
    assert _accepts(x, weight) is None
    assert "dense" in str(_accepts(x, weight.to_panels()))
    assert "dtype" in str(_accepts(x.half(), weight))
    assert "tanh" in str(_accepts(x, weight, "tanh"))
