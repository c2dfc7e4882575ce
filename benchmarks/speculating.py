"""Decoding with and without drafts in one engine: prompts, arms, runs, and what was accepted.

Knows an engine whose speculator can be exchanged between runs, and HumanEval's prompts, which are not part of this
repository. It must not know which arms are compared, nor on what machine.

All arms share one target, its pages and its kernels. Each has a speculator of its own, which keeps what it learns from
run to run, as a server's does.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import ROOT
from benchmarks.record import Interval, alternate, interval, losing, ratios, seconds
from ridgeline import LLM, SamplingParams
from ridgeline.core.request import Request
from ridgeline.core.speculation import Speculation
from ridgeline.core.step import StepRecord
from ridgeline.core.tree import ROOT as TREE_ROOT
from ridgeline.speculate.acceptance import DEEPEST
from ridgeline.speculate.speculator import CONSIDERED, WIDTH, Round, Speculator
from ridgeline.speculate.tree_size import Price, Sizes, choose_sizes, likeliest

HUMAN_EVAL = Path("data") / "prompts" / "human_eval_first_half.jsonl"
GRAM, REPEATS = 8, 2
"""A continuation loops if a run of GRAM tokens stands in it more than REPEATS times."""


def human_eval(path: Path | None = None) -> list[str]:
    """The prompts of a file of HumanEval, one JSON object a line; of a folder `shared` in the repository or beside it
    if no file is named. Raises SystemExit if there is none."""
    places = [path] if path is not None else [place / "shared" / HUMAN_EVAL for place in (ROOT, ROOT.parent)]
    for place in places:
        if place.is_file():
            lines = place.read_text(encoding="utf-8").splitlines()
            return [str(json.loads(line)["prompt"]) for line in lines if line.strip()]
    looked = ", ".join(str(place) for place in places)
    raise SystemExit(f"HumanEval's prompts are not here ({looked}); --prompts names a file with one JSON a line")


def cycled(prompts: Sequence[str], count: int) -> list[str]:
    """So many prompts: those that there are, and again with a first comment line that tells them apart."""
    rounds = -(-count // len(prompts))
    every = [*prompts, *(f"# {number}\n{prompt}" for number in range(1, rounds) for prompt in prompts)]
    return every[:count]


def loops(ids: Sequence[int]) -> bool:
    """Whether a continuation repeats an 8-gram more than twice: small models do, and loops flatter drafters."""
    grams = Counter(tuple(ids[at : at + GRAM]) for at in range(len(ids) - GRAM + 1))
    return max(grams.values(), default=0) > REPEATS


@dataclass(frozen=True)
class Arm:
    """One way to decode. config: a speculative_config without `model`, None for no speculation; drafters: which of the
    engine's draft models it uses, all if None."""

    name: str
    config: Mapping[str, Any] | None
    drafters: tuple[int, ...] | None = None

    @property
    def sized(self) -> bool:
        """Whether the sizer chooses, and not the arm."""
        return self.config is not None and "tree" not in self.config and "num_speculative_tokens" not in self.config


NONE = Arm("none", None)
LEAST, NEAR_BEST = 0.97, 0.97
"""What speed must be at least: of no speculation, and of the best static choice."""


