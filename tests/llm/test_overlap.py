"""Steps that overlap change nothing of what comes out: every kind of request, alone and in crowds, early ends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from emptiness import assert_empty

from ridgeline import LLM, SamplingParams
from ridgeline.core.errors import InvalidArgument
from ridgeline.core.step import StepRecord

KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "warm": {"seed": 4},
    "cut": {"seed": 4, "top_p": 0.8, "top_k": 30},
    "samples": {"n": 3, "seed": 9},
    "penalties": {"temperature": 0, "frequency_penalty": 0.8, "repetition_penalty": 1.2},
    "bad words": {"temperature": 0, "bad_words": ["a", "th"]},
    "minimum": {"temperature": 2.0, "seed": 1, "min_tokens": 9},
    "biased": {"temperature": 0, "logit_bias": {40: 3.0}},
    "scored": {"temperature": 0, "logprobs": 2},
    "prompt scored": {"temperature": 0, "prompt_logprobs": 1},
    "stopped": {"seed": 2, "stop": ["o", "e"]},
    "stop ids": {"seed": 2, "stop_token_ids": list(range(0, 280, 9))},
    "one token": {"seed": 3, "max_tokens": 1},
}
PROMPTS = ["hello world", "the quick brown fox", "a", "jumps over the lazy dog, and the lazy dog sleeps on"]


def jobs(kinds: list[str]) -> tuple[list[str], list[SamplingParams]]:
    asked = [(prompt, SamplingParams(**{"max_tokens": 12, **KINDS[kind]})) for kind in kinds for prompt in PROMPTS]
    return [prompt for prompt, _ in asked], [params for _, params in asked]


def told(llm: LLM, prompts: list[str], params: list[SamplingParams]) -> list[Any]:
    outputs = llm.generate(prompts, params, use_tqdm=False)
    return [
        (
            [(one.token_ids, one.text, one.finish_reason, one.stop_reason) for one in output.outputs],
            [[list(table) for table in one.logprobs or ()] for one in output.outputs],
            [None if table is None else list(table) for table in output.prompt_logprobs or ()],
        )
        for output in outputs
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind(llm: LLM, make_llm: Callable[..., LLM], kind: str) -> None:
    prompts, params = jobs([kind])
    late = make_llm(async_scheduling=True)
    assert not llm.built.engine.overlap
    assert late.built.engine.overlap
    assert told(late, prompts, params) == told(llm, prompts, params)
    assert_empty(late)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"kv_cache_memory_bytes": 6 * 2 * 2 * 2 * 16 * 16 * 4, "max_model_len": 80, "max_num_seqs": 6},
        {"max_num_seqs": 2, "enable_prefix_caching": False},
        {"max_num_batched_tokens": 7},
        {"scheduling_policy": "priority"},
    ],
    ids=["roomy", "preempting", "two seats", "small chunks", "priority"],
)
def test_all_at_once(make_llm: Callable[..., LLM], settings: dict[str, Any]) -> None:
    prompts, params = jobs(list(KINDS))
    sync, late = (make_llm(**settings, async_scheduling=overlap) for overlap in (False, True))
    assert told(late, prompts, params) == told(sync, prompts, params)
    if "max_model_len" in settings:
        assert late.built.engine.scheduler.preemptions > 0


def test_steps_do_overlap(make_llm: Callable[..., LLM]) -> None:
    """A stream of ten tokens: each comes when the step of the next has been dispatched."""
    late = make_llm(async_scheduling=True)
    records: list[StepRecord] = []
    late.built.engine.listeners.append(records.append)
    started: list[int] = []
    start = late.built.runner.start
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(late.built.runner, "start", lambda plan: started.append(plan.number) or start(plan))
        params = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
        ahead = [len(started) - len(records) for part in late.stream("hello", params) if part.token_ids]
    late.built.engine.listeners.clear()
    assert ahead == [1] * 9 + [0]


def test_closing_a_stream_leaves_nothing_under_way(make_llm: Callable[..., LLM]) -> None:
    late = make_llm(async_scheduling=True)
    parts = late.stream("hello", SamplingParams(max_tokens=50, ignore_eos=True))
    next(parts)
    parts.close()
    assert_empty(late)
    assert late.built.engine.step() == []


def test_overlap_needs_a_cache(make_llm: Callable[..., LLM]) -> None:
    with pytest.raises(InvalidArgument, match="async_scheduling"):
        make_llm(kv_cache=False, async_scheduling=True)
    assert make_llm(kv_cache=False).built.config.async_scheduling is False
