"""Tables of what token trees did: requests, acceptance by depth and rank, drafters, and why.

Knows tables. It must not know how any of it is counted (study/speculation.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ridgeline.cli.figures import milliseconds

if TYPE_CHECKING:
    from ridgeline.study.speculation import Acceptance, Count, Report, RequestReport

SHOWN_RANKS = 4
"""Ranks with columns of their own; later ones stand together."""
SHOWN_PROMPT = 32


def show(report: Report, where: str, console: Console) -> None:
    """All of a report."""
    console.print(requests(report, where))
    for request in report.requests:
        if request.verified:
            console.print(accepted(request, report.drafters))
        _sentences(console, f"request {request.request_id}", (*endings(request), *request.reasons))
    _sentences(console, "the workload", report.reasons)


def requests(report: Report, where: str) -> Table:
    """A row a request."""
    from ridgeline.study.speculation import readable

    names = (
        "request", "prompt", "tokens", "steps", "a step", "drafted", "accepted", "drafting, ms", "steps, ms",
        "saved, ms", "decode, ms", "without", "gain",
    )  # fmt: skip
    shown = Table(*names, title=f"{where}: {report.speculation.method}")
    for column in shown.columns[2:]:
        column.justify = "right"
    for one in report.requests:
        saved = "" if one.saved_s is None else f"{one.saved_s * 1e3:+.1f}"
        measured = ["", "", ""]
        if one.decode_s and one.plain_decode_s:
            gain = one.plain_decode_s / one.decode_s
            measured = [f"{one.decode_s * 1e3:.1f}", f"{one.plain_decode_s * 1e3:.1f}", f"{gain:.2f}x"]
        share = f" ({one.accepted / one.drafted:.0%})" if one.drafted else ""
        shown.add_row(
            one.request_id,
            Text(readable(one.prompt, SHOWN_PROMPT)),
            str(len(one.output_tokens)),
            str(one.steps),
            f"{one.tokens_per_step:.2f}",
            str(one.drafted),
            f"{one.accepted}{share}",
            f"{one.draft_s * 1e3:.1f}",
            f"{one.step_s * 1e3:.1f}",
            saved,
            *measured,
        )
    kinds = "; ".join(
        f"{count} {kind} step{'s' * (count > 1)}, {milliseconds(seconds)}"
        + (f" and {milliseconds(drafting)} of drafting" if drafting else "")
        for kind, (count, seconds, drafting) in report.by_kind.items()
    )
    shown.caption = (
        "drafting, steps: of the steps that verified trees, in the last run; saved: an estimate, against as many\n"
        "plain steps at the sizer's price; decode, without: first token to last, measured, with trees and without,\n"
        f"medians; {kinds}"
    )
    return shown


def accepted(request: RequestReport, drafters: tuple[str, ...]) -> Table:
    """Accepted of tried nodes by depth and rank; a node is tried when its parent was accepted."""
    found = request.acceptance
    ranks = sorted(found.by_rank)
    columns = [[rank] for rank in ranks[:SHOWN_RANKS]]
    if ranks[SHOWN_RANKS:]:
        columns.append(ranks[SHOWN_RANKS:])
    names = [f"rank {column[0]}" if len(column) == 1 else "later" for column in columns]
    title = f"request {request.request_id}: accepted of tried, by depth and rank"
    shown = Table("depth", *names, "all", "drafted", title=title)
    for column in shown.columns[1:]:
        column.justify = "right"
    for depth, count in sorted(found.by_depth.items()):
        cells = [
            _of(*(found.by_both[depth, rank] for rank in several if (depth, rank) in found.by_both))
            for several in columns
        ]
        shown.add_row(str(depth), *cells, _of(count), str(count.drafted))
    shown.add_section()
    every = [found.by_rank[rank] for rank in ranks]
    cells = [_of(*(found.by_rank[rank] for rank in several)) for several in columns]
    shown.add_row("all", *cells, _of(*every), str(sum(one.drafted for one in every)))
    shown.caption = _by_drafter(found, drafters)
    return shown


def _by_drafter(found: Acceptance, drafters: tuple[str, ...]) -> str:
    return "\n".join(
        f"{drafters[source]} proposed {count.drafted}, {count.accepted} accepted"
        for source, count in sorted(found.by_source.items())
    )


def _of(*counts: Count) -> str:
    tried = sum(one.tried for one in counts)
    hits = sum(one.accepted for one in counts)
    return f"{hits}/{tried} {hits / tried:4.0%}" if tried else ""


def endings(request: RequestReport) -> tuple[str, ...]:
    """Where the paths of its rounds ended, in words."""
    if not request.verified:
        return ()
    cut = ", ".join(f"rank {rank}: {count}" for rank, count in request.cut_ranks.items())
    words = {
        "leaf": "where the tree ended",
        "cut": f"at a token that was proposed and left out of the tree ({cut})",
        "unknown": "at a token that was not proposed",
        "end": "with the output",
    }
    parts = [f"{count} {words[name]}" for name, count in request.endings.items() if count]
    past = f"; {request.past_end} nodes accepted behind its end were dropped" if request.past_end else ""
    return (f"of {len(request.verified)} paths ended {', '.join(parts)}{past}",)


def _sentences(console: Console, whose: str, sentences: tuple[str, ...]) -> None:
    for number, sentence in enumerate(sentences, start=1):
        console.print(f"{whose}, {number}. {sentence}", highlight=False, markup=False)
