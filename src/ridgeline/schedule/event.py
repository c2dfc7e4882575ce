"""What a step meant for one request: the scheduler's word to the request's owner.

Knows token ids and scores. Must not know text: whoever owns the request makes text of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ridgeline.core.request import FinishReason, Request
from ridgeline.core.step import TokenScore


@dataclass(slots=True)
class Event:
    """One request's news of one step.

    token: the token that was appended to its output; None if only prompt scores came.
    prompt_scores: scores of the prompt tokens that follow those reported before, each reported once.
    finish: why the request ended with this token (its `stop_reason` is on the request); None if it goes on.
    """

    request: Request
    token: TokenScore | None = None
    prompt_scores: Sequence[TokenScore] = ()
    finish: FinishReason | None = None
