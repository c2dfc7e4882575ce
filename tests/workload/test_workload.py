"""Arrivals, the driver on a virtual clock, figures against arithmetic by hand, the search for capacity."""

from __future__ import annotations

import itertools
import statistics
from dataclasses import replace
from pathlib import Path

import pytest

from ridgeline.core.errors import InvalidArgument
from ridgeline.core.step import Spans
from ridgeline.engine.virtual import Setting
from ridgeline.study.simulate import capacity, simulate, sustained
from ridgeline.workload.arrivals import Job, equal, gamma, poisson, prompt_ids, replay, scaled, stretched
from ridgeline.workload.measure import Served, objectives_named, report

SETTING = Setting(num_blocks=256, block_size=16, max_model_len=512, max_num_seqs=8, max_num_batched_tokens=64)


def flat(spans: Spans, rows: int) -> float:
    """A step takes 10 ms and 1 ms a token."""
    return 0.01 + 0.001 * sum(spans.new)


def test_poisson_and_bursts() -> None:
    jobs = equal(4000, 8, 8)
    even, bursts = poisson(jobs, 50.0), gamma(jobs, 50.0, 0.25)
    for arrivals, variation in ((even, 1.0), (bursts, 2.0)):
        gaps = [b.arrival_s - a.arrival_s for a, b in itertools.pairwise(arrivals)]
        assert statistics.mean(gaps) == pytest.approx(1 / 50, rel=0.1)
        assert statistics.stdev(gaps) / statistics.mean(gaps) == pytest.approx(variation, rel=0.1)
    assert poisson(jobs, 50.0) == even
    assert poisson(jobs, 50.0, seed=1) != even
    with pytest.raises(InvalidArgument, match="request_rate: must be above 0"):
        poisson(jobs, 0.0)


