"""Turns configuration into objects. The only place that does.

Knows every part's constructor, and decides each "auto" with its reason. It must not run anything beyond
the one step that measures activations on a GPU.
"""

from __future__ import annotations

import gc
import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch

from ridgeline.core.clock import WallClock
from ridgeline.core.config import EngineConfig, MemoryLedger, Resolved
from ridgeline.core.errors import CheckpointError, DoesNotFit, InvalidArgument, KernelRefused, UnsupportedModel
from ridgeline.core.request import Request, SamplingParams
from ridgeline.core.speculation import Speculation
from ridgeline.core.step import Chunk, Sampling, Spans, StepPlan
from ridgeline.core.tree import MOST_NODES, TokenTree
from ridgeline.engine.engine import Engine
from ridgeline.engine.memory import (
    CPU_POOL_LIMIT_BYTES,
    CPU_POOL_SHARE,
    LIBRARY_BYTES,
    LiveBytes,
    device_memory_bytes,
    ledger_rows,
    reference_bytes,
    return_freed_memory,
    size,
)
from ridgeline.engine.torch_executor import TorchExecutor
from ridgeline.kernels.select import CLASSES_OF_WORK, Table, select
from ridgeline.kv.cache import KVCache
from ridgeline.kv.layout import KVLayout
from ridgeline.kv.pages import Pages
from ridgeline.models import Decoder, ModelSpec, build_model, parse_config
from ridgeline.models.checkpoint import embedded_model, locate
from ridgeline.models.spec import read_config
from ridgeline.models.weights import Store, load_checkpoint
from ridgeline.ops import Ops
from ridgeline.ops.attention_call import WORD_BITS
from ridgeline.perf.price import Price
from ridgeline.run.beams import Beams
from ridgeline.run.graphs import DecodeGraphs, PassGraphs, pass_sizes_up_to, sizes_up_to
from ridgeline.run.places import PassSize
from ridgeline.run.prompts import PromptGraphs, prompt_sizes_up_to
from ridgeline.run.runner import SCORED_ROWS, Runner
from ridgeline.schedule import Scheduler, make_policy
from ridgeline.schedule.policies import POLICIES
from ridgeline.speculate.acceptance import EDGES
from ridgeline.speculate.draft_model import DraftModel, Growth
from ridgeline.speculate.seconds import Seconds
from ridgeline.speculate.speculator import WIDTH, Speculator

DEFAULT_BATCHED_TOKENS = {"cpu": 512, "cuda": 8192}
WAITING_KERNELS = ("reference", "standard", "blocked", "fused")
"""Kernels that look at values on the host, so that no graph can hold them."""
GRAPH_BYTES = 2 << 20
"""The least that a captured size is taken to hold beside what all share: the driver's unit of memory."""


@dataclass
class Built:
    """An engine with everything that its owner may want to look at.

    directory: where the checkpoint lies. price: costs of its steps. table: which kernel serves which op.
    """

    engine: Engine
    config: Resolved
    ledger: MemoryLedger
    spec: ModelSpec
    directory: Path
    table: Table
    price: Price
    runner: Runner
    speculator: Speculator | None = None
    tokenizer_directory: Path | None = None

    @contextmanager
    def plain(self) -> Iterator[None]:
        """Steps without speculation, to compare with. No request may be under way at either end."""
        kept, self.engine.speculator = self.engine.speculator, None
        try:
            yield
        finally:
            self.engine.speculator = kept

    def lines(self) -> list[str]:
        """What was decided and why, and the memory ledger: for a log."""
        names = [one.name for one in fields(self.config) if one.name != "reasons"]
        reasons = self.config.reasons
        settings = (
            f"{name}={getattr(self.config, name)}" + (f" ({reasons[name]})" if name in reasons else "")
            for name in names
        )
        memory = (
            f"{what} {size(amount)}" + (f" ({remark})" if remark else "")
            for what, amount, remark in ledger_rows(self.ledger, self.config)
        )
        return [f"{self.directory}: " + ", ".join(settings), "memory: " + ", ".join(memory)]

    def close(self) -> None:
        """Give back all memory, if nobody holds on to a part."""
        on_gpu = self.config.device.startswith("cuda")
        self.engine.close()
        self.engine.speculator = self.speculator = None
        del self.runner
        if on_gpu:
            torch.cuda.empty_cache()


