"""What a user asks for and what comes back: SamplingParams, Request, and the outputs.

Knows token ids and numbers. It must not know text beyond carrying it, nor how anything is computed.
Names and meanings follow vLLM, so that code written for it reads the same here.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import Any, Protocol

from ridgeline.core.errors import InvalidArgument

MAX_N = 1024
MAX_STOP_STRINGS = 64
SEED_LIMIT = 1 << 63


class FinishReason(StrEnum):
    """Why a completion ended. `STOP`: an end token or stop string; `LENGTH`: max_tokens reached."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How tokens are chosen for one request.

    n: completions for the prompt (1 to 1,024); they share the prompt's KV blocks.
    temperature: 0 is greedy; logits are divided by it.
    top_p (0, 1], top_k (0 or -1: all), min_p [0, 1]: cut the distribution, in the order top_k,
        top_p, min_p, after the temperature.
    presence_penalty, frequency_penalty [-2, 2]: subtracted for tokens already in the output.
    repetition_penalty (> 0): divides positive and multiplies negative logits of tokens in prompt or output.
    seed: the same seed and prompt give the same tokens, alone or in any batch.
    stop: strings that end the output (cut off unless include_stop_str_in_output).
    stop_token_ids, ignore_eos, min_tokens, max_tokens (None: the rest of the context).
    bad_words: words never generated. logit_bias: token id -> value added, [-100, 100].
    logprobs, prompt_logprobs: how many alternatives a token come with their log-probability.
    detokenize, skip_special_tokens: how ids become text.

    Raises InvalidArgument naming the parameter and its limits.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str] | None = None
    logit_bias: Mapping[int, float] | None = None
    min_tokens: int = 0
    max_tokens: int | None = 16
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False

    def __post_init__(self) -> None:
        _integer("n", self.n, 1, MAX_N)
        _number("temperature", self.temperature, 0.0, 1e4)
        _number("top_p", self.top_p, 0.0, 1.0, open_low=True)
        _integer("top_k", self.top_k, -1, 1 << 31)
        _number("min_p", self.min_p, 0.0, 1.0)
        _number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _number("repetition_penalty", self.repetition_penalty, 0.0, 1e4, open_low=True)
        if self.seed is not None:
            _integer("seed", self.seed, -SEED_LIMIT, SEED_LIMIT - 1)
        _integer("min_tokens", self.min_tokens, 0, 1 << 31)
        if self.max_tokens is not None:
            _integer("max_tokens", self.max_tokens, 1, 1 << 31)
            if self.min_tokens > self.max_tokens:
                raise InvalidArgument("min_tokens", f"{self.min_tokens} is more than max_tokens {self.max_tokens}")
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if value is not None:
                _integer(name, value, 0, 1 << 31)
        for name in ("ignore_eos", "detokenize", "skip_special_tokens", "include_stop_str_in_output"):
            if not isinstance(getattr(self, name), bool):
                raise InvalidArgument(name, f"must be true or false, not {getattr(self, name)!r}")
        object.__setattr__(self, "stop", _strings("stop", self.stop))
        object.__setattr__(self, "bad_words", _strings("bad_words", self.bad_words))
        if len(self.stop or ()) > MAX_STOP_STRINGS:
            raise InvalidArgument("stop", f"at most {MAX_STOP_STRINGS} strings, got {len(self.stop or ())}")
        object.__setattr__(self, "stop_token_ids", _token_ids("stop_token_ids", self.stop_token_ids))
        object.__setattr__(self, "logit_bias", _bias(self.logit_bias))
        if self.stop and not self.detokenize:
            raise InvalidArgument("stop", "stop strings need detokenize=True")

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> SamplingParams:
        """From names and values (a JSON object). Unknown names raise InvalidArgument."""
        known = [f.name for f in fields(cls)]
        for name in values:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"; did you mean {near[0]}?" if near else f"; known are {', '.join(known)}"
                raise InvalidArgument(name, f"is not a sampling parameter{hint}")
        return cls(**values)


