"""What the server says of itself: models, health, readiness, metrics, version, settings.

Knows the state. It must not change it. /health is progress, not a flag: an engine that has requests and
makes no step for too long makes it a 503.
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ridgeline import __version__
from ridgeline.server.errors import ApiError, shutting_down, starting
from ridgeline.server.openapi import JSON, TEXT, described, object_of
from ridgeline.server.state import State
from ridgeline.server.supervisor import Phase


def router(state: State) -> APIRouter:
    """The endpoints."""
    routes = APIRouter()
    supervisor, settings = state.supervisor, state.settings
    described_model = object_of(id="string", object={"const": "model"}, created="integer", owned_by="string")
    listed = object_of(object={"const": "list"}, data={"type": "array", "items": described_model})
    health_schema = object_of(
        status={"const": "ok"}, engine="string", steps="integer", restarts="integer", silent_s="number",
        requests="integer",
    )  # fmt: skip

    def model(name: str) -> dict[str, Any]:
        found = {"id": name, "object": "model", "created": state.created, "owned_by": "ridgeline"}
        if state.face is not None:
            found["max_model_len"] = state.face.facts.max_model_len
        return found

    @routes.get("/v1/models", **described(answer={JSON: listed}))
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [model(name) for name in state.names]})

    @routes.get("/v1/models/{name:path}", **described(answer={JSON: described_model}, place="name"))
    async def one_model(request: Request) -> Response:
        name = request.path_params["name"]
        state.check_model(name)
        return JSONResponse(model(name))

    @routes.get("/health", **described(answer={JSON: health_schema}))
    async def health() -> Response:
        beat = supervisor.beat
        body = {
            "status": "ok" if state.healthy else "stuck",
            "engine": str(supervisor.phase),
            "steps": supervisor.steps_before + supervisor.steps,
            "restarts": supervisor.restarts,
            "silent_s": round(supervisor.silent_s, 3),
            "requests": 0 if beat is None else beat.requests,
        }
        if not state.healthy:
            message = f"the engine has made no progress for {supervisor.stuck_s:.0f} s"
            raise ApiError(503, message, None, "unhealthy", settings.retry_after_s)
        return JSONResponse(body)

    @routes.get("/ready", **described(answer={JSON: object_of(status={"const": "ready"})}))
    async def ready() -> Response:
        if state.draining:
            raise shutting_down(settings.retry_after_s)
        if not state.ready:
            raise starting(settings.retry_after_s)
        return JSONResponse({"status": "ready"})

    @routes.get("/metrics", response_class=Response, **described(answer={TEXT: {"type": "string"}}))
    async def metrics() -> Response:
        return Response(state.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @routes.get("/version", **described(answer={JSON: object_of(version="string")}))
    async def version() -> Response:
        return JSONResponse({"version": __version__})

    @routes.get("/server_info", **described())
    async def server_info() -> Response:
        facts = supervisor.facts
        loading = supervisor.loading
        body: dict[str, Any] = {
            "version": __version__,
            "models": list(state.names),
            "phase": str(supervisor.phase),
            "loading": {"phase": loading.phase, "done": loading.done, "total": loading.total},
            "engine_pid": supervisor.pid,
            "restarts": supervisor.restarts,
            "admitted": state.admission.rows,
            "limits": {name: value for name, value in vars(settings).items() if name.startswith("max_")},
            "authentication": bool(settings.api_keys),
        }
        if facts is not None:
            body["settings"] = {name: value for name, value in facts.settings.items() if name != "model"}
            body["vocabulary"] = facts.vocabulary
            body["memory"] = facts.memory
            body["load_s"] = facts.load_s
            body["chat_template"] = "checkpoint" if state.face and state.face.conversations.has_template else "plain"
        if supervisor.beat is not None:
            beat = supervisor.beat
            body["engine"] = {
                "steps": beat.steps,
                "requests": beat.requests,
                "free_blocks": beat.free_blocks,
                "referenced_blocks": beat.referenced_blocks,
            }
        return JSONResponse(body)

    return routes


def debug_router(state: State) -> APIRouter:
    """/debug/fault, for tests and soaks; mounted only if the settings allow faults."""
    routes = APIRouter()

    @routes.post("/debug/fault", include_in_schema=False)
    async def fault(request: Request, kind: str, value: int = 0) -> Response:
        if state.supervisor.phase is not Phase.READY:
            raise starting(state.settings.retry_after_s)
        state.supervisor.fault(kind, value)
        return JSONResponse({})

    return routes
