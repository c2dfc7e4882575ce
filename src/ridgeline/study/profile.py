"""The report's study as a command: which operators a generation spends its time in, here and in plain Transformers.

Knows torch's profiler, a Timer, the limit curve. It must not know how steps are made. Copies are called out
(aten::copy_, _to_copy, to), because the report found them among the most expensive. Classes and the figures of each
are those of Ivanov et al., "Data Movement Is All You Need" (2007.00072): MUE is the floor's bytes over the time,
as a share of the bandwidth.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from ridgeline.core.cost import ZERO, Cost
from ridgeline.core.step import Spans
from ridgeline.engine.build import Built
from ridgeline.ops import REGISTRY, Op
from ridgeline.ops.attention_call import Call
from ridgeline.perf.limit import LimitCurve, OwnProduct, measure_curve
from ridgeline.perf.timer import TimedCall, Timer
from ridgeline.study.attention.rungs import reference
from ridgeline.study.attention.traffic import counted
from ridgeline.study.explain import Watched
from ridgeline.study.step_bench import Shape, StepBench
from ridgeline.study.what_if import unfused_bytes
from ridgeline.workload.arrivals import Job
from ridgeline.workload.drive import drive, request_of

COPIES = ("aten::copy_", "aten::_to_copy", "aten::to")
CLASSES = ("contraction", "normalization", "elementwise", "movement")
ENERGY = Path("/sys/class/powercap/intel-rapl:0/energy_uj")


@dataclass(frozen=True, slots=True)
class OperatorRow:
    """One of torch's operators over a whole run: calls, seconds of its own and with what it calls."""

    name: str
    calls: int
    self_s: float
    total_s: float
    device_s: float


@dataclass(frozen=True)
class Run:
    """One side: its operators, by their own time, and what a token took."""

    side: str
    tokens: int
    seconds: float
    operators: tuple[OperatorRow, ...]
    kernels: int
    joules: float | None

    def calls(self, name: str) -> int:
        return sum(row.calls for row in self.operators if row.name == name)

    @property
    def copies_per_token(self) -> dict[str, float]:
        return {name: self.calls(name) / self.tokens for name in COPIES}

    def as_dict(self, top: int) -> dict[str, Any]:
        return {
            "side": self.side,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "operator_calls_per_token": sum(row.calls for row in self.operators) / self.tokens,
            "kernels_per_token": self.kernels / self.tokens if self.kernels else None,
            "copies_per_token": self.copies_per_token,
            "joules_per_token": None if self.joules is None else self.joules / self.tokens,
            "operators": [
                {
                    "name": row.name,
                    "calls": row.calls,
                    "self_s": row.self_s,
                    "total_s": row.total_s,
                    "device_s": row.device_s,
                }
                for row in self.operators[:top]
            ],
        }


@dataclass(frozen=True, slots=True)
class ClassRow:
    """All ops of a class, or one op, in the decode steps: shares of FLOPs and of time, and how near to the limit.

    unfused_bytes: what an op would move if its intermediates passed through memory; of ops alone, not of classes.
    """

    name: str
    kind: str
    calls: float
    cost: Cost
    seconds: float
    flop_share: float
    time_share: float
    peak_share: float
    mue: float
    unfused_bytes: float | None = None

    def as_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "class": self.kind,
            "calls_per_step": self.calls,
            "flops": self.cost.flops,
            "read_bytes": self.cost.read_bytes,
            "write_bytes": self.cost.write_bytes,
            "seconds": self.seconds,
            "flop_share": self.flop_share,
            "time_share": self.time_share,
            "peak_share": self.peak_share,
            "mue": self.mue,
            "unfused_bytes": self.unfused_bytes,
        }


@dataclass(frozen=True)
class Profile:
    """Both sides, and the mean decode step by class and by op. notes: what could not be measured, and why."""

    runs: tuple[Run, ...]
    classes: tuple[ClassRow, ...]
    ops: tuple[ClassRow, ...]
    notes: tuple[str, ...] = field(default=())

    def as_dict(self, top: int = 12) -> dict[str, Any]:
        return {
            "runs": [one.as_dict(top) for one in self.runs],
            "classes": [one.as_dict() for one in self.classes],
            "ops": [one.as_dict() for one in self.ops],
            "notes": list(self.notes),
        }


@dataclass(frozen=True, slots=True)
class Rung:
    """Decoding with one kernel of attention, a token: torch's operators, copies among them, kernels on a GPU (None on a
    CPU), and attention's bytes (None if nobody has counted that kernel's) and seconds."""

    name: str
    operators: float
    copies: float
    kernels: float | None
    attention_bytes: float | None
    attention_s: float

    def as_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}


