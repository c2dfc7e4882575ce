"""What a result of the attention benchmark says: tables of words, and verdicts on the claims that were made.

Knows the result's dictionary (bench.py). It must not know how tables are drawn, nor measure anything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from ridgeline.study.attention.memory import growth
from ridgeline.study.attention.rungs import STANDARD

CALLS = 1000
"""Calls that the report's "total" column stands for."""
FEWER = 0.8
"""A rung touches memory less if it moves at most this share of standard's bytes."""
FLASH = ("v1", "v2", "sm90", "triton", "decode", "fused", "cpu", "blocked")
"""Rungs that never write the score matrix."""

Result = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Table:
    """Words in rows and columns. A cell that begins with "! " is a loss against the best peer."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def tables(result: Result) -> list[Table]:
    """The tables of an experiment."""
    made = {"report": _report, "sweep": _sweep, "decode": _decode, "memory": _memory}[result["experiment"]](result)
    bytes_table = _bytes(result)
    return [*made, bytes_table] if bytes_table.rows else made


def refusals(result: Result) -> list[str]:
    """Who could not do what, one line a reason."""
    lines = [f"{name} left out: {reason}" for name, reason in result["left_out"].items()]
    seen: dict[str, list[str]] = {}
    for cell in result["cells"]:
        for name, one in cell["results"].items():
            if "refused" in one:
                seen.setdefault(f"{name}: {one['refused']}", []).append(cell["case"]["label"])
    for reason, labels in seen.items():
        more = f" and {len(labels) - 1} more" if len(labels) > 1 else ""
        lines.append(f"{reason} ({labels[0]}{more})")
    return lines


def wrong(result: Result) -> list[str]:
    """Contestants whose numbers were wrong or that broke, by case, and what else failed."""
    broken = (
        f"{name} on {cell['case']['label']} ({one['refused']})"
        for cell in result["cells"]
        for name, one in cell["results"].items()
        if one.get("wrong")
    )
    return [*result["failures"], *broken]


def seconds(value: float) -> str:
    """12.3 µs, 1.23 ms: three digits."""
    for unit, scale in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if value * scale >= 1:
            return f"{value * scale:.3g} {unit}"
    return f"{value * 1e9:.3g} ns"


def size(value: float) -> str:
    """1.23 GB, 456 kB: three digits, decimal units."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value:.0f} B"


def times(value: Sequence[float], digits: int = 2) -> str:
    """1.23 [1.20, 1.25]."""
    middle, low, high = (f"{one:.{digits}f}" for one in value)
    return f"{middle} [{low}, {high}]"


def _shown(result: Result) -> list[str]:
    """Contestants that did anything at all, in order."""
    took = {name for cell in result["cells"] for name, one in cell["results"].items() if "refused" not in one}
    return [one["name"] for one in result["contestants"] if one["name"] in took]


def _report(result: Result) -> list[Table]:
    rows = []
    for cell in result["cells"]:
        case = cell["case"]
        for name in _shown(result):
            one = cell["results"].get(name, {})
            if "seconds" not in one:
                continue
            average = one["seconds"][0]
            rows.append(
                (
                    str(case["batch"]),
                    name,
                    seconds(CALLS * average),
                    seconds(average),
                    times(one["over_standard"]) if "over_standard" in one else "",
                    f"{one['report_speedup']:.2f}" if name == _flash(cell) and "report_speedup" in one else "",
                    _against(one),
                    f"{100 * one['roof_share']:.0f} %",
                )
            )
    first = result["cells"][0]["case"]
    heads = f"{first['heads']} heads of {first['head_dim']}, {first['dtype']}"
    title = f"The report's experiment: sequence {first['visible']}, {heads}"
    total = f"total of {CALLS} calls"
    columns = ("batch", "who", total, "average", "over standard", "the report's", "over best peer", "of roof")
    return [Table(title, columns, tuple(rows))]


