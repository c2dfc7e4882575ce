"""`ridgeline kernels`: which kernel serves which op on this machine, and why; `ridgeline kernels tune`.

Knows the table's rows. It must not know how they were chosen, nor how tiles are searched.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ridgeline.cli import options

application = typer.Typer(name="kernels", pretty_exceptions_enable=False)


@application.callback(invoke_without_command=True)
def command(
    context: typer.Context,
    model: options.Model = None,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    kernels: options.Kernels = "auto",
    attention_backend: options.AttentionBackend = "auto",
    as_json: options.Json = False,
) -> None:
    """Print the choice of kernels for a model: op, class of work, chosen and why, refused and why not."""
    if context.invoked_subcommand is not None:
        return
    from ridgeline.core.config import EngineConfig
    from ridgeline.engine.build import choose_kernels

    table = choose_kernels(
        EngineConfig(model=model, dtype=dtype, device=device, kernels=kernels, attention_backend=attention_backend)
    )
    if as_json:
        rows = [
            {"op": r.op, "work": r.work, "kernel": r.kernel, "reason": r.reason, "refused": dict(r.refused)}
            for r in table.rows
        ]
        print(json.dumps({"kernels": rows}))
        return
    grouped: dict[tuple[str, str, str, str], list[str]] = {}
    for row in table.rows:
        refused = "; ".join(f"{name}: {reason}" for name, reason in row.refused.items())
        grouped.setdefault((row.op, row.kernel, row.reason, refused), []).append(row.work)
    shown = Table("op", "work", "kernel", "why", "refused")
    for (op, kernel, reason, refused), works in grouped.items():
        shown.add_row(*(Text(one) for one in (op, ", ".join(works), kernel, reason, refused)))
    Console().print(shown)


@application.command("tune")
def tune(
    kernel: Annotated[str, typer.Option(help="Kernels of attention, separated by commas; all with tables.")] = "",
    head_dim: Annotated[str, typer.Option(help="Head dims, separated by commas; all in the tables.")] = "",
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    rounds: Annotated[int, typer.Option(help="Alternating rounds of the finalists.")] = 20,
    most: Annotated[int, typer.Option(help="Variants tried for an entry; beyond, a random choice of them.")] = 64,
    out: Annotated[Path | None, typer.Option(help="File of the table, instead of the user's cache.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Search, but write nothing.")] = False,
    as_json: options.Json = False,
) -> None:
    """Search tiles, stages and splits of the attention kernels for this GPU, and keep the table.

    Every variant is checked against the reference first. Later starts on this machine use the table.
    """
    from ridgeline.cli.bench import bar, dtype_of, integers, names, screen, table, writable
    from ridgeline.study import tune as study
    from ridgeline.study.attention.bench import device_name

    writable(out)
    where = device_name(device)
    settings = study.Settings(
        kernels=names(kernel),
        head_dims=integers("head_dim", head_dim),
        dtype=dtype_of(dtype, where),
        device=where,
        rounds=rounds,
        most=most,
        out=out,
        keep=not dry_run,
    )
    with bar(as_json) as progress:
        result = study.run(settings, progress)
    if as_json:
        print(json.dumps(result))
        return
    console = screen()
    console.print(table(study.words(result)))
    for one in result["entries"]:
        for variant, why in one["wrong"].items():
            console.print(Text(f"! wrong: {one['table']} {variant}: {why}", style="red"))
    console.print(Text(f"-> {result['file']}" if result["file"] else "nothing was written"))
