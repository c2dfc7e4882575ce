"""Every refusal that leaves the server, in OpenAI's form.

Knows statuses, types and codes. Messages are fixed texts with a parameter's name, a limit, and values cut short; it
must not know tracebacks, paths, or anything of another request.
"""

from __future__ import annotations

import json
from typing import Any

from ridgeline.core.errors import ContextLengthExceeded, InvalidArgument

MOST_VALUE_CHARACTERS = 64
INVALID, BUSY, BROKEN = "invalid_request_error", "rate_limit_error", "server_error"


class ApiError(Exception):
    """A refusal. retry_after_s: seconds after which another try makes sense; headers: further ones."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
        headers: tuple[tuple[str, str], ...] = (),
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.retry_after_s = retry_after_s
        self.headers = headers

    @property
    def type(self) -> str:
        if self.status == 429:
            return BUSY
        return BROKEN if self.status >= 500 else INVALID

    def body(self) -> dict[str, Any]:
        """The JSON object of the answer."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def encoded(self) -> bytes:
        return json.dumps(self.body(), ensure_ascii=False).encode("utf-8", "replace")


def short(value: object) -> str:
    """A value as it may be shown: at most 64 characters."""
    text = value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=True)
    text = text.encode("utf-8", "replace").decode("utf-8")
    return text if len(text) <= MOST_VALUE_CHARACTERS else text[: MOST_VALUE_CHARACTERS - 1] + "…"


def invalid(param: str | None, message: str, code: str | None = None) -> ApiError:
    """A 400 that names its parameter."""
    return ApiError(400, message, param, code)


def refused(error: InvalidArgument) -> ApiError:
    """A refusal of the engine's, as an answer."""
    code = "context_length_exceeded" if isinstance(error, ContextLengthExceeded) else None
    return invalid(error.parameter, f"{error.parameter}: {short_message(error.message)}", code)


def short_message(message: str) -> str:
    """Messages of ours quote values; none may be long."""
    return message if len(message) <= 300 else message[:299] + "…"


def unauthorized() -> ApiError:
    """One body for no key, a wrong key and a malformed one."""
    text = "a valid API key is needed: Authorization: Bearer KEY"
    return ApiError(401, text, None, "invalid_api_key", headers=(("www-authenticate", "Bearer"),))


def overloaded(retry_after_s: int) -> ApiError:
    return ApiError(429, "the server is busy: its queue is full", None, "server_overloaded", retry_after_s)


def starting(retry_after_s: int) -> ApiError:
    return ApiError(503, "the model is being loaded", None, "starting", retry_after_s)


def shutting_down(retry_after_s: int) -> ApiError:
    return ApiError(503, "the server is shutting down", None, "shutting_down", retry_after_s)


def engine_restarted() -> ApiError:
    return ApiError(500, "the engine was restarted while it worked on this request", None, "engine_restarted")


def internal() -> ApiError:
    return ApiError(500, "the server failed on this request", None, "internal_error")


def queue_timeout(retry_after_s: int) -> ApiError:
    return ApiError(503, "the request waited in the queue for too long", None, "queue_timeout", retry_after_s)


def request_timeout() -> ApiError:
    return ApiError(504, "the request took longer than it may", None, "request_timeout")
