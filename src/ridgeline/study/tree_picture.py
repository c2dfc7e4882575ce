"""A picture of a drafted tree: its tokens, the drafter's probabilities, ranks and sources, and the path that was taken.

Knows a verified tree, texts of tokens, and matplotlib, which is imported only when a picture is drawn. It must not
know how trees are drafted. A node's first child stands in its row and the others below it, so the likeliest path is
a straight line; all places are in inches, from the top left.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from ridgeline.core.tree import ROOT
from ridgeline.study.pictures import DPI, FAINT, INK, LINE_COLOURS, NORMAL, SMALL, TINY
from ridgeline.study.speculation import NGRAM, readable

if TYPE_CHECKING:
    from matplotlib.ft2font import FT2Font

    from ridgeline.core.tree import TokenTree
    from ridgeline.study.speculation import RequestReport, Verified

FONT = "DejaVu Sans Mono"
LETTER = 0.645 / 72
"""Width of the font's letters, inches a point of its size; on a grid of pixels they are a little wider than drawn."""
ROW, BOX, BETWEEN, MARGIN = 0.27, 0.2, 0.34, 0.15
"""Heights of a row and of a box in it, width between columns, inches."""
PADDING = 0.07
LEAST_WIDTH = 6.5
HEAD, FOOT = 0.62, 0.5
LONGEST_TEXT, LONGEST_CONTEXT = 16, 22
RANK_FILLS = ("#CFE5F4", "#FBE2B5", "#CBEBDD", "#F2D5E5")
OTHER_FILL = "#E6E6E6"
"""Of later ranks."""
OWN_COLOUR = "#D55E00"
OWN = -2
"""Stands for the target's own token among nodes."""


@dataclass(frozen=True)
class _Places:
    """Where things stand. columns: left edges by depth, of the root and all nodes; widths of their boxes; rows by
    node, ROOT and OWN included."""

    columns: tuple[float, ...]
    widths: Mapping[int, float]
    rows: Mapping[int, int]

    @property
    def count(self) -> int:
        return 1 + max(self.rows.values())


