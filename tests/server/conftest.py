"""One server a module, checked after every test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from served import Served, served

SMALL = ("--max-num-seqs", "16", "--kv-cache-memory-bytes", "200000000")


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    """The embedded model with ordinary limits."""
    with served(*SMALL) as running:
        yield running


@pytest.fixture
def sound(server: Served) -> Iterator[Served]:
    """The module's server; afterwards it must be as before: healthy, same tokens, nothing held, no traceback."""
    before = server.usual_canary
    yield server
    assert server.client.get("/health").status_code == 200
    assert server.canary() == before
    server.settled()
