"""Folders that are no model: the server says why in one line and ends with status 1. And small models that are."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import VOCABULARY
from served import served
from test_inputs import is_refusal

CHAT = "/v1/chat/completions"


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def truncated(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def overlapping(folder: Path) -> None:
    file = folder / "model.safetensors"
    raw = file.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    head = json.loads(raw[8 : 8 + size])
    first = next(name for name in head if name != "__metadata__")
    other = next(name for name in head if name not in ("__metadata__", first) and head[name]["shape"] == [64])
    head[other]["data_offsets"] = [0, head[other]["data_offsets"][1] - head[other]["data_offsets"][0]]
    text = json.dumps(head).encode().ljust(size)
    file.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + size :])


def other_vocabulary(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 300}))


def no_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()


def hostile_template(folder: Path) -> None:
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] = "{% for"
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def code(folder: Path) -> None:
    """auto_map and a Python file: an architecture that is not ours, and never run."""
    config = json.loads((folder / "config.json").read_text())
    config.update(architectures=["Evil"], model_type="evil", auto_map={"AutoModel": "evil.Evil"})
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')")


@pytest.mark.parametrize(
    "spoil", [no_weights, truncated, overlapping, other_vocabulary, no_tokenizer, hostile_template, code]
)
def test_40_refused_with_one_line(tiny: Path, tmp_path: Path, spoil: Callable[[Path], None]) -> None:
    folder = tmp_path / "spoiled"
    shutil.copytree(tiny, folder)
    spoil(folder)
    command = [sys.executable, "-m", "ridgeline.cli.main", "serve", str(folder), "--port", "0", "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 1, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: "), done.stderr
    assert "Traceback" not in done.stderr
    assert not (folder / "ran").exists()


def test_40_logits_that_are_not_numbers_end_the_request_alone(tiny: Path, tmp_path: Path) -> None:
    """NaN in one token's embedding: requests with that token fail, the others do not notice."""
    import torch
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "poisoned"
    shutil.copytree(tiny, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"][7] = torch.nan
    save_file(tensors, folder / "model.safetensors")
    with served(str(folder), "--served-model-name", "tiny", "--max-num-seqs", "8") as server:
        good = {"model": "tiny", "prompt": [0, 5, 9], "max_tokens": 8, "temperature": 0, "logit_bias": {"7": -100}}
        want = server.post("/v1/completions", good).json()["choices"][0]["text"]
        with ThreadPoolExecutor(4) as pool:
            bad = pool.submit(server.post, "/v1/completions", {**good, "prompt": [0, 7, 9]})
            rest = [pool.submit(server.post, "/v1/completions", good) for _ in range(3)]
        assert bad.result().status_code == 500
        assert bad.result().json()["error"]["code"] == "internal_error"
        assert [one.result().json()["choices"][0]["text"] for one in rest] == [want] * 3
        server.settled()


def test_38_a_small_pool_preempts_and_changes_no_token(tiny: Path) -> None:
    """Six requests grow beyond a pool of one and a half contexts; each says what it says alone."""
    options = ("--served-model-name", "tiny", "--kv-cache-memory-bytes", str(24 * 16 * 512), "--block-size", "16")
    with served(str(tiny), *options) as server:
        bodies = [
            {"model": "tiny", "prompt": [0, 5 + at, 9], "max_tokens": 120, "temperature": 0, "ignore_eos": True}
            for at in range(6)
        ]
        alone = [server.post("/v1/completions", body).json()["choices"][0]["text"] for body in bodies]
        with ThreadPoolExecutor(6) as pool:
            together = list(pool.map(lambda body: server.post("/v1/completions", body), bodies))
        assert [one.json()["choices"][0]["text"] for one in together] == alone
        metrics = server.client.get("/metrics").text
        preempted = next(line for line in metrics.splitlines() if line.startswith("vllm:num_preemptions_total"))
        assert float(preempted.split()[-1]) > 0
        server.settled()


def test_a_chat_template_of_the_checkpoints_own(tiny: Path) -> None:
    with served(str(tiny), "--served-model-name", "tiny", "--served-model-name", "other") as server:
        for name in ("tiny", "other"):
            body = {"model": name, "messages": [{"role": "user", "content": "a<|end|>b"}], "max_tokens": 4}
            assert server.post(CHAT, body).status_code == 200
        ids = server.post("/tokenize", {"messages": body["messages"]}).json()["tokens"]
        assert 1 not in ids  # <|end|> was typed, not meant
        text = server.post("/detokenize", {"tokens": ids}).json()["prompt"]
        assert text == "<user>a<|end|>b\n<me>"


HOSTILE = (
    "{% if messages[0].content == 'range' %}{% for i in range(10**9) %}x{% endfor %}"
    "{% elif messages[0].content == 'class' %}{{ ''.__class__.__mro__ }}{% else %}fine{% endif %}"
)


def test_27_a_hostile_template_harms_no_one(tiny: Path, tmp_path: Path) -> None:
    """What it tries ends as a 400 of whoever set it off; and a bias on every token still leaves one."""
    folder = tmp_path / "hostile"
    shutil.copytree(tiny, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": HOSTILE}))
    with served(str(folder), "--served-model-name", "tiny", "--max-num-seqs", "4") as server:
        for content in ("range", "class"):
            answer = server.post(CHAT, {"model": "tiny", "messages": [{"role": "user", "content": content}]})
            is_refusal(answer, 400, "messages")
            assert "__class__" not in answer.text
        fine = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "max_tokens": 4}
        assert server.post(CHAT, fine).status_code == 200
        every = {str(token): -100 for token in range(VOCABULARY)}
        body = {"model": "tiny", "prompt": [0, 5, 9], "max_tokens": 8, "temperature": 0, "ignore_eos": True}
        biased = server.post("/v1/completions", {**body, "logit_bias": every, "logprobs": 1}).json()["choices"][0]
        assert biased["text"] == server.post("/v1/completions", body).json()["choices"][0]["text"]
        assert len(biased["logprobs"]["tokens"]) == 8
        server.settled()
