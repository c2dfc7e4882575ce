"""Steps with prompts at fixed sizes, uncaptured on a CPU: sizes, places, and the same as steps of any size."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ridgeline import LLM
from ridgeline.core.config import EngineConfig
from ridgeline.core.request import SamplingParams
from ridgeline.core.step import UNREAD, Chunk, Sampling, StepPlan, StepRecord, StepResult, padded
from ridgeline.core.tree import TokenTree
from ridgeline.engine.build import Built, build
from ridgeline.kernels.select import Table
from ridgeline.ops import Ops
from ridgeline.run import capture
from ridgeline.run.graphs import DecodeGraphs, sizes_up_to
from ridgeline.run.places import PassSize, PromptStaging, prompt_layout, prompt_on_device
from ridgeline.run.prompts import TOKENS as MOST_TOKENS
from ridgeline.run.prompts import PromptGraphs, prompt_sizes_up_to, tokens_up_to
from ridgeline.run.runner import Runner

TOKENS = [3 + (place * 17) % 250 for place in range(200)]
BLOCK = 16
WIDTH = 5


# Sizes


def test_sizes() -> None:
    assert tokens_up_to(8192) == MOST_TOKENS
    assert tokens_up_to(100) == (16, 32, 64, 100)
    assert tokens_up_to(5) == (5,)
    assert prompt_sizes_up_to(1, 40) == tuple(PassSize(rows, 1) for rows in (16, 32, 40))
    assert prompt_sizes_up_to(16, 8) == (PassSize(8, 8),)
    assert prompt_sizes_up_to(4, 1) == ()
    for most in (1, 3, 8, 64, 200, 256, 320):
        sizes = prompt_sizes_up_to(most, 8192)
        assert len(set(sizes)) == len(sizes) < 45
        assert list(sizes) == sorted(sizes)
        for requests in range(1, most + 1):
            for rows in (*range(requests + 1, 1025, 37), 1024):
                holds = [one for one in sizes if one.rows >= rows and one.requests >= requests]
                assert holds[0].rows == padded(rows, MOST_TOKENS), "no more tokens than the tokens take"


def test_tokens_of_a_padded_step() -> None:
    sizes = (16, 32, 100)
    assert [padded(one, sizes) for one in (1, 16, 17, 33, 100)] == [16, 16, 32, 100, 100]
    assert padded(101, sizes) == 101
    assert padded(7, ()) == 7


# Places


def sampling(position: int, **params: Any) -> Sampling:
    return Sampling(SamplingParams(**{"temperature": 0, **params}), 5, position, TOKENS[:position], position)


def test_both_sides_see_the_same_fields() -> None:
    size = PassSize(9, 3)
    memory = torch.zeros(prompt_layout(size, 5)[1], dtype=torch.uint8)
    host, device = PromptStaging(memory, size, 5, BLOCK).fields, prompt_on_device(memory, size, 5)
    for name in host.__slots__:
        ours, theirs = getattr(host, name), getattr(device, name)
        ours[...] = torch.arange(ours.size).reshape(ours.shape).numpy()
        assert theirs.shape == ours.shape
        assert torch.equal(theirs.double(), torch.from_numpy(ours).double())
        assert (theirs.data_ptr() - memory.data_ptr()) % 16 == 0, "kernels are compiled for aligned pointers"


def test_prompts_decodes_and_padding() -> None:
    size = PassSize(10, 4)
    one = PromptStaging(torch.zeros(prompt_layout(size, 3)[1], dtype=torch.uint8), size, 3, BLOCK)
    chunks = [
        Chunk("a", [7, 8, 9], 14, [5, 9], None),
        Chunk("b", [UNREAD], 3, [2], sampling(4)),
        Chunk("c", [4, 5], 0, [6], sampling(2)),
    ]
    assert one.fill(chunks, {"z": 0, "b": 2}) == 2
    fields = one.fields
    assert fields.ids.tolist() == [7, 8, 9, UNREAD, 4, 5, 0, 0, 0, 0]
    assert fields.sources.tolist() == [-1, -1, -1, 2] + [-1] * 6
    assert fields.positions.tolist() == [14, 15, 16, 3, 0, 1, 0, 0, 0, 0]
    slots = [5 * BLOCK + 14, 5 * BLOCK + 15, 9 * BLOCK, 2 * BLOCK + 3, 6 * BLOCK, 6 * BLOCK + 1]
    assert fields.slots.tolist() == slots + [-1] * 4
    assert fields.rows.tolist() == [3, 5, 0, 0]  # of those that are sampled; nobody looks at the others
    assert fields.starts.tolist() == [0, 3, 4, 6, 6, 10]  # the last request has what nobody else has
    assert fields.lengths.tolist() == [17, 4, 2, 0, 0]
    assert fields.tables.tolist() == [[5, 9, 0], [2, 0, 0], [6, 0, 0], [0, 0, 0], [0, 0, 0]]

    fields.tables[0, 0] = 99  # written once, and not again while the list is the same
    assert one.fill([Chunk("a", [7, 8], 17, chunks[0].blocks, sampling(19))], {}) == 1
    assert fields.tables[0].tolist() == [99, 9, 0]
    assert fields.ids.tolist() == [7, 8] + [0] * 8
    assert fields.sources.tolist() == [-1] * 10
    assert fields.slots.tolist() == [9 * BLOCK + 1, 9 * BLOCK + 2] + [-1] * 8
    assert fields.rows.tolist() == [1, 0, 0, 0]
    assert fields.starts.tolist() == [0, 2, 2, 2, 2, 10]
    assert fields.lengths.tolist() == [19, 0, 0, 0, 0]


# Steps


@pytest.fixture(scope="module")
def made(tiny: Path, one_thread: None) -> Runner:
    settings = {"kernels": "reference", "dtype": "float32", "block_size": BLOCK, "max_num_seqs": 8}
    return build(EngineConfig(model=str(tiny), **settings)).runner  # type: ignore[arg-type]


def with_prompts(made: Runner, most_tokens: int) -> Runner:
    """The same model with decode steps and prompts at fixed sizes, and empty pages of its own."""
    ops = Ops({})
    table = Table((), dict.fromkeys(("decode", "prefill", "mixed", "tree"), ops))
    pages, device = deepcopy(made.pages), made.device
    for page in (*pages.keys, *pages.values):
        page.zero_()
    graphs = DecodeGraphs(made.model, pages, ops, device, BLOCK, sizes_up_to(6), WIDTH)
    prompts = PromptGraphs(
        made.model, pages, ops, device, BLOCK, prompt_sizes_up_to(6, most_tokens), WIDTH, graphs.sampled
    )
    return Runner(made.model, pages, table, device, BLOCK, graphs, prompts=prompts)


@pytest.fixture
def twins(made: Runner) -> tuple[Runner, Runner]:
    """One that runs steps as they are and one that pads them, each with its own pages."""
    plain = with_prompts(made, 100)
    plain.graphs = plain.prompts = None
    return plain, with_prompts(made, 100)


def blocks(request: int) -> list[int]:
    return [WIDTH * request + block for block in range(WIDTH)]


def chunk(request: int, start: int, new: int, sampled: bool = True, **params: Any) -> Chunk:
    how = sampling(start + new, **params) if sampled else None
    return Chunk(str(request), TOKENS[start : start + new], start, blocks(request), how)


def scores(result: StepResult) -> dict[str, Any]:
    return {name: (one.token, one.rank, [token for token, _ in one.top]) for name, one in result.sampled.items()}


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 1.0},
        {"temperature": 0.8, "top_k": 20, "top_p": 0.9},
        {"logprobs": 3},
        {"temperature": 1.0, "repetition_penalty": 1.3, "logit_bias": {9: 5.0}},
    ],
)
def test_a_padded_step_is_the_step(twins: tuple[Runner, Runner], params: dict[str, Any]) -> None:
    """Whole prompts, chunks of them that are sampled and that are not, tokens in between; and what they write."""
    plain, padded_ = twins
    assert padded_.prompts is not None
    steps = [
        [chunk(0, 0, 13, **params)],
        [chunk(1, 0, 9, False), chunk(2, 0, 20, **params)],
        [chunk(0, 13, 1), chunk(1, 9, 7, **params), chunk(2, 20, 1, **params), chunk(3, 0, 2, False)],
        [chunk(3, 2, 30, False)],
        [chunk(3, 32, 14, **params), chunk(0, 14, 1, **params)],
        [chunk(4, 0, 64, **params)],
    ]
    for number, chunks in enumerate(steps):
        assert padded_.prompts.serves(chunks)
        ours, theirs = (runner.run(StepPlan(number, tuple(chunks))) for runner in twins)
        assert scores(ours) == scores(theirs)
        assert ours.padding == 0
        rows = sum(one.new for one in chunks)
        assert theirs.padding == padded(rows, padded_.prompts.tokens) - rows
        for one, other in zip(plain.pages.keys + plain.pages.values, padded_.pages.keys + padded_.pages.values):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
            assert torch.equal(one == 0, other == 0), "padding writes nowhere"
    names = [str(n) for n in range(5) if n != 3]
    assert scores(plain.run(StepPlan(9, tuple(chunk(int(n), 15, 2, **params) for n in names)))).keys() == set(names)


class Recording:
    """A graph that a CPU can have: replaying does the work again, which it counts."""

    def __init__(self, work: Callable[[], None], told: list[str]) -> None:
        self._work, self._told = work, told

    def replay(self) -> None:
        self._told.append("replayed")
        self._work()


def test_what_was_captured_is_replayed(
    made: Runner, twins: tuple[Runner, Runner], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All sizes, the largest first, each run once before; from then on steps replay them, with inputs of their own."""
    told: list[str] = []
    monkeypatch.setattr(capture, "captured", lambda work, pool: Recording(work, told))
    for name in ("graph_pool_handle", "synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "Stream", lambda *_: SimpleNamespace(synchronize=lambda: None))
    one, plain = with_prompts(made, 40), twins[0]
    assert one.graphs is not None
    assert one.prompts is not None
    seen: list[tuple[int, int]] = []
    one.graphs.capture()
    one.prompts.capture(lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert not any(page.any() for page in (*one.pages.keys, *one.pages.values)), "captures write nowhere"
    steps = [
        ([chunk(0, 0, 13)], 1),  # tokens are chosen op by op
        ([chunk(0, 13, 1), chunk(1, 0, 22)], 1),
        ([chunk(0, 14, 1), chunk(1, 22, 1)], 2),  # decoding chooses them too
        ([chunk(2, 0, 41)], 0),
        ([chunk(0, 15, 2)], 1),
    ]
    for number, (chunks, replays) in enumerate(steps):
        told.clear()
        ours, theirs = (runner.run(StepPlan(number, tuple(chunks))) for runner in (one, plain))
        assert scores(ours) == scores(theirs)
        assert told == ["replayed"] * replays
    one.close()
    assert one.graphs is one.prompts is None


def test_what_no_size_holds_runs_op_by_op(made: Runner) -> None:
    small = with_prompts(made, 16)
    results = [small.run(StepPlan(n, (chunk(n, 0, rows),))) for n, rows in enumerate((16, 17))]
    assert [one.padding for one in results] == [0, 0]
    assert small.run(StepPlan(3, (chunk(0, 16, 3),))).padding == 13


def test_without_the_place_of_the_last_tokens_prompts_run_op_by_op(made: Runner) -> None:
    one = with_prompts(made, 100)
    one.graphs = None
    assert one.run(StepPlan(1, (chunk(0, 0, 10),))).padding == 0


def test_what_is_served(twins: tuple[Runner, Runner]) -> None:
    prompts = twins[1].prompts
    assert prompts is not None
    one = chunk(0, 0, 10)
    assert prompts.size_for([one]) == PassSize(16, 6)
    assert prompts.serves([one] * 6)
    assert not prompts.serves([one] * 7)
    assert not prompts.serves([chunk(0, 0, 101)])
    assert not prompts.serves([one, one._replace(prompt_logprobs=2, targets=[4])])
    assert not prompts.serves([one, chunk(1, 0, 1)._replace(tree=TokenTree.chain((4,)))])


def test_tokens_reach_the_next_step_unread(twins: tuple[Runner, Runner]) -> None:
    """From prompts to decoding and to prompts, and from decoding to prompts: each step is read a step late."""
    told = []
    for runner in twins:
        first = runner.start(StepPlan(1, (chunk(0, 0, 9), chunk(1, 0, 5, temperature=1.0))))

        def late(request: int, start: int, **params: Any) -> Chunk:
            return Chunk(str(request), [UNREAD], start, blocks(request), sampling(start + 1, **params))

        second = runner.start(StepPlan(2, (chunk(2, 0, 7), late(1, 5, temperature=1.0), late(0, 9))))
        third = runner.start(StepPlan(3, (late(0, 10), late(1, 6), late(2, 7))))
        fourth = runner.start(StepPlan(4, (late(2, 8, top_k=5, temperature=1.0), chunk(3, 0, 4, False), late(1, 7))))
        fifth = runner.start(StepPlan(5, (chunk(3, 4, 3), late(1, 8))))
        told.append([scores(one.result()) for one in (first, second, third, fourth, fifth)])
        assert all(told[-1])
    assert told[0] == told[1]
    assert {token for step in told[0] for token, *_ in step.values()} != {told[0][0]["0"][0]}


# Engines


def pad(built: Built) -> None:
    """Let an engine on a CPU run steps at the sizes that a GPU captures."""
    runner, config = built.runner, built.config
    width = -(-config.max_model_len // config.block_size)
    runner.graphs = DecodeGraphs(
        runner.model, runner.pages, runner.table.ops("decode"), runner.device, config.block_size,
        sizes_up_to(config.max_num_seqs), width,
    )  # fmt: skip
    sizes = prompt_sizes_up_to(config.max_num_seqs, config.max_num_batched_tokens)
    runner.prompts = PromptGraphs(
        runner.model, runner.pages, runner.table.ops("mixed"), runner.device, config.block_size, sizes, width,
        runner.graphs.sampled,
    )  # fmt: skip


@contextmanager
def engines(tiny: Path, **settings: Any) -> Iterator[tuple[LLM, LLM, list[StepRecord]]]:
    """An engine as it is, and one that pads and overlaps; and the other one's steps."""
    base = {"device": "cpu", "dtype": "float32", "kernels": "reference", "block_size": BLOCK, "seed": 5}
    records: list[StepRecord] = []
    with LLM(tiny, **base, **settings) as plain, LLM(tiny, **base, **settings, async_scheduling=True) as other:
        pad(other.built)
        other.built.engine.listeners.append(records.append)
        yield plain, other, records


KINDS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"seed": 4},
    {"seed": 4, "top_p": 0.8, "top_k": 30},
    {"temperature": 0, "frequency_penalty": 0.8},
    {"temperature": 0, "logprobs": 2},
    {"temperature": 0, "prompt_logprobs": 1},
    {"n": 2, "seed": 9},
]


def served(llm: LLM, kinds: list[dict[str, Any]], **more: Any) -> list[list[int]]:
    """Prompts of which every other begins like the one before it."""
    prompts = [{"prompt_token_ids": TOKENS[n // 2 : n // 2 + 20 + 3 * (n % 2)]} for n in range(len(kinds))]
    params = [SamplingParams(**{"max_tokens": 8 + n, "ignore_eos": True, **more, **one}) for n, one in enumerate(kinds)]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    return [one.token_ids for output in outputs for one in output.outputs]


def test_an_engine_gives_the_same_tokens(tiny: Path) -> None:
    """Prompts in chunks beside decoding, prefixes that are there, tokens that only the device knows."""
    with engines(tiny, max_num_seqs=4, max_num_batched_tokens=24) as (plain, other, records):
        for _ in range(2):  # the second time every prefix is there
            assert served(plain, KINDS) == served(other, KINDS)
        kinds = {record.kind for record in records}
        assert kinds == {"decode", "prefill", "mixed"}
        for kind in ("prefill", "mixed"):
            assert any(record.padding for record in records if record.kind == kind)
        assert other.built.engine.scheduler.cache.free_blocks == other.built.config.num_blocks


def test_blocks_change_hands_while_steps_are_under_way(tiny: Path) -> None:
    pool = 12 * 2 * 2 * 2 * 16 * BLOCK * 4  # a fraction of what is asked for
    settings = {"max_num_seqs": 8, "max_num_batched_tokens": 40, "kv_cache_memory_bytes": pool, "max_model_len": 128}
    with engines(tiny, **settings) as (plain, other, _):
        assert served(plain, KINDS[:5] * 3) == served(other, KINDS[:5] * 3)
        assert other.built.engine.scheduler.preemptions > 0
        assert other.built.engine.scheduler.cache.free_blocks == other.built.config.num_blocks


def test_an_abort_leaves_the_others_alone(tiny: Path) -> None:
    from ridgeline.core.request import Request

    with engines(tiny, max_num_seqs=4, max_num_batched_tokens=24) as (plain, other, _):
        told = []
        for llm in (plain, other):
            engine, tokens = llm.built.engine, {name: [] for name in "abc"}
            for n, name in enumerate(tokens):
                engine.add(Request(name, TOKENS[n : n + 30], 30, SamplingParams(temperature=0, max_tokens=12), n))
            for number in range(200):
                if number == 3:
                    engine.abort("b")
                for event in engine.step():
                    tokens[event.request.request_id] += [event.token] if event.token is not None else []
                if not engine.has_work:
                    break
            told.append((tokens["a"], tokens["c"]))
        assert told[0] == told[1]
        assert all(told[0])