def rung(built: Built, name: str, prompt_len: int, output_len: int) -> Rung:
    """Profile an engine whose attention is served by the kernel `name`."""
    run = _ours(built, prompt_len, output_len, None, [])
    _, ops = _by_class(built, prompt_len, output_len)
    seconds = sum(one.seconds for one in ops if one.name == "attention")
    return Rung(
        name=name,
        operators=sum(row.calls for row in run.operators) / run.tokens,
        copies=sum(run.copies_per_token.values()),
        kernels=run.kernels / run.tokens if run.kernels else None,
        attention_bytes=_attention_bytes(built, prompt_len + output_len // 2),
        attention_s=seconds,
    )


def verdicts(rungs: Sequence[Rung]) -> list[str]:
    """The report's hypothesis, that attention in one pass is faster for fewer calls, copies and bytes, as each rung
    answers it beside the first one."""
    first, lines = rungs[0], []
    for one in rungs[1:]:
        said = [_against("operators", one.operators, first.operators), _against("copies", one.copies, first.copies)]
        if one.kernels is not None and first.kernels is not None:
            said.append(_against("kernels", one.kernels, first.kernels))
        if one.attention_bytes is not None and first.attention_bytes is not None:
            said.append(_against("bytes of attention", one.attention_bytes, first.attention_bytes))
        faster = first.attention_s / one.attention_s
        lines.append(f"{one.name} beside {first.name}: attention {faster:.2f}x as fast; {', '.join(said)}")
    return lines


def _against(what: str, mine: float, other: float) -> str:
    if abs(mine - other) <= 0.01 * max(mine, other):
        return f"as many {what}"
    return f"{'fewer' if mine < other else 'more'} {what} ({mine:,.0f} against {other:,.0f})"


class _Attention:
    """An observer that keeps the arguments of attention's calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def before(self, op: Op, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if op.name == "attention":
            self.calls.append((args, kwargs))

    def after(self, op: Op, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None: ...


def _attention_bytes(built: Built, context: int) -> float | None:
    """What the kernel that serves moves in a decode step, by its own declaration or by torch's operators."""
    plan = StepBench(built).plan(Shape(((1, context),)))
    ops, seen = built.table.ops(plan.kind), _Attention()
    built.runner.run(plan, ops.observed(seen))
    serving = next(row.kernel for row in built.table.rows if (row.op, row.work) == ("attention", plan.kind))
    kernel = reference() if serving == "reference" else REGISTRY["attention"].kernels[serving]
    args, kwargs = seen.calls[0]
    with torch.inference_mode():
        one = counted(kernel, Call(*args, **kwargs), lambda: kernel.call(*args, **kwargs))
    return None if one is None else one.bytes * len(seen.calls)


def profiled(built: Built, prompt_len: int, output_len: int, trace: Path | None = None) -> Profile:
    """Profile decode steps of one request, here and in Transformers if it is installed.

    The prompt is done before the profiler looks: what is counted is `output_len` tokens of decoding. trace: where
    a Perfetto trace of our side goes.
    """
    notes: list[str] = []
    runs = [_ours(built, prompt_len, output_len, trace, notes)]
    theirs = _theirs(built, prompt_len, output_len, notes)
    if theirs is not None:
        runs.append(theirs)
    classes, ops = _by_class(built, prompt_len, output_len)
    return Profile(tuple(runs), classes, ops, tuple(notes))


def _ours(built: Built, prompt_len: int, output_len: int, trace: Path | None, notes: list[str]) -> Run:
    engine, vocabulary = built.engine, built.spec.vocabulary
    drive(engine, [Job(prompt_len, 4)], vocabulary, seed=1)

    def decode() -> None:
        for _ in range(output_len):
            engine.step()

    request = request_of(Job(prompt_len, output_len + 2), 0, 0.0, vocabulary, 2)
    engine.add(request)
    while request.output_len < 1:
        engine.step()
    try:
        return _run("ridgeline", decode, output_len, torch.device(built.config.device), trace, notes)
    finally:
        engine.abort(request.request_id)


def _theirs(built: Built, prompt_len: int, output_len: int, notes: list[str]) -> Run | None:
    """Transformers' model of the same config with random weights: its operators do not depend on their values."""
    try:
        import transformers
    except ImportError:
        notes.append("Transformers is not installed, so there is nothing to compare with: pip install transformers")
        return None
    transformers.logging.set_verbosity_error()
    device = torch.device(built.config.device)
    place = built.directory if built.directory.is_dir() else built.directory.parent
    config = transformers.AutoConfig.from_pretrained(place)
    with device:
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, built.config.dtype)).eval()
    ids = torch.randint(built.spec.vocabulary, (1, prompt_len), device=device)
    with torch.inference_mode():
        out = model(ids, use_cache=True)
        state = {"cache": out.past_key_values, "ids": out.logits[:, -1].argmax(-1, keepdim=True)}

        def decode() -> None:
            for _ in range(output_len):
                step = model(state["ids"], past_key_values=state["cache"], use_cache=True)
                state["ids"] = step.logits[:, -1].argmax(-1, keepdim=True)

        for _ in range(3):
            step = model(state["ids"], past_key_values=state["cache"], use_cache=True)
            state["ids"] = step.logits[:, -1].argmax(-1, keepdim=True)
        return _run("transformers", decode, output_len, device, None, [])


