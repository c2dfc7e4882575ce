"""`ridgeline generate`: complete a prompt on the screen, or a file of prompts into a file.

Knows the terminal and JSON lines. It must not know engines beyond LLM and its records.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from ridgeline.cli import options
from ridgeline.core.errors import InvalidArgument, RidgelineError

DEMO_PROMPT = '''def is_palindrome(text: str) -> bool:
    """Return whether a text reads the same backwards."""
'''


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
    as_json: options.Json = False,
) -> None:
    """Complete PROMPT, or every prompt of --file."""
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
    )
    with LLM(model, **settings) as llm:
        if jobs is not None:
            jobs.run(llm, as_json)
        else:
            _one(llm, prompt if prompt is not None else DEMO_PROMPT, params, as_json)


def _one(llm: Any, prompt: str, params: Any, as_json: bool) -> None:
    """Stream one prompt to the screen, then say how fast it was and how near to the limit."""
    from ridgeline.study.speed import Speed

    console = Console(stderr=True, soft_wrap=True)
    speed = Speed(llm.built)
    several = params.n > 1
    outputs = None
    if not as_json and not several:
        print(prompt, end="", flush=True)
    try:
        for part in llm.stream(prompt, params):
            outputs = part.output
            speed.part(len(part.token_ids))
            if not as_json and not several:
                print(part.text, end="", flush=True)
    except KeyboardInterrupt:
        console.print("\ninterrupted", style="yellow")
        sys.exit(130)
    report = speed.report()
    if as_json:
        print(json.dumps({"prompt": prompt, **_completions(outputs), "speed": report.as_dict()}, ensure_ascii=False))
        return
    if several and outputs is not None:
        for completion in outputs.outputs:
            print(f"--- {completion.index} ({completion.finish_reason})\n{prompt}{completion.text}")
    print(flush=True)
    for line in report.lines():
        console.print(line, highlight=False)


def _completions(output: Any) -> dict[str, Any]:
    return {
        "outputs": [
            {
                "index": one.index,
                "text": one.text,
                "token_ids": one.token_ids,
                "finish_reason": one.finish_reason,
                "stop_reason": one.stop_reason,
            }
            for one in (output.outputs if output is not None else ())
        ]
    }


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
        self.done = self._finished()

    def _finished(self) -> set[int]:
        if not self.output.exists():
            return set()
        raw = self.output.read_bytes()
        whole = raw[: raw.rfind(b"\n") + 1]
        done = set()
        for place, line in enumerate(whole.split(b"\n")[:-1]):
            try:
                done.add(int(json.loads(line)["line"]))
            except (ValueError, KeyError, TypeError):
                raise InvalidArgument(
                    "output", f"{self.output} line {place + 1} is no result of this command; name another file"
                ) from None
        if len(whole) < len(raw):
            with self.output.open("r+b") as opened:
                opened.truncate(len(whole))
        return done

    def run(self, llm: Any, as_json: bool) -> None:
        """Complete what is not done yet; every finished prompt is on disk before the next line is printed."""
        from tqdm import tqdm

        from ridgeline.core.request import RequestOutput

        console = Console(stderr=True, soft_wrap=True)
        todo = [(number, line) for number, line in self.lines if number not in self.done]
        numbers: list[int] = []
        refused: list[tuple[int, str]] = []
        start, tokens, finished = time.perf_counter(), 0, 0

        def jobs() -> Any:
            for number, line in todo:
                numbers.append(number)
                yield _job(line, self.sampling)

        bar = tqdm(
            total=len(self.lines), initial=len(self.done), desc="prompts", unit="prompt", disable=as_json or None
        )
        interrupted = False
        try:
            with self.output.open("a", encoding="utf-8") as out:
                for place, output in llm.complete(jobs()):
                    assert isinstance(output, RequestOutput)
                    record: dict[str, Any] = {"line": numbers[place]}
                    if output.error is not None:
                        record["error"] = str(output.error)
                        refused.append((numbers[place], str(output.error)))
                    else:
                        record.update(_completions(output))
                    out.write(json.dumps(record, ensure_ascii=False) + "\n")
                    out.flush()
                    finished += 1
                    tokens += sum(len(one.token_ids) for one in output.outputs)
                    bar.update(1)
                    bar.set_postfix_str(f"{tokens / (time.perf_counter() - start):.0f} tok/s")
        except KeyboardInterrupt:
            interrupted = True
        except OSError as error:
            bar.close()
            raise RidgelineError(
                f"{self.output} cannot be written: {error.strerror}; {finished} results are safe, "
                "run the same command again to go on"
            ) from None
        bar.close()
        seconds = time.perf_counter() - start
        summary = {
            "prompts": len(self.lines),
            "finished_before": len(self.done),
            "finished": finished,
            "refused": len(refused),
            "output_tokens": tokens,
            "seconds": seconds,
            "tokens_per_s": tokens / seconds,
        }
        if as_json:
            print(json.dumps(summary))
        else:
            for number, message in refused[:10]:
                console.print(f"line {number + 1} was refused: {message}", style="yellow", highlight=False)
            console.print(
                f"{finished} of {len(todo)} prompts, {tokens} tokens in {seconds:.1f} s, {tokens / seconds:.0f} tok/s"
                f" -> {self.output}",
                highlight=False,
            )
        if interrupted:
            console.print("interrupted; run the same command again to go on", style="yellow")
            sys.exit(130)


def _job(line: str, defaults: dict[str, Any]) -> tuple[Any, Any, int]:
    """A line of --file as (prompt, SamplingParams, priority); a bad line becomes a job that is refused."""
    from ridgeline.core.request import SamplingParams

    try:
        values = json.loads(line)
    except ValueError as error:
        return InvalidArgument("prompt", f"the line is not valid JSON ({error})"), SamplingParams(), 0
    if isinstance(values, str):
        values = {"prompt": values}
    if not isinstance(values, dict):
        return InvalidArgument("prompt", "the line must be a JSON object or a string"), SamplingParams(), 0
    prompt = {name: values.pop(name) for name in ("prompt", "prompt_token_ids") if name in values}
    priority = values.pop("priority", 0)
    try:
        return prompt, SamplingParams.from_mapping({**defaults, **values}), priority
    except RidgelineError as error:
        return error, SamplingParams(), 0
