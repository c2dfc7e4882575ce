"""Pieces of OpenAI's answers that several endpoints share: usage, log-probabilities, ends.

Knows outputs and tokenizers. It must not know streams.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ridgeline.core.request import CompletionOutput, Logprob
from ridgeline.server.jobs import Job
from ridgeline.text.tokenizer import Tokenizer

LOWEST = -9999.0
SHOWN_ENDS = {"stop": "stop", "length": "length", "abort": "stop", "error": "stop"}


def usage(jobs: Sequence[Job], without_output: bool = False) -> dict[str, Any]:
    """Tokens of all prompts and all outputs, those included that were not shown."""
    prompt = sum(job.requests[0].prompt_len for job in jobs)
    cached = sum(min(job.output.num_cached_tokens, job.requests[0].prompt_len) for job in jobs)
    generated = 0 if without_output else sum(len(one.token_ids) for job in jobs for one in job.output.outputs)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": generated,
        "total_tokens": prompt + generated,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def finish_reason(output: CompletionOutput) -> str:
    return SHOWN_ENDS[output.finish_reason or "stop"]


def _entry(tokenizer: Tokenizer, token: int, value: float) -> dict[str, Any]:
    piece = tokenizer.token_bytes.piece(token)
    return {"token": piece.decode("utf-8", "replace"), "logprob": max(value, LOWEST), "bytes": list(piece)}


def chat_logprobs(
    tokenizer: Tokenizer, ids: Sequence[int], tables: Sequence[Mapping[int, Logprob]], top: int
) -> dict[str, Any]:
    """A choice's logprobs in a chat."""
    content = []
    for token, table in zip(ids, tables):
        best = sorted(table.items(), key=lambda one: one[1].rank)[:top]
        content.append(
            {
                **_entry(tokenizer, token, table[token].logprob),
                "top_logprobs": [_entry(tokenizer, other, found.logprob) for other, found in best],
            }
        )
    return {"content": content, "refusal": None}


def completion_logprobs(
    tokenizer: Tokenizer,
    ids: Sequence[int],
    tables: Sequence[Mapping[int, Logprob] | None],
    top: int,
    offset: int,
) -> tuple[dict[str, Any], int]:
    """A choice's logprobs in a completion, and the offset behind them. A table is None where nothing is known."""
    tokens: list[str] = []
    values: list[float | None] = []
    tops: list[dict[str, float] | None] = []
    offsets: list[int] = []
    for token, table in zip(ids, tables):
        text = tokenizer.token_text(token)
        tokens.append(text)
        offsets.append(offset)
        offset += len(text)
        if table is None:
            values.append(None)
            tops.append(None)
            continue
        values.append(max(table[token].logprob, LOWEST))
        best = sorted(table.items(), key=lambda one: one[1].rank)[:top]
        tops.append({tokenizer.token_text(other): max(found.logprob, LOWEST) for other, found in best})
    return {"tokens": tokens, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}, offset
