"""Decode steps at fixed sizes, uncaptured on a CPU: sizes, padding, and the same tokens as steps of any size."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from ridgeline.core.config import EngineConfig
from ridgeline.core.errors import KernelRefused
from ridgeline.core.request import SamplingParams
from ridgeline.core.step import UNREAD, Chunk, Sampling, StepPlan
from ridgeline.engine.build import build
from ridgeline.run import capture
from ridgeline.run.capture import captured
from ridgeline.run.graphs import DecodeGraphs, sizes_up_to
from ridgeline.run.places import Staging, layout, on_device
from ridgeline.run.runner import Runner, Step

TOKENS = [3 + (place * 17) % 250 for place in range(60)]
BLOCK = 16


def test_sizes() -> None:
    assert sizes_up_to(1) == (1,)
    assert sizes_up_to(8) == (1, 2, 4, 8)
    assert sizes_up_to(9) == (1, 2, 4, 8, 9)
    assert sizes_up_to(100) == (1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 100)
    for most in range(1, 600):
        sizes = sizes_up_to(most)
        assert (sizes[0], sizes[-1]) == (1, most)
        assert list(sizes) == sorted(set(sizes))
        for below, size in pairwise(sizes):
            padding = size - below - 1  # of a step one larger than the size below
            assert padding < 8 or padding < size / 5


# Captures


class Broken:
    """A graph as torch's: an end that the driver refuses leaves it open, one with a good recording closes it."""

    made: list[Broken]

    def __init__(self) -> None:
        self.recordings, self.open = ["broken"], False
        self.made.append(self)

    def capture_begin(self, pool: Any, capture_error_mode: str) -> None:
        self.open = True

    def capture_end(self) -> None:
        if self.recordings.pop() == "broken":
            raise RuntimeError("operation failed due to a previous error during capture")
        self.open = False


@pytest.mark.parametrize("fault", [None, RuntimeError("waits"), torch.OutOfMemoryError("full"), KeyboardInterrupt()])
def test_a_broken_capture_is_closed(fault: BaseException | None, monkeypatch: pytest.MonkeyPatch) -> None:
    Broken.made = []
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Broken)
    monkeypatch.setattr(capture, "_record_little", lambda: Broken.made[0].recordings.append("good"))

    def work() -> None:
        if fault is not None:
            raise fault

    kind = type(fault) if isinstance(fault, torch.OutOfMemoryError | KeyboardInterrupt) else KernelRefused
    with pytest.raises(kind, match="waits" if isinstance(fault, RuntimeError) and kind is KernelRefused else None):
        captured(work, None)
    assert not Broken.made[0].open


# Places


def sampling(position: int, **params: Any) -> Sampling:
    return Sampling(SamplingParams(**{"temperature": 0, **params}), 5, position, TOKENS[:position], position)


def decode(name: str, token: int, start: int, blocks: list[int], **params: Any) -> Chunk:
    return Chunk(name, [token], start, blocks, sampling(start + 1, **params))


def staging(rows: int = 4, width: int = 3) -> Staging:
    return Staging(torch.zeros(layout(rows, width)[1] + 8, dtype=torch.uint8), rows, width, BLOCK)


def test_both_sides_see_the_same_fields() -> None:
    memory = torch.zeros(layout(5, 7)[1], dtype=torch.uint8)
    host, device = Staging(memory, 5, 7, BLOCK).fields, on_device(memory, 5, 7)
    for name in host.__slots__:
        ours, theirs = getattr(host, name), getattr(device, name)
        ours[...] = torch.arange(ours.size).reshape(ours.shape).numpy()
        assert theirs.shape == ours.shape
        assert torch.equal(theirs.double(), torch.from_numpy(ours).double())
        assert (theirs.data_ptr() - memory.data_ptr()) % 16 == 0, "kernels are compiled for aligned pointers"


def test_rows_are_written_and_the_rest_is_padding() -> None:
    one = staging()
    assert one.fill([decode("a", 7, 33, [5, 9, 2]), decode("b", UNREAD, 4, [1], temperature=0.5, seed=5)], {"b": 3})
    fields = one.fields
    assert fields.ids[:2].tolist() == [7, UNREAD]
    assert fields.sources.tolist() == [-1, 3, -1, -1]
    assert fields.positions.tolist() == [33, 4, 0, 0]
    assert fields.next.tolist()[:2] == [34, 5]
    assert fields.lengths.tolist() == [34, 5, 0, 0]
    assert fields.slots.tolist() == [2 * BLOCK + 1, BLOCK + 4, -1, -1]
    assert fields.temperature.tolist() == [0.0, 0.5, 0.0, 0.0]
    assert fields.seeds[:2].tolist() == [5, 5]
    assert fields.tables.tolist() == [[5, 9, 2], [1, 0, 0], [0, 0, 0], [0, 0, 0]]


