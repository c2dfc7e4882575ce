"""Pictures: what is drawn is what the results say, on the axes it should be, in files that are what their name says."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from matplotlib.text import Text

from ridgeline.core.cost import Cost
from ridgeline.core.errors import InvalidArgument
from ridgeline.models import parse_config
from ridgeline.perf.hardware import THIS, find
from ridgeline.perf.limit import LimitCurve
from ridgeline.study import pictures
from ridgeline.study.explain import Explained, OpShare, Predicted
from ridgeline.study.plan import Planner
from ridgeline.study.simulate import Capacity, Tried
from ridgeline.workload.measure import Served, Spread, report

CURVE = LimitCurve("cpu", ((32 << 10, 4e11), (1 << 20, 1e11), (1 << 30, 5e10)), 5e11)


@pytest.fixture(scope="module")
def planner() -> Planner:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 2,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "vocab_size": 8000,
        "max_position_embeddings": 4096,
        "torch_dtype": "bfloat16",
    }
    return Planner(parse_config(config), "small", "bfloat16")


def explained(kind: str = "decode", predicted: bool = True) -> Explained:
    ops = (
        OpShare("attention", "contraction", 2, Cost(2e6, 1e6), 1e-5, True, 6e-5),
        OpShare("linear", "contraction", 6, Cost(8e6, 4e6), 4e-5, True, 9e-5),
        OpShare("norm", "normalization", 3, Cost(1e4, 4e4), 1e-6, True, 1e-5),
        OpShare("embed", "movement", 1, Cost(0, 1e4), 1e-7, True, 1e-6),
    )
    said = Predicted(5e-5, 1e-4, 2e-5, 3e-5, -0.1, 0.05, 0.0) if predicted else None
    return Explained(
        kind=kind, steps=9, tokens=4, step_s=2.2e-4, host_s=3e-5, gaps_s=2.9e-5, ops=ops, observer_s=0.0, curve=CURVE,
        working_set_bytes=5e6, predicted=said,
    )  # fmt: skip


def panels_of(figure: Any) -> list[Any]:
    found = list(figure.axes)
    for one in figure.subfigs:
        found += [axes for axes in one.axes if axes not in found]
    return found


def texts(figure: Any) -> list[str]:
    """Every text that a figure shows outside of ticks."""
    found = []
    for axes in panels_of(figure):
        found += [axes.get_title(loc="left"), axes.get_xlabel(), axes.get_ylabel()]
        found += [one.get_text() for one in axes.texts]
        found += [one.get_text() for one in (*axes.get_xticklabels(), *axes.get_yticklabels())]
    for one in (figure, *figure.subfigs):
        found += [text.get_text() for legend in one.legends for text in legend.get_texts()]
        found.append("" if one._suptitle is None else one._suptitle.get_text())
    return found


def said(figure: Any, *parts: str) -> None:
    shown = texts(figure)
    for part in parts:
        assert any(part in one for one in shown), f"{part!r} is not in {shown}"


def bars(axes: Any) -> list[float]:
    return [patch.get_width() for patch in axes.patches]


def test_a_plan_on_two_machines(planner: Planner) -> None:
    plans = [planner.plan(find(name), 512, 128, 4) for name in ("a10", "h200")]
    figure = pictures.plans(plans, [None, None])
    first, second, memory, _ = panels_of(figure)
    said(figure, "NVIDIA A10", "600 GB/s", "4.8 TB/s", "ridge: 208 FLOP/byte", "125 TFLOP/s", "linear", "datasheet")
    for axes, plan in ((first, plans[0]), (second, plans[1])):
        drawn = [tuple(map(float, one.get_offsets()[0])) for one in axes.collections]
        ops = [op for phase in (plan.prefill, plan.decode) for op in phase.ops if op.flops]
        assert len(drawn) == len(ops)
        for x, y in drawn:  # at their floors ops lie on a roof, and none above
            assert y <= min(x * plan.hardware.memory_bytes_per_s, plan.hardware.flops("bfloat16")) * (1 + 1e-9)
        assert axes.get_xscale() == axes.get_yscale() == "log"
        assert axes.lines[0].get_linestyle() == "--"
    assert first.get_xlim() == second.get_xlim()
    sizes = bars(memory)
    assert sum(sizes) == pytest.approx(24)
    assert sizes[0] == pytest.approx(plans[0].weight_bytes / 1e9)
    assert sizes[3] + sizes[4] == pytest.approx(plans[0].kv_capacity_tokens * plans[0].kv_bytes_per_token / 1e9)
    said(figure, "weights", "KV of this batch", "free", f"{plans[0].resident_requests:,} requests of 640 tokens fit")


def test_a_measured_machine_has_a_solid_roof_beside_its_datasheet(planner: Planner) -> None:
    sheet = find("h200")
    here = replace(sheet, id=THIS, memory_bytes_per_s=4.3e12, matrix={"bfloat16": 7e14})
    panel = pictures.planned_panel(planner.plan(here, 512, 128, 4), sheet)
    figure = pictures.roofline([panel], "a title")
    (axes,) = panels_of(figure)
    assert [line.get_linestyle() for line in axes.lines[:2]] == ["-", "--"]
    said(figure, "4.3 TB/s", "4.8 TB/s, datasheet", "ridge: 163 FLOP/byte", "measured roof", "a title")


def test_names_lie_beside_each_other(planner: Planner) -> None:
    figure = pictures.plans([planner.plan(find("l4"), 2048, 128, 8)], [None])
    figure.canvas.draw()
    axes = panels_of(figure)[0]
    boxes = [Text.get_window_extent(one).extents for one in axes.texts if "%" in one.get_text()]  # without its arrow
    assert len(boxes) >= 4
    for place, one in enumerate(boxes):
        assert not any(pictures._overlap(tuple(one), tuple(other)) for other in boxes[:place])


def test_explained_steps(tmp_path: Path) -> None:
    steps = [explained(), explained("prefill", predicted=False)]
    figure = pictures.explained(steps, "model, float32, cpu")
    decode, prefill, roof = panels_of(figure)
    said(
        figure,
        "floor",
        "card",
        "measured",
        "all other ops",
        "gaps",
        "host",
        "56 GB/s".replace("56", "50"),
        "in a cache",
    )
    rows: dict[float, float] = {}
    for patch in decode.patches:
        rows[patch.get_y()] = rows.get(patch.get_y(), 0.0) + patch.get_width()
    assert sorted(rows.values()) == pytest.approx([steps[0].floor_s * 1e3, 0.2, 0.22])
    assert len({patch.get_y() for patch in prefill.patches}) == 2  # no card there
    drawn = sorted(tuple(map(float, one.get_offsets()[0])) for one in roof.collections)
    assert drawn[-1] == pytest.approx((2.0, 8e6 / 9e-5))
    assert len(drawn) == 2 * 3  # what does no arithmetic has no place
    pictures.save(figure, tmp_path / "explain.png")


def test_batches(planner: Planner) -> None:
    sweeps = [planner.sweep(find(name), 512, 128, [1, 8, 64, 65536]) for name in ("a10", "l4")]
    figure = pictures.batches(sweeps)
    left, right = panels_of(figure)
    curve = left.lines[0].get_xydata()
    assert curve[0] == pytest.approx((1 / sweeps[0].rows[0].tpot_s, sweeps[0].rows[0].tokens_per_s))
    said(
        figure,
        "batch 1",
        "batch 65536",
        "ridge\n208",
        "ridge\n403",
        "decode FFN",
        "prefill attention",
        "KV does not fit",
    )
    assert [line.get_marker() for line in right.lines[-4:]] == ["o", "o", "^", "^"]


def spread(value: float) -> Spread:
    return Spread(9, value, value, 1.5 * value, 2 * value, 3 * value)


def test_latency_has_a_knee() -> None:
    rates = (1.0, 2.0, 4.0, 3.0)
    tried = tuple(Tried(rate, 1.0, True, spread(0.1 * rate), spread(0.01), None) for rate in rates)
    found = Capacity(3.0, 0.99, tried, report([Served(4, 0.0, [1.0])]))
    figure = pictures.latency([("a machine", found)], {"ttft": 0.5, "tpot": 0.02}, "rates")
    ttft, tpot = panels_of(figure)
    said(figure, "a machine: 3 requests/s", "objective 500 ms", "objective 20 ms", "TTFT", "99th percentile")
    median, last = (line.get_xydata().tolist() for line in ttft.lines[:2])
    assert [rate for rate, _ in median] == [1, 2, 3, 4]
    assert last[2] == pytest.approx([3, 600])
    assert [line.get_xdata()[0] for line in (ttft.lines[2], tpot.lines[2])] == [3.0, 3.0]


def test_distributions() -> None:
    served = [Served(4, 0.0, [0.1 * number, 0.1 * number + 0.02]) for number in range(1, 11)]
    runs = [("fcfs", served), ("static", [*served, Served(4, 0.0, [], error="too long")])]
    figure = pictures.distributions(runs, {"ttft": 0.5}, "two runs")
    ttft, tpot, _ = panels_of(figure)
    assert ttft.lines[0].get_xydata()[-1] == pytest.approx((1000, 100))
    assert tpot.lines[0].get_xdata() == pytest.approx([20] * 10)
    assert ttft.lines[2].get_xdata()[0] == 500
    said(figure, "fcfs", "static", "two runs")


def test_predictions() -> None:
    steps = [("decode", 1.0e-3, 1.0e-3), ("decode", 1.1e-3, 1.0e-3), ("prefill", 1.6e-2, 2.0e-2)]
    figure = pictures.predictions(steps, "steps")
    left, right = panels_of(figure)
    said(figure, "decode, 2 steps", "prefill, 1 steps", "median 10.0%", "sum -17.7%")
    assert left.get_xlim() == left.get_ylim()
    errors = [float(y) for one in right.collections for _, y in one.get_offsets() if len(one.get_offsets()) < 3]
    assert sorted(errors)[:1] == pytest.approx([-20])


@pytest.mark.parametrize(("name", "start"), [("a.png", b"\x89PNG"), ("b/c.SVG", b"<?xml")])
def test_files(tmp_path: Path, name: str, start: bytes) -> None:
    path = tmp_path / name
    written = []
    for _ in range(2):
        pictures.save(pictures.predictions([("decode", 1e-3, 1e-3)], "one step"), path)
        written.append(path.read_bytes())
    assert written[0].startswith(start)
    assert written[0] == written[1]


def test_other_files_are_refused_before_any_work(tmp_path: Path) -> None:
    for bad in ("picture.pdf", "picture", "picture.jpeg"):
        with pytest.raises(InvalidArgument, match=r"plot: must end in \.png or \.svg"):
            pictures.checked(tmp_path / bad)
    assert pictures.checked(None) is None
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidArgument, match="cannot be written"):
        pictures.save(pictures.predictions([("decode", 1e-3, 1e-3)], ""), tmp_path / "file" / "a.png")


# The commands


def run(*arguments: str) -> str:
    from typer.testing import CliRunner

    from ridgeline.cli.main import application

    done = CliRunner().invoke(application, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


COMMANDS: Sequence[Sequence[str]] = (
    ("plan", "--hardware", "a10", "--hardware", "l4"),
    ("plan", "--hardware", "a10", "--batch", "1..8"),
    ("plan", "--hardware", "a10", "--slo", "ttft=1s", "--num-prompts", "5"),
    ("simulate", "--hardware", "a10", "--num-prompts", "5"),
)


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_commands_draw(command: Sequence[str], tmp_path: Path) -> None:
    path = tmp_path / "picture.svg"
    shown = run(*command, "--plot", str(path), "--json")
    assert isinstance(json.loads(shown), dict)
    assert "</svg>" in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("command", [*COMMANDS, ("explain",), ("bench", "throughput")], ids=" ".join)
def test_commands_refuse_other_files_first(command: Sequence[str], tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="plot: must end in"):
        run(*command, "--plot", str(tmp_path / "picture.gif"))
