"""`ridgeline kernels`: which kernel serves which op on this machine, and why.

Knows the table's rows. It must not know how they were chosen.
"""

from __future__ import annotations

import json

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ridgeline.cli import options


def command(
    model: options.Model = None,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    kernels: options.Kernels = "auto",
    attention_backend: options.AttentionBackend = "auto",
    as_json: options.Json = False,
) -> None:
    """Print the choice of kernels for a model: op, class of work, chosen and why, refused and why not."""
    from ridgeline.core.config import EngineConfig
    from ridgeline.engine.build import choose_kernels

    table = choose_kernels(
        EngineConfig(model=model, dtype=dtype, device=device, kernels=kernels, attention_backend=attention_backend)
    )
    if as_json:
        rows = [
            {"op": r.op, "work": r.work, "kernel": r.kernel, "reason": r.reason, "refused": dict(r.refused)}
            for r in table.rows
        ]
        print(json.dumps({"kernels": rows}))
        return
    grouped: dict[tuple[str, str, str, str], list[str]] = {}
    for row in table.rows:
        refused = "; ".join(f"{name}: {reason}" for name, reason in row.refused.items())
        grouped.setdefault((row.op, row.kernel, row.reason, refused), []).append(row.work)
    shown = Table("op", "work", "kernel", "why", "refused")
    for (op, kernel, reason, refused), works in grouped.items():
        shown.add_row(*(Text(one) for one in (op, ", ".join(works), kernel, reason, refused)))
    Console().print(shown)
