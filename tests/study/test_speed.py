"""The closing lines: what was fast, and against which limit."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from ridgeline import LLM, SamplingParams
from ridgeline.core.cost import Cost
from ridgeline.core.step import Spans, StepRecord
from ridgeline.perf.limit import Limit
from ridgeline.study import speed
from ridgeline.study.speed import Speed, SpeedReport, _Floor, percent

LIMIT = Limit("cpu", 1000, 4e9, 1e9, 1e12)
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def llm(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> LLM:
    monkeypatch.setattr(speed, "measure_limit", lambda device, size, dtype: LIMIT)
    return LLM(tiny, kernels="reference", dtype="float32")


def record(spans: tuple[tuple[int, int], ...], sampled: int) -> StepRecord:
    return StepRecord(1, "mixed", spans, 1, 0, 9, 0, 0.0, 0.0, 0.0, sampled=sampled)


@pytest.mark.parametrize(
    ("spans", "sampled"),
    [
        (((1, 5),), 1),
        (((1, 5), (1, 9)), 2),
        (((7, 7), (1, 9), (20, 40)), 3),
        (((100, 100),), 0),
        (((1, 40),) * 100, 100),
        (((50, 120), (1, 3)), 1),
    ],
)
def test_the_floor_from_chords_is_the_price_of_the_step(
    llm: LLM, spans: tuple[tuple[int, int], ...], sampled: int
) -> None:
    new, visible = zip(*spans)
    exact = llm.built.price.step(Spans(new, visible), sampled)
    found = _Floor(llm.built.price).of(record(spans, sampled))
    # A last norm that is run over the sampled rows alone is all that the two may differ by.
    assert found.flops == pytest.approx(exact.flops, rel=1e-3)
    assert found.bytes == pytest.approx(exact.bytes, rel=1e-2)


def test_one_prompt(llm: LLM) -> None:
    meter = Speed(llm.built)
    for part in llm.stream([[5, 6, 7]][0], SamplingParams(max_tokens=9, ignore_eos=True, temperature=0)):
        meter.part(len(part.token_ids))
    report = meter.report()
    assert not llm.built.engine.listeners
    assert (report.prompt_tokens, report.output_tokens, report.decode_tokens) == (3, 9, 8)
    assert report.prefill_s > 0
    assert 0 < report.first_token_s < report.first_token_s + report.decode_s
    costs = [llm.built.price.step(Spans((1,), (visible,)), 1) for visible in range(4, 12)]
    assert report.step_bytes == pytest.approx(sum(cost.bytes for cost in costs) / 8)
    expected = sum(max(cost.bytes / 4e9, cost.flops / 1e12) for cost in costs) / report.decode_s
    assert report.limit_share == pytest.approx(expected)
    assert report.dram_share == pytest.approx(4 * expected)


def test_a_prompt_of_one_token_has_a_prefill(llm: LLM) -> None:
    meter = Speed(llm.built)
    for part in llm.stream([5], SamplingParams(max_tokens=6, ignore_eos=True)):
        meter.part(len(part.token_ids))
    report = meter.report()
    assert (report.prompt_tokens, report.decode_tokens) == (1, 5)


def test_many_prompts(llm: LLM) -> None:
    meter, start = Speed(llm.built), time.perf_counter()
    params = SamplingParams(max_tokens=5, ignore_eos=True)
    outputs = llm.generate([[5, 6, 7]] * 3 + [list(range(3, 100))] * 2, params, use_tqdm=False)
    metrics = [output.metrics for output in outputs if output.metrics is not None]
    report = meter.report_all(metrics, time.perf_counter() - start)
    assert report.prompt_tokens + sum(one.num_cached_tokens for one in metrics) == 3 * 3 + 2 * 97
    assert (report.output_tokens, report.decode_tokens) == (25, 20)
    assert report.limit_share is not None
    assert 0 < report.limit_share < 1
    assert "(median)" in report.lines()[0]


def test_nothing_ran(llm: LLM) -> None:
    report = Speed(llm.built).report_all([], 0.1)
    assert report.limit_share is None
    assert report.as_dict()["limit_share"] is None
    assert "too few" in report.lines()[1]


def test_lines() -> None:
    report = SpeedReport(
        prompt_tokens=100, prefill_s=0.5, first_token_s=0.6, prompts=1, output_tokens=51, decode_tokens=50,
        decode_s=2.0, limit_share=0.625, dram_share=2.5, step_bytes=3e6, limit=LIMIT,
    )  # fmt: skip
    assert report.lines() == [
        "prefill 100 tokens, 200 tok/s, first token after 600.0 ms",
        "decode 50 tokens, 25 tok/s, 62 % of the limit",
        "  limit: 3.0 MB a step at 4 GB/s, measured at this working set; "
        "250 % of what main memory alone (1 GB/s) allows",
    ]
    assert report.as_dict()["decode_tokens_per_s"] == 25


def test_percent() -> None:
    assert [percent(share) for share in (0, 0.0004, 0.0345, 0.0996, 0.623, 1.2)] == [
        "0 %", "0.04 %", "3.5 %", "10 %", "62 %", "120 %"
    ]  # fmt: skip


def test_a_limit_is_the_slower_of_bytes_and_flops() -> None:
    assert LIMIT.seconds(Cost(flops=1e12, read_bytes=4e9)) == 1.0
    assert LIMIT.seconds(Cost(flops=5e12, read_bytes=4e9)) == 5.0
    assert LIMIT.dram_seconds(Cost(flops=1e12, read_bytes=3e9, write_bytes=1e9)) == 4.0
