"""Whether what is drawn has the distribution that was asked for, and depends on seed and position alone."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from ridgeline.kernels.select import load_kernels
from ridgeline.ops import adjust, sample, score
from ridgeline.ops.sample import gumbel, kept, philox

if importlib.util.find_spec("numba"):  # a GPU machine may do without
    load_kernels("cpu")

SAMPLERS: dict[str, Callable[..., torch.Tensor]] = {"reference": sample.reference}
SAMPLERS |= {name: kernel.call for name, kernel in sample.kernels.items() if kernel.need.device == "cpu"}

DRAWS = 20_000
VOCABULARY = 24
KERNEL_DRAWS = 400
"""Rows that a kernel may hand to the reference one by one."""
LEAST_P = 1e-4
"""A fair sampler fails one chi-square test in 10,000; seeds are fixed, so a pass stays one."""


def settings_of(rows: int, **given: float) -> dict[str, Any]:
    """Arguments of `sample` for rows that share their settings."""
    values = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, **given}
    tensors: dict[str, Any] = {
        name: torch.full((rows,), value, dtype=torch.int64 if name == "top_k" else torch.float32)
        for name, value in values.items()
    }
    tensors["greedy"] = values["temperature"] == 0
    tensors["cut"] = values["top_k"] > 0 or values["top_p"] < 1 or values["min_p"] > 0
    return tensors


def probabilities(
    logits: np.ndarray, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> np.ndarray:
    """The exact distribution, in fp64 and one step after the other."""
    scaled = logits.astype(np.float64) / temperature
    weights = np.exp(scaled - scaled.max())
    order = sorted(range(len(weights)), key=lambda token: (-weights[token], token))
    if top_k > 0:
        order = order[:top_k]
    total = sum(weights[token] for token in order)
    kept_tokens, mass = [], 0.0
    for token in order:
        if kept_tokens and mass >= top_p:
            break
        kept_tokens.append(token)
        mass += weights[token] / total
    best = weights[order[0]]
    kept_tokens = [token for token in kept_tokens if weights[token] >= min_p * best]
    result = np.zeros(len(weights))
    result[kept_tokens] = weights[kept_tokens]
    return result / result.sum()


def assert_distribution(drawn: torch.Tensor, wanted: np.ndarray) -> None:
    """Pearson's chi-square, with the rarest tokens in one bin; what is cut must never be drawn."""
    counts = np.bincount(drawn.numpy(), minlength=len(wanted))
    assert counts[wanted == 0].sum() == 0
    expected = wanted * len(drawn)
    rare = expected < 10
    have = np.append(counts[~rare], counts[rare].sum())
    want = np.append(expected[~rare], expected[rare].sum())
    have, want = have[want > 0], want[want > 0]
    if len(want) > 1:
        assert stats.chisquare(have, want).pvalue > LEAST_P


@pytest.fixture(params=SAMPLERS)
def sampler(request: pytest.FixtureRequest) -> Callable[..., torch.Tensor]:
    return SAMPLERS[request.param]


ASKED: list[dict[str, float]] = [
    {},
    {"temperature": 0.3},
    {"temperature": 2.5},
    {"top_k": 1},
    {"top_k": 5},
    {"top_k": 1000},
    {"top_p": 0.6},
    {"top_p": 0.95, "temperature": 1.7},
    {"top_p": 1e-6},
    {"min_p": 0.2},
    {"min_p": 1.0},
    {"top_k": 8, "top_p": 0.8, "temperature": 1.3},
    {"top_k": 10, "top_p": 0.95, "min_p": 0.1, "temperature": 0.8},
]


@pytest.mark.parametrize("asked", ASKED, ids=lambda asked: "-".join(f"{n}={v}" for n, v in asked.items()) or "plain")
@pytest.mark.parametrize("varied", ["seeds", "positions"])
def test_distribution(sampler: Callable[..., torch.Tensor], asked: dict[str, Any], varied: str) -> None:
    """One row a draw; either the seed or the position changes from row to row."""
    generator = torch.Generator().manual_seed(3)
    logits = 2 * torch.randn(VOCABULARY, generator=generator)
    arguments = settings_of(DRAWS, **asked)
    rows = DRAWS
    if arguments["cut"] and sampler is not sample.reference:
        rows = KERNEL_DRAWS
    fixed, running = torch.full((rows,), 12345), torch.arange(rows)
    seeds, positions = (running, fixed) if varied == "seeds" else (fixed, running)
    drawn = sampler(
        logits.expand(rows, -1).contiguous(), seeds=seeds, positions=positions, **settings_of(rows, **asked)
    )
    assert_distribution(drawn, probabilities(logits.numpy(), **asked))