def _flash(cell: Result) -> str | None:
    """The fastest rung that is a FlashAttention: the one to hold beside the report's."""
    timed = {name: one["seconds"][0] for name, one in cell["results"].items() if name in FLASH and "seconds" in one}
    return min(timed, key=lambda name: timed[name], default=None)


def _against(one: Result) -> str:
    if "over_best_peer" not in one:
        return ""
    lost = "! " if one["over_best_peer"][0] < 1 else ""
    return f"{lost}{times(one['over_best_peer'])} {one['best_peer']}"


def _sweep(result: Result) -> list[Table]:
    names = _shown(result)
    letter, scale = prefix(result)
    rows = []
    for cell in result["cells"]:
        row = [cell["case"]["label"]]
        for name in names:
            one = cell["results"].get(name, {})
            if "seconds" not in one:
                row.append("-")
                continue
            ratio = one.get("over_best_peer")
            lost = "! " if ratio is not None and ratio[0] < 1 else ""
            row.append(
                f"{lost}{three(one['flops_per_s'] / scale)}" + (f" ({ratio[0]:.2f}x)" if ratio is not None else "")
            )
        rows.append(tuple(row))
    unit = f"{letter}FLOP/s" + (", in brackets the ratio to the best peer" if _any(result, "over_best_peer") else "")
    return [Table(f"Forward attention, {unit}", ("case", *names), tuple(rows))]


def three(value: float) -> str:
    """Three digits, without an exponent for large numbers."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def prefix(result: Result) -> tuple[str, float]:
    """The unit that this device's rates are told in: T and 1e12 on a GPU, G and 1e9 on a CPU."""
    return ("T", 1e12) if result["device"]["type"] == "cuda" else ("G", 1e9)


def _any(result: Result, key: str) -> bool:
    return any(key in one for cell in result["cells"] for one in cell["results"].values())


def _decode(result: Result) -> list[Table]:
    names = _shown(result)
    letter, scale = prefix(result)
    made = []
    for key, title in (
        ("seconds", "one graph" if result["settings"]["graph"] else "no graph"),
        ("eager_seconds", "no graph"),
    ):
        if not _any(result, key):
            continue
        rows = []
        for cell in result["cells"]:
            row = [cell["case"]["label"]]
            for name in names:
                one = cell["results"].get(name, {})
                if key not in one:
                    row.append("-")
                    continue
                lost = "! " if key == "seconds" and one.get("over_best_peer", (1,))[0] < 1 else ""
                speed = cell["case"]["kv_bytes"] / one[key][0]
                row.append(f"{lost}{seconds(one[key][0])}, {three(speed / scale)} {letter}B/s")
            rows.append(tuple(row))
        made.append(Table(f"Decode, time and KV bytes a second, {title}", ("batch x context", *names), tuple(rows)))
    return made


def _memory(result: Result) -> list[Table]:
    names = _shown(result)
    rows = []
    for cell in result["cells"]:
        cells = (cell["results"].get(name, {}) for name in names)
        rows.append(
            (cell["case"]["label"], *(size(one["peak_bytes"]) if "peak_bytes" in one else "-" for one in cells))
        )
    exponents = []
    for name in names:
        found = exponent(result, name)
        exponents.append("" if found is None else f"~ S^{found:.2f}")
    rows.append(("growth at the end", *exponents))
    return [Table("Peak memory of one call beyond its inputs", ("case", *names), tuple(rows))]


def exponent(result: Result, name: str) -> float | None:
    """How a contestant's peak memory grows with the length: 1 is linear, 2 quadratic."""
    known = [
        (cell["case"]["visible"], cell["results"][name]["peak_bytes"])
        for cell in result["cells"]
        if "peak_bytes" in cell["results"].get(name, {})
    ]
    return growth([length for length, _ in known], [peak for _, peak in known])


