"""From what a user gives (a prompt and SamplingParams) to Requests, or to one clear refusal.

Knows the tokenizer and the model's limits. It must not know the engine: whatever passes here can run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ridgeline.core.errors import ContextLengthExceeded, InvalidArgument
from ridgeline.core.request import Request, SamplingParams
from ridgeline.text.tokenizer import Tokenizer
from ridgeline.text.words import bad_word_ids

Prompt = str | Sequence[int] | Mapping[str, Any]
MASK64 = (1 << 64) - 1


def mix(seed: int, number: int) -> int:
    """A 63-bit seed from a seed and a number (the finalizer of SplitMix64, Steele et al., OOPSLA 2014)."""
    word = (seed + (number + 1) * 0x9E3779B97F4A7C15) & MASK64
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & MASK64
    return (word ^ (word >> 31)) >> 1


class Intake:
    """Validates and tokenizes.

    tokenizer: None for a checkpoint without one (then prompts are token ids and outputs have no text).
    vocabulary: width of the logits; ids beyond it are refused. seed: of requests without one.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        vocabulary: int,
        eos_ids: Sequence[int],
        max_model_len: int,
        max_logprobs: int,
        seed: int,
    ) -> None:
        self.tokenizer = tokenizer
        self.vocabulary = vocabulary
        self.eos_ids = frozenset(eos_ids)
        self.max_model_len = max_model_len
        self.max_logprobs = max_logprobs
        self.seed = seed
        self._accepted = 0

    def prompt_ids(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        """(text or None, token ids). InvalidArgument("prompt", …) for anything that cannot be run."""
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise InvalidArgument(
                    "prompt", "the checkpoint has no tokenizer files; give {'prompt_token_ids': [...]}"
                )
            return prompt, self._checked_ids(self.tokenizer.encode(prompt))
        if isinstance(prompt, Mapping):
            unknown = sorted(set(prompt) - {"prompt", "prompt_token_ids"})
            if unknown:
                raise InvalidArgument("prompt", f"unknown key {unknown[0]!r}; known are prompt, prompt_token_ids")
            if prompt.get("prompt_token_ids") is None:
                if not isinstance(prompt.get("prompt"), str):
                    raise InvalidArgument("prompt", "needs a string under 'prompt' or ids under 'prompt_token_ids'")
                return self.prompt_ids(prompt["prompt"])
            text = prompt.get("prompt")
            return text if isinstance(text, str) else None, self._checked_ids(prompt["prompt_token_ids"])
        return None, self._checked_ids(prompt)

    def _checked_ids(self, ids: Any) -> list[int]:
        if isinstance(ids, (str, bytes)) or not isinstance(ids, Sequence):
            raise InvalidArgument("prompt", f"must be text or a list of token ids, not {type(ids).__name__}")
        if not ids:
            raise InvalidArgument("prompt", "is empty: at least one token is needed")
        if len(ids) >= self.max_model_len:
            raise ContextLengthExceeded(
                "prompt",
                f"has {len(ids)} tokens; the context holds {self.max_model_len}, one of them for the output",
            )
        for place, token in enumerate(ids):
            if isinstance(token, bool) or not isinstance(token, int):
                raise InvalidArgument("prompt", f"token {place} must be an integer, not {token!r}")
            if not 0 <= token < self.vocabulary:
                raise InvalidArgument("prompt", f"token id {token} at {place} is outside [0, {self.vocabulary - 1}]")
        return list(ids)

    def requests(
        self, request_id: str, prompt: Prompt, params: SamplingParams, priority: int = 0, salt: str = ""
    ) -> tuple[str | None, list[Request]]:
        """The prompt's text and one Request a completion; the first leads, the others share its prompt.

        Raises InvalidArgument naming parameter and limit; nothing has been queued then.
        """
        if not isinstance(params, SamplingParams):
            raise InvalidArgument("sampling_params", f"must be SamplingParams, not {type(params).__name__}")
        text, ids = self.prompt_ids(prompt)
        budget = self.max_model_len - len(ids)
        if params.max_tokens is not None and params.max_tokens > budget:
            raise ContextLengthExceeded(
                "max_tokens",
                f"{params.max_tokens} and the prompt's {len(ids)} tokens are more than the context of "
                f"{self.max_model_len}; at most {budget} (or None for the rest)",
            )
        if params.min_tokens > budget:
            raise ContextLengthExceeded(
                "min_tokens",
                f"{params.min_tokens} and the prompt's {len(ids)} tokens are more than the context of "
                f"{self.max_model_len}; at most {budget}",
            )
        if isinstance(priority, bool) or not isinstance(priority, int):
            raise InvalidArgument("priority", f"must be an integer, not {priority!r}")
        for name in ("logprobs", "prompt_logprobs"):
            asked = getattr(params, name)
            if asked is not None and asked > min(self.max_logprobs, self.vocabulary):
                raise InvalidArgument(
                    name, f"{asked} is more than max_logprobs {min(self.max_logprobs, self.vocabulary)}"
                )
        self._check_vocabulary("stop_token_ids", params.stop_token_ids or ())
        self._check_vocabulary("logit_bias", params.logit_bias or ())
        if self.tokenizer is None:
            for name in ("stop", "bad_words"):
                if getattr(params, name):
                    raise InvalidArgument(name, "needs a tokenizer; the checkpoint has none")
        words = bad_word_ids(self.tokenizer, params.bad_words) if self.tokenizer and params.bad_words else []
        words = [word for word in words if max(word) < self.vocabulary]  # others are never generated anyway
        self._accepted += 1
        seed = params.seed if params.seed is not None else mix(self.seed, self._accepted)
        requests: list[Request] = []
        for index in range(params.n):
            requests.append(
                Request(
                    request_id=request_id if params.n == 1 else f"{request_id}/{index}",
                    tokens=list(ids),
                    prompt_len=len(ids),
                    params=params,
                    max_tokens=params.max_tokens or budget,
                    seed=seed if index == 0 else mix(seed, index),
                    eos_ids=frozenset() if params.ignore_eos else self.eos_ids,
                    stop_ids=frozenset(params.stop_token_ids or ()),
                    bad_word_ids=tuple(tuple(word) for word in words),
                    priority=priority,
                    salt=salt,
                    leader=requests[0] if requests else None,
                )
            )
        return text, requests

    def _check_vocabulary(self, name: str, ids: Any) -> None:
        for token in ids:
            if token >= self.vocabulary:
                raise InvalidArgument(name, f"token id {token} is outside [0, {self.vocabulary - 1}]")
