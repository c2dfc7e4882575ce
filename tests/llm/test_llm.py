"""The offline face: calls and their results, streams, chat, nesting, interruption, memory before and after."""

from __future__ import annotations

import gc
import json
import logging
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from emptiness import assert_empty

from ridgeline import LLM, SamplingParams
from ridgeline.core.errors import InvalidArgument, RidgelineError
from ridgeline.core.step import StepPlan, StepRecord
from ridgeline.kernels.select import select
from ridgeline.kv.pages import Pages
from ridgeline.models.checkpoint import embedded_model
from ridgeline.models.weights import Store

TEN = SamplingParams(max_tokens=10, seed=4, ignore_eos=True)
PROMPT = "the quick brown fox"


def test_every_form_of_prompt_means_the_same(llm: LLM) -> None:
    assert llm.tokenizer is not None
    ids = llm.tokenizer.encode(PROMPT)
    forms: list[Any] = [PROMPT, {"prompt": PROMPT}, {"prompt_token_ids": ids}, ids, tuple(ids), [PROMPT], [ids]]
    outputs = [llm.generate(form, TEN, use_tqdm=False)[0] for form in forms]
    assert {tuple(one.outputs[0].token_ids) for one in outputs} == {tuple(outputs[0].outputs[0].token_ids)}
    assert all(one.prompt_token_ids == ids for one in outputs)
    assert [one.prompt for one in outputs] == [PROMPT, PROMPT, None, None, None, PROMPT, None]


def test_results_come_in_order_with_ids_and_times(llm: LLM) -> None:
    params = [SamplingParams(max_tokens=number, ignore_eos=True) for number in (9, 1, 5)]
    outputs = llm.generate(["a", "b", "c"], params, use_tqdm=False)
    assert [len(one.outputs[0].token_ids) for one in outputs] == [9, 1, 5]
    assert len({one.request_id for one in outputs}) == 3
    for one in outputs:
        assert one.finished
        assert one.outputs[0].finished()
        metrics = one.metrics
        assert metrics is not None
        assert metrics.first_scheduled_s is not None
        assert metrics.ttft_s is not None
        assert metrics.e2e_s is not None
        assert 0 < metrics.ttft_s <= metrics.e2e_s
        assert metrics.arrival_s <= metrics.first_scheduled_s < metrics.arrival_s + metrics.ttft_s
        assert metrics.num_generated_tokens == len(one.outputs[0].token_ids)
        assert metrics.num_prompt_tokens == len(one.prompt_token_ids)
    assert outputs[1].metrics is not None
    assert outputs[1].metrics.tpot_s is None