def _run(
    side: str, work: Callable[[], None], tokens: int, device: torch.device, trace: Path | None, notes: list[str]
) -> Run:
    """Profile `work`; its time is taken in a run of its own kind, since the profiler slows every operator."""
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    joules, start = _joules(device), time.perf_counter()
    with profile(activities=activities) as watched:
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    seconds = time.perf_counter() - start
    after = _joules(device)
    if joules is None or after is None:
        notes.append("no driver here tells the energy used")
    if trace is not None:
        trace.parent.mkdir(parents=True, exist_ok=True)
        watched.export_chrome_trace(str(trace))
    rows = [
        OperatorRow(
            event.key,
            event.count,
            event.self_cpu_time_total / 1e6,
            event.cpu_time_total / 1e6,
            getattr(event, "self_device_time_total", 0.0) / 1e6,
        )
        for event in watched.key_averages()
    ]
    kernels = sum(row.calls for row in rows if row.device_s > 0 and not row.name.startswith("aten::"))
    operators = tuple(sorted((row for row in rows if "::" in row.name), key=lambda row: -(row.self_s + row.device_s)))
    used = after - joules if joules is not None and after is not None else None
    return Run(side, tokens, seconds, operators, kernels, used)


def _joules(device: torch.device) -> float | None:
    """Energy counter: the GPU's total, or the processor package's; None where neither can be read."""
    if device.type == "cuda":
        which = f"--id={device.index or 0}"
        query = ["nvidia-smi", which, "--query-gpu=total_energy_consumption", "--format=csv,noheader,nounits"]
        with suppress(OSError, subprocess.SubprocessError, ValueError):
            done = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True)
            return float(done.stdout.split()[0]) / 1e3
        return None
    with suppress(OSError, ValueError):
        return int(ENERGY.read_text()) / 1e6
    return None


def _by_class(built: Built, prompt_len: int, output_len: int) -> tuple[tuple[ClassRow, ...], tuple[ClassRow, ...]]:
    """The mean decode step, by class and by op; ops beside what they would move unfused."""
    device, dtype = torch.device(built.config.device), getattr(torch, built.config.dtype)
    panels = built.runner.model.layers[0].attention.qkv.weight.format == "panels"
    curve = measure_curve(device, dtype, OwnProduct(built.table.ops("prefill").linear, panels))
    watched, executor = Watched(built, Timer(device)), built.engine.executor
    built.engine.executor = watched
    try:
        drive(built.engine, [Job(prompt_len, output_len)], built.spec.vocabulary, seed=3)
    finally:
        built.engine.executor = executor
    steps = [calls for kind, calls in watched.steps if kind == "decode"][1:]
    calls = [call for step in steps for call in step]
    working_set = sum(call.cost.bytes for call in calls) / len(steps)
    flops, seconds = sum(call.cost.flops for call in calls), sum(call.seconds for call in calls)

    def row(name: str, kind: str, chosen: Sequence[TimedCall]) -> ClassRow:
        cost, took = ZERO, sum(call.seconds for call in chosen)
        for call in chosen:
            cost += call.cost
        return ClassRow(
            name=name,
            kind=kind,
            calls=len(chosen) / len(steps),
            cost=Cost(cost.flops / len(steps), cost.read_bytes / len(steps), cost.write_bytes / len(steps)),
            seconds=took / len(steps),
            flop_share=cost.flops / flops,
            time_share=took / seconds,
            peak_share=cost.flops / took / curve.flops_per_s,
            mue=_mue(cost, took, kind, working_set, len(chosen), curve),
        )

    kinds = [kind for kind in CLASSES if any(call.kind == kind for call in calls)]
    by_class = tuple(row(kind, kind, [call for call in calls if call.kind == kind]) for kind in kinds)
    names = dict.fromkeys((call.op, call.kind) for call in calls)
    saved = unfused_bytes(built.price, Spans((1,), (prompt_len + output_len // 2,)))
    by_op = []
    for name, kind in names:
        one = row(name, kind, [call for call in calls if call.op == name])
        by_op.append(replace(one, unfused_bytes=one.cost.bytes + saved.get(name, 0.0)))
    return by_class, tuple(sorted(by_op, key=lambda one: -one.seconds))


def _mue(cost: Cost, seconds: float, kind: str, working_set: float, calls: int, curve: LimitCurve) -> float:
    """(Q / t) / B: the floor's bytes over the time, as a share of the bandwidth at the working set."""
    within = working_set if kind == "contraction" else cost.bytes / calls
    return cost.bytes / seconds / curve.bytes_per_s(within)