def build(
    config: EngineConfig,
    progress: Callable[[int, int], None] | None = None,
    compiling: Callable[[str], None] | None = None,
    capturing: Callable[[int, int], None] | None = None,
) -> Built:
    """Locate, parse, choose kernels, load, size the KV pool, assemble, run each class of work once, capture.

    progress(done, total) counts the checkpoint's tensors; compiling(name) hears of each CPU kernel that
    is compiled because this machine has not run it before; capturing(done, total) counts sizes of steps and passes
    captured as CUDA graphs. Raises the errors of core.errors.
    """
    directory = locate(config.model, config.revision)
    spec = parse_config(read_config(directory), str(directory))
    resolved = _resolve(config, spec)
    device, dtype = torch.device(resolved.device), getattr(torch, resolved.dtype)
    speculation = config.speculation
    works = CLASSES_OF_WORK if speculation is None else (*CLASSES_OF_WORK, "tree")
    price, table = _price_and_table(config, spec, resolved, works)
    plans = [] if speculation is None else _draft_plans(config, speculation, resolved, directory, spec, works)
    resolved = _captured_or_eager(resolved, table)
    model = _load(config, spec, resolved, directory, _packs(config, resolved), progress)
    layout = KVLayout(spec.layers, spec.kv_heads, spec.head_dim, dtype.itemsize, resolved.block_size)
    drafters = [_load(config, plan.spec, resolved, plan.directory, _packs(config, resolved), None) for plan in plans]
    draft_layouts = [
        KVLayout(one.layers, one.kv_heads, one.head_dim, dtype.itemsize, resolved.block_size)
        for one in (plan.spec for plan in plans)
    ]
    ledger = _ledger(config, resolved, model, layout, price, table, drafters, draft_layouts, plans)
    blocks = ledger.kv_tokens // resolved.block_size
    reasons = {**resolved.reasons, "num_blocks": f"what {size(ledger.kv_bytes)} hold"}
    resolved = replace(resolved, num_blocks=blocks, reasons=reasons)
    pages = Pages(layout, blocks, device, dtype)
    if device.type == "cpu":
        _spare_page_faults(pages)
    runner = Runner(model, pages, table, device, resolved.block_size)
    speculator = None
    models: list[DraftModel] = []
    with _watched(table, compiling):
        _warm_up(runner)
        if speculation is not None:
            models = [
                DraftModel(
                    drafter,
                    Pages(draft_layout, blocks, device, dtype),
                    plan.table,
                    device,
                    resolved.block_size,
                    resolved.max_num_batched_tokens,
                )
                for plan, drafter, draft_layout in zip(plans, drafters, draft_layouts)
            ]
    if not resolved.enforce_eager:
        runner.graphs = _decode_graphs(resolved, model, pages, table)
        if _captures_prompts(resolved):
            runner.prompts = _prompt_graphs(resolved, model, pages, table, runner.graphs.sampled)
        if speculation is not None:
            runner.passes = _pass_graphs(resolved, model, pages, table)
            for one in models:
                one.graphs = _pass_graphs(resolved, one.model, one.pages, one.table, children=WIDTH)
                one.beams = _beams(resolved, one.model, one.pages, one.table, one.graphs)
        drafts = [graphs for one in models for graphs in (one.graphs, one.beams) if graphs is not None]
        own = [graphs for graphs in (runner.graphs, runner.prompts, runner.passes) if graphs is not None]
        _capture([*own, *drafts], capturing)
    if speculation is not None:
        with _watched(table, compiling):
            speculator = _speculator(speculation, models, runner, resolved)
    cache = KVCache(
        block_size=resolved.block_size, num_blocks=blocks, enable_prefix_caching=resolved.enable_prefix_caching
    )
    scheduler = Scheduler(
        cache,
        make_policy(resolved.scheduling_policy),
        max_num_seqs=resolved.max_num_seqs,
        max_num_batched_tokens=resolved.max_num_batched_tokens,
        max_model_len=resolved.max_model_len,
        enable_chunked_prefill=resolved.enable_chunked_prefill,
        kv_cache=resolved.kv_cache,
    )
    executor = TorchExecutor(runner)
    engine = Engine(scheduler, executor, WallClock(), overlap=resolved.async_scheduling, speculator=speculator)
    return Built(engine, resolved, ledger, spec, directory, table, price, runner, speculator)


@dataclass
class _DraftPlan:
    """A draft model that has been read about, not loaded."""

    directory: Path
    spec: ModelSpec
    table: Table


