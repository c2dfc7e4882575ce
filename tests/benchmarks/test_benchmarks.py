"""Each benchmark's core on a tiny model: it runs, counts what it should, and writes what the house asks for."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import (
    decode_cpu,
    gpu_baseline,
    gpu_decode,
    gpu_prompts,
    gpu_seeds,
    kv_cache,
    qwen3_bandwidth,
    record,
    run,
    simulate_cpu,
    startup,
    trace_cpu,
)
from benchmarks.models import TINY_SHAPE, random_checkpoint
from benchmarks.trace import azure_jobs, prompts_for, spread
from ridgeline.kv.layout import KVLayout
from ridgeline.perf.card import load_card
from ridgeline.workload.measure import Served, report


@pytest.fixture(scope="module")
def tiny() -> Path:
    return random_checkpoint(TINY_SHAPE)


@pytest.fixture
def bench(tiny: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Runs a benchmark quickly on the tiny model and returns the file that it wrote."""

    def go(module: Any, *arguments: str) -> dict[str, Any]:
        out = tmp_path / "result.json"
        module.main(["--quick", "--rounds", "2", "--threads", "1", "--model", str(tiny), "--out", str(out), *arguments])
        return json.loads(out.read_text(encoding="utf-8"))

    return go


def test_decode(bench: Callable[..., dict[str, Any]]) -> None:
    result = bench(decode_cpu)
    assert result["summary"]["prompt 16"]["same_tokens"] == 1.0
    runs = result["timings"]["prompt 48"]
    assert set(runs) == set(decode_cpu.ARMS)
    assert all(len(one["stamps_s"]) == 8 for arm in runs.values() for one in arm)
    assert all(len(arm) == 2 for arm in runs.values())
    assert [one["met"] for one in result["targets"]] in ([True], [False])


def test_trace(bench: Callable[..., dict[str, Any]]) -> None:
    result = bench(trace_cpu)
    assert result["summary"]["against padded batches"]["same_outputs_as_sorted"] == 1.0
    total = sum(result["settings"]["output_tokens"])
    for title in list(result["summary"])[1:]:
        for runs in result["timings"][title].values():
            assert [sum(map(len, one["stamps_s"])) for one in runs] == [total, total]
    assert len(result["summary"]) == 3


