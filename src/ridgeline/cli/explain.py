"""`ridgeline explain`: where the time of a step goes on this machine, and what token trees did.

Knows options and tables. It must not know how time is split (study/explain.py) nor how trees are counted
(study/speculation.py).
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
    from ridgeline.study.explain import Explained, Predicted

LARGEST = 3
"""Ops in the short table."""
PROMPT_TOKENS = 256
"""Of a random prompt."""
PROMPTS = (
    "def fibonacci(n: int) -> int:\n",
    "class Stack:\n    def __init__(self) -> None:\n        self.items = []\n\n    def push(self, item) -> None:\n",
    "import json\n\n\ndef read_config(path):\n    with open(path) as file:\n",
)
"""What is completed when trees are explained and no prompt is given: random tokens would say nothing of acceptance."""


def command(
    model: options.Model = None,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    kernels: options.Kernels = "auto",
    load_format: options.LoadFormat = "auto",
    batch: Annotated[int, typer.Option(help="Requests at a time.")] = 1,
    prompt_len: Annotated[int | None, typer.Option(help="Tokens of a random prompt; 256 if left out.")] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="Text to complete instead (repeatable).")] = None,
    output_len: Annotated[
        int, typer.Option("--output-len", "--max-tokens", help="Output tokens of a request (of a text: at most).")
    ] = 64,
    temperature: Annotated[float, typer.Option(help="Of the completions of texts; 0 is greedy.")] = 0.0,
    rounds: Annotated[int, typer.Option(help="Runs of the workload, watched and unwatched.")] = 3,
    max_model_len: options.MaxModelLen = None,
    kv_cache_memory_bytes: options.KVCacheMemoryBytes = None,
    gpu_memory_utilization: options.GPUMemoryUtilization = 0.9,
    card: options.CardFile = None,
    speculative_config: options.SpeculativeConfig = None,
    plot: options.Plot = None,
    tree_number: Annotated[
        int | None, typer.Option("--round", help="Which verified tree to draw; the one with most accepted if left out.")
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Run a workload and split the time of its steps: floor, kernels by op, gaps, host, drafting, padding; with advice.

    With --speculative-config also what was drafted and accepted for each request, and why; the workload is text then,
    a few small pieces of Python if no --prompt is given, and --plot draws a tree.
    """
    from ridgeline.cli import trees
    from ridgeline.cli.progress import bar
    from ridgeline.core.errors import InvalidArgument
    from ridgeline.core.request import SamplingParams
    from ridgeline.llm import LLM
    from ridgeline.perf.machine_card import card_of, read_card
    from ridgeline.study import pictures
    from ridgeline.study.explain import MeasurementError, explain, explain_serving
    from ridgeline.study.plan import datasheet_of
    from ridgeline.study.speculation import speculated, texts
    from ridgeline.study.tree_picture import token_tree
    from ridgeline.workload.arrivals import equal

    speculative = options.speculation(speculative_config)
    prompts = prompt or (list(PROMPTS) if speculative else [])
    if prompts and prompt_len is not None:
        raise InvalidArgument(
            "prompt_len",
            "goes with random prompts; give --prompt TEXT instead"
            + (
                ": what a drafter makes of random tokens says nothing of acceptance"
                if speculative
                else " or leave it out"
            ),
        )
    if not prompts and temperature:
        raise InvalidArgument("temperature", "goes with --prompt: random prompts are completed greedily")
    if tree_number is not None and (plot is None or not speculative):
        raise InvalidArgument("round", "goes with --speculative-config and --plot, which draws that tree")
    length = PROMPT_TOKENS if prompt_len is None else prompt_len
    for name, value in (("batch", batch), ("prompt_len", length), ("output_len", output_len), ("rounds", rounds)):
        if value < 1:
            raise InvalidArgument(name, f"must be at least 1, not {value}")
    pictures.checked(plot)
    given = read_card(card) if card else None
    settings = options.engine_settings(
        dtype=dtype,
        device=device,
        kernels=kernels,
        load_format=load_format,
        max_model_len=max_model_len,
        kv_cache_memory_bytes=kv_cache_memory_bytes,
        gpu_memory_utilization=gpu_memory_utilization,
        speculative_config=speculative,
    )
    params = SamplingParams(temperature=temperature, max_tokens=output_len, seed=0)
    report = None
    with LLM(model, **settings, max_num_seqs=batch, enable_prefix_caching=False) as llm:
        if not prompts and length + output_len > llm.built.config.max_model_len:
            raise InvalidArgument(
                "prompt_len",
                f"{length} + {output_len} tokens are beyond max_model_len {llm.built.config.max_model_len}",
            )
        built = llm.built
        measured = card_of(given, built.price, built.directory.name, built.config.dtype) if given else None
        if speculative:
            with bar("explaining trees", shown=not as_json, unit="run") as progress:
                report = speculated(llm, prompts, params, rounds, progress)
        steps: list[Explained] = []
        refusal = None
        try:
            with bar("explaining", shown=not as_json, unit="run") as progress:
                if prompts:
                    steps = explain_serving(
                        llm.built, lambda _: llm.generate(prompts, params, use_tqdm=False), rounds, progress, measured
                    )
                else:
                    jobs = equal(batch, length, output_len)
                    steps = explain(llm.built, jobs, rounds=rounds, progress=progress, card=measured)
        except MeasurementError as error:  # what trees did is counted, and stands without the limit of ops
            if report is None:
                raise
            refusal = str(error)
        where = f"{llm.built.directory.name}, {llm.built.config.dtype}, {llm.built.config.device}"
        sheet, text_of = datasheet_of(llm.built.config.device), texts(llm)
    if plot is not None:
        if report is not None:
            figure = token_tree(*report.tree(tree_number), text_of, report.drafters)
        else:
            load = f"{len(prompts)} prompts" if prompts else f"{batch} × ({length} + {output_len}) tokens"
            figure = pictures.explained(steps, f"{where}: {load}", sheet)
        pictures.save(figure, plot)
    if as_json:
        said: dict[str, object] = {"engine": where, "batch": batch, "steps": [one.as_dict() for one in steps]}
        if refusal is not None:
            said["steps_refused"] = refusal
        print(json.dumps(said if report is None else {**said, "speculation": report.as_dict()}))
        return
    console = Console()
    for one in steps:
        console.print(table(one, where))
        if one.predicted is not None:
            console.print(card_line(one.predicted), style="yellow" if one.predicted.beyond else "dim", highlight=False)
        for number, sentence in enumerate(one.advice, start=1):
            console.print(f"{number}. {sentence}", highlight=False)
    if refusal is not None:
        console.print(f"no table of ops: {refusal}", style="yellow", highlight=False, markup=False)
    if report is not None:
        trees.show(report, where, console)


