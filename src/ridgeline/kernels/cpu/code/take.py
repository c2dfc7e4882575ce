"""`take` on the CPU: whole rows, copied.

Knows rows.
"""

from __future__ import annotations

from ridgeline.kernels.cpu.code.memory import row_at
from ridgeline.kernels.cpu.code.vector import argument, copy


def take_rows(arguments: int, scratch: int, begin: int, end: int) -> None:
    """A unit is one row of both tensors."""
    ids, rows, row_bytes = argument(arguments, 0), argument(arguments, 1), argument(arguments, 2)
    x, residual = argument(arguments, 3), argument(arguments, 4)
    x_out, residual_out = argument(arguments, 5), argument(arguments, 6)
    for unit in range(begin, end):
        place, target = row_at(ids, unit, rows) * row_bytes, unit * row_bytes
        copy(x_out + target, x + place, row_bytes)
        copy(residual_out + target, residual + place, row_bytes)