def token_tree(
    request: RequestReport, one: Verified, text_of: Callable[[int], str], drafters: Sequence[str] = ()
) -> Any:
    """A verified tree. drafters: their names; a colour at a box's left edge tells them apart if there are several."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    told, tree = one.round, one.round.tree
    labels = {node: _shown(text_of(token)) for node, token in enumerate(tree.tokens)}
    labels[OWN] = _shown(text_of(told.tokens[-1]))
    labels[ROOT] = _context(request, told.before, text_of)
    by_model = [source >= len(drafters) or drafters[source] != NGRAM for source in told.sources]
    notes = {node: _percent(value) for node, value in enumerate(told.chances) if by_model[node]}
    places = _places(tree, one.stop, labels, notes)
    right = max(places.columns[_depth(tree, node, one.stop)] + places.widths[node] for node in places.rows)
    title, said = _head(request, one)
    legend = _legend(one, drafters)
    width = max(LEAST_WIDTH, right + MARGIN, 2 * MARGIN + LETTER * 0.86 * max(len(title) * NORMAL, len(said) * SMALL))
    lines = _wrapped(legend, width)
    height = HEAD + ROW * places.count + FOOT + 0.2 * (len(lines) - 1)
    figure = Figure(figsize=(width, height), dpi=DPI)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.set_axis_off()
    _write(axes, MARGIN, 0.2, title, NORMAL + 1, family="DejaVu Sans")
    _write(axes, MARGIN, 0.42, said, SMALL, FAINT, family="DejaVu Sans")
    for node in sorted(places.rows, reverse=True):
        if node != ROOT:
            _edge(axes, places, tree, one, node)
    for node in places.rows:
        _box(axes, places, tree, one, node, labels[node], notes.get(node, ""), len(drafters) > 1)
    for number, entries in enumerate(lines):
        _draw_legend(axes, entries, height - FOOT + 0.28 + 0.2 * (number + 1 - len(lines)))
    return figure


# Words


@lru_cache(maxsize=1)
def _font() -> FT2Font:
    from matplotlib.font_manager import FontProperties, findfont, get_font

    return get_font(findfont(FontProperties(family=FONT)))


def _shown(text: str, longest: int = LONGEST_TEXT) -> str:
    """Readable, and in letters that the font has."""
    known = _font().get_charmap()
    spelled = "".join(char if ord(char) in known or not char.isprintable() else f"\\u{ord(char):04x}" for char in text)
    return readable(spelled, longest)


def _context(request: RequestReport, before: int, text_of: Callable[[int], str]) -> str:
    """The end of the known text."""
    tokens = [*request.prompt_tokens, *request.output_tokens][:before]
    spelled = _shown("".join(map(text_of, tokens[-12:])), 10**9)
    return spelled if len(spelled) <= LONGEST_CONTEXT else "…" + spelled[1 - LONGEST_CONTEXT :]


def _percent(chance: float) -> str:
    return "<1%" if chance < 0.01 else f"{min(chance, 0.99) if chance < 1 else 1:.0%}"


def _head(request: RequestReport, one: Verified) -> tuple[str, str]:
    told, tree = one.round, one.round.tree
    many = "" if len(tree) == 1 else "s"
    steps = "" if one.tokens == 1 else "s"
    title = (
        f"Tree {one.number}, request {request.request_id}: {len(told.accepted)} of {len(tree)} drafted token{many} "
        f"accepted, {one.tokens} token{steps} in one step"
    )
    said = f"drafting {told.draft_s * 1e3:.2g} ms + step {told.step_s * 1e3:.2g} ms"
    if one.plain_s is not None:
        said += f", beside {one.tokens} plain step{steps} of about {one.plain_s * 1e3:.2g} ms"
    if told.sizes.tokens_per_s > told.sizes.plain_per_s:
        nodes = told.sizes.nodes
        said += (
            f"; the sizer chose depth {told.sizes.depth}, {nodes} node{'s' * (nodes > 1)}: "
            f"{told.sizes.tokens_per_s:,.0f} tokens/s expected, {told.sizes.plain_per_s:,.0f} without"
        )
    return title, said


# Places


def _depth(tree: TokenTree, node: int, stop: int) -> int:
    if node == OWN:
        return 1 if stop == ROOT else tree.depths[stop] + 1
    return 0 if node == ROOT else tree.depths[node]


def _places(tree: TokenTree, stop: int, labels: Mapping[int, str], notes: Mapping[int, str]) -> _Places:
    rows: dict[int, int] = {}
    used = 0

    def stand(node: int, row: int) -> None:
        nonlocal used
        rows[node] = row
        below = [] if node == OWN else tree.children(node)
        if node == stop:
            below.append(OWN)
        for place, child in enumerate(below):
            if place:
                used += 1
            stand(child, row if place == 0 else used)

    stand(ROOT, 0)
    widths = {node: _box_width(labels[node], notes.get(node, "")) for node in rows}
    columns = [MARGIN]
    for depth in range(1 + max(_depth(tree, node, stop) for node in rows)):
        widest = max(widths[node] for node in rows if _depth(tree, node, stop) == depth)
        columns.append(columns[-1] + widest + BETWEEN)
    return _Places(tuple(columns), widths, rows)


def _box_width(label: str, note: str) -> float:
    beside = (1 + len(note)) * TINY if note else 0.0
    return 2 * PADDING + LETTER * (len(label) * SMALL + beside)


def _middle(row: int) -> float:
    return HEAD + ROW * (row + 0.5)


# Drawing


def _write(axes: Any, x: float, y: float, text: str, size: float, colour: str = INK, **more: Any) -> None:
    style = {"family": FONT, "va": "center_baseline", **more}
    axes.text(x, y, text, fontsize=size, color=colour, parse_math=False, **style)


def _edge(axes: Any, places: _Places, tree: TokenTree, one: Verified, node: int) -> None:
    """From the right of a node's parent, down, and on to its left."""
    parent = one.stop if node == OWN else tree.parents[node]
    depth = _depth(tree, parent, one.stop)
    start, end = places.columns[depth] + places.widths[parent], places.columns[depth + 1]
    turn = places.columns[depth + 1] - BETWEEN / 2
    above, below = _middle(places.rows[parent]), _middle(places.rows[node])
    path = [(start, above), (turn, above), (turn, below), (end, below)]
    taken = node in one.round.accepted
    style: dict[str, Any] = {"color": INK, "linewidth": 2.0} if taken else {"color": "#BDBDBD", "linewidth": 0.9}
    if node == OWN:
        style = {"color": OWN_COLOUR, "linewidth": 1.3, "linestyle": (0, (3, 1.5))}
    xs, ys = zip(*path)
    order = 3 if taken else 2 if node == OWN else 1
    axes.plot(xs, ys, solid_joinstyle="round", zorder=order, **style)


