"""A machine's card: how many times its floor each op takes on one device, by shape, whatever the model.

Knows ops by name, the rates that were measured on the device, and how to read between shapes. It must not know how
anything was measured (study/calibrate_machine.py). Of any model's forward pass on meta tensors it makes a Card, which
plan, simulate and explain predict by; that model need not have run here, nor exist.

An op's time is its floor under the measured rates, times what stands on the card for its number of tokens and for the
sizes nearest to its own. So a card follows when the same kind of device turns out faster or slower (`at`): all that is
measured again then is one rate of reading and one of arithmetic.
"""

from __future__ import annotations

import hashlib
import json
import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from ridgeline.core.errors import InvalidArgument
from ridgeline.core.step import Spans
from ridgeline.ops import Op, Ops
from ridgeline.perf.card import Card, Grid, Line, load_card
from ridgeline.perf.price import Price
from ridgeline.perf.roofline import Roofline

MACHINE = "machine"
VERSION = 1
NEAREST = 3.0
"""Known sizes count by one over their distance (of logarithms) to this power."""
TOKENS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 1024, 2048, 4096, 8192, 16384)
CONTEXTS = (16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
"""Where a model's Card has its points."""

Sizes = tuple[float, ...]


@dataclass(frozen=True)
class Curve:
    """An op at some sizes: (tokens, times its floor), in rising order."""

    sizes: Sizes
    slowdown: tuple[tuple[float, float], ...]

    def __call__(self, tokens: float) -> float:
        return between(self.slowdown, tokens)


@dataclass(frozen=True)
class Plane:
    """Attention at some sizes: slowdown[i][j] at rows[i] and columns[j].

    Decoding: requests, and their mean context. A prompt: new tokens, and the keys of the last of them over these.
    """

    sizes: Sizes
    rows: tuple[float, ...]
    columns: tuple[float, ...]
    slowdown: tuple[tuple[float, ...], ...]

    def __call__(self, row: float, column: float) -> float:
        along = [between(tuple(zip(self.columns, line)), column) for line in self.slowdown]
        return between(tuple(zip(self.rows, along)), row)


@dataclass(frozen=True, kw_only=True)
class MachineCard:
    """What a device makes of ops in one dtype.

    read_bytes_per_s, matrix_flops: sustained rates that floors are counted by. reads: (bytes, bytes/s), read rate by
    working set. ops: by name. decode, prefill: attention. decode_scale, prefill_scale: what ops take in steps as the
    engine runs them, as a share of their times in a row of their like. step_s, request_s: around ops, on the device.
    start_s, call_s: of the host, to hand a step to the device op by op. most_tokens, most_requests, longest: how far
    the points go. residual: as on a Card.
    """

    device: str
    dtype: str
    made: str
    read_bytes_per_s: float
    matrix_flops: float
    reads: tuple[tuple[float, float], ...]
    ops: Mapping[str, tuple[Curve, ...]]
    decode: tuple[Plane, ...]
    prefill: tuple[Plane, ...]
    decode_scale: float = 1.0
    prefill_scale: float = 1.0
    step_s: float = 0.0
    request_s: float = 0.0
    start_s: float = 0.0
    call_s: float = 0.0
    host_step_s: float = 0.0
    host_request_s: float = 0.0
    loop_step_s: float = 0.0
    loop_request_s: float = 0.0
    most_tokens: int
    most_requests: int
    longest: int
    residual: float = 0.0
    versions: Mapping[str, str] = field(default_factory=dict)
    clocks: Mapping[str, Any] = field(default_factory=dict)

    @property
    def roofline(self) -> Roofline:
        return Roofline(self.matrix_flops, self.matrix_flops, self.read_bytes_per_s)

    def at(self, read_bytes_per_s: float, matrix_flops: float) -> MachineCard:
        """The card of a device of the same kind with these rates."""
        return replace(self, read_bytes_per_s=read_bytes_per_s, matrix_flops=matrix_flops)

    def op_s(self, op: Op, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
        """Seconds of a call of any op but attention. InvalidArgument for an op that was not measured."""
        tokens, sizes = shape_of(op.name, args, kwargs)
        if not tokens:
            return 0.0
        if op.name not in self.ops:
            raise InvalidArgument(
                "card", f"says nothing of the op {op.name}, only of {', '.join(self.ops)}; calibrate the model itself"
            )
        floor_s = self.roofline.seconds(op.floor(*args, **kwargs))
        return floor_s * nearest([(one.sizes, one(tokens)) for one in self.ops[op.name]], sizes)

    def attention_s(self, price: Price, spans: Spans) -> float:
        """Seconds of all attention calls of a step, whose requests are alike."""
        spec, roofline = price.model.spec, self.roofline
        sizes = (float(spec.heads), float(spec.kv_heads), float(spec.head_dim))
        new, visible = spans.new[0], spans.visible[0]
        seconds = 0.0
        for (times, cost), (window, _) in zip(price.calls(spans), price.masks()):
            seen = visible if window is None else min(visible, window + new - 1)
            row, column, planes = (
                (len(spans.new), seen, self.decode) if new == 1 else (new, max(seen / new, 1.0), self.prefill)
            )
            seconds += (
                times * roofline.seconds(cost) * nearest([(one.sizes, one(row, column)) for one in planes], sizes)
            )
        return seconds

    def card(self, price: Price, model: str, longest: int | None = None) -> Card:
        """The Card of a model, from its forward pass alone. longest: sequence; as far as both reach, if left out.

        InvalidArgument if an op of the model was not measured.
        """
        most = min(longest or price.model.spec.max_positions, self.longest)
        tokens = [one for one in TOKENS if one < self.most_tokens] + [self.most_tokens]
        requests = [one for one in TOKENS if one < self.most_requests] + [self.most_requests]
        contexts = [one for one in CONTEXTS if one < most] + [most]
        chunks = [one for one in tokens if 8 <= one <= most] or [min(8, most)]
        befores = [0, *(one for one in contexts if one < most)]
        scales = [self.decode_scale if one <= self.most_requests else self.prefill_scale for one in tokens]
        bodies = [self._dense(price, one, 0)[0] for one in tokens]
        heads = [self._dense(price, one, one)[0] - self._dense(price, one, 0)[0] for one in requests]

        def decode(count: int, context: int) -> float:
            return self.decode_scale * self.attention_s(price, Spans((1,) * count, (context,) * count))

        def prefill(new: int, before: int) -> float:
            return self.prefill_scale * self.attention_s(price, Spans((new,), (new + before,)))

        return Card(
            device=self.device,
            model=model,
            dtype=self.dtype,
            made=self.made,
            body=Line(tuple((float(one), scale * body) for one, scale, body in zip(tokens, scales, bodies))),
            head=Line(tuple((float(one), self.decode_scale * head) for one, head in zip(requests, heads))),
            decode=_grid(requests, contexts, decode),
            prefill=_grid(chunks, befores, prefill, power=True),
            longest=float(most),
            step_s=self.step_s,
            request_s=self.request_s,
            ops_scale=1.0,
            host_step_s=self.host_step_s,
            host_request_s=self.host_request_s,
            loop_step_s=self.loop_step_s,
            loop_request_s=self.loop_request_s,
            residual=self.residual,
            dispatch_s=self.start_s + self.call_s * self._dense(price, 1, 1)[1],
            versions=self.versions,
            clocks=self.clocks,
        )

    def _dense(self, price: Price, tokens: int, rows: int) -> tuple[float, int]:
        """(seconds of all ops but attention, calls of all ops) of a step."""
        watch = _Seconds(self)
        price.trace(Spans((tokens,), (tokens,)), rows, False, Ops({}, watch))
        return watch.seconds, watch.calls

    def points(self) -> Iterator[tuple[str, Sizes, float, float]]:
        """All that was measured: (op, sizes, tokens, 0) and ("attention", sizes, row, column)."""
        for name, curves in self.ops.items():
            for curve in curves:
                yield from ((name, curve.sizes, tokens, 0.0) for tokens, _ in curve.slowdown)
        for plane in (*self.decode, *self.prefill):
            yield from (("attention", plane.sizes, row, column) for row in plane.rows for column in plane.columns)

    def as_dict(self) -> dict[str, Any]:
        return {"card": MACHINE, "version": VERSION, **asdict(self)}

    @property
    def sha256(self) -> str:
        return hashlib.sha256(json.dumps(self.as_dict(), sort_keys=True).encode()).hexdigest()

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.as_dict(), indent=1) + "\n", encoding="utf-8")


