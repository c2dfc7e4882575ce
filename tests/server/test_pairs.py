"""Options in pairs: whatever is combined with whatever, the answer is valid and whole, streamed or not."""

from __future__ import annotations

import json
from itertools import combinations
from typing import Any

import pytest
from served import Served, events

SCHEMA = {"type": "object", "properties": {"a": {"enum": ["x", "y"]}}, "required": ["a"], "additionalProperties": False}
FORM = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}
OPTIONS: list[dict[str, Any]] = [
    {"response_format": FORM}, {"n": 3}, {"logprobs": True, "top_logprobs": 3}, {"temperature": 1.5, "seed": 4},
    {"top_k": 5, "temperature": 1.0}, {"top_p": 0.3, "temperature": 1.0}, {"min_p": 0.4, "temperature": 1.0},
    {"presence_penalty": 2.0}, {"repetition_penalty": 3.0}, {"logit_bias": {"5": 100, "7": -100}},
    {"stop": ["\n", "}"]}, {"min_tokens": 4}, {"ignore_eos": True}, {"bad_words": ["return", "a"]},
    {"stop_token_ids": [9, 11]}, {"include_stop_str_in_output": True, "stop": [":"]}, {"skip_special_tokens": False},
]  # fmt: skip


@pytest.mark.parametrize("first", range(len(OPTIONS) - 1), ids=lambda first: ",".join(OPTIONS[first]))
def test_pairs(sound: Served, first: int) -> None:
    for one, other in combinations(range(first, len(OPTIONS)), 2):
        if one != first:
            break
        body = {"model": "ridgeline", "messages": [{"role": "user", "content": "def f"}], "max_tokens": 16,
                "temperature": 0.0, "seed": 1, **OPTIONS[one], **OPTIONS[other]}  # fmt: skip
        answer = sound.post("/v1/chat/completions", body)
        if "response_format" in body and "bad_words" in body:  # together they could leave no token
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, "bad_words")
            continue
        assert answer.status_code == 200, (body, answer.text)
        choices = answer.json()["choices"]
        assert len(choices) == body.get("n", 1)
        parts = events(sound.post("/v1/chat/completions", {**body, "stream": True}).text)
        texts = [""] * len(choices)
        for part in parts:
            for choice in part["choices"]:
                texts[choice["index"]] += choice["delta"].get("content") or ""
        assert texts == [choice["message"]["content"] for choice in choices], body
        for choice in choices:
            cut = "stop" in body or "stop_token_ids" in body or choice["finish_reason"] != "stop"
            if "response_format" in body and not cut:
                assert json.loads(choice["message"]["content"])["a"] in ("x", "y"), body
            if body.get("logprobs"):
                assert all(-10_000 < one["logprob"] <= 0 for one in choice["logprobs"]["content"])
