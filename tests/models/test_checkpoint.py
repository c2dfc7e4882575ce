"""Loading: what is wrong is named in one error, what is right is loaded whatever the layout of its files."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import Made, assert_greedy, old_spelling, prompts, reference_logits
from forward import sequence_logits
from safetensors.torch import load_file, save_file

from ridgeline import LLM, SamplingParams
from ridgeline.core.errors import CheckpointError, InvalidArgument, RidgelineError, UnsupportedModel
from ridgeline.models import Decoder, build_model, parse_config
from ridgeline.models.spec import read_config
from ridgeline.models.weights import load_checkpoint

Checkpoint = Callable[[str], Made]
GREEDY = SamplingParams(temperature=0, max_tokens=64)


@pytest.fixture
def copy(checkpoint: Checkpoint, tmp_path: Path) -> Path:
    """A directory of its own with the llama checkpoint."""
    return Path(shutil.copytree(checkpoint("llama").directory, tmp_path / "model"))


def loaded(directory: Path, dtype: torch.dtype = torch.float32) -> Decoder:
    model = build_model(parse_config(read_config(directory)), torch.device("cpu"), dtype, 256)
    load_checkpoint(model.store, directory)
    return model


def llm_of(directory: Path | str, **settings: Any) -> LLM:
    settings = {"dtype": "float32", "kv_cache_memory_bytes": 4 << 20, **settings}
    return LLM(directory, device="cpu", kernels="reference", **settings)


def edit(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> dict[str, torch.Tensor]:
    """Change the tensors of a checkpoint's one file; returns them."""
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return tensors


def shard(directory: Path, shards: int = 3) -> list[str]:
    """Cut a checkpoint into several files with an index; returns their names."""
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    names = [f"model-{number + 1:05}-of-{shards:05}.safetensors" for number in range(shards)]
    where = {name: names[place % shards] for place, name in enumerate(tensors)}
    for file in names:
        save_file({name: tensors[name] for name in tensors if where[name] == file}, directory / file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return names


def test_all_that_does_not_fit_is_named_at_once(copy: Path) -> None:
    """Missing, unexpected and misshapen tensors, a dozen of them, each by name, in one error."""
    gone = [f"model.layers.{layer}.{name}.weight" for layer in (0, 1) for name in ("mlp.up_proj", "self_attn.k_proj")]
    strange = [f"model.layers.{layer}.self_attn.q_norm.weight" for layer in (0, 1)] + ["score.weight"]

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in gone:
            del tensors[name]
        for name in strange:
            tensors[name] = torch.zeros(3)
        tensors["model.norm.weight"] = torch.zeros(65)
        tensors["lm_head.weight"] = torch.zeros(160, 32)

    edit(copy, change)
    with pytest.raises(CheckpointError) as refusal:
        loaded(copy)
    message = str(refusal.value)
    for name in (*gone, *strange, "model.norm.weight", "lm_head.weight", str(copy)):
        assert name in message
    for words in ("4 tensors missing", "3 tensors unexpected", "2 tensors of the wrong shape", "[160, 32]", "[65]"):
        assert words in message


def test_every_missing_tensor_is_named(copy: Path) -> None:
    names = set(edit(copy, lambda tensors: [tensors.pop(name) for name in list(tensors) if "layers" in name]))
    with pytest.raises(CheckpointError) as refusal:
        loaded(copy)
    model = build_model(parse_config(read_config(copy)), torch.device("meta"), torch.float32, 1)
    lost = set(model.store.places) - names
    assert len(lost) == 18
    assert all(name in str(refusal.value) for name in lost)


def test_buffers_of_old_checkpoints_are_passed_over(copy: Path) -> None:
    """Rotary tables that Transformers once saved are no parameters."""
    edit(copy, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)}))
    loaded(copy)


