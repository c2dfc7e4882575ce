"""FlashAttention-3's table of errors on numbers with outliers, its 16-bit rows, for every rung on a GPU."""

from __future__ import annotations

import pytest
import torch

from ridgeline.study.attention import accuracy, peers, rungs
from ridgeline.study.attention.cases import Case

pytestmark = pytest.mark.gpu
OURS = ("v1", "v2", "sm90", "triton", "decode")


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_errors_with_outliers(dtype: str, head_dim: int, causal: bool) -> None:
    """Ours are as near to fp64 as FlashAttention-2's, and nearer than standard attention in the same dtype."""
    device = torch.device("cuda")
    case = Case("accuracy", 1, 4, 4, head_dim, 1024, 1024, causal, dtype)
    serving = [name for name in ("standard", *OURS) if name in rungs.rungs(device)]
    fa2 = {"fa2": peers.peers(device)["fa2"]}
    errors, refused = accuracy.measure(case, device, rungs.chosen(serving, device), fa2, draws=3)
    print(dtype, head_dim, {name: f"{one.drawn:.2e} {one.rounded:.2e}" for name, one in errors.items()})
    assert refused == {}
    for name in set(errors) & set(OURS):
        assert errors[name].rounded <= 1.2 * errors["fa2"].rounded, name
        assert errors[name].rounded < errors["standard"].rounded, name
        assert errors[name].drawn < errors["standard"].drawn, name
