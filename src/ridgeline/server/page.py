"""The live page over HTTP: the document at `/`, its figures at `/dashboard`.

Knows the document, and a function that says how things stand. It must not know engines, nor who may see the page:
keys are checked before any router runs. To a browser without one, `locked` is the answer at `/`: the same document
with status 401, which asks for the key and shows nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from ridgeline.dashboard.document import document

Source = Callable[[], Mapping[str, Any]]
"""What `Board.snapshot` returns, now."""


def page_router(source: Source) -> APIRouter:
    """GET / and GET /dashboard. Neither is part of the API, and neither is in its schema."""
    router = APIRouter(include_in_schema=False)

    @router.get("/")
    async def page(request: Request) -> Response:
        found = document()
        if request.headers.get("if-none-match") == found.etag:
            return Response(status_code=304, headers={"ETag": found.etag})
        return Response(found.body, headers=dict(found.headers))

    @router.get("/dashboard")
    async def dashboard() -> Response:
        return JSONResponse(source(), headers={"Cache-Control": "no-store"})

    return router


def locked(method: str, path: bytes, accept: bytes | None) -> Response | None:
    """The answer to a browser that opens the page without a valid key; None for any other request.

    method, path: of the request's first line, byte for byte; accept: its header. The document holds no figure and
    no secret: it asks for the key, and sends it with every call.
    """
    if method != "GET" or path != b"/" or b"text/html" not in (accept or b""):
        return None
    found = document()
    headers = {name: value for name, value in found.headers.items() if name != "ETag"}
    headers |= {"Cache-Control": "no-store", "WWW-Authenticate": "Bearer"}
    return Response(found.body, status_code=401, headers=headers)
