"""`propose` in two launches: the best few of each stretch of the vocabulary, then the best few of those.

Knows logits and per-row settings. It must not know trees. Noise and stretches are those of sample.py; greedy and warm
rows go through the same launch, since a row's temperature says which it is.

A token and its score are one integer of 64 bits that orders by score, then by the lower id: taking the best is one
maximum, and what is taken is struck out. Each stretch leaves its best in order, so that the second launch merges lists
by their heads. Weights of the softmax are added up as integers, whose sum is the same in any order: a row's bits
are its own business.
"""

import torch
import triton
import triton.language as tl

from ridgeline.kernels.triton.dependent import dependent, ready, starting
from ridgeline.kernels.triton.sample import MAX_VOCABULARY, STRETCH, WARPS, gumbel, philox, uniform
from ridgeline.ops.op import cuda
from ridgeline.ops.propose import propose

LISTS = triton.next_power_of_2(MAX_VOCABULARY // STRETCH)

NOTHING: tl.constexpr = tl.constexpr(-0x8000000000000000)  # below every token
LAST_ID: tl.constexpr = tl.constexpr(0x7FFFFFFF)
UNITS: tl.constexpr = tl.constexpr(1099511627776.0)  # of the likeliest token's weight: 2^40


@triton.jit
def _ranked(score: tl.tensor, token: tl.tensor) -> tl.tensor:
    """Scores [N] fp32 (no NaN) with their tokens as int64 in their order; of equals the lower id is better."""
    bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)  # minus zero is zero
    rising = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (rising.to(tl.int64) << 32) | (token ^ LAST_ID).to(tl.int64)


