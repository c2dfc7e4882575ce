"""Widening keeps the function: fp32 logits within 1e-5, added ids never chosen, whatever is widened."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.models import random_checkpoint
from benchmarks.widen import Shape, load, main, widening, write_checkpoint
from ridgeline import LLM, SamplingParams

TINY = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 128,
}
WIDE = Shape(hidden=96, heads=16, kv_heads=4, intermediate=112, layers=5, vocabulary=420)
SHAPES = {
    "everything": WIDE,
    "only the hidden size": Shape(64, 4, 1, 48, 2, 300),
    "larger groups": Shape(64, 8, 1, 48, 2, 300),
    "smaller groups repeat key-value heads": Shape(64, 8, 4, 64, 3, 310),
    "groups that do not divide": Shape(72, 9, 3, 64, 2, 300),
}


@pytest.fixture(scope="module")
def original() -> Path:
    return random_checkpoint(TINY, torch.float32, seed=3)


def logits(folder: Path, ids: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()
    with torch.inference_mode():
        return model(ids).logits


@pytest.mark.parametrize("name", SHAPES)
def test_logits_are_the_original_ones(original: Path, tmp_path: Path, name: str) -> None:
    write_checkpoint(original, tmp_path, SHAPES[name], torch.float32)
    ids = torch.randint(TINY["vocab_size"], (3, 40), generator=torch.Generator().manual_seed(0))
    narrow, wide = logits(original, ids), logits(tmp_path, ids)
    assert narrow.std() > 0.1
    assert (wide[..., : TINY["vocab_size"]] - narrow).abs().max() < 1e-5
    assert torch.equal(wide.argmax(-1), narrow.argmax(-1))
    if SHAPES[name].vocabulary > TINY["vocab_size"]:
        assert wide[..., TINY["vocab_size"] :].max() < narrow.min() - 1000
        assert torch.all(wide.softmax(-1)[..., TINY["vocab_size"] :] == 0)


def test_the_function_is_the_same_and_not_only_near(original: Path, tmp_path: Path) -> None:
    """In fp64 only the norms' rounding is left (Transformers keeps them in fp32): what fp32 shows is its own error."""
    write_checkpoint(original, tmp_path, Shape(128, 8, 2, 64, 3, 310), torch.float32)
    ids = torch.randint(TINY["vocab_size"], (2, 30), generator=torch.Generator().manual_seed(1))
    narrow, wide = (logits(folder, ids, torch.float64) for folder in (original, tmp_path))
    assert (wide[..., : TINY["vocab_size"]] - narrow).abs().max() < 2e-7


def test_padding_is_random_where_it_may_be(original: Path) -> None:
    """Zeros only where the residual stream would be touched: embedding, o_proj, down_proj, and the mask's column."""
    plan = widening(original, WIDE)
    generator = torch.Generator().manual_seed(0)
    zeros = total = 0
    for name, size in plan.shapes():
        tensor = torch.empty(size)
        plan.fill(name, tensor, generator)
        zeros, total = zeros + int((tensor == 0).sum()), total + tensor.numel()
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            assert torch.all(tensor[32:] == 0)
        elif name.endswith("norm.weight"):
            assert int((tensor == 0).sum()) == (name != "model.norm.weight")
        elif name == "model.embed_tokens.weight":
            assert torch.all(tensor[300:] != 0)
        elif name == "lm_head.weight":
            assert int((tensor == 0).sum()) == 300
        else:
            assert torch.all(tensor != 0), name
    assert zeros / total == pytest.approx(plan.zero_share(), abs=0.01)


def test_scale_and_epsilon_are_those_of_the_issue(original: Path) -> None:
    """256 -> 4096 means norm weights times 0.25 and eps / 16; here 32 -> 96."""
    plan = widening(original, WIDE)
    weight = torch.empty(96)
    plan.fill("model.layers.0.input_layernorm.weight", weight, torch.Generator().manual_seed(0))
    expected = plan.read("model.layers.0.input_layernorm.weight") * (32 / 96) ** 0.5
    torch.testing.assert_close(weight[:32], expected)
    assert plan.wide_config()["rms_norm_eps"] == pytest.approx(1e-5 / 3)


def test_the_engine_says_the_same_from_disk_and_in_memory(original: Path, tmp_path: Path) -> None:
    write_checkpoint(original, tmp_path, WIDE, torch.float32)
    prompts = [{"prompt_token_ids": [7 * n % 300 for n in range(1, length)]} for length in (5, 21)]
    settings = {"dtype": "float32", "device": "cpu", "kernels": "reference"}
    greedy = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    drawn = SamplingParams(temperature=2.0, seed=5, max_tokens=24, ignore_eos=True)
    said = []
    for llm in (LLM(original, **settings), LLM(tmp_path, **settings), load(WIDE, original, **settings)):
        with llm:
            outputs = [llm.generate(prompts, params, use_tqdm=False) for params in (greedy, drawn)]
            said.append([one.outputs[0].token_ids for both in outputs for one in both])
    assert said[0] == said[1] == said[2]


def test_command(original: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "wide"
    sizes = {"hidden": 64, "heads": 8, "kv-heads": 2, "intermediate": 64, "layers": 3, "vocab": 320}
    options = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    main(["--model", str(original), "--out", str(out), *options])
    assert "zero" in capsys.readouterr().out
    config = json.loads((out / "config.json").read_text())
    assert (config["hidden_size"], config["vocab_size"], config["dtype"]) == (64, 320, "bfloat16")
    assert (out / "tokenizer.json").is_file()


@pytest.mark.parametrize(
    ("shape", "named"),
    [
        (Shape(32, 4, 1, 48, 2, 300), "hidden"),
        (Shape(64, 4, 1, 48, 1, 300), "layers"),
        (Shape(64, 4, 1, 20, 2, 300), "intermediate"),
        (Shape(64, 4, 1, 48, 2, 299), "vocabulary"),
        (Shape(64, 6, 4, 48, 2, 300), "heads"),
    ],
)
def test_a_shape_that_cannot_hold_the_original_is_refused(original: Path, shape: Shape, named: str) -> None:
    with pytest.raises(ValueError, match=f"^{named}"):
        widening(original, shape)


def test_too_few_key_value_heads_are_refused() -> None:
    """Groups of four spread over groups of three take two key-value heads each: four, and three are there."""
    grouped = random_checkpoint({**TINY, "num_attention_heads": 8, "num_key_value_heads": 2}, torch.float32)
    widening(grouped, Shape(64, 12, 4, 48, 2, 300))
    with pytest.raises(ValueError, match=r"^kv_heads"):
        widening(grouped, Shape(64, 9, 3, 48, 2, 300))
