"""What a draft model may read of the target's tokens."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from ridgeline.speculate.draft_model import DraftModel


def test_ids_beyond_its_vocabulary_stand_as_0() -> None:
    """A target's vocabulary may be padded further than its drafter's, and a prompt may hold such ids."""
    nothing: Any = None
    model: Any = SimpleNamespace(spec=SimpleNamespace(vocabulary=10))
    drafter = DraftModel(model, nothing, nothing, torch.device("cpu"), 16, 64)
    assert drafter._known([3, 9, 10, 400, 1]) == [3, 9, 0, 0, 1]
    known = [3, 9]
    assert drafter._known(known) is known
