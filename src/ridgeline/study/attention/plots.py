"""Pictures of an attention result: rates, speedups, the roofline with every rung on it, the memory curve.

Knows the result's dictionary (bench.py) and matplotlib, which is imported only here and only when a picture is
drawn. It must not measure.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ridgeline.study.attention.cases import REPORT_SPEEDUPS
from ridgeline.study.attention.report import moved, prefix

Result = Mapping[str, Any]
Value = Callable[[Result, str], float | None]
DPI = 140


def draw(result: Result, folder: Path) -> list[Path]:
    """Write the pictures of an experiment as PNG files; their paths. Makes the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    name = result["experiment"]
    if name == "memory":
        wanted = {"memory": _memory}
    else:
        wanted = {"rates": _rates, "speedup": _speedup, "roofline": _roofline}
    written = []
    for what, function in wanted.items():
        figure = function(result)
        if figure is not None:
            path = folder / f"attention-{name}-{what}.png"
            figure.savefig(path, dpi=DPI)
            written.append(path)
    return written


def _figure(width: float = 9.0, height: float = 4.6, rows: int = 1, columns: int = 1) -> tuple[Any, list[Any]]:
    """A figure without any window behind it, and its axes row by row."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3, linewidth=0.5)
        axes.set_axisbelow(True)
    return figure, panels


def _colours(result: Result) -> dict[str, Any]:
    """Rungs in full colours, peers in greys, the same in every picture."""
    from matplotlib import colormaps

    rungs = [one["name"] for one in result["contestants"] if one["kind"] == "rung"]
    peers = [one["name"] for one in result["contestants"] if one["kind"] == "peer"]
    bright = {name: colormaps["tab10"](number % 10) for number, name in enumerate(rungs)}
    greys = {name: str(0.35 + 0.45 * number / max(len(peers) - 1, 1)) for number, name in enumerate(peers)}
    return bright | greys


def _where(result: Result) -> str:
    return f"{result['device']['name']}, {result['cells'][0]['case']['dtype']}"


def _timed(result: Result) -> list[str]:
    return [
        one["name"]
        for one in result["contestants"]
        if any("seconds" in cell["results"].get(one["name"], {}) for cell in result["cells"])
    ]


def _panels(result: Result) -> dict[str, list[Result]]:
    """Cells that belong side by side: of one shape and mask in the sweep, of one batch in decode."""
    panels: dict[str, list[Result]] = {}
    for cell in result["cells"]:
        case = cell["case"]
        heads = f"{case['heads']}/{case['kv_heads']} heads of {case['head_dim']}"
        if result["experiment"] == "sweep":
            name = f"{heads}, {'causal' if case['causal'] else 'full'}"
        else:
            name = f"batch {case['batch']}, {heads}" if result["experiment"] == "decode" else heads
        panels.setdefault(name, []).append(cell)
    return panels


def _bars(result: Result, value: Value, names: list[str], across: int) -> tuple[Any, list[Any]]:
    """A panel for cells that belong together, a group of bars a case, a bar a contestant."""
    panels = _panels(result)
    rows = -(-len(panels) // across)
    columns = min(len(panels), across)
    wide = max(map(len, panels.values()))
    figure, every = _figure(columns * max(5.0, 0.16 * wide * len(names) + 1.2), 0.6 + 3.2 * rows, rows, columns)
    colours, width = _colours(result), 0.85 / max(len(names), 1)
    for axes, (title, cells) in zip(every, panels.items()):
        for number, name in enumerate(names):
            heights = {place: value(cell, name) for place, cell in enumerate(cells)}
            shown = {place: height for place, height in heights.items() if height is not None}
            offset = (number - (len(names) - 1) / 2) * width
            axes.bar([p + offset for p in shown], list(shown.values()), width, label=name, color=colours[name])
        along = "batch" if result["experiment"] == "report" else "visible"
        axes.set_xticks(range(len(cells)), [str(cell["case"][along]) for cell in cells], fontsize=8)
        axes.set_xlabel("batch" if along == "batch" else "sequence length", fontsize=8)
        axes.set_title(title, fontsize=9, loc="left")
    for axes in every[len(panels) :]:
        axes.set_visible(False)
    handles, labels = every[0].get_legend_handles_labels()
    ncols = max(1, min(len(labels), int(figure.get_figwidth() / 1.1)))
    figure.legend(handles, labels, loc="outside lower center", ncols=ncols, fontsize=8, frameon=False)
    return figure, every[: len(panels)]


def _rates(result: Result) -> Any:
    decode = result["experiment"] == "decode"
    letter, scale = prefix(result)
    key, unit = ("kv_bytes_per_s", f"KV read, {letter}B/s") if decode else ("flops_per_s", f"{letter}FLOP/s")

    def value(cell: Result, name: str) -> float | None:
        found = cell["results"].get(name, {}).get(key)
        return None if found is None else found / scale

    figure, panels = _bars(result, value, _timed(result), across=2)
    roof = result["limit"]["dram_bytes_per_s" if decode else "flops_per_s"] / scale
    for axes in panels:
        axes.set_ylabel(unit, fontsize=8)
        if axes.get_ylim()[1] > roof / 20:  # a roof far above would flatten the bars
            axes.axhline(roof, color="black", linewidth=0.8, linestyle="--")
            place = axes.get_yaxis_transform()
            axes.text(0.995, roof, f"measured: {roof:.3g}", transform=place, ha="right", va="bottom", fontsize=7)
    figure.suptitle(f"Attention, {_where(result)}", fontsize=10)
    return figure


def _speedup(result: Result) -> Any:
    names = [name for name in _timed(result) if name != "standard"]

    def value(cell: Result, name: str) -> float | None:
        found = cell["results"].get(name, {}).get("over_standard")
        return None if found is None else found[0]

    if not any(value(cell, name) for cell in result["cells"] for name in names):
        return None
    figure, panels = _bars(result, value, names, across=2)
    for axes, cells in zip(panels, _panels(result).values()):
        axes.axhline(1, color="black", linewidth=0.6, linestyle=":")
        axes.set_yscale("log")
        axes.set_ylabel("speedup over standard", fontsize=8)
        for place, cell in enumerate(cells if result["experiment"] == "report" else ()):
            printed = REPORT_SPEEDUPS.get(cell["case"]["batch"])
            if printed is not None:
                axes.plot([place - 0.45, place + 0.45], [printed, printed], color="black", linewidth=1.2)
                axes.text(place - 0.45, printed, f"report, A100: {printed}", fontsize=6, va="bottom")
    figure.suptitle(f"Speedup over standard attention, {_where(result)}", fontsize=10)
    return figure


def _roofline(result: Result) -> Any:
    """Every contestant at its FLOPs over the bytes that it moved (measured if they were), under the measured roof.

    Circles are full attention, triangles causal.
    """
    figure, (axes,) = _figure(height=5.4)
    limit = result["limit"]
    letter, scale = prefix(result)
    bandwidth, peak = limit["dram_bytes_per_s"], limit["flops_per_s"]
    colours = _colours(result)
    xs: list[float] = []
    sources = set()
    for name in _timed(result):
        for mask, marker in ((False, "o"), (True, "^")):
            points = []
            for cell in result["cells"]:
                bytes_ = moved(cell, name)
                one = cell["results"].get(name, {})
                if cell["case"]["causal"] == mask and bytes_ is not None and bytes_[0] and "flops_per_s" in one:
                    points.append((cell["case"]["flops"] / bytes_[0], one["flops_per_s"] / scale))
                    sources.add(bytes_[1])
            if points:
                labels = axes.get_legend_handles_labels()[1]
                xs += [x for x, _ in points]
                shown = None if name in labels else name
                axes.scatter(*zip(*points), s=30, marker=marker, color=colours[name], label=shown, zorder=3)
    if not xs:
        return None
    low, high = min(*xs, peak / bandwidth) / 3, max(*xs, peak / bandwidth) * 3
    ridge = peak / bandwidth
    axes.plot([low, ridge, high], [low * bandwidth / scale, peak / scale, peak / scale], color="black", linewidth=1)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel(f"FLOPs for each byte moved to and from memory ({' and '.join(sorted(sources))})")
    axes.set_ylabel(f"{letter}FLOP/s")
    axes.legend(fontsize=8, frameon=False, loc="lower right")
    roof = f"roof: {bandwidth / scale:.3g} {letter}B/s, {peak / scale:.3g} {letter}FLOP/s, measured beside it"
    axes.set_title(f"Roofline, {_where(result)} ({roof}); circles full, triangles causal", loc="left", fontsize=9)
    return figure


def _memory(result: Result) -> Any:
    figure, (axes,) = _figure()
    colours = _colours(result)
    for one in result["contestants"]:
        known = [
            (cell["case"]["visible"], cell["results"][one["name"]]["peak_bytes"])
            for cell in result["cells"]
            if cell["results"].get(one["name"], {}).get("peak_bytes")
        ]
        if known:
            axes.plot(*zip(*known), marker="o", markersize=4, color=colours[one["name"]], label=one["name"])
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("sequence length")
    axes.set_ylabel("peak bytes of one call beyond its inputs")
    axes.legend(fontsize=8, frameon=False)
    axes.set_title(f"Memory of attention, {_where(result)}", loc="left", fontsize=10)
    return figure
