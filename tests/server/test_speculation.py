"""A server that drafts: the same answers, and what it says of its trees."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from served import CANARY, Served, served


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with served("--speculative-config", '{"method": "tree", "tree": [2, 1, 1]}', "--max-model-len", "512") as one:
        yield one


def metric(server: Served, name: str) -> float:
    """The sum of a metric's samples."""
    lines = server.client.get("/metrics").text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name + "{"))


def test_answers_are_those_of_a_server_that_does_not(server: Served) -> None:
    with served("--max-model-len", "512") as plain:
        for more in ({}, {"temperature": 0.9, "seed": 3}, {"n": 2, "seed": 4, "temperature": 1.0, "logprobs": 2}):
            body = {**CANARY, "max_tokens": 40, **more}
            ours, theirs = (one.post("/v1/completions", body).json() for one in (server, plain))
            for mine, other in zip(ours["choices"], theirs["choices"], strict=True):
                assert mine["text"] == other["text"]
                assert mine["finish_reason"] == other["finish_reason"]
                assert mine["logprobs"] == other["logprobs"]
            assert ours["usage"]["completion_tokens"] == theirs["usage"]["completion_tokens"]


def test_trees_are_counted_under_vllms_names(server: Served) -> None:
    before = metric(server, "vllm:spec_decode_num_accepted_tokens_total")
    server.canary()
    drafts = metric(server, "vllm:spec_decode_num_drafts_total")
    nodes = metric(server, "vllm:spec_decode_num_draft_tokens_total")
    accepted = metric(server, "vllm:spec_decode_num_accepted_tokens_total")
    assert accepted > before
    assert 0 < drafts < nodes
    assert accepted < nodes
    assert metric(server, "vllm:spec_decode_num_accepted_tokens_per_pos_total") == accepted
    assert metric(server, "ridgeline:draft_seconds_total") > 0


def test_nothing_is_left_behind(server: Served) -> None:
    server.canary()
    server.settled()
    assert server.client.get("/health").status_code == 200
