"""Captured passes over trees on a GPU: to the bit what the same passes give op by op."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch

from ridgeline import LLM
from ridgeline.core.errors import KernelRefused
from ridgeline.core.request import Request, SamplingParams
from ridgeline.core.step import Chunk, Sampling, StepPlan, StepRecord, StepResult
from ridgeline.core.tree import ROOT, Sketch, TokenTree
from ridgeline.kernels.select import CLASSES_OF_WORK, Table, load_kernels
from ridgeline.kv.layout import KVLayout
from ridgeline.kv.pages import Pages
from ridgeline.models import build_model, parse_config
from ridgeline.models.decoder import Decoder
from ridgeline.ops import REGISTRY, Ops
from ridgeline.run.beams import LATE, LOOKS, Beams, Levels
from ridgeline.run.graphs import PassGraphs, pass_sizes_up_to
from ridgeline.run.places import PassSize
from ridgeline.run.runner import Runner
from ridgeline.speculate.draft_model import DraftModel, Growth

pytestmark = pytest.mark.gpu
BLOCK, BLOCKS = 16, 8
CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 5000,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
}


def kernels(attention: str) -> Ops:
    load_kernels("cuda")
    found = {}
    for name, op in REGISTRY.items():
        wanted = attention if name == "attention" else "torch" if name == "embed" else "triton"
        kernel = op.kernels.get(wanted) or op.kernels["torch"]
        found[name] = kernel.call
    return Ops(found)


@pytest.fixture(params=[(torch.bfloat16, "decode"), (torch.bfloat16, "triton"), (torch.float32, "triton")])
def made(request: pytest.FixtureRequest) -> tuple[Decoder, Pages, Ops]:
    """A random model with a prompt of 5 + 3 n tokens in the blocks of each request n."""
    dtype, attention = request.param
    spec, device = parse_config(CONFIG), torch.device("cuda")
    model = build_model(spec, device, dtype, 128)
    model.store.fill_random(1)
    layout = KVLayout(spec.layers, spec.kv_heads, spec.head_dim, dtype.itemsize, BLOCK)
    pages, ops = Pages(layout, 20 * BLOCKS, device, dtype), kernels(attention)
    for page in (*pages.keys, *pages.values):
        page.zero_()
    prompts = [Chunk(str(n), range(1, 6 + 3 * n), 0, blocks(n), None) for n in range(20)]
    runner(model, pages, ops).run(StepPlan(0, tuple(prompts)))
    return model, pages, ops


def blocks(request: int) -> list[int]:
    return [BLOCKS * request + block for block in range(BLOCKS)]


def runner(model: Decoder, pages: Pages, ops: Ops, passes: PassGraphs | None = None) -> Runner:
    table = Table((), dict.fromkeys((*CLASSES_OF_WORK, "tree"), ops))
    return Runner(model, pages, table, torch.device("cuda"), BLOCK, passes=passes)


def graphs(model: Decoder, pages: Pages, ops: Ops, capture: bool, children: int | None = None) -> PassGraphs:
    made = PassGraphs(
        model, pages, ops, torch.device("cuda"), BLOCK, pass_sizes_up_to(20, 256), BLOCKS, children
    )  # fmt: skip
    if capture:
        made.capture()
    made.hidden.fill_(float("nan"))
    made.sampled.fill_(77)
    return made


def sampling(position: int, heat: float) -> Sampling:
    return Sampling(SamplingParams(temperature=heat), 7, position, [0], 1)


def drafted(request: int, token: int, start: int, tree: TokenTree | None, heat: float) -> Chunk:
    behind = [sampling(start + 1 + depth, heat) for depth in (() if tree is None else tree.depths)]
    return Chunk(str(request), [token], start, blocks(request), sampling(start + 1, heat), tree=tree, behind=behind)


def bushy(right: list[int], nodes: int) -> TokenTree:
    """A tree that holds a path of these tokens off its first branch."""
    sketch = Sketch()
    at = ROOT
    for depth, token in enumerate(right):
        at = sketch.add(token, at, -1.0 - depth)
    while len(sketch) < nodes:
        parent = int(torch.randint(-1, len(sketch), ()))
        score = 0.0 if parent == ROOT else sketch.scores[parent]
        sketch.add(int(torch.randint(5000, ())), parent, score)
    return sketch.tree()[0]


def tokens_of(result: StepResult) -> dict[str, object]:
    accepted = {name: (list(one.nodes), [t.token for t in one.tokens]) for name, one in result.accepted.items()}
    return {**accepted, **{name: one.token for name, one in result.sampled.items()}}


@pytest.mark.parametrize("requests", [1, 3, 18])
@pytest.mark.parametrize("heat", [0.0, 0.8])
def test_replayed_is_what_op_by_op_is(made: tuple[Decoder, Pages, Ops], requests: int, heat: float) -> None:
    """At the same sizes: hidden states, tokens, what is accepted and pages, three steps in a row, to the bit."""
    torch.manual_seed(requests)
    model, pages, ops = made
    # What will be chosen, from steps op by op on pages of their own.
    ahead = runner(model, deepcopy(pages), ops)
    right: list[list[int]] = [[9] for _ in range(requests)]
    for _ in range(12):
        chunks = tuple(drafted(n, right[n][-1], 4 + 3 * n + len(right[n]), None, heat) for n in range(requests))
        for n, one in ahead.run(StepPlan(1, chunks)).sampled.items():
            right[int(n)].append(one.token)
    twins = []
    for capture in (False, True):
        own = deepcopy(pages)
        twins.append(runner(model, own, ops, graphs(model, own, ops, capture)))
    done = [0] * requests
    most = 0
    for turn in range(3):
        chunks = []
        for n in range(requests):
            path = right[n][done[n] + 1 : done[n] + 1 + (n + turn) % 4]
            tree = None if n == 2 else bushy(path, 12 if requests < 9 else 6)
            chunks.append(drafted(n, right[n][done[n]], 5 + 3 * n + done[n], tree, heat))
        found = [one.run(StepPlan(2 + turn, tuple(chunks))) for one in twins]
        assert tokens_of(found[0]) == tokens_of(found[1])
        first, second = (one.passes for one in twins)
        assert first is not None
        assert second is not None
        rows = sum(chunk.new for chunk in chunks)
        assert found[1].padding == found[0].padding > 0 or rows in {size.rows for size in second.sizes}
        assert torch.equal(first.hidden[:rows], second.hidden[:rows])
        assert not second.hidden[:rows].isnan().any()
        for mine, its in zip(
            (*twins[0].pages.keys, *twins[0].pages.values), (*twins[1].pages.keys, *twins[1].pages.values)
        ):
            assert torch.equal(mine, its)
        for n in range(requests):
            accepted = found[1].accepted.get(str(n))
            done[n] += 1 if accepted is None else len(accepted.tokens)
            most = max(most, 0 if accepted is None else len(accepted.nodes))
        done = [min(one, 8) for one in done]
    if model.store.dtype is torch.float32:  # in which a step of trees chooses as one of single tokens does
        assert most > 1


def test_a_captured_size_serves_other_trees(made: tuple[Decoder, Pages, Ops]) -> None:
    """Chains, wide trees and none at all at one size, each beside the step op by op at its own size."""
    model, pages, ops = made
    passes = graphs(model, pages, ops, True)
    padded, plain = runner(model, pages, ops, passes), runner(model, deepcopy(pages), ops)
    for tree in (TokenTree.chain(range(9)), TokenTree(range(9), [ROOT] * 9), bushy([], 9)):
        chunks = (drafted(1, 9, 8, tree, 0.0), drafted(3, 9, 14, None, 0.0))
        assert passes.size_for(chunks) == PassSize(16, 8)
        results = [one.run(StepPlan(1, chunks)) for one in (padded, plain)]
        assert len(results[0].accepted["1"].tokens) == len(results[0].accepted["1"].nodes) + 1
        if model.store.dtype is torch.float32:
            assert tokens_of(results[0]) == tokens_of(results[1])


def test_drafting_is_replayed(made: tuple[Decoder, Pages, Ops]) -> None:
    model, pages, ops = made
    loose, captured = (graphs(model, pages, ops, capture, 4) for capture in (False, True))
    chunks = [Chunk("1", [5, 6, 7], 8, blocks(1), None), drafted(2, 9, 11, bushy([], 5), 0.7)]
    settings = [(2, sampling(11, 0.9)), (3, sampling(12, 0.7)), (8, sampling(14, 0.0))]
    found = []
    for one in (loose, captured):
        passed = one.launch(chunks, settings)
        assert passed.proposed is not None
        assert passed.chances is not None
        found.append((passed.hidden.clone(), passed.proposed.clone(), passed.chances.clone()))
        assert passed.tokens is None
    for mine, its in zip(*found):
        assert torch.equal(mine, its)
    assert ((found[0][2] > 0) & (found[0][2] <= 1)).all()


@pytest.mark.parametrize("requests", [1, 3, 18])
def test_levels_of_a_draft_are_replayed(made: tuple[Decoder, Pages, Ops], requests: int) -> None:
    """Two drafts one after the other: to the bit what the same levels give op by op."""
    model, pages, ops = made
    table = Table((), dict.fromkeys((*CLASSES_OF_WORK, "tree"), ops))
    odds = [[0.9 - 0.05 * rank - 0.02 * kind for kind in range(4)] for rank in range(4)]
    told = []
    for capture in (False, True):
        mine = deepcopy(pages)
        drafter = DraftModel(model, mine, table, torch.device("cuda"), BLOCK, 256)
        drafter.graphs = passes = graphs(model, mine, ops, capture, 4)
        drafter.beams = Beams(
            model,
            mine,
            ops,
            torch.device("cuda"),
            BLOCK,
            18,
            BLOCKS,
            passes.proposed,
            passes.chances,
            (1e-4, 2e-4, 1e-3),
        )
        if capture:
            drafter.beams.capture()
        growths = []
        for n in range(requests):
            heat = SamplingParams(temperature=(0.0, 0.8)[n % 2])
            growths.append(Growth(Request(str(n), list(range(1, 6 + 3 * n)), 3, heat, 11 + n), blocks(n), 40))
            drafter.caught_up(growths[-1].request, blocks(n))
        for _ in range(2):
            found = drafter.levels(growths, (4, 4, 2, 4, 1, 4), odds)
            assert found is not None
            told.append(parts(found))
            assert (found.chosen[0, :, 0] >= 0).all()
            for growth, tokens in zip(growths, found.tokens.swapaxes(0, 1)):
                assert ((tokens >= 0) & (tokens < 5000)).all()
                growth.request.tokens += [int(tokens[0, 0, 1]), 9]
        # Every draft is hopeless, which is seen before the fifth level is begun.
        ended = drafter.levels(growths, (4, 4, 2, 4, 1, 4, 4, 4), odds, least=1e3)
        whole = drafter.levels(growths, (4, 4, 2, 4, 1, 4, 4, 4), odds)
        assert ended is not None
        assert whole is not None
        assert len(ended) == LOOKS + LATE < len(whole)
        for early, late in ((ended.tokens, whole.tokens), (ended.chosen, whole.chosen)):
            assert (early == late[: LOOKS + LATE]).all()
    assert told[:2] == told[2:]


def parts(found: Levels) -> list[bytes]:
    """Tokens, chances and chosen rows, to the bit."""
    return [one.tobytes() for one in (found.tokens, found.chances, found.chosen)]


def test_rows_that_take_more_than_their_logits_replay_the_first_graph(made: tuple[Decoder, Pages, Ops]) -> None:
    model, pages, ops = made
    passes = graphs(model, pages, ops, True)
    replayed = runner(model, pages, ops, passes)
    chunk = drafted(1, 9, 8, bushy([], 6), 0.0)
    cut = chunk._replace(sampling=Sampling(SamplingParams(temperature=1.0, top_k=1), 7, 9, [0], 1))
    passes.sampled.fill_(77)
    one, other = (replayed.run(StepPlan(1, (each,))) for each in (cut, chunk))
    assert passes.sampled[:7].ne(77).all()
    assert one.accepted["1"].tokens[0].token == other.accepted["1"].tokens[0].token


def test_what_waits_for_the_device_is_refused_by_name(made: tuple[Decoder, Pages, Ops]) -> None:
    model, pages, ops = made

    class Waiting:
        def __getattr__(self, name: str) -> object:
            return REGISTRY["kv_compact"].reference if name == "kv_compact" else getattr(ops, name)

    passes = PassGraphs(model, pages, Waiting(), torch.device("cuda"), BLOCK, [PassSize(8, 1)], BLOCKS)  # type: ignore[arg-type]
    with pytest.raises(KernelRefused, match="enforce_eager"):
        passes.capture()
    torch.cuda.synchronize()
    assert torch.randn(8, device="cuda").isfinite().all()  # random numbers are not left in the capture that broke
    graphs(model, pages, ops, True)


@pytest.mark.parametrize(
    "speculation",
    [
        {"method": "draft_model", "num_speculative_tokens": 3},
        {"method": "tree", "tree": [3, 2]},
        {"method": "tree", "tree": [6, 1]},  # more children than a captured pass proposes
    ],
    ids=["chain", "tree", "wide"],
)
def test_an_engine_with_trees(tiny: Path, speculation: dict[str, Any]) -> None:
    """The model as its own drafter, in fp32: the same tokens with trees in graphs, op by op, and without trees."""
    common: dict[str, Any] = {"device": "cuda", "dtype": "float32", "block_size": BLOCK, "max_num_seqs": 8, "seed": 5}
    common["kv_cache_memory_bytes"] = 8 << 20
    trees = {"speculative_config": {**speculation, "model": str(tiny)}}
    params = [SamplingParams(temperature=heat, max_tokens=24, ignore_eos=True, seed=4) for heat in (0.0, 1.0, 0.0)]
    params.append(SamplingParams(temperature=0.8, top_p=0.9, max_tokens=24, ignore_eos=True, seed=9))
    prompts = ["hello world", "the quick brown fox", "a", "jumps over the lazy dog"]
    told, ledgers = [], []
    for settings in (trees, {**trees, "enforce_eager": True}, {}):
        records: list[StepRecord] = []
        with LLM(tiny, **common, **settings) as llm:
            llm.built.engine.listeners.append(records.append)
            outputs = llm.generate(prompts, params, use_tqdm=False)
            told.append([output.outputs[0].token_ids for output in outputs])
            ledgers.append(llm.built.ledger.graph_bytes)
            steps = [record for record in records if record.kind == "tree"]
            assert bool(steps) == ("speculative_config" in settings)
            if settings is trees:
                assert llm.built.runner.passes is not None
                assert any(record.padding for record in steps)
                assert sum(record.accepted for record in steps) > len(steps)
    assert told[0] == told[1] == told[2]
    assert ledgers[0] > ledgers[2] > ledgers[1] == 0
