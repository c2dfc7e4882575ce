"""StepPlan -> Batch and sampling inputs, on any device.

The integers of a step are laid into few host arrays, each sent in one copy. Knows plans and tensor
layouts. It must not know models, nor who decided the plan.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ridgeline.core.request import SamplingParams
from ridgeline.core.step import UNREAD, Chunk, Sampling, Spans, StepPlan
from ridgeline.core.tree import TokenTree
from ridgeline.models.batch import Batch
from ridgeline.ops.attention_call import WORD_BITS


@dataclass(slots=True)
class Penalties:
    """Arguments of the op `adjust` behind the logits, in its order."""

    arguments: tuple[torch.Tensor, ...]


@dataclass(slots=True)
class SampleInputs:
    """How the S sampled rows are chosen.

    Host part. greedy: every row is; cut: some row uses top-k, top-p or min-p; alternatives: most
    log-probabilities that a row reports, None if none does; penalties: None if no row has any.
    Device part: [S] each; allowed: [S, words] int32, the ids that grammars allow, None if no row has one.
    """

    count: int
    greedy: bool
    cut: bool
    alternatives: int | None
    penalties: Penalties | None
    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor
    seeds: torch.Tensor
    positions: torch.Tensor
    allowed: torch.Tensor | None = None


@dataclass(slots=True)
class Prepared:
    """A step ready to run.

    The first `samples.count` rows of the batch are sampled, one for each of `sampled_ids`, or one and as many as
    its tree in `trees` has nodes; behind them come the rows of prompt tokens to be scored, against `targets`,
    request by request as `scored` counts them. trees: parallel to sampled_ids; empty if no chunk has one.
    sources: [T] int64, the rows of the last step's tokens that stand for UNREAD ones, negative elsewhere; None if
    all ids are known.
    """

    batch: Batch
    samples: SampleInputs
    sampled_ids: list[str]
    targets: torch.Tensor | None
    scored: list[tuple[str, int, int]]
    sources: torch.Tensor | None
    trees: list[TokenTree | None]


def prepare(plan: StepPlan, device: torch.device, block_size: int, places: Mapping[str, int] | None = None) -> Prepared:
    """Tensors of a step. Every chunk's tokens go one after the other, in the plan's order.

    places: row of each request among the tokens that the last step sampled.
    """
    chunks = plan.chunks
    starts = [0]
    for chunk in chunks:
        starts.append(starts[-1] + chunk.new)
    tokens, requests = starts[-1], len(chunks)
    width = max(-(-chunk.visible // block_size) for chunk in chunks)
    has_trees = any(chunk.tree is not None for chunk in chunks)
    sampled_ids: list[str] = []
    settings: list[Sampling] = []
    rows: list[int] = []
    for index, chunk in enumerate(chunks):
        if chunk.sampling is not None:
            sampled_ids.append(chunk.request_id)
            settings += (chunk.sampling, *chunk.behind)
            rows += range(starts[index] + len(chunk.token_ids) - 1, starts[index + 1])
    scored: list[tuple[str, int, int]] = []
    target_ids: list[int] = []
    for index, chunk in enumerate(chunks):
        if chunk.prompt_logprobs is not None and chunk.targets:
            rows.extend(range(starts[index], starts[index] + len(chunk.targets)))
            target_ids.extend(chunk.targets)
            scored.append((chunk.request_id, len(chunk.targets), chunk.prompt_logprobs))

    total_rows = len(rows)
    long = np.empty(3 * tokens + total_rows + len(target_ids), dtype=np.int64)
    fill_tokens(long[: 3 * tokens].reshape(3, tokens), chunks, starts, block_size)
    tail = long[3 * tokens :]
    tail[:total_rows] = rows
    tail[total_rows : total_rows + len(target_ids)] = target_ids
    per_request = requests * width + 2 * requests + 1
    words = max(-(-len(chunk.tree) // WORD_BITS) for chunk in chunks if chunk.tree is not None) if has_trees else 0
    short = np.zeros(per_request + (requests + tokens * words if has_trees else 0), dtype=np.int32)
    _fill_requests(short[:per_request], chunks, starts, width)
    if has_trees:
        _fill_trees(short[per_request:], chunks, starts, words)

    wide, narrow = send(long, device), send(short, device)
    ids, positions, slots = wide[: 3 * tokens].view(3, tokens)
    row_ids, targets = wide[3 * tokens :].split((total_rows, len(target_ids)))
    every_row = total_rows == tokens and rows == list(range(tokens))
    batch = Batch(
        spans=spans_of(plan),
        kind=plan.kind,
        ids=ids,
        positions=positions,
        slots=slots,
        block_tables=narrow[: requests * width].view(requests, width),
        query_starts=narrow[requests * width : requests * width + requests + 1],
        lengths=narrow[requests * width + requests + 1 : per_request],
        rows=None if every_row else row_ids,
        tree=narrow[per_request + requests :].view(tokens, words) if has_trees else None,
        tails=narrow[per_request : per_request + requests] if has_trees else None,
    )
    return Prepared(
        batch=batch,
        samples=sample_inputs(settings, device),
        sampled_ids=sampled_ids,
        targets=targets if target_ids else None,
        scored=scored,
        sources=_sources(chunks, starts, places or {}, device),
        trees=[c.tree for c in chunks if c.sampling is not None] if has_trees else [],
    )


def spans_of(plan: StepPlan) -> Spans:
    """The host's view of a plan."""
    chunks = plan.chunks
    trees: tuple[tuple[int, ...], ...] = ()
    if any(chunk.tree is not None for chunk in chunks):
        trees = tuple(() if chunk.tree is None else chunk.tree.depths for chunk in chunks)
    return Spans(tuple(chunk.new for chunk in chunks), tuple(chunk.visible for chunk in chunks), trees)


