"""Properties of cost: what a step costs must grow with it, add up, and not depend on how it is computed."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ridgeline.core.cost import Cost
from ridgeline.core.step import Spans
from ridgeline.models import build_model, parse_config
from ridgeline.perf.price import Price

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
WINDOWS = {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1}
KINDS: dict[str, dict[str, Any]] = {
    "full": {"architectures": ["LlamaForCausalLM"]},
    "windows": {"architectures": ["Qwen2ForCausalLM"], **WINDOWS},
    "mixture": {"architectures": ["MixtralForCausalLM"], "num_local_experts": 8, "num_experts_per_tok": 2},
}

request = st.tuples(st.integers(1, 40), st.integers(0, 200)).map(lambda pair: (pair[0], sum(pair)))
"""(new, visible) of one request."""
requests = st.lists(request, min_size=1, max_size=12)


@cache
def price(kind: str) -> Price:
    spec = parse_config({**SIZES, **KINDS[kind]})
    return Price(build_model(spec, torch.device("meta"), torch.bfloat16, 512), 16, torch.bfloat16)


def spans_of(pairs: list[tuple[int, int]]) -> Spans:
    return Spans(tuple(new for new, _ in pairs), tuple(visible for _, visible in pairs))


def taken(pairs: list[tuple[int, int]]) -> int:
    """Rows that the op `take` takes out of others, when each request's last is sampled."""
    return len(pairs) if any(new > 1 for new, _ in pairs) else 0


def numbers(cost: Cost) -> tuple[float, ...]:
    return (cost.flops, cost.read_bytes, cost.write_bytes, cost.link_bytes, cost.launches)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(pairs=requests, greedy=st.booleans(), data=st.data())
def test_step_is_the_sum_of_its_ops(kind: str, pairs: list[tuple[int, int]], greedy: bool, data: st.DataObject) -> None:
    """The cached price and a forward pass counted op by op say the same."""
    spans = spans_of(pairs)
    rows = data.draw(st.integers(0, sum(spans.new)), "rows")
    fresh = price(kind).meter(spans, rows, greedy).total
    assert numbers(price(kind).step(spans, rows, greedy)) == pytest.approx(numbers(fresh), rel=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=30, deadline=None)
@given(pairs=requests)
def test_attention_alone_is_its_part_of_the_step(kind: str, pairs: list[tuple[int, int]]) -> None:
    spans = spans_of(pairs)
    fresh = price(kind).meter(spans, len(pairs)).by_op()["attention"]
    assert numbers(price(kind).attention(spans)) == pytest.approx(numbers(fresh), rel=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(pairs=requests, one=request)
def test_more_requests_cost_more(kind: str, pairs: list[tuple[int, int]], one: tuple[int, int]) -> None:
    less = price(kind).step(spans_of(pairs), len(pairs))
    more = price(kind).step(spans_of([*pairs, one]), len(pairs) + 1)
    assert more.flops > less.flops
    assert more.read_bytes > less.read_bytes
    assert more.write_bytes > less.write_bytes
    assert more.launches == less.launches + (taken([*pairs, one]) > 0) - (taken(pairs) > 0)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(pairs=requests, longer=st.integers(1, 100))
def test_longer_contexts_cost_more(kind: str, pairs: list[tuple[int, int]], longer: int) -> None:
    """More keys to see: more work, unless every window is full already; never less."""
    spans = spans_of(pairs)
    less = price(kind).step(spans, len(pairs))
    more = price(kind).step(replace(spans, visible=tuple(one + longer for one in spans.visible)), len(pairs))
    assert more.flops > less.flops  # some layer sees all in each kind
    assert more.read_bytes > less.read_bytes
    assert more.write_bytes == less.write_bytes


@settings(max_examples=100, deadline=None)
@given(pairs=requests)
def test_batching_saves_weights_and_nothing_else(pairs: list[tuple[int, int]]) -> None:
    """Together requests compute what they compute alone, and read the weights once instead of each."""
    one = price("full")
    together = one.step(spans_of(pairs), len(pairs))
    alone = [one.step(spans_of([pair]), 1) for pair in pairs]
    assert together.flops == pytest.approx(sum(cost.flops for cost in alone))
    apart = taken(pairs) - sum(taken([pair]) for pair in pairs)  # single tokens stand among others only together
    row_bytes = 2 * SIZES["hidden_size"] * 2
    assert together.write_bytes == pytest.approx(sum(cost.write_bytes for cost in alone) + apart * row_bytes)
    saved = sum(cost.read_bytes for cost in alone) + apart * (row_bytes + 8) - together.read_bytes
    embedding = SIZES["vocab_size"] * SIZES["hidden_size"] * 2
    assert saved == pytest.approx((len(pairs) - 1) * (one.model.store.nbytes - embedding))


@settings(max_examples=200, deadline=None)
@given(
    length=st.integers(1, 300),
    cuts=st.lists(st.integers(1, 299), max_size=6),
    window=st.one_of(st.none(), st.integers(1, 80)),
)
def test_chunks_see_what_the_whole_sees(length: int, cuts: list[int], window: int | None) -> None:
    """Query-key pairs of a prompt's chunks add up to those of the whole prompt."""
    ends = sorted({cut for cut in cuts if cut < length} | {length})
    starts = [0, *ends[:-1]]
    chunks = [Spans((end - start,), (end,)) for start, end in zip(starts, ends)]
    whole = Spans((length,), (length,))
    assert sum(chunk.pairs(window) for chunk in chunks) == whole.pairs(window)
    assert sum(chunk.keys(window) for chunk in chunks) >= whole.keys(window)


@settings(max_examples=200, deadline=None)
@given(pairs=requests, window=st.one_of(st.none(), st.integers(1, 80)))
def test_pairs_and_keys_by_counting(pairs: list[tuple[int, int]], window: int | None) -> None:
    counted, distinct = 0, 0
    for new, visible in pairs:
        seen: set[int] = set()
        for query in range(visible - new, visible):
            keys = range(max(0, query + 1 - (window or visible)), query + 1)
            counted += len(keys)
            seen.update(keys)
        distinct += len(seen)
    assert spans_of(pairs).pairs(window) == counted
    assert spans_of(pairs).keys(window) == distinct


def test_cost_arithmetic() -> None:
    one = Cost(flops=2, read_bytes=3, write_bytes=5, link_bytes=7)
    assert one + one + one == one * 3 == Cost(6, 9, 15, 21, 3)
    assert (one * 3).bytes == 24
