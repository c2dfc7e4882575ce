"""`ridgeline calibrate`: a model's steps measured on this machine, on a card.

Knows options. It must not know how steps are measured (study/calibrate.py).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from ridgeline.cli import options
from ridgeline.cli.figures import milliseconds


def command(
    model: options.Model = None,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    kernels: options.Kernels = "auto",
    load_format: options.LoadFormat = "auto",
    max_model_len: options.MaxModelLen = None,
    max_num_seqs: options.MaxNumSeqs = 64,
    max_num_batched_tokens: options.MaxNumBatchedTokens = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the card goes.")] = Path("card.json"),
    allow_busy: Annotated[bool, typer.Option("--allow-busy", help="Keep a card of a busy machine, marked.")] = False,
    as_json: options.Json = False,
) -> None:
    """Measure the steps of a model here and write a card, which plan and simulate can predict by."""
    from ridgeline.cli.progress import bar
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
