"""What token trees did for each request: acceptance by depth, rank and drafter, tokens a step, time, and why so.

Knows verified trees (Round), step records, requests' outputs and the sizer's prices. It must not know how trees are
drafted, verified or sized. Rates of acceptance are of what verification found; a tree's nodes behind the end of an
output count there, but not among the tokens of the request.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ridgeline.core.errors import InvalidArgument
from ridgeline.core.tree import ROOT

if TYPE_CHECKING:
    from ridgeline.core.request import RequestOutput, SamplingParams
    from ridgeline.core.speculation import Speculation
    from ridgeline.core.step import StepRecord
    from ridgeline.engine.build import Built
    from ridgeline.llm import LLM
    from ridgeline.speculate.speculator import Round
    from ridgeline.speculate.tree_size import Sizes

ENDINGS = ("leaf", "cut", "unknown", "end")
"""How a round's path ended: at a leaf, where the tree had no more; at a token that its drafter had proposed and that
was left out of the tree; at one that it had not proposed; or because the output was complete."""

NO_TREE = ("none pays", "nothing likely", "no room")
"""Why a step of decoding had no tree: no size was expected to be faster; nothing drafted was likely enough, or no run
of tokens had occurred before; or each request was at its last token."""

EMBEDDED_DRAFTER = "the embedded drafter"
NGRAM = "n-grams"
SPACES = {" ": "·", "\n": "↵", "\t": "⇥", "\r": "␍"}
RAISED = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")
LONGEST_RUN = 3


@dataclass(slots=True)
class Count:
    """Nodes of trees. drafted; tried: those whose parent was accepted; accepted."""

    drafted: int = 0
    tried: int = 0
    accepted: int = 0

    @property
    def rate(self) -> float | None:
        """Chance of a node that is tried."""
        return self.accepted / self.tried if self.tried else None

    def as_dict(self) -> dict[str, Any]:
        return {"drafted": self.drafted, "tried": self.tried, "accepted": self.accepted, "rate": self.rate}


@dataclass(frozen=True, slots=True)
class Verified:
    """A round within its workload.

    number: from 1. plain_s: what a step of the same requests takes without trees, by the sizer's prices, an estimate;
    None where the step also held prompts. tokens, accepted: those that are part of the output.
    """

    number: int
    round: Round
    plain_s: float | None
    tokens: int
    accepted: int

    @property
    def stop(self) -> int:
        """The node, or ROOT, behind which the target chose a token of its own."""
        return self.round.accepted[-1] if self.round.accepted else ROOT

    @property
    def cut_rank(self) -> int | None:
        """The rank of the target's own token among what was proposed and left out of the tree, if it was."""
        return self.round.cut.get((self.stop, self.round.tokens[-1]))

    @property
    def ending(self) -> str:
        """One of ENDINGS."""
        if self.tokens < len(self.round.tokens):
            return "end"
        if self.cut_rank is not None:
            return "cut"
        return "unknown" if self.round.tree.children(self.stop) else "leaf"

    @property
    def seconds(self) -> float:
        """Of drafting and of the step, for all its requests together: so long each of them waited."""
        return self.round.draft_s + self.round.step_s

    @property
    def saved_s(self) -> float | None:
        """Against as many plain steps as the round brought tokens: an estimate."""
        return None if self.plain_s is None else self.tokens * self.plain_s - self.seconds

    def as_dict(self) -> dict[str, Any]:
        tree = self.round.tree
        return {
            "round": self.number,
            "known_tokens": self.round.before,
            "nodes": len(tree),
            "depth": tree.depth,
            "tokens": self.tokens,
            "accepted": self.accepted,
            "path": list(self.round.accepted),
            "ending": self.ending,
            "cut_rank": self.cut_rank,
            "draft_s": self.round.draft_s,
            "step_s": self.round.step_s,
            "requests": self.round.requests,
            "plain_step_s": self.plain_s,
            "saved_s": self.saved_s,
        }


