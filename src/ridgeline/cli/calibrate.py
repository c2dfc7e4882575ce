"""`ridgeline calibrate`: a model's steps measured on this machine, or the machine for any model, on a card.

Knows options. It must not know how anything is measured (study/calibrate.py, study/calibrate_machine.py).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from ridgeline.cli import options
from ridgeline.cli.figures import milliseconds
from ridgeline.core.errors import InvalidArgument

if TYPE_CHECKING:
    from ridgeline.perf.machine_card import MachineCard


def command(
    model: options.Model = None,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    kernels: options.Kernels = "auto",
    load_format: options.LoadFormat = "auto",
    max_model_len: options.MaxModelLen = None,
    max_num_seqs: options.MaxNumSeqs = 64,
    max_num_batched_tokens: options.MaxNumBatchedTokens = None,
    kv_cache_memory_bytes: options.KVCacheMemoryBytes = None,
    gpu_memory_utilization: options.GPUMemoryUtilization = 0.9,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the card goes.")] = Path("card.json"),
    machine: Annotated[
        bool, typer.Option("--machine", help="No model: ops of made-up shapes, for a card that any model is read by.")
    ] = False,
    allow_busy: Annotated[bool, typer.Option("--allow-busy", help="Keep a card of a busy machine, marked.")] = False,
    as_json: options.Json = False,
) -> None:
    """Measure the steps of a model here and write a card, which plan and simulate can predict by."""
    from ridgeline.cli.progress import bar

    if machine:
        given = {"model": model, "max_model_len": max_model_len, "max_num_batched_tokens": max_num_batched_tokens}
        for name, value in given.items():
            if value is not None:
                raise InvalidArgument(name, "does not go with --machine, which measures made-up models at fixed sizes")
        _machine(device, kernels, output, allow_busy, as_json)
        return
    from ridgeline.llm import LLM
    from ridgeline.study.calibrate import calibrate

    settings = options.engine_settings(
        dtype=dtype,
        device=device,
        kernels=kernels,
        load_format=load_format,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        kv_cache_memory_bytes=kv_cache_memory_bytes,
        gpu_memory_utilization=gpu_memory_utilization,
    )
    with (
        LLM(model, **settings, enable_prefix_caching=False) as llm,
        bar("calibrating", shown=not as_json, unit="step") as progress,
    ):
        card = calibrate(llm.built, progress, allow_busy)
    card.save(output)
    if as_json:
        print(json.dumps({"card": str(output), "sha256": card.sha256, **card.as_dict()}))
        return
    table = Table("", "", title=f"{card.model}, {card.dtype}, on {card.device}")
    table.add_row("a decode step of 1 request, all but attention", milliseconds(card.body(1) + card.head(1)))
    table.add_row(f"{card.body.most:,.0f} prompt tokens, all but attention", milliseconds(card.body(card.body.most)))
    table.add_row("around the ops, a step and a request", f"{card.step_s * 1e6:.0f} and {card.request_s * 1e6:.1f} µs")
    table.add_row(
        "on the host, a step and a request", f"{card.host_step_s * 1e6:.0f} and {card.host_request_s * 1e6:.1f} µs"
    )
    table.add_row("error of steps left out of the fit, 95 %", f"{card.residual:.1%}")
    table.add_row("card", f"{output} (sha256 {card.sha256[:12]})")
    Console().print(table)


def _machine(device: str, kernels: str, output: Path, allow_busy: bool, as_json: bool) -> None:
    """The machine's card, measured, kept and shown."""
    from ridgeline.cli.progress import bar
    from ridgeline.study.attention.bench import device_of
    from ridgeline.study.calibrate_machine import calibrate_machine

    with bar("calibrating", shown=not as_json, unit="model") as progress:
        card = calibrate_machine(device_of(device), progress=progress, allow_busy=allow_busy, kernels=kernels)
    card.save(output)
    if as_json:
        print(json.dumps({"card_file": str(output), "sha256": card.sha256, **card.as_dict()}))
        return
    Console().print(machine_table(card, output))


def machine_table(card: MachineCard, output: Path) -> Table:
    """The rates, what is near to them, and what lies around."""
    table = Table("", "", title=f"{card.dtype} on {card.device}")
    table.add_row("reading, kept up", f"{card.read_bytes_per_s / 1e9:,.1f} GB/s")
    table.add_row("a matrix product, kept up", f"{card.matrix_flops / 1e12:,.3g} TFLOP/s")
    for name in ("linear", "gated_linear", "moe"):
        shares = [one.floor_s(card.roofline) / one.seconds for of in card.ops.get(name, ()) for _, one in of.points]
        if shares:
            table.add_row(f"{name}, share of its limit", f"{min(shares):.0%} to {max(shares):.0%}")
    for name, planes in (("decode attention", card.decode), ("prompt attention", card.prefill)):
        shares = [one.floor_s(card.roofline) / one.seconds for of in planes for line in of.points for one in line]
        table.add_row(f"{name}, share of its limit", f"{min(shares):.0%} to {max(shares):.0%}")
    table.add_row(
        "around the ops, a step, a request and a call",
        f"{card.step_s * 1e6:.0f}, {card.request_s * 1e6:.1f} and {card.gap_s * 1e6:.2f} µs "
        f"({card.alone_gap_s * 1e6:.2f} of one token)",
    )
    table.add_row(
        "ops in a step over ops in a row",
        f"{card.decode_scale:.2f}, of one token {card.alone_scale:.2f}, attention {card.attention_scale:.2f}, "
        f"mixtures {card.mixture_scale:.2f}, in prompts {card.prefill_scale:.2f}",
    )
    if card.launch_s:
        longest = max(card.launch_s, key=lambda name: card.launch_s[name])
        table.add_row(
            "handing over a step, and its ops over ops in a row",
            f"{card.start_s * 1e6:.0f} µs and {card.launch_scale:.2f}, at most {card.launch_s[longest] * 1e6:.0f} µs "
            f"({longest})",
        )
    table.add_row("attention takes keys by", f"{card.tile}")
    table.add_row(
        "on the host, a step and a request", f"{card.host_step_s * 1e6:.0f} and {card.host_request_s * 1e6:.1f} µs"
    )
    table.add_row("error of steps left out of the fit, 95 %", f"{card.residual:.1%}")
    if card.doubt:
        table.add_row("doubt", card.doubt)
    table.add_row("card", f"{output} (sha256 {card.sha256[:12]})")
    return table
