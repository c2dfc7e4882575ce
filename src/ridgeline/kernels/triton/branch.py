"""`branch` in one launch: a program for each request, a lane for each child.

Knows chances, ancestor bits and slots. It must not know models. A child's score and its place are one integer that
orders by score, then by the earlier place: the best is one maximum, and what is taken is struck out.
"""

import torch
import triton
import triton.language as tl

from ridgeline.kernels.triton.dependent import dependent, ready, starting
from ridgeline.ops.branch import branch
from ridgeline.ops.op import cuda

LAST: tl.constexpr = tl.constexpr(0x7FFFFFFF)


@triton.jit(
    do_not_specialize=["record_stride", "table_stride", "table_width", "depths"],
    do_not_specialize_on_alignment=[
        "proposed", "chances", "above", "tree", "ids", "positions", "following", "slots", "lengths", "tails", "record",
        "levels", "starts", "tables", "odds", "edges", "widths",
    ],
)  # fmt: skip
def _branch_kernel(
    proposed: tl.tensor,
    chances: tl.tensor,
    above: tl.tensor,
    tree: tl.tensor,
    ids: tl.tensor,
    positions: tl.tensor,
    following: tl.tensor,
    slots: tl.tensor,
    lengths: tl.tensor,
    tails: tl.tensor,
    record: tl.tensor,
    levels: tl.tensor,
    starts: tl.tensor,
    tables: tl.tensor,
    odds: tl.tensor,
    edges: tl.tensor,
    widths: tl.tensor,
    record_stride: tl.tensor,
    table_stride: tl.tensor,
    table_width: tl.tensor,
    depths: tl.tensor,
    PAGE: tl.constexpr,
    ROWS: tl.constexpr,
    BEAM: tl.constexpr,
    WIDTH: tl.constexpr,
    CLASSES: tl.constexpr,
    WORDS: tl.constexpr,
    PADDED: tl.constexpr,
    LANES: tl.constexpr,
    SIDES: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    starting(EARLY)
    ready(EARLY)
    request = tl.program_id(0)
    level = tl.load(levels + request)
    start = tl.load(starts + request)
    lane = tl.arange(0, LANES)
    inside = lane < ROWS * WIDTH
    row, rank = lane // WIDTH, lane % WIDTH
    child = request * ROWS * WIDTH + lane
    token = tl.load(proposed + child, mask=inside, other=0)
    q = tl.load(chances + child, mask=inside, other=0.0)
    kind = tl.zeros((LANES,), tl.int32)
    for edge in tl.static_range(CLASSES - 1):
        kind += (q >= tl.load(edges + edge)).to(tl.int32)
    some = inside & (rank < tl.load(widths + tl.minimum(level, depths - 1)))
    chance = tl.load(odds + rank * CLASSES + kind, mask=some, other=0.0)
    score = tl.load(above + request * BEAM + row, mask=some, other=0.0) * chance
    ranked = (score.to(tl.int32, bitcast=True).to(tl.int64) << 32) | (lane ^ LAST).to(tl.int64)
    ranked = tl.where(some & (score > 0), ranked, 0)

    cell = 2 * WIDTH + 1
    told = record + level.to(tl.int64) * record_stride + request * BEAM * cell
    tl.store(told + row * cell + rank, token.to(tl.int32), mask=inside)
    tl.store(told + row * cell + WIDTH + rank, q.to(tl.int32, bitcast=True), mask=inside)
    for empty in tl.static_range(ROWS, BEAM):
        tl.store(
            told + empty * cell + tl.arange(0, SIDES),
            tl.zeros((SIDES,), tl.int32),
            mask=tl.arange(0, SIDES) < 2 * WIDTH,
        )

    # Paths are read before any is written: a row's children may stand in another row.
    beams = tl.arange(0, BEAM)
    chosen = tl.full((BEAM,), -1, tl.int32)
    for place in tl.static_range(BEAM):
        top = tl.max(ranked, axis=0)
        found = tl.where(top > 0, ((top & 0xFFFFFFFF) ^ LAST).to(tl.int32), -1)
        chosen = tl.where(beams == place, found, chosen)
        ranked = tl.where(ranked == top, 0, ranked)
    real = chosen >= 0
    parent = tl.where(real, chosen // WIDTH, 0)
    own = level * BEAM + beams
    own_row = request * BEAM + beams
    best = tl.load(above + request * BEAM + parent, mask=real, other=0.0)
    picked = request * ROWS * WIDTH + tl.where(real, chosen, 0)
    q_of = tl.load(chances + picked, mask=real, other=0.0)
    kind_of = tl.zeros((BEAM,), tl.int32)
    for edge in tl.static_range(CLASSES - 1):
        kind_of += (q_of >= tl.load(edges + edge)).to(tl.int32)
    best *= tl.load(odds + tl.where(real, chosen % WIDTH, 0) * CLASSES + kind_of, mask=real, other=0.0)
    words = tl.arange(0, PADDED)
    kept = words[None, :] < WORDS
    path = tl.load(
        tree + (request * BEAM + parent)[:, None] * WORDS + words[None, :], mask=real[:, None] & kept, other=0
    )
    bit = tl.where(own[:, None] // 32 == words[None, :], 1 << (own[:, None] % 32), 0)
    tl.debug_barrier()
    tl.store(tree + own_row[:, None] * WORDS + words[None, :], path | bit, mask=kept & (beams[:, None] >= 0))
    tl.store(above + own_row, best)
    tl.store(told + beams * cell + 2 * WIDTH, chosen)
    there = start >= 0
    tl.store(ids + own_row, tl.load(proposed + picked, mask=real, other=0))
    position = tl.where(there, start + level, 0).to(tl.int64)
    tl.store(positions + own_row, tl.zeros((BEAM,), tl.int64) + position)
    tl.store(following + own_row, tl.zeros((BEAM,), tl.int64) + tl.where(there, position + 1, 0))
    slot = tl.where(there, start, 0) + own
    page = tl.minimum(slot // PAGE, table_width - 1)
    block = tl.load(tables + request.to(tl.int64) * table_stride + page).to(tl.int64)
    tl.store(slots + own_row, tl.where(there, block * PAGE + slot % PAGE, -1))
    tail = tl.where(there, (level + 1) * BEAM, 0)
    tl.store(tails + request, tail)
    tl.store(lengths + request, tl.where(there, start + tail, 0))
    tl.store(levels + request, level + 1)


def _accepts(
    proposed: torch.Tensor, chances: torch.Tensor, above: torch.Tensor, *others: object, **more: object
) -> str | None:
    beam = above.shape[1]
    return f"takes beams of a power of two, not {beam}" if beam & (beam - 1) else None


@branch.kernel("triton", needs=cuda(80), accepts=_accepts, invariant=True)
def branch_triton(
    proposed: torch.Tensor,
    chances: torch.Tensor,
    above: torch.Tensor,
    tree: torch.Tensor,
    ids: torch.Tensor,
    positions: torch.Tensor,
    following: torch.Tensor,
    slots: torch.Tensor,
    lengths: torch.Tensor,
    tails: torch.Tensor,
    record: torch.Tensor,
    levels: torch.Tensor,
    starts: torch.Tensor,
    tables: torch.Tensor,
    odds: torch.Tensor,
    edges: torch.Tensor,
    widths: torch.Tensor,
    block_size: int,
) -> None:
    """The reference's numbers, to the bit. All tensors but tables and record[0] are contiguous."""
    requests, beam = above.shape
    if not requests:
        return
    rows, width = proposed.shape[0] // requests, proposed.shape[1]
    _branch_kernel[(requests,)](
        proposed, chances, above, tree, ids, positions, following, slots, lengths, tails, record, levels, starts,
        tables, odds, edges, widths, record.stride(0), tables.stride(0), tables.shape[1], widths.shape[0],
        PAGE=block_size, ROWS=rows, BEAM=beam, WIDTH=width, CLASSES=odds.shape[1], WORDS=tree.shape[1],
        PADDED=triton.next_power_of_2(tree.shape[1]), LANES=triton.next_power_of_2(rows * width),
        SIDES=triton.next_power_of_2(2 * width), num_warps=1, **dependent(proposed.device),
    )  # fmt: skip
