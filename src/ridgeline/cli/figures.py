"""Figures as people read them. Knows units; it must not know what is shown."""

from __future__ import annotations


def size(number_bytes: float) -> str:
    """Decimal bytes: 13.5 GB."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number_bytes >= scale:
            return f"{number_bytes / scale:,.1f} {unit}"
    return f"{number_bytes:.0f} bytes"


def count(number: float) -> str:
    """6.74 B."""
    for unit, scale in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= scale:
            return f"{number / scale:,.2f} {unit}"
    return f"{number:.0f}"


def milliseconds(seconds: float) -> str:
    """Three figures: 22.5 ms, 1.95 s."""
    if seconds >= 10:
        return f"{seconds:,.1f} s"
    if seconds >= 1:
        return f"{seconds:.2f} s"
    return f"{seconds * 1e3:.3g} ms"
