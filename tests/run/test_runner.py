"""Running plans on the CPU, without a scheduler: copies, chunks and batches change nothing of what comes out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ridgeline.core.config import EngineConfig
from ridgeline.core.request import SamplingParams
from ridgeline.core.step import Chunk, Sampling, StepPlan, StepResult
from ridgeline.engine.build import build
from ridgeline.run import runner as running
from ridgeline.run.runner import Runner

TOKENS = [3 + (place * 17) % 250 for place in range(40)]


@pytest.fixture
def runner(tiny: Path, one_thread: None) -> Runner:
    settings = {"kernels": "reference", "dtype": "float32", "block_size": 16, "max_num_seqs": 8}
    return build(EngineConfig(model=str(tiny), **settings)).runner  # type: ignore[arg-type]


def chunk(name: str, start: int, end: int, blocks: list[int], sample: bool = True, **params: Any) -> Chunk:
    sampling = Sampling(SamplingParams(**{"temperature": 0, **params}), 1, end, TOKENS[:end], end)
    return Chunk(name, TOKENS[start:end], start, blocks, sampling if sample else None)


def run(runner: Runner, *chunks: Chunk, copies: tuple[tuple[int, int], ...] = ()) -> StepResult:
    return runner.run(StepPlan(1, chunks, copies))


def test_chunks_come_to_the_same_as_a_whole_prompt(runner: Runner) -> None:
    whole = run(runner, chunk("a", 0, 40, [0, 1, 2], logprobs=5)).sampled["a"]
    run(runner, chunk("b", 0, 7, [9, 4, 6], sample=False))
    run(runner, chunk("b", 7, 32, [9, 4, 6], sample=False))
    parts = run(runner, chunk("b", 32, 40, [9, 4, 6], logprobs=5)).sampled["b"]
    assert parts.token == whole.token
    assert parts.logprob == pytest.approx(whole.logprob, abs=1e-5)
    assert [token for token, _ in parts.top] == [token for token, _ in whole.top]


def test_an_unfinished_prefill_samples_nothing(runner: Runner) -> None:
    result = run(runner, chunk("b", 0, 7, [9], sample=False))
    assert result.sampled == {}
    assert result.prompt_scores == {}


def test_copied_blocks_are_read_like_their_sources(runner: Runner) -> None:
    run(runner, chunk("a", 0, 39, [0, 1, 2], sample=False))
    expected = run(runner, chunk("a", 39, 40, [0, 1, 2])).sampled["a"].token
    copied = run(runner, chunk("b", 39, 40, [0, 1, 7]), copies=((2, 7),))
    assert copied.sampled["b"].token == expected
    assert torch.equal(runner.pages.keys[1][7, :, :7], runner.pages.keys[1][2, :, :7])


def test_each_row_gets_the_scores_it_asked_for(runner: Runner) -> None:
    result = run(
        runner,
        chunk("a", 0, 4, [0], logprobs=3),
        chunk("b", 0, 4, [1]),
        chunk("c", 0, 4, [2], logprobs=0),
    )
    assert [len(result.sampled[name].top) for name in "abc"] == [3, 0, 0]
    assert result.sampled["b"].logprob is None
    assert result.sampled["c"].logprob == result.sampled["a"].logprob


def test_prompt_scores_in_slices_are_the_same(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    def scored() -> list[tuple[int, float | None, int | None]]:
        one = Chunk("a", TOKENS, 0, [0, 1, 2], None, 2, TOKENS[1:])
        scores = run(runner, one).prompt_scores["a"]
        assert all(len(score.top) == 2 for score in scores)
        return [(score.token, score.logprob, score.rank) for score in scores]

    whole = scored()
    assert [token for token, _, _ in whole] == TOKENS[1:]
    monkeypatch.setattr(running, "SCORED_ROWS", 7)
    parts = scored()
    assert [one[::2] for one in parts] == [one[::2] for one in whole]
    assert [one[1] for one in parts] == pytest.approx([one[1] for one in whole], abs=1e-5)
