"""`ridgeline price OP key=value …`: what one op costs.

Knows its arguments' form. It must not know costs.
"""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from ridgeline.cli import options
from ridgeline.cli.figures import milliseconds, size
from ridgeline.core.errors import InvalidArgument


def command(
    op: Annotated[str, typer.Argument(help="attention, linear, gated_linear, norm or moe.")],
    sizes: Annotated[
        list[str] | None, typer.Argument(help="key=value: attention n= d= variant=standard|flash …; linear m= k= n=.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="bf16, fp16 or fp32.")] = "bf16",
    hardware: Annotated[str, typer.Option(help="a10, h200 … or this. Any case.")] = "a100-40",
    as_json: options.Json = False,
) -> None:
    """FLOPs, bytes, FLOP/byte, and which roof of a machine that hits. Floors; standard attention by its algorithm."""
    from ridgeline.study.plan import dtype_named, machines
    from ridgeline.study.price_op import price_op

    given: dict[str, str] = {}
    for one in sizes or ():
        key, equals, value = one.partition("=")
        if not equals:
            raise InvalidArgument("sizes", f"{one!r} must have the form key=value")
        if key in given:
            raise InvalidArgument(key, "is given twice")
        given[key] = value
    priced = price_op(op, given, dtype_named(dtype), machines([hardware])[0])
    found = priced.as_dict()
    if as_json:
        print(json.dumps(found))
        return
    shown = ", ".join(f"{key} {value}" for key, value in priced.values.items())
    table = Table("", f"{op}: {shown}, {priced.dtype}")
    table.add_row("GFLOP", f"{priced.cost.flops / 1e9:,.4g}")
    table.add_row("bytes", f"{size(priced.cost.bytes)} (read {size(priced.cost.read_bytes)})")
    table.add_row("FLOP/byte", f"{priced.flop_per_byte:,.1f}")
    table.add_row(f"{priced.hardware.name}", f"ridge at {priced.roofline.ridge:.1f} FLOP/byte: {found['bound']}-bound")
    table.add_row("no kernel is faster than", milliseconds(found["seconds"]))
    Console().print(table)
