"""Everything that is decided before a handler runs: who may ask, what a request's headers may be, what it is called.

Knows ASGI and headers. It must not know models. Denies by default: with keys set, only /health and /ready are open,
and the path that counts is the one in the request's first line, byte for byte.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import re
import time
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from ridgeline.server.errors import ApiError, internal, invalid, short, unauthorized
from ridgeline.server.page import locked
from ridgeline.server.settings import ServerSettings
from ridgeline.server.traces import Traced

logger = logging.getLogger("ridgeline.server")

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN_PATHS = (b"/health", b"/ready")
_GIVEN_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}")
_KEY = "ridgeline.key"


def response(error: ApiError, request_id: str | None = None) -> tuple[Message, Message]:
    """The two ASGI messages of a refusal."""
    body = error.encoded()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        *((name.encode("latin-1"), value.encode("latin-1")) for name, value in error.headers),
    ]
    if error.retry_after_s is not None:
        headers.append((b"retry-after", str(error.retry_after_s).encode()))
    if error.status in (408, 413, 431):
        headers.append((b"connection", b"close"))
    if request_id is not None:
        headers.append((b"x-request-id", request_id.encode()))
    start = {"type": "http.response.start", "status": error.status, "headers": headers}
    return start, {"type": "http.response.body", "body": body}


class Edge:
    """The outermost application. counted(method, path, status, seconds) hears of every answer, and traced."""

    def __init__(
        self,
        inner: Application,
        settings: ServerSettings,
        counted: Callable[[str, str, int, float], None],
        traced: Traced | None = None,
    ) -> None:
        self._inner = inner
        self._settings = settings
        self._counted = counted
        self._traced = traced
        self._keys = [hashlib.sha256(key.encode()).digest() for key in settings.api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._inner(scope, receive, send)
            return
        if scope["type"] != "http":
            return
        began, began_ns = time.perf_counter(), time.time_ns()
        given = _header(scope, b"x-request-id")
        own = given.decode() if given and _GIVEN_ID.fullmatch(given) else f"req-{uuid.uuid4().hex}"
        scope["request_id"] = own
        status = 0

        async def named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = [one for one in message["headers"] if one[0] != b"x-request-id"]
                message = {**message, "headers": [*headers, (b"x-request-id", own.encode())]}
            await send(message)

        try:
            self._check(scope)
            await self._inner(scope, receive, named)
        except ApiError as error:
            page = (
                locked(scope["method"], scope["raw_path"], _header(scope, b"accept")) if error.status == 401 else None
            )
            if page is not None:
                await page(scope, receive, named)
            elif not status:
                for message in response(error):
                    await named(message)
        except Exception:
            logger.exception("a request failed", extra={"fields": {"request_id": own}})
            if status:
                raise
            for message in response(internal()):
                await named(message)
        finally:
            seconds = time.perf_counter() - began
            route = scope.get("route")
            path = getattr(route, "path", "other")
            self._counted(scope["method"], path, status or 499, seconds)
            if path not in ("/health", "/ready", "/metrics"):
                fields = {
                    "request_id": own,
                    "method": short(scope["method"]),
                    "path": path,
                    "status": status or 499,
                    "seconds": round(seconds, 4),
                }
                noted = scope.get("ridgeline.log", {})
                logger.info("request", extra={"fields": {**fields, **noted}})
                if self._traced is not None:
                    http = {
                        "http.request.method": fields["method"],
                        "http.route": path,
                        "http.response.status_code": fields["status"],
                        "gen_ai.request.id": own,
                    }
                    self._traced(_trace_headers(scope), began_ns, began_ns + int(seconds * 1e9), http, noted)

    def _check(self, scope: Scope) -> None:
        settings, headers = self._settings, scope["headers"]
        raw_path: bytes = scope["raw_path"]
        if self._keys and raw_path not in OPEN_PATHS:
            scope[_KEY] = self._authorized(scope)
        if b"%" in raw_path and not raw_path.startswith(b"/v1/models/"):
            raise ApiError(404, "there is nothing at this path", None, "not_found")  # no path has two spellings
        size = sum(len(name) + len(value) + 4 for name, value in headers) + len(raw_path)
        size += len(scope["query_string"])
        if size > settings.max_header_bytes or len(headers) > settings.max_headers:
            raise ApiError(
                431,
                f"headers: at most {settings.max_headers} of {settings.max_header_bytes} bytes together",
                None,
                "headers_too_large",
            )

    def _authorized(self, scope: Scope) -> str:
        """Which key it was, as a digest (for the prefix cache's salt). Every key is compared, match or not."""
        values = [value for name, value in scope["headers"] if name == b"authorization"]
        scheme, _, key = (values[0] if len(values) == 1 else b"").partition(b" ")
        digest = hashlib.sha256(key[:4096]).digest()
        matched = False
        for known in self._keys:
            matched |= hmac.compare_digest(known, digest)
        if not matched or scheme.lower() != b"bearer" or len(key) > 4096:
            raise unauthorized()
        return hashlib.sha256(b"salt" + digest).hexdigest()


def _header(scope: Scope, name: bytes) -> bytes | None:
    for key, value in scope["headers"]:
        if key == name:
            found: bytes = value
            return found
    return None


def _trace_headers(scope: Scope) -> dict[str, str]:
    """The trace that a client's request belongs to."""
    names = (b"traceparent", b"tracestate")
    return {name.decode(): value.decode("latin-1") for name, value in scope["headers"] if name in names}


def salt_of(scope: Scope, settings: ServerSettings, given: str | None) -> str:
    """What a request's prefix cache is separate by: its key if there are several, and its own cache_salt."""
    key = scope.get(_KEY, "") if len(settings.api_keys) > 1 else ""
    return f"{key}/{given}" if given else key


def media_type(scope: Scope) -> str:
    value = _header(scope, b"content-type") or b""
    return value.split(b";")[0].strip().lower().decode("latin-1")


def check_media_type(scope: Scope) -> None:
    """Bodies are JSON. ApiError 415."""
    if media_type(scope) != "application/json":
        raise ApiError(415, "the body must be of content-type application/json", None, "unsupported_media_type")


def declared_length(scope: Scope, most: int) -> None:
    """Content-Length is a number, and not too large. ApiError 400, 413."""
    value = _header(scope, b"content-length")
    if value is None:
        return
    if not value.isdigit():
        raise invalid(None, "content-length is not a number", "invalid_http")
    if len(value) > 15 or int(value) > most:
        raise too_large(most)


def too_large(most: int) -> ApiError:
    return ApiError(413, f"the body is larger than {most} bytes", None, "content_too_large")


class JsonLines(logging.Formatter):
    """One JSON object a line: time, level, message and a record's `fields`."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03}Z",
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info and record.exc_info[1] is not None:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=True, default=str)
