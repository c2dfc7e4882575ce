"""Pictures of what the studies say: rooflines, step bars, memory, batches, load, speculation, predictions.

Knows the studies' results and matplotlib, which is imported only when a picture is drawn. It must not measure nor
price anything: what is not in a result is not in its picture. Files are PNG or SVG, by their suffix.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ridgeline.core.errors import InvalidArgument

if TYPE_CHECKING:
    from ridgeline.perf.hardware import Hardware
    from ridgeline.study.explain import Explained
    from ridgeline.study.plan import Plan, Sweep
    from ridgeline.study.simulate import Capacity
    from ridgeline.workload.measure import Served

SUFFIXES = (".png", ".svg")
DPI = 140
WIDTH = 9.0
TINY, SMALL, NORMAL = 7.5, 8, 9.5
"""Font sizes: a picture is nine inches wide and shown at some 850 pixels, where 8 points are 10 of them."""
INK, FAINT = "#333333", "#8A8A8A"
DASHED, DOTTED = (0, (5, 3)), (0, (1.5, 2))

CLASS_COLOURS = {
    "contraction": "#0072B2",
    "normalization": "#D98200",
    "elementwise": "#009E73",
    "movement": "#8A8A8A",
}
OP_COLOURS = {
    "attention": "#0072B2",
    "linear": "#56B4E9",
    "gated_linear": "#009E73",
    "moe": "#2E7D32",
    "norm": "#E69F00",
    "rope_kv_write": "#CC79A7",
    "sample": "#D55E00",
    "embed": "#8C6D31",
}
SPARE_COLOURS = ("#F0E442", "#A52A2A", "#20B2AA", "#708090")
OTHER_OPS, GAPS, HOST, DRAFTING = "all other ops", "gaps", "host", "drafting"
PART_COLOURS = {OTHER_OPS: "#BFDDF0", GAPS: "#D9D9D9", HOST: "#8A8A8A", DRAFTING: "#7B68EE"}
LINE_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = {"prefill": "o", "decode": "^", "mixed": "s", "tree": "D"}
LEAST_AREA, MOST_AREA = 16.0, 480.0
FAR = 12
"""Times further apart than this are drawn on a logarithmic axis."""
NAMED_SHARE = 0.04
"""Ops below this share of their phase stand without a name."""


# Files and figures


def checked(path: Path | None) -> Path | None:
    """The path, if a picture can be of that form; asked before the work that the picture shows.

    Raises InvalidArgument for another suffix than .png or .svg.
    """
    if path is not None and path.suffix.lower() not in SUFFIXES:
        raise InvalidArgument("plot", f"must end in {' or '.join(SUFFIXES)}, not {path.name!r}")
    return path


def save(figure: Any, path: Path) -> None:
    """Write a figure, by the suffix of `path`; makes its folder. The same figure gives the same bytes."""
    import matplotlib

    checked(path)
    plain = {"Date": None} if path.suffix.lower() == ".svg" else {"Software": None}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with matplotlib.rc_context({"svg.hashsalt": "ridgeline"}):
            figure.savefig(path, dpi=DPI, facecolor="white", metadata=plain)
    except OSError as error:
        raise InvalidArgument("plot", f"{path} cannot be written: {error.strerror}") from None


def _empty(height: float) -> Any:
    """A figure without any window behind it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _figure(height: float, rows: int = 1, columns: int = 1, **grid: Any) -> tuple[Any, list[Any]]:
    """A figure and its axes row by row."""
    figure = _empty(height)
    panels = list(figure.subplots(rows, columns, squeeze=False, **grid).flat)
    for axes in panels:
        _plain(axes)
    return figure, panels


