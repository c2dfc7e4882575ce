"""`ridgeline generate`: complete a prompt on the screen, or a file of prompts into a file.

Knows the terminal and JSON lines. It must not know engines beyond LLM and its records.
"""

from __future__ import annotations

import json
import sys
import time
from contextlib import closing
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ridgeline.cli import options
from ridgeline.core.errors import InvalidArgument, RidgelineError

DEMO_PROMPT = '''class Stack:
    """A last-in, first-out stack."""

    def __init__(self) -> None:
        self._items: list[int] = []

    def push(self, item: int) -> None:
'''


EXPLAINED_PROMPT, EXPLAINED_OUTPUT = 64, 64
"""Tokens of the request whose decode steps are explained."""
GAIN_ROUNDS = 3
"""Pairs of runs without and with draft trees."""
RECORD_START = b'{"line": '
SHOWN_REFUSALS = 10


def command(
    prompt: Annotated[str | None, typer.Argument(help="Text to complete; a small piece of Python if left out.")] = None,
    model: options.Model = None,
    file: Annotated[Path | None, typer.Option(help="JSON lines, one object with a prompt a line.")] = None,
    output: Annotated[Path | None, typer.Option(help="Where --file's results go, JSON lines.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Most tokens to generate.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Keep the likeliest tokens up to this probability.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Keep this many tokens (0: all).")] = 0,
    min_p: Annotated[float, typer.Option(help="Drop tokens below this share of the likeliest.")] = 0.0,
    n: Annotated[int, typer.Option("-n", "--n", help="Completions of the prompt.")] = 1,
    seed: Annotated[int | None, typer.Option(help="Same seed, same tokens.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="String that ends the output (repeatable).")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on past the end of sequence.")] = False,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    max_model_len: options.MaxModelLen = None,
    max_num_seqs: options.MaxNumSeqs = 256,
    max_num_batched_tokens: options.MaxNumBatchedTokens = None,
    kv_cache_memory_bytes: options.KVCacheMemoryBytes = None,
    gpu_memory_utilization: options.GPUMemoryUtilization = 0.9,
    block_size: options.BlockSize = 64,
    enable_prefix_caching: options.PrefixCaching = None,
    enable_chunked_prefill: options.ChunkedPrefill = True,
    scheduling_policy: options.SchedulingPolicy = "fcfs",
    load_format: options.LoadFormat = "auto",
    kernels: options.Kernels = "auto",
    attention_backend: options.AttentionBackend = "auto",
    speculative_config: options.SpeculativeConfig = None,
    explained: Annotated[
        bool, typer.Option("--explain", help="End with where a decode step's time goes (about two seconds more).")
    ] = False,
    verbose: options.Verbose = False,
    as_json: options.Json = False,
) -> None:
    """Complete PROMPT, or every prompt of --file.

    A line of --file is a JSON string, or an object with "prompt" or "prompt_token_ids" and any sampling
    parameters of its own. Run the same command again to go on where an earlier run was stopped.
    """
    if file is not None and prompt is not None:
        raise InvalidArgument("prompt", "give a PROMPT or --file, not both")
    if file is not None and output is None:
        raise InvalidArgument("output", "--file needs --output, the file that results are written to")
    if output is not None and file is None:
        raise InvalidArgument("file", "--output goes with --file")
    sampling = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "n": n,
        "seed": seed,
        "stop": stop,
        "ignore_eos": ignore_eos,
    }
    if explained and (file is not None or as_json):
        raise InvalidArgument("explain", "goes with one PROMPT on a screen; `ridgeline explain --json` says more")
    jobs = None if file is None or output is None else _Jobs(file, output, sampling)
    from ridgeline.core.request import SamplingParams

    params = SamplingParams.from_mapping(sampling)
    from ridgeline.llm import LLM

    settings = options.engine_settings(
        dtype=dtype,
        device=device,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        kv_cache_memory_bytes=kv_cache_memory_bytes,
        gpu_memory_utilization=gpu_memory_utilization,
        block_size=block_size,
        enable_prefix_caching=enable_prefix_caching,
        enable_chunked_prefill=enable_chunked_prefill,
        scheduling_policy=scheduling_policy,
        load_format=load_format,
        kernels=kernels,
        attention_backend=attention_backend,
        speculative_config=options.speculation(speculative_config),
    )
    with LLM(model, **settings) as llm:
        if verbose and not as_json:
            show_engine(llm.built, Console(stderr=True))
        if jobs is not None:
            jobs.run(llm, as_json)
        else:
            text = prompt if prompt is not None else DEMO_PROMPT
            _one(llm, text, params, as_json)
            if explained and llm.built.speculator is not None:
                _gain(llm, text, params, Console(stderr=True))
            if explained:
                with llm.built.plain():
                    _explain(llm.built, Console(stderr=True))


