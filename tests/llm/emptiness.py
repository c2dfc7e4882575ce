"""What an engine must look like when nobody uses it."""

from __future__ import annotations

from ridgeline import LLM


def assert_empty(llm: LLM) -> None:
    """Nothing of any request is left behind: no work, every block free, every invariant holds."""
    scheduler = llm.built.engine.scheduler
    assert not llm.built.engine.has_work
    assert not scheduler.running
    assert not scheduler.waiting
    scheduler.cache.check()
    assert scheduler.cache.free_blocks == scheduler.cache.num_blocks
    assert not llm._jobs
