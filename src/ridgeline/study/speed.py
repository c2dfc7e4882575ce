"""How fast a generation was, and what share of the machine's limit that is.

Knows step records, prices and the measured limit. It must not know how tokens are made or shown.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from ridgeline.core.cost import ZERO, Cost
from ridgeline.core.request import RequestMetrics
from ridgeline.core.step import Spans, StepRecord
from ridgeline.engine.build import Built
from ridgeline.perf.limit import Limit, measure_limit
from ridgeline.perf.price import Price

FEWEST_STEPS = 4
"""Steps below which nothing is said about a rate."""


@dataclass(frozen=True, slots=True)
class SpeedReport:
    """Prefill and decode of one generation; shares are of the limit (0 to 1), None with too few steps.

    prompt_tokens: prompt tokens computed (not those found in the prefix cache), of `prompts` prompts.
    first_token_s: of several prompts the median, each from its submission. decode_tokens: those behind the
    first ones. prefill_s, decode_s: the times of one after the other for one prompt; of many, where the two
    overlap, both are the time of all.
    """

    prompt_tokens: int
    prefill_s: float
    first_token_s: float
    prompts: int
    output_tokens: int
    decode_tokens: int
    decode_s: float
    limit_share: float | None = None
    dram_share: float | None = None
    step_bytes: float = 0.0
    limit: Limit | None = None

    @property
    def prefill_tokens_per_s(self) -> float | None:
        return self.prompt_tokens / self.prefill_s if self.prefill_s > 0 else None

    @property
    def decode_tokens_per_s(self) -> float | None:
        return self.decode_tokens / self.decode_s if self.decode_s > 0 else None

    def as_dict(self) -> dict[str, Any]:
        """For --json: rates in 1/s, shares from 0 to 1, None where there is too little to say."""
        limit = self.limit
        return {
            "prompt_tokens": self.prompt_tokens,
            "prefill_tokens_per_s": self.prefill_tokens_per_s,
            "time_to_first_token_s": self.first_token_s,
            "output_tokens": self.output_tokens,
            "decode_tokens_per_s": self.decode_tokens_per_s,
            "limit_share": self.limit_share,
            "dram_limit_share": self.dram_share,
            "bytes_per_step": self.step_bytes,
            "read_bytes_per_s": None if limit is None else limit.read_bytes_per_s,
            "dram_read_bytes_per_s": None if limit is None else limit.dram_bytes_per_s,
            "working_set_bytes": None if limit is None else limit.working_set_bytes,
            "flops_per_s": None if limit is None else limit.flops_per_s,
        }

    def lines(self) -> list[str]:
        """For a terminal."""
        prefill = "" if self.prefill_tokens_per_s is None else f", {self.prefill_tokens_per_s:.0f} tok/s"
        median_of_several = " (median)" if self.prompts > 1 else ""
        result = [
            f"prefill {self.prompt_tokens} tokens{prefill}, "
            f"first token after {1e3 * self.first_token_s:.1f} ms{median_of_several}"
        ]
        rate = self.decode_tokens_per_s
        if self.limit_share is None or self.limit is None or self.dram_share is None or rate is None:
            result.append(f"decode {self.decode_tokens} tokens: too few to speak of a rate")
            return result
        result.append(f"decode {self.decode_tokens} tokens, {rate:.0f} tok/s, {percent(self.limit_share)} of the limit")
        result.append(
            f"  limit: {self.step_bytes / 1e6:.1f} MB a step at {self.limit.read_bytes_per_s / 1e9:.0f} GB/s, "
            f"measured at this working set; {percent(self.dram_share)} of what main memory alone "
            f"({self.limit.dram_bytes_per_s / 1e9:.0f} GB/s) allows"
        )
        return result


def percent(share: float) -> str:
    """62 %, 3.4 %, 0.02 %: two digits, so that a small share is not shown as none."""
    value = 100 * share
    return f"{value:.0f} %" if value >= 9.95 or value == 0 else f"{value:.2g} %"


class Speed:
    """Listens to an engine from now on; `part` is told of tokens as they reach the user."""

    def __init__(self, built: Built) -> None:
        self.built = built
        self.records: list[StepRecord] = []
        self.start_s = time.perf_counter()
        self.arrivals: list[float] = []
        self.tokens = 0
        built.engine.listeners.append(self._listen)

    def _listen(self, record: StepRecord) -> None:
        self.records.append(record)

    def part(self, tokens: int) -> None:
        """`tokens` new tokens have just been shown."""
        if tokens:
            self.tokens += tokens
            self.arrivals.append(time.perf_counter())

    def stop(self) -> None:
        """Listen no more. Calling it again does nothing."""
        if self._listen in self.built.engine.listeners:
            self.built.engine.listeners.remove(self._listen)

    def report(self) -> SpeedReport:
        """One prompt: its prefill up to the first token shown, its decode from there to the last one."""
        self.stop()
        samples = [index for index, record in enumerate(self.records) if record.sampled]
        first = samples[0] + 1 if samples else len(self.records)
        prefill, decode = self.records[:first], self.records[first:]
        decode_s = self.arrivals[-1] - self.arrivals[0] if len(self.arrivals) > 1 else 0.0
        return self._judged(
            decode,
            decode_s,
            prompt_tokens=sum(new for record in prefill for new, _ in record.spans),
            prefill_s=sum(record.device_s + record.host_s for record in prefill),
            first_token_s=self.arrivals[0] - self.start_s if self.arrivals else 0.0,
            prompts=1,
            output_tokens=self.tokens,
            decode_tokens=sum(record.tokens for record in decode),
        )

    def report_all(self, metrics: Sequence[RequestMetrics], seconds: float) -> SpeedReport:
        """Many prompts at once, in `seconds` from the first to the last."""
        self.stop()
        firsts = [one.ttft_s for one in metrics if one.ttft_s is not None]
        sampled = sum(record.tokens for record in self.records)
        return self._judged(
            self.records,
            seconds,
            prompt_tokens=sum(one.num_prompt_tokens - one.num_cached_tokens for one in metrics),
            prefill_s=seconds,
            first_token_s=median(firsts) if firsts else 0.0,
            prompts=len(metrics),
            output_tokens=sampled,
            decode_tokens=max(sampled - len(firsts), 0),
        )

    def _judged(self, records: Sequence[StepRecord], seconds: float, **counts: Any) -> SpeedReport:
        """With the limit measured on the spot, if there is enough to judge."""
        if len(records) < FEWEST_STEPS or seconds <= 0:
            return SpeedReport(decode_s=seconds, **counts)
        floor = _Floor(self.built.price)
        costs = [floor.of(record) for record in records]
        bytes_per_step = sum(cost.bytes for cost in costs) / len(costs)
        config = self.built.config
        limit = measure_limit(torch.device(config.device), int(bytes_per_step), getattr(torch, config.dtype))
        return SpeedReport(
            decode_s=seconds,
            limit_share=sum(map(limit.seconds, costs)) / seconds,
            dram_share=sum(map(limit.dram_seconds, costs)) / seconds,
            step_bytes=bytes_per_step,
            limit=limit,
            **counts,
        )


class _Floor:
    """Floors of recorded steps, from few runs of the forward pass on meta tensors.

    All but attention is affine in the numbers of tokens and of sampled rows (a mixture's distinct experts
    are concave in tokens), so a chord between two priced numbers is exact, or below: a floor still.
    """

    def __init__(self, price: Price) -> None:
        self.price = price
        self._tokens: dict[int, Cost] = {}
        self._rows: dict[int, Cost] = {}

    def of(self, record: StepRecord) -> Cost:
        new, visible = zip(*record.spans)
        dense = self._chord(sum(new), self._tokens, 0)
        head = self._chord(record.rows, self._rows, 1) if record.rows else ZERO
        return dense + head + self.price.attention(Spans(new, visible))

    def _chord(self, number: int, known: dict[int, Cost], rows: int) -> Cost:
        """Cost of `number` tokens without any row sampled (rows = 0), or of sampling `number` rows (rows = 1)."""
        low = 1
        while low * 4 <= number:
            low *= 4
        below = self._priced(low, known, rows)
        if low == number:
            return below
        above = self._priced(4 * low, known, rows)
        share = (number - low) / (3 * low)
        return Cost(
            below.flops + share * (above.flops - below.flops),
            below.read_bytes + share * (above.read_bytes - below.read_bytes),
            below.write_bytes + share * (above.write_bytes - below.write_bytes),
        )

    def _priced(self, number: int, known: dict[int, Cost], rows: int) -> Cost:
        if number not in known:
            spans = Spans((number,), (number,))
            if rows:
                known[number] = self._without(self.price.step(spans, number), self.price.step(spans, 0))
            else:
                known[number] = self._without(self.price.step(spans, 0), self.price.attention(spans))
        return known[number]

    @staticmethod
    def _without(whole: Cost, part: Cost) -> Cost:
        return whole + part * -1
