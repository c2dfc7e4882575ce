"""A whole model's steps on Triton kernels: against the references, and against themselves in other company."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from triton_checks import plain_product

from ridgeline.core.request import SamplingParams
from ridgeline.core.step import Chunk, Sampling, StepPlan, StepResult
from ridgeline.core.tree import ROOT, TokenTree
from ridgeline.kernels.select import CLASSES_OF_WORK, Choice, Table, load_kernels
from ridgeline.kernels.triton import attention as attention_kernels
from ridgeline.kv.layout import KVLayout
from ridgeline.kv.pages import Pages
from ridgeline.models import build_model, parse_config
from ridgeline.ops import REGISTRY, Ops
from ridgeline.run.graphs import DecodeGraphs, PassGraphs
from ridgeline.run.places import PassSize
from ridgeline.run.prompts import PromptGraphs
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


def chosen(way: str) -> dict[str, Callable[..., Any]]:
    """The calls that serve on a GPU: as they come, or batch-invariant."""
    load_kernels("cuda")
    kernels = {}
    for name, op in REGISTRY.items():
        kernel = op.kernels.get("triton") or op.kernels.get("torch")
        assert kernel is not None, f"nothing serves {name} on a GPU"
        kernels[name] = getattr(kernel, way)
    return kernels


@pytest.mark.parametrize("config", [LLAMA, MIXTURE, OPT], ids=["dense", "mixture", "opt"])
def test_steps_agree_with_the_references(config: dict[str, object]) -> None:
    """Op by op, and padded to a fixed size as captured steps are."""
    spec = parse_config(config)
    model = build_model(spec, torch.device("cpu"), torch.float32, 128)
    model.store.fill_random(1)
    kernels = Ops(chosen("call"))
    ours, padded, theirs = (runner(model, ops) for ops in (kernels, kernels, Ops({})))
    places: tuple[Any, ...] = (model, padded.pages, kernels, padded.device, BLOCK)
    padded.graphs = DecodeGraphs(*places, (1, 3), 3)
    padded.prompts = PromptGraphs(*places, [PassSize(40, 3)], 3, padded.graphs.sampled)
    for number, chunks in enumerate(STEPS):
        got, *others = (one.run(StepPlan(number, chunks)) for one in (theirs, ours, padded))
        for other in others:
            assert tokens(other) == tokens(got)
        rows = sum(chunk.new for chunk in chunks)
        assert [one.padding for one in others] == [0, (3 if rows == len(chunks) else 40) - rows]
    for one in (ours, padded):
        for mine, reference in zip(one.pages.keys + one.pages.values, theirs.pages.keys + theirs.pages.values):
            torch.testing.assert_close(mine, reference, atol=1e-4, rtol=1e-4)


def tokens(result: StepResult) -> dict[str, int]:
    return {name: one.token for name, one in result.sampled.items()}


@pytest.mark.parametrize("config", [LLAMA, MIXTURE, OPT], ids=["dense", "mixture", "opt"])
def test_company_and_chunks_change_no_bit(config: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Batch-invariant: one request alone, its prompt in chunks, and among others, its prompt whole."""
    monkeypatch.setattr(np, "matmul", plain_product)
    monkeypatch.setattr(attention_kernels, "SPLIT_KEYS", 16)
    spec = parse_config(config)
    model = build_model(spec, torch.device("cpu"), torch.float32, 128)
    model.store.fill_random(1)
    prompt, token = list(range(21)), 9
    alone, among = (runner(model, Ops(chosen("invariant"))) for _ in range(2))
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


def verified(name: str, token: int, start: int, blocks: list[int], tree: TokenTree | None, heat: float) -> Chunk:
    behind = [sampling(start + 1 + depth, heat) for depth in (() if tree is None else tree.depths)]
    return Chunk(name, [token], start, blocks, sampling(start + 1, heat), tree=tree, behind=behind)


@pytest.mark.parametrize("config", [LLAMA, MIXTURE, OPT], ids=["dense", "mixture", "opt"])
def test_tree_steps_agree_with_the_references(config: dict[str, object]) -> None:
    """Op by op, and padded to a fixed size as captured steps are: what is accepted, and where its keys lie then."""
    spec = parse_config(config)
    model = build_model(spec, torch.device("cpu"), torch.float32, 128)
    model.store.fill_random(1)
    ours = Ops(chosen("call"))
    triton, padded, theirs = (runner(model, ops) for ops in (ours, ours, Ops({})))
    size = PassSize(12, 3)
    padded.passes = PassGraphs(model, padded.pages, padded.table.ops("tree"), padded.device, BLOCK, [size], 3)
    for one in (triton, padded, theirs):
        one.run(StepPlan(0, STEPS[0]))
    # What will be chosen, so that the trees hold it behind a node that will not be.
    ahead = runner(model, Ops({}))
    ahead.run(StepPlan(0, STEPS[0]))
    right, start = [9], 20
    for turn in range(3):
        one = ahead.run(StepPlan(1 + turn, (Chunk("a", right[-1:], start + turn, [3, 1], sampling(21 + turn, 0.0)),)))
        right.append(one.sampled["a"].token)
    wrong = (right[1] + 1) % 100
    tree = TokenTree((wrong, right[2], right[1], right[2], 99 - right[2] // 2), (ROOT, 0, ROOT, 2, 2))
    step = StepPlan(
        1, (verified("a", 9, 20, [3, 1], tree, 0.0), verified("b", 8, 7, [0], TokenTree.chain((5, 6)), 1.0))
    )
    found = [one.run(step) for one in (triton, padded, theirs)]
    for result in found:
        assert list(result.accepted["a"].nodes) == [2, 3]
        assert [one.token for one in result.accepted["a"].tokens] == right[1:]
        assert [one.token for one in result.accepted["b"].tokens] == [
            one.token for one in found[-1].accepted["b"].tokens
        ]
    assert [result.padding for result in found] == [0, 12 - step.num_tokens, 0]
    for one in (triton, padded):
        for mine, reference in zip(one.pages.keys + one.pages.values, theirs.pages.keys + theirs.pages.values):
            torch.testing.assert_close(mine, reference, atol=1e-4, rtol=1e-4)


def runner(model: object, ops: Ops) -> Runner:
    spec = model.spec  # type: ignore[attr-defined]
    layout = KVLayout(spec.layers, spec.kv_heads, spec.head_dim, 4, BLOCK)
    table = Table((Choice("all", "all", "as given", "asked for"),), dict.fromkeys((*CLASSES_OF_WORK, "tree"), ops))
    device = torch.device("cpu")
    return Runner(model, Pages(layout, 6, device, torch.float32), table, device, BLOCK)  # type: ignore[arg-type]
