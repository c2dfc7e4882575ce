"""Requests that make steps fail, found among others; the others go on with the same tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ridgeline import LLM, SamplingParams
from ridgeline.core.request import FinishReason
from ridgeline.engine.faults import FaultyExecutor
from ridgeline.engine.isolation import EngineBroken, Isolation

POISON = 200
SETTINGS: dict[str, Any] = {
    "dtype": "float32", "kernels": "reference", "block_size": 16, "max_num_seqs": 16, "max_num_batched_tokens": 40,
    "seed": 5, "kv_cache_memory_bytes": 24 * 16 * 512 * 4,
}  # fmt: skip


@pytest.fixture(scope="module")
def llm(tiny: Path, one_thread: None) -> Any:
    with LLM(tiny, **SETTINGS) as made:
        yield made


def prompts(count: int, bad: set[int]) -> list[list[int]]:
    return [[5 + place, 9, *([POISON] if place in bad else [11]), *range(20, 20 + 3 * place)] for place in range(count)]


def run(llm: LLM, bad: set[int], faults: tuple[str, int] | None, count: int = 10, n: int = 1) -> tuple[dict, set]:
    """Tokens by request, and who was condemned."""
    built = llm.built
    engine = built.engine
    inner = engine.executor
    faulty = engine.executor = FaultyExecutor(inner)
    isolation = Isolation(engine)
    tokens: dict[str, list[int]] = {}
    condemned: set[str] = set()
    try:
        params = SamplingParams(max_tokens=12, temperature=1.0, n=n, ignore_eos=True, logit_bias={POISON: -100})
        for place, prompt in enumerate(prompts(count, bad)):
            _, requests = llm.intake.requests(f"r{place}", prompt, params)
            for index, request in enumerate(requests):
                request.seed = 100 * place + index
                isolation.add(request)
                tokens[request.request_id] = []
        if faults is not None:
            faulty.order(*faults)
        for _ in range(2000):
            if not isolation.has_work:
                break
            try:
                for event in isolation.step():
                    if event.token is not None:
                        tokens[event.request.request_id].append(event.token.token)
            except (RuntimeError, MemoryError) as error:
                if isinstance(error, EngineBroken):
                    raise
                guilty = isolation.suspect()
                if guilty is not None:
                    assert guilty.finish is FinishReason.ERROR
                    condemned.add(guilty.request_id)
        assert not isolation.has_work
        engine.scheduler.cache.check()
        assert engine.scheduler.cache.free_blocks == engine.scheduler.cache.num_blocks
    finally:
        engine.executor, engine.retreats = inner, False
    return tokens, condemned


@pytest.mark.parametrize("bad", [{0}, {9}, {4}, {2, 7}])
def test_the_guilty_are_found_and_the_others_do_not_notice(llm: LLM, bad: set[int]) -> None:
    want, none = run(llm, set(), None)
    assert not none
    have, condemned = run(llm, bad, ("token", POISON))
    assert condemned == {f"r{place}" for place in bad}
    for place in set(range(10)) - bad:
        assert have[f"r{place}"] == want[f"r{place}"]


def test_samples_of_one_prompt_fall_together(llm: LLM) -> None:
    want, _ = run(llm, set(), None, count=4, n=3)
    have, condemned = run(llm, {1}, ("token", POISON), count=4, n=3)
    assert condemned == {"r1/0", "r1/1", "r1/2"}
    assert {name: ids for name, ids in have.items() if name not in condemned} == {
        name: ids for name, ids in want.items() if name not in condemned
    }


@pytest.mark.parametrize("kind", ["raise", "memory"])
@pytest.mark.parametrize("times", [1, 3])
def test_a_passing_fault_condemns_nobody(llm: LLM, kind: str, times: int) -> None:
    want, _ = run(llm, set(), None)
    have, condemned = run(llm, set(), (kind, times))
    assert not condemned
    assert have == want


def test_an_engine_that_always_fails_is_broken(llm: LLM) -> None:
    with pytest.raises(EngineBroken):
        run(llm, set(), ("raise", 10_000))
    for name in [one.request_id for one in llm.built.engine.scheduler.waiting]:
        llm.built.engine.abort(name)


def test_who_leaves_during_a_search_is_gone(llm: LLM) -> None:
    engine = llm.built.engine
    inner = engine.executor
    faulty = engine.executor = FaultyExecutor(inner)
    isolation = Isolation(engine)
    try:
        params = SamplingParams(max_tokens=4, ignore_eos=True)
        for place, prompt in enumerate(prompts(6, set())):
            isolation.add(llm.intake.requests(f"r{place}", prompt, params)[1][0])
        faulty.order("raise", 1)
        with pytest.raises(RuntimeError):
            isolation.step()
        assert isolation.suspect() is None
        for place in range(6):
            assert isolation.abort(f"r{place}") is not None
        for _ in range(20):
            isolation.step()
        assert not isolation.has_work
        assert engine.scheduler.cache.free_blocks == engine.scheduler.cache.num_blocks
    finally:
        engine.executor, engine.retreats = inner, False
