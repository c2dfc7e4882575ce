"""A machine's card, measured: every op by its number of tokens and its sizes, and what engines add around them.

Knows models made up for the purpose, whose shapes nobody uses, and how to run their ops in a row. It must not know any
model that will be asked about. The engine prepares a step of such a model; its op calls are kept, and those that are
alike, one of each layer, run in a row (on a GPU in a captured graph, so that launches cost what they cost there) with
weights that come from memory. Steps as the engine runs them, of other shapes than those in the row, tell the rest, and
half of them the error bar.
"""

from __future__ import annotations

import gc
import itertools
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ridgeline.core.cost import Cost
from ridgeline.core.errors import RidgelineError
from ridgeline.core.machine import largest_cache_bytes
from ridgeline.core.step import Spans
from ridgeline.engine.build import Built
from ridgeline.llm import LLM
from ridgeline.ops import Op, Ops
from ridgeline.ops.moe import distinct_experts, uniform_experts
from ridgeline.ops.weight import nbytes
from ridgeline.perf.limit import LimitCurve, OwnProduct, matrix_rate, measure_curve, read_rate
from ridgeline.perf.machine_card import Curve, MachineCard, Plane, Point, Sizes, shape_of
from ridgeline.perf.price import Price
from ridgeline.perf.roofline import Roofline
from ridgeline.run.runner import Step
from ridgeline.study.calibrate import around, captured_tokens, quiet
from ridgeline.study.step_bench import Shape, StepBench, versions
from ridgeline.study.timing import GraphPool, Works, clocks, forget, on_cuda, on_host

COLD = 8
"""Calls in a row read this many times the last cache before one comes round again, if there are as many."""
LONG_STEP_S = 5e-3
WARM_STEPS = 2
HIDDEN_S = 3e-3
"""The host launches any op in less than this, whatever else it has to do: a mixture takes it half a millisecond."""
LAUNCHES = 32
"""Calls in a row that the host is timed at: few enough for the device's queue, even of mixtures."""
LAUNCH_ROUNDS = 16
PROMPT_TOKENS = 160
"""Of the prompt whose ops' launches are timed."""
QUIET = 0.25
"""Other processes only ever delay a host: of its times this quantile stands for a quiet one."""
LOWEST = 0.1
"""Of models' times this share lies below the line that stands for a quiet host: with fewer than ten models none."""
SURELY = 1.5
"""Prompts that take this many times what the host needed to start them are the device's to pace."""

DECODE_SCALE, PREFILL_SCALE = (0.75, 1.25), (0.75, 1.3)
"""What ops may take in a step over their times in a row of their like. Beyond that the rows are wrong, not the step."""
PULL = 0.15
"""A scale that is off 1 by so much weighs this times as much as one step that is off by so much: what hardly shows in
steps stays near 1."""
GAPS_S = (-1.5e-6, 3e-6)
"""What lies between two calls in a step and not in a row of them: less than nothing where a kernel starts, and reads
its weights, under the end of another one's, better than under that of its like."""
TILES = (1, 16, 32, 64, 128, 256)
"""Keys that attention of decoding may take at once."""
FINER = 0.97
"""A larger tile is believed if it makes the mean error smaller by this factor."""
POOR = 0.25
"""With a larger residual a card says nothing."""


class PoorFit(RidgelineError):
    """Ops measured one by one do not add up to steps."""


@dataclass(frozen=True)
class Made:
    """A model made up: its config.json, beside what all have."""

    name: str
    config: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Points:
    """Where a device is measured. tokens: of ops; batches, contexts: of decoding; chunks: new tokens of a prompt, and
    over: all its keys as multiples of these. decodes, prompts: steps of the engine, (requests, context) and (new
    tokens, before). rounds: of each row of calls. anchor_s: seconds of each of the two rates."""

    models: tuple[Made, ...]
    dtype: str
    tokens: tuple[int, ...]
    batches: tuple[int, ...]
    contexts: tuple[int, ...]
    chunks: tuple[int, ...]
    over: tuple[int, ...]
    decodes: tuple[tuple[int, int], ...]
    prompts: tuple[tuple[int, int], ...]
    pool_bytes: int
    rounds: int = 3
    anchor_s: float = 5.0

    @property
    def longest(self) -> int:
        return max(*self.contexts, *(one * times for one in self.chunks for times in self.over if one * times < 20000))


