"""A tiny model calibrated: a whole card, honest about its error; noise refused; fits that ignore strays."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ridgeline import LLM
from ridgeline.cli.main import application
from ridgeline.core.errors import InvalidArgument
from ridgeline.core.step import Spans
from ridgeline.perf.card import load_card
from ridgeline.study import calibrate as study
from ridgeline.study import step_bench
from ridgeline.study.calibrate import BusyMachine, calibrate, fitted


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "TOKENS", (1, 8, 32))
    monkeypatch.setattr(study, "CONTEXTS", (16,))
    monkeypatch.setattr(step_bench, "REPEATS", 3)


def test_a_whole_card(tiny: Path) -> None:
    with LLM(tiny, kernels="reference", dtype="float32", max_num_seqs=4, enable_prefix_caching=False) as llm:
        heard: list[tuple[int, int]] = []
        card = calibrate(llm.built, lambda done, total: heard.append((done, total)), allow_busy=True)
        assert not llm.built.engine.has_work
        assert not llm.built.engine.listeners
        longest = llm.built.config.max_model_len
    assert heard[-1][0] == heard[-1][1] == len(heard)
    assert card.decode.rows == (1.0,)
    assert card.decode.columns[-1] == longest
    assert card.prefill.rows == (8.0, 32.0)
    assert card.prefill.columns[0] == 0
    assert card.longest == longest
    assert card.body(32) > 0
    assert card.device_s(Spans((1,), (16,)), 1) > 0
    assert card.residual >= 0
    assert card.loop_s(Spans((1,), (16,))) > 0
    assert card.versions["torch"]


def test_overlapped_steps_count_only_what_the_device_waits_for(tiny: Path) -> None:
    with LLM(
        tiny, kernels="reference", dtype="float32", max_num_seqs=4, enable_prefix_caching=False, async_scheduling=True
    ) as llm:
        assert llm.built.engine.overlap
        card = calibrate(llm.built, allow_busy=True)
    assert (card.host_request_s, card.loop_step_s, card.loop_request_s) == (0, 0, 0)
    assert 0 <= card.host_step_s < 0.1


def test_a_busy_machine_is_refused(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "BUSY", 0.5)
    with (
        LLM(tiny, kernels="reference", dtype="float32", max_num_seqs=2, enable_prefix_caching=False) as llm,
        pytest.raises(BusyMachine, match="times its median"),
    ):
        calibrate(llm.built)


def test_stray_steps_do_not_bend_the_fit() -> None:
    draw = random.Random(0)
    counts = [float(draw.randrange(1, 50)) for _ in range(200)]
    ops = [draw.uniform(1e-3, 50e-3) for _ in counts]
    times = [2e-4 + 3e-5 * count + 1.1 * one for count, one in zip(counts, ops)]
    for place in range(0, 200, 11):
        times[place] *= 3
    step, request, scale = fitted([[1.0] * 200, counts, ops], times)
    assert (step, request, scale) == pytest.approx((2e-4, 3e-5, 1.1), rel=1e-6)


def test_prompts_among_many_decodes_are_not_strays() -> None:
    """Decoding that takes the same whatever its ops are said to: a scale that prompts alone can tell."""
    draw = random.Random(0)
    ops = [draw.uniform(1e-4, 2e-4) for _ in range(200)] + [draw.uniform(3e-4, 9e-4) for _ in range(10)]
    times = [2e-4 + draw.uniform(-5e-6, 5e-6) for _ in range(200)] + [5e-5 + one for one in ops[200:]]
    features, kinds = [[1.0] * 210, ops], ["decode"] * 200 + ["prompt"] * 10
    assert fitted(features, times)[1] < 0.1, "all prompts are gone"
    assert 0.5 < fitted(features, times, kinds)[1] < 1.1


def test_no_weight_is_below_nothing() -> None:
    counts = [float(one % 7 + 1) for one in range(100)]
    times = [1e-3 - 2e-5 * one for one in counts]
    assert fitted([[1.0] * 100, counts], times) == [pytest.approx(9.2e-4, rel=0.02), 0.0]


def test_command_and_simulation(tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / "card.json"
    model = ["--model", str(tiny)]
    arguments = ["calibrate", *model, "--kernels", "reference", "--max-num-seqs", "4", "--allow-busy"]
    done = CliRunner().invoke(application, [*arguments, "--json", "-o", str(path)], catch_exceptions=False)
    assert json.loads(done.stdout)["sha256"] == load_card(path).sha256
    load = ["--num-prompts", "4", "--prompt-len", "8", "--output-len", "4", "--max-num-seqs", "4", "--json"]
    arguments = ["simulate", *model, "--hardware", "a10", "--dtype", "bf16", "--card", str(path), *load]
    with pytest.raises(InvalidArgument, match=r"is of .* in float32, not of .* in"):
        CliRunner().invoke(application, arguments, catch_exceptions=False)
    arguments = ["simulate", *model, "--hardware", "a10", "--dtype", "fp32", "--card", str(path), *load]
    found = json.loads(CliRunner().invoke(application, arguments, catch_exceptions=False).stdout)
    assert found["steps"].startswith("card ")
    assert found["output_tokens"] == 16
    assert found["tpot"]["p50_s"] > 0
