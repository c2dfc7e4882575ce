"""A mixture of experts as two grouped matrix products over tokens sorted by expert.

Knows routing's result and experts' weights. It must not know the layer around it. Each of the T k
choices (token, expert) becomes a row; rows of an expert lie together, offsets on the device say where,
and a program finds its tile of rows by counting the tiles before it. Nothing waits for the host, no
atomics: the same inputs give the same bits.

    route (torch) -> sort -> [rows, I] = act(x Wg.T) * (x Wu.T) -> [T k, D] = weight * (h Wd.T) -> sum over k
"""

import torch
import triton
import triton.language as tl

from ridgeline.kernels.triton.activation import ACTIVATIONS, gated
from ridgeline.kernels.triton.machine import machine_of
from ridgeline.kernels.triton.product import Tile, fitted, plus_product, product
from ridgeline.ops.moe import moe, route
from ridgeline.ops.op import cuda
from ridgeline.ops.weight import Weight

MAX_EXPERTS = 1024
COUNTED = 4096
"""The most rows that are sorted by counting, n^2 comparisons in one launch; more go to torch's radix sort."""
COUNT_BLOCK = 128
COMPARED = 32  # rows that a block is compared with at a time

ROWS = (16, 32, 64, 128)
"""Heights of a tile; the least that holds twice an expert's average share of the rows is taken: at the share
itself every other expert would need a second tile, and read its weights twice."""

STEADY_ROWS = 64
"""The height of every tile where the number of rows must not matter."""
SUMMED = 1024  # columns of a token that a program adds up

# By bytes an element and height, timed on an H200 with Mixtral-8x7B's and Qwen3-30B-A3B's shapes (docs/log.md).
# The first product has two accumulators, one for each half.
GATE_UP = {
    (2, 16): Tile(64, 128, 4, 3),
    (2, 32): Tile(64, 128, 4, 3),
    (2, 64): Tile(64, 64, 4, 4),
    (2, 128): Tile(128, 64, 8, 4),
    (4, 16): Tile(16, 32, 4, 3),
    (4, 32): Tile(32, 32, 4, 3),
    (4, 64): Tile(32, 32, 4, 3),
    (4, 128): Tile(32, 32, 8, 3),
}
DOWN = {
    (2, 16): Tile(64, 128, 4, 4),
    (2, 32): Tile(128, 64, 4, 4),
    (2, 64): Tile(128, 64, 4, 3),
    (2, 128): Tile(256, 64, 8, 4),
    (4, 16): Tile(32, 32, 4, 3),
    (4, 32): Tile(32, 32, 4, 3),
    (4, 64): Tile(32, 32, 4, 3),
    (4, 128): Tile(32, 32, 8, 3),
}


@triton.jit(do_not_specialize=["rows", "experts"])
def _count_kernel(
    choices: tl.tensor,
    order: tl.tensor,
    offsets: tl.tensor,
    rows: tl.tensor,
    experts: tl.tensor,
    BLOCK: tl.constexpr,
    COMPARED: tl.constexpr,
) -> None:
    """Stable sort by counting: a row's place is how many have a lower expert, or the same and come before.

    The first programs place BLOCK rows each, the others work out BLOCK offsets each.
    """
    row_blocks = (rows + BLOCK - 1) // BLOCK
    block = tl.program_id(0)
    sorts = block < row_blocks
    mine = tl.where(sorts, block, block - row_blocks) * BLOCK + tl.arange(0, BLOCK)
    if sorts:
        expert = tl.load(choices + mine, mask=mine < rows, other=0).to(tl.int32)
        turn = mine
    else:
        # An offset is the place that a row of this expert before all others would take.
        expert = mine
        turn = tl.zeros_like(mine)
    place = tl.zeros((BLOCK,), tl.int32)
    for base in range(0, rows, COMPARED):
        other = base + tl.arange(0, COMPARED)
        theirs = tl.load(choices + other, mask=other < rows, other=0x7FFFFFFF).to(tl.int32)[None, :]
        before = (theirs < expert[:, None]) | ((theirs == expert[:, None]) & (other[None, :] < turn[:, None]))
        place += tl.sum(before.to(tl.int32), axis=1)
    if sorts:
        tl.store(order + place, mine, mask=mine < rows)
    else:
        tl.store(offsets + mine, place, mask=mine <= experts)


