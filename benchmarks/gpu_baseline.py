"""Llama-3.1-8B's shape on a GPU: decode steps and time to first token, ridgeline beside Transformers.

Both sides run the same random bf16 weights, the very same tensors in memory, in one process, in
alternating stretches at the same context (640 tokens on average). ridgeline runs its engine: scheduling,
preparation, forward, sampling, results on the host after every step. Transformers runs less than its
`generate` does: forward, cache and argmax in a bare loop that waits for the device only at the end of a
stretch; sdpa attention, with DynamicCache and with StaticCache, whose content is random. The better of the
two caches is the baseline. --compile adds StaticCache under torch.compile("reduce-overhead").

    PYTHONPATH=src python3 -m benchmarks.gpu_baseline --out $OUT
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from benchmarks.record import GPU_FIELDS, Record, interval, losing, parser, ratios, seconds
from benchmarks.trace import DATA
from ridgeline import LLM, SamplingParams
from ridgeline.kv.layout import KVLayout
from ridgeline.models import parse_config

WARM_STEPS = 4
TINY = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
}


def main(argv: Sequence[str] | None = None) -> Record:
    options = arguments().parse_args(argv)
    if options.quick:
        options.batches, options.context, options.steps, options.rounds, options.prefill = [1, 3], 48, 3, 2, 40
    record = measure(options)
    record.close()
    return record


def arguments() -> argparse.ArgumentParser:
    result = parser(__doc__ or "", rounds=4)
    result.add_argument("--device", default="cuda")
    result.add_argument("--kernels", default="auto", help="ridgeline's family of kernels")
    result.add_argument("--config", type=Path, default=DATA / "llama-3.1-8b.config.json")
    result.add_argument("--batches", type=int, nargs="+", default=[1, 64, 256])
    result.add_argument("--context", type=int, default=640, help="mean tokens in the cache while decoding")
    result.add_argument("--steps", type=int, default=24, help="decode steps in one stretch")
    result.add_argument("--prefill", type=int, default=2048, help="prompt of the time to first token")
    result.add_argument("--budget", type=float, default=250.0, help="seconds after which no new round is begun")
    result.add_argument("--compile", action="store_true", help="also Transformers under torch.compile (minutes)")
    return result


def measure(options: argparse.Namespace) -> Record:
    record = Record("gpu-baseline", options)
    device = torch.device(options.device)
    values = json.loads(options.config.read_text(encoding="utf-8"))
    if options.quick:
        values.update(TINY)
    spec = parse_config(values, str(options.config))
    total = (options.rounds + 1) * (options.steps + WARM_STEPS)
    start = max(options.context - total // 2, 1)
    layout = KVLayout(spec.layers, spec.kv_heads, spec.head_dim, 2)
    ahead = 16 + max(options.batches) * start // 4096  # tokens that the first have decoded when the last is prefilled
    blocks = max(options.batches) * layout.blocks_for(start + total + ahead)
    context = max(start + total + ahead, options.prefill + 8)
    pool = int((blocks + layout.blocks_for(context)) * 1.03 + 2) * layout.bytes_per_block
    record.settings = {
        "shape": options.config.name,
        "dtype": "bfloat16",
        "weights": "random, the same tensors on both sides",
        "device": options.device,
        "context": [start, start + total],
        "steps_a_stretch": options.steps,
        "rounds": options.rounds,
        "transformers": "bare greedy forward loop, sdpa, DynamicCache and StaticCache, inference_mode",
    }
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="ridgeline-8b-") as folder, Clocks(device) as clocks:
        (Path(folder) / "config.json").write_text(json.dumps(values), encoding="utf-8")
        llm = LLM(
            folder,
            load_format="dummy",
            dtype="bfloat16",
            device=options.device,
            kernels=options.kernels,
            max_model_len=context,
            max_num_seqs=max(options.batches),
            kv_cache_memory_bytes=pool,
            seed=0,
        )
        with llm:
            record.settings["kernels"] = {f"{row.op} ({row.work})": row.kernel for row in llm.built.table.rows}
            model = reference(Path(folder), llm, device)
            record.summary["greedy_tokens_that_agree"] = agreement(llm, model, spec.vocabulary, device)
            rows = [decode_cell(record, llm, model, batch, start, total, began, clocks) for batch in options.batches]
            record.table(
                f"Decode, {options.config.name}, bf16, {options.device}, context {start} to {start + total}",
                ["batch", "ridgeline tok/s", "ms a step", "DynamicCache tok/s", "StaticCache tok/s", "÷ the better"],
                rows,
            )
            first_token(record, llm, model, spec.vocabulary, began, clocks)
        record.timings["clocks"] = clocks.samples()
    record.settings["clock_fields"] = GPU_FIELDS
    return record


# Decoding


class Ours:
    """`batch` requests in ridgeline's engine, all decoding."""

    def __init__(self, llm: LLM, batch: int, prompt: int, vocabulary: int) -> None:
        self.engine, self.batch = llm.built.engine, batch
        draw = random.Random(batch)
        params = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True, detokenize=False)
        self.names = []
        for place in range(batch):
            ids = [draw.randrange(vocabulary) for _ in range(prompt)]
            name = f"decode-{batch}-{place}"
            _, requests = llm.intake.requests(name, {"prompt_token_ids": ids}, params)
            self.engine.add(requests[0])
            self.names.append(name)
        while len(self.engine.step()) < batch:
            pass

    def stretch(self, steps: int) -> list[float]:
        """Seconds of each of `steps` steps, results on the host."""
        times = []
        for _ in range(steps):
            start = time.perf_counter()
            events = self.engine.step()
            times.append(time.perf_counter() - start)
            assert len(events) == self.batch, "not a pure decode step"
        return times

    def close(self) -> None:
        for name in self.names:
            self.engine.abort(name)


