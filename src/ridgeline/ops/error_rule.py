"""FlashAttention's error rule: how far a kernel may be from the exact result.

Knows tensors. It must not know which op they come from. The largest error may be at most twice that of plain PyTorch in
the kernel's own dtype, plus twice what adding 0.3 and taking it away again loses in that dtype: what storing results of
their size costs. flash-attention's tests hold its kernels to the same.
"""

from __future__ import annotations

import torch


def slack(exact: torch.Tensor, dtype: torch.dtype) -> float:
    """The rule's second term for results as large as these, stored in `dtype`."""
    if not exact.numel():
        return 0.0
    stored = exact.to(dtype)
    return 2 * ((stored + 0.3 - 0.3) - stored).abs().max().item()


def allowed(exact: torch.Tensor, own: torch.Tensor, factor: float = 2) -> float:
    """The largest error of a result whose exact values are given; own: PyTorch's, in the result's dtype."""
    if not exact.numel():
        return 0.0
    return factor * (own.double() - exact.double()).abs().max().item() + slack(exact, own.dtype)
