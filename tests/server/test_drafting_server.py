"""A server that drafts: the same answers, and what it says of its trees."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

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
                assert_close(mine["logprobs"], other["logprobs"])
            assert ours["usage"]["completion_tokens"] == theirs["usage"]["completion_tokens"]


def assert_close(ours: dict[str, Any] | None, theirs: dict[str, Any] | None) -> None:
    """The same tokens with the same log-probabilities, but for the rounding of a row's softmax among others."""
    if ours is None or theirs is None:
        assert ours is theirs
        return
    assert ours["tokens"] == theirs["tokens"]
    assert ours["token_logprobs"] == pytest.approx(theirs["token_logprobs"], abs=1e-5)
    for mine, other in zip(ours["top_logprobs"], theirs["top_logprobs"], strict=True):
        assert mine == pytest.approx(other, abs=1e-5)


SCHEMA = {"type": "object", "properties": {"a": {"enum": ["x", "y"]}}, "required": ["a"], "additionalProperties": False}
TOOL = {"type": "function", "function": {"name": "look", "parameters": SCHEMA}}


@pytest.mark.parametrize(
    "form",
    [
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}},
        {"tools": [TOOL], "tool_choice": "required"},
    ],
    ids=["schema", "tool"],
)
@pytest.mark.parametrize(
    "more",
    [{"presence_penalty": 1.5}, {"logprobs": True, "top_logprobs": 2}, {"n": 3, "temperature": 1.0}, {"stop": ["q"]}],
    ids=str,
)
def test_25_structured_output_beside_drafts(server: Served, form: dict[str, Any], more: dict[str, Any]) -> None:
    """What a grammar binds drafts nothing, and is valid all the same."""
    body = {"model": "ridgeline", "messages": [{"role": "user", "content": "def f"}], "max_tokens": 40, "seed": 1}
    answer = server.post("/v1/chat/completions", {**body, "temperature": 0.0, **form, **more})
    assert answer.status_code == 200, answer.text
    choices = answer.json()["choices"]
    assert len(choices) == more.get("n", 1)
    for choice in choices:
        message = choice["message"]
        text = message["tool_calls"][0]["function"]["arguments"] if "tools" in form else message["content"]
        assert json.loads(text)["a"] in ("x", "y")


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