def test_a_wide_vocabulary(sampler: Callable[..., torch.Tensor]) -> None:
    """More tokens than lanes, blocks and words: every group of the noise is fair."""
    rows, tokens = 4000, 1003
    logits = torch.zeros(rows, tokens)
    drawn = sampler(logits, seeds=torch.arange(rows) * 977, positions=torch.arange(rows) % 7, **settings_of(rows))
    groups = np.bincount(drawn.numpy() // 59, minlength=17)
    assert stats.chisquare(groups).pvalue > LEAST_P
    lanes = np.bincount(drawn.numpy()[drawn.numpy() < 1000] % 4, minlength=4)
    assert stats.chisquare(lanes).pvalue > LEAST_P


def test_rows_do_not_know_each_other(sampler: Callable[..., torch.Tensor]) -> None:
    """A row's token is the same alone, in any batch, in any place."""
    generator = torch.Generator().manual_seed(5)
    rows = 40
    arguments: dict[str, Any] = {
        "logits": 3 * torch.randn(rows, 300, generator=generator),
        "temperature": torch.rand(rows, generator=generator) * 2,
        "top_k": torch.randint(0, 50, (rows,), generator=generator),
        "top_p": torch.rand(rows, generator=generator) * 0.9 + 0.1,
        "min_p": torch.rand(rows, generator=generator) * 0.2,
        "seeds": torch.randint(-(1 << 62), 1 << 62, (rows,), generator=generator),
        "positions": torch.randint(0, 1 << 20, (rows,), generator=generator),
    }
    arguments["temperature"][::5] = 0
    whole = sampler(**arguments, greedy=False, cut=True)
    order = torch.randperm(rows, generator=generator)
    assert torch.equal(
        sampler(**{name: one[order] for name, one in arguments.items()}, greedy=False, cut=True), whole[order]
    )
    for row in range(rows):
        alone = sampler(**{name: one[row : row + 1] for name, one in arguments.items()}, greedy=False, cut=True)
        assert alone[0] == whole[row]


def test_a_row_without_cuts_is_the_same_beside_one_with(sampler: Callable[..., torch.Tensor]) -> None:
    """`cut` and `greedy` speak of the batch; what they leave out must not change a row."""
    logits = torch.randn(3, 100, generator=torch.Generator().manual_seed(1))
    arguments = {**settings_of(3), "seeds": torch.tensor([1, 2, 3]), "positions": torch.tensor([4, 5, 6])}
    plain = sampler(logits, **{**arguments, "cut": False})
    assert torch.equal(sampler(logits, **{**arguments, "cut": True}), plain)
    arguments["temperature"][:] = 0
    greedy = sampler(logits, **{**arguments, "greedy": True})
    assert torch.equal(sampler(logits, **{**arguments, "greedy": False}), greedy)
    assert torch.equal(sampler(logits, **{**arguments, "greedy": False, "cut": True}), greedy)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_greedy_takes_the_lowest_id_of_a_tie(sampler: Callable[..., torch.Tensor], dtype: torch.dtype) -> None:
    logits = torch.zeros(4, 300, dtype=dtype)
    logits[0, [7, 8, 299]] = 1
    logits[1, [299]] = 1
    logits[2, 100:] = -1
    logits[3] = float("-inf")
    logits[3, 123] = -5
    arguments = {**settings_of(4, temperature=0), "seeds": torch.arange(4), "positions": torch.arange(4)}
    for kernel in sample.kernels.values():
        if kernel.call is sampler and kernel.accepts is not None and kernel.accepts(logits, **arguments) is not None:
            pytest.skip(f"{kernel.name} refuses {dtype}")
    assert sampler(logits, **arguments).tolist() == [7, 299, 0, 123]


def test_forbidden_tokens_are_never_drawn(sampler: Callable[..., torch.Tensor]) -> None:
    """-inf stays out at any temperature, cut or not."""
    logits = torch.full((500, 50), float("-inf"))
    logits[:, [3, 30]] = torch.tensor([0.0, 1.0])
    rows = torch.arange(500)
    for asked in ({"temperature": 100.0}, {"temperature": 1.0, "top_p": 0.999}, {"temperature": 0.01}):
        drawn = sampler(logits, seeds=rows, positions=rows, **settings_of(500, **asked))
        assert set(drawn.tolist()) <= {3, 30}


# Noise


@pytest.mark.parametrize(
    ("counter", "key", "wanted"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter: tuple[int, ...], key: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    """The vectors of Random123 (kat_vectors, philox4x32 with 10 rounds)."""
    words = philox([torch.tensor([word]) for word in counter], [torch.tensor([word]) for word in key])
    assert tuple(int(word) for word in words) == wanted


def test_gumbel_noise() -> None:
    """Standard Gumbel along tokens, seeds and positions, without correlation between neighbours."""
    rows = 400
    running, fixed = torch.arange(rows), torch.zeros(rows, dtype=torch.int64)
    for seeds, positions in ((running, fixed), (fixed, running), (running << 32, fixed), (fixed, running << 33)):
        noise = gumbel(seeds, positions, 250)
        assert noise.dtype == torch.float32
        assert bool(noise.isfinite().all())
        assert stats.kstest(noise.flatten().numpy(), "gumbel_r").pvalue > LEAST_P
        for one, other in ((noise[1:], noise[:-1]), (noise[:, 1:], noise[:, :-1]), (noise[:, 4:], noise[:, :-4])):
            correlation = float(np.corrcoef(one.flatten().numpy(), other.flatten().numpy())[0, 1])
            assert abs(correlation) < 5 / one.numel() ** 0.5


def test_noise_of_a_token_is_its_own() -> None:
    """Neither the width of the vocabulary nor the rows beside it matter; seed and position do, in all their bits."""
    seeds, positions = torch.tensor([5, -1, 1 << 40]), torch.tensor([9, 1 << 35, 0])
    wide = gumbel(seeds, positions, 1001)
    assert torch.equal(gumbel(seeds, positions, 77), wide[:, :77])
    assert torch.equal(gumbel(seeds[1:2], positions[1:2], 1001), wide[1:2])
    other = gumbel(torch.tensor([5 + (1 << 33), -2, 0]), positions, 1001)
    assert not bool((other == wide).all(-1).any())
    assert not torch.equal(gumbel(seeds, positions + (1 << 32), 1001), wide)


# What surrounds a draw


@settings(max_examples=150, deadline=None)
@given(
    values=st.lists(st.integers(-6, 6), min_size=1, max_size=12),
    top_k=st.integers(0, 14),
    top_p=st.floats(0.05, 1.0),
    min_p=st.floats(0.0, 1.0),
)
def test_kept(values: list[int], top_k: int, top_p: float, min_p: float) -> None:
    """Against the cut done one token after the other; cuts closer than rounding to a border are left open."""
    logits = torch.tensor([values], dtype=torch.float32) / 2
    mask = kept(logits, torch.tensor([top_k]), torch.tensor([top_p]), torch.tensor([min_p]))[0].numpy()
    nudges = ((top_p * (1 - 1e-5), min(min_p * (1 + 1e-5), 1.0)), (top_p * (1 + 1e-5), min_p * (1 - 1e-5)))
    allowed = [probabilities(logits[0].numpy(), 1.0, top_k, p, m) > 0 for p, m in nudges]
    assert mask[int(np.argmax(values))]
    assert any(np.array_equal(mask, one) for one in allowed) or not np.array_equal(*allowed)


def test_adjust_by_hand() -> None:
    """Repetition first, on either sign, then frequency and presence of what is in the output, then biases."""
    logits = torch.tensor([[2.0, -2.0, 1.0, 0.5], [2.0, -2.0, 1.0, 0.5]])
    before = logits.clone()
    out = adjust(
        logits,
        torch.tensor([0, 0, 1]),
        torch.tensor([0, 1, 0]),
        torch.tensor([2.0, 0.0, 1.0]),
        torch.tensor([1.0, 0.0, 1.0]),
        torch.tensor([0.5, 0.0]),
        torch.tensor([0.25, 0.0]),
        torch.tensor([2.0, 1.0]),
        torch.tensor([0, 1, 1]),
        torch.tensor([3, 3, 2]),
        torch.tensor([10.0, float("-inf"), -1.0]),
    )
    assert torch.equal(logits, before)
    assert out.tolist() == [[2.0 / 2 - 2 * 0.25 - 0.5, -4.0, 1.0, 10.5], [2.0, -2.0, 0.0, float("-inf")]]


def test_score_by_hand() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0], [2.0, 2.0, 1.0]])
    chosen, ranks, values, ids = score(logits, torch.tensor([2, 1]), 2)
    logs = np.log(np.exp(logits.numpy()) / np.exp(logits.numpy()).sum(-1, keepdims=True))
    np.testing.assert_allclose(chosen.numpy(), [logs[0, 2], logs[1, 1]], rtol=1e-5)
    assert ranks.tolist() == [2, 1]
    assert ids[0].tolist() == [1, 2]
    np.testing.assert_allclose(values.numpy(), np.sort(logs)[:, :0:-1], rtol=1e-5)