def test_the_bar_counts_prompts(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    llm.generate(["a", "b", "c"], TEN)
    assert "3/3" in capsys.readouterr().err
    llm.generate(["a", "b", "c"], TEN, use_tqdm=False)
    assert capsys.readouterr().err == ""


def test_defaults_of_the_checkpoint(checkpoint: Callable[..., Path], make_llm: Callable[..., LLM]) -> None:
    other = checkpoint()
    (other / "generation_config.json").write_text(
        json.dumps({"temperature": 0.25, "top_k": 7, "top_p": None, "eos_token_id": [1, 44], "do_sample": True})
    )
    llm = make_llm(other)
    assert llm.get_default_sampling_params() == SamplingParams(temperature=0.25, top_k=7)
    assert llm.intake.eos_ids == {1, 44}
    by_default = llm.generate(PROMPT, use_tqdm=False)[0].outputs[0]
    assert len(by_default.token_ids) <= 16
    to_end = SamplingParams(temperature=0, logit_bias={44: 100.0})
    assert llm.generate(PROMPT, to_end, use_tqdm=False)[0].outputs[0].finish_reason == "stop"
    (other / "generation_config.json").write_text(json.dumps({"temperature": 0.7, "do_sample": False}))
    assert make_llm(other).get_default_sampling_params().temperature == 0


# Streams


def test_a_stream_is_the_result_in_pieces(llm: LLM) -> None:
    for params in (TEN, SamplingParams(n=3, seed=1, max_tokens=12, stop=["e", "o"])):
        whole = llm.generate(PROMPT, params, use_tqdm=False)[0]
        texts, ids, ends = [""] * params.n, [[] for _ in range(params.n)], [None] * params.n  # type: ignore[var-annotated]
        for part in llm.stream(PROMPT, params):
            assert ends[part.index] is None, "nothing comes behind the end"
            texts[part.index] += part.text
            ids[part.index] += part.token_ids
            ends[part.index] = part.finish_reason  # type: ignore[call-overload]
        assert texts == [one.text for one in whole.outputs]
        assert ids == [one.token_ids for one in whole.outputs]
        assert ends == [one.finish_reason for one in whole.outputs]


def test_a_stream_comes_token_by_token(llm: LLM) -> None:
    assert [len(part.token_ids) for part in llm.stream(PROMPT, TEN)] == [1] * 10


def test_a_stream_that_nobody_reads_takes_nothing(llm: LLM) -> None:
    parts = llm.stream(PROMPT, TEN)
    assert_empty(llm)
    del parts


def test_a_stream_left_early_gives_its_blocks_back(llm: LLM) -> None:
    for params in (TEN, SamplingParams(n=4, seed=1, max_tokens=12)):
        parts = llm.stream(PROMPT, params)
        part = next(parts)
        assert llm.built.engine.has_work
        parts.close()
        assert_empty(llm)
        assert all(one.finish_reason == "abort" for one in part.output.outputs)


def test_complete_left_early_gives_its_blocks_back(llm: LLM) -> None:
    def endless() -> Iterator[tuple[Any, SamplingParams, int]]:
        while True:
            yield [5, 6, 7], SamplingParams(max_tokens=3, ignore_eos=True), 0

    completed = llm.complete(endless())
    places = [next(completed)[0] for _ in range(70)]
    assert sorted(places) == list(range(70))
    completed.close()


def test_complete_takes_jobs_only_as_there_is_room(make_llm: Callable[..., LLM]) -> None:
    llm = make_llm(max_num_seqs=2)
    taken = 0

    def jobs() -> Iterator[tuple[Any, SamplingParams, int]]:
        nonlocal taken
        for _ in range(50):
            taken += 1
            yield [5, 6, 7], SamplingParams(max_tokens=3, ignore_eos=True), 0

    for number, _ in enumerate(llm.complete(jobs()), 1):
        assert taken <= number + 4
    assert taken == 50


def test_an_error_in_the_jobs_themselves_ends_the_rest(llm: LLM) -> None:
    def jobs() -> Iterator[tuple[Any, SamplingParams, int]]:
        yield [5, 6, 7], TEN, 0
        raise OSError("the file is gone")

    with pytest.raises(OSError, match="gone"):
        list(llm.complete(jobs()))


def test_calls_may_be_nested(llm: LLM) -> None:
    alone = [llm.generate(prompt, TEN, use_tqdm=False)[0].outputs[0].token_ids for prompt in ("a", "b", "c")]
    seen: list[list[int]] = [[], []]
    for first, second in zip(llm.stream("a", TEN), llm.stream("b", TEN)):
        seen[0] += first.token_ids
        seen[1] += second.token_ids
        if len(seen[0]) == 3:
            assert llm.generate("c", TEN, use_tqdm=False)[0].outputs[0].token_ids == alone[2]
    # the nested call's steps brought several tokens at once, and lost none
    assert seen == alone[:2]
    for _, output in llm.complete([("a", TEN, 0), ("b", TEN, 0)]):
        assert output.outputs[0].token_ids in alone[:2]
        assert llm.generate("c", TEN, use_tqdm=False)[0].outputs[0].token_ids == alone[2]


# Chat


def test_chat_renders_the_template(llm: LLM) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "me", "content": [{"type": "text", "text": "yes"}]}]
    output = llm.chat(messages, TEN, use_tqdm=False)[0]
    assert output.prompt == "<user>hi\n<me>yes\n<me>"
    assert llm.tokenizer is not None
    assert output.prompt_token_ids == llm.tokenizer.encode(output.prompt, add_special_tokens=False)
    several = llm.chat([messages, messages[:1]], TEN, use_tqdm=False, add_generation_prompt=False)
    assert [one.prompt for one in several] == ["<user>hi\n<me>yes\n", "<user>hi\n"]