def test_simulate(bench: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    card = tmp_path / "card.json"
    result = bench(simulate_cpu, "--card", str(card))
    lines = {f"simulated {name} against real": limit for name, limit in simulate_cpu.TOLERANCES.items()}
    alone = {
        f"{name} by the card alone, against rounds 1 to 1": limit for name, limit in simulate_cpu.TOLERANCES.items()
    }
    assert {one["line"]: one["target"] for one in result["targets"][2:]} == {
        line: f"within {limit:.0%}" for line, limit in {**alone, **lines}.items()
    }
    cells = result["summary"]["simulated against real"]
    for name, cell in cells.items():
        (only,) = cell["rounds"]
        assert cell["error"][0] == pytest.approx(only["simulated"] / only["real"] - 1)
        line = f"simulated {name} against real"
        met = next(one["met"] for one in result["targets"] if one["line"] == line)
        assert met == (abs(cell["error"][0]) <= lines[line])
    (speed,) = result["summary"]["slower than the card, by round"]
    assert {"all", "decode of few", "host"} <= set(speed)
    assert set(result["summary"]["closed loop, requests/s"]) == {"real", "by the card", "at the speed of its steps"}
    assert len(result["summary"]["beside the rounds, by the card and real, seconds in steps"]) == 2
    assert result["summary"]["real"][0]["output_tokens"] == result["summary"]["simulated"][0]["output_tokens"]
    assert result["summary"]["steps"][-1]["kind"] == "all"
    assert load_card(card).sha256 == result["settings"]["card_sha256"]
    again = bench(simulate_cpu, "--card", str(card))
    assert again["settings"]["card_sha256"] == result["settings"]["card_sha256"]


def test_rounds_are_added_until_they_agree() -> None:
    def run(rate: float) -> simulate_cpu.Run:
        served = [Served(4, 0.0, [0.1, 0.1 + 1 / rate])]
        return simulate_cpu.Run(served, [], report(served))

    def done(real: float, simulated: float) -> simulate_cpu.Round:
        return simulate_cpu.Round(run(real), run(simulated), run(simulated), simulate_cpu.AS_THE_CARD)

    assert simulate_cpu.steady([done(10.0, 10.0), done(10.0, 10.1)])
    assert simulate_cpu.steady([done(10.0, 10.0), done(20.0, 20.1)]), "the machine's own speed is no error"
    assert not simulate_cpu.steady([done(10.0, 10.0), done(10.0, 11.0)])


def test_real_rounds_that_agree() -> None:
    def of(factor: float) -> dict[str, float]:
        return dict.fromkeys(simulate_cpu.TOLERANCES, factor) | {"output tokens/s": 1.0}

    real = [of(1.0), of(1.06), of(1.02), of(1.0), of(1.04)]
    assert simulate_cpu.first_alike(real, 3) == 2
    assert simulate_cpu.first_alike(real[:4], 3) is None, "6 % are more than half of 10 %"
    assert simulate_cpu.first_alike(real, 6) is None


def test_a_verdict_that_noise_leaves_open_is_none() -> None:
    verdict, noisy = simulate_cpu.verdict, [0.3, -0.2, 0.05, 0.4, -0.3]
    assert verdict([0.04, 0.05, 0.06], noisy, 0.1, agree=True)
    assert verdict([0.2, 0.2], [0.01, 0.02], 0.1, agree=True) is False
    assert verdict(noisy, [0.02, 0.09, 0.03, -0.02, 0.04, 0.05], 0.1, agree=False)
    assert verdict(noisy, noisy, 0.1, agree=False) is None, "nothing says that it is not chance"
    assert verdict([0.3, -0.2, 0.15, 0.4, -0.3], [0.01, 0.02, 0.03], 0.1, agree=False) is None, "the median is out"
    assert verdict([0.3, 0.2, 0.4, 0.25, 0.3], [0.01, 0.02, 0.03], 0.1, agree=False) is False
    assert verdict([0.03, 0.02, -0.01], [-0.3, -0.2, -0.25], 0.1, agree=False) is False


def test_kv_cache(bench: Callable[..., dict[str, Any]]) -> None:
    result = bench(kv_cache)
    cell = result["summary"]["length 64"]
    assert cell["activation_bytes_of_a_step"]["without"] > 10 * cell["activation_bytes_of_a_step"]["with"]
    paged = [result["summary"]["paging"][f"block {size}"]["wasted_share"]["paged"] for size in kv_cache.BLOCK_SIZES]
    assert paged == sorted(paged)


def test_paging_is_counted_block_by_block() -> None:
    """One request, by hand: 20 prompt tokens and 3 steps in blocks of 16 hold two blocks throughout."""
    layout = KVLayout(1, 1, 8, 4, 16)
    jobs = [trace_cpu.Job(20, 3, 0.0)]
    waste = kv_cache.run_without_model(jobs, layout, context=64, seats=2, batched=64)
    assert (waste.steps, waste.held) == (3, 3 * 2 * layout.bytes_per_block)
    assert waste.used == (20 + 21 + 22) * layout.bytes_per_token
    assert waste.reserved_context == 3 * 64 * layout.bytes_per_token
    assert waste.reserved_request == 3 * 23 * layout.bytes_per_token


def test_bandwidth(bench: Callable[..., dict[str, Any]]) -> None:
    result = bench(qwen3_bandwidth, "--dtypes", "float32")
    cell = result["summary"]["float32"]
    layers = 2 * (128 * 2 * 64 + 2 * 128 * 64 + 2 * 64 * 128 + 3 * 128 * 256 + 2 * 128 + 2 * 64)
    assert cell["weight_bytes"] == 4 * (512 * 128 + layers + 128)
    assert {"sum (torch, fp32)", "copy (torch)", "GEMV (torch)", "decode"} <= set(cell["rates"])


def test_gpu_baseline_on_a_cpu(bench: Callable[..., dict[str, Any]]) -> None:
    result = bench(gpu_baseline, "--device", "cpu", "--kernels", "reference")
    assert result["settings"]["weights"].endswith("the same tensors on both sides")
    assert set(result["timings"]["batch 3"]) == {"ridgeline", "DynamicCache", "StaticCache"}
    assert [len(one) for one in result["timings"]["batch 3"]["ridgeline"]] == [3, 3]
    assert result["summary"]["greedy_tokens_that_agree"] > 0.2
    assert all(one["met"] is None for one in result["targets"])


def test_gpu_decode_on_a_cpu(bench: Callable[..., dict[str, Any]]) -> None:
    """Without graphs, which a CPU has not; the steps of both arms bring every request its tokens."""
    result = bench(gpu_decode, "--device", "cpu", "--kernels", "reference")
    assert set(result["timings"]["batch 3"]) == {"op by op", "op by op, overlap"}
    assert [len(one) for one in result["timings"]["batch 3"]["op by op, overlap"]] == [3, 3]
    assert result["summary"]["batch 3"]["floor_s"] > 0
    assert result["targets"] == []


def test_gpu_prompts_on_a_cpu(tmp_path: Path) -> None:
    """Where nothing is captured both arms run op by op."""
    out = tmp_path / "result.json"
    quick = ["--quick", "--rounds", "2", "--threads", "1", "--device", "cpu", "--kernels", "reference"]
    gpu_prompts.main([*quick, "--models", "llama-3.1-8b", "--out", str(out)])
    result = json.loads(out.read_text(encoding="utf-8"))
    assert set(result["timings"]) == {f"llama-3.1-8b {one}" for one in ("8", "20", "32 decode + 8")}
    assert all(len(arm) == 2 for cell in result["timings"].values() for arm in cell.values())
    assert result["summary"]["llama-3.1-8b"]["sizes"] == 0
    assert len(result["targets"]) == 1


def test_gpu_seeds_on_a_cpu(bench: Callable[..., dict[str, Any]]) -> None:
    """On a CPU no neighbour changes a token, with the mode or without: what would be reported as different is none."""
    result = bench(gpu_seeds, "--device", "cpu")
    none = {
        "requests": 4,
        "requests_that_differ": 0,
        "first_differences": [],
        "differences_a_token": 0.0,
        "same_when_the_batch_is_repeated": 4,
        "same_alone_in_chunks": 4,
        "same_with_the_prefix_found": 4,
    }
    price = result["summary"].pop("price")
    assert result["summary"] == {mode: {"float32": none} for mode in gpu_seeds.MODES}
    assert [one["met"] for one in result["targets"]] == [True]
    assert result["settings"]["new_tokens"] == 8
    for mode in gpu_seeds.MODES:
        assert len(price[mode]) == 3
        assert all(len(times) == 2 and min(times) > 0 for times in result["timings"][mode].values())


def test_the_first_difference_is_where_tokens_part() -> None:
    assert gpu_seeds.first([1, 2, 3], [1, 2, 3]) is None
    assert gpu_seeds.first([1, 2, 3], [1, 5, 4]) == 1


def test_a_process_is_timed_to_the_first_byte_after_the_prompt() -> None:
    code = (
        "import sys, time\n"
        f"sys.stdout.write({startup.PROMPT!r}); sys.stdout.flush(); time.sleep(0.3)\n"
        "sys.stdout.write('x'); sys.stdout.flush(); time.sleep(0.3); print('y')"
    )
    taken = startup.start([sys.executable, "-S", "-c", code], cores=1)
    assert taken.first_token_s - taken.loaded_s == pytest.approx(0.3, abs=0.2)
    assert taken.whole_s > taken.first_token_s + 0.25
    assert taken.peak_bytes >= taken.peak_at_first_token_bytes > 1 << 20
    with pytest.raises(RuntimeError, match="out of luck"):
        startup.start([sys.executable, "-S", "-c", "raise SystemExit('out of luck')"], cores=1)


@pytest.mark.slow
def test_startup(bench: Callable[..., dict[str, Any]]) -> None:
    result = bench(startup)
    assert 0 < result["summary"]["loaded_s"][0] <= result["summary"]["first_token_s"][0]


@pytest.mark.slow
def test_the_suite_ends_with_a_table(tiny: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run.main(["kv_cache", "--quick", "--model", str(tiny), "--threads", "1"]) == 0
    shown = capfd.readouterr().out
    assert "The issue's lines" in shown
    assert "recorded" in shown


# The parts they share


def test_trace_lengths_are_those_of_the_issue() -> None:
    jobs = azure_jobs(32)
    assert [(job.prompt_tokens, job.output_tokens) for job in jobs[:4]] == [(93, 11), (99, 27), (219, 13), (22, 4)]
    assert all(8 <= job.prompt_tokens <= 1536 and 4 <= job.output_tokens <= 384 for job in azure_jobs(512))
    assert jobs[1].arrival_s == pytest.approx(4.314579)
    assert spread(jobs, 2.0)[-1].arrival_s == pytest.approx(2.0)
    assert spread(jobs, 0.0)[-1].arrival_s == 0.0
    assert [len(one) for one in prompts_for(jobs, 50, 1)] == [job.prompt_tokens for job in jobs]
    with pytest.raises(ValueError, match="512 rows"):
        azure_jobs(600)


def test_intervals() -> None:
    assert record.interval([2.0]) == (2.0, 2.0, 2.0)
    middle = record.interval([1.0, 2.0, 3.0, 4.0, 100.0])
    assert middle.median == 3.0
    assert 1.0 <= middle.low < 3.0 < middle.high <= 100.0
    assert record.ratios([2.0, 6.0], [1.0, 2.0]).median == 2.5
    assert record.quantile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert math.isclose(record.quantile([0.0, 1.0], 0.99), 0.99)


def test_arms_alternate_and_warm_up_alike() -> None:
    seen: list[tuple[str, int]] = []

    def arm(name: str) -> Callable[[int], int]:
        return lambda number: seen.append((name, number)) or number

    results = record.alternate({"a": arm("a"), "b": arm("b")}, rounds=2)
    assert results == {"a": [0, 1], "b": [0, 1]}
    assert seen == [("b", -1), ("a", -1), ("a", 0), ("b", 0), ("b", 1), ("a", 1)]


def test_a_result_says_where_and_how(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = record.parser("x").parse_args(["--out", str(tmp_path), "--commit", "abc"])
    paths = []
    for _ in range(2):
        one = record.Record("name", options)
        one.timings["raw"] = [0.1, 0.2]
        one.table("title", ["side", "rate"], [["ours", record.losing("1", True)], ["theirs", "2"]])
        one.target("line", "≥ 1", "0.5", False)
        paths.append(one.close())
    assert paths[0] is not None
    assert paths[1] is not None
    assert paths[1].name == f"{one.started:%Y-%m-%d}-name-2.json"
    result = json.loads(paths[0].read_text(encoding="utf-8"))
    assert {"machine", "versions", "commit", "command", "date", "loads", "timings", "settings"} <= set(result)
    assert result["machine"]["cpus"] >= 1
    assert result["commit"] == {"id": "abc", "dirty": None}
    assert result["versions"]["torch"] == torch.__version__.split("+")[0] or "torch" in result["versions"]
    shown = capsys.readouterr().out
    assert "NOT MET" in shown
    assert "! 1" in shown


def test_quick_results_are_not_kept(capsys: pytest.CaptureFixture[str]) -> None:
    options = argparse.Namespace(quick=True, out=None, machine=None, commit=None)
    assert record.Record("name", options).close() is None
    assert "nothing is written" in capsys.readouterr().out


def test_json_keeps_lists_of_numbers_on_a_line() -> None:
    value = {"raw": [[1, 2], [3]], "empty": {}, "deep": {"a": [{"b": [1.5]}]}, "text": "ü"}
    text = record.compact(value)
    assert json.loads(text) == value
    assert "[1, 2]" in text


def test_without_rich_tables_are_plain(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "rich.console", None)
    record.show_table("title", ["side", "rate"], [["ours", "1"]])
    assert "ours  1" in capsys.readouterr().out
