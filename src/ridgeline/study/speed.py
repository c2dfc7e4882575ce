"""How fast a generation was, and what share of the machine's limit that is.

Knows step records, prices and the measured limit. It must not know how tokens are made or shown.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch

from ridgeline.core.cost import ZERO, Cost
from ridgeline.core.step import Spans, StepRecord
from ridgeline.engine.build import Built
from ridgeline.perf.limit import Limit, measure_limit


@dataclass(frozen=True, slots=True)
class SpeedReport:
    """Prefill and decode of one generation; shares are of the limit (0 to 1), None with too few tokens."""

    prompt_tokens: int
    prefill_s: float
    first_token_s: float
    output_tokens: int
    decode_tokens: int
    decode_s: float
    limit_share: float | None
    dram_share: float | None
    step_bytes: float
    limit: Limit | None

    @property
    def decode_tokens_per_s(self) -> float:
        return self.decode_tokens / self.decode_s if self.decode_s > 0 else 0.0

    def as_dict(self) -> dict[str, Any]:
        values: dict[str, Any] = {
            "prompt_tokens": self.prompt_tokens,
            "prefill_tokens_per_s": self.prompt_tokens / self.prefill_s if self.prefill_s else None,
            "time_to_first_token_s": self.first_token_s,
            "output_tokens": self.output_tokens,
            "decode_tokens_per_s": self.decode_tokens_per_s,
            "limit_share": self.limit_share,
            "dram_limit_share": self.dram_share,
            "bytes_per_step": self.step_bytes,
        }
        if self.limit is not None:
            values["read_bytes_per_s"] = self.limit.read_bytes_per_s
            values["dram_read_bytes_per_s"] = self.limit.dram_bytes_per_s
            values["working_set_bytes"] = self.limit.working_set_bytes
        return values

    def lines(self) -> list[str]:
        """For a terminal."""
        result = [
            f"prefill {self.prompt_tokens} tokens, {self.prompt_tokens / max(self.prefill_s, 1e-9):.0f} tok/s, "
            f"first token after {1e3 * self.first_token_s:.1f} ms"
        ]
        if self.limit_share is None or self.limit is None or self.dram_share is None:
            result.append(f"decode {self.decode_tokens} tokens: too few to speak of a rate")
            return result
        result.append(
            f"decode {self.decode_tokens} tokens, {self.decode_tokens_per_s:.0f} tok/s, "
            f"{100 * self.limit_share:.0f} % of the limit"
        )
        result.append(
            f"  limit: {self.step_bytes / 1e6:.1f} MB a step at {self.limit.read_bytes_per_s / 1e9:.0f} GB/s, "
            f"measured at this working set; {100 * self.dram_share:.0f} % of what main memory alone "
            f"({self.limit.dram_bytes_per_s / 1e9:.0f} GB/s) allows"
        )
        return result


class Speed:
    """Listens to an engine from now on; `part` is told of tokens as they reach the user."""

    def __init__(self, built: Built) -> None:
        self.built = built
        self.records: list[StepRecord] = []
        self.start_s = time.perf_counter()
        self.arrivals: list[float] = []
        self.tokens = 0
        built.engine.listeners.append(self.records.append)

    def part(self, tokens: int) -> None:
        """`tokens` new tokens have just been shown."""
        if tokens:
            self.tokens += tokens
            self.arrivals.append(time.perf_counter())

    def report(self) -> SpeedReport:
        """Stop listening and judge; measures the machine's limit if there was any decode."""
        self.built.engine.listeners.remove(self.records.append)
        decode = [record for record in self.records if record.kind == "decode"]
        prefill = [record for record in self.records if record.kind != "decode"]
        prompt = sum(new for record in prefill for new, _ in record.spans)
        first = self.arrivals[0] - self.start_s if self.arrivals else 0.0
        decode_s = self.arrivals[-1] - self.arrivals[0] if len(self.arrivals) > 1 else 0.0
        decode_tokens = sum(len(record.spans) for record in decode)
        costs = [self._cost(record) for record in decode]
        limit = share = dram_share = None
        largest = max((cost.bytes for cost in costs), default=0.0)
        if len(decode) >= 4 and decode_s > 0:
            device = torch.device(self.built.config.device)
            limit = measure_limit(device, int(largest), getattr(torch, self.built.config.dtype))
            share = sum(map(limit.seconds, costs)) / decode_s
            dram_share = sum(map(limit.dram_seconds, costs)) / decode_s
        total = sum(costs, ZERO)
        return SpeedReport(
            prompt_tokens=prompt,
            prefill_s=sum(record.device_s + record.host_s for record in prefill),
            first_token_s=first,
            output_tokens=self.tokens,
            decode_tokens=decode_tokens,
            decode_s=decode_s,
            limit_share=share,
            dram_share=dram_share,
            step_bytes=total.bytes / len(costs) if costs else 0.0,
            limit=limit,
        )

    def _cost(self, record: StepRecord) -> Cost:
        new, visible = zip(*record.spans)
        return self.built.price.step(Spans(new, visible), len(new))
