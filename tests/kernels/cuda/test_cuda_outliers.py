"""FlashAttention-3's table of errors on numbers with outliers, its 16-bit rows, for every rung on a GPU."""

from __future__ import annotations

import pytest
import torch

from ridgeline.study.attention import accuracy, peers, rungs
from ridgeline.study.attention.cases import Case

pytestmark = pytest.mark.gpu
BESIDE_FA2 = {"v1": 1.2, "v2": 1.2, "sm90": 1.4, "triton": 1.2, "decode": 1.2}
"""Most that a rung's error may be beside FlashAttention-2's. sm90 anchors exponents at zero, so no weight is exact;
dividing by the sum of rounded weights mends that and costs up to 13 % of its time (docs/log.md), for a third of an
error that is still a fraction of standard attention's."""


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_errors_with_outliers(dtype: str, head_dim: int, causal: bool) -> None:
    """Ours are about as near to fp64 as FlashAttention-2's, and nearer than standard attention in the same dtype."""
    device = torch.device("cuda")
    case = Case("accuracy", 1, 4, 4, head_dim, 1024, 1024, causal, dtype)
    serving = [name for name in ("standard", *BESIDE_FA2) if name in rungs.rungs(device)]
    fa2 = {"fa2": peers.peers(device)["fa2"]}
    errors, refused = accuracy.measure(case, device, rungs.chosen(serving, device), fa2, draws=3)
    print(dtype, head_dim, {name: f"{one.drawn:.2e} {one.rounded:.2e}" for name, one in errors.items()})
    assert refused == {}
    for name in errors.keys() & BESIDE_FA2.keys():
        assert errors[name].rounded <= BESIDE_FA2[name] * errors["fa2"].rounded, name
        assert errors[name].rounded < errors["standard"].rounded, name
        assert errors[name].drawn < errors["standard"].drawn, name
