"""Plans: the figures against arithmetic by hand, the errors, the command's JSON."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from ridgeline.cli.main import application
from ridgeline.core.errors import DoesNotFit, InvalidArgument
from ridgeline.perf.hardware import find, named
from ridgeline.study.plan import Planner, batches, datasheet, datasheet_of, planner

LLAMA_2_7B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
}
PARAMETERS = 6_738_415_616  # as published


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plan") / "llama-2-7b.config.json"
    path.write_text(json.dumps(LLAMA_2_7B))
    return path


@pytest.fixture(scope="module")
def llama(config: Path) -> Planner:
    return planner(str(config))


def test_figures_against_arithmetic(llama: Planner) -> None:
    plan = llama.plan(find("a10"), 512, 128, 2)
    assert plan.parameters == PARAMETERS
    assert plan.weight_bytes == 2 * PARAMETERS
    assert plan.kv_bytes_per_token == 2 * 32 * 4096 * 2
    room = 0.9 * 24e9 - plan.weight_bytes - plan.activation_bytes
    assert plan.kv_capacity_tokens == pytest.approx(room / plan.kv_bytes_per_token, abs=64)
    assert plan.resident_requests == plan.kv_capacity_tokens // 640
    # Two requests decode at 576 tokens: every weight but the embedding table, and both caches.
    read = 2 * (PARAMETERS - 32000 * 4096) + 2 * 576 * plan.kv_bytes_per_token
    assert plan.decode.cost.bytes == pytest.approx(read, rel=0.005)
    assert plan.tpot_s == pytest.approx(read / 600e9, rel=0.005)
    assert plan.decode.bound == "memory"
    matmul = 2 * (PARAMETERS - 2 * 32000 * 4096) * 1024 + 2 * 2 * 32000 * 4096
    attention = 32 * 2 * 4 * 4096 * 512 * 513 / 2
    assert plan.prefill.cost.flops == pytest.approx(matmul + attention, rel=0.001)
    assert plan.prefill.bound == "compute"
    assert plan.e2e_s == pytest.approx(plan.ttft_s + 127 * plan.tpot_s)
    assert plan.simple_rule["ttft_s"] == pytest.approx(1024 * 2 * PARAMETERS / 125e12)
    assert plan.simple_rule["tpot_s"] == pytest.approx(2 * PARAMETERS / 600e9)


def test_the_parts_are_the_whole(llama: Planner) -> None:
    plan = llama.plan(find("h200"), 300, 100, 4)
    for phase in (plan.prefill, plan.decode):
        assert sum(one.flops for one in phase.ops) == pytest.approx(phase.cost.flops)
        assert sum(one.bytes for one in phase.ops) == pytest.approx(phase.cost.bytes)
        assert sum(one.seconds for one in phase.ops) == pytest.approx(phase.seconds)


def test_what_does_not_fit_says_by_how_much_and_what_would(llama: Planner) -> None:
    with pytest.raises(DoesNotFit, match=r"9\.\d GB more than .*; batch 3 fits, or 1,\d\d\d tokens a request"):
        llama.plan(find("a10"), 2048, 2000, 8)
    wide = Planner(llama.spec, "llama", "float32")
    with pytest.raises(DoesNotFit, match=r"GB more than the 21\.6 GB of NVIDIA A10 .*a100-40, .*bfloat16 would fit"):
        wide.plan(find("a10"), 16, 16, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 1, 1), "prompt_len: must be at least 1"),
        ((1, 0, 1), "output_len: must be at least 1"),
        ((1, 1, 0), "batch: must be at least 1"),
        ((4000, 200, 1), "beyond the 4096 positions"),
    ],
)
def test_bad_lengths(llama: Planner, arguments: tuple[int, int, int], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        llama.plan(find("h200"), *arguments)


def test_batching_helps_weights_and_not_attention(llama: Planner) -> None:
    machine = find("a100-40")
    sweep = llama.sweep(machine, 512, 128, [1, 16, 256])
    first, last = sweep.rows[0], sweep.rows[-1]
    assert first.decode_ffn == pytest.approx(1, rel=0.01)
    assert last.decode_ffn > 200
    assert last.decode_attention == pytest.approx(first.decode_attention)
    assert last.prefill_attention == pytest.approx(first.prefill_attention, rel=0.01)
    assert sweep.critical_batch is not None
    below, at = (llama._ffn_intensity(sweep.critical_batch - one) for one in (1, 0))
    assert below < machine.balance("float16") <= at
    assert [row.fits for row in sweep.rows] == [True, True, False]
    assert [row.tpot_s for row in sweep.rows] == sorted(row.tpot_s for row in sweep.rows)


def test_drivers_names_are_found_in_the_table() -> None:
    names = {
        "NVIDIA H200": "h200",
        "NVIDIA A10": "a10",
        "NVIDIA L40S": "l40s",
        "NVIDIA A100-SXM4-40GB": "a100-40",
        "NVIDIA A100-SXM4-80GB": "a100-80",
        "NVIDIA H100 80GB HBM3": "h100-sxm",
        "NVIDIA H100 PCIe": "h100-pcie",
        "NVIDIA GeForce RTX 5090": "rtx5090",
        "NVIDIA GeForce RTX 3060": None,
        "some CPU": None,
    }
    assert {name: getattr(named(name), "id", None) for name in names} == names
    assert datasheet(find("h200")) is None
    here = datasheet(replace(find("h200"), id="this", name="this NVIDIA H200", memory_bytes_per_s=4e12))
    assert here is find("h200")
    assert datasheet_of("cpu") is None


def test_batches() -> None:
    assert batches("8") == [8]
    assert batches("1..512") == [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]
    assert batches("3..10") == [3, 6, 10]
    for bad in ("0", "4..2", "many", "1..x", ""):
        with pytest.raises(InvalidArgument, match="batch"):
            batches(bad)


def shown(*arguments: str) -> str:
    return CliRunner(env={"COLUMNS": "160"}).invoke(application, arguments, catch_exceptions=False).stdout


PLAN = {
    "parameters": int,
    "weight_bytes": int,
    "kv_bytes_per_token": int,
    "kv_capacity_tokens": int,
    "resident_requests": int,
    "machine_balance_flop_per_byte": float,
    "prefill": dict,
    "decode": dict,
    "ttft_s": float,
    "tpot_s": float,
    "e2e_s": float,
    "simple_rule": dict,
    "ops": list,
}


def test_json(config: Path) -> None:
    found: dict[str, Any] = json.loads(
        shown("plan", "--model", str(config), "--hardware", "A10", "--dtype", "bf16", "--json")
    )
    assert {name: type(found[name]) for name in PLAN} == PLAN
    for phase in ("prefill", "decode"):
        assert set(found[phase]) >= {"flops", "bytes", "flop_per_byte", "seconds", "bound"}
    assert set(found["simple_rule"]) == {"ttft_s", "tpot_s", "e2e_s"}
    assert all({"name", "class", "flops", "bytes", "seconds"} <= set(one) for one in found["ops"])


def test_command_compares_machines_and_words_errors(config: Path) -> None:
    said = shown("plan", "--model", str(config), "--hardware", "h200", "--hardware", "l4")
    for word in ("NVIDIA H200", "NVIDIA L4", "TPOT"):
        assert word in said
    with pytest.raises(InvalidArgument, match=r"did you mean h200\?"):
        shown("plan", "--model", str(config), "--hardware", "h201")
