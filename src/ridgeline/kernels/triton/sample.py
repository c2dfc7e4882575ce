"""Choosing tokens in two launches: the best of each stretch of the vocabulary, then the best of those.

Knows logits and per-row settings. It must not know requests or text. The noise is ops/sample.py's, word
for word: a token's Gumbel noise depends on (seed, position, token) alone, so the stretches need nothing
from each other, and greedy and warm rows go through the same launch. Rows that are cut (top-k, top-p,
min-p) get their mask from the reference's sort; fusing that is not worth a kernel until a profile says so.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl

from ridgeline.kernels.torch.sample import kept_steadily
from ridgeline.kernels.triton.dependent import dependent, ready, starting
from ridgeline.ops.op import cuda
from ridgeline.ops.sample import kept, sample

MAX_VOCABULARY = 1 << 18
STRETCH = 2048  # tokens that a program looks at
WARPS = 8

NOBODY: tl.constexpr = tl.constexpr(0x7FFFFFFF)  # an id above all


@triton.jit
def philox(
    a: tl.tensor, b: tl.tensor, c: tl.tensor, d: tl.tensor, k0: tl.tensor, k1: tl.tensor
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Philox4x32-10 (Salmon et al., SC 2011) of uint32 counters and keys, as in ops/sample.py."""
    for _ in tl.static_range(10):
        high_a, low_a = tl.umulhi(a, 0xD2511F53), a * 0xD2511F53
        high_c, low_c = tl.umulhi(c, 0xCD9E8D57), c * 0xCD9E8D57
        a, b, c, d = high_c ^ b ^ k0, low_c, high_a ^ d ^ k1, low_a
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return a, b, c, d


@triton.jit
def uniform(bits: tl.tensor) -> tl.tensor:
    """fp32((bits + 1/2) / 2^32), at most 1 - 2^-24, without the fp64 that small GPUs are slow at.

    bits + 1/2 rounds to fp32 as follows: exactly computed below 2^24; there and above the half only
    breaks ties upwards, which adding it to an odd number (below 2^25), or setting a bit too low to count
    itself, does as well.
    """
    tipped = tl.where(bits >= 33554432, bits | 1, (bits + 1) & 0xFFFFFFFE)
    wide = tl.where(bits < 16777216, bits.to(tl.float32) + 0.5, tipped.to(tl.float32))
    return tl.minimum(wide * 2.3283064365386963e-10, 0.99999994)


@triton.jit
def gumbel(u: tl.tensor) -> tl.tensor:
    """-log(-log(1 - u)) with log(1 - u) accurate for small u, which decide who wins.

    log1p(-u) = log(w) * -u / (w - 1) for w = fl(1 - u) (Kahan): the rounding of w is in both factors and
    cancels. Where w is 1, log1p(-u) is -u.
    """
    w = 1.0 - u
    # The division needs a divisor even where its result is not taken.
    ratio = tl.div_rn(u, tl.where(w == 1.0, 1.0, 1.0 - w))
    return -tl.log(tl.where(w == 1.0, u, -tl.log(w) * ratio))


