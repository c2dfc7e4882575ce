"""The floor of a step in microseconds of work: for those who count every step of a running engine.

Knows a model's Price. It must not know rates. Everything but attention is tabulated over the numbers of tokens and of
sampled rows, once, and is linear between two points (exactly so without experts); attention is linear in query-key
pairs, keys and tokens, with factors read off two small calls. So a step costs a sum over its requests, and no tensor.
"""

from __future__ import annotations

from dataclasses import dataclass

from ridgeline.core.cost import Cost
from ridgeline.core.step import Spans
from ridgeline.perf.card import Line
from ridgeline.perf.price import Price


@dataclass(frozen=True, slots=True)
class _Call:
    """One kind of attention call: how often a step makes it, and its factors."""

    times: int
    window: int | None
    causal: bool
    flops_a_pair: float
    bytes_a_key: float
    bytes_a_token: float


@dataclass(frozen=True, slots=True)
class _Head:
    """(FLOPs, bytes) that the head of one row takes and that each further one adds: its weights are read once."""

    one: tuple[float, float]
    more: tuple[float, float]


class StepFloor:
    """FLOPs and bytes of steps of one model. tokens: the most that a step may have."""

    def __init__(self, price: Price, tokens: int) -> None:
        points = _powers(tokens)
        bodies = [_without_attention(price, number, 0) for number in points]
        self._flops = Line(tuple((float(number), body.flops) for number, body in zip(points, bodies)))
        self._bytes = Line(tuple((float(number), body.bytes) for number, body in zip(points, bodies)))
        # Where a step has more tokens than rows, these are taken out of the others.
        self._every, self._some = _head(price, 1, 2), _head(price, 3, 3)
        self._calls = _calls(price)

    def __call__(self, spans: Spans, rows: int) -> tuple[float, float]:
        """(FLOPs, bytes) of a step with these spans that samples `rows` rows."""
        tokens = sum(spans.new)
        flops, moved = self._flops(tokens), self._bytes(tokens)
        if rows:
            head = self._every if rows == tokens else self._some
            (one_flops, one_bytes), (more_flops, more_bytes) = head.one, head.more
            flops += one_flops + (rows - 1) * more_flops
            moved += one_bytes + (rows - 1) * more_bytes
        for call in self._calls:
            flops += call.times * call.flops_a_pair * spans.pairs(call.window, call.causal)
            moved += call.times * (call.bytes_a_key * spans.keys(call.window) + call.bytes_a_token * tokens)
        return flops, moved


def _powers(most: int) -> list[int]:
    """1, 2, 4, … and the most."""
    found = [1]
    while found[-1] * 2 < most:
        found.append(found[-1] * 2)
    return [*found, most] if most > 1 else found


def _without_attention(price: Price, tokens: int, rows: int) -> Cost:
    spans = Spans((tokens,), (tokens,))
    whole, attention = price.step(spans, rows), price.attention(spans)
    return Cost(
        whole.flops - attention.flops,
        whole.read_bytes - attention.read_bytes,
        whole.write_bytes - attention.write_bytes,
    )


def _head(price: Price, tokens_of_one: int, tokens_of_two: int) -> _Head:
    """The head of steps with so many tokens when one row and when two rows are sampled."""
    found = []
    for rows, tokens in ((1, tokens_of_one), (2, tokens_of_two)):
        head, body = _without_attention(price, tokens, rows), _without_attention(price, tokens, 0)
        found.append((head.flops - body.flops, head.bytes - body.bytes))
    (flops, moved), (both_flops, both_moved) = found
    return _Head((flops, moved), (both_flops - flops, both_moved - moved))


def _calls(price: Price) -> list[_Call]:
    """One token that sees one key, and one that sees two: the difference is a key and a pair."""
    found = []
    alone, beside = price.calls(Spans((1,), (1,))), price.calls(Spans((1,), (2,)))
    for (times, one), (_, two), (window, causal) in zip(alone, beside, price.masks()):
        # A window of one key hides the second; its bytes are then told by two tokens' worth of keys.
        seen = Spans((1,), (2,)).keys(window) - 1
        key = (two.bytes - one.bytes) / seen if seen else 0.0
        found.append(_Call(times, window, causal, one.flops, key, one.bytes - key))
    return found
