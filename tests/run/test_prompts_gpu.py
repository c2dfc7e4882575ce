"""Captured steps with prompts on a GPU: to the bit what the same steps give op by op at their size."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch

from ridgeline import LLM
from ridgeline.core.config import EngineConfig
from ridgeline.core.errors import KernelRefused
from ridgeline.core.request import SamplingParams
from ridgeline.core.step import UNREAD, Chunk, Sampling, StepPlan, StepRecord, padded
from ridgeline.engine.build import build
from ridgeline.kernels.select import Table
from ridgeline.kv.layout import KVLayout
from ridgeline.kv.pages import Pages
from ridgeline.models.decoder import Decoder
from ridgeline.run.graphs import DecodeGraphs, sizes_up_to
from ridgeline.run.places import PassSize
from ridgeline.run.prompts import PromptGraphs, prompt_sizes_up_to
from ridgeline.run.runner import Runner

pytestmark = pytest.mark.gpu
BLOCK, WIDTH, REQUESTS = 64, 20, 20
TOKENS = [3 + (place * 17) % 250 for place in range(1400)]
CUDA = torch.device("cuda")
LLAMA = {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 5000,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": BLOCK * WIDTH,
    "tie_word_embeddings": True,
}
MIXTURE = {
    **LLAMA,
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 128,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
Made = tuple[Decoder, Pages, Table]


@pytest.fixture(
    scope="module",
    params=[("dense", "bfloat16"), ("dense", "float32"), ("mixture", "bfloat16"), ("mixture", "float32")],
    ids="-".join,
)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    """A random model with the kernels that an engine chooses for it, and pages for 20 requests."""
    kind, dtype = request.param
    folder = tmp_path_factory.mktemp(kind)
    config = {**(LLAMA if kind == "dense" else MIXTURE), "torch_dtype": dtype}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    settings: dict[str, Any] = {"load_format": "dummy", "dtype": dtype, "device": "cuda", "block_size": BLOCK}
    built = build(
        EngineConfig(model=str(folder), **settings, kv_cache_memory_bytes=64 << 20, enforce_eager=True, seed=1)
    )
    spec, own = built.spec, built.runner
    layout = KVLayout(spec.layers, spec.kv_heads, spec.head_dim, own.model.store.dtype.itemsize, BLOCK)
    yield own.model, Pages(layout, REQUESTS * WIDTH, CUDA, own.model.store.dtype), own.table
    del own
    built.close()


def runner(made: Made, capture: bool | None) -> Runner:
    """With pages of its own. capture: None: steps of any size, op by op."""
    model, pages, table = made
    pages = deepcopy(pages)
    if capture is None:
        return Runner(model, pages, table, CUDA, BLOCK)
    graphs = DecodeGraphs(model, pages, table.ops("decode"), CUDA, BLOCK, sizes_up_to(REQUESTS), WIDTH)
    prompts = PromptGraphs(
        model, pages, table.ops("mixed"), CUDA, BLOCK, prompt_sizes_up_to(REQUESTS, 8192), WIDTH, graphs.sampled
    )
    if capture:
        graphs.capture()
        prompts.capture()
    prompts.hidden.fill_(float("nan"))
    return Runner(model, pages, table, CUDA, BLOCK, graphs, prompts=prompts)


def sampling(position: int, **params: Any) -> Sampling:
    return Sampling(SamplingParams(**{"temperature": 0, **params}), 7, position, [0], 1)


def chunk(request: int, start: int, new: int, sampled: bool = True, **params: Any) -> Chunk:
    blocks = [WIDTH * request + block for block in range(WIDTH)]
    how = sampling(start + new, **params) if sampled else None
    return Chunk(str(request), TOKENS[start : start + new], start, blocks, how)


def late(request: int, start: int, **params: Any) -> Chunk:
    return chunk(request, start, 1, **params)._replace(token_ids=[UNREAD])


STEPS: list[list[Chunk]] = [
    [chunk(0, 0, 128)],
    [chunk(1, 0, 700, False), chunk(2, 0, 20, temperature=0.8)],
    [chunk(0, 128, 1), chunk(1, 700, 7), chunk(2, 20, 1, temperature=0.8), chunk(3, 0, 300, False)],
    [chunk(n, 0, 5 + 3 * n, temperature=float(n % 2)) for n in range(4, 20)],
    [late(n, 5 + 3 * n, temperature=float(n % 2)) for n in range(4, 19)] + [chunk(3, 300, 60)],
    [late(3, 360), chunk(0, 129, 400, False), late(4, 18)],
    [chunk(0, 529, 200, top_k=4, temperature=1.0), late(3, 361)],
    [chunk(0, 729, 500, logprobs=2)],
    [chunk(1, 707, 16, False)],
]


def tokens(result: Any) -> dict[str, int]:
    return {name: one.token for name, one in result.sampled.items()}


def test_replayed_is_what_op_by_op_is(made: Made) -> None:
    """Hidden states, tokens and pages, to the bit, step after step, each begun before the one before it is read."""
    found = []
    for capture in (False, True):
        one = runner(made, capture)
        assert one.prompts is not None
        steps, hidden = [], []
        for number, chunks in enumerate(STEPS):
            assert one.prompts.serves(chunks)
            steps.append(one.start(StepPlan(number, tuple(chunks))))
            count = sum(chunk.sampling is not None for chunk in chunks)
            hidden.append(one.prompts.hidden[:count].clone())
        found.append((steps, hidden, one.pages))
    for chunks, first, second in zip(STEPS, *(steps for steps, _, _ in found)):
        results = first.result(), second.result()
        assert tokens(results[0]) == tokens(results[1])
        rows = sum(one.new for one in chunks)
        assert results[1].padding == padded(rows, prompt_rows()) - rows
    for mine, its in zip(found[0][1], found[1][1]):
        assert torch.equal(mine, its)
        assert not its.isnan().any()
    for mine, its in zip(*((*pages.keys, *pages.values) for _, _, pages in found)):
        assert torch.equal(mine, its)


def prompt_rows() -> tuple[int, ...]:
    return tuple(sorted({one.rows for one in prompt_sizes_up_to(REQUESTS, 8192)}))


def test_a_captured_size_is_the_step(made: Made) -> None:
    """Beside steps op by op at their own sizes: the same tokens in fp32, keys and values that are near in any dtype,
    and nothing where nobody's are."""
    captured, plain = runner(made, True), runner(made, None)
    for number, chunks in enumerate(STEPS):
        ours, theirs = (one.run(StepPlan(number, tuple(chunks))) for one in (captured, plain))
        assert theirs.padding == 0
        assert ours.sampled.keys() == theirs.sampled.keys()
        if made[0].store.dtype is torch.float32:
            assert tokens(ours) == tokens(theirs)
    near = {"atol": 1e-3, "rtol": 1e-3} if made[0].store.dtype is torch.float32 else {"atol": 0.1, "rtol": 0.1}
    for mine, its in zip(captured.pages.keys, plain.pages.keys):
        assert torch.equal(mine == 0, its == 0)
        if made[0].store.dtype is torch.float32:  # in bf16 another token may be chosen, and its keys are others
            torch.testing.assert_close(mine, its, **near)
        else:  # keys of the first prompt's first layer at least
            torch.testing.assert_close(captured.pages.keys[0][:2], plain.pages.keys[0][:2], **near)


