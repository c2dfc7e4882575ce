"""Flash attention for prefill, decode and whatever mixture of both a step holds, with every feature of the op.

Knows pages, rows of keys and lengths that only the device has read. It must not know layers, schedulers
or who shares a page. Two kernels share one inner loop (Dao, "FlashAttention-2", 2307.08691: online
softmax in fp32, base 2, keys in order):

- the *long* kernel takes a tile of rows of one request and one KV head, and all keys that they see;
- the *split* kernel takes fewer rows and a piece of their keys (flash decoding); pieces are as long as
  balances this very batch, worked out by every program from the lengths, and a merge adds them up.

Both pack the query heads that share a KV head into the rows of a tile: row r is token r // group, head
r % group. Which of them run follows from shapes alone, so the choice can be captured in a CUDA graph:

- split alone if T == B (decode), if there are few rows a request (verifying drafts), or if the long
  kernel would leave most of the machine idle (a small chunk over a long context);
- long alone if B == 1, or if keys are contiguous (whole sequences, not an engine's steps);
- else both: requests with few rows take the split kernel, the others the long one; each kernel skips
  the other's requests on the device.

Either is right for any lengths whatever. Rows that belong to no request are left as they are.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton import knobs
from triton.tools.tensor_descriptor import TensorDescriptor

from ridgeline.core.cost import Cost
from ridgeline.core.errors import InvalidArgument
from ridgeline.kernels.tables import Shape, Tunable
from ridgeline.kernels.triton.machine import Machine
from ridgeline.kernels.triton.machine import machine_of as _machine
from ridgeline.kernels.triton.ragged import SCAN, sequence_of
from ridgeline.ops.attention import Attended, attention
from ridgeline.ops.attention_call import FEATURES, Call, Limits
from ridgeline.ops.op import cuda

LOG2_E = 1.4426950408889634
LN_2 = tl.constexpr(0.6931471805599453)
MAX_HEAD_DIM = 256
MAX_GROUP = 128
EVERY = 1 << 30  # a number of rows that no request exceeds
INTERPRETED = knobs.runtime.interpret


class Tile(NamedTuple):
    """Rows (tokens x group) and keys of a tile, and how a program of it is compiled."""

    rows: int
    keys: int
    warps: int
    stages: int


# By (bytes an element, head dim rounded up to a power of two; smaller ones take the first entry). Tiles of the
# long kernel where the copy engine brings keys (contiguous ones, on Hopper), and where threads load them.
LONG = {
    (2, 64): Tile(64, 64, 4, 3),
    (2, 128): Tile(64, 64, 4, 3),
    (2, 256): Tile(128, 64, 8, 2),
}
LOADED = {
    (2, 64): Tile(128, 64, 8, 3),
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
# With fixed pieces one tile serves every row, whatever its step.
FIXED = {
    (2, 64): Tile(64, 64, 4, 3),
    (2, 128): Tile(64, 64, 4, 3),
    (2, 256): Tile(64, 32, 4, 3),
    (4, 64): Tile(32, 16, 8, 2),
    (4, 128): Tile(32, 16, 8, 2),
    (4, 256): Tile(32, 16, 8, 2),
}
SPLIT_ROWS = 64
MIXED_ROWS = 32  # rows of a split tile beside the long kernel: single tokens and short drafts
FEW_ROWS = 8  # rows a request, on average, up to which a batch is all the split kernel's
SECTION_BYTES = 32 << 20  # keys and values that running programs should share in the L2 cache


class Pieces(NamedTuple):
    """How keys are cut up: pieces a multiprocessor that a full batch makes, and keys that a piece is worth."""

    programs: int
    least_keys: int


# By bytes an element. About two programs run at once, so three waves even out.
PIECES = {2: Pieces(6, 128), 4: Pieces(6, 128)}
MERGED_AT_ONCE = 16  # partial results a merge reads in one go

SPLIT_KEYS = 1024
"""Of a fixed piece, unless a caller asks for another number."""


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
    row_first: tl.tensor,
    column_first: tl.tensor,
    last: tl.tensor,
    floor: tl.tensor,
    node: tl.tensor,
    words: tl.tensor,
    tail_begin: tl.tensor,
    low: tl.tensor,
    length: tl.tensor,
    scale: tl.tensor,
    softcap: tl.tensor,
    MASKED: tl.constexpr,
    COPIED: tl.constexpr,
    WINDOWED: tl.constexpr,
    TREE: tl.constexpr,
    CAPPED: tl.constexpr,
    KEYS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAGE: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Add key tiles begin .. end to the running softmax (peak, total, sums) of a tile of queries.

    last: the last key that each row sees (a tree's rows: before the tail); floor: with WINDOWED, the key
    before the first; low: the first that any of them sees. With TREE, rows that are a `node` see keys from
    tail_begin on where the bits at `words` say so. Only MASKED tiles may hold keys that some row does not
    see, or that do not exist. PAGE is 0 if keys are contiguous. COPIED (contiguous keys): keys and values are
    tensor descriptors, from which the copy engine takes whole tiles, beginning at row_first and column_first.
    """
    column = tl.arange(0, KEYS)
    lane = tl.arange(0, BLOCK_D)[None, :]
    if not COPIED:
        inside = column[:, None] * slot_stride + lane
    factor = scale
    if CAPPED:
        factor = 1.0
        scale = scale * 2.8853900817779268 / softcap  # 2 log2(e): tanh(x) = 1 - 2 / (2^(that x) + 1)
    if PAGE > 0:
        # The page of a tile is looked up one tile ahead: left to the compiler, the chain table -> page would
        # take half of the pipeline's stages.
        page = _page(table, begin, end, low, length, column, KEYS, PAGE)
    for tile in tl.range(begin, end, num_stages=1 if TREE else None):
        key = tile * KEYS + column
        if COPIED:
            line = row_first + tile * KEYS
            key_part, value_part = keys.load([line, column_first]), values.load([line, column_first])
        elif PAGE == 0:
            start = tl.cast(tile, tl.int64) * KEYS * slot_stride
            key_at, value_at = keys + start + inside, values + start + inside
        elif PAGE % KEYS == 0:
            start = page * block_stride + tile % (PAGE // KEYS) * KEYS * slot_stride
            key_at, value_at = keys + start + inside, values + start + inside
        else:
            place = (page * block_stride + key % PAGE * slot_stride)[:, None] + lane
            key_at, value_at = keys + place, values + place
        if PAGE > 0:
            page = _page(table, tile + 1, end, low, length, column, KEYS, PAGE)
        if COPIED:
            pass
        elif MASKED:
            # What nobody sees is not even read: it may be the page of somebody else, or of nobody (NaN x 0 = NaN).
            exists = ((key >= low) & (key < length))[:, None] & (lane < HEAD_DIM)
            key_part = tl.load(key_at, mask=exists, other=0.0)
            value_part = tl.load(value_at, mask=exists, other=0.0)
        elif HEAD_DIM != BLOCK_D:
            key_part = tl.load(key_at, mask=lane < HEAD_DIM, other=0.0)
            value_part = tl.load(value_at, mask=lane < HEAD_DIM, other=0.0)
        else:
            key_part = tl.load(key_at)
            value_part = tl.load(value_at)
        scores = tl.dot(query, key_part.T, input_precision="ieee")
        if CAPPED:
            scores = softcap - 2.0 * softcap / (tl.exp2(scores * scale) + 1.0)
        if MASKED:
            seen = key[None, :] <= last[:, None]
            if WINDOWED:
                seen &= key[None, :] > floor[:, None]
            if TREE:
                bit = tl.maximum(key - tail_begin, 0)
                of_tail = (key >= tail_begin) & (key < length)
                word = tl.load(
                    words[:, None] + (bit // 32)[None, :],
                    mask=node[:, None] & of_tail[None, :],
                    other=0,
                )
                seen |= ((word >> (bit % 32)[None, :]) & 1) != 0
            scores = tl.where(seen, scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, axis=1) * factor)
        base = new_peak
        if MASKED:
            # A row that has seen nothing yet has no finite peak: -inf - -inf would be NaN.
            base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        # Written as fma, so that every kernel rounds alike (fixed pieces promise the same bits).
        weights = tl.exp2(tl.fma(scores, factor, -base[:, None]))
        shrink = tl.exp2(peak - base)
        total = tl.fma(total, shrink, tl.sum(weights, axis=1))
        sums = tl.dot(weights.to(value_part.dtype), value_part, sums * shrink[:, None], input_precision="ieee")
        peak = new_peak
    return peak, total, sums


@triton.jit
def _ones(bits: tl.tensor) -> tl.tensor:
    """How many bits of each int32 are set."""
    x = bits.to(tl.uint32, bitcast=True)
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return ((x * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def _sight(
    row: tl.tensor,
    token: tl.tensor,
    rows: tl.tensor,
    length: tl.tensor,
    tail_begin: tl.tensor,
    window: tl.tensor,
    tree: tl.tensor,
    tree_stride: tl.tensor,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
    TREE: tl.constexpr,
    WORDS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """What rows `row` of a request see, as `_attend` wants it: last, floor, node, words."""
    last = row * 0 + (length - 1)
    if CAUSAL:
        last = length - rows + row
    position = last
    node = row < 0
    words = token
    if TREE:
        tail = length - tail_begin
        node = (row >= rows - tail) & (row < rows)
        words = tree + token * tree_stride
        last = tl.where(node, tail_begin - 1, last)
        if WINDOWED:
            seen = row * 0
            for word in tl.static_range(WORDS):
                bits = tl.load(words + word, mask=node, other=0)
                left = tail - word * 32  # bits of this word that are in the tail
                some = bits & ((1 << tl.minimum(tl.maximum(left, 0), 31)) - 1)
                seen += _ones(tl.where(left >= 32, bits, some))
            position = tl.where(node, tail_begin + seen - 1, position)
    return last, position - window, node, words


@triton.jit
def _joined(
    peak: tl.tensor, total: tl.tensor, sums: tl.tensor, log: tl.tensor, part: tl.tensor
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """A running result with a further piece: O = sum(w O_i) / sum(w), w = 2^(log_i - peak)."""
    new_peak = tl.maximum(peak, log)
    level = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    weight, shrink = tl.exp2(log - level), tl.exp2(peak - level)
    total = tl.fma(total, shrink, weight)
    sums = tl.fma(part, tl.expand_dims(weight, -1), sums * tl.expand_dims(shrink, -1))
    return new_peak, total, sums


@triton.jit
def _with_sink(
    peak: tl.tensor, total: tl.tensor, sums: tl.tensor, sinks: tl.tensor, head: tl.tensor
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Running result with the head's sink: a key of value zero, its logit given in natural units."""
    if sinks is not None:
        sink = tl.load(sinks + head) * 1.4426950408889634
        peak, total, sums = _joined(peak, total, sums, sink, tl.zeros_like(sums))
    return peak, total, sums


@triton.jit
def _store(
    out: tl.tensor,
    lse: tl.tensor,
    peak: tl.tensor,
    total: tl.tensor,
    sums: tl.tensor,
    spot: tl.tensor,
    alive: tl.tensor,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """Write a tile's results. spot: token * heads + head (int64). Rows that saw nothing: zeros and -inf."""
    lane = tl.arange(0, BLOCK_D)[None, :]
    whole = tl.where(total > 0, total, 1.0)
    result = sums / whole[:, None]
    place = out + spot[:, None] * HEAD_DIM + lane
    tl.store(place, result.to(out.dtype.element_ty), mask=alive[:, None] & (lane < HEAD_DIM))
    if lse is not None:
        tl.store(lse + spot, (peak + tl.log2(whole)) * LN_2, mask=alive)


@triton.jit(
    do_not_specialize=["requests", "limit", "window", "table_stride", "tiles", "section", "fixed", "tree_stride"],
    do_not_specialize_on_alignment=["places", "starts", "lengths", "tree", "tails", "sinks"],
)
def _long_kernel(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    places: tl.tensor,
    starts: tl.tensor,
    lengths: tl.tensor,
    sinks: tl.tensor,
    tree: tl.tensor,
    tails: tl.tensor,
    out: tl.tensor,
    lse: tl.tensor,
    k_tiles: tl.tensor,
    v_tiles: tl.tensor,
    requests: tl.tensor,
    tiles: tl.tensor,
    section: tl.tensor,
    limit: tl.tensor,
    window: tl.tensor,
    fixed: tl.tensor,
    scale: tl.tensor,
    softcap: tl.tensor,
    table_stride: tl.tensor,
    tree_stride: tl.tensor,
    q_token_stride: tl.tensor,
    q_head_stride: tl.tensor,
    block_stride: tl.tensor,
    head_stride: tl.tensor,
    slot_stride: tl.tensor,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
    WORDS: tl.constexpr,
    FIXED_PIECES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    KEYS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAGE: tl.constexpr,
) -> None:
    """All keys of one tile of rows. Skips requests of at most `limit` rows."""
    ROWS: tl.constexpr = BLOCK_M // GROUP
    TREE: tl.constexpr = WORDS > 0
    # Late tiles see most keys: they start first, so that no long one is left for the end. KV heads of a
    # section change fastest, so that tiles running together are neighbours that read the same keys.
    heads_done = tl.program_id(0) // (section * tiles)
    within = tl.program_id(0) % (section * tiles)
    kv_head = heads_done * section + within % section
    tile = tiles - 1 - within // section
    request = tl.maximum(sequence_of(starts, requests, tile, ROWS), 0)
    first = tl.load(starts + request)
    rows = tl.load(starts + request + 1) - first
    row_begin = (tile - first // ROWS - request) * ROWS
    if (row_begin >= rows) | (row_begin < 0) | (rows <= limit):
        return
    length = tl.load(lengths + request)
    keys = k + kv_head.to(tl.int64) * head_stride
    values = v + kv_head.to(tl.int64) * head_stride
    table = places + request.to(tl.int64) * table_stride
    if PAGE == 0:
        key_first = tl.load(places + request).to(tl.int64) * slot_stride
        keys += key_first
        values += key_first
    tail_begin = length
    if TREE:
        tail_begin = length - tl.load(tails + request)

    member = tl.arange(0, BLOCK_M)
    row = row_begin + member // GROUP
    head = kv_head * GROUP + member % GROUP
    lane = tl.arange(0, BLOCK_D)[None, :]
    alive = (row < rows) & (member < ROWS * GROUP)
    token = (first + row).to(tl.int64)
    query_at = q + (token * q_token_stride + head * q_head_stride)[:, None] + lane
    query = tl.load(query_at, mask=alive[:, None] & (lane < HEAD_DIM), other=0.0)
    last, floor, node, words = _sight(
        row, token, rows, length, tail_begin, window, tree, tree_stride, CAUSAL, WINDOWED, TREE, WORDS
    )

    # Rows row_begin .. see keys up to first_seen .. last_seen; tiles of keys fall into those that the
    # window cuts, those that every row sees whole, and those that the diagonal, a tree or the end cuts.
    first_seen = length - 1
    last_seen = length - 1
    if CAUSAL:
        row_end = tl.minimum(row_begin + ROWS, rows)
        first_seen = length - rows + row_begin
        last_seen = length - rows + row_end - 1
        if TREE:
            nodes = (tail_begin < length) & (row_end > rows - (length - tail_begin))
            first_seen = tl.minimum(first_seen, tail_begin - 1)
            last_seen = tl.where(nodes, length - 1, last_seen)
    end = (tl.maximum(last_seen + 1, 0) + KEYS - 1) // KEYS
    low = 0
    left = 0
    if WINDOWED:
        # (A tree's row sees itself, so its position is no earlier than the tail.)
        low = tl.maximum(tl.minimum(length - rows + row_begin, tail_begin) - window + 1, 0)
        left = tl.minimum((tl.maximum(last_seen - window + 1, 0) + KEYS - 1) // KEYS, end)
        if TREE:
            left = tl.minimum(left, tail_begin // KEYS)
    begin = low // KEYS
    right = tl.minimum(tl.maximum(tl.maximum(first_seen + 1, 0) // KEYS, left), end)

    peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    sums = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    if FIXED_PIECES:
        for piece in tl.range(begin // fixed, (end + fixed - 1) // fixed, num_stages=1):
            own_peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)
            own_total = tl.zeros((BLOCK_M,), tl.float32)
            own_sums = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
            own_peak, own_total, own_sums = _attend(
                query, own_peak, own_total, own_sums, tl.maximum(piece * fixed, begin),
                tl.minimum(piece * fixed + fixed, end), keys, values, table, block_stride, slot_stride,
                0, 0, last, floor,
                node, words, tail_begin, low, length, scale, softcap,
                True, False, WINDOWED, TREE, CAPPED, KEYS, HEAD_DIM, BLOCK_D, PAGE,
            )  # fmt: skip
            own_total = tl.where(own_total > 0, own_total, 1.0)
            peak, total, sums = _joined(peak, total, sums, own_peak + tl.log2(own_total), own_sums / own_total[:, None])
    else:
        if WINDOWED:
            peak, total, sums = _attend(
                query, peak, total, sums, begin, left, keys, values, table, block_stride, slot_stride,
                0, 0, last, floor,
                node, words, tail_begin, low, length, scale, softcap,
                True, False, WINDOWED, False, CAPPED, KEYS, HEAD_DIM, BLOCK_D, PAGE,
            )  # fmt: skip
        if k_tiles is not None:
            peak, total, sums = _attend(
                query, peak, total, sums, left, right, k_tiles, v_tiles, table, 0, 0,
                tl.load(places + request), kv_head * HEAD_DIM, last, floor,
                node, words, tail_begin, low, length, scale, softcap,
                False, True, WINDOWED, False, CAPPED, KEYS, HEAD_DIM, BLOCK_D, PAGE,
            )  # fmt: skip
        else:
            peak, total, sums = _attend(
                query, peak, total, sums, left, right, keys, values, table, block_stride, slot_stride,
                0, 0, last, floor,
                node, words, tail_begin, low, length, scale, softcap,
                False, False, WINDOWED, False, CAPPED, KEYS, HEAD_DIM, BLOCK_D, PAGE,
            )  # fmt: skip
        peak, total, sums = _attend(
            query, peak, total, sums, right, end, keys, values, table, block_stride, slot_stride,
            0, 0, last, floor,
            node, words, tail_begin, low, length, scale, softcap,
            True, False, WINDOWED, TREE, CAPPED, KEYS, HEAD_DIM, BLOCK_D, PAGE,
        )  # fmt: skip
    peak, total, sums = _with_sink(peak, total, sums, sinks, head)
    _store(out, lse, peak, total, sums, token * (KV_HEADS * GROUP) + head, alive, HEAD_DIM, BLOCK_D)


@triton.jit
def _spans(
    starts: tl.tensor,
    lengths: tl.tensor,
    index: tl.tensor,
    requests: tl.tensor,
    limit: tl.tensor,
    window: tl.tensor,
    fixed: tl.tensor,
    WINDOWED: tl.constexpr,
    FIXED_PIECES: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Tiles of rows and tiles of keys of requests `index`; none of either for those that are skipped."""
    real = index < requests
    rows = tl.load(starts + index + 1, mask=real, other=0) - tl.load(starts + index, mask=real, other=0)
    length = tl.load(lengths + index, mask=real, other=0)
    row_tiles = tl.where((rows > 0) & (rows <= limit), (rows + ROWS - 1) // ROWS, 0)
    begin = _first_tile(rows, length, window, fixed, WINDOWED, FIXED_PIECES, KEYS)
    # Somebody must write the zeros of rows that see nothing: one tile at least.
    key_tiles = tl.maximum((length + KEYS - 1) // KEYS - begin, 1)
    return row_tiles, tl.where(row_tiles > 0, key_tiles, 0)


@triton.jit
def _first_tile(
    rows: tl.tensor,
    length: tl.tensor,
    window: tl.tensor,
    fixed: tl.tensor,
    WINDOWED: tl.constexpr,
    FIXED_PIECES: tl.constexpr,
    KEYS: tl.constexpr,
) -> tl.tensor:
    """The key tile that the first piece of a request begins with; fixed pieces begin at their multiples."""
    begin = length * 0
    if WINDOWED:
        begin = tl.maximum(length - rows - window + 1, 0) // KEYS
        if FIXED_PIECES:
            begin = begin // fixed * fixed
    return begin


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
    FIXED_PIECES: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    LEAST: tl.constexpr,
) -> tl.tensor:
    """Key tiles of a piece: `fixed`, or what cuts this batch into about `pieces` pieces.

    Invariant: a request with n tiles of keys has ceil(n / share) pieces for each tile of its rows, so
    all together there are at most pieces + (tiles of rows).
    """
    share = fixed
    if not FIXED_PIECES:
        work = 0
        for base in range(0, requests, SCAN):
            row_tiles, key_tiles = _spans(
                starts, lengths, base + tl.arange(0, SCAN), requests, limit, window, fixed,
                WINDOWED, FIXED_PIECES, ROWS, KEYS,
            )  # fmt: skip
            work += tl.sum(row_tiles * key_tiles, axis=0)
        share = tl.maximum((work + pieces - 1) // pieces, LEAST)
    return share


@triton.jit
def _owner(
    starts: tl.tensor,
    lengths: tl.tensor,
    requests: tl.tensor,
    limit: tl.tensor,
    window: tl.tensor,
    fixed: tl.tensor,
    share: tl.tensor,
    piece: tl.tensor,
    WINDOWED: tl.constexpr,
    FIXED_PIECES: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """(request, place, all): whose piece number `piece` is (-1: nobody's) and which of its pieces, and how many
    there are. Pieces are numbered request by request."""
    before = 0
    request = -1
    place = 0
    for base in range(0, requests, SCAN):
        index = base + tl.arange(0, SCAN)
        row_tiles, key_tiles = _spans(
            starts, lengths, index, requests, limit, window, fixed, WINDOWED, FIXED_PIECES, ROWS, KEYS
        )
        counts = row_tiles * ((key_tiles + share - 1) // share)
        ends = before + tl.cumsum(counts, axis=0)
        mine = (piece < ends) & (piece >= ends - counts)
        request += tl.sum(tl.where(mine, index + 1, 0), axis=0)
        place += tl.sum(tl.where(mine, piece - (ends - counts), 0), axis=0)
        before += tl.sum(counts, axis=0)
    return request, place, before


@triton.jit
def _piece(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    places: tl.tensor,
    starts: tl.tensor,
    lengths: tl.tensor,
    sinks: tl.tensor,
    tree: tl.tensor,
    tails: tl.tensor,
    out: tl.tensor,
    lse: tl.tensor,
    partial: tl.tensor,
    partial_log: tl.tensor,
    window: tl.tensor,
    fixed: tl.tensor,
    scale: tl.tensor,
    softcap: tl.tensor,
    table_stride: tl.tensor,
    tree_stride: tl.tensor,
    q_token_stride: tl.tensor,
    q_head_stride: tl.tensor,
    block_stride: tl.tensor,
    head_stride: tl.tensor,
    slot_stride: tl.tensor,
    kv_head: tl.tensor,
    piece: tl.tensor,
    request: tl.tensor,
    place: tl.tensor,
    share: tl.tensor,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
    WORDS: tl.constexpr,
    FIXED_PIECES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    ROWS: tl.constexpr,
    KEPT: tl.constexpr,
    KEYS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAGE: tl.constexpr,
) -> None:
    """Piece number `place` of a request: the whole result if it is the only one of its rows."""
    TREE: tl.constexpr = WORDS > 0
    first = tl.load(starts + request)
    rows = tl.load(starts + request + 1) - first
    length = tl.load(lengths + request)
    keys = k + kv_head.to(tl.int64) * head_stride
    values = v + kv_head.to(tl.int64) * head_stride
    table = places + tl.cast(request, tl.int64) * table_stride
    if PAGE == 0:
        key_first = tl.load(places + request).to(tl.int64) * slot_stride
        keys += key_first
        values += key_first
    tail_begin = length
    if TREE:
        tail_begin = length - tl.load(tails + request)
    low = 0
    if WINDOWED:
        low = tl.maximum(length - rows - window + 1, 0)
    key_begin = _first_tile(rows, length, window, fixed, WINDOWED, FIXED_PIECES, KEYS)
    key_tiles = tl.maximum((length + KEYS - 1) // KEYS - key_begin, 1)
    count = (key_tiles + share - 1) // share
    even = share
    if not FIXED_PIECES:
        even = (key_tiles + count - 1) // count  # the same number of pieces, but of one size
    row_begin = place // count * ROWS

    member = tl.arange(0, BLOCK_M)
    row = row_begin + member // GROUP
    head = kv_head * GROUP + member % GROUP
    lane = tl.arange(0, BLOCK_D)[None, :]
    alive = (row < rows) & (member < ROWS * GROUP)
    token = (first + row).to(tl.int64)
    query_at = q + (token * q_token_stride + head * q_head_stride)[:, None] + lane
    query = tl.load(query_at, mask=alive[:, None] & (lane < HEAD_DIM), other=0.0)
    last, floor, node, words = _sight(
        row, token, rows, length, tail_begin, window, tree, tree_stride, CAUSAL, WINDOWED, TREE, WORDS
    )

    last_seen = length - 1
    if CAUSAL:
        row_end = tl.minimum(row_begin + ROWS, rows)
        last_seen = length - rows + row_end - 1
        if TREE:
            nodes = (tail_begin < length) & (row_end > rows - (length - tail_begin))
            last_seen = tl.where(nodes, length - 1, last_seen)
    begin = key_begin + place % count * even
    end = tl.minimum(begin + even, (tl.maximum(last_seen + 1, 0) + KEYS - 1) // KEYS)
    if FIXED_PIECES:  # whole tiles that nobody sees
        begin = tl.maximum(begin, low // KEYS)
    peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    sums = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    # Memory is what this loop waits for, so every tile pays for masks and there is but one loop (a tree's
    # tail has its own: its bits are no use to the pipeline of keys).
    split = end
    if TREE:
        split = tl.maximum(tl.minimum(tail_begin // KEYS, end), begin)
    peak, total, sums = _attend(
        query, peak, total, sums, begin, split, keys, values, table, block_stride, slot_stride,
        0, 0, last, floor,
        node, words, tail_begin, low, length, scale, softcap,
        True, False, WINDOWED, False, CAPPED, KEYS, HEAD_DIM, BLOCK_D, PAGE,
    )  # fmt: skip
    if TREE:
        peak, total, sums = _attend(
            query, peak, total, sums, split, end, keys, values, table, block_stride, slot_stride,
            0, 0, last, floor,
            node, words, tail_begin, low, length, scale, softcap,
            True, False, WINDOWED, True, CAPPED, KEYS, HEAD_DIM, BLOCK_D, PAGE,
        )  # fmt: skip
    if count == 1:
        if FIXED_PIECES:  # as if merged: the same roundings
            whole = tl.where(total > 0, total, 1.0)
            peak, total, sums = peak + tl.log2(whole), total * 0.0 + 1.0, sums / whole[:, None]
            total = tl.where(peak == float("-inf"), 0.0, total)
        peak, total, sums = _with_sink(peak, total, sums, sinks, head)
        _store(out, lse, peak, total, sums, token * (KV_HEADS * GROUP) + head, alive, HEAD_DIM, BLOCK_D)
    else:
        # Rows that saw nothing: zeros, with -inf for a logarithm (their peak is -inf already).
        total = tl.where(total > 0, total, 1.0)
        kept = alive & (member < KEPT)
        spot = (tl.cast(piece, tl.int64) * KV_HEADS + kv_head) * KEPT + member
        result = sums / total[:, None]
        tl.store(partial + spot[:, None] * HEAD_DIM + lane, result, mask=kept[:, None] & (lane < HEAD_DIM))
        tl.store(partial_log + spot, peak + tl.log2(total), mask=kept)


@triton.jit(
    do_not_specialize=["requests", "limit", "window", "pieces", "fixed", "table_stride", "tree_stride"],
    do_not_specialize_on_alignment=["places", "starts", "lengths", "tree", "tails", "sinks"],
)
def _split_kernel(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    places: tl.tensor,
    starts: tl.tensor,
    lengths: tl.tensor,
    sinks: tl.tensor,
    tree: tl.tensor,
    tails: tl.tensor,
    out: tl.tensor,
    lse: tl.tensor,
    partial: tl.tensor,
    partial_log: tl.tensor,
    requests: tl.tensor,
    limit: tl.tensor,
    window: tl.tensor,
    pieces: tl.tensor,
    fixed: tl.tensor,
    scale: tl.tensor,
    softcap: tl.tensor,
    table_stride: tl.tensor,
    tree_stride: tl.tensor,
    q_token_stride: tl.tensor,
    q_head_stride: tl.tensor,
    block_stride: tl.tensor,
    head_stride: tl.tensor,
    slot_stride: tl.tensor,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
    WORDS: tl.constexpr,
    FIXED_PIECES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    ROWS: tl.constexpr,
    KEPT: tl.constexpr,
    KEYS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAGE: tl.constexpr,
    LEAST: tl.constexpr,
) -> None:
    """One piece of the keys of one tile of rows, ROWS tokens of which no more than KEPT rows are in use. Skips requests
    of more than `limit` rows. Of fixed pieces a program takes several: tables could hold more than there are."""
    kv_head = tl.program_id(0) % KV_HEADS
    piece = tl.program_id(0) // KV_HEADS
    share = _share(starts, lengths, requests, limit, window, pieces, fixed, WINDOWED, FIXED_PIECES, ROWS, KEYS, LEAST)
    request, place, count = _owner(
        starts, lengths, requests, limit, window, fixed, share, piece, WINDOWED, FIXED_PIECES, ROWS, KEYS
    )
    if request < 0:
        return
    if FIXED_PIECES:
        for one in tl.range(piece, count, tl.num_programs(0) // KV_HEADS, num_stages=1):
            _piece(
                q, k, v, places, starts, lengths, sinks, tree, tails, out, lse, partial, partial_log, window, fixed,
                scale, softcap, table_stride, tree_stride, q_token_stride, q_head_stride, block_stride, head_stride,
                slot_stride, kv_head, one, request, place, share,
                KV_HEADS, GROUP, CAUSAL, WINDOWED, CAPPED, WORDS, FIXED_PIECES, BLOCK_M, ROWS, KEPT, KEYS,
                HEAD_DIM, BLOCK_D, PAGE,
            )  # fmt: skip
            request, place, _ = _owner(
                starts, lengths, requests, limit, window, fixed, share, one + tl.num_programs(0) // KV_HEADS,
                WINDOWED, FIXED_PIECES, ROWS, KEYS,
            )  # fmt: skip
    else:
        _piece(
            q, k, v, places, starts, lengths, sinks, tree, tails, out, lse, partial, partial_log, window, fixed,
            scale, softcap, table_stride, tree_stride, q_token_stride, q_head_stride, block_stride, head_stride,
            slot_stride, kv_head, piece, request, place, share,
            KV_HEADS, GROUP, CAUSAL, WINDOWED, CAPPED, WORDS, FIXED_PIECES, BLOCK_M, ROWS, KEPT, KEYS,
            HEAD_DIM, BLOCK_D, PAGE,
        )  # fmt: skip


@triton.jit(
    do_not_specialize=["requests", "limit", "window", "pieces", "fixed"],
    do_not_specialize_on_alignment=["starts", "lengths", "sinks"],
)
def _merge_kernel(
    out: tl.tensor,
    lse: tl.tensor,
    partial: tl.tensor,
    partial_log: tl.tensor,
    starts: tl.tensor,
    lengths: tl.tensor,
    sinks: tl.tensor,
    requests: tl.tensor,
    limit: tl.tensor,
    window: tl.tensor,
    pieces: tl.tensor,
    fixed: tl.tensor,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    WINDOWED: tl.constexpr,
    FIXED_PIECES: tl.constexpr,
    ROWS: tl.constexpr,
    KEPT: tl.constexpr,
    KEYS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    LEAST: tl.constexpr,
    ONE_TILE: tl.constexpr,
    AT_ONCE: tl.constexpr,
) -> None:
    """Add up the pieces of one tile of rows for one query head: O = sum(w O_i) / sum(w), w = 2^(log_i - peak)."""
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

    share = _share(starts, lengths, requests, limit, window, pieces, fixed, WINDOWED, FIXED_PIECES, ROWS, KEYS, LEAST)
    before = 0
    count = 0
    for base in range(0, request + 1, SCAN):
        index = base + tl.arange(0, SCAN)
        row_tiles, key_tiles = _spans(
            starts, lengths, index, requests, limit, window, fixed, WINDOWED, FIXED_PIECES, ROWS, KEYS
        )
        counts = (key_tiles + share - 1) // share
        before += tl.sum(tl.where(index < request, row_tiles * counts, 0), axis=0)
        count += tl.sum(tl.where(index == request, counts, 0), axis=0)
    if count <= 1:
        return

    lane = tl.arange(0, BLOCK_D)
    first_piece = before + row_tile * count
    for row in range(row_tile * ROWS, tl.minimum(row_tile * ROWS + ROWS, rows)):
        member = (row - row_tile * ROWS) * GROUP + head % GROUP
        peak = tl.full((1,), float("-inf"), tl.float32)
        total = tl.zeros((1,), tl.float32)
        sums = tl.zeros((1, BLOCK_D), tl.float32)
        if FIXED_PIECES:  # one by one, as the long kernel does
            for piece in range(count):
                spot = (tl.cast(first_piece + piece, tl.int64) * KV_HEADS + head // GROUP) * KEPT + member
                log = tl.load(partial_log + spot + tl.arange(0, 1))
                part = tl.load(partial + spot * HEAD_DIM + lane, mask=lane < HEAD_DIM, other=0.0)[None, :]
                peak, total, sums = _joined(peak, total, sums, log, part)
        else:
            for base in range(0, count, AT_ONCE):
                index = base + tl.arange(0, AT_ONCE)
                spot = ((first_piece + index).to(tl.int64) * KV_HEADS + head // GROUP) * KEPT + member
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
                sums = sums * shrink[:, None] + tl.sum(weights[:, None] * parts, axis=0)[None, :]
                peak = new_peak
        peak, total, sums = _with_sink(peak, total, sums, sinks, head)
        spot = (first + row).to(tl.int64) * HEADS + head + tl.arange(0, 1)
        _store(out, lse, peak, total, sums, spot, spot >= 0, HEAD_DIM, BLOCK_D)


LIMITS = Limits(
    "triton",
    cuda(80),
    dtypes=(torch.float32, torch.bfloat16, torch.float16),
    head_dims=range(8, MAX_HEAD_DIM + 1, 8),
    pages=range(16, 257, 16),
    group=MAX_GROUP,
    features=frozenset(FEATURES),
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


def _exists(key: tuple[int, int], tile: Tile) -> bool:
    """Whether Hopper's shared memory holds a tile, and its registers the sums of its rows."""
    element_bytes, block_d = key
    return _fitted(tile, 1, block_d, element_bytes, 227 << 10) == tile and tile.rows * block_d <= 4096 * tile.warps


Tunable(
    "triton", "long", LONG, {"rows": (64, 128), "keys": (32, 64, 128), "warps": (4, 8), "stages": (2, 3, 4)},
    lambda key: Shape(key[1], key[0]), "prefill", _exists,
)  # fmt: skip
Tunable(
    "triton", "split", SPLIT, {"keys": (16, 32, 64, 128), "warps": (2, 4, 8), "stages": (2, 3, 4, 5)},
    lambda key: Shape(key[1], key[0]), "decode", _exists,
)  # fmt: skip
Tunable(
    "triton", "pieces", PIECES, {"programs": (2, 3, 4, 6, 8, 12), "least_keys": (64, 128, 256, 512)},
    lambda key: Shape(None, key), "decode",
)  # fmt: skip


def _raised(tile: Tile, rows: int) -> Tile:
    """The tile with at least this many rows."""
    return tile._replace(rows=max(tile.rows, triton.next_power_of_2(rows)))


class _Plan(NamedTuple):
    """A call as its launches want it. pointers: q, k, v, places, starts, lengths, sinks, tree, tails, out, lse;
    numbers: scale and softcap in powers of two, strides; flags: constants that all kernels share."""

    call: Call
    pointers: tuple[torch.Tensor | None, ...]
    numbers: tuple[float | int, ...]
    flags: dict[str, Any]
    machine: Machine
    reach: int
    page: int

    @property
    def group(self) -> int:
        return int(self.flags["GROUP"])

    @property
    def kv_heads(self) -> int:
        return int(self.flags["KV_HEADS"])

    @property
    def requests(self) -> int:
        return self.call.lengths.shape[0]

    @property
    def kind(self) -> tuple[int, int]:
        """Of the tables of tiles."""
        return self.call.q.element_size(), max(64, int(self.flags["BLOCK_D"]))

    def fitted(self, tile: Tile, rows: int) -> Tile:
        """The tile raised to that many rows, then cut to the machine."""
        rows = max(rows, self.group)
        element_bytes = self.call.q.element_size()
        return _fitted(_raised(tile, rows), self.group, self.flags["BLOCK_D"], element_bytes, self.machine.shared_bytes)


def _traffic(*args: Any, **kwargs: Any) -> Cost:
    """Every tile of rows reads what any of them sees. Partial results, which stay in the cache, are left out."""
    call = Call(*args, **kwargs)
    plan = _planned(call, call.q, None)
    tall, flat, limit = _chosen(plan)
    head_dim, spans = call.q.shape[2], call.spans
    pairs = keys = 0
    for new, visible, seen in zip(spans.new, spans.visible, spans.trees or ((),) * len(spans.new)):
        tile = flat if flat is not None and (tall is None or new <= limit) else tall
        assert tile is not None
        rows = tile.rows // plan.group
        for first in range(0, new, rows):
            last = min(first + rows, new)
            whole = not call.causal or last > new - len(seen)
            end = visible if whole else max(visible - new + last, 0)
            begin = 0 if call.window is None else max(visible - new + first - call.window + 1, 0)
            keys += end - begin
            pairs += (last - first) * (-(-end // tile.keys) - begin // tile.keys) * tile.keys
    floor = attention.floor(*args, **kwargs)
    key_bytes = 2 * plan.kv_heads * head_dim * call.k.element_size()
    return Cost(
        flops=4 * call.q.shape[1] * head_dim * pairs,
        read_bytes=floor.read_bytes + (keys - spans.keys(call.window)) * key_bytes,
        write_bytes=floor.write_bytes,
        launches=(tall is not None) + 2 * (flat is not None),
    )


def attention_steady(*args: Any, **kwargs: Any) -> Attended:
    """`attention_triton`, batch-invariant: keys in pieces of SPLIT_KEYS."""
    return run(SPLIT_KEYS, *args, **kwargs)


@attention.kernel("triton", LIMITS.need, LIMITS.accepts, traffic=_traffic, invariant=attention_steady)
def attention_triton(*args: Any, **kwargs: Any) -> Attended:
    """One to three launches, whose grids and workspace follow from shapes alone; `spans` is only checked.

    The workspace (fp32 partial results) is taken from torch's allocator on every call, so that a captured
    graph owns it: (PIECES.programs * SMs / Hk + B) * Hk * tile rows * (D + 1) floats.
    """
    return run(None, *args, **kwargs)


def run(split_keys: int | None, /, *args: Any, **kwargs: Any) -> Attended:
    """`attention` with keys in fixed pieces, or (None) in pieces that balance the batch over the machine.

    Balanced pieces are the fastest, and bit-equal for equal batches, but the order in which a row's keys are added
    then depends on who else is in the batch. A number of keys cuts every request's keys at its multiples, in both
    kernels, whose tiles are then the same too: a row's bits depend on its own keys alone, whether it is decoded
    alone, in a batch, beside prefills or inside of one (He, "Defeating nondeterminism in LLM inference", 2025).
    What a row does not see adds exact zeros. The price: smaller tiles for prefill, larger ones for decode, and a
    workspace that grows with the capacity of the block tables: ceil(capacity / split_keys) * B * Hk * max(16, 2 H / Hk)
    * (D + 1) floats.
    """
    call = LIMITS.require(*args, **kwargs)
    q = call.q
    tokens, heads, head_dim = q.shape
    if q.device.type != "cuda" and not INTERPRETED:
        raise InvalidArgument("q", f"must be on a CUDA device for triton, not on {q.device}")
    out = torch.empty(tokens, heads, head_dim, device=q.device, dtype=q.dtype)
    lse = torch.empty(tokens, heads, device=q.device, dtype=torch.float32) if call.return_lse else None
    if tokens and call.lengths.shape[0]:
        plan = _planned(call, out, lse)
        if split_keys is None:
            _balanced(plan)
        else:
            _in_fixed_pieces(plan, FIXED[plan.kind], split_keys)
    return out if lse is None else (out, lse)


def _planned(call: Call, out: torch.Tensor, lse: torch.Tensor | None) -> _Plan:
    q, k = call.q, call.k
    paged = call.block_tables is not None
    page = k.shape[2] if paged else 0
    strides = k.stride()[:3] if paged else (0, k.stride(1), k.stride(0))
    table_stride = call.block_tables.stride(0) if call.block_tables is not None else 0
    tree_stride = 0 if call.tree is None else call.tree.stride(0)
    softcap = 0.0 if call.softcap is None else call.softcap * LOG2_E
    flags = {
        "KV_HEADS": k.shape[1],
        "GROUP": call.group,
        "WINDOWED": call.window is not None,
        "CAUSAL": call.causal,
        "CAPPED": call.softcap is not None,
        "WORDS": 0 if call.tree is None else call.tree.shape[1],
        "HEAD_DIM": q.shape[2],
        "BLOCK_D": max(16, triton.next_power_of_2(q.shape[2])),
        "PAGE": page,
    }
    return _Plan(
        call=call,
        pointers=(
            q, k, call.v, call.block_tables if paged else call.key_starts, call.query_starts, call.lengths,
            call.sinks, call.tree, call.tails, out, lse,
        ),
        numbers=(call.scale * LOG2_E, softcap, table_stride, tree_stride, q.stride(0), q.stride(1), *strides),
        flags=flags,
        machine=_machine(q.device),
        reach=call.window or 0,
        page=page,
    )  # fmt: skip


def _balanced(plan: _Plan) -> None:
    """The kernels that suit the shapes, pieces as long as balances the batch."""
    tall, flat, limit = _chosen(plan)
    if flat is not None:
        _run_split(plan, flat, flat.rows // plan.group, limit, None)
    if tall is not None:
        _run_long(plan, tall, limit, None)


def _chosen(plan: _Plan) -> tuple[Tile | None, Tile | None, int]:
    """Tiles of the long and of the split kernel, None for one that does not run, and the rows up to which a
    request is the split kernel's."""
    tokens, kind = plan.call.q.shape[0], plan.kind
    tall = plan.fitted(LONG[kind] if _copies(plan) else LOADED[kind], 1)
    average = -(-tokens // plan.requests)
    idle = tokens // (tall.rows // plan.group) * plan.kv_heads * 2 < plan.machine.multiprocessors
    if average <= FEW_ROWS or idle:
        return None, plan.fitted(SPLIT[kind], min(average * plan.group, SPLIT_ROWS)), EVERY
    if plan.requests == 1 or not plan.page:
        return tall, None, 0
    flat = plan.fitted(SPLIT[kind], MIXED_ROWS)
    return tall, flat, flat.rows // plan.group


def _in_fixed_pieces(plan: _Plan, tile: Tile, piece_keys: int) -> None:
    """Both kernels with one tile: short requests in pieces side by side, the others piece after piece."""
    tokens = plan.call.q.shape[0]
    tile = plan.fitted(tile, 1)
    fixed = max(1, piece_keys // tile.keys)
    if tokens <= plan.requests:  # a row each
        _run_split(plan, tile, 1, EVERY, fixed)
        return
    short = max(1, 16 // plan.group)
    if plan.requests > 1 or tokens <= short:
        _run_split(plan, tile, short, short, fixed)
    if tokens > short:
        _run_long(plan, tile, short, fixed)


def _run_long(plan: _Plan, tile: Tile, limit: int, fixed: int | None) -> None:
    tiles = plan.call.q.shape[0] // (tile.rows // plan.group) + plan.requests
    copied = _tiles(plan, tile) if fixed is None and _copies(plan) else (None, None)
    _long_kernel[(tiles * plan.kv_heads,)](
        *plan.pointers, *copied, plan.requests, tiles, _section(plan), limit, plan.reach, fixed or 1, *plan.numbers,
        BLOCK_M=tile.rows, KEYS=tile.keys, FIXED_PIECES=fixed is not None, **plan.flags,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def _copies(plan: _Plan) -> bool:
    """Whether the copy engine can take this call's keys: heads side by side in rows of a multiple of 16 bytes."""
    k, v = plan.call.k, plan.call.v
    if plan.page or not plan.machine.copies_tiles or plan.kind not in LONG or not k.shape[0]:
        return False
    # A head's box must end where the head does: next to it lie numbers of others.
    whole = plan.flags["HEAD_DIM"] == plan.flags["BLOCK_D"] and k.stride(1) == k.shape[2]
    return whole and k.stride(0) % 8 == 0 and (k.data_ptr() | v.data_ptr()) % 16 == 0


def _tiles(plan: _Plan, tile: Tile) -> tuple[TensorDescriptor, TensorDescriptor]:
    """Contiguous keys and values as matrices [keys, heads * head dim] that come in tiles."""
    k, block = plan.call.k, [tile.keys, plan.flags["BLOCK_D"]]
    shape, strides = [k.shape[0], k.shape[1] * k.shape[2]], [k.stride(0), 1]
    return TensorDescriptor(k, shape, strides, block), TensorDescriptor(plan.call.v, shape, strides, block)


def _section(plan: _Plan) -> int:
    """KV heads whose keys and values the cache holds together; all of them where only the device knows."""
    k = plan.call.k
    if plan.page:
        return plan.kv_heads
    head_bytes = 2 * k.shape[0] // plan.requests * k.shape[2] * k.element_size()
    return next(
        n for n in range(plan.kv_heads, 0, -1) if not plan.kv_heads % n and (n == 1 or n * head_bytes <= SECTION_BYTES)
    )


def _run_split(plan: _Plan, tile: Tile, rows: int, limit: int, fixed: int | None) -> None:
    """Launch the split kernel, and the merge if anything can have been split. rows: tokens of a tile in use."""
    q, k, requests = plan.call.q, plan.call.k, plan.requests
    kept = rows * plan.group if fixed is not None else tile.rows
    one_tile = limit <= rows
    row_tiles = requests if one_tile else q.shape[0] // rows + requests
    cut = PIECES[plan.call.q.element_size()]
    least = -(-cut.least_keys // tile.keys)
    share = least if fixed is None else fixed
    if plan.call.block_tables is not None:
        most = -(-plan.call.block_tables.shape[1] * plan.page // (tile.keys * share))  # pieces that a table can name
        count = most * row_tiles
    else:  # all keys are somebody's, so that the last pieces of each are what is to be added
        most = -(-k.shape[0] // (tile.keys * share))
        count = most + requests if one_tile else most * row_tiles
    pieces = max(1, cut.programs * plan.machine.multiprocessors // plan.kv_heads)
    if fixed is None:
        programs = count = min(pieces + row_tiles, count)
    else:  # few of those that tables could name are there: as many programs as suit the machine take them in turn
        programs = min(pieces, count)
    # Without a second piece nobody writes a partial result.
    size = count * plan.kv_heads * kept if most > 1 else 1
    partial = torch.empty(size, q.shape[2], device=q.device, dtype=torch.float32)
    partial_log = torch.empty(size, device=q.device, dtype=torch.float32)
    numbers = (requests, limit, plan.reach, pieces, fixed or 1)
    shared = {"ROWS": rows, "KEPT": kept, "KEYS": tile.keys, "LEAST": least, "FIXED_PIECES": fixed is not None}
    _split_kernel[(programs * plan.kv_heads,)](
        *plan.pointers, partial, partial_log, *numbers, *plan.numbers, BLOCK_M=tile.rows, **shared, **plan.flags,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    if most > 1:
        out, lse = plan.pointers[-2:]
        few = {name: plan.flags[name] for name in ("KV_HEADS", "GROUP", "WINDOWED", "HEAD_DIM", "BLOCK_D")}
        _merge_kernel[(row_tiles * q.shape[1],)](
            out, lse, partial, partial_log, plan.call.query_starts, plan.call.lengths, plan.call.sinks, *numbers,
            **shared, **few, ONE_TILE=one_tile, AT_ONCE=MERGED_AT_ONCE, num_warps=2,
        )  # fmt: skip