def test_tied_embeddings_may_be_saved_twice(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """A tied head in the file is not read: the embedding serves, as in Transformers."""
    made = checkpoint("llama-tied")
    copy = Path(shutil.copytree(made.directory, tmp_path / "model"))
    assert "lm_head.weight" not in load_file(copy / "model.safetensors")
    assert loaded(copy).store.parameters == sum(p.numel() for p in made.reference.parameters())
    edit(copy, lambda tensors: tensors.update({"lm_head.weight": torch.zeros(160, 64)}))
    with llm_of(copy) as llm:
        tokens = prompts((9,))
        have = sequence_logits(llm.built.runner, tokens)[0]
    assert float((reference_logits(made.reference, tokens[0]) - have).abs().max()) < 1e-4


@pytest.mark.parametrize("keep", [0, 5, 200, -1000])
def test_truncated_file(copy: Path, keep: int) -> None:
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: damaged or truncated"):
        loaded(copy)


def test_shards(copy: Path, checkpoint: Checkpoint) -> None:
    """By their index, which also keeps other files out; without it, whatever is there."""
    whole = loaded(checkpoint("llama").directory)
    names = shard(copy)
    save_file({"stray": torch.zeros(1)}, copy / "consolidated.safetensors")
    for index in (True, False):
        if not index:
            (copy / "model.safetensors.index.json").unlink()
            (copy / "consolidated.safetensors").unlink()
        sharded = loaded(copy)
        assert all(torch.equal(place, whole.store.places[name]) for name, place in sharded.store.places.items())
    (copy / names[1]).unlink()
    with pytest.raises(CheckpointError, match="tensors missing: "):
        loaded(copy)


def test_index_names_files_that_are_not_there(copy: Path) -> None:
    names = shard(copy)
    for name in names[1:]:
        (copy / name).unlink()
    with pytest.raises(CheckpointError) as refusal:
        loaded(copy)
    assert names[1] in str(refusal.value)
    assert names[2] in str(refusal.value)
    assert names[0] not in str(refusal.value)


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": 3}', "{}"])
def test_broken_index(copy: Path, text: str) -> None:
    shard(copy)
    (copy / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"index\.json: not a valid index"):
        loaded(copy)


def test_a_tensor_in_two_files(copy: Path) -> None:
    names = shard(copy)
    tensors = load_file(copy / names[0])
    double = next(iter(tensors))
    save_file({**load_file(copy / names[1]), double: tensors[double]}, copy / names[1])
    with pytest.raises(CheckpointError, match=f"{double} is in {names[0]} as well"):
        loaded(copy)


def test_the_same_weights_under_another_layout_are_left_alone(copy: Path) -> None:
    """Some repositories hold consolidated.safetensors beside model.safetensors."""
    save_file({"tok_embeddings.weight": torch.zeros(4)}, copy / "consolidated.safetensors")
    loaded(copy)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "model.gguf"])
def test_other_weights_are_refused(copy: Path, name: str) -> None:
    (copy / "model.safetensors").rename(copy / name)
    with pytest.raises(UnsupportedModel) as refusal:
        llm_of(copy)
    assert name in str(refusal.value)
    assert "safetensors" in str(refusal.value)


