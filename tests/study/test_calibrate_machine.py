"""A machine calibrated without a model, at tiny sizes: a whole card that any model is read by; noise is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from ridgeline.cli.main import application
from ridgeline.core.errors import InvalidArgument
from ridgeline.core.step import Spans
from ridgeline.models import build_model, parse_config
from ridgeline.models.spec import read_config
from ridgeline.perf.machine_card import MachineCard, read_card
from ridgeline.perf.price import Price
from ridgeline.study import calibrate, calibrate_machine
from ridgeline.study.calibrate import BusyMachine
from ridgeline.study.calibrate_machine import CPU, CUDA, Made, Points, _llama, _mixture
from ridgeline.study.timing import slowed

TINY = replace(
    CPU,
    models=(
        Made("dense", {**_llama(48, 80, 2, 1, 2, 300), "head_dim": 16}),
        Made("experts", {**_mixture(4, 2, 32, 64, 96, 4, 2, 2, 320), "head_dim": 16}),
    ),
    tokens=(1, 3, 20),
    batches=(1, 3),
    contexts=(16, 40),
    chunks=(12, 20),
    over=(1, 2),
    decodes=((1, 30), (2, 20), (3, 40), (1, 12)),
    prompts=((10, 0), (18, 8), (15, 0)),
    pool_bytes=1 << 20,
    rounds=1,
    anchor_s=0.01,
)


@pytest.fixture(scope="module")
def card() -> MachineCard:
    heard: list[tuple[int, int]] = []
    made = calibrate_machine.calibrate_machine(
        torch.device("cpu"), TINY, lambda done, total: heard.append((done, total)), allow_busy=True, kernels="reference"
    )
    assert heard == [(1, 2), (2, 2)]
    return made


@pytest.mark.usefixtures("one_thread")
def test_a_whole_card(card: MachineCard, tiny: Path) -> None:
    assert set(card.ops) >= {"linear", "gated_linear", "moe", "norm", "rope_kv_write", "embed", "sample"}
    for curves in card.ops.values():
        for curve in curves:
            assert all(times > 0 for _, times in curve.slowdown)
            assert [tokens for tokens, _ in curve.slowdown] == sorted(tokens for tokens, _ in curve.slowdown)
    assert {one.sizes for one in card.decode} == {(2.0, 1.0, 16.0), (4.0, 2.0, 16.0)}
    assert card.prefill[0].columns == (1.0, 2.0)
    assert (card.start_s, card.call_s) == (0.0, 0.0)  # a CPU has computed a step when it is handed over
    assert card.residual >= 0
    assert card.versions["torch"]
    assert set(card.clocks["seconds"]) == {"dense", "experts"}
    spec = parse_config(read_config(tiny), "tiny")
    price = Price(build_model(spec, torch.device("meta"), torch.float32, 64), 64, torch.float32)
    assert card.card(price, "tiny").device_s(Spans((1, 1), (20, 30)), 2) > 0


def test_made_up_models_are_nobodys() -> None:
    """None of them has a held-out model's products, so no held-out point can be on the grid."""
    data = Path(__file__).parents[2] / "benchmarks" / "data"
    held = [json.loads(path.read_text()) for path in data.glob("*.config.json")]
    assert len(held) == 4
    for made in CUDA.models:
        for other in held:
            assert made.config["hidden_size"] != other["hidden_size"]
            assert made.config["vocab_size"] != other["vocab_size"]


def test_points_reach_beyond_what_is_asked() -> None:
    for points in (CPU, CUDA):
        assert isinstance(points, Points)
        assert points.longest >= points.contexts[-1]
        assert max(count for count, _ in points.decodes) <= points.batches[-1]
        assert all(new <= points.tokens[-1] for new, _ in points.prompts)
    assert (CUDA.tokens[-1], CUDA.chunks[-1], CUDA.contexts[-1]) > (8192, 8192, 8192)
    assert CUDA.batches[-1] > 256


def test_a_busy_machine_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "BUSY", 0.5)
    with pytest.raises(BusyMachine, match="times its median"):
        calibrate_machine.calibrate_machine(
            torch.device("cpu"), replace(TINY, models=TINY.models[:1]), kernels="reference"
        )


def test_throttled_clocks_are_told() -> None:
    assert slowed({}) == ""
    assert slowed({"clocks_event_reasons.active": "0x0000000000000004"}) == ""  # a cap of power under load
    assert slowed({"clocks_event_reasons.active": "0x0000000000000048"}) == "hardware slowdown, heat, by hardware"
    assert slowed({"clocks_event_reasons.active": "[N/A]"}) == ""


def test_command_then_plan_and_simulation(
    card: MachineCard, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibrate_machine, "CPU", replace(TINY, models=TINY.models[:1]))
    path = tmp_path / "machine.json"
    arguments = ["calibrate", "--machine", "--device", "cpu", "--kernels", "reference", "--allow-busy", "-o", str(path)]
    shown = CliRunner(env={"COLUMNS": "120"}).invoke(application, arguments, catch_exceptions=False).stdout
    assert "reading, kept up" in shown
    assert "decode attention" in shown
    assert isinstance(read_card(path), MachineCard)
    card.save(path)
    load = ["--card", str(path), "--prompt-len", "8", "--output-len", "4"]
    plan = ["plan", "--model", str(tiny), "--hardware", "a10", *load, "--json"]
    found = json.loads(CliRunner().invoke(application, plan, catch_exceptions=False).stdout)
    assert found["dtype"] == "float32"
    assert found["calibrated"]["tpot_s"] > 0
    simulate = ["simulate", "--model", str(tiny), "--hardware", "a10", *load, "--num-prompts", "3", "--json"]
    found = json.loads(CliRunner().invoke(application, simulate, catch_exceptions=False).stdout)
    assert found["output_tokens"] == 12
    with pytest.raises(InvalidArgument, match="does not go with --machine"):
        CliRunner().invoke(application, ["calibrate", "--machine", "--model", str(tiny)], catch_exceptions=False)
