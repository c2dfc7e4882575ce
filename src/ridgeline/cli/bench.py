"""`ridgeline bench …`: attention rung by rung, whole models with each rung.

Knows options, tables and progress bars. It must not know how anything is measured (study/).
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from ridgeline.cli import options
from ridgeline.core.errors import InvalidArgument, RidgelineError

if TYPE_CHECKING:
    from ridgeline.study.attention.report import Table as Words

application = typer.Typer(
    name="bench",
    help="Measure: attention rung by rung beside its peers, and whole models with each rung.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

PIPE_COLUMNS = 180

Experiment = Annotated[
    str,
    typer.Option(
        "--experiment",
        "-e",
        help="report (batch 1, 4, 16, 64 at sequence 64), sweep (the FlashAttention papers' grid), decode, or memory.",
    ),
]
Rungs = Annotated[str, typer.Option(help="Rungs of the ladder, separated by commas; all that run here if left out.")]
Peers = Annotated[str, typer.Option(help="Peers, separated by commas; all that run here if left out; none for none.")]
Batch = Annotated[str, typer.Option(help="Batch sizes, separated by commas, instead of the experiment's own.")]
Sequence_ = Annotated[
    str, typer.Option("--sequence", help="Sequence lengths (contexts in decode), separated by commas, likewise.")
]
HeadDim = Annotated[str, typer.Option(help="Head dims, separated by commas, likewise.")]
Heads = Annotated[int | None, typer.Option(help="Query heads.")]
KVHeads = Annotated[int | None, typer.Option("--kv-heads", help="KV heads; needs --heads.")]
Grouped = Annotated[bool, typer.Option("--grouped", help="In the sweep, also 32 and 64 query heads over 8 KV heads.")]
Causal = Annotated[bool | None, typer.Option("--causal/--full", help="Only causal, or only full attention.")]
Layout = Annotated[str, typer.Option(help="Keys: contiguous, paged, or auto (paged in decode).")]
Page = Annotated[int, typer.Option(help="Tokens of a KV page, 16 to 256.")]
Rounds = Annotated[int, typer.Option(help="Rounds of alternating pairs.")]
Graph = Annotated[bool, typer.Option("--graph/--no-graph", help="Both sides in CUDA graphs, or neither.")]
Copies = Annotated[
    int | None, typer.Option(help="Copies of the inputs, used in turn; four times the L2 cache together if left out.")
]
Counters = Annotated[bool, typer.Option("--counters", help="Read bytes from hardware counters too (needs ncu).")]
Check = Annotated[bool, typer.Option("--check/--no-check", help="Compare each output with fp64 first.")]
FA3Library = Annotated[
    Path | None, typer.Option("--fa3-library", help="FlashAttention-3's compiled extension (FA3_LIBRARY).")
]
Plots = Annotated[Path | None, typer.Option(help="Folder for PNG pictures.")]
Out = Annotated[Path | None, typer.Option(help="File for the result as JSON.")]


@application.command("attention")
def attention(
    experiment: Experiment = "report",
    rungs: Rungs = "",
    peers: Peers = "",
    batch: Batch = "",
    sequence: Sequence_ = "",
    head_dim: HeadDim = "",
    heads: Heads = None,
    kv_heads: KVHeads = None,
    grouped: Grouped = False,
    causal: Causal = None,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    layout: Layout = "auto",
    page: Page = 64,
    rounds: Rounds = 20,
    graph: Graph = True,
    copies: Copies = None,
    counters: Counters = False,
    check: Check = True,
    fa3_library: FA3Library = None,
    plots: Plots = None,
    out: Out = None,
    as_json: options.Json = False,
) -> None:
    """Time every rung of the attention ladder beside its peers, with what each moves and remembers.

    Medians of alternating rounds with 95 % intervals; a cell that begins with ! is slower than the best peer.
    """
    from ridgeline.study.attention import bench, report
    from ridgeline.study.attention import plots as pictures
    from ridgeline.study.attention.cases import Choice

    if fa3_library is not None:
        if not fa3_library.is_file():
            raise InvalidArgument("fa3_library", f"{fa3_library} is no file")
        os.environ["FA3_LIBRARY"] = str(fa3_library)
    writable(out)
    where = bench.device_name(device)
    choice = Choice(
        batches=integers("batch", batch),
        sequences=integers("sequence", sequence),
        head_dims=integers("head_dim", head_dim),
        heads=heads,
        kv_heads=kv_heads,
        causal=causal,
        dtype=dtype_of(dtype, where),
        layout=layout,
        page=page,
        grouped=grouped,
        device=where,
    )
    settings = bench.Settings(rounds=rounds, graph=graph, copies=copies, counters=counters, check=check)
    with bar(as_json) as progress:
        result = bench.run(experiment, choice, settings, names(rungs), names(peers), progress)
    drawn = [] if plots is None else pictures.draw(result, plots)
    keep(result, out)
    if as_json:
        print(json.dumps(result))
    else:
        console = screen()
        for words in report.tables(result):
            console.print(table(words))
        for line in report.claims(result):
            console.print(Text(line))
        for line in report.refusals(result):
            console.print(Text(line, style="dim"))
        for path in (*drawn, *([] if out is None else [out])):
            console.print(Text(f"-> {path}"))
    mistakes = report.wrong(result)
    if mistakes:
        raise RidgelineError(f"not all is right: {'; '.join(mistakes)}")


@application.command("latency")
def latency(
    attention: Annotated[
        list[str] | None,
        typer.Option(help="A rung, or several with commas between (each class of work takes the first). Repeatable."),
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Checkpoint or config.json; Llama-2-7B's shape if left out.")
    ] = None,
    batch: Annotated[str, typer.Option(help="Batch sizes, separated by commas.")] = "1,4,16,64",
    sequence: Annotated[int, typer.Option(help="Tokens of each prompt.")] = 64,
    new_tokens: Annotated[int, typer.Option("--new-tokens", help="Tokens decoded behind each prompt.")] = 8,
    rounds: Rounds = 10,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    load_format: options.LoadFormat = "dummy",
    out: Out = None,
    as_json: options.Json = False,
) -> None:
    """Time whole-model inference with each rung of attention, by batch: what the EE451 report set out to measure."""
    from ridgeline.study import latency as study

    writable(out)
    settings = study.Settings(
        model=model,
        batches=integers("batch", batch),
        sequence=sequence,
        new=new_tokens,
        rounds=rounds,
        dtype=dtype,
        device=device,
        load_format=load_format,
    )
    with bar(as_json) as progress:
        result = study.run(settings, attention or (), progress)
    keep(result, out)
    if as_json:
        print(json.dumps(result))
        return
    console = screen()
    for words in study.tables(result):
        console.print(table(words))
    for line in study.remarks(result):
        console.print(Text(line, style="dim"))
    if out is not None:
        console.print(Text(f"-> {out}"))


def names(text: str) -> list[str]:
    """Names separated by commas."""
    return [one.strip() for one in text.split(",") if one.strip()]


def integers(parameter: str, text: str) -> tuple[int, ...]:
    """Integers separated by commas; InvalidArgument for anything else."""
    try:
        return tuple(int(one) for one in names(text))
    except ValueError:
        raise InvalidArgument(parameter, f"must be whole numbers separated by commas, not {text!r}") from None


def dtype_of(name: str, device: str) -> str:
    """A dtype's full name; auto is what attention kernels are for: bf16 on a GPU, fp32 on a CPU."""
    from ridgeline.core.config import DTYPES

    if name not in DTYPES:
        raise InvalidArgument("dtype", f"must be one of {', '.join(DTYPES)}, not {name!r}")
    full = DTYPES[name]
    return full if full != "auto" else ("float32" if device == "cpu" else "bfloat16")


