"""`ridgeline bench throughput`: a workload on this machine, on the wall's clock.

Knows options and tables. It must not know how requests are driven (workload/drive.py), which is the same for
`ridgeline simulate`.
"""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.console import Console

from ridgeline.cli import options, workload


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
    as_json: options.Json = False,
) -> None:
    """Serve a workload here: TTFT, TPOT, ITL, E2E, throughput, goodput; several policies side by side."""
    from ridgeline.cli.progress import bar
    from ridgeline.llm import LLM
    from ridgeline.workload.drive import drive
    from ridgeline.workload.measure import objectives_named, report

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
    results = []
    for policy in policies or ["fcfs"]:
        with LLM(model, **settings, scheduling_policy=policy) as llm:
            config, vocabulary = llm.built.config, llm.built.spec.vocabulary
            jobs = workload.jobs_of(
                trace, num_prompts, prompt_len, output_len, length_scale, request_rate, burstiness, seed,
                config.max_model_len,
            )  # fmt: skip
            with bar(f"serving ({policy})", shown=not as_json) as progress:
                served = drive(llm.built.engine, jobs, vocabulary, seed, max_concurrency, progress)
            where = f"{llm.built.directory.name}, {config.dtype}, {config.device}"
        results.append((policy, report(served, objectives)))
    if as_json:
        runs = [{"scheduling_policy": policy, **found.as_dict()} for policy, found in results]
        print(json.dumps({"engine": where, "runs": runs}))
        return
    for policy, found in results:
        Console().print(workload.report_table(found, f"{where}: {found.requests} requests, {policy}"))