@triton.jit
def _expert_of(
    offsets: tl.tensor, tile: tl.tensor, EXPERTS: tl.constexpr, BLOCK_E: tl.constexpr, ROWS: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """(expert, first row, end of its rows) of a tile of sorted rows; expert is EXPERTS if it is left over."""
    index = tl.arange(0, BLOCK_E)
    begin = tl.load(offsets + index, mask=index < EXPERTS, other=0)
    end = tl.load(offsets + index + 1, mask=index < EXPERTS, other=0)
    tiles = (end - begin + ROWS - 1) // ROWS
    ends = tl.cumsum(tiles, axis=0)
    mine = (tile < ends) & (tile >= ends - tiles)
    expert = tl.min(tl.where(mine, index, EXPERTS), axis=0)
    first = tl.sum(tl.where(mine, begin + (tile - (ends - tiles)) * ROWS, 0), axis=0)
    last = tl.sum(tl.where(mine, end, 0), axis=0)
    return expert, first, last


@triton.jit(do_not_specialize=["tiles"])
def _gate_up_kernel(
    x: tl.tensor,
    gate_up: tl.tensor,
    order: tl.tensor,
    offsets: tl.tensor,
    hidden: tl.tensor,
    tiles: tl.tensor,
    x_stride: tl.tensor,
    TOP_K: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    WIDTH: tl.constexpr,
    INNER: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
) -> None:
    """hidden[i] = gate(x[order[i] // k] @ gate_up[expert].T) for a tile of sorted rows i."""
    # Tiles of rows change fastest: those of one expert run together and share its weights in the cache.
    expert, first, end = _expert_of(offsets, tl.program_id(0) % tiles, EXPERTS, BLOCK_E, ROWS)
    if expert >= EXPERTS:
        return
    row = first + tl.arange(0, ROWS)
    column = tl.program_id(0) // tiles * COLUMNS + tl.arange(0, COLUMNS)
    depth = tl.arange(0, STEP)
    live = row < end
    token = (tl.load(order + row, mask=live, other=0) // TOP_K).to(tl.int64)
    # Columns past the end read the last one instead: cheaper than a mask on the stream of weights.
    read = expert.to(tl.int64) * (2 * INNER) + tl.minimum(column, INNER - 1)
    x_at = x + (token * x_stride)[:, None] + depth[None, :]
    gate_at = gate_up + (read * WIDTH)[None, :] + depth[:, None]
    up_at = gate_at + INNER * WIDTH
    gates = tl.zeros((ROWS, COLUMNS), tl.float32)
    ups = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, WIDTH, STEP):
        inside = depth < WIDTH - start
        part = tl.load(x_at + start, mask=live[:, None] & inside[None, :], other=0.0)
        gate_part = tl.load(gate_at + start, mask=inside[:, None], other=0.0)
        up_part = tl.load(up_at + start, mask=inside[:, None], other=0.0)
        gates = plus_product(gates, part, gate_part)
        ups = plus_product(ups, part, up_part)
    target = hidden + (row.to(tl.int64) * INNER)[:, None] + column[None, :]
    tl.store(target, gated(gates, ups, ACTIVATION, hidden), mask=live[:, None] & (column < INNER)[None, :])


@triton.jit(do_not_specialize=["tiles"])
def _down_kernel(
    hidden: tl.tensor,
    down: tl.tensor,
    order: tl.tensor,
    offsets: tl.tensor,
    weights: tl.tensor,
    parts: tl.tensor,
    tiles: tl.tensor,
    EXPERTS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    WIDTH: tl.constexpr,
    INNER: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
) -> None:
    """parts[order[i]] = weights[order[i]] * hidden[i] @ down[expert].T: rows go back to their tokens' order."""
    expert, first, end = _expert_of(offsets, tl.program_id(0) % tiles, EXPERTS, BLOCK_E, ROWS)
    if expert >= EXPERTS:
        return
    row = first + tl.arange(0, ROWS)
    column = tl.program_id(0) // tiles * COLUMNS + tl.arange(0, COLUMNS)
    depth = tl.arange(0, STEP)
    live = row < end
    choice = tl.load(order + row, mask=live, other=0).to(tl.int64)
    factor = tl.load(weights + choice, mask=live, other=0.0).to(tl.float32)
    read = expert.to(tl.int64) * WIDTH + tl.minimum(column, WIDTH - 1)
    hidden_at = hidden + (row.to(tl.int64) * INNER)[:, None] + depth[None, :]
    down_at = down + (read * INNER)[None, :] + depth[:, None]
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, INNER, STEP):
        inside = depth < INNER - start
        part = tl.load(hidden_at + start, mask=live[:, None] & inside[None, :], other=0.0)
        sums = plus_product(sums, part, tl.load(down_at + start, mask=inside[:, None], other=0.0))
    target = parts + (choice * WIDTH)[:, None] + column[None, :]
    result = (sums * factor[:, None]).to(parts.dtype.element_ty)
    tl.store(target, result, mask=live[:, None] & (column < WIDTH)[None, :])


