"""The application: routers in a row behind the edge.

Knows every router. It must not know sockets or signals.
"""

from __future__ import annotations

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from ridgeline import __version__
from ridgeline.server import about, chat, completions, tokens
from ridgeline.server.edge import Application, Edge
from ridgeline.server.errors import ApiError, internal
from ridgeline.server.page import page_router
from ridgeline.server.state import State


def application(state: State) -> Application:
    """Everything that answers HTTP."""
    app = FastAPI(title="ridgeline", version=__version__, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.include_router(chat.router(state))
    app.include_router(completions.router(state))
    app.include_router(tokens.router(state))
    app.include_router(about.router(state))
    app.include_router(page_router(state.live.snapshot))
    if state.settings.faults:
        app.include_router(about.debug_router(state))
    app.add_exception_handler(ApiError, _refused)
    app.add_exception_handler(HTTPException, _unrouted)
    app.add_exception_handler(ClientDisconnect, _gone)
    app.add_exception_handler(Exception, _broken)
    return Edge(app, state.settings, state.metrics.answered, state.traces)


def _answer(error: ApiError) -> Response:
    headers = dict(error.headers)
    if error.retry_after_s is not None:
        headers["retry-after"] = str(error.retry_after_s)
    if error.status in (408, 413, 431):
        headers["connection"] = "close"
    return Response(error.encoded(), error.status, headers, "application/json")


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return _answer(error)


async def _unrouted(request: Request, error: Exception) -> Response:
    """Of the router: no such path, or not with this method."""
    assert isinstance(error, HTTPException)
    if error.status_code == 405:
        allowed = tuple((name, value) for name, value in (error.headers or {}).items() if name.lower() == "allow")
        return _answer(
            ApiError(405, "this path does not take this method", None, "method_not_allowed", headers=allowed)
        )
    return _answer(ApiError(error.status_code, "there is nothing at this path", None, "not_found"))


async def _gone(request: Request, error: Exception) -> Response:
    return Response(status_code=400)


async def _broken(request: Request, error: Exception) -> Response:
    return _answer(internal())