def test_a_row_is_the_same_in_any_place_of_a_size(made: Made) -> None:
    """Padding, and neighbours, do not matter to attention, nor to anything else of a dense model."""
    one = runner(made, True)
    assert one.prompts is not None
    if made[0].spec.experts:
        pytest.skip("how an expert's rows are cut into tiles follows from all rows")
    hidden = []
    shown = [chunk(0, 0, 40), chunk(1, 0, 30), chunk(2, 0, 25)]
    for chunks in (shown, shown[::-1]):
        assert one.prompts.size_for(chunks) == PassSize(128, 8)
        one.run(StepPlan(1, tuple(chunks)))
        hidden.append(dict(zip((c.request_id for c in chunks), one.prompts.hidden[: len(chunks)].clone())))
    for name, row in hidden[0].items():
        assert torch.equal(row, hidden[1][name])


def test_what_waits_for_the_device_is_refused_by_name(made: Made) -> None:
    model, pages, table = made
    ops = table.ops("mixed")

    class Waiting:
        def __getattr__(self, name: str) -> Any:
            work = getattr(ops, name)

            def call(*args: Any, **kwargs: Any) -> Any:
                result = work(*args, **kwargs)
                result.sum().item()
                return result

            return call if name == "linear" else work

    sampled = torch.zeros(8, dtype=torch.int64, device=CUDA)
    prompts = PromptGraphs(model, pages, Waiting(), CUDA, BLOCK, [PassSize(16, 8)], WIDTH, sampled)  # type: ignore[arg-type]
    with pytest.raises(KernelRefused, match="enforce_eager"):
        prompts.capture()
    torch.cuda.synchronize()
    runner(made, True)


