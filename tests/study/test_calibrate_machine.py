"""A machine calibrated without a model, at tiny sizes: a whole card that any model is read by; noise is refused."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from ridgeline.cli.main import application
from ridgeline.core.errors import InvalidArgument
from ridgeline.core.step import Spans
from ridgeline.models import build_model, parse_config
from ridgeline.models.spec import read_config
from ridgeline.ops import REGISTRY, Ops
from ridgeline.perf.machine_card import Curve, MachineCard, Plane, Point, read_card, shape_of
from ridgeline.perf.price import Price
from ridgeline.study import calibrate, calibrate_machine
from ridgeline.study.calibrate import BusyMachine
from ridgeline.study.calibrate_machine import (
    CPU,
    CUDA,
    LOWEST,
    Made,
    Points,
    PoorFit,
    _llama,
    _mixture,
    bounded,
    lower_line,
    routed_cost,
)
from ridgeline.study.timing import Stretch, Works, slowed

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
            assert all(one.seconds > 0 for _, one in curve.points)
            assert [tokens for tokens, _ in curve.points] == sorted(tokens for tokens, _ in curve.points)
    assert {one.sizes for one in card.decode} == {(2.0, 1.0, 16.0), (4.0, 2.0, 16.0)}
    assert card.prefill[0].columns == (1.0, 2.0)
    assert (card.start_s, card.launch_s) == (0.0, {})  # a CPU has computed a step when it is handed over
    assert card.residual >= 0
    assert len(card.steps) == 2 * 7
    least, most = calibrate_machine.DECODE_SCALE
    assert all(least <= one <= most for one in (card.decode_scale, card.attention_scale, card.mixture_scale))
    for one in card.steps:
        assert (one["mixtures_s"] > 0) == (one["model"] == "experts")
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


def test_a_fit_keeps_within_its_bounds() -> None:
    draw = random.Random(0)
    rows = [(1.0, float(draw.randrange(1, 300)), draw.uniform(1e-3, 2e-2)) for _ in range(40)]
    bounds = ((0.0, None), (0.0, None), (0.8, 1.25))
    truth = [2e-4, 3e-6, 1.1]
    measured = [sum(w * one for w, one in zip(truth, row)) for row in rows]
    assert bounded(rows, measured, bounds) == pytest.approx(truth)
    hidden = [5e-3 + 0.05 * row[2] for row in rows]  # sums that say nothing: a free scale would hide it
    assert bounded(rows, hidden, bounds)[2] == 0.8
    unseen = [(*row, 1e-9) for row in rows]  # nothing depends on it
    assert bounded(unseen, measured, (*bounds, (0.8, 1.25)), near=(3,)) == pytest.approx([*truth, 1.0], rel=1e-3)


def test_a_quiet_host_lies_on_the_lowest_line() -> None:
    """Neighbours slow a host, none makes it faster: two models that were left alone are enough."""
    quiet = [(1e-3 * number, 1e-3 + 1.2e-3 * number) for number in (2, 4, 6, 8, 10)]
    slowed_by = (1.3, 1.0, 1.5, 1.0, 2.4)
    points = [(x, y * times) for (x, y), times in zip(quiet, slowed_by)]
    assert lower_line(points, LOWEST) == pytest.approx((1e-3, 1.2))
    assert lower_line([(1.0, 3.0), (2.0, 2.0)], LOWEST)[1] >= 0
    assert lower_line([(1.0, 1.0), (2.0, 3.0)], LOWEST)[0] >= 0


@pytest.mark.usefixtures("one_thread")
def test_launches_of_every_op_are_on_the_card(monkeypatch: pytest.MonkeyPatch, tiny: Path) -> None:
    """As on a device that computes behind the host; what a CPU takes to launch an op is all that it takes."""
    monkeypatch.setattr(calibrate_machine, "hands_over", lambda device: True)
    made = calibrate_machine.calibrate_machine(torch.device("cpu"), TINY, allow_busy=True, kernels="reference")
    assert set(made.launch_s) >= {"linear", "gated_linear", "moe", "norm", "rope_kv_write", "embed", "attention"}
    assert all(seconds > 0 for seconds in made.launch_s.values())
    assert made.start_s >= 0
    assert made.launch_scale >= 0
    assert made.captured == ()
    spec = parse_config(read_config(tiny), "tiny")
    price = Price(build_model(spec, torch.device("meta"), torch.float32, 64), 64, torch.float32)
    prompt = Spans((8,), (8,))
    assert made.card(price, "tiny").device_s(prompt, 1) >= made.start_s + made.launch_scale * made.launches_s(price) > 0


def test_steps_tell_tiles_and_what_lies_between_calls() -> None:
    """Steps made up by a card of known tile, gaps and scales: the fit finds them."""
    prices: dict[str, Price] = {}
    for name, hidden, layers in (("a", 64, 2), ("b", 128, 8), ("c", 256, 20)):
        values = {**_llama(hidden, 2 * hidden, hidden // 16, 1, layers, 40 * hidden), "head_dim": 16}
        spec = parse_config({**values, "max_position_embeddings": 4096, "torch_dtype": "float32"})
        prices[name] = Price(build_model(spec, torch.device("meta"), torch.float32, 4096), 64, torch.float32)
    rates = {"read_bytes_per_s": 1e11, "matrix_flops": 1e13, "reads": ()}
    limits = {"most_tokens": 64, "most_requests": 32, "longest": 4096}
    point = Point(0.0, 1e5, 4e-6)
    seen = calibrate_machine._Calls()
    curves: dict[str, tuple[Curve, ...]] = {}
    for price in prices.values():
        price.trace(Spans((1,), (1,)), 1, False, Ops({}, seen))
    for op, args, kwargs in seen.calls:
        if op.name != "attention":
            _, sizes = shape_of(op.name, args, kwargs)
            curves[op.name] = (Curve(sizes, ((1.0, point), (64.0, point))),)
    rows, columns = (1.0, 32.0), (16.0, 4096.0)
    grid = tuple(tuple(Point(0.0, 1e2 * row * at, 3e-6 + 1e-9 * row * at) for at in columns) for row in rows)
    plane = Plane((4.0, 1.0, 16.0), rows, columns, grid)
    base = MachineCard(
        device="", dtype="float32", made="", ops=curves, decode=(plane,), prefill=(plane,), **rates, **limits
    )
    known = {"step_s": 5e-5, "request_s": 2e-7, "gap_s": 4e-7, "alone_gap_s": -3e-7, "tile": 128}
    truth = replace(base, **known, attention_scale=1.0)
    steps = []
    for name, price in prices.items():
        made, calls = truth.card(price, name), truth._dense(price, 1, 1).calls
        for count, context in ((1, 300), (1, 2000), (2, 700), (4, 200), (8, 1700), (16, 450), (24, 1000), (32, 130)):
            shape = calibrate_machine.Shape(((1, context),) * count)
            seconds = made.device_s(shape.as_spans(), count)
            steps.append(calibrate_machine._Step(name, shape, seconds, 0.0, calls))
    found = calibrate_machine._Found(steps=steps, prices=prices, hands_over=True)
    fitted = calibrate_machine._with_decoding(base, found, steps)
    assert fitted.tile == 128
    for name, value in known.items():
        assert getattr(fitted, name) == pytest.approx(value, rel=0.1), name
    assert (fitted.decode_scale, fitted.alone_scale, fitted.attention_scale) == pytest.approx((1, 1, 1), abs=0.02)


def test_long_decode_ops_are_captured_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mixture whose floor is 0.4 ms takes the host longer to launch than that, beside others."""
    captured: list[bool] = []

    def noting(works: Works, calls: int, graph: bool, pool: Any = None) -> Stretch:
        captured.append(graph)
        return Stretch(lambda: 5e-4, 10, graph)

    monkeypatch.setattr(calibrate_machine, "on_cuda", noting)
    rows: Any = object.__new__(calibrate_machine._Rows)
    rows.device, rows.pool, rows.found = torch.device("cuda"), "a pool", calibrate_machine._Found()
    rows.points = TINY
    rows.bench = SimpleNamespace(built=SimpleNamespace(runner=SimpleNamespace(graphs=object())), spread=1.0)
    for floor_s in (4e-4, 2e-2):
        rows.seconds("moe", Works([lambda: None]), floor_s, True)
    assert captured == [True, False]