@dataclass(frozen=True)
class Acceptance:
    """Counts of the nodes of some rounds: by depth (from 1), by rank among siblings (from 0), by both, by drafter."""

    by_depth: dict[int, Count]
    by_rank: dict[int, Count]
    by_both: dict[tuple[int, int], Count]
    by_source: dict[int, Count]

    @classmethod
    def of(cls, rounds: Iterable[Round]) -> Acceptance:
        found = cls({}, {}, {}, {})
        for one in rounds:
            reached = {ROOT, *one.accepted}
            for node, parent in enumerate(one.tree.parents):
                depth, rank, source = one.tree.depths[node], one.ranks[node], one.sources[node]
                for count in (
                    found.by_depth.setdefault(depth, Count()),
                    found.by_rank.setdefault(rank, Count()),
                    found.by_both.setdefault((depth, rank), Count()),
                    found.by_source.setdefault(source, Count()),
                ):
                    count.drafted += 1
                    count.tried += parent in reached
                    count.accepted += node in reached
        return found

    def as_dict(self, drafters: Sequence[str]) -> dict[str, Any]:
        return {
            "by_depth": [{"depth": key, **count.as_dict()} for key, count in sorted(self.by_depth.items())],
            "by_rank": [{"rank": key, **count.as_dict()} for key, count in sorted(self.by_rank.items())],
            "by_depth_and_rank": [
                {"depth": depth, "rank": rank, **count.as_dict()}
                for (depth, rank), count in sorted(self.by_both.items())
            ],
            "by_drafter": [
                {"drafter": drafters[key], **count.as_dict()} for key, count in sorted(self.by_source.items())
            ],
        }


@dataclass(frozen=True)
class RequestReport:
    """One request. steps: those that brought it tokens. decode_s: from its first token to its last, the median of all
    runs; plain_decode_s: the same without speculation, measured beside it."""

    request_id: str
    prompt: str
    prompt_tokens: Sequence[int]
    output_tokens: Sequence[int]
    steps: int
    verified: tuple[Verified, ...]
    speculation: Speculation
    decode_s: float | None = None
    plain_decode_s: float | None = None
    same_tokens: bool | None = None

    @property
    def drafted(self) -> int:
        return sum(len(one.round.tree) for one in self.verified)

    @property
    def accepted(self) -> int:
        return sum(one.accepted for one in self.verified)

    @property
    def past_end(self) -> int:
        """Nodes that were accepted behind the end of the output, and dropped."""
        return sum(len(one.round.accepted) - one.accepted for one in self.verified)

    @property
    def tokens_per_step(self) -> float:
        return len(self.output_tokens) / self.steps

    @property
    def acceptance(self) -> Acceptance:
        return Acceptance.of(one.round for one in self.verified)

    @property
    def draft_s(self) -> float:
        return sum(one.round.draft_s for one in self.verified)

    @property
    def step_s(self) -> float:
        """Of the steps that verified its trees, drafting left out."""
        return sum(one.round.step_s for one in self.verified)

    @property
    def saved_s(self) -> float | None:
        """By its rounds against plain steps: an estimate. None if no round has one."""
        known = [one.saved_s for one in self.verified if one.saved_s is not None]
        return sum(known) if known else None

    @property
    def measured_saved_s(self) -> float | None:
        """Decoding without speculation less that with it, both measured."""
        return None if self.decode_s is None or self.plain_decode_s is None else self.plain_decode_s - self.decode_s

    @property
    def endings(self) -> dict[str, int]:
        counts = Counter(one.ending for one in self.verified)
        return {name: counts[name] for name in ENDINGS}

    @property
    def cut_ranks(self) -> dict[int, int]:
        """Rank -> rounds that ended at a token of that rank, proposed and left out of the tree."""
        ranks = [one.cut_rank for one in self.verified if one.ending == "cut"]
        return dict(sorted(Counter(rank for rank in ranks if rank is not None).items()))

    @property
    def reasons(self) -> tuple[str, ...]:
        return reasons(self.verified, self.speculation)

    def as_dict(self, drafters: Sequence[str]) -> dict[str, Any]:
        return {
            "request_id": self.request_id,
            "prompt": self.prompt,
            "num_prompt_tokens": len(self.prompt_tokens),
            "num_generated_tokens": len(self.output_tokens),
            "num_steps": self.steps,
            "num_rounds": len(self.verified),
            "num_draft_tokens": self.drafted,
            "num_accepted_tokens": self.accepted,
            "num_accepted_past_end": self.past_end,
            "tokens_per_step": self.tokens_per_step,
            "draft_s": self.draft_s,
            "step_s": self.step_s,
            "estimated_saved_s": self.saved_s,
            "decode_s": self.decode_s,
            "plain_decode_s": self.plain_decode_s,
            "measured_saved_s": self.measured_saved_s,
            "same_tokens_without": self.same_tokens,
            "acceptance": self.acceptance.as_dict(drafters),
            "endings": self.endings,
            "cut_ranks": [{"rank": rank, "rounds": count} for rank, count in self.cut_ranks.items()],
            "sizer": _mean_choice(self.verified),
            "reasons": list(self.reasons),
            "rounds": [one.as_dict() for one in self.verified],
        }


