"""Bad input is one clear error, naming parameter and limit; nothing stays behind, and the rest of a batch finishes."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from emptiness import assert_empty

from ridgeline import LLM, SamplingParams
from ridgeline.core.errors import (
    CheckpointError,
    ContextLengthExceeded,
    DoesNotFit,
    InvalidArgument,
    RidgelineError,
    UnsupportedModel,
)

SHORT = SamplingParams(max_tokens=2, temperature=0)

BAD_PROMPTS: dict[str, tuple[Any, type[InvalidArgument], str]] = {
    "no ids": ({"prompt_token_ids": []}, InvalidArgument, "is empty"),
    "an empty list": ([[]], InvalidArgument, "is empty"),
    "beyond the vocabulary": ([[5, 288]], InvalidArgument, "token id 288 at 1 is outside [0, 287]"),
    "negative": ([[-1]], InvalidArgument, "token id -1 at 0 is outside [0, 287]"),
    "a float": ([[1.5]], InvalidArgument, "must be an integer, not 1.5"),
    "a bool": ([[True]], InvalidArgument, "must be an integer, not True"),
    "too long": ([[3] * 256], ContextLengthExceeded, "has 256 tokens; the context holds 256"),
    "text too long": ("a b c d " * 200, ContextLengthExceeded, "the context holds 256"),
    "unknown key": ({"prompt": "a", "promt": 1}, InvalidArgument, "unknown key 'promt'"),
    "no text": ({"prompt": 5}, InvalidArgument, "needs a string"),
    "nothing": ({}, InvalidArgument, "needs a string"),
    "bytes": ([b"abc"], InvalidArgument, "not bytes"),
    "a number": ([7.5], InvalidArgument, "not float"),
    "no unicode": ("a\ud800b", InvalidArgument, "surrogate"),
}


@pytest.mark.parametrize("case", BAD_PROMPTS)
def test_bad_prompts(llm: LLM, case: str) -> None:
    prompt, kind, message = BAD_PROMPTS[case]
    with pytest.raises(kind, match=re.escape(message)) as caught:
        llm.generate(prompt, SHORT, use_tqdm=False)
    assert caught.value.parameter == "prompt"
    assert_empty(llm)
    one = prompt[0] if isinstance(prompt, list) else prompt
    with pytest.raises(kind):
        llm.stream(one, SHORT)


BAD_PARAMS: dict[str, list[Any]] = {
    "n": [0, -1, 1025, 1.0, True, math.nan],
    "temperature": [-0.1, math.nan, math.inf, "1", None],
    "top_p": [0, -0.5, 1.01, math.nan, True],
    "top_k": [-2, 1.5],
    "min_p": [-0.1, 1.1, math.nan],
    "presence_penalty": [-2.1, 2.1, math.nan],
    "frequency_penalty": [-2.1, 2.1, math.inf],
    "repetition_penalty": [0, -1, math.nan],
    "seed": [1.5, 1 << 63, "a"],
    "stop": ["", ["a", ""], 5, ["x"] * 65],
    "stop_token_ids": [[-1], [1.5], "a"],
    "bad_words": [[""], 3],
    "logit_bias": [{"a": 1}, {-1: 1}, {3: math.nan}, {3: 101}, [3]],
    "min_tokens": [-1, 17, 1.5],
    "max_tokens": [0, -1, 1.5],
    "logprobs": [-1, 1.5],
    "prompt_logprobs": [-1, "3"],
    "ignore_eos": [1, "yes"],
    "detokenize": [0],
    "skip_special_tokens": [None],
    "include_stop_str_in_output": ["no"],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD_PARAMS.items() for value in values])
def test_parameters_that_no_model_takes(name: str, value: Any) -> None:
    with pytest.raises(InvalidArgument) as caught:
        SamplingParams(**{name: value})
    assert caught.value.parameter == name
    assert str(caught.value).startswith(f"{name}: ")


BEYOND_THE_MODEL: dict[str, tuple[dict[str, Any], type[InvalidArgument], str]] = {
    "max_tokens": ({"max_tokens": 254}, ContextLengthExceeded, "at most 253"),
    "min_tokens": ({"max_tokens": None, "min_tokens": 254}, ContextLengthExceeded, "at most 253"),
    "logprobs": ({"logprobs": 21}, InvalidArgument, "max_logprobs 20"),
    "prompt_logprobs": ({"prompt_logprobs": 21}, InvalidArgument, "max_logprobs 20"),
    "stop_token_ids": ({"stop_token_ids": [288]}, InvalidArgument, "outside [0, 287]"),
    "logit_bias": ({"logit_bias": {288: 1.0}}, InvalidArgument, "outside [0, 287]"),
    "bad_words": ({"bad_words": ["  "]}, InvalidArgument, "visible character"),
}


@pytest.mark.parametrize("name", BEYOND_THE_MODEL)
def test_parameters_that_this_model_does_not_take(llm: LLM, name: str) -> None:
    values, kind, message = BEYOND_THE_MODEL[name]
    with pytest.raises(kind, match=re.escape(message)) as caught:
        llm.generate([[3, 4, 5]], SamplingParams(**values), use_tqdm=False)
    assert caught.value.parameter == name


def test_calls_that_make_no_sense(llm: LLM) -> None:
    for prompts, params, parameter in (
        ([], SHORT, "prompts"),
        (5, SHORT, "prompts"),
        (["a", "b"], [SHORT], "sampling_params"),
        ("a", {"max_tokens": 3}, "sampling_params"),
        (["a"], ["b"], "sampling_params"),
    ):
        with pytest.raises(InvalidArgument) as caught:
            llm.generate(prompts, params, use_tqdm=False)  # type: ignore[arg-type]
        assert caught.value.parameter == parameter
    for priority in ([1], ["a", "b"]):
        with pytest.raises(InvalidArgument) as caught:
            llm.generate(["a", "b"], SHORT, use_tqdm=False, priority=priority)  # type: ignore[arg-type]
        assert caught.value.parameter == "priority"


def test_unknown_sampling_parameter_names_the_nearest() -> None:
    with pytest.raises(InvalidArgument, match="did you mean temperature") as caught:
        SamplingParams.from_mapping({"temprature": 1})
    assert caught.value.parameter == "temprature"


def test_the_good_ones_of_a_batch_finish(llm: LLM, caplog: pytest.LogCaptureFixture) -> None:
    good = SamplingParams(max_tokens=5, temperature=0, ignore_eos=True)
    prompts: list[Any] = ["one", [[]], "two", [3, 999], "three", {"prompt_token_ids": [3] * 300}, [7, 8]]
    params = [good] * 6 + [SamplingParams(max_tokens=5000)]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    assert [output.error is None for output in outputs] == [True, False, True, False, True, False, False]
    for place in (0, 2, 4):
        assert len(outputs[place].outputs[0].token_ids) == 5
        assert outputs[place].outputs[0].token_ids == llm.generate(prompts[place], good, False)[0].outputs[0].token_ids
    for output in outputs:
        assert output.finished
        if output.error is not None:
            assert output.outputs[0].finish_reason == "error"
            assert output.outputs[0].stop_reason == str(output.error)
    assert isinstance(outputs[6].error, ContextLengthExceeded)
    assert sum("was refused" in record.message for record in caplog.records) == 4


def test_if_none_can_be_run_the_first_error_is_raised(llm: LLM) -> None:
    with pytest.raises(InvalidArgument, match="999"):
        llm.generate([[999], []], SHORT, use_tqdm=False)


def test_chat_refuses_what_the_template_cannot_say(llm: LLM) -> None:
    for messages in ([], "hello", [{"role": "user"}], [{"content": "x"}], [5]):
        with pytest.raises(InvalidArgument) as caught:
            llm.chat(messages, SHORT, use_tqdm=False)  # type: ignore[arg-type]
        assert caught.value.parameter == "messages"
    outputs = llm.chat([[{"role": "user", "content": "hi"}], [{"role": "user"}]], SHORT, use_tqdm=False)  # type: ignore[list-item]
    assert outputs[0].error is None
    assert isinstance(outputs[1].error, InvalidArgument)


# Settings


BAD_SETTINGS: dict[str, Any] = {
    "dtype": "int3",
    "device": "tpu",
    "max_model_len": 0,
    "max_num_seqs": 0,
    "max_num_batched_tokens": -1,
    "kv_cache_memory_bytes": 1.5,
    "gpu_memory_utilization": math.nan,
    "block_size": 24,
    "enable_prefix_caching": "yes",
    "enable_chunked_prefill": 1,
    "scheduling_policy": "lifo",
    "load_format": "pickle",
    "kernels": "fastest",
    "attention_backend": "decode,FLASH_ATTN",
    "seed": "abc",
    "max_logprobs": -1,
    "speculative_config": {"method": "none"},
    "tokenizer": 5,
    "enforce_eager": None,
}


@pytest.mark.parametrize("name", BAD_SETTINGS)
def test_settings_that_cannot_be(tiny: Path, name: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        LLM(tiny, **{name: BAD_SETTINGS[name]})
    assert caught.value.parameter == name


def test_settings_beyond_this_model_or_machine(tiny: Path) -> None:
    for settings, parameter in (
        ({"max_model_len": 257}, "max_model_len"),
        ({"device": "cuda:99"}, "device"),
        ({"enable_chunked_prefill": False, "max_num_batched_tokens": 8}, "max_num_batched_tokens"),
        ({"kv_cache": False, "enable_prefix_caching": True}, "enable_prefix_caching"),
        ({"batch_invariant": True}, "batch_invariant"),
    ):
        with pytest.raises(InvalidArgument) as caught:
            LLM(tiny, kernels="reference", **settings)
        assert caught.value.parameter == parameter


def test_the_cpu_kernels_are_batch_invariant_as_asked(tiny: Path) -> None:
    with LLM(tiny, batch_invariant=True) as llm:
        assert {row.kernel for row in llm.built.table.rows if row.op == "linear"} == {"cpu"}


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"attention_backend": "blocked"}, "blocked: is not batch-invariant"),
        ({"dtype": "float16"}, "cpu: "),
        ({"kernels": "reference"}, "reference: is not batch-invariant"),
    ],
    ids=str,
)
def test_what_is_not_batch_invariant_is_named(tiny: Path, settings: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidArgument, match=named) as caught:
        LLM(tiny, batch_invariant=True, **settings)
    assert caught.value.parameter == "batch_invariant"


def test_an_unknown_setting_names_the_nearest(tiny: Path) -> None:
    with pytest.raises(InvalidArgument, match="did you mean max_model_len") as caught:
        LLM(tiny, max_modellen=5)
    assert caught.value.parameter == "max_modellen"


# Checkpoints


def copy(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "copy"))


def refused(directory: Path | str, kind: type[RidgelineError], message: str) -> None:
    with pytest.raises(kind, match=message) as caught:
        LLM(directory, kernels="reference")
    assert type(caught.value) is kind


def test_no_such_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(tmp_path / "nothing here", CheckpointError, "no such directory")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    refused(str(tmp_path / "a"), CheckpointError, "no such directory")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", CheckpointError, "config.json")
    (tmp_path / "weights.bin").write_bytes(b"x")
    refused(tmp_path / "weights.bin", CheckpointError, "not a checkpoint")


def test_a_truncated_file(tiny: Path, tmp_path: Path) -> None:
    broken = copy(tiny, tmp_path)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    refused(broken, CheckpointError, "damaged or truncated")
    weights.write_bytes(b"")
    refused(broken, CheckpointError, "damaged or truncated")
    weights.unlink()
    refused(broken, CheckpointError, "no safetensors files")
    (broken / "pytorch_model.bin").write_bytes(b"x")
    refused(broken, UnsupportedModel, "safetensors")


def test_wrong_shapes_and_names(checkpoint: Callable[..., Path]) -> None:
    wrong = checkpoint()
    config = json.loads((wrong / "config.json").read_text())
    (wrong / "config.json").write_text(json.dumps({**config, "intermediate_size": 128, "num_hidden_layers": 3}))
    refused(wrong, CheckpointError, r"missing: model\.layers\.2.*of the wrong shape: model\.layers\.0")
    (wrong / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    refused(wrong, CheckpointError, "unexpected: model.layers.1")
    (wrong / "config.json").write_text(json.dumps({**config, "hidden_size": -5}))
    refused(wrong, CheckpointError, "hidden_size")
    (wrong / "config.json").write_text("{")
    refused(wrong, CheckpointError, "config.json")
    (wrong / "config.json").write_text(json.dumps({**config, "architectures": ["Elephant"]}))
    refused(wrong, UnsupportedModel, "Elephant")


def test_a_missing_shard(tiny: Path, tmp_path: Path) -> None:
    broken = copy(tiny, tmp_path)
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (broken / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(broken, CheckpointError, "model-00001-of-00002")


def test_damaged_side_files(tiny: Path, tmp_path: Path) -> None:
    broken = copy(tiny, tmp_path)
    generation = broken / "generation_config.json"
    for text, message in (
        ("[1]", "JSON object"),
        ("{", "not valid JSON"),
        ('{"temperature": -1}', "generation_config.json: temperature"),
        ('{"eos_token_id": "x"}', "eos_token_id"),
    ):
        generation.write_text(text)
        refused(broken, CheckpointError, message)
    generation.unlink()
    (broken / "tokenizer.json").write_text("{")
    refused(broken, CheckpointError, "tokenizer.json")


def test_weights_that_are_no_numbers(tiny: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    broken = copy(tiny, tmp_path)
    tensors = load_file(str(broken / "model.safetensors"))
    tensors["model.norm.weight"][0] = math.nan
    save_file(tensors, str(broken / "model.safetensors"))
    with LLM(broken, kernels="reference") as llm:
        for params in (SHORT, SamplingParams(max_tokens=2, seed=1), SamplingParams(max_tokens=2, logprobs=2)):
            with pytest.raises(CheckpointError, match="not numbers"):
                llm.generate(["a", "b"], params, use_tqdm=False)
            assert_empty(llm)


def test_ids_of_the_checkpoint_that_the_model_lacks(checkpoint: Callable[..., Path]) -> None:
    """A tokenizer, a bad word or an end of sequence beyond the embedding must not reach the model."""
    small = checkpoint(vocab_size=200)
    (small / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 250]}))
    with LLM(small, kernels="reference") as llm:
        assert llm.intake.eos_ids == {1}
        assert llm.tokenizer is not None
        beyond = next(token for token in range(200, 256) if llm.tokenizer.token_text(token).isprintable())
        text = llm.tokenizer.token_text(beyond)
        params = SamplingParams(max_tokens=3, min_tokens=2, bad_words=[text] if text.strip() else None)
        assert llm.generate([[3, 4]], params, use_tqdm=False)[0].outputs[0].finish_reason
        with pytest.raises(InvalidArgument, match="outside \\[0, 199\\]"):
            llm.generate(llm.tokenizer.decode([beyond]) * 3, SHORT, use_tqdm=False)


def test_without_a_tokenizer_only_ids_go(tiny: Path, tmp_path: Path) -> None:
    bare = copy(tiny, tmp_path)
    (bare / "tokenizer.json").unlink()
    (bare / "tokenizer_config.json").unlink()
    with LLM(bare, kernels="reference") as llm:
        output = llm.generate([[3, 4]], SHORT, use_tqdm=False)[0]
        assert output.outputs[0].text == ""
        assert len(output.outputs[0].token_ids) == 2
        for prompt, params, parameter in (
            ("text", SHORT, "prompt"),
            ([3], SamplingParams(stop="x"), "stop"),
            ([3], SamplingParams(bad_words=["x"]), "bad_words"),
        ):
            with pytest.raises(InvalidArgument) as caught:
                llm.generate([prompt], params, use_tqdm=False)
            assert caught.value.parameter == parameter
        with pytest.raises(InvalidArgument, match="no chat template"):
            llm.chat([{"role": "user", "content": "x"}])
        assert_empty(llm)


def test_a_bare_config_runs_with_dummy_weights(tiny: Path) -> None:
    refused(tiny / "config.json", UnsupportedModel, "dummy")
    with LLM(tiny / "config.json", kernels="reference", load_format="dummy", tokenizer=str(tiny)) as llm:
        assert len(llm.generate("hello", SHORT, use_tqdm=False)[0].outputs[0].token_ids) <= 2


# Memory


def test_a_pool_too_small_for_one_request(tiny: Path) -> None:
    with pytest.raises(DoesNotFit, match="lower max_model_len"):
        LLM(tiny, kernels="reference", kv_cache_memory_bytes=1 << 12)


def test_a_pool_larger_than_the_machine(tiny: Path) -> None:
    with pytest.raises(DoesNotFit, match="has room for"):
        LLM(tiny, kernels="reference", kv_cache_memory_bytes=1 << 45)


def test_weights_larger_than_the_machine(tiny: Path, tmp_path: Path) -> None:
    config = json.loads((tiny / "config.json").read_text())
    huge = {**config, "hidden_size": 16384, "intermediate_size": 1 << 20, "num_hidden_layers": 200}
    (tmp_path / "config.json").write_text(json.dumps(huge))
    with pytest.raises(DoesNotFit, match=r"the weights take .* GB"):
        LLM(tmp_path / "config.json", load_format="dummy", kernels="reference", dtype="float32")
