"""What the live page shows: the recent past of an engine, kept as steps and requests come by, told as plain data.

Knows StepRecords, costs, a roofline and times of requests. It must not know HTTP, text or tensors, nor who asks.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ridgeline.core.cost import Cost
from ridgeline.core.step import StepRecord, Verified
from ridgeline.dashboard.histogram import Histogram
from ridgeline.perf.roofline import COMPUTE, MEMORY, Roofline

HISTORY_S = 120
"""Seconds of the curves over time."""
WINDOW_S = 300.0
"""Seconds of requests whose times are in the distributions."""
RATE_S = 5
"""Whole seconds over which present rates are taken."""
STEPS = 160
"""Steps of each kind that stand in the two pictures of steps."""
OPERATING_S = 10
"""Seconds of steps that make an operating point."""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What stays as it is while an engine runs.

    roofline: the machine's roofs in the model's dtype, None if nobody knows; roofs: where they come from, such
    as "measured on this machine" or the name of a card. word(token): its text, where drafted trees may show it.
    """

    model: str
    device: str
    dtype: str
    version: str
    num_blocks: int
    block_size: int
    max_num_seqs: int
    max_model_len: int
    roofline: Roofline | None = None
    roofs: str = ""
    word: Callable[[int], str] | None = None


@dataclass(frozen=True, slots=True)
class Now:
    """What the server knows better than the last step's record: a queue may be in front of the engine.

    state: "ready", or another word, such as "starting", "restarting", "draining", "silent" or "failed".
    """

    state: str
    running: int
    waiting: int


@dataclass(frozen=True, slots=True)
class Step:
    """A step that has ended, as the page needs it; what a StepRecord says, in fewer words.

    output_tokens: that came out of it; prompt_tokens: that it computed. flops, bytes: its floor, as the performance
    model counts it; 0 if nobody counts. rows: requests that got a next token. drafted, accepted, draft_s: as in the
    record; depths: accepted nodes of each tree, if they are told one by one; verified: a tree to look at.
    """

    kind: str
    output_tokens: int
    prompt_tokens: int
    device_s: float
    predicted_s: float | None
    running: int
    waiting: int
    free_blocks: int
    preempted: int = 0
    flops: float = 0.0
    bytes: float = 0.0
    rows: int = 0
    drafted: int = 0
    accepted: int = 0
    draft_s: float = 0.0
    depths: tuple[int, ...] = ()
    verified: Verified | None = None

    @classmethod
    def of(cls, record: StepRecord, cost: Cost | None = None) -> Step:
        """A record, and the cost that its spans were priced at."""
        prompt = sum(new for new, _ in record.spans if new > 1)
        if record.drafted:  # a request's last token and its nodes are one chunk
            prompt = max(sum(new for new, _ in record.spans) - record.drafted - record.sampled, 0)
        return cls(
            kind=record.kind,
            output_tokens=record.tokens,
            prompt_tokens=prompt,
            device_s=record.device_s,
            predicted_s=record.predicted_s,
            running=record.running,
            waiting=record.waiting,
            free_blocks=record.free_blocks,
            preempted=record.preempted,
            flops=0.0 if cost is None else cost.flops,
            bytes=0.0 if cost is None else cost.bytes,
            rows=record.sampled,
            drafted=record.drafted,
            accepted=record.accepted,
            draft_s=record.draft_s,
            depths=tuple(len(one.accepted) for one in record.verified),
            verified=record.verified[-1] if record.verified else None,
        )


@dataclass(slots=True)
class _Work:
    """Steps together whose cost is known. floor_s: least time of their costs under the roofs."""

    steps: int = 0
    flops: float = 0.0
    bytes: float = 0.0
    device_s: float = 0.0
    floor_s: float = 0.0

    def add(self, other: _Work) -> None:
        self.steps += other.steps
        self.flops += other.flops
        self.bytes += other.bytes
        self.device_s += other.device_s
        self.floor_s += other.floor_s


