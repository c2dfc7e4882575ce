"""propose: the reference's tokens unless two scores tie, its probabilities, and a row by itself in any batch."""

import pytest
import torch

pytest.importorskip("triton")

from triton_checks import kinds

from ridgeline.kernels.triton.propose import propose_triton
from ridgeline.kernels.triton.sample import STRETCH, sample_triton
from ridgeline.ops.propose import propose
from ridgeline.ops.sample import gumbel

TIE = 2e-5
"""Scores whose logarithms differ in their last bits alone."""


def settings(rows: int, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    temperature = torch.rand(rows, device=device) + 0.3
    temperature[::3] = 0
    seeds = torch.randint(-(1 << 62), 1 << 62, (rows,), device=device)
    positions = torch.randint(1 << 40, (rows,), device=device)
    return temperature, seeds, positions


def check(
    logits: torch.Tensor, temperature: torch.Tensor, seeds: torch.Tensor, positions: torch.Tensor, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Kernel and reference: where their tokens differ, the scores in their places are all but equal."""
    tokens, chances = propose_triton(logits, temperature, seeds, positions, False, count)
    want = propose.reference(logits, temperature, seeds, positions, False, count)[0]
    warm = temperature[:, None] > 0
    scaled = logits.float() / torch.where(warm, temperature[:, None], 1.0)
    scores = torch.where(warm, scaled + gumbel(seeds, positions, logits.shape[1]), scaled)
    assert (scores.gather(1, tokens) - scores.gather(1, want)).abs().max() < TIE
    assert all(len(set(row)) == count for row in tokens.tolist())
    exact = scaled.double().softmax(-1).gather(1, tokens)
    torch.testing.assert_close(chances.double(), exact, atol=1e-6, rtol=1e-4)
    return tokens, chances


@pytest.mark.parametrize("count", [1, 4, 33])
def test_against_reference(device: str, count: int) -> None:
    shapes = ((4, 50), (3, STRETCH + 3)) if device == "cpu" else ((1, 151936), (33, 262144), (256, 32003))
    for dtype in kinds(device):
        for rows, tokens in shapes:
            logits = (4 * torch.randn(rows, tokens + 3, device=device)).to(dtype)[:, :tokens]
            check(logits, *settings(rows, device), count)


def test_the_best_is_what_is_sampled(device: str) -> None:
    """Of the same logits: a drafter that is the target is always right."""
    rows, tokens = (6, 3000) if device == "cpu" else (512, 151936)
    logits = 3 * torch.randn(rows, tokens, device=device)
    temperature, seeds, positions = settings(rows, device)
    ones = torch.ones(rows, device=device)
    drafted, _ = propose_triton(logits, temperature, seeds, positions, False, 3)
    sampled = sample_triton(logits, temperature, ones.long(), ones, ones, seeds, positions, False, False)
    assert torch.equal(drafted[:, 0], sampled)


def test_ties_forbidden_tokens_and_nan(device: str) -> None:
    tokens = 5000
    logits = torch.full((5, tokens), float("-inf"), device=device)
    logits[0, [7, 4100]] = torch.tensor([-0.0, 0.0], device=device)  # equal
    logits[1, 4999] = 0.0  # one token left
    logits[2, [2047, 2048, 4999]] = 3.0  # a tie over two stretches
    logits[3] = float("nan")
    logits[4, 9] = float("nan")
    logits[4, [70, 71]] = torch.tensor([1.0, 0.0], device=device)
    zeros, places = torch.zeros(5, device=device), torch.arange(5, device=device)
    found, chances = propose_triton(logits, zeros, places, places, True, 3)
    assert found[0, :2].tolist() == [7, 4100]
    assert found[1, 0] == 4999
    assert found[2].tolist() == [2047, 2048, 4999]
    assert found[4, :2].tolist() == [70, 71]
    assert ((found >= 0) & (found < tokens)).all()
    torch.testing.assert_close(chances[:3].cpu(), torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0], [1 / 3] * 3]))
    warm, _ = propose_triton(logits, zeros + 1, places, places, False, 3)
    assert warm[1, 0] == 4999
    assert sorted(warm[2].tolist()) == [2047, 2048, 4999]
    assert ((warm >= 0) & (warm < tokens)).all()


def test_a_short_last_stretch_has_fewer_than_asked_for(device: str) -> None:
    logits = torch.randn(2, STRETCH + 2, device=device)
    logits[0, STRETCH:] += 100
    tokens, _ = check(logits, *settings(2, device), 5)
    assert set(tokens[0, :2].tolist()) == {STRETCH, STRETCH + 1}


def test_all_of_a_small_vocabulary(device: str) -> None:
    tokens, chances = check(torch.randn(3, 7, device=device), *settings(3, device), 7)
    assert tokens.sort(-1).values.tolist() == [list(range(7))] * 3
    torch.testing.assert_close(chances.sum(-1), torch.ones(3, device=device))


def test_no_rows_and_too_many_children(device: str) -> None:
    logits = torch.randn(2, 9, device=device)
    temperature, seeds, positions = settings(2, device)
    assert propose_triton(logits[:0], temperature[:0], seeds[:0], positions[:0], False, 2)[0].shape == (0, 2)
    with pytest.raises(ValueError, match="within 1 and the 9 tokens of the vocabulary, not 10"):
        propose_triton(logits, temperature, seeds, positions, False, 10)


@pytest.mark.parametrize("vocabulary", [1003, 5000])
def test_a_row_is_drafted_alike_alone_and_in_any_batch(device: str, vocabulary: int) -> None:
    """To the bit, wherever it begins in memory, and whether all rows of its batch are greedy or not."""
    for dtype in kinds(device):
        logits = torch.randn(6, vocabulary, device=device).to(dtype)
        temperature, seeds, positions = settings(6, device)
        together = propose_triton(logits, temperature, seeds, positions, False, 4)
        for row in range(6):
            part = slice(row, row + 1)
            greedy = bool(temperature[row] == 0)
            alone = propose_triton(logits[part], temperature[part], seeds[part], positions[part], greedy, 4)
            for mine, its in zip(alone, together):
                assert torch.equal(mine[0], its[row])