def _panels(figure: Any, count: int, **grid: Any) -> list[Any]:
    """So many axes, two in a row."""
    columns = min(count, 2)
    every = list(figure.subplots(-(-count // columns), columns, squeeze=False, **grid).flat)
    for axes in every:
        _plain(axes)
    for axes in every[count:]:
        axes.set_visible(False)
    return every[:count]


def _plain(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#BBBBBB")
    axes.grid(alpha=0.25, linewidth=0.5)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=SMALL, labelcolor=INK, color="#BBBBBB", which="both")


def _words(axes: Any, title: str = "", x: str = "", y: str = "") -> None:
    axes.set_title(title, fontsize=NORMAL, loc="left", color=INK)
    axes.set_xlabel(x, fontsize=SMALL, color=INK)
    axes.set_ylabel(y, fontsize=SMALL, color=INK)


def _note(axes: Any, text: str, at: tuple[float, float], by: tuple[float, float], **more: Any) -> None:
    """Small text beside a point, moved by so many points of type."""
    style = {"fontsize": TINY, "color": INK, **more}
    axes.annotate(text, at, xytext=by, textcoords="offset points", **style)


def _title(figure: Any, text: str) -> None:
    figure.suptitle(text, fontsize=NORMAL + 1, color=INK, x=0.01, ha="left")


def _legend(figure: Any, entries: Mapping[str, Any], columns: int = 7) -> None:
    figure.legend(
        list(entries.values()), list(entries), loc="outside lower center", ncols=min(len(entries), columns),
        fontsize=SMALL, frameon=False, handletextpad=0.4, columnspacing=1.1, labelcolor=INK,
    )  # fmt: skip


def _engineering(number: float, unit: str) -> str:
    """4.8 TB/s."""
    for letter, scale in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= scale:
            return f"{number / scale:.3g} {letter}{unit}"
    return f"{number:.3g} {unit}"


def _short(number: float, _: Any = None) -> str:
    """Ticks of a logarithmic axis as people write them: 0.5, 20, 4k."""
    if number >= 1e6:
        return f"{number / 1e6:g}M"
    return f"{number / 1e3:g}k" if number >= 1e3 else f"{number:g}"


def _logarithmic(*every: Any) -> None:
    """Ticks of logarithmic axes (x or y of a panel): powers of ten, and 2, 3 and 5 of each where there are few."""
    from matplotlib.ticker import FuncFormatter

    def between(axis: Any) -> Any:
        def shown(number: float, _: Any = None) -> str:
            low, high = axis.get_view_interval()
            first = round(number / 10 ** math.floor(math.log10(number) + 1e-9))
            return _short(number) if high < 40 * low and first in (2, 3, 5) else ""

        return FuncFormatter(shown)

    for axis in every:
        axis.set_major_formatter(FuncFormatter(_short))
        axis.set_minor_formatter(between(axis))


# Rooflines


@dataclass(frozen=True, slots=True)
class Roof:
    """Rates to draw as a roof. measured: solid; otherwise from a datasheet, dashed. place: which memory it is."""

    flops_per_s: float
    bytes_per_s: float
    measured: bool
    place: str = ""

    @property
    def ridge(self) -> float:
        return self.flops_per_s / self.bytes_per_s


@dataclass(frozen=True, slots=True)
class Point:
    """An op under a roof: FLOP/byte, FLOP/s, its share of its phase's time."""

    name: str
    kind: str
    phase: str
    intensity: float
    flops_per_s: float
    share: float

    @property
    def area(self) -> float:
        return LEAST_AREA + MOST_AREA * self.share


@dataclass(frozen=True)
class RooflinePanel:
    """One machine's roofs, the first of which has its ridge named, and the ops under them.

    vector_flops: FLOP/s of what is no contraction, where other units do that.
    """

    title: str
    roofs: tuple[Roof, ...]
    points: tuple[Point, ...]
    vector_flops: float | None = None


Op = tuple[str, str, float, float, float]
"""(name, class, FLOPs, bytes, seconds)."""


def points_of(phase: str, ops: Sequence[Op]) -> list[Point]:
    """Ops as points; what does no arithmetic (lookups, copies) has no place on a roofline."""
    whole = sum(one[-1] for one in ops)
    return [
        Point(name, kind, phase, flops / bytes_, flops / seconds, seconds / whole)
        for name, kind, flops, bytes_, seconds in ops
        if flops > 0 and bytes_ > 0 and seconds > 0
    ]


def planned_panel(plan: Plan, datasheet: Hardware | None = None) -> RooflinePanel:
    """Ops at their floors: each lies on the roof that stops it. datasheet: of a machine that was measured."""
    from ridgeline.perf.hardware import THIS
    from ridgeline.perf.roofline import Roofline

    own = Roofline.of(plan.hardware, plan.dtype)
    roofs = [Roof(own.matrix_flops, own.bytes_per_s, plan.hardware.id == THIS)]
    if datasheet is not None:
        other = Roofline.of(datasheet, plan.dtype)
        roofs.append(Roof(other.matrix_flops, other.bytes_per_s, False))
    points = [
        point
        for name, phase in (("prefill", plan.prefill), ("decode", plan.decode))
        for point in points_of(name, [(one.name, one.kind, one.flops, one.bytes, one.seconds) for one in phase.ops])
    ]
    vector = own.vector_flops if own.vector_flops < own.matrix_flops else None
    return RooflinePanel(plan.hardware.name, tuple(roofs), tuple(points), vector)


def explained_panel(steps: Sequence[Explained], title: str, datasheet: Hardware | None = None) -> RooflinePanel:
    """Ops as measured, under the limit measured beside them: main memory's, and the fastest cache's.

    datasheet: of this machine, if there is one.
    """
    from ridgeline.perf.roofline import Roofline

    curve, dtype = steps[0].curve, steps[0].dtype
    roofs = [Roof(curve.flops_per_s, curve.dram_bytes_per_s, True, "memory")]
    (size, rate), *_ = curve.points
    if rate > 1.1 * curve.dram_bytes_per_s:
        roofs.append(Roof(curve.flops_per_s, rate, True, f"{size >> 10} kB in a cache"))
    if datasheet is not None and dtype in datasheet.matrix:
        other = Roofline.of(datasheet, dtype)
        roofs.append(Roof(other.matrix_flops, other.bytes_per_s, False, "memory"))
    points = [
        point
        for step in steps
        for point in points_of(
            step.kind, [(one.op, one.kind, one.cost.flops, one.cost.bytes, one.measured_s) for one in step.ops]
        )
    ]
    return RooflinePanel(title, tuple(roofs), tuple(points))


def roofline(panels: Sequence[RooflinePanel], title: str) -> Any:
    """Ops under their roofs, a panel a machine on the same axes: FLOP/s over FLOP/byte, both logarithmic.

    Dashed: datasheet; solid: measured. Area: share of the phase's time; colour: class; marker: phase.
    """
    figure = _empty(_roofline_height(len(panels)))
    every = _rooflines(figure, panels)
    _title(figure, title)
    _name_rooflines(figure, every, panels)
    return figure


def plans(found: Sequence[Plan], datasheets: Sequence[Hardware | None]) -> Any:
    """Rooflines of a plan's machines, and below them where each one's memory goes."""
    rows = -(-len(found) // 2)
    heights = _roofline_height(len(found)), 0.5 + 1.9 * rows
    figure = _empty(sum(heights))
    above, below = figure.subfigures(2, 1, height_ratios=heights)
    panels = [planned_panel(plan, sheet) for plan, sheet in zip(found, datasheets)]
    every = _rooflines(above, panels)
    first = found[0]
    load = f"{first.batch} × ({first.prompt_len:,} + {first.output_len:,}) tokens"
    _title(above, f"{first.model}, {first.dtype}, {load}: each op at its floor")
    _waterfalls(below, found)
    _name_rooflines(figure, every, panels)
    return figure


def _roofline_height(panels: int) -> float:
    rows = -(-panels // 2)
    return 0.9 + (4.1 if rows == 1 else 3.5) * rows


def _rooflines(figure: Any, panels: Sequence[RooflinePanel]) -> list[Any]:
    every = _panels(figure, len(panels), sharey=True)
    span = _span(panels)
    for number, (axes, panel) in enumerate(zip(every, panels)):
        _roofs(axes, panel, span)
        _words(axes, panel.title, "FLOP/byte", "" if number % 2 else "FLOP/s")
    _legend(figure, _roofline_legend(panels), columns=10)
    return every


def _name_rooflines(figure: Any, every: Sequence[Any], panels: Sequence[RooflinePanel]) -> None:
    """Names are laid beside each other, which needs the axes where they will be: so the figure is drawn first."""
    figure.canvas.draw()
    for axes, panel in zip(every, panels):
        _name_roofs(axes, panel)
        _name_points(axes, panel)


def _span(panels: Sequence[RooflinePanel]) -> tuple[float, float, float, float]:
    """Axes that hold all points and ridges: (least, most FLOP/byte, least, most FLOP/s)."""
    roofs = [one for panel in panels for one in panel.roofs]
    points = [one for panel in panels for one in panel.points]
    xs = [one.intensity for one in points] + [one.ridge for one in roofs]
    ys = [one.flops_per_s for one in points] + [one.flops_per_s for one in roofs]
    return min(xs) / 3, max(xs) * 5, min(ys) / 4, max(ys) * 3


def _roofs(axes: Any, panel: RooflinePanel, span: tuple[float, float, float, float]) -> None:
    from matplotlib.ticker import EngFormatter, NullFormatter

    low, high, bottom, top = span
    axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(bottom, top))
    _logarithmic(axes.xaxis)
    axes.yaxis.set_major_formatter(EngFormatter())
    axes.yaxis.set_minor_formatter(NullFormatter())
    for number, roof in enumerate(panel.roofs):
        xs = [low, roof.ridge, high]
        ys = [min(x * roof.bytes_per_s, roof.flops_per_s) for x in xs]
        width = 1.5 if number == 0 else 0.9
        axes.plot(xs, ys, linestyle="-" if roof.measured else DASHED, color=INK, linewidth=width, zorder=2)
    main = panel.roofs[0]
    axes.plot([main.ridge] * 2, [bottom, main.flops_per_s], ":", color=FAINT, linewidth=0.9, zorder=1)
    if panel.vector_flops is not None and panel.vector_flops > bottom:
        left = panel.vector_flops / main.bytes_per_s
        axes.plot([left, high], [panel.vector_flops] * 2, linestyle=DOTTED, color=FAINT, linewidth=1, zorder=1)
    for point in sorted(panel.points, key=lambda one: -one.share):
        axes.scatter(
            point.intensity, point.flops_per_s, s=point.area, marker=MARKERS.get(point.phase, "o"),
            color=CLASS_COLOURS.get(point.kind, INK), alpha=0.75, edgecolors="white", linewidths=0.7, zorder=3,
        )  # fmt: skip


def _name_roofs(axes: Any, panel: RooflinePanel) -> None:
    """Rates along the roofs, the ridge at its foot."""
    (low, high), (bottom, _) = axes.get_xlim(), axes.get_ylim()
    main = panel.roofs[0]
    a, b = (axes.transData.transform((x, x * main.bytes_per_s)) for x in (low, low * 10))
    angle = math.degrees(math.atan2(b[1] - a[1], b[0] - a[0]))
    for number, roof in enumerate(panel.roofs):
        start = max(low, bottom / roof.bytes_per_s) * (1.25 if number == 0 else 1.6)
        said = _engineering(roof.bytes_per_s, "B/s") + (f", {roof.place}" if roof.place else "")
        if len(panel.roofs) > 1 and not roof.measured:
            said += ", datasheet"
        _note(
            axes, said, (start, start * roof.bytes_per_s), (0, 4 if number != 2 else -10), rotation=angle,
            rotation_mode="anchor", color=INK if number == 0 else FAINT,
        )  # fmt: skip
        if number == 0 or not roof.measured:
            rate = _engineering(roof.flops_per_s, "FLOP/s")
            _note(axes, rate, (roof.ridge, roof.flops_per_s), (-2, 4), ha="right", color=INK if number == 0 else FAINT)
    late = axes.transAxes.inverted().transform(axes.transData.transform((main.ridge, bottom)))[0] > 0.7
    side = {"ha": "right"} if late else {}
    _note(axes, f"ridge: {main.ridge:.3g} FLOP/byte", (main.ridge, bottom), (-4 if late else 4, 5), color=FAINT, **side)
    if panel.vector_flops is not None:
        said = f"other units: {_engineering(panel.vector_flops, 'FLOP/s')}"
        _note(axes, said, (high, panel.vector_flops), (-3, 3), ha="right", color=FAINT)


def _name_points(axes: Any, panel: RooflinePanel) -> None:
    """Names beside the ops that matter, each where it hides no mark and no other name."""
    from matplotlib.text import Text

    scale = axes.figure.dpi / 72
    named = [one for one in panel.points if one.share >= NAMED_SHARE]
    spots = {one: tuple(axes.transData.transform((one.intensity, one.flops_per_s))) for one in panel.points}
    radii = {one: math.sqrt(one.area / math.pi) * scale for one in panel.points}
    taken = [(x - radii[one], y - radii[one], x + radii[one], y + radii[one]) for one, (x, y) in spots.items()]
    taken += [tuple(text.get_window_extent().extents) for text in axes.texts]
    for line in axes.lines:
        taken += _along(axes, line, 2 * scale)
    for point in sorted(named, key=lambda one: -one.share):
        note = axes.annotate(
            f"{point.name} {point.share:.0%}", (point.intensity, point.flops_per_s), fontsize=TINY, va="center",
            color=CLASS_COLOURS.get(point.kind, INK), textcoords="offset points", xytext=(0, 0), zorder=4,
            arrowprops={"arrowstyle": "-", "linewidth": 0.5, "color": "#AAAAAA", "shrinkA": 0, "shrinkB": 1},
        )  # fmt: skip
        size = Text.get_window_extent(note)  # an annotation's own extent has its arrow in it
        box = _free_box(spots[point], radii[point] + 2 * scale, (size.width, size.height), taken, axes.bbox.extents)
        if box is None:
            note.remove()
            continue
        taken.append(box)
        x, y = spots[point]
        note.set_position(((box[0] - x) / scale, ((box[1] + box[3]) / 2 - y) / scale))


Box = tuple[float, float, float, float]
"""Left, low, right, high in pixels."""
DIRECTIONS = tuple((math.cos(turn), math.sin(turn)) for turn in (-0.3, 0.3, -0.9, 2.8, 3.5, 0.9, -1.5, 1.5, 2.2, 4.0))


def _free_box(
    spot: tuple[float, float], near: float, size: tuple[float, float], taken: Sequence[Box], frame: Any
) -> Box | None:
    """The nearest place for a text of this size around a spot; None if all about it is taken."""
    (x, y), (wide, high) = spot, size
    for reach in (1.0, 1.6, 2.4, 3.4, 4.6, 6.0):
        for along, up in DIRECTIONS:
            left = x + along * near * reach - (0 if along > 0 else wide)
            middle = y + up * near * reach
            box = (left, middle - high / 2, left + wide, middle + high / 2)
            inside = box[0] > frame[0] and box[1] > frame[1] and box[2] < frame[2] and box[3] < frame[3]
            if inside and not any(_overlap(box, other) for other in taken):
                return box
    return None


def _along(axes: Any, line: Any, step: float) -> list[Box]:
    """A line as small boxes, in pixels."""
    corners = axes.transData.transform(line.get_xydata())
    boxes = []
    for (x0, y0), (x1, y1) in itertools.pairwise(corners):
        count = max(int(math.hypot(x1 - x0, y1 - y0) / step), 1)
        for number in range(count + 1):
            x, y = x0 + (x1 - x0) * number / count, y0 + (y1 - y0) * number / count
            boxes.append((x - 1, y - 1, x + 1, y + 1))
    return boxes


def _overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _roofline_legend(panels: Sequence[RooflinePanel]) -> dict[str, Any]:
    from matplotlib.lines import Line2D

    points = [one for panel in panels for one in panel.points]
    entries: dict[str, Any] = {}
    for kind, colour in CLASS_COLOURS.items():
        if any(one.kind == kind for one in points):
            entries[kind] = Line2D([], [], marker="o", linestyle="", color=colour, markersize=6)
    for phase, marker in MARKERS.items():
        if any(one.phase == phase for one in points):
            entries[phase] = Line2D(
                [], [], marker=marker, linestyle="", color="white", markeredgecolor=INK, markersize=6
            )
    roofs = [one for panel in panels for one in panel.roofs]
    if any(one.measured for one in roofs):
        entries["measured roof"] = Line2D([], [], color=INK, linewidth=1.5)
    if any(not one.measured for one in roofs):
        entries["datasheet"] = Line2D([], [], color=INK, linewidth=1.2, linestyle=DASHED)
    entries["area: share of time"] = Line2D([], [], linestyle="")
    return entries


# Steps as stacked bars


def explained(steps: Sequence[Explained], title: str, datasheet: Hardware | None = None) -> Any:
    """Steps as stacked bars, and their ops under the roofs that were measured beside them."""
    bars = [_bars(step) for step in steps]
    heights = 0.75 + 0.33 * sum(map(len, bars)) + 0.5 * len(steps), _roofline_height(1) - 0.3
    figure = _empty(sum(heights))
    above, below = figure.subfigures(2, 1, height_ratios=heights)
    _title(above, title)
    _step_bars(above, steps, bars)
    panels = [explained_panel(steps, "The ops as measured, under the measured roofs", datasheet)]
    every = _rooflines(below, panels)
    _name_rooflines(figure, every, panels)
    return figure


def _step_bars(figure: Any, steps: Sequence[Explained], bars: Sequence[list[tuple[str, Parts]]]) -> None:
    """A class of work a panel: the floor, what the card says if there is one, and what was measured, op by op."""
    every = list(figure.subplots(len(steps), 1, squeeze=False, height_ratios=[len(one) for one in bars]).flat)
    colours: dict[str, str] = {}
    spare = iter(SPARE_COLOURS * 4)
    for axes, step, rows in zip(every, steps, bars):
        _plain(axes)
        for place, (name, parts) in enumerate(rows):
            left = 0.0
            for part, seconds in parts:
                if part not in colours:
                    colours[part] = PART_COLOURS.get(part) or OP_COLOURS.get(part) or next(spare)
                style = {"color": colours[part], "edgecolor": "white", "linewidth": 0.5}
                axes.barh(place, seconds * 1e3, left=left * 1e3, height=0.74, **style)
                left += seconds
            said = f"{left * 1e3:.3g} ms" + (f", {left / step.step_s:.0%}" if name != "measured" else "")
            _note(axes, said, (left * 1e3, place), (4, -0.5), va="center", fontsize=SMALL)
        axes.set_yticks(range(len(rows)), [name for name, _ in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlim(0, 1.14 * max(sum(seconds for _, seconds in parts) for _, parts in rows) * 1e3)
        axes.grid(visible=False, axis="y")
        many = "" if round(step.tokens) == 1 else "s"
        _words(axes, f"{step.kind}: the mean step of {step.tokens:,.0f} token{many}", "ms" if step is steps[-1] else "")
    order = [one for one in (*OP_COLOURS, *colours) if one in colours and one not in PART_COLOURS]
    order += [one for one in PART_COLOURS if one in colours]
    _legend(figure, _patches({one: colours[one] for one in dict.fromkeys(order)}), columns=10)


Parts = list[tuple[str, float]]


def _bars(step: Explained) -> list[tuple[str, Parts]]:
    """Bars of one class of work: (name, parts in seconds), the same parts in the same order."""
    ops = sorted(step.ops, key=lambda one: (one.op != "attention", -one.measured_s))
    scale = step.ops_s / sum(one.measured_s for one in ops)
    rows: list[tuple[str, Parts]] = [("floor", [(one.op, one.floor_s) for one in ops])]
    if step.predicted is not None:
        said = step.predicted
        parts = [
            ("attention", said.attention_s),
            (OTHER_OPS, said.other_ops_s),
            (GAPS, said.around_s),
            (HOST, said.host_s),
        ]
        rows.append(("card", [(name, max(seconds, 0.0)) for name, seconds in parts]))
    measured = [(one.op, one.measured_s * scale) for one in ops]
    around = [(GAPS, step.gaps_s), (HOST, step.host_s), (DRAFTING, step.draft_s)]
    rows.append(("measured", [*measured, *(part for part in around if part[1] or part[0] != DRAFTING)]))
    return rows


def _patches(colours: Mapping[str, str]) -> dict[str, Any]:
    from matplotlib.patches import Patch

    return {name: Patch(color=colour) for name, colour in colours.items()}


# Memory


def _waterfalls(figure: Any, found: Sequence[Plan]) -> None:
    """A machine a panel: weights, activations, libraries, KV cache, what stays free, each beginning where one ends."""
    from ridgeline.engine.memory import LIBRARY_BYTES

    for axes, plan in zip(_panels(figure, len(found), sharey=True), found):
        total = plan.hardware.memory_bytes
        load = plan.batch * (plan.prompt_len + plan.output_len) * plan.kv_bytes_per_token
        room = plan.kv_capacity_tokens * plan.kv_bytes_per_token
        parts: list[tuple[str, float, str]] = [
            ("weights", plan.weight_bytes, OP_COLOURS["linear"]),
            ("activations", plan.activation_bytes - LIBRARY_BYTES, OP_COLOURS["norm"]),
            ("libraries", LIBRARY_BYTES, OP_COLOURS["embed"]),
            ("KV of this batch", load, OP_COLOURS["attention"]),
            ("KV, room for more", room - load, PART_COLOURS[OTHER_OPS]),
        ]
        parts.append(("free", total - sum(size for _, size, _ in parts), PART_COLOURS[GAPS]))
        left = 0.0
        for place, (_, size, colour) in enumerate(parts):
            axes.barh(place, size / 1e9, left=left / 1e9, height=0.74, color=colour)
            if place + 1 < len(parts):
                axes.plot([(left + size) / 1e9] * 2, [place - 0.37, place + 1.37], color=FAINT, linewidth=0.6)
            text = _engineering(size, "B")
            if size > 0.2 * total:
                _note(axes, text, ((left + size / 2) / 1e9, place), (0, -0.5), va="center", ha="center", fontsize=SMALL)
            elif left + size > 0.75 * total:
                _note(axes, text, (left / 1e9, place), (-4, -0.5), va="center", ha="right", fontsize=SMALL)
            else:
                _note(axes, text, ((left + size) / 1e9, place), (4, -0.5), va="center", fontsize=SMALL)
            left += size
        axes.set_yticks(range(len(parts)), [name for name, _, _ in parts])
        axes.set_ylim(len(parts) - 0.4, -0.6)
        axes.set_xlim(0, total / 1e9)
        axes.grid(visible=False, axis="y")
        room_for = f"{plan.resident_requests:,} requests of {plan.prompt_len + plan.output_len:,} tokens fit"
        _words(axes, f"{plan.hardware.name}: {room_for}", "GB")


# Batches and load


NAMES_OF_CELLS = {
    ("prefill", "attention"): (0.0, (4, 6), "left"),
    ("prefill", "ffn"): (1.0, (0, -13), "right"),
    ("decode", "attention"): (1.0, (0, 6), "right"),
    ("decode", "ffn"): (0.5, (8, -9), "left"),
}
"""Where a cell's name stands: how far along its line, moved by, and on which side."""


def _groups(values: Sequence[float]) -> list[tuple[float, float]]:
    """Values whose labels would lie on each other, together: (least, most)."""
    groups: list[tuple[float, float]] = []
    for value in sorted(values):
        if groups and value < 1.6 * groups[-1][0]:
            groups[-1] = groups[-1][0], value
        else:
            groups.append((value, value))
    return groups


def batches(sweeps: Sequence[Sweep]) -> Any:
    """Left: throughput against what one user gets, along the batch. Right: FLOP/byte of the four cells, and ridges."""
    from matplotlib.lines import Line2D

    figure, (left, right) = _figure(4.6, 1, 2)
    entries: dict[str, Any] = {}
    for sweep, colour in zip(sweeps, LINE_COLOURS * 2):
        xs, ys = [1 / row.tpot_s for row in sweep.rows], [row.tokens_per_s for row in sweep.rows]
        left.plot(xs, ys, color=colour, linewidth=1.4, zorder=2)
        for row, x, y in zip(sweep.rows, xs, ys):
            left.plot(x, y, "o", color=colour if row.fits else "white", markeredgecolor=colour, markersize=5, zorder=3)
        for place, up in ((0, 0), (-1, 4)):
            _note(left, f"batch {sweep.rows[place].batch}", (xs[place], ys[place]), (6, up), color=colour)
        right.axhline(sweep.balance, color=colour, linewidth=1, linestyle=DASHED, zorder=1)
        entries[sweep.hardware.name] = Line2D([], [], color=colour, marker="o", markersize=5)
    for low, high in _groups([sweep.balance for sweep in sweeps]):
        said = f"ridge\n{low:.0f}" + (f"-{high:.0f}" if round(low) != round(high) else "")
        _note(right, said, (1.0, low), (3, 0), va="center", color=FAINT, xycoords=right.get_yaxis_transform())
    if not all(row.fits for sweep in sweeps for row in sweep.rows):
        entries["KV does not fit"] = Line2D([], [], marker="o", linestyle="", color="white", markeredgecolor=INK)
    left.set(xscale="log", yscale="log")
    _words(left, "Throughput and what a user gets (floors)", "tokens/s of one user = 1 / TPOT", "tokens/s of all")
    cells = (("prefill", "attention"), ("prefill", "ffn"), ("decode", "attention"), ("decode", "ffn"))
    first = sweeps[0]
    for phase, part in cells:
        colour = OP_COLOURS["attention"] if part == "attention" else OP_COLOURS["gated_linear"]
        values = [getattr(row, f"{phase}_{part}") for row in first.rows]
        style = "-" if phase == "decode" else ":"
        right.plot(
            [row.batch for row in first.rows],
            values,
            style,
            marker=MARKERS[phase],
            markersize=4,
            color=colour,
            linewidth=1.4,
        )
        named = "FFN" if part == "ffn" else part
        along, by, side = NAMES_OF_CELLS[phase, part]
        number = round(along * (len(values) - 1))
        _note(right, f"{phase} {named}", (first.rows[number].batch, values[number]), by, ha=side, color=colour)
    right.set(xscale="log", yscale="log")
    _words(right, "FLOP/byte: what a batch shares", "batch", "FLOP/byte")
    for axes in (left, right):
        _logarithmic(axes.xaxis, axes.yaxis)
        axes.margins(x=0.12, y=0.1)
    _legend(figure, entries, columns=4)
    length = f"{first.prompt_len:,} + {first.output_len:,} tokens"
    _title(
        figure,
        f"{first.model}, {first.dtype}, requests of {length}, batch {first.rows[0].batch} to {first.rows[-1].batch}",
    )
    return figure


def latency(found: Sequence[tuple[str, Capacity]], objectives: Mapping[str, float], title: str) -> Any:
    """Latencies over the request rates that a search has tried, a panel an objective; where each machine's knee is."""
    from matplotlib.lines import Line2D

    figure, every = _figure(4.2, 1, len(objectives))
    entries: dict[str, Any] = {}
    for (name, capacity), colour in zip(found, LINE_COLOURS * 2):
        near = [one for one in capacity.tried if one.rate_per_s > capacity.rate_per_s / 40]
        tried = sorted(near, key=lambda one: one.rate_per_s)
        entries[f"{name}: {capacity.rate_per_s:.3g} requests/s"] = Line2D([], [], color=colour, linewidth=1.6)
        for axes, objective in zip(every, objectives):
            for quantile, style, width in (("p50", ":", 1.3), ("p99", "-", 1.6)):
                points = [
                    (one.rate_per_s, getattr(one, objective)) for one in tried if getattr(one, objective) is not None
                ]
                values = [getattr(spread, quantile) * 1e3 for _, spread in points]
                axes.plot([rate for rate, _ in points], values, linestyle=style, linewidth=width, color=colour,
                          marker="o", markersize=3 if quantile == "p99" else 2)  # fmt: skip
            axes.axvline(capacity.rate_per_s, color=colour, linewidth=0.9, linestyle=DOTTED, zorder=1)
    for axes, (objective, limit) in zip(every, objectives.items()):
        axes.set(xscale="log", yscale="log")
        axes.axhline(limit * 1e3, color=INK, linewidth=1, linestyle=DASHED)
        said = f"{limit:g} s" if limit >= 1 else f"{limit * 1e3:g} ms"
        _note(axes, f"objective {said}", (0.0, limit * 1e3), (3, 3), xycoords=axes.get_yaxis_transform())
        _logarithmic(axes.xaxis, axes.yaxis)
        _words(axes, objective.upper(), "requests/s", "ms")
    entries["99th percentile"] = Line2D([], [], color=FAINT, linewidth=1.6)
    entries["median"] = Line2D([], [], color=FAINT, linewidth=1.3, linestyle=":")
    _legend(figure, entries, columns=4)
    _title(figure, title)
    return figure


def distributions(runs: Sequence[tuple[str, Sequence[Served]]], objectives: Mapping[str, float], title: str) -> Any:
    """How TTFT, TPOT and E2E are distributed over a run's requests; several runs side by side."""
    from matplotlib.lines import Line2D

    figure, every = _figure(3.6, 1, 3, sharey=True)
    for axes, name in zip(every, ("ttft", "tpot", "e2e")):
        for (_, served), colour in zip(runs, LINE_COLOURS * 2):
            done = [one for one in served if one.error is None and one.token_times_s]
            values = sorted(value * 1e3 for one in done if (value := getattr(one, f"{name}_s")) is not None)
            shares = [100 * (place + 1) / len(values) for place in range(len(values))]
            axes.plot(values, shares, drawstyle="steps-post", color=colour, linewidth=1.5)
        if name in objectives:
            axes.axvline(objectives[name] * 1e3, color=INK, linewidth=1, linestyle=DASHED)
        drawn = [float(x) for line in axes.lines for x in line.get_xdata()]
        if max(drawn, default=1.0) > FAR * min(drawn, default=1.0):
            axes.set_xscale("log")
            _logarithmic(axes.xaxis)
        axes.set_ylim(0, 101)
        _words(axes, name.upper(), "ms", "% of requests within" if name == "ttft" else "")
    if len(runs) > 1:
        _legend(figure, {one: Line2D([], [], color=c, linewidth=1.5) for (one, _), c in zip(runs, LINE_COLOURS * 2)})
    _title(figure, title)
    return figure


# Speculation


def speculation(
    speedups: Mapping[str, Mapping[int, tuple[float, float, float]]],
    reached: Mapping[str, Sequence[float]],
    title: str,
) -> Any:
    """Left: speed over that of no speculation against the batch. Right: the share of trees whose accepted path is at
    least so deep; what lies under a line are the tokens that a step brings beyond its one.

    speedups: by arm and batch, (median, low, high). reached: by arm, from depth 1 on.
    """
    from matplotlib.lines import Line2D

    figure, (left, right) = _figure(4.4, 1, 2)
    names = [*speedups, *(name for name, shares in reached.items() if shares and name not in speedups)]
    looks = {name: _look(place, dashed=name.startswith("bound")) for place, name in enumerate(names)}
    for name, curve in speedups.items():
        batches = sorted(curve)
        middle, low, high = zip(*(curve[batch] for batch in batches))
        errors = [[a - b for a, b in zip(middle, low)], [a - b for a, b in zip(high, middle)]]
        left.errorbar(batches, middle, errors, elinewidth=0.6, capsize=2, **looks[name])
    left.axhline(1.0, color=FAINT, linewidth=1, linestyle=DASHED, zorder=1)
    left.set_xscale("log", base=2)
    _words(left, "Speed over that of no speculation", "requests decoding", "times")
    for name, shares in reached.items():
        if shares:  # else it has drafted nothing
            right.plot(range(1, len(shares) + 1), shares, **looks[name])
    right.set_ylim(0, 1)
    _words(right, "Trees whose accepted path is at least so deep", "depth", "share")
    left.xaxis.set_major_formatter("{x:g}")
    figure.suptitle(title, fontsize=SMALL, color=INK, x=0.01, ha="left", wrap=True)
    said = {name: f" ({1 + sum(shares):.1f} tokens a step)" for name, shares in reached.items() if shares}
    entries = {f"{name}{said.get(name, '')}": Line2D([], [], **looks[name]) for name in names}
    _legend(figure, entries, columns=4)
    return figure


def _look(place: int, dashed: bool = False) -> dict[str, Any]:
    """Of the line at a place among many: colours come again with another marker."""
    again, colour = divmod(place, len(LINE_COLOURS))
    return {
        "color": LINE_COLOURS[colour],
        "marker": "os^D"[again % 4],
        "markersize": 4,
        "linewidth": 1.4,
        "linestyle": DASHED if dashed else "-",
    }


class TreeShape(Protocol):
    """Times of a round with trees of one shape, in seconds, and the tokens a second that it is expected to bring."""

    @property
    def nodes(self) -> int: ...
    @property
    def draft_s(self) -> float: ...
    @property
    def verify_s(self) -> float: ...
    @property
    def sample_s(self) -> float: ...
    @property
    def rate(self) -> float: ...


def tree_shapes(curves: Mapping[int, Mapping[str, Sequence[TreeShape]]], plain: Mapping[int, float], title: str) -> Any:
    """A panel a batch: milliseconds of drafting, verifying and sampling against nodes (left axis), and expected tokens
    a second (right axis, grey).

    curves: by batch and shape ("wide" is drawn solid, others dashed). plain: seconds of a step without a tree.
    """
    from matplotlib.lines import Line2D

    figure = _empty(0.9 + 3.3 * -(-len(curves) // 2))
    parts = {"draft": LINE_COLOURS[1], "verify": LINE_COLOURS[0], "sample": LINE_COLOURS[2]}
    for axes, (batch, shapes) in zip(_panels(figure, len(curves)), curves.items()):
        other = axes.twinx()
        for name, found in shapes.items():
            style = "-" if name == "wide" else DASHED
            nodes = [one.nodes for one in found]
            for part, colour in parts.items():
                axes.plot(nodes, [1e3 * getattr(one, f"{part}_s") for one in found], color=colour, linestyle=style)
            other.plot(nodes, [one.rate for one in found], color=FAINT, linestyle=style, linewidth=2.5, alpha=0.5)
        axes.axhline(1e3 * plain[batch], color=INK, linewidth=1, linestyle=DOTTED)
        other.tick_params(labelsize=SMALL, labelcolor=FAINT, color="#BBBBBB")
        other.set_ylim(bottom=0)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        _words(axes, f"batch {batch}", "nodes of a tree", "ms")
    entries = {name: Line2D([], [], color=colour) for name, colour in parts.items()}
    entries["tokens/s, right"] = Line2D([], [], color=FAINT, linewidth=2.5, alpha=0.5)
    entries["a plain step"] = Line2D([], [], color=INK, linewidth=1, linestyle=DOTTED)
    entries["wide"] = Line2D([], [], color=INK)
    entries["deep"] = Line2D([], [], color=INK, linestyle=DASHED)
    _title(figure, title)
    _legend(figure, entries)
    return figure


# Predictions


def predictions(steps: Sequence[tuple[str, float, float]], title: str) -> Any:
    """(class of work, predicted, measured seconds) of steps, in bands of 5 and 10 %, and their errors by time."""

    figure, (left, right) = _figure(4.6, 1, 2)
    kinds = dict(zip(dict.fromkeys(kind for kind, _, _ in steps), LINE_COLOURS))
    least = 0.8e3 * min(min(a, b) for _, a, b in steps)
    most = 1.25e3 * max(max(a, b) for _, a, b in steps)
    ends = [least, most]
    for share, alpha in ((0.10, 0.12), (0.05, 0.18)):
        left.fill_between(
            ends, [e * (1 - share) for e in ends], [e * (1 + share) for e in ends], color=INK, alpha=alpha, linewidth=0
        )
        right.axhspan(-100 * share, 100 * share, color=INK, alpha=alpha, linewidth=0)
    left.plot(ends, ends, color=INK, linewidth=0.8)
    right.axhline(0, color=INK, linewidth=0.8)
    entries: dict[str, Any] = {}
    for kind, colour in kinds.items():
        pairs = [(1e3 * measured, 1e3 * predicted) for one, predicted, measured in steps if one == kind]
        style: dict[str, Any] = {
            "s": 10,
            "alpha": 0.5,
            "color": colour,
            "linewidths": 0,
            "marker": MARKERS.get(kind, "o"),
        }
        entries[f"{kind}, {len(pairs):,} steps"] = left.scatter(*zip(*pairs), **style)
        right.scatter([x for x, _ in pairs], [100 * (y / x - 1) for x, y in pairs], **style)
    left.set(xscale="log", yscale="log", xlim=ends, ylim=ends)
    right.set(xscale="log", xlim=ends)
    _logarithmic(left.xaxis, left.yaxis, right.xaxis)
    _words(left, "A step's time; bands of ±5 and ±10 %", "measured, ms", "predicted, ms")
    _words(right, "How far off", "measured, ms", "predicted / measured - 1, %")
    errors = sorted(abs(predicted / measured - 1) for _, predicted, measured in steps)
    bias = sum(predicted for _, predicted, _ in steps) / sum(measured for _, _, measured in steps) - 1
    middle, high = errors[len(errors) // 2], errors[int(0.9 * (len(errors) - 1))]
    said = f"median {middle:.1%}, 90th percentile {high:.1%}, sum {bias:+.1%}"
    right.set_ylim(*_within(errors))
    _legend(figure, entries)
    _title(figure, f"{title}: {said}")
    return figure


def _within(errors: Sequence[float]) -> tuple[float, float]:
    """Limits in % that hold 98 % of the errors; a stray step would flatten the rest."""
    most = max(15.0, 120 * errors[int(0.98 * (len(errors) - 1))])
    return -most, most