@dataclass(slots=True)
class _Drafts:
    """Steps together that verified drafts. step_s: what they took, drafting included."""

    steps: int = 0
    rows: int = 0
    drafted: int = 0
    accepted: int = 0
    draft_s: float = 0.0
    step_s: float = 0.0
    trees: int = 0
    reached: Counter[int] = field(default_factory=Counter)  # depth -> trees accepted at least so deep

    @classmethod
    def of(cls, step: Step) -> _Drafts:
        reached = Counter(depth for end in step.depths for depth in range(1, end + 1))
        step_s = step.device_s + step.draft_s
        return cls(1, step.rows, step.drafted, step.accepted, step.draft_s, step_s, len(step.depths), reached)

    def add(self, other: _Drafts) -> None:
        self.steps += other.steps
        self.rows += other.rows
        self.drafted += other.drafted
        self.accepted += other.accepted
        self.draft_s += other.draft_s
        self.step_s += other.step_s
        self.trees += other.trees
        self.reached += other.reached

    def shares(self) -> dict[str, float | None]:
        """acceptance: of the drafted tokens; tokens_per_step: of a request, its own token included; draft_share: of
        the steps' time."""
        return {
            "acceptance": self.accepted / self.drafted if self.drafted else None,
            "tokens_per_step": 1 + self.accepted / self.rows if self.rows else None,
            "draft_share": self.draft_s / self.step_s if self.step_s > 0 else None,
        }


@dataclass(slots=True)
class _Second:
    """Sums over one second; running, waiting and used blocks as its last step left them. asked: prompt tokens of
    requests that ended; hits: those of them that were in the prefix cache."""

    number: int
    steps: int = 0
    output_tokens: int = 0
    prompt_tokens: int = 0
    device_s: float = 0.0
    running: int = 0
    waiting: int = 0
    used_blocks: int = 0
    asked: int = 0
    hits: int = 0
    work: dict[str, _Work] = field(default_factory=dict)
    drafts: _Drafts = field(default_factory=_Drafts)


