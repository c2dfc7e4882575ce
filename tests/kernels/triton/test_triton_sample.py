"""sample: the reference's integers exactly, its noise to the last bits, and its choice unless two tie."""

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl
from triton_checks import kinds

from ridgeline.kernels.triton.sample import _accepts, philox, sample_triton, uniform
from ridgeline.kernels.triton.sample import gumbel as gumbel_of
from ridgeline.ops.sample import gumbel, kept, sample
from ridgeline.ops.sample import philox as reference_philox


@triton.jit
def _words_kernel(counter: tl.tensor, key: tl.tensor, out: tl.tensor, BLOCK: tl.constexpr) -> None:
    i = tl.arange(0, BLOCK)
    a, b, c, d = philox(
        tl.load(counter + i).to(tl.uint32),
        tl.load(counter + BLOCK + i).to(tl.uint32),
        tl.load(counter + 2 * BLOCK + i).to(tl.uint32),
        tl.load(counter + 3 * BLOCK + i).to(tl.uint32),
        tl.load(key + i).to(tl.uint32),
        tl.load(key + BLOCK + i).to(tl.uint32),
    )
    tl.store(out + i, a.to(tl.int64))
    tl.store(out + BLOCK + i, b.to(tl.int64))
    tl.store(out + 2 * BLOCK + i, c.to(tl.int64))
    tl.store(out + 3 * BLOCK + i, d.to(tl.int64))


@triton.jit
def _noise_kernel(bits: tl.tensor, u: tl.tensor, noise: tl.tensor, BLOCK: tl.constexpr) -> None:
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = uniform(tl.load(bits + i).to(tl.uint32))
    tl.store(u + i, value)
    tl.store(noise + i, gumbel_of(value))


def test_philox(device: str) -> None:
    counter = torch.randint(1 << 32, (4, 64), device=device)
    key = torch.randint(1 << 32, (2, 64), device=device)
    counter[:, 0], key[:, 0] = 0xFFFFFFFF, 0xFFFFFFFF  # Random123's known answer for all ones
    out = torch.empty(4, 64, device=device, dtype=torch.int64)
    _words_kernel[(1,)](counter, key, out, BLOCK=64)
    assert torch.equal(out, torch.stack(reference_philox(list(counter), list(key))))
    assert out[:, 0].tolist() == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


