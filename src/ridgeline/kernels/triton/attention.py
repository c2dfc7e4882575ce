"""Paged flash attention for prefill, decode and whatever mixture of both a step holds.

Knows pages, block tables and lengths that only the device has read. It must not know layers, schedulers
or who shares a page. Two kernels share one inner loop (Dao, "FlashAttention-2", 2307.08691: online
softmax in fp32, base 2, keys in order):

- the *long* kernel takes a tile of rows of one request and one KV head, and all keys that they see;
- the *split* kernel takes fewer rows and a piece of their keys (flash decoding); pieces are as long as
  balances this very batch, worked out by every program from the lengths, and a merge adds them up.

Both pack the query heads that share a KV head into the rows of a tile: row r is token r // group, head
r % group. Which of them run follows from shapes alone, so the choice can be captured in a CUDA graph:

- split alone if T == B (decode), if there are few rows a request (verifying drafts), or if the long
  kernel would leave most of the machine idle (a small chunk over a long context);
- long alone if B == 1;
- else both: requests with few rows take the split kernel, the others the long one; each kernel skips
  the other's requests on the device.

Either is right for any lengths whatever. Rows that belong to no request are left as they are.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ridgeline.kernels.triton.machine import Machine
from ridgeline.kernels.triton.machine import machine_of as _machine
from ridgeline.kernels.triton.ragged import SCAN, sequence_of
from ridgeline.ops.attention import attention
from ridgeline.ops.attention_call import Limits
from ridgeline.ops.op import cuda

LOG2_E = 1.4426950408889634
MAX_HEAD_DIM = 256
MAX_GROUP = 128
EVERY = 1 << 30  # a number of rows that no request exceeds


class Tile(NamedTuple):
    """Rows (tokens x group) and keys of a tile, and how a program of it is compiled."""

    rows: int
    keys: int
    warps: int
    stages: int


# By (bytes an element, head dim rounded up to a power of two; smaller ones take the first entry).
LONG = {
    (2, 64): Tile(128, 64, 4, 3),
    (2, 128): Tile(128, 64, 8, 3),
    (2, 256): Tile(128, 64, 8, 2),
    (4, 64): Tile(32, 16, 8, 2),
    (4, 128): Tile(32, 16, 8, 2),
    (4, 256): Tile(32, 16, 8, 2),
}
# `rows` is here the least and is raised to what the batch needs, up to SPLIT_ROWS.
SPLIT = {
    (2, 64): Tile(16, 64, 4, 4),
    (2, 128): Tile(16, 64, 4, 3),
    (2, 256): Tile(16, 32, 4, 3),
    (4, 64): Tile(16, 32, 8, 2),
    (4, 128): Tile(16, 32, 8, 2),
    (4, 256): Tile(16, 32, 8, 2),
}
SPLIT_ROWS = 64
MIXED_ROWS = 32  # rows of a split tile beside the long kernel: single tokens and short drafts
FEW_ROWS = 8  # rows a request, on average, up to which a batch is all the split kernel's

PROGRAMS_PER_SM = 6  # pieces that a full batch is cut into: about two run at once, so three waves even out
LEAST_KEYS = 128  # a piece is not worth less
MERGED_AT_ONCE = 16  # partial results a merge reads in one go

fixed_split_keys: int | None = None
"""Batch invariance (He, "Defeating nondeterminism in LLM inference", 2025): a fixed piece instead of a balanced one.

