"""The price of a step: its cost from the forward pass on meta tensors, in microseconds once cached.

Everything but attention depends only on how many tokens and rows a step has; attention is additive
over requests. So the forward pass is metered once for each (tokens, rows), and a step's price is that
plus attention's own cost function on its Spans. Knows models on meta. It must not know rates: seconds
come from roofline.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ridgeline.core.cost import ZERO, Cost
from ridgeline.core.step import Spans
from ridgeline.models.batch import Batch, meta_batch
from ridgeline.models.decoder import Decoder
from ridgeline.ops import Op, Ops, attention
from ridgeline.ops.attention_call import Call
from ridgeline.perf.meter import Meter


@dataclass(frozen=True, slots=True)
class _Dense:
    """Cost of everything but attention, and the distinct attention calls with how often each is made."""

    cost: Cost
    attention: tuple[tuple[int, dict[str, Any]], ...]


class _AttentionApart(Meter):
    """A Meter that sets attention's calls aside, to be costed again on other Spans."""

    def __init__(self) -> None:
        super().__init__()
        self.apart: list[dict[str, Any]] = []

    def before(self, op: Op, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if op is not attention:
            super().before(op, args, kwargs)
            return
        self.apart.append(Call(*args, **kwargs)._asdict())


class Price:
    """Costs of steps of one model, whose parameters are meta tensors.

    block_size and kv_dtype shape the pages; sampling is priced as greedy unless told otherwise.
    """

    def __init__(self, model: Decoder, block_size: int, kv_dtype: torch.dtype) -> None:
        spec = model.spec
        self.model = model
        self.block_size = block_size
        page = torch.empty(1, spec.kv_heads, block_size, spec.head_dim, dtype=kv_dtype, device="meta")
        self.pages = [page] * spec.layers
        self._cache: dict[tuple[int, int, bool], _Dense] = {}

    def step(self, spans: Spans, rows: int, greedy: bool = True) -> Cost:
        """Floor of a step: forward, logits of `rows` rows, sampling."""
        dense = self._dense(sum(spans.new), rows, greedy)
        return self._attention(dense, spans, dense.cost)

    def attention(self, spans: Spans) -> Cost:
        """Attention's part of a step; the rest depends on the numbers of tokens and rows alone."""
        return self._attention(self._dense(1, 1, True), spans, ZERO)

    def calls(self, spans: Spans) -> list[tuple[int, Cost]]:
        """Attention's distinct calls (windowed layers, full ones): how often each is made, and its cost."""
        return self._calls(self._dense(1, 1, True), spans)

    def masks(self) -> list[tuple[int | None, bool]]:
        """Window and causality of each of the distinct calls, in the order of `calls`."""
        return [(call["window"], call["causal"]) for _, call in self._dense(1, 1, True).attention]

    def _attention(self, dense: _Dense, spans: Spans, total: Cost) -> Cost:
        for times, cost in self._calls(dense, spans):
            total += cost * times
        return total

    def _calls(self, dense: _Dense, spans: Spans) -> list[tuple[int, Cost]]:
        tokens, result = sum(spans.new), []
        for times, call in dense.attention:
            q = call["q"].new_empty(tokens, *call["q"].shape[1:])
            result.append((times, attention.floor(**{**call, "q": q, "spans": spans})))
        return result

    def meter(self, spans: Spans, rows: int, greedy: bool = True) -> Meter:
        """The same, op by op: a fresh run of the forward pass under a Meter."""
        meter = Meter()
        self.trace(spans, rows, greedy, Ops({}, meter))
        return meter

    def trace(self, spans: Spans, rows: int, greedy: bool, ops: Ops, kind: str = "mixed") -> None:
        """Run a step's ops on meta tensors; whoever observes `ops` sees them."""
        batch = meta_batch(spans, rows, self.block_size, kind)
        run_meta(self.model, batch, self.pages, rows, greedy, ops)

    def _dense(self, tokens: int, rows: int, greedy: bool) -> _Dense:
        key = (tokens, rows, greedy)
        if key not in self._cache:
            meter = _AttentionApart()
            self.trace(Spans((tokens,), (tokens,)), rows, greedy, Ops({}, meter))
            grouped: dict[tuple[Any, ...], list[Any]] = {}
            for call in meter.apart:
                key_of_call = (call["window"], call["scale"], call["causal"], call["softcap"], call["sinks"] is None)
                grouped.setdefault(key_of_call, [0, call])[0] += 1
            self._cache[key] = _Dense(meter.total, tuple((n, call) for n, call in grouped.values()))
        return self._cache[key]


def run_meta(model: Decoder, batch: Batch, pages: list[torch.Tensor], rows: int, greedy: bool, ops: Ops) -> None:
    """Forward, logits and sampling of a step, on meta tensors."""
    hidden = model.forward(batch, pages, pages, ops)
    if rows == 0:
        return
    logits = model.logits(hidden, ops)

    def setting(dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(rows, dtype=dtype, device="meta")

    floats, longs = setting(torch.float32), setting(torch.int64)
    ops.sample(logits, floats, longs, floats, floats, longs, longs, greedy, not greedy)