@dataclass(frozen=True, slots=True)
class HeardStep:
    """A step beside what the sizer knew. plain_s: of its requests without trees, an estimate, None where it held
    prompts; sizes: None if no request could have a tree, at its last token, or because steps overlap while no tree
    pays."""

    record: StepRecord
    plain_s: float | None
    sizes: Sizes | None
    overlap: bool = False

    @property
    def seconds(self) -> float:
        return self.record.draft_s + self.record.host_s + self.record.device_s

    @property
    def saved_s(self) -> float | None:
        """What its trees saved, or what looking for them cost."""
        record = self.record
        if record.kind != "tree":
            return -record.draft_s
        if self.plain_s is None:
            return None
        return (1 + record.accepted / record.sampled) * self.plain_s - self.seconds

    @property
    def without(self) -> str | None:
        """Why it had no tree, one of NO_TREE; None if it had one, or nobody was decoding."""
        if self.record.kind in ("tree", "prefill"):
            return None
        if self.sizes is None:
            return "none pays" if self.overlap else "no room"
        return "nothing likely" if self.sizes.depth else "none pays"


@dataclass(frozen=True)
class Report:
    """A workload with speculation. drafters: their names, by number."""

    speculation: Speculation
    drafters: tuple[str, ...]
    requests: tuple[RequestReport, ...]
    steps: tuple[HeardStep, ...]

    @property
    def verified(self) -> list[Verified]:
        """In the order in which they happened."""
        return sorted((one for request in self.requests for one in request.verified), key=lambda one: one.number)

    @property
    def saved_s(self) -> float:
        """Of the workload, trees against plain steps: an estimate, steps that held prompts left out."""
        return sum(one.saved_s or 0.0 for one in self.steps)

    @property
    def without(self) -> dict[str, int]:
        counts = Counter(one.without for one in self.steps)
        return {name: counts[name] for name in NO_TREE}

    @property
    def by_kind(self) -> dict[str, tuple[int, float, float]]:
        """Class of work -> (steps, seconds without drafting, seconds of drafting)."""
        found: dict[str, tuple[int, float, float]] = {}
        for one in self.steps:
            count, seconds, drafting = found.get(one.record.kind, (0, 0.0, 0.0))
            own = one.record.host_s + one.record.device_s
            found[one.record.kind] = count + 1, seconds + own, drafting + one.record.draft_s
        return found

    @property
    def reasons(self) -> tuple[str, ...]:
        """What the requests' own reasons leave open: steps without trees, and whether the sizer was right."""
        said = []
        trees = [one for one in self.steps if one.record.kind == "tree"]
        expected = [one.sizes for one in trees if one.sizes is not None and one.sizes.tokens_per_s > 0]
        if expected and len(expected) == len(trees):
            tokens = sum(one.record.sampled + one.record.accepted for one in trees)
            gave = tokens / sum(one.seconds for one in trees)
            said.append(
                f"steps with trees gave {gave:,.0f} tokens/s where the sizer expected "
                f"{statistics.mean(one.tokens_per_s for one in expected):,.0f}"
            )
        words = {
            "none pays": "no tree was expected to beat plain steps",
            "nothing likely": (
                "the last tokens had not occurred before"
                if self.speculation.method == "ngram"
                else "nothing that was drafted was likely enough, or no block was free"
            ),
            "no room": "each request was at its last token",
        }
        said += [
            f"{count} step{'s' * (count > 1)} of decoding had no tree: {words[name]}"
            for name, count in self.without.items()
            if count
        ]
        return tuple(said)

    def as_dict(self) -> dict[str, Any]:
        return {
            "method": self.speculation.method,
            "num_speculative_tokens": self.speculation.nodes,
            "tree": list(self.speculation.widths),
            "drafters": list(self.drafters),
            "steps": {
                kind: {"steps": count, "seconds": seconds, "draft_s": drafting}
                for kind, (count, seconds, drafting) in self.by_kind.items()
            },
            "steps_without_trees": self.without,
            "estimated_saved_s": self.saved_s,
            "acceptance": Acceptance.of(one.round for one in self.verified).as_dict(self.drafters),
            "reasons": list(self.reasons),
            "requests": [one.as_dict(self.drafters) for one in self.requests],
        }

    def tree(self, number: int | None = None) -> tuple[RequestReport, Verified]:
        """A round to look at: by its number, or the one with the most accepted nodes.

        Raises InvalidArgument if there is none.
        """
        every = {one.number: (request, one) for request in self.requests for one in request.verified}
        if not every:
            raise InvalidArgument(
                "plot",
                "there is no tree to draw: "
                + ("; ".join(self.reasons) or "no step decoded anything")
                + '; prescribe one, as in --speculative-config \'{"method": "tree", "tree": [3, 2, 1]}\'',
            )
        if number is None:
            number = max(every, key=lambda one: (len(every[one][1].round.accepted), len(every[one][1].round.tree)))
        if number not in every:
            raise InvalidArgument("round", f"must be in [1, {len(every)}], the trees of this workload, not {number}")
        return every[number]