class Theirs:
    """A batch in Transformers with a cache that already holds `prompt` random positions a row."""

    def __init__(
        self, model: Any, batch: int, prompt: int, total: int, kind: str, device: torch.device, compiled: bool = False
    ) -> None:
        from transformers import DynamicCache, StaticCache

        config = model.config
        self.device = device
        self.forward: Callable[..., Any] = model
        if compiled:
            self.forward = torch.compile(model.forward, mode="reduce-overhead", fullgraph=True)
        if kind == "dynamic":
            self.cache: Any = DynamicCache(config=config)
        else:
            self.cache = StaticCache(config=config, max_cache_len=prompt + total + 8)
        heads = config.num_key_value_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        for layer in range(config.num_hidden_layers):
            keys, values = torch.randn(2, batch, heads, prompt, size, device=device, dtype=model.dtype)
            self.cache.update(keys, values, layer)
        self.ids = torch.ones(batch, 1, dtype=torch.int64, device=device)

    @torch.inference_mode()
    def stretch(self, steps: int) -> list[float]:
        """Mean seconds a step over `steps` steps, once for each; the device is waited for at the end."""
        wait(self.device)
        start = time.perf_counter()
        for _ in range(steps):
            out = self.forward(self.ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
            self.ids = out.logits[:, -1].argmax(-1, keepdim=True)
        wait(self.device)
        return [(time.perf_counter() - start) / steps] * steps

    def close(self) -> None:
        del self.cache, self.forward


def decode_cell(
    record: Record, llm: LLM, model: Any, batch: int, prompt: int, total: int, began: float, clocks: Clocks
) -> list[str]:
    options, device = record.options, torch.device(record.options.device)
    vocabulary = llm.built.spec.vocabulary
    makers: dict[str, Callable[[], Ours | Theirs]] = {
        "ridgeline": lambda: Ours(llm, batch, prompt, vocabulary),
        "DynamicCache": lambda: Theirs(model, batch, prompt, total, "dynamic", device),
        "StaticCache": lambda: Theirs(model, batch, prompt, total, "static", device),
    }
    if options.compile:
        makers["compiled"] = lambda: Theirs(model, batch, prompt, total, "static", device, compiled=True)
    arms = {name: make() for name, make in makers.items()}
    for arm in arms.values():
        arm.stretch(options.steps + WARM_STEPS)
    times: dict[str, list[list[float]]] = {name: [] for name in arms}
    for number in range(options.rounds):
        if number and time.perf_counter() - began > options.budget:
            record.note(f"batch {batch}: {number} rounds of {options.rounds}, the time was up")
            break
        for name in list(arms) if number % 2 == 0 else list(reversed(arms)):
            arms[name].stretch(WARM_STEPS)
            clocks.mark(f"batch {batch} {name}")
            times[name].append(arms[name].stretch(options.steps))
    clocks.mark("between")
    for arm in arms.values():
        arm.close()
    arms.clear()
    release(device)
    record.observe(f"batch {batch}")
    steps = {name: [sum(one) / len(one) for one in runs] for name, runs in times.items()}
    best = min(("DynamicCache", "StaticCache"), key=lambda name: interval(steps[name]).median)
    against = ratios(steps[best], steps["ridgeline"])
    rates = {name: interval([batch / one for one in values]) for name, values in steps.items()}
    record.summary[f"batch {batch}"] = {
        "tokens_per_s": rates,
        "seconds_a_step": {name: interval(values) for name, values in steps.items()},
        "better_cache": best,
        "against_transformers": against,
    }
    if "compiled" in steps:
        compiled = ratios(steps["compiled"], steps["ridgeline"])
        record.summary[f"batch {batch}"]["against_compiled"] = compiled
        record.note(
            f"batch {batch}: torch.compile {rates['compiled'].show('.0f')} tok/s, ridgeline {compiled.show(unit='×')}"
        )
    record.timings[f"batch {batch}"] = {
        name: [seconds(one) if name == "ridgeline" else seconds(one[:1]) for one in runs]
        for name, runs in times.items()
    }
    record.target(
        f"Llama-3.1-8B shape, decode at batch {batch}",
        "recorded beside transformers",
        f"{rates['ridgeline'].show('.0f')} tok/s; transformers {rates[best].show('.0f')} ({best})",
        None,
    )
    return [
        str(batch),
        losing(rates["ridgeline"].show(".0f"), against.median < 1),
        interval(steps["ridgeline"]).show(".2f", scale=1e3),
        rates["DynamicCache"].show(".0f"),
        rates["StaticCache"].show(".0f"),
        losing(against.show(unit="×"), against.median < 1),
    ]


# Time to first token


def first_token(record: Record, llm: LLM, model: Any, vocabulary: int, began: float, clocks: Clocks) -> None:
    """One prompt alone: from its ids on the host to its first token on the host."""
    from transformers import DynamicCache

    options, device = record.options, torch.device(record.options.device)
    draw = random.Random(0)
    params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, detokenize=False)

    def ours(number: int) -> float:
        ids = [draw.randrange(vocabulary) for _ in range(options.prefill)]
        start = time.perf_counter()
        _, requests = llm.intake.requests(f"first-{number}", {"prompt_token_ids": ids}, params)
        llm.built.engine.add(requests[0])
        while not llm.built.engine.step():
            pass
        return time.perf_counter() - start

    @torch.inference_mode()
    def theirs(number: int) -> float:
        ids = [draw.randrange(vocabulary) for _ in range(options.prefill)]
        start = time.perf_counter()
        cache = DynamicCache(config=model.config)
        tokens = torch.tensor([ids], device=device)
        out = model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        out.logits[0, -1].argmax().item()
        return time.perf_counter() - start

    times: dict[str, list[float]] = {"ridgeline": [], "transformers": []}
    rounds = 2 * options.rounds
    for number in range(-2, rounds):
        if number > 2 and time.perf_counter() - began > options.budget:
            record.note(f"time to first token: {number} rounds of {rounds}, the time was up")
            break
        for name, run in (("ridgeline", ours), ("transformers", theirs))[:: 1 if number % 2 else -1]:
            clocks.mark(f"first token {name}")
            took = run(number)
            if number >= 0:
                times[name].append(took)
    clocks.mark("end")
    against = ratios(times["transformers"], times["ridgeline"])
    record.timings["first token"] = {name: seconds(values) for name, values in times.items()}
    record.summary["first token"] = {
        "prompt_tokens": options.prefill,
        "seconds": {name: interval(values) for name, values in times.items()},
        "against_transformers": against,
    }
    shown = {name: interval(values).show(".1f", " ms", 1e3) for name, values in times.items()}
    record.table(
        f"Time to first token, {options.prefill} tokens, {options.device}",
        ["ridgeline", "transformers", "transformers ÷ ridgeline"],
        [[shown["ridgeline"], shown["transformers"], losing(against.show(unit="×"), against.median < 1)]],
    )
    record.target(
        f"Llama-3.1-8B shape, time to first token of {options.prefill} tokens",
        "recorded beside transformers",
        f"{shown['ridgeline']}; transformers {shown['transformers']}",
        None,
    )