def _one(llm: Any, prompt: str, params: Any, as_json: bool) -> None:
    """Stream one prompt to the screen, then say how fast it was and how near to the limit."""
    from ridgeline.study.speed import Speed

    console = Console(stderr=True, soft_wrap=True)
    streams = not as_json and params.n == 1
    output = None
    try:
        parts = llm.stream(prompt, params)
        speed = Speed(llm.built)
        if streams:
            print(prompt, end="", flush=True)
        for part in parts:
            output = part.output
            speed.part(len(part.token_ids))
            if streams:
                print(part.text, end="", flush=True)
    except KeyboardInterrupt:
        console.print("\ninterrupted", style="yellow")
        sys.exit(130)
    report = speed.report()
    if as_json:
        record = {"prompt": prompt, **_completions(output), "speed": report.as_dict(), **_engine(llm.built)}
        print(json.dumps(record, ensure_ascii=False))
        return
    if not streams and output is not None:
        for completion in output.outputs:
            print(f"--- {completion.index} ({completion.finish_reason})\n{prompt}{completion.text}")
    print(flush=True)
    _print_speed(console, report)


def _gain(llm: Any, prompt: str, params: Any, console: Console) -> None:
    """The same prompt without and with draft trees, in turn: decode rates, tokens a step, and that they agree."""
    from contextlib import nullcontext
    from statistics import median

    seeded = replace(params, seed=params.seed if params.seed is not None else 1)
    rates: dict[bool, list[float]] = {False: [], True: []}
    texts: set[tuple[Any, ...]] = set()
    metrics = None
    for _ in range(GAIN_ROUNDS):
        for trees in (False, True):
            with nullcontext() if trees else llm.built.plain():
                output = llm.generate(prompt, seeded, use_tqdm=False)[0]
            texts.add(tuple(tuple(one.token_ids) for one in output.outputs))
            if output.metrics.tpot_s:
                rates[trees].append(1 / output.metrics.tpot_s)
            if trees:
                metrics = output.metrics
    if not rates[True] or not rates[False] or metrics is None:
        console.print("draft trees: too few tokens to compare", style="dim")
        return
    without, with_trees = median(rates[False]), median(rates[True])
    tokens = metrics.num_generated_tokens / max(metrics.num_steps, 1)
    same = "the same tokens" if len(texts) == 1 else f"OTHER TOKENS: {len(texts)} different outputs"
    console.print(
        f"draft trees: {without:.0f} tok/s without, {with_trees:.0f} with: {with_trees / without:.2f}x at {tokens:.2f} "
        f"tokens a step, {metrics.num_accepted_tokens} of {metrics.num_draft_tokens} drafted accepted; {same}",
        highlight=False,
    )


