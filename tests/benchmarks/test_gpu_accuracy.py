"""The accuracy of predictions, quickly on the CPU: said before measured, all cells shown, later calls anchored."""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu_accuracy
from benchmarks.record import Record
from ridgeline.core.step import Spans
from ridgeline.models import parse_config
from ridgeline.ops import Ops
from ridgeline.perf.machine_card import MachineCard, Point, read_card
from ridgeline.study.calibrate_machine import CUDA
from ridgeline.study.plan import Planner

CARD = MachineCard(
    device="a GPU", dtype="bfloat16", made="", read_bytes_per_s=4e12, matrix_flops=7e14, reads=(), ops={}, decode=(),
    prefill=(), most_tokens=1, most_requests=1, longest=1,
)  # fmt: skip
COMMON = ["--quick", "--device", "cpu", "--kernels", "reference", "--threads", "1"]


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("accuracy")
    models = ["--models", "qwen3-0.6b", "qwen3-30b-a3b"]
    gpu_accuracy.main([*COMMON, *models, "--out", str(folder / "first.json")])
    return folder, json.loads((folder / "first.json").read_text())


def test_what_was_said_before_is_what_is_judged(first: tuple[Path, dict[str, Any]]) -> None:
    folder, found = first
    said = (folder / "gpu-accuracy-predictions.json").read_text().rstrip("\n")
    assert hashlib.sha256(said.encode()).hexdigest() == found["settings"]["predictions_sha256"]
    card = read_card(folder / "gpu-accuracy-card.json")
    assert isinstance(card, MachineCard)
    assert card.sha256 == found["settings"]["card_sha256"]
    cells = found["timings"]["cells"]
    assert [one["predicted_s"] for one in cells] == [one["predicted_s"] for one in json.loads(said)]
    assert len(cells) == 2 * (2 + 2 * 2)
    for one in cells:
        assert one["error"] == pytest.approx(one["predicted_s"] / one["measured_s"] - 1)
        assert one["floor_s"] > 0
        assert one["measured_floor_s"] > 0
        if "qwen3-0.6b" in one["cell"]:
            assert one["measured_floor_s"] == one["floor_s"]
    assert set(found["summary"]["all"]["error"]) == {"cells", "median", "p90", "most", "bias"}
    assert found["summary"]["all"]["simple_rule_error"]["cells"] == len(cells)
    lines = [one["line"] for one in found["targets"]]
    assert lines[:2] == ["step-time error, median (same call)", "step-time error, p90 (same call)"]
    assert found["summary"]["sweep"]["flat_up_to"] >= 1


def test_a_later_call_takes_the_card_and_anchors_it(first: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = first
    arguments = ["--models", "qwen3-0.6b", "--card", str(folder / "gpu-accuracy-card.json")]
    record = gpu_accuracy.main([*COMMON, *arguments, "--out", str(folder / "later.json")])
    found = json.loads((folder / "later.json").read_text())
    assert found["settings"]["anchored_anew"]
    assert [one["target"] for one in found["targets"]][:2] == ["<= 8%", "<= 15%"]
    assert "the card of" in record.notes[0]
    assert (folder / "gpu-accuracy-predictions-later.json").is_file()


def test_without_time_left_it_says_so(first: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, _ = first
    arguments = ["--models", "qwen3-0.6b", "--card", str(folder / "gpu-accuracy-card.json"), "--minutes", "0"]
    with pytest.raises(SystemExit, match=r"--minutes 0: the card alone took"):
        gpu_accuracy.main([*COMMON, *arguments, "--out", str(tmp_path / "none.json")])


def test_points_on_the_grid_are_found(first: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = first
    card = read_card(folder / "gpu-accuracy-card.json")
    assert isinstance(card, MachineCard)
    options = gpu_accuracy.arguments().parse_args([*COMMON, "--prompts", "20"])
    options.batches, options.contexts, options.pool_bytes = [1], [32], 8 << 20
    held = gpu_accuracy.held_out("qwen3-0.6b", options, torch.device("cpu"), card)
    assert gpu_accuracy.overlaps(card, held) == []
    sizes = held.planner.spec
    plane = card.decode[0]
    same = type(plane)(
        (float(sizes.heads), float(sizes.kv_heads), float(sizes.head_dim)), (1.0,), (32.0,), ((Point(1.0, 1.0, 1.0),),)
    )
    changed = MachineCard(**{**vars(card), "decode": (same,)})
    assert gpu_accuracy.overlaps(changed, held) == [("attention", same.sizes, 1.0, 32.0)]


@pytest.mark.parametrize("name", gpu_accuracy.MODELS)
def test_no_held_out_point_is_on_the_gpus_grid(name: str) -> None:
    """By the sizes of the made-up models alone: what a GPU would be measured at, without one."""
    options = gpu_accuracy.arguments().parse_args(["--pool-bytes", str(100 << 30)])
    held = gpu_accuracy.held_out(name, options, torch.device("cpu"), CARD)
    points = gpu_accuracy.points_of(held)
    assert len(held.cells) >= 3 + 4 * 3 - 2
    assert points
    for made in CUDA.models:
        values = {**made.config, "max_position_embeddings": CUDA.longest, "torch_dtype": CUDA.dtype}
        planner = Planner(parse_config(values), made.name, CUDA.dtype)
        for tokens in CUDA.tokens:
            seen = gpu_accuracy._Sizes()
            planner.price.trace(Spans((tokens,), (tokens,)), 1, False, Ops({}, seen))
            assert not {(op, sizes, along, 0.0) for op, sizes, along in seen.found} & points
        heads = (float(planner.spec.heads), float(planner.spec.kv_heads), float(planner.spec.head_dim))
        grid = {("attention", heads, float(row), float(column)) for row in CUDA.batches for column in CUDA.contexts}
        assert not grid & points


def test_memory_beside_the_plan() -> None:
    options = argparse.Namespace(quick=True, out=None, commit=None, machine=None)
    record = Record("memory", options)
    one = {"model": "a", "predicted_bytes": 102, "measured_bytes": 100, "pool_bytes": 60, "graph_bytes": 1}
    gpu_accuracy.compare_memory(record, [one, {**one, "model": "b", "predicted_bytes": 96}])
    assert record.targets[0].met is False
    assert record.targets[0].measured == "4.0%"
    assert record.tables[0]["rows"][0][3:] == ["+2.0%", "+5.0%"]
