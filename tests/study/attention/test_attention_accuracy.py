"""Errors on numbers with outliers: how they are drawn, what is exact, who takes part, and that a wrong rung shows."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ridgeline.kernels.select import load_kernels
from ridgeline.ops import REGISTRY
from ridgeline.ops.op import Kernel, anywhere
from ridgeline.study.attention import accuracy, peers, rungs
from ridgeline.study.attention.cases import Case

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")


def case(dtype: str = "float16", causal: bool = False, kv_heads: int = 2) -> Case:
    return Case("accuracy", 2, 2, kv_heads, 32, 128, 128, causal, dtype)


def test_outliers_are_rare_and_far() -> None:
    numbers = accuracy.outliers((1000, 1000), torch.Generator().manual_seed(0))
    assert numbers.dtype == torch.float64
    assert numbers.var().item() == pytest.approx(1 + 0.001 * 100, abs=0.01)
    assert (numbers.abs() > 6).double().mean().item() == pytest.approx(0.001 * 0.55, rel=0.1)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_exact_is_torch_in_fp64(causal: bool, kv_heads: int) -> None:
    one, draw = case(causal=causal, kv_heads=kv_heads), torch.Generator().manual_seed(1)
    q, k, v = (accuracy.outliers((2, heads, 128, 32), draw) for heads in (2, kv_heads, kv_heads))
    wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
    torch.testing.assert_close(accuracy.exact(q, k, v, one), wanted, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("causal", [False, True])
def test_flash_is_nearer_than_standard(causal: bool) -> None:
    names = ("standard", "blocked", "cpu")
    kernels = rungs.chosen(names, CPU)
    one = case("bfloat16", causal)
    errors, refused = accuracy.measure(one, CPU, kernels, {"torch-cpu": peers.peers(CPU)["torch-cpu"]}, draws=2)
    assert ("cpu" in refused) == (not causal)  # it takes pages alone, and those causal alone
    for name in set(errors) - {"standard"}:
        assert errors[name].rounded < 0.7 * errors["standard"].rounded, name
        assert errors[name].rounded < errors[name].drawn < errors["standard"].drawn
        assert errors[name].worst > errors[name].rounded


def test_the_same_numbers_for_each_and_a_wrong_rung_shows() -> None:
    load_kernels("cpu")
    reference = REGISTRY["attention"].reference

    def wrong(**arguments: Any) -> torch.Tensor:
        return reference(**arguments) + 0.5

    kernels = {
        name: Kernel(name, anywhere(), call) for name, call in (("a", reference), ("b", reference), ("w", wrong))
    }
    errors, refused = accuracy.measure(case(), CPU, kernels, {})
    assert refused == {}
    assert errors["a"] == errors["b"]
    assert errors["w"].rounded == pytest.approx(0.5, abs=0.01)
    again, _ = accuracy.measure(case(), CPU, kernels, {}, seed=5)
    assert again["a"] != errors["a"]
