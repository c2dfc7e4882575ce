"""`attention` on the CPU: online softmax over keys in blocks of 32 and segments of 256 that begin at key 0.

Knows pages, groups of query heads, the causal mask and trees. A unit of work is one KV head of one request with
a tile of its new rows: the tile's queries (rows x heads of the group) pass over each block of keys while
it lies in the cache. A query's segments are summed one by one and then merged in order; if there are fewer
tiles than threads, each segment is a unit of its own and `merge_rows` merges, with the same result. What a
row and head add up, and in which order, depends on their own visible keys alone, so a result is the same
for every page size, chunk, batch and number of threads. A node of a tree adds up the keys of its path in the
order and at the places that they would have if the path had been appended alone, so its result is that too.

Online softmax: Milakov and Gimelshein, 1805.02867; split keys: Dao et al., "Flash-Decoding" (2023).
"""

from __future__ import annotations

import numpy as np

from ridgeline.kernels.cpu.blocks import SEGMENT_KEYS
from ridgeline.kernels.cpu.code.dots import dots, mix
from ridgeline.kernels.cpu.code.memory import clear, read, widen, write
from ridgeline.kernels.cpu.code.part import njit
from ridgeline.kernels.cpu.code.vector import (
    argument,
    copy,
    exp2,
    float_of,
    fma,
    inside,
    larger,
    load_float,
    load_i32,
    load_scalar,
    peak,
    splat,
    store_float,
    store_i32,
    store_scalar,
    total,
)

KEYS = 32
"""Keys of a step of the softmax: two groups of 16."""

STRAIGHT = 4
"""Queries up to which bf16 keys are widened once more for each rather than copied."""

HIDDEN = np.float32(-np.inf)


@njit
def attend(  # type: ignore[no-untyped-def]
    q,
    k0,
    k1,
    v0,
    v1,
    stride,
    low,
    high,
    width,
    acc,
    state,
    weights,
    half,
):
    """One query and keys low .. high - 1 of a block: two groups of 16 keys and values, `stride` bytes apart.

    half: whether keys and values are bf16. acc: the sum of values so far; state: the largest score so far
    (in powers of two) and the sum of weights; weights: scratch for 32.
    """
    s0, s1 = splat(HIDDEN), splat(HIDDEN)
    if low < 16:
        s0 = inside(dots(q, k0, stride, width, 16, half), low, high, HIDDEN)
    if high > 16:
        s1 = inside(dots(q, k1, stride, width, 16, half), low - 16, high - 16, HIDDEN)
    before = load_scalar(state)
    best = peak(larger(s0, s1))
    vectors = (width + 15) // 16
    summed = load_scalar(state + 4)
    if best > before:
        factor = exp2(splat(before - best))
        for at in range(0, 64 * vectors, 64):
            store_float(acc + at, load_float(acc + at) * factor)
        summed = total(inside(factor, 0, 1, np.float32(0.0))) * summed
    else:
        best = before
    top = splat(best)
    w0, w1 = exp2(s0 - top), exp2(s1 - top)
    store_float(weights, w0)
    store_float(weights + 64, w1)
    store_scalar(state, best)
    store_scalar(state + 4, summed + total(w0 + w1))
    mix(weights, v0, stride, max(low, 0), min(high, 16), acc, vectors, half)
    if high > 16:
        mix(weights + 64, v1, stride, max(low - 16, 0), high - 16, acc, vectors, half)