def test_what_grows_is_appended_and_what_leaves_becomes_padding() -> None:
    one = staging()
    first, second = [5], [6]
    one.fill([decode("a", 1, 14, first), decode("b", 1, 2, second, temperature=1.0)], {})
    first.append(8)
    one.fill([decode("a", 2, 15, first), decode("b", 2, 3, second, temperature=1.0)], {})
    one.fields.tables[0, 0] = 99  # written once, and not again while the list is the same
    one.fill([decode("a", 3, 16, first), decode("b", 3, 4, second, temperature=1.0)], {})
    assert one.fields.tables[0].tolist() == [99, 8, 0]
    one.fill([decode("b", 4, 5, second, temperature=1.0)], {})
    assert one.fields.tables[0, 0] == 6
    assert one.fields.temperature.tolist() == [1.0, 0.0, 0.0, 0.0]
    assert one.fields.lengths.tolist() == [6, 0, 0, 0]
    assert one.fields.slots.tolist()[1:] == [-1] * 3
    one.fill([decode("b", 5, 6, second, temperature=1.0), decode("c", 5, 0, [7])], {})
    assert one.fields.temperature.tolist() == [1.0, 0.0, 0.0, 0.0]
    replaced = [11, 8]
    one.fill([decode("a", 4, 17, replaced)], {})
    assert one.fields.tables[0, :2].tolist() == [11, 8]


@pytest.mark.parametrize(
    ("params", "plain"),
    [
        ({}, True),
        ({"temperature": 0.7}, True),
        ({"temperature": 0.7, "top_p": 0.9}, False),
        ({"temperature": 0, "top_k": 4}, True),
        ({"logprobs": 0}, False),
        ({"frequency_penalty": 0.1}, False),
        ({"logit_bias": {3: 1.0}}, False),
    ],
)
def test_rows_that_need_more_than_their_logits(params: dict[str, Any], plain: bool) -> None:
    one = staging()
    chunks = [decode("a", 1, 3, [0]), decode("b", 1, 3, [1], **params)]
    assert one.fill(chunks, {}) is plain
    assert one.fill(chunks, {}) is plain
    forbidden = chunks[0]._replace(sampling=chunks[0].sampling._replace(forbidden=(4,)))  # type: ignore[union-attr]
    assert one.fill([forbidden], {}) is False
    assert one.fill([chunks[0]], {}) is True


# Steps


@pytest.fixture(scope="module")
def runner(tiny: Path, one_thread: None) -> Runner:
    settings = {"kernels": "reference", "dtype": "float32", "block_size": BLOCK, "max_num_seqs": 8}
    return build(EngineConfig(model=str(tiny), **settings)).runner  # type: ignore[arg-type]


@pytest.fixture
def twins(runner: Runner) -> tuple[Runner, Runner, DecodeGraphs]:
    """One that runs steps as they are and one that pads them; they share pages."""
    model, pages, table, device = runner.model, runner.pages, runner.table, runner.device
    graphs = DecodeGraphs(model, pages, table.ops("decode"), device, BLOCK, sizes_up_to(6), 4)
    return Runner(model, pages, table, device, BLOCK), Runner(model, pages, table, device, BLOCK, graphs), graphs


def prefill(runner: Runner, count: int) -> list[Chunk]:
    """Prompts of different lengths for requests 0, 1, ..., each in blocks of its own."""
    chunks = [
        Chunk(str(n), TOKENS[n : n + 5 + 7 * n], 0, [3 * n, 3 * n + 1, 3 * n + 2], sampling(5 + 7 * n))
        for n in range(count)
    ]
    runner.run(StepPlan(1, tuple(chunks)))
    return chunks