def test_ops_that_do_not_add_up_are_told(card: MachineCard) -> None:
    shape = calibrate_machine.Shape(((1, 30),))
    step = calibrate_machine._Step("dense", shape, 4e-3, 0.0, 10)
    least, _ = calibrate_machine.DECODE_SCALE
    good = replace(card, decode_scale=1.0, attention_scale=1.0, mixture_scale=1.0, residual=0.05)
    assert calibrate_machine._doubt(good, 1.0, step, 4e-3) == ""
    low = replace(good, attention_scale=least)
    assert f"attention of decoding take {least:.2f} times" in calibrate_machine._doubt(low, 1.0, step, 4e-3)
    said = calibrate_machine._doubt(replace(good, residual=0.99), 1.0, step, 1e-3)
    assert "off by 99%, at worst 1 x (1 new of 30) of dense: 4.000 ms measured, 1.000 predicted" in said
    assert "host" not in said
    prompt = replace(step, shape=calibrate_machine.Shape(((30, 30),)), start_s=3.9e-3)
    said = calibrate_machine._doubt(replace(good, residual=0.99), 1.0, prompt, 1e-3)
    assert said.endswith("1.000 predicted (the host paces it)")
    assert not replace(prompt, captured=True).paced


def test_ops_that_do_not_add_up_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "BUSY", math.inf)
    monkeypatch.setattr(calibrate_machine, "POOR", -1.0)
    with pytest.raises(PoorFit, match="ops do not add up to steps"):
        calibrate_machine.calibrate_machine(
            torch.device("cpu"), replace(TINY, models=TINY.models[:1]), kernels="reference"
        )


