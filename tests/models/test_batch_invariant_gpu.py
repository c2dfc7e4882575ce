"""A batch-invariant engine on a GPU, in bf16: the same tokens and log-probabilities, to the bit, in any company."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from checkpoints import Made

from ridgeline import LLM, RequestOutput, SamplingParams

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
COUNT = 32
FAMILIES = ("llama", "llama-bias", "mistral", "mixtral", "qwen3-moe", "opt")
SETTINGS: dict[str, Any] = {"dtype": "bfloat16", "block_size": 16, "kv_cache_memory_bytes": 8 << 20}
PROMPTS = [[2 + (place * (number + 3)) % 150 for place in range(3 + 7 * (number % 13))] for number in range(COUNT)]
KINDS: list[dict[str, Any]] = [
    {"temperature": 1.0},
    {"temperature": 0.7, "top_p": 0.95},
    {"temperature": 0},
    {"temperature": 1.0, "top_k": 20, "logprobs": 3},
    {"temperature": 1.0, "presence_penalty": 0.5},
]
PARAMS = [
    SamplingParams(**KINDS[number % len(KINDS)], seed=number, max_tokens=24, ignore_eos=True) for number in range(COUNT)
]


def told(output: RequestOutput) -> tuple[list[int], Any]:
    """What must be the same."""
    (one,) = output.outputs
    return list(one.token_ids), one.logprobs


def together(llm: LLM) -> list[tuple[list[int], Any]]:
    return [told(one) for one in llm.generate(PROMPTS, PARAMS, use_tqdm=False)]


def made(directory: Any, **settings: Any) -> LLM:
    return LLM(directory, device=DEVICE, **{**SETTINGS, "batch_invariant": True, **settings})


@pytest.mark.parametrize("name", FAMILIES)
def test_alone_and_among_32(checkpoint: Callable[[str], Made], name: str) -> None:
    """Prompts whole and beside others, in chunks and alone, and found in the prefix cache; captured and op by op."""
    directory = checkpoint(name).directory
    with made(directory) as llm:
        assert llm.built.config.batch_invariant
        expected = together(llm)
        hits = llm.generate(PROMPTS, PARAMS, use_tqdm=False)
        assert sum(one.num_cached_tokens or 0 for one in hits) > 0
        assert [told(one) for one in hits] == expected
    with made(directory, enable_prefix_caching=False, max_num_batched_tokens=17, max_num_seqs=16) as llm:
        for prompt, params, wanted in zip(PROMPTS, PARAMS, expected):
            assert told(llm.generate([prompt], params, use_tqdm=False)[0]) == wanted
        assert together(llm) == expected
    with made(directory, enforce_eager=True, async_scheduling=False, enable_prefix_caching=False) as llm:
        assert together(llm) == expected


def test_after_preemption(checkpoint: Callable[[str], Made]) -> None:
    directory = checkpoint("llama").directory
    with made(directory) as llm:
        expected = together(llm)
        block_bytes = llm.built.ledger.bytes_per_token * llm.built.config.block_size
    with made(directory, kv_cache_memory_bytes=24 * block_bytes, enable_prefix_caching=False) as llm:
        assert together(llm) == expected
        assert llm.built.engine.scheduler.preemptions > 0


def test_without_the_mode_what_differs_is_told(checkpoint: Callable[[str], Made]) -> None:
    """The control. Small models differ seldom (benchmarks/gpu_seeds.py has the rate of larger ones)."""
    directory = checkpoint("llama").directory
    with LLM(directory, device=DEVICE, **SETTINGS, enable_prefix_caching=False) as llm:
        expected = together(llm)
        alone = [told(llm.generate([one], params, use_tqdm=False)[0]) for one, params in zip(PROMPTS, PARAMS)]
        assert together(llm) == expected, "an equal batch must give equal bits"
    print(f"without the mode {sum(a != b for a, b in zip(alone, expected))} of {COUNT} differ")
