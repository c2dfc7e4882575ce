"""Speculation's benchmarks on a tiny model: every arm runs, outputs agree, what is counted adds up."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import gpu_speculation, gpu_tree_shapes, speculation_cpu, speculation_priced
from benchmarks.models import TINY_SHAPE, random_checkpoint
from benchmarks.record import RESULTS
from benchmarks.speculating import NONE, Arm, Counts, bound, cycled, human_eval, loops
from benchmarks.widen import open_original
from ridgeline.core.tree import TokenTree

Bench = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def tiny() -> Path:
    return random_checkpoint({**TINY_SHAPE, "vocab_size": 256})


@pytest.fixture
def bench(tiny: Path, tmp_path: Path) -> Bench:
    """Runs a benchmark quickly on the tiny model, which drafts for itself, and returns the file that it wrote."""
    prompts = tmp_path / "prompts.jsonl"
    lines = [json.dumps({"prompt": f"def f{number}(a):\n    return {number}"}) for number in range(4)]
    prompts.write_text("\n".join(lines) + "\n", encoding="utf-8")

    def go(module: Any, *arguments: str) -> dict[str, Any]:
        out = tmp_path / "result.json"
        given = ["--model", str(tiny), "--prompts", str(prompts), "--out", str(out)]
        if module is not speculation_priced:
            given += ["--plots", str(tmp_path)]
        module.main(["--quick", "--threads", "1", *given, *arguments])
        return json.loads(out.read_text(encoding="utf-8"))

    return go


def test_at_the_prices_of_another_machine(bench: Bench, tmp_path: Path) -> None:
    """Tokens and rows are counted, seconds are those of the file: a step with trees takes one, a level a tenth."""
    arms = {"none": {"tokens_per_s": [0.5, 0.5, 0.5]}}
    learned = {"with_trees_s": {"1": 1.0}, "plain_s": {"1": 2.0}, "draft_s": {"1": 0.25}, "level_s": {"1": 0.1}}
    for name in ("with_trees_s", "draft_s", "level_s"):
        learned[name]["512"] = learned[name]["1"]
    prices = tmp_path / "prices.json"
    prices.write_text(json.dumps({"summary": {"batch 1, temperature 0": {"arms": arms, "learned": learned}}}))
    result = bench(speculation_priced, "--prices", str(prices))
    chain = result["summary"]["chain of 4, temperature 0"]
    assert chain["tokens_a_step"] == pytest.approx(5.0)  # the drafter is the target
    assert chain["levels_a_draft"] == pytest.approx(4.0)
    assert chain["tokens_per_s"] == pytest.approx(5 / (1.0 + 0.25 + 3 * 0.1), rel=0.1)
    assert chain["over_none"] == pytest.approx(chain["tokens_per_s"] / 0.5)
    assert result["summary"]["tree, auto, temperature 0.8"]["tokens_a_step"] > 3


@pytest.mark.slow
def test_on_a_cpu(bench: Bench, tmp_path: Path) -> None:
    result = bench(speculation_cpu)
    for title in ("batch 1, temperature 0", "batch 2, temperature 0.8"):
        arms = result["summary"][title]["arms"]
        assert all(one["same_outputs"] == 1.0 for one in arms.values())
        assert arms["none"]["tokens_a_step"] == 1.0
        chain = arms["chain of 4"]
        assert chain["accepted_share"] == pytest.approx(1.0)  # the drafter is the target
        assert chain["tokens_a_step"] == pytest.approx(5.0)
        assert set(result["timings"][title]) == set(arms)
    assert {arm.name for arm in speculation_cpu.ARMS} == set(result["summary"]["batch 1, temperature 0"]["arms"])
    lines = {one["line"]: one["met"] for one in result["targets"]}
    assert lines["outputs token for token those of none, batch 1, temperature 0.8"] is True
    assert isinstance(lines["dynamic trees beside none, batch 1, temperature 0"], bool)
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["speculation-t0.8.png", "speculation-t0.png"]


@pytest.mark.slow
def test_gpu_speculation_on_a_cpu(bench: Bench, tmp_path: Path) -> None:
    """In fp32 the widened target says what the drafter says, so every draft is accepted, over a padded vocabulary."""
    on_cpu = ("--device", "cpu", "--kernels", "reference", "--dtype", "float32", "--hardware", "h200")
    result = bench(gpu_speculation, *on_cpu, "--temperatures", "0", "0.8")
    for temperature in ("0", "0.8"):
        cell = result["summary"][f"batch 1, temperature {temperature}"]
        arms = cell["arms"]
        assert arms["chain of 4"]["tokens_a_step"] == pytest.approx(5.0)
        assert all(one["same_outputs"] == 1.0 for one in arms.values())
        assert set(cell["bounds_tokens_per_s"]) == {"measured seconds", "roofs"}
        assert min(cell["bounds_tokens_per_s"].values()) > 0
    assert set(result["summary"]["batch 3, temperature 0"]["arms"]) == {arm.name for arm in gpu_speculation.BESIDE}
    assert {one["met"] for one in result["targets"]} == {None}
    assert (tmp_path / "gpu-speculation-t0.8.png").is_file()


def test_curves_of_runs_in_pieces(tmp_path: Path) -> None:
    results = [RESULTS / "h200" / f"2026-11-28-speculation-{part}-2.json" for part in ("1", "few")]
    words = ["--results", *map(str, results), "--name", "pieces"]
    assert gpu_speculation.main([*words, "--plots", str(tmp_path)]) is None
    assert [path.name for path in tmp_path.iterdir()] == ["pieces-t0.png"]
    with pytest.raises(SystemExit, match="--plots"):
        gpu_speculation.main(words)
    with pytest.raises(SystemExit, match="no 'chain of 99', but chain of 1, chain of 2"):
        gpu_speculation.main(["--static", "chain of 99"])
    named = [arm.name for arm in gpu_speculation.kept(gpu_speculation.ALONE, ["chain of 6"])]
    assert named == ["none", "tree, auto", "chain of 6"]


def test_an_adversary_changes_nothing(bench: Bench) -> None:
    on_cpu = ("--device", "cpu", "--kernels", "reference", "--dtype", "float32")
    result = bench(gpu_speculation, *on_cpu, "--adversary", "--name", "adversary")
    arms = result["summary"]["batch 1, temperature 0"]["arms"]
    assert set(arms) == {arm.name for arm in gpu_speculation.ADVERSARY}
    assert all(one["same_outputs"] == 1.0 for one in arms.values())
    assert any(note.startswith("batch 3, temperature 0, adversarial drafter") for note in result["notes"])


@pytest.mark.parametrize("adversary", [False, True])
def test_an_adversary_has_weights_of_the_same_size(tiny: Path, adversary: bool) -> None:
    config, read = open_original(tiny)
    names = ("model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "model.norm.weight")
    places = {name: torch.zeros(read(name).shape) for name in names}
    model: Any = SimpleNamespace(device="cpu", model=SimpleNamespace(store=SimpleNamespace(places=places)))
    gpu_speculation.fill_drafter(model, tiny, adversary)
    for name, place in places.items():
        original = read(name).float()
        assert torch.equal(place, original) == (not adversary or name.endswith("norm.weight"))
        assert float(place.std()) == pytest.approx(float(original.std()), rel=0.1)
    assert config["vocab_size"] == 256


@pytest.mark.slow
def test_merged_drafters_have_as_many_nodes_as_one(bench: Bench, tiny: Path) -> None:
    on_cpu = ("--device", "cpu", "--kernels", "reference", "--dtype", "float32")
    result = bench(gpu_speculation, *on_cpu, "--merge", "--second", str(tiny))
    arms = result["summary"]["batch 1, temperature 0"]["arms"]
    for nodes in (8, 16, 32):
        for who in ("one", "one and n-grams", "two"):
            assert 0 < arms[f"{who}, {nodes} nodes"]["nodes_a_step"] <= nodes
    assert all(one["same_outputs"] == 1.0 for one in arms.values())
    assert sum("accepted of as many verified nodes" in one["line"] for one in result["targets"]) == 12


def test_merged_drafters_are_held_against_as_many_nodes_of_one() -> None:
    arms = {
        "none": {"nodes_a_step": 0.0, "tokens_a_step": 1.0},
        "one, 8 nodes": {"nodes_a_step": 8.0, "tokens_a_step": 3.0},
        "one, 16 nodes": {"nodes_a_step": 16.0, "tokens_a_step": 4.0},
        "one and n-grams, 8 nodes": {"nodes_a_step": 4.0, "tokens_a_step": 2.8},
        "one and n-grams, 16 nodes": {"nodes_a_step": 12.0, "tokens_a_step": 3.75},
        "two, 16 nodes": {"nodes_a_step": 16.0, "tokens_a_step": 4.0},
    }
    assert gpu_speculation.at_equal_nodes(arms, "one and n-grams, 8 nodes") is None
    assert gpu_speculation.at_equal_nodes(arms, "one and n-grams, 16 nodes") == pytest.approx(2.75 / 2.5)
    assert gpu_speculation.at_equal_nodes(arms, "two, 16 nodes") == 1.0


def test_shapes_of_trees_on_a_cpu(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    on_cpu = ["--device", "cpu", "--kernels", "reference", "--dtype", "float32"]
    gpu_tree_shapes.main(["--quick", *on_cpu, "--out", str(out), "--plots", str(tmp_path)])
    cell = json.loads(out.read_text(encoding="utf-8"))["summary"]["vocabulary 256"]
    shapes = {(one["batch"], one["deep"], one["nodes"]): one for one in cell["shapes"]}
    assert set(shapes) == {(batch, deep, nodes) for batch in (1, 2) for deep in (False, True) for nodes in (1, 4)}
    assert all(min(one["draft_s"], one["verify_s"], one["sample_s"]) > 0 for one in shapes.values())
    assert shapes[1, True, 4]["tokens"] == pytest.approx(1 + 0.75 + 0.75**2 + 0.75**3 + 0.75**4)
    assert shapes[2, False, 4]["tokens"] == pytest.approx(1 + 0.75 + 0.12 + 0.04 + 0.02)
    assert shapes[1, True, 4]["draft_s"] > shapes[1, False, 4]["draft_s"]  # four passes, and one
    assert (tmp_path / "tree-shapes-256.png").is_file()


def test_what_is_accepted_is_counted_where_its_parent_was() -> None:
    counts = Counts()
    tree = TokenTree((5, 6, 7, 8), (-1, 0, -1, 2))
    told: Any = SimpleNamespace(tree=tree, ranks=[0, 0, 1, 0], accepted=[2], tokens=[7, 9])
    counts.hear(told)
    told = SimpleNamespace(tree=tree, ranks=[0, 0, 1, 0], accepted=[0, 1], tokens=[5, 6, 1])
    counts.hear(told)
    assert (counts.hits[1, 0], counts.trials[1, 0]) == (1, 2)
    assert (counts.hits[1, 1], counts.trials[1, 1]) == (1, 2)
    assert (counts.hits[2, 0], counts.trials[2, 0]) == (1, 2)  # under the second's parent, and under the first's
    assert counts.reached() == [1.0, 0.5]
    assert counts.chance(5, 0) == counts.chance(2, 0) == 0.5
    assert (counts + counts).trials[1, 0] == 4


def test_the_bound_is_the_formula() -> None:
    """A chain's: with a chance of 1/2 at every depth and free drafting, two levels where rows are free up to three."""
    counts = Counts()
    counts.trials[1, 0], counts.hits[1, 0] = 10, 5
    most = bound(counts, 1, lambda rows: 1.0 if rows <= 3 else 100.0, lambda rows: 0.0)
    assert most.tokens_per_s == pytest.approx(1 + 0.5 + 0.25)
    assert bound(counts, 1, float, lambda rows: 0.0).depth == 0
    assert bound(counts, 1, lambda rows: 3.0, lambda rows: 0.0, plain=lambda rows: 1.0).depth == 0


def test_loops_are_runs_that_come_again_and_again() -> None:
    run = list(range(8))
    assert not loops([*run, 50, *run])
    assert loops([*run, 50, *run, 51, *run])
    assert loops([1] * 10)
    assert not loops([1] * 9)
    assert not loops([])


def test_prompts_are_told_apart_when_they_come_again(tmp_path: Path) -> None:
    many = cycled(["a", "b"], 5)
    assert many == ["a", "b", "# 1\na", "# 1\nb", "# 2\na"]
    with pytest.raises(SystemExit, match="--prompts names"):
        human_eval(tmp_path / "none.jsonl")


def test_sized_arms_are_those_without_sizes() -> None:
    assert Arm("a", {"method": "tree"}).sized
    assert not Arm("a", {"method": "tree", "tree": [2]}).sized
    assert not NONE.sized
