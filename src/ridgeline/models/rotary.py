"""Tables of cosines and sines for rotary position embedding, in each of its stretched forms.

Knows frequencies. It must not know attention: the op `rope_kv_write` reads rows of these tables.
"""

from __future__ import annotations

import math

import torch

from ridgeline.models.spec import Rope


def frequencies(rope: Rope, head_dim: int, max_positions: int) -> tuple[torch.Tensor, float]:
    """Inverse frequencies [head_dim / 2] (fp32) and the factor on cosines and sines.

    max_positions: longest sequence that will be run. "dynamic" (NTK-aware) stretching depends on a
    length: Transformers takes the longest seen so far, which would leave cached keys rotated by other
    frequencies than later ones; here it is fixed by max_positions for the engine's life.
    """
    theta = rope.theta
    if rope.kind == "dynamic":
        ratio = max(max_positions, rope.original_positions) / rope.original_positions
        theta *= (rope.factor * ratio - (rope.factor - 1)) ** (head_dim / (head_dim - 2))
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64, device="cpu").float() / head_dim
    plain = 1.0 / (theta**exponents)
    if rope.kind == "linear":
        return plain / rope.factor, 1.0
    if rope.kind == "llama3":
        return _llama3(rope, plain), 1.0
    if rope.kind == "yarn":
        return _yarn(rope, plain, head_dim)
    return plain, 1.0


def _llama3(rope: Rope, plain: torch.Tensor) -> torch.Tensor:
    """Long wavelengths slowed by `factor`, short ones kept, a linear blend between (Llama 3.1 release)."""
    turns = rope.original_positions * plain / (2 * math.pi)
    blend = ((turns - rope.low_frequency) / (rope.high_frequency - rope.low_frequency)).clamp(0, 1)
    return plain * (blend + (1 - blend) / rope.factor)


def _yarn(rope: Rope, plain: torch.Tensor, head_dim: int) -> tuple[torch.Tensor, float]:
    """NTK by parts (Peng et al., 2309.00071): dimensions that turn often are kept, rare ones slowed."""

    def dimension(turns: float) -> float:
        return head_dim * math.log(rope.original_positions / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    slowed = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    mixed = plain / rope.factor * slowed + plain * (1 - slowed)
    if rope.attention_factor is not None:
        return mixed, rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return mixed, _magnitude(rope.factor, rope.mscale) / _magnitude(rope.factor, rope.mscale_all_dim)
    return mixed, _magnitude(rope.factor, 1.0)


def _magnitude(factor: float, scale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


def rotary_tables(
    rope: Rope, head_dim: int, max_positions: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines [max_positions, head_dim / 2], fp32, on `device`."""
    if device.type == "meta":
        table = torch.empty(max_positions, head_dim // 2, device=device)
        return table, table
    inverse, factor = frequencies(rope, head_dim, max_positions)
    angles = torch.arange(max_positions, dtype=torch.float32, device=device)[:, None] * inverse.to(device)[None]
    return angles.cos() * factor, angles.sin() * factor
