"""What the system says of the machine that this process runs on.

Standard library only. It must not measure anything: that is the work of perf/limit.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path


def largest_cache_bytes() -> int:
    """The largest cache of this machine's first processor; 0 if the system does not say (it does on Linux)."""
    largest = 0
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        with suppress(OSError, ValueError):
            largest = max(largest, int(file.read_text().strip().removesuffix("K")) << 10)
    return largest
