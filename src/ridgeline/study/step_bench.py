"""Steps of any shape on an engine's own pool, timed: what calibrations and their tests are made of.

Knows how to make a StepPlan, and a Timer. It must not know what the times are for.
"""

from __future__ import annotations

import platform
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import torch

from ridgeline.core.errors import DoesNotFit
from ridgeline.core.request import SamplingParams
from ridgeline.core.step import Chunk, Sampling, Spans, StepPlan
from ridgeline.engine.build import Built
from ridgeline.perf.timer import TimedCall, Timer

REPEATS = 7
ENOUGH_S = 0.25


@dataclass(frozen=True, slots=True)
class Shape:
    """A step to measure: (new, visible) of each request; every request is sampled."""

    spans: tuple[tuple[int, int], ...]

    @property
    def tokens(self) -> int:
        return sum(new for new, _ in self.spans)

    @property
    def decodes(self) -> bool:
        return all(new == 1 for new, _ in self.spans)

    def as_spans(self) -> Spans:
        return Spans(tuple(new for new, _ in self.spans), tuple(visible for _, visible in self.spans))


class StepBench:
    """Makes and times steps of any shape, over blocks of the engine's own pool."""

    def __init__(self, built: Built) -> None:
        self.built = built
        config = built.config
        self.device = torch.device(config.device)
        self.timer = Timer(self.device)
        self.ops = {kind: ops.observed(self.timer) for kind, ops in built.table.by_work.items()}
        self.longest = config.max_model_len
        self.most_tokens = config.max_num_batched_tokens
        self.most_requests = min(config.max_num_seqs, self.most_tokens)
        self.block, self.blocks = config.block_size, config.num_blocks
        self.spread = 1.0
        self._draw = random.Random(0)
        self._order = list(range(self.blocks))
        self._draw.shuffle(self._order)
        self._number = 0

    @property
    def device_name(self) -> str:
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else _processor()

    def fits(self, requests: int, length: int) -> bool:
        """Whether the pool holds so many requests of this length, each in blocks of its own."""
        return requests * -(-length // self.block) <= self.blocks

    def cut(self, tokens: int) -> tuple[tuple[int, int], ...]:
        """So many prompt tokens in prompts of at most the longest length."""
        whole, rest = divmod(tokens, self.longest)
        return ((self.longest, self.longest),) * whole + (((rest, rest),) if rest else ())

    def parts(self, shape: Shape) -> tuple[float, float, float]:
        """(body, head, attention) seconds of a watched step: medians over repeats, the first of which warms up."""
        found: list[tuple[float, float, float]] = []
        plan = self.plan(shape)
        for number in range(REPEATS + 1):
            self.built.runner.run(plan, self.ops[plan.kind])
            calls = self.timer.take()
            if number:
                found.append(_split(calls))
            if number >= 3 and sum(map(sum, found)) > ENOUGH_S:
                break  # a slow step is measured well enough by three
        body, head, attention = (sorted(one[place] for one in found) for place in range(3))
        whole = sorted(sum(one) for one in found)
        self.spread = max(
            self.spread, whole[(3 * len(whole)) // 4] / statistics.median(whole) if len(whole) > 3 else 1.0
        )
        return statistics.median(body), statistics.median(head), statistics.median(attention)

    def plan(self, shape: Shape) -> StepPlan:
        """A step of this shape on random tokens, every request in blocks of its own while they last.

        The blocks lie anywhere in the pool, as those of an engine do that has served for a while: a CPU would read
        neighbours in a row faster.
        """
        vocabulary = self.built.spec.vocabulary
        params = SamplingParams(temperature=0, ignore_eos=True)
        chunks, used = [], 0
        for number, (new, visible) in enumerate(shape.spans):
            need = -(-visible // self.block)
            if used + need > self.blocks:
                used = 0  # reading somebody else's keys takes as long
            if need > self.blocks:
                raise DoesNotFit(f"a request of {visible} tokens needs {need} blocks, the pool has {self.blocks}")
            tokens = [self._draw.randrange(vocabulary) for _ in range(new)]
            sampling = Sampling(params, 0, visible, tokens, visible)
            chunks.append(Chunk(f"c{number}", tokens, visible - new, self._order[used : used + need], sampling))
            used += need
        self._number += 1
        return StepPlan(self._number, tuple(chunks))


def _split(calls: Sequence[TimedCall]) -> tuple[float, float, float]:
    """(body, head, attention) seconds; the head is what follows the last norm."""
    last = max(place for place, one in enumerate(calls) if one.kind == "normalization")
    attention = sum(one.seconds for one in calls if one.op == "attention")
    body = sum(one.seconds for one in calls[: last + 1] if one.op != "attention")
    return body, sum(one.seconds for one in calls[last + 1 :]), attention


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads"


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("ridgeline", "numba", "triton"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