@triton.jit
def _route_kernel(
    scores: tl.tensor,
    weights: tl.tensor,
    experts: tl.tensor,
    RENORMALIZE: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK_E: tl.constexpr,
) -> None:
    """A token's k best of softmax(scores), the best first."""
    token = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, BLOCK_E)
    slot = tl.arange(0, BLOCK_K)
    real = expert < EXPERTS
    logits = tl.load(scores + token * EXPERTS + expert, mask=real, other=float("-inf")).to(tl.float32)
    odds = tl.exp(logits - tl.max(logits, axis=0))
    odds = tl.where(real, odds / tl.sum(odds, axis=0), -1.0)
    chosen = tl.zeros((BLOCK_K,), tl.int32)
    kept = tl.zeros((BLOCK_K,), tl.float32)
    for place in tl.static_range(TOP_K):
        best = tl.max(odds, axis=0)
        # (Scores that are no numbers still name an expert that there is.)
        one = tl.minimum(tl.min(tl.where(odds == best, expert, BLOCK_E), axis=0), EXPERTS - 1)
        chosen = tl.where(slot == place, one, chosen)
        kept = tl.where(slot == place, best, kept)
        odds = tl.where(expert == one, -1.0, odds)
    if RENORMALIZE:
        kept /= tl.sum(kept, axis=0)
    tl.store(experts + token * TOP_K + slot, chosen, mask=slot < TOP_K)
    tl.store(weights + token * TOP_K + slot, kept, mask=slot < TOP_K)


@triton.jit
def _sum_kernel(
    parts: tl.tensor, out: tl.tensor, WIDTH: tl.constexpr, TOP_K: tl.constexpr, BLOCK: tl.constexpr
) -> None:
    """out[t] = parts[t, 0] + parts[t, 1] + ..., fp32 in this order."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    sums = tl.zeros((BLOCK,), tl.float32)
    for place in tl.static_range(TOP_K):
        sums += tl.load(parts + (token * TOP_K + place) * WIDTH + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + token * WIDTH + column, sums.to(out.dtype.element_ty), mask=inside)


def sorted_by_expert(experts: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(order, offsets) of choices [N], stable: expert e owns order[offsets[e]] .. order[offsets[e + 1]].

    Both int32, [N] and [count + 1]. No length of theirs is read by the host (bincount would be).
    """
    rows = experts.numel()
    if rows > COUNTED:
        ordered, order = experts.sort(stable=True)
        bounds = torch.arange(count + 1, device=experts.device, dtype=experts.dtype)
        return order.to(torch.int32), torch.searchsorted(ordered, bounds, out_int32=True)
    order = torch.empty(rows, device=experts.device, dtype=torch.int32)
    offsets = torch.empty(count + 1, device=experts.device, dtype=torch.int32)
    blocks = triton.cdiv(rows, COUNT_BLOCK) + triton.cdiv(count + 1, COUNT_BLOCK)
    _count_kernel[(blocks,)](experts, order, offsets, rows, count, BLOCK=COUNT_BLOCK, COMPARED=COMPARED, num_warps=4)
    return order, offsets


def _accepts(
    x: torch.Tensor,
    router: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    top_k: int,
    renormalize: bool,
    activation: str = "silu",
) -> str | None:
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"takes fp32, bf16 and fp16, not {x.dtype}"
    if gate_up.dtype != x.dtype or down.dtype != x.dtype:
        return f"takes weights of x's dtype {x.dtype}, not {gate_up.dtype}"
    if gate_up.shape[0] > MAX_EXPERTS:
        return f"takes at most {MAX_EXPERTS} experts, not {gate_up.shape[0]}"
    if x.shape[1] % 8 or down.shape[2] % 8:
        return f"takes widths that are multiples of 8, not {x.shape[1]} and {down.shape[2]}"
    if activation not in ACTIVATIONS:
        return f"knows no activation {activation!r}"
    return None