def _explain(built: Any, console: Console) -> None:
    """Decode steps of a small workload on this very engine, split up: a short table and the worst offender."""
    from ridgeline.cli.explain import short
    from ridgeline.study.explain import MeasurementError, explain
    from ridgeline.workload.arrivals import Job

    longest = built.config.max_model_len
    prompt = max(min(EXPLAINED_PROMPT, longest // 2), 1)
    try:
        steps = explain(built, [Job(prompt, max(min(EXPLAINED_OUTPUT, longest - prompt), 1))], rounds=1)
    except MeasurementError as error:
        console.print(f"no table: {error}", style="yellow", highlight=False)
        return
    for step in steps:
        if step.kind == "decode":
            console.print(short(step))
            console.print(step.advice[0], highlight=False)


def _print_speed(console: Console, report: Any) -> None:
    for line in report.lines():
        console.print(line, highlight=False, markup=False)


def show_engine(built: Any, console: Console) -> None:
    """What was decided and why, and the memory ledger, as two tables."""
    from ridgeline.engine.memory import ledger_rows, size

    values = _settings(built.config)
    reasons = built.config.reasons
    settings = Table("setting", "value", "why", title=f"{built.directory}", title_justify="left", title_style="bold")
    for name, value in values.items():
        settings.add_row(Text(name), Text(str(value)), Text(reasons.get(name, "")))
    memory = Table("memory", "bytes", "", title_justify="left")
    memory.columns[1].justify = "right"
    for what, amount, remark in ledger_rows(built.ledger, built.config):
        memory.add_row(what, size(amount), remark)
    console.print(settings)
    console.print(memory)


def _settings(config: Any) -> dict[str, Any]:
    return {one.name: getattr(config, one.name) for one in fields(config) if one.name != "reasons"}


def _engine(built: Any) -> dict[str, Any]:
    """Settings and memory for --json."""
    length = built.config.max_model_len
    return {
        "settings": _settings(built.config),
        "memory": {**asdict(built.ledger), "fits": {"requests": built.ledger.fits(length), "tokens": length}},
    }


def _completions(output: Any) -> dict[str, Any]:
    """A RequestOutput's completions as JSON, with log-probabilities where they were asked for."""
    return {
        "outputs": [
            {
                "index": one.index,
                "text": one.text,
                "token_ids": one.token_ids,
                "finish_reason": one.finish_reason,
                "stop_reason": one.stop_reason,
                **({} if one.logprobs is None else {"logprobs": [_logprobs(table) for table in one.logprobs]}),
            }
            for one in output.outputs
        ],
        **(
            {}
            if output.prompt_logprobs is None
            else {"prompt_logprobs": [table and _logprobs(table) for table in output.prompt_logprobs]}
        ),
    }


def _logprobs(table: Any) -> dict[str, Any]:
    return {str(token): asdict(one) for token, one in table.items()}


class _Jobs:
    """A file of prompts and the file of their results.

    A result line holds the number of its prompt's line, so that a later run with the same files does
    only what is missing. A half-written last line (after a crash or a full disk) is cut off first.
    """

    def __init__(self, file: Path, output: Path, sampling: dict[str, Any]) -> None:
        self.file, self.output, self.sampling = file, output, sampling
        try:
            text = file.read_text(encoding="utf-8")
        except OSError as error:
            raise InvalidArgument("file", f"{file} cannot be read: {error.strerror}") from None
        except UnicodeDecodeError as error:
            raise InvalidArgument("file", f"{file} is not UTF-8 ({error})") from None
        self.lines = [(number, line) for number, line in enumerate(text.split("\n")) if line.strip()]
        if not self.lines:
            raise InvalidArgument("file", f"{file} holds no prompts")
        try:
            self.done = self._finished()
            output.open("a").close()
        except OSError as error:
            raise InvalidArgument("output", f"{output} cannot be written: {error.strerror}") from None

    def _finished(self) -> set[int]:
        """Lines done by earlier runs. Nothing of a file that is not ours is ever changed."""
        if not self.output.is_file():
            return set()
        raw = self.output.read_bytes()
        whole = raw[: raw.rfind(b"\n") + 1]
        done = set()
        for place, line in enumerate(whole.split(b"\n")[:-1]):
            try:
                done.add(int(json.loads(line)["line"]))
            except (ValueError, KeyError, TypeError):
                raise self._foreign(place) from None
        rest = raw[len(whole) :]
        if rest:
            if not (rest.startswith(RECORD_START) or RECORD_START.startswith(rest)):
                raise self._foreign(len(done))
            with self.output.open("r+b") as opened:
                opened.truncate(len(whole))
        return done

    def _foreign(self, place: int) -> InvalidArgument:
        return InvalidArgument(
            "output", f"{self.output} line {place + 1} is no result of this command; name another file"
        )

    def run(self, llm: Any, as_json: bool) -> None:
        """Complete what is not done yet; every finished prompt is on disk before the next one is waited for."""
        from tqdm import tqdm

        from ridgeline.study.speed import Speed

        console = Console(stderr=True, soft_wrap=True)
        todo = [(number, line) for number, line in self.lines if number not in self.done]
        refused: list[tuple[int, str]] = []
        metrics: list[Any] = []
        tokens = 0
        jobs = (_job(line, self.sampling) for _, line in todo)
        bar = tqdm(
            total=len(self.lines),
            initial=len(self.done),
            desc="prompts",
            unit="prompt",
            dynamic_ncols=True,
            disable=as_json or None,
        )
        interrupted = False
        speed = Speed(llm.built)
        start = time.perf_counter()
        try:
            with self.output.open("a", encoding="utf-8") as out, closing(llm.complete(jobs)) as completed:
                for place, output in completed:
                    record: dict[str, Any] = {"line": todo[place][0]}
                    if output.error is not None:
                        record["error"] = str(output.error)
                    else:
                        record.update(_completions(output))
                    out.write(json.dumps(record, ensure_ascii=False) + "\n")
                    out.flush()
                    if output.error is not None:
                        refused.append((todo[place][0], str(output.error)))
                    else:
                        metrics.append(output.metrics)
                    tokens += sum(len(one.token_ids) for one in output.outputs)
                    bar.set_postfix_str(f"{tokens / (time.perf_counter() - start):.0f} tok/s", refresh=False)
                    bar.update(1)
        except KeyboardInterrupt:
            interrupted = True
        except OSError as error:
            raise RidgelineError(
                f"{self.output} cannot be written: {error.strerror}; {len(metrics) + len(refused)} results of this "
                "run are safe, run the same command again to go on"
            ) from None
        finally:
            bar.close()
        seconds = time.perf_counter() - start
        finished = len(metrics) + len(refused)
        report = speed.report_all(metrics, seconds)
        summary = {
            "prompts": len(self.lines),
            "finished_before": len(self.done),
            "finished": finished,
            "refused": len(refused),
            "interrupted": interrupted,
            "output_tokens": tokens,
            "seconds": seconds,
            "speed": report.as_dict(),
            **_engine(llm.built),
        }
        if as_json:
            print(json.dumps(summary))
        else:
            for number, message in refused[:SHOWN_REFUSALS]:
                console.print(
                    f"line {number + 1} was refused: {message}", style="yellow", highlight=False, markup=False
                )
            if len(refused) > SHOWN_REFUSALS:
                more = f'{len(refused) - SHOWN_REFUSALS} more lines were refused; their "error" is in {self.output}'
                console.print(Text(more, style="yellow"))
            console.print(
                f"{finished} of {len(todo)} prompts in {seconds:.1f} s -> {self.output}"
                + (f" ({len(self.done)} were there)" if self.done else ""),
                highlight=False,
                markup=False,
            )
            if metrics:
                _print_speed(console, report)
        if interrupted:
            console.print("interrupted; run the same command again to go on", style="yellow")
            sys.exit(130)


def _job(line: str, defaults: dict[str, Any]) -> tuple[Any, Any, Any]:
    """A line of --file as (prompt, SamplingParams, priority); a bad line becomes a job that is refused."""
    from ridgeline.core.request import SamplingParams

    try:
        values = json.loads(line)
        if isinstance(values, str):
            values = {"prompt": values}
        if not isinstance(values, dict):
            raise InvalidArgument("prompt", "the line must be a JSON object or a string")
        prompt = {name: values.pop(name) for name in ("prompt", "prompt_token_ids") if name in values}
        priority = values.pop("priority", 0)
        return prompt, SamplingParams.from_mapping({**defaults, **values}), priority
    except RidgelineError as error:
        return error, SamplingParams(), 0
    except ValueError as error:
        return InvalidArgument("prompt", f"the line is not valid JSON ({error})"), SamplingParams(), 0
