"""A calibration card: what steps of one model really take on one device, on a grid, and how to read between its points.

Knows times that were measured, and their file. It must not know how they were measured (study/calibrate.py), nor
any model beyond the name on the card.

A step is all ops but attention (by tokens), the head (by sampled rows), attention (decodes by requests and context;
prefills by new tokens and those before them), all times ops_scale; and what lies around them: step_s + request_s a
request on the device's side, host_step_s + host_request_s on the host's, and between two steps, in the loop of whoever
drives the engine, loop_step_s + loop_request_s. Attention of decoding takes a request's keys by whole tiles. Steps with
prompts that are captured take all their size's rows through the ops; those that a GPU is handed op by op take no less
than dispatch_s.
"""

from __future__ import annotations

import hashlib
import json
import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ridgeline.core.errors import InvalidArgument
from ridgeline.core.step import Spans, padded

VERSION = 6


def in_tiles(visible: int, tile: int) -> int:
    """Keys that a kernel goes through which takes them by so many at once; one that is not filled once is cut short."""
    return visible if visible <= tile else -(-visible // tile) * tile


def computed_rows(spans: Spans, captured: Sequence[int]) -> int:
    """Rows that a step takes through its ops; with prompts, those for nobody too if these numbers are captured."""
    tokens = sum(spans.new)
    return padded(tokens, captured) if tokens > len(spans.new) else tokens


@dataclass(frozen=True)
class Line:
    """Seconds by one positive number: measured points in rising order, linear between them and beyond the last."""

    points: tuple[tuple[float, float], ...]

    def __call__(self, number: float) -> float:
        points = self.points
        if number <= points[0][0] or len(points) == 1:
            return points[0][1]
        place = min(bisect_right(points, (number, math.inf)), len(points) - 1)
        (x0, y0), (x1, y1) = points[place - 1], points[place]
        return y0 + (y1 - y0) * (number - x0) / (x1 - x0)

    def power(self, number: float) -> float:
        """The same, but straight on logarithmic axes: what grows as a power between two points is met exactly."""
        points = self.points
        if number <= points[0][0] or len(points) == 1:
            return points[0][1]
        place = min(bisect_right(points, (number, math.inf)), len(points) - 1)
        (x0, y0), (x1, y1) = points[place - 1], points[place]
        if min(y0, y1) <= 0:
            return self(number)
        return float(y0 * (y1 / y0) ** (math.log(number / x0) / math.log(x1 / x0)))

    @property
    def most(self) -> float:
        return self.points[-1][0]


@dataclass(frozen=True)
class Grid:
    """Seconds by two numbers: values[i][j] at rows[i], columns[j]; linear between and beyond the last.

    power: along rows a power law instead, for what grows with their square.
    """

    rows: tuple[float, ...]
    columns: tuple[float, ...]
    values: tuple[tuple[float, ...], ...]
    power: bool = False

    def __call__(self, row: float, column: float) -> float:
        along = [Line(tuple(zip(self.columns, line)))(column) for line in self.values]
        line = Line(tuple(zip(self.rows, along)))
        return line.power(row) if self.power else line(row)


@dataclass(frozen=True, kw_only=True)
class Card:
    """Measured seconds of one model's steps on one device.

    decode: by requests and their mean context. prefill: of one request, by new tokens and tokens before them. longest:
    most keys that a request may have had. tile: keys that decoding takes at once. captured: numbers of tokens, rising,
    at which steps with prompts are captured. made: date; versions: of packages; clocks: as the device reported them.
    residual: 95th percentile of |predicted / measured - 1| over steps that took no part in the fit: the error bar of a
    prediction.
    """

    device: str
    model: str
    dtype: str
    made: str
    body: Line
    head: Line
    decode: Grid
    prefill: Grid
    longest: float
    step_s: float
    request_s: float
    ops_scale: float
    host_step_s: float
    host_request_s: float
    loop_step_s: float
    loop_request_s: float
    residual: float
    dispatch_s: float = 0.0
    tile: int = 1
    captured: tuple[int, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    clocks: Mapping[str, Any] = field(default_factory=dict)

    def device_s(self, spans: Spans, rows: int) -> float:
        """Seconds from a step's dispatch to its results."""
        tokens, computed = sum(spans.new), computed_rows(spans, self.captured)
        ops_s = self.body(computed) + (self.head(rows) if rows else 0.0) + self.attention_s(spans)
        seconds = self.step_s + self.request_s * len(spans.new) + self.ops_scale * ops_s
        op_by_op = tokens > max(len(spans.new), *self.captured, 0)
        return max(seconds, self.dispatch_s) if op_by_op else seconds

    def host_s(self, spans: Spans) -> float:
        """Seconds of scheduling and commit around it."""
        return self.host_step_s + self.host_request_s * len(spans.new)

    def loop_s(self, spans: Spans) -> float:
        """Seconds between the end of a step and the start of the next one, while there is work."""
        return self.loop_step_s + self.loop_request_s * len(spans.new)

    def attention_s(self, spans: Spans) -> float:
        """Decodes together, by their number and mean context; prefills one by one, their fixed part counted once."""
        ones = [in_tiles(visible, self.tile) for new, visible in zip(spans.new, spans.visible) if new == 1]
        seconds = self.decode(len(ones), sum(ones) / len(ones)) if ones else 0.0
        fixed = self.prefill.values[0][0]
        others = [(new, visible) for new, visible in zip(spans.new, spans.visible) if new > 1]
        for place, (new, visible) in enumerate(others):
            one = self.prefill(new, visible - new)
            seconds += one if place == 0 and not ones else max(one - fixed, 0.0)
        return seconds

    def reach(self, spans: Spans) -> float:
        """How far a step lies beyond what was measured: the largest of its tokens, decodes and keys over the grid's
        last ones; up to 1 it lies within."""
        ones = sum(new == 1 for new in spans.new)
        return max(
            sum(spans.new) / self.body.most,
            ones / self.decode.rows[-1],
            max(spans.visible) / self.longest,
        )

    def covers(self, spans: Spans) -> bool:
        """Whether a step lies within what was measured; beyond it a prediction is a guess along the last slope."""
        return self.reach(spans) <= 1

    def error(self, spans: Spans) -> float:
        """Error bar of a step's prediction, relative: the residual, and beyond the grid as many times that as the step
        reaches beyond it (how wrong the last slope gets is not known; that it gets worse is)."""
        return self.residual * max(self.reach(spans), 1.0)

    def check(self, model: str, dtype: str) -> None:
        """InvalidArgument if the card is not of this model in this dtype."""
        if (self.model, self.dtype) != (model, dtype):
            raise InvalidArgument("card", f"is of {self.model} in {self.dtype}, not of {model} in {dtype}")

    def as_dict(self) -> dict[str, Any]:
        return {"version": VERSION, **asdict(self)}

    @property
    def sha256(self) -> str:
        """Of the card's figures: what a prediction was made with."""
        return hashlib.sha256(json.dumps(self.as_dict(), sort_keys=True).encode()).hexdigest()

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.as_dict(), indent=1) + "\n", encoding="utf-8")


def load_card(path: Path) -> Card:
    """A saved card. InvalidArgument for a file that is none, or of another version."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise InvalidArgument("card", f"cannot read {path}: {error}") from None
    if not isinstance(values, dict) or values.pop("version", None) != VERSION:
        raise InvalidArgument("card", f"{path} is not a calibration card of version {VERSION}; calibrate again")
    names = {one.name for one in fields(Card)}
    if set(values) != names:
        wrong = sorted(set(values) ^ names)
        raise InvalidArgument("card", f"{path}: fields {', '.join(wrong)} are missing or unknown; calibrate again")
    for name in ("body", "head"):
        values[name] = Line(_pairs(values[name]["points"]))
    for name in ("decode", "prefill"):
        grid = values[name]
        shape = tuple(grid["rows"]), tuple(grid["columns"])
        values[name] = Grid(*shape, tuple(map(tuple, grid["values"])), grid["power"])
    values["captured"] = tuple(values["captured"])
    return Card(**values)


def _pairs(points: Sequence[Sequence[float]]) -> tuple[tuple[float, float], ...]:
    return tuple((x, y) for x, y in points)