def _sources(
    chunks: Sequence[Chunk], starts: list[int], places: Mapping[str, int], device: torch.device
) -> torch.Tensor | None:
    late = [
        (starts[i] + len(c.token_ids) - 1, places[c.request_id])
        for i, c in enumerate(chunks)
        if c.token_ids[-1] == UNREAD
    ]
    if not late:
        return None
    sources = np.full(starts[-1], -1, dtype=np.int64)
    rows, found = zip(*late)
    sources[list(rows)] = found
    return send(sources, device)


def send(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """The array on a device, without waiting for it. It must not be changed afterwards."""
    tensor = torch.from_numpy(array)
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def fill_tokens(out: Iterable[np.ndarray], chunks: Sequence[Chunk], starts: Sequence[int], block_size: int) -> None:
    """ids, positions and slots, each at least [T], of chunks of which each begins at its row of `starts` and ends at
    the next one."""
    ids, positions, slots = out
    for index, chunk in enumerate(chunks):
        first, last = starts[index], starts[index + 1]
        if last - first == 1:
            place = chunk.start
            ids[first] = chunk.token_ids[0]
            positions[first] = place
            slots[first] = chunk.blocks[place // block_size] * block_size + place % block_size
            continue
        places = np.arange(chunk.start, chunk.visible)
        positions[first:last] = places
        if chunk.tree is None:
            ids[first:last] = chunk.token_ids
        else:
            nodes = first + len(chunk.token_ids)
            ids[first:nodes] = chunk.token_ids
            ids[nodes:last] = chunk.tree.tokens
            positions[nodes:last] = chunk.tree.positions(chunk.start + len(chunk.token_ids) - 1)
        table = np.array(chunk.blocks[: -(-chunk.visible // block_size)], dtype=np.int64)
        slots[first:last] = table[places // block_size] * block_size + places % block_size


def _fill_requests(out: np.ndarray, chunks: Sequence[Chunk], starts: list[int], width: int) -> None:
    """Block tables [B, width], query starts [B + 1], lengths [B]."""
    requests = len(chunks)
    tables = out[: requests * width].reshape(requests, width)
    for index, chunk in enumerate(chunks):
        known = min(len(chunk.blocks), width)
        tables[index, :known] = chunk.blocks[:known]
    out[requests * width : requests * width + requests + 1] = starts
    out[requests * width + requests + 1 :] = [chunk.visible for chunk in chunks]


def _fill_trees(out: np.ndarray, chunks: Sequence[Chunk], starts: list[int], words: int) -> None:
    """Tails [B], then ancestors [T, words]."""
    requests = len(chunks)
    bits = out[requests:].reshape(-1, words)
    for index, chunk in enumerate(chunks):
        if chunk.tree is None:
            continue
        count = out[index] = len(chunk.tree)
        last = starts[index + 1]
        bits[last - count : last] = np.frombuffer(chunk.tree.masks(4 * words), np.int32).reshape(-1, words)


def sample_inputs(settings: Sequence[Sampling], device: torch.device) -> SampleInputs:
    """How rows are chosen, one for each of `settings`."""
    params = [one.params for one in settings]
    greedy = all(one.temperature == 0 for one in params)
    asked = [one.logprobs for one in params if one.logprobs is not None]
    integers = np.array(
        [
            [max(one.top_k, 0) for one in params],
            [one.seed for one in settings],
            [one.position for one in settings],
        ],
        dtype=np.int64,
    )
    floats = np.array(
        [[one.temperature for one in params], [one.top_p for one in params], [one.min_p for one in params]],
        dtype=np.float32,
    )
    top_k, seeds, positions = send(integers, device)
    temperature, top_p, min_p = send(floats, device)
    return SampleInputs(
        count=len(params),
        greedy=greedy,
        cut=any(map(cuts, params)),
        alternatives=max(asked) if asked else None,
        penalties=_penalties(settings, device),
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        seeds=seeds,
        positions=positions,
        allowed=_allowed(settings, device),
    )


def _allowed(settings: Sequence[Sampling], device: torch.device) -> torch.Tensor | None:
    """Bitmasks of the rows that have a grammar, all ones for the others; None if no row has one."""
    widest = max((len(one.allowed) for one in settings if one.allowed is not None), default=0)
    if not widest:
        return None
    words = np.full((len(settings), -(-widest // 4)), -1, dtype=np.int32)
    for row, one in enumerate(settings):
        if one.allowed is not None:
            words[row] = np.frombuffer(one.allowed, dtype=np.int32)
    return send(words, device)


def cuts(params: SamplingParams) -> bool:
    """Whether top-k, top-p or min-p leave some tokens out."""
    return params.temperature > 0 and (params.top_k > 0 or params.top_p < 1 or params.min_p > 0)


def penalizes(params: SamplingParams) -> bool:
    """Whether tokens that were there before count."""
    return bool(params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1)


def adjusts(sampling: Sampling) -> bool:
    """Whether logits are changed before a token is chosen from them."""
    if sampling.allowed is not None:
        return True
    return bool(sampling.params.logit_bias or sampling.forbidden or penalizes(sampling.params))


def _penalties(settings: Sequence[Sampling], device: torch.device) -> Penalties | None:
    """Entries for the op `adjust`, or None if every row's logits stay as they are."""
    seen: list[tuple[int, int, int]] = []
    biases: list[tuple[int, int, float]] = []
    for row, one in enumerate(settings):
        params = one.params
        biases.extend((row, token, value) for token, value in (params.logit_bias or {}).items())
        biases.extend((row, token, float("-inf")) for token in one.forbidden)
        if penalizes(params):
            counts: dict[int, int] = dict.fromkeys(one.tokens[: one.prompt_len], 0)
            for token in one.tokens[one.prompt_len :]:
                counts[token] = counts.get(token, 0) + 1
            seen.extend((row, token, times) for token, times in counts.items())
    if not seen and not biases:
        return None
    places = np.array([(row, token) for row, token, _ in seen], dtype=np.int64).reshape(-1, 2)
    times = np.array([count for _, _, count in seen], dtype=np.float32)
    bias_places = np.array([(row, token) for row, token, _ in biases], dtype=np.int64).reshape(-1, 2)
    bias_values = np.array([value for _, _, value in biases], dtype=np.float32)
    rates = np.array(
        [
            [one.params.presence_penalty for one in settings],
            [one.params.frequency_penalty for one in settings],
            [one.params.repetition_penalty for one in settings],
        ],
        dtype=np.float32,
    )
    presence, frequency, repetition = send(rates, device)
    seen_places, added = (
        send(np.ascontiguousarray(places.T), device),
        send(np.ascontiguousarray(bias_places.T), device),
    )
    counted = send(times, device)
    return Penalties(
        (
            seen_places[0],
            seen_places[1],
            counted,
            (counted > 0).float(),
            presence,
            frequency,
            repetition,
            added[0],
            added[1],
            send(bias_values, device),
        )
    )
