"""Requests that a server must refuse, at a steady rate, from a process of its own: python -m benchmarks.pester URL.

Half of them ask for so many outputs that there is room only in an empty server (429 while others are served), half
are invalid in ways that take their own paths through the server. Begins when a line comes on its standard input and
sends until that closes, at most ten minutes; then prints how many answers had which status.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections import Counter
from collections.abc import Sequence

from ridgeline.workload.http import Address, Client, HttpError

MOST_S = 600.0
JSON = {"Content-Type": "application/json"}


def refusals(model: str, outputs: int) -> list[tuple[bytes, dict[str, str]]]:
    """Bodies and headers: a request without room, then an invalid one, in turn."""

    def body(**values: object) -> bytes:
        return json.dumps({"model": model, "prompt": "a", "max_tokens": 4, **values}).encode()

    busy = (body(n=outputs), JSON)
    invalid = [
        (b'{"model": ', JSON),
        (body(n=0), JSON),
        (body(model="another"), JSON),
        (body(prompt="word " * 20_000), JSON),
        (body(no_such_field=1), JSON),
        (body(), {"Content-Type": "text/plain"}),
    ]
    return [one for bad in invalid for one in (busy, bad)]


async def pester(url: str, rate_per_s: float, outputs: int) -> dict[str, int]:
    """Send until standard input closes; how the answers went."""
    ends: Counter[str] = Counter()
    running: set[asyncio.Task[None]] = set()
    loop = asyncio.get_running_loop()
    async with Client(Address.of(url)) as client:
        answer = await client.ask("GET", "/v1/models")
        model = json.loads(await answer.read())["data"][0]["id"]
        answer.close()
        bodies = refusals(model, outputs)
        await loop.run_in_executor(None, sys.stdin.readline)
        closed = loop.run_in_executor(None, sys.stdin.read)

        async def one(body: bytes, headers: dict[str, str]) -> None:
            try:
                answer = await client.ask("POST", "/v1/completions", body, headers)
                await answer.read()
                answer.close()
                ends[str(answer.status)] += 1
            except HttpError:
                ends["connection"] += 1

        begin, number = time.perf_counter(), 0
        while not closed.done() and number < rate_per_s * MOST_S:
            await asyncio.sleep(max(begin + number / rate_per_s - time.perf_counter(), 0))
            task = asyncio.create_task(one(*bodies[number % len(bodies)]))
            running.add(task)
            task.add_done_callback(running.discard)
            number += 1
        await asyncio.gather(*running)
        seconds = time.perf_counter() - begin
    return {**ends, "sent": number, "milliseconds": round(seconds * 1e3)}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("--rate", type=float, default=200.0, help="requests a second")
    parser.add_argument("--outputs", type=int, default=16, help="n of the requests that have no room")
    options = parser.parse_args(argv)
    print(json.dumps(asyncio.run(pester(options.url, options.rate, options.outputs))))


if __name__ == "__main__":
    main()