def _llama(hidden: int, inner: int, heads: int, kv_heads: int, layers: int, vocabulary: int) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 128,
        "num_hidden_layers": layers,
        "vocab_size": vocabulary,
        "tie_word_embeddings": False,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
    }


def _qwen3(*sizes: int) -> dict[str, Any]:
    return {**_llama(*sizes), "architectures": ["Qwen3ForCausalLM"]}


def _mixture(experts: int, top: int, inner: int, *sizes: int) -> dict[str, Any]:
    return {
        **_qwen3(*sizes),
        "architectures": ["Qwen3MoeForCausalLM"],
        "num_experts": experts,
        "num_experts_per_tok": top,
        "moe_intermediate_size": inner,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


CUDA = Points(
    # Widths as models have them: a power of two or a little less (kernels go through a row in steps of 1024 or 2048,
    # and of a step that is half empty half the time is lost), and some that fill their last step badly.
    models=(
        Made("narrow", _qwen3(960, 2944, 14, 7, 32, 120_000)),
        Made("small", _qwen3(1920, 5632, 15, 5, 24, 100_000)),
        Made("middle", _llama(3072, 9216, 24, 6, 16, 80_000)),
        Made("square", _llama(3840, 13_312, 28, 7, 10, 110_000)),
        Made("wide", _llama(5120, 15_360, 40, 8, 8, 64_000)),
        Made("experts", _mixture(96, 6, 640, 1920, 4096, 28, 4, 8, 100_000)),
        Made("more-experts", _mixture(144, 9, 896, 2560, 4096, 40, 5, 4, 90_000)),
    ),
    dtype="bfloat16",
    tokens=(1, 2, 4, 6, 9, 12, 18, 24, 36, 48, 72, 96, 144, 192, 240, 288, 320, 768, 1280, 3072, 6144, 10_240),
    batches=(1, 2, 6, 12, 24, 48, 96, 192, 320),
    contexts=(16, 112, 256, 768, 1536, 6144, 12_288),
    chunks=(12, 96, 192, 768, 1536, 6144, 10_240),
    over=(1, 4, 64),
    decodes=((1, 700), (1, 2600), (2, 5000), (3, 300), (5, 2500), (14, 700), (20, 200), (28, 640), (40, 1800),
             (72, 450), (100, 1200), (120, 2304), (150, 100), (200, 700), (300, 384), (310, 900)),
    prompts=((160, 0), (450, 0), (700, 300), (900, 0), (1800, 0), (2500, 2500), (4000, 0), (7000, 0), (9000, 0)),
    pool_bytes=12 << 30,
)  # fmt: skip
CPU = Points(
    models=(
        Made("narrow", _qwen3(192, 512, 3, 1, 12, 3000)),
        Made("small", _llama(320, 1024, 5, 1, 12, 5000)),
        Made("middle", _llama(512, 1280, 8, 2, 8, 6000)),
        Made("experts", _mixture(12, 3, 160, 256, 512, 4, 1, 4, 4000)),
    ),
    dtype="float32",
    tokens=(1, 2, 4, 6, 12, 24, 48, 96, 192, 384, 512),
    batches=(1, 2, 4, 12, 24, 48),
    contexts=(16, 96, 384, 768, 1536),
    chunks=(12, 48, 192, 384),
    over=(1, 2, 4),
    decodes=((1, 700), (3, 300), (5, 1100), (14, 200), (20, 600), (40, 300)),
    prompts=((20, 0), (60, 40), (160, 0), (250, 500), (400, 0), (450, 900)),
    pool_bytes=256 << 20,
    anchor_s=1.0,
)


def points_of(device: torch.device) -> Points:
    return CUDA if device.type == "cuda" else CPU


def calibrate_machine(
    device: torch.device,
    points: Points | None = None,
    progress: Callable[[int, int], None] | None = None,
    allow_busy: bool = False,
    kernels: str = "auto",
) -> MachineCard:
    """Measure a device's card. Raises BusyMachine like `calibrate`.

    progress(done, total) counts models.
    """
    points = points or points_of(device)
    dtype = getattr(torch, points.dtype)
    found = _Found()
    curve: LimitCurve | None = None
    read = flops = spread = 0.0
    told: dict[str, Any] = {}
    for number, made in enumerate(points.models):
        began = time.perf_counter()
        with _engine(made, points, device, kernels) as built:
            bench = StepBench(built)
            if curve is None:
                before = clocks(bench.device)
                curve = measure_curve(bench.device, dtype, _own(built))
                read, flops = anchors(bench.device, dtype, points.anchor_s, _own(built))
            _Rows(bench, points, Roofline(flops, flops, read), found).run()
            _steps(bench, points, found, made.name)
            spread = max(spread, bench.spread)
            name = bench.device_name
            bench.spread = spread
            if number + 1 == len(points.models):
                told = quiet(bench, before, allow_busy)
        forget(device)
        found.took[made.name] = round(time.perf_counter() - began, 1)
        if progress is not None:
            progress(number + 1, len(points.models))
    assert curve is not None
    card = MachineCard(
        device=name,
        dtype=points.dtype,
        made=datetime.now(UTC).isoformat(timespec="seconds"),
        read_bytes_per_s=read,
        matrix_flops=flops,
        reads=tuple((float(size), rate) for size, rate in curve.points),
        ops={op: _curves(by) for op, by in found.ops.items()},
        decode=tuple(found.decode),
        prefill=tuple(found.prefill),
        captured=found.captured,
        most_tokens=max(points.tokens),
        most_requests=max(points.batches),
        longest=points.longest,
        versions=versions(),
        clocks={**told, "seconds": found.took, "op by op": found.eager},
    )
    card = _anchored(card, found)
    if card.doubt and not allow_busy:
        raise PoorFit(f"{card.doubt}; calibrate again on a quiet machine, or say --allow-busy to have the card marked")
    return card


def _curves(by: Mapping[Sizes, Mapping[float, Point]]) -> tuple[Curve, ...]:
    return tuple(Curve(sizes, tuple((tokens, at[tokens]) for tokens in sorted(at))) for sizes, at in by.items())


def anchors(
    device: torch.device, dtype: torch.dtype, seconds: float, own: OwnProduct | None = None
) -> tuple[float, float]:
    """(bytes/s of reading, FLOP/s of a product), each kept up for so long: medians, for clocks that fall under load."""
    rates: list[float] = []
    data = torch.ones(_beyond_caches(device) // 4, dtype=torch.float32, device=device)
    for measure in (lambda: read_rate(data), lambda: matrix_rate(device, dtype, own)):
        found: list[float] = []
        began = time.perf_counter()
        while not found or time.perf_counter() - began < seconds:
            found.append(measure())
        rates.append(statistics.median(found))
    return rates[0], rates[1]


def own_product(built: Built) -> OwnProduct:
    """The kernel that serves an engine's products, for `anchors`."""
    return _own(built)


def _own(built: Built) -> OwnProduct:
    return OwnProduct(built.table.ops("prefill").linear, built.runner.model.head.weight.format == "panels")


def _beyond_caches(device: torch.device) -> int:
    return 2 << 30 if device.type == "cuda" else max(64 << 20, 4 * largest_cache_bytes())


@contextmanager
def _engine(made: Made, points: Points, device: torch.device, kernels: str) -> Iterator[Built]:
    """An engine of a made-up model with random weights."""
    with tempfile.TemporaryDirectory(prefix=f"ridgeline-{made.name}-") as folder:
        config = {**made.config, "max_position_embeddings": points.longest, "torch_dtype": points.dtype}
        (Path(folder) / "config.json").write_text(json.dumps(config), encoding="utf-8")
        with LLM(
            folder,
            load_format="dummy",
            dtype=points.dtype,
            device=str(device),
            kernels=kernels,
            max_num_seqs=max(points.batches),
            max_num_batched_tokens=max(points.tokens),
            kv_cache_memory_bytes=points.pool_bytes,
            enable_prefix_caching=False,
            seed=0,
        ) as llm:
            fill(llm.built)
            yield llm.built


def fill(built: Built) -> None:
    """Numbers as a model would have left them in an engine's pool: zeros would draw less power."""
    for page in (*built.runner.pages.keys, *built.runner.pages.values):
        page.normal_()


@dataclass
class _Found:
    """What was measured so far. prices: of the made-up models. around: `calibrate.around` of each. took: seconds that
    each model took. eager: ops of prompts that no graph would hold, and why. captured: as on a Card. hands_over:
    whether the device runs behind the host; then, of each model, launches: seconds of the host to launch a call, by op,
    and starts: to hand over a prompt op by op."""

    ops: dict[str, dict[Sizes, dict[float, Point]]] = field(default_factory=dict)
    decode: list[Plane] = field(default_factory=list)
    prefill: list[Plane] = field(default_factory=list)
    steps: list[_Step] = field(default_factory=list)
    prices: dict[str, Price] = field(default_factory=dict)
    captured: tuple[int, ...] = ()
    hands_over: bool = False
    launches: dict[str, dict[str, float]] = field(default_factory=dict)
    starts: dict[str, float] = field(default_factory=dict)
    around: list[tuple[float, float, float, float]] = field(default_factory=list)
    took: dict[str, float] = field(default_factory=dict)
    eager: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Step:
    """A step as the engine ran it. start_s: what a quiet host needed to hand it over. calls: of ops. captured: whether
    it was replayed."""

    model: str
    shape: Shape
    seconds: float
    start_s: float
    calls: int
    captured: bool = False

    @property
    def decodes(self) -> bool:
        return self.shape.decodes

    @property
    def paced(self) -> bool:
        """Whether the host may have paced it, which hands over long prompts op by op."""
        return not self.decodes and not self.captured and self.seconds <= SURELY * self.start_s


class _Calls:
    """An observer that keeps every op call of a step."""

    def __init__(self) -> None:
        self.calls: list[tuple[Op, tuple[Any, ...], dict[str, Any]]] = []

    def before(self, op: Op, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.calls.append((op, args, kwargs))

    def after(self, op: Op, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None: ...


Called = tuple[Op, Callable[..., Any], tuple[Any, ...], dict[str, Any]]
"""An op's call: the op, its kernel, args, kwargs."""


def alike(bench: StepBench, shape: Shape) -> dict[tuple[str, Sizes, float], list[Called]]:
    """The calls of a step's ops, by op, sizes and tokens."""
    plan = bench.plan(shape)
    ops, seen = bench.built.table.ops(plan.kind), _Calls()
    bench.built.runner.run(plan, ops.observed(seen))
    found: dict[tuple[str, Sizes, float], list[Called]] = {}
    for op, args, kwargs in seen.calls:
        along, sizes = shape_of(op.name, args, kwargs) if op.name not in ("attention", "feed") else (0.0, ())
        found.setdefault((op.name, sizes, along), []).append((op, getattr(ops, op.name), args, kwargs))
    return found


@torch.inference_mode()
def launches(bench: StepBench) -> dict[str, float]:
    """Seconds of a quiet host to launch a call of each op of a prompt, in a row of its like that no device holds up."""
    found: dict[str, float] = {}
    for (name, _, _), calls in alike(bench, Shape(bench.cut(PROMPT_TOKENS))).items():
        works = [_bound(kernel, args, kwargs) for _, kernel, args, kwargs in calls]
        times = []
        for _ in range(LAUNCH_ROUNDS):
            _wait_for(bench.device)
            began = time.perf_counter()
            for number in range(LAUNCHES):
                works[number % len(works)]()
            times.append((time.perf_counter() - began) / LAUNCHES)
        # All sizes of an op are launched alike: the least is its own.
        found[name] = min(found.get(name, math.inf), quantile(times, QUIET))
    _wait_for(bench.device)
    return found


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class _Rows:
    """Ops of one engine in rows of their like, into `found`."""

    def __init__(self, bench: StepBench, points: Points, roofline: Roofline, found: _Found) -> None:
        self.bench, self.points, self.roofline, self.found = bench, points, roofline, found
        self.device = bench.device
        self.pool = GraphPool(self.device) if self.device.type == "cuda" else None
        cache = (
            torch.cuda.get_device_properties(self.device).L2_cache_size
            if self.device.type == "cuda"
            else largest_cache_bytes()
        )
        self.cold_bytes = COLD * cache

    @torch.inference_mode()
    def run(self) -> None:
        gc.collect()
        gc.freeze()  # capturing a graph collects garbage, and would go through the engine each time
        try:
            self.measure()
        finally:
            gc.unfreeze()

    def measure(self) -> None:
        bench, points = self.bench, self.points
        for tokens in points.tokens:
            shape = Shape(((1, 16),) * tokens) if tokens <= bench.most_requests else Shape(bench.cut(tokens))
            for (name, sizes, along), calls in alike(self.bench, shape).items():
                if name in ("feed", "attention"):
                    continue
                table: dict[float, Point] = self.found.ops.setdefault(name, {}).setdefault(sizes, {})
                if along not in table:
                    table[along] = self.point(calls, shape)
        spec = bench.built.spec
        sizes = (float(spec.heads), float(spec.kv_heads), float(spec.head_dim))
        self.found.decode.append(
            self.plane(sizes, points.batches, points.contexts, lambda n, context: ((1, context),) * n)
        )
        self.found.prefill.append(
            self.plane(sizes, points.chunks, points.over, lambda new, times: ((new, new * times),), squares=True)
        )

    def plane(
        self,
        sizes: Sizes,
        rows: Sequence[int],
        columns: Sequence[int],
        spans: Callable[[int, int], tuple[tuple[int, int], ...]],
        squares: bool = False,
    ) -> Plane:
        """Attention at every row and column; what is too long for the pool or the context takes as many times its floor
        as what is just short enough."""
        values = []
        fill(self.bench.built)  # prompts have left their keys and values behind
        for row in rows:
            line: list[Point] = []
            for column in columns:
                shape = Shape(spans(row, column))
                longest = max(visible for _, visible in shape.spans)
                if longest <= self.bench.longest and self.bench.fits(1, longest):
                    calls = alike(self.bench, shape)
                    layers = next(one for (name, _, _), one in calls.items() if name == "attention")
                    line.append(self.point(layers, shape))
                else:
                    line.append(self.beyond(line[-1], shape))
            values.append(tuple(line))
        return Plane(sizes, tuple(map(float, rows)), tuple(map(float, columns)), tuple(values), squares)

    def beyond(self, last: Point, shape: Shape) -> Point:
        """A call of attention that cannot run here, from one that could."""
        cost = self.bench.built.price.calls(shape.as_spans())[0][1]
        times = last.seconds / last.floor_s(self.roofline)
        return Point(cost.flops, cost.bytes, times * self.roofline.seconds(cost))

    def point(self, calls: Sequence[Called], shape: Shape) -> Point:
        """What a call takes in a row of its like, in a step of this shape."""
        op, _, args, kwargs = calls[0]
        enough = calls[: max(1, int(self.cold_bytes // max(op.floor(*args, **kwargs).read_bytes, 1)) + 1)]
        if op.name == "moe":
            enough = calls  # every layer routes otherwise, and the deeper, the more alike a prompt's tokens
        works = Works([_bound(kernel, args, kwargs) for _, kernel, args, kwargs in enough])
        costs = [routed_cost(op, args, kwargs) for op, _, args, kwargs in enough]
        # Calls of the same sizes need not cost the same: a norm may add a residual, which doubles its traffic.
        flops, moved = statistics.mean(one.flops for one in costs), statistics.mean(one.bytes for one in costs)
        floor_s = max(flops / self.roofline.matrix_flops, moved / self.roofline.bytes_per_s)
        return Point(flops, moved, self.seconds(op.name, works, floor_s, shape.decodes))

    def seconds(self, name: str, works: Works, floor_s: float, decodes: bool) -> float:
        """Of one call: captured where the engine captures, unless it takes so long that launching hides behind it.

        An op of prompts that no graph holds is timed op by op, as the engine runs it, and the card says so with the
        reason; an op of decoding that no graph holds is an error, since the engine has one that does.
        """
        if self.device.type != "cuda":
            stretch = on_host(works, least_s=1e-3)
        else:
            captured = self.bench.built.runner.graphs is not None and floor_s < HIDDEN_S
            captured = captured and (decodes or name not in self.found.eager)
            try:
                stretch = on_cuda(works, len(works.calls), captured, self.pool)
            except RuntimeError as error:
                if decodes or not captured:
                    raise
                torch.cuda.synchronize(self.device)
                self.found.eager[name] = " ".join(str(error).split())[:200]
                self.pool = GraphPool(self.device)  # the old one may hold what the broken capture took
                stretch = on_cuda(works, len(works.calls), False)
        times = sorted(stretch.run() for _ in range(self.points.rounds))
        if len(times) > 2 and statistics.median(times) * stretch.calls > LONG_STEP_S:
            self.bench.spread = max(self.bench.spread, times[(3 * len(times)) // 4] / statistics.median(times))
        return statistics.median(times)


def routed_cost(op: Op, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Cost:
    """The floor of a call; of a mixture, by the experts that its tokens really go to.

    The op's own cost knows no tokens and counts the experts of a uniform router.
    """
    cost = op.floor(*args, **kwargs)
    if op.name != "moe":
        return cost
    x, _, gate_up, down, top_k, *_ = args
    count = gate_up.shape[0]
    less = uniform_experts(count, top_k, x.shape[0]) - distinct_experts(*args)
    return replace(cost, read_bytes=cost.read_bytes - less * nbytes(gate_up, down) / count)


def _bound(kernel: Callable[..., Any], args: Any, kwargs: Any) -> Callable[[], Any]:
    return lambda: kernel(*args, **kwargs)


def hands_over(device: torch.device) -> bool:
    """Whether a device computes behind the host, which only hands steps over."""
    return device.type == "cuda"


def _steps(bench: StepBench, points: Points, found: _Found, name: str) -> None:
    """Steps as the engine runs them, and what lies around them."""
    seen = _Calls()
    bench.built.price.trace(Spans((1,), (1,)), 1, True, Ops({}, seen))
    calls = len(seen.calls)
    found.prices[name] = bench.built.price
    found.hands_over, found.captured = hands_over(bench.device), captured_tokens(bench.built)
    fill(bench.built)  # prompts have left their keys and values behind
    shapes = [Shape(((1, context),) * count) for count, context in points.decodes]
    shapes += [Shape(((new, new + before),)) for new, before in points.prompts]
    rows = [launches(bench)] if found.hands_over else []
    starts = [handing_over(bench)] if found.hands_over else []
    most_captured = max(found.captured, default=0)
    for shape in shapes:
        if shape.tokens <= bench.most_tokens and max(visible for _, visible in shape.spans) <= bench.longest:
            seconds, start_s = step_seconds(bench, shape)
            replayed = not shape.decodes and shape.tokens <= most_captured
            found.steps.append(_Step(name, shape, seconds, start_s, calls, replayed))
            if not shape.decodes and not replayed:
                starts.append(start_s)
    if found.hands_over:
        rows.append(launches(bench))
        found.launches[name] = {op: min(one[op] for one in rows) for op in rows[0]}
        found.starts[name] = min(*starts, handing_over(bench))
    found.around.append(around(bench.built))


def handing_over(bench: StepBench) -> float:
    """Seconds of a quiet host to hand over a short prompt op by op, whether or not the engine would replay it."""
    runner = bench.built.runner
    kept, runner.prompts = runner.prompts, None
    try:
        return step_seconds(bench, Shape(bench.cut(PROMPT_TOKENS)))[1]
    finally:
        runner.prompts = kept


def step_seconds(bench: StepBench, shape: Shape, repeats: int = 7) -> tuple[float, float]:
    """(seconds on the device, of a quiet host to start it) of a step, as the engine runs it: a median and QUIET.

    Where the engine overlaps steps, the next one is started before the results of this one are read.
    """
    device_s, start_s = [], []
    runner, overlap = bench.built.runner, bench.built.engine.overlap
    flights: list[Step] = []
    for plan in [bench.plan(shape) for _ in range(repeats + WARM_STEPS)]:
        began = time.perf_counter()
        flights.append(runner.start(plan))
        start_s.append(time.perf_counter() - began)
        if len(flights) > overlap:
            device_s.append(flights.pop(0).result().device_s)
    device_s += [one.result().device_s for one in flights]
    return statistics.median(device_s[WARM_STEPS:]), quantile(start_s[WARM_STEPS:], QUIET)


def quantile(values: Sequence[float], share: float) -> float:
    return float(np.quantile(np.array(values), share))


def _anchored(card: MachineCard, found: _Found) -> MachineCard:
    """The card with what steps add to ops: every other one to fit, the rest to judge."""
    decodes, prompts = ([one for one in found.steps if one.decodes is kind] for kind in (True, False))
    card = _with_decoding(card, found, decodes[::2])
    parts = {one: card.parts(found.prices[one.model], one.shape.as_spans()) for one in found.steps}
    if found.hands_over:
        card = _with_handing_over(card, found)
    shares = [
        (one.seconds - card.step_s - card.gap_s * one.calls) / sum(parts[one])
        for one in prompts[::2]
        if not (found.hands_over and one.paced)
    ]
    prefill_scale = statistics.median(shares) if shares else card.decode_scale
    host = [statistics.median(one[place] for one in found.around) for place in range(4)]
    card = replace(
        card,
        prefill_scale=min(max(prefill_scale, PREFILL_SCALE[0]), PREFILL_SCALE[1]),
        host_step_s=host[0],
        host_request_s=host[1],
        loop_step_s=host[2],
        loop_request_s=host[3],
    )
    said = _Said(card, found)
    judged = [(abs(said.seconds(one) / one.seconds - 1), one) for one in (*decodes[1::2], *prompts[1::2])]
    judged.sort(key=lambda one: one[0])
    card = replace(
        card,
        residual=judged[int(0.95 * (len(judged) - 1))][0],
        steps=tuple(
            {
                "model": one.model,
                "requests": len(one.shape.spans),
                "new": one.shape.spans[0][0],
                "visible": one.shape.spans[0][1],
                "measured_s": one.seconds,
                **dict(zip(("mixtures_s", "attention_s", "other_ops_s"), parts[one])),
                "said_s": said.seconds(one),
                "start_s": one.start_s,
            }
            for one in found.steps
        ),
    )
    return replace(card, doubt=_doubt(card, prefill_scale, judged[-1][1], said.seconds(judged[-1][1])))


def _with_decoding(card: MachineCard, found: _Found, fit: Sequence[_Step]) -> MachineCard:
    """The card with what lies around ops in these steps of decoding, and by how many keys at once attention goes: the
    tile under which all of them are nearest."""
    best, lowest = card, math.inf
    # A device that launches by itself overlaps ops of one token otherwise than of more, which other kernels serve.
    gaps = GAPS_S if found.hands_over else (0.0, GAPS_S[1])
    apart = found.hands_over and any(one.shape.tokens == 1 for one in fit)
    for tile in TILES:
        tiled = replace(card, tile=tile)
        features = []
        for one in fit:
            mixtures_s, attention_s, other_s = tiled.parts(found.prices[one.model], one.shape.as_spans())
            around = (0.0, 0.0) if apart and one.shape.tokens == 1 else (float(one.calls), other_s)
            alone = (float(one.calls), other_s) if apart and one.shape.tokens == 1 else (0.0, 0.0)
            features.append((1.0, float(len(one.shape.spans)), mixtures_s, attention_s, *around, *alone))
        bounds = [(0.0, None), (0.0, None), DECODE_SCALE, DECODE_SCALE, gaps, DECODE_SCALE, gaps, DECODE_SCALE]
        near = (2, 3, 5, 7)
        for place in range(2, len(bounds)):
            if not any(row[place] for row in features):
                bounds[place] = (1.0, 1.0) if place in near else (0.0, 0.0)
        measured = [one.seconds for one in fit]
        weights = bounded(features, measured, bounds, near)
        errors = [abs(sum(w * one for w, one in zip(weights, row)) / real - 1) for row, real in zip(features, measured)]
        error = statistics.mean(errors)
        if error < FINER * lowest:
            lowest = error
            step_s, request_s, mixture_scale, attention_scale, gap_s, decode_scale, alone_gap_s, alone_scale = weights
            best = replace(
                tiled,
                step_s=step_s,
                request_s=request_s,
                mixture_scale=mixture_scale,
                attention_scale=attention_scale,
                gap_s=gap_s,
                decode_scale=decode_scale,
                alone_gap_s=alone_gap_s if apart else gap_s,
                alone_scale=alone_scale if apart else decode_scale,
            )
    return best


def _with_handing_over(card: MachineCard, found: _Found) -> MachineCard:
    """The card with what a quiet host takes to hand a step to the device op by op.

    It takes as long whatever the prompt's length, so the least of a model's prompts counts; and it is held against rows
    of that model's own, measured at the same time, whom the same neighbours slowed. What the card keeps are the least
    rows of all models.
    """
    points = []
    for name, rows in found.launches.items():
        points.append((replace(card, launch_s=rows).launches_s(found.prices[name]), found.starts[name]))
    start_s, launch_scale = lower_line(points, LOWEST)
    ops = {op for rows in found.launches.values() for op in rows}
    quiet_s = {op: min(rows[op] for rows in found.launches.values() if op in rows) for op in sorted(ops)}
    return replace(card, launch_s=quiet_s, start_s=start_s, launch_scale=launch_scale)


def lower_line(points: Sequence[tuple[float, float]], share: float) -> tuple[float, float]:
    """(start, multiple) of the line above this share of the points, by errors relative to them (Koenker and Bassett,
    1978). Neither is below zero.

    Such a line goes through two of the points, or through one and the origin, or is level: all of them are tried.
    """
    lines = [(0.0, y / x) for x, y in points if x > 0] + [(y, 0.0) for _, y in points]
    for (x0, y0), (x1, y1) in itertools.combinations(points, 2):
        if x0 != x1:
            times = (y1 - y0) / (x1 - x0)
            lines.append((y0 - times * x0, times))

    def cost(line: tuple[float, float]) -> float:
        off = [1 - (line[0] + line[1] * x) / y for x, y in points]
        return sum(one * share if one > 0 else -one * (1 - share) for one in off)

    return min((one for one in lines if min(one) >= 0), key=cost)


def _doubt(card: MachineCard, prefill_scale: float, worst: _Step, said_s: float) -> str:
    """Why a card is not to be trusted; nothing, if it is."""
    why = []
    scales = (
        ("ops of decoding", card.decode_scale, DECODE_SCALE),
        ("ops of one token", card.alone_scale, DECODE_SCALE),
        ("attention of decoding", card.attention_scale, DECODE_SCALE),
        ("mixtures of decoding", card.mixture_scale, DECODE_SCALE),
        ("ops of prompts", prefill_scale, PREFILL_SCALE),
    )
    for kind, scale, (least, most) in scales:
        if not least < scale < most:
            why.append(f"{kind} take {scale:.2f} times their time in a row or beyond ({least} to {most} is sane)")
    if card.residual > POOR:
        (new, visible), requests = worst.shape.spans[0], len(worst.shape.spans)
        why.append(
            f"steps left out of the fit are off by {card.residual:.0%}, at worst {requests} x ({new} new of {visible}) "
            f"of {worst.model}: {worst.seconds * 1e3:.3f} ms measured, {said_s * 1e3:.3f} predicted"
            + (" (the host paces it)" if worst.paced else "")
        )
    return "ops do not add up to steps: " + "; ".join(why) if why else ""


Bound = tuple[float, float | None]


def bounded(
    rows: Sequence[Sequence[float]], measured: Sequence[float], bounds: Sequence[Bound], near: Sequence[int] = ()
) -> list[float]:
    """Weights of least squared relative error within bounds; the worst tenth is left out, three times, as in `fitted`.

    rows: features of each measurement. near: weights that are to be near to 1 if little depends on them. Every weight
    is free, at its least or at its most: all cases are tried.
    """
    target = np.array(measured, dtype=np.float64)
    scaled = np.array(rows, dtype=np.float64) / target[:, None]
    pulls = PULL * np.eye(len(bounds))[list(near)]
    best = np.zeros(len(bounds))
    for _ in range(4):
        both = np.vstack((scaled, pulls))
        wanted = np.concatenate((np.ones(len(scaled)), np.full(len(pulls), PULL)))
        lowest = math.inf
        for fixed in _cases(bounds):
            weights = _with_fixed(both, wanted, fixed)
            if any(w < low - 1e-15 or (high is not None and w > high) for w, (low, high) in zip(weights, bounds)):
                continue
            error = float(np.sum((both @ weights - wanted) ** 2))
            if error < lowest:
                lowest, best = error, weights
            if not any(one is not None and low != high for one, (low, high) in zip(fixed, bounds)):
                break  # nothing that may move was held: nothing held can be better
        errors = np.abs(scaled @ best - 1)
        scaled = scaled[errors <= np.quantile(errors, 0.9)]
    return [float(one) for one in best]


def _cases(bounds: Sequence[Bound]) -> Iterator[tuple[float | None, ...]]:
    """What may be held at its bounds, none of it first."""
    choices = []
    for low, high in bounds:
        choices.append((low,) if low == high else (None, *(one for one in (low, high) if one is not None)))
    return itertools.product(*choices)


def _with_fixed(rows: Any, wanted: Any, fixed: Sequence[float | None]) -> Any:
    """Weights of least squares, of which some are given."""
    weights = np.array([0.0 if one is None else one for one in fixed])
    free = [place for place, one in enumerate(fixed) if one is None]
    if free:
        weights[free] = np.linalg.lstsq(rows[:, free], wanted - rows @ weights, rcond=None)[0]
    return weights


class _Said:
    """What a card says of steps of the made-up models."""

    def __init__(self, card: MachineCard, found: _Found) -> None:
        self._cards = {name: card.card(price, name) for name, price in found.prices.items()}

    def seconds(self, step: _Step) -> float:
        return self._cards[step.model].device_s(step.shape.as_spans(), len(step.shape.spans))
