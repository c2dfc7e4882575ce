"""A soak: mixed traffic, cancels, malformed requests and engines that are killed; nothing may be lost or left behind.

Requests have lengths of the Azure conversation trace and arrive at random; some stream and some do not. A fifth of
them hang up somewhere on the way, one in a hundred is malformed, and every two minutes the engine's process is
killed. Every request is accounted for: it ends in one of the ways that it may end in, within its time. Before and
after, a greedy request has the same text; at the end no block is held, no place is taken, and memory has not grown.

python -m benchmarks.server_soak --seconds 600
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.models import checkpoint, vocabulary_of
from benchmarks.record import Record, parser, seconds
from benchmarks.serving import Server, resident_bytes, served, slope, total
from benchmarks.trace import azure_jobs
from ridgeline.workload.http import Address, Answer, Client, HttpError, events

FLAT = 0.03
"""Share of its size by which a process may grow over the last four fifths of its watched life."""
WATCHED_S = 60.0
"""A process that lived shorter than this says nothing about growth: it was still warming up."""
CANCELLED_TOKENS, CANCELLED_S = 400, 0.5
AFTERWARDS_S = 10.0
MALFORMED = (
    b"{bad", b"[]", b'{"model": "%s"}', b'{"model": "%s", "prompt": "a", "n": 0}',
    b'{"model": "%s", "prompt": [-1]}', b'{"model": "%s", "prompt": "a", "temperature": NaN}',
    b'{"model": "%s", "prompt": "a", "what_is_this": 1}', b"\xff\xfe", b'{"model": "no such model", "prompt": "a"}',
)  # fmt: skip
WHOLE, GONE, REFUSED, BUSY, RESTARTED, STARTING = "whole", "gone", "refused", "busy", "restarted", "starting"
EXPECTED = (WHOLE, GONE, REFUSED, BUSY, RESTARTED, STARTING)
"""Ways in which a request may end: served, hung up by us, refused as malformed, refused as too many, lost with a killed
engine (and told so), refused while the next engine starts."""


def main(argv: Sequence[str] | None = None) -> Record:
    options = arguments().parse_args(argv)
    if options.quick:
        options.seconds, options.kill_every, options.rate = 6.0, 3.0, 20.0
    record = measure(options)
    record.close()
    return record


def arguments() -> argparse.ArgumentParser:
    result = parser(__doc__ or "")
    result.set_defaults(threads=1)
    result.add_argument("--seconds", type=float, default=600.0, help="how long requests are sent")
    result.add_argument("--rate", type=float, default=4.0, help="requests a second")
    result.add_argument("--cancels", type=float, default=0.20, help="share of requests that hang up")
    result.add_argument("--malformed", type=float, default=0.01, help="share of requests that are malformed")
    result.add_argument("--kill-every", type=float, default=120.0, help="seconds between kills of the engine")
    result.add_argument("--patience", type=float, default=60.0, help="seconds after which a request is stuck")
    result.add_argument("--seed", type=int, default=0)
    return result


@dataclass
class Soak:
    """What is sent and what came of it. memory: (seconds, resident bytes) by process."""

    server: Server
    options: argparse.Namespace
    model: str
    vocabulary: int
    ends: Counter[str] = field(default_factory=Counter)
    odd: list[str] = field(default_factory=list)
    sent: int = 0
    kills: list[float] = field(default_factory=list)
    back_s: list[float] = field(default_factory=list)
    memory: dict[int, list[tuple[float, float]]] = field(default_factory=dict)
    asked_tokens: int = 0
    longest_s: float = 0.0


def measure(options: argparse.Namespace) -> Record:
    folder, what = checkpoint(options.model)
    record = Record("server-soak", options)
    record.settings = {
        "model": what, "engine_threads": options.threads, "seconds": options.seconds, "requests_per_s": options.rate,
        "cancels": options.cancels, "malformed": options.malformed, "kill_every_s": options.kill_every,
        "patience_s": options.patience,
    }  # fmt: skip
    # A pool that is soon touched as a whole: what grows afterwards is a leak, not the first use of a page.
    # A queue that is short enough for patience: who finds no place is told so at once.
    limits: tuple[str, ...] = (
        "--max-num-seqs", "16", "--max-queued", "16", "--kv-cache-memory-bytes", "64000000", "--max-model-len", "1024",
    )  # fmt: skip
    kills = int(options.seconds / options.kill_every)
    if kills > 4:  # more than a server puts up with in ten minutes unless told to
        limits += ("--set", f"max_restarts={kills + 1}")
    with served(limits, options.threads, None if what == "embedded model" else folder) as server:
        soak = Soak(server, options, server.get("/v1/models")["data"][0]["id"], vocabulary_of(folder))
        before = canary(soak)
        asyncio.run(run(soak))
        settled_s = settle(server)
        after = canary(soak)
        metrics = server.metrics()
        info = server.get("/server_info")
    told(record, soak, settled_s, before == after, metrics, info)
    return record


def canary(soak: Soak) -> str:
    """Greedy text of a fixed prompt."""
    body = {"model": soak.model, "prompt": "def add(a, b):", "max_tokens": 24, "temperature": 0}
    status, answer = soak.server.ask("POST", "/v1/completions", body)
    if status != 200:
        raise RuntimeError(f"the canary got {status}: {answer[:300]!r}")
    text: str = json.loads(answer)["choices"][0]["text"]
    return text


def settle(server: Server) -> float | None:
    """Seconds until nothing was held any more; None if it never was."""
    begin = time.perf_counter()
    while time.perf_counter() - begin < AFTERWARDS_S:
        info = server.get("/server_info")
        engine = info.get("engine", {})
        if not info["admitted"] and not engine.get("requests") and not engine.get("referenced_blocks"):
            return time.perf_counter() - begin
        time.sleep(0.05)
    return None


async def run(soak: Soak) -> None:
    """Send for so many seconds, kill and watch meanwhile, and wait for the last answer."""
    options, draw = soak.options, random.Random(f"soak {soak.options.seed}")
    jobs = azure_jobs(200, 6)
    async with Client(Address.of(soak.server.url)) as client:
        over = asyncio.Event()
        watching, killer = asyncio.create_task(watch(soak)), asyncio.create_task(killing(soak, over))
        running: set[asyncio.Task[None]] = set()
        begin, at = time.perf_counter(), 0.0
        while at < options.seconds:
            await asyncio.sleep(max(begin + at - time.perf_counter(), 0))
            job = draw.choice(jobs)
            prompt, output = min(job.prompt_tokens, 600), min(job.output_tokens, 300)
            task = asyncio.create_task(one(soak, client, random.Random(f"{options.seed} {soak.sent}"), prompt, output))
            soak.sent += 1
            running.add(task)
            task.add_done_callback(running.discard)
            at += draw.expovariate(options.rate)
        over.set()
        while running:
            await asyncio.wait(running)
        await killer
        watching.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watching


async def one(soak: Soak, client: Client, draw: random.Random, prompt: int, output: int) -> None:
    """One request, and its end on the account."""
    begin = time.perf_counter()
    try:
        async with asyncio.timeout(soak.options.patience):
            end, detail = await asked(soak, client, draw, prompt, output)
    except TimeoutError:
        end, detail = "stuck", f"nothing for {soak.options.patience:g} s"
    except HttpError as error:
        end, detail = "no answer", str(error)
    soak.longest_s = max(soak.longest_s, time.perf_counter() - begin)
    soak.ends[end] += 1
    if end not in EXPECTED:
        soak.odd.append(f"{end}: {detail}"[:300])


async def asked(soak: Soak, client: Client, draw: random.Random, prompt: int, output: int) -> tuple[str, str]:
    """(how it ended, what was said)."""
    if draw.random() < soak.options.malformed:
        raw = draw.choice(MALFORMED)
        answer = await client.ask("POST", "/v1/completions", raw.replace(b"%s", soak.model.encode()))
        body = await answer.read()
        answer.close()
        return (REFUSED, "") if answer.status in (400, 404) else explained(answer.status, body)
    stream, cancels = draw.random() < 0.7, draw.random() < soak.options.cancels
    if cancels:  # long enough to be on its way when it hangs up: in the queue, in its prompt, between two tokens
        output = CANCELLED_TOKENS
    sent: dict[str, Any] = {
        "model": soak.model,
        "prompt": [draw.randrange(soak.vocabulary) for _ in range(prompt)],
        "max_tokens": output,
        "ignore_eos": True,
        "temperature": draw.choice((0, 0.8)),
        "stream": stream,
        **draw.choice(({}, {}, {"top_k": 20}, {"logprobs": 2}, {"frequency_penalty": 0.5}, {"stop": ["\n\n\n\n"]})),
    }
    soak.asked_tokens += output
    leaves_s = draw.uniform(0, CANCELLED_S) if cancels else None
    body = json.dumps(sent).encode()
    asking = asyncio.create_task(answered(client, body, stream, "stop" in sent, output))
    if leaves_s is None:
        return await asking
    done, _ = await asyncio.wait((asking,), timeout=leaves_s)
    if done:
        return asking.result()
    asking.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await asking
    return GONE, ""


async def answered(client: Client, body: bytes, stream: bool, may_stop: bool, output: int) -> tuple[str, str]:
    """Read an answer to its end, and check that it is whole."""
    answer: Answer | None = None
    try:
        answer = await client.ask("POST", "/v1/completions", body)
        if answer.status != 200:
            return explained(answer.status, await answer.read())
        if not stream:
            found = json.loads(await answer.read())
            count, reason = found["usage"]["completion_tokens"], found["choices"][0]["finish_reason"]
            return checked(count, reason, may_stop, output)
        reason, ended = None, False
        async for data in events(answer):
            if data == b"[DONE]":
                ended = True
                continue
            part = json.loads(data)
            if "error" in part:
                return explained(500, data)
            for choice in part["choices"]:
                reason = choice["finish_reason"] or reason
        if not ended:
            return "cut", "a stream without [DONE]"
        return checked(output, reason, may_stop, output)
    finally:
        if answer is not None:
            answer.close()


def checked(count: int, reason: str | None, may_stop: bool, output: int) -> tuple[str, str]:
    if (reason == "length" and count == output) or (may_stop and reason == "stop"):
        return WHOLE, ""
    return "short", f"{count} of {output} tokens, finish_reason {reason}"


def explained(status: int, body: bytes) -> tuple[str, str]:
    """A refusal by its status and code."""
    try:
        code = json.loads(body)["error"]["code"]
    except (ValueError, KeyError, TypeError):
        return "no error body", f"{status} {body[:200]!r}"
    known = {
        (429, "server_overloaded"): BUSY,
        (500, "engine_restarted"): RESTARTED,
        (503, "starting"): STARTING,
    }
    return known.get((status, code), f"status {status}"), f"{code}"


async def killing(soak: Soak, over: asyncio.Event) -> None:
    """Kill the engine every so often until it is over; how long the server takes to be ready again."""
    while True:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(over.wait(), soak.options.kill_every)
            return
        pid = (await asyncio.to_thread(soak.server.get, "/server_info"))["engine_pid"]
        begin = time.perf_counter()
        os.kill(pid, signal.SIGKILL)
        soak.kills.append(begin)
        await asyncio.sleep(0.3)
        while not await asyncio.to_thread(soak.server.ready):
            await asyncio.sleep(0.05)
        soak.back_s.append(time.perf_counter() - begin)


async def watch(soak: Soak) -> None:
    """Memory of every process of the server, once a second."""
    while True:
        for pid in soak.server.processes():
            size = resident_bytes(pid)
            if size is not None:
                soak.memory.setdefault(pid, []).append((time.perf_counter(), float(size)))
        await asyncio.sleep(1.0)


def grown(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """(growth in bytes over the last four fifths, size): the slope by Theil and Sen times the time."""
    late = points[len(points) // 5 :]
    return slope(late) * (late[-1][0] - late[0][0]), late[-1][1]


def told(
    record: Record, soak: Soak, settled_s: float | None, same: bool, metrics: dict[str, float], info: dict[str, Any]
) -> None:
    options = soak.options
    counted = dict(soak.ends.most_common())
    odd = sum(count for end, count in counted.items() if end not in EXPECTED)
    sizes = {pid: grown(points) for pid, points in soak.memory.items() if len(points) >= 10}
    own = soak.server.process.pid
    record.summary.update(
        sent=soak.sent, ends=counted, odd=soak.odd[:20], kills=len(soak.kills), back_s=seconds(soak.back_s),
        longest_request_s=round(soak.longest_s, 3), settled_s=settled_s, same_canary=same,
        memory={("server" if pid == own else f"engine {pid}"): {"growth_bytes": round(growth), "bytes": round(size)}
                for pid, (growth, size) in sizes.items()},
        restarts=info["restarts"], engine=info.get("engine"),
        counters={name: total(metrics, name) for name in (
            "vllm:request_success_total", "vllm:generation_tokens_total", "ridgeline:requests_replayed",
            "ridgeline:requests_refused", "vllm:num_preemptions_total")},
    )  # fmt: skip
    record.timings["memory"] = {
        "server" if pid == own else f"engine {pid}": [[round(at - points[0][0], 1), round(size)] for at, size in points]
        for pid, points in soak.memory.items()
    }
    record.table(
        f"{soak.sent:,} requests in {options.seconds:.0f} s, {len(soak.kills)} kills of the engine",
        ["end", "requests"],
        [[end if end in EXPECTED else f"! {end}", f"{count:,}"] for end, count in counted.items()],
    )
    for words in soak.odd[:5]:
        record.note(words)
    accounted = sum(counted.values()) == soak.sent and not odd
    record.target(
        "every request accounted for", "one of the ends that it may have",
        f"{soak.sent - sum(counted.values())} missing, {odd} odd", accounted,
    )  # fmt: skip
    record.target(
        "no stuck request", f"each ended within {options.patience:.0f} s", f"the longest took {soak.longest_s:.1f} s",
        not counted.get("stuck"),
    )  # fmt: skip
    engine = info.get("engine", {})
    record.target(
        "no lost block", "none held, no place taken, at the end",
        f"{engine.get('referenced_blocks')} held, settled in {'never' if settled_s is None else f'{settled_s:.1f} s'}",
        settled_s is not None and engine.get("referenced_blocks") == 0,
    )  # fmt: skip
    record.target("the same greedy text before and after", "the same", "the same" if same else "another", same)
    record.target(
        "ready again after a kill", "within the load time + 10 s",
        f"{max(soak.back_s, default=0):.1f} s at most, {len(soak.back_s)} of {len(soak.kills)} kills",
        len(soak.back_s) == len(soak.kills) and max(soak.back_s, default=0) < info.get("load_s", 0) + 10,
    )  # fmt: skip
    for pid, (growth, size) in sizes.items():
        name = "server" if pid == own else "engine"
        length = soak.memory[pid][-1][0] - soak.memory[pid][0][0]
        record.target(
            f"memory of the {name}'s process over {length:.0f} s", f"grows ≤ {FLAT:.0%}",
            f"{growth / size:+.2%} of {size / 1e6:.0f} MB",
            growth / size <= FLAT if length >= WATCHED_S or options.quick else None,
        )  # fmt: skip


if __name__ == "__main__":
    main()
