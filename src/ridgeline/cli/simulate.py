"""`ridgeline simulate`: a workload on a machine that need not be there.

Knows options and tables. It must not know how time passes (study/simulate.py).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ridgeline.cli import options, workload


def command(
    model: options.Model = None,
    hardware: Annotated[str, typer.Option(help="a10, h200 … or this. Any case.")] = "this",
    dtype: Annotated[str, typer.Option(help="auto, bf16, fp16 or fp32.")] = "auto",
    trace: workload.Trace = None,
    num_prompts: workload.NumPrompts = None,
    prompt_len: workload.PromptLen = 512,
    output_len: workload.OutputLen = 128,
    length_scale: workload.LengthScale = 1.0,
    request_rate: workload.RequestRate = None,
    burstiness: workload.Burstiness = 1.0,
    max_concurrency: workload.MaxConcurrency = None,
    slo: workload.Slo = None,
    max_num_seqs: options.MaxNumSeqs = 256,
    max_num_batched_tokens: options.MaxNumBatchedTokens = None,
    max_model_len: options.MaxModelLen = None,
    scheduling_policy: options.SchedulingPolicy = "fcfs",
    enable_chunked_prefill: options.ChunkedPrefill = True,
    gpu_memory_utilization: options.GPUMemoryUtilization = 0.9,
    card: Annotated[Path | None, typer.Option(help="Steps take what `ridgeline calibrate` measured.")] = None,
    seed: workload.Seed = 0,
    plot: options.Plot = None,
    as_json: options.Json = False,
) -> None:
    """Serve a workload in virtual time, with the real scheduler and KV cache; steps at their floor, or by a card."""
    from ridgeline.cli.progress import bar
    from ridgeline.perf.machine_card import card_of, read_card
    from ridgeline.study import pictures
    from ridgeline.study.plan import machines, planner
    from ridgeline.study.simulate import Carded, setting_for, simulate
    from ridgeline.workload.measure import objectives_named

    pictures.checked(plot)
    objectives = objectives_named(slo) if slo else None
    given = read_card(card) if card else None
    machine = machines([hardware])[0]
    planned = planner(model, given.dtype if given and dtype == "auto" else dtype)
    measured = card_of(given, planned.price, planned.name, planned.dtype) if given else None
    setting = setting_for(
        planned,
        machine,
        utilization=gpu_memory_utilization,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        scheduling_policy=scheduling_policy,
        enable_chunked_prefill=enable_chunked_prefill,
    )
    jobs = workload.jobs_of(
        trace, num_prompts, prompt_len, output_len, length_scale, request_rate, burstiness, seed, setting.max_model_len
    )
    by_card = Carded(measured) if measured else None
    seconds, host_s = (by_card.device_s, by_card.host_s) if by_card else (planned.seconds(machine), None)
    steps = f"card {measured.sha256[:12]}" if measured else "floor"
    with bar("simulating", shown=not as_json) as progress:
        found = simulate(
            jobs,
            setting,
            seconds,
            host_s,
            objectives=objectives,
            concurrency=max_concurrency,
            progress=progress,
        )
    where = f"{planned.name}, {planned.dtype}, on {machine.name}"
    title = f"{where}: {len(jobs)} requests in virtual time (steps by their {steps})"
    if plot is not None:
        pictures.save(pictures.distributions([("simulated", found.served)], objectives or {}, title), plot)
    if as_json:
        head = {"model": planned.name, "hardware": machine.id, "dtype": planned.dtype, "steps": steps}
        predicted = {"prediction": by_card.as_dict()} if by_card else {}
        print(json.dumps({**head, **predicted, **found.report.as_dict()}))
        return
    Console().print(workload.report_table(found.report, title))
    if by_card:
        Console().print(by_card.line(), style="yellow" if by_card.beyond else "dim", highlight=False)