class Board:
    """Listens; `snapshot` says what the page draws. One thread at a time.

    clock: seconds, never going back; steps are dated by it when they arrive.
    """

    def __init__(self, facts: Facts, clock: Callable[[], float] = time.monotonic) -> None:
        self.facts = facts
        self._clock = clock
        self._start_s = clock()
        self._seconds: deque[_Second] = deque(maxlen=HISTORY_S + 1)
        self._points: dict[str, deque[tuple[float, float]]] = {}
        self._pairs: dict[str, deque[tuple[float, float]]] = {}
        self._ttft, self._tpot = Histogram(WINDOW_S), Histogram(WINDOW_S)
        self._prefixes: deque[tuple[float, int, int]] = deque(maxlen=4096)
        self._ended: Counter[str] = Counter()
        self._tokens: Counter[str] = Counter()
        self._last: Step | None = None
        self._speculates = False
        self._verified: Verified | None = None

    # What comes by

    def step(self, step: Step) -> None:
        """A step has ended."""
        second = self._second(self._clock())
        second.steps += 1
        second.output_tokens += step.output_tokens
        second.prompt_tokens += step.prompt_tokens
        second.device_s += step.device_s
        second.running, second.waiting = step.running, step.waiting
        second.used_blocks = self.facts.num_blocks - step.free_blocks
        self._tokens.update(output=step.output_tokens, prompt=step.prompt_tokens, preempted=step.preempted)
        self._last = step
        if step.drafted:
            self._speculates = True
            second.drafts.add(_Drafts.of(step))
            self._verified = step.verified or self._verified
        if step.device_s <= 0:
            return
        if step.predicted_s is not None:
            self._kept(self._pairs, step.kind).append((step.predicted_s, step.device_s))
        roofline = self.facts.roofline
        if step.bytes and roofline is not None:
            self._kept(self._points, step.kind).append((step.flops / step.bytes, step.flops / step.device_s))
            floor_s = roofline.seconds(Cost(step.flops, step.bytes))
            work = _Work(1, step.flops, step.bytes, step.device_s, floor_s)
            second.work.setdefault(step.kind, _Work()).add(work)

    def first_token(self, ttft_s: float) -> None:
        """A request got its first token, so many seconds after it arrived."""
        self._ttft.add(self._clock(), ttft_s)

    def finished(
        self, reason: str, prompt_tokens: int = 0, cached_tokens: int = 0, tpot_s: float | None = None
    ) -> None:
        """A request has ended. reason: "stop", "length", "abort", "error" or "refused".

        tpot_s: mean time of its tokens after the first, if it had two or more.
        """
        now = self._clock()
        self._ended[reason] += 1
        if prompt_tokens:
            self._prefixes.append((now, prompt_tokens, cached_tokens))
            second = self._second(now)
            second.asked += prompt_tokens
            second.hits += cached_tokens
        if tpot_s is not None:
            self._tpot.add(now, tpot_s)

    def _second(self, now: float) -> _Second:
        number = int(now - self._start_s)
        last = self._seconds[-1] if self._seconds else _Second(-1)
        if last.number != number:
            self._seconds.append(_held(last, number))
        return self._seconds[-1]

    @staticmethod
    def _kept(steps: dict[str, deque[tuple[float, float]]], kind: str) -> deque[tuple[float, float]]:
        return steps.setdefault(kind, deque(maxlen=STEPS))

    # What is told

    def snapshot(self, now: Now | None = None) -> dict[str, Any]:
        """Everything that the page draws: plain numbers, strings and lists, seconds and tokens a second."""
        at = self._clock()
        last = self._last
        if now is None:
            now = Now("ready", 0 if last is None else last.running, 0 if last is None else last.waiting)
        return {
            "uptime_s": round(at - self._start_s, 3),
            "state": now.state,
            "engine": self._engine(),
            "now": {"running": now.running, "waiting": now.waiting, **self._rates(at)},
            "totals": {
                "requests": dict(self._ended),
                "output_tokens": self._tokens["output"],
                "prompt_tokens": self._tokens["prompt"],
                "preemptions": self._tokens["preempted"],
            },
            "series": self._series(at),
            "ttft": self._ttft.as_dict(at),
            "tpot": self._tpot.as_dict(at),
            "roofline": self._roofline(at),
            "prediction": self._prediction(),
            "speculation": self._speculation(at) if self._speculates else None,
        }

    def _engine(self) -> dict[str, Any]:
        facts = self.facts
        return {
            "model": facts.model,
            "device": facts.device,
            "dtype": facts.dtype,
            "version": facts.version,
            "max_num_seqs": facts.max_num_seqs,
            "max_model_len": facts.max_model_len,
            "kv_tokens": facts.num_blocks * facts.block_size,
            "block_size": facts.block_size,
        }

    def _rates(self, at: float) -> dict[str, Any]:
        """Over the last whole seconds; in the very first one, over what has passed of it."""
        passed = at - self._start_s
        end = max(int(passed), 1)
        seconds = [one for one in self._seconds if end - RATE_S <= one.number < end]
        length = min(RATE_S, passed, end) or 1.0
        while self._prefixes and self._prefixes[0][0] < at - WINDOW_S:
            self._prefixes.popleft()
        asked = sum(prompt for _, prompt, _ in self._prefixes)
        hit = sum(cached for _, _, cached in self._prefixes)
        used = 0 if self._last is None else self.facts.num_blocks - self._last.free_blocks
        return {
            "output_tokens_per_s": sum(one.output_tokens for one in seconds) / length,
            "prompt_tokens_per_s": sum(one.prompt_tokens for one in seconds) / length,
            "steps_per_s": sum(one.steps for one in seconds) / length,
            "busy": min(sum(one.device_s for one in seconds) / length, 1.0),
            "kv_usage": used / max(self.facts.num_blocks, 1),
            "prefix_hit_rate": hit / asked if asked else None,
        }

    def _series(self, at: float) -> dict[str, Any]:
        """One value a whole second, the oldest first; requests and blocks keep their value through idle seconds,
        prefix hits have none where no request ended."""
        end = int(at - self._start_s)
        begin = max(end - HISTORY_S, 0)
        known = {one.number: one for one in self._seconds}
        held = next((one for one in reversed(self._seconds) if one.number < begin), _Second(begin))
        names = ("output_tokens", "prompt_tokens", "running", "waiting")
        result: dict[str, list[float | None]] = {name: [] for name in (*names, "kv_usage", "prefix_hits")}
        for number in range(begin, end):
            found = known.get(number)
            held = found or _held(held, number)
            for name in names:
                result[name].append(getattr(held, name))
            result["kv_usage"].append(round(held.used_blocks / max(self.facts.num_blocks, 1), 4))
            result["prefix_hits"].append(round(held.hits / held.asked, 4) if held.asked else None)
        return {"step_s": 1, "history_s": HISTORY_S, **result}

    def _roofline(self, at: float) -> dict[str, Any] | None:
        """The roofs, recent steps under them, and where each kind of step stands now."""
        roofline = self.facts.roofline
        if roofline is None:
            return None
        points: dict[str, _Work] = {}
        every = _Work()
        for second in self._seconds:
            if second.number > at - self._start_s - OPERATING_S - 1:
                for kind, work in second.work.items():
                    points.setdefault(kind, _Work()).add(work)
                    every.add(work)
        return {
            "roofs": self.facts.roofs,
            "flops_per_s": roofline.matrix_flops,
            "bytes_per_s": roofline.bytes_per_s,
            "ridge": roofline.ridge,
            "steps": {kind: [_figures(*point) for point in kept] for kind, kept in self._points.items() if kept},
            "points": {kind: _point(work, roofline) for kind, work in points.items()},
            "all": _point(every, roofline) if every.steps else None,
        }

    def _prediction(self) -> dict[str, Any] | None:
        """Predicted and measured seconds of recent steps; the errors are |predicted / measured - 1|."""
        ratios = sorted(predicted / measured - 1 for kept in self._pairs.values() for predicted, measured in kept)
        if not ratios:
            return None
        errors = sorted(map(abs, ratios))
        return {
            "steps": {kind: [_figures(*pair) for pair in kept] for kind, kept in self._pairs.items() if kept},
            "median_error": errors[len(errors) // 2],
            "p90_error": errors[min(int(0.9 * len(errors)), len(errors) - 1)],
            "median_bias": ratios[len(ratios) // 2],
        }

    def _speculation(self, at: float) -> dict[str, Any]:
        """Drafts of the last minutes, together and second by second (None where there were none), and the latest."""
        end = int(at - self._start_s)
        begin = max(end - HISTORY_S, 0)
        every = _Drafts()
        for second in self._seconds:
            if second.number >= begin:
                every.add(second.drafts)
        known = {one.number: one.drafts.shares() for one in self._seconds}
        nothing = _Drafts().shares()
        series: dict[str, list[float | None]] = {name: [] for name in nothing}
        for number in range(begin, end):
            for name, value in known.get(number, nothing).items():
                series[name].append(None if value is None else round(value, 3))
        return {
            "steps": every.steps,
            "drafted": every.drafted,
            "accepted": every.accepted,
            "draft_s": every.draft_s / every.steps if every.steps else None,
            **every.shares(),
            "by_depth": [round(every.reached[depth] / every.trees, 4) for depth in sorted(every.reached)],
            "series": series,
            "tree": None if self._verified is None else self._tree(self._verified),
        }

    def _tree(self, verified: Verified) -> dict[str, Any]:
        """words: of its nodes, root: of the token before them; None where they must not be shown."""
        root, tree, accepted = verified
        word = self.facts.word
        return {
            "root": None if word is None else word(root),
            "words": None if word is None else [word(token) for token in tree.tokens],
            "parents": list(tree.parents),
            "accepted": list(accepted),
        }


def _held(second: _Second, number: int) -> _Second:
    """A second in which nothing happened, after one in which something did."""
    return _Second(number, running=second.running, waiting=second.waiting, used_blocks=second.used_blocks)


def _point(work: _Work, roofline: Roofline) -> dict[str, Any]:
    """Where these steps stand together. share: their least possible time in their time."""
    cost = Cost(work.flops, work.bytes)
    return {
        "intensity": work.flops / work.bytes,
        "flops_per_s": work.flops / work.device_s,
        "bytes_per_s": work.bytes / work.device_s,
        "share": work.floor_s / work.device_s,
        "bound": COMPUTE if roofline.compute_s(cost) > roofline.memory_s(cost) else MEMORY,
        "steps": work.steps,
    }


def _figures(*values: float) -> list[float]:
    """Four figures are enough for a picture."""
    return [float(f"{value:.4g}") for value in values]