def test_azure_and_mooncake_traces(tmp_path: Path) -> None:
    azure = tmp_path / "azure.csv"
    azure.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.9951690,396,109\n"
    )
    assert [(one.prompt_tokens, one.output_tokens) for one in replay(azure)] == [(374, 44), (396, 109)]
    assert replay(azure)[1].arrival_s == pytest.approx(4.314579, abs=1e-5)
    mooncake = tmp_path / "mooncake.jsonl"
    mooncake.write_text(
        '{"timestamp": 1000, "input_length": 600, "output_length": 5, "hash_ids": [7, 8]}\n'
        '{"timestamp": 4000, "input_length": 700, "output_length": 6, "hash_ids": [7, 9]}\n'
    )
    first, second = replay(mooncake)
    assert second.arrival_s == 3
    one, two = prompt_ids(first, 0, 100), prompt_ids(second, 1, 100)
    assert len(one) == 600
    assert one[:512] == two[:512]
    assert one[512:] != two[512:600]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "TIMESTAMP,ContextTokens\n2023-11-16 18:15:46,3\n", "line 2: no field 'GeneratedTokens'"),
        ("a.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\nsoon,3,4\n", "line 2: Invalid isoformat"),
        ("a.jsonl", '{"timestamp": 0}\n', "line 1: no field 'input_length'"),
        ("a.jsonl", "", "has 0 requests, at least one"),
    ],
)
def test_a_bad_trace_names_file_and_line(name: str, text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(InvalidArgument, match=message):
        replay(path)


def test_scaling_and_stretching() -> None:
    jobs = [Job(4000, 10, 1.0, (1, 2)), Job(100, 4000, 3.0)]
    small = scaled(jobs, 4, (8, 500), (4, 384))
    assert [(one.prompt_tokens, one.output_tokens, one.prefix) for one in small] == [(500, 4, ()), (25, 384, ())]
    assert [one.arrival_s for one in stretched(jobs, 2)] == [2, 6]


def test_one_request_alone_takes_its_steps() -> None:
    """100 prompt tokens in chunks of 64 and 36, then four decode steps of one token."""
    found = simulate([Job(100, 5, 2.0)], SETTING, flat)
    one = found.served[0]
    assert one.ttft_s == pytest.approx(0.01 + 0.064 + 0.01 + 0.036)
    assert one.tpot_s == pytest.approx(0.011)
    assert found.report.output_tokens == 5
    assert found.report.itl is not None
    assert found.report.itl.count == 4


def test_batches_share_steps_and_queues_form() -> None:
    found = simulate([Job(4, 50)] * 16, SETTING, flat, keep_steps=True)
    assert max(step.running for step in found.steps) == 8
    first, last = found.served[0], found.served[-1]
    assert last.ttft_s > first.e2e_s * 0.9  # the second eight wait for the first to end
    busy = sum(step.device_s for step in found.steps)
    assert found.report.seconds == pytest.approx(busy)


def test_a_closed_loop_keeps_its_concurrency() -> None:
    found = simulate(equal(12, 8, 20), SETTING, flat, concurrency=3, keep_steps=True)
    assert {step.running + step.waiting for step in found.steps} <= {0, 1, 2, 3}
    assert found.report.failed == 0
    assert found.served[3].arrival_s >= min(one.token_times_s[-1] for one in found.served[:3])


def test_jobs_that_cannot_run_fail_alone() -> None:
    found = simulate([Job(600, 4), Job(8, 4)], SETTING, flat)
    assert found.report.failed == 1
    assert "max_model_len 512" in (found.served[0].error or "")
    assert len(found.served[1].token_times_s) == 4


def test_figures_by_hand() -> None:
    served = [Served(10, 0.0, [1.0, 1.5, 2.5]), Served(20, 1.0, [2.0])]
    found = report(served, {"ttft": 1.0, "tpot": 0.5})
    assert found.seconds == 2.5
    assert found.ttft is not None
    assert found.ttft.p50 == 1.0
    assert found.tpot is not None
    assert found.tpot.mean == 0.75
    assert found.itl is not None
    assert found.itl.mean == 0.75
    assert found.output_rate == 4 / 2.5
    assert found.goodput == 1 / 2.5  # the second has no TPOT and a TTFT of 1 s
    assert set(found.as_dict()["formulas"]) >= {"ttft", "tpot", "itl", "e2e", "goodput"}


def test_objectives() -> None:
    assert objectives_named("ttft=500ms, tpot=50ms,e2e=2s") == {"ttft": 0.5, "tpot": 0.05, "e2e": 2.0}
    for bad in ("ttft", "speed=3ms", "tpot=fast", "tpot=50", "tpot=-1ms"):
        with pytest.raises(InvalidArgument, match="slo"):
            objectives_named(bad)


def test_capacity_is_the_knee() -> None:
    """Steps of at least 11 ms: within a TTFT of 200 ms the rate must lie below saturation, and just below it."""
    jobs = equal(200, 16, 16)
    found = capacity(jobs, SETTING, flat, {"ttft": 0.2})
    meets = {one.rate_per_s: one.share >= 0.99 and one.sustained for one in found.tried}
    assert meets[found.rate_per_s]
    assert all(not met for rate, met in meets.items() if rate > found.rate_per_s * 1.001)
    full = simulate(jobs, SETTING, flat).report.request_rate
    assert 0.3 * full < found.rate_per_s < full
    with pytest.raises(InvalidArgument, match=r"no load meets it: the best reachable .* is ttft 26"):
        capacity(jobs, SETTING, flat, {"ttft": 0.001})


def test_a_rate_that_piles_up_is_no_capacity() -> None:
    """Twenty requests are all served within a second, however fast they come: that shows no rate that can go on."""
    jobs = equal(20, 16, 16)
    found = capacity(jobs, SETTING, flat, {"e2e": 60.0})
    assert found.rate_per_s < 1.2 * simulate(jobs, SETTING, flat).report.request_rate
    piled = [one for one in found.tried if not one.sustained]
    assert piled
    assert all(one.share == 1 for one in piled)


def test_sustained_by_hand() -> None:
    def served(*times: tuple[float, float]) -> list[Served]:
        return [Served(4, arrival, token_times_s=[end]) for arrival, end in times]

    steady = [(float(second), second + 0.5) for second in range(40)]
    growing = [(float(second), 3.0 * second + 3) for second in range(40)]
    assert sustained(served(*steady))
    assert not sustained(served(*growing))
    assert sustained(served((0.0, 1.0)))


def test_a_static_batch_waits_until_it_is_full() -> None:
    """Eight seats, arrivals a second apart: the first batch starts with the eighth, the rest with the last."""
    setting = replace(SETTING, scheduling_policy="static")
    found = simulate([Job(4, 3, float(second)) for second in range(10)], setting, flat)
    assert found.served[0].ttft_s == pytest.approx(7 + 0.01 + 8 * 0.004, abs=1e-3)
    assert found.served[8].ttft_s == pytest.approx(1 + 0.01 + 2 * 0.004, abs=1e-3)
    closed = simulate([Job(4, 3)] * 6, setting, flat, concurrency=2)
    assert closed.report.failed == 0
