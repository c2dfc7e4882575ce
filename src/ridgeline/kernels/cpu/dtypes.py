"""Element types that the CPU kernels read and write.

Knows fp32 and bf16. It must not know any op.
"""

from __future__ import annotations

import torch

HALF = {torch.float32: 0, torch.bfloat16: 1}
"""What compiled code calls `half`: 1 for bf16, 0 for fp32."""


def other_dtype(*tensors: torch.Tensor | None) -> str | None:
    """Why these tensors do not suit kernels that know one of HALF's types at a time; None if they do."""
    kinds = {tensor.dtype for tensor in tensors if tensor is not None}
    if len(kinds) == 1 and kinds <= HALF.keys():
        return None
    return f"takes float32 or bfloat16 throughout, not {', '.join(sorted(str(kind) for kind in kinds))}"
