"""From a StepPlan to tensors: every token at its position and slot, every row with its own settings."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ridgeline.core.request import SamplingParams
from ridgeline.core.step import Chunk, Sampling, StepPlan
from ridgeline.run.prepare import Prepared, prepare

CPU = torch.device("cpu")


def sampling(
    tokens: list[int], prompt_len: int, forbidden: tuple[int, ...] = (), seed: int = 0, **params: Any
) -> Sampling:
    return Sampling(SamplingParams(**params), seed, len(tokens), tokens, prompt_len, forbidden)


def prepared(*chunks: Chunk) -> Prepared:
    return prepare(StepPlan(1, chunks), CPU, 16)


def test_tokens_positions_slots_and_tables() -> None:
    ready = prepared(
        Chunk("a", [7], 33, [5, 9, 2], sampling([0] * 34, 3)),
        Chunk("b", [11, 12, 13, 14], 14, [4, 0, 8], None),
        Chunk("c", [21, 22], 0, [3], sampling([21, 22], 2)),
    )
    batch = ready.batch
    assert batch.ids.tolist() == [7, 11, 12, 13, 14, 21, 22]
    assert batch.positions.tolist() == [33, 14, 15, 16, 17, 0, 1]
    assert batch.slots.tolist() == [2 * 16 + 1, 4 * 16 + 14, 4 * 16 + 15, 0, 1, 3 * 16, 3 * 16 + 1]
    assert batch.block_tables.tolist() == [[5, 9, 2], [4, 0, 8], [3, 0, 0]]
    assert batch.query_starts.tolist() == [0, 1, 5, 7]
    assert batch.lengths.tolist() == [34, 18, 2]
    assert batch.spans.new == (1, 4, 2)
    assert batch.spans.visible == (34, 18, 2)
    assert batch.rows is not None
    assert batch.rows.tolist() == [0, 6]
    assert ready.sampled_ids == ["a", "c"]
    assert batch.kind == "mixed"


def test_integers_have_the_widths_that_kernels_read() -> None:
    batch = prepared(Chunk("a", [7, 8], 0, [5], sampling([7, 8], 2))).batch
    assert {batch.ids.dtype, batch.positions.dtype, batch.slots.dtype} == {torch.int64}
    assert {batch.block_tables.dtype, batch.query_starts.dtype, batch.lengths.dtype} == {torch.int32}


def test_a_batch_of_which_every_row_is_sampled_selects_none() -> None:
    ready = prepared(*(Chunk(name, [3], 5, [1], sampling([0] * 6, 2)) for name in "abc"))
    assert ready.batch.rows is None
    assert ready.batch.kind == "decode"


def test_a_chunk_with_nothing_to_sample() -> None:
    ready = prepared(Chunk("a", [1, 2, 3], 0, [0], None))
    assert ready.samples.count == 0
    assert ready.batch.rows is not None
    assert ready.batch.rows.tolist() == []
    assert ready.targets is None


def test_a_table_longer_than_needed_is_cut() -> None:
    assert prepared(Chunk("a", [1], 3, [6, 7, 8], None)).batch.block_tables.tolist() == [[6]]


def test_settings_row_by_row() -> None:
    ready = prepared(
        Chunk("a", [1], 9, [0], sampling([0] * 10, 3, temperature=0.5, top_k=4, seed=-3)),
        Chunk("b", [1], 4, [1], sampling([0] * 5, 3, temperature=0.0, top_p=0.5, top_k=-1, seed=1 << 62)),
        Chunk("c", [1], 4, [2], sampling([0] * 5, 3, min_p=0.25, logprobs=3)),
    )
    samples = ready.samples
    assert samples.temperature.tolist() == [0.5, 0.0, 1.0]
    assert samples.top_k.tolist() == [4, 0, 0]
    assert samples.top_p.tolist() == [1.0, 0.5, 1.0]
    assert samples.min_p.tolist() == [0.0, 0.0, 0.25]
    assert samples.seeds.tolist() == [-3, 1 << 62, 0]
    assert samples.positions.tolist() == [10, 5, 5]
    assert (samples.greedy, samples.cut, samples.alternatives) == (False, True, 3)
    assert samples.penalties is None


@pytest.mark.parametrize(
    ("params", "greedy", "cut"),
    [
        ([{"temperature": 0}], True, False),
        ([{"temperature": 0, "top_k": 5}], True, False),
        ([{}], False, False),
        ([{}, {"temperature": 0}], False, False),
        ([{"temperature": 0, "top_p": 0.5}, {}], False, False),
        ([{"top_p": 0.5}], False, True),
    ],
)
def test_work_that_no_row_needs_is_left_out(params: list[dict[str, Any]], greedy: bool, cut: bool) -> None:
    chunks = [Chunk(str(n), [1], 1, [n], sampling([0, 1], 1, **one)) for n, one in enumerate(params)]
    samples = prepared(*chunks).samples
    assert (samples.greedy, samples.cut) == (greedy, cut)


def test_penalties_and_biases_are_entries_of_their_rows() -> None:
    ready = prepared(
        Chunk("a", [1], 4, [0], sampling([5, 6, 5, 7, 7], 3, presence_penalty=1.0)),
        Chunk("b", [1], 4, [1], sampling([5, 6, 5, 7, 7], 3)),
        Chunk("c", [1], 4, [2], sampling([5, 6], 2, (8, 9), logit_bias={3: -1.5})),
    )
    assert ready.samples.penalties is not None
    rows, tokens, counts, in_output, presence, frequency, repetition, *biases = ready.samples.penalties.arguments
    assert list(zip(rows.tolist(), tokens.tolist(), counts.tolist(), in_output.tolist())) == [
        (0, 5, 0.0, 0.0),
        (0, 6, 0.0, 0.0),
        (0, 7, 2.0, 1.0),
    ]
    assert presence.tolist() == [1.0, 0.0, 0.0]
    assert frequency.tolist() == [0.0] * 3
    assert repetition.tolist() == [1.0] * 3
    assert list(zip(*(one.tolist() for one in biases))) == [(2, 3, -1.5), (2, 8, float("-inf")), (2, 9, float("-inf"))]


def test_prompt_tokens_to_be_scored_come_behind_the_sampled_rows() -> None:
    ready = prepared(
        Chunk("a", [1, 2, 3], 0, [0], None, 2, [2, 3, 4]),
        Chunk("b", [6, 7, 8], 16, [1, 2], sampling([0] * 19, 19), 0, [7, 8]),
        Chunk("c", [9], 4, [3], sampling([0] * 5, 2)),
    )
    assert ready.batch.rows is not None
    assert ready.batch.rows.tolist() == [5, 6, 0, 1, 2, 3, 4]
    assert ready.targets is not None
    assert ready.targets.tolist() == [2, 3, 4, 7, 8]
    assert ready.scored == [("a", 3, 2), ("b", 2, 0)]
    assert ready.sampled_ids == ["b", "c"]
