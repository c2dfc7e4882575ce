"""Every family against Transformers: logits within 1e-4 in fp32, and the same greedy tokens on every way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from checkpoints import CASES, FAMILIES, GAP, POSITIONS, Made, assert_greedy, prompts, reference_logits
from forward import sequence_logits

from ridgeline import LLM, SamplingParams
from ridgeline.core.step import StepRecord

LOGITS = 1e-4
OUTPUT = 64
GREEDY = SamplingParams(temperature=0, max_tokens=OUTPUT)
POOL_BYTES = 4 << 20

Checkpoint = Callable[[str], Made]

EVERY_CASE = [name if name in FAMILIES else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
"""The families, and as slow tests the variants of them (whose logits are held in every run)."""


def load(made: Made, kernels: str, **settings: Any) -> LLM:
    """The checkpoint in fp32 on the CPU, with a pool of small blocks so that sequences span many."""
    settings = {"block_size": 16, "kv_cache_memory_bytes": POOL_BYTES, **settings}
    return LLM(made.directory, device="cpu", dtype="float32", kernels=kernels, **settings)


def complete(llm: LLM, made: Made, asked: list[list[int]]) -> list[Any]:
    """Greedy outputs of all prompts, each checked against the reference."""
    outputs = llm.generate(asked, GREEDY, use_tqdm=False)
    for prompt, output in zip(asked, outputs):
        assert output.prompt_token_ids == prompt
        assert_greedy(made.reference, prompt, output.outputs[0].token_ids)
    return outputs


def records_of(llm: LLM) -> list[StepRecord]:
    records: list[StepRecord] = []
    llm.built.engine.listeners.append(records.append)
    return records


@pytest.mark.parametrize("name", CASES)
def test_the_reference_wanders(checkpoint: Checkpoint, name: str) -> None:
    """Greedy output that fell into a loop would hide what a wrong prefix changes."""
    made = checkpoint(name)
    prompt = prompts((12,))[0]
    made.reference.generation_config.eos_token_id = None
    output = made.reference.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt)),
        max_new_tokens=OUTPUT,
        do_sample=False,
        pad_token_id=0,
    )[0, len(prompt) :].tolist()
    assert len(set(output)) > 8
    assert_greedy(made.reference, prompt, output)


@pytest.mark.parametrize("name", CASES)
def test_logits(checkpoint: Checkpoint, kernels: str, name: str) -> None:
    """Whole prompts in one batch, and in chunks of 1, 7 and 64 tokens."""
    made = checkpoint(name)
    sequences = prompts((1, 5, 33, 100))
    wanted = [reference_logits(made.reference, tokens) for tokens in sequences]
    with load(made, kernels) as llm:
        for chunk in (None, 1, 7, 64):
            for tokens, want, have in zip(sequences, wanted, sequence_logits(llm.built.runner, sequences, chunk)):
                error = float((want - have).abs().max())
                assert error < LOGITS, f"{len(tokens)} tokens in chunks of {chunk}: {error:.1e}"


@pytest.mark.parametrize("name", EVERY_CASE)
@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_greedy_in_chunks(checkpoint: Checkpoint, kernels: str, name: str, chunk: int) -> None:
    made = checkpoint(name)
    length = {1: 12, 7: 40, 64: 150}[chunk]
    with load(made, kernels, max_num_batched_tokens=chunk) as llm:
        records = records_of(llm)
        complete(llm, made, prompts((length,)))
    prefill = [record.spans[0][0] for record in records if record.spans[0][1] <= length]
    assert prefill == [chunk] * (length // chunk) + [length % chunk] * (length % chunk > 0)


@pytest.mark.parametrize("name", CASES)
def test_greedy_in_a_batch_of_eight(checkpoint: Checkpoint, kernels: str, name: str) -> None:
    """Eight lengths at once, prefills chunked beside decodes."""
    made = checkpoint(name)
    with load(made, kernels, max_num_batched_tokens=48) as llm:
        records = records_of(llm)
        complete(llm, made, prompts((1, 3, 7, 16, 17, 33, 64, 100)))
    assert max(len(record.spans) for record in records) == 8
    assert "mixed" in {record.kind for record in records}


@pytest.mark.parametrize("name", EVERY_CASE)
def test_greedy_with_prefix_hits(checkpoint: Checkpoint, kernels: str, name: str) -> None:
    """The same prompt again, a prompt that shares its first blocks, and one that goes on from an output."""
    made = checkpoint(name)
    first, other = prompts((50, 20))
    with load(made, kernels) as llm:
        cold = complete(llm, made, [first])[0]
        assert cold.num_cached_tokens == 0
        again = complete(llm, made, [first])[0]
        assert again.num_cached_tokens == 48
        assert again.outputs[0].token_ids == cold.outputs[0].token_ids
        onward = first + cold.outputs[0].token_ids[:30]
        shared, longer = complete(llm, made, [first[:32] + other, onward])
        assert shared.num_cached_tokens == 32
        assert longer.num_cached_tokens == 64  # of 80 tokens: the last one is always computed


@pytest.mark.parametrize("name", EVERY_CASE)
def test_greedy_with_preemption(checkpoint: Checkpoint, kernels: str, name: str) -> None:
    """Four requests that grow to six blocks each, in a pool of ten."""
    made = checkpoint(name)
    with load(made, kernels, max_model_len=128) as llm:
        block_bytes = llm.built.ledger.bytes_per_token * 16
    with load(made, kernels, max_model_len=128, kv_cache_memory_bytes=10 * block_bytes) as llm:
        assert llm.built.config.num_blocks == 10
        outputs = complete(llm, made, prompts((20, 21, 22, 23)))
        assert llm.built.engine.scheduler.preemptions > 0
        assert sum(output.metrics.num_preemptions for output in outputs) > 0


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_without_cache(checkpoint: Checkpoint, kernels: str, name: str) -> None:
    made = checkpoint(name)
    with load(made, kernels, kv_cache=False, max_num_batched_tokens=50) as llm:
        complete(llm, made, prompts((5, 40)))


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_without_chunks(checkpoint: Checkpoint, kernels: str, name: str) -> None:
    made = checkpoint(name)
    with load(made, kernels, enable_chunked_prefill=False) as llm:
        records = records_of(llm)
        complete(llm, made, prompts((150, 90, 3)))
    assert sorted(new for record in records for new, _ in record.spans if new > 1) == [3, 90, 150]


@pytest.mark.parametrize("name", FAMILIES)
def test_samples_share_their_prompt(checkpoint: Checkpoint, kernels: str, name: str) -> None:
    """n greedy samples are one output three times; n drawn ones are three, the same beside strangers."""
    made = checkpoint(name)
    prompt, stranger = prompts((40, 9))
    with load(made, kernels) as llm:
        records = records_of(llm)
        output = llm.generate([prompt], SamplingParams(temperature=0, max_tokens=OUTPUT, n=3), use_tqdm=False)[0]
        for one in output.outputs:
            assert_greedy(made.reference, prompt, one.token_ids)
        assert sum(new for record in records for new, _ in record.spans) <= 40 + 3 * OUTPUT
        drawn = SamplingParams(temperature=1.0, max_tokens=20, n=3, seed=7)
        alone = [one.token_ids for one in llm.generate([prompt], drawn, use_tqdm=False)[0].outputs]
        beside = llm.generate([stranger, prompt], drawn, use_tqdm=False)[1].outputs
        assert len({tuple(tokens) for tokens in alone}) == 3
        assert [one.token_ids for one in beside] == alone


@pytest.mark.parametrize("kind", ["dynamic", "yarn", "linear", "llama3"])
def test_rope_to_the_last_position(checkpoint: Checkpoint, kind: str) -> None:
    """A sequence of max_model_len tokens; "dynamic" is stretched for exactly that length."""
    made = checkpoint(f"llama-{kind}")
    length = 2 * POSITIONS if kind == "dynamic" else POSITIONS
    tokens = prompts((length,))[0]
    want = reference_logits(made.reference, tokens)
    with load(made, "reference", max_model_len=length) as llm:
        for chunk in (None, 64):
            error = float((want - sequence_logits(llm.built.runner, [tokens], chunk)[0]).abs().max())
            assert error < LOGITS, f"in chunks of {chunk}: {error:.1e}"
    if kind == "dynamic":
        with load(made, "reference", max_model_len=POSITIONS) as llm:
            short = sequence_logits(llm.built.runner, [tokens[:POSITIONS]])[0]
        assert float((short - want[:POSITIONS]).abs().max()) > 0.1, "the stretch changes nothing here"


@pytest.mark.parametrize("name", ["mistral", "qwen2", "qwen3-windows"])
def test_windows_hide_something(checkpoint: Checkpoint, name: str) -> None:
    """Without their windows these models say something else: the parity above is no accident."""
    made = checkpoint(name)
    tokens = prompts((100,))[0]
    want = reference_logits(made.reference, tokens)
    with load(made, "reference") as llm:
        for layer in llm.built.runner.model.layers:
            layer.attention.window = None
        have = sequence_logits(llm.built.runner, [tokens])[0]
    assert float((want - have)[:24].abs().max()) < LOGITS
    assert float((want - have)[24:].abs().max()) > 100 * LOGITS


def test_gap_is_checked(checkpoint: Checkpoint) -> None:
    """The judge itself: a token that the reference would not choose is refused."""
    made = checkpoint("llama")
    prompt = prompts((12,))[0]
    with load(made, "reference") as llm:
        tokens = llm.generate([prompt], GREEDY, use_tqdm=False)[0].outputs[0].token_ids
    logits = reference_logits(made.reference, prompt + tokens)[len(prompt) - 1 : -1]
    best = logits.topk(2, dim=-1)
    place = int((best.values[:, 0] - best.values[:, 1]).argmax())
    assert float(best.values[place, 0] - best.values[place, 1]) > GAP
    wrong = [*tokens[:place], int(best.indices[place, 1]), *tokens[place + 1 :]]
    with pytest.raises(AssertionError, match="the reference has"):
        assert_greedy(made.reference, prompt, wrong)