def table(words: Words) -> Table:
    """Words as a table of the terminal; losses are red."""
    shown = Table(title=words.title, title_justify="left", title_style="bold")
    for place, column in enumerate(words.columns):
        shown.add_column(column, justify="left" if place == 0 else "right")
    for row in words.rows:
        shown.add_row(*(Text(cell, style="red" if cell.startswith("! ") else "") for cell in row))
    return shown


def screen() -> Console:
    """The terminal; tables in a pipe are wide enough for their columns."""
    piped = not sys.stdout.isatty() and "COLUMNS" not in os.environ
    return Console(highlight=False, width=PIPE_COLUMNS if piped else None)


def writable(out: Path | None) -> None:
    """Raise InvalidArgument before hours of measuring rather than behind them."""
    if out is not None and not (out.parent.is_dir() and os.access(out.parent, os.W_OK)):
        raise InvalidArgument("out", f"{out.parent} is no folder that can be written")


def keep(result: dict[str, Any], out: Path | None) -> None:
    if out is not None:
        out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


@contextmanager
def bar(quiet: bool) -> Iterator[Callable[[int, int, str], None]]:
    """A progress bar on standard error while it is a terminal; told (done, total, what) before each step."""
    console = Console(stderr=True)
    columns: Sequence[Any] = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True, disable=quiet or not console.is_terminal) as shown:
        task = shown.add_task("", total=None)

        def update(done: int, total: int, what: str) -> None:
            shown.update(task, completed=done, total=total, description=what)

        yield update
