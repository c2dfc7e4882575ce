"""The errors that a user can cause: each names the thing, the limit and the way out.

Knows nothing of who raises them. A caller who catches `RidgelineError` catches every refusal of
ours and nothing that is a bug.
"""

from __future__ import annotations


class RidgelineError(Exception):
    """Any refusal that ridgeline words itself; its text is one clear message for a person."""


class InvalidArgument(RidgelineError, ValueError):
    """A value outside what is accepted.

    `parameter` is the public name of the argument (as in `SamplingParams` or `LLM`), so that a
    server can name it in its answer.
    """

    def __init__(self, parameter: str, message: str) -> None:
        super().__init__(f"{parameter}: {message}")
        self.parameter = parameter
        self.message = message


class ContextLengthExceeded(InvalidArgument):
    """Prompt, or prompt and max_tokens together, do not fit the context length."""


class CheckpointError(RidgelineError):
    """A checkpoint that is incomplete, damaged or of the wrong shapes."""


class UnsupportedModel(RidgelineError):
    """An architecture, file format or option that ridgeline does not run."""


class DoesNotFit(RidgelineError, MemoryError):
    """The model, or one request, needs more memory than the machine (or the KV pool) has."""


class KernelRefused(RidgelineError):
    """A kernel was asked for by name and cannot serve this device, dtype or shape."""
