"""Captured decode steps on a GPU: to the bit what the same steps give op by op, whatever the size, overlap or not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from ridgeline import LLM, SamplingParams
from ridgeline.core.errors import KernelRefused
from ridgeline.core.step import Chunk, Sampling, StepPlan, StepRecord
from ridgeline.run.capture import captured
from ridgeline.run.graphs import DecodeGraphs, sizes_up_to
from ridgeline.run.runner import Runner

pytestmark = pytest.mark.gpu
BLOCK = 16
TOKENS = [3 + (place * 17) % 250 for place in range(200)]


@pytest.fixture(scope="module", params=["bfloat16", "float32"])
def llm(request: pytest.FixtureRequest, tiny: Path) -> Iterator[LLM]:
    settings = {"block_size": BLOCK, "max_num_seqs": 20, "kv_cache_memory_bytes": 8 << 20, "seed": 5}
    with LLM(tiny, device="cuda", dtype=request.param, **settings) as made:
        yield made


def decode(name: str, token: int, start: int, blocks: list[int], **params: Any) -> Chunk:
    sampling = Sampling(SamplingParams(**{"temperature": 0, **params}), 5, start + 1, TOKENS[: start + 1], start + 1)
    return Chunk(name, [token], start, blocks, sampling)


def twins(llm: LLM) -> tuple[Runner, Runner]:
    """The same steps at the same sizes, op by op and replayed; they share pages."""
    own = llm.built.runner
    assert own.graphs is not None
    graphs = own.graphs
    width = graphs._sizes[1].fields.tables.shape[1]
    loose = DecodeGraphs(own.model, own.pages, graphs.ops, own.device, BLOCK, graphs.sizes, width)
    return tuple(  # type: ignore[return-value]
        Runner(own.model, own.pages, own.table, own.device, BLOCK, one) for one in (loose, graphs)
    )


def poison(graphs: DecodeGraphs) -> None:
    graphs.hidden.fill_(float("nan"))
    graphs.sampled.fill_(77)


@pytest.mark.parametrize("count", [1, 2, 3, 8, 13, 20])
def test_replayed_is_what_op_by_op_is(llm: LLM, count: int) -> None:
    """Hidden states, tokens and pages, to the bit, three steps in a row."""
    found = []
    for runner in twins(llm):
        for page in (*runner.pages.keys, *runner.pages.values):
            page.zero_()
        chunks = [
            Chunk(str(n), TOKENS[n : n + 4 + 3 * n], 0, [4 * n + k for k in range(5)], None) for n in range(count)
        ]
        runner.run(StepPlan(1, tuple(chunks)))
        assert runner.graphs is not None
        poison(runner.graphs)
        for turn in range(3):
            step = tuple(
                decode(c.request_id, TOKENS[7 * n + turn], c.visible + turn, list(c.blocks), temperature=float(n % 2))
                for n, c in enumerate(chunks)
            )
            result = runner.run(StepPlan(2 + turn, step))
            found.append(([one.token for one in result.sampled.values()], runner.graphs.hidden[:count].clone()))
            assert result.padding == next(size for size in runner.graphs.sizes if size >= count) - count
        found.append(([], torch.stack([*runner.pages.keys, *runner.pages.values]).clone()))
    half = len(found) // 2
    for (tokens, tensor), (other_tokens, other) in zip(found[:half], found[half:]):
        assert tokens == other_tokens
        assert torch.equal(tensor, other)
        assert not tensor.isnan().any()


def test_a_row_is_the_same_in_any_place_of_a_size(llm: LLM) -> None:
    """Padding, and neighbours, do not matter at one size: the kernels see the same shapes."""
    _, runner = twins(llm)
    assert runner.graphs is not None
    chunks = [Chunk(str(n), TOKENS[n : n + 9], 0, [n], None) for n in range(8)]
    runner.run(StepPlan(1, tuple(chunks)))
    hidden = []
    for shown in (chunks, chunks[:5], chunks[::-1]):
        runner.run(StepPlan(2, tuple(decode(c.request_id, 9, 9, list(c.blocks)) for c in shown)))
        rows = runner.graphs.hidden[: len(shown)].clone()
        hidden.append({c.request_id: row for c, row in zip(shown, rows)})
    for other in hidden[1:]:
        for name, row in other.items():
            assert torch.equal(row, hidden[0][name])


KINDS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"seed": 4},
    {"seed": 4, "top_p": 0.8, "top_k": 30},
    {"temperature": 0, "frequency_penalty": 0.8},
    {"temperature": 0, "bad_words": ["a"], "min_tokens": 5},
    {"temperature": 0, "logprobs": 2},
    {"temperature": 0, "prompt_logprobs": 1},
    {"n": 2, "seed": 9},
]


def tokens_of(llm: LLM, kinds: list[dict[str, Any]], **more: Any) -> list[list[int]]:
    params = [SamplingParams(**{"max_tokens": 24, "ignore_eos": True, **more, **kind}) for kind in kinds]
    prompts = ["hello world", "the quick brown fox", "a", "jumps over the lazy dog", "b", "c d", "e", "f g h"]
    outputs = llm.generate(prompts[: len(params)], params, use_tqdm=False)
    return [one.token_ids for output in outputs for one in output.outputs]


@contextmanager
def made(tiny: Path, **settings: Any) -> Iterator[LLM]:
    base = {"device": "cuda", "dtype": "float32", "block_size": BLOCK, "max_num_seqs": 16, "seed": 5}
    with LLM(tiny, **{**base, "kv_cache_memory_bytes": 8 << 20, **settings}) as llm:
        yield llm


@pytest.mark.parametrize(
    "settings",
    [{"enforce_eager": True}, {"async_scheduling": False}, {"enforce_eager": True, "async_scheduling": False}],
    ids=["eager", "synchronous", "neither"],
)
def test_every_way_gives_the_same_tokens(tiny: Path, settings: dict[str, Any]) -> None:
    """In fp32, where no two logits are near enough for the order of additions to matter."""
    with made(tiny) as both, made(tiny, **settings) as other:
        assert both.built.engine.overlap
        assert both.built.runner.graphs is not None
        assert (other.built.runner.graphs is None) == ("enforce_eager" in settings)
        for kinds in (KINDS[:1], KINDS[:2], KINDS[:1] * 7, KINDS):
            assert tokens_of(both, kinds) == tokens_of(other, kinds)
        assert tokens_of(both, KINDS[:2] * 4, ignore_eos=False) == tokens_of(other, KINDS[:2] * 4, ignore_eos=False)


def test_many_requests_come_and_go(tiny: Path) -> None:
    """Blocks change hands while steps are under way: the pool holds a fifth of what is asked for."""
    pool = 20 * 2 * 2 * 2 * 16 * BLOCK * 4
    results = []
    for settings in ({}, {"enforce_eager": True, "async_scheduling": False}):
        with made(tiny, kv_cache_memory_bytes=pool, max_model_len=128, **settings) as llm:
            prompts = [{"prompt_token_ids": TOKENS[n : n + 5 + n % 40]} for n in range(60)]
            params = [SamplingParams(temperature=0, max_tokens=10 + n % 30, ignore_eos=n % 3 > 0) for n in range(60)]
            outputs = llm.generate(prompts, params, use_tqdm=False)
            results.append([output.outputs[0].token_ids for output in outputs])
            assert llm.built.engine.scheduler.preemptions > 0
            assert llm.built.engine.scheduler.cache.free_blocks == llm.built.config.num_blocks
    assert results[0] == results[1]


def test_steps_overlap_and_say_what_is_padding(llm: LLM) -> None:
    records: list[StepRecord] = []
    llm.built.engine.listeners.append(records.append)
    tokens_of(llm, KINDS[:1] * 5)
    llm.built.engine.listeners.clear()
    decodes = [record for record in records if record.kind == "decode"]
    assert len(decodes) == 23
    assert all((record.padding, record.sampled) == (3, 5) for record in decodes)
    assert all(record.device_s > 0 for record in records)


def test_the_ledger_holds_what_graphs_take(tiny: Path) -> None:
    with made(tiny, max_num_seqs=64) as llm, made(tiny, max_num_seqs=64, enforce_eager=True) as eager:
        assert llm.built.ledger.graph_bytes > 0
        assert eager.built.ledger.graph_bytes == 0
        graphs = llm.built.runner.graphs
        assert graphs is not None
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()  # of this process alone: others may use the card
        width = graphs._sizes[1].fields.tables.shape[1]
        own = llm.built.runner
        again = DecodeGraphs(own.model, own.pages, graphs.ops, own.device, BLOCK, sizes_up_to(64), width)
        again.capture()
        assert 0 < torch.cuda.memory_reserved() - before <= llm.built.ledger.graph_bytes


def test_what_waits_for_the_device_is_refused_by_name(llm: LLM) -> None:
    own = llm.built.runner
    assert own.graphs is not None

    def waiting(work: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            result = work(*args)
            result.sum().item()
            return result

        return call

    class Waiting:
        def __getattr__(self, name: str) -> Any:
            work = getattr(own.graphs.ops, name)  # type: ignore[union-attr]
            return waiting(work) if name == "linear" else work

    graphs = DecodeGraphs(own.model, own.pages, Waiting(), own.device, BLOCK, (1,), 4)  # type: ignore[arg-type]
    with pytest.raises(KernelRefused, match="enforce_eager"):
        graphs.capture()
    torch.cuda.synchronize()
    assert tokens_of(llm, KINDS[:1])


def test_a_capture_that_breaks_leaves_nothing_behind() -> None:
    """Random numbers go on, the same pool serves the next capture, and its memory is given back. (torch takes no pool
    again whose graphs are all gone, so one is there before.)"""
    numbers, out = torch.ones(1 << 20, device="cuda"), torch.zeros(1 << 20, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    stream, pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
    with torch.cuda.stream(stream):
        first = captured(lambda: out.copy_(numbers), pool)
        for _ in range(2):
            with pytest.raises(KernelRefused, match="enforce_eager"):
                captured(lambda: (numbers * 2).sum().item(), pool)  # waits, which breaks it
            assert torch.randn(8, device="cuda").isfinite().all()
        graph = captured(lambda: out.copy_(numbers * 3), pool)
    torch.cuda.synchronize()
    graph.replay()
    assert (out == 3).all()
    first.replay()
    assert (out == 1).all()
    del graph, first
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= before


def test_reference_kernels_run_op_by_op(tiny: Path) -> None:
    with made(tiny, kernels="reference") as llm:
        assert llm.built.config.enforce_eager
        assert "reference" in llm.built.config.reasons["enforce_eager"]
        assert len(tokens_of(llm, KINDS[:2])[0]) == 24
