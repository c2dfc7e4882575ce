"""Fixtures of the model tests: checkpoints made once a session, and the kernels to try."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator

import pytest
import torch
from checkpoints import CASES, Made, make


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    """checkpoint(name): the case of that name, made on first use."""
    made: dict[str, Made] = {}

    def get(name: str) -> Made:
        if name not in made:
            directory = tmp_path_factory.mktemp(name)
            reference = make(CASES[name], directory)
            made[name] = Made(name, directory, reference)
            gc.freeze()  # Transformers' modules are many objects, and every LLM collects garbage
        return made[name]

    return get


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices this small are slower on several threads, and much slower on busy cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def has_cpu_kernels() -> bool:
    from ridgeline.kernels.select import load_kernels
    from ridgeline.ops import REGISTRY

    load_kernels("cpu")
    return any("cpu" in op.kernels for op in REGISTRY.values())


@pytest.fixture(params=["reference", "auto"])
def kernels(request: pytest.FixtureRequest) -> str:
    """Which kernels serve: plain torch, or what a user gets."""
    if request.param == "auto" and not has_cpu_kernels():
        pytest.skip("no CPU kernels are registered")
    return request.param
