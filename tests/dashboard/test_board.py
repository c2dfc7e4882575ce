"""The board: what steps and requests become, and that a snapshot is plain JSON at any time."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from standin import FACTS, ROOFLINE, Time, lively

from ridgeline.core.cost import Cost
from ridgeline.core.step import StepRecord, Verified
from ridgeline.core.tree import TokenTree
from ridgeline.dashboard.board import HISTORY_S, Board, Now, Step

STEP = Step(
    kind="decode", output_tokens=4, prompt_tokens=0, device_s=0.004, predicted_s=0.0035, running=4, waiting=1,
    free_blocks=7000, flops=60e9, bytes=15e9,
)  # fmt: skip


def plain(board: Board, now: Now | None = None) -> dict[str, Any]:
    """A snapshot as it arrives on the other side."""
    found: dict[str, Any] = json.loads(json.dumps(board.snapshot(now), allow_nan=False))
    return found


def test_an_engine_that_did_nothing_yet() -> None:
    found = plain(Board(FACTS, Time()))
    assert found["state"] == "ready"
    assert found["now"]["output_tokens_per_s"] == found["now"]["running"] == found["now"]["kv_usage"] == 0
    assert found["now"]["prefix_hit_rate"] is None
    assert found["prediction"] is found["speculation"] is found["roofline"]["all"] is None
    assert found["roofline"]["ridge"] == pytest.approx(ROOFLINE.ridge)
    assert found["engine"]["kv_tokens"] == 512_000


def test_rates_are_over_whole_seconds() -> None:
    clock = Time()
    board = Board(FACTS, clock)
    for second in range(10):
        clock.now_s = second + 0.5
        for _ in range(second):  # more every second
            board.step(replace(STEP, prompt_tokens=100, kind="mixed"))
    clock.now_s = 10.0
    now = plain(board)["now"]
    assert now["output_tokens_per_s"] == 4 * (5 + 6 + 7 + 8 + 9) / 5
    assert now["prompt_tokens_per_s"] == 100 * 7
    assert now["steps_per_s"] == 7
    assert now["busy"] == pytest.approx(7 * 0.004)
    assert now["kv_usage"] == pytest.approx(1000 / 8000)
    clock.now_s = 20.0
    assert plain(board)["now"]["output_tokens_per_s"] == 0


def test_the_first_second_counts_as_it_runs() -> None:
    clock = Time()
    board = Board(FACTS, clock)
    clock.now_s = 0.5
    board.step(STEP)
    assert plain(board)["now"]["output_tokens_per_s"] == pytest.approx(8)


def test_curves_keep_what_an_idle_engine_holds_and_nothing_else() -> None:
    clock = Time()
    board = Board(FACTS, clock)
    clock.now_s = 2.5
    board.step(STEP)
    clock.now_s = 6.0
    series = plain(board)["series"]
    assert series["output_tokens"] == [0, 0, 4, 0, 0, 0]
    assert series["running"] == [0, 0, 4, 4, 4, 4]
    assert series["waiting"] == [0, 0, 1, 1, 1, 1]
    assert series["kv_usage"] == [0, 0, *[0.125] * 4]
    assert series["prefix_hits"] == [None] * 6
    clock.now_s = 1000.0
    series = plain(board)["series"]
    assert [len(series[name]) for name in ("output_tokens", "running", "kv_usage")] == [HISTORY_S] * 3
    assert set(series["output_tokens"]) == {0}
    assert set(series["running"]) == {4}


def test_prefix_hits_second_by_second() -> None:
    clock = Time()
    board = Board(FACTS, clock)
    board.step(STEP)
    clock.now_s = 2.0
    board.finished("stop", prompt_tokens=300, cached_tokens=256)
    board.finished("stop", prompt_tokens=100)
    clock.now_s = 4.0
    series = plain(board)["series"]
    assert series["prefix_hits"] == [None, None, 0.64, None]
    assert series["running"] == [4, 4, 4, 4]


def test_the_server_knows_better_who_is_in_flight() -> None:
    board = Board(FACTS, Time())
    board.step(STEP)
    assert (plain(board)["now"]["running"], plain(board)["now"]["waiting"]) == (4, 1)
    found = plain(board, Now("draining", 3, 9))
    assert (found["state"], found["now"]["running"], found["now"]["waiting"]) == ("draining", 3, 9)


def test_an_operating_point_is_its_steps_together() -> None:
    clock = Time()
    board = Board(FACTS, clock)
    board.step(STEP)  # 15 GB take 3.125 ms at 4.8 TB/s
    board.step(replace(STEP, device_s=0.008))
    board.step(replace(STEP, kind="prefill", flops=9.89e12, bytes=16e9, device_s=0.0125))  # 10 ms at 989 TFLOP/s
    roofline = plain(board)["roofline"]
    decode, prefill = roofline["points"]["decode"], roofline["points"]["prefill"]
    assert decode["share"] == pytest.approx(2 * 0.003125 / 0.012)
    assert (decode["bound"], decode["steps"]) == ("memory", 2)
    assert decode["bytes_per_s"] == pytest.approx(30e9 / 0.012)
    assert (prefill["share"], prefill["bound"]) == (pytest.approx(0.8), "compute")
    assert roofline["all"]["share"] == pytest.approx((0.00625 + 0.01) / 0.0245)
    assert roofline["steps"]["decode"] == [[4.0, 15e12], [4.0, 7.5e12]]
    clock.now_s = 60.0
    roofline = plain(board)["roofline"]
    assert roofline["points"] == {}
    assert roofline["all"] is None
    assert len(roofline["steps"]["decode"]) == 2


def test_without_roofs_or_cost_or_time_there_is_no_point() -> None:
    board = Board(replace(FACTS, roofline=None), Time())
    board.step(STEP)
    assert plain(board)["roofline"] is None
    board = Board(FACTS, Time())
    board.step(replace(STEP, flops=0.0, bytes=0.0))
    board.step(replace(STEP, device_s=0.0))
    assert plain(board)["roofline"]["points"] == {}


def test_errors_of_predictions() -> None:
    board = Board(FACTS, Time())
    for predicted in (0.003, 0.0036, 0.0038, 0.004, 0.0044):
        board.step(replace(STEP, predicted_s=predicted))
    board.step(replace(STEP, predicted_s=None))
    found = plain(board)["prediction"]
    assert len(found["steps"]["decode"]) == 5
    assert found["median_error"] == pytest.approx(0.1)
    assert found["p90_error"] == pytest.approx(0.25)
    assert found["median_bias"] == pytest.approx(-0.05)


def test_times_of_requests_and_prefix_hits() -> None:
    clock = Time()
    board = Board(FACTS, clock)
    board.first_token(0.020)
    board.finished("stop", prompt_tokens=300, cached_tokens=256, tpot_s=0.005)
    board.finished("length", prompt_tokens=100, tpot_s=None)
    board.finished("refused")
    found = plain(board)
    assert (found["ttft"]["count"], found["tpot"]["count"]) == (1, 1)
    assert found["now"]["prefix_hit_rate"] == pytest.approx(0.64)
    assert found["totals"]["requests"] == {"stop": 1, "length": 1, "refused": 1}
    clock.now_s = 301.0
    assert plain(board)["now"]["prefix_hit_rate"] is None


TREE = TokenTree((5, 6, 7, 8), (-1, 0, 0, -1))


def of_trees(device_s: float = 0.006, draft_s: float = 0.002, **values: Any) -> StepRecord:
    """Three requests, two of them with a tree: one accepted down to a leaf, one not at all."""
    known: dict[str, Any] = {
        "number": 3, "kind": "tree", "spans": ((5, 90), (5, 40), (1, 30)), "running": 3, "waiting": 0,
        "free_blocks": 10, "preempted": 0, "start_s": 0.0, "host_s": 0.001, "sampled": 3, "drafted": 8, "accepted": 2,
        "verified": (Verified(9, TREE, []), Verified(4, TREE, [0, 2])),
    }  # fmt: skip
    return StepRecord(device_s=device_s, draft_s=draft_s, **{**known, **values})


def test_speculation_is_told_of_once_there_was_a_draft() -> None:
    clock = Time()
    board = Board(replace(FACTS, word="w{}".format), clock)
    board.step(STEP)
    assert plain(board)["speculation"] is None
    clock.now_s = 2.5
    board.step(Step.of(of_trees()))
    clock.now_s = 4.0
    board.step(STEP)
    found = plain(board)["speculation"]
    assert (found["steps"], found["drafted"], found["accepted"]) == (1, 8, 2)
    assert (found["acceptance"], found["tokens_per_step"]) == (0.25, pytest.approx(5 / 3))
    assert (found["draft_s"], found["draft_share"]) == (0.002, 0.25)
    assert found["by_depth"] == [0.5, 0.5]
    assert found["series"] == {
        "acceptance": [None, None, 0.25, None],
        "tokens_per_step": [None, None, 1.667, None],
        "draft_share": [None, None, 0.25, None],
    }
    words = ["w5", "w6", "w7", "w8"]
    assert found["tree"] == {"root": "w4", "words": words, "parents": [-1, 0, 0, -1], "accepted": [0, 2]}
    clock.now_s = 4.0 + HISTORY_S
    found = plain(board)["speculation"]
    assert (found["steps"], found["acceptance"], found["draft_s"], found["by_depth"]) == (0, None, None, [])
    assert found["tree"]["words"] == words


def test_drafts_that_are_told_of_in_sum_have_no_depths_and_no_tree() -> None:
    board = Board(FACTS, Time())
    board.step(Step.of(of_trees(verified=())))
    found = plain(board)["speculation"]
    assert found["tokens_per_step"] == pytest.approx(5 / 3)
    assert found["by_depth"] == []
    assert found["tree"] is None


def test_a_tree_without_words_where_they_must_not_be_shown() -> None:
    board = Board(replace(FACTS, word=None), Time())
    board.step(Step.of(of_trees()))
    tree = plain(board)["speculation"]["tree"]
    assert tree == {"root": None, "words": None, "parents": [-1, 0, 0, -1], "accepted": [0, 2]}


def test_a_record_is_told_in_fewer_words() -> None:
    record = StepRecord(
        number=3, kind="mixed", spans=((1, 90), (1, 30), (512, 512), (40, 552)), running=4, waiting=2, free_blocks=10,
        preempted=1, start_s=0.0, host_s=0.001, device_s=0.02, predicted_s=0.019, sampled=3,
    )  # fmt: skip
    step = Step.of(record, Cost(flops=2e9, read_bytes=3e9, write_bytes=1e9))
    assert (step.prompt_tokens, step.output_tokens, step.flops, step.bytes) == (552, 3, 2e9, 4e9)
    assert (step.running, step.waiting, step.free_blocks, step.preempted) == (4, 2, 10, 1)
    assert (Step.of(record).flops, Step.of(record).bytes) == (0.0, 0.0)
    step = Step.of(of_trees())
    assert (step.prompt_tokens, step.output_tokens, step.rows, step.depths) == (0, 5, 3, (0, 2))
    assert Step.of(of_trees(spans=((5, 90), (5, 40), (1, 30), (64, 64)))).prompt_tokens == 64


def test_a_busy_day_stays_small() -> None:
    """Memory and message do not grow with time: a page is looked at for hours."""
    clock = Time()
    board = Board(FACTS, clock)
    lively(board, clock, 400)
    early = len(json.dumps(board.snapshot()))
    lively(board, clock, 400, seed=8)
    late = len(json.dumps(board.snapshot()))
    assert late < 64_000
    assert late < 1.1 * early