@triton.jit(
    do_not_specialize=["stretches", "count"],
    do_not_specialize_on_alignment=["temperature", "seeds", "positions", "best", "peaks", "weights"],
)
def _few_kernel(
    logits: tl.tensor,
    temperature: tl.tensor,
    seeds: tl.tensor,
    positions: tl.tensor,
    best: tl.tensor,
    peaks: tl.tensor,
    weights: tl.tensor,
    logits_stride: tl.tensor,
    tokens: tl.tensor,
    stretches: tl.tensor,
    count: tl.tensor,
    STRETCH: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    """One stretch of one row: its `count` best, its highest logit, and the sum of weights relative to that."""
    starting(EARLY)
    ready(EARLY)
    row = (tl.program_id(0) // stretches).to(tl.int64)
    start = tl.program_id(0) % stretches * STRETCH
    token = start + tl.arange(0, STRETCH)
    inside = token < tokens
    score = tl.load(logits + row * logits_stride + token, mask=inside, other=float("-inf")).to(tl.float32)
    score = tl.where(score == score, score, float("-inf"))
    warmth = tl.load(temperature + row)
    score = tl.div_rn(score, tl.zeros_like(score) + tl.where(warmth > 0, warmth, 1.0))
    peak = tl.max(score, axis=0)
    weight = tl.where(peak == float("-inf"), 0.0, tl.exp(score - peak))
    tl.store(peaks + tl.program_id(0), peak)
    tl.store(weights + tl.program_id(0), tl.sum((weight * UNITS).to(tl.int64), axis=0))
    if warmth > 0:
        seed, position = tl.load(seeds + row), tl.load(positions + row)
        group = (start // 4 + tl.arange(0, STRETCH // 4)).to(tl.uint32)
        zero = tl.zeros_like(group)
        w0, w1, w2, w3 = philox(
            group,
            zero + (position & 0xFFFFFFFF).to(tl.uint32),
            zero + ((position >> 32) & 0xFFFFFFFF).to(tl.uint32),
            zero,
            (seed & 0xFFFFFFFF).to(tl.uint32),
            ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32),
        )
        # Four words a group, in order: the last of two joins is the slower index.
        bits = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (STRETCH,))
        score += gumbel(uniform(bits))
    ranked = tl.where(inside, _ranked(score, token), NOTHING)
    for place in range(count):
        top = tl.max(ranked, axis=0)
        tl.store(best + tl.program_id(0).to(tl.int64) * count + place, top)
        ranked = tl.where(ranked == top, NOTHING, ranked)


@triton.jit(
    do_not_specialize=["stretches", "count"],
    do_not_specialize_on_alignment=["temperature", "best", "peaks", "weights", "out", "chances"],
)
def _few_of_few_kernel(
    logits: tl.tensor,
    temperature: tl.tensor,
    best: tl.tensor,
    peaks: tl.tensor,
    weights: tl.tensor,
    out: tl.tensor,
    chances: tl.tensor,
    logits_stride: tl.tensor,
    stretches: tl.tensor,
    count: tl.tensor,
    LISTS: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    """One row: its stretches' lists merged, and the probability of what they give."""
    starting(EARLY)
    ready(EARLY)
    row = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, LISTS)
    inside = index < stretches
    own = tl.load(peaks + row * stretches + index, mask=inside, other=float("-inf"))
    peak = tl.max(own, axis=0)
    weight = tl.load(weights + row * stretches + index, mask=inside, other=0).to(tl.float32)
    weight = tl.where(own == float("-inf"), 0.0, weight * tl.exp(own - peak))
    total = tl.sum(weight.to(tl.int64), axis=0).to(tl.float32) / UNITS
    warmth = tl.load(temperature + row)
    taken = tl.zeros((LISTS,), tl.int32)
    for place in range(count):
        heads = best + (row * stretches + index) * count + taken
        ranked = tl.load(heads, mask=inside & (taken < count), other=NOTHING)
        top = tl.max(ranked, axis=0)
        taken += (ranked == top).to(tl.int32)
        token = (top & 0xFFFFFFFF) ^ LAST_ID
        score = tl.load(logits + row * logits_stride + token).to(tl.float32)
        score = tl.div_rn(score, tl.where(warmth > 0, warmth, 1.0))
        tl.store(out + row * count + place, token)
        tl.store(chances + row * count + place, tl.exp(score - peak) / total)


def _accepts(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    greedy: bool,
    count: int,
) -> str | None:
    if logits.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"takes fp32, bf16 and fp16 logits, not {logits.dtype}"
    if logits.shape[1] > MAX_VOCABULARY:
        return f"takes vocabularies of at most {MAX_VOCABULARY}, not {logits.shape[1]}"
    return None


@propose.kernel("triton", needs=cuda(80), accepts=_accepts, invariant=True)
def propose_triton(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    greedy: bool,
    count: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The reference's tokens, but for scores that differ in the last bits of their logarithms alone.

    A NaN counts as -inf. Made for a few children: a launch takes one maximum of a stretch for each of them.
    """
    rows, tokens = logits.shape
    if not 0 < count <= tokens:
        raise ValueError(f"count must be within 1 and the {tokens} tokens of the vocabulary, not {count}")
    out = torch.empty(rows, count, device=logits.device, dtype=torch.int64)
    chances = torch.empty(rows, count, device=logits.device, dtype=torch.float32)
    if not rows:
        return out, chances
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    stretches = triton.cdiv(tokens, STRETCH)
    best = torch.empty(rows * stretches * count, device=logits.device, dtype=torch.int64)
    peaks = torch.empty(rows * stretches, device=logits.device, dtype=torch.float32)
    weights = torch.empty(rows * stretches, device=logits.device, dtype=torch.int64)
    _few_kernel[(rows * stretches,)](
        logits,
        temperature,
        seeds,
        positions,
        best,
        peaks,
        weights,
        logits.stride(0),
        tokens,
        stretches,
        count,
        STRETCH=STRETCH,
        num_warps=WARPS,
        **dependent(logits.device),
    )
    _few_of_few_kernel[(rows,)](
        logits,
        temperature,
        best,
        peaks,
        weights,
        out,
        chances,
        logits.stride(0),
        stretches,
        count,
        LISTS=LISTS,
        num_warps=1,
        **dependent(logits.device),
    )
    return out, chances
