"""`ridgeline bench throughput`: a workload on this machine, on the wall's clock.

Knows options and tables. It must not know how requests are driven (workload/drive.py), which is the same for
`ridgeline simulate`.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from ridgeline.cli import options, workload

if TYPE_CHECKING:
    from ridgeline.study.predicted import PredictedSteps


def command(
    model: options.Model = None,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    kernels: options.Kernels = "auto",
    load_format: options.LoadFormat = "auto",
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
    kv_cache_memory_bytes: options.KVCacheMemoryBytes = None,
    gpu_memory_utilization: options.GPUMemoryUtilization = 0.9,
    enable_prefix_caching: options.PrefixCaching = None,
    enable_chunked_prefill: options.ChunkedPrefill = True,
    policies: Annotated[
        list[str] | None, typer.Option("--scheduling-policy", help="fcfs, priority or static; again to compare.")
    ] = None,
    seed: workload.Seed = 0,
    card: options.CardFile = None,
    plot: options.Plot = None,
    as_json: options.Json = False,
) -> None:
    """Serve a workload here: TTFT, TPOT, ITL, E2E, throughput, goodput; several policies side by side.

    With a card every step's prediction stands beside its time, and the picture shows the two.
    """
    from ridgeline.cli.progress import bar
    from ridgeline.core.step import StepRecord
    from ridgeline.llm import LLM
    from ridgeline.perf.machine_card import card_of, read_card
    from ridgeline.study import pictures
    from ridgeline.study.predicted import PredictedSteps
    from ridgeline.workload.drive import drive
    from ridgeline.workload.measure import objectives_named, report

    pictures.checked(plot)
    given = read_card(card) if card else None
    objectives = objectives_named(slo) if slo else None
    settings = options.engine_settings(
        dtype=dtype,
        device=device,
        kernels=kernels,
        load_format=load_format,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        max_model_len=max_model_len,
        kv_cache_memory_bytes=kv_cache_memory_bytes,
        gpu_memory_utilization=gpu_memory_utilization,
        enable_prefix_caching=enable_prefix_caching,
        enable_chunked_prefill=enable_chunked_prefill,
    )
    results, runs, steps = [], [], []
    measured = None
    for policy in policies or ["fcfs"]:
        with LLM(model, **settings, scheduling_policy=policy) as llm:
            config, vocabulary = llm.built.config, llm.built.spec.vocabulary
            jobs = workload.jobs_of(
                trace, num_prompts, prompt_len, output_len, length_scale, request_rate, burstiness, seed,
                config.max_model_len,
            )  # fmt: skip
            if given is not None:
                measured = card_of(given, llm.built.price, llm.built.directory.name, config.dtype)
            records: list[StepRecord] = []
            llm.built.engine.listeners.append(records.append)
            with bar(f"serving ({policy})", shown=not as_json) as progress:
                served = drive(llm.built.engine, jobs, vocabulary, seed, max_concurrency, progress)
            where = f"{llm.built.directory.name}, {config.dtype}, {config.device}"
        results.append((policy, report(served, objectives)))
        runs.append((policy, served))
        steps += records
    predicted = None if measured is None else PredictedSteps.of(measured, steps)
    if plot is not None:
        if predicted is not None:
            pictures.save(pictures.predictions(predicted.points, f"{where}: steps by a card"), plot)
        else:
            pictures.save(pictures.distributions(runs, objectives or {}, f"{where}: {len(jobs)} requests"), plot)
    if as_json:
        shown = [{"scheduling_policy": policy, **found.as_dict()} for policy, found in results]
        said = {} if predicted is None else {"predicted": predicted.as_dict()}
        print(json.dumps({"engine": where, "runs": shown, **said}))
        return
    for policy, found in results:
        Console().print(workload.report_table(found, f"{where}: {found.requests} requests, {policy}"))
    if predicted is not None:
        Console().print(prediction_table(predicted))


def prediction_table(predicted: PredictedSteps) -> Table:
    """How far a card's steps are from those that ran."""
    table = Table("steps", "", "median error", "90th percentile", "sum", "beyond the card", title="by the card")
    for one in predicted.rows:
        table.add_row(
            one.kind, f"{one.steps:,}", f"{one.median:.1%}", f"{one.p90:.1%}", f"{one.bias:+.1%}", f"{one.beyond:.0%}"
        )
    return table