def _draft_plans(
    config: EngineConfig,
    speculation: Speculation,
    resolved: Resolved,
    directory: Path,
    target: ModelSpec,
    works: Sequence[str],
) -> list[_DraftPlan]:
    """Draft models that suit the target. Raises InvalidArgument for one that does not, before anything is loaded."""
    window = min((one for one in target.windows if one is not None), default=None)
    most = -(-speculation.most_nodes // WORD_BITS) * WORD_BITS
    if window is not None and window < most:
        raise InvalidArgument(
            "speculative_config",
            f"trees of up to {speculation.most_nodes} nodes need an attention window of {most} tokens, {directory} "
            f"has {window}: set num_speculative_tokens to at most {window // WORD_BITS * WORD_BITS}",
        )
    names: Sequence[str | Path] = speculation.checkpoints
    if speculation.method == "ngram":
        return []
    if not names:
        if directory != embedded_model():
            raise InvalidArgument(
                "speculative_config", f"model: name a draft model for {directory}; only the embedded one brings its own"
            )
        names = [embedded_model("ssm")]
    plans = []
    for name in names:
        place = locate(str(name))
        spec = parse_config(read_config(place), str(place))
        words = _same_words(directory, place)
        padded = words is True and spec.vocabulary < target.vocabulary
        if words is False or (spec.vocabulary != target.vocabulary and not padded):
            raise InvalidArgument(
                "speculative_config",
                f"model: {place} has another vocabulary ({spec.vocabulary} tokens) than {directory} "
                f"({target.vocabulary}); a draft model must share the target's tokenizer",
            )
        if spec.max_positions < resolved.max_model_len:
            raise InvalidArgument(
                "speculative_config",
                f"model: {place} knows {spec.max_positions} positions, fewer than max_model_len "
                f"{resolved.max_model_len}; lower max_model_len or take another",
            )
        short = min((one for one in spec.windows if one is not None), default=most)
        if short < most:
            raise InvalidArgument(
                "speculative_config", f"model: {place} has an attention window of {short}, its trees need {most} tokens"
            )
        table = _price_and_table(config, spec, resolved, works, drafts=True)[1]
        plans.append(_DraftPlan(place, spec, table))
    return plans


def _same_words(one: Path, other: Path) -> bool | None:
    """Whether two checkpoints' tokenizers give the same ids; None if their files do not tell."""
    words = []
    for directory in (one, other):
        file = (directory if directory.is_dir() else directory.parent) / "tokenizer.json"
        if not file.is_file():
            return None
        words.append(json.loads(file.read_text(encoding="utf-8")).get("model", {}).get("vocab"))
    return bool(words[0] == words[1])


def _speculator(
    speculation: Speculation, models: Sequence[DraftModel], runner: Runner, resolved: Resolved
) -> Speculator:
    """Warm the draft models and tree steps up, and time a few of both on blocks that nobody owns yet."""
    size = resolved.block_size
    room = min(resolved.max_model_len, resolved.num_blocks * size)
    blocks = list(range(min(resolved.num_blocks, -(-room // size))))
    start = min(32, room // 2)
    params = SamplingParams(temperature=0.0)

    def sampling(position: int) -> Sampling:
        return Sampling(params, 0, position, [0], 1)

    def step(requests: int, nodes: int) -> Callable[[], None]:
        tree = TokenTree.chain(range(1, nodes + 1)) if nodes else None
        behind = [sampling(start + 2 + node) for node in range(nodes)]
        chunks = [
            Chunk(f"price/{i}", [0], start, blocks, sampling(start + 1), tree=tree, behind=behind)
            for i in range(requests)
        ]

        def work() -> None:
            with suppress(CheckpointError):
                runner.run(StepPlan(0, tuple(chunks)))

        return work

    def draft(requests: int, levels: int = 0) -> Callable[[], None]:
        """One pass; or all of some levels on the device."""
        width = 1 if speculation.method == "draft_model" else WIDTH
        several = [Request(f"price/{i}", [0] * (start + 1), 1, params, 1) for i in range(requests)]

        def work() -> None:
            for model in models:
                growths = [Growth(one, blocks, 1) for one in several]
                for one in several:
                    model.caught_up(one, blocks)
                if levels:
                    model.levels(growths, (width,) * levels, [[0.5] * (len(EDGES) + 1)] * WIDTH)
                else:
                    model.propose(growths, width)
                for one in several:
                    model.forget(one.request_id)

        return work

    most_rows = max(TREE_ROWS, resolved.max_num_seqs)
    most = min(MOST_NODES, room - start - 1, resolved.max_num_batched_tokens - 1, TREE_ROWS - 1)
    sizes = sorted({one.rows for one in runner.passes.sizes}) if runner.passes is not None else []
    points = {}
    for wanted in sizes or PRICED_ROWS:
        # Large steps are those of several requests: one tree of so many rows would take longer.
        requests = min(resolved.max_num_seqs, 1 if wanted <= ALONE else -(-wanted // EACH))
        nodes = wanted // requests - 1
        if 0 < nodes <= most and wanted <= min(resolved.max_num_batched_tokens, most_rows):
            points[wanted if sizes else requests * (1 + nodes)] = requests, nodes
    counts = [count for count in PRICED_REQUESTS if count <= resolved.max_num_seqs]
    seconds = {wanted: _best_s(runner.device, step(*one)) for wanted, one in (points or {2: (1, 1)}).items()}
    plain = {count: _best_s(runner.device, step(count, 0)) for count in counts}
    drafts = {1: 0.0}
    if models:
        rows = [count for count in PRICED_REQUESTS if count <= max(resolved.max_num_seqs, SOME_NODES)]
        drafts = {count: _best_s(runner.device, draft(count)) for count in rows}
    deep = None
    beams = [model.beams for model in models]
    if beams and all(one is not None and start + 1 + one.slots(1, PRICED_LEVELS) <= room for one in beams):
        ones, several = (
            {count: _best_s(runner.device, draft(count, depth)) for count in counts} for depth in (1, PRICED_LEVELS)
        )
        drafts = {**drafts, **ones}
        deep = Seconds({count: (several[count] - ones[count]) / (PRICED_LEVELS - 1) for count in counts})
    prices = Seconds(seconds, sizes), Seconds(plain), Seconds(drafts)
    return Speculator(speculation, models, *prices, most_rows, level_seconds=deep)


PRICED_ROWS = (2, 3, 4, 5, 7, 9, 13, 17, 25, 33, 64, 128, 256, 512)
"""Of a step with trees, where steps have no sizes of their own."""
ALONE, EACH = 64, 16
"""Up to so many rows are one request's when they are priced; beyond that, so many are each request's."""
PRICED_REQUESTS = (1, 4, 8, 16, 32, 64, 128, 256)
PRICED_LEVELS = 5
SOME_NODES = 16
"""Rows of a drafting pass that are priced even for few requests: a pass computes several nodes of each."""
TREE_ROWS = 512
"""Rows of logits in a step with trees: known tokens and nodes of all requests."""


def _best_s(device: torch.device, work: Callable[[], None], repeats: int = 4) -> float:
    """The shortest of a few runs, the first not counted."""
    best = float("inf")
    for number in range(repeats):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        begin = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if number:
            best = min(best, time.perf_counter() - begin)
    return best


def _captured_or_eager(resolved: Resolved, table: Table) -> Resolved:
    """Whether decode steps can be captured, with the reason if not."""
    if resolved.enforce_eager:
        return resolved
    waiting = sorted({f"{row.kernel} ({row.op})" for row in table.rows if row.kernel in WAITING_KERNELS})
    if not waiting:
        return resolved
    reason = f"{', '.join(waiting)} would wait for the device in the middle of a step"
    return replace(resolved, enforce_eager=True, reasons={**resolved.reasons, "enforce_eager": reason})


def _decode_graphs(
    resolved: Resolved, model: Decoder, pages: Pages, table: Table, sizes: Sequence[int] | None = None
) -> DecodeGraphs:
    """Not captured yet. sizes: other than all that steps may have."""
    most = min(resolved.max_num_seqs, resolved.max_num_batched_tokens)
    return DecodeGraphs(
        model,
        pages,
        table.ops("decode"),
        torch.device(resolved.device),
        resolved.block_size,
        sizes or sizes_up_to(most),
        -(-resolved.max_model_len // resolved.block_size),
    )


def _captures_prompts(resolved: Resolved) -> bool:
    """Batch-invariant attention of many tokens works in memory by the capacity of block tables, which at fixed places
    is that of the longest sequence: gigabytes. Its steps run op by op, to the same bits."""
    return not resolved.enforce_eager and not resolved.batch_invariant and bool(_prompt_sizes(resolved))


def _prompt_graphs(
    resolved: Resolved,
    model: Decoder,
    pages: Pages,
    table: Table,
    sampled: torch.Tensor,
    sizes: Sequence[PassSize] | None = None,
) -> PromptGraphs:
    """Not captured yet. sampled: where decode steps leave their tokens."""
    return PromptGraphs(
        model,
        pages,
        table.ops("mixed"),
        torch.device(resolved.device),
        resolved.block_size,
        sizes or _prompt_sizes(resolved),
        -(-resolved.max_model_len // resolved.block_size),
        sampled,
    )


def _prompt_sizes(resolved: Resolved) -> tuple[PassSize, ...]:
    return prompt_sizes_up_to(resolved.max_num_seqs, resolved.max_num_batched_tokens)


def _pass_sizes(resolved: Resolved) -> tuple[PassSize, ...]:
    return pass_sizes_up_to(resolved.max_num_seqs, min(TREE_ROWS, resolved.max_num_batched_tokens))


def _pass_graphs(
    resolved: Resolved,
    model: Decoder,
    pages: Pages,
    table: Table,
    children: int | None = None,
    sizes: Sequence[PassSize] | None = None,
) -> PassGraphs:
    """Of a target, or of a draft model that proposes so many children. Not captured yet."""
    return PassGraphs(
        model,
        pages,
        table.ops("tree"),
        torch.device(resolved.device),
        resolved.block_size,
        sizes or _pass_sizes(resolved),
        -(-resolved.max_model_len // resolved.block_size),
        children,
    )


def _beams(resolved: Resolved, model: Decoder, pages: Pages, table: Table, passes: PassGraphs) -> Beams | None:
    """Of a draft model, behind what `passes` propose. Not captured yet. None if its trees have no room in a window."""
    if not passes.sizes or passes.most_nodes < MOST_NODES:
        return None
    return Beams(
        model,
        pages,
        table.ops("tree"),
        torch.device(resolved.device),
        resolved.block_size,
        resolved.max_num_seqs,
        -(-resolved.max_model_len // resolved.block_size),
        passes.proposed,
        passes.chances,
        EDGES,
    )


Graphs = DecodeGraphs | PromptGraphs | PassGraphs | Beams


def _capture(several: Sequence[Graphs], capturing: Callable[[int, int], None] | None) -> None:
    """One after the other, counted together."""
    total, before = sum(len(one.sizes) for one in several), 0
    for one in several:

        def told(done: int, _: int, before: int = before) -> None:
            if capturing is not None:
                capturing(before + done, total)

        one.capture(told)
        before += len(one.sizes)


def _spare_page_faults(pages: Pages) -> None:
    """Let the pool's memory come in 2 MiB pages: with small ones, first touching a block costs more than using it."""
    from ridgeline.kernels.cpu.pack import on_huge_pages

    for page in (*pages.keys, *pages.values):
        on_huge_pages(page)


@contextmanager
def _watched(table: Table, compiling: Callable[[str], None] | None) -> Iterator[None]:
    """Report the CPU kernels that are compiled within the block."""
    if compiling is None or not any(row.kernel == "cpu" for row in table.rows):
        yield
        return
    from ridgeline.kernels.cpu import native

    native.watchers.append(compiling)
    try:
        yield
    finally:
        native.watchers.remove(compiling)


def _warm_up(runner: Runner) -> None:
    """Run a small step of each class of work on block 0, which nobody owns yet.

    Kernels compile here, once on a machine, and not under the first request. What the steps make of
    token 0 does not matter, NaN included.
    """

    def chunk(tokens: int, start: int, temperature: float) -> Chunk:
        sampling = Sampling(SamplingParams(temperature=temperature), 0, start + tokens, [0], 1)
        return Chunk(f"warm-up/{tokens}", [0] * tokens, start, [0], sampling)

    for chunks in ((chunk(2, 0, 1.0),), (chunk(1, 2, 0.0),), (chunk(1, 2, 0.0), chunk(2, 0, 1.0))):
        with suppress(CheckpointError):
            runner.run(StepPlan(0, chunks))


def choose_kernels(config: EngineConfig) -> Table:
    """The table of kernels that an engine of this configuration would use; loads no weights."""
    directory = locate(config.model, config.revision)
    spec = parse_config(read_config(directory), str(directory))
    return _price_and_table(config, spec, _resolve(config, spec))[1]


def _packs(config: EngineConfig, resolved: Resolved) -> bool:
    """Whether matrices are repacked for the CPU kernels."""
    return resolved.device == "cpu" and config.kernels in ("auto", "cpu") and resolved.dtype != "float16"


def _price_and_table(
    config: EngineConfig,
    spec: ModelSpec,
    resolved: Resolved,
    works: Sequence[str] = CLASSES_OF_WORK,
    drafts: bool = False,
) -> tuple[Price, Table]:
    """From the forward pass on meta tensors: what steps cost, and which kernels serve them. drafts: those of a
    draft model."""
    dtype = getattr(torch, resolved.dtype)
    shadow = build_model(spec, torch.device("meta"), dtype, resolved.max_model_len)
    if _packs(config, resolved):
        pack(shadow.store)
    price = Price(shadow, resolved.block_size, dtype)
    try:
        table = select(
            torch.device(resolved.device),
            lambda work, ops: _trace(price, work, resolved, ops, drafts),
            config.kernels,
            config.rungs,
            works,
            invariant=config.batch_invariant,
        )
    except KernelRefused as refusal:
        if config.batch_invariant:
            raise InvalidArgument("batch_invariant", f"cannot be had with these settings: {refusal}") from refusal
        raise
    return price, table


def _resolve(config: EngineConfig, spec: ModelSpec) -> Resolved:
    reasons: dict[str, str] = {}
    if config.scheduling_policy not in POLICIES:
        raise InvalidArgument(
            "scheduling_policy", f"must be one of {', '.join(POLICIES)}, not {config.scheduling_policy!r}"
        )
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
        reasons["device"] = "a CUDA device is there" if device == "cuda" else "no CUDA device is there"
    if device.startswith("cuda"):
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        index = int(device.partition(":")[2] or 0)
        if index >= count:
            raise InvalidArgument("device", f"{device} is not there: this machine has {count} CUDA devices")
    kind = device.partition(":")[0]
    dtype = config.dtype
    if dtype == "auto":
        dtype, reasons["dtype"] = _auto_dtype(spec, kind)
    longest = spec.max_positions
    if spec.rope is not None and spec.rope.kind in ("linear", "dynamic", "yarn"):
        longest = max(longest, int(spec.rope.original_positions * spec.rope.factor))
    length = config.max_model_len
    if length is None:
        length, reasons["max_model_len"] = spec.max_positions, "the model's own"
    elif length > longest:
        raise InvalidArgument("max_model_len", f"{length} is beyond the {longest} positions that the model knows")
    batched = config.max_num_batched_tokens
    if batched is None:
        batched = max(DEFAULT_BATCHED_TOKENS[kind], config.max_num_seqs)
        reasons["max_num_batched_tokens"] = f"default on {kind}"
        if not config.enable_chunked_prefill and batched < length:
            batched, reasons["max_num_batched_tokens"] = length, "a whole prompt must fit without chunked prefill"
    eager, overlap = config.enforce_eager, config.async_scheduling
    if not eager and kind == "cpu":
        eager, reasons["enforce_eager"] = True, "a CPU has no graphs"
    if overlap is None:
        overlap = kind == "cuda" and config.kv_cache
        reasons["async_scheduling"] = "the host works while the device does" if overlap else f"off on {device}"
        if overlap and config.speculation is not None:
            reasons["async_scheduling"] = "while nothing is drafted: a draft follows the token before it, once read"
    caching = config.enable_prefix_caching
    if caching is None:
        caching = config.kv_cache
        reasons["enable_prefix_caching"] = "on by default" if caching else "off without a KV cache"
    seed = config.seed
    if seed is None:
        seed, reasons["seed"] = random.SystemRandom().getrandbits(62), "drawn from the system"
    return Resolved(
        device=device,
        dtype=dtype,
        max_model_len=length,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=batched,
        block_size=config.block_size,
        num_blocks=0,
        enable_prefix_caching=caching,
        enable_chunked_prefill=config.enable_chunked_prefill,
        kv_cache=config.kv_cache,
        enforce_eager=eager,
        async_scheduling=overlap,
        scheduling_policy=config.scheduling_policy,
        seed=seed,
        max_logprobs=config.max_logprobs,
        batch_invariant=config.batch_invariant,
        reasons=reasons,
    )


def _auto_dtype(spec: ModelSpec, kind: str) -> tuple[str, str]:
    """The checkpoint's dtype on a GPU; fp32 on a CPU where results are exact and batch-invariant, if it fits."""
    if kind == "cuda":
        return spec.dtype, "the checkpoint's"
    shadow = build_model(spec, torch.device("meta"), torch.float32, 1)
    _, available = device_memory_bytes(torch.device("cpu"))
    if shadow.store.nbytes < available // 4:
        return "float32", "exact on a CPU, and it fits in a quarter of the free memory"
    return spec.dtype, "the checkpoint's: fp32 would take more than a quarter of the free memory"


def pack(store: Store) -> None:
    """Repack every matrix for the CPU kernels, in place, one after the other (so the peak is one copy)."""
    from ridgeline.kernels.cpu.pack import pack as pack_matrix

    store.release_places()
    for weight in store.matrices:
        packed = weight.to_panels() if store.device.type == "meta" else pack_matrix(weight)
        weight.data, weight.format = packed.data, packed.format


def _load(
    config: EngineConfig,
    spec: ModelSpec,
    resolved: Resolved,
    directory: Path,
    packed: bool,
    progress: Callable[[int, int], None] | None,
) -> Decoder:
    device, dtype = torch.device(resolved.device), getattr(torch, resolved.dtype)
    needed = build_model(spec, torch.device("meta"), dtype, 1).store.nbytes
    _, available = device_memory_bytes(device)
    if needed > available:
        raise DoesNotFit(
            f"{directory}: the weights take {needed / 1e9:.1f} GB in {resolved.dtype}, {resolved.device} has "
            f"{available / 1e9:.1f} GB free; use a smaller model or dtype"
        )
    model = build_model(spec, device, dtype, resolved.max_model_len)
    if config.load_format == "dummy":
        model.store.fill_random(resolved.seed % (1 << 31))
    elif directory.is_file():
        raise UnsupportedModel(f"{directory} is a bare config without weights; load_format='dummy' makes random ones")
    else:
        load_checkpoint(model.store, directory, progress)
    if packed:
        pack(model.store)
        return_freed_memory()
    return model


def _trace(price: Price, work: str, resolved: Resolved, ops: Ops, drafts: bool = False) -> None:
    """One step of a class of work on meta tensors, with all that a step may do, for the choice of kernels."""
    length = min(8, resolved.max_model_len)
    new = {"decode": (1, 1), "prefill": (length, length), "mixed": (1, length), "tree": (1, length)}[work]
    visible = (length, length)
    trees = ((), tuple(range(1, length))) if work == "tree" else ()
    for greedy in (True, False):
        price.trace(Spans(new, visible, trees), len(new), greedy, ops, work)

    def empty(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    rows = len(new)
    logits = empty(rows, price.model.spec.vocabulary, dtype=getattr(torch, resolved.dtype))
    floats, longs = empty(rows, dtype=torch.float32), empty(rows)
    ops.feed(longs, longs, longs, price.model.spec.vocabulary)
    ops.adjust(logits, longs, longs, floats, floats, floats, floats, floats, longs, longs, floats)
    ops.restrict(logits, empty(rows, -(-price.model.spec.vocabulary // 32), dtype=torch.int32))
    ops.score(logits, longs, 1)
    ops.kv_move(price.pages, empty(1), empty(1))
    if work == "tree":
        ops.kv_compact(price.pages, empty(1), empty(1))
        if not resolved.enforce_eager:  # what captured steps do by themselves
            narrow = (
                empty(rows, 1, dtype=torch.int32),
                empty(rows + 1, dtype=torch.int32),
                empty(rows, dtype=torch.int32),
            )
            ops.kv_compact(price.pages, *ops.accept(longs, longs, longs, longs, longs, *narrow, length))
    if drafts:
        ops.propose(logits, floats, longs, longs, False, 1)
    if drafts and work == "tree" and not resolved.enforce_eager:
        ints, wide = empty(rows, dtype=torch.int32), empty(rows, 1, dtype=torch.int32)
        record, edges = empty(1, rows, 1, 3, dtype=torch.int32), floats[:1]
        ops.branch(
            empty(rows, 1), floats[:, None], floats[:, None], wide, longs, longs, longs, longs, ints, ints, record,
            ints, ints, wide, floats[None, :], edges, ints, resolved.block_size,
        )  # fmt: skip


def _ledger(
    config: EngineConfig,
    resolved: Resolved,
    model: Decoder,
    layout: KVLayout,
    price: Price,
    table: Table,
    drafters: Sequence[Decoder] = (),
    draft_layouts: Sequence[KVLayout] = (),
    plans: Sequence[_DraftPlan] = (),
) -> MemoryLedger:
    """Sizes of everything, before any of it is needed. DoesNotFit if one request of full length cannot run.

    A block of the pool is one of the target's and one of each draft model's.
    """
    device = torch.device(resolved.device)
    rows = min(resolved.max_num_seqs, resolved.max_num_batched_tokens)
    if config.speculation is not None:
        rows = min(max(rows, TREE_ROWS), resolved.max_num_batched_tokens)
    activations, graphs = _activation_bytes(resolved, model.spec, price, table, rows), 0
    if device.type == "cuda":
        activations = max(activations, _measured_activations(resolved, model, layout, table, device))
        graphs = 0 if resolved.enforce_eager else _measured_graphs(resolved, model, layout, table, device)
        if _captures_prompts(resolved):
            graphs += _measured_prompts(resolved, model, layout, table, device)
        if config.speculation is not None and not resolved.enforce_eager:
            graphs += _measured_passes(resolved, model, layout, table, device)
            for drafter, own, plan in zip(drafters, draft_layouts, plans):
                graphs += _measured_passes(resolved, drafter, own, plan.table, device, WIDTH)
        gc.collect()
        torch.cuda.empty_cache()
    total, available = device_memory_bytes(device)
    weights = model.store.nbytes + sum(one.store.nbytes for one in drafters)
    block_bytes = layout.bytes_per_block + sum(one.bytes_per_block for one in draft_layouts)
    rest = max(total - available - weights, 0) + (LIBRARY_BYTES if device.type == "cuda" else 0)
    usable = int(total * config.gpu_memory_utilization) if device.type == "cuda" else total
    one = layout.blocks_for(resolved.max_model_len) * block_bytes
    most = usable - rest - weights - activations - graphs
    room = most
    if config.kv_cache_memory_bytes is not None:
        most = total - rest - weights - activations - graphs
        room = config.kv_cache_memory_bytes
        usable = max(usable, min(total, rest + weights + activations + graphs + room))
    elif device.type == "cpu":
        room = min(max(int(available * CPU_POOL_SHARE), one), max(CPU_POOL_LIMIT_BYTES, one), most)
        room = min(room, one * resolved.max_num_seqs)
    if room > most or room < one:
        raise DoesNotFit(
            f"the KV pool would have {size(max(room, 0))}: one request of max_model_len {resolved.max_model_len} "
            f"needs {size(one)}, and beside weights ({size(weights)}), activations "
            f"({size(activations)}){f', CUDA graphs ({size(graphs)})' if graphs else ''} and what others hold "
            f"({size(rest)}) {resolved.device} has room for {size(max(most, 0))}; lower max_model_len "
            "or max_num_batched_tokens, or change kv_cache_memory_bytes or gpu_memory_utilization"
        )
    blocks = room // block_bytes
    return MemoryLedger(
        total_bytes=total,
        usable_bytes=usable,
        weight_bytes=weights,
        kv_bytes=blocks * block_bytes,
        activation_bytes=activations,
        rest_bytes=rest,
        kv_tokens=blocks * layout.block_size,
        bytes_per_token=block_bytes // layout.block_size,
        block_size=layout.block_size,
        graph_bytes=graphs,
    )


def _activation_bytes(resolved: Resolved, spec: ModelSpec, price: Price, table: Table, rows: int) -> int:
    """Peak of live op outputs in the largest steps: a full prefill chunk, a full batch of `rows` sampled with
    penalties, and prompt tokens scored."""
    tokens, length = resolved.max_num_batched_tokens, resolved.max_model_len
    new = min(tokens, length)
    peaks = []
    for spans, sampled, more_bytes in (
        (Spans((new,) * (tokens // new), (length,) * (tokens // new)), min(SCORED_ROWS, tokens), 4 + 1 + 8),
        (Spans((1,) * rows, (length,) * rows), rows, 4),
    ):
        live = LiveBytes()
        price.trace(spans, sampled, False, Ops({}, live))
        # For each logit beside it: its logarithm, a comparison and its count in 64 bits; or its adjusted value.
        peaks.append(live.peak_bytes + more_bytes * sampled * spec.vocabulary)
    return max(peaks) + reference_bytes(table, spec, new, rows, length)


def _measured_activations(
    resolved: Resolved, model: Decoder, layout: KVLayout, table: Table, device: torch.device
) -> int:
    """Run the largest steps once over a few scratch blocks and read the allocator's peak.

    A batch-invariant step's workspace grows with the length of its longest request, so those are of full length.
    """
    length = min(resolved.max_num_batched_tokens, resolved.max_model_len)
    blocks = layout.blocks_for(length)
    table_of = [block % blocks for block in range(layout.blocks_for(resolved.max_model_len))]
    pages = Pages(layout, blocks, device, model.store.dtype)
    runner = Runner(model, pages, table, device, layout.block_size)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    rows = min(resolved.max_num_seqs, resolved.max_num_batched_tokens)
    steps = [[length] * max(resolved.max_num_batched_tokens // length, 1), [1] * rows]
    if resolved.batch_invariant:
        steps.append([min(resolved.max_num_batched_tokens - rows + 1, length)] + [1] * (rows - 1))
    for step in steps:
        chunks = []
        for name, tokens in enumerate(step):
            sampling = Sampling(SamplingParams(temperature=1.0, top_p=0.9), 0, tokens, [0] * tokens, tokens)
            start = resolved.max_model_len - tokens if resolved.batch_invariant else 0
            chunks.append(Chunk(str(name), [0] * tokens, start, table_of, sampling))
        runner.run(StepPlan(0, tuple(chunks)))
    peak = torch.cuda.max_memory_allocated(device) - before
    del runner, pages
    torch.cuda.empty_cache()
    return peak


def _measured_graphs(resolved: Resolved, model: Decoder, layout: KVLayout, table: Table, device: torch.device) -> int:
    """What graphs of decode steps take, over a scratch block."""
    pages = Pages(layout, 1, device, model.store.dtype)
    sizes = sizes_up_to(min(resolved.max_num_seqs, resolved.max_num_batched_tokens))
    return _measured(
        device, len(sizes), lambda: [_decode_graphs(resolved, model, pages, table, sorted({sizes[0], sizes[-1]}))]
    )


def _measured_prompts(resolved: Resolved, model: Decoder, layout: KVLayout, table: Table, device: torch.device) -> int:
    """As _measured_graphs, of steps with prompts."""
    pages = Pages(layout, 1, device, model.store.dtype)
    sizes = _prompt_sizes(resolved)
    sampled = torch.zeros(resolved.max_num_seqs, dtype=torch.int64, device=device)
    return _measured(
        device,
        len(sizes),
        lambda: [_prompt_graphs(resolved, model, pages, table, sampled, sorted({sizes[0], sizes[-1]}))],
    )


def _measured_passes(
    resolved: Resolved,
    model: Decoder,
    layout: KVLayout,
    table: Table,
    device: torch.device,
    children: int | None = None,
) -> int:
    """As _measured_graphs, of passes, and of a draft model's levels, all of which are captured."""
    pages = Pages(layout, 1, device, model.store.dtype)
    sizes = _pass_sizes(resolved)

    def made() -> list[Graphs]:
        passes = _pass_graphs(resolved, model, pages, table, children, sorted({sizes[0], sizes[-1]}))
        beams = None if children is None else _beams(resolved, model, pages, table, passes)
        return [passes, *([] if beams is None else [beams])]

    return _measured(device, len(sizes), made)


def _measured(device: torch.device, count: int, make: Callable[[], Sequence[Graphs]]) -> int:
    """Bytes of `count` sizes, of whose graphs `make` makes the largest and the smallest, which the others are like; and
    of what else it makes.

    They share the memory that the largest needs between its kernels, so each adds its own description alone.
    """
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    before = device_memory_bytes(device)[1]
    first, *others = several = make()
    seen: list[int] = []
    first.capture(lambda done, total: seen.append(device_memory_bytes(device)[1]))
    for one in others:
        one.capture()
    used = before - device_memory_bytes(device)[1]
    each = max(seen[0] - seen[-1], GRAPH_BYTES) if seen else 0
    for one in several:
        one.release()
    del first, others, several, one
    torch.cuda.empty_cache()
    return max(used, 0) + max(count - 2, 0) * each
