"""`ridgeline plan`: what a model costs on a machine, before anything runs.

Knows options and tables. It must not know how figures come about (study/plan.py).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ridgeline.cli import options, workload
from ridgeline.cli.figures import count, milliseconds, size

if TYPE_CHECKING:
    from ridgeline.perf.card import Card
    from ridgeline.perf.hardware import Hardware as Machine
    from ridgeline.perf.machine_card import MachineCard
    from ridgeline.study.plan import Plan, Planner
    from ridgeline.workload.arrivals import Job

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
    kv_cache_memory_bytes: options.KVCacheMemoryBytes = None,
    price_per_hour: Annotated[float | None, typer.Option(help="US dollars an hour, instead of the table's.")] = None,
    slo: workload.Slo = None,
    trace: workload.Trace = None,
    num_prompts: workload.NumPrompts = None,
    length_scale: workload.LengthScale = 1.0,
    verify: Annotated[
        bool, typer.Option("--verify", help="Serve the rate that --slo found on this machine; the plan's error.")
    ] = False,
    what_if: Annotated[
        bool, typer.Option("--what-if", help="Price the usual optimisations on this model, one by one.")
    ] = False,
    card: options.CardFile = None,
    plot: options.Plot = None,
    as_json: options.Json = False,
) -> None:
    """Memory, capacity, FLOP/byte against the ridge, TTFT, TPOT, E2E: the floor, and the rule of thumb beside it."""
    from dataclasses import replace

    from ridgeline.core.errors import InvalidArgument
    from ridgeline.perf.hardware import THIS
    from ridgeline.perf.machine_card import card_of, read_card
    from ridgeline.study import pictures
    from ridgeline.study.plan import batches, datasheet, machines, planner

    pictures.checked(plot)
    if verify and slo is None:
        raise InvalidArgument("verify", "goes with --slo: what is served is the rate that it finds")
    if verify and [name.strip().lower() for name in hardware or [THIS]] != [THIS]:
        raise InvalidArgument("verify", "runs on this machine: leave --hardware out")
    if kv_cache_memory_bytes is not None and not verify:
        raise InvalidArgument(
            "kv_cache_memory_bytes", "is of the engine that --verify starts; plans take a share of memory"
        )
    if card is not None and len(hardware or [THIS]) > 1:
        raise InvalidArgument("card", "is of one machine: name one --hardware")
    if what_if and plot is not None:
        raise InvalidArgument("plot", "--what-if has no picture")
    if card is not None and what_if:
        raise InvalidArgument("card", "--what-if changes the model, which a card has not measured")
    given = read_card(card) if card else None
    if given is not None and dtype == "auto":
        dtype = given.dtype
    asked = batches(batch)
    load = (trace, num_prompts, length_scale, prompt_len, output_len)
    if verify:
        pool = {"gpu_memory_utilization": gpu_memory_utilization, "kv_cache_memory_bytes": kv_cache_memory_bytes}
        _verify(model, dtype, slo or "", load, pool, given, plot, as_json)
        return
    found = [
        one if price_per_hour is None else replace(one, price_per_hour=price_per_hour) for one in machines(hardware)
    ]
    planned = planner(model, dtype)
    measured = None if given is None else card_of(given, planned.price, planned.name, planned.dtype)
    if slo is not None:
        _capacities(planned, found, slo, load, gpu_memory_utilization, measured, plot, as_json)
        return
    if what_if:
        _what_if(planned, found, prompt_len, output_len, asked[0], as_json)
        return
    if len(asked) > 1:
        if measured is not None:
            raise InvalidArgument("card", "goes with one batch, not with a range")
        sweeps = [planned.sweep(one, prompt_len, output_len, asked) for one in found]
        if plot is not None:
            pictures.save(pictures.batches(sweeps), plot)
        if as_json:
            print(
                json.dumps(sweeps[0].as_dict() if len(sweeps) == 1 else {"sweeps": [one.as_dict() for one in sweeps]})
            )
            return
        for sweep in sweeps:
            Console().print(sweep_table(sweep))
            Console().print("\n".join(sweep.lines()), style="dim", highlight=False)
        return
    plans = [planned.plan(one, prompt_len, output_len, asked[0], gpu_memory_utilization, measured) for one in found]
    if plot is not None:
        pictures.save(pictures.plans(plans, [datasheet(one) for one in found]), plot)
    if as_json:
        print(json.dumps(plans[0].as_dict() if len(plans) == 1 else {"plans": [one.as_dict() for one in plans]}))
        return
    console = Console()
    console.print(summary(plans))
    for plan in plans:
        console.print(operators(plan))


SEARCHED_REQUESTS = 300
"""So many show whether a rate can go on."""
Load = tuple[Path | None, int | None, float, int, int]
"""(trace, num_prompts, length_scale, prompt_len, output_len) as they were given."""


def _jobs(load: Load, most: int) -> tuple[list[Job], int]:
    """Requests without arrivals, and the longest of them."""
    trace, num_prompts, length_scale, prompt_len, output_len = load
    if trace is None and num_prompts is None:
        num_prompts = SEARCHED_REQUESTS
    jobs = workload.jobs_of(trace, num_prompts, prompt_len, output_len, length_scale, None, 1.0, 0, most)
    return jobs, min(max(job.prompt_tokens + job.output_tokens for job in jobs), most)


def _capacities(
    planned: Planner,
    found: list[Machine],
    slo: str,
    load: Load,
    utilization: float,
    card: Card | None,
    plot: Path | None,
    as_json: bool,
) -> None:
    """The highest rate within the objectives on each machine, by simulation."""
    from ridgeline.cli.progress import bar
    from ridgeline.study import pictures
    from ridgeline.study.simulate import Carded, capacity, setting_for, simulate
    from ridgeline.workload.arrivals import poisson
    from ridgeline.workload.measure import objectives_named

    objectives = objectives_named(slo)
    jobs, longest = _jobs(load, planned.spec.max_positions)
    steps = Carded(card) if card else None
    results = []
    for machine in found:
        setting = setting_for(planned, machine, utilization, max_model_len=longest)
        seconds, host_s = (steps.device_s, steps.host_s) if steps else (planned.seconds(machine), None)
        with bar(f"searching on {machine.name}", shown=not as_json, unit="run") as progress:
            one = capacity(jobs, setting, seconds, objectives, host_s=host_s, progress=progress)
        if steps:  # the search went beyond the rate that it found: what counts is a run at that rate
            steps.forget()
            simulate(poisson(jobs, one.rate_per_s), setting, seconds, host_s)
        results.append(one)
    by = "card" if card else "floor"
    if plot is not None:
        title = f"{planned.name}, {planned.dtype}: rates within {slo} (steps by their {by})"
        named = [(machine.name, one) for machine, one in zip(found, results)]
        pictures.save(pictures.latency(named, objectives, title), plot)
    if as_json:
        predicted = {"prediction": steps.as_dict()} if steps else {}
        rows = [{"hardware": m.id, **one.as_dict(), **predicted} for m, one in zip(found, results)]
        print(json.dumps({"model": planned.name, "dtype": planned.dtype, "steps": by, "capacities": rows}))
        return
    for machine, one in zip(found, results):
        title = f"{planned.name} on {machine.name}: {one.rate_per_s:.2f} requests/s within {slo} (steps by their {by})"
        Console().print(workload.report_table(one.best, title))
    if steps:
        Console().print(steps.line(), style="yellow" if steps.beyond else "dim", highlight=False)


def _verify(
    model: str | None,
    dtype: str,
    slo: str,
    load: Load,
    pool: Mapping[str, Any],
    given: Card | MachineCard | None,
    plot: Path | None,
    as_json: bool,
) -> None:
    """The rate that a simulation of this very engine finds, served by the engine."""
    from ridgeline.cli.progress import bar
    from ridgeline.llm import LLM
    from ridgeline.perf.machine_card import card_of
    from ridgeline.study import pictures
    from ridgeline.study.plan import planner, this_machine
    from ridgeline.study.simulate import Carded, capacity, simulate
    from ridgeline.study.verify import setting_of, verify
    from ridgeline.workload.arrivals import poisson
    from ridgeline.workload.measure import objectives_named

    objectives = objectives_named(slo)
    jobs, longest = _jobs(load, planner(model, dtype).spec.max_positions)
    with LLM(model, dtype=dtype, max_model_len=longest, enable_prefix_caching=False, **pool) as llm:
        built = llm.built
        planned, setting = planner(model, built.config.dtype), setting_of(built)
        card = None if given is None else card_of(given, planned.price, planned.name, planned.dtype)
        steps = Carded(card) if card else None
        seconds, host_s = (steps.device_s, steps.host_s) if steps else (planned.seconds(this_machine()), None)
        with bar("searching", shown=not as_json, unit="run") as progress:
            found = capacity(jobs, setting, seconds, objectives, host_s=host_s, progress=progress)
        arriving = poisson(jobs, found.rate_per_s)
        if steps:
            steps.forget()
        simulated = simulate(arriving, setting, seconds, host_s, objectives)
        with bar(f"serving {found.rate_per_s:.2f} requests/s", shown=not as_json) as progress:
            done = verify(built, arriving, simulated.report, objectives, progress=progress)
        where = f"{planned.name}, {planned.dtype}, {built.config.device}"
    if plot is not None:
        title = f"{where}: {found.rate_per_s:.3g} requests/s, planned and served"
        runs = [("planned", simulated.served), ("served", done.served)]
        pictures.save(pictures.distributions(runs, objectives, title), plot)
    by = "card" if card else "floor"
    if as_json:
        head = {"engine": where, "steps": by, "rate_per_s": found.rate_per_s}
        predicted = {"prediction": steps.as_dict()} if steps else {}
        print(json.dumps({**head, **predicted, **done.as_dict()}))
        return
    table = Table(
        "", "planned", "served", "the plan is off by",
        title=f"{where}: {found.rate_per_s:.2f} requests/s within {slo} (steps by their {by})",
    )  # fmt: skip
    for name, planned_value, value in done.rows:
        shown = [_figure(name, one) for one in (planned_value, value)]
        table.add_row(name, *shown, f"{planned_value / value - 1:+.1%}" if value else "")
    Console().print(table)
    said = "the plan holds" if done.holds else "THE PLAN DOES NOT HOLD: fewer requests than planned met the objectives"
    Console().print(said, style="dim" if done.holds else "yellow", highlight=False)
    if steps:
        Console().print(steps.line(), style="yellow" if steps.beyond else "dim", highlight=False)
    else:
        Console().print("steps at their floor promise more than any kernel keeps: give a --card", style="dim")


def _figure(name: str, value: float) -> str:
    if name == "within objectives":
        return f"{value:.1%}"
    return f"{value:,.0f}" if name.endswith("/s") else milliseconds(value)


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
    if first.calibrated is not None:
        rows += [
            (f"TTFT by the card ({first.calibrated.steps} steps)", lambda p: _by_card(p, "ttft")),
            ("TPOT by the card", lambda p: _by_card(p, "tpot")),
        ]
        table.caption = f"the card: {first.calibrated.device}" + (
            "; this load lies BEYOND what it measured, so the error bars are wider" if first.calibrated.beyond else ""
        )
    for name, show in rows:
        table.add_row(name, *(show(plan) for plan in plans))
    return table


def _by_card(plan: Plan, name: str) -> str:
    said = plan.calibrated
    assert said is not None
    mark = " !" if said.beyond else ""
    return f"{milliseconds(getattr(said, f'{name}_s'))} ± {getattr(said, f'{name}_error'):.0%}{mark}"


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
