"""Matrix products in tiles: how one is cut and added up, and x @ W.T in tiles that no number of rows changes.

Knows tiles, shared memory and the order of additions. It must not know which op a product belongs to.

The tiles of `product` follow from the weight and the GPU alone, and each output is one chain of sums over the inputs,
so that a row's result is the same in any batch (He, "Defeating nondeterminism in LLM inference", 2025). That costs
speed at either end: 64 rows a tile are too many for one token's weights to stream at full rate, and too few for the
tensor cores to be kept busy by a long prompt.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ridgeline.kernels.triton.activation import activated
from ridgeline.kernels.triton.dependent import dependent, ready, starting
from ridgeline.kernels.triton.machine import Machine, machine_of
from ridgeline.ops.weight import Weight


class Tile(NamedTuple):
    """Columns and inputs a step of a tile, and how a program of it is compiled."""

    columns: int
    step: int
    warps: int
    stages: int


ROWS = 64
"""Of every tile of `product`: the least that Hopper's tensor cores take from four warps at once."""

# By bytes an element. WIDE where it gives every multiprocessor a program, NARROW elsewhere. Not timed yet.
WIDE = {2: Tile(128, 64, 4, 4), 4: Tile(32, 32, 4, 3)}
NARROW = {2: Tile(64, 128, 4, 4), 4: Tile(32, 32, 4, 3)}


def fitted(tile: Tile, rows: int, halves: int, element_bytes: int, shared_bytes: int) -> Tile:
    """The tile with as many stages as shared memory holds; the tables are written for Hopper's 227 KiB.

    halves: matrices that share the left side. Tiles of less than 64 rows go through mma.sync, which is done with a
    step before the next one is asked for: a stage less.
    """
    stage = (rows + halves * tile.columns) * tile.step * element_bytes
    held = shared_bytes // stage + (rows < 64)
    return tile._replace(stages=max(1, min(tile.stages, held)))


@triton.jit
def plus_product(sums: tl.tensor, left: tl.tensor, right: tl.tensor) -> tl.tensor:
    """sums + left @ right, fp32.

    Factors in fp32 are added up step by step before the steps are: in one chain of thousands of additions
    the last three bits are lost. Triton would make one chain of `sums + product`; a difference it leaves alone.
    """
    if left.dtype == tl.float32:
        result = sums - tl.dot(-left, right, input_precision="ieee")
    else:
        result = tl.dot(left, right, sums)
    return result


@triton.jit
def plus_exactly(sums: tl.tensor, lost: tl.tensor, left: tl.tensor, right: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """sums + left @ right in fp32, and what rounding added too much: Kahan's summation over steps.

    The chain of steps lost more than each step's own sums: 128 steps of 32 inputs had twice the error of a product that
    spreads one token's inputs over threads. Elementwise, so that it costs little beside a product in fp32.
    """
    step = tl.dot(left, right, input_precision="ieee") - lost
    total = sums + step
    return total, (total - sums) - step


@triton.jit(do_not_specialize=["tokens"])
def _product_kernel(
    x: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    tokens: tl.tensor,
    x_stride: tl.tensor,
    WIDTH: tl.constexpr,
    OUTPUTS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    # Tiles of rows change fastest: those that run together share their columns' weights in the cache.
    tiles = (tokens + ROWS - 1) // ROWS
    row = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) // tiles * COLUMNS + tl.arange(0, COLUMNS)
    depth = tl.arange(0, STEP)
    live = row < tokens
    # Columns past the end read the last one instead: cheaper than a mask on the stream of weights.
    read = tl.minimum(column, OUTPUTS - 1).to(tl.int64)
    x_at = x + (row.to(tl.int64) * x_stride)[:, None] + depth[None, :]
    weight_at = weight + (read * WIDTH)[None, :] + depth[:, None]
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    lost = tl.zeros((ROWS, COLUMNS), tl.float32)
    ready(EARLY)
    for start in range(0, WIDTH, STEP):
        inside = depth < WIDTH - start
        part = tl.load(x_at + start, mask=live[:, None] & inside[None, :], other=0.0)
        weights = tl.load(weight_at + start, mask=inside[:, None], other=0.0)
        if part.dtype == tl.float32:
            sums, lost = plus_exactly(sums, lost, part, weights)
        else:
            sums = plus_product(sums, part, weights)
    starting(EARLY)
    if bias is not None:
        sums += tl.load(bias + column, mask=column < OUTPUTS, other=0.0).to(tl.float32)[None, :]
    result = sums.to(out.dtype.element_ty)
    if ACTIVATION is not None:
        result = activated(result.to(tl.float32), ACTIVATION).to(out.dtype.element_ty)
    target = out + (row.to(tl.int64) * OUTPUTS)[:, None] + column[None, :]
    tl.store(target, result, mask=live[:, None] & (column < OUTPUTS)[None, :])


def tile_of(outputs: int, element_bytes: int, machine: Machine) -> Tile:
    """How the products with a weight of so many outputs are cut on a GPU, whatever the number of rows."""
    wide = WIDE[element_bytes]
    tile = wide if outputs >= wide.columns * machine.multiprocessors else NARROW[element_bytes]
    return fitted(tile, ROWS, 1, element_bytes, machine.shared_bytes)


def product(
    x: torch.Tensor, weight: Weight, bias: torch.Tensor | None = None, activation: str | None = None
) -> torch.Tensor:
    """activation(x @ W.T + bias): x [T, in_features] -> [T, out_features], batch-invariant. The weight is dense."""
    tokens, outputs = x.shape[0], weight.out_features
    out = torch.empty(tokens, outputs, device=x.device, dtype=x.dtype)
    if not tokens:
        return out
    x = x if x.stride(-1) == 1 else x.contiguous()
    assert weight.format == "dense"
    assert weight.data.is_contiguous()
    tile = tile_of(outputs, x.element_size(), machine_of(x.device))
    _product_kernel[(triton.cdiv(tokens, ROWS) * triton.cdiv(outputs, tile.columns),)](
        x,
        weight.data,
        bias,
        out,
        tokens,
        x.stride(0),
        WIDTH=weight.in_features,
        OUTPUTS=outputs,
        ACTIVATION=activation,
        ROWS=ROWS,
        COLUMNS=tile.columns,
        STEP=tile.step,
        num_warps=tile.warps,
        num_stages=tile.stages,
        **dependent(x.device),
    )
    return out
