"""Draft trees on their way: from a step's record through the engine's messages to what the page is told."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ridgeline import LLM
from ridgeline.core.step import StepRecord, Verified
from ridgeline.core.tree import TokenTree
from ridgeline.engine import process
from ridgeline.engine.messages import Channel, Ready, Start, Stepped, Submit
from ridgeline.engine.process import Loop
from ridgeline.server.live import Live

TREE = TokenTree((5, 6, 7), (-1, 0, -1))
READY = Ready("", 256, [0], 64, 4, 64, 5, 16, 100, 0, {"device": "cpu", "dtype": "float32"}, {}, [], 0.1)


@pytest.fixture
def steps(tiny: Path, one_thread: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Stepped]]:
    """What a loop says of five steps whose records somebody has written trees into."""
    monkeypatch.setattr(process, "TREE_S", 1e9)

    def drafts(record: StepRecord) -> None:
        if record.kind == "decode":
            record.drafted, record.accepted, record.draft_s = 6, 2, 0.001
            record.verified = (Verified(3, TREE, [2]), Verified(4, TREE, [0]))

    ours, theirs = socket.socketpair()
    owner, engine = Channel(ours), Channel(theirs)
    with LLM(tiny, dtype="float32", kernels="reference", kv_cache_memory_bytes=1 << 20) as llm:
        llm.built.engine.listeners.insert(0, drafts)
        loop = Loop(engine, llm.built, Start({}), None)
        loop._tree_s = -1e9
        owner.send(Submit([1], [0], [5, 6, 7, 8], {"ignore_eos": True}, 5, [0], [], 0, "", 1.0))
        found: list[Any] = []
        while not any(isinstance(one, Stepped) and one.ended for one in found):
            for message in engine.receive(0.0):
                loop._take(message)
            loop._step()
            found += owner.receive(1.0)
        yield [one for one in found if isinstance(one, Stepped)]
    ours.close()
    theirs.close()


def test_trees_reach_the_page(steps: list[Stepped]) -> None:
    prefill, *decodes = steps
    assert (prefill.sampled, prefill.drafted, prefill.depths, prefill.tree) == (1, 0, [], [])
    assert len(decodes) == 4
    for one in decodes:
        assert (one.sampled, one.drafted, one.accepted, one.draft_s, one.depths) == (1, 6, 2, 0.001, [1, 1])
    # A tree is there to be looked at: not every step needs to bring one.
    assert [bool(one.tree) for one in decodes] == [True, False, False, False]
    live = Live("model", lambda: "ready", lambda: 0)
    live.engine(READY, "w{}".format)
    live.heard(prefill)
    assert live.snapshot()["speculation"] is None
    for one in decodes:
        live.heard(one)
    found = live.snapshot()["speculation"]
    assert (found["steps"], found["drafted"], found["accepted"]) == (4, 24, 8)
    assert found["by_depth"] == [1.0]
    assert found["tree"] == {"root": "w4", "words": ["w5", "w6", "w7"], "parents": [-1, 0, -1], "accepted": [0]}
    assert live.snapshot()["totals"]["prompt_tokens"] == 3


def test_with_several_keys_the_words_stay_away(steps: list[Stepped]) -> None:
    live = Live("model", lambda: "ready", lambda: 0)
    live.engine(READY, None)
    for one in steps:
        live.heard(one)
    tree = live.snapshot()["speculation"]["tree"]
    assert tree == {"root": None, "words": None, "parents": [-1, 0, -1], "accepted": [0]}
