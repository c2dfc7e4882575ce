"""norm and layer_norm: odd widths, strided rows, the residual in place."""

import pytest
import torch

pytest.importorskip("triton")

from triton_checks import assert_near, kinds

from ridgeline.kernels.triton.norm import _accepts_norm, layer_norm_triton, norm_triton
from ridgeline.ops.norm import layer_norm, norm

WIDTHS = {"cpu": ((1, 8), (5, 100), (9, 513)), "cuda": ((1, 8), (33, 100), (700, 5120), (9, 16384))}


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("add", [False, True])
def test_against_fp64(device: str, centred: bool, add: bool) -> None:
    for dtype in kinds(device):
        for rows, width in WIDTHS[device]:
            x = (3 + torch.randn(rows, width + 8, device=device)).to(dtype)[:, :width]
            residual = torch.randn(rows, width, device=device).to(dtype) if add else None
            weight = torch.randn(width, device=device).to(dtype)
            bias = torch.randn(width, device=device).to(dtype)
            own_residual = None if residual is None else residual.clone()
            kept = x.clone()
            if centred:
                got, total = layer_norm_triton(x, residual, weight, bias, 1e-5)
                own, want_total = layer_norm.reference(x, own_residual, weight, bias, 1e-5)
                exact, _ = layer_norm.reference(want_total.double(), None, weight.double(), bias.double(), 1e-5)
            else:
                got, total = norm_triton(x, residual, weight, 1e-5)
                own, want_total = norm.reference(x, own_residual, weight, 1e-5)
                wide = want_total.double()
                exact = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5) * weight.double()
            assert torch.equal(x, kept)
            assert torch.equal(total, want_total)
            assert total is (x if residual is None else residual)
            assert_near(got, exact, own)


def test_no_rows(device: str) -> None:
    got, total = norm_triton(torch.randn(0, 64, device=device), None, torch.ones(64, device=device), 1e-5)
    assert got.shape == total.shape == (0, 64)


def test_refuses() -> None:
    wide = torch.empty(2, 16392, device="meta")
    assert "16384" in str(_accepts_norm(wide, None, wide[0], 1e-5))
    assert "one dtype" in str(_accepts_norm(wide[:, :8].half(), None, wide[0, :8], 1e-5))
    assert _accepts_norm(wide[:, :8], None, wide[0, :8], 1e-5) is None
