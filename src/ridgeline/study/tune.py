"""Searching the tiles, stages and splits of the attention kernels on this very GPU.

Knows which cases a table is tried on, and how variants are judged. It must not know kernels: what may be tried, each
declares itself (kernels/tables).

Every variant is first held against fp64 by FlashAttention's error rule on each case, and against the op's
reference on a small ragged batch; one that is wrong is reported and never chosen. Then all are timed briefly, and
the best few beside the present entry in alternating rounds. A variant takes the entry's place if it is faster with
95 % confidence.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ridgeline.core.errors import InvalidArgument, KernelRefused
from ridgeline.kernels import tables
from ridgeline.kernels.tables import Tunable
from ridgeline.ops import REGISTRY
from ridgeline.ops.attention import attention_inputs
from ridgeline.ops.op import Kernel
from ridgeline.study.attention import rungs, tensors
from ridgeline.study.attention.bench import CACHES_BEYOND, describe, device_of, versions
from ridgeline.study.attention.cases import ITEM_BYTES, Case
from ridgeline.study.attention.report import Table, times
from ridgeline.study.timing import (
    GraphPool,
    Stretch,
    Works,
    alternate,
    clocks,
    forget,
    geometric_mean,
    interval,
    on_cuda,
    on_host,
)

FINALISTS = 4
SCREENING_ROUNDS = 3
WIDTH = 2048
TOKENS = 16384
SHORT_TOKENS = 4096
GROUPED = (32, 8)
PAGE = 64

Progress = Callable[[int, int, str], None]


def _silent(done: int, total: int, what: str) -> None: ...


@dataclass(frozen=True, slots=True)
class Settings:
    """What to search. kernels, head_dims: empty for all. most: variants of an entry; beyond, a random choice of them.

    out: a file for the table instead of the user's cache. keep: whether to write it at all.
    """

    kernels: Sequence[str] = ()
    head_dims: Sequence[int] = ()
    dtype: str = "bfloat16"
    device: str = "auto"
    rounds: int = 20
    most: int = 64
    out: Path | None = None
    keep: bool = True

    def __post_init__(self) -> None:
        for name in ("rounds", "most"):
            if getattr(self, name) < 1:
                raise InvalidArgument(name, f"must be at least 1, not {getattr(self, name)}")
        if self.dtype not in ITEM_BYTES:
            raise InvalidArgument("dtype", f"must be one of {', '.join(ITEM_BYTES)}, not {self.dtype!r}")


def cases(tunable: Tunable, key: Any, settings: Settings) -> list[Case]:
    """What an entry is tried on, by its table's work."""
    head_dim = tunable.shape(key).head_dim or 128
    heads = max(WIDTH // head_dim, 1)
    if tunable.work == "decode":
        batches = {1024: 256, 2048: 256, 4096: 32, 8192: 1}
        return [
            Case("decode", batches.get(length, 8), *GROUPED, head_dim, 1, length, True, settings.dtype, PAGE)
            for length in tunable.lengths or (8192, 4096, 2048)
        ]
    if tunable.work == "short":
        return [
            Case("report", max(SHORT_TOKENS // length, 1), 32, 32, head_dim, length, length, False, settings.dtype)
            for length in tunable.lengths or (32, 64)
        ]
    return [
        Case("sweep", TOKENS // length, heads, heads, head_dim, length, length, causal, settings.dtype)
        for length in tunable.lengths or (1024, 4096)
        for causal in (False, True)
    ]


def taken(kernel: Kernel, wanted: Sequence[Case]) -> list[Case]:
    """Those cases that a kernel takes, with pages where it has no contiguous keys."""
    found = []
    for case in wanted:
        for one in (case, replace(case, page=case.page or PAGE)):
            if rungs.refusal(kernel, one) is None:
                found.append(one)
                break
    return found


@dataclass
class _Trial:
    """An entry under search: its variants, what became of each."""

    tunable: Tunable
    key: Any
    cases: list[Case]
    refused: dict[str, str] = field(default_factory=dict)
    wrong: dict[str, str] = field(default_factory=dict)
    tried: int = 0
    winner: Any = None
    gain: list[float] | None = None

    def as_dict(self) -> dict[str, Any]:
        return {
            "table": self.tunable.id,
            "key": tables.key_text(self.key),
            "cases": [case.label for case in self.cases],
            "tried": self.tried,
            "before": tables.values_of(self.tunable.table[self.key]),
            "after": None if self.winner is None else tables.values_of(self.winner),
            "gain": self.gain,
            "refused": self.refused,
            "wrong": self.wrong,
        }


def run(settings: Settings, progress: Progress = _silent) -> dict[str, Any]:
    """Search, keep the table, and say what was found; plain data for JSON.

    Raises InvalidArgument for a kernel that declares no table (naming those that do), KernelRefused if this device has
    nothing to tune.
    """
    device = device_of(settings.device)
    serving = rungs.rungs(device)
    entries = _entries(settings, serving, device)
    name = str(describe(device)["name"])
    trials: list[dict[str, Any]] = []
    file = settings.out or tables.kept_file(name)
    how = {"versions": versions(), "dtype": settings.dtype, "rounds": settings.rounds, "most": settings.most}
    moments = {"before": clocks(device)}
    for number, (tunable, key) in enumerate(entries):
        kernel = serving[tunable.kernel]
        tried = taken(kernel, cases(tunable, key, settings))
        if not tried:
            raise KernelRefused(f"{tunable.id} {tables.key_text(key)}: {tunable.kernel} takes none of its cases")
        trial = _Trial(tunable, key, tried)
        search = _Search(trial, kernel, device, settings)

        def tell(what: str, number: int = number, tunable: Tunable = tunable, key: Any = key) -> None:
            progress(number, len(entries), f"{tunable.id} {tables.key_text(key)}: {what}")

        search.run(tell)
        trials.append(trial.as_dict())
        if trial.winner is not None:
            tunable.table[key] = trial.winner
        if settings.keep:  # after every entry, so that a search that is stopped has not been for nothing
            found = {} if trial.winner is None else {tunable.id: {key: trial.winner}}
            tables.write(file, name, found, how)
        forget(device)
    progress(len(entries), len(entries), "done")
    return {
        "benchmark": "tune",
        "device": describe(device),
        "versions": versions(),
        "settings": {"dtype": settings.dtype, "rounds": settings.rounds, "most": settings.most},
        "clocks": {**moments, "after": clocks(device)},
        "entries": trials,
        "file": str(file) if settings.keep else None,
    }


def _entries(settings: Settings, serving: Mapping[str, Kernel], device: torch.device) -> list[tuple[Tunable, Any]]:
    here = {name: one for name, one in tables.TUNABLES.items() if one.kernel in serving}
    if not here:
        listed = ", ".join(serving) or "none"
        raise KernelRefused(f"nothing to tune on {device.type}: its kernels of attention ({listed}) declare no tables")
    known = sorted({one.kernel for one in here.values()})
    for name in settings.kernels:
        if name not in known:
            raise InvalidArgument("kernel", f"{name!r} declares no tables on this device; {', '.join(known)} do")
    found = [
        (one, key)
        for one in here.values()
        if not settings.kernels or one.kernel in settings.kernels
        for key in one.table
        if one.shape(key).item_bytes in (None, ITEM_BYTES[settings.dtype])
        and (not settings.head_dims or one.shape(key).head_dim in (None, *settings.head_dims))
    ]
    if not found:
        raise InvalidArgument("head_dim", f"no table has an entry for {settings.dtype} and these head dims")
    return found


class _Search:
    """One entry: variants in, the winner out. The table holds the present entry whenever nothing is running."""

    def __init__(self, trial: _Trial, kernel: Kernel, device: torch.device, settings: Settings) -> None:
        self.trial = trial
        self.kernel = kernel
        self.device = device
        self.settings = settings
        self.calls = {case.label: self._calls(case) for case in trial.cases}

    def _calls(self, case: Case) -> list[Any]:
        copies = 1
        if self.device.type == "cuda":
            cache = torch.cuda.get_device_properties(self.device).L2_cache_size
            copies = -(-CACHES_BEYOND * cache // case.floor_bytes)
        return [tensors.make(case, self.device, seed) for seed in range(copies)]

    def run(self, tell: Callable[[str], None]) -> None:
        trial = self.trial
        variants = list(trial.tunable.candidates(trial.key))
        present = variants[0]
        if len(variants) > self.settings.most:
            variants = [present, *random.Random(0).sample(variants[1:], self.settings.most - 1)]
        scores: dict[Any, float] = {}
        pool = GraphPool(self.device) if self.device.type == "cuda" else None
        for number, variant in enumerate(variants, 1):
            tell(f"variant {number} of {len(variants)}")
            stretches = self._ready(variant, pool)
            if stretches is None:
                if variant == present:
                    why = trial.refused or trial.wrong
                    raise KernelRefused(f"{trial.tunable.id} {trial.key}: the present entry does not run: {why}")
                continue
            trial.tried += 1
            taken = [min(stretch.run() for _ in range(SCREENING_ROUNDS)) for stretch in stretches.values()]
            scores[variant] = geometric_mean(taken)
        best = sorted(scores, key=scores.__getitem__)[:FINALISTS]
        self._final(present, [one for one in best if one != present], pool, tell)

    @contextmanager
    def _with(self, variant: Any) -> Iterator[None]:
        """The variant in the table."""
        table, key = self.trial.tunable.table, self.trial.key
        present = table[key]
        table[key] = variant
        try:
            yield
        finally:
            table[key] = present

    def _ready(self, variant: Any, pool: GraphPool | None) -> dict[str, Stretch] | None:
        """The variant on every case, checked; None if it is refused or wrong."""
        trial = self.trial
        try:
            with self._with(variant):
                mistake = self._mistake()
            if mistake is not None:
                trial.wrong[str(variant)] = mistake
                return None
            stretches = {}
            for case in trial.cases:
                calls = self.calls[case.label]
                works = Works([rungs.bound(self.kernel, case, call) for call in calls], lambda: self._with(variant))
                stretches[case.label] = on_cuda(works, len(calls), True, pool) if pool else on_host(works)
            return stretches
        except Exception as error:
            if "CUDA error" in str(error):  # the device is lost to this process
                raise
            trial.refused[str(variant)] = " ".join(str(error).split())[:200]
            return None

    def _mistake(self) -> str | None:
        """What is wrong with the variant in the table, or None."""
        for case in self.trial.cases:
            call = self.calls[case.label][0]
            found = tensors.error_of(case, call, rungs.bound(self.kernel, case, call)())
            if found.wrong:
                return f"{case.label}: an error of {found.worst:.3g} where {found.allowed:.3g} is allowed"
        return self._ragged_mistake()

    def _ragged_mistake(self) -> str | None:
        """What is wrong on a ragged batch, causal and full, beside the op's reference."""
        op, case = REGISTRY["attention"], self.trial.cases[0]
        dtype = getattr(torch, case.dtype)
        spans = ((1, 17, 113, 0), (40, 17, 203, 9)) if case.new > 1 else ((1, 1, 1), (40, 1, 333))
        limit = op.tolerance[case.dtype]
        for causal in (True, False):
            heads, page = 2 * case.heads // case.kv_heads, case.page
            inputs = attention_inputs(self.device, dtype, heads, 2, case.head_dim, page, None, *spans, causal=causal)
            if self.kernel.accepts is not None and self.kernel.accepts(**inputs) is not None:
                continue  # full attention is nothing that every kernel does
            out, expected = self.kernel.call(**inputs), op.reference(**inputs)
            if not torch.isfinite(out).all():
                return "a number that is none, on a ragged batch"
            excess = (out.float() - expected.float()).abs() - limit.absolute - limit.relative * expected.float().abs()
            if excess.max() > 0:
                return f"{excess.max().item():.3g} beyond the op's tolerance on a ragged batch"
        return None

    def _final(self, present: Any, rivals: Sequence[Any], pool: GraphPool | None, tell: Callable[[str], None]) -> None:
        """The best few beside the present entry, case by case, in alternating rounds."""
        trial = self.trial
        ready = {variant: self._ready(variant, pool) for variant in (present, *rivals)}
        arms = {variant: stretches for variant, stretches in ready.items() if stretches is not None}
        seconds: dict[Any, list[list[float]]] = {variant: [] for variant in arms}
        for case in trial.cases:
            tell(f"{len(arms)} finalists, {case.label}")
            taken = alternate({str(v): stretches[case.label] for v, stretches in arms.items()}, self.settings.rounds)
            for variant in arms:
                seconds[variant].append(taken[str(variant)])
        gains = {}
        for variant in arms:
            if variant != present:
                by_round = zip(*(
                    [a / b for a, b in zip(before, after)] for before, after in zip(seconds[present], seconds[variant])
                ))  # fmt: skip
                gains[variant] = interval([geometric_mean(ratio) for ratio in by_round])
        best = max(gains, key=lambda variant: gains[variant].median, default=None)
        if best is not None and gains[best].low > 1:
            trial.winner, trial.gain = best, list(gains[best])


def words(result: Mapping[str, Any]) -> Table:
    """The result as a table of words."""
    rows = []
    for one in result["entries"]:
        before = one["before"]
        changed = {name: value for name, value in (one["after"] or {}).items() if value != before[name]}
        shown = ", ".join(f"{name} {before[name]} -> {value}" for name, value in changed.items()) or "stays"
        gain = "" if one["gain"] is None else times(one["gain"], 3)
        left = f"{len(one['refused'])} / {len(one['wrong'])}"
        rows.append((one["table"], one["key"], str(one["tried"]), left, shown, gain))
    columns = ("table", "entry", "variants", "refused / wrong", "choice", "speed over before")
    return Table(f"Tables of the attention kernels on {result['device']['name']}", columns, tuple(rows))
