"""/tokenize and /detokenize, as vLLM has them.

Knows the tokenizer. It must not know the engine: nothing is queued here.
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ridgeline.core.errors import InvalidArgument
from ridgeline.server.errors import invalid, refused
from ridgeline.server.intake import aside, body_of, characters_of, read_body
from ridgeline.server.messages import read_messages
from ridgeline.server.openapi import JSON, described, object_of
from ridgeline.server.requests import DetokenizeRequest, TokenizeRequest
from ridgeline.server.state import INLINE_CHARACTERS, State


def router(state: State) -> APIRouter:
    """The endpoints."""
    routes = APIRouter()
    ids = {"type": "array", "items": {"type": "integer", "minimum": 0}}
    tokenized = object_of(count="integer", max_model_len="integer", tokens=ids)

    @routes.post("/tokenize", **described(TokenizeRequest, state.settings, state.names, {JSON: tokenized}))
    async def tokenize(request: Request) -> Response:
        body = read_body(TokenizeRequest, await body_of(request, state), state)
        face = state.open_face(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise invalid("prompt", "prompt or messages is needed, and not both")
        messages = None if body.messages is None else read_messages(body.messages, state.settings)
        characters = len(body.prompt or "") if messages is None else characters_of(messages)

        def work() -> list[int]:
            if messages is not None:
                return face.conversations.ids(messages, body.add_generation_prompt)[1]
            return face.tokenizer.encode(body.prompt or "", body.add_special_tokens)

        try:
            ids = work() if characters <= INLINE_CHARACTERS else await aside(state, work)
        except InvalidArgument as error:
            raise refused(error) from None
        found: dict[str, Any] = {"count": len(ids), "max_model_len": face.facts.max_model_len, "tokens": ids}
        if body.return_token_strs:
            found["token_strs"] = [face.tokenizer.token_text(token) for token in ids]
        return JSONResponse(found)

    @routes.post(
        "/detokenize", **described(DetokenizeRequest, state.settings, state.names, {JSON: object_of(prompt="string")})
    )
    async def detokenize(request: Request) -> Response:
        body = read_body(DetokenizeRequest, await body_of(request, state), state)
        face = state.open_face(body.model)
        if body.tokens and not 0 <= min(body.tokens) <= max(body.tokens) < face.facts.vocabulary:
            raise invalid("tokens", f"tokens: ids must be in [0, {face.facts.vocabulary - 1}]")
        return JSONResponse({"prompt": face.tokenizer.decode(body.tokens, skip_special_tokens=False)})

    return routes