# What goes wrong on the way


class Broken(Exception):
    pass


def test_an_exception_in_a_step_ends_its_requests_alone(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = llm.built.runner
    run, steps = runner.start, 0

    def breaking(plan: StepPlan) -> Any:
        nonlocal steps
        steps += 1
        if steps == 4:
            raise Broken
        return run(plan)

    monkeypatch.setattr(runner, "start", breaking)
    params = SamplingParams(n=3, max_tokens=20, seed=1, ignore_eos=True)
    with pytest.raises(Broken):
        llm.generate(["a", "b"], params, use_tqdm=False)
    assert_empty(llm)
    other = llm.stream("c", TEN)
    steps = 2
    next(other)
    with pytest.raises(Broken):
        llm.generate(["a", "b"], params, use_tqdm=False)
    assert [part.finish_reason for part in other] == ["error"]
    assert len(llm.generate(["a", "b"], params, use_tqdm=False)) == 2


def test_an_interrupt_comes_between_steps(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the middle of the scheduler's work: the step ends first, then the call; the LLM stays good."""
    before = llm.generate(["a", "b"], TEN, use_tqdm=False)
    scheduler = llm.built.engine.scheduler
    plan, steps, whole = scheduler.plan, 0, []

    def interrupted(*chosen: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 3:
            signal.raise_signal(signal.SIGINT)
        planned = plan(*chosen)
        whole.append(steps)
        return planned

    monkeypatch.setattr(scheduler, "plan", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["a", "b"], TEN, use_tqdm=False)
    assert whole == [1, 2, 3]
    assert_empty(llm)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    after = llm.generate(["a", "b"], TEN, use_tqdm=False)
    assert [one.outputs[0].token_ids for one in after] == [one.outputs[0].token_ids for one in before]


def test_a_second_interrupt_comes_at_once(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    run = llm.built.runner.start
    reached = []

    def hanging(plan: StepPlan) -> Any:
        signal.raise_signal(signal.SIGINT)
        reached.append(1)
        signal.raise_signal(signal.SIGINT)
        reached.append(2)
        return run(plan)

    with monkeypatch.context() as patch:
        patch.setattr(llm.built.runner, "start", hanging)
        with pytest.raises(KeyboardInterrupt):
            llm.generate("a", TEN, use_tqdm=False)
    assert reached == [1]


def test_listeners_hear_every_step(llm: LLM) -> None:
    records: list[StepRecord] = []
    llm.built.engine.listeners.append(records.append)
    llm.generate([[3] * 100, [4, 5]], SamplingParams(max_tokens=4, ignore_eos=True), use_tqdm=False)
    llm.built.engine.listeners.clear()
    assert [record.kind for record in records] == ["prefill", "prefill", "decode", "decode", "decode"]
    assert [record.number for record in records] == list(range(records[0].number, records[0].number + len(records)))
    assert sum(record.sampled for record in records) == 8
    assert all(record.spans and record.device_s > 0 and record.host_s >= 0 for record in records)
    assert sum(new for record in records for new, _ in record.spans) == 102 + 6
    assert all(record.predicted_s is None for record in records)


# The end


def test_a_closed_llm_says_so(tiny: Path) -> None:
    llm = LLM(tiny, kernels="reference")
    parts = llm.stream("a", TEN)
    next(parts)
    llm.close()
    llm.close()
    for use in (
        lambda: llm.generate("a", use_tqdm=False),
        lambda: llm.stream("a"),
        lambda: llm.chat([{"role": "user", "content": "a"}], use_tqdm=False),
        lambda: llm.built,
    ):
        with pytest.raises(RidgelineError, match="closed"):
            use()
    assert [part.finish_reason for part in parts] == ["abort"]


def alive() -> int:
    """Models, KV pools and LLMs in memory (by `type`: isinstance would wake lazy objects of others)."""
    gc.collect()
    return sum(type(one) in (Store, Pages, LLM) for one in gc.get_objects())


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_eight_in_turn_leave_no_memory(tiny: Path, tmp_path: Path) -> None:
    config = json.loads((tiny / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps({**config, "hidden_size": 256, "intermediate_size": 2048, "vocab_size": 32768})
    )
    before, sizes = alive(), []
    for number in range(8):
        llm = LLM(
            tmp_path / "config.json",
            load_format="dummy",
            kernels="reference",
            tokenizer=str(tiny),
            kv_cache_memory_bytes=16 << 20,
            max_num_seqs=8,
        )
        llm.generate(["a", "b"], SamplingParams(max_tokens=3), use_tqdm=False)
        one_llm = llm.built.ledger.weight_bytes + llm.built.ledger.kv_bytes
        if number % 3 == 0:
            llm.close()
        elif number % 3 == 1:
            with llm:
                pass
        del llm
        sizes.append(resident_bytes())
    assert alive() == before
    # Allocators keep a few tens of MB back and forth; six LLMs that left anything would be far beyond one.
    assert one_llm > 80e6
    assert sizes[-1] - sizes[1] < one_llm / 2


def test_nothing_but_references_holds_an_llm(make_llm: Callable[..., LLM]) -> None:
    """Its memory goes back the moment that it is closed or deleted: no circle waits for the collector."""
    gc.collect()
    gc.disable()
    try:
        for close in (True, False):
            llm = make_llm()
            llm.generate("a", TEN, use_tqdm=False)
            held = [weakref.ref(llm.built.runner), weakref.ref(llm.built.runner.model.store)]
            held += [weakref.ref(llm.built.runner.pages)]
            if close:
                llm.close()
                assert [one() for one in held] == [None] * 3
    finally:
        gc.enable()


def test_failure_on_the_way_holds_nothing(tiny: Path) -> None:
    before = alive()
    for _ in range(3):
        with pytest.raises(RidgelineError):
            LLM(tiny, kernels="reference", kv_cache_memory_bytes=4096)
    assert alive() == before


def test_the_interpreter_ends_in_silence(tiny: Path) -> None:
    script = f"""
from ridgeline import LLM, SamplingParams
llm = LLM({str(tiny)!r}, kernels="reference")
parts = llm.stream("a", SamplingParams(max_tokens=30, ignore_eos=True))
next(parts)
holder = [llm]
holder.append(holder)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == ""
    assert done.stderr == ""


# Memory before the start


def test_the_ledger_adds_up_and_is_true(llm: LLM) -> None:
    ledger, config, built = llm.built.ledger, llm.built.config, llm.built
    parts = (ledger.weight_bytes, ledger.kv_bytes, ledger.activation_bytes, ledger.rest_bytes, ledger.free_bytes)
    assert all(part >= 0 for part in parts)
    assert sum(parts) == ledger.usable_bytes <= ledger.total_bytes
    assert ledger.kv_bytes == built.runner.pages.nbytes
    tensors = [*built.runner.pages.keys, *built.runner.pages.values]
    assert ledger.kv_bytes == sum(one.numel() * one.element_size() for one in tensors)
    assert ledger.kv_tokens == config.num_blocks * config.block_size
    assert ledger.bytes_per_token == 2 * 2 * 2 * 16 * 4
    parameters = 2 * 288 * 64 + 64 + 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 96 * 64 + 2 * 64)
    assert ledger.weight_bytes == 4 * parameters
    assert ledger.fits(256) == config.num_blocks // 16
    assert ledger.fits(17) == config.num_blocks // 2, "requests hold whole blocks"
    assert ledger.fits(10**9) == 0


def test_as_many_requests_run_at_once_as_fit(make_llm: Callable[..., LLM]) -> None:
    llm = make_llm(max_model_len=64, kv_cache_memory_bytes=9 * 4 * 8192, max_num_batched_tokens=1024)
    assert llm.built.ledger.fits(64) == 9
    most = 0

    def listen(record: StepRecord) -> None:
        nonlocal most
        most = max(most, record.running)

    llm.built.engine.listeners.append(listen)
    prompts = [[number, *range(3, 62)] for number in range(2, 20)]
    llm.generate(prompts, SamplingParams(max_tokens=4, ignore_eos=True), use_tqdm=False)
    assert most == 9
    assert llm.built.engine.scheduler.preemptions == 0


@pytest.mark.slow
@pytest.mark.parametrize("kernels", ["reference", "auto"])
def test_activations_are_no_less_than_what_a_step_takes(tiny: Path, tmp_path: Path, kernels: str) -> None:
    """In a process of its own: what the largest steps add to its memory is within the ledger's figure."""
    config = json.loads((tiny / "config.json").read_text())
    wide = {"vocab_size": 40_000, "hidden_size": 256, "intermediate_size": 512, "max_position_embeddings": 1024}
    (tmp_path / "config.json").write_text(json.dumps({**config, **wide}))
    script = f"""
import resource, torch
from ridgeline import LLM, SamplingParams
llm = LLM({str(tmp_path / "config.json")!r}, load_format="dummy", kernels={kernels!r}, tokenizer={str(tiny)!r},
          max_num_seqs=48, max_num_batched_tokens=512, kv_cache_memory_bytes=48 << 20)
def peak(): return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
small = dict(max_tokens=2, ignore_eos=True)
many = SamplingParams(**small, top_p=0.9, repetition_penalty=1.2, logprobs=20, seed=1)
llm.generate([[3] * 5], [SamplingParams(**small, prompt_logprobs=20)], use_tqdm=False)  # libraries, compiled kernels
llm.generate([[3, 4], [4]], many, use_tqdm=False)
for page in (*llm.built.runner.pages.keys, *llm.built.runner.pages.values):
    page.zero_()
before = peak()
llm.generate([[n % 999 for n in range(600)]], SamplingParams(**small, prompt_logprobs=20), use_tqdm=False)
llm.generate([[n, 4] for n in range(48)], many, use_tqdm=False)
print(peak() - before, llm.built.ledger.activation_bytes)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    taken, promised = map(int, done.stdout.split())
    assert taken <= promised + (32 << 20), f"{taken / 1e6:.0f} MB taken, {promised / 1e6:.0f} MB in the ledger"


def test_settings_and_memory_are_logged(tiny: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="ridgeline"), LLM(tiny, kernels="reference", max_model_len=100):
        pass
    settings, memory = [record.message for record in caplog.records if record.levelno == logging.INFO][:2]
    assert "max_model_len=100" in settings
    assert "dtype=float32 (exact on a CPU" in settings
    for word in ("weights", "KV cache", "activations", "rest", "free", "requests of 100 tokens"):
        assert word in memory


def test_each_auto_has_a_reason(llm: LLM, tiny: Path) -> None:
    with LLM(tiny, kernels="reference") as bare:
        reasons = bare.built.config.reasons
    assert set(reasons) == {
        "device", "dtype", "max_model_len", "max_num_batched_tokens", "enable_prefix_caching", "seed", "num_blocks",
        "enforce_eager", "async_scheduling",
    }  # fmt: skip
    assert "dtype" not in llm.built.config.reasons


def test_an_asked_for_family_of_kernels_serves(llm: LLM, make_llm: Callable[..., LLM], kernels: str) -> None:
    assert {row.kernel for row in llm.built.table.rows} == {"reference"}
    if kernels == "auto":
        assert "cpu" in {row.kernel for row in make_llm(kernels="auto").built.table.rows}
    assert select(torch.device("cpu"), lambda work, ops: None, "reference").rows == ()


def test_the_embedded_model_runs() -> None:
    if not (embedded_model() / "model.safetensors").is_file():
        pytest.skip("assets/model is not there yet")
    with LLM(max_model_len=256) as llm:
        output = llm.generate("def add(a, b):", SamplingParams(temperature=0, max_tokens=16), use_tqdm=False)[0]
        assert "return" in output.outputs[0].text


def test_keyword_arguments_are_the_settings(tiny: Path) -> None:
    with pytest.raises(InvalidArgument, match="known are model, tokenizer"):
        LLM(tiny, zzz=1)
