"""Overlap and speculation: steps overlap while nothing is drafted, and nothing of what comes out changes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from emptiness import assert_empty
from test_overlap import KINDS, jobs, told

from ridgeline import LLM
from ridgeline.core.step import StepRecord
from ridgeline.speculate.seconds import Seconds

PRICES = {"never": {1: 50.0}, "always": {1: 1.0, 99: 1.001}}


@pytest.mark.parametrize("drafts", ["never", "always", "by turns"])
def test_all_kinds_at_once(make_llm: Callable[..., LLM], llm: LLM, drafts: str) -> None:
    late = make_llm(speculative_config={"method": "ngram"}, kernels="auto", dtype="float32")
    engine, speculator = late.built.engine, late.built.speculator
    assert speculator is not None
    engine.overlap = True
    ahead: list[bool] = []
    drafted: list[int] = []

    def hear(record: StepRecord) -> None:
        ahead.append(record.number < engine.scheduler._steps)
        drafted.append(record.drafted)
        price = drafts if drafts in PRICES else ("never", "always")[len(drafted) // 20 % 2]
        speculator.seconds, speculator.plain_seconds = Seconds(PRICES[price]), Seconds({1: 1.0, 99: 1.001})

    engine.listeners.append(hear)
    speculator.seconds = Seconds(PRICES.get(drafts, PRICES["never"]))
    speculator.plain_seconds = Seconds({1: 1.0, 99: 1.001})
    prompts, params = jobs(list(KINDS))
    found = told(late, prompts, params)
    engine.listeners.clear()
    assert any(ahead) == (drafts != "always")
    assert any(drafted) == (drafts != "never")
    plain = make_llm(kernels="auto", dtype="float32")
    assert found == told(plain, prompts, params)
    assert_empty(late)
