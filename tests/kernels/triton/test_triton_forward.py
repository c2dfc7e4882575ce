"""A whole model's steps on Triton kernels: against the references, and against themselves in other company."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from triton_checks import plain_product

from ridgeline.core.request import SamplingParams
from ridgeline.core.step import Chunk, Sampling, StepPlan
from ridgeline.kernels.select import Choice, Table, load_kernels
from ridgeline.kernels.triton import attention as attention_kernels
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


def chosen(way: str, learned_positions: bool) -> dict[str, Callable[..., Any]]:
    """The calls that serve on a GPU: as they come, or batch-invariant."""
    load_kernels("cuda")
    kernels = {}
    for name, op in REGISTRY.items():
        kernel = op.kernels.get("triton") or op.kernels.get("torch")
        if name == "embed" and not learned_positions:
            kernel = op.kernels["torch"]
        assert kernel is not None, f"nothing serves {name} on a GPU"
        kernels[name] = getattr(kernel, way)
    return kernels


@pytest.mark.parametrize("config", [LLAMA, MIXTURE, OPT], ids=["dense", "mixture", "opt"])
def test_steps_agree_with_the_references(config: dict[str, object]) -> None:
    spec = parse_config(config)
    model = build_model(spec, torch.device("cpu"), torch.float32, 128)
    model.store.fill_random(1)
    ours, theirs = (runner(model, ops) for ops in (Ops(chosen("call", config is OPT)), Ops({})))
    for number, chunks in enumerate(STEPS):
        got, wanted = (one.run(StepPlan(number, chunks)).sampled for one in (ours, theirs))
        assert {name: one.token for name, one in got.items()} == {name: one.token for name, one in wanted.items()}
    for mine, reference in zip(ours.pages.keys + ours.pages.values, theirs.pages.keys + theirs.pages.values):
        torch.testing.assert_close(mine, reference, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("config", [LLAMA, MIXTURE, OPT], ids=["dense", "mixture", "opt"])
def test_company_and_chunks_change_no_bit(config: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Batch-invariant: one request alone, its prompt in chunks, and among others, its prompt whole."""
    monkeypatch.setattr(np, "matmul", plain_product)
    monkeypatch.setattr(attention_kernels, "SPLIT_KEYS", 16)
    spec = parse_config(config)
    model = build_model(spec, torch.device("cpu"), torch.float32, 128)
    model.store.fill_random(1)
    prompt, token = list(range(21)), 9
    alone, among = (runner(model, Ops(chosen("invariant", config is OPT))) for _ in range(2))
    whole = Chunk("a", prompt, 0, [3, 1], sampling(21, 1.0))
    others = [Chunk(str(n), list(range(40 + n, 43 + 3 * n)), 0, [block], None) for n, block in enumerate((0, 2, 4))]
    decode = Chunk("a", [token], 21, [3, 1], sampling(22, 1.0))
    beside = [Chunk(str(n), [n], 3 + 2 * n, [block], sampling(4 + 2 * n, 0.0)) for n, block in enumerate((0, 2, 4))]
    for number, chunk in enumerate((Chunk("a", prompt[:1], 0, [3, 1], None), Chunk("a", prompt[1:8], 1, [3, 1], None))):
        alone.run(StepPlan(number, (chunk,)))
    last = Chunk("a", prompt[8:], 8, [3, 1], sampling(21, 1.0))
    pairs = [
        (alone.run(StepPlan(2, (last,))), among.run(StepPlan(2, (*others, whole)))),
        (alone.run(StepPlan(3, (decode,))), among.run(StepPlan(3, (beside[0], decode, *beside[1:])))),
    ]
    for mine, its in pairs:
        assert mine.sampled["a"].token == its.sampled["a"].token
    for mine, its in zip(alone.pages.keys + alone.pages.values, among.pages.keys + among.pages.values):
        assert torch.equal(mine[3], its[3])
        assert torch.equal(mine[1, :, :6], its[1, :, :6])
        assert mine[1, :, :6].any()


def runner(model: object, ops: Ops) -> Runner:
    spec = model.spec  # type: ignore[attr-defined]
    layout = KVLayout(spec.layers, spec.kv_heads, spec.head_dim, 4, BLOCK)
    table = Table((Choice("all", "all", "as given", "asked for"),), dict.fromkeys(("decode", "prefill", "mixed"), ops))
    device = torch.device("cpu")
    return Runner(model, Pages(layout, 6, device, torch.float32), table, device, BLOCK)  # type: ignore[arg-type]