def _box(
    axes: Any, places: _Places, tree: TokenTree, one: Verified, node: int, label: str, note: str, several: bool
) -> None:
    from matplotlib.patches import FancyBboxPatch, Rectangle

    told = one.round
    x, y = places.columns[_depth(tree, node, one.stop)], _middle(places.rows[node])
    width = places.widths[node]
    drafted = node >= 0
    taken = node in told.accepted
    reached = not drafted or tree.parents[node] in (ROOT, *told.accepted)
    style: dict[str, Any] = {"facecolor": "white", "edgecolor": INK, "linewidth": 1.0}
    if drafted:
        style["facecolor"] = _fill(told.ranks[node])
        style["edgecolor"], style["linewidth"] = (INK, 1.8) if taken else ("#BDBDBD", 0.8)
    elif node == OWN:
        style["edgecolor"], style["linewidth"] = OWN_COLOUR, 1.4
    else:
        style["edgecolor"] = "none"
    name = {ROOT: "root", OWN: "own"}.get(node, f"node-{node}")
    shape = FancyBboxPatch(
        (x, y - BOX / 2), width, BOX, boxstyle="round,pad=0,rounding_size=0.05", zorder=4,
        alpha=1.0 if reached else 0.5, gid=name, **style,
    )  # fmt: skip
    axes.add_patch(shape)
    if drafted and several:
        stripe = Rectangle((x, y - BOX / 2), 0.045, BOX, color=_source(told.sources[node]), linewidth=0, zorder=5)
        stripe.set_clip_path(shape)
        axes.add_patch(stripe)
    colour = OWN_COLOUR if node == OWN else INK if reached else FAINT
    weight = "bold" if taken else "normal"
    _write(axes, x + PADDING, y, label, SMALL, colour, zorder=6, weight=weight)
    if note:
        _write(axes, x + width - PADDING, y, note, TINY, "#5F5F5F" if reached else FAINT, ha="right", zorder=6)


def _fill(rank: int) -> str:
    return RANK_FILLS[rank] if rank < len(RANK_FILLS) else OTHER_FILL


def _source(number: int) -> str:
    return LINE_COLOURS[number % len(LINE_COLOURS)]


# Legend


@dataclass(frozen=True)
class _Entry:
    """fill, edge: of a small box before the text."""

    text: str
    fill: str
    edge: str
    line: float = 0.8

    @property
    def width(self) -> float:
        return 0.42 + 0.78 * LETTER * SMALL * len(self.text)


def _legend(one: Verified, drafters: Sequence[str]) -> list[_Entry]:
    told = one.round
    entries = []
    for rank in sorted(set(told.ranks)):
        if rank < len(RANK_FILLS):
            first = " (its drafter's best)" if rank == 0 else ""
            entries.append(_Entry(f"rank {rank}{first}", _fill(rank), "#BDBDBD"))
    if max(told.ranks) >= len(RANK_FILLS):
        entries.append(_Entry("later ranks", OTHER_FILL, "#BDBDBD"))
    if told.accepted:
        entries.append(_Entry("accepted", "white", INK, 1.8))
    entries.append(_Entry("the target's own token", "white", OWN_COLOUR, 1.4))
    if len(drafters) > 1:
        entries += [
            _Entry(f"by {drafters[source].rstrip('/').rsplit('/', 1)[-1]}", _source(source), _source(source))
            for source in sorted(set(told.sources))
        ]
    return entries


def _wrapped(entries: Sequence[_Entry], width: float) -> list[list[_Entry]]:
    lines: list[list[_Entry]] = [[]]
    for entry in entries:
        if lines[-1] and 2 * MARGIN + sum(one.width for one in (*lines[-1], entry)) > width:
            lines.append([])
        lines[-1].append(entry)
    return lines


def _draw_legend(axes: Any, entries: Sequence[_Entry], y: float) -> None:
    from matplotlib.patches import FancyBboxPatch

    x = MARGIN
    for one in entries:
        axes.add_patch(
            FancyBboxPatch(
                (x, y - 0.06), 0.2, 0.12, boxstyle="round,pad=0,rounding_size=0.03", facecolor=one.fill,
                edgecolor=one.edge, linewidth=one.line,
            )
        )  # fmt: skip
        _write(axes, x + 0.26, y, one.text, SMALL, family="DejaVu Sans")
        x += one.width