@dataclass
class Counts:
    """Trials and hits by depth (from 1) and rank (from 0): a trial is a node whose parent was accepted."""

    trials: Counter[tuple[int, int]] = field(default_factory=Counter)
    hits: Counter[tuple[int, int]] = field(default_factory=Counter)
    lengths: Counter[int] = field(default_factory=Counter)
    """Tokens that a verified tree brought -> how often."""

    def hear(self, told: Round) -> None:
        """What came of one tree."""
        accepted = set(told.accepted)
        for node, parent in enumerate(told.tree.parents):
            if parent == TREE_ROOT or parent in accepted:
                place = (told.tree.depths[node], told.ranks[node])
                self.trials[place] += 1
                self.hits[place] += node in accepted
        self.lengths[len(told.tokens)] += 1

    def __add__(self, other: Counts) -> Counts:
        return Counts(self.trials + other.trials, self.hits + other.hits, self.lengths + other.lengths)

    def chance(self, depth: int, rank: int) -> float:
        """Of a node under an accepted parent; the deepest that was tried stands for those below it."""
        while depth > 1 and not self.trials[depth, rank]:
            depth -= 1
        trials = self.trials[depth, rank]
        return self.hits[depth, rank] / trials if trials else 0.0

    def reached(self) -> list[float]:
        """The share of trees whose accepted path is at least so deep, from depth 1 on."""
        trees, deepest = sum(self.lengths.values()), max(self.lengths, default=1) - 1
        return [
            sum(count for tokens, count in self.lengths.items() if tokens > depth) / trees
            for depth in range(1, deepest + 1)
        ]

    def as_dict(self) -> dict[str, Any]:
        """[hits, trials] by depth and rank, and how many tokens a tree brought."""
        deepest = max((depth for depth, _ in self.trials), default=0)
        widest = max((rank for _, rank in self.trials), default=-1)
        return {
            "hits_of_trials_by_depth_and_rank": [
                [[self.hits[depth, rank], self.trials[depth, rank]] for rank in range(widest + 1)]
                for depth in range(1, deepest + 1)
            ],
            "trees_by_tokens": dict(sorted(self.lengths.items())),
        }


@dataclass
class Run:
    """Requests decoded side by side. ids: of each, its output tokens; tokens: that were committed within decode_s
    seconds, all requests together, while all were decoding; steps, drafted, accepted, draft_s: within that time;
    context: mean length halfway."""

    ids: list[list[int]]
    tokens: int
    decode_s: float
    steps: int
    drafted: int
    accepted: int
    draft_s: float
    context: float

    @property
    def rate(self) -> float:
        return self.tokens / self.decode_s


class Sides:
    """An LLM whose drafting is exchanged between runs. It was built with the draft models that any arm uses.

    Raises AssertionError if a step is not exactly one pass of the target.
    """

    def __init__(self, llm: LLM, arms: Sequence[Arm]) -> None:
        self.llm = llm
        self.arms = list(arms)
        built = llm.built
        self.base = built.speculator
        self.speculators = {arm.name: self._speculator(arm) for arm in arms}
        self.counts = {arm.name: Counts() for arm in arms}
        self._passes = 0
        self._number = 0
        start = built.runner.start

        def counted(*args: Any, **more: Any) -> Any:
            self._passes += 1
            return start(*args, **more)

        built.runner.start = counted  # type: ignore[method-assign]

    def _speculator(self, arm: Arm) -> Speculator | None:
        if arm.config is None:
            return None
        base = self.base
        assert base is not None, "build the LLM with speculative_config"
        asked = Speculation.of(arm.config)
        drafters = range(len(base.models)) if arm.drafters is None else arm.drafters
        models = [] if asked.method == "ngram" else [base.models[place] for place in drafters]
        prices = base.seconds.copy(), base.plain_seconds.copy(), base.draft_seconds.copy()
        level = base.level_seconds.copy() if base.level_seconds is not None and models else None
        return Speculator(asked, models, *prices, base.most_rows, level_seconds=level)

    def priced(self, name: str) -> dict[str, Any]:
        """What an arm's speculator takes for the seconds of a step with trees by its rows, of one without and of a pass
        of drafting by requests, and of a level of drafts on the device."""
        one = self.speculators[name]
        assert one is not None
        rows, requests = one.seconds.sizes or (2, 3, 5, 9, 17, 33, 65, 129, 256), (1, 4, 8, 16, 32, 64, 128, 256)
        return {
            "with_trees_s": {count: one.seconds(count) for count in rows},
            "plain_s": {count: one.plain_seconds(count) for count in requests},
            "draft_s": {count: one.draft_seconds(count) for count in requests},
            "level_s": {} if one.level_seconds is None else {count: one.level_seconds(count) for count in requests},
        }

    def take(self, arm: Arm) -> None:
        """Nothing is under way: the next steps draft as this arm does."""
        engine = self.llm.built.engine
        assert not engine.has_work
        engine.speculator = self.speculators[arm.name]

    def run(self, arm: Arm, prompts: Sequence[str], params: SamplingParams, tokens: int, listen: bool = False) -> Run:
        """Decode until every request has `tokens` of output. The clock starts when all prompts are computed and stops
        before any request ends, so the batch is full throughout. listen: count what is accepted (takes time)."""
        engine, speculator = self.llm.built.engine, self.speculators[arm.name]
        self.take(arm)
        self._number += 1
        requests: list[Request] = []
        for place, prompt in enumerate(prompts):
            requests += self.llm.intake.requests(f"{arm.name}/{self._number}/{place}", prompt, params)[1]
        if speculator is not None and listen:
            speculator.listeners.append(self.counts[arm.name].hear)
        records: list[StepRecord] = []
        for request in requests:
            engine.add(request)
        while any(len(request.tokens) == request.prompt_len for request in requests):
            engine.step()
        engine.listeners.append(records.append)
        before, passes = _lengths(requests), self._passes
        start = time.perf_counter()
        while min(len(request.tokens) - request.prompt_len for request in requests) < tokens:
            engine.step()
        decode_s = time.perf_counter() - start
        passes = self._passes - passes
        after = _lengths(requests)
        engine.listeners.remove(records.append)
        for request in requests:
            engine.abort(request.request_id)
        if speculator is not None:
            speculator.listeners.clear()
        # With overlap, one step is read that was dispatched before, or the other way round.
        assert abs(len(records) - passes) <= int(engine.overlap), "a step is one pass of the target"
        return Run(
            [request.tokens[request.prompt_len :] for request in requests],
            sum(after) - sum(before),
            decode_s,
            len(records),
            sum(one.drafted for one in records),
            sum(one.accepted for one in records),
            sum(one.draft_s for one in records),
            (sum(before) + sum(after)) / 2 / len(requests),
        )