@pytest.mark.parametrize("count", [1, 2, 3, 5])
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
def test_a_padded_step_is_the_step(
    twins: tuple[Runner, Runner, DecodeGraphs], count: int, params: dict[str, Any]
) -> None:
    plain, padded, graphs = twins
    prompts = prefill(plain, count)
    other = [{}, params][:: 1 if count % 2 else -1]
    steps = []
    for runner in (plain, padded):
        results = []
        for turn in range(3):
            chunks = tuple(
                decode(c.request_id, TOKENS[n + turn], c.visible + turn, c.blocks, **other[n % 2])
                for n, c in enumerate(prompts)
            )
            results.append(runner.run(StepPlan(2 + turn, chunks)))
        steps.append(results)
    size = next(size for size in graphs.sizes if size >= count)
    for ours, theirs in zip(*steps):
        assert ours.padding == 0
        assert theirs.padding == size - count
        assert {name: one.token for name, one in ours.sampled.items()} == {
            name: one.token for name, one in theirs.sampled.items()
        }
        for name, one in ours.sampled.items():
            assert [token for token, _ in one.top] == [token for token, _ in theirs.sampled[name].top]
            assert (one.logprob is None) == (theirs.sampled[name].logprob is None)


def test_padding_writes_nowhere(twins: tuple[Runner, Runner, DecodeGraphs]) -> None:
    _, padded, _ = twins
    prompts = prefill(padded, 3)
    before = [page.clone() for page in padded.pages.keys]
    padded.run(StepPlan(2, (decode("0", 9, prompts[0].visible, list(prompts[0].blocks)),)))
    padded.run(
        StepPlan(3, tuple(decode(c.request_id, 9, c.visible + (c is prompts[0]), list(c.blocks)) for c in prompts))
    )
    changed = [(old != new).any(-1).any(1) for old, new in zip(before, padded.pages.keys)]
    written = {(0, 5), (0, 6), (3, 12), (7, 3)}  # (block, slot) of what was decoded
    assert all(set(map(tuple, one.nonzero().tolist())) == written for one in changed)


def told(runner: Runner, ahead: bool, **params: Any) -> dict[str, list[int]]:
    """What three requests output who come and go and change their rows; with `ahead` each step is read late."""
    prompts = {name: TOKENS[n : n + 5 + 7 * n] for n, name in enumerate("012")}
    outputs: dict[str, list[int]] = {name: [] for name in prompts}
    late: Step | None = None

    def chunk(name: str) -> Chunk:
        blocks = [3 * int(name), 3 * int(name) + 1, 3 * int(name) + 2]
        prompt, output = prompts[name], outputs[name]
        if late is not None and name in late.names:
            return decode(name, UNREAD, len(prompt) + len(output), blocks, **params)
        if output:
            return decode(name, output[-1], len(prompt) + len(output) - 1, blocks, **params)
        return Chunk(name, prompt, 0, blocks, sampling(len(prompt), **params))

    def read(step: Step | None) -> None:
        if step is not None:
            for name, score in step.result().sampled.items():
                outputs[name].append(score.token)

    for number, names in enumerate(("01", "01", "10", "210", "012", "2", "2")):
        step = runner.start(StepPlan(number, tuple(map(chunk, names))))
        read(late if ahead else step)
        late = step if ahead else None
    read(late)
    return outputs


@pytest.mark.parametrize("params", [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 5}, {"logprobs": 1}])
def test_tokens_reach_the_next_step_unread(twins: tuple[Runner, Runner, DecodeGraphs], params: dict[str, Any]) -> None:
    plain, padded, _ = twins
    expected = told(plain, ahead=False, **params)
    assert [len(one) for one in expected.values()] == [5, 5, 4]
    assert told(plain, ahead=True, **params) == expected
    assert told(padded, ahead=True, **params) == expected


def test_what_cannot_be_replayed_is_not(twins: tuple[Runner, Runner, DecodeGraphs]) -> None:
    _, _, graphs = twins
    one = decode("a", 1, 3, [0])
    assert graphs.serves([one] * 6)
    assert not graphs.serves([one] * 7)
    assert not graphs.serves([one, Chunk("b", [1, 2], 0, [1], None)])
    assert not graphs.serves([one, Chunk("b", [1], 0, [1], None, 2, [4])])
    assert graphs.serves([one, Chunk("b", [1], 0, [1], None)])


def test_a_row_whose_token_nobody_wants(twins: tuple[Runner, Runner, DecodeGraphs]) -> None:
    """A chunk of one token in the middle of a prompt."""
    _, padded, _ = twins
    prompts = prefill(padded, 2)
    for params in ({}, {"temperature": 1.0, "top_k": 3}):
        wanted = decode("1", 9, prompts[1].visible, list(prompts[1].blocks), **params)
        expected = padded.run(StepPlan(2, (wanted,))).sampled["1"].token
        result = padded.run(StepPlan(3, (Chunk("0", [4], 0, [0], None), wanted)))
        assert {name: one.token for name, one in result.sampled.items()} == {"1": expected}
