"""One small LLM for many tests, and a check after each that nothing was left in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from emptiness import assert_empty
from plain import Plain

from ridgeline import LLM
from ridgeline.ops import REGISTRY

SETTINGS: dict[str, Any] = {
    "dtype": "float32",
    "kernels": "reference",
    "block_size": 16,
    "max_num_seqs": 32,
    "max_num_batched_tokens": 64,
    "seed": 5,
}


@pytest.fixture(scope="session")
def shared_llm(tiny: Path, one_thread: None) -> Iterator[LLM]:
    with LLM(tiny, **SETTINGS) as llm:
        yield llm


@pytest.fixture
def llm(shared_llm: LLM) -> Iterator[LLM]:
    """The shared LLM, which must be empty afterwards, however the test went."""
    yield shared_llm
    assert_empty(shared_llm)
    assert not shared_llm.built.engine.listeners


@pytest.fixture
def make_llm(tiny: Path, one_thread: None) -> Iterator[Callable[..., LLM]]:
    """Makes LLMs of the tiny checkpoint with other settings; each is checked and closed in the end."""
    made: list[LLM] = []

    def make(model: Path = tiny, **settings: Any) -> LLM:
        made.append(LLM(model, **{**SETTINGS, **settings}))
        return made[-1]

    yield make
    for one in made:
        if one._built is not None:
            assert_empty(one)
            one.close()


@pytest.fixture(scope="session")
def plain(tiny: Path) -> Plain:
    """The same model in plain torch."""
    return Plain(tiny)


@pytest.fixture(params=["reference", "auto"])
def kernels(request: pytest.FixtureRequest) -> str:
    """Families of kernels that promise the same tokens in any batch."""
    if request.param == "auto":
        from ridgeline.kernels.select import load_kernels

        load_kernels("cpu")
        if "cpu" not in REGISTRY["linear"].kernels:
            pytest.skip("no CPU kernels are registered")
    return str(request.param)