def moe_steady(
    x: torch.Tensor,
    router: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    top_k: int,
    renormalize: bool,
    activation: str = "silu",
) -> torch.Tensor:
    """`moe_triton`, batch-invariant: tiles of one height, routing and the sum row by row by our own kernels.

    Of experts that are equally likely the first is taken.
    """
    tokens, width = x.shape
    if not tokens:
        return torch.empty_like(x)
    count = router.shape[0]
    weights = torch.empty(tokens, top_k, device=x.device, dtype=torch.float32)
    experts = torch.empty(tokens, top_k, device=x.device, dtype=torch.int32)
    _route_kernel[(tokens,)](
        product(x, Weight.dense_from(router)),
        weights,
        experts,
        RENORMALIZE=renormalize,
        TOP_K=top_k,
        BLOCK_K=triton.next_power_of_2(top_k),
        EXPERTS=count,
        BLOCK_E=triton.next_power_of_2(count),
        num_warps=1,
    )
    parts = _parts(x, weights, experts, gate_up, down, STEADY_ROWS, activation)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    _sum_kernel[(tokens, triton.cdiv(width, SUMMED))](parts, out, WIDTH=width, TOP_K=top_k, BLOCK=SUMMED, num_warps=4)
    return out


@moe.kernel("triton", needs=cuda(80), accepts=_accepts, invariant=moe_steady)
def moe_triton(
    x: torch.Tensor,
    router: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    top_k: int,
    renormalize: bool,
    activation: str = "silu",
) -> torch.Tensor:
    """Routing by torch, one launch to sort, two grouped products, and torch's sum over a token's k parts.

    Workspace: T k (I + D) elements of x's dtype. Expects contiguous experts' weights.
    """
    if not x.shape[0]:
        return torch.empty_like(x)
    weights, experts = route(x, router, top_k, renormalize)
    rows = experts.numel()
    height = next((height for height in ROWS if height * router.shape[0] >= 2 * rows), ROWS[-1])
    return _parts(x, weights, experts, gate_up, down, height, activation).sum(1)


def _parts(
    x: torch.Tensor,
    weights: torch.Tensor,
    experts: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    height: int,
    activation: str,
) -> torch.Tensor:
    """What each choice adds to its token: [T, k, D] of weights and experts [T, k]. height: rows of a tile."""
    assert gate_up.is_contiguous()
    assert down.is_contiguous()
    tokens, width = x.shape
    top_k = experts.shape[1]
    count, inner = gate_up.shape[0], gate_up.shape[1] // 2
    x = x if x.stride(1) == 1 else x.contiguous()
    rows = tokens * top_k
    order, offsets = sorted_by_expert(experts.flatten(), count)
    # Every tile but an expert's last is full, and an expert with a tile has a row.
    tiles = min(rows, rows // height + count)
    block_e = triton.next_power_of_2(count)
    hidden = torch.empty(rows, inner, device=x.device, dtype=x.dtype)
    parts = torch.empty(tokens, top_k, width, device=x.device, dtype=x.dtype)
    shared = machine_of(x.device).shared_bytes
    tile = fitted(GATE_UP[x.element_size(), height], height, 2, x.element_size(), shared)
    _gate_up_kernel[(tiles * triton.cdiv(inner, tile.columns),)](
        x,
        gate_up,
        order,
        offsets,
        hidden,
        tiles,
        x.stride(0),
        TOP_K=top_k,
        EXPERTS=count,
        BLOCK_E=block_e,
        WIDTH=width,
        INNER=inner,
        ACTIVATION=activation,
        ROWS=height,
        COLUMNS=tile.columns,
        STEP=tile.step,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    tile = fitted(DOWN[x.element_size(), height], height, 1, x.element_size(), shared)
    _down_kernel[(tiles * triton.cdiv(width, tile.columns),)](
        hidden,
        down,
        order,
        offsets,
        weights,
        parts,
        tiles,
        EXPERTS=count,
        BLOCK_E=block_e,
        WIDTH=width,
        INNER=inner,
        ROWS=height,
        COLUMNS=tile.columns,
        STEP=tile.step,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return parts