def _lengths(requests: Sequence[Request]) -> list[int]:
    return [len(request.tokens) for request in requests]


def settings(temperature: float) -> SamplingParams:
    """As each request is sampled; it ends when the clock has stopped."""
    seed = 7 if temperature else None
    return SamplingParams(temperature=temperature, seed=seed, max_tokens=None, ignore_eos=True, detokenize=False)


def apart(sides: Sides, prompts: Sequence[str], wanted: int, tokens: int) -> tuple[list[str], list[str]]:
    """Prompts whose greedy continuation does not loop, no more than are wanted, and those before them whose does."""
    plain: list[str] = []
    looping: list[str] = []
    for prompt in prompts:
        if len(plain) >= wanted:
            break
        ids = sides.run(NONE, [prompt], settings(0.0), tokens).ids[0]
        (looping if loops(ids) else plain).append(prompt)
    return (plain, looping) if plain else (looping, [])


COLUMNS = ["", "tok/s", "÷ none", "÷ best static", "tokens a step", "nodes a step", "accepted", "drafting", "same"]


@dataclass
class Compared:
    """Arms on the same prompts. rates: tokens a second of each round; best_static: the fastest arm whose sizes are
    given (none is one of them)."""

    batch: int
    runs: Mapping[str, Sequence[Run]]
    rates: Mapping[str, Sequence[float]]
    best_static: str
    same: Mapping[str, float]
    """Of each arm, the share of requests whose output is that of no speculation, token for token."""
    context: float
    """Mean tokens of a request halfway."""

    def over(self, name: str, other: str) -> Interval:
        return ratios(self.rates[name], self.rates[other])

    def median(self, name: str) -> float:
        """Tokens a second of an arm."""
        return median(self.rates[name])

    def accepted_share(self, name: str) -> float:
        """Of an arm's verified nodes."""
        return sum(one.accepted for one in self.runs[name]) / max(1, sum(one.drafted for one in self.runs[name]))

    def as_dict(self) -> dict[str, Any]:
        return {"best_static": self.best_static, "arms": {name: self._arm(name) for name in self.runs}}

    def _arm(self, name: str) -> dict[str, Any]:
        runs = self.runs[name]
        steps, drafted = sum(one.steps for one in runs), sum(one.drafted for one in runs)
        return {
            "tokens_per_s": interval(self.rates[name]),
            "over_none": self.over(name, NONE.name),
            "over_best_static": self.over(name, self.best_static),
            "tokens_a_step": sum(one.tokens for one in runs) / steps / self.batch,
            "nodes_a_step": drafted / steps / self.batch,
            "accepted_share": self.accepted_share(name),
            "draft_share_of_time": sum(one.draft_s for one in runs) / sum(one.decode_s for one in runs),
            "same_outputs": self.same[name],
        }

    def timings(self) -> dict[str, Any]:
        """Raw, run by run."""
        return {
            name: {
                "decode_s": seconds(one.decode_s for one in runs),
                "tokens": [one.tokens for one in runs],
                "steps": [one.steps for one in runs],
            }
            for name, runs in self.runs.items()
        }

    def rows(self) -> list[list[str]]:
        """Of a table with COLUMNS."""
        found = []
        for name in self.runs:
            one = self._arm(name)
            over, best = one["over_none"], one["over_best_static"]
            found.append(
                [
                    name,
                    one["tokens_per_s"].show(".0f"),
                    losing(over.show(), over.median < LEAST),
                    losing(best.show(), best.median < NEAR_BEST),
                    f"{one['tokens_a_step']:.2f}",
                    f"{one['nodes_a_step']:.1f}",
                    f"{100 * one['accepted_share']:.0f} %",
                    f"{100 * one['draft_share_of_time']:.0f} %",
                    f"{100 * one['same_outputs']:.0f} %",
                ]
            )
        return found