class _Seconds:
    """An observer that adds up what a card says of every op but attention."""

    def __init__(self, card: MachineCard) -> None:
        self.card = card
        self.seconds = 0.0
        self.calls = 0

    def before(self, op: Op, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.calls += 1
        if op.name != "attention":
            self.seconds += self.card.op_s(op, args, kwargs)

    def after(self, op: Op, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None: ...


def shape_of(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[float, Sizes]:
    """(tokens, the other sizes) of an op call; of a mixture, the mean rows of an expert instead of tokens.

    InvalidArgument for an op whose sizes nobody has named.
    """
    if name not in SHAPES:
        raise InvalidArgument("card", f"does not know the sizes of the op {name}; calibrate the model itself")
    tokens, *sizes = SHAPES[name](*args, **kwargs)
    return float(tokens), tuple(map(float, sizes))


def _moe(x: Any, router: Any, gate_up: Any, down: Any, top_k: int, *_: Any) -> tuple[float, ...]:
    return x.shape[0] * top_k / gate_up.shape[0], gate_up.shape[0], down.shape[2], x.shape[1]


SHAPES: dict[str, Callable[..., Sequence[float]]] = {
    "linear": lambda x, weight, *_: (x.shape[0], weight.out_features, weight.in_features),
    "gated_linear": lambda x, weight, *_: (x.shape[0], weight.out_features, weight.in_features),
    "gate": lambda gate_up, *_: tuple(gate_up.shape),
    "moe": _moe,
    "norm": lambda x, *_: tuple(x.shape),
    "layer_norm": lambda x, *_: tuple(x.shape),
    "rope_kv_write": lambda qkv, *_: tuple(qkv.shape),
    "embed": lambda ids, weight, *_: (ids.shape[0], weight.in_features),
    "take": lambda x, residual, rows: (rows.numel(), x.shape[1]),
    "sample": lambda logits, *_: tuple(logits.shape),
}
"""Op -> (tokens, other sizes …) of its arguments."""


def between(points: Sequence[tuple[float, float]], number: float) -> float:
    """Straight on logarithmic axes between the points, level beyond the first and the last."""
    if number <= points[0][0]:
        return points[0][1]
    if number >= points[-1][0]:
        return points[-1][1]
    place = bisect_right(points, (number, math.inf))
    (x0, y0), (x1, y1) = points[place - 1], points[place]
    return float(y0 * (y1 / y0) ** (math.log(number / x0) / math.log(x1 / x0)))


def nearest(known: Sequence[tuple[Sizes, float]], sizes: Sizes) -> float:
    """A geometric mean of the values at known sizes, the nearer the heavier (Shepard, 1968)."""
    total = mean = 0.0
    for other, value in known:
        apart = math.hypot(*(math.log(a / b) for a, b in zip(sizes, other, strict=True)))
        if apart < 1e-9:
            return value
        weight = apart**-NEAREST
        total += weight
        mean += weight * math.log(value)
    return math.exp(mean / total)


def _grid(rows: Sequence[int], columns: Sequence[int], value: Callable[[int, int], float], power: bool = False) -> Grid:
    values = tuple(tuple(value(row, column) for column in columns) for row in rows)
    return Grid(tuple(map(float, rows)), tuple(map(float, columns)), values, power)


def read_card(path: Path) -> Card | MachineCard:
    """A saved card of either kind. InvalidArgument for a file that is none, or of another version."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise InvalidArgument("card", f"cannot read {path}: {error}") from None
    if isinstance(values, dict) and values.get("card") == MACHINE:
        return _read(values, str(path))
    return load_card(path)


def card_of(card: Card | MachineCard, price: Price, model: str, dtype: str) -> Card:
    """What a card says of a model. InvalidArgument for a card of another model or dtype."""
    if isinstance(card, Card):
        card.check(model, dtype)
        return card
    if card.dtype != dtype:
        raise InvalidArgument("card", f"is of {card.device} in {card.dtype}, not in {dtype}")
    return card.card(price, model)


def _read(values: dict[str, Any], origin: str) -> MachineCard:
    if values.pop("version", None) != VERSION:
        raise InvalidArgument("card", f"{origin} is not a machine's card of version {VERSION}; calibrate again")
    values.pop("card")
    names = {one.name for one in fields(MachineCard)}
    if set(values) != names:
        wrong = sorted(set(values) ^ names)
        raise InvalidArgument("card", f"{origin}: fields {', '.join(wrong)} are missing or unknown; calibrate again")
    values["reads"] = tuple(map(tuple, values["reads"]))
    values["ops"] = {
        name: tuple(Curve(tuple(one["sizes"]), tuple(map(tuple, one["slowdown"]))) for one in curves)
        for name, curves in values["ops"].items()
    }
    for name in ("decode", "prefill"):
        values[name] = tuple(
            Plane(tuple(one["sizes"]), tuple(one["rows"]), tuple(one["columns"]), tuple(map(tuple, one["slowdown"])))
            for one in values[name]
        )
    return MachineCard(**values)
