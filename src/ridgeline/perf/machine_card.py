"""A machine's card: how long each op takes on one device, by shape, whatever the model.

Knows ops by name, the rates that were measured on the device, and how to read between shapes. It must not know how
anything was measured (study/calibrate_machine.py). Of any model's forward pass on meta tensors it makes a Card, which
plan, simulate and explain predict by; that model need not have run here, nor exist.

Between tokens, seconds are read straight on; between sizes, as a start plus a multiple of the floor under the measured
rates (`Trend`), both of which fit the known sizes, times what the nearest sizes are off that. So launches stay
launches: a table of multiples of the floor would have thousands where the floor is nanoseconds, of which no mean means
anything.
And a card follows when the same kind of device turns out faster or slower (`at`): all that is measured again then is
one rate of reading and one of arithmetic, and starts stay what they were.
"""

from __future__ import annotations

import hashlib
import json
import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from ridgeline.core.cost import Cost
from ridgeline.core.errors import InvalidArgument
from ridgeline.core.step import Spans
from ridgeline.ops import Op, Ops
from ridgeline.perf.card import Card, Grid, Line, computed_rows, in_tiles, load_card
from ridgeline.perf.price import Price
from ridgeline.perf.roofline import Roofline

MACHINE = "machine"
VERSION = 4
NEAREST = 3.0
"""Known sizes count by one over their distance (of logarithms) to this power."""
FAR = 0.5
"""Known sizes count for a trend by one over this plus the square of their distance."""
TOKENS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 1024, 2048, 4096, 8192, 16384)
CONTEXTS = (16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
"""Where a model's Card has its points."""

Sizes = tuple[float, ...]


@dataclass(frozen=True)
class Point:
    """What one call took, and the floor that it is compared with."""

    flops: float
    bytes: float
    seconds: float

    def floor_s(self, roofline: Roofline) -> float:
        return max(self.flops / roofline.matrix_flops, self.bytes / roofline.bytes_per_s)


@dataclass(frozen=True)
class Known:
    """Sizes, and at some place of interest the seconds that a floor of so many takes there."""

    sizes: Sizes
    floor_s: float
    seconds: float


@dataclass(frozen=True)
class Curve:
    """An op at some sizes: (tokens, what a call took), in rising order."""

    sizes: Sizes
    points: tuple[tuple[float, Point], ...]

    def at(self, tokens: float, roofline: Roofline) -> Known:
        along = [(place, (one.floor_s(roofline), one.seconds)) for place, one in self.points]
        return Known(self.sizes, *between(along, tokens))


@dataclass(frozen=True)
class Plane:
    """Attention at some sizes: points[i][j] at rows[i] and columns[j].

    Decoding: requests, and their mean context. A prompt: new tokens, and the keys of the last of them over these; along
    the tokens its work grows with their square (`squares`).
    """

    sizes: Sizes
    rows: tuple[float, ...]
    columns: tuple[float, ...]
    points: tuple[tuple[Point, ...], ...]
    squares: bool = False

    def at(self, row: float, column: float, roofline: Roofline) -> Known:
        power = 2 if self.squares else 1
        along = [
            (
                place**power,
                between([(at, (one.floor_s(roofline), one.seconds)) for at, one in zip(self.columns, line)], column),
            )
            for place, line in zip(self.rows, self.points)
        ]
        return Known(self.sizes, *between(along, row**power))


@dataclass(frozen=True, kw_only=True)
class MachineCard:
    """What a device makes of ops in one dtype.

    read_bytes_per_s, matrix_flops: sustained rates that floors are counted by. reads: (bytes, bytes/s), read rate by
    working set. ops: by name. decode, prefill: attention. mixture_scale, attention_scale, decode_scale (all other ops),
    alone_scale (these in a step of one token): what ops take in decode steps as the engine runs them, as a share of
    their times in a row of their like; prefill_scale: the same of all ops in prompts. tile, captured: as on a Card.
    step_s, request_s, gap_s, alone_gap_s: around ops, on the device: of a step, of a request, and between two calls, of
    many tokens and of one; calls that begin under the end of the one before have less than none. start_s, launch_s,
    launch_scale: of the host, to hand a step to the device op by op: once, a call of each op in a row of its like, and
    what it takes in a step as a multiple of that. most_tokens, most_requests, longest: how far the points go. residual:
    as on a Card. steps: of the made-up models, as measured and as the card has them. doubt: why not to trust it, if
    anything.
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
    alone_scale: float = 1.0
    attention_scale: float = 1.0
    mixture_scale: float = 1.0
    prefill_scale: float = 1.0
    step_s: float = 0.0
    request_s: float = 0.0
    gap_s: float = 0.0
    alone_gap_s: float = 0.0
    tile: int = 1
    captured: tuple[int, ...] = ()
    start_s: float = 0.0
    launch_s: Mapping[str, float] = field(default_factory=dict)
    launch_scale: float = 1.0
    host_step_s: float = 0.0
    host_request_s: float = 0.0
    loop_step_s: float = 0.0
    loop_request_s: float = 0.0
    most_tokens: int
    most_requests: int
    longest: int
    residual: float = 0.0
    doubt: str = ""
    steps: tuple[Mapping[str, Any], ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    clocks: Mapping[str, Any] = field(default_factory=dict)

    @property
    def roofline(self) -> Roofline:
        return Roofline(self.matrix_flops, self.matrix_flops, self.read_bytes_per_s)

    @property
    def fastest(self) -> Roofline:
        """Roofs that nothing beats here: caches may be read faster than memory."""
        rate = max([self.read_bytes_per_s, *(rate for _, rate in self.reads)])
        return Roofline(self.matrix_flops, self.matrix_flops, rate)

    def at(self, read_bytes_per_s: float, matrix_flops: float) -> MachineCard:
        """The card of a device of the same kind with these rates: what is above an op's start follows them."""
        rates = Roofline(matrix_flops, matrix_flops, read_bytes_per_s)
        curves = {name: _moved(of, self.roofline, rates) for name, of in self.ops.items()}
        planes = [tuple(_moved_planes(of, self.roofline, rates)) for of in (self.decode, self.prefill)]
        read = read_bytes_per_s / self.read_bytes_per_s
        return replace(
            self,
            read_bytes_per_s=read_bytes_per_s,
            matrix_flops=matrix_flops,
            reads=tuple((size, rate * read) for size, rate in self.reads),
            ops=curves,
            decode=planes[0],
            prefill=planes[1],
        )

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
        return read_between([one.at(tokens, self.roofline) for one in self.ops[op.name]], sizes, floor_s)

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
            known = [one.at(row, column, roofline) for one in planes]
            seconds += times * read_between(known, sizes, roofline.seconds(cost))
        return seconds

    def card(self, price: Price, model: str, longest: int | None = None) -> Card:
        """The Card of a model, from its forward pass alone. longest: sequence; as far as both reach, if left out.

        InvalidArgument if an op of the model was not measured. Whatever the scales, no part takes less than its floor
        under the fastest rates that were seen here.
        """
        most = min(longest or price.model.spec.max_positions, self.longest)
        tokens = [one for one in TOKENS if one < self.most_tokens] + [self.most_tokens]
        requests = [one for one in TOKENS if one < self.most_requests] + [self.most_requests]
        contexts = [one for one in CONTEXTS if one < most] + [most]
        chunks = [one for one in tokens if 8 <= one <= most] or [min(8, most)]
        befores = [0, *(one for one in contexts if one < most)]
        bodies = [self._dense(price, one, 0) for one in tokens]
        heads = [(self._dense(price, one, 0), self._dense(price, one, one)) for one in requests]
        calls = heads[0][1].calls

        def decode(count: int, context: int) -> float:
            return self._attention(price, Spans((1,) * count, (context,) * count), self.attention_scale)

        def prefill(new: int, before: int) -> float:
            return self._attention(price, Spans((new,), (new + before,)), self.prefill_scale)

        return Card(
            device=self.device,
            model=model,
            dtype=self.dtype,
            made=self.made,
            body=Line(tuple((float(one), self._body(of, one, calls)) for one, of in zip(tokens, bodies))),
            head=Line(
                tuple(
                    (float(one), max(self._scale(one) * (both.seconds - of.seconds), both.floor_s - of.floor_s))
                    for one, (of, both) in zip(requests, heads)
                )
            ),
            decode=_grid(requests, contexts, decode),
            prefill=_grid(chunks, befores, prefill, power=True),
            longest=float(most),
            step_s=self.step_s + self.gap_s * calls,
            request_s=self.request_s,
            ops_scale=1.0,
            host_step_s=self.host_step_s,
            host_request_s=self.host_request_s,
            loop_step_s=self.loop_step_s,
            loop_request_s=self.loop_request_s,
            residual=self.residual,
            dispatch_s=self.start_s + self.launch_scale * self.launches_s(price) if self.launch_s else 0.0,
            tile=self.tile,
            captured=self.captured,
            versions=self.versions,
            clocks=self.clocks,
        )

    def _attention(self, price: Price, spans: Spans, scale: float) -> float:
        floor_s = sum(times * self.fastest.seconds(cost) for times, cost in price.calls(spans))
        return max(scale * self.attention_s(price, spans), floor_s)

    def launches_s(self, price: Price) -> float:
        """Seconds of the host to launch all ops of a step, each as in a row of its like. InvalidArgument for an op that
        was not measured."""
        calls = self._dense(price, 1, 1).names
        missing = sorted(set(calls) - set(self.launch_s))
        if missing:
            raise InvalidArgument("card", f"does not say what it takes to launch {', '.join(missing)}; calibrate again")
        return sum(self.launch_s[name] * count for name, count in calls.items())

    def parts(self, price: Price, spans: Spans) -> tuple[float, float, float]:
        """Seconds in rows of their like, of a step's mixtures, its attention and all other ops. Requests are alike."""
        watch = self._dense(price, computed_rows(spans, self.captured), len(spans.new))
        if sum(spans.new) == len(spans.new):
            spans = replace(spans, visible=tuple(in_tiles(one, self.tile) for one in spans.visible))
        return watch.mixture_s, self.attention_s(price, spans), watch.seconds - watch.mixture_s

    def _scale(self, tokens: int) -> float:
        return self.alone_scale if tokens == 1 else self.decode_scale

    def _body(self, of: _Seconds, tokens: int, calls: int) -> float:
        """Seconds of all ops but attention in a step of so many tokens; of one, with what lies between its calls."""
        if tokens > self.most_requests:
            return max(self.prefill_scale * of.seconds, of.floor_s)
        seconds = self._scale(tokens) * (of.seconds - of.mixture_s) + self.mixture_scale * of.mixture_s
        between_s = (self.alone_gap_s - self.gap_s) * calls if tokens == 1 else 0.0
        return max(seconds + between_s, of.floor_s)

    def _dense(self, price: Price, tokens: int, rows: int) -> _Seconds:
        """All ops of a step but attention."""
        watch = _Seconds(self)
        price.trace(Spans((tokens,), (tokens,)), rows, False, Ops({}, watch))
        return watch

    def points(self) -> Iterator[tuple[str, Sizes, float, float]]:
        """All that was measured: (op, sizes, tokens, 0) and ("attention", sizes, row, column)."""
        for name, curves in self.ops.items():
            for curve in curves:
                yield from ((name, curve.sizes, tokens, 0.0) for tokens, _ in curve.points)
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
    """An observer that adds up what a card says of every op but attention, and their floors; and counts all calls."""

    def __init__(self, card: MachineCard) -> None:
        self.card, self.fastest = card, card.fastest
        self.seconds = self.mixture_s = self.floor_s = 0.0
        self.names: Counter[str] = Counter()
        self._known: dict[tuple[str, float, Sizes, Cost], float] = {}

    def before(self, op: Op, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.names[op.name] += 1
        if op.name == "attention":
            return
        cost = op.floor(*args, **kwargs)
        key = op.name, *shape_of(op.name, args, kwargs), cost
        if key not in self._known:  # layers are alike
            self._known[key] = self.card.op_s(op, args, kwargs)
        self.seconds += self._known[key]
        if op.name == "moe":
            self.mixture_s += self._known[key]
        self.floor_s += self.fastest.seconds(cost)

    @property
    def calls(self) -> int:
        return self.names.total()

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


Pair = tuple[float, float]


def between(points: Sequence[tuple[float, Pair]], number: float) -> Pair:
    """Straight between the points, level beyond the first and the last."""
    if number <= points[0][0]:
        return points[0][1]
    if number >= points[-1][0]:
        return points[-1][1]
    place = bisect_right(points, number, key=lambda one: one[0])
    (x0, y0), (x1, y1) = points[place - 1], points[place]
    share = (number - x0) / (x1 - x0)
    return y0[0] + (y1[0] - y0[0]) * share, y0[1] + (y1[1] - y0[1]) * share


@dataclass(frozen=True)
class Trend:
    """Seconds of an op by its floor: a start, which every launch takes, and a multiple. Neither is below zero."""

    start_s: float
    times: float

    def __call__(self, floor_s: float) -> float:
        return self.start_s + self.times * floor_s


def trend(known: Sequence[Known], weights: Sequence[float]) -> Trend:
    """The least squared relative error over what is known."""
    # Minimize the sum of w (a / t + b f / t - 1)^2 over a, b >= 0.
    rows = [(weight, 1 / one.seconds, one.floor_s / one.seconds) for weight, one in zip(weights, known)]
    aa, bb = sum(w * p * p for w, p, _ in rows), sum(w * q * q for w, _, q in rows)
    ab = sum(w * p * q for w, p, q in rows)
    a1, b1 = sum(w * p for w, p, _ in rows), sum(w * q for w, _, q in rows)
    only_start, only_times = Trend(a1 / aa, 0.0), Trend(0.0, b1 / bb)
    determinant = aa * bb - ab * ab
    if determinant <= 1e-9 * aa * bb:  # all floors are alike: nothing tells a start from a multiple
        return only_times
    both = Trend((a1 * bb - b1 * ab) / determinant, (b1 * aa - a1 * ab) / determinant)
    if both.start_s < 0:
        return only_times
    return only_start if both.times < 0 else both


def read_between(known: Sequence[Known], sizes: Sizes, floor_s: float) -> float:
    """Seconds of an op of other sizes with this floor."""
    apart = [_apart(one.sizes, sizes) for one in known]
    line = trend(known, [1 / (FAR + one * one) for one in apart])
    off = [(one.sizes, one.seconds / line(one.floor_s)) for one in known]
    return line(floor_s) * nearest(off, sizes)


def nearest(known: Sequence[tuple[Sizes, float]], sizes: Sizes) -> float:
    """A geometric mean of the values at known sizes, the nearer the heavier (Shepard, 1968)."""
    total = mean = 0.0
    for other, value in known:
        apart = _apart(sizes, other)
        if apart < 1e-9:
            return value
        weight = apart**-NEAREST
        total += weight
        mean += weight * math.log(value)
    return math.exp(mean / total)


def _apart(one: Sizes, other: Sizes) -> float:
    return math.hypot(*(math.log(a / b) for a, b in zip(one, other, strict=True)))


def _moved(curves: Sequence[Curve], old: Roofline, new: Roofline) -> tuple[Curve, ...]:
    """An op's curves under other rates."""
    found = []
    for curve in curves:
        points = []
        for tokens, point in curve.points:
            line = trend([one.at(tokens, old) for one in curves], [1.0] * len(curves))
            points.append((tokens, _under(point, line, old, new)))
        found.append(Curve(curve.sizes, tuple(points)))
    return tuple(found)


def _moved_planes(planes: Sequence[Plane], old: Roofline, new: Roofline) -> Iterator[Plane]:
    for plane in planes:
        yield replace(
            plane,
            points=tuple(
                tuple(
                    _under(
                        point,
                        trend([one.at(row, column, old) for one in planes], [1.0] * len(planes)),
                        old,
                        new,
                    )
                    for column, point in zip(plane.columns, line)
                )
                for row, line in zip(plane.rows, plane.points)
            ),
        )


def _under(point: Point, line: Trend, old: Roofline, new: Roofline) -> Point:
    return replace(point, seconds=point.seconds * line(point.floor_s(new)) / line(point.floor_s(old)))


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
        name: tuple(Curve(tuple(one["sizes"]), tuple((at, Point(**of)) for at, of in one["points"])) for one in curves)
        for name, curves in values["ops"].items()
    }
    for name in ("decode", "prefill"):
        values[name] = tuple(
            Plane(
                tuple(one["sizes"]),
                tuple(one["rows"]),
                tuple(one["columns"]),
                tuple(tuple(Point(**of) for of in line) for line in one["points"]),
                one["squares"],
            )
            for one in values[name]
        )
    values["steps"], values["captured"] = tuple(values["steps"]), tuple(values["captured"])
    return MachineCard(**values)