@triton.jit(
    do_not_specialize=["stretches"],
    do_not_specialize_on_alignment=["temperature", "seeds", "positions", "keep", "best", "best_id"],
)
def _stretch_kernel(
    logits: tl.tensor,
    temperature: tl.tensor,
    seeds: tl.tensor,
    positions: tl.tensor,
    keep: tl.tensor,
    best: tl.tensor,
    best_id: tl.tensor,
    logits_stride: tl.tensor,
    tokens: tl.tensor,
    stretches: tl.tensor,
    GREEDY: tl.constexpr,
    STRETCH: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    starting(EARLY)
    ready(EARLY)
    row = (tl.program_id(0) // stretches).to(tl.int64)
    start = tl.program_id(0) % stretches * STRETCH
    token = start + tl.arange(0, STRETCH)
    inside = token < tokens
    score = tl.load(logits + row * logits_stride + token, mask=inside, other=float("-inf")).to(tl.float32)
    broken = tl.max((score != score).to(tl.int32), axis=0)
    if not GREEDY:
        warmth = tl.load(temperature + row)
        if warmth > 0:
            score = tl.div_rn(score, warmth)
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
            if keep is not None:
                kept_here = tl.load(keep + row * tokens + token, mask=inside, other=0)
                score = tl.where(kept_here != 0, score, float("-inf"))
    # Lanes past the end lose by their higher ids. A NaN wins, as the id that the vocabulary does not have.
    score = tl.where(score == score, score, float("-inf"))
    top = tl.max(score, axis=0)
    winner = tl.min(tl.where(score == top, token, NOBODY), axis=0)
    tl.store(best + tl.program_id(0), tl.where(broken > 0, float("inf"), top))
    tl.store(best_id + tl.program_id(0), tl.where(broken > 0, tokens.to(tl.int32), winner))


@triton.jit(do_not_specialize=["stretches"], do_not_specialize_on_alignment=["best", "best_id", "out"])
def _choose_kernel(
    best: tl.tensor,
    best_id: tl.tensor,
    out: tl.tensor,
    stretches: tl.tensor,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    starting(EARLY)
    ready(EARLY)
    row = tl.program_id(0)
    index = tl.arange(0, BLOCK)
    inside = index < stretches
    score = tl.load(best + row * stretches + index, mask=inside, other=float("-inf"))
    token = tl.load(best_id + row * stretches + index, mask=inside, other=NOBODY)
    winner = tl.min(tl.where(score == tl.max(score, axis=0), token, NOBODY), axis=0)
    tl.store(out + row, winner.to(tl.int64))


def _accepts(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    greedy: bool,
    cut: bool,
) -> str | None:
    if logits.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"takes fp32, bf16 and fp16 logits, not {logits.dtype}"
    if logits.shape[1] > MAX_VOCABULARY:
        return f"takes vocabularies of at most {MAX_VOCABULARY}, not {logits.shape[1]}"
    return None


def sample_steadily(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    greedy: bool,
    cut: bool,
) -> torch.Tensor:
    """`sample_triton`, batch-invariant: the cut's sums are torch's, whose order depends on the other rows."""
    keep = _mask(kept_steadily, logits, temperature, top_k, top_p, min_p) if cut and not greedy else None
    return _chosen(logits, temperature, seeds, positions, greedy, keep)


@sample.kernel("triton", needs=cuda(80), accepts=_accepts, invariant=sample_steadily)
def sample_triton(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    greedy: bool,
    cut: bool,
) -> torch.Tensor:
    """Two launches; the reference's integers and, but for the last bits of logarithms, its tokens.

    Unlike the reference, a row with NaN logits gives a token of the vocabulary (the best of the others).
    """
    keep = _mask(kept, logits, temperature, top_k, top_p, min_p) if cut and not greedy else None
    return _chosen(logits, temperature, seeds, positions, greedy, keep)


def _mask(
    cut: Callable[..., torch.Tensor],
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
) -> torch.Tensor:
    """Tokens that survive `cut`, [R, V] uint8."""
    warmth = torch.where(temperature > 0, temperature, 1.0)
    return cut(logits.float() / warmth[:, None], top_k, top_p, min_p).view(torch.uint8)


def _chosen(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    greedy: bool,
    keep: torch.Tensor | None,
) -> torch.Tensor:
    """The best of each row by its noise, of the tokens in `keep` (None: all)."""
    rows, tokens = logits.shape
    out = torch.empty(rows, device=logits.device, dtype=torch.int64)
    if not rows:
        return out
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    stretches = triton.cdiv(tokens, STRETCH)
    best = torch.empty(rows * stretches, device=logits.device, dtype=torch.float32)
    best_id = torch.empty(rows * stretches, device=logits.device, dtype=torch.int32)
    _stretch_kernel[(rows * stretches,)](
        logits,
        temperature,
        seeds,
        positions,
        keep,
        best,
        best_id,
        logits.stride(0),
        tokens,
        stretches,
        GREEDY=greedy,
        STRETCH=STRETCH,
        num_warps=WARPS,
        **dependent(logits.device),
    )
    _choose_kernel[(rows,)](
        best,
        best_id,
        out,
        stretches,
        BLOCK=triton.next_power_of_2(MAX_VOCABULARY // STRETCH),
        num_warps=1,
        **dependent(logits.device),
    )
    return out
