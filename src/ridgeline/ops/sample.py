"""Choosing tokens: penalties, the cut of the distribution, and argmax with counter-based noise.

Knows logits and per-row settings. It must not know requests, text or grammars.

A token is chosen as argmax(log p + G), G being Gumbel noise that depends on (seed, position, token) and
on nothing else: no batch, no history of draws. That is a draw from p (Maddison et al., 1411.0030), it is
the same alone and in any batch, and speculation can reproduce it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from ridgeline.core.cost import Cost
from ridgeline.ops.op import Tolerance, op
from ridgeline.ops.weight import nbytes

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
WORD = 0xFFFFFFFF


def philox(counter: list[torch.Tensor], key: list[torch.Tensor]) -> list[torch.Tensor]:
    """Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).

    counter: four, key: two int64 tensors holding 32-bit words, broadcast together. Returns four words.
    """
    a, b, c, d = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        first, second = a * MULTIPLIERS[0], c * MULTIPLIERS[1]
        a, b, c, d = (
            ((second >> 32) & WORD) ^ b ^ k0,
            second & WORD,
            ((first >> 32) & WORD) ^ d ^ k1,
            first & WORD,
        )
        k0, k1 = (k0 + WEYL[0]) & WORD, (k1 + WEYL[1]) & WORD
    return [a, b, c, d]


def gumbel(seeds: torch.Tensor, positions: torch.Tensor, tokens: int) -> torch.Tensor:
    """Standard Gumbel noise [R, tokens], fp32, for rows with these seeds and positions ([R] int64).

    Token v takes word v % 4 of philox(counter = (v // 4, position, 0, 0), key = seed). With u uniform on
    (0, 1), G = -log(-log(1 - u)): small u, which decide who wins, keep their full resolution.
    """
    groups = torch.arange(-(-tokens // 4), device=seeds.device, dtype=torch.int64)[None, :]
    zero = torch.zeros_like(groups)
    seeds, positions = seeds[:, None], positions[:, None]
    words = philox(
        [groups + 0 * positions, (positions & WORD) + zero, ((positions >> 32) & WORD) + zero, zero + 0 * positions],
        [(seeds & WORD) + zero, ((seeds >> 32) & WORD) + zero],
    )
    bits = torch.stack(words, dim=-1).flatten(1)[:, :tokens]
    uniform = ((bits.double() + 0.5) * 2.0**-32).float().clamp(max=1 - 2.0**-24)
    return -torch.log(-torch.log1p(-uniform))


def kept(scaled: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor) -> torch.Tensor:
    """Which tokens survive top-k, then top-p of what is left, then min-p: a mask [R, V].

    scaled: [R, V] logits after the temperature; top_k: [R] int64 (0: all); top_p, min_p: [R] fp32.
    Ties go to the lower id, so that exactly k tokens survive top-k.
    """
    ordered, order = scaled.sort(dim=-1, descending=True, stable=True)
    ranks = torch.arange(scaled.shape[-1], device=scaled.device)[None, :]
    count = torch.where(top_k > 0, top_k, scaled.shape[-1])[:, None]
    keep = ranks < count
    probabilities = ordered.masked_fill(~keep, float("-inf")).softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    keep &= (before < top_p[:, None]) | (ranks == 0)
    keep &= probabilities >= min_p[:, None] * probabilities[:, :1]
    return torch.zeros_like(keep).scatter(-1, order, keep)


def lowest_argmax(scores: torch.Tensor) -> torch.Tensor:
    """argmax over the last dimension, the lowest index on a tie, on every device."""
    best = scores.amax(-1, keepdim=True)
    ids = torch.arange(scores.shape[-1], device=scores.device)
    return torch.where(scores == best, ids, scores.shape[-1]).amin(-1)


@op("elementwise", float32=Tolerance(0, 0), bfloat16=Tolerance(0, 0), float16=Tolerance(0, 0))
def sample(
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
    """The next token of each row.

    logits: [R, V]; temperature (0: greedy), top_p, min_p: [R] fp32; top_k (0: all), seeds, positions:
    [R] int64. greedy: every row is greedy; cut: some row uses top_k, top_p or min_p (both known to the
    host, so that the work is left out otherwise). Returns [R] int64; a row with a NaN gives V, which is no
    token.
    """
    if logits.device.type == "meta":
        return torch.empty(logits.shape[0], dtype=torch.int64, device=logits.device)
    wide = logits.float()
    if greedy:
        return lowest_argmax(wide)
    cold = (temperature == 0)[:, None]
    scaled = wide / torch.where(cold, 1.0, temperature[:, None])
    noisy = scaled + gumbel(seeds, positions, logits.shape[-1])
    if cut:
        noisy = noisy.masked_fill(~kept(scaled, top_k, top_p, min_p), float("-inf"))
    return lowest_argmax(torch.where(cold, wide, noisy))


@sample.cost
def _(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    greedy: bool,
    cut: bool,
) -> Cost:
    rows = logits.shape[0]
    settings = nbytes() if greedy else nbytes(temperature, top_k, top_p, min_p, seeds, positions)
    return Cost(
        flops=logits.numel() * (1 if greedy else 8),
        read_bytes=nbytes(logits) + settings,
        write_bytes=8 * rows,
    )


@sample.examples
def _(device: Any, dtype: torch.dtype) -> Iterator[Mapping[str, Any]]:
    for rows, tokens, greedy, cut in ((1, 50, True, False), (5, 1003, False, False), (6, 300, False, True)):
        yield {
            "logits": 4 * torch.randn(rows, tokens, device=device, dtype=dtype),
            "temperature": torch.tensor([0.0, 1.0, 0.7, 1.5, 0.3, 1.0][:rows], device=device),
            "top_k": torch.tensor([0, 5, 0, 1, 40, 0][:rows], device=device),
            "top_p": torch.tensor([1.0, 1.0, 0.8, 0.9, 0.95, 1.0][:rows], device=device),
            "min_p": torch.tensor([0.0, 0.0, 0.0, 0.1, 0.05, 0.2][:rows], device=device),
            "seeds": torch.randint(-(1 << 62), 1 << 62, (rows,), device=device),
            "positions": torch.randint(1 << 20, (rows,), device=device),
            "greedy": greedy,
            "cut": cut,
        }


@op("elementwise", by_rows=True, float32=Tolerance(1e-6, 1e-6))
def adjust(
    logits: torch.Tensor,
    seen_rows: torch.Tensor,
    seen_tokens: torch.Tensor,
    seen_counts: torch.Tensor,
    in_output: torch.Tensor,
    presence: torch.Tensor,
    frequency: torch.Tensor,
    repetition: torch.Tensor,
    bias_rows: torch.Tensor,
    bias_tokens: torch.Tensor,
    bias_values: torch.Tensor,
) -> torch.Tensor:
    """Logits after penalties, biases and forbidden tokens, fp32 [R, V], as a new tensor.

    seen_*: one entry for each distinct (row, token) of prompt and output: row, token id, times in the
    output, and whether it is in the output at all. presence, frequency, repetition: [R] fp32. Each
    repeated token's logit is first divided (if positive) or multiplied by the repetition penalty, then
    loses frequency * count + presence (vLLM's definitions). bias_*: entries added at (row, token);
    -inf forbids a token.
    """
    if logits.device.type == "meta":
        return logits.new_empty(logits.shape, dtype=torch.float32)
    out = logits.float().clone()
    if seen_rows.numel():
        values = out[seen_rows, seen_tokens]
        factor = repetition[seen_rows]
        values = torch.where(values > 0, values / factor, values * factor)
        values = values - frequency[seen_rows] * seen_counts - presence[seen_rows] * in_output
        out[seen_rows, seen_tokens] = values
    if bias_rows.numel():
        out.index_put_((bias_rows, bias_tokens), bias_values, accumulate=True)
    return out


@adjust.cost
def _(
    logits: torch.Tensor,
    seen_rows: torch.Tensor,
    seen_tokens: torch.Tensor,
    seen_counts: torch.Tensor,
    in_output: torch.Tensor,
    presence: torch.Tensor,
    frequency: torch.Tensor,
    repetition: torch.Tensor,
    bias_rows: torch.Tensor,
    bias_tokens: torch.Tensor,
    bias_values: torch.Tensor,
) -> Cost:
    touched = seen_rows.numel() + bias_rows.numel()
    return Cost(flops=5 * touched, read_bytes=nbytes(logits) + 28 * touched, write_bytes=4 * logits.numel())


@adjust.examples
def _(device: Any, dtype: torch.dtype) -> Iterator[Mapping[str, Any]]:
    yield {
        "logits": torch.randn(3, 20, device=device, dtype=dtype),
        "seen_rows": torch.tensor([0, 0, 2], device=device),
        "seen_tokens": torch.tensor([3, 7, 19], device=device),
        "seen_counts": torch.tensor([2.0, 0.0, 1.0], device=device),
        "in_output": torch.tensor([1.0, 0.0, 1.0], device=device),
        "presence": torch.tensor([0.5, 0.0, 1.0], device=device),
        "frequency": torch.tensor([0.1, 0.0, -1.0], device=device),
        "repetition": torch.tensor([1.2, 1.0, 2.0], device=device),
        "bias_rows": torch.tensor([1, 2], device=device),
        "bias_tokens": torch.tensor([4, 0], device=device),
        "bias_values": torch.tensor([5.0, float("-inf")], device=device),
    }


@op(
    "normalization",
    by_rows=True,
    float32=Tolerance(1e-5, 1e-5),
    bfloat16=Tolerance(1e-5, 1e-5),
    float16=Tolerance(1e-5, 1e-5),
)
def score(
    logits: torch.Tensor, tokens: torch.Tensor, alternatives: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probabilities of given tokens and of the likeliest ones under the raw logits.

    logits: [R, V]; tokens: [R] int64. Returns the tokens' log-probability [R] fp32, their rank (1 is
    best) [R] int64, and the `alternatives` best as values [R, k] fp32 and ids [R, k] int64.
    """
    if logits.device.type == "meta":
        best = logits.new_empty((logits.shape[0], alternatives), dtype=torch.float32)
        ids = best.new_empty(best.shape, dtype=torch.int64)
        return best.new_empty(logits.shape[0]), ids.new_empty(logits.shape[0]), best, ids
    logs = logits.float().log_softmax(-1)
    chosen = logs.gather(-1, tokens[:, None])
    ranks = (logs > chosen).sum(-1) + 1
    values, ids = logs.topk(alternatives, dim=-1)
    return chosen[:, 0], ranks, values, ids


@score.cost
def _(logits: torch.Tensor, tokens: torch.Tensor, alternatives: int) -> Cost:
    rows = logits.shape[0]
    return Cost(
        flops=5 * logits.numel(), read_bytes=nbytes(logits, tokens), write_bytes=rows * (12 + 12 * alternatives)
    )


@score.examples
def _(device: Any, dtype: torch.dtype) -> Iterator[Mapping[str, Any]]:
    yield {
        "logits": torch.randn(3, 50, device=device, dtype=dtype),
        "tokens": torch.tensor([0, 49, 7], device=device),
        "alternatives": 4,
    }
