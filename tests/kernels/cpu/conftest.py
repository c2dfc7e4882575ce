"""Fresh memory holds NaN while the CPU kernels are tested: whatever a kernel forgets to write shows."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """torch fills uninitialized memory with NaN (integers with their maximum) in deterministic mode."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def threads() -> Iterator[None]:
    """The test may call torch.set_num_threads; what was set before comes back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