def _number(name: str, value: Any, low: float, high: float, open_low: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise InvalidArgument(name, f"must be a finite number, not {value!r}")
    if value > high or value < low or (open_low and value == low):
        raise InvalidArgument(name, f"must be in {'(' if open_low else '['}{low:g}, {high:g}], not {value!r}")


def _integer(name: str, value: Any, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidArgument(name, f"must be an integer, not {value!r}")
    if not low <= value <= high:
        raise InvalidArgument(name, f"must be in [{low}, {high}], not {value}")


def _strings(name: str, value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    if isinstance(value, str):
        value = (value,)
    if not isinstance(value, Sequence) or not all(isinstance(one, str) and one for one in value):
        raise InvalidArgument(name, f"must be a non-empty string or a list of them, not {value!r}")
    return tuple(value)


def _token_ids(name: str, value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    if not isinstance(value, Sequence) or not all(
        isinstance(one, int) and not isinstance(one, bool) and one >= 0 for one in value
    ):
        raise InvalidArgument(name, f"must be a list of token ids (integers from 0), not {value!r}")
    return tuple(value)


def _bias(value: Any) -> dict[int, float]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise InvalidArgument("logit_bias", f"must map token ids to numbers, not {value!r}")
    result = {}
    for key, amount in value.items():
        try:
            token = int(key)
        except (TypeError, ValueError):
            raise InvalidArgument("logit_bias", f"{key!r} is not a token id") from None
        if token < 0:
            raise InvalidArgument("logit_bias", f"{key!r} is not a token id")
        _number("logit_bias", amount, -100.0, 100.0)
        result[token] = float(amount)
    return result


@dataclass(slots=True)
class Logprob:
    """One token's log-probability at one position, with its rank (1 is the likeliest)."""

    logprob: float
    rank: int
    decoded_token: str | None = None


class Constraint(Protocol):
    """What a grammar says of a request's next token. Its state advances with committed tokens only."""

    def mask(self) -> bytes:
        """A bit for each token id, lowest first, set if it may come next. One bit at least is set."""
        ...

    def accept(self, token: int) -> bool:
        """A token was appended. True if nothing can follow: the output is complete."""
        ...


@dataclass(slots=True, eq=False)
class Request:
    """One sequence on its way: its tokens, and how many of them have keys and values in the cache.

    `computed` chases `len(tokens)`: that is the whole state machine. Prefill, decode, a prefix hit,
    preemption (`computed` = 0) are only different distances between the two. While steps are under way
    `planned` runs ahead of `computed`, and `unread` tokens are sampled of which only the device knows.

    prompt_len: tokens[:prompt_len] came from the user.
    seed: resolved; noise depends on (seed, position) alone.
    eos_ids: the model's ends of sequence (none if ignored); stop_ids: ids that the user ends at.
    bad_word_ids: token sequences never to be completed.
    leader: another request whose prompt blocks this one will share (the first of n samples), or None.
    grammar: what the output must be, or None.
    scheduled_s: when the first step that it is in began; None before.
    computed: leading tokens that steps have computed and whose results are in. planned: the same and what
        steps under way compute; equal to computed when there are none.
    unread: tokens sampled by steps under way, not in `tokens` yet.
    steps: those that brought tokens. drafted: nodes of trees that were verified for it; accepted: those of them
        that became tokens.
    """

    request_id: str
    tokens: list[int]
    prompt_len: int
    params: SamplingParams
    max_tokens: int
    seed: int = 0
    eos_ids: frozenset[int] = frozenset()
    stop_ids: frozenset[int] = frozenset()
    bad_word_ids: tuple[tuple[int, ...], ...] = ()
    arrival_s: float = 0.0
    scheduled_s: float | None = None
    priority: int = 0
    salt: str = ""
    leader: Request | None = None
    grammar: Constraint | None = None
    computed: int = 0
    planned: int = 0
    unread: int = 0
    cached_tokens: int = 0
    preemptions: int = 0
    steps: int = 0
    drafted: int = 0
    accepted: int = 0
    finish: FinishReason | None = None
    stop_reason: int | str | None = None

    @property
    def output_len(self) -> int:
        return len(self.tokens) - self.prompt_len

    @property
    def known_len(self) -> int:
        """Tokens of the sequence, those included that only the device knows yet."""
        return len(self.tokens) + self.unread

    @property
    def remaining(self) -> int:
        """Tokens whose keys and values no step has computed or is computing."""
        return len(self.tokens) + self.unread - self.planned


@dataclass(slots=True)
class RequestMetrics:
    """Times of one request on the engine's clock, in seconds, and counts.

    queued_s: arrival to first scheduled; ttft_s: arrival to first token; e2e_s: arrival to last;
    tpot_s: (e2e - ttft) / (tokens - 1), None below two tokens.
    num_steps: engine steps that brought tokens, over all completions. num_draft_tokens: nodes of draft trees that
    were verified; num_accepted_tokens: those of them that became tokens. Without speculation both are 0.
    """

    arrival_s: float
    first_scheduled_s: float | None = None
    first_token_s: float | None = None
    finished_s: float | None = None
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_generated_tokens: int = 0
    num_preemptions: int = 0
    num_steps: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0

    @property
    def ttft_s(self) -> float | None:
        return None if self.first_token_s is None else self.first_token_s - self.arrival_s

    @property
    def e2e_s(self) -> float | None:
        return None if self.finished_s is None else self.finished_s - self.arrival_s

    @property
    def tpot_s(self) -> float | None:
        if self.finished_s is None or self.first_token_s is None or self.num_generated_tokens < 2:
            return None
        return (self.finished_s - self.first_token_s) / (self.num_generated_tokens - 1)


@dataclass(slots=True)
class CompletionOutput:
    """One completion of a prompt (vLLM's fields)."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass(slots=True)
class RequestOutput:
    """All completions of one prompt (vLLM's fields).

    error: the refusal, if this request of a batch was refused (its completions are then empty with
    finish_reason "error"); None otherwise.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    metrics: RequestMetrics | None = None
    num_cached_tokens: int = 0
    error: Exception | None = field(default=None, compare=False)
