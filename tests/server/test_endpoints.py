"""What endpoints answer to what they are meant for."""

from __future__ import annotations

import pytest
from served import CANARY, Served, events


def test_models(server: Served) -> None:
    listed = server.client.get("/v1/models").json()
    assert [one["id"] for one in listed["data"]] == ["ridgeline"]
    assert server.client.get("/v1/models/ridgeline").json()["max_model_len"] == 2048
    assert server.client.get("/v1/models/other").status_code == 404


def test_completion(sound: Served) -> None:
    answer = sound.post("/v1/completions", CANARY).json()
    (choice,) = answer["choices"]
    assert choice["text"].startswith(" return a + b")
    assert choice["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 12


def test_stream_is_the_same_text(sound: Served) -> None:
    whole = sound.post("/v1/completions", CANARY).json()
    body = {**CANARY, "stream": True, "stream_options": {"include_usage": True}}
    parts = events(sound.post("/v1/completions", body).text)
    assert "".join(one["choices"][0]["text"] for one in parts if one["choices"]) == whole["choices"][0]["text"]
    assert [one["choices"][0]["finish_reason"] for one in parts if one["choices"]][-1] == "length"
    assert parts[-1]["usage"]["completion_tokens"] == 12


def test_several_prompts_and_samples(sound: Served) -> None:
    body = {**CANARY, "prompt": ["def add(a, b):", "class Stack:"], "n": 3, "temperature": 1.0, "seed": 5}
    answer = sound.post("/v1/completions", body).json()
    assert [one["index"] for one in answer["choices"]] == list(range(6))
    again = sound.post("/v1/completions", {**body, "stream": True})
    texts = [""] * 6
    for part in events(again.text):
        texts[part["choices"][0]["index"]] += part["choices"][0]["text"]
    assert texts == [one["text"] for one in answer["choices"]]
    assert len(set(texts)) > 2


def test_best_of_shows_the_likeliest(sound: Served) -> None:
    body = {**CANARY, "n": 1, "best_of": 4, "temperature": 1.5, "seed": 1, "logprobs": 0}
    best = sound.post("/v1/completions", body).json()
    every = sound.post("/v1/completions", {**body, "n": 4}).json()

    def mean(choice: dict) -> float:
        values = choice["logprobs"]["token_logprobs"]
        return sum(values) / len(values)

    assert mean(best["choices"][0]) == pytest.approx(max(map(mean, every["choices"])))
    assert best["usage"]["completion_tokens"] == 48


def test_stop_strings_do_not_show(sound: Served) -> None:
    body = {**CANARY, "max_tokens": 64, "stop": ["\n"]}
    (choice,) = sound.post("/v1/completions", body).json()["choices"]
    assert (choice["text"], choice["finish_reason"]) == (" return a + b", "stop")
    parts = events(sound.post("/v1/completions", {**body, "stream": True}).text)
    assert "".join(one["choices"][0]["text"] for one in parts) == " return a + b"


def test_echo_with_logprobs_scores_the_prompt(sound: Served) -> None:
    body = {**CANARY, "max_tokens": 0, "echo": True, "logprobs": 2}
    answer = sound.post("/v1/completions", body).json()
    (choice,) = answer["choices"]
    found = choice["logprobs"]
    assert choice["text"] == "".join(found["tokens"]) == CANARY["prompt"]
    assert len(found["token_logprobs"]) == len(found["tokens"]) == len(found["text_offset"])
    assert all(value <= 0 for value in found["token_logprobs"])
    assert answer["usage"]["completion_tokens"] == 0
    again = sound.post("/v1/completions", {**body, "max_tokens": 3}).json()["choices"][0]
    assert again["text"].startswith(CANARY["prompt"] + " return")
    assert again["logprobs"]["token_logprobs"][: len(found["tokens"])] == pytest.approx(found["token_logprobs"])


def test_chat(sound: Served) -> None:
    body = {"model": "ridgeline", "messages": [{"role": "user", "content": "def f"}], "max_tokens": 8, "logprobs": True,
            "top_logprobs": 2, "temperature": 0}  # fmt: skip
    whole = sound.post("/v1/chat/completions", body).json()
    (choice,) = whole["choices"]
    assert choice["message"]["role"] == "assistant"
    assert len(choice["logprobs"]["content"]) == 8
    assert all(len(one["top_logprobs"]) == 2 for one in choice["logprobs"]["content"])
    parts = events(sound.post("/v1/chat/completions", {**body, "stream": True}).text)
    deltas = [one["choices"][0]["delta"] for one in parts]
    assert deltas[0]["role"] == "assistant"
    assert "".join(one.get("content") or "" for one in deltas) == choice["message"]["content"]
    scored = [entry for one in parts if (found := one["choices"][0]["logprobs"]) for entry in found["content"]]
    assert scored == choice["logprobs"]["content"]


def test_seeds_repeat(sound: Served) -> None:
    body = {**CANARY, "temperature": 1.0}
    texts = {sound.post("/v1/completions", {**body, "seed": 3}).json()["choices"][0]["text"] for _ in range(3)}
    assert len(texts) == 1
    texts = {sound.post("/v1/completions", body).json()["choices"][0]["text"] for _ in range(4)}
    assert len(texts) > 1


def test_tokenize_and_back(server: Served) -> None:
    found = server.post("/tokenize", {"model": "ridgeline", "prompt": "def add(a, b):"}).json()
    assert found["count"] == len(found["tokens"]) == 7
    back = server.post("/detokenize", {"tokens": found["tokens"][1:]}).json()
    assert back["prompt"] == "def add(a, b):"


def test_the_cache_is_counted(sound: Served) -> None:
    body = {**CANARY, "prompt": "x = 1\n" * 60}
    sound.post("/v1/completions", body)
    usage = sound.post("/v1/completions", body).json()["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] >= 64


def test_about(server: Served) -> None:
    assert server.client.get("/version").json()["version"]
    assert server.client.get("/ready").json() == {"status": "ready"}
    before = server.client.get("/health").json()["steps"]
    server.canary()
    assert server.client.get("/health").json()["steps"] >= before + 12
    info = server.info()
    assert "model" not in info["settings"]
    assert info["limits"]["max_n"] == 128


def test_metrics_have_vllms_names(server: Served) -> None:
    server.canary()
    text = server.client.get("/metrics").text
    for name in (
        "vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc",
        "vllm:prefix_cache_queries_total", "vllm:prefix_cache_hits_total", "vllm:prompt_tokens_total",
        "vllm:generation_tokens_total", "vllm:num_preemptions_total", "vllm:request_success_total",
        "vllm:time_to_first_token_seconds_bucket", "vllm:e2e_request_latency_seconds_count",
        "vllm:request_queue_time_seconds_sum", "vllm:cache_config_info", "ridgeline:memory_bytes",
    ):  # fmt: skip
        assert name in text, name


def test_no_parameter_is_lost_on_the_way(sound: Served) -> None:
    """Each of these changes what the greedy canary says."""
    plain = sound.canary()
    for more in (
        {"logit_bias": {"0": 100}, "ignore_eos": True},
        {"repetition_penalty": 5.0},
        {"frequency_penalty": 2.0, "presence_penalty": 2.0},
        {"bad_words": [" return"]},
        {"stop_token_ids": sound.post("/tokenize", {"prompt": " +"}).json()["tokens"][1:]},
        {"temperature": 2.0, "seed": 11},
        {"temperature": 2.0, "seed": 11, "min_p": 0.9, "n": 1, "logit_bias": {"5": 50}},
    ):
        answer = sound.post("/v1/completions", {**CANARY, **more})
        assert answer.status_code == 200, answer.text
        assert answer.json()["choices"][0]["text"] != plain, more
    for more in ({"temperature": 2.0, "top_k": 1}, {"temperature": 2.0, "top_p": 0}, {"temperature": 1e-9}):
        assert sound.post("/v1/completions", {**CANARY, **more}).json()["choices"][0]["text"] == plain, more