class Recorder:
    """Hears an engine's rounds and steps while it is open."""

    def __init__(self, built: Built) -> None:
        if built.speculator is None:
            raise InvalidArgument("speculative_config", "is needed: without it there are no trees to speak of")
        self._built = built
        self._speculator = built.speculator
        self._fresh: list[Round] = []
        self.rounds: list[tuple[Round, float | None]] = []
        """With the estimate of a plain step."""
        self.steps: list[HeardStep] = []

    def __enter__(self) -> Recorder:
        self._speculator.listeners.append(self._hear_round)
        self._built.engine.listeners.append(self._hear_step)
        return self

    def __exit__(self, *_: object) -> None:
        self._speculator.listeners.remove(self._hear_round)
        self._built.engine.listeners.remove(self._hear_step)

    def _hear_round(self, one: Round) -> None:
        self._fresh.append(one)

    def _hear_step(self, record: StepRecord) -> None:
        """A step's rounds are told before its record."""
        rows = sum(new for new, _ in record.spans) - record.drafted
        plain_s = self._speculator.plain_seconds(rows) if rows == record.sampled else None
        self.rounds += [(one, plain_s) for one in self._fresh]
        self._fresh.clear()
        self.steps.append(HeardStep(record, plain_s, self._speculator.sizes, self._built.engine.overlap))