def compare(
    sides: Sides,
    arms: Sequence[Arm],
    batch: int,
    temperature: float,
    prompts: Sequence[str],
    tokens: int,
    rounds: int,
    listen: bool = True,
) -> Compared:
    """All arms on the same prompts, in groups of `batch`: a round is all groups, arms alternate group by group. What
    is accepted is counted in the round that warms up."""
    groups = [prompts[first : first + batch] for first in range(0, len(prompts), batch)]
    params = settings(temperature)

    def decode(arm: Arm, number: int) -> Run:
        return sides.run(arm, groups[number % len(groups)], params, tokens, listen=listen and number < 0)

    runs = alternate(
        {arm.name: lambda number, arm=arm: decode(arm, number) for arm in arms},  # type: ignore[misc]
        rounds * len(groups),
        warm=len(groups),
    )
    same = {}
    for name, ours in runs.items():
        pairs = [pair for one, none in zip(ours, runs[NONE.name]) for pair in zip(one.ids, none.ids)]
        same[name] = sum(first_difference(one, other) is None for one, other in pairs) / len(pairs)
    rates = {name: _by_round(ours, len(groups)) for name, ours in runs.items()}
    best = max((arm.name for arm in arms if not arm.sized), key=lambda name: median(rates[name]))
    context = sum(one.context for one in runs[NONE.name]) / len(runs[NONE.name])
    return Compared(batch, runs, rates, best, same, context)


def _by_round(runs: Sequence[Run], groups: int) -> list[float]:
    rounds = [runs[first : first + groups] for first in range(0, len(runs), groups)]
    return [sum(one.tokens for one in part) / sum(one.decode_s for one in part) for part in rounds]


def bound(
    counts: Counts,
    requests: int,
    target: Price,
    draft: Price,
    plain: Price | None = None,
    level_s: float | None = None,
) -> Sizes:
    """The most tokens a second that trees can make by the sizer's own formula: with chances as they were counted, at
    given seconds by rows of the target's step with trees (and without: plain), of a pass of drafting, and of a level of
    drafts on the device, if that is where they are made."""
    shape = likeliest(counts.chance, WIDTH, DEEPEST, CONSIDERED)
    return choose_sizes(requests, 0, shape, DEEPEST, target, draft, plain=plain, level_s=level_s)


def first_difference(one: Sequence[int], other: Sequence[int]) -> int | None:
    """Where two outputs part, as far as both go; None if nowhere."""
    return next((at for at, (a, b) in enumerate(zip(one, other)) if a != b), None)
