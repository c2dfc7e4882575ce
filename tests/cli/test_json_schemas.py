"""Every --json of the performance model against a schema: fields, types, units; nothing that is not named here."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from typer.testing import CliRunner

from ridgeline.cli.main import application
from ridgeline.study import calibrate, calibrate_machine, step_bench
from ridgeline.study.calibrate_machine import Made, _llama

NUMBER, INTEGER, TEXT, FLAG = ({"type": name} for name in ("number", "integer", "string", "boolean"))
POSITIVE = {"type": "number", "exclusiveMinimum": 0}
COUNT = {"type": "integer", "minimum": 0}
SHARE = {"type": "number", "minimum": 0, "maximum": 1}
BOUND = {"enum": ["compute", "memory"]}
CLASS = {"enum": ["contraction", "normalization", "elementwise", "movement"]}


def thing(**fields: Any) -> dict[str, Any]:
    """An object of exactly these fields."""
    return {"type": "object", "properties": fields, "required": list(fields), "additionalProperties": False}


def many(one: Any, least: int = 1) -> dict[str, Any]:
    return {"type": "array", "items": one, "minItems": least}


def maybe(one: Any) -> dict[str, Any]:
    return {"anyOf": [one, {"type": "null"}]}


def table(value: Any) -> dict[str, Any]:
    """An object with any names."""
    return {"type": "object", "additionalProperties": value, "minProperties": 1}


PHASE = thing(flops=POSITIVE, bytes=POSITIVE, flop_per_byte=POSITIVE, seconds=POSITIVE, bound=BOUND)
CALIBRATED = thing(
    sha256=TEXT, device=TEXT, ttft_s=POSITIVE, tpot_s=POSITIVE, ttft_error=NUMBER, tpot_error=NUMBER, steps=INTEGER,
    beyond=FLAG,
)  # fmt: skip
PLAN = thing(
    model=TEXT, hardware=TEXT, dtype=TEXT, prompt_len=INTEGER, output_len=INTEGER, batch=INTEGER, parameters=INTEGER,
    weight_bytes=INTEGER, activation_bytes=INTEGER, kv_bytes_per_token=INTEGER, kv_capacity_tokens=INTEGER,
    memory_utilization=SHARE, resident_requests=INTEGER, machine_balance_flop_per_byte=POSITIVE, prefill=PHASE,
    decode=PHASE, ttft_s=POSITIVE, tpot_s=POSITIVE, e2e_s=POSITIVE, output_tokens_per_s=POSITIVE,
    cost_per_million_tokens=maybe(POSITIVE),
    simple_rule=thing(ttft_s=POSITIVE, tpot_s=POSITIVE, e2e_s=POSITIVE), calibrated=maybe(CALIBRATED),
    ops=many({**thing(phase={"enum": ["prefill", "decode"]}, name=TEXT, flops=NUMBER, bytes=NUMBER,
                      flop_per_byte=maybe(NUMBER), seconds=NUMBER, **{"class": CLASS})}),
    notes=many(TEXT, 0),
)  # fmt: skip
SWEEP = thing(
    model=TEXT, hardware=TEXT, dtype=TEXT, prompt_len=INTEGER, output_len=INTEGER,
    machine_balance_flop_per_byte=POSITIVE, critical_batch=maybe(INTEGER),
    batches=many(thing(batch=INTEGER, prefill_attention=POSITIVE, prefill_ffn=POSITIVE, decode_attention=POSITIVE,
                       decode_ffn=POSITIVE, tpot_s=POSITIVE, tokens_per_s=POSITIVE, fits=FLAG)),
)  # fmt: skip
WHAT_IF = thing(
    model=TEXT, dtype=TEXT, steps={"const": "floor"},
    machines=many(thing(hardware=TEXT, what_if=many(thing(
        name=TEXT, has=FLAG, assumption=TEXT, ttft_s=POSITIVE, tpot_s=POSITIVE, weight_bytes=POSITIVE,
        kv_bytes_per_token=NUMBER)))),
)  # fmt: skip
SPREAD = thing(count=INTEGER, mean_s=NUMBER, p50_s=NUMBER, p90_s=NUMBER, p99_s=NUMBER, max_s=NUMBER)
REPORT = {
    "requests": COUNT, "failed": COUNT, "seconds": POSITIVE, "prompt_tokens": COUNT, "output_tokens": COUNT,
    "cached_tokens": COUNT, "preemptions": COUNT, "request_rate_per_s": POSITIVE, "output_tokens_per_s": POSITIVE,
    "ttft": SPREAD, "tpot": SPREAD, "itl": SPREAD, "e2e": SPREAD, "objectives_s": {"type": "object"},
    "goodput_per_s": maybe(NUMBER), "formulas": table(TEXT),
}  # fmt: skip
TRIED = thing(rate_per_s=POSITIVE, share=SHARE, sustained=FLAG, ttft=SPREAD, tpot=SPREAD, e2e=SPREAD)
SLO = thing(
    model=TEXT, dtype=TEXT, steps=TEXT,
    capacities=many(thing(hardware=TEXT, rate_per_s=POSITIVE, share=SHARE, tried=many(TRIED), best=thing(**REPORT))),
)  # fmt: skip
VERIFIED = thing(
    engine=TEXT, steps=TEXT, rate_per_s=POSITIVE, planned=thing(**REPORT), measured=thing(**REPORT),
    errors=table(NUMBER), holds=FLAG,
)  # fmt: skip
PRICE = thing(
    op=TEXT, m=INTEGER, k=INTEGER, n=INTEGER, dtype=TEXT, flops=POSITIVE, bytes=POSITIVE, read_bytes=POSITIVE,
    write_bytes=POSITIVE, flop_per_byte=POSITIVE, hardware=TEXT, machine_balance_flop_per_byte=POSITIVE,
    seconds=POSITIVE, bound=BOUND, **{"class": CLASS},
)  # fmt: skip
LINE = thing(points=many(many(NUMBER)))
GRID = thing(rows=many(NUMBER), columns=many(NUMBER), values=many(many(NUMBER)), power=FLAG)
CARD = thing(
    card=TEXT, sha256=TEXT, version=INTEGER, device=TEXT, model=TEXT, dtype=TEXT, made=TEXT, body=LINE, head=LINE,
    decode=GRID, prefill=GRID, longest=NUMBER, step_s=NUMBER, request_s=NUMBER, ops_scale=NUMBER, host_step_s=NUMBER,
    host_request_s=NUMBER, loop_step_s=NUMBER, loop_request_s=NUMBER, residual=NUMBER, dispatch_s=NUMBER, tile=INTEGER,
    captured=many(INTEGER, 0),
    versions=table(TEXT), clocks=thing(spread=NUMBER, slowed=TEXT, before={"type": "object"}, after={"type": "object"}),
)  # fmt: skip
POINT = thing(flops=NUMBER, bytes=NUMBER, seconds=POSITIVE)
PLANE = thing(
    sizes=many(NUMBER), rows=many(NUMBER), columns=many(NUMBER), points=many(many(POINT)), squares=FLAG
)  # fmt: skip
MACHINE = thing(
    card_file=TEXT, card={"const": "machine"}, sha256=TEXT, version=INTEGER, device=TEXT, dtype=TEXT, made=TEXT,
    read_bytes_per_s=POSITIVE, matrix_flops=POSITIVE, reads=many(many(POSITIVE)),
    ops=table(many(thing(sizes=many(NUMBER), points=many(many({"anyOf": [POSITIVE, POINT]}))))),
    decode=many(PLANE), prefill=many(PLANE), decode_scale=NUMBER, attention_scale=NUMBER, mixture_scale=NUMBER,
    prefill_scale=NUMBER, alone_scale=NUMBER, step_s=NUMBER,
    request_s=NUMBER, gap_s=NUMBER, alone_gap_s=NUMBER, tile=INTEGER, captured=many(INTEGER, 0), start_s=NUMBER,
    launch_s={"type": "object"}, launch_scale=NUMBER,
    host_step_s=NUMBER, host_request_s=NUMBER, loop_step_s=NUMBER, loop_request_s=NUMBER, most_tokens=INTEGER,
    most_requests=INTEGER, longest=INTEGER, residual=NUMBER, doubt=TEXT, steps=many({"type": "object"}),
    versions=table(TEXT), clocks={"type": "object"},
)  # fmt: skip
SIMULATED = thing(model=TEXT, hardware=TEXT, dtype=TEXT, steps=TEXT, **REPORT)
EXPLAINED = thing(
    engine=TEXT, batch=INTEGER,
    steps=many(thing(
        kind={"enum": ["decode", "prefill", "mixed", "tree"]}, steps=INTEGER, tokens_per_step=POSITIVE, step_s=POSITIVE,
        floor_s=POSITIVE, floor_memory_s=NUMBER, floor_compute_s=NUMBER, kernels_s=NUMBER, gaps_s=NUMBER, host_s=NUMBER,
        draft_s=NUMBER, drafted_per_step=NUMBER, accepted_per_step=NUMBER,
        padding_rows=NUMBER, padding_s=NUMBER, observer_s=NUMBER, limit_share=SHARE, working_set_bytes=POSITIVE,
        read_bytes_per_s=POSITIVE, dram_bytes_per_s=POSITIVE, flops_per_s=POSITIVE, predicted=maybe({"type": "object"}),
        ops=many(thing(op=TEXT, calls=POSITIVE, flops=NUMBER, bytes=NUMBER, bound=BOUND, floor_s=NUMBER,
                       measured_s=NUMBER, of_limit=maybe(NUMBER), **{"class": CLASS})),
        advice=many(TEXT))),
)  # fmt: skip
OPERATOR = thing(name=TEXT, calls=INTEGER, self_s=NUMBER, total_s=NUMBER, device_s=NUMBER)
CLASS_ROW = thing(
    name=TEXT, calls_per_step=POSITIVE, flops=NUMBER, read_bytes=NUMBER, write_bytes=NUMBER, seconds=NUMBER,
    flop_share=SHARE, time_share=SHARE, peak_share=NUMBER, mue=NUMBER, unfused_bytes=maybe(NUMBER), **{"class": CLASS},
)  # fmt: skip
PROFILED = thing(
    runs=many(thing(side=TEXT, tokens=INTEGER, seconds=POSITIVE, operator_calls_per_token=POSITIVE,
                    kernels_per_token=maybe(NUMBER), copies_per_token=table(NUMBER), joules_per_token=maybe(NUMBER),
                    operators=many(OPERATOR))),
    classes=many(CLASS_ROW), ops=many(CLASS_ROW), notes=many(TEXT, 0),
)  # fmt: skip
RUNGS = thing(
    rungs=many(thing(name=TEXT, operators=POSITIVE, copies=NUMBER, kernels=maybe(NUMBER),
                     attention_bytes=maybe(POSITIVE), attention_s=POSITIVE)),
    verdicts=many(TEXT),
)  # fmt: skip
THROUGHPUT = thing(engine=TEXT, runs=many(thing(scheduling_policy=TEXT, **REPORT)))

ENGINE = ("--kernels", "reference")
SHORT = ("--prompt-len", "8", "--output-len", "4")
FEW = ("--num-prompts", "6")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    monkeypatch.setattr(calibrate, "TOKENS", (1, 8))
    monkeypatch.setattr(calibrate, "CONTEXTS", (16,))
    monkeypatch.setattr(step_bench, "REPEATS", 2)
    made = Made("dense", {**_llama(48, 80, 2, 1, 2, 300), "head_dim": 16})
    points = replace(
        calibrate_machine.CPU,
        models=(made,),
        tokens=(1, 12),
        batches=(1, 2),
        contexts=(16,),
        chunks=(12,),
        over=(1, 2),
        decodes=((1, 12), (2, 14), (1, 9), (2, 10)),
        prompts=((9, 0), (10, 0), (11, 0)),
        pool_bytes=1 << 20,
        rounds=1,
        anchor_s=0.01,
    )
    monkeypatch.setattr(calibrate_machine, "CPU", points)


@pytest.mark.parametrize(
    ("arguments", "schema"),
    [
        (("plan", "--model", "TINY", "--hardware", "a10", *SHORT), PLAN),
        (("plan", "--model", "TINY", "--hardware", "a10", "--hardware", "h200", *SHORT), thing(plans=many(PLAN, 2))),
        (("plan", "--model", "TINY", "--hardware", "a10", "--batch", "1..4", *SHORT), SWEEP),
        (("plan", "--model", "TINY", "--hardware", "a10", "--what-if", *SHORT), WHAT_IF),
        (("plan", "--model", "TINY", "--hardware", "a10", "--slo", "ttft=1s,tpot=1s", *SHORT, *FEW), SLO),
        (("plan", "--model", "TINY", "--slo", "ttft=9s,tpot=9s", "--verify", *SHORT, "--num-prompts", "3"), VERIFIED),
        (("price", "linear", "m=4", "k=8", "n=16"), PRICE),
        (("calibrate", "--model", "TINY", *ENGINE, "--max-num-seqs", "2", "--allow-busy", "-o", "OUT"), CARD),
        (("calibrate", "--machine", "--device", "cpu", *ENGINE, "--allow-busy", "-o", "OUT"), MACHINE),
        (("simulate", "--model", "TINY", "--hardware", "a10", *SHORT, *FEW), SIMULATED),
        (("explain", "--model", "TINY", *ENGINE, *SHORT, "--rounds", "1"), EXPLAINED),
        (("profile", "--model", "TINY", *ENGINE, *SHORT), PROFILED),
        (("profile", "--model", "TINY", "--attention", "reference", "--attention", "cpu", *SHORT), RUNGS),
        (("bench", "throughput", "--model", "TINY", *ENGINE, *SHORT, *FEW), THROUGHPUT),
    ],
)
def test_output(arguments: Sequence[str], schema: dict[str, Any], tiny: Path, tmp_path: Path) -> None:
    places = {"TINY": str(tiny), "OUT": str(tmp_path / "card.json")}
    command = [places.get(one, one) for one in arguments]
    done = CliRunner().invoke(application, [*command, "--json"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    jsonschema.validate(json.loads(done.stdout), schema)