def _bytes(result: Result) -> Table:
    """Bytes moved: the floor, the count of the algorithm, and what counters saw at L2 and at memory."""
    rows = []
    for cell in result["cells"]:
        for name, one in cell["results"].items():
            if "counted" not in one and "measured" not in one:
                continue
            seen = one.get("measured", {})
            rows.append(
                (
                    cell["case"]["label"],
                    name,
                    size(cell["case"]["floor_bytes"]),
                    size(one["counted"]["bytes"]) if "counted" in one else "unknown",
                    size(seen["l2_bytes"]) if seen else "-",
                    size(seen["hbm_bytes"]) if seen else "-",
                    f"{seen['kernels']:g}" if seen else "-",
                )
            )
    columns = ("case", "who", "floor", "counted", "measured at L2", "measured at HBM", "kernels")
    return Table("Bytes between the multiprocessors and memory", columns, tuple(rows))


def claims(result: Result) -> list[str]:
    """Verdicts, one a line: does the gain grow with batch, is it the touching of memory, is memory linear."""
    if result["experiment"] == "memory":
        return _memory_claims(result)
    lines = [one for cell in result["cells"] for one in _traffic_claim(cell)]
    if result["experiment"] == "report":
        lines += _growth_claim(result)
    return lines


def moved(cell: Result, name: str) -> tuple[float, str] | None:
    """Bytes that a contestant moved to and from memory: measured if they were, else counted."""
    one = cell["results"].get(name, {})
    if "measured" in one:
        return one["measured"]["hbm_bytes"], "measured"
    return (one["counted"]["bytes"], "counted") if "counted" in one else None


def _traffic_claim(cell: Result) -> list[str]:
    """ "FlashAttention wins by touching HBM less": for the fastest FlashAttention of a case."""
    name = _flash(cell)
    if name is None or "over_standard" not in cell["results"][name]:
        return []
    own, other = moved(cell, name), moved(cell, STANDARD)
    if own is None or other is None or own[1] != other[1]:
        return []
    gain = cell["results"][name]["over_standard"][0]
    share = own[0] / other[0]
    bytes_ = f"{own[1]} memory bytes {size(own[0])} against standard's {size(other[0])}, {1 / share:.2f}x fewer"
    how = f"{bytes_}, {gain:.2f}x the speed"
    if gain <= 1:
        verdict = "no gain"
    elif share <= FEWER:
        verdict = "faster, and it touches memory less"
    else:
        verdict = "faster, but NOT by touching memory less"
    return [f"{cell['case']['label']}: {name} {verdict}: {how}"]


def _growth_claim(result: Result) -> list[str]:
    gains = [
        (cell["case"]["batch"], cell["results"][name]["over_standard"][0])
        for cell in result["cells"]
        for name in (_flash(cell),)
        if name is not None and "over_standard" in cell["results"][name]
    ]
    if len(gains) < 2:
        return []
    gains.sort()
    speedups = [gain for _, gain in gains]
    rising = all(late >= early for early, late in pairwise(speedups))
    listed = ", ".join(f"{gain:.2f}x at batch {batch}" for batch, gain in gains)
    verdict = "grows with every step in batch" if rising else "does NOT grow with every step in batch"
    return [f"the gain {verdict}: {listed} (the report: 4.61, 3.72, 1.27, 19.48)"]


def _memory_claims(result: Result) -> list[str]:
    lines = []
    for name in _shown(result):
        found = exponent(result, name)
        if found is not None:
            kind = "linear" if found < 1.3 else "quadratic" if found > 1.7 else "in between"
            lines.append(f"{name}: peak memory grows as S^{found:.2f} at the end: {kind}")
    last = result["cells"][-1]
    standard = last["results"].get(STANDARD, {}).get("peak_bytes")
    for name in FLASH:
        own = last["results"].get(name, {}).get("peak_bytes")
        if standard and own:
            lines.append(f"{name} at {last['case']['label']}: {standard / own:.1f}x less memory than standard")
    return lines
