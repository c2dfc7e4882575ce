"""Cards beside what runs: plans with error bars, steps beside predictions, a planned rate that is served."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from ridgeline import LLM
from ridgeline.cli.main import application
from ridgeline.core.errors import DoesNotFit, InvalidArgument
from ridgeline.core.step import Spans, StepRecord
from ridgeline.models import parse_config
from ridgeline.perf.card import Card, Grid, Line
from ridgeline.perf.hardware import find
from ridgeline.study.plan import Planner, _filled
from ridgeline.study.predicted import PredictedSteps
from ridgeline.study.simulate import Carded, simulate
from ridgeline.study.verify import Verified, setting_of, verify
from ridgeline.workload.arrivals import equal, poisson

SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 288,
    "max_position_embeddings": 256,
    "torch_dtype": "float32",
}


def card(model: str = "small", **changed: Any) -> Card:
    """A device on which a token takes 1 ms, a sampled row 0.1 ms, a key 1 µs and the host 0.5 ms a step."""
    made = Card(
        device="a device",
        model=model,
        dtype="float32",
        made="2026-11-21T00:00:00+00:00",
        body=Line(((1, 1e-3), (64, 64e-3))),
        head=Line(((1, 1e-4), (8, 8e-4))),
        decode=Grid((1, 8), (16, 128), ((16e-6, 128e-6), (128e-6, 1024e-6))),
        prefill=Grid((8, 64), (0, 128), ((1e-5, 1e-4), (1e-4, 1e-3))),
        longest=128,
        step_s=0.0,
        request_s=0.0,
        ops_scale=1.0,
        host_step_s=5e-4,
        host_request_s=0.0,
        loop_step_s=1e-4,
        loop_request_s=0.0,
        residual=0.05,
    )
    return replace(made, **changed)


@pytest.fixture(scope="module")
def planner() -> Planner:
    return Planner(parse_config(SHAPE), "small", "float32")


def run(*arguments: str) -> str:
    done = CliRunner().invoke(application, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


# Plans


def test_prompts_fill_steps_as_the_engine_fills_them() -> None:
    assert _filled(2, 6, 8) == [(Spans((6, 2), (6, 2)), 1), (Spans((4,), (6,)), 1)]
    assert _filled(1, 16, 8) == [(Spans((8,), (8,)), 0), (Spans((8,), (16,)), 1)]
    assert _filled(3, 2, 64) == [(Spans((2, 2, 2), (2, 2, 2)), 3)]


def test_a_plan_by_a_card(planner: Planner) -> None:
    found = planner.plan(find("a10"), 48, 32, 2, card=card()).calibrated
    assert found is not None
    assert (found.steps, found.beyond, found.tpot_error) == (2, False, 0.05)
    # 96 tokens in two steps, two rows, attention of both, the host twice.
    assert found.ttft_s == pytest.approx(96e-3 + 2e-4 + 1.2e-3, rel=0.01)
    assert found.tpot_s == pytest.approx(2e-3 + 2e-4 + 2 * 64e-6 + 6e-4, rel=0.01)
    assert planner.plan(find("a10"), 48, 32, 2).calibrated is None


def test_a_plan_beyond_a_card_is_marked_and_less_sure(planner: Planner) -> None:
    found = planner.plan(find("a10"), 24, 16, 16, card=card()).calibrated
    assert found is not None
    assert found.beyond
    assert found.tpot_error == pytest.approx(0.1)  # 16 requests where 8 were measured
    with pytest.raises(InvalidArgument, match=r"card: is of other in float32, not of small in float32"):
        planner.plan(find("a10"), 24, 16, 1, card=card("other"))


def test_commands_mark_what_lies_beyond(tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / "card.json"
    card(tiny.name).save(path)
    common = ("--model", str(tiny), "--hardware", "a10", "--card", str(path))
    plan = ("plan", *common, "--prompt-len", "24", "--output-len", "16")
    assert json.loads(run(*plan, "--json"))["calibrated"]["beyond"] is False
    shown = run(*plan, "--batch", "16")
    assert "BEYOND" in shown
    assert "± 10% !" in shown
    simulation = ("simulate", *common, "--num-prompts", "20", "--prompt-len", "8", "--output-len", "8")
    found = json.loads(run(*simulation, "--json"))["prediction"]
    assert found["beyond_the_card"] > 0
    assert found["reach"] == pytest.approx(2.5)  # all 20 at once where 8 were measured
    assert found["error"] == pytest.approx(0.05 * 2.5)
    assert "BEYOND ITS RANGE" in run(*simulation)
    assert "BEYOND" not in run(*simulation, "--max-num-seqs", "8")
    slo = ("plan", *common, "--slo", "ttft=1s", "--num-prompts", "10", "--prompt-len", "8", "--output-len", "4")
    assert json.loads(run(*slo, "--json"))["capacities"][0]["prediction"]["steps"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--verify",), "verify: goes with --slo"),
        (("--verify", "--slo", "ttft=1s", "--hardware", "a10"), "verify: runs on this machine"),
        (("--hardware", "a10", "--hardware", "l4"), "card: is of one machine"),
        (("--hardware", "a10", "--what-if"), "card: --what-if changes the model"),
        (("--hardware", "a10", "--batch", "1..8"), "card: goes with one batch"),
        (
            ("--slo", "ttft=1s", "--kv-cache-memory-bytes", "1000"),
            "kv_cache_memory_bytes: is of the engine that --verify",
        ),
    ],
)
def test_what_does_not_go_together(arguments: tuple[str, ...], message: str, tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / "card.json"
    card(tiny.name).save(path)
    with pytest.raises(InvalidArgument, match=message):
        run("plan", "--model", str(tiny), "--card", str(path), *arguments)


# Steps


def record(kind: str, spans: tuple[tuple[int, int], ...], device_s: float) -> StepRecord:
    return StepRecord(0, kind, spans, len(spans), 0, 9, 0, 0.0, 1e-4, device_s, sampled=len(spans))


def test_steps_beside_a_card() -> None:
    decode = card().device_s(Spans((1,), (16,)), 1)
    steps = [
        record("decode", ((1, 16),), decode),
        record("decode", ((1, 16),), decode / 1.1),
        record("prefill", ((200, 200),), 0.1),
        record("decode", ((1, 16),), 0.0),  # not measured: no point
    ]
    found = PredictedSteps.of(card(), steps)
    rows = {one.kind: one for one in found.rows}
    assert set(rows) == {"decode", "prefill", "all"}
    assert rows["decode"].steps == 2
    assert rows["decode"].median == pytest.approx(0.05)
    assert rows["decode"].bias == pytest.approx(2 / (1 + 1 / 1.1) - 1)
    assert (rows["decode"].beyond, rows["prefill"].beyond) == (0, 1)
    assert len(found.points) == rows["all"].steps == 3
    with pytest.raises(InvalidArgument, match="no step ran"):
        PredictedSteps.of(card(), steps[-1:])


def test_throughput_beside_a_card(tiny: Path, tmp_path: Path) -> None:
    card(tiny.name).save(tmp_path / "card.json")
    load = ("--num-prompts", "3", "--prompt-len", "8", "--output-len", "4", "--kernels", "reference")
    drawn = ("--card", str(tmp_path / "card.json"), "--plot", str(tmp_path / "steps.png"))
    found = json.loads(run("bench", "throughput", "--model", str(tiny), *load, *drawn, "--json"))
    rows = found["predicted"]["rows"]
    assert rows[-1]["kind"] == "all"
    assert rows[-1]["steps"] == sum(one["steps"] for one in rows[:-1]) >= 4
    assert (tmp_path / "steps.png").stat().st_size > 10_000


# A planned rate, served


def test_a_plan_is_served(tiny: Path) -> None:
    with LLM(tiny, kernels="reference", dtype="float32", max_num_seqs=4, enable_prefix_caching=False) as llm:
        setting = setting_of(llm.built)
        assert (setting.max_num_seqs, setting.num_blocks) == (4, llm.built.config.num_blocks)
        jobs = poisson(equal(6, 8, 4), 200.0)
        steps = Carded(card(tiny.name))
        planned = simulate(jobs, setting, steps.device_s, steps.host_s, {"ttft": 10.0}).report
        found = verify(llm.built, jobs, planned, {"ttft": 10.0})
        assert not llm.built.engine.has_work
    assert found.holds
    assert (found.planned.output_tokens, found.measured.output_tokens) == (24, 24)
    names = [name for name, _, _ in found.rows]
    assert names[:3] == ["output tokens/s", "ttft p50", "ttft p99"]
    assert set(found.as_dict()["errors"]) == set(names)
    late = Verified(planned, replace(found.measured, met=3), found.served)
    assert not late.holds


def test_verify_command(tmp_path: Path) -> None:
    load = ("--num-prompts", "8", "--prompt-len", "16", "--output-len", "4")
    found = json.loads(run("plan", "--slo", "e2e=2s", "--verify", *load, "--json"))
    assert found["rate_per_s"] > 0
    assert found["measured"]["requests"] == 8
    assert found["steps"] == "floor"
    assert "output tokens/s" in found["errors"]


def test_the_memory_that_was_asked_for(tiny: Path) -> None:
    load = ("--model", str(tiny), "--slo", "ttft=9s", "--num-prompts", "3", "--prompt-len", "8", "--output-len", "4")
    with pytest.raises(DoesNotFit, match="the KV pool would have 1 kB"):
        run("plan", *load, "--verify", "--kv-cache-memory-bytes", "1000")
    with pytest.raises(DoesNotFit, match="room for 0 tokens"):
        run("plan", *load, "--hardware", "a10", "--gpu-memory-utilization", "1e-5")