# The other side


def reference(folder: Path, llm: LLM, device: torch.device) -> Any:
    """Transformers' model on ridgeline's own parameters; with random ones of its own if those are repacked."""
    import transformers

    transformers.logging.set_verbosity_error()
    config = transformers.AutoConfig.from_pretrained(folder)
    places = dict(llm.built.runner.model.store.places)
    shared = all(place.device.type == device.type and place.dtype == torch.bfloat16 for place in places.values())
    with torch.device("meta" if shared else device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    if shared:
        if config.tie_word_embeddings:
            places["lm_head.weight"] = places["model.embed_tokens.weight"]
        model.load_state_dict(places, strict=True, assign=True)
        model.model.rotary_emb = type(model.model.rotary_emb)(config=config).to(device)
    else:
        print("note: ridgeline's weights are repacked; Transformers has random weights of its own")
    return model.eval()


@torch.inference_mode()
def agreement(llm: LLM, model: Any, vocabulary: int, device: torch.device, new: int = 16) -> float:
    """Share of greedy tokens, over the first 16 after a random prompt, that both sides choose (bf16: below 1)."""
    from transformers import DynamicCache

    draw = random.Random(1)
    prompt = [draw.randrange(vocabulary) for _ in range(32)]
    params = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
    own = llm.generate({"prompt_token_ids": prompt}, params, use_tqdm=False)[0].outputs[0].token_ids
    cache, ids = DynamicCache(config=model.config), torch.tensor([prompt], device=device)
    theirs = []
    for _ in range(new):
        logits = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        ids = logits[:, -1].argmax(-1, keepdim=True)
        theirs.append(int(ids))
    return sum(a == b for a, b in zip(own, theirs)) / new


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


class Clocks:
    """Samples a GPU's clocks, power and temperature four times a second, with what ran at the time."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.marks: list[tuple[float, str]] = []
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Clocks:
        self._began = time.time()
        self._output = tempfile.TemporaryFile("w+")
        if self.device.type == "cuda":
            query = f"--query-gpu=timestamp,{GPU_FIELDS}"
            command = ["nvidia-smi", f"--id={self.device.index or 0}", query, "--format=csv,noheader", "-lms", "250"]
            try:
                self._process = subprocess.Popen(command, stdout=self._output, stderr=subprocess.DEVNULL, text=True)
            except OSError:
                self._process = None
        return self

    def mark(self, what: str) -> None:
        self.marks.append((round(time.time() - self._began, 3), what))

    def samples(self) -> dict[str, Any]:
        """Lines of nvidia-smi as they came, and when what began (seconds after the start)."""
        self._output.seek(0)
        lines = [line.strip() for line in self._output.read().splitlines()]
        return {
            "began": time.strftime("%Y/%m/%d %H:%M:%S", time.localtime(self._began)),
            "marks": self.marks,
            "lines": lines,
        }

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait()
        self._output.close()


if __name__ == "__main__":
    main()
