"""`ridgeline profile`: operators, copies, classes and energy of decoding, beside plain Transformers.

Knows options and tables. It must not know how anything is profiled (study/profile.py).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ridgeline.cli import options

if TYPE_CHECKING:
    from ridgeline.study.profile import ClassRow


def command(
    model: options.Model = None,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    kernels: options.Kernels = "auto",
    load_format: options.LoadFormat = "auto",
    max_model_len: options.MaxModelLen = None,
    kv_cache_memory_bytes: options.KVCacheMemoryBytes = None,
    gpu_memory_utilization: options.GPUMemoryUtilization = 0.9,
    prompt_len: Annotated[int, typer.Option(help="Prompt tokens before the profiler looks.")] = 64,
    output_len: Annotated[int, typer.Option(help="Decoded tokens that are profiled.")] = 32,
    top: Annotated[int, typer.Option(help="Operators to list.")] = 12,
    operators: Annotated[
        bool, typer.Option("--operators", help="The table of ops: FLOP, bytes, time, % peak, MUE.")
    ] = False,
    attention: Annotated[
        list[str] | None,
        typer.Option(help="Again for each kernel of attention: calls, copies and bytes a token, side by side."),
    ] = None,
    trace: Annotated[Path | None, typer.Option(help="Write a Perfetto trace of ridgeline's side here.")] = None,
    as_json: options.Json = False,
) -> None:
    """Which operators decoding calls, here and in Transformers; classes by FLOP and time; copies and joules a token."""
    from ridgeline.core.errors import InvalidArgument
    from ridgeline.llm import LLM
    from ridgeline.study.profile import profiled

    for name, value in (("prompt_len", prompt_len), ("output_len", output_len), ("top", top)):
        if value < 1:
            raise InvalidArgument(name, f"must be at least 1, not {value}")
    settings = options.engine_settings(
        dtype=dtype,
        device=device,
        kernels=kernels,
        load_format=load_format,
        max_model_len=max_model_len,
        kv_cache_memory_bytes=kv_cache_memory_bytes,
        gpu_memory_utilization=gpu_memory_utilization,
    )
    if attention:
        if trace is not None or operators:
            raise InvalidArgument("attention", "compares kernels alone: leave --trace and --operators out")
        _rungs(model, settings, attention, prompt_len, output_len, as_json)
        return
    with LLM(model, **settings, max_num_seqs=1, enable_prefix_caching=False) as llm:
        if prompt_len + output_len + 2 > llm.built.config.max_model_len:
            raise InvalidArgument("prompt_len", f"{prompt_len} + {output_len} tokens are beyond max_model_len")
        found = profiled(llm.built, prompt_len, output_len, trace)
    if as_json:
        print(json.dumps(found.as_dict(top)))
        return
    console = Console()
    for run in found.runs:
        table = Table("operator", "calls", "self ms", "total ms", "device ms", title=f"{run.side}: {run.tokens} tokens")
        for row in run.operators[:top]:
            times = (f"{1e3 * value:.2f}" for value in (row.self_s, row.total_s, row.device_s))
            table.add_row(row.name, f"{row.calls:,}", *times)
        copies = ", ".join(f"{name} {count:.1f}" for name, count in run.copies_per_token.items())
        joules = "" if run.joules is None else f"; {run.joules / run.tokens:.3g} J a token"
        table.caption = (
            f"a token: {sum(row.calls for row in run.operators) / run.tokens:.0f} operators; {copies}{joules}"
        )
        console.print(table)
    console.print(operator_table(found.ops) if operators else class_table(found.classes))
    for note in found.notes:
        console.print(note, style="dim", highlight=False)


def _rungs(
    model: str | None, settings: dict[str, Any], names: list[str], prompt_len: int, output_len: int, as_json: bool
) -> None:
    """Decoding with each kernel of attention, and what that says of the report's hypothesis."""
    from ridgeline.llm import LLM
    from ridgeline.study.profile import rung, verdicts

    found = []
    for name in names:
        with LLM(model, **settings, attention_backend=name, max_num_seqs=1, enable_prefix_caching=False) as llm:
            found.append(rung(llm.built, name, prompt_len, output_len))
    if as_json:
        print(json.dumps({"rungs": [one.as_dict() for one in found], "verdicts": verdicts(found)}))
        return
    table = Table("attention", "operators", "copies", "kernels", "MB of attention", "µs of attention", title="a token")
    for one in found:
        table.add_row(
            one.name, f"{one.operators:,.0f}", f"{one.copies:,.0f}",
            "" if one.kernels is None else f"{one.kernels:,.0f}",
            "not counted" if one.attention_bytes is None else f"{one.attention_bytes / 1e6:,.2f}",
            f"{one.attention_s * 1e6:,.0f}",
        )  # fmt: skip
    console = Console()
    console.print(table)
    for line in verdicts(found):
        console.print(line, highlight=False)


def class_table(rows: Sequence[ClassRow]) -> Table:
    """Shares of FLOPs and of time by class of operator."""
    table = Table(
        "class", "calls", "MFLOP", "MB in", "MB out", "µs", "% FLOP", "% time", "% peak", "MUE",
        title="a decode step of ridgeline",
    )  # fmt: skip
    for one in rows:
        table.add_row(*_figures(one))
    return table


def operator_table(rows: Sequence[ClassRow]) -> Table:
    """The same op by op, beside what each would move if it were not fused."""
    table = Table(
        "op", "calls", "MFLOP", "MB in", "MB out", "µs", "% FLOP", "% time", "% peak", "MUE", "MB unfused", "saved",
        title="a decode step of ridgeline",
        caption="unfused: if every intermediate (scores, sums, gates, rotated heads) passed through memory",
    )  # fmt: skip
    for one in rows:
        unfused = one.cost.bytes if one.unfused_bytes is None else one.unfused_bytes
        table.add_row(*_figures(one), f"{unfused / 1e6:,.2f}", f"{1 - one.cost.bytes / unfused:.1%}")
    return table


def _figures(one: ClassRow) -> tuple[str, ...]:
    return (
        one.name, f"{one.calls:.0f}", f"{one.cost.flops / 1e6:,.2f}", f"{one.cost.read_bytes / 1e6:,.2f}",
        f"{one.cost.write_bytes / 1e6:,.3f}", f"{one.seconds * 1e6:,.0f}", f"{one.flop_share:.2%}",
        f"{one.time_share:.1%}", f"{one.peak_share:.1%}", f"{one.mue:.0%}",
    )  # fmt: skip
