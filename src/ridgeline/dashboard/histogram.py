"""Times of the recent past as a distribution: bars of fixed edges, and quantiles.

Knows seconds and when they were observed. It must not know what was timed.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from typing import Any

RENARD = (
    1.0, 1.12, 1.25, 1.4, 1.6, 1.8, 2.0, 2.24, 2.5, 2.8, 3.15, 3.55, 4.0, 4.5, 5.0, 5.6, 6.3, 7.1, 8.0, 9.0,
)  # fmt: skip
EDGES_S = (*(round(step * 10.0**power, 8) for power in range(-5, 2) for step in RENARD), 100.0)
"""Upper edges of the bars: twenty a decade (ISO 3's R20), 10 µs to 100 s."""
SHARES = {"p50_s": 0.5, "p90_s": 0.9, "p99_s": 0.99}


class Histogram:
    """Values of the last `window_s` seconds, the newest `most` of them."""

    def __init__(self, window_s: float, most: int = 4096) -> None:
        self._window_s = window_s
        self._values: deque[tuple[float, float]] = deque(maxlen=most)

    def add(self, now_s: float, value_s: float) -> None:
        self._values.append((now_s, value_s))

    def as_dict(self, now_s: float) -> dict[str, Any]:
        """Bars from the first to the last that holds anything: edges has one more entry than counts."""
        while self._values and self._values[0][0] < now_s - self._window_s:
            self._values.popleft()
        ordered = sorted(value for _, value in self._values)
        if not ordered:
            return {"count": 0, "edges_s": [], "counts": [], **dict.fromkeys(SHARES)}
        places = [bisect_left(EDGES_S, value) for value in ordered]
        first, last = places[0], places[-1]
        counts = [0] * (last - first + 1)
        for place in places:
            counts[place - first] += 1
        low = [0.0 if first == 0 else EDGES_S[first - 1]]
        high = [EDGES_S[place] if place < len(EDGES_S) else ordered[-1] for place in range(first, last + 1)]
        quantiles = {name: ordered[min(int(share * len(ordered)), len(ordered) - 1)] for name, share in SHARES.items()}
        return {"count": len(ordered), "edges_s": low + high, "counts": counts, **quantiles}
