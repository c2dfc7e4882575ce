"""Every command of the performance model on a GPU, with the embedded model: it runs, and its figures hang together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("typer")
from typer.testing import CliRunner

from ridgeline.cli.main import application

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
SHORT = ("--prompt-len", "96", "--output-len", "24")
POOL = ("--kv-cache-memory-bytes", str(256 << 20))
"""Other tests may be on the same card."""


def told(*arguments: str) -> dict[str, Any]:
    """A command's --json."""
    done = CliRunner().invoke(application, [*arguments, "--json"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def card(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Calibrated here, for the embedded model."""
    path = tmp_path_factory.mktemp("card") / "card.json"
    made = told("calibrate", "--device", DEVICE, *POOL, "--max-num-seqs", "16", "--allow-busy", "-o", str(path))
    assert made["captured"], "short prompts are captured on a GPU"
    return path


def test_what_a_card_says(card: Path, tmp_path: Path) -> None:
    """plan, explain, simulate and bench throughput with the card: pictures are made, and predictions are near."""
    picture = tmp_path / "explain.png"
    explained = told(
        "explain", "--device", DEVICE, *POOL, *SHORT, "--batch", "8", "--card", str(card), "--plot", str(picture)
    )
    decode = next(one for one in explained["steps"] if one["kind"] == "decode")
    assert decode["floor_s"] < decode["step_s"]
    assert decode["predicted"] is not None
    assert picture.stat().st_size > 10_000
    planned = told("plan", "--hardware", "h200", *SHORT, "--batch", "8", "--card", str(card))
    assert planned["calibrated"]["tpot_s"] > planned["decode"]["seconds"]
    few = ("--num-prompts", "12", "--request-rate", "20")
    simulated = told("simulate", *SHORT, *few, "--card", str(card))
    served = told("bench", "throughput", "--device", DEVICE, *POOL, *SHORT, *few, "--card", str(card))
    assert simulated["output_tokens"] == served["runs"][0]["output_tokens"] == 12 * 24


def test_the_highest_rate_is_verified() -> None:
    found = told("plan", "--slo", "ttft=9s,tpot=9s", "--verify", *POOL, *SHORT, "--num-prompts", "8")
    assert found["engine"].find("cuda") >= 0
    assert found["measured"]["requests"] == 8


@pytest.mark.parametrize("more", [(), ("--operators",), ("--attention", "decode,sm90", "--attention", "triton")])
def test_profiles(more: tuple[str, ...]) -> None:
    found = told("profile", "--device", DEVICE, *POOL, *SHORT, *more)
    if "--attention" in more:
        assert [one["name"] for one in found["rungs"]] == ["decode,sm90", "triton"]
        assert all(one["copies"] == 0 for one in found["rungs"])
    else:
        ours = found["runs"][0]
        assert ours["kernels_per_token"] > 0
        assert sum(ours["copies_per_token"].values()) < 1, "no copies in the hot path of decoding"


def test_latency_by_rung() -> None:
    lengths = ("--sequence", "96", "--new-tokens", "8", "--batch", "1", "--rounds", "2")
    found = told("bench", "latency", "--device", DEVICE, *lengths, "--attention", "triton")
    assert "triton" in json.dumps(found)


def test_kernels_are_listed_and_tuned(tmp_path: Path) -> None:
    done = CliRunner().invoke(application, ["kernels", "--device", DEVICE], catch_exceptions=False)
    assert done.exit_code == 0
    assert "decode" in done.output
    few = ("--kernel", "decode", "--head-dim", "128", "--most", "2", "--rounds", "2")
    found = told("kernels", "tune", "--device", DEVICE, *few, "--out", str(tmp_path / "table.json"))
    assert found
    assert (tmp_path / "table.json").is_file()


def test_generate_explains_itself() -> None:
    arguments = ["generate", "def add(a, b):", "--device", DEVICE, *POOL, "--max-tokens", "16", "--explain"]
    done = CliRunner().invoke(application, arguments, catch_exceptions=False)
    assert done.exit_code == 0
    assert "%" in done.output