def report(
    speculation: Speculation,
    drafters: Sequence[str],
    rounds: Sequence[tuple[Round, float | None]],
    steps: Sequence[HeardStep],
    outputs: Sequence[RequestOutput],
) -> Report:
    """What was heard of these requests, one completion each."""
    numbered = list(enumerate(rounds, start=1))
    requests = []
    for output in outputs:
        assert output.metrics is not None
        tokens = output.outputs[0].token_ids
        length = len(output.prompt_token_ids) + len(tokens)
        own = []
        for number, (one, plain_s) in numbered:
            if one.request_id == output.request_id:
                kept = min(len(one.tokens), length - one.before)
                own.append(Verified(number, one, plain_s, kept, min(kept, len(one.accepted))))
        requests.append(
            RequestReport(
                output.request_id,
                output.prompt or "",
                output.prompt_token_ids,
                tokens,
                output.metrics.num_steps,
                tuple(own),
                speculation,
            )
        )
    return Report(speculation, tuple(drafters), tuple(requests), tuple(steps))


def speculated(
    llm: LLM,
    prompts: Sequence[str],
    params: SamplingParams,
    rounds: int = 3,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Complete prompts without and with speculation, `rounds` times each and once before, and report on the last run.

    Without it the same engine takes plain steps. Raises the error of the first prompt that is refused.
    """
    built = llm.built
    with_s: list[list[float]] = []
    without_s: list[list[float]] = []
    for number in range(-1, rounds):  # the first round is a warm-up
        with built.plain():
            plain = _generated(llm, prompts, params)
        with Recorder(built) as heard:
            outputs = _generated(llm, prompts, params)
        if number >= 0:
            with_s.append([_decode_s(one) for one in outputs])
            without_s.append([_decode_s(one) for one in plain])
            if progress is not None:
                progress(number + 1, rounds)
    assert built.speculator is not None
    speculation = built.speculator.speculation
    found = report(speculation, drafters(speculation), heard.rounds, heard.steps, outputs)
    medians, plain_medians = ([statistics.median(times) for times in zip(*every)] for every in (with_s, without_s))
    requests = tuple(
        replace(
            request,
            decode_s=medians[place],
            plain_decode_s=plain_medians[place],
            same_tokens=plain[place].outputs[0].token_ids == list(request.output_tokens),
        )
        for place, request in enumerate(found.requests)
    )
    return replace(found, requests=requests)


def _generated(llm: LLM, prompts: Sequence[str], params: SamplingParams) -> list[RequestOutput]:
    outputs = llm.generate(list(prompts), params, use_tqdm=False)
    for output in outputs:
        if output.error is not None:
            raise output.error
    return outputs


def _decode_s(output: RequestOutput) -> float:
    metrics = output.metrics
    assert metrics is not None
    return (metrics.finished_s or 0.0) - (metrics.first_token_s or 0.0)


def drafters(speculation: Speculation) -> tuple[str, ...]:
    """Names of drafters, by number."""
    models = () if speculation.method == "ngram" else speculation.checkpoints or (EMBEDDED_DRAFTER,)
    return (*models, NGRAM) if speculation.looks_up else models


# Reasons


def _weighed(verified: Sequence[Verified]) -> tuple[list[Sizes], list[Sizes]]:
    """(chosen because they pay, tried in order to learn); neither if sizes were prescribed."""
    sizes = [one.round.sizes for one in verified if one.round.sizes.plain_per_s > 0]
    return [one for one in sizes if one.tokens_per_s > one.plain_per_s], [
        one for one in sizes if one.tokens_per_s <= one.plain_per_s
    ]


def _mean_choice(verified: Sequence[Verified]) -> dict[str, float] | None:
    """The sizer's figures, means over the rounds whose trees it chose; None if it chose none."""
    chosen, _ = _weighed(verified)
    if not chosen:
        return None
    names = ("depth", "nodes", "tokens_per_s", "plain_per_s", "node_s", "level_s", "least_chance", "least_path")
    means = {name: statistics.mean(getattr(one, name) for one in chosen) for name in names}
    return {"rounds": len(chosen), **means}


def reasons(verified: Sequence[Verified], speculation: Speculation) -> tuple[str, ...]:
    """Why a request's trees were as they were, in plain sentences."""
    if not verified:
        return ("no tree was verified",)
    if speculation.widths:
        shape = ", ".join(map(str, speculation.widths))
        return (f"the shape was prescribed, <{shape}> children by depth: nothing was weighed",)
    if speculation.nodes is not None:
        return (f"at most {speculation.nodes} nodes were prescribed: nothing was weighed",)
    chosen, probes = _weighed(verified)
    said = []
    mean = _mean_choice(verified)
    if mean is not None:
        depths, nodes = [one.depth for one in chosen], [one.nodes for one in chosen]
        said.append(
            f"{mean['tokens_per_s']:,.0f} tokens/s were expected with trees and {mean['plain_per_s']:,.0f} without "
            f"({mean['tokens_per_s'] / mean['plain_per_s']:.2f}x, means of {_rounds(len(chosen))}), hence the trees"
        )
        said.append(
            f"of all sizes, depth {_spread(depths)} and {_spread(nodes)} nodes a request promised the most tokens a "
            f"second; {statistics.mean(len(one.round.tree) for one in verified):.1f} nodes a round were worth verifying"
        )
        if mean["node_s"] > 0:
            said.append(
                "of what was drafted as many of the likeliest nodes stayed as their rows are worth: behind that size "
                f"one more takes {mean['node_s'] * 1e6:,.0f} µs of a step, for which a chance of "
                f"{mean['least_chance']:.1%} pays"
            )
        else:
            said.append("no node was left out for its chance: one more took no time that could be measured")
        if mean["level_s"] > 0:
            said.append(
                f"a path of less than {mean['least_path']:.0%} chance was not drafted further: one more level takes "
                f"{mean['level_s'] * 1e3:.2g} ms"
            )
        else:
            said.append("no path was left for its chance: a level of drafting is priced at nothing")
    if probes:
        said.append(
            f"{_rounds(len(probes))} tried one node in order to learn: no tree was expected to beat plain steps"
        )
    return tuple(said)


def _rounds(count: int) -> str:
    return f"{count} round{'s' * (count > 1)}"


def _spread(values: Sequence[int]) -> str:
    """4, or 2 to 6 (mean 4.1)."""
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low} to {high} (mean {statistics.mean(values):.1f})"


