"""Places for tokens on the host: each is left alone while the next steps take theirs."""

from __future__ import annotations

import pytest
import torch

from ridgeline.run.transfer import TURNS, Answers, to_device, to_host


def test_an_answer_stays_while_others_are_taken() -> None:
    answers, sampled = Answers(), torch.arange(40)
    taken = []
    for step, count in enumerate((1, 3, 40, 2, 7, 40, 5, 1)):
        taken.append((answers.take(sampled[:count]), (sampled[:count]).tolist()))
        sampled += 100 * (step + 1)  # the next step overwrites the device's own
        for place, tokens in taken[-(TURNS - 1) :]:
            assert place.tolist() == tokens


@pytest.mark.parametrize("copy", [to_device, to_host])
def test_both_ends_are_as_long_and_in_one_piece(copy: object) -> None:
    assert callable(copy)
    target = torch.zeros(4, dtype=torch.int64)
    copy(target, torch.arange(4))
    assert target.tolist() == [0, 1, 2, 3]
    for wrong in (torch.arange(3), torch.arange(8)[::2]):
        with pytest.raises(AssertionError):
            copy(target, wrong)