@njit
def gathered(  # type: ignore[no-untyped-def]
    pages,
    table,
    head,
    kv_heads,
    block,
    width,
    half,
    first,
    low,
    high,
    target,
):
    """Copy keys (or values) first + low .. first + high - 1 to rows low .. high - 1 of fp32, to whole vectors."""
    size = 4 - 2 * half
    stride = (width + 15) // 16 * 64
    for key in range(first + low, first + high):
        page = load_i32(table + 4 * (key // block))
        source = pages + ((page * kv_heads + head) * block + key % block) * width * size
        widen(source, target + (key - first) * stride, half, width)


@njit
def is_ancestor(bits, node):  # type: ignore[no-untyped-def]
    """Whether a row of a tree sees a node."""
    return (load_i32(bits + 4 * (node // 32)) >> (node % 32)) & 1


@njit
def length_of_path(bits, nodes):  # type: ignore[no-untyped-def]
    """Nodes that a row of a tree sees, itself included."""
    count = 0
    for node in range(nodes):
        count += is_ancestor(bits, node)
    return count


@njit
def gathered_path(  # type: ignore[no-untyped-def]
    pages,
    table,
    head,
    kv_heads,
    block,
    width,
    half,
    first,
    low,
    tail,
    nodes,
    bits,
    target,
):
    """The same for a row of a tree: keys before `tail`, then those of its path in their order, as if they had
    been appended one after the other."""
    gathered(pages, table, head, kv_heads, block, width, half, first, low, min(KEYS, tail - first), target)
    size = 4 - 2 * half
    stride = (width + 15) // 16 * 64
    place = tail
    for node in range(nodes):
        if is_ancestor(bits, node):
            if first + low <= place and place < first + KEYS:
                key = tail + node
                page = load_i32(table + 4 * (key // block))
                source = pages + ((page * kv_heads + head) * block + key % block) * width * size
                widen(source, target + (place - first) * stride, half, width)
            place += 1


@njit
def restart(state, sums, count, line):  # type: ignore[no-untyped-def]
    """Nothing seen yet: the largest score is hidden, sums are zero."""
    for index in range(count):
        store_scalar(state + 8 * index, HIDDEN)
        store_scalar(state + 8 * index + 4, np.float32(0.0))
    clear(sums, count * line // 4)


@njit
def merge(state, sums, other_state, other_sums, line):  # type: ignore[no-untyped-def]
    """Add a later segment (largest score, sum of weights, sum of values) to an earlier one."""
    before, best = load_scalar(state), load_scalar(other_state)
    if best == HIDDEN:
        return
    top = max(before, best)
    ours, theirs = exp2(splat(before - top)), exp2(splat(best - top))
    weights = splat(load_scalar(state + 4)) * ours
    weights = fma(splat(load_scalar(other_state + 4)), theirs, weights)
    store_scalar(state, top)
    store_scalar(state + 4, peak(weights))
    for at in range(0, line, 64):
        store_float(sums + at, fma(load_float(other_sums + at), theirs, load_float(sums + at) * ours))


def attention_tiles(arguments: int, scratch: int, begin: int, end: int) -> None:
    q, k_pages, v_pages, out = (
        argument(arguments, 0),
        argument(arguments, 1),
        argument(arguments, 2),
        argument(arguments, 3),
    )
    tables, starts, lengths = argument(arguments, 4), argument(arguments, 5), argument(arguments, 6)
    requests, blocks = argument(arguments, 7), argument(arguments, 8)
    heads, kv_heads = argument(arguments, 9), argument(arguments, 10)
    block, width, half = argument(arguments, 11), argument(arguments, 12), argument(arguments, 13)
    tile, window = argument(arguments, 14), argument(arguments, 15)
    scale = splat(float_of(argument(arguments, 16)))
    # partial: 0, or where to put each query's segments, of which there are at most `segments`.
    segments, partial = argument(arguments, 17), argument(arguments, 18)
    # trees: 0, or the ancestor bits of each row, `words` words each; tails: nodes of each request.
    trees, words, tails = argument(arguments, 19), argument(arguments, 20), argument(arguments, 21)
    size = 4 - 2 * half
    group = heads // kv_heads
    # Rows of fp32 are padded to whole vectors.
    line = (width + 15) // 16 * 64
    aligned = width % 16 == 0 and block % 16 == 0
    queries = scratch
    sums = queries + tile * group * line
    whole_sums = sums + tile * group * line
    states = whole_sums + tile * group * line
    whole_states = states + tile * group * 8
    weights = whole_states + tile * group * 8
    reaches = weights + 128
    copies = reaches + 128
    for unit in range(begin, end):
        # Units are numbered request by request, tile by tile, head by head, segment by segment; those left
        # over are empty.
        request, left = 0, unit // segments // kv_heads
        while request < requests:
            new = load_i32(starts + 4 * request + 4) - load_i32(starts + 4 * request)
            tiles = (new + tile - 1) // tile
            if left < tiles:
                break
            left -= tiles
            request += 1
        if request == requests:
            continue
        head = unit // segments % kv_heads
        start = load_i32(starts + 4 * request)
        new = load_i32(starts + 4 * request + 4) - start
        visible, table = load_i32(lengths + 4 * request), tables + 4 * blocks * request
        first = left * tile
        rows = min(tile, new - first)
        count = rows * group
        # Row i of the tile sees keys before its reach, none before `lowest`. Rows from `chain` on are nodes of a
        # tree, whose keys begin at `tail`: they reach as far as if their path had been appended alone.
        limit, nodes = visible - new + first + 1, 0
        if trees != 0:
            nodes = load_i32(tails + 4 * request)
        chain, tail = new - nodes - first, visible - nodes
        highest, earliest = 0, limit
        for row in range(rows):
            reach = limit + row
            if row >= chain:
                reach = tail + length_of_path(trees + (start + first + row) * words * 4, nodes)
            store_i32(reaches + 4 * row, reach)
            highest, earliest = max(highest, reach), min(earliest, reach)
        lowest = 0
        if window > 0:
            lowest = max(0, earliest - window)
        if partial != 0:
            lowest = max(lowest, unit % segments * SEGMENT_KEYS)
            highest = min(highest, (unit % segments + 1) * SEGMENT_KEYS)
        for index in range(count):
            place = (start + first + index // group) * heads + head * group + index % group
            for at in range(0, width, 16):
                value = read(q + (place * width + at) * size, half, width - at)
                store_float(queries + index * line + 4 * at, value * scale)
        restart(states, sums, count, line)
        restart(whole_states, whole_sums, count, line)
        # Groups of 16 keys are read where they lie if that is as good as a copy: bf16 for few queries only.
        straight = aligned and (half == 0 or count <= STRAIGHT)
        pitch = width * size
        for key in range(lowest // KEYS * KEYS, highest, KEYS):
            present = min(KEYS, highest - key)
            skipped = max(lowest - key, 0)
            own = chain < rows and key + KEYS > tail  # each row sees keys of its own here
            k0, v0 = copies, copies + KEYS * line
            k1, v1 = k0 + 16 * line, v0 + 16 * line
            apart, raw = line, 0
            if straight and not own:
                apart, raw = pitch, half
                page = (load_i32(table + 4 * (key // block)) * kv_heads + head) * block + key % block
                k0, v0 = k_pages + page * pitch, v_pages + page * pitch
                k1, v1 = k0, v0
                if present > 16:
                    page = (load_i32(table + 4 * ((key + 16) // block)) * kv_heads + head) * block + (key + 16) % block
                    k1, v1 = k_pages + page * pitch, v_pages + page * pitch
            elif not own:
                gathered(k_pages, table, head, kv_heads, block, width, half, key, skipped, present, k0)
                gathered(v_pages, table, head, kv_heads, block, width, half, key, skipped, present, v0)
            for index in range(count):
                row = index // group
                high = load_i32(reaches + 4 * row)
                low = 0
                if window > 0:
                    low = max(0, high - window)
                if key < high and key + KEYS > low:
                    if own and index % group == 0:
                        if row >= chain:
                            bits = trees + (start + first + row) * words * 4
                            gathered_path(
                                k_pages, table, head, kv_heads, block, width, half, key, skipped, tail, nodes, bits, k0
                            )
                            gathered_path(
                                v_pages, table, head, kv_heads, block, width, half, key, skipped, tail, nodes, bits, v0
                            )
                        else:
                            there = min(KEYS, high - key)
                            gathered(k_pages, table, head, kv_heads, block, width, half, key, skipped, there, k0)
                            gathered(v_pages, table, head, kv_heads, block, width, half, key, skipped, there, v0)
                    attend(
                        queries + index * line,
                        k0,
                        k1,
                        v0,
                        v1,
                        apart,
                        low - key,
                        min(high - key, KEYS),
                        width,
                        sums + index * line,
                        states + 8 * index,
                        weights,
                        raw,
                    )
            if partial == 0 and (key + KEYS) % SEGMENT_KEYS == 0:
                for index in range(count):
                    merge(
                        whole_states + 8 * index,
                        whole_sums + index * line,
                        states + 8 * index,
                        sums + index * line,
                        line,
                    )
                restart(states, sums, count, line)
        for index in range(count):
            place = (start + first + index // group) * heads + head * group + index % group
            if partial != 0:
                target = partial + (place * segments + unit % segments) * (64 + line)
                copy(target, states + 8 * index, 8)
                copy(target + 64, sums + index * line, line)
            else:
                merge(
                    whole_states + 8 * index, whole_sums + index * line, states + 8 * index, sums + index * line, line
                )
                finish(whole_states + 8 * index, whole_sums + index * line, out + place * width * size, width, half)


@njit
def finish(state, sums, target, width, half):  # type: ignore[no-untyped-def]
    """Sum of values by sum of weights; zeros if no key was seen."""
    summed = load_scalar(state + 4)
    weights = splat(np.float32(1.0) if summed == np.float32(0.0) else summed)
    for at in range(0, width, 16):
        write(target + at * (4 - 2 * half), half, width - at, load_float(sums + 4 * at) / weights)


def merge_rows(arguments: int, scratch: int, begin: int, end: int) -> None:
    """Merge each query's segments, a unit being a query."""
    partial, out, segments = argument(arguments, 0), argument(arguments, 1), argument(arguments, 2)
    width, half = argument(arguments, 3), argument(arguments, 4)
    line = (width + 15) // 16 * 64
    for query in range(begin, end):
        restart(scratch, scratch + 64, 1, line)
        for segment in range(segments):
            other = partial + (query * segments + segment) * (64 + line)
            merge(scratch, scratch + 64, other, other + 64, line)
        finish(scratch, scratch + 64, out + query * width * (4 - 2 * half), width, half)