def test_uniform_and_gumbel(device: str) -> None:
    edges = torch.tensor([0, 1, 2, 1 << 23, 1 << 24, 1 << 25, 1 << 26, 1 << 31, (1 << 32) - 256])
    around = (edges[:, None] + torch.arange(-300, 300)).flatten()
    count = 1 << (14 if device == "cpu" else 20)
    bits = torch.cat((around[(around >= 0) & (around < 1 << 32)], torch.randint(1 << 32, (count,))))
    bits = bits[: len(bits) // 256 * 256].to(device)
    u, noise = (torch.empty(len(bits), device=device) for _ in range(2))
    _noise_kernel[(len(bits) // 256,)](bits, u, noise, BLOCK=256)
    want = ((bits.double() + 0.5) * 2.0**-32).float().clamp(max=1 - 2.0**-24)
    assert torch.equal(u, want)
    exact = -torch.log(-torch.log1p(-want.double()))
    own = -torch.log(-torch.log1p(-want))
    slack = 1e-6
    assert (noise.double() - exact).abs().max() <= 2 * (own.double() - exact).abs().max() + slack


def check(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    cut: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None,
    seeds: torch.Tensor,
    positions: torch.Tensor,
) -> torch.Tensor:
    """The kernel's tokens; where the reference chose another one, both must be all but equal."""
    rows = len(logits)
    k, p, m = cut or (
        torch.zeros(rows, dtype=torch.int64, device=logits.device),
        torch.ones(rows, device=logits.device),
        torch.zeros(rows, device=logits.device),
    )
    args = (logits, temperature, k, p, m, seeds, positions, False, cut is not None)
    got, want = sample_triton(*args), sample.reference(*args)
    scaled = logits.float() / torch.where(temperature > 0, temperature, 1.0)[:, None]
    noisy = scaled + gumbel(seeds, positions, logits.shape[1])
    if cut:
        noisy = noisy.masked_fill(~kept(scaled, k, p, m), float("-inf"))
    for row in (got != want).nonzero().flatten().tolist():
        assert temperature[row] > 0
        assert noisy[row, want[row]] - noisy[row, got[row]] < 2e-5
    return got


def settings(rows: int, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    temperature = torch.rand(rows, device=device) + 0.3
    temperature[::3] = 0
    seeds = torch.randint(-(1 << 62), 1 << 62, (rows,), device=device)
    positions = torch.randint(1 << 40, (rows,), device=device)
    return temperature, seeds, positions


@pytest.mark.parametrize("cut", [False, True])
def test_against_reference(device: str, cut: bool) -> None:
    shapes = ((4, 50), (7, 4099)) if device == "cpu" else ((1, 151936), (33, 262144), (256, 32003))
    for dtype in kinds(device):
        for rows, tokens in shapes:
            logits = (4 * torch.randn(rows, tokens + 3, device=device)).to(dtype)[:, :tokens]
            temperature, seeds, positions = settings(rows, device)
            limits = (
                torch.randint(50, (rows,), device=device),
                torch.rand(rows, device=device) / 2 + 0.5,
                torch.rand(rows, device=device) / 10,
            )
            check(logits, temperature, limits if cut else None, seeds, positions)


def test_ties_forbidden_tokens_and_nan(device: str) -> None:
    tokens = 5000
    logits = torch.full((5, tokens), float("-inf"), device=device)
    logits[1, 4999] = 0.0  # one token left
    logits[2, [2047, 2048, 4999]] = 3.0  # a tie over two stretches
    logits[3] = float("nan")
    logits[4] = float("nan")
    logits[4, 7] = -5.0
    temperature = torch.tensor([0.0, 1.0, 0.0, 1.0, 1.0], device=device)
    seeds, positions = torch.arange(5, device=device), torch.arange(5, device=device)
    zeros, ones = torch.zeros(5, device=device), torch.ones(5, device=device)
    args = (zeros.long(), ones, zeros, seeds, positions)
    assert sample_triton(logits, temperature, *args, False, False).tolist() == [0, 4999, 2047, tokens, tokens]
    assert sample_triton(logits, zeros, *args, True, False).tolist() == [0, 4999, 2047, tokens, tokens]


def test_a_row_is_drawn_alike_alone_and_in_any_batch(device: str) -> None:
    logits = torch.randn(6, 3000, device=device)
    temperature, seeds, positions = settings(6, device)
    together = check(logits, temperature, None, seeds, positions)
    for row in range(6):
        part = slice(row, row + 1)
        alone = check(logits[part], temperature[part], None, seeds[part], positions[part])
        assert alone.item() == together[row].item()


def test_frequencies(device: str) -> None:
    """Draws follow softmax: chi-squared over 5 tokens, far from the 1e-6 tail."""
    rows = 80 if device == "cpu" else 100_000
    chances = torch.tensor([0.4, 0.2, 0.2, 0.1, 0.1], device=device)
    logits = chances.log().expand(rows, 5).contiguous()
    ones = torch.ones(rows, device=device)
    seeds, positions = torch.full((rows,), 7, device=device), torch.arange(rows, device=device)
    got = sample_triton(logits, ones, 0 * seeds, ones, 0 * ones, seeds, positions, False, False)
    counts = torch.stack([(got == token).sum() for token in range(5)]).double()
    expected = rows * chances.double()
    assert ((counts - expected).square() / expected).sum() < 33.4


def test_refuses() -> None:
    inputs = next(iter(sample.inputs("meta", torch.float32)))
    assert _accepts(**inputs) is None
    assert "262144" in str(_accepts(**{**inputs, "logits": torch.empty(1, (1 << 18) + 1, device="meta")}))
    assert "float64" in str(_accepts(**{**inputs, "logits": inputs["logits"].double()}))
