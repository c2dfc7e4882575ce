"""A progress bar for long work. Knows tqdm; it must not know the work."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def bar(what: str, shown: bool = True, unit: str = "req") -> Iterator[Callable[[int, int], None]]:
    """A bar on standard error that goes away when done: call it with (done, total)."""
    from tqdm import tqdm

    line = tqdm(desc=what, unit=unit, leave=False, disable=None if shown else True, dynamic_ncols=True)

    def moved(done: int, total: int) -> None:
        line.total = total
        line.update(done - line.n)

    with line:
        yield moved