# Text


def readable(text: str, longest: int = 16) -> str:
    """A token's text with spaces and breaks shown (· ↵ ⇥), long runs of them counted (·⁸), the middle cut if long."""
    parts: list[str] = []
    at = 0
    while at < len(text):
        char = text[at]
        shown = SPACES.get(char) or (char if char.isprintable() else _escaped(char))
        run = 1
        while at + run < len(text) and text[at + run] == char:
            run += 1
        if run > LONGEST_RUN and char in SPACES:
            parts.append(shown + str(run).translate(RAISED))
        else:
            parts += [shown] * run
        at += run
    if sum(map(len, parts)) <= longest:
        return "".join(parts)
    return _ends(parts, longest)


def _escaped(char: str) -> str:
    code = ord(char)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def _ends(parts: Sequence[str], longest: int) -> str:
    """The first and the last of some parts, at most so many characters with the gap between them."""
    front: list[str] = []
    back: list[str] = []
    room = longest - 1
    first, last = 0, len(parts) - 1
    while first <= last:
        side, place = (front, first) if len("".join(front)) <= len("".join(back)) + 2 else (back, last)
        if len(parts[place]) > room:
            break
        room -= len(parts[place])
        side.append(parts[place])
        first, last = (first + 1, last) if side is front else (first, last - 1)
    return "".join(front) + "…" + "".join(reversed(back))


def texts(llm: LLM) -> Callable[[int], str]:
    """A token's text; its number where it has none."""
    tokenizer = llm.tokenizer

    def text_of(token: int) -> str:
        return (tokenizer.token_text(token) if tokenizer is not None else "") or f"#{token}"

    return text_of
