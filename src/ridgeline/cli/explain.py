"""`ridgeline explain`: where the time of a step goes on this machine.

Knows options and tables. It must not know how time is split (study/explain.py).
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from ridgeline.cli import options
from ridgeline.cli.figures import milliseconds

if TYPE_CHECKING:
    from ridgeline.study.explain import Explained


def command(
    model: options.Model = None,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    kernels: options.Kernels = "auto",
    load_format: options.LoadFormat = "auto",
    batch: Annotated[int, typer.Option(help="Requests at a time.")] = 1,
    prompt_len: Annotated[int, typer.Option(help="Prompt tokens of a request.")] = 256,
    output_len: Annotated[int, typer.Option(help="Output tokens of a request.")] = 64,
    rounds: Annotated[int, typer.Option(help="Runs of the workload, watched and unwatched.")] = 3,
    max_model_len: options.MaxModelLen = None,
    as_json: options.Json = False,
) -> None:
    """Run a workload and split the time of its steps: floor, kernels by op, gaps, host; with advice."""
    from ridgeline.cli.progress import bar
    from ridgeline.core.errors import InvalidArgument
    from ridgeline.llm import LLM
    from ridgeline.study.explain import explain
    from ridgeline.workload.arrivals import equal

    for name, value in (("batch", batch), ("prompt_len", prompt_len), ("output_len", output_len), ("rounds", rounds)):
        if value < 1:
            raise InvalidArgument(name, f"must be at least 1, not {value}")
    settings = options.engine_settings(
        dtype=dtype, device=device, kernels=kernels, load_format=load_format, max_model_len=max_model_len
    )
    with LLM(model, **settings, max_num_seqs=batch, enable_prefix_caching=False) as llm:
        if prompt_len + output_len > llm.built.config.max_model_len:
            raise InvalidArgument(
                "prompt_len",
                f"{prompt_len} + {output_len} tokens are beyond max_model_len {llm.built.config.max_model_len}",
            )
        with bar("explaining", shown=not as_json, unit="run") as progress:
            steps = explain(llm.built, equal(batch, prompt_len, output_len), rounds=rounds, progress=progress)
        where = f"{llm.built.directory.name}, {llm.built.config.dtype}, {llm.built.config.device}"
    if as_json:
        print(json.dumps({"engine": where, "batch": batch, "steps": [one.as_dict() for one in steps]}))
        return
    console = Console()
    for one in steps:
        console.print(table(one, where))
        for number, sentence in enumerate(one.advice, start=1):
            console.print(f"{number}. {sentence}", highlight=False)


def table(step: Explained, where: str) -> Table:
    """One class of work."""
    title = (
        f"{where}: a {step.kind} step of {step.tokens:.0f} tokens, {milliseconds(step.step_s)} (mean of {step.steps})"
    )
    shown = Table("", "ms", "of the step", "at the limit, ms", "of the limit", title=title)

    def row(name: str, seconds: float, floor: float | None = None) -> None:
        share = "" if floor is None or not seconds else f"{floor / seconds:.0%}"
        limit = "" if floor is None else f"{floor * 1e3:.3f}"
        shown.add_row(name, f"{seconds * 1e3:.3f}", f"{seconds / step.step_s:.1%}", limit, share)

    for one in sorted(step.ops, key=lambda one: -one.measured_s):
        row(f"{one.op} ×{one.calls:.0f}", one.measured_s, one.floor_s)
    row("gaps (preparation, calls, results)", step.gaps_s)
    row("host (scheduling, commit)", step.host_s)
    shown.add_section()
    row("step", step.step_s, step.floor_s)
    shown.caption = f"watching cost {milliseconds(max(step.observer_s, 0))} a step"
    return shown
