"""`ridgeline plan`: what a model costs on a machine, before anything runs.

Knows options and tables. It must not know how figures come about (study/plan.py).
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ridgeline.cli import options, workload
from ridgeline.cli.figures import count, milliseconds, size

if TYPE_CHECKING:
    from pathlib import Path

    from ridgeline.perf.hardware import Hardware as Machine
    from ridgeline.study.plan import Plan, Planner

Hardware = Annotated[
    list[str] | None,
    typer.Option(help="a10, a100-40, h200 … or this (measured now); again for a comparison. Any case."),
]


def command(
    model: options.Model = None,
    hardware: Hardware = None,
    dtype: Annotated[str, typer.Option(help="auto, bf16, fp16 or fp32.")] = "auto",
    prompt_len: Annotated[int, typer.Option(help="Prompt tokens of a request.")] = 512,
    output_len: Annotated[int, typer.Option(help="Output tokens of a request.")] = 128,
    batch: Annotated[str, typer.Option(help="Requests at once, or a range such as 1..512 (powers of two).")] = "1",
    gpu_memory_utilization: options.GPUMemoryUtilization = 0.9,
    price_per_hour: Annotated[float | None, typer.Option(help="US dollars an hour, instead of the table's.")] = None,
    slo: workload.Slo = None,
    trace: workload.Trace = None,
    num_prompts: workload.NumPrompts = None,
    length_scale: workload.LengthScale = 1.0,
    what_if: Annotated[
        bool, typer.Option("--what-if", help="Price the usual optimisations on this model, one by one.")
    ] = False,
    as_json: options.Json = False,
) -> None:
    """Memory, capacity, FLOP/byte against the ridge, TTFT, TPOT, E2E: the floor, and the rule of thumb beside it."""
    from dataclasses import replace

    from ridgeline.study.plan import batches, machines, planner

    found = [
        one if price_per_hour is None else replace(one, price_per_hour=price_per_hour) for one in machines(hardware)
    ]
    asked = batches(batch)
    planned = planner(model, dtype)
    if slo is not None:
        _capacities(planned, found, slo, trace, num_prompts, length_scale, prompt_len, output_len, as_json)
        return
    if what_if:
        _what_if(planned, found, prompt_len, output_len, asked[0], as_json)
        return
    if len(asked) > 1:
        sweeps = [planned.sweep(one, prompt_len, output_len, asked) for one in found]
        if as_json:
            print(
                json.dumps(sweeps[0].as_dict() if len(sweeps) == 1 else {"sweeps": [one.as_dict() for one in sweeps]})
            )
            return
        for sweep in sweeps:
            Console().print(sweep_table(sweep))
            Console().print("\n".join(sweep.lines()), style="dim", highlight=False)
        return
    plans = [planned.plan(one, prompt_len, output_len, asked[0], gpu_memory_utilization) for one in found]
    if as_json:
        print(json.dumps(plans[0].as_dict() if len(plans) == 1 else {"plans": [one.as_dict() for one in plans]}))
        return
    console = Console()
    console.print(summary(plans))
    for plan in plans:
        console.print(operators(plan))


def _capacities(
    planned: Planner,
    found: list[Machine],
    slo: str,
    trace: Path | None,
    num_prompts: int | None,
    length_scale: float,
    prompt_len: int,
    output_len: int,
    as_json: bool,
) -> None:
    """The highest rate within the objectives on each machine, by simulation."""
    from ridgeline.cli.progress import bar
    from ridgeline.study.simulate import capacity, setting_for
    from ridgeline.workload.measure import objectives_named

    objectives = objectives_named(slo)
    jobs = workload.jobs_of(
        trace, num_prompts, prompt_len, output_len, length_scale, None, 1.0, 0, planned.spec.max_positions
    )
    longest = min(max(job.prompt_tokens + job.output_tokens for job in jobs), planned.spec.max_positions)
    results = []
    for machine in found:
        setting = setting_for(planned, machine, max_model_len=longest)
        with bar(f"searching on {machine.name}", shown=not as_json, unit="run") as progress:
            results.append(capacity(jobs, setting, planned.seconds(machine), objectives, progress=progress))
    if as_json:
        rows = [{"hardware": m.id, **one.as_dict()} for m, one in zip(found, results)]
        print(json.dumps({"model": planned.name, "dtype": planned.dtype, "steps": "floor", "capacities": rows}))
        return
    for machine, one in zip(found, results):
        title = f"{planned.name} on {machine.name}: {one.rate_per_s:.2f} requests/s within {slo} (steps at their floor)"
        Console().print(workload.report_table(one.best, title))


def _what_if(
    planned: Planner, found: list[Machine], prompt_len: int, output_len: int, batch: int, as_json: bool
) -> None:
    from ridgeline.study.what_if import what_if

    results = [(machine, what_if(planned, machine, prompt_len, output_len, batch)) for machine in found]
    if as_json:
        rows = [{"hardware": m.id, "what_if": [one.as_dict() for one in listed]} for m, listed in results]
        print(json.dumps({"model": planned.name, "dtype": planned.dtype, "steps": "floor", "machines": rows}))
        return
    for machine, listed in results:
        base = listed[0]
        table = Table(
            "", "TTFT", "", "TPOT", "", "weights", "KV a token", "assumption",
            title=f"{planned.name}, {planned.dtype}, on {machine.name}: floors with or without",
        )  # fmt: skip
        for one in listed:
            ttft, tpot = one.ttft_s / base.ttft_s, one.tpot_s / base.tpot_s
            table.add_row(
                one.name, milliseconds(one.ttft_s), f"{ttft:.2f}x", milliseconds(one.tpot_s), f"{tpot:.2f}x",
                size(one.weight_bytes), size(one.kv_bytes_per_token), one.assumption,
            )  # fmt: skip
        Console().print(table)


def summary(plans: list[Plan]) -> Table:
    """Machines side by side."""
    first = plans[0]
    title = (
        f"{first.model}, {first.dtype}, {first.batch} × ({first.prompt_len} + {first.output_len}) tokens; "
        "times are floors"
    )
    table = Table("", *(plan.hardware.name for plan in plans), title=title)
    rows: list[tuple[str, Any]] = [
        ("parameters", lambda p: count(p.parameters)),
        ("weights", lambda p: size(p.weight_bytes)),
        ("KV cache a token", lambda p: size(p.kv_bytes_per_token)),
        ("KV capacity", lambda p: f"{p.kv_capacity_tokens:,} tokens"),
        ("resident requests", lambda p: f"{p.resident_requests:,}"),
        ("machine balance", lambda p: f"{p.hardware.balance(p.dtype):.1f} FLOP/byte"),
        ("prefill", lambda p: _bound(p.prefill)),
        ("decode", lambda p: _bound(p.decode)),
        ("TTFT", lambda p: milliseconds(p.ttft_s)),
        ("TPOT", lambda p: milliseconds(p.tpot_s)),
        ("E2E", lambda p: milliseconds(p.e2e_s)),
        ("output tokens/s", lambda p: f"{p.output_tokens_per_s:,.0f}"),
        ("$ a million output tokens", lambda p: _dollars(p.cost_per_million_tokens)),
        ("rule of thumb: TTFT", lambda p: milliseconds(p.simple_rule["ttft_s"])),
        ("rule of thumb: TPOT", lambda p: milliseconds(p.simple_rule["tpot_s"])),
        ("rule of thumb: E2E", lambda p: milliseconds(p.simple_rule["e2e_s"])),
    ]
    for name, show in rows:
        table.add_row(name, *(show(plan) for plan in plans))
    return table


def operators(plan: Plan) -> Table:
    """Op by op: where a step's floor goes."""
    table = Table(
        "phase",
        "op",
        "class",
        "GFLOP",
        "MB",
        "FLOP/byte",
        "ms",
        "share",
        title=f"{plan.hardware.name}: the floor by op",
    )
    for name, phase in (("prefill", plan.prefill), ("decode", plan.decode)):
        for one in sorted(phase.ops, key=lambda one: -one.seconds):
            intensity = "" if not one.bytes else f"{one.flops / one.bytes:.1f}"
            table.add_row(
                name, one.name, one.kind, f"{one.flops / 1e9:,.2f}", f"{one.bytes / 1e6:,.1f}", intensity,
                f"{one.seconds * 1e3:,.3f}", f"{one.seconds / phase.seconds:.1%}",
            )  # fmt: skip
    return table


def sweep_table(sweep: Any) -> Table:
    table = Table(
        "batch", "prefill attention", "prefill FFN", "decode attention", "decode FFN", "TPOT", "tokens/s", "fits",
        title=f"{sweep.model} on {sweep.hardware.name}, {sweep.dtype}: FLOP/byte by batch (ridge {sweep.balance:.0f})",
    )  # fmt: skip
    for row in sweep.rows:
        cells = (row.prefill_attention, row.prefill_ffn, row.decode_attention, row.decode_ffn)
        shown = [f"{one:,.1f}" + (" compute" if one > sweep.balance else "") for one in cells]
        fits = "yes" if row.fits else "no"
        table.add_row(str(row.batch), *shown, milliseconds(row.tpot_s), f"{row.tokens_per_s:,.0f}", fits)
    return table


def _bound(phase: Any) -> str:
    return f"{phase.cost.flops / phase.cost.bytes:,.1f} FLOP/byte, {phase.bound}"


def _dollars(value: float | None) -> str:
    return "no price known" if value is None else f"{value:.3f}"