def table(step: Explained, where: str) -> Table:
    """One class of work."""
    size = f"{step.tokens:.0f} tokens"
    if step.drafted:
        size = f"{step.tokens:.1f} rows, {step.drafted:.1f} of them drafted and {step.accepted:.1f} accepted"
    title = f"{where}: a {step.kind} step of {size}, {milliseconds(step.step_s)} (mean of {step.steps})"
    said = step.predicted
    columns = ["", "ms", "of step", "limit, ms", "of limit"]
    shown = Table(*columns, *(() if said is None else ("card, ms", "off by")), title=title)
    shown.columns[0].no_wrap = True

    def row(name: str, seconds: float, floor: float | None = None, card: float | None = None) -> None:
        share = "" if floor is None or not seconds else f"{floor / seconds:.0%}"
        limit = "" if floor is None else f"{floor * 1e3:.3f}"
        cells = [name, f"{seconds * 1e3:.3f}", f"{seconds / step.step_s:.1%}", limit, share]
        if said is not None:
            cells += (
                ["", ""] if card is None else [f"{card * 1e3:.3f}", f"{card / seconds - 1:+.0%}" if seconds else ""]
            )
        shown.add_row(*cells)

    ops = sorted(step.ops, key=lambda one: -one.measured_s)
    scale = step.ops_s / sum(one.measured_s for one in ops)
    for one in ops:
        card = said.attention_s if said is not None and one.op == "attention" else None
        row(f"{one.op} ×{one.calls:.0f}", one.measured_s, one.floor_s, card)
    if said is not None:
        shown.add_section()
        others = [one for one in ops if one.op != "attention"]
        seconds, floor = sum(one.measured_s for one in others), sum(one.floor_s for one in others)
        row("all but attention", seconds, floor, said.other_ops_s)
    row("gaps", step.gaps_s, card=None if said is None else said.around_s)
    row("host", step.host_s, card=None if said is None else said.host_s)
    if step.draft_s:
        row("drafting", step.draft_s)
    shown.add_section()
    whole = None if said is None else said.step_s
    if said is not None and step.draft_s:  # a card knows nothing of draft models
        row("all but drafting", step.step_s - step.draft_s, step.floor_s, whole)
        whole = None
    row("step", step.step_s, step.floor_s, whole)
    if step.padding:
        row(f"of it, {step.padding:.2g} padded rows", step.padding_s)
    shown.caption = (
        "gaps: preparation, calls, results; host: scheduling, commit"
        + ("; drafting: choosing sizes, passes of drafters;\n" if step.draft_s else ";\n")
        + f"watching cost {milliseconds(max(step.observer_s, 0))} a step"
    )
    if scale < 0.95:  # steps in a graph: ops that are watched one by one take longer than together
        shown.caption += f"; unwatched, the ops together take {scale:.0%} of what they take one by one"
    return shown


def card_line(said: Predicted) -> str:
    """A card's error bar, and whether it was asked for more than it measured."""
    line = (
        f"the card says {milliseconds(said.step_s)}, off by {said.error:+.1%}; its own error bar is {said.residual:.1%}"
    )
    if said.beyond:
        line += f"; BEYOND ITS RANGE in {said.beyond:.0%} of the steps"
    return line


def short(step: Explained) -> Table:
    """A few lines: the largest ops, what lies around them, and the limit."""
    shown = Table(
        "", "µs", "of the step", "of the limit", title=f"where a {step.kind} step's {milliseconds(step.step_s)} go"
    )
    ops = sorted(step.ops, key=lambda one: -one.measured_s)
    scale = step.ops_s / sum(one.measured_s for one in ops)
    rows = [(one.op, one.measured_s * scale, one.floor_s) for one in ops[:LARGEST]]
    rest = ops[LARGEST:]
    if rest:
        name = f"{len(rest)} more ops" if len(rest) > 1 else rest[0].op
        rows.append((name, sum(one.measured_s for one in rest) * scale, sum(one.floor_s for one in rest)))
    for name, seconds, floor in rows:
        limit = f"{floor / seconds:.0%}" if seconds else ""
        shown.add_row(name, f"{seconds * 1e6:.0f}", f"{seconds / step.step_s:.0%}", limit)
    if step.draft_s:
        shown.add_row("drafting", f"{step.draft_s * 1e6:.0f}", f"{step.draft_s / step.step_s:.0%}", "")
    around = step.gaps_s + step.host_s
    shown.add_row("around the ops", f"{around * 1e6:.0f}", f"{around / step.step_s:.0%}", "")
    shown.add_section()
    shown.add_row("step", f"{step.step_s * 1e6:.0f}", "100%", f"{step.limit_share:.0%}")
    return shown
