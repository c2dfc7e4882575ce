"""The command line as a user meets it: output, files that can be resumed, refusals of one line, exit codes."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest

from ridgeline.models.checkpoint import embedded_model

pytestmark = pytest.mark.usefixtures("one_thread")

FULL = Path("/dev/full")
REFERENCE = ("--kernels", "reference", "--dtype", "float32")
ENVIRONMENT = {**os.environ, "COLUMNS": "200", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def in_a_process(*arguments: Any, expect: int = 0) -> subprocess.CompletedProcess[str]:
    """The command in an interpreter of its own, which takes seconds to start."""
    command = [sys.executable, "-m", "ridgeline.cli.main", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, check=False, timeout=120)
    assert done.returncode == expect, done.stderr
    assert "Traceback" not in done.stderr
    return done


def ridgeline(*arguments: Any, expect: int = 0) -> subprocess.CompletedProcess[str]:
    """The command in this process, from its arguments to its exit code."""
    from ridgeline.cli.main import main

    out, err, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["ridgeline", *map(str, arguments)])
        patch.setenv("COLUMNS", "200")
        try:
            main()
        except SystemExit as ended:
            code = int(ended.code or 0)
    assert code == expect, err.getvalue()
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


def refusal(*arguments: Any, run: Callable[..., subprocess.CompletedProcess[str]] = ridgeline) -> str:
    """The one line on standard error of a command that is refused."""
    done = run(*arguments, expect=1)
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    return lines[0]


def write_lines(path: Path, lines: list[Any]) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# One prompt


def test_a_prompt_is_streamed_and_judged(tiny: Path) -> None:
    done = in_a_process("generate", "hello world", "--model", tiny, *REFERENCE, "--max-tokens", 20, "--ignore-eos")
    assert done.stdout.startswith("hello world")
    assert len(done.stdout) > len("hello world\n")
    first, second, third = done.stderr.splitlines()
    assert re.fullmatch(r"prefill \d+ tokens, \d+ tok/s, first token after [\d.]+ ms", first)
    assert re.fullmatch(r"decode 19 tokens, \d+ tok/s, [\d.]+ % of the limit", second)
    assert re.fullmatch(r"  limit: 0\.\d MB a step at \d+ GB/s, measured at this working set; [\d.]+ % of .*", third)


SPEED = {
    "prompt_tokens": int,
    "prefill_tokens_per_s": float,
    "time_to_first_token_s": float,
    "output_tokens": int,
    "decode_tokens_per_s": float,
    "limit_share": float,
    "dram_limit_share": float,
    "bytes_per_step": float,
    "read_bytes_per_s": float,
    "dram_read_bytes_per_s": float,
    "working_set_bytes": int,
    "flops_per_s": float,
}


def test_json_of_a_prompt(tiny: Path) -> None:
    """The same figures as data, and the same tokens as the LLM gives."""
    from ridgeline import LLM, SamplingParams

    arguments = ("--max-tokens", 12, "--temperature", 0.8, "--seed", 3, "-n", 2, "--stop", "zzz", "--top-k", 50)
    done = ridgeline("generate", "hello", "--model", tiny, *REFERENCE, *arguments, "--ignore-eos", "--json")
    assert done.stderr == ""
    (line,) = done.stdout.splitlines()
    result = json.loads(line)
    assert set(result) == {"prompt", "outputs", "speed", "settings", "memory"}
    assert {name: type(value) for name, value in result["speed"].items()} == SPEED
    assert result["speed"]["output_tokens"] == 24
    assert result["memory"]["fits"]["tokens"] == 256
    assert result["settings"]["dtype"] == "float32"
    with LLM(tiny, kernels="reference", dtype="float32") as llm:
        params = SamplingParams(max_tokens=12, temperature=0.8, seed=3, n=2, stop="zzz", top_k=50, ignore_eos=True)
        expected = llm.generate("hello", params, use_tqdm=False)[0]
    assert result["speed"]["prompt_tokens"] == len(expected.prompt_token_ids)
    assert [one["token_ids"] for one in result["outputs"]] == [one.token_ids for one in expected.outputs]
    assert [one["text"] for one in result["outputs"]] == [one.text for one in expected.outputs]
    assert {tuple(one) for one in result["outputs"]} == {("index", "text", "token_ids", "finish_reason", "stop_reason")}


def test_too_few_tokens_to_judge(tiny: Path) -> None:
    done = ridgeline("generate", "hello", "--model", tiny, *REFERENCE, "--max-tokens", 1, "--verbose")
    assert "decode 0 tokens: too few to speak of a rate" in done.stderr
    for words in ("setting", "no CUDA device", "max_model_len", "KV cache", "fits 256 requests of 256 tokens", "free"):
        assert words in done.stderr


def test_several_samples_are_told_apart(tiny: Path) -> None:
    done = ridgeline(
        "generate", "hello", "--model", tiny, *REFERENCE, "-n", 2, "--temperature", 1, "--max-tokens", 3, "--ignore-eos"
    )
    assert done.stdout.count("(length)\nhello") == 2


def test_the_embedded_model_answers() -> None:
    if not (embedded_model() / "model.safetensors").is_file():
        pytest.skip("assets/model is not there yet")
    done = ridgeline("generate", "--max-tokens", 24, *REFERENCE)
    assert "def is_palindrome" in done.stdout
    assert "of the limit" in done.stderr


# Refusals


def test_a_refusal_is_one_line_and_exit_code_1(tiny: Path) -> None:
    assert "no such directory" in refusal("generate", "x", "--model", "no/such [bold]thing[/oops]", run=in_a_process)
    assert "top_p: must be in (0, 1], not 2.0" in refusal("generate", "x", "--model", tiny, "--top-p", 2)


def test_refusals_name_the_option(tiny: Path, tmp_path: Path) -> None:
    file = write_lines(tmp_path / "in.jsonl", ['"a"'])
    for arguments, message in (
        (("x", "--file", file), "prompt: give a PROMPT or --file"),
        (("--file", file), "output: --file needs --output"),
        (("--output", file), "file: --output goes with --file"),
        (("--file", tmp_path / "none", "--output", tmp_path / "out"), "none cannot be read: No such file"),
        (("--file", tmp_path, "--output", tmp_path / "out"), "cannot be read: Is a directory"),
        (("--file", file, "--output", tmp_path / "no" / "out"), "output: "),
        (("--file", file, "--output", tmp_path), "output: "),
        (("x", "--max-tokens", -3), "max_tokens: "),
        (("x", "--temperature", "nan"), "temperature: must be a finite number"),
        (("x", "--block-size", 7), "block_size: "),
        (("x", "--device", "gpu"), "device: "),
        (("x", "--scheduling-policy", "lifo"), "scheduling_policy: must be one of fcfs"),
        (("a " * 500,), "prompt: has"),
        (("x", "--max-tokens", 5000), "max_tokens: 5000"),
        (("x", "--kv-cache-memory-bytes", 100), "lower max_model_len"),
    ):
        assert message in refusal("generate", "--model", tiny, *REFERENCE, *arguments)
    (tmp_path / "empty").write_text("\n\n")
    assert "holds no prompts" in refusal("generate", "--file", tmp_path / "empty", "--output", tmp_path / "out")
    (tmp_path / "latin").write_bytes(b"\xff\xfe")
    assert "not UTF-8" in refusal("generate", "--file", tmp_path / "latin", "--output", tmp_path / "out")


def test_unknown_options_are_errors() -> None:
    done = ridgeline("generate", "x", "--max-token", "3", expect=2)
    assert "No such option" in done.stderr
    assert "--max-tokens" in done.stderr
    assert "No such command" in ridgeline("generat", expect=2).stderr
    ridgeline("generate", "x", "--max-tokens", "many", expect=2)


def test_version_and_help() -> None:
    assert ridgeline("--version").stdout.startswith("ridgeline 0.")
    assert "--kv-cache-memory-bytes" in ridgeline("generate", "--help").stdout


# Files


def file_command(model: Path, source: Path, output: Path, *more: Any) -> tuple[Any, ...]:
    files = ("--file", source, "--output", output)
    return ("generate", "--model", model, *REFERENCE, "--ignore-eos", *files, "--max-tokens", 4, *more)


def test_a_file_of_prompts(tiny: Path, tmp_path: Path) -> None:
    """Every form of line, good and bad; then the same again, which has nothing to do."""
    source = write_lines(
        tmp_path / "in.jsonl",
        [
            {"prompt": "hello"},
            "",
            "{bad json",
            {"prompt_token_ids": [3, 4, 5], "max_tokens": 2, "logprobs": 1, "priority": 3},
            {"prompt": "x", "temprature": 1},
            {"prompt_token_ids": [9999]},
            {"promt": "x"},
            [1, 2],
            '"a string"',
            {"prompt": "x", "priority": "high"},
            {"prompt": "x", "n": 2, "temperature": 1.0},
        ],
    )
    output = tmp_path / "out.jsonl"
    done = ridgeline(*file_command(tiny, source, output, "--json"))
    summary = json.loads(done.stdout)
    assert (summary["prompts"], summary["finished"], summary["refused"], summary["output_tokens"]) == (10, 10, 6, 18)
    assert set(summary["speed"]) == set(SPEED)
    by_line = {record["line"]: record for record in records(output)}
    assert sorted(by_line) == [0, 2, 3, 4, 5, 6, 7, 8, 9, 10]
    assert [number for number, record in sorted(by_line.items()) if "error" in record] == [2, 4, 5, 6, 7, 9]
    for number, words in (
        (2, "not valid JSON"),
        (4, "did you mean temperature"),
        (5, "9999"),
        (9, "priority: must be"),
    ):
        assert words in by_line[number]["error"]
    assert len(by_line[3]["outputs"][0]["token_ids"]) == 2
    assert len(by_line[3]["outputs"][0]["logprobs"]) == 2
    assert len(by_line[10]["outputs"]) == 2
    before = output.read_text()
    again = ridgeline(*file_command(tiny, source, output))
    assert output.read_text() == before
    assert "0 of 0 prompts" in again.stderr
    assert "(10 were there)" in again.stderr


def test_a_file_closes_with_its_speed(tiny: Path, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl", [{"prompt": f"number {number}"} for number in range(20)] + ["{"])
    done = ridgeline(*file_command(tiny, source, tmp_path / "out", "--max-num-seqs", 4))
    lines = done.stderr.splitlines()
    assert lines[0].startswith("line 21 was refused: prompt: the line is not valid JSON")
    assert lines[1].startswith("21 of 21 prompts in ")
    assert re.match(r"prefill \d+ tokens, \d+ tok/s, first token after [\d.]+ ms", lines[2])
    assert re.match(r"decode 60 tokens, \d+ tok/s, [\d.]+ % of the limit", lines[3])


@pytest.mark.slow
def test_interrupted_and_run_again_every_line_is_there_once(tiny: Path, tmp_path: Path) -> None:
    count = 300
    source = write_lines(tmp_path / "in.jsonl", [{"prompt": f"number {number}"} for number in range(count)])
    output = tmp_path / "out.jsonl"
    command = [*file_command(tiny, source, output), "--max-num-seqs", 2, "--max-tokens", 12]
    interruptions = 0
    for _ in range(2):
        process = subprocess.Popen(
            [sys.executable, "-m", "ridgeline.cli.main", *map(str, command)],
            stderr=subprocess.PIPE,
            text=True,
            env=ENVIRONMENT,
        )
        begun = len(records(output)) if output.exists() else 0
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            if output.exists() and output.read_bytes().count(b"\n") > begun + 5:
                process.send_signal(signal.SIGINT)
                break
            time.sleep(0.005)
        _, errors = process.communicate(timeout=60)
        assert "Traceback" not in errors
        assert process.returncode == 130
        assert "interrupted; run the same command again to go on" in errors
        interruptions += 1
        done = records(output)
        assert begun < len(done) < count
    assert interruptions == 2
    with output.open("ab") as opened:
        opened.write(b'{"line": 299, "outp')  # as a crash or a full disk leaves it
    in_a_process(*command)
    assert sorted(record["line"] for record in records(output)) == list(range(count))


def test_a_cut_last_line_is_done_again(tiny: Path, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl", ['"a"', '"b"', '"c"'])
    output = tmp_path / "out.jsonl"
    ridgeline(*file_command(tiny, source, output))
    whole = output.read_bytes()
    from ridgeline.cli.generate import _Jobs

    for cut in (1, 5, 20, len(whole.splitlines()[-1])):
        output.write_bytes(whole[:-cut])
        jobs = _Jobs(source, output, {})
        assert len(jobs.done) == 2
        assert output.read_bytes() == b"".join(whole.splitlines(keepends=True)[:2])


@pytest.mark.parametrize("content", [b"my notes", b"my notes\n", b'{"prompt": "a"}\n', b'{"prompt": "a"}', b"\x00\xff"])
def test_a_file_that_is_no_result_is_left_alone(tiny: Path, tmp_path: Path, content: bytes) -> None:
    source = write_lines(tmp_path / "in.jsonl", ['"a"'])
    output = tmp_path / "notes"
    output.write_bytes(content)
    message = refusal(*file_command(tiny, source, output))
    assert "is no result of this command; name another file" in message
    assert output.read_bytes() == content


@pytest.mark.skipif(not FULL.exists(), reason="no /dev/full here")
def test_a_full_disk(tiny: Path, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl", ['"a"'] * 3)
    message = refusal(*file_command(tiny, source, FULL))
    assert "/dev/full cannot be written: No space left on device; 0 results of this run are safe" in message


@pytest.mark.slow
def test_a_disk_that_fills_up(tiny: Path, tmp_path: Path) -> None:
    """A limit on the file's size stands in for the disk: what was written stays, and the rest comes later."""
    source = write_lines(tmp_path / "in.jsonl", [{"prompt": f"number {number}"} for number in range(30)])
    output = tmp_path / "out.jsonl"
    script = f"""
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500))
sys.argv = ["ridgeline", *{[str(one) for one in file_command(tiny, source, output, "--max-num-seqs", 2)]!r}]
sys.dont_write_bytecode = True
from ridgeline.cli.main import main
main()
"""
    environment = {**ENVIRONMENT, "NUMBA_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=False, timeout=120
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "cannot be written: File too large" in done.stderr
    safe = int(re.search(r"(\d+) results of this run are safe", done.stderr)[1])  # type: ignore[index]
    assert safe == output.read_bytes().count(b"\n") > 0
    ridgeline(*file_command(tiny, source, output))
    assert sorted(record["line"] for record in records(output)) == list(range(30))


# Kernels


def test_the_table_of_kernels(tiny: Path) -> None:
    done = ridgeline("kernels", "--model", tiny, "--kernels", "reference")
    for words in ("op", "decode, prefill, mixed", "attention", "reference", "asked for"):
        assert words in done.stdout
    rows = json.loads(ridgeline("kernels", "--model", tiny, "--json").stdout)["kernels"]
    assert {tuple(row) for row in rows} == {("op", "work", "kernel", "reason", "refused")}
    assert {row["work"] for row in rows} == {"decode", "prefill", "mixed"}
    assert {"embed", "norm", "linear", "attention", "sample"} <= {row["op"] for row in rows}
    assert "kernels: must be one of" in refusal("kernels", "--model", tiny, "--kernels", "best")


def test_the_rung_of_attention(tiny: Path) -> None:
    done = ridgeline("kernels", "--model", tiny, "--attention-backend", "reference", "--json")
    served = {row["op"]: row["kernel"] for row in json.loads(done.stdout)["kernels"]}
    assert served["attention"] == "reference"
    assert served["norm"] == "cpu"
    assert "attention_backend: must be auto" in refusal("kernels", "--model", tiny, "--attention-backend", "best")
    refused = refusal("kernels", "--model", tiny, "--attention-backend", "triton")
    # Whether another test has loaded the GPU's kernels into this process decides which of the two is said.
    assert "attention has no kernel triton here" in refused or "triton: needs a cuda device" in refused
