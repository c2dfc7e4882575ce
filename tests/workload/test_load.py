"""Load on a stand-in endpoint: bodies, times from the intended arrival, tokens of deltas, every way to end."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from standin_endpoint import Answering, Endpoint, Heard, chunk, endpoint, event, head, plain, reciting, text, usage

from ridgeline.core.errors import InvalidArgument
from ridgeline.workload.arrivals import Job, equal, prompt_ids
from ridgeline.workload.http import Address, Client
from ridgeline.workload.load import Delta, Outcome, Target, ends, load, token_times, words
from ridgeline.workload.measure import report

TARGET = Target(model="m")


def run(
    answering: Answering, jobs: Sequence[Job], target: Target = TARGET, concurrency: int | None = None
) -> tuple[list[Outcome], Endpoint]:
    async def work() -> tuple[list[Outcome], Endpoint]:
        async with endpoint(answering) as found, Client(Address.of(found.url)) as client:
            return await load(client, target, jobs, concurrency), found

    return asyncio.run(asyncio.wait_for(work(), 20))


def sending(*parts: Any, status: int = 200) -> Answering:
    """One fixed stream."""

    async def answer(heard: Heard, writer: asyncio.StreamWriter) -> None:
        writer.write(head(status, "Transfer-Encoding: chunked"))
        for part in parts:
            writer.write(chunk(part if isinstance(part, bytes) else event(part)))
            await writer.drain()
            await asyncio.sleep(0.01)
        writer.write(chunk(b""))

    return answer


def test_bodies_of_each_endpoint() -> None:
    job = Job(5, 9)
    body = Target(model="m", vocabulary=50, seed=3, extra={"top_k": 4, "stream_options": {"more": 1}}).body(job, 2)
    assert body == {
        "model": "m", "max_tokens": 9, "temperature": 0.0, "stream": True, "ignore_eos": True, "top_k": 4,
        "stream_options": {"include_usage": True, "more": 1}, "prompt": prompt_ids(job, 2, 50, 3),
    }  # fmt: skip
    chat = Target(model="m", endpoint="chat", ignore_eos=False, temperature=0.7).body(job, 2)
    assert chat["messages"] == [{"role": "user", "content": words(job, 2)}]
    assert "ignore_eos" not in chat
    assert "prompt" not in chat
    assert Target(model="m", vocabulary=None).body(job, 2)["prompt"] == words(job, 2)
    assert len(words(job, 2).split()) == 5
    assert words(job, 2) != words(job, 3)
    with pytest.raises(InvalidArgument, match="endpoint"):
        Target(model="m", endpoint="embeddings")


def test_a_run_is_served_and_measured() -> None:
    outcomes, found = run(reciting(5, gap_s=0.02, first_s=0.05), equal(4, 7, 5))
    assert ends(outcomes) == {"ok": 4}
    assert [heard.line for heard in found.heard] == ["POST /v1/completions HTTP/1.1"] * 4
    figures = report([one.served for one in outcomes], {"ttft": 10.0})
    assert (figures.requests, figures.failed, figures.output_tokens, figures.prompt_tokens) == (4, 0, 20, 28)
    assert figures.cached_tokens == 12
    assert figures.met == 4
    assert figures.ttft is not None
    assert figures.tpot is not None
    assert 0.05 <= figures.ttft.p50 < 0.2
    assert 0.02 <= figures.tpot.p50 < 0.06


def test_times_count_from_the_intended_arrival() -> None:
    """A server that takes one at a time cannot look fast because its client waited for it."""
    seat = asyncio.Semaphore(1)

    async def slow(heard: Heard, writer: asyncio.StreamWriter) -> None:
        async with seat:
            await reciting(1, first_s=0.1)(heard, writer)

    jobs = [Job(3, 1, 0.0), Job(3, 1, 0.01), Job(3, 1, 0.02)]
    for concurrency in (None, 1):
        seat = asyncio.Semaphore(1)
        outcomes, _ = run(slow, jobs, concurrency=concurrency)
        times = [one.served.ttft_s for one in outcomes]
        assert times == pytest.approx([0.1, 0.19, 0.28], abs=0.05)
        late = [one.late_s for one in outcomes]
        assert late == pytest.approx([0.0, 0.0, 0.0] if concurrency is None else [0.0, 0.09, 0.18], abs=0.05)


def test_a_closed_loop_arrives_when_it_gets_its_turn() -> None:
    outcomes, found = run(reciting(2, first_s=0.05), equal(6, 3, 2), concurrency=2)
    assert found.most == 2
    assert found.connections == 2
    assert max(one.served.ttft_s for one in outcomes) < 0.1
    arrivals = sorted(one.served.arrival_s for one in outcomes)
    assert arrivals[-1] - arrivals[0] >= 0.09


def test_arrivals_are_kept() -> None:
    begin = time.perf_counter()
    jobs = [Job(3, 1, 0.1), Job(3, 1, 0.0), Job(3, 1, 0.05)]
    outcomes, found = run(reciting(1), jobs)
    offsets = [one.served.arrival_s - outcomes[1].served.arrival_s for one in outcomes]
    assert offsets == pytest.approx([0.1, 0.0, 0.05])
    assert time.perf_counter() - begin >= 0.1
    assert all(0 <= one.late_s < 0.05 for one in outcomes)
    assert [heard.body["prompt"] for heard in found.heard] == [prompt_ids(jobs[at], at, 1000) for at in (1, 2, 0)]


def test_deltas_of_several_tokens() -> None:
    done = {"choices": [], **usage(4, 12)}
    outcomes, _ = run(sending(text("abcd"), text("ab"), text("abcd"), done, "[DONE]"), equal(1, 4, 12))
    served = outcomes[0].served
    assert len(served.token_times_s) == 12
    assert len(set(served.token_times_s)) == 3
    listed = [text("abcd"), text("a"), text("b")]
    for one, count in zip(listed, (1, 5, 2)):
        one["choices"][0]["token_ids"] = [3] * count
    outcomes, _ = run(sending(*listed, {"choices": [], **usage(4, 9)}, "[DONE]"), equal(1, 4, 9))
    times = outcomes[0].served.token_times_s
    assert [times.count(one) for one in sorted(set(times))] == [1, 5, 3]
    running = [text("a" * 9, **usage(4, 1)), text("b", **usage(4, 7)), text("c", **usage(4, 8))]
    outcomes, _ = run(sending(*running, "[DONE]"), equal(1, 4, 8))
    times = outcomes[0].served.token_times_s
    assert [times.count(one) for one in sorted(set(times))] == [1, 6, 1]


@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=12),
    total=st.none() | st.integers(1, 80),
)
def test_every_token_has_a_time(sizes: list[int], total: int | None) -> None:
    deltas = [Delta(float(place), size) for place, size in enumerate(sizes)]
    times = token_times(deltas, total)
    assert len(times) == max(total or 0, len(sizes))
    assert times == sorted(times)
    assert set(times) == {one.at_s for one in deltas}


def test_chat_and_tools_are_timed_too() -> None:
    def delta(**found: Any) -> dict[str, Any]:
        return {"choices": [{"index": 0, "delta": found}]}

    call = delta(tool_calls=[{"index": 0, "function": {"arguments": '{"a'}}])
    parts = (delta(role="assistant", content=""), delta(reasoning="hm"), call, delta(content="x"))
    outcomes, found = run(sending(*parts, "[DONE]"), equal(1, 4, 3), replace(TARGET, endpoint="chat"))
    assert found.heard[0].line == "POST /v1/chat/completions HTTP/1.1"
    assert len(outcomes[0].served.token_times_s) == 3


async def refuse(heard: Heard, writer: asyncio.StreamWriter) -> None:
    writer.write(plain(429, {"error": {"message": "full", "code": "server_overloaded"}}, "Retry-After: 1"))


async def hang_up(heard: Heard, writer: asyncio.StreamWriter) -> None:
    raise ConnectionError


async def sleep(heard: Heard, writer: asyncio.StreamWriter) -> None:
    await asyncio.sleep(5)


async def cut(heard: Heard, writer: asyncio.StreamWriter) -> None:
    writer.write(head(200, "Transfer-Encoding: chunked") + chunk(event(text("a"))))
    await writer.drain()
    raise ConnectionError


BROKEN_STREAM = {"error": {"message": "restarted", "code": "engine_restarted"}}


@pytest.mark.parametrize(
    ("answering", "end", "status", "detail"),
    [
        (refuse, "429", 429, "server_overloaded full"),
        (hang_up, "connection", None, "no answer"),
        (sleep, "timeout", None, "longer than 0.2 s"),
        (cut, "stream", 200, "broke off"),
        (sending(text("a"), BROKEN_STREAM, "[DONE]"), "stream", 200, "engine_restarted restarted"),
        (sending(text("a")), "stream", 200, "without [DONE]"),
        (sending(text("a"), b"data: {x\n\n", "[DONE]"), "stream", 200, "no JSON"),
        (sending(b"<html>", status=502), "502", 502, "<html>"),
    ],
    ids=["refused", "hung up", "silent", "cut", "error event", "no end", "no JSON", "a proxy's page"],
)
def test_every_way_to_end(answering: Answering, end: str, status: int | None, detail: str) -> None:
    outcomes, _ = run(answering, equal(2, 3, 2), replace(TARGET, timeout_s=0.2))
    assert ends(outcomes) == {end: 2}
    assert [one.status for one in outcomes] == [status] * 2
    assert all(detail in one.detail for one in outcomes)
    figures = report([one.served for one in outcomes])
    assert (figures.failed, figures.output_tokens) == (2, 0)


def test_an_answer_without_a_text_is_served_all_the_same() -> None:
    outcomes, _ = run(sending({"choices": [], **usage(4, 0)}, "[DONE]"), equal(1, 4, 1))
    assert ends(outcomes) == {"ok": 1}
    assert outcomes[0].served.token_times_s == []


def test_progress_hears_of_every_end() -> None:
    heard: list[tuple[int, int]] = []

    async def work() -> None:
        async with endpoint(refuse) as found, Client(Address.of(found.url)) as client:
            await load(client, TARGET, equal(3, 2, 2), progress=lambda done, total: heard.append((done, total)))

    asyncio.run(work())
    assert heard == [(1, 3), (2, 3), (3, 3)]


def test_bodies_are_json() -> None:
    assert json.loads(json.dumps(TARGET.body(Job(3, 2), 0)))["max_tokens"] == 2