# Engines


KINDS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"seed": 4},
    {"seed": 4, "top_p": 0.8, "top_k": 30},
    {"temperature": 0, "frequency_penalty": 0.8},
    {"temperature": 0, "logprobs": 2},
    {"temperature": 0, "prompt_logprobs": 1},
    {"n": 2, "seed": 9},
]


@contextmanager
def engine(tiny: Path, **settings: Any) -> Iterator[LLM]:
    base = {"device": "cuda", "dtype": "float32", "block_size": 16, "max_num_seqs": 16, "seed": 5}
    with LLM(tiny, **{**base, "kv_cache_memory_bytes": 8 << 20, **settings}) as llm:
        yield llm


def served(llm: LLM, kinds: list[dict[str, Any]]) -> list[list[int]]:
    """Prompts of which every other begins like the one before it."""
    prompts = [{"prompt_token_ids": TOKENS[n // 2 : n // 2 + 20 + 5 * n]} for n in range(len(kinds))]
    params = [SamplingParams(**{"max_tokens": 8 + n, "ignore_eos": True, **one}) for n, one in enumerate(kinds)]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    return [one.token_ids for output in outputs for one in output.outputs]


@pytest.mark.parametrize(
    "settings",
    [{}, {"max_num_batched_tokens": 48}, {"kv_cache_memory_bytes": 24 * 2 * 2 * 2 * 16 * 16 * 4, "max_model_len": 192}],
    ids=["whole", "chunks", "little memory"],
)
def test_every_way_gives_the_same_tokens(tiny: Path, settings: dict[str, Any]) -> None:
    """Captured and overlapped, captured, and neither, in fp32, where no two logits are near enough for the order of
    additions to matter."""
    told, preempted = [], []
    for ways in ({}, {"async_scheduling": False}, {"enforce_eager": True, "async_scheduling": False}):
        records: list[StepRecord] = []
        with engine(tiny, **settings, **ways) as llm:
            llm.built.engine.listeners.append(records.append)
            told.append(
                [served(llm, kinds) for kinds in (KINDS[:1], KINDS * 3, KINDS * 3)]
            )  # and then prefixes are there
            preempted.append(llm.built.engine.scheduler.preemptions)
            assert (llm.built.runner.prompts is None) == ("enforce_eager" in ways)
            padded = {record.kind for record in records if record.padding}
            assert padded >= (set() if "enforce_eager" in ways else {"prefill", "mixed"})
    assert told[0] == told[1] == told[2]
    assert bool(preempted[0]) == ("max_model_len" in settings)


def test_batch_invariant_prompts_run_op_by_op(tiny: Path) -> None:
    with engine(tiny, batch_invariant=True) as llm:
        assert llm.built.runner.graphs is not None
        assert llm.built.runner.prompts is None


def test_the_ledger_holds_what_graphs_take(tiny: Path) -> None:
    with engine(tiny) as llm:
        own = llm.built.runner
        assert own.prompts is not None
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()  # of this process alone: others may use the card
        again = PromptGraphs(
            own.model, own.pages, own.prompts.ops, CUDA, 16, own.prompts.sizes, 16, own.graphs.sampled  # type: ignore[union-attr]
        )  # fmt: skip
        again.capture()
        assert 0 < torch.cuda.memory_reserved() - before <= llm.built.ledger.graph_bytes
