"""From tokens to outputs: text without half characters, stop strings, log-probabilities, times.

Knows one prompt's completions. It must not know the engine; it answers with where a stop string ended
a completion, and whoever drives the engine tells it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from ridgeline.core.request import (
    CompletionOutput,
    FinishReason,
    Logprob,
    Request,
    RequestMetrics,
    RequestOutput,
)
from ridgeline.core.step import TokenScore
from ridgeline.text.stop import TextStream
from ridgeline.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Stopped:
    """A stop string ended a completion at its output token `at_token` (a count)."""

    request_id: str
    at_token: int
    stop: str


@dataclass(slots=True)
class _Completion:
    request: Request
    output: CompletionOutput
    stream: TextStream | None
    text: list[str] = field(default_factory=list)
    told_tokens: int = 0
    told_parts: int = 0
    told_end: bool = False


class Delivery:
    """Gathers what the engine returns for one prompt into a RequestOutput.

    requests: the prompt's completions, in order. `push` takes one token of one of them.
    """

    def __init__(
        self, request_id: str, prompt: str | None, requests: Sequence[Request], tokenizer: Tokenizer | None
    ) -> None:
        first = requests[0]
        self.tokenizer = tokenizer
        self.params = first.params
        prompt_ids = first.tokens[: first.prompt_len]
        self.metrics = RequestMetrics(arrival_s=0.0, num_prompt_tokens=len(prompt_ids))
        self.output = RequestOutput(
            request_id=request_id,
            prompt=prompt,
            prompt_token_ids=prompt_ids,
            outputs=[],
            finished=False,
            metrics=self.metrics,
        )
        if self.params.prompt_logprobs is not None:
            self.output.prompt_logprobs = [None]
        self._completions: dict[str, _Completion] = {}
        self._open = len(requests)
        for index, request in enumerate(requests):
            output = CompletionOutput(index=index, text="", token_ids=[])
            if self.params.logprobs is not None:
                output.logprobs, output.cumulative_logprob = [], 0.0
            self.output.outputs.append(output)
            self._completions[request.request_id] = _Completion(request, output, self._stream(prompt_ids))

    def _stream(self, prompt_ids: list[int]) -> TextStream | None:
        params = self.params
        if self.tokenizer is None or not params.detokenize:
            return None
        return TextStream(
            self.tokenizer,
            prompt_ids,
            stop=tuple(params.stop or ()),
            include_stop=params.include_stop_str_in_output,
            skip_special_tokens=params.skip_special_tokens,
            min_tokens=params.min_tokens,
        )

    @property
    def unfinished(self) -> list[str]:
        """Ids of the requests that have not ended."""
        return [name for name, one in self._completions.items() if one.output.finish_reason is None]

    def news(self) -> Iterator[tuple[int, str, tuple[int, ...]]]:
        """(index, new text, new token ids) of each completion that has grown or ended since the last call."""
        for index, one in enumerate(self._completions.values()):
            ids = tuple(one.output.token_ids[one.told_tokens :])
            text = "".join(one.text[one.told_parts :])
            ended = one.output.finish_reason is not None
            if ids or text or ended != one.told_end:
                one.told_tokens += len(ids)
                one.told_parts, one.told_end = len(one.text), ended
                yield index, text, ids

    def untold(self) -> tuple[int, int]:
        """How much the next `news` will bring: characters of text, and log-probabilities."""
        characters = scores = 0
        for one in self._completions.values():
            characters += sum(map(len, one.text[one.told_parts :]))
            scores += sum(map(len, (one.output.logprobs or [])[one.told_tokens :]))
        return characters, scores

    def scheduled(self, request: Request) -> None:
        """The first news of a request: when it came, when it first ran, and what the cache had of it."""
        if self.metrics.first_scheduled_s is None:
            self.metrics.arrival_s = request.arrival_s
            self.metrics.first_scheduled_s = request.scheduled_s
            self.metrics.num_cached_tokens = self.output.num_cached_tokens = request.cached_tokens

    def prompt_scores(self, scores: Sequence[TokenScore]) -> None:
        """Scores of prompt tokens after the first, in order; may come in parts."""
        assert self.output.prompt_logprobs is not None, "nobody asked"
        self.output.prompt_logprobs.extend(self._logprobs(score) for score in scores)

    def push(self, request_id: str, score: TokenScore, now_s: float) -> tuple[str, Stopped | None]:
        """Take a token; returns the new text of that completion and whether a stop string ended it."""
        one = self._completions[request_id]
        if one.output.finish_reason is not None:
            return "", None
        one.output.token_ids.append(score.token)
        if self.metrics.first_token_s is None:
            self.metrics.first_token_s = now_s
        self.metrics.num_generated_tokens += 1
        if one.output.logprobs is not None and score.logprob is not None:
            one.output.logprobs.append(self._logprobs(score))
            one.output.cumulative_logprob = (one.output.cumulative_logprob or 0.0) + score.logprob
        if one.stream is None:
            return "", None
        delta = one.stream.push([score.token])
        one.text.append(delta.text)
        if delta.stopped_at is None or delta.stop is None:
            return delta.text, None
        one.output.finish_reason, one.output.stop_reason = str(FinishReason.STOP), delta.stop
        self._close(one, now_s)
        return delta.text, Stopped(request_id, delta.stopped_at, delta.stop)

    def finish(self, request_id: str, reason: FinishReason, stop_reason: int | str | None, now_s: float) -> str:
        """The engine ended a request; returns the last of its text."""
        one = self._completions[request_id]
        if one.output.finish_reason is not None:
            return ""
        last = "" if one.stream is None else one.stream.finish().text
        one.text.append(last)
        one.output.finish_reason, one.output.stop_reason = str(reason), stop_reason
        self._close(one, now_s)
        return last

    def _close(self, one: _Completion, now_s: float) -> None:
        one.output.text = "".join(one.text)
        self.metrics.finished_s = now_s
        self.metrics.num_preemptions += one.request.preemptions
        self.metrics.num_steps += one.request.steps
        self.metrics.num_draft_tokens += one.request.drafted
        self.metrics.num_accepted_tokens += one.request.accepted
        self._open -= 1
        self.output.finished = self._open == 0

    def _logprobs(self, score: TokenScore) -> dict[int, Logprob]:
        """The likeliest tokens and the chosen one, by id."""
        table = {token: Logprob(value, rank + 1, self._text_of(token)) for rank, (token, value) in enumerate(score.top)}
        if score.token not in table and score.logprob is not None and score.rank is not None:
            table[score.token] = Logprob(score.logprob, score.rank, self._text_of(score.token))
        return table

    def _text_of(self, token: int) -> str | None:
        if self.tokenizer is None or not self.params.detokenize:
            return None
        return self.tokenizer.decode([token], skip_special_tokens=False)
