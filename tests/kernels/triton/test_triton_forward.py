"""A whole model's steps on Triton kernels against the references: prefill, decode and mixed."""

from __future__ import annotations

import pytest
import torch

from ridgeline.core.request import SamplingParams
from ridgeline.core.step import Chunk, Sampling, StepPlan
from ridgeline.kernels.select import Choice, Table, load_kernels
from ridgeline.kv.layout import KVLayout
from ridgeline.kv.pages import Pages
from ridgeline.models import build_model, parse_config
from ridgeline.ops import REGISTRY, Ops
from ridgeline.run.runner import Runner

pytestmark = pytest.mark.interpret
LLAMA = {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
}
MIXTURE = {**LLAMA, "architectures": ["MixtralForCausalLM"], "num_local_experts": 4, "num_experts_per_tok": 2}
OPT = {
    "architectures": ["OPTForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 64,
    "ffn_dim": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
BLOCK = 16


def sampling(position: int, temperature: float) -> Sampling:
    return Sampling(SamplingParams(temperature=temperature), 7, position, [0], 1)


STEPS = (
    (
        Chunk("a", list(range(20)), 0, [3, 1], sampling(20, 0.0)),
        Chunk("b", list(range(5, 12)), 0, [0], sampling(7, 1.0)),
    ),
    (Chunk("a", [9], 20, [3, 1], sampling(21, 0.0)), Chunk("b", [8], 7, [0], sampling(8, 1.0))),
    (Chunk("a", [4], 21, [3, 1], sampling(22, 0.7)), Chunk("c", list(range(30, 48)), 0, [2, 4], None)),
)


@pytest.mark.parametrize("config", [LLAMA, MIXTURE, OPT], ids=["dense", "mixture", "opt"])
def test_steps_agree_with_the_references(config: dict[str, object]) -> None:
    spec = parse_config(config)
    model = build_model(spec, torch.device("cpu"), torch.float32, 128)
    model.store.fill_random(1)
    load_kernels("cuda")
    kernels = {}
    for name, op in REGISTRY.items():
        chosen = op.kernels.get("triton") or op.kernels.get("torch")
        assert chosen is not None, f"nothing serves {name} on a GPU"
        kernels[name] = chosen.call
    ours, theirs = (runner(model, ops) for ops in (Ops(kernels), Ops({})))
    for number, chunks in enumerate(STEPS):
        got, wanted = (one.run(StepPlan(number, chunks)).sampled for one in (ours, theirs))
        assert {name: one.token for name, one in got.items()} == {name: one.token for name, one in wanted.items()}
    for mine, reference in zip(ours.pages.keys + ours.pages.values, theirs.pages.keys + theirs.pages.values):
        torch.testing.assert_close(mine, reference, atol=1e-4, rtol=1e-4)


def runner(model: object, ops: Ops) -> Runner:
    spec = model.spec  # type: ignore[attr-defined]
    layout = KVLayout(spec.layers, spec.kv_heads, spec.head_dim, 4, BLOCK)
    table = Table((Choice("all", "all", "as given", "asked for"),), dict.fromkeys(("decode", "prefill", "mixed"), ops))
    device = torch.device("cpu")
    return Runner(model, Pages(layout, 6, device, torch.float32), table, device, BLOCK)  # type: ignore[arg-type]
