"""In bf16 on a GPU rows of a verified tree are computed in other shapes than single tokens: outputs may part, but only
where the two best tokens are closer than what the kernels' rounding moves them by."""

from __future__ import annotations

import pytest

from ridgeline import LLM, SamplingParams

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
NEW, EVERY, TOP = 96, 12, 5
PROMPTS = [
    "def fibonacci(n):\n    ",
    "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self",
    "import os\n\n\ndef walk(path):\n    ",
    "def quicksort(values: list[int]) -> list[int]:\n    ",
    "def read_lines(path):\n    with open(path) as file:\n        ",
    "class Matrix:\n    def __init__(self, rows, columns):\n        ",
    "def is_prime(number):\n    if number < 2:\n        return False\n    ",
    "def count_words(text: str) -> dict[str, int]:\n    counts = {}\n    ",
]
GREEDY = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True)


def made(dtype: str, **settings: object) -> LLM:
    return LLM(
        device=DEVICE,
        dtype=dtype,
        max_num_seqs=8,
        enable_prefix_caching=False,
        kv_cache_memory_bytes=64 << 20,
        **settings,
    )


def outputs(llm: LLM) -> list[list[int]]:
    return [list(one.outputs[0].token_ids) for one in llm.generate(PROMPTS, GREEDY, use_tqdm=False)]


def likeliest(llm: LLM, texts: list[list[int]]) -> list[dict[int, float]]:
    """Log-probabilities of the best few tokens behind each text."""
    asked = [{"prompt_token_ids": one} for one in texts]
    found = llm.generate(asked, SamplingParams(temperature=0, max_tokens=1, logprobs=TOP), use_tqdm=False)
    return [{token: told.logprob for token, told in one.outputs[0].logprobs[0].items()} for one in found]


def off(rough: list[dict[int, float]], exact: list[dict[int, float]]) -> float:
    """The most that a difference of two log-probabilities is off by."""
    errors = []
    for one, other in zip(rough, exact):
        both = [one[token] - other[token] for token in one.keys() & other.keys()]
        errors.append(max(both) - min(both))
    return max(errors)


@pytest.mark.parametrize("shape", [{"tree": [4, 2, 1, 1]}, {"num_speculative_tokens": 24}], ids=["4-2-1-1", "24"])
def test_outputs_part_only_at_near_ties(shape: dict[str, object]) -> None:
    with made("bfloat16") as llm:
        known = [list(llm.tokenizer.encode(prompt)) for prompt in PROMPTS]
        plain = outputs(llm)
        seen = [[*prompt, *out[:at]] for prompt, out in zip(known, plain) for at in range(0, NEW, EVERY)]
        rough = likeliest(llm, seen)
    with made("bfloat16", speculative_config={"method": "tree", **shape}) as llm:
        drafted = outputs(llm)
        assert llm.built.speculator is not None
        assert llm.built.speculator.tally.accepted > NEW
    parted = []
    for prompt, one, other in zip(known, plain, drafted):
        at = next((at for at, (a, b) in enumerate(zip(one, other)) if a != b), None)
        if at is not None:
            parted.append(([*prompt, *one[:at]], one[at], other[at]))
    with made("float32") as llm:
        error = off(rough, likeliest(llm, seen))
        exact = likeliest(llm, [text for text, _, _ in parted]) if parted else []
    print(f"{len(parted)} of {len(PROMPTS)} part; error {error:.4f}")
    assert 0 < error < 0.5
    for (_, one, other), best in zip(parted, exact):
        margin = abs(best[one] - best[other])
        print(f"margin {margin:.4f}")
        assert margin <= error