@pytest.mark.parametrize("decodes", [True, False])
def test_what_no_graph_holds_is_told_or_raised(decodes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of decoding it is an error: what a launch takes is not what the op takes in the engine's graphs."""

    def refusing(works: Works, calls: int, graph: bool, pool: Any = None) -> Stretch:
        if graph:
            raise RuntimeError("use_count > 0\nINTERNAL ASSERT FAILED")
        return Stretch(lambda: 4e-5, 10, False)

    monkeypatch.setattr(calibrate_machine, "on_cuda", refusing)
    monkeypatch.setattr(calibrate_machine, "GraphPool", lambda device: "a new pool")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    rows: Any = object.__new__(calibrate_machine._Rows)
    rows.device, rows.pool, rows.found = torch.device("cuda"), "a pool", calibrate_machine._Found()
    rows.points, rows.bench = TINY, SimpleNamespace(built=SimpleNamespace(runner=SimpleNamespace(graphs=object())))
    works = Works([lambda: None])
    if decodes:
        with pytest.raises(RuntimeError, match="use_count"):
            rows.seconds("norm", works, 1e-9, decodes)
        assert rows.found.eager == {}
    else:
        assert rows.seconds("norm", works, 1e-9, decodes) == 4e-5
        assert rows.found.eager == {"norm": "use_count > 0 INTERNAL ASSERT FAILED"}
        assert rows.pool == "a new pool"


def test_mixtures_are_counted_by_the_experts_that_are_touched() -> None:
    """All tokens alike go to the same two experts of eight."""
    moe, draw = REGISTRY["moe"], torch.Generator().manual_seed(0)
    x = torch.randn(1, 16, generator=draw).expand(5, 16).contiguous()
    weights = [torch.randn(*shape, generator=draw) for shape in ((8, 16), (8, 24, 16), (8, 16, 12))]
    arguments = (x, *weights, 2, True)
    said, found = moe.floor(*arguments), routed_cost(moe, arguments, {})
    expert_bytes = 4 * (24 * 16 + 16 * 12)
    assert found.read_bytes == pytest.approx(x.nbytes + weights[0].nbytes + 2 * expert_bytes)
    assert found.read_bytes < said.read_bytes
    assert (found.flops, found.write_bytes) == (said.flops, said.write_bytes)


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
