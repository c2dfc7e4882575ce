"""RMSNorm and LayerNorm with the residual addition in front, one pass over the row.

Knows rows that fit a program's registers. It must not know what follows. A row is read once, kept in
fp32, and written once; the sum goes over the residual it came from.
"""

import torch
import triton
import triton.language as tl

from ridgeline.kernels.triton.dependent import dependent, ready, starting
from ridgeline.ops.norm import layer_norm, norm
from ridgeline.ops.op import cuda

MAX_WIDTH = 16384
TILE = 2048  # elements that a program takes at least: narrow rows share a program


def _warps(elements: int) -> int:
    """Warps for a tile of this many elements: 8 to 32 of them a thread."""
    if elements <= 2048:
        return 4
    return 8 if elements <= 4096 else 16


@triton.jit(do_not_specialize=["rows"])
def _rms_kernel(
    x: tl.tensor,
    residual: tl.tensor,
    weight: tl.tensor,
    out: tl.tensor,
    rows: tl.tensor,
    x_stride: tl.tensor,
    residual_stride: tl.tensor,
    eps: tl.tensor,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    starting(EARLY)
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    mask = (row < rows) & (column < WIDTH)
    factor = tl.load(weight + column, mask=column < WIDTH, other=0.0)
    ready(EARLY)
    total = tl.load(x + row * x_stride + column, mask=mask, other=0.0)
    if residual is not None:
        place = residual + row * residual_stride + column
        # Added in fp32 and rounded once: what the stream of residuals holds is also what is normalized.
        total = (total.to(tl.float32) + tl.load(place, mask=mask, other=0.0).to(tl.float32)).to(total.dtype)
        tl.store(place, total, mask=mask)
    wide = total.to(tl.float32)
    mean = tl.sum(wide * wide, axis=1) / WIDTH
    scaled = (wide * tl.rsqrt(mean + eps)[:, None]).to(total.dtype)
    result = factor.to(tl.float32) * scaled.to(tl.float32)
    tl.store(out + row * WIDTH + column, result.to(total.dtype), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def _layer_norm_kernel(
    x: tl.tensor,
    residual: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    rows: tl.tensor,
    x_stride: tl.tensor,
    residual_stride: tl.tensor,
    eps: tl.tensor,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    starting(EARLY)
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    mask = (row < rows) & (column < WIDTH)
    factor = tl.load(weight + column, mask=column < WIDTH, other=0.0)
    shift = tl.load(bias + column, mask=column < WIDTH, other=0.0)
    ready(EARLY)
    total = tl.load(x + row * x_stride + column, mask=mask, other=0.0)
    if residual is not None:
        place = residual + row * residual_stride + column
        total = (total.to(tl.float32) + tl.load(place, mask=mask, other=0.0).to(tl.float32)).to(total.dtype)
        tl.store(place, total, mask=mask)
    wide = total.to(tl.float32)
    # Two passes over registers: a variance from sums of squares would cancel where the mean is large.
    centred = tl.where(column < WIDTH, wide - (tl.sum(wide, axis=1) / WIDTH)[:, None], 0.0)
    variance = tl.sum(centred * centred, axis=1) / WIDTH
    scaled = centred * tl.rsqrt(variance + eps)[:, None]
    result = scaled * factor.to(tl.float32) + shift.to(tl.float32)
    tl.store(out + row * WIDTH + column, result.to(total.dtype), mask=mask)


def _refuse(x: torch.Tensor, *others: torch.Tensor | None) -> str | None:
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"takes fp32, bf16 and fp16, not {x.dtype}"
    if x.shape[-1] > MAX_WIDTH:
        return f"takes rows of at most {MAX_WIDTH}, not {x.shape[-1]}"
    for other in others:
        if other is not None and other.dtype != x.dtype:
            return f"takes arguments of one dtype, not {x.dtype} and {other.dtype}"
    return None


def _accepts_norm(x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float) -> str | None:
    return _refuse(x, residual, weight)


def _accepts_layer_norm(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> str | None:
    return _refuse(x, residual, weight, bias)


def _by_rows(x: torch.Tensor) -> torch.Tensor:
    """x with its last dimension contiguous: the kernels follow a stride between rows alone."""
    return x if x.stride(-1) == 1 else x.contiguous()


@norm.kernel("triton", needs=cuda(80), accepts=_accepts_norm, invariant=True)
def norm_triton(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """One launch; `residual` is overwritten with the sum and returned."""
    rows, width = x.shape
    out = torch.empty(rows, width, device=x.device, dtype=x.dtype)
    if rows:
        x, residual = _by_rows(x), None if residual is None else _by_rows(residual)
        block = triton.next_power_of_2(width)
        share = max(1, TILE // block)
        _rms_kernel[(triton.cdiv(rows, share),)](
            x,
            residual,
            weight,
            out,
            rows,
            x.stride(0),
            0 if residual is None else residual.stride(0),
            eps,
            WIDTH=width,
            BLOCK=block,
            ROWS=share,
            num_warps=_warps(block * share),
            **dependent(x.device),
        )
    return out, x if residual is None else residual


@layer_norm.kernel("triton", needs=cuda(80), accepts=_accepts_layer_norm, invariant=True)
def layer_norm_triton(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """One launch; `residual` is overwritten with the sum and returned."""
    rows, width = x.shape
    out = torch.empty(rows, width, device=x.device, dtype=x.dtype)
    if rows:
        x, residual = _by_rows(x), None if residual is None else _by_rows(residual)
        block = triton.next_power_of_2(width)
        share = max(1, TILE // block)
        _layer_norm_kernel[(triton.cdiv(rows, share),)](
            x,
            residual,
            weight,
            bias,
            out,
            rows,
            x.stride(0),
            0 if residual is None else residual.stride(0),
            eps,
            WIDTH=width,
            BLOCK=block,
            ROWS=share,
            num_warps=_warps(block * share),
            **dependent(x.device),
        )
    return out, x if residual is None else residual