None balances pieces over the machine: fastest, and bit-equal for equal batches, but the order in which a
row's keys are added then depends on who else is in the batch. A number of keys (2048, say) fixes it by
the request's own length: a decode step (T == B) gives each row the same bits whatever the batch. The
price is a grid and a workspace that grow with B times the capacity of a block table; the choice is part
of a captured graph. Rows that share a step with prefills take tiles of another height, which tensor
cores may add up in another order, so the promise holds within a class of work.
"""


@triton.jit
def _page(
    table: tl.tensor,
    tile: tl.tensor,
    end: tl.tensor,
    low: tl.tensor,
    length: tl.tensor,
    column: tl.tensor,
    KEYS: tl.constexpr,
    PAGE: tl.constexpr,
) -> tl.tensor:
    """The page that holds a tile of keys (int64), or, where pages are smaller than tiles, that of each key."""
    if PAGE % KEYS == 0:
        page = tl.load(table + tile // (PAGE // KEYS), mask=tile < end, other=0)
    else:
        key = tile * KEYS + column
        page = tl.load(table + key // PAGE, mask=(key >= low) & (key < length) & (tile < end), other=0)
    return page.to(tl.int64)


@triton.jit
def _attend(
    query: tl.tensor,
    peak: tl.tensor,
    total: tl.tensor,
    sums: tl.tensor,
    begin: tl.tensor,
    end: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    table: tl.tensor,
    block_stride: tl.tensor,
    slot_stride: tl.tensor,
    position: tl.tensor,
    low: tl.tensor,
    length: tl.tensor,
    window: tl.tensor,
    scale: tl.tensor,
    MASKED: tl.constexpr,
    WINDOWED: tl.constexpr,
    KEYS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAGE: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Add key tiles begin .. end to the running softmax (peak, total, sums) of a tile of queries.

    position: the last key that each row sees; low: the first that any of them sees. Only MASKED tiles
    may hold keys that some row does not see, or that do not exist.
    """
    column = tl.arange(0, KEYS)
    lane = tl.arange(0, BLOCK_D)[None, :]
    # The page of a tile is looked up one tile ahead: left to the compiler, the chain table -> page would
    # take half of the pipeline's stages.
    page = _page(table, begin, end, low, length, column, KEYS, PAGE)
    for tile in range(begin, end):
        key = tile * KEYS + column
        # What nobody sees is not even read: it may be the page of somebody else, or of nobody (NaN x 0 = NaN).
        exists = (key >= low) & (key < length)
        if PAGE % KEYS == 0:
            offset = page * block_stride + (tile % (PAGE // KEYS) * KEYS + column) * slot_stride
        else:
            offset = page * block_stride + key % PAGE * slot_stride
        page = _page(table, tile + 1, end, low, length, column, KEYS, PAGE)
        place = offset[:, None] + lane
        if MASKED:
            readable = exists[:, None] & (lane < HEAD_DIM)
            key_part = tl.load(keys + place, mask=readable, other=0.0)
            value_part = tl.load(values + place, mask=readable, other=0.0)
        elif HEAD_DIM != BLOCK_D:
            key_part = tl.load(keys + place, mask=lane < HEAD_DIM, other=0.0)
            value_part = tl.load(values + place, mask=lane < HEAD_DIM, other=0.0)
        else:
            key_part = tl.load(keys + place)
            value_part = tl.load(values + place)
        scores = tl.dot(query, key_part.T, input_precision="ieee")
        if MASKED:
            seen = key[None, :] <= position[:, None]
            if WINDOWED:
                seen &= key[None, :] > position[:, None] - window
            scores = tl.where(seen, scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, axis=1) * scale)
        base = new_peak
        if MASKED:
            # A row that has seen nothing yet has no finite peak: -inf - -inf would be NaN.
            base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        weights = tl.exp2(scores * scale - base[:, None])
        shrink = tl.exp2(peak - base)
        total = total * shrink + tl.sum(weights, axis=1)
        sums = tl.dot(weights.to(value_part.dtype), value_part, sums * shrink[:, None], input_precision="ieee")
        peak = new_peak
    return peak, total, sums


@triton.jit(
    do_not_specialize=["requests", "limit", "window", "table_stride", "tiles"],
    do_not_specialize_on_alignment=["tables", "starts", "lengths"],
)
def _long_kernel(
    q: tl.tensor,
    k_pages: tl.tensor,
    v_pages: tl.tensor,
    tables: tl.tensor,
    starts: tl.tensor,
    lengths: tl.tensor,
    out: tl.tensor,
    requests: tl.tensor,
    tiles: tl.tensor,
    limit: tl.tensor,
    window: tl.tensor,
    scale: tl.tensor,
    table_stride: tl.tensor,
    q_token_stride: tl.tensor,
    q_head_stride: tl.tensor,
    block_stride: tl.tensor,
    head_stride: tl.tensor,
    slot_stride: tl.tensor,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    WINDOWED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    KEYS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAGE: tl.constexpr,
) -> None:
    """All keys of one tile of rows. Skips requests of at most `limit` rows."""
    ROWS: tl.constexpr = BLOCK_M // GROUP
    # Late tiles see most keys: they start first, so that no long one is left for the end. KV heads
    # change fastest, so that tiles running together are neighbours that read the same keys.
    kv_head = tl.program_id(0) % KV_HEADS
    tile = tiles - 1 - tl.program_id(0) // KV_HEADS
    request = tl.maximum(sequence_of(starts, requests, tile, ROWS), 0)
    first = tl.load(starts + request)
    rows = tl.load(starts + request + 1) - first
    row_begin = (tile - first // ROWS - request) * ROWS
    if (row_begin >= rows) | (row_begin < 0) | (rows <= limit):
        return
    length = tl.load(lengths + request)

    member = tl.arange(0, BLOCK_M)
    row = row_begin + member // GROUP
    head = kv_head * GROUP + member % GROUP
    lane = tl.arange(0, BLOCK_D)[None, :]
    live = ((row < rows) & (member < ROWS * GROUP))[:, None] & (lane < HEAD_DIM)
    token = (first + row).to(tl.int64)
    query_at = q + (token * q_token_stride + head * q_head_stride)[:, None] + lane
    query = tl.load(query_at, mask=live, other=0.0)

    # Rows row_begin .. see keys up to first_seen .. last_seen; tiles of keys fall into those that the
    # window cuts, those that every row sees whole, and those that the diagonal or the end cuts.
    first_seen = length - rows + row_begin
    last_seen = length - rows + tl.minimum(row_begin + ROWS, rows) - 1
    end = (tl.maximum(last_seen + 1, 0) + KEYS - 1) // KEYS
    low = 0
    left = 0
    if WINDOWED:
        low = tl.maximum(first_seen - window + 1, 0)
        left = tl.minimum((tl.maximum(last_seen - window + 1, 0) + KEYS - 1) // KEYS, end)
    begin = low // KEYS
    right = tl.minimum(tl.maximum(tl.maximum(first_seen + 1, 0) // KEYS, left), end)

    peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    sums = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    position = length - rows + row
    keys = k_pages + kv_head.to(tl.int64) * head_stride
    values = v_pages + kv_head.to(tl.int64) * head_stride
    table = tables + request.to(tl.int64) * table_stride
    if WINDOWED:
        peak, total, sums = _attend(
            query, peak, total, sums, begin, left, keys, values, table, block_stride, slot_stride,
            position, low, length, window, scale, True, WINDOWED, KEYS, HEAD_DIM, BLOCK_D, PAGE,
        )  # fmt: skip
    peak, total, sums = _attend(
        query, peak, total, sums, left, right, keys, values, table, block_stride, slot_stride,
        position, low, length, window, scale, False, WINDOWED, KEYS, HEAD_DIM, BLOCK_D, PAGE,
    )  # fmt: skip
    peak, total, sums = _attend(
        query, peak, total, sums, right, end, keys, values, table, block_stride, slot_stride,
        position, low, length, window, scale, True, WINDOWED, KEYS, HEAD_DIM, BLOCK_D, PAGE,
    )  # fmt: skip
    result = sums / tl.where(total > 0, total, 1.0)[:, None]
    target = out + ((token * KV_HEADS * GROUP + head) * HEAD_DIM)[:, None] + lane
    tl.store(target, result.to(out.dtype.element_ty), mask=live)


@triton.jit
def _spans(
    starts: tl.tensor,
    lengths: tl.tensor,
    index: tl.tensor,
    requests: tl.tensor,
    limit: tl.tensor,
    window: tl.tensor,
    WINDOWED: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Tiles of rows and tiles of keys of requests `index`; none of either for those that are skipped."""
    real = index < requests
    rows = tl.load(starts + index + 1, mask=real, other=0) - tl.load(starts + index, mask=real, other=0)
    length = tl.load(lengths + index, mask=real, other=0)
    begin = tl.zeros_like(length)
    if WINDOWED:
        begin = tl.maximum(length - rows - window + 1, 0) // KEYS
    row_tiles = tl.where((rows > 0) & (rows <= limit), (rows + ROWS - 1) // ROWS, 0)
    # Somebody must write the zeros of rows that see nothing: one tile at least.
    key_tiles = tl.maximum((length + KEYS - 1) // KEYS - begin, 1)
    return row_tiles, tl.where(row_tiles > 0, key_tiles, 0)


@triton.jit
def _share(
    starts: tl.tensor,
    lengths: tl.tensor,
    requests: tl.tensor,
    limit: tl.tensor,
    window: tl.tensor,
    pieces: tl.tensor,
    fixed: tl.tensor,
    WINDOWED: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    LEAST: tl.constexpr,
) -> tl.tensor:
    """Key tiles of a piece: `fixed`, or if that is 0 what cuts this batch into about `pieces` pieces.

    Invariant: a request with n tiles of keys has ceil(n / share) pieces for each tile of its rows, so
    all together there are at most pieces + (tiles of rows).
    """
    share = fixed
    if fixed == 0:
        work = 0
        for base in range(0, requests, SCAN):
            row_tiles, key_tiles = _spans(
                starts, lengths, base + tl.arange(0, SCAN), requests, limit, window, WINDOWED, ROWS, KEYS
            )
            work += tl.sum(row_tiles * key_tiles, axis=0)
        share = tl.maximum((work + pieces - 1) // pieces, LEAST)
    return share


@triton.jit(
    do_not_specialize=["requests", "limit", "window", "pieces", "fixed", "table_stride"],
    do_not_specialize_on_alignment=["tables", "starts", "lengths"],
)
def _split_kernel(
    q: tl.tensor,
    k_pages: tl.tensor,
    v_pages: tl.tensor,
    tables: tl.tensor,
    starts: tl.tensor,
    lengths: tl.tensor,
    out: tl.tensor,
    partial: tl.tensor,
    partial_log: tl.tensor,
    requests: tl.tensor,
    limit: tl.tensor,
    window: tl.tensor,
    pieces: tl.tensor,
    fixed: tl.tensor,
    scale: tl.tensor,
    table_stride: tl.tensor,
    q_token_stride: tl.tensor,
    q_head_stride: tl.tensor,
    block_stride: tl.tensor,
    head_stride: tl.tensor,
    slot_stride: tl.tensor,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    WINDOWED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    KEYS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAGE: tl.constexpr,
    LEAST: tl.constexpr,
) -> None:
    """One piece of the keys of one tile of rows. Skips requests of more than `limit` rows."""
    ROWS: tl.constexpr = BLOCK_M // GROUP
    kv_head = tl.program_id(0) % KV_HEADS
    piece = tl.program_id(0) // KV_HEADS
    share = _share(starts, lengths, requests, limit, window, pieces, fixed, WINDOWED, ROWS, KEYS, LEAST)
    # Pieces are numbered request by request; this finds the request that owns number `piece`.
    before = 0
    request = -1
    place = 0
    for base in range(0, requests, SCAN):
        index = base + tl.arange(0, SCAN)
        row_tiles, key_tiles = _spans(starts, lengths, index, requests, limit, window, WINDOWED, ROWS, KEYS)
        counts = row_tiles * ((key_tiles + share - 1) // share)
        ends = before + tl.cumsum(counts, axis=0)
        mine = (piece < ends) & (piece >= ends - counts)
        request += tl.sum(tl.where(mine, index + 1, 0), axis=0)
        place += tl.sum(tl.where(mine, piece - (ends - counts), 0), axis=0)
        before += tl.sum(counts, axis=0)
    if request < 0:
        return

    first = tl.load(starts + request)
    rows = tl.load(starts + request + 1) - first
    length = tl.load(lengths + request)
    low = 0
    if WINDOWED:
        low = tl.maximum(length - rows - window + 1, 0)
    key_begin = low // KEYS
    key_tiles = tl.maximum((length + KEYS - 1) // KEYS - key_begin, 1)
    count = (key_tiles + share - 1) // share
    even = (key_tiles + count - 1) // count  # the same number of pieces, but of one size
    row_begin = place // count * ROWS

    member = tl.arange(0, BLOCK_M)
    row = row_begin + member // GROUP
    head = kv_head * GROUP + member % GROUP
    lane = tl.arange(0, BLOCK_D)[None, :]
    alive = (row < rows) & (member < ROWS * GROUP)
    live = alive[:, None] & (lane < HEAD_DIM)
    token = (first + row).to(tl.int64)
    query_at = q + (token * q_token_stride + head * q_head_stride)[:, None] + lane
    query = tl.load(query_at, mask=live, other=0.0)

    last_seen = length - rows + tl.minimum(row_begin + ROWS, rows) - 1
    begin = key_begin + place % count * even
    end = tl.minimum(begin + even, (tl.maximum(last_seen + 1, 0) + KEYS - 1) // KEYS)
    peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    sums = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    # Memory is what this loop waits for, so every tile pays for masks and there is but one loop.
    peak, total, sums = _attend(
        query, peak, total, sums, begin, end,
        k_pages + kv_head.to(tl.int64) * head_stride, v_pages + kv_head.to(tl.int64) * head_stride,
        tables + tl.cast(request, tl.int64) * table_stride, block_stride, slot_stride,
        length - rows + row, low, length, window, scale, True, WINDOWED, KEYS, HEAD_DIM, BLOCK_D, PAGE,
    )  # fmt: skip
    # Rows that saw nothing: zeros, with -inf for a logarithm (their peak is -inf already).
    total = tl.where(total > 0, total, 1.0)
    result = sums / total[:, None]
    if count == 1:
        target = out + ((token * KV_HEADS * GROUP + head) * HEAD_DIM)[:, None] + lane
        tl.store(target, result.to(out.dtype.element_ty), mask=live)
    else:
        spot = tl.program_id(0).to(tl.int64) * BLOCK_M + member
        tl.store(partial + spot[:, None] * HEAD_DIM + lane, result, mask=live)
        tl.store(partial_log + spot, peak + tl.log2(total), mask=alive)


@triton.jit(
    do_not_specialize=["requests", "limit", "window", "pieces", "fixed"],
    do_not_specialize_on_alignment=["starts", "lengths"],
)
def _merge_kernel(
    out: tl.tensor,
    partial: tl.tensor,
    partial_log: tl.tensor,
    starts: tl.tensor,
    lengths: tl.tensor,
    requests: tl.tensor,
    limit: tl.tensor,
    window: tl.tensor,
    pieces: tl.tensor,
    fixed: tl.tensor,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    WINDOWED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    KEYS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    LEAST: tl.constexpr,
    ONE_TILE: tl.constexpr,
    AT_ONCE: tl.constexpr,
) -> None:
    """Add up the pieces of one tile of rows for one query head: O = sum(w O_i) / sum(w), w = 2^(log_i - peak)."""
    ROWS: tl.constexpr = BLOCK_M // GROUP
    HEADS: tl.constexpr = KV_HEADS * GROUP
    head = tl.program_id(0) % HEADS
    tile = tl.program_id(0) // HEADS
    request = tile
    if not ONE_TILE:
        request = tl.maximum(sequence_of(starts, requests, tile, ROWS), 0)
    first = tl.load(starts + request)
    rows = tl.load(starts + request + 1) - first
    row_tile = 0
    if not ONE_TILE:
        row_tile = tile - first // ROWS - request
    if (row_tile * ROWS >= rows) | (row_tile < 0) | (rows > limit):
        return

    share = _share(starts, lengths, requests, limit, window, pieces, fixed, WINDOWED, ROWS, KEYS, LEAST)
    before = 0
    count = 0
    for base in range(0, request + 1, SCAN):
        index = base + tl.arange(0, SCAN)
        row_tiles, key_tiles = _spans(starts, lengths, index, requests, limit, window, WINDOWED, ROWS, KEYS)
        counts = (key_tiles + share - 1) // share
        before += tl.sum(tl.where(index < request, row_tiles * counts, 0), axis=0)
        count += tl.sum(tl.where(index == request, counts, 0), axis=0)
    if count <= 1:
        return

    lane = tl.arange(0, BLOCK_D)
    first_piece = before + row_tile * count
    for row in range(row_tile * ROWS, tl.minimum(row_tile * ROWS + ROWS, rows)):
        member = (row - row_tile * ROWS) * GROUP + head % GROUP
        peak = float("-inf")
        total = 0.0
        sums = tl.zeros((BLOCK_D,), tl.float32)
        for base in range(0, count, AT_ONCE):
            index = base + tl.arange(0, AT_ONCE)
            spot = ((first_piece + index).to(tl.int64) * KV_HEADS + head // GROUP) * BLOCK_M + member
            logs = tl.load(partial_log + spot, mask=index < count, other=float("-inf"))
            parts = tl.load(
                partial + spot[:, None] * HEAD_DIM + lane[None, :],
                mask=(index < count)[:, None] & (lane < HEAD_DIM)[None, :],
                other=0.0,
            )
            new_peak = tl.maximum(peak, tl.max(logs, axis=0))
            level = tl.where(new_peak == float("-inf"), 0.0, new_peak)
            weights = tl.exp2(logs - level)
            shrink = tl.exp2(peak - level)
            total = total * shrink + tl.sum(weights, axis=0)
            sums = sums * shrink + tl.sum(weights[:, None] * parts, axis=0)
            peak = new_peak
        result = sums / tl.where(total > 0, total, 1.0)
        target = out + ((first + row).to(tl.int64) * HEADS + head) * HEAD_DIM + lane
        tl.store(target, result.to(out.dtype.element_ty), mask=lane < HEAD_DIM)


LIMITS = Limits(
    "triton",
    cuda(80),
    dtypes=(torch.float32, torch.bfloat16, torch.float16),
    head_dims=range(8, MAX_HEAD_DIM + 1, 8),
    pages=range(16, 257, 16),
    group=MAX_GROUP,
    features=frozenset({"paged", "window"}),
)


def _fitted(tile: Tile, least_rows: int, block_d: int, element_bytes: int, shared_bytes: int) -> Tile:
    """The tile cut to what shared memory holds; the tables are written for Hopper's 227 KiB.

    Counted: the queries, and a tile of keys and one of values a stage. Tiles of less than 64 rows go
    through mma.sync, which is done with a tile before the next one is asked for: a stage less. Products
    of fp32 pass their weights through shared memory too.
    """
    row_bytes = block_d * element_bytes

    def needed(tile: Tile) -> int:
        stages = tile.stages - (tile.rows < 64)
        weights = tile.rows * tile.keys * 4 if element_bytes == 4 else 0
        return (tile.rows + 2 * stages * tile.keys) * row_bytes + weights

    while needed(tile) > shared_bytes:
        if tile.stages > 2:
            tile = tile._replace(stages=tile.stages - 1)
        elif tile.rows // 2 >= max(16, least_rows):
            tile = tile._replace(rows=tile.rows // 2)
        elif tile.stages > 1:
            tile = tile._replace(stages=1)
        else:
            break
    return tile


def _raised(tile: Tile, rows: int) -> Tile:
    """The tile with at least this many rows."""
    return tile._replace(rows=max(tile.rows, triton.next_power_of_2(rows)))


@attention.kernel("triton", needs=LIMITS.need, accepts=LIMITS.accepts)
def attention_triton(*args: Any, **kwargs: Any) -> torch.Tensor:
    """One to three launches, whose grids and workspace follow from shapes alone; `spans` is not looked at.

    The workspace (fp32 partial results) is taken from torch's allocator on every call, so that a captured
    graph owns it: (PROGRAMS_PER_SM * SMs / Hk + B) * Hk * tile rows * (D + 1) floats.
    """
    call = LIMITS.require(*args, **kwargs)
    q, k_pages, v_pages, block_tables, scale, window = (
        call.q,
        call.k,
        call.v,
        call.block_tables,
        call.scale,
        call.window,
    )
    query_starts, lengths = call.query_starts, call.lengths
    assert block_tables is not None
    tokens, heads, head_dim = q.shape
    kv_heads, page = k_pages.shape[1], k_pages.shape[2]
    requests, group = lengths.shape[0], heads // kv_heads
    out = torch.empty(tokens, heads, head_dim, device=q.device, dtype=q.dtype)
    if not tokens or not requests:
        return out
    machine = _machine(q.device)
    block_d = max(16, triton.next_power_of_2(head_dim))
    kind = (q.element_size(), max(64, block_d))
    common = {
        "KV_HEADS": kv_heads,
        "GROUP": group,
        "WINDOWED": window is not None,
        "HEAD_DIM": head_dim,
        "BLOCK_D": block_d,
    }
    inputs = (q, k_pages, v_pages, block_tables, query_starts, lengths, out)
    strides = (block_tables.stride(0), q.stride(0), q.stride(1), *k_pages.stride()[:3])
    reach = 0 if window is None else window
    exponent = scale * LOG2_E

    tall = _fitted(_raised(LONG[kind], group), group, block_d, kind[0], machine.shared_bytes)
    tall_tiles = tokens // (tall.rows // group) + requests
    average = -(-tokens // requests)
    idle = tokens // (tall.rows // group) * kv_heads * 2 < machine.multiprocessors
    split_alone = average <= FEW_ROWS or idle
    both = not split_alone and requests > 1

    if split_alone or both:
        wanted = MIXED_ROWS if both else min(average * group, SPLIT_ROWS)
        flat = _raised(SPLIT[kind], max(wanted, group))
        flat = _fitted(flat, group, block_d, kind[0], machine.shared_bytes)
        rows = flat.rows // group
        _run_split(inputs, requests, rows if both else EVERY, reach, exponent, strides, flat, page, machine, common)
    if not split_alone:
        limit = rows if both else 0
        _long_kernel[(tall_tiles * kv_heads,)](
            *inputs, requests, tall_tiles, limit, reach, exponent, *strides,
            BLOCK_M=tall.rows, KEYS=tall.keys, PAGE=page, **common, num_warps=tall.warps, num_stages=tall.stages,
        )  # fmt: skip
    return out


def _run_split(
    inputs: tuple[torch.Tensor, ...],
    requests: int,
    limit: int,
    reach: int,
    exponent: float,
    strides: tuple[int, ...],
    tile: Tile,
    page: int,
    machine: Machine,
    common: dict[str, Any],
) -> None:
    """Launch the split kernel, and the merge if anything can have been split."""
    q, tables, starts, lengths, out = inputs[0], *inputs[3:]
    kv_heads, rows = common["KV_HEADS"], tile.rows // common["GROUP"]
    one_tile = limit <= rows
    row_tiles = requests if one_tile else q.shape[0] // rows + requests
    capacity = -(-tables.shape[1] * page // tile.keys)  # key tiles that a block table can name
    least = -(-LEAST_KEYS // tile.keys)
    if fixed_split_keys is None:
        fixed, most = 0, -(-capacity // least)
        pieces = max(1, PROGRAMS_PER_SM * machine.multiprocessors // kv_heads)
        count = min(pieces + row_tiles, most * row_tiles)
    else:
        fixed = max(1, fixed_split_keys // tile.keys)
        pieces, most = 1, -(-capacity // fixed)
        count = most * row_tiles
    # Without a second piece nobody writes a partial result.
    size = count * kv_heads * tile.rows if most > 1 else 1
    partial = torch.empty(size, q.shape[2], device=q.device, dtype=torch.float32)
    partial_log = torch.empty(size, device=q.device, dtype=torch.float32)
    plan = (requests, limit, reach, pieces, fixed)
    _split_kernel[(count * kv_heads,)](
        *inputs, partial, partial_log, *plan, exponent, *strides,
        BLOCK_M=tile.rows, KEYS=tile.keys, PAGE=page, LEAST=least, **common,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    if most > 1:
        _merge_kernel[(row_tiles * q.shape[1],)](
            out, partial, partial_log, starts, lengths, *plan,
            BLOCK_M=tile.rows, KEYS=tile.keys, LEAST=least, ONE_TILE=one_tile, AT_ONCE=MERGED_AT_ONCE,
            **common, num_warps=2,
        )  # fmt: skip
