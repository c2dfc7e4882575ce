"""Every family on a GPU in bf16: as near to Transformers' fp32 as Transformers' own bf16 is, and its greedy tokens."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from checkpoints import CASES, Made, prompts
from forward import sequence_logits

from ridgeline import LLM, SamplingParams

pytestmark = pytest.mark.gpu

OUTPUT = 64
SLACK = 0.02
"""Beyond twice the error of Transformers' bf16: one rounding of a logit of this size."""


def worst(name: str, errors: list[torch.Tensor]) -> float:
    """The largest error of all positions; of a mixture, what three quarters of them keep to.

    In bf16 a mixture sends a token to another expert wherever two are nearly even: that is a jump, and which
    tokens jump is as good as chance, for Transformers too.
    """
    return float(torch.cat(errors).quantile(0.75 if "moe" in name or name == "mixtral" else 1.0))


def errors_of(have: torch.Tensor, want: torch.Tensor) -> torch.Tensor:
    """Largest difference of each position's logits."""
    return (have.float() - want).abs().amax(-1)


@torch.inference_mode()
def logits_of(model: Any, tokens: list[int]) -> torch.Tensor:
    return model(input_ids=torch.tensor([tokens], device="cuda"), use_cache=False).logits[0].float()


@pytest.mark.parametrize("name", CASES)
def test_bf16(checkpoint: Callable[[str], Made], name: str) -> None:
    """Logits of whole prompts and of chunks of 7; greedy tokens of eight prompts in one batch, prefills chunked.

    A token may differ where the two best fp32 logits are closer than twice the largest error measured.
    """
    made = checkpoint(name)
    exact = copy.deepcopy(made.reference).to("cuda")
    rounded = copy.deepcopy(made.reference).to("cuda", torch.bfloat16)
    sequences = prompts((1, 5, 33, 100))
    wanted = [logits_of(exact, tokens) for tokens in sequences]
    theirs = worst(name, [errors_of(logits_of(rounded, tokens), want) for tokens, want in zip(sequences, wanted)])
    settings = {"block_size": 16, "kv_cache_memory_bytes": 4 << 20, "max_num_batched_tokens": 48}
    with LLM(made.directory, device="cuda", dtype="bfloat16", **settings) as llm:
        runner = llm.built.runner
        for chunk in (None, 7):
            ours = worst(name, list(map(errors_of, sequence_logits(runner, sequences, chunk), wanted)))
            print(f"{name}, chunks of {chunk}: ours {ours:.3f}, Transformers {theirs:.3f}")
            assert ours <= 2 * theirs + SLACK
        asked = prompts((1, 3, 7, 16, 17, 33, 64, 100))
        outputs = llm.generate(asked, SamplingParams(temperature=0, max_tokens=OUTPUT), use_tqdm=False)
        assert "reference" not in {row.kernel for row in llm.built.table.rows}
        completions = [output.outputs[0].token_ids for output in outputs]
        whole = [prompt + tokens for prompt, tokens in zip(asked, completions)]
        exact_logits = [logits_of(exact, tokens) for tokens in whole]
        errors = [errors_of(sequence_logits(runner, [one])[0], want) for one, want in zip(whole, exact_logits)]
    assert worst(name, errors) <= 3 * theirs + SLACK  # sequences are longer than those above
    largest = float(torch.cat(errors).max())
    for prompt, tokens, want in zip(asked, completions, exact_logits):
        assert len(tokens) == OUTPUT
        places = want[len(prompt) - 1 : -1]
        behind = places.amax(-1) - places[torch.arange(OUTPUT), tokens]
        assert float(behind.max()) <= 2 * largest
