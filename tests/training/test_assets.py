"""What ships: the committed assets agree with the committed numbers and with their limits."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from safetensors import safe_open
from tokenizers import Tokenizer

from training.card import model_card
from training.export import LARGEST_SHARD_BYTES

ROOT = Path(__file__).resolve().parents[2]
ASSETS = ROOT / "src" / "ridgeline" / "assets"


def load(name: str) -> dict:
    return json.loads((ROOT / "training" / name).read_text())


def test_the_card_says_what_was_measured() -> None:
    assert (ASSETS / "MODEL_CARD.md").read_text() == model_card(load("corpus.json"), load("results.json"))


def test_the_bars_are_met() -> None:
    results = load("results.json")
    assert results["held_out"]["ratio_to_smaller_xz"] <= 0.70
    assert results["human_eval"]["rate"] >= 0.70
    accepted = results["acceptance"]
    for measure in ("overlap_at_temperature_1", "greedy_agreement"):
        assert accepted["distilled"][measure] > accepted["plain"][measure]


@pytest.mark.parametrize("name", ["model", "ssm"])
def test_weights_are_whole_and_small(name: str) -> None:
    folder, counted = ASSETS / name, 0
    tensors = set()
    for shard in folder.glob("*.safetensors"):
        assert shard.stat().st_size <= LARGEST_SHARD_BYTES
        with safe_open(shard, "pt") as file:
            for key in file.keys():  # noqa: SIM118
                part = file.get_slice(key)
                assert part.get_dtype() == "BF16"
                counted += math.prod(part.get_shape())
                tensors.add(key)
    run = load("results.json")["target" if name == "model" else "ssm"]
    assert counted == run["parameters"]
    index = folder / "model.safetensors.index.json"
    if index.exists():
        assert set(json.loads(index.read_text())["weight_map"]) == tensors
    config = json.loads((folder / "config.json").read_text())
    assert {key: config[key] for key in run["sizes"]} == run["sizes"]
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == config["vocab_size"]
    assert tokenizer.encode("").ids == [0]


def test_every_package_is_listed_once_with_a_licence() -> None:
    packages = load("corpus.json")["packages"]
    assert len({one["name"] for one in packages}) == len(packages)
    assert all(one["licence"] and one["files"] > 0 and one["split"] in ("train", "held-out") for one in packages)
    assert 2e6 < sum(one["bytes"] for one in packages if one["split"] == "held-out") < 4e6
