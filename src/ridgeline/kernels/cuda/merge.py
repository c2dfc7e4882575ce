"""Two attentions of the same queries over disjoint keys made one (merge.cu): cascades over shared prefixes.

Knows outputs and logarithms of sums. It must not know who computed them, nor which keys they saw.
"""

from __future__ import annotations

from functools import cache

import torch

from ridgeline.core.errors import InvalidArgument
from ridgeline.kernels.cuda.instances import Instances
from ridgeline.kernels.cuda.nvrtc import INT64, POINTER, Kernel

FILE, ROWS = "merge.cu", 8
HEAD_DIMS = (64, 96, 128, 192, 256)
DTYPES = (torch.bfloat16, torch.float16)


@cache
def _kernel(dtype: torch.dtype, head_dim: int, dependent: bool) -> Kernel:
    defines = {"HALF": int(dtype == torch.float16), "HEAD_DIM": head_dim}
    return Kernel(FILE, "merge", (*[POINTER] * 6, INT64), defines, dependent=dependent)


def merge_attended(
    first: torch.Tensor, first_lse: torch.Tensor, second: torch.Tensor, second_lse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs [T, H, D] (bf16, fp16) and natural logarithms of sums [T, H] (fp32) of two attentions -> of both.

    A sink must be in one of the two alone. A side with -inf (it saw no key) counts for nothing, whatever its
    output holds. Launches on the current stream; may be captured. Raises InvalidArgument if the four do not
    belong together.
    """
    if first.dtype not in DTYPES or first.dim() != 3 or first.shape[2] not in HEAD_DIMS or first.device.type != "cuda":
        found = f"{list(first.shape)} of {first.dtype} on {first.device}"
        raise InvalidArgument(
            "first", f"must be [T, H, D] of bf16 or fp16, D one of {HEAD_DIMS}, on a GPU, not {found}"
        )
    logs = torch.float32, first.shape[:2]
    for name, tensor, dtype, shape in (
        ("first", first, first.dtype, first.shape),
        ("second", second, first.dtype, first.shape),
        ("first_lse", first_lse, *logs),
        ("second_lse", second_lse, *logs),
    ):
        if (
            tensor.dtype != dtype
            or tensor.shape != shape
            or tensor.device != first.device
            or not tensor.is_contiguous()
        ):
            raise InvalidArgument(name, f"must be contiguous {list(shape)} of {dtype} on {first.device}")
    out, lse = torch.empty_like(first), torch.empty_like(first_lse)
    rows = first_lse.numel()
    if rows:
        dependent = torch.cuda.get_device_capability(first.device) >= (9, 0)
        kernel = _kernel(first.dtype, first.shape[2], dependent)
        kernel.launch((-(-rows // ROWS), 1, 1), 32 * ROWS, 0, first, first_lse, second, second_lse, out, lse, rows)
    return out, lse


INSTANCES = Instances(FILE, ("sm_80", "sm_86", "sm_90"), {"HALF": (0, 1), "HEAD_DIM": HEAD_DIMS})