def test_no_weights(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no safetensors files.*load_format='dummy'"):
        llm_of(copy)


@pytest.mark.parametrize("text", ["", "{", "[1]", '"llama"', "\x00"])
def test_config_that_is_no_json_object(copy: Path, text: str) -> None:
    (copy / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        llm_of(copy)


def test_no_config(copy: Path) -> None:
    (copy / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json: no such file"):
        llm_of(copy)


def test_unsupported_architecture(copy: Path) -> None:
    (copy / "config.json").write_text(json.dumps({**read_config(copy), "architectures": ["GPT2LMHeadModel"]}))
    with pytest.raises(UnsupportedModel, match=r"GPT2LMHeadModel.*LlamaForCausalLM.*OPTForCausalLM"):
        llm_of(copy)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16])
def test_conversion_on_loading(copy: Path, stored: torch.dtype, wanted: torch.dtype) -> None:
    """Whatever the file holds becomes the target dtype, rounded as torch rounds."""
    tensors = edit(copy, lambda tensors: tensors.update({name: t.to(stored) for name, t in tensors.items()}))
    model = loaded(copy, wanted)
    for name, place in model.store.places.items():
        assert place.dtype == wanted
        assert torch.equal(place, tensors[name].to(wanted)), name


def test_loading_reports_progress(copy: Path) -> None:
    model = build_model(parse_config(read_config(copy)), torch.device("cpu"), torch.float32, 1)
    seen: list[tuple[int, int]] = []
    load_checkpoint(model.store, copy, lambda done, total: seen.append((done, total)))
    assert seen == [(number + 1, len(model.store.places)) for number in range(len(model.store.places))]


def test_both_spellings_run(copy: Path, checkpoint: Checkpoint) -> None:
    (copy / "config.json").write_text(json.dumps(old_spelling(copy)))
    prompt = prompts((9,))[0]
    with llm_of(copy) as llm:
        output = llm.generate([prompt], GREEDY, use_tqdm=False)[0]
    assert_greedy(checkpoint("llama").reference, prompt, output.outputs[0].token_ids)


def test_without_a_tokenizer(copy: Path) -> None:
    """Ids go in and come out; text is refused with a way out."""
    with llm_of(copy) as llm:
        assert llm.tokenizer is None
        output = llm.generate([{"prompt_token_ids": [1, 2, 3]}], GREEDY, use_tqdm=False)[0]
        assert len(output.outputs[0].token_ids) == 64
        assert output.outputs[0].text == ""
        with pytest.raises(InvalidArgument, match=r"no tokenizer files.*prompt_token_ids"):
            llm.generate(["Hello"], GREEDY, use_tqdm=False)


def test_bare_config(copy: Path, tmp_path: Path) -> None:
    """A config.json alone runs with dummy weights, the same for the same seed, and is refused without them."""
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(copy / "config.json", bare)
    outputs = []
    for model, seed in ((bare / "config.json", 0), (bare, 0), (bare, 1)):
        with llm_of(model, load_format="dummy", seed=seed) as llm:
            outputs.append(llm.generate([[1, 2, 3]], GREEDY, use_tqdm=False)[0].outputs[0].token_ids)
    assert outputs[0] == outputs[1] != outputs[2]
    for model in (bare, bare / "config.json"):
        with pytest.raises(RidgelineError, match="dummy"):
            llm_of(model)


def test_generation_config(copy: Path) -> None:
    """Its end tokens end the output, its sampling settings are the defaults."""
    prompt = prompts((9,))[0]
    with llm_of(copy) as llm:
        free = llm.generate([prompt], GREEDY, use_tqdm=False)[0].outputs[0].token_ids
    stop = free[20]
    values = {"eos_token_id": [stop, 159], "temperature": 0.5, "top_k": 7, "top_p": 0.9, "do_sample": True}
    (copy / "generation_config.json").write_text(json.dumps(values))
    with llm_of(copy) as llm:
        output = llm.generate([prompt], GREEDY, use_tqdm=False)[0].outputs[0]
        assert output.token_ids == free[: free.index(stop) + 1]
        assert output.finish_reason == "stop"
        defaults = llm.get_default_sampling_params()
        assert (defaults.temperature, defaults.top_k, defaults.top_p) == (0.5, 7, 0.9)
    (copy / "generation_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"generation_config\.json: not valid JSON"):
        llm_of(copy)


def test_a_path_that_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such directory"):
        llm_of(tmp_path / "nothing here")
    (tmp_path / "something here").mkdir()
    with pytest.raises(CheckpointError, match=r"did you mean .*/something here\?"):
        llm_of(tmp_path / "somethin here")
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="give its directory"):
        llm_of(tmp_path / "model.safetensors")


HUB = """
import json, sys
from ridgeline.core.errors import CheckpointError
from ridgeline.models.checkpoint import locate
for model, revision in json.loads(sys.argv[1]):
    try:
        print(locate(model, revision))
    except CheckpointError as error:
        print("refused:", error)
"""


def hub(home: Path, *asked: tuple[str, str | None]) -> list[str]:
    """What `locate` says in a process of its own, offline, with the hub's cache in `home`."""
    environment = {**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "TRANSFORMERS_CACHE"):
        environment.pop(name, None)
    command = [sys.executable, "-c", HUB, json.dumps(asked)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()


def test_hub_offline(copy: Path, tmp_path: Path) -> None:
    """An id whose snapshot lies in the hub's cache is found without a network; another is refused clearly."""
    home, commit = tmp_path / "home", "0123456789abcdef0123456789abcdef01234567"
    repository = home / "hub" / "models--someone--tiny"
    shutil.copytree(copy, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    found, unknown, other = hub(home, ("someone/tiny", None), ("someone/else", None), ("someone/tiny", "v2"))
    assert Path(found) == repository / "snapshots" / commit
    loaded(Path(found))
    assert "someone/else: no such directory, not in the hub's cache" in unknown
    assert "HF_HUB_OFFLINE" in unknown
    assert "not in the hub's cache" in other
