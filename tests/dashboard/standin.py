"""A server that is none: the real page and a real Board, fed with steps that never ran, and a model that recites.

Run it to look at the page without an engine: python tests/dashboard/standin.py [PORT].
"""

from __future__ import annotations

import asyncio
import json
import math
import random
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from ridgeline.core.step import Verified
from ridgeline.core.tree import TokenTree
from ridgeline.dashboard.board import Board, Facts, Now, Step
from ridgeline.perf.roofline import Roofline
from ridgeline.server.page import locked, page_router

ROOFLINE = Roofline(matrix_flops=989e12, vector_flops=67e12, bytes_per_s=4.8e12)
WORDS = ["        ", "return", " self", ".items", "[-1]", ".pop", "()", "[0]", " None", "\n", " raise", " len", "(self"]
FACTS = Facts(
    model="llama-3.1-8b",
    device="NVIDIA H200",
    dtype="bfloat16",
    version="ridgeline 0.1.0",
    num_blocks=8000,
    block_size=64,
    max_num_seqs=256,
    max_model_len=131072,
    roofline=ROOFLINE,
    roofs="H200 SXM, bf16 dense",
    word=WORDS.__getitem__,
)
WEIGHTS, PER_TOKEN = 15.0e9, 131072.0
STORY = (
    "        self.items = []\n\n    def push(self, item):\n        self.items.append(item)\n\n"
    "    def pop(self):\n        return self.items.pop()\n"
)
PARENTS = [-1, 0, 1, 2, 2, 4, 2, 0, -1, 8, -1, 10]
TREE = TokenTree(range(1, len(WORDS)), PARENTS)
"""Token 0 stands before it."""


class Time:
    """A clock that can be told to run ahead."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def lively(board: Board, clock: Time, seconds: float = 118.0, seed: int = 7, speculation: bool = True) -> None:
    """Some minutes of a busy day: load comes in waves, steps take about what the roofline says."""
    draw = random.Random(seed)
    begin = clock.now_s
    while clock.now_s - begin < seconds:
        running = round(24 + 16 * math.sin(clock.now_s / 17) + draw.uniform(-3, 3))
        waiting = max(0, round(draw.gauss(6, 4))) if running > 34 else 0
        keys = running * 1800
        for _ in range(5):
            step = step_of(draw, "decode", running, 0, keys, running, waiting)
            board.step(drafted(draw, step) if speculation and draw.random() < 0.5 else step)
        kind = "mixed" if draw.random() < 0.8 else "prefill"
        new = draw.choice((256, 512, 1024, 2048))
        board.step(step_of(draw, kind, running if kind == "mixed" else 1, new, keys, running, waiting))
        if draw.random() < 0.6:
            board.first_token(draw.lognormvariate(-2.4, 0.55) + 0.02 * waiting)
            prompt = draw.randrange(200, 3000)
            cached = prompt * 3 // 5 if draw.random() < 0.5 else 0
            reason = draw.choice(("stop", "stop", "length"))
            board.finished(reason, prompt, cached, draw.lognormvariate(-4.65, 0.13))
        clock.now_s += 0.35


def drafted(draw: random.Random, step: Step) -> Step:
    """The same step, had it verified a tree for each of its requests."""
    paths = draw.choices(([0, 1, 2, 3], [0, 1], [0], [], [0, 1, 2, 4, 5]), k=step.rows)
    return replace(
        step,
        kind="tree",
        drafted=len(TREE) * step.rows,
        accepted=sum(map(len, paths)),
        draft_s=step.device_s * draw.uniform(0.1, 0.2),
        depths=tuple(map(len, paths)),
        verified=Verified(0, TREE, paths[-1]),
    )


def step_of(draw: random.Random, kind: str, rows: int, new: int, keys: int, running: int, waiting: int) -> Step:
    tokens = new + (rows if kind != "prefill" else 0)
    flops, moved = 15.0e9 * tokens, WEIGHTS + PER_TOKEN * keys
    floor_s = max(flops / ROOFLINE.matrix_flops, moved / ROOFLINE.bytes_per_s)
    predicted = floor_s / (0.78 if kind == "decode" else 0.66)
    return Step(
        kind=kind,
        output_tokens=rows * 12,
        prompt_tokens=new * 3,
        device_s=predicted * draw.lognormvariate(0.02, 0.06),
        predicted_s=predicted,
        running=running,
        waiting=waiting,
        free_blocks=FACTS.num_blocks - keys // 64 * 4,
        flops=flops,
        bytes=moved,
        rows=rows,
    )


def application(board: Board, now: Now | None = None, keys: tuple[str, ...] = ()) -> FastAPI:
    """The page's router, and as much of /v1/completions as the page's box needs."""
    app = FastAPI(openapi_url=None)
    app.state.cancelled = 0
    app.include_router(page_router(lambda: board.snapshot(now)))

    @app.middleware("http")
    async def keyed(request: Request, go_on: Any) -> Response:
        given = request.headers.get("authorization", "")
        if keys and given.removeprefix("Bearer ") not in keys:
            page = locked(request.method, request.url.path.encode(), request.headers.get("accept", "").encode())
            refusal = {"message": "a valid API key is needed", "type": "invalid_request_error"}
            return page or JSONResponse({"error": {**refusal, "param": None, "code": "invalid_api_key"}}, 401)
        found: Response = await go_on(request)
        return found

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        asked = await request.json()
        if asked["max_tokens"] > 4096:
            refusal = {"message": "max_tokens: must be in [1, 4096]", "type": "invalid_request_error"}
            return JSONResponse({"error": {**refusal, "param": "max_tokens", "code": None}}, 400)
        return StreamingResponse(recite(asked), media_type="text/event-stream")

    async def recite(asked: dict[str, Any]) -> AsyncIterator[str]:
        parts = [STORY[at : at + 4] for at in range(0, len(STORY), 4)] * 200
        count = asked["max_tokens"]
        try:
            for number in range(count):
                await asyncio.sleep(0.01)
                reason = "length" if number == count - 1 else None
                choice = {"index": 0, "text": parts[number], "finish_reason": reason, "logprobs": None}
                yield f"data: {json.dumps({'choices': [choice], 'usage': None})}\n\n"
                if "break" in asked["prompt"] and number == 3:
                    yield 'data: {"error": {"message": "the engine was restarted", "type": "server_error"}}\n\n'
                    break
            else:
                usage = {"prompt_tokens": 9, "completion_tokens": count, "total_tokens": 9 + count}
                yield f"data: {json.dumps({'choices': [], 'usage': usage})}\n\n"
            yield "data: [DONE]\n\n"
        except (asyncio.CancelledError, GeneratorExit):  # at its own await, or while what it gave was being sent
            app.state.cancelled += 1
            raise

    return app


@contextmanager
def serving(app: FastAPI, port: int = 0) -> Iterator[str]:
    """The address of the app, served from a thread."""
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the stand-in did not start"
            time.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)


if __name__ == "__main__":
    clock = Time()
    shown = Board(FACTS, clock)
    lively(shown, clock)
    with serving(application(shown), int(sys.argv[1]) if len(sys.argv) > 1 else 8010) as address:
        print(address)
        while True:
            time.sleep(1)
            lively(shown, clock, 1.0)
